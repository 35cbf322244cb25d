"""The suite: every estimator of the mixing weight on federations in which different models are the better ones.

    python benchmarks/suite.py                 # everything; what is finished is kept and never recomputed
    python benchmarks/suite.py --part 0/2      # every second result file, to divide the work between two processes
    python benchmarks/suite.py --report        # suite.csv.gz and suite.png from what is finished
    python benchmarks/suite.py --timing        # suite_timing.json: seconds of the training and of each estimator

A result file has one data set (label skew, feature shift, examples per client, rank) and one seed. Its federated model
is stopped early (under-trained) and late (well-trained), its local models early (early-stopped) and late (over-fitted):
four federations. Weights are estimated from 30 calibration samples per client, or from 30 of its training samples
where the name says so, and scored by the test loss: regret is the loss above that of the client's best weight, a
reference that no method may use. The loss along the segment is a cubic spline through its values at 9 weights; its
minimum is that of 101 points. Weights by group leave the segment; their merges are tested as they are, and a regret
below zero means better than the best single weight.

Trained models (``models/``) and result files (``suite/``) stay on disk, so a new estimator needs no new training.
Everything was designed on seeds 100 and 101; the table has seeds 0 to 4.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from inspect import ismodule
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from scipy.interpolate import CubicSpline
from torch import Tensor

from potara_lite import Setting, estimators, evaluate, fedit, merge_exact, prepare, repeat_adapter, train, train_pair
from potara_lite.adapters.state import Adapter
from potara_lite.estimators import (
    Estimate,
    by_layer,
    estimate_calibrated,
    estimate_curve,
    estimate_gauss_newton,
    estimate_gradient,
    estimate_laplace,
    estimate_paper,
    estimate_pooled,
    estimate_shrinkage,
    estimate_uniform,
)
from potara_lite.merging.connectivity import along_segment, weight_grid

HERE = Path(__file__).parent
MODELS = HERE / "models"
RESULTS = HERE / "suite"
SEEDS = range(5)
POINTS = 9
FINE = np.linspace(0, 1, 101)
Tests = dict[tuple[str, str], dict[str, Tensor]]


@dataclass(frozen=True)
class Data:
    """What one row of the suite is made of."""

    alpha: float
    shift: bool
    train_size: int
    rank: int = 4

    @property
    def name(self) -> str:
        return f"alpha{self.alpha:g}-{'shift' if self.shift else 'plain'}-n{self.train_size}-r{self.rank}"


SUITE = [
    Data(0.5, False, 100),
    Data(0.1, False, 100),
    Data(1.0, False, 100),
    Data(0.5, True, 100),
    Data(0.5, False, 300),
    Data(0.1, True, 300),
    Data(1.0, False, 1000),
    Data(0.5, False, 100, rank=16),
]
ROUNDS = {"under-trained": 15, "well-trained": 60}
STEPS = {"early-stopped": (60, 60), "over-fitted": (300, 600)}  # up to 100 examples per client, and above


def best_single(model, federated, local, data) -> Estimate:
    """One weight for all clients, from all their held-out samples."""
    curve = estimate_curve(model, federated, local, data.calibration).details
    return everyone(curve["weights"][curve["loss"].mean(0).argmin()], data)


def everyone(weight: float, data) -> Estimate:
    """The same weight for every client."""
    return Estimate(torch.full((len(data.calibration),), float(weight), dtype=torch.float64))


def held_out(estimate: Callable[..., Estimate], **options) -> Callable[..., Estimate]:
    """An estimator on the calibration samples."""
    return lambda model, f, p, data: estimate(model, f, p, data.calibration, **options)


def on_few(estimate: Callable[..., Estimate], **options) -> Callable[..., Estimate]:
    """An estimator on as many training samples."""
    return lambda model, f, p, data: estimate(model, f, p, data.few, **options)


def with_sizes(estimate: Callable[..., Estimate]) -> Callable[..., Estimate]:
    """An estimator on the calibration samples that knows how many samples each client trained on."""
    return lambda model, f, p, data: estimate(model, f, p, data.calibration, train_sizes=data.train_sizes)


SINGLE = "best single λ (test data, reference)"
ESTIMATORS = {
    "local alone": lambda model, f, p, data: everyone(0, data),
    "federated alone": lambda model, f, p, data: everyone(1, data),
    "uniform": held_out(estimate_uniform),
    SINGLE: lambda model, f, p, data: everyone(FINE[data.test_curve.mean(0).argmin()], data),
    "best single λ, held-out": best_single,
    "fisher, training samples, damping 1e-8": on_few(estimate_paper, damping=1e-8, relative=False),
    "fisher, training samples (potara-paper)": on_few(estimate_paper),
    "fisher, held-out": held_out(estimate_paper),
    "fisher, held-out, sampled labels": held_out(estimate_paper, sample_labels=0),
    "fisher on the deltas, held-out": held_out(estimate_paper, on_delta=True),
    "laplace, held-out": with_sizes(estimate_laplace),
    "gradient, training samples": on_few(estimate_gradient, unbiased=False, damping=None),
    "gradient, held-out": held_out(estimate_gradient, unbiased=False, damping=None),
    "gradient, held-out, unbiased, inverse-Fisher metric": held_out(estimate_gradient),
    "gradient, held-out, cross-fitted inverse-Fisher metric": held_out(estimate_gradient, cross_fit=True),
    "gauss-newton, held-out": held_out(estimate_gauss_newton),
    "james-stein, held-out": with_sizes(estimate_shrinkage),
    "curve, parabola": held_out(estimate_curve, points=5, parabola=True),
    "curve, grid": held_out(estimate_curve),
    "pooled": held_out(estimate_pooled),
    "pooled, head and body apart": held_out(estimate_calibrated),
    "gauss-newton by layer": held_out(estimate_gauss_newton, by=by_layer),
    "fisher by layer, held-out": held_out(estimate_paper, by=by_layer),
}


DEAR = {"fisher on the deltas, held-out", "gauss-newton by layer"}  # too slow for more than the first seed
USABLE = [name for name in ESTIMATORS if name not in {"local alone", "federated alone", SINGLE, *DEAR}]
FEDERATION = ["data", "federated", "local"]
COLUMNS = [
    "estimator", "client", "weight", "oracle", "loss", "regret", "accuracy", "oracle_accuracy",
    "beats_both", "oracle_beats_both",
]  # fmt: skip
DEFAULT, PAPER = "pooled, head and body apart", "fisher, training samples (potara-paper)"
SHOWN = [PAPER, "curve, grid", "pooled"]


def seeds_of(estimator: str) -> list[int]:
    """The seeds on which an estimator is run."""
    return list(SEEDS)[:1] if estimator in DEAR else list(SEEDS)


def samples(federation) -> SimpleNamespace:
    """What an estimator may see: the calibration samples and as many, 30, of each client's training samples."""
    split = federation.train
    return SimpleNamespace(calibration=federation.calibration, few=split.head(30), train_sizes=split.sizes)


@contextmanager
def remembering():
    """Estimators that need the same gradients or losses share them, because these take most of the time."""

    def shared(function):
        kept = {}

        def call(*args, **options):
            given = (*args, *options.values())  # kept alive with the answer, so that no other object gets their id
            key = tuple(tuple(a.tolist()) if isinstance(a, Tensor) and a.dim() == 1 else id(a) for a in given)
            if key not in kept:
                kept[key] = function(*args, **options), given
            return kept[key][0]

        return call

    with ExitStack() as stack:
        for name in ("per_sample_gradients", "segment_losses"):
            modules = [module for module in vars(estimators).values() if hasattr(module, name) and ismodule(module)]
            memory = shared(getattr(modules[0], name))
            for module in modules:
                stack.enter_context(patch.object(module, name, memory))
        yield


def settings(data: Data) -> Setting:
    return Setting(alpha=data.alpha, shift=data.shift, train_size=data.train_size, rank=data.rank)


def snapshots(adapted, federation, setting: Setting, seed: int) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """The federated and the local stacks at each length; each longer training continues the shorter one."""
    clients = len(federation)
    options = dict(lr=setting.lr, batch_size=setting.batch_size)
    federated, adapter, state, done = {}, adapted.initial, None, 0
    for name, rounds in ROUNDS.items():
        going_on = dict(adapter=adapter, state=state, start=done, seed=seed, **options)
        part = fedit(adapted, federation.train, rounds=rounds - done, local_steps=setting.round_steps, **going_on)
        federated[name] = repeat_adapter(part.adapter, clients)
        adapter, state, done = part.adapter, part.state, rounds
    local, stack, state, done = {}, repeat_adapter(adapted.initial, clients), None, 0
    for name, lengths in STEPS.items():
        steps = lengths[setting.train_size > 100]
        part = train(
            adapted, stack, federation.train, steps=steps - done, start=done, state=state, seed=(seed, 1), **options
        )
        local[name], stack, state, done = part.adapters, part.adapters, part.state, steps
    return federated, local


def trained(data: Data, seed: int) -> tuple[dict[str, Adapter], dict[str, Adapter], Tests]:
    """The models of a data set and seed, and their test losses and accuracies along λ; from disk if they exist."""
    path = MODELS / f"{data.name}-seed{seed}.safetensors"
    if not path.exists():
        adapted, federation = prepare(settings(data), seed)
        federated, local = snapshots(adapted, federation, settings(data), seed)
        tensors = {f"federated/{kind}/{name}": t for kind, stack in federated.items() for name, t in stack.items()}
        tensors |= {f"local/{kind}/{name}": t for kind, stack in local.items() for name, t in stack.items()}
        for general, f in federated.items():
            for personal, p in local.items():
                pair = along_segment(adapted, f, p, federation.test, weight_grid(POINTS))
                for name, values in zip(("loss", "accuracy"), pair):
                    tensors[f"test/{general}/{personal}/{name}"] = values
        MODELS.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
        partial.replace(path)
    tree: dict = {"federated": {}, "local": {}, "test": {}}
    for key, tensor in load_file(path).items():
        kind, *middle, name = key.split("/")
        tree[kind].setdefault(middle[0] if kind != "test" else tuple(middle), {})[name] = tensor
    return tree["federated"], tree["local"], tree["test"]


def measure(data: Data, seed: int, estimators=ESTIMATORS) -> pd.DataFrame:
    """All four federations of one data set and seed: a row per estimator and client."""
    adapted, federation = prepare(settings(data), seed)
    federated, local, tests = trained(data, seed)
    wanted, rows = {name: each for name, each in estimators.items() if seed in seeds_of(name)}, []
    for (general, personal), test in tests.items():
        index = dict(data=data.name, federated=general, local=personal, seed=seed)
        rows.append(judge(adapted, federated[general], local[personal], federation, test, wanted).assign(**index))
    return pd.concat(rows, ignore_index=True)[[*FEDERATION, "seed", *COLUMNS]]


def judge(
    adapted, f: Adapter, p: Adapter, federation, test: dict[str, Tensor], estimators: dict[str, Callable]
) -> pd.DataFrame:
    """The scores of each estimator on one pair of stacks: a row per estimator and client. ``test``: the test losses and
    accuracies ``(C, W)`` along the segment."""
    points = np.linspace(0, 1, test["loss"].shape[1])
    loss, accuracy = (CubicSpline(points, test[k], axis=1) for k in ("loss", "accuracy"))
    curve, score, rows = loss(FINE), accuracy(FINE), []  # (C, 101)
    best, client = curve.argmin(1), np.arange(len(curve))
    least = np.minimum(curve[:, 0], curve[:, -1])
    given = samples(federation)
    given.test_curve = curve
    with remembering():
        estimates = {name: estimator(adapted, f, p, given) for name, estimator in estimators.items()}
    for name, estimate in estimates.items():
        if isinstance(estimate.weight, dict):
            weight = estimate.client_weight.numpy()
            found, hit = (t.numpy() for t in evaluate(adapted, merge_exact(f, p, estimate.weight), federation.test))
        else:
            weight = estimate.weight.numpy()
            found, hit = (spline(weight)[client, client] for spline in (loss, accuracy))
        columns = dict(
            estimator=name, client=client, weight=weight, oracle=FINE[best], loss=found,
            regret=found - curve[client, best], accuracy=hit, oracle_accuracy=score[client, best],
            beats_both=found < least, oracle_beats_both=curve[client, best] < least,
        )  # fmt: skip
        rows.append(pd.DataFrame(columns))
    return pd.concat(rows, ignore_index=True)


def report(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per estimator: mean regret, its standard error over seeds, its worst federation, and more."""
    by = rows.groupby("estimator", sort=False)
    seeds = rows.groupby(["estimator", "seed"], sort=False).regret.mean().groupby("estimator", sort=False)
    each = rows.groupby(["estimator", *FEDERATION], sort=False).regret.mean().groupby("estimator", sort=False)
    beaten = rows[rows.oracle_beats_both].groupby("estimator", sort=False).beats_both.mean()
    table = pd.DataFrame(
        {
            "regret (nats)": by.regret.mean(),
            "± over seeds": seeds.sem(),
            "worst federation": each.max(),
            "accuracy − oracle's": (rows.accuracy - rows.oracle_accuracy).groupby(rows.estimator, sort=False).mean(),
            "beats both where the oracle does": beaten,
            "λ − oracle λ": (rows.weight - rows.oracle).groupby(rows.estimator, sort=False).mean(),
            "distance of λ": (rows.weight - rows.oracle).abs().groupby(rows.estimator, sort=False).mean(),
            "seeds": by.seed.nunique(),
        }
    )
    return table.loc[[name for name in ESTIMATORS if name in table.index]]


def regret_by_federation(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean regrets: a line per federation, a column per estimator."""
    return rows.groupby(["estimator", *FEDERATION]).regret.mean().unstack("estimator")


def clients_helped(rows: pd.DataFrame) -> pd.DataFrame:
    """The default's rows of the clients for whom the oracle beats both models, and by how much (``gain``, nats)."""
    client = [*FEDERATION, "seed", "client"]
    alone = rows[rows.estimator.isin(["local alone", "federated alone"])]
    gain = alone.groupby(client).regret.min().rename("gain")
    default = rows[(rows.estimator == DEFAULT) & rows.oracle_beats_both]
    return default.join(gain, on=client)


def figure(rows: pd.DataFrame):
    """Left: each estimator's regret in every federation; right: three estimators' λ against the oracle's."""
    table = report(rows).sort_values("regret (nats)", ascending=False)
    each = rows.groupby(["estimator", *FEDERATION]).regret.mean()
    picture, (left, *right) = plt.subplots(1, 4, figsize=(16, 6.5), width_ratios=[1.8, 1, 1, 1], layout="constrained")
    for height, name in enumerate(table.index):
        values = each[name].to_numpy()
        left.plot(values, np.full(len(values), height), "o", ms=4, alpha=0.4, color="tab:blue")
        left.plot(table["regret (nats)"][name], height, "D", ms=6, color="black")
    left.set_yticks(range(len(table)), table.index)
    left.set_xscale("symlog", linthresh=0.01)
    left.set_xlabel("regret (nats), linear up to ±0.01: a dot per federation, the diamond their mean")
    left.axvline(0.01, color="grey", lw=0.8, ls="--")
    left.grid(axis="x", alpha=0.3)
    for panel, name in zip(right, SHOWN):
        some = rows[rows.estimator == name]
        panel.plot([0, 1], [0, 1], color="grey", lw=0.8)
        panel.plot(some.oracle, some.weight, ".", ms=3, alpha=0.25)
        panel.set(title=name.replace(", ", ",\n", 1), xlabel="oracle λ", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        panel.set_aspect("equal")
    right[0].set_ylabel("λ (1 = federated)")
    return picture


def timing(repeats: int = 3) -> dict:
    """Seconds of the training and of every estimator at the default setting, in one process."""
    setting = Setting()
    adapted, federation = prepare(setting, 0)
    pair, given = train_pair(adapted, federation, setting, 0), samples(federation)
    given.test_curve = np.zeros((len(federation), len(FINE)))  # for the reference, which costs nothing
    trainings, seconds = [], {name: [] for name in ESTIMATORS}
    for _ in range(repeats):
        trainings.append(sum(train_pair(adapted, federation, setting, 0).seconds))
        for name, estimator in ESTIMATORS.items():
            began = time.perf_counter()
            estimator(adapted, pair.federated, pair.local, given)
            seconds[name].append(time.perf_counter() - began)
    training = float(np.median(trainings))
    shares = {name: round(float(np.median(each)) / training, 5) for name, each in seconds.items()}
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "processor": platform.machine()}
    return {"training_seconds": trainings, "seconds": seconds, "share_of_training": shares, "machine": machine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--timing", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.timing:
        (HERE / "suite_timing.json").write_text(json.dumps(timing(), indent=1) + "\n")
        return
    RESULTS.mkdir(exist_ok=True)
    part, parts = map(int, args.part.split("/"))
    work = [(data, seed) for seed in SEEDS for data in SUITE]
    paths = [RESULTS / f"{data.name}-seed{seed}.csv" for data, seed in work]
    for number, ((data, seed), path) in enumerate(zip(work, paths)):
        if args.report or number % parts != part:
            continue
        there = [pd.read_csv(path)] if path.exists() else []
        done = set(there[0].estimator) if there else set()
        wanted = {name: f for name, f in ESTIMATORS.items() if seed in seeds_of(name) and name not in done}
        if not wanted:
            continue
        frame = pd.concat([*there, measure(data, seed, wanted)])
        partial = path.with_suffix(".part")
        frame.to_csv(partial, index=False, float_format="%.5g")
        partial.replace(path)
        print(json.dumps({**asdict(data), "seed": seed, **report(frame)["regret (nats)"].round(4)}), flush=True)
    if missing := [path.name for path in paths if not path.exists()]:
        print(f"{len(missing)} of {len(paths)} result files are missing, such as {missing[0]}")
        return
    rows = pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)
    rows.to_csv(HERE / "suite.csv.gz", index=False, compression={"method": "gzip", "mtime": 1})
    figure(rows).savefig(HERE / "suite.png", dpi=80)
    print(report(rows).round(4).to_string())


if __name__ == "__main__":
    main()
