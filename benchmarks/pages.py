"""How figures get into pages, how tables become Markdown, and what a run was made with.

A page names what is computed, and ``figures.py`` writes it there. A block stands on lines of its own::

    <!-- NAME -->
    | table |
    <!-- /NAME -->

and a figure inside a sentence: ``a regret of <!-- =NAME -->0.042 ± 0.006<!-- / --> nats``. Neither comment is shown by
GitHub or Sphinx, as long as the second kind does not begin a line, which would make the line one of HTML.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable

import pandas as pd
import torch

from potara_lite import __version__

FIGURE = r"<!-- =(?P<figure>[\w-]+) -->.*?<!-- / -->"
BLOCK = r"<!-- (?P<block>[\w-]+) -->\n.*?<!-- /(?P=block) -->"
MARK = re.compile(f"{FIGURE}|{BLOCK}", re.S)


def marks(page: str) -> list[str]:
    """The names of the figures and blocks of a page, in its order."""
    return [found["figure"] or found["block"] for found in MARK.finditer(page)]


def fill(page: str, texts: dict[str, str]) -> str:
    """The page with each of its figures and blocks as ``texts`` has it.

    Raises ``ValueError`` where one of them is missing on either side, or a figure begins a line.
    """
    if missing := set(marks(page)) ^ set(texts):
        raise ValueError(f"on the page or among the figures, but not in both: {sorted(missing)}")
    if begins := re.search(r"^<!-- =.*", page, re.M):
        raise ValueError(f"a line begins with a figure, which hides it: {begins[0]}")

    def filled(found: re.Match) -> str:
        if name := found["figure"]:
            return f"<!-- ={name} -->{texts[name]}<!-- / -->"
        name = found["block"]
        return f"<!-- {name} -->\n{texts[name]}\n<!-- /{name} -->"

    return MARK.sub(filled, page)


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """A table with an index as GitHub Markdown."""
    lines = ["| " + " | ".join([table.index.name or "", *map(str, table.columns)]) + " |"]
    lines.append("|" + " --- |" * (table.shape[1] + 1))

    def shown(value: float | str) -> str:
        if value != value:
            return "–"
        if isinstance(value, int | str):
            return str(value)
        value = round(value, 9)  # the last digits of a mean depend on who sums: another NumPy rounds 0.7455 otherwise
        return f"{value:.{0 if value == round(value) >= 2 else digits}f}"

    for name, *row in zip(table.index, *(table[column].tolist() for column in table)):
        lines.append("| " + " | ".join([str(name), *map(shown, row)]) + " |")
    return "\n".join(lines)


def difference(one: pd.Series, other: pd.Series, digits: int = 3) -> str:
    """The mean of ``one - other``, paired by seed, ± its standard error."""
    gap = one - other
    return f"{gap.mean():.{digits}f} ± {gap.sem():.{digits}f}"


def listed(values: Iterable[float | str], digits: int = 3) -> str:
    """``0.827, 0.914 and 0.771``."""
    *most, last = [value if isinstance(value, str) else f"{value:.{digits}f}" for value in values]
    return f"{', '.join(most)} and {last}"


def facts(**versions: str) -> dict[str, dict]:
    """The versions and the machine of a run."""
    versions = {"potara_lite": __version__, "torch": torch.__version__, "python": platform.python_version()} | versions
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return {"versions": versions, "machine": machine}
