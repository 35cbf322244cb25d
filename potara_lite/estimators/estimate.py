"""What an estimator returns, and the groups of tensors it may give weights to.

An estimator takes (backbone, federated stack, local stack, samples) and returns an ``Estimate``. The samples are a
``Split``; which one is the caller's choice, and it matters: on the samples that trained it an over-fitted local model
has hardly any gradient left and looks perfect. ``calibration`` samples trained neither model. ``by`` asks for a weight
per group of tensors instead of one per client (see ``by_layer``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, Stack, check_models, delta, factor_names, is_lora, layer_of, lora_layers
from ..checks import Count, Finite, Named, Numbers, checked, invalid
from ..federation.display import displayed, span
from ..federation.split import Split
from .moments import Moments

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
Grouping = Callable[[str], str]  # from the name of a tensor to the name of its group


def _two(value: Any) -> tuple:
    return tuple(value) if isinstance(value, tuple | list) and len(value) == 2 else invalid("", "a pair", value)


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    return ends if ends[0] <= ends[1] else invalid("", "two numbers, the smaller one first", ends)


# Types in the signatures of estimators: C clients, N samples of the largest client, P coordinates of an adapter.
Gradients = Annotated[Tensor, Numbers("C N P")]  # of each sample's loss; zero for padding
Losses = Annotated[Tensor, Numbers("C N")]  # of each sample; zero for padding
Sizes = Annotated[Tensor, Numbers("C", whole=True, least=1, most="N")]  # each client's number of samples
TrainSizes = Annotated[Tensor, Numbers("C", whole=True, least=1)]  # how many examples each model was trained on
Groups = Annotated[Tensor, Numbers("P", whole=True, least=0, most="P")]  # the number of each coordinate's group
ClientWeights = Annotated[Tensor, Numbers("C", least=0, most=1)]
Two = Annotated[tuple[T, T], BeforeValidator(_two)]
Interval = Annotated[Two[Finite], AfterValidator(_ordered)]


@displayed
@checked
@dataclass(frozen=True, eq=False)
class Estimate:
    """A mixing weight per client ``(C,)``, or with groups a dictionary of them that ``merge_exact`` takes as it is.

    ``moments``: what the weight comes from, where the estimator has moments. ``details``: diagnostics; with groups,
    ``client``, one number per client for tables and pictures, is among them. ``floats``: how many numbers each client
    sends up and gets back for it. Raises ``ValueError`` for weights that are not finite and in [0, 1], and for a
    dictionary of them without ``client``.
    """

    weight: ClientWeights | Named[ClientWeights]
    moments: Moments | None = None
    details: dict[str, Any] = field(default_factory=dict)
    floats: Two[Count] = (0, 0)

    def __post_init__(self):
        if isinstance(self.weight, dict) and "client" not in self.details:
            raise ValueError("details must have the weights that stand for the groups' as 'client'")

    def to_frame(self) -> pd.DataFrame:
        """A row for each client: its weight and, where there are any, its moments."""
        import pandas as pd

        return pd.DataFrame({name: column.cpu().numpy() for name, column in self._columns().items()})

    def _title(self) -> str:
        weight = self.client_weight
        groups = f"; {len(self.weight)} groups of layers" if isinstance(self.weight, dict) else ""
        return f"{len(weight)} clients; λ {span(weight, 2)}, mean {weight.mean():.2f}{groups}"

    def _columns(self) -> dict[str, Tensor]:
        columns = {"weight": self.client_weight}
        if self.moments is not None and self.moments.a.dim() == 1:
            columns |= {name: getattr(self.moments, name) for name in "abc"}
        return columns

    @property
    def client_weight(self) -> Tensor:
        """One weight per client ``(C,)``: the weight itself, or what stands for its groups' weights."""
        return self.details["client"] if isinstance(self.weight, dict) else self.weight


def by_layer(name: str) -> str:
    """A group for each adapted layer and each directly trained layer (its weight and bias together)."""
    return layer_of(name).removesuffix(".weight").removesuffix(".bias")


def head_and_body(name: str) -> str:
    """Two groups: ``body``, the adapted layers, and ``head``, what is trained directly."""
    return "body" if is_lora(name) else "head"


def group_coordinates(
    adapters: Adapter, by: Grouping | None, on_delta: bool = False
) -> tuple[list[str], Tensor | None]:
    """The labels of the groups, and the group of each coordinate ``(P,)`` of ``flatten(adapters)`` or of the deltas."""
    if by is None:
        return [], None
    labels = sorted({by(name) for name in adapters})
    for layer in lora_layers(adapters):
        if len({by(name) for name in factor_names(layer)}) > 1:
            raise ValueError(f"both factors of a layer must be in one group: {layer!r}")
    if on_delta:
        adapters = delta(adapters, dict.fromkeys(lora_layers(adapters), 1.0))
    parts = [torch.full((tensor[0].numel(),), labels.index(by(name))) for name, tensor in adapters.items()]
    return labels, torch.cat(parts).to(next(iter(adapters.values())).device)


def moments_by_groups(moments_of: Callable[[Tensor], Moments], groups: Sequence[Sequence[int]]) -> Moments:
    """The moments of all clients from those of groups of them, each computed from the rows ``(K,)`` of its clients.

    With the groups of ``Split.alike`` the memory of gradients ``(K, N, P)`` follows the number of examples.
    """
    rows = [torch.tensor(group) for group in groups]
    parts = [moments_of(group) for group in rows]
    order = torch.cat(rows).argsort()
    return Moments(*(torch.cat([getattr(part, name) for part in parts])[order] for name in "abc"))


def group_sum(values: Tensor, groups: Tensor | None) -> Tensor:
    """Coordinates ``(C, P)`` summed to ``(C,)``, or to ``(C, G)`` with ``groups`` ``(P,)`` of numbers below G."""
    if groups is None:
        return values.sum(1)
    return values.new_zeros(len(values), int(groups.max()) + 1).index_add(1, groups.long(), values)


def from_moments(moments: Moments, adapters: Adapter, by: Grouping | None) -> Estimate:
    """The estimate with the closed form's weights: one per client, or with ``by`` one for each group's tensors."""
    if by is None:
        return Estimate(moments.weight, moments)
    labels, _ = group_coordinates(adapters, by)
    weight = {layer_of(name): moments.weight[:, labels.index(by(name))] for name in adapters}
    return Estimate(weight, moments, {"client": moments.weight.mean(1)})


@checked
def estimate_uniform(adapted: AdaptedBackbone, federated: Stack, local: Stack, split: Split) -> Estimate:
    """Weight ½ for every client: hard to beat when moments are badly estimated. Costs nothing."""
    check_models(adapted, split, federated=federated, local=local)
    return Estimate(torch.full((len(split),), 0.5, dtype=torch.float64))
