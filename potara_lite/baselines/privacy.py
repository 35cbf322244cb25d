"""Client-level differential privacy of the messages, and what its noise does to the moments and the mixing weight.

The server clips what each client changed and adds Gaussian noise to the mean (DP-FedAvg: McMahan et al., ICLR 2018,
arXiv 1710.06963). Someone who sees all messages to the clients can then hardly tell whether any one client's data took
part. The noise is an error of the federated model that is independent of everything else, so it enters the moment ``a``
and no other: ``a + v``, with ``v`` the second moment of the noise. The local model has no noise, and the mixing weight
moves to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from ..adapters.state import (
    Adapter,
    AnyAdapter,
    OneAdapter,
    Stack,
    check_scaling,
    factor_names,
    factors,
    flatten,
    is_lora,
    lora_layers,
    match_adapter,
    unflatten,
)
from ..checks import (
    Count,
    Named,
    NonNegative,
    Numbers,
    Positive,
    PositiveOrInf,
    Probability,
    Seed,
    Size,
    checked,
    invalid,
)
from ..estimators.moments import Moments


@checked
@dataclass(frozen=True)
class Privacy:
    """``clip``: the largest norm of what a client may change in a round. ``noise_multiplier``: the standard deviation
    of the noise on the sum of the changes, in units of ``clip``. ``seed``: of the noise; where there is something to
    protect, keep it secret and draw a new one for every run.

    Raises ``ValueError`` for a clip that is not positive and a negative noise.
    """

    clip: Positive
    noise_multiplier: NonNegative
    seed: Seed

    @checked
    def noise_std(self, clients: Size) -> float:
        """The standard deviation of the noise on each number of the mean over so many clients."""
        return self.noise_multiplier * self.clip / clients


@checked
def private_average(uploads: Stack, sent: AnyAdapter, privacy: Privacy, number: Count) -> Adapter:
    """The next shared tensors from the clients' ``uploads``, a stack, and what was ``sent`` to them all.

    ``sent + (Σ_i clipped(upload_i - sent) + noise) / C``: every client counts the same, because weights by size would
    have to be protected, too. ``number`` is the round's.
    """
    uploads = match_adapter("uploads", uploads, sent, stacked=True, same_rank=True)
    base = flatten({name: tensor.unsqueeze(0) for name, tensor in sent.items()})  # (1, P)
    changes = flatten(uploads) - base  # (C, P)
    factor = (privacy.clip / changes.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1)
    noise = torch.from_numpy(np.random.default_rng([privacy.seed, number]).standard_normal(base.shape)).to(base)
    mean = (changes * factor).mean(0, keepdim=True) + privacy.noise_std(len(changes)) * noise
    return {name: tensor[0] for name, tensor in unflatten(base + mean, sent).items()}


@checked
def epsilon(noise_multiplier: NonNegative, rounds: Size, delta: Probability) -> float:
    """The ε of (ε, δ)-differential privacy after ``rounds`` rounds in which all clients take part.

    Neighbours: the same federation with one client's change replaced by zero in every round. n Gaussian mechanisms are
    exactly one whose noise is smaller by √n; its ε is that of Google's ``dp_accounting`` (the extra ``privacy``). No
    noise gives infinity.
    """
    from dp_accounting import GaussianDpEvent, pld

    if noise_multiplier == 0:
        return math.inf
    accountant = pld.PLDAccountant()
    accountant.compose(GaussianDpEvent(noise_multiplier / math.sqrt(rounds)))
    return float(accountant.get_epsilon(delta))


@checked
def noise_multiplier_for(target: PositiveOrInf, rounds: Size, delta: Probability) -> float:
    """The smallest noise multiplier (to 1 %) whose ``epsilon`` is at most ``target``; 0 for an infinite target."""
    if math.isinf(target):
        return 0.0
    low, high = 0.0, math.sqrt(rounds)
    while epsilon(high, rounds, delta) > target:
        low, high = high, 2 * high
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if epsilon(middle, rounds, delta) <= target else (middle, high)
    return high


@checked
def noise_moment(
    adapter: OneAdapter, scaling: Named[Positive], std: NonNegative, noisy: Callable[[str], bool] = lambda name: True
) -> float:
    """``v = E|delta(adapter + noise) - delta(adapter)|²`` for independent Gaussian noise on the tensors that are
    ``noisy``, exactly.

    In a layer with A ``(r, in)`` and B ``(out, r)``, scaled by s, and noise of variance σ² on both,
    ``v = s² (σ² out |A|² + σ² in |B|² + σ⁴ out r in)``; where A is not noisy, the first term alone, where B is not, the
    second. A directly trained tensor adds σ² for each of its numbers. ``adapter``: of one client.
    """
    check_scaling(scaling, adapter)
    variance = std**2
    total = 0.0
    for layer in lora_layers(adapter):
        a, b = factors(adapter, layer)  # (r, in), (out, r)
        noisy_a, noisy_b = (bool(noisy(name)) for name in factor_names(layer))
        of_b = noisy_b * variance * b.shape[0] * float(a.double().square().sum())
        of_a = noisy_a * variance * a.shape[1] * float(b.double().square().sum())
        of_both = noisy_a * noisy_b * variance**2 * b.shape[0] * a.shape[0] * a.shape[1]
        total += scaling[layer] ** 2 * (of_b + of_a + of_both)
    return total + sum(variance * t.numel() for n, t in adapter.items() if not is_lora(n) and noisy(n))


@checked
def with_noise(moments: Moments, variance: Annotated[Tensor, Numbers("|C|C G", least=0)]) -> Moments:
    """The moments once independent noise with second moment ``variance`` was added to the federated model.

    >>> float(with_noise(Moments(1.0, 1.0, 0.0), 2.0).weight)
    0.25
    """
    try:
        return Moments(moments.a + variance, moments.b, moments.c)
    except RuntimeError:
        invalid("variance", f"a number or of shape {tuple(moments.a.shape)}, as the moments", variance)
