"""Checkers of notebook 04: the Fisher information, how many images, shrinkage, regret, and a weight that beats ½."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checking import check, is_untouched


def check_diagonal_fisher(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Exercise 1: each client's diagonal Fisher ``(C, P)`` from per-sample gradients ``(C, N, P)`` and sizes ``(C,)``.

    A client with fewer than N examples has rows of zeros at the end.

    >>> check_diagonal_fisher(lambda gradients, sizes: gradients.square().mean(1))
    'hint: you divide by N, the padded length; a client with fewer examples has its own number of them in sizes'
    """
    random = torch.Generator().manual_seed(5)
    inputs = []
    for sizes, length in (([4, 2, 3], 4), ([5, 1], 6)):
        gradients = torch.randn(len(sizes), length, 3, generator=random, dtype=torch.float64) + 0.5
        for i, n in enumerate(sizes):
            gradients[i, n:] = 0
        inputs.append((gradients, torch.tensor(sizes)))

    def mean(values: Tensor, sizes: Tensor) -> Tensor:
        return values.sum(1) / sizes.unsqueeze(1)

    batch = "that squares the gradient of the whole batch; square each example's gradient first, then take the mean"
    variance = "that is the gradients' variance; the Fisher is their second moment: do not subtract the mean"
    mistakes = {
        batch: lambda g, n: mean(g, n).square(),
        f"{batch} (and divide by the client's own number)": lambda g, n: g.mean(1).square(),
        "that is the sum over the examples; the Fisher is their mean": lambda g, n: g.square().sum(1),
        "you divide by N, the padded length; a client with fewer examples has its own number of them in sizes": (
            lambda g, n: g.square().mean(1)
        ),
        variance: lambda g, n: mean(g.square(), n) - mean(g, n).square(),
        f"{variance} (and mind the padded examples)": lambda g, n: g.var(1, unbiased=False),
        f"{variance} (nor divide by N - 1, and mind the padded examples)": lambda g, n: g.var(1),
        "that is the trace; the diagonal keeps a number for every coordinate": lambda g, n: mean(g.square(), n).sum(1),
    }
    return check(function, lambda g, n: mean(g.square(), n), inputs, mistakes)


def check_images_needed(function: Callable[[float, float, float], int]) -> str:
    """Exercise 2: how many held-out images a client's own curve needs for an expected ``regret`` (nats) at most, from
    the variance ``v`` of an image's slope and the curvature ``h``.

    >>> check_images_needed(lambda v, h, regret: math.ceil(1 / (2 * regret)))
    'hint: that is right for a calibrated model only, where v = h'
    """
    inputs = [(1.0, 1.0, 0.01), (2.1, 1.4, 0.02), (4.0, 0.5, 0.03)]
    mistakes = {
        "that is right for a calibrated model only, where v = h": lambda v, h, r: math.ceil(1 / (2 * r)),
        "half an image is none: round up to a whole number": lambda v, h, r: v / (2 * h * r),
        "rounded down, the regret is above the wanted one": lambda v, h, r: math.floor(v / (2 * h * r)),
        "the factor ½ of the parabola is missing": lambda v, h, r: math.ceil(v / (h * r)),
        "v and h are swapped: noisy slopes need more images": lambda v, h, r: math.ceil(h / (2 * v * r)),
        "v / (n h²) is the squared error of λ; its regret is ½ h times that": lambda v, h, r: math.ceil(v / (h**2 * r)),
    }
    return check(function, lambda v, h, r: math.ceil(v / (2 * h * r)), inputs, mistakes)


def check_shrink(function: Callable[[float, float, float, float], float]) -> str:
    """Exercise 3: a client's estimate ``own`` (variance ``s2``) shrunk to the ``centre`` (variance ``t2``, perhaps 0).

    >>> check_shrink(lambda own, s2, centre, t2: (s2 * own + t2 * centre) / (s2 + t2))
    'hint: swapped: a noisy own weight (large s2) must count little'
    """
    inputs = [(0.9, 0.04, 0.5, 0.01), (0.1, 0.01, 0.6, 0.09), (0.3, 0.05, 0.7, 0.0)]

    def mixed(own: float, by: float, centre: float, other: float) -> float:
        return (by * own + other * centre) / (by + other)

    mistakes = {
        "swapped: a noisy own weight (large s2) must count little": lambda o, s2, c, t2: mixed(o, s2, c, t2),
        "t2 = 0 says that all clients want the same λ: then the answer is the centre, and 1 / t2 must not appear": (
            lambda o, s2, c, t2: (o / s2 + c / t2) / (1 / s2 + 1 / t2)
        ),
        "you weigh by standard deviations, not variances": lambda o, s2, c, t2: mixed(o, t2**0.5, c, s2**0.5),
        "you square what is a variance already": lambda o, s2, c, t2: mixed(o, t2**2, c, s2**2),
        "that is halfway between the two, however noisy they are": lambda o, s2, c, t2: (o + c) / 2,
        "that is the share the client keeps; use it to mix own and centre": lambda o, s2, c, t2: t2 / (s2 + t2),
    }
    return check(function, lambda o, s2, c, t2: mixed(o, t2, c, s2), inputs, mistakes)


def check_regret(function: Callable[[Tensor, Tensor, float], float]) -> str:
    """Exercise 4: the regret (nats) of λ = ``weight`` on a client's test ``loss`` ``(W,)`` at the ``weights`` ``(W,)``.

    >>> check_regret(lambda weights, loss, weight: loss.min() - loss[(weights - weight).abs().argmin()])
    'hint: the sign: regret is the loss above the lowest, never negative (and the point nearest to λ is not λ)'
    """
    grid = torch.linspace(0, 1, 6, dtype=torch.float64)
    inputs = [
        (grid, torch.tensor([0.9, 0.6, 0.5, 0.58, 0.8, 1.1], dtype=torch.float64), 0.73),
        (grid, torch.tensor([1.4, 1.0, 0.8, 0.7, 0.74, 0.95], dtype=torch.float64), 0.15),
        (torch.tensor([0.0, 0.1, 0.5, 1.0], dtype=torch.float64), torch.tensor([0.3, 0.2, 0.4, 0.9]).double(), 0.25),
    ]

    def between(weights: Tensor, loss: Tensor, weight: float) -> Tensor:
        right = int(torch.searchsorted(weights, weight).clamp(1, len(weights) - 1))
        share = (weight - weights[right - 1]) / (weights[right] - weights[right - 1])
        return (1 - share) * loss[right - 1] + share * loss[right]

    def nearest(weights: Tensor, loss: Tensor, weight: float) -> Tensor:
        return loss[(weights - weight).abs().argmin()]

    mistakes: dict[str, Callable] = {}
    for at, note in ((between, ""), (nearest, " (and the point nearest to λ is not λ)")):
        mistakes |= {
            f"that is the loss over that of λ = ½; regret is over the client's own best λ{note}": (
                lambda w, loss, x, at=at: at(w, loss, x) - at(w, loss, 0.5)
            ),
            f"the sign: regret is the loss above the lowest, never negative{note}": (
                lambda w, loss, x, at=at: loss.min() - at(w, loss, x)
            ),
            f"that is the loss over that of the better model; the lowest may lie between{note}": (
                lambda w, loss, x, at=at: at(w, loss, x) - torch.minimum(loss[0], loss[-1])
            ),
            f"that is the loss itself; take the lowest loss away{note}": lambda w, loss, x, at=at: at(w, loss, x),
        }
    mistakes |= {
        "that is the loss at the nearest point of the grid; λ lies between two of them: go along the straight line": (
            lambda w, loss, x: nearest(w, loss, x) - loss.min()
        ),
        "that is how far λ is from the best λ; regret is what that costs, in nats": (
            lambda w, loss, x: (w[loss.argmin()] - x).abs()
        ),
    }
    return check(function, lambda w, loss, x: between(w, loss, x) - loss.min(), inputs, mistakes)


def check_beats_half(
    setting: Any, trial: Callable[[int], tuple[Tensor, Tensor, Tensor]], seeds: Sequence[int] = (0, 1, 2)
) -> str:
    """The open task: a federation, and a λ from held-out data that has a lower test loss than ½ on every seed.

    ``trial(seed)`` returns each client's λ, test loss (nats) at that λ and test loss at ½, ``(C,)`` each.

    >>> check_beats_half("any setting", lambda seed: (torch.tensor([0.2, 1.2]), torch.ones(2), torch.ones(2)))
    'hint: λ must be in [0, 1]; on seed 0 it goes from 0.20 to 1.20'
    """
    if is_untouched(setting):
        return "not attempted"
    for seed in seeds:
        weight, loss, half = (part.double() for part in trial(seed))
        if weight.shape != half.shape:
            return f"hint: a λ for every client: {tuple(half.shape)}, not {tuple(weight.shape)}"
        if not (0 <= weight.min() and weight.max() <= 1):
            return f"hint: λ must be in [0, 1]; on seed {seed} it goes from {weight.min():.2f} to {weight.max():.2f}"
        if loss.mean() >= half.mean():
            lead = f"½ is better on seed {seed}: {half.mean():.3f} nats, yours has {loss.mean():.3f}"
            return f"hint: {lead}; where is the best λ far from ½?"
    return "correct"
