"""Our reading of the paper's estimator: inverse diagonal Fisher at each model, correlated by the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, door, groups_of, interval, select_clients, sizes_of
from ..checks import unchecked
from ..federation.split import Split
from ..training.gradients import delta_gradients, per_sample_gradients
from .curve import client_logits
from .estimate import Estimate, Grouping, from_moments, group_coordinates, group_sum
from .moments import Moments

TINY = torch.finfo(torch.float64).tiny


@door(sizes=sizes_of("g_f", 1), clip=interval, groups=groups_of("g_f"))
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
    f_f, f_l, rho = unchecked(fisher_diagonals)(g_f, g_l, sizes)
    scale = (f_f + f_l).mean(1, keepdim=True) / 2 if relative else torch.ones_like(f_f[:, :1])
    delta = (damping * scale).clamp_min(1e-30)
    return diagonal_moments(1 / (f_f + delta), 1 / (f_l + delta), rho.clamp(*clip), groups)


@door(sizes=sizes_of("g_f", 1))
def fisher_diagonals(g_f: Tensor, g_l: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonal Fishers of both models and the correlation of their gradients about zero, ``(C, P)`` float64 each."""
    g_f, g_l, n = g_f.double(), g_l.double(), sizes.to(g_f.device).double().unsqueeze(1)
    f_f, f_l, cross = ((one * two).sum(1) / n for one, two in ((g_f, g_f), (g_l, g_l), (g_f, g_l)))
    return f_f, f_l, cross / (f_f * f_l).sqrt().clamp_min(TINY)


def diagonal_moments(var_f: Tensor, var_l: Tensor, rho: Tensor, groups: Tensor | None) -> Moments:
    """Sums over the coordinates of two variances ``(C, P)`` and of their covariance at the correlation ``rho``."""
    parts = var_f, var_l, rho * (var_f * var_l).sqrt()
    return Moments(*(group_sum(part, groups).cpu() for part in parts))


@door(clip=interval)
def estimate_paper(
    adapted: AdaptedBackbone,
    federated: Adapter,
    local: Adapter,
    split: Split,
    *,
    damping: float = 0.1,
    relative: bool = True,
    clip: tuple[float, float] = (0.0, 1.0),
    sample_labels: int | None = None,
    on_delta: bool = False,
    by: Grouping | None = None,
) -> Estimate:
    """Our reading of the paper's estimator: inverse empirical diagonal Fisher, correlated by the gradients.

    Equations and options: ``fisher_moments``. The coordinates are the adapter's tensors (factors and head), or
    with ``on_delta`` the entries of the deltas, whose Fisher stays when (B, A) becomes (B M, M⁻¹ A). Those are many:
    one client at a time is held in memory. ``sample_labels``: a seed; the labels are then drawn from each model (the
    Fisher proper) instead of the data's. Assumes that a model's errors are independent over coordinates and about as
    large as the inverse Fisher says, with no bias. Cost: 2 gradients per sample.
    """
    options = dict(damping=damping, relative=relative, clip=clip, groups=group_coordinates(local, by, on_delta)[1])
    labels = _labels(adapted, (federated, local), split, sample_labels)
    if not on_delta:
        gradients = unchecked(per_sample_gradients)
        g_f, g_l = (gradients(adapted, m, split, labels=y) for m, y in zip((federated, local), labels))
        return from_moments(unchecked(fisher_moments)(g_f, g_l, split.sizes, **options), local, by)
    clients = []
    for rows in (slice(i, i + 1) for i in range(len(split))):
        part, stacks = split.rows(rows), (select_clients(stack, rows) for stack in (federated, local))
        g_f, g_l = (unchecked(delta_gradients)(adapted, one, part, labels=y[rows]) for one, y in zip(stacks, labels))
        clients.append(unchecked(fisher_moments)(g_f, g_l, part.sizes, **options))
    moments = Moments(*(torch.cat([getattr(one, name) for one in clients]) for name in "abc"))
    return from_moments(moments, local, by)


def _labels(adapted: AdaptedBackbone, stacks: tuple[Adapter, Adapter], split: Split, seed: int | None) -> list[Tensor]:
    """The labels under which each model's gradients are taken: the data's, or drawn from the model."""
    if seed is None:
        return [split.y, split.y]
    generator, result = torch.Generator().manual_seed(seed), []
    for stack in stacks:
        p = client_logits(adapted, stack, split).softmax(-1).cpu()
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(split.y.shape).to(split.y.device)
        result.append(torch.where(split.y < 0, split.y, drawn))
    return result
