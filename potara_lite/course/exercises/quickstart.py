"""Checkers of notebook 00: see ``checking.py`` for what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .checking import check, is_untouched

LEARNT = 1.6  # nats; the loss of a model of ten classes that knows nothing is ln 10 = 2.30


def check_best_single_weight(function: Callable[[Tensor, Tensor], float]) -> str:
    """The one mixing weight with the smallest mean loss, from weights ``(W,)`` and losses ``(C, W)``.

    >>> check_best_single_weight(lambda weights, loss: ...)
    'not attempted'
    >>> check_best_single_weight(lambda weights, loss: weights[loss.mean(0).argmax()])
    'hint: that is the weight with the largest mean loss'
    """
    weights = torch.linspace(0, 1, 11)
    # Client 0 is steep and wants 0.2, clients 1 and 2 are flat and want 0.8 and 1: the mean loss is lowest at 0.3.
    loss = torch.stack([4 * (weights - 0.2) ** 2 + 1, 0.4 * (weights - 0.8) ** 2, 0.1 * (weights - 1) ** 2 + 0.5])
    other = torch.tensor([[3.0, 2.0, 1.0, 0.9, 0.7], [1.0, 1.1, 1.2, 2.0, 2.5]])  # another grid, fewer clients

    def best(weights: Tensor, loss: Tensor) -> Tensor:
        return weights[loss.mean(0).argmin()]

    mistakes = {
        "that is the weight with the largest mean loss": lambda weights, loss: weights[loss.mean(0).argmax()],
        "you averaged the clients' own best weights; average their losses, then look for the lowest": (
            lambda weights, loss: weights[loss.argmin(1)].mean()
        ),
        "that is a weight per client; all clients are to share one: average over the clients (dim 0) first": (
            lambda weights, loss: weights[loss.argmin(1)]
        ),
        "loss.argmin() counts through all clients, so take the mean over them (dim 0) first": (
            lambda weights, loss: weights[loss.argmin()]
        ),
        "that is a position in the grid; the answer is the weight that stands there": (
            lambda weights, loss: loss.mean(0).argmin()
        ),
        "that is the smallest mean loss; the answer is the weight at which it occurs": (
            lambda weights, loss: loss.mean(0).min()
        ),
        "that is the weight on the local model; λ is on the federated one": lambda weights, loss: (
            1 - best(weights, loss)
        ),
    }
    inputs = [(weights, loss), (torch.linspace(0, 1, 5), other)]
    return check(function, best, inputs, mistakes)


def check_no_gain(losses: Mapping[str, float]) -> str:
    """A federation in which λ = ½ has no lower mean loss than the better of its two models, and both have learnt.

    ``losses``: ``{"federated": ..., "local": ..., "merged": ...}``, mean test losses in nats of ten classes.

    >>> check_no_gain({"federated": 0.7, "local": 0.8, "merged": 0.6})
    'hint: the merge still has the lowest loss, by 0.100 nats'
    """
    if is_untouched(losses):
        return "not attempted"
    if not isinstance(losses, Mapping) or losses.keys() != {"federated", "local", "merged"}:
        return "hint: the losses are a dictionary with the keys 'federated', 'local' and 'merged'"
    if not all(0 <= loss < LEARNT for loss in losses.values()):
        return (
            f"hint: a model that has learnt something has a loss below {LEARNT:.2f} nats; ten kinds at random give 2.30"
        )
    gain = min(losses["federated"], losses["local"]) - losses["merged"]
    return "correct" if gain <= 0 else f"hint: the merge still has the lowest loss, by {gain:.3f} nats"
