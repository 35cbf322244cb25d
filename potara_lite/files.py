"""Files: where the shipped ones lie, one error for whatever cannot be read, and writing in one step.

What is read may be cut off, damaged or made to do harm, and the libraries that read it raise errors of every type: here
they become one, ``FileError``. Nothing on disk is a pickle.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FileError(ValueError):
    """A file or folder is missing, damaged or not what it should be; the message, one line, names it."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside is raised as a ``FileError`` that names ``path``."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:  # zip, xz, JSON, Unicode, regular expressions, safetensors, memory: each has its own
        raise FileError(f"cannot read {path}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 300 characters; with its type where that is part of the meaning."""
    text = textwrap.shorten(str(error), 300, placeholder=" …")
    return text if text and isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def data_path(name: str = "", folder: str = "data") -> Path:
    """Where the shipped file ``name`` lies: inside an installed wheel, or in this ``folder`` of a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "_data"
    return (shipped if shipped.is_dir() else package.parent / folder) / name


def check_file(path: str | Path) -> Path:
    """The path itself, once the file's SHA-256 equals the one in the ``.sha256`` file beside it.

    Raises ``FileError`` when one of them is missing or the file is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path} is missing")
    with reading(path.with_suffix(".sha256")):
        expected = path.with_suffix(".sha256").read_text().split()[0].lower()
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != expected:
        raise FileError(f"{path} is damaged: its SHA-256 is {found[:12]}…, expected {expected[:12]}…")
    return path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, so that a reader or an interruption never sees half of it.

    What a process that was killed left of the same file goes, too; what another one is writing stays.
    """
    mine = f"{path.name}.{platform.node()}"  # a folder may be shared by machines
    for left in path.parent.glob(f"{glob.escape(mine)}.*.part"):
        if not _lives(left.suffixes[-2][1:]):
            left.unlink(missing_ok=True)
    partial = path.with_name(f"{mine}.{os.getpid()}.part")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    finally:  # where the disk was full, say
        partial.unlink(missing_ok=True)


def _lives(process: str) -> bool:
    """Whether there is a process of this number; where that cannot be asked, there may be."""
    try:
        os.kill(int(process), 0) if os.name == "posix" else None
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):  # of another user, or no number
        pass
    return True
