"""Estimators of the mixing weight, one idea per file, the equation beside the function that applies it.

``ESTIMATORS`` is the table of those that the command and the benchmarks compare: each is a function of (backbone,
federated stack, local stack, federation) that picks its samples itself.
"""

from collections.abc import Callable

from ..adapters import AdaptedBackbone, Adapter
from ..data import Federation
from ..door import whole
from ..stacks import door, numbers, shaped_like, sizes_of
from . import calibrated
from .calibrated import lowest_inside
from .curve import estimate_curve, parabola_moments, segment_losses
from .ensemble import estimate_ensemble
from .estimate import Estimate, by_layer, estimate_uniform, head_and_body
from .gauss_newton import estimate_gauss_newton, moments_from_slopes
from .gradient import estimate_gradient, gradient_moments
from .laplace import estimate_laplace, laplace_moments
from .paper import estimate_paper, fisher_moments
from .shrinkage import estimate_shrinkage, shrinkage_moments

# The functions of the default also serve messages between machines (`flower/`), so they get their doors here.
estimate_calibrated = door()(calibrated.estimate_calibrated)
estimate_pooled = door(points=whole(3))(calibrated.estimate_pooled)
pooled_weight = door(weights=numbers(1), losses=numbers(3), sizes=sizes_of("losses", 2))(calibrated.pooled_weight)
pooled_offset = door(
    low=numbers(2), middle=shaped_like("low", 2), high=shaped_like("low", 2), sizes=sizes_of("low", 1)
)(calibrated.pooled_offset)

Estimator = Callable[[AdaptedBackbone, Adapter, Adapter, Federation], Estimate]


def on_train(estimate: Callable[..., Estimate], **options) -> Estimator:
    """The estimator on each client's training samples, as the paper has it."""

    @door()
    def estimator(adapted: AdaptedBackbone, federated: Adapter, local: Adapter, federation: Federation) -> Estimate:
        return estimate(adapted, federated, local, federation.train, **options)

    return estimator


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
