"""The two decks: slides from ``docs/decks/``, with the votes, figures and tables of the committed notebooks.

    pip install ".[docs]" && python docs/decks.py    # writes build/decks/1.html and 2.html

A deck is one file that asks for nothing else: pictures are in it, formulas are MathML. In a source, ``---`` begins a
slide, and ``00/4/1`` is the first of its kind in section 4 of notebook 00:

    <!-- 18–32 side -->        the minutes that begin here; classes of the slide (see deck.html)
    {vote 00/4/1}              a prediction, its three options closed
    {result 00/4/1 Words}      what the cell below that prediction shows; the words describe a figure
    {output 04/8/1}            a table or text that a cell printed
    {code 00/3/1}              the source of a code cell
    ![Words](00/4/1)           a figure; or a picture's path from the root of the repository
"""

from __future__ import annotations

import base64
import html
import re
import struct
import sys
from functools import cache
from pathlib import Path

import nbformat
from docutils.core import publish_parts
from docutils.writers.html5_polyglot import Writer
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "docs" / "decks").glob("*.md"))
MIME = {".png": "image/png", ".svg": "image/svg+xml"}
PLACE = re.compile(r"(\w+)/(\d+)/(\d+)")  # notebook, section, number


def mathml(formula: str, options: dict) -> str:
    source = f".. math::\n\n   {' '.join(formula.split())}"
    page = publish_parts(source, writer=Writer(), settings_overrides={"math_output": "MathML"})
    found = re.search(r"<math.*?</math>", page["body"], re.S)[0]
    return found if options["display_mode"] else found.replace(' display="block"', "")


MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table").use(dollarmath_plugin, renderer=mathml)


@cache
def section(notebook: str, number: str) -> list:
    """The cells of that section of a notebook."""
    (path,) = (ROOT / "notebooks").glob(f"{notebook}_*.ipynb")
    found, inside = [], False
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            inside = cell.source.startswith(f"## {number}. ")
        if inside:
            found.append(cell)
    return found


def pictures(cell) -> list[str]:
    return [output.data["image/png"] for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]


KINDS = {
    "vote": lambda cell: "vote" in cell.metadata.get("tags", []),
    "code": lambda cell: cell.cell_type == "code" and "check" not in cell.metadata.get("tags", []),
    "figure": pictures,
    "output": lambda cell: cell.get("outputs") and not pictures(cell),
}


def find(kind: str, place: str) -> tuple:
    """The cell at that place, and the cells of its section below it."""
    notebook, number, count = PLACE.fullmatch(place).groups()
    cells = section(notebook, number)
    positions = [position for position, cell in enumerate(cells) if KINDS[kind](cell)]
    if int(count) not in range(1, len(positions) + 1):
        raise ValueError(f"{place}: section {number} of notebook {notebook} has {len(positions)} of the kind {kind!r}")
    position = positions[int(count) - 1]
    return cells[position], cells[position + 1 :]


def address(source: str) -> str:
    """A picture as the address that holds it."""
    if PLACE.fullmatch(source):
        return f"data:image/png;base64,{pictures(find('figure', source)[0])[0].strip()}"
    path = ROOT / source
    return f"data:{MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def sized(image: re.Match) -> str:
    """The image, with the ratio of its sides for the style sheet: a PNG has both at its beginning."""
    width, height = struct.unpack(">II", base64.b64decode(image[1][:32])[16:24])
    return f'{image[0]} style="--ratio: {width / height:.3f}"'


def vote(cell) -> str:
    question, *options = cell.source.replace("</details>", "").split("<details><summary>")
    shown = MARKDOWN.render(question)
    for choice, reasoning in (option.split("</summary>") for option in options):
        choice, reasoning = MARKDOWN.renderInline(choice), MARKDOWN.render(reasoning)
        shown += f"<details><summary>{choice}</summary>{reasoning}</details>\n"
    return shown


def outputs(cell, words: str) -> str:
    shown = [f'<img alt="{html.escape(words)}" src="data:image/png;base64,{png.strip()}">' for png in pictures(cell)]
    for output in [] if shown else cell.outputs:
        table = output.get("data", {}).get("text/html")
        text = html.escape(output.get("text", ""))
        shown.append(re.sub(r"<style.*?</style>", "", table, flags=re.S) if table else f"<pre>{text}</pre>")
    return "\n".join(shown)


def insert(directive: str) -> str:
    kind, place, words = (directive.strip("{}").split(" ", 2) + [""])[:3]
    if kind == "vote":
        return vote(find(kind, place)[0])
    if kind == "result":
        return outputs(next(cell for cell in find("vote", place)[1] if cell.get("outputs")), words)
    cell = find(kind, place)[0]
    return f'<pre class="code">{html.escape(cell.source)}</pre>' if kind == "code" else outputs(cell, words)


def slide(source: str, minutes: str) -> str:
    """One slide; the notebook and section that it is from are in its footer."""
    opening = re.match(r"\s*<!-- (.*?) -->", source)
    words = opening[1].split() if opening else []
    classes = [word for word in words if word.isalpha()]
    pieces = re.split(r"^(\{\w+ .*\})$", source[opening.end() if opening else 0 :], flags=re.M)
    body = "\n".join(insert(piece) if piece.startswith("{") else MARKDOWN.render(piece) for piece in pieces)
    body = re.sub(r'src="([^":]+)"', lambda found: f'src="{address(found[1])}"', body)
    body = re.sub(r'src="data:image/png;base64,([^"]+)"', sized, body)
    places = list(dict.fromkeys(f"{notebook}, section {number}" for notebook, number, _ in PLACE.findall(source)))
    footer = " · ".join([f"minutes {minutes}", *(f"notebook {place}" for place in places)])
    return f'<section class="{" ".join(classes)}" data-footer="{footer}"><div>{body}</div></section>'


def build(source: Path) -> str:
    """The page of a deck."""
    texts, minutes, slides = re.split(r"^---$", source.read_text("utf-8"), flags=re.M), "", []
    for text in texts:
        minutes = next(iter(re.findall(r"^\s*<!-- (\d+–\d+)", text)), minutes)
        slides.append(slide(text, minutes))
    title = re.search(r"^# (.*)$", texts[0], re.M)[1]
    page = (source.parent / "deck.html").read_text("utf-8")
    return page.replace("TITLE", title).replace("SLIDES", "\n".join(slides))


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        (folder / f"{source.stem}.html").write_text(build(source), "utf-8")


if __name__ == "__main__":
    write(Path(*sys.argv[1:2] or [ROOT / "build" / "decks"]))
