"""Choose seeds; see how the ranking of methods on them differs from their ranking on the other seeds."""

from __future__ import annotations

from html import escape
from typing import Annotated

import ipywidgets
import numpy as np
import pandas as pd
from pydantic import AfterValidator

from ..checks import Count, Numbers, checked, table
from ..plots import colour
from .widgets import explorer

WIDTH, LINE, TOP = 580, 26, 44  # of the picture: its width, and the height of a line and of the headings
LEFT, RIGHT = 200, 360  # where the lines between the two rankings begin and end


def _check_numbers(scores: pd.DataFrame) -> pd.DataFrame:
    Numbers("M S").check(scores.to_numpy())
    return scores


@checked
def seeds_explorer(
    scores: Annotated[pd.DataFrame, table(), AfterValidator(_check_numbers)], chosen: Count = 1
) -> ipywidgets.VBox:
    """Switch seeds on and off; methods are ranked by the chosen seeds at the left, by the others at the right.

    ``scores`` has a row per method and a column per seed: the clients' mean accuracy. The first ``chosen`` seeds are on
    at the start. A line that is not level is a method whose rank changes. Nothing is computed but means, so a switch
    answers at once. The children of the box are the row of switches, the text and the picture.

    Raises ``ValueError`` for fewer than two seeds, or a start that leaves no seed on one of the two sides.

    >>> scores = pd.DataFrame({0: [0.8, 0.7], 1: [0.6, 0.7], 2: [0.7, 0.9]}, index=["FedIT", "local"])
    >>> switches, text, picture = seeds_explorer(scores).children
    >>> text.value
    'best on seed 0: FedIT; best on seeds 1, 2: local; 2 of 2 methods change places'
    """
    if not 0 < chosen < scores.shape[1]:
        raise ValueError(f"chosen: {chosen} of {scores.shape[1]} seeds chosen: at least one on each side is needed")
    switches = [
        ipywidgets.ToggleButton(value=i < chosen, description=f"seed {seed}", layout={"width": "90px"})
        for i, seed in enumerate(scores)
    ]

    def show(*chosen: bool) -> tuple[str, str | None]:
        on = np.array(chosen)
        if on.all() or not on.any():
            return "leave at least one seed on and one off", None
        left, right = (_ranking(scores.loc[:, side]) for side in (on, ~on))
        names = [_seeds(scores.columns[side]) for side in (on, ~on)]
        moved = sum(one != other for one, other in zip(left.index, right.index))
        text = (
            f"best on {names[0]}: {left.index[0]}; best on {names[1]}: {right.index[0]}; "
            f"{moved} of {len(scores)} methods change places"
        )
        return text, _draw(left, right, names)

    return explorer(switches, show, width=WIDTH, row=True)


def _ranking(scores: pd.DataFrame) -> pd.Series:
    return scores.mean(axis=1).sort_values(ascending=False, kind="stable")


def _seeds(seeds: pd.Index) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _draw(left: pd.Series, right: pd.Series, names: list[str]) -> str:
    """Two rankings and a line for each method between its two ranks, as SVG."""
    height = TOP + LINE * len(left)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT - 12}" y="20" text-anchor="end" fill="#666666">mean accuracy, {names[0]}</text>',
        f'<text x="{RIGHT + 12}" y="20" fill="#666666">mean accuracy, {names[1]}</text>',
    ]
    for rank, (method, score) in enumerate(left.items()):
        start, end = (TOP + LINE * row for row in (rank, right.index.get_loc(method)))
        parts.append(
            f'<path d="M{LEFT} {start}L{RIGHT} {end}" stroke="{colour(method)}" stroke-width="3"/>'
            f'<text x="{LEFT - 12}" y="{start + 4}" text-anchor="end">{escape(method)}  {score:.3f}</text>'
            f'<text x="{RIGHT + 12}" y="{end + 4}">{right[method]:.3f}  {escape(method)}</text>'
        )
    return "".join(parts) + "</svg>"
