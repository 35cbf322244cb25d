"""From moments to the mixing weight: the closed form, its bound, and estimators of the moments.

With the errors ``e_F`` and ``e_L`` of the two models about the client's own optimum, ``a = E|e_F|²``, ``b = E|e_L|²``
and ``c = E[e_F · e_L]``, the merged model's expected squared error is ``w² a + (1-w)² b + 2 w (1-w) c``. The paper's
variance-trace bound on the expected loss is β/2 times this; its minimiser is ``w = (b - c) / (a + b - 2c)``, the
combination of forecasts of Bates & Granger (1969). The weight is on the federated model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .adapters import AdaptedBackbone, Adapter
from .connectivity import along_segment, grid
from .data import Split
from .fisher import diagonal_fisher, per_sample_gradients

__all__ = ["Estimate", "Moments", "estimate_curve", "estimate_fisher", "estimate_uniform"]


@dataclass(frozen=True)
class Moments:
    """The second moments ``a`` (federated), ``b`` (local) and ``c`` (cross) of each client, float64 ``(C,)``.

    Degenerate cases have a stated answer. ``weight`` is clipped to [0, 1] (``c > min(a, b)``: the better model
    alone). Where the two errors cannot be told apart, ``a + b - 2c <= 1e-12 (a + b)``, it is ½. An infinite ``a``
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
                raise ValueError(f"moment {name} is NaN for client {int(value.isnan().nonzero()[0])}")
            if name != "c" and (value < 0).any():
                raise ValueError(f"moment {name} is negative for client {int((value < 0).nonzero()[0])}")
            object.__setattr__(self, name, value)

    @property
    def weight(self) -> Tensor:
        """``(b - c) / (a + b - 2c)`` in [0, 1], the minimiser of ``bound`` there, ``(C,)``."""
        denominator = self.a + self.b - 2 * self.c
        level = ~(denominator > 1e-12 * (self.a + self.b))
        inner = torch.where(level, 0.5, (self.b - self.c) / torch.where(level, 1.0, denominator))
        lost_a, lost_b = self.a.isinf(), self.b.isinf()
        inner = torch.where(lost_a | lost_b, 0.5 + 0.5 * lost_b.double() - 0.5 * lost_a.double(), inner)
        return inner.clamp(0, 1)

    def bound(self, weight: Tensor | float) -> Tensor:
        """``w² a + (1-w)² b + 2 w (1-w) c``: twice the loss bound in units of the smoothness β, ``(C,)``."""
        weight = torch.as_tensor(weight, dtype=torch.float64)
        parts = (weight**2, self.a), ((1 - weight) ** 2, self.b), (2 * weight * (1 - weight), self.c)
        return sum(torch.where(factor == 0, 0.0, factor * moment) for factor, moment in parts)

    @property
    def optimum(self) -> Tensor:
        """The bound at ``weight``; ``(ab - c²)/(a + b - 2c)`` inside [0, 1], and never above ``min(a, b)``."""
        return self.bound(self.weight)


@dataclass(frozen=True)
class Estimate:
    """A mixing weight per client ``(C,)``, the moments it comes from where there are any, and diagnostics."""

    weight: Tensor
    moments: Moments | None = None
    details: dict[str, Tensor] = field(default_factory=dict)


def estimate_uniform(adapted: AdaptedBackbone, federated: Adapter, local: Adapter, split: Split) -> Estimate:
    """Weight ½ for every client: hard to beat when moments are badly estimated."""
    return Estimate(torch.full((len(split),), 0.5, dtype=torch.float64))


def estimate_fisher(
    adapted: AdaptedBackbone,
    federated: Adapter,
    local: Adapter,
    split: Split,
    *,
    damping: float = 0.1,
    relative: bool = True,
    clip: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """Our reading of the paper's estimator: inverse empirical diagonal Fisher, correlated by the gradients.

    ``Σ_F = 1 / (F_F + δ)`` and ``Σ_L = 1 / (F_L + δ)`` coordinate by coordinate over the adapter's tensors,
    ``Σ_FL = ρ sqrt(Σ_F Σ_L)`` with ``ρ`` the correlation (about zero) of the two models' per-sample gradients clipped
    to ``clip``; ``a``, ``b``, ``c`` are their sums. ``δ`` is ``damping`` times the mean of both Fishers, or
    ``damping`` itself with ``relative=False``. Damping and clipping are not known from the paper.

    Cost: two gradients per sample.
    """
    g_f = per_sample_gradients(adapted, federated, split)
    g_l = per_sample_gradients(adapted, local, split)
    f_f, f_l = diagonal_fisher(g_f, split.sizes).double(), diagonal_fisher(g_l, split.sizes).double()
    scale = (f_f.mean(1, keepdim=True) + f_l.mean(1, keepdim=True)) / 2 if relative else torch.ones_like(f_f[:, :1])
    delta = (damping * scale).clamp_min(torch.finfo(torch.float32).tiny)
    cross = (g_f * g_l).sum(1).double() / split.sizes.to(f_f).unsqueeze(1)
    rho = cross / (f_f * f_l).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    var_f, var_l = 1 / (f_f + delta), 1 / (f_l + delta)
    covariance = rho.clamp(*clip) * (var_f * var_l).sqrt()
    moments = Moments(var_f.sum(1).cpu(), var_l.sum(1).cpu(), covariance.sum(1).cpu())
    return Estimate(moments.weight, moments, {"correlation": rho.mean(1).cpu()})


def estimate_curve(
    adapted: AdaptedBackbone, federated: Adapter, local: Adapter, split: Split, *, points: int = 9
) -> Estimate:
    """The grid weight with the smallest mean loss on the client's own calibration samples.

    Give it samples that trained neither model. Cost: ``points`` forward passes per sample, no gradient.
    """
    weights = grid(points)
    loss, _ = along_segment(adapted, federated, local, split, weights)
    return Estimate(weights.double()[loss.argmin(1).cpu()], None, {"weights": weights, "loss": loss.cpu()})
