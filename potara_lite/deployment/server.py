"""The server of a federation as a Flower ``ServerApp``: rounds, the exchanges that find the mixing weight, the table.

A client that does not answer, answers with an error, or sends what is no proper update (another shape, NaN) is left out
of that round, which continues with the others. A client that joins after the rounds have begun receives the result,
trains its local model and merges, and uploads no tensor.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from ..adapters.files import save_adapter
from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, client_adapter, match_adapter, repeat_adapter, select_clients
from ..baselines.algorithms import ALGORITHMS
from ..baselines.privacy import Privacy
from ..baselines.rounds import Algorithm, server_step
from ..checks import Named, checked
from ..estimators.calibrated import POINTS, lowest_inside, parabolas, two_groups, weigh, weigh_offset
from ..files import write_atomically
from ..merging.connectivity import weight_grid
from ..results import COLUMNS
from .registry import ClientRegistry, Timeouts, log, numbers_error
from .run_config import LoadBackbone, RunConfig, from_record, load_lab_backbone, to_record

PARTS = {"federated": "federated", "local": "local", "potara-calibrated": "merged"}  # method: the client's name for it


@dataclass(frozen=True)
class RunResult:
    """What a run gives the server: the last message (a row per client), the federation's model where there is one, the
    mixing weights by client, the tidy rows of ``results.COLUMNS``, and the events."""

    message: Adapter
    federated: Adapter | None
    weight: dict[int, float]
    rows: pd.DataFrame
    events: list[dict]


@checked
def play(grid: Grid, run_config: RunConfig, adapted: AdaptedBackbone, timeouts: Timeouts = Timeouts()) -> RunResult:
    """A whole run: join, rounds, last message, the exchanges of the mixing weight, the merge, the scores.

    Raises ``RuntimeError`` when fewer than ``timeouts.least`` clients join, and when none is left at the end.
    """
    algorithm, began = run_config.algorithm, time.monotonic()
    seconds = dict.fromkeys(PARTS, 0.0)
    registry = ClientRegistry(grid, run_config, run_config.fingerprint(adapted), timeouts)
    members = registry.wait()
    message, state, rounds_of, behind = play_rounds(registry, members, adapted)
    seconds["federated"] = time.monotonic() - began

    finishing = {}
    for client in registry.update():
        is_late = client not in members
        if is_late:
            registry.note("joined late: it gets the result and uploads no tensor", client)
        if client not in behind and not (is_late and algorithm.broadcast_to_all):
            finishing[client] = RecordDict({"tensors": _row(message, client)})
    finished = registry.ask("query.finish", finishing)
    if not finished:
        raise RuntimeError("no client was left to receive the result")
    state = algorithm.on_receive(state | message, run_config.setting.rounds)

    mergeable = can_merge(algorithm, state, adapted)
    weight = find_weights(registry, list(finished), adapted, seconds) if mergeable else {}
    scores = registry.ask("evaluate", {client: RecordDict() for client in finished}, scores_error)
    seconds["potara-calibrated"] = time.monotonic() - began
    rows = scored_rows(registry, scores, weight, rounds_of, seconds)
    federated = algorithm.federated_model(state) if algorithm.federated_model else None
    return RunResult(message, federated, weight, rows, registry.events)


def _row(message: Adapter, client: int) -> ArrayRecord:
    return to_record(select_clients(message, slice(client, client + 1)))


def play_rounds(
    registry: ClientRegistry, members: list[int], adapted: AdaptedBackbone
) -> tuple[Adapter, Adapter, dict[int, int], set[int]]:
    """The rounds, with these clients. Returns the last message; the tensors of a client that received every message
    before it and trained nothing; in how many rounds each client's update was used; who missed a message it needed."""
    algorithm, setting = registry.run_config.algorithm, registry.run_config.setting
    state = algorithm.init(repeat_adapter(adapted.initial, setting.clients))
    message = algorithm.upload(state)
    like = client_adapter(message, 0)  # one client's upload; later messages may have other tensors
    used, behind = dict.fromkeys(range(setting.clients), 0), set()
    for number in range(setting.rounds):
        config = ConfigRecord({"number": number})
        contents = {
            client: RecordDict({"tensors": _row(message, client), "config": config})
            for client in registry.update()
            if client in members and client not in behind
        }
        replies = registry.ask("train", contents, lambda content: upload_error(content, like))
        if algorithm.broadcast_to_all:
            behind |= set(members) - set(replies)
        state = algorithm.on_receive(state | message, number)
        message = _aggregate(registry, message, replies, like, number)
        for client in replies:
            used[client] += 1
    return message, state, used, behind


def upload_error(content: RecordDict, like: Adapter) -> str | None:
    """Why a client's answer is no update, if so: other names, shapes or dtypes, or numbers that are not finite."""
    try:
        update = match_adapter("update", from_record(content["tensors"]), like, stacked=True, same_rank=True)
    except ValueError as error:
        return str(error)
    for name, tensor in update.items():
        if tensor.dtype != like[name].dtype:
            return f"{name} is of {tensor.dtype}, not {like[name].dtype}"
        if not tensor.isfinite().all():
            return f"not finite: {name}"
    return None


def _aggregate(
    registry: ClientRegistry, message: Adapter, replies: dict[int, RecordDict], like: Adapter, number: int
) -> Adapter:
    """The next message, from the updates ordered by client; without any, the last one again."""
    if not replies:
        registry.note("no update in this round: the message stays")
        return message
    updates = [from_record(content["tensors"]) for content in replies.values()]
    uploads = {n: torch.cat([update[n] for update in updates]).to(tensor.device) for n, tensor in like.items()}
    sizes = torch.tensor([registry.handshakes[client].train for client in replies])
    algorithm, clients = registry.run_config.algorithm, registry.run_config.setting.clients
    try:
        return server_step(algorithm, uploads, sizes, clients, sent=message, number=number)
    except ValueError as error:
        registry.note(f"the message stays: {error}")
        return message


def can_merge(algorithm: Algorithm, tensors: Adapter, adapted: AdaptedBackbone) -> bool:
    """Whether the algorithm's models are adapters of the plain backbone, which a local model can be merged with."""
    shapes = {name: tensor[0].shape for name, tensor in algorithm.personal_model(tensors).items()}
    plain = {name: tensor.shape for name, tensor in adapted.initial.items()}
    return shapes == plain and algorithm.backbone(adapted) is adapted


def find_weights(
    registry: ClientRegistry, clients: list[int], adapted: AdaptedBackbone, seconds: dict[str, float]
) -> dict[int, float]:
    """The exchanges of ``estimate_calibrated``. Returns the weight of every client that has merged.

    Up and down go: the mean losses at nine weights, and the grid's point where all are lowest together; a variance, and
    the client's weight; a parabola, and the offset. ``seconds`` gets those of the slowest local training.
    """
    curve_error, seconds_error = numbers_error("up", losses=POINTS), numbers_error("metrics", seconds=1)
    asked = {client: RecordDict() for client in clients}
    curves = registry.ask("query.curve", asked, lambda content: curve_error(content) or seconds_error(content))
    if not curves:
        return {}
    seconds["local"] = max(content["metrics"]["seconds"] for content in curves.values())
    index = lowest_inside(_column(curves, "losses"), _calibration_sizes(registry, curves))

    asked = {client: _down(index=index) for client in curves}
    slopes = registry.ask("query.slope", asked, numbers_error("up", variance=1))
    if not slopes:
        return {}
    grid, sizes = weight_grid(POINTS), _calibration_sizes(registry, slopes)
    mean = _column({client: curves[client] for client in slopes}, "losses")
    three = mean[:, index - 1 : index + 2].unsqueeze(2).unbind(1)  # a client's mean losses as if of one sample
    slope, curvature, _ = parabolas(*three, torch.ones_like(sizes), float(grid[1] - grid[0]))
    weight, _ = weigh(float(grid[index]), slope, curvature, _column(slopes, "variance"), sizes)
    weights = dict(zip(slopes, weight.tolist()))

    asked = {client: _down(weight=weights[client]) for client in slopes}
    if two_groups(adapted.initial):
        parabola_error = numbers_error("up", slope=1, curvature=1, variance=1)
        replies = registry.ask("query.offset", asked, parabola_error)
        if not replies:
            return {}
        columns = [_column(replies, name) for name in ("slope", "curvature", "variance")]
        offset, _ = weigh_offset(*columns, _calibration_sizes(registry, replies))
        asked = {client: _down(offset=float(offset)) for client in replies}
    merged = registry.ask("query.merge", asked)
    return {client: weights[client] for client in merged}


def _down(**numbers: float) -> RecordDict:
    return RecordDict({"down": MetricRecord(numbers)})


def _calibration_sizes(registry: ClientRegistry, clients: Iterable[int]) -> Tensor:
    return torch.tensor([registry.handshakes[client].calibration for client in clients])


def _column(replies: dict[int, RecordDict], name: str) -> Tensor:
    """What each client sent under this name: ``(C,)``, or ``(C, W)`` of lists."""
    return torch.tensor([content["up"][name] for content in replies.values()], dtype=torch.float64)


def scores_error(content: RecordDict) -> str | None:
    """Why the scores of a client's models are none, if so."""
    parts = [part for part in PARTS.values() if f"{part}-loss" in content["metrics"]]
    names = [f"{part}-{score}" for part in parts for score in ("loss", "accuracy")]
    return numbers_error("metrics", **dict.fromkeys(names, 1))(content)


def scored_rows(
    registry: ClientRegistry,
    scores: dict[int, RecordDict],
    weights: dict[int, float],
    rounds_of: dict[int, int],
    seconds: dict[str, float],
) -> pd.DataFrame:
    """The tidy rows of the command: ``federated``, which is the algorithm's model, ``local``, ``potara-calibrated``."""
    rows = []
    for method, part in PARTS.items():
        for client, content in scores.items():
            weight = {"federated": 1.0, "local": 0.0}.get(method, weights.get(client))
            if f"{part}-loss" in content["metrics"] and weight is not None:
                scored = [content["metrics"][f"{part}-{score}"] for score in ("accuracy", "loss")]
                cost = _costs(registry, client, rounds_of[client])[method]
                rows.append([method, registry.run_config.seed, client, *scored, weight, *cost, seconds[method]])
    return pd.DataFrame(rows, columns=COLUMNS).round({"seconds": 3})


def _costs(registry: ClientRegistry, client: int, rounds: int) -> dict[str, list[int]]:
    """What each of a client's models costs: the bytes up and down, the optimiser steps."""
    algorithm, setting = registry.run_config.algorithm, registry.run_config.setting
    steps = rounds * algorithm.local_cost(setting.round_steps) + algorithm.local_cost(algorithm.finetune_steps)
    tensors, numbers = (
        [registry.bytes[what, way, client] for way in ("up", "down")] for what in ("tensors", "numbers")
    )
    federated, local = np.array([*tensors, steps]), np.array([0, 0, setting.local_steps])
    return {
        "federated": federated.tolist(),
        "local": (local + setting.local_from_federated * federated).tolist(),
        "potara-calibrated": (federated + local + [*numbers, 0]).tolist(),
    }


def save_result(result: RunResult, run_config: RunConfig, adapted: AdaptedBackbone, out: Path, config: Mapping) -> None:
    """Write ``results.csv``, ``events.json``, ``config.json`` and the federated adapter, named as by the command."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "results.csv", result.rows.to_csv(index=False))
    write_atomically(out / "events.json", json.dumps(result.events, indent=1) + "\n")
    write_atomically(out / "config.json", json.dumps(dict(config), indent=2) + "\n")
    if result.federated is not None:
        save_adapter(adapted, result.federated, out / "adapters" / f"seed-{run_config.seed}" / "federated")


@checked
def server_app(load: LoadBackbone = load_lab_backbone, algorithms: Named[Algorithm] = ALGORITHMS) -> ServerApp:
    """The ``ServerApp`` of a federation whose backbone, with its empty adapter, ``load(run_config)`` gives.

    The run's configuration: see ``RunConfig.of`` and ``Timeouts.of``; with ``out``, a folder, the result is written
    there. With a positive ``clip`` the average is private (``baselines.privacy``), with noise of ``noise-multiplier``
    whose seed no client is told.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        run_config = RunConfig.of(config, algorithms)
        if config.get("clip"):
            privacy = Privacy(config["clip"], config.get("noise-multiplier", 0.0), secrets.randbits(62))
            run_config = replace(run_config, algorithm=replace(run_config.algorithm, privacy=privacy))
        adapted = load(run_config)
        result = play(grid, run_config, adapted, Timeouts.of(config))
        if config.get("out"):
            save_result(result, run_config, adapted, Path(str(config["out"])), config)
        for method, rows in result.rows.groupby("method", sort=False):
            log.info("%s: accuracy %.3f, loss %.3f nats", method, rows.accuracy.mean(), rows.loss.mean())

    return app
