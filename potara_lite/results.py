"""Results as tidy tables: a row per method, seed and client; means over seeds, paired differences, the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from pydantic import AfterValidator
from scipy import stats

from .checks import Flag, Named, Seeds, checked, shown, table
from .experiment import MODEL_PAIR_METHODS, ORACLE, AnyMethod, Prepare, Result, Run, prepare, run_methods
from .federation.split import Split
from .files import FileError, data_path, reading
from .setting import Setting

COLUMNS = ["method", "seed", "client", "accuracy", "loss", "weight", "bytes_up", "bytes_down", "steps", "seconds"]
NUMBERS = (*COLUMNS[3:], "union_accuracy")


def rows_with(*columns: str) -> AfterValidator:
    """In an annotation of a data frame: rows of results with these columns, no method, seed and client twice, and every
    accuracy and loss a number."""

    def check(rows: pd.DataFrame) -> pd.DataFrame:
        table("method", "seed", *columns).func(rows)
        keys = [name for name in ("federation", "method", "seed", "client") if name in rows]
        if "client" in keys and (is_repeated := rows.duplicated(keys)).any():
            first = rows.loc[is_repeated, ["method", "seed", "client"]].iloc[0].tolist()
            raise ValueError(f"must have every method, seed and client once, unlike {first}")
        for column in (name for name in columns if name in NUMBERS):
            try:
                missing = int((~np.isfinite(rows[column].astype(float))).sum())
            except (ValueError, TypeError):
                raise ValueError(f"must have numbers in the column {column!r}") from None
            if missing and column in ("accuracy", "loss"):
                raise ValueError(f"must have a number in every {column}, but {missing} are missing")
        return rows

    return AfterValidator(check)


@checked
def result_rows(method: str, run: Run, result: Result, split: Split | None = None) -> pd.DataFrame:
    """A row per client in the order of ``COLUMNS``: accuracy and loss (nats) on ``split``, by default the test split;
    the mixing weight on the federated model, where there is one; what the client paid. ``client`` is its name, or its
    row."""
    loss, accuracy = result.evaluate(run.federation.test if split is None else split, run.setting.chunk_size)
    columns = {
        "accuracy": accuracy,
        "loss": loss,
        "weight": torch.full_like(loss, torch.nan) if result.weight is None else result.weight,
        "bytes_up": result.ledger.up,
        "bytes_down": result.ledger.down,
        "steps": result.ledger.steps,
    }
    frame = pd.DataFrame({name: tensor.cpu().numpy() for name, tensor in columns.items()})
    clients = run.federation.client_names or range(len(frame))
    frame = frame.assign(method=method, seed=run.seed, client=clients, seconds=round(result.seconds, 3))
    return frame[COLUMNS]


@checked
def compare(
    setting: Setting,
    seeds: Seeds = (0,),
    methods: Named[AnyMethod] = MODEL_PAIR_METHODS,
    *,
    prepare: Prepare = prepare,
    progress: Flag = False,
) -> pd.DataFrame:
    """The rows of every method on every seed of one setting.

    ``methods``: functions of a ``Run``, algorithms, or estimators, by name (``as_method``). ``prepare``: the backbone
    and the federation of a setting and seed; with your own, the setting says how they are trained.

    >>> tiny = Setting(clients=2, train_size=8, calibration_size=4, test_size=8, rounds=1, round_steps=1, local_steps=1)
    >>> rows = compare(tiny, methods={name: MODEL_PAIR_METHODS[name] for name in ("federated", "local")})
    >>> rows.weight.tolist(), rows.steps.tolist()
    ([1.0, 1.0, 0.0, 0.0], [1, 1, 1, 1])
    """
    found = run_methods(setting, seeds, methods, prepare=prepare, progress=progress)
    return pd.concat([result_rows(*one) for one in found], ignore_index=True)


def _keys(rows: pd.DataFrame) -> list[str]:
    """What a line of a table stands for: a method, or a federation's method where the rows have federations."""
    return ["federation", "method"] if "federation" in rows else ["method"]


@checked
def summary(rows: Annotated[pd.DataFrame, rows_with(*COLUMNS[2:])]) -> pd.DataFrame:
    """One line per method (and federation): means over clients and seeds, standard errors over seeds, the costs.

    ``accuracy`` and ``loss`` (nats) are means over clients, then over seeds, ``±`` their standard errors over seeds
    (NaN for one seed); ``worst`` is the lowest client accuracy of each seed, averaged; ``bytes`` are up plus down per
    client.
    """
    rows = rows.assign(bytes=rows.bytes_up + rows.bytes_down)
    seeds = rows.groupby([*_keys(rows), "seed"], sort=False)
    by_seed = seeds[["accuracy", "loss", "weight", "bytes", "steps", "seconds"]].mean()
    by_seed["worst"] = seeds.accuracy.min()
    methods = by_seed.groupby(_keys(rows), sort=False)
    lines = methods.mean()
    lines["±"] = methods.accuracy.sem()
    lines["± loss"] = methods.loss.sem()
    return lines[["accuracy", "±", "worst", "loss", "± loss", "weight", "bytes", "steps", "seconds"]]


@checked
def leaderboard(
    rows: Annotated[pd.DataFrame, rows_with("federation", "client", "accuracy", "loss", "union_accuracy")],
    local: str = "local",
) -> pd.DataFrame:
    """One line per federation and method, the most accurate first within each federation: ``summary`` and more.

    ``bottom``: mean accuracy of the lowest tenth of all clients of all seeds; ``better``: the share of clients that are
    more accurate than with the method ``local`` on the same seed (NaN where the rows have none of it); ``union``:
    accuracy on the union of the clients' examples.
    """
    client = ["federation", "seed", "client"]
    alone = rows[rows.method == local].set_index(client).accuracy
    alone = alone.reindex(pd.MultiIndex.from_frame(rows[client])).to_numpy()
    better = (rows.accuracy > alone).where(~pd.isna(alone)).astype(float)
    methods = rows.assign(better=better).groupby(_keys(rows), sort=False)
    lines = summary(rows)
    lines["bottom"] = methods.accuracy.apply(lambda a: a.nsmallest(max(1, round(len(a) / 10))).mean())
    lines["better"] = methods.better.mean()
    lines["union"] = methods.union_accuracy.mean()
    lines = lines[["accuracy", "±", "worst", "bottom", "better", "union", "loss", "bytes", "steps", "seconds"]]
    lines = lines.round(9)  # the last digits depend on who sums, and would decide between methods that are equal
    federations = dict.fromkeys(rows.federation)
    parts = [lines.loc[[name]].sort_values("accuracy", ascending=False, kind="stable") for name in federations]
    return pd.concat(parts)


@checked
def pareto_front(
    board: Annotated[pd.DataFrame, table("accuracy", "bytes")], references: list[str] | tuple[str, ...] = (ORACLE,)
) -> pd.Series:
    """Which lines of a leaderboard no other of the same federation beats: none is as accurate for fewer bytes, or more
    accurate for as many. ``references``, on test data, do not count and are never on the front themselves."""
    if "method" not in board.index.names or board.index.has_duplicates:
        raise ValueError("board must have a line for each federation and method, as leaderboard makes them")
    is_method = ~board.index.get_level_values("method").isin(references)
    result = pd.Series(False, index=board.index)
    for line in board.index[is_method]:
        one = board.loc[line]
        others = board[is_method & (board.index.get_level_values(0) == line[0])]
        as_good = (others["bytes"] <= one["bytes"]) & (others.accuracy >= one.accuracy)
        strictly = (others["bytes"] < one["bytes"]) | (others.accuracy > one.accuracy)
        result[line] = not (as_good & strictly).any()
    return result


@checked
def paired_differences(
    rows: Annotated[pd.DataFrame, rows_with("client", "accuracy", "loss")],
    method: str = "potara-calibrated",
    score: str = "accuracy",
) -> pd.DataFrame:
    """``method`` minus each other method, paired by seed, one line per (federation and) other method.

    ``difference`` of the mean client ``score``, ``±`` its standard error over seeds, ``p`` of a two-sided paired
    t-test over the seeds, and ``p (Holm)``, corrected for the number of other methods (Holm, 1979).
    """
    for name, one, known in (("score", score, rows), ("method", method, set(rows.method))):
        if one not in known:
            raise ValueError(f"{name} must be one of {shown(sorted(known))}, not {one!r}")
    seeds = rows.groupby([*_keys(rows), "seed"], sort=False)[score].mean()
    parts = {name: seeds[name] for name in dict.fromkeys(rows.federation)} if "federation" in rows else {None: seeds}
    lines: list[list[float]] = []
    index: list = []
    for federation, means in parts.items():
        others = [name for name in dict.fromkeys(means.index.get_level_values("method")) if name != method]
        pairs = [(means[method] - means[name]).dropna() for name in others]
        p = [float(stats.ttest_1samp(d, 0.0).pvalue) if len(d) > 1 and d.std() > 0 else torch.nan for d in pairs]
        lines += [[d.mean(), d.sem(), value, corrected] for d, value, corrected in zip(pairs, p, holm(p))]
        index += others if federation is None else [(federation, name) for name in others]
    index = pd.Index(index, name="method") if None in parts else pd.MultiIndex.from_tuples(index, names=_keys(rows))
    return pd.DataFrame(lines, index=index, columns=["difference", "±", "p", "p (Holm)"])


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of several p-values (Holm, 1979); NaN stays NaN and does not count."""
    in_order = sorted((value, i) for i, value in enumerate(p) if value == value)
    corrected, largest = list(p), 0.0
    for smaller, (value, i) in enumerate(in_order):
        largest = max(largest, min(1.0, value * (len(in_order) - smaller)))
        corrected[i] = largest
    return corrected


@checked
def committed_rows(name: str) -> pd.DataFrame:
    """The table ``name``, such as ``"bound.csv"``: from an installed wheel, or from ``benchmarks/`` of a checkout.

    Raises ``FileError`` (a ``ValueError``) when neither has it, or when it is damaged.

    >>> sorted(committed_rows("bound.csv").regime.unique())
    ['default', 'over-fitted']
    """
    path = data_path(name, "benchmarks")
    if not path.is_file():
        raise FileError(f"{name} is missing: it is neither in the installed package nor in a checkout's benchmarks/")
    with reading(path):
        return pd.read_csv(path)
