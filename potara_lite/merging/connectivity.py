"""Loss along the segment between two models and over the plane through them, and the barrier on the segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, door, numbers
from ..checks import options_of, shown, unchecked
from ..federation.split import Split
from ..training.train import evaluate
from .merge import combine_adapters, merge_exact


@door()
def weight_grid(points: int = 11) -> Tensor:
    """Evenly spaced mixing weights from 0 (local) to 1 (federated), both included: 2 points at least."""
    return torch.linspace(0, 1, points)


@door(weights=numbers(1, least=0, most=1), options=options_of(evaluate))
def along_segment(
    adapted: AdaptedBackbone,
    federated: Adapter,
    local: Adapter,
    split: Split,
    weights: Tensor | Sequence[float],
    merge=merge_exact,
    **options,
) -> tuple[Tensor, Tensor]:
    """Loss (nats) and accuracy of every client at every mixing weight: two ``(C, W)``.

    ``federated`` and ``local`` are stacks. ``options`` go to ``evaluate``.
    """
    merge, score = unchecked(merge), unchecked(evaluate)
    points = [score(adapted, merge(federated, local, float(w)), split, **options) for w in weights]
    loss, accuracy = (torch.stack(column, dim=1) for column in zip(*points))
    return loss, accuracy


@door(loss=numbers(2), weights=numbers(1, least=0, most=1))
def barrier(loss: Tensor, weights: Tensor) -> Tensor:
    """How far the loss rises above the straight line between its two ends, ``(C,)`` nats, from ``loss`` ``(C, W)``.

    Zero where the segment never rises above the line: linear mode connectivity (Frankle et al., 2020). ``weights``
    start at 0 and end at 1. Raises ``ValueError`` for others.
    """
    if len(weights) != loss.shape[1] or weights[0] != 0 or weights[-1] != 1:
        raise ValueError(f"weights must be {loss.shape[1]}, from 0 to 1, like loss, not {shown(weights.tolist())}")
    weights = weights.to(loss)
    line = (1 - weights) * loss[:, :1] + weights * loss[:, -1:]
    return (loss - line).amax(dim=1)


@door(x=numbers(1), y=numbers(1), options=options_of(evaluate))
def along_plane(
    adapted: AdaptedBackbone,
    federated: Adapter,
    local: Adapter,
    split: Split,
    x: Tensor | Sequence[float],
    y: Tensor | Sequence[float],
    **options,
) -> tuple[Tensor, Tensor]:
    """Loss (nats) and accuracy of every client over the plane ``x * dW_F + y * dW_L``: two ``(C, Y, X)``.

    The plane goes through the frozen backbone with its empty adapter (0, 0), the federated model (1, 0) and the local
    one (0, 1); the segment between the two is where ``x + y = 1``. Every point is an adapter of rank 2r, exactly (see
    ``combine_adapters``). ``federated`` and ``local`` are stacks. ``options`` go to ``evaluate``.
    """
    combine, score = unchecked(combine_adapters), unchecked(evaluate)
    points = [
        score(adapted, combine([federated, local], [float(right), float(up)]), split, **options)
        for up in y
        for right in x
    ]
    loss, accuracy = (torch.stack(column, dim=1).unflatten(1, (len(y), len(x))) for column in zip(*points))
    return loss, accuracy
