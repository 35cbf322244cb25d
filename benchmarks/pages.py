"""What the scripts write: tables as Markdown between two comments that name them, and what a run was made with."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pandas as pd
import torch

from potara_lite import __version__


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


def facts(**versions: str) -> dict[str, dict]:
    """The versions and the machine of a run."""
    versions = {"potara_lite": __version__, "torch": torch.__version__, "python": platform.python_version()} | versions
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return {"versions": versions, "machine": machine}
