"""The default: each client's curve of held-out losses, weighed against all clients' and ½, with head and body apart."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, Stack, check_models, layer_of
from ..checks import Numbers, Positive, PositiveOrInf, Size, checked, invalid
from ..federation.split import Split
from ..merging.connectivity import weight_grid
from ..merging.merge import merge_exact
from .curve import client_losses, segment_losses
from .estimate import Estimate, Grouping, Losses, Sizes, head_and_body

POINTS = 9  # weights of the grid
STEP = 0.3  # how far apart head and body are tried


@checked
def estimate_calibrated(adapted: AdaptedBackbone, federated: Stack, local: Stack, split: Split) -> Estimate:
    """``potara-calibrated``, this library's default: ``estimate_pooled`` with head and body apart.

    ``split``: each client's calibration samples, which trained neither model. Where no head is trained there is one
    weight. Why this one: ``docs/mixing_weight.md``. Cost: 12 forward passes per sample, 13 floats up and 3 down.
    """
    by = head_and_body if two_groups(local) else None
    return estimate_pooled(adapted, federated, local, split, by=by)


@checked
def estimate_pooled(
    adapted: AdaptedBackbone,
    federated: Stack,
    local: Stack,
    split: Split,
    *,
    points: Annotated[Size, Field(ge=3)] = POINTS,
    step: Positive = STEP,
    by: Grouping | None = None,
) -> Estimate:
    """Each client's held-out minimum against that of all clients and ½, by their precisions (``pooled_weight``).

    Every client sends its mean loss at the ``points`` weights, receives the weight where all clients' losses are lowest
    together, sends the variance of its slopes there, and gets its weight. With ``by`` naming two groups, such as
    ``head_and_body``, the clients also learn one offset between them together (``pooled_offset``), from losses at the
    offsets ``-step``, 0 and ``step``, for three more floats up and one down: the second group in the order of names
    gets half of it more, the first half of it less. Cost: ``points`` forward passes per sample, with ``by`` three more.
    """
    federated, local = check_models(adapted, split, federated=federated, local=local)
    weights = weight_grid(points)
    losses = segment_losses(adapted, federated, local, split, weights)
    weight, details = pooled_weight(weights, losses, split.sizes)
    details = {"weights": weights, **details}
    if by is None:
        return Estimate(weight, None, details, floats=(points + 1, 2))

    def losses_at(offset: float) -> Tensor:
        merged = merge_exact(federated, local, offset_weights(local, weight, offset, by))
        return client_losses(adapted, merged, split)

    offset, more = pooled_offset(losses_at(-step), losses_at(0.0), losses_at(step), split.sizes, step=step)
    layer_weights = offset_weights(local, weight, offset, by)
    return Estimate(layer_weights, None, {"client": weight, **details, **more}, floats=(points + 4, 3))


def two_groups(adapter: Adapter) -> bool:
    """Whether ``estimate_calibrated`` has two groups to keep apart: LoRA layers and a directly trained head."""
    return len({head_and_body(name) for name in adapter}) == 2


def offset_weights(
    adapter: Adapter, weight: Tensor, offset: float | Tensor, by: Grouping = head_and_body
) -> dict[str, Tensor]:
    """The weights of the adapter's layers: ``weight`` ``(C,)`` with two groups ``offset`` apart, cut to [0, 1].

    The second group in the order of names gets half of the offset more, the first half of it less. Raises
    ``ValueError`` unless there are two groups.
    """
    labels = sorted({by(name) for name in adapter})
    if len(labels) != 2:
        raise ValueError(f"the offset is between two groups, but by gives {len(labels)}: {labels}")
    halves = {labels[0]: -offset / 2, labels[1]: offset / 2}
    return {layer_of(name): (weight + halves[by(name)]).clamp(0, 1) for name in adapter}


@checked
def pooled_weight(
    weights: Annotated[Tensor, Numbers("W")],
    losses: Annotated[Tensor, Numbers("C W N")],
    sizes: Sizes,
    *,
    tau: Positive = 0.1,
    sigma: PositiveOrInf = 0.25,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each client's weight ``(C,)`` from its held-out losses ``(C, W, N)`` at W ≥ 3 equally spaced ``weights``.

    Padded samples must have loss zero. ``parabolas`` fits one to each client's losses around the inner point of the
    grid where the mean loss of all samples is lowest; ``weigh`` computes the weights, with the standard deviations
    ``tau`` and ``sigma``. Raises ``ValueError`` for weights of another number or spacing.
    """
    spacings = weights.double().diff()
    if len(weights) < 3 or not (spacings > 0).all() or not torch.allclose(spacings, spacings[0]):
        invalid("weights", "3 or more equally spaced ones, the smallest first", weights.tolist())
    mean = losses.double().cpu().sum(2) / sizes.unsqueeze(1)
    index = lowest_inside(mean, sizes)
    low, middle, high = losses[:, index - 1 : index + 2].unbind(1)
    spacing = float(weights[1] - weights[0])
    slope, curvature, variance = parabolas(low, middle, high, sizes, spacing)
    weight, details = weigh(float(weights[index]), slope, curvature, variance, sizes, tau=tau, sigma=sigma)
    return weight, {"loss": mean, **details}


def lowest_inside(mean: Tensor, sizes: Tensor) -> int:
    """The index of the inner point of the grid where the mean loss of all samples is lowest, from the clients' mean
    losses ``(C, W)``."""
    return 1 + int((sizes.double() @ mean)[1:-1].argmin())


def parabolas(low: Tensor, middle: Tensor, high: Tensor, sizes: Tensor, step: float) -> tuple[Tensor, Tensor, Tensor]:
    """The parabola through three losses per sample ``(C, N)``, ``step`` apart: of each client the mean slope in the
    middle, the mean curvature, and the variance of a sample's slope, ``(C,)`` each. Padding is zero."""
    low, middle, high = (part.double().cpu() for part in (low, middle, high))
    slopes = (high - low) / (2 * step)
    curvatures = (high + low - 2 * middle) / step**2
    slope = slopes.sum(1) / sizes
    is_real = torch.arange(slopes.shape[1]) < sizes.unsqueeze(1)
    deviation = (slopes - slope.unsqueeze(1)) * is_real
    return slope, curvatures.sum(1) / sizes, deviation.square().sum(1) / (sizes - 1).clamp_min(1)


def weigh(
    at: float,
    slope: Tensor,
    curvature: Tensor,
    variance: Tensor,
    sizes: Tensor,
    *,
    tau: float = 0.1,
    sigma: float = 0.25,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each client's weight ``(C,)`` from the parabolas at the weight ``at``: three estimates, weighed by precisions.

    Client i's best weight has three estimates. A small variance means a precise estimate::

        estimate                           variance              what it is
        client_estimate_i = at - g_i / h   s_i² = v / (n_i h²)   the minimum of the client's own parabola
        prior_mean                         τ² = tau²             the mean about which the best weights scatter
        ½                                  σ² = sigma²           the middle, about which prior_mean scatters

    A precision is one over a variance, and the weights follow from them (Bates & Granger, 1969)::

        prior_mean   mean of all client_estimate_i, with weights 1 / (s_i² + τ²), and of ½, with weight 1 / σ²
        weight_i     mean of client_estimate_i, with weight 1 / s_i², and of prior_mean, with weight 1 / τ²
                     = prior_mean + shrinkage_i (client_estimate_i - prior_mean),  shrinkage_i = τ² / (τ² + s_i²)

    ``g_i`` is client i's slope and ``n_i`` its number of samples; ``v`` is the clients' mean variance of a sample's
    slope, ``h`` their mean curvature, but at least ``v / 4``. A calibrated model has ``h = v`` (Bartlett's identity),
    an over-confident one a smaller ``h``; where the losses fall towards one end, the curvature may even be negative,
    but the slope still shows the direction. If both ``v`` and the curvature are zero, the weight is ½.
    """
    v = pooled_mean(variance, sizes - 1)
    h = max(pooled_mean(curvature, sizes), v / 4)
    if h <= 0:
        half = torch.full_like(slope, 0.5)
        return half, {"prior_mean": half[0], "shrinkage": torch.zeros_like(slope)}
    client_estimate = at - slope / h
    sampling_variance = v / (sizes.double() * h**2)
    precision = 1 / (sampling_variance + tau**2)
    prior_mean = (precision @ client_estimate + 0.5 / sigma**2) / (precision.sum() + 1 / sigma**2)
    shrinkage = tau**2 / (tau**2 + sampling_variance)
    weight = (prior_mean + shrinkage * (client_estimate - prior_mean)).clamp(0, 1)
    return weight, {"prior_mean": prior_mean, "shrinkage": shrinkage}


def pooled_mean(values: Tensor, counts: Tensor) -> float:
    """The mean of the clients' values ``(C,)``, weighted by ``counts``."""
    counts = counts.double().clamp_min(0)
    return float(values @ counts / counts.sum().clamp_min(1))


@checked
def pooled_offset(
    low: Losses, middle: Losses, high: Losses, sizes: Sizes, *, step: Positive = STEP, tau: Positive = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """One offset between two groups of tensors for all clients, from three losses per held-out sample ``(C, N)``.

    The losses are those at the offsets ``-step``, 0 and ``step``. Padded samples must have loss zero. See
    ``weigh_offset``.
    """
    return weigh_offset(*parabolas(low, middle, high, sizes, step), sizes, step=step, tau=tau)


def weigh_offset(
    slope: Tensor, curvature: Tensor, variance: Tensor, sizes: Tensor, *, step: float = STEP, tau: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """The offset ``()`` from the clients' parabolas ``(C,)``: the minimum of the mean parabola, weighed against 0.

    The minimum has sampling variance ``v / (n h²)`` (slope's variance, number of samples, curvature) and is weighed by
    its precision against a prior ``N(0, tau²)``. The offset is never more than twice the ``step``, and 0 where the
    mean parabola opens downwards.
    """
    h = pooled_mean(curvature, sizes)
    v = pooled_mean(variance, sizes - 1)
    n = float(sizes.sum())
    shrinkage = tau**2 / (tau**2 + v / (n * h**2)) if h > 0 else 0.0
    shrunk = -shrinkage * pooled_mean(slope, sizes) / h if h > 0 else 0.0
    offset = torch.tensor(min(max(shrunk, -2 * step), 2 * step), dtype=torch.float64)
    return offset, {"offset": offset, "offset_shrinkage": torch.tensor(shrinkage, dtype=torch.float64)}
