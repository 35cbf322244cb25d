"""The scenario suite at a size for tests, and what the rows of the committed one say."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from potara_lite import Setting
from potara_lite.estimators import Estimate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name, script="suite"):
    """A copy of the script as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{script}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def suite():
    return load("suite_as_committed")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The suite with one data set of three clients, a few steps each."""
    suite = load("suite_of_three_clients")
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("suite")
        patch.setattr(suite, "MODELS", folder / "models")
        patch.setattr(suite, "RESULTS", folder / "results")
        patch.setattr(suite, "ROUNDS", {"under-trained": 2, "well-trained": 6})
        patch.setattr(suite, "STEPS", {"early-stopped": (5, 5), "over-fitted": (15, 15)})
        patch.setattr(suite, "POINTS", 5)
        patch.setattr(suite, "SUITE", [suite.Data(0.5, False, 30, rank=2)])
        patch.setattr(suite, "SEEDS", [0])
        tiny = dict(clients=3, calibration_size=8, test_size=40, round_steps=2)
        patch.setattr(
            suite, "settings", lambda data: Setting(alpha=data.alpha, train_size=data.train_size, rank=2, **tiny)
        )
        yield suite


@pytest.fixture(scope="module")
def rows(small):
    return small.measure(small.SUITE[0], 0)


def test_there_is_a_row_for_every_estimator_federation_and_client(small, rows):
    counts = rows.groupby(["estimator", "federated", "local"]).client.agg(list)
    assert len(counts) == 4 * len(small.ESTIMATORS) and all(clients == [0, 1, 2] for clients in counts)
    assert rows.weight.between(0, 1).all() and np.isfinite(rows.regret).all()


def test_a_single_weight_never_beats_the_oracle_and_the_ends_are_the_models(rows):
    apart = rows.estimator.isin(["pooled, head and body apart", "gauss-newton by layer", "fisher by layer, held-out"])
    assert (rows[~apart].regret > -1e-4).all()
    assert rows[~apart].regret.max() > 0.01
    ends = rows[rows.estimator.isin(["local alone", "federated alone"])]
    assert not ends.beats_both.any()
    assert (ends.groupby(["federated", "local", "client"]).regret.min() < 1e-4)[  # one end is best, or neither
        ~ends.groupby(["federated", "local", "client"]).oracle_beats_both.first()
    ].all()


def test_the_losses_are_those_of_the_merges(small, rows):
    """One weight for all, once through the curves and once, as a weight by group, through the merge itself."""
    weights = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)  # of the grid, where the spline is the curve

    def by_tensor(model, federated, local, data):
        names = {name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for name in federated}
        return Estimate(dict.fromkeys(names, weights), details={"client": weights})

    both = {"on the curve": lambda *a: Estimate(weights), "merged": by_tensor}
    found = small.measure(small.SUITE[0], 0, both).set_index("estimator")
    for column in ("loss", "accuracy", "regret"):
        assert found.loc["on the curve", column].values == pytest.approx(found.loc["merged", column].values, abs=1e-5)
    assert found.loc["on the curve", "beats_both"].tolist() == found.loc["merged", "beats_both"].tolist()


def test_trained_models_are_kept_and_the_shared_gradients_change_nothing(small, rows, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(small, "train", refuse)
    monkeypatch.setattr(small, "fedit", refuse)
    name = "gradient, held-out"
    alone = small.measure(small.SUITE[0], 0, {name: small.ESTIMATORS[name]})
    shared = rows[rows.estimator == name].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, shared, rtol=1e-9)
    modules = [getattr(small.estimators, name) for name in ("paper", "alternatives")]
    before = [module.per_sample_gradients for module in modules]
    with small.remembering():
        inside = {module.per_sample_gradients for module in modules}
        assert len(inside) == 1 and inside.isdisjoint(before)
        curves = [getattr(small.estimators, name).segment_losses for name in ("curve", "calibrated")]
        assert len(set(curves)) == 1
    assert [module.per_sample_gradients for module in modules] == before


def test_the_report_is_means_over_the_rows(small, rows):
    table = small.report(rows)
    assert list(table.index) == list(small.ESTIMATORS)
    some = rows[rows.estimator == "uniform"]
    line = table.loc["uniform"]
    single = rows[rows.estimator == small.SINGLE].groupby(["federated", "local"])
    assert (single.weight.nunique() == 1).all()
    assert (single.regret.mean() <= some.groupby(["federated", "local"]).regret.mean() + 1e-4).all()
    assert line["regret (nats)"] == pytest.approx(some.regret.mean())
    assert line["worst federation"] == pytest.approx(some.groupby(["federated", "local"]).regret.mean().max())
    assert line["beats both where the oracle does"] == pytest.approx(some[some.oracle_beats_both].beats_both.mean())
    assert len(small.figure(rows).axes) == 4


def test_the_command_makes_csv_and_figure_and_recomputes_nothing(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small, "HERE", tmp_path)
    monkeypatch.setattr(small, "ESTIMATORS", {k: small.ESTIMATORS[k] for k in (*small.SHOWN, "uniform")})
    monkeypatch.setattr(sys, "argv", ["suite.py"])
    measure = small.measure
    small.main()
    made = pd.read_csv(tmp_path / "suite.csv.gz")
    assert (tmp_path / "suite.png").is_file() and "uniform" in capsys.readouterr().out
    monkeypatch.setattr(small, "ESTIMATORS", {**small.ESTIMATORS, "half": small.ESTIMATORS["uniform"]})
    monkeypatch.setattr(
        small, "measure", lambda data, seed, wanted: measure(data, seed, wanted) if list(wanted) == ["half"] else None
    )
    small.main()  # a new estimator alone is computed
    rows = pd.read_csv(tmp_path / "suite.csv.gz")
    uniform, half = (small.report(rows).loc[name].drop("seeds") for name in ("uniform", "half"))
    pd.testing.assert_series_equal(uniform, half, check_names=False)
    pd.testing.assert_frame_equal(rows[rows.estimator != "half"].reset_index(drop=True), made)
    monkeypatch.setattr(small, "measure", None)
    small.main()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "suite.csv.gz"), rows)


@pytest.fixture(scope="module")
def committed():
    return pd.read_csv(BENCHMARKS / "suite.csv.gz")


def test_the_committed_suite_is_whole_and_of_one_training(suite, committed):
    found = committed.groupby("estimator")[["data", "federated", "local", "seed", "client"]].agg(lambda c: c.nunique())
    assert set(found.index) == set(suite.ESTIMATORS)
    for name, counts in found.iterrows():
        assert counts.tolist() == [len(suite.SUITE), 2, 2, len(suite.seeds_of(name)), 8]
        assert (committed.estimator == name).sum() == counts.prod()
    client = [*suite.FEDERATION, "seed", "client"]
    best = (committed.loss - committed.regret).groupby([committed[name] for name in client])
    assert (best.max() - best.min()).max() < 1e-3  # to the digits of the rows


def test_the_default_is_the_best_estimator_of_the_committed_suite(suite, committed):
    seeds = committed.groupby(["estimator", "seed"])[["regret", "accuracy"]].mean()
    for other in ("pooled", "best single λ, held-out", "uniform", suite.PAPER):
        gap = seeds.loc[other] - seeds.loc[suite.DEFAULT]
        assert gap.regret.mean() > 2 * gap.regret.sem() and -gap.accuracy.mean() > 2 * gap.accuracy.sem()
    helped = suite.clients_helped(committed)
    assert 0.9 < helped.beats_both.mean() < 0.95 < helped[helped.gain > 0.005].beats_both.mean()
    worst = suite.regret_by_federation(committed)[suite.DEFAULT].nlargest(5).index
    hard = [("alpha0.1" in data or "shift" in data) and local == "over-fitted" for data, _, local in worst]
    assert sum(hard) == 4 and hard[0]


def test_estimates_of_one_client_alone_are_worse_than_one_weight_for_all(suite, committed):
    report = suite.report(committed)
    regret = report["regret (nats)"]
    curvature = [n for n in regret.index if n.startswith(("fisher", "laplace", "gradient", "gauss", "james"))]
    assert len(curvature) == 14 and (regret[curvature] > regret["uniform"]).all()
    alone = [*curvature, "uniform", "curve, parabola", "curve, grid"]
    assert (regret[alone] > regret["best single λ, held-out"]).all()
    in_fisher = [f"gradient, held-out, {kind} inverse-Fisher metric" for kind in ("unbiased,", "cross-fitted")]
    assert regret[in_fisher[0]] > regret[in_fisher[1]] > regret["gradient, held-out"]
    assert report["λ − oracle λ"][suite.PAPER] > 0.1
    assert 0.7 * regret[suite.PAPER] < regret["fisher, held-out"] < regret[suite.PAPER]
    assert regret["fisher, training samples, damping 1e-8"] > regret["local alone"]


def test_only_few_examples_are_over_fitted(committed):
    local = committed[committed.estimator == "local alone"].groupby(["data", "local"]).loss.mean().unstack()
    longer = local["over-fitted"] - local["early-stopped"]
    assert longer["alpha1-plain-n1000-r4"] < 0 < longer["alpha1-plain-n100-r4"]


def test_the_default_costs_less_than_the_papers_least(suite):
    shares = json.loads((BENCHMARKS / "suite_timing.json").read_text())["share_of_training"]
    assert shares[suite.DEFAULT] < 0.08  # the least that is reported of the paper's
