"""The scenario suite at a size for tests, and that what is said of the committed one is in its rows."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from potara_lite import Setting
from potara_lite.estimators import Estimate

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


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
        patch.setattr(suite, "CELLS", folder / "cells")
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
    return small.cell(small.SUITE[0], 0)


def test_a_cell_has_a_row_for_every_estimator_federation_and_client(small, rows):
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


def test_the_losses_of_a_cell_are_those_of_the_merges(small, rows):
    """One weight for all, once through the curves and once, as a weight by group, through the merge itself."""
    weights = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)  # of the grid, where the spline is the curve

    def by_tensor(model, federated, local, data):
        names = {name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for name in federated}
        return Estimate(dict.fromkeys(names, weights), details={"client": weights})

    both = {"on the curve": lambda *a: Estimate(weights), "merged": by_tensor}
    found = small.cell(small.SUITE[0], 0, both).set_index("estimator")
    for column in ("loss", "accuracy", "regret"):
        assert found.loc["on the curve", column].values == pytest.approx(found.loc["merged", column].values, abs=1e-5)
    assert found.loc["on the curve", "beats_both"].tolist() == found.loc["merged", "beats_both"].tolist()


def test_trained_models_are_kept_and_the_shared_gradients_change_nothing(small, rows, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(small, "train", refuse)
    monkeypatch.setattr(small, "fedit", refuse)
    name = "gradient, held-out"
    alone = small.cell(small.SUITE[0], 0, {name: small.ESTIMATORS[name]})
    shared = rows[rows.estimator == name].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, shared, rtol=1e-9)
    modules = [getattr(small.estimators, name) for name in ("paper", "laplace", "gradient", "shrinkage")]
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


def test_the_command_makes_table_csv_and_figure_and_recomputes_nothing(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(small, "HERE", tmp_path)
    monkeypatch.setattr(small, "ESTIMATORS", {k: small.ESTIMATORS[k] for k in (*small.SHOWN, "uniform")})
    monkeypatch.setattr(sys, "argv", ["suite.py"])
    cell = small.cell
    small.main()
    made = {name: (tmp_path / name).read_bytes() for name in ("suite.csv.gz", "suite.md", "suite.png")}
    monkeypatch.setattr(small, "ESTIMATORS", {**small.ESTIMATORS, "half": small.ESTIMATORS["uniform"]})
    monkeypatch.setattr(
        small, "cell", lambda data, seed, wanted: cell(data, seed, wanted) if list(wanted) == ["half"] else None
    )
    small.main()  # a new estimator alone is computed
    table = (tmp_path / "suite.md").read_text()
    uniform, half = (re.search(rf"\| {name} \|(.*)", table).group(1) for name in ("uniform", "half"))
    assert uniform == half and uniform in made["suite.md"].decode()
    monkeypatch.setattr(small, "cell", None)
    small.main()
    assert (tmp_path / "suite.md").read_text() == table
    assert "| uniform |" in made["suite.md"].decode()


DEFAULT, PAPER = "pooled, head and body apart", "fisher, training samples (potara-paper)"


@pytest.fixture(scope="module")
def page():
    return " ".join((BENCHMARKS.parent / "docs" / "mixing_weight.md").read_text().split())


@pytest.fixture(scope="module")
def committed():
    return pd.read_csv(BENCHMARKS / "suite.csv.gz")


def test_the_committed_suite_is_whole_and_its_table_is_that_of_its_rows(suite, committed, page):
    table = suite.markdown(suite.report(committed), digits=4)
    assert table == (BENCHMARKS / "suite.md").read_text().strip()
    assert " ".join(table.split()) in page
    cells = committed.groupby("estimator")[["data", "federated", "local", "seed", "client"]].agg(lambda c: c.nunique())
    assert set(cells.index) == set(suite.ESTIMATORS)
    for name, counts in cells.iterrows():
        assert counts.tolist() == [len(suite.SUITE), 2, 2, len(suite.seeds_of(name)), 8]
        assert (committed.estimator == name).sum() == counts.prod()


def test_the_page_says_what_the_rows_say(suite, committed, page):
    federation = ["data", "federated", "local"]
    index = [*federation, "seed", "client"]
    report = suite.report(committed)
    seeds = committed.groupby(["estimator", "seed"])[["regret", "accuracy"]].mean()
    line = report.loc[DEFAULT]
    assert f"{line['regret (nats)']:.4f} ± {line['± over seeds']:.4f} nats, and {line['worst federation']:.4f}" in page
    each = committed.groupby(["estimator", *federation]).regret.mean().unstack("estimator")
    usable = each.drop(columns=["local alone", "federated alone", suite.SINGLE, *suite.DEAR])
    assert f"lowest regret in {(usable.idxmin(axis=1) == DEFAULT).sum()} of the {len(each)} federations" in page
    assert f"of `pooled` in {(each[DEFAULT] < each['pooled']).sum()}." in page

    def ahead(other, column, sign):
        gap = sign * (seeds[column][DEFAULT] - seeds[column][other])
        assert gap.mean() > 2 * gap.sem()
        return f"{gap.mean():.4f} ± {gap.sem():.4f}"

    others = ["pooled", "best single λ, held-out", "uniform", PAPER]
    for other, name in zip(
        others, ("of `pooled` by {} nats", "best single λ by {},", "λ = ½ by {},", "estimator by {} (")
    ):
        assert name.format(ahead(other, "regret", -1)) in page
    quoted = [ahead(other, "accuracy", 1) for other in others]
    assert f"ahead of them by {', '.join(quoted[:-1])} and {quoted[-1]}." in page

    chosen, ends = (
        committed[committed.estimator.isin(names)] for names in ([DEFAULT], ["local alone", "federated alone"])
    )
    chosen = chosen[chosen.oracle_beats_both].set_index(index)
    least = ends.groupby(index).loss.min().reindex(chosen.index)
    gain = least - (chosen.loss - chosen.regret)
    assert f"For {100 * chosen.beats_both.mean():.1f} % of the clients" in page and chosen.beats_both.mean() < 0.95
    assert f"for {100 * chosen.beats_both[gain > 0.005].mean():.1f} % of those" in page
    worse = (chosen.loss - least)[~chosen.beats_both]
    assert f"{100 * (1 - chosen.beats_both.mean()):.1f} % of those whom" in page
    assert f"by {worse.mean():.3f} nats on average, at worst by {worse.max():.2f}." in page

    best = (committed.loss - committed.regret).groupby([committed[name] for name in index])
    assert (best.max() - best.min()).max() < 1e-3  # all of one training, to the digits of the rows

    regret = report["regret (nats)"]
    curvature = [n for n in regret.index if n.startswith(("fisher", "laplace", "gradient", "gauss", "james"))]
    assert len(curvature) == 14 and (regret[curvature] > regret["uniform"]).all()
    alone = [*curvature, "uniform", "curve, parabola", "curve, grid"]
    assert (regret[alone] > regret["best single λ, held-out"]).all()
    metrics = ("unbiased, inverse-Fisher metric", "cross-fitted inverse-Fisher metric")
    own, fitted, none = (regret[f"gradient, held-out{name}"] for name in (*(f", {m}" for m in metrics), ""))
    assert (
        f"regret is {own:.3f}, with the metric cross-fitted {fitted:.3f}, and with none (the identity) {none:.3f}."
        in page
    )
    assert f"(λ is {report['λ − oracle λ'][PAPER]:.2f} above" in page
    assert 0.7 * regret[PAPER] < regret["fisher, held-out"] < regret[PAPER]
    assert regret["fisher, training samples, damping 1e-8"] > regret["local alone"]
    lost = (f"{report['worst federation'][name]:.2f}" for name in (PAPER, "gradient, training samples"))
    assert "loses {} nats in its worst federation and gradient moments {}.".format(*lost) in page
    local = committed[committed.estimator == "local alone"].groupby(["data", "local"]).loss.mean().unstack()
    assert local["over-fitted"]["alpha1-plain-n1000-r4"] < local["early-stopped"]["alpha1-plain-n1000-r4"]
    assert local["over-fitted"]["alpha1-plain-n100-r4"] > local["early-stopped"]["alpha1-plain-n100-r4"]
    worst = each[DEFAULT].sort_values().index[-5:]
    hard = [("alpha0.1" in data or "shift" in data) and local == "over-fitted" for data, _, local in worst]
    assert sum(hard) == 4 and hard[-1]


def test_the_page_quotes_the_measured_cost(page):
    shares = json.loads((BENCHMARKS / "suite_timing.json").read_text())["share_of_training"]
    assert f"{100 * shares[DEFAULT]:.1f} % of the training time" in page
    assert shares[DEFAULT] < 0.08  # the least that is reported of the paper's
    assert f"estimator, {100 * shares[PAPER]:.1f} %" in page


def test_the_readme_says_of_the_suite_what_its_rows_say(suite, committed):
    text = " ".join((BENCHMARKS.parent / "README.md").read_text().split())
    regret = suite.report(committed)["regret (nats)"]
    count = committed.groupby(["data", "federated", "local"]).ngroups
    assert f"Over {count} of them" in text
    quoted = (f"{regret[name]:.3f}" for name in (DEFAULT, "uniform", PAPER))
    assert "loses {} nats to the oracle λ, λ = ½ {}, the paper's estimator {};".format(*quoted) in text
    other, rows = load("other_data", "other_data"), pd.read_csv(BENCHMARKS / "other_data.csv.gz")
    elsewhere = other.table(rows[rows.seed.isin(other.FRESH)]).default
    words = load("language", "language").regrets(pd.read_csv(BENCHMARKS / "language-weights.csv.gz")).default["all"]
    assert f"fresh seeds {elsewhere.min():.3f} to {elsewhere.max():.3f}, on text {words:.3f}:" in text
