"""The bound beside the measured loss: the script at a size for tests, and what is said of its committed rows."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.interpolate import CubicSpline

from potara_lite import Setting

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bound():
    sys.path.insert(0, str(BENCHMARKS))
    import bound

    sys.path.remove(str(BENCHMARKS))
    return bound


def test_a_small_run_has_a_row_for_each_regime_client_and_weight(bound, monkeypatch):
    monkeypatch.setattr(bound, "LOCAL", {"default": 3, "over-fitted": 6})
    monkeypatch.setattr(bound, "ANNEALED", {1.0: 4, 0.1: 2})
    setting = Setting(clients=2, rounds=2, round_steps=1, train_size=10, test_size=12, rank=2)
    rows = bound.measure(2, 30, setting)
    assert len(rows) == 2 * 2 * 11 and rows.notna().all(axis=None)
    assert set(rows.weight.round(1)) == set(np.arange(11) / 10)
    for column in ("predicted", "bound"):  # parabolas in λ that open upwards, above the optimum's loss
        curves = rows.pivot_table(index=["regime", "client"], columns="weight", values=column)
        assert (np.diff(curves, 2) > 0).all() and np.allclose(np.diff(curves, 3), 0, atol=1e-4)
        assert (rows[column] > rows.optimum).all()
    assert len(bound.figure(rows, "default").axes[0].lines) == 3


def test_resampling_draws_each_clients_examples_without_replacement(bound):
    from potara_lite import fashion_mnist

    split = fashion_mnist(clients=3, train_size=20, calibration_size=1, test_size=1).train
    few, same, other = (bound.resampled(split, 8, seed) for seed in (1, 1, 2))
    assert few.y.shape == (3, 8) and (few.x == same.x).all() and not (few.x == other.x).all()
    for i in range(3):
        rows = {tuple(x.flatten().tolist()) for x in few.x[i]}
        assert len(rows) == 8 and rows <= {tuple(x.flatten().tolist()) for x in split.x[i]}


def test_the_page_says_of_the_bound_what_the_rows_say():
    page = " ".join((BENCHMARKS.parent / "docs" / "mixing_weight.md").read_text().split())
    rows = pd.read_csv(BENCHMARKS / "bound.csv")
    assert set(rows.regime) == {"default", "over-fitted"} and rows.client.nunique() == 8
    gaps, lowest, regrets = [], [], []
    for regime in ("default", "over-fitted"):
        some = rows[rows.regime == regime]
        mean = some.groupby("weight")[["measured", "predicted"]].mean()
        assert (some.measured - some.predicted).abs().max() > (mean.measured - mean.predicted).abs().max()
        gaps.append(f"{(mean.measured - mean.predicted).abs().max():.2f}")
        lowest.append(mean.idxmin().round(1))
        fine, curves = np.linspace(0, 1, 101), some.pivot(index="client", columns="weight", values="measured")
        spline = CubicSpline(curves.columns, curves, axis=1)
        chosen = some.groupby("client")[["weight_predicted", "weight_bound"]].first()
        losses = (spline(chosen[name])[range(8), range(8)] for name in chosen)
        regrets.append([f"{(each - spline(fine).min(1)).mean():.3f}" for each in losses])
    assert "within {} nats of it all along λ (over-fitted local models: {})".format(*gaps) in page
    assert lowest[0].measured == lowest[0].predicted == 0.6 and "both are lowest at 0.6" in page
    assert f"({lowest[1].predicted} predicted, {lowest[1].measured} measured)" in page
    assert f"a regret of {regrets[0][0]} nats (over-fitted: {regrets[1][0]})" in page
    assert f"regrets {regrets[0][1]} nats (over-fitted: {regrets[1][1]})" in page
    assert f"measured loss at {100 * (rows.bound >= rows.measured).mean():.0f} % of the points" in page
