"""What is taken home: folders that stock PEFT and transformers load, with the same logits."""

import copy
import json
import re

import pytest
import torch
from conftest import tiny_text_encoder, tiny_vit
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5Model,
)

from potara_lite import (
    attach,
    causal_lm,
    client_adapter,
    export_merged,
    linear_layers,
    load_adapter,
    merge_exact,
    save_adapter,
    save_adapters,
    text_encoder,
)
from potara_lite.federation.text import pad_tokens

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, about older names


def texts():
    return pad_tokens([[2, 6, 9, 3], [2, 7, 3], [2, 5, 5, 8, 3]])


def encoder_folder(folder, kind):
    folder.mkdir()
    if kind == "bert":
        return tiny_text_encoder(folder)
    torch.manual_seed(0)
    sizes = dict(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=19)
    T5Model(T5Config(**sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["bert", "t5"])
def encoder(request, tmp_path, random_adapter):
    """A text encoder from disk with a merge of two adapters, and its logits."""
    source = encoder_folder(tmp_path / "base", request.param)
    network = text_encoder(source, classes=3)
    adapted = attach(network, rank=2, alpha=3, targets=linear_layers(network, last=1))
    adapter = merge_exact(random_adapter(adapted, 1), random_adapter(adapted, 2), 0.3)
    logits = adapted(adapter, texts())
    assert logits.std() > 0.05
    return source, adapted, adapter, logits


def run_the_card(folder):
    """What the Python code of the model card gives for the texts."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    names = dict(AutoModel=AutoModel, AutoModelForTextEncoding=AutoModelForTextEncoding, PeftModel=PeftModel)
    names |= dict(torch=torch, load_file=load_file, folder=str(folder), batch=texts())
    with torch.no_grad():
        exec(code, names)
    return names["logits"]


@torch.no_grad()
def test_an_encoders_adapter_loads_where_its_base_came_from(encoder, tmp_path):
    source, adapted, adapter, logits = encoder
    folder = save_adapter(adapted, adapter, tmp_path / "adapter")
    torch.testing.assert_close(run_the_card(folder), logits, rtol=0, atol=1e-5)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == source
    ours = PeftModel.from_pretrained(text_encoder(source, classes=3), folder).eval()
    torch.testing.assert_close(ours(**texts()), logits, rtol=0, atol=1e-5)
    by_itself = AutoPeftModel.from_pretrained(folder).eval()
    assert any("lora_A" in name for name, _ in by_itself.named_parameters())
    with pytest.raises(ValueError, match="arget modules .* not found"):
        other = AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
        PeftModel.from_pretrained(
            nn.ModuleDict({"wrapped": other}) if "t5" in type(other).__module__ else other, folder
        )


@torch.no_grad()
def test_an_encoders_folder_has_a_slot_and_one_of_an_older_version_loads(encoder, tmp_path):
    source, adapted, adapter, logits = encoder
    folder = save_adapter(adapted, adapter, tmp_path / "adapter")
    slot = attach(text_encoder(source, classes=3), config=folder)
    torch.testing.assert_close(slot(load_adapter(slot, folder), texts()), logits, rtol=0, atol=1e-5)
    if "block" not in "".join(adapter):  # those of T5 have not changed
        path, prefix = folder / "adapter_model.safetensors", "base_model.model."
        older = {
            name.replace(prefix, f"{prefix}encoder.", "head" not in name): t for name, t in load_file(path).items()
        }
        assert older.keys() != adapter.keys()
        save_file(older, path)
        loaded = load_adapter(adapted, folder)
        assert all(torch.equal(tensor, adapter[name]) for name, tensor in loaded.items())


def test_an_encoder_exported_with_its_head_needs_no_library_of_ours(encoder, tmp_path):
    source, adapted, adapter, logits = encoder
    folder = export_merged(adapted, adapter, tmp_path / "merged")
    torch.testing.assert_close(run_the_card(folder), logits, rtol=0, atol=1e-5)
    assert "head" not in "".join(load_file(folder / "model.safetensors"))
    torch.testing.assert_close(adapted(adapter, texts()), logits)  # which still works


def llama():
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, intermediate_size=24, tie_word_embeddings=False, **sizes))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16))


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_language_model_is_exported_as_transformers_has_it(make, random_adapter, tmp_path):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    network = causal_lm(tmp_path / "base")
    before = copy.deepcopy(network.state_dict())
    adapted = attach(network, rank=2, alpha=3, targets=linear_layers(network, last=1), head=None)
    adapter = merge_exact(random_adapter(adapted, 1), random_adapter(adapted, 2), 0.3)
    frozen = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    folder = export_merged(adapted, adapter, tmp_path / "merged")
    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(exported(**texts()).logits, adapted(adapter, texts()), rtol=0, atol=1e-5)
    assert (exported(**texts()).logits - network(**texts()).logits).abs().max() > 0.01
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in adapted.model.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    written = (folder / "config.json").read_text()
    assert "potara" not in written and json.loads(written)["use_cache"] is True
    assert f"{type(network).__name__}.from_pretrained(folder)" in (folder / "README.md").read_text()


@torch.no_grad()
def test_a_folders_adapter_is_exported_from_the_base(random_adapter, tmp_path):
    torch.manual_seed(0)
    network = llama().eval()
    adapted = attach(network, rank=2, targets=["q_proj", "down_proj"], head=None)
    adapter = random_adapter(adapted, 1)
    save_adapter(adapted, adapter, tmp_path / "adapter")
    folder = export_merged(network, tmp_path / "adapter", tmp_path / "merged")
    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(exported(**texts()).logits, adapted(adapter, texts()), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="adapter must be a PEFT folder, where base is not an adapted backbone"):
        export_merged(network, adapter, tmp_path / "other")


@torch.no_grad()
def test_any_other_network_is_exported_as_its_state(any_adapted, random_adapter, tmp_path):
    network, adapted, x = any_adapted
    adapter = random_adapter(adapted, 1)
    folder = export_merged(adapted, adapter, tmp_path / "merged")
    fresh = copy.deepcopy(network)
    fresh.load_state_dict(load_file(folder / "model.safetensors"))
    torch.testing.assert_close(fresh(x), adapted(adapter, x), rtol=0, atol=1e-5)
    assert (fresh(x) - network(x)).abs().max() > 0.01 and "load_state_dict" in (folder / "README.md").read_text()


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.tied = self.head  # a second name of one layer

    def forward(self, x):
        return self.tied(self.norm(self.conv(x)).relu().flatten(2).mean(2))


@pytest.fixture(params=["lab ViT", "CNN"])
def any_adapted(request, federation):
    torch.manual_seed(0)
    network = tiny_vit() if request.param == "lab ViT" else Convolutional().eval()
    head = "head" if request.param == "lab ViT" else None
    targets = ["qkv", "fc1"] if request.param == "lab ViT" else ["conv"]
    return network, attach(network, rank=2, targets=targets, head=head), federation.test.client(0)[0]


def test_every_client_takes_its_adapter_home(adapted, random_stack, tmp_path):
    stack = random_stack(adapted, 3, 0)
    for names, expected in ((None, ["client-0", "client-1", "client-2"]), (["Köln", "new york", "7"],) * 2):
        folders = save_adapters(adapted, stack, tmp_path / "all", names)
        assert [folder.name for folder in folders] == expected and {f.parent for f in folders} == {tmp_path / "all"}
        for client, folder in enumerate(folders):
            loaded = load_adapter(adapted, folder)
            assert all(torch.equal(tensor, loaded[n]) for n, tensor in client_adapter(stack, client).items())
            assert "rank 2" in (folder / "README.md").read_text()


def test_no_folder_is_written_where_one_cannot_be(adapted, random_stack, tmp_path):
    stack = random_stack(adapted, 3, 0)
    stack["base_model.model.head.bias"][2, 0] = torch.nan
    with pytest.raises(ValueError, match="'base_model.model.head.bias' is not for client 2"):
        save_adapters(adapted, stack, tmp_path / "all")
    assert not (tmp_path / "all").exists()
