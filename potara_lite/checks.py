"""The door: what a public function is given is checked once, by the argument's name, before anything is computed.

A name means the same wherever it is asked for, so a check belongs to the name: ``PLAIN`` has those of numbers, flags
and names, ``stacks.py`` those of tensors and of what has to fit together. ``@door()`` puts them in front of a function,
``@door(name=check)`` says what a name means here instead, ``check_fields`` does the same for a dataclass. A check is a
function of the name, the value and the arguments checked before; it returns the value as the function wants it (an
``int`` for one of numpy's) or raises ``ValueError`` in one line: the name, what it must be, what was given. Loops
inside the library call ``unchecked(function)``.

This file imports nothing heavy, because ``setting.py`` does not.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import wraps
from inspect import Parameter, signature
from math import inf
from numbers import Integral, Real
from typing import Any

Check = Callable[[str, Any, Mapping[str, Any]], Any]
LARGEST = 2**63 - 1  # of a size in torch, and of a seed that torch's and numpy's generators both take
FLOAT32 = 1.2e-38, 3.4e38  # what is smaller or larger is 0 or infinite there


def shown(value: object) -> str:
    """A value in one short line: of a tensor or a table, what it is and its shape."""
    if shape := tuple(getattr(value, "shape", ())):
        kind = str(getattr(value, "dtype", "")).removeprefix("torch.")
        return f"{type(value).__name__} of shape {shape}{kind and ' and '}{kind}"
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse(name: str, expected: str, value: object) -> None:
    """Raise the ``ValueError`` that says so."""
    raise ValueError(f"{name} must be {expected}, not {shown(value)}")


def whole(least: int | None = 0, most: int = LARGEST) -> Check:
    """A whole number, of Python or numpy, in these bounds."""

    def check(name: str, value: Any, given: Mapping[str, Any]) -> int:
        if not isinstance(value, Integral) or isinstance(value, bool):
            refuse(name, "a whole number", value)
        if least is not None and value < least:
            refuse(name, f"at least {least}", value)
        if value > most:
            refuse(name, f"at most {most}", value)
        return int(value)

    check.__doc__ = "A whole number in its bounds."
    return check


def real(expected: str, holds: Callable[[float], bool], *, finite: bool = True) -> Check:
    """A number, of Python or numpy, for which ``holds``: never NaN, infinite only if not ``finite``, and else one that
    float32 holds."""

    def check(name: str, value: Any, given: Mapping[str, Any]) -> float:
        if not isinstance(value, Real) or isinstance(value, bool):
            refuse(name, "a number", value)
        number = value if type(value) in (int, float) else float(value)
        if not holds(number):  # NaN holds nothing
            refuse(name, expected, value)
        if finite and abs(number) == inf:
            refuse(name, "finite", value)
        if 0 < abs(number) < FLOAT32[0] or FLOAT32[1] < abs(number) < inf:
            refuse(name, f"in the range of float32 ({FLOAT32[0]} to {FLOAT32[1]})", value)
        return number if abs(number) <= LARGEST else float(number)

    check.__doc__ = f"A number, {expected}."
    return check


def flag(name: str, value: Any, given: Mapping[str, Any]) -> bool:
    """True or False."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        refuse(name, "True or False", value)
    return bool(value)


def kind(*names: str) -> Check:
    """An object of one of the classes of these names."""
    expected = " or ".join(f"{'an' if name[0] in 'AEIOU' else 'a'} {name}" for name in names)

    def check(name: str, value: Any, given: Mapping[str, Any]) -> Any:
        if not {one.__name__ for one in type(value).__mro__} & set(names):
            plain = value is None or isinstance(value, str | bytes | int | float) or hasattr(value, "shape")
            raise ValueError(f"{name} must be {expected}, not {shown(value) if plain else type(value).__name__}")
        return value

    check.__doc__ = f"Always {expected}."
    return check


def function(name: str, value: Any, given: Mapping[str, Any]) -> Callable:
    """Something that can be called."""
    if not callable(value):
        refuse(name, "a function", value)
    return value


def several(check: Check, *, least: int = 1, distinct: bool = False) -> Check:
    """A list or another collection of what passes the check, at least so many."""

    def check_all(name: str, value: Any, given: Mapping[str, Any]) -> list:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable) or hasattr(value, "columns"):
            refuse(name, "a list", value)
        if getattr(value, "shape", None) == ():  # of torch and numpy: a number
            refuse(name, "a list", value)
        found = [check(f"{name}[{i}]", one, given) for i, one in enumerate(value)]
        if len(found) < least:
            refuse(name, f"a list of at least {least}", value)
        if distinct and len(set(found)) < len(found):
            raise ValueError(f"{name}: every one counts once, unlike in {shown(found)}")
        return found

    check_all.__doc__ = f"A list, of each: {check.__doc__}"
    return check_all


def one_or_several(check: Check) -> Check:
    """What passes the check, or a list of it."""
    many = several(check)

    def check_either(name: str, value: Any, given: Mapping[str, Any]) -> Any:
        return (many if isinstance(value, Iterable) and not isinstance(value, str) else check)(name, value, given)

    return check_either


def device(name: str, value: Any, given: Mapping[str, Any]) -> Any:
    """A device of torch, or its name."""
    import torch

    found = kind("str", "device")(name, value, given)
    try:
        torch.device(found)
    except RuntimeError:
        refuse(name, "a device of torch", value)
    return found


def optional(check: Check) -> Check:
    """What passes the check, or ``None``."""
    return lambda name, value, given: None if value is None else check(name, value, given)


def named(check: Check, *, least: int = 1) -> Check:
    """A dictionary by names of what passes the check."""

    def check_all(name: str, value: Any, given: Mapping[str, Any]) -> Mapping:
        if not isinstance(value, Mapping) or len(value) < least or not all(isinstance(key, str) for key in value):
            refuse(name, "a dictionary by names", value)
        return {key: check(f"{name}[{key!r}]", one, given) for key, one in value.items()}

    return check_all


def table(*columns: str) -> Check:
    """A table of pandas with rows and these columns."""

    def check(name: str, value: Any, given: Mapping[str, Any]) -> Any:
        found = kind("DataFrame")(name, value, given)
        if missing := [column for column in columns if column not in found]:
            raise ValueError(f"{name} must have a column {missing[0]!r}, not only {shown(list(found.columns))}")
        if not len(found):
            refuse(name, "a table with rows", found)
        return found

    check.__doc__ = "A table with its columns."
    return check


def options_of(function: Callable, **checks: Check) -> Check:
    """Keyword arguments that another function will get: it must know them, and its checks are theirs."""
    parameters, table = signature(function).parameters, {**PLAIN, **getattr(function, "checks", {}), **checks}

    def check(name: str, value: dict, given: Mapping[str, Any]) -> dict:
        open_ended = any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())
        if unknown := [] if open_ended else sorted(value.keys() - parameters.keys()):
            known = ", ".join(one for one in parameters if one not in given)
            raise ValueError(f"{unknown[0]} is no option here: there are {known}")
        return checked(value, parameters, table, given)

    return check


finite = real("finite", lambda x: x == x)
positive = real("positive", lambda x: x > 0)
positive_or_infinite = real("positive", lambda x: x > 0, finite=False)
not_negative = real("at least 0", lambda x: x >= 0)
fraction = real("in [0, 1]", lambda x: 0 <= x <= 1)
share = real("in (0, 1]", lambda x: 0 < x <= 1)
text = kind("str")
path = kind("str", "Path")
seed = whole(0)
seeds = several(seed, distinct=True)

MEANINGS: tuple[tuple[Check, str], ...] = (
    (whole(0), "steps rounds local_steps round_steps start number up down finetune_steps"),
    (whole(1), "clients rank batch_size train_size calibration_size test_size classes max_length longest size"),
    (whole(1), "chunk_size per_client union_size models"),
    (whole(2), "points"),
    (seed, "seed sample_labels"),
    (positive, "lr clip lr_scale federated_lr_scale local_lr_scale spread probe"),
    (real("a positive number", lambda x: x > 0, finite=False), "memory_bytes"),
    (positive_or_infinite, "alpha prior_spread"),
    (not_negative, "weight_decay damping prior mu strength rounds_scale noise_multiplier std"),
    (fraction, "head_share off_diagonal wise_ft_weight"),
    (share, "participation density"),
    (real("in [0, 1)", lambda x: 0 <= x < 1), "drop"),
    (finite, "coefficient"),
    (flag, "shift domains keep_optimizer progress unbiased cross_fit relative on_delta parabola download nonnegative"),
    (flag, "adaptive broadcast_to_all local_from_federated vectorize compile"),
    (text, "name method score dataset data until prompt answer task"),
    (path, "folder root checkpoint name_or_path"),
    (device, "device"),
    (function, "merge objective prepare eval_split by tokenizer estimator pair_of estimate loss"),
    (kind("AdaptedBackbone"), "adapted"),
    (kind("Federation"), "federation"),
    (kind("Setting"), "setting"),
    (kind("Execution"), "execution"),
    (kind("Privacy"), "privacy"),
    (kind("Trial"), "trial"),
    (kind("Algorithm"), "algorithm"),
    (kind("Module"), "network"),
    (kind("Generator"), "rng"),
    (seeds, "seeds"),
)
PLAIN: dict[str, Check] = {name: check for check, names in MEANINGS for name in names.split()}


def checked(
    values: Mapping[str, Any], parameters: Mapping[str, Parameter], checks: Mapping[str, Check], given: Mapping = {}
) -> dict:
    """The values, each as its check returns it; ``None`` passes where it is the default."""
    known = dict(given)
    for name, value in values.items():
        optional = name in parameters and parameters[name].default is None
        known[name] = value if name not in checks or (value is None and optional) else checks[name](name, value, known)
    return {name: known[name] for name in values}


def door(**checks: Check) -> Callable[[Callable], Callable]:
    """A decorator: the function with the checks of its arguments in front, those of ``PLAIN`` or these.

    The function itself, for what is already behind a door, is ``unchecked`` of it.
    """
    table = PLAIN | checks

    def decorate(inside: Callable) -> Callable:
        meaning = signature(inside)

        @wraps(inside)
        def outside(*args, **kwargs):
            call = meaning.bind(*args, **kwargs)
            call.arguments = checked(call.arguments, meaning.parameters, table)
            return inside(*call.args, **call.kwargs)

        outside.checks = {name: table[name] for name in meaning.parameters if name in table}
        return outside

    return decorate


def unchecked(function: Callable) -> Callable:
    """The function behind its door, for loops whose arguments were checked before."""
    return getattr(function, "__wrapped__", function)


def check_fields(one: object, **checks: Check) -> None:
    """Check the fields of a (frozen) dataclass, as ``door`` does the arguments of a function."""
    table, parameters = PLAIN | checks, signature(type(one)).parameters
    values = {field.name: getattr(one, field.name) for field in fields(one) if field.init}
    for name, value in checked(values, parameters, table).items():
        object.__setattr__(one, name, value)
