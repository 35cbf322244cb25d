"""Checkers for notebook 03: moments, their metric, and the weights they ask for.

A notation shared by all: ``a`` and ``b`` are the second moments of the federated and the local model's error, ``c`` is
their cross moment, and a weight is on the federated model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checking import check


def check_weight_from_distance(function: Callable[[float, float, float], float]) -> str:
    """Exercise 1: the weight in [0, 1] from ``a``, ``b`` and the distance ``E|θ_F - θ_L|²``, all numbers.

    >>> check_weight_from_distance(lambda a, b, distance: b / (a + b))
    'hint: b / (a + b) takes the errors for uncorrelated, c = 0; find c from the distance'
    """
    inputs = [(0.7, 1.3, 1.6), (0.2, 0.1, 0.25), (1.0, 0.2, 0.35), (0.3, 1.2, 0.4)]  # inside twice, below 0, above 1

    def within(formula: Callable) -> Callable:
        return lambda *given: min(max(formula(*given), 0.0), 1.0)

    def weight(a: float, b: float, distance: float) -> float:
        return (b - a + distance) / (2 * distance)

    def one_c(a: float, b: float, distance: float) -> float:
        c = (a + b - distance) / 2
        return (b - c) / (a + b - c)

    def whole_c(a: float, b: float, distance: float) -> float:
        return (b - (a + b - distance)) / distance

    def local(a: float, b: float, distance: float) -> float:
        return 1 - weight(a, b, distance)

    slips = {
        "that is the weight on the local model; λ is on the federated one": local,
        "the denominator is a + b - 2c, which is the distance itself; yours has only one c": one_c,
        "b / (a + b) takes the errors for uncorrelated, c = 0; find c from the distance": lambda a, b, _: b / (a + b),
        "b / distance leaves c out of the numerator b - c": lambda a, b, distance: b / distance,
        "the distance is a + b - 2c, so c is half of a + b - distance": whole_c,
    }
    known = {"the formula is right, but the weight must stay in [0, 1]: what if c > min(a, b)?": weight} | slips
    known |= {f"{hint} (the clipping is right)": within(slip) for hint, slip in slips.items()}
    return check(function, within(weight), inputs, known)


def check_second_moment(function: Callable[[Tensor], float]) -> str:
    """Exercise 2: the mean squared length of the errors ``(R, P)`` of R repetitions.

    >>> check_second_moment(lambda errors: errors.var(0, unbiased=False).sum())
    'hint: that is the variance about the mean of the errors; the bias is lost. Do not subtract the mean'
    """
    random = torch.Generator().manual_seed(3)
    inputs = [
        (torch.randn(5, 4, generator=random, dtype=torch.float64) + 0.7,),
        (torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64),),
    ]
    mean = "that is the variance about the mean of the errors; the bias is lost. Do not subtract the mean"
    slips = {
        mean: lambda e: e.var(0, unbiased=False).sum(),
        f"{mean} (nor divide by R - 1)": lambda e: e.var(0).sum(),
        "that is the sum over the repetitions; an expectation is their mean": lambda e: e.square().sum(),
        "that is the mean over repetitions and coordinates; a squared length sums over the coordinates": (
            lambda e: e.square().mean()
        ),
        "that is the square of the mean length; square each length first, then take the mean": (
            lambda e: e.norm(dim=1).mean() ** 2
        ),
        "that is the squared length of the mean error, the bias alone; the variance is missing": (
            lambda e: e.mean(0).square().sum()
        ),
        "that is the mean length; the moment is the mean of the squared length": lambda e: e.norm(dim=1).mean(),
    }
    return check(function, lambda e: e.square().sum(1).mean(), inputs, slips)


def check_metric_moments(function: Callable[[Tensor, Tensor, Tensor], tuple]) -> str:
    """Exercise 3: ``a``, ``b``, ``c`` in the metric ``H`` ``(P, P)`` from the errors ``(R, P)`` of both models.

    Half of each, as in the loss, is accepted: the weight is the same.

    >>> identity = lambda e_F, e_L, H: tuple((u * v).sum(1).mean() for u, v in ((e_F, e_F), (e_L, e_L), (e_F, e_L)))
    >>> check_metric_moments(identity)
    'hint: those are the moments in the identity metric; H is missing'
    """
    random = torch.Generator().manual_seed(4)
    inputs = []
    for repetitions, size in ((6, 3), (4, 2)):
        e_f, e_l, root = (
            torch.randn(rows, size, generator=random, dtype=torch.float64) for rows in (repetitions, repetitions, size)
        )
        inputs.append((e_f + 0.5, e_l, root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)))

    def moments(e_f: Tensor, e_l: Tensor, metric: Tensor) -> tuple[Tensor, ...]:
        return tuple(((u @ metric) * v).sum(1).mean() for u, v in ((e_f, e_f), (e_l, e_l), (e_f, e_l)))

    def centred(e_f: Tensor, e_l: Tensor, metric: Tensor) -> tuple[Tensor, ...]:
        return moments(e_f - e_f.mean(0), e_l - e_l.mean(0), metric)

    def summed(e_f: Tensor, e_l: Tensor, metric: Tensor) -> tuple[Tensor, ...]:
        return tuple(len(e_f) * moment for moment in moments(e_f, e_l, metric))

    slips = {
        "you take the diagonal of H only; eᵀ H e has the products of different coordinates as well": (
            lambda e_f, e_l, metric: moments(e_f, e_l, metric.diagonal().diag())
        ),
        "H is in it twice: the moment is eᵀ H e, not the squared length of H e": (
            lambda e_f, e_l, metric: moments(e_f, e_l, metric @ metric)
        ),
        "those are the moments in the identity metric; H is missing": (
            lambda e_f, e_l, metric: moments(e_f, e_l, torch.eye(len(metric), dtype=metric.dtype))
        ),
        "you subtract the mean errors; the bias is lost": centred,
        "those are sums over the repetitions; an expectation is their mean": summed,
        "the order is a (federated), b (local), c (cross)": lambda e_f, e_l, metric: moments(e_l, e_f, metric),
    }
    half = {"the ½ is the loss's; it leaves the weight as it is": lambda *given: tuple(m / 2 for m in moments(*given))}
    return check(function, moments, inputs, slips, half)


def check_three_models(function: Callable[[Tensor], Tensor]) -> str:
    """Exercise 4: the weights ``(K,)``, adding up to 1, that minimise ``wᵀ M w`` for a moment matrix ``(K, K)``.

    >>> check_three_models(lambda M: (1 / M.diagonal()) / (1 / M.diagonal()).sum())
    'hint: one over the diagonal takes the errors for uncorrelated; solve M w = 1 with the whole matrix'
    """
    inputs = [
        (torch.tensor([[1.0, 0.3, 0.2], [0.3, 0.8, 0.1], [0.2, 0.1, 1.5]], dtype=torch.float64),),
        (torch.tensor([[2.0, 0.9, 0.1], [0.9, 0.6, 0.2], [0.1, 0.2, 1.0]], dtype=torch.float64),),  # one is negative
    ]

    def solved(moments: Tensor) -> Tensor:
        return torch.linalg.solve(moments, torch.ones(len(moments), dtype=moments.dtype))

    def scaled(weights: Tensor) -> Tensor:
        return weights / weights.sum()

    negative = "the weights are right, save that a negative one was set to 0: here they may be negative"
    slips = {
        "M⁻¹1 is right, but the weights must add up to 1: divide by their sum": solved,
        "one over the diagonal takes the errors for uncorrelated; solve M w = 1 with the whole matrix": (
            lambda moments: scaled(1 / moments.diagonal())
        ),
        "those are the row sums of M; the weights are the row sums of its inverse": lambda m: scaled(m.sum(1)),
        "one over the row sums of M is not its inverse; solve M w = 1": lambda moments: scaled(1 / moments.sum(1)),
        "M.inverse() is a matrix; multiply it with a vector of ones": lambda moments: moments.inverse(),
        "1 / M divides entry by entry; the inverse matrix is torch.linalg.inv(M)": (
            lambda moments: scaled((1 / moments).sum(1))
        ),
        negative: lambda moments: scaled(solved(moments).clamp_min(0)),
    }
    return check(function, lambda moments: scaled(solved(moments)), inputs, slips)
