"""The benchmark of text: what its committed rows say, and that it runs on a tiny encoder."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from conftest import tiny_text_encoder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def language(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import language

    return language


def committed(name):
    return pd.read_csv(ROOT / "benchmarks" / f"{name}.csv.gz")


def test_the_committed_rows_are_whole(language):
    rows, estimates = committed("language"), committed("language-weights")
    assert set(rows.method) == set(language.methods()) and rows.groupby(["method", "seed"]).client.count().eq(6).all()
    assert set(estimates.federation) == set(language.FEDERATIONS)
    assert rows.seed.nunique() == estimates.seed.nunique() and 100 not in set(rows.seed)


def test_every_method_has_the_same_steps_and_the_merges_the_fewest_bytes(language):
    rows = committed("language")
    setting = language.LAB
    part = {"federated part": setting.rounds * setting.round_steps, "local part": setting.local_steps}
    for method, own in rows.groupby("method"):
        assert (own.steps == part.get(method, setting.total_steps)).all(), method
    sent = (rows.bytes_up + rows.bytes_down).groupby(rows.method).mean()
    assert setting.total_steps == 80 and sent["uniform"] < 0.6 * sent["FedIT"] and sent["local"] == 0


def test_the_rates_are_those_that_were_best_on_calibration_examples(language):
    tuned = committed("language-tune")
    assert set(tuned.seed) == {100} and set(tuned.method) == set(language.candidates())
    scales = language.LAB.federated_lr_scale, language.LAB.local_lr_scale
    assert language.best(tuned, language.PAIR) == language.label(language.PAIR, *scales)
    loss = tuned.groupby("method").loss.mean()
    for name, rate in language.best_rates(tuned).items():
        own = {scale: loss[language.label(name, scale)] for scale in language.RATES[name]}
        assert own[rate] == min(own.values())
        assert (rate in (min(own), max(own))) == (name == "FedSA-LoRA")  # as the page says


def test_it_runs_on_a_tiny_encoder_and_goes_on_where_it_stopped(language, tmp_path, monkeypatch, capsys):
    tiny = replace(
        language.LAB, backbone=tiny_text_encoder(tmp_path), clients=3, train_size=12, calibration_size=6, test_size=8,
        rounds=1, round_steps=10, local_steps=10,
    )  # fmt: skip
    here, done = tmp_path / "benchmarks", tmp_path / "benchmarks" / "language"
    done.mkdir(parents=True)
    (here / "language-tune.csv.gz").write_bytes((ROOT / "benchmarks" / "language-tune.csv.gz").read_bytes())
    kept = ["FedIT", "FedIT, fine-tuned", "uniform, local from federated"]
    for name, value in {
        "HERE": here, "DONE": done, "LAB": tiny, "SEEDS": range(2),
        "RATES": {name: language.RATES[name] for name in kept},
        "FEDERATIONS": {"label skew": tiny, "mild": replace(tiny, data="wordnet-domains")},
    }.items():  # fmt: skip
        monkeypatch.setattr(language, name, value)
    monkeypatch.setattr(sys, "argv", ["language.py"])
    language.main()
    first = pd.read_csv(here / "language.csv.gz")
    assert set(first.seed) == {0, 1} and "potara-calibrated" in set(first.method) and (here / "language.png").is_file()
    run = json.loads((here / "language.json").read_text())
    assert run["minutes"] > 0 and run["versions"]["transformers"] == transformers.__version__
    monkeypatch.setattr(language, "train_pair", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(sys, "argv", ["language.py", "--again", "potara-calibrated"])
    language.main()
    again = pd.read_csv(here / "language.csv.gz")
    pd.testing.assert_frame_equal(first.drop(columns="seconds"), again.drop(columns="seconds"))
    kept = (here / "language.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["language.py", "--report"])
    language.main()
    assert (here / "language.json").read_bytes() == kept


def test_a_run_that_is_interrupted_leaves_what_it_was_made_with(language, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "HERE", tmp_path)
    monkeypatch.setattr(language, "DONE", tmp_path / "language")
    monkeypatch.setattr(language, "measure_seed", lambda seed: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(sys, "argv", ["language.py"])
    with pytest.raises(KeyboardInterrupt):
        language.main()
    run = json.loads((tmp_path / "language.json").read_text())
    assert run["versions"]["torch"] == torch.__version__ and "minutes" not in run
