"""Federations of Hugging Face's ``datasets`` and of the partitions of ``flwr-datasets``.

Neither is imported here: what the caller brings is asked for its columns, their kinds, and its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
from torch import Tensor

from ..checks import List, Portion, Seed, Size, checked, invalid, shown
from .assemble import as_categories, assemble, features as feature_tensor, rows_of, stack_items
from .split import Federation
from .text import encode_texts

NESTED = ("List", "LargeList", "Sequence", "list", "Array2D", "Array3D", "Array4D", "Array5D")  # kinds of columns


@checked
def from_huggingface(
    ds: Any,
    *,
    client: str | None = None,
    label: str = "label",
    text: str | None = None,
    tokenizer: Callable | None = None,
    max_length: Size = 64,
    features: List[str] | None = None,
    test_size: Portion = 0.2,
    calibration_size: Size = 30,
    seed: Seed = 0,
    name: str = "federation",
) -> Federation:
    """A federation of data sets of Hugging Face's ``datasets``, or of partitions of ``flwr-datasets``.

    ``ds``: a ``Dataset``, of which each value of the column ``client`` is a client, or a ``DatasetDict`` of two,
    ``train`` and, perhaps, ``test``. Or, without ``client``, one of them for each client, in a list or in a dictionary
    by names; or a ``Partitioner`` or ``FederatedDataset`` of ``flwr-datasets``, a client for each partition.

    Inputs: the column ``text`` as ``input_ids`` and ``attention_mask`` (``encode_texts``, cut to ``max_length`` tokens
    of ``tokenizer``), or the columns ``features``: by default the only column of images, else all that are left. Images
    become ``(channels, height, width)`` in [0, 1] and must be of one size; a column of arrays ``(n, ...)``, columns of
    numbers ``(n, F)`` in float32. The names of a ``ClassLabel`` are the ``class_names``, else the labels' sorted
    values. What is stored is read once: transforms that were set are not applied. Splits are drawn from ``train`` as in
    ``from_tensors``.

    Raises ``ValueError`` for columns that are not there or of another kind, missing labels and clients, and what
    ``from_tensors`` refuses.
    """
    if (text is None) != (tokenizer is None):
        raise ValueError("text and tokenizer must be given together: the column, and what makes tokens of it")
    train, test = _by_client(ds, client, label)
    read = partial(_read, client=client, label=label, text=text, tokenizer=tokenizer, max_length=max_length)
    return assemble(
        _each(train, partial(read, features=features)),
        None if test is None else _each(test, partial(read, features=features)),
        test_size=test_size,
        calibration_size=calibration_size,
        seed=seed,
        name=name,
    )


def _each(clients: Any, read: Callable[[str, Any], Any]) -> Any:
    """``read`` of what each client is called and of its data set."""
    if isinstance(clients, Mapping):
        return {client: read(f"client {client!r}", data) for client, data in clients.items()}
    return [read(f"client {i}", data) for i, data in enumerate(clients)]


# Which data sets are a client's.


def _by_client(ds: Any, client: str | None, label: str) -> tuple[Any, Any]:
    """The data sets of the clients to train on and, or None, to test on: lists, or dictionaries by names."""
    if _is_dataset(ds) or (isinstance(ds, Mapping) and (client is not None or type(ds).__name__ == "DatasetDict")):
        if client is None:
            raise ValueError("client must be the name of the column that says whose each example is, not None")
        splits = ds if isinstance(ds, Mapping) else {"train": ds}
        _check_splits("ds", splits)
        return tuple(splits.get(part) and _by_column(splits[part], client, label) for part in ("train", "test"))
    if client is not None and (isinstance(ds, list | tuple) or hasattr(ds, "load_partition")):
        invalid("client", "None where ds has a data set for each client", client)
    if hasattr(ds, "partitioners"):
        partitioners = ds.partitioners
        first = partitioners.get("train") or next(iter(partitioners.values()))
        test = partitioners.get("test")
        return _partitions(first), None if test in (None, first) else _partitions(test)
    if hasattr(ds, "load_partition"):
        return _partitions(ds), None
    return _of_each(ds)


def _is_dataset(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("column_names", "features", "select", "with_format", "__len__"))


def _check_splits(called: str, splits: Any) -> None:
    if not isinstance(splits, Mapping) or "train" not in splits or not all(map(_is_dataset, splits.values())):
        found = list(splits) if isinstance(splits, Mapping) else splits
        invalid(called, "a Dataset, or a DatasetDict with 'train'", found)


def _by_column(data: Any, client: str, label: str) -> dict[str, Any]:
    """The rows of each value of a column. Labels are looked at here, where a row still has its number."""
    _column(data, label, "label")
    return {name: data.select(rows) for name, rows in rows_of(_column(data, client, "client"), "client").items()}


def _partitions(partitioner: Any) -> Any:
    """What a partitioner of ``flwr-datasets`` deals out, by its natural ids where it has them."""
    found = [partitioner.load_partition(i) for i in range(partitioner.num_partitions)]
    ids = getattr(partitioner, "partition_id_to_natural_id", None)
    return {str(ids[i]): data for i, data in enumerate(found)} if ids else found


def _of_each(ds: Any) -> tuple[Any, Any]:
    """Of a data set, or a dictionary with ``train`` and ``test``, for each client."""
    if not isinstance(ds, Mapping | list | tuple) or not len(ds):
        invalid("ds", "a Dataset, or a list or a dictionary of them, or a partitioner", ds)
    keys = list(ds) if isinstance(ds, Mapping) else range(len(ds))
    splits = {key: {"train": ds[key]} if _is_dataset(ds[key]) else ds[key] for key in keys}
    for key, one in splits.items():
        _check_splits(f"ds[{key!r}]", one)
    if len({"test" in one for one in splits.values()}) > 1:
        raise ValueError(f"ds must have a split 'test' for all clients or for none, unlike {shown(splits)}")
    train, test = ({str(key): one.get(part) for key, one in splits.items()} for part in ("train", "test"))
    test = None if None in test.values() else test
    if isinstance(ds, Mapping):
        return train, test
    return list(train.values()), None if test is None else list(test.values())


# What is in a data set.


def _column(data: Any, name: str, argument: str) -> pd.Series:
    """A column as categories, with the names of a ``ClassLabel``."""
    if name not in data.column_names:
        raise ValueError(f"{argument} must be a column, not {name!r}: there are {shown(data.column_names)}")
    column = pd.Series(data.with_format(None)[name][:])
    if names := getattr(data.features[name], "names", None):
        column = pd.Series(pd.Categorical.from_codes(column.fillna(-1).astype(int), names))
    return as_categories(column, f"{argument}: column {name!r}")


def _read(called: str, data: Any, *, client, label, text, tokenizer, max_length, features) -> tuple[Any, pd.Series]:
    """The inputs and the labels of a client's data set."""
    y = _column(data, label, f"{called}: label")
    data = data.with_format(None)
    for column in [text] if text is not None else features or ():
        if column not in data.column_names or column in (label, client):
            rest = [one for one in data.column_names if one not in (label, client)]
            raise ValueError(f"{called}: features and text must be among {shown(rest)}, unlike {column!r}")
    if text is not None:
        return _encode(called, data[text][:], text, tokenizer, max_length), y
    return _stack(called, data, features, [one for one in data.column_names if one not in (label, client)]), y


def _encode(called: str, texts: Sequence[Any], column: str, tokenizer: Callable, max_length: int) -> dict[str, Tensor]:
    if odd := [i for i, one in enumerate(texts) if not isinstance(one, str)]:
        raise ValueError(f"{called}: column {column!r} must hold texts, not {texts[odd[0]]!r} (row {odd[0]})")
    try:
        return encode_texts(tokenizer, texts, max_length)
    except ValueError as error:
        raise ValueError(f"{called}: {error}") from None


def _stack(called: str, data: Any, features: Sequence[str] | None, rest: Sequence[str]) -> Tensor:
    """Images, arrays, or columns of numbers as one tensor."""
    kinds = {name: type(data.features[name]).__name__ for name in rest}
    images = [name for name in rest if kinds[name] == "Image"]
    columns = features or (images if len(images) == 1 else rest)
    if not columns:
        raise ValueError(f"{called}: there is no column besides client and label")
    if len(columns) == 1 and kinds[columns[0]] in ("Image", *NESTED):
        return stack_items(called, data[columns[0]][:])
    for name in columns:
        dtype = str(getattr(data.features[name], "dtype", kinds[name]))
        if "string" in dtype or kinds[name] in ("Image", *NESTED):
            way_out = (
                "name it in text, with a tokenizer" if "string" in dtype else "it must be the only one of features"
            )
            kind = f"{kinds[name]} {dtype}"
            raise ValueError(f"{called}: column {name!r} holds {kind}: {way_out}, or leave it out of features")
    return feature_tensor(data.select_columns(list(columns)).to_pandas(), f"{called}: ")
