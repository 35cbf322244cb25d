"""Rounds of any federated algorithm: what its clients hold, train, send and receive, and what it costs them.

A client *holds* a dictionary of tensors. Plain names are the adapter that it shares, or its only one. Further tensors
have a prefix: ``personal:`` (a second adapter, which stays with the client), ``global_reference:`` (the shared adapter
as it was received), ``merged_residual:`` (what was merged into the frozen weights) and so on. ``run_algorithm``
runs the rounds of any ``Algorithm``:

1. *down*: every participant takes the message (``tensors | message``), then ``on_receive``;
2. *train*: the phases, one after another, each with its tensors, its objective and its part of the local steps;
3. *up*: every participant sends the tensors that are uploaded; the server aggregates them into the next message.

The first message has the initial values of what is uploaded; the last one, which all clients get, is the result.
Every optimiser is AdamW. The methods themselves are declared in ``algorithms.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.lora import AdaptedBackbone, delta_added
from ..adapters.state import (
    Adapter,
    adapter_bytes,
    check_models,
    client_adapter,
    count_clients,
    delta,
    flatten,
    is_lora,
    repeat_adapter,
    select_clients,
)
from ..checks import AnyList, Count, Flag, Fraction, List, Seed, Share, Size, check_free, checked
from ..experiment import Result, Run, training_options
from ..federation.display import displayed
from ..federation.split import Split
from ..merging.merge import merge_exact
from ..training.fedavg import Ledger, participants, weighted_average
from ..training.history import Callback, History
from ..training.train import Objective, OptimizerState, check_labels, evaluate, for_each_client, train
from .privacy import Privacy, private_average

if TYPE_CHECKING:
    import pandas as pd

NameFilter = Callable[[str], bool]


def is_shared(name: str) -> bool:
    """A tensor with a plain name: of the shared (or only) adapter."""
    return ":" not in name


def is_head(name: str) -> bool:
    """A directly trained tensor of the shared (or only) adapter."""
    return is_shared(name) and not is_lora(name)


def select_prefix(tensors: Adapter, prefix: str = "") -> Adapter:
    """The adapter that a client holds under ``prefix``; without one, the shared adapter."""
    if not prefix:
        return {name: tensor for name, tensor in tensors.items() if is_shared(name)}
    return {n.removeprefix(f"{prefix}:"): tensor for n, tensor in tensors.items() if n.startswith(f"{prefix}:")}


def add_prefix(prefix: str, adapter: Adapter) -> Adapter:
    """The adapter's tensors under ``prefix``: the inverse of ``select_prefix``."""
    return {f"{prefix}:{name}": tensor for name, tensor in adapter.items()}


def fedavg(stack: Adapter, sizes: Tensor) -> Adapter:
    """The message of FedAvg: for every client the mean weighted by sizes."""
    return repeat_adapter(weighted_average(stack, sizes), len(sizes))


def first_client(stack: Adapter) -> Adapter:
    """The shared adapter out of stacks in which all clients hold the same."""
    return client_adapter(select_prefix(stack), 0)


def message_bytes(message: Adapter, clients: int) -> Tensor:
    """The bytes of each client's part of a message (a stack), ``(C,)``, in the dtypes that its tensors have."""
    return torch.full((clients,), adapter_bytes(client_adapter(message, 0)), dtype=torch.int64)


@checked
@dataclass(frozen=True)
class Phase:
    """A part of a round's local training.

    ``is_trained``: the tensors that train in it. ``objective(f, tensors)``: their loss, where ``f`` is the loss of an
    adapter on the batch; by default ``f`` of the algorithm's personal model. ``steps``: how many steps it takes of a
    round's local steps. ``models``: how many models take an optimiser step in each of them.
    """

    is_trained: NameFilter = is_shared
    objective: Objective | None = None
    steps: Callable[[int], int] = lambda steps: steps
    models: Size = 1


@checked
@dataclass(frozen=True)
class Algorithm:
    """A method: what its clients hold, train, send and receive, and which of their models is evaluated.

    Stacks have the clients in the order of their ids, which may differ from the split's.

    ``init``: from the stack of initial adapters to what the clients hold. ``phases``: the local training.
    ``is_uploaded``: the tensors that clients send. ``aggregate(stack, sizes)``: from what they sent to the next
    message, a row per client. ``on_receive(tensors, number)``: what a client does after message ``number`` has replaced
    the tensors that it names. ``personal_model``: from what the clients hold to the models that are evaluated, a stack;
    it also takes one client's tensors. ``federated_model``: the same for the model of the federation, if there is one.
    ``backbone``: what runs the models. ``keep_optimizer``: AdamW's state outlives the round. ``frozen``: an adapter,
    the same for all, that is in the frozen weights while the phases train. ``finetune_steps``: local steps after the
    last round. ``wise_ft_weight``: the weight that the model before these steps has in the result. ``message_bytes``:
    the bytes of a message to or from each client. ``broadcast_to_all``: a client needs every message, because what it
    holds is their sum, so those who skip a round get its message, too. ``privacy``: the mean is that of
    ``private_average`` instead of FedAvg's.

    Raises ``ValueError`` for privacy with another aggregate than FedAvg.
    """

    name: str
    init: Callable[[Adapter], Adapter] = lambda stack: stack
    phases: Annotated[List[Phase], AfterValidator(tuple)] = (Phase(),)
    is_uploaded: NameFilter = lambda name: False
    aggregate: Callable[[Adapter, Tensor], Adapter] = fedavg
    on_receive: Callable[[Adapter, int], Adapter] = lambda tensors, number: tensors
    personal_model: Callable[[Adapter], Adapter] = select_prefix
    federated_model: Callable[[Adapter], Adapter] | None = None
    backbone: Callable[[AdaptedBackbone], AdaptedBackbone] = lambda adapted: adapted
    keep_optimizer: Flag = True
    frozen: Callable[[Adapter], Adapter] = lambda tensors: {}
    finetune_steps: Count = 0
    wise_ft_weight: Fraction = 0.0
    message_bytes: Callable[[Adapter, int], Tensor] = message_bytes
    broadcast_to_all: Flag = False
    privacy: Privacy | None = None

    def __post_init__(self):
        if self.privacy is not None and self.aggregate is not fedavg:
            raise ValueError(f"{self.name}: noise is for the mean of FedAvg, this method has another aggregate")

    def upload(self, tensors: Adapter) -> Adapter:
        """What clients send of the tensors that they hold."""
        return {name: tensor for name, tensor in tensors.items() if self.is_uploaded(name)}

    def trained(self, phase: int, tensors: Adapter) -> Adapter:
        """What a phase trains of the tensors that clients hold. Raises ``ValueError`` if that is nothing."""
        selected = {name: tensor for name, tensor in tensors.items() if self.phases[phase].is_trained(name)}
        if not selected:
            raise ValueError(f"{self.name}: phase {phase} trains none of {sorted(tensors)}")
        return selected

    def new_optimizers(self, tensors: Adapter) -> list[OptimizerState]:
        """The optimiser state of every phase before its first step."""
        return [OptimizerState.zeros(flatten(self.trained(i, tensors))) for i in range(len(self.phases))]

    def bytes_of(self, message: Adapter, rows: Tensor, clients: int) -> Tensor:
        """The bytes of a message to or from the clients in these rows, for all ``clients``: ``(C,)``."""
        sizes = self.message_bytes(message, len(rows)) if message else torch.zeros_like(rows)
        return torch.zeros(clients, dtype=torch.int64).index_copy(0, rows, sizes)

    def local_cost(self, steps: int) -> int:
        """The optimiser steps that ``steps`` local steps of a round are, all phases and models counted."""
        return sum(phase.steps(steps) * phase.models for phase in self.phases)

    def __call__(self, run: Run, lr_scale: float = 1.0) -> Result:
        """The algorithm as a method of the comparison: it has as many rounds as the run's steps allow, and
        ``lr_scale`` times its learning rate. Raises ``ValueError`` where whole rounds do not add up to the budget."""
        setting = run.setting
        round_cost = self.local_cost(setting.round_steps)
        rounds, rest = divmod(setting.total_steps - self.local_cost(self.finetune_steps), round_cost)
        if rounds < 0 or rest:
            raise ValueError(f"{self.name}: rounds of {round_cost} steps do not make {setting.total_steps}")
        began = time.perf_counter()
        options = training_options(setting, lr_scale) | dict(seed=run.seed, rounds=rounds)
        options |= dict(local_steps=setting.round_steps, participation=setting.participation)
        options |= dict(eval_split=run.eval_split, eval_every=run.eval_every)
        result = run_algorithm(self, run.adapted, run.federation.train, **options)
        seconds = time.perf_counter() - began
        return Result(result.adapted, result.personal, result.ledger, seconds, history=result.history)


@displayed
@dataclass(frozen=True, eq=False)
class Personalised:
    """What a run gives: the clients' models (a stack) and the backbone that runs them, the federation's model (no
    client dimension; ``None`` for methods without one), what each client paid in all and by round, and all the tensors
    that the clients hold. ``history``: a row for each round and client, with the bytes since the beginning."""

    adapted: AdaptedBackbone
    personal: Adapter
    federated: Adapter | None
    ledger: Ledger
    by_round: Ledger
    tensors: Adapter
    history: pd.DataFrame

    def _title(self) -> str:
        return f"{len(self.by_round.up) - 1} rounds; {self.ledger._title()}"

    def _columns(self) -> dict[str, Tensor]:
        return self.ledger._columns()

    def rows(self, index: Tensor) -> Personalised:
        """The same with its clients in the order of these rows."""
        personal = select_clients(self.personal, index)
        by_round = Ledger(self.by_round.up[:, index], self.by_round.down[:, index], self.by_round.steps[:, index])
        tensors = select_clients(self.tensors, index)
        return Personalised(self.adapted, personal, self.federated, by_round.total(), by_round, tensors, self.history)


@checked
def run_algorithm(
    algorithm: Algorithm,
    adapted: AdaptedBackbone,
    split: Split,
    *,
    rounds: Count,
    local_steps: Count | List[Count],
    participation: Share = 1.0,
    seed: Seed = 0,
    eval_split: Split | None = None,
    eval_every: Size = 1,
    callbacks: AnyList[Callback] = (),
    progress: Flag = False,
    **training,
) -> Personalised:
    """Run ``rounds`` rounds of ``local_steps`` steps, or each client its own number of a list.

    ``training`` goes to ``train`` (lr, batch_size, clip, …).

    Each phase reads the client's batch stream ``(seed, 0)`` from where the round begins, so a phase with all the steps
    of a round sees what ``fedit`` sees. ``participation``: the share of clients in each round, drawn as ``fedit`` does.
    Every ``eval_every`` rounds and at the end the clients' models, as they would be if this round were the last one,
    are evaluated on ``eval_split`` (see ``fedit``). The ledger counts the messages as they were passed, and an
    optimiser step for every model that took one. The clients' models are the same to the last bit in any order of the
    clients.

    Raises ``ValueError`` for a phase that trains none of the tensors, and for less than full participation in a method
    whose messages differ from client to client.

    >>> from potara_lite import Setting, prepare
    >>> from potara_lite.baselines.algorithms import FEDSA
    >>> adapted, federation = prepare(Setting(clients=2, train_size=8, calibration_size=4, test_size=8), seed=0)
    >>> result = run_algorithm(FEDSA, adapted, federation.train, rounds=2, local_steps=1)
    >>> result.ledger.up.tolist(), result.by_round.up[:, 0].tolist()
    ([81920, 81920], [40960, 40960, 0])
    """
    check_free("run_algorithm", training, "adapters steps start state objective fixed")
    check_models(adapted, split)
    if "loss" not in training:
        check_labels(adapted, repeat_adapter(adapted.initial, 1), split)
    by_id = sorted(range(len(split)), key=split.ids.__getitem__)  # sums of floats depend on the clients' order
    if by_id != list(range(len(split))):
        split = split.rows(by_id)
        eval_split = eval_split and eval_split.rows(by_id)
    history = History(split.ids, eval_split, eval_every, callbacks)
    steps_of = for_each_client("local_steps", local_steps, len(split))
    local = dict(local_steps=[steps_of[row] for row in by_id], seed=seed, **training)
    options = dict(rounds=rounds, participation=participation, progress=progress)
    result = _run_rounds(algorithm, adapted, split, history=history, local=local, **options)
    return result.rows(torch.tensor(by_id).argsort())


def _run_rounds(
    algorithm: Algorithm,
    adapted: AdaptedBackbone,
    split: Split,
    *,
    rounds: int,
    participation: float,
    progress: bool,
    history: History,
    local: dict[str, Any],
) -> Personalised:
    """``run_algorithm`` with the clients in the order of their ids; ``local``: the options of ``client_step``."""
    backbone = algorithm.backbone(adapted)
    clients = len(split)
    everyone = torch.arange(clients)
    tensors = algorithm.init(repeat_adapter(adapted.initial, clients))
    optimizers = algorithm.new_optimizers(tensors)
    message = algorithm.upload(tensors)
    if participation < 1:
        message = _same_for_all(message, clients, algorithm.name)
    by_round = []
    paid = Ledger.zeros(clients)

    def measure(eval_split: Split) -> tuple[Tensor, Tensor]:
        """Of the models that clients have after the next message, or will have after their last local steps."""
        now, _ = _receive(algorithm, tensors, message, everyone, number + 1)
        how = {"execution": local["execution"]} if "execution" in local else {}
        return evaluate(backbone, algorithm.personal_model(now), eval_split, **how)

    bar = tqdm(range(rounds), disable=not progress, unit="round", desc=algorithm.name)
    for number in bar:
        rows = participants(split.ids, participation, local["seed"], number)
        # down
        receivers = everyone if algorithm.broadcast_to_all else rows
        tensors, down = _receive(algorithm, tensors, message, receivers, number)
        # train
        part = split if len(rows) == clients else split.rows(rows.tolist())
        states = [state.rows(rows) for state in optimizers]
        mine = select_clients(tensors, rows)
        steps = [local["local_steps"][row] for row in rows.tolist()]
        options = local | dict(number=number, local_steps=steps)
        mine, states, losses = client_step(algorithm, backbone, part, mine, states, **options)
        tensors = _replace_clients(tensors, rows, mine)
        optimizers = [old.replace_rows(rows, new) for old, new in zip(optimizers, states)]
        # up
        uploads = algorithm.upload(mine)
        message = server_step(algorithm, uploads, part.sizes, clients, sent=message, number=number)
        up = algorithm.bytes_of(uploads, rows, clients)
        costs = torch.tensor([algorithm.local_cost(one) for one in steps])
        by_round.append(Ledger(up, down, 0 * up).add(rows, steps=costs))
        paid = paid + by_round[-1]
        train_loss = torch.full((clients,), torch.nan).index_copy(0, rows, losses.float().cpu())
        record = dict(round=number + 1, step=paid.steps, train_loss=train_loss, bytes_up=paid.up, bytes_down=paid.down)
        bar.set_postfix(history.add(measure if history.is_due(number + 1, rounds) else None, **record))
    tensors, down = _receive(algorithm, tensors, message, everyone, rounds)
    federated = algorithm.federated_model and algorithm.federated_model(tensors)
    personal = algorithm.personal_model(tensors)
    after_rounds = Ledger(0 * down, down, 0 * down)
    if algorithm.finetune_steps:
        tensors, personal = finetune_step(algorithm, backbone, split, tensors, personal, number=rounds, **local)
        after_rounds = after_rounds.add(everyone, steps=algorithm.local_cost(algorithm.finetune_steps))
    ledger = Ledger.by_round([*by_round, after_rounds])
    return Personalised(backbone, personal, federated, ledger.total(), ledger, tensors, history.table())


def _receive(
    algorithm: Algorithm, tensors: Adapter, message: Adapter, rows: Tensor, number: int
) -> tuple[Adapter, Tensor]:
    """What all clients hold once those in these rows have received message ``number``, and its bytes ``(C,)``."""
    received = algorithm.on_receive(select_clients(tensors | message, rows), number)
    bytes_down = algorithm.bytes_of(select_clients(message, rows), rows, count_clients(tensors))
    return _replace_clients(tensors, rows, received), bytes_down


def client_step(
    algorithm: Algorithm,
    adapted: AdaptedBackbone,
    split: Split,
    tensors: Adapter,
    optimizers: list[OptimizerState],
    *,
    number: int,
    local_steps: int | list[int],
    steps: int | None = None,
    seed: int = 0,
    **training,
) -> tuple[Adapter, list[OptimizerState], Tensor]:
    """Round ``number`` at some clients: the phases of ``local_steps`` (of ``steps``, for fine-tuning), one by one.

    ``tensors`` and ``optimizers`` are theirs; both are returned as they are afterwards, with each client's mean
    training loss ``(C,)`` over all steps. Each phase reads the client's
    batch stream ``(seed, 0)`` from where the round begins.
    """
    optimizers = list(optimizers)
    of_round = for_each_client("local_steps", local_steps, len(split))
    now = of_round if steps is None else [steps] * len(split)
    losses = []
    for i, phase in enumerate(algorithm.phases):
        moving = algorithm.trained(i, tensors)
        frozen = algorithm.frozen(tensors)
        with delta_added(adapted, delta(client_adapter(frozen, 0), adapted.scaling) if frozen else {}):
            trained = train(
                adapted,
                moving,
                split,
                steps=[phase.steps(one) for one in now],
                start=[number * phase.steps(one) for one in of_round],
                state=optimizers[i],
                seed=(seed, 0),
                objective=phase.objective or (lambda f, mine: f(algorithm.personal_model(mine))),
                fixed={name: tensor for name, tensor in tensors.items() if name not in moving},
                **training,
            )
        tensors = tensors | trained.adapters
        optimizers[i] = trained.state
        losses.append(trained.losses)
    optimizers = optimizers if algorithm.keep_optimizer else algorithm.new_optimizers(tensors)
    return tensors, optimizers, torch.cat(losses, dim=1).nanmean(1)


def server_step(
    algorithm: Algorithm, uploads: Adapter, sizes: Tensor, clients: int, *, sent: Adapter, number: int
) -> Adapter:
    """The message to all ``clients`` after round ``number``, from what those of these ``sizes`` sent and the message
    ``sent`` to them, a stack.

    Raises ``ValueError`` when some skipped the round and the message differs from client to client.
    """
    if algorithm.privacy and uploads:
        mean = private_average(uploads, client_adapter(sent, 0), algorithm.privacy, number)
        return repeat_adapter(mean, clients)
    message = algorithm.aggregate(uploads, sizes) if uploads else {}
    return message if len(sizes) == clients else _same_for_all(message, clients, algorithm.name)


def _same_for_all(message: Adapter, clients: int, name: str) -> Adapter:
    """A message to some clients, which must be the same for each, as one to all."""
    if any((tensor != tensor[:1]).any() for tensor in message.values()):
        raise ValueError(f"{name}: its messages differ from client to client, so all of them must take part")
    return select_clients(message, torch.zeros(clients, dtype=torch.int64))


def _replace_clients(tensors: Adapter, rows: Tensor, new: Adapter) -> Adapter:
    """The stacks with the rows of some clients replaced; what only these clients hold is zero for the others."""
    clients = count_clients(tensors)
    if len(rows) == clients:
        return new
    result = dict(tensors)
    for name, tensor in new.items():
        old = result.get(name, tensor.new_zeros(clients, *tensor.shape[1:]))
        result[name] = old.index_copy(0, rows.to(tensor.device), tensor)
    return result


def finetune_step(
    algorithm: Algorithm, adapted: AdaptedBackbone, split: Split, tensors: Adapter, before: Adapter, **options
) -> tuple[Adapter, Adapter]:
    """What the clients hold after their last local steps, and their models: those, or a mean of them and the models
    ``before``."""
    optimizers = algorithm.new_optimizers(tensors)
    steps = algorithm.finetune_steps
    tensors, _, _ = client_step(algorithm, adapted, split, tensors, optimizers, steps=steps, **options)
    after = algorithm.personal_model(tensors)
    weight = algorithm.wise_ft_weight
    return tensors, merge_exact(before, after, weight) if weight else after
