"""One federation and seed: prepare it, train the two models of every client, and run methods on them.

A *method* is a function of a ``Run`` that returns a ``Result``: the clients' models and what they cost. The merges of
the two models are here; ``baselines.methods`` has the methods that they are compared with in the same form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from torch import Tensor

from .adapters.files import save_adapter
from .adapters.lora import AdaptedBackbone, attach
from .adapters.state import (
    Adapter,
    Stack,
    check_adapter,
    check_models,
    check_same_base,
    check_weight,
    client_adapter,
    repeat_adapter,
)
from .checks import AnyList, Flag, Named, NonNegative, Numbers, Positive, Seed, Seeds, Size, checked, invalid
from .estimators import ESTIMATORS, Estimate, OnSplit
from .estimators.estimate import ClientWeights, Two
from .federation.display import displayed, megabytes, span
from .federation.sources import fashion_mnist
from .federation.split import Federation, Split
from .federation.tasks import wordnet_glosses
from .merging.connectivity import Weights, along_segment, weight_grid
from .merging.merge import merge_exact
from .models.frozen_trunk import linear_layers
from .models.language import installed_minilm, text_encoder, text_tokenizer
from .models.vit import lab_vit
from .setting import Setting
from .training.batching import Execution
from .training.fedavg import Ledger, fedit
from .training.history import Callback
from .training.train import Trained, evaluate, train

ORACLE = "oracle weight (test data, reference)"


@displayed
@checked
@dataclass(frozen=True, eq=False)
class ModelPair:
    """The two models of every client as stacks, what the training of each cost, and whether the local ones were trained
    from the federated one or, as the paper has it, independently of it. ``history``: how they were trained, with the
    column ``model``, ``federated`` (a row for each round and client) or ``local`` (for each step and client)."""

    federated: Stack
    local: Stack
    ledgers: Two[Ledger]
    seconds: Two[NonNegative]
    local_from_federated: Flag = False
    history: Any = None

    def __post_init__(self):
        check_same_base("federated and local", [self.federated, self.local])

    def _title(self) -> str:
        costs = []
        for name, ledger, seconds in zip(("federated", "local"), self.ledgers, self.seconds):
            size = megabytes((ledger.up + ledger.down).double().mean())
            costs.append(f"{name} {span(ledger.steps)} steps, {size}, {seconds:.1f} s")
        return f"{len(self.ledgers[0].up)} clients; each {'; '.join(costs)}"

    def _columns(self) -> dict[str, Tensor]:
        federated, local = self.ledgers
        return {"bytes up": federated.up, "bytes down": federated.down, "federated steps": federated.steps,
                "local steps": local.steps}  # fmt: skip

    @property
    def models(self) -> tuple[Adapter, Adapter]:
        """The federated and the local stack."""
        return self.federated, self.local


@checked
def prepare(setting: Setting, seed: Seed) -> tuple[AdaptedBackbone, Federation]:
    """The backbone with an empty adapter and the federation of this setting and seed.

    What the frozen part of the backbone makes of an example is computed once (``AdaptedBackbone.embed``).
    """
    adapted, federation = (prepare_text if setting.is_text else prepare_images)(setting, seed)
    adapted = adapted.to(setting.device)
    return adapted, federation.to(setting.device).map(adapted.embed)


@checked
def prepare_images(setting: Setting, seed: Seed) -> tuple[AdaptedBackbone, Federation]:
    """The lab ViT with LoRA in its blocks, and Fashion-MNIST."""
    federation = fashion_mnist(**setting.partition, seed=seed)
    return attach(lab_vit(federation.classes), rank=setting.rank, seed=seed), federation


@checked
def prepare_text(setting: Setting, seed: Seed) -> tuple[AdaptedBackbone, Federation]:
    """A text encoder with LoRA in the MLP of its last block, and WordNet's glosses cut to 16 tokens.

    Raises ``ValueError`` where neither the setting names a backbone nor MiniLM is installed.
    """
    source = setting.backbone or installed_minilm()
    options = {name: value for name, value in setting.partition.items() if name != "shift"}
    options |= dict(domains=setting.data == "wordnet-domains", longest=16, seed=seed)
    federation = wordnet_glosses(text_tokenizer(source), **options)
    backbone = text_encoder(source, federation.classes)
    mlp = linear_layers(backbone, last=1)[-2:]
    return attach(backbone, rank=setting.rank, targets=mlp, seed=seed), federation


@checked
def training_options(setting: Setting, lr_scale: Positive = 1.0) -> dict[str, Any]:
    """What ``train`` and ``fedit`` are told; ``lr_scale`` multiplies the setting's learning rate."""
    execution = Execution(chunk_size=setting.chunk_size)
    return dict(batch_size=setting.batch_size, lr=lr_scale * setting.lr, execution=execution)


@checked
def train_pair(
    adapted: AdaptedBackbone,
    federation: Federation,
    setting: Setting,
    seed: Seed,
    progress: Flag = False,
    *,
    eval_split: Split | None = None,
    eval_every: Size = 1,
    callbacks: AnyList[Callback] = (),
) -> ModelPair:
    """Train the federated and the local models, with batches of their own: each from the same initial adapter, or, with
    ``setting.local_from_federated``, the local ones from the finished federated one.

    Every ``eval_every`` rounds, and after as many steps of the local models, they are evaluated on ``eval_split``,
    which changes nothing in the training (see ``fedit`` and ``train``).
    """
    began = time.perf_counter()
    watch = dict(eval_split=eval_split, callbacks=callbacks)
    options = training_options(setting, setting.federated_lr_scale) | watch
    options |= dict(rounds=setting.rounds, local_steps=setting.round_steps, participation=setting.participation)
    shared = fedit(adapted, federation.train, seed=seed, eval_every=eval_every, progress=progress, **options)
    federated = repeat_adapter(shared.adapter, len(federation))
    seconds = time.perf_counter() - began
    start = federated if setting.local_from_federated else repeat_adapter(adapted.initial, len(federation))
    watch["eval_every"] = eval_every * max(1, setting.round_steps)
    trained, local_ledger, local_seconds = train_local(adapted, start, federation, setting, seed, progress, **watch)
    costs = (shared.ledger, local_ledger), (seconds, local_seconds)
    histories = [shared.history.assign(model="federated"), trained.history.assign(model="local")]
    return ModelPair(federated, trained.adapters, *costs, setting.local_from_federated, joined(histories))


def joined(histories: Sequence[Any]) -> Any:
    """The histories of several trainings as one table."""
    import pandas as pd

    return pd.concat([history for history in histories if len(history)] or histories, ignore_index=True)


@checked
def train_local(
    adapted: AdaptedBackbone,
    start: Stack,
    federation: Federation,
    setting: Setting,
    seed: Seed,
    progress: Flag = False,
    **watch,
) -> tuple[Trained, Ledger, float]:
    """The local models from the stack ``start``, what their training cost, and its seconds. ``watch``: what ``train``
    is told of evaluations on the way."""
    [start] = check_models(adapted, federation.train, start=start)
    began = time.perf_counter()
    options = training_options(setting, setting.local_lr_scale) | dict(steps=setting.local_steps, progress=progress)
    trained = train(adapted, start, federation.train, seed=(seed, 1), **options, **watch)
    clients = len(federation)
    ledger = Ledger.zeros(clients).add(torch.arange(clients), steps=setting.local_steps)
    return trained, ledger, time.perf_counter() - began


@displayed
@checked
@dataclass(eq=False)
class Run:
    """One federation and seed, with what its methods share; each part is computed on first use.

    With an ``eval_split`` the models are evaluated every ``eval_every`` rounds on the way, for their histories.
    """

    adapted: AdaptedBackbone
    federation: Federation
    setting: Setting
    seed: Seed
    progress: Flag = False
    eval_split: Split | None = None
    eval_every: Size = 1
    pairs: dict[tuple, ModelPair] = field(default_factory=dict, init=False, repr=False)  # others, by what they are

    def _title(self) -> str:
        return f"seed {self.seed}, {self.adapted}, {self.federation}"

    def _columns(self) -> dict[str, Any]:
        return self.federation._columns()

    @cached_property
    def pair(self) -> ModelPair:
        """The two models of every client that all merges share."""
        watch = dict(eval_split=self.eval_split, eval_every=self.eval_every)
        return train_pair(self.adapted, self.federation, self.setting, self.seed, self.progress, **watch)

    def pair_from_federated(self, lr_scale: float = 1.0) -> ModelPair:
        """The pair whose local models were trained from the federated one, so not independently of it."""
        key = "local from federated", lr_scale
        if key not in self.pairs:
            pair = self.pair
            setting = replace(self.setting, local_lr_scale=lr_scale)
            trained, ledger, seconds = train_local(
                self.adapted, pair.federated, self.federation, setting, self.seed, self.progress
            )
            costs = (pair.ledgers[0], ledger), (pair.seconds[0], seconds)
            self.pairs[key] = ModelPair(pair.federated, trained.adapters, *costs, local_from_federated=True)
        return self.pairs[key]

    @cached_property
    def test_curve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mixing weights ``(W,)``, and test loss and accuracy ``(C, W)`` of the pair's exact merge: for reference."""
        weights = weight_grid(11)
        execution = Execution(chunk_size=self.setting.chunk_size)
        curves = along_segment(self.adapted, *self.pair.models, self.federation.test, weights, execution=execution)
        return weights, *curves


@displayed
@checked
@dataclass(frozen=True, eq=False)
class Result:
    """The clients' models (a stack) and the backbone that runs them, what they cost, the mixing weight ``(C,)`` of
    those that are merged, and the ``history`` of what was trained for them."""

    adapted: AdaptedBackbone
    adapters: Stack
    ledger: Ledger
    seconds: NonNegative
    weight: ClientWeights | None = None
    history: Any = None

    def __post_init__(self):
        object.__setattr__(self, "adapters", check_adapter(self.adapted, self.adapters, "adapters", stacked=True))
        if self.weight is not None:
            check_weight(self.weight, self.adapters)

    def _title(self) -> str:
        weight = "" if self.weight is None else f"; λ {span(self.weight, 2)}"
        return f"{self.ledger._title()}, {self.seconds:.1f} s{weight}"

    def _columns(self) -> dict[str, Tensor]:
        return self.ledger._columns() | ({} if self.weight is None else {"λ": self.weight})

    def evaluate(self, split: Split, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Loss (nats) and accuracy (a fraction) of each client's model on its part of ``split``, ``(C,)`` each."""
        return evaluate(self.adapted, self.adapters, split, execution=Execution(chunk_size=chunk_size))


def as_method(value: Any) -> Method:
    """A function of a run as it is (an ``Algorithm`` is one), and an estimator ``(adapted, federated, local, split)``
    as the method that merges with its weights.

    Raises ``ValueError`` for what is neither, before anything is trained.
    """
    is_function = callable(value) and not isinstance(value, type)
    if is_function and _takes(1, value):
        return value
    if is_function and _takes(4, value):
        return with_estimator(value)
    invalid("", "a function of a run, an Algorithm or an estimator (adapted, federated, local, split)", value)


def _takes(arguments: int, function: Callable) -> bool:
    """Whether a function can be called with so many arguments by position."""
    try:
        signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    return True


Method = Callable[[Run], Result]
AnyMethod = Annotated[Method, BeforeValidator(as_method)]
Prepare = Callable[[Setting, int], tuple[AdaptedBackbone, Federation]]  # what ``prepare`` is
ChoosePair = Callable[[Run], ModelPair]


def initial_adapter(run: Run) -> Result:
    """The backbone as it is: nothing is trained."""
    clients = len(run.federation)
    return Result(run.adapted, repeat_adapter(run.adapted.initial, clients), Ledger.zeros(clients), 0.0)


def federated_model(run: Run) -> Result:
    """The federated one of the two models that are merged, with what its own training costs."""
    pair = run.pair
    weight = torch.ones(len(run.federation))
    return Result(run.adapted, pair.federated, pair.ledgers[0], pair.seconds[0], weight, pair.history)


def local_model(run: Run) -> Result:
    """The local one of the two models that are merged, with what its training costs; if it starts from the federated
    model, that one's training, too."""
    pair = run.pair
    ledger, seconds = pair.ledgers[1], pair.seconds[1]
    if pair.local_from_federated:
        ledger, seconds = pair.ledgers[0] + ledger, pair.seconds[0] + seconds
    return Result(run.adapted, pair.local, ledger, seconds, torch.zeros(len(run.federation)), pair.history)


def independent_models(run: Run) -> ModelPair:
    """The pair as the paper has it: the two models are trained independently."""
    return run.pair


@checked
def local_from_federated(lr_scale: Positive = 1.0) -> ChoosePair:
    """The pair whose local models start from the federated one; ``lr_scale`` is that of their steps."""
    return lambda run: run.pair_from_federated(lr_scale)


@checked
def merging(
    merge: Callable[[Run, ModelPair], Adapter | tuple[Adapter, Estimate]], model_pair: ChoosePair = independent_models
) -> Method:
    """A merge of a model pair; what an estimate's numbers weigh when they travel is counted."""

    def method(run: Run) -> Result:
        pair = model_pair(run)
        began = time.perf_counter()
        merged = merge(run, pair)
        seconds = sum(pair.seconds) + time.perf_counter() - began
        ledger = pair.ledgers[0] + pair.ledgers[1]
        if not isinstance(merged, tuple):
            return Result(run.adapted, merged, ledger, seconds, history=pair.history)
        adapters, estimate = merged
        up, down = (4 * floats for floats in estimate.floats)
        ledger = ledger.add(torch.arange(len(run.federation)), up=up, down=down)
        return Result(run.adapted, adapters, ledger, seconds, estimate.client_weight, pair.history)

    return method


@checked
def with_estimator(
    estimator: Callable[..., Estimate],
    merge: Callable[..., Adapter] = merge_exact,
    model_pair: ChoosePair = independent_models,
) -> Method:
    """A model pair merged with the weight of an estimator.

    It is on the calibration split, unless ``on_train`` or ``on_calibration`` have said on which (as in ``ESTIMATORS``).
    It returns an ``Estimate``, or the weights alone ``(C,)``.
    """
    if not _takes(4, estimator):
        invalid("estimator", "a function of (adapted, federated, local, split)", estimator)
    on_split = estimator if isinstance(estimator, OnSplit) else OnSplit(estimator, "calibration")

    def merged(run: Run, pair: ModelPair) -> tuple[Adapter, Estimate]:
        found = on_split(run.adapted, *pair.models, run.federation)
        estimate = found if isinstance(found, Estimate) else Estimate(found)
        return merge(*pair.models, estimate.weight), estimate

    return merging(merged, model_pair)


@checked
def oracle_weight(weights: Weights, loss: Annotated[Tensor, Numbers("C W")]) -> Tensor:
    """Each client's best of the ``weights`` ``(W,)`` by its test loss ``(C, W)``: a reference and never a method."""
    return weights.to(loss.device)[loss.argmin(1)]


def best_on_test(run: Run, pair: ModelPair) -> tuple[Adapter, Estimate]:
    """Each client's best weight of an 11-point grid on its test data: a reference and never a method."""
    estimate = Estimate(oracle_weight(*run.test_curve[:2]))
    return merge_exact(*pair.models, estimate.weight), estimate


MODEL_PAIR_METHODS: dict[str, Method] = {  # what the command compares: the two models, their merges, and the reference
    "backbone": initial_adapter,
    "federated": federated_model,
    "local": local_model,
    **{name: with_estimator(estimator) for name, estimator in ESTIMATORS.items()},
    ORACLE: merging(best_on_test),
}


@checked
def run_methods(
    setting: Setting,
    seeds: Seeds = (0,),
    methods: Named[AnyMethod] = MODEL_PAIR_METHODS,
    *,
    prepare: Prepare = prepare,
    finished: Collection[tuple[str, int]] = (),
    progress: Flag = False,
) -> Iterator[tuple[str, Run, Result]]:
    """Every method on every seed, one after another: its name, the run and its result as soon as it is there.

    ``finished``: methods and seeds that are left out.
    """
    for seed in seeds:
        missing = {name: method for name, method in methods.items() if (name, seed) not in finished}
        if missing:
            run = Run(*prepare(setting, seed), setting, seed, progress)
        for name, method in missing.items():
            yield name, run, method(run)


def save_models(out: Path, name: str, run: Run, result: Result) -> None:
    """A seed's adapters as PEFT folders: ``federated``, and ``client-i/local`` and ``client-i/potara-calibrated``."""
    folder = out / "adapters" / f"seed-{run.seed}"
    if name == "federated":
        save_adapter(run.adapted, client_adapter(result.adapters, 0), folder / name)
    if name in ("local", "potara-calibrated"):
        for client in range(len(run.federation)):
            save_adapter(run.adapted, client_adapter(result.adapters, client), folder / f"client-{client}" / name)
