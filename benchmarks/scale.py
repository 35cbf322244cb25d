"""Wall time and peak memory as clients grow: each size in a separate process.

    python benchmarks/scale.py                  # 8, 125, 250, 500 and 1,000 clients of 50 local steps, three times
    python benchmarks/scale.py --smoke          # seconds; its figures mean nothing

``seconds`` is the training alone, after a warm-up of one step; ``peak_bytes`` is the largest resident size the process
ever had (``ru_maxrss``), so it counts Python, PyTorch and the data, whose bytes are reported, too. Every second
repetition takes the sizes in the opposite order. The last row is FedIT over the largest number of clients of which a
twentieth take part in each round.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from workload import HERE, LR, Load, make, write

from potara_lite import Execution, fedit, repeat_adapter, train


def measure(load: Load, rounds: int, memory: float | None) -> dict:
    """Train once in this process: all clients, or with ``rounds`` a twentieth of them in each round."""
    adapted, split = make(load)
    options = dict(batch_size=load.batch_size, lr=LR, execution=Execution(memory_bytes=memory))
    train(adapted, repeat_adapter(adapted.initial, 2), split.rows(slice(0, 2)), steps=1, **options)
    began = time.perf_counter()
    if rounds:
        steps = load.steps // rounds
        run = fedit(adapted, split, rounds=rounds, local_steps=steps, participation=0.05, **options)
        done, finite = int(run.ledger.steps.sum()), all(tensor.isfinite().all() for tensor in run.adapter.values())
    else:
        run = train(adapted, repeat_adapter(adapted.initial, load.clients), split, steps=load.steps, **options)
        done, finite = int(run.state.steps.sum()), bool(run.losses.isfinite().all())
    seconds = time.perf_counter() - began
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes
    return {
        "clients": load.clients,
        "rounds": rounds,
        "client_steps": done,
        "finite": bool(finite),
        "seconds": seconds,
        "peak_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "data_bytes": sum(x.nbytes for x, _ in split.examples),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 125, 250, 500, 1000])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=10, help="of FedIT; its steps are shared out among them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=float, help="bytes of one chunk, if not the default")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=int, nargs=2, metavar=("CLIENTS", "ROUNDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        load = Load(args.one[0], args.batch_size, args.steps)
        print(json.dumps(measure(load, args.one[1], args.memory)))
        return
    if args.smoke:
        args.clients, args.steps, args.rounds, args.repeats = [2, 20], 2, 2, 1
    jobs = [(clients, 0) for clients in args.clients] + [(max(args.clients), args.rounds)]
    options = {key: value for key, value in vars(args).items() if key not in ("out", "one")}
    fixed = [f"--{key}={options[key]}" for key in ("steps", "memory") if options[key]] + [
        f"--batch-size={args.batch_size}"
    ]
    rows = []
    for repeat in range(args.repeats):
        for job in jobs[:: -1 if repeat % 2 else 1]:
            command = [sys.executable, __file__, *fixed, "--one", *map(str, job)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(output.splitlines()[-1]))
    ratios, base = {}, min((n for n in args.clients if n >= 125), default=args.clients[0])

    def each_step(clients: int) -> float:
        return statistics.median(
            r["seconds"] / r["client_steps"] for r in rows if (r["clients"], r["rounds"]) == (clients, 0)
        )

    for clients, rounds in jobs:
        peaks = [row["peak_bytes"] for row in rows if (row["clients"], row["rounds"]) == (clients, rounds)]
        name = f"{clients} clients" + (f", {rounds} rounds of FedIT" if rounds else "")
        ratios[f"{name}: peak memory in GB"] = max(peaks) / 1e9
        if not rounds:
            ratios[f"{name}: seconds a client's step, to those at {base}"] = each_step(clients) / each_step(base)
    write(args.out or HERE / ("scale-smoke.json" if args.smoke else "scale.json"), options, rows, ratios)


if __name__ == "__main__":
    main()
