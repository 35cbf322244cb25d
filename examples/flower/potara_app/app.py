"""The client app and the server app. A client uses its part of the shipped images, or a folder with its own data.

If a node's configuration names a folder ``data``, its ``train.npz`` and ``test.npz`` are read: ``images``
``(n, 28, 28)`` of bytes and ``labels`` ``(n,)`` from 0 to 9. Change ``load`` for another backbone or other data: it
returns the backbone with its empty adapter, the same at every client and at the server, and a federation of this one
client.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from potara_lite import AdaptedBackbone, Federation, attach, from_tensors, lab_vit
from potara_lite.deployment import RunConfig, client_app, load_lab_client, server_app
from potara_lite.deployment.run_config import Config

torch.set_num_threads(1)  # several clients share this machine's cores


def read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1] and labels."""
    with np.load(path, allow_pickle=False) as file:
        return torch.from_numpy(file["images"]).unsqueeze(1) / 255, torch.from_numpy(file["labels"]).long()


def load(run_config: RunConfig, client: int, node: Config) -> tuple[AdaptedBackbone, Federation]:
    """This client's backbone and data."""
    if not node.get("data"):
        return load_lab_client(run_config, client, node)
    folder = Path(str(node["data"]))
    train, test = read(folder / "train.npz"), read(folder / "test.npz")
    size, seed = run_config.setting.calibration_size, run_config.seed
    alone = from_tensors([train], [test], calibration_size=size, classes=10, seed=seed, name=folder.name)
    splits = [replace(split, ids=(client,)) for split in (alone.train, alone.calibration, alone.test)]
    federation = Federation(*splits, alone.classes, alone.name)
    backbone = lab_vit(10)
    return attach(backbone, rank=run_config.setting.rank, seed=seed), federation.map(backbone.embed)


client = client_app(load)
server = server_app()
