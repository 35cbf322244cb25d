"""Accuracy and mixing weight against ε: federated, merged and local models when what travels is private.

    python benchmarks/privacy.py
    python benchmarks/privacy.py --smoke      # its figures mean nothing

Thirty-two clients of 100 images, FFA-LoRA (only B and the head are sent), all clients in all 6 rounds; δ = 0.01. The
clip is the median norm of a client's change in the first round of seed 100, which no row uses. The weight that the
default estimator finds is compared with what theory predicts from the models without noise: the noise adds up over the
rounds and enters only the moment ``a``, and the weight is the closed form's. Writes ``privacy.csv``, ``privacy.json``
and ``privacy.png``.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from pages import facts
from torch import Tensor

from potara_lite import Setting, estimate_calibrated, evaluate, merge_exact, prepare, repeat_adapter, run_algorithm
from potara_lite.adapters.lora import AdaptedBackbone
from potara_lite.adapters.state import Adapter, client_adapter, delta, flatten
from potara_lite.baselines.algorithms import FFA
from potara_lite.baselines.privacy import Privacy, noise_moment, noise_multiplier_for, with_noise
from potara_lite.baselines.rounds import client_step
from potara_lite.estimators import estimate_gauss_newton
from potara_lite.estimators.gauss_newton import example_mean
from potara_lite.experiment import train_local, training_options
from potara_lite.federation.split import Federation
from potara_lite.training.gradients import directional_derivatives

HERE = Path(__file__).parent
SETTING = Setting(clients=32, train_size=100, test_size=50, rounds=6, round_steps=10, local_steps=60)
EPSILONS = (math.inf, 32.0, 8.0, 2.0)
SEEDS, DELTA = range(2), 0.01
MODELS = "federated", "merged", "local"


def median_change(setting: Setting, seed: int = 100) -> float:
    """The median norm of what clients change in the first round."""
    adapted, federation = prepare(setting, seed)
    stack = repeat_adapter(adapted.initial, len(federation))
    options = training_options(setting) | dict(number=0, local_steps=setting.round_steps, seed=seed)
    after, _, _ = client_step(FFA, adapted, federation.train, stack, FFA.new_optimizers(stack), **options)
    return float((flatten(FFA.upload(after)) - flatten(FFA.upload(stack))).norm(dim=1).median())


def noise_curvature(
    adapted: AdaptedBackbone, federated: Adapter, federation: Federation, std: float, seed: int
) -> Tensor:
    """``E[nᵀ H n]`` of noise on what FFA uploads, in nats, by the Gauss–Newton ``H`` on the calibration samples: a draw
    for every client, averaged over all."""
    generator = torch.Generator().manual_seed(seed)
    noise = {
        name: std * torch.randn(t.shape, generator=generator) * FFA.is_uploaded(name) for name, t in federated.items()
    }
    _, curvature = directional_derivatives(adapted, federated, flatten(noise), federation.calibration)
    return example_mean(curvature, federation.calibration).mean()


def measure(setting: Setting, seed: int, clip: float, epsilons: tuple[float, ...]) -> pd.DataFrame:
    """A row per ε: accuracy and loss of the three models, the weight, and the noise's moment, found and predicted."""
    adapted, federation = prepare(setting, seed)
    start = repeat_adapter(adapted.initial, len(federation))
    trained, _, _ = train_local(adapted, start, federation, setting, seed)
    local = trained.adapters
    options = training_options(setting) | dict(rounds=setting.rounds, local_steps=setting.round_steps, seed=seed)
    rows, plain = [], None
    for epsilon in epsilons:
        privacy = Privacy(clip, noise_multiplier_for(epsilon, setting.rounds, DELTA), seed)
        federated = run_algorithm(replace(FFA, privacy=privacy), adapted, federation.train, **options).personal
        estimate = estimate_calibrated(adapted, federated, local, federation.calibration)
        models = federated, merge_exact(federated, local, estimate.weight), local
        if plain is None:
            plain, moments = federated, estimate_gauss_newton(adapted, federated, local, federation.calibration).moments
        std = privacy.noise_std(setting.clients) * math.sqrt(setting.rounds)
        one, other = (delta(client_adapter(stack, 0), adapted.scaling) for stack in (federated, plain))
        row = {
            "seed": seed,
            "epsilon": epsilon,
            "noise_multiplier": privacy.noise_multiplier,
            "weight": float(estimate.client_weight.mean()),
            "weight_predicted": float(
                with_noise(moments, noise_curvature(adapted, plain, federation, std, seed)).weight.mean()
            ),
            "moment": sum(float((one[name] - other[name]).double().square().sum()) for name in one),
            "moment_predicted": noise_moment(client_adapter(plain, 0), adapted.scaling, std, FFA.is_uploaded),
        }
        for name, model in zip(MODELS, models):
            loss, accuracy = evaluate(adapted, model, federation.test)
            row |= {f"{name}_accuracy": float(accuracy.mean()), f"{name}_loss": float(loss.mean())}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The page's table: a line per ε, means over the seeds."""
    mean = rows.groupby("epsilon").mean().sort_index(ascending=False)
    error = rows.groupby("epsilon")[[f"{name}_accuracy" for name in MODELS]].sem()
    columns = {f"{name}": mean[f"{name}_accuracy"] for name in MODELS}
    columns["± (largest)"] = error.max(axis=1)
    columns |= {"λ found": mean.weight, "λ predicted": mean.weight_predicted}
    columns["v found / predicted"] = mean.moment / mean.moment_predicted
    found = pd.DataFrame(columns).reindex(mean.index)
    return found.set_axis(pd.Index([shown(epsilon) for epsilon in found.index], name="ε"))


def shown(epsilon: float) -> str:
    return "no noise" if math.isinf(epsilon) else f"{epsilon:g}"


def figure(rows: pd.DataFrame) -> plt.Figure:
    """Accuracy and weight against ε, with the standard error over the seeds."""
    table = rows.groupby("epsilon").agg(["mean", "sem"]).sort_index(ascending=False)
    positions = list(range(len(table)))
    labels = [shown(epsilon) for epsilon in table.index]
    picture, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in MODELS:
        column = table[f"{name}_accuracy"]
        axes[0].errorbar(positions, column["mean"], column["sem"], marker="o", capsize=3, label=name)
    for column, label in (("weight", "found on held-out samples"), ("weight_predicted", "predicted from the noise")):
        axes[1].errorbar(positions, table[column]["mean"], table[column]["sem"], marker="o", capsize=3, label=label)
    for ax, title in zip(axes, ("accuracy", "mixing weight λ, on the federated model")):
        ax.set(xticks=positions, xticklabels=labels, xlabel="ε (more private to the right)", ylabel=title)
        ax.legend()
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    setting, seeds, epsilons = SETTING, SEEDS, EPSILONS
    if args.smoke:
        setting = replace(SETTING, clients=4, train_size=16, test_size=20, rounds=2, round_steps=2, local_steps=4)
        seeds, epsilons = range(2), (math.inf, 4.0)
    clip = median_change(setting)
    rows = pd.concat([measure(setting, seed, clip, epsilons) for seed in seeds], ignore_index=True)
    if args.smoke:
        return
    rows.to_csv(HERE / "privacy.csv", index=False, float_format="%.6g")
    facts_of_run = {"setting": asdict(setting), "clip": clip, "delta": DELTA} | facts()
    (HERE / "privacy.json").write_text(json.dumps(facts_of_run, indent=1) + "\n")
    figure(rows).savefig(HERE / "privacy.png", dpi=110)


if __name__ == "__main__":
    main()
