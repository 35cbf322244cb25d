"""Widgets of single notebooks, like ``weight_slider``: pictures of precomputed results, nothing is trained or evaluated
while you drag."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Annotated

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ..checks import List, Numbers, PositiveOrInf, checked
from ..federation.split import Split
from ..plots import check_names, colour, label_counts
from .widgets import Curve, add_to_svg, as_svg, covers, dropdown, explorer, positions_in, ring, slider

Degrees = Annotated[Tensor, Numbers("T")]
Turned = Annotated[Tensor, Numbers("C T")]  # of each client at each angle
Clients = Annotated[Tensor, Numbers("C")]


@checked
def heterogeneity_explorer(alphas: List[PositiveOrInf], splits: List[Split], names: List[str]) -> ipywidgets.VBox:
    """Choose a Dirichlet concentration; see how many examples of each kind the clients have, and how skewed that is.

    ``splits``: one per concentration of ``alphas``; ``names``: of the kinds. Each picture is drawn once, when it is
    first asked for. The children of the box are the slider, the text and the picture.

    Raises ``ValueError`` unless there is one split for each concentration.
    """
    if len(alphas) != len(splits):
        raise ValueError(f"alphas: {len(alphas)} concentrations, but {len(splits)} splits")
    check_names(names, splits)
    shown = [("∞" if np.isinf(alpha) else f"{alpha:g}", i) for i, alpha in enumerate(alphas)]
    alpha = slider("few kinds each ← α → all kinds alike", shown, index=len(alphas) // 2)

    @cache
    def drawn(i: int) -> str:
        figure = label_counts(splits[i], names)
        figure.set(figwidth=6, dpi=72)
        return as_svg(figure)

    def show(i: int) -> tuple[str, str]:
        split = splits[i]
        labels = [split.client(i)[1].cpu().numpy() for i in range(len(split))]
        counts = np.stack([np.bincount(y, minlength=len(names)) for y in labels])
        commonest = (counts.max(1) / counts.sum(1)).mean()
        together = counts.sum(0).max() / counts.sum()
        text = (
            f"α = {shown[i][0]}: a client has {(counts > 0).sum(1).mean():.1f} of {len(names)} kinds, its "
            f"commonest is {commonest:.0%} of its images (of all clients' images together: {together:.0%})"
        )
        return text, drawn(i)

    return explorer([alpha], show, width=600)


@checked
def basis_explorer(
    degrees: Degrees, loss: Turned, accuracy: Turned, level_loss: Clients, level_accuracy: Clients
) -> ipywidgets.VBox:
    """Turn the basis of one model's factors; see what that does to the merge by factors, and not to that by deltas.

    ``degrees`` ``(T,)``; ``loss`` (nats) and ``accuracy`` (fractions) ``(C, T)`` of the merge by factors; the levels
    ``(C,)`` of the merge by deltas, which is the same at every angle. The clients' mean is shown first. A picture is
    drawn once; dragging only moves the ring, and the curves appear where it has been. The children of the box are the
    client, the slider, the text and the picture.

    Raises ``ValueError`` when the shapes do not fit.

    >>> curve, level = Tensor([[1, 2, 4], [1, 4, 6]]), Tensor([1, 1])
    >>> client, angle, text, picture = basis_explorer(Tensor([0, 90, 180]), curve, 1 / curve, level, level).children
    >>> angle.index = 2
    >>> text.value
    'all clients, turned by 180°: by factors loss 5.000 nats, accuracy 0.208; by deltas 1.000 and 1.000'
    """
    x = np.asarray(degrees.cpu(), dtype=float)
    losses, accuracies, loss_levels, accuracy_levels = (
        _mean_first(tensor) for tensor in (loss, accuracy, level_loss, level_accuracy)
    )
    client = dropdown([("all clients", 0), *((f"client {i}", i + 1) for i in range(len(loss)))])
    angle = slider("turn the basis by", [(f"{turn:.0f}°", i) for i, turn in enumerate(x)])

    @cache
    def drawn(i: int) -> tuple[str, list[Curve]]:
        return _turning(x, (losses[i], accuracies[i]), (loss_levels[i], accuracy_levels[i]))

    def show(i: int, at: int) -> tuple[str, str]:
        svg, curves = drawn(i)
        text = (
            f"{client.options[i][0]}, turned by {x[at]:.0f}°: by factors loss {losses[i, at]:.3f} nats, accuracy "
            f"{accuracies[i, at]:.3f}; by deltas {loss_levels[i]:.3f} and {accuracy_levels[i]:.3f}"
        )
        return text, add_to_svg(svg, [ring(curve[at]) for curve in curves])

    return explorer([client, angle], show, panels=2)


def _mean_first(values: Tensor) -> np.ndarray:
    """The clients' values ``(C, ...)`` after their mean."""
    found = np.asarray(values.cpu(), dtype=float)
    return np.concatenate([found.mean(0, keepdims=True), found])


def _turning(x: np.ndarray, curves: Sequence[np.ndarray], levels: Sequence[float]) -> tuple[str, list[Curve]]:
    """Loss and accuracy against the angle as SVG, and where in it every point of each curve lies."""
    figure = Figure(figsize=(8, 3), layout="constrained", dpi=72)
    panels = figure.subplots(1, 2)
    for panel, label, y, level in zip(panels, ("test loss (nats)", "test accuracy"), curves, levels):
        panel.plot(x, y, color=colour("federated"), label="merged by factors")
        panel.axhline(level, color=colour("oracle"), linestyle="--", label="merged by deltas")
        panel.set(xlabel="angle by which the basis is turned (degrees)", ylabel=label, xticks=range(0, 181, 45))
        panel.margins(0.07)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", fontsize=9, ncols=2)
    svg = as_svg(figure)
    hidden = [cover for panel in panels for cover in covers(panel, x)]
    return add_to_svg(svg, hidden), [positions_in(panel, x, y) for panel, y in zip(panels, curves)]
