"""Notebook 00b: short functions, nothing but PyTorch until the comparison, and checkers that know the mistakes."""

import ast
import re

import nbformat
import pytest
import torch
from test_results import ROOT

from potara_lite.course.exercises.from_scratch import check_combined, check_merge_many, check_more_skew

NOTEBOOK = nbformat.read(ROOT / "notebooks" / "00b_from_scratch.ipynb", as_version=4)
FROM_THE_LIBRARY = {"fashion_mnist", "lab_vit"}  # the data and the pre-trained network


def sources(cells):
    """The code cells as Python, without IPython's own commands."""
    return [re.sub(r"^%.*$", "", cell.source, flags=re.M) for cell in cells if cell.cell_type == "code"]


def before(title):
    """The cells above the section with this title."""
    index = next(n for n, cell in enumerate(NOTEBOOK.cells) if re.search(rf"^## \d+\. {title}", cell.source, re.M))
    return NOTEBOOK.cells[:index]


def test_no_function_has_more_than_ten_lines():
    tree = ast.parse("\n".join(sources(NOTEBOOK.cells)))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert len(functions) >= 25 and max(lengths.values()) <= 10, lengths


def test_the_library_is_silent_until_the_comparison():
    own, whole = (ast.parse("\n".join(sources(cells))) for cells in (before("The same numbers"), NOTEBOOK.cells))
    imported = [node for node in ast.walk(own) if isinstance(node, ast.ImportFrom | ast.Import)]
    modules = {getattr(node, "module", None) or node.names[0].name for node in imported}
    assert {name.split(".")[0] for name in modules} == {"copy", "matplotlib", "numpy", "torch", "potara_lite"}
    from_library = {
        name.name for node in imported if "potara_lite" in (getattr(node, "module", "") or "") for name in node.names
    }
    assert from_library == FROM_THE_LIBRARY
    everything = {name.name for node in ast.walk(whole) if isinstance(node, ast.ImportFrom) for name in node.names}
    assert {"fedit", "estimate_paper", "estimate_curve", "estimate_pooled", "estimate_calibrated"} <= everything


def test_every_number_is_compared_with_the_librarys():
    (cell,) = [source for source in sources(NOTEBOOK.cells) if "atol=1e-6" in source]
    assert "rtol=0" in cell and cell.count("assert_close") == 5  # F, L, the weights, the losses, the offset


def test_every_section_until_the_comparison_has_a_picture():
    pictures, title = {}, None
    for cell in before("The same numbers"):
        for found in re.finditer(r"^## (\d+)\. |^!\[", cell.source if cell.cell_type == "markdown" else "", re.M):
            title = found[1] or title
            pictures[title] = pictures.get(title, 0) + (found[1] is None)
        if cell.cell_type == "code" and title:
            pictures[title] += sum("image/png" in output.get("data", {}) for output in cell.outputs)
    assert len(pictures) == 15 and all(pictures.values()), pictures  # None: the one at the top


BOARD = {
    "L": 0.3,
    "F": 1.1,
    "paper": 0.5,
    "own curve": 0.27,
    "½": 0.31,
    "pool": 0.26,
    "head apart": 0.25,
    "oracle": 0.24,
}


@pytest.mark.parametrize(
    "board, line",
    [
        (..., "not attempted"),
        (BOARD, "correct"),
        (BOARD | {"head apart": 0.2}, "correct"),
        ({"L": 0.3}, "hint: the losses are a dictionary"),
        (BOARD | {"oracle": 0.4}, "hint: the oracle is never above"),
        (BOARD | {"F": 0.29}, "hint: that looks like hospitals that differ little"),
        (BOARD | {"pool": 0.32}, "hint: that looks like hospitals that differ little"),
    ],
)
def test_the_open_task_wants_the_board_of_hospitals_that_differ_more(board, line):
    assert check_more_skew(board).startswith(line)


def value(one, variance, other, other_variance):
    return (one / variance + other / other_variance) / (1 / variance + 1 / other_variance)


SOLUTIONS = {
    check_merge_many: lambda As, Bs, w: (torch.cat(As), torch.cat([k * B for k, B in zip(w, Bs)], dim=1)),
    check_combined: lambda own, s2, mean, t2: (value(own, s2, mean, t2), (1 / s2 + 1 / t2) ** -0.5),
}


@pytest.mark.parametrize("check, right", SOLUTIONS.items())
def test_a_solution_is_correct(check, right):
    assert check(right) == "correct"
    assert check(lambda *given: ...) == "not attempted"


def weighted(tensors, weights):
    return [weight * tensor for weight, tensor in zip(weights, tensors)]


def test_the_weights_may_be_on_the_other_factor_and_the_ranks_in_another_order():
    right = check_merge_many
    assert right(lambda As, Bs, w: (torch.cat(weighted(As, w)), torch.cat(Bs, 1))) == "correct"
    assert right(lambda As, Bs, w: (torch.cat(As[::-1]), torch.cat(weighted(Bs, w)[::-1], 1))) == "correct"


@pytest.mark.parametrize(
    "check, wrong, hint",
    [
        (check_merge_many, lambda As, Bs, w: (torch.cat(As), torch.cat(Bs, 1)), "the weights are missing"),
        (
            check_merge_many,
            lambda As, Bs, w: (torch.cat(weighted(As, w)), torch.cat(weighted(Bs, w), 1)),
            "A and B both carry the weight",
        ),
        (check_merge_many, lambda As, Bs, w: (sum(weighted(As, w)), sum(weighted(Bs, w))), "stack the ranks"),
        (
            check_merge_many,
            lambda As, Bs, w: (torch.cat(As[:2]), torch.cat(weighted(Bs, w)[:2], 1)),
            "only the first two models",
        ),
        (check_merge_many, lambda As, Bs, w: (torch.cat(weighted(Bs, w), 1), torch.cat(As)), "A first"),
        (check_merge_many, lambda As, Bs, w: torch.cat(As), "two tensors"),
        (check_merge_many, lambda As, Bs, w: (torch.cat(As, 1), torch.cat(Bs)), "has the shape"),
        (check_combined, lambda o, s2, m, t2: (value(o, s2, m, t2), 1 / (1 / s2 + 1 / t2)), "its root"),
        (check_combined, lambda o, s2, m, t2: (value(o, t2, m, s2), (1 / s2 + 1 / t2) ** -0.5), "swapped"),
        (
            check_combined,
            lambda o, s2, m, t2: (value(o, s2**0.5, m, t2**0.5), (1 / s2 + 1 / t2) ** -0.5),
            "one over the variance",
        ),
        (check_combined, lambda o, s2, m, t2: (value(o, s2, m, t2), (s2 + t2) ** 0.5), "do not add up"),
        (check_combined, lambda o, s2, m, t2: ((o + m) / 2, (1 / s2 + 1 / t2) ** -0.5), "plain mean"),
        (check_combined, lambda o, s2, m, t2: value(o, s2, m, t2), "return two numbers"),
    ],
)
def test_a_wrong_answer_gets_a_hint(check, wrong, hint):
    line = check(wrong)
    assert line.startswith("hint: ") and hint in line
