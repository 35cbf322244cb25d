"""Partitioners: pure functions of labels and a generator that deal examples out to clients."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
from torch import Tensor

from ..checks import Count, Flag, List, PositiveOrInf, Seed, Size, bound, check_arguments, checked, invalid
from .inputs import Examples, ExamplesPair, check_examples, is_float, take
from .split import Federation, Split

DRAWS = 100  # how often a federation's class proportions are drawn anew before a class counts as run out


class SupplyError(ValueError):
    """The clients ask for more examples of a class than there are."""


@checked
def dirichlet_proportions(clients: Size, classes: Size, alpha: PositiveOrInf, rng: np.random.Generator) -> np.ndarray:
    """Class proportions ``(C, K)`` of each client, from a symmetric Dirichlet (Hsu et al., 2019).

    Small ``alpha``: few classes per client; ``alpha=inf``: all classes alike. Raises ``ValueError`` for alpha ≤ 0.
    """
    if np.isinf(alpha):
        return np.full((clients, classes), 1 / classes)
    return rng.dirichlet(np.full(classes, alpha), size=clients)


def largest_remainders(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to ``shares`` that add up to ``total``."""
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
    counts = np.stack([largest_remainders(share, size) for share, size in zip(proportions, sizes)])  # (C, K)
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


@checked
def shift_images(x: Tensor, client: Count, clients: Size) -> Tensor:
    """Images in [0, 1] in the domain of client ``client``: turned by 360° · client / clients, and inverted (1 - x) for
    odd clients. Client 0 keeps the originals."""
    from torchvision.transforms.functional import InterpolationMode, rotate

    if x.dim() != 4 or not is_float(x) or not len(x):
        invalid("x", "images (n, channels, height, width), floats", x)
    if client:
        x = rotate(x, 360 * client / clients, interpolation=InterpolationMode.BILINEAR)
    return 1 - x if client % 2 else x


def _check_pool(name: str, pool: Examples, classes: int) -> None:
    """Raise ``ValueError`` for a pool that is no examples, or that cannot be dealt by its labels."""
    check_examples(name, *pool)
    _, labels = pool
    if labels.dim() > 1 or is_float(labels):
        raise ValueError(f"{name} has {labels.dtype} of {labels.dim()} dimensions: examples are dealt by a label each")
    if (labels >= classes).any():
        raise ValueError(f"{name} has label {int(labels.max())}, which is outside 0 … {classes - 1}")


def _check_supply(part: str, clients: int, wanted: int, available: int) -> None:
    """Raise ``SupplyError`` for more examples than there are, before a hundred draws that would all fail."""
    if wanted > available:
        raise SupplyError(
            f"the pool runs out: {clients} clients ask for {wanted} {part} examples, there are {available}; take fewer "
            "clients or smaller sizes"
        )


def _proportions(value: Any, clients: int, classes: int) -> np.ndarray:
    """Class proportions ``(C, K)``. Raises ``ValueError`` for another shape, and for rows below 0 or all 0."""
    try:
        found = np.asarray(value, dtype=float)
    except (ValueError, TypeError, RuntimeError):  # rows of different lengths, text, a tensor with a gradient
        invalid("proportions", f"numbers, a row for each of {clients} clients", value)
    if found.shape != (clients, classes):
        raise ValueError(f"proportions are of shape {found.shape}, not a row for each of {clients}")
    if not np.isfinite(found).all() or found.min() < 0 or not found.sum(1).all():
        raise ValueError("proportions must be finite, at least 0 and not all 0 for a client")
    return found


@checked
def partition(
    pool: ExamplesPair,
    test_pool: ExamplesPair,
    classes: Size,
    *,
    clients: Size = 8,
    train_size: Size | List[Size] = 100,
    calibration_size: Size = 30,
    test_size: Size = 250,
    alpha: PositiveOrInf = 0.5,
    proportions: Any = None,
    shift: Flag = False,
    seed: Seed = 0,
    name: str = "federation",
) -> Federation:
    """Deal two pools of examples out to clients: train and calibration from ``pool``, test from ``test_pool``.

    Each client draws its class proportions from a Dirichlet(``alpha``), or has its row of ``proportions`` ``(C, K)``,
    and keeps them in all three splits; ``shift=True`` also gives each client another domain (``shift_images``);
    ``alpha=inf`` with ``shift=True`` is feature shift alone. ``train_size`` may differ from client to client. No
    example is dealt twice; Dirichlet draws that together ask for more of a class than the pools hold are drawn anew,
    up to 100 times.

    Raises ``ValueError`` for alpha ≤ 0, no clients, sizes < 1, what ``check_examples`` refuses, labels outside the
    classes, proportions of another shape or below 0, token-level targets, a shift of what are no images, or
    (``SupplyError``) a class that runs out every time.
    """
    rng = np.random.default_rng([seed, 2602_18658])
    sizes = [train_size] * clients if isinstance(train_size, int) else list(train_size)
    if len(sizes) != clients:
        raise ValueError(f"train_size names {len(sizes)} clients, not {clients}")
    _check_pool("pool", pool, classes)
    _check_pool("test_pool", test_pool, classes)
    if shift and isinstance(pool[0], dict):
        raise ValueError("shift=True is for images, not for a mapping of tensors")
    if proportions is not None:
        proportions = _proportions(proportions, clients, classes)
    _check_supply("training and calibration", clients, sum(sizes) + clients * calibration_size, len(pool[1]))
    _check_supply("test", clients, clients * test_size, len(test_pool[1]))
    for attempt in range(DRAWS):
        shares = dirichlet_proportions(clients, classes, alpha, rng) if proportions is None else proportions
        try:
            drawn = draw(pool[1].numpy(), shares, [n + calibration_size for n in sizes], rng)
            drawn_test = draw(test_pool[1].numpy(), shares, [test_size] * clients, rng)
            break
        except SupplyError:
            if proportions is not None or attempt == DRAWS - 1:
                raise

    def split(source: Examples, index: Sequence[np.ndarray]) -> Split:
        examples = []
        for client, rows in enumerate(index):
            x, y = take(source[0], rows), source[1][rows]
            examples.append((shift_images(x, client, clients) if shift else x, y))
        return Split(examples)

    return Federation(
        train=split(pool, [rows[:n] for rows, n in zip(drawn, sizes)]),
        calibration=split(pool, [rows[n:] for rows, n in zip(drawn, sizes)]),
        test=split(test_pool, drawn_test),
        classes=classes,
        name=name,
    )


def partition_options(**options) -> dict[str, Any]:
    """The options of ``partition``, with its defaults, before there are pools. Raises ``ValueError`` for bad ones."""
    pools = dict.fromkeys(("pool", "test_pool"), (None, None))
    given = bound("partition", signature(partition), (), pools | {"classes": 1} | options)
    found = check_arguments(partition, given)
    return {name: value for name, value in found.items() if name not in (*pools, "classes")}
