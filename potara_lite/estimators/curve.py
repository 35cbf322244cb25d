"""The held-out loss along the segment between the two models, and each client's own minimum of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, door, numbers
from ..checks import shown, unchecked
from ..federation.split import Split
from ..merging.connectivity import weight_grid
from ..merging.merge import merge_exact
from ..training.batching import Execution
from ..training.loss import example_losses
from ..training.train import batched_logits, check_losses
from .estimate import Estimate
from .gauss_newton import moments_from_slopes
from .moments import Moments


@door()
def estimate_curve(
    adapted: AdaptedBackbone,
    federated: Adapter,
    local: Adapter,
    split: Split,
    *,
    points: int = 9,
    parabola: bool = False,
) -> Estimate:
    """Each client alone: the weight with the smallest mean loss on its samples, on a grid or by a fitted parabola.

    Nothing is assumed of the models, only that the samples are fresh. Its expected regret is about ``1 / (2 n)`` nats
    for n samples where the models are calibrated, and more where they are over-confident. Cost: ``points``
    forward passes per sample.
    """
    weights = weight_grid(points)
    loss = segment_losses(adapted, federated, local, split, weights).double().sum(2).cpu() / split.sizes.unsqueeze(1)
    details = {"weights": weights, "loss": loss}
    if parabola:
        moments = parabola_moments(weights, loss)
        return Estimate(moments.weight, moments, details)
    return Estimate(weights.double()[loss.argmin(1)], None, details)


@door(weights=numbers(1), loss=numbers(2))
def parabola_moments(weights: Tensor, loss: Tensor) -> Moments:
    """Moments from the least-squares parabola through the loss ``(C, W)`` at the weights ``(W,)``, three or more."""
    if not 3 <= len(weights.unique()) <= len(weights) == loss.shape[1]:
        text = f"3 or more different ones, as many as the {loss.shape[1]} of loss"
        raise ValueError(f"weights must be {text}, not {shown(weights.tolist())}")
    design = torch.stack([weights**0, weights, weights**2], dim=1).double().cpu()
    _, slope, half = torch.linalg.lstsq(design, loss.double().cpu().mT).solution  # three (C,)
    slope = torch.where(half > 0, slope, slope + half)  # one that opens downwards: its lower end, by the chord
    return moments_from_slopes(slope, 2 * half.clamp_min(0))


@torch.no_grad()
@door()
def client_losses(adapted: AdaptedBackbone, adapters: Adapter, split: Split) -> Tensor:
    """Each example's loss ``(C, N)`` in nats (``training/loss.py``); zeros for padding.

    Raises ``ValueError`` for a client with a loss that is not finite.
    """
    result = torch.zeros(split.y.shape[:2], dtype=adapted.dtype, device=adapted.device)
    for rows, columns, logits, y in batched_logits(adapted, adapters, split, batch_size=128, execution=Execution()):
        result[rows, columns] = example_losses(logits, y, leading=2)
    check_losses(result, split)
    return result


@door(weights=numbers(1, least=0, most=1))
def segment_losses(
    adapted: AdaptedBackbone, federated: Adapter, local: Adapter, split: Split, weights: Tensor
) -> Tensor:
    """Each example's loss at each mixing weight of the exact merge, ``(C, W, N)``; zeros for padding."""
    merge, measure = unchecked(merge_exact), unchecked(client_losses)
    merges = (merge(federated, local, weight) for weight in weights.tolist())
    return torch.stack([measure(adapted, merged, split) for merged in merges], dim=1)


@torch.no_grad()
@door()
def client_logits(adapted: AdaptedBackbone, adapters: Adapter, split: Split) -> Tensor:
    """Every client's logits on its own examples, ``(C, N, ..., classes)``."""
    options, result = dict(batch_size=split.y.shape[1], execution=Execution()), None
    for rows, columns, logits, _ in batched_logits(adapted, adapters, split, **options):
        result = logits.new_empty(*split.y.shape[:2], *logits.shape[2:]) if result is None else result
        result[rows, columns] = logits
    check_losses(result, split)
    return result
