"""A client, a number of local steps, and where every estimator's λ lies on the client's curve: precomputed."""

from __future__ import annotations

from functools import cache
from typing import Annotated

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import AfterValidator
from scipy.interpolate import CubicSpline

from ..checks import Numbers, checked, table
from ..plots import COLOURS
from .widgets import as_svg, dropdown, explorer, slider

METHODS = {  # column of the rows: name, colour, line, marker
    "paper": ("paper", COLOURS["potara-paper"], "-", "D"),
    "uniform": ("½", COLOURS["uniform"], ":", "P"),
    "own": ("own curve", "#56B4E9", "-", "v"),
    "pooled": ("pool", "#E69F00", "-", "^"),
    "calibrated": ("pool, head apart", COLOURS["potara-calibrated"], "--", "o"),
    "oracle": ("oracle (test data)", COLOURS["oracle"], "-", "*"),
}
FINE = np.linspace(0, 1, 101)
KEYS = ["seed", "client", "local_steps"]
FOUND = [f"{what}_{method}" for what in ("weight", "loss") for method in METHODS]


def _check_numbers(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, if their curves have two points or more and all numbers but α, which may be infinite, are finite."""
    curves = rows.filter(regex=r"^curve_")
    if curves.shape[1] < 2:
        raise ValueError(f"must have two columns curve_λ or more, not {curves.shape[1]}")
    Numbers("R N").check(rows[KEYS + FOUND].join(curves).to_numpy())
    return rows


Rows = Annotated[pd.DataFrame, table("alpha", *KEYS, *FOUND), AfterValidator(_check_numbers)]


@checked
def loss_along(rows: Rows) -> CubicSpline:
    """The test loss (nats) along λ of every row of ``course.csv``: called with λ ``(W,)``, it returns ``(rows, W)``."""
    return _spline(rows)


def _spline(rows: pd.DataFrame) -> CubicSpline:
    curves = rows.filter(regex=r"^curve_")
    return CubicSpline([float(name.removeprefix("curve_")) for name in curves], curves.to_numpy(), axis=1)


@checked
def estimator_explorer(rows: Rows) -> ipywidgets.VBox:
    """Choose a client and the local steps; every estimator's λ is marked on the client's test loss along λ.

    ``rows``: those of ``course.csv`` of one α and seed. With the head apart a merge leaves the line between the two
    models, so its mark may lie beside the curve. The vertical scale is the client's and stays while the steps change.
    The text says what the λ of each estimator costs over the client's best one. The children of the box are the client,
    the steps, the text and the picture.

    Raises ``ValueError`` for rows of more than one federation.

    >>> from potara_lite.results import committed_rows
    >>> rows = committed_rows("course.csv").query("alpha == 0.1 and seed == 0")
    >>> client, steps, text, picture = estimator_explorer(rows).children
    >>> [label for label, _ in steps.options]
    ['25', '100', '400']
    """
    if len(rows[["alpha", "seed"]].drop_duplicates()) != 1:
        raise ValueError("rows must be of one alpha and one seed")
    lines = rows.set_index(["client", "local_steps"]).sort_index()
    clients, lengths = (lines.index.unique(level).tolist() for level in ("client", "local_steps"))
    client = dropdown((f"client {i}", i) for i in clients)
    steps = slider("local steps", [(str(length), length) for length in lengths], width=420)

    @cache
    def drawn(i: int, length: int) -> str:
        of_client = lines.loc[[i]]  # at all lengths
        return _draw(lines.loc[[(i, length)]], np.append(_spline(of_client)(FINE), of_client.loss_calibrated))

    def show(i: int, length: int) -> tuple[str, str]:
        line = lines.loc[i, length]
        regrets = (f"{METHODS[m][0]} {line[f'loss_{m}'] - line.loss_oracle:.3f}" for m in METHODS if m != "oracle")
        best = f"client {i}, {length} local steps: best λ = {line.weight_oracle:.2f}"
        return f"{best}; regret in nats: {', '.join(regrets)}", drawn(i, length)

    return explorer([client, steps], show, text=ipywidgets.HTML(), width=600)


def _draw(line: pd.DataFrame, losses: np.ndarray) -> str:
    """One state as SVG; the vertical scale is that of all the client's ``losses``."""
    figure = Figure(figsize=(6, 4.2), layout="constrained", dpi=72)
    panel = figure.subplots()
    curve = _spline(line)
    panel.plot(FINE, curve(FINE)[0], color="#444444", linewidth=1.5)
    for method, (name, colour, _, marker) in METHODS.items():
        weight, loss = line[f"weight_{method}"].iloc[0], line[f"loss_{method}"].iloc[0]
        size = 13 if method == "oracle" else 8
        panel.plot(weight, loss, marker, color=colour, markersize=size, label=name, clip_on=False)
    panel.set(xlabel="mixing weight λ (0 = local, 1 = federated)", ylabel="test loss (nats)", xlim=(-0.02, 1.02))
    margin = 0.06 * np.ptp(losses)
    panel.set_ylim(losses.min() - margin, losses.max() + margin)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=10, ncols=2)
    return as_svg(figure)
