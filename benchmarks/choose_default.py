"""How the default federation was chosen: on calibration samples of seeds 100 to 102, never on test data.

    python benchmarks/choose_default.py

A default that teaches something about merging has a federated and a local model that are about equally good. For each
learning rate this trains both, stops at several lengths, and measures them on the 30 calibration samples of each
client (720 samples over the three seeds). It considers settings of at most 450 optimiser steps in all (the
command's time budget) whose two accuracies are within 0.03 of each other. Of those whose mean of the two is within one
standard error of the best (Breiman et al., 1984), the default is the one of the fewest steps; ties go to the higher
mean. Writes ``choose_default.csv``; a test compares the defaults of ``Setting`` with it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from potara_lite import Setting, evaluate, fedit, prepare, repeat_adapter, train

SEEDS = (100, 101, 102)
RATES = (1e-3, 2e-3, 4e-3)
ROUNDS = (20, 40, 60)
STEPS = (50, 100, 150, 200)


def measure(setting: Setting, seed: int) -> list[dict]:
    adapted, federation = prepare(setting, seed)
    clients, rows = len(federation), []
    options = dict(lr=setting.lr, batch_size=setting.batch_size)

    def record(kind: str, length: int, stack) -> None:
        loss, accuracy = evaluate(adapted, stack, federation.calibration)
        scores = dict(loss=loss.mean().item(), accuracy=accuracy.mean().item())
        rows.append(dict(lr=setting.lr, seed=seed, kind=kind, length=length, **scores))

    adapter, state, done = adapted.initial, None, 0
    for rounds in ROUNDS:
        going_on = dict(adapter=adapter, state=state, start=done, seed=seed, **options)
        part = fedit(adapted, federation.train, rounds=rounds - done, local_steps=setting.round_steps, **going_on)
        adapter, state, done = part.adapter, part.state, rounds
        record("federated", rounds, repeat_adapter(adapter, clients))
    stack, state, done = repeat_adapter(adapted.initial, clients), None, 0
    for steps in STEPS:
        part = train(
            adapted, stack, federation.train, steps=steps - done, start=done, state=state, seed=(seed, 1), **options
        )
        stack, state, done = part.adapters, part.state, steps
        record("local", steps, stack)
    return rows


def admitted(table: pd.DataFrame) -> pd.DataFrame:
    """The settings that are considered, the best one first."""
    mean = table.groupby(["kind", "lr", "length"])[["accuracy", "loss"]].mean()
    federated = mean.loc["federated"].reset_index().rename(columns={"length": "rounds"})
    local = mean.loc["local"].reset_index().rename(columns={"length": "steps"})
    pairs = federated.merge(local, on="lr", suffixes=("_federated", "_local"))
    pairs["total"] = pairs.rounds * Setting().round_steps + pairs.steps
    pairs["gap"] = (pairs.accuracy_federated - pairs.accuracy_local).abs()
    pairs["mean"] = (pairs.accuracy_federated + pairs.accuracy_local) / 2
    pairs = pairs[(pairs.total <= 450) & (pairs.gap <= 0.03)].copy()
    best, samples = pairs["mean"].max(), len(SEEDS) * Setting().clients * Setting().calibration_size
    pairs["close"] = pairs["mean"] >= best - (best * (1 - best) / samples) ** 0.5
    return pairs.sort_values(["close", "total", "mean"], ascending=[False, True, False])


def main() -> None:
    rows = [row for lr in RATES for seed in SEEDS for row in measure(replace(Setting(), lr=lr), seed)]
    table = pd.DataFrame(rows)
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False)
    print(table.groupby(["kind", "lr", "length"])[["accuracy", "loss"]].mean().round(3).to_string())
    print(admitted(table).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
