"""The rows of the committed benchmarks, wherever the package runs."""

from __future__ import annotations

import pandas as pd

from ..data import data_path


def committed_rows(name: str) -> pd.DataFrame:
    """The table ``name``, such as ``"bound.csv"``: from an installed wheel, or from ``benchmarks/`` of a checkout.

    Raises ``ValueError`` when neither has it.

    >>> sorted(committed_rows("bound.csv").regime.unique())
    ['default', 'over-fitted']
    """
    path = data_path(name, "benchmarks")
    if not path.is_file():
        raise ValueError(f"{name} is missing: it is neither in the installed package nor in a checkout's benchmarks/")
    return pd.read_csv(path)
