"""Checkers for the notebooks' exercises: each takes a reader's function and says one line about it.

The line is ``"not attempted"`` while the stub is as it was (it returns ``...`` or ``None``), ``"correct"``, or a hint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def check_best_single_weight(function: Callable[[Tensor, Tensor], float]) -> str:
    """Notebook 00: the one mixing weight with the smallest mean loss, from weights ``(W,)`` and losses ``(C, W)``.

    >>> check_best_single_weight(lambda weights, loss: ...)
    'not attempted'
    >>> check_best_single_weight(lambda weights, loss: weights[loss.mean(0).argmax()])
    'hint: that is the weight with the largest mean loss'
    """
    weights = torch.linspace(0, 1, 11)
    # Client 0 is steep and wants 0.2, clients 1 and 2 are flat and want 0.8 and 1: the mean loss is lowest at 0.3.
    loss = torch.stack([4 * (weights - 0.2) ** 2 + 1, 0.4 * (weights - 0.8) ** 2, 0.1 * (weights - 1) ** 2 + 0.5])
    try:
        answer = function(weights.clone(), loss.clone())
    except NotImplementedError:
        return "not attempted"
    except IndexError as error:
        return f"hint: {error}; loss.argmin() counts through all clients, so take the mean over them (dim 0) first"
    except Exception as error:  # whatever a reader's code may raise
        return f"hint: your function stopped with {type(error).__name__}: {error}"
    if answer is None or answer is ...:
        return "not attempted"
    try:
        value = torch.as_tensor(answer, dtype=torch.float64)
    except Exception:  # whatever a reader's answer may be
        return f"hint: the answer is a mixing weight, a number; yours is a {type(answer).__name__}"
    if value.numel() == len(loss):
        return "hint: that is a weight per client; all clients are to share one: average over the clients (dim 0) first"
    if value.numel() != 1:
        return f"hint: the answer is one number; yours has {value.numel()}"
    value, mean = float(value), loss.mean(0)
    best = weights[mean.argmin()]
    slips = {
        "that is the weight with the largest mean loss": weights[mean.argmax()],
        "you averaged the clients' own best weights; average their losses, then look for the lowest": (
            weights[loss.argmin(1)].mean()
        ),
        "that is a position in the grid; the answer is the weight that stands there": mean.argmin(),
        "that is the smallest mean loss; the answer is the weight at which it occurs": mean.min(),
        "that is the weight on the local model; λ is on the federated one": 1 - best,
    }
    if abs(value - best) < 1e-6:
        return _check_again(function)
    for hint, slip in slips.items():
        if abs(value - slip) < 1e-6:
            return f"hint: {hint}"
    return f"hint: on the checker's three curves the mean loss is lowest at {best:.1f}, yours says {value:.3f}"


def _check_again(function: Callable[[Tensor, Tensor], float]) -> str:
    """Another grid, another number of clients: an answer that fits one table by chance is found out."""
    weights = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    loss = torch.tensor([[3.0, 2.0, 1.0, 0.9, 0.7], [1.0, 1.1, 1.2, 2.0, 2.5]])
    try:
        value = float(function(weights, loss))
    except Exception as error:
        return f"hint: right for 3 clients and 11 weights; for 2 clients and 5 weights it stopped with: {error}"
    return "correct" if abs(value - 0.5) < 1e-6 else "hint: right for one table, wrong for another; is something fixed?"
