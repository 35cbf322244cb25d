"""One engine: train a stack of adapters, every client at once, through ``torch.func``.

All clients share one frozen backbone, so one step for all of them is one batched program: ``vmap`` of the forward
pass over the stacked adapters, the sum of the clients' losses, one backward pass. A client's loss does not see the
other clients' adapters, so the gradient of the sum is, row by row, each client's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from peft import set_peft_model_state_dict
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from .adapters import AdaptedBackbone, Adapter, client_adapter, flatten, stack_adapters, unflatten
from .batching import Forward, each, in_precision, plan
from .data import Split
from .grouped import grouped

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
    """A client's training loss is no longer a finite number: the first such ``client`` and its first such ``step``.

    ``trained`` is the run, which goes on to its end before this is raised: every other client's adapter and losses
    there are what they would be without this client.
    """

    def __init__(self, client: int, step: int, trained: Trained):
        super().__init__(f"the training loss of client {client} is not finite at step {step}; try a lower lr or a clip")
        self.client, self.step, self.trained = client, step, trained


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

    def to(self, device: str | torch.device) -> OptimizerState:
        """The same memory on ``device``."""
        return OptimizerState(self.mean.to(device), self.square.to(device), self.steps.to(device))

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


def _finite(trained: Trained, ids: Sequence[int], start: int) -> Trained:
    """The run itself, unless a loss, or an adapter after the last update, is not finite: then ``DivergedError``."""
    last = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in trained.adapters.values()]).all(0)
    finite = torch.cat([trained.losses.isfinite(), last.unsqueeze(1)], dim=1)  # (C, steps + 1)
    if not finite.all():
        row = int((~finite.all(1)).nonzero()[0])
        raise DivergedError(ids[row], start + int((~finite[row]).nonzero()[0]), trained)
    return trained


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
    adapted: Forward,
    adapters: Adapter,
    x: Tensor,
    y: Tensor,
    loss: Loss = F.cross_entropy,
    objective: Objective = plain_loss,
    *,
    at_once: bool = True,
) -> Tensor:
    """The loss ``(C,)`` of each client's adapter on its own batch, ``x`` of ``(C, B, ...)`` and ``y`` of ``(C, B)``.

    ``objective(f, tensors)`` makes a client's tensors into its loss; ``f`` is the loss of an adapter on the batch.
    """

    def one(tensors: Adapter, a: Tensor, b: Tensor) -> Tensor:
        return objective(lambda adapter: loss(adapted(adapter, a), b), tensors)

    return each(one, adapters, x, y, at_once=at_once)


@cache
def compiled_losses() -> Callable[..., Tensor]:
    """``losses``, compiled for every combination of shapes, backbone and objective that it meets."""
    return torch.compile(losses, dynamic=False)


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
    memory: float | None = None,
    at_once: bool | None = None,
    autocast: torch.dtype | None = None,
    loss: Loss = F.cross_entropy,
    objective: Objective = plain_loss,
    fixed: Adapter | None = None,
    compile: bool = False,
    progress: bool = False,
) -> Trained:
    """Train each client's adapter on its own examples with AdamW, all clients in one batched program.

    ``adapters``: a stack, a row per client of ``split``. ``steps`` optimiser steps of ``batch_size`` examples each;
    ``start`` says how many steps of the batch stream are already behind (see ``batch_indices``), ``state`` goes on
    with an earlier optimiser state. ``clip`` bounds each client's gradient norm. A client's batches depend on
    ``(seed, split.ids[client])`` alone. ``objective`` is that of ``losses``; it also sees the tensors of the stack
    ``fixed``, which do not train.

    ``chunk_size`` clients are trained at a time, by default as many as fit in ``memory`` bytes (see ``plan``).
    Adapters, data and optimiser state may lie on the CPU and visit the backbone's device chunk by chunk. ``at_once``:
    whether a chunk is one batched program; by default wherever ``vmap`` takes the backbone, else the clients are
    trained one after another and a warning says why. ``compile`` gives that program to ``torch.compile``: seconds at
    first for each new combination of shapes, less for every step (``benchmarks/engine_compile.py``).
    ``autocast=torch.bfloat16`` computes in bf16 where that is safe.

    Raises ``DivergedError`` (a ``ValueError``) naming the client and the step when a loss is not finite; the result for
    the other clients is in its ``trained``.
    """
    clients, seed = len(split), [seed] if isinstance(seed, int) else list(seed)
    first, alone = next(iter(adapted.initial.values())), in_precision(adapted, autocast)
    flat, like = flatten(adapters).detach().to(first.dtype), {name: tensor[0] for name, tensor in adapters.items()}
    if len(flat) != clients:
        raise ValueError(f"{len(flat)} adapters for {clients} clients")
    state = OptimizerState.zeros(flat) if state is None else state.rows(torch.arange(clients))  # a copy
    device, curves = first.device, first.new_zeros(clients, steps, device=flat.device)
    fixed = {name: tensor.detach() for name, tensor in (fixed or {}).items()}
    at_once, chunks = plan(
        adapted, lambda tensors, x: objective(lambda adapter: alone(adapter, x).sum(), tensors), adapters | fixed,
        split.x,
        batch_size=batch_size, backward=True, at_once=at_once, chunk_size=chunk_size, memory=memory,
        known=f"loss in {autocast}" if objective is plain_loss else None,
    )  # fmt: skip
    forward = in_precision(grouped(adapted), autocast) if at_once and not compile else alone
    losses_of = compiled_losses() if at_once and compile else losses
    bar = tqdm(total=steps * clients, disable=not progress, unit="step", desc="training")
    for chunk in chunks:
        part = split.rows(chunk).to(device)
        index = torch.stack(
            [batch_indices(n, start, steps, batch_size, [*seed, i]) for n, i in zip(part.sizes.tolist(), part.ids)]
        ).to(device)  # (K, steps, B)
        row = torch.arange(len(part), device=device).unsqueeze(1)
        still = {name: tensor[chunk].to(device) for name, tensor in fixed.items()}
        now, past, curve = flat[chunk].to(device), state.rows(chunk).to(device), []
        for step in range(steps):
            x, y = part.x[row, index[:, step]], part.y[row, index[:, step]]  # (K, B, ...), (K, B)
            now = now.requires_grad_()
            value = losses_of(forward, unflatten(now, like) | still, x, y, loss, objective, at_once=at_once)
            (grad,) = torch.autograd.grad(value.sum(), now)
            if clip is not None:
                grad = grad * (clip / (grad.norm(dim=1, keepdim=True) + 1e-6)).clamp_max(1)  # as clip_grad_norm_ does
            now, past = adamw_step(now.detach(), grad, past, lr, weight_decay)
            curve.append(value.detach())
            bar.update(len(part))
        flat[chunk] = now.to(flat.device)  # in place: all clients' results exist once
        for kept, new in zip((state.mean, state.square, state.steps), (past.mean, past.square, past.steps)):
            kept[chunk] = new.to(kept.device)
        if curve:
            curves[chunk] = torch.stack(curve, dim=1).to(flat.device)
    bar.close()
    stack = {name: tensor.to(like[name].dtype) for name, tensor in unflatten(flat, like).items()}
    return _finite(Trained(stack, state, curves), split.ids, start)


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

    It is the oracle that ``train`` is tested against. The optimiser state it returns is empty. Raises ``DivergedError``
    as ``train`` does.
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
            curves.append(torch.stack(curve) if curve else y.new_zeros(0, dtype=next(iter(adapters.values())).dtype))
    finally:
        model.requires_grad_(False)
        set_peft_model_state_dict(model, adapted.initial)
    stack = stack_adapters(trained)
    return _finite(Trained(stack, OptimizerState.zeros(flatten(stack)), torch.stack(curves)), split.ids, start)


@torch.no_grad()
def evaluate(
    adapted: AdaptedBackbone,
    adapters: Adapter,
    split: Split,
    *,
    batch_size: int = 128,
    chunk_size: int | None = None,
    memory: float | None = None,
    at_once: bool | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (nats) and accuracy (a fraction), ``(C,)`` each, of each client's adapter on its own.

    ``chunk_size``, ``memory``, ``at_once`` and ``autocast`` are those of ``train``.
    """
    if len(next(iter(adapters.values()))) != len(split):
        raise ValueError(f"{len(next(iter(adapters.values())))} adapters for {len(split)} clients")
    device, alone, totals = next(iter(adapted.initial.values())).device, in_precision(adapted, autocast), []
    at_once, chunks = plan(
        adapted, alone, adapters, split.x,
        batch_size=min(batch_size, split.y.shape[1]), backward=False, at_once=at_once, chunk_size=chunk_size,
        memory=memory, known=f"logits in {autocast}",
    )  # fmt: skip
    forward = in_precision(grouped(adapted), autocast) if at_once else alone
    for chunk in chunks:
        part, some = split.rows(chunk).to(device), {name: tensor[chunk].to(device) for name, tensor in adapters.items()}
        total = torch.zeros(2, len(part), device=device, dtype=torch.float64)
        for x, y in zip(part.x.split(batch_size, dim=1), part.y.split(batch_size, dim=1)):
            logits = each(forward, some, x, at_once=at_once)  # (K, B, classes)
            total[0] += F.cross_entropy(logits.transpose(1, 2), y, reduction="none").sum(1)  # padding has label -100
            total[1] += (logits.argmax(-1) == y).sum(1)
        totals.append(total / part.sizes.to(total))
    loss, accuracy = torch.cat(totals, dim=1)
    return loss, accuracy
