"""How good a language model's answers are: options by their likelihood, and answers written token by token.

Multiple choice follows lm-evaluation-harness: an option's score is the log-likelihood of its tokens after the prompt
and a space, summed (``acc``), or that over its number of characters (``acc_norm``), so that long options are not at a
disadvantage. Classification is multiple choice with the labels' names as options. Everything takes the stack of all
clients, each with its own questions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Stack, check_count, select_clients
from ..checks import Count, List, Named, Size, checked
from ..federation.inputs import MASK, PADDING, map_inputs, pad_stack
from ..federation.split import Split
from ..federation.tasks import Question
from ..federation.text import encode_answers, encode_prompts
from ..models.loss import checked_logits
from .batching import Execution
from .train import batched_logits, check_clients, example_logits


@torch.no_grad()
@checked
def log_likelihoods(
    adapted: AdaptedBackbone,
    adapters: Stack,
    split: Split,
    *,
    batch_size: Size = 32,
    execution: Execution = Execution(),
) -> Tensor:
    """The log-likelihood (nats) of each example's targets, summed over its tokens, ``(C, N)``; 0 for padding."""
    result = torch.zeros(len(split), int(split.sizes.max()), dtype=torch.float64)
    blocks = example_logits(adapted, adapters, split, batch_size=batch_size, execution=execution)
    for clients, numbers, logits, y in blocks:
        losses = F.cross_entropy(checked_logits(logits, y).flatten(0, -2), y.flatten(), reduction="none")
        result[clients, numbers] = -losses.view(len(y), -1).double().sum(-1).cpu()
    return result


@checked
def multiple_choice(
    adapted: AdaptedBackbone,
    adapters: Stack,
    questions: List[List[Question]],
    tokenizer: Callable,
    *,
    max_length: Size = 256,
    **options,
) -> tuple[Tensor, Tensor]:
    """The share of its questions that each client's model answers right, ``(C,)`` each: by the likelihood of the
    options (``acc``), and by that over their characters (``acc_norm``). The first of equal options is taken.

    ``questions``: of each client. ``options`` go to ``log_likelihoods``.

    Raises ``ValueError`` for a question with fewer than two options.
    """
    check_count("adapters", adapters, len(questions))
    examples = []
    for of_client in questions:
        for question in of_client:
            if len(question.options) < 2:
                raise ValueError(f"{question.prompt!r} needs two options or more, not {list(question.options)}")
        prompts = [question.prompt for question in of_client for _ in question.options]
        answers = [f" {option}" for question in of_client for option in question.options]
        examples.append(encode_answers(tokenizer, prompts, answers, max_length, end=False))
    scores = log_likelihoods(adapted, adapters, Split(examples), **options)
    right = torch.zeros(2, len(questions), dtype=torch.float64)
    for client, of_client in enumerate(questions):
        counts = [len(question.options) for question in of_client]
        of_options = scores[client, : sum(counts)].split(counts)
        for question, likelihoods in zip(of_client, of_options):
            characters = torch.tensor([len(option) for option in question.options])
            for row, values in enumerate((likelihoods, likelihoods / characters)):
                right[row, client] += question.options[int(values.argmax())] == question.answer
    acc, acc_norm = right / torch.tensor([len(of_client) for of_client in questions])
    return acc, acc_norm


@torch.no_grad()
@checked
def greedy_tokens(
    adapted: AdaptedBackbone,
    adapters: Stack,
    prompts: List[Named[Tensor]],
    steps: Count,
    *,
    end: Count | None = None,
    batch_size: Size = 32,
    execution: Execution = Execution(),
) -> list[Tensor]:
    """The ``steps`` tokens that each client's model finds the likeliest, one after another, after its prompts: of each
    client ``(n, steps)``. After the token ``end`` all are ``end``.

    ``prompts``: of each client the ``input_ids`` and ``attention_mask`` ``(n, T)``, padded on the right. There is no
    cache: every step runs the whole text, beside others of about its length.
    """
    check_count("adapters", adapters, len(prompts))
    split = Split([(dict(x), torch.zeros(len(x[MASK]), dtype=torch.int64)) for x in prompts])
    parts = split.by_length()
    texts = parts.split.map(lambda x: map_inputs(lambda tensor: F.pad(tensor, (0, steps)), x))
    of_parts = check_clients(adapted, select_clients(adapters, parts.clients), texts)
    lengths = pad_stack([x[MASK].sum(1) for x, _ in parts.split.examples], 1).cpu()  # (P, n)
    written = torch.full((*lengths.shape, steps), PADDING)
    for step in range(steps):
        blocks = batched_logits(adapted, of_parts, texts, batch_size=batch_size, execution=execution)
        for rows, columns, logits, _ in blocks:
            last = (lengths[rows, columns] + step - 1).to(logits.device)
            likeliest = logits.take_along_dim(last[..., None, None], dim=2).argmax(-1)[..., 0]
            written[rows, columns, step] = likeliest.to(written.device)
        if end is not None and step:
            has_ended = written[..., step - 1] == end
            written[..., step] = torch.where(has_ended, end, written[..., step])
        for (x, y), length, token in zip(texts.examples, lengths + step, written[..., step]):
            place = torch.arange(len(y)), length[: len(y)]
            x["input_ids"][place], x[MASK][place] = token[: len(y)].to(x["input_ids"]), 1
    tokens = torch.full((*split.y.shape, steps), PADDING)
    is_there, clients, numbers = parts.places(torch.arange(len(parts.split)), slice(None))
    tokens[clients, numbers] = written[is_there]
    return [tokens[client, : int(n)] for client, n in enumerate(split.sizes)]


@checked
def write_answers(
    adapted: AdaptedBackbone,
    adapters: Stack,
    prompts: List[List[str]],
    tokenizer: Callable,
    *,
    steps: Count = 16,
    until: str = "\n",
    max_length: Size = 256,
    **options,
) -> list[list[str]]:
    """What each client's model writes after its prompts by greedy decoding, up to ``until``, in at most ``steps``
    tokens. Prompts of more than ``max_length`` tokens lose their beginning; ``options`` go to ``greedy_tokens``."""

    inputs = [encode_prompts(tokenizer, of_client, max_length) for of_client in prompts]
    end = getattr(tokenizer, "eos_token_id", None)
    tokens = greedy_tokens(adapted, adapters, inputs, steps, end=end, **options)
    texts = [[tokenizer.decode([int(t) for t in row if t != end]) for row in of_client] for of_client in tokens]
    return [[text.strip().split(until)[0].strip() for text in of_client] for of_client in texts]


@checked
def exact_match(found: List[str], expected: List[str | List[str]]) -> float:
    """The share of the answers that are, without spaces at their ends, the expected one or one of the expected.

    >>> exact_match(["Paris ", "4", "no"], ["Paris", ["four", "4"], "No"])
    0.6666666666666666

    Raises ``ValueError`` unless there are as many of both, and some.
    """
    if len(found) != len(expected):
        raise ValueError(f"{len(found)} answers for {len(expected)} expected ones")
    hits = 0
    for answer, accepted in zip(found, expected):
        accepted = [accepted] if isinstance(accepted, str) else accepted
        hits += answer.strip() in [text.strip() for text in accepted]
    return hits / len(found)
