"""Methods × federations × seeds → one tidy table, method by method on disk.

Every finished (federation, seed, method) is a CSV file of its own, put in place in one step: an interrupted sweep goes
on where it stopped, nothing finished is computed again, and a half-written file is never read. ``results`` reads such
tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from ..adapters import AdaptedBackbone
from ..data import Federation, Split
from ..experiment import Method, Trial, prepare
from ..results import result_rows, write_atomically
from ..setting import Setting

COLUMNS = ["federation", "method", "seed", "client", "accuracy", "loss", "union_accuracy", "union_loss", "weight",
           "bytes_up", "bytes_down", "steps", "seconds"]  # fmt: skip


def union(split: Split, per_client: int) -> Split:
    """The first examples of every client, given to all of them: what a personalised model costs elsewhere."""
    sizes = split.sizes.clamp_max(per_client)
    examples = [(split.x[i, : int(n)], split.y[i, : int(n)]) for i, n in enumerate(sizes)]
    x, y = (torch.cat(parts).expand(len(split), *(-1,) * parts[0].dim()) for parts in zip(*examples))
    return Split(x, y, torch.full_like(split.sizes, y.shape[1]), split.ids)


def sweep(
    methods: Mapping[str, Method],
    settings: Mapping[str, Setting],
    seeds: Sequence[int],
    folder: str | Path,
    *,
    eval_split: Callable[[Federation], Split] = lambda federation: federation.test,
    union_size: int = 25,
    prepare: Callable[[Setting, int], tuple[AdaptedBackbone, Federation]] = prepare,
    shard: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> pd.DataFrame:
    """Run every method on every federation and seed that ``folder`` does not hold yet; all rows that it holds then.

    A row per client, in the order of ``COLUMNS``: accuracy and loss (nats) on the client's own examples and on the
    ``union`` of ``union_size`` examples of every client; the mixing weight, where there is one; what the client paid.
    ``eval_split`` picks the examples: the test split, or the calibration split to choose options by. ``shard=(i, n)``
    does every n-th pair of federation and seed from the i-th, to share the work between processes. The folder remembers
    the settings, not the methods: when a method changes, delete its files.

    Raises ``ValueError`` when the folder holds a federation of the same name and another setting, and for names that
    would share a file.

    A method of your own beside one of the field (LG-FedAvg shares the head and keeps the rest; arXiv 2001.01523):

    >>> import tempfile
    >>> from potara_lite import leaderboard
    >>> from potara_lite.field.methods import METHODS, from_algorithm
    >>> from potara_lite.field.rounds import Algorithm, is_head
    >>> lg_fedavg = from_algorithm(Algorithm("LG-FedAvg", is_uploaded=is_head))
    >>> mine = {"LG-FedAvg": lg_fedavg, "local": METHODS["local"]}
    >>> tiny = Setting(clients=2, train_size=8, calibration_size=4, test_size=8, rounds=1, round_steps=1, local_steps=1)
    >>> rows = sweep(mine, {"tiny": tiny}, seeds=[0, 1], folder=tempfile.mkdtemp())
    >>> leaderboard(rows).loc["tiny", "bytes"].sort_index().tolist()
    [25800.0, 0.0]
    """
    folder, cells = Path(folder), [(name, seed) for name in settings for seed in seeds][shard[0] :: shard[1]]
    _check_names(methods, settings)
    for name, setting in settings.items():
        _remember_setting(folder / _slug(name), setting, union_size)
    with tqdm(total=len(methods) * len(cells), disable=not progress, unit="run") as bar:
        for name, seed in cells:
            trial, place = None, folder / _slug(name) / f"seed-{seed}"
            place.mkdir(exist_ok=True)
            for method, function in methods.items():
                path = place / f"{_slug(method)}.csv"
                bar.set_description(f"{name}, seed {seed}, {method}")
                if not path.is_file():
                    trial = trial or Trial(*prepare(settings[name], seed), settings[name], seed)
                    rows = _rows(method, function, trial, eval_split(trial.federation), union_size)
                    write_atomically(path, rows.assign(federation=name)[COLUMNS].to_csv(index=False))
                bar.update()
    return read_results(folder)


def read_results(folder: str | Path) -> pd.DataFrame:
    """All rows that a sweep's folder holds, by federation, seed and method."""
    frames = [pd.read_csv(path) for path in sorted(Path(folder).glob("*/seed-*/*.csv"))]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)


def _slug(name: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-")


def _check_names(*collections: Mapping[str, object]) -> None:
    for names in collections:
        if len({_slug(name) for name in names}) < len(names):
            raise ValueError(f"names must differ in letters or digits, unlike some of {list(names)}")


def _remember_setting(folder: Path, setting: Setting, union_size: int) -> None:
    path, text = folder / "setting.json", json.dumps(asdict(setting) | {"union": union_size}, indent=1) + "\n"
    if path.is_file() and path.read_text() != text:
        raise ValueError(f"{folder} holds results of another setting; take another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _rows(name: str, method: Method, trial: Trial, split: Split, union_size: int) -> pd.DataFrame:
    result = method(trial)
    rows = result_rows(name, trial, result, split)
    loss, accuracy = result.evaluate(union(split, union_size), trial.setting.chunk_size)
    return rows.assign(union_loss=loss.cpu().numpy(), union_accuracy=accuracy.cpu().numpy())
