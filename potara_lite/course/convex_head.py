"""A linear head on frozen features with a ridge: a convex network, whose optimum is one point that can be computed.

Everything is computed for many problems at once (clients, repetitions): inputs ``(C, N, D)``, labels ``(C, N)``, heads
``(C, D, K)``, in float64. The loss is the mean cross-entropy in nats plus ``ridge / 2`` times the squared entries of
the head. It has one minimiser, and its Hessian is known in closed form.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..checks import NonNegative, Numbers, Positive, Seed, Size, checked

Inputs = Annotated[Tensor, Numbers("C N D")]
Labels = Annotated[Tensor, Numbers("C N", whole=True, least=0)]


@checked
def head_inputs(features: Inputs) -> Tensor:
    """Features ``(C, N, D)`` with mean 0 and standard deviation 1 over all clients' examples, and a one for the bias.

    Returns ``(C, N, D + 1)``, float64. A feature that never changes becomes 0.
    """
    flat = features.double().flatten(0, 1)
    scaled = (features.double() - flat.mean(0)) / flat.std(0).clamp_min(1e-12)
    return torch.cat([scaled, torch.ones_like(scaled[..., :1])], dim=-1)


@checked
def draw_sample(x: Inputs, y: Labels, size: Size, seed: Seed) -> tuple[Tensor, Tensor]:
    """``size`` examples of every client, drawn without replacement: ``(C, size, D)`` and ``(C, size)``.

    Raises ``ValueError`` when a client has fewer.
    """
    clients, examples = y.shape
    if size > examples:
        raise ValueError(f"size: cannot draw {size} of a client's {examples} examples without replacement")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([torch.randperm(examples, generator=generator)[:size] for _ in range(clients)])
    return x[torch.arange(clients).unsqueeze(1), rows], y.long().gather(1, rows)


def head_loss(heads: Tensor, x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Each problem's mean cross-entropy plus ``ridge / 2`` times the head's squared entries, ``(C,)`` nats."""
    loss = cross_entropy((x @ heads).transpose(-1, -2), y.expand(len(heads), -1), reduction="none").mean(-1)
    return loss + ridge / 2 * heads.square().sum((-1, -2))


@checked
def fit_heads(x: Inputs, y: Labels, classes: Size, ridge: Positive, tolerance: Positive = 1e-6) -> Tensor:
    """The heads ``(C, D, classes)`` that minimise ``head_loss``: L-BFGS on the sum of the independent problems.

    No entry of the gradient is larger than ``tolerance`` at the end. Raises ``ValueError`` for a ridge that is not
    positive (the minimiser may then lie at infinity) or when the tolerance is not reached.
    """
    if (most := int(y.max())) >= classes:
        raise ValueError(f"classes must be more than the label {most}, not {classes}")
    y = y.long()
    heads = torch.zeros(len(x), x.shape[-1], classes, dtype=torch.float64, requires_grad=True)
    stop = dict(max_iter=1000, tolerance_grad=tolerance, tolerance_change=0)
    search = torch.optim.LBFGS([heads], history_size=30, line_search_fn="strong_wolfe", **stop)

    def closure() -> Tensor:
        search.zero_grad()
        total = head_loss(heads, x, y, ridge).sum()
        total.backward()
        return total

    search.step(closure)
    closure()
    if (largest := float(heads.grad.abs().max())) > tolerance:
        raise ValueError(f"not converged: an entry of the gradient is {largest:.1e}, above {tolerance:.1e}")
    return heads.detach()


def head_product(u: Tensor, v: Tensor, heads: Tensor, x: Tensor, ridge: float) -> Tensor:
    """``uᵀ H v`` of each problem ``(C,)``, with ``H`` the Hessian of ``head_loss`` at ``heads``; no matrix is formed.

    With logits ``z = x @ heads`` and ``p = softmax(z)``, an example's Hessian in ``z`` is ``diag(p) - p pᵀ``, and the
    logits are linear in the head, so this is exact. ``u`` and ``v`` ``(..., C, D, K)`` may have leading dimensions,
    such as repetitions.
    """
    p = (x @ heads).softmax(-1)  # (..., C, N, K)
    a, b = x @ u, x @ v
    within = (p * a * b).sum(-1) - (p * a).sum(-1) * (p * b).sum(-1)  # (..., C, N)
    return within.mean(-1) + ridge * (u * v).sum((-1, -2))


@checked
def head_smoothness(x: Inputs, ridge: NonNegative) -> Tensor:
    """A curvature ``(C,)`` that no direction exceeds anywhere: ``λ_max(xᵀx / N) / 2 + ridge``.

    ``diag(p) - p pᵀ`` has no eigenvalue above ½ for any ``p`` (Böhning, 1992).
    """
    return torch.linalg.eigvalsh(x.mT @ x / x.shape[-2])[..., -1] / 2 + ridge
