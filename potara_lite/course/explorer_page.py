"""An explorer without a kernel: all its states are in one piece of HTML, and plain JavaScript shows them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from itertools import product
from math import prod
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import ipywidgets

MOST_STATES = 500
COVER = re.compile(r'<rect data-at="(\d+)"[^>]*>')  # it hides a part of a picture until the position is visited
TEMPLATE = Path(__file__).with_name("explorer.html")


def uncover(svg: str, first: float, last: float) -> str:
    """The picture without the covers of the positions from ``first`` to ``last``.

    >>> uncover('<rect data-at="0"/><rect data-at="1"/><rect data-at="2"/>', 1, 2)
    '<rect data-at="0"/>'
    """
    return COVER.sub(lambda cover: "" if first <= int(cover[1]) <= last else cover[0], svg)


def explorer_page(
    controls: Sequence[ipywidgets.Widget],
    show: Callable[..., tuple[str, str | None]],
    width: int = 760,
    panels: Literal[1, 2] = 1,
) -> str:
    """HTML and JavaScript that do what the widgets do: every state of the controls is computed here.

    Where there are more than ``MOST_STATES``, every second position of the longest control is left out, and so on. A
    picture is a list of runs of ``pieces``, which begins like the picture before it: what pictures share is there once.
    Where JavaScript may not run, the text and the whole picture of the start are shown. On a narrow screen the halves
    of a picture of two ``panels`` stand below each other.
    """
    options = [_options(control) for control in controls]
    positions = [range(len(some)) for some in options]
    starts = [int(control.value) if _is_button(control) else control.index for control in controls]
    while prod(map(len, positions)) > MOST_STATES:
        longest = max(range(len(positions)), key=lambda k: len(positions[k]))
        positions[longest] = positions[longest][starts[longest] % 2 :: 2]
        starts[longest] //= 2

    pieces: dict[tuple[str, int], int] = {}
    texts, pictures, before = [], [], []
    for chosen in product(*positions):
        text, svg = show(*(some[k][1] for some, k in zip(options, chosen)))
        runs = _runs(svg or "", pieces)
        shared = len(commonprefix([before, runs]))
        texts.append(text)
        pictures.append([shared, *runs[shared:]])
        before = runs
    data = {
        "controls": [
            {
                "kind": _kind(control),
                "name": control.description or "choose",
                "labels": [some[k][0] for k in kept],
                "positions": list(kept),
                "start": start,
            }
            for control, some, kept, start in zip(controls, options, positions, starts)
        ],
        "texts": texts,
        "pictures": pictures,
        "pieces": [piece for piece, _ in pieces],
        "panels": panels,
    }
    text, svg = show(*(control.value for control in controls))
    picture = quote(uncover(_short(svg or ""), 0, float("inf")), safe=" !$'()*+,/:;<=>?@[]")
    fill = {
        "WIDTH": str(width),
        "TEXT": escape(text),
        "PICTURE": f"data:image/svg+xml,{picture}",
        "DATA": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/"),
    }
    return re.sub("|".join(fill), lambda name: fill[name[0]], TEMPLATE.read_text(encoding="utf-8"))


def _is_button(control: ipywidgets.Widget) -> bool:
    return isinstance(control, ipywidgets.ToggleButton)


def _kind(control: ipywidgets.Widget) -> str:
    return "button" if _is_button(control) else "select" if isinstance(control, ipywidgets.Dropdown) else "slider"


def _options(control: ipywidgets.Widget) -> Sequence[tuple[str, Any]]:
    """The labels and the values of a control."""
    return [("off", False), ("on", True)] if _is_button(control) else control.options


def _short(svg: str) -> str:
    return re.sub(r"(\s|<!--.*?-->|<metadata>.*?</metadata>)+", " ", svg, flags=re.S)


def _runs(svg: str, pieces: dict[tuple[str, int], int]) -> list[list[int]]:
    """The picture as runs, from a number to before another, of ``pieces``, which takes those that it lacks."""
    runs: list[list[int]] = []
    seen: Counter[str] = Counter()
    for piece in re.findall(r"[^>]*>(?: ?</[^>]*>)*", _short(svg)):
        seen[piece] += 1
        number = pieces.setdefault((piece, seen[piece]), len(pieces))
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return runs
