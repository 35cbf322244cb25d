"""The closed form in the metric of the loss, along the segment: a slope and a Gauss–Newton curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, door, flatten, numbers, shaped_like
from ..checks import unchecked
from ..federation.split import Split
from ..merging.merge import merge_exact
from ..training.gradients import directional_derivatives
from .estimate import Estimate, Grouping, from_moments, group_coordinates
from .moments import Moments


@door(at_local=numbers(1, 2), curvature=shaped_like("at_local", 1, 2))
def moments_from_slopes(at_local: Tensor, curvature: Tensor) -> Moments:
    """Moments ``(C,)`` from the loss along the segment: its slope at the local model and its curvature.

    The loss is β/2 times the bound, so its slope at ``w = 0`` is ``-(b - c)`` and its curvature ``a + b - 2c`` in
    units of β. Only these two are observed; ``c`` is the smallest ``c >= 0`` that ``a, b >= 0`` allows.
    """
    gain, total = -at_local.double().cpu(), curvature.double().cpu().clamp_min(0)
    c = torch.stack([torch.zeros_like(gain), -gain, gain - total]).amax(0)
    return Moments((total - gain + c).clamp_min(0), (gain + c).clamp_min(0), c)


def example_mean(values: Tensor, split: Split) -> Tensor:
    """The mean ``(C,)`` over each client's real examples of values ``(C, N)`` that are zero for padding."""
    return values.double().sum(1) / split.sizes.to(values.device)


@door()
def estimate_gauss_newton(
    adapted: AdaptedBackbone, federated: Adapter, local: Adapter, split: Split, *, by: Grouping | None = None
) -> Estimate:
    """The closed form in the metric of the loss, along the segment: two directional derivatives, no diagonal.

    With ``Δ = θ_F - θ_L`` over the adapter of the exact merge, the denominator is ``Δᵀ H Δ`` with the softmax
    Gauss–Newton ``H`` and the numerator ``b - c = -E[∇loss(θ_L) · Δ]``, both at the local model. With ``by`` each
    group has its own ``Δ`` and the groups' curvature is taken as block-diagonal. Assumes the loss is quadratic from
    the local model to the federated one. Cost: 1 forward-mode product per sample and group.
    """
    labels, groups = group_coordinates(local, by)
    # θ(w) of the exact merge is linear in w through the factors B and the head of the stacked ranks.
    origin, end = merge_exact(federated, local, 0.0), merge_exact(federated, local, 1.0)
    whole = flatten(end) - flatten(origin)
    directional = unchecked(directional_derivatives)
    if by is None:
        slope, curvature = directional(adapted, origin, whole, split)
        return from_moments(moments_from_slopes(example_mean(slope, split), example_mean(curvature, split)), local, by)
    owner = group_coordinates(origin, by)[1]
    columns = [directional(adapted, origin, whole * (owner == k), split) for k in range(len(labels))]
    slope, curvature = (torch.stack([example_mean(part, split) for part in parts], dim=1) for parts in zip(*columns))
    return from_moments(moments_from_slopes(slope, curvature), local, by)
