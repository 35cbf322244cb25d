"""Federated LoRA: rounds of local training, and what they cost each client in bytes and steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import (
    Adapter,
    OneAdapter,
    Stack,
    adapter_bytes,
    check_adapter,
    check_models,
    count_clients,
    flatten,
    repeat_adapter,
)
from ..checks import Count, Flag, List, Numbers, Seed, Share, Size, checked
from ..federation.split import Split
from .train import OptimizerState, train

Costs = Annotated[Tensor, Numbers("C|rounds C", whole=True, least=0)]
Rows = Annotated[Tensor, Numbers("K", whole=True, least=0)]  # of some clients


@checked
@dataclass(frozen=True)
class Ledger:
    """What each client paid, ``(C,)`` each: bytes up and down, optimiser steps. By round: ``(rounds + 1, C)`` each.

    The last row of a ledger by round is what comes after the last round: the final download, and steps of fine-tuning.
    """

    up: Costs
    down: Costs
    steps: Costs

    def __post_init__(self):
        shapes = [tuple(column.shape) for column in vars(self).values()]
        if len(set(shapes)) > 1:
            raise ValueError(f"up, down and steps must be of one shape, not {shapes}")

    @staticmethod
    @checked
    def zeros(clients: Size) -> Ledger:
        return Ledger(*torch.zeros(3, clients, dtype=torch.int64))

    @checked
    def add(self, clients: Rows, *, up: Count = 0, down: Count = 0, steps: Count = 0) -> Ledger:
        """The ledger after these clients sent ``up`` bytes, received ``down`` bytes and took ``steps`` steps each."""
        columns = ((self.up, up), (self.down, down), (self.steps, steps))
        return Ledger(*(column.index_add(0, clients, torch.full_like(clients, n)) for column, n in columns))

    @checked
    def __add__(self, other: Ledger) -> Ledger:
        if other.up.shape != self.up.shape:
            raise ValueError(f"ledgers of shapes {tuple(self.up.shape)} and {tuple(other.up.shape)} cannot be added")
        return Ledger(self.up + other.up, self.down + other.down, self.steps + other.steps)

    @staticmethod
    @checked
    def by_round(rounds: List[Ledger]) -> Ledger:
        """The ledgers of single rounds as one, with the rounds on dim 0."""
        return Ledger(*(torch.stack(columns) for columns in zip(*(vars(one).values() for one in rounds))))

    def total(self) -> Ledger:
        """Of a ledger by round: what each client paid in all."""
        return Ledger(self.up.sum(0), self.down.sum(0), self.steps.sum(0))


@dataclass(frozen=True)
class Federated:
    """The federated adapter (no client dimension), the ledger in all and by round, each round's mean training loss per
    client ``(rounds, C)``, NaN where a client did not take part, and the clients' optimiser state to go on from."""

    adapter: Adapter
    ledger: Ledger
    by_round: Ledger
    losses: Tensor
    state: OptimizerState


@checked
def weighted_average(stack: Stack, weights: Annotated[Tensor, Numbers("C", least=0)]) -> Adapter:
    """The weighted mean over the clients, tensor by tensor: FedAvg (McMahan et al., 2017) on the factors and the head.

    The mean of the factors is not the mean of the deltas: ``mean(B) mean(A) != mean(B A)``. Raises ``ValueError``
    unless there is a weight of 0 or more for every client, and one above 0.
    """
    if len(weights) != (clients := count_clients(stack)) or not weights.any():
        raise ValueError(f"weights must be one for each of {clients} clients, not all 0: {weights.tolist()}")
    shares = (weights.double() / weights.double().sum()).to(next(iter(stack.values())).device)
    return {name: torch.einsum("c,c...->...", shares.to(tensor.dtype), tensor) for name, tensor in stack.items()}


@checked
def participants(ids: List[Count], participation: Share, seed: Seed, number: Count) -> Tensor:
    """The rows of the clients that take part in round ``number``: a fixed share of them, drawn for each round.

    Each client has a sampling key that depends on ``(seed, round, id)`` alone, and those with the smallest keys take
    part. So the participants do not depend on the clients' order.
    """
    keys = [np.random.default_rng([seed, 1, number, i]).random() for i in ids]
    return torch.from_numpy(np.sort(np.argsort(keys)[: max(1, round(participation * len(ids)))]))


@checked
def fedit(
    adapted: AdaptedBackbone,
    split: Split,
    *,
    rounds: Count,
    local_steps: Count,
    participation: Share = 1.0,
    keep_optimizer: Flag = True,
    adapter: OneAdapter | None = None,
    start: Count = 0,
    state: OptimizerState | None = None,
    seed: Seed = 0,
    progress: Flag = False,
    **training,
) -> Federated:
    """FedIT (Zhang et al., 2024): FedAvg over the LoRA factors and the head, weighted by the clients' sizes.

    Each round the participants download the adapter, take ``local_steps`` steps and upload theirs; at the end every
    client downloads the result. ``keep_optimizer``: each client goes on with the AdamW state of its last round (it
    stays with the client and costs no bytes); otherwise every round starts with a new state. ``training`` goes to
    ``train`` (lr, batch_size, clip, execution, …). ``adapter``, ``state`` and ``start`` (the rounds already done)
    continue an earlier run. The model is the same to the last bit in whatever order the clients are. With one client
    and the optimiser kept, this is local training. ``run_algorithm(FEDIT, ...)`` of ``baselines`` is the same method as
    a declaration beside the others; this function can continue a run.
    """
    check_models(adapted, split)
    adapter = check_adapter(adapted, adapted.initial if adapter is None else adapter)
    clients = len(split)
    flat = flatten(repeat_adapter(adapter, clients))
    state = OptimizerState.zeros(flat) if state is None else state
    state.check(*flat.shape)
    message_bytes = adapter_bytes(adapter)
    by_round, losses = [], []
    for number in tqdm(range(start, start + rounds), disable=not progress, unit="round", desc="federated"):
        rows = participants(split.ids, participation, seed, number).tolist()
        rows.sort(key=split.ids.__getitem__)  # sums of floats depend on the clients' order
        part = split.rows(rows)
        index = torch.tensor(rows)
        trained = train(
            adapted,
            repeat_adapter(adapter, len(rows)),
            part,
            steps=local_steps,
            start=number * local_steps,
            state=state.rows(index) if keep_optimizer else None,
            seed=(seed, 0),
            **training,
        )
        adapter = weighted_average(trained.adapters, part.sizes)
        if keep_optimizer:
            state = state.replace_rows(index, trained.state)
        by_round.append(Ledger.zeros(clients).add(index, up=message_bytes, down=message_bytes, steps=local_steps))
        of_round = torch.full((clients,), torch.nan, dtype=torch.float32)
        losses.append(of_round.index_copy(0, index, trained.losses.mean(1).float().cpu()))
    last_download = Ledger.zeros(clients).add(torch.arange(clients), down=message_bytes)
    ledger = Ledger.by_round([*by_round, last_download])
    all_losses = torch.stack(losses) if losses else torch.zeros(0, clients)
    return Federated(adapter, ledger.total(), ledger, all_losses, state)
