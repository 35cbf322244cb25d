"""Our reading of the paper's estimator: inverse diagonal Fisher at each model, correlated by the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, Stack, check_models, select_clients
from ..checks import Flag, NonNegative, Seed, checked
from ..federation.split import Split
from ..training.gradients import delta_gradients, per_sample_gradients
from .curve import client_logits
from .estimate import (
    Estimate,
    Gradients,
    Grouping,
    Groups,
    Interval,
    Sizes,
    from_moments,
    group_coordinates,
    group_sum,
    moments_by_groups,
)
from .moments import Moments

TINY = torch.finfo(torch.float64).tiny


@checked
def fisher_moments(
    g_f: Gradients,
    g_l: Gradients,
    sizes: Sizes,
    *,
    damping: NonNegative = 0.1,
    relative: Flag = True,
    clip: Interval = (0.0, 1.0),
    groups: Groups | None = None,
) -> Moments:
    """Our reading of the paper's estimator, from per-sample gradients of both models ``(C, N, P)``.

    ``Σ_F = 1 / (F_F + δ)``, ``Σ_L = 1 / (F_L + δ)`` coordinate by coordinate, ``Σ_FL = ρ sqrt(Σ_F Σ_L)`` with ``ρ``
    the correlation of the gradients clipped to ``clip``; ``a``, ``b``, ``c`` are their sums. ``δ`` is ``damping``
    times the mean of both Fishers, or ``damping`` itself with ``relative=False``. The paper's own damping and clipping
    are not known to us.
    """
    f_f, f_l, rho = fisher_diagonals(g_f, g_l, sizes)
    scale = (f_f + f_l).mean(1, keepdim=True) / 2 if relative else torch.ones_like(f_f[:, :1])
    delta = (damping * scale).clamp_min(1e-30)
    return diagonal_moments(1 / (f_f + delta), 1 / (f_l + delta), rho.clamp(*clip), groups)


@checked
def fisher_diagonals(g_f: Gradients, g_l: Gradients, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonal Fishers of both models and the correlation of their gradients about zero, ``(C, P)`` float64 each."""
    g_f, g_l = g_f.double(), g_l.double()
    n = sizes.to(g_f.device).double().unsqueeze(1)
    f_f, f_l, cross = ((one * two).sum(1) / n for one, two in ((g_f, g_f), (g_l, g_l), (g_f, g_l)))
    return f_f, f_l, cross / (f_f * f_l).sqrt().clamp_min(TINY)


def diagonal_moments(var_f: Tensor, var_l: Tensor, rho: Tensor, groups: Tensor | None) -> Moments:
    """Sums over the coordinates of two variances ``(C, P)`` and of their covariance at the correlation ``rho``."""
    covariance = rho * (var_f * var_l).sqrt()
    return Moments(*(group_sum(part, groups).cpu() for part in (var_f, var_l, covariance)))


@checked
def estimate_paper(
    adapted: AdaptedBackbone,
    federated: Stack,
    local: Stack,
    split: Split,
    *,
    damping: NonNegative = 0.1,
    relative: Flag = True,
    clip: Interval = (0.0, 1.0),
    sample_labels: Seed | None = None,
    on_delta: Flag = False,
    by: Grouping | None = None,
) -> Estimate:
    """Our reading of the paper's estimator: inverse empirical diagonal Fisher, correlated by the gradients.

    Equations and options: ``fisher_moments``. The coordinates are the adapter's tensors (factors and head), or
    with ``on_delta`` the entries of the deltas, whose Fisher stays when (B, A) becomes (B M, M⁻¹ A). Those are many:
    one client at a time is held in memory. ``sample_labels``: a seed; the labels are then drawn from each model (the
    Fisher proper) instead of the data's. Assumes that a model's errors are independent over coordinates and about as
    large as the inverse Fisher says, with no bias. Cost: 2 gradients per sample.
    """
    federated, local = check_models(adapted, split, federated=federated, local=local)
    _, groups = group_coordinates(local, by, on_delta)
    options: dict[str, Any] = dict(damping=damping, relative=relative, clip=clip, groups=groups)
    models = federated, local
    splits = [split, split] if sample_labels is None else _with_drawn_labels(adapted, models, split, sample_labels)
    gradients = delta_gradients if on_delta else per_sample_gradients

    def moments_of(rows: Tensor) -> Moments:
        parts = [(select_clients(model, rows), one.rows(rows.tolist())) for model, one in zip(models, splits)]
        g_f, g_l = (gradients(adapted, stack, part) for stack, part in parts)
        return fisher_moments(g_f, g_l, split.sizes[rows], **options)

    one_by_one = [[row] for row in range(len(split))]
    return from_moments(moments_by_groups(moments_of, one_by_one if on_delta else split.alike()), local, by)


def _with_drawn_labels(
    adapted: AdaptedBackbone, models: tuple[Adapter, Adapter], split: Split, seed: int
) -> list[Split]:
    """The split with the labels under which each model's gradients are taken, drawn from that model."""
    if not adapted.task.has_classes:
        raise ValueError(f"sample_labels draws classes: {adapted.task.name} has none")
    generator = torch.Generator().manual_seed(seed)
    y = split.y
    result = []
    for model in models:
        p = client_logits(adapted, model, split).softmax(-1).cpu()
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(y.shape).to(y.device)
        result.append(split.with_labels(torch.where(y < 0, y, drawn)))
    return result
