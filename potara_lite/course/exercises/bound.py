"""Checkers of notebook 03: moments, their metric, and the weights that follow from them.

``a`` and ``b`` are the second moments of the federated and the local model's error, ``c`` is their cross moment, and a
weight is on the federated model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .checking import check, is_untouched, run


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

    mistakes = {
        "that is the weight on the local model; λ is on the federated one": lambda *given: 1 - weight(*given),
        "the denominator is a + b - 2c, which is the distance itself; yours has only one c": (
            lambda a, b, d: (b - (a + b - d) / 2) / (a + b - (a + b - d) / 2)
        ),
        "b / (a + b) takes the errors for uncorrelated, c = 0; find c from the distance": lambda a, b, d: b / (a + b),
        "b / distance leaves c out of the numerator b - c": lambda a, b, d: b / d,
        "the distance is a + b - 2c, so c is half of a + b - distance": lambda a, b, d: (d - a) / d,
    }
    known = {"the formula is right, but the weight must stay in [0, 1]: what if c > min(a, b)?": weight} | mistakes
    known |= {f"{hint} (the clipping is right)": within(mistake) for hint, mistake in mistakes.items()}
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
    mistakes = {
        mean: lambda e: e.var(0, unbiased=False).sum(),
        f"{mean} (nor divide by R - 1)": lambda e: e.var(0).sum(),
        "that is the sum over the repetitions; an expectation is their mean": lambda e: e.square().sum(),
        "that is the mean over all entries; a squared length sums over the coordinates": lambda e: e.square().mean(),
        "that is the square of the mean length; square each length first": lambda e: e.norm(dim=1).mean() ** 2,
        "that is the squared mean error, the bias alone; the variance is missing": lambda e: e.mean(0).square().sum(),
        "that is the mean length; the moment is the mean of the squared length": lambda e: e.norm(dim=1).mean(),
    }
    return check(function, lambda e: e.square().sum(1).mean(), inputs, mistakes)


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

    mistakes = {
        "you take the diagonal of H only; eᵀ H e has the products of different coordinates as well": (
            lambda f, p, H: moments(f, p, H.diagonal().diag())
        ),
        "H is in it twice: the moment is eᵀ H e, not the squared length of H e": lambda f, p, H: moments(f, p, H @ H),
        "those are the moments in the identity metric; H is missing": (
            lambda f, p, H: moments(f, p, torch.eye(len(H), dtype=H.dtype))
        ),
        "you subtract the mean errors; the bias is lost": lambda f, p, H: moments(f - f.mean(0), p - p.mean(0), H),
        "those are sums over the repetitions; an expectation is their mean": (
            lambda f, p, H: tuple(len(f) * moment for moment in moments(f, p, H))
        ),
        "the order is a (federated), b (local), c (cross)": lambda f, p, H: moments(p, f, H),
    }
    half = {"the ½ is the loss's; it leaves the weight as it is": lambda *given: tuple(m / 2 for m in moments(*given))}
    return check(function, moments, inputs, mistakes, half)


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

    mistakes = {
        "M⁻¹1 is right, but the weights must add up to 1: divide by their sum": solved,
        "one over the diagonal takes the errors for uncorrelated; solve M w = 1 with the whole matrix": (
            lambda M: scaled(1 / M.diagonal())
        ),
        "those are the row sums of M; the weights are the row sums of its inverse": lambda M: scaled(M.sum(1)),
        "one over the row sums of M is not its inverse; solve M w = 1": lambda M: scaled(1 / M.sum(1)),
        "M.inverse() is a matrix; multiply it with a vector of ones": lambda M: M.inverse(),
        "1 / M divides entry by entry; the inverse matrix is torch.linalg.inv(M)": lambda M: scaled((1 / M).sum(1)),
        "a negative weight was set to 0: here weights may be negative": lambda M: scaled(solved(M).clamp_min(0)),
    }
    return check(function, lambda moments: scaled(solved(moments)), inputs, mistakes)


def check_metric(
    product: Callable[[Tensor, Tensor], Tensor],
    regrets_with: Callable[[Callable], Mapping[int, float]],
    half: Mapping[int, float],
    shape: tuple[int, ...] = (2, 8, 129, 10),
) -> str:
    """A metric for the moments: one number for each repetition and client, symmetric and positive; with it the
    ``regrets_with`` a ``product``, for each sample size, must be below those of λ = ½, ``half``.

    >>> check_metric(lambda u, v: (u * v).sum((-1, -2)), lambda product: {50: 0.05, 300: 0.0}, {50: 0.02, 300: 0.01})
    'hint: at n = 50 the regret is 0.0500 nats, with λ = ½ it is 0.0200'
    """
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    answer = run(product, (u, v))
    if is_untouched(answer):
        return "not attempted"
    if isinstance(answer, Exception):
        return f"hint: your function stopped with {type(answer).__name__}: {answer}"
    if getattr(answer, "shape", None) != shape[:2]:
        return "hint: one number for each repetition and client: sum over the two last dimensions of u and v"
    if not torch.allclose(answer, product(v, u)):
        return "hint: a metric is symmetric, and yours changes when u and v change places"
    if not (product(u, u) > 0).all():
        return "hint: a metric is positive for u = v: an error costs something"
    for n, found in regrets_with(product).items():
        if found >= half[n]:
            return f"hint: at n = {n} the regret is {found:.4f} nats, with λ = ½ it is {half[n]:.4f}"
    return "correct"
