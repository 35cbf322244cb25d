"""Three sliders for the moments, the parabola of the bound they make, and where its minimum leaves [0, 1]."""

from __future__ import annotations

import ipywidgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..checks import Finite, checked
from ..estimators.moments import Moments
from ..plots import COLOURS
from .widgets import add_to_svg, as_svg, explorer, positions_in, ring, slider

TOP = 3.0  # the highest bound in the picture
SIZES = [0.1 * k for k in range(1, 21)]  # what a and b may be
CORRELATIONS = [0.05 * k for k in range(-10, 20)]  # what ρ = c / sqrt(a b) may be: below 1, so that a + b > 2c
RED = "#d00000"


@checked
def bound_explorer(a: Finite = 1.0, b: Finite = 0.6, rho: Finite = 0.2) -> ipywidgets.VBox:
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
    figure = _axes()
    svg = as_svg(figure)

    def show(a: float, b: float, rho: float) -> tuple[str, str]:
        c = rho * (a * b) ** 0.5
        free, moments = (b - c) / (a + b - 2 * c), Moments(a, b, c)
        weight, bound = float(moments.weight), float(moments.optimum)
        if c > min(a, b) + 1e-9:
            text = f"outside [0, 1]; the best inside is {weight:.0f}, the better model alone: {bound:.2f}"
        else:
            text = f"bound {bound:.2f}; the better model alone has {min(a, b):.2f}"
        return f"c = {c:.2f}: λ* = {free:.2f}, {text}", add_to_svg(svg, _shapes(a, b, c, free, weight, *figure.axes))

    return explorer(sliders, show, panels=2)


def _slider(description: str, values: list[float], start: float) -> ipywidgets.SelectionSlider:
    nearest = min(values, key=lambda value: abs(value - start))
    if abs(nearest - start) > 1e-9:
        raise ValueError(f"{description} must be one of {values[0]:.2f}, {values[1]:.2f} … {values[-1]:.2f}: {start}")
    options = [(f"{value:.2f}", value) for value in values]
    return slider(description, options, width=520, description_width="110px", value=nearest)


def _shapes(a: float, b: float, c: float, free: float, weight: float, left: Axes, right: Axes) -> list[str]:
    """What one state adds to the axes: left the parabola and its minimum, right the moments on the map."""

    def bound(w):
        return w**2 * a + (1 - w) ** 2 * b + 2 * w * (1 - w) * c

    x = np.linspace(-0.5, 1.5, 201)
    start, end = x[bound(x) <= TOP][[0, -1]]  # a parabola that opens upwards stays below a height on one interval
    tangents_meet = start * end * a + (1 - start) * (1 - end) * b + (start + end - 2 * start * end) * c
    points = positions_in(left, [start, (start + end) / 2, end], [bound(start), tangents_meet, bound(end)])
    curve = "M{:.1f} {:.1f}Q{:.1f} {:.1f} {:.1f} {:.1f}".format(*(number for point in points for number in point))
    is_outside = c > min(a, b) + 1e-9
    stroke = RED if is_outside else COLOURS["predicted"]
    shapes = [f'<path d="{curve}" fill="none" stroke="#444444" stroke-width="2"/>']
    for (across, down), model in zip(positions_in(left, [1, 0], [a, b]), ("federated", "local")):
        shapes.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="5" fill="{COLOURS[model]}"/>')
    if -0.5 <= free <= 1.5:
        shapes.append(ring(positions_in(left, [free], [bound(free)])[0], stroke, radius=6))
    if is_outside:
        across, down = positions_in(left, [weight], [bound(weight)])[0]
        corner = f'x="{across - 8:.1f}" y="{down - 8:.1f}"'
        shapes.append(f'<rect {corner} width="16" height="16" fill="none" stroke="{RED}"/>')
    shapes.append(ring(positions_in(right, [np.log2(b / a)], [c / (a * b) ** 0.5])[0], stroke, radius=6))
    return shapes


def _axes() -> Figure:
    """The empty picture: the bound along λ, and the map of all moments."""
    figure = Figure(figsize=(8, 3), layout="constrained", dpi=72)
    left, right = figure.subplots(1, 2)
    for strip in ((-0.5, 0), (1, 1.5)):
        left.axvspan(*strip, color=RED, alpha=0.1, linewidth=0)
    left.set(
        xlim=(-0.5, 1.5),
        ylim=(0, TOP),
        xlabel="mixing weight λ (0 = local, 1 = federated)",
        ylabel="E‖error‖² (bound × 2 / β)",
    )
    x = np.linspace(-4.5, 4.5, 61)
    right.fill_between(x, 2 ** (-np.abs(x) / 2), 1, color=RED, alpha=0.15, linewidth=0)
    right.set(xlim=(-4.5, 4.5), ylim=(-0.6, 1), ylabel="correlation ρ of the errors", xlabel="b / a")
    right.set_xticks([-4, -2, 0, 2, 4], ["1/16", "1/4", "1", "4", "16"])
    for across, name in ((-2.4, "λ* < 0"), (2.4, "λ* > 1")):
        right.text(across, 0.85, name, ha="center", va="center", color="#a00000")
    right.text(0, -0.3, "0 ≤ λ* ≤ 1: the merge is below both", ha="center", va="center", color="#444444")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    return figure
