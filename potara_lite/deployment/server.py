"""The server of a federation as a Flower ``ServerApp``: rounds, the exchanges that find the mixing weight, the table.

A client that does not answer, answers with an error, or sends what is no proper update (another shape, NaN) is left out
of that round, which goes on with the others; every such event is logged and kept. Who joins once the rounds have begun
receives the result, trains its local model and merges, and uploads no tensor.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from ..adapters.files import save_adapter
from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, check_same_base, client_adapter, repeat_adapter
from ..baselines.algorithms import ALGORITHMS
from ..baselines.privacy import Privacy
from ..baselines.rounds import Algorithm, server_step
from ..checks import check_fields, door, function, kind, named, not_negative, positive, shown, whole
from ..estimators.calibrated import POINTS, lowest_inside, parabolas, two_groups, weigh, weigh_offset
from ..files import one_line, write_atomically
from ..merging.connectivity import weight_grid
from ..results import COLUMNS
from .run_config import LoadBackbone, RunConfig, from_record, load_lab_backbone, payload_bytes, to_record

log = logging.getLogger("flwr.potara_lite")
FLOAT_BYTES = 4  # as the ledger counts a number; on Flower's wire it is a double


@dataclass(frozen=True)
class Timeouts:
    """How long the server waits, in seconds: for clients to join, for an answer, between looks at who is there; and
    how few clients it begins with."""

    join: float = 300.0
    answer: float = 600.0
    pause: float = 1.0
    least: int = 1

    def __post_init__(self):
        check_fields(self, join=not_negative, answer=positive, pause=not_negative, least=whole(1))

    @staticmethod
    def of(config: Mapping) -> Timeouts:
        """From the run's configuration: ``join-timeout``, ``timeout``, ``pause``, ``min-clients``."""
        keys = {"join": "join-timeout", "answer": "timeout", "pause": "pause", "least": "min-clients"}
        return Timeouts(**{name: config[key] for name, key in keys.items() if key in config})


@dataclass
class ClientRegistry:
    """Who takes part: the node of each client, the sizes of its splits, what crossed, and what went wrong."""

    grid: Grid
    run_config: RunConfig
    fingerprint: str
    timeouts: Timeouts
    nodes: dict[int, int] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    sizes: dict[int, dict[str, int]] = field(default_factory=dict)
    bytes: dict[str, dict[int, int]] = field(default_factory=dict)
    events: list[dict] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def note(self, what: str, client: int | None = None) -> None:
        """Log an event and keep it."""
        self.events.append({"second": round(time.monotonic() - self.began, 1), "client": client, "what": what})
        log.warning("client %s: %s", "?" if client is None else client, what)

    def wait(self) -> list[int]:
        """The clients that are there once all have joined or the time is up. Raises ``RuntimeError`` for too few."""
        end = time.monotonic() + self.timeouts.join
        while len(self.update()) < self.run_config.setting.clients and time.monotonic() < end:
            time.sleep(self.timeouts.pause)
        if len(self.nodes) < self.timeouts.least:
            there, least = len(self.nodes), self.timeouts.least
            raise RuntimeError(f"{there} clients joined within {self.timeouts.join:g} s, at least {least} are needed")
        return sorted(self.nodes)

    def update(self) -> list[int]:
        """Greet the nodes that are new; the clients whose node is there now."""
        there = set(self.grid.get_node_ids())
        new = there - set(self.nodes.values()) - self.refused
        for node, content, why in self._exchange("query.join", {node: RecordDict() for node in sorted(new)}):
            client, sizes = None, {}
            if content is not None:
                try:
                    client, sizes, fingerprint = handshake(content)
                    why = self._refusal(client, node, fingerprint, there)
                except (KeyError, TypeError, ValueError) as error:
                    why = f"no proper handshake: {one_line(error)}"
            if why:
                self.note(f"refused: {why}", client)
                if content is not None:
                    self.refused.add(node)
                continue
            if client in self.nodes:
                self.note("is back", client)
            self.nodes[client] = node
            self.sizes[client] = sizes
        return sorted(client for client, node in self.nodes.items() if node in there)

    def _refusal(self, client: int, node: int, fingerprint: object, there: set[int]) -> str | None:
        """Why a node that answered cannot take part, if so."""
        if fingerprint != self.fingerprint:
            return "another backbone, rank, setting or seed than the server's"
        if not 0 <= client < self.run_config.setting.clients:
            return f"its number is outside 0 … {self.run_config.setting.clients - 1}"
        if self.nodes.get(client, node) != node and self.nodes[client] in there:
            return "another node already is this client"
        return None

    def ask(
        self,
        kind: str,
        contents: Mapping[int, RecordDict],
        find_error: Callable[[RecordDict], str | None] = lambda content: None,
    ) -> dict[int, RecordDict]:
        """What the clients answer, in the order of their numbers; those with no proper answer are left out."""
        client_of, found = {self.nodes[client]: client for client in contents}, {}
        for client, content in contents.items():
            self._count("down", client, content)
        for node, content, why in self._exchange(kind, {self.nodes[c]: content for c, content in contents.items()}):
            client = client_of[node]
            if content is not None:
                self._count("up", client, content)
            if why is None:
                try:
                    why = find_error(content)
                except Exception as error:  # a part is missing, or another thing than it should be
                    why = f"no proper answer: {one_line(error)}"
            if why:
                self.note(f"{kind}: {why}", client)
            else:
                found[client] = content
        return dict(sorted(found.items()))

    def _exchange(self, kind: str, contents: Mapping[int, RecordDict]) -> Iterable[tuple]:
        """Of every node its answer, or ``None`` and why there is none."""
        if not contents:
            return
        messages = [Message(content, node, kind) for node, content in contents.items()]
        silent, told = set(contents), f"no answer within {self.timeouts.answer:g} s"
        for reply in self.grid.send_and_receive(messages, timeout=self.timeouts.answer):
            node, error = reply.metadata.src_node_id, _error_of(reply) if reply.has_error() else None
            if node not in silent:  # the SuperLink answers in the name of a node that is gone, without saying which
                told = error or told
                continue
            silent.discard(node)
            yield node, None if error else reply.content, error
        for node in sorted(silent):
            yield node, None, told

    def crossed(self, what: str, client: int) -> int:
        """The bytes of ``tensors`` or ``numbers``, ``up`` or ``down``, of a client."""
        return self.bytes.get(what, {}).get(client, 0)

    def _count(self, way: str, client: int, content: RecordDict) -> None:
        """Add what crosses: tensors, and the numbers from which the mixing weight comes."""
        tensors = payload_bytes(content["tensors"]) if "tensors" in content else 0
        numbers = sum(len(v) if isinstance(v, list) else 1 for v in content.get(way, {}).values())
        for what, size in ((f"tensors {way}", tensors), (f"numbers {way}", FLOAT_BYTES * numbers)):
            self.bytes.setdefault(what, {})[client] = self.crossed(what, client) + size


def handshake(content: RecordDict) -> tuple[int, dict[str, int], object]:
    """Who a client says that it is: its number, the sizes of its splits, its fingerprint.

    Raises ``ValueError`` or ``KeyError`` for what is none.
    """
    metrics = content["metrics"]
    sizes = {split: whole(1)(split, metrics[split], {}) for split in ("train", "calibration")}
    return whole(0)("client", metrics["client"], {}), sizes, content["config"]["fingerprint"]


def numbers_error(record: str, **lengths: int) -> Callable[[RecordDict], str | None]:
    """Why a record of numbers is not what was asked for, if so: others, not finite, or a variance below 0."""

    def find_error(content: RecordDict) -> str | None:
        for name, length in lengths.items():
            value = content[record][name]
            values = value if isinstance(value, list) else [value]
            if len(values) != length or not all(map(math.isfinite, values)) or (name == "variance" and value < 0):
                return f"{name} must be {length} finite numbers, not {shown(value)}"
        return None

    return find_error


def _error_of(reply: Message) -> str:
    """An error's code and the line that says what it was."""
    lines = (reply.error.reason or "no reason given").strip().splitlines()
    return f"error {reply.error.code}: {next((line for line in reversed(lines) if 'Error' in line), lines[-1])}"


@dataclass(frozen=True)
class RunResult:
    """What a run gives the server: the last message (a row per client), the federation's model where there is one, the
    mixing weights by client, the tidy rows of ``results.COLUMNS``, and the events."""

    message: Adapter
    federated: Adapter | None
    weight: dict[int, float]
    rows: pd.DataFrame
    events: list[dict]


@door(run_config=kind("RunConfig"), timeouts=kind("Timeouts"))
def play(grid: Grid, run_config: RunConfig, adapted: AdaptedBackbone, timeouts: Timeouts = Timeouts()) -> RunResult:
    """A whole run: join, rounds, last message, the exchanges of the mixing weight, the merge, the scores.

    Raises ``RuntimeError`` when fewer than ``timeouts.least`` clients join, and when none is left at the end.
    """
    algorithm, began = run_config.algorithm, time.monotonic()
    registry = ClientRegistry(grid, run_config, run_config.fingerprint(adapted), timeouts)
    held = algorithm.init(repeat_adapter(adapted.initial, run_config.setting.clients))
    message, members = algorithm.upload(held), registry.wait()
    message, held, rounds_of, behind = play_rounds(registry, message, held, members)
    seconds = {"federated": time.monotonic() - began}
    late = [client for client in registry.update() if client not in members]
    for client in late:
        registry.note("joined late: it gets the result and uploads no tensor", client)
    finishing = [c for c in registry.update() if c not in behind and not (c in late and algorithm.broadcast_to_all)]
    done = registry.ask("query.finish", {c: RecordDict({"tensors": _row(message, c)}) for c in finishing})
    if not done:
        raise RuntimeError("no client was left to receive the result")
    last = algorithm.on_receive(held | message, run_config.setting.rounds)
    weight = find_weights(registry, list(done), adapted, seconds) if can_merge(algorithm, last, adapted) else {}
    scores = registry.ask("evaluate", {client: RecordDict() for client in done}, scores_error)
    seconds["potara-calibrated"] = time.monotonic() - began
    rows = result_rows(registry, scores, weight, rounds_of, seconds)
    federated = algorithm.federated_model and algorithm.federated_model(last)
    return RunResult(message, federated, weight, rows, registry.events)


def _row(message: Adapter, client: int):
    return to_record({name: tensor[client : client + 1] for name, tensor in message.items()})


def play_rounds(
    registry: ClientRegistry, message: Adapter, held: Adapter, members: list[int]
) -> tuple[Adapter, Adapter, dict[int, int], set[int]]:
    """The last message; what a client holds that heard all but it and trained nothing, from ``held`` on; in how many
    rounds each client's update was used; who missed what it needed to hear."""
    run_config, used, behind = registry.run_config, dict.fromkeys(range(registry.run_config.setting.clients), 0), set()
    like = client_adapter(message, 0)
    for number in range(run_config.setting.rounds):
        there = [client for client in registry.update() if client in members and client not in behind]
        config = ConfigRecord({"number": number})
        contents = {c: RecordDict({"tensors": _row(message, c), "config": config}) for c in there}
        replies = registry.ask("train", contents, lambda content: upload_error(content, like))
        if run_config.algorithm.broadcast_to_all:
            behind |= set(members) - set(replies)
        held = run_config.algorithm.on_receive(held | message, number)
        message = _aggregate(registry, message, replies, like, number)
        for client in replies:
            used[client] += 1
    return message, held, used, behind


def upload_error(content: RecordDict, like: Adapter) -> str | None:
    """Why what a client sent is no update, if so: other names or shapes, or numbers that are not finite."""
    sent = client_adapter(from_record(content["tensors"]), 0)
    try:
        check_same_base(like, sent)
    except ValueError as error:
        return str(error)
    if odd := [name for name, tensor in sent.items() if tensor.dtype != like[name].dtype]:
        return f"{odd[0]} is of {sent[odd[0]].dtype}, not {like[odd[0]].dtype}"
    odd = [name for name, tensor in sent.items() if not tensor.isfinite().all()]
    return f"not finite: {odd[0]}" if odd else None


def _aggregate(
    registry: ClientRegistry, message: Adapter, replies: dict[int, RecordDict], like: Adapter, number: int
) -> Adapter:
    """The next message, from the updates in the order of the clients' numbers; the last one again without any."""
    if not replies:
        registry.note("no update in this round: the message stays")
        return message
    sent = [from_record(content["tensors"]) for content in replies.values()]
    uploads = {name: torch.cat([one[name] for one in sent]).to(tensor.device) for name, tensor in like.items()}
    sizes = torch.tensor([registry.sizes[client]["train"] for client in replies])
    try:
        clients = registry.run_config.setting.clients
        return server_step(registry.run_config.algorithm, uploads, sizes, clients, sent=message, number=number)
    except ValueError as error:
        registry.note(f"the message stays: {error}")
        return message


def can_merge(algorithm: Algorithm, held: Adapter, adapted: AdaptedBackbone) -> bool:
    """Whether the algorithm's models are adapters of the plain backbone, which a local model can be merged with."""
    personal = algorithm.personal_model(held)
    shapes = {name: tensor[0].shape for name, tensor in personal.items()}
    plain = {name: tensor.shape for name, tensor in adapted.initial.items()}
    return shapes == plain and algorithm.backbone(adapted) is adapted


def find_weights(
    registry: ClientRegistry, clients: list[int], adapted: AdaptedBackbone, seconds: dict[str, float]
) -> dict[int, float]:
    """The exchanges of ``estimate_calibrated``: nine mean losses up and a place down, a variance up and the weight
    down, a parabola up and the offset down. The weight of every client that has merged."""
    grid = weight_grid(POINTS)
    asked = {client: RecordDict() for client in clients}
    replies = registry.ask("query.curve", asked, numbers_error("up", losses=POINTS))
    seconds["local"] = max(
        (float(content.get("metrics", {}).get("seconds", 0.0)) for content in replies.values()), default=0.0
    )
    clients, sizes = list(replies), _calibration_sizes(registry, replies)
    if not clients:
        return {}
    mean = torch.tensor([content["up"]["losses"] for content in replies.values()], dtype=torch.float64)
    place = lowest_inside(mean, sizes)
    replies = registry.ask(
        "query.slope", {client: _down(place=place) for client in clients}, numbers_error("up", variance=1)
    )
    if not replies:
        return {}
    there = torch.tensor([client in replies for client in clients])
    clients, sizes, mean = list(replies), sizes[there], mean[there]
    three = mean[:, place - 1 : place + 2].unsqueeze(2).unbind(1)  # a client's mean losses as if of one sample
    slope, curvature, _ = parabolas(*three, torch.ones_like(sizes), float(grid[1] - grid[0]))
    variance = torch.tensor([content["up"]["variance"] for content in replies.values()], dtype=torch.float64)
    weight = dict(zip(clients, weigh(float(grid[place]), slope, curvature, variance, sizes)[0].tolist()))
    if two_groups(adapted.initial):
        asked = {client: _down(weight=weight[client]) for client in clients}
        replies = registry.ask("query.offset", asked, numbers_error("up", slope=1, curvature=1, variance=1))
        offset = weigh_offset(*_columns(replies), _calibration_sizes(registry, replies))[0] if replies else 0.0
        merged = registry.ask("query.merge", {client: _down(offset=float(offset)) for client in replies})
    else:
        merged = registry.ask("query.merge", {client: _down(weight=weight[client]) for client in clients})
    return {client: weight[client] for client in merged}


def _down(**numbers: float) -> RecordDict:
    return RecordDict({"down": MetricRecord(numbers)})


def _calibration_sizes(registry: ClientRegistry, clients: Iterable[int]) -> Tensor:
    return torch.tensor([registry.sizes[client]["calibration"] for client in clients])


def _columns(replies: dict[int, RecordDict]) -> list[Tensor]:
    """The clients' parabolas: slope, curvature and variance, ``(C,)`` each."""
    names = "slope", "curvature", "variance"
    found = ([float(content["up"][name]) for content in replies.values()] for name in names)
    return [torch.tensor(column, dtype=torch.float64) for column in found]


def scores_error(content: RecordDict) -> str | None:
    """Why what a client measured of its models are no scores, if so."""
    parts = [part for part in ("federated", "local", "merged") if f"{part}-loss" in content["metrics"]]
    names = [f"{part}-{score}" for part in parts for score in ("loss", "accuracy")]
    return numbers_error("metrics", **dict.fromkeys(names, 1))(content)


def result_rows(
    registry: ClientRegistry,
    scores: dict[int, RecordDict],
    weight: dict[int, float],
    rounds_of: dict[int, int],
    seconds: dict,
) -> pd.DataFrame:
    """The tidy rows of the command: ``federated``, which is the algorithm's model, ``local``, ``potara-calibrated``."""
    setting, algorithm, rows = registry.run_config.setting, registry.run_config.algorithm, []
    after = algorithm.local_cost(algorithm.finetune_steps)
    for client, content in scores.items():
        crossed = [np.array([registry.crossed(f"{what} {way}", client) for way in ("up", "down")] + [0])
                   for what in ("tensors", "numbers")]  # fmt: skip
        shared = crossed[0] + [0, 0, rounds_of[client] * algorithm.local_cost(setting.round_steps) + after]
        own = np.array([0, 0, setting.local_steps])
        cost = {"federated": shared, "local": own + setting.local_from_federated * shared}
        cost["potara-calibrated"] = shared + own + crossed[1]
        share = {"federated": 1.0, "local": 0.0, "potara-calibrated": weight.get(client)}
        for method, part in (("federated", "federated"), ("local", "local"), ("potara-calibrated", "merged")):
            if f"{part}-loss" in content["metrics"] and share[method] is not None:
                scored = (content["metrics"][f"{part}-{score}"] for score in ("accuracy", "loss"))
                paid = *(int(number) for number in cost[method]), round(seconds[method], 3)
                rows.append([method, registry.run_config.seed, client, *scored, share[method], *paid])
    methods = list(seconds)
    return pd.DataFrame(sorted(rows, key=lambda row: methods.index(row[0])), columns=COLUMNS)


def save_result(result: RunResult, run_config: RunConfig, adapted: AdaptedBackbone, out: Path, config: Mapping) -> None:
    """Write ``results.csv``, ``events.json``, ``config.json`` and the federated adapter, laid out as by the command."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "results.csv", result.rows.to_csv(index=False))
    write_atomically(out / "events.json", json.dumps(result.events, indent=1) + "\n")
    write_atomically(out / "config.json", json.dumps(dict(config), indent=2) + "\n")
    if result.federated is not None:
        save_adapter(adapted, result.federated, out / "adapters" / f"seed-{run_config.seed}" / "federated")


@door(load=function, algorithms=named(kind("Algorithm")))
def server_app(load: LoadBackbone = load_lab_backbone, algorithms: Mapping[str, Algorithm] = ALGORITHMS) -> ServerApp:
    """The ``ServerApp`` of a federation whose empty backbone ``load(run_config)`` gives; it writes into ``out``, if given.

    The run's configuration: see ``RunConfig.of`` and ``Timeouts.of``; with a positive ``clip``, what is averaged is private
    (``baselines.privacy``), with noise of ``noise-multiplier`` whose seed no client is told.
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
