"""Federated LoRA algorithms as declarations: what trains, what is uploaded, how it is averaged, what stays personal.

Each method is an ``Algorithm`` that ``run_algorithm`` runs (``rounds.py`` says how); its docstring names the source and
the case in which it degenerates. Averages are weighted by the clients' sizes unless a docstring says otherwise.

A method of your own is one more declaration. LG-FedAvg (Liang et al., 2020, arXiv 2001.01523) shares the head and
keeps the representation; a robust FedIT takes the median where FedAvg takes the mean (Yin et al., ICML 2018):

>>> lg_fedavg = Algorithm("LG-FedAvg", is_uploaded=is_head)
>>> def median(stack, sizes):
...     return repeat_adapter({name: tensor.quantile(0.5, 0) for name, tensor in stack.items()}, len(sizes))
>>> robust = Algorithm("FedIT with medians", is_uploaded=is_shared, aggregate=median, federated_model=first_client)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from ..adapters.lora import AdaptedBackbone, ModelState
from ..adapters.state import (
    Adapter,
    bytes_by_rank,
    client_adapter,
    client_dims,
    count_clients,
    cut_ranks,
    factor_names,
    factors,
    is_lora,
    lora_layers,
    repeat_adapter,
)
from ..checks import Count, Flag, Fraction, List, NonNegative, Size, checked
from ..merging.merge import combine_adapters, compress, concat_ranks, limit_rank, stack_ranks
from ..training.fedavg import weighted_average
from .rounds import Algorithm, Phase, add_prefix, first_client, is_head, is_shared, message_bytes, select_prefix

# No sharing, and one shared adapter.

LOCAL = Algorithm("local only")

FEDIT = Algorithm("FedIT", is_uploaded=is_shared, federated_model=first_client)
"""FedAvg over both factors and the head (Zhang et al., ICASSP 2024, arXiv 2305.05644). One client: local."""

FFA = Algorithm(
    "FFA-LoRA",
    phases=(Phase(is_trained=lambda name: is_shared(name) and not is_lora(name, "A")),),
    is_uploaded=lambda name: is_shared(name) and not is_lora(name, "A"),
    federated_model=first_client,
)
"""A keeps its initial value, the same for all, B (and the head) is uploaded (Sun et al., ICLR 2024, arXiv 2403.12313):
the mean of the products is the product of the means."""


def shared_loss(f: Callable[[Adapter], Tensor], tensors: Adapter) -> Tensor:
    """The loss of the shared adapter."""
    return f(select_prefix(tensors))


def squared_distance(tensors: Adapter, prefix: str) -> Tensor:
    """``|w - global_reference|²`` over all tensors of the adapter ``w`` under ``prefix``."""
    adapter = select_prefix(tensors, prefix)
    global_reference = select_prefix(tensors, "global_reference")
    return sum((adapter[name] - global_reference[name]).square().sum() for name in adapter)


def keep_global_reference(tensors: Adapter, number: int) -> Adapter:
    """Keep a copy of the shared adapter as it was received."""
    return tensors | add_prefix("global_reference", select_prefix(tensors))


@checked
def fedprox(mu: NonNegative = 0.1) -> Algorithm:
    """FedIT whose clients minimise ``f(w) + mu/2 |w - global_reference|²``, with the shared adapter as it was received
    as reference (Li et al., MLSys 2020, arXiv 1812.06127). ``mu=0`` is FedIT."""

    def objective(f, tensors):
        return f(select_prefix(tensors)) + mu / 2 * squared_distance(tensors, "")

    return replace(FEDIT, name="FedProx", phases=(Phase(objective=objective),), on_receive=keep_global_reference)


@checked
def finetuned(algorithm: Algorithm, steps: Count) -> Algorithm:
    """The same, and then ``steps`` local steps of every client with nothing sent and a new AdamW state; the
    federation's model is the one before them. No steps: the algorithm itself."""
    return replace(algorithm, name=f"{algorithm.name}, fine-tuned", finetune_steps=steps)


@checked
def wise_ft(algorithm: Algorithm, steps: Count, weight: Fraction = 0.5) -> Algorithm:
    """A point on the straight line between the model before and after the fine-tuning, in the deltas (Wortsman et al.,
    CVPR 2022, arXiv 2109.01903). ``weight`` is on the model before: 0 is ``finetuned``, 1 the algorithm itself."""
    return replace(finetuned(algorithm, steps), name=f"WiSE-FT of {algorithm.name}", wise_ft_weight=weight)


# Exact aggregation. What is merged into the frozen weights is kept as an adapter of its own, of any rank.


def shares(sizes: Tensor) -> list[float]:
    """The clients' weights in an average."""
    return (sizes.double() / sizes.sum()).tolist()


def merged_residual(tensors: Adapter) -> Adapter:
    """What was merged into the frozen weights."""
    return select_prefix(tensors, "merged_residual")


def with_merged_residual(tensors: Adapter) -> Adapter:
    """The shared adapter together with what was merged into the frozen weights."""
    return concat_ranks(select_prefix(tensors), merged_residual(tensors))


def merge_residual(tensors: Adapter, prefix: str) -> Adapter:
    """Add what came under ``prefix`` to what is merged already."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{prefix}:")}
    total = concat_ranks(merged_residual(tensors), select_prefix(tensors, prefix))
    return kept | add_prefix("merged_residual", limit_rank(total))


def mean_and_residual(stack: Adapter, sizes: Tensor) -> Adapter:
    """The means of the factors, and what they lack of the mean product: ``mean(BA) - mean(B) mean(A)`` is the
    covariance of the factors, ``sum_i p_i (B_i - mean B)(A_i - mean A)``, an adapter of rank C r."""
    mean = weighted_average(stack, sizes)
    deviations = [{n: t[i] - mean[n] for n, t in stack.items() if is_lora(n)} for i in range(len(sizes))]
    residual = combine_adapters(deviations, shares(sizes))
    return repeat_adapter(mean | add_prefix("residual", residual), len(sizes))


def mean_product(stack: Adapter, sizes: Tensor) -> Adapter:
    """The one adapter whose delta is the mean of the clients', of rank C r; its head is the mean of the heads."""
    return combine_adapters([client_adapter(stack, i) for i in range(len(sizes))], shares(sizes))


FEDEX = Algorithm(
    "FedEx-LoRA",
    is_uploaded=is_shared,
    phases=(Phase(objective=shared_loss),),
    aggregate=mean_and_residual,
    on_receive=lambda tensors, number: merge_residual(tensors, "residual"),
    frozen=merged_residual,
    personal_model=with_merged_residual,
    federated_model=lambda tensors: client_adapter(with_merged_residual(tensors), 0),
    broadcast_to_all=True,
)
"""FedIT, and every client also receives the residual of its mean (as factors), which is merged into the frozen weights
(Singhal et al., ACL 2025, arXiv 2410.09432). One client has no residual: local."""


def stacked(stack: Adapter, sizes: Tensor) -> Adapter:
    """All clients' factors stacked, and the mean of the heads."""
    mean = mean_product(stack, sizes)
    head = {name: tensor for name, tensor in mean.items() if is_head(name)}
    factors_of_all = {name: tensor for name, tensor in mean.items() if name not in head}
    return repeat_adapter(head | add_prefix("stacked", factors_of_all), len(sizes))


def merge_and_redraw(tensors: Adapter, number: int) -> Adapter:
    """Merge what is stacked, and start again with new factors: the entries of the first A in an order drawn for each
    round, the same for all clients, and B zero."""
    if number == 0:
        return tensors | add_prefix("first", {name: t for name, t in select_prefix(tensors).items() if is_lora(name)})
    fresh = {}
    for name, tensor in select_prefix(tensors, "first").items():
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(tensor[0].numel(), generator=generator).to(tensor.device)
        fresh[name] = tensor.flatten(1)[:, order].view_as(tensor)
    return merge_residual(tensors | fresh, "stacked")


FLORA = replace(FEDEX, name="FLoRA", aggregate=stacked, on_receive=merge_and_redraw, keep_optimizer=False)
"""The clients' factors are stacked, sent to all and merged into the frozen weights; every round begins with new factors
(Wang et al., NeurIPS 2024, arXiv 2409.05976). After one round it is the exact mean of the clients' local models."""


@checked
def flexlora(ranks: Annotated[List[Size], AfterValidator(tuple)] | None = None) -> Algorithm:
    """The mean of the products, cut by an SVD to the rank of each client (Bai et al., NeurIPS 2024, arXiv 2402.11505):
    ``B = U Σ``, ``A = Vᵀ``, as its authors' code sends it.

    ``ranks``: one for each client, in the order of their ids, at most the configuration's, whose scaling all keep. A
    smaller rank is a stack padded with zeros, which no gradient moves and which do not count as bytes. Where the rank
    is large enough for the mean product, the aggregate is exact.
    """

    def cut(stack: Adapter) -> Adapter:
        return stack if ranks is None else cut_ranks(stack, ranks)

    def aggregate(stack: Adapter, sizes: Tensor) -> Adapter:
        mean = mean_product(stack, sizes)
        for layer in lora_layers(stack):  # layers may differ in rank
            rank = factors(stack, layer)[0].shape[1]
            mean |= compress({name: mean[name] for name in factor_names(layer)}, rank, balanced=False)[0]
        return cut(repeat_adapter(mean, len(sizes)))

    largest = ranks.index(max(ranks)) if ranks else 0
    return replace(
        FEDIT,
        name="FlexLoRA",
        init=cut,
        aggregate=aggregate,
        federated_model=lambda tensors: client_adapter(select_prefix(tensors), largest),
        keep_optimizer=False,
        message_bytes=(lambda message, _: bytes_by_rank(client_adapter(message, 0), ranks)) if ranks else message_bytes,
    )


# Part shared, part personal.

FEDSA = Algorithm("FedSA-LoRA", is_uploaded=lambda name: is_shared(name) and is_lora(name, "A"))
"""A is uploaded, B (and the head) stays (Guo et al., ICLR 2025, arXiv 2410.01463). One client: local."""

FEDPER = Algorithm("FedPer", is_uploaded=lambda name: is_shared(name) and not is_head(name))
"""The body is uploaded, the head stays (Arivazhagan et al., 2019, arXiv 1912.00818). Without a head: FedIT."""


@checked
def fedrep(head_share: Fraction = 0.5) -> Algorithm:
    """FedPer whose clients train the head first and then the body, while the other one is frozen (Collins et al., ICML
    2021, arXiv 2102.07078). With ``head_share=1`` only the head trains: local linear probing."""
    head = Phase(is_trained=is_head, steps=lambda steps: round(head_share * steps))
    body = Phase(is_trained=FEDPER.is_uploaded, steps=lambda steps: steps - round(head_share * steps))
    return replace(FEDPER, name="FedRep", phases=(head, body))


# Two adapters. The shared one has plain names, the personal one the prefix ``personal:``.


def is_personal(name: str) -> bool:
    """A tensor of the personal adapter."""
    return name.startswith("personal:")


def personal(tensors: Adapter) -> Adapter:
    """The personal adapter."""
    return select_prefix(tensors, "personal")


TWO_ADAPTERS = replace(FEDIT, init=lambda stack: stack | add_prefix("personal", stack))


@checked
def ditto(strength: NonNegative = 0.1) -> Algorithm:
    """FedIT, and beside it a personal model that minimises ``f(v) + strength/2 |v - global_reference|²``, with the
    shared adapter as it was received as reference (Li et al., ICML 2021, arXiv 2012.04221; strength is its λ).
    ``strength=0`` is local."""

    def objective(f, tensors):
        return f(personal(tensors)) + strength / 2 * squared_distance(tensors, "personal")

    phases = Phase(objective=shared_loss), Phase(is_trained=is_personal, objective=objective)
    return replace(TWO_ADAPTERS, name="Ditto", phases=phases, on_receive=keep_global_reference, personal_model=personal)


@checked
def apfl(weight: Fraction = 0.5, adaptive: Flag = True) -> Algorithm:
    """The model is ``λ w + (1 - λ) v`` of the shared and the personal adapter, mixed in the deltas; each step moves w
    down its own loss, and v and (``adaptive``) λ down the mixture's (Deng et al., 2020, arXiv 2003.13461, whose α is
    1 - λ).

    ``weight``: λ at first; λ is used as if cut to [0, 1]. Fixed, 0 is local and 1 FedIT.
    """

    def mixed(tensors: Adapter) -> Adapter:
        raw = tensors["weight:"]
        clamped = (raw + (raw.clamp(0, 1) - raw).detach())[..., 0]  # in [0, 1], with the gradient of raw
        shared = {name: tensor.detach() for name, tensor in select_prefix(tensors).items()}
        return stack_ranks([shared, personal(tensors)], [clamped, 1 - clamped])

    def init(stack: Adapter) -> Adapter:
        some = next(iter(stack.values()))
        return TWO_ADAPTERS.init(stack) | {"weight:": some.new_full((len(some), 1), weight)}

    def is_trained(name: str) -> bool:
        return is_shared(name) or is_personal(name) or (adaptive and name == "weight:")

    phase = Phase(is_trained, lambda f, tensors: f(select_prefix(tensors)) + f(mixed(tensors)), models=2)
    return replace(TWO_ADAPTERS, name="APFL", init=init, phases=(phase,), personal_model=mixed)


@checked
def feddpa(weight: Fraction = 0.5) -> Algorithm:
    """FedDPA-T: in each round the personal adapter trains beside the shared one as received, then the shared one alone;
    the model is ``weight`` times the shared one plus ``1 - weight`` times the personal one (Yang et al., NeurIPS 2024,
    arXiv 2403.19211). The weight stays that of the training: their weighting of each test instance by its similarity to
    training data is not part of this. ``weight=0`` is local."""

    def both(tensors: Adapter) -> Adapter:
        return stack_ranks([select_prefix(tensors), personal(tensors)], [weight, 1 - weight])

    phases = Phase(is_trained=is_personal), Phase(objective=shared_loss)
    return replace(TWO_ADAPTERS, name="FedDPA-T", phases=phases, personal_model=both)


@checked
def gated(adapted: AdaptedBackbone) -> AdaptedBackbone:
    """The same backbone, with the same weights in memory, whose LoRA layers weigh stacked experts token by token.

    An adapter of n experts of the configuration's rank r has ``A`` of n r + n rows, the last n of which score the
    experts: ``W0 x + s Σ_k softmax(G x)_k B_k A_k x``. One expert is an ordinary LoRA, whatever its score.
    """
    shared = {id(tensor): tensor for tensor in (*adapted.model.parameters(), *adapted.model.buffers())}
    model = copy.deepcopy(adapted.model, shared)
    for layer in lora_layers(adapted.initial):
        down = model.get_submodule(layer).lora_A["default"]
        rank = len(factors(adapted.initial, layer)[0])
        dim = -1 if isinstance(down, nn.Linear) else 1

        def hook(module, inputs, output, rank=rank, dim=dim):
            experts = output.shape[dim] // (rank + 1)
            values, scores = output.split([experts * rank, experts], dim)
            return values * scores.softmax(dim).repeat_interleave(rank, dim)

        down.register_forward_hook(hook)
    return replace(adapted, model=model, state=ModelState())


def others(stack: Adapter, sizes: Tensor) -> Adapter:
    """The rest of the world of each client: the unweighted mean of the others' factors; nothing for one alone."""
    if len(sizes) == 1:
        return {}
    return add_prefix("rest", {name: (tensor.sum(0) - tensor) / (len(sizes) - 1) for name, tensor in stack.items()})


def fedalt() -> Algorithm:
    """Every client trains its own adapter beside a frozen one, the mean of the others', and a gate per layer that
    weighs the two for each token (Bian et al., AAAI 2026, arXiv 2503.11880); no message replaces the client's adapter.

    The result runs on the ``gated`` backbone alone. The gate stays with the client and begins at ½, ½; the head, which
    the paper does not have, stays too. One client has no rest of the world: local.
    """

    def init(stack: Adapter) -> Adapter:
        experts = min(count_clients(stack), 2)
        lora = {name: tensor for name, tensor in stack.items() if is_lora(name)}
        a = {name: tensor for name, tensor in lora.items() if is_lora(name, "A")}
        gate = {name: tensor.new_zeros(len(tensor), experts, *tensor.shape[2:]) for name, tensor in a.items()}
        return stack | add_prefix("gate", gate) | (add_prefix("rest", lora) if experts == 2 else {})

    def model(tensors: Adapter) -> Adapter:
        result = concat_ranks(select_prefix(tensors), select_prefix(tensors, "rest"))
        for name, gate in select_prefix(tensors, "gate").items():
            result[name] = torch.cat([result[name], gate], dim=client_dims(gate))
        return result

    return Algorithm(
        "FedALT",
        init=init,
        phases=(Phase(is_trained=lambda name: is_shared(name) or name.startswith("gate:")),),
        is_uploaded=FEDPER.is_uploaded,
        aggregate=others,
        personal_model=model,
        backbone=gated,
    )


ALGORITHMS: dict[str, Algorithm] = {
    one.name: one
    for one in (
        *(FEDIT, FFA, fedprox(), FEDEX, FLORA, flexlora()),
        *(FEDSA, FEDPER, fedrep(), ditto(), apfl(), feddpa(), fedalt()),
    )
}
"""The federated algorithms by name, each with its own defaults."""
