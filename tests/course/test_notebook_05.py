"""Notebook 05: its checkers know solutions and mistakes, its widget shows what it is given."""

import importlib.util
import itertools
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from scipy import stats

from potara_lite.baselines.methods import METHODS
from potara_lite.course.exercises.benchmark import (
    check_fair_rounds,
    check_frontier,
    check_paired_difference,
    check_seeds_needed,
    check_share_better,
    power,
)
from potara_lite.course.seeds_explorer import seeds_explorer

ROOT = Path(__file__).parents[2]
SOLUTIONS = {
    check_paired_difference: lambda first, second: (
        (first - second).mean(),
        pd.Series((first.mean(1) - second.mean(1)).numpy()).sem(),
    ),
    check_frontier: lambda points: [
        not any(x <= mine[0] and y >= mine[1] and [x, y] != mine for x, y in points.tolist())
        for mine in points.tolist()
    ],
    check_fair_rounds: lambda budget, steps, models: max(n for n in range(budget + 1) if n * steps * models <= budget),
    check_share_better: lambda first, second: (
        sum(a > b for a, b in zip(first.flatten(), second.flatten())) / first.numel()
    ),
}


@pytest.mark.parametrize("check, right", SOLUTIONS.items())
def test_a_solution_is_correct(check, right):
    assert check(right) == "correct"


def mean_and(error):
    return lambda first, second: ((first - second).mean(), error(first, second))


@pytest.mark.parametrize(
    "check, wrong, hint",
    [  # written as a reader would write them, apart from the mistakes that the checkers list
        (
            check_paired_difference,
            mean_and(lambda a, b: (a.mean(1).var() / len(a) + b.mean(1).var() / len(b)).sqrt()),
            "unpaired",
        ),
        (
            check_paired_difference,
            mean_and(lambda a, b: (a.mean(1) - b.mean(1)).numpy().std() / len(a) ** 0.5),
            "ddof 1",
        ),
        (check_paired_difference, mean_and(lambda a, b: (a - b).std() / a.numel() ** 0.5), "every client"),
        (check_paired_difference, mean_and(lambda a, b: torch.std(a.mean(1) - b.mean(1))), "of one seed"),
        (check_paired_difference, lambda a, b: (a - b).mean(), "the answer is 2 things"),
        (check_frontier, lambda p: [0, 1, 4], "shape"),
        (
            check_frontier,
            lambda p: [not any(x < a and y > b for x, y in p.tolist()) for a, b in p.tolist()],
            "you keep points that are beaten",
        ),
        (
            check_frontier,
            lambda p: [
                not any(j != i and q[0] <= p[i, 0] and q[1] >= p[i, 1] for j, q in enumerate(p)) for i in range(len(p))
            ],
            "two equal points",
        ),
        (
            check_frontier,
            lambda p: [not any(x >= a and y >= b and [x, y] != [a, b] for x, y in p.tolist()) for a, b in p.tolist()],
            "fewer are better",
        ),
        (check_fair_rounds, lambda budget, steps, models: int(budget / steps), "two models"),
        (check_fair_rounds, lambda budget, steps, models: budget - steps * models, "the answer is 36"),
        (check_share_better, lambda a, b: 1 - (a < b).double().mean(), "ties as wins"),
        (check_share_better, lambda a, b: float(a.mean() > b.mean()), "averaged everything"),
        (check_share_better, lambda a, b: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_wrong_answer_gets_a_hint(check, wrong, hint):
    line = check(wrong)
    assert line.startswith("hint: ") and hint in line


def found_in_simulation(n, deviation, size, draws=20_000):
    """How often a t-test of n differences finds ``size``: the open task without a noncentral t distribution."""
    draw = torch.Generator().manual_seed(0)
    differences = size + deviation * torch.randn(draws, n, generator=draw, dtype=torch.float64)
    t = differences.mean(1) / (differences.std(1) / n**0.5)
    return float((t > stats.t.ppf(0.975, n - 1)).double().mean())


@pytest.mark.parametrize("n, deviation, size", [(2, 0.01, 0.02), (10, 0.01, 0.01), (48, 0.012, 0.005)])
def test_the_power_of_the_open_task_is_that_of_a_simulation(n, deviation, size):
    error = (power(n, deviation, size) * (1 - power(n, deviation, size)) / 20_000) ** 0.5
    assert found_in_simulation(n, deviation, size) == pytest.approx(power(n, deviation, size), abs=4 * error)


@pytest.mark.parametrize(
    "answer, line",
    [
        (lambda deviation, size: ..., "not attempted"),
        (lambda deviation, size: next(n for n in itertools.count(2) if power(n, deviation, size) >= 0.8), "correct"),
        (lambda deviation, size: round((2.8 * deviation / size) ** 2), "not in 80 %"),
        (lambda deviation, size: 200, "experiments already"),
        (lambda deviation, size: 7.85 * (deviation / size) ** 2, "a whole number of 2 seeds or more"),
        (lambda deviation, size: "many", "the answer is a number"),
    ],
)
def test_the_open_task_takes_a_number_of_seeds_that_does_what_it_should(answer, line):
    assert line in check_seeds_needed(answer)


SCORES = pd.DataFrame(
    {0: [0.8, 0.7, 0.6], 1: [0.6, 0.7, 0.65], 2: [0.7, 0.9, 0.5]}, index=["a & b", "local", "potara-calibrated"]
)


def test_the_explorer_ranks_both_sides_for_every_choice_of_seeds():
    row, text, picture = seeds_explorer(SCORES).children
    for on in itertools.product([False, True], repeat=3):
        shown = text.value, picture.value
        for switch, value in zip(row.children, on):
            switch.value = value
        if all(on) or not any(on):
            assert text.value == "leave at least one seed on and one off"
            continue
        assert (text.value, picture.value) != shown
        left, right = (SCORES[[s for s in SCORES if on[s] == side]].mean(axis=1) for side in (True, False))
        assert f": {left.idxmax()}; best on" in text.value and f": {right.idxmax()};" in text.value
        moved = (left.rank(ascending=False) != right.rank(ascending=False)).sum()
        assert text.value.endswith(f"{moved} of 3 methods change places")
        svg = bytes(picture.value).decode()
        assert "a &amp; b" in svg and svg.count("<path") == 3
        for score in (*left, *right):
            assert f"{score:.3f}" in svg


@pytest.mark.parametrize("chosen", [0, 3])
def test_the_explorer_needs_seeds_on_both_sides(chosen):
    with pytest.raises(ValueError, match=f"{chosen} of 3 seeds chosen"):
        seeds_explorer(SCORES, chosen=chosen)


@pytest.fixture(scope="module")
def comparison():
    """The script of the benchmark that the notebook reads."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("comparison_script", ROOT / "benchmarks" / "comparison.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_live_run_has_the_benchmarks_setting(comparison):
    cells = nbformat.read(ROOT / "notebooks" / "05_vision_benchmark.ipynb", as_version=4).cells
    (line,) = (line for cell in cells for line in cell.source.splitlines() if line.startswith("lab = Setting("))
    assert eval(line.removeprefix("lab = "), {"Setting": comparison.Setting}) == comparison.LAB
    assert comparison.LAB.calibration_size == 30 and (comparison.LAB.rounds, comparison.LAB.round_steps) == (15, 5)


def test_what_the_notebook_says_of_the_benchmark(comparison):
    """Options were chosen on a seed that no table reports, the two models of the merge had the most of them, every
    method with one shared model also has local steps afterwards, and the paper's scale was never run."""
    tuned_on = set(pd.read_csv(ROOT / "benchmarks" / "comparison-lab-tune.csv.gz").seed)
    assert tuned_on.isdisjoint(comparison.SEEDS["lab"])
    tried = {name: len(comparison.tried(name)) for name in comparison.OPTIONS}
    assert max(tried, key=tried.get) == comparison.PAIR
    shared = {name.removesuffix(", fine-tuned") for name in METHODS if name.endswith(", fine-tuned")}
    assert shared == {"FedIT", "FedProx", "FFA-LoRA", "FedEx-LoRA", "FLoRA", "FlexLoRA"}
    assert not (ROOT / "benchmarks" / "comparison-paper.csv.gz").exists()
