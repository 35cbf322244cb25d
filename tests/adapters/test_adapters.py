"""Adapters: what LoRA computes, and that a saved one is what stock PEFT loads."""

import copy

import pytest
import torch
from conftest import tiny_vit
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from potara_lite.adapters.files import load_adapter, save_adapter
from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import (
    adapter_bytes,
    adapter_from_delta,
    check_same_base,
    client_adapter,
    delta,
    delta_inner_products,
    factor_names,
    factors,
    flatten,
    is_dense_factor,
    lora_layers,
    repeat_adapter,
    stack_adapters,
    unflatten,
)
from potara_lite.merging.merge import compress, merge_exact

CONFIGS = {
    "alpha differs from r": dict(r=2, lora_alpha=5),
    "rank and alpha patterns": dict(r=2, lora_alpha=3, rank_pattern={"fc1": 3}, alpha_pattern={"attn.proj": 7}),
    "both patterns on one layer": dict(r=3, lora_alpha=2, rank_pattern={"fc2": 1}, alpha_pattern={"fc2": 5}),
    "rank-stabilised": dict(r=2, lora_alpha=3, use_rslora=True, rank_pattern={"fc1": 4}, alpha_pattern={"qkv": 1}),
    "convolutions": dict(r=2, lora_alpha=5, target_modules=["stem.2", "stem.4", "fc1"]),
}


def configured(name, backbone, head="head"):
    options = {"target_modules": ["qkv", "proj", "fc1", "fc2"], **CONFIGS[name]}
    return attach(backbone, config=LoraConfig(**options, modules_to_save=[head] if head else None))


@pytest.fixture(scope="module", params=CONFIGS)
def any_config(request, backbone):
    return configured(request.param, backbone)


@pytest.fixture(scope="module", params=CONFIGS)
def any_config64(request, backbone64):
    return configured(request.param, backbone64)


def test_an_adapter_has_the_names_and_shapes_that_peft_gives_it(any_config, backbone):
    oracle = get_peft_model_state_dict(get_peft_model(copy.deepcopy(backbone), copy.deepcopy(any_config.config)))
    assert {n: t.shape for n, t in any_config.initial.items()} == {n: t.shape for n, t in oracle.items()}


def test_with_b_zero_the_adapted_model_equals_the_backbone(any_config, backbone, federation):
    adapter, x = dict(any_config.initial), federation.train.client(1)[0]
    assert all(not t.any() for name, t in adapter.items() if "lora_B" in name)
    assert all(t.any() for name, t in adapter.items() if "lora_A" in name)
    assert torch.equal(any_config(adapter, x), backbone(x))


def test_a_new_head_starts_from_zero(backbone, federation):
    adapted, x = attach(backbone, rank=2), federation.train.client(1)[0]
    assert not adapted(adapted.initial, x).any()
    pretrained = {f"base_model.model.head.{part}": backbone.head.get_parameter(part) for part in ("weight", "bias")}
    assert torch.equal(adapted(adapted.initial | pretrained, x), backbone(x))


def test_the_adapted_model_is_the_backbone_with_its_weights_moved_by_delta(
    any_config64, backbone64, federation64, random_adapter, dense_logits
):
    adapter, x = random_adapter(any_config64, seed=3), federation64.train.client(1)[0]
    oracle = dense_logits(backbone64, adapter, any_config64.scaling, x)
    torch.testing.assert_close(any_config64(adapter, x), oracle, rtol=1e-9, atol=1e-12)


def test_delta_is_what_peft_adds_when_it_merges(any_config64, random_adapter):
    adapter, model = random_adapter(any_config64, seed=3), copy.deepcopy(any_config64.model)
    set_peft_model_state_dict(model, adapter)
    change = delta(adapter, any_config64.scaling)
    assert change.keys() == {f"{layer}.weight" for layer in lora_layers(adapter)} | {
        f"base_model.model.head.{part}" for part in ("weight", "bias")
    }
    for layer in lora_layers(adapter):
        oracle = model.get_submodule(layer).get_delta_weight("default").flatten(1)
        torch.testing.assert_close(change[f"{layer}.weight"], oracle, rtol=1e-9, atol=1e-12)


def test_delta_of_a_stack_is_the_stack_of_deltas(any_config64, random_stack):
    stack = random_stack(any_config64, 3, seed=1)
    together = delta(stack, any_config64.scaling)
    for client in range(3):
        for name, tensor in delta(client_adapter(stack, client), any_config64.scaling).items():
            torch.testing.assert_close(together[name][client], tensor, rtol=1e-12, atol=0)


def test_products_of_deltas_are_those_of_the_dense_matrices(any_config64, random_stack):
    one, two = (random_stack(any_config64, 3, seed=s) for s in (1, 2))
    three = merge_exact(one, two, 0.3)  # another rank
    found = delta_inner_products([one, two, three], any_config64.scaling)
    dense = [
        torch.cat([t.flatten(1) for t in delta(each, any_config64.scaling).values()], 1) for each in (one, two, three)
    ]
    oracle = torch.stack([torch.stack([(p * q).sum(1) for q in dense], -1) for p in dense], -2)
    torch.testing.assert_close(found, oracle, rtol=1e-9, atol=1e-12)


def test_an_adapter_from_its_delta_is_the_same_model_with_one_factor_the_identity(
    any_config64, random_stack, federation64
):
    stack = random_stack(any_config64, 3, seed=3)
    change, scaling = delta(stack, any_config64.scaling), any_config64.scaling
    dense = adapter_from_delta(change, scaling, stack)
    for name, tensor in delta(dense, scaling).items():
        torch.testing.assert_close(tensor, change[name], rtol=1e-9, atol=1e-12)
    for layer in lora_layers(dense):
        matrices = dict(zip(factor_names(layer), factors(dense, layer)))
        (full,), (one,) = ([n for n in matrices if is_dense_factor(n, dense) == kind] for kind in (True, False))
        assert torch.equal(
            matrices[one], torch.eye(matrices[one].shape[1]).to(change[f"{layer}.weight"]).expand(3, -1, -1)
        )
        torch.testing.assert_close(scaling[layer] * matrices[full], change[f"{layer}.weight"], rtol=1e-9, atol=0)
    x = federation64.train.client(1)[0]
    logits = any_config64(client_adapter(stack, 1), x)
    torch.testing.assert_close(any_config64(client_adapter(dense, 1), x), logits, rtol=1e-9, atol=1e-12)
    alone = client_adapter(stack, 2)  # without the client dimension
    for name, tensor in adapter_from_delta(delta(alone, scaling), scaling, alone).items():
        assert torch.equal(tensor, dense[name][2])


def test_the_model_is_a_frozen_copy(backbone):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    adapted = attach(backbone, rank=2)
    assert not any(parameter.requires_grad for parameter in adapted.model.parameters())
    assert not adapted.model.training
    assert backbone.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_calling_with_an_adapter_leaves_the_model_as_it_was(adapted, random_adapter, federation):
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    adapted(random_adapter(adapted, seed=0), federation.train.client(0)[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.model.state_dict().items())


def test_attach_draws_by_its_seed_and_leaves_the_global_generator_alone(backbone):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (attach(backbone, rank=2, seed=seed).initial for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lora_dropout=0.1), "lora_dropout=0.1"),
        (dict(use_dora=True), "use_dora=True"),
        (dict(target_modules=["wings"]), "wings"),
        (dict(lora_bias=True), "lora_bias=True: with this option a layer is not W"),
        (dict(bias="lora_only"), "bias"),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused(backbone, options, message):
    config = LoraConfig(**{"r": 2, "target_modules": ["fc1"], **options})
    with pytest.raises(ValueError, match=message):
        attach(backbone, config=config)


def test_embedding_layers_are_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="0 is a layer of Embedding"):
        attach(model, config=LoraConfig(r=2, target_modules=["0", "1"]))


def test_flatten_and_unflatten_are_inverse_and_keep_the_order(adapted, random_stack):
    stack = random_stack(adapted, 3, seed=0)
    flat = flatten(stack)
    assert flat.shape == (3, 452)
    assert torch.equal(flat[1], torch.cat([tensor[1].reshape(-1) for tensor in stack.values()]))
    back = unflatten(flat, adapted.initial)
    assert list(back) == list(stack) and all(torch.equal(back[name], stack[name]) for name in stack)


def test_stack_repeat_and_pick(adapted, random_adapter):
    adapters = [random_adapter(adapted, seed) for seed in range(3)]
    stack, repeated = stack_adapters(adapters), repeat_adapter(adapters[0], 2)
    for name in adapters[0]:
        assert torch.equal(client_adapter(stack, 2)[name], adapters[2][name])
        assert torch.equal(repeated[name][1], adapters[0][name])
        repeated[name][0] += 1
        assert torch.equal(repeated[name][1], adapters[0][name])  # the rows share no memory


def test_nbytes_counted_by_hand(adapted, adapted64):
    lora = 2 * ((16 + 48) + (16 + 16) + (16 + 32) + (32 + 16))  # rank times (in + out) of qkv, proj, fc1, fc2
    head = 4 * 16 + 4
    assert adapter_bytes(adapted.initial) == 4 * (lora + head) == 1808
    assert adapter_bytes(adapted64.initial) == 8 * (lora + head)
    assert adapter_bytes({name: tensor.bfloat16() for name, tensor in adapted.initial.items()}) == 2 * (lora + head)


@pytest.mark.parametrize("form", ["as it is", "exact merge", "compressed merge"])
def test_a_saved_adapter_reloaded_by_stock_peft_gives_the_same_logits(
    any_config, backbone, federation, random_adapter, dense_logits, tmp_path, form
):
    one, two = (random_adapter(any_config, seed) for seed in (1, 2))
    adapter = one if form == "as it is" else merge_exact(one, two, 0.3)
    if form == "compressed merge":
        adapter, _ = compress(adapter, min(adapter[f"{n}.lora_A.weight"].shape[0] for n in lora_layers(adapter)))
    folder = save_adapter(any_config, adapter, tmp_path / "adapter")
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not [path for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pkl"}]
    reloaded = PeftModel.from_pretrained(tiny_vit(), folder).eval()
    x = federation.test.client(0)[0]
    with torch.no_grad():
        logits = reloaded(x)
        torch.testing.assert_close(logits, any_config(adapter, x), rtol=0, atol=1e-5)
        torch.testing.assert_close(logits, dense_logits(backbone, adapter, any_config.scaling, x), rtol=0, atol=1e-5)
        assert (logits - backbone(x)).abs().max() > 0.1  # and the adapter matters


def test_patterns_on_disk_name_one_layer_even_where_its_name_ends_another(random_adapter, tmp_path):
    """``fc`` at the top and ``inner.fc`` below: PEFT reads the pattern ``fc`` as both."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.inner["fc"](x))

    torch.manual_seed(0)
    model = Two()
    config = LoraConfig(
        r=1, lora_alpha=2, target_modules=["fc"], rank_pattern={"inner.fc": 3}, alpha_pattern={"inner.fc": 4}
    )
    adapted = attach(model, config=config)
    adapter, x = random_adapter(adapted, seed=0, scale=1.0), torch.randn(5, 4)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(model), save_adapter(adapted, adapter, tmp_path / "a"))
    torch.testing.assert_close(reloaded(x), adapted(adapter, x), rtol=0, atol=1e-5)


def test_what_is_saved_is_loaded_bit_by_bit(any_config, random_adapter, tmp_path):
    adapter = merge_exact(random_adapter(any_config, 1), random_adapter(any_config, 2), 0.6)
    loaded = load_adapter(any_config, save_adapter(any_config, adapter, tmp_path))
    assert list(loaded) == list(adapter) and all(torch.equal(loaded[name], adapter[name]) for name in adapter)


def test_what_peft_itself_saved_is_loaded(any_config, random_adapter, tmp_path):
    model, adapter = copy.deepcopy(any_config.model), random_adapter(any_config, 1)
    set_peft_model_state_dict(model, adapter)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(any_config, tmp_path)
    assert loaded.keys() == adapter.keys() and all(torch.equal(loaded[name], adapter[name]) for name in adapter)


def test_a_folder_of_another_base_rank_or_scaling_is_refused(adapted, random_adapter, tmp_path):
    from potara_lite.models.vit import LabViT

    def saved(name, backbone, **options):
        other = attach(backbone, **options)
        return save_adapter(other, random_adapter(other, 0), tmp_path / name)

    fewer = attach(tiny_vit(), rank=2, alpha=3, targets=("qkv", "fc1"))
    with pytest.raises(ValueError, match="4 tensors are of no layer that is adapted here, such as .*proj.lora_A"):
        load_adapter(fewer, saved("layers", tiny_vit(), rank=2, alpha=3, targets=("qkv", "fc1", "fc2", "proj")))
    with pytest.raises(ValueError, match="must be of this base"):
        load_adapter(adapted, saved("shapes", LabViT(classes=4, dim=32, depth=1, heads=2), rank=2, alpha=3))


@pytest.mark.parametrize(
    "options",
    [
        dict(r=2, lora_alpha=4),
        dict(r=3, lora_alpha=2, use_rslora=True),
        dict(r=4, lora_alpha=7, target_modules=["fc1"]),
        dict(r=1, lora_alpha=1, rank_pattern={"fc2": 3}, alpha_pattern={"qkv": 5}),
    ],
)
def test_a_folder_of_another_rank_scaling_or_fewer_layers_has_its_own_logits(
    options, backbone, adapted, federation, random_adapter, tmp_path
):
    """Also where stock PEFT wrote it: B is multiplied, absent layers change nothing, an absent head is the new one."""
    everywhere = dict(target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=["head"])
    other = attach(backbone, config=LoraConfig(**everywhere | options))
    adapter = random_adapter(other, 0)
    x = federation.train.client(1)[0]
    loaded = load_adapter(adapted, save_adapter(other, adapter, tmp_path))
    torch.testing.assert_close(adapted(loaded, x), other(adapter, x), rtol=1e-5, atol=1e-6)


def test_a_folder_for_other_classes_is_refused(adapted, random_adapter, tmp_path):
    from potara_lite.models.vit import LabViT

    other = attach(LabViT(classes=7, dim=16, depth=1, heads=2), rank=2, alpha=3)
    with pytest.raises(ValueError, match="head"):
        load_adapter(adapted, save_adapter(other, random_adapter(other, 0), tmp_path))


def test_adapters_of_different_ranks_or_bases_are_refused(backbone, adapted):
    rank3 = attach(backbone, rank=3).initial
    bare = attach(backbone, rank=2, head=None).initial
    with pytest.raises(ValueError, match=r"adapters\[1\] must be of this base: .* has shape"):
        check_same_base("adapters", [adapted.initial, rank3])
    with pytest.raises(ValueError, match=r"adapters\[2\] must be of this base: 2 tensors are of one only"):
        stack_adapters([adapted.initial, adapted.initial, bare])


def test_the_repr_is_short_and_formats_no_tensor(adapted):
    """``vmap`` takes the repr of what it maps at every call; printing the tensors cost more than the forward pass."""
    assert repr(adapted).startswith("AdaptedBackbone(LabViT, 4 layers, rank 2, ") and len(repr(adapted)) < 100


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (dict(targets=["qkv", "fc3"]), "targets .'fc3'. match no layer"),
        (dict(targets=["qkv", "c1"]), "targets .'c1'. match no layer"),  # an ending of a name is not a name
        (dict(head="haed"), "head 'haed' is no module"),
        (dict(head="ead"), "head 'ead' is no module"),
    ],
)
def test_a_misspelt_target_or_head_is_refused(backbone, names, message):
    with pytest.raises(ValueError, match=message):
        attach(backbone, rank=2, **names)
