"""One engine: train a stack of adapters, every client at once, through ``torch.func``.

All clients share one frozen backbone, so one step for all of them is one batched program: ``vmap`` of the forward
pass over the stacked adapters, the sum of the clients' losses, one backward pass. A client's loss does not see the
other clients' adapters, so the gradient of the sum is, row by row, each client's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, door, fitting, flatten, select_clients, trained_stack, unflatten
from ..checks import one_or_several, seed as one_seed, unchecked
from ..federation.batches import batch_indices
from ..federation.inputs import Inputs, map_inputs, take
from ..federation.split import Split
from .batching import Execution, Forward, map_clients, plan_execution, with_autocast
from .loss import example_accuracies, example_losses, mean_loss

Loss = Callable[[Tensor, Tensor], Tensor]
Objective = Callable[[Callable[[Adapter], Tensor], Adapter], Tensor]  # (loss of an adapter on the batch, tensors)


class DivergedError(ValueError):
    """A client's training loss is no longer a finite number: the first such ``client`` and its first such ``step``.

    ``trained`` is the run, which goes on to its end before this is raised: every other client's adapter and losses
    there are what they would be without this client.
    """

    def __init__(self, client: int, step: int, trained: Trained):
        super().__init__(f"the training loss of client {client} is not finite at step {step}; try a lower lr or a clip")
        self.client, self.step, self.trained = client, step, trained


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state for a stack: first and second moment ``(C, P)`` and the steps each client has taken ``(C,)``."""

    mean: Tensor
    square: Tensor
    steps: Tensor

    @staticmethod
    def zeros(flat: Tensor) -> OptimizerState:
        return OptimizerState(torch.zeros_like(flat), torch.zeros_like(flat), torch.zeros_like(flat[:, 0]))

    def rows(self, index: Tensor | slice) -> OptimizerState:
        """The state of some clients, by their rows (on any device)."""
        return self._each(lambda tensor: tensor[index if isinstance(index, slice) else index.to(tensor.device)])

    def to(self, device: str | torch.device) -> OptimizerState:
        """The same state on ``device``."""
        return self._each(lambda tensor: tensor.to(device))

    def replace_rows(self, index: Tensor, rows: OptimizerState) -> OptimizerState:
        """This state with the rows of some clients replaced."""
        index = index.to(self.steps.device)
        return OptimizerState(
            *(old.index_copy(0, index, new) for old, new in zip(vars(self).values(), vars(rows).values()))
        )

    def _each(self, function: Callable[[Tensor], Tensor]) -> OptimizerState:
        return OptimizerState(function(self.mean), function(self.square), function(self.steps))


@dataclass(frozen=True)
class Trained:
    """What ``train`` returns: the stack, the optimiser state to go on from, the loss of each step ``(C, steps)``."""

    adapters: Adapter
    state: OptimizerState
    losses: Tensor


def adamw_step(
    flat: Tensor,
    grad: Tensor,
    state: OptimizerState,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Tensor, OptimizerState]:
    """One step of AdamW (Loshchilov & Hutter, 2019) on a matrix with a client per row, each at its own step count."""
    steps = state.steps + 1
    mean = torch.lerp(state.mean, grad, 1 - betas[0])
    square = betas[1] * state.square + (1 - betas[1]) * grad**2
    mean_hat = mean / (1 - betas[0] ** steps).unsqueeze(1)
    root = (square / (1 - betas[1] ** steps).unsqueeze(1)).sqrt()
    return flat * (1 - lr * weight_decay) - lr * mean_hat / (root + eps), OptimizerState(mean, square, steps)


def plain_loss(f: Callable[[Adapter], Tensor], adapter: Adapter) -> Tensor:
    """The usual objective: the loss ``f`` of the adapter that trains, and nothing else."""
    return f(adapter)


def losses(
    forward: Forward,
    adapters: Adapter,
    x: Inputs,
    y: Tensor,
    loss: Loss = mean_loss,
    objective: Objective = plain_loss,
    *,
    vectorize: bool = True,
) -> Tensor:
    """The loss ``(C,)`` of each client's adapter on its own batch, ``x`` of ``(C, B, ...)`` and ``y`` of ``(C, B)``.

    ``objective(f, tensors)`` makes a client's tensors into its loss; ``f`` is the loss of an adapter on the batch.
    """

    def client_loss(tensors: Adapter, client_x: Inputs, client_y: Tensor) -> Tensor:
        return objective(lambda adapter: loss(forward(adapter, client_x), client_y), tensors)

    return map_clients(client_loss, adapters, x, y, vectorize=vectorize)


@cache
def compiled_losses() -> Callable[..., Tensor]:
    """``losses``, compiled for every combination of shapes, backbone and objective that it meets."""
    return torch.compile(losses, dynamic=False)


def check_clients(adapted: AdaptedBackbone, adapters: Adapter, split: Split) -> None:
    """Raise ``ValueError`` unless there is an adapter for every client, whose inputs the backbone can take."""
    if (count := len(next(iter(adapters.values())))) != len(split):
        raise ValueError(f"{count} adapters for {len(split)} clients")
    adapted.check_inputs(split.x, split.ids)


CLASSES: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # as many logits as a model has, while it lives


@torch.no_grad()
def check_labels(adapted: AdaptedBackbone, adapters: Adapter, split: Split, labels: Tensor | None = None) -> None:
    """Raise ``ValueError`` for a label, of the split or of ``labels`` instead, that the backbone has no logit of.

    How many logits a model has is seen once, on the first client's first example.
    """
    if adapted.model not in CLASSES:
        one = {name: tensor[0].to(adapted.device) for name, tensor in adapters.items()}
        x = map_inputs(lambda tensor: tensor[0, :1].to(adapted.device), split.x)
        CLASSES[adapted.model] = adapted(one, x).shape[-1]
    largest, classes = int((split.y if labels is None else labels).max()), CLASSES[adapted.model]
    if largest >= classes:
        name = "split has" if labels is None else "labels:"
        raise ValueError(f"{name} label {largest}, the backbone has classes 0 … {classes - 1}")


@door(adapters=trained_stack, seed=one_or_several(one_seed))
def train(
    adapted: AdaptedBackbone,
    adapters: Adapter,
    split: Split,
    *,
    steps: int,
    batch_size: int = 8,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    clip: float | None = None,
    seed: int | Sequence[int] = 0,
    start: int = 0,
    state: OptimizerState | None = None,
    loss: Loss = mean_loss,
    objective: Objective = plain_loss,
    fixed: Adapter | None = None,
    execution: Execution = Execution(),
    progress: bool = False,
) -> Trained:
    """Train each client's adapter on its own examples with AdamW, all clients in one batched program.

    ``adapters``: a stack, a row per client of ``split``. ``steps`` optimiser steps of ``batch_size`` examples each;
    ``start`` says how many steps of the batch stream are already behind (see ``batch_indices``), ``state`` goes on
    with an earlier optimiser state. ``clip`` bounds each client's gradient norm. A client's batches depend on
    ``(seed, split.ids[client])`` alone. ``objective`` is that of ``losses``; it also sees the tensors of the stack
    ``fixed``, which do not train. Adapters, data and state may lie on the CPU and visit the backbone's device chunk by
    chunk (see ``Execution``).

    Raises ``ValueError`` for adapters, data, a state or numbers that do not fit, and ``DivergedError`` (one, too)
    naming the client and the step when a loss is not finite; the result for the other clients is in its ``trained``.
    """
    is_adapter = objective is plain_loss and not fixed
    if is_adapter:
        adapters = fitting("adapters", adapters, adapted)
    check_clients(adapted, adapters, split)
    if is_adapter and loss is mean_loss:
        check_labels(adapted, adapters, split)
    flat, like = flatten(adapters).detach().to(adapted.dtype), {name: tensor[0] for name, tensor in adapters.items()}
    state = OptimizerState.zeros(flat) if state is None else state.rows(torch.arange(len(split)))  # a copy
    curves = flat.new_zeros(len(split), steps)
    fixed = {name: tensor.detach() for name, tensor in (fixed or {}).items()}
    chosen, step_losses = _plan_training(adapted, adapters | fixed, split, batch_size, loss, objective, execution)
    with tqdm(total=steps * len(split), disable=not progress, unit="step", desc="training") as bar:
        for chunk in chosen.chunks:
            held = {name: tensor.to(adapted.device) for name, tensor in select_clients(fixed, chunk).items()}
            now, now_state = flat[chunk].to(adapted.device), state.rows(chunk).to(adapted.device)
            for step, (x, y) in enumerate(
                _batches(split.rows(chunk).to(adapted.device), seed, start, steps, batch_size)
            ):
                now.requires_grad_()
                values = step_losses(unflatten(now, like) | held, x, y)  # (K,)
                (grad,) = torch.autograd.grad(values.sum(), now)
                now, now_state = adamw_step(now.detach(), _clipped(grad, clip), now_state, lr, weight_decay)
                curves[chunk, step] = values.detach().to(curves)
                bar.update(len(now))
            flat[chunk] = now.to(flat.device)  # in place: all clients' results exist once
            for kept, new in zip(vars(state).values(), vars(now_state).values()):
                kept[chunk] = new.to(kept.device)
    stack = {name: tensor.to(like[name].dtype) for name, tensor in unflatten(flat, like).items()}
    return _check_finite(Trained(stack, state, curves), split.ids, start)


def _plan_training(adapted, tensors: Adapter, split: Split, batch_size: int, loss, objective, execution: Execution):
    """The plan, and the function from a chunk's tensors and batch to its clients' losses."""
    alone = with_autocast(adapted, execution.autocast)

    def total_logits(client_tensors: Adapter, x: Inputs) -> Tensor:
        return objective(lambda adapter: alone(adapter, x).sum(), client_tensors)

    chosen = plan_execution(
        adapted, tensors, split.x, batch_size=batch_size, backward=True, execution=execution,
        function=None if objective is plain_loss else total_logits,
    )  # fmt: skip
    compiled = chosen.vectorize and execution.compile
    forward, function = (alone, compiled_losses()) if compiled else (chosen.forward, losses)
    return chosen, lambda stack, x, y: function(forward, stack, x, y, loss, objective, vectorize=chosen.vectorize)


def _batches(split: Split, seed: int | Sequence[int], start: int, steps: int, batch_size: int) -> Iterator:
    """The clients' batches of every step, ``(K, B, ...)`` and ``(K, B)``."""
    seed = [seed] if isinstance(seed, int) else list(seed)
    streams = [
        unchecked(batch_indices)(n, start, steps, batch_size, [*seed, i])
        for n, i in zip(split.sizes.tolist(), split.ids)
    ]
    index, row = torch.stack(streams).to(split.y.device), torch.arange(len(split), device=split.y.device).unsqueeze(1)
    for step in range(steps):
        yield take(split.x, (row, index[:, step])), split.y[row, index[:, step]]


def _clipped(grad: Tensor, clip: float | None) -> Tensor:
    """Each client's gradient, a row, with a norm of at most ``clip``, as ``clip_grad_norm_`` does it."""
    return grad if clip is None else grad * (clip / (grad.norm(dim=1, keepdim=True) + 1e-6)).clamp_max(1)


def _check_finite(trained: Trained, ids: Sequence[int], start: int) -> Trained:
    """The run itself, unless a loss, or an adapter after the last update, is not finite: then ``DivergedError``."""
    last = flatten(trained.adapters).isfinite().all(1, keepdim=True)
    finite = torch.cat([trained.losses.isfinite(), last], dim=1)  # (C, steps + 1)
    if not finite.all():
        row = int((~finite.all(1)).nonzero()[0])
        raise DivergedError(ids[row], start + int((~finite[row]).nonzero()[0]), trained)
    return trained


@torch.no_grad()
@door()
def evaluate(
    adapted: AdaptedBackbone,
    adapters: Adapter,
    split: Split,
    *,
    batch_size: int = 128,
    execution: Execution = Execution(),
) -> tuple[Tensor, Tensor]:
    """Mean loss (nats) and accuracy (a fraction), ``(C,)`` each, of each client's adapter on its own examples.

    Both are means over examples; a text with a target per token has the mean over its tokens (``training/loss.py``).
    Raises ``ValueError`` for adapters that do not fit and for a client whose loss is not finite.
    """
    total = torch.zeros(2, len(split), device=adapted.device, dtype=torch.float64)
    for rows, _, logits, y in batched_logits(adapted, adapters, split, batch_size=batch_size, execution=execution):
        total[0, rows] += example_losses(logits, y, leading=2).sum(1)
        total[1, rows] += example_accuracies(logits, y, leading=2).sum(1)
    loss, accuracy = total / split.sizes.to(total)
    check_losses(loss, split)
    return loss, accuracy


def check_losses(losses: Tensor, split: Split) -> None:
    """Raise ``ValueError`` naming the first client that has a loss ``(C, ...)``, or a logit or a gradient of it,
    that is not finite."""
    if not (fine := losses.isfinite().reshape(len(losses), -1).all(1)).all():
        client = split.ids[int((~fine).nonzero()[0])]
        raise ValueError(f"the loss of client {client} is not finite: its examples or its logits are not numbers")


def batched_logits(
    adapted: AdaptedBackbone, adapters: Adapter, split: Split, *, batch_size: int, execution: Execution
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """The split in blocks of clients and examples: both slices, the logits ``(K, B, ..., classes)`` and their ``y``.

    ``B`` is ``batch_size``, or what fits: a language model's logits are as many as its vocabulary for every token.
    """
    check_clients(adapted, adapters, split)
    check_labels(adapted, adapters, split)
    most = min(batch_size, split.y.shape[1])
    chosen = plan_execution(adapted, adapters, split.x, batch_size=most, backward=False, execution=execution)
    for rows in chosen.chunks:
        part = split.rows(rows).to(adapted.device)
        stack = {name: tensor.to(adapted.device) for name, tensor in select_clients(adapters, rows).items()}
        for start in range(0, split.y.shape[1], min(batch_size, chosen.examples)):
            columns = slice(start, start + min(batch_size, chosen.examples))
            x = take(part.x, (slice(None), columns))
            logits = map_clients(chosen.forward, stack, x, vectorize=chosen.vectorize)
            yield rows, columns, logits, part.y[:, columns]
