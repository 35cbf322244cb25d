"""The rows of the committed benchmarks, wherever the package runs."""

from __future__ import annotations

import pandas as pd

from ..checks import door
from ..files import FileError, data_path, reading


@door()
def committed_rows(name: str) -> pd.DataFrame:
    """The table ``name``, such as ``"bound.csv"``: from an installed wheel, or from ``benchmarks/`` of a checkout.

    Raises ``FileError`` (a ``ValueError``) when neither has it, or when it is damaged.

    >>> sorted(committed_rows("bound.csv").regime.unique())
    ['default', 'over-fitted']
    """
    path = data_path(name, "benchmarks")
    if not path.is_file():
        raise FileError(f"{name} is missing: it is neither in the installed package nor in a checkout's benchmarks/")
    with reading(path):
        return pd.read_csv(path)
