"""The closed form in the metric of the loss, along the segment: a slope and a Gauss–Newton curvature."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, Stack, check_models, flatten
from ..checks import Numbers, checked, invalid
from ..federation.split import Split
from ..merging.merge import merge_exact
from ..training.gradients import directional_derivatives
from .estimate import Estimate, Grouping, from_moments, group_coordinates
from .moments import Moments

PerClient = Annotated[Tensor, Numbers("C|C G")]  # with groups, for each client and group


@checked
def moments_from_slopes(at_local: PerClient, curvature: PerClient) -> Moments:
    """Moments ``(C,)`` from the loss along the segment: its slope at the local model and its curvature.

    The loss is β/2 times the bound, so its slope at ``w = 0`` is ``-(b - c)`` and its curvature ``a + b - 2c`` in
    units of β. Only these two are observed; ``c`` is the smallest ``c >= 0`` that ``a, b >= 0`` allows.
    """
    if curvature.shape != at_local.shape:
        invalid("curvature", f"of shape {tuple(at_local.shape)}, as at_local", curvature)
    gain, total = -at_local.double().cpu(), curvature.double().cpu().clamp_min(0)
    c = torch.stack([torch.zeros_like(gain), -gain, gain - total]).amax(0)
    return Moments((total - gain + c).clamp_min(0), (gain + c).clamp_min(0), c)


def example_mean(values: Tensor, split: Split) -> Tensor:
    """The mean ``(C,)`` over each client's real examples of values ``(C, N)`` that are zero for padding."""
    return values.double().sum(1) / split.sizes.to(values.device)


def segment_of(federated: Adapter, local: Adapter) -> tuple[Adapter, Tensor]:
    """The segment between the models in the adapter of their exact merge, whose ``θ(w)`` is linear in the weight w
    through the factors B and the head: the local model, at w = 0, and ``Δ = θ_F - θ_L``, flat ``(C, P)``."""
    start = merge_exact(federated, local, 0.0)
    return start, flatten(merge_exact(federated, local, 1.0)) - flatten(start)


@checked
def estimate_gauss_newton(
    adapted: AdaptedBackbone, federated: Stack, local: Stack, split: Split, *, by: Grouping | None = None
) -> Estimate:
    """The closed form in the metric of the loss, along the segment: two directional derivatives, no diagonal.

    With ``Δ = θ_F - θ_L`` over the adapter of the exact merge, the denominator is ``Δᵀ H Δ`` with the softmax
    Gauss–Newton ``H`` and the numerator ``b - c = -E[∇loss(θ_L) · Δ]``, both at the local model. With ``by`` each
    group has its own ``Δ`` and the groups' curvature is taken as block-diagonal. Assumes the loss is quadratic from
    the local model to the federated one. Cost: 1 forward-mode product per sample and group.
    """
    federated, local = check_models(adapted, split, federated=federated, local=local)
    start, direction = segment_of(federated, local)
    labels, groups = group_coordinates(start, by)
    directions = [direction] if groups is None else (direction * (groups == k) for k in range(len(labels)))
    slopes, curvatures = [], []
    for one in directions:
        slope, curvature = directional_derivatives(adapted, start, one, split)
        slopes.append(example_mean(slope, split))
        curvatures.append(example_mean(curvature, split))
    if groups is None:
        return from_moments(moments_from_slopes(slopes[0], curvatures[0]), local, by)
    return from_moments(moments_from_slopes(torch.stack(slopes, dim=1), torch.stack(curvatures, dim=1)), local, by)
