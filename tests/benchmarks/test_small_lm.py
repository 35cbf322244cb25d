"""The script that trains a small language model: how it scores answers, and what its rows say."""

import pandas as pd
import pytest
import torch
from test_results import ROOT, script
from transformers import LlamaConfig, LlamaForCausalLM

from potara_lite import Question, attach, encode_answers, evaluate, linear_layers, multiple_choice, repeat_adapter
from potara_lite.federation.inputs import PADDING
from potara_lite.federation.split import Split
from potara_lite.federation.tasks import read_glosses
from potara_lite.setting import Setting

WORDS = "it is a kind of thing that one sees or eats cat dog oak fir pie tea".split()
KINDS = "animal", "plant", "food"


class Words:
    """A tokenizer with a token per word, new words getting new ones."""

    def __init__(self):
        self.ids = {}

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1 + self.ids.setdefault(word, len(self.ids)) for word in text.split()]}

    def __len__(self):
        return 1 + len(self.ids)


@pytest.fixture(scope="module")
def small_lm():
    return script("small_lm")


@pytest.fixture(scope="module")
def asked():
    """A tiny language model, random adapters of two clients with 5 and 3 questions, and the kinds' tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, intermediate_size=24, attn_implementation="eager",
                         tie_word_embeddings=True, use_cache=False)  # fmt: skip
    network = LlamaForCausalLM(config).eval().double()
    adapted = attach(network, rank=2, targets=linear_layers(network, last=1), head=None, seed=0)
    random = torch.Generator().manual_seed(1)
    adapters = {name: tensor + torch.randn(tensor.shape, generator=random, dtype=tensor.dtype)
                for name, tensor in repeat_adapter(adapted.initial, 2).items()}  # fmt: skip
    tokenizer, questions, examples = Words(), [], []
    kinds = torch.tensor([tokenizer(kind)["input_ids"][0] for kind in KINDS])
    for count in (5, 3):
        draws = [torch.randint(len(WORDS), (4,), generator=random).tolist() for _ in range(count)]
        prompts = [" ".join(WORDS[i] for i in draw[: 2 + n % 3]) + " Kind:" for n, draw in enumerate(draws)]
        right = [sum(draw) % 3 for draw in draws]
        questions.append([Question(prompt, KINDS[answer], tuple(KINDS)) for prompt, answer in zip(prompts, right)])
        examples.append(encode_answers(tokenizer, prompts, [f" {KINDS[answer]}" for answer in right]))
    return adapted, adapters, Split(examples), kinds, questions, tokenizer


def test_answers_are_scored_as_multiple_choice_scores_them(small_lm, asked):
    adapted, adapters, split, kinds, questions, tokenizer = asked
    found = small_lm.answers(adapted, adapters, split, kinds)
    acc, _ = multiple_choice(adapted, adapters, questions, tokenizer)
    torch.testing.assert_close(found["accuracy"], acc, rtol=1e-9, atol=0)
    assert 0 < acc.mean() < 1  # else any scoring would do


def test_the_loss_is_that_of_the_answer_and_exact_that_of_the_vocabulary(small_lm, asked):
    adapted, adapters, split, kinds, *_ = asked
    found = small_lm.answers(adapted, adapters, split, kinds)
    loss, exact = evaluate(adapted, adapters, split)
    torch.testing.assert_close(found["loss"], loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(found["exact"], exact, rtol=1e-9, atol=0)
    whole = small_lm.answers(adapted, adapters, split, torch.arange(40))
    torch.testing.assert_close(whole["accuracy"], whole["exact"], rtol=1e-9, atol=0)


def test_prompts_answers_and_the_most_frequent_one(small_lm):
    tokenizer = Words()
    setting = Setting(clients=3, train_size=12, calibration_size=4, test_size=10, alpha=0.5)
    federation, kinds = small_lm.glosses_with_answers(tokenizer, setting, seed=0)
    names, texts, labels = read_glosses()
    of_text = {tuple(text.split()[: small_lm.WORDS]): names[label] for text, label in zip(texts, labels.tolist())}
    words = {number + 1: word for word, number in tokenizer.ids.items()}
    assert [words[kind] for kind in kinds.tolist()] == names
    frequent = []
    for client in range(3):
        answered = {}
        for part in ("train", "test"):
            x, y = getattr(federation, part).client(client)
            assert ((y != PADDING).sum(1) == 1).all()  # one target: the answer's word
            answered[part] = [words[int(row[row != PADDING])] for row in y]
            for ids, mask, answer in zip(x["input_ids"], x["attention_mask"], answered[part]):
                *gloss, kind, last = (words[int(token)] for token in ids[mask.bool()])
                assert (kind, last) == ("Kind:", answer) and of_text[tuple(gloss)]
        top = max(answered["train"].count(word) for word in names)
        best = {word for word in names if answered["train"].count(word) == top}
        frequent.append({sum(word == one for one in answered["test"]) / 10 for word in best})
    found = small_lm.most_frequent(federation)
    assert all(float(share) in some for share, some in zip(found, frequent))


def test_a_kind_of_two_tokens_is_refused(small_lm):
    class Letters(Words):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": list(map(ord, text.strip()))}

    with pytest.raises(ValueError, match="'act' is not one token"):
        small_lm.glosses_with_answers(Letters(), Setting(), seed=0)


def test_what_the_committed_rows_say(small_lm):
    rows, setting = pd.read_csv(ROOT / "benchmarks" / "small_lm.csv"), small_lm.SETTING
    assert len(read_glosses()[0]) == 24 and set(rows.seed) == {0} and set(rows.client) == set(range(setting.clients))
    table, loss = small_lm.means(rows), rows.pivot(index="client", columns="method", values="loss")
    assert (loss["uniform"] < loss[["federated", "local"]].min(axis=1)).sum() == 3
    assert table.loss["potara-calibrated"] > table.loss["uniform"]
    assert table.accuracy["backbone"] - table.accuracy["most frequent answer"] < 0.05 and table.exact["backbone"] == 0
