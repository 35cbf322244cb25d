"""The held-out loss along the segment between the two models, and each client's own minimum of it."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Stack, check_models
from ..checks import Flag, Numbers, Size, checked, invalid
from ..federation.split import Split
from ..merging.connectivity import Weights, weight_grid
from ..merging.merge import merge_exact
from ..training.batching import Execution
from ..training.train import check_losses, example_logits
from .estimate import Estimate
from .gauss_newton import moments_from_slopes
from .moments import Moments


@checked
def estimate_curve(
    adapted: AdaptedBackbone, federated: Stack, local: Stack, split: Split, *, points: Size = 9, parabola: Flag = False
) -> Estimate:
    """Each client alone: the weight with the smallest mean loss on its samples, on a grid or by a fitted parabola.

    Nothing is assumed of the models, only that the samples are fresh. Its expected regret is about ``1 / (2 n)`` nats
    for n samples where the models are calibrated, and more where they are over-confident. Cost: ``points``
    forward passes per sample.
    """
    federated, local = check_models(adapted, split, federated=federated, local=local)
    weights = weight_grid(points)
    loss = segment_losses(adapted, federated, local, split, weights).double().sum(2).cpu() / split.sizes.unsqueeze(1)
    details = {"weights": weights, "loss": loss}
    if parabola:
        moments = parabola_moments(weights, loss)
        return Estimate(moments.weight, moments, details)
    return Estimate(weights.double()[loss.argmin(1)], None, details)


@checked
def parabola_moments(weights: Annotated[Tensor, Numbers("W")], loss: Annotated[Tensor, Numbers("C W")]) -> Moments:
    """Moments from the least-squares parabola through the loss ``(C, W)`` at the weights ``(W,)``, three or more."""
    if len(weights.unique()) < 3:
        invalid("weights", "3 or more different ones", weights.tolist())
    design = torch.stack([weights**0, weights, weights**2], dim=1).double().cpu()
    _, slope, half = torch.linalg.lstsq(design, loss.double().cpu().mT).solution  # three (C,)
    slope = torch.where(half > 0, slope, slope + half)  # one that opens downwards: its lower end, by the chord
    return moments_from_slopes(slope, 2 * half.clamp_min(0))


@torch.no_grad()
@checked
def client_losses(adapted: AdaptedBackbone, adapters: Stack, split: Split) -> Tensor:
    """Each example's loss ``(C, N)`` in nats (``models/loss.py``); zeros for padding.

    Raises ``ValueError`` for a client with a loss that is not finite.
    """
    [adapters] = check_models(adapted, split, adapters=adapters)
    result = torch.zeros(len(split), int(split.sizes.max()), dtype=adapted.dtype, device=adapted.device)
    blocks = example_logits(adapted, adapters, split, batch_size=128, execution=Execution())
    for clients, numbers, logits, y in blocks:
        result[clients, numbers] = adapted.task.losses(logits, y).to(result)
    check_losses(result, split)
    return result


@checked
def segment_losses(adapted: AdaptedBackbone, federated: Stack, local: Stack, split: Split, weights: Weights) -> Tensor:
    """Each example's loss at each mixing weight of the exact merge, ``(C, W, N)``; zeros for padding."""
    federated, local = check_models(adapted, split, federated=federated, local=local)
    merges = (merge_exact(federated, local, weight) for weight in weights.tolist())
    return torch.stack([client_losses(adapted, merged, split) for merged in merges], dim=1)


@torch.no_grad()
@checked
def client_logits(adapted: AdaptedBackbone, adapters: Stack, split: Split) -> Tensor:
    """Every client's logits on its own examples, ``(C, N, ..., classes)``; of no meaning behind them."""
    [adapters] = check_models(adapted, split, adapters=adapters)
    most = int(split.sizes.max())
    blocks = list(example_logits(adapted, adapters, split, batch_size=most, execution=Execution()))
    shape = [max(sizes) for sizes in zip(*(logits.shape[1:] for _, _, logits, _ in blocks))]  # with tokens, the longest
    result = blocks[0][2].new_zeros(len(split), most, *shape)
    for clients, numbers, logits, _ in blocks:
        result[(clients, numbers, *map(slice, logits.shape[1:]))] = logits
    check_losses(result, split)
    return result
