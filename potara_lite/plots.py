"""Matplotlib figures from results: every function takes arrays or a table and returns a ``Figure``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .checks import List, Named, Numbers, checked, table
from .federation.split import Federation, Split

COLOURS = {  # Okabe & Ito's palette, safe for colour-blind readers
    "federated": "#0072B2",
    "local": "#D55E00",
    "uniform": "#999999",
    "potara-paper": "#CC79A7",
    "potara-calibrated": "#009E73",
    "oracle": "#000000",
    "predicted": "#009E73",
    "bound": "#CC79A7",
}

Grid = Annotated[Tensor, Numbers("W")]  # mixing weights
Curves = Annotated[Tensor, Numbers("C W")]  # of each client at each of them
Clients = Annotated[Tensor, Numbers("C")]
Mark = Clients | tuple[Clients, Clients]  # on the curves: weights; or anywhere: weights and heights
Points = Annotated[pd.DataFrame, table("accuracy", "±", "bytes")]


def colour(method: str) -> str:
    """A method's colour; grey for methods without one."""
    return COLOURS.get(method.partition(" ")[0], "#BBBBBB")


def marker(method: str) -> str:
    """The sign for a method: a star for the reference, which knows the test data."""
    return "*" if method.startswith("oracle") else "o"


def check_names(names: Sequence[str], splits: Iterable[Split]) -> None:
    """Raise ``ValueError`` unless there is a name for every label of the splits."""
    largest = max(int(y.max()) for split in splits for _, y in split.examples)
    if largest >= len(names):
        raise ValueError(f"names: {len(names)} of them, but there is a label {largest}")


@checked
def label_counts(split: Split | Federation, names: List[str] | None = None) -> Figure:
    """How many examples of each class every client has: a row per client, a column per class.

    Of a federation, its ``train`` split, with its names of clients and classes; ``names`` of the classes come first.
    """
    whole = split if isinstance(split, Federation) else None
    split = whole.train if whole else split
    clients = (whole and whole.client_names) or [f"client {i}" for i in split.ids]
    if names is None:
        largest = max(int(split.client(i)[1].max()) for i in range(len(split)))
        names = (whole and whole.class_names) or [f"class {k}" for k in range(whole.classes if whole else largest + 1)]
    check_names(names, [split])
    counts = np.stack([np.bincount(split.client(i)[1].cpu(), minlength=len(names)) for i in range(len(split))])
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(counts)), layout="constrained")
    panel = figure.subplots()
    panel.imshow(counts, cmap="Blues", aspect="auto")
    for (client, k), count in np.ndenumerate(counts):
        if count:
            shade = "white" if count > counts.max() / 2 else "black"
            panel.text(k, client, str(count), ha="center", va="center", fontsize=9, color=shade)
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right")
    panel.set_yticks(range(len(counts)), clients)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    return figure


@checked
def along_weight(
    weights: Grid,
    values: Curves,
    chosen: Mapping[str, Mark] | None = None,
    *,
    label: str = "test loss (nats)",
    also: Mapping[str, Curves] | None = None,
) -> Figure:
    """One small panel per client: ``values`` ``(C, W)`` against the mixing weight, with the ``chosen`` weights
    ``{method: (C,)}`` marked on the curve, or ``{method: (weights, values)}`` where they are. ``also``: more curves,
    ``{name: (C, W)}``, dashed."""
    rows = -(-len(values) // 4)
    figure = Figure(figsize=(10, 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, 4, sharex=True, squeeze=False)
    _curves(panels.flat, weights, values, chosen or {})
    for name, curves in (also or {}).items():
        for panel, curve in zip(panels.flat, curves.cpu()):
            panel.plot(weights.cpu(), curve, "--", color=colour(name), label=name)
    figure.supxlabel("mixing weight λ (0 = local, 1 = federated)")
    figure.supylabel(label)
    if chosen or also:
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def _curves(panels: Iterable[Axes], weights: Tensor, values: Tensor, marks: Mapping[str, Tensor | tuple]) -> None:
    """A client's values in each panel, with its marks; panels without a client are hidden."""
    x = weights.cpu().numpy()
    for client, panel in enumerate(panels):
        if client >= len(values):
            panel.set_visible(False)
            continue
        y = values[client].cpu().numpy()
        panel.plot(x, y, color="#444444", linewidth=1.5)
        for method, mark in marks.items():
            if isinstance(mark, tuple):
                weight, height = (float(part[client]) for part in mark)
            else:
                weight = float(mark[client])
                height = np.interp(weight, x, y)
            panel.plot(weight, height, marker(method), color=colour(method), label=method, markersize=7, zorder=3)
        panel.set_title(f"client {client}", fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)


@checked
def frontier(points: Points) -> Figure:
    """Mean client accuracy against megabytes per client, from ``results.summary``; bars are standard errors."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    _frontier(figure.subplots(), points)
    return figure


def _frontier(panel: Axes, points: pd.DataFrame) -> None:
    for method, row in points.iterrows():
        _point(panel, row["bytes"] / 1e6, row, fmt=marker(method), color=colour(method), label=method)
    panel.set_xlabel("communication per client, up + down (MB)")
    panel.set_ylabel("mean client accuracy (test)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, frameon=False)


def _point(panel: Axes, megabytes: float, row: pd.Series, **style) -> None:
    """A method's mean accuracy, with its standard error as a bar if there is one."""
    error = None if np.isnan(row["±"]) else row["±"]
    panel.errorbar(megabytes, row["accuracy"], yerr=error, **style)


@checked
def frontiers(
    board: Points, front: pd.Series, highlight: str = "potara-calibrated", references: Sequence[str] = ()
) -> Figure:
    """A panel per federation of a ``results.leaderboard``: mean client accuracy against megabytes per client.

    The line joins the methods on the Pareto ``front``. They and ``highlight`` are named and have standard errors over
    seeds as bars; ``references`` are left out.
    """
    if not front.index.equals(board.index):
        raise ValueError(f"front must have the {len(board)} lines of board, as pareto_front makes them")
    names = list(dict.fromkeys(board.index.get_level_values("federation")))
    figure = Figure(figsize=(4.6 * len(names), 6), layout="constrained")
    for panel, name in zip(np.atleast_1d(figure.subplots(1, len(names), sharex=True)), names):
        lines = board.loc[name].assign(MB=lambda t: t["bytes"] / 1e6, best=front[name].astype(bool))
        lines = lines[~lines.index.isin(references)].sort_values("MB", kind="stable")
        named = lines["best"] | (lines.index == highlight)
        panel.plot(lines["MB"][~named], lines["accuracy"][~named], "o", ms=5, color="#CCCCCC", zorder=0)
        best = lines[lines["best"]]
        panel.plot(best["MB"], best["accuracy"], color="#888888", lw=1, zorder=1, drawstyle="steps-post")
        for (method, row), sign in zip(lines[named].iterrows(), itertools.cycle("osD^vPX<>")):
            shade = COLOURS["potara-calibrated"] if method == highlight else COLOURS["federated"]
            _point(panel, row["MB"], row, fmt=sign, ms=7, color=shade, lw=1, label=method)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize=8, frameon=False)
        panel.set_xscale("symlog", linthresh=1)
        panel.set_title(name, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("communication per client, up + down (MB; linear below 1)", fontsize=9)
    figure.supylabel("mean client accuracy (test)", fontsize=9)
    return figure


@checked
def overview(
    weights: Grid, loss: Curves, accuracy: Curves, chosen: Named[tuple[Clients, Clients, Clients]], points: Points
) -> Figure:
    """The command's figure: loss and accuracy along the mixing weight per client, and accuracy against bytes.

    ``chosen``: each method's weight, loss and accuracy, three ``(C,)``; off the curve where its weights are by group.
    """
    columns = 4
    rows = -(-len(loss) // columns)
    figure = Figure(figsize=(12, 3.6 * rows + 4.2), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=[1.8 * rows, 1.8 * rows, 4.2])
    for part, values, label, row in ((top, loss, "test loss (nats)", 1), (middle, accuracy, "test accuracy", 2)):
        panels = part.subplots(rows, columns, sharex=True, squeeze=False)
        _curves(panels.flat, weights, values, {name: (mark[0], mark[row]) for name, mark in chosen.items()})
        part.supylabel(label)
        part.supxlabel("mixing weight λ (0 = local, 1 = federated)", fontsize=9)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside upper center", ncols=len(chosen))
    left, right = bottom.subplots(1, 2, width_ratios=[3, 1])
    right.set_visible(False)
    _frontier(left, points[points.index != "backbone"])
    return figure
