"""The architectures that people use, as tiny random networks: what holds for BERT and Llama holds for them all."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import peft_model
from peft import PeftModel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from potara_lite import potara
from potara_lite.adapters.files import save_adapter
from potara_lite.adapters.lora import attach, delta_added
from potara_lite.adapters.state import client_adapter, delta, flatten, repeat_adapter
from potara_lite.baselines.merges import layer_grams
from potara_lite.federation.batches import batch_indices
from potara_lite.federation.split import Split
from potara_lite.federation.text import next_tokens, pad_tokens
from potara_lite.merging.merge import merge_exact
from potara_lite.models.frozen_trunk import HIDDEN, linear_layers, replaced_forwards
from potara_lite.models.language import causal_lm, plain_encoder, text_classifier, text_encoder
from potara_lite.models.loss import example_losses, mean_loss
from potara_lite.training.batching import Execution, plan_execution
from potara_lite.training.gradients import directional_derivatives, per_sample_gradients
from potara_lite.training.grouped_lora import GroupedLoRA
from potara_lite.training.train import evaluate, train

VOCABULARY, BLOCKS = 40, 3
SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=BLOCKS, num_attention_heads=2,
             intermediate_size=24, max_position_embeddings=32)  # fmt: skip
GROUPED = dict(num_key_value_heads=1)
CAUSAL = {
    "gpt2": {},
    "opt": dict(ffn_dim=24, word_embed_proj_dim=16),
    "gpt_neox": {},
    "llama": GROUPED,
    "qwen2": GROUPED,
    "gemma": GROUPED | dict(head_dim=8),
    "gemma2": GROUPED | dict(head_dim=8, sliding_window=4),
    "mistral": GROUPED | dict(sliding_window=4),
    "phi": {},
}
ENCODERS = {
    "bert": {},
    "roberta": dict(pad_token_id=1),
    "distilbert": {},
    "albert": dict(embedding_size=12),
    "electra": dict(embedding_size=12),
    "deberta-v2": dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8),
    "mpnet": dict(pad_token_id=1),
    "modernbert": dict(local_attention=4, global_attn_every_n_layers=2)
    | dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"], 0),
    "t5": dict(d_ff=24, d_kv=8),
}
NOT_PACKED = ["deberta-v2", "mpnet", "t5"]  # attention of their own, with relative positions
NO_FROZEN_FEATURES = ["albert", "deberta-v2", "mpnet", "t5"]  # one shared block; blocks that return more than a tensor


@pytest.fixture(autouse=True)
def no_warnings():
    """No client runs after another here, and nothing else warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def random_network(auto, name, **sizes):
    """A network whose weights are all random and of a size that matters."""
    torch.manual_seed(0)
    network = auto.from_config(AutoConfig.for_model(name, **SIZES | sizes))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return network


def examples(clients, of_tokens, seed):
    """Texts of 3 to 9 tokens, each with a label or with its last token as the target."""
    generator, found = torch.Generator().manual_seed(seed), []
    for n in clients:
        lengths = torch.randint(3, 10, (n, 1), generator=generator)
        x = pad_tokens([torch.randint(2, VOCABULARY, (k,), generator=generator).tolist() for k in lengths.flatten()])
        last = torch.arange(x["input_ids"].shape[1]) == lengths - 1
        labels = torch.randint(3, (n,), generator=generator)
        found.append((x, next_tokens(x["input_ids"], last) if of_tokens else labels))
    return Split(found)


@pytest.fixture(scope="module", params=[*CAUSAL, *ENCODERS])
def case(request, tmp_path_factory):
    """A network in a folder, how to load it, and it with LoRA in its last block."""
    name, folder = request.param, tmp_path_factory.mktemp("network")
    is_causal = name in CAUSAL
    auto, sizes = (AutoModelForCausalLM, CAUSAL) if is_causal else (AutoModel, ENCODERS)
    random_network(auto, name, **sizes[name]).save_pretrained(folder)
    load = (lambda: causal_lm(folder)) if is_causal else (lambda: text_encoder(folder, 3))
    network = load()
    options = dict(rank=2, alpha=3, head=None if is_causal else "head")
    return SimpleNamespace(
        name=name, load=load, is_causal=is_causal, options=options,
        adapted=attach(network, targets=linear_layers(network, 1), **options),
    )  # fmt: skip


def logits_of(output):
    return getattr(output, "logits", output)


def test_all_clients_at_once_train_as_one_after_another_with_peft(case):
    adapted, split, steps = case.adapted, examples((5, 9), case.is_causal, seed=1), 50 if case.name == "gpt2" else 10
    start = repeat_adapter(adapted.initial, 2)
    plan = plan_execution(adapted, start, split.x, batch_size=4, backward=True, execution=Execution())
    assert plan.vectorize and isinstance(plan.forward, GroupedLoRA)
    # DeBERTa's projections also read the table of relative positions, which has no client: there it is vmap that runs
    assert plan.forward.matches_vmap(start, split.x) == (case.name != "deberta-v2")
    assert plan.forward.can_pack(start, split.x) == (case.name not in NOT_PACKED)
    trained = train(adapted, start, split, steps=steps, batch_size=4, lr=1e-3)
    for client in range(2):
        model, (x, y) = peft_model(adapted), split.client(client)
        optimizer = torch.optim.AdamW(potara.trained(model).values(), lr=1e-3, weight_decay=0)
        for batch in batch_indices(len(y), 0, steps, 4, (0, client)):
            optimizer.zero_grad()
            mean_loss(logits_of(model(**{name: tensor[batch] for name, tensor in x.items()})), y[batch]).backward()
            optimizer.step()
        weights = potara.get_weights(model)
        for name, tensor in trained.adapters.items():
            torch.testing.assert_close(tensor[client], weights[adapted.parameter_names[name]], rtol=0, atol=1e-5)
    assert (flatten(trained.adapters) - flatten(start)).abs().amax(1).min() > 1e-3 * steps / 2


def test_an_examples_gradient_and_slope_are_those_of_the_example_alone(case, random_stack):
    adapted, split = case.adapted, examples((3, 2), case.is_causal, seed=2)
    stack = random_stack(adapted, 2, seed=1)
    gradients = per_sample_gradients(adapted, stack, split)
    for client, n in enumerate(split.sizes.tolist()):
        x, y = split.client(client)
        for i, length in zip(range(n), x["attention_mask"].sum(1).tolist()):
            model = peft_model(adapted)
            potara.set_weights(model, {adapted.parameter_names[k]: t[client] for k, t in stack.items()})
            alone = {name: tensor[i : i + 1, :length] for name, tensor in x.items()}
            example_losses(logits_of(model(**alone)), y[i : i + 1, :length] if case.is_causal else y[i : i + 1]).sum(
            ).backward()  # fmt: skip
            oracle = torch.cat([model.get_parameter(adapted.parameter_names[k]).grad.flatten() for k in stack])
            torch.testing.assert_close(gradients[client, i], oracle, rtol=1e-4, atol=1e-5)
        assert not gradients[client, n:].any()
    direction = torch.randn(2, gradients.shape[2], generator=torch.Generator().manual_seed(3))
    slope, curvature = directional_derivatives(adapted, stack, direction, split)
    torch.testing.assert_close(slope, torch.einsum("cnp,cp->cn", gradients, direction), rtol=1e-3, atol=1e-4)
    assert (curvature >= 0).all() and curvature.any()


def test_what_is_below_the_adapted_block_is_computed_once(case, random_stack):
    adapted, split = case.adapted, examples((4, 3), case.is_causal, seed=3)
    stack, embedded = random_stack(adapted, 2, seed=2), split.map(adapted.embed)
    plain = evaluate(adapted, stack, split)
    assert (HIDDEN in embedded.x) == (case.name not in NO_FROZEN_FEATURES)
    if HIDDEN in embedded.x:
        assert len(adapted.frozen_blocks) == BLOCKS - 1
        with replaced_forwards(dict.fromkeys(adapted.frozen_blocks, lambda *_, **__: pytest.fail("called again"))):
            again = evaluate(adapted, stack, embedded)
    else:
        again = evaluate(adapted, stack, embedded)
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)


def test_a_merge_gives_the_same_logits_in_stock_peft_and_in_the_frozen_weights(case, random_stack, tmp_path):
    network = case.load()
    adapted = attach(network, targets=linear_layers(network, 1 if case.name == "albert" else 2), **case.options)
    one, two = (random_stack(adapted, 2, seed=seed) for seed in (1, 2))
    merged = client_adapter(merge_exact(one, two, torch.tensor([0.2, 0.6])), 1)
    save_adapter(adapted, merged, tmp_path)
    x, _ = examples((6,), case.is_causal, seed=5).client(0)
    real = x["attention_mask"].bool() if case.is_causal else slice(None)
    with torch.no_grad():
        logits = adapted(merged, x)[real]
        stock = logits_of(PeftModel.from_pretrained(case.load(), tmp_path).eval()(**x))[real]
        change = {
            n: t for n, t in delta(merged, adapted.scaling).items() if n.removesuffix(".weight") in adapted.scaling
        }
        head_alone = {n: merged[n] if n in merged and ".lora_" not in n else torch.zeros_like(t)
                      for n, t in adapted.initial.items()}  # fmt: skip
        with delta_added(adapted, change):
            moved = adapted(head_alone, x)[real]
        before = adapted(head_alone, x)[real]
    torch.testing.assert_close(stock, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved, logits, rtol=1e-4, atol=1e-4)
    assert (before - logits).abs().max() > 0.05  # and the adapter matters


def test_regmean_sees_what_gpt2_layers_read():
    network = random_network(AutoModelForCausalLM, "gpt2").eval()
    adapted = attach(network, rank=2, targets=linear_layers(network, 1), head=None)
    assert {tuple(t.shape) for t in adapted.initial.values()} >= {(2, 16), (48, 2), (2, 64), (64, 2)}
    grams = layer_grams(adapted, repeat_adapter(adapted.initial, 1), examples((3,), True, seed=0))
    assert {tuple(gram.shape) for gram in grams.values()} == {(1, 16, 16), (1, 64, 64)}


def test_what_vmap_cannot_take_trains_one_client_after_another_and_says_why():
    network = random_network(AutoModelForCausalLM, "bloom").eval()
    adapted, split = attach(network, rank=2, targets=linear_layers(network, 1), head=None), examples((3, 4), True, 1)
    with pytest.warns(UserWarning, match="the clients run one after another: vmap cannot take this backbone"):
        trained = train(adapted, repeat_adapter(adapted.initial, 2), split, steps=3, batch_size=2)
    assert trained.losses.isfinite().all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_classifier_of_transformers_handed_straight_to_attach_trains_all_at_once(name, attention, random_stack):
    network = random_network(AutoModelForSequenceClassification, name, num_labels=3, **ENCODERS[name]).eval()
    network.set_attn_implementation(attention)
    if attention == "sdpa":  # PyTorch's own, of its speed where clients are tried out
        warnings.filterwarnings("ignore", "There is a performance drop")
    head = "classifier" if name == "bert" else "classifier.out_proj"
    adapted, split = attach(network, rank=2, targets=linear_layers(network, 1), head=head), examples((5, 9), False, 1)
    start = repeat_adapter(adapted.initial, 2)
    plan = plan_execution(adapted, start, split.x, batch_size=4, backward=True, execution=Execution())
    assert isinstance(plan.forward, GroupedLoRA) and plan.forward.matches_vmap(start, split.x)
    trained = train(adapted, start, split, steps=10, batch_size=4)
    apart = train(adapted, start, split, steps=10, batch_size=4, execution=Execution(vectorize=False))
    torch.testing.assert_close(flatten(trained.adapters), flatten(apart.adapters), rtol=0, atol=1e-5)


def test_a_text_decoder_as_an_encoder_sees_no_later_token():
    """Its mask is its own, so the first token's state is the same whatever follows."""
    encoder = text_classifier(random_network(AutoModel, "gpt2").eval(), 3)
    x = pad_tokens([[5, 6, 7], [5, 9, 3]])
    states = plain_encoder(copy.deepcopy(encoder))(**x).last_hidden_state
    torch.testing.assert_close(states[0, 0], states[1, 0])
    torch.testing.assert_close(encoder.features(**x), states.mean(1))
