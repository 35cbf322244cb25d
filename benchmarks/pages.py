"""What the scripts write into pages: tables as Markdown, between two comments that name them."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """A table with an index as GitHub Markdown."""
    lines = ["| " + " | ".join([table.index.name or "", *map(str, table.columns)]) + " |"]
    lines.append("|" + " --- |" * (table.shape[1] + 1))

    def cell(v: float | str) -> str:
        return "–" if v != v else str(v) if isinstance(v, int | str) else f"{v:.{0 if v == round(v) >= 2 else digits}f}"

    for name, *row in zip(table.index, *(table[column].tolist() for column in table)):
        lines.append("| " + " | ".join([str(name), *map(cell, row)]) + " |")
    return "\n".join(lines)


def fill(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    block = f"<!-- {name} -->\n{text}\n<!-- /{name} -->"
    page.write_text(re.sub(f"<!-- {name} -->.*<!-- /{name} -->", lambda _: block, page.read_text(), flags=re.S))
