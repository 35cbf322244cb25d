"""Notebook 04: its checkers know solutions and mistakes; the explorer, and the rows of ``benchmarks/course.py``."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from potara_lite import Setting
from potara_lite.course.estimator_explorer import METHODS, estimator_explorer, loss_along
from potara_lite.course.exercises.estimating import (
    check_beats_half,
    check_diagonal_fisher,
    check_images_needed,
    check_regret,
    check_shrink,
)
from potara_lite.results import committed_rows
from potara_lite.training.gradients import diagonal_fisher

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def mean(values, sizes):
    return values.sum(1) / sizes.view(-1, 1)


def at(weights, loss, weight):
    return float(np.interp(weight, weights, loss))


def nearest(weights, loss, weight):
    return loss[(weights - weight).abs().argmin()]


RIGHT = [
    (check_diagonal_fisher, diagonal_fisher),
    (check_diagonal_fisher, lambda g, n: (g**2).sum(1) / n[:, None]),
    (check_images_needed, lambda v, h, r: int(np.ceil(v / h / r / 2))),
    (check_images_needed, lambda v, h, r: next(n for n in range(1, 999) if v / (2 * n * h) <= r)),
    (check_shrink, lambda o, s2, c, t2: (t2 * o + s2 * c) / (s2 + t2)),
    (check_shrink, lambda o, s2, c, t2: c + t2 / (s2 + t2) * (o - c)),
    (check_regret, lambda w, loss, x: at(w, loss, x) - float(loss.min())),
]
WRONG = [
    (check_diagonal_fisher, lambda g, n: mean(g, n) ** 2, "squares the gradient of the whole batch"),
    (check_diagonal_fisher, lambda g, n: g.mean(1) ** 2, "squares the gradient of the whole batch"),
    (check_diagonal_fisher, lambda g, n: (g**2).sum(1), "the sum over the examples"),
    (check_diagonal_fisher, lambda g, n: (g**2).mean(1), "the padded length"),
    (check_diagonal_fisher, lambda g, n: g.var(1), "variance"),
    (check_diagonal_fisher, lambda g, n: g.var(1, unbiased=False), "variance"),
    (check_diagonal_fisher, lambda g, n: mean(g**2, n) - mean(g, n) ** 2, "variance"),
    (check_diagonal_fisher, lambda g, n: mean(g**2, n).sum(1), "the trace"),
    (check_diagonal_fisher, lambda g, n: 2 * mean(g**2, n), "off by up to"),
    (check_images_needed, lambda v, h, r: -(-1 // (2 * r)), "calibrated model only"),
    (check_images_needed, lambda v, h, r: v / h / (2 * r), "round up"),
    (check_images_needed, lambda v, h, r: int(v / h / (2 * r)), "rounded down"),
    (check_images_needed, lambda v, h, r: np.ceil(v / (h * r)), "factor ½"),
    (check_images_needed, lambda v, h, r: np.ceil(h / (2 * v * r)), "swapped"),
    (check_images_needed, lambda v, h, r: np.ceil(v / (h * h * r)), "squared error of λ"),
    (check_images_needed, lambda v, h, r: 50, "right on one example of 3"),
    (check_shrink, lambda o, s2, c, t2: (s2 * o + t2 * c) / (s2 + t2), "swapped"),
    (check_shrink, lambda o, s2, c, t2: (o / s2 + c / t2) / (1 / s2 + 1 / t2), "t2 = 0"),
    (check_shrink, lambda o, s2, c, t2: (t2**0.5 * o + s2**0.5 * c) / (s2**0.5 + t2**0.5), "standard deviations"),
    (check_shrink, lambda o, s2, c, t2: (t2**2 * o + s2**2 * c) / (s2**2 + t2**2), "a variance already"),
    (check_shrink, lambda o, s2, c, t2: (o + c) / 2, "halfway"),
    (check_shrink, lambda o, s2, c, t2: t2 / (s2 + t2), "the share"),
    (check_shrink, lambda o, s2, c, t2: c, "right on one example of 3"),
    (check_regret, lambda w, loss, x: at(w, loss, x) - at(w, loss, 0.5), "over that of λ = ½"),
    (check_regret, lambda w, loss, x: loss.min() - at(w, loss, x), "the sign"),
    (check_regret, lambda w, loss, x: nearest(w, loss, x) - loss.min(), "nearest point of the grid"),
    (check_regret, lambda w, loss, x: at(w, loss, x) - min(loss[0], loss[-1]), "the better model"),
    (check_regret, lambda w, loss, x: at(w, loss, x), "the loss itself"),
    (check_regret, lambda w, loss, x: nearest(w, loss, x), "the loss itself"),
    (check_regret, lambda w, loss, x: abs(w[loss.argmin()] - x), "how far λ is"),
    (check_regret, lambda w, loss, x: loss - loss.min(), "one number"),
]


@pytest.mark.parametrize("check, right", RIGHT)
def test_a_solution_is_correct(check, right):
    assert check(right) == "correct"


@pytest.mark.parametrize("check, wrong, hint", WRONG)
def test_a_wrong_answer_gets_a_hint(check, wrong, hint):
    line = check(wrong)
    assert line.startswith("hint: ") and hint in line


def trial(weight, loss):
    return lambda seed: (torch.tensor(weight), torch.tensor(loss[seed]), torch.tensor([0.5, 0.7]))


BETTER, MIXED = [[0.4, 0.7], [0.3, 0.8], [0.2, 0.2]], [[0.4, 0.7], [0.6, 0.7], [0.2, 0.2]]


@pytest.mark.parametrize(
    "setting, trial, line",
    [
        (..., None, "not attempted"),
        (Setting(), trial([0.0, 1.0], BETTER), "correct"),
        (Setting(), trial([0.0, 1.1], BETTER), "hint: λ must be in [0, 1]; on seed 0 it goes from 0.00 to 1.10"),
        (Setting(), trial([0.3], BETTER), "hint: a λ for every client: (2,), not (1,)"),
        (Setting(), trial([0.1, 0.2], MIXED), "hint: ½ is better on seed 1: 0.600 nats, yours has 0.650; "
                                              "where is the best λ far from ½?"),
    ],
)  # fmt: skip
def test_the_open_task_asks_for_a_lower_loss_than_half_on_every_seed(setting, trial, line):
    assert check_beats_half(setting, trial) == line


@pytest.fixture(scope="module")
def course():
    """The script, with a federation of three clients and a few steps."""
    spec = importlib.util.spec_from_file_location("course_of_three_clients", BENCHMARKS / "course.py")
    module = sys.modules["course_of_three_clients"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = dict(clients=3, train_size=30, calibration_size=8, test_size=40)
    module.SETTING = Setting(**sizes, rank=2, rounds=3, round_steps=2, local_steps=8)
    module.ALPHAS, module.SEEDS, module.LENGTHS, module.POINTS = (0.5, float("inf")), [0], {0.5: (4, 8)}, 5
    return module


def test_the_script_writes_a_row_per_client_and_length_and_recomputes_nothing(course, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "HERE", tmp_path)
    monkeypatch.setattr(course, "RESULTS", tmp_path / "course")
    course.main()
    made, rows = (tmp_path / "course.csv").read_bytes(), pd.read_csv(tmp_path / "course.csv")
    counts = rows.groupby(["alpha", "local_steps"]).client.agg(list)
    assert counts.to_dict() == {(0.5, 4): [0, 1, 2], (0.5, 8): [0, 1, 2], (np.inf, 8): [0, 1, 2]}
    weights = rows.filter(like="weight_")
    assert np.isfinite(rows.drop(columns="alpha")).all(axis=None) and weights.stack().between(0, 1).all()
    for method in weights.columns.str.removeprefix("weight_").drop(["calibrated"]):
        assert (rows[f"loss_{method}"] >= rows.loss_oracle - 1e-4).all()
    assert np.allclose(rows.loss_local, rows["curve_0.000"]) and np.allclose(rows.loss_federated, rows["curve_1.000"])
    assert rows[rows.alpha == 0.5].groupby("client").loss_federated.nunique().eq(1).all()
    monkeypatch.setattr(course, "measure", None)
    course.main()
    assert (tmp_path / "course.csv").read_bytes() == made


def test_a_longer_local_model_goes_on_from_the_shorter(course, monkeypatch):
    both = course.measure(0.5, 0).query("local_steps == 8").reset_index(drop=True)
    monkeypatch.setattr(course, "LENGTHS", {0.5: (8,)})
    pd.testing.assert_frame_equal(both, course.measure(0.5, 0), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def rows():
    return committed_rows("course.csv")


def test_the_committed_rows_are_whole(rows):
    spec = importlib.util.spec_from_file_location("course_as_committed", BENCHMARKS / "course.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    wanted = [(alpha, steps, seed, client) for alpha in script.ALPHAS for seed in script.SEEDS
              for steps in script.lengths_of(alpha, seed) for client in range(8)]  # fmt: skip
    index = ["alpha", "local_steps", "seed", "client"]
    assert list(rows[index].itertuples(index=False, name=None)) == sorted(wanted)
    assert {f"{kind}_{method}" for kind in ("weight", "loss") for method in METHODS} <= set(rows.columns)
    assert np.isfinite(rows.drop(columns="alpha")).all(axis=None)
    for method in METHODS.keys() - {"calibrated"}:  # with the head apart it is not on the curve
        curve = loss_along(rows)(rows[f"weight_{method}"].to_numpy()).diagonal()
        assert np.allclose(curve, rows[f"loss_{method}"], atol=1e-3)
        assert (rows[f"loss_{method}"] >= rows.loss_oracle - 1e-3).all()


def test_the_explorer_shows_every_state_it_offers(rows):
    some = rows[(rows.alpha == 0.1) & (rows.seed == 0)]
    client, steps, text, picture = estimator_explorer(some).children
    seen = set()
    for client.value in range(8):
        for steps.index in range(3):
            row = some[(some.client == client.value) & (some.local_steps == steps.value)].iloc[0]
            assert text.value.startswith(f"client {client.value}, {steps.value} local steps: best λ = ")
            assert f"½ {row.loss_uniform - row.loss_oracle:.3f}" in text.value
            assert len(re.findall(r"regret|nan", text.value)) == 1
            seen.add(picture.value)
    assert len(seen) == 24


def test_the_explorer_refuses_more_than_one_federation(rows):
    with pytest.raises(ValueError, match="one alpha and one seed"):
        estimator_explorer(rows)
