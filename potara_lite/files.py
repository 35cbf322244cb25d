"""Files: where the shipped ones are, one error for whatever cannot be read, writing in one step, the folder of a run.

A file may be truncated, damaged or malicious, and the libraries that read it raise errors of many types; here they
become one, ``FileError``. No file is a pickle.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import platform
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from io import StringIO
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


class FileError(ValueError):
    """A file or folder is missing, damaged or not what it should be; the message, one line, names it."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside is raised as a ``FileError`` that names ``path``."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:  # each of zip, xz, JSON, Unicode, safetensors, … has errors of its own types
        raise FileError(f"cannot read {path}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 300 characters; with its type where that is part of the meaning."""
    text = textwrap.shorten(str(error), 300, placeholder=" …")
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def data_path(name: str = "", folder: str = "data") -> Path:
    """Where the shipped file ``name`` is: inside an installed wheel, or in this ``folder`` of a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "_data"
    return (shipped if shipped.is_dir() else package.parent / folder) / name


def check_file(path: str | Path) -> Path:
    """The path, if the file's SHA-256 equals the one in the ``.sha256`` file beside it.

    Raises ``FileError`` when one of them is missing or the file is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path} is missing")
    with reading(path.with_suffix(".sha256")):
        expected = path.with_suffix(".sha256").read_text("utf-8").split()[0].lower()
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
        raise FileError(f"{path} is damaged: its SHA-256 is {found[:12]}…, expected {expected[:12]}…")
    return path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, so that no reader sees half of it, and no interruption leaves half of it.

    Partial files of this one that a killed process left are deleted; those of running processes stay.
    """
    partial_name = f"{path.name}.{platform.node()}"  # machines may share a folder
    for partial in path.parent.glob(f"{glob.escape(partial_name)}.*.part"):
        if not _may_run(process=partial.suffixes[-2][1:]):
            partial.unlink(missing_ok=True)
    partial = path.with_name(f"{partial_name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:  # also where the disk is full
        partial.unlink(missing_ok=True)


def _may_run(process: str) -> bool:
    """Whether a process of this number runs, or the operating system does not say."""
    try:
        if os.name == "posix":
            os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):  # of another user, or no number
        pass
    return True


RUN_FILES = "results.csv", "results.digest", "figure.png", "config.json"  # beside adapters/seed-*


@dataclass
class RunFolder:
    """The folder of a run that this process writes.

    ``config``: what the run is made with, as JSON. ``text``: the finished rows, as they are in ``results.csv``.
    """

    path: Path
    config: str
    text: str = ""

    @property
    def rows(self) -> pd.DataFrame:
        """The rows as a table."""
        import pandas as pd

        return pd.read_csv(StringIO(self.text)) if self.text else pd.DataFrame()

    @property
    def finished(self) -> set[tuple[str, int]]:
        """The methods and seeds that have rows."""
        return {(row.method, row.seed) for row in self.rows.itertuples()}

    def begin(self) -> None:
        """Before the first result: delete the files of another run, its configuration last, and write ours."""
        if self.text:
            return
        for folder in self.path.glob("adapters/seed-*"):
            shutil.rmtree(folder)
        for name in RUN_FILES:
            (self.path / name).unlink(missing_ok=True)
        write_atomically(self.path / "config.json", self.config)

    def add(self, rows: pd.DataFrame) -> None:
        """Write the rows of one more result, after its other files."""
        text = self.text + rows.to_csv(index=False, header=not self.text, lineterminator="\n")
        digests = f"{digest(self.config, text)}\n{digest(self.config, self.text)}\n"  # of the new and the old rows
        write_atomically(self.path / "results.digest", digests)
        write_atomically(self.path / "results.csv", text)
        self.text = text


@contextmanager
def run_folder(path: Path, config: str, overwrite: bool = False) -> Iterator[RunFolder]:
    """The folder of a run, locked for this process; ``config`` says as JSON what the run is made with.

    Raises ``ValueError`` where another process writes into it and, unless ``overwrite``, where it has another run, or
    files that are damaged or were changed by hand.
    """
    path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / ".lock", timeout=0):
            for pattern in (*(f"{name}.*.part" for name in RUN_FILES), "adapters/seed-*/**/*.part"):
                for partial in path.glob(pattern):  # of a run that was killed while it wrote
                    partial.unlink()
            yield RunFolder(path, config, "" if overwrite else _finished_rows(path, config))
    except Timeout:
        raise ValueError(f"{path} is in use: another process writes its results there") from None


def _finished_rows(path: Path, config: str) -> str:
    """The rows of this run in its folder, as text."""
    if not any(path.glob("adapters/seed-*")) and not any((path / name).exists() for name in RUN_FILES):
        return ""
    try:
        with reading(path / "config.json"):
            check_same_run(path, (path / "config.json").read_bytes().decode(), config)
        if not (path / "results.csv").exists():
            return ""
        with reading(path / "results.csv"):
            text = (path / "results.csv").read_bytes().decode()
            if digest(config, text) not in (path / "results.digest").read_text("utf-8").split():
                raise ValueError("it is damaged or was changed by hand")
        return text
    except FileError as error:
        raise FileError(f"{error}; name another --out, or replace it by --overwrite") from error


def check_same_run(path: Path, found: str, config: str) -> None:
    """Raise ``FileError`` unless a folder's run was made with the same ``config``, JSON both; it says what differs."""
    import pandas as pd

    then, now = (pd.json_normalize(json.loads(text)).iloc[0].to_dict() for text in (found, config))
    names = [name for name in now | then if then.get(name) != now.get(name)]
    if odd := [f"{name} {then.get(name)}, not {now.get(name)}" for name in names]:
        raise FileError(f"{path} holds another run: {textwrap.shorten('; '.join(odd), 200, placeholder=' …')}")


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 of tensors: of their names, shapes, types and numbers, to the last bit."""
    import torch

    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest(*texts: str) -> str:
    """A SHA-256 of the texts together: it tells whether a file holds what was written."""
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def fingerprint(thing: object) -> str:
    """A digest of a function: of its code, defaults, closure and bound arguments, as far as these are numbers, strings,
    tuples, dictionaries, functions and dataclasses. Lists and the functions that it calls do not count."""
    return digest(repr(_contents(thing, ())))[:16]


def _contents(thing: object, above: tuple[int, ...]) -> object:
    """What ``fingerprint`` sees: plain values, whose text is the same everywhere. ``above``: what it is inside of."""
    if id(thing) in above:
        return "itself"
    if isinstance(thing, FunctionType):
        closure = tuple(cell.cell_contents for cell in thing.__closure__ or ())
        parts: tuple = thing.__code__, thing.__defaults__, thing.__kwdefaults__, closure
    elif isinstance(thing, CodeType):
        parts = thing.co_code, thing.co_names, *thing.co_consts
    elif isinstance(thing, functools.partial):
        parts = thing.func, thing.args, thing.keywords
    elif is_dataclass(thing) and not isinstance(thing, type):
        parts = tuple(getattr(thing, field.name) for field in fields(thing))
    elif isinstance(thing, dict):
        parts = tuple(thing.items())
    elif isinstance(thing, tuple):
        parts = thing
    else:
        plain = str | bytes | int | float | complex | None
        return thing if isinstance(thing, plain) else getattr(thing, "__qualname__", type(thing).__qualname__)
    return tuple(_contents(part, (*above, id(thing))) for part in parts)
