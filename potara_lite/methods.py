"""The field as one table of methods, each a function of a ``Cell``: a federation, a seed and a budget of steps.

Every method gets the same optimiser steps per client: those of Potara's federated and local training together. A round
of a method that trains two models costs twice the steps, so it plays half as many rounds. All methods see the same
initial adapter and the same training examples; federated ones read one batch stream, training alone has another.
Calibration examples train nobody.

Options of the methods are common ones, not tuned; ``benchmarks/field.py --tune`` tries some of them on
calibration examples of another seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import algorithms as A
from . import baselines as B
from . import estimators as E
from .adapters import AdaptedBackbone, Adapter, repeat_adapter
from .benchmark import Pair, Setting, train_pair
from .connectivity import along_segment, grid
from .data import Federation
from .federated import Ledger
from .fisher import diagonal_fisher, per_sample_gradients
from .merging import from_delta, merge_exact, merge_factors
from .rounds import Algorithm, run
from .training import train

__all__ = ["METHODS", "REFERENCES", "Cell", "Result", "alone", "merging", "played"]


@dataclass
class Cell:
    """One federation and seed. ``pair``: the two models of every client that all merges share, trained when first
    asked for. ``steps``: the optimiser steps per client that a method has."""

    adapted: AdaptedBackbone
    federation: Federation
    setting: Setting
    seed: int

    @cached_property
    def pair(self) -> Pair:
        return train_pair(self.adapted, self.federation, self.setting, self.seed)

    @property
    def steps(self) -> int:
        return self.setting.rounds * self.setting.round_steps + self.setting.local_steps

    @property
    def training(self) -> dict:
        """What ``train`` is given."""
        return dict(batch_size=self.setting.batch_size, lr=self.setting.lr, chunk_size=self.setting.chunk_size)


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


def played(algorithm: Algorithm | Callable[[Setting], Algorithm], **options) -> Method:
    """An algorithm, for as many rounds as the cell's steps allow. ``options`` (lr, …) replace the setting's.

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
            **cell.training | options,
        )
        return Result(result.adapted, result.personal, result.ledger, time.perf_counter() - began)

    return method


def tuned_after(algorithm: Algorithm, **options) -> Method:
    """The algorithm with Potara's local steps after its rounds."""
    return played(lambda setting: A.finetuned(algorithm, setting.local_steps), **options)


def alone(**options) -> Method:
    """Local training for all of the steps; ``options`` (lr, …) replace the setting's."""

    def method(cell: Cell) -> Result:
        clients, began = len(cell.federation), time.perf_counter()
        initial, training = repeat_adapter(cell.adapted.initial, clients), cell.training | options
        trained = train(cell.adapted, initial, cell.federation.train, steps=cell.steps, seed=(cell.seed, 1), **training)
        paid = Ledger.zeros(clients).add(torch.arange(clients), steps=cell.steps)
        return Result(cell.adapted, trained.adapters, paid, time.perf_counter() - began)

    return method


def part(which: int) -> Method:
    """One of the two models that Potara merges: 0 the federated, 1 the local one, at its part of the steps."""

    def method(cell: Cell) -> Result:
        stack = (cell.pair.federated, cell.pair.local)[which]
        return Result(cell.adapted, stack, cell.pair.ledgers[which], cell.pair.seconds[which])

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


def weighted(estimator: Callable[..., E.Estimate], split: str, merge=merge_exact, **options) -> Method:
    """The pair merged with an estimated weight; ``split`` names the examples that the estimator sees."""

    def function(cell: Cell) -> tuple[Adapter, E.Estimate]:
        models = cell.pair.federated, cell.pair.local
        estimate = estimator(cell.adapted, *models, getattr(cell.federation, split), **options)
        return merge(*models, estimate.weight), estimate

    return merging(function)


def by_fisher(cell: Cell) -> Adapter:
    """Fisher merging of the deltas, coordinate by coordinate, on the calibration examples; a client at a time."""
    adapted, samples, models = cell.adapted, cell.federation.calibration, (cell.pair.federated, cell.pair.local)
    merged = []
    for client in range(len(samples)):
        split, rows = (
            samples.rows([client]),
            [{n: t[client : client + 1] for n, t in model.items()} for model in models],
        )
        dense = [from_delta(B.delta(row, adapted.scaling), adapted.scaling, row) for row in rows]
        fishers = [diagonal_fisher(per_sample_gradients(adapted, one, split), split.sizes) for one in dense]
        merged.append(B.fisher_merge(dense, fishers))
    return {name: torch.cat([one[name] for one in merged]) for name in merged[0]}


def by_regmean(cell: Cell) -> Adapter:
    """RegMean on the client's training examples, as each of the two models sees them."""
    models = cell.pair.federated, cell.pair.local
    return B.regmean(models, [B.layer_grams(cell.adapted, model, cell.federation.train) for model in models])


def by_entries(function: Callable[[Tensor], Tensor]) -> Method:
    """A merge of the task vectors entry by entry."""
    return merging(lambda cell: B.merge_deltas((cell.pair.federated, cell.pair.local), cell.adapted.scaling, function))


def best_on_test(cell: Cell) -> tuple[Adapter, E.Estimate]:
    """Each client's best weight of an 11-point grid on its test data: a reference and never a method."""
    models, weights = (cell.pair.federated, cell.pair.local), grid(11)
    loss, _ = along_segment(cell.adapted, *models, cell.federation.test, weights, chunk_size=cell.setting.chunk_size)
    estimate = E.Estimate(weights.to(loss.device)[loss.argmin(1)])
    return merge_exact(*models, estimate.weight), estimate


METHODS: dict[str, Method] = {
    "local": alone(),
    "local part": part(1),
    "federated part": part(0),
    "FedIT": played(A.FEDIT),
    "FedIT, fine-tuned": tuned_after(A.FEDIT),
    "WiSE-FT": played(lambda setting: A.wise_ft(A.FEDIT, setting.local_steps)),
    "FedProx": played(A.fedprox(0.1)),
    "FFA-LoRA": played(A.FFA),
    "FFA-LoRA, fine-tuned": tuned_after(A.FFA),
    "FedEx-LoRA": played(A.FEDEX),
    "FedEx-LoRA, fine-tuned": tuned_after(A.FEDEX),
    "FLoRA": played(A.FLORA),
    "FlexLoRA": played(A.flexlora()),
    "FedSA-LoRA": played(A.FEDSA),
    "FedPer": played(A.FEDPER),
    "FedRep": played(A.fedrep()),
    "Ditto": played(A.ditto(0.1)),
    "APFL": played(A.apfl()),
    "FedDPA-T": played(A.feddpa()),
    "FedALT": played(A.fedalt()),
    "uniform": weighted(E.estimate_uniform, "calibration"),
    "task arithmetic": merging(lambda cell: B.task_arithmetic((cell.pair.federated, cell.pair.local), 0.6)),
    "Fisher merging": merging(by_fisher),
    "RegMean": merging(by_regmean),
    "TIES": by_entries(lambda vectors: B.ties(vectors)),
    "DARE": by_entries(lambda vectors: B.dare(vectors).mean(0)),
    "potara-paper": weighted(E.estimate_fisher, "train"),
    "potara-paper, factors": weighted(E.estimate_fisher, "train", merge_factors),
    "potara-paper, by layer": weighted(E.estimate_fisher, "train", by=E.by_layer),
    "potara, one weight": weighted(E.estimate_pooled, "calibration"),
    "potara": weighted(E.estimate_pooled, "calibration", by=E.head_and_body),
    "potara, factors": weighted(E.estimate_pooled, "calibration", merge_factors, by=E.head_and_body),
}
REFERENCES: dict[str, Method] = {"oracle weight (test data, reference)": merging(best_on_test)}
