"""Types of arguments: what a public function says in its signature is checked before anything is computed.

``@checked`` reads the annotations: ``steps: Count, lr: Positive = 1e-3, clip: Positive | None = None``. The types below
are those of numbers, flags, lists and dictionaries; ``adapters/state.py`` has those of tensors and adapters. What one
type cannot say, because it is about two arguments, is a call in the function's body. A value is returned as the
function wants it (an ``int`` for one of numpy's) or refused by a ``ValueError`` of one line: the argument, what it must
be, what was given. pydantic does the work.

This file imports neither torch nor numpy, because ``setting.py`` does not.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, wraps
from inspect import Parameter, Signature, signature
from math import inf, isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, cast

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, validate_call
from pydantic_core import core_schema

if TYPE_CHECKING:
    import pandas as pd
    import torch

T = TypeVar("T")
LARGEST = 2**63 - 1  # of a size in torch, and of a seed that torch's and numpy's generators both take
FLOAT32 = 1.2e-38, 3.4e38  # what is smaller or larger is 0 or infinite there
IN_FLOAT32 = f"in the range of float32 ({FLOAT32[0]} to {FLOAT32[1]})"


def shown(value: object) -> str:
    """A value in one short line: of a tensor or a table, what it is and its shape."""
    if shape := tuple(getattr(value, "shape", ())):
        dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
        return f"{type(value).__name__} of shape {shape}{dtype and ' and '}{dtype}"
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def invalid(name: str, expected: str, value: object) -> NoReturn:
    """Raise the ``ValueError`` that says so; a check of a type leaves the ``name`` empty, its caller adds it."""
    raise ValueError(f"{name} must be {expected}, not {shown(value)}".strip())


# Numbers and flags.


MORE_MEMORY = (
    "out of memory: close other programs, take smaller sizes, raise a limit of addresses (ulimit -v unlimited), "
    "or install torch without CUDA, whose libraries take 3 GB of addresses"
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error, of whatever library and type, says that there is no more memory; an import without memory may
    end in ``SystemError: error return without exception set``."""
    said = r"MemoryError|out of memory|allocate memory|failed to map segment|bad_alloc|without exception set"
    return re.search(said, f"{type(error).__name__}: {error}", re.I) is not None


def _whole(value: Any) -> Any:
    """One of numpy's whole numbers as Python's."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _float(value: Any) -> Any:
    """A real number of Python or numpy as a float."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value
    except OverflowError:
        invalid("", IN_FLOAT32, value)


def _flag(value: Any) -> Any:
    return bool(value) if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_") else value


def _portion(value: Any) -> Any:
    number = _float(_whole(value))
    is_count = isinstance(value, Integral) and isinstance(number, float) and number >= 1
    if not is_count and not (isinstance(number, float) and 0 < number < 1):
        invalid("", BOUNDS["Portion"], value)
    return _whole(value) if is_count else number


def _in_float32(value: float) -> float:
    is_lost = 0 < abs(value) < FLOAT32[0] or FLOAT32[1] < abs(value) < inf
    return invalid("", IN_FLOAT32, value) if is_lost else value


_python = BeforeValidator(_whole)
_real = BeforeValidator(_float)
_float32 = AfterValidator(_in_float32)

Count = Annotated[int, _python, Field(ge=0, le=LARGEST)]
Size = Annotated[int, _python, Field(ge=1, le=LARGEST)]
Seed = Annotated[int, _python, Field(ge=0, le=LARGEST)]
Finite = Annotated[float, _real, _float32, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, _real, _float32, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, _real, _float32, Field(gt=0, allow_inf_nan=False)]
PositiveOrInf = Annotated[float, _real, _float32, Field(gt=0)]
Fraction = Annotated[float, _real, _float32, Field(ge=0, le=1)]
Share = Annotated[float, _real, _float32, Field(gt=0, le=1)]
Probability = Annotated[float, _real, _float32, Field(gt=0, lt=1)]
Portion = Annotated[int | float, PlainValidator(_portion)]
Flag = Annotated[bool, BeforeValidator(_flag)]
BOUNDS = {
    "Count": "a whole number of at least 0",
    "Size": "a whole number of at least 1",
    "Seed": "a whole number of at least 0",
    "Finite": "finite",
    "NonNegative": "at least 0 and finite",
    "Positive": "above 0 and finite",
    "PositiveOrInf": "above 0, may be infinite",
    "Fraction": "in [0, 1]",
    "Share": "in (0, 1]",
    "Probability": "in (0, 1)",
    "Portion": "a whole number of at least 1, or a fraction in (0, 1)",
}


# Lists, dictionaries, tables, paths, devices.


def _as_list(value: Any) -> list:
    is_no_list = isinstance(value, str | bytes | Mapping) or hasattr(value, "columns")
    if is_no_list or not isinstance(value, Iterable) or getattr(value, "shape", None) == ():  # a number of torch
        invalid("", "a list", value)
    return list(value)


def _differ(value: list) -> list:
    if len(set(value)) < len(value):
        raise ValueError(f"must differ, unlike {shown(value)}")
    return value


def _as_named(value: Any) -> Mapping:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        invalid("", "a dictionary by names", value)
    return value


def _by_client(value: Any) -> Any:
    """A list, or a dictionary by names; whole numbers are names, too."""
    is_empty = hasattr(value, "__len__") and getattr(value, "shape", None) != () and not len(value)
    if is_empty or not isinstance(value, Mapping | Iterable) or isinstance(value, str | bytes):
        invalid("", "a list or a dictionary with at least 1 entry", value)
    if not isinstance(value, Mapping):
        return value
    named = {str(key) if isinstance(key, Integral) else key: one for key, one in value.items()}
    return _as_named(named if len(named) == len(value) else value)


def _as_path(value: Any) -> Any:
    return value if isinstance(value, str | Path) else invalid("", "a path", value)


def _device(value: Any) -> Any:
    import torch

    try:
        return (
            value if isinstance(value, str | torch.device) and torch.device(value) else invalid("", "a device", value)
        )
    except RuntimeError:
        invalid("", "a device of torch", value)


def table(*columns: str) -> AfterValidator:
    """In an annotation of a data frame: it has rows and these columns."""

    def check(value: pd.DataFrame) -> pd.DataFrame:
        if missing := [column for column in columns if column not in value]:
            raise ValueError(f"must have a column {missing[0]!r}, not only {shown(list(value.columns))}")
        return value if len(value) else invalid("", "a table with rows", value)

    return AfterValidator(check)


# Tensors of numbers, by their shapes.

_SIZES: ContextVar[dict[str, int]] = ContextVar("sizes")  # of the dimensions of the call that is being checked


@dataclass(frozen=True)
class Numbers:
    """A tensor of finite numbers, in an annotation: ``Annotated[Tensor, Numbers("C W")]``. No dimension is empty.

    ``dims``: a name for each dimension, whose size is the same wherever it stands in one signature; ``...`` at the
    beginning or the end for any further ones, ``|`` between shapes of which one is met. ``least`` and ``most`` are
    bounds; ``most`` may name a dimension and is then its size. A list, an array of numpy or a column of pandas becomes
    a tensor, in float64 or int64.
    """

    dims: str
    whole: bool = False
    least: float | None = None
    most: float | str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def check(self, value: Any) -> torch.Tensor:
        """The tensor. Raises ``ValueError`` for another shape, numbers out of bounds or that are not finite."""
        found = as_numbers(value)
        if not found.numel() or not any(self._has_shape(dims.split(), found.shape) for dims in self.dims.split("|")):
            shapes = [f"({', '.join(dims.split())})" if dims else "()" for dims in self.dims.split("|")]
            sizes = ", ".join(f"{name} = {size}" for name, size in _SIZES.get({}).items() if name in self.dims)
            invalid("", f"numbers of shape {' or '.join(shapes)}{sizes and f' with {sizes}'}", value)
        if not all_finite(found):
            raise ValueError(f"must be finite, {'not' if found.dim() == 0 else 'unlike'} {shown(value)}")
        if self.whole and found.is_floating_point():
            invalid("", "whole numbers", value)
        if not _is_traced(found):
            most = _SIZES.get({}).get(self.most) if isinstance(self.most, str) else self.most
            low, high = (bound.item() for bound in found.detach().aminmax())
            if (self.least is not None and low < self.least) or (most is not None and high > most):
                bounds = f"at least {self.least}" if most is None else f"in [{self.least}, {most}]"
                invalid("", bounds, low if self.least is not None and low < self.least else high)
        return found

    def _has_shape(self, dims: list[str], shape: Sequence[int]) -> bool:
        """Whether it is of these dimensions; sizes that were not known before are remembered."""
        known = _SIZES.get({})
        if "..." in dims:
            shape = shape[-len(dims) + 1 :] if dims[0] == "..." else shape[: len(dims) - 1]
            dims = [name for name in dims if name != "..."]
        found = known | dict(zip(dims, shape))
        if len(shape) != len(dims) or any(known.get(dim, n) != n or found[dim] != n for dim, n in zip(dims, shape)):
            return False
        known.update(found)
        return True


def as_numbers(value: Any) -> torch.Tensor:
    """A tensor as it is, and what a number, a list, an array or a column holds, in float64 or int64.

    Raises ``ValueError`` for what are no real numbers.
    """
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_complex() or value.dtype == torch.bool or "float8" in str(value.dtype) or not is_dense(value):
            invalid("", "real numbers, all of them there", value)
        return value
    try:
        array = np.asarray(value)
        return torch.from_numpy(array.astype({"i": np.int64, "u": np.int64, "f": np.float64}[array.dtype.kind]))
    except (ValueError, TypeError, RuntimeError, KeyError):  # text, objects, rows of different lengths
        invalid("", "numbers", value)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor stores all its numbers: it is not sparse and not on the meta device."""
    return str(tensor.layout) == "torch.strided" and tensor.device.type != "meta"


def _is_traced(tensor: torch.Tensor) -> bool:
    from .compat import is_traced  # which imports torch

    return is_traced(tensor)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite: by their sum, one by one only where that says no."""
    return _is_traced(tensor) or isfinite(tensor.detach().sum().item()) or bool(tensor.isfinite().all())


AnyList = Annotated[Sequence[T], BeforeValidator(_as_list)]
List = Annotated[AnyList[T], Field(min_length=1)]
Named = Annotated[Mapping[str, T], BeforeValidator(_as_named), Field(min_length=1)]
ByClient = Annotated[List[T] | Named[T], BeforeValidator(_by_client)]
Seeds = Annotated[List[Seed], AfterValidator(_differ)]
PathLike = Annotated[str | Path, PlainValidator(_as_path)]
if TYPE_CHECKING:
    Device = str | torch.device
else:
    Device = Annotated[Any, PlainValidator(_device)]


# The decorator.

CONFIG = ConfigDict(arbitrary_types_allowed=True, strict=True)
EXPECTED = {  # by pydantic's type of error; its own words for the others
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "finite",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "True or False",
    "string_type": "a string",
    "callable_type": "a function",
    "unexpected_keyword_argument": "an option of this function",
    "too_short": "a list or a dictionary with at least {min_length} entry",
}


def _message(error: ValidationError, given: Mapping[str, Any]) -> str:
    """What pydantic found, in one line: the argument, what it must be, what was given."""
    errors = error.errors(include_url=False)
    errors = [one for one in errors if one["loc"][0] == errors[0]["loc"][0]]  # of the first wrong argument
    is_list = isinstance(errors[0]["input"], list | tuple)
    found = max(errors[:: -1 if is_list else 1], key=lambda one: len(one["loc"]))  # of a union's, the nearest
    name, inside = str(found["loc"][0]), found["loc"][1:]
    value = given.get(name)
    for part in inside:  # an index, a key, or one of pydantic's names of types
        if isinstance(part, int) or (isinstance(value, Mapping) and part in value):
            name = f"{name}[{part!r}]"
            value = value[part] if isinstance(value, Mapping) else None
    if found["type"] == "value_error":
        return f"{name} {found['ctx']['error']}"
    expected = EXPECTED.get(found["type"], found["msg"].removeprefix("Input should be "))
    given_value = _of_type(found["input"]) if "instance of" in found["msg"] else shown(found["input"])
    return f"{name} must be {expected.format(**found.get('ctx', {}))}, not {given_value}"


def _of_type(value: object) -> str:
    """A plain value or a tensor as it is shown, anything else by its type."""
    if value is None or isinstance(value, str | bytes | int | float) or hasattr(value, "shape"):
        return shown(value)
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


@cache
def _validator(function: Callable) -> Callable[..., dict[str, Any]]:
    """A function with the signature of this one that returns its arguments, checked."""

    @wraps(function)
    def arguments(**given):
        return given

    found = signature(function)  # without ``self``, by which pydantic calls what it returns
    parameters = [one for name, one in found.parameters.items() if name != "self"]
    arguments.__signature__ = found.replace(parameters=parameters)  # type: ignore[attr-defined]
    return validate_call(arguments, config=CONFIG)


def check_arguments(function: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, each as the function's annotation wants it, and the defaults of the others.

    Raises ``ValueError`` in one line.
    """
    sizes = _SIZES.set({})
    try:
        alone = {name: value for name, value in given.items() if name != "self"}
        return {name: given[name] for name in given.keys() & {"self"}} | _validator(function)(**alone)
    except ValidationError as error:
        raise ValueError(_message(error, given)) from None
    finally:
        _SIZES.reset(sizes)


class ArgumentError(TypeError, ValueError):
    """An argument that a function does not have, or one that it needs and did not get: Python's own ``TypeError``, with
    the function's name, and a ``ValueError`` as everything else that is wrong with arguments."""


def bound(name: str, parameters: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name. Raises ``ArgumentError`` for what the function does not take."""
    try:
        return parameters.bind(*args, **kwargs).arguments
    except TypeError as error:
        known = list(parameters.parameters)
        meant = [close[0] for one in kwargs if one not in known and (close := get_close_matches(one, known, 1))]
        way_out = f" (its own is {meant[0]!r})" if meant else ""
        raise ArgumentError(f"{name.removesuffix('.__init__').rpartition('.')[2]} {error}{way_out}") from None


def check_free(function: str, options: Mapping[str, Any], own: str) -> None:
    """Raise ``ArgumentError`` for an option of ``train`` that the function says itself: one of the names ``own``."""
    for name in own.split():
        if name in options:
            raise ArgumentError(f"{function} sets {name} of train itself: leave it out")


def _with_bounds(function: Callable) -> str:
    """The docstring, and what the annotations say of the arguments in words."""
    words = {name: dict.fromkeys(re.findall(r"\w+", str(hint))) for name, hint in function.__annotations__.items()}
    bounds = [f"``{name}`` {BOUNDS[word]}" for name, found in words.items() for word in found if word in BOUNDS]
    return f"{function.__doc__ or ''}\n\nBounds: {'; '.join(bounds)}." if bounds else function.__doc__


def checked(thing: T) -> T:
    """A decorator: check the arguments of a function, or of a dataclass's ``__init__``, against the annotations.

    The function itself, without them, is its ``__wrapped__``.
    """
    if isinstance(thing, type):
        thing.__init__ = checked(thing.__init__)
        return thing
    function: Any = thing
    parameters = signature(function)
    options = [name for name, one in parameters.parameters.items() if one.kind is Parameter.VAR_KEYWORD]

    @wraps(function)
    def outside(*args, **kwargs):
        given = bound(function.__qualname__, parameters, args, kwargs)
        for name in options:
            given |= given.pop(name, {})
        return function(**check_arguments(function, given))

    outside.__doc__ = _with_bounds(function)
    return cast(T, outside)
