"""The comparison as one table of methods, each a function of a ``Run``: a federation, a seed and a budget of steps.

Every method gets the same optimiser steps per client: those of Potara's federated and local training together. A round
of a method that trains two models costs twice the steps, so it has half as many rounds. All methods see the same
initial adapter and the same training examples; federated ones read one batch stream, training alone has another.
No method trains on calibration examples.

``FAMILIES`` has each method as a function of its options; their defaults did best among what
``benchmarks/comparison.py --tune`` tries, on calibration examples of a seed that no table reports. ``lr_scale``
multiplies the setting's learning rate, ``rounds_scale`` its rounds; a ``weight`` is λ, on the federated model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..adapters.state import Adapter, adapter_from_delta, delta, repeat_adapter, select_clients
from ..checks import Fraction, NonNegative, Positive, checked
from ..estimators import ESTIMATORS, by_layer, estimate_paper, estimate_pooled, on_calibration, on_train
from ..experiment import (
    MODEL_PAIR_METHODS,
    ORACLE,
    Method,
    ModelPair,
    Result,
    Run,
    federated_model,
    local_from_federated,
    local_model,
    merging,
    training_options,
    with_estimator,
)
from ..merging.merge import merge_factors
from ..setting import Setting
from ..training.fedavg import Ledger
from ..training.train import train
from . import algorithms, merges
from .rounds import Algorithm


@checked
def from_algorithm(algorithm: Algorithm | Callable[[Setting], Algorithm], lr_scale: Positive = 1.0) -> Method:
    """An algorithm, or a function of a setting that makes one, for as many rounds as the run's steps allow.

    Raises ``ValueError`` for what is neither, and, when it runs, where whole rounds do not add up to the budget.
    """

    def method(run: Run) -> Result:
        one = algorithm if isinstance(algorithm, Algorithm) else algorithm(run.setting)
        return one(run, lr_scale)

    return method


def remaining_steps(setting: Setting, rounds_scale: float) -> int:
    """The local steps that are left after ``rounds_scale`` times the setting's rounds."""
    return setting.local_steps + (setting.rounds - round(rounds_scale * setting.rounds)) * setting.round_steps


@checked
def finetuned_after(algorithm: Algorithm, lr_scale: Positive = 1.0, rounds_scale: NonNegative = 1.0) -> Method:
    """The algorithm with local steps after its rounds; both are Potara's, or ``rounds_scale`` times as many rounds and
    what is left of the steps."""
    return from_algorithm(lambda s: algorithms.finetuned(algorithm, remaining_steps(s, rounds_scale)), lr_scale)


@checked
def wise_ft(weight: Fraction, lr_scale: Positive, rounds_scale: NonNegative) -> Method:
    """The straight line between FedIT and what the fine-tuning makes of it; ``weight`` is on FedIT's model."""
    fedit = algorithms.FEDIT
    return from_algorithm(lambda s: algorithms.wise_ft(fedit, remaining_steps(s, rounds_scale), weight), lr_scale)


@checked
def local_training(lr_scale: Positive = 1.0) -> Method:
    """Every client alone, for all of the steps."""

    def method(run: Run) -> Result:
        clients, steps = len(run.federation), run.setting.total_steps
        began = time.perf_counter()
        options = training_options(run.setting, lr_scale) | dict(steps=steps, seed=(run.seed, 1))
        options |= dict(eval_split=run.eval_split, eval_every=run.eval_every * max(1, run.setting.round_steps))
        initial = repeat_adapter(run.adapted.initial, clients)
        trained = train(run.adapted, initial, run.federation.train, **options)
        ledger = Ledger.zeros(clients).add(torch.arange(clients), steps=steps)
        seconds = time.perf_counter() - began
        return Result(run.adapted, trained.adapters, ledger, seconds, history=trained.history)

    return method


def fisher_merge_of_pair(run: Run, pair: ModelPair) -> Adapter:
    """Fisher merging of the deltas, coordinate by coordinate, on the calibration examples; a client at a time."""
    adapted, samples = run.adapted, run.federation.calibration
    merged = []
    for row in (slice(i, i + 1) for i in range(len(samples))):
        models = [select_clients(model, row) for model in pair.models]
        dense = [adapter_from_delta(delta(one, adapted.scaling), adapted.scaling, one) for one in models]
        split = samples.rows(row)
        fishers = [merges.model_fisher(adapted, one, split) for one in dense]
        merged.append(merges.fisher_merge(dense, fishers))
    return {name: torch.cat([one[name] for one in merged]) for name in merged[0]}


def regmean_of_pair(run: Run, pair: ModelPair) -> Adapter:
    """RegMean on the client's training examples, as each of the two models sees them."""
    grams = [merges.layer_grams(run.adapted, model, run.federation.train) for model in pair.models]
    return merges.regmean(pair.models, grams)


@checked
def merging_entries(function: Callable[[Tensor], Tensor]) -> Method:
    """A merge of the task vectors entry by entry."""
    return merging(lambda run, pair: merges.merge_deltas(pair.models, run.adapted.scaling, function))


def merged_from_federated(estimator: str, lr_scale: float) -> Method:
    """A merge whose local models start from the federated one; all such merges share them."""
    return with_estimator(ESTIMATORS[estimator], model_pair=local_from_federated(lr_scale))


FAMILIES: dict[str, Callable[..., Method]] = {
    "local": partial(local_training, lr_scale=0.5),
    "local part": lambda: local_model,
    "federated part": lambda: federated_model,
    "FedIT": partial(from_algorithm, algorithms.FEDIT, lr_scale=4),
    "FedIT, fine-tuned": partial(finetuned_after, algorithms.FEDIT, lr_scale=0.5, rounds_scale=1),
    "WiSE-FT": partial(wise_ft, weight=0.5, lr_scale=2, rounds_scale=1.5),
    "FedProx": lambda mu=0.1, lr_scale=8: from_algorithm(algorithms.fedprox(mu), lr_scale),
    "FedProx, fine-tuned": lambda mu=0.01, lr_scale=0.5, rounds_scale=1.5: finetuned_after(
        algorithms.fedprox(mu), lr_scale, rounds_scale
    ),
    "FFA-LoRA": partial(from_algorithm, algorithms.FFA, lr_scale=2),
    "FFA-LoRA, fine-tuned": partial(finetuned_after, algorithms.FFA, lr_scale=2, rounds_scale=1),
    "FedEx-LoRA": partial(from_algorithm, algorithms.FEDEX, lr_scale=2),
    "FedEx-LoRA, fine-tuned": partial(finetuned_after, algorithms.FEDEX, lr_scale=0.5, rounds_scale=1),
    "FLoRA": partial(from_algorithm, algorithms.FLORA, lr_scale=2),
    "FLoRA, fine-tuned": partial(finetuned_after, algorithms.FLORA, lr_scale=1, rounds_scale=1),
    "FlexLoRA": partial(from_algorithm, algorithms.flexlora(), lr_scale=2),
    "FlexLoRA, fine-tuned": partial(finetuned_after, algorithms.flexlora(), lr_scale=0.5, rounds_scale=1),
    "FedSA-LoRA": partial(from_algorithm, algorithms.FEDSA, lr_scale=2),
    "FedPer": partial(from_algorithm, algorithms.FEDPER, lr_scale=2),
    "FedRep": lambda head_share=0.5, lr_scale=2: from_algorithm(algorithms.fedrep(head_share), lr_scale),
    "Ditto": lambda strength=0.01, lr_scale=1: from_algorithm(algorithms.ditto(strength), lr_scale),
    "APFL": lambda weight=0.5, lr_scale=2: from_algorithm(algorithms.apfl(weight), lr_scale),
    "FedDPA-T": lambda weight=0.5, lr_scale=1: from_algorithm(algorithms.feddpa(weight), lr_scale),
    "FedALT": partial(from_algorithm, algorithms.fedalt(), lr_scale=1),
    "uniform": lambda: with_estimator(ESTIMATORS["uniform"]),
    "task arithmetic": lambda coefficient=0.5: merging(
        lambda run, pair: merges.task_arithmetic(pair.models, coefficient)
    ),
    "Fisher merging": lambda: merging(fisher_merge_of_pair),
    "RegMean": lambda: merging(regmean_of_pair),
    "TIES": lambda density=0.2, coefficient=0.7: merging_entries(
        partial(merges.ties, density=density, coefficient=coefficient)
    ),
    "DARE": lambda drop=0.2: merging_entries(lambda vectors: merges.dare(vectors, drop).mean(0)),
    "potara-paper": lambda: with_estimator(ESTIMATORS["potara-paper"]),
    "potara-paper, factors": lambda: with_estimator(ESTIMATORS["potara-paper"], merge_factors),
    "potara-paper, by layer": lambda: with_estimator(on_train(estimate_paper, by=by_layer)),
    "potara-calibrated, one weight": lambda: with_estimator(on_calibration(estimate_pooled)),
    "potara-calibrated": lambda: with_estimator(ESTIMATORS["potara-calibrated"]),
    "uniform, local from federated": partial(merged_from_federated, "uniform", lr_scale=2),
    "potara-paper, local from federated": partial(merged_from_federated, "potara-paper", lr_scale=2),
    "potara-calibrated, local from federated": partial(merged_from_federated, "potara-calibrated", lr_scale=2),
    "potara-calibrated, factors": lambda: with_estimator(ESTIMATORS["potara-calibrated"], merge_factors),
}
METHODS: dict[str, Method] = {name: family() for name, family in FAMILIES.items()}
REFERENCES: dict[str, Method] = {ORACLE: MODEL_PAIR_METHODS[ORACLE]}
