"""How long it takes until the first answer: whole processes, medians of five.

python benchmarks/startup.py       # writes startup.json
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
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
}


def seconds(arguments: list[str]) -> float:
    """Wall seconds of one process."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True)
    return time.perf_counter() - began


def main(repeats: int = 5) -> None:
    measured = {
        name: statistics.median(seconds(arguments) for _ in range(repeats)) for name, arguments in COMMANDS.items()
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps({"seconds": measured} | facts(), indent=1) + "\n")
    print(json.dumps({name: round(value, 3) for name, value in measured.items()}))


if __name__ == "__main__":
    main()
