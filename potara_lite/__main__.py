"""The quick benchmark from a shell: ``python -m potara_lite``."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pandas as pd
import torch

from . import __version__
from .adapters import client_adapter, save_adapter
from .benchmark import ORACLE, Outcome, Setting, compare, prepare, summary, write
from .plots import overview


def parser() -> argparse.ArgumentParser:
    default = {field.name: field.default for field in fields(Setting)}
    p = argparse.ArgumentParser(
        prog="python -m potara_lite",
        description="Train a federated and a local LoRA model for every client of a federation, merge them, compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--clients", type=int, default=default["clients"], help="number of clients")
    p.add_argument("--alpha", type=float, default=default["alpha"], help="Dirichlet concentration of the labels")
    p.add_argument("--shift", action="store_true", help="give each client an image domain of its own as well")
    p.add_argument("--train-size", type=int, default=default["train_size"], help="training examples per client")
    p.add_argument("--test-size", type=int, default=default["test_size"], help="test examples per client")
    p.add_argument("--rounds", type=int, default=default["rounds"], help="federated rounds")
    p.add_argument("--local-steps", type=int, default=default["local_steps"], help="optimiser steps of a local model")
    seeds = p.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="the one seed to run")
    seeds.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="several seeds, one after the other")
    p.add_argument("--device", default=default["device"], help="cpu, cuda, cuda:1, mps, …")
    p.add_argument("--out", type=Path, default=Path("potara-results"), help="folder for the results")
    p.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    p.add_argument("--version", action="version", version=__version__)
    return p


def check_device(name: str) -> None:
    """Raise ``ValueError`` for a device that torch does not know or this machine does not have."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def save_models(out: Path, adapted, outcomes: dict[str, Outcome]) -> None:
    """The adapters of one seed as PEFT folders: ``federated``, and ``client-i/local``, ``client-i/potara``."""
    seed = outcomes["federated"].seed
    folder = out / "adapters" / f"seed-{seed}"
    save_adapter(adapted, client_adapter(outcomes["federated"].adapters, 0), folder / "federated")
    for method in ("local", "potara"):
        for client in range(len(outcomes[method].loss)):
            adapter = client_adapter(outcomes[method].adapters, client)
            save_adapter(adapted, adapter, folder / f"client-{client}" / method)


def run(args: argparse.Namespace) -> pd.DataFrame:
    """Run the benchmark, writing each method's rows to ``results.csv`` as soon as they are there."""
    check_device(args.device)
    names = {field.name for field in fields(Setting)}
    setting = Setting(**{name: value for name, value in vars(args).items() if name in names})
    seeds = args.seeds or [args.seed]
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "setting": asdict(setting),
        "seeds": seeds,
        "versions": {"potara_lite": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }
    write(args.out / "config.json", json.dumps(facts, indent=2) + "\n")
    frames: list[pd.DataFrame] = []
    for number, seed in enumerate(seeds):
        adapted, federation = prepare(setting, seed)
        outcomes: dict[str, Outcome] = {}
        for outcome in compare(adapted, federation, setting, seed, progress=not args.quiet):
            outcomes[outcome.method] = outcome
            frames.append(outcome.frame())
            write(args.out / "results.csv", pd.concat(frames).to_csv(index=False))
        save_models(args.out, adapted, outcomes)
        if number == 0:
            marked = {"potara": "potara", "potara-paper": "potara-paper", "oracle": ORACLE}
            points = {name: (outcomes[key].weight, outcomes[key].loss, outcomes[key].accuracy)
                      for name, key in marked.items()}  # fmt: skip
            figure = overview(*outcomes[ORACLE].curve, points, summary(pd.concat(frames)))
            figure.savefig(args.out / "figure.png", dpi=120)
    return pd.concat(frames)


def as_text(table: pd.DataFrame) -> str:
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
    table = summary(rows)
    if args.json:
        print(json.dumps({"out": str(args.out), "methods": json.loads(table.to_json(orient="index"))}, indent=2))
    else:
        print(as_text(table))
        print(f"\nMB: up + down per client; λ (weight) is on the federated model. Everything is in {args.out}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
