"""How long it takes until the first answer: seconds of CPU of whole processes, medians of three.

python benchmarks/startup.py       # writes startup.json
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from pages import facts

COMMANDS = {
    "python alone": ["-c", "pass"],
    "import potara_lite": ["-c", "import potara_lite"],
    "--help": ["-m", "potara_lite", "--help"],
    "--version": ["-m", "potara_lite", "--version"],
    "a bad option": ["-m", "potara_lite", "--clients", "0"],
    "from potara_lite import train": ["-c", "from potara_lite import train"],
    "import torch": ["-c", "import torch"],
    "import torch, transformers": ["-c", "import torch, transformers.modeling_utils"],
    "import torch, peft": ["-c", "import torch, peft"],
}


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
    Path(__file__).with_suffix(".json").write_text(json.dumps({"seconds": measured} | facts(), indent=1) + "\n")
    print(json.dumps({name: round(value, 3) for name, value in measured.items()}))


if __name__ == "__main__":
    main()
