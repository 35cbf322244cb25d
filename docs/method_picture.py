"""The picture of the method, as SVG: whole, and with one part highlighted for each notebook.

    python docs/method_picture.py    # writes notebooks/images/method.svg and method-PART.svg

It lies beside the notebooks because JupyterLab, started there, shows no file from outside. It is 340 units wide, so
that its text (12 units at least) is 11 pixels high on a phone, and it has a background of its own, so that it can be
read on a light and on a dark page.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "notebooks" / "images"
PARTS = "round", "local", "merge", "weight", "bytes"
HOSPITALS = 8
WIDTH, HEIGHT = 340, 606

STYLE = """
svg { --card: #ffffff; --ink: #1f2328; --grey: #59636e; --line: #c4cbd2; --box: #f3f5f7;
      --F: #0072b2; --L: #b84a00; --W: #00745a; --on: #ffffff; }
@media (prefers-color-scheme: dark) {
  svg { --card: #1b2027; --ink: #eceff2; --grey: #a9b3bd; --line: #4d5761; --box: #262d36;
        --F: #6fc0f2; --L: #ff9d5c; --W: #4fd6ae; --on: #10151a; }
}
text { font: 12.5px system-ui, sans-serif; fill: var(--ink); }
.head { font-size: 15px; font-weight: 700; }
.name { font-size: 13px; font-weight: 700; }
.small { font-size: 12px; fill: var(--grey); }
.middle { text-anchor: middle; }
.end { text-anchor: end; }
.F { fill: var(--F); } .L { fill: var(--L); } .W { fill: var(--W); } .on { fill: var(--on); }
.card { fill: var(--card); stroke: var(--line); } .box { fill: var(--box); stroke: var(--line); }
.wall { fill: var(--card); stroke: var(--grey); stroke-width: 1.3; } .cross { stroke: var(--grey); stroke-width: 2; }
.photo { fill: var(--box); stroke: var(--grey); }
.line { fill: none; stroke: var(--grey); stroke-width: 1.5; } .thin { stroke: var(--F); stroke-width: 1; opacity: .55; }
.sF { stroke: var(--F); stroke-width: 2; } .sL { stroke: var(--L); stroke-width: 2; }
.zoom { stroke: var(--line); stroke-dasharray: 3 3; }
.halo { paint-order: stroke; stroke: var(--card); stroke-width: 6px; stroke-linejoin: round; }
.dim { opacity: .32; }
.frame { fill: none; stroke: var(--W); stroke-width: 2.5; }
"""

FRAMES = {  # of each part: left, top, width, height
    "round": (8, 50, 324, 186),
    "local": (18, 280, 304, 74),
    "merge": (18, 358, 304, 104),
    "weight": (18, 467, 304, 58),
    "bytes": (8, 534, 324, 64),
}


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "line", more: str = "") -> str:
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" {more}/>'


def arrow(x1: float, y1: float, x2: float, y2: float, which: str) -> str:
    """From the first point to the second; ``which`` names its colour."""
    return line(x1, y1, x2, y2, f"s{which}", f'marker-end="url(#tip{which})"')


def rectangle(x: float, y: float, width: float, height: float, kind: str, radius: float = 6) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'


def model(x: float, y: float, name: str) -> str:
    """A disc with the name of a model in it."""
    disc = f'<circle class="{name}" cx="{x:g}" cy="{y:g}" r="13"/>'
    return disc + text(x, y + 4.5, name, "name on middle")


def hospital(x: float, y: float) -> str:
    """A house with a cross; ``x`` is its middle, ``y`` its floor."""
    walls = f'<path class="wall" d="M{x - 13} {y}v-19l13 -10l13 10v19z"/>'
    return walls + line(x - 5, y - 12, x + 5, y - 12, "cross") + line(x, y - 17, x, y - 7, "cross")


def photos(x: float, y: float) -> str:
    """A pile of three pictures."""
    return "".join(rectangle(x + step, y - step, 26, 20, "photo", 2) for step in (8, 4, 0))


def draw_round() -> list[str]:
    middles = [26 + 41 * i for i in range(HOSPITALS)]
    fan = [line(170, 112, x, 168, "thin") for x in middles]
    server = [rectangle(102, 78, 136, 34, "box"), text(170, 91, "server", "small middle")]
    return [
        text(16, 69, "1 · Rounds: one model F for all", "name F"),
        *fan,
        *server,
        text(170, 106, "d · average", "middle"),
        arrow(92, 106, 50, 150, "F"),
        text(14, 104, "a · F down", "F"),
        arrow(290, 150, 248, 106, "F"),
        text(326, 104, "c · F up", "F end"),
        *[hospital(x, 204) for x in middles],
        text(170, 226, "b · each trains F on its own pictures", "middle halo"),
    ]


def draw_local() -> list[str]:
    return [
        text(26, 298, "2 · A model L of its own, trained alone", "name L"),
        photos(30, 320),
        text(72, 331, "pictures", "small"),
        arrow(124, 326, 160, 326, "L"),
        model(178, 326, "L"),
        model(238, 326, "F"),
        text(256, 322, "from the", "small"),
        text(256, 336, "rounds", "small"),
    ]


def draw_merge() -> list[str]:
    return [
        text(26, 376, "3 · Merge: λ · F + (1 − λ) · L", "name"),
        line(48, 424, 292, 424),
        '<circle class="L" cx="48" cy="424" r="5"/><circle class="F" cx="292" cy="424" r="5"/>',
        '<circle class="W" cx="188" cy="424" r="6"/>',
        text(30, 410, "L, λ = 0", "L"),
        text(314, 410, "F, λ = 1", "F end"),
        text(170, 450, "the line from L to F", "small middle"),
    ]


def draw_weight() -> list[str]:
    return [
        text(26, 484, "4 · Choose λ", "name W"),
        photos(30, 501),
        text(76, 503, "30 pictures kept aside, and the"),
        text(76, 518, "loss curves of all hospitals"),
    ]


def draw_bytes() -> list[str]:
    return [
        text(16, 552, "travels", "name F"),
        text(72, 552, "F, down and up in every round;"),
        text(72, 568, "13 numbers up and 3 down for λ"),
        text(16, 588, "stays", "name L"),
        text(72, 588, "every picture, L, the merged model"),
    ]


DRAWN = dict(zip(PARTS, (draw_round, draw_local, draw_merge, draw_weight, draw_bytes)))


def tip(which: str) -> str:
    """The tip of an arrow of that colour."""
    shape = f'<path class="{which}" d="M0 0L8 4L0 8z"/>'
    box = 'viewBox="0 0 8 8" refX="6" refY="4" markerWidth="5" markerHeight="5" orient="auto"'
    return f'<marker id="tip{which}" {box}>{shape}</marker>'


def part(name: str, highlight: str | None) -> str:
    """The drawing of a part: framed if it is the highlighted one, pale if another one is."""
    shapes = DRAWN[name]()
    if name == highlight:
        shapes.append(rectangle(*FRAMES[name], "frame", 8))
    kind = "dim" if highlight not in (None, name) else "part"
    return f'<g class="{kind}" id="{name}">' + "\n".join(shapes) + "</g>"


def picture(highlight: str | None = None) -> str:
    """The SVG, with the part ``highlight`` (one of ``PARTS``) framed and the others pale."""
    if highlight not in (None, *PARTS):
        raise ValueError(f"highlight must be one of {', '.join(PARTS)}, not {highlight!r}")
    title = "Potara: federated rounds, a local model, their merge, and the choice of λ"
    house = [
        line(108, 206, 14, 252, "zoom"),
        line(108, 206, 326, 252, "zoom"),
        rectangle(12, 252, 316, 276, "box", 10),
        text(22, 270, "inside each hospital", "small"),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{1.25 * WIDTH:g}" '
            f'height="{1.25 * HEIGHT:g}" role="img" aria-label="{title}">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f"<defs>{tip('F')}{tip('L')}</defs>",
            rectangle(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "card", 12),
            text(14, 24, "Eight hospitals, eight tasks", "head"),
            text(14, 42, "The pictures may not leave; models may.", "small"),
            *house,
            *[part(name, highlight) for name in PARTS],
            "</svg>\n",
        ]
    )


def write(folder: Path = FOLDER) -> None:
    """All variants: ``method.svg``, and ``method-PART.svg`` for each part."""
    folder.mkdir(exist_ok=True)
    for name in (None, *PARTS):
        (folder / ("method.svg" if name is None else f"method-{name}.svg")).write_text(picture(name))


if __name__ == "__main__":
    write()
