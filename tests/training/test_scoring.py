"""Answers scored on a bigram model whose every probability is written down here."""

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import repeat_adapter
from potara_lite.federation.split import Split
from potara_lite.federation.tasks import Question
from potara_lite.federation.text import encode_answers, encode_texts, pad_tokens
from potara_lite.training.scoring import exact_match, greedy_tokens, log_likelihoods, multiple_choice, write_answers

WORDS = ["<end>", "red", "extraordinarily", "light", "what", "?", "\n"]
NEXT = {  # the probability of the word that follows
    "<end>": [1, 0, 0, 0, 0, 0, 0],
    "red": [0.5, 0, 0, 0.4, 0, 0, 0.1],
    "extraordinarily": [0, 0.1, 0, 0.9, 0, 0, 0],
    "light": [0.2, 0, 0, 0, 0.1, 0.7, 0],
    "what": [0, 0.3, 0.2, 0.5, 0, 0, 0],
    "?": [0, 0.6, 0.3, 0.1, 0, 0, 0],
    "\n": [0, 0, 0, 1, 0, 0, 0],
}


class Tokenizer:
    """A token per word."""

    eos_token_id = 0

    def __call__(self, text, truncation=False, max_length=None):
        return {"input_ids": [WORDS.index(word) for word in text.split(" ") if word][:max_length]}

    def decode(self, ids):
        return " ".join(WORDS[i] for i in ids)


class Bigram(nn.Module):
    """The next word depends on the last one alone."""

    def __init__(self):
        super().__init__()
        table = torch.tensor([NEXT[word] for word in WORDS], dtype=torch.float64).clamp_min(1e-30).log()
        self.table = nn.Embedding.from_pretrained(table)
        self.blocks = nn.ModuleList([nn.Linear(7, 7, bias=False).double()])
        nn.init.eye_(self.blocks[0].weight)

    def forward(self, input_ids, attention_mask):
        return self.blocks[0](self.table(input_ids))


@pytest.fixture(scope="module")
def adapted():
    return attach(Bigram(), rank=2, targets=["blocks.0"], head=None)


@pytest.fixture(scope="module")
def stack(adapted):
    return repeat_adapter(adapted.initial, 2)


def test_an_answers_likelihood_is_the_product_over_its_tokens(adapted, stack):
    one = encode_answers(Tokenizer(), ["what", "what ?"], [" light ?", " red light"])
    two = encode_answers(Tokenizer(), ["light"], [" ? extraordinarily light"])
    found = log_likelihoods(adapted, stack, Split([one, two]), batch_size=1)
    expected = [[math.log(0.5 * 0.7), math.log(0.6 * 0.4)], [math.log(0.7 * 0.3 * 0.9), 0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_long_options_win_by_likelihood_per_character_alone(adapted, stack):
    # after "?": red 0.6 in 3 characters, "extraordinarily light" 0.3 * 0.9 in 21, "light" 0.1 in 5
    options = ("red", "extraordinarily light", "light")
    asked = (("what ?", 0), ("what ? ", 1), ("light ?", 1))
    questions = [Question(prompt, options[answer], options) for prompt, answer in asked]
    # after "what": 0.3, 0.2 * 0.9 and 0.5; by tokens, or by the root of the characters, "light" would still win
    others = [questions[1], Question("what", options[1], options)]
    acc, acc_norm = multiple_choice(adapted, stack, [questions, others], Tokenizer())
    assert acc.tolist() == [1 / 3, 0] and acc_norm.tolist() == [2 / 3, 1]


def test_each_client_answers_with_its_adapter(adapted, stack):
    moved = {name: tensor.clone() for name, tensor in stack.items()}
    a, b = moved.values()
    a[1], b[1] = 0, 0
    a[1, 0, 1], b[1, 3, 0] = -1.0, 2.0  # client 1: "light" gains -2 log 0.6 times the scaling of 2, so log 0.1 + 2.04
    acc, _ = multiple_choice(adapted, moved, [[Question("what ?", "light", ("red", "light"))]] * 2, Tokenizer())
    assert acc.tolist() == [0, 1]


def test_greedy_decoding_takes_the_likeliest_word_and_ends(adapted, stack):
    prompts = [pad_tokens([[4], [4, 5]]), pad_tokens([[3, 5]])]  # what; what ?; light ?
    one, two = greedy_tokens(adapted, stack, prompts, 4, end=0, batch_size=1)
    assert one.tolist() == [[3, 5, 1, 0], [1, 0, 0, 0]] and two.tolist() == [[1, 0, 0, 0]]
    assert prompts[0]["attention_mask"].tolist() == [[1, 0], [1, 1]]  # what was given stays as it was
    answers = write_answers(adapted, stack, [["what", "what ?"], ["light"]], Tokenizer(), steps=4)
    assert answers == [["light ? red", "red"], ["? red"]]
    assert write_answers(adapted, stack, [["what"], ["what"]], Tokenizer(), steps=2, until="?")[0] == ["light"]


def test_prompts_and_answers_are_cut_where_the_prompt_ends():
    x, y = encode_answers(Tokenizer(), ["what ? ", "light"], ["red", " ?"])
    assert x["input_ids"].tolist() == [[4, 5, 1], [3, 5, 0]] and x["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert y.tolist() == [[-100, 1, -100], [5, -100, -100]]
    x, y = encode_answers(Tokenizer(), ["what ? what ?"], [" red"], max_length=3)
    assert x["input_ids"].tolist() == [[4, 5, 1]] and y.tolist() == [[-100, 1, -100]]
    assert encode_texts(Tokenizer(), ["what ?", "red"], max_length=1)["input_ids"].tolist() == [[4], [1]]


def test_what_cannot_be_scored_is_refused(adapted, stack):
    for prompts, answers, message in (
        ([" "], ["red"], "text 0 has an empty prompt"),
        (["what", "what"], [" red", " "], "text 1 has an empty answer"),
        (["what"], [" red light ?"], "text 0: an answer of 3 tokens, 1 … 2 are possible"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_answers(Tokenizer(), prompts, answers, max_length=3)
    with pytest.raises(ValueError, match="text 0: its first token is of the answer, too, and nothing before predicts"):
        encode_answers(lambda text, **_: {"input_ids": [len(text)]}, ["what"], ["ever"])
    with pytest.raises(ValueError, match="text 1 is empty"):
        encode_texts(Tokenizer(), ["red", "  "])
    with pytest.raises(ValueError, match="'what' needs two options or more, not .'red'."):
        multiple_choice(adapted, stack, [[Question("what", "red", ("red",))]] * 2, Tokenizer())
    for given, message in (
        (("what", "blue", ("red", "light")), "its answer 'blue' is none of its options"),
        (("what", "red", ("red", " ")), "one of its options is empty"),
        ((" ", "red"), "its prompt or its answer is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            Question(*given)
    for found, expected, message in ((["a"], ["a", "b"], "1 answers for 2"), ([], [], "must be .*at least 1")):
        with pytest.raises(ValueError, match=message):
            exact_match(found, expected)


@pytest.fixture(scope="module")
def llama(random_stack):
    """A random language model that attends, with a random adapter for each of two clients."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, attn_implementation="eager", use_cache=False, initializer_range=1.0,
        eos_token_id=0, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    adapted = attach(model, rank=2, targets=["q_proj", "v_proj", "down_proj"], head=None)
    return adapted, random_stack(adapted, 3, 3, scale=1.0)


def in_transformers(llama, client):
    """The model as transformers runs it, with a client's adapter in it."""
    adapted, stack = llama
    for name, tensor in stack.items():
        adapted.model.get_parameter(adapted.parameter_names[name]).data.copy_(tensor[client])
    return adapted.model


@torch.no_grad()
def test_likelihoods_are_those_of_transformers_own_loss(llama):
    """Each text alone, with labels that transformers shifts by itself; its loss is the mean over them."""
    asked = [[("what ? red", "light light ?"), ("light", "red")], [("what", "extraordinarily ? red light")]]
    asked.append([("red", "what ?"), ("what what what what what what red", "?")])
    encoded = [encode_answers(Tokenizer(), [p for p, _ in own], [f" {a}" for _, a in own]) for own in asked]
    found = log_likelihoods(*llama, Split(encoded))
    for client, own in enumerate(asked):
        model = in_transformers(llama, client)
        for value, (prompt, answer) in zip(found[client], own):
            ids = torch.tensor([Tokenizer()(f"{prompt} {answer}")["input_ids"]])
            labels, length = ids.clone(), len(answer.split())
            labels[:, :-length] = -100
            expected = -model(input_ids=ids, labels=labels).loss.item() * length
            assert math.isclose(value, expected, rel_tol=1e-6)  # transformers computes it in float32


def test_greedy_decoding_is_that_of_transformers_and_reads_no_more_padding_than_text(llama):
    long = "what ? red light light extraordinarily"
    prompts = [["what", "red ? light", "light light light light red", f"{long} {long} {long} {long} {long}"]]
    prompts += [["? red", "what ?"], ["red"]]
    inputs = [pad_tokens([Tokenizer()(prompt)["input_ids"] for prompt in own]) for own in prompts]
    greedy_tokens(*llama, inputs, 12, end=0, batch_size=2)  # measures what a client needs
    seen = []
    embedding = llama[0].model.get_input_embeddings()
    with embedding.register_forward_hook(lambda module, args, output: seen.append(args[0].numel())):
        found = greedy_tokens(*llama, inputs, 12, end=0, batch_size=2)
    assert sum(seen) < 2 * 12 * sum(len(prompt.split()) + 12 for own in prompts for prompt in own)
    for client, own in enumerate(prompts):
        model = in_transformers(llama, client)
        for tokens, prompt in zip(found[client].tolist(), own):
            ids = torch.tensor([Tokenizer()(prompt)["input_ids"]])
            options = dict(max_new_tokens=12, do_sample=False, use_cache=False)
            written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            written = written[0, ids.shape[1] :].tolist()
            assert tokens == written + [0] * (12 - len(written))
    assert len({tuple(row) for own in found for row in own.tolist()}) > 5  # most texts go on differently
