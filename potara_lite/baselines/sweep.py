"""Methods × federations × seeds → one tidy table, method by method on disk.

Every finished (federation, seed, method) has a CSV file of its own, its *result file*, put in place in one step: an
interrupted sweep goes on where it stopped, nothing finished is computed again, and a half-written file is never read.
Its first line has the fingerprint of what made the rows and the digest of the rows: a damaged file is refused, that of
another method or version is computed again. ``results`` reads such tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from .. import __version__
from ..adapters.lora import AdaptedBackbone
from ..checks import Count, Flag, List, Named, PathLike, Seeds, Size, checked, invalid
from ..experiment import AnyMethod, Prepare, Result, Run, prepare
from ..federation.split import Federation, Split
from ..files import FileError, digest, fingerprint, reading, tensor_digest, write_atomically
from ..results import result_rows
from ..setting import Setting

COLUMNS = ["federation", "method", "seed", "client", "accuracy", "loss", "union_accuracy", "union_loss", "weight",
           "bytes_up", "bytes_down", "steps", "seconds"]  # fmt: skip


@checked
def union(split: Split, per_client: Size) -> Split:
    """The first examples of every client, given to all of them: they show what personalisation costs on others' data.

    Raises ``ValueError`` for ``per_client`` below 1.
    """
    x, y, _ = split.head(per_client).joined()
    return Split([(x, y)] * len(split), split.ids)


@checked
def sweep(
    methods: Named[AnyMethod],
    settings: Named[Setting],
    seeds: Seeds,
    folder: PathLike,
    *,
    eval_split: Callable[[Federation], Split] = lambda federation: federation.test,
    union_size: Size = 25,
    eval_every: Size | None = None,
    prepare: Prepare = prepare,
    shard: List[Count] = (0, 1),
    progress: Flag = False,
) -> pd.DataFrame:
    """Run every method on every federation and seed that ``folder`` does not have yet; all rows that it has then.

    A row per client, in the order of ``COLUMNS``: accuracy and loss (nats) on the client's own examples and on the
    ``union`` of ``union_size`` examples of every client; the mixing weight, where there is one; what the client paid.
    ``eval_split`` picks the examples: the test split, or the calibration split to choose options by. With
    ``eval_every`` the models are also evaluated on them every so many rounds, and ``read_histories`` has the numbers.
    ``shard=(i, n)`` does every n-th pair of federation and seed from the i-th (0 ≤ i < n), to share the work between
    processes. A result file is computed again when its method, ``prepare``, ``eval_split`` or the version of the
    library is another one (``fingerprint``), or the data and weights that ``prepare`` returns, which is called every
    time.

    Raises ``ValueError`` when the folder holds a federation of the same name and another setting or a damaged file (a
    ``FileError``), for names that would share a file or make none, for a seed given twice, and for no such shard.

    ``methods``: functions of a ``Run``, algorithms, or estimators, by name (``as_method``). An algorithm of your own
    beside one of the comparison (LG-FedAvg shares the head and keeps the rest; arXiv 2001.01523):

    >>> import tempfile
    >>> from potara_lite import leaderboard
    >>> from potara_lite.baselines.methods import METHODS
    >>> from potara_lite.baselines.rounds import Algorithm, is_head
    >>> mine = {"LG-FedAvg": Algorithm("LG-FedAvg", is_uploaded=is_head), "local": METHODS["local"]}
    >>> tiny = Setting(clients=2, train_size=8, calibration_size=4, test_size=8, rounds=1, round_steps=1, local_steps=1)
    >>> rows = sweep(mine, {"tiny": tiny}, seeds=[0, 1], folder=tempfile.mkdtemp())
    >>> leaderboard(rows).loc["tiny", "bytes"].sort_index().tolist()
    [25800.0, 0.0]
    """
    _check_names(methods, settings)
    if len(shard) != 2 or shard[0] >= shard[1]:
        invalid("shard", "(i, n), the first number below the second", shard)
    folder = Path(folder)
    for name, setting in settings.items():
        _remember_setting(folder / _slug(name), setting, union_size)
    common = fingerprint((__version__, prepare, eval_split))
    runs = [(name, seed) for name in settings for seed in seeds][shard[0] :: shard[1]]
    with tqdm(total=len(methods) * len(runs), disable=not progress, unit="run") as bar:
        for name, seed in runs:
            run = Run(*prepare(settings[name], seed), settings[name], seed)
            made_from = common, eval_every, prepared_digest(run.adapted, run.federation)
            if eval_every is not None:
                run.eval_split, run.eval_every = eval_split(run.federation), eval_every
            seed_folder = folder / _slug(name) / f"seed-{seed}"
            seed_folder.mkdir(exist_ok=True)
            for method, function in methods.items():
                bar.set_description(f"{name}, seed {seed}, {method}")
                path = seed_folder / f"{_slug(method)}.csv"
                key = fingerprint((*made_from, function))
                if not path.is_file() or _read_rows(path)[0] != key:
                    result = function(run)
                    rows = _rows(method, result, run, eval_split(run.federation), union_size)
                    if eval_every is not None and result.history is not None:
                        (seed_folder / "history").mkdir(exist_ok=True)
                        history = result.history.assign(federation=name, method=method, seed=seed)
                        write_atomically(seed_folder / "history" / path.name, history.to_csv(index=False))
                    _write_rows(path, key, rows.assign(federation=name)[COLUMNS])
                bar.update()
    return read_results(folder)


@checked
def read_histories(folder: PathLike) -> pd.DataFrame:
    """The histories of a sweep with ``eval_every``, by federation, seed and method (see ``training/history.py``)."""
    files = sorted(Path(folder).glob("*/seed-*/history/*.csv"))
    return pd.concat([pd.read_csv(file) for file in files], ignore_index=True) if files else pd.DataFrame()


@checked
def read_results(folder: PathLike) -> pd.DataFrame:
    """All rows that a sweep's folder holds, by federation, seed and method.

    Raises ``FileError`` (a ``ValueError``) for a damaged file.
    """
    frames = [_read_rows(path)[1] for path in sorted(Path(folder).glob("*/seed-*/*.csv"))]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)


def prepared_digest(adapted: AdaptedBackbone, federation: Federation) -> str:
    """A digest of the backbone, its weights, scalings, task and initial adapter, and of all examples."""
    parts = [repr((adapted.model, adapted.model.training, adapted.scaling, federation.classes, federation.name))]
    parts.append(fingerprint(adapted.task))
    parts.append(tensor_digest(adapted.model.state_dict() | adapted.initial))
    for split in (federation.train, federation.calibration, federation.test):
        parts.append(repr(split.ids))
        for x, y in split.examples:
            parts.append(tensor_digest({**(x if isinstance(x, dict) else {"x": x}), "y": y}))
    return digest(*parts)


def _write_rows(path: Path, key: str, rows: pd.DataFrame) -> None:
    """Write a result file; ``key`` is the fingerprint of what made the rows."""
    text = rows.to_csv(index=False)
    write_atomically(path, f"# {key} {digest(text)}\n{text}")


def _read_rows(path: Path) -> tuple[str, pd.DataFrame]:
    """The fingerprint of what made a result file, and its rows."""
    with reading(path):
        first, _, text = path.read_text("utf-8").partition("\n")
        words = first.split(" ")
        if len(words) != 3 or words[0] != "#" or words[2] != digest(text):
            raise FileError(f"{path} is damaged or was changed by hand: delete it, and it is computed again")
        rows = pd.read_csv(StringIO(text))
        federation, method, seed = rows.loc[0, ["federation", "method", "seed"]].astype(str)
        if path.parts[-3:] != (_slug(federation), f"seed-{seed}", f"{_slug(method)}.csv"):
            raise FileError(f"{path} holds the rows of another file: delete it, and it is computed again")
    return words[1], rows


def _slug(name: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-.")


def _check_names(*collections: Mapping[str, object]) -> None:
    for names in collections:
        if empty := [name for name in names if not _slug(name)]:
            raise ValueError(f"{empty[0]!r} can name no file: a name needs a letter or a digit")
        if len({_slug(name).lower() for name in names}) < len(names):
            raise ValueError(f"names must differ in letters or digits, unlike some of {list(names)}")


def _remember_setting(folder: Path, setting: Setting, union_size: int) -> None:
    path, text = folder / "setting.json", json.dumps(asdict(setting) | {"union": union_size}, indent=1) + "\n"
    if path.is_file() and path.read_bytes() != text.encode():
        raise ValueError(f"{folder} holds results of another setting; take another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _rows(name: str, result: Result, run: Run, split: Split, union_size: int) -> pd.DataFrame:
    rows = result_rows(name, run, result, split)
    loss, accuracy = result.evaluate(union(split, union_size), run.setting.chunk_size)
    return rows.assign(union_loss=loss.cpu().numpy(), union_accuracy=accuracy.cpu().numpy())
