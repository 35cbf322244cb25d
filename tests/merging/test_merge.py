"""Exact merge, factor merge and compression against dense deltas and PEFT."""

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_vit
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import client_adapter, delta, lora_layers
from potara_lite.merging.merge import combine_adapters, compress, merge_exact, merge_factors

CONFIGS = {
    "alpha differs from r": dict(r=2, lora_alpha=5, target_modules=["qkv", "proj", "fc1", "fc2"]),
    "patterns": dict(
        r=2, lora_alpha=3, target_modules=["qkv", "fc1", "fc2"], rank_pattern={"fc1": 3}, alpha_pattern={"qkv": 7}
    ),
    "convolutions": dict(r=2, lora_alpha=5, target_modules=["stem.0", "stem.2", "stem.4", "fc1"]),
}


@pytest.fixture(scope="module", params=CONFIGS)
def base(request, backbone64):
    """Rank, alpha and kinds of layers vary; the head is trained directly."""
    return attach(backbone64, config=LoraConfig(**CONFIGS[request.param], modules_to_save=["head"]))


def close(one, two):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-12)


def dense_mix(base, federated, local, weight):
    """``w dW_F + (1-w) dW_L`` of dense matrices; ``weight`` maps a delta's name to numbers that broadcast."""
    one, two = delta(federated, base.scaling), delta(local, base.scaling)
    return {name: weight(name) * one[name] + (1 - weight(name)) * two[name] for name in one}


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0, -0.5, 1.7])
def test_exact_merge_is_the_mix_of_the_deltas(base, random_adapter, w):
    one, two = random_adapter(base, 1), random_adapter(base, 2)
    merged = merge_exact(one, two, w) if 0 <= w <= 1 else combine_adapters([one, two], [w, 1 - w])
    close(delta(merged, base.scaling), dense_mix(base, one, two, lambda _: w))


def test_exact_merge_takes_a_weight_per_client(base, random_stack):
    one, two = random_stack(base, 3, 1), random_stack(base, 3, 2)
    w = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def spread(name):
        lead = delta(one, base.scaling)[name].dim() - 1
        return w.view(-1, *[1] * lead)

    merged = merge_exact(one, two, w)
    close(delta(merged, base.scaling), dense_mix(base, one, two, spread))
    for i in range(3):
        alone = merge_exact(client_adapter(one, i), client_adapter(two, i), w[i])
        close(client_adapter(merged, i), alone)


@pytest.mark.parametrize("clients", [None, 3])
def test_exact_merge_takes_a_weight_per_layer(base, random_adapter, random_stack, clients):
    if clients:
        one, two = random_stack(base, clients, 1), random_stack(base, clients, 2)
    else:
        one, two = random_adapter(base, 1), random_adapter(base, 2)
    keys = lora_layers(one) + [name for name in one if ".lora_" not in name]
    rng = np.random.default_rng(0)
    weights = {key: torch.tensor(rng.uniform(size=clients or ())) for key in keys}

    def of(name):
        value = weights[name] if name in weights else weights[name.removesuffix(".weight")]
        return value.view(-1, *[1] * (delta(one, base.scaling)[name].dim() - 1)) if clients else value

    close(delta(merge_exact(one, two, weights), base.scaling), dense_mix(base, one, two, of))


def test_exact_merge_stacks_the_ranks_and_stays_a_lora_adapter(base, random_adapter, federation64):
    merged = merge_exact(random_adapter(base, 1), random_adapter(base, 2), 0.4)
    assert merged.keys() == base.initial.keys()
    for layer in lora_layers(merged):
        rank = base.initial[f"{layer}.lora_A.weight"].shape[0]
        assert merged[f"{layer}.lora_A.weight"].shape[0] == merged[f"{layer}.lora_B.weight"].shape[1] == 2 * rank
    assert base(merged, federation64.test.client(0)[0]).shape == (7, 4)


def test_a_merged_model_at_the_ends_is_the_model_itself(base, random_adapter, federation64):
    one, two, x = random_adapter(base, 1), random_adapter(base, 2), federation64.test.client(0)[0]
    for w, adapter in ((1.0, one), (0.0, two)):
        torch.testing.assert_close(base(merge_exact(one, two, w), x), base(adapter, x), rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module", params=["alpha differs from r", "patterns"])
def peft_pair(request, backbone64, random_adapter):
    """The same two adapters for us and, under two names, in a PEFT model (which merges no directly trained head)."""
    config = LoraConfig(**CONFIGS[request.param])
    base = attach(backbone64, config=config)
    one, two = random_adapter(base, 1), random_adapter(base, 2)
    model = get_peft_model(copy.deepcopy(backbone64), copy.deepcopy(config), adapter_name="federated")
    model.add_adapter("local", copy.deepcopy(config))
    for name, adapter in (("federated", one), ("local", two)):
        set_peft_model_state_dict(model, adapter, adapter_name=name)
    return base, one, two, model


def peft_delta(base, model, name):
    return {f"{layer}.weight": model.get_submodule(layer).get_delta_weight(name) for layer in base.scaling}


def test_exact_merge_equals_pefts_cat(peft_pair):
    base, one, two, model = peft_pair
    close(peft_delta(base, model, "local"), delta(two, base.scaling))
    model.add_weighted_adapter(["federated", "local"], [0.3, 0.7], "cat", combination_type="cat")
    close(delta(merge_exact(one, two, 0.3), base.scaling), peft_delta(base, model, "cat"))


def test_pefts_linear_doubles_identical_adapters(peft_pair):
    """A fact about PEFT, and why we do not use it: ½ and ½ of the same adapter come out as twice the adapter."""
    base, one, _, model = peft_pair
    set_peft_model_state_dict(model, one, adapter_name="local")
    model.add_weighted_adapter(["federated", "local"], [0.5, 0.5], "linear", combination_type="linear")
    single = delta(one, base.scaling)
    for name, tensor in peft_delta(base, model, "linear").items():
        torch.testing.assert_close(tensor, 2 * single[name], rtol=1e-6, atol=1e-6)  # PEFT's weights are float32
    close(delta(merge_exact(one, one, 0.5), base.scaling), single)
    close(delta(merge_factors(one, one, 0.5), base.scaling), single)


@pytest.mark.parametrize("planted", [(0.3**0.5, 0.7**0.5), (0.3, 1.0), (0.7, 0.3)])
def test_other_weights_are_seen(base, random_adapter, planted):
    """Square roots, a forgotten 1 - w, the models swapped: none is the mix of the deltas."""
    one, two = random_adapter(base, 1), random_adapter(base, 2)
    wrong, right = delta(combine_adapters([one, two], planted), base.scaling), dense_mix(base, one, two, lambda _: 0.3)
    assert all((wrong[name] - right[name]).norm() > 0.1 * right[name].norm() for name in right)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 2), rank=st.integers(1, 4), count=st.integers(1, 4),
    clients=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_combine_is_the_weighted_sum_of_any_number_of_deltas(shape, rank, count, clients, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    stacks = [
        {"l.lora_A.weight": random(clients, rank, shape[1]), "l.lora_B.weight": random(clients, shape[0], rank),
         "head.bias": random(clients, 3)}
        for _ in range(count)
    ]  # fmt: skip
    weights = [random(clients) for _ in range(count)]
    merged = delta(combine_adapters(stacks, weights), {"l": 1.5})
    for i in range(clients):
        products = [1.5 * s["l.lora_B.weight"][i] @ s["l.lora_A.weight"][i] for s in stacks]
        dense = sum(float(w[i]) * product for w, product in zip(weights, products))
        torch.testing.assert_close(merged["l.weight"][i], dense, rtol=1e-9, atol=1e-12)
        bias = sum(float(w[i]) * s["head.bias"][i] for w, s in zip(weights, stacks))
        torch.testing.assert_close(merged["head.bias"][i], bias, rtol=1e-9, atol=1e-12)


def test_factor_merge_mixes_a_and_b_by_hand():
    one = {"l.lora_A.weight": torch.tensor([[1.0, 0.0]]), "l.lora_B.weight": torch.tensor([[4.0]])}
    two = {"l.lora_A.weight": torch.tensor([[0.0, 2.0]]), "l.lora_B.weight": torch.tensor([[8.0]])}
    merged = merge_factors(one, two, 0.25)
    assert merged["l.lora_A.weight"].tolist() == [[0.25, 1.5]]
    assert merged["l.lora_B.weight"].tolist() == [[7.0]]
    assert delta(merged, {"l": 1.0})["l.weight"].tolist() == [[1.75, 10.5]]
    assert delta(merge_exact(one, two, 0.25), {"l": 1.0})["l.weight"].tolist() == [[1.0, 12.0]]


def test_factor_merge_differs_from_exact_by_its_cross_terms(base, random_stack):
    """``exact - factor = w (1-w) (B_F - B_L)(A_F - A_L)``, and the head is the same."""
    one, two, w = random_stack(base, 3, 1), random_stack(base, 3, 2), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    exact, factor = (delta(merge(one, two, w), base.scaling) for merge in (merge_exact, merge_factors))
    difference = {name: one[name] - two[name] for name in one}
    cross = delta(difference, base.scaling)
    for name in exact:
        lead = w.view(-1, *[1] * (exact[name].dim() - 1))
        expected = lead * (1 - lead) * cross[name] if ".head." not in name else torch.zeros_like(exact[name])
        torch.testing.assert_close(exact[name] - factor[name], expected, rtol=1e-9, atol=1e-12)


def rebased(adapter, seed):
    """The same model in another basis: ``(B M, M⁻¹ A)``."""
    generator, moved = torch.Generator().manual_seed(seed), dict(adapter)
    for layer in lora_layers(adapter):
        a, b = adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"]
        m = torch.randn(len(a), len(a), generator=generator, dtype=torch.float64) + 2 * torch.eye(len(a))
        moved[f"{layer}.lora_A.weight"] = (torch.linalg.inv(m) @ a.flatten(1)).view_as(a)
        moved[f"{layer}.lora_B.weight"] = (b.flatten(1) @ m).view_as(b)
    return moved


def test_factor_merge_depends_on_the_basis_and_exact_merge_does_not(base, random_adapter):
    one, two = random_adapter(base, 1), random_adapter(base, 2)
    other = rebased(one, seed=0)
    close(delta(other, base.scaling), delta(one, base.scaling))
    close(delta(merge_exact(other, two, 0.5), base.scaling), delta(merge_exact(one, two, 0.5), base.scaling))
    before, after = (delta(merge_factors(a, two, 0.5), base.scaling) for a in (one, other))
    for layer in lora_layers(one):
        moved = (before[f"{layer}.weight"] - after[f"{layer}.weight"]).norm()
        assert moved > 0.1 * before[f"{layer}.weight"].norm()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_compress_is_the_best_of_its_rank_and_its_error_that_of_the_dense_delta(base, random_stack, rank):
    merged = merge_exact(random_stack(base, 3, 1), random_stack(base, 3, 2), torch.tensor([0.2, 0.5, 0.8]))
    small, errors = compress(merged, rank)
    before, after = delta(merged, base.scaling), delta(small, base.scaling)
    assert errors.keys() == set(lora_layers(merged))
    for layer in lora_layers(merged):
        full, low = before[f"{layer}.weight"], after[f"{layer}.weight"]
        dense = (full - low).norm(dim=(1, 2)) / full.norm(dim=(1, 2))
        torch.testing.assert_close(errors[layer], dense, rtol=1e-9, atol=1e-12)
        s = np.linalg.svd(full.numpy(), compute_uv=False)
        best = np.sqrt((s[:, rank:] ** 2).sum(1) / (s**2).sum(1))  # Eckart–Young
        np.testing.assert_allclose(errors[layer], best, rtol=1e-9)
        assert small[f"{layer}.lora_A.weight"].shape[1] == small[f"{layer}.lora_B.weight"].shape[2] == rank
    for name in merged:
        assert ".lora_" in name or torch.equal(small[name], merged[name])


def test_compress_to_the_true_rank_loses_nothing(base, random_adapter):
    """A merge of an adapter with itself has twice the rank on paper and the same rank in truth."""
    one = random_adapter(base, 1)
    doubled = merge_exact(one, rebased(one, seed=3), 0.3)
    for rank in (3, 4):
        small, errors = compress(doubled, rank)
        assert all(float(error) < 1e-12 for error in errors.values())
        close(delta(small, base.scaling), delta(one, base.scaling))


def test_compress_of_one_adapter_is_compress_of_its_row(base, random_stack):
    stack = random_stack(base, 3, 1)
    together, errors = compress(stack, 1)
    alone, error = compress(client_adapter(stack, 1), 1)
    close(delta(client_adapter(together, 1), base.scaling), delta(alone, base.scaling))
    for layer in error:
        assert error[layer].shape == () and errors[layer].shape == (3,)
        torch.testing.assert_close(errors[layer][1], error[layer], rtol=1e-9, atol=0)


def test_compress_keeps_the_dtype_and_survives_an_empty_delta(adapted):
    small, errors = compress(adapted.initial, 1)
    for layer in lora_layers(small):
        assert errors[layer] == 0 and small[f"{layer}.lora_A.weight"].dtype == torch.float32
        assert not small[f"{layer}.lora_B.weight"].any() and small[f"{layer}.lora_A.weight"].isfinite().all()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), k=st.integers(1, 8), seed=st.integers(0, 99), data=st.data())
def test_compress_takes_layers_narrower_than_the_rank(rows, columns, k, seed, data):
    rank = data.draw(st.integers(1, k))
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((k, columns), (rows, k)))
    small, errors = compress({"l.lora_A.weight": a, "l.lora_B.weight": b}, rank)
    assert small["l.lora_A.weight"].shape == (rank, columns) and small["l.lora_B.weight"].shape == (rows, rank)
    error = (small["l.lora_B.weight"] @ small["l.lora_A.weight"] - b @ a).norm() / (b @ a).norm()
    assert float(errors["l"]) == pytest.approx(float(error), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("rank, expected", [(0, "at least 1"), (-1, "at least 1"), (3, "at most 2")])
def test_compress_to_an_impossible_rank_is_refused(adapted, rank, expected):
    with pytest.raises(ValueError, match=f"rank must be {expected}, not {rank}"):
        compress(adapted.initial, rank)


def test_adapters_of_different_bases_are_refused(backbone, adapted):
    for options in (dict(head=None), dict(targets=("fc1",))):
        other = attach(backbone, rank=2, **options).initial
        for merge in (merge_exact, merge_factors):
            with pytest.raises(ValueError, match="local must be of this base"):
                merge(adapted.initial, other, 0.5)
    with pytest.raises(ValueError, match="local must be of this base"):
        merge_factors(adapted.initial, attach(backbone, rank=3).initial, 0.5)


@pytest.mark.parametrize("clients", [0, 3])
def test_an_exact_merge_takes_any_ranks_and_merges_again(backbone, random_adapter, random_stack, clients):
    base, other = attach(backbone, rank=2, alpha=4), attach(backbone, rank=5, alpha=10)
    draw = (lambda a, seed: random_stack(a, clients, seed)) if clients else random_adapter
    one, two, three = draw(base, 0), draw(other, 1), draw(base, 2)
    merged = merge_exact(merge_exact(one, two, 0.3), three, 0.6)
    again = combine_adapters([one, two, three], [0.18, 0.42, 0.4])
    parts = [delta(adapter, base.scaling) for adapter in (one, two, three)]
    for name in parts[0]:
        expected = 0.18 * parts[0][name] + 0.42 * parts[1][name] + 0.4 * parts[2][name]
        torch.testing.assert_close(delta(merged, base.scaling)[name], expected)
        torch.testing.assert_close(delta(again, base.scaling)[name], expected)


def test_weights_that_do_not_fit_are_refused(adapted, random_stack):
    stack = random_stack(adapted, 3, 0)
    for merge in (merge_exact, merge_factors):
        with pytest.raises(ValueError, match="2 weights for a stack of 3 clients"):
            merge(stack, stack, torch.tensor([0.5, 0.5]))
        with pytest.raises(ValueError, match="no mixing weight for"):
            merge(stack, stack, {"base_model.model.blocks.0.fc1": torch.tensor(0.5)})
    with pytest.raises(ValueError, match="2 adapters, 1 weights"):
        combine_adapters([stack, stack], [0.5])


def test_merging_keeps_its_inputs_and_their_dtype(adapted, random_stack):
    one, two = random_stack(adapted, 3, 1), random_stack(adapted, 3, 2)
    before = [{name: tensor.clone() for name, tensor in stack.items()} for stack in (one, two)]
    merged = merge_exact(one, two, torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64))
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    for stack, old in zip((one, two), before):
        assert all(torch.equal(stack[name], old[name]) for name in stack)


def test_float32_merge_agrees_with_float64(adapted, random_stack):
    """Two products and a sum of float32 numbers: an error of a few 1e-7 of the delta's size."""
    one, two = random_stack(adapted, 3, 1), random_stack(adapted, 3, 2)
    double = [{name: tensor.double() for name, tensor in stack.items()} for stack in (one, two)]
    small, exact = (delta(merge_exact(*pair, 0.3), adapted.scaling) for pair in ((one, two), double))
    for name in exact:
        assert (small[name] - exact[name]).abs().max() < 1e-6 * exact[name].abs().max()


def test_the_tiny_backbone_of_the_tests_is_the_same_each_time():
    assert all(torch.equal(a, b) for a, b in zip(tiny_vit().parameters(), tiny_vit().parameters()))
