"""The engine against the obvious loop, and what it refuses."""

import numpy as np
import pytest
import torch
from conftest import SIZES, changed_split, train_one_by_one
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from potara_lite.adapters.state import client_adapter, flatten, repeat_adapter
from potara_lite.federation.batches import batch_indices
from potara_lite.training import train as training
from potara_lite.training.batching import Execution
from potara_lite.training.train import DivergedError, OptimizerState, adamw_step, evaluate, losses, train

OPTIONS = dict(batch_size=4, lr=2e-3, seed=3)


def distance(one, two):
    return (flatten(one.adapters) - flatten(two.adapters)).abs().max(), (one.losses - two.losses).abs().max()


@pytest.fixture(scope="module", params=["plain", "clip and weight decay"])
def options(request):
    return OPTIONS | ({} if request.param == "plain" else dict(clip=0.5, weight_decay=0.1))


@pytest.fixture(scope="module")
def oracle(adapted, federation, options):
    """50 steps the obvious way: one client after another, PEFT's own model, ``torch.optim.AdamW``."""
    initial = repeat_adapter(adapted.initial, 3)
    return train_one_by_one(adapted, initial, federation.train, steps=50, **options)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 99])
def test_all_clients_at_once_equal_the_loop_for_any_chunk_size(adapted, federation, oracle, options, chunk_size):
    initial = repeat_adapter(adapted.initial, 3)
    trained = train(adapted, initial, federation.train, steps=50, execution=Execution(chunk_size=chunk_size), **options)
    assert trained.losses.shape == (3, 50)
    weights, curve = distance(trained, oracle)
    # Float32 rounding, carried through 50 steps of at most lr = 2e-3 each: 1.4e-6 when measured.
    assert weights < 1e-5 and curve < 1e-5
    assert oracle.losses[:, -5:].mean() < oracle.losses[:, :5].mean() - 0.05  # and they did learn


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0], [2]])
def test_a_client_trains_alike_in_any_order_and_company(adapted, federation, oracle, options, order):
    part = federation.train.rows(order)
    trained = train(
        adapted,
        repeat_adapter(adapted.initial, len(order)),
        part,
        steps=50,
        execution=Execution(chunk_size=2),
        **options,
    )
    torch.testing.assert_close(flatten(trained.adapters), flatten(oracle.adapters)[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(trained.losses, oracle.losses[order], rtol=0, atol=1e-5)


def test_in_float64_all_clients_at_once_equal_the_loop_to_rounding(adapted64, federation64, random_stack):
    initial = random_stack(adapted64, 3, seed=0)
    runs = [run(adapted64, initial, federation64.train, steps=50, **OPTIONS) for run in (train, train_one_by_one)]
    weights, curve = distance(*runs)
    assert weights < 1e-9 and curve < 1e-9


def test_clients_may_start_from_different_adapters(adapted64, federation64, random_stack):
    initial = random_stack(adapted64, 3, seed=7)
    together = train(adapted64, initial, federation64.train, steps=4, **OPTIONS)
    for client in range(3):
        alone = {name: tensor[client : client + 1] for name, tensor in initial.items()}
        single = train(adapted64, alone, federation64.train.rows([client]), steps=4, **OPTIONS)
        torch.testing.assert_close(
            flatten(together.adapters)[client], flatten(single.adapters)[0], rtol=1e-9, atol=1e-12
        )


def test_training_in_two_parts_is_training_in_one(adapted64, federation64):
    initial = repeat_adapter(adapted64.initial, 3)
    whole = train(adapted64, initial, federation64.train, steps=10, **OPTIONS)
    first = train(adapted64, initial, federation64.train, steps=3, **OPTIONS)
    second = train(
        adapted64,
        first.adapters,
        federation64.train,
        steps=7,
        start=3,
        state=first.state,
        execution=Execution(chunk_size=2),
        **OPTIONS,
    )
    torch.testing.assert_close(flatten(second.adapters), flatten(whole.adapters), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([first.losses, second.losses], 1), whole.losses, rtol=1e-9, atol=0)
    assert second.state.steps.tolist() == [10, 10, 10]


def test_the_first_loss_is_that_of_the_zero_head(adapted64, federation64):
    trained = train(adapted64, repeat_adapter(adapted64.initial, 3), federation64.train, steps=1, **OPTIONS)
    torch.testing.assert_close(trained.losses, torch.full((3, 1), np.log(4), dtype=torch.float64), rtol=1e-9, atol=0)


def test_training_leaves_frozen_weights_and_the_initial_adapter_bit_identical(adapted, federation):
    initial = repeat_adapter(adapted.initial, 3)
    before = {name: tensor.clone() for name, tensor in {**adapted.model.state_dict(), **initial}.items()}
    trained = train(adapted, initial, federation.train, steps=3, **OPTIONS)
    assert not torch.equal(flatten(trained.adapters), flatten(initial))
    after = {**adapted.model.state_dict(), **initial}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in adapted.model.parameters())


def test_no_steps_change_nothing(adapted, federation):
    initial = repeat_adapter(adapted.initial, 3)
    trained = train(adapted, initial, federation.train, steps=0)
    assert torch.equal(flatten(trained.adapters), flatten(initial)) and trained.losses.shape == (3, 0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_step_equals_torch(weight_decay):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    grads = torch.randn(30, 2, 7, dtype=torch.float64, generator=generator) * 10 ** torch.arange(-6, 1).double()
    oracle = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([oracle], lr=0.01, weight_decay=weight_decay)
    flat, state = start, OptimizerState.zeros(start)
    for grad in grads:
        oracle.grad = grad.clone()
        optimizer.step()
        flat, state = adamw_step(flat, grad, state, 0.01, weight_decay)
        torch.testing.assert_close(flat, oracle.detach(), rtol=1e-9, atol=1e-12)


def test_adamw_step_counts_each_clients_steps_apart():
    generator = torch.Generator().manual_seed(0)
    start, grads = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (1, 3))
    flat, state = start, OptimizerState.zeros(start)
    for grad in grads[:2]:
        flat, state = adamw_step(flat, grad[None], state, 0.01)
    fresh = OptimizerState.zeros(start)
    mixed = OptimizerState(*(torch.cat([getattr(s, f) for s in (state, fresh)]) for f in ("mean", "square", "steps")))
    both, _ = adamw_step(torch.cat([flat, start]), grads[2].expand(2, 5), mixed, 0.01)
    torch.testing.assert_close(both[:1], adamw_step(flat, grads[2:], state, 0.01)[0], rtol=1e-12, atol=0)
    expected = start - 0.01 * grads[2] / (grads[2].abs() + 1e-8)  # the very first step is the gradient's sign
    torch.testing.assert_close(both[1:], expected, rtol=1e-9, atol=0)


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 12), batch=st.integers(1, 9), start=st.integers(0, 30), steps=st.integers(1, 20),
    seed=st.lists(st.integers(0, 9), min_size=1, max_size=3),
)  # fmt: skip
def test_batches_can_be_entered_at_any_step_and_each_epoch_is_a_permutation(size, batch, start, steps, seed):
    whole = batch_indices(size, 0, start + steps, batch, seed)
    assert whole.shape == (start + steps, batch)
    assert torch.equal(batch_indices(size, start, steps, batch, seed), whole[start:])
    stream = whole.flatten()
    for epoch in stream[: len(stream) // size * size].view(-1, size):
        assert sorted(epoch.tolist()) == list(range(size))
    rest = stream[len(stream) // size * size :].tolist()
    assert len(set(rest)) == len(rest)


def test_batches_depend_on_the_seed_and_on_the_epoch():
    one, other = (batch_indices(50, 0, 20, 5, seed) for seed in ((1, 2), (1, 3)))
    assert not torch.equal(one, other)
    assert not torch.equal(one[:10], one[10:])
    assert torch.equal(one, batch_indices(50, 0, 20, 5, [1, 2]))


def sick(split, row, examples, value):
    """The split with some inputs of one client spoilt."""
    x = split.x.clone()
    x[row, examples] = value
    return changed_split(split, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_divergence_names_the_client_and_the_step(adapted, federation, value, chunk_size):
    bad = 4  # the example of client 1 that is spoilt
    split = sick(federation.train, 1, bad, value).rows([2, 1, 0])
    schedule = batch_indices(SIZES[1], 2, 12, 4, [3, 1])
    step = 2 + int((schedule == bad).any(1).nonzero()[0])
    assert step > 2
    initial = repeat_adapter(adapted.initial, 3)
    with pytest.raises(DivergedError, match=f"client 1 is not finite at step {step}") as caught:
        train(adapted, initial, split, steps=12, start=2, execution=Execution(chunk_size=chunk_size), **OPTIONS)
    assert (caught.value.client, caught.value.step) == (1, step)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_client_that_diverges_does_not_disturb_the_others(adapted64, federation64, random_stack, monkeypatch, clip):
    seen, step = [], training.adamw_step

    def watched(flat, grad, *args, **options):
        seen.append(grad)
        return step(flat, grad, *args, **options)

    monkeypatch.setattr(training, "adamw_step", watched)
    initial = random_stack(adapted64, 3, seed=0)
    options = OPTIONS | dict(steps=6, clip=clip)
    with pytest.raises(DivergedError):
        train(adapted64, initial, sick(federation64.train, 1, slice(None), float("nan")), **options)
    disturbed, seen = [grad[[0, 2]] for grad in seen], []
    healthy = {name: tensor[[0, 2]] for name, tensor in initial.items()}
    train(adapted64, healthy, federation64.train.rows([0, 2]), **options)
    assert len(disturbed) == len(seen) == 6
    for one, two in zip(disturbed, seen):  # the later gradients see the earlier steps
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_a_learning_rate_that_blows_up_is_reported(adapted, federation):
    with pytest.raises(DivergedError) as caught:
        train(adapted, repeat_adapter(adapted.initial, 3), federation.train, steps=20, batch_size=4, lr=1e30)
    assert 0 < caught.value.step < 20


def test_adapters_that_are_no_longer_finite_are_never_returned(adapted, federation):
    """The last step's loss comes before the last update: an update that is not finite must not pass unseen."""
    with pytest.raises(ValueError, match="client 0"):
        train(
            adapted, repeat_adapter(adapted.initial, 3), federation.train, steps=1, batch_size=4, lr=1e30,
            weight_decay=1e30,
        )  # fmt: skip


def test_a_stack_of_another_size_than_the_split_is_refused(adapted, federation):
    for run in (lambda *a: train(*a, steps=1), evaluate):
        with pytest.raises(ValueError, match="2 adapters for 3 clients"):
            run(adapted, repeat_adapter(adapted.initial, 2), federation.train)


def test_a_chunk_of_no_clients_is_refused():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, not 0"):
        Execution(chunk_size=0)
    for memory_bytes in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="memory_bytes must be (above 0|finite), not"):
            Execution(memory_bytes=memory_bytes)


def test_losses_are_each_clients_own(adapted64, federation64, random_stack):
    stack, (x, y) = random_stack(adapted64, 3, seed=2), (federation64.train.x[:, :5], federation64.train.y[:, :5])
    oracle = [F.cross_entropy(adapted64(client_adapter(stack, i), x[i]), y[i]) for i in range(3)]
    torch.testing.assert_close(losses(adapted64, stack, x, y), torch.stack(oracle), rtol=1e-9, atol=0)


TWO, ONE = Execution(chunk_size=2), Execution(chunk_size=1)


@pytest.mark.parametrize("options", [{}, dict(batch_size=4), dict(execution=TWO), dict(batch_size=1, execution=ONE)])
def test_evaluate_is_the_mean_over_each_clients_real_examples(adapted64, federation64, random_stack, options):
    stack = random_stack(adapted64, 3, seed=2, scale=0.5)
    loss, accuracy = evaluate(adapted64, stack, federation64.test, **options)
    for client in range(3):
        x, y = federation64.test.client(client)
        logits = adapted64(client_adapter(stack, client), x)
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        expected = -sum(log_p[i, y[i]] for i in range(len(y))) / len(y)
        torch.testing.assert_close(loss[client], expected, rtol=1e-9, atol=0)
        hits = sum(int(logits[i].argmax() == y[i]) for i in range(len(y)))
        assert accuracy[client].item() == pytest.approx(hits / len(y), rel=1e-12)
    assert len(set(accuracy.tolist())) > 1
