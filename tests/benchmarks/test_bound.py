"""The bound beside the measured loss: the script at a size for tests, and its committed rows."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from potara_lite import Setting

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


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


def test_the_committed_prediction_follows_the_measured_loss():
    rows = pd.read_csv(BENCHMARKS / "bound.csv")
    assert set(rows.regime) == {"default", "over-fitted"} and rows.client.nunique() == 8
    for _, some in rows.groupby("regime"):
        mean = some.groupby("weight")[["measured", "predicted"]].mean()
        over_clients = (mean.measured - mean.predicted).abs().max()
        assert (some.measured - some.predicted).abs().max() > over_clients < 0.15
    default = rows[rows.regime == "default"].groupby("weight")[["measured", "predicted"]].mean()
    assert default.measured.idxmin() == default.predicted.idxmin()
