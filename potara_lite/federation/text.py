"""Text as tokens: what encoders and causal language models take as inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..checks import AnyList, Count, Flag, List, Size, checked, invalid
from .inputs import MASK, PADDING, is_integer


@checked
def pad_tokens(rows: List[AnyList[Count]]) -> dict[str, Tensor]:
    """Token ids of texts of any lengths as ``input_ids`` and ``attention_mask`` ``(n, T)``, 0 behind their ends.

    >>> pad_tokens([[5, 6, 7], [8]])["attention_mask"].tolist()
    [[1, 1, 1], [1, 0, 0]]

    Raises ``ValueError`` for a text without tokens.
    """
    if empty := [i for i, row in enumerate(rows) if not len(row)]:
        raise ValueError(f"text {empty[0]} has no tokens")
    ids = [torch.tensor(row) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return {"input_ids": pad_sequence(ids, batch_first=True), MASK: pad_sequence(mask, batch_first=True)}


@checked
def encode_texts(tokenizer: Callable, texts: List[str], max_length: Size = 64) -> dict[str, Tensor]:
    """Texts as an encoder reads them, with its special tokens, cut to ``max_length`` tokens.

    Raises ``ValueError`` for an empty text.
    """
    if empty := [i for i, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"text {empty[0]} is empty")
    return pad_tokens([tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts])


@checked
def encode_answers(
    tokenizer: Callable, prompts: List[str], answers: List[str], max_length: Size = 256, *, end: Flag = True
) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts and the answers that follow them, for a causal language model: its inputs, and targets ``(n, T)`` that
    are the answers' tokens alone.

    The two are tokenised together. The answer begins at the first token that the prompt alone does not have, so spaces
    at the prompt's end and a token across the boundary belong to the answer (the convention of lm-evaluation-harness).
    What the tokenizer appends (EOS, say) is the answer's last target, with ``end=False`` it is left out. Prompts that
    are too long lose their beginning.

    Raises ``ValueError`` for an empty prompt or answer, for an answer of ``max_length`` tokens or more, and for one
    that begins in the very first token.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"answers: {len(answers)} of them for {len(prompts)} prompts")
    rows, lengths, appended = [], [], _appended(tokenizer, prompts[0])
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        bare = prompt.rstrip()
        if not bare or not answer.strip():
            raise ValueError(f"text {i} has an empty {'answer' if bare else 'prompt'}")
        row = tokenizer(prompt + answer)["input_ids"]
        row = row if end else row[: len(row) - appended]
        alone = tokenizer(bare)["input_ids"]
        alone = alone[: len(alone) - appended]
        same = next((k for k, (one, other) in enumerate(zip(alone, row)) if one != other), min(len(alone), len(row)))
        if same == 0:
            raise ValueError(f"text {i}: its first token is of the answer, too, and nothing before predicts it")
        lengths.append(len(row) - same)
        if not 0 < lengths[-1] < max_length:
            raise ValueError(f"text {i}: an answer of {lengths[-1]} tokens, 1 … {max_length - 1} are possible")
        rows.append(row[-max_length:])
    x = pad_tokens(rows)
    is_answer = torch.zeros_like(x[MASK], dtype=torch.bool)
    for row_is_answer, row, length in zip(is_answer, rows, lengths):
        row_is_answer[len(row) - length : len(row)] = True
    return x, next_tokens(x["input_ids"], is_answer)


def encode_prompts(tokenizer: Callable, prompts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Texts that go on: without the special tokens that the tokenizer appends. Long ones lose their beginning."""
    appended, rows = _appended(tokenizer, prompts[0]), []
    for prompt in prompts:
        row = tokenizer(prompt.rstrip())["input_ids"]
        rows.append(row[: len(row) - appended][-max_length:])
    return pad_tokens(rows)


def _appended(tokenizer: Callable, text: str) -> int:
    """How many special tokens a tokenizer appends to a text; 0 of one that cannot leave them out."""
    try:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    except TypeError:
        return 0
    whole = tokenizer(text)["input_ids"]
    ends = [start + len(plain) for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    return len(whole) - ends[0] if plain and ends else 0


def next_tokens(input_ids: Tensor, is_target: Tensor) -> Tensor:
    """The targets of a causal language model, ``(n, T)``: at every position the next token where ``is_target`` marks
    that token, else -100. Only this function shifts by one.

    >>> next_tokens(torch.tensor([[5, 6, 7]]), torch.tensor([[False, False, True]])).tolist()
    [[-100, 7, -100]]
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not is_integer(input_ids):
        invalid("input_ids", "token ids (n, T)", input_ids)
    if not isinstance(is_target, Tensor) or is_target.shape != input_ids.shape:
        invalid("is_target", f"a tensor of shape {tuple(input_ids.shape)} like input_ids", is_target)
    ids = input_ids.long()
    targets = torch.full_like(ids, PADDING)
    targets[:, :-1] = torch.where(is_target.bool(), ids, PADDING)[:, 1:]
    return targets
