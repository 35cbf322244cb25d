"""Thin ipywidgets around precomputed results: nothing is trained or evaluated while you drag.

``weight_slider`` is the widget of several notebooks; the rest is what all explorers are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from io import StringIO
from typing import Annotated, Any

import ipywidgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..checks import Numbers, checked
from ..plots import Clients, Curves, colour, marker

Position = tuple[float, float]  # in an SVG: from the left, from the top
Curve = list[Position]


def explorer(
    controls: Sequence[ipywidgets.Widget],
    show: Callable[[], tuple[str, str | None]],
    *,
    text: ipywidgets.Widget | None = None,
    width: int = 760,
    row: bool = False,
) -> ipywidgets.VBox:
    """The controls, below each other or in one ``row``, then a line of text and a picture.

    Both are what ``show`` returns, now and when a control changes; instead of the SVG, ``None`` keeps the picture.
    """
    text = text or ipywidgets.Label()
    picture = ipywidgets.Image(format="svg+xml", layout={"width": f"{width}px", "max_width": "98%"})

    def update(_: Any = None) -> None:
        text.value, svg = show()
        if svg is not None:
            picture.value = svg.encode()

    for control in controls:
        control.observe(update, names="value")
    update()
    return ipywidgets.VBox([*([ipywidgets.HBox(controls)] if row else controls), text, picture])


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
    """A figure as SVG; at 72 dpi a pixel is one unit of it."""
    figure.savefig(file := StringIO(), format="svg", metadata={"Date": None})
    return file.getvalue()


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


@checked
def weight_slider(
    weights: Annotated[Tensor, Numbers("W", least=0, most=1)],
    loss: Curves,
    accuracy: Curves,
    chosen: Mapping[str, Clients] | None = None,
) -> ipywidgets.VBox:
    """Choose a client and a mixing weight; a point moves along its curves and a line of text says where it is.

    ``weights`` ``(W,)``, ``loss`` (nats) and ``accuracy`` (fractions) ``(C, W)``, as ``along_segment`` returns them;
    the ``chosen`` weights ``{method: (C,)}`` are marked. A client's picture is drawn once; dragging only moves the
    point in it. The children of the box are the client, the slider, the text and the picture.

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

    def show() -> tuple[str, str]:
        i, at = client.value, weight.value
        svg, curves = drawn(i)
        text = (
            f"client {i}, λ = {x[at]:.2f}: loss {losses[i, at]:.3f} nats "
            f"({losses[i, at] - losses[i].min():.3f} above its lowest), accuracy {accuracies[i, at]:.3f}"
        )
        return text, add_to_svg(svg, [ring(curve[at]) for curve in curves])

    return explorer([client, weight], show)


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
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(marked))
    return as_svg(figure), [positions_in(panel, x, y) for panel, y in zip(panels, curves.values())]
