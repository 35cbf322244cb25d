"""How pytest compares what a notebook prints with what is committed (``tests/notebook_outputs.py``)."""

import sys

import nbformat
import notebook_outputs as outputs
import pytest
from conftest import finished
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


def test_a_notebook_with_other_numbers_fails(tmp_path):
    notebook = nbformat.v4.new_notebook()
    for name, (source, committed, _) in CELLS.items():
        cell = nbformat.v4.new_code_cell(source, execution_count=len(notebook.cells) + 1)
        cell.outputs = [nbformat.v4.new_output("stream", text=committed)] if committed else []
        cell.metadata["tags"] = ["nbval-ignore-output"] if name == "seconds" else []
        notebook.cells.append(cell)
    nbformat.write(notebook, tmp_path / "one.ipynb")
    rules = (ROOT / "tests" / "notebook_outputs.py").read_text()
    (tmp_path / "conftest.py").write_text(f"{rules}\n\npytest_configure = compare_with_tolerance\n")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", "-rA", "-p", "no:cacheprovider"]
    said = finished([*command, "one.ipynb"], check=False, cwd=tmp_path).stdout
    for number, (name, (_, _, is_error)) in enumerate(CELLS.items()):
        assert f"{'FAILED' if is_error else 'PASSED'} one.ipynb::Cell {number}" in said, (name, said)
