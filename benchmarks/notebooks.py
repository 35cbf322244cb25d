"""How long every notebook takes, and how much memory: what a lecturer has to plan for.

    python benchmarks/notebooks.py            # ten minutes; leave the machine alone meanwhile
    python benchmarks/notebooks.py 00 03      # these only

Every notebook is executed from top to bottom in its own kernel, one after another, without being changed. Writes
``notebooks.json``: wall seconds, including the start of the kernel, and peak resident bytes of the kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

from pages import facts

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"
RUN = """
import resource, sys, nbformat
from nbclient import NotebookClient
NotebookClient(nbformat.read(sys.argv[1], as_version=4), resources={"metadata": {"path": sys.argv[2]}}).execute()
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def measure(path: Path) -> dict[str, float]:
    """Seconds and bytes of one notebook."""
    began = time.perf_counter()
    command = [sys.executable, "-c", RUN, path, path.parent]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes
    return {"seconds": time.perf_counter() - began, "bytes": unit * int(done.stdout.split()[-1])}


def table(measured: dict[str, dict[str, float]]) -> str:
    """The course as Markdown: question, seconds and prerequisites of every notebook."""
    lines = ["| notebook | its question | two CPU cores | before it |", "| --- | --- | --- | --- |"]
    for name, found in sorted(measured.items()):
        cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
        head = "".join(cells[0]["source"])
        title, *bold = re.findall(r"^# (.+)$|^\*\*([^*]+\?)\*\*$", head, re.M)
        question = title[0] if title[0].endswith("?") else bold[0][1]
        before = re.search(r"\*\*Prerequisites:\*\* (.+?)\n\n", head, re.S).group(1)
        before = re.sub(r"\]\((\w+\.ipynb)\)", r"](../notebooks/\1)", " ".join(before.split()))
        before = re.sub(r" \[\d\]", "", before)
        number = name.split("_")[0]
        lines.append(f"| [{number}](../notebooks/{name}.ipynb) | {question} | {found['seconds']:.0f} s | {before} |")
    return "\n".join(lines)


def main() -> None:
    path = HERE / "notebooks.json"
    measured = json.loads(path.read_text())["notebooks"] if path.is_file() else {}
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        if len(sys.argv) == 1 or notebook.stem.split("_")[0] in sys.argv[1:]:
            measured[notebook.stem] = measure(notebook)
            print(notebook.stem, measured[notebook.stem], flush=True)
    path.write_text(json.dumps({"notebooks": measured} | facts(), indent=1) + "\n")


if __name__ == "__main__":
    main()
