"""Estimators of the mixing weight, one idea per file, the equation beside the function that applies it.

``ESTIMATORS`` is the table of those that the command and the benchmarks compare: each is a function of (backbone,
federated stack, local stack, federation) that picks its samples itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, Stack
from ..checks import checked
from ..federation.split import Federation
from .alternatives import (
    estimate_gradient,
    estimate_laplace,
    estimate_shrinkage,
    gradient_moments,
    laplace_moments,
    shrinkage_moments,
)
from .calibrated import estimate_calibrated, estimate_pooled, lowest_inside, pooled_offset, pooled_weight
from .combination import estimate_combination, simplex_moments
from .curve import estimate_curve, parabola_moments, segment_losses
from .ensemble import estimate_ensemble
from .estimate import Estimate, by_layer, estimate_uniform, head_and_body
from .gauss_newton import estimate_gauss_newton, moments_from_slopes
from .paper import estimate_paper, fisher_moments

Estimator = Callable[[AdaptedBackbone, Adapter, Adapter, Federation], Estimate]


@dataclass(frozen=True, eq=False)
class OnSplit:
    """An estimator on one split of a federation, ``train`` or ``calibration``: an ``Estimator``."""

    estimate: Callable[..., Estimate]
    split: str
    options: dict[str, Any] = field(default_factory=dict)

    @checked
    def __call__(self, adapted: AdaptedBackbone, federated: Stack, local: Stack, federation: Federation) -> Estimate:
        return self.estimate(adapted, federated, local, getattr(federation, self.split), **self.options)


@checked
def on_train(estimate: Callable[..., Estimate], **options) -> OnSplit:
    """The estimator on each client's training samples, as the paper has it."""
    return OnSplit(estimate, "train", options)


@checked
def on_calibration(estimate: Callable[..., Estimate], **options) -> OnSplit:
    """The estimator on each client's calibration samples, which trained neither model."""
    return OnSplit(estimate, "calibration", options)


ESTIMATORS: dict[str, Estimator] = {
    "uniform": on_calibration(estimate_uniform),
    "potara-paper": on_train(estimate_paper),
    "potara-calibrated": on_calibration(estimate_calibrated),
}
