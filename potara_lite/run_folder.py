"""A folder that holds one run: its configuration, its rows, and what belongs to them.

One process at a time writes into it. A method's rows come last and in one step, so whatever has rows is whole. The same
run goes on with what is missing; another one, or rows that were changed by hand, are refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from .files import FileError, reading, write_atomically

RUN_FILES = "results.csv", "results.digest", "figure.png", "config.json"  # beside adapters/seed-*


@dataclass
class RunFolder:
    """A run while this process has its folder: ``config``, what it is made with (JSON), and ``text``, the rows of what
    is finished as they stand in ``results.csv``."""

    path: Path
    config: str
    text: str = ""

    @property
    def rows(self) -> pd.DataFrame:
        """The rows as a table."""
        return pd.read_csv(StringIO(self.text)) if self.text else pd.DataFrame()

    @property
    def finished(self) -> set[tuple[str, int]]:
        """The methods and seeds that have rows."""
        return {(row.method, row.seed) for row in self.rows.itertuples()}

    def begin(self) -> None:
        """Before the first result is written: what another run left goes, its configuration last; then comes ours."""
        if self.text:
            return
        for folder in self.path.glob("adapters/seed-*"):
            shutil.rmtree(folder)
        for name in RUN_FILES:
            (self.path / name).unlink(missing_ok=True)
        write_atomically(self.path / "config.json", self.config)

    def add(self, rows: pd.DataFrame) -> None:
        """Write the rows of one more result, after all that belongs to it."""
        text = self.text + rows.to_csv(index=False, header=not self.text, lineterminator="\n")
        digests = _digest(self.config, text), _digest(self.config, self.text)  # of what comes, and of what is there
        write_atomically(self.path / "results.digest", "\n".join(digests) + "\n")
        write_atomically(self.path / "results.csv", text)
        self.text = text


@contextmanager
def run_folder(path: Path, config: str, overwrite: bool = False) -> Iterator[RunFolder]:
    """The folder of a run, for this process alone; ``config`` says as JSON what the run is made with.

    Raises ``ValueError`` where another process writes into it and, but for ``overwrite``, where it holds another run,
    or files that are damaged or were changed by hand.
    """
    path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / ".lock", timeout=0):
            for pattern in (*(f"{name}.*.part" for name in RUN_FILES), "adapters/seed-*/**/*.part"):
                for partial in path.glob(pattern):  # of a run that was killed while it wrote
                    partial.unlink()
            yield RunFolder(path, config, "" if overwrite else _kept(path, config))
    except Timeout:
        raise ValueError(f"{path} is in use: another process writes its results there") from None


def _kept(path: Path, config: str) -> str:
    """The rows of this run that a folder holds."""
    if not any(path.glob("adapters/seed-*")) and not any((path / name).exists() for name in RUN_FILES):
        return ""
    try:
        with reading(path / "config.json"):
            held = (path / "config.json").read_bytes().decode()
            then, now = (pd.json_normalize(json.loads(text)).iloc[0].to_dict() for text in (held, config))
            names = [name for name in now | then if then.get(name) != now.get(name)]
        if odd := [f"{name} {then.get(name)}, not {now.get(name)}" for name in names]:
            raise FileError(f"{path} holds another run: {textwrap.shorten('; '.join(odd), 200, placeholder=' …')}")
        if not (path / "results.csv").exists():
            return ""
        with reading(path / "results.csv"):
            text = (path / "results.csv").read_bytes().decode()
            if _digest(config, text) not in (path / "results.digest").read_text().split():
                raise ValueError("it is damaged or was changed by hand")
        return text
    except FileError as error:
        raise FileError(f"{error}; name another --out, or replace it by --overwrite") from error


def _digest(config: str, text: str) -> str:
    """What tells whether rows are those that this run wrote."""
    return hashlib.sha256((config + text).encode()).hexdigest()
