"""Training that stops and goes on: the state of a run as one safetensors file, and the rounds of ``fedit`` on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .. import __version__
from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, AnyAdapter
from ..checks import Count, PathLike, checked, invalid
from ..federation.split import Split
from ..files import FileError, check_same_run, digest, fingerprint, reading, tensor_digest, write_atomically
from .train import OptimizerState

ROUNDS_FILE = "rounds.safetensors"


@checked
def save_state(path: PathLike, adapter: AnyAdapter, state: OptimizerState, start: Count = 0) -> Path:
    """Write what a run goes on from: the adapter (or stack), the optimiser's state and the rounds or steps done.

    One safetensors file, replaced in one step. ``load_state`` reads it back.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = _prefixed("adapter", adapter) | _prefixed("state", vars(state))
    _write(path, tensors, {"start": str(start)})
    return path


@checked
def load_state(path: PathLike) -> dict[str, Any]:
    """What ``save_state`` wrote, by the names of the arguments that go on from it: ``adapter``, ``state``, ``start``.

    ``fedit(adapted, split, rounds=…, local_steps=…, **load_state(path))`` plays the next rounds; ``train`` takes the
    first one, a stack there, as ``adapters``. The tensors are on the CPU; ``state.to(device)`` moves the optimiser's.

    Raises ``FileError`` (a ``ValueError``) for a file that is missing, damaged or none of ``save_state``.

    >>> import tempfile
    >>> stack = {"head.weight": torch.ones(2, 3)}
    >>> path = save_state(f"{tempfile.mkdtemp()}/half.safetensors", stack, OptimizerState.zeros(torch.ones(2, 3)), 5)
    >>> load_state(path)["start"]
    5
    """
    tensors, facts = _read(Path(path))
    with reading(path):
        state = OptimizerState(**_part("state", tensors))
        return {"adapter": _part("adapter", tensors), "state": state, "start": int(facts["start"])}


@dataclass(frozen=True)
class RoundsOnDisk:
    """The folder in which ``fedit`` keeps its last whole round; without a ``path`` it keeps nothing.

    ``config``: what the rounds are made with, as JSON.
    """

    path: Path | None = None
    config: str = ""

    def read(self) -> tuple[Adapter, OptimizerState, Mapping[str, Tensor]] | None:
        """The adapter, the optimiser's state and the columns of every round so far, ``(rounds, C)`` each, or nothing.

        Raises ``FileError`` for a damaged file, and for rounds that other arguments made.
        """
        if self.path is None:
            return None
        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / ".lock"):
            if not (self.path / ROUNDS_FILE).exists():
                return None
            tensors, facts = _read(self.path / ROUNDS_FILE)
            self._check(facts)
        return _part("adapter", tensors), OptimizerState(**_part("state", tensors)), _part("round", tensors)

    def write(self, adapter: Adapter, state: OptimizerState, columns: Mapping[str, Tensor]) -> None:
        """Put a round in the place of the one before it. Raises ``FileError`` if another run has taken the folder."""
        if self.path is None:
            return
        tensors = _prefixed("adapter", adapter) | _prefixed("state", vars(state)) | _prefixed("round", columns)
        with FileLock(self.path / ".lock"):
            if (self.path / ROUNDS_FILE).exists():
                self._check(_read_facts(self.path / ROUNDS_FILE))
            _write(self.path / ROUNDS_FILE, tensors, {"config": self.config})

    def _check(self, facts: Mapping[str, str]) -> None:
        with reading(self.path / ROUNDS_FILE):
            found = facts["config"]
            try:
                check_same_run(self.path, found, self.config)
            except FileError as error:
                raise FileError(f"{error}; name another checkpoint, or delete this one") from error


def rounds_on_disk(
    path: str | Path | None, adapted: AdaptedBackbone, split: Split, adapter: Adapter, state: OptimizerState, **facts
) -> RoundsOnDisk:
    """The folder of a run with these ``facts``, which are numbers, flags, functions, dataclasses, or lists of them.

    The frozen weights, the data and what the run starts from count by their digests.
    """
    if path is None:
        return RoundsOnDisk()
    if Path(path).exists() and not Path(path).is_dir():
        invalid("checkpoint", "a folder", str(path))
    trained = set(adapted.parameter_names.values())
    frozen = {name: tensor for name, tensor in adapted.model.state_dict().items() if name not in trained}
    x, y, _ = split.joined()
    inputs = x if isinstance(x, dict) else {"x": x}
    config = {
        **{name: _plain(value) for name, value in facts.items()},
        "clients": list(split.ids),
        "data": tensor_digest(inputs | {"labels": y, "sizes": split.sizes}),
        "backbone": tensor_digest(frozen),
        "scaling": digest(json.dumps(adapted.scaling)),
        "task": fingerprint(adapted.task),
        "adapter": tensor_digest(adapter),
        "state": tensor_digest(vars(state)),
        "device": adapted.device.type,
        "versions": {"potara_lite": __version__, "torch": torch.__version__},
    }
    return RoundsOnDisk(Path(path), json.dumps(config))


def _plain(value: Any) -> Any:
    """An argument as JSON can hold it: a function by its name and code, a dataclass by its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if callable(value):
        return f"{getattr(value, '__qualname__', type(value).__qualname__)} {fingerprint(value)}"
    return value if isinstance(value, str | int | float | None) else str(value)


def _prefixed(part: str, tensors: Mapping[str, Tensor]) -> Adapter:
    return {f"{part}/{name}": tensor for name, tensor in tensors.items()}


def _part(part: str, tensors: Mapping[str, Tensor]) -> Adapter:
    """The tensors of one part of a file, by their names."""
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")}
    return {name.partition("/")[2]: tensor for name, tensor in found.items()}


def _write(path: Path, tensors: Adapter, facts: dict[str, str]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(
        path, save(tensors, metadata=facts | {"order": "\n".join(tensors), "digest": tensor_digest(tensors)})
    )


def _read_facts(path: Path) -> dict[str, str]:
    with reading(path), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _read(path: Path) -> tuple[Adapter, dict[str, str]]:
    """The tensors of a file in the order in which they were written, and the facts beside them."""
    with reading(path), safe_open(path, framework="pt") as file:
        facts = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in facts["order"].split("\n")}
        if tensor_digest(tensors) != facts["digest"]:
            raise ValueError("it is damaged or was changed by hand")
        return tensors, facts
