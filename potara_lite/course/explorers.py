"""Widgets of single notebooks, in the manner of ``weight_slider``: pictures of precomputed results, nothing is trained
or evaluated while you drag."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ..adapters.state import curves_over, door, numbers, one_for_each, shaped_like
from ..checks import kind, positive_or_infinite, several
from ..federation.split import Split
from ..plots import colour, label_counts, names_of_labels
from .widgets import as_svg, places_in, with_rings


@door(alphas=several(positive_or_infinite), splits=several(kind("Split")), names=names_of_labels)
def heterogeneity_explorer(alphas: Sequence[float], splits: Sequence[Split], names: Sequence[str]) -> ipywidgets.VBox:
    """Choose a Dirichlet concentration; see how many examples of each kind the clients have, and how skewed that is.

    ``splits``: one per concentration of ``alphas``; ``names``: of the kinds. Each picture is drawn once, when it is
    first asked for. The children of the box are the slider, the text and the picture.

    Raises ``ValueError`` unless there is one split for each concentration.
    """
    if len(alphas) != len(splits):
        raise ValueError(f"alphas: {len(alphas)} concentrations, but {len(splits)} splits")
    slider = ipywidgets.SelectionSlider(
        options=[(_number(alpha), i) for i, alpha in enumerate(alphas)],
        index=len(alphas) // 2,
        description="few kinds each ← α → all kinds alike",
        style={"description_width": "initial"},
        layout={"width": "560px", "max_width": "98%"},
    )
    text, drawn = ipywidgets.Label(), {}
    picture = ipywidgets.Image(format="svg+xml", layout={"width": "760px", "max_width": "98%"})

    def update(_=None) -> None:
        at = slider.value
        if at not in drawn:
            drawn[at] = as_svg(label_counts(splits[at], names)).encode()
        picture.value = drawn[at]
        labels = [splits[at].client(i)[1].cpu().numpy() for i in range(len(splits[at]))]
        counts = np.stack([np.bincount(y, minlength=len(names)) for y in labels])
        commonest = (counts.max(1) / counts.sum(1)).mean()
        together = counts.sum(0).max() / counts.sum()
        text.value = (
            f"α = {_number(alphas[at])}: a client has {(counts > 0).sum(1).mean():.1f} of {len(names)} kinds, its "
            f"commonest is {commonest:.0%} of its images (of all clients' images together: {together:.0%})"
        )

    slider.observe(update, names="value")
    update()
    return ipywidgets.VBox([slider, text, picture])


@door(
    degrees=numbers(1),
    loss=curves_over("degrees"),
    accuracy=shaped_like("loss", 2),
    level_loss=one_for_each("loss"),
    level_accuracy=one_for_each("loss"),
)
def basis_explorer(
    degrees: Tensor, loss: Tensor, accuracy: Tensor, level_loss: Tensor, level_accuracy: Tensor
) -> ipywidgets.VBox:
    """Turn the basis of one model's factors; see what that does to the merge by factors, and not to that by deltas.

    ``degrees`` ``(T,)``; ``loss`` (nats) and ``accuracy`` (fractions) ``(C, T)`` of the merge by factors; the levels
    ``(C,)`` of the merge by deltas, which is the same at every angle. The clients' mean is shown first. A picture is
    drawn once; dragging only moves the ring. The children of the box are the client, the slider, the text and the
    picture.

    Raises ``ValueError`` when the shapes do not fit.

    >>> curve, level = Tensor([[1, 2, 4], [1, 4, 6]]), Tensor([1, 1])
    >>> client, angle, text, picture = basis_explorer(Tensor([0, 90, 180]), curve, 1 / curve, level, level).children
    >>> angle.index = 2
    >>> text.value
    'all clients, turned by 180°: by factors loss 5.000 nats, accuracy 0.208; by deltas 1.000 and 1.000'
    """
    x, *curves = (np.asarray(t.cpu(), dtype=float) for t in (degrees, loss, accuracy))
    levels = [np.asarray(t.cpu(), dtype=float) for t in (level_loss, level_accuracy)]
    curves = [np.vstack([c.mean(0), c]) for c in curves]
    levels = [np.append(v.mean(), v) for v in levels]
    client = ipywidgets.Dropdown(
        options=[("all clients", 0), *((f"client {i}", i + 1) for i in range(len(curves[0]) - 1))],
        layout={"width": "120px"},
    )
    slider = ipywidgets.SelectionSlider(
        options=[(f"{angle:.0f}°", i) for i, angle in enumerate(x)],
        description="turn the basis by",
        style={"description_width": "initial"},
        layout={"width": "560px", "max_width": "98%"},
    )
    text, drawn = ipywidgets.Label(), {}
    picture = ipywidgets.Image(format="svg+xml", layout={"width": "760px", "max_width": "98%"})

    def update(_=None) -> None:
        row, at = client.value, slider.value
        if row not in drawn:
            drawn[row] = _turning(x, [c[row] for c in curves], [v[row] for v in levels])
        picture.value = with_rings(*drawn[row], at)
        text.value = (
            f"{client.label}, turned by {x[at]:.0f}°: by factors loss {curves[0][row, at]:.3f} nats, accuracy "
            f"{curves[1][row, at]:.3f}; by deltas {levels[0][row]:.3f} and {levels[1][row]:.3f}"
        )

    for control in (client, slider):
        control.observe(update, names="value")
    update()
    return ipywidgets.VBox([client, slider, text, picture])


def _turning(
    x: np.ndarray, curves: Sequence[np.ndarray], levels: Sequence[float]
) -> tuple[str, list[list[tuple[float, float]]]]:
    """Loss and accuracy against the angle as SVG, and where in it every point of each curve lies."""
    figure = Figure(figsize=(8, 3), layout="constrained", dpi=72)  # at 72 dpi a pixel is one unit of the SVG
    panels = figure.subplots(1, 2)
    for panel, label, y, level in zip(panels, ("test loss (nats)", "test accuracy"), curves, levels):
        panel.plot(x, y, color=colour("federated"), label="merged by factors")
        panel.axhline(level, color=colour("oracle"), linestyle="--", label="merged by deltas")
        panel.set(xlabel="angle by which the basis is turned (degrees)", ylabel=label, xticks=range(0, 181, 45))
        panel.margins(0.07)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return as_svg(figure), [places_in(panel, x, y) for panel, y in zip(panels, curves)]


def _number(alpha: float) -> str:
    return "∞" if np.isinf(alpha) else f"{alpha:g}"
