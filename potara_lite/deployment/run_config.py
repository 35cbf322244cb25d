"""What a server and its clients agree on: the run's configuration as a run_config, and how tensors travel.

The run_config comes from Flower's run configuration, whose keys are the fields of ``Setting`` with hyphens (``train-size``),
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
from ..checks import check_fields, door, kind, whole
from ..experiment import prepare, training_options
from ..federation.split import Federation
from ..setting import Setting

Config = Mapping[str, str | int | float | bool]
LoadClient = Callable[
    ["RunConfig", int, Config], tuple[AdaptedBackbone, Federation]
]  # run_config, client, node's configuration
LoadBackbone = Callable[["RunConfig"], AdaptedBackbone]


@dataclass(frozen=True)
class RunConfig:
    """One run: its setting, its algorithm, the seed of everything that is drawn."""

    setting: Setting
    algorithm: Algorithm
    seed: int = 0

    def __post_init__(self):
        check_fields(self)

    @staticmethod
    def of(config: Config, algorithms: Mapping[str, Algorithm] = ALGORITHMS) -> RunConfig:
        """The run_config of a run's configuration. Raises ``ValueError`` for an unknown method and what ``Setting`` refuses.

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
        """What ``client_step`` is told beside the round's number."""
        setting = self.setting
        options = training_options(setting, setting.federated_lr_scale)
        return options | dict(local_steps=setting.round_steps, seed=self.seed)

    def fingerprint(self, adapted: AdaptedBackbone) -> str:
        """SHA-256 of what all must have in common: the setting, the adapter's tensors, the frozen weights."""
        setting = {name: value for name, value in asdict(self.setting).items() if name not in ("device", "chunk_size")}
        digest = hashlib.sha256(json.dumps([setting, self.algorithm.name, self.seed]).encode())
        ours = set(adapted.parameter_names.values())
        frozen = {name: tensor for name, tensor in adapted.model.state_dict().items() if name not in ours}
        for name, tensor in [*sorted(adapted.initial.items()), *sorted(frozen.items())]:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@door(run_config=kind("RunConfig"), client=whole(0))
def load_lab_client(run_config: RunConfig, client: int, node_config: Config) -> tuple[AdaptedBackbone, Federation]:
    """The lab ViT and this client's part of the shipped Fashion-MNIST federation."""
    adapted, federation = prepare(run_config.setting, run_config.seed)
    return adapted, federation.rows([client])


@door(run_config=kind("RunConfig"))
def load_lab_backbone(run_config: RunConfig) -> AdaptedBackbone:
    """The lab ViT with an empty adapter."""
    return prepare(run_config.setting, run_config.seed)[0]


def to_record(stack: Adapter) -> ArrayRecord:
    """The tensors of a stack of one client, without the client dimension, as they travel."""
    return ArrayRecord({name: tensor[0].detach().cpu().contiguous() for name, tensor in stack.items()})


def from_record(record: ArrayRecord, device: str | torch.device = "cpu") -> Adapter:
    """A stack of one client from what travelled."""
    return {name: tensor.clone().unsqueeze(0).to(device) for name, tensor in record.to_torch_state_dict().items()}


def payload_bytes(record: ArrayRecord) -> int:
    """What the tensors in a record weigh; each also has a header of some 130 bytes."""
    return adapter_bytes(record.to_torch_state_dict())
