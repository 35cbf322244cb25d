"""Estimators of the mixing weight: (backbone, federated stack, local stack, samples) → ``Estimate``.

One signature for all. The samples are a ``Split``; which one is the caller's choice, and it matters: on the samples
that trained it an over-fitted local model has hardly any gradient left and looks perfect. ``calibration`` samples
trained neither model. ``by`` asks for a weight per group of tensors instead of one per client (see ``by_layer``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from scipy.interpolate import CubicSpline
from torch import Tensor
from torch.nn import functional as F

from .adapters import AdaptedBackbone, Adapter, delta, delta_products, flatten, lora_layers
from .batching import each, plan
from .connectivity import grid
from .data import Split
from .fisher import delta_gradients, directional_derivatives, per_sample_gradients
from .grouped import grouped
from .merging import combine, merge_exact
from .mixing import (
    TINY,
    Moments,
    combined_weight,
    fisher_moments,
    gradient_moments,
    laplace_moments,
    moments_from_slopes,
    parabola_moments,
    pooled_offset,
    pooled_weight,
    shrinkage_moments,
)

__all__ = [
    "Estimate",
    "by_layer",
    "estimate_combined",
    "estimate_curve",
    "estimate_ensemble",
    "estimate_fisher",
    "estimate_gauss_newton",
    "estimate_gradient",
    "estimate_laplace",
    "estimate_pooled",
    "estimate_shrinkage",
    "estimate_uniform",
    "head_and_body",
    "segment_losses",
]

Grouping = Callable[[str], str]


@dataclass(frozen=True)
class Estimate:
    """A mixing weight per client ``(C,)``, or with groups a dictionary of them that ``merge_exact`` takes as it is.

    ``moments``: what the weight comes from, where the estimator has moments. ``details``: diagnostics; with groups,
    ``client``, one number per client for tables and pictures, is among them. ``floats``: how many numbers each client
    sends up and gets back for it.
    """

    weight: Tensor | dict[str, Tensor]
    moments: Moments | None = None
    details: dict[str, Tensor] = field(default_factory=dict)
    floats: tuple[int, int] = (0, 0)

    @property
    def client_weight(self) -> Tensor:
        """One weight per client ``(C,)``: the weight itself, or what stands for its groups' weights."""
        return self.details["client"] if isinstance(self.weight, dict) else self.weight


def _module(name: str) -> str:
    for ending in (".lora_A.weight", ".lora_B.weight"):
        name = name.removesuffix(ending)
    return name


def by_layer(name: str) -> str:
    """A group for each adapted layer and each directly trained layer (its weight and bias together)."""
    return _module(name).removesuffix(".weight").removesuffix(".bias")


def head_and_body(name: str) -> str:
    """Two groups: ``body``, the adapted layers, and ``head``, what is trained directly."""
    return "body" if ".lora_" in name else "head"


def _groups(adapters: Adapter, by: Grouping | None, on_delta: bool = False) -> tuple[list[str], Tensor | None]:
    """The labels of the groups, and the group of each coordinate ``(P,)`` of ``flatten(adapters)`` or of the deltas."""
    if by is None:
        return [], None
    labels = sorted({by(name) for name in adapters})
    if split := [name for name in adapters if by(name) != by(name.replace(".lora_A.", ".lora_B."))]:
        raise ValueError(f"both factors of a layer must be in one group: {split[0]!r}")
    if on_delta:
        adapters = delta(adapters, dict.fromkeys(lora_layers(adapters), 1.0))
    parts = [torch.full((tensor[0].numel(),), labels.index(by(name))) for name, tensor in adapters.items()]
    return labels, torch.cat(parts).to(next(iter(adapters.values())).device)


def _estimate(moments: Moments, adapters: Adapter, by: Grouping | None) -> Estimate:
    if by is None:
        return Estimate(moments.weight, moments)
    labels, _ = _groups(adapters, by)
    weight = {_module(name): moments.weight[:, labels.index(by(name))] for name in adapters}
    return Estimate(weight, moments, {"client": moments.weight.mean(1)})


def estimate_uniform(adapted: AdaptedBackbone, federated: Adapter, local: Adapter, split: Split) -> Estimate:
    """Weight ½ for every client: hard to beat when moments are badly estimated. Costs nothing."""
    return Estimate(torch.full((len(split),), 0.5, dtype=torch.float64))


@torch.no_grad()
def _logits(adapted: AdaptedBackbone, adapters: Adapter, split: Split) -> Tensor:
    """Every client's logits on its own examples, ``(C, N, classes)``."""
    at_once, chunks = plan(
        adapted, adapted, adapters, split.x, batch_size=split.y.shape[1], backward=False, known="logits in None"
    )
    forward = grouped(adapted) if at_once else adapted
    parts = ({name: tensor[some] for name, tensor in adapters.items()} for some in chunks)
    return torch.cat([each(forward, part, split.x[some], at_once=at_once) for part, some in zip(parts, chunks)])


def _labels(adapted: AdaptedBackbone, stacks: tuple[Adapter, Adapter], split: Split, seed: int | None) -> list[Tensor]:
    """The labels ``(C, N)`` under which each model's gradients are taken: the data's, or drawn from the model."""
    if seed is None:
        return [split.y, split.y]
    generator, result = torch.Generator().manual_seed(seed), []
    for stack in stacks:
        p = _logits(adapted, stack, split).softmax(-1).cpu()
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(split.y.shape).to(split.y.device)
        result.append(torch.where(split.y < 0, split.y, drawn))
    return result


def estimate_fisher(
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

    Equations and options: ``mixing.fisher_moments``. The coordinates are the adapter's tensors (factors and head), or
    with ``on_delta`` the entries of the deltas, whose Fisher stays when (B, A) becomes (B M, M⁻¹ A). Those are many:
    one client at a time is held in memory. ``sample_labels``: a seed; the labels are then drawn from each model (the
    Fisher proper) instead of the data's. Assumes that a model's errors are independent over coordinates and about as
    large as the inverse Fisher says, with no bias. Cost: 2 gradients per sample.
    """
    options = dict(damping=damping, relative=relative, clip=clip, groups=_groups(local, by, on_delta)[1])
    labels = _labels(adapted, (federated, local), split, sample_labels)
    if not on_delta:
        g_f, g_l = (per_sample_gradients(adapted, m, split, labels=y) for m, y in zip((federated, local), labels))
        return _estimate(fisher_moments(g_f, g_l, split.sizes, **options), local, by)
    clients = []
    for i in range(len(split)):
        rows = ({name: tensor[i : i + 1] for name, tensor in stack.items()} for stack in (federated, local))
        part, drawn = split.rows([i]), [y[i : i + 1] for y in labels]
        g_f, g_l = (delta_gradients(adapted, stack, part, labels=y) for stack, y in zip(rows, drawn))
        clients.append(fisher_moments(g_f, g_l, part.sizes, **options))
    return _estimate(Moments(*(torch.cat([getattr(m, name) for m in clients]) for name in "abc")), local, by)


def estimate_laplace(
    adapted: AdaptedBackbone,
    federated: Adapter,
    local: Adapter,
    split: Split,
    *,
    train_sizes: Tensor,
    prior: float = 1.0,
    by: Grouping | None = None,
) -> Estimate:
    """Posterior variances in the style of a diagonal Laplace approximation, ``Σ = (n F + δ I)⁻¹``.

    ``train_sizes`` ``(C,)``: what each local model was trained on; the federated one had them all. Equations:
    ``mixing.laplace_moments``. Assumes what the Fisher estimator does, but lets the prior speak where the data are
    silent. Cost: 2 gradients per sample.
    """
    g_f, g_l = (per_sample_gradients(adapted, stack, split) for stack in (federated, local))
    examples = train_sizes.sum().expand(len(train_sizes)), train_sizes
    groups = _groups(local, by)[1]
    moments = laplace_moments(g_f, g_l, split.sizes, examples=examples, prior=prior, groups=groups)
    return _estimate(moments, local, by)


def estimate_gradient(
    adapted: AdaptedBackbone,
    federated: Adapter,
    local: Adapter,
    split: Split,
    *,
    unbiased: bool = True,
    damping: float | None = 0.1,
    cross_fit: bool = False,
    by: Grouping | None = None,
) -> Estimate:
    """Moments from the mean gradients of both models: bias included, in the metric of the inverse Fisher.

    Equations and options: ``mixing.gradient_moments``. Assumes that both models are close enough to the client's
    optimum for the gradient to be linear in the error. The metric couples the groups, so ``by`` needs
    ``damping=None``. Cost: 2 gradients per sample.
    """
    g_f, g_l = (per_sample_gradients(adapted, stack, split) for stack in (federated, local))
    groups = _groups(local, by)[1]
    options = dict(unbiased=unbiased, damping=damping, cross_fit=cross_fit, groups=groups)
    moments = gradient_moments(g_f, g_l, split.sizes, **options)
    return _estimate(moments, local, by)


def _mean(values: Tensor, split: Split) -> Tensor:
    return values.double().sum(1) / split.sizes.to(values.device)


def estimate_gauss_newton(
    adapted: AdaptedBackbone, federated: Adapter, local: Adapter, split: Split, *, by: Grouping | None = None
) -> Estimate:
    """The closed form in the metric of the loss, along the segment: two directional derivatives, no diagonal.

    With ``Δ = θ_F - θ_L`` over the adapter of the exact merge, the denominator is ``Δᵀ H Δ`` with the softmax
    Gauss–Newton ``H`` and the numerator ``b - c = -E[∇loss(θ_L) · Δ]``, both at the local model. With ``by`` each
    group has its own ``Δ`` and the groups' curvature is taken as block-diagonal. Assumes the loss is quadratic from
    the local model to the federated one. Cost: 1 forward-mode product per sample and group.
    """
    labels, groups = _groups(local, by)
    # θ(w) of the exact merge is linear in w through the factors B and the head of the stacked ranks.
    origin, end = merge_exact(federated, local, 0.0), merge_exact(federated, local, 1.0)
    whole = flatten(end) - flatten(origin)
    if by is None:
        slope, curvature = directional_derivatives(adapted, origin, whole, split)
        return _estimate(moments_from_slopes(_mean(slope, split), _mean(curvature, split)), local, by)
    owner = _groups(origin, by)[1]
    columns = [directional_derivatives(adapted, origin, whole * (owner == k), split) for k in range(len(labels))]
    slope, curvature = (torch.stack([_mean(part, split) for part in parts], dim=1) for parts in zip(*columns))
    return _estimate(moments_from_slopes(slope, curvature), local, by)


def estimate_shrinkage(
    adapted: AdaptedBackbone,
    federated: Adapter,
    local: Adapter,
    split: Split,
    *,
    train_sizes: Tensor,
    damping: float = 0.1,
) -> Estimate:
    """Positive-part James–Stein shrinkage of the local model towards the federated one, in the metric of the loss.

    The distance is ``Δᵀ H Δ`` by the Gauss–Newton product at the local model. The local model's variance in the same
    metric is ``(d - 2) / n``, with ``n`` its training examples and ``d = tr F (F + δ)⁻¹`` its effective number of
    parameters (MacKay, 1992) on the given samples. Assumes a well-specified, converged local model and small ``c``.
    Cost: 1 gradient and 1 forward-mode product per sample.
    """
    gradients = per_sample_gradients(adapted, local, split).double()
    gram = gradients @ gradients.mT  # (C, N, N)
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    ridge = (damping * gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) / gradients.shape[2]).clamp_min(1e-30)
    effective = (values / (values + ridge)).sum(1)
    origin, end = merge_exact(federated, local, 0.0), merge_exact(federated, local, 1.0)
    _, curvature = directional_derivatives(adapted, origin, flatten(end) - flatten(origin), split)
    variance = (effective - 2).clamp_min(0) / train_sizes.to(effective)
    moments = shrinkage_moments(variance, _mean(curvature, split))
    return Estimate(moments.weight, moments, {"effective": effective.cpu()})


def estimate_ensemble(
    adapted: AdaptedBackbone,
    runs: Sequence[tuple[Adapter, Adapter]],
    optimum: Adapter,
    split: Split,
) -> Estimate:
    """The true moments from repeated training, about a well-trained ``optimum``: the reference for the others.

    ``runs``: federated and local stack of each repetition, with other samples or seeds; ``optimum``: a stack trained on
    far more of each client's examples. ``a = E[e_Fᵀ H e_F]``, ``b = E[e_Lᵀ H e_L]``, ``c = E[e_Fᵀ H e_L]`` over the
    runs, with the softmax Gauss–Newton ``H`` at the optimum: near it, the loss is the optimum's plus half the bound, in
    nats. ``details``: ``deltas`` ``(3, C)``, the same moments with ``H = I`` on the deltas, as the paper has it;
    ``smoothness`` ``(C,)``, the largest curvature along any ``e`` of unit length; ``slope`` ``(C, 2)``, the loss's
    along ``e_F`` and ``e_L``, zero at a true optimum. Too dear for use. Cost: 3 forward-mode products per sample and
    run, after the training.
    """
    moments, plain, slopes, smoothness = [], [], [], []
    for federated, local in runs:
        three = [federated, local, optimum]
        origin, f, p = (combine(three, [float(k == j) for k in range(3)]) for j in (2, 0, 1))
        e_f, e_l = flatten(f) - flatten(origin), flatten(p) - flatten(origin)
        derivatives = [directional_derivatives(adapted, origin, e, split) for e in (e_f, e_l, e_f - e_l)]
        a, b, d = (_mean(curvature, split).cpu() for _, curvature in derivatives)
        gram = delta_products(three, adapted.scaling).cpu()
        aa, bb = (gram[:, k, k] - 2 * gram[:, k, 2] + gram[:, 2, 2] for k in (0, 1))
        cc = gram[:, 0, 1] - gram[:, 0, 2] - gram[:, 1, 2] + gram[:, 2, 2]
        moments.append(torch.stack([a, b, (a + b - d) / 2]))
        plain.append(torch.stack([aa, bb, cc]))
        slopes.append(torch.stack([_mean(slope, split).cpu() for slope, _ in derivatives[:2]], dim=1))
        smoothness.append(torch.maximum(a / aa.clamp_min(TINY), b / bb.clamp_min(TINY)))
    mean = Moments(*torch.stack(moments).mean(0))
    details = {
        "deltas": torch.stack(plain).mean(0),
        "slope": torch.stack(slopes).mean(0),
        "smoothness": torch.stack(smoothness).amax(0),
    }
    return Estimate(mean.weight, mean, details)


def _sample_losses(adapted: AdaptedBackbone, adapters: Adapter, split: Split) -> Tensor:
    """Each example's loss ``(C, N)``; zeros for padding."""
    return F.cross_entropy(_logits(adapted, adapters, split).transpose(1, 2), split.y, reduction="none")


def segment_losses(
    adapted: AdaptedBackbone, federated: Adapter, local: Adapter, split: Split, weights: Tensor
) -> Tensor:
    """Each example's loss at each mixing weight of the exact merge, ``(C, W, N)``; zeros for padding."""
    merges = (merge_exact(federated, local, weight) for weight in weights.tolist())
    return torch.stack([_sample_losses(adapted, merged, split) for merged in merges], dim=1)


def estimate_curve(
    adapted: AdaptedBackbone,
    federated: Adapter,
    local: Adapter,
    split: Split,
    *,
    points: int = 9,
    parabola: bool = False,
) -> Estimate:
    """Each client alone: the weight with the smallest mean loss on its samples, on a grid or by a fitted parabola.

    Nothing is assumed of the models, only that the samples are fresh. Its expected regret is about ``1 / (2 n)`` nats
    for n samples where the models are calibrated, and more where they are over-confident. Cost: ``points``
    forward passes per sample.
    """
    weights = grid(points)
    loss = segment_losses(adapted, federated, local, split, weights).double().sum(2).cpu() / split.sizes.unsqueeze(1)
    details = {"weights": weights, "loss": loss}
    if parabola:
        moments = parabola_moments(weights, loss)
        return Estimate(moments.weight, moments, details)
    return Estimate(weights.double()[loss.argmin(1)], None, details)


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
    """The held-out curve of each client, shrunk towards the clients' pooled curve (``mixing.pooled_weight``).

    Every client sends its mean loss at the ``points`` weights and the spread of its slopes, and gets the federation's
    centre and spread back. Assumes that the clients' best weights scatter about a common centre. With ``by`` naming two
    groups, such as ``head_and_body``, the clients also learn one offset between them together
    (``mixing.pooled_offset``), for three more floats up and one down: the second group in the order of names gets half
    of it more, the first half of it less. Cost: ``points`` forward passes per sample, with ``by`` two more.
    """
    weights = grid(points)
    losses = segment_losses(adapted, federated, local, split, weights)
    weight, details = pooled_weight(weights, losses, split.sizes)
    details = {"weights": weights, **details}
    if by is None:
        return Estimate(weight, None, details, floats=(points + 1, 2))
    labels, _ = _groups(local, by)
    if len(labels) != 2:
        raise ValueError(f"the offset is between two groups, but by gives {len(labels)}: {labels}")

    def apart(offset: float | Tensor) -> dict[str, Tensor]:
        halves = {labels[0]: -offset / 2, labels[1]: offset / 2}
        return {_module(name): (weight + halves[by(name)]).clamp(0, 1) for name in local}

    middle = CubicSpline(weights, losses.double().cpu(), axis=1)(weight)[range(len(split)), range(len(split))]
    low, high = (_sample_losses(adapted, merge_exact(federated, local, apart(sign * probe)), split) for sign in (-1, 1))
    offset, more = pooled_offset(low, torch.from_numpy(middle), high, split.sizes, probe=probe)
    return Estimate(apart(offset), None, {"client": weight, **details, **more}, floats=(points + 4, 3))


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
    weights = grid(points)
    losses = segment_losses(adapted, federated, local, split, weights)
    prior = torch.full((len(split),), 0.5) if prior is None else prior
    weight, details = combined_weight(weights, losses, split.sizes, prior, spread=spread)
    return Estimate(weight, None, {"weights": weights, **details}, floats=(points + 3, 3))
