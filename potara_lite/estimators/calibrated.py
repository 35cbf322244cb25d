"""The default: every client's held-out curve, pooled over the clients, with head and body apart."""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from ..adapters import AdaptedBackbone, Adapter, layer_of
from ..connectivity import weight_grid
from ..data import Split
from ..merging import merge_exact
from .curve import example_losses, segment_losses, slope_variance
from .estimate import Estimate, Grouping, head_and_body


def estimate_calibrated(adapted: AdaptedBackbone, federated: Adapter, local: Adapter, split: Split) -> Estimate:
    """``potara-calibrated``, this library's default: the pooled held-out curve with head and body apart.

    ``split``: each client's calibration samples, which trained neither model. Why this one: ``docs/mixing_weight.md``.
    Cost: 7 forward passes per sample, 9 floats up and 3 down per client.
    """
    return estimate_pooled(adapted, federated, local, split, by=head_and_body)


def estimate_pooled(
    adapted: AdaptedBackbone,
    federated: Adapter,
    local: Adapter,
    split: Split,
    *,
    points: int = 5,
    probe: float = 0.3,
    by: Grouping | None = None,
) -> Estimate:
    """The held-out curve of each client, shrunk towards the clients' pooled curve (``pooled_weight``).

    Every client sends its mean loss at the ``points`` weights and the spread of its slopes, and gets the federation's
    centre and spread back. Assumes that the clients' best weights scatter about a common centre. With ``by`` naming two
    groups, such as ``head_and_body``, the clients also learn one offset between them together
    (``pooled_offset``), for three more floats up and one down: the second group in the order of names gets half
    of it more, the first half of it less. Cost: ``points`` forward passes per sample, with ``by`` two more.
    """
    weights = weight_grid(points)
    losses = segment_losses(adapted, federated, local, split, weights)
    weight, details = pooled_weight(weights, losses, split.sizes)
    details = {"weights": weights, **details}
    if by is None:
        return Estimate(weight, None, details, floats=(points + 1, 2))
    labels = sorted({by(name) for name in local})
    if len(labels) != 2:
        raise ValueError(f"the offset is between two groups, but by gives {len(labels)}: {labels}")

    def apart(offset: float | Tensor) -> dict[str, Tensor]:
        halves = {labels[0]: -offset / 2, labels[1]: offset / 2}
        return {layer_of(name): (weight + halves[by(name)]).clamp(0, 1) for name in local}

    def losses_apart(offset: float) -> Tensor:
        return example_losses(adapted, merge_exact(federated, local, apart(offset)), split)

    middle = CubicSpline(weights, losses.double().cpu(), axis=1)(weight)[range(len(split)), range(len(split))]
    offset, more = pooled_offset(
        losses_apart(-probe), torch.from_numpy(middle), losses_apart(probe), split.sizes, probe=probe
    )
    return Estimate(apart(offset), None, {"client": weight, **details, **more}, floats=(points + 4, 3))


def pooled_weight(
    weights: Tensor, losses: Tensor, sizes: Tensor, *, spread: tuple[float, ...] = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each client's weight from its held-out losses ``(C, W, N)``, shrunk towards the clients' own pool.

    Padded samples must have loss zero, as ``segment_losses`` gives them.

    The held-out log-likelihood of client i along the segment is ``-n_i`` times its mean loss. The clients' best
    weights are taken to scatter about a common centre, ``w_i ~ N(μ, τ²)`` on [0, 1]; ``μ`` is uniform there and ``τ``
    one of ``spread``. Sum out ``μ`` and ``τ`` by their posterior given all clients (empirical Bayes with its
    hyperparameters integrated), and return each client's posterior mean ``(C,)``. A client with much to say keeps its
    own minimum, one with little gets the federation's.

    The likelihood is tempered by ``h / v``, curvature over variance of the slope at the pooled minimum, which is 1
    where the models are calibrated and smaller where they are over-confident (the sandwich of Huber, 1967).
    """
    coarse, fine = weights.double().cpu().numpy(), np.linspace(0, 1, 101)
    losses, n = losses.double().cpu().numpy(), sizes.cpu().numpy().astype(float)
    mean = losses.sum(2) / n[:, None]  # (C, W)
    curve = CubicSpline(coarse, mean, axis=1)
    middle = fine[np.argmin((n[:, None] * curve(fine)).sum(0))]
    curvature = float(np.average(curve(middle, 2), weights=n))
    slopes = CubicSpline(coarse, losses, axis=1)(middle, 1)  # (C, N)
    variance = slope_variance(slopes, n)
    temper = float(np.clip(curvature / max(variance, 1e-30), 0.05, 1.0))
    likelihood = -temper * n[:, None] * curve(fine)  # (C, 101)
    centre, width = (m.reshape(-1, 1) for m in np.meshgrid(np.linspace(0, 1, 41), spread))
    prior = -0.5 * ((fine - centre) / width) ** 2
    prior -= np.log(np.exp(prior).sum(1, keepdims=True))  # (H, 101)
    joint = likelihood[:, None] + prior[None]  # (C, H, 101)
    top = joint.max(2, keepdims=True)
    mass = np.exp(joint - top)
    evidence = (np.log(mass.sum(2)) + top[..., 0]).sum(0)  # (H,)
    belief = np.exp(evidence - evidence.max())
    belief /= belief.sum()
    weight = np.einsum("h,ch->c", belief, (mass * fine).sum(2) / mass.sum(2))
    details = {
        "loss": torch.from_numpy(mean),
        "centre": torch.tensor(float(belief @ centre[:, 0])),
        "spread": torch.tensor(float(belief @ width[:, 0])),
        "temper": torch.tensor(temper),
    }
    return torch.from_numpy(weight), details


def pooled_offset(
    low: Tensor, middle: Tensor, high: Tensor, sizes: Tensor, *, probe: float = 0.3, spread: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """One offset between two groups of tensors for all clients, from three losses per held-out sample ``(C, N)``.

    The losses are those at the offsets ``-probe``, 0 and ``probe``. The minimum of the parabola through their means
    over all clients' samples has sampling variance ``v / (n h²)`` (slope's variance, curvature, number of samples) and
    is weighed against a prior ``N(0, spread²)`` by their precisions. Never more than twice the probe; 0 where the
    parabola opens downwards. Padded samples must have loss zero. Returns the offset ``()``.
    """
    low, middle, high = (part.double().cpu() for part in (low, middle, high))
    total = float(sizes.sum())
    slopes = (high - low) / (2 * probe)  # (C, N)
    curvature = float((high + low - 2 * middle).sum()) / probe**2 / total
    variance = slope_variance(slopes.numpy(), sizes.cpu().numpy().astype(float))
    sampling = variance / (total * curvature**2) if curvature > 0 else torch.inf
    share = spread**2 / (spread**2 + sampling)
    offset = -share * float(slopes.sum()) / total / curvature if share > 0 else 0.0
    details = {"offset": torch.tensor(min(max(offset, -2 * probe), 2 * probe)), "offset_share": torch.tensor(share)}
    return details["offset"], details
