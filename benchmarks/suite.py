"""The scenario suite: every estimator of the mixing weight on federations that span who is right.

    python benchmarks/suite.py                 # all of it; finished cells are kept and never recomputed
    python benchmarks/suite.py --part 0/2      # every second cell, to share the work between two processes
    python benchmarks/suite.py --report        # the table from the cells that are there

A cell is one data set (label skew, feature shift, examples per client, rank) and one seed. In each the federated model
is stopped early (under-trained) and late (well-trained), the local ones early (early-stopped) and late (over-fitted):
four federations. Weights are estimated from 30 calibration samples per client, or from 30 of its training samples
where the name says so, and judged by the test loss along the segment: regret is the loss above that of the client's
own best weight of a grid of 101, read off a cubic spline through the test loss at 9 weights.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from scipy.interpolate import CubicSpline
from torch import Tensor

from potara_lite import Setting, evaluate, fedit, merge_exact, prepare, repeat_adapter, train
from potara_lite import estimators as E
from potara_lite.adapters import Adapter
from potara_lite.connectivity import along_segment, grid

HERE = Path(__file__).parent
MODELS = HERE / "models"
CELLS = HERE / "suite"
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

ESTIMATORS = {
    "local alone": lambda m, f, p, data: E.Estimate(torch.zeros(len(data), dtype=torch.float64)),
    "federated alone": lambda m, f, p, data: E.Estimate(torch.ones(len(data), dtype=torch.float64)),
    "uniform": lambda m, f, p, data: E.estimate_uniform(m, f, p, data.calibration),
    "fisher, training samples, damping 1e-8": lambda m, f, p, data: E.estimate_fisher(
        m, f, p, some(data.train), damping=1e-8, relative=False
    ),
    "fisher, training samples (potara-paper)": lambda m, f, p, data: E.estimate_fisher(m, f, p, some(data.train)),
    "fisher, held-out": lambda m, f, p, data: E.estimate_fisher(m, f, p, data.calibration),
    "fisher, held-out, sampled labels": lambda m, f, p, data: E.estimate_fisher(
        m, f, p, data.calibration, sample_labels=0
    ),
    "laplace, held-out": lambda m, f, p, data: E.estimate_laplace(
        m, f, p, data.calibration, train_sizes=data.train.sizes
    ),
    "gradient, training samples": lambda m, f, p, data: E.estimate_gradient(
        m, f, p, some(data.train), unbiased=False, damping=None
    ),
    "gradient, held-out": lambda m, f, p, data: E.estimate_gradient(
        m, f, p, data.calibration, unbiased=False, damping=None
    ),
    "gradient, held-out, unbiased, inverse-Fisher metric": lambda m, f, p, data: E.estimate_gradient(
        m, f, p, data.calibration
    ),
    "gauss-newton, held-out": lambda m, f, p, data: E.estimate_gauss_newton(m, f, p, data.calibration),
    "james-stein, held-out": lambda m, f, p, data: E.estimate_shrinkage(
        m, f, p, data.calibration, train_sizes=data.train.sizes
    ),
    "curve, parabola": lambda m, f, p, data: E.estimate_curve(m, f, p, data.calibration, points=5, parabola=True),
    "curve, grid": lambda m, f, p, data: E.estimate_curve(m, f, p, data.calibration),
    "pooled (potara)": lambda m, f, p, data: E.estimate_pooled(m, f, p, data.calibration),
}


def some(split):
    """The first 30 examples of each client."""
    return replace(split, x=split.x[:, :30], y=split.y[:, :30], sizes=split.sizes.clamp_max(30))


def settings(data: Data) -> Setting:
    return Setting(alpha=data.alpha, shift=data.shift, train_size=data.train_size, rank=data.rank)


def snapshots(adapted, federation, setting: Setting, seed: int) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """The federated and the local stacks at each length, every longer one going on from the shorter."""
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
    """The models of a cell and their test losses and accuracies along λ, from disk where they are there already."""
    path = MODELS / f"{data.name}-seed{seed}.safetensors"
    if not path.exists():
        adapted, federation = prepare(settings(data), seed)
        federated, local = snapshots(adapted, federation, settings(data), seed)
        tensors = {f"federated/{kind}/{name}": t for kind, stack in federated.items() for name, t in stack.items()}
        tensors |= {f"local/{kind}/{name}": t for kind, stack in local.items() for name, t in stack.items()}
        for general, f in federated.items():
            for personal, p in local.items():
                pair = along_segment(adapted, f, p, federation.test, grid(POINTS))
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


def cell(data: Data, seed: int) -> pd.DataFrame:
    """All four federations of one data set and seed: a row per estimator and client."""
    setting = Setting(alpha=data.alpha, shift=data.shift, train_size=data.train_size, rank=data.rank)
    adapted, federation = prepare(setting, seed)
    began = time.perf_counter()
    federated, local = snapshots(adapted, federation, setting, seed)
    training = time.perf_counter() - began
    weights, rows = grid(9), []
    for general, f in federated.items():
        for personal, p in local.items():
            test = [evaluate(adapted, merge_exact(f, p, w), federation.test) for w in weights.tolist()]
            loss, accuracy = (torch.stack(column, dim=1).numpy() for column in zip(*test))
            curve, score = CubicSpline(weights, loss, axis=1)(FINE), CubicSpline(weights, accuracy, axis=1)(FINE)
            best = curve.argmin(1)
            for name, estimator in ESTIMATORS.items():
                began = time.perf_counter()
                weight = estimator(adapted, f, p, federation).weight.numpy()
                seconds = time.perf_counter() - began
                for i, w in enumerate(weight):
                    at = np.interp(w, FINE, curve[i])
                    rows.append(
                        dict(data=data.name, federated=general, local=personal, seed=seed, client=i, estimator=name,
                             weight=w, oracle=FINE[best[i]], loss=at, regret=at - curve[i, best[i]],
                             accuracy=np.interp(w, FINE, score[i]), oracle_accuracy=score[i, best[i]],
                             beats_both=at < min(curve[i, 0], curve[i, -1]),
                             oracle_beats_both=0 < best[i] < 100, seconds=seconds, training=training)
                    )  # fmt: skip
    return pd.DataFrame(rows)


def report(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per estimator: regret over all federations, its worst federation, how often the merge beats both."""
    federation = ["data", "federated", "local"]
    each = rows.groupby(["estimator", *federation], sort=False).regret.mean()
    merged = rows[rows.oracle_beats_both].groupby("estimator", sort=False).beats_both.mean()
    seeds = rows.groupby(["estimator", "seed"], sort=False).regret.mean().groupby("estimator", sort=False)
    gap = (rows.accuracy - rows.oracle_accuracy).groupby(rows.estimator, sort=False).mean()
    off = (rows.weight - rows.oracle).abs().groupby(rows.estimator, sort=False).mean()
    return pd.DataFrame(
        {
            "regret (nats)": seeds.mean(),
            "±": seeds.sem(),
            "worst federation": each.groupby("estimator", sort=False).max(),
            "accuracy − oracle's": gap,
            "|λ − oracle λ|": off,
            "beats both where the oracle does": merged,
            "seconds": rows.groupby("estimator", sort=False).seconds.mean(),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    CELLS.mkdir(exist_ok=True)
    part, parts = map(int, args.part.split("/"))
    work = [(data, seed) for seed in SEEDS for data in SUITE]
    for number, (data, seed) in enumerate(work):
        path = CELLS / f"{data.name}-seed{seed}.csv"
        if args.report or number % parts != part or path.exists():
            continue
        frame = cell(data, seed)
        partial = path.with_suffix(".part")
        frame.to_csv(partial, index=False, float_format="%.6g")
        partial.replace(path)
        regret = frame[frame.estimator == "pooled (potara)"].regret.mean()
        print(json.dumps({**asdict(data), "seed": seed, "regret": round(regret, 4)}), flush=True)
    rows = pd.concat([pd.read_csv(path) for path in sorted(CELLS.glob("*.csv"))])
    print(report(rows).round(4).to_string())


if __name__ == "__main__":
    main()
