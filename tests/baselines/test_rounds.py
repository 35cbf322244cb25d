"""Rounds with some of the clients, and what each client pays in each of them."""

from dataclasses import replace

import pytest
import torch

from potara_lite.adapters.state import adapter_bytes, client_adapter, delta, flatten, repeat_adapter
from potara_lite.baselines.algorithms import FEDEX, FEDIT, FEDSA, FFA, FLORA, LOCAL, ditto, fedalt, finetuned, flexlora
from potara_lite.baselines.rounds import run_algorithm, select_prefix
from potara_lite.training.fedavg import fedit, participants
from potara_lite.training.train import train

OPTIONS = dict(local_steps=3, batch_size=4, lr=1e-2, seed=6)
SOME = dict(participation=0.67, **OPTIONS)  # two of the three


def drawn(rounds):
    return [participants((0, 1, 2), 0.67, 6, number).tolist() for number in range(rounds)]


def test_the_draws_of_these_tests_leave_out_more_than_one_client():
    assert all(len(some) == 2 for some in drawn(4)) and len(set(map(tuple, drawn(4)))) > 1


@pytest.mark.parametrize("keep_optimizer", [True, False])
def test_with_some_of_the_clients_it_is_fedit_still(adapted64, federation64, keep_optimizer):
    algorithm = replace(FEDIT, keep_optimizer=keep_optimizer)
    one = run_algorithm(algorithm, adapted64, federation64.train, rounds=4, **SOME)
    two = fedit(adapted64, federation64.train, rounds=4, keep_optimizer=keep_optimizer, **SOME)
    flat = flatten(repeat_adapter(two.adapter, 3))
    torch.testing.assert_close(flatten(one.personal), flat, rtol=1e-12, atol=1e-14)
    for column in ("up", "down", "steps"):
        assert torch.equal(getattr(one.by_round, column), getattr(two.by_round, column))


def test_a_client_that_skips_a_round_keeps_what_it_has(adapted64, federation64):
    """Ditto's personal model of a client trains in its own rounds only; its reference is that round's shared one."""
    result, parts = run_algorithm(ditto(0.3), adapted64, federation64.train, rounds=2, **SOME), drawn(2)
    shared, personal = adapted64.initial, repeat_adapter(adapted64.initial, 3)
    states = [None] * 3
    for number, some in enumerate(parts):
        for i in some:

            def objective(f, tensors, reference=shared):
                return f(tensors) + 0.15 * sum((tensors[n] - reference[n]).square().sum() for n in tensors)

            one = train(
                adapted64, {n: t[i : i + 1] for n, t in personal.items()}, federation64.train.rows([i]), steps=3,
                start=3 * number, state=states[i], seed=(6, 0), batch_size=4, lr=1e-2, objective=objective,
            )  # fmt: skip
            states[i] = one.state
            personal = {n: t.index_copy(0, torch.tensor([i]), one.adapters[n]) for n, t in personal.items()}
        shared = fedit(adapted64, federation64.train, rounds=number + 1, **SOME).adapter
    torch.testing.assert_close(flatten(result.personal), flatten(personal), rtol=1e-9, atol=1e-12)
    never = set(range(3)) - {i for some in parts for i in some}
    for i in never:
        assert torch.equal(flatten(result.personal)[i], flatten(repeat_adapter(adapted64.initial, 3))[i])


@pytest.mark.parametrize("algorithm", [FEDEX, FLORA], ids=lambda algorithm: algorithm.name)
def test_every_client_gets_what_is_merged(adapted64, federation64, algorithm):
    """One round with two clients: everybody's model is the exact mean of the two, weighted by their sizes."""
    result, (some, *_) = run_algorithm(algorithm, adapted64, federation64.train, rounds=1, **SOME), drawn(1)
    part = federation64.train.rows(some)
    trained = train(
        adapted64, repeat_adapter(adapted64.initial, 2), part, steps=3, batch_size=4, lr=1e-2, seed=(6, 0)
    ).adapters
    share = (part.sizes.double() / part.sizes.sum()).view(-1, 1, 1)
    for client in range(3):
        found = delta(client_adapter(result.personal, client), adapted64.scaling)
        for name, change in delta(trained, adapted64.scaling).items():
            mean = (share.view(-1, *[1] * (change.dim() - 1)) * change).sum(0)
            torch.testing.assert_close(found[name], mean, rtol=1e-9, atol=1e-12)
    assert (result.by_round.down > 0).all()  # those who skipped the round, too
    assert sorted(result.by_round.up[0].nonzero().flatten().tolist()) == some


@pytest.mark.parametrize("algorithm", [FEDSA, FFA], ids=lambda algorithm: algorithm.name)
def test_each_round_is_paid_for_by_those_who_took_part(adapted, federation, algorithm):
    result, parts = run_algorithm(algorithm, adapted, federation.train, rounds=4, **SOME), drawn(4)
    size = adapter_bytes({n: t for n, t in adapted.initial.items() if algorithm.is_uploaded(n)})
    here = torch.tensor([[i in some for i in range(3)] for some in parts]).long()
    assert torch.equal(result.by_round.up, torch.cat([here * size, torch.zeros(1, 3, dtype=torch.int64)]))
    assert torch.equal(result.by_round.down, torch.cat([here * size, torch.full((1, 3), size)]))
    assert torch.equal(result.by_round.steps[:-1], 3 * here)
    for column in ("up", "down", "steps"):
        assert torch.equal(getattr(result.ledger, column), getattr(result.by_round, column).sum(0))


def test_the_last_row_is_what_comes_after_the_rounds(adapted, federation):
    result = run_algorithm(finetuned(FEDIT, 5), adapted, federation.train, rounds=2, **OPTIONS)
    size = adapter_bytes(adapted.initial)
    assert result.by_round.steps.tolist() == [[3] * 3, [3] * 3, [5] * 3]
    assert result.by_round.down.tolist() == [[size] * 3] * 3
    assert result.by_round.up.tolist() == [[size] * 3, [size] * 3, [0] * 3]
    alone = run_algorithm(LOCAL, adapted, federation.train, rounds=2, **OPTIONS).by_round
    assert not alone.up.any() and not alone.down.any()


@pytest.mark.parametrize("algorithm", [fedalt(), flexlora((1, 2, 1))], ids=lambda algorithm: algorithm.name)
def test_messages_that_differ_by_client_need_all_clients(adapted, federation, algorithm):
    with pytest.raises(ValueError, match=f"{algorithm.name}: its messages differ"):
        run_algorithm(algorithm, adapted, federation.train, rounds=2, **SOME)


def test_full_participation_is_what_it_was(adapted64, federation64):
    one = run_algorithm(ditto(0.3), adapted64, federation64.train, rounds=2, **OPTIONS)
    two = run_algorithm(ditto(0.3), adapted64, federation64.train, rounds=2, participation=1.0, **OPTIONS)
    assert torch.equal(flatten(one.personal), flatten(two.personal))
    assert select_prefix(one.tensors, "global_reference").keys() == adapted64.initial.keys()


@pytest.mark.parametrize("name", ["adapters", "steps", "start", "state", "objective", "fixed"])
def test_an_option_of_train_that_the_rounds_set_themselves_is_refused(adapted64, federation64, name):
    with pytest.raises(ValueError, match=f"run_algorithm sets {name} of train itself: leave it out"):
        run_algorithm(FEDIT, adapted64, federation64.train, rounds=1, **OPTIONS, **{name: None})
    if name in ("adapters", "steps"):
        with pytest.raises(ValueError, match=f"fedit sets {name} of train itself: leave it out"):
            fedit(adapted64, federation64.train, rounds=1, **OPTIONS, **{name: None})
