"""The default: every client's held-out curve, weighed against the clients' pool and ½, with head and body apart."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, door, layer_of, numbers, shaped_like, sizes_of
from ..checks import refuse, unchecked, whole
from ..federation.split import Split
from ..merging.connectivity import weight_grid
from ..merging.merge import merge_exact
from .curve import client_losses, segment_losses
from .estimate import Estimate, Grouping, head_and_body

POINTS = 9  # weights of the grid
STEP = 0.3  # how far apart head and body are tried


@door()
def estimate_calibrated(adapted: AdaptedBackbone, federated: Adapter, local: Adapter, split: Split) -> Estimate:
    """``potara-calibrated``, this library's default: ``estimate_pooled`` with head and body apart.

    ``split``: each client's calibration samples, which trained neither model. Where no head is trained there is one
    weight. Why this one: ``docs/mixing_weight.md``. Cost: 12 forward passes per sample, 13 floats up and 3 down.
    """
    by = head_and_body if two_groups(local) else None
    return unchecked(estimate_pooled)(adapted, federated, local, split, by=by)


@door(points=whole(3))
def estimate_pooled(
    adapted: AdaptedBackbone,
    federated: Adapter,
    local: Adapter,
    split: Split,
    *,
    points: int = POINTS,
    step: float = STEP,
    by: Grouping | None = None,
) -> Estimate:
    """Each client's held-out minimum against that of all clients and ½, by their precisions (``pooled_weight``).

    Every client sends its mean loss at the ``points`` weights, hears where all clients' are lowest together, sends the
    variance of its slopes there, and gets its weight. With ``by`` naming two groups, such as ``head_and_body``, the
    clients also learn one offset between them together (``pooled_offset``), for three more floats up and one down: the
    second group in the order of names gets half of it more, the first half of it less. Cost: ``points`` forward passes
    per sample, with ``by`` three more.
    """
    weights = weight_grid(points)
    losses = segment_losses(adapted, federated, local, split, weights)
    weight, details = pooled_weight(weights, losses, split.sizes)
    details = {"weights": weights, **details}
    if by is None:
        return Estimate(weight, None, details, floats=(points + 1, 2))
    three = (merge_exact(federated, local, offset_weights(local, weight, o, by)) for o in (-step, 0.0, step))
    offset, more = pooled_offset(*(client_losses(adapted, one, split) for one in three), split.sizes, step=step)
    weights = offset_weights(local, weight, offset, by)
    return Estimate(weights, None, {"client": weight, **details, **more}, floats=(points + 4, 3))


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


@door(weights=numbers(1), losses=numbers(3), sizes=sizes_of("losses", 2))
def pooled_weight(
    weights: Tensor, losses: Tensor, sizes: Tensor, *, tau: float = 0.1, sigma: float = 0.25
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each client's weight ``(C,)`` from its held-out losses ``(C, W, N)`` at W ≥ 3 equally spaced ``weights``.

    Padded samples must have loss zero. Around the point of the grid where the clients' mean losses, each as often as it
    has samples, are lowest together (of the two ends their neighbours), ``parabolas`` gives each client's slope ``g``
    and the pool's curvature ``h`` and variance ``v`` of a sample's slope. Then ``weigh``. Raises ``ValueError`` for
    weights of another number or spacing.
    """
    steps = weights.double().diff()
    if not 3 <= len(weights) == losses.shape[1] or not (steps > 0).all() or not torch.allclose(steps, steps[0]):
        expected = f"{max(3, losses.shape[1])} equally spaced ones, as losses has, the smallest first"
        refuse("weights", expected, weights.tolist())
    mean = losses.double().cpu().sum(2) / sizes.unsqueeze(1)
    place = lowest_inside(mean, sizes)
    three, step = losses[:, place - 1 : place + 2].unbind(1), float(weights[1] - weights[0])
    weight, details = weigh(float(weights[place]), *parabolas(*three, sizes, step), sizes, tau=tau, sigma=sigma)
    return weight, {"loss": mean, **details}


def lowest_inside(mean: Tensor, sizes: Tensor) -> int:
    """The point, not one of the two ends, where the mean losses ``(C, W)`` of all samples together are lowest."""
    return 1 + int((sizes.double() @ mean)[1:-1].argmin())


def parabolas(
    low: Tensor, middle: Tensor, high: Tensor, sizes: Tensor, step: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The parabola through three losses per sample ``(C, N)``, ``step`` apart: of each client the mean slope in the
    middle, the mean curvature, and the variance of a sample's slope, ``(C,)`` each. Padding is zero."""
    low, middle, high = (part.double().cpu() for part in (low, middle, high))
    slopes, bends = (high - low) / (2 * step), (high + low - 2 * middle) / step**2
    real = torch.arange(slopes.shape[1]) < sizes.unsqueeze(1)
    slope, curvature = slopes.sum(1) / sizes, bends.sum(1) / sizes
    excess = (slopes - slope.unsqueeze(1)) * real
    return slope, curvature, excess.square().sum(1) / (sizes - 1).clamp_min(1)


def weigh(
    place: float, slope: Tensor, curvature: Tensor, variance: Tensor, sizes: Tensor, *,
    tau: float = 0.1, sigma: float = 0.25,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Each client's weight ``(C,)`` from the parabolas at ``place``: three estimates, weighed by their precisions.

    Of client i's best weight three things are known (Bates & Granger, 1969, for the combination)::

        own_i   = place - g_i / h     variance s_i² = v / (n_i h²)   the minimum of its own parabola
        centre                        variance τ², ``spread``        the clients scatter about a common prior_mean
        ½                             variance σ², ``sigma``  the centre is not far from the middle

    So the centre is the mean of the ``own_i`` and ½ with weights ``1/(s_i² + τ²)`` and ``1/σ²``, and the client's
    weight that of ``own_i`` and the centre with ``1/s_i²`` and ``1/τ²``. ``v`` is the clients' mean, and so is ``h``,
    but at least ``v/4``: a calibrated model has ``h = v`` (Bartlett's identity), an over-confident one less, and a
    curve that falls to one end may bend either way and still says to which. Without any slope or curve it is ½.
    """
    v = pooled_mean(variance, sizes - 1)
    h = max(pooled_mean(curvature, sizes), v / 4)
    if h <= 0:
        half = torch.full_like(slope, 0.5)
        return half, {"prior_mean": half[0], "shrinkage": torch.zeros_like(slope)}
    own, sampling = place - slope / h, v / (sizes.double() * h**2)
    precision = 1 / (sampling + tau**2)
    centre = (precision @ own + 0.5 / sigma**2) / (precision.sum() + 1 / sigma**2)
    share = tau**2 / (tau**2 + sampling)
    return (centre + share * (own - prior_mean)).clamp(0, 1), {"prior_mean": prior_mean, "shrinkage": share}


def pooled_mean(values: Tensor, counts: Tensor) -> float:
    """The mean of the clients' values ``(C,)``, each as often as it counts."""
    counts = counts.double().clamp_min(0)
    return float(values @ counts / counts.sum().clamp_min(1))


@door(low=numbers(2), middle=shaped_like("low", 2), high=shaped_like("low", 2), sizes=sizes_of("low", 1))
def pooled_offset(
    low: Tensor, middle: Tensor, high: Tensor, sizes: Tensor, *, step: float = 0.3, tau: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """One offset between two groups of tensors for all clients, from three losses per held-out sample ``(C, N)``.

    The losses are those at the offsets ``-probe``, 0 and ``probe``. Padded samples must have loss zero. See
    ``weigh_offset``.
    """
    return weigh_offset(*parabolas(low, middle, high, sizes, step), sizes, step=step, tau=tau)


def weigh_offset(
    slope: Tensor, curvature: Tensor, variance: Tensor, sizes: Tensor, *, step: float = 0.3, tau: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """The offset ``()`` from the clients' parabolas ``(C,)``: the minimum of the pool's, against no offset.

    It has sampling variance ``v / (n h²)`` (slope's variance, curvature, number of samples) and is weighed against a
    prior ``N(0, spread²)`` by their precisions. Never more than twice the probe; 0 where the pool opens downwards.
    """
    h, v, n = pooled_mean(curvature, sizes), pooled_mean(variance, sizes - 1), float(sizes.sum())
    share = tau**2 / (tau**2 + v / (n * h**2)) if h > 0 else 0.0
    offset = -share * pooled_mean(slope, sizes) / h if h > 0 else 0.0
    offset = torch.tensor(min(max(offset, -2 * step), 2 * step), dtype=torch.float64)
    return offset, {"offset": offset, "offset_shrinkage": torch.tensor(share, dtype=torch.float64)}
