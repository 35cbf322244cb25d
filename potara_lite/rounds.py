"""Rounds of any federated algorithm: what its clients hold, train, send and receive, and what it costs them.

A client *holds* a dictionary of tensors. Plain names are the adapter that it shares, or its only one; further ones
have a prefix: ``own:`` (a second, personal adapter), ``anchor:`` (the shared one as it was received), ``folded:``
(what was added to the frozen weights for good) and so on. ``run`` plays the rounds of any ``Algorithm``:

1. *down*: every client takes the message (``held | message``) and settles it;
2. *train*: the phases, one after another, each with its tensors, its objective and its part of the local steps;
3. *up*: every client sends the tensors that travel; the server aggregates them into the next message.

The first message holds the initial values of what travels, the last one is the result. All clients take part in every
round, and every optimiser is AdamW. The methods themselves are declared in ``algorithms.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .adapters import AdaptedBackbone, Adapter, client_adapter, repeat_adapter
from .data import Split
from .federated import Ledger, average
from .merging import merge_exact
from .training import Objective, OptimizerState, train

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
    memory outlives the round. ``finetune``: local steps after the last round. ``keep``: the weight that the model
    before these steps has in the result. ``weigh``: the bytes of a message to or from each client.
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
    finetune: int = 0
    keep: float = 0.0
    weigh: Callable[[Adapter, int], Tensor] = weigh


@dataclass(frozen=True)
class Personalised:
    """What a run gives: the clients' models (a stack) and the backbone that runs them, the federation's model (no
    client dimension; ``None`` for methods without one), what each client paid, and all that the clients hold."""

    adapted: AdaptedBackbone
    personal: Adapter
    federated: Adapter | None
    ledger: Ledger
    holds: Adapter


def run(
    algorithm: Algorithm,
    adapted: AdaptedBackbone,
    split: Split,
    *,
    rounds: int,
    local_steps: int,
    seed: int = 0,
    progress: bool = False,
    **training,
) -> Personalised:
    """Play ``rounds`` rounds of ``local_steps`` steps; ``training`` goes to ``train`` (lr, batch_size, clip, …).

    Each phase reads the client's batch stream ``(seed, 0)`` from where it left it the round before, so a phase with
    all the steps of a round sees what ``fedit`` sees. The ledger counts the messages as they were passed, and an
    optimiser step for every model that took one.

    Raises ``ValueError`` for a phase that trains none of the tensors.

    >>> from potara_lite import Setting, evaluate, prepare
    >>> from potara_lite.algorithms import FEDSA
    >>> setting = Setting(clients=2, train_size=8, calibration_size=4, test_size=8)
    >>> adapted, federation = prepare(setting, seed=0)
    >>> result = run(FEDSA, adapted, federation.train, rounds=2, local_steps=1)
    >>> loss, accuracy = evaluate(result.adapted, result.personal, federation.test)
    >>> accuracy.shape, result.ledger.up.tolist()
    (torch.Size([2]), [81920, 81920])
    """
    model, everyone = algorithm.backbone(adapted), torch.arange(len(split))
    tensors, ledger = algorithm.start(repeat_adapter(adapted.initial, len(split))), Ledger.zeros(len(split))
    memory: list[OptimizerState | None] = [None] * len(algorithm.phases)

    def local(tensors: Adapter, steps: int, number: int) -> tuple[Adapter, Ledger]:
        spent = Ledger.zeros(len(split))
        for i, phase in enumerate(algorithm.phases):
            if not (moving := [name for name in tensors if phase.trains(name)]):
                raise ValueError(f"{algorithm.name}: phase {i} trains none of {sorted(tensors)}")
            count = phase.steps(steps)
            trained = train(
                model,
                {name: tensors[name] for name in moving},
                split,
                steps=count,
                start=number * phase.steps(local_steps),
                state=memory[i],
                seed=(seed, 0),
                objective=phase.objective or (lambda f, mine: f(algorithm.personal(mine))),
                fixed={name: tensor for name, tensor in tensors.items() if name not in moving},
                **training,
            )
            tensors = tensors | trained.adapters
            memory[i] = trained.state if algorithm.keep_optimizer else None
            spent = spent.add(everyone, steps=count * phase.models)
        return tensors, spent

    def passed(message: Adapter) -> Tensor:
        return algorithm.weigh(message, len(split)) if message else torch.zeros_like(everyone)

    message = {name: tensor for name, tensor in tensors.items() if algorithm.travels(name)}
    for number in tqdm(range(rounds + 1), disable=not progress, unit="round", desc=algorithm.name):
        ledger = replace(ledger, down=ledger.down + passed(message))
        tensors = algorithm.settle(tensors | message, number)
        if number == rounds:
            break
        tensors, spent = local(tensors, local_steps, number)
        sent = {name: tensor for name, tensor in tensors.items() if algorithm.travels(name)}
        ledger = replace(ledger + spent, up=ledger.up + passed(sent))
        message = algorithm.aggregate(sent, split.sizes) if sent else {}
    federated, personal = algorithm.federated and algorithm.federated(tensors), algorithm.personal(tensors)
    if algorithm.finetune:
        memory[:] = [None] * len(memory)
        tensors, spent = local(tensors, algorithm.finetune, rounds)
        ledger, after = ledger + spent, algorithm.personal(tensors)
        personal = merge_exact(personal, after, algorithm.keep) if algorithm.keep else after
    return Personalised(model, personal, federated, ledger, tensors)
