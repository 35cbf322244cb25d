"""How pytest compares what a notebook prints with what is committed (``tests/notebook_outputs.py``)."""

import copy
import re
import sys

import nbformat
import notebook_outputs as outputs
import numpy as np
import pytest
from conftest import finished
from matplotlib.figure import Figure
from notebook_figures import drawn
from test_results import ROOT


@pytest.mark.parametrize(
    "number, allowed",
    [("0.69", 0.02), ("0.5", 0.2), ("0.0025", 0.0002), ("12.50", 0.25), ("1.5e-3", 2e-4), ("−0.314", 0.00628)]
    + [("8", 0), ("103,464", 0), ("100", 0)],
)
def test_the_tolerance_is_two_units_of_the_last_digit_or_two_per_cent(number, allowed):
    assert outputs.tolerance(number) == pytest.approx(allowed)


@pytest.mark.parametrize(
    "found, is_same",
    [
        ("loss  0.71,\nλ 0.50 in 8 of 8", True),
        ("loss 0.73, λ 0.48 in 8 of 8", True),
        ("loss 0.74, λ 0.50 in 8 of 8", False),
        ("loss 0.71, λ 0.53 in 8 of 8", False),
        ("loss 0.71, λ 0.50 in 7 of 8", False),
        ("Loss 0.71, λ 0.50 in 8 of 8", False),
        ("loss 0.71, λ 0.50", False),
        ("loss 0.71, λ −0.50 in 8 of 8", False),
        ("loss nan, λ 0.50 in 8 of 8", False),
    ],
)
def test_words_are_compared_as_words_and_numbers_as_numbers(found, is_same):
    committed = "loss 0.71, λ 0.50 in 8 of 8"
    assert outputs.same(committed, found) is is_same
    assert (outputs.Output(committed) == found) is is_same
    assert (outputs.Output(committed) != found) is not is_same


def test_names_with_digits_are_words():
    assert outputs.NUMBER.findall("client0 v2.1 <td>0.50</td> blocks.0.attn 4×4") == ["0.50", "4", "4"]


CELLS = {  # source, committed output, is it an error?
    "same": ("print(f'λ {0.5:.2f}')", "λ 0.50\n", False),
    "near": ("print(f'λ {0.51:.2f}')", "λ 0.50\n", False),
    "far": ("print(f'λ {0.53:.2f}')", "λ 0.50\n", True),
    "exact": ("# NBVAL_CHECK_OUTPUT\nprint(f'λ {0.51:.2f}')", "λ 0.50\n", True),
    "more": ("print('λ')\nprint('more')", "λ\n", True),
    "quiet": ("1 + 1;", None, False),
    "not quiet": ("1 + 1", None, True),
    "seconds": ("print('9.1 s')", "1.2 s\n", False),
}


def said_of(notebook, folder):
    """What pytest says of the cells of a notebook."""
    nbformat.write(notebook, folder / "one.ipynb")
    rules = f"import sys\n\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    (folder / "conftest.py").write_text(
        rules + "from notebook_outputs import compare_with_tolerance as pytest_configure"
    )
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", "-rA", "-p", "no:cacheprovider"]
    return finished([*command, "one.ipynb"], check=False, cwd=folder).stdout


def test_a_notebook_with_other_numbers_fails(tmp_path):
    notebook = nbformat.v4.new_notebook()
    for name, (source, committed, _) in CELLS.items():
        cell = nbformat.v4.new_code_cell(source, execution_count=len(notebook.cells) + 1)
        cell.outputs = [nbformat.v4.new_output("stream", text=committed)] if committed else []
        cell.metadata["tags"] = ["nbval-ignore-output"] if name == "seconds" else []
        notebook.cells.append(cell)
    said = said_of(notebook, tmp_path)
    for number, (name, (_, _, is_error)) in enumerate(CELLS.items()):
        assert f"{'FAILED' if is_error else 'PASSED'} one.ipynb::Cell {number}" in said, (name, said)


X = np.linspace(0, 1, 21)
WEIGHTS, LOSSES = X.tolist(), ((X - 0.3) ** 2 + 0.5).tolist()


def figure_of(y=LOSSES, mark=0.3, label="loss", style="-", bars=(3.0, 4.0), pixels=((0, 1), (2, 3)), **options):
    """A figure with an artist of each kind."""
    figure = Figure(figsize=options.pop("figsize", (6, 3)))
    curve, others = figure.subplots(1, 2)
    curve.plot(WEIGHTS, y, style, label=label, **options)
    curve.scatter([mark], [0.5], s=70 if options else 20)
    curve.fill_between(WEIGHTS, y, 0.4, alpha=0.2)
    curve.legend()
    others.barh(["F", "L"], bars)
    others.imshow(pixels)
    return figure


def test_a_figure_redrawn_in_another_style_is_the_same():
    other = figure_of(style="--", color="red", lw=3, figsize=(8, 2))
    assert outputs.same(drawn(figure_of()), drawn(other)) and drawn(other).count("\n") == 7


@pytest.mark.parametrize(
    "change",
    [
        dict(y=LOSSES[::-1]),
        dict(y=[0.97 * one for one in LOSSES]),
        dict(y=LOSSES[:-1] + [1.1]),
        dict(mark=0.33),
        dict(label="accuracy"),
        dict(bars=(3.0, 4.3)),
        dict(bars=(4.0, 3.0)),
        dict(pixels=((0, 1), (2, 3.2))),
        dict(pixels=((2, 3), (0, 1))),
    ],
)
def test_a_figure_of_other_data_differs(change):
    assert not outputs.same(drawn(figure_of()), drawn(figure_of(**change)))


def test_numbers_of_a_figure_have_the_tolerance_of_a_table():
    assert outputs.same(drawn(figure_of()), drawn(figure_of(y=[1.01 * one for one in LOSSES], mark=0.305)))


def test_a_number_on_a_logarithmic_axis_has_its_own_digits():
    figure = Figure()
    panel = figure.subplots()
    panel.plot([1, 2, 3], [1e-5, 1e-3, 1])
    assert "1.00e-05" not in drawn(figure)
    panel.set_yscale("log")
    assert "y (3) 1.00e-05 1.00e-03 1.00e+00" in drawn(figure)


PLANTED = {  # in 00b: the first images of every hospital, and the shapes of three matrices
    "plt.imshow": ("federation.train", "federation.test"),
    "plt.Rectangle": ("(left, -height), width", "(left, -height), 0.9 * width"),
}


def test_a_planted_change_in_a_copy_of_a_notebook_is_caught(tmp_path):
    """A copy of cells of 00b passes; where another figure is drawn under the same words it fails."""
    cells = nbformat.read(ROOT / "notebooks" / "00b_from_scratch.ipynb", as_version=4).cells
    cells = [cell for cell in cells if cell.cell_type == "code"]
    names = nbformat.v4.new_code_cell("print([name for name in dir() if name[0] != '_'])", execution_count=1)
    known = "['In', 'Out', 'exit', 'get_ipython', 'open', 'quit']\n"  # the startup of the kernel adds none
    names.outputs = [nbformat.v4.new_output("stream", text=known)]
    notebook = nbformat.v4.new_notebook(cells=[names, cells[0]])
    for drawing, (right, wrong) in PLANTED.items():
        cell = next(cell for cell in cells if drawing in cell.source)
        assert cell.outputs[0].data["text/plain"].startswith("Figure, panels 1") and cell.source.count(right) == 1
        planted = copy.deepcopy(cell)
        planted.update(id=f"{cell.id}-planted", source=cell.source.replace(right, wrong))
        notebook.cells += [cell, planted]
    said = said_of(notebook, tmp_path)
    for number, passes in enumerate((True, True, True, False, True, False)):
        assert f"{'PASSED' if passes else 'FAILED'} one.ipynb::Cell {number}" in said, said


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_committed_figure_says_what_it_draws(path):
    cells = nbformat.read(path, as_version=4).cells
    found = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    texts = [data["text/plain"] for data in found if "image/png" in data]
    assert texts and all(re.match(r"Figure, panels \d", text) and re.search(r"\d\.\d", text) for text in texts)
