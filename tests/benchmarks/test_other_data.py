"""The benchmark of the default weight on other data: small, and what its committed rows say."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_results import ROOT, script

from potara_lite import fashion_mnist
from potara_lite.setting import Setting


@pytest.fixture(scope="module")
def other_data():
    return script("other_data")


@pytest.fixture(scope="module")
def committed():
    return pd.read_csv(ROOT / "benchmarks" / "other_data.csv.gz")


def test_every_estimator_is_scored_on_both_pairs(other_data, monkeypatch):
    monkeypatch.setattr(other_data, "Setting", lambda: Setting(rounds=2, rank=2))
    monkeypatch.setattr(other_data, "STEPS", {"default": 3, "over-fitted": 6})
    federation = fashion_mnist(clients=2, train_size=12, calibration_size=6, test_size=10)
    rows = other_data.measure(other_data.CASES[0], 0, federation, None)
    assert len(rows) == 2 * len(other_data.NAMES) * 2 and set(rows.estimator) == set(other_data.NAMES)
    assert (rows[rows.estimator == "uniform"].weight == 0.5).all()
    ends = rows[rows.estimator.isin(["local alone", "federated alone"])].groupby(["local", "client"])
    least = ends.loss.min().rename("least")
    joined = rows.join(least, on=["local", "client"])
    assert (joined.beats_both == (joined.loss < joined.least)).all()


def test_the_table_by_hand(other_data):
    def some(name, regret, seed, beats=True, local="default"):
        columns = dict(source="a", alpha=0.3, shift=False, local=local, seed=seed, estimator=name, client=0)
        return columns | dict(regret=regret, beats_both=beats, oracle_beats_both=True)

    names = list(other_data.NAMES)
    rows = [some(name, 0.1, seed) for name in names for seed in (5, 6)]
    default = next(name for name, short in other_data.NAMES.items() if short == "default")
    rows += [some("local alone", 0.0, seed, local="over-fitted") for seed in (5, 6)]
    rows += [some("federated alone", 0.0, 6, local="over-fitted"), some("federated alone", 0.1, 5, local="over-fitted")]
    rows += [some(default, 0.3, 5, beats=False, local="over-fitted"), some(default, 0.5, 6, local="over-fitted")]
    line = other_data.table(pd.DataFrame(rows)).loc["a"]
    assert line["λ = ½"] == pytest.approx(0.1) and line["default"] == pytest.approx(0.25)
    assert line["default, worst"] == pytest.approx(0.4) and line["beats both"] == pytest.approx(0.75)
    assert line["gain > 0.005"] == 1  # over-fitted, one model is as good as the oracle
    assert line["default ±"] == pytest.approx(np.std([0.2, 0.3], ddof=1) / 2**0.5)


def test_the_sources_are_what_they_are_called(other_data):
    x, y = torch.arange(10.0).view(10, 1), torch.arange(10)
    first, second = other_data.halves(x, y, 4)
    assert len(first[1]) == 4 and sorted([*first[1].tolist(), *second[1].tolist()]) == list(range(10))
    assert torch.equal(first[0].flatten(), first[1].float())
    pool = torch.rand(1150, 1, 28, 28), torch.arange(1150) % 10
    dealt = other_data.federation_of(other_data.Case("digits", 2.0), 5, {"digits": [pool, pool]})
    assert len(dealt) == 6 and dealt.train.sizes.tolist() == [60] * 6


def test_the_committed_rows_are_whole(other_data, committed):
    assert sorted(committed.seed.unique()) == sorted([*other_data.FRESH, *other_data.DESIGN])
    counts = committed.groupby([*other_data.FEDERATION, "seed"]).estimator.nunique()
    assert (counts == len(other_data.NAMES)).all()


def test_the_default_holds_on_fresh_seeds(other_data, committed):
    fresh = committed[committed.seed.isin(other_data.FRESH)]
    table = other_data.table(fresh)
    for other in ("λ = ½", "paper's", "client's curve"):
        assert (table["default"] < table[other]).all()
    above = table["default"] - table["best single λ (test data)"]
    assert (above < 0.002).sum() == 3 and above.idxmax() == "digits"
    above_half = other_data.above_half(fresh)
    worse = above_half.index[above_half > 0]
    assert {source for source, *_ in worse} == {"grey CIFAR-10"}
    assert worse[-1] == ("grey CIFAR-10", 2.0, False, "default")
