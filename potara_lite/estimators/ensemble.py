"""The true moments, from repeated training: the reference that the other estimators are judged by."""

from __future__ import annotations

import torch

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Stack, check_models, delta_inner_products, flatten
from ..checks import List, checked
from ..federation.split import Split
from ..merging.merge import combine_adapters
from ..training.gradients import directional_derivatives
from .estimate import Estimate, Two
from .gauss_newton import example_mean
from .moments import Moments

TINY = torch.finfo(torch.float64).tiny


@checked
def estimate_ensemble(adapted: AdaptedBackbone, runs: List[Two[Stack]], optimum: Stack, split: Split) -> Estimate:
    """The true moments from repeated training, about a well-trained ``optimum``: the reference for the others.

    ``runs``: federated and local stack of each repetition, with other samples or seeds; ``optimum``: a stack trained on
    far more of each client's examples. ``a = E[e_Fᵀ H e_F]``, ``b = E[e_Lᵀ H e_L]``, ``c = E[e_Fᵀ H e_L]`` over the
    runs, with the softmax Gauss–Newton ``H`` at the optimum: near it, the loss is the optimum's plus half the bound, in
    nats. ``details``: ``deltas`` ``(3, C)``, the same moments with ``H = I`` on the deltas, as the paper has it;
    ``smoothness`` ``(C,)``, the largest curvature along any ``e`` of unit length; ``slope`` ``(C, 2)``, the loss's
    along ``e_F`` and ``e_L``, zero at a true optimum. Too expensive for use. Cost: 3 forward-mode products per sample
    and run, after the training.
    """
    in_loss, in_deltas, slopes, smoothness = [], [], [], []
    for federated, local in runs:
        models = check_models(adapted, split, federated=federated, local=local, optimum=optimum)
        f, p, origin = (combine_adapters(models, [float(i == j) for j in range(3)]) for i in range(3))
        e_f = flatten(f) - flatten(origin)
        e_l = flatten(p) - flatten(origin)
        derivatives = [directional_derivatives(adapted, origin, e, split) for e in (e_f, e_l, e_f - e_l)]
        a, b, d = (example_mean(curvature, split).cpu() for _, curvature in derivatives)
        in_loss.append(torch.stack([a, b, (a + b - d) / 2]))
        slopes.append(torch.stack([example_mean(slope, split).cpu() for slope, _ in derivatives[:2]], dim=1))
        gram = delta_inner_products(models, adapted.scaling).cpu()
        aa, bb = (gram[:, k, k] - 2 * gram[:, k, 2] + gram[:, 2, 2] for k in (0, 1))
        cc = gram[:, 0, 1] - gram[:, 0, 2] - gram[:, 1, 2] + gram[:, 2, 2]
        in_deltas.append(torch.stack([aa, bb, cc]))
        smoothness.append(torch.maximum(a / aa.clamp_min(TINY), b / bb.clamp_min(TINY)))
    mean = Moments(*torch.stack(in_loss).mean(0))
    details = {
        "deltas": torch.stack(in_deltas).mean(0),
        "slope": torch.stack(slopes).mean(0),
        "smoothness": torch.stack(smoothness).amax(0),
    }
    return Estimate(mean.weight, mean, details)
