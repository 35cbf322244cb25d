"""One federation and how its models are trained, as numbers: what the command, the notebooks and the benchmarks vary.

This file imports neither torch nor numpy, so that the command answers ``--help`` and bad options at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from .checks import Count, Flag, Positive, PositiveOrInf, Share, Size, checked, invalid

DATA = "fashion-mnist", "wordnet", "wordnet-domains"


@checked
@dataclass(frozen=True)
class Setting:
    """One federation and how its models are trained.

    The defaults were chosen on calibration data of other seeds (``benchmarks/choose_default.py``).
    ``participation``: the share of the clients in each federated round. ``federated_lr_scale`` and ``local_lr_scale``
    multiply ``lr`` for the two models that are merged. With ``local_from_federated`` the local model starts from the
    trained federated one, else from the same initial adapter.
    ``data`` is one of ``DATA``: images, WordNet's glosses with label skew, or a domain of glosses for each client;
    ``backbone`` is a text encoder, by default MiniLM.

    Raises ``ValueError`` for numbers outside their bounds, for unknown data, and for data that does not go with
    ``shift`` or ``backbone``.
    """

    clients: Size = 8
    train_size: Size = 100
    calibration_size: Size = 30
    test_size: Size = 250
    alpha: PositiveOrInf = 0.5
    shift: Flag = False
    rank: Size = 4
    batch_size: Size = 8
    lr: Positive = 4e-3
    federated_lr_scale: Positive = 1.0
    local_lr_scale: Positive = 1.0
    rounds: Count = 40
    round_steps: Count = 5
    local_steps: Count = 100
    participation: Share = 1.0
    local_from_federated: Flag = False
    chunk_size: Size | None = None
    device: str = "cpu"
    data: str = "fashion-mnist"
    backbone: str | None = None

    def __post_init__(self):
        if self.data not in DATA:
            invalid("data", f"one of {', '.join(DATA)}", self.data)
        if self.shift and self.is_text:
            raise ValueError("shift turns and inverts images: it does not go with text")
        if self.backbone is not None and not self.is_text:
            raise ValueError(f"backbone is a text encoder: it does not go with {self.data}")

    def _repr_html_(self) -> str:
        import pandas as pd  # here, so that the command answers at once

        return pd.Series(vars(self), name="Setting", dtype=object).to_frame().to_html()

    @property
    def is_text(self) -> bool:
        """Whether the examples are texts."""
        return self.data.startswith("wordnet")

    @property
    def partition(self) -> dict:
        """The options of ``partition``: the clients and their examples."""
        names = "clients", "train_size", "calibration_size", "test_size", "alpha", "shift"
        return {name: getattr(self, name) for name in names}

    @property
    def total_steps(self) -> int:
        """The optimiser steps of each client for the two models together: every method of a comparison may use them."""
        return self.rounds * self.round_steps + self.local_steps
