"""One federation and seed: prepare it, train the two models of every client, and see what methods make of them.

A *method* is a function of a ``Run`` that returns a ``Result``: the clients' models and what they cost. The merges of
the two models are here; ``baselines.methods`` has the rest of the field in the same form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from .adapters.lora import AdaptedBackbone, attach
from .adapters.state import Adapter, door, like_federated, numbers, repeat_adapter, stack, weights_of_clients
from .checks import check_fields, function as any_function, kind, named, not_negative, several, whole
from .estimators import ESTIMATORS, Estimate
from .federation.sources import fashion_mnist
from .federation.split import Federation, Split
from .federation.tasks import wordnet_glosses
from .merging.connectivity import along_segment, weight_grid
from .merging.merge import merge_exact
from .models.frozen_trunk import linear_layers
from .models.language import installed_minilm, text_encoder, text_tokenizer
from .models.vit import lab_vit
from .setting import Setting
from .training.batching import Execution
from .training.fedavg import Ledger, fedit
from .training.train import evaluate, train

ORACLE = "oracle weight (test data, reference)"


@dataclass(frozen=True)
class ModelPair:
    """The two models of every client as stacks, what the training of each cost, and whether the local ones were trained
    from the federated one or, as the paper has it, independently of it."""

    federated: Adapter
    local: Adapter
    ledgers: tuple[Ledger, Ledger]
    seconds: tuple[float, float]
    local_from_federated: bool = False

    def __post_init__(self):
        pair = several(kind("Ledger"), least=2), several(not_negative, least=2)
        check_fields(self, federated=stack, local=like_federated, ledgers=pair[0], seconds=pair[1])

    @property
    def models(self) -> tuple[Adapter, Adapter]:
        """The federated and the local stack."""
        return self.federated, self.local


@door()
def prepare(setting: Setting, seed: int) -> tuple[AdaptedBackbone, Federation]:
    """The backbone with an empty adapter and the federation of this setting and seed.

    What the frozen part of the backbone makes of an example is computed once (``AdaptedBackbone.embed``).
    """
    adapted, federation = (prepare_text if setting.is_text else prepare_images)(setting, seed)
    adapted = adapted.to(setting.device)
    return adapted, federation.to(setting.device).map(adapted.embed)


@door()
def prepare_images(setting: Setting, seed: int) -> tuple[AdaptedBackbone, Federation]:
    """The lab ViT with LoRA in its blocks, and Fashion-MNIST."""
    federation = fashion_mnist(**setting.partition, seed=seed)
    return attach(lab_vit(federation.classes), rank=setting.rank, seed=seed), federation


@door()
def prepare_text(setting: Setting, seed: int) -> tuple[AdaptedBackbone, Federation]:
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


@door()
def training_options(setting: Setting, lr_scale: float = 1.0) -> dict:
    """What ``train`` and ``fedit`` are told; ``lr_scale`` multiplies the setting's learning rate."""
    execution = Execution(chunk_size=setting.chunk_size)
    return dict(batch_size=setting.batch_size, lr=lr_scale * setting.lr, execution=execution)


@door()
def train_pair(
    adapted: AdaptedBackbone, federation: Federation, setting: Setting, seed: int, progress: bool = False
) -> ModelPair:
    """Train the federated and the local models, with batches of their own: each from the same initial adapter, or, with
    ``setting.local_from_federated``, the local ones from the finished federated one."""
    clients, began = len(federation), time.perf_counter()
    options = training_options(setting, setting.federated_lr_scale) | dict(rounds=setting.rounds, progress=progress)
    shared = fedit(adapted, federation.train, local_steps=setting.round_steps, seed=seed, **options)
    federated, seconds = repeat_adapter(shared.adapter, clients), time.perf_counter() - began
    start = federated if setting.local_from_federated else repeat_adapter(adapted.initial, clients)
    local, ledger, more = train_local(adapted, start, federation, setting, seed, progress)
    return ModelPair(federated, local, (shared.ledger, ledger), (seconds, more), setting.local_from_federated)


@door(start=stack)
def train_local(
    adapted: AdaptedBackbone,
    start: Adapter,
    federation: Federation,
    setting: Setting,
    seed: int,
    progress: bool = False,
) -> tuple[Adapter, Ledger, float]:
    """The local models from the stack ``start``, what their training cost, and its seconds."""
    clients, began = len(federation), time.perf_counter()
    options = training_options(setting, setting.local_lr_scale) | dict(steps=setting.local_steps, progress=progress)
    local = train(adapted, start, federation.train, seed=(seed, 1), **options).adapters
    ledger = Ledger.zeros(clients).add(torch.arange(clients), steps=setting.local_steps)
    return local, ledger, time.perf_counter() - began


@dataclass
class Run:
    """One federation and seed, with what its methods share: each part is made when first asked for."""

    adapted: AdaptedBackbone
    federation: Federation
    setting: Setting
    seed: int
    progress: bool = False
    pairs: dict[tuple, ModelPair] = field(
        default_factory=dict, init=False, repr=False
    )  # further ones, by what they are

    def __post_init__(self):
        check_fields(self)

    @cached_property
    def pair(self) -> ModelPair:
        """The two models of every client that all merges share."""
        return train_pair(self.adapted, self.federation, self.setting, self.seed, self.progress)

    def pair_from_federated(self, lr_scale: float = 1.0) -> ModelPair:
        """The pair whose local models were trained from the federated one, so not independently of it."""
        key = "local from federated", lr_scale
        if key not in self.pairs:
            pair, setting = self.pair, replace(self.setting, local_lr_scale=lr_scale)
            local, ledger, seconds = train_local(
                self.adapted, pair.federated, self.federation, setting, self.seed, self.progress
            )
            cost = (pair.ledgers[0], ledger), (pair.seconds[0], seconds)
            self.pairs[key] = ModelPair(pair.federated, local, *cost, local_from_federated=True)
        return self.pairs[key]

    @cached_property
    def test_curve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mixing weights ``(W,)``, and test loss and accuracy ``(C, W)`` of the pair's exact merge: for reference."""
        weights, execution = weight_grid(11), Execution(chunk_size=self.setting.chunk_size)
        curves = along_segment(self.adapted, *self.pair.models, self.federation.test, weights, execution=execution)
        return weights, *curves


@dataclass(frozen=True)
class Result:
    """The clients' models (a stack) and the backbone that runs them, what they cost, and the mixing weight ``(C,)`` of
    those that are merged."""

    adapted: AdaptedBackbone
    adapters: Adapter
    ledger: Ledger
    seconds: float
    weight: Tensor | None = None

    def __post_init__(self):
        check_fields(self, adapters=stack, ledger=kind("Ledger"), seconds=not_negative, weight=weights_of_clients)

    def evaluate(self, split: Split, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
        """Loss (nats) and accuracy (a fraction) of each client's model on its part of ``split``, ``(C,)`` each."""
        return evaluate(self.adapted, self.adapters, split, execution=Execution(chunk_size=chunk_size))


Method = Callable[[Run], Result]
ChoosePair = Callable[[Run], ModelPair]


def initial_adapter(run: Run) -> Result:
    """The backbone as it is: nothing is trained."""
    clients = len(run.federation)
    return Result(run.adapted, repeat_adapter(run.adapted.initial, clients), Ledger.zeros(clients), 0.0)


@door(which=whole(0, 1))
def one_of_pair(which: int) -> Method:
    """One of the two models that are merged: 0 the federated, 1 the local one, at its part of the steps."""

    def method(run: Run) -> Result:
        pair, weight = run.pair, torch.full((len(run.federation),), float(1 - which))
        ledger, seconds = pair.ledgers[which], pair.seconds[which]
        if which == 1 and pair.local_from_federated:
            ledger, seconds = pair.ledgers[0] + ledger, pair.seconds[0] + seconds
        return Result(run.adapted, pair.models[which], ledger, seconds, weight)

    return method


def independent_models(run: Run) -> ModelPair:
    """The pair as the paper has it: the two models are trained independently."""
    return run.pair


@door()
def local_from_federated(lr_scale: float = 1.0) -> ChoosePair:
    """The pair whose local models start from the federated one; ``lr_scale`` is that of their steps."""
    return lambda run: run.pair_from_federated(lr_scale)


@door()
def merging(
    merge: Callable[[Run, ModelPair], Adapter | tuple[Adapter, Estimate]], model_pair: ChoosePair = independent_models
) -> Method:
    """A merge of a pair; what an estimate's numbers weigh when they travel is counted."""

    def method(run: Run) -> Result:
        pair, began = model_pair(run), time.perf_counter()
        merged = merge(run, pair)
        seconds, ledger = sum(pair.seconds) + time.perf_counter() - began, pair.ledgers[0] + pair.ledgers[1]
        if not isinstance(merged, tuple):
            return Result(run.adapted, merged, ledger, seconds)
        adapters, estimate = merged
        up, down = (4 * floats for floats in estimate.floats)
        ledger = ledger.add(torch.arange(len(run.federation)), up=up, down=down)
        return Result(run.adapted, adapters, ledger, seconds, estimate.client_weight)

    return method


@door()
def with_estimator(estimator: Callable[..., Estimate], merge=merge_exact, model_pair=independent_models) -> Method:
    """A pair merged with the weight of an estimator like those of ``ESTIMATORS``."""

    def merged(run: Run, pair: ModelPair) -> tuple[Adapter, Estimate]:
        estimate = estimator(run.adapted, *pair.models, run.federation)
        return merge(*pair.models, estimate.weight), estimate

    return merging(merged, model_pair)


@door(weights=numbers(1, least=0, most=1), loss=numbers(2))
def oracle_weight(weights: Tensor, loss: Tensor) -> Tensor:
    """Each client's best of the ``weights`` ``(W,)`` by its test loss ``(C, W)``: a reference and never a method."""
    if len(weights) != loss.shape[1]:
        raise ValueError(f"weights: {len(weights)} of them for a loss at {loss.shape[1]}")
    return weights.to(loss.device)[loss.argmin(1)]


def best_on_test(run: Run, pair: ModelPair) -> tuple[Adapter, Estimate]:
    """Each client's best weight of an 11-point grid on its test data: a reference and never a method."""
    estimate = Estimate(oracle_weight(*run.test_curve[:2]))
    return merge_exact(*pair.models, estimate.weight), estimate


MODEL_PAIR_METHODS: dict[str, Method] = {  # what the command compares: the two models, their merges, and the reference
    "backbone": initial_adapter,
    "federated": one_of_pair(0),
    "local": one_of_pair(1),
    **{name: with_estimator(estimator) for name, estimator in ESTIMATORS.items()},
    ORACLE: merging(best_on_test),
}


@door(methods=named(any_function))
def run_methods(
    setting: Setting,
    seeds: Sequence[int] = (0,),
    methods: Mapping[str, Method] = MODEL_PAIR_METHODS,
    *,
    prepare: Callable[[Setting, int], tuple[AdaptedBackbone, Federation]] = prepare,
    finished: Collection[tuple[str, int]] = (),
    progress: bool = False,
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
