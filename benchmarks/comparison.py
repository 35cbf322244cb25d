"""The comparison: every method of ``potara_lite.baselines.methods`` on the same federations, with the same steps.

    python benchmarks/comparison.py --processes 2      # lab: Fashion-MNIST, the lab ViT, two CPU cores
    python benchmarks/comparison.py --scale quick      # seconds; its figures mean nothing
    python benchmarks/comparison.py --scale grey-cifar10 --data SOURCE    # the same on grey CIFAR-10, two seeds
    python benchmarks/comparison.py --scale paper --device cuda --data datasets   # CIFAR-100 and ViT-B/16, downloaded
    python benchmarks/comparison.py --tune             # the methods' options, by calibration examples of seed 100
    python benchmarks/comparison.py --report           # rows and figure from what is finished
    python benchmarks/comparison.py --only FlexLoRA "Fisher merging"   # these again, the other rows as they are

If interrupted, it continues where it stopped (``comparison/``). Processes share the federations, seeds and cores.
Grey CIFAR-10 is dealt from its test split, which the backbone has not seen: by torchvision from the folder SOURCE, or
from a file of JPEGs. All options are those that were chosen on Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from other_data import grey_cifar10
from pages import facts

from potara_lite import Setting, attach, from_torchvision, lab_vit, prepare, torchvision_vit
from potara_lite.baselines.methods import FAMILIES, METHODS, REFERENCES
from potara_lite.baselines.sweep import read_results, sweep
from potara_lite.experiment import Method, Result, Run
from potara_lite.plots import frontiers
from potara_lite.results import leaderboard, paired_differences, pareto_front

HERE = Path(__file__).parent
LAB = Setting(
    test_size=200, rounds=15, local_steps=105, federated_lr_scale=4, local_lr_scale=2
)  # these four as tuned below
PAPER = Setting(
    train_size=1000, test_size=500, rank=16, batch_size=32, lr=1e-3, rounds=80, round_steps=5, local_steps=300
)
SCALES = {
    "quick": {
        "label skew": Setting(
            clients=2, train_size=12, calibration_size=6, test_size=12, rounds=2, round_steps=2, local_steps=4
        )
    },
    "lab": {
        "label skew": LAB,
        "strong label skew": replace(LAB, alpha=0.1),
        "label skew and feature shift": replace(LAB, shift=True),
    },
    "paper": {"8 clients": PAPER, "20 clients": replace(PAPER, clients=20)},
}
SCALES["grey-cifar10"] = {name: SCALES["lab"][name] for name in ("label skew", "strong label skew")}
FOLLOWED = [  # from one data set to the other
    "potara-calibrated, local from federated", "potara-calibrated", "uniform", "potara-paper", "WiSE-FT", "FedPer",
    "FedSA-LoRA", "FedIT, fine-tuned", "local", "FedIT",
]  # fmt: skip
PAIR = "the two models of the merges"
FROM_FEDERATED = "the two, local from federated"
SEEDS = {"quick": range(1), "lab": range(5), "grey-cifar10": range(2), "paper": range(5)}


def prepare_paper(root: str, setting: Setting, seed: int, *, weights: str | None = "DEFAULT", download: bool = True):
    """CIFAR-100 and torchvision's ViT-B/16 with LoRA on its MLPs."""
    federation = from_torchvision("CIFAR100", root, download=download, **setting.partition, seed=seed)
    backbone = torchvision_vit(classes=federation.classes, weights=weights)
    adapted = attach(backbone, rank=setting.rank, targets=("mlp.0", "mlp.3"), head="heads.head", seed=seed)
    return adapted.to(setting.device), federation.to(setting.device)


def prepare_grey(source: str, setting: Setting, seed: int):
    """Grey CIFAR-10 and the lab ViT with LoRA in all its blocks."""
    adapted = attach(lab_vit(10), rank=setting.rank, seed=seed).to(setting.device)
    return adapted, grey_cifar10(setting, seed, source).to(setting.device).map(adapted.embed)


RATES = 1, 0.5, 2
HIGHER, LOWER = (*RATES, 4), (*RATES, 0.25)  # where the highest or lowest rate was the best
OPTIONS = {  # the values that are tried; the first of each option is used while others are tried
    "local": {"lr_scale": LOWER},
    "FedIT": {"lr_scale": (*HIGHER, 8)},
    "FedIT, fine-tuned": {"lr_scale": LOWER, "rounds_scale": (1, 1.5)},
    "WiSE-FT": {"lr_scale": HIGHER, "weight": (0.5, 0.25, 0.75), "rounds_scale": (1, 1.5)},
    "FedProx": {"lr_scale": (*HIGHER, 8, 16), "mu": (0.1, 0.01, 1)},
    "FedProx, fine-tuned": {"lr_scale": LOWER, "mu": (0.1, 0.01, 1), "rounds_scale": (1, 1.5)},
    "FFA-LoRA": {"lr_scale": HIGHER},
    "FFA-LoRA, fine-tuned": {"lr_scale": HIGHER, "rounds_scale": (1, 1.5)},
    "FedEx-LoRA": {"lr_scale": HIGHER},
    "FedEx-LoRA, fine-tuned": {"lr_scale": LOWER, "rounds_scale": (1, 1.5)},
    "FLoRA": {"lr_scale": HIGHER},
    "FLoRA, fine-tuned": {"lr_scale": RATES, "rounds_scale": (1, 1.5)},
    "FlexLoRA": {"lr_scale": HIGHER},
    "FlexLoRA, fine-tuned": {"lr_scale": LOWER, "rounds_scale": (1, 1.5)},
    "FedSA-LoRA": {"lr_scale": HIGHER},
    "FedPer": {"lr_scale": HIGHER},
    "FedRep": {"lr_scale": HIGHER, "head_share": (0.5, 0.2)},
    "Ditto": {"lr_scale": RATES, "strength": (0.1, 0.01, 1)},
    "APFL": {"lr_scale": HIGHER, "weight": (0.5, 0.75, 0.25)},
    "FedDPA-T": {"lr_scale": RATES, "weight": (0.5, 0.75, 0.25)},
    "FedALT": {"lr_scale": RATES},
    "task arithmetic": {"coefficient": (0.5, 0.4, 0.6, 0.8, 1)},
    "TIES": {"density": (0.2, 0.5, 1), "coefficient": (1, 0.7, 1.5)},
    "DARE": {"drop": (0.9, 0.5, 0.2)},
    PAIR: {"federated_lr_scale": (1, 2, 4, 8), "local_lr_scale": (1, 0.5, 2, 4), "rounds": (23, 19, 15, 11)},
    FROM_FEDERATED: {"lr_scale": HIGHER},  # with the pair as chosen
}
TOGETHER = {  # what was best alone, together
    "FedIT, fine-tuned": [{"lr_scale": 0.5, "rounds_scale": 1.5}],
    "WiSE-FT": [
        {"lr_scale": 1, "weight": 0.25, "rounds_scale": 1.5},
        {"lr_scale": 2, "weight": 0.5, "rounds_scale": 1.5},
    ],
    "FedProx": [{"lr_scale": 4, "mu": 0.01}, {"lr_scale": 8, "mu": 0.01}],
    "FedProx, fine-tuned": [{"lr_scale": 0.5, "mu": 0.01, "rounds_scale": 1.5}],
    "FFA-LoRA, fine-tuned": [{"lr_scale": 2, "rounds_scale": 1.5}],
    "FedEx-LoRA, fine-tuned": [{"lr_scale": 0.5, "rounds_scale": 1.5}],
    "FlexLoRA, fine-tuned": [{"lr_scale": 0.5, "rounds_scale": 1.5}],
    PAIR: [{"federated_lr_scale": 4, "local_lr_scale": 2, "rounds": 15}],
}


def equal_merge(federated_lr_scale: float, local_lr_scale: float, rounds: int) -> Method:
    """The mean of the two models of the merges, trained with other options; their steps together stay the same."""

    def method(run: Run) -> Result:
        local_steps = run.setting.total_steps - int(rounds) * run.setting.round_steps
        changes = dict(rounds=int(rounds), local_steps=local_steps)
        changes |= dict(federated_lr_scale=federated_lr_scale, local_lr_scale=local_lr_scale)
        return METHODS["uniform"](replace(run, setting=replace(run.setting, **changes)))

    return method


# How the two models are trained is judged by their mean: it needs no calibration examples to weigh them.
MERGED = {PAIR: equal_merge, FROM_FEDERATED: FAMILIES["uniform, local from federated"]}


def usual(options: dict[str, tuple]) -> dict[str, float]:
    """The value of each option while another one is tried."""
    return {option: values[0] for option, values in options.items()}


def label(name: str, options: dict[str, float]) -> str:
    """A method and its options as a name."""
    return f"{name} ({', '.join(f'{option}={value:g}' for option, value in options.items())})"


def tried(name: str) -> list[dict[str, float]]:
    """The options of a method that are tried: one at a time, and the best ones together."""
    options = OPTIONS[name]
    single = [usual(options) | {option: value} for option, values in options.items() for value in values]
    return [*{label(name, each): each for each in single}.values(), *TOGETHER.get(name, [])]


def candidates() -> dict[str, Method]:
    """The methods to be tuned, with every choice of options that is tried."""
    families = FAMILIES | MERGED
    return {label(name, each): families[name](**each) for name in OPTIONS for each in tried(name)}


def best(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The options of each method with the highest mean accuracy."""
    accuracy = rows.groupby("method").accuracy.mean()
    return {name: max(tried(name), key=lambda each: accuracy[label(name, each)]) for name in OPTIONS}


def overview(board: pd.DataFrame) -> pd.DataFrame:
    """A line per method, the most accurate on average first: megabytes, the accuracy on each federation and its
    standard error over seeds, and means over the federations."""
    federations = list(dict.fromkeys(board.index.get_level_values("federation")))
    means = board.groupby("method").mean().round(9).sort_values("accuracy", ascending=False, kind="stable")
    table = pd.DataFrame(index=means.index.rename("method"))
    table["MB"] = (means["bytes"] / 1e6).map("{:.2f}".format)
    for name in federations:
        one = board.loc[name].reindex(table.index)
        top = one.accuracy[~one.index.isin(REFERENCES)].max()
        texts = [f"{a:.3f} ± {e:.3f}" for a, e in zip(one.accuracy, one["±"])]
        table[name] = [f"**{text}**" if a == top else text for text, a in zip(texts, one.accuracy)]
    columns = {"worst": "worst client", "better": "better than local", "union": "on all clients' data", "loss": "loss"}
    for column, title in columns.items():
        table[title] = means[column].map("{:.3f}".format)
    return table


def survives(lab: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """A line per federation: the rank correlation of the methods on two data sets (Spearman), and the ranks of some
    methods on both; rank 1 is the most accurate, without the references."""
    boards, lines = [leaderboard(rows).accuracy.drop(REFERENCES, level="method") for rows in (lab, other)], {}
    for federation in boards[1].index.unique("federation"):
        one, two = (board.loc[federation] for board in boards)
        one = one[one.index.isin(two.index)]
        ranks = [scores.rank(ascending=False, method="min") for scores in (one, two)]
        lines[federation] = {"rank correlation": one.corr(two, method="spearman")} | {
            name: f"{ranks[0][name]:.0f} → {ranks[1][name]:.0f}" for name in FOLLOWED
        }
    return pd.DataFrame(lines).T.rename_axis("federation")


def keep(rows: pd.DataFrame, path: Path) -> None:
    """Write the rows; the same rows are the same bytes."""
    rows.to_csv(path, index=False, compression={"method": "gzip", "mtime": 0})


def with_the_others(rows: pd.DataFrame, path: Path, only: Sequence[str]) -> pd.DataFrame:
    """The rows of these methods, and of all other methods those that the file has."""
    kept = pd.read_csv(path)
    is_again = kept.method.str.split(r" \(").str[0].isin(only)
    return pd.concat([kept[~is_again], rows[kept.columns]], ignore_index=True)


def report(rows: pd.DataFrame, name: str, folder: Path) -> None:
    """Write the rows and the figure."""
    keep(rows, folder / f"comparison-{name}.csv.gz")
    board = leaderboard(rows)
    differences = paired_differences(rows)
    picture = frontiers(board, pareto_front(board), references=list(REFERENCES))
    picture.savefig(folder / f"comparison-{name}.png", dpi=100)
    print(board.to_string(float_format="{:.3f}".format), differences.to_string(float_format="{:.4f}".format), sep="\n")


def work(number: int, args: argparse.Namespace) -> None:
    """Run the part of one process."""
    if args.processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.processes))
    settings = {name: replace(setting, device=args.device) for name, setting in SCALES[args.scale].items()}
    methods, seeds, options = METHODS | REFERENCES, SEEDS[args.scale], {}
    if args.tune:  # calibration examples train nobody, and more of them cost next to nothing
        methods, seeds, options = candidates(), [100], {"eval_split": lambda federation: federation.calibration}
        settings = {name: replace(setting, calibration_size=150) for name, setting in settings.items()}
    if args.only:
        methods = {name: method for name, method in methods.items() if name.split(" (")[0] in args.only}
    elsewhere = {"paper": prepare_paper, "grey-cifar10": prepare_grey}
    load = partial(elsewhere[args.scale], args.data) if args.scale in elsewhere else prepare
    shard = number, args.processes
    sweep(methods, settings, seeds, args.out / args.name, prepare=load, shard=shard, progress=True, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="lab", choices=SCALES)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--only", nargs="+", default=(), help="methods that are run again; an --out of their own")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="datasets", help="where torchvision keeps what it downloads, or CIFAR-10 is")
    parser.add_argument("--out", type=Path, default=HERE / "comparison", help="for finished results")
    args = parser.parse_args()
    args.name = f"{args.scale}-tune" if args.tune else args.scale
    folder, began = args.out.parent, time.perf_counter()
    if not args.report:
        before = len(read_results(args.out / args.name))
        torch.multiprocessing.spawn(work, (args,), nprocs=args.processes) if args.processes > 1 else work(0, args)
        run = {"processes": args.processes, "rows before": before, "minutes": (time.perf_counter() - began) / 60}
        run, kept = run | facts(), HERE / f"comparison-{args.name}.json"
        if args.only and kept.is_file():
            run = json.loads(kept.read_text()) | {"again": {"methods": list(args.only)} | run}
        (folder / kept.name).write_text(json.dumps(run, indent=1) + "\n")
    rows = read_results(args.out / args.name)
    if args.only:
        rows = with_the_others(rows, HERE / f"comparison-{args.name}.csv.gz", args.only)
    if args.tune:
        keep(rows, folder / f"comparison-{args.name}.csv.gz")
        print(*(f"{method}: {options}" for method, options in best(rows).items()), sep="\n")
    else:
        report(rows, args.name, folder)


if __name__ == "__main__":
    main()
