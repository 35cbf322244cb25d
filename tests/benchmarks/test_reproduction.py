"""The verdicts on the paper's claims: what they count, and what the committed rows say."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from test_results import script

paper, verdicts = script("paper"), script("verdicts")


def rows_of(values, score="accuracy"):
    """Rows of one client: ``values[method]`` holds a score per seed."""
    lines = [
        dict(federation="one", method=method, seed=seed, client=0, **{score: value})
        for method, each in values.items()
        for seed, value in enumerate(each)
    ]
    return pd.DataFrame(lines)


def test_a_verdict_counts_clear_differences_in_both_directions_after_holm():
    rows = rows_of({"a": [0.50, 0.52, 0.54], "b": [0.40, 0.41, 0.45], "c": [0.60, 0.63, 0.64], "d": [0.5, 0.3, 0.8]})
    means = verdicts.by_seed(rows, "accuracy")
    found = verdicts.differences(means, "a", ["b", "c", "d"])
    assert found.difference.tolist() == pytest.approx([0.10, -0.103333, -0.0133333], rel=1e-4)
    assert verdicts.verdict(found) == "holds in part: better in 1 of 3 comparisons, worse in 1"
    assert verdicts.verdict(verdicts.differences(means, "a", ["b"])) == "holds: better in 1 of 1 comparisons"
    assert verdicts.verdict(verdicts.differences(means, "a", ["d"])).startswith("does not show")
    assert verdicts.verdict(verdicts.differences(means, "a", ["c"], sign=-1)).startswith("holds:")
    many = verdicts.differences(means, "a", ["b"] * 1 + ["c", "d"])
    assert (many["p (Holm)"] >= many.p).all() and many["p (Holm)"].iloc[0] > many.p.iloc[0]


def test_the_rise_is_above_the_straight_line_and_regret_above_the_best_of_the_segment():
    curve = {0.0: 1.0, 0.5: 2.0, 1.0: 2.0}  # half a nat above the line
    rows = rows_of({f"lambda = {w:g}": [loss] for w, loss in curve.items()} | {"own": [1.25]}, "loss")
    assert verdicts.rise(verdicts.segment(rows, "loss")).tolist() == [0.5]
    flat = verdicts.segment(rows_of({"lambda = 0": [1.0], "lambda = 0.5": [1.1], "lambda = 1": [2.0]}, "loss"), "loss")
    assert verdicts.rise(flat).tolist() == [0.0]
    regret = verdicts.regrets(rows).set_index("method").regret
    assert regret.to_dict() == {"own": 0.25, "lambda = 0.5": 1.0}


def test_a_merge_beats_both_models_among_those_for_whom_one_does():
    values = {"lambda = 0": [1.0, 1.0], "lambda = 0.5": [0.8, 1.3], "lambda = 1": [2.0, 1.2]}
    found = verdicts.beating_both(rows_of(values | {"own": [0.9, 0.7], "other": [1.0, 0.7]}, "loss"))
    assert found.index.get_level_values("seed").tolist() == [0]  # of seed 1, no λ is below the model at 0
    assert found.loc[:, ["own", "other", "lambda = 0.5"]].iloc[0].tolist() == [True, False, True]


def test_a_part_of_the_script_runs_and_is_resumed(tmp_path):
    paper.work(0, "three-tune", tmp_path, "quick", 1)
    rows = paper.read_results(tmp_path / "three-tune")
    assert set(rows.method) == {paper.triple(options) for options in paper.TRIPLES}
    assert np.isfinite(rows.loss).all()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.csv")}
    paper.work(0, "three-tune", tmp_path, "quick", 1)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.csv")}
    best = rows.groupby("method").loss.mean().idxmin()
    assert list(paper.triples(rows))[-1] == "three models"
    assert best in paper.triples(None)


def test_budgets_give_the_baselines_600_steps_and_the_merges_700(adapted, federation):
    steps = {}

    def remember(name):
        def method(run):
            steps[name] = run.setting.total_steps
            return run.setting.total_steps

        return method

    run = paper.Run(adapted, federation, paper.PAPER, 0)
    assert paper.with_600_steps(remember("baseline"))(run) == 600
    assert paper.PAPER.total_steps == 700
    assert paper.PAPER.rounds * paper.PAPER.round_steps == 400


def test_a_latecomers_federated_model_has_not_seen_it(adapted, federation):
    setting = paper.Setting(clients=3, rounds=2, round_steps=1, local_steps=1, batch_size=4)
    run = paper.Run(adapted, federation, setting, seed=0)
    late, part = (paper.federated_without(is_late, run) for is_late in (True, False))
    options = paper.training_options(setting) | dict(rounds=2, local_steps=1, seed=0)
    without = paper.fedit(adapted, federation.train.rows([1, 2]), **options).adapter
    for name, tensor in without.items():
        torch.testing.assert_close(late.federated[name][0], tensor)
    assert late.ledgers[0].up.tolist() == [0, 0, 0] and late.ledgers[0].steps.tolist() == [0, 0, 0]
    assert part.ledgers[0].steps.tolist() == [2, 2, 2]
    assert any(not torch.equal(late.federated[name][0], part.federated[name][0]) for name in without)


def test_all_parts_ran_within_an_hour_on_two_cores():
    runs = json.loads((verdicts.HERE / "paper.json").read_text())
    assert list(runs) == list(paper.SEEDS)
    assert sum(run["minutes"] for run in runs.values()) <= 60
    assert {run["processes"] for run in runs.values()} == {2} and not any(run["rows before"] for run in runs.values())
    for part, seeds in paper.SEEDS.items():
        assert sorted(verdicts.read(part).seed.unique()) == list(seeds), part


def test_a_local_model_that_starts_from_the_federated_one_beats_every_baseline_at_the_same_bytes():
    rows, best = verdicts.read("budgets"), "potara-calibrated, local from federated"
    found = verdicts.differences(verdicts.by_seed(rows, "accuracy"), best, list(verdicts.BASELINES))
    assert len(found) == 2 * 7 and (found["p (Holm)"] < verdicts.LEVEL).all() and (found.difference > 0).all()
    sent = verdicts.summary(rows)["bytes"].unstack("method")
    assert (sent[best] == sent["potara-calibrated"]).all()
    other = verdicts.by_seed(verdicts.read("other-budgets"), "accuracy")
    assert verdicts.differences(other, best, ["potara-calibrated"]).difference.item() < 0
