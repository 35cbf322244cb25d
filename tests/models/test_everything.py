"""What ``attach`` takes, everything takes; and what a client gets does not depend on who else is there."""

import copy
import warnings

import pytest
import torch
from conftest import Dense, tiny_vit
from peft import PeftModel
from test_architectures import CAUSAL, ENCODERS, VOCABULARY, random_network
from test_strangers import Convolutional
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from potara_lite import (
    Federation,
    Split,
    attach,
    compress,
    evaluate,
    linear_layers,
    load_adapter,
    merge_exact,
    save_adapter,
    train,
)
from potara_lite.adapters.lora import delta_added
from potara_lite.adapters.state import client_adapter, delta, flatten, select_clients
from potara_lite.estimators import ESTIMATORS, estimate_gauss_newton
from potara_lite.federation.text import next_tokens, pad_tokens
from potara_lite.training.gradients import per_sample_gradients

SIZES = (5, 3)
CLASSIFIERS = {"gpt2": 49, "llama": 49, "qwen2": 3, "mistral": 49, "opt": 1, "gemma": 0, "phi": 49, "gpt_neox": 49}


def network_of(auto, name, **options):
    return random_network(auto, name, **options).eval()


def classifier(name, padding):
    """A decoder with a head on the last real token, which it finds by the padding of its configuration."""
    return network_of(
        AutoModelForSequenceClassification,
        name,
        **CAUSAL[name] | dict(num_labels=3, vocab_size=50, pad_token_id=padding),
    )


def torchvision_network(name):
    from torchvision import models

    torch.manual_seed(0)
    if name == "vit":
        network = models.VisionTransformer(28, 7, 1, 2, 16, 32, num_classes=3)
        nn.init.normal_(network.heads.head.weight, std=0.2)
        return network.eval()
    network = models.resnet18(num_classes=3)
    return network.eval()


NETWORKS = {
    "lab ViT": lambda: (tiny_vit(), ["qkv", "fc1"]),
    "MLP": lambda: (Dense().eval(), ["fc1"]),
    "CNN": lambda: (Convolutional().eval(), ["conv"]),
    "torchvision ViT": lambda: (torchvision_network("vit"), ["mlp.0", "mlp.3"]),
    "torchvision ResNet": lambda: (torchvision_network("resnet"), ["layer4.1.conv2"]),
    **{name: lambda name=name: (network_of(AutoModelForCausalLM, name, **CAUSAL[name]), None) for name in CAUSAL},
    **{
        name: lambda name=name: (
            network_of(AutoModelForSequenceClassification, name, num_labels=3, **ENCODERS[name]),
            None,
        )
        for name in ENCODERS
        if name != "t5"  # its classifier wants one end token in each text, at the place that it looks at
    },
    **{f"{name} classifier": lambda n=name, p=p: (classifier(n, p), None) for name, p in CLASSIFIERS.items()},
}
SHAPES = {"lab ViT": (1, 28, 28), "MLP": (8,), "CNN": (2, 9, 9)}
SHAPES |= {"torchvision ViT": (3, 28, 28), "torchvision ResNet": (3, 32, 32)}


def examples_of(name, seed):
    """Two clients, of which the second has the longer texts."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n, longest in zip(SIZES, (7, 12)):
        y = torch.randint(3, (n,), generator=generator)
        if name in SHAPES:
            found.append((torch.rand(n, *SHAPES[name], generator=generator), y))
            continue
        lengths = torch.randint(3, longest + 1, (n,), generator=generator).tolist()
        x = pad_tokens([torch.randint(4, VOCABULARY, (k,), generator=generator).tolist() for k in lengths])
        is_last = torch.arange(x["input_ids"].shape[1]) == torch.tensor(lengths).unsqueeze(1) - 1
        found.append((x, next_tokens(x["input_ids"], is_last) if name in CAUSAL else y))
    return Split(found)


@pytest.fixture(params=NETWORKS, scope="module")
def stranger(request):
    """A network, its two clients and two stacks of adapters that are far from the start."""
    network, targets = NETWORKS[request.param]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = attach(network, rank=2, alpha=3, targets=targets or linear_layers(network, last=1), head=None)
    generator = torch.Generator().manual_seed(3)
    stacks = [
        {name: 0.2 * torch.randn(2, *tensor.shape, generator=generator) for name, tensor in adapted.initial.items()}
        for _ in range(2)
    ]
    splits = [examples_of(request.param, seed) for seed in range(3)]
    classes = VOCABULARY if request.param in CAUSAL else 3 + (request.param == "lab ViT")
    yield network, adapted, Federation(*splits, classes), stacks


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def output_of(network, x):
    found = network(**x) if isinstance(x, dict) else network(x)
    return getattr(found, "logits", found)


def close(found, expected, scale=1.0):
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5 * scale)


def test_a_client_has_the_same_loss_gradients_and_training_alone_and_in_company(stranger):
    _, adapted, federation, (_, stack) = stranger
    split = federation.train
    losses, _ = evaluate(adapted, stack, split)
    gradients = per_sample_gradients(adapted, stack, split)
    trained = flatten(train(adapted, stack, split, steps=2, batch_size=3, lr=1e-3).adapters)
    for row, n in enumerate(SIZES):
        one = select_clients(stack, slice(row, row + 1))
        alone = split.rows([row])
        close(evaluate(adapted, one, alone)[0], losses[row : row + 1])
        x, y = split.client(row)
        few = [Split([(pick(x, i), pick(x, i, y))]) for i in range(n)]  # each example without any other one
        one_by_one = torch.stack([evaluate(adapted, one, example)[0] for example in few])
        close(one_by_one.mean(0), losses[row : row + 1])
        found = per_sample_gradients(adapted, one, alone)
        close(found[0], gradients[row, :n], scale=float(gradients.abs().max()))
        again = flatten(train(adapted, one, alone, steps=2, batch_size=3, lr=1e-3).adapters)
        close(again[0], trained[row], scale=10)


def pick(x, i, y=None):
    """One example's inputs, or its labels; of a text without what belongs to its padding."""
    length = int(x["attention_mask"][i].sum()) if isinstance(x, dict) else 1
    if y is not None:
        return y[i : i + 1, :length] if y.dim() > 1 else y[i : i + 1]
    return {name: tensor[i : i + 1, :length] for name, tensor in x.items()} if isinstance(x, dict) else x[i : i + 1]


@torch.no_grad()
def test_delta_merges_and_compression_are_sums_of_weights(stranger):
    _, adapted, federation, stacks = stranger
    x, _ = federation.test.client(0)
    federated, local = (client_adapter(stack, 0) for stack in stacks)
    merged = client_adapter(merge_exact(*stacks, 0.3), 0)
    expected = {
        name: 0.3 * value + 0.7 * delta(local, adapted.scaling)[name]
        for name, value in delta(federated, adapted.scaling).items()
    }
    for name, value in delta(merged, adapted.scaling).items():
        close(value, expected[name])
    logits = adapted(merged, x)
    with delta_added(adapted, expected):
        close(adapted({name: 0 * tensor for name, tensor in merged.items()}, x), logits, scale=10)
    same, _ = compress(merged, 4)
    close(adapted(same, x), logits, scale=10)


@torch.no_grad()
def test_what_is_saved_is_the_model_in_stock_peft_and_here(stranger, tmp_path):
    network, adapted, federation, stacks = stranger
    x, _ = federation.test.client(1)
    adapter = client_adapter(stacks[0], 0)
    save_adapter(adapted, adapter, tmp_path)
    loaded = load_adapter(adapted, tmp_path)
    assert loaded.keys() == adapter.keys() and all(torch.equal(loaded[name], adapter[name]) for name in adapter)
    stock = PeftModel.from_pretrained(copy.deepcopy(network), tmp_path).eval()
    close(adapted(adapter, x), output_of(stock, adapted.with_padding(x)), scale=10)


def test_every_estimator_takes_it(stranger):
    _, adapted, federation, (federated, local) = stranger
    estimators = {**ESTIMATORS, "gauss-newton": lambda *args: estimate_gauss_newton(*args[:3], args[3].calibration)}
    for name, estimator in estimators.items():
        weight = estimator(adapted, federated, local, federation).client_weight
        assert weight.shape == (2,) and ((weight >= 0) & (weight <= 1)).all(), name


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_that_looks_for_the_last_token_finds_it_behind_any_padding(name):
    network = classifier(name, CLASSIFIERS[name])
    adapted = attach(network, targets=linear_layers(network, last=1), rank=2, head=None)
    x, _ = examples_of(f"{name} classifier", 0).client(1)
    with torch.no_grad():
        expected = torch.cat([network(**pick(x, i)).logits for i in range(SIZES[1])])
        for filler in (0, 5):
            hidden = x["attention_mask"] == 0
            padded = {**x, "input_ids": x["input_ids"].masked_fill(hidden, filler)}
            close(adapted(adapted.initial, padded), expected)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_without_a_padding_token_is_refused_with_the_way_out(name):
    network = classifier(name, None)
    adapted = attach(network, targets=linear_layers(network, last=1), rank=2, head=None)
    x, _ = examples_of("a classifier", 0).client(0)
    with pytest.raises(ValueError, match="finds the end of a text by config.pad_token_id, which is None: set it"):
        evaluate(adapted, {n: t.unsqueeze(0) for n, t in adapted.initial.items()}, Split([(x, torch.zeros(5).long())]))


class MeanOfTokens(nn.Module):
    """It forgets the mask: padding counts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask):
        return self.head(self.fc(self.embedding(input_ids)).tanh().mean(1))


def xlnet():
    torch.manual_seed(0)
    return XLNetForSequenceClassification(
        XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=24, num_labels=3)
    ).eval()


@pytest.mark.parametrize("make, target", [(MeanOfTokens, "fc"), (xlnet, "layer_1")])
def test_a_backbone_in_which_padding_counts_is_refused(make, target):
    adapted = attach(make().eval(), targets=[target], rank=2, head=None)
    stack = {name: torch.stack([tensor] * 2) for name, tensor in adapted.initial.items()}
    for use in (evaluate, per_sample_gradients, lambda *args: train(*args, steps=1)):
        with pytest.raises(ValueError, match="logits depend on the padding behind it or the other texts"):
            use(adapted, stack, examples_of("any", 0))
