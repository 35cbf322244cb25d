"""Matplotlib figures from results: every function takes arrays or a table and returns the ``Figure`` it drew in.

``ax``: the axes to draw in, as from ``plt.subplots()``; without them the function makes a figure. The methods of
``COLOURS`` have the same colour everywhere, others get the next free one of a figure.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import BeforeValidator
from torch import Tensor

from .checks import AnyList, List, Named, Numbers, checked, table
from .estimators.estimate import Estimate
from .federation.split import Federation, Split

__all__ = ["label_counts", "learning_curves", "along_weight", "weights", "paired_differences", "frontier", "frontiers"]

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
OTHERS = ("#56B4E9", "#E69F00", "#8C564B", "#9467BD", "#17BECF", "#BCBD22", "#E377C2", "#7F4F24", "#4C6A92", "#A05195")

Grid = Annotated[Tensor, Numbers("W")]  # mixing weights
Curves = Annotated[Tensor, Numbers("C W")]  # of each client at each of them
Clients = Annotated[Tensor, Numbers("C")]
Mark = Clients | tuple[Clients, Clients]  # on the curves: weights; or anywhere: weights and heights
Points = Annotated[pd.DataFrame, table("accuracy", "±", "bytes")]
History = Annotated[pd.DataFrame, table("step", "train_loss", "loss", "accuracy")]
Panels = Annotated[AnyList[Axes], BeforeValidator(lambda ax: list(ax.flat) if isinstance(ax, np.ndarray) else ax)]
Differences = Annotated[pd.DataFrame, table("difference", "±")]


def colour(method: str) -> str:
    """A method's colour; grey for methods without one."""
    return COLOURS.get(method.partition(" ")[0], "#BBBBBB")


def colours(methods: Iterable[str]) -> dict[str, str]:
    """A colour for each method: its own, or, for one that has none, the next of the others."""
    methods, rest = list(dict.fromkeys(methods)), itertools.cycle(OTHERS)
    found = {method: COLOURS[method] for method in methods if method in COLOURS}
    for method in methods:
        known = COLOURS.get(method.partition(" ")[0])
        if method not in found:
            found[method] = next(rest) if known is None or known in found.values() else known
    return found


def marker(method: str) -> str:
    """The sign for a method: a star for the reference, which knows the test data."""
    return "*" if method.startswith("oracle") else "o"


def _axes(ax: Axes | None, *size: float) -> Axes:
    """The axes to draw in: those given, or those of a new figure of this size in inches."""
    axes = Figure(figsize=size, layout="constrained").subplots() if ax is None else ax
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _panels(ax: AnyList[Axes] | None, names: Sequence[str], columns: int, size: tuple[float, float]) -> list[Axes]:
    """Axes for each name, with it as their title: those given, or those of a new figure; each is of this size.

    Raises ``ValueError`` for fewer axes than names.
    """
    if ax is None:
        columns = min(columns, len(names))
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
        ax = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
        for unused in ax[len(names) :]:
            unused.set_visible(False)
    if len(ax) < len(names):
        raise ValueError(f"ax must be axes for {len(names)} panels, not {len(ax)}")
    for axes, name in zip(ax, names):
        axes.set_title(name, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    return list(ax[: len(names)])


def _client_names(names: Sequence[str] | None, clients: int, argument: str = "names") -> list[str]:
    """The names as a list; without them, ``client 0`` and so on. Raises ``ValueError`` unless there is one for each."""
    if names is not None and len(names) != clients:
        raise ValueError(f"{argument}: {len(names)} of them for {clients} clients")
    return [f"client {i}" for i in range(clients)] if names is None else list(names)


def check_names(names: Sequence[str], splits: Iterable[Split]) -> None:
    """Raise ``ValueError`` unless there is a name for every label of the splits."""
    largest = max(int(y.max()) for split in splits for _, y in split.examples)
    if largest >= len(names):
        raise ValueError(f"names: {len(names)} of them, but there is a label {largest}")


@checked
def label_counts(
    split: Split | Federation,
    names: List[str] | None = None,
    *,
    client_names: List[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """How many examples of each class every client has: a row per client, a column per class.

    Of a federation, its ``train`` split, with its names of clients and classes; ``names`` of the classes and
    ``client_names`` come first.
    """
    whole = split if isinstance(split, Federation) else None
    split = whole.train if whole else split
    known = (whole and whole.client_names) or [f"client {i}" for i in split.ids]
    clients = _client_names(client_names or known, len(split), "client_names")
    if names is None:
        largest = max(int(split.client(i)[1].max()) for i in range(len(split)))
        names = (whole and whole.class_names) or [f"class {k}" for k in range(whole.classes if whole else largest + 1)]
    check_names(names, [split])
    counts = np.stack([np.bincount(split.client(i)[1].cpu(), minlength=len(names)) for i in range(len(split))])
    ax = _axes(ax, 8, 1.2 + 0.32 * len(counts))
    ax.imshow(counts, cmap="Blues", aspect="auto", vmin=0)
    for (client, k), count in np.ndenumerate(counts):
        if count:
            shade = "white" if count > counts.max() / 2 else "black"
            ax.text(k, client, str(count), ha="center", va="center", fontsize=9, color=shade)
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
    ax.set_yticks(range(len(counts)), clients)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax.figure


@checked
def learning_curves(
    history: History, measure: Literal["loss", "accuracy", "train_loss"] = "loss", *, ax: Axes | None = None
) -> Figure:
    """A measure against the optimiser steps of a client, from the ``history`` of a training: a thin line per client
    and a thick one for their mean.

    ``measure``: ``"loss"`` (nats) or ``"accuracy"`` on the ``eval_split``, or ``"train_loss"``. With a column
    ``model`` (of ``train_pair``) or ``method`` (of ``read_histories``) there is a colour for each of them, with
    several seeds a thin line for each seed and client.

    Raises ``ValueError`` when the history has no such numbers.
    """
    rows = history[history[measure].notna()]
    if rows.empty:
        raise ValueError(f"history has no {measure}; train with eval_split= to have the loss and accuracy on a split")
    by = next((name for name in ("method", "model") if name in rows), None)
    groups = list(rows.groupby(by, sort=False)) if by else [("mean of the clients", rows)]
    shades = colours([name for name, _ in groups])
    one = [name for name in ("federation", "seed", "client") if name in rows]
    ax = _axes(ax, 6, 3.6)
    for name, part in groups:
        for _, client in part.groupby(one, sort=False):
            ax.plot(client["step"], client[measure], color=shades[name], linewidth=0.7, alpha=0.35)
        mean = part.groupby("step")[measure].mean()
        ax.plot(mean.index, mean, color=shades[name], linewidth=2.2, label=name)
    ax.set_xlabel("optimiser steps of a client")
    ax.set_ylabel({"loss": "loss (nats)", "train_loss": "training loss (nats)"}.get(measure, measure))
    ax.legend(fontsize=8, frameon=False)
    return ax.figure


@checked
def along_weight(
    weights: Grid,
    values: Curves,
    chosen: Mapping[str, Mark] | None = None,
    *,
    label: str = "test loss (nats)",
    also: Mapping[str, Curves] | None = None,
    names: List[str] | None = None,
    ax: Panels | None = None,
) -> Figure:
    """One small panel per client: ``values`` ``(C, W)`` against the mixing weight, with the ``chosen`` weights
    ``{method: (C,)}`` marked on the curve, or ``{method: (weights, values)}`` where they are.

    ``also``: more curves, ``{name: (C, W)}``, dashed. ``names`` of the clients. ``ax``: axes for each client.
    """
    marks, also = chosen or {}, also or {}
    shades = colours([*marks, *also])
    panels = _panels(ax, _client_names(names, len(values)), 4, (2.5, 2.3))
    _curves(panels, weights, values, marks, shades)
    for name, curves in also.items():
        for panel, curve in zip(panels, curves.cpu()):
            panel.plot(weights.cpu(), curve, "--", color=shades[name], label=name)
    figure = panels[0].figure
    if ax is None:
        figure.supxlabel("mixing weight λ (0 = local, 1 = federated)")
        figure.supylabel(label)
    else:
        for panel in panels:
            panel.set(xlabel="mixing weight λ", ylabel=label)
    if shades and ax is None:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    elif shades:
        panels[0].legend(fontsize=8, frameon=False)
    return figure


def _curves(
    panels: Iterable[Axes], weights: Tensor, values: Tensor, marks: Mapping[str, Any], shades: Mapping[str, str]
) -> None:
    """A client's values in each panel, with its marks."""
    x = weights.cpu().numpy()
    for client, panel in enumerate(panels):
        y = values[client].cpu().numpy()
        panel.plot(x, y, color="#444444", linewidth=1.5)
        for method, mark in marks.items():
            if isinstance(mark, tuple):
                weight, height = (float(part[client]) for part in mark)
            else:
                weight = float(mark[client])
                height = np.interp(weight, x, y)
            panel.plot(weight, height, marker(method), color=shades[method], label=method, markersize=7, zorder=3)


@checked
def weights(
    estimates: Estimate | Named[Estimate | Clients],
    oracle: Clients | None = None,
    *,
    names: List[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The mixing weight of every client, a row each: of an estimate or of several by name, and of the ``oracle``
    ``(C,)``, each client's best weight on its test data. ``names`` of the clients.

    Raises ``ValueError`` for estimates of different numbers of clients.
    """
    found = {"estimate": estimates} if isinstance(estimates, Estimate) else dict(estimates)
    found |= {} if oracle is None else {"oracle": oracle}
    found = {name: one.client_weight if isinstance(one, Estimate) else one for name, one in found.items()}
    count = len(next(iter(found.values())))
    if unlike := [name for name, weight in found.items() if len(weight) != count]:
        raise ValueError(f"estimates must be of {count} clients, unlike {unlike[0]!r}")
    clients = _client_names(names, count)
    shades = colours(found)
    ax = _axes(ax, 6, 1.2 + 0.3 * len(clients))
    ax.axvline(0.5, color="#DDDDDD", zorder=0)
    for name, weight in found.items():
        ax.plot(weight.cpu(), range(len(clients)), marker(name), color=shades[name], label=name, markersize=7)
    ax.set(xlim=(-0.03, 1.03), ylim=(count - 0.5, -0.5), xlabel="mixing weight λ (0 = local, 1 = federated)")
    ax.set_yticks(range(count), clients)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax.figure


@checked
def paired_differences(differences: Differences, *, label: str = "accuracy", ax: Axes | None = None) -> Figure:
    """The table of ``results.paired_differences``, a row per method: how much better the one method is than this one,
    with its standard error over seeds as a bar. ``label``: the score that is compared."""
    ax = _axes(ax, 6, 1.1 + 0.32 * len(differences))
    rows, errors = range(len(differences)), differences["±"].fillna(0.0)  # of a single seed, no bar
    ax.errorbar(differences["difference"], rows, xerr=errors, fmt="o", color=COLOURS["potara-calibrated"])
    ax.axvline(0, color="#888888", linewidth=1, zorder=0)
    ax.set_yticks(rows, [", ".join(name) if isinstance(name, tuple) else name for name in differences.index])
    ax.set_ylim(len(differences) - 0.5, -0.5)
    ax.set_xlabel(f"difference in {label}, ± standard error")
    return ax.figure


@checked
def frontier(points: Points, *, ax: Axes | None = None) -> Figure:
    """Mean client accuracy against megabytes per client, from ``results.summary``; bars are standard errors."""
    ax = _axes(ax, 6, 4)
    shades = colours(points.index)
    for method, row in points.iterrows():
        _point(ax, row["bytes"] / 1e6, row, fmt=marker(method), color=shades[method], label=method)
    ax.set_xlabel("communication per client, up + down (MB)")
    ax.set_ylabel("mean client accuracy (test)")
    ax.legend(fontsize=8, frameon=False)
    return ax.figure


def _point(panel: Axes, megabytes: float, row: pd.Series, **style) -> None:
    """A method's mean accuracy, with its standard error as a bar if there is one."""
    error = None if np.isnan(row["±"]) else row["±"]
    panel.errorbar(megabytes, row["accuracy"], yerr=error, **style)


@checked
def frontiers(
    board: Points,
    front: pd.Series,
    highlight: str = "potara-calibrated",
    references: Sequence[str] = (),
    *,
    ax: Panels | None = None,
) -> Figure:
    """A panel per federation of a ``results.leaderboard``: mean client accuracy against megabytes per client.

    The line joins the methods on the Pareto ``front``. They and ``highlight`` are named, have standard errors over
    seeds as bars, and the same sign and colour in all panels; ``references`` are left out. ``ax``: axes for each
    federation.
    """
    if not front.index.equals(board.index):
        raise ValueError(f"front must have the {len(board)} lines of board, as pareto_front makes them")
    names = list(dict.fromkeys(board.index.get_level_values("federation")))
    methods = board.index.get_level_values("method")
    is_named = (front.astype(bool) | (methods == highlight)) & ~methods.isin(references)
    shades = colours(methods[is_named])
    signs = dict(zip(shades, itertools.cycle("osD^vPX<>")))
    panels = _panels(ax, names, len(names), (4.6, 6))
    for name, panel in zip(names, panels):
        lines = board.loc[name].assign(MB=lambda t: t["bytes"] / 1e6, best=front[name].astype(bool))
        lines = lines[~lines.index.isin(references)].sort_values("MB", kind="stable")
        named = lines["best"] | (lines.index == highlight)
        panel.plot(lines["MB"][~named], lines["accuracy"][~named], "o", ms=5, color="#CCCCCC", zorder=0)
        best = lines[lines["best"]]
        panel.plot(best["MB"], best["accuracy"], color="#888888", lw=1, zorder=1, drawstyle="steps-post")
        for method, row in lines[named].iterrows():
            _point(panel, row["MB"], row, fmt=signs[method], ms=7, color=shades[method], lw=1, label=method)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize=8, frameon=False)
        panel.set_xscale("symlog", linthresh=1)
    figure = panels[0].figure
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
    names, shades = _client_names(None, len(loss)), colours(chosen)
    figure = Figure(figsize=(12, 3.6 * rows + 4.2), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=[1.8 * rows, 1.8 * rows, 4.2])
    for part, values, label, row in ((top, loss, "test loss (nats)", 1), (middle, accuracy, "test accuracy", 2)):
        panels = list(part.subplots(rows, columns, sharex=True, squeeze=False).flat)
        for unused in panels[len(names) :]:
            unused.set_visible(False)
        marks = {name: (mark[0], mark[row]) for name, mark in chosen.items()}
        _curves(_panels(panels, names, columns, (3, 1.8)), weights, values, marks, shades)
        part.supylabel(label)
        part.supxlabel("mixing weight λ (0 = local, 1 = federated)", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    top.legend(handles, labels, loc="outside upper center", ncols=len(chosen))
    left, right = bottom.subplots(1, 2, width_ratios=[3, 1])
    right.set_visible(False)
    frontier(points[points.index != "backbone"], ax=left)
    return figure
