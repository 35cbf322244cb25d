"""How good a language model's answers are: options by their likelihood, and answers written word by word.

Multiple choice follows lm-evaluation-harness: an option's score is the log-likelihood of its tokens after the prompt
and a space, summed (``acc``), or that over its number of characters (``acc_norm``), so that long options are not at a
disadvantage. Classification is multiple choice with the labels' names as options. Everything is done for the stack of
all clients, each with questions of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, door
from ..checks import kind, named, one_or_several, options_of, several, text, unchecked, whole
from ..federation.inputs import MASK, PADDING, Inputs, map_inputs
from ..federation.split import Split
from ..federation.tasks import Question
from ..federation.text import encode_answers, pad_tokens
from .batching import Execution
from .loss import checked_logits
from .train import batched_logits


@torch.no_grad()
@door()
def log_likelihoods(
    adapted: AdaptedBackbone,
    adapters: Adapter,
    split: Split,
    *,
    batch_size: int = 32,
    execution: Execution = Execution(),
) -> Tensor:
    """The log-likelihood (nats) of each example's targets, all its tokens together, ``(C, N)``; 0 for padding."""
    result = torch.zeros(split.y.shape[:2], dtype=torch.float64)
    for rows, columns, logits, y in batched_logits(
        adapted, adapters, split, batch_size=batch_size, execution=execution
    ):
        losses = F.cross_entropy(checked_logits(logits, y).flatten(0, -2), y.flatten(), reduction="none")
        result[rows, columns] = -losses.view(y.shape).double().sum(-1).cpu()
    return result


@door(questions=several(several(kind("Question"))), options=options_of(log_likelihoods))
def multiple_choice(
    adapted: AdaptedBackbone,
    adapters: Adapter,
    questions: Sequence[Sequence[Question]],
    tokenizer,
    *,
    max_length: int = 256,
    **options,
) -> tuple[Tensor, Tensor]:
    """The share of its questions that each client's model answers right, ``(C,)`` each: by the likelihood of the
    options (``acc``), and by that over their characters (``acc_norm``). The first of equal options is taken.

    ``questions``: of each client. ``options`` go to ``log_likelihoods``.

    Raises ``ValueError`` for a question with fewer than two options.
    """
    check_count("questions", questions, adapters)
    if bare := [question for own in questions for question in own if len(question.options) < 2]:
        raise ValueError(f"{bare[0].prompt!r} needs two options or more, not {list(bare[0].options)}")
    examples = []
    for own in questions:
        pairs = [(question.prompt, f" {option}") for question in own for option in question.options]
        examples.append(encode_answers(tokenizer, *zip(*pairs), max_length))
    scores = unchecked(log_likelihoods)(adapted, adapters, Split.of(examples), **options)
    right = torch.zeros(2, len(questions), dtype=torch.float64)
    for client, own in enumerate(questions):
        first = 0
        for question in own:
            likelihoods = scores[client, first : first + len(question.options)]
            characters = torch.tensor([len(option) for option in question.options])
            for row, value in enumerate((likelihoods, likelihoods / characters)):
                right[row, client] += question.options[int(value.argmax())] == question.answer
            first += len(question.options)
    acc, acc_norm = right / torch.tensor([len(own) for own in questions])
    return acc, acc_norm


@torch.no_grad()
@door(prompts=several(named(kind("Tensor"))), end=whole(0))
def greedy_tokens(
    adapted: AdaptedBackbone,
    adapters: Adapter,
    prompts: Sequence[Inputs],
    steps: int,
    *,
    end: int | None = None,
    batch_size: int = 32,
    execution: Execution = Execution(),
) -> list[Tensor]:
    """The ``steps`` tokens that each client's model finds the likeliest, one after another, after its prompts: of each
    client ``(n, steps)``. From the token ``end`` on all are ``end``.

    ``prompts``: of each client the ``input_ids`` and ``attention_mask`` ``(n, T)``, padded on the right. There is no
    cache: every step runs the whole text.
    """
    check_count("prompts", prompts, adapters)
    split = Split.of([(x, torch.zeros(len(x[MASK]), dtype=torch.int64)) for x in prompts])
    lengths = split.x[MASK].sum(-1, keepdim=True)  # (C, N, 1)
    x = map_inputs(lambda tensor: F.pad(tensor, (0, steps)), split.x)
    tokens = torch.full((*split.y.shape, steps), PADDING)
    for step in range(steps):
        now = Split(x, split.y, split.sizes, split.ids)
        for rows, columns, logits, _ in batched_logits(
            adapted, adapters, now, batch_size=batch_size, execution=execution
        ):
            last = (lengths[rows, columns] + step - 1).to(logits.device)
            likeliest = logits.take_along_dim(last.unsqueeze(-1), dim=2).argmax(-1)[..., 0]
            tokens[rows, columns, step] = likeliest.to(tokens.device)
        if end is not None and step:
            over = tokens[..., step - 1] == end
            tokens[..., step] = torch.where(over, end, tokens[..., step])
        x["input_ids"].scatter_(2, lengths + step, tokens[..., step : step + 1].to(lengths.device))
        x[MASK].scatter_(2, lengths + step, 1)
    return [tokens[client, : int(n)] for client, n in enumerate(split.sizes)]


@door(prompts=several(several(text)), options=options_of(greedy_tokens))
def write_answers(
    adapted: AdaptedBackbone,
    adapters: Adapter,
    prompts: Sequence[Sequence[str]],
    tokenizer,
    *,
    steps: int = 16,
    until: str = "\n",
    max_length: int = 256,
    **options,
) -> list[list[str]]:
    """What each client's model writes after its prompts by greedy decoding, up to ``until``, in at most ``steps``
    tokens. Prompts of more than ``max_length`` tokens lose their beginning; ``options`` go to ``greedy_tokens``."""
    inputs = [pad_tokens([tokenizer(text.rstrip())["input_ids"][-max_length:] for text in own]) for own in prompts]
    end = getattr(tokenizer, "eos_token_id", None)
    found = unchecked(greedy_tokens)(adapted, adapters, inputs, steps, end=end, **options)
    texts = [[tokenizer.decode([int(t) for t in row if t != end]) for row in own] for own in found]
    return [[text.strip().split(until)[0].strip() for text in own] for own in texts]


def check_count(name: str, given: Sequence, adapters: Adapter) -> None:
    """Raise ``ValueError`` unless there is one for each client of the stack."""
    if len(given) != (clients := len(next(iter(adapters.values())))):
        raise ValueError(f"{name}: those of {len(given)} clients for {clients} adapters")


@door(found=several(text, least=0), expected=several(one_or_several(text), least=0))
def exact_match(found: Sequence[str], expected: Sequence[str | Sequence[str]]) -> float:
    """The share of the answers that are, without spaces at their ends, the expected one or one of the expected.

    >>> exact_match(["Paris ", "4", "no"], ["Paris", ["four", "4"], "No"])
    0.6666666666666666

    Raises ``ValueError`` unless there are as many of both, and some.
    """
    if len(found) != len(expected) or not found:
        raise ValueError(f"{len(found)} answers for {len(expected)} expected ones")
    several = [[one] if isinstance(one, str) else list(one) for one in expected]
    hits = [answer.strip() in [one.strip() for one in these] for answer, these in zip(found, several)]
    return sum(hits) / len(hits)
