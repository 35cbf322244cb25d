"""Killed at random moments and run again, the command and a sweep have the same results as without interruption.

``POTARA_THOROUGH=1`` kills each twenty times, else twice.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import WAIT, wait_until

from potara_lite import __main__ as command
from potara_lite.baselines.methods import METHODS
from potara_lite.baselines.sweep import sweep
from potara_lite.setting import Setting

KILLS = 20 if os.environ.get("POTARA_THOROUGH") else 2
KILLED = []  # whether each process was killed before it had finished
RUN = ["--clients", "2", "--train-size", "16", "--rounds", "2", "--local-steps", "9", "--test-size", "20", "--quiet"]
SETTINGS = {"tiny": Setting(clients=2, train_size=16, calibration_size=8, test_size=16, rounds=2, local_steps=10)}
FEW = {name: METHODS[name] for name in ("local", "FedIT", "uniform")}


def killed(arguments, written, moment, meanwhile=lambda: None):
    """A process that is killed a random while after there are ``moment`` of what ``written`` counts."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: written() >= moment or process.poll() is not None, process)
    if process.poll() is None:
        meanwhile()
    time.sleep(random.Random(moment).uniform(0, 0.5 if moment else 5))
    process.kill()
    error = process.communicate(timeout=WAIT)[1]
    assert process.returncode in (-9, 0), error
    KILLED.append(process.returncode == -9)


def content(folder):
    """What a run leaves, without the seconds that its training took."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    whole = {
        name: (folder / name).read_bytes() for name in names if name not in ("results.csv", "results.digest", ".lock")
    }
    rows = [line.rpartition(",")[0] for line in (folder / "results.csv").read_text().splitlines()]
    return whole | {"rows": rows}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert command.main([*RUN, "--seeds", "0", "5", "--out", str(folder)]) == 0
    return content(folder)


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_killed_command_continues_to_the_same_folder(kill, whole_run, tmp_path, capsys):
    arguments, table = [*RUN, "--seeds", "0", "5", "--out", str(tmp_path)], tmp_path / "results.csv"
    moment = random.Random(f"command {kill}").randrange(1 if KILLS == 2 else 0, 11)

    def refused():
        before = table.read_bytes() if table.exists() else None
        if before is not None and kill < 2:
            assert command.main(arguments) == 2 and "is in use" in capsys.readouterr().err

    def written():
        return len(pd.read_csv(table)) // 2 if table.exists() else 0

    killed(["-m", "potara_lite", *arguments], written, moment, refused)
    kept = table.read_bytes() if table.exists() else b""
    assert command.main(arguments) == 0
    assert table.read_bytes().startswith(kept)  # what was finished is not computed again: its seconds are the same
    assert content(tmp_path) == whole_run


@pytest.fixture(scope="module")
def whole_sweep(tmp_path_factory):
    return sweep(FEW, SETTINGS, [0, 1], tmp_path_factory.mktemp("whole")).drop(columns="seconds")


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_killed_sweep_continues_to_the_same_rows(kill, whole_sweep, tmp_path):
    script = f"from test_kills import *; sweep(FEW, SETTINGS, [0, 1], {str(tmp_path)!r})"
    moment = random.Random(f"sweep {kill}").randrange(1 if KILLS == 2 else 0, 5)
    result_files = "tiny/seed-*/*.csv"
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); {script}"
    killed(["-c", here], lambda: len(list(tmp_path.glob(result_files))), moment)
    kept = {path: path.read_bytes() for path in tmp_path.glob(result_files)}
    rows = sweep(FEW, SETTINGS, [0, 1], tmp_path)
    assert all(path.read_bytes() == before for path, before in kept.items())
    pd.testing.assert_frame_equal(rows.drop(columns="seconds"), whole_sweep, check_exact=True)


def test_most_processes_were_killed_in_time():
    assert len(KILLED) == 2 * KILLS and sum(KILLED) >= 0.8 * len(KILLED)
