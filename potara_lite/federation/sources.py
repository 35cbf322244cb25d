"""Where a federation comes from: the shipped Fashion-MNIST, torchvision's data sets, data of your own.

Tensors and arrays, tables, data sets of torch: each has a function, and ``assemble`` does the rest. The function for
Hugging Face's data sets is in ``huggingface.py``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..checks import ByClient, Flag, List, PathLike, Portion, Seed, Size, checked, invalid, shown
from ..files import check_file, data_path, reading
from .assemble import as_categories, assemble, features as feature_tensor, rows_of, stack_items
from .inputs import AnyPair
from .partition import partition, partition_options
from .split import Federation

FASHION = "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"


@checked
def fashion_mnist(**options) -> Federation:
    """A federation of the Fashion-MNIST subset in ``data/`` (20,000 train and 10,000 test images): no download.

    ``options`` are those of ``partition``. Images are ``(1, 28, 28)`` in [0, 1].

    >>> federation = fashion_mnist(clients=3, train_size=20, test_size=50)
    >>> federation.train.x.shape
    torch.Size([3, 20, 1, 28, 28])

    Raises ``FileError`` (a ``ValueError``) when the file is missing or damaged.
    """
    path = check_file(data_path("fashion_mnist.npz"))
    pools = []
    with reading(path), np.load(path, allow_pickle=False) as file:
        for part in ("train", "test"):
            images, labels = file[f"{part}_images"], file[f"{part}_labels"]
            if images.shape != (len(labels), 28, 28) or {images.dtype, labels.dtype} != {np.dtype(np.uint8)}:
                raise ValueError(f"{part}: {images.dtype} {images.shape} are no images of {len(labels)} labels")
            if labels.max(initial=0) > 9:
                raise ValueError(f"{part} has label {labels.max()}, which is outside 0 … 9")
            pools.append((torch.from_numpy(images).unsqueeze(1) / 255, torch.from_numpy(labels).long()))
    federation = partition(*pools, classes=10, **{"name": "Fashion-MNIST", **options})
    return replace(federation, class_names=FASHION)


@checked
def from_torchvision(dataset: str, root: PathLike, *, download: Flag = True, **options) -> Federation:
    """A federation of the full ``"FashionMNIST"``, ``"CIFAR10"`` or ``"CIFAR100"``, downloaded by torchvision.

    ``options`` are those of ``partition``. Images are ``(channels, height, width)`` in [0, 1], kept in memory.
    """
    from torchvision import datasets

    kinds = {"FashionMNIST": 10, "CIFAR10": 10, "CIFAR100": 100}
    if dataset not in kinds:
        raise ValueError(f"dataset must be one of {sorted(kinds)}, not {dataset!r} (for another, see from_datasets)")
    options = partition_options(**{"name": dataset, **options})  # checked before the download
    pools = []
    for train in (True, False):
        source = getattr(datasets, dataset)(root, train=train, download=download)
        x = torch.as_tensor(source.data)
        x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2)
        pools.append((x / 255, torch.as_tensor(source.targets).long()))
    return replace(partition(*pools, classes=kinds[dataset], **options), class_names=_classes_of(source))


@checked
def from_tensors(
    train: ByClient[AnyPair],
    test: ByClient[AnyPair] | None = None,
    *,
    test_size: Portion = 0.2,
    calibration: ByClient[AnyPair] | None = None,
    calibration_size: Size = 30,
    classes: Size | None = None,
    class_names: List[str] | None = None,
    seed: Seed = 0,
    name: str = "federation",
) -> Federation:
    """A federation of your tensors: for each client a pair of inputs ``(n, ...)`` and labels ``(n,)`` (see ``Split``).

    A list of pairs, or a dictionary by the clients' names. Inputs may also be arrays and tables, which become float32
    (whole numbers of an array stay). Labels are whole numbers from 0, true and false, or an array or a column of names,
    which are numbered in sorted order and kept as ``class_names``.

    Without ``calibration``, ``calibration_size`` examples of each client are drawn from its ``train`` and withheld from
    training; without ``test``, so are ``test_size`` of them, a number or a fraction. The draws are stratified by label
    and depend on the seed and on the client (its name, or its place in the list) alone. ``classes`` defaults to the
    largest label plus one.

    >>> federation = from_tensors({"A": (torch.rand(50, 3), torch.arange(50) % 2)}, test_size=0.2, calibration_size=10)
    >>> federation.client_names, federation.train.sizes.tolist(), federation.test.sizes.tolist()
    (('A',), [30], [10])

    Raises ``ValueError`` for what ``check_examples`` refuses, labels outside the classes, splits of different clients
    or inputs, and a client too small to withhold from.
    """
    return assemble(
        train,
        test,
        calibration,
        test_size=test_size,
        calibration_size=calibration_size,
        classes=classes,
        class_names=class_names,
        seed=seed,
        name=name,
    )


@checked
def from_dataframe(
    df: pd.DataFrame,
    *,
    client: Hashable,
    label: Hashable,
    features: List[Hashable] | None = None,
    test: pd.DataFrame | None = None,
    test_size: Portion = 0.2,
    calibration_size: Size = 30,
    real_targets: Flag = False,
    seed: Seed = 0,
    name: str = "federation",
) -> Federation:
    """A federation of a table: the rows of each value of the column ``client``, in sorted order, are a client.

    ``features``: the columns of the inputs, numbers or true and false, ``(n, F)`` in float32; all but ``client`` and
    ``label`` by default. The labels may be of any type; their values, sorted or in the order of a categorical column,
    are the ``class_names``; with ``real_targets`` they are the numbers to predict, in float32. Splits are drawn as in
    ``from_tensors``; ``test`` is a table with the same columns.

    >>> df = pd.DataFrame({"age": range(40), "sick": ["no", "yes"] * 20, "ward": ["A"] * 20 + ["B"] * 20})
    >>> federation = from_dataframe(df, client="ward", label="sick", calibration_size=5)
    >>> federation.client_names, federation.class_names, federation.train.client(0)[0].shape
    (('A', 'B'), ('no', 'yes'), torch.Size([11, 1]))

    Raises ``ValueError`` for a column that is not there or not of numbers, for missing values, with the column and the
    row, and for a client too small, by its name.
    """
    tables = {"df": df} if test is None else {"df": df, "test": test}
    for argument, table in tables.items():
        _check_columns(argument, table, client, label, features)
    columns = features or [column for column in df.columns if column not in (client, label)]
    labels = pd.concat([table[label] for table in tables.values()])
    kinds = None if real_targets else as_categories(labels, f"label: column {label!r}").dtype

    def by_client(argument: str, table: pd.DataFrame) -> dict[str, tuple[Tensor, Tensor | pd.Series]]:
        x = feature_tensor(table[columns], f"{argument}: ")
        y = feature_tensor(table[[label]], f"{argument}: ")[:, 0] if real_targets else table[label].astype(kinds)
        rows_by_name = rows_of(table[client], f"client: column {client!r}")
        return {name: (x[rows], y[rows] if real_targets else y.iloc[rows]) for name, rows in rows_by_name.items()}

    parts = {argument: by_client(argument, table) for argument, table in tables.items()}
    return assemble(
        parts["df"], parts.get("test"), test_size=test_size, calibration_size=calibration_size, seed=seed, name=name
    )


def _check_columns(
    name: str, table: pd.DataFrame, client: Hashable, label: Hashable, features: Sequence[Hashable] | None
) -> None:
    if not len(table) or not table.columns.is_unique:
        invalid(name, "a table with rows, whose columns have different names", table)
    for argument, column in (("client", client), ("label", label), *(("features", one) for one in features or ())):
        if column not in table:
            columns = shown(list(table.columns))
            raise ValueError(f"{argument} must be a column of {name}, not {column!r}: there are {columns}")
    if client == label or {client, label} & set(features or ()):
        raise ValueError(f"client, label and features must be different columns, unlike {client!r} and {label!r}")
    if table.shape[1] < 3:
        raise ValueError("features must be at least one column besides client and label")


@checked
def from_datasets(
    train: ByClient[Any],
    test: ByClient[Any] | None = None,
    *,
    test_size: Portion = 0.2,
    calibration_size: Size = 30,
    classes: Size | None = None,
    seed: Seed = 0,
    name: str = "federation",
) -> Federation:
    """A federation of a torch ``Dataset`` for each client: a list, or a dictionary by the clients' names.

    Any with a length and pairs of an input and a label: ``TensorDataset``, ``Subset``, ``ImageFolder``, torchvision's.
    Inputs are tensors, arrays, dictionaries of them, or images of PIL, which become ``(channels, height, width)`` in
    [0, 1]. Every example is read **once**, here, and kept in memory: a transform that augments at random is frozen at
    that pass. ``classes`` of a data set (torchvision's convention) are the ``class_names``; where the clients' differ,
    labels are numbered anew by the name of their class. Splits are drawn as in ``from_tensors``.

    >>> from torch.utils.data import TensorDataset
    >>> shops = {name: TensorDataset(torch.rand(60, 3), torch.arange(60) % 2) for name in ("books", "films")}
    >>> from_datasets(shops, test_size=0.5, calibration_size=10).train.sizes
    tensor([20, 20])

    Raises ``ValueError`` for data without a length, for other than pairs, and for inputs of different sizes.
    """

    def read(part):
        if isinstance(part, Mapping):
            return {client: _read_dataset(f"client {client!r}", dataset) for client, dataset in part.items()}
        return [_read_dataset(f"client {i}", dataset) for i, dataset in enumerate(part)]

    return assemble(
        read(train),
        None if test is None else read(test),
        test_size=test_size,
        calibration_size=calibration_size,
        classes=classes,
        seed=seed,
        name=name,
    )


def _read_dataset(called: str, dataset: Any) -> tuple[Any, Any]:
    """All inputs and labels of a data set; the labels with their names, where it has them."""
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(f"{called}: a data set must have a length and examples by number, unlike {shown(dataset)}")
    if not (items := [dataset[i] for i in range(len(dataset))]):
        raise ValueError(f"{called} has no examples")
    if odd := [item for item in items if not (isinstance(item, list | tuple) and len(item) == 2)]:
        raise ValueError(f"{called}: a data set must give pairs of an input and a label, not {shown(odd[0])}")
    x, y = (stack_items(called, column) for column in zip(*items))
    classes = _classes_of(dataset)
    is_number = y.dim() == 1 and not y.is_floating_point()
    is_named = classes and is_number and 0 <= int(y.min()) <= int(y.max()) < len(classes)
    return x, pd.Categorical.from_codes(y.numpy(), classes) if is_named else y


def _classes_of(dataset: Any) -> list[str] | None:
    """The names of the classes, of a subset those of the whole."""
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    is_list = isinstance(names, list | tuple) and all(isinstance(one, str) for one in names)
    return list(names) if is_list and len(set(names)) == len(names) else None
