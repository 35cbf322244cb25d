"""Each method against its definition: its degenerate case, an obvious loop, and a count of what crossed."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import SIZES, tiny_vit
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F

from potara_lite.adapters.files import load_adapter, save_adapter
from potara_lite.adapters.lora import AdaptedBackbone, attach, delta_added
from potara_lite.adapters.state import adapter_bytes, client_adapter, delta, flatten, lora_layers, repeat_adapter
from potara_lite.baselines.algorithms import (
    FEDEX,
    FEDIT,
    FEDPER,
    FEDSA,
    FFA,
    FLORA,
    LOCAL,
    apfl,
    ditto,
    fedalt,
    feddpa,
    fedprox,
    fedrep,
    finetuned,
    flexlora,
    gated,
    wise_ft,
)
from potara_lite.baselines.privacy import Privacy
from potara_lite.baselines.rounds import (
    Algorithm,
    Phase,
    add_prefix,
    first_client,
    is_head,
    is_shared,
    run_algorithm,
    select_prefix,
)
from potara_lite.federation.batches import batch_indices
from potara_lite.merging.merge import limit_rank
from potara_lite.training.batching import Execution
from potara_lite.training.fedavg import fedit, weighted_average
from potara_lite.training.train import evaluate, train

LR, BATCH, SEED = 1e-2, 4, 6
OPTIONS = dict(local_steps=3, batch_size=BATCH, lr=LR, seed=SEED)
SHARES = torch.tensor(SIZES, dtype=torch.float64) / sum(SIZES)
METHODS = {
    method.name: method
    for method in (
        LOCAL, FEDIT, FFA, fedprox(), finetuned(FEDIT, 3), wise_ft(FEDIT, 3), FEDEX, FLORA, flexlora(), FEDSA, FEDPER,
        fedrep(), ditto(), apfl(), feddpa(), fedalt(),
    )
}  # fmt: skip


def close(one, two, rtol=1e-9, atol=1e-11):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=rtol, atol=atol)


def far(one, two):
    return max((one[name] - two[name]).abs().max() for name in one) > 1e-4


def deltas(adapted, adapter):
    return delta(adapter, adapted.scaling)


def mean_of_deltas(adapted, stack):
    return {name: torch.einsum("c,c...->...", SHARES, t) for name, t in deltas(adapted, stack).items()}


def one_of(stack, client):
    return {name: tensor[client : client + 1] for name, tensor in stack.items()}


def watched(algorithm):
    """The algorithm, and the two lists of what its server gets and gives."""
    sent, given = [], []

    def aggregate(stack, sizes):
        sent.append(stack)
        given.append(algorithm.aggregate(stack, sizes))
        return given[-1]

    return replace(algorithm, aggregate=aggregate), sent, given


class Learner:
    """One client the obvious way: leaf tensors, ``torch.optim.AdamW``, one batch after another."""

    def __init__(self, adapted, split, client, tensors):
        self.adapted, (self.x, self.y) = adapted, split.client(client)
        self.tensors = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        self.optimizer = torch.optim.AdamW(self.tensors.values(), lr=LR, weight_decay=0)
        self.client, self.taken = client, 0

    def learn(self, steps, loss):
        for index in batch_indices(len(self.y), self.taken, steps, BATCH, [SEED, 0, self.client]):
            self.optimizer.zero_grad()
            loss(lambda logits, index=index: F.cross_entropy(logits, self.y[index]), self.x[index]).backward()
            self.optimizer.step()
        self.taken += steps

    def take(self, tensors):
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.tensors[name].copy_(tensor)

    def now(self):
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}


def mean(adapters):
    return {name: sum(share * a[name] for share, a in zip(SHARES, adapters)) for name in adapters[0]}


def distance2(one, two):
    return sum((one[name] - two[name]).pow(2).sum() for name in one)


def dense_mix(adapted, one, two, weight):
    """The adapter of ``weight * one + (1 - weight) * two`` in the deltas, as one full-rank LoRA: A is the identity."""
    result = {}
    for name in one:
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            b1, b2, a1, a2 = (t[f"{layer}.lora_{f}.weight"] for f in "BA" for t in (one, two))
            result[f"{layer}.lora_B.weight"] = weight * (b1 @ a1) + (1 - weight) * (b2 @ a2)
            result[name] = torch.eye(a1.shape[1], dtype=a1.dtype)
        elif ".lora_" not in name:
            result[name] = weight * one[name] + (1 - weight) * two[name]
    return result


@pytest.fixture(scope="module")
def clients(federation64):
    return federation64.train


@pytest.fixture(scope="module")
def local(adapted64, clients):
    return run_algorithm(LOCAL, adapted64, clients, rounds=2, **OPTIONS)


@pytest.fixture(scope="module")
def federated(adapted64, clients):
    return run_algorithm(FEDIT, adapted64, clients, rounds=2, **OPTIONS)


# What runs them all.


def test_local_is_training_alone_with_the_whole_budget(adapted64, clients, local):
    alone = train(adapted64, repeat_adapter(adapted64.initial, 3), clients, steps=6, batch_size=BATCH, lr=LR,
                  seed=(SEED, 0))  # fmt: skip
    close(local.personal, alone.adapters)
    assert local.federated is None
    assert local.ledger.up.tolist() == local.ledger.down.tolist() == [0, 0, 0]
    assert local.ledger.steps.tolist() == [6, 6, 6]


def test_fedit_is_the_fedit_of_the_federated_module(adapted64, clients, federated):
    other = fedit(adapted64, clients, rounds=2, **OPTIONS)
    for found, expected in (
        (federated.federated, other.adapter),
        (federated.personal, repeat_adapter(other.adapter, 3)),
    ):
        assert all(torch.equal(found[name], expected[name]) for name in adapted64.initial)
    for name in ("up", "down", "steps"):
        assert torch.equal(getattr(federated.ledger, name), getattr(other.ledger, name))


@pytest.mark.parametrize("method", [FEDIT, fedprox(0.0), FEDEX, FEDSA, FEDPER, fedalt(), feddpa(0.0), ditto(0.0)],
                         ids=lambda method: method.name)  # fmt: skip
def test_one_client_is_local(adapted64, federation64, local, method):
    """All that could come from others is not there; FedALT's gate then has one expert to choose from."""
    alone = run_algorithm(method, adapted64, federation64.train.rows([1]), rounds=2, **OPTIONS)
    loss, _ = evaluate(alone.adapted, alone.personal, federation64.test.rows([1]))
    expected, _ = evaluate(adapted64, one_of(local.personal, 1), federation64.test.rows([1]))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    if method.name != "FedALT":
        close(deltas(adapted64, alone.personal), deltas(adapted64, one_of(local.personal, 1)))


@pytest.mark.parametrize("name", METHODS)
def test_no_method_depends_on_the_order_of_the_clients_or_on_chunks(adapted64, federation64, name):
    order = [2, 0, 1]
    usual = run_algorithm(METHODS[name], adapted64, federation64.train, rounds=2, **OPTIONS)
    turned = run_algorithm(
        METHODS[name], adapted64, federation64.train.rows(order), rounds=2, execution=Execution(chunk_size=2), **OPTIONS
    )
    loss, _ = evaluate(usual.adapted, usual.personal, federation64.test)
    again, _ = evaluate(turned.adapted, turned.personal, federation64.test.rows(order))
    torch.testing.assert_close(again, loss[order], rtol=1e-9, atol=0)
    if usual.federated is not None:
        close(deltas(adapted64, turned.federated), deltas(adapted64, usual.federated), rtol=1e-8)


IN_PART = {name: method for name, method in METHODS.items() if name != "FedALT"}  # its messages differ by client
PRIVATE = replace(FEDIT, name="private", privacy=Privacy(clip=0.1, noise_multiplier=0.5, seed=1))


@pytest.mark.parametrize("order", [[2, 1, 0], [1, 2, 0]])
@pytest.mark.parametrize(
    "method, share",
    [
        *((method, 1.0) for method in (*METHODS.values(), PRIVATE, flexlora([1, 2, 1]))),
        *((method, 0.6) for method in (*IN_PART.values(), PRIVATE)),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_in_whatever_order_the_clients_stand_no_bit_changes(adapted, federation, method, share, order):
    """In float32, whose sums show their order soonest; whatever is a client's goes where the client stands."""
    usual = run_algorithm(method, adapted, federation.train, rounds=2, participation=share, **OPTIONS)
    turned = run_algorithm(method, adapted, federation.train.rows(order), rounds=2, participation=share, **OPTIONS)
    for part in ("personal", "tensors"):
        one, two = getattr(usual, part), getattr(turned, part)
        assert one.keys() == two.keys() and all(torch.equal(two[name], one[name][order]) for name in one)
    for name in usual.federated or {}:
        assert torch.equal(turned.federated[name], usual.federated[name])
    for ledger in ("ledger", "by_round"):
        for column, paid in vars(getattr(usual, ledger)).items():
            assert torch.equal(getattr(getattr(turned, ledger), column), paid[..., order])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ledger_is_the_count_of_what_was_passed(adapted, federation, adapted64, federation64, name, dtype):
    base, data = (adapted, federation) if dtype == torch.float32 else (adapted64, federation64)
    method, sent, given = watched(METHODS[name])
    result = run_algorithm(method, base, data.train, rounds=2, **OPTIONS)
    opening = {n: t for n, t in method.init(repeat_adapter(base.initial, 3)).items() if method.is_uploaded(n)}
    assert len(sent) == len(given) == (0 if name == "local only" else 2)
    assert all(t.dtype == dtype for message in (*sent, *given) for t in message.values())
    for client in range(3):
        up, down = (
            sum(adapter_bytes(client_adapter(message, client)) for message in messages if message)
            for messages in (sent, (opening, *given))
        )
        assert (result.ledger.up[client], result.ledger.down[client]) == (up, down)


HANDMADE = {  # float32 bytes of 2 rounds, per client: A has 2 * 80 numbers, B 2 * 112, the head 68
    "FedIT": (2 * 4 * 452, 3 * 4 * 452, 6),
    "FFA-LoRA": (2 * 4 * 292, 3 * 4 * 292, 6),
    "FedIT, fine-tuned": (2 * 4 * 452, 3 * 4 * 452, 9),
    "FedEx-LoRA": (2 * 4 * 452, 4 * (3 * 452 + 2 * 3 * 384), 6),  # a residual of rank 6 after each round
    "FLoRA": (2 * 4 * 452, 4 * (452 + 2 * (68 + 3 * 384)), 6),
    "FlexLoRA": (2 * 4 * 452, 3 * 4 * 452, 6),
    "FedSA-LoRA": (2 * 4 * 160, 3 * 4 * 160, 6),
    "FedPer": (2 * 4 * 384, 3 * 4 * 384, 6),
    "FedRep": (2 * 4 * 384, 3 * 4 * 384, 6),
    "Ditto": (2 * 4 * 452, 3 * 4 * 452, 12),
    "APFL": (2 * 4 * 452, 3 * 4 * 452, 12),
    "FedDPA-T": (2 * 4 * 452, 3 * 4 * 452, 12),
    "FedALT": (2 * 4 * 384, 3 * 4 * 384, 6),
}


@pytest.mark.parametrize("name", HANDMADE)
def test_the_ledger_by_hand(adapted, federation, name):
    ledger = run_algorithm(METHODS[name], adapted, federation.train, rounds=2, **OPTIONS).ledger
    assert (ledger.up.tolist(), ledger.down.tolist(), ledger.steps.tolist()) == tuple([n] * 3 for n in HANDMADE[name])


@pytest.mark.parametrize("name", [name for name in METHODS if name != "FedALT"])
def test_every_result_is_an_ordinary_adapter(adapted, federation, tmp_path, name):
    """Whatever its rank: PEFT's names, the backbone's dtype, and a folder that can be loaded again."""
    result = run_algorithm(METHODS[name], adapted, federation.train, rounds=2, **OPTIONS)
    for adapter in (client_adapter(result.personal, 1), result.federated):
        if adapter is not None:
            again = load_adapter(adapted, save_adapter(adapted, adapter, tmp_path / str(len(list(tmp_path.iterdir())))))
            assert again.keys() == adapted.initial.keys()
            assert all(torch.equal(again[n], t) and t.dtype == torch.float32 for n, t in adapter.items())


def test_no_rounds_cost_a_download_and_change_nothing(adapted, federation):
    result = run_algorithm(FEDIT, adapted, federation.train, rounds=0, **OPTIONS)
    assert torch.equal(flatten(result.personal), flatten(repeat_adapter(adapted.initial, 3)))
    assert (result.ledger.up.tolist(), result.ledger.down.tolist()) == ([0] * 3, [4 * 452] * 3)


def test_a_phase_that_trains_nothing_is_refused(federation):
    headless = attach(tiny_vit(), rank=2, head=None)
    with pytest.raises(ValueError, match="FedRep: phase 0 trains none of"):
        run_algorithm(fedrep(), headless, federation.train, rounds=1, **OPTIONS)


# One shared adapter.


def test_fedprox_without_a_penalty_is_fedit(adapted64, clients, federated):
    close(run_algorithm(fedprox(0.0), adapted64, clients, rounds=2, **OPTIONS).federated, federated.federated)


def test_fedprox_is_the_obvious_loop(adapted64, clients):
    learners = [Learner(adapted64, clients, i, adapted64.initial) for i in range(3)]
    shared = adapted64.initial
    for _ in range(2):
        for one in learners:
            one.take(shared)
            one.learn(3, lambda ce, x, w=one.tensors, r=shared: ce(adapted64(w, x)) + 0.7 / 2 * distance2(w, r))
        shared = mean([one.now() for one in learners])
    close(run_algorithm(fedprox(0.7), adapted64, clients, rounds=2, **OPTIONS).federated, shared)


def test_ffa_keeps_a_and_its_mean_of_products_is_the_product_of_means(adapted64, clients, federated):
    method, sent, _ = watched(FFA)
    result = run_algorithm(method, adapted64, clients, rounds=2, **OPTIONS)
    frozen = {name: tensor for name, tensor in adapted64.initial.items() if "lora_A" in name}
    assert all(torch.equal(result.federated[name], tensor) for name, tensor in frozen.items())
    assert not any("lora_A" in name for message in sent for name in message)
    last = repeat_adapter(frozen, 3) | sent[-1]
    close(deltas(adapted64, result.federated), mean_of_deltas(adapted64, last))
    assert far(result.federated, adapted64.initial)
    method, sent, _ = watched(FEDIT)
    run_algorithm(method, adapted64, clients, rounds=2, **OPTIONS)
    assert far(deltas(adapted64, federated.federated), mean_of_deltas(adapted64, sent[-1]))  # not so in FedIT


def test_fine_tuning_is_local_training_from_the_federated_model(adapted64, clients, federated):
    tuned = run_algorithm(finetuned(FEDIT, 4), adapted64, clients, rounds=2, **OPTIONS)
    start = repeat_adapter(federated.federated, 3)
    after = train(adapted64, start, clients, steps=4, start=6, batch_size=BATCH, lr=LR, seed=(SEED, 0))
    close(tuned.personal, after.adapters)
    close(tuned.federated, federated.federated)
    assert torch.equal(tuned.ledger.up, federated.ledger.up) and torch.equal(tuned.ledger.down, federated.ledger.down)
    assert tuned.ledger.steps.tolist() == [10] * 3
    close(run_algorithm(finetuned(FEDIT, 0), adapted64, clients, rounds=2, **OPTIONS).personal, federated.personal)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_wise_ft_is_the_straight_line_between_the_deltas(adapted64, clients, federated, weight):
    tuned = run_algorithm(finetuned(FEDIT, 4), adapted64, clients, rounds=2, **OPTIONS).personal
    mixed = run_algorithm(wise_ft(FEDIT, 4, weight), adapted64, clients, rounds=2, **OPTIONS).personal
    before, after = deltas(adapted64, federated.personal), deltas(adapted64, tuned)
    close(deltas(adapted64, mixed), {name: weight * before[name] + (1 - weight) * after[name] for name in before})


# Exact aggregation.


def test_fedex_adds_up_to_the_mean_of_the_products_after_every_round(adapted64, clients):
    """Three rounds of rank 6 each: the rank of the residual would exceed the layers' smaller side, 16."""
    method, sent, _ = watched(FEDEX)
    result = run_algorithm(method, adapted64, clients, rounds=3, **OPTIONS)
    residual = {}
    for stack in sent:
        exact = {name: t + residual.get(name, 0) for name, t in mean_of_deltas(adapted64, stack).items()}
        inexact = deltas(adapted64, weighted_average(stack, torch.tensor(SIZES)))
        residual = {name: t - inexact[name] for name, t in exact.items() if "head" not in name}
    close(deltas(adapted64, result.federated), exact)
    close(deltas(adapted64, result.personal), repeat_adapter(exact, 3))
    assert max(t.abs().max() for t in residual.values()) > 1e-5
    ranks = {result.federated[f"{layer}.lora_A.weight"].shape[0] for layer in lora_layers(result.federated)}
    assert ranks == {2 + 16}


@pytest.mark.parametrize("method", [FEDEX, FLORA, finetuned(FEDEX, 2)], ids=lambda method: method.name)
def test_the_merged_residual_may_as_well_be_an_adapter_of_its_own(adapted64, clients, method):
    """In the frozen weights or beside the factors: the same model, and the backbone is as it was."""
    before = {name: tensor.clone() for name, tensor in adapted64.model.named_parameters()}
    one = run_algorithm(method, adapted64, clients, rounds=3, **OPTIONS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted64.model.named_parameters())
    two = run_algorithm(
        replace(method, phases=(Phase(),), frozen=lambda tensors: {}), adapted64, clients, rounds=3, **OPTIONS
    )
    found, expected = (delta(result.personal, adapted64.scaling) for result in (one, two))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_the_backbone_is_as_it_was_after_a_failure(adapted64, clients):
    before = {name: tensor.clone() for name, tensor in adapted64.model.named_parameters()}
    deltas = delta(adapted64.initial, adapted64.scaling)
    change = {name: torch.ones_like(tensor) for name, tensor in deltas.items() if "head" not in name}
    with pytest.raises(ZeroDivisionError), delta_added(adapted64, change):
        moved = dict(adapted64.model.named_parameters())
        assert sum(not torch.equal(tensor, before[name]) for name, tensor in moved.items()) == len(change)
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted64.model.named_parameters())


def test_fedex_trains_on_top_of_the_merged_residual(adapted64, clients):
    """The second round sees the exact mean: its losses are those of the obvious loop."""
    result = run_algorithm(FEDEX, adapted64, clients, rounds=1, **OPTIONS)
    base, now = select_prefix(result.tensors, "merged_residual"), select_prefix(result.tensors)
    learners = [Learner(adapted64, clients, i, adapted64.initial) for i in range(3)]
    for one in learners:
        one.learn(3, lambda ce, x, w=one.tensors: ce(adapted64(w, x)))
        one.take(client_adapter(now, 0))

        def loss(ce, x, w=one.tensors):
            stacked = {
                n: torch.cat([t, base[n][0]], dim=int("lora_B" in n)) if ".lora_" in n else t for n, t in w.items()
            }
            return ce(adapted64(stacked, x))

        one.learn(3, loss)
    method, sent, _ = watched(FEDEX)
    run_algorithm(method, adapted64, clients, rounds=2, **OPTIONS)
    for i, one in enumerate(learners):
        close(client_adapter(sent[1], i), one.now())


@pytest.mark.parametrize("targets", [("qkv", "fc1", "fc2"), ("stem.0", "stem.2", "fc1")])
@pytest.mark.parametrize("clients", [None, 2])
def test_limiting_the_rank_changes_no_delta_and_bounds_the_rank(backbone64, random_stack, targets, clients):
    base = attach(backbone64, config=LoraConfig(r=40, target_modules=list(targets), modules_to_save=["head"]))
    adapter = random_stack(base, clients or 1, seed=3)
    adapter = adapter if clients else client_adapter(adapter, 0)
    small = limit_rank(adapter)
    close(delta(small, base.scaling), delta(adapter, base.scaling))
    for layer in lora_layers(small):
        out, wide = delta(small, base.scaling)[f"{layer}.weight"].shape[-2:]
        assert small[f"{layer}.lora_A.weight"].shape[int(bool(clients))] == min(40, out, wide)
    x = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    if not clients:
        torch.testing.assert_close(base(small, x), base(adapter, x), rtol=1e-9, atol=1e-12)


def test_flora_after_one_round_is_the_mean_of_the_local_models(adapted64, clients):
    alone = run_algorithm(LOCAL, adapted64, clients, rounds=1, **OPTIONS)
    result = run_algorithm(FLORA, adapted64, clients, rounds=1, **OPTIONS)
    close(deltas(adapted64, result.federated), mean_of_deltas(adapted64, alone.personal))
    close(deltas(adapted64, result.personal), repeat_adapter(mean_of_deltas(adapted64, alone.personal), 3))


def test_flora_adds_a_mean_of_products_and_begins_anew_every_round(adapted64, clients):
    method, sent, _ = watched(FLORA)
    result = run_algorithm(method, adapted64, clients, rounds=3, **OPTIONS)
    total = mean_of_deltas(adapted64, sent[-1])
    for stack in sent[:-1]:
        total |= {n: total[n] + t for n, t in mean_of_deltas(adapted64, stack).items() if "head" not in n}
    close(deltas(adapted64, result.federated), total)
    now = client_adapter(select_prefix(result.tensors), 0)
    for name, tensor in adapted64.initial.items():
        if "lora_A" in name:
            assert torch.equal(now[name].flatten().sort().values, tensor.flatten().sort().values)
            assert not torch.equal(now[name], tensor)
        elif "lora_B" in name:
            assert not now[name].any()
    assert all(torch.equal(t[0], t[2]) for t in select_prefix(result.tensors).values())


def test_flora_forgets_the_optimizer_with_its_factors(adapted64, clients):
    """A's moments belong to factors that are gone: with them, the second round would be another."""
    usual = run_algorithm(FLORA, adapted64, clients, rounds=2, **OPTIONS)
    kept = run_algorithm(replace(FLORA, keep_optimizer=True), adapted64, clients, rounds=2, **OPTIONS)
    assert far(deltas(adapted64, usual.federated), deltas(adapted64, kept.federated))


def test_flexlora_at_full_rank_is_the_mean_of_the_products(backbone64, clients):
    wide = attach(backbone64, rank=16)
    method, sent, given = watched(flexlora())
    result = run_algorithm(method, wide, clients, rounds=2, **OPTIONS)
    for stack, message in zip(sent, given):
        close(deltas(wide, message), repeat_adapter(mean_of_deltas(wide, stack), 3))
    close(deltas(wide, result.federated), mean_of_deltas(wide, sent[-1]))


@pytest.mark.parametrize("ranks", [None, (1, 2, 1)])
def test_flexlora_gives_each_client_the_best_approximation_of_its_rank(adapted64, clients, ranks):
    method, sent, given = watched(flexlora(ranks))
    result = run_algorithm(method, adapted64, clients, rounds=2, **OPTIONS)
    for stack, message in zip(sent, given):
        exact, got = mean_of_deltas(adapted64, stack), deltas(adapted64, message)
        for name, tensor in exact.items():
            for client, rank in enumerate(ranks or (2, 2, 2)):
                best = tensor
                if "head" not in name:
                    u, s, vh = torch.linalg.svd(tensor)
                    best = u[:, :rank] * s[:rank] @ vh[:rank]
                torch.testing.assert_close(got[name][client], best, rtol=1e-9, atol=1e-11)
                if tensor.dim() == 2 and "head" not in name:
                    trained = deltas(adapted64, stack)[name][client]
                    assert torch.linalg.matrix_rank(trained, rtol=1e-9) == rank
    close(deltas(adapted64, result.federated), deltas(adapted64, client_adapter(given[-1], 1)))


def test_flexlora_gives_b_all_of_the_singular_values(adapted64, clients):
    method, sent, given = watched(flexlora())
    run_algorithm(method, adapted64, clients, rounds=2, **OPTIONS)
    for stack, message in zip(sent, given):
        mean = mean_of_deltas(adapted64, stack)
        for layer, scaling in adapted64.scaling.items():
            a, b = (message[f"{layer}.lora_{factor}.weight"][0] for factor in "AB")
            u, s, vh = torch.linalg.svd(mean[f"{layer}.weight"] / scaling, full_matrices=False)
            sign = (u[:, :2] * b).sum(0).sign()  # an SVD leaves it open
            torch.testing.assert_close(b, u[:, :2] * s[:2] * sign, rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(a, vh[:2] * sign.unsqueeze(1), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", [FEDEX, FLORA, flexlora(), apfl(), fedalt()], ids=lambda method: method.name)
def test_layers_may_differ_in_rank_and_kind(backbone64, clients, method):
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["stem.2", "qkv", "fc1"], rank_pattern={"fc1": 3},
                        modules_to_save=["head"])  # fmt: skip
    base = attach(backbone64, config=config)
    watching, sent, _ = watched(method)
    result = run_algorithm(watching, base, clients, rounds=1, **OPTIONS)
    loss, _ = evaluate(result.adapted, result.personal, clients)
    assert loss.mean() < torch.tensor(4.0).log()  # below the zero head's
    if method.name in ("FedEx-LoRA", "FLoRA"):
        close(deltas(base, result.federated), mean_of_deltas(base, sent[-1]))


def test_flexlora_counts_no_padding(adapted, federation):
    ledger = run_algorithm(flexlora((1, 2, 1)), adapted, federation.train, rounds=2, **OPTIONS).ledger
    assert ledger.up.tolist() == [2 * 4 * (192 * rank + 68) for rank in (1, 2, 1)]
    assert ledger.down.tolist() == [3 * 4 * (192 * rank + 68) for rank in (1, 2, 1)]


@pytest.mark.parametrize("ranks", [(1, 2), (0, 1, 2), (1, 2, 3)])
def test_impossible_ranks_are_refused(adapted, federation, ranks):
    with pytest.raises(ValueError, match=r"3 numbers from 1 to 2 are needed|ranks\[0\] must be at least 1, not 0"):
        run_algorithm(flexlora(ranks), adapted, federation.train, rounds=1, **OPTIONS)


# Part shared, part personal.


@pytest.mark.parametrize("method, travels", [
    (FEDSA, lambda name: "lora_A" in name),
    (FEDPER, lambda name: ".lora_" in name),
    (fedrep(), lambda name: ".lora_" in name),
    (fedalt(), lambda name: ".lora_" in name),
], ids=lambda value: getattr(value, "name", ""))  # fmt: skip
def test_only_what_is_shared_crosses(adapted64, clients, method, travels):
    watching, sent, given = watched(method)
    result = run_algorithm(watching, adapted64, clients, rounds=2, **OPTIONS)
    names = {name for name in adapted64.initial if travels(name)}
    for message in (*sent, *given):
        assert {name.removeprefix("rest:") for name in message} == names
    for name, tensor in select_prefix(result.tensors).items():
        stays = name not in names or method.name == "FedALT"
        assert torch.equal(tensor[0], tensor[1]) != stays, name


def test_fedsa_averages_a_beside_each_clients_own_b(adapted64, clients):
    learners = [Learner(adapted64, clients, i, adapted64.initial) for i in range(3)]
    for _ in range(2):
        for one in learners:
            one.learn(3, lambda ce, x, w=one.tensors: ce(adapted64(w, x)))
        shared = {name: t for name, t in mean([one.now() for one in learners]).items() if "lora_A" in name}
        for one in learners:
            one.take(shared)
    result = run_algorithm(FEDSA, adapted64, clients, rounds=2, **OPTIONS)
    for i, one in enumerate(learners):
        close(client_adapter(result.personal, i), one.now())


def test_fedper_without_a_head_is_fedit(backbone64, clients):
    headed = copy.deepcopy(backbone64)
    headless = attach(headed, rank=2, head=None)
    one, two = (run_algorithm(method, headless, clients, rounds=2, **OPTIONS) for method in (FEDPER, FEDIT))
    close(one.personal, two.personal)


def test_fedrep_trains_the_head_and_then_the_body(adapted64, clients):
    learners = [Learner(adapted64, clients, i, adapted64.initial) for i in range(3)]
    heads = [torch.optim.AdamW([t for n, t in one.tensors.items() if is_head(n)], lr=LR, weight_decay=0)
             for one in learners]  # fmt: skip
    bodies = [torch.optim.AdamW([t for n, t in one.tensors.items() if not is_head(n)], lr=LR, weight_decay=0)
              for one in learners]  # fmt: skip
    for number in range(2):
        for one, head, body in zip(learners, heads, bodies):
            for one.optimizer, steps in ((head, 2), (body, 1)):
                one.taken = number * steps
                one.learn(steps, lambda ce, x, w=one.tensors: ce(adapted64(w, x)))
        shared = {name: t for name, t in mean([one.now() for one in learners]).items() if not is_head(name)}
        for one in learners:
            one.take(shared)
    result = run_algorithm(fedrep(0.6), adapted64, clients, rounds=2, **OPTIONS)  # 0.6 of 3 steps: 2
    for i, one in enumerate(learners):
        close(client_adapter(result.personal, i), one.now())
    assert result.ledger.steps.tolist() == [6] * 3


def test_fedrep_with_all_steps_for_the_head_is_local_linear_probing(adapted64, clients):
    probing = Algorithm("linear probing", phases=(Phase(is_trained=is_head),))
    result, alone = (
        run_algorithm(method, adapted64, clients, rounds=2, **OPTIONS) for method in (fedrep(1.0), probing)
    )
    close(result.personal, alone.personal)
    moved = {name for name, t in alone.personal.items() if not torch.equal(t[0], adapted64.initial[name])}
    assert moved == {name for name in adapted64.initial if is_head(name)}


# Two models.


@pytest.mark.parametrize("method", [ditto(0.0), apfl(0.0, adaptive=False), feddpa(0.0)], ids=lambda m: m.name)
def test_two_models_of_which_only_the_personal_one_counts_are_local(adapted64, clients, local, method):
    result = run_algorithm(method, adapted64, clients, rounds=2, **OPTIONS)
    close(deltas(adapted64, result.personal), deltas(adapted64, local.personal))


@pytest.mark.parametrize("method", [ditto(), apfl(0.3), feddpa()], ids=lambda m: m.name)
def test_beside_the_personal_model_runs_a_fedit_of_its_own(adapted64, clients, federated, local, method):
    result = run_algorithm(method, adapted64, clients, rounds=2, **OPTIONS)
    close(result.federated, federated.federated)
    assert far(deltas(adapted64, result.personal), deltas(adapted64, local.personal))
    assert far(deltas(adapted64, result.personal), deltas(adapted64, federated.personal))


@pytest.mark.parametrize("method", [apfl(1.0, adaptive=False), feddpa(1.0)], ids=lambda m: m.name)
def test_two_models_of_which_only_the_shared_counts_are_fedit(adapted64, clients, federated, method):
    result = run_algorithm(method, adapted64, clients, rounds=2, **OPTIONS)
    close(deltas(adapted64, result.personal), deltas(adapted64, federated.personal))


def test_dittos_personal_model_is_the_obvious_loop(adapted64, clients):
    references = [adapted64.initial, run_algorithm(FEDIT, adapted64, clients, rounds=1, **OPTIONS).federated]
    result = run_algorithm(ditto(0.7), adapted64, clients, rounds=2, **OPTIONS)
    for i in range(3):
        one = Learner(adapted64, clients, i, adapted64.initial)
        for shared in references:
            one.learn(3, lambda ce, x, w=one.tensors, r=shared: ce(adapted64(w, x)) + 0.7 / 2 * distance2(w, r))
        close(client_adapter(result.personal, i), one.now())


def test_dittos_penalty_pulls_towards_the_shared_model(adapted64, clients):
    gaps = []
    for strength in (0.0, 10.0):
        result = run_algorithm(ditto(strength), adapted64, clients, rounds=2, **OPTIONS)
        gaps.append((flatten(result.personal) - flatten(select_prefix(result.tensors))).norm())
    assert gaps[1] < 0.5 * gaps[0]


def test_apfl_is_the_obvious_loop(adapted64, clients):
    """w steps down f(w); v and alpha step down f(alpha v + (1 - alpha) w) at the same point and on the same batch."""
    result = run_algorithm(apfl(0.3), adapted64, clients, rounds=2, **OPTIONS)
    learners = []
    for i in range(3):
        start = (
            adapted64.initial
            | add_prefix("personal", adapted64.initial)
            | {"weight": torch.tensor([0.3], dtype=torch.float64)}
        )
        learners.append(Learner(adapted64, clients, i, start))
    for _ in range(2):
        for one in learners:

            def loss(ce, x, w=one.tensors):
                still = {name: t.detach() for name, t in w.items() if name in adapted64.initial}
                mix = dense_mix(adapted64, still, select_prefix(w, "personal"), w["weight"])
                return ce(adapted64({n: w[n] for n in adapted64.initial}, x)) + ce(adapted64(mix, x))

            one.learn(3, loss)
        shared = mean([{n: one.now()[n] for n in adapted64.initial} for one in learners])
        for one in learners:
            one.take(shared)
    for i, one in enumerate(learners):
        now = one.now()
        torch.testing.assert_close(result.tensors["weight:"][i], now["weight"], rtol=1e-9, atol=0)
        mix = dense_mix(adapted64, shared, select_prefix(now, "personal"), now["weight"])
        close(deltas(adapted64, client_adapter(result.personal, i)), deltas(adapted64, mix), rtol=1e-7)
        assert abs(now["weight"].item() - 0.3) > 1e-3


def test_apfl_cuts_its_weight_to_the_unit_interval_and_still_learns_it(adapted64, clients, random_stack):
    method = apfl()
    personal, shared = random_stack(adapted64, 1, 1), random_stack(adapted64, 1, 2)
    for raw, used in ((1.7, 1.0), (-0.4, 0.0), (0.6, 0.6)):
        weight = torch.tensor([[raw]], dtype=torch.float64, requires_grad=True)
        mixed = deltas(
            adapted64, method.personal_model(shared | add_prefix("personal", personal) | {"weight:": weight})
        )
        one, two = deltas(adapted64, personal), deltas(adapted64, shared)
        close({n: t.detach() for n, t in mixed.items()}, {n: used * two[n] + (1 - used) * one[n] for n in one})
        (grad,) = torch.autograd.grad(sum(t.sum() for t in mixed.values()), weight)
        expected = sum((two[n] - one[n]).sum() for n in one)  # <grad, w - v>
        torch.testing.assert_close(grad.squeeze(), expected, rtol=1e-9, atol=0)


def test_feddpas_personal_adapter_trains_beside_the_shared_one_as_received(adapted64, clients):
    received = [adapted64.initial, run_algorithm(FEDIT, adapted64, clients, rounds=1, **OPTIONS).federated]
    result = run_algorithm(feddpa(0.3), adapted64, clients, rounds=2, **OPTIONS)
    for i in range(3):
        one = Learner(adapted64, clients, i, adapted64.initial)
        for w in received:
            one.learn(3, lambda ce, x, v=one.tensors, w=w: ce(adapted64(dense_mix(adapted64, w, v, 0.3), x)))
        mix = dense_mix(adapted64, result.federated, one.now(), 0.3)
        close(deltas(adapted64, client_adapter(result.personal, i)), deltas(adapted64, mix), rtol=1e-7)


def test_fedalts_rest_of_the_world_is_the_mean_of_the_others(adapted64, clients):
    method, sent, given = watched(fedalt())
    result = run_algorithm(method, adapted64, clients, rounds=2, **OPTIONS)
    for name, tensor in sent[-1].items():
        for i in range(3):
            rest = torch.stack([tensor[j] for j in range(3) if j != i]).mean(0)
            torch.testing.assert_close(given[-1][f"rest:{name}"][i], rest, rtol=1e-9, atol=1e-15)
            torch.testing.assert_close(result.tensors[f"rest:{name}"][i], rest, rtol=1e-9, atol=1e-15)
        assert torch.equal(result.tensors[name], tensor)  # what a client trained is never overwritten
    assert all(t.abs().max() > 1e-4 for t in select_prefix(result.tensors, "gate").values())


def test_fedalt_trains_its_own_adapter_and_its_gate_on_top_of_a_frozen_rest(adapted64, clients):
    method, sent, given = watched(fedalt())
    run_algorithm(method, adapted64, clients, rounds=2, **OPTIONS)
    model, starting = gated(adapted64), method.init(repeat_adapter(adapted64.initial, 3))
    for i in range(3):
        start = client_adapter(starting, i)
        one = Learner(model, clients, i, {name: t for name, t in start.items() if not name.startswith("rest:")})
        for rest in (select_prefix(start, "rest"), select_prefix(client_adapter(given[0], i), "rest")):
            rest = add_prefix("rest", rest)
            one.learn(3, lambda ce, x, w=one.tensors, r=rest: ce(model(method.personal_model(w | r), x)))
        close(client_adapter(sent[-1], i), {name: t for name, t in one.now().items() if name in sent[-1]})


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_gate_weighs_two_experts_token_by_token(kind):
    """``W0 x + s sum_k softmax(G x)_k B_k A_k x``, computed densely for every position."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 7) if kind == "linear" else nn.Conv2d(5, 7, 3)
    base = attach(nn.Sequential(layer).double(), config=LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    name = lora_layers(base.initial)[0]
    window = () if kind == "linear" else (3, 3)
    a, g = (torch.randn(n, 5, *window, dtype=torch.float64) for n in (4, 2))
    b = torch.randn(7, 4, *(1 for _ in window), dtype=torch.float64)
    x = torch.randn((3, 11, 5) if kind == "linear" else (3, 5, 6, 6), dtype=torch.float64)
    out = gated(base)({f"{name}.lora_A.weight": torch.cat([a, g]), f"{name}.lora_B.weight": b}, x)
    if kind == "convolution":  # every window of x is a token
        x, out = F.unfold(x, 3).transpose(1, 2), out.flatten(2).transpose(1, 2)
    a, b, g, w = (t.flatten(1) for t in (a, b, g, layer.weight.detach().double()))
    weight = (x @ g.T).softmax(-1)
    experts = [(x @ a[2 * k : 2 * k + 2].T) @ b[:, 2 * k : 2 * k + 2].T for k in range(2)]
    expected = x @ w.T + layer.bias.detach() + 3 * sum(weight[..., k : k + 1] * experts[k] for k in range(2))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
    assert (weight[..., 0].max() - weight[..., 0].min()) > 0.1


def test_the_gated_backbone_shares_its_weights_and_leaves_the_other_alone(adapted64, random_adapter):
    x, adapter = torch.rand(2, 1, 28, 28, dtype=torch.float64), random_adapter(adapted64, 0)
    before = adapted64(adapter, x)
    model = gated(adapted64)
    assert isinstance(model, AdaptedBackbone)
    assert all(one is two for one, two in zip(model.model.parameters(), adapted64.model.parameters(), strict=True))
    assert torch.equal(adapted64(adapter, x), before)
    with pytest.raises((ValueError, RuntimeError)):  # the gated adapter is no LoRA: the plain backbone cannot run it
        stack = repeat_adapter(adapter, 2)
        adapted64(client_adapter(fedalt().personal_model(fedalt().init(stack)), 0), x)


# A method that is not in the list.


def fedavgm(momentum):
    """FedIT with momentum at the server (Hsu et al., 2019, arXiv 1909.06335). ``momentum=0`` is FedIT.

    The clients follow the server's arithmetic from the mean that they receive, so nothing more has to travel.
    """

    def settle(tensors, number):
        shared = select_prefix(tensors)
        velocity = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
        if number > 0:
            last, speed = select_prefix(tensors, "global_reference"), select_prefix(tensors, "velocity")
            velocity = {n: momentum * speed[n] + shared[n] - last[n] for n in shared}
            shared = {n: last[n] + velocity[n] for n in shared}
        return shared | add_prefix("global_reference", shared) | add_prefix("velocity", velocity)

    return replace(FEDIT, name="FedAvgM", on_receive=settle)


def test_a_new_method_takes_fewer_than_thirty_lines(adapted64, clients, federated):
    close(run_algorithm(fedavgm(0.0), adapted64, clients, rounds=2, **OPTIONS).federated, federated.federated)
    method, sent, _ = watched(fedavgm(0.9))
    result = run_algorithm(method, adapted64, clients, rounds=2, **OPTIONS)
    first_mean, second_mean = (weighted_average(stack, torch.tensor(SIZES)) for stack in sent)
    expected = {n: second_mean[n] + 0.9 * (first_mean[n] - t) for n, t in adapted64.initial.items()}
    close(result.federated, expected)


def test_the_two_methods_of_the_docstring(adapted64, clients):
    method, sent, given = watched(Algorithm("LG-FedAvg", is_uploaded=is_head))
    run_algorithm(method, adapted64, clients, rounds=1, **OPTIONS)
    assert {name for message in (*sent, *given) for name in message} == {n for n in adapted64.initial if is_head(n)}

    def median(stack, sizes):
        return repeat_adapter({name: tensor.median(0).values for name, tensor in stack.items()}, len(sizes))

    robust = Algorithm("FedIT with medians", is_uploaded=is_shared, aggregate=median, federated_model=first_client)
    method, sent, _ = watched(robust)
    result = run_algorithm(method, adapted64, clients, rounds=1, **OPTIONS)
    close(result.federated, {name: t.sort(0).values[1] for name, t in sent[0].items()})
