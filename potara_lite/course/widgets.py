"""Thin ipywidgets around precomputed results: nothing is trained or evaluated while you drag.

``weight_slider`` is the widget of several notebooks; the rest is what all explorers are made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from io import StringIO
from typing import Annotated, Any, Literal

import ipywidgets
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..checks import Numbers, checked
from ..plots import Clients, Curves, colour, marker
from .explorer_page import explorer_page, uncover

Position = tuple[float, float]  # in an SVG: from the left, from the top
Curve = list[Position]


class Explorer(ipywidgets.VBox):
    """Controls, a text and a picture; what is displayed carries an HTML page, too, for a reader without a kernel."""

    page: Callable[[], str]

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return super()._repr_mimebundle_(**kwargs) | {"text/html": self.page()}


def explorer(
    controls: Sequence[ipywidgets.Widget],
    show: Callable[..., tuple[str, str | None]],
    *,
    text: ipywidgets.Widget | None = None,
    width: int = 760,
    row: bool = False,
    panels: Literal[1, 2] = 1,
) -> Explorer:
    """The controls, below each other or in one ``row``, then a line of text and a picture.

    Both are what ``show`` returns for the controls' values, now and when one changes; instead of the SVG, ``None``
    keeps the picture. The ``covers`` in it vanish as the last control moves over their positions. ``panels``: of the
    picture, side by side.
    """
    text = text or ipywidgets.Label()
    picture = ipywidgets.Image(format="svg+xml", layout={"width": f"{width}px", "max_width": "98%"})
    visited: dict[tuple[Any, ...], tuple[int, int]] = {}

    def update(_: Any = None) -> None:
        *others, last = controls
        values = tuple(control.value for control in others)
        text.value, svg = show(*values, last.value)
        if svg is not None:
            here = getattr(last, "index", 0)
            low, high = visited.get(values, (here, here))
            visited[values] = low, high = min(low, here), max(high, here)
            picture.value = uncover(svg, low, high).encode()

    for control in controls:
        control.observe(update, names="value")
    update()
    box = Explorer([*([ipywidgets.HBox(controls)] if row else controls), text, picture])
    box.page = partial(explorer_page, controls, show, width, panels)
    return box


def slider(
    description: str,
    options: Iterable[tuple[str, Any]],
    *,
    width: int = 560,
    description_width: str = "initial",
    **start,
) -> ipywidgets.SelectionSlider:
    """A slider over labels and their values; ``start`` is a ``value`` or an ``index``, by default the first."""
    return ipywidgets.SelectionSlider(
        options=list(options),
        description=description,
        style={"description_width": description_width},
        layout={"width": f"{width}px", "max_width": "98%"},
        **start,
    )


def dropdown(options: Iterable[tuple[str, Any]]) -> ipywidgets.Dropdown:
    """A list of clients to choose from."""
    return ipywidgets.Dropdown(options=list(options), layout={"width": "120px"})


def as_svg(figure: Figure) -> str:
    """A figure as SVG, to a hundredth of its unit; at 72 dpi a pixel is one unit."""
    with rc_context({"svg.hashsalt": "potara_lite"}):  # the same names in every picture
        figure.savefig(file := StringIO(), format="svg", metadata={"Date": None})
    return re.sub(r"\b([1-9]\d*\.\d\d)\d+", r"\1", file.getvalue())


def positions_in(panel: Axes, x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> list[Position]:
    """Where points lie in the SVG of the panel's figure, once ``as_svg`` has drawn it."""
    height = panel.figure.bbox.height
    return [(left, height - up) for left, up in panel.transData.transform(np.column_stack([x, y]))]


def add_to_svg(svg: str, shapes: Iterable[str]) -> str:
    """The picture with more shapes on top."""
    return svg.replace("</svg>", "".join(shapes) + "</svg>")


def ring(position: Position, stroke: str = "#d00000", radius: int = 8) -> str:
    """A ring around a point."""
    left, down = position
    return f'<circle cx="{left:.1f}" cy="{down:.1f}" r="{radius}" fill="none" stroke="{stroke}" stroke-width="2"/>'


def covers(panel: Axes, x: np.ndarray) -> list[str]:
    """What hides the panel until its slider has been there: a strip around each of the ascending ``x``."""
    box, height = panel.bbox, panel.figure.bbox.height
    across = [left for left, _ in positions_in(panel, x, np.full_like(x, panel.get_ylim()[0]))]
    edges = [box.x0 + 1, *((one + other) / 2 for one, other in zip(across, across[1:])), box.x1]
    return [
        f'<rect data-at="{i}" x="{left:.1f}" y="{height - box.y1:.1f}" width="{right - left + 1:.1f}" '
        f'height="{box.height - 1:.1f}" fill="#eeeeee" shape-rendering="crispEdges"/>'
        for i, (left, right) in enumerate(zip(edges, edges[1:]))
    ]


@checked
def weight_slider(
    weights: Annotated[Tensor, Numbers("W", least=0, most=1)],
    loss: Curves,
    accuracy: Curves,
    chosen: Mapping[str, Clients] | None = None,
) -> ipywidgets.VBox:
    """Choose a client and a mixing weight; a point moves along its curves and a line of text says where it is.

    ``weights`` ``(W,)``, ``loss`` (nats) and ``accuracy`` (fractions) ``(C, W)``, as ``along_segment`` returns them;
    the ``chosen`` weights ``{method: (C,)}`` are marked. Curves and marks appear where the slider has been. A client's
    picture is drawn once; dragging only moves the point in it. The children of the box are the client, the slider, the
    text and the picture.

    Raises ``ValueError`` when the shapes do not fit.

    >>> weights, curve = Tensor([0, 0.5, 1]), Tensor([[3, 1, 2]])
    >>> client, weight, text, picture = weight_slider(weights, curve, 1 / curve).children
    >>> weight.index = 2
    >>> text.value
    'client 0, λ = 1.00: loss 2.000 nats (1.000 above its lowest), accuracy 0.500'
    """
    x, losses, accuracies = (np.asarray(tensor.cpu(), dtype=float) for tensor in (weights, loss, accuracy))
    client = dropdown((f"client {i}", i) for i in range(len(losses)))
    weight = slider("local ← λ → federated", [(f"{w:.2f}", i) for i, w in enumerate(x)], index=len(x) // 2)

    @cache
    def drawn(i: int) -> tuple[str, list[Curve]]:
        marked = {name: float(marks[i]) for name, marks in (chosen or {}).items()}
        return _draw(x, {"test loss (nats)": losses[i], "test accuracy": accuracies[i]}, marked)

    def show(i: int, at: int) -> tuple[str, str]:
        svg, curves = drawn(i)
        text = (
            f"client {i}, λ = {x[at]:.2f}: loss {losses[i, at]:.3f} nats "
            f"({losses[i, at] - losses[i].min():.3f} above its lowest), accuracy {accuracies[i, at]:.3f}"
        )
        return text, add_to_svg(svg, [ring(curve[at]) for curve in curves])

    return explorer([client, weight], show, panels=2)


def _draw(x: np.ndarray, curves: Mapping[str, np.ndarray], marked: Mapping[str, float]) -> tuple[str, list[Curve]]:
    """The curves of one client side by side as SVG, and where in it every point of each curve lies."""
    figure = Figure(figsize=(8, 3), layout="constrained", dpi=72)
    panels = figure.subplots(1, len(curves))
    for panel, (label, y) in zip(panels, curves.items()):
        panel.plot(x, y, color="#444444", linewidth=1.5)
        for method, weight in marked.items():
            height = np.interp(weight, x, y)
            panel.plot(weight, height, marker(method), color=colour(method), label=method, markersize=7)
        panel.set(xlabel="mixing weight λ (0 = local, 1 = federated)", ylabel=label)
        panel.margins(0.07)
        panel.spines[["top", "right"]].set_visible(False)
    if marked:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", fontsize=9, ncols=len(marked))
    svg = as_svg(figure)
    hidden = [cover for panel in panels for cover in covers(panel, x)]
    return add_to_svg(svg, hidden), [positions_in(panel, x, y) for panel, y in zip(panels, curves.values())]
