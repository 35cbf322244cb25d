"""Notebook 06: its checkers know solutions and mistakes."""

import pytest
import torch
from torch import nn

from potara_lite.adapters.state import repeat_adapter
from potara_lite.baselines.algorithms import FEDPER
from potara_lite.baselines.rounds import fedavg
from potara_lite.course.exercises.your_own import check_gain, check_sends, check_trimmed_mean, check_wrap


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
    (check_gain, lambda strength: 0.01 + 0.01 * strength),
    (check_gain, lambda strength: torch.tensor(0.01 - 0.01 * strength)),
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
    (check_gain, lambda strength: 0.02, "does the strength reach the data"),
    (check_gain, lambda strength: 12 + strength, "take means and not sums"),
    (check_gain, lambda strength: float("nan"), "take means and not sums"),
    (check_gain, lambda strength: [strength, 1], "yours is a list"),
    (check_gain, lambda strength: 1 / 0, "stopped with ZeroDivisionError"),
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
