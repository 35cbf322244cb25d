"""The loss of an example with one label or with one target per token: for training, calibration and evaluation.

``y`` has a label per example, or a target per token, with -100 where a token is not a target. An example's loss is the
mean over its targets, in nats: a long text counts as much as a short one, and a mean over examples is not a mean over
tokens. Each target is at the position that predicts it: for a language model, ``y[t]`` is the token after position
``t`` (``next_tokens`` of ``federation/text.py`` makes this shift; nothing here shifts).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..federation.inputs import PADDING


def checked_logits(logits: Tensor, y: Tensor) -> Tensor:
    """The logits in float32 at least. Raises ``ValueError`` unless their shape is the targets' and the classes."""
    if logits.shape[:-1] != y.shape:
        shapes = f"logits of shape {tuple(logits.shape)} for targets of shape {tuple(y.shape)}"
        raise ValueError(f"{shapes}: a label per example needs (B, classes), a target per token (B, T, classes)")
    return logits.float() if logits.dtype.itemsize < 4 else logits


def token_mean(values: Tensor, y: Tensor) -> Tensor:
    """The mean ``(...)`` of ``values`` ``(..., T)`` over each example's targets in ``y``; 0 where it has none."""
    real = y != PADDING
    return (values * real).sum(-1) / real.sum(-1).clamp_min(1)


def example_losses(logits: Tensor, y: Tensor, leading: int = 1) -> Tensor:
    """Each example's cross-entropy in nats: of its label, or the mean over its targets; 0 for padding.

    ``y``: ``(B,)`` or ``(B, T)``, and ``logits`` one dimension more; with ``leading=2`` both have the clients in front.
    Raises ``ValueError`` for logits and targets of different shapes.
    """
    logits = checked_logits(logits, y)
    if y.dim() == leading:
        return F.cross_entropy(logits.movedim(-1, 1), y, reduction="none")
    values = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
    return token_mean(values.view(y.shape), y)


def mean_loss(logits: Tensor, y: Tensor) -> Tensor:
    """The mean of a batch's ``example_losses``, without padding: the default training loss."""
    if y.dim() == 1:
        return F.cross_entropy(checked_logits(logits, y), y)
    return example_losses(logits, y).sum() / (y != PADDING).any(-1).sum()


def example_accuracies(logits: Tensor, y: Tensor, leading: int = 1) -> Tensor:
    """Whether each example's largest logit is that of its label, or the share of its targets for which this holds.

    Shapes: see ``example_losses``.
    """
    right = checked_logits(logits, y).argmax(-1) == y
    return right if y.dim() == leading else token_mean(right.double(), y)
