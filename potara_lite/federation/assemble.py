"""From arrays, tables and images to a federation: tensors, class numbers, and the three splits of each client.

``sources.py`` has the functions that a user calls; all of them end in ``assemble``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..checks import shown
from .inputs import Examples, check_alike, check_examples, is_float, take
from .partition import largest_remainders
from .split import Federation, Split

Pairs = Sequence[tuple[Any, Any]] | Mapping[str, tuple[Any, Any]]  # a pair of inputs and labels for each client
MODES = {"1": "L", "LA": "L", "P": "RGB", "PA": "RGB", "RGBA": "RGB", "CMYK": "RGB"}  # of images, to those we take


def assemble(
    train: Pairs,
    test: Pairs | None,
    calibration: Pairs | None = None,
    *,
    test_size: int | float,
    calibration_size: int,
    seed: int,
    name: str,
    classes: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Federation:
    """The federation of the clients' examples: lists, or dictionaries by the clients' names.

    Without ``test`` or ``calibration``, they are drawn from each client's ``train``, stratified by label
    (``stratified``), from a generator of the seed and the client (its name, or its place in a list).
    """
    names = tuple(train) if isinstance(train, Mapping) else None
    given = {"train": train, "test": test, "calibration": calibration}
    parts = {part: _in_order(part, one, train) for part, one in given.items() if one is not None}
    for part, pairs in parts.items():
        parts[part] = [(as_inputs(_called(names, i), x), as_labels(_called(names, i), y)) for i, (x, y) in pairs]
    found_names = _number_classes(parts)
    for examples in parts.values():
        for i, (x, y) in enumerate(examples):
            check_examples(_called(names, i), x, y)
        check_alike([repr(one) for one in names] if names else range(len(examples)), examples)
    if classes is None:
        labels = [y for examples in parts.values() for _, y in examples]
        largest = int(labels[0][0].numel()) if is_float(labels[0]) else 1 + max(int(y.max()) for y in labels)
        classes = max(largest, len(class_names or found_names or ()))
    sizes = {"test": test_size, "calibration": calibration_size}
    sizes = {part: size for part, size in sizes.items() if part not in parts}
    if sizes:
        drawn = [_withhold(names, i, one, sizes, seed) for i, one in enumerate(parts["train"])]
        parts |= {part: [of_client[part] for of_client in drawn] for part in drawn[0]}
    splits = {part: Split(examples) for part, examples in parts.items()}
    return Federation(**splits, classes=classes, name=name, client_names=names, class_names=class_names or found_names)


def _called(names: Sequence[str] | None, i: int) -> str:
    """What messages call a client."""
    return f"client {names[i]!r}" if names and i < len(names) else f"client {i}"


def _in_order(part: str, given: Pairs, train: Pairs) -> list[tuple[int, tuple[Any, Any]]]:
    """The clients' pairs, numbered, in the order of ``train``."""
    if isinstance(given, Mapping) != isinstance(train, Mapping):
        raise ValueError(f"{part} must be a {'dictionary' if isinstance(train, Mapping) else 'list'} like train")
    if isinstance(given, Mapping):
        if given.keys() != train.keys():
            odd = min(given.keys() ^ train.keys(), key=str)
            raise ValueError(f"{part} must have the clients of train: only one of the two has {odd!r}")
        given = [given[client] for client in train]
    return list(enumerate(given))


# The splits of a client.


def stratified(labels: np.ndarray, sizes: Sequence[int], rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of ``labels`` ``(n,)`` for parts of these sizes, and for the rest, in random order.

    Each part has the classes in proportion to what there is, rounded by largest remainders (ties at random). The last
    example of a class goes to the rest, unless the sizes ask for more than that leaves.

    >>> labels = np.array([0] * 6 + [1] * 3 + [2])
    >>> [sorted(labels[rows].tolist()) for rows in stratified(labels, [3], np.random.default_rng(0))]
    [[0, 0, 1], [0, 0, 0, 0, 1, 1, 2]]
    """
    order = rng.permutation(len(labels))
    left = [order[labels[order] == k] for k in rng.permutation(np.unique(labels))]
    parts = []
    for size in sizes:
        counts = np.array([len(rows) for rows in left])
        spare = np.maximum(counts - 1, 0)
        most, shares = (spare, counts * (spare > 0)) if spare.sum() >= size else (counts, counts)
        taken = np.minimum(largest_remainders(shares, size), most)
        while taken.sum() < size:
            taken[np.argmax(most - taken)] += 1
        parts.append(rng.permutation(np.concatenate([rows[:n] for rows, n in zip(left, taken)])))
        left = [rows[n:] for rows, n in zip(left, taken)]
    return [*parts, rng.permutation(np.concatenate(left))]


def _withhold(
    names: Sequence[str] | None, i: int, examples: Examples, sizes: Mapping[str, int | float], seed: int
) -> dict[str, Examples]:
    """A client's examples in parts of these sizes, and the rest as ``train``. A size below 1 is a fraction."""
    x, y = examples
    counts = {part: size if size >= 1 else max(1, round(size * len(y))) for part, size in sizes.items()}
    if len(y) <= sum(counts.values()):
        words = {"test": "are tested on", "calibration": "calibrate"}
        wanted = " and ".join(f"{n} {words[part]}" for part, n in counts.items())
        raise ValueError(f"{_called(names, i)} has {len(y)} examples: none is left if {wanted}")
    client = list(names[i].encode()) if names else [i]
    has_classes = y.dim() == 1 and not is_float(y)  # neither token-level targets nor real ones are of a class
    labels = y.cpu().numpy() if has_classes else np.zeros(len(y))
    rows = stratified(labels, list(counts.values()), np.random.default_rng([seed, *client]))
    return {part: (take(x, torch.from_numpy(one)), y[one]) for part, one in zip([*counts, "train"], rows)}


# Labels.


def as_categories(column: pd.Series, what: str) -> pd.Series:
    """A column of names or numbers as categories: sorted, or in their own order where it has them already.

    Raises ``ValueError`` for missing values, with the row, for numbers that are not whole, and for mixed types.
    """
    if (missing := column.isna()).any():
        raise ValueError(f"{what} is missing in row {column.index[missing][0]}")
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column
    if column.dtype.kind in "fc":
        if (odd := column[column % 1 != 0]).size:
            raise ValueError(f"{what} must be names or whole numbers, not {odd.iloc[0]} (row {odd.index[0]})")
        column = column.astype("int64")
    try:
        found = column.astype("category")
    except TypeError:  # lists and dictionaries
        raise ValueError(f"{what} must be names or whole numbers, not {shown(column.iloc[0])}") from None
    kind, categories = pd.api.types.infer_dtype(found.cat.categories), found.cat.categories
    if kind.startswith("mixed"):
        raise ValueError(f"{what} has values of several types, such as {categories[0]!r} and {categories[-1]!r}")
    return found


def as_labels(called: str, y: Any) -> Any:
    """Numbers as a tensor, true and false as 1 and 0, anything else as a categorical column."""
    if isinstance(y, Tensor):
        return y.long() if y.dtype == torch.bool else y
    if isinstance(y, np.ndarray) and y.ndim != 1:
        return torch.as_tensor(y)
    if not isinstance(y, np.ndarray | pd.Series | pd.Categorical):
        return y
    column = pd.Series(y)
    if column.isna().any() or isinstance(column.dtype, pd.CategoricalDtype) or column.dtype.kind not in "biuf":
        return as_categories(column, f"{called}: the label")
    return torch.from_numpy(column.to_numpy(np.float64 if column.dtype.kind == "f" else np.int64, copy=True))


def _number_classes(parts: dict[str, list[tuple[Any, Any]]]) -> tuple[str, ...] | None:
    """Replace categories by the numbers of the classes, in place, and return the classes' names if there are any.

    All columns have the same categories, or the classes are those of all of them, sorted.
    """
    labels = [y for examples in parts.values() for _, y in examples]
    named = [y for y in labels if isinstance(y, pd.Series)]
    if not named:
        return None
    if len(named) < len(labels):
        raise ValueError("labels must be names for all clients and splits, or numbers for all")
    every = [y.cat.categories for y in named]
    classes = every[0]
    if not all(one.equals(classes) for one in every):
        classes = as_categories(pd.Series([one for index in every for one in index]), "the label").cat.categories
    for part, examples in parts.items():
        parts[part] = [(x, torch.from_numpy(classes.get_indexer(y).astype(np.int64))) for x, y in examples]
    names = tuple(map(str, classes))
    if len(set(names)) < len(names):
        raise ValueError(f"labels must differ as texts, too, unlike {shown(names)}")
    return names


# Inputs.


def as_inputs(called: str, x: Any) -> Any:
    """Tensors as they are; an array as a tensor, a table's columns as features ``(n, F)``, both in float32 unless they
    hold whole numbers (token ids); a dictionary entry by entry."""
    if isinstance(x, Mapping):
        return {key: as_inputs(called, value) for key, value in x.items()}
    if isinstance(x, pd.DataFrame):
        return features(x, f"{called}: ")
    if isinstance(x, pd.Series):
        return features(x.to_frame(), f"{called}: ")
    if isinstance(x, np.ndarray) and x.dtype.kind in "biuf":
        return torch.from_numpy(np.array(x, np.float32 if x.dtype.kind == "f" else x.dtype))
    return x


def features(table: pd.DataFrame, prefix: str = "") -> Tensor:
    """The columns of a table, numbers or true and false, as ``(n, F)`` in float32.

    Raises ``ValueError`` with the column's name for anything else, and for what is missing or not finite.
    """
    for column, dtype in table.dtypes.items():
        if not pd.api.types.is_numeric_dtype(dtype) or dtype.kind == "c":
            raise ValueError(
                f"{prefix}column {column!r} holds {dtype}, not numbers: leave it out of features, or encode it, by "
                f"pd.get_dummies(df, columns=[{column!r}])"
            )
    with np.errstate(over="ignore"):  # infinite, and refused below
        values = table.to_numpy(np.float32, na_value=np.nan)
    if (bad := np.argwhere(~np.isfinite(values))).size:
        row, column = bad[np.argmin(bad[:, 1])]
        raise ValueError(
            f"{prefix}column {table.columns[column]!r} has {values[row, column]} in row {table.index[row]}: "
            "fill or drop such rows"
        )
    return torch.tensor(values)


def stack_items(called: str, items: Sequence[Any]) -> Any:
    """The inputs (or labels) of a data set's examples as one tensor, or one dictionary of tensors ``(n, ...)``."""
    if isinstance(items[0], Mapping):
        return {key: stack_items(called, [item[key] for item in items]) for key in items[0]}
    tensors = [_item(called, item) for item in items]
    for i, tensor in enumerate(tensors):
        if tensor.shape != tensors[0].shape:
            shapes = f"{tuple(tensor.shape)}, example 0 of {tuple(tensors[0].shape)}"
            raise ValueError(
                f"{called}: example {i} is of shape {shapes}: bring all to one size, such as by a transform"
            )
    stack = torch.stack(tensors)
    return stack / 255 if _is_image(items[0]) else stack


def _is_image(item: Any) -> bool:
    from PIL import Image

    return isinstance(item, Image.Image)


def _item(called: str, item: Any) -> Tensor:
    """One example's input: of an image of PIL its bytes, ``(channels, height, width)``."""
    if _is_image(item):
        mode = MODES.get(item.mode, item.mode)
        if mode not in ("L", "RGB"):
            raise ValueError(f"{called}: images must be grey or RGB, not of PIL's mode {item.mode!r}")
        pixels = np.array(item.convert(mode))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
    try:
        found = torch.as_tensor(item)
    except (ValueError, TypeError, RuntimeError):
        raise ValueError(f"{called}: inputs must be tensors, arrays, numbers or images, not {shown(item)}") from None
    return found.float() if found.dtype == torch.float64 and not isinstance(item, Tensor) else found


def rows_of(column: pd.Series, what: str) -> dict[str, np.ndarray]:
    """The rows of each value of a column, by the value as a text, in the order of the values."""
    categories = as_categories(column, what).cat.remove_unused_categories().cat
    order = np.argsort(categories.codes.to_numpy(), kind="stable")
    ends = np.cumsum(np.bincount(categories.codes, minlength=len(categories.categories)))
    names = list(map(str, categories.categories))
    if len(set(names)) < len(names):
        raise ValueError(f"{what} must have values that differ as texts, unlike {shown(names)}")
    return dict(zip(names, np.split(order, ends[:-1])))
