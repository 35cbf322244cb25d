"""From moments to the mixing weight: the closed form, its bound, and the form for more than two models.

With the errors ``e_F`` and ``e_L`` of the two models about the client's own optimum, ``a = E|e_F|²``, ``b = E|e_L|²``
and ``c = E[e_F · e_L]``, the merged model's expected squared error is ``λ² a + (1-λ)² b + 2 λ (1-λ) c``. The paper's
variance-trace bound on the expected loss is β/2 times this; its minimiser is ``λ = (b - c) / (a + b - 2c)``, the
combination of forecasts of Bates & Granger (1969). The weight λ is on the federated model. The other files of this
folder estimate the moments.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import torch
from torch import Tensor

from ..checks import Flag, Numbers, as_numbers, checked, invalid
from ..federation.display import displayed, span


@displayed
@dataclass(frozen=True, eq=False)
class Moments:
    """The second moments ``a`` (federated), ``b`` (local), ``c`` (cross): float64, ``(C,)`` or ``(C, groups)``.

    Degenerate cases have a stated answer. ``weight`` is clipped to [0, 1] (``c > min(a, b)``: the better model
    alone). Where the bound does not curve upwards, ``a + b - 2c <= 1e-9 (a + b)``, it is the end with the smaller
    moment, and ½ if they are equal to 1e-9: the two errors cannot be told apart. An infinite ``a``
    gives 0, an infinite ``b`` 1, both ½. NaN, a negative ``a`` or ``b``, a ``c`` that is infinite while neither of them
    is, and other shapes raise ``ValueError``.

    >>> m = Moments(1.0, 3.0, 0.0)
    >>> float(m.weight), float(m.optimum)
    (0.75, 0.75)
    """

    a: Tensor
    b: Tensor
    c: Tensor

    def __post_init__(self):
        for name in "abc":
            object.__setattr__(self, name, _checked_moment(name, getattr(self, name)))
        if len(shapes := {value.shape for value in (self.a, self.b, self.c) if value.numel() > 1}) > 1:
            raise ValueError(f"moments a, b and c must be of one shape, not {sorted(map(tuple, shapes))}")
        infinite = self.a.isinf() | self.b.isinf()
        if (odd := self.c.isinf() & ((self.c < 0) | ~infinite)).any():
            raise ValueError(f"moment c is infinite for client {int(odd.nonzero()[0, 0])}, and neither a nor b is")

    def _title(self) -> str:
        groups = f", {self.a.shape[1]} groups" if self.a.dim() == 2 else ""
        return f"{len(self.a)} clients{groups}; λ {span(self.weight.flatten().tolist(), 2)}"

    def _columns(self) -> dict[str, Tensor]:
        columns = {"a": self.a, "b": self.b, "c": self.c, "λ": self.weight}
        return {name: column if column.dim() == 1 else column.mean(1) for name, column in columns.items()}

    @property
    def weight(self) -> Tensor:
        """The minimiser of ``bound`` in [0, 1]."""
        a, b, c = self.a, self.b, self.c
        weight = (b - c) / (a + b - 2 * c)
        is_flat = ~(a + b - 2 * c > 1e-9 * (a + b))  # the bound does not curve upwards: the better model, or ½
        is_equal = (a - b).abs() <= 1e-9 * (a + b)
        weight = torch.where(is_flat, torch.where(is_equal, 0.5, (a < b).double()), weight)
        weight = torch.where(a.isinf() | b.isinf(), 0.5 + 0.5 * b.isinf().double() - 0.5 * a.isinf().double(), weight)
        return weight.clamp(0, 1)

    @checked
    def bound(self, weight: Annotated[Tensor | float, Numbers("|W|C G")]) -> Tensor:
        """``λ² a + (1-λ)² b + 2 λ (1-λ) c``: twice the loss bound in units of the smoothness β."""
        weight = torch.as_tensor(weight, dtype=torch.float64)
        try:
            torch.broadcast_shapes(weight.shape, self.a.shape)
        except RuntimeError:
            invalid("weight", f"a number or of shape {tuple(self.a.shape)}, as the moments", weight)
        parts = (weight**2, self.a), ((1 - weight) ** 2, self.b), (2 * weight * (1 - weight), self.c)
        of_a, of_b, of_c = (torch.where(factor == 0, 0.0, factor * moment) for factor, moment in parts)
        return of_a + of_b + of_c

    @property
    def optimum(self) -> Tensor:
        """The bound at ``weight``; ``(ab - c²)/(a + b - 2c)`` inside [0, 1]; never above ``min(a, b)`` for moments
        that exist (``c² <= ab``)."""
        return self.bound(self.weight)


def _checked_moment(name: str, value: Tensor) -> Tensor:
    """A moment in float64, a number as ``(1,)``; it may be infinite, so that it is no argument of type ``Numbers``."""
    try:
        moment = torch.atleast_1d(as_numbers(value).double())
    except ValueError as error:
        raise ValueError(f"moment {name} {error}") from None
    if moment.dim() > 2 or not moment.numel():
        invalid(f"moment {name}", "of shape (C,) or (C, groups)", moment)
    if moment.isnan().any():
        raise ValueError(f"moment {name} is NaN for client {int(moment.isnan().nonzero()[0, 0])}")
    if name != "c" and (moment < 0).any():
        raise ValueError(f"moment {name} is negative for client {int((moment < 0).nonzero()[0, 0])}")
    return moment


@checked
def combination_weights(
    moments: Annotated[Tensor, Numbers("K K|C K K|C G K K")], *, nonnegative: Flag = False
) -> Tensor:
    """The weights ``(..., K)``, adding up to 1, that minimise ``wᵀ M w`` for moment matrices ``(..., K, K)``.

    ``w = M⁻¹1 / (1ᵀM⁻¹1)``; for K = 2 this is the closed form above without its clipping. ``nonnegative`` searches the
    best face of the simplex (all 2^K of them: K is small), which is there for two equal models, too. Raises
    ``ValueError`` for a singular ``M``, with ``nonnegative`` only where no face has a minimum.
    """
    moments = moments.double()
    if not torch.allclose(moments, moments.mT, rtol=1e-6, atol=0):
        invalid("moments", "a symmetric matrix for each client", moments)
    weights = _best_face(moments) if nonnegative else _unconstrained(moments)
    if weights.isnan().any():
        raise ValueError("the moment matrix is singular: two of the models have the same error")
    return weights


def _unconstrained(moments: Tensor) -> Tensor:
    """``M⁻¹1 / (1ᵀM⁻¹1)``; NaN where ``M`` is singular."""
    inverse, failed = torch.linalg.solve_ex(moments, torch.ones(*moments.shape[:-1], 1, dtype=torch.float64))
    inverse = inverse.masked_fill((failed != 0)[..., None, None], torch.nan)
    return (inverse / inverse.sum(-2, keepdim=True)).squeeze(-1)


def _best_face(moments: Tensor) -> Tensor:
    """The unconstrained weights of the subset of models that has the smallest ``wᵀ M w`` with none negative."""
    best = torch.full(moments.shape[:-1], torch.nan, dtype=torch.float64)
    least = torch.full(moments.shape[:-2], torch.inf, dtype=torch.float64)
    models = range(moments.shape[-1])
    for subset in (list(some) for size in models for some in combinations(models, size + 1)):
        weights = torch.zeros_like(best)
        weights[..., subset] = _unconstrained(moments[..., subset, :][..., subset])
        value = torch.einsum("...i,...ij,...j->...", weights, moments, weights)
        is_better = (weights >= 0).all(-1) & (value < least)
        best = torch.where(is_better.unsqueeze(-1), weights, best)
        least = torch.where(is_better, value, least)
    return best
