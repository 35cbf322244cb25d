"""What the engine's benchmarks share: the clients, one client's plain training code, and paired timing."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pages import facts
from torch import Tensor
from torch.nn import functional as F

from potara_lite import AdaptedBackbone, Split, attach, lab_vit
from potara_lite.files import check_file, data_path
from potara_lite.models.vit import LabViT

HERE = Path(__file__).parent
LR = 2e-3


@dataclass(frozen=True)
class Load:
    """Clients of 32 to 64 examples each. ``lab``: the lab ViT on Fashion-MNIST, or a random one of another ``depth``;
    ``vit-b-16``: a random network of the shape of ViT-B/16 on random tokens. Every contestant gets tokens, so none pays
    for the frozen prefix."""

    clients: int
    batch_size: int = 8
    steps: int = 50
    shape: str = "lab"
    device: str = "cpu"
    rank: int = 4
    depth: int = 4


@lru_cache(maxsize=1)
def make(load: Load) -> tuple[AdaptedBackbone, Split]:
    """The backbone with LoRA on every layer, and the clients' training examples as tokens."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(32, 65, load.clients)
    if load.shape == "lab":
        torch.manual_seed(0)
        backbone = lab_vit() if load.depth == 4 else LabViT(depth=load.depth).eval()
        with np.load(check_file(data_path("fashion_mnist.npz")), allow_pickle=False) as file:
            images, labels = file["train_images"], file["train_labels"].astype(np.int64)
        picks = [rng.integers(len(labels), size=n) for n in sizes]
        examples = [
            (torch.from_numpy(images[pick]).unsqueeze(1) / 255, torch.from_numpy(labels[pick])) for pick in picks
        ]
    elif load.shape == "vit-b-16":
        torch.manual_seed(0)
        backbone = LabViT(classes=10, dim=768, depth=12, heads=12, mlp_ratio=4)
        examples = [(torch.randn(n, 196, 768), torch.randint(10, (n,))) for n in sizes // 4]
    else:
        raise ValueError(f"shape must be 'lab' or 'vit-b-16', not {load.shape!r}")
    split = Split(examples)
    split = split.map(backbone.embed) if load.shape == "lab" else split
    return attach(backbone, rank=load.rank).to(load.device), split.to(load.device)


def client_steps(model: torch.nn.Module, weights: list[Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> list:
    """One client's local training as one would write it: a fresh AdamW, then forward, backward, step."""
    optimizer, curve = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0), []
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return curve


def apart(one: Tensor, two: Tensor, tolerance: float) -> float:
    """The largest difference of two results, which must be within ``tolerance`` before anything is timed."""
    difference = float((one - two).abs().max())
    if not difference <= tolerance:
        raise SystemExit(f"the contestants disagree by {difference}, more than {tolerance}: nothing is timed")
    return difference


def paired(
    contestants: dict[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each repetition; every second repetition runs them in the opposite order."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats):
        for name in list(contestants)[:: -1 if repeat % 2 else 1]:
            synchronize(device)
            began = clock()
            contestants[name]()
            synchronize(device)
            seconds[name].append(clock() - began)
    return seconds


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def compared(seconds: dict[str, list[float]], fast: str) -> dict:
    """Median, least and most seconds of each contestant, and the same of its ratio to ``fast``, paired."""

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "least": min(values), "most": max(values)}

    ratios = {n: spread([a / b for a, b in zip(s, seconds[fast])]) for n, s in seconds.items() if n != fast}
    return {"seconds": {name: spread(values) for name, values in seconds.items()}, f"ratio to {fast}": ratios}


def write(path: Path, options: dict, rows: list[dict], ratios: dict[str, float], **versions: str) -> None:
    """The rows, options, versions and threads as JSON in ``path``; the ratios as one line of JSON on stdout."""
    result = {"options": options, **facts(**versions), "ratios": ratios, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"benchmark": path.stem, "ratios": {name: round(r, 3) for name, r in ratios.items()}}))


def table() -> str:
    """The ratios of the engine's JSON files as Markdown: median, least and most."""
    lines = ["| work | clients | batch | against | times the engine's seconds |", "| --- | --- | --- | --- | --- |"]
    for name in ("engine", "engine_flower", "engine_compile"):
        for row in json.loads((HERE / f"{name}.json").read_text())["rows"]:
            for other, ratio in row["ratio to engine"].items():
                spread = f"{ratio['median']:.2f} ({ratio['least']:.2f}–{ratio['most']:.2f})"
                batch = f"{row['samples']} samples" if "samples" in row else row["batch_size"]
                lines.append(f"| {row.get('what', 'training')} | {row['clients']} | {batch} | {other} | {spread} |")
    return "\n".join(lines)


def measured_rows(name: str = "engine") -> list[dict]:
    return json.loads((HERE / f"{name}.json").read_text())["rows"]


def usual(row: dict) -> bool:
    """Whether a row is of training with the usual rank and depth."""
    return row["what"] == "training" and (row["rank"], row["depth"]) == (Load.rank, Load.depth)


def ratios_of(clients: int, batch_size: int = 8) -> dict[str, float]:
    """The median ratios to the engine's seconds of a row of training."""
    sizes = clients, batch_size
    row = next(row for row in measured_rows() if usual(row) and (row["clients"], row["batch_size"]) == sizes)
    return {name: ratio["median"] for name, ratio in row["ratio to engine"].items()}


def grid(number: Callable[[dict], float]) -> pd.DataFrame:
    """A number of each row's ratios, by clients and batch."""
    rows = [
        (row["clients"], f"batch {row['batch_size']}", number(row["ratio to engine"]))
        for row in measured_rows()
        if usual(row)
    ]
    table = pd.DataFrame(rows, columns=["clients", "batch", "ratio"])
    return table.groupby(["clients", "batch"], sort=False).ratio.first().unstack()


def others() -> pd.DataFrame:
    """Seconds of other programs over those of the engine, which does what they do."""
    programs = {f"{name}, training": ratio for name, ratio in ratios_of(32).items() if name == "pfllib-style"}
    flower = measured_rows("engine_flower")[0]["ratio to engine"]
    programs |= {f"{name}, training": ratio["median"] for name, ratio in flower.items()}
    for row in measured_rows("language_engine"):
        blocks = "all blocks" if row["blocks"] == "all" else f"the last {row['blocks']} blocks"
        programs[f"loop, MiniLM with LoRA in {blocks}"] = row["ratio to engine"]["sequential"]["median"]
    for row in measured_rows():
        if row["what"] != "training":
            found = row["ratio to engine"].items()
            programs |= {f"{name}, gradients of {row['clients']} clients": ratio["median"] for name, ratio in found}
    return pd.DataFrame({"times the engine's seconds": programs}).rename_axis("program")


def sizes() -> pd.DataFrame:
    """The loop's seconds over the engine's, by rank and depth."""
    rows = [row for row in measured_rows() if (row["what"], row["clients"], row["batch_size"]) == ("training", 8, 8)]
    rows.sort(key=lambda row: (row["depth"], row["rank"]))
    steps = [1000 * row["seconds"]["engine"]["median"] / row["steps"] for row in rows]
    loops = [row["ratio to engine"]["sequential"]["median"] for row in rows]
    names = [f"rank {row['rank']}, {row['depth']} blocks" for row in rows]
    return pd.DataFrame({"engine, ms per step": steps, "loop / engine": loops}, index=names)
