"""Checkers of notebook 02: barriers, the plane through two models, and the basis of the factors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...adapters.state import Adapter
from .checking import check, is_untouched

LAYER = "layer.lora_{}.weight"
HEAD = "head.weight"

BARRIER_MISTAKES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "that is highest minus lowest; a valley is not a barrier": lambda w, loss: loss.amax() - loss.amin(),
    "you measure from the higher end; measure from the straight line between the two ends": (
        lambda w, loss: loss.amax() - torch.maximum(*_ends(w, loss))
    ),
    "you measure from the mean of the two ends; the line has another height at each weight": (
        lambda w, loss: loss.amax() - sum(_ends(w, loss)) / 2
    ),
    "you take the size of the difference; below the line there is no barrier": (
        lambda w, loss: (loss - _line(w, *_ends(w, loss))).abs().amax()
    ),
    "the line is reversed: at weight 0 it meets the loss at weight 0": (
        lambda w, loss: (loss - _line(1 - w, *_ends(w, loss))).amax()
    ),
    "the ends are where the weight is 0 and 1, not the first and the last point": (
        lambda w, loss: (loss - _line(w, loss[0], loss[-1])).amax()
    ),
}


def check_barrier(function: Callable[[Tensor, Tensor], Tensor | float]) -> str:
    """How far ``loss`` ``(W,)`` rises above the straight line between its ends.

    ``weights`` ``(W,)``: in any order; 0 and 1, the two ends, are among them.

    >>> check_barrier(lambda weights, loss: loss.max() - loss.min())
    'hint: that is highest minus lowest; a valley is not a barrier'
    """
    weights = torch.tensor([0.4, 1.0, 0.1, 0.0, 0.6], dtype=torch.float64)
    hill = torch.tensor([1.9, 2.0, 1.1, 0.8, 2.4], dtype=torch.float64)
    valley = torch.tensor([0.3, 2.0, 0.7, 1.0, 0.5], dtype=torch.float64)
    return check(function, _barrier, [(weights, hill), (weights, valley)], BARRIER_MISTAKES)


def _ends(weights: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    return loss[weights.argmin()], loss[weights.argmax()]


def _line(weights: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return (1 - weights) * start + weights * end


def _barrier(weights: Tensor, loss: Tensor) -> Tensor:
    return (loss - _line(weights, *_ends(weights, loss))).amax()


SHRINK_MISTAKES: dict[str, Callable[[float, float], float]] = {
    "that is cos θ whatever the weight is; at weight 0 or 1 nothing shrinks": lambda w, angle: math.cos(angle),
    "that is cos(θ/2), the shrinkage of one factor at weight ½; there are two": lambda w, angle: math.cos(angle / 2),
    "that is right at weight ½ only; keep the weight in the formula": lambda w, angle: math.cos(angle / 2) ** 2,
    "that is one factor; the product has two, so multiply": lambda w, angle: math.sqrt(_shrink(w, angle)),
    "the angle is in radians; you read it as degrees": lambda w, angle: _shrink(w, math.radians(angle)),
    "a factor 2 is missing: there are two cross terms": lambda w, angle: 1 - w * (1 - w) * (1 - math.cos(angle)),
}


def check_shrink(function: Callable[[float, float], float]) -> str:
    """By what factor ``B A`` shrinks if its factors are mixed, at ``weight``, with those turned by ``angle`` (radians).

    >>> check_shrink(lambda weight, angle: math.cos(angle / 2) ** 2)
    'hint: that is right at weight ½ only; keep the weight in the formula'
    """
    inputs = [(0.5, 1.0), (0.25, 2.0), (0.8, math.pi), (0.3, 0.4)]
    return check(function, _shrink, inputs, SHRINK_MISTAKES)


def _shrink(weight: float, angle: float) -> float:
    return 1 - 2 * weight * (1 - weight) * (1 - math.cos(angle))


PLANE_POINT_MISTAKES: dict[str, Callable[[Adapter, Adapter, float, float], Adapter]] = {
    "your two weights add up to 1; x and y are independent": lambda F, L, x, y: _plane_point(F, L, x, 1 - x),
    "you scale A and B, so the deltas are multiplied by x² and y²; scale one of the factors": (
        lambda F, L, x, y: _stacked(F, L, (x, y), (x, y), (x, y))
    ),
    "the head is missing: it is directly trained, and part of the model": (
        lambda F, L, x, y: {n: t for n, t in _plane_point(F, L, x, y).items() if n != HEAD}
    ),
    "the head is not scaled: it is x · F's + y · L's": lambda F, L, x, y: _stacked(F, L, (1, 1), (x, y), (1, 1)),
    "you mix the factors: that has cross terms; stack the ranks": (
        lambda F, L, x, y: {name: x * F[name] + y * L[name] for name in F}
    ),
    "you exchange x and y: x belongs to F and y to L": lambda F, L, x, y: _plane_point(F, L, y, x),
}


def check_plane_point(function: Callable[[Adapter, Adapter, float, float], Adapter]) -> str:
    """The adapter whose change is ``x`` times that of ``F`` plus ``y`` times that of ``L``, by stacking ranks.

    ``F`` and ``L``: ``layer.lora_A.weight`` ``(r, in)``, ``layer.lora_B.weight`` ``(out, r)`` and ``head.weight``. What
    counts is the product of the answer's factors and its head, not in which of the factors x and y are.

    >>> check_plane_point(lambda F, L, x, y: {name: x * F[name] + y * L[name] for name in F})
    'hint: you mix the factors: that has cross terms; stack the ranks'
    """
    draw = torch.Generator().manual_seed(0)

    def adapter() -> Adapter:
        shapes = {LAYER.format("A"): (2, 5), LAYER.format("B"): (4, 2), HEAD: (3, 4)}
        return {name: torch.randn(s, generator=draw, dtype=torch.float64) for name, s in shapes.items()}

    inputs = [(adapter(), adapter(), x, y) for x, y in ((0.5, 0.25), (-0.5, 1.5))]
    mistakes = {hint: _changes(mistake) for hint, mistake in PLANE_POINT_MISTAKES.items()}
    return check(_changes(function), _changes(_plane_point), inputs, mistakes)


def _stacked(F: Adapter, L: Adapter, on_A: tuple, on_B: tuple, on_head: tuple) -> Adapter:
    """The ranks of ``F`` and ``L`` stacked, with a weight of each of them on ``A``, on ``B`` and on the head."""
    a, b = LAYER.format("A"), LAYER.format("B")
    return {
        a: torch.cat([on_A[0] * F[a], on_A[1] * L[a]]),
        b: torch.cat([on_B[0] * F[b], on_B[1] * L[b]], dim=1),
        HEAD: on_head[0] * F[HEAD] + on_head[1] * L[HEAD],
    }


def _plane_point(F: Adapter, L: Adapter, x: float, y: float) -> Adapter:
    return _stacked(F, L, (1, 1), (x, y), (x, y))


def _changes(function: Callable) -> Callable:
    """The same function, with the factors of its adapter multiplied; an answer that is no adapter stays as it is."""

    def run(*given):
        answer = function(*given)
        a, b = LAYER.format("A"), LAYER.format("B")
        if not isinstance(answer, dict) or not {a, b} <= answer.keys():
            return answer
        others = {name: tensor for name, tensor in answer.items() if name not in (a, b)}
        return {"the product of the factors": answer[b] @ answer[a]} | others

    return run


CHANGE_BASIS_MISTAKES: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "M stands on both sides, so the product is B M M A; undo on A what you do to B": lambda B, A, M: (B @ M, M @ A),
    "Mᵀ is M⁻¹ for a rotation only; for 2·I it is not": lambda B, A, M: (B @ M, M.T @ A),
    "the inverse belongs to A; B is multiplied by M itself": lambda B, A, M: (B @ torch.linalg.inv(M), M @ A),
    "only B has changed; the model is then another one": lambda B, A, M: (B @ M, A),
    "nothing has changed": lambda B, A, M: (B, A),
    "B comes first in the answer": lambda B, A, M: (torch.linalg.inv(M) @ A, B @ M),
}


def check_change_basis(function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> str:
    """The factors ``(B M, M⁻¹ A)`` of the same product, for ``B`` ``(out, r)``, ``A`` ``(r, in)`` and ``M`` ``(r, r)``.

    >>> check_change_basis(lambda B, A, M: (B @ M, M.T @ A))
    'hint: Mᵀ is M⁻¹ for a rotation only; for 2·I it is not'
    """
    draw = torch.Generator().manual_seed(0)
    B, A = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((4, 2), (2, 5)))
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    scale, skew = 2 * torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 2.0], [0.5, 3.0]], dtype=torch.float64)
    return check(function, _change_basis, [(B, A, M) for M in (turn, scale, skew)], CHANGE_BASIS_MISTAKES)


def _change_basis(B: Tensor, A: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    return B @ M, torch.linalg.inv(M) @ A


def check_broken(results: tuple[Tensor, Tensor]) -> str:
    """Barriers ``(C,)`` above 0.1 nats for half of the clients, between F and local models of accuracy ``(C,)`` 0.65.

    >>> check_broken((torch.tensor([0.3, 0.0]), torch.tensor([0.5, 0.6])))
    'hint: your local models have a mean accuracy of 0.55; 0.65 is wanted'
    """
    if is_untouched(results):
        return "not attempted"
    barriers, accuracy = results
    if (mean := float(accuracy.mean())) < 0.65:
        return f"hint: your local models have a mean accuracy of {mean:.2f}; 0.65 is wanted"
    if (broken := int((barriers > 0.1).sum())) < len(barriers) / 2:
        return f"hint: {broken} of {len(barriers)} clients have a barrier above 0.1 nats"
    return "correct"
