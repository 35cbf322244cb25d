"""A federation: C clients, each with examples to train on, to calibrate on and to be tested on.

``partition.py``, ``sources.py`` and ``tasks.py`` make federations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from ..checks import AnyList, Count, Device, List, Size, checked, invalid, shown
from .inputs import (
    PADDING,
    Examples,
    ExamplesPair,
    Inputs,
    any_tensor,
    check_alike,
    check_examples,
    is_float,
    is_integer,
    kind_of,
    map_inputs,
    pad_stack,
    take,
)

Rows = slice | AnyList[Count]  # of clients
Names = Annotated[AnyList[str], AfterValidator(tuple)]


@checked
@dataclass(frozen=True)
class Split:
    """One split of every client, padded to the largest: ``x`` (C, N, ...), ``y`` (C, N) with label -100 as padding.

    ``x`` is one tensor or a mapping of tensors, the keyword arguments that the network is called with: of a text
    ``input_ids`` and ``attention_mask`` ``(C, N, T)``, both 0 behind its end. ``y`` may be token-level, ``(C, N, T)``,
    -100 where a token is no target. ``sizes``: real examples of each client ``(C,)``; behind them ``x`` is 0, and a
    mapping repeats the client's first example, because many networks return NaN for a text without tokens. ``ids``: the
    clients' numbers, which seed their batches, so that a client's training does not depend on the other clients.
    """

    x: Inputs
    y: Tensor
    sizes: Tensor
    ids: Annotated[AnyList[Count], AfterValidator(tuple)]

    def __post_init__(self):
        tensors = [self.x] if isinstance(self.x, Tensor) else list(self.x.values())
        if self.y.dim() not in (2, 3) or not is_integer(self.y):
            invalid("y", "labels (C, N) or (C, N, T), whole numbers", self.y)
        clients, most = self.y.shape[:2]
        if not tensors or any(tensor.shape[:2] != (clients, most) for tensor in tensors):
            invalid("x", f"tensors of shape ({clients}, {most}, …) like y", self.x)
        for tensor in tensors:
            if not is_float(tensor) and (tensor.dim() > 3 or not is_integer(tensor)):
                invalid("x", "of floating numbers, or token ids", tensor)
        if self.sizes.shape != (clients,) or not is_integer(self.sizes):
            invalid("sizes", f"a whole number for each of {clients} clients", self.sizes)
        if clients and not 1 <= int(self.sizes.min()) <= int(self.sizes.max()) <= most:
            raise ValueError(f"sizes must be in [1, {most}], not {self.sizes.tolist()}")
        is_example = torch.arange(most, device=self.y.device) < self.sizes.to(self.y.device).unsqueeze(1)
        if self.y.dim() == 2 and (is_example & (self.y < 0)).any():
            raise ValueError(f"y must be at least 0 for the examples that count, unlike {shown(self.y.tolist())}")
        if len(self.ids) != clients or len(set(self.ids)) < clients:
            raise ValueError(f"ids must be {clients} different numbers, one for each client, not {shown(self.ids)}")

    @staticmethod
    @checked
    def of(examples: List[ExamplesPair], ids: AnyList[Count] | None = None) -> Split:
        """Pad and stack the clients' examples.

        Raises ``ValueError`` for an empty client, mismatched lengths, ids that are not a different one for each client,
        what ``check_examples`` refuses, and clients whose inputs differ in names, dtypes or dimensions.
        """
        ids = range(len(examples)) if ids is None else ids
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
    def rows(self, index: Rows) -> Split:
        """The clients in these rows, as another split."""
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

    ``classes``: of the labels; for token-level targets, the size of the vocabulary. ``client_names`` and
    ``class_names``: a name for each, where they are known. Raises ``ValueError`` for labels outside the classes, for
    splits of different clients or inputs, and for too few or too many names.
    """

    train: Split
    calibration: Split
    test: Split
    classes: Size
    name: str = "federation"
    client_names: Names | None = None
    class_names: Names | None = None

    def __post_init__(self):
        for part, names, n in (("client", self.client_names, len(self)), ("class", self.class_names, self.classes)):
            if names is not None and len(names) != n:
                raise ValueError(f"{part}_names: {len(names)} of them, not {n}: {shown(names)}")
        for part in ("train", "calibration", "test"):
            split = getattr(self, part)
            if kind_of(split.x) != kind_of(self.train.x):
                raise ValueError(f"{part} has inputs {kind_of(split.x)}, train has {kind_of(self.train.x)}")
            shape, expected = any_tensor(split.x).shape[2:], any_tensor(self.train.x).shape[2:]
            if shape != expected and isinstance(split.x, Tensor):
                raise ValueError(f"{part} has inputs of shape {tuple(shape)}, train of {tuple(expected)}")
            if split.ids != self.train.ids:
                raise ValueError(f"{part} has clients {split.ids}, train has {self.train.ids}")
            for row, client in enumerate(split.ids):
                _, labels = split.client(row)
                labels = labels if labels.dim() == 1 else labels[labels != PADDING]
                if (bad := labels[(labels < 0) | (labels >= self.classes)]).numel():
                    raise ValueError(f"client {client}: {part} label {int(bad[0])} is outside 0 … {self.classes - 1}")

    def __len__(self) -> int:
        return len(self.train)

    @checked
    def to(self, device: Device) -> Federation:
        """The same federation on ``device``."""
        return self._each(lambda split: split.to(device))

    @checked
    def rows(self, index: Rows) -> Federation:
        """The clients in these rows, as another federation."""
        names = self.client_names
        if names is not None:
            names = names[index] if isinstance(index, slice) else [names[i] for i in index if i < len(names)]
        return self._each(lambda split: split.rows(index), client_names=names)

    @checked
    def map(self, function: Callable, batch_size: Size = 512) -> Federation:
        """The same federation with ``function`` applied to all inputs, such as a backbone's frozen ``embed``."""
        return self._each(lambda split: split.map(function, batch_size))

    def _each(self, function: Callable[[Split], Split], **changes) -> Federation:
        parts = {name: function(getattr(self, name)) for name in ("train", "calibration", "test")}
        return replace(self, **parts, **changes)
