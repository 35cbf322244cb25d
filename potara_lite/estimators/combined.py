"""A prior weight against the held-out curve, weighed by their precisions."""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from ..adapters import AdaptedBackbone, Adapter
from ..connectivity import weight_grid
from ..data import Split
from .curve import segment_losses, slope_variance
from .estimate import Estimate

TINY = torch.finfo(torch.float64).tiny


def combined_weight(
    weights: Tensor, losses: Tensor, sizes: Tensor, prior: Tensor, *, spread: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A prior weight of each client ``(C,)`` against its held-out losses ``(C, W, N)``, by their precisions.

    The prior is first moved by one number, the shift that all clients' held-out losses together like best: what the
    estimator behind it gets wrong for everyone. From there a Newton step, ``own = p - g / h``, with the client's own
    slope ``g`` and the clients' mean curvature ``h``, has sampling variance ``s² = v / (n h²)``, ``v`` the variance of
    a sample's slope. The prior is off by ``τ``, ``spread`` or else by moments, ``τ² = mean (own - p)² - mean s²``
    (DerSimonian & Laird, 1986). Two estimates with known precisions are combined in closed form::

        weight = (own / s² + p / τ²) / (1 / s² + 1 / τ²)

    A constant prior is the pool: each client shrunk towards the federation's best single weight. Where the curve tells
    nothing (``h <= 0``), it is the prior. Padded samples must have loss zero.
    """
    coarse, n = weights.double().cpu().numpy(), sizes.cpu().numpy().astype(float)
    losses, start = losses.double().cpu().numpy(), np.asarray(prior.double().cpu())
    each = CubicSpline(coarse, losses, axis=1)
    curve = CubicSpline(coarse, losses.sum(2) / n[:, None], axis=1)
    rows = np.arange(len(n))

    def along(spline, at, order=0):  # every client's own spline at its own point
        return spline(at, order)[rows, rows]

    shifts = np.linspace(-1, 1, 201)
    total = [n @ along(curve, np.clip(start + shift, 0, 1)) for shift in shifts]
    centre = np.clip(start + shifts[int(np.argmin(total))], 0, 1)
    curvature = float(np.average(along(curve, centre, 2), weights=n))
    slopes = along(each, centre, 1)  # (C, N)
    slope = slopes.sum(1) / n
    variance = slope_variance(slopes, n)
    if curvature <= 0:
        step, share, tau2 = 0.0 * slope, 0.0 * slope, 0.0
    else:
        step, sampling = -slope / curvature, variance / (n * curvature**2)
        tau2 = max(float((step**2 - sampling).mean()), 0.0) if spread is None else spread**2
        share = tau2 / np.maximum(tau2 + sampling, TINY)
    details = {"centre": torch.from_numpy(centre), "spread": torch.tensor(tau2**0.5), "share": torch.from_numpy(share)}
    return torch.from_numpy(np.clip(centre + share * step, 0, 1)), details


def estimate_combined(
    adapted: AdaptedBackbone,
    federated: Adapter,
    local: Adapter,
    split: Split,
    *,
    prior: Tensor | None = None,
    points: int = 5,
    spread: float | None = None,
) -> Estimate:
    """A prior weight against the held-out curve, weighed by their precisions in closed form (``combined_weight``).

    ``prior`` ``(C,)``: the weight of any other estimator, ½ for every client if none is given (which makes it a pool).
    Every client sends its mean loss at the ``points`` weights, its prior and its slopes' mean and variance, and gets
    shift, curvature and spread back. Assumes that the prior is off by a common shift and by Gaussian errors.
    Cost: ``points`` forward passes per sample, besides the prior's.
    """
    weights = weight_grid(points)
    losses = segment_losses(adapted, federated, local, split, weights)
    prior = torch.full((len(split),), 0.5) if prior is None else prior
    weight, details = combined_weight(weights, losses, split.sizes, prior, spread=spread)
    return Estimate(weight, None, {"weights": weights, **details}, floats=(points + 3, 3))
