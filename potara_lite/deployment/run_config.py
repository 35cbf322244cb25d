"""What the server and its clients agree on: the configuration of a run, and how tensors travel.

It comes from Flower's run configuration, whose keys are the fields of ``Setting`` with hyphens (``train-size``),
``method`` (a name of ``ALGORITHMS``) and ``seed``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields

import torch
from flwr.app import ArrayRecord

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, adapter_bytes
from ..baselines.algorithms import ALGORITHMS
from ..baselines.rounds import Algorithm
from ..checks import Count, Seed, checked
from ..experiment import prepare, training_options
from ..federation.split import Federation
from ..setting import Setting

Config = Mapping[str, str | int | float | bool]
LoadClient = Callable[["RunConfig", int, Config], tuple[AdaptedBackbone, Federation]]  # the int: the client's number
LoadBackbone = Callable[["RunConfig"], AdaptedBackbone]


@checked
@dataclass(frozen=True)
class RunConfig:
    """One run: its setting, its algorithm, the seed of everything that is drawn."""

    setting: Setting
    algorithm: Algorithm
    seed: Seed = 0

    @staticmethod
    def of(config: Config, algorithms: Mapping[str, Algorithm] = ALGORITHMS) -> RunConfig:
        """From Flower's run configuration. Raises ``ValueError`` for an unknown method and what ``Setting`` refuses.

        >>> run_config = RunConfig.of({"method": "FedSA-LoRA", "clients": 3, "round-steps": 2})
        >>> run_config.algorithm.name, run_config.setting.clients, run_config.setting.round_steps
        ('FedSA-LoRA', 3, 2)
        """
        if (method := config.get("method", "FedIT")) not in algorithms:
            raise ValueError(f"method {method!r} is none of {sorted(algorithms)}")
        names = {field.name for field in fields(Setting)}
        given = {key.replace("-", "_"): value for key, value in config.items()}
        setting = Setting(**{name: value for name, value in given.items() if name in names})
        return RunConfig(setting, algorithms[method], config.get("seed", 0))

    @property
    def training(self) -> dict:
        """The options of ``client_step``, but for the round's number."""
        options = training_options(self.setting, self.setting.federated_lr_scale)
        return options | dict(local_steps=self.setting.round_steps, seed=self.seed)

    def fingerprint(self, adapted: AdaptedBackbone) -> str:
        """SHA-256 of what all must have in common: the setting, the adapter's tensors, the frozen weights."""
        setting = {name: value for name, value in asdict(self.setting).items() if name not in ("device", "chunk_size")}
        digest = hashlib.sha256(json.dumps([setting, self.algorithm.name, self.seed]).encode())
        trained = set(adapted.parameter_names.values())
        frozen = {name: tensor for name, tensor in adapted.model.state_dict().items() if name not in trained}
        for name, tensor in [*sorted(adapted.initial.items()), *sorted(frozen.items())]:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@checked
def load_lab_client(run_config: RunConfig, client: Count, node_config: Config) -> tuple[AdaptedBackbone, Federation]:
    """The lab ViT and this client's part of the shipped Fashion-MNIST federation."""
    adapted, federation = prepare(run_config.setting, run_config.seed)
    return adapted, federation.rows([client])


@checked
def load_lab_backbone(run_config: RunConfig) -> AdaptedBackbone:
    """The lab ViT with an empty adapter."""
    return prepare(run_config.setting, run_config.seed)[0]


def to_record(stack: Adapter) -> ArrayRecord:
    """The tensors of a stack of one client, without the client dimension, as they travel."""
    return ArrayRecord({name: tensor[0].detach().cpu().contiguous() for name, tensor in stack.items()})


def from_record(record: ArrayRecord, device: str | torch.device = "cpu") -> Adapter:
    """The stack of one client that ``to_record`` was given."""
    return {name: tensor.clone().unsqueeze(0).to(device) for name, tensor in record.to_torch_state_dict().items()}


def payload_bytes(record: ArrayRecord) -> int:
    """The bytes of the tensors in a record; each also has a header of some 130 bytes."""
    return adapter_bytes(record.to_torch_state_dict())
