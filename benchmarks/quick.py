"""The command's own table at its default setting, over five seeds.

    python benchmarks/quick.py

Runs ``python -m potara_lite --seeds 0 1 2 3 4`` and keeps its ``results.csv`` and ``config.json`` as ``quick.csv`` and
``quick.json``; writes the summary into the README and, with the paired differences between rows, into ``quick.md``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path

import pandas as pd

from potara_lite.benchmark import summary

HERE = Path(__file__).parent


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """A table with an index as GitHub Markdown."""
    lines = ["| " + " | ".join([table.index.name or "", *map(str, table.columns)]) + " |"]
    lines.append("|" + " --- |" * (table.shape[1] + 1))

    def cell(v: float | str) -> str:
        return "–" if v != v else str(v) if isinstance(v, int | str) else f"{v:.{0 if v == round(v) >= 2 else digits}f}"

    for name, *row in zip(table.index, *(table[column].tolist() for column in table)):
        lines.append("| " + " | ".join([str(name), *map(cell, row)]) + " |")
    return "\n".join(lines)


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    """For each pair of methods, the mean difference of accuracy and loss over seeds with its standard error."""
    seeds = rows.groupby(["seed", "method"], sort=False)[["accuracy", "loss"]].mean().unstack("method")
    lines = {}
    for one, two in combinations(rows.method.unique(), 2):
        difference = {score: seeds[score][one] - seeds[score][two] for score in ("accuracy", "loss")}
        lines[f"{one} − {two}"] = {
            f"{score}{suffix}": value
            for score, d in difference.items()
            for suffix, value in (("", d.mean()), (" ±", d.sem()))
        }
    return pd.DataFrame(lines).T


def tables(rows: pd.DataFrame) -> tuple[str, str]:
    """The README's table and the paired differences, as Markdown."""
    table = summary(rows).assign(MB=lambda t: t["bytes"] / 1e6).drop(columns=["bytes", "seconds"])
    return markdown(table), markdown(paired(rows[rows.method != "backbone"]), digits=4)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "potara_lite", "--seeds", *"01234", "--out", folder, "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.copy(Path(folder) / "results.csv", HERE / "quick.csv")
        shutil.copy(Path(folder) / "config.json", HERE / "quick.json")
    table, differences = tables(pd.read_csv(HERE / "quick.csv"))
    (HERE / "quick.md").write_text(
        f"{table}\n\nPaired over the seeds (mean difference, standard error):\n\n{differences}\n"
    )
    readme = HERE.parent / "README.md"
    block = f"<!-- quick -->\n{table}\n<!-- /quick -->"
    readme.write_text(re.sub(r"<!-- quick -->.*<!-- /quick -->", lambda _: block, readme.read_text(), flags=re.S))
    print(differences)


if __name__ == "__main__":
    main()
