"""The command: what it prints and writes, and how it fails."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import WAIT, wait_until
from peft import PeftModel

from potara_lite import __main__ as command, experiment, prepare
from potara_lite.experiment import ORACLE
from potara_lite.files import run_folder, write_atomically
from potara_lite.models import vit as backbones
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
        (["--alpha", "0"], "alpha must be above 0"),
        (["--alpha", "-1"], "alpha must be above 0"),
        (["--alpha", "nan"], "alpha must be above 0"),
        (["--train-size", "0"], "train_size must be at least 1"),
        (["--clients", "40", "--train-size", "1000"], "runs out"),
        (["--device", "warp"], "device 'warp' cannot be used"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--device", "hpu"], "device 'hpu' cannot be used"),
        (["--device", "cuda:" + "9" * 30], "device 'cuda:9"),
        (["--clients", "3000"], "the pool runs out: 3000 clients ask for 150000 training and calibration examples"),
        (["--seeds", "3", "3"], "seeds must differ, unlike 3 3"),
        (["--data", "wordnet", "--backbone", "./nowhere"], "./nowhere is no folder"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, message, tmp_path, capsys):
    began = time.process_time()
    assert command.main([*SMALL, "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and time.process_time() - began < 20
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "0", "--seeds", "1"], "argument --seeds: not allowed with argument --seed"),
        (["--seeds", "0", "--seed", "0"], "argument --seed: not allowed with argument --seeds"),
        (["--seed", "-1"], "argument --seed: must be at least 0 and below 2**63, not -1"),
        (["--seeds", "3", str(2**63)], f"argument --seeds: must be at least 0 and below 2**63, not {2**63}"),
        (["--clients", "1" * 30], f"argument --clients: must be at most 1000000, not {'1' * 30}"),
        (["--local-steps", "1" * 5000], "argument --local-steps: invalid size value"),
        (["--rounds", "2.5"], "argument --rounds: invalid size value: '2.5'"),
    ],
)
def test_a_bad_value_names_its_option(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([*SMALL, "--out", str(tmp_path / "out"), *arguments])
    assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_one_seed_may_be_the_default_or_the_largest():
    seeds = [command.parser().parse_args(words).seeds for words in ([], ["--seed", "0"], ["--seed", str(2**63 - 1)])]
    assert seeds == [[0], [0], [2**63 - 1]]


def files(folder):
    """What a run leaves, without the seconds that its training took."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    rows = pd.read_csv(folder / "results.csv").drop(columns="seconds").to_csv()
    return {name: found[name] for name in found.keys() - {".lock", "results.csv", "results.digest"}} | {"rows": rows}


def copied(out, folder):
    shutil.copytree(out, folder, dirs_exist_ok=True)
    return [*SMALL, "--seeds", "0", "1", "--out", str(folder)]


def test_the_same_command_again_computes_nothing(out, tmp_path, capsys, monkeypatch):
    again = copied(out, tmp_path)
    before = (tmp_path / "results.csv").read_bytes()
    monkeypatch.setattr(experiment, "prepare_images", lambda *_: pytest.fail("a federation was prepared"))
    assert command.main(again) == 0
    said = capsys.readouterr()
    assert "has 14 results of this run, which are kept (--overwrite: anew)" in said.err and ORACLE in said.out
    assert (tmp_path / "results.csv").read_bytes() == before


@pytest.mark.parametrize("finished", [0, 2, 6, 9])
def test_an_interrupted_run_continues_to_the_same_folder(out, tmp_path, capsys, monkeypatch, finished):
    whole, original = files(out), experiment.run_methods

    def interrupted(*arguments, **options):
        for number, found in enumerate(original(*arguments, **options)):
            if number == finished:
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "run_methods", interrupted)
        patch.setattr(command.signal, "signal", lambda *_: None)
        assert command.main([*SMALL, "--seeds", "0", "1", "--out", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    assert said == "potara_lite: interrupted; without --overwrite the same command continues where it stopped\n"
    kept = (tmp_path / "results.csv").read_bytes() if finished else b""
    assert command.main([*SMALL, "--seeds", "0", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "results.csv").read_bytes().startswith(kept) and files(tmp_path) == whole


def test_a_folder_with_another_run_is_refused_and_left_as_it_was(out, tmp_path, capsys):
    copied(out, tmp_path)
    before = files(tmp_path)
    for other, message in (
        (["--seeds", "0", "1", "--rounds", "3"], "another run: setting.rounds 2, not 3; name another --out"),
        (["--seed", "0"], "another run: seeds [0, 1], not [0]; name another --out, or replace it by --overwrite"),
        (["--seeds", "0", "1", "--overwrite", "--clients", "3000"], "the pool runs out"),
    ):
        assert command.main([*SMALL, *other, "--out", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1 and files(tmp_path) == before


HARM = {
    "another number": lambda folder: edit(folder / "results.csv", lambda text: text.replace("0.", "1.", 1)),
    "a row less": lambda folder: edit(folder / "results.csv", lambda text: text[: text[:-1].rindex("\n") + 1]),
    "a row twice": lambda folder: edit(folder / "results.csv", lambda text: text + text.splitlines()[-1] + "\n"),
    "no digest": lambda folder: (folder / "results.digest").unlink(),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "a cut configuration": lambda folder: edit(folder / "config.json", lambda text: text[:50]),
    "adapters alone": lambda folder: [path.unlink() for path in folder.iterdir() if path.is_file()],
}


def edit(path, change):
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize("harm", HARM)
def test_a_folder_that_was_changed_by_hand_is_refused(harm, out, tmp_path, capsys):
    again = copied(out, tmp_path)
    HARM[harm](tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert command.main(again) == 2
    said = capsys.readouterr().err
    assert "replace it by --overwrite" in said and str(tmp_path) in said and said.count("\n") == 1
    assert before == {path: path.read_bytes() for path in before}


def test_overwrite_replaces_everything_that_a_run_left_and_nothing_else(out, tmp_path):
    copied(out, tmp_path)
    (tmp_path / "results.csv.123.part").write_text("half")
    (tmp_path / "adapters" / "mine.txt").write_text("not a run's")
    (tmp_path / "notes.txt").write_text("not a run's")
    assert command.main([*SMALL, "--seed", "1", "--out", str(tmp_path), "--overwrite"]) == 0
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {"seed-1", "mine.txt"}
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock", "adapters", "config.json", "figure.png", "notes.txt", "results.csv", "results.digest"
    }  # fmt: skip
    one, both = (pd.read_csv(folder / "results.csv").drop(columns="seconds") for folder in (tmp_path, out))
    pd.testing.assert_frame_equal(one, both[both.seed == 1].reset_index(drop=True), check_exact=True)


def test_a_second_process_is_refused(out, tmp_path, capsys):
    again = copied(out, tmp_path)
    with run_folder(tmp_path, (tmp_path / "config.json").read_text()):
        assert command.main(again) == 2
        said = capsys.readouterr().err
        assert said == f"potara_lite: {tmp_path} is in use: another process writes its results there\n"
        assert command.main([*again, "--overwrite"]) == 2
    assert command.main(again) == 0


def test_a_full_disk_is_one_line_and_what_was_finished_stays(out, tmp_path, capsys, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("potara_lite.adapters.files.write_atomically", full)
        assert command.main([*SMALL, "--seeds", "0", "1", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and said.count("\n") == 1
    assert set(pd.read_csv(tmp_path / "results.csv").method) == {"backbone"}  # the federated model was not saved
    with monkeypatch.context() as patch:  # the digest is written, and then there is no space for the rows

        def write(path, content):
            (full if path.name == "results.csv" else write_atomically)(path, content)

        patch.setattr("potara_lite.files.write_atomically", write)
        assert command.main([*SMALL, "--seeds", "0", "1", "--out", str(tmp_path)]) == 2
    assert command.main([*SMALL, "--seeds", "0", "1", "--out", str(tmp_path)]) == 0
    assert files(tmp_path) == files(out)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["again"]])
def test_a_closed_pipe_is_no_error(arguments, out, tmp_path):
    if arguments == ["again"]:
        arguments = copied(out, tmp_path)
    command_line, buffered = [sys.executable, "-m", "potara_lite", *arguments], dict(os.environ, PYTHONUNBUFFERED="")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command_line, **pipes, env=buffered)
    process.stdout.close()
    error = process.communicate(timeout=WAIT)[1]
    assert process.returncode == 141 and "Traceback" not in error and "Exception" not in error, error


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
        wait_until((tmp_path / "results.csv").exists, process)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=WAIT)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in error
    assert set(pd.read_csv(tmp_path / "results.csv").method) <= {"backbone", "federated"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("library", ["libtorch_cpu", "pandas"])
def test_ctrl_c_twice_while_the_libraries_are_imported_is_one_line(library, tmp_path):
    arguments = [sys.executable, "-m", "potara_lite", *SMALL, "--out", str(tmp_path)]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    try:
        wait_until(lambda: library in Path(f"/proc/{process.pid}/maps").read_text(), process)
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=WAIT)[1]
    finally:
        process.kill()
    error = re.sub(r"Exception ignored in: .*?KeyboardInterrupt: ?\n", "", error, flags=re.S)  # inside Python's import
    assert process.returncode == 130 and error.count("\n") == 1 and error.startswith("potara_lite: interrupted;"), error
