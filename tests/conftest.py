"""A tiny backbone, a tiny federation with clients of unequal size, and random adapters, in float32 and float64."""

import copy
import signal
import subprocess
import time
from contextlib import contextmanager
from types import SimpleNamespace

import notebook_outputs
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from potara_lite import potara
from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import delta, repeat_adapter
from potara_lite.federation.batches import batch_indices
from potara_lite.federation.inputs import take
from potara_lite.federation.sources import from_tensors
from potara_lite.federation.split import _split as unchecked_split
from potara_lite.models.vit import LabViT

collect_ignore = ["typed_api.py", "notebook_startup.py"]  # mypy reads the one, kernels run the other


def pytest_configure():
    notebook_outputs.compare_with_tolerance()


SIZES = (5, 13, 9)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(8, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.fc1(x).tanh())


def tiny_vit(dtype=torch.float32, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LabViT(classes=4, dim=16, depth=1, heads=2, stem=3).eval().to(dtype)


def tiny_federation(dtype):
    generator = torch.Generator().manual_seed(1)

    def examples(n):
        x = torch.rand(n, 1, 28, 28, generator=generator, dtype=torch.float64).to(dtype)
        return x, torch.randint(4, (n,), generator=generator)

    train, test, held = ([examples(n) for n in sizes] for sizes in (SIZES, (7, 4, 6), (3, 6, 4)))
    return from_tensors(train, test, calibration=held, classes=4)


def tiny_text_encoder(folder):
    """A folder with a random BERT of two blocks and a tokenizer of whole words, as a user would name it."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a of the or in an to and is by with for that used".split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    BertModel(BertConfig(**sizes, intermediate_size=32, max_position_embeddings=32)).save_pretrained(folder)
    return str(folder)


def changed_split(split, x=None, y=None):
    """The split with other inputs or labels, padded as ``split.x`` and ``split.y`` are, and checked by nothing."""
    x = split.x if x is None else x
    y = split.y if y is None else y
    examples = [(take(x, (i, slice(n))), y[i, :n]) for i, n in enumerate(split.sizes.tolist())]
    return unchecked_split(examples, split.ids)


@contextmanager
def within(seconds):
    """Stop what takes longer: loops and regular expressions look at signals."""

    def stop(*_):
        raise TimeoutError(f"not done in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # of pytest-timeout


WAIT = 180  # seconds that a test waits for another process


def finished(command, *, check=True, **options):
    """The ended process: within three minutes and, where ``check``, without an error; else you see what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, **options)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"not done in {WAIT} s: {command}\nstdout: {error.stdout}\nstderr: {error.stderr}")
    assert not check or done.returncode == 0, f"{command}\nstdout: {done.stdout}\nstderr: {done.stderr}"
    return done


def wait_until(happened, process):
    """Wait for something that a process does: three minutes at most, and not longer than it lives."""
    deadline = time.monotonic() + WAIT
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"did not happen in {WAIT} s; status {process.wait()}, said {process.communicate()}")
        time.sleep(0.01)


def peft_model(adapted):
    """The PEFT model of an adapted backbone with its adapter ready to train: what ``potara.py`` works on."""
    model = copy.deepcopy(adapted.model)
    for name in adapted.parameter_names.values():
        model.get_parameter(name).requires_grad_(True)
    potara.set_weights(model, {name: adapted.initial[key] for key, name in adapted.parameter_names.items()})
    return model


def train_one_by_one(
    adapted, adapters, split, *, steps, batch_size=8, lr=1e-3, weight_decay=0.0, clip=None, seed=0, start=0
):
    """``potara.train`` for one client after another: what ``train`` is held to."""
    stacks, losses = {name: [] for name in adapters}, []
    for client, number in enumerate(split.ids):
        model, (x, y) = peft_model(adapted), split.client(client)
        potara.set_weights(model, {adapted.parameter_names[name]: t[client] for name, t in adapters.items()})
        weights = list(potara.trained(model).values())
        optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
        if clip is not None:
            optimizer.register_step_pre_hook(lambda *_, w=weights: torch.nn.utils.clip_grad_norm_(w, clip) and None)
        seeds = (seed, number) if isinstance(seed, int) else (*seed, number)
        losses.append([])
        for batch in batch_indices(len(y), start, steps, batch_size, seeds):
            losses[-1].append(F.cross_entropy(model(x[batch]), y[batch]).detach())
            potara.train(model, optimizer, x, y, batch.unsqueeze(0))
        trained = potara.get_weights(model)
        for name in adapters:
            stacks[name].append(trained[adapted.parameter_names[name]])
    stack = {name: torch.stack(rows) for name, rows in stacks.items()}
    return SimpleNamespace(adapters=stack, losses=torch.stack([torch.stack(curve) for curve in losses]))


@pytest.fixture(scope="session")
def backbone():
    return tiny_vit()


@pytest.fixture(scope="session")
def backbone64():
    return tiny_vit(torch.float64)


@pytest.fixture(scope="session")
def adapted(backbone):
    """Rank 2 and alpha 3, so that a forgotten or doubled scaling of 1.5 shows."""
    return attach(backbone, rank=2, alpha=3)


@pytest.fixture(scope="session")
def adapted64(backbone64):
    return attach(backbone64, rank=2, alpha=3)


@pytest.fixture(scope="session")
def federation():
    return tiny_federation(torch.float32)


@pytest.fixture(scope="session")
def federation64():
    return tiny_federation(torch.float64)


@pytest.fixture(scope="session")
def random_stack():
    """A stack with every tensor random, of the shapes of ``adapted.initial``: LoRA ``B`` and head are not zero."""

    def make(adapted, clients, seed, scale=0.2):
        generator = torch.Generator().manual_seed(seed)
        stack = repeat_adapter(adapted.initial, clients)
        return {
            name: (scale * torch.randn(t.shape, generator=generator, dtype=torch.float64)).to(t)
            for name, t in stack.items()
        }

    return make


@pytest.fixture(scope="session")
def random_adapter(random_stack):
    def make(adapted, seed, scale=0.2):
        return {name: tensor[0] for name, tensor in random_stack(adapted, 1, seed, scale).items()}

    return make


@pytest.fixture(scope="session")
def dense_logits():
    """Logits of a backbone whose dense weights were moved by a delta: no LoRA, no PEFT, no vmap."""

    def run(backbone, adapter, scaling, x):
        model, prefix = copy.deepcopy(backbone), "base_model.model."
        with torch.no_grad():
            for name, change in delta(adapter, scaling).items():
                weight = model.get_parameter(name.removeprefix(prefix))
                if name.removesuffix(".weight") in scaling:
                    weight += change.reshape(weight.shape)
                else:
                    weight.copy_(change)
            return model(x)

    return run
