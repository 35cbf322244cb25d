"""The command's table at its default setting, over five seeds.

    python benchmarks/quick.py

Runs ``python -m potara_lite --seeds 0 1 2 3 4`` and keeps its ``results.csv`` and ``config.json`` as ``quick.csv`` and
``quick.json``, and the README's figure. The rows that ``--local-from-federated`` changes are added under other
names. ``figures.py`` writes the tables.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from potara_lite import ESTIMATORS, Run, Setting, prepare
from potara_lite.experiment import oracle_weight
from potara_lite.plots import along_weight
from potara_lite.results import paired_differences, summary

HERE = Path(__file__).parent
MERGES = "uniform", "potara-paper", "potara-calibrated"


def command(folder: str, *options: str) -> pd.DataFrame:
    """The rows of a run of the command."""
    call = [sys.executable, "-m", "potara_lite", "--seeds", *"01234", "--out", folder, "--quiet", *options]
    subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
    return pd.read_csv(Path(folder) / "results.csv")


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    """For each pair of methods, the mean difference of accuracy and loss over seeds with its standard error."""
    rows = rows[rows.method != "backbone"]
    lines, methods = {}, list(rows.method.unique())
    for number, one in enumerate(methods[:-1]):
        tables = {score: paired_differences(rows, one, score) for score in ("accuracy", "loss")}
        for two in methods[number + 1 :]:
            lines[f"{one} − {two}"] = {
                f"{score}{suffix}": table.loc[two, column]
                for score, table in tables.items()
                for suffix, column in (("", "difference"), (" ±", "±"))
            }
    return pd.DataFrame(lines).T


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The README's table."""
    return summary(rows).assign(MB=lambda t: t["bytes"] / 1e6).drop(columns=["bytes", "seconds"])


def figure() -> Figure:
    """The README's figure: test loss along λ of the clients of seed 0, with three choices of λ."""
    run = Run(*prepare(Setting(), 0), Setting(), 0)
    weights, loss, _ = run.test_curve
    estimate = ESTIMATORS["potara-paper"](run.adapted, *run.pair.models, run.federation)
    found = {"uniform": torch.full((len(loss),), 0.5), "potara-paper": estimate.weight}
    return along_weight(weights, loss, found | {"oracle": oracle_weight(weights, loss)})


def main() -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        rows, more = command(one), command(other, "--local-from-federated")
        shutil.copy(Path(one) / "config.json", HERE / "quick.json")
    more = more[more.method.isin(MERGES)]
    rows = pd.concat([rows, more.assign(method=more.method + ", local from federated")])
    rows.to_csv(HERE / "quick.csv", index=False)
    figure().savefig(HERE.parent / "docs" / "quick.png", dpi=90)
    print(table(rows).round(3).to_string())


if __name__ == "__main__":
    main()
