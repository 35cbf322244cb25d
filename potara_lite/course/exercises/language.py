"""Checkers of notebook 07: the mean of a text, confidence, the next token, options by likelihood, and another pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...federation.text import next_tokens
from .checking import check, is_untouched


def check_mean_pool(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """The mean ``(B, dim)`` over the real tokens of ``hidden`` ``(B, T, dim)``, real where ``mask`` ``(B, T)`` is 1.

    >>> check_mean_pool(lambda hidden, mask: hidden.mean(1))
    'hint: padding counts here: leave it out of the sum, and divide by the number of real tokens'
    """
    draw = torch.Generator().manual_seed(0)
    masks = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    inputs = [(torch.randn(*mask.shape, 3, generator=draw, dtype=torch.float64), mask) for mask in masks]

    def real(hidden, mask):
        return hidden * mask.unsqueeze(-1)

    mistakes = {
        "padding counts here: leave it out of the sum, and divide by the number of real tokens": lambda h, m: h.mean(1),
        "padding still counts in the mean: divide by the number of real tokens": lambda h, m: real(h, m).mean(1),
        "padding is still in the sum: leave it out": lambda h, m: h.sum(1) / m.sum(1, keepdim=True),
        "that is the sum; the mean divides by the number of real tokens": lambda h, m: real(h, m).sum(1),
        "that is the first token": lambda h, m: h[:, 0],
        "you divide by the tokens of the whole batch; each text has its own number": lambda h, m: (
            real(h, m).sum(1) / m.sum()
        ),
    }
    return check(function, lambda h, m: real(h, m).sum(1) / m.sum(1, keepdim=True), inputs, mistakes)


def check_overconfidence(function: Callable[[Tensor, Tensor], float]) -> str:
    """How over-confident a model is: its mean largest probability minus its accuracy, from ``logits`` ``(n, K)``
    and labels ``y`` ``(n,)``.

    >>> check_overconfidence(lambda logits, y: (logits.argmax(1) == y).double().mean())
    'hint: that is the accuracy; subtract it from the mean of the largest probabilities'
    """
    draw = torch.Generator().manual_seed(1)
    inputs = []
    for n in (6, 9):
        logits = 2 * torch.randn(n, 4, generator=draw, dtype=torch.float64)
        inputs.append((logits, torch.randint(4, (n,), generator=draw)))

    def accuracy(logits, y):
        return (logits.argmax(1) == y).double().mean()

    def confidence(logits, y):
        return logits.softmax(1).amax(1).mean()

    mistakes = {
        "that is the accuracy; subtract it from the mean of the largest probabilities": accuracy,
        "that is the confidence; subtract the accuracy": confidence,
        "that is under-confidence: change the sign": lambda z, y: accuracy(z, y) - confidence(z, y),
        "logits are no probabilities: softmax first": lambda z, y: z.amax(1).mean() - accuracy(z, y),
        "that is the probability of the right class; take the largest one, right or wrong": (
            lambda z, y: z.softmax(1)[torch.arange(len(y)), y].mean() - accuracy(z, y)
        ),
        "softmax runs over the classes (dim 1), not over the examples": (
            lambda z, y: z.softmax(0).amax(1).mean() - accuracy(z, y)
        ),
    }
    return check(function, lambda z, y: confidence(z, y) - accuracy(z, y), inputs, mistakes)


def check_next_tokens(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """The targets of a language model: at each position the token that comes after it, if that is one that counts,
    else -100; from ``ids`` and ``is_answer``, both ``(n, T)``.

    >>> check_next_tokens(lambda ids, is_answer: torch.where(is_answer, ids, -100))
    'hint: every token is the target of itself: move the targets one position to the left'
    """
    inputs = [
        (torch.tensor([[5, 6, 7, 8]]), torch.tensor([[False, False, True, True]])),
        (torch.tensor([[5, 6, 7], [9, 3, 4]]), torch.tensor([[False, True, True], [True, True, False]])),
    ]

    def unshifted(ids, is_answer):
        return torch.where(is_answer, ids, -100)

    def after(ids):
        return torch.cat([ids[:, 1:], end(ids)], 1)

    def end(ids):
        return torch.full_like(ids[:, :1], -100)

    mistakes = {
        "every token is the target of itself: move the targets one position to the left": unshifted,
        "that is the token before; the target is the one after": (
            lambda ids, a: torch.cat([end(ids), unshifted(ids, a)[:, :-1]], 1)
        ),
        "roll moves the first token to the end, where no token follows: -100 there": (
            lambda ids, a: unshifted(ids, a).roll(-1, 1)
        ),
        "the prompt is learned as well: where the next token is no answer, the target is -100": lambda ids, a: after(
            ids
        ),
        "ask whether the next token is an answer, not this one": lambda ids, a: torch.where(a, after(ids), -100),
        "as many targets as tokens: the last position has -100": lambda ids, a: unshifted(ids, a)[:, 1:],
    }
    return check(function, next_tokens, inputs, mistakes)


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
    mistakes = {
        "the sum is lower the longer an option is: divide by the number of tokens first": lambda s, n: s.argmax(),
        "that is the least likely one": lambda s, n: (s / n).argmin(),
        "that is the longest option, whatever its likelihood": lambda s, n: n.argmax(),
        "divide, do not multiply": lambda s, n: (s * n).argmax(),
        "that is the score itself; the answer is the number of the option": lambda s, n: (s / n).max(),
        "you divide the probability of the answer; divide its logarithm": lambda s, n: (s.exp() / n).argmax(),
    }
    return check(function, lambda total, tokens: (total / tokens).argmax(), inputs, mistakes)


def check_report(
    function: Callable[..., tuple[Tensor, Tensor]], adapted: Any, first: Any, second: Any, federation: Any
) -> str:
    """The open task: λ on the ``first`` of two stacks, and the gain (nats of test loss) of the merge over the better of
    the two, ``(C,)`` each, by properties that hold for every pair.

    >>> check_report(lambda adapted, first, second, federation: ..., None, None, None, None)
    'not attempted'
    """
    found = function(adapted, first, second, federation)
    if is_untouched(found) or is_untouched(first):
        return "not attempted"
    weight, gain = (torch.as_tensor(part).double() for part in found)
    if not weight.shape == gain.shape == (len(federation),):
        return f"hint: λ and gain have one number for each of the {len(federation)} clients"
    if not (0 <= weight.min() and weight.max() <= 1):
        return "hint: λ must be in [0, 1]"
    y = federation.test.y
    others = replace(federation, test=federation.test.with_labels(torch.where(y < 0, y, (y + 1) % federation.classes)))
    if not torch.allclose(torch.as_tensor(function(adapted, first, second, others)[0]).double(), weight, atol=1e-6):
        return "hint: λ changes with the labels of the test examples; choose it from the calibration examples alone"
    turned, same = (
        [torch.as_tensor(part).double() for part in function(adapted, *pair, federation)]
        for pair in ((second, first), (first, first))
    )
    if not torch.allclose(turned[0], 1 - weight, atol=0.02):
        return "hint: with the two models exchanged, λ must become 1 - λ"
    if not torch.allclose(turned[1], gain, atol=0.01):
        return "hint: with the two models exchanged, the gain must stay: it is over the better of the two"
    if not torch.allclose(same[1], torch.zeros_like(gain), atol=0.001):
        return "hint: a model merged with itself is the same model: its gain is 0"
    return "correct"
