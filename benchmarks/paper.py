"""The paper, claim by claim: every experiment behind docs/reproduction.md.

    python benchmarks/paper.py --processes 2      # all parts; what is finished is kept (paper/) and never recomputed
    python benchmarks/paper.py --part budgets     # one of them
    python benchmarks/paper.py --scale quick      # seconds; its figures mean nothing
    python benchmarks/paper.py --report           # the rows of what is finished

Fashion-MNIST and the lab ViT with LoRA in the last of its four blocks: the features below are computed once, so that
the reported numbers of steps fit on two cores. Everything is a sweep of methods over settings, as in ``comparison.py``:

- ``tune``: learning rates of ``budgets``, by 150 calibration examples per client of seed 100;
- ``budgets``: 400 federated + 300 local steps for the merges, 600 for each baseline, as reported;
- ``conditions``: one pair of models under many conditions, and its merges;
- ``inits``: the same under other initialisations of LoRA;
- ``samples``: estimators of λ by how many samples they see and with their options;
- ``late``: clients that took part in no round, against the same clients when they took part;
- ``other-budgets``, ``other-conditions``: once more on grey CIFAR-10 (``--cifar10``: a folder for torchvision, or a
  file of JPEGs); rates as tuned above;
- ``three-tune``, ``three``: a third model, of a cluster of similar clients, in addition to the federation's and the
  client's; its options by seed 100.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from other_data import grey_cifar10
from pages import facts
from peft import LoraConfig

from potara_lite import Setting, attach, fashion_mnist, lab_vit, merge_factors
from potara_lite.adapters.state import adapter_bytes, stack_adapters
from potara_lite.baselines.clusters import three_models
from potara_lite.baselines.methods import FAMILIES, REFERENCES
from potara_lite.baselines.sweep import read_results, sweep
from potara_lite.estimators import (
    Estimate,
    OnSplit,
    estimate_calibrated,
    estimate_curve,
    estimate_paper,
    estimate_uniform,
)
from potara_lite.experiment import (
    Method,
    ModelPair,
    Run,
    federated_model,
    local_from_federated,
    local_model,
    training_options,
    with_estimator,
)
from potara_lite.federation.split import Split
from potara_lite.models.frozen_trunk import linear_layers
from potara_lite.training.fedavg import Ledger, fedit

HERE = Path(__file__).parent
INF = float("inf")
GZIP = {"method": "gzip", "mtime": 0}  # the same rows are the same bytes


def prepare_vit(setting: Setting, seed: int, *, init: bool | str = True, cifar10: str | None = None):
    """The lab ViT with LoRA in its last block, initialised by PEFT as ``init`` says, and Fashion-MNIST; or, given where
    CIFAR-10 is, grey images of its test split, which the backbone has not seen."""
    federation = grey_cifar10(setting, seed, cifar10) if cifar10 else fashion_mnist(**setting.partition, seed=seed)
    backbone = lab_vit(federation.classes)
    config = LoraConfig(
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        target_modules=linear_layers(backbone, last=1),
        modules_to_save=["head"],
        init_lora_weights=init,
    )
    adapted = attach(backbone, config=config, seed=seed).to(setting.device)
    return adapted, federation.to(setting.device).map(adapted.embed)


def on(part: str, samples: int, estimate: Callable[..., Estimate], **options) -> Callable[..., Estimate]:
    """An estimator on the first samples of every client's ``train`` or ``calibration`` part."""

    def estimator(adapted, federated, local, split: Split) -> Estimate:
        return estimate(adapted, federated, local, split.head(samples), **options)

    return OnSplit(estimator, part)


def every(weight: float) -> Callable[..., Estimate]:
    """The same λ for every client."""

    def estimator(adapted, federated, local, split: Split) -> Estimate:
        return Estimate(torch.full((len(split),), weight, dtype=torch.float64))

    return estimator


# --- the reported budgets -------------------------------------------------------------------------------------------
PAPER = Setting(train_size=1000, test_size=500, rounds=80, round_steps=5, local_steps=300)
BUDGETS = {"8 clients of 1000": PAPER, "20 clients of 300": replace(PAPER, clients=20, train_size=300, test_size=250)}
BASELINE_ROUNDS = 60  # of 5 steps, and 300 local ones: 600, which each baseline divides as its rounds need
RATES = 1, 0.5, 2, 4
FURTHER = {"FedIT": (8,), "FFA-LoRA": (8, 16), "federated part": (8,), "local": (0.25,), "local part": (0.25,)}
FURTHER["local from federated"] = (0.25,)  # where the best of the four was at an end
BASELINES = "local", "FedIT", "FFA-LoRA", "FedSA-LoRA", "FedDPA-T", "FedALT", "Ditto"


def with_setting(method: Method, **changes: float) -> Method:
    """A method on the run's federation with another setting."""
    return lambda run: method(replace(run, setting=replace(run.setting, **changes)))


def with_600_steps(method: Method) -> Method:
    """A baseline at 600 steps per client, where the merges have 700."""
    return with_setting(method, rounds=BASELINE_ROUNDS)


def rates_of(name: str) -> tuple[float, ...]:
    """The learning rates that are tried."""
    return *RATES, *FURTHER.get(name, ())


def label(name: str, rate: float) -> str:
    return f"{name} (lr_scale={rate:g})"


def candidates() -> dict[str, Method]:
    """Every baseline, and each of the two models of the merges, at every learning rate."""
    found = {label(name, r): with_600_steps(FAMILIES[name](lr_scale=r)) for name in BASELINES for r in rates_of(name)}
    for rate in rates_of("federated part"):  # each without the other
        only = with_setting(federated_model, federated_lr_scale=rate, local_steps=0)
        found[label("federated part", rate)] = only
    for rate in rates_of("local part"):
        found[label("local part", rate)] = with_setting(local_model, local_lr_scale=rate, rounds=0)
    start = FAMILIES["uniform, local from federated"]
    return found | {label("local from federated", r): start(lr_scale=r) for r in rates_of("local from federated")}


def best_rates(rows: pd.DataFrame) -> dict[str, float]:
    """Each method's learning rate with the highest mean accuracy, the first of equals."""
    accuracy = rows.groupby("method").accuracy.mean()
    names = [*BASELINES, "federated part", "local part", "local from federated"]
    return {name: max(rates_of(name), key=lambda rate: accuracy[label(name, rate)]) for name in names}


def contestants(rates: dict[str, float]) -> dict[str, Method]:
    """The baselines and the merges at their learning rates."""
    found = {name: with_600_steps(FAMILIES[name](lr_scale=rates[name])) for name in BASELINES}
    merges = {
        name: FAMILIES[name]()
        for name in ("federated part", "local part", "uniform", "potara-paper", "potara-calibrated")
    } | REFERENCES
    start = local_from_federated(rates["local from federated"])
    estimators = {"uniform": estimate_uniform, "potara-calibrated": estimate_calibrated}
    for name, estimate in estimators.items():
        merges[f"{name}, local from federated"] = with_estimator(on("calibration", 30, estimate), model_pair=start)
    return found | merges


# --- conditions: one pair of models and its merges ------------------------------------------------------------------
BASE = Setting(calibration_size=100, test_size=250)  # estimators see the first 30 of the 100
GRID = [i / 8 for i in range(9)]
CONDITIONS = {
    "base": BASE,
    "alpha 0.1": replace(BASE, alpha=0.1),
    "alpha 2": replace(BASE, alpha=2.0),
    "alpha inf": replace(BASE, alpha=INF),
    "feature shift": replace(BASE, shift=True),
    "rank 2": replace(BASE, rank=2),
    "rank 8": replace(BASE, rank=8),
    "rank 16": replace(BASE, rank=16),
    "rank 32": replace(BASE, rank=32),
    "50 + 250 steps": replace(BASE, rounds=10, local_steps=250),
    "100 + 200 steps": replace(BASE, rounds=20, local_steps=200),
    "250 + 50 steps": replace(BASE, rounds=50, local_steps=50),
    "20 clients": replace(BASE, clients=20),
    "100 clients": replace(BASE, clients=100, calibration_size=30, test_size=60),
    "50 + 25 steps": replace(BASE, rounds=10, local_steps=25),
    "400 + 400 steps": replace(BASE, rounds=80, local_steps=400),
    "lr / 4": replace(BASE, lr=BASE.lr / 4),
    "lr x 4": replace(BASE, lr=BASE.lr * 4),
    "lr x 16": replace(BASE, lr=BASE.lr * 16),
}
PAIR = {f"lambda = {weight:g}": with_estimator(every(weight)) for weight in GRID} | {
    "factors, lambda = 0.5": with_estimator(every(0.5), merge_factors),
    "potara-paper": with_estimator(on("train", 30, estimate_paper)),
    "potara-calibrated": with_estimator(on("calibration", 30, estimate_calibrated)),
}
INITS = {"gaussian": "gaussian", "orthogonal": "orthogonal", "random B": False}
SAMPLED = {name: CONDITIONS[name] for name in ("base", "alpha 0.1", "alpha 2", "feature shift")}
SIZES = 5, 10, 30, 100
DAMPINGS = 1e-8, 0.01, 0.1, 1.0


def sampled() -> dict[str, Method]:
    """Estimators by the number of samples, and our reading of the paper's with its unknown options."""
    found = {}
    for size in SIZES:
        found[f"paper, {size} samples"] = on("train", size, estimate_paper)
        found[f"calibrated, {size} samples"] = on("calibration", size, estimate_calibrated)
        found[f"own grid, {size} samples"] = on("calibration", size, estimate_curve)
    for part, name in (("train", "training"), ("calibration", "held-out")):
        for damping in DAMPINGS:
            options = dict(damping=damping, relative=damping > 1e-6)
            found[f"paper, 30 {name} samples, damping {damping:g}"] = on(part, 30, estimate_paper, **options)
    found["paper on the deltas, 30 training samples"] = on("train", 30, estimate_paper, on_delta=True)
    grid = {f"lambda = {weight:g}": with_estimator(every(weight)) for weight in GRID}
    return grid | {name: with_estimator(estimator) for name, estimator in found.items()}


# --- what the paper leaves open -------------------------------------------------------------------------------------
FOLDS = 4


def federated_without(late: bool, run: Run) -> ModelPair:
    """The pair whose federated model comes from three quarters of the clients: for every client one of which it was no
    part (``late``: it downloads it once and uploads nothing), or one of which it was."""
    key = "without a quarter", late
    if key not in run.pairs:
        clients, setting, adapted = len(run.federation), run.setting, run.adapted
        fold, models = torch.arange(clients) % FOLDS, []
        options = training_options(setting, setting.federated_lr_scale)
        options |= dict(rounds=setting.rounds, local_steps=setting.round_steps, seed=run.seed)
        for left_out in range(FOLDS):
            others = (fold != left_out).nonzero().squeeze(1).tolist()
            models.append(fedit(adapted, run.federation.train.rows(others), **options))
        for is_late in (True, False):
            received = [models[f if is_late else (f + 1) % FOLDS] for f in fold.tolist()]
            ledger = Ledger.zeros(clients).add(torch.arange(clients), down=adapter_bytes(adapted.initial))
            if not is_late:  # the same for each of those who took part
                cost = {name: int(each[0]) for name, each in vars(models[0].ledger).items()}
                ledger = Ledger.zeros(clients).add(torch.arange(clients), **cost)
            federated = stack_adapters([one.adapter for one in received])
            costs = (ledger, run.pair.ledgers[1]), run.pair.seconds
            run.pairs[key[0], is_late] = ModelPair(federated, run.pair.local, *costs)
    return run.pairs[key]


def latecomers() -> dict[str, Method]:
    """The federated model and merges of clients that came late, and of the same clients where they took part."""
    found = {"local": local_model}
    for late, name in ((True, "late"), (False, "took part")):
        model_pair = partial(federated_without, late)
        found[f"federated, {name}"] = with_estimator(every(1.0), model_pair=model_pair)
        found[f"uniform, {name}"] = with_estimator(every(0.5), model_pair=model_pair)
        found[f"potara-calibrated, {name}"] = with_estimator(
            on("calibration", 30, estimate_calibrated), model_pair=model_pair
        )
    return found


LATE = {name: CONDITIONS[name] for name in ("alpha 0.1", "base", "alpha 2", "feature shift")}
THREE = {name: CONDITIONS[name] for name in ("feature shift", "base")} | {
    "feature shift, 16 clients": replace(BASE, shift=True, clients=16)
}
TRIPLES = [  # what is tried, one option at a time
    dict(clusters=2, client_share=0.5, cluster_share=0.5),
    *(dict(clusters=clusters, client_share=0.5, cluster_share=0.5) for clusters in (3, 4)),
    *(dict(clusters=2, client_share=share, cluster_share=0.5) for share in (0.0, 0.25, 0.75)),
    dict(clusters=2, client_share=0.5, cluster_share=0.25),
]


def triple(options: dict[str, float]) -> str:
    return f"three models ({', '.join(f'{name}={value:g}' for name, value in options.items())})"


def triples(rows: pd.DataFrame | None) -> dict[str, Method]:
    """Three models with all options that are tried; given their rows, the best and the pairs to compare it with."""
    found = {triple(options): three_models(**options) for options in TRIPLES}
    if rows is None:
        return found
    best = rows.groupby("method").loss.mean().idxmin()
    return {name: PAIR[name] for name in ("lambda = 0", "lambda = 0.5", "lambda = 1", "potara-calibrated")} | {
        "three models": found[best]
    }


# --- the sweeps -----------------------------------------------------------------------------------------------------
QUICK = Setting(clients=4, train_size=12, calibration_size=6, test_size=12, rounds=4, round_steps=2, local_steps=4)
SEEDS = {
    "tune": [100],
    "budgets": range(5),
    "conditions": range(5),
    "inits": range(5),
    "samples": range(5),
    "late": range(5),
    "three-tune": [100],
    "three": range(5),
    "other-budgets": range(3),
    "other-conditions": range(3),
}
OTHER = "grey CIFAR-10, 8 clients of 300"


def settings_of(part: str, scale: str) -> dict[str, Setting]:
    settings = {
        "tune": {name: replace(BUDGETS[name], calibration_size=150) for name in list(BUDGETS)[:1]},
        "budgets": BUDGETS,
        "conditions": CONDITIONS,
        "inits": {name: BASE for name in INITS},
        "samples": SAMPLED,
        "late": LATE,
        "three-tune": THREE,
        "three": THREE,
        "other-budgets": {OTHER: replace(PAPER, train_size=300, test_size=250)},
        "other-conditions": SAMPLED,
    }[part]
    return {name: QUICK for name in list(settings)[:2]} if scale == "quick" else settings


def work(number: int, part: str, out: Path, scale: str, processes: int, cifar10: str | None = None) -> None:
    """One process's share of a part."""
    if processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    load = partial(prepare_vit, cifar10=cifar10) if part.startswith("other") else prepare_vit
    options = dict(shard=(number, processes), union_size=1, prepare=load, progress=True)
    settings, seeds = settings_of(part, scale), list(SEEDS[part])[: 1 if scale == "quick" else None]
    if part == "tune":
        sweep(candidates(), settings, seeds, out / part, eval_split=lambda one: one.calibration, **options)
    elif part.endswith("budgets"):
        rates = best_rates(read_results(out / "tune"))
        scales = {f"{name}_lr_scale": rates[f"{name} part"] for name in ("federated", "local")}
        settings = {name: replace(setting, **scales) for name, setting in settings.items()}
        sweep(contestants(rates), settings, seeds, out / part, **options)
    elif part == "inits":
        for name, init in INITS.items():
            options["prepare"] = partial(prepare_vit, init=init)
            sweep(PAIR, {name: settings.get(name, QUICK)}, seeds, out / part, **options)
    else:
        methods = {"conditions": PAIR, "other-conditions": PAIR, "samples": sampled(), "late": latecomers()}.get(part)
        if methods is None:
            methods = triples(read_results(out / "three-tune") if part == "three" else None)
        sweep(methods, settings, seeds, out / part, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=SEEDS, nargs="+", default=list(SEEDS))
    parser.add_argument("--scale", choices=("lab", "quick"), default="lab")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--cifar10", metavar="SOURCE", help="where CIFAR-10 is; without it the parts called other are left out"
    )
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "paper", help="for finished results")
    args = parser.parse_args()
    if not args.cifar10 and not args.report:
        args.part = [part for part in args.part if not part.startswith("other")]
    for part in () if args.report else args.part:
        began, before = time.perf_counter(), len(read_results(args.out / part))
        given = part, args.out, args.scale, args.processes, args.cifar10
        torch.multiprocessing.spawn(work, given, nprocs=args.processes) if args.processes > 1 else work(0, *given)
        run = {"processes": args.processes, "rows before": before, "minutes": (time.perf_counter() - began) / 60}
        (args.out / f"{part}.json").write_text(json.dumps(run | facts(), indent=1) + "\n")
    for part in args.part:
        rows = read_results(args.out / part)
        rows.to_csv(args.out.parent / f"paper-{part}.csv.gz", index=False, float_format="%.6g", compression=GZIP)
    runs = {path.stem: json.loads(path.read_text()) for path in args.out.glob("*.json")}
    ran = {part: runs[part] for part in SEEDS if part in runs}
    (args.out.parent / "paper.json").write_text(json.dumps(ran, indent=1) + "\n")


if __name__ == "__main__":
    main()
