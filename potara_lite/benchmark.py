"""Methods × clients × seeds on one federation, as rows of one tidy table."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from .adapters import AdaptedBackbone, Adapter, attach, repeat_adapter
from .backbones import lab_vit
from .connectivity import along_segment, grid
from .data import Federation, fashion_mnist
from .estimators import Estimate, estimate_fisher, estimate_pooled, estimate_uniform, head_and_body
from .federated import Ledger, fedit
from .merging import merge_exact
from .training import evaluate, train

__all__ = [
    "COLUMNS",
    "ESTIMATORS",
    "ORACLE",
    "Outcome",
    "Pair",
    "Setting",
    "compare",
    "oracle_weight",
    "prepare",
    "summary",
    "train_pair",
    "write",
]

COLUMNS = ["method", "seed", "client", "accuracy", "loss", "weight", "bytes_up", "bytes_down", "steps", "seconds"]


@dataclass(frozen=True)
class Setting:
    """One federation and how its models are trained. The defaults were chosen on calibration data of other seeds
    (``benchmarks/choose_default.py``). ``federated_lr`` and ``local_lr``, of the pair, are in units of ``lr``."""

    clients: int = 8
    train_size: int = 100
    calibration_size: int = 30
    test_size: int = 250
    alpha: float = 0.5
    shift: bool = False
    rank: int = 4
    batch_size: int = 8
    lr: float = 4e-3
    federated_lr: float = 1.0
    local_lr: float = 1.0
    rounds: int = 40
    round_steps: int = 5
    local_steps: int = 100
    chunk_size: int | None = None
    device: str = "cpu"

    def __post_init__(self):
        for name in ("clients", "train_size", "calibration_size", "test_size", "rank", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("rounds", "round_steps", "local_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("alpha", "lr", "federated_lr", "local_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    @property
    def partition(self) -> dict:
        """What a data set is told about the clients and their examples."""
        names = "clients", "train_size", "calibration_size", "test_size", "alpha", "shift"
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Pair:
    """The two models of every client as stacks, trained independently, and what each cost."""

    federated: Adapter
    local: Adapter
    ledgers: tuple[Ledger, Ledger]
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Outcome:
    """One method on one federation: a value per client, and the clients' models as a stack."""

    method: str
    seed: int
    loss: Tensor
    accuracy: Tensor
    weight: Tensor
    ledger: Ledger
    seconds: float
    adapters: Adapter
    curve: tuple[Tensor, Tensor, Tensor] | None = None  # weights (W,), test loss (C, W), test accuracy (C, W)

    def frame(self) -> pd.DataFrame:
        """A row per client, in the order of ``COLUMNS``."""
        columns = {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "weight": self.weight,
            "bytes_up": self.ledger.up,
            "bytes_down": self.ledger.down,
            "steps": self.ledger.steps,
        }
        frame = pd.DataFrame({name: tensor.cpu().numpy() for name, tensor in columns.items()})
        frame.insert(0, "client", range(len(frame)))
        frame.insert(0, "seed", self.seed)
        frame.insert(0, "method", self.method)
        return frame.assign(seconds=round(self.seconds, 3))[COLUMNS]


def prepare(setting: Setting, seed: int) -> tuple[AdaptedBackbone, Federation]:
    """The lab ViT with an empty adapter and the Fashion-MNIST federation of this setting and seed.

    The inputs are the images' tokens: the backbone's frozen prefix is computed once (``LabViT.embed``).
    """
    federation = fashion_mnist(**setting.partition, seed=seed)
    backbone = lab_vit(federation.classes)
    adapted = attach(backbone, rank=setting.rank, seed=seed).to(setting.device)
    return adapted, federation.to(setting.device).map(backbone.to(setting.device).embed)


def train_pair(
    adapted: AdaptedBackbone, federation: Federation, setting: Setting, seed: int, progress: bool = False
) -> Pair:
    """Train the federated and the local models, each from the same initial adapter, with batches of its own."""
    options = dict(batch_size=setting.batch_size, chunk_size=setting.chunk_size, progress=progress)
    clients, alone = len(federation), dict(lr=setting.local_lr * setting.lr, steps=setting.local_steps, seed=(seed, 1))
    together = dict(lr=setting.federated_lr * setting.lr, rounds=setting.rounds, seed=seed)
    began = time.perf_counter()
    federated = fedit(adapted, federation.train, local_steps=setting.round_steps, **together, **options)
    middle = time.perf_counter()
    local = train(adapted, repeat_adapter(adapted.initial, clients), federation.train, **alone, **options)
    seconds = (middle - began, time.perf_counter() - middle)
    paid = Ledger.zeros(clients).add(torch.arange(clients), steps=setting.local_steps)
    return Pair(repeat_adapter(federated.adapter, clients), local.adapters, (federated.ledger, paid), seconds)


ESTIMATORS: dict[str, Callable[..., Estimate]] = {  # (adapted, federated, local, data=federation)
    "uniform": lambda model, *pair, data: estimate_uniform(model, *pair, data.calibration),
    "potara-paper": lambda model, *pair, data: estimate_fisher(model, *pair, data.train),
    "potara": lambda model, *pair, data: estimate_pooled(model, *pair, data.calibration, by=head_and_body),
}
ORACLE = "oracle weight (test data, reference)"


def oracle_weight(weights: Tensor, loss: Tensor) -> Tensor:
    """Each client's best of the ``weights`` ``(W,)`` by its test loss ``(C, W)``: a reference and never a method."""
    return weights.to(loss.device)[loss.argmin(1)]


def compare(
    adapted: AdaptedBackbone, federation: Federation, setting: Setting, seed: int, progress: bool = False
) -> Iterator[Outcome]:
    """Train, merge and test; yields each method's ``Outcome`` as soon as it is there.

    In order: the backbone as it is, federated, local, the merges, and the oracle: each client's best weight of an
    11-point grid *on its test data*, a reference and never a method; its outcome carries the curves.
    """
    clients = len(federation)

    def outcome(method, adapters, ledger, seconds, weight, curve=None) -> Outcome:
        loss, accuracy = evaluate(adapted, adapters, federation.test, chunk_size=setting.chunk_size)
        weight = torch.full((clients,), weight) if isinstance(weight, float) else weight
        return Outcome(method, seed, loss, accuracy, weight, ledger, seconds, adapters, curve)

    yield outcome("backbone", repeat_adapter(adapted.initial, clients), Ledger.zeros(clients), 0.0, torch.nan)
    pair = train_pair(adapted, federation, setting, seed, progress)
    general = outcome("federated", pair.federated, pair.ledgers[0], pair.seconds[0], 1.0)
    yield general
    personal = outcome("local", pair.local, pair.ledgers[1], pair.seconds[1], 0.0)
    yield personal
    both, trained, everyone = pair.ledgers[0] + pair.ledgers[1], sum(pair.seconds), torch.arange(clients)
    for method, estimator in ESTIMATORS.items():
        began = time.perf_counter()
        found = estimator(adapted, pair.federated, pair.local, data=federation)
        merged = merge_exact(pair.federated, pair.local, found.weight)
        seconds = trained + time.perf_counter() - began
        up, down = (4 * floats for floats in found.floats)
        yield outcome(method, merged, both.add(everyone, up=up, down=down), seconds, found.client_weight)
    weights = grid(11)
    inner = along_segment(
        adapted, pair.federated, pair.local, federation.test, weights[1:-1], chunk_size=setting.chunk_size
    )
    ends = (personal.loss, general.loss), (personal.accuracy, general.accuracy)  # measured above
    loss, accuracy = (torch.cat([a[:, None], part, b[:, None]], dim=1) for part, (a, b) in zip(inner, ends))
    best = oracle_weight(weights, loss)
    merged = merge_exact(pair.federated, pair.local, best)
    yield outcome(ORACLE, merged, both, trained, best, (weights, loss.cpu(), accuracy.cpu()))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per method: means over clients and seeds, the standard error over seeds, the worst client, the costs.

    ``accuracy`` and ``loss`` (nats) are means over clients, then over seeds, ``±`` their standard errors over seeds
    (NaN for one seed); ``worst`` is the lowest client accuracy of each seed, averaged; ``bytes`` are up plus down per
    client.
    """
    rows = rows.assign(bytes=rows.bytes_up + rows.bytes_down)
    seeds = rows.groupby(["method", "seed"], sort=False)
    each = seeds[["accuracy", "loss", "weight", "bytes", "steps", "seconds"]].mean()
    each["worst"] = seeds.accuracy.min()
    methods = each.groupby("method", sort=False)
    table = methods.mean()
    table["±"], table["± loss"] = methods.accuracy.sem(), methods.loss.sem()
    return table[["accuracy", "±", "worst", "loss", "± loss", "weight", "bytes", "steps", "seconds"]]


def write(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader or an interruption never sees half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text)
    os.replace(partial, path)
