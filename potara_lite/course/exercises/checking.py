"""What all checkers share: run your function and the right one on the same inputs, and say one line about the answers.

The line is ``"not attempted"`` while the stub is unchanged (it returns ``...`` or ``None``), ``"correct"``, or a hint.
A common mistake is itself a function with a hint: if your answers are the same as its answers, you get its hint.
Otherwise the hint says how far off the answer is, and where.
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
    mistakes: Mapping[str, Callable] | None = None,
    accepted: Mapping[str, Callable] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-8,
) -> str:
    """Compare a reader's ``function`` with the ``right`` one on every tuple of arguments in ``inputs``.

    ``mistakes`` are the common ones, ``{hint: function}``; ``accepted`` are answers that differ from the right one and
    count as correct, ``{remark: function}``. One of them is recognised if the reader's function agrees with it on *all*
    inputs. A mistake may raise an exception: the reader who makes it gets the same one. Every function gets its own
    copies of the arguments, so that none can change what the next one sees.

    >>> mistakes = {"that is twice the number": lambda x: 2 * x}
    >>> [check(function, abs, [(3,), (-4,)], mistakes) for function in (lambda x: ..., lambda x: 2 * x, abs)]
    ['not attempted', 'hint: that is twice the number', 'correct']
    >>> check(lambda x: x, abs, [(3,), (-4,)])
    'hint: right on one example of 2, not on f(-4): the answer is 4, yours is -4'
    """

    def agrees(other: Callable) -> bool:
        return not any(difference(a, run(other, given), rtol, atol) for a, given in zip(answers, inputs))

    answers = [run(function, given) for given in inputs]
    if all(map(is_untouched, answers)):
        return "not attempted"
    found = [difference(answer, right(*deepcopy(given)), rtol, atol) for answer, given in zip(answers, inputs)]
    if not any(found):
        return "correct"
    for remark, other in (accepted or {}).items():
        if agrees(other):
            return f"correct ({remark})"
    for hint, mistake in (mistakes or {}).items():
        if agrees(mistake):
            return f"hint: {hint}"
    first, passed = next(i for i, text in enumerate(found) if text), found.count("")
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
    if isinstance(right, Mapping | tuple):
        return _difference_of_parts(answer, right, rtol, atol)
    if isinstance(right, bool | str):
        return _exact_difference(answer, right)
    return _numeric_difference(answer, right, rtol, atol)


def _difference_of_parts(answer: Any, right: Mapping | tuple, rtol: float, atol: float) -> str:
    if isinstance(right, tuple):
        if not isinstance(answer, tuple | list) or len(answer) != len(right):
            return f"the answer is {len(right)} things, separated by commas; yours is a {type(answer).__name__}"
        pairs = [(f"part {i}", one, other) for i, (one, other) in enumerate(zip(answer, right))]
    elif not isinstance(answer, Mapping):
        return f"the answer is a dictionary; yours is a {type(answer).__name__}"
    else:
        if missing := [name for name in right if name not in answer]:
            return f"an entry is missing: {missing[0]!r}"
        if extra := [name for name in answer if name not in right]:
            return f"an entry that does not belong there: {extra[0]!r}"
        pairs = [(f"entry {name!r}", answer[name], right[name]) for name in right]
    found = [(part, difference(one, other, rtol, atol)) for part, one, other in pairs]
    return next((f"{part}: {text}" for part, text in found if text), "")


def _exact_difference(answer: Any, right: bool | str) -> str:
    if isinstance(right, bool) and isinstance(answer, torch.Tensor) and answer.numel() == 1:
        answer = answer.item()
    try:
        same = bool(answer == right)
    except Exception:  # of an array, say
        same = False
    return "" if same else f"the answer is {right!r}, yours is {shown(answer)}"


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


def is_untouched(answer: Any) -> bool:
    """Whether it is what a stub returns or raises."""
    return answer is None or answer is ... or isinstance(answer, NotImplementedError)


def as_number(answer: Any) -> float:
    """An answer as a number. Raises ``ValueError``, in words for the reader, for one that is none."""
    if isinstance(answer, Exception):
        raise ValueError(f"your function stopped with {type(answer).__name__}: {answer}")
    try:
        return torch.as_tensor(answer).detach().double().cpu().reshape(()).item()
    except Exception:  # whatever a reader's answer may be
        raise ValueError(f"the answer is a number; yours is a {type(answer).__name__}") from None


def run(function: Callable, given: tuple) -> Any:
    """The answer, or the exception instead of it: whatever a reader's code may raise."""
    try:
        return function(*deepcopy(given))
    except Exception as error:
        return error


def _call(given: tuple) -> str:
    """The call in words, if its arguments are short enough to read."""
    arguments = ", ".join(f"{value:.3g}" if isinstance(value, float) else repr(value) for value in given)
    return f"f({arguments})" if len(arguments) <= 60 else "another one"
