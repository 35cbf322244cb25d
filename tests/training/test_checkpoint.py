"""Runs that stop go on to the same bits; a file that is damaged or of another run is refused."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import WAIT, changed_split, tiny_federation, tiny_vit, wait_until

from potara_lite import Execution, FileError, attach, fedit, load_state, save_state, train
from potara_lite.training import fedavg
from potara_lite.training.checkpoint import ROUNDS_FILE
from potara_lite.training.train import OptimizerState

RUN = dict(rounds=4, local_steps=2, batch_size=3, lr=0.01)


def tensors(run):
    return {**run.adapter, **vars(run.state), **vars(run.by_round), **vars(run.ledger), "losses": run.losses}


def same(one, two):
    one, two = ({name: tensor.nan_to_num(7) for name, tensor in tensors(run).items()} for run in (one, two))
    assert list(one) == list(two)
    return all(torch.equal(tensor, two[name]) and tensor.dtype == two[name].dtype for name, tensor in one.items())


def interrupted(after, monkeypatch, *arguments, **options):
    """Ctrl-C in the middle of the round after so many."""
    calls = []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fedavg, "train", stop)
        fedit(*arguments, **options)


WAYS = {
    "all": {},
    "some": dict(participation=0.5, seed=3),
    "new optimiser": dict(keep_optimizer=False),
    "later": dict(start=5),
    "clipped": dict(clip=0.1, execution=Execution(chunk_size=2)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_run_goes_on_to_the_same_bits(way, after, adapted, federation, monkeypatch, tmp_path):
    options = RUN | WAYS[way]
    whole = fedit(adapted, federation.train, **options)
    interrupted(after, monkeypatch, adapted, federation.train, **options, checkpoint=tmp_path / "run")
    found = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert found == ({ROUNDS_FILE} if after else set())
    played = []
    monkeypatch.setattr(fedavg, "train", lambda *args, **kwargs: played.append(1) or train(*args, **kwargs))
    assert same(fedit(adapted, federation.train, **options, checkpoint=tmp_path / "run"), whole)
    assert len(played) == 4 - after
    assert same(fedit(adapted, federation.train, **options, checkpoint=tmp_path / "run"), whole)
    assert len(played) == 4 - after  # a finished run is read


def test_a_checkpoint_changes_nothing_and_more_rounds_go_on_from_it(adapted, federation, tmp_path):
    short = fedit(adapted, federation.train, **RUN | dict(rounds=1), checkpoint=tmp_path)
    assert same(short, fedit(adapted, federation.train, **RUN | dict(rounds=1)))
    longer = fedit(adapted, federation.train, **RUN, checkpoint=tmp_path)
    assert same(longer, fedit(adapted, federation.train, **RUN))
    with pytest.raises(FileError, match="checkpoint holds 4 rounds, more than rounds=3"):
        fedit(adapted, federation.train, **RUN | dict(rounds=3), checkpoint=tmp_path)


def other_label(split):
    y = split.y.clone()
    y[2, 0] = (y[2, 0] + 1) % 4
    return changed_split(split, y=y)


def other_pixel(split):
    x = split.x.clone()
    x[0, 0, 0, 0, 0] += 1e-6
    return changed_split(split, x=x)


def squared(logits, y):
    return logits.square().mean()


OTHERS = {
    "lr": dict(lr=0.02),
    "local_steps": dict(local_steps=3),
    "participation": dict(participation=0.9),
    "keep_optimizer": dict(keep_optimizer=False),
    "seed": dict(seed=1),
    "start": dict(start=1),
    "clip": dict(clip=1.0),
    "weight_decay": dict(weight_decay=0.1),
    "loss": dict(loss=squared),
    "execution.chunk_size": dict(execution=Execution(chunk_size=1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_with_another_argument_is_refused_by_its_name(name, adapted, federation, tmp_path):
    fedit(adapted, federation.train, **RUN, checkpoint=tmp_path)
    before = (tmp_path / ROUNDS_FILE).read_bytes()
    with pytest.raises(FileError, match=f"holds another run: {name} .*; name another checkpoint, or delete this one"):
        fedit(adapted, federation.train, **RUN | OTHERS[name], checkpoint=tmp_path)
    assert (tmp_path / ROUNDS_FILE).read_bytes() == before
    fedit(
        adapted, federation.train, **RUN | dict(clip=None, seed=0, progress=True), checkpoint=tmp_path
    )  # the defaults


def test_a_run_on_other_data_weights_or_from_another_start_is_refused(adapted, federation, random_adapter, tmp_path):
    split = federation.train
    fedit(adapted, split, **RUN, checkpoint=tmp_path)
    moved = tiny_vit()
    with torch.no_grad():
        moved.get_parameter(next(name for name, _ in moved.named_parameters())).view(-1)[0] += 1e-6
    state = OptimizerState.zeros(torch.zeros(3, 452))
    for what, call in {
        "data": lambda: fedit(adapted, other_label(split), **RUN, checkpoint=tmp_path),
        "data ": lambda: fedit(adapted, other_pixel(split), **RUN, checkpoint=tmp_path),
        "clients": lambda: fedit(adapted, split.rows([1, 0, 2]), **RUN, checkpoint=tmp_path),
        "backbone": lambda: fedit(attach(moved, rank=2, alpha=3), split, **RUN, checkpoint=tmp_path),
        "scaling": lambda: fedit(attach(tiny_vit(), rank=2, alpha=4), split, **RUN, checkpoint=tmp_path),
        "task": lambda: fedit(
            replace(adapted, task=replace(adapted.task, loss=squared)), split, **RUN, checkpoint=tmp_path
        ),
        "adapter": lambda: fedit(adapted, split, **RUN, adapter=random_adapter(adapted, 1), checkpoint=tmp_path),
        "state": lambda: fedit(adapted, split, **RUN, state=replace(state, steps=state.steps + 1), checkpoint=tmp_path),
    }.items():
        with pytest.raises(FileError, match=f"another run: .*{what.strip()} "):
            call()
    assert same(
        fedit(attach(tiny_vit(), rank=2, alpha=3), split, **RUN, checkpoint=tmp_path), fedit(adapted, split, **RUN)
    )


def test_two_runs_in_one_folder_do_not_mix(adapted, federation, monkeypatch, tmp_path):
    """Another run begins in the folder while this one plays its first round."""

    def while_training(*args, **kwargs):
        monkeypatch.setattr(fedavg, "train", train)
        fedit(adapted, federation.train, **RUN | dict(seed=1), checkpoint=tmp_path)
        return train(*args, **kwargs)

    monkeypatch.setattr(fedavg, "train", while_training)
    with pytest.raises(FileError, match="holds another run: seed 1, not 0"):
        fedit(adapted, federation.train, **RUN, checkpoint=tmp_path)


HARM = {
    "a changed number": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
    "half of it": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
    "another file": lambda content: b"{}" * 50,
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_file_is_refused(harm, adapted, federation, tmp_path):
    fedit(adapted, federation.train, **RUN, checkpoint=tmp_path)
    path = tmp_path / ROUNDS_FILE
    path.write_bytes(HARM[harm](path.read_bytes()))
    with pytest.raises(FileError, match=f"cannot read {path}"):
        fedit(adapted, federation.train, **RUN, checkpoint=tmp_path)
    with pytest.raises(FileError, match=f"cannot read {path}"):
        load_state(path)


def test_a_file_is_no_folder(adapted, federation, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="checkpoint must be a folder, not .*file"):
        fedit(adapted, federation.train, **RUN, checkpoint=tmp_path / "file")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_state_comes_back_bit_by_bit(dtype, adapted, random_stack, tmp_path):
    stack = {name: tensor.to(dtype) for name, tensor in random_stack(adapted, 3, 0).items()}
    state = OptimizerState(torch.randn(3, 452), torch.rand(3, 452), torch.tensor([1.0, 2.0, 3.0]))
    found = load_state(save_state(tmp_path / "new" / "state.safetensors", stack, state, start=7))
    assert list(found) == ["adapter", "state", "start"] and found["start"] == 7
    assert list(found["adapter"]) == list(stack)
    assert all(torch.equal(tensor, stack[name]) and tensor.dtype == dtype for name, tensor in found["adapter"].items())
    assert all(torch.equal(a, b) for a, b in zip(vars(found["state"]).values(), vars(state).values()))


def test_saved_rounds_go_on_by_hand(adapted, federation, tmp_path):
    half = fedit(adapted, federation.train, **RUN | dict(rounds=2))
    path = save_state(tmp_path / "half.safetensors", half.adapter, half.state, start=2)
    rest = fedit(adapted, federation.train, **RUN | dict(rounds=2), **load_state(path))
    whole = fedit(adapted, federation.train, **RUN)
    assert all(torch.equal(tensor, whole.adapter[name]) for name, tensor in rest.adapter.items())


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
from conftest import tiny_federation, tiny_vit
import torch
from potara_lite import attach, fedit
fedit(attach(tiny_vit(), rank=2, alpha=3), tiny_federation(torch.float32).train, rounds=400, local_steps=2,
      checkpoint={folder!r})
"""


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_process_leaves_its_last_whole_round(adapted, federation, tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stderr=subprocess.PIPE, text=True)
    wait_until((tmp_path / ROUNDS_FILE).exists, process)
    time.sleep(0.3)
    process.kill()
    error = process.communicate(timeout=WAIT)[1]
    assert process.returncode == -9, error
    split = tiny_federation(torch.float32).train
    with pytest.raises(FileError, match="checkpoint holds (\\d+) rounds, more than rounds=0") as found:
        fedit(adapted, split, rounds=0, local_steps=2, checkpoint=tmp_path)
    rounds = int(str(found.value).split()[2]) + 2
    kept = fedit(adapted, split, rounds=rounds, local_steps=2, checkpoint=tmp_path)
    assert same(kept, fedit(adapted, split, rounds=rounds, local_steps=2)) and rounds > 2
