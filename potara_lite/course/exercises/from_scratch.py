"""Checkers of notebook 00b: the merge of several models, combined estimates, and hospitals that differ more."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .checking import check, is_untouched


def check_merge_many(function: Callable[[list[Tensor], list[Tensor], list[float]], tuple[Tensor, Tensor]]) -> str:
    """Exercise 1: factors ``A`` and ``B`` of the mixture of several LoRA layers, ``A_k`` ``(r, in)``, ``B_k``
    ``(out, r)``, with the given weights. What counts is the product ``B A``: the order of the ranks does not.

    >>> check_merge_many(lambda As, Bs, weights: ...)
    'not attempted'
    >>> check_merge_many(lambda As, Bs, weights: (torch.cat(As), torch.cat(Bs, dim=1)))
    'hint: the weights are missing'
    """
    random = torch.Generator().manual_seed(7)

    def factors(*shape: int) -> list[Tensor]:
        return list(torch.randn(3, *shape, generator=random, dtype=torch.float64))

    inputs = [(factors(2, 5), factors(4, 2), [0.5, 0.3, 0.2]), (factors(3, 4), factors(6, 3), [0.1, 0.1, 0.8])]
    mistakes = {
        "return two tensors, A and B": lambda As, Bs, weights: "something else",
        "return A first, then B": lambda As, Bs, weights: "B, A",
        "the weights are missing": lambda As, Bs, weights: stacked(As, Bs),
        "A and B both carry the weight, so the product has its square; put it on one of them": (
            lambda As, Bs, weights: stacked(weighted(As, weights), weighted(Bs, weights))
        ),
        "the factors are averaged; the product of two averages is not the average of the products: stack the ranks": (
            lambda As, Bs, weights: sum(weighted(Bs, weights)) @ sum(weighted(As, weights))
        ),
        "only the first two models are in it": lambda As, Bs, weights: stacked(As[:2], weighted(Bs, weights)[:2]),
    }

    def product(As: list[Tensor], Bs: list[Tensor], weights: list[float]) -> Tensor | str | None:
        answer = function(As, Bs, weights)
        return None if answer is None or answer is ... else _product(answer)

    return check(product, lambda As, Bs, weights: stacked(As, weighted(Bs, weights)), inputs, mistakes)


def weighted(tensors: list[Tensor], weights: list[float]) -> list[Tensor]:
    """Each tensor times its weight."""
    return [weight * tensor for weight, tensor in zip(weights, tensors)]


def stacked(As: list[Tensor], Bs: list[Tensor]) -> Tensor:
    """The product of the stacked factors, which is the sum of the products."""
    return torch.cat(Bs, dim=1) @ torch.cat(As)


def _product(answer: object) -> Tensor | str:
    """``B A`` of an answer ``(A, B)``, or in words what the answer is instead."""
    if not isinstance(answer, tuple | list) or [getattr(part, "ndim", 0) for part in answer] != [2, 2]:
        return "something else"
    A, B = answer
    return "B, A" if A.shape[0] != B.shape[1] and A.shape[1] == B.shape[0] else B @ A


def check_combined(function: Callable[[float, float, float, float], tuple[float, float]]) -> str:
    """Exercise 2: two independent estimates and their variances, combined by precisions, and the standard deviation
    of the combination.

    >>> check_combined(lambda own, s2, mean, t2: ((own / s2 + mean / t2) / (1 / s2 + 1 / t2), 1 / (1 / s2 + 1 / t2)))
    'hint: the second number is the variance; the standard deviation is its root'
    """
    inputs = [(0.9, 0.04, 0.5, 0.01), (0.1, 0.01, 0.6, 0.09), (0.3, 0.05, 0.7, 0.05)]

    def value(own: float, s2: float, mean: float, t2: float) -> float:
        return (t2 * own + s2 * mean) / (s2 + t2)

    def variance(s2: float, t2: float) -> float:
        return s2 * t2 / (s2 + t2)

    mistakes = {
        "the second number is the variance; the standard deviation is its root": (
            lambda o, s2, m, t2: (value(o, s2, m, t2), variance(s2, t2))
        ),
        "swapped: an estimate with a large variance must count little": (
            lambda o, s2, m, t2: (value(m, s2, o, t2), variance(s2, t2) ** 0.5)
        ),
        "you weigh by one over the standard deviation; weigh by one over the variance": (
            lambda o, s2, m, t2: (value(o, s2**0.5, m, t2**0.5), variance(s2, t2) ** 0.5)
        ),
        "the variances do not add up here: the precisions do, and a second estimate makes you more certain": (
            lambda o, s2, m, t2: (value(o, s2, m, t2), (s2 + t2) ** 0.5)
        ),
        "that is the plain mean of the two estimates": lambda o, s2, m, t2: ((o + m) / 2, variance(s2, t2) ** 0.5),
        "the standard deviation is missing: return two numbers": value,
    }
    return check(function, lambda o, s2, m, t2: (value(o, s2, m, t2), variance(s2, t2) ** 0.5), inputs, mistakes)


def check_more_skew(board: Mapping[str, float]) -> str:
    """The mean test losses of section 14, ``{name: nats}``, once the hospitals differ more than in the notebook.

    >>> check_more_skew(...)
    'not attempted'
    """
    if is_untouched(board):
        return "not attempted"
    names = {"L", "F", "paper", "own curve", "½", "pool", "head apart", "oracle"}
    if not isinstance(board, Mapping) or board.keys() != names:
        return f"hint: the losses are a dictionary with the keys {', '.join(sorted(names))}"
    one_weight = [board[name] for name in names - {"oracle", "head apart"}]
    if board["oracle"] > min(one_weight):
        return "hint: the oracle is never above another λ for the whole model; is every line of the same run?"
    if board["L"] >= board["F"] or board["pool"] >= board["½"]:
        return (
            "hint: that looks like hospitals that differ little: there L is not far below F, and the pool level with ½"
        )
    return "correct"
