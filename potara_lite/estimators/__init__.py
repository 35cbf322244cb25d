"""Estimators of the mixing weight, one idea per file, the equation beside the function that applies it.

``ESTIMATORS`` is the table of those that the command and the benchmarks compare: each is a function of (backbone,
federated stack, local stack, federation) that picks its samples itself.
"""

from collections.abc import Callable

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, door
from ..checks import function
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


@door(estimate=function)
def on_train(estimate: Callable[..., Estimate], **options) -> Estimator:
    """The estimator on each client's training samples, as the paper has it."""

    @door()
    def estimator(adapted: AdaptedBackbone, federated: Adapter, local: Adapter, federation: Federation) -> Estimate:
        return estimate(adapted, federated, local, federation.train, **options)

    return estimator


@door(estimate=function)
def on_calibration(estimate: Callable[..., Estimate], **options) -> Estimator:
    """The estimator on each client's calibration samples, which trained neither model."""

    @door()
    def estimator(adapted: AdaptedBackbone, federated: Adapter, local: Adapter, federation: Federation) -> Estimate:
        return estimate(adapted, federated, local, federation.calibration, **options)

    return estimator


ESTIMATORS: dict[str, Estimator] = {
    "uniform": on_calibration(estimate_uniform),
    "potara-paper": on_train(estimate_paper),
    "potara-calibrated": on_calibration(estimate_calibrated),
}
