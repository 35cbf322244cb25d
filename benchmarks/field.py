"""The field, side by side: every method of ``potara_lite.methods`` on the same federations, at the same steps.

    python benchmarks/field.py                    # lab: Fashion-MNIST, the lab ViT, two CPU cores
    python benchmarks/field.py --part 0/2         # every second federation and seed, to share the work
    python benchmarks/field.py --scale quick      # seconds; its figures mean nothing
    python benchmarks/field.py --scale paper --device cuda --data datasets   # CIFAR-100 and ViT-B/16, downloaded
    python benchmarks/field.py --tune             # the methods' options, by calibration examples of seed 100
    python benchmarks/field.py --report           # tables and figure from what is finished

Interrupted, it goes on where it stopped (``field/``).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from potara_lite import Setting, attach, from_torchvision, prepare, torchvision_vit
from potara_lite import algorithms as A
from potara_lite import baselines as B
from potara_lite.methods import METHODS, REFERENCES, alone, merging, played
from potara_lite.plots import frontiers
from potara_lite.sweep import against, efficient, finished, leaderboard, sweep

HERE = Path(__file__).parent
LAB = Setting(test_size=200, rounds=24, local_steps=60)
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
SEEDS = {"quick": range(1), "lab": range(5), "paper": range(5)}


def prepare_paper(root: str, setting: Setting, seed: int, *, weights: str | None = "DEFAULT", download: bool = True):
    """CIFAR-100 and torchvision's ViT-B/16 with LoRA on its MLPs."""
    federation = from_torchvision(
        "CIFAR100",
        root,
        download=download,
        clients=setting.clients,
        train_size=setting.train_size,
        calibration_size=setting.calibration_size,
        test_size=setting.test_size,
        alpha=setting.alpha,
        shift=setting.shift,
        seed=seed,
    )
    backbone = torchvision_vit(classes=federation.classes, weights=weights)
    adapted = attach(backbone, rank=setting.rank, targets=("mlp.0", "mlp.3"), head="heads.head", seed=seed)
    return adapted.to(setting.device), federation.to(setting.device)


def candidates() -> dict:
    """The options that were tried, a method each."""
    tried = {
        f"{name}, lr={lr:g}": played(algorithm, lr=lr)
        for lr in (2e-3, 4e-3, 8e-3)
        for name, algorithm in {
            "FedIT": A.FEDIT,
            "FFA-LoRA": A.FFA,
            "FedEx-LoRA": A.FEDEX,
            "FLoRA": A.FLORA,
            "FlexLoRA": A.flexlora(),
            "FedSA-LoRA": A.FEDSA,
            "FedPer": A.FEDPER,
            "FedRep": A.fedrep(),
            "APFL": A.apfl(),
            "FedDPA-T": A.feddpa(),
            "FedALT": A.fedalt(),
        }.items()
    }
    for lr in (2e-3, 4e-3, 8e-3):
        tried[f"local, lr={lr:g}"] = alone(lr=lr)
    for strength in (0.01, 0.1, 1.0):
        tried[f"FedProx, mu={strength:g}"] = played(A.fedprox(strength))
        tried[f"Ditto, strength={strength:g}"] = played(A.ditto(strength))
    for value in (0.5, 0.6, 0.8, 1.0):
        tried[f"task arithmetic, coefficient={value:g}"] = merging(
            lambda cell, value=value: B.task_arithmetic((cell.pair.federated, cell.pair.local), value)
        )
    return tried


def report(rows, name: str) -> None:
    """Write the rows and the figure, and print the tables that are read off the rows."""
    rows.to_csv(HERE / f"field-{name}.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})
    board = leaderboard(rows)
    print(board.to_string(float_format="{:.3f}".format))
    if "potara" in set(rows.method):
        frontiers(board, efficient(board)).savefig(HERE / f"field-{name}.png", dpi=120)
        print(against(rows).to_string(float_format="{:.4f}".format))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="lab", choices=SCALES)
    parser.add_argument("--part", default="0/1", help="i/n")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="datasets", help="where torchvision keeps what it downloads")
    parser.add_argument("--out", type=Path, default=HERE / "field")
    args = parser.parse_args()
    settings = {name: replace(setting, device=args.device) for name, setting in SCALES[args.scale].items()}
    methods, seeds, options = METHODS | REFERENCES, SEEDS[args.scale], {}
    if args.tune:
        methods, seeds, options = candidates(), [100], {"judge": lambda federation: federation.calibration}
    i, n = map(int, args.part.split("/"))
    name = f"{args.scale}-tune" if args.tune else args.scale
    if not args.report:
        load = partial(prepare_paper, args.data) if args.scale == "paper" else prepare
        sweep(methods, settings, seeds, args.out / name, prepare=load, part=(i, n), progress=True, **options)
    report(finished(args.out / name), name)


if __name__ == "__main__":
    main()
