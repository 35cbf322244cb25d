"""Frozen networks: what they compute, and what is refused as a checkpoint."""

import hashlib
import json

import pytest
import torch
from conftest import tiny_vit
from safetensors.torch import load_file, save_file
from torch import nn

from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import lora_layers
from potara_lite.files import FileError, data_path
from potara_lite.models import vit
from potara_lite.models.vit import Attention, LabViT, lab_vit, torchvision_vit


def test_the_shipped_checkpoint_loads_and_its_new_head_is_zero():
    model = lab_vit(classes=7)
    assert not model.training
    assert model.head.weight.shape == (7, model.settings["dim"])
    assert not model.head.weight.any() and not model.head.bias.any()
    features = model.features(torch.rand(3, 1, 28, 28))
    assert features.isfinite().all() and features.std(0).min() > 0


def test_lab_vit_takes_every_weight_but_the_head_from_the_file():
    model, weights = lab_vit(), load_file(data_path("lab_vit.safetensors"))
    for name, tensor in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(tensor, weights[name])


def test_attention_is_scaled_dot_product_attention(backbone64):
    attention = backbone64.blocks[0].attn
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    oracle = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(attention.qkv.weight)
        oracle.in_proj_bias.copy_(attention.qkv.bias)
        oracle.out_proj.load_state_dict(attention.proj.state_dict())
        torch.testing.assert_close(attention(x), oracle(x, x, x)[0], rtol=1e-9, atol=1e-12)


def test_a_sample_does_not_see_the_rest_of_its_batch(backbone64, federation64):
    x = federation64.train.client(1)[0]
    with torch.no_grad():
        alone = torch.cat([backbone64(one) for one in x.split(1)])
        torch.testing.assert_close(backbone64(x), alone, rtol=1e-9, atol=1e-12)


def test_lab_vit_has_no_batch_norm_and_no_dropout():
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    assert not [module for module in LabViT().modules() if isinstance(module, kinds)]


@pytest.fixture
def checkpoint(tmp_path):
    """A small checkpoint in the published format, with its checksum beside it."""

    def write(weights=None, settings=None, checksum=True):
        model = tiny_vit()
        weights = model.state_dict() if weights is None else weights
        kept = {name: value for name, value in model.settings.items() if name != "classes"}
        path = tmp_path / "small.safetensors"
        metadata = {"settings": json.dumps({**kept, **(settings or {})})}
        save_file({name: t.contiguous() for name, t in weights.items()}, path, metadata=metadata)
        if checksum:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            path.with_suffix(".sha256").write_text(f"{digest}  {path.name}\n")
        return path

    return write


def test_another_checkpoint_loads(checkpoint):
    model, original = lab_vit(classes=3, checkpoint=checkpoint()), tiny_vit()
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(model.features(x), original.features(x))


def test_a_flipped_byte_is_refused(checkpoint):
    path = checkpoint()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match="small.safetensors is damaged"):
        lab_vit(checkpoint=path)


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_a_truncated_checkpoint_is_refused(checkpoint, length, checksum):
    path = checkpoint(checksum=checksum)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FileError, match="small.safetensors"):
        lab_vit(checkpoint=path)


def test_a_missing_checkpoint_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileError, match="nothing.safetensors"):
        lab_vit(checkpoint=tmp_path / "nothing.safetensors")
    monkeypatch.setattr(vit, "data_path", lambda name="": tmp_path / name)
    with pytest.raises(FileError, match="lab_vit.safetensors"):
        lab_vit()


def test_a_checkpoint_of_another_network_is_refused(checkpoint, tmp_path):
    weights = tiny_vit().state_dict()
    for wrong in (
        checkpoint(settings={"dim": 32}, checksum=False),
        checkpoint(settings={"wings": 2}, checksum=False),
        checkpoint({name: t for name, t in weights.items() if name != "position"}, checksum=False),
        checkpoint({**weights, "extra": torch.zeros(1)}, checksum=False),
        checkpoint({**weights, "position": weights["position"] * torch.nan}, checksum=False),
        checkpoint(settings={"depth": 10**12}, checksum=False),
        checkpoint(settings={"dim": 2**40}, checksum=False),
        checkpoint(settings={"heads": 3}, checksum=False),
    ):
        with pytest.raises(FileError, match="cannot read .*small.safetensors"):
            lab_vit(checkpoint=wrong)
    save_file(weights, tmp_path / "bare.safetensors")  # no settings in the file
    with pytest.raises(FileError, match="bare.safetensors"):
        lab_vit(checkpoint=tmp_path / "bare.safetensors")


@pytest.fixture
def small_torchvision_vit(monkeypatch):
    """``torchvision_vit`` with one narrow block instead of ViT-B/16's twelve wide ones."""
    import torchvision

    def small(name, weights):
        return torchvision.models.VisionTransformer(224, 56, 1, 2, 16, 32)

    monkeypatch.setattr(torchvision.models, "get_model", small)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision_vit(classes=5, weights=None)


def test_a_torchvision_vit_starts_with_a_zero_head(small_torchvision_vit):
    logits = small_torchvision_vit(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 5) and not logits.any()


def test_every_adapted_layer_of_a_torchvision_vit_moves_its_logits(small_torchvision_vit, random_adapter):
    adapted = attach(small_torchvision_vit, rank=2, targets=("mlp.0", "mlp.3"), head="heads.head")
    adapter, x = random_adapter(adapted, seed=1), torch.rand(2, 1, 28, 28)
    logits, layers = adapted(adapter, x), lora_layers(adapter)
    assert [layer.split(".encoder_layer_0.")[1] for layer in layers] == ["mlp.0", "mlp.3"]
    for layer in layers:
        without = adapter | {f"{layer}.lora_B.weight": torch.zeros_like(adapter[f"{layer}.lora_B.weight"])}
        assert (adapted(without, x) - logits).abs().max() > 1e-3, f"LoRA on {layer} has no effect"


def test_lora_that_the_network_would_bypass_is_refused(small_torchvision_vit):
    """``nn.MultiheadAttention`` reads the weight of ``out_proj`` and never calls it: LoRA there has no effect."""
    with pytest.raises(ValueError, match="out_proj"):
        attach(small_torchvision_vit, rank=2, targets=("out_proj", "mlp.0"), head="heads.head")


def test_tokens_embedded_once_give_the_logits_of_the_images():
    model = LabViT(dim=16, depth=2, heads=2, stem=3).eval()
    x = torch.rand(5, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(model(model.embed(x)), model(x), rtol=0, atol=0)


def test_heads_that_do_not_divide_the_width_are_refused():
    for heads in (0, 3, -4):
        with pytest.raises(ValueError, match=f"heads must divide dim 16, which {heads} does not"):
            Attention(16, heads)


def test_loading_draws_nothing_and_so_makes_no_weights_before_the_files_are_known_to_fit():
    before = torch.get_rng_state()
    lab_vit()
    assert torch.equal(torch.get_rng_state(), before)
