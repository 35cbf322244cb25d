"""Checkers of notebook 04: the Fisher information, the weight it gives, shrinkage, and regret."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checking import check


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


def check_damped_weight(function: Callable[[Tensor, Tensor, Tensor, float], float]) -> str:
    """Exercise 2: λ in [0, 1] from the Fishers of F and L and the correlation, ``(P,)`` each, and a relative damping.

    >>> check_damped_weight(lambda fisher_F, fisher_L, rho, damping: ...)
    'not attempted'
    """
    random = torch.Generator().manual_seed(6)
    inputs = []
    for size_f, size_l, rho, damping in ((1, 1, 0.4, 0.1), (4, 0.2, 0.3, 0.5), (0.1, 3, 0.2, 0.1), (6, 0.5, 1.2, 0.2)):
        fishers = torch.rand(2, 5, generator=random, dtype=torch.float64)
        correlation = (rho * (0.5 + torch.rand(5, generator=random, dtype=torch.float64))).clamp(0, 1)
        inputs.append((size_f * fishers[0], size_l * fishers[1], correlation, damping))

    def weight(var_f: Tensor, var_l: Tensor, rho: Tensor) -> Tensor:
        a, b, c = var_f.sum(), var_l.sum(), (rho * (var_f * var_l).sqrt()).sum()
        return (b - c) / (a + b - 2 * c)

    def ridge(f: Tensor, p: Tensor, damping: float) -> Tensor:
        return damping * (f.mean() + p.mean()) / 2

    def free(f: Tensor, p: Tensor, rho: Tensor, damping: float) -> Tensor:
        return weight(1 / (f + ridge(f, p, damping)), 1 / (p + ridge(f, p, damping)), rho)

    def within(formula: Callable) -> Callable:
        return lambda *given: formula(*given).clamp(0, 1)

    mistakes = {
        "you damp L only; both models get the same δ": lambda f, p, r, d: weight(1 / f, 1 / (p + ridge(f, p, d)), r),
        "you damp F only; both models get the same δ": lambda f, p, r, d: weight(1 / (f + ridge(f, p, d)), 1 / p, r),
        "each model gets a δ of its own there; δ is one number, from the mean of both Fishers": (
            lambda f, p, r, d: weight(1 / (f + d * f.mean()), 1 / (p + d * p.mean()), r)
        ),
        "damping is relative: δ = damping × the mean of both": lambda f, p, r, d: weight(1 / (f + d), 1 / (p + d), r),
        "δ is damping × the mean of both Fishers; yours is with their sum": (
            lambda f, p, r, d: weight(1 / (f + 2 * ridge(f, p, d)), 1 / (p + 2 * ridge(f, p, d)), r)
        ),
        "you take the Fisher for the variance; the variance is one over it": (
            lambda f, p, r, d: weight(f + ridge(f, p, d), p + ridge(f, p, d), r)
        ),
        "the covariance c is missing: the sum of ρ times the root of both": lambda f, p, r, d: free(f, p, 0 * r, d),
        "that is the weight on the local model; λ is on the federated one": lambda *given: 1 - free(*given),
    }
    known = {"the formula is right, but λ must stay in [0, 1]: here c can exceed min(a, b)": free} | mistakes
    known |= {f"{hint} (the clipping is right)": within(mistake) for hint, mistake in mistakes.items()}
    return check(function, within(free), inputs, known)


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
