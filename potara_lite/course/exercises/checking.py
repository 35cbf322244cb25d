"""What all checkers share: run a reader's function beside the right one and say one line about it.

The line is ``"not attempted"`` while the stub is as it was (it returns ``...`` or ``None``), ``"correct"``, or a hint.
A typical wrong answer (a *slip*) is itself a function: where the reader's answers are those of a slip, its hint is
given; otherwise the hint says how far off the answer is, and where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from ...checks import shown


def check(
    function: Callable,
    right: Callable,
    inputs: Sequence[tuple],
    slips: Mapping[str, Callable] | None = None,
    accepted: Mapping[str, Callable] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-8,
) -> str:
    """Compare a reader's ``function`` with the ``right`` one on every tuple of arguments in ``inputs``.

    ``slips`` and ``accepted`` are ``{remark: function}``: wrong answers that are recognised, and answers that differ
    from the right one but count as correct. Each of them has to agree with the reader's function on *all* inputs. A
    slip may raise: the reader who makes it gets the same exception. Every function is given its own copies of the
    arguments, so nobody can change what the next one sees.

    >>> slips = {"that is twice the number": lambda x: 2 * x}
    >>> [check(function, abs, [(3,), (-4,)], slips) for function in (lambda x: ..., lambda x: 2 * x, abs)]
    ['not attempted', 'hint: that is twice the number', 'correct']
    >>> check(lambda x: x, abs, [(3,), (-4,)])
    'hint: right on one example of 2, not on f(-4): the answer is 4, yours is -4'
    """

    def agrees(other: Callable) -> bool:
        return not any(difference(a, _run(other, given), rtol, atol) for a, given in zip(answers, inputs))

    answers = [_run(function, given) for given in inputs]
    if all(answer is None or answer is ... or isinstance(answer, NotImplementedError) for answer in answers):
        return "not attempted"
    found = [difference(answer, right(*deepcopy(given)), rtol, atol) for answer, given in zip(answers, inputs)]
    if not any(found):
        return "correct"
    for remark, other in (accepted or {}).items():
        if agrees(other):
            return f"correct ({remark})"
    for hint, slip in (slips or {}).items():
        if agrees(slip):
            return f"hint: {hint}"
    first = next(position for position, text in enumerate(found) if text)
    passed = found.count("")
    if not passed:
        return f"hint: {found[first]}"
    examples = "one example" if passed == 1 else f"{passed} examples"
    return f"hint: right on {examples} of {len(inputs)}, not on {_call(inputs[first])}: {found[first]}"


def difference(answer: Any, right: Any, rtol: float = 1e-5, atol: float = 1e-8) -> str:
    """What is wrong with ``answer``, in words; an empty string if it equals ``right``.

    Numbers and tensors are compared in double precision, dictionaries and tuples entry by entry, strings and truth
    values exactly, exceptions by kind and message.

    >>> difference([1.0, 2.5], torch.tensor([1.0, 2.0]))
    'off by up to 0.5: entry (1,) is 2, yours is 2.5'
    >>> difference({"a": 1}, {"a": 1, "b": 2})
    "an entry is missing: 'b'"
    """
    if isinstance(answer, Exception):
        same = type(answer) is type(right) and str(answer) == str(right)
        return "" if same else f"your function stopped with {type(answer).__name__}: {answer}"
    if answer is None or answer is ...:
        return "" if answer is right else "your function returns nothing here"
    if isinstance(right, Exception):
        return "no exception"
    if isinstance(right, Mapping):
        if not isinstance(answer, Mapping):
            return f"the answer is a dictionary; yours is a {type(answer).__name__}"
        if missing := [name for name in right if name not in answer]:
            return f"an entry is missing: {missing[0]!r}"
        if extra := [name for name in answer if name not in right]:
            return f"an entry that does not belong there: {extra[0]!r}"
        pairs = [(f"entry {name!r}", answer[name], right[name]) for name in right]
    elif isinstance(right, tuple):
        if not isinstance(answer, (tuple, list)) or len(answer) != len(right):
            return f"the answer is {len(right)} things, separated by commas; yours is a {type(answer).__name__}"
        pairs = [(f"part {i}", one, other) for i, (one, other) in enumerate(zip(answer, right))]
    elif isinstance(right, (bool, str)):
        if isinstance(right, bool) and isinstance(answer, torch.Tensor) and answer.numel() == 1:
            answer = answer.item()
        try:
            same = bool(answer == right)
        except Exception:  # of an array, say
            same = False
        return "" if same else f"the answer is {right!r}, yours is {shown(answer)}"
    else:
        return _numeric_difference(answer, right, rtol, atol)
    found = [(place, difference(one, other, rtol, atol)) for place, one, other in pairs]
    return next((f"{place}: {text}" for place, text in found if text), "")


def _numeric_difference(answer: Any, right: Any, rtol: float, atol: float) -> str:
    right = torch.as_tensor(right).detach().double().cpu()
    try:
        value = torch.as_tensor(answer).detach().double().cpu()
    except Exception:  # whatever a reader's answer may be
        kind = "a number" if right.dim() == 0 else f"a tensor of shape {tuple(right.shape)}"
        return f"the answer is {kind}; yours is a {type(answer).__name__}"
    if right.dim() == 0:
        if value.numel() != 1:
            return f"the answer is one number; yours has the shape {tuple(value.shape)}"
        value = value.reshape(())
    if value.shape != right.shape:
        return f"the answer has the shape {tuple(right.shape)}; yours has {tuple(value.shape)}"
    if torch.allclose(value, right, rtol=rtol, atol=atol):
        return ""
    if right.dim() == 0:
        return f"the answer is {float(right):.6g}, yours is {float(value):.6g}"
    gap = (value - right).abs().nan_to_num(torch.inf)
    at = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    return f"off by up to {float(gap[at]):.3g}: entry {at} is {float(right[at]):.6g}, yours is {float(value[at]):.6g}"


def _run(function: Callable, given: tuple) -> Any:
    """The answer, or the exception in its place: whatever a reader's code may raise."""
    try:
        return function(*deepcopy(given))
    except Exception as error:
        return error


def _call(given: tuple) -> str:
    """The call in words, where its arguments are short enough to read."""
    shown = ", ".join(f"{value:.3g}" if isinstance(value, float) else repr(value) for value in given)
    return f"f({shown})" if len(shown) <= 60 else "another one"
