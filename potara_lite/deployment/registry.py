"""Which clients take part in a run: they join, are asked, answer or fail to, and every failure is noted.

A client that does not answer, answers with an error, or sends something else than it was asked for is left out of that
exchange, which goes on with the others.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ..checks import Count, NonNegative, Positive, Size, checked, shown
from ..files import one_line
from .run_config import RunConfig, payload_bytes

log = logging.getLogger("flwr.potara_lite")
FLOAT_BYTES = 4  # the ledger's size of a number; on Flower's wire it is a double
FindError = Callable[[RecordDict], str | None]  # what is wrong with an answer, if anything


@checked
@dataclass(frozen=True)
class Timeouts:
    """How many seconds the server waits: for clients to join, for an answer, between two looks at which nodes are
    connected; and with how few clients it begins."""

    join: NonNegative = 300.0
    answer: Positive = 600.0
    pause: NonNegative = 1.0
    least: Size = 1

    @staticmethod
    def of(config: Mapping) -> Timeouts:
        """From the run's configuration: ``join-timeout``, ``timeout``, ``pause``, ``min-clients``."""
        keys = {"join": "join-timeout", "answer": "timeout", "pause": "pause", "least": "min-clients"}
        return Timeouts(**{name: config[key] for name, key in keys.items() if key in config})


@checked
@dataclass(frozen=True)
class Handshake:
    """What a client says when it joins: its number, how many examples it has, and its fingerprint."""

    client: Count
    train: Size
    calibration: Size
    fingerprint: object


@dataclass
class ClientRegistry:
    """The clients of a run: the node of each and its handshake, the bytes it sent and received, and what went wrong."""

    grid: Grid
    run_config: RunConfig
    fingerprint: str
    timeouts: Timeouts
    nodes: dict[int, int] = field(default_factory=dict)
    handshakes: dict[int, Handshake] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)  # nodes
    bytes: Counter[tuple[str, str, int]] = field(default_factory=Counter)  # of "tensors" or "numbers", "up" or "down"
    events: list[dict] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def note(self, event: str, client: int | None = None) -> None:
        """Log an event and keep it."""
        self.events.append({"second": round(time.monotonic() - self.began, 1), "client": client, "what": event})
        log.warning("client %s: %s", "?" if client is None else client, event)

    def wait(self) -> list[int]:
        """The clients that joined, once all have or the time is up. Raises ``RuntimeError`` for too few."""
        end = time.monotonic() + self.timeouts.join
        while len(self.update()) < self.run_config.setting.clients and time.monotonic() < end:
            time.sleep(self.timeouts.pause)
        joined, least = len(self.nodes), self.timeouts.least
        if joined < least:
            raise RuntimeError(f"{joined} clients joined within {self.timeouts.join:g} s, at least {least} are needed")
        return sorted(self.nodes)

    def update(self) -> list[int]:
        """Let new nodes join; the clients whose node is connected now."""
        connected = set(self.grid.get_node_ids())
        new = connected - set(self.nodes.values()) - self.refused
        for node, content, error in self._send("query.join", {node: RecordDict() for node in sorted(new)}):
            handshake = None
            if content is not None:
                try:
                    handshake = Handshake(**content["metrics"], fingerprint=content["config"].get("fingerprint"))
                    error = self._refusal(handshake, node, connected)
                except Exception as problem:  # a part is missing, or is of another type
                    error = f"no proper handshake: {one_line(problem)}"
            if error or not handshake:
                self.note(f"refused: {error}", handshake.client if handshake else None)
                if content is not None:
                    self.refused.add(node)
                continue
            if handshake.client in self.nodes:
                self.note("is back", handshake.client)
            self.nodes[handshake.client] = node
            self.handshakes[handshake.client] = handshake
        return sorted(client for client, node in self.nodes.items() if node in connected)

    def _refusal(self, handshake: Handshake, node: int, connected: set[int]) -> str | None:
        """Why a node cannot take part, if so."""
        if handshake.fingerprint != self.fingerprint:
            return "another backbone, rank, setting or seed than the server's"
        if handshake.client >= self.run_config.setting.clients:
            return f"its number is outside 0 … {self.run_config.setting.clients - 1}"
        known = self.nodes.get(handshake.client, node)
        return "another node already is this client" if known != node and known in connected else None

    def ask(
        self, kind: str, contents: Mapping[int, RecordDict], find_error: FindError = lambda content: None
    ) -> dict[int, RecordDict]:
        """The clients' answers to a message of this kind, ordered by client, without those that are not proper."""
        client_of = {self.nodes[client]: client for client in contents}
        answers = {}
        for client, content in contents.items():
            self._count("down", client, content)
        for node, content, error in self._send(kind, {self.nodes[client]: contents[client] for client in contents}):
            client = client_of[node]
            if content is not None:
                try:
                    self._count("up", client, content)
                    error = find_error(content)
                except Exception as problem:  # a part is missing, or is of another type
                    error = f"no proper answer: {one_line(problem)}"
            if error:
                self.note(f"{kind}: {error}", client)
            else:
                answers[client] = content
        return dict(sorted(answers.items()))

    def _send(
        self, kind: str, contents: Mapping[int, RecordDict]
    ) -> Iterator[tuple[int, RecordDict | None, str | None]]:
        """Each node with its answer, or with ``None`` and the reason why there is no answer."""
        if not contents:
            return
        messages = [Message(content, node, kind) for node, content in contents.items()]
        silent = set(contents)
        reason = f"no answer within {self.timeouts.answer:g} s"
        for reply in self.grid.send_and_receive(messages, timeout=self.timeouts.answer):
            node = reply.metadata.src_node_id
            error = _error_of(reply) if reply.has_error() else None
            if node not in silent:  # the SuperLink answers in the name of a node that is gone, without saying which
                reason = error or reason
                continue
            silent.discard(node)
            yield node, None if error else reply.content, error
        for node in sorted(silent):
            yield node, None, reason

    def _count(self, way: str, client: int, content: RecordDict) -> None:
        """Add what a message weighs: tensors, and the numbers from which the mixing weight comes."""
        if "tensors" in content:
            self.bytes["tensors", way, client] += payload_bytes(content["tensors"])
        numbers = sum(len(value) if isinstance(value, list) else 1 for value in content.get(way, {}).values())
        self.bytes["numbers", way, client] += FLOAT_BYTES * numbers


def numbers_error(record: str, **lengths: int) -> FindError:
    """A check of a record of numbers: as many as asked for by each name, finite, and no variance below 0."""

    def find_error(content: RecordDict) -> str | None:
        for name, length in lengths.items():
            value: Any = content[record][name]
            values = value if length > 1 else [value]
            is_bad = not isinstance(values, list) or len(values) != length or not all(map(math.isfinite, values))
            if is_bad or (name == "variance" and value < 0):
                return f"{name} must be {length} finite numbers, not {shown(value)}"
        return None

    return find_error


def _error_of(reply: Message) -> str:
    """An error's code and the line that says what it was."""
    lines = (reply.error.reason or "no reason given").strip().splitlines()
    return f"error {reply.error.code}: {next((line for line in reversed(lines) if 'Error' in line), lines[-1])}"
