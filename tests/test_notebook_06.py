"""Notebook 06: its checkers know the stub, the solutions and every listed wrong answer."""

import pytest
import torch
from torch import nn

from potara_lite.adapters.state import repeat_adapter
from potara_lite.baselines.algorithms import FEDPER
from potara_lite.baselines.rounds import fedavg
from potara_lite.course.exercises.your_own import check_sends, check_trimmed_mean, check_wrap


def raising(error):
    def function(*given):
        raise error

    return function


@pytest.mark.parametrize("check", [check_wrap, check_sends, check_trimmed_mean])
@pytest.mark.parametrize("stub", [lambda *given: ..., lambda *given: None, raising(NotImplementedError())])
def test_every_checker_knows_an_untouched_stub_and_a_crash(check, stub):
    assert check(stub) == "not attempted"
    assert check(raising(KeyError("x"))).startswith("hint: your function stopped with KeyError")


class Wrapped(nn.Module):
    """Encoder and head, and what ``then`` makes of them on a batch; by default the right thing."""

    def __init__(self, encoder, head, then=lambda encoder, head, x: head(encoder(x).last_hidden_state.mean(1))):
        super().__init__()
        self.encoder, self.head, self.then = encoder, head, then

    def forward(self, x):
        return self.then(self.encoder, self.head, x)


def wrapping(then):
    return lambda encoder, head: Wrapped(encoder, head, then).eval()


def test_a_wrapped_backbone():
    assert check_wrap(lambda encoder, head: Wrapped(encoder, head).eval()) == "correct"
    first = check_wrap(wrapping(lambda encoder, head, x: head(encoder(x)[0][:, 0])))
    assert first.startswith("correct") and "first token" in first
    state = torch.random.get_rng_state()
    check_wrap(Wrapped)
    assert torch.equal(state, torch.random.get_rng_state())  # a checker leaves the reader's random numbers alone


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (wrapping(lambda encoder, head, x: encoder(x)), "returns a Output"),
        (wrapping(lambda encoder, head, x: (head(encoder(x)[0].mean(1)),)), "returns a tuple"),
        (wrapping(lambda encoder, head, x: {"logits": head(encoder(x)[0].mean(1))}), "returns a dict"),
        (wrapping(lambda encoder, head, x: head(encoder(x)[0].mean(1)).softmax(-1)), "every row adds up to 1"),
        (wrapping(lambda encoder, head, x: head(encoder(x)[0].mean(1)).log_softmax(-1)), "log-softmax"),
        (Wrapped, "training mode"),
        (wrapping(lambda encoder, head, x: encoder(x)[0].mean(1)), "head is missing"),
        (wrapping(lambda encoder, head, x: head(encoder(x)[0])), "for each token"),
        (wrapping(lambda encoder, head, x: head(encoder(x)[0].mean(0))), "over the batch"),
        (wrapping(lambda encoder, head, x: -head(encoder(x)[0].mean(1))), "off by up to"),
        (lambda encoder, head: lambda x: head(encoder(x)[0].mean(1)), "wants an nn.Module"),
        (lambda encoder, head: Wrapped(encoder, lambda x: head(x)).eval(), "make both attributes"),
        (lambda encoder, head: nn.Sequential(encoder, head).eval(), "your module stopped with TypeError"),
    ],
)
def test_slips_of_wrapping(wrong, hint):
    line = check_wrap(wrong)
    assert line.startswith("hint: ") and hint in line


@pytest.mark.parametrize("right", [FEDPER.is_uploaded, lambda name: "lora_A" in name or "lora_B" in name])
def test_what_fedper_sends(right):
    assert check_sends(right) == "correct"


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (lambda name: ".lora_" not in name, "only the head travels"),
        (lambda name: True, "everything travels"),
        (lambda name: False, "nothing travels"),
        (lambda name: "lora_A" in name, "only A travels"),
        (lambda name: "lora_B" in name, "only B travels"),
        (lambda name: "head" not in name, "need not be called head"),
        (lambda name: "bias" in name, "the answer is True"),
    ],
)
def test_slips_of_what_fedper_sends(wrong, hint):
    line = check_sends(wrong)
    assert line.startswith("hint: ") and hint in line


def to_all(rule):
    return lambda stack, sizes: repeat_adapter({name: rule(t) for name, t in stack.items()}, len(sizes))


def to_one(rule):
    return lambda stack, sizes: {name: rule(t) for name, t in stack.items()}


def trimmed(t):
    return (t.sum(0) - t.amin(0) - t.amax(0)) / (len(t) - 2)


def test_a_trimmed_mean():
    assert check_trimmed_mean(to_all(trimmed)) == "correct"


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (to_one(trimmed), "one row for all; every client"),
        (to_one(lambda t: t.mean(0)), "one row for all, and nothing is trimmed"),
        (lambda stack, sizes: {n: t[0] for n, t in fedavg(stack, sizes).items()}, "the weighted mean"),
        (to_all(lambda t: t.mean(0)), "the plain mean"),
        (fedavg, "that is FedAvg"),
        (to_all(lambda t: t.mean(0).flatten().sort().values[1:-1]), "average first and trim then"),
        (to_one(lambda t: t.mean(0).flatten().sort().values[1:-1]), "average first and trim then"),
        (to_all(lambda t: t[t.flatten(1).mean(1).argsort()[1:-1]].mean(0)), "whole clients"),
        (to_all(lambda t: t[1:-1].mean(0)), "sort over the clients first"),
        (to_all(lambda t: t.median(0).values), "the median"),
        (to_all(lambda t: 2 * trimmed(t)), "entry 'layer.lora_A.weight': off by"),
    ],
)
def test_slips_of_a_trimmed_mean(wrong, hint):
    line = check_trimmed_mean(wrong)
    assert line.startswith("hint: ") and hint in line
