"""The course of a training as a table: losses, what the models are worth on the way, bytes and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..federation.split import Split

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["round", "step", "client", "train_loss", "loss", "accuracy", "bytes_up", "bytes_down", "seconds"]
Callback = Callable[[Any], object]  # it gets the new rows of the history, a data frame


@dataclass
class History:
    """Collects records, of which each is a row of the history for every client.

    After ``every`` so many rounds or steps, and after the last one, the models are evaluated on ``split``. What that
    takes and what the ``callbacks`` take is not in the seconds, and neither touches the training.

    Raises ``ValueError`` for a split of other clients than those of these ``ids``.
    """

    ids: Sequence[int]
    split: Split | None = None
    every: int = 1
    callbacks: Sequence[Callback] = ()
    records: list[dict[str, Any]] = field(default_factory=list)
    paused: float = 0.0

    def __post_init__(self):
        if self.split is not None and tuple(self.split.ids) != tuple(self.ids):
            raise ValueError(f"eval_split must have the clients {tuple(self.ids)}, not {self.split.ids}")
        self.began = time.perf_counter()

    def is_due(self, number: int, last: int) -> bool:
        """Whether the models are evaluated after so many of the ``last`` rounds or steps."""
        return self.split is not None and (number % self.every == 0 or number == last)

    def add(self, evaluate: Callable[[Split], tuple[Tensor, Tensor]] | None = None, **columns) -> dict[str, str]:
        """Add a record of columns, numbers or ``(C,)`` each, with what ``evaluate`` says of the split: loss and
        accuracy ``(C,)``. Returns their means in words, for a progress bar."""
        now = time.perf_counter()
        record = columns | {"seconds": now - self.began - self.paused}
        if evaluate is not None and self.split is not None:
            record["loss"], record["accuracy"] = evaluate(self.split)
        self.records.append(record)
        if self.callbacks:
            rows = history_table(self.ids, [record])
            for callback in self.callbacks:
                callback(rows)
        self.paused += time.perf_counter() - now
        shown = {name: record[name] for name in ("train_loss", "loss", "accuracy") if name in record}
        return {name: f"{torch.as_tensor(value).float().nanmean():.3f}" for name, value in shown.items()}

    def table(self) -> pd.DataFrame:
        """All rows, in the order of ``COLUMNS``."""
        return history_table(self.ids, self.records)


def history_table(ids: Sequence[int], records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row for each record and client, in the order of ``COLUMNS``; NaN where nothing is known."""
    import pandas as pd

    def column(name: str) -> np.ndarray:
        values = [ids if name == "client" else _as_numpy(record.get(name, np.nan)) for record in records]
        return np.concatenate([np.broadcast_to(value, len(ids)) for value in values]) if values else np.empty(0)

    return pd.DataFrame({name: column(name) for name in COLUMNS})


def _as_numpy(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value
