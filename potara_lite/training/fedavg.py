"""Federated LoRA: rounds of local training on top of the engine, what travels, and what it weighs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, adapter_bytes, door, flatten, numbers, repeat_adapter
from ..checks import check_fields, kind, options_of, several, unchecked, whole
from ..federation.split import Split
from .train import OptimizerState, train


@dataclass(frozen=True)
class Ledger:
    """What each client paid, ``(C,)`` each: bytes up and down, optimiser steps. By round: ``(rounds + 1, C)`` each.

    The last row of a ledger by round is what comes after the last round: the final download, and steps of fine-tuning.
    """

    up: Tensor
    down: Tensor
    steps: Tensor

    def __post_init__(self):
        check_fields(self, **dict.fromkeys(("up", "down", "steps"), numbers(1, 2, whole=True, least=0)))
        if len({tuple(column.shape) for column in (self.up, self.down, self.steps)}) > 1:
            shapes = [tuple(column.shape) for column in (self.up, self.down, self.steps)]
            raise ValueError(f"up, down and steps must be of one shape, not {shapes}")

    @staticmethod
    @door()
    def zeros(clients: int) -> Ledger:
        return Ledger(*(torch.zeros(clients, dtype=torch.int64) for _ in range(3)))

    @door(clients=numbers(1, whole=True, least=0))
    def add(self, clients: Tensor, *, up: int = 0, down: int = 0, steps: int = 0) -> Ledger:
        """The ledger after these clients sent ``up`` bytes, received ``down`` bytes and took ``steps`` steps each."""
        columns = ((self.up, up), (self.down, down), (self.steps, steps))
        return Ledger(*(column.index_add(0, clients, torch.full_like(clients, n)) for column, n in columns))

    def __add__(self, other: Ledger) -> Ledger:
        if kind("Ledger")("other", other, {}).up.shape != self.up.shape:
            raise ValueError(f"ledgers of shapes {tuple(self.up.shape)} and {tuple(other.up.shape)} cannot be added")
        return Ledger(self.up + other.up, self.down + other.down, self.steps + other.steps)

    @staticmethod
    @door(rounds=several(kind("Ledger")))
    def by_round(rounds: Sequence[Ledger]) -> Ledger:
        """The ledgers of single rounds as one, with the rounds on dim 0."""
        return Ledger(*(torch.stack(columns) for columns in zip(*(vars(one).values() for one in rounds))))

    def total(self) -> Ledger:
        """Of a ledger by round: what each client paid in all."""
        return Ledger(self.up.sum(0), self.down.sum(0), self.steps.sum(0))


@dataclass(frozen=True)
class Federated:
    """The federated adapter (no client dimension), the ledger in all and by round, each round's mean training loss per
    client ``(rounds, C)``, NaN where a client sat a round out, and the clients' optimiser state to go on from."""

    adapter: Adapter
    ledger: Ledger
    by_round: Ledger
    losses: Tensor
    state: OptimizerState


@door(weights=numbers(1, least=0))
def weighted_average(stack: Adapter, weights: Tensor) -> Adapter:
    """The weighted mean over the clients, tensor by tensor: FedAvg (McMahan et al., 2017) on the factors and the head.

    The mean of the factors is not the mean of the deltas: ``mean(B) mean(A) != mean(B A)``. Raises ``ValueError``
    unless there is a weight of 0 or more for every client, and one above 0.
    """
    if len(weights) != (clients := len(next(iter(stack.values())))) or not weights.any():
        raise ValueError(f"weights must be one for each of {clients} clients, not all 0: {weights.tolist()}")
    share = (weights.double() / weights.double().sum()).to(next(iter(stack.values())).device)
    return {name: torch.einsum("c,c...->...", share.to(tensor.dtype), tensor) for name, tensor in stack.items()}


@door(ids=several(whole(0)))
def participants(ids: Sequence[int], participation: float, seed: int, number: int) -> Tensor:
    """The rows of the clients that take part in round ``number``: a fixed share of them, drawn for each round.

    Each client draws a lot of its own, ``(seed, round, id)``, so who takes part does not depend on the clients' order.
    Raises ``ValueError`` for a ``participation`` outside (0, 1].
    """
    lots = [np.random.default_rng([seed, 1, number, i]).random() for i in ids]
    return torch.from_numpy(np.sort(np.argsort(lots)[: max(1, round(participation * len(ids)))]))


@door(training=options_of(train))
def fedit(
    adapted: AdaptedBackbone,
    split: Split,
    *,
    rounds: int,
    local_steps: int,
    participation: float = 1.0,
    keep_optimizer: bool = True,
    adapter: Adapter | None = None,
    start: int = 0,
    state: OptimizerState | None = None,
    seed: int = 0,
    progress: bool = False,
    **training,
) -> Federated:
    """FedIT (Zhang et al., 2024): FedAvg over the LoRA factors and the head, weighted by the clients' sizes.

    Each round the participants download the adapter, take ``local_steps`` steps and upload theirs; at the end every
    client downloads the result. ``keep_optimizer``: each client goes on with the AdamW state of its own last round (it
    stays with the client and costs no bytes); otherwise every round starts afresh. ``training`` goes to ``train`` (lr,
    batch_size, clip, execution, …). ``adapter``, ``state`` and ``start`` (the rounds already behind) go on with an
    earlier run. In whatever order the clients stand, the model is the same to the last bit. With one client and the
    optimiser kept, this is local training. ``field`` has the same method as a declaration beside the others,
    ``run_algorithm(FEDIT, ...)``; this function can go on with a run.
    """
    adapter, clients = adapted.initial if adapter is None else adapter, len(split)
    message_bytes, by_round, history = adapter_bytes(adapter), [], []
    state = OptimizerState.zeros(flatten(repeat_adapter(adapter, clients))) if state is None else state
    for number in tqdm(range(start, start + rounds), disable=not progress, unit="round", desc="federated"):
        chosen = sorted(participants(split.ids, participation, seed, number).tolist(), key=split.ids.__getitem__)
        chosen = torch.tensor(chosen)  # by their ids: sums of floats depend on the order
        part = split.rows(chosen.tolist())
        result = unchecked(train)(
            adapted,
            repeat_adapter(adapter, len(chosen)),
            part,
            steps=local_steps,
            start=number * local_steps,
            state=state.rows(chosen) if keep_optimizer else None,
            seed=(seed, 0),
            **training,
        )
        adapter = unchecked(weighted_average)(result.adapters, part.sizes)
        if keep_optimizer:
            state = state.replace_rows(chosen, result.state)
        by_round.append(Ledger.zeros(clients).add(chosen, up=message_bytes, down=message_bytes, steps=local_steps))
        history.append(torch.full((clients,), torch.nan).index_copy(0, chosen, result.losses.mean(1).float().cpu()))
    last_download = Ledger.zeros(clients).add(torch.arange(clients), down=message_bytes)
    ledger = Ledger.by_round([*by_round, last_download])
    losses = torch.stack(history) if history else torch.zeros(0, clients)
    return Federated(adapter, ledger.total(), ledger, losses, state)
