"""The same numbers by other people's code: the largest difference of each comparison.

    python benchmarks/peers.py            # writes peers.csv; a peer that is not installed gives a line that says so
    python benchmarks/peers.py peft timm  # these alone, printed and not written

Every function below yields ``(what, bound, difference)``, many for one ``what``. All of it is on random tensors and
without a download, in float64 unless the bound is ``SINGLE``: there the peer itself computes in float32, or its line
says why. ``pip install ".[peers]"`` brings the peers that install beside torch without changing it; mergekit,
FusionBench and the lm-evaluation-harness pin versions of their own, so give them ``pip install --no-deps``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from potara_lite import (
    Moments,
    Split,
    attach,
    client_adapter,
    combination_weights,
    combine_adapters,
    compress,
    delta,
    encode_answers,
    fedit,
    lab_vit,
    load_adapter,
    merge_exact,
    merge_factors,
    paired_differences,
    per_sample_gradients,
    repeat_adapter,
    save_adapter,
    stack_adapters,
    train,
)
from potara_lite.adapters.state import flatten
from potara_lite.baselines import merges
from potara_lite.baselines.algorithms import FEDIT, fedprox
from potara_lite.baselines.privacy import Privacy, epsilon, private_average
from potara_lite.baselines.rounds import server_step
from potara_lite.estimators.curve import parabola_moments
from potara_lite.federation.batches import batch_indices
from potara_lite.federation.text import pad_tokens
from potara_lite.results import holm
from potara_lite.training.fedavg import weighted_average
from potara_lite.training.gradients import diagonal_fisher, directional_derivatives
from potara_lite.training.scoring import greedy_tokens, log_likelihoods

EXACT, DOUBLE, SINGLE = 0.0, 1e-10, 1e-5
PATH = Path(__file__).with_name("peers.csv")
PREFIX = "base_model.model."
Found = Iterator[tuple[str, float, float]]


# --- what is compared ----------------------------------------------------------------------------------------------
class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(9, 8), nn.Linear(8, 7), nn.Linear(7, 4)

    def forward(self, x):
        return self.head(self.fc2(self.fc1(x).tanh()).tanh())


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.point = nn.Conv2d(2, 5, 3, padding=1, stride=2), nn.Conv2d(5, 4, 1)
        self.fc, self.head = nn.Linear(36, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.point(self.conv(x).tanh()).tanh().flatten(1)
        return self.head(self.fc(x).tanh())


NETWORKS = {Dense: ((9,), ["fc1", "fc2"]), Convolutional: ((2, 6, 6), ["conv", "point", "fc"])}
CONFIGS = {
    "plain": {},
    "rsLoRA": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"fc": 4, "fc2": 4}, alpha_pattern={"conv": 7, "fc1": 7}),
}


def gap(one: Tensor | np.ndarray | float, other: Tensor | np.ndarray | float) -> float:
    """The largest difference of two arrays."""
    one, other = (torch.as_tensor(array).detach().double() for array in (one, other))
    return float((one - other.reshape(one.shape)).abs().max())


def largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two dictionaries of tensors with the same names."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    return max(gap(one[name], other[name]) for name in one)


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().eval()


def config(kind: type[nn.Module], **options):
    from peft import LoraConfig

    options = dict(r=3, lora_alpha=6, target_modules=NETWORKS[kind][1], modules_to_save=["head"]) | options
    return LoraConfig(**options)


def adapted_of(kind: type[nn.Module], **options):
    return attach(network(kind), config=config(kind, **options), seed=3)


def drawn(like: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """An adapter of random tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) / 2 for n, t in like.items()}


def examples(kind: type[nn.Module], sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator, shape = torch.Generator().manual_seed(1), NETWORKS[kind][0]
    options = dict(generator=generator)
    return [(torch.randn(n, *shape, dtype=torch.float64, **options), torch.randint(4, (n,), **options)) for n in sizes]


def stock_peft(kind: type[nn.Module], adapters: list[dict[str, Tensor]], **options) -> nn.Module:
    """A PEFT model with these adapters, named a0, a1, …"""
    from peft import get_peft_model, set_peft_model_state_dict

    model = get_peft_model(network(kind), config(kind, **options), adapter_name="a0")
    for k, adapter in enumerate(adapters):
        if k:
            model.add_adapter(f"a{k}", config(kind, **options))
        set_peft_model_state_dict(model, adapter, adapter_name=f"a{k}")
    return model.eval()


def peft_deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight") and name in m.lora_A}
    return {f"{n}.weight": layer.get_delta_weight(name).flatten(1) for n, layer in layers.items()}


def deltas_of(adapted, adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our deltas, without the head."""
    return {n: t for n, t in delta(adapter, adapted.scaling).items() if "head" not in n}


def weights_loaded(adapted, adapter: dict[str, Tensor]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of the model with an adapter in it, and the adapter's parameters, which require gradients."""
    model = copy.deepcopy(adapted.model)
    parameters = {adapted.parameter_names[name]: tensor for name, tensor in adapter.items()}
    found = {name: model.get_parameter(name) for name in parameters}
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(parameters[name])
            parameter.requires_grad_(True)
    return model, found


def dense_network(delta_of_client: dict[str, Tensor]) -> nn.Module:
    """A plain ``Dense`` with a delta in its weights."""
    plain = network(Dense)
    with torch.no_grad():
        for name, change in delta_of_client.items():
            parameter = plain.get_parameter(name.removeprefix(PREFIX))
            parameter.copy_(change if "head" in name else parameter + change)
    return plain


# --- merging -------------------------------------------------------------------------------------------------------
def peft() -> Found:
    kind, x = Convolutional, examples(Convolutional, (7,))[0][0]
    weights = [[0.3, 0.7], [1.7, -0.6, 0.25], [2.5, -1.25, 0.0, 3.0]]
    for options in CONFIGS.values():
        yield from peft_folders(adapted_of(kind, **options), kind, x, options)
        options = options | dict(modules_to_save=None)  # add_weighted_adapter refuses them
        adapted = adapted_of(kind, **options)
        for w in weights:
            adapters = [drawn(adapted.initial, 10 + k) for k in range(len(w))]
            names = [f"a{k}" for k in range(len(w))]
            model = stock_peft(kind, adapters, **options)
            each = [peft_deltas(model, name) for name in names]
            yield "delta = get_delta_weight", DOUBLE, largest(deltas_of(adapted, adapters[0]), each[0])
            merged = combine_adapters(adapters, w)
            total = {n: sum(wk * one[n] for wk, one in zip(w, each)) for n in each[0]}
            yield "combine_adapters = the sum of PEFT's deltas", DOUBLE, largest(deltas_of(adapted, merged), total)
            if "use_rslora" in options:
                continue
            model.add_weighted_adapter(names, w, "cat", combination_type="cat")
            found = peft_deltas(model, "cat")
            yield "combine_adapters = add_weighted_adapter, cat", DOUBLE, largest(deltas_of(adapted, merged), found)
            model.add_weighted_adapter(names, w, "svd", combination_type="svd", svd_rank=2)
            small = deltas_of(adapted, compress(merged, 2)[0])
            yield "compress = add_weighted_adapter, svd", SINGLE, largest(small, peft_deltas(model, "svd"))
            if len(w) == 2:
                squares = [wk**2 for wk in w]  # PEFT takes their roots on each factor
                model.add_weighted_adapter(names, squares, "linear", combination_type="linear")
                factors = deltas_of(adapted, merge_factors(*adapters, w[0]))
                what = "merge_factors(w) = add_weighted_adapter, linear of w², (1-w)²"
                yield what, SINGLE, largest(factors, peft_deltas(model, "linear"))
    yield from peft_vectors()


@torch.no_grad()
def peft_folders(adapted, kind: type[nn.Module], x: Tensor, options: dict) -> Found:
    """What is saved loads in stock PEFT, and the other way round."""
    from peft import PeftModel, get_peft_model

    merged = merge_exact(drawn(adapted.initial, 1), drawn(adapted.initial, 2), 0.35)
    expected = adapted(merged, x)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapted, merged, f"{folder}/ours")
        model = PeftModel.from_pretrained(network(kind), f"{folder}/ours").eval()
        yield "logits of save_adapter's folder in from_pretrained", DOUBLE, gap(model(x), expected)
        yield "logits after merge_and_unload", DOUBLE, gap(model.merge_and_unload()(x), expected)
        theirs = get_peft_model(network(kind), config(kind, **options)).eval()
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 3)
        theirs.save_pretrained(f"{folder}/theirs")
        loaded = load_adapter(adapted, f"{folder}/theirs")
        yield "logits of save_pretrained's folder in load_adapter", DOUBLE, gap(adapted(loaded, x), theirs(x))


def peft_vectors() -> Found:
    """TIES and DARE on one tensor, as PEFT trims each tensor by itself."""
    from peft.utils import merge_utils

    vectors = torch.randn(3, 187, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parts, ones = list(vectors), torch.ones(3, dtype=torch.float64)
    for density in (0.2, 0.5, 0.9):
        kept = (round(density * 187) + 1e-9) / 187  # PEFT takes int() of the number, we round it
        yield "ties = merge_utils.ties", DOUBLE, gap(merges.ties(vectors, kept), merge_utils.ties(parts, ones, kept))
    for drop in (0.2, 0.9):
        with masks_of_dare(drop, 3, 187):
            theirs = merge_utils.dare_linear(parts, ones / 3, 1 - drop)
        ours = merges.dare(vectors, drop).mean(0)
        yield "dare, mean = merge_utils.dare_linear, same masks", DOUBLE, gap(ours, theirs)


def masks_of_dare(drop: float, models: int, numbers: int):
    """``torch.bernoulli`` draws what ``dare`` keeps by its seed 0."""
    kept = (np.random.default_rng([0, k]).random(numbers) >= drop for k in range(models))
    return mock.patch("torch.bernoulli", lambda like, **_: torch.from_numpy(next(kept)).to(like).view(like.shape))


def merged_models() -> tuple:
    """Three models of two clients on ``Dense``, their deltas and their task vectors ``(K, C, P)``."""
    adapted = adapted_of(Dense)
    stacks = [stack_adapters([drawn(adapted.initial, 10 * k + c) for c in range(2)]) for k in range(3)]
    changes = [delta(stack, adapted.scaling) for stack in stacks]
    return adapted, stacks, changes, torch.stack([flatten(change) for change in changes])


def mergekit() -> Found:
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.registry import get

    adapted, stacks, changes, vectors = merged_models()
    numbers = vectors.shape[-1]

    def theirs(name: str, tensors: list[Tensor], weight=1.0, density=1.0, normalize=False) -> Tensor:
        group = TensorGroup.from_tensors([torch.zeros_like(tensors[0]), *tensors], base_index=0)
        each = range(1, len(tensors) + 1)
        options = {"weight": dict.fromkeys(each, weight), "density": dict.fromkeys(each, density), "lambda": 1.0}
        return get(name).merge_group(group, normalize=normalize, rescale=False, int8_mask=False, **options)

    for coefficient, client in itertools.product((1 / 3, 0.5, 1.4), range(2)):
        ours = delta(merges.task_arithmetic(stacks, coefficient), adapted.scaling)
        for name in ours:
            expected = theirs("task_arithmetic", [change[name][client] for change in changes], weight=coefficient)
            yield "task_arithmetic = task_arithmetic", DOUBLE, gap(ours[name][client], expected)
    for density, client in itertools.product((0.2, 0.5, 0.8), range(2)):
        ours = merges.ties(vectors, density)[client]
        kept = (round(density * numbers) + 1e-9) / numbers
        expected = theirs("ties", list(vectors[:, client]), density=kept, normalize=True)
        yield "ties of whole vectors = ties", DOUBLE, gap(ours, expected)
    for drop in (0.2, 0.9):
        with masks_of_dare(drop, 3, numbers):
            expected = theirs("dare_linear", list(vectors[:, 0]), weight=1 / 3, density=1 - drop)
        ours = (1 - drop) * merges.dare(vectors, drop)[:, 0].mean(0)
        yield "dare, mean, times 1-p = dare_linear without its rescaling", SINGLE, gap(ours, expected)


def fusion_bench() -> Found:
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    adapted, stacks, changes, vectors = merged_models()
    split = Split(examples(Dense, (19, 16)))
    numbers = vectors.shape[-1]
    for density, client in itertools.product((0.2, 0.5, 0.8), range(2)):
        asked = (round(density * numbers) - 1 + 1e-9) / numbers  # the published code keeps one entry more than it says
        with contextlib.redirect_stdout(io.StringIO()):
            expected = ties_merging(vectors[:, client], reset_thresh=asked, merge_func="dis-mean")
        yield "ties = ties_merging, the authors' code", DOUBLE, gap(merges.ties(vectors, density)[client], expected)
    fishers = [merges.model_fisher(adapted, stack, split) for stack in stacks]
    ours = merges.fisher_merge(stacks, fishers)
    for client in range(2):
        models = [client_adapter(stack, client) for stack in stacks]
        diagonals = [one[client].split([tensor.numel() for tensor in models[0].values()]) for one in fishers]
        by_name = [{n: d.view(models[0][n].shape) for n, d in zip(models[0], one)} for one in diagonals]
        parameters = {name: [model[name] for model in models] for name in models[0]}
        one = torch.ones(3, dtype=torch.float64)
        expected = merging_with_fisher_weights(parameters, by_name, one, False, 0.0)
        yield "fisher_merge = merging_with_fisher_weights", DOUBLE, largest(client_adapter(ours, client), expected)
    for off_diagonal in (0.5, 0.9, 1.0):
        grams = [merges.layer_grams(adapted, stack, split) for stack in stacks]
        ours = delta(merges.regmean(stacks, grams, off_diagonal), adapted.scaling)
        for client in range(2):
            networks = [dense_network({n: t[client] for n, t in change.items()}) for change in changes]
            parameters = {name: [model.get_parameter(name).detach() for model in networks]
                          for name, _ in networks[0].named_parameters() if name.removesuffix(".bias") == name
                          or name == "head.bias"}  # fmt: skip
            of_layers = [{layer.removeprefix(PREFIX): gram[client] for layer, gram in one.items()} for one in grams]
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)  # FusionBench makes its masks in it
            expected = merging_with_regmean_weights(parameters, of_layers, off_diagonal)
            torch.set_default_dtype(default)
            merged = dense_network({n: t[client] for n, t in ours.items()})
            found = {name: merged.get_parameter(name).detach() for name in expected}
            yield "regmean = merging_with_regmean_weights", DOUBLE, largest(found, expected)


# --- gradients and curvature ---------------------------------------------------------------------------------------
def two_clients(kind: type[nn.Module]) -> tuple:
    """Two clients of unequal size with random adapters: their examples, stack, and per-sample gradients."""
    adapted, parts = adapted_of(kind), examples(kind, (9, 6))
    adapters = [drawn(adapted.initial, seed) for seed in (5, 6)]
    split, stack = Split(parts), stack_adapters(adapters)
    return adapted, parts, adapters, split, stack, per_sample_gradients(adapted, stack, split)


def opacus() -> Found:
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    for kind in NETWORKS:
        adapted, parts, adapters, _, _, ours = two_clients(kind)
        for client, (x, y) in enumerate(parts):
            model, found = weights_loaded(adapted, adapters[client])
            wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False).train()
            F.cross_entropy(wrapped(x), y, reduction="sum").backward()
            theirs = torch.cat([parameter.grad_sample.flatten(1) for parameter in found.values()], 1)
            yield "per_sample_gradients = GradSampleModule", DOUBLE, gap(ours[client, : len(y)], theirs)
    generator = torch.Generator().manual_seed(0)
    uploads, sent = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((5, 40), (40,)))
    parameter = nn.Parameter(sent.clone())
    optimizer = DPOptimizer(torch.optim.SGD([parameter], lr=1.0), noise_multiplier=0.0, max_grad_norm=1.5,
                            expected_batch_size=5, loss_reduction="mean")  # fmt: skip
    parameter.grad_sample = sent - uploads
    optimizer.step()
    ours = private_average({"x": uploads}, {"x": sent}, Privacy(1.5, 0.0, 1), 0)["x"]
    yield "private_average without noise = a step of DPOptimizer (1e-6 is added to norms)", SINGLE, gap(parameter, ours)


def backpack() -> Found:
    import backpack as package
    from backpack.extensions import BatchGrad, SumGradSquared

    for kind in NETWORKS:
        adapted, parts, adapters, split, _, ours = two_clients(kind)
        fisher = diagonal_fisher(ours, split.sizes)
        for client, (x, y) in enumerate(parts):
            model, found = weights_loaded(adapted, adapters[client])
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    package.extend(module)
            with package.backpack(BatchGrad(), SumGradSquared()):
                F.cross_entropy(model(x), y, reduction="sum").backward()
            each = torch.cat([parameter.grad_batch.flatten(1) for parameter in found.values()], 1)
            squares = torch.cat([parameter.sum_grad_squared.flatten() for parameter in found.values()])
            yield "per_sample_gradients = BatchGrad", DOUBLE, gap(ours[client, : len(y)], each)
            yield "diagonal_fisher = SumGradSquared / n", DOUBLE, gap(fisher[client], squares / len(y))


def curvlinops() -> Found:
    from curvlinops import EFLinearOperator, GGNLinearOperator

    for kind in NETWORKS:
        adapted, parts, adapters, split, stack, gradients = two_clients(kind)
        direction = torch.randn(2, gradients.shape[2], dtype=torch.float64)
        slope, curvature = directional_derivatives(adapted, stack, direction, split)
        empirical, fisher = diagonal_fisher(gradients, split.sizes), merges.model_fisher(adapted, stack, split)
        for client, (x, y) in enumerate(parts):
            model, found = weights_loaded(adapted, adapters[client])
            operators = [
                kind_of(model, nn.CrossEntropyLoss(), list(found.values()), [(x, y)], check_deterministic=False)
                for kind_of in (GGNLinearOperator, EFLinearOperator)
            ]
            identity = torch.eye(direction.shape[1], dtype=torch.float64)
            ggn, ef = (operator @ identity for operator in operators)
            v = direction[client]
            loss = F.cross_entropy(model(x), y)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(found.values()))])
            mean_slope, mean_curvature = slope[client].sum() / len(y), curvature[client].sum() / len(y)
            relative = abs(float(v @ ggn @ v / mean_curvature) - 1)
            yield "curvature along v = vᵀ GGN v, relative", DOUBLE, relative
            yield "slope along v = gradient · v", DOUBLE, gap(mean_slope, gradient @ v)
            yield "diagonal_fisher = diagonal of EF", DOUBLE, gap(empirical[client], ef.diagonal())
            yield "model_fisher = diagonal of GGN", DOUBLE, gap(fisher[client], ggn.diagonal())


def laplace() -> Found:
    from laplace import Laplace
    from laplace.curvature import CurvlinopsEF, CurvlinopsGGN
    from torch.utils.data import DataLoader, TensorDataset

    adapted, parts, adapters, split, stack, gradients = two_clients(Dense)
    empirical, fisher = diagonal_fisher(gradients, split.sizes), merges.model_fisher(adapted, stack, split)
    found = {CurvlinopsEF: ("diagonal_fisher", empirical), CurvlinopsGGN: ("model_fisher", fisher)}
    for backend, (name, ours) in found.items():
        for client, (x, y) in enumerate(parts):
            model, trained = weights_loaded(adapted, adapters[client])
            options = dict(subset_of_weights="all", hessian_structure="diag", backend=backend)
            theirs = Laplace(model, "classification", **options)
            theirs.fit(DataLoader(TensorDataset(x, y), batch_size=4))
            sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
            by_name = dict(zip(sizes, theirs.H.split(list(sizes.values()))))
            in_order = torch.cat([by_name[name] for name in trained])
            yield f"n · {name} = DiagLaplace with {backend.__name__}", DOUBLE, gap(len(y) * ours[client], in_order)


# --- training ------------------------------------------------------------------------------------------------------
def one_by_one(adapted, adapter, x: Tensor, y: Tensor, steps: int, *, seeds, lr=4e-3, weight_decay=0.0, clip=None):
    """AdamW of torch on one client's PEFT model."""
    model, found = weights_loaded(adapted, adapter)
    parameters = list(found.values())
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)
    for batch in batch_indices(len(y), 0, steps, 8, seeds):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in zip(adapter, parameters)}


def torch_itself() -> Found:
    from torch.func import functional_call, grad, vmap

    adapted, parts = adapted_of(Dense), examples(Dense, (23, 7, 40))
    split, start = Split(parts), repeat_adapter(adapted.initial, 3)
    for options in (dict(), dict(weight_decay=0.1), dict(lr=2e-2, weight_decay=0.01, clip=0.05)):
        ours = train(adapted, start, split, steps=100, batch_size=8, seed=(5, 1), **({"lr": 4e-3} | options)).adapters
        for client, (x, y) in enumerate(parts):
            theirs = one_by_one(adapted, adapted.initial, x, y, 100, seeds=[5, 1, client], **options)
            what = "train, 100 steps = optim.AdamW, clip_grad_norm_, a client at a time"
            yield what, DOUBLE, largest(client_adapter(ours, client), theirs)
    first = fedit(adapted, split, rounds=1, local_steps=20, seed=4, lr=4e-3, batch_size=8).adapter
    clients = [one_by_one(adapted, adapted.initial, x, y, 20, seeds=[4, 0, c]) for c, (x, y) in enumerate(parts)]
    mean = {name: sum(len(y) * one[name] for one, (_, y) in zip(clients, parts)) / 70 for name in first}
    yield "fedit, a round = the mean of those, by sizes", DOUBLE, largest(first, mean)
    for kind in NETWORKS:
        adapted, parts, adapters, split, _, ours = two_clients(kind)
        for client, (x, y) in enumerate(parts):
            weights = {adapted.parameter_names[name]: tensor for name, tensor in adapters[client].items()}

            def loss(weights, x, y, model=adapted.model):
                return F.cross_entropy(functional_call(model, weights, (x.unsqueeze(0),)), y.unsqueeze(0))

            each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
            theirs = torch.cat([tensor.flatten(1) for tensor in each.values()], 1)
            yield "per_sample_gradients = torch.func", DOUBLE, gap(ours[client, : len(y)], theirs)


def flwr() -> Found:
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg, FedMedian, FedProx
    from flwr.supercore.differential_privacy import compute_clip_model_update, compute_stdv

    like = adapted_of(Dense).initial

    def messages(stack: dict[str, Tensor], sizes: list[int]) -> list:
        found = []
        for client, size in enumerate(sizes):
            arrays = ArrayRecord(dict(client_adapter(stack, client)))
            content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": size})})
            metadata = SimpleNamespace(src_node_id=client + 1)  # a true message needs a run
            found.append(SimpleNamespace(content=content, has_error=lambda: False, metadata=metadata))
        return found

    def theirs(strategy, stack, sizes) -> dict[str, Tensor]:
        arrays, _ = strategy.aggregate_train(1, messages(stack, sizes))
        return {name: torch.from_numpy(arrays[name].numpy()) for name in stack}

    for sizes in ([7, 100], [1, 10, 100, 1000, 3], [100] * 8):
        clients = len(sizes)
        stack, weights = stack_adapters([drawn(like, seed) for seed in range(clients)]), torch.tensor(sizes)
        mean = theirs(FedAvg(), stack, sizes)
        yield "weighted_average = FedAvg.aggregate_train", DOUBLE, largest(weighted_average(stack, weights), mean)
        for algorithm, strategy in ((FEDIT, FedAvg()), (fedprox(0.1), FedProx(proximal_mu=0.1))):
            message = server_step(algorithm, stack, weights, clients, sent=stack, number=0)
            what = "a server's step of FedIT, FedProx = FedAvg, FedProx"
            yield what, DOUBLE, largest(client_adapter(message, 0), theirs(strategy, stack, sizes))
        medians = {name: tensor.quantile(0.5, 0) for name, tensor in stack.items()}
        what = "the median of the example in algorithms.py = FedMedian"
        yield what, DOUBLE, largest(medians, theirs(FedMedian(), stack, sizes))
        sent = drawn(like, 99)
        for clip in (0.5, 1e3):
            clipped = []
            for client in range(clients):
                arrays = [tensor[client].numpy().copy() for tensor in stack.values()]
                compute_clip_model_update(arrays, [tensor.numpy() for tensor in sent.values()], clip)
                clipped.append(arrays)
            mean = {name: torch.from_numpy(np.mean(arrays, 0)) for name, arrays in zip(stack, zip(*clipped))}
            ours = private_average(stack, sent, Privacy(clip, 0.0, 0), 0)
            yield "private_average without noise = compute_clip_model_update, averaged", DOUBLE, largest(ours, mean)
        stated = Privacy(0.7, 1.3, 0).noise_std(clients)
        yield "noise_std = compute_stdv", DOUBLE, gap(stated, compute_stdv(1.3, 0.7, clients))


# --- language models -----------------------------------------------------------------------------------------------
WORDS = "[PAD] [UNK] [EOS] a dog is an animal plant number what the colour of sky blue very bright red green two and"
QUESTIONS = [("what is the colour of the sky", " blue"), ("what is the colour of the sky", " very bright red green"),
             ("a dog is", " an animal"), ("two and two is a", " number"), ("red", " an animal is a plant")]  # fmt: skip


def language_models() -> Iterator[tuple]:
    """A tiny Llama and a tiny GPT-2 with LoRA for two clients, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS.split())}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", bos_token="[EOS]"
    )
    ids = dict(vocab_size=len(WORDS.split()), bos_token_id=2, eos_token_id=2, pad_token_id=0, initializer_range=0.3)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    llama = partial(LlamaForCausalLM, LlamaConfig(**ids, **sizes, max_position_embeddings=64))
    gpt2 = partial(GPT2LMHeadModel, GPT2Config(**ids, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    for make, targets in ((llama, ["q_proj", "v_proj", "down_proj"]), (gpt2, ["c_attn", "c_fc"])):
        torch.manual_seed(0)
        model = make().double().eval()
        adapted = attach(model, rank=3, targets=targets, head=None)
        yield model, adapted, [drawn(adapted.initial, seed) for seed in (1, 2)], tokenizer


def in_stock_peft(model: nn.Module, adapted, adapter: dict[str, Tensor]) -> nn.Module:
    from peft import get_peft_model, set_peft_model_state_dict

    stock = get_peft_model(copy.deepcopy(model), copy.deepcopy(adapted.config)).eval()
    set_peft_model_state_dict(stock, adapter)
    return stock


def lm_eval() -> Found:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    for model, adapted, adapters, tokenizer in language_models():
        for adapter in adapters:
            stock = in_stock_peft(model, adapted, adapter)
            lengths = {32: "log_likelihoods = HFLM.loglikelihood", 5: "prompts cut: ours with max_length + 1"}
            for length, what in lengths.items():
                theirs = HFLM(pretrained=stock, tokenizer=tokenizer, backend="causal", batch_size=2, max_length=length,
                              device="cpu")  # fmt: skip
                requests = [Instance("loglikelihood", {}, pair, 0) for pair in QUESTIONS]
                expected = [score for score, _ in theirs.loglikelihood(requests, disable_tqdm=True)]
                split = Split([encode_answers(tokenizer, *map(list, zip(*QUESTIONS)), length + 1, end=False)])
                ours = log_likelihoods(adapted, stack_adapters([adapter]), split)[0]
                yield f"{what} (float32 there)", SINGLE, gap(ours, torch.tensor(expected))


@torch.no_grad()
def transformers() -> Found:
    prompts = ["a dog is", "what is the colour of the sky", "two and", "red"]
    for model, adapted, adapters, tokenizer in language_models():
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        found = greedy_tokens(adapted, stack_adapters(adapters), [pad_tokens(rows)] * 2, 9, end=2)
        for client, adapter in enumerate(adapters):
            stock = in_stock_peft(model, adapted, adapter)
            for row, ours in zip(rows, found[client].tolist()):
                ids = torch.tensor([row])
                options = dict(do_sample=False, max_new_tokens=9, eos_token_id=2, pad_token_id=2)
                theirs = stock.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[0, len(row) :]
                padded = F.pad(theirs, (0, 9 - len(theirs)), value=2)
                differ = sum(a != b for a, b in zip(ours, padded.tolist()))
                yield "greedy_tokens = generate, tokens that differ", EXACT, differ


# --- statistics and privacy ----------------------------------------------------------------------------------------
def scipy() -> Found:
    from scipy import optimize, stats

    rng = np.random.default_rng(0)
    names = ["potara-calibrated", "a", "b", "c"]
    rows = pd.DataFrame([
        dict(method=name, seed=seed, client=client, accuracy=0.7 + rng.normal(0, 0.05), loss=rng.gamma(2))
        for name in names for seed in range(6) for client in range(4)
    ])  # fmt: skip
    for score in ("accuracy", "loss"):
        ours, means = paired_differences(rows, score=score), rows.groupby(["method", "seed"])[score].mean().unstack(0)
        for name in names[1:]:
            pair = means[names[0]], means[name]
            yield "paired_differences, p = ttest_rel", DOUBLE, gap(ours.p[name], stats.ttest_rel(*pair).pvalue)
            yield "paired_differences, ± = sem", DOUBLE, gap(ours["±"][name], stats.sem(pair[0] - pair[1]))
    for _ in range(40):
        root = rng.normal(size=(2, 2))
        moments = Moments(*(torch.tensor(value) for value in (root @ root.T)[[0, 1, 0], [0, 1, 1]]))
        bound = lambda w, moments=moments: float(moments.bound(torch.tensor(w)))  # noqa: E731
        least = optimize.minimize_scalar(bound, bounds=(0, 1), method="bounded", options=dict(xatol=1e-10)).fun
        least = min(least, bound(0.0), bound(1.0))
        above = bound(float(moments.weight)) - least
        yield "Moments.weight: its bound above minimize_scalar's", DOUBLE, max(0.0, above)
    weights = torch.linspace(0, 1, 9, dtype=torch.float64)
    losses = 1.3 - 0.8 * weights + 0.9 * weights**2 + 0.01 * torch.randn(4, 9, dtype=torch.float64)
    fits = np.polyfit(weights.numpy(), losses.numpy().T, 2)
    lowest = np.clip(-fits[1] / (2 * fits[0]), 0, 1)
    yield "parabola_moments = polyfit's minimum", DOUBLE, gap(parabola_moments(weights, losses).weight, lowest)


def statsmodels() -> Found:
    from statsmodels.stats.multitest import multipletests

    rng = np.random.default_rng(0)
    for size, _ in itertools.product((1, 2, 7, 40), range(20)):
        p = rng.beta(0.5, 3, size)
        p[rng.integers(size)] = p[0]  # ties
        yield "holm = multipletests", DOUBLE, gap(np.array(holm(p.tolist())), multipletests(p, method="holm")[1])


def dp_accounting() -> Found:
    from dp_accounting import get_epsilon_gaussian

    for noise, rounds, chance in ((1.0, 1, 1e-5), (5.0, 40, 1e-5), (2.0, 10, 1e-3), (20.0, 100, 1e-6), (0.8, 3, 1e-2)):
        exact = get_epsilon_gaussian(noise / rounds**0.5, chance)
        what = "epsilon = get_epsilon_gaussian, the closed form, relative"
        yield what, 1e-4, abs(epsilon(noise, rounds, chance) / exact - 1)  # privacy losses in steps of 1e-4


def cvxpy() -> Found:
    import cvxpy as cp

    rng = np.random.default_rng(0)
    tight = dict(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    for k, _ in itertools.product((2, 3, 5), range(10)):
        root = rng.normal(size=(k, k + 1))
        matrix = root @ root.T + rng.uniform(0, 2)
        for nonnegative in (False, True):
            w = cp.Variable(k, nonneg=nonnegative)
            cp.Problem(cp.Minimize(cp.quad_form(w, cp.psd_wrap(matrix))), [cp.sum(w) == 1]).solve(**tight)
            ours = combination_weights(torch.from_numpy(matrix), nonnegative=nonnegative).numpy()
            what = f"combination_weights{', nonnegative' * nonnegative}: value = the solver's"
            yield what, DOUBLE, abs(ours @ matrix @ ours - w.value @ matrix @ w.value) + abs(ours.sum() - 1)


# --- networks ------------------------------------------------------------------------------------------------------
def as_blocks(blocks: list[nn.Module]) -> tuple[Tensor, Tensor]:
    """The lab ViT's logits, and those with these blocks in the place of its own."""
    vit = trained_vit()
    x = torch.rand(5, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = (x - 0.5) / 0.25
    for module in vit.stem:
        hidden = module(hidden)
    hidden = hidden.flatten(2).mT + vit.position
    for block in blocks:
        hidden = block(hidden)
    return vit(x), vit.head(vit.norm(hidden).mean(1))


def trained_vit() -> nn.Module:
    vit = lab_vit().double().eval()
    nn.init.normal_(vit.head.weight, generator=torch.Generator().manual_seed(1))
    return vit


@torch.no_grad()
def timm() -> Found:
    from timm.models.vision_transformer import Block

    vit, blocks = trained_vit(), []
    for own in vit.blocks:
        block = Block(vit.settings["dim"], vit.settings["heads"], mlp_ratio=vit.settings["mlp_ratio"], qkv_bias=True,
                      norm_layer=partial(nn.LayerNorm, eps=1e-5)).double().eval()  # fmt: skip
        block.load_state_dict({name.replace("fc", "mlp.fc"): tensor for name, tensor in own.state_dict().items()})
        blocks.append(block)
    yield "logits of the lab ViT = those with timm's blocks", DOUBLE, gap(*as_blocks(blocks))


@torch.no_grad()
def torchvision() -> Found:
    from torchvision.models.vision_transformer import EncoderBlock

    names = {"ln_1": "norm1", "ln_2": "norm2", "self_attention.in_proj_": "attn.qkv.", "mlp.0": "fc1", "mlp.3": "fc2",
             "self_attention.out_proj": "attn.proj"}  # fmt: skip
    vit, blocks = trained_vit(), []
    for own in vit.blocks:
        dim = vit.settings["dim"]
        block = EncoderBlock(vit.settings["heads"], dim, dim * vit.settings["mlp_ratio"], 0.0, 0.0,
                             partial(nn.LayerNorm, eps=1e-5)).double().eval()  # fmt: skip
        theirs, ours = block.state_dict(), own.state_dict()
        for name in theirs:
            start = next(start for start in names if name.startswith(start))
            theirs[name] = ours[name.replace(start, names[start], 1)]
        block.load_state_dict(theirs)
        blocks.append(block)
    yield "logits of the lab ViT = those with torchvision's blocks", DOUBLE, gap(*as_blocks(blocks))


PEERS: dict[str, Callable[[], Found]] = {
    "peft": peft,
    "mergekit": mergekit,
    "fusion-bench": fusion_bench,
    "torch": torch_itself,
    "opacus": opacus,
    "backpack-for-pytorch": backpack,
    "curvlinops-for-pytorch": curvlinops,
    "laplace-torch": laplace,
    "flwr": flwr,
    "lm-eval": lm_eval,
    "transformers": transformers,
    "scipy": scipy,
    "statsmodels": statsmodels,
    "dp-accounting": dp_accounting,
    "cvxpy": cvxpy,
    "timm": timm,
    "torchvision": torchvision,
}  # by the name on PyPI


def compare(names: list[str] = list(PEERS)) -> pd.DataFrame:  # noqa: B006
    """A row for each peer and ``what``: how many comparisons, the largest difference, and the bound it must keep.

    A peer that is not there, or that lacks something itself, gives one row that says so.
    """
    rows = []
    for peer in names:
        try:
            number, found = version(peer).split("+")[0], list(PEERS[peer]())
        except (PackageNotFoundError, ImportError):
            rows.append((peer, "not installed", "–", 0, np.nan, np.nan))
            continue
        for what in dict.fromkeys(what for what, _, _ in found):
            of_it = [(bound, difference) for name, bound, difference in found if name == what]
            bound, difference = max(bound for bound, _ in of_it), max(difference for _, difference in of_it)
            rows.append((peer, number, what, len(of_it), difference, bound))
    return pd.DataFrame(rows, columns=["peer", "version", "what", "comparisons", "largest difference", "bound"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    chosen = sys.argv[1:]
    table = compare(chosen or list(PEERS))
    print(table.to_string(float_format="{:.2g}".format))
    if not chosen:
        table.to_csv(PATH, index=False, float_format="%.2g")
