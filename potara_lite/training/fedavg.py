"""Federated LoRA: rounds of local training, and what they cost each client in bytes and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Annotated

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
    bytes_by_rank,
    check_adapter,
    check_models,
    count_clients,
    cut_ranks,
    flatten,
    repeat_adapter,
)
from ..checks import AnyList, Count, Flag, List, Numbers, PathLike, Seed, Share, Size, check_free, checked
from ..federation.display import displayed, megabytes, span
from ..federation.split import Split
from ..files import FileError
from .checkpoint import rounds_on_disk
from .history import Callback, History
from .train import OptimizerState, evaluate, for_each_client, mean_course, train

if TYPE_CHECKING:
    import pandas as pd

Costs = Annotated[Tensor, Numbers("C|rounds C", whole=True, least=0)]
Rows = Annotated[Tensor, Numbers("K", whole=True, least=0)]  # of some clients
Paid = Count | Rows


@displayed
@checked
@dataclass(frozen=True, eq=False)
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
    def add(self, clients: Rows, *, up: Paid = 0, down: Paid = 0, steps: Paid = 0) -> Ledger:
        """The ledger after these clients sent ``up`` bytes, received ``down`` bytes and took ``steps`` steps: each as
        many, or each its own number ``(K,)``."""
        columns = ((self.up, up), (self.down, down), (self.steps, steps))
        return Ledger(*(column.index_add(0, clients, torch.as_tensor(n).expand(len(clients))) for column, n in columns))

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

    def to_frame(self) -> pd.DataFrame:
        """A row for each client, or of a ledger by round for each round and client."""
        import pandas as pd

        columns = {name: column.reshape(-1).numpy() for name, column in vars(self).items()}
        clients = self.up.shape[-1]
        frame = pd.DataFrame(columns | {"client": np.arange(len(columns["up"])) % clients})
        if self.up.dim() == 2:
            frame["round"] = 1 + np.arange(len(frame)) // clients
        return frame

    def _title(self) -> str:
        total = self if self.up.dim() == 1 else self.total()
        rounds = "" if self.up.dim() == 1 else f" by round, {len(self.up) - 1} rounds;"
        up, down = (megabytes(column.double().mean()) for column in (total.up, total.down))
        return f"{total.up.numel()} clients;{rounds} each {up} up, {down} down, {span(total.steps)} steps"

    def _columns(self) -> dict[str, Tensor]:
        total = self if self.up.dim() == 1 else self.total()
        return {"bytes up": total.up, "bytes down": total.down, "steps": total.steps}

    def total(self) -> Ledger:
        """Of a ledger by round: what each client paid in all."""
        return Ledger(self.up.sum(0), self.down.sum(0), self.steps.sum(0))


TRAINING_DEFAULTS = {  # of the options that ``fedit`` passes on to ``train``
    name: one.default
    for name, one in signature(train).parameters.items()
    if one.default is not one.empty
    and name not in ("seed", "start", "state", "progress", "eval_split", "eval_every", "callbacks")
}


@displayed
@dataclass(frozen=True, eq=False)
class Federated:
    """The federated adapter (no client dimension), the ledger in all and by round, each round's mean training loss per
    client ``(rounds, C)``, NaN where a client did not take part, the clients' optimiser state to go on from, and the
    ``history``: a row for each round and client, with the bytes since the beginning."""

    adapter: Adapter
    ledger: Ledger
    by_round: Ledger
    losses: Tensor
    state: OptimizerState
    history: pd.DataFrame

    def _title(self) -> str:
        size = f"an adapter of {adapter_bytes(self.adapter):,} bytes"
        return f"{len(self.losses)} rounds{mean_course(self.losses)}; {size}; {self.ledger._title()}"

    def _columns(self) -> dict[str, Tensor]:
        return self.ledger._columns()


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
    local_steps: Count | List[Count],
    participation: Share = 1.0,
    ranks: List[Size] | None = None,
    keep_optimizer: Flag = True,
    adapter: OneAdapter | None = None,
    start: Count = 0,
    state: OptimizerState | None = None,
    seed: Seed = 0,
    eval_split: Split | None = None,
    eval_every: Size = 1,
    callbacks: AnyList[Callback] = (),
    progress: Flag = False,
    checkpoint: PathLike | None = None,
    **training,
) -> Federated:
    """FedIT (Zhang et al., 2024): FedAvg over the LoRA factors and the head, weighted by the clients' sizes.

    Each round the participants download the adapter, take ``local_steps`` steps (or each its own number of a list, such
    as that of ``epoch_steps``) and upload theirs; at the end every client downloads the result. ``keep_optimizer``:
    each client goes on with the AdamW state of its last round (it stays with the client and costs no bytes); otherwise
    every round starts with a new state. ``ranks``: one for each client, at most the configuration's; a client
    downloads, trains and uploads that many, the others are zeros in the mean (the zero-padding of HetLoRA, Cho et al.,
    2024, arXiv 2401.06432, without its weights and pruning), and ``cut_ranks`` gives the clients' models. ``training``
    goes to ``train`` (lr, batch_size, clip, execution, …). ``adapter``, ``state`` and ``start`` (the rounds already
    done) continue an earlier run. Every ``eval_every`` rounds and at the end the model is evaluated on every client of
    ``eval_split``, which changes nothing in the training; the numbers are in the ``history`` of the result, of which
    each of the ``callbacks`` gets the new rows after each round. The model is the same to the last bit in whatever
    order the clients are. With one client and the optimiser kept, this is local training. ``run_algorithm(FEDIT, ...)``
    of ``baselines`` is the same method as a declaration beside the others; this function can continue a run.

    ``checkpoint``: a folder that always has the last whole round. The same call goes on from it after a kill or Ctrl-C,
    to the same result bit by bit, as does one with more ``rounds``; one with other arguments is refused by a
    ``FileError`` that says which. The history has no evaluations of the rounds from before.
    """
    check_free("fedit", training, "adapters steps")
    check_models(adapted, split)
    adapter = check_adapter(adapted, adapted.initial if adapter is None else adapter)
    clients = len(split)
    steps_of = torch.tensor(for_each_client("local_steps", local_steps, clients))
    flat = flatten(repeat_adapter(adapter, clients))
    state = OptimizerState.zeros(flat) if state is None else state
    state.check(*flat.shape)
    message_bytes = torch.full((clients,), adapter_bytes(adapter))
    if ranks is not None:
        cut_ranks(repeat_adapter(adapter, clients), ranks)  # raises where they do not fit
        message_bytes = bytes_by_rank(adapter, ranks)
    if eval_split is not None:
        check_models(adapted, eval_split)
    how = {"execution": training["execution"]} if "execution" in training else {}
    history = History(split.ids, eval_split, eval_every, callbacks)
    by_round, losses = [], []
    made_with = dict(local_steps=local_steps, participation=participation, keep_optimizer=keep_optimizer, start=start)
    made_with |= dict(seed=seed, ranks=ranks) | TRAINING_DEFAULTS | training
    kept = rounds_on_disk(checkpoint, adapted, split, adapter, state, **made_with)
    paid = Ledger.zeros(clients)
    if (found := kept.read()) is not None:
        adapter, state, by_round, losses = _go_on(*found, adapted, rounds)
        for number, (now, loss) in enumerate(zip(by_round, losses), start):
            paid = paid + now
            history.add(round=number + 1, train_loss=loss, **_paid_so_far(paid))
    bar = tqdm(range(start + len(losses), start + rounds), disable=not progress, unit="round", desc="federated")
    for number in bar:
        rows = participants(split.ids, participation, seed, number).tolist()
        rows.sort(key=split.ids.__getitem__)  # sums of floats depend on the clients' order
        part = split.rows(rows)
        index = torch.tensor(rows)
        start_stack = repeat_adapter(adapter, len(rows))
        trained = train(
            adapted,
            start_stack if ranks is None else cut_ranks(start_stack, [ranks[row] for row in rows]),
            part,
            steps=steps_of[index].tolist(),
            start=(number * steps_of[index]).tolist(),
            state=state.rows(index) if keep_optimizer else None,
            seed=(seed, 0),
            **training,
        )
        adapter = weighted_average(trained.adapters, part.sizes)
        if keep_optimizer:
            state = state.replace_rows(index, trained.state)
        paid_now = dict(up=message_bytes[index], down=message_bytes[index], steps=steps_of[index])
        by_round.append(Ledger.zeros(clients).add(index, **paid_now))
        of_round = torch.full((clients,), torch.nan, dtype=torch.float32)
        losses.append(of_round.index_copy(0, index, trained.losses.nanmean(1).float().cpu()))
        paid = paid + by_round[-1]
        is_due = history.is_due(number + 1, start + rounds)
        everyone = repeat_adapter(adapter, clients)
        models = everyone if ranks is None else cut_ranks(everyone, ranks)
        measure = partial(evaluate, adapted, models, **how) if is_due else None
        bar.set_postfix(history.add(measure, round=number + 1, train_loss=losses[-1], **_paid_so_far(paid)))
        kept.write(adapter, state, vars(Ledger.by_round(by_round)) | {"losses": torch.stack(losses)})
    last_download = Ledger.zeros(clients).add(torch.arange(clients), down=message_bytes)
    ledger = Ledger.by_round([*by_round, last_download])
    all_losses = torch.stack(losses) if losses else torch.zeros(0, clients)
    return Federated(adapter, ledger.total(), ledger, all_losses, state, history.table())


def _paid_so_far(paid: Ledger) -> dict[str, Tensor]:
    return dict(step=paid.steps, bytes_up=paid.up, bytes_down=paid.down)


def _go_on(
    adapter: Adapter, state: OptimizerState, columns: Mapping[str, Tensor], adapted: AdaptedBackbone, rounds: int
) -> tuple[Adapter, OptimizerState, list[Ledger], list[Tensor]]:
    """A checkpoint's adapter and state where they compute, and its rounds one by one."""
    losses = list(columns["losses"])
    if len(losses) > rounds:
        raise FileError(f"checkpoint holds {len(losses)} rounds, more than rounds={rounds}")
    ledgers = [Ledger(*row) for row in zip(columns["up"], columns["down"], columns["steps"])]
    on_device = {name: tensor.to(adapted.device) for name, tensor in adapter.items()}
    return on_device, state.to(adapted.device), ledgers, losses
