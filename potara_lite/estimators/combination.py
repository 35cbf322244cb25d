"""Weights of any number of models from held-out losses: the quadratic on the simplex through all pairs' mid-points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, door, stacks
from ..checks import fraction
from ..federation.split import Split
from ..merging.merge import combine_adapters
from .curve import client_losses
from .moments import combination_weights


@door(models=stacks, own=fraction)
def estimate_combination(
    adapted: AdaptedBackbone, models: Sequence[Adapter], split: Split, *, own: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Each client's weights of its K models (stacks), ``(C, K)``, not negative and adding up to 1.

    ``split``: the clients' calibration samples. ``own``: how much a client's own losses count beside the mean of all
    clients', from 0 (one vector of weights for all) to 1 (each client alone). Also returns the ``simplex_moments``
    ``(C, K, K)`` that the weights were read from. Cost: K (K + 1) / 2 forward passes per sample, as many floats up and
    K down. Raises ``ValueError`` for fewer than two models and for ``own`` outside [0, 1].
    """
    if len(models) < 2:
        raise ValueError(f"a combination needs at least 2 models, not {len(models)}")

    def mean_loss(adapter: Adapter) -> Tensor:
        return client_losses(adapted, adapter, split).double().cpu().sum(1) / split.sizes

    alone = torch.stack([mean_loss(model) for model in models], dim=1)  # (C, K)
    middle = {
        pair: mean_loss(combine_adapters([models[k] for k in pair], [0.5, 0.5]))
        for pair in combinations(range(len(models)), 2)
    }
    moments = simplex_moments(alone, middle)
    together = torch.einsum("c,ckl->kl", split.sizes.double() / split.sizes.sum(), moments)
    weights = combination_weights(own * moments + (1 - own) * together, nonnegative=True)
    return weights, moments


def simplex_moments(alone: Tensor, middle: dict[tuple[int, int], Tensor]) -> Tensor:
    """The matrix ``M`` ``(C, K, K)`` of the quadratic ``wᵀ M w`` that takes given values on the simplex.

    ``alone`` ``(C, K)``: its values at the K corners; ``middle``: those half-way between two of them, ``(C,)`` each. On
    the simplex every quadratic has this form, so no values are left over: ``M_kk`` is the value at corner k, and
    ``M_kl = 2 middle_kl - (M_kk + M_ll) / 2``. With the excess losses of models it is the matrix of their errors'
    second moments (up to β/2), and ``combination_weights`` finds its least point.
    """
    moments = torch.diag_embed(alone)
    for (one, other), value in middle.items():
        moments[:, one, other] = moments[:, other, one] = 2 * value - (alone[:, one] + alone[:, other]) / 2
    return moments
