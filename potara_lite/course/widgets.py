"""Thin ipywidgets around precomputed results: nothing is trained or evaluated while you drag."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ..adapters.state import curves_over, door, numbers, one_for_each, shaped_like
from ..checks import named
from ..plots import colour

RING = '<circle cx="{:.1f}" cy="{:.1f}" r="8" fill="none" stroke="#d00000" stroke-width="2"/>'


@door(
    weights=numbers(1, least=0, most=1),
    loss=curves_over("weights"),
    accuracy=shaped_like("loss", 2),
    chosen=named(one_for_each("loss"), least=0),
)
def weight_slider(
    weights: Tensor, loss: Tensor, accuracy: Tensor, chosen: Mapping[str, Tensor] | None = None
) -> ipywidgets.VBox:
    """Choose a client and a mixing weight; a point moves along its curves and a line of text says where it stands.

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
    chosen = chosen or {}
    x, loss, accuracy = (np.asarray(t.cpu(), dtype=float) for t in (weights, loss, accuracy))
    client = ipywidgets.Dropdown(options=[(f"client {i}", i) for i in range(len(loss))], layout={"width": "120px"})
    slider = ipywidgets.SelectionSlider(
        options=[(f"{w:.2f}", i) for i, w in enumerate(x)],
        index=len(x) // 2,
        description="local ← λ → federated",
        style={"description_width": "initial"},
        layout={"width": "560px", "max_width": "98%"},
    )
    text = ipywidgets.Label()
    picture = ipywidgets.Image(format="svg+xml", layout={"width": "760px", "max_width": "98%"})
    drawn: dict[int, tuple[str, list[list[tuple[float, float]]]]] = {}  # a picture per client, without the point

    def update(_=None) -> None:
        row, at = client.value, slider.value
        if row not in drawn:
            marked = {name: float(weight[row]) for name, weight in chosen.items()}
            drawn[row] = _draw(x, {"test loss (nats)": loss[row], "test accuracy": accuracy[row]}, marked)
        picture.value = with_rings(*drawn[row], at)
        above = loss[row, at] - loss[row].min()
        text.value = (
            f"client {row}, λ = {x[at]:.2f}: loss {loss[row, at]:.3f} nats ({above:.3f} above its lowest), "
            f"accuracy {accuracy[row, at]:.3f}"
        )

    for control in (client, slider):
        control.observe(update, names="value")
    update()
    return ipywidgets.VBox([client, slider, text, picture])


def _draw(
    x: np.ndarray, curves: Mapping[str, np.ndarray], marked: Mapping[str, float]
) -> tuple[str, list[list[tuple[float, float]]]]:
    """The curves of one client side by side as SVG, and where in it every point of each curve lies."""
    figure = Figure(figsize=(8, 3), layout="constrained", dpi=72)  # at 72 dpi a pixel is one unit of the SVG
    panels = figure.subplots(1, len(curves))
    for panel, (label, y) in zip(panels, curves.items()):
        panel.plot(x, y, color="#444444", linewidth=1.5)
        for method, at in marked.items():
            marker = "*" if method.startswith("oracle") else "o"
            panel.plot(at, np.interp(at, x, y), marker, color=colour(method), label=method, markersize=7)
        panel.set(xlabel="mixing weight λ (0 = local, 1 = federated)", ylabel=label)
        panel.margins(0.07)
        panel.spines[["top", "right"]].set_visible(False)
    if marked:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(marked))
    return as_svg(figure), [places_in(panel, x, y) for panel, y in zip(panels, curves.values())]


def as_svg(figure: Figure) -> str:
    """A figure as SVG; at 72 dpi a pixel is one unit of it."""
    figure.savefig(file := StringIO(), format="svg", metadata={"Date": None})
    return file.getvalue()


def places_in(panel, x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """Where in the SVG of its figure the points of a curve lie, once the figure was drawn."""
    height = panel.figure.bbox.height
    return [(left, height - up) for left, up in panel.transData.transform(np.column_stack([x, y]))]


def with_rings(svg: str, places: list[list[tuple[float, float]]], at: int) -> bytes:
    """A picture with a ring around point ``at`` of every curve."""
    rings = "".join(RING.format(*place[at]) for place in places)
    return svg.replace("</svg>", rings + "</svg>").encode()
