"""FedIT: rounds, averages, who takes part and what it costs."""

import ctypes
import gc

import pytest
import torch
from conftest import SIZES, train_one_by_one

from potara_lite.adapters.state import (
    adapter_bytes,
    client_adapter,
    cut_ranks,
    flatten,
    is_lora,
    rank_dim,
    repeat_adapter,
)
from potara_lite.baselines.algorithms import FEDIT
from potara_lite.baselines.rounds import run_algorithm
from potara_lite.training.batching import Execution
from potara_lite.training.fedavg import Ledger, fedit, participants, weighted_average
from potara_lite.training.train import train

OPTIONS = dict(batch_size=4, lr=2e-3)
BYTES = 1808  # of one float32 adapter, see test_nbytes_counted_by_hand


def flat(adapter):
    return flatten(repeat_adapter(adapter, 1))[0]


def test_average_weighted_by_sizes_by_hand():
    stack = {"w": torch.tensor([[1.0, 0.0], [3.0, 0.0], [8.0, 4.0]]), "v": torch.tensor([[[2.0]], [[4.0]], [[6.0]]])}
    mean = weighted_average(stack, torch.tensor([1, 2, 1]))
    torch.testing.assert_close(mean["w"], torch.tensor([15 / 4, 1.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean["v"], torch.tensor([[4.0]]), rtol=1e-6, atol=0)


def test_average_of_equal_adapters_is_that_adapter_and_a_client_alone_is_itself(adapted64, random_stack):
    stack = random_stack(adapted64, 3, seed=0)
    only = weighted_average(stack, torch.tensor([0, 7, 0]))
    assert all(torch.equal(only[name], tensor[1]) for name, tensor in stack.items())
    same = weighted_average(repeat_adapter(only, 3), torch.tensor([5, 13, 9]))
    torch.testing.assert_close(flat(same), flat(only), rtol=1e-12, atol=0)


@pytest.mark.parametrize("planted", ["unweighted", "square roots"])
def test_other_averages_are_seen(planted):
    stack, sizes = {"w": torch.tensor([[1.0], [3.0]], dtype=torch.float64)}, torch.tensor([1, 3])
    weights = {"unweighted": torch.ones(2), "square roots": sizes.sqrt()}[planted]
    assert weighted_average(stack, sizes)["w"].item() == pytest.approx(2.5, rel=1e-9)
    assert weighted_average(stack, weights)["w"].item() != pytest.approx(2.5, rel=1e-2)


@pytest.mark.parametrize("keep", [True, False])
def test_one_client_fedit_equals_local_training(adapted64, federation64, keep):
    alone = federation64.train.rows([1])
    federated = fedit(adapted64, alone, rounds=2, local_steps=3, keep_optimizer=keep, seed=6, **OPTIONS)
    initial = repeat_adapter(adapted64.initial, 1)
    if keep:
        local = train(adapted64, initial, alone, steps=6, seed=(6, 0), **OPTIONS)
    else:  # the same batches with the optimiser forgotten in between
        half = train(adapted64, initial, alone, steps=3, seed=(6, 0), **OPTIONS)
        local = train(adapted64, half.adapters, alone, steps=3, start=3, seed=(6, 0), **OPTIONS)
    torch.testing.assert_close(flat(federated.adapter), flatten(local.adapters)[0], rtol=1e-9, atol=1e-12)


def test_keeping_the_optimizer_matters(adapted64, federation64):
    kept, fresh = (
        fedit(adapted64, federation64.train, rounds=2, local_steps=3, keep_optimizer=keep, **OPTIONS)
        for keep in (True, False)
    )
    assert (flat(kept.adapter) - flat(fresh.adapter)).abs().max() > 1e-4


@pytest.mark.parametrize("participation", [1.0, 0.67])
def test_rounds_equal_the_obvious_loop(adapted64, federation64, participation):
    """Each participant trains PEFT's model alone with a fresh optimiser; the mean is weighted by its size."""
    result = fedit(
        adapted64, federation64.train, rounds=4, local_steps=2, participation=participation, keep_optimizer=False,
        seed=2, **OPTIONS,
    )  # fmt: skip
    now, present = flat(adapted64.initial), ~result.losses.isnan()
    assert present.sum(1).tolist() == [round(3 * participation)] * 4
    for number in range(4):
        total, weight = torch.zeros_like(now), 0
        for client in present[number].nonzero().flatten().tolist():
            row = federation64.train.rows([client])
            parts = now.split([t.numel() for t in adapted64.initial.values()])
            start = {name: p.view(1, *t.shape) for (name, t), p in zip(adapted64.initial.items(), parts)}
            trained = train_one_by_one(adapted64, start, row, steps=2, start=2 * number, seed=(2, 0), **OPTIONS)
            total += SIZES[client] * flatten(trained.adapters)[0]
            weight += SIZES[client]
            assert result.losses[number, client].item() == pytest.approx(trained.losses.mean().item(), rel=1e-6)
        now = total / weight
    torch.testing.assert_close(flat(result.adapter), now, rtol=1e-8, atol=1e-10)


def test_a_client_that_skips_a_round_keeps_its_optimizer(adapted64, federation64):
    """With one participant a round, a client's AdamW goes on from its own last round, not from another's."""
    result = fedit(
        adapted64, federation64.train, rounds=6, local_steps=2, participation=0.3, keep_optimizer=True, **OPTIONS
    )
    who = [int(row.nonzero()) for row in ~result.losses.isnan()]
    assert len(set(who)) > 1 and any(who.count(c) > 1 for c in who)
    adapter, memory = repeat_adapter(adapted64.initial, 1), {}
    for number, client in enumerate(who):
        trained = train(
            adapted64, adapter, federation64.train.rows([client]), steps=2, start=2 * number, seed=(0, 0),
            state=memory.get(client), **OPTIONS,
        )  # fmt: skip
        adapter, memory[client] = trained.adapters, trained.state
    torch.testing.assert_close(flat(result.adapter), flatten(adapter)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_the_result_does_not_depend_on_chunks_or_on_the_order_of_clients(adapted64, federation64, chunk_size):
    usual = fedit(adapted64, federation64.train, rounds=2, local_steps=2, **OPTIONS)
    execution, turned = Execution(chunk_size=chunk_size), federation64.train.rows([2, 0, 1])
    turned = fedit(adapted64, turned, rounds=2, local_steps=2, execution=execution, **OPTIONS)
    torch.testing.assert_close(flat(turned.adapter), flat(usual.adapter), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("participation", [1.0, 0.6])
@pytest.mark.parametrize("order", [[2, 1, 0], [1, 2, 0], [0, 2, 1]])
def test_in_whatever_order_the_clients_stand_the_model_is_bitwise_the_same(adapted, federation, order, participation):
    options = dict(rounds=4, local_steps=2, participation=participation, seed=3, **OPTIONS)
    usual = fedit(adapted, federation.train, **options)
    turned = fedit(adapted, federation.train.rows(order), **options)
    assert torch.equal(flat(turned.adapter), flat(usual.adapter))
    assert torch.equal(turned.losses.nan_to_num(-1), usual.losses[:, order].nan_to_num(-1))
    assert torch.equal(turned.ledger.down, usual.ledger.down[order])
    for name, tensor in vars(turned.state).items():
        assert torch.equal(tensor, getattr(usual.state, name)[order])


@pytest.mark.parametrize("run", ["fedit", "run_algorithm"])
def test_two_hundred_rounds_leave_nothing_behind(adapted, federation, run):
    """Bytes that the C library has handed out, tensors among them: a graph that holds itself shows here alone."""
    in_use = bytes_in_use()

    def rounds(number):
        options = dict(rounds=number, local_steps=1, batch_size=2, lr=1e-3)
        if run == "fedit":
            fedit(adapted, federation.train, **options)
        else:
            run_algorithm(FEDIT, adapted, federation.train, **options)
        gc.collect()
        return in_use()

    rounds(10)
    before = rounds(1)
    assert rounds(200) - before < 1e6


def bytes_in_use():
    """A function to the bytes in use by ``malloc``; the test is skipped where glibc is not."""

    class Info(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_size_t)
            for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
        ]

    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("needs glibc 2.33")
    library.mallinfo2.restype = Info
    return lambda: (lambda info: info.uordblks + info.hblkhd)(library.mallinfo2())


def test_participants_are_a_fixed_share_drawn_anew_each_round():
    rounds = [participants(range(10), 0.3, 5, number).tolist() for number in range(200)]
    assert all(len(set(rows)) == 3 and min(rows) >= 0 and max(rows) < 10 for rows in rounds)
    counts = torch.bincount(torch.tensor(rounds).flatten(), minlength=10)
    assert (counts - 60).abs().max() < 4.5 * (200 * 0.3 * 0.7) ** 0.5  # binomial standard deviations
    assert participants(range(10), 0.3, 5, 7).tolist() == rounds[7]
    assert participants(range(4), 1.0, 0, 0).tolist() == [0, 1, 2, 3]
    assert len(participants(range(4), 0.01, 0, 0)) == 1


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_an_impossible_share_of_participants_is_refused(share):
    with pytest.raises(ValueError, match="participation must be"):
        participants(range(4), share, 0, 0)


def test_the_default_dtype_of_the_program_does_not_matter(adapted64, federation64):
    before = torch.get_default_dtype()
    options = dict(rounds=1, local_steps=2, **OPTIONS)
    expected = fedit(adapted64, federation64.train, **options)
    torch.set_default_dtype(torch.float64)
    try:
        found = fedit(adapted64, federation64.train, **options)
    finally:
        torch.set_default_dtype(before)
    assert found.losses.dtype == expected.losses.dtype == torch.float32
    assert all(torch.equal(tensor, expected.adapter[name]) for name, tensor in found.adapter.items())


def test_the_ledger_counts_every_byte_by_hand(adapted, federation):
    everyone = fedit(adapted, federation.train, rounds=3, local_steps=2, **OPTIONS).ledger
    assert everyone.up.tolist() == [3 * BYTES] * 3
    assert everyone.down.tolist() == [4 * BYTES] * 3  # the last download is the result
    assert everyone.steps.tolist() == [6] * 3


def test_a_client_that_skips_a_round_pays_for_the_final_download_only(adapted, federation):
    result = fedit(adapted, federation.train, rounds=5, local_steps=2, participation=0.67, **OPTIONS)
    rounds = (~result.losses.isnan()).sum(0)
    assert rounds.sum() == 10 and len(set(rounds.tolist())) > 1
    assert result.ledger.up.tolist() == (rounds * BYTES).tolist()
    assert result.ledger.down.tolist() == ((rounds + 1) * BYTES).tolist()
    assert result.ledger.steps.tolist() == (rounds * 2).tolist()


def test_bytes_follow_the_dtype(adapted64, federation64):
    assert fedit(adapted64, federation64.train, rounds=1, local_steps=1).ledger.up.tolist() == [2 * BYTES] * 3


def test_ledgers_add_up():
    one = Ledger.zeros(3).add(torch.tensor([0, 2]), up=5, down=7, steps=1)
    two = Ledger.zeros(3).add(torch.tensor([2]), up=1)
    total = one + two
    assert (total.up.tolist(), total.down.tolist(), total.steps.tolist()) == ([5, 0, 6], [7, 0, 7], [1, 0, 1])
    assert one.up.dtype == torch.int64  # bytes of a large model do not overflow


def test_no_rounds_give_the_initial_adapter(adapted, federation):
    result = fedit(adapted, federation.train, rounds=0, local_steps=3)
    assert torch.equal(flat(result.adapter), flat(adapted.initial)) and result.losses.shape == (0, 3)


def test_who_takes_part_does_not_depend_on_the_order_of_the_clients():
    ids = [4, 7, 1, 9, 3, 0]
    for number in range(20):
        one = {ids[row] for row in participants(ids, 0.5, 3, number).tolist()}
        other = {ids[::-1][row] for row in participants(ids[::-1], 0.5, 3, number).tolist()}
        assert one == other and len(one) == 3


def test_rounds_can_be_continued(adapted64, federation64):
    data = federation64.train
    whole = fedit(adapted64, data, rounds=3, local_steps=2, participation=0.67, seed=4, **OPTIONS)
    part = fedit(adapted64, data, rounds=1, local_steps=2, participation=0.67, seed=4, **OPTIONS)
    rest = fedit(
        adapted64, data, rounds=2, local_steps=2, participation=0.67, seed=4,
        adapter=part.adapter, state=part.state, start=1, **OPTIONS,
    )  # fmt: skip
    torch.testing.assert_close(flat(rest.adapter), flat(whole.adapter), rtol=1e-12, atol=0)


# Ranks that differ from client to client.


def test_clients_of_smaller_rank_train_and_send_that_much(adapted64, federation64):
    ranks = [1, 2, 1]
    options = dict(rounds=2, local_steps=3, lr=1e-2, batch_size=4)
    found = fedit(adapted64, federation64.train, ranks=ranks, **options)
    adapter, states = adapted64.initial, [None] * 3
    for number in range(2):  # the obvious loop: each client's own small adapter, padded with zeros for the mean
        uploads = []
        for i, rank in enumerate(ranks):
            mine = cut_ranks({name: tensor.unsqueeze(0) for name, tensor in adapter.items()}, [rank])
            trained = train(
                adapted64, mine, federation64.train.rows([i]), steps=3, start=3 * number, state=states[i],
                seed=(0, 0), lr=1e-2, batch_size=4,
            )  # fmt: skip
            states[i] = trained.state
            for name, tensor in trained.adapters.items():
                if is_lora(name):
                    beyond = tensor.narrow(rank_dim(name, tensor), rank, 2 - rank)
                    assert not beyond.any() and not tensor.isnan().any()
            uploads.append(client_adapter(trained.adapters, 0))
        weights = federation64.train.sizes.double() / federation64.train.sizes.sum()
        adapter = {name: sum(w * one[name] for w, one in zip(weights.tolist(), uploads)) for name in adapter}
    for name, tensor in adapter.items():
        torch.testing.assert_close(found.adapter[name], tensor, rtol=1e-7, atol=1e-10)
    whole = fedit(adapted64, federation64.train, **options).ledger
    head = adapter_bytes({name: t for name, t in adapted64.initial.items() if not is_lora(name)})
    factors = adapter_bytes(adapted64.initial) - head
    assert found.ledger.up.tolist() == [2 * (head + factors // 2), int(whole.up[1]), 2 * (head + factors // 2)]
    assert found.ledger.down.tolist() == [3 * (head + factors // 2), int(whole.down[1]), 3 * (head + factors // 2)]


def test_full_ranks_change_nothing(adapted, federation):
    options = dict(rounds=2, local_steps=2, lr=1e-2, batch_size=4)
    one, two = (fedit(adapted, federation.train, ranks=ranks, **options) for ranks in (None, [2, 2, 2]))
    assert all(torch.equal(one.adapter[name], two.adapter[name]) for name in one.adapter)
    assert torch.equal(one.ledger.up, two.ledger.up)
    with pytest.raises(ValueError, match=r"ranks \[1, 2\]: 3 numbers from 1 to 2 are needed"):
        fedit(adapted, federation.train, ranks=[1, 2], **options)
