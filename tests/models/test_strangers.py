"""Models, adapters and folders of other people: right, or refused with the true reason."""

import copy
import warnings

import pytest
import torch
import transformers
from conftest import Dense, tiny_vit
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_architectures import CAUSAL, ENCODERS, VOCABULARY, random_network
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.bert.modeling_bert import BertSelfAttention

from potara_lite import (
    Execution,
    Split,
    attach,
    causal_lm,
    encode_answers,
    evaluate,
    linear_layers,
    load_adapter,
    merge_exact,
    repeat_adapter,
    save_adapter,
    train,
)
from potara_lite.federation.text import next_tokens, pad_tokens


class Convolutional(nn.Module):
    def __init__(self, kind=nn.Conv2d, **options):
        super().__init__()
        self.conv = kind(2, 6, 3, padding=1, **options)
        self.norm = nn.BatchNorm2d(6) if kind is nn.Conv2d else nn.Identity()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().flatten(2).mean(2))


def texts():
    generator = torch.Generator().manual_seed(0)
    return pad_tokens([torch.randint(2, VOCABULARY, (k,), generator=generator).tolist() for k in (7, 4, 5)])


def images(*shape):
    return torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))


def text_network(name, attention="eager"):
    options = {"attn_implementation": attention} if attention else {}  # or what the model chooses
    if name in CAUSAL:
        network = random_network(AutoModelForCausalLM, name, **CAUSAL[name], **options)
    else:
        auto = AutoModelForSequenceClassification
        network = random_network(auto, name, num_labels=3, **ENCODERS[name], **options)
    return network.eval()


NETWORKS = {
    "lab ViT": lambda: (tiny_vit(), images(1, 28, 28)),
    "MLP": lambda: (Dense().eval(), images(8)),
    "CNN": lambda: (Convolutional().eval(), images(2, 9, 9)),
    **{
        f"{name}, {attention}": lambda name=name, attention=attention: (text_network(name, attention), texts())
        for name in [*CAUSAL, *ENCODERS]
        for attention in ("eager", None)
        if name != "t5"
    },
}
TARGETS = {"lab ViT": ["qkv", "fc1"], "MLP": ["fc1"], "CNN": ["conv"]}


def output_of(network, x):
    found = network(**x) if isinstance(x, dict) else network(x)
    return getattr(found, "logits", found)


@pytest.fixture(params=NETWORKS)
def stranger(request):
    torch.manual_seed(0)
    network, x = NETWORKS[request.param]()
    targets = TARGETS.get(request.param) or linear_layers(network, last=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield request.param, network, x, targets


@torch.no_grad()
def test_untrained_means_unchanged_and_the_callers_network_stays_as_it_is(stranger):
    name, network, x, targets = stranger
    before, mode = copy.deepcopy(network.state_dict()), network.training
    attention = getattr(getattr(network, "config", None), "_attn_implementation", None)
    expected = output_of(network, x)
    adapted = attach(network, rank=2, targets=targets, head=None)
    assert torch.equal(adapted(adapted.initial, x), expected)
    stack = {n: torch.randn_like(t) for n, t in repeat_adapter(adapted.initial, 1).items()}
    adapted({n: t[0] for n, t in stack.items()}, x)
    after = network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert network.training == mode and all(p.requires_grad for p in network.parameters())
    assert getattr(getattr(network, "config", None), "_attn_implementation", None) == attention
    assert torch.equal(output_of(network, x), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_classifiers_with_a_decoder_run_one_after_another_and_the_warning_says_why(kind):
    """They read the hidden state of the last end-of-text token, which ``vmap`` cannot look for."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, d_model=8, num_labels=3, pad_token_id=0, eos_token_id=1)
    sizes |= dict(d_ff=8, d_kv=4, num_heads=2, num_layers=1) if kind == "T5" else dict(
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8, encoder_attention_heads=2,
        decoder_attention_heads=2, max_position_embeddings=12, forced_eos_token_id=None,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(decoder_start_token_id=0, **sizes)
    network, x = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval(), texts()
    ends = x["attention_mask"].sum(1) - 1
    x["input_ids"][torch.arange(3), ends] = 1
    adapted = attach(network, rank=2, targets=["dense"], head=None)
    with torch.no_grad():
        assert torch.equal(adapted(adapted.initial, x), output_of(network, x))
    clients = [(x, torch.tensor([0, 1, 2])), ({name: tensor[:2] for name, tensor in x.items()}, torch.tensor([2, 1]))]
    options = dict(steps=3, batch_size=2, lr=0.01)
    with pytest.warns(UserWarning, match="one after another: vmap cannot take this backbone .*unique_consecutive"):
        both = train(adapted, repeat_adapter(adapted.initial, 2), Split(clients), **options)
    execution = Execution(vectorize=False)
    alone = train(adapted, repeat_adapter(adapted.initial, 1), Split(clients[:1]), execution=execution, **options)
    torch.testing.assert_close(both.losses[:1], alone.losses, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens", "lm_head"], ["norm"]])
def test_pretrained_modules_to_save_go_on_from_their_values(saved):
    network = text_network("llama")
    network.config.tie_word_embeddings = False
    adapted = attach(network, config=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
    assert torch.equal(adapted(adapted.initial, texts()), output_of(network, texts()))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "mpnet"])
def test_a_new_head_of_any_depth_starts_at_zero_and_learns(name):
    network, x = text_network(name), texts()
    adapted = attach(network, rank=2, targets=linear_layers(network, last=1), head="classifier")
    assert not adapted(adapted.initial, x).any()
    split = Split([(x, torch.tensor([0, 1, 2]))])
    trained = train(adapted, repeat_adapter(adapted.initial, 1), split, steps=200, lr=0.005, batch_size=3)
    moved = [name for name, tensor in trained.adapters.items() if not torch.equal(tensor[0], adapted.initial[name])]
    assert len(moved) == len(adapted.initial) and trained.losses[0, -1] < 0.5 * trained.losses[0, 0]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "orthogonal", False])
def test_a_start_that_changes_the_model_is_refused_and_the_callers_weights_stay(init):
    network = Dense()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=f"init_lora_weights={init!r}: an untrained adapter must leave"):
        attach(network, config=LoraConfig(r=3, target_modules=["fc1"], init_lora_weights=init))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_folder_for_a_rewritten_base_is_refused(init, tmp_path):
    network = Dense()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["fc1"], modules_to_save=["head"], init_lora_weights=init)
    get_peft_model(copy.deepcopy(network), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="belongs to other base weights"):
        load_adapter(attach(network, targets=["fc1"], rank=3, alpha=6), tmp_path)


@pytest.mark.parametrize(
    "network, reason",
    [
        (Convolutional(nn.Conv1d), "conv is a layer of Conv1d"),
        (Convolutional(nn.Conv3d), "conv is a layer of Conv3d"),
        (Convolutional(groups=2), "conv is a convolution with groups=2"),
        (Convolutional(dilation=2), r"conv is a convolution with dilation=\(2, 2\)"),
        (Convolutional(padding_mode="circular"), "conv is a convolution with padding_mode='circular'"),
    ],
)
def test_a_layer_that_is_not_a_sum_is_refused_with_its_name(network, reason):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=reason):
        warnings.simplefilter("ignore")
        attach(network, targets=["conv"], rank=2)


def test_a_norm_by_the_batch_is_refused():
    network = Convolutional()
    network.norm = nn.BatchNorm2d(6, track_running_stats=False)
    with pytest.raises(ValueError, match="norm norms by the statistics of the batch"):
        attach(network, targets=["conv"], rank=2)


def test_an_ambiguous_head_is_refused():
    network = nn.ModuleDict({"a": Dense(), "b": Dense()})
    with pytest.raises(ValueError, match="head 'head' is ambiguous: a.head, b.head"):
        attach(network, targets=["fc1"], rank=2)


def named_twice(name):
    network = Dense()
    network.alias = getattr(network, name)
    return network


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: named_twice("fc1"), "fc1 is also alias: of one module under two names, PEFT adapts only the first"),
        (lambda: named_twice("head"), "head is also alias: of one module"),
        (lambda: fast_path(), "layers.0.linear1: nn.TransformerEncoderLayer reads this weight without calling"),
    ],
)
def test_a_module_that_lora_would_reach_only_at_times_is_refused(make, reason):
    network = make()
    targets = ["fc1"] if isinstance(network, Dense) else ["linear1"]
    with pytest.raises(ValueError, match=reason):
        attach(network, targets=targets, head="head" if isinstance(network, Dense) else None, rank=2)


def fast_path(**options):
    layer = nn.TransformerEncoderLayer(8, 2, 8, **dict(batch_first=True) | options)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def test_a_layer_of_torch_without_a_fast_path_is_taken():
    attach(fast_path(activation=nn.functional.silu), targets=["linear1"], head=None, rank=2)
    attach(fast_path(batch_first=False), targets=["linear1"], head=None, rank=2)


@pytest.mark.filterwarnings("ignore:the clients run one after another")
@pytest.mark.parametrize(
    "forward, reason",
    [
        (lambda net, x: Dense.forward(net, x.add_(1)), "changes its inputs in place"),
        (lambda net, x: net.head(nn.functional.dropout(net.fc1(x))), "draws random numbers in eval mode"),
        (lambda net, x: net.head(nn.functional.linear(x, net.fc1.weight)), "fc1 is adapted, but .* LoRA does nothing"),
        (lambda net, x: Dense.forward(net, x).squeeze(), r"logits of shape \(3,\) for one example"),
        (lambda net, x: Dense.forward(net, x - x.mean(0)), "logits depend on the others of its batch"),
    ],
)
@pytest.mark.parametrize("vectorize", [None, False])
def test_a_network_whose_numbers_would_be_wrong_is_refused_at_the_first_use(forward, reason, vectorize):
    network = Dense().eval()
    network.__class__ = type("Odd", (Dense,), {"forward": forward})
    adapted = attach(network, targets=["fc1"], rank=2)
    split = Split([(images(8), torch.arange(3))])
    before = split.x.clone()
    with pytest.raises(ValueError, match=reason):
        evaluate(adapted, repeat_adapter(adapted.initial, 1), split, execution=Execution(vectorize=vectorize))
    assert torch.equal(split.x, before)


@pytest.mark.parametrize(
    "x, reason",
    [
        (torch.ones(3, 8, dtype=torch.int64), r"split: .* take inputs int64 \(8,\): mat1 and mat2 must have the same"),
        (torch.ones(3, 5), r"split: the backbone does not take inputs float32 \(5,\): mat1 and mat2 shapes"),
    ],
)
def test_inputs_on_which_the_network_fails_are_refused_in_one_line(x, reason):
    adapted = attach(Dense().eval(), targets=["fc1"], rank=2)
    with pytest.raises(ValueError, match=reason):
        evaluate(adapted, repeat_adapter(adapted.initial, 1), Split([(x, torch.arange(3))]))


def test_positions_without_an_embedding_are_refused_also_where_the_first_ones_are_reserved():
    network = text_network("opt")
    longest = network.config.max_position_embeddings
    adapted = attach(network, targets=["q_proj"], head=None, rank=2)
    adapted.check_inputs(pad_tokens([[5] * longest]))
    with pytest.raises(ValueError, match=f"texts of {longest + 1} tokens, the backbone has positions for {longest}"):
        adapted.check_inputs(pad_tokens([[5] * (longest + 1)]))


def test_targets_that_a_configuration_excludes_are_no_mistake():
    network = text_network("llama")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])
    assert {layer.rpartition(".")[2] for layer in attach(network, config=config).scaling} == {"q_proj"}
    config = LoraConfig(r=2, target_modules=["q_proj", "vproj"], exclude_modules=["v_proj"])
    with pytest.raises(ValueError, match=r"targets \['vproj'\] match no layer"):
        attach(network, config=config)


class Wrapped(Dense):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


def test_logits_with_a_name_are_taken_and_others_are_refused_in_words():
    network, x = Dense().eval(), images(8)
    named = Wrapped(lambda logits: {"loss": None, "logits": logits})
    named.load_state_dict(network.state_dict())
    adapted = attach(named.eval(), targets=["fc1"], head=None, rank=2)
    assert torch.equal(adapted(adapted.initial, x), network(x))
    for wrap, what in ((lambda y: (y, y), "a tuple"), (lambda y: {"scores": y}, "a dict with scores")):
        adapted = attach(Wrapped(wrap), targets=["fc1"], head=None, rank=2)
        with pytest.raises(ValueError, match=f"the network returns {what}: wrap it in a module"):
            adapted(adapted.initial, x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_a_mask_may_have_any_type_of_number(dtype):
    x = pad_tokens([[1, 9], [3]]) | {"attention_mask": torch.tensor([[1, 1], [1, 0]]).to(dtype)}
    Split([(x, torch.tensor([1, 0]))])
    Split([(x, torch.tensor([[9, -100], [5, -100]]))])
    empty = x | {"attention_mask": torch.tensor([[1, 1], [0, 0]]).to(dtype)}
    with pytest.raises(ValueError, match="client 0: example 1 is empty"):
        Split([(empty, torch.tensor([[9, -100], [5, -100]]))])


def test_padding_on_the_left_is_refused():
    x = {"input_ids": torch.tensor([[0, 1, 9]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    with pytest.raises(ValueError, match="client 0: example 0 has padding before its tokens: pad on the right"):
        Split([(x, torch.tensor([1]))])


def test_a_target_at_padding_is_refused():
    x = pad_tokens([[5, 6, 7, 8], [9, 3]])
    Split([(x, torch.tensor([[0, 1, 0, 2], [1, 0, -100, -100]]))])
    with pytest.raises(ValueError, match="client 0: example 1 has targets at padding, where they must be -100"):
        Split([(x, torch.tensor([[0, 1, 0, 2], [1, 0, 0, 0]]))])


@pytest.mark.parametrize("ignored", [0, 2])
def test_labels_that_were_not_shifted_are_refused(ignored):
    x = pad_tokens([[5, 6, 7, 8], [9, 9, 9]])
    labels = x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)
    labels[:, :ignored] = -100
    with pytest.raises(ValueError, match="client 0: targets are the inputs themselves, .* see next_tokens"):
        Split([(x, labels)])
    Split([(x, next_tokens(x["input_ids"], x["attention_mask"].bool()))])  # equal to the inputs in the second text


def test_a_small_folder_whose_configuration_names_other_layers_loads(tmp_path):
    network = random_network(AutoModelForCausalLM, "qwen2", num_key_value_heads=1, max_window_layers=70)
    network.save_pretrained(tmp_path)
    assert causal_lm(tmp_path).config.max_window_layers == 70


def test_a_clients_loss_is_the_same_alone_and_beside_a_longer_one():
    adapted = attach(Convolutional().eval(), targets=["conv"], rank=2)
    stack = {n: torch.randn(2, *t.shape) for n, t in adapted.initial.items()}
    small, large = ((torch.rand(n, 2, 9, 9), torch.arange(n) % 3) for n in (4, 10))
    together = evaluate(adapted, stack, Split([small, large]))[0]
    for client, examples in enumerate((small, large)):
        alone = evaluate(adapted, {n: t[client : client + 1] for n, t in stack.items()}, Split([examples]))[0]
        torch.testing.assert_close(alone[0], together[client], rtol=1e-6, atol=0)  # sums of other lengths


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, dict(use_rslora=True), dict(rank_pattern={"fc1": 2}), dict(alpha_pattern={"fc1": 5})]
)
def test_what_is_saved_loads_in_stock_peft_with_the_same_logits(options, tmp_path):
    network, x = Dense().eval(), images(8)
    config = LoraConfig(**dict(r=4, lora_alpha=6, target_modules=["fc1"], modules_to_save=["head"]) | options)
    adapted = attach(network, config=config)
    one, two = ({n: torch.randn_like(t) for n, t in adapted.initial.items()} for _ in range(2))
    merged = merge_exact(one, two, 0.3)
    save_adapter(adapted, merged, tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(network), tmp_path).eval()
    torch.testing.assert_close(stock(x), adapted(merged, x))
    assert all(torch.equal(tensor, merged[name]) for name, tensor in load_adapter(adapted, tmp_path).items())


def test_the_auto_class_of_peft_finds_the_base(tmp_path):
    text_network("llama").save_pretrained(tmp_path / "base")
    adapted = attach(causal_lm(tmp_path / "base"), targets=["q_proj"], head=None, rank=2)
    save_adapter(adapted, adapted.initial, tmp_path / "adapter")
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert "rank 2" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("infix", ["modules_to_save.default.", "default.", "modules_to_save."])
def test_tensors_load_by_the_names_of_older_versions_of_peft(infix, tmp_path):
    adapted = attach(Dense(), targets=["fc1"], rank=2)
    adapter = {name: torch.randn_like(tensor) for name, tensor in adapted.initial.items()}
    save_adapter(adapted, adapter, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("head.", f"head.{infix}"): tensor for name, tensor in load_file(path).items()}, path)
    loaded = load_adapter(adapted, tmp_path)
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in loaded.items())


def test_an_attention_layer_of_ones_own_is_made_explicit_as_what_it_extends():
    class Mine(BertSelfAttention):
        pass

    network = text_network("bert")
    for layer in network.bert.encoder.layer:
        layer.attention.self.__class__ = Mine
    adapted = attach(network, rank=2, targets=linear_layers(network, last=1), head=None)
    assert torch.equal(adapted(adapted.initial, texts()), output_of(network, texts()))


def test_a_pickle_is_refused_with_the_way_out(tmp_path):
    network = Dense()
    adapted = attach(network, targets=["fc1"], rank=2)
    save_adapter(adapted, adapted.initial, tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle, .* safe_serialization=True"):
        load_adapter(adapted, tmp_path)


class Words:
    """A tokenizer of words that begins with 1 and, with ``eos``, ends with 2."""

    eos_token_id = 2

    def __init__(self, eos):
        self.eos = eos

    def __call__(self, text, add_special_tokens=True, **_):
        ids = [10 + sum(map(ord, word)) % 100 for word in text.split()]
        return {"input_ids": [1, *ids, *[2] * self.eos] if add_special_tokens else ids}


def test_what_a_tokenizer_appends_is_no_part_of_the_prompt():
    for eos in (False, True):
        tokenizer = Words(eos)
        for end in (True, False):
            _, targets = encode_answers(tokenizer, ["the cat was"], [" good bad"], end=end)
            expected = tokenizer("good bad", add_special_tokens=False)["input_ids"] + [2] * (eos and end)
            assert targets[targets >= 0].tolist() == expected


def classifier_adapted_by_peft(folder, **options):
    """A BERT and what stock PEFT writes for an adapter of it that changes something."""
    network = text_network("bert")
    config = dict(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], lora_dropout=0.1) | options
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(network), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return network, model


@torch.no_grad()
@pytest.mark.parametrize("as_config", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(use_rslora=True, init_lora_weights="orthogonal"),
        dict(target_modules=r".*\.1\..*\.(query|dense)", rank_pattern={"query": 2}, alpha_pattern={"dense": 3}),
        dict(target_modules="all-linear", init_lora_weights=False),
        dict(layers_to_transform=[1], init_lora_weights="gaussian"),
        dict(init_lora_weights="eva"),
    ],
)
def test_a_slot_for_what_stock_peft_wrote(options, as_config, tmp_path):
    network, stock = classifier_adapted_by_peft(tmp_path, **options)
    adapted = attach(network, config=LoraConfig.from_pretrained(tmp_path) if as_config else tmp_path)
    assert torch.equal(adapted(adapted.initial, texts()), output_of(network, texts()))
    expected = output_of(stock.eval(), texts())
    assert (expected - output_of(network, texts())).abs().max() > 0.01
    adapter = load_adapter(adapted, tmp_path)
    torch.testing.assert_close(adapted(adapter, texts()), expected, rtol=1e-4, atol=1e-5)
    again = save_adapter(adapted, adapter, tmp_path / "again")
    reloaded = PeftModel.from_pretrained(copy.deepcopy(network), again).eval()
    torch.testing.assert_close(output_of(reloaded, texts()), expected, rtol=1e-4, atol=1e-5)
    slot = attach(network, config=again)
    assert slot.config.modules_to_save == ["classifier", "score"]  # as stock PEFT has it, once
    assert {name: t.shape for name, t in slot.initial.items()} == {name: t.shape for name, t in adapter.items()}


def test_a_folders_slot_trains_without_dropout(tmp_path):
    network, _ = classifier_adapted_by_peft(tmp_path)
    adapted = attach(network, config=tmp_path)
    assert adapted.config.lora_dropout == 0
    split = Split.of([(texts(), torch.tensor([0, 1, 2]))])
    start = repeat_adapter(load_adapter(adapted, tmp_path), 1)
    assert train(adapted, start, split, steps=60, lr=0.01, batch_size=3).losses[0, -1] < 0.5


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(lora_dropout=0.1), "lora_dropout=0.1: train without dropout"),
        (dict(modules_to_save=["scores"], lora_dropout=0.0), "head 'scores' is no module"),
        (dict(modules_to_save=["score"], task_type=None, lora_dropout=0.0), "head 'score' is no module"),
        (dict(inference_mode=True, init_lora_weights="pissa"), "belongs to other base weights"),
        (dict(inference_mode=True, use_dora=True), "use_dora=True: with this option"),
        (dict(init_lora_weights="eva"), "init_lora_weights='eva': an untrained adapter must leave"),
        (dict(megatron_config={"a": 1}), "megatron_config=.*with this option"),
        (
            dict(target_modules=["layer.1"]),
            "^targets .*'layer.1'.* cannot be adapted: Target module BertLayer.*LoRA goes",
        ),
    ],
)
def test_what_a_configuration_may_still_not_say(options, reason):
    config = LoraConfig(**dict(task_type="SEQ_CLS", r=2, target_modules=["query"]) | options)
    with pytest.raises(ValueError, match=reason) as caught:
        attach(text_network("bert"), config=config)
    assert len(str(caught.value).splitlines()) == 1


def test_the_callers_configuration_stays_as_it_was(tmp_path):
    network, _ = classifier_adapted_by_peft(tmp_path, init_lora_weights=False)
    config = LoraConfig.from_pretrained(tmp_path)
    before = copy.deepcopy(config.to_dict())
    attach(network, config=config)
    assert config.to_dict() == before


def test_a_model_that_peft_adapted_is_refused_with_a_way_out_that_works(tmp_path):
    network, stock = classifier_adapted_by_peft(tmp_path / "theirs")
    for adapted_already in (stock, stock.base_model.model):
        with pytest.raises(
            ValueError, match=r"backbone must be .* without adapters.*peft_model.unload\(\), config=folder"
        ):
            attach(adapted_already)
    expected = output_of(stock.eval(), texts())
    stock.save_pretrained(tmp_path / "kept")
    adapted = attach(stock.unload(), config=tmp_path / "kept")
    found = adapted(load_adapter(adapted, tmp_path / "kept"), texts())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_folder_of_another_base_has_no_slot(tmp_path):
    classifier_adapted_by_peft(tmp_path)
    with pytest.raises(ValueError, match="cannot be adapted"):
        attach(text_network("llama"), config=tmp_path)
    with pytest.raises(ValueError, match="cannot read .*nowhere"):
        attach(text_network("llama"), config=tmp_path / "nowhere")
