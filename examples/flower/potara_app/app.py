"""The two halves of the app. A client takes its part of the shipped images, or brings a folder of its own.

A node whose configuration names ``data`` reads ``train.npz`` and ``test.npz`` there: ``images`` ``(n, 28, 28)`` of
bytes and ``labels`` ``(n,)`` from 0 to 9. Change ``load`` for any other backbone or data: it returns the backbone with
its empty adapter, the same at every client and at the server, and a federation of this one client.
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
    held = run_config.setting.calibration_size
    mine = from_tensors([train], [test], calibration_size=held, classes=10, seed=run_config.seed, name=folder.name)
    mine = Federation(
        *(replace(part, ids=(client,)) for part in (mine.train, mine.calibration, mine.test)), 10, mine.name
    )
    backbone = lab_vit(10)
    return attach(backbone, rank=run_config.setting.rank, seed=run_config.seed), mine.map(backbone.embed)


client = client_app(load)
server = server_app()
