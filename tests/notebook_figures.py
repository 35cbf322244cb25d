"""What a matplotlib figure draws, as text: its words and the numbers of its artists, not their style.

A kernel that starts with ``PYTHONSTARTUP=…/tests/notebook_startup.py`` gives it as a figure's ``text/plain``. Readers
see the picture; the committed notebook has both, and the text is compared as any other (``notebook_outputs.py``).
"""

import math

import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.contour import ContourSet
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import FixedFormatter, FuncFormatter


def drawn(figure):
    """A line of words for the figure and for each panel, and a line of numbers for each of its artists."""
    panels = [panel for panel in figure.axes if panel.get_visible()]
    lines = [f"Figure, panels {len(panels)}: {words(figure.texts, *figure.legends)}"]
    for panel in panels:
        lines += panel_lines(panel)
    return "\n".join(line.rstrip(" :") for line in lines)


def words(texts, *legends):
    found = [*texts, *(text for legend in legends for text in legend.get_texts())]
    return " | ".join(" ".join(text.get_text().split()) for text in found if text.get_text())


def panel_lines(panel):
    titles = [panel.title, panel._left_title, panel._right_title, panel.xaxis.label, panel.yaxis.label]
    names = [label for axis in (panel.xaxis, panel.yaxis) for label in tick_names(axis)]
    legends = [panel.legend_] if panel.legend_ else []
    is_scale = panel.get_label() == "<colorbar>"  # its colours are style
    artists = [] if is_scale else [*panel.lines, *panel.collections, *panel.images]
    found = [(type(artist).__name__, numbers(artist)) for artist in artists]
    found += [("Patches", {"x y": corners(panel.patches)})] if panel.patches and not is_scale else []
    shows = {"x": panel.get_xscale() == "log", "y": panel.get_yscale() == "log", "values": False}
    columns = [(kind, columns_of(arrays)) for kind, arrays in found]
    digits = {name: decimals([each[name] for _, each in columns if name in each]) for name in shows}
    lines = [f"panel: {words([*titles, *names, *panel.texts], *legends)}"]
    for kind, each in columns:
        said = (f"{name} {summary(values, digits[name], shows[name])}" for name, values in each.items())
        lines.append(f"  {kind}: {'; '.join(said)}")
    return lines


def tick_names(axis):
    """The labels that were given to its ticks; numbers that matplotlib chose are style."""
    given = isinstance(axis.get_major_formatter(), (FixedFormatter, FuncFormatter))
    return axis.get_ticklabels() if given else []


def numbers(artist):
    """The data of a line, a collection or an image: places ``(n, 2)``, and the values behind its colours."""
    found = {}
    if isinstance(artist, ContourSet):
        return {"values": np.array([artist.zmin, artist.zmax])}  # its lines have no fixed number of points
    if hasattr(artist, "get_xydata"):
        found["x y"] = artist.get_xydata()
    elif isinstance(artist, PathCollection):
        found["x y"] = artist.get_offsets()
    elif hasattr(artist, "get_paths"):
        found["x y"] = np.concatenate([np.empty((0, 2)), *(path.vertices for path in artist.get_paths())])
    if hasattr(artist, "get_array") and artist.get_array() is not None:
        found["values"] = artist.get_array()
    return found


def corners(patches):
    """Those of bars and other shapes, ``(n, 2)``; the ends of an arrow depend on its style."""
    shapes = [patch for patch in patches if not isinstance(patch, FancyArrowPatch)]
    return np.concatenate(
        [np.empty((0, 2)), *(patch.get_patch_transform().transform(patch.get_path().vertices) for patch in shapes)]
    )


def columns_of(arrays):
    found = {name: np.ma.filled(np.ma.asarray(values, dtype=float), np.nan) for name, values in arrays.items()}
    places = found.pop("x y", None)
    return ({} if places is None else {"x": places[:, 0], "y": places[:, 1]}) | found


def decimals(columns):
    """As many as show the largest number with three digits, and at least one."""
    largest = max((np.abs(column[np.isfinite(column)]).max(initial=0) for column in columns), default=0)
    return max(1, 2 - math.floor(math.log10(largest))) if largest else 1


def summary(values, digits, is_log):
    """How many there are and, of more than four, least, most and the means of the first and of the second half."""
    values = values.ravel()[np.isfinite(values.ravel())]
    halves = np.array_split(values, 2)
    shown = values if len(values) <= 4 else [values.min(), values.max(), *(half.mean() for half in halves)]
    return " ".join([f"({len(values)})", *(f"{value:.2e}" if is_log else f"{value:.{digits}f}" for value in shown)])


def register(shell):
    """Make the kernel show every figure as this text, too."""
    formatter = shell.display_formatter.mimebundle_formatter  # matplotlib's backend resets those of single types
    formatter.for_type_by_name("matplotlib.figure", "Figure", lambda figure, **_: {"text/plain": drawn(figure)})
