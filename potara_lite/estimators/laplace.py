"""Posterior variances in the style of a diagonal Laplace approximation."""

from __future__ import annotations

from torch import Tensor

from ..adapters.lora import AdaptedBackbone, Adapter
from ..adapters.state import door, groups_of, interval, sizes_of
from ..checks import several, unchecked
from ..federation.split import Split
from ..training.gradients import per_sample_gradients
from .estimate import Estimate, Grouping, from_moments, group_coordinates
from .moments import Moments
from .paper import diagonal_moments, fisher_diagonals


@door(sizes=sizes_of("g_f", 1), examples=several(sizes_of("g_f"), least=2), clip=interval, groups=groups_of("g_f"))
def laplace_moments(
    g_f: Tensor,
    g_l: Tensor,
    sizes: Tensor,
    *,
    examples: tuple[Tensor, Tensor],
    prior: float = 1.0,
    clip: tuple[float, float] = (0.0, 1.0),
    groups: Tensor | None = None,
) -> Moments:
    """Laplace style: ``Σ = 1 / (n F + δ)``, with the ``examples`` (federated, local) ``(C,)`` that each model was
    trained on and the precision ``prior`` of a Gaussian prior, so that flat directions count by the prior alone."""
    f_f, f_l, rho = unchecked(fisher_diagonals)(g_f, g_l, sizes)
    var_f, var_l = (1 / (n.to(f).unsqueeze(1) * f + prior) for n, f in zip(examples, (f_f, f_l)))
    return diagonal_moments(var_f, var_l, rho.clamp(*clip), groups)


@door()
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
    ``laplace_moments``. Assumes what the Fisher estimator does, but lets the prior speak where the data are
    silent. Cost: 2 gradients per sample.
    """
    g_f, g_l = (unchecked(per_sample_gradients)(adapted, stack, split) for stack in (federated, local))
    examples = train_sizes.sum().expand(len(train_sizes)), train_sizes
    groups = group_coordinates(local, by)[1]
    moments = unchecked(laplace_moments)(g_f, g_l, split.sizes, examples=examples, prior=prior, groups=groups)
    return from_moments(moments, local, by)
