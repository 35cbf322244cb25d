"""The machines of a class: another locale, no home, no display, little memory, folders with any name, Ctrl-C."""

import _thread
import os
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pandas as pd
import pytest
import torch
from conftest import finished

from potara_lite import evaluate, train
from potara_lite.adapters.state import repeat_adapter
from potara_lite.checks import lacks_memory
from potara_lite.training.batching import Execution

RUN = ["--clients", "2", "--train-size", "16", "--rounds", "1", "--local-steps", "2", "--test-size", "20", "--quiet"]
MACHINES = {
    "a locale that is not UTF-8": {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1",
    },
    "a home that cannot be written": {"HOME": os.devnull, "XDG_CACHE_HOME": os.devnull, "XDG_CONFIG_HOME": os.devnull},
    "no display": {"DISPLAY": None, "WAYLAND_DISPLAY": None, "MPLBACKEND": None},
}  # fmt: skip


def command(*arguments, environment=None, **options):
    """The command's process; a variable that is ``None`` is not set in it."""
    variables = {name: value for name, value in (os.environ | (environment or {})).items() if value is not None}
    return finished([sys.executable, "-m", "potara_lite", *arguments], env=variables, **options)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_command_runs_on_any_machine_into_a_folder_of_any_name(machine, tmp_path):
    out = tmp_path / "Müllers Übung 1"
    done = command(*RUN, "--out", out, environment=MACHINES[machine], errors="replace")
    assert "potara-calibrated" in done.stdout and "Traceback" not in done.stderr
    for name in ("results.csv", "figure.png", "adapters/seed-0/client-1/potara-calibrated/adapter_config.json"):
        assert (out / name).stat().st_size > 0
    again = command(*RUN, "--out", out, environment=MACHINES[machine], errors="replace")
    assert again.stdout == done.stdout  # read from the folder


def test_four_commands_at_once_end_with_the_same_numbers(tmp_path):
    """Each with as many threads as there are cores: none waits for the others' threads for minutes."""
    as_at_home = dict.fromkeys(("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    folders = [tmp_path / str(student) for student in range(4)]
    options = {"--clients": "8", "--local-steps": "40"}
    arguments = [*RUN, *(part for option in options.items() for part in option)]

    def run(folder):
        command(*arguments, "--out", folder, environment=as_at_home)
        return pd.read_csv(folder / "results.csv").drop(columns="seconds")

    with ThreadPoolExecutor(4) as students:
        tables = list(students.map(run, folders))
    assert len(tables[0]) > 8 and all(table.equals(tables[0]) for table in tables)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of addresses are Linux's")
@pytest.mark.parametrize("gigabytes", [4, 2])
def test_with_few_addresses_it_works_or_says_first_what_to_do(gigabytes, tmp_path):
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (gigabytes * 10**9,) * 2)
    done = command(*RUN, "--out", tmp_path, check=False, preexec_fn=limit)
    advice = "potara_lite: out of memory: close other programs, take smaller sizes, raise a limit"
    assert done.returncode == 0 or done.stderr.startswith(advice), done.stderr  # torch's exit may then say more


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 20 MiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        ImportError("libtorch_cuda.so: failed to map segment from shared object"),
        RuntimeError("std::bad_alloc"),
        SystemError("error return without exception set"),
    ],
    ids=str,
)
def test_all_these_errors_say_that_there_is_no_more_memory(error):
    assert lacks_memory(error) and not lacks_memory(RuntimeError("no such file"))


def test_threads_that_wait_leave_their_core_to_others_unless_you_say_otherwise():
    code = "import potara_lite, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    for set_before, expected in (({}, "3000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")):
        assert finished([sys.executable, "-c", code], env=plain | set_before).stdout == f"{expected}\n"


@pytest.mark.parametrize("vectorize", [True, False])
def test_an_interrupted_training_leaves_the_model_as_it_was(adapted, federation, vectorize):
    """Ctrl-C in the middle of a step, as a notebook's stop button does it: the next cell has the right numbers."""
    split, execution = federation.train, Execution(vectorize=vectorize)
    stack = repeat_adapter(adapted.initial, 3)
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}

    def trained():
        return train(adapted, stack, split, steps=4, batch_size=4, execution=execution).adapters

    expected, (loss, _) = trained(), evaluate(adapted, stack, split)
    for moment in (0.1, 0.25, 0.5):
        timer = threading.Timer(moment, _thread.interrupt_main)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            train(adapted, stack, split, steps=5000, batch_size=4, execution=execution)
            time.sleep(10)
        timer.join()
        found = trained()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert torch.equal(evaluate(adapted, stack, split)[0], loss)
    after = adapted.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], t) for name, t in before.items())
    elsewhere = threading.Thread(target=trained, daemon=True)  # a lock that is still held would stop it
    elsewhere.start()
    elsewhere.join(60)
    assert not elsewhere.is_alive()
