"""Rounds of any federated algorithm: what its clients hold, train, send and receive, and what it costs them.

A client *holds* a dictionary of tensors. Plain names are the adapter that it shares, or its only one; further ones
have a prefix: ``own:`` (a second, personal adapter), ``anchor:`` (the shared one as it was received), ``folded:``
(what was added to the frozen weights for good) and so on. ``run`` plays the rounds of any ``Algorithm``:

1. *down*: every participant takes the message (``held | message``) and settles it;
2. *train*: the phases, one after another, each with its tensors, its objective and its part of the local steps;
3. *up*: every participant sends the tensors that travel; the server aggregates them into the next message.

The first message holds the initial values of what travels; the last one, which all clients get, is the result. Every
optimiser is AdamW. The methods themselves are declared in ``algorithms.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .adapters import AdaptedBackbone, Adapter, added, client_adapter, delta, repeat_adapter
from .data import Split
from .federated import Ledger, average, participants
from .merging import merge_exact
from .training import Objective, OptimizerState, flatten, train

__all__ = [
    "Algorithm",
    "Personalised",
    "Phase",
    "fedavg",
    "first",
    "held",
    "is_head",
    "is_shared",
    "put",
    "run",
    "weigh",
]

Choose = Callable[[str], bool]


def is_shared(name: str) -> bool:
    """A tensor with a plain name: of the shared (or only) adapter."""
    return ":" not in name


def is_head(name: str) -> bool:
    """A directly trained tensor of the shared (or only) adapter."""
    return is_shared(name) and ".lora_" not in name


def held(tensors: Adapter, prefix: str = "") -> Adapter:
    """The adapter that a client holds under ``prefix``; without one, the shared adapter."""
    if not prefix:
        return {name: tensor for name, tensor in tensors.items() if is_shared(name)}
    return {n.removeprefix(f"{prefix}:"): tensor for n, tensor in tensors.items() if n.startswith(f"{prefix}:")}


def put(prefix: str, adapter: Adapter) -> Adapter:
    """The adapter's tensors under ``prefix``: the inverse of ``held``."""
    return {f"{prefix}:{name}": tensor for name, tensor in adapter.items()}


def fedavg(stack: Adapter, sizes: Tensor) -> Adapter:
    """What FedAvg sends down: to every client the mean weighted by sizes."""
    return repeat_adapter(average(stack, sizes), len(sizes))


def first(stack: Adapter) -> Adapter:
    """The shared adapter out of stacks in which all clients hold the same."""
    return client_adapter(held(stack), 0)


def weigh(message: Adapter, clients: int) -> Tensor:
    """The bytes of each client's part of a message (a stack), ``(C,)``, in the dtypes that its tensors have."""
    return torch.full((clients,), sum(t[0].numel() * t.element_size() for t in message.values()), dtype=torch.int64)


@dataclass(frozen=True)
class Phase:
    """A part of a round's local training.

    ``trains``: the tensors that train in it. ``objective(f, tensors)``: their loss, where ``f`` is the loss of an
    adapter on the batch; by default ``f`` of the algorithm's personal model. ``steps``: how many steps it takes of a
    round's local steps. ``models``: how many models take an optimiser step in each of them.
    """

    trains: Choose = is_shared
    objective: Objective | None = None
    steps: Callable[[int], int] = lambda steps: steps
    models: int = 1


@dataclass(frozen=True)
class Algorithm:
    """A method: what its clients hold, train, send and receive, and which model of theirs is evaluated.

    ``start``: the stack of initial adapters to what the clients hold. ``phases``: the local training. ``travels``: the
    tensors that go up. ``aggregate(stack, sizes)``: what came up to what goes down, a row per client. ``settle(held,
    number)``: what a client does with message ``number``, once it has overwritten what it names. ``personal``: what
    the clients hold to the models that are evaluated, a stack; it also takes one client's tensors. ``federated``: to
    the model of the federation, if there is one. ``backbone``: what runs the models. ``keep_optimizer``: AdamW's
    memory outlives the round. ``frozen``: an adapter, the same for all, that is in the frozen weights while the phases
    train. ``finetune``: local steps after the last round. ``keep``: the weight that the model
    before these steps has in the result. ``weigh``: the bytes of a message to or from each client. ``all_listen``: what
    clients hold is the sum of all messages, so those who sit a round out get its message none the less.
    """

    name: str
    start: Callable[[Adapter], Adapter] = lambda stack: stack
    phases: tuple[Phase, ...] = (Phase(),)
    travels: Choose = lambda name: False
    aggregate: Callable[[Adapter, Tensor], Adapter] = fedavg
    settle: Callable[[Adapter, int], Adapter] = lambda tensors, number: tensors
    personal: Callable[[Adapter], Adapter] = held
    federated: Callable[[Adapter], Adapter] | None = None
    backbone: Callable[[AdaptedBackbone], AdaptedBackbone] = lambda adapted: adapted
    keep_optimizer: bool = True
    frozen: Callable[[Adapter], Adapter] = lambda tensors: {}
    finetune: int = 0
    keep: float = 0.0
    weigh: Callable[[Adapter, int], Tensor] = weigh
    all_listen: bool = False


@dataclass(frozen=True)
class Personalised:
    """What a run gives: the clients' models (a stack) and the backbone that runs them, the federation's model (no
    client dimension; ``None`` for methods without one), what each client paid in all and by round, and all that the
    clients hold."""

    adapted: AdaptedBackbone
    personal: Adapter
    federated: Adapter | None
    ledger: Ledger
    by_round: Ledger
    holds: Adapter


def _some(tensors: Adapter, rows: Tensor) -> Adapter:
    """The tensors of some clients, in the stacks' order; of all clients, the stacks themselves."""
    if all(len(rows) == len(tensor) for tensor in tensors.values()):
        return tensors
    return {name: tensor[rows.to(tensor.device)] for name, tensor in tensors.items()}


def _with_rows(tensors: Adapter, rows: Tensor, new: Adapter) -> Adapter:
    """The stacks with the rows of some clients replaced; what only these clients hold is zero for the others."""
    result = dict(tensors)
    for name, tensor in new.items():
        if name not in result:
            clients = len(next(iter(tensors.values())))
            result[name] = tensor.new_zeros(clients, *tensor.shape[1:])
        result[name] = result[name].index_copy(0, rows.to(tensor.device), tensor)
    return result


def _for_everyone(message: Adapter, clients: int, name: str) -> Adapter:
    """A message to some clients, which must be the same for each, as one to all."""
    if any((tensor != tensor[:1]).any() for tensor in message.values()):
        raise ValueError(f"{name}: its messages differ from client to client, so all of them must take part")
    return repeat_adapter(client_adapter(message, 0), clients)


def run(
    algorithm: Algorithm,
    adapted: AdaptedBackbone,
    split: Split,
    *,
    rounds: int,
    local_steps: int,
    participation: float = 1.0,
    seed: int = 0,
    progress: bool = False,
    **training,
) -> Personalised:
    """Play ``rounds`` rounds of ``local_steps`` steps; ``training`` goes to ``train`` (lr, batch_size, clip, …).

    Each phase reads the client's batch stream ``(seed, 0)`` from where the round begins, so a phase with all the steps
    of a round sees what ``fedit`` sees. ``participation``: the share of clients in each round, drawn as ``fedit`` does.
    The ledger counts the messages as they were passed, and an optimiser step for every model that took one.

    Raises ``ValueError`` for a phase that trains none of the tensors, and for less than full participation in a method
    whose messages differ from client to client.

    >>> from potara_lite import Setting, evaluate, prepare
    >>> from potara_lite.algorithms import FEDSA
    >>> setting = Setting(clients=2, train_size=8, calibration_size=4, test_size=8)
    >>> adapted, federation = prepare(setting, seed=0)
    >>> result = run(FEDSA, adapted, federation.train, rounds=2, local_steps=1)
    >>> loss, accuracy = evaluate(result.adapted, result.personal, federation.test)
    >>> accuracy.shape, result.ledger.up.tolist(), result.by_round.up[:, 0].tolist()
    (torch.Size([2]), [81920, 81920], [40960, 40960, 0])
    """
    model, clients, everyone = algorithm.backbone(adapted), len(split), torch.arange(len(split))
    tensors, paid = algorithm.start(repeat_adapter(adapted.initial, clients)), []
    memory: list[OptimizerState | None] = [None] * len(algorithm.phases)

    def local(tensors: Adapter, chosen: Tensor, steps: int, number: int) -> tuple[Adapter, Ledger]:
        spent, part = Ledger.zeros(clients), split if len(chosen) == clients else split.rows(chosen.tolist())
        for i, phase in enumerate(algorithm.phases):
            if not (moving := [name for name in tensors if phase.trains(name)]):
                raise ValueError(f"{algorithm.name}: phase {i} trains none of {sorted(tensors)}")
            count, moving = phase.steps(steps), {name: tensors[name] for name in moving}
            if memory[i] is None:
                memory[i] = OptimizerState.zeros(flatten(moving))
            index = chosen.to(memory[i].steps.device)
            with added(model, delta(client_adapter(algorithm.frozen(tensors), 0), model.scaling)):
                trained = train(
                    model,
                    _some(moving, chosen),
                    part,
                    steps=count,
                    start=number * phase.steps(local_steps),
                    state=memory[i].rows(index),
                    seed=(seed, 0),
                    objective=phase.objective or (lambda f, mine: f(algorithm.personal(mine))),
                    fixed=_some({name: tensor for name, tensor in tensors.items() if name not in moving}, chosen),
                    **training,
                )
            tensors = _with_rows(tensors, chosen, trained.adapters)
            memory[i] = memory[i].put(index, trained.state) if algorithm.keep_optimizer else None
            spent = spent.add(chosen, steps=count * phase.models)
        return tensors, spent

    def passed(message: Adapter, some: Tensor) -> Tensor:
        size = algorithm.weigh(message, len(some)) if message else torch.zeros_like(some)
        return torch.zeros_like(everyone).index_copy(0, some, size)

    message = {name: tensor for name, tensor in tensors.items() if algorithm.travels(name)}
    if participation < 1:
        message = _for_everyone(message, clients, algorithm.name)
    for number in tqdm(range(rounds + 1), disable=not progress, unit="round", desc=algorithm.name):
        chosen = everyone if number == rounds else participants(split.ids, participation, seed, number)
        heard = everyone if algorithm.all_listen else chosen
        settled = algorithm.settle(_some(tensors | message, heard), number)
        tensors = settled if len(heard) == clients else _with_rows(tensors, heard, settled)
        ledger = replace(Ledger.zeros(clients), down=passed(_some(message, heard), heard))
        if number < rounds:
            tensors, spent = local(tensors, chosen, local_steps, number)
            sent = _some({name: tensor for name, tensor in tensors.items() if algorithm.travels(name)}, chosen)
            ledger = replace(ledger + spent, up=passed(sent, chosen))
            message = algorithm.aggregate(sent, split.sizes[chosen.to(split.sizes.device)]) if sent else {}
            if len(chosen) < clients:
                message = _for_everyone(message, clients, algorithm.name)
        paid.append(ledger)
    federated, personal = algorithm.federated and algorithm.federated(tensors), algorithm.personal(tensors)
    if algorithm.finetune:
        memory[:] = [None] * len(memory)
        tensors, spent = local(tensors, everyone, algorithm.finetune, rounds)
        paid[-1], after = paid[-1] + spent, algorithm.personal(tensors)
        personal = merge_exact(personal, after, algorithm.keep) if algorithm.keep else after
    by_round = Ledger.by_round(paid)
    return Personalised(model, personal, federated, by_round.total(), by_round, tensors)
