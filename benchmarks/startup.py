"""How long it takes until the first answer, medians of three: seconds of CPU of whole processes; and the seconds on the
clock of the command's default run, with its parts.

python benchmarks/startup.py       # writes startup.json
"""

from __future__ import annotations

import ast
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pages import facts

COMMANDS = {
    "python alone": ["-c", "pass"],
    "import potara_lite": ["-c", "import potara_lite"],
    "--help": ["-m", "potara_lite", "--help"],
    "--version": ["-m", "potara_lite", "--version"],
    "a bad option": ["-m", "potara_lite", "--clients", "0"],
    "from potara_lite import train": ["-c", "from potara_lite import train"],
    "with the collector": ["-c", "from potara_lite.training.train import train"],
    "import torch": ["-c", "import torch"],
    "import torch, transformers": ["-c", "import torch, transformers.modeling_utils"],
    "import torch, peft": ["-c", "import torch, peft"],
}

PARTS = """
import runpy, sys, time
import potara_lite
began = time.perf_counter()
with potara_lite._without_collector():
    import pandas, potara_lite.plots
    from potara_lite import experiment, plots
    from potara_lite.estimators import OnSplit
seconds = {"imports": time.perf_counter() - began}

def timed(owner, name, part):
    function = getattr(owner, name)
    def run(*args, **kwargs):
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began
    setattr(owner, name, run)

timed(experiment, "train_pair", "training")
timed(OnSplit, "__call__", "estimators")
timed(experiment, "along_segment", "the test loss along λ")
timed(plots, "overview", "the figure")
timed(experiment, "save_models", "saving")
sys.argv[1:] = ["--quiet", "--json", "--out", sys.argv[1]]
try:
    runpy.run_module("potara_lite", run_name="__main__")
finally:
    seconds["data, merges and evaluation"] = time.perf_counter() - began - sum(seconds.values())
    print(seconds, file=sys.stderr)
"""


def parts_of_the_command() -> dict[str, float]:
    """Seconds on the clock of the command's default run in a process of its own, part by part."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", PARTS, f"{folder}/out"], capture_output=True, text=True, check=True
        )
        whole = time.perf_counter() - began
    parts = ast.literal_eval(done.stderr.splitlines()[-1])
    return {"all": whole, **parts, "Python's start and end": whole - sum(parts.values())}


def seconds(arguments: list[str]) -> float:
    """CPU seconds of one process, its threads and the kernel's work for it: other programs change them little."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(repeats: int = 3) -> None:
    measured = {
        name: statistics.median(seconds(arguments) for _ in range(repeats)) for name, arguments in COMMANDS.items()
    }
    runs = sorted((parts_of_the_command() for _ in range(repeats)), key=lambda run: run["all"])
    parts = runs[repeats // 2]
    Path(__file__).with_suffix(".json").write_text(
        json.dumps({"seconds": measured, "parts": parts} | facts(), indent=1) + "\n"
    )
    print(json.dumps({name: round(value, 3) for name, value in (measured | parts).items()}))


if __name__ == "__main__":
    main()
