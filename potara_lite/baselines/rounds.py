"""Rounds of any federated algorithm: what its clients hold, train, send and receive, and what it costs them.

A client *holds* a dictionary of tensors. Plain names are the adapter that it shares, or its only one; further ones
have a prefix: ``personal:`` (a second, personal adapter), ``global_reference:`` (the shared one as it was received), ``merged_residual:``
(what was added to the frozen weights for good) and so on. ``run_algorithm`` plays the rounds of any ``Algorithm``:

1. *down*: every participant takes the message (``tensors | message``), then ``on_receive``;
2. *train*: the phases, one after another, each with its tensors, its objective and its part of the local steps;
3. *up*: every participant sends the tensors that are uploaded; the server aggregates them into the next message.

The first message holds the initial values of what is uploaded; the last one, which all clients get, is the result.
Every optimiser is AdamW. The methods themselves are declared in ``algorithms.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.lora import AdaptedBackbone, delta_added
from ..adapters.state import (
    Adapter,
    adapter_bytes,
    client_adapter,
    delta,
    door,
    flatten,
    is_lora,
    repeat_adapter,
    select_clients,
)
from ..checks import check_fields, function, kind, options_of, several, unchecked, whole
from ..federation.split import Split
from ..merging.merge import merge_exact
from ..training.fedavg import Ledger, participants, weighted_average
from ..training.train import Objective, OptimizerState, check_labels, train
from .privacy import Privacy, private_average

NameFilter = Callable[[str], bool]


def is_shared(name: str) -> bool:
    """A tensor with a plain name: of the shared (or only) adapter."""
    return ":" not in name


def is_head(name: str) -> bool:
    """A directly trained tensor of the shared (or only) adapter."""
    return is_shared(name) and not is_lora(name)


def select_prefix(tensors: Adapter, prefix: str = "") -> Adapter:
    """The adapter that a client holds under ``prefix``; without one, the shared adapter."""
    if not prefix:
        return {name: tensor for name, tensor in tensors.items() if is_shared(name)}
    return {n.removeprefix(f"{prefix}:"): tensor for n, tensor in tensors.items() if n.startswith(f"{prefix}:")}


def add_prefix(prefix: str, adapter: Adapter) -> Adapter:
    """The adapter's tensors under ``prefix``: the inverse of ``select_prefix``."""
    return {f"{prefix}:{name}": tensor for name, tensor in adapter.items()}


def fedavg(stack: Adapter, sizes: Tensor) -> Adapter:
    """What FedAvg sends down: to every client the mean weighted by sizes."""
    return repeat_adapter(weighted_average(stack, sizes), len(sizes))


def first_client(stack: Adapter) -> Adapter:
    """The shared adapter out of stacks in which all clients hold the same."""
    return client_adapter(select_prefix(stack), 0)


def message_bytes(message: Adapter, clients: int) -> Tensor:
    """The bytes of each client's part of a message (a stack), ``(C,)``, in the dtypes that its tensors have."""
    return torch.full((clients,), adapter_bytes(client_adapter(message, 0)), dtype=torch.int64)


@dataclass(frozen=True)
class Phase:
    """A part of a round's local training.

    ``is_trained``: the tensors that train in it. ``objective(f, tensors)``: their loss, where ``f`` is the loss of an
    adapter on the batch; by default ``f`` of the algorithm's personal model. ``steps``: how many steps it takes of a
    round's local steps. ``models``: how many models take an optimiser step in each of them.
    """

    is_trained: NameFilter = is_shared
    objective: Objective | None = None
    steps: Callable[[int], int] = lambda steps: steps
    models: int = 1

    def __post_init__(self):
        check_fields(self, is_trained=function, steps=function, models=whole(1))


@dataclass(frozen=True)
class Algorithm:
    """A method: what its clients hold, train, send and receive, and which model of theirs is evaluated.

    Stacks have the clients in the order of their ids, in whatever order a split has them.

    ``init``: the stack of initial adapters to what the clients hold. ``phases``: the local training. ``is_uploaded``:
    the tensors that go up. ``aggregate(stack, sizes)``: what came up to what goes down, a row per client.
    ``on_receive(tensors, number)``: what a client does with message ``number``, once it has overwritten what it names.
    ``personal_model``: what the clients hold to the models that are evaluated, a stack; it also takes one client's
    tensors. ``federated_model``: to the model of the federation, if there is one. ``backbone``: what runs the models.
    ``keep_optimizer``: AdamW's state outlives the round. ``frozen``: an adapter, the same for all, that is in the
    frozen weights while the phases train. ``finetune_steps``: local steps after the last round. ``wise_ft_weight``: the
    weight that the model before these steps has in the result. ``message_bytes``: the bytes of a message to or from
    each client. ``broadcast_to_all``: what clients hold is the sum of all messages, so those who sit a round out get
    its message none the less. ``privacy``: the mean is that of ``private_average`` instead of FedAvg's.

    Raises ``ValueError`` for privacy with another aggregate than FedAvg.
    """

    name: str
    init: Callable[[Adapter], Adapter] = lambda stack: stack
    phases: tuple[Phase, ...] = (Phase(),)
    is_uploaded: NameFilter = lambda name: False
    aggregate: Callable[[Adapter, Tensor], Adapter] = fedavg
    on_receive: Callable[[Adapter, int], Adapter] = lambda tensors, number: tensors
    personal_model: Callable[[Adapter], Adapter] = select_prefix
    federated_model: Callable[[Adapter], Adapter] | None = None
    backbone: Callable[[AdaptedBackbone], AdaptedBackbone] = lambda adapted: adapted
    keep_optimizer: bool = True
    frozen: Callable[[Adapter], Adapter] = lambda tensors: {}
    finetune_steps: int = 0
    wise_ft_weight: float = 0.0
    message_bytes: Callable[[Adapter, int], Tensor] = message_bytes
    broadcast_to_all: bool = False
    privacy: Privacy | None = None

    def __post_init__(self):
        functions = "init is_uploaded aggregate on_receive personal_model federated_model backbone frozen message_bytes"
        check_fields(self, phases=several(kind("Phase")), **dict.fromkeys(functions.split(), function))
        object.__setattr__(self, "phases", tuple(self.phases))
        if self.privacy is not None and self.aggregate is not fedavg:
            raise ValueError(f"{self.name}: noise is for the mean of FedAvg, this method has another aggregate")

    def upload(self, tensors: Adapter) -> Adapter:
        """What goes up of the tensors that clients hold."""
        return {name: tensor for name, tensor in tensors.items() if self.is_uploaded(name)}

    def trained(self, phase: int, tensors: Adapter) -> Adapter:
        """What a phase trains of the tensors that clients hold. Raises ``ValueError`` if that is nothing."""
        chosen = {name: tensor for name, tensor in tensors.items() if self.phases[phase].is_trained(name)}
        if not chosen:
            raise ValueError(f"{self.name}: phase {phase} trains none of {sorted(tensors)}")
        return chosen

    def new_optimizers(self, tensors: Adapter) -> list[OptimizerState]:
        """The optimiser state of every phase before its first step."""
        return [OptimizerState.zeros(flatten(self.trained(i, tensors))) for i in range(len(self.phases))]

    def bytes_of(self, message: Adapter, rows: Tensor, clients: int) -> Tensor:
        """The bytes of a message to or from the clients in these rows, for all ``clients``: ``(C,)``."""
        sizes = self.message_bytes(message, len(rows)) if message else torch.zeros_like(rows)
        return torch.zeros(clients, dtype=torch.int64).index_copy(0, rows, sizes)

    def local_cost(self, steps: int) -> int:
        """The optimiser steps that ``steps`` local steps of a round are, all phases and models counted."""
        return sum(phase.steps(steps) * phase.models for phase in self.phases)


@dataclass(frozen=True)
class Personalised:
    """What a run gives: the clients' models (a stack) and the backbone that runs them, the federation's model (no
    client dimension; ``None`` for methods without one), what each client paid in all and by round, and all the tensors
    that the clients hold."""

    adapted: AdaptedBackbone
    personal: Adapter
    federated: Adapter | None
    ledger: Ledger
    by_round: Ledger
    tensors: Adapter

    def rows(self, index: Tensor) -> Personalised:
        """The same with its clients in the order of these rows."""
        personal, tensors = (select_clients(stack, index) for stack in (self.personal, self.tensors))
        ledgers = (Ledger(**{n: c[..., index] for n, c in vars(one).items()}) for one in (self.ledger, self.by_round))
        return Personalised(self.adapted, personal, self.federated, *ledgers, tensors)


def client_step(
    algorithm: Algorithm,
    adapted: AdaptedBackbone,
    split: Split,
    tensors: Adapter,
    optimizers: list[OptimizerState],
    *,
    number: int,
    local_steps: int,
    steps: int | None = None,
    seed: int = 0,
    **training,
) -> tuple[Adapter, list[OptimizerState]]:
    """Round ``number`` at some clients: the phases of ``local_steps`` (of ``steps``, for fine-tuning), one by one.

    ``tensors`` and ``optimizers`` are theirs; both are returned as they are afterwards. Each phase reads the client's
    batch stream ``(seed, 0)`` from where the round begins.
    """
    optimizers = list(optimizers)
    for i, phase in enumerate(algorithm.phases):
        moving = algorithm.trained(i, tensors)
        frozen = unchecked(client_adapter)(algorithm.frozen(tensors), 0)
        with delta_added(adapted, unchecked(delta)(frozen, adapted.scaling)):
            trained = unchecked(train)(
                adapted,
                moving,
                split,
                steps=phase.steps(local_steps if steps is None else steps),
                start=number * phase.steps(local_steps),
                state=optimizers[i],
                seed=(seed, 0),
                objective=phase.objective or (lambda f, mine: f(algorithm.personal_model(mine))),
                fixed={name: tensor for name, tensor in tensors.items() if name not in moving},
                **training,
            )
        tensors, optimizers[i] = tensors | trained.adapters, trained.state
    return tensors, optimizers if algorithm.keep_optimizer else algorithm.new_optimizers(tensors)


def server_step(
    algorithm: Algorithm, uploads: Adapter, sizes: Tensor, clients: int, *, sent: Adapter, number: int
) -> Adapter:
    """The message to all ``clients`` after round ``number``, from what those of these ``sizes`` sent and the message
    ``sent`` to them, a stack.

    Raises ``ValueError`` when some sat the round out and the message differs from client to client.
    """
    if algorithm.privacy and uploads:
        mean = private_average(uploads, client_adapter(sent, 0), algorithm.privacy, number)
        return repeat_adapter(mean, clients)
    message = algorithm.aggregate(uploads, sizes) if uploads else {}
    return message if len(sizes) == clients else _same_for_all(message, clients, algorithm.name)


def _same_for_all(message: Adapter, clients: int, name: str) -> Adapter:
    """A message to some clients, which must be the same for each, as one to all."""
    if any((tensor != tensor[:1]).any() for tensor in message.values()):
        raise ValueError(f"{name}: its messages differ from client to client, so all of them must take part")
    return unchecked(repeat_adapter)(unchecked(client_adapter)(message, 0), clients)


def _replace_clients(tensors: Adapter, rows: Tensor, new: Adapter) -> Adapter:
    """The stacks with the rows of some clients replaced; what only these clients hold is zero for the others."""
    clients = len(next(iter(tensors.values())))
    if len(rows) == clients:
        return new
    result = dict(tensors)
    for name, tensor in new.items():
        old = result.get(name, tensor.new_zeros(clients, *tensor.shape[1:]))
        result[name] = old.index_copy(0, rows.to(tensor.device), tensor)
    return result


@door(training=options_of(train))
def run_algorithm(
    algorithm: Algorithm,
    adapted: AdaptedBackbone,
    split: Split,
    *,
    rounds: int,
    local_steps: int,
    participation: float = 1.0,
    seed: int = 0,
    progress: bool = False,
    **training,
) -> Personalised:
    """Play ``rounds`` rounds of ``local_steps`` steps; ``training`` goes to ``train`` (lr, batch_size, clip, …).

    Each phase reads the client's batch stream ``(seed, 0)`` from where the round begins, so a phase with all the steps
    of a round sees what ``fedit`` sees. ``participation``: the share of clients in each round, drawn as ``fedit`` does.
    The ledger counts the messages as they were passed, and an optimiser step for every model that took one. In whatever
    order the clients stand, their models are the same to the last bit.

    Raises ``ValueError`` for a phase that trains none of the tensors, and for less than full participation in a method
    whose messages differ from client to client.

    >>> from potara_lite import Setting, prepare
    >>> from potara_lite.baselines.algorithms import FEDSA
    >>> adapted, federation = prepare(Setting(clients=2, train_size=8, calibration_size=4, test_size=8), seed=0)
    >>> result = run_algorithm(FEDSA, adapted, federation.train, rounds=2, local_steps=1)
    >>> result.ledger.up.tolist(), result.by_round.up[:, 0].tolist()
    ([81920, 81920], [40960, 40960, 0])
    """
    if "loss" not in training:
        check_labels(adapted, repeat_adapter(adapted.initial, 1), split)
    order = torch.tensor(split.ids).argsort()  # sums of floats depend on the order: it is that of the ids
    is_sorted = bool((order.diff() > 0).all())
    options = dict(local_steps=local_steps, seed=seed, **training)
    found = _play(
        algorithm, adapted, split if is_sorted else split.rows(order.tolist()), rounds, participation, progress, options
    )
    return found if is_sorted else found.rows(order.argsort())


def _play(
    algorithm: Algorithm,
    adapted: AdaptedBackbone,
    split: Split,
    rounds: int,
    participation: float,
    progress: bool,
    options: dict,
) -> Personalised:
    """``run_algorithm`` with the clients as they stand; ``options`` go to ``client_step``."""
    model, clients, everyone = algorithm.backbone(adapted), len(split), torch.arange(len(split))
    tensors, by_round = algorithm.init(repeat_adapter(adapted.initial, clients)), []
    optimizers = algorithm.new_optimizers(tensors)
    message = algorithm.upload(tensors)
    if participation < 1:
        message = _same_for_all(message, clients, algorithm.name)
    for number in tqdm(range(rounds + 1), disable=not progress, unit="round", desc=algorithm.name):
        chosen = everyone if number == rounds else participants(split.ids, participation, options["seed"], number)
        receivers = everyone if algorithm.broadcast_to_all else chosen
        received = algorithm.on_receive(select_clients(tensors | message, receivers), number)
        tensors = _replace_clients(tensors, receivers, received)
        down, up, steps = algorithm.bytes_of(select_clients(message, receivers), receivers, clients), 0 * everyone, 0
        if number < rounds:
            mine = select_clients(tensors, chosen)
            part = split if len(chosen) == clients else split.rows(chosen.tolist())
            states = [state.rows(chosen) for state in optimizers]
            mine, states = client_step(algorithm, model, part, mine, states, number=number, **options)
            tensors = _replace_clients(tensors, chosen, mine)
            optimizers = [old.replace_rows(chosen, new) for old, new in zip(optimizers, states)]
            uploads = algorithm.upload(mine)
            message = server_step(algorithm, uploads, part.sizes, clients, sent=message, number=number)
            up, steps = algorithm.bytes_of(uploads, chosen, clients), algorithm.local_cost(options["local_steps"])
        by_round.append(Ledger(up, down, 0 * everyone).add(chosen, steps=steps))
    federated = algorithm.federated_model and algorithm.federated_model(tensors)
    personal = algorithm.personal_model(tensors)
    if algorithm.finetune_steps:
        tensors, personal = finetune_step(algorithm, model, split, tensors, personal, number=rounds, **options)
        by_round[-1] = by_round[-1].add(everyone, steps=algorithm.local_cost(algorithm.finetune_steps))
    ledger = Ledger.by_round(by_round)
    return Personalised(model, personal, federated, ledger.total(), ledger, tensors)


def finetune_step(
    algorithm: Algorithm, model: AdaptedBackbone, split: Split, tensors: Adapter, before: Adapter, **options
) -> tuple[Adapter, Adapter]:
    """What the clients hold after their local steps, and their models: those, or a point on the way to them."""
    optimizers, steps = algorithm.new_optimizers(tensors), algorithm.finetune_steps
    tensors, _ = client_step(algorithm, model, split, tensors, optimizers, steps=steps, **options)
    after, weight = algorithm.personal_model(tensors), algorithm.wise_ft_weight
    return tensors, unchecked(merge_exact)(before, after, weight) if weight else after
