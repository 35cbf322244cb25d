"""The comparison: equal budgets, rows that are computed once, and tables checked by hand."""

import copy
import json
import os
import pickle
import platform
import re
import sys
from argparse import Namespace
from dataclasses import replace
from inspect import signature

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import finished
from scipy import stats
from test_results import ROOT, script
from torch.nn import functional as F

from potara_lite.adapters.state import adapter_bytes, client_adapter, delta, flatten
from potara_lite.baselines import algorithms, methods as M
from potara_lite.baselines.sweep import COLUMNS, fingerprint, read_histories, read_results, sweep, union
from potara_lite.estimators import ESTIMATORS, Estimate, on_calibration
from potara_lite.experiment import ORACLE, Run, local_from_federated, local_model, train_pair, with_estimator
from potara_lite.federation.split import Federation, Split
from potara_lite.merging.merge import merge_exact
from potara_lite.plots import frontiers
from potara_lite.results import compare, leaderboard, paired_differences, pareto_front
from potara_lite.setting import Setting
from potara_lite.training.fedavg import fedit
from potara_lite.training.train import evaluate, train

SETTING = Setting(clients=3, batch_size=4, lr=1e-2, rounds=2, round_steps=2, local_steps=4)
ALL = M.METHODS | M.REFERENCES
PARTS = {"federated part": 4, "local part": 4}


@pytest.fixture(scope="module")
def run(adapted, federation):
    return Run(adapted, federation, SETTING, 0)


@pytest.mark.parametrize("name", ALL)
def test_every_method_takes_the_same_steps_and_gives_every_client_a_model(run, name):
    result = ALL[name](run)
    assert result.ledger.steps.tolist() == [PARTS.get(name, run.setting.total_steps)] * 3
    for client in range(3):
        x, y = run.federation.test.client(client)
        assert F.cross_entropy(result.adapted(client_adapter(result.adapters, client), x), y).isfinite()
    assert result.seconds >= 0 and (result.weight is None or result.weight.shape == (3,))


def test_potara_pays_two_thirds_of_fedits_bytes(adapted, federation):
    run = Run(adapted, federation, replace(SETTING, rounds=4), 0)  # 8 federated steps, 4 local ones
    potara, other = (M.METHODS[name](run).ledger for name in ("potara-calibrated", "FedIT"))
    size = adapter_bytes(adapted.initial)
    estimate = ESTIMATORS["potara-calibrated"](adapted, *run.pair.models, federation)
    up, down = estimate.floats
    assert up > 0 and potara.up.tolist() == [4 * size + 4 * up] * 3 and potara.down[0] == 5 * size + 4 * down
    assert other.up.tolist() == [6 * size] * 3


def test_methods_are_what_they_are_called(run):
    pair = train_pair(run.adapted, run.federation, SETTING, 0)
    assert torch.equal(flatten(M.METHODS["local part"](run).adapters), flatten(pair.local))
    assert torch.equal(flatten(M.METHODS["federated part"](run).adapters), flatten(pair.federated))
    half = merge_exact(pair.federated, pair.local, 0.5)
    torch.testing.assert_close(flatten(M.METHODS["uniform"](run).adapters), flatten(half), rtol=1e-5, atol=1e-7)
    longer = fedit(run.adapted, run.federation.train, rounds=4, local_steps=2, batch_size=4, lr=1e-2).adapter
    found = M.FAMILIES["FedIT"](lr_scale=1)(run).adapters
    assert all(torch.allclose(found[name][1], tensor, rtol=1e-5, atol=1e-7) for name, tensor in longer.items())


def test_a_local_model_trained_from_the_federated_one_is_fine_tuning(run):
    """At weight 0 it is the fine-tuned model, but for the order of the batches; at weight 1 the federated one."""

    def merged(weight, lr_scale=1.0):
        return with_estimator(lambda *_: Estimate(torch.full((3,), weight)), model_pair=local_from_federated(lr_scale))

    def fine_tuned(lr):
        options = dict(steps=4, batch_size=4, lr=lr, seed=(0, 1))
        return delta(train(run.adapted, run.pair.federated, run.federation.train, **options).adapters, scaling)

    scaling = run.adapted.scaling
    found = {weight: delta(merged(weight)(run).adapters, scaling) for weight in (0.0, 1.0)}
    torch.testing.assert_close(found[0.0], fine_tuned(1e-2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1.0], delta(run.pair.federated, scaling), rtol=1e-5, atol=1e-6)
    assert merged(0.0)(run).ledger.steps.tolist() == [SETTING.total_steps] * 3
    half = replace(run, setting=replace(SETTING, lr=5e-3, federated_lr_scale=2.0))  # another run has models of its own
    for other in (merged(0.0)(half), merged(0.0, lr_scale=0.5)(run)):
        torch.testing.assert_close(delta(other.adapters, scaling), fine_tuned(5e-3), rtol=1e-5, atol=1e-6)


def test_the_setting_starts_the_local_models_from_the_federated_one(run):
    """As the comparison's pair does it; the local model then costs what the federated one cost as well."""
    setting = replace(SETTING, local_from_federated=True)
    pair, expected = train_pair(run.adapted, run.federation, setting, 0), run.pair_from_federated()
    assert torch.equal(flatten(pair.federated), flatten(run.pair.federated))
    assert torch.equal(flatten(pair.local), flatten(expected.local))
    assert not torch.equal(flatten(pair.local), flatten(run.pair.local))
    alone, after = (local_model(replace(run, setting=s)).ledger for s in (SETTING, setting))
    assert alone.up.eq(0).all() and alone.steps.tolist() == [SETTING.local_steps] * 3
    assert torch.equal(after.up, pair.ledgers[0].up) and after.steps.tolist() == [SETTING.total_steps] * 3
    merged = with_estimator(lambda *_: Estimate(torch.full((3,), 0.5)))(replace(run, setting=setting)).ledger
    assert merged.steps.tolist() == [SETTING.total_steps] * 3  # the federated steps once


def test_the_two_models_of_a_pair_may_have_learning_rates_of_their_own(adapted, federation):
    one, two = (train_pair(adapted, federation, setting, 0) for setting in (SETTING, replace(SETTING, lr=5e-3)))
    mixed = train_pair(adapted, federation, replace(SETTING, local_lr_scale=0.5), 0)
    assert torch.equal(flatten(mixed.federated), flatten(one.federated))
    assert torch.equal(flatten(mixed.local), flatten(two.local))
    mixed = train_pair(adapted, federation, replace(SETTING, federated_lr_scale=0.5), 0)
    assert torch.equal(flatten(mixed.federated), flatten(two.federated))
    assert torch.equal(flatten(mixed.local), flatten(one.local))


@pytest.mark.parametrize("family", ["FedIT, fine-tuned", "FedProx, fine-tuned", "WiSE-FT"])
def test_more_rounds_leave_fewer_steps_for_the_fine_tuning(run, family):
    """Two or three rounds of two steps, of eight steps in all."""
    size = adapter_bytes(run.adapted.initial)
    for rounds, number in ((1, 2), (1.5, 3)):
        result = M.FAMILIES[family](lr_scale=1, rounds_scale=rounds)(run)
        assert result.ledger.up.tolist() == [number * size] * 3 and result.ledger.steps.tolist() == [8] * 3


def test_a_budget_that_rounds_cannot_fill_is_refused(adapted, federation):
    run = Run(adapted, federation, replace(SETTING, local_steps=3), 0)
    with pytest.raises(ValueError, match="Ditto: rounds of 4 steps do not make 7"):
        M.from_algorithm(algorithms.ditto())(run)


def test_learning_rates_are_in_units_of_the_settings(run):
    half = replace(run, setting=replace(run.setting, lr=run.setting.lr / 2))
    for family in ("FedSA-LoRA", "local"):
        found = [
            M.FAMILIES[family](lr_scale=1)(half),
            M.FAMILIES[family](lr_scale=0.5)(run),
            M.FAMILIES[family](lr_scale=1)(run),
        ]
        one, two, other = (flatten(result.adapters) for result in found)
        assert torch.equal(one, two) and (one - other).abs().max() > 1e-3


def test_fisher_merging_of_one_client_is_fisher_merging(adapted64, federation64):
    """By hand: both deltas in full, the Fisher of every entry, their weighted mean; their mean where both are zero."""
    from potara_lite.estimators.curve import client_logits
    from potara_lite.training.gradients import delta_gradients

    run = Run(adapted64, federation64, SETTING, 0)
    pair, adapted = run.pair, run.adapted
    merged = delta(M.METHODS["Fisher merging"](run).adapters, adapted.scaling)
    both = [delta(model, adapted.scaling) for model in (pair.federated, pair.local)]
    samples = run.federation.calibration
    fishers = []
    for model in (pair.federated, pair.local):
        p, total = client_logits(adapted, model, samples).softmax(-1), 0
        for label in range(4):  # the expectation over the model's own labels
            labels = torch.where(samples.y < 0, samples.y, label)
            gradients = delta_gradients(adapted, model, samples, labels=labels)
            total = total + (p[..., label, None] * gradients.square()).sum(1) / samples.sizes.unsqueeze(1)
        fishers.append(total)
    flat = [torch.cat([t.flatten(1) for t in change.values()], 1) for change in both]
    total = fishers[0] + fishers[1]
    weighted = (fishers[0] * flat[0] + fishers[1] * flat[1]) / total
    expected = torch.where(total > 0, weighted, (flat[0] + flat[1]) / 2)
    found = torch.cat([merged[name].flatten(1) for name in both[0]], 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_union_is_everybodys_first_examples(federation):
    shared = union(federation.test, 5)  # sizes 7, 4 and 6
    assert shared.sizes.tolist() == [14] * 3 and shared.x.shape[:2] == (3, 14)
    expected = torch.cat([federation.test.x[i, :n] for i, n in enumerate((5, 4, 5))])
    for client in range(3):
        assert torch.equal(shared.x[client], expected)
    assert (shared.y >= 0).all()


def few(*names):
    return {name: M.METHODS[name] for name in names}


@pytest.fixture
def prepared(adapted, federation):
    return lambda setting, seed: (adapted, federation)


def test_a_sweep_gives_a_row_per_client_and_never_computes_twice(tmp_path, prepared):
    calls = []

    def counted(name):
        def method(run):
            calls.append((name, run.seed))
            return M.METHODS[name](run)

        return method

    names, settings = ("local", "uniform"), {"one": SETTING, "two, longer": replace(SETTING, rounds=3)}
    methods = {name: counted(name) for name in names}
    rows = sweep(methods, settings, [0, 1], tmp_path, prepare=prepared)
    assert list(rows.columns) == COLUMNS and len(rows) == 2 * 2 * 2 * 3 and len(calls) == 8
    assert rows.groupby(["federation", "method", "seed"]).client.apply(list).map(lambda c: c == [0, 1, 2]).all()
    assert rows[rows.method == "uniform"].weight.eq(0.5).all() and rows[rows.method == "local"].weight.isna().all()
    again = sweep(methods, settings, [0, 1], tmp_path, prepare=prepared)
    pd.testing.assert_frame_equal(rows, again)
    assert len(calls) == 8
    more = sweep(methods, settings, [0, 1, 2], tmp_path, prepare=prepared, shard=(1, 2))
    assert calls[8:] == [("local", 2), ("uniform", 2)]  # of six runs the second, fourth and sixth
    assert len(more) == len(read_results(tmp_path)) == 30
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="shard"):
            sweep(methods, settings, [0], tmp_path, prepare=prepared, shard=shard)
    with pytest.raises(ValueError, match="seeds must differ"):
        sweep(methods, settings, [3, 3], tmp_path, prepare=prepared)
    for name in ("..", ".", "", "!!!"):
        with pytest.raises(ValueError, match="can name no file"):
            sweep(methods, {name: SETTING}, [0], tmp_path / "sub", prepare=prepared)
    assert not (tmp_path / "sub").exists()
    with pytest.raises(ValueError, match="another setting"):
        sweep(methods, {"one": replace(SETTING, lr=1e-3)}, [0], tmp_path, prepare=prepared)
    with pytest.raises(ValueError, match="must differ in letters or digits"):
        sweep({"a, b": methods["local"], "a b": methods["local"]}, settings, [0], tmp_path, prepare=prepared)


def test_a_sweep_keeps_the_histories_and_computes_the_same(tmp_path, prepared):
    methods = few("local", "uniform", "FedIT")
    options = dict(prepare=prepared)
    plain = sweep(methods, {"one": SETTING}, [0, 1], tmp_path / "plain", **options)
    rows = sweep(methods, {"one": SETTING}, [0, 1], tmp_path / "kept", eval_every=1, **options)
    pd.testing.assert_frame_equal(plain.drop(columns="seconds"), rows.drop(columns="seconds"))
    histories = read_histories(tmp_path / "kept")
    assert (
        set(histories.method) == set(methods) and set(histories.seed) == {0, 1} and set(histories.client) == {0, 1, 2}
    )
    last = histories[(histories.method == "FedIT") & (histories["round"] == histories["round"].max())]
    expected = rows[rows.method == "FedIT"].sort_values(["seed", "client"])
    np.testing.assert_allclose(last.sort_values(["seed", "client"]).loss, expected.loss, rtol=1e-6)
    assert read_histories(tmp_path / "plain").empty


def test_what_was_interrupted_goes_on_and_half_a_file_is_not_read(tmp_path, prepared):
    def broken(run):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(few("local") | {"uniform": broken}, {"one": SETTING}, [0], tmp_path, prepare=prepared)
    assert set(read_results(tmp_path).method) == {"local"}
    left = tmp_path / "one" / "seed-0" / f"uniform.csv.{platform.node()}.{2**22 + 1}.part"  # above all processes
    left.write_text("federation,method\none,unif")
    rows = sweep(few("local", "uniform"), {"one": SETTING}, [0], tmp_path, prepare=prepared)
    assert set(rows.method) == {"local", "uniform"} and len(rows) == 6 and not rows.accuracy.isna().any()
    assert not left.exists()
    clean = sweep(few("local", "uniform"), {"one": SETTING}, [0], tmp_path / "clean", prepare=prepared)
    pd.testing.assert_frame_equal(rows.drop(columns="seconds"), clean.drop(columns="seconds"))


@pytest.mark.parametrize("harm", ["cut", "doubled", "number", "headless", "copied"])
def test_a_result_file_that_was_harmed_is_refused_by_name(tmp_path, prepared, harm):
    settings = {"one": SETTING, "two": SETTING}
    sweep(few("local", "uniform"), settings, [0], tmp_path, prepare=prepared)
    path = tmp_path / "one" / "seed-0" / "local.csv"
    text = path.read_text()
    harmed = {
        "cut": text[: len(text) // 2],
        "doubled": text + text.split("\n", 2)[2],
        "number": text.replace("0.", "1.", 1),
        "headless": text.split("\n", 1)[1],
        "copied": (tmp_path / "two" / "seed-0" / "local.csv").read_text(),
    }
    path.write_text(harmed[harm])
    for read in (read_results, lambda folder: sweep(few("local"), settings, [0], folder, prepare=prepared)):
        with pytest.raises(ValueError, match="local.csv (is damaged|holds the rows of another file)"):
            read(tmp_path)
    path.unlink()
    assert len(sweep(few("local"), settings, [0], tmp_path, prepare=prepared)) == 12


def test_a_result_file_is_computed_again_when_what_made_it_changes(tmp_path, prepared, monkeypatch):
    calls = []

    def method(option):
        def run(run):
            calls.append(option)
            return M.METHODS["local"](run)

        return run

    def once(function, **options):
        before = len(calls)
        sweep({"mine": function}, {"one": SETTING}, [0], tmp_path, **{"prepare": prepared, **options})
        return len(calls) - before

    assert [once(method(1)), once(method(1)), once(method(2)), once(method(2))] == [1, 0, 1, 0]
    assert once(method(2), eval_split=lambda data: data.calibration) == 1
    assert once(method(2), prepare=lambda setting, seed: prepared(setting, seed)) == 1
    monkeypatch.setattr("potara_lite.baselines.sweep.__version__", "0.0")
    assert [once(method(2)), once(method(2))] == [1, 0]


@pytest.mark.parametrize(
    "part", ["labels", "inputs", "test labels", "a weight", "the initial adapter", "the ids", "alpha", "the task"]
)
def test_results_of_other_data_or_weights_are_computed_again(tmp_path, adapted, federation, part):
    """What ``prepare`` reads may have changed while its code is the same: a table that was cleaned once more, say."""
    calls = []

    def method(run):
        calls.append(run.seed)
        return M.METHODS["local"](run)

    def changed():
        model, data = adapted, federation
        if part == "the ids":
            return model, Federation(*(Split(s.examples, (4, 5, 6)) for s in vars_of(data)), data.classes, data.name)
        if part == "a weight":
            model = copy.deepcopy(adapted)
            next(iter(model.model.parameters())).data.flatten()[0] += 1e-3
        elif part == "alpha":
            model = replace(adapted, scaling={layer: 2 * value for layer, value in adapted.scaling.items()})
        elif part == "the task":
            model = replace(
                adapted, task=replace(adapted.task, loss=lambda z, y: 2 * F.cross_entropy(z, y, reduction="none"))
            )
        elif part == "the initial adapter":
            model = replace(adapted, initial={n: t + 1e-3 * (".lora_A" in n) for n, t in adapted.initial.items()})
        else:
            splits = list(vars_of(data))
            at = 2 if part == "test labels" else 0
            x, y = splits[at].client(1)
            examples = list(splits[at].examples)
            examples[1] = (1 - x, y) if part == "inputs" else (x, (y + 1) % 4)
            splits[at] = Split(examples)
            data = Federation(*splits, data.classes, data.name)
        return model, data

    def vars_of(data):
        return data.train, data.calibration, data.test

    now = adapted, federation
    options = dict(prepare=lambda setting, seed: now)
    sweep({"mine": method}, {"one": SETTING}, [0], tmp_path, **options)
    sweep({"mine": method}, {"one": SETTING}, [0], tmp_path, **options)
    assert len(calls) == 1
    now = changed()
    sweep({"mine": method}, {"one": SETTING}, [0], tmp_path, **options)
    assert len(calls) == 2


def test_fingerprints_tell_the_methods_apart_and_are_the_same_in_another_process():
    prints = {name: fingerprint(method) for name, method in (M.METHODS | M.REFERENCES).items()}
    assert len(set(prints.values())) == len(prints)
    assert fingerprint(M.FAMILIES["Ditto"](strength=0.1)) != fingerprint(M.FAMILIES["Ditto"](strength=0.2))
    code = (
        "from potara_lite.baselines import methods as M, sweep as S\n"
        "print(*(S.fingerprint(method) for method in (M.METHODS | M.REFERENCES).values()))"
    )
    command = [sys.executable, "-c", code]
    found = finished(command, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert found.stdout.split() == list(prints.values())

    def loop(run):
        return loop

    assert fingerprint(loop) == fingerprint(loop)


def test_without_rows_of_the_local_method_nothing_is_said_of_better(federation):
    board = leaderboard(table([[0.5, 0.7]], "mine"))
    assert board.better.isna().all() and board.accuracy.item() == pytest.approx(0.6)
    with pytest.raises(ValueError, match="per_client must be at least 1, not 0"):
        union(federation.test, 0)


def test_rows_are_judged_on_the_split_that_is_asked_for(tmp_path, prepared, run):
    rows = sweep(
        few("local"),
        {"one": SETTING},
        [0],
        tmp_path,
        prepare=prepared,
        eval_split=lambda data: data.calibration,
        union_size=2,
    )
    result = M.METHODS["local"](run)
    for client in range(3):
        model = client_adapter(result.adapters, client)
        for split, column in ((run.federation.calibration, ""), (union(run.federation.calibration, 2), "union_")):
            x, y = split.client(client)
            logits = run.adapted(model, x)
            assert rows[f"{column}loss"][client] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-4)
            assert rows[f"{column}accuracy"][client] == pytest.approx(float((logits.argmax(1) == y).float().mean()))


def table(accuracies, method, federation="f"):
    """Rows of one method from a matrix of accuracies (seeds, clients)."""
    lines = [
        [federation, method, seed, client, value, 1 - value, value / 2, 1.0, np.nan, 10, 20, 5, 1.0]
        for seed, row in enumerate(accuracies)
        for client, value in enumerate(row)
    ]
    return pd.DataFrame(lines, columns=COLUMNS)


def test_the_leaderboard_by_hand():
    local = table([[0.5, 0.7], [0.6, 0.8]], "local")
    other = table([[0.6, 0.6], [0.9, 0.9]], "m")
    board = leaderboard(pd.concat([local, other])).loc["f"]
    assert list(board.index) == ["m", "local"]
    row = board.loc["m"]
    assert row.accuracy == pytest.approx(0.75) and row["±"] == pytest.approx(0.15)  # seed means 0.6 and 0.9
    assert row.worst == pytest.approx(0.75) and row.bottom == pytest.approx(0.6)
    assert row.better == pytest.approx(0.75) and board.loc["local"].better == 0
    assert row["union"] == pytest.approx(0.375) and row["bytes"] == 30


def test_the_bottom_tenth_is_of_all_clients_of_all_seeds():
    values = np.linspace(0, 0.95, 20).reshape(2, 10)
    board = leaderboard(pd.concat([table(values, "m"), table(values, "local")]))
    assert board.loc[("f", "m")].bottom == pytest.approx((0.0 + 0.05) / 2)


def test_what_no_method_beats_is_on_the_pareto_front():
    def line(method, accuracy, size):
        return table([[accuracy, accuracy], [accuracy, accuracy]], method).assign(bytes_up=size, bytes_down=0)

    rows = pd.concat(
        [
            line("local", 0.5, 0), line("cheap", 0.7, 10), line("as good, dearer", 0.7, 20), line("worse", 0.6, 10),
            line("best", 0.8, 30), line("twin of best", 0.8, 30), line(ORACLE, 0.9, 1),
        ]
    )  # fmt: skip
    board = leaderboard(rows)
    found = pareto_front(board)
    assert set(found[found].index.get_level_values("method")) == {"local", "cheap", "best", "twin of best"}
    figure = frontiers(board, found, highlight="worse", references=[ORACLE])
    panel = figure.axes[0]
    assert {text.get_text() for text in panel.get_legend().get_texts()} == {
        "local",
        "cheap",
        "best",
        "twin of best",
        "worse",
    }
    stairs = next(line for line in panel.lines if line.get_drawstyle() == "steps-post").get_xydata()
    assert stairs[:, 1].tolist() == pytest.approx([0.5, 0.7, 0.8, 0.8])
    drawn = np.concatenate([line.get_ydata() for line in panel.lines])
    assert drawn.min() == pytest.approx(0.5) and drawn.max() == pytest.approx(0.8)  # not the reference


def test_the_overview_by_hand():
    comparison = script("comparison")
    rows = [
        table([[0.5, 0.7], [0.7, 0.7]], "local"),
        table([[0.6, 0.8], [0.9, 0.9]], "m"),
        table([[0.95] * 2] * 2, ORACLE),
    ]
    rows += [table([[0.9, 0.9], [0.9, 0.9]], "local", "g"), table([[0.2, 0.4], [0.4, 0.6]], "m", "g")]
    found = comparison.overview(leaderboard(pd.concat([*rows, table([[0.9] * 2] * 2, ORACLE, "g")])))
    assert list(found.index) == [ORACLE, "local", "m"]
    assert found.loc["m"].tolist() == ["0.00", "**0.800 ± 0.100**", "0.400 ± 0.100", "0.525", "0.500", "0.300", "0.400"]
    assert found.loc["local", "g"] == "**0.900 ± 0.000**" and found.loc[ORACLE, "f"] == "0.950 ± 0.000"


def test_what_survives_on_other_data_by_hand(monkeypatch):
    comparison = script("comparison")
    monkeypatch.setattr(comparison, "FOLLOWED", ["a", "c"])

    def rows(federation, **accuracies):
        lines = [table([[accuracy] * 2] * 2, name, federation) for name, accuracy in accuracies.items()]
        return pd.concat([*lines, table([[0.99] * 2] * 2, ORACLE, federation)])

    lab = pd.concat([rows("f", a=0.9, b=0.8, c=0.7, d=0.6), rows("g", a=0.9, b=0.8, c=0.7)])
    other = pd.concat([rows("f", a=0.5, b=0.8, c=0.7), rows("g", a=0.3, b=0.2, c=0.1)])
    found = comparison.survives(lab, other)  # d is on one of them only; the reference has no place
    assert found.loc["f"].tolist() == [pytest.approx(-0.5), "1 → 3", "3 → 2"]
    assert found.loc["g"].tolist() == [pytest.approx(1.0), "1 → 1", "3 → 3"]


def test_the_comparison_on_grey_images_has_the_federations_of_the_lab(monkeypatch):
    comparison, pool = script("comparison"), (torch.rand(400, 1, 28, 28), torch.arange(400) % 10)
    monkeypatch.setattr("other_data.cifar10", lambda place: [pool, pool] if place == "there" else 1 / 0)
    assert comparison.SCALES["grey-cifar10"].items() <= comparison.SCALES["lab"].items()
    setting = replace(comparison.LAB, clients=2, train_size=8, calibration_size=4, test_size=8)
    adapted, federation = comparison.prepare_grey("there", setting, 0)
    assert federation.name == "grey CIFAR-10" and federation.train.y.shape == (2, 8)
    assert adapted.initial.keys() == comparison.prepare(setting, 0)[0].initial.keys()


def test_paired_differences_are_a_paired_t_test_over_seeds_with_holms_correction():
    rng = np.random.default_rng(0)
    own, *others = (rng.normal(mean, 0.02, (5, 4)) for mean in (0.8, 0.7, 0.79, 0.8))
    rows = pd.concat([table(own, "potara-calibrated"), *(table(values, f"m{i}") for i, values in enumerate(others))])
    found = paired_differences(rows)
    p = [stats.ttest_rel(own.mean(1), values.mean(1)).pvalue for values in others]
    np.testing.assert_allclose(found.p, p, rtol=1e-9)
    order = np.argsort(p)
    holm = np.empty(3)
    holm[order] = np.minimum(np.maximum.accumulate(np.array(p)[order] * [3, 2, 1]), 1)
    np.testing.assert_allclose(found["p (Holm)"], holm, rtol=1e-9)
    np.testing.assert_allclose(found.difference, [(own - values).mean() for values in others], rtol=1e-9)


def fake_cifar100(root, monkeypatch, train=400, test=200):
    """Small files in the format of CIFAR-100's Python version, and the checksums that torchvision expects of them."""
    import hashlib

    from torchvision.datasets import CIFAR100

    folder, rng, sums = root / "cifar-100-python", np.random.default_rng(0), {}
    folder.mkdir()
    for name, n in (("train", train), ("test", test)):
        content = {
            "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            "fine_labels": (np.arange(n) % 100).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))
    for name in ("train", "test", "meta"):
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]})


def test_the_paper_scale_runs_on_files_in_the_format_of_cifar100(tmp_path, monkeypatch):
    """Its own loader and backbone (random, and of two blocks) on a federation of two small clients."""
    import torchvision

    comparison = script("comparison")
    fake_cifar100(tmp_path, monkeypatch)

    def small(name, weights):
        assert name == "vit_b_16"
        return torchvision.models.VisionTransformer(224, 112, 2, 2, 8, 16)

    monkeypatch.setattr(torchvision.models, "get_model", small)
    setting = replace(
        comparison.SCALES["paper"]["8 clients"], clients=2, train_size=6, calibration_size=4, test_size=6, rank=2,
        batch_size=4, rounds=1, round_steps=2, local_steps=2,
    )  # fmt: skip
    load = lambda setting, seed: comparison.prepare_paper(str(tmp_path), setting, seed, weights=None, download=False)  # noqa: E731
    adapted, federation = load(setting, 0)
    assert federation.classes == 100 and federation.train.x.shape == (2, 6, 3, 32, 32)
    rows = sweep(few("FedIT", "potara-calibrated"), {"paper": setting}, [0], tmp_path / "out", prepare=load)
    assert len(rows) == 4 and rows.loss.map(np.isfinite).all()


def test_every_scale_has_the_same_methods_and_budgets_that_rounds_can_fill():
    comparison = script("comparison")
    for settings in comparison.SCALES.values():
        for setting in settings.values():
            steps = setting.total_steps
            assert steps % (2 * setting.round_steps) == 0 and (steps - setting.local_steps) % setting.round_steps == 0
    paper = comparison.SCALES["paper"]
    assert {s.clients for s in paper.values()} == {8, 20} and all(s.train_size == 1000 for s in paper.values())


def test_the_options_of_the_highest_mean_accuracy_are_chosen(monkeypatch):
    comparison = script("comparison")
    monkeypatch.setattr(
        comparison, "OPTIONS", {"Ditto": {"lr_scale": (1, 0.5), "strength": (0.1, 1, 2)}, "local": {"lr_scale": (1, 2)}}
    )
    monkeypatch.setattr(comparison, "TOGETHER", {"Ditto": [{"lr_scale": 0.5, "strength": 1}]})
    accuracies = {
        "Ditto (lr_scale=1, strength=0.1)": 0.5, "Ditto (lr_scale=0.5, strength=0.1)": 0.4,
        "Ditto (lr_scale=1, strength=1)": 0.6,
        "Ditto (lr_scale=1, strength=2)": 0.55, "Ditto (lr_scale=0.5, strength=1)": 0.7,
        "local (lr_scale=1)": 0.3, "local (lr_scale=2)": 0.2,
    }  # fmt: skip
    assert list(comparison.candidates()) == list(accuracies)
    spread = np.array([[-0.2, 0.2], [0.1, -0.1]])
    rows = pd.concat([table(accuracy + spread, name) for name, accuracy in accuracies.items()])
    assert comparison.best(rows) == {"Ditto": {"lr_scale": 0.5, "strength": 1}, "local": {"lr_scale": 1}}
    for name, accuracy in accuracies.items():  # another federation speaks as loud
        rows = pd.concat([rows, table(1 - 2 * accuracy + spread, name, federation="g")])
    assert comparison.best(rows) == {"Ditto": {"lr_scale": 0.5, "strength": 0.1}, "local": {"lr_scale": 2}}


def test_candidates_are_the_methods_with_these_options(run):
    comparison = script("comparison")
    tried = comparison.candidates()
    assert {name.split(" (")[0] for name in tried} == set(comparison.OPTIONS) and len(tried) > 100
    other = replace(SETTING, federated_lr_scale=1, local_lr_scale=0.5, rounds=1, local_steps=6)
    longer = comparison.equal_merge(federated_lr_scale=1, local_lr_scale=0.5, rounds=1)(run)
    found = longer, M.METHODS["uniform"](replace(run, setting=other))
    assert (
        torch.equal(*(flatten(result.adapters) for result in found))
        and longer.ledger.steps[0] == run.setting.total_steps
    )
    found = tried["Ditto (lr_scale=1, strength=0.01)"](run), M.from_algorithm(algorithms.ditto(0.01))(run)
    assert torch.equal(*(flatten(result.adapters) for result in found))


def test_options_are_chosen_on_calibration_examples_of_another_seed(tmp_path, monkeypatch, capsys):
    comparison = script("comparison")
    monkeypatch.setattr(comparison, "OPTIONS", {"local": {"lr_scale": (1, 2)}})
    monkeypatch.setattr(
        "sys.argv", ["comparison.py", "--scale", "quick", "--tune", "--out", str(tmp_path / "comparison")]
    )
    comparison.main()
    rows = pd.read_csv(tmp_path / "comparison-quick-tune.csv.gz")
    assert set(rows.seed) == {100} and not set(rows.seed) & {s for seeds in comparison.SEEDS.values() for s in seeds}
    setting = replace(comparison.SCALES["quick"]["label skew"], calibration_size=150)
    run = Run(*comparison.prepare(setting, 100), setting, 100)
    _, accuracy = evaluate(run.adapted, M.local_training(2)(run).adapters, run.federation.calibration)
    assert rows[rows.method == "local (lr_scale=2)"].accuracy.tolist() == pytest.approx(accuracy.tolist())
    assert "local: {'lr_scale': " in capsys.readouterr().out


def test_the_methods_have_the_best_options_of_those_that_were_tried():
    comparison = script("comparison")
    rows = pd.read_csv(comparison.HERE / "comparison-lab-tune.csv.gz")
    assert set(rows.method) == set(comparison.candidates()) and set(rows.seed) == {100}
    assert set(rows.federation) == set(comparison.SCALES["lab"])
    best = comparison.best(rows)
    pair, from_federated = best.pop(comparison.PAIR), best.pop(comparison.FROM_FEDERATED)
    assert pair == {name: getattr(comparison.LAB, name) for name in pair}
    assert comparison.LAB.total_steps == 180
    found = {name: family for name, family in M.FAMILIES.items() if signature(family).parameters}
    for name in [name for name in found if name.endswith(", local from federated")]:
        assert defaults(found.pop(name)) == from_federated
    assert {name: defaults(family) for name, family in found.items()} == best


def defaults(family):
    return {name: parameter.default for name, parameter in signature(family).parameters.items()}


def test_every_process_has_its_own_part_and_its_share_of_the_cores(tmp_path, monkeypatch):
    comparison, threads = script("comparison"), []
    monkeypatch.setattr(comparison, "METHODS", few("local"))
    monkeypatch.setattr(comparison, "REFERENCES", {})
    monkeypatch.setattr(comparison, "SEEDS", {"quick": range(3)})
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(comparison.os, "cpu_count", lambda: 6)
    for number, seeds in ((0, [0, 2]), (1, [1])):
        out = tmp_path / str(number)
        comparison.work(
            number, Namespace(scale="quick", name="quick", only=(), tune=False, device="cpu", processes=2, out=out)
        )
        assert read_results(out / "quick").seed.unique().tolist() == seeds
    assert threads == [3, 3]


def test_processes_share_the_work(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "comparison.py", "--scale", "quick", "--processes", "2"]
    finished([*command, "--out", tmp_path / "comparison"])
    rows = pd.read_csv(tmp_path / "comparison-quick.csv.gz")
    assert set(rows.method) == set(ALL) and len(rows) == 2 * len(ALL)
    run = json.loads((tmp_path / "comparison-quick.json").read_text())
    assert run["processes"] == 2 and run["rows before"] == 0 and run["minutes"] > 0 and "torch" in run["versions"]


@pytest.fixture(scope="module")
def committed():
    return pd.read_csv(ROOT / "benchmarks" / "comparison-lab.csv.gz")


def test_the_committed_rows_are_complete(committed):
    assert set(committed.method) == set(ALL) and len(M.METHODS) == 38
    assert set(committed.federation) == set(script("comparison").SCALES["lab"])
    runs = committed.groupby(["federation", "method"])[["seed", "client"]].nunique()
    assert (runs.seed == 5).all() and (runs.client == 8).all() and len(committed) == len(runs) * 40
    assert committed[~committed.method.isin(PARTS)].steps.eq(180).all()


def test_what_the_committed_rows_show(committed):
    board = leaderboard(committed)
    union, accuracy = board.groupby("method")["union"].mean(), board.accuracy.unstack("federation")
    one_adapter = union[["FedIT", "FedProx", "FFA-LoRA", "FedEx-LoRA", "FLoRA", "FlexLoRA", "federated part"]]
    assert union["FedIT"] == union.max() and one_adapter.min() > union.drop(one_adapter.index).max()
    against = paired_differences(committed)  # of the default
    assert not ((against["p (Holm)"] < 0.05) & (against.difference < 0)).any()
    means = accuracy.mean(axis=1).drop(ORACLE).sort_values(ascending=False)
    assert means.index[:2].tolist() == ["potara-calibrated, local from federated", "uniform, local from federated"]
    assert (accuracy.loc["FLoRA"] < accuracy.loc["FedIT"]).all()
    # the models are the most unequal in strong label skew
    strong, parts = "strong label skew", accuracy.loc["local part"] - accuracy.loc["federated part"]
    assert parts.abs().idxmax() == strong
    assert (accuracy.loc["potara-calibrated"] - accuracy.loc["potara-paper"]).idxmax() == strong


def test_what_the_rows_of_grey_images_show():
    comparison = script("comparison")
    grey = pd.read_csv(ROOT / "benchmarks" / "comparison-grey-cifar10.csv.gz")
    assert set(grey.method) == set(ALL) and set(grey.federation) == set(comparison.SCALES["grey-cifar10"])
    assert (grey.groupby(["federation", "method"]).seed.nunique() == len(comparison.SEEDS["grey-cifar10"])).all()
    board = leaderboard(grey)
    for federation in comparison.SCALES["grey-cifar10"]:
        real = board.accuracy[federation].drop(ORACLE).sort_values(ascending=False)
        assert real.index[0] == "FFA-LoRA, fine-tuned"
        assert real["uniform"] > max(real["federated part"], real["local part"])
    loss = board.loss.groupby("method").mean().drop(ORACLE).sort_values()
    assert loss.index[:2].tolist() == ["potara-calibrated, factors", "potara-calibrated"]


def test_a_method_of_ones_own_runs_as_the_page_shows_it(tmp_path, monkeypatch, capsys):
    """The page's own lines, on a federation of two small clients and one seed."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "comparison.md").read_text()
    code = next(c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "LG-FedAvg" in c)
    tiny = Setting(clients=2, train_size=8, calibration_size=4, test_size=8, rounds=2, round_steps=2, local_steps=4)
    assert len(code.splitlines()) <= 30 and code.count("Setting()") == 1
    code = code.replace("Setting()", "tiny").replace("range(5)", "[0]")
    exec("from potara_lite import Setting\n" + code, {"tiny": tiny})
    printed = capsys.readouterr().out
    assert "LG-FedAvg" in printed and "potara-calibrated" in printed and "FedIT" in printed


def test_the_script_runs_at_its_quick_scale(tmp_path, monkeypatch, capsys):
    comparison = script("comparison")
    monkeypatch.setattr("sys.argv", ["comparison.py", "--scale", "quick", "--out", str(tmp_path / "comparison")])
    comparison.main()
    rows = pd.read_csv(tmp_path / "comparison-quick.csv.gz")
    assert set(rows.method) == set(ALL) and len(rows) == 2 * len(ALL)
    assert (tmp_path / "comparison-quick.png").stat().st_size > 10_000
    monkeypatch.setattr(
        "sys.argv", ["comparison.py", "--scale", "quick", "--report", "--out", str(tmp_path / "comparison")]
    )
    comparison.main()
    pd.testing.assert_frame_equal(rows, pd.read_csv(tmp_path / "comparison-quick.csv.gz"))
    assert "potara-calibrated" in capsys.readouterr().out


def estimate_at_one_fifth(adapted, federated, local, split):
    assert isinstance(split, Split)
    return Estimate(torch.full((len(split),), 0.2, dtype=torch.float64))


def one_fifth(adapted, federated, local, split):
    return torch.full((len(split),), 0.2, dtype=torch.float64)


def test_a_method_of_your_own_is_taken_as_it_is(adapted, federation, tmp_path):
    """An estimator, with its wrappers or without, weights alone, and an algorithm; in a sweep and in ``compare``."""
    at_one_fifth = {
        "estimator": estimate_at_one_fifth,
        "weights": one_fifth,
        "method": with_estimator(estimate_at_one_fifth),
        "wrapped twice": with_estimator(on_calibration(estimate_at_one_fifth)),
    }
    own = at_one_fifth | {"algorithm": algorithms.FEDIT, "from_algorithm": M.from_algorithm(algorithms.FEDIT)}
    options = dict(seeds=[0, 1], prepare=lambda setting, seed: (adapted, federation))
    rows = sweep(own, {"one": SETTING}, folder=tmp_path, **options)
    compared = compare(SETTING, methods=own, **options)
    for found in (rows, compared):
        loss = {name: part.sort_values(["seed", "client"]).loss.tolist() for name, part in found.groupby("method")}
        assert loss["weights"] == loss["method"] == loss["wrapped twice"] == loss["estimator"]
        assert loss["algorithm"] == loss["from_algorithm"] != loss["estimator"]
        assert found.weight[found.method.isin(at_one_fifth)].eq(0.2).all() and len(found) == 2 * 3 * len(own)


@pytest.mark.parametrize("wrong", [3, Estimate, lambda a, b: 0, lambda: 0, "uniform", None])
def test_a_wrong_method_is_refused_before_anything_is_trained(wrong, tmp_path):
    def prepare(setting, seed):
        raise AssertionError("prepared")

    for function in (
        lambda: sweep({"mine": wrong}, {"one": SETTING}, [0], tmp_path, prepare=prepare),
        lambda: compare(SETTING, methods={"mine": wrong}, prepare=prepare),
    ):
        with pytest.raises(ValueError, match=r"methods\['mine'\] must be a function of a run, an Algorithm or an est"):
            function()
    with pytest.raises(ValueError, match="estimator must be a function of"):
        with_estimator(lambda run: 0)
