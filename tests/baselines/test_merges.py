"""Merging finished models: vectors computed by hand, least squares solved densely, limits that must be the mean."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import SIZES
from hypothesis import given, settings, strategies as st
from peft import LoraConfig

from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import adapter_from_delta, client_adapter, delta, flatten, lora_layers, unflatten
from potara_lite.baselines.merges import (
    dare,
    fisher_merge,
    layer_grams,
    merge_deltas,
    model_fisher,
    regmean,
    task_arithmetic,
    ties,
)
from potara_lite.baselines.methods import fisher_merge_of_pair
from potara_lite.federation.split import Split
from potara_lite.merging.merge import compress
from potara_lite.training.gradients import diagonal_fisher, per_sample_gradients


def close(one, two):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def pair(adapted64, random_stack):
    return [random_stack(adapted64, 3, seed) for seed in (1, 2)]


def of_deltas(adapted, models, function):
    one, two = (delta(model, adapted.scaling) for model in models)
    return {name: function(one[name], two[name]) for name in one}


# Full-rank adapters.


@pytest.mark.parametrize("targets", [("qkv", "proj", "fc1", "fc2"), ("stem.0", "stem.4", "fc1")])
@pytest.mark.parametrize("clients", [None, 3])
def test_any_delta_is_an_adapter_and_runs(backbone64, random_stack, dense_logits, targets, clients):
    base = attach(backbone64, config=LoraConfig(r=2, lora_alpha=5, target_modules=list(targets),
                                                modules_to_save=["head"]))  # fmt: skip
    like = random_stack(base, clients or 1, seed=0)
    like = like if clients else client_adapter(like, 0)
    generator = torch.Generator().manual_seed(1)
    change = {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in
              delta(like, base.scaling).items()}  # fmt: skip
    adapter = adapter_from_delta(change, base.scaling, like)
    assert list(adapter) == list(like)
    close(delta(adapter, base.scaling), change)
    x = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    for i in range(clients or 1):
        one = client_adapter(adapter, i) if clients else adapter
        torch.testing.assert_close(base(one, x), dense_logits(backbone64, one, base.scaling, x), rtol=1e-9, atol=1e-10)


def test_the_error_of_making_it_small_again_is_reported(adapted64, pair):
    full = merge_deltas(pair, adapted64.scaling, lambda vectors: ties(vectors, 0.3))
    small, errors = compress(full, 4)
    exact, got = delta(full, adapted64.scaling), delta(small, adapted64.scaling)
    for layer, error in errors.items():
        gap = exact[f"{layer}.weight"] - got[f"{layer}.weight"]
        expected = gap.flatten(1).norm(dim=1) / exact[f"{layer}.weight"].flatten(1).norm(dim=1)
        torch.testing.assert_close(error, expected, rtol=1e-9, atol=0)
        assert (error > 0.01).all()


# Task arithmetic.


@pytest.mark.parametrize("coefficient", [0.5, 0.3, 1.0])
def test_task_arithmetic_scales_the_sum_of_the_deltas(adapted64, pair, coefficient):
    merged = delta(task_arithmetic(pair, coefficient), adapted64.scaling)
    close(merged, of_deltas(adapted64, pair, lambda one, two: coefficient * (one + two)))


# Fisher merging.


def test_fisher_merging_by_hand():
    models = [{"w": torch.tensor([[1.0, 2.0, 3.0]])}, {"w": torch.tensor([[5.0, 4.0, 1.0]])}]
    fishers = [torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])]
    torch.testing.assert_close(fisher_merge(models, fishers)["w"], torch.tensor([[2.0, 4.0, 2.0]]))


def test_equal_fishers_give_the_mean_and_a_fisher_of_its_own_that_model(adapted64, pair):
    fisher = torch.rand(3, 452, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    mean = {name: (pair[0][name] + pair[1][name]) / 2 for name in pair[0]}
    close(fisher_merge(pair, [fisher, fisher]), mean)
    close(fisher_merge(pair, [torch.zeros_like(fisher)] * 2), mean)
    close(fisher_merge(pair, [fisher, torch.zeros_like(fisher)]), pair[0])
    close(fisher_merge(pair, [7 * fisher, 7 * fisher.flip(1)]), fisher_merge(pair, [fisher, fisher.flip(1)]))


def oracle_fisher(adapted, adapter, x, parameters):
    """The mean over ``x`` of ``Σ_y p(y|x) (∂ log p(y|x))²`` by ``parameters``: an example and a class at a time."""
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for i in range(len(x)):
        log_p = adapted(adapter, x[i : i + 1]).flatten().log_softmax(0)
        for one in log_p:
            gradients = torch.autograd.grad(one, parameters, retain_graph=True)
            total = [t + one.exp().detach() * g**2 / len(x) for t, g in zip(total, gradients)]
    return total


def test_the_fisher_expects_the_models_own_labels(adapted64, federation64, pair):
    data = federation64.calibration
    found = model_fisher(adapted64, pair[0], data)
    for client in range(len(data)):
        adapter = {name: t[client].clone().requires_grad_() for name, t in pair[0].items()}
        expected = oracle_fisher(adapted64, adapter, data.client(client)[0], list(adapter.values()))
        torch.testing.assert_close(found[client], torch.cat([t.flatten() for t in expected]), rtol=1e-9, atol=1e-15)
    other_labels = data.with_labels(torch.where(data.y < 0, data.y, (data.y + 1) % 4))
    assert torch.equal(model_fisher(adapted64, pair[0], other_labels), found)  # the data's labels play no part
    assert not torch.allclose(diagonal_fisher(per_sample_gradients(adapted64, pair[0], data), data.sizes), found)


def test_the_fisher_of_token_targets_is_drawn_and_right_on_average():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    adapted = attach(network, targets=["0"], head="2", rank=1)
    adapter = {name: torch.randn_like(tensor).requires_grad_() for name, tensor in adapted.initial.items()}
    x = torch.randn(2, 2, 4, dtype=torch.float64)
    split = Split.of([(x, torch.tensor([[0, -100], [-100, 2]]))])  # one target each: the expectation over classes
    stack = {name: tensor.detach().unsqueeze(0) for name, tensor in adapter.items()}
    draws = torch.stack([model_fisher(adapted, stack, split, seed=seed)[0] for seed in range(300)])
    expected = torch.cat(
        [t.flatten() for t in oracle_fisher(adapted, adapter, x[[0, 1], [0, 1]], list(adapter.values()))]
    )
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 4.5 * standard_error + 1e-12).all() and standard_error.max() > 0
    assert torch.equal(draws[7], model_fisher(adapted, stack, split, seed=7)[0])


def test_fisher_merging_of_deltas_sees_the_dense_weights(adapted64, federation64, pair):
    """In full-rank form the Fisher is that of the dense weights, up to a factor per layer, and the basis is gone."""
    data = federation64.calibration
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    turned = {n: turn.T @ t if "lora_A" in n else t @ turn if "lora_B" in n else t for n, t in pair[0].items()}
    close(delta(turned, adapted64.scaling), delta(pair[0], adapted64.scaling))
    run = SimpleNamespace(adapted=adapted64, federation=federation64)
    results = [fisher_merge_of_pair(run, SimpleNamespace(models=(model, pair[1]))) for model in (pair[0], turned)]
    close(*(delta(merged, adapted64.scaling) for merged in results))

    layer = "base_model.model.blocks.0.fc1"
    weight = adapted64.model.get_submodule(layer).get_base_layer().weight
    merged = delta(results[0], adapted64.scaling)[f"{layer}.weight"]
    for client in range(len(data)):
        rows = [client_adapter(model, client) for model in pair]
        weight.requires_grad_(True)
        one, two = (oracle_fisher(adapted64, row, data.client(client)[0], [weight])[0] for row in rows)
        weight.requires_grad_(False)
        a, b = (delta(row, adapted64.scaling)[f"{layer}.weight"] for row in rows)
        torch.testing.assert_close(merged[client], (one * a + two * b) / (one + two), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("bad, said", [
    ([torch.ones(3, 452), torch.ones(3, 7)], r"fishers\[1\] must be numbers of shape .* P = 452"),
    ([torch.ones(3, 452), -torch.ones(3, 452)], r"fishers\[1\] must be at least 0, not -1.0"),
    ([torch.ones(3, 7)] * 2, r"fishers\[0\] must be of shape \(3, 452\), not Tensor of shape \(3, 7\)"),
])  # fmt: skip
def test_an_impossible_fisher_is_refused(pair, bad, said):
    with pytest.raises(ValueError, match=said):
        fisher_merge(pair, bad)


# RegMean.


def inputs(adapted, generator, rows=40):
    """Random inputs of every layer of a stack of three clients: ``(C, rows, in)``."""
    wide = {layer: adapted.initial[f"{layer}.lora_A.weight"].shape[1] for layer in lora_layers(adapted.initial)}
    wide["base_model.model.head"] = 16
    return {n: torch.randn(3, rows, k, generator=generator, dtype=torch.float64) for n, k in wide.items()}


def grams(x):
    return {name: rows.mT @ rows for name, rows in x.items()}


def test_regmean_solves_the_least_squares_problem_exactly(adapted64, pair):
    generator = torch.Generator().manual_seed(0)
    xs = [inputs(adapted64, generator), inputs(adapted64, generator)]
    merged = regmean(pair, [grams(x) for x in xs], off_diagonal=1.0)
    assert merged["base_model.model.blocks.0.fc1.lora_A.weight"].shape[1] == 4  # still low-rank
    merged, changes = delta(merged, adapted64.scaling), [delta(m, adapted64.scaling) for m in pair]
    for layer in xs[0]:
        for i in range(3):
            rows = torch.cat([x[layer][i] for x in xs])
            wanted = torch.cat([x[layer][i] @ c[f"{layer}.weight"][i].T for x, c in zip(xs, changes)])
            solution = torch.linalg.lstsq(rows, wanted).solution.T
            torch.testing.assert_close(merged[f"{layer}.weight"][i], solution, rtol=1e-8, atol=1e-10)
    bias = "base_model.model.head.bias"
    torch.testing.assert_close(merged[bias], (pair[0][bias] + pair[1][bias]) / 2, rtol=1e-12, atol=0)


def test_regmean_of_equal_models_is_the_model_and_of_equal_grams_the_mean(adapted64, pair):
    generator = torch.Generator().manual_seed(0)
    one, two = (grams(inputs(adapted64, generator)) for _ in range(2))
    for off_diagonal in (1.0, 0.9, 0.0):
        same = delta(regmean([pair[0], pair[0]], [one, two], off_diagonal), adapted64.scaling)
        close(same, delta(pair[0], adapted64.scaling))
        mean = delta(regmean(pair, [one, one], off_diagonal), adapted64.scaling)
        close(mean, of_deltas(adapted64, pair, lambda a, b: (a + b) / 2))


def test_regmean_with_shrunk_off_diagonals(adapted64, pair):
    """``W = (sum W_k G_k)(sum G_k)^-1`` with each off-diagonal entry multiplied by 0.9, written out densely."""
    generator = torch.Generator().manual_seed(0)
    raw = [grams(inputs(adapted64, generator)) for _ in range(2)]
    merged, changes = delta(regmean(pair, raw), adapted64.scaling), [delta(m, adapted64.scaling) for m in pair]
    for layer in raw[0]:
        shrunk = []
        for gram in raw:
            g = 0.9 * gram[layer]
            g[:, range(g.shape[1]), range(g.shape[1])] /= 0.9
            shrunk.append(g)
        top = sum(c[f"{layer}.weight"] @ g for c, g in zip(changes, shrunk))
        expected = top @ torch.linalg.inv(sum(shrunk))
        torch.testing.assert_close(merged[f"{layer}.weight"], expected, rtol=1e-8, atol=1e-10)


def test_regmean_ignores_a_model_in_directions_that_it_never_saw(adapted64, pair):
    """Model 2 saw only the second half of the coordinates, model 1 only the first: each column comes from its owner."""
    generator = torch.Generator().manual_seed(0)
    xs = [inputs(adapted64, generator), inputs(adapted64, generator)]
    for layer in xs[0]:
        half = xs[0][layer].shape[-1] // 2
        xs[0][layer][..., half:], xs[1][layer][..., :half] = 0, 0
    merged = delta(regmean(pair, [grams(x) for x in xs]), adapted64.scaling)
    one, two = (delta(m, adapted64.scaling) for m in pair)
    for layer in xs[0]:
        name, half = f"{layer}.weight", xs[0][layer].shape[-1] // 2
        expected = torch.cat([one[name][..., :half], two[name][..., half:]], dim=-1)
        torch.testing.assert_close(merged[name], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("batch_size", [128, 4])
def test_grams_are_those_of_the_layers_inputs(backbone64, adapted64, federation64, pair, batch_size):
    stack, data = pair[0], federation64.train
    found = layer_grams(adapted64, stack, data, batch_size=batch_size)
    for client in range(3):
        model, x = copy.deepcopy(backbone64), data.client(client)[0]
        assert len(x) == SIZES[client]
        with torch.no_grad():
            for name, change in delta(client_adapter(stack, client), adapted64.scaling).items():
                if "head" not in name:
                    model.get_parameter(name.removeprefix("base_model.model.")).add_(change)
            first, last = model.blocks[0].norm1(model.embed(x)).flatten(0, 1), model.features(x)
        for layer, rows in (("blocks.0.attn.qkv", first), ("head", last)):
            torch.testing.assert_close(found[f"base_model.model.{layer}"][client], rows.T @ rows, rtol=1e-9, atol=1e-10)
    assert not any(module._forward_pre_hooks for module in adapted64.model.modules())  # none is left behind


def test_regmean_of_real_models_runs(adapted64, federation64, pair):
    found = [layer_grams(adapted64, model, federation64.train) for model in pair]
    merged = regmean(pair, found)
    out = adapted64(client_adapter(merged, 0), federation64.test.x[0])
    assert out.isfinite().all()


def test_grams_of_convolutions_are_refused(backbone64, federation64, random_stack):
    base = attach(backbone64, config=LoraConfig(r=2, target_modules=["stem.0"], modules_to_save=["head"]))
    with pytest.raises(ValueError, match="stem.0: RegMean is defined for linear layers"):
        layer_grams(base, random_stack(base, 3, 0), federation64.train)


# TIES and DARE.


def test_ties_by_hand():
    vectors = torch.tensor(
        [
            [4.0, -3.0, 0.5, 2.0, 0.1, -1.0],  # keeps 4, -3, 2
            [-1.0, 5.0, 3.0, 2.5, 0.2, 0.0],  # keeps 5, 3, 2.5
            [3.0, 1.0, -3.5, 0.3, 0.4, -2.0],  # keeps 3, -3.5, -2
        ]
    )
    # Signs of the sums: +7, +2, -0.5, +4.5, 0, -2. Those that agree: {4, 3}, {5}, {-3.5}, {2, 2.5}, none, {-2}.
    expected = torch.tensor([3.5, 5.0, -3.5, 2.25, 0.0, -2.0])
    torch.testing.assert_close(ties(vectors, density=0.5), expected)
    torch.testing.assert_close(ties(vectors, density=0.5, coefficient=0.4), 0.4 * expected)


def test_ties_elects_by_the_sum_and_not_by_a_count():
    """Two small votes against a large one: the large one wins, and it alone is averaged."""
    vectors = torch.tensor([[-1.0, 9.0], [-1.0, 9.0], [5.0, 9.0]])
    torch.testing.assert_close(ties(vectors, density=1.0), torch.tensor([5.0, 9.0]))


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 4), size=st.integers(1, 20), density=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_ties_equals_a_loop_over_coordinates(k, size, density, seed):
    vectors = torch.randn(k, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    kept = max(1, round(density * size))
    rows = [{i: float(v[i]) for i in sorted(range(size), key=lambda i: -abs(v[i]))[:kept]} for v in vectors]
    result = ties(vectors, density)
    for i in range(size):
        values = [row[i] for row in rows if i in row]
        agreeing = [v for v in values if v * sum(values) > 0]
        assert result[i].item() == pytest.approx(sum(agreeing) / len(agreeing) if agreeing else 0.0, rel=1e-9)


def test_ties_of_one_model_at_full_density_is_the_model_and_of_clients_each_their_own(adapted64, pair):
    close(delta(merge_deltas(pair[:1], adapted64.scaling, lambda v: ties(v, 1.0)), adapted64.scaling),
          delta(pair[0], adapted64.scaling))  # fmt: skip
    together = merge_deltas(pair, adapted64.scaling, ties)
    for i in range(3):
        alone = merge_deltas([{n: t[i : i + 1] for n, t in m.items()} for m in pair], adapted64.scaling, ties)
        close(client_adapter(together, i), client_adapter(alone, 0))


def test_merge_deltas_hands_over_the_task_vectors(adapted64, pair):
    seen = []
    merged = merge_deltas(pair, adapted64.scaling, lambda v: seen.append(v) or 0.3 * v[0] - v[1])
    changes = [delta(m, adapted64.scaling) for m in pair]
    assert torch.equal(seen[0], torch.stack([flatten(c) for c in changes]))
    close(delta(merged, adapted64.scaling), of_deltas(adapted64, pair, lambda one, two: 0.3 * one - two))
    close(unflatten(seen[0][1], client_adapter(changes[1], 0)), changes[1])


@pytest.mark.parametrize("density", [0.0, -0.2, 1.2, float("nan")])
def test_an_impossible_density_is_refused(density):
    with pytest.raises(ValueError, match="density must be (above 0|at most 1), not"):
        ties(torch.ones(2, 3), density)


def test_dare_keeps_and_rescales_or_drops():
    vectors = torch.randn(2, 3, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = dare(vectors, drop=0.75, seed=5)
    stays = result != 0
    torch.testing.assert_close(result[stays], 4 * vectors[stays], rtol=1e-12, atol=0)
    assert torch.equal(stays[:, 0], stays[:, 2]) and not torch.equal(stays[0], stays[1])
    share, error = stays[:, 0].double().mean(1), (0.75 * 0.25 / 4000) ** 0.5
    assert ((share - 0.25).abs() < 4.5 * error).all()
    assert torch.equal(result, dare(vectors, drop=0.75, seed=5))
    assert not torch.equal(result, dare(vectors, drop=0.75, seed=6))


def test_dare_keeps_the_expectation():
    vectors = torch.tensor([[1.0, -2.0, 5.0], [0.5, 3.0, 0.0]], dtype=torch.float64)
    draws = torch.stack([dare(vectors, drop=0.6, seed=seed) for seed in range(2000)])
    error = vectors.abs() * (0.6 / 0.4 / 2000) ** 0.5
    assert ((draws.mean(0) - vectors).abs() <= 4.5 * error).all()


def test_dare_without_dropping_changes_nothing():
    vectors = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dare(vectors, drop=0.0), vectors)


@pytest.mark.parametrize("drop", [1.0, -0.1, float("nan")])
def test_an_impossible_share_to_drop_is_refused(drop):
    with pytest.raises(ValueError, match="drop must be (below 1|at least 0), not"):
        dare(torch.ones(2, 3), drop)
