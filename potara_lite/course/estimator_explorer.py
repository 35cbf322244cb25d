"""A client, a number of local steps, and where every estimator's λ lies on the client's curve: precomputed."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.interpolate import CubicSpline

from ..adapters.state import door, numbers
from ..checks import table, unchecked
from ..plots import COLOURS

METHODS = {  # column of the rows: name, colour, line, marker
    "paper_undamped": ("paper, damping 1e-8", COLOURS["potara-paper"], "-", "s"),
    "paper": ("paper, damping relative", COLOURS["potara-paper"], "--", "D"),
    "paper_held": ("paper, held-out", "#E69F00", "-", "^"),
    "gradient": ("gradient, training", "#56B4E9", "-", "v"),
    "uniform": ("½", COLOURS["uniform"], ":", "P"),
    "pooled": ("pooled curve, held-out", COLOURS["potara-calibrated"], "-", "o"),
    "oracle": ("oracle (test data)", COLOURS["oracle"], "-", "*"),
}
FINE = np.linspace(0, 1, 101)


def rows_of_course(name: str, value: Any, given: Mapping[str, Any]) -> pd.DataFrame:
    """Rows like those of ``course.csv``: losses along λ, and each estimator's weight and loss."""
    columns = "alpha seed client local_steps".split() + [f"{what}_{m}" for what in ("weight", "loss") for m in METHODS]
    found = table(*columns)(name, value, given)
    curves = found.filter(regex=r"^curve_")
    if curves.shape[1] < 2:
        raise ValueError(f"{name} must have two columns curve_λ or more, not {curves.shape[1]}")
    finite = found[columns].drop(columns="alpha")  # which is infinite where all clients are alike
    numbers(2)(name, finite.join(curves).to_numpy(), given)
    return found


@door(rows=rows_of_course)
def loss_along(rows: pd.DataFrame) -> CubicSpline:
    """The test loss (nats) along λ of every row of ``course.csv``: called with λ ``(W,)``, it returns ``(rows, W)``."""
    curves = rows.filter(regex=r"^curve_")
    return CubicSpline([float(name.removeprefix("curve_")) for name in curves], curves.to_numpy(), axis=1)


@door(rows=rows_of_course)
def estimator_explorer(rows: pd.DataFrame) -> ipywidgets.VBox:
    """Choose a client and the local steps; every estimator's λ stands on the client's test loss along λ.

    ``rows``: those of ``course.csv`` of one α and seed. The vertical scale is the client's and stays while the steps
    change. The text says what the λ of each estimator costs over the client's best one. The children of the box are
    the client, the steps, the text and the picture.

    Raises ``ValueError`` for rows of more than one federation.

    >>> from potara_lite.results import committed_rows
    >>> rows = committed_rows("course.csv").query("alpha == 0.1 and seed == 0")
    >>> client, steps, text, picture = estimator_explorer(rows).children
    >>> [label for label, _ in steps.options]
    ['25', '100', '400']
    """
    if len(rows) == 0 or len(rows[["alpha", "seed"]].drop_duplicates()) != 1:
        raise ValueError("rows must be of one alpha and one seed")
    table = rows.set_index(["client", "local_steps"]).sort_index()
    clients, lengths = (table.index.unique(level).tolist() for level in ("client", "local_steps"))
    client = ipywidgets.Dropdown(options=[(f"client {i}", i) for i in clients], layout={"width": "120px"})
    steps = ipywidgets.SelectionSlider(
        options=[(str(length), length) for length in lengths],
        description="local steps",
        layout={"width": "420px", "max_width": "98%"},
    )
    text = ipywidgets.HTML()
    picture = ipywidgets.Image(format="svg+xml", layout={"width": "720px", "max_width": "98%"})
    drawn: dict[tuple[int, int], bytes] = {}

    def update(_=None) -> None:
        state = client.value, steps.value
        row = table.loc[state]
        if state not in drawn:
            drawn[state] = _draw(table.loc[[state]], unchecked(loss_along)(table.loc[[client.value]])(FINE))
        picture.value = drawn[state]
        costs = (f"{METHODS[m][0]} {row[f'loss_{m}'] - row.loss_oracle:.3f}" for m in METHODS if m != "oracle")
        best = f"client {state[0]}, {state[1]} local steps: best λ = {row.weight_oracle:.2f}"
        text.value = f"{best}; regret in nats: {', '.join(costs)}"

    for control in (client, steps):
        control.observe(update, names="value")
    update()
    return ipywidgets.VBox([client, steps, text, picture])


def _draw(row: pd.DataFrame, all_lengths: np.ndarray) -> bytes:
    """One state as SVG; the vertical scale is that of the client's curves at all lengths."""
    figure = Figure(figsize=(8, 3.4), layout="constrained", dpi=72)
    panel = figure.subplots()
    curve = unchecked(loss_along)(row)
    panel.plot(FINE, curve(FINE)[0], color="#444444", linewidth=1.5)
    for method, (name, colour, _, marker) in METHODS.items():
        weight = row[f"weight_{method}"].iloc[0]
        size = 13 if method == "oracle" else 8
        panel.plot(weight, curve(weight)[0], marker, color=colour, markersize=size, label=name, clip_on=False)
    panel.set(xlabel="mixing weight λ (0 = local, 1 = federated)", ylabel="test loss (nats)", xlim=(-0.02, 1.02))
    margin = 0.06 * np.ptp(all_lengths)
    panel.set_ylim(all_lengths.min() - margin, all_lengths.max() + margin)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=10)
    figure.savefig(file := StringIO(), format="svg", metadata={"Date": None})
    return file.getvalue().encode()
