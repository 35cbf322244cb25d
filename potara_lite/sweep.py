"""Methods × federations × seeds → one tidy table, method by method on disk; and how such a table is read.

Every finished (federation, seed, method) is a CSV file of its own, put in place in one step: an interrupted sweep goes
on where it stopped, nothing finished is computed again, and a half-written file is never read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from scipy import stats
from tqdm.auto import tqdm

from .adapters import AdaptedBackbone
from .benchmark import ORACLE, Setting, prepare, write
from .data import Federation, Split
from .methods import Cell, Method
from .training import evaluate

__all__ = ["COLUMNS", "against", "efficient", "finished", "leaderboard", "sweep", "union"]

COLUMNS = ["federation", "method", "seed", "client", "accuracy", "loss", "union_accuracy", "union_loss", "weight",
           "bytes_up", "bytes_down", "steps", "seconds"]  # fmt: skip


def union(split: Split, each: int) -> Split:
    """The first ``each`` examples of every client, given to all of them: what a personalised model costs elsewhere."""
    clients = len(split)
    sizes = split.sizes.clamp_max(each)
    some = [(split.x[i, : int(n)], split.y[i, : int(n)]) for i, n in enumerate(sizes)]
    x, y = (torch.cat(parts) for parts in zip(*some))
    shared = (t.expand(clients, *t.shape) for t in (x, y))
    return Split(*shared, torch.full_like(split.sizes, len(y)), split.ids)


def sweep(
    methods: Mapping[str, Method],
    settings: Mapping[str, Setting],
    seeds: Sequence[int],
    folder: str | Path,
    *,
    judge: Callable[[Federation], Split] = lambda federation: federation.test,
    each: int = 25,
    prepare: Callable[[Setting, int], tuple[AdaptedBackbone, Federation]] = prepare,
    part: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> pd.DataFrame:
    """Run every method on every federation and seed that ``folder`` does not hold yet; all rows that it holds then.

    A row per client, in the order of ``COLUMNS``: accuracy and loss (nats) on the client's own examples and on the
    ``union`` of ``each`` examples of every client; the mixing weight, where there is one; what the client paid.
    ``judge`` picks the examples: the test split, or the calibration split to choose options by. ``part=(i, n)`` does
    every n-th pair of federation and seed from the i-th, to share the work between processes. The folder remembers the
    settings, not the methods: when a method changes, delete its files.

    Raises ``ValueError`` when the folder holds a federation of the same name and another setting, and for names that
    would share a file.

    A method of your own beside one of the field (LG-FedAvg shares the head and keeps the rest; arXiv 2001.01523):

    >>> import tempfile
    >>> from potara_lite.methods import METHODS, played
    >>> from potara_lite.rounds import Algorithm, is_head
    >>> mine = {"LG-FedAvg": played(Algorithm("LG-FedAvg", travels=is_head)), "local": METHODS["local"]}
    >>> tiny = Setting(clients=2, train_size=8, calibration_size=4, test_size=8, rounds=1, round_steps=1, local_steps=1)
    >>> rows = sweep(mine, {"tiny": tiny}, seeds=[0, 1], folder=tempfile.mkdtemp())
    >>> leaderboard(rows).loc["tiny", "bytes"].sort_index().tolist()
    [25800.0, 0.0]
    """
    folder, cells = Path(folder), [(name, seed) for name in settings for seed in seeds]
    for names in (methods, settings):
        if len({_slug(name) for name in names}) < len(names):
            raise ValueError(f"names must differ in letters or digits, unlike some of {list(names)}")
    for name, setting in settings.items():
        path, text = folder / _slug(name) / "setting.json", json.dumps(asdict(setting) | {"union": each}, indent=1)
        if path.is_file() and path.read_text() != text + "\n":
            raise ValueError(f"{path.parent} holds results of another setting; take another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, text + "\n")
    bar = tqdm(total=len(methods) * len(cells[part[0] :: part[1]]), disable=not progress, unit="run")
    for name, seed in cells[part[0] :: part[1]]:
        cell, place = None, folder / _slug(name) / f"seed-{seed}"
        place.mkdir(exist_ok=True)
        for method, function in methods.items():
            path = place / f"{_slug(method)}.csv"
            bar.set_description(f"{name}, seed {seed}, {method}")
            if not path.is_file():
                cell = cell or Cell(*prepare(settings[name], seed), settings[name], seed)
                write(path, _rows(name, method, function, cell, judge, each).to_csv(index=False))
            bar.update()
    bar.close()
    return finished(folder)


def finished(folder: str | Path) -> pd.DataFrame:
    """All rows that a sweep's folder holds, by federation, seed and method."""
    frames = [pd.read_csv(path) for path in sorted(Path(folder).glob("*/seed-*/*.csv"))]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)


def _slug(name: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-")


def _rows(federation: str, name: str, method: Method, cell: Cell, judge, each: int) -> pd.DataFrame:
    result, split = method(cell), judge(cell.federation)
    options = dict(chunk_size=cell.setting.chunk_size)
    loss, accuracy = evaluate(result.adapted, result.adapters, split, **options)
    union_loss, union_accuracy = evaluate(result.adapted, result.adapters, union(split, each), **options)
    weight = torch.full_like(loss, torch.nan) if result.weight is None else result.weight
    columns = {
        "accuracy": accuracy,
        "loss": loss,
        "union_accuracy": union_accuracy,
        "union_loss": union_loss,
        "weight": weight,
        "bytes_up": result.ledger.up,
        "bytes_down": result.ledger.down,
        "steps": result.ledger.steps,
    }
    frame = pd.DataFrame({column: tensor.cpu().numpy() for column, tensor in columns.items()})
    frame = frame.assign(federation=federation, method=name, seed=cell.seed, client=range(len(frame)))
    return frame.assign(seconds=round(result.seconds, 3))[COLUMNS]


def leaderboard(rows: pd.DataFrame, local: str = "local") -> pd.DataFrame:
    """One line per federation and method, the most accurate first within each federation.

    ``accuracy``: mean over clients, then over seeds, and ``±`` its standard error over seeds; ``worst``: each seed's
    lowest client, averaged; ``bottom``: the mean of the lowest tenth of all clients of all seeds; ``better``: the share
    of clients that are more accurate than with the method ``local`` on the same seed; ``union``: accuracy on the union
    of the clients' examples; ``loss`` (nats); ``bytes``: up and down per client; ``steps`` and ``seconds``.
    """
    rows = rows.assign(bytes=rows.bytes_up + rows.bytes_down)
    alone = rows[rows.method == local].set_index(["federation", "seed", "client"]).accuracy
    index = pd.MultiIndex.from_frame(rows[["federation", "seed", "client"]])
    rows = rows.assign(better=(rows.accuracy.to_numpy() > alone.reindex(index).to_numpy()).astype(float))
    keys = ["federation", "method"]
    seeds = rows.groupby([*keys, "seed"], sort=False)
    each = seeds[["accuracy", "better", "union_accuracy", "loss", "bytes", "steps", "seconds"]].mean()
    each["worst"] = seeds.accuracy.min()
    methods = each.groupby(keys, sort=False)
    table = methods.mean().rename(columns={"union_accuracy": "union"})
    table["±"] = methods.accuracy.sem()
    lowest = rows.groupby(keys, sort=False).accuracy
    table["bottom"] = lowest.apply(lambda a: a.nsmallest(max(1, round(len(a) / 10))).mean())
    table = table[["accuracy", "±", "worst", "bottom", "better", "union", "loss", "bytes", "steps", "seconds"]]
    names = list(dict.fromkeys(rows.federation))
    parts = [table.loc[[name]].sort_values("accuracy", ascending=False, kind="stable") for name in names]
    return pd.concat(parts)


def efficient(board: pd.DataFrame, references: Collection[str] = (ORACLE,)) -> pd.Series:
    """Which lines of a leaderboard no other of the same federation beats: none is as accurate for fewer bytes, or more
    accurate for as many. ``references``, on test data, do not count and are never efficient themselves."""
    real = ~board.index.get_level_values("method").isin(references)
    result = pd.Series(False, index=board.index)
    for line in board.index[real]:
        one, others = board.loc[line], board[real & (board.index.get_level_values(0) == line[0])]
        better = (others["bytes"] <= one["bytes"]) & (others.accuracy >= one.accuracy)
        strictly = (others["bytes"] < one["bytes"]) | (others.accuracy > one.accuracy)
        result[line] = not (better & strictly).any()
    return result


def against(rows: pd.DataFrame, method: str = "potara", score: str = "accuracy") -> pd.DataFrame:
    """``method`` minus each other method, paired by seed: ``difference`` of the mean client ``score``, ``±`` its
    standard error, ``p`` of a two-sided paired t-test over the seeds, and ``p (Holm)``, corrected for the number of
    methods in that federation (Holm, 1979). One line per federation and other method."""
    seeds = rows.groupby(["federation", "method", "seed"])[score].mean()
    lines = []
    for federation in dict.fromkeys(rows.federation):
        own = seeds[federation, method]
        others = [name for name in dict.fromkeys(rows[rows.federation == federation].method) if name != method]
        pairs = [(own - seeds[federation, name]).dropna() for name in others]
        p = [float(stats.ttest_1samp(d, 0.0).pvalue) if len(d) > 1 and d.std() > 0 else torch.nan for d in pairs]
        for name, difference, value, corrected in zip(others, pairs, p, _holm(p)):
            lines.append([federation, name, difference.mean(), difference.sem(), value, corrected])
    columns = ["federation", "method", "difference", "±", "p", "p (Holm)"]
    return pd.DataFrame(lines, columns=columns).set_index(["federation", "method"])


def _holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction; NaN stays NaN and does not count."""
    order = sorted((value, i) for i, value in enumerate(p) if value == value)
    corrected, largest = list(p), 0.0
    for place, (value, i) in enumerate(order):
        largest = max(largest, min(1.0, value * (len(order) - place)))
        corrected[i] = largest
    return corrected
