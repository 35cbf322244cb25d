"""The engine at its edges: backbones that vmap cannot take, clients that diverge, memory, bf16."""

import gc
import os
import shutil
import sys
import sysconfig
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import changed_split, finished, train_one_by_one
from hypothesis import given, settings, strategies as st
from test_results import script
from torch import nn
from torch.nn import functional as F

from potara_lite.adapters.lora import ModelState, attach
from potara_lite.adapters.state import client_adapter, flatten, repeat_adapter
from potara_lite.training import batching, grouped_lora
from potara_lite.training.batching import Execution, map_clients, plan_execution
from potara_lite.training.gradients import directional_derivatives, per_sample_gradients
from potara_lite.training.train import DivergedError, OptimizerState, compiled_losses, evaluate, losses, train

OPTIONS = dict(steps=6, batch_size=4, lr=2e-3, seed=3)


class Plain(nn.Module):
    """Two linear layers with a normalisation over each image between them."""

    def __init__(self, inputs=49):
        super().__init__()
        self.fc1, self.head = nn.Linear(inputs, 6), nn.Linear(6, 4)

    def between(self, h):
        return h.relu()

    def forward(self, x):
        return self.head(self.between(self.fc1(F.avg_pool2d(x, 4).flatten(1))))


class Item(Plain):
    def between(self, h):
        return h / max(1.0, h.detach().abs().max().item())


class Branch(Plain):
    def between(self, h):
        return h.relu() if h.mean() > 0 else h.sigmoid()


class NumPy(Plain):
    def between(self, h):
        return h * torch.from_numpy(h.detach().numpy().std(1, keepdims=True))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class NoRule(Plain):
    def between(self, h):
        return Square.apply(h)


class Normed(Plain):
    """A batch norm over several positions of each image, so that a batch of one will do."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def between(self, h):
        return self.norm(h.unsqueeze(1)).squeeze(1).relu()


class Noisy(Plain):
    def between(self, h):
        return F.dropout(h, 0.5, training=True)


REASONS = {
    Item: r"\.item\(\)",
    Branch: "data-dependent control flow",
    NumPy: "data pointer",
    NoRule: "autograd.Function",
    Normed: "Batch norm",
}


def attached(kind, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = attach(kind().to(dtype), rank=2, alpha=3, targets=["fc1"])
    adapted.model.train(kind is Normed)
    return adapted


@pytest.fixture(params=REASONS, ids=lambda kind: kind.__name__)
def awkward(request):
    return attached(request.param), REASONS[request.param]


def test_a_backbone_that_vmap_cannot_take_trains_as_in_the_loop_and_says_why(awkward, federation64, random_stack):
    adapted, reason = awkward
    initial = random_stack(adapted, 3, seed=0)
    buffers = {name: buffer.clone() for name, buffer in adapted.model.named_buffers()}
    with pytest.warns(UserWarning, match=f"one after another.*{reason}") as caught:
        trained = train(adapted, initial, federation64.train, clip=0.5, weight_decay=0.1, **OPTIONS)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in adapted.model.named_buffers())
    oracle = train_one_by_one(adapted, initial, federation64.train, clip=0.5, weight_decay=0.1, **OPTIONS)
    torch.testing.assert_close(flatten(trained.adapters), flatten(oracle.adapters), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(trained.losses, oracle.losses, rtol=1e-9, atol=0)
    assert (flatten(trained.adapters) - flatten(initial)).abs().max() > 1e-3


def test_a_backbone_that_vmap_cannot_take_is_evaluated_and_differentiated(awkward, federation64, random_stack):
    adapted, _ = awkward
    stack, split = random_stack(adapted, 3, seed=1), federation64.calibration
    with pytest.warns(UserWarning, match="one after another"):
        gradients = per_sample_gradients(adapted, stack, split)
    for client, n in enumerate(split.sizes.tolist()):
        x, y = split.client(client)
        for i in range(n):
            leaves = {name: t.clone().requires_grad_() for name, t in client_adapter(stack, client).items()}
            value = F.cross_entropy(adapted(leaves, x[i : i + 1]), y[i : i + 1])
            oracle = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(leaves.values()))])
            torch.testing.assert_close(gradients[client, i], oracle, rtol=1e-9, atol=1e-13)
        assert not gradients[client, n:].any()
    adapted.model.eval()
    alone = split.rows([1])  # the largest: padding would change what depends on the whole batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in eval mode vmap takes the batch norm
        loss, accuracy = evaluate(adapted, {name: t[1:2] for name, t in stack.items()}, alone)
    x, y = alone.client(0)
    assert len(y) == alone.y.shape[1]
    logits = adapted(client_adapter(stack, 1), x)
    torch.testing.assert_close(loss[0], F.cross_entropy(logits, y), rtol=1e-9, atol=0)
    assert accuracy[0] == (logits.argmax(1) == y).double().mean()


def test_vmap_can_be_insisted_on(awkward, federation64):
    adapted, reason = awkward
    initial = repeat_adapter(adapted.initial, 3)
    for chunk_size in (None, 2):
        with pytest.raises(RuntimeError, match=reason):
            execution = Execution(vectorize=True, chunk_size=chunk_size)
            train(adapted, initial, federation64.train, execution=execution, **OPTIONS)


def test_one_after_another_can_be_asked_for_and_changes_nothing(adapted64, federation64, random_stack, monkeypatch):
    stack, split = random_stack(adapted64, 3, seed=2), federation64.train
    direction = flatten(random_stack(adapted64, 3, seed=3))

    def run(**how):
        trained = train(adapted64, stack, split, **OPTIONS, **how)
        return (
            flatten(trained.adapters), trained.losses, trained.state.mean, trained.state.square, trained.state.steps,
            *evaluate(adapted64, stack, split, **how),
            per_sample_gradients(adapted64, stack, split, **how),
            *directional_derivatives(adapted64, stack, direction, split, **how),
        )  # fmt: skip

    together = run()
    monkeypatch.setattr(batching, "vmap", None)  # whoever calls it now fails
    for one, two in zip(together, run(execution=Execution(vectorize=False)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_a_backbone_that_fails_alone_raises_its_error(federation64):
    adapted = attached(lambda: Plain(inputs=50))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="split: the backbone does not take .* shapes cannot be multiplied"):
            train(adapted, repeat_adapter(adapted.initial, 3), federation64.train, **OPTIONS)


def test_randomness_by_which_clients_would_depend_on_each_other_is_an_error(federation64):
    adapted = attached(Noisy)
    with pytest.raises(ValueError, match="draws random numbers in eval mode"):
        train(adapted, repeat_adapter(adapted.initial, 3), federation64.train, **OPTIONS)


def test_map_clients_maps_over_tensors_and_dictionaries_either_way():
    a, b = torch.arange(12.0).view(3, 4), {"w": torch.arange(3.0), "v": torch.ones(3, 4)}
    for vectorize in (True, False):
        result = map_clients(lambda x, p: p["w"] * x + p["v"], a, b, vectorize=vectorize)
        assert torch.equal(result, b["w"][:, None] * a + 1)


def spoilt(split, client):
    """The split with the inputs of one client no longer numbers."""
    x = split.x.clone()
    x[client] = float("nan")
    return changed_split(split, x)


@pytest.mark.parametrize("how", [{}, dict(chunk_size=1), dict(chunk_size=2), dict(vectorize=False)], ids=str)
def test_the_others_of_a_client_that_diverges_are_bitwise_what_they_were(adapted, federation, random_stack, how):
    initial = random_stack(adapted, 3, seed=0)
    healthy = train(adapted, initial, federation.train, clip=0.5, execution=Execution(**how), **OPTIONS)
    with pytest.raises(DivergedError, match="client 1 is not finite at step 0") as caught:
        train(adapted, initial, spoilt(federation.train, 1), clip=0.5, execution=Execution(**how), **OPTIONS)
    assert (caught.value.client, caught.value.step) == (1, 0)
    trained = caught.value.trained
    assert trained.losses[1].isnan().all() and flatten(trained.adapters)[1].isnan().any()
    for one, two in (
        (flatten(trained.adapters), flatten(healthy.adapters)),
        (trained.losses, healthy.losses),
        *((getattr(trained.state, f), getattr(healthy.state, f)) for f in ("mean", "square", "steps")),
    ):
        assert torch.equal(one[[0, 2]], two[[0, 2]])


def test_the_others_are_what_they_are_without_the_client_that_diverges(adapted64, federation64, random_stack):
    """A client that blows up by itself: in float64, as if the run had never had it."""
    initial, split = random_stack(adapted64, 3, seed=0), federation64.train
    x = split.x.clone()
    x[0] *= 1e200  # attention's products overflow
    with pytest.raises(DivergedError, match="client 0") as caught:
        train(adapted64, initial, changed_split(split, x), **OPTIONS)
    others = {name: tensor[1:] for name, tensor in initial.items()}
    without = train(adapted64, others, split.rows([1, 2]), **OPTIONS)
    trained = caught.value.trained
    torch.testing.assert_close(flatten(trained.adapters)[1:], flatten(without.adapters), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(trained.losses[1:], without.losses, rtol=1e-9, atol=0)


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(3)).flatmap(lambda p: st.integers(1, 3).map(lambda n: p[:n])),
    chunk_size=st.one_of(st.none(), st.integers(1, 4)),
    batch_size=st.integers(1, 6),
    memory=st.sampled_from([None, 1, 2e5]),
)
def test_order_chunks_and_memory_change_nothing(
    adapted64, federation64, random_stack, order, chunk_size, batch_size, memory
):
    initial, options = (
        random_stack(adapted64, 3, seed=5),
        dict(steps=2, batch_size=batch_size, lr=2e-3, clip=0.3, weight_decay=0.1),
    )
    oracle = train_one_by_one(adapted64, initial, federation64.train, **options)
    some = {name: tensor[order] for name, tensor in initial.items()}
    execution = Execution(chunk_size=chunk_size, memory_bytes=memory)
    trained = train(adapted64, some, federation64.train.rows(order), execution=execution, **options)
    torch.testing.assert_close(flatten(trained.adapters), flatten(oracle.adapters)[order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(trained.losses, oracle.losses[order], rtol=1e-9, atol=0)


def test_what_is_passed_in_is_not_written_to(adapted, federation, random_stack):
    initial = random_stack(adapted, 3, seed=6)
    state = OptimizerState(*(t + 1 for t in vars(OptimizerState.zeros(flatten(initial))).values()))
    given_, split = {**initial, **vars(state)}, federation.train
    before = {name: tensor.clone() for name, tensor in given_.items()}
    x = split.x.clone()
    for chunk_size in (None, 1):
        execution = Execution(chunk_size=chunk_size)
        train(adapted, initial, split, state=state, execution=execution, **OPTIONS)
        per_sample_gradients(adapted, initial, split, execution=execution)
    assert all(torch.equal(given_[name], tensor) for name, tensor in before.items()) and torch.equal(split.x, x)


def test_rows_by_slice_are_rows_by_number(federation):
    for index in (slice(0, 2), slice(1, None), slice(None, None, 2)):
        one, two = federation.train.rows(index), federation.train.rows(list(range(3))[index])
        assert one.ids == two.ids and all(torch.equal(getattr(one, f), getattr(two, f)) for f in ("x", "y", "sizes"))


def chunk_lengths(adapted, clients, batch_size=4, backward=True, **execution):
    x, stack = torch.zeros(clients, 4, 1, 28, 28), repeat_adapter(adapted.initial, clients)
    options = dict(batch_size=batch_size, backward=backward, execution=Execution(**execution))
    found = plan_execution(adapted, stack, x, **options)
    assert found.vectorize and [i for chunk in found.chunks for i in range(clients)[chunk]] == list(range(clients))
    return [chunk.stop - chunk.start for chunk in found.chunks]


def test_chunks_follow_the_budget(adapted):
    assert chunk_lengths(adapted, 10) == [10]
    assert chunk_lengths(adapted, 3, memory_bytes=1) == [1, 1, 1]  # one client is the least
    assert chunk_lengths(adapted, 7, chunk_size=3, memory_bytes=1) == [3, 3, 1]
    few, many = (max(chunk_lengths(adapted, 500, memory_bytes=memory)) for memory in (4e6, 8e6))
    assert few > 1 and many == pytest.approx(2 * few, rel=0.15)
    assert max(chunk_lengths(adapted, 500, memory_bytes=4e6, batch_size=8)) == pytest.approx(few / 2, rel=0.2)
    assert max(chunk_lengths(adapted, 500, memory_bytes=4e6, backward=False)) > 1.5 * few
    lengths = chunk_lengths(adapted, 101, memory_bytes=4e6)
    assert max(lengths) - min(lengths[:-1]) == 0 and len(lengths) == -(-101 // max(lengths))


MEASURE = """
import re, sys, torch
sys.path.insert(0, "tests")
from conftest import tiny_vit
from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import repeat_adapter
from potara_lite.federation.split import Split
from potara_lite.training.batching import Execution
from potara_lite.training.gradients import per_sample_gradients
from potara_lite.training.train import evaluate, train

def status(key):
    return 1024 * int(re.search(key + r":\\s*(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
adapted = attach(tiny_vit(), rank=2, alpha=3)
clients = 400
x, y = torch.rand(clients, 8, 1, 28, 28), torch.zeros(clients, 8, dtype=torch.int64)
split = Split(list(zip(x, y)))
stack = repeat_adapter(adapted.initial, clients)
train(adapted, {name: t[:2] for name, t in stack.items()}, split.rows(slice(0, 2)), steps=2)  # warm up
for run in (evaluate, per_sample_gradients, lambda *a, **o: train(*a, steps=2, **o)):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    run(adapted, stack, split, execution=Execution(memory_bytes=MEMORY))
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_many_clients_take_the_memory_they_were_given():
    """Peak resident memory of each kind of work on 400 clients, in a process that hands freed memory back at once."""
    environment = os.environ | dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    command = [sys.executable, "-c", MEASURE.replace("MEMORY", "2.4e7")]
    done = finished(command, env=environment)
    evaluated, differentiated, trained = map(int, done.stdout.split())
    row = 452 * 4  # an adapter's bytes; results for all clients come on top of the budget
    for peak, result in ((evaluated, 0), (differentiated, 8 * 400 * row), (trained, 3 * 400 * row)):
        assert 0.3 < (peak - result) / 2.4e7 < 1.15  # 0.85, 0.50 and 0.77 when measured


@pytest.mark.parametrize("vectorize", [True, False])
def test_bf16_is_close_and_off_by_default(adapted, federation, random_stack, vectorize):
    initial, options = random_stack(adapted, 3, seed=8), OPTIONS
    plain, bf16 = (Execution(vectorize=vectorize, autocast=dtype) for dtype in (None, torch.bfloat16))
    full = train(adapted, initial, federation.train, execution=plain, **options)
    half = train(adapted, initial, federation.train, execution=bf16, **options)
    assert {tensor.dtype for tensor in half.adapters.values()} == {half.losses.dtype} == {torch.float32}
    moved = (flatten(full.adapters) - flatten(initial)).norm()
    apart = (flatten(half.adapters) - flatten(full.adapters)).norm()
    assert 0 < apart < 0.1 * moved  # 0.025 when measured
    assert 0 < (half.losses - full.losses).abs().max() < 0.03  # 0.01 when measured
    one, two = (
        evaluate(adapted, full.adapters, federation.test, execution=execution)[0] for execution in (plain, bf16)
    )
    assert 0 < (one - two).abs().max() < 0.01  # 0.003 when measured


def test_adapters_stored_in_bf16_are_trained_in_the_backbones_precision(adapted, federation):
    initial = {name: tensor.bfloat16() for name, tensor in repeat_adapter(adapted.initial, 3).items()}
    trained = train(adapted, initial, federation.train, **OPTIONS)
    assert {tensor.dtype for tensor in trained.adapters.values()} == {torch.bfloat16}
    assert trained.state.mean.dtype == trained.losses.dtype == torch.float32
    exact = {name: tensor.float() for name, tensor in initial.items()}
    full = train(adapted, exact, federation.train, **OPTIONS)
    assert torch.equal(trained.losses, full.losses)
    assert all(torch.equal(trained.adapters[name], tensor.bfloat16()) for name, tensor in full.adapters.items())


def test_memory_is_measured_once_for_each_model_and_shape(adapted, backbone, federation, monkeypatch):
    calls, model = [], replace(adapted, state=ModelState())
    measure = batching._saved_bytes
    monkeypatch.setattr(batching, "_saved_bytes", lambda *args: calls.append(args) or measure(*args))

    def chunks(rank, **options):
        stack = repeat_adapter(attach(backbone, rank=rank).initial, 3)
        execution = Execution(memory_bytes=2**18, autocast=options.pop("autocast", None))
        return plan_execution(
            model, stack, federation.train.x, batch_size=4, backward=True, execution=execution, **options
        ).chunks

    first = chunks(2)
    assert chunks(2) == first and len(calls) == 1
    assert len(chunks(8)) >= len(first) and len(calls) == 2  # other shapes are another run
    chunks(2, autocast=torch.bfloat16)
    assert len(calls) == 3  # and so is another precision
    chunks(2, function=model), chunks(2, function=model)
    assert len(calls) == 5  # a function of the caller's is never remembered
    monkeypatch.setattr(grouped_lora, "MOST_KINDS", 3)
    kept = len(model.state.measured)
    for rank in range(3, 8):
        chunks(rank)
    assert len(model.state.measured) == kept == 3  # the latest; no more are kept than this


def test_what_a_measurement_saw_is_not_kept(adapted, federation):
    """What autograd packed is gone with the graph: once it held the graph that held it, and every run leaked."""
    stack, x, counts = repeat_adapter(adapted.initial, 3), federation.train.x, []
    for _ in range(3):
        for _ in range(5):
            adapted.state.measured.clear()
            plan_execution(adapted, stack, x, batch_size=4, backward=True, execution=Execution())
        gc.collect()
        counts.append(sum(isinstance(one, torch.Tensor) for one in gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]


def test_a_backbone_that_vmap_cannot_take_is_complained_of_once(federation64, random_stack):
    adapted = attach(Item().double(), rank=2, targets=["fc1"])
    with pytest.warns(UserWarning, match="one after another") as warned:
        per_sample_gradients(adapted, random_stack(adapted, 3, seed=0), federation64.train)
    assert len([one for one in warned if "one after another" in str(one.message)]) == 1


def test_compiled_steps_are_the_programs_own(adapted64, federation64, random_stack, monkeypatch):
    """The compiler is given every step of every chunk, through the backbone itself; here it compiles nothing."""
    seen = []

    def compiler(function, dynamic):
        def compiled(forward, *args, **options):
            seen.append((forward, dynamic))
            return function(forward, *args, **options)

        return compiled

    compiled_losses.cache_clear()
    monkeypatch.setattr(torch, "compile", compiler)
    stack = random_stack(adapted64, 3, seed=0)
    plain = train(adapted64, stack, federation64.train, **OPTIONS)
    assert not seen
    found = train(adapted64, stack, federation64.train, execution=Execution(compile=True, chunk_size=2), **OPTIONS)
    compiled_losses.cache_clear()
    assert seen == [(adapted64, False)] * 2 * OPTIONS["steps"]
    torch.testing.assert_close(flatten(found.adapters), flatten(plain.adapters), rtol=1e-9, atol=1e-12)
    one_by_one = Execution(compile=True, vectorize=False)
    alone = train(adapted64, stack, federation64.train, execution=one_by_one, **OPTIONS)
    assert len(seen) == 2 * OPTIONS["steps"]  # a loop over the clients is not compiled
    torch.testing.assert_close(flatten(alone.adapters), flatten(plain.adapters), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("vectorize", [True, False])
def test_threads_may_share_a_backbone(adapted64, federation64, random_stack, vectorize):
    """Each forward pass swaps tensors or functions of the model, so it must not be interrupted by another one."""
    options = OPTIONS | dict(execution=Execution(vectorize=vectorize))
    stacks = [random_stack(adapted64, 3, seed=seed) for seed in range(4)]

    def run(stack):
        trained = train(adapted64, stack, federation64.train, **options)
        gradients = per_sample_gradients(adapted64, trained.adapters, federation64.calibration)
        return flatten(trained.adapters), trained.losses, gradients

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(run, stacks))
    for one, stack in zip(found, stacks):
        assert all(torch.equal(*pair) for pair in zip(one, run(stack)))


HEADER = Path(sysconfig.get_path("include")) / "Python.h"


@pytest.mark.skipif(not (shutil.which("g++") and HEADER.exists()), reason="compiling needs g++ and Python's headers")
def test_compiled_training_is_that_of_the_engine_and_compiles_once(adapted64, federation64, random_stack):
    stack = random_stack(adapted64, 3, seed=0)
    plain = train(adapted64, stack, federation64.train, **OPTIONS)
    torch._dynamo.utils.counters.clear()
    found = train(adapted64, stack, federation64.train, execution=Execution(compile=True), **OPTIONS)
    torch.testing.assert_close(found.losses, plain.losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(flatten(found.adapters), flatten(plain.adapters), rtol=1e-7, atol=1e-10)
    assert not torch._dynamo.utils.counters["graph_break"]
    with torch.compiler.set_stance("fail_on_recompile"):
        again = train(adapted64, stack, federation64.train, execution=Execution(compile=True), **OPTIONS)
    assert torch.equal(flatten(again.adapters), flatten(found.adapters))


def test_what_compiling_costs_is_set_against_what_it_saves(monkeypatch):
    """With a compiler that does nothing but take its time at first."""
    bench, calls = script("engine_compile"), []

    def slow(*args):
        calls.append(args)
        time.sleep(2.0 if len(calls) == 1 else 0.0)
        return losses(*args)

    monkeypatch.setattr(bench, "compiled_losses", lambda: slow)
    row = bench.row(bench.Load(2, steps=1), 2)
    assert set(row["ratio to engine"]) == {"vmap", "compiled"} and row["different"] <= bench.TOLERANCE
    assert row["start-up"] > 1.9 and len(calls) == 1 + 3 * row["steps"]
    saved = row["seconds"]["engine"]["median"] - row["seconds"]["compiled"]["median"]
    assert row["pays after"] == (pytest.approx(row["start-up"] / saved) if saved > 0 else None)
