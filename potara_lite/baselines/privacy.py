"""Client-level differential privacy on what travels, and what its noise does to the moments and the mixing weight.

The server clips what each client changed and adds Gaussian noise to the mean (DP-FedAvg: McMahan et al., ICLR 2018,
arXiv 1710.06963). Whoever sees all messages to the clients can then hardly tell whether any one client's data took
part. The noise is an error of the federated model that is independent of everything else, so it enters the moment ``a``
and no other: ``a + v``, with ``v`` the noise's own second moment, and the mixing weight moves to the local model, which
has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..adapters.state import (
    Adapter,
    any_adapter,
    door,
    factors,
    flatten,
    is_lora,
    layer_of,
    lora_layers,
    numbers,
    stack,
    unflatten,
)
from ..checks import check_fields, function, kind, positive_or_infinite, real, refuse, unchecked, whole
from ..estimators.moments import Moments

probability = real("in (0, 1)", lambda x: 0 < x < 1)


@dataclass(frozen=True)
class Privacy:
    """``clip``: the largest norm of what a client may change in a round. ``noise_multiplier``: the standard deviation
    of the noise on the sum of the changes, in units of ``clip``. ``seed``: of the noise; keep it secret, and draw it
    anew for every run, where there is something to protect.

    Raises ``ValueError`` for a clip that is not positive and a negative noise.
    """

    clip: float
    noise_multiplier: float
    seed: int

    def __post_init__(self):
        check_fields(self)

    @door()
    def noise_std(self, clients: int) -> float:
        """The standard deviation of the noise on each number of the mean over so many clients."""
        return self.noise_multiplier * self.clip / clients


@door(uploads=stack, sent=any_adapter)
def private_average(uploads: Adapter, sent: Adapter, privacy: Privacy, number: int) -> Adapter:
    """The next shared tensors from the clients' ``uploads``, a stack, and what was ``sent`` to them all.

    ``sent + (Σ_i clipped(upload_i - sent) + noise) / C``: every client counts the same, whatever its size, which would
    else have to be protected, too. ``number`` is the round's.
    """
    for name, tensor in uploads.items():
        if name not in sent or sent[name].shape != tensor.shape[1:] or len(uploads) < len(sent):
            raise ValueError(f"uploads must be of the tensors that were sent, unlike {name!r}")
    base = flatten({name: sent[name].unsqueeze(0) for name in uploads})  # (1, P)
    changes = flatten(uploads) - base  # (C, P)
    factor = (privacy.clip / changes.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
    noise = torch.from_numpy(np.random.default_rng([privacy.seed, number]).standard_normal(base.shape)).to(base)
    mean = (changes * factor).mean(0, keepdim=True) + privacy.noise_std(len(changes)) * noise
    return {name: tensor[0] for name, tensor in unflatten(base + mean, sent).items()}


@door(rounds=whole(1), delta=probability)
def epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """The ε of (ε, δ)-differential privacy after ``rounds`` rounds in which all clients take part.

    Neighbours: the same federation with one client's change replaced by zero in every round. So many Gaussian
    mechanisms are exactly one whose noise is smaller by the root of their number; its ε is that of Google's
    ``dp_accounting`` (the extra ``privacy``). No noise gives infinity.
    """
    from dp_accounting import GaussianDpEvent, pld

    if noise_multiplier == 0:
        return math.inf
    accountant = pld.PLDAccountant()
    accountant.compose(GaussianDpEvent(noise_multiplier / math.sqrt(rounds)))
    return float(accountant.get_epsilon(delta))


@door(target=positive_or_infinite, rounds=whole(1), delta=probability)
def noise_multiplier_for(target: float, rounds: int, delta: float) -> float:
    """The smallest noise multiplier (to 1 %) whose ``epsilon`` is at most ``target``; 0 for an infinite target."""
    if math.isinf(target):
        return 0.0
    low, high = 0.0, math.sqrt(rounds)
    spent = unchecked(epsilon)
    while spent(high, rounds, delta) > target:
        low, high = high, 2 * high
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle, rounds, delta) <= target else (middle, high)
    return high


@door(noisy=function)
def noise_moment(adapter: Adapter, scaling: dict[str, float], std: float, noisy=lambda name: True) -> float:
    """``v = E|delta(adapter + noise) - delta(adapter)|²`` for independent Gaussian noise on the tensors that are
    ``noisy``, exactly.

    In a layer with A ``(r, in)`` and B ``(out, r)``, scaled by s, and noise of variance σ² on both,
    ``v = s² (σ² out |A|² + σ² in |B|² + σ⁴ out r in)``; where A is not noisy, the first term alone, where B is not, the
    second. A directly trained tensor adds σ² for each of its numbers. ``adapter``: of one client.
    """
    total, variance = 0.0, std**2
    for layer in lora_layers(adapter):
        a, b = factors(adapter, layer)
        noisy_a, noisy_b = (any(noisy(n) for n in adapter if layer_of(n) == layer and is_lora(n, f)) for f in "AB")
        first = noisy_b * variance * b.shape[0] * float(a.double().square().sum())
        second = noisy_a * variance * a.shape[1] * float(b.double().square().sum())
        both = noisy_a * noisy_b * variance**2 * b.shape[0] * a.shape[0] * a.shape[1]
        total += scaling[layer] ** 2 * (first + second + both)
    return total + sum(variance * t.numel() for n, t in adapter.items() if not is_lora(n) and noisy(n))


@door(moments=kind("Moments"), variance=numbers(0, 1, 2, least=0))
def with_noise(moments: Moments, variance: Tensor | float) -> Moments:
    """The moments once independent noise with second moment ``variance`` was added to the federated model.

    >>> float(with_noise(Moments(1.0, 1.0, 0.0), 2.0).weight)
    0.25
    """
    try:
        return Moments(moments.a + variance, moments.b, moments.c)
    except RuntimeError:
        refuse("variance", f"a number or of shape {tuple(moments.a.shape)}, as the moments", variance)
