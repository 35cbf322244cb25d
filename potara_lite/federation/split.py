"""A federation: C clients, each with examples to train on, to calibrate on and to be tested on.

Partitioners are pure functions of labels and a generator. Loaders read the Fashion-MNIST subset in ``data/``, the
full data sets through torchvision, or your own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..checks import (
    check_fields,
    door,
    function,
    kind,
    one_or_several,
    options_of,
    refuse,
    several,
    shown,
    unchecked,
    whole,
)
from ..checks import seed as valid_seed
from ..files import check_file, data_path, reading

Inputs = Tensor | dict[str, Tensor]  # one tensor, or by name what the network is called with (token ids and their mask)
Examples = tuple[Inputs, Tensor]  # inputs (n, ...); labels (n,), or token-level targets (n, T)
DRAWS = 100  # how often a federation's class proportions are drawn anew before a class counts as run out
PADDING = -100  # the label of a padded example and of a token that is no target, which cross_entropy ignores
MASK = "attention_mask"  # of a mapping: 1 for a real token, 0 for padding


class SupplyError(ValueError):
    """The clients ask for more examples of a class than there are."""


def map_inputs(function: Callable[..., Tensor], *inputs: Inputs) -> Inputs:
    """``function`` of the tensors, or name by name of those of mappings."""
    if isinstance(inputs[0], Tensor):
        return function(*inputs)
    return {name: function(*(one[name] for one in inputs)) for name in inputs[0]}


def take(inputs: Inputs, index) -> Inputs:
    """The inputs at an index: ``tensor[index]``, of every tensor."""
    return map_inputs(lambda tensor: tensor[index], inputs)


def any_tensor(inputs: Inputs) -> Tensor:
    """The tensor, or the first one of a mapping: for what all of them share."""
    return inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))


def check_examples(client: int, x: Inputs, y: Tensor) -> None:
    """Raise ``ValueError`` for a client without examples, other than as many inputs as labels, inputs that are no
    numbers, whole-numbered images, labels that are no whole numbers of 0 or more, empty texts and ignored targets."""
    tensors = list(x.values()) if isinstance(x, dict) and x else [x]
    for name, found in (("labels", [y]), ("inputs", tensors)):
        if odd := [one for one in found if not isinstance(one, Tensor) or one.dim() == 0]:
            raise ValueError(f"client {client}: {name} must be tensors with an example a row, not {shown(odd[0])}")
    if len(y) == 0:
        raise ValueError(f"client {client} has no examples")
    for tensor in tensors:
        if len(tensor) != len(y):
            raise ValueError(f"client {client} has {len(tensor)} inputs and {len(y)} labels")
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            raise ValueError(f"client {client}: inputs must hold their numbers, not {tensor.layout} on {tensor.device}")
        if tensor.dtype == torch.bool or tensor.is_complex() or (tensor.dim() > 2 and not tensor.is_floating_point()):
            raise ValueError(f"client {client}: images must be floats, scaled to [0, 1] say, not {tensor.dtype}")
        if tensor.is_floating_point() and not tensor.sum().isfinite():  # or so many that only their sum is infinite
            if not (fine := tensor.isfinite().reshape(len(y), -1).all(1)).all():
                raise ValueError(f"client {client}: input {int((~fine).nonzero()[0])} is not finite")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.is_sparse or y.is_meta:
        raise ValueError(f"client {client}: labels must be whole numbers, not {y.dtype}")
    a_column = isinstance(x, Tensor) and y.shape[1:] == (1,)
    if y.dim() > 2 or (y.dim() == 2 and (a_column or y.shape[1:] != tensors[0].shape[1:2])):
        raise ValueError(f"client {client}: labels must be of shape ({len(y)},), or a target per token, not {shown(y)}")
    if (bad := y[(y < 0) & ((y != PADDING) | (y.dim() == 1))]).numel():
        raise ValueError(f"client {client}: label {int(bad[0])} is below 0")
    if isinstance(x, dict) and MASK in x and (empty := (x[MASK].flatten(1) == 0).all(1)).any():
        raise ValueError(f"client {client}: example {int(empty.nonzero()[0])} is empty: its {MASK} is 0 everywhere")
    if y.dim() > 1 and (ignored := (y == PADDING).flatten(1).all(1)).any():
        raise ValueError(f"client {client}: all targets of example {int(ignored.nonzero()[0])} are {PADDING}, ignored")


def kind_of(x: Inputs) -> dict[str, str]:
    """The dtype and the dimensions of each tensor of the inputs."""
    named = {"one tensor": x} if isinstance(x, Tensor) else x
    return {name: f"{t.dtype} of {t.dim()} dimensions".removeprefix("torch.") for name, t in named.items()}


def check_alike(ids: Sequence[int], examples: Sequence[Examples]) -> None:
    """Raise ``ValueError`` unless all clients have inputs of the same names, dtypes and dimensions, and of the same
    length where nothing would tell what is padding."""

    first = examples[0][0]
    for client, (x, y) in zip(ids, examples):
        if kind_of(x) != kind_of(first):
            raise ValueError(f"client {client} has inputs {kind_of(x)}, client {ids[0]} has {kind_of(first)}")
        if y.dim() != examples[0][1].dim():
            raise ValueError(f"client {client} has labels of {y.dim()} dimensions, client {ids[0]} others")
        shape, like = any_tensor(x).shape[1:], any_tensor(first).shape[1:]
        if shape != like and (isinstance(x, Tensor) or MASK not in x):
            raise ValueError(
                f"client {client} has inputs of shape {tuple(shape)}, client {ids[0]} of {tuple(like)}: texts of "
                f"different lengths come as a mapping with an {MASK!r}"
            )


def pad_stack(tensors: Sequence[Tensor], value: int) -> Tensor:
    """The clients' tensors ``(n, ...)``, each filled up with ``value`` at the ends, as one ``(C, N, ...)``."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors))]
    stack = tensors[0].new_full((len(tensors), *shape), value)
    for row, tensor in zip(stack, tensors):
        row[tuple(map(slice, tensor.shape))] = tensor.detach()
    return stack


def check_pairs(name: str, examples: Sequence[Examples]) -> None:
    """Raise ``ValueError`` unless it is a list of a pair of inputs and labels for each client, one at least."""
    if isinstance(examples, str) or not isinstance(examples, Sequence) or not examples:
        refuse(name, "inputs and labels of 1 client or more", examples)
    if odd := [one for one in examples if not isinstance(one, list | tuple) or len(one) != 2]:
        refuse(f"{name}[{list(map(id, examples)).index(id(odd[0]))}]", "a pair of inputs and labels", odd[0])


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor holds whole numbers."""
    plain = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    return plain and tensor.layout == torch.strided and not tensor.is_meta


def _is_real(tensor: Tensor) -> bool:
    """Whether a tensor holds floating numbers."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def rows_of(count: int, index: slice | Sequence[int]) -> slice | list[int]:
    """Rows of so many clients. Raises ``ValueError`` for what are none."""
    return index if isinstance(index, slice) else several(whole(0, count - 1), least=0)("index", index, {})


@dataclass(frozen=True)
class Split:
    """One split of every client, padded to the largest: ``x`` (C, N, ...), ``y`` (C, N) with label -100 as padding.

    ``x`` is one tensor or a mapping of tensors, the keyword arguments that the network is called with: of a text
    ``input_ids`` and ``attention_mask`` ``(C, N, T)``, both 0 behind its end. ``y`` may be token-level, ``(C, N, T)``,
    -100 where a token is no target. ``sizes``: real examples of each client ``(C,)``; behind them ``x`` is 0, and a
    mapping repeats the client's first example, as a text without tokens is NaN to many a network. ``ids``: the clients'
    numbers, which seed their batches, so that a client trains alike in whatever company.
    """

    x: Inputs
    y: Tensor
    sizes: Tensor
    ids: tuple[int, ...]

    def __post_init__(self):
        tensors = [self.x] if isinstance(self.x, Tensor) else list(self.x.values()) if isinstance(self.x, dict) else []
        if not isinstance(self.y, Tensor) or self.y.dim() not in (2, 3) or not _is_whole(self.y):
            refuse("y", "labels (C, N) or (C, N, T), whole numbers", self.y)
        if not tensors or any(not isinstance(one, Tensor) or one.shape[:2] != self.y.shape[:2] for one in tensors):
            refuse("x", f"tensors of shape ({', '.join(map(str, self.y.shape[:2]))}, …) like y", self.x)
        if odd := [one for one in tensors if not (_is_whole(one) or _is_real(one)) or one.dim() > 3 and _is_whole(one)]:
            refuse("x", "of floating numbers, or token ids", odd[0])
        if not isinstance(self.sizes, Tensor) or self.sizes.shape != self.y.shape[:1] or not _is_whole(self.sizes):
            refuse("sizes", f"a whole number for each of {len(self.y)} clients", self.sizes)
        if len(self.sizes) and not 1 <= int(self.sizes.min()) <= int(self.sizes.max()) <= self.y.shape[1]:
            raise ValueError(f"sizes must be in [1, {self.y.shape[1]}], not {self.sizes.tolist()}")
        real = torch.arange(self.y.shape[1], device=self.y.device) < self.sizes.to(self.y.device).unsqueeze(1)
        if self.y.dim() == 2 and (real & (self.y < 0)).any():
            raise ValueError(f"y must be at least 0 for the examples that count, unlike {shown(self.y.tolist())}")
        object.__setattr__(self, "ids", tuple(several(whole(0), least=0)("ids", self.ids, {})))
        if len(self.ids) != len(self.y) or len(set(self.ids)) < len(self.ids):
            raise ValueError(f"ids must be {len(self.y)} different numbers, one for each client, not {shown(self.ids)}")

    @staticmethod
    def of(examples: Sequence[Examples], ids: Sequence[int] | None = None) -> Split:
        """Pad and stack the clients' examples.

        Raises ``ValueError`` for an empty client, mismatched lengths, ids that are not a different one for each client,
        what ``check_examples`` refuses, and clients whose inputs differ in names, dtypes or dimensions.
        """
        check_pairs("examples", examples)
        ids = tuple(range(len(examples))) if ids is None else tuple(ids)
        if len(ids) != len(examples):
            raise ValueError(f"ids: {len(ids)} of them for {len(examples)} clients")
        for client, (x, y) in zip(ids, examples):
            check_examples(client, x, y)
        check_alike(ids, examples)
        sizes = torch.tensor([len(y) for _, y in examples])
        x = map_inputs(lambda *tensors: pad_stack(tensors, 0), *(x for x, _ in examples))
        if isinstance(x, dict):
            for tensor in x.values():
                for row, n in zip(tensor, sizes.tolist()):
                    row[n:] = row[0]
        return Split(x, pad_stack([y.long() for _, y in examples], PADDING), sizes, ids)

    def __len__(self) -> int:
        return len(self.ids)

    def client(self, i: int) -> Examples:
        """Inputs ``(n, ...)`` and labels ``(n,)`` of the client in row ``i``, without the padded examples."""
        i = whole(0, len(self) - 1)("i", i, {})
        n = int(self.sizes[i])
        return take(self.x, (i, slice(n))), self.y[i, :n]

    def rows(self, index: slice | Sequence[int]) -> Split:
        """The clients in these rows, as a split of their own."""
        rows = rows_of(len(self), index)
        if isinstance(rows, slice):
            return Split(take(self.x, rows), self.y[rows], self.sizes[rows], self.ids[rows])  # a view, no copy
        pick = torch.tensor(rows, device=self.y.device)
        return Split(take(self.x, pick), self.y[pick], self.sizes[pick.cpu()], tuple(self.ids[r] for r in rows))

    @torch.no_grad()
    @door(function=function)
    def map(self, function: Callable[[Inputs], Inputs], batch_size: int = 512) -> Split:
        """The same split with ``function``, from ``(B, ...)`` to ``(B, ...)``, applied to its inputs."""
        clients, n = self.y.shape[:2]
        flat = map_inputs(lambda tensor: tensor.flatten(0, 1), self.x)
        parts = [function(take(flat, slice(i, i + batch_size))) for i in range(0, clients * n, batch_size)]
        return replace(self, x=map_inputs(lambda *tensors: torch.cat(tensors).unflatten(0, (clients, n)), *parts))

    @door()
    def to(self, device: str | torch.device) -> Split:
        """The same split on ``device`` (the sizes stay on the CPU)."""
        return Split(map_inputs(lambda tensor: tensor.to(device), self.x), self.y.to(device), self.sizes, self.ids)


@dataclass(frozen=True)
class Federation:
    """C clients with a ``train``, a ``calibration`` and a ``test`` split each. Calibration examples train nothing.

    ``classes``: of the labels; for token-level targets, the size of the vocabulary. Raises ``ValueError`` for labels
    outside them and for splits of different clients or inputs.
    """

    train: Split
    calibration: Split
    test: Split
    classes: int
    name: str = "federation"

    def __post_init__(self):
        check_fields(self, **dict.fromkeys(("train", "calibration", "test"), kind("Split")))
        for part in ("train", "calibration", "test"):
            split = getattr(self, part)
            if kind_of(split.x) != kind_of(self.train.x):
                raise ValueError(f"{part} has inputs {kind_of(split.x)}, train has {kind_of(self.train.x)}")
            shape, like = any_tensor(split.x).shape[2:], any_tensor(self.train.x).shape[2:]
            if shape != like and isinstance(split.x, Tensor):
                raise ValueError(f"{part} has inputs of shape {tuple(shape)}, train of {tuple(like)}")
            if split.ids != self.train.ids:
                raise ValueError(f"{part} has clients {split.ids}, train has {self.train.ids}")
            for client in range(len(split)):
                labels = split.client(client)[1]
                labels = labels if labels.dim() == 1 else labels[labels != PADDING]
                if (bad := labels[(labels < 0) | (labels >= self.classes)]).numel():
                    raise ValueError(
                        f"client {split.ids[client]}: {part} label {int(bad[0])} is outside 0 … {self.classes - 1}"
                    )

    def __len__(self) -> int:
        return len(self.train)

    @door()
    def to(self, device: str | torch.device) -> Federation:
        """The same federation on ``device``."""
        return self._each(lambda split: split.to(device))

    def rows(self, index: slice | Sequence[int]) -> Federation:
        """The clients in these rows, as a federation of their own."""
        return self._each(lambda split: split.rows(index))

    def map(self, function: Callable[[Inputs], Inputs], batch_size: int = 512) -> Federation:
        """The same federation with ``function`` applied to all inputs, such as a backbone's frozen ``embed``."""
        return self._each(lambda split: split.map(function, batch_size))

    def _each(self, function: Callable[[Split], Split]) -> Federation:
        parts = (function(split) for split in (self.train, self.calibration, self.test))
        return Federation(*parts, self.classes, self.name)


@door(size=whole(1), seed=one_or_several(valid_seed))
def batch_indices(size: int, start: int, steps: int, batch_size: int, seed: int | Sequence[int]) -> Tensor:
    """The examples of steps ``start … start + steps - 1`` of one client, ``(steps, batch_size)``.

    The stream is one permutation of the client's examples after another; epoch ``e`` has the seed ``(*seed, e)``. It
    can be entered at any step, so rounds of 5 steps see the same batches as one run over all of them.
    """
    seed = [seed] if isinstance(seed, int) else list(seed)
    first, last = start * batch_size, (start + steps) * batch_size
    epochs = range(first // size, -(-last // size))
    if steps == 0:
        return torch.zeros(0, batch_size, dtype=torch.int64)
    stream = np.concatenate([np.random.default_rng([*seed, epoch]).permutation(size) for epoch in epochs])
    offset = epochs.start * size
    return torch.from_numpy(stream[first - offset : last - offset].reshape(steps, batch_size))


@door()
def dirichlet_proportions(clients: int, classes: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Class proportions ``(C, K)`` of each client, from a symmetric Dirichlet (Hsu et al., 2019).

    Small ``alpha``: few classes per client; ``alpha=inf``: all classes alike. Raises ``ValueError`` for alpha ≤ 0.
    """
    if np.isinf(alpha):
        return np.full((clients, classes), 1 / classes)
    return rng.dirichlet(np.full(classes, alpha), size=clients)


def _round(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to ``shares`` that add up to ``total`` (largest remainders)."""
    exact = shares / shares.sum() * total
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def draw(
    labels: np.ndarray, proportions: np.ndarray, sizes: Sequence[int], rng: np.random.Generator
) -> list[np.ndarray]:
    """Positions in ``labels`` for each client, in random order; no position is drawn twice.

    ``proportions``: ``(C, K)``, of which client i gets ``sizes[i]`` examples, rounded by largest remainders. Raises
    ``SupplyError`` (a ``ValueError``) when a class runs out.
    """
    counts = np.stack([_round(share, size) for share, size in zip(proportions, sizes)])  # (C, K)
    picked: list[list[np.ndarray]] = [[] for _ in sizes]
    for k in range(proportions.shape[1]):
        pool = rng.permutation(np.flatnonzero(labels == k))
        if (wanted := counts[:, k].sum()) > len(pool):
            raise SupplyError(
                f"class {k} runs out: {wanted} examples are asked for, there are {len(pool)}; take fewer clients, "
                "smaller sizes or a larger alpha"
            )
        for client, part in enumerate(np.split(pool, np.cumsum(counts[:, k]))[:-1]):
            picked[client].append(part)
    return [rng.permutation(np.concatenate(parts)) for parts in picked]


@door(client=whole(0))
def shift_images(x: Tensor, client: int, clients: int) -> Tensor:
    """Images in [0, 1] seen through client ``client``'s own domain: turned by 360° · client / clients, and inverted
    (1 - x) for odd clients. Client 0 keeps the originals."""
    from torchvision.transforms.functional import InterpolationMode, rotate

    if not isinstance(x, Tensor) or x.dim() != 4 or not _is_real(x) or not len(x):
        refuse("x", "images (n, channels, height, width), floats", x)
    if client:
        x = rotate(x, 360 * client / clients, interpolation=InterpolationMode.BILINEAR)
    return 1 - x if client % 2 else x


def _check_partition(pool, test_pool, sizes, calibration_size, test_size, clients, classes, proportions, shift) -> None:
    """Raise ``ValueError`` for what ``partition`` refuses."""
    for name, (_, labels) in (("pool", pool), ("test_pool", test_pool)):
        if labels.dim() == 1 and (labels >= classes).any():
            raise ValueError(f"{name} has label {int(labels.max())}, which is outside 0 … {classes - 1}")
    if shift and isinstance(pool[0], dict):
        raise ValueError("shift=True is for images, not for a mapping of tensors")
    if pool[1].dim() > 1 or test_pool[1].dim() > 1:
        raise ValueError("examples are dealt by their labels, and token-level targets have none: use from_tensors")
    if len(sizes) != clients:
        raise ValueError(f"train_size names {len(sizes)} clients, not {clients}")
    if proportions is not None:
        try:
            proportions = np.asarray(proportions, dtype=float)
        except (ValueError, TypeError, RuntimeError):  # rows of different lengths, text, a tensor that has a gradient
            refuse("proportions", f"numbers, a row for each of {clients} clients", proportions)
        if np.shape(proportions) != (clients, classes):
            raise ValueError(f"proportions are of shape {np.shape(proportions)}, not a row for each of {clients}")
        if not np.isfinite(proportions).all() or np.min(proportions) < 0 or not np.sum(proportions, 1).all():
            raise ValueError("proportions must be finite, at least 0 and not all 0 for a client")
    wanted = sum(sizes) + clients * calibration_size, clients * test_size
    for part, asked, there in zip(("training and calibration", "test"), wanted, (len(pool[1]), len(test_pool[1]))):
        if asked > there:  # before a hundred draws that cannot succeed
            raise SupplyError(
                f"the pool runs out: {clients} clients ask for {asked} {part} examples, there are {there}; take fewer "
                "clients or smaller sizes"
            )


def pool_of_examples(name: str, value: Examples, given: object) -> Examples:
    """Inputs and labels to deal out. Raises ``ValueError`` for what ``check_examples`` does."""
    check_pairs(name, [value])
    try:
        check_examples(0, *value)
    except ValueError as error:
        raise ValueError(str(error).replace("client 0", name, 1)) from None
    return value


@door(pool=pool_of_examples, test_pool=pool_of_examples, train_size=one_or_several(whole(1)))
def partition(
    pool: Examples,
    test_pool: Examples,
    classes: int,
    *,
    clients: int = 8,
    train_size: int | Sequence[int] = 100,
    calibration_size: int = 30,
    test_size: int = 250,
    alpha: float = 0.5,
    proportions: np.ndarray | None = None,
    shift: bool = False,
    seed: int = 0,
    name: str = "federation",
) -> Federation:
    """Deal two pools of examples out to clients: train and calibration from ``pool``, test from ``test_pool``.

    Each client draws its class proportions from a Dirichlet(``alpha``), or has its row of ``proportions`` ``(C, K)``,
    and keeps them in all three splits; ``shift=True`` gives each an image domain of its own as well (``shift_images``);
    ``alpha=inf`` with ``shift=True`` is feature shift alone. ``train_size`` may differ from client to client. No
    example is dealt twice; Dirichlet draws that together ask for more of a class than the pools hold are drawn anew,
    up to 100 times.

    Raises ``ValueError`` for alpha ≤ 0, no clients, sizes < 1, what ``check_examples`` refuses, labels outside the
    classes, proportions of another shape or below 0, token-level targets, a shift of what are no images, or
    (``SupplyError``) a class that runs out every time.
    """
    rng = np.random.default_rng([seed, 2602_18658])
    sizes = [train_size] * clients if isinstance(train_size, int) else list(train_size)
    _check_partition(pool, test_pool, sizes, calibration_size, test_size, clients, classes, proportions, shift)
    for attempt in range(DRAWS):
        shares = dirichlet_proportions(clients, classes, alpha, rng) if proportions is None else proportions
        try:
            chosen = draw(pool[1].numpy(), shares, [n + calibration_size for n in sizes], rng)
            tested = draw(test_pool[1].numpy(), shares, [test_size] * clients, rng)
            break
        except SupplyError:
            if proportions is not None or attempt == DRAWS - 1:
                raise

    def split(source: Examples, index: Sequence[np.ndarray]) -> Split:
        examples = []
        for client, rows in enumerate(index):
            x, y = take(source[0], rows), source[1][rows]
            examples.append((shift_images(x, client, clients) if shift else x, y))
        return Split.of(examples)

    return Federation(
        train=split(pool, [rows[:n] for rows, n in zip(chosen, sizes)]),
        calibration=split(pool, [rows[n:] for rows, n in zip(chosen, sizes)]),
        test=split(test_pool, tested),
        classes=classes,
        name=name,
    )


@door(options=options_of(partition))
def fashion_mnist(**options) -> Federation:
    """A federation of the Fashion-MNIST subset in ``data/`` (20,000 train and 10,000 test images): no download.

    ``options`` are those of ``partition``. Images are ``(1, 28, 28)`` in [0, 1].

    >>> federation = fashion_mnist(clients=3, train_size=20, test_size=50)
    >>> federation.train.x.shape
    torch.Size([3, 20, 1, 28, 28])

    Raises ``FileError`` (a ``ValueError``) when the file is missing or damaged.
    """
    path, pools = check_file(data_path("fashion_mnist.npz")), []
    with reading(path), np.load(path, allow_pickle=False) as file:
        for part in ("train", "test"):
            images, labels = file[f"{part}_images"], file[f"{part}_labels"]
            if images.shape != (len(labels), 28, 28) or {images.dtype, labels.dtype} != {np.dtype(np.uint8)}:
                raise ValueError(f"{part}: {images.dtype} {images.shape} are no images of {len(labels)} labels")
            if labels.max(initial=0) > 9:
                raise ValueError(f"{part} has label {labels.max()}, which is outside 0 … 9")
            pools.append((torch.from_numpy(images).unsqueeze(1) / 255, torch.from_numpy(labels).long()))
    return unchecked(partition)(*pools, classes=10, **{"name": "Fashion-MNIST", **options})


@door(options=options_of(partition))
def from_torchvision(dataset: str, root: str, *, download: bool = True, **options) -> Federation:
    """A federation of the full ``"FashionMNIST"``, ``"CIFAR10"`` or ``"CIFAR100"``, downloaded by torchvision.

    ``options`` are those of ``partition``. Images are ``(channels, height, width)`` in [0, 1], kept in memory.
    """
    from torchvision import datasets

    kinds = {"FashionMNIST": 10, "CIFAR10": 10, "CIFAR100": 100}
    if dataset not in kinds:
        raise ValueError(f"dataset must be one of {sorted(kinds)}, not {dataset!r}")
    pools = []
    for train in (True, False):
        source = getattr(datasets, dataset)(root, train=train, download=download)
        x = torch.as_tensor(source.data)
        x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2)
        pools.append((x / 255, torch.as_tensor(source.targets).long()))
    return partition(*pools, classes=kinds[dataset], **{"name": dataset, **options})


@door()
def from_tensors(
    train: Sequence[Examples],
    test: Sequence[Examples],
    *,
    calibration: Sequence[Examples] | None = None,
    calibration_size: int = 30,
    classes: int | None = None,
    seed: int = 0,
    name: str = "federation",
) -> Federation:
    """A federation of your own: for each client a pair of inputs ``(n, ...)`` and labels ``(n,)`` (see ``Split``).

    Without ``calibration``, ``calibration_size`` examples of each client are drawn from its ``train`` and withheld
    from training. ``classes`` defaults to the largest label plus one.

    Raises ``ValueError`` for what ``check_examples`` refuses, labels outside the classes, splits of different clients
    or inputs, and a client too small to withhold from.
    """
    for part, examples in (("train", train), ("test", test), ("calibration", calibration)):
        if part != "calibration" or examples is not None:
            check_pairs(part, examples)
    train = list(train)
    for client, examples in enumerate(train):
        check_examples(client, *examples)
    if classes is None:
        classes = 1 + max(int(y.max()) for _, y in [*train, *test] if len(y))
    if calibration is None:
        calibration = []
        for client, (x, y) in enumerate(train):
            if len(y) <= calibration_size:
                raise ValueError(f"client {client} has {len(y)} examples: none is left if {calibration_size} calibrate")
            order = torch.from_numpy(np.random.default_rng([seed, client]).permutation(len(y)))
            held, kept = order[:calibration_size], order[calibration_size:]
            calibration.append((take(x, held), y[held]))
            train[client] = (take(x, kept), y[kept])
    return Federation(Split.of(train), Split.of(calibration), Split.of(test), classes, name)
