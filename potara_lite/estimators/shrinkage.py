"""Positive-part James–Stein shrinkage of the local model towards the federated one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters.lora import AdaptedBackbone, Adapter, flatten
from ..adapters.state import door, numbers, shaped_like
from ..checks import unchecked
from ..federation.split import Split
from ..merging.merge import merge_exact
from ..training.gradients import directional_derivatives, per_sample_gradients
from .estimate import Estimate
from .gauss_newton import example_mean
from .moments import Moments


@door(variance=numbers(1, least=0), distance=shaped_like("variance", 1))
def shrinkage_moments(variance: Tensor, distance: Tensor) -> Moments:
    """Positive-part James–Stein: shrink the local model towards the federated one by ``variance / distance``.

    ``distance = |θ_F - θ_L|²`` estimates ``a + b - 2c``; with small ``c``, ``b`` is the local model's ``variance``
    ``(C,)`` in the same metric.
    """
    variance, distance = variance.double().cpu(), distance.double().cpu()
    return Moments((distance - variance).clamp_min(0), variance.clamp_min(0), torch.zeros_like(variance))


@door()
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
    gradients = unchecked(per_sample_gradients)(adapted, local, split).double()
    gram = gradients @ gradients.mT  # (C, N, N)
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    ridge = (damping * gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) / gradients.shape[2]).clamp_min(1e-30)
    effective = (values / (values + ridge)).sum(1)
    origin, end = merge_exact(federated, local, 0.0), merge_exact(federated, local, 1.0)
    _, curvature = unchecked(directional_derivatives)(adapted, origin, flatten(end) - flatten(origin), split)
    variance = (effective - 2).clamp_min(0) / train_sizes.to(effective)
    moments = shrinkage_moments(variance, example_mean(curvature, split))
    return Estimate(moments.weight, moments, {"effective": effective.cpu()})
