"""Loss along the segment between two models and over the plane through them, and the barrier on the segment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, Stack, check_models
from ..checks import Numbers, Size, checked, shown
from ..federation.split import Split
from ..training.train import evaluate
from .merge import merge_exact, stack_ranks

Weights = Annotated[Tensor, Numbers("W", least=0, most=1)]  # mixing weights; a list becomes a tensor


@checked
def weight_grid(points: Annotated[Size, Field(ge=2)] = 11) -> Tensor:
    """Evenly spaced mixing weights from 0 (local) to 1 (federated), both included: 2 points at least."""
    return torch.linspace(0, 1, points)


@checked
def along_segment(
    adapted: AdaptedBackbone,
    federated: Stack,
    local: Stack,
    split: Split,
    weights: Weights,
    merge: Callable[[Adapter, Adapter, float], Adapter] = merge_exact,
    **options,
) -> tuple[Tensor, Tensor]:
    """Loss (nats) and accuracy of every client at every mixing weight: two ``(C, W)``.

    ``federated`` and ``local`` are stacks. ``options`` go to ``evaluate``.
    """
    federated, local = check_models(adapted, split, federated=federated, local=local)
    points = [evaluate(adapted, merge(federated, local, float(weight)), split, **options) for weight in weights]
    loss, accuracy = (torch.stack(column, dim=1) for column in zip(*points))
    return loss, accuracy


@checked
def barrier(loss: Annotated[Tensor, Numbers("C W")], weights: Weights) -> Tensor:
    """How far the loss rises above the straight line between its two ends, ``(C,)`` nats, from ``loss`` ``(C, W)``.

    Zero where the segment never rises above the line: linear mode connectivity (Frankle et al., 2020). ``weights``
    start at 0 and end at 1. Raises ``ValueError`` for others.
    """
    if weights[0] != 0 or weights[-1] != 1:
        raise ValueError(f"weights must go from 0 to 1, unlike {shown(weights.tolist())}")
    weights = weights.to(loss)
    line = (1 - weights) * loss[:, :1] + weights * loss[:, -1:]
    return (loss - line).amax(dim=1)


@checked
def along_plane(
    adapted: AdaptedBackbone,
    federated: Stack,
    local: Stack,
    split: Split,
    x: Annotated[Tensor, Numbers("X")],
    y: Annotated[Tensor, Numbers("Y")],
    **options,
) -> tuple[Tensor, Tensor]:
    """Loss (nats) and accuracy of every client over the plane ``x * dW_F + y * dW_L``: two ``(C, Y, X)``.

    The plane goes through the frozen backbone with its empty adapter (0, 0), the federated model (1, 0) and the local
    one (0, 1); the segment between the two is where ``x + y = 1``. Every point is an adapter of rank 2r, exactly (see
    ``combine_adapters``). ``federated`` and ``local`` are stacks. ``options`` go to ``evaluate``.
    """
    models = check_models(adapted, split, federated=federated, local=local)
    points = [
        evaluate(adapted, stack_ranks(models, (float(right), float(up))), split, **options) for up in y for right in x
    ]
    loss, accuracy = (torch.stack(column, dim=1).unflatten(1, (len(y), len(x))) for column in zip(*points))
    return loss, accuracy
