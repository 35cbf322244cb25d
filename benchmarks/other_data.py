"""Is the default weight good where it was not designed? Other images, another backbone, fresh seeds.

    python benchmarks/other_data.py --cifar10 FOLDER --small CHECKPOINT    # what is finished is kept (other_data/)
    python benchmarks/other_data.py --report                               # rows and tables from what is finished

Four sources, at the default lengths (40 rounds of 5 steps, 100 local steps) and with over-fitted local models (300):

- Fashion-MNIST and the lab ViT, as in the suite;
- grey CIFAR-10, dealt from its *test* split, which the backbone has not seen, by torchvision or from a file of JPEGs
  (``data/pretrain_lab_vit.py`` reads the same);
- handwritten digits, 8×8 pixels enlarged, from scikit-learn: 6 clients of 60 training examples (it has 1,797);
- Fashion-MNIST on a smaller backbone with less pre-training, made by
  ``python data/pretrain_lab_vit.py --dim 64 --depth 3 --epochs 4 --out CHECKPOINT``.

The estimator's form and its two constants were chosen on seeds 100 and 101 of the first three (and other federations
of the same seeds); the table's seeds are 5 to 9. Rows are made as in ``suite.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from suite import COLUMNS, ESTIMATORS, SINGLE, judge

from potara_lite import Setting, attach, fashion_mnist, fedit, lab_vit, partition, repeat_adapter, train
from potara_lite.federation.inputs import Examples
from potara_lite.federation.split import Federation
from potara_lite.merging.connectivity import along_segment, weight_grid

HERE = Path(__file__).parent
RESULTS = HERE / "other_data"
DESIGN, FRESH = (100, 101), (5, 6, 7, 8, 9)
WORTHWHILE = 0.005  # nats
STEPS = {"default": 100, "over-fitted": 300}
FEDERATION = ["source", "alpha", "shift", "local"]
NAMES = {
    "local alone": "local",
    "federated alone": "federated",
    "uniform": "λ = ½",
    "fisher, training samples (potara-paper)": "paper's",
    "curve, grid": "client's curve",
    "pooled": "pooled",
    "pooled, head and body apart": "default",
    SINGLE: "best single λ (test data)",
}


@dataclass(frozen=True)
class Case:
    """One federation of one source."""

    source: str
    alpha: float
    shift: bool = False

    @property
    def name(self) -> str:
        return f"{self.source.replace(' ', '-')}-alpha{self.alpha:g}{'-shift' if self.shift else ''}"


CASES = [
    *(Case(source, *rest) for source in ("Fashion-MNIST", "grey CIFAR-10") for rest in ((0.3,), (2.0,), (0.5, True))),
    *(Case("small backbone", alpha) for alpha in (0.3, 2.0)),
    *(Case("digits", alpha) for alpha in (0.5, 2.0)),  # at 0.3 the classes run out
]


def halves(x: torch.Tensor, y: torch.Tensor, first: int) -> list[Examples]:
    """The examples in one fixed random order, as a pool to train on and one to test on."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    return [(x[part], y[part]) for part in (order[:first], order[first:])]


def cifar10(source: str) -> list[Examples]:
    """Two pools of the centre crops of CIFAR-10's test split, in grey."""
    sys.path.insert(0, str(HERE.parent / "data"))
    from pretrain_lab_vit import from_npz, from_torchvision

    x, y = (from_npz if source.endswith(".npz") else from_torchvision)(source, "test")
    return halves(x[:, :, 2:30, 2:30], y, 5000)


def grey_cifar10(setting: Setting, seed: int, source: str) -> Federation:
    """A federation of one half of CIFAR-10's test split, tested on the other."""
    return partition(*cifar10(source), 10, **setting.partition, seed=seed, name="grey CIFAR-10")


def digits() -> list[Examples]:
    """Two pools of scikit-learn's digits, enlarged to 28×28."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    x = torch.nn.functional.interpolate(x, size=(28, 28), mode="bilinear")
    return halves(x, torch.from_numpy(found.target).long(), 1150)


def federation_of(case: Case, seed: int, pools: dict[str, list[Examples]]) -> Federation:
    options = dict(alpha=case.alpha, shift=case.shift, seed=seed)
    if case.source == "digits":
        return partition(*pools["digits"], 10, clients=6, train_size=60, test_size=50, name="digits", **options)
    if case.source == "grey CIFAR-10":
        return partition(*pools[case.source], 10, test_size=200, name=case.source, **options)
    return fashion_mnist(test_size=200, **options)


def measure(case: Case, seed: int, federation: Federation, checkpoint: str | None) -> pd.DataFrame:
    """Train a federated model and local ones of two lengths, and score the estimators on both pairs."""
    setting, backbone = Setting(), lab_vit(checkpoint=checkpoint)
    adapted, federation = attach(backbone, rank=setting.rank, seed=seed), federation.map(backbone.embed)
    options = dict(lr=setting.lr, batch_size=setting.batch_size)
    lengths = dict(rounds=setting.rounds, local_steps=setting.round_steps)
    shared = fedit(adapted, federation.train, seed=seed, **lengths, **options).adapter
    federated, local = (repeat_adapter(adapter, len(federation)) for adapter in (shared, adapted.initial))
    state, done, rows = None, 0, []
    for length, steps in STEPS.items():
        more = dict(steps=steps - done, start=done, state=state, seed=(seed, 1))
        part = train(adapted, local, federation.train, **more, **options)
        local, state, done = part.adapters, part.state, steps
        curves = along_segment(adapted, federated, local, federation.test, weight_grid(9))
        test = dict(zip(("loss", "accuracy"), curves))
        found = judge(adapted, federated, local, federation, test, {name: ESTIMATORS[name] for name in NAMES})
        rows.append(found.assign(source=case.source, alpha=case.alpha, shift=case.shift, local=length, seed=seed))
    return pd.concat(rows, ignore_index=True)[["source", "alpha", "shift", "local", "seed", *COLUMNS]]


def with_gain(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the estimators' names of the table, and what the oracle gains over the better model (``gain``)."""
    rows = rows.assign(estimator=rows.estimator.map(NAMES))
    client = [*FEDERATION, "seed", "client"]
    alone = rows[rows.estimator.isin(["local", "federated"])]
    return rows.join(alone.groupby(client).regret.min().rename("gain"), on=client)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per source: mean regrets (nats), the default's standard error over seeds and worst federation (a mean over
    seeds), and its share of clients that beat both models where the oracle does: all of them, and those whom the oracle
    gains more than ``WORTHWHILE`` over the better of the two."""
    lines = {}
    for source, some in with_gain(rows).groupby("source", sort=False):
        default = some[some.estimator == "default"]
        regret = some.groupby("estimator", sort=False).regret.mean()
        lines[source] = {name: regret[name] for name in NAMES.values()} | {
            "default ±": default.groupby("seed").regret.mean().sem(),
            "default, worst": default.groupby(FEDERATION[1:]).regret.mean().max(),
            "beats both": default[default.oracle_beats_both].beats_both.mean(),
            f"gain > {WORTHWHILE}": default[default.gain > WORTHWHILE].beats_both.mean(),
        }
    return pd.DataFrame(lines).T


def above_half(rows: pd.DataFrame) -> pd.Series:
    """How much more the default regrets than λ = ½ in each federation, sorted (mean over clients and seeds, nats)."""
    regret = with_gain(rows).groupby([*FEDERATION, "estimator"]).regret.mean().unstack()
    return (regret.default - regret["λ = ½"]).sort_values()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", metavar="SOURCE", help="a folder for torchvision, or a file of JPEGs")
    parser.add_argument("--small", metavar="CHECKPOINT", help="of the smaller backbone")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    pools: dict[str, list[Examples]] = {}
    makers = {"digits": digits, "grey CIFAR-10": lambda: cifar10(args.cifar10)}
    for seed in (*FRESH, *DESIGN):
        for case in CASES:
            path = RESULTS / f"{case.name}-seed{seed}.csv"
            if args.report or path.exists():
                continue
            began = time.perf_counter()
            if case.source in makers and case.source not in pools:
                pools[case.source] = makers[case.source]()
            checkpoint = args.small if case.source == "small backbone" else None
            found = measure(case, seed, federation_of(case, seed, pools), checkpoint)
            partial = path.with_suffix(".part")
            found.to_csv(partial, index=False, float_format="%.5g")
            partial.replace(path)
            print(json.dumps({path.stem: f"{time.perf_counter() - began:.0f} s"}), flush=True)
    rows = pd.concat([pd.read_csv(path) for path in sorted(RESULTS.glob("*.csv"))], ignore_index=True)
    rows.to_csv(HERE / "other_data.csv.gz", index=False, compression={"method": "gzip", "mtime": 1})
    for seeds in (FRESH, DESIGN):
        if len(some := rows[rows.seed.isin(seeds)]):
            print(table(some).round(4).to_string())


if __name__ == "__main__":
    main()
