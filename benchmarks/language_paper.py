"""The paper's language experiment, on your own model, task files and accelerator: one task per client.

    python benchmarks/language_paper.py --model meta-llama/Llama-3.2-3B --tasks flan/*.json --device cuda
    python benchmarks/language_paper.py --model FOLDER --tasks boolq.jsonl arc.jsonl openbookqa.jsonl --device cuda

Each task file is a client (formats: ``read_task``); of its shuffled examples come 1,000 to train on, 30 to
calibrate and 500 to test, or in these proportions what there is. Budgets as reported: 50 federated and 300 local steps
for the merges, 600 for the baselines. Rank, learning rate and how steps make rounds are not known to us: they are
options. The frozen model is in bf16, adapters and their optimiser in float32. Every method's rows (loss and token
accuracy; ``acc`` and ``acc_norm`` of multiple choice where examples have options, ``exact_match`` of greedy decoding
where they have none) are in ``rows.csv`` as soon as they are there, and the merged adapters as PEFT folders.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
import transformers
from pages import facts

from potara_lite import Setting, attach, causal_lm, client_adapter, save_adapter
from potara_lite.__main__ import check_device
from potara_lite.adapters.lora import AdaptedBackbone
from potara_lite.adapters.state import select_clients
from potara_lite.baselines import algorithms
from potara_lite.baselines.methods import from_algorithm, local_training
from potara_lite.experiment import MODEL_PAIR_METHODS, Method, Result, Run
from potara_lite.federation.sources import from_tensors
from potara_lite.federation.split import Federation
from potara_lite.federation.tasks import Question, read_task
from potara_lite.federation.text import encode_answers
from potara_lite.files import one_line, write_atomically
from potara_lite.models.frozen_trunk import linear_layers
from potara_lite.models.language import check_source, text_tokenizer
from potara_lite.results import result_rows
from potara_lite.training.scoring import exact_match, multiple_choice, write_answers

REPORTED = dict(train_size=1000, calibration_size=30, test_size=500)
SHARES = {name: size / sum(REPORTED.values()) for name, size in REPORTED.items()}


def parts_of(examples: Sequence[Question]) -> list[Sequence[Question]]:
    """A task's training, calibration and test examples: the reported numbers, or as many in proportion."""
    total = min(len(examples), sum(REPORTED.values()))
    calibrated, tested = (max(1, round(total * SHARES[name])) for name in ("calibration_size", "test_size"))
    trained = total - calibrated - tested
    return [examples[:trained], examples[trained : total - tested], examples[total - tested : total]]


def read_tasks(paths: Sequence[Path], seed: int) -> list[list[Sequence[Question]]]:
    """Every task's three parts. Raises ``ValueError`` naming a file that cannot be read or has too few examples."""
    tasks = []
    for path in paths:
        examples = read_task(path, seed)
        if len(examples) < 3:
            raise ValueError(
                f"{path} has {len(examples)} examples, at least 3 are needed: to train, calibrate and test"
            )
        tasks.append(parts_of(examples))
    return tasks


def prepare(
    args: argparse.Namespace, seed: int, tokenizer
) -> tuple[AdaptedBackbone, Federation, list[Sequence[Question]]]:
    """The model with empty adapters, the federation of the tasks, and every client's test examples."""
    tasks = read_tasks(args.tasks, seed)
    network = causal_lm(args.model, dtype=torch.bfloat16)
    adapted = attach(network, rank=args.rank, targets=linear_layers(network, args.last), head=None, seed=seed)

    def encoded(part: Sequence[Question]):
        prompts = [example.prompt for example in part]
        answers = [f" {example.answer}{tokenizer.eos_token or ''}" for example in part]  # so that it learns to end
        return encode_answers(tokenizer, prompts, answers, args.max_length)

    train, calibration, test = ([encoded(task[k]) for task in tasks] for k in range(3))
    vocabulary = adapted.model.get_input_embeddings().num_embeddings
    federation = from_tensors(train, test, calibration=calibration, classes=vocabulary, name="tasks")
    adapted = adapted.to(args.device)
    federation = federation.to(args.device)
    if args.last is not None:
        federation = federation.map(adapted.embed, batch_size=16)
    return adapted, federation, [task[2] for task in tasks]


def with_steps(method: Method, steps: int) -> Method:
    """A method with another number of steps."""

    def run(run: Run) -> Result:
        setting = replace(run.setting, rounds=steps // run.setting.round_steps, local_steps=0)
        return method(Run(run.adapted, run.federation, setting, run.seed))

    return run


def methods(args: argparse.Namespace) -> dict[str, Method]:
    """What is compared: the two models, their merges, and training alone or together for the baselines' steps."""
    return {
        **{name: MODEL_PAIR_METHODS[name] for name in MODEL_PAIR_METHODS if name != "backbone" or args.backbone},
        f"local, {args.baseline_steps} steps": with_steps(local_training(), args.baseline_steps),
        f"FedIT, {args.baseline_steps} steps": with_steps(from_algorithm(algorithms.FEDIT), args.baseline_steps),
    }


def answers_scored(result: Result, tests: Sequence[Sequence[Question]], tokenizer, args) -> pd.DataFrame:
    """``acc``, ``acc_norm`` and ``exact_match`` of each client, NaN where its task has no such answers."""
    scores = pd.DataFrame(torch.nan, index=range(len(tests)), columns=["acc", "acc_norm", "exact_match"])
    options = dict(batch_size=args.score_batch)
    with_options = [i for i, test in enumerate(tests) if all(len(example.options) > 1 for example in test)]
    if with_options:
        questions = [tests[i] for i in with_options]
        stack = select_clients(result.adapters, torch.tensor(with_options))
        found = multiple_choice(result.adapted, stack, questions, tokenizer, max_length=args.max_length, **options)
        scores.loc[with_options, ["acc", "acc_norm"]] = torch.stack(found, dim=1).numpy()
    free = [i for i in range(len(tests)) if i not in with_options]
    if free:
        stack = select_clients(result.adapters, torch.tensor(free))
        prompts = [[example.prompt for example in tests[i]] for i in free]
        lengths = dict(steps=args.new_tokens, max_length=args.max_length)
        texts = write_answers(result.adapted, stack, prompts, tokenizer, **lengths, **options)
        matches = [exact_match(text, [e.answer for e in tests[i]]) for text, i in zip(texts, free)]
        scores.loc[free, "exact_match"] = matches
    return scores


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model: a name of the Hub, or a folder")
    parser.add_argument("--tasks", nargs="+", type=Path, required=True, help="a JSON or JSON-lines file per client")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--last", type=int, help="adapt only the last blocks; features below are computed once")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--round-steps", type=int, default=5)
    parser.add_argument("--federated-steps", type=int, default=50)
    parser.add_argument("--local-steps", type=int, default=300)
    parser.add_argument("--baseline-steps", type=int, default=600)
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a prompt with its answer")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens that are written where there are no options")
    parser.add_argument("--score-batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--backbone", action="store_true", help="score the model without an adapter, too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("language-paper"))
    return parser


def check_steps(args: argparse.Namespace) -> None:
    """Raise ``ValueError`` for steps that are no whole number of rounds."""
    for name in ("federated_steps", "baseline_steps"):
        if (steps := getattr(args, name)) % args.round_steps:
            raise ValueError(f"--{name.replace('_', '-')} {steps} are no whole number of rounds of {args.round_steps}")


def main(argv: list[str] | None = None) -> None:
    args, frames = options().parse_args(argv), []
    args.model = check_source(args.model)
    check_steps(args)
    check_device(args.device)
    read_tasks(args.tasks, args.seeds[0])  # before anything large is loaded
    tokenizer = text_tokenizer(args.model)
    setting = Setting(
        clients=len(args.tasks), **REPORTED, rank=args.rank, batch_size=args.batch_size, lr=args.lr,
        rounds=args.federated_steps // args.round_steps, round_steps=args.round_steps, local_steps=args.local_steps,
        device=args.device,
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    given = {name: str(value) for name, value in vars(args).items()}
    made = {"options": given, "setting": asdict(setting), **facts(transformers=transformers.__version__)}
    write_atomically(args.out / "config.json", json.dumps(made, indent=1) + "\n")
    for seed in args.seeds:
        adapted, federation, tests = prepare(args, seed, tokenizer)
        run = Run(adapted, federation, setting, seed)
        for name, method in methods(args).items():
            result = method(run)
            rows = result_rows(name, run, result).reset_index(drop=True)
            frames.append(rows.join(answers_scored(result, tests, tokenizer, args)))
            write_atomically(args.out / "rows.csv", pd.concat(frames).to_csv(index=False))
            if name == "potara-calibrated":
                for i, path in enumerate(args.tasks):
                    folder = args.out / "adapters" / f"seed-{seed}" / f"client-{i}-{path.stem}"
                    save_adapter(adapted, client_adapter(result.adapters, i), folder)
    table = pd.concat(frames).groupby("method", sort=False)
    print(table[["loss", "accuracy", "acc", "acc_norm", "exact_match", "steps"]].mean().round(4).to_string())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"language_paper: {one_line(error)}")
