"""Where a federation comes from: the shipped Fashion-MNIST, torchvision's data sets, your tensors."""

from __future__ import annotations

import numpy as np
import torch

from ..checks import Flag, List, PathLike, Seed, Size, checked
from ..files import check_file, data_path, reading
from .inputs import ExamplesPair, check_examples, take
from .partition import partition, partition_options
from .split import Federation, Split


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
    return partition(*pools, classes=10, **{"name": "Fashion-MNIST", **options})


@checked
def from_torchvision(dataset: str, root: PathLike, *, download: Flag = True, **options) -> Federation:
    """A federation of the full ``"FashionMNIST"``, ``"CIFAR10"`` or ``"CIFAR100"``, downloaded by torchvision.

    ``options`` are those of ``partition``. Images are ``(channels, height, width)`` in [0, 1], kept in memory.
    """
    from torchvision import datasets

    kinds = {"FashionMNIST": 10, "CIFAR10": 10, "CIFAR100": 100}
    if dataset not in kinds:
        raise ValueError(f"dataset must be one of {sorted(kinds)}, not {dataset!r}")
    options = partition_options(**{"name": dataset, **options})  # checked before the download
    pools = []
    for train in (True, False):
        source = getattr(datasets, dataset)(root, train=train, download=download)
        x = torch.as_tensor(source.data)
        x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2)
        pools.append((x / 255, torch.as_tensor(source.targets).long()))
    return partition(*pools, classes=kinds[dataset], **options)


@checked
def from_tensors(
    train: List[ExamplesPair],
    test: List[ExamplesPair],
    *,
    calibration: List[ExamplesPair] | None = None,
    calibration_size: Size = 30,
    classes: Size | None = None,
    seed: Seed = 0,
    name: str = "federation",
) -> Federation:
    """A federation of your tensors: for each client a pair of inputs ``(n, ...)`` and labels ``(n,)`` (see ``Split``).

    Without ``calibration``, ``calibration_size`` examples of each client are drawn from its ``train`` and withheld
    from training. ``classes`` defaults to the largest label plus one.

    Raises ``ValueError`` for what ``check_examples`` refuses, labels outside the classes, splits of different clients
    or inputs, and a client too small to withhold from.
    """
    for client, examples in enumerate(train):
        check_examples(client, *examples)
    if classes is None:
        classes = 1 + max(int(y.max()) for _, y in [*train, *test] if len(y))
    if calibration is None:
        calibration, rest = [], []
        for client, (x, y) in enumerate(train):
            if len(y) <= calibration_size:
                raise ValueError(f"client {client} has {len(y)} examples: none is left if {calibration_size} calibrate")
            order = torch.from_numpy(np.random.default_rng([seed, client]).permutation(len(y)))
            for examples, rows in ((calibration, order[:calibration_size]), (rest, order[calibration_size:])):
                examples.append((take(x, rows), y[rows]))
        train = rest
    return Federation(Split(train), Split(calibration), Split(test), classes, name)
