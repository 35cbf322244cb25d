"""A federation: C clients, each with examples to train on, to calibrate on and to be tested on.

Partitioners are pure functions of labels and a generator. Loaders read the Fashion-MNIST subset in ``data/``, the
full data sets through torchvision, or your own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import AnyList, Count, Device, Size, checked, invalid, shown
from .inputs import (
    PADDING,
    Examples,
    Inputs,
    _is_real,
    _is_whole,
    any_tensor,
    check_alike,
    check_examples,
    check_pairs,
    kind_of,
    map_inputs,
    pad_stack,
    take,
)


@checked
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
    ids: AnyList[Count]

    def __post_init__(self):
        tensors = [self.x] if isinstance(self.x, Tensor) else list(self.x.values()) if isinstance(self.x, dict) else []
        if not isinstance(self.y, Tensor) or self.y.dim() not in (2, 3) or not _is_whole(self.y):
            invalid("y", "labels (C, N) or (C, N, T), whole numbers", self.y)
        if not tensors or any(not isinstance(one, Tensor) or one.shape[:2] != self.y.shape[:2] for one in tensors):
            invalid("x", f"tensors of shape ({', '.join(map(str, self.y.shape[:2]))}, …) like y", self.x)
        if odd := [one for one in tensors if not (_is_whole(one) or _is_real(one)) or one.dim() > 3 and _is_whole(one)]:
            invalid("x", "of floating numbers, or token ids", odd[0])
        if not isinstance(self.sizes, Tensor) or self.sizes.shape != self.y.shape[:1] or not _is_whole(self.sizes):
            invalid("sizes", f"a whole number for each of {len(self.y)} clients", self.sizes)
        if len(self.sizes) and not 1 <= int(self.sizes.min()) <= int(self.sizes.max()) <= self.y.shape[1]:
            raise ValueError(f"sizes must be in [1, {self.y.shape[1]}], not {self.sizes.tolist()}")
        real = torch.arange(self.y.shape[1], device=self.y.device) < self.sizes.to(self.y.device).unsqueeze(1)
        if self.y.dim() == 2 and (real & (self.y < 0)).any():
            raise ValueError(f"y must be at least 0 for the examples that count, unlike {shown(self.y.tolist())}")
        object.__setattr__(self, "ids", tuple(self.ids))
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

    @checked
    def client(self, i: Count) -> Examples:
        """Inputs ``(n, ...)`` and labels ``(n,)`` of the client in row ``i``, without the padded examples."""
        if i >= len(self):
            invalid("i", f"at most {len(self) - 1}", i)
        n = int(self.sizes[i])
        return take(self.x, (i, slice(n))), self.y[i, :n]

    @checked
    def rows(self, index: slice | AnyList[Count]) -> Split:
        """The clients in these rows, as a split of their own."""
        if isinstance(index, slice):
            return Split(take(self.x, index), self.y[index], self.sizes[index], self.ids[index])  # a view, no copy
        for i, row in enumerate(index):
            if row >= len(self):
                invalid(f"index[{i}]", f"at most {len(self) - 1}", row)
        pick = torch.tensor(index, device=self.y.device, dtype=torch.int64)
        return Split(take(self.x, pick), self.y[pick], self.sizes[pick.cpu()], tuple(self.ids[r] for r in index))

    @torch.no_grad()
    @checked
    def map(self, function: Callable, batch_size: Size = 512) -> Split:
        """The same split with ``function``, from ``(B, ...)`` to ``(B, ...)``, applied to its inputs."""
        clients, n = self.y.shape[:2]
        flat = map_inputs(lambda tensor: tensor.flatten(0, 1), self.x)
        parts = [function(take(flat, slice(i, i + batch_size))) for i in range(0, clients * n, batch_size)]
        return replace(self, x=map_inputs(lambda *tensors: torch.cat(tensors).unflatten(0, (clients, n)), *parts))

    @checked
    def to(self, device: Device) -> Split:
        """The same split on ``device`` (the sizes stay on the CPU)."""
        return Split(map_inputs(lambda tensor: tensor.to(device), self.x), self.y.to(device), self.sizes, self.ids)


@checked
@dataclass(frozen=True)
class Federation:
    """C clients with a ``train``, a ``calibration`` and a ``test`` split each. Calibration examples train nothing.

    ``classes``: of the labels; for token-level targets, the size of the vocabulary. Raises ``ValueError`` for labels
    outside them and for splits of different clients or inputs.
    """

    train: Split
    calibration: Split
    test: Split
    classes: Size
    name: str = "federation"

    def __post_init__(self):
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

    @checked
    def to(self, device: Device) -> Federation:
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
