"""Checkers of notebook 06: your own backbone, the declaration of an algorithm, a robust aggregate."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ...adapters.state import Adapter, repeat_adapter
from .checking import check, is_untouched, run


class Output(NamedTuple):
    """What the checker's encoder returns, like the model outputs of transformers."""

    last_hidden_state: Tensor  # (B, tokens, 8)


class Encoder(nn.Module):
    """Tokens ``(B, tokens, 5)`` to an ``Output``, with dropout."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout = nn.Linear(5, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Output:
        return Output(self.dropout(self.layer(x).tanh()))


def check_wrap(function: Callable[[nn.Module, nn.Module], nn.Module]) -> str:
    """Exercise 1: from an encoder that returns an output object, and a head, a module that returns logits ``(B, 3)``.

    The tokens are averaged. To take the first token instead is correct, too, with a remark.

    >>> check_wrap(lambda encoder, head: nn.Sequential(encoder, head))[:36]
    'hint: your module stopped with TypeE'
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, head, x = Encoder().eval(), nn.Linear(8, 3), torch.randn(4, 6, 5)

        def tokens(x: Tensor) -> Tensor:
            return encoder(x).last_hidden_state

        def right(x: Tensor) -> Tensor:
            return head(tokens(x).mean(1))

        mistakes = {
            "every row adds up to 1: that is a softmax; cross-entropy takes logits": lambda x: right(x).softmax(-1),
            "that is a log-softmax; cross-entropy takes logits": lambda x: right(x).log_softmax(-1),
            "the head is missing: these are features": lambda x: tokens(x).mean(1),
            "one row of logits for each token; average the tokens (dim 1) first": lambda x: head(tokens(x)),
            "you average over the batch (dim 0); the tokens are dim 1": lambda x: head(tokens(x).mean(0)),
        }
        first = {"from the first token; the mean of all is as good a choice": lambda x: head(tokens(x)[:, 0])}
        module = run(function, (deepcopy(encoder).train(), head))
        if is_untouched(module):
            return "not attempted"
        error = _module_error(module, x, sum(p.numel() for part in (encoder, head) for p in part.parameters()))
        return f"hint: {error}" if error else check(module, right, [(x,)], mistakes, first)


def _module_error(module: object, x: Tensor, parameters: int) -> str:
    """What is wrong with a module, in words, before its logits are compared; an empty string if nothing is."""
    if isinstance(module, Exception):
        return f"your function stopped with {type(module).__name__}: {module}"
    if not isinstance(module, nn.Module):
        return f"attach wants an nn.Module; yours is a {type(module).__name__}"
    if (found := sum(parameter.numel() for parameter in module.parameters())) != parameters:
        return f"{found} parameters, encoder and head have {parameters}: make both attributes of your module"
    answer = run(module, (x,))
    if isinstance(answer, Exception):
        return f"your module stopped with {type(answer).__name__}: {answer}"
    if isinstance(answer, tuple | dict):
        return f"the module returns a {type(answer).__name__}; logits are one tensor (B, classes)"
    if module.training:
        return "the module is in training mode, where dropout makes its logits random: call .eval() on it"
    return ""


def check_sends(function: Callable[[str], bool]) -> str:
    """Exercise 2: does FedPer send the tensor of this name? The body travels, the head stays.

    >>> check_sends(lambda name: True)
    'hint: everything travels: that is FedIT'
    """
    layer = "base_model.model.encoder.layers.0.mlp.fc1"
    names = [f"{layer}.lora_A.weight", f"{layer}.lora_B.weight", "base_model.model.head.weight"]
    names += ["base_model.model.head.bias", "base_model.model.classifier.weight"]  # not every head is called head
    mistakes = {
        "only the head travels: that is LG-FedAvg, the opposite": lambda name: ".lora_" not in name,
        "everything travels: that is FedIT": lambda name: True,
        "nothing travels: that is local training": lambda name: False,
        "only A travels: that is FedSA-LoRA": lambda name: "lora_A" in name,
        "only B travels; A and B both belong to the body": lambda name: "lora_B" in name,
        "a head may have another name: what is no LoRA factor is trained directly": lambda name: "head" not in name,
    }
    return check(function, lambda name: ".lora_" in name, [(name,) for name in names], mistakes)


def check_trimmed_mean(function: Callable[[Adapter, Tensor], Adapter]) -> str:
    """Exercise 3: from a stack and the clients' sizes, the unweighted mean of every entry without its smallest and its
    largest value, for each client.

    >>> check_trimmed_mean(lambda stack, sizes: repeat_adapter({n: t.mean(0) for n, t in stack.items()}, len(sizes)))
    'hint: nothing is trimmed: that is the plain mean'
    """
    random = torch.Generator().manual_seed(5)
    shapes = {"layer.lora_A.weight": (2, 3), "layer.lora_B.weight": (4, 2), "head.bias": (3,)}
    inputs = []
    for sizes in ([10, 20, 30, 40, 50], [7, 7, 9]):
        stack = {n: torch.randn(len(sizes), *s, generator=random, dtype=torch.float64) for n, s in shapes.items()}
        stack["head.bias"][0] += 100  # one client is off
        inputs.append((stack, torch.tensor(sizes)))

    def each(rule: Callable[[Tensor, Tensor], Tensor], repeat: bool = True) -> Callable[[Adapter, Tensor], Adapter]:
        def function(stack: Adapter, sizes: Tensor) -> Adapter:
            mean = {name: rule(tensor, sizes) for name, tensor in stack.items()}
            return repeat_adapter(mean, len(sizes)) if repeat else mean

        return function

    def trimmed(tensor: Tensor, sizes: Tensor) -> Tensor:
        return tensor.sort(dim=0).values[1:-1].mean(0)

    def weighted(tensor: Tensor, sizes: Tensor) -> Tensor:
        share = (sizes / sizes.sum()).to(tensor)
        return torch.einsum("c,c...->...", share, tensor)

    def whole_clients(tensor: Tensor, sizes: Tensor) -> Tensor:
        order = tensor.flatten(1).mean(1).argsort()
        return tensor[order[1:-1]].mean(0)

    def plain(tensor: Tensor, sizes: Tensor) -> Tensor:
        return tensor.mean(0)

    def late(tensor: Tensor, sizes: Tensor) -> Tensor:
        return tensor.mean(0).flatten().sort().values[1:-1]

    rows = "every client gets a row of its own: repeat_adapter(…, len(sizes))"
    after = "you average first and trim then; sort over the clients (dim 0) before the mean"
    mistakes = {
        f"one row for all; {rows}": each(trimmed, repeat=False),
        f"one row for all, and nothing is trimmed; {rows}": each(plain, repeat=False),
        f"one row for all, the weighted mean, and nothing is trimmed; {rows}": each(weighted, repeat=False),
        "nothing is trimmed: that is the plain mean": each(plain),
        "nothing is trimmed: that is FedAvg": each(weighted),
        after: each(late),
        f"{after}; {rows}": each(late, repeat=False),
        "you leave out whole clients; every entry has its own smallest and largest": each(whole_clients),
        "the first and the last client are left out: sort over the clients first": (
            each(lambda tensor, sizes: tensor[1:-1].mean(0))
        ),
        "that is the median, which trims all but the middle": each(lambda tensor, sizes: tensor.quantile(0.5, 0)),
    }
    return check(function, each(trimmed), inputs, mistakes)


def check_gain(gain: Callable[[pd.DataFrame], float], rows_of: Callable[[float], pd.DataFrame]) -> str:
    """The open task: from the rows of a comparison, how much lower, in nats, the mean test loss of *by loss* is than
    that of ½; and those rows, for a strength of what is each client's own.

    ``gain`` is held to its definition on tables of the checker. ``rows_of`` trains your federations at strength 0 and
    3: both tables need two seeds and the four methods, and F must lose its lead over L as the strength grows.

    >>> check_gain(lambda rows: ..., lambda strength: ...)
    'not attempted'
    """

    def mean(rows: pd.DataFrame, method: str, column: str = "loss") -> float:
        return rows.loc[rows.method == method, column].mean()

    def right(rows: pd.DataFrame) -> float:
        return mean(rows, "uniform") - mean(rows, "by loss")

    mistakes = {
        "that is by loss minus ½; a lower loss is a gain": lambda rows: -right(rows),
        "that is a gain in accuracy; compare the losses": lambda rows: (
            mean(rows, "by loss", "accuracy") - mean(rows, "uniform", "accuracy")
        ),
        "take means over seeds and clients, not sums": lambda rows: right(rows) * (rows.method == "uniform").sum(),
        "that is one seed; take the mean over all": lambda rows: right(rows[rows.seed == 0]),
        "that is what F loses to by loss; compare with ½": lambda rows: mean(rows, "federated") - mean(rows, "by loss"),
        "that is what L loses to by loss; compare with ½": lambda rows: mean(rows, "local") - mean(rows, "by loss"),
    }
    line = check(gain, right, [(_random_rows(seed),) for seed in (0, 1)], mistakes)
    if line != "correct":
        return line
    tables = [run(rows_of, (strength,)) for strength in (0.0, 3.0)]
    if error := next(filter(None, map(_rows_error, tables)), ""):
        return f"hint: {error}"
    leads = [mean(rows, "local") - mean(rows, "federated") for rows in tables]
    if leads[0] == leads[1]:
        return "hint: strength 0 and strength 3 give the same losses: does the strength reach the data?"
    if leads[0] < leads[1]:
        return "hint: F must lose its lead over L as the strength grows: at 0, all hospitals follow one rule"
    return "correct"


METHODS = ("federated", "local", "uniform", "by loss")


def _random_rows(seed: int) -> pd.DataFrame:
    """Rows like those of a comparison of four methods: three seeds of five clients."""
    places = pd.MultiIndex.from_product([METHODS, range(3), range(5)], names=["method", "seed", "client"])
    scores = np.random.default_rng(seed).uniform(size=(len(places), 2))
    return pd.DataFrame(scores, places, ["loss", "accuracy"]).reset_index()


def _rows_error(rows: object) -> str:
    """What is wrong with the rows of a comparison, in words; an empty string if nothing is."""
    if isinstance(rows, Exception):
        return f"rows_of stopped with {type(rows).__name__}: {rows}"
    if not isinstance(rows, pd.DataFrame) or not {"method", "seed", "loss"} <= set(rows):
        return f"rows_of returns what compare returns, a table of rows; yours is a {type(rows).__name__}"
    if missing := [method for method in METHODS if method not in set(rows.method)]:
        return f"the rows of {missing[0]!r} are missing"
    if rows.seed.nunique() < 2:
        return "one seed says little: take two or more"
    return ""
