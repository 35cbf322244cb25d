"""The tests with the lowest declared, the current and the newest versions of what the package needs.

    pip install uv
    python benchmarks/matrix.py lowest --python 3.10         # adds a row to matrix.csv, or replaces it
    python benchmarks/matrix.py newest --python 3.13 --tests all
    python benchmarks/matrix.py --current                    # writes current.txt

A row is one fresh environment, made by uv, and one fresh clone of HEAD. *lowest*: every direct requirement at the
lowest version that ``pyproject.toml`` allows. *current*: nothing newer than in ``current.txt``, the environment that
made the committed figures. *newest*: the newest releases. The page ``docs/machines.md`` shows the rows.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import requires, version
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
from packaging.requirements import Requirement

HERE = Path(__file__).parent
ROWS, CURRENT = HERE / "matrix.csv", HERE / "current.txt"
OPTIONS = {
    "lowest": ["--resolution", "lowest-direct"],
    "current": ["--constraints", str(CURRENT)],
    "newest": ["--resolution", "highest"],
}
WITHOUT_NOTEBOOKS = ["tests", "potara_lite", "--ignore=tests/course"]
TESTS = {"all": [], "core": WITHOUT_NOTEBOOKS}  # core: no notebooks, no browser, no book
PACKAGES = ["torch", "torchvision", "peft", "transformers", "pydantic", "numpy", "pandas", "scipy", "pytest"]


def current() -> str:
    """The direct requirements of the package, nothing newer than in this environment."""
    direct = [Requirement(line) for line in requires("potara-lite") or []]
    lines = [f"{one.name}<={version(one.name).split('+')[0]}" for one in direct if one.marker is None]
    return "\n".join(sorted(lines)) + "\n"


def make(environment: str, python: str, folder: Path) -> Path:
    """A clone of HEAD in ``folder`` with its environment; the environment's Python."""
    shutil.rmtree(folder / "clone", ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", HERE.parent, folder / "clone"], check=True)
    subprocess.run(
        ["uv", "venv", "--quiet", "--allow-existing", "--python", python, folder / "environment"], check=True
    )
    made = folder / "environment" / "bin" / "python"
    install = ["uv", "pip", "install", "--quiet", "--python", made, *OPTIONS[environment], "-e", ".[test]"]
    subprocess.run(install, cwd=folder / "clone", check=True)
    return made


def run_tests(python: Path, folder: Path, selection: list[str]) -> tuple[Counter[str], str]:
    """How many tests passed, failed and were skipped, and the names of those that failed."""
    command = [python, "-m", "pytest", "-q", "--continue-on-collection-errors", *selection]
    command += ["--junitxml", folder / "tests.xml"]
    two_workers = {"PYTEST_ADDOPTS": "-n 2 --dist loadfile", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    subprocess.run(command, cwd=folder / "clone", env=os.environ | two_workers | {"PYTHONPATH": ""})
    outcomes, failed = Counter(passed=0, failed=0, skipped=0), []
    for case in ElementTree.parse(folder / "tests.xml").iter("testcase"):
        found = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = "passed" if not found else "skipped" if found == {"skipped"} else "failed"
        outcomes[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}")
    return outcomes, "; ".join(failed)


def versions(python: Path) -> dict[str, str]:
    """The versions of Python and of the main packages in an environment."""
    code = f"""
import platform
from importlib.metadata import version
print(platform.python_version(), *(version(name) for name in {PACKAGES}))"""
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    return dict(zip(["python", *PACKAGES], said.split()))


def row(environment: str, python: str, tests: str, folder: Path) -> dict[str, str | int]:
    """Make an environment, run the tests in it, and say what came of it."""
    made = make(environment, python, folder)
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=folder / "clone", text=True)
    began = time.monotonic()
    outcomes, failed = run_tests(made, folder, TESTS[tests])
    return {
        "environment": environment,
        **versions(made),
        "tests": tests,
        **outcomes,
        "seconds": round(time.monotonic() - began),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "commit": commit.strip(),
        "failing": failed,
    }


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as the page shows them."""
    shown = ["python", "torch", "peft", "transformers", "numpy", "pandas", "tests", "passed", "failed", "skipped"]
    return rows.assign(minutes=(rows.seconds / 60).round().astype(int)).set_index("environment")[
        [*shown, "minutes", "date", "commit"]
    ]


def failures(rows: pd.DataFrame) -> str:
    """The tests that failed, a line for each row that has some."""
    some = rows[rows.failed > 0]
    lines = [
        f"- {row.environment}, Python {row.python}: " + ", ".join(f"`{name}`" for name in row.failing.split("; "))
        for row in some.itertuples()
    ]
    return "\n".join(lines) or "No test failed in these rows."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", nargs="?", choices=OPTIONS)
    parser.add_argument("--python", default=sys.executable, help="a version, or a path of an interpreter")
    parser.add_argument("--tests", choices=TESTS, default="core")
    parser.add_argument("--folder", type=Path, help="keep the environment here, and use it again")
    parser.add_argument("--current", action="store_true", help="write current.txt from this environment")
    given = parser.parse_args()
    if given.current:
        CURRENT.write_text(current())
    if given.environment is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        made = row(given.environment, given.python, given.tests, (given.folder or Path(folder)).resolve())
    made = pd.DataFrame([made]).astype(str)
    rows = pd.concat([pd.read_csv(ROWS, dtype=str), made] if ROWS.exists() else [made])
    rows = rows.fillna("").drop_duplicates(["environment", "python", "tests"], keep="last")
    rows.sort_values(["environment", "python", "tests"]).to_csv(ROWS, index=False, lineterminator="\n")
    print(made.T.to_string(header=False))
    sys.exit(int(made.failed[0]) > 0)


if __name__ == "__main__":
    main()
