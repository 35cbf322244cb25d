"""What it costs that waiting threads give their core away: one training alone, and as many as students share a machine.

python benchmarks/threads.py       # writes threads.csv

Each program trains eight clients of the lab setting for 60 steps. GNU's OpenMP lets a thread that waits spin for
300,000 turns, with `OMP_WAIT_POLICY=passive` for none; `import potara_lite` sets 3,000.
"""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd

PROGRAM = """
import time
from potara_lite import prepare, repeat_adapter, Setting, train
adapted, federation = prepare(Setting(), 0)
start = repeat_adapter(adapted.initial, 8)
train(adapted, start, federation.train, steps=5, batch_size=8)
began = time.perf_counter()
train(adapted, start, federation.train, steps=60, batch_size=8)
print(time.perf_counter() - began)
"""
WAYS = {
    "OpenMP's own": {"GOMP_SPINCOUNT": "300000"},
    "3,000 turns": {"GOMP_SPINCOUNT": "3000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
AT_ONCE = {1: 7, 2: 3, 4: 3}  # programs, and how often
SET_BY_OTHERS = "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT"


def seconds(way: dict[str, str], programs: int) -> float:
    """The median seconds of training of programs that start together."""
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_OTHERS} | way
    command = [sys.executable, "-c", PROGRAM]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(programs)]
    return statistics.median(float(program.communicate(timeout=600)[0]) for program in started)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The median seconds, and the least and most, of each way by the number of programs."""
    times = rows.groupby(["waiting", "programs"], sort=False).seconds
    cells = times.agg(lambda some: f"{some.median():.1f} ({some.min():.1f}–{some.max():.1f})").unstack()
    return (
        cells.rename(columns={1: "alone", 2: "two at once", 4: "four at once"}).rename_axis(columns=None).loc[[*WAYS]]
    )


def main() -> None:
    rows = []
    for programs, repeats in AT_ONCE.items():
        for _ in range(repeats):
            for name, way in WAYS.items():
                rows.append({"waiting": name, "programs": programs, "seconds": round(seconds(way, programs), 3)})
                print(rows[-1], flush=True)
    with Path(__file__).with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
