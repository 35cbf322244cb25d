"""Notebook 06: its checkers know solutions and mistakes."""

import pandas as pd
import pytest
import torch
from torch import nn

from potara_lite.adapters.state import repeat_adapter
from potara_lite.baselines.algorithms import FEDPER
from potara_lite.baselines.rounds import fedavg
from potara_lite.course.exercises.your_own import METHODS, check_gain, check_sends, check_trimmed_mean, check_wrap


class Wrapped(nn.Module):
    """Encoder and head, and what ``then`` makes of them on a batch; by default the right thing."""

    def __init__(self, encoder, head, then=lambda encoder, head, x: head(encoder(x).last_hidden_state.mean(1))):
        super().__init__()
        self.encoder, self.head, self.then = encoder, head, then

    def forward(self, x):
        return self.then(self.encoder, self.head, x)


def wrapping(then):
    return lambda encoder, head: Wrapped(encoder, head, then).eval()


def to_all(rule):
    return lambda stack, sizes: repeat_adapter({name: rule(t) for name, t in stack.items()}, len(sizes))


def to_one(rule):
    return lambda stack, sizes: {name: rule(t) for name, t in stack.items()}


def trimmed(t):
    return (t.sum(0) - t.amin(0) - t.amax(0)) / (len(t) - 2)


RIGHT = [
    (check_wrap, lambda encoder, head: Wrapped(encoder, head).eval()),
    (check_sends, FEDPER.is_uploaded),
    (check_sends, lambda name: "lora_A" in name or "lora_B" in name),
    (check_trimmed_mean, to_all(trimmed)),
]
WRONG = [
    (check_wrap, wrapping(lambda encoder, head, x: encoder(x)), "returns a Output"),
    (check_wrap, wrapping(lambda encoder, head, x: (head(encoder(x)[0].mean(1)),)), "returns a tuple"),
    (check_wrap, wrapping(lambda encoder, head, x: {"logits": head(encoder(x)[0].mean(1))}), "returns a dict"),
    (check_wrap, wrapping(lambda encoder, head, x: head(encoder(x)[0].mean(1)).softmax(-1)), "every row adds up to 1"),
    (check_wrap, wrapping(lambda encoder, head, x: head(encoder(x)[0].mean(1)).log_softmax(-1)), "log-softmax"),
    (check_wrap, Wrapped, "training mode"),
    (check_wrap, wrapping(lambda encoder, head, x: encoder(x)[0].mean(1)), "head is missing"),
    (check_wrap, wrapping(lambda encoder, head, x: head(encoder(x)[0])), "for each token"),
    (check_wrap, wrapping(lambda encoder, head, x: head(encoder(x)[0].mean(0))), "over the batch"),
    (check_wrap, wrapping(lambda encoder, head, x: -head(encoder(x)[0].mean(1))), "off by up to"),
    (check_wrap, lambda encoder, head: lambda x: head(encoder(x)[0].mean(1)), "wants an nn.Module"),
    (check_wrap, lambda encoder, head: Wrapped(encoder, lambda x: head(x)).eval(), "make both attributes"),
    (check_wrap, lambda encoder, head: nn.Sequential(encoder, head).eval(), "your module stopped with TypeError"),
    (check_sends, lambda name: ".lora_" not in name, "only the head travels"),
    (check_sends, lambda name: True, "everything travels"),
    (check_sends, lambda name: False, "nothing travels"),
    (check_sends, lambda name: "lora_A" in name, "only A travels"),
    (check_sends, lambda name: "lora_B" in name, "only B travels"),
    (check_sends, lambda name: "head" not in name, "may have another name"),
    (check_sends, lambda name: "bias" in name, "the answer is True"),
    (check_trimmed_mean, to_one(trimmed), "one row for all; every client"),
    (check_trimmed_mean, to_one(lambda t: t.mean(0)), "one row for all, and nothing is trimmed"),
    (check_trimmed_mean, lambda stack, sizes: {n: t[0] for n, t in fedavg(stack, sizes).items()}, "the weighted mean"),
    (check_trimmed_mean, to_all(lambda t: t.mean(0)), "the plain mean"),
    (check_trimmed_mean, fedavg, "that is FedAvg"),
    (check_trimmed_mean, to_all(lambda t: t.mean(0).flatten().sort().values[1:-1]), "average first and trim then"),
    (check_trimmed_mean, to_one(lambda t: t.mean(0).flatten().sort().values[1:-1]), "average first and trim then"),
    (check_trimmed_mean, to_all(lambda t: t[t.flatten(1).mean(1).argsort()[1:-1]].mean(0)), "whole clients"),
    (check_trimmed_mean, to_all(lambda t: t[1:-1].mean(0)), "sort over the clients first"),
    (check_trimmed_mean, to_all(lambda t: t.median(0).values), "the median"),
    (check_trimmed_mean, to_all(lambda t: 2 * trimmed(t)), "entry 'layer.lora_A.weight': off by"),
]


@pytest.mark.parametrize("check, right", RIGHT)
def test_a_solution_is_correct(check, right):
    assert check(right) == "correct"


@pytest.mark.parametrize("check, wrong, hint", WRONG)
def test_a_wrong_answer_gets_a_hint(check, wrong, hint):
    line = check(wrong)
    assert line.startswith("hint: ") and hint in line


def test_the_first_token_is_correct_with_a_remark():
    first = check_wrap(wrapping(lambda encoder, head, x: head(encoder(x)[0][:, 0])))
    assert first.startswith("correct") and "first token" in first
    state = torch.random.get_rng_state()
    check_wrap(Wrapped)
    assert torch.equal(state, torch.random.get_rng_state())  # a checker leaves the reader's random numbers alone


def gain(rows):
    loss = rows.groupby("method").loss.mean()
    return loss["uniform"] - loss["by loss"]


def rows_of(strength, seeds=(0, 1), methods=METHODS):
    """Of federations where L gains on F with the strength."""
    losses = {"federated": 0.6 + 0.1 * strength, "local": 0.8, "uniform": 0.7, "by loss": 0.69}
    rows = [(method, seed, client, losses[method]) for method in methods for seed in seeds for client in range(3)]
    return pd.DataFrame(rows, columns=["method", "seed", "client", "loss"])


def mean_of(method, column="loss"):
    return lambda rows: rows.loc[rows.method == method, column].mean()


def test_the_open_task_knows_a_solution():
    assert check_gain(gain, rows_of) == "correct"
    assert check_gain(lambda rows: mean_of("uniform")(rows) - mean_of("by loss")(rows), rows_of) == "correct"


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (lambda rows: 0.01, "the answer is"),
        (lambda rows: len(rows) * 0.01, "the answer is"),
        (lambda rows: -gain(rows), "a lower loss is a gain"),
        (lambda rows: gain(rows.assign(loss=-rows.accuracy)), "a gain in accuracy"),
        (lambda rows: gain(rows) * 15, "not sums"),
        (lambda rows: gain(rows[rows.seed == 0]), "that is one seed"),
        (lambda rows: mean_of("federated")(rows) - mean_of("by loss")(rows), "what F loses"),
        (lambda rows: mean_of("local")(rows) - mean_of("by loss")(rows), "what L loses"),
        (lambda rows: rows.groupby("client").loss.mean(), "the answer is one number"),
        (lambda rows: 1 / 0, "stopped with ZeroDivisionError"),
    ],
)
def test_the_open_task_refuses_another_quantity(wrong, hint):
    line = check_gain(wrong, rows_of)
    assert line.startswith("hint: ") and hint in line


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (lambda strength: rows_of(1.0), "does the strength reach the data"),
        (lambda strength: rows_of(-strength), "lose its lead"),
        (lambda strength: rows_of(strength, seeds=(0,)), "take two or more"),
        (lambda strength: rows_of(strength, methods=METHODS[1:]), "'federated' are missing"),
        (lambda strength: gain(rows_of(strength)), "returns what compare returns"),
        (lambda strength: rows_of(strength)[["loss"]], "returns what compare returns"),
        (lambda strength: ..., "returns what compare returns"),
        (lambda strength: 1 / 0, "rows_of stopped with ZeroDivisionError"),
    ],
)
def test_the_open_task_refuses_other_rows(wrong, hint):
    line = check_gain(gain, wrong)
    assert line.startswith("hint: ") and hint in line


def test_the_open_task_knows_its_stub():
    assert check_gain(lambda rows: ..., lambda strength: ...) == "not attempted"
