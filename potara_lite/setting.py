"""One federation and how its models are trained, as numbers: what the command, the notebooks and the benchmarks vary.

This file imports nothing heavy, so that the command answers ``--help`` and bad options at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from .checks import Count, Flag, Positive, PositiveOrInf, Size, checked, shown

DATA = "fashion-mnist", "wordnet", "wordnet-domains"


@checked
@dataclass(frozen=True)
class Setting:
    """One federation and how its models are trained. The defaults were chosen on calibration data of other seeds
    (``benchmarks/choose_default.py``). ``federated_lr_scale`` and ``local_lr_scale`` multiply ``lr`` for the two models
    that are merged; with ``local_from_federated`` the local one starts from the finished federated one instead of
    independently of it. ``data`` is one of ``DATA``: images, WordNet's glosses with label skew, or a domain of them per
    client; ``backbone`` is a text encoder, by default MiniLM.

    Raises ``ValueError`` for what is no number of its kind (numpy's will do), sizes below 1, negative lengths, rates or
    ``alpha`` that are not positive, and data that is not known or does not go with ``shift`` or ``backbone``.
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
    local_from_federated: Flag = False
    chunk_size: Size | None = None
    device: str = "cpu"
    data: str = "fashion-mnist"
    backbone: str | None = None

    def __post_init__(self):
        if self.data not in DATA:
            raise ValueError(f"data must be one of {', '.join(DATA)}, not {shown(self.data)}")
        if self.shift and self.is_text:
            raise ValueError("shift turns and inverts images: it does not go with text")
        if self.backbone is not None and not self.is_text:
            raise ValueError(f"backbone is a text encoder: it does not go with {self.data}")

    @property
    def is_text(self) -> bool:
        """Whether the examples are texts."""
        return self.data.startswith("wordnet")

    @property
    def partition(self) -> dict:
        """What a data set is told about the clients and their examples."""
        names = "clients", "train_size", "calibration_size", "test_size", "alpha", "shift"
        return {name: getattr(self, name) for name in names}

    @property
    def total_steps(self) -> int:
        """The optimiser steps per client of the two models together: the budget of every method that is compared."""
        return self.rounds * self.round_steps + self.local_steps
