"""The command's own table at its default setting, over five seeds.

    python benchmarks/quick.py

Runs ``python -m potara_lite --seeds 0 1 2 3 4`` and keeps its ``results.csv`` and ``config.json`` as ``quick.csv`` and
``quick.json``; writes the summary into the README and, with the paired differences between rows, into ``quick.md``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path

import pandas as pd
from pages import fill, markdown

from potara_lite.benchmark import summary

HERE = Path(__file__).parent


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
    fill(HERE.parent / "README.md", "quick", table)
    print(differences)


if __name__ == "__main__":
    main()
