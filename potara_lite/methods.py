"""The field as one table of methods, each a function of a ``Cell``: a federation, a seed and a budget of steps.

Every method gets the same optimiser steps per client: those of Potara's federated and local training together. A round
of a method that trains two models costs twice the steps, so it plays half as many rounds. All methods see the same
initial adapter and the same training examples; federated ones read one batch stream, training alone has another.
Calibration examples train nobody.

``FAMILIES`` holds each method as a function of its options, with those defaults that did best among what
``benchmarks/field.py --tune`` tries, on calibration examples of a seed that no table reports. Learning rates are in
units of the setting's, rounds too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from . import algorithms as A
from . import baselines as B
from . import estimators as E
from .adapters import AdaptedBackbone, Adapter, repeat_adapter
from .benchmark import ESTIMATORS, ORACLE, Pair, Setting, oracle_weight, train_pair
from .connectivity import along_segment, grid
from .data import Federation
from .federated import Ledger
from .fisher import diagonal_fisher, per_sample_gradients
from .merging import from_delta, merge_exact, merge_factors
from .rounds import Algorithm, run
from .training import train

__all__ = [
    "FAMILIES",
    "METHODS",
    "REFERENCES",
    "Cell",
    "Result",
    "alone",
    "merging",
    "onwards",
    "played",
    "tuned_after",
]


@dataclass
class Cell:
    """One federation and seed. ``pair``: the two models of every client that all merges share, made by ``make`` when
    first asked for. ``steps``: the optimiser steps per client that a method has."""

    adapted: AdaptedBackbone
    federation: Federation
    setting: Setting
    seed: int
    make: Callable[..., Pair] = train_pair
    onward: dict[float, Cell] = field(default_factory=dict, init=False, repr=False)  # see ``onwards``

    @cached_property
    def pair(self) -> Pair:
        return self.make(self.adapted, self.federation, self.setting, self.seed)

    @property
    def models(self) -> tuple[Adapter, Adapter]:
        """The pair's federated and local stacks."""
        return self.pair.federated, self.pair.local

    @property
    def steps(self) -> int:
        return self.setting.rounds * self.setting.round_steps + self.setting.local_steps

    def training(self, lr: float = 1.0) -> dict:
        """What ``train`` is given; ``lr`` in units of the setting's."""
        setting = self.setting
        return dict(batch_size=setting.batch_size, lr=lr * setting.lr, chunk_size=setting.chunk_size)


@dataclass(frozen=True)
class Result:
    """The clients' models (a stack) and the backbone that runs them, what they cost, and the mixing weight ``(C,)`` of
    those that are merged."""

    adapted: AdaptedBackbone
    adapters: Adapter
    ledger: Ledger
    seconds: float
    weight: Tensor | None = None


Method = Callable[[Cell], Result]


def played(algorithm: Algorithm | Callable[[Setting], Algorithm], lr: float = 1.0) -> Method:
    """An algorithm, for as many rounds as the cell's steps allow; ``lr`` in units of the setting's.

    Raises ``ValueError`` where whole rounds do not add up to the budget.
    """

    def method(cell: Cell) -> Result:
        one = algorithm if isinstance(algorithm, Algorithm) else algorithm(cell.setting)

        def cost(steps: int) -> int:
            return sum(phase.steps(steps) * phase.models for phase in one.phases)

        rounds, rest = divmod(cell.steps - cost(one.finetune), cost(cell.setting.round_steps))
        if rounds < 0 or rest:
            raise ValueError(f"{one.name}: rounds of {cost(cell.setting.round_steps)} steps do not make {cell.steps}")
        began = time.perf_counter()
        result = run(
            one,
            cell.adapted,
            cell.federation.train,
            rounds=rounds,
            local_steps=cell.setting.round_steps,
            seed=cell.seed,
            **cell.training(lr),
        )
        return Result(result.adapted, result.personal, result.ledger, time.perf_counter() - began)

    return method


def remaining(setting: Setting, rounds: float) -> int:
    """The local steps that are left after ``rounds`` times the setting's rounds."""
    return setting.local_steps + (setting.rounds - round(rounds * setting.rounds)) * setting.round_steps


def tuned_after(algorithm: Algorithm, lr: float = 1.0, rounds: float = 1.0) -> Method:
    """The algorithm with local steps after its rounds; both are Potara's, or ``rounds`` times as many rounds and what
    is left of the steps."""
    return played(lambda setting: A.finetuned(algorithm, remaining(setting, rounds)), lr)


def wise(weight: float, lr: float, rounds: float) -> Method:
    """The straight line between FedIT and what the fine-tuning makes of it; ``weight`` is on FedIT's model."""
    return played(lambda setting: A.wise_ft(A.FEDIT, remaining(setting, rounds), weight), lr)


def alone(lr: float = 1.0) -> Method:
    """Local training for all of the steps; ``lr`` in units of the setting's."""

    def method(cell: Cell) -> Result:
        clients, began = len(cell.federation), time.perf_counter()
        initial, training = repeat_adapter(cell.adapted.initial, clients), cell.training(lr)
        trained = train(cell.adapted, initial, cell.federation.train, steps=cell.steps, seed=(cell.seed, 1), **training)
        paid = Ledger.zeros(clients).add(torch.arange(clients), steps=cell.steps)
        return Result(cell.adapted, trained.adapters, paid, time.perf_counter() - began)

    return method


def part(which: int) -> Method:
    """One of the two models that Potara merges: 0 the federated, 1 the local one, at its part of the steps."""

    def method(cell: Cell) -> Result:
        return Result(cell.adapted, cell.models[which], cell.pair.ledgers[which], cell.pair.seconds[which])

    return method


def merging(function: Callable[[Cell], Adapter | tuple[Adapter, E.Estimate]]) -> Method:
    """A merge of the cell's pair; what an estimate's numbers weigh when they travel is counted."""

    def method(cell: Cell) -> Result:
        pair = cell.pair
        began = time.perf_counter()
        found = function(cell)
        seconds = sum(pair.seconds) + time.perf_counter() - began
        adapters, estimate = found if isinstance(found, tuple) else (found, None)
        ledger = pair.ledgers[0] + pair.ledgers[1]
        if estimate is None:
            return Result(cell.adapted, adapters, ledger, seconds)
        up, down = (4 * floats for floats in estimate.floats)
        ledger = ledger.add(torch.arange(len(cell.federation)), up=up, down=down)
        return Result(cell.adapted, adapters, ledger, seconds, estimate.client_weight)

    return method


def weighted(estimator: Callable[..., E.Estimate], merge=merge_exact) -> Method:
    """The pair merged with an estimated weight; the estimator is one like those of ``benchmark.ESTIMATORS``."""

    def function(cell: Cell) -> tuple[Adapter, E.Estimate]:
        estimate = estimator(cell.adapted, *cell.models, data=cell.federation)
        return merge(*cell.models, estimate.weight), estimate

    return merging(function)


def fisher_by_layer(model: AdaptedBackbone, *pair: Adapter, data: Federation) -> E.Estimate:
    """Our reading of the paper's estimator, a weight per layer."""
    return E.estimate_fisher(model, *pair, data.train, by=E.by_layer)


def one_pooled_weight(model: AdaptedBackbone, *pair: Adapter, data: Federation) -> E.Estimate:
    """The default without its offset between head and body."""
    return E.estimate_pooled(model, *pair, data.calibration)


def by_fisher(cell: Cell) -> Adapter:
    """Fisher merging of the deltas, coordinate by coordinate, on the calibration examples; a client at a time."""
    adapted, samples, merged = cell.adapted, cell.federation.calibration, []
    for client in range(len(samples)):
        split, rows = (
            samples.rows([client]),
            [{n: t[client : client + 1] for n, t in model.items()} for model in cell.models],
        )
        dense = [from_delta(B.delta(row, adapted.scaling), adapted.scaling, row) for row in rows]
        fishers = [diagonal_fisher(per_sample_gradients(adapted, one, split), split.sizes) for one in dense]
        merged.append(B.fisher_merge(dense, fishers))
    return {name: torch.cat([one[name] for one in merged]) for name in merged[0]}


def by_regmean(cell: Cell) -> Adapter:
    """RegMean on the client's training examples, as each of the two models sees them."""
    grams = [B.layer_grams(cell.adapted, model, cell.federation.train) for model in cell.models]
    return B.regmean(cell.models, grams)


def onwards(method: Method, lr: float = 1.0) -> Method:
    """A merge whose local models were trained from the federated one, so not independently of it; ``lr``, of these
    steps, in units of the setting's. All such merges share the models, as those of the pair share it."""

    def changed(cell: Cell) -> Result:
        def make(adapted: AdaptedBackbone, federation: Federation, setting: Setting, seed: int) -> Pair:
            pair, began, steps = cell.pair, time.perf_counter(), setting.local_steps
            trained = train(adapted, pair.federated, federation.train, steps=steps, seed=(seed, 1), **cell.training(lr))
            return replace(pair, local=trained.adapters, seconds=(pair.seconds[0], time.perf_counter() - began))

        if lr not in cell.onward:
            cell.onward[lr] = replace(cell, make=make)
        return method(cell.onward[lr])

    return changed


def by_entries(function: Callable[[Tensor], Tensor]) -> Method:
    """A merge of the task vectors entry by entry."""
    return merging(lambda cell: B.merge_deltas(cell.models, cell.adapted.scaling, function))


def best_on_test(cell: Cell) -> tuple[Adapter, E.Estimate]:
    """Each client's best weight of an 11-point grid on its test data: a reference and never a method."""
    options = dict(chunk_size=cell.setting.chunk_size)
    loss, _ = along_segment(cell.adapted, *cell.models, cell.federation.test, grid(11), **options)
    estimate = E.Estimate(oracle_weight(grid(11), loss))
    return merge_exact(*cell.models, estimate.weight), estimate


FAMILIES: dict[str, Callable[..., Method]] = {
    "local": lambda lr=0.5: alone(lr),
    "local part": lambda: part(1),
    "federated part": lambda: part(0),
    "FedIT": lambda lr=4: played(A.FEDIT, lr),
    "FedIT, fine-tuned": lambda lr=0.5, rounds=1: tuned_after(A.FEDIT, lr, rounds),
    "WiSE-FT": lambda weight=0.5, lr=2, rounds=1.5: wise(weight, lr, rounds),
    "FedProx": lambda mu=0.1, lr=8: played(A.fedprox(mu), lr),
    "FedProx, fine-tuned": lambda mu=0.01, lr=0.5, rounds=1.5: tuned_after(A.fedprox(mu), lr, rounds),
    "FFA-LoRA": lambda lr=2: played(A.FFA, lr),
    "FFA-LoRA, fine-tuned": lambda lr=2, rounds=1: tuned_after(A.FFA, lr, rounds),
    "FedEx-LoRA": lambda lr=2: played(A.FEDEX, lr),
    "FedEx-LoRA, fine-tuned": lambda lr=0.5, rounds=1: tuned_after(A.FEDEX, lr, rounds),
    "FLoRA": lambda lr=2: played(A.FLORA, lr),
    "FLoRA, fine-tuned": lambda lr=1, rounds=1: tuned_after(A.FLORA, lr, rounds),
    "FlexLoRA": lambda lr=2: played(A.flexlora(), lr),
    "FlexLoRA, fine-tuned": lambda lr=0.5, rounds=1: tuned_after(A.flexlora(), lr, rounds),
    "FedSA-LoRA": lambda lr=2: played(A.FEDSA, lr),
    "FedPer": lambda lr=2: played(A.FEDPER, lr),
    "FedRep": lambda head_share=0.5, lr=2: played(A.fedrep(head_share), lr),
    "Ditto": lambda strength=0.01, lr=1: played(A.ditto(strength), lr),
    "APFL": lambda weight=0.5, lr=2: played(A.apfl(weight), lr),
    "FedDPA-T": lambda weight=0.5, lr=1: played(A.feddpa(weight), lr),
    "FedALT": lambda lr=1: played(A.fedalt(), lr),
    "uniform": lambda: weighted(ESTIMATORS["uniform"]),
    "task arithmetic": lambda coefficient=0.5: merging(lambda cell: B.task_arithmetic(cell.models, coefficient)),
    "Fisher merging": lambda: merging(by_fisher),
    "RegMean": lambda: merging(by_regmean),
    "TIES": lambda density=0.2, coefficient=0.7: by_entries(partial(B.ties, density=density, coefficient=coefficient)),
    "DARE": lambda drop=0.2: by_entries(lambda vectors: B.dare(vectors, drop).mean(0)),
    "potara-paper": lambda: weighted(ESTIMATORS["potara-paper"]),
    "potara-paper, factors": lambda: weighted(ESTIMATORS["potara-paper"], merge_factors),
    "potara-paper, by layer": lambda: weighted(fisher_by_layer),
    "potara, one weight": lambda: weighted(one_pooled_weight),
    "potara": lambda: weighted(ESTIMATORS["potara"]),
    "uniform, local from federated": lambda lr=2: onwards(weighted(ESTIMATORS["uniform"]), lr),
    "potara-paper, local from federated": lambda lr=2: onwards(weighted(ESTIMATORS["potara-paper"]), lr),
    "potara, local from federated": lambda lr=2: onwards(weighted(ESTIMATORS["potara"]), lr),
    "potara, factors": lambda: weighted(ESTIMATORS["potara"], merge_factors),
}
METHODS: dict[str, Method] = {name: family() for name, family in FAMILIES.items()}
REFERENCES: dict[str, Method] = {ORACLE: merging(best_on_test)}
