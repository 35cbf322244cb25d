"""Three sliders for the moments, the parabola of the bound they make, and where its minimum leaves [0, 1]."""

from __future__ import annotations

from io import StringIO

import ipywidgets
import numpy as np
from matplotlib.figure import Figure

from ..checks import door, finite
from ..estimators.moments import Moments
from ..plots import COLOURS

TOP = 3.0  # the highest bound in the picture
SIZES = [0.1 * k for k in range(1, 21)]  # what a and b may be
CORRELATIONS = [0.05 * k for k in range(-10, 20)]  # what ρ = c / sqrt(a b) may be: below 1, so that a + b > 2c
RING = '<circle cx="{:.1f}" cy="{:.1f}" r="6" fill="none" stroke="{}" stroke-width="2"/>'
SQUARE = '<rect x="{:.1f}" y="{:.1f}" width="16" height="16" fill="none" stroke="#d00000"/>'


@door(a=finite, b=finite, rho=finite)
def bound_explorer(a: float = 1.0, b: float = 0.6, rho: float = 0.2) -> ipywidgets.VBox:
    """Choose ``a``, ``b`` and the correlation ``ρ = c / sqrt(a b)`` of the errors; see λ* and the bound.

    Left the bound along λ: the ring is its minimum, which turns red where λ* leaves [0, 1] (the shaded strips), and
    the square is then the best weight inside. Right all moments at once: ``b / a`` against ρ, shaded red where ``c``
    exceeds the smaller of ``a`` and ``b``, which is where λ* leaves [0, 1]. The axes are drawn once; a state adds a few
    lines of SVG. The children of the box are the three sliders, the text and the picture.

    Raises ``ValueError`` for a start that no slider has.

    >>> *sliders, text, picture = bound_explorer(a=1.0, b=1.0, rho=0.0).children
    >>> text.value
    'c = 0.00: λ* = 0.50, bound 0.50; the better model alone has 1.00'
    """
    sliders = [
        _slider("a (federated)", SIZES, a),
        _slider("b (local)", SIZES, b),
        _slider("ρ (correlation)", CORRELATIONS, rho),
    ]
    text = ipywidgets.Label()
    picture = ipywidgets.Image(format="svg+xml", layout={"width": "760px", "max_width": "98%"})
    axes, on_curve, on_map = _axes()

    def update(_=None) -> None:
        a, b, rho = (slider.value for slider in sliders)
        c = rho * (a * b) ** 0.5
        free, moments = (b - c) / (a + b - 2 * c), Moments(a, b, c)
        weight, bound = float(moments.weight), float(moments.optimum)
        text.value = f"c = {c:.2f}: λ* = {free:.2f}, "
        if c > min(a, b) + 1e-9:
            text.value += f"outside [0, 1]; the best inside is {weight:.0f}, the better model alone: {bound:.2f}"
        else:
            text.value += f"bound {bound:.2f}; the better model alone has {min(a, b):.2f}"
        picture.value = axes.replace("</svg>", _state(a, b, c, free, weight, on_curve, on_map) + "</svg>").encode()

    for slider in sliders:
        slider.observe(update, names="value")
    update()
    return ipywidgets.VBox([*sliders, text, picture])


def _slider(description: str, values: list[float], start: float) -> ipywidgets.SelectionSlider:
    near = min(values, key=lambda value: abs(value - start))
    if abs(near - start) > 1e-9:
        raise ValueError(f"{description} must be one of {values[0]:.2f}, {values[1]:.2f} … {values[-1]:.2f}: {start}")
    return ipywidgets.SelectionSlider(
        options=[(f"{value:.2f}", value) for value in values],
        value=near,
        description=description,
        style={"description_width": "110px"},
        layout={"width": "520px", "max_width": "98%"},
    )


def _state(a: float, b: float, c: float, free: float, weight: float, on_curve, on_map) -> str:
    """What one state adds to the axes: the parabola, its minimum, and the place of the moments on the map."""

    def bound(w):
        return w**2 * a + (1 - w) ** 2 * b + 2 * w * (1 - w) * c

    x = np.linspace(-0.5, 1.5, 201)
    x = x[bound(x) <= TOP]  # a parabola that opens upwards stays below a height on one interval
    points = " ".join(f"{left:.1f},{down:.1f}" for left, down in on_curve(x, bound(x)))
    outside = c > min(a, b) + 1e-9
    colour = "#d00000" if outside else COLOURS["predicted"]
    parts = [f'<polyline points="{points}" fill="none" stroke="#444444" stroke-width="2"/>']
    for end, value, model in ((1, a, "federated"), (0, b, "local")):
        left, down = on_curve([end], [value])[0]
        parts.append(f'<circle cx="{left:.1f}" cy="{down:.1f}" r="5" fill="{COLOURS[model]}"/>')
    if -0.5 <= free <= 1.5:
        parts.append(RING.format(*on_curve([free], [bound(free)])[0], colour))
    if outside:
        left, down = on_curve([weight], [bound(weight)])[0]
        parts.append(SQUARE.format(left - 8, down - 8))
    parts.append(RING.format(*on_map([np.log2(b / a)], [c / (a * b) ** 0.5])[0], colour))
    return "".join(parts)


def _axes():
    """The empty picture as SVG, and for each panel what turns data into places in it."""
    figure = Figure(figsize=(8, 3.1), layout="constrained", dpi=72)  # at 72 dpi a pixel is one unit of the SVG
    left, right = figure.subplots(1, 2)
    for strip in ((-0.5, 0), (1, 1.5)):
        left.axvspan(*strip, color="#d00000", alpha=0.1, linewidth=0)
    left.set(
        xlim=(-0.5, 1.5),
        ylim=(0, TOP),
        xlabel="mixing weight λ (0 = local, 1 = federated)",
        ylabel="E‖error‖² (bound × 2 / β)",
    )
    x = np.linspace(-4.5, 4.5, 301)
    right.fill_between(x, 2 ** (-np.abs(x) / 2), 1, color="#d00000", alpha=0.15, linewidth=0)
    right.set(xlim=(-4.5, 4.5), ylim=(-0.6, 1), ylabel="correlation ρ of the errors", xlabel="b / a")
    right.set_xticks([-4, -2, 0, 2, 4], ["1/16", "1/4", "1", "4", "16"])
    for place, name in ((-2.4, "λ* < 0"), (2.4, "λ* > 1")):
        right.text(place, 0.85, name, ha="center", va="center", color="#a00000")
    right.text(0, -0.3, "0 ≤ λ* ≤ 1: the merge is below both", ha="center", va="center", color="#444444")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file := StringIO(), format="svg", metadata={"Date": None})
    height = figure.bbox.height

    def places(panel):
        def of(x, y):
            across, up = panel.transData.transform(np.column_stack([x, y])).T
            return np.column_stack([across, height - up])

        return of

    return file.getvalue(), places(left), places(right)
