"""The command: what it prints and writes, and how it fails."""

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pandas as pd
import pytest
import torch
from peft import PeftModel

from potara_lite import __main__ as command
from potara_lite import backbones, experiment, prepare
from potara_lite.experiment import ORACLE
from potara_lite.results import COLUMNS
from potara_lite.setting import Setting

SMALL = ["--clients", "3", "--train-size", "20", "--rounds", "2", "--local-steps", "6", "--test-size", "20", "--quiet"]
METHODS = ["backbone", "federated", "local", "uniform", "potara-paper", "potara-calibrated", ORACLE]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    assert command.main([*SMALL, "--seeds", "0", "1", "--out", str(folder)]) == 0
    return folder


def test_results_have_a_row_for_each_method_seed_and_client(out):
    rows = pd.read_csv(out / "results.csv")
    assert list(rows.columns) == COLUMNS
    assert list(rows.method.unique()) == METHODS
    assert rows.groupby(["method", "seed", "client"]).size().eq(1).all() and len(rows) == len(METHODS) * 2 * 3


def test_results_state_weights_bytes_and_steps(out):
    rows = pd.read_csv(out / "results.csv").set_index("method")
    assert (rows.loc["federated"].weight == 1).all() and (rows.loc["local"].weight == 0).all()
    assert rows.loc["potara-calibrated"].weight.between(0, 1).all()
    assert (rows.loc["local"].bytes_up == 0).all() and (rows.loc["local"].steps == 6).all()
    for way, extra in (("bytes_up", 13), ("bytes_down", 3)):  # floats that choosing the weight sends
        sent = {name: set(rows.loc[name][way]) for name in ("federated", "uniform", "potara-calibrated")}
        assert sent["uniform"] == sent["federated"] and sent["potara-calibrated"] == {
            n + 4 * extra for n in sent["federated"]
        }
    assert (rows.loc["potara-calibrated"].steps == 2 * 5 + 6).all()


def test_the_oracle_is_at_least_as_good_as_both_models_and_uniform(out):
    losses = pd.read_csv(out / "results.csv").pivot(index=["seed", "client"], columns="method", values="loss")
    for other in ("federated", "local", "uniform"):
        assert (losses[ORACLE] <= losses[other] + 1e-6).all()


def test_the_same_seed_gives_the_same_rows_twice(out, tmp_path):
    assert command.main([*SMALL, "--seeds", "0", "1", "--out", str(tmp_path)]) == 0
    one, two = (pd.read_csv(folder / "results.csv").drop(columns="seconds") for folder in (out, tmp_path))
    pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_saved_models_give_the_accuracy_of_the_table_in_stock_peft(out):
    rows = pd.read_csv(out / "results.csv").set_index(["method", "seed", "client"])
    setting = Setting(clients=3, train_size=20, test_size=20)
    _, federation = prepare(setting, 1)
    for method in ("local", "potara-calibrated"):
        folder = out / "adapters" / "seed-1" / "client-2" / method
        model = PeftModel.from_pretrained(backbones.lab_vit(), folder).eval()
        x, y = federation.test.client(2)
        with torch.no_grad():
            accuracy = (model(x).argmax(1) == y).double().mean().item()
        assert accuracy == pytest.approx(rows.loc[(method, 1, 2)].accuracy, abs=1.5 / len(y))


def test_config_and_figure_are_written(out):
    config = json.loads((out / "config.json").read_text())
    assert config["setting"]["clients"] == 3 and config["seeds"] == [0, 1] and config["versions"]["torch"]
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.glob("*.part"))


def test_json_is_one_document_on_stdout(tmp_path, capsys):
    assert command.main([*SMALL, "--out", str(tmp_path), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["methods"]) == METHODS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clients", "0"], "clients must be at least 1"),
        (["--alpha", "0"], "alpha must be positive"),
        (["--alpha", "-1"], "alpha must be positive"),
        (["--alpha", "nan"], "alpha must be positive"),
        (["--train-size", "0"], "train_size must be at least 1"),
        (["--clients", "40", "--train-size", "1000"], "runs out"),
        (["--device", "warp"], "device 'warp' cannot be used"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, message, tmp_path, capsys):
    assert command.main([*SMALL, "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "results.csv").exists()


def test_an_unwritable_out_is_refused_before_any_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "train_pair", lambda *_: pytest.fail("training began"))
    (tmp_path / "file").write_text("in the way")
    assert command.main([*SMALL, "--out", str(tmp_path / "file" / "out")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_corrupt_checkpoint_is_refused(tmp_path, capsys, monkeypatch):
    for name in ("lab_vit.safetensors", "lab_vit.sha256"):
        shutil.copy(backbones.data_path(name), tmp_path)
    content = bytearray((tmp_path / "lab_vit.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "lab_vit.safetensors").write_bytes(content)
    monkeypatch.setattr(backbones, "data_path", lambda name: tmp_path / name)
    assert command.main([*SMALL, "--out", str(tmp_path / "out")]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_later_seed_that_fails_leaves_the_earlier_ones(tmp_path, monkeypatch):
    def fail_at_1(setting, seed):
        if seed == 1:
            raise ValueError("client 2: out of luck")
        return prepare(setting, seed)

    monkeypatch.setattr(experiment, "run_methods", partial(experiment.run_methods, prepare=fail_at_1))
    assert command.main([*SMALL, "--seeds", "0", "1", "--out", str(tmp_path)]) == 2
    assert len(pd.read_csv(tmp_path / "results.csv")) == len(METHODS) * 3


def test_ctrl_c_leaves_what_was_finished(tmp_path):
    arguments = [*SMALL, "--local-steps", "100000", "--out", str(tmp_path)]
    command_line = [sys.executable, "-m", "potara_lite", *arguments]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True, preexec_fn=listen)  # also behind an "&"
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "results.csv").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in error
    assert set(pd.read_csv(tmp_path / "results.csv").method) <= {"backbone", "federated"}
