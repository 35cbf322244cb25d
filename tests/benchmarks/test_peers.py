"""Other people's code on the same tensors, where it is installed: every comparison keeps the bound that it states."""

import copy
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import layers  # noqa: E402
import peers  # noqa: E402

sys.path.remove(str(BENCHMARKS))
COMMITTED = pd.read_csv(BENCHMARKS / "peers.csv")
LAYERS = pd.read_csv(BENCHMARKS / "layers.csv").set_index("network")
HERE = ["peft", "torch", "transformers", "scipy", "dp-accounting", "torchvision", "flwr"]  # in the extra `test`
DIFFERENCES = ["untrained", "adapter", "merged", "saved"]


@pytest.mark.parametrize("peer", peers.PEERS)
def test_each_comparison_keeps_its_bound(peer):
    found = peers.compare([peer])
    if found.version.tolist() == ["not installed"]:
        assert peer not in HERE or peer == "flwr"  # which Python 3.10 does not have
        pytest.skip(f"{peer} is not installed")
    assert (found["largest difference"] <= found.bound).all(), found.to_string()
    assert (found.comparisons > 0).all() and found.bound.max() <= 1e-4
    committed = COMMITTED[COMMITTED.peer == peer].set_index("what")
    assert committed.comparisons.to_dict() == found.set_index("what").comparisons.to_dict()
    assert (committed["largest difference"] <= committed.bound).all()


def test_a_peer_that_is_not_there_gives_a_line(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {"no-such-package": peers.timm})
    [row] = peers.compare(["no-such-package"]).to_dict("records")
    assert (row["version"], row["comparisons"]) == ("not installed", 0) and row["bound"] != row["bound"]


def test_a_difference_is_seen(monkeypatch):
    monkeypatch.setattr(peers, "combine_adapters", lambda adapters, weights: adapters[0])
    found = peers.compare(["peft"]).set_index("what")
    assert found["largest difference"]["combine_adapters = add_weighted_adapter, cat"] > 0.1
    assert peers.gap(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])) == 0.5


@pytest.mark.parametrize("name", ["nn.Linear", "Conv1D of transformers", "nn.Conv2d, 3 × 2, stride 2", "lab ViT",
                                  "torchvision, ResNet-18", "qwen2, language model", "roberta, classifier",
                                  "gpt2, classifier"])  # fmt: skip
def test_what_attach_takes_is_what_stock_peft_does(name):
    row = layers.compared(name)
    assert row["untrained"] == 0 and max(row[column] for column in DIFFERENCES) <= 1e-12 and row["effect"] > 0.05
    assert row["adapted layers"] == LAYERS["adapted layers"][name]


def test_the_committed_table_has_every_network_and_no_difference():
    assert list(LAYERS.index) == list(layers.CASES) and len(LAYERS) >= 30
    assert (LAYERS[DIFFERENCES] <= 1e-12).all(axis=None) and (LAYERS.effect > 0.05).all()
    assert not LAYERS.untrained.any()


def our_words(refusal):
    """A refusal without torch's description of the layer, which newer versions make longer."""
    return re.sub(r"Target module .*? is not supported", "Target module is not supported", refusal)


def test_what_is_refused_is_refused_with_the_committed_sentence():
    committed = pd.read_csv(BENCHMARKS / "refusals.csv").set_index("what")["refused with"].to_dict()
    found = {what: layers.refusal(what) for what in layers.REFUSED}
    assert {what: our_words(said) for what, said in found.items()} == {
        what: our_words(said) for what, said in committed.items()
    }
    assert "taken" not in committed.values()


# What docs/peers.md says of PEFT.

same_peft = pytest.mark.skipif(
    version("peft") != COMMITTED[COMMITTED.peer == "peft"].version.iloc[0], reason="the page is of another PEFT"
)


def two_adapters(**options):
    """A PEFT model with two random adapters, and its first layer."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 8)).double()
    options = dict(r=3, lora_alpha=6, target_modules=["0"]) | options
    model = get_peft_model(network, LoraConfig(**options), adapter_name="first")
    model.add_adapter("second", LoraConfig(**options))
    for name in ("first", "second"):
        state = get_peft_model_state_dict(model, adapter_name=name)
        set_peft_model_state_dict(model, {n: torch.randn_like(t) for n, t in state.items()}, adapter_name=name)
    return model, model.base_model.model[0]


@same_peft
def test_pefts_cat_with_rslora_is_off_by_the_root_of_the_new_rank():
    model, layer = two_adapters(use_rslora=True)
    model.add_weighted_adapter(["first", "second"], [0.3, 0.7], "cat", combination_type="cat")
    total = 0.3 * layer.get_delta_weight("first") + 0.7 * layer.get_delta_weight("second")
    torch.testing.assert_close(layer.get_delta_weight("cat"), 6**0.5 * total)


@same_peft
def test_pefts_linear_doubles_equal_adapters():
    model, layer = two_adapters()
    set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="first"), adapter_name="second")
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "linear", combination_type="linear")
    twice = 2 * layer.get_delta_weight("first")
    torch.testing.assert_close(layer.get_delta_weight("linear"), twice, rtol=1e-5, atol=1e-6)


@same_peft
def test_pefts_ties_trims_each_tensor():
    model, layer = two_adapters(r=8, target_modules=["0", "1"])
    for name in ("first", "second"):  # the second layer's entries are far larger than the first one's
        state = get_peft_model_state_dict(model, adapter_name=name)
        state = {n: 100 * t if ".1." in n else t for n, t in state.items()}
        set_peft_model_state_dict(model, state, adapter_name=name)
    names = ["first", "second"]
    model.add_weighted_adapter(names, [1.0, 1.0], "ties", combination_type="ties_svd", svd_rank=8, density=0.25)
    kept = (layer.get_delta_weight("ties").abs() > 1e-3).double().mean()
    assert 0.25 <= kept <= 0.5  # of the largest quarter of the whole vector it would be none


@same_peft
@pytest.mark.parametrize("pattern", [dict(rank_pattern={"0": 2}), dict(alpha_pattern={"0": 9})])
def test_pefts_hot_swap_ignores_patterns(pattern, tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(4, 5)
    for name in "ab":
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], **pattern)
        model = get_peft_model(copy.deepcopy(base), config)
        for parameter in model.parameters():
            nn.init.normal_(parameter) if parameter.requires_grad else None
        model.save_pretrained(tmp_path / name)
    swapped = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    hotswap_adapter(swapped, tmp_path / "b", "default")
    fresh = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b").eval()
    assert (swapped(x) - fresh(x)).abs().max() > 0.1
