"""A federation: C clients, each with examples to train on, to calibrate on and to be tested on.

``partition.py``, ``sources.py`` and ``tasks.py`` make federations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from ..checks import AnyList, Count, Device, List, Size, checked, invalid, shown
from .display import Bars, Lazily, displayed, span
from .inputs import (
    PADDING,
    Examples,
    ExamplesPair,
    Inputs,
    any_tensor,
    check_alike,
    check_examples,
    cut_texts,
    is_float,
    is_integer,
    kind_of,
    map_inputs,
    pad_concatenate,
    pad_stack,
    padding_of,
    take,
    text_lengths,
)

Rows = slice | AnyList[Count]  # of clients
Names = Annotated[AnyList[str], AfterValidator(tuple)]


@displayed
@checked
@dataclass(frozen=True, eq=False)
class Split:
    """One split of every client: ``examples``, of each its inputs ``(n, ...)`` and labels ``(n,)``, as they are given.

    Inputs are one tensor or a mapping of tensors, the keyword arguments that the network is called with: of texts
    ``input_ids`` and ``attention_mask`` ``(n, T)``. Labels may be token-level, ``(n, T)``, -100 where a token is no
    target, or real targets of regression and the like, floats ``(n,)`` or ``(n, d)``. Clients may have any number of
    examples, and texts of any length: nothing is padded in memory. ``ids``: the clients' numbers, 0, 1, … unless given,
    which seed their batches, so that a client's training does not depend on the other clients.

    Raises ``ValueError`` for an empty client, mismatched lengths, ids that are not a different one for each client,
    what ``check_examples`` refuses, and clients whose inputs differ in names, dtypes or dimensions.
    """

    examples: Annotated[List[ExamplesPair], AfterValidator(tuple)]
    ids: AnyList[Count] = ()

    def __post_init__(self):
        ids = tuple(self.ids or range(len(self.examples)))
        if len(ids) != len(self.examples) or len(set(ids)) < len(ids):
            raise ValueError(f"ids must be {len(self.examples)} different ones, one for each client, not {shown(ids)}")
        for client, (x, y) in zip(ids, self.examples):
            check_examples(client, x, y)
        check_alike(ids, self.examples)
        examples = [(map_inputs(Tensor.detach, x), y.detach() if is_float(y) else y.long()) for x, y in self.examples]
        vars(self).update(vars(_split(examples, ids)))

    @staticmethod
    def of(examples: Sequence[Examples], ids: Sequence[int] = ()) -> Split:
        """``Split(examples, ids)``, by the name of earlier versions."""
        return Split(examples, ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | slice) -> Split:
        return self.rows(index if isinstance(index, slice) else [range(len(self))[index]])

    def _title(self) -> str:
        return f"{len(self)} clients; {span(self.sizes)} examples each; {self._inputs()}"

    def _inputs(self) -> str:
        x, _ = self.examples[0]
        named = {"inputs": x} if isinstance(x, Tensor) else x
        parts = (f"{name} {tensor.dtype} {tuple(tensor.shape[1:])}" for name, tensor in named.items())
        return ", ".join(parts).replace("torch.", "")

    def _columns(self) -> dict[str, Sequence]:
        return {
            "client": self.ids,
            "examples": self.sizes,
            "labels": Lazily(lambda i: label_bars(self.examples[i][1]), len(self)),
        }

    @cached_property
    def nbytes(self) -> int:
        """The bytes of all examples, which are those that the split takes in memory."""
        tensors = [tensor for x, y in self.examples for tensor in (*(x.values() if isinstance(x, dict) else [x]), y)]
        return sum(tensor.nbytes for tensor in tensors)

    @cached_property
    def sizes(self) -> Tensor:
        """The number of examples of each client ``(C,)``, on the CPU."""
        return torch.tensor([len(y) for _, y in self.examples])

    @property
    def x(self) -> Inputs:
        """All inputs ``(C, N, ...)``, padded to the largest client and the longest text: a copy, made at each use.

        Behind a client's examples a tensor is 0, and a mapping repeats the client's first example, because many
        networks return NaN for a text without tokens. Behind the end of a text all is 0.
        """
        x = map_inputs(lambda *tensors: pad_stack(tensors, 0), *(x for x, _ in self.examples))
        if isinstance(x, dict):
            for tensor in x.values():
                for row, n in zip(tensor, self.sizes.tolist()):
                    row[n:] = row[0]
        return x

    @property
    def y(self) -> Tensor:
        """All labels ``(C, N)`` or ``(C, N, T)``, padded with -100, real targets with NaN: a copy, made at each use."""
        return pad_stack([y for _, y in self.examples], padding_of(self.examples[0][1]))

    @checked
    def client(self, i: Count) -> Examples:
        """Inputs ``(n, ...)`` and labels ``(n,)`` of the client in row ``i``."""
        if i >= len(self):
            invalid("i", f"at most {len(self) - 1}", i)
        return self.examples[i]

    @checked
    def rows(self, index: Rows) -> Split:
        """The clients in these rows, as another split of the same tensors."""
        if isinstance(index, slice):
            return _split(self.examples[index], self.ids[index])
        for i, row in enumerate(index):
            if row >= len(self):
                invalid(f"index[{i}]", f"at most {len(self) - 1}", row)
        return _split([self.examples[row] for row in index], [self.ids[row] for row in index])

    @checked
    def head(self, n: Size) -> Split:
        """The first ``n`` examples of every client, or all where it has fewer."""
        return _split([(take(x, slice(n)), y[:n]) for x, y in self.examples], self.ids)

    def with_labels(self, y: Tensor) -> Split:
        """The same inputs with other labels, those of ``y`` (C, N, ...), which is padded as this split's ``y`` is.

        Raises ``ValueError`` for another shape, and for labels that are neither 0 or more nor -100.
        """
        shape = tuple(self.y.shape)
        if y.shape != shape or not is_integer(y):
            invalid("labels", f"whole numbers of shape {shape}, as those of split", y)
        if (odd := y[(y < 0) & (y != PADDING)]).numel():
            raise ValueError(f"labels must be at least 0, or {PADDING} where one is ignored, not {int(odd[0])}")
        of_clients = zip(self.examples, y.long())
        return _split([(x, new[tuple(map(slice, old.shape))]) for (x, old), new in of_clients], self.ids)

    def joined(self) -> tuple[Inputs, Tensor, Tensor]:
        """The examples of all clients one after another, inputs ``(M, ...)`` and labels ``(M, ...)``, texts padded to
        the longest one; and where each client's begin ``(C,)``."""
        x = map_inputs(lambda *tensors: pad_concatenate(tensors, 0), *(x for x, _ in self.examples))
        y = pad_concatenate([y for _, y in self.examples], padding_of(self.examples[0][1]))
        return x, y, self.sizes.cumsum(0) - self.sizes

    @cached_property
    def lengths(self) -> list[int]:
        """The number of tokens to which each client's texts are padded; 1 where the inputs are no texts."""
        return [any_tensor(x).shape[1] if isinstance(x, dict) else 1 for x, _ in self.examples]

    def alike(self, *, by_size: bool = True) -> list[list[int]]:
        """The rows in groups of clients that cost little when they are padded together: in a group, texts are more than
        half as long as its longest one and, ``by_size``, numbers of examples more than half of its largest one."""
        sizes = self.sizes.tolist() if by_size else [1] * len(self)
        groups = []
        for of_length in _within_half(range(len(self)), self.lengths):
            groups += _within_half(of_length, sizes)
        return groups

    @torch.no_grad()
    @checked
    def map(self, function: Callable, batch_size: Size = 512) -> Split:
        """The same split with ``function``, from ``(B, ...)`` to ``(B, ...)``, applied to its inputs."""
        examples: list = [None] * len(self)
        for rows in self._of_one_shape():
            part = self.rows(rows)
            x, _, starts = part.joined()
            batches = [function(take(x, slice(i, i + batch_size))) for i in range(0, int(part.sizes.sum()), batch_size)]
            mapped = map_inputs(lambda *tensors: torch.cat(tensors), *batches)
            for row, begin, (_, y) in zip(rows, starts.tolist(), part.examples):
                examples[row] = take(mapped, slice(begin, begin + len(y))), y
        return _split(examples, self.ids)

    def by_length(self) -> Parts:
        """The same examples with each client's texts in parts of about one length: in a part, texts are more than half
        as long as its longest one, and nothing is behind that. Other inputs are one part for each client."""
        parts, clients, numbers = [], [], []
        for row, (x, y) in enumerate(self.examples):
            lengths = text_lengths(x)
            groups = [list(range(len(y)))] if lengths is None else _within_half(range(len(y)), lengths)
            for group in groups:
                part = (x, y) if len(groups) == 1 else (take(x, group), y[group])
                parts.append(part if lengths is None else cut_texts(*part, max(lengths[i] for i in group)))
                clients.append(row)
                numbers.append(torch.tensor(group))
        ids = [self.ids[row] for row in clients]
        return Parts(_split(parts, ids), torch.tensor(clients), pad_stack(numbers, -1))

    def _of_one_shape(self) -> Iterable[list[int]]:
        """The rows in groups of clients whose inputs need no padding to be joined."""
        groups: dict[tuple, list[int]] = {}
        for row, (x, _) in enumerate(self.examples):
            tensors = x.values() if isinstance(x, dict) else [x]
            groups.setdefault(tuple(tensor.shape[1:] for tensor in tensors), []).append(row)
        return groups.values()

    @checked
    def to(self, device: Device) -> Split:
        """The same split on ``device`` (the sizes stay on the CPU)."""
        examples = [(map_inputs(lambda tensor: tensor.to(device), x), y.to(device)) for x, y in self.examples]
        return _split(examples, self.ids)


def label_bars(y: Tensor, classes: int | None = None, names: Sequence[str] | None = None) -> Bars | str:
    """How many examples each class has; of many classes and of real targets their number or their range."""
    if is_float(y):
        return span(y.flatten().tolist(), 2)
    counts = torch.bincount(y[y >= 0], minlength=classes or 0)
    if len(counts) > 40:
        return f"{int((counts > 0).sum())} of {len(counts)} classes"
    return Bars(counts.tolist(), names or list(map(str, range(len(counts)))))


def _within_half(rows: Iterable[int], values: Sequence[int]) -> list[list[int]]:
    """The rows in groups, each of those whose value is more than half of the group's largest, which comes first."""
    rest = list(rows)
    groups = []
    while rest:
        largest = max(values[row] for row in rest)
        groups.append([row for row in rest if 2 * values[row] > largest])
        rest = [row for row in rest if 2 * values[row] <= largest]
    return groups


def _split(examples: Iterable[Examples], ids: Iterable[int]) -> Split:
    """A split of examples that have been checked."""
    split = object.__new__(Split)
    vars(split).update(examples=tuple(examples), ids=tuple(ids))
    return split


@dataclass(frozen=True, eq=False)
class Parts:
    """What ``Split.by_length`` returns: the ``split`` of P parts, of which several may be of one client; the row of
    each one's client ``(P,)``; and the numbers of its examples there ``(P, n)``, -1 behind them."""

    split: Split
    clients: Tensor
    numbers: Tensor

    def places(self, rows: Tensor, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of the examples in some parts' ``columns``: which of them there are ``(K, B)``, and the rows of these ones'
        clients and their numbers, ``(M,)`` each."""
        numbers = self.numbers[rows, columns]
        is_there = numbers >= 0
        return is_there, self.clients[rows].unsqueeze(1).expand_as(numbers)[is_there], numbers[is_there]


@displayed
@checked
@dataclass(frozen=True, eq=False)
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
            self._check_kind(part, split)
            for client, (_, labels) in zip(split.ids, split.examples):
                labels = labels if labels.dim() == 1 else labels[labels != PADDING]
                if (bad := labels[(labels < 0) | (labels >= self.classes)]).numel() and not is_float(labels):
                    raise ValueError(f"client {client}: {part} label {int(bad[0])} is outside 0 … {self.classes - 1}")

    def _check_kind(self, part: str, split: Split) -> None:
        """Raise ``ValueError`` for a split of other clients, inputs or targets than ``train``."""
        train_x, train_y = self.train.examples[0]
        x, y = split.examples[0]
        if kind_of(x) != kind_of(train_x):
            raise ValueError(f"{part} has inputs {kind_of(x)}, train has {kind_of(train_x)}")
        if isinstance(x, Tensor) and x.shape[1:] != train_x.shape[1:]:
            raise ValueError(f"{part} has inputs of shape {tuple(x.shape[1:])}, train of {tuple(train_x.shape[1:])}")
        if is_float(y) != is_float(train_y):
            raise ValueError(f"{part} has targets of {y.dtype}, train of {train_y.dtype}")
        if split.ids != self.train.ids:
            raise ValueError(f"{part} has clients {split.ids}, train has {self.train.ids}")

    def __len__(self) -> int:
        return len(self.train)

    def __getitem__(self, index: int | slice) -> Federation:
        return self.rows(index if isinstance(index, slice) else [range(len(self))[index]])

    def _title(self) -> str:
        parts = ", ".join(f"{part} {span(getattr(self, part).sizes)}" for part in ("train", "calibration", "test"))
        return f"{self.name!r}, {len(self)} clients, {self.classes} classes; {parts} each; {self.train._inputs()}"

    def _columns(self) -> dict[str, Sequence]:
        sizes = {part: getattr(self, part).sizes for part in ("train", "calibration", "test")}
        examples = self.train.examples
        bars = Lazily(lambda i: label_bars(examples[i][1], self.classes, self.class_names), len(self))
        return {"client": self.client_names or self.train.ids, **sizes, "labels in train": bars}

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
