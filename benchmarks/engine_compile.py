"""Does ``torch.compile`` pay? One training step of all clients, with the engine and compiled.

    python benchmarks/engine_compile.py            # minutes, most of them the compiler's
    python benchmarks/engine_compile.py --smoke    # its figures mean nothing

A step is the losses of all clients and their gradients. ``compiled`` is what ``train(compile=True)`` does: not the
grouped LoRA of ``grouped_lora.py``, which replaces the forward of every adapted layer, but ``vmap`` over the backbone,
with compiled forward and backward passes. ``vmap`` itself is timed, too. ``start-up`` is the time of the first call
minus that of a later one, with an empty cache: seconds that a run must save before compiling pays; ``pays after`` is
the number of steps in which it does.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from workload import HERE, Load, apart, compared, make, paired, write

from potara_lite import repeat_adapter
from potara_lite.adapters.state import flatten, unflatten
from potara_lite.training.grouped_lora import group_lora
from potara_lite.training.train import compiled_losses, losses

TOLERANCE = 1e-5  # of losses and gradients


def row(load: Load, repeats: int) -> dict:
    """The step of the engine, of ``vmap`` and of the compiler, on the same clients and batch."""
    adapted, split = make(load)
    flat = flatten(repeat_adapter(adapted.initial, load.clients))
    flat = flat + 0.02 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(flat)
    first = split.head(load.batch_size)
    x, y = first.x, first.y

    def step(losses_of: Callable, forward: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        weights = flat.detach().requires_grad_()
        value = losses_of(forward, unflatten(weights, adapted.initial), x, y)
        return value.detach(), torch.autograd.grad(value.sum(), weights)[0]

    steps = {
        "engine": lambda: step(losses, group_lora(adapted)),
        "vmap": lambda: step(losses, adapted),
        "compiled": lambda: step(compiled_losses(), adapted),
    }
    results = {name: run() for name, run in steps.items() if name != "compiled"}  # caches are filled, as in training
    torch._dynamo.utils.counters.clear()
    began = time.perf_counter()
    results["compiled"] = steps["compiled"]()
    first = time.perf_counter() - began
    if breaks := torch._dynamo.utils.counters["graph_break"]:
        raise RuntimeError(f"the compiler gave up at {len(breaks)} places, such as: {next(iter(breaks))}")
    different = [
        apart(one, two, TOLERANCE)
        for name in ("vmap", "compiled")
        for one, two in zip(results["engine"], results[name])
    ]
    many = {name: lambda run=run: [run() for _ in range(load.steps)] for name, run in steps.items()}
    for run in many.values():
        run()
    result = compared(paired(many, repeats, load.device), "engine")
    each = {name: spread["median"] / load.steps for name, spread in result["seconds"].items()}
    start, saved = first - each["compiled"], each["engine"] - each["compiled"]
    return (
        {"what": "training step", **vars(load), "different": max(different)}
        | result
        | {"start-up": start, "pays after": start / saved if saved > 0 else None}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.smoke:
        args.clients, args.steps, args.repeats = [2], 1, 2
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # nothing of an earlier run
        rows = [row(Load(clients, steps=args.steps, device=args.device), args.repeats) for clients in args.clients]
    ratios = {f"{n}, {r['clients']} clients": v["median"] for r in rows for n, v in r["ratio to engine"].items()}
    name = "engine_compile" + ("" if args.device == "cpu" else f"-{args.device.split(':')[0]}")
    options = {key: value for key, value in vars(args).items() if key != "out"}
    write(args.out or HERE / f"{name}{'-smoke' if args.smoke else ''}.json", options, rows, ratios)


if __name__ == "__main__":
    main()
