"""Estimators that only the benchmark of estimators (``benchmarks/suite.py``) uses, in three sections.

Laplace: the inverse Fisher of the paper's estimator, with the number of training examples and a prior. Gradient: the
mean gradient at each model is its error times the curvature, so its length tells the bias, too. James–Stein: the local
model is shrunk towards the federated one by its variance over their distance.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Stack, check_models, select_clients
from ..checks import Flag, NonNegative, Numbers, checked
from ..federation.split import Split
from ..training.gradients import directional_derivatives, per_sample_gradients
from .estimate import (
    Estimate,
    Gradients,
    Grouping,
    Groups,
    Interval,
    Sizes,
    TrainSizes,
    Two,
    from_moments,
    group_coordinates,
    moments_by_groups,
)
from .gauss_newton import example_mean, segment_of
from .moments import Moments
from .paper import diagonal_moments, fisher_diagonals


def _check_train_sizes(train_sizes: Tensor, split: Split) -> None:
    if len(train_sizes) != len(split):
        raise ValueError(f"train_sizes: {len(train_sizes)} of them for {len(split)} clients")


def _gradients_of(rows: Tensor, adapted: AdaptedBackbone, federated: Stack, local: Stack, split: Split) -> list[Tensor]:
    """The per-sample gradients ``(K, N, P)`` of both models of the clients in these rows."""
    part = split.rows(rows.tolist())
    return [per_sample_gradients(adapted, select_clients(stack, rows), part) for stack in (federated, local)]


# Laplace.


@checked
def laplace_moments(
    g_f: Gradients,
    g_l: Gradients,
    sizes: Sizes,
    *,
    examples: Two[TrainSizes],
    prior: NonNegative = 1.0,
    clip: Interval = (0.0, 1.0),
    groups: Groups | None = None,
) -> Moments:
    """Laplace style: ``Σ = 1 / (n F + δ)``, with the ``examples`` (federated, local) ``(C,)`` that each model was
    trained on and the precision ``prior`` of a Gaussian prior, so that flat directions count by the prior alone."""
    f_f, f_l, rho = fisher_diagonals(g_f, g_l, sizes)
    var_f, var_l = (1 / (n.to(f).unsqueeze(1) * f + prior) for n, f in zip(examples, (f_f, f_l)))
    return diagonal_moments(var_f, var_l, rho.clamp(*clip), groups)


@checked
def estimate_laplace(
    adapted: AdaptedBackbone,
    federated: Stack,
    local: Stack,
    split: Split,
    *,
    train_sizes: TrainSizes,
    prior: NonNegative = 1.0,
    by: Grouping | None = None,
) -> Estimate:
    """Posterior variances in the style of a diagonal Laplace approximation, ``Σ = (n F + δ I)⁻¹``.

    ``train_sizes`` ``(C,)``: what each local model was trained on; the federated one had them all. Equations:
    ``laplace_moments``. Assumes what the Fisher estimator does, but where the data say nothing, the prior decides.
    Cost: 2 gradients per sample.
    """
    federated, local = check_models(adapted, split, federated=federated, local=local)
    _check_train_sizes(train_sizes, split)
    _, groups = group_coordinates(local, by)

    def moments_of(rows: Tensor) -> Moments:
        g_f, g_l = _gradients_of(rows, adapted, federated, local, split)
        examples = train_sizes.sum().expand(len(rows)), train_sizes[rows]
        return laplace_moments(g_f, g_l, split.sizes[rows], examples=examples, prior=prior, groups=groups)

    return from_moments(moments_by_groups(moments_of, split.alike()), local, by)


# Gradient.


@checked
def gradient_moments(
    g_f: Gradients,
    g_l: Gradients,
    sizes: Sizes,
    *,
    unbiased: Flag = False,
    damping: NonNegative | None = None,
    cross_fit: Flag = False,
    groups: Groups | None = None,
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
    if groups is not None and damping is not None:
        raise ValueError("the metric couples the groups: use damping=None with groups")

    def both_models(coordinates: Tensor | slice = slice(None)) -> Tensor:
        return torch.cat([g_f[..., coordinates], g_l[..., coordinates]], dim=1).double()  # (C, 2N, P)

    if groups is None:
        return _gradient_moments(both_models(), sizes, unbiased, damping, cross_fit)
    parts = [_gradient_moments(both_models(groups == k), sizes, unbiased) for k in range(int(groups.max()) + 1)]
    return Moments(*(torch.stack([getattr(part, name) for part in parts], dim=1) for name in "abc"))


def _gradient_moments(
    both: Tensor, sizes: Tensor, unbiased: bool, damping: float | None = None, cross_fit: bool = False
) -> Moments:
    """``gradient_moments`` of one group, from both models' gradients ``(C, 2N, P)``."""
    gram = both @ both.mT  # (C, 2N, 2N)
    if cross_fit:
        return _cross_fitted(gram, sizes, damping, both.shape[2])
    if damping is not None:
        count = 2 * sizes.to(gram).view(-1, 1, 1)
        ridge = damping * _trace(gram) / both.shape[2]  # count * damping * mean(F)
        eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        gram = count * _solved(gram + ridge.clamp_min(1e-30) * eye, gram, damping)
    n = sizes.to(gram)
    if unbiased:
        pairs = (n * (n - 1)).clamp_min(1)
        a, b, c = (_off_diagonal_sum(block) / pairs for block in _blocks(gram))
    else:
        a, b, c = (block.sum((1, 2)) / n**2 for block in _blocks(gram))
    return Moments(a.clamp_min(0).cpu(), b.clamp_min(0).cpu(), c.cpu())


def _blocks(products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the products of both models' samples ``(C, 2N, 2N)``: federated, local, and one with the other."""
    half = products.shape[1] // 2
    return products[:, :half, :half], products[:, half:, half:], products[:, :half, half:]


def _trace(products: Tensor) -> Tensor:
    return products.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)


def _off_diagonal_sum(block: Tensor) -> Tensor:
    """The sum over the pairs of two different samples, ``(C, N, N)`` to ``(C,)``."""
    return block.sum((1, 2)) - block.diagonal(dim1=1, dim2=2).sum(1)


def _solved(metric: Tensor, right: Tensor, damping: float) -> Tensor:
    """``metric⁻¹ right``. Raises ``ValueError`` where the ``damping`` in the metric is too small for it."""
    try:
        return torch.linalg.solve(metric, right)
    except torch.linalg.LinAlgError:
        raise ValueError(f"damping must be larger, not {damping}: the metric has no inverse") from None


def _cross_fitted(gram: Tensor, sizes: Tensor, damping: float, coordinates: int) -> Moments:
    """``gradient_moments`` from the Gram matrix ``(C, 2N, 2N)`` of both models' gradients, in two folds of samples.

    With ``G_S`` the fold S of ``count`` gradients, ``H = G_Sᵀ G_S / count + δ I`` and, by Woodbury,
    ``g_iᵀ H⁻¹ g_j = (g_i · g_j - g_iᵀ G_Sᵀ (count δ I + G_S G_Sᵀ)⁻¹ G_S g_j) / δ``.
    """
    half = gram.shape[1] // 2
    fold_of = torch.arange(2 * half) % half % 2
    totals, pairs = 0.0, 0.0
    for fold in (0, 1):
        inside = torch.where(fold_of == fold)[0]
        other = torch.where(fold_of != fold)[0]
        n_inside, n_other = ((sizes + 1 - k) // 2 for k in (fold, 1 - fold))  # real samples of each model
        cross = gram[:, inside][:, :, other]
        metric = gram[:, other][:, :, other]
        ridge = (damping * _trace(metric) / coordinates).clamp_min(1e-30)  # count * δ
        eye = torch.eye(len(other), dtype=gram.dtype, device=gram.device)
        rest = gram[:, inside][:, :, inside] - cross @ _solved(metric + ridge * eye, cross.mT, damping)
        products = 2 * n_other.to(gram).view(-1, 1, 1) / ridge * rest
        n = (n_inside * (n_inside - 1) * (n_other > 0)).to(gram)
        sums = torch.stack([_off_diagonal_sum(block) for block in _blocks(products)])
        totals, pairs = totals + torch.where(n > 0, sums, 0.0), pairs + n
    a, b, c = totals / pairs.clamp_min(1)
    return Moments(a.clamp_min(0).cpu(), b.clamp_min(0).cpu(), c.cpu())


@checked
def estimate_gradient(
    adapted: AdaptedBackbone,
    federated: Stack,
    local: Stack,
    split: Split,
    *,
    unbiased: Flag = True,
    damping: NonNegative | None = 0.1,
    cross_fit: Flag = False,
    by: Grouping | None = None,
) -> Estimate:
    """Moments from the mean gradients of both models: bias included, in the metric of the inverse Fisher.

    Equations and options: ``gradient_moments``. Assumes that both models are close enough to the client's
    optimum for the gradient to be linear in the error. The metric couples the groups, so ``by`` needs
    ``damping=None``. Cost: 2 gradients per sample.
    """
    federated, local = check_models(adapted, split, federated=federated, local=local)
    _, groups = group_coordinates(local, by)
    options: dict[str, Any] = dict(unbiased=unbiased, damping=damping, cross_fit=cross_fit, groups=groups)

    def moments_of(rows: Tensor) -> Moments:
        g_f, g_l = _gradients_of(rows, adapted, federated, local, split)
        return gradient_moments(g_f, g_l, split.sizes[rows], **options)

    return from_moments(moments_by_groups(moments_of, split.alike()), local, by)


# James–Stein.


@checked
def shrinkage_moments(
    variance: Annotated[Tensor, Numbers("C", least=0)], distance: Annotated[Tensor, Numbers("C")]
) -> Moments:
    """Positive-part James–Stein: shrink the local model towards the federated one by ``variance / distance``.

    ``distance = |θ_F - θ_L|²`` estimates ``a + b - 2c``; with small ``c``, ``b`` is the local model's ``variance``
    ``(C,)`` in the same metric.
    """
    variance, distance = variance.double().cpu(), distance.double().cpu()
    return Moments((distance - variance).clamp_min(0), variance.clamp_min(0), torch.zeros_like(variance))


@checked
def estimate_shrinkage(
    adapted: AdaptedBackbone,
    federated: Stack,
    local: Stack,
    split: Split,
    *,
    train_sizes: TrainSizes,
    damping: NonNegative = 0.1,
) -> Estimate:
    """Positive-part James–Stein shrinkage of the local model towards the federated one, in the metric of the loss.

    The distance is ``Δᵀ H Δ`` by the Gauss–Newton product at the local model. The local model's variance in the same
    metric is ``(d - 2) / n``, with ``n`` its training examples and ``d = tr F (F + δ)⁻¹`` its effective number of
    parameters (MacKay, 1992) on the given samples. Assumes a well-specified, converged local model and small ``c``.
    Cost: 1 gradient and 1 forward-mode product per sample.
    """
    federated, local = check_models(adapted, split, federated=federated, local=local)
    _check_train_sizes(train_sizes, split)
    effective = torch.empty(len(split), dtype=torch.float64)
    for group in split.alike():
        rows = torch.tensor(group)
        gradients = per_sample_gradients(adapted, select_clients(local, rows), split.rows(group)).double()
        gram = gradients @ gradients.mT  # (K, N, N)
        eigenvalues = torch.linalg.eigvalsh(gram).clamp_min(0)
        ridge = (damping * _trace(gram).squeeze(2) / gradients.shape[2]).clamp_min(1e-30)
        effective[rows] = (eigenvalues / (eigenvalues + ridge)).sum(1).cpu()
    start, direction = segment_of(federated, local)
    _, curvature = directional_derivatives(adapted, start, direction, split)
    variance = (effective - 2).clamp_min(0) / train_sizes.to(effective)
    moments = shrinkage_moments(variance, example_mean(curvature, split))
    return Estimate(moments.weight, moments, {"effective": effective})
