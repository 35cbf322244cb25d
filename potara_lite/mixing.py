"""From moments to the mixing weight: the closed form, its bound, and pure functions that estimate the moments.

With the errors ``e_F`` and ``e_L`` of the two models about the client's own optimum, ``a = E|e_F|²``, ``b = E|e_L|²``
and ``c = E[e_F · e_L]``, the merged model's expected squared error is ``w² a + (1-w)² b + 2 w (1-w) c``. The paper's
variance-trace bound on the expected loss is β/2 times this; its minimiser is ``w = (b - c) / (a + b - 2c)``, the
combination of forecasts of Bates & Granger (1969). The weight is on the federated model.

Nothing here sees a network: the functions take gradients ``(C, N, P)``, losses ``(C, W, N)`` or slopes ``(C, N)``.
``estimators.py`` gets those from the models.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

__all__ = [
    "Moments",
    "combination_weights",
    "combined_weight",
    "fisher_moments",
    "gradient_moments",
    "laplace_moments",
    "moments_from_slopes",
    "parabola_moments",
    "pooled_offset",
    "pooled_weight",
    "shrinkage_moments",
]

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Moments:
    """The second moments ``a`` (federated), ``b`` (local), ``c`` (cross): float64, ``(C,)`` or ``(C, groups)``.

    Degenerate cases have a stated answer. ``weight`` is clipped to [0, 1] (``c > min(a, b)``: the better model
    alone). Where the bound does not curve upwards, ``a + b - 2c <= 1e-12 (a + b)``, it is the end with the smaller
    moment, and ½ if they are equal to 1e-9: the two errors cannot be told apart. An infinite ``a``
    gives 0, an infinite ``b`` 1, both ½. NaN or negative ``a``, ``b`` raise ``ValueError``.

    >>> m = Moments(1.0, 3.0, 0.0)
    >>> float(m.weight), float(m.optimum)
    (0.75, 0.75)
    """

    a: Tensor
    b: Tensor
    c: Tensor

    def __post_init__(self):
        for name in "abc":
            value = torch.atleast_1d(torch.as_tensor(getattr(self, name), dtype=torch.float64))
            if value.isnan().any():
                raise ValueError(f"moment {name} is NaN for client {int(value.isnan().nonzero()[0, 0])}")
            if name != "c" and (value < 0).any():
                raise ValueError(f"moment {name} is negative for client {int((value < 0).nonzero()[0, 0])}")
            object.__setattr__(self, name, value)

    @property
    def weight(self) -> Tensor:
        """``(b - c) / (a + b - 2c)`` in [0, 1], the minimiser of ``bound`` there."""
        total, denominator = self.a + self.b, self.a + self.b - 2 * self.c
        level = ~(denominator > 1e-12 * total)
        better = torch.where((self.b - self.a).abs() > 1e-9 * total, 0.5 + 0.5 * (self.b - self.a).sign(), 0.5)
        inner = torch.where(level, better, (self.b - self.c) / torch.where(level, 1.0, denominator))
        lost_a, lost_b = self.a.isinf(), self.b.isinf()
        inner = torch.where(lost_a | lost_b, 0.5 + 0.5 * lost_b.double() - 0.5 * lost_a.double(), inner)
        return inner.clamp(0, 1)

    def bound(self, weight: Tensor | float) -> Tensor:
        """``w² a + (1-w)² b + 2 w (1-w) c``: twice the loss bound in units of the smoothness β."""
        weight = torch.as_tensor(weight, dtype=torch.float64)
        parts = (weight**2, self.a), ((1 - weight) ** 2, self.b), (2 * weight * (1 - weight), self.c)
        return sum(torch.where(factor == 0, 0.0, factor * moment) for factor, moment in parts)

    @property
    def optimum(self) -> Tensor:
        """The bound at ``weight``; ``(ab - c²)/(a + b - 2c)`` inside [0, 1]; never above ``min(a, b)`` for moments
        that exist (``c² <= ab``)."""
        return self.bound(self.weight)


def combination_weights(moments: Tensor, *, nonnegative: bool = False) -> Tensor:
    """The weights ``(..., K)``, adding up to 1, that minimise ``wᵀ M w`` for moment matrices ``(..., K, K)``.

    ``w = M⁻¹1 / (1ᵀM⁻¹1)``; for K = 2 this is the closed form above without its clipping. ``nonnegative`` searches the
    best face of the simplex (all 2^K of them: K is small). Raises ``ValueError`` for a singular or non-finite ``M``.
    """
    moments = torch.as_tensor(moments, dtype=torch.float64)
    if not moments.isfinite().all():
        raise ValueError("the moment matrix has entries that are not finite")
    k = moments.shape[-1]
    try:
        if not nonnegative:
            inverse = torch.linalg.solve(moments, torch.ones(*moments.shape[:-1], 1, dtype=torch.float64))
            return (inverse / inverse.sum(-2, keepdim=True)).squeeze(-1)
        best = torch.full(moments.shape[:-1], torch.nan, dtype=torch.float64)
        least = torch.full(moments.shape[:-2], torch.inf, dtype=torch.float64)
        for size in range(1, k + 1):
            for face in combinations(range(k), size):
                rows = list(face)
                weights = torch.zeros(moments.shape[:-1], dtype=torch.float64)
                weights[..., rows] = combination_weights(moments[..., rows, :][..., rows])
                value = torch.einsum("...i,...ij,...j->...", weights, moments, weights)
                better = (weights >= 0).all(-1) & (value < least)
                best, least = torch.where(better.unsqueeze(-1), weights, best), torch.where(better, value, least)
        return best
    except torch.linalg.LinAlgError as error:
        raise ValueError("the moment matrix is singular: two of the models have the same error") from error


def _group_sum(values: Tensor, groups: Tensor | None) -> Tensor:
    """Coordinates ``(C, P)`` summed to ``(C,)``, or to ``(C, G)`` with ``groups`` ``(P,)`` of numbers below G."""
    if groups is None:
        return values.sum(1)
    return values.new_zeros(len(values), int(groups.max()) + 1).index_add(1, groups, values)


def _diagonals(g_f: Tensor, g_l: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonal Fishers of both models and the correlation of their gradients about zero, ``(C, P)`` float64 each."""
    g_f, g_l, n = g_f.double(), g_l.double(), sizes.to(g_f.device).double().unsqueeze(1)
    f_f, f_l, cross = ((one * two).sum(1) / n for one, two in ((g_f, g_f), (g_l, g_l), (g_f, g_l)))
    return f_f, f_l, cross / (f_f * f_l).sqrt().clamp_min(TINY)


def fisher_moments(
    g_f: Tensor,
    g_l: Tensor,
    sizes: Tensor,
    *,
    damping: float = 0.1,
    relative: bool = True,
    clip: tuple[float, float] = (0.0, 1.0),
    groups: Tensor | None = None,
) -> Moments:
    """Our reading of the paper's estimator, from per-sample gradients of both models ``(C, N, P)``.

    ``Σ_F = 1 / (F_F + δ)``, ``Σ_L = 1 / (F_L + δ)`` coordinate by coordinate, ``Σ_FL = ρ sqrt(Σ_F Σ_L)`` with ``ρ``
    the correlation of the gradients clipped to ``clip``; ``a``, ``b``, ``c`` are their sums. ``δ`` is ``damping``
    times the mean of both Fishers, or ``damping`` itself with ``relative=False``. The paper's own damping and clipping
    are not known to us.
    """
    f_f, f_l, rho = _diagonals(g_f, g_l, sizes)
    scale = (f_f + f_l).mean(1, keepdim=True) / 2 if relative else torch.ones_like(f_f[:, :1])
    delta = (damping * scale).clamp_min(1e-30)
    return _diagonal_moments(1 / (f_f + delta), 1 / (f_l + delta), rho.clamp(*clip), groups)


def laplace_moments(
    g_f: Tensor,
    g_l: Tensor,
    sizes: Tensor,
    *,
    examples: tuple[Tensor, Tensor],
    prior: float = 1.0,
    clip: tuple[float, float] = (0.0, 1.0),
    groups: Tensor | None = None,
) -> Moments:
    """Laplace style: ``Σ = 1 / (n F + δ)``, with the ``examples`` (federated, local) ``(C,)`` that each model was
    trained on and the precision ``prior`` of a Gaussian prior, so that flat directions count by the prior alone."""
    f_f, f_l, rho = _diagonals(g_f, g_l, sizes)
    var_f, var_l = (1 / (n.to(f).unsqueeze(1) * f + prior) for n, f in zip(examples, (f_f, f_l)))
    return _diagonal_moments(var_f, var_l, rho.clamp(*clip), groups)


def _diagonal_moments(var_f: Tensor, var_l: Tensor, rho: Tensor, groups: Tensor | None) -> Moments:
    parts = var_f, var_l, rho * (var_f * var_l).sqrt()
    return Moments(*(_group_sum(part, groups).cpu() for part in parts))


def gradient_moments(
    g_f: Tensor,
    g_l: Tensor,
    sizes: Tensor,
    *,
    unbiased: bool = False,
    damping: float | None = None,
    cross_fit: bool = False,
    groups: Tensor | None = None,
) -> Moments:
    """Moments from mean gradients: near the optimum ``ḡ(θ) ≈ H (θ - θ*)``, bias included.

    With ``damping=None``, ``H ∝ I``: ``a = |ḡ_F|²``, ``b = |ḡ_L|²``, ``c = ḡ_F · ḡ_L``, and the merge has the smallest
    mixed gradient, the two-task min-norm point of MGDA (Désidéri, 2012). With a ``damping``, the metric is ``H⁻¹``,
    ``H = F + damping * mean(F) * I`` with the full empirical Fisher of both models' gradients, inverted in the space
    the gradients span (Woodbury). ``unbiased`` leaves the pairs of a sample with itself out of ``|Σ g_i|²`` (a
    U-statistic), which takes the noise of the mean gradient out of the moments; negative ``a`` or ``b`` become 0.
    ``cross_fit``: every second sample gives the metric in which the products of the others are taken, and the other
    way round, always without the pairs of a sample with itself.
    """
    if cross_fit and damping is None:
        raise ValueError("there is no metric to cross-fit with damping=None")
    if groups is not None:
        if damping is not None:
            raise ValueError("the metric couples the groups: use damping=None with groups")
        parts = [gradient_moments(g_f[..., groups == k], g_l[..., groups == k], sizes, unbiased=unbiased)
                 for k in range(int(groups.max()) + 1)]  # fmt: skip
        return Moments(*(torch.stack([getattr(part, name) for part in parts], dim=1) for name in "abc"))
    both = torch.cat([g_f, g_l], dim=1).double()
    gram = both @ both.mT  # (C, 2N, 2N)
    if cross_fit:
        return _cross_fitted(gram, sizes, damping, both.shape[2])
    if damping is not None:
        count = 2 * sizes.to(gram).view(-1, 1, 1)
        ridge = damping * gram.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1) / both.shape[2]  # count * mean(F)
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        gram = count * torch.linalg.solve(gram + ridge.clamp_min(1e-30) * eye, gram)
    n = sizes.to(gram)
    half = g_f.shape[1]
    blocks = gram[:, :half, :half], gram[:, half:, half:], gram[:, :half, half:]
    if unbiased:
        pairs = (n * (n - 1)).clamp_min(1)
        a, b, c = (_off_diagonal_sum(block) / pairs for block in blocks)
    else:
        a, b, c = (block.sum((1, 2)) / n**2 for block in blocks)
    return Moments(a.clamp_min(0).cpu(), b.clamp_min(0).cpu(), c.cpu())


def _off_diagonal_sum(block: Tensor) -> Tensor:
    """The sum over the pairs of two different samples, ``(C, N, N)`` to ``(C,)``."""
    return block.sum((1, 2)) - block.diagonal(dim1=1, dim2=2).sum(1)


def _cross_fitted(gram: Tensor, sizes: Tensor, damping: float, coordinates: int) -> Moments:
    """``gradient_moments`` from the Gram matrix ``(C, 2N, 2N)`` of both models' gradients, in two folds of samples.

    With ``G_S`` the fold S of ``count`` gradients, ``H = G_Sᵀ G_S / count + δ I`` and, by Woodbury,
    ``g_iᵀ H⁻¹ g_j = (g_i · g_j - g_iᵀ G_Sᵀ (count δ I + G_S G_Sᵀ)⁻¹ G_S g_j) / δ``.
    """
    half = gram.shape[1] // 2
    fold_of, totals, pairs = torch.arange(2 * half) % half % 2, 0.0, 0.0
    for fold in (0, 1):
        inside, other = torch.where(fold_of == fold)[0], torch.where(fold_of != fold)[0]
        taken, given = ((sizes + 1 - k) // 2 for k in (fold, 1 - fold))  # real samples of the fold and of the other
        cross, metric = gram[:, inside][:, :, other], gram[:, other][:, :, other]
        trace = metric.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)
        ridge = (damping * trace / coordinates).clamp_min(1e-30)  # count * δ
        eye = torch.eye(len(other), dtype=gram.dtype, device=gram.device)
        rest = gram[:, inside][:, :, inside] - cross @ torch.linalg.solve(metric + ridge * eye, cross.mT)
        inverse = 2 * given.to(gram).view(-1, 1, 1) / ridge * rest
        n, middle = (taken * (taken - 1) * (given > 0)).to(gram), len(inside) // 2
        blocks = inverse[:, :middle, :middle], inverse[:, middle:, middle:], inverse[:, :middle, middle:]
        sums = torch.stack([_off_diagonal_sum(block) for block in blocks])
        totals, pairs = totals + torch.where(n > 0, sums, 0.0), pairs + n
    a, b, c = totals / pairs.clamp_min(1)
    return Moments(a.clamp_min(0).cpu(), b.clamp_min(0).cpu(), c.cpu())


def moments_from_slopes(at_local: Tensor, curvature: Tensor) -> Moments:
    """Moments ``(C,)`` from the loss along the segment: its slope at the local model and its curvature.

    The loss is β/2 times the bound, so its slope at ``w = 0`` is ``-(b - c)`` and its curvature ``a + b - 2c`` in
    units of β. Only these two are observed; ``c`` is the smallest ``c >= 0`` that ``a, b >= 0`` allows.
    """
    gain, total = -at_local.double().cpu(), curvature.double().cpu().clamp_min(0)
    c = torch.stack([torch.zeros_like(gain), -gain, gain - total]).amax(0)
    return Moments((total - gain + c).clamp_min(0), (gain + c).clamp_min(0), c)


def shrinkage_moments(variance: Tensor, distance: Tensor) -> Moments:
    """Positive-part James–Stein: shrink the local model towards the federated one by ``variance / distance``.

    ``distance = |θ_F - θ_L|²`` estimates ``a + b - 2c``; with small ``c``, ``b`` is the local model's ``variance``
    ``(C,)`` in the same metric.
    """
    variance, distance = variance.double().cpu(), distance.double().cpu()
    return Moments((distance - variance).clamp_min(0), variance.clamp_min(0), torch.zeros_like(variance))


def parabola_moments(weights: Tensor, loss: Tensor) -> Moments:
    """Moments from the least-squares parabola through the loss ``(C, W)`` at the weights ``(W,)``, W ≥ 3."""
    design = torch.stack([weights**0, weights, weights**2], dim=1).double().cpu()
    _, slope, half = torch.linalg.lstsq(design, loss.double().cpu().mT).solution  # three (C,)
    slope = torch.where(half > 0, slope, slope + half)  # one that opens downwards: its lower end, by the chord
    return moments_from_slopes(slope, 2 * half.clamp_min(0))


def _within_variance(slopes: np.ndarray, n: np.ndarray) -> float:
    """The variance of a sample's slope ``(C, N)`` about its client's mean, pooled; padding is zero."""
    real = np.arange(slopes.shape[1])[None] < n[:, None]
    excess = (slopes - slopes.sum(1, keepdims=True) / n[:, None]) * real
    return float((excess**2).sum() / max((n - 1).sum(), 1))


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
    variance = _within_variance(slopes, n)
    if curvature <= 0:
        step, share, tau2 = 0.0 * slope, 0.0 * slope, 0.0
    else:
        step, sampling = -slope / curvature, variance / (n * curvature**2)
        tau2 = max(float((step**2 - sampling).mean()), 0.0) if spread is None else spread**2
        share = tau2 / np.maximum(tau2 + sampling, TINY)
    details = {
        "centre": torch.from_numpy(centre),
        "spread": torch.tensor(tau2**0.5),
        "share": torch.from_numpy(share),
    }
    return torch.from_numpy(np.clip(centre + share * step, 0, 1)), details


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
    variance = _within_variance(slopes, n)
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
    variance = _within_variance(slopes.numpy(), sizes.cpu().numpy().astype(float))
    sampling = variance / (total * curvature**2) if curvature > 0 else torch.inf
    share = spread**2 / (spread**2 + sampling)
    offset = -share * float(slopes.sum()) / total / curvature if share > 0 else 0.0
    details = {"offset": torch.tensor(min(max(offset, -2 * probe), 2 * probe)), "offset_share": torch.tensor(share)}
    return details["offset"], details
