"""The engine against loops over clients: training, and per-sample gradients for the Fisher.

    python benchmarks/engine.py                                    # lab ViT, on the CPU
    python benchmarks/engine.py --device cuda
    python benchmarks/engine.py --device cuda --shape vit-b-16 --clients 8 32 --batch-sizes 8
    python benchmarks/engine.py --smoke                            # seconds; its figures mean nothing

Contestants: the engine; the sequential loop over one PEFT model (as in ``potara.py``); a loop in the style of
PFLlib (an object per client with a deep copy of the model and a DataLoader, at 32 clients and batch 8); for the
Fisher, batches of one example, and Opacus' ``GradSampleModule`` where ``opacus`` is installed. All of them take the
same batches of the same tokens; their results are compared before anything is timed. "frozen products" is no
contestant but a bound: the matrix products of the frozen layers alone, which every program has to do.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from pathlib import Path

import torch
from peft import set_peft_model_state_dict
from torch.nn import functional as F
from torch.utils.data import DataLoader
from workload import HERE, LR, Load, apart, client_steps, compared, make, paired, write

from potara_lite import Execution, per_sample_gradients, repeat_adapter, train
from potara_lite.adapters.state import client_adapter, flatten
from potara_lite.federation.batches import batch_indices

WORK = 3_200  # examples that one contestant of one row sees, at most; the number of steps follows
TOLERANCE = 2e-4  # of adapters and losses, after at most 50 steps of 2e-3


class PFLClient:
    """A client in the style of PFLlib's ``clientAVG``: its model, data and loader, a new optimiser in each round."""

    def __init__(self, adapted, split, row: int, load: Load):
        self.model, self.adapted, self.load = copy.deepcopy(adapted.model), adapted, load
        x, y = split.client(row)
        self.data, self.id = list(zip(x, y)), split.ids[row]

    def set_parameters(self, adapter) -> None:
        set_peft_model_state_dict(self.model, adapter)

    def train(self) -> list:
        order = batch_indices(len(self.data), 0, self.load.steps, self.load.batch_size, [0, self.id])
        weights = [self.model.get_parameter(name).requires_grad_() for name in self.adapted.parameter_names.values()]
        return client_steps(self.model, weights, DataLoader(self.data, batch_sampler=order.tolist()))

    def weights(self) -> torch.Tensor:
        names = (self.adapted.parameter_names[name] for name in self.adapted.initial)
        return torch.cat([self.model.get_parameter(name).detach().flatten() for name in names])


def pfl_round(adapted, split, initial, load: Load) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the clients, send them the adapter, train one after another: adapters ``(C, P)`` and losses."""
    clients, curves = [PFLClient(adapted, split, row, load) for row in range(len(split))], []
    for row, client in enumerate(clients):
        client.set_parameters(client_adapter(initial, row))
        curves.append(torch.stack(client.train()))
    return torch.stack([client.weights() for client in clients]), torch.stack(curves)


def sequential(adapted, initial, split, load: Load) -> tuple[torch.Tensor, torch.Tensor]:
    """One client after another in PEFT's own model, as in ``potara.py``: adapters ``(C, P)`` and losses."""
    model, rows, curves = adapted.model, [], []
    weights = [model.get_parameter(name).requires_grad_() for name in adapted.parameter_names.values()]
    for row, number in enumerate(split.ids):
        set_peft_model_state_dict(model, client_adapter(initial, row))
        x, y = split.client(row)
        batches = batch_indices(len(y), 0, load.steps, load.batch_size, [0, number]).to(y.device)
        curves.append(torch.stack(client_steps(model, weights, ((x[batch], y[batch]) for batch in batches))))
        rows.append(torch.cat([weight.detach().flatten() for weight in weights]))
    model.requires_grad_(False)
    set_peft_model_state_dict(model, adapted.initial)
    return torch.stack(rows), torch.stack(curves)


def frozen_products(adapted, split, load: Load):
    """A function that computes, in all steps, each frozen layer's output and the gradient in its input; the first
    layer's input needs none."""
    rows = load.clients * load.batch_size * split.examples[0][0].shape[1]
    weights = [adapted.model.get_submodule(layer).base_layer.weight.detach() for layer in adapted.scaling]
    x = {n: torch.randn(rows, n, device=load.device) for n in {n for weight in weights for n in weight.shape}}
    y = {n: torch.empty_like(tensor) for n, tensor in x.items()}

    def run() -> None:
        for _ in range(load.steps):
            for weight in weights:
                torch.mm(x[weight.shape[1]], weight.T, out=y[weight.shape[0]])
            for weight in weights[1:]:
                torch.mm(x[weight.shape[0]], weight, out=y[weight.shape[1]])

    return run


def training(load: Load, repeats: int, *, others: bool, memory: float | None) -> dict:
    """One row: the engine and the loops on the same clients; with ``others``, more of both."""
    adapted, split = make(load)
    initial = repeat_adapter(adapted.initial, load.clients)

    def engine(**execution):
        options = dict(steps=load.steps, batch_size=load.batch_size, lr=LR, seed=0)
        return train(adapted, initial, split, execution=Execution(memory_bytes=memory, **execution), **options)

    loops = {"sequential": lambda: sequential(adapted, initial, split, load)}
    if others:
        loops["pfllib-style"] = lambda: pfl_round(adapted, split, initial, load)
    fast, different = engine(), []
    for loop in loops.values():
        weights, curves = loop()
        different += [apart(flatten(fast.adapters), weights, TOLERANCE), apart(fast.losses, curves, TOLERANCE)]
    del fast, weights, curves
    contestants = {"engine": engine, **loops, "frozen products": frozen_products(adapted, split, load)}
    if others:
        contestants["engine, chunk_size=8"] = lambda: engine(chunk_size=8)
        contestants["engine, autocast=bfloat16"] = lambda: engine(autocast=torch.bfloat16)
    result = compared(paired(contestants, repeats, load.device), "engine")
    return {"what": "training", **vars(load), "different": max(different)} | result


def micro_batches(adapted, stack, split) -> torch.Tensor:
    """Per-sample gradients ``(C, N, P)`` by batches of one example."""
    rows, model = [], adapted.model
    weights = [model.get_parameter(adapted.parameter_names[name]).requires_grad_() for name in stack]
    for client in range(len(split)):
        set_peft_model_state_dict(model, client_adapter(stack, client))
        for x, y in zip(*split.client(client)):
            loss = F.cross_entropy(model(x.unsqueeze(0)), y.unsqueeze(0))
            rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, weights)]))
    model.requires_grad_(False)
    set_peft_model_state_dict(model, adapted.initial)
    return torch.stack(rows).view(len(split), -1, len(rows[0]))


def with_opacus(adapted, stack, split):
    """The same by Opacus: a function, or the reason why there is none. Its hooks run in train mode only, which changes
    nothing in a network without dropout and batch norm."""
    try:
        from opacus import GradSampleModule
    except ImportError:
        return "opacus is not installed"
    model = copy.deepcopy(adapted.model).train()
    weights = [model.get_parameter(adapted.parameter_names[name]).requires_grad_() for name in stack]
    wrapped = GradSampleModule(model, loss_reduction="sum")

    def run() -> torch.Tensor:
        rows = []
        for client in range(len(split)):
            set_peft_model_state_dict(model, client_adapter(stack, client))
            x, y = split.client(client)
            F.cross_entropy(wrapped(x), y, reduction="sum").backward()
            rows.append(torch.cat([weight.grad_sample.flatten(1) for weight in weights], dim=1))
            wrapped.zero_grad()
        return torch.stack(rows)

    return run


def fisher(load: Load, repeats: int, *, samples: int, memory: float | None) -> dict:
    """One row: per-sample gradients of ``samples`` examples of each client, at adapters a few steps from the start."""
    adapted, split = make(load)
    samples = min(samples, int(split.sizes.min()))  # no padding: a loop would not take it
    split = split.head(samples)
    stack = train(adapted, repeat_adapter(adapted.initial, load.clients), split, steps=5, lr=LR).adapters
    contestants = {
        "engine": lambda: per_sample_gradients(adapted, stack, split, execution=Execution(memory_bytes=memory)),
        "micro-batches": lambda: micro_batches(adapted, stack, split),
    }
    opacus, note = with_opacus(adapted, stack, split), {}
    if callable(opacus):
        contestants["opacus"] = opacus
    else:
        note = {"opacus": opacus}
    fast = contestants["engine"]()
    different = [apart(fast, run(), TOLERANCE) for name, run in contestants.items() if name != "engine"]
    del fast
    result = compared(paired(contestants, repeats, load.device), "engine")
    return (
        {"what": "per-sample gradients", **vars(load), "samples": samples, "different": max(different)} | result | note
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="lab", choices=["lab", "vit-b-16"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", type=float, help="bytes of one chunk, if not the default")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.smoke:
        args.clients, args.batch_sizes, args.steps, args.repeats = [2, 3], [4], 3, 2
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus: tokens need no gradient
    rows, ratios = [], {}
    for clients in args.clients:
        for batch in args.batch_sizes:
            steps = max(1, min(args.steps, WORK // (clients * batch)))
            others = (clients, batch) == ((3, 4) if args.smoke else (32, 8))
            load = Load(clients, batch, steps, args.shape, args.device)
            rows.append(training(load, args.repeats, others=others, memory=args.memory))
            for name, ratio in rows[-1]["ratio to engine"].items():
                ratios[f"{name}, {clients} clients, batch {batch}"] = ratio["median"]
    if args.shape == "lab" and not args.smoke:
        for change in [{"rank": 1}, {"rank": 16}, {"rank": 64}, {"depth": 2}, {"depth": 8}]:
            load = Load(8, steps=10, device=args.device, **change)
            rows.append(training(load, args.repeats, others=False, memory=args.memory))
            for name, ratio in rows[-1]["ratio to engine"].items():
                ratios[f"{name}, {change}"] = ratio["median"]
    for clients in [2] if args.smoke else [8, 32]:
        load = Load(clients, shape=args.shape, device=args.device)
        row = fisher(load, args.repeats, samples=3 if args.smoke else 30, memory=args.memory)
        rows.append(row)
        for name, ratio in row["ratio to engine"].items():
            ratios[f"{name}, {clients} clients, per-sample gradients"] = ratio["median"]
    name = "-".join(["engine", *([args.shape] if args.shape != "lab" else []), *(["smoke"] if args.smoke else [])])
    name += "" if args.device == "cpu" else f"-{args.device.split(':')[0]}"
    options = {key: value for key, value in vars(args).items() if key != "out"}
    write(args.out or HERE / f"{name}.json", options, rows, ratios)


if __name__ == "__main__":
    main()
