"""The predicted bound against the measured loss along λ, with moments from repeated training.

    python benchmarks/bound.py

Each client has 1,000 examples. Its reference θ* is trained on all of them with a falling learning rate; the federation
is trained over and over, every time on 100 others of each client's examples, once with local models of the default
length and once with over-fitted ones. ``estimate_ensemble`` gives the moments of the errors about θ*: in the metric of
the loss (Gauss–Newton at θ*, no free constant) and in the identity metric on the deltas (the paper's; β is the largest
curvature met along any error). Writes ``bound.csv``, a row per regime, client and λ, and a figure for each regime.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from potara_lite import (
    Moments,
    Setting,
    evaluate,
    fedit,
    merge_exact,
    plots,
    prepare,
    repeat_adapter,
    train,
    weight_grid,
)
from potara_lite.estimators import estimate_ensemble
from potara_lite.federation.split import Split

HERE = Path(__file__).parent
SEED, RUNS, POOL = 0, 8, 1000
ANNEALED = {1.0: 200, 0.25: 150, 0.05: 100}  # the reference's learning rates, as shares of the usual one, and steps
LOCAL = {"default": 100, "over-fitted": 300}


def resampled(split: Split, size: int, seed: int) -> Split:
    """``size`` examples of every client, drawn without replacement."""
    rows = [torch.from_numpy(np.random.default_rng([seed, i]).permutation(n)[:size])
            for i, n in zip(split.ids, split.sizes.tolist())]  # fmt: skip
    return Split([tuple(part[rows[i]] for part in split.client(i)) for i in range(len(split))], ids=split.ids)


def measure(runs: int = RUNS, pool: int = POOL, setting: Setting | None = None) -> pd.DataFrame:
    """The curves: a row per regime, client and weight."""
    setting = Setting() if setting is None else setting
    adapted, federation = prepare(replace(setting, train_size=pool), SEED)
    clients, options = len(federation), dict(lr=setting.lr, batch_size=setting.batch_size)
    initial = repeat_adapter(adapted.initial, clients)
    optimum, state, done = initial, None, 0
    for share, steps in ANNEALED.items():
        slower = options | dict(lr=share * setting.lr, steps=steps, start=done, state=state, seed=(SEED, 2))
        part = train(adapted, optimum, federation.train, **slower)
        optimum, state, done = part.adapters, part.state, done + steps
    pairs = {regime: [] for regime in LOCAL}
    for run in range(runs):
        few = resampled(federation.train, setting.train_size, run)
        lengths = dict(rounds=setting.rounds, local_steps=setting.round_steps, seed=run)
        general = repeat_adapter(fedit(adapted, few, **lengths, **options).adapter, clients)
        stack, state, done = initial, None, 0
        for regime, length in LOCAL.items():
            more = dict(steps=length - done, start=done, state=state, seed=(run, 1), **options)
            part = train(adapted, stack, few, **more)
            stack, state, done = part.adapters, part.state, length
            pairs[regime].append((general, stack))
    weights, rows = weight_grid(11), []
    least, _ = evaluate(adapted, optimum, federation.test)
    for regime, models in pairs.items():
        losses = [[evaluate(adapted, merge_exact(*pair, w), federation.test)[0] for w in weights.tolist()]
                  for pair in models]  # fmt: skip
        measured = torch.stack([torch.stack(each, dim=1) for each in losses])  # (runs, C, W)
        found = estimate_ensemble(adapted, models, optimum, federation.test)
        plain, beta = Moments(*found.details["deltas"]), found.details["smoothness"]

        def bounds(moments: Moments) -> torch.Tensor:
            return torch.stack([moments.bound(w) for w in weights.tolist()], dim=1) / 2

        columns = {
            "optimum": least.unsqueeze(1).expand(-1, len(weights)),
            "measured": measured.mean(0),
            "measured_sem": measured.std(0) / runs**0.5,
            "predicted": least.unsqueeze(1) + bounds(found.moments),
            "bound": least.unsqueeze(1) + beta.unsqueeze(1) * bounds(plain),
        }
        frame = pd.DataFrame({name: value.double().flatten().numpy() for name, value in columns.items()})
        frame.insert(0, "weight", weights.double().repeat(clients).numpy())
        frame.insert(0, "client", np.repeat(np.arange(clients), len(weights)))
        frame.insert(0, "regime", regime)
        slopes = {f"slope_{k}": found.details["slope"][:, j] for j, k in enumerate(("federated", "local"))}
        weight = {"weight_predicted": found.weight, "weight_bound": plain.weight}
        for name, value in (slopes | weight).items():
            frame[name] = value.double().repeat_interleave(len(weights)).numpy()
        rows.append(frame)
    return pd.concat(rows, ignore_index=True)


def figure(rows: pd.DataFrame, regime: str):
    """Measured loss (solid), prediction and bound, a panel per client."""
    some = rows[rows.regime == regime]
    weights = torch.tensor(sorted(some.weight.unique()))
    names = ("measured", "predicted", "bound")
    curves = {name: torch.tensor(some[name].to_numpy()).view(-1, len(weights)) for name in names}
    return plots.along_weight(weights, curves.pop("measured"), label=f"test loss (nats), {regime}", also=curves)


def main() -> None:
    rows = measure()
    rows.to_csv(HERE / "bound.csv", index=False, float_format="%.6g")
    for regime in LOCAL:
        figure(rows, regime).savefig(HERE / f"bound-{regime}.png", dpi=80)
    print(rows.groupby(["regime", "weight"])[["optimum", "measured", "predicted", "bound"]].mean().round(4).to_string())


if __name__ == "__main__":
    main()
