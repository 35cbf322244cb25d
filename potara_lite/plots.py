"""Matplotlib figures from results: every function takes arrays or a table and returns a ``Figure``."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from .adapters.state import curves_over, door, numbers, one_for_each, shaped_like
from .checks import Check, kind, named, several, table, text
from .federation.split import Split

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

Chosen = Tensor | tuple[Tensor, Tensor]  # a weight per client, or weights and values


def colour(method: str) -> str:
    """A method's colour; grey for methods without one."""
    return COLOURS.get(method.partition(" ")[0], "#BBBBBB")


def marks(values: str, tuples: int = 2) -> Check:
    """A weight for each client, or a tuple of weights and what stands there, so many numbers ``(C,)``."""
    one = one_for_each(values)

    def check(name: str, value: Any, given: Mapping[str, Any]) -> Chosen:
        if isinstance(value, tuple) or tuples > 2:
            return tuple(several(one, least=tuples)(name, value, given))
        return one(name, value, given)

    return check


def names_of_labels(name: str, value: Any, given: Mapping[str, Any]) -> list[str]:
    """A name for every label that the examples have."""
    found, splits = several(text)(name, value, given), given.get("splits") or [given["split"]]
    if (most := max(int(split.y.max()) for split in splits)) >= len(found):
        raise ValueError(f"{name}: {len(found)} of them, but there is a label {most}")
    return found


@door(split=kind("Split"), names=names_of_labels)
def label_counts(split: Split, names: Sequence[str]) -> Figure:
    """How many examples of each class every client has: a row per client, a column per class of ``names``."""
    counts = np.stack([np.bincount(split.client(i)[1].cpu(), minlength=len(names)) for i in range(len(split))])
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(counts)), layout="constrained")
    panel = figure.subplots()
    panel.imshow(counts, cmap="Blues", aspect="auto")
    for (client, k), count in np.ndenumerate(counts):
        if count:
            shade = "white" if count > counts.max() / 2 else "black"
            panel.text(k, client, str(count), ha="center", va="center", fontsize=9, color=shade)
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right")
    panel.set_yticks(range(len(counts)), [f"client {i}" for i in split.ids])
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    return figure


@door(
    weights=numbers(1),
    values=curves_over("weights"),
    chosen=named(marks("values"), least=0),
    label=text,
    also=named(shaped_like("values", 2), least=0),
)
def along_weight(
    weights: Tensor,
    values: Tensor,
    chosen: Mapping[str, Chosen] | None = None,
    *,
    label: str = "test loss (nats)",
    also: Mapping[str, Tensor] | None = None,
) -> Figure:
    """One small panel per client: ``values`` ``(C, W)`` against the mixing weight, with the ``chosen`` weights
    ``{method: (C,)}`` marked on the curve, or ``{method: (weights, values)}`` where they are. ``also``: more curves,
    ``{name: (C, W)}``, dashed."""
    figure = Figure(figsize=(10, 2.3 * -(-len(values) // 4)), layout="constrained")
    panels = figure.subplots(-(-len(values) // 4), 4, sharex=True, squeeze=False)
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


def _curves(panels, weights: Tensor, values: Tensor, chosen: Mapping[str, Chosen]) -> None:
    x = weights.cpu().numpy()
    for client, panel in enumerate(panels):
        if client >= len(values):
            panel.set_visible(False)
            continue
        y = values[client].cpu().numpy()
        panel.plot(x, y, color="#444444", linewidth=1.5)
        for method, weight in chosen.items():
            if isinstance(weight, tuple):
                at, height = (float(part[client]) for part in weight)
            else:
                at = float(weight[client])
                height = np.interp(at, x, y)
            marker = "*" if method.startswith("oracle") else "o"
            panel.plot(at, height, marker, color=colour(method), label=method, markersize=7, zorder=3)
        panel.set_title(f"client {client}", fontsize=9, loc="left")
        panel.spines[["top", "right"]].set_visible(False)


@door(points=table("accuracy", "±", "bytes"))
def frontier(points: pd.DataFrame) -> Figure:
    """Mean client accuracy against megabytes per client, from ``results.summary``; bars are standard errors."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    _frontier(figure.subplots(), points)
    return figure


def _frontier(panel, points: pd.DataFrame) -> None:
    for method, row in points.iterrows():
        error = None if np.isnan(row["±"]) else row["±"]
        star = "*" if method.startswith("oracle") else "o"
        megabytes = row["bytes"] / 1e6
        panel.errorbar(megabytes, row["accuracy"], yerr=error, fmt=star, color=colour(method), label=method)
    panel.set_xlabel("communication per client, up + down (MB)")
    panel.set_ylabel("mean client accuracy (test)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, frameon=False)


def front_of_board(name: str, value: Any, given: Mapping[str, Any]) -> pd.Series:
    """Whether each line of a leaderboard is on the front."""
    found = kind("Series")(name, value, given)
    if not found.index.equals(given["board"].index):
        raise ValueError(f"{name} must have the {len(given['board'])} lines of board, as pareto_front makes them")
    return found.astype(bool)


@door(board=table("accuracy", "±", "bytes"), front=front_of_board, highlight=text, references=several(text, least=0))
def frontiers(
    board: pd.DataFrame, front: pd.Series, highlight: str = "potara-calibrated", references: Collection[str] = ()
) -> Figure:
    """A panel per federation of a ``results.leaderboard``: mean client accuracy against megabytes per client.

    The line joins the methods on the Pareto ``front``. They and ``highlight`` are named and have standard errors over
    seeds as bars; ``references`` are left out.
    """
    names = list(dict.fromkeys(board.index.get_level_values("federation")))
    figure = Figure(figsize=(4.6 * len(names), 6), layout="constrained")
    for panel, name in zip(np.atleast_1d(figure.subplots(1, len(names), sharex=True)), names):
        lines = board.loc[name].assign(MB=lambda t: t["bytes"] / 1e6, best=front[name])
        lines = lines[~lines.index.isin(list(references))]
        shown = lines["best"] | (lines.index == highlight)
        panel.plot(lines["MB"][~shown], lines["accuracy"][~shown], "o", ms=5, color="#CCCCCC", zorder=0)
        line = lines[lines["best"]].sort_values("MB")
        panel.plot(line["MB"], line["accuracy"], color="#888888", lw=1, zorder=1, drawstyle="steps-post")
        for (method, row), marker in zip(lines[shown].sort_values("MB").iterrows(), itertools.cycle("osD^vPX<>")):
            shade = COLOURS["potara-calibrated"] if method == highlight else COLOURS["federated"]
            error = None if np.isnan(row["±"]) else row["±"]
            panel.errorbar(row["MB"], row["accuracy"], yerr=error, fmt=marker, ms=7, color=shade, lw=1, label=method)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize=8, frameon=False)
        panel.set_xscale("symlog", linthresh=1)
        panel.set_title(name, fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("communication per client, up + down (MB; linear below 1)", fontsize=9)
    figure.supylabel("mean client accuracy (test)", fontsize=9)
    return figure


@door(
    weights=numbers(1),
    loss=curves_over("weights"),
    accuracy=shaped_like("loss", 2),
    chosen=named(marks("loss", 3)),
    points=table("accuracy", "±", "bytes"),
)
def overview(
    weights: Tensor, loss: Tensor, accuracy: Tensor, chosen: Mapping[str, tuple[Tensor, ...]], points: pd.DataFrame
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
        _curves(panels.flat, weights, values, {name: (found[0], found[row]) for name, found in chosen.items()})
        part.supylabel(label)
        part.supxlabel("mixing weight λ (0 = local, 1 = federated)", fontsize=9)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside upper center", ncols=len(chosen))
    left, right = bottom.subplots(1, 2, width_ratios=[3, 1])
    right.set_visible(False)
    _frontier(left, points[points.index != "backbone"])
    return figure
