"""The loss of an example and how right an output is: of a label, of a target per token, or of a task of one's own.

Classification: ``y`` has a label per example, or a target per token, with -100 where a token is not a target. An
example's loss is the mean over its targets, in nats: a long text counts as much as a short one, and a mean over
examples is not a mean over tokens. Each target is at the position that predicts it: for a language model, ``y[t]`` is
the token after position ``t`` (``next_tokens`` of ``federation/text.py`` makes this shift; nothing here shifts). Any
other ``Task`` has real targets, or a loss of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..checks import Flag, checked
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
    """The mean of a batch's ``example_losses``, without padding."""
    if y.dim() == 1:
        return F.cross_entropy(checked_logits(logits, y), y)
    return example_losses(logits, y).sum() / (y != PADDING).any(-1).sum()


def example_accuracies(logits: Tensor, y: Tensor, leading: int = 1) -> Tensor:
    """Whether each example's largest logit is that of its label, or the share of its targets for which this holds.

    Shapes: see ``example_losses``.
    """
    right = checked_logits(logits, y).argmax(-1) == y
    return right if y.dim() == leading else token_mean(right.double(), y)


@checked
@dataclass(frozen=True)
class Task:
    """What the outputs of a network are compared with.

    ``loss(outputs, y)``: the loss of each example, ``(B,)`` from ``(B, ...)``; a network with one output for targets
    ``(B,)`` hands ``(B,)`` over. The theory asks of it only that it is twice differentiable in the outputs.
    ``metric(outputs, y)``: a number for each example ``(B,)``; its mean stands in the column ``accuracy`` of tables.
    ``has_classes``: targets are numbers of classes and outputs are their logits, so that labels are checked and may be
    drawn from a model; otherwise targets are real numbers, ``(n,)`` or ``(n, d)``, one for each output.
    """

    name: str
    loss: Callable[..., Tensor]
    metric: Callable[..., Tensor]
    has_classes: Flag = False

    def losses(self, outputs: Tensor, y: Tensor, leading: int = 1) -> Tensor:
        """Each example's loss; 0 for padding. With ``leading=2`` both have the clients in front."""
        return _of_examples(self.loss, self, outputs, y, leading)

    def metrics(self, outputs: Tensor, y: Tensor, leading: int = 1) -> Tensor:
        """Each example's metric, in the same way."""
        return _of_examples(self.metric, self, outputs, y, leading)

    def mean_loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The mean of a batch's losses, without padding: the training loss."""
        if self.loss is example_losses:
            return mean_loss(outputs, y)
        return self.losses(outputs, y).sum() / is_example(y, 1).sum()


def is_example(y: Tensor, leading: int) -> Tensor:
    """Which examples are no padding: their target is not -100, or, if it is a real number, not NaN."""
    is_target = ~y.isnan() if y.is_floating_point() else y != PADDING
    return is_target.flatten(leading).any(-1) if y.dim() > leading else is_target


def _of_examples(function: Callable[..., Tensor], task: Task, outputs: Tensor, y: Tensor, leading: int) -> Tensor:
    if function in (example_losses, example_accuracies):  # they know padding
        return function(outputs, y, leading)
    real = is_example(y, leading)
    y = y.nan_to_num().to(outputs.dtype) if y.is_floating_point() else y.clamp_min(0)
    y, outputs = y.flatten(0, leading - 1), outputs.flatten(0, leading - 1)
    if not task.has_classes and outputs.shape != y.shape:
        outputs = outputs.squeeze(-1) if outputs.shape == (*y.shape, 1) else outputs
        if outputs.shape != y.shape:
            shapes = f"outputs of shape {tuple(outputs.shape)} for targets of shape {tuple(y.shape)}"
            raise ValueError(f"{shapes}: {task.name} needs a target for each output")
    return function(outputs, y).view(real.shape) * real


def _mean_over_outputs(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, y: function(outputs, y).reshape(len(y), -1).mean(1)


CLASSIFICATION = Task("classification", example_losses, example_accuracies, has_classes=True)
REGRESSION = Task(
    "regression",
    _mean_over_outputs(lambda outputs, y: (outputs - y).square() / 2),
    _mean_over_outputs(lambda outputs, y: (outputs - y).abs()),
)
MULTI_LABEL = Task(
    "multi-label",
    _mean_over_outputs(lambda outputs, y: F.binary_cross_entropy_with_logits(outputs, y, reduction="none")),
    _mean_over_outputs(lambda outputs, y: ((outputs > 0) == (y > 0.5)).to(outputs.dtype)),
)
TASKS = {task.name: task for task in (CLASSIFICATION, REGRESSION, MULTI_LABEL)}
