"""Checkers of notebook 05: what is a sample, which methods are on the frontier, what is a fair comparison."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy import stats
from torch import Tensor

from .checking import as_number, check, is_untouched, run

# Two methods on three seeds (rows) and four clients, with wins, losses and ties.
FIRST = torch.tensor([[0.80, 0.90, 0.70, 0.75], [0.60, 0.85, 0.65, 0.70], [0.95, 0.90, 0.75, 0.80]]).double()
SECOND = torch.tensor([[0.70, 0.90, 0.75, 0.70], [0.60, 0.75, 0.60, 0.65], [0.85, 0.95, 0.75, 0.60]]).double()


def _error(samples: Tensor) -> float:
    return float(samples.std() / len(samples) ** 0.5)


def paired_difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Means over the clients (dim 1) first; then the seeds (dim 0) are the samples."""
    seeds = (first - second).mean(1)
    return float(seeds.mean()), _error(seeds)


def _with_error(error: Callable[[Tensor, Tensor], Tensor | float]) -> Callable:
    return lambda first, second: (float((first - second).mean()), float(error(first, second)))


PAIRED_DIFFERENCE_MISTAKES = {
    "that is the unpaired error: it adds the spread of both methods; subtract seed by seed first": (
        _with_error(lambda a, b: (_error(a.mean(1)) ** 2 + _error(b.mean(1)) ** 2) ** 0.5)
    ),
    "you divided by n inside the deviation; the mean was estimated from the same seeds, so it is n - 1 (ddof 1)": (
        _with_error(lambda a, b: (a - b).mean(1).std(correction=0) / len(a) ** 0.5)
    ),
    "you took every client for a sample of its own; clients of one seed share a federated model: average them first": (
        _with_error(lambda a, b: _error((a - b).flatten()))
    ),
    "that is the standard deviation of one seed; that of the mean is smaller by the root of their number": (
        _with_error(lambda a, b: (a - b).mean(1).std())
    ),
    "the difference is first minus second; yours has the other sign": lambda a, b: paired_difference(b, a),
}


def check_paired_difference(function: Callable[[Tensor, Tensor], tuple[float, float]]) -> str:
    """Mean difference of two methods and its standard error over seeds, from two tables ``(seeds, clients)``.

    >>> check_paired_difference(lambda first, second: (float((first - second).mean()), 0.0)).startswith("hint: ")
    True
    """
    inputs = [(FIRST, SECOND), (FIRST[:2, :3], SECOND[1:, :3])]
    return check(function, paired_difference, inputs, PAIRED_DIFFERENCE_MISTAKES)


def frontier(points: Tensor) -> Tensor:
    """Which points ``(megabytes, accuracy)`` no other one beats: none is as good in both and better in one."""
    better = (points[:, None, 0] < points[None, :, 0]) | (points[:, None, 1] > points[None, :, 1])
    return ~(_as_good(points) & better).any(0)


def _as_good(points: Tensor) -> Tensor:
    """Whether the point of the row is as good as that of the column, in both coordinates: ``(N, N)``."""
    return (points[:, None, 0] <= points[None, :, 0]) & (points[:, None, 1] >= points[None, :, 1])


def _keeps_dominated(points: Tensor) -> Tensor:
    cheaper = points[:, None, 0] < points[None, :, 0]
    return ~(cheaper & (points[:, None, 1] > points[None, :, 1])).any(0)


def _drops_ties(points: Tensor) -> Tensor:
    return ~(_as_good(points) & ~torch.eye(len(points), dtype=torch.bool)).any(0)


FRONTIER_MISTAKES = {
    "you keep points that are beaten: as accurate for fewer bytes, or more accurate for as many": (_keeps_dominated),
    "two equal points do not beat each other; one of the two comparisons has to be strict": _drops_ties,
    "you drop every point: each is as good as itself; ask for strictly better in one": lambda p: torch.zeros(len(p)),
    "you prefer more megabytes; fewer are better": lambda points: frontier(points * torch.tensor([-1.0, 1.0])),
    "that is only the most accurate point; a cheaper one may be unbeaten, too": lambda p: p[:, 1] == p[:, 1].max(),
    "those are the beaten ones; the answer is true for the others": lambda points: ~frontier(points),
}


def check_frontier(function: Callable[[Tensor], Tensor]) -> str:
    """Which rows of ``points`` ``(N, 2)``, megabytes and accuracy, no other row beats: a truth value each.

    >>> check_frontier(lambda points: points[:, 1] == points[:, 1].max())
    'hint: that is only the most accurate point; a cheaper one may be unbeaten, too'
    """
    inputs = [
        (torch.tensor([[0.0, 0.70], [3.0, 0.80], [3.0, 0.75], [5.0, 0.80], [7.0, 0.85], [9.0, 0.72]]),),
        (torch.tensor([[2.0, 0.6], [1.0, 0.5], [2.0, 0.6], [4.0, 0.9]]),),  # two equal points
    ]
    return check(function, frontier, inputs, FRONTIER_MISTAKES)


def fair_rounds(budget: int, steps: int, models: int) -> int:
    """Whole rounds within ``budget`` optimiser steps, ``steps`` for each of the ``models`` in every round."""
    return budget // (steps * models)


FAIR_ROUNDS_MISTAKES = {
    "a method that trains two models takes its steps twice in every round": lambda budget, steps, n: budget // steps,
    "more models make a round more expensive, so there are fewer rounds": lambda budget, steps, n: budget * n // steps,
    "a round that is not finished does not count: round down": lambda budget, steps, n: budget / (steps * n),
    "rounded up, the last round exceeds the budget": lambda budget, steps, n: -(-budget // (steps * n)),
}


def check_fair_rounds(function: Callable[[int, int, int], int]) -> str:
    """How many rounds a method may have: ``budget`` optimiser steps, ``steps`` a round for each of ``models`` models.

    >>> check_fair_rounds(lambda budget, steps, models: budget // steps)
    'hint: a method that trains two models takes its steps twice in every round'
    """
    return check(function, fair_rounds, [(180, 5, 1), (180, 5, 2), (100, 7, 2)], FAIR_ROUNDS_MISTAKES)


def share_better(first: Tensor, second: Tensor) -> float:
    """The share of clients, of all seeds, that are more accurate with the first method."""
    return float((first > second).double().mean())


SHARE_BETTER_MISTAKES = {
    "you count ties as wins; a client that is as accurate has gained nothing": lambda a, b: (a >= b).double().mean(),
    "you averaged the clients before you compared: that asks whose mean is higher, not how many gain": (
        lambda a, b: (a.mean(1) > b.mean(1)).double().mean()
    ),
    "you averaged everything before you compared: that asks whose mean is higher, not how many gain": (
        lambda a, b: (a.mean() > b.mean()).double()
    ),
    "that is the share that loses": lambda a, b: (a < b).double().mean(),
    "you count a tie as half a win; here a tie is none": lambda a, b: ((a > b).double() + 0.5 * (a == b)).mean(),
    "that is their number; the answer is the share": lambda a, b: (a > b).sum(),
}


def check_share_better(function: Callable[[Tensor, Tensor], float]) -> str:
    """The share of clients that are more accurate with the first of two methods, from two tables ``(seeds, clients)``.

    >>> check_share_better(lambda first, second: (first >= second).double().mean())
    'hint: you count ties as wins; a client that is as accurate has gained nothing'
    """
    inputs = [(FIRST, SECOND), (SECOND, FIRST), (FIRST, SECOND[[1, 2, 0]])]
    return check(function, share_better, inputs, SHARE_BETTER_MISTAKES)


def power(n: int, deviation: float, size: float) -> float:
    """How often a paired t-test at the 5 % level on n seeds finds a true difference ``size``; differences of single
    seeds are normal with the standard deviation ``deviation``."""
    limit, shift = stats.t.ppf(0.975, n - 1), size / deviation * n**0.5
    return float(stats.nct.sf(limit, n - 1, shift))


def check_seeds_needed(function: Callable[[float, float], int]) -> str:
    """The open task: the smallest number of seeds with a power of 80 %. Two per cent more or less are accepted, as the
    number may come from a simulation.

    >>> check_seeds_needed(lambda deviation, size: 5)
    'hint: deviation 0.01, size 0.01: 5 seeds find the difference in 40 % of the experiments, not in 80 %'
    """
    for deviation, size in ((0.01, 0.01), (0.012, 0.005), (0.03, 0.01)):
        found = run(function, (deviation, size))
        if is_untouched(found):
            return "not attempted"
        given = f"deviation {deviation}, size {size}"
        try:
            number = as_number(found)
        except ValueError as error:
            return f"hint: {error}"
        if not 2 <= number <= 1e6 or number != int(number):
            return f"hint: {given}: a whole number of 2 seeds or more, not {number:g}"
        n = int(number)
        if power(n, deviation, size) < 0.78:
            often = f"{n} seeds find the difference in {power(n, deviation, size):.0%}".replace("%", " %")
            return f"hint: {given}: {often} of the experiments, not in 80 %"
        if n > 2 and power(n - 1, deviation, size) > 0.82:
            often = f"{n - 1} seeds find the difference in {power(n - 1, deviation, size):.0%}".replace("%", " %")
            return f"hint: {given}: {often} of the experiments already"
    return "correct"
