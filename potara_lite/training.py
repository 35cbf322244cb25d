"""One engine: train a stack of adapters, every client at once, through ``torch.func``.

All clients share one frozen backbone, so one step for all of them is one batched program: ``vmap`` of the forward
pass over the stacked adapters, the sum of the clients' losses, one backward pass. A client's loss does not see the
other clients' adapters, so the gradient of the sum is, row by row, each client's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import set_peft_model_state_dict
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F
from tqdm.auto import tqdm

from .adapters import AdaptedBackbone, Adapter, client_adapter, flatten, stack_adapters, unflatten
from .data import Split

__all__ = [
    "DivergedError",
    "OptimizerState",
    "Trained",
    "adamw_step",
    "batch_indices",
    "evaluate",
    "losses",
    "train",
    "train_sequentially",
]

Loss = Callable[[Tensor, Tensor], Tensor]
Objective = Callable[[Callable[[Adapter], Tensor], Adapter], Tensor]  # (loss of an adapter on the batch, tensors)


class DivergedError(ValueError):
    """A client's training loss is no longer a finite number."""

    def __init__(self, client: int, step: int):
        super().__init__(f"the training loss of client {client} is not finite at step {step}; try a lower lr or a clip")
        self.client, self.step = client, step


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's memory for a stack: first and second moment ``(C, P)`` and the steps each client has taken ``(C,)``."""

    mean: Tensor
    square: Tensor
    steps: Tensor

    @staticmethod
    def zeros(flat: Tensor) -> OptimizerState:
        return OptimizerState(torch.zeros_like(flat), torch.zeros_like(flat), torch.zeros_like(flat[:, 0]))

    def rows(self, index: Tensor | slice) -> OptimizerState:
        """The memory of some clients."""
        return OptimizerState(self.mean[index], self.square[index], self.steps[index])

    def put(self, index: Tensor, rows: OptimizerState) -> OptimizerState:
        """This memory with the rows of some clients replaced."""
        return OptimizerState(
            self.mean.index_copy(0, index, rows.mean),
            self.square.index_copy(0, index, rows.square),
            self.steps.index_copy(0, index, rows.steps),
        )


@dataclass(frozen=True)
class Trained:
    """What ``train`` returns: the stack, the optimiser state to go on from, the loss of each step ``(C, steps)``."""

    adapters: Adapter
    state: OptimizerState
    losses: Tensor


def batch_indices(size: int, start: int, steps: int, batch_size: int, seed: int | Sequence[int]) -> Tensor:
    """The examples of steps ``start … start + steps - 1`` of one client, ``(steps, batch_size)``.

    The stream is one permutation of the client's examples after another; epoch ``e`` has the seed ``(*seed, e)``. It
    can be entered at any step, so rounds of 5 steps see the same batches as one run over all of them.
    """
    seed = [seed] if isinstance(seed, int) else list(seed)
    first, last = start * batch_size, (start + steps) * batch_size
    epochs = range(first // size, -(-last // size))
    if steps == 0:
        return torch.zeros(0, batch_size, dtype=torch.int64)
    stream = np.concatenate([np.random.default_rng([*seed, epoch]).permutation(size) for epoch in epochs])
    offset = epochs.start * size
    return torch.from_numpy(stream[first - offset : last - offset].reshape(steps, batch_size))


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
    adapted: AdaptedBackbone,
    adapters: Adapter,
    x: Tensor,
    y: Tensor,
    loss: Loss = F.cross_entropy,
    objective: Objective = plain_loss,
) -> Tensor:
    """The loss ``(C,)`` of each client's adapter on its own batch, ``x`` of ``(C, B, ...)`` and ``y`` of ``(C, B)``.

    ``objective(f, tensors)`` makes a client's tensors into its loss; ``f`` is the loss of an adapter on the batch.
    """
    return vmap(lambda tensors, a, b: objective(lambda adapter: loss(adapted(adapter, a), b), tensors))(adapters, x, y)


def _chunks(clients: int, chunk_size: int | None) -> list[slice]:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    size = chunk_size or clients
    return [slice(first, min(first + size, clients)) for first in range(0, clients, size)]


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
    chunk_size: int | None = None,
    loss: Loss = F.cross_entropy,
    objective: Objective = plain_loss,
    fixed: Adapter | None = None,
    progress: bool = False,
) -> Trained:
    """Train each client's adapter on its own examples with AdamW, all clients in one batched program.

    ``adapters``: a stack, a row per client of ``split``. ``steps`` optimiser steps of ``batch_size`` examples each;
    ``start`` says how many steps of the batch stream are already behind (see ``batch_indices``), ``state`` goes on
    with an earlier optimiser state. ``clip`` bounds each client's gradient norm. ``chunk_size`` clients are held in
    memory at a time. A client's batches depend on ``(seed, split.ids[client])`` alone. ``objective`` is that of
    ``losses``; it also sees the tensors of the stack ``fixed``, which do not train.

    Raises ``DivergedError`` (a ``ValueError``) naming the client and the step when a loss is not finite.
    """
    clients, seed = len(split), [seed] if isinstance(seed, int) else list(seed)
    flat, like = flatten(adapters).detach(), {name: tensor[0] for name, tensor in adapters.items()}
    if len(flat) != clients:
        raise ValueError(f"{len(flat)} adapters for {clients} clients")
    state = OptimizerState.zeros(flat) if state is None else state
    done: list[tuple[Tensor, OptimizerState, Tensor]] = []
    bar = tqdm(total=steps * clients, disable=not progress, unit="step", desc="training")
    for chunk in _chunks(clients, chunk_size):
        part = split.rows(chunk)
        index = torch.stack(
            [batch_indices(n, start, steps, batch_size, [*seed, i]) for n, i in zip(part.sizes.tolist(), part.ids)]
        ).to(flat.device)  # (K, steps, B)
        row = torch.arange(len(part), device=flat.device).unsqueeze(1)
        still = {name: tensor[chunk].detach() for name, tensor in (fixed or {}).items()}
        now, memory, curve = flat[chunk], state.rows(chunk), []
        for step in range(steps):
            x, y = part.x[row, index[:, step]], part.y[row, index[:, step]]  # (K, B, ...), (K, B)
            now = now.requires_grad_()
            value = losses(adapted, unflatten(now, like) | still, x, y, loss, objective)
            (grad,) = torch.autograd.grad(value.sum(), now)
            if clip is not None:
                grad = grad * (clip / grad.norm(dim=1, keepdim=True).clamp_min(clip))
            now, memory = adamw_step(now.detach(), grad, memory, lr, weight_decay)
            curve.append(value.detach())
            bar.update(len(part))
        curve = torch.stack(curve, dim=1) if curve else flat.new_zeros(len(part), 0)
        if not (finite := curve.isfinite()).all():
            client = int((~finite.all(dim=1)).nonzero()[0])
            raise DivergedError(part.ids[client], start + int((~finite[client]).nonzero()[0]))
        if not (finite := now.isfinite().all(dim=1)).all():  # the last update comes after the last loss
            raise DivergedError(part.ids[int((~finite).nonzero()[0])], start + steps)
        done.append((now, memory, curve))
    bar.close()
    memories = [memory for _, memory, _ in done]
    state = OptimizerState(*(torch.cat([getattr(m, f) for m in memories]) for f in ("mean", "square", "steps")))
    return Trained(unflatten(torch.cat([d[0] for d in done]), like), state, torch.cat([d[2] for d in done]))


def train_sequentially(
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
    loss: Loss = F.cross_entropy,
) -> Trained:
    """The same training the obvious way: one client after another, PEFT's own model, ``torch.optim.AdamW``.

    It is the oracle that ``train`` is tested against. The optimiser state it returns is empty.
    """
    model, seed = adapted.model, [seed] if isinstance(seed, int) else list(seed)
    trained, curves = [], []
    try:
        for client, name in enumerate(split.ids):
            set_peft_model_state_dict(model, client_adapter(adapters, client))
            weights = [model.get_parameter(adapted.parameters[key]).requires_grad_() for key in adapters]
            optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
            x, y = split.client(client)
            curve = []
            for index in batch_indices(len(y), start, steps, batch_size, [*seed, name]).to(y.device):
                value = loss(model(x[index]), y[index])
                optimizer.zero_grad()
                value.backward()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(weights, clip)
                optimizer.step()
                curve.append(value.detach())
            trained.append({key: weight.detach().clone() for key, weight in zip(adapters, weights)})
            curves.append(torch.stack(curve))
    finally:
        model.requires_grad_(False)
        set_peft_model_state_dict(model, adapted.initial)
    stack = stack_adapters(trained)
    return Trained(stack, OptimizerState.zeros(flatten(stack)), torch.stack(curves))


@torch.no_grad()
def evaluate(
    adapted: AdaptedBackbone,
    adapters: Adapter,
    split: Split,
    *,
    batch_size: int = 128,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (nats) and accuracy (a fraction), ``(C,)`` each, of each client's adapter on its own."""
    if len(next(iter(adapters.values()))) != len(split):
        raise ValueError(f"{len(next(iter(adapters.values())))} adapters for {len(split)} clients")
    totals = []
    for chunk in _chunks(len(split), chunk_size):
        part, some = split.rows(chunk), {name: tensor[chunk] for name, tensor in adapters.items()}
        total = torch.zeros(2, len(part), device=part.y.device, dtype=torch.float64)
        for x, y in zip(part.x.split(batch_size, dim=1), part.y.split(batch_size, dim=1)):
            logits = vmap(adapted)(some, x)  # (K, B, classes)
            total[0] += F.cross_entropy(logits.transpose(1, 2), y, reduction="none").sum(1)  # padding has label -100
            total[1] += (logits.argmax(-1) == y).sum(1)
        totals.append(total / part.sizes.to(total))
    loss, accuracy = torch.cat(totals, dim=1)
    return loss, accuracy
