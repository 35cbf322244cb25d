"""Curvature: per-sample gradients, the diagonal Fisher, and Gauss–Newton products along a direction.

Everything here takes stacks and works on all clients in one batched pass. Padded examples (label -100) contribute
nothing, and means are over each client's real examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import jvp

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import (
    Adapter,
    adapter_from_delta,
    delta,
    direction,
    door,
    flatten,
    is_dense_factor,
    is_lora,
    layer_of,
    numbers,
    sizes_of,
    unflatten,
)
from ..checks import all_finite, options_of, unchecked
from ..federation.inputs import Inputs, map_inputs, take
from ..federation.split import Split
from .batching import Execution, ExecutionPlan, map_clients, plan_execution
from .grouped_lora import GroupedLoRA, group_lora
from .loss import checked_logits, example_losses, token_mean
from .train import check_clients, check_labels, check_losses, losses


@door()
def per_sample_gradients(
    adapted: AdaptedBackbone,
    adapters: Adapter,
    split: Split,
    *,
    labels: Tensor | None = None,
    execution: Execution = Execution(),
) -> Tensor:
    """The gradient of each example's own loss at its client's adapter, ``(C, N, P)``; zero rows for padding.

    ``chunk_size`` of ``execution`` counts examples; the result itself comes on top of the memory. ``P`` runs over the
    tensors in the adapter's order (see ``flatten``). ``labels`` of the shape of the split's own replace them.

    Where only linear layers are adapted, one backward pass for a block of examples and a product per example
    (``one_batch.py``). Anywhere else: an example's gradient is the gradient of a client that owns this example alone,
    so this is one pass of the training engine over ``C * N`` clients of one example.
    """
    check_clients(adapted, adapters, split)
    y = split.y if labels is None else labels
    check_labels(adapted, adapters, split, labels)
    flat, like = flatten(adapters).detach(), {name: tensor[0] for name, tensor in adapters.items()}
    gradients = flat.new_empty(*y.shape[:2], flat.shape[1])
    chosen = _plan_examples(adapted, adapters, split.x, execution)
    for block in _blocks(*y.shape[:2], chosen.chunks[0].stop):
        stack = unflatten(flat[block[0]].to(adapted.device), like)
        x = map_inputs(lambda tensor, block=block: tensor[block].to(adapted.device), split.x)
        batch = stack, x, y[block].to(adapted.device)  # K clients of M examples
        if isinstance(chosen.forward, GroupedLoRA):
            part = chosen.forward.per_sample_gradients(*batch)
        else:
            part = _client_per_example(chosen, *batch)
        gradients[block] = part.to(gradients)
    if not all_finite(gradients):
        check_losses(gradients, split)
    return gradients


def _one_by_one(x: Inputs) -> Inputs:
    """The examples ``(C, N, ...)`` as clients of one example each, ``(C * N, 1, ...)``."""
    return map_inputs(lambda tensor: tensor.flatten(0, 1).unsqueeze(1), x)


def _plan_examples(adapted: AdaptedBackbone, adapters: Adapter, x: Inputs, execution: Execution) -> ExecutionPlan:
    """The plan for all examples, each a client of its own; ``forward`` is a ``GroupedLoRA`` only where that is exact."""
    examples, options = _one_by_one(x), dict(batch_size=1, backward=True, execution=execution)
    copies = 2 if isinstance(group_lora(adapted), GroupedLoRA) else None
    chosen = plan_execution(adapted, adapters, examples, adapter_copies=copies, **options)
    if not isinstance(chosen.forward, GroupedLoRA):
        return chosen
    first = {name: tensor[:1].to(adapted.device) for name, tensor in adapters.items()}
    if chosen.forward.matches_vmap(first, map_inputs(lambda tensor: tensor[:2].to(adapted.device), examples)):
        return chosen
    return replace(plan_execution(adapted, adapters, examples, **options), forward=adapted)


def _client_per_example(chosen: ExecutionPlan, stack: Adapter, x: Inputs, y: Tensor) -> Tensor:
    """The gradients ``(K, M, P)`` of ``x`` ``(K, M, ...)``, by the training engine."""
    rows = flatten(stack).repeat_interleave(y.shape[1], 0).requires_grad_()  # (K M, P)
    like = {name: tensor[0] for name, tensor in stack.items()}
    examples = _one_by_one(x), _one_by_one(y)
    values = losses(chosen.forward, unflatten(rows, like), *examples, _summed, vectorize=chosen.vectorize)
    return torch.autograd.grad(values.sum(), rows)[0].view(*y.shape[:2], -1)


def _blocks(clients: int, n: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of clients × samples of at most ``most``: whole clients where they fit, else parts of one."""
    together = max(1, most // n)
    for client in range(0, clients, together):
        for sample in range(0, n, most):
            yield slice(client, min(client + together, clients)), slice(sample, min(sample + most, n))


@door(options=options_of(per_sample_gradients))
def delta_gradients(
    adapted: AdaptedBackbone, adapters: Adapter, split: Split, *, labels: Tensor | None = None, **options
) -> Tensor:
    """The gradient of each example's loss in the deltas and the directly trained weights, ``(C, N, P)``.

    ``P`` runs over the tensors of ``delta(adapters)`` in their order, the entries of every adapted layer's weight among
    them: far more than the adapter has. ``options`` go to ``per_sample_gradients``.
    """
    dense = adapter_from_delta(delta(adapters, adapted.scaling), adapted.scaling, adapters)
    rows = unchecked(per_sample_gradients)(adapted, dense, split, labels=labels, **options)
    parts = dict(zip(dense, rows.split([tensor[0].numel() for tensor in dense.values()], dim=2)))
    in_layers = [part / adapted.scaling[layer_of(name)] for name, part in parts.items() if is_dense_factor(name, dense)]
    return torch.cat(in_layers + [part for name, part in parts.items() if not is_lora(name)], dim=2)


def _summed(logits: Tensor, y: Tensor) -> Tensor:
    return example_losses(logits, y).sum()  # a padded example counts zero, not NaN


@door(gradients=numbers(3), sizes=sizes_of("gradients", 1))
def diagonal_fisher(gradients: Tensor, sizes: Tensor) -> Tensor:
    """The mean of the squared per-sample gradients ``(C, N, P)``, coordinate by coordinate: ``(C, P)``.

    With the data's labels this is the empirical Fisher, with labels drawn from the model the Fisher (Kunstner et al.,
    2019). The square stands inside the mean: the squared gradient of the batch is something else.
    """
    return gradients.square().sum(1) / sizes.to(gradients).unsqueeze(1)


@door(direction=direction)
def directional_derivatives(
    adapted: AdaptedBackbone, adapters: Adapter, direction: Tensor, split: Split, *, execution: Execution = Execution()
) -> tuple[Tensor, Tensor]:
    """Slope and Gauss–Newton curvature of each example's loss along ``direction`` ``(C, P)``: two ``(C, N)``.

    With logits ``z``, ``u = J v`` (one forward-mode product) and ``p = softmax(z)``: the slope is
    ``(p - onehot(y)) · u`` and the curvature ``uᵀ (diag(p) - p pᵀ) u``, the variance of ``u`` under ``p``; both are
    means over the targets of an example that has several. Padded examples give zeros.
    """
    check_clients(adapted, adapters, split)
    check_labels(adapted, adapters, split)
    flat, like = flatten(adapters).detach(), {name: tensor[0] for name, tensor in adapters.items()}

    def logits_and_tangents(row: Tensor, tangent: Tensor, x: Inputs) -> Tensor:
        def logits(row: Tensor) -> Tensor:
            return adapted({name: tensor[0] for name, tensor in unflatten(row.unsqueeze(0), like).items()}, x)

        return torch.stack(jvp(logits, (row,), (tangent,)))  # (2, N, classes)

    chosen = plan_execution(adapted, adapters, split.x, batch_size=split.y.shape[1], backward=True, execution=execution)
    parts = []
    for rows in chosen.chunks:
        stacks = flat[rows], direction.to(flat)[rows], take(split.x, rows)
        with torch.no_grad():
            z, u = map_clients(logits_and_tangents, *stacks, vectorize=chosen.vectorize).unbind(1)  # (K, N, classes)
            parts.append(torch.stack(_slope_and_curvature(z, u, split.y[rows])))
    found = torch.cat(parts, dim=1)
    check_losses(found.transpose(0, 1), split)
    slope, curvature = found
    return slope, curvature


def _slope_and_curvature(z: Tensor, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of each example's loss, ``(K, N)`` each, from logits and tangents ``(K, N, classes)`` or token by token."""
    p, u, real = checked_logits(z, y).softmax(-1), checked_logits(u, y), y >= 0
    mean = (p * u).sum(-1)
    slope = (mean - u.gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)) * real
    curvature = (p * (u - mean.unsqueeze(-1)).square()).sum(-1) * real
    return (slope, curvature) if y.dim() == 2 else (token_mean(slope, y), token_mean(curvature, y))
