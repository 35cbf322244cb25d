"""Files that are truncated, damaged or malicious: one error that names the file, or what is loaded is right.

Seeded mutations of every file that the library reads. ``POTARA_THOROUGH=1`` runs all of them, else a tenth.
"""

import copy
import hashlib
import io
import json
import lzma
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_text_encoder, tiny_vit, within
from safetensors.torch import load_file, save_file

from potara_lite.adapters.files import load_adapter, save_adapter
from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import rank_dim, stack_adapters
from potara_lite.baselines.sweep import read_results, sweep
from potara_lite.experiment import Result
from potara_lite.federation import sources, tasks as task_files
from potara_lite.federation.partition import SupplyError
from potara_lite.federation.tasks import Question, read_task
from potara_lite.files import FileError, check_file, reading, run_folder, write_atomically
from potara_lite.merging.merge import merge_exact
from potara_lite.models import language
from potara_lite.models.vit import lab_vit
from potara_lite.setting import Setting
from potara_lite.training.fedavg import Ledger

MUTATIONS = 500 if os.environ.get("POTARA_THOROUGH") else 50
HOSTILE = [None, True, False, 0, -1, 1, 3, 0.5, 1e308, float("nan"), float("inf"), "", "x", "(", "\ud800", [], {}, [[]],
           {"": 0}, [1, 2, 3], "9" * 50, 2**31, 2**63, 10**30]  # fmt: skip


def mutated_bytes(content, rng):
    """Cut, flipped, zeroed, doubled, lost or added bytes; half of the time near the beginning, where headers are."""
    content, near = bytearray(content), rng.random() < 0.5
    start = rng.randrange(min(len(content), 300) if near else len(content))
    end = start + rng.choice([1, 4, 64, 1000])
    kind = rng.choice(["cut", "flip", "zero", "double", "lose", "add"])
    if kind == "cut":
        return bytes(content[:start])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 8])):
            content[rng.randrange(start, min(end, len(content)))] ^= 1 << rng.randrange(8)
    if kind == "zero":
        content[start:end] = bytes(len(content[start:end]))
    if kind == "double":
        content[start:start] = content[start:end]
    if kind == "lose":
        del content[start:end]
    if kind == "add":
        content[start:start] = rng.randbytes(end - start)
    return bytes(content)


def mutated_json(value, rng):
    """A JSON value with one of its parts replaced by a hostile one, swapped with another, renamed or lost."""
    value, positions = copy.deepcopy(value), []

    def walk(container):
        for key in container if isinstance(container, dict) else range(len(container)):
            positions.append((container, key))
            if isinstance(container[key], dict | list):
                walk(container[key])

    walk(holder := [value])
    (one, key), (two, other) = rng.choice(positions), rng.choice(positions[1:] or positions)
    kind = rng.choice(["replace", "replace", "grow", "swap", "lose", "rename"])
    if kind == "grow" and isinstance(one[key], int | float | list):  # of a list, a shape say, the first part
        one[key] = [rng.choice([2**40, 10**12]), *one[key][1:]] if isinstance(one[key], list) else one[key] * 2**20
    elif kind == "swap" and one is not holder:
        one[key], two[other] = copy.deepcopy(two[other]), copy.deepcopy(one[key])
    elif kind == "lose" and one is not holder:
        del one[key]
    elif kind == "rename" and isinstance(one, dict):
        one[str(key) + "x"] = one.pop(key)
    else:
        one[key] = rng.choice(HOSTILE)
    return holder[0]


def mutated(path, content, rng):
    """Bytes of a file of this kind, mutated as a whole or, half of the time, within its structure."""
    if rng.random() < 0.5:
        return mutated_bytes(content, rng)
    if path.suffix == ".json":
        return json.dumps(mutated_json(json.loads(content), rng)).encode()
    if path.suffix == ".jsonl":
        lines = content.decode().splitlines()
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(mutated_json(json.loads(lines[i]), rng))
        return "\n".join(lines).encode()
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        if "settings" in header["__metadata__"] and rng.random() < 0.5:
            header["__metadata__"]["settings"] = json.dumps(mutated_json(json.loads(SETTINGS), rng))
        else:
            header = mutated_json(header, rng)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[end:]
    if path.suffix == ".npz":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = rng.choice(sorted(members))
        end = 10 + int.from_bytes(members[name][8:10], "little")
        header = re.sub(rb"\(\d+", b"(%d" % rng.choice([0, 7, 2**40]), members[name][10:end], count=1)
        reshaped = members[name][:10] + header.strip().ljust(end - 11) + b"\n" + members[name][end:]
        members[name] = rng.choice([mutated_bytes(members[name], rng), reshaped])
        with zipfile.ZipFile(whole := io.BytesIO(), "w") as archive:
            for name, member in members.items():
                archive.writestr(name, member)
        return whole.getvalue()
    if path.suffix == ".xz":
        return lzma.compress(mutated_bytes(lzma.decompress(content), rng))
    return mutated_bytes(content, rng)


SETTINGS = json.dumps(dict(dim=16, depth=1, heads=2, mlp_ratio=2, stem=3))


@pytest.fixture
def network(monkeypatch):
    """What is asked of the network: an empty list, which must stay so."""
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


@pytest.fixture
def adapter_folder(tmp_path, adapted, random_adapter):
    folder = save_adapter(adapted, random_adapter(adapted, 0), tmp_path / "adapter")

    def verify(adapter):
        assert list(adapter) == list(adapted.initial)
        options = json.loads((folder / "adapter_config.json").read_text())
        assert options["peft_type"] == "LORA" and options["r"] == 2
        scaling = options["lora_alpha"] / (2**0.5 if options.get("use_rslora") else 2)
        stored = load_file(folder / "adapter_model.safetensors")
        for name, tensor in adapter.items():
            shape = list(adapted.initial[name].shape)
            if "lora" in name:
                shape[rank_dim(name, adapted.initial[name])] = 2
            assert list(tensor.shape) == shape and tensor.is_floating_point() and tensor.isfinite().all()
            factor = scaling / 1.5 if "lora_B" in name else 1  # the backbone's scaling is 1.5
            torch.testing.assert_close(tensor, stored[name] * factor)

    return [*folder.iterdir()], lambda: load_adapter(adapted, folder), verify


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "small.safetensors"
    save_file(tiny_vit().state_dict(), path, metadata={"settings": SETTINGS})

    def verify(model):
        like = tiny_vit().state_dict()
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
            name: tensor.shape for name, tensor in like.items()
        }
        assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in model.state_dict().values())
        assert model(torch.rand(1, 1, 28, 28)).shape == (1, 4)

    return [path], lambda: lab_vit(4, checkpoint=path), verify


def sealed(path, load):
    """``load`` once the file has the digest that it should have, as one that was made to do harm has."""

    def loader():
        path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest().upper())
        return load()

    return loader


@pytest.fixture
def images(tmp_path, monkeypatch):
    path, rng = tmp_path / "fashion_mnist.npz", np.random.default_rng(0)
    arrays = {f"{part}_images": rng.integers(0, 256, (100, 28, 28), dtype=np.uint8) for part in ("train", "test")}
    arrays |= {f"{part}_labels": np.arange(100, dtype=np.uint8) % 10 for part in ("train", "test")}
    np.savez_compressed(path, **arrays)
    monkeypatch.setattr(sources, "data_path", lambda name: tmp_path / name)
    options = dict(clients=2, train_size=10, calibration_size=5, test_size=5, alpha=float("inf"))

    def load():
        try:
            return sources.fashion_mnist(**options)
        except SupplyError:  # of whole files with fewer examples of a class
            return None

    def verify(federation):
        if federation is not None:
            assert federation.train.x.shape == (2, 10, 1, 28, 28) and federation.train.x.dtype == torch.float32
            assert 0 <= federation.test.x.min() and federation.test.x.max() <= 1

    return [path], sealed(path, load), verify


@pytest.fixture
def glosses(tmp_path, monkeypatch):
    path = tmp_path / "wordnet_glosses.xz"
    lines = [f"{sense}\t{sense} number {i}" for sense in ("act", "animal", "time") for i in range(30)]
    path.write_bytes(lzma.compress("\n".join(lines).encode()))
    monkeypatch.setattr(task_files, "data_path", lambda name: tmp_path / name)

    def verify(found):
        names, texts, labels = found
        assert len(texts) == len(labels) and labels.max() == len(names) - 1 and all(text.strip() for text in texts)

    return [path], sealed(path, task_files.read_glosses), verify


TASKS = [
    {"instruction": "Same?\nOPTIONS:\n- no\n- yes", "output": "no", "task": "wic"},
    {"instruction": "Which?\nAnswer format: one/two", "input": "", "output": "it is two", "answer": "two"},
    {"answerKey": "B",
     "question": {"stem": "W?", "choices": [{"text": "1", "label": "A"}, {"text": "2", "label": "B"}]}},
    {"question": "is it so", "passage": "It is so.", "answer": True},
]  # fmt: skip


@pytest.fixture
def tasks(tmp_path):
    array, lines = tmp_path / "task.json", tmp_path / "lines.jsonl"
    array.write_text(json.dumps(TASKS))
    lines.write_text("\n".join(map(json.dumps, TASKS)))

    def verify(questions):
        for question in (one for found in questions for one in found):
            assert isinstance(question, Question) and question.prompt.strip() and question.answer.strip()
            assert all(isinstance(text, str) for text in (question.prompt, question.answer, question.task))
            assert not question.options or question.answer in question.options

    return [array, lines], lambda: [read_task(array), read_task(lines)], verify


@pytest.fixture
def result_files(tmp_path, adapted, federation):
    def method(run):
        stack = stack_adapters([adapted.initial] * 3)
        return Result(adapted, stack, Ledger.zeros(3), 0.0)

    settings = {"one": Setting(), "two": Setting()}
    rows = sweep({"a": method, "b": method}, settings, [0], tmp_path, prepare=lambda *_: (adapted, federation))

    def verify(found):
        pd.testing.assert_frame_equal(found, rows)

    return [*tmp_path.glob("*/seed-0/*.csv")], lambda: read_results(tmp_path), verify


@pytest.fixture
def run_of_a_command(tmp_path):
    rows = pd.DataFrame({"method": ["a", "b", "b"], "seed": [0, 0, 1], "loss": [0.1, 1 / 3, 2.0]})
    config = json.dumps({"setting": {"clients": 2, "alpha": 0.5, "shift": False}, "seeds": [0, 1]}, indent=2)
    with run_folder(tmp_path, config) as folder:
        folder.begin()
        folder.add(rows[:1])
        folder.add(rows[1:])

    def load():
        with run_folder(tmp_path, config) as folder:
            return folder.rows

    def verify(found):
        whole = len(found) == 3 or found.index.tolist() == [0]  # or cut exactly to what it was before
        assert whole and (found.to_numpy() == rows[: len(found)].to_numpy()).all()

    return [tmp_path / name for name in ("config.json", "results.csv", "results.digest")], load, verify


@pytest.fixture
def encoder(tmp_path):
    pytest.importorskip("transformers")
    folder = tmp_path / "encoder"
    folder.mkdir()
    tiny_text_encoder(folder)
    files = [folder / name for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")]

    def verify(found):
        model, tokenizer = found
        assert isinstance(model, language.TextClassifier) and callable(tokenizer)

    return files, lambda: (language.text_encoder(folder, 3), language.text_tokenizer(folder)), verify


LOADERS = ["adapter_folder", "checkpoint", "images", "glosses", "tasks", "result_files", "run_of_a_command", "encoder"]


@pytest.mark.parametrize("loader", LOADERS)
def test_a_mutated_file_is_refused_by_name_or_what_is_loaded_verifies(loader, request, network):
    files, load, verify = request.getfixturevalue(loader)
    originals, refused = {path: path.read_bytes() for path in files}, 0
    verify(load())
    for number in range(MUTATIONS):
        rng = random.Random(f"{loader} {number}")
        path = rng.choice(files)
        path.write_bytes(mutated(path, originals[path], rng))
        try:
            found = load()
        except FileError as error:
            assert "\n" not in str(error) and len(str(error)) < 800, (number, error)
            assert path.name in str(error) or str(path.parent) in str(error), (number, error)
            refused += 1
        except BaseException as error:
            raise AssertionError(f"mutation {number} of {path.name}: {error!r}") from error
        else:
            verify(found)
        path.write_bytes(originals[path])
    assert refused > MUTATIONS / 3 and not network
    verify(load())


def edited(**options):
    """An edit of an adapter's configuration."""

    def edit(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))

    return edit


def tensors(change):
    """An edit of an adapter's tensors, by ``change`` of the first layer's A and B and of the head."""

    def edit(folder):
        path, names = folder / "adapter_model.safetensors", ("lora_A.weight", "lora_B.weight", "head.weight")
        found = load_file(path)
        keys = [next(name for name in found if name.endswith(end)) for end in names]
        found |= {n: t.contiguous() for n, t in zip(keys, change(*(found[n] for n in keys))) if t is not None}
        save_file(found, path)

    return edit


HARM = {
    "alpha is NaN": (edited(lora_alpha=float("nan")), "the scaling of .* must be positive, not nan"),
    "alpha is infinite": (edited(lora_alpha=float("inf")), "the scaling of .* must be positive, not inf"),
    "alpha is beyond float32": (edited(lora_alpha=1e308), "finite|float32"),
    "alpha is text": (edited(lora_alpha="3"), "TypeError"),
    "DoRA": (edited(use_dora=True), "use_dora=True: with this option a layer is not W"),
    "activated LoRA": (edited(alora_invocation_tokens=[1]), "alora_invocation_tokens="),
    "another kind": (edited(peft_type="IA3"), "peft_type must be 'LORA', not 'IA3'"),
    "no kind": (edited(peft_type=None), "peft_type must be 'LORA'"),
    "another rank": (edited(r=4), "has rank 2, adapter_config.json says 4"),
    "a broken pattern": (edited(alpha_pattern={"(": 3}), "cannot read .*adapter"),
    "patterns that are none": (edited(alpha_pattern=[1]), "cannot read .*adapter"),
    "a rewritten base": (edited(init_lora_weights="pissa_niter_4"), "belongs to other base weights"),
    "a bias": (edited(bias="lora_only"), "bias='lora_only': with this option"),
    "an option of the future": (edited(use_magic=[1]), r"use_magic=\[1\]: with this option"),
    "NaN": (tensors(lambda a, b, head: (a, b * torch.nan, head)), "must be finite"),
    "infinite": (tensors(lambda a, b, head: (a, b, head / 0)), "must be finite"),
    "whole numbers": (tensors(lambda a, b, head: (a.int(), b, head)), "16 bits or more: .* torch.int32"),
    "true and false": (tensors(lambda a, b, head: (a, b, head.bool())), "torch.bool"),
    "complex": (tensors(lambda a, b, head: (a, b, head + 0j)), "torch.complex64"),
    "eight bits": (tensors(lambda a, b, head: (a.to(torch.float8_e4m3fn), b, head)), "torch.float8_e4m3fn"),
    "a dimension more": (tensors(lambda a, b, head: (a, b.unsqueeze(0), head)), "dim 0 of all its tensors or of none"),
    "a dimension more at the end": (tensors(lambda a, b, head: (a, b.unsqueeze(2), head)), "dim 0 of all its tensors"),
    "a kernel": (tensors(lambda a, b, head: (a[..., None, None], b[..., None, None], head)), "has shape"),
    "rank 0": (tensors(lambda a, b, head: (a[:0], b[:, :0], head)), "has rank 0"),
    "two ranks": (tensors(lambda a, b, head: (a[:1], b, head)), "has rank 1, adapter_config.json says 2"),
    "turned": (tensors(lambda a, b, head: (a, b.T, head)), "has shape"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_a_harmed_adapter_is_refused_and_its_folder_named(harm, adapter_folder, tmp_path, network):
    _, load, _ = adapter_folder
    edit, message = HARM[harm]
    edit(tmp_path / "adapter")
    with pytest.raises(FileError, match=message) as caught:
        load()
    assert str(tmp_path / "adapter") in str(caught.value) and "\n" not in str(caught.value) and not network


ENDLESS = [
    "(a+)+$", "(.*a){12}", "((a*)*)*b", "(a|aa)+$", "(a?){40}a{40}", "a?" * 30 + "a" * 30, ".*" * 6 + "x",
    "(?:(?:a{0,9}){0,9}){0,9}z", "(.|.)" * 30, r"(\w+\.?)+!", "(?=(a+)+b)x", "(?:.*?,){9}", "(" * 9 + "a" + "*)" * 9,
    r"(.*)\1(.*)\2(.*)\3(.*)\4",
]  # fmt: skip
USUAL = [
    r".*\.(q_proj|v_proj)", r".*layers\.[0-9]+\.mlp\.(fc1|fc2)", "qkv", r"^blocks\.0\.attn\.qkv", ".*",
    r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj", r".*\.(\d+)\.(?:.*\.)?(q|k|v)_proj",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
]  # fmt: skip


@pytest.mark.parametrize("endless", ENDLESS)
def test_a_pattern_that_may_never_end_does_no_harm(endless, adapter_folder, tmp_path):
    """Those of targets are not read: names come from the tensors. Those of ranks and alphas are given up in time."""
    original, load, _ = adapter_folder
    config = tmp_path / "adapter" / "adapter_config.json"
    before = config.read_text()
    with within(30):
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            edited(**{name: endless})(config.parent)
            load()
            config.write_text(before)
        for name in ("rank_pattern", "alpha_pattern"):
            edited(**{name: {endless: 2}})(config.parent)
            try:
                load()
            except FileError as error:
                assert str(config.parent) in str(error)
            config.write_text(before)


def test_the_usual_patterns_are_matched_as_peft_does(adapter_folder, tmp_path, backbone):
    edited(target_modules=USUAL[0], alpha_pattern=dict.fromkeys(USUAL[1:4], 3), exclude_modules=USUAL[-1])(
        tmp_path / "adapter"
    )
    adapter_folder[1]()
    assert len(attach(backbone, targets=r".*\.[0-9]+\..*(fc1|fc2)").scaling) == 2


def test_no_file_of_an_adapter_is_asked_of_the_network(adapter_folder, tmp_path, network):
    files, load, _ = adapter_folder
    for path in (path for path in files if path.name != "README.md"):  # the model card, which nothing reads
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(FileError, match=f"cannot read .*{path.name}"):
            load()
        path.write_bytes(content)
    load()
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(FileError, match="adapter"):
        load()
    assert not network


NO_ADAPTER = {
    "a stack": (lambda one: stack_adapters([one, one]), "must be one adapter, not a stack of 2"),
    "a stack of merges": (lambda one: stack_adapters([merge_exact(one, one, 0.5)] * 2), "not a stack of 2"),
    "a layer less": (lambda one: dict(list(one.items())[2:]), "2 tensors are of one only"),
    "no head": (lambda one: {name: t for name, t in one.items() if "head" not in name}, "2 tensors are of one only"),
    "a tensor more": (lambda one: one | {"extra": torch.zeros(2)}, "1 tensors are of one only, such as 'extra'"),
    "NaN": (lambda one: {name: t * torch.nan for name, t in one.items()}, "must be finite"),
    "half, too large": (lambda one: {name: (1e6 * t.abs() + 1e6).half() for name, t in one.items()}, "must be finite"),
    "whole numbers": (lambda one: {name: t.long() for name, t in one.items()}, "torch.int64"),
    "another shape": (lambda one: {name: t[..., :1] for name, t in one.items()}, "of this base|rank"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_ADAPTER)
def test_what_is_no_adapter_is_not_saved(name, adapted, random_adapter, tmp_path):
    change, message = NO_ADAPTER[name]
    with pytest.raises(ValueError, match=message):
        save_adapter(adapted, change(random_adapter(adapted, 0)), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_is_saved_as_the_same_bytes_and_as_peft_saves_its_configuration(adapted, random_adapter, tmp_path):
    one, two = (save_adapter(adapted, random_adapter(adapted, 0), tmp_path / name) for name in "ab")
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}
    assert {path.name for path in one.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    adapted.config.save_pretrained(tmp_path / "peft")
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("a", "peft"))
    assert ours["target_modules"] == sorted(theirs["target_modules"])
    odd = {name for name in theirs if ours[name] != theirs[name]} - {"target_modules"}
    assert ours.keys() == theirs.keys() and odd <= {"inference_mode"}


def test_a_full_disk_leaves_what_was_there(adapted, random_adapter, tmp_path, monkeypatch):
    folder = save_adapter(adapted, random_adapter(adapted, 0), tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(adapted, random_adapter(adapted, 1), folder)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "new.csv", "a" * 100)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and not (tmp_path / "new.csv").exists()
    assert not list(tmp_path.rglob("*.part"))


def test_what_a_killed_process_left_goes_and_what_others_write_stays(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = platform.node()
    left = tmp_path / f"a.csv.{here}.{gone.pid}.part"
    others = [f"a.csv.{here}.{os.getppid()}", f"a.csv.elsewhere.{gone.pid}", f"b.csv.{here}.{gone.pid}", "a.csv.mine"]
    for path in (left, *(tmp_path / f"{name}.part" for name in others)):
        path.write_text("half")
    write_atomically(tmp_path / "a.csv", "whole")
    assert (tmp_path / "a.csv").read_text() == "whole" and not left.exists()
    assert {path.stem for path in tmp_path.glob("*.part")} == set(others)


def test_a_digest_may_be_in_capitals_and_its_file_must_be_whole(tmp_path):
    path = tmp_path / "some.npz"
    path.write_bytes(b"something")
    digest = hashlib.sha256(b"something").hexdigest()
    for text in (digest, digest.upper() + "  some.npz\n"):
        path.with_suffix(".sha256").write_text(text)
        assert check_file(path) == path
    for content in (b"", b"\xff\xfe", b"0" * 64):
        path.with_suffix(".sha256").write_bytes(content)
        with pytest.raises(FileError, match="cannot read .*some.sha256|some.npz is damaged"):
            check_file(path)
    path.with_suffix(".sha256").unlink()
    with pytest.raises(FileError, match="cannot read .*some.sha256"):
        check_file(path)


def test_every_error_while_reading_names_the_file_on_one_line():
    for error in (ValueError("a\nb"), KeyError("settings"), MemoryError(), RecursionError("deep"), re.error("broken")):
        with pytest.raises(FileError) as caught, reading("some/file"):
            raise error
        assert str(caught.value).startswith("cannot read some/file: ") and "\n" not in str(caught.value)
        assert caught.value.__cause__ is error
        assert isinstance(error, ValueError) or type(error).__name__ in str(caught.value)
    with pytest.raises(KeyboardInterrupt), reading("some/file"):
        raise KeyboardInterrupt
    with pytest.raises(FileError, match="^inner is missing$"), reading("some/file"):
        raise FileError("inner is missing")


def test_a_text_encoder_that_lacks_a_block_is_refused(encoder, network):
    files, load, _ = encoder
    weights = load_file(files[1])
    save_file({name: t for name, t in weights.items() if "layer.1.attention" not in name}, files[1], {"format": "pt"})
    with pytest.raises(FileError, match="it lacks 10 tensors, such as 'encoder.layer.1.attention"):
        load()
    assert not network


ABSURD = {"num_hidden_layers": 10**9, "hidden_size": 10**9, "vocab_size": 10**12, "intermediate_size": 10**9,
          "num_attention_heads": 10**9, "num_labels": 10**9, "n_layers": 999}  # fmt: skip


@pytest.mark.parametrize("name", ABSURD)
def test_a_model_larger_than_its_weights_is_refused_at_once(name, encoder, network):
    files, load, _ = encoder
    files[0].write_text(json.dumps(json.loads(files[0].read_text()) | {name: ABSURD[name]}))
    for build in (load, lambda: language.causal_lm(files[0].parent)):
        with (
            within(20),
            pytest.raises(FileError, match=f"config.json asks for {name}={ABSURD[name]}, its weights have"),
        ):
            build()
    files[1].unlink()
    if name != "n_layers":
        with within(20), pytest.raises(FileError, match=f"config.json asks for {name}={ABSURD[name]}"):
            load()
    assert not network


def test_no_code_that_comes_with_a_text_encoder_is_run(encoder, tmp_path, network):
    files, load, _ = encoder
    theirs = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModel": "mine.M"}}
    files[0].write_text(json.dumps(json.loads(files[0].read_text()) | theirs))
    (files[0].parent / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(FileError, match="encoder"):
        load()
    assert not (tmp_path / "ran").exists() and not network
