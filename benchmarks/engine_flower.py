"""The engine against Flower's simulation engine, with the same clients: run it in a separate environment.

    python -m venv flower && flower/bin/pip install . "flwr[simulation]"
    flower/bin/python benchmarks/engine_flower.py
    flower/bin/python benchmarks/engine_flower.py --smoke          # under a minute; its figures mean nothing

A ``ServerApp`` sends every client the adapter, waits for the replies, and then lets the engine train the same clients
in the server's process, in alternating order. A Flower client is plain PyTorch and PEFT, twice: ``flower, kept`` has
every advantage we could give it (actors and their model, data and connections are made in a first round that is not
timed and are kept, and each core has an actor with one thread), ``flower`` makes its model and data for every message,
as the clients of Flower's examples do. The time until the first message is answered is reported, too.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # the actors import workload, too

import flwr
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from workload import HERE, LR, Load, apart, compared, paired, write

TOLERANCE = 2e-4  # of adapters and losses, after at most 50 steps of 2e-3


def client_app(load: Load) -> ClientApp:
    """A client: load what came, train, send back."""
    app = ClientApp()

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from workload import client_steps, make

        from potara_lite.federation.batches import batch_indices

        torch.set_num_threads(1)
        row = int(context.node_config["partition-id"])
        kept = message.content["config"]["kept"]
        adapted, split = make(load) if kept else make.__wrapped__(load)  # kept in the actor's process
        model = adapted.model
        set_peft_model_state_dict(model, message.content["adapter"].to_torch_state_dict())
        weights = [model.get_parameter(name).requires_grad_() for name in adapted.parameter_names.values()]
        x, y = split.client(row)
        order = batch_indices(len(y), 0, load.steps, load.batch_size, [0, split.ids[row]])
        curve = client_steps(model, weights, ((x[index], y[index]) for index in order))
        content = {
            "adapter": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"row": row, "losses": torch.stack(curve).tolist()}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    return app


def server_app(load: Load, repeats: int, threads: int, result: dict, began: float) -> ServerApp:
    """Compare the results, then time both; what was measured is put into ``result``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from workload import make

        from potara_lite import repeat_adapter, train
        from potara_lite.adapters.state import flatten, stack_adapters

        torch.set_num_threads(threads)
        adapted, split = make(load)
        initial = repeat_adapter(adapted.initial, load.clients)
        nodes = sorted(grid.get_node_ids())

        def flower(kept: bool) -> tuple[torch.Tensor, torch.Tensor]:
            content = RecordDict({"adapter": ArrayRecord(adapted.initial), "config": ConfigRecord({"kept": kept})})
            messages = [Message(content=content, message_type="train", dst_node_id=node) for node in nodes]
            replies = list(grid.send_and_receive(messages))
            for reply in replies:
                if reply.has_error():
                    raise RuntimeError(reply.error)
            replies = sorted((reply.content for reply in replies), key=lambda content: content["metrics"]["row"])
            adapters = [reply["adapter"].to_torch_state_dict() for reply in replies]
            stack = stack_adapters([{name: adapter[name] for name in adapted.initial} for adapter in adapters])
            return flatten(stack), torch.tensor([reply["metrics"]["losses"] for reply in replies])

        def engine():
            return train(adapted, initial, split, steps=load.steps, batch_size=load.batch_size, lr=LR, seed=0)

        fast, (weights, curves) = engine(), flower(kept=True)
        first = {"seconds to the first round's end": time.perf_counter() - began}
        different = [apart(flatten(fast.adapters), weights, TOLERANCE), apart(fast.losses, curves, TOLERANCE)]
        contestants = {"engine": engine, "flower, kept": lambda: flower(True), "flower": lambda: flower(False)}
        result.update({"different": max(different)} | first | compared(paired(contestants, repeats), "engine"))

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpus", type=int, default=len(os.sched_getaffinity(0)), help="actors, and our threads")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.smoke:
        args.clients, args.batch_size, args.steps, args.repeats = 3, 4, 2, 2
    load, result = Load(args.clients, args.batch_size, args.steps), {}
    run_simulation(
        server_app=server_app(load, args.repeats, args.cpus, result, time.perf_counter()),
        client_app=client_app(load),
        num_supernodes=load.clients,
        backend_config={
            "init_args": {"num_cpus": args.cpus, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    if "seconds" not in result:
        raise SystemExit("Flower's server stopped before anything was timed; its log says why")
    where = f"{load.clients} clients, batch {load.batch_size}"
    ratios = {f"{name}, {where}": ratio["median"] for name, ratio in result["ratio to engine"].items()}
    options = {key: value for key, value in vars(args).items() if key != "out"}
    path = args.out or HERE / ("engine_flower-smoke.json" if args.smoke else "engine_flower.json")
    write(path, options, [vars(load) | result], ratios, flwr=flwr.__version__)


if __name__ == "__main__":
    main()
