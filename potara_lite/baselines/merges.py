"""Merging finished models that share a backbone: task arithmetic, Fisher merging, RegMean, TIES and DARE.

A model is its task vector: the delta of every adapted layer and the directly trained weights (the new head starts at
zero). All functions take K stacks, such as ``[federated, local]``, and give a stack that the backbone runs:

- task arithmetic and RegMean stay low-rank, exactly: ranks are stacked;
- Fisher merging works on the coordinates it is given: on the factors as they are, or on the deltas in the full-rank
  form of ``adapter_from_delta``;
- TIES and DARE work on vectors; ``merge_deltas`` brings any such function to the deltas, and its result has full rank.

``compress`` cuts a result to a small rank and reports the relative error. Uniform merging is ``merge_exact(…, 0.5)``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import (
    Adapter,
    CompleteAdapter,
    CompleteStacks,
    Stack,
    adapter_from_delta,
    check_same_base,
    client_adapter,
    count_clients,
    delta,
    factor_names,
    factors,
    flatten,
    is_lora,
    layer_of,
    lora_layers,
    unflatten,
)
from ..checks import Finite, Fraction, List, Named, Numbers, Positive, Seed, Share, Size, checked, invalid
from ..estimators.curve import client_logits
from ..federation.inputs import take
from ..federation.split import Split
from ..merging.merge import combine_adapters
from ..training.gradients import diagonal_fisher, per_sample_gradients
from ..training.train import check_clients, check_losses

Fishers = List[Annotated[Tensor, Numbers("C P", least=0)]]  # a diagonal for every client's adapter, by model
Grams = List[Named[Annotated[Tensor, Numbers("C ...")]]]  # a matrix (C, in, in) for every layer, by model
TaskVectors = Annotated[Tensor, Numbers("K P|K C P|K C L P")]  # of K models
DropRate = Annotated[Fraction, Field(lt=1)]


@checked
def task_arithmetic(models: List[CompleteAdapter], coefficient: Finite) -> Adapter:
    """``coefficient`` times the sum of the task vectors (Ilharco et al., ICLR 2023, arXiv 2212.04089); ``1 / K`` is the
    mean. Exact, of rank K r."""
    models = check_same_base("models", models)
    return combine_adapters(models, [coefficient] * len(models))


@checked
def model_fisher(adapted: AdaptedBackbone, adapters: Stack, split: Split, *, seed: Seed = 0) -> Tensor:
    """The diagonal Fisher of each client's model on its examples, ``(C, P)``: ``E_x E_y [(∇ log p(y|x))²]``, where y is
    drawn from the model and not from the data (Matena & Raffel, 2022, section 3).

    The expectation over classes is exact, a gradient for each of them. Where an example has many targets (tokens), it
    is estimated by one draw for each of them, by ``seed``.
    """
    p = client_logits(adapted, adapters, split).softmax(-1)  # (C, N, classes) or (C, N, T, classes)
    ignored = split.y < 0
    if ignored.dim() == 3:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(p.flatten(0, -2).cpu(), 1, generator=generator).view(split.y.shape).to(split.y)
        labels = torch.where(ignored, split.y, drawn)
        return diagonal_fisher(per_sample_gradients(adapted, adapters, split, labels=labels), split.sizes)
    total = torch.zeros(())
    for label in range(p.shape[-1]):
        gradients = per_sample_gradients(adapted, adapters, split, labels=split.y.masked_fill(~ignored, label))
        total = total.to(gradients) + diagonal_fisher(gradients * p[..., label, None].sqrt().to(gradients), split.sizes)
    return total


@checked
def fisher_merge(models: CompleteStacks, fishers: Fishers) -> Adapter:
    """The mean of the models weighted, coordinate by coordinate, by their diagonal Fishers (Matena & Raffel, NeurIPS
    2022, arXiv 2111.09832).

    ``fishers``: a matrix ``(C, P)`` per model, from ``model_fisher``. Equal Fishers give the mean, and so do
    coordinates on which all of them are zero. On the factors the result depends on their basis; for a merge of the
    deltas write the models and their Fishers in the form of ``adapter_from_delta``, where one factor is the identity.

    Raises ``ValueError`` for a negative Fisher or one of another shape.
    """
    models = check_same_base("models", models)
    if len(fishers) != len(models):
        raise ValueError(f"fishers: {len(fishers)} of them for {len(models)} models")
    flat = torch.stack([flatten(model) for model in models])  # (K, C, P)
    if fishers[0].shape != flat.shape[1:]:
        invalid("fishers[0]", f"of shape {tuple(flat.shape[1:])}", fishers[0])
    weight = torch.stack(list(fishers)).to(flat)
    weight = torch.where(weight.sum(0) > 0, weight, 1.0)
    return unflatten((weight * flat).sum(0) / weight.sum(0), client_adapter(models[0], 0))


@torch.no_grad()
@checked
def layer_grams(
    adapted: AdaptedBackbone, adapters: Stack, split: Split, *, batch_size: Size = 128
) -> dict[str, Tensor]:
    """``XᵀX`` of the inputs of every adapted layer and of the head, ``(C, in, in)`` each, in float64.

    ``X`` has a row per token of the client's examples, as the client's own model sees them. Raises ``ValueError`` for
    convolutions.
    """
    adapters = check_clients(adapted, adapters, split)
    for layer in lora_layers(adapters):
        if adapters[factor_names(layer)[0]].dim() != 3:
            raise ValueError(f"{layer}: RegMean is defined for linear layers only")
    layers = list(_widths(adapters))
    total: dict[str, Tensor] = {}  # of one client

    def add_gram(layer: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
        rows = inputs[0].flatten(0, -2).double()
        total[layer] = total.get(layer, 0.0) + rows.mT @ rows

    grams = []
    with ExitStack() as hooks:
        hooks.enter_context(adapted.state.lock)
        for layer in layers:
            module = adapted.model.get_submodule(layer)
            hooks.enter_context(module.register_forward_pre_hook(partial(add_gram, layer)))
        for client in range(len(split)):
            total.clear()
            x, _ = split.client(client)
            for start in range(0, int(split.sizes[client]), batch_size):
                adapted(client_adapter(adapters, client), take(x, slice(start, start + batch_size)))
            grams.append(dict(total))
    stacks = {layer: torch.stack([of_client[layer] for of_client in grams]) for layer in layers}
    for stack in stacks.values():
        check_losses(stack, split)
    return stacks


@checked
def regmean(models: CompleteStacks, grams: Grams, off_diagonal: Fraction = 0.9) -> Adapter:
    """The linear layers whose outputs are, in sum of squares over all the models' inputs, closest to each model's own
    on its inputs: ``W = (Σ_k W_k G_k)(Σ_k G_k)⁻¹`` (Jin et al., ICLR 2023, arXiv 2212.09849).

    ``grams``: of each model, from ``layer_grams``. ``off_diagonal`` shrinks what is off their diagonals, as published;
    1 solves the least squares exactly. The frozen weights cancel, so the same holds of the deltas, and
    ``A_k -> A_k G_k (Σ G)⁻¹`` with the ranks stacked is that solution exactly. In directions without inputs the delta
    is zero (a pseudo-inverse). Weights without a Gram (biases) are averaged. Equal Grams give the mean.
    """
    models = check_same_base("models", models)
    _check_grams(models, grams)
    # shrink: the Grams' entries off the diagonal
    shrunk = [{layer: _shrunk(gram.double(), off_diagonal) for layer, gram in one.items()} for one in grams]
    # solve: G_k (Σ G)⁻¹ for every layer that has Grams
    totals = {layer: sum(one[layer] for one in shrunk) for layer in shrunk[0]}
    inverses = {layer: torch.linalg.pinv(total, hermitian=True) for layer, total in totals.items()}
    # apply: to A and to the head's weight; B stays, everything else is averaged
    moved = [dict(model) for model in models]
    for k, model in enumerate(models):
        for name, tensor in model.items():
            layer = layer_of(name).removesuffix(".weight")
            if layer in inverses and not is_lora(name, "B") and not name.endswith(".bias"):
                moved[k][name] = (tensor.double() @ shrunk[k][layer] @ inverses[layer]).to(tensor)
            elif not is_lora(name):
                moved[k][name] = tensor / len(models)
    return combine_adapters(moved, [1.0] * len(moved))


def _shrunk(gram: Tensor, off_diagonal: float) -> Tensor:
    diagonal = torch.diag_embed(torch.diagonal(gram, dim1=-2, dim2=-1))
    return off_diagonal * gram + (1 - off_diagonal) * diagonal


def _widths(stack: Adapter) -> dict[str, int]:
    """How many inputs every adapted layer has, and every directly trained linear layer."""
    widths = {layer: factors(stack, layer)[0].shape[-1] for layer in lora_layers(stack)}
    heads = {name: tensor for name, tensor in stack.items() if not is_lora(name) and tensor.dim() == 3}
    return widths | {name.removesuffix(".weight"): tensor.shape[-1] for name, tensor in heads.items()}


def _check_grams(models: CompleteStacks, grams: Grams) -> None:
    """Raise ``ValueError`` unless each model has one, of the same layers, a square matrix of inputs per client."""
    if len(grams) != len(models):
        raise ValueError(f"grams: {len(grams)} of them for {len(models)} models")
    clients, widths = count_clients(models[0]), _widths(models[0])
    for i, one in enumerate(grams):
        for layer, gram in one.items():
            width = widths.get(layer)
            if gram.shape != (clients, width, width) or one.keys() != grams[0].keys():
                raise ValueError(f"grams[{i}] must have a matrix of each client's inputs to a layer, unlike {layer!r}")


@checked
def merge_deltas(models: CompleteStacks, scaling: Named[Positive], function: Callable[[Tensor], Tensor]) -> Adapter:
    """``function`` of the task vectors, ``(K, C, P)`` to ``(C, P)``, as a stack of full-rank adapters, exactly.

    >>> one = {"l.lora_A.weight": torch.ones(1, 1, 2), "l.lora_B.weight": torch.ones(1, 3, 1)}
    >>> mean = merge_deltas([one, one], {"l": 2.0}, lambda vectors: vectors.mean(0))
    >>> delta(mean, {"l": 2.0})["l.weight"][0, 0]
    tensor([2., 2.])
    """
    models = check_same_base("models", models)
    changes = [delta(model, scaling) for model in models]
    vectors = torch.stack([flatten(change) for change in changes])
    merged = function(vectors)
    if not isinstance(merged, Tensor) or merged.shape != vectors.shape[1:]:
        invalid("function", f"one to a tensor {tuple(vectors.shape[1:])}", merged)
    return adapter_from_delta(unflatten(merged, client_adapter(changes[0], 0)), scaling, models[0])


@checked
def ties(vectors: TaskVectors, density: Share = 0.2, coefficient: Finite = 1.0) -> Tensor:
    """TIES: keep each vector's largest entries, elect a sign for each coordinate, average those that agree (Yadav et
    al., NeurIPS 2023, arXiv 2306.01708).

    ``vectors``: task vectors ``(K, ..., P)``; the result has shape ``(..., P)``. ``density``: the share of the entries
    of each vector that is kept. The elected sign is that of the sum of what is kept; where the sum is zero, so is the
    result. ``coefficient`` multiplies the result. One vector at density 1 is itself.

    >>> ties(torch.tensor([[3.0, -1.0, 0.1], [1.0, 2.0, 0.0]]), density=0.67)
    tensor([2., 2., 0.])
    """
    # trim: the largest entries of each vector
    kept = max(1, round(density * vectors.shape[-1]))
    smallest_kept = vectors.abs().topk(kept, dim=-1).values[..., -1:]
    trimmed = torch.where(vectors.abs() >= smallest_kept, vectors, 0)
    # elect: the sign of each coordinate's sum
    majority_sign = trimmed.sum(0).sign()
    # disjoint merge: the mean of those that agree with it
    agree = (trimmed.sign() == majority_sign) & (trimmed != 0)
    return coefficient * (trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)


@checked
def dare(vectors: TaskVectors, drop: DropRate = 0.9, seed: Seed = 0) -> Tensor:
    """DARE: drop each entry of a task vector with probability ``drop`` and divide the rest by ``1 - drop`` (Yu et al.,
    ICML 2024, arXiv 2311.03099); the expectation stays.

    ``vectors``: ``(K, ..., P)``, and so the result, to be averaged or given to ``ties``. What is dropped is drawn for
    each of the K models and is the same for all clients. ``drop=0`` changes nothing.
    """
    # drop: entries drawn for each model
    draws = [np.random.default_rng([seed, k]).random(vectors.shape[-1]) for k in range(len(vectors))]
    kept = torch.from_numpy(np.stack(draws) >= drop).view(len(vectors), *[1] * (vectors.dim() - 2), -1)
    # rescale: so that the expectation stays
    return torch.where(kept.to(vectors.device), vectors / (1 - drop), 0)
