"""Curvature: per-sample gradients, the diagonal Fisher, and Gauss–Newton products along a direction.

Everything here takes stacks and works on all clients in one batched pass. Padded examples (label -100) contribute
nothing, and means are over each client's real examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn import functional as F

from .adapters import AdaptedBackbone, Adapter, flatten, lora_layers, unfactored, unflatten
from .batching import each, plan
from .data import Split
from .grouped import Grouped, grouped
from .training import losses

__all__ = ["delta_gradients", "diagonal_fisher", "directional_derivatives", "per_sample_gradients"]


def per_sample_gradients(
    adapted: AdaptedBackbone,
    adapters: Adapter,
    split: Split,
    *,
    labels: Tensor | None = None,
    chunk_size: int | None = None,
    memory: float | None = None,
    at_once: bool | None = None,
) -> Tensor:
    """The gradient of each example's own loss at its client's adapter, ``(C, N, P)``; zero rows for padding.

    ``chunk_size`` samples at a time, by default as many as fit in ``memory`` bytes (see ``plan``; ``at_once`` too); the
    result itself comes on top. ``P`` runs over the tensors in the adapter's order (see ``flatten``). ``labels``
    ``(C, N)`` replace the split's own.

    Where only linear layers are adapted, one backward pass for a block of samples and a product per sample
    (``grouped.py``). Anywhere else: a sample's gradient is the gradient of a client that owns this sample alone, so
    this is one pass of the training engine over ``C * N`` clients of one example.
    """
    x, y = split.x, split.y if labels is None else labels
    clients, n = y.shape
    flat, like = flatten(adapters).detach(), {name: tensor[0] for name, tensor in adapters.items()}
    device, rows = next(iter(adapted.initial.values())).device, flat.new_empty(clients, n, flat.shape[1])
    forward, examples = grouped(adapted), x.flatten(0, 1).unsqueeze(1)
    planned = partial(
        plan, adapted, adapted, adapters, examples,
        batch_size=1, backward=True, at_once=at_once, chunk_size=chunk_size, memory=memory, known="logits in None",
    )  # fmt: skip
    at_once, chunks = planned(rows=2 if isinstance(forward, Grouped) else 10)
    some = {name: tensor[:1].to(device) for name, tensor in adapters.items()}
    if not at_once:
        forward = adapted
    elif isinstance(forward, Grouped) and not forward.agrees(some, examples[:2].to(device)):
        forward, (at_once, chunks) = adapted, planned(rows=10)
    for block in _blocks(clients, n, chunks[0].stop):
        own, a, b = flat[block[0]].to(device), x[block].to(device), y[block].to(device)  # (K, P), (K, M, ...), (K, M)
        alone = a.flatten(0, 1).unsqueeze(1)  # (K M, 1, ...)
        if isinstance(forward, Grouped):
            grads = rows[block].to(device)  # on the same device, the rows themselves
            forward.per_sample_gradients(unflatten(own, like), a, b, out=grads)
        else:
            own, b = own.repeat_interleave(b.shape[1], 0).requires_grad_(), b.flatten().unsqueeze(1)
            value = losses(forward, unflatten(own, like), alone, b, _total, at_once=at_once)
            grads = torch.autograd.grad(value.sum(), own)[0].view(rows[block].shape)
        if grads.data_ptr() != rows[block].data_ptr():
            rows[block] = grads.to(rows)
    return rows


def _blocks(clients: int, n: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of clients × samples of at most ``most``: whole clients where they fit, else parts of one."""
    together = max(1, most // n)
    for client in range(0, clients, together):
        for sample in range(0, n, most):
            yield slice(client, min(client + together, clients)), slice(sample, min(sample + most, n))


def delta_gradients(
    adapted: AdaptedBackbone, adapters: Adapter, split: Split, *, labels: Tensor | None = None, **options
) -> Tensor:
    """The gradient of each example's loss in the deltas and the directly trained weights, ``(C, N, P)``.

    ``P`` runs over the tensors of ``delta(adapters)`` in their order, the entries of every adapted layer's weight among
    them: far more than the adapter has. ``options`` go to ``per_sample_gradients``.
    """
    dense = unfactored(adapters)
    rows = per_sample_gradients(adapted, dense, split, labels=labels, **options)
    parts = dict(zip(dense, rows.split([tensor[0].numel() for tensor in dense.values()], dim=2)))
    layers = [parts[f"{layer}.lora_B.weight"] / adapted.scaling[layer] for layer in lora_layers(dense)]
    return torch.cat(layers + [part for name, part in parts.items() if ".lora_" not in name], dim=2)


def _total(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="sum")  # a padded example counts zero, not NaN


def diagonal_fisher(gradients: Tensor, sizes: Tensor) -> Tensor:
    """The mean of the squared per-sample gradients ``(C, N, P)``, coordinate by coordinate: ``(C, P)``.

    With the data's labels this is the empirical Fisher, with labels drawn from the model the Fisher (Kunstner et al.,
    2019). The square stands inside the mean: the squared gradient of the batch is something else.
    """
    return gradients.square().sum(1) / sizes.to(gradients).unsqueeze(1)


def directional_derivatives(
    adapted: AdaptedBackbone,
    adapters: Adapter,
    direction: Tensor,
    split: Split,
    *,
    chunk_size: int | None = None,
    memory: float | None = None,
    at_once: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Slope and Gauss–Newton curvature of each example's loss along ``direction`` ``(C, P)``: two ``(C, N)``.

    With logits ``z``, ``u = J v`` (one forward-mode product) and ``p = softmax(z)``: the slope is
    ``(p - onehot(y)) · u`` and the curvature ``uᵀ (diag(p) - p pᵀ) u``, the variance of ``u`` under ``p``. Padded
    examples give zeros. ``chunk_size``, ``memory`` and ``at_once`` are those of ``train``.
    """
    flat, like = flatten(adapters).detach(), {name: tensor[0] for name, tensor in adapters.items()}

    def one(row: Tensor, tangent: Tensor, x: Tensor) -> Tensor:
        def logits(row: Tensor) -> Tensor:
            return adapted({name: tensor[0] for name, tensor in unflatten(row.unsqueeze(0), like).items()}, x)

        return torch.stack(jvp(logits, (row,), (tangent,)))  # (2, N, classes)

    at_once, chunks = plan(
        adapted, adapted, adapters, split.x,
        batch_size=split.y.shape[1], backward=True, at_once=at_once, chunk_size=chunk_size, memory=memory,
        known="logits in None",
    )  # fmt: skip
    with torch.no_grad():
        rows = [each(one, flat[some], direction.to(flat)[some], split.x[some], at_once=at_once) for some in chunks]
        z, u = torch.cat(rows).unbind(1)  # (C, N, classes) each
        p, real = z.softmax(-1), split.y >= 0
        mean = (p * u).sum(-1)
        slope = mean - u.gather(-1, split.y.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        curvature = (p * (u - mean.unsqueeze(-1)).square()).sum(-1)
    return slope * real, curvature * real
