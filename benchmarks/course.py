"""The rows that notebook 04 reads: estimates of λ over heterogeneity and over local steps.

    python benchmarks/course.py    # course.csv; what is finished stays in course/ and is not recomputed

A result file has one ``alpha`` of the default setting and one seed: one federated model, and local models of one or
several lengths (``lengths_of``); each longer training continues the shorter one. A row of the table is a client with a
local model of one length: the ``curve`` of its test loss (nats) along λ, and the ``weight`` λ and the ``loss`` on test
data of each method. The curve is a cubic spline through 9 points, the oracle its lowest of 101: a reference that no
method may use. ``train_loss`` is the local model's on its training examples; ``fisher`` is the trace of a model's
empirical Fisher, the mean squared length of a sample's gradient, on training and on calibration ("held") examples.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from potara_lite import Setting, evaluate, fedit, merge_exact, per_sample_gradients, prepare, repeat_adapter, train
from potara_lite.adapters.lora import AdaptedBackbone
from potara_lite.adapters.state import Adapter
from potara_lite.estimators import (
    estimate_calibrated,
    estimate_curve,
    estimate_pooled,
    fisher_moments,
    gradient_moments,
)
from potara_lite.federation.split import Federation
from potara_lite.merging.connectivity import along_segment, weight_grid

HERE = Path(__file__).parent
RESULTS = HERE / "course"
SETTING = Setting()
ALPHAS = (0.5, 0.1, 2.0, float("inf"))
SEEDS = range(5)
LENGTHS = {0.5: (25, 50, 100, 200, 400), 0.1: (25, 100, 400)}  # of the first three seeds; elsewhere the default's
POINTS = 9
FINE = np.linspace(0, 1, 101)


def lengths_of(alpha: float, seed: int) -> tuple[int, ...]:
    """The local steps at which the local models are scored."""
    return LENGTHS.get(alpha, (SETTING.local_steps,)) if seed < 3 else (SETTING.local_steps,)


def measure(alpha: float, seed: int) -> pd.DataFrame:
    """All lengths of one federation: a row per length and client."""
    setting = replace(SETTING, alpha=alpha)
    adapted, federation = prepare(setting, seed)
    options = dict(lr=setting.lr, batch_size=setting.batch_size)
    lengths = dict(rounds=setting.rounds, local_steps=setting.round_steps)
    shared = fedit(adapted, federation.train, seed=seed, **lengths, **options).adapter
    federated, local = (repeat_adapter(adapter, len(federation)) for adapter in (shared, adapted.initial))
    state, done, rows = None, 0, []
    for steps in lengths_of(alpha, seed):
        more = dict(steps=steps - done, start=done, state=state, seed=(seed, 1), **options)
        part = train(adapted, local, federation.train, **more)
        local, state, done = part.adapters, part.state, steps
        index = dict(alpha=alpha, local_steps=steps, seed=seed, client=range(len(federation)))
        rows.append(pd.DataFrame(index | judge(adapted, federated, local, federation)))
    return pd.concat(rows, ignore_index=True)


def judge(
    adapted: AdaptedBackbone, federated: Adapter, local: Adapter, federation: Federation
) -> dict[str, np.ndarray]:
    """The columns of one pair of models, ``(C,)`` each."""
    points = weight_grid(POINTS)
    curve = along_segment(adapted, federated, local, federation.test, points)[0].double().numpy()  # (C, W)
    spline, clients = CubicSpline(points.double().numpy(), curve, axis=1), np.arange(len(federation))
    gradients = {
        name: [per_sample_gradients(adapted, model, split).double() for model in (federated, local)]
        for name, split in (("train", federation.train), ("held", federation.calibration))
    }
    calibrated = estimate_calibrated(adapted, federated, local, federation.calibration)
    weights = {
        "federated": torch.ones(len(federation)),
        "local": torch.zeros(len(federation)),
        "oracle": torch.from_numpy(FINE[spline(FINE).argmin(1)]),
        **weights_of(gradients, federation),
        "own": estimate_curve(adapted, federated, local, federation.calibration).weight,
        "pooled": estimate_pooled(adapted, federated, local, federation.calibration).weight,
    }
    columns = {"train_loss": evaluate(adapted, local, federation.train)[0].numpy()}
    for name, pair in gradients.items():
        sizes = (federation.train if name == "train" else federation.calibration).sizes
        columns |= {f"fisher_{model}_{name}": (g.square().sum((1, 2)) / sizes).numpy()
                    for model, g in zip(("federated", "local"), pair)}  # fmt: skip
    for name, weight in weights.items():
        columns |= {f"weight_{name}": weight.numpy(), f"loss_{name}": spline(weight.numpy())[clients, clients]}
    merged = merge_exact(federated, local, calibrated.weight)  # head and body apart: it leaves the segment
    columns |= {"weight_calibrated": calibrated.client_weight.numpy()}
    columns |= {"loss_calibrated": evaluate(adapted, merged, federation.test)[0].numpy()}
    return columns | {f"curve_{weight:.3f}": curve[:, i] for i, weight in enumerate(points.tolist())}


def weights_of(gradients: dict[str, list[Tensor]], federation: Federation) -> dict[str, Tensor]:
    """λ = ½, and the closed form on moments of the per-sample gradients ``(C, N, P)`` of both models."""
    train, held = federation.train.sizes, federation.calibration.sizes
    tiny = dict(damping=1e-8, relative=False)
    moments = {
        "paper_undamped": fisher_moments(*gradients["train"], train, **tiny),
        "paper": fisher_moments(*gradients["train"], train),  # damping: a tenth of the mean Fisher
        "paper_held": fisher_moments(*gradients["held"], held),
        "gradient": gradient_moments(*gradients["train"], train),
    }
    return {"uniform": torch.full((len(federation),), 0.5)} | {name: found.weight for name, found in moments.items()}


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    paths = {(alpha, seed): RESULTS / f"alpha{alpha:g}-seed{seed}.csv" for seed in SEEDS for alpha in ALPHAS}
    for (alpha, seed), path in paths.items():
        if path.exists():
            continue
        began = time.perf_counter()
        partial = path.with_suffix(".part")
        measure(alpha, seed).to_csv(partial, index=False, float_format="%.5g")
        partial.replace(path)
        print(f"{path.stem}: {time.perf_counter() - began:.0f} s", flush=True)
    rows = pd.concat([pd.read_csv(path) for path in paths.values()], ignore_index=True)
    order = ["alpha", "local_steps", "seed", "client"]
    rows.sort_values(order).to_csv(HERE / "course.csv", index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
