"""Checkers for the exercises of notebook 07: the mean of a text, confidence, the next token, and options by likelihood.

Each takes a reader's function and returns one line: "not attempted", "correct", or a hint (see ``checking.py``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...federation.text import next_tokens
from .checking import check


def check_mean_pool(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """The mean ``(B, dim)`` over the real tokens of ``hidden`` ``(B, T, dim)``, real where ``mask`` ``(B, T)`` is 1.

    >>> check_mean_pool(lambda hidden, mask: hidden.mean(1))
    'hint: padding counts: divide by the number of real tokens, and leave out what stands behind them'
    """
    draw = torch.Generator().manual_seed(0)
    masks = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    inputs = [(torch.randn(*mask.shape, 3, generator=draw, dtype=torch.float64), mask) for mask in masks]

    def real(hidden, mask):
        return hidden * mask.unsqueeze(-1)

    slips = {
        "padding counts: divide by the number of real tokens, and leave out what stands behind them": (
            lambda hidden, mask: hidden.mean(1)
        ),
        "padding is left out of the sum, and still counted: divide by the number of real tokens": (
            lambda hidden, mask: real(hidden, mask).mean(1)
        ),
        "you divide by the number of real tokens, but padding is still in the sum": (
            lambda hidden, mask: hidden.sum(1) / mask.sum(1, keepdim=True)
        ),
        "that is the sum; the mean divides by the number of real tokens": lambda hidden, mask: real(hidden, mask).sum(
            1
        ),
        "that is the first token": lambda hidden, mask: hidden[:, 0],
        "that divides by the tokens of the whole batch; every text has its own number": (
            lambda hidden, mask: real(hidden, mask).sum(1) / mask.sum()
        ),
    }
    return check(function, lambda hidden, mask: real(hidden, mask).sum(1) / mask.sum(1, keepdim=True), inputs, slips)


def check_overconfidence(function: Callable[[Tensor, Tensor], float]) -> str:
    """How much surer than right a model is: its mean largest probability minus its accuracy, from ``logits`` ``(n, K)``
    and labels ``y`` ``(n,)``.

    >>> check_overconfidence(lambda logits, y: (logits.argmax(1) == y).double().mean())
    'hint: that is the accuracy; take it from the mean of the largest probabilities'
    """
    draw = torch.Generator().manual_seed(1)
    inputs = [
        (2 * torch.randn(n, 4, generator=draw, dtype=torch.float64), torch.randint(4, (n,), generator=draw))
        for n in (6, 9)
    ]

    def accuracy(logits, y):
        return (logits.argmax(1) == y).double().mean()

    def confidence(logits, y):
        return logits.softmax(1).amax(1).mean()

    slips = {
        "that is the accuracy; take it from the mean of the largest probabilities": accuracy,
        "that is the confidence; the accuracy still has to be taken from it": confidence,
        "that is underconfidence: the sign is the other way round": lambda logits, y: (
            accuracy(logits, y) - confidence(logits, y)
        ),
        "logits are no probabilities: softmax first": lambda logits, y: logits.amax(1).mean() - accuracy(logits, y),
        "that is the probability of the right class; a model is sure of what it says, right or wrong": (
            lambda logits, y: logits.softmax(1)[torch.arange(len(y)), y].mean() - accuracy(logits, y)
        ),
        "softmax runs over the classes (dim 1), not over the examples": lambda logits, y: (
            logits.softmax(0).amax(1).mean() - accuracy(logits, y)
        ),
    }
    return check(function, lambda logits, y: confidence(logits, y) - accuracy(logits, y), inputs, slips)


def check_next_tokens(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """The targets of a language model: at each position the token that comes after it, if that is one that counts,
    else -100; from ``ids`` and ``is_answer``, both ``(n, T)``.

    >>> check_next_tokens(lambda ids, is_answer: torch.where(is_answer, ids, -100))
    'hint: every token is its own target: move the targets one place to the left'
    """
    inputs = [
        (torch.tensor([[5, 6, 7, 8]]), torch.tensor([[False, False, True, True]])),
        (torch.tensor([[5, 6, 7], [9, 3, 4]]), torch.tensor([[False, True, True], [True, True, False]])),
    ]

    def own(ids, is_answer):
        return torch.where(is_answer, ids, -100)

    def end(ids):
        return torch.full_like(ids[:, :1], -100)

    slips = {
        "every token is its own target: move the targets one place to the left": own,
        "that is the token before: the other way round": lambda ids, a: torch.cat([end(ids), own(ids, a)[:, :-1]], 1),
        "roll carries the first token to the end, where nothing comes any more: it is -100 there": (
            lambda ids, a: own(ids, a).roll(-1, 1)
        ),
        "the prompt is learnt as well: where the next token is no answer, the target is -100": (
            lambda ids, a: torch.cat([ids[:, 1:], end(ids)], 1)
        ),
        "ask whether the next token is an answer, not whether this one is": lambda ids, a: torch.where(
            a, torch.cat([ids[:, 1:], end(ids)], 1), -100
        ),
        "as many targets as tokens: the last position has -100": lambda ids, a: own(ids, a)[:, 1:],
    }
    return check(function, next_tokens, inputs, slips)


def check_best_option(function: Callable[[Tensor, Tensor], int]) -> str:
    """Which option a language model would choose: that with the highest log-likelihood per token, from the options'
    log-likelihoods ``(K,)``, summed over their tokens, and their numbers of tokens ``(K,)``.

    >>> check_best_option(lambda total, tokens: total.argmax())
    'hint: the sum is lower the longer an option is: divide by the number of tokens first'
    """
    rows = [
        ([-1.3, -3.7, -5.8, -1.0], [4, 1, 6, 2]),
        ([-2.6, -6.0, -5.8, -5.8], [1, 6, 4, 5]),
        ([-2.8, -1.6, -2.0, -3.2], [2, 5, 3, 4]),
    ]
    inputs = [(torch.tensor(total, dtype=torch.float64), torch.tensor(tokens)) for total, tokens in rows]
    slips = {
        "the sum is lower the longer an option is: divide by the number of tokens first": (
            lambda total, tokens: total.argmax()
        ),
        "that is the least likely one": lambda total, tokens: (total / tokens).argmin(),
        "that is the longest option, whatever its likelihood": lambda total, tokens: tokens.argmax(),
        "divide, do not multiply": lambda total, tokens: (total * tokens).argmax(),
        "that is the score itself; the answer is the number of the option": lambda total, tokens: (
            total / tokens
        ).max(),
        "probabilities of whole answers, not of tokens: divide the logarithm, then compare": (
            lambda total, tokens: (total.exp() / tokens).argmax()
        ),
    }
    return check(function, lambda total, tokens: (total / tokens).argmax(), inputs, slips)
