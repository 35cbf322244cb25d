"""How objects show themselves: one line as text, a small table in a notebook.

A class that is ``displayed`` says ``_title()``, its line, and ``_columns()``, what the table has for each client. The
HTML stands alone: no scripts, no files, and colours of the page it is in, light or dark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
SHOWN = 10  # rows of a table: as many of its beginning and of its end as fit
TABLE = "border-collapse:collapse;margin:4px 0;font-variant-numeric:tabular-nums"
CELL = "padding:2px 10px;text-align:right;border-bottom:1px solid rgba(128,128,128,.35)"


def displayed(cls: type[T]) -> type[T]:
    """A class decorator: text and HTML of its objects from their ``_title`` and ``_columns``."""
    cls.__repr__ = lambda self: f"{type(self).__name__}({self._title()})"  # type: ignore[attr-defined, method-assign]
    cls._repr_html_ = lambda self: as_html(repr(self), self._columns())  # type: ignore[attr-defined]
    return cls


def as_html(title: str, columns: Mapping[str, Sequence[Any] | Tensor]) -> str:
    """A title and a table, of which the first and the last rows are shown."""
    total = max(map(len, columns.values()), default=0)
    rows = range(total) if total <= SHOWN else [*range(SHOWN // 2), None, *range(total - SHOWN // 2, total)]
    head = "".join(f'<th style="{CELL}">{escape(name)}</th>' for name in columns)
    lines = ["".join(_cell("…" if row is None else column[row]) for column in columns.values()) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    table = f'<table style="{TABLE}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>' if columns else ""
    return f"<div><code>{escape(title)}</code>{table}</div>"


def _cell(value: Any) -> str:
    value = value.item() if isinstance(value, Tensor) else value
    if isinstance(value, Bars):
        return f'<td style="{CELL};text-align:left;white-space:nowrap">{value.html()}</td>'
    text = f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return f'<td style="{CELL}">{escape(text)}</td>'


class Lazily(Sequence):
    """A column of which only the rows that are shown are computed."""

    def __init__(self, function: Callable[[int], Any], rows: int):
        self.function, self.rows = function, range(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row):
        return self.function(self.rows[row])


class Bars:
    """Counts as bars of one row: the taller, the more."""

    def __init__(self, counts: Sequence[int], names: Sequence[str]):
        self.counts, self.names = counts, names

    def html(self) -> str:
        most = max(self.counts, default=0) or 1
        bar = (
            "display:inline-block;width:8px;margin-right:2px;background:currentColor;vertical-align:bottom;opacity:.65"
        )
        return "".join(
            f'<span title="{escape(f"{name}: {n}")}" style="{bar};height:{max(1, round(18 * n / most))}px"></span>'
            for name, n in zip(self.names, self.counts)
        )


def span(values: Tensor | Sequence[float], digits: int | None = None) -> str:
    """The one value, or the smallest and the largest: ``40`` or ``5–13``."""
    low, high = (float(bound) for bound in torch.as_tensor(values).double().aminmax())
    texts = [f"{value:,.0f}" if digits is None else f"{value:.{digits}f}" for value in (low, high)]
    return texts[0] if texts[0] == texts[1] else "–".join(texts)


def megabytes(count: float) -> str:
    """Bytes as megabytes, with two digits."""
    return f"{float(count) / 1e6:.2f} MB"
