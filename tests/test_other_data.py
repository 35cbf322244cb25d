"""The benchmark of the default weight on other data: small, and that the page says what its rows say."""

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


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs" / "mixing_weight.md").read_text()


def test_a_cell_judges_every_estimator_on_both_pairs(other_data, monkeypatch):
    monkeypatch.setattr(other_data, "Setting", lambda: Setting(rounds=2, rank=2))
    monkeypatch.setattr(other_data, "STEPS", {"default": 3, "over-fitted": 6})
    federation = fashion_mnist(clients=2, train_size=12, calibration_size=6, test_size=10)
    rows = other_data.cell(other_data.CASES[0], 0, federation, None)
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


def test_the_page_has_the_tables_of_the_committed_rows(other_data, committed, page):
    for seeds in (other_data.FRESH, other_data.DESIGN):
        some = committed[committed.seed.isin(seeds)]
        assert sorted(some.seed.unique()) == sorted(seeds)
        assert other_data.markdown(other_data.table(some), digits=4) in page
    cells = committed.groupby(["source", "alpha", "shift", "local", "seed"]).estimator.nunique()
    assert (cells == len(other_data.NAMES)).all()


def test_what_the_page_says_of_the_default_is_in_the_rows(other_data, committed, page):
    fresh = committed[committed.seed.isin(other_data.FRESH)]
    assert sorted(fresh.seed.unique()) == [5, 6, 7, 8, 9] and "on seeds 5 to 9" in page
    table, text = other_data.table(fresh), " ".join(page.split())
    for other in ("λ = ½", "paper's", "own curve"):
        assert (table["default"] < table[other]).all()
    means = [f"{table.default[name]:.4f}" for name in ("Fashion-MNIST", "digits", "grey CIFAR-10", "small backbone")]
    said = f"The mean is {', '.join(means[:3])} and {means[3]} from source to source, {table.default.mean():.4f} over"
    assert said in text and f"the worst federation has {table['default, worst'].max():.4f}" in text
    above = table["default"] - table["best single λ (test data)"]
    assert (above < 0.002).sum() == 3 and above.idxmax() == "digits"
    short = fresh.assign(estimator=fresh.estimator.map(other_data.NAMES))
    federation = ["source", "alpha", "shift", "local"]
    regret = short.groupby([*federation, "estimator"]).regret.mean().unstack()
    worse = (regret.default - regret["λ = ½"]).sort_values()
    assert f"Of {len(worse)} federations it is below λ = ½ in {(worse < 0).sum()}" in text
    assert f"at most {worse.iloc[-1]:.4f} (α = 2, default length" in text
    assert worse.index[-1] == ("grey CIFAR-10", 2.0, False, "default") and worse.index[-2][0] == "grey CIFAR-10"
    own, client = short[short.estimator == "default"], [*federation, "seed", "client"]
    alone = short[short.estimator.isin(["local", "federated"])].groupby(client).regret.min().rename("gain")
    own = own.join(alone, on=client)
    shares = own[own.oracle_beats_both].beats_both.mean(), own[own.gain > other_data.WORTHWHILE].beats_both.mean()
    assert f"merge does for {100 * shares[0]:.0f} %; of those who can gain more than 0.005 nats" in text
    assert f"nats for {100 * shares[1]:.1f} %" in text and other_data.WORTHWHILE == 0.005
    assert f"alone regrets {table.federated['digits']:.3f}" in text
    design = other_data.table(committed[committed.seed.isin(other_data.DESIGN)]).default.mean()
    assert f"four is {design:.4f} there and {table.default.mean():.4f} on the fresh seeds" in text
    *few, many = 100 * script("verdicts").thirty().tables["samples-shares"].loc["calibrated"]
    assert f"the share is {', '.join(f'{share:.0f}' for share in few)} and {many:.0f} % with 5, 10, 30 and 100" in text
