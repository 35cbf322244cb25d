"""Weights of any number of models from held-out losses: the quadratic on the simplex through all pairs' mid-points."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, CompleteStacks, check_models
from ..checks import Fraction, checked
from ..federation.split import Split
from ..merging.merge import combine_adapters
from .curve import client_losses
from .moments import combination_weights


@checked
def estimate_combination(
    adapted: AdaptedBackbone, models: CompleteStacks, split: Split, *, client_share: Fraction = 0.5
) -> tuple[Tensor, Tensor]:
    """Each client's weights of its K models (stacks), ``(C, K)``, not negative and adding up to 1.

    ``split``: the clients' calibration samples. ``client_share``: how much a client's own losses count beside the mean
    of all clients', from 0 (one vector of weights for all) to 1 (each client alone). Also returns the
    ``simplex_moments`` ``(C, K, K)`` that the weights were read from. Cost: K (K + 1) / 2 forward passes per sample, as
    many floats up and K down. Raises ``ValueError`` for fewer than two models.
    """
    if len(models) < 2:
        raise ValueError(f"a combination needs at least 2 models, not {len(models)}")
    models = check_models(adapted, split, **{f"models[{i}]": model for i, model in enumerate(models)})

    def mean_loss(adapter: Adapter) -> Tensor:
        return client_losses(adapted, adapter, split).double().cpu().sum(1) / split.sizes

    alone = torch.stack([mean_loss(model) for model in models], dim=1)  # (C, K)
    middle = {
        (i, j): mean_loss(combine_adapters([models[i], models[j]], [0.5, 0.5]))
        for i, j in combinations(range(len(models)), 2)
    }
    moments = simplex_moments(alone, middle)
    together = torch.einsum("c,cij->ij", split.sizes.double() / split.sizes.sum(), moments)
    mixed = client_share * moments + (1 - client_share) * together
    return combination_weights(mixed, nonnegative=True), moments


def simplex_moments(alone: Tensor, middle: dict[tuple[int, int], Tensor]) -> Tensor:
    """The matrix ``M`` ``(C, K, K)`` of the quadratic ``wᵀ M w`` that takes given values on the simplex.

    ``alone`` ``(C, K)``: its values at the K corners; ``middle``: those half-way between two of them, ``(C,)`` each. On
    the simplex every quadratic has this form, so no values are left over: ``M_ii`` is the value at corner i, and
    ``M_ij = 2 middle_ij - (M_ii + M_jj) / 2``. With the excess losses of models it is the matrix of their errors'
    second moments (up to β/2), and ``combination_weights`` finds its least point.
    """
    moments = torch.diag_embed(alone)
    for (i, j), value in middle.items():
        moments[:, i, j] = moments[:, j, i] = 2 * value - (alone[:, i] + alone[:, j]) / 2
    return moments
