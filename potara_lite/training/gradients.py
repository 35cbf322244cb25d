"""Curvature: per-sample gradients, the diagonal Fisher, and Gauss–Newton products along a direction.

Everything here takes stacks and works on all clients in one batched pass. Padded examples (label -100) contribute
nothing, and means are over each client's real examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.func import grad, jvp

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import (
    Adapter,
    Stack,
    adapter_from_delta,
    check_models,
    delta,
    flatten,
    is_dense_factor,
    is_lora,
    layer_of,
    select_clients,
    unflatten,
)
from ..checks import Numbers, all_finite, checked, invalid
from ..federation.inputs import PADDING, Inputs, map_inputs, take
from ..federation.split import Split
from ..models.loss import CLASSIFICATION, Task, checked_logits, token_mean
from .batching import Execution, ExecutionPlan, map_clients, plan_execution
from .grouped_lora import GroupedLoRA, group_lora
from .train import check_clients, check_labels, check_losses, losses, planned_groups

Labels = Annotated[Tensor, Numbers("C N|C N T", whole=True, least=PADDING)]


@checked
def per_sample_gradients(
    adapted: AdaptedBackbone,
    adapters: Stack,
    split: Split,
    *,
    labels: Labels | None = None,
    execution: Execution = Execution(),
) -> Tensor:
    """The gradient of each example's loss at its client's adapter, ``(C, N, P)``; zero rows for padding.

    ``chunk_size`` of ``execution`` counts examples; the memory of the result is not included. ``P`` runs over the
    tensors in the backbone's order (see ``flatten``). ``labels`` replace those of the split and have their shape.

    Where only linear layers are adapted, one backward pass for a block of examples and a product per example
    (``grouped_lora.py``). Anywhere else: an example's gradient is the gradient of a client that has this example alone,
    so this is one training pass over ``C * N`` clients of one example.
    """
    adapters = check_clients(adapted, adapters, split)
    split = split if labels is None else split.with_labels(labels)
    check_labels(adapted, adapters, split, labels)
    flat = flatten(adapters).detach()
    like = {name: tensor[0] for name, tensor in adapters.items()}
    gradients = flat.new_zeros(len(split), int(split.sizes.max()), flat.shape[1])
    parts = split.by_length()
    for group in parts.split.alike():
        part = parts.split.rows(group)
        all_x, all_y = part.x, part.y
        tensors = select_clients(adapters, parts.clients[group])
        execution_plan = _plan_examples(adapted, tensors, all_x, execution)
        if not execution_plan.vectorize:  # and so for the other groups, without a second warning
            execution = replace(execution, vectorize=False)
        for some, samples in _blocks(*all_y.shape[:2], execution_plan.chunks[0].stop):
            rows = torch.tensor(group[some])
            stack = unflatten(flat[parts.clients[rows]].to(adapted.device), like)
            x = map_inputs(lambda tensor: tensor.to(adapted.device), take(all_x, (some, samples)))
            batch = stack, x, all_y[some, samples].to(adapted.device)  # K clients of M examples
            if isinstance(execution_plan.forward, GroupedLoRA):
                found = execution_plan.forward.per_sample_gradients(*batch)
            else:
                found = _client_per_example(execution_plan, adapted.task, *batch)
            is_there, clients, numbers = parts.places(rows, samples)
            gradients[clients, numbers] = found[is_there].to(gradients)
    if not all_finite(gradients):
        check_losses(gradients, split)
    return gradients


def _one_by_one(x: Inputs) -> Inputs:
    """The examples ``(C, N, ...)`` as clients of one example each, ``(C * N, 1, ...)``."""
    return map_inputs(lambda tensor: tensor.flatten(0, 1).unsqueeze(1), x)


def _plan_examples(adapted: AdaptedBackbone, adapters: Adapter, x: Inputs, execution: Execution) -> ExecutionPlan:
    """The plan for all examples, each as one client; ``forward`` is a ``GroupedLoRA`` only where that is exact."""
    examples = _one_by_one(x)
    plan = partial(plan_execution, adapted, adapters, examples, batch_size=1, backward=True, execution=execution)
    execution_plan = plan(adapter_copies=2 if isinstance(group_lora(adapted), GroupedLoRA) else None)
    if not isinstance(execution_plan.forward, GroupedLoRA):
        return execution_plan
    first = {name: tensor[:1].to(adapted.device) for name, tensor in adapters.items()}
    two_examples = map_inputs(lambda tensor: tensor[:2].to(adapted.device), examples)
    if execution_plan.forward.matches_vmap(first, two_examples):
        return execution_plan
    return replace(plan(), forward=adapted)


def _client_per_example(execution_plan: ExecutionPlan, task: Task, stack: Adapter, x: Inputs, y: Tensor) -> Tensor:
    """The gradients ``(K, M, P)`` of ``x`` ``(K, M, ...)``, with a client for every example."""

    def sum_of_losses(outputs: Tensor, y: Tensor) -> Tensor:
        return task.losses(outputs, y).sum()  # a padded example adds zero, not NaN

    rows = flatten(stack).repeat_interleave(y.shape[1], 0).requires_grad_()  # (K M, P)
    like = {name: tensor[0] for name, tensor in stack.items()}
    clients = unflatten(rows, like), _one_by_one(x), y.reshape(-1, 1, *y.shape[2:])
    values = losses(execution_plan.forward, *clients, sum_of_losses, vectorize=execution_plan.vectorize)
    return torch.autograd.grad(values.sum(), rows)[0].view(*y.shape[:2], -1)


def _blocks(clients: int, n: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of clients × samples of at most ``most``: whole clients where they fit, else parts of one."""
    together = max(1, most // n)
    for client in range(0, clients, together):
        for sample in range(0, n, most):
            yield slice(client, min(client + together, clients)), slice(sample, min(sample + most, n))


@checked
def delta_gradients(adapted: AdaptedBackbone, adapters: Stack, split: Split, **options) -> Tensor:
    """The gradient of each example's loss in the deltas and the directly trained weights, ``(C, N, P)``.

    ``P`` runs over the tensors of ``delta(adapters)`` in their order, all entries of every adapted layer's weight: far
    more than the adapter has. ``options`` (``labels``, ``execution``) go to ``per_sample_gradients``.
    """
    (adapters,) = check_models(adapted, split, adapters=adapters)
    dense = adapter_from_delta(delta(adapters, adapted.scaling), adapted.scaling, adapters)
    rows = per_sample_gradients(adapted, dense, split, **options)
    parts = dict(zip(dense, rows.split([tensor[0].numel() for tensor in dense.values()], dim=2)))
    in_layers = [part / adapted.scaling[layer_of(name)] for name, part in parts.items() if is_dense_factor(name, dense)]
    return torch.cat(in_layers + [part for name, part in parts.items() if not is_lora(name)], dim=2)


@checked
def diagonal_fisher(
    gradients: Annotated[Tensor, Numbers("C N P")],
    sizes: Annotated[Tensor, Numbers("C", whole=True, least=1, most="N")],
) -> Tensor:
    """The mean of the squared per-sample gradients ``(C, N, P)``, coordinate by coordinate: ``(C, P)``.

    ``sizes``: the real examples of each client. With the data's labels this is the empirical Fisher, with labels drawn
    from the model the Fisher (Kunstner et al., 2019). The square is inside the mean: the squared gradient of the batch
    is something else.
    """
    return gradients.square().sum(1) / sizes.to(gradients).unsqueeze(1)


@checked
def directional_derivatives(
    adapted: AdaptedBackbone,
    adapters: Stack,
    direction: Annotated[Tensor, Numbers("C P")],
    split: Split,
    *,
    execution: Execution = Execution(),
) -> tuple[Tensor, Tensor]:
    """Slope and Gauss–Newton curvature of each example's loss along ``direction`` ``(C, P)``: two ``(C, N)``.

    With outputs ``z`` and ``u = J v``, they are ``∇l · u`` and ``uᵀ ∇²l u``, both derivatives of the loss in the
    outputs. Of classification, with logits ``z``, ``u = J v`` (one forward-mode product) and ``p = softmax(z)``: the
    slope is ``(p - onehot(y)) · u`` and the curvature ``uᵀ (diag(p) - p pᵀ) u``, the variance of ``u`` under ``p``;
    both are means over the targets of an example that has several. Padded examples give zeros.
    """
    adapters = check_clients(adapted, adapters, split)
    check_labels(adapted, adapters, split)
    flat = flatten(adapters).detach()
    if direction.shape != flat.shape:
        invalid("direction", f"of shape {tuple(flat.shape)}, a row for each client's adapter", direction)
    like = {name: tensor[0] for name, tensor in adapters.items()}

    def logits_and_tangents(row: Tensor, tangent: Tensor, x: Inputs) -> Tensor:
        def logits(row: Tensor) -> Tensor:
            return adapted({name: tensor[0] for name, tensor in unflatten(row.unsqueeze(0), like).items()}, x)

        return torch.stack(jvp(logits, (row,), (tangent,)))  # (2, N, classes)

    derivatives = flat.new_zeros(2, len(split), int(split.sizes.max()))
    options: dict[str, Any] = dict(batch_size=derivatives.shape[2], backward=True, execution=execution)
    parts = split.by_length()
    tensors = select_clients(adapters, parts.clients)
    for group, execution_plan in planned_groups(adapted, tensors, parts.split, parts.split.alike(), **options):
        for chunk in execution_plan.chunks:
            rows = torch.tensor(group[chunk])
            part = parts.split.rows(group[chunk]).to(adapted.device)
            with torch.no_grad():
                both_rows = (each[parts.clients[rows]].to(adapted.device) for each in (flat, direction.to(flat)))
                stacks = *both_rows, part.x
                found = map_clients(logits_and_tangents, *stacks, vectorize=execution_plan.vectorize)
                logits, tangents = found.unbind(1)  # (K, N, classes)
                both = torch.stack(_slope_and_curvature(adapted.task, logits, tangents, part.y))
            is_there, clients, numbers = parts.places(rows, slice(both.shape[2]))
            derivatives[:, clients, numbers] = both[:, is_there].to(derivatives)
    check_losses(derivatives.transpose(0, 1), split)
    slope, curvature = derivatives
    return slope, curvature


def _slope_and_curvature(task: Task, z: Tensor, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of each example's loss, ``(K, N)`` each, from outputs and tangents ``(K, N, classes)`` or token by token."""
    if task is not CLASSIFICATION:

        def along(z: Tensor) -> Tensor:  # the slope; its gradient is the Hessian times u
            return (grad(lambda z: task.losses(z, y, leading=2).sum())(z) * u).sum()

        first = grad(lambda z: task.losses(z, y, leading=2).sum())(z)
        second = grad(along)(z)
        return (first * u).flatten(2).sum(2), (second * u).flatten(2).sum(2)
    p = checked_logits(z, y).softmax(-1)
    u = checked_logits(u, y)
    real = y >= 0
    mean = (p * u).sum(-1)
    slope = (mean - u.gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)) * real
    curvature = (p * (u - mean.unsqueeze(-1)).square()).sum(-1) * real
    return (slope, curvature) if y.dim() == 2 else (token_mean(slope, y), token_mean(curvature, y))
