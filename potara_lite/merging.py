"""Merge a federated and a local adapter: pure functions of tensors and weights.

The exact merge works on the deltas, ``weight * dW_F + (1 - weight) * dW_L``, by stacking ranks: the result is an
ordinary LoRA adapter of rank 2r. The factor merge mixes A and B separately, as the paper's implementation is reported
to do; its product has cross terms that the theory says nothing about.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .adapters import Adapter, check_same_base, lora_layers

__all__ = ["beside", "combine", "compress", "from_delta", "merge_exact", "merge_factors", "thin"]

Weight = float | Tensor | dict[str, Tensor]


def _client_dims(tensor: Tensor) -> int:
    """1 for a stack, 0 for one adapter; a LoRA factor has 2 dimensions of its own, a convolution's has 4."""
    return tensor.dim() % 2


def _spread(weight: float | Tensor, tensor: Tensor) -> float | Tensor:
    """A weight per client ``(C,)`` shaped to multiply a stacked tensor ``(C, ...)``."""
    if not isinstance(weight, Tensor) or weight.dim() == 0:
        return weight
    if len(weight) != len(tensor):
        raise ValueError(f"{len(weight)} weights for a stack of {len(tensor)} clients")
    return weight.to(tensor).view(-1, *[1] * (tensor.dim() - 1))


def _weight_of(weight: Weight, name: str) -> float | Tensor:
    """The weight of one adapted layer or directly trained tensor."""
    if not isinstance(weight, dict):
        return weight
    if name not in weight:
        raise ValueError(f"no mixing weight for {name!r}")
    return weight[name]


def combine(adapters: Sequence[Adapter], weights: Sequence[Weight]) -> Adapter:
    """The adapter whose delta is exactly ``sum_k weights[k] * delta(adapters[k])``, by stacking ranks.

    ``A = [A_1; A_2; …]`` and ``B = [w_1 B_1, w_2 B_2, …]``; directly trained weights are summed. Takes adapters or
    stacks; a weight is a number, a tensor ``(C,)`` for a stack, or a dictionary of either with a key per adapted layer
    and directly trained tensor. PEFT calls this ``cat``.

    >>> one = {"l.lora_A.weight": torch.ones(1, 2), "l.lora_B.weight": torch.ones(3, 1)}
    >>> combine([one, one], [0.5, 0.5])["l.lora_B.weight"].shape
    torch.Size([3, 2])
    """
    if len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters, {len(weights)} weights")
    check_same_base(*adapters)
    merged: Adapter = {}
    for name, first in adapters[0].items():
        tensors = [adapter[name] for adapter in adapters]
        if name.endswith(".lora_A.weight"):
            merged[name] = torch.cat(tensors, dim=_client_dims(first))
            continue
        key = name.removesuffix(".lora_B.weight")
        scaled = [_spread(_weight_of(weight, key), tensor) * tensor for weight, tensor in zip(weights, tensors)]
        merged[name] = torch.cat(scaled, dim=_client_dims(first) + 1) if key != name else sum(scaled)
    return merged


def _complement(weight: Weight) -> Weight:
    return {name: 1 - value for name, value in weight.items()} if isinstance(weight, dict) else 1 - weight


def merge_exact(federated: Adapter, local: Adapter, weight: Weight) -> Adapter:
    """``weight * dW_F + (1 - weight) * dW_L``, exactly, as an adapter of rank 2r. See ``combine`` for the shapes."""
    return combine([federated, local], [weight, _complement(weight)])


def merge_factors(federated: Adapter, local: Adapter, weight: Weight) -> Adapter:
    """A and B mixed separately, rank r: ``(w B_F + (1-w) B_L)(w A_F + (1-w) A_L)``. Not the mix of the deltas.

    It depends on the basis of the factors: (B, A) and (B M, M⁻¹ A) are the same model but merge differently.
    """
    check_same_base(federated, local)
    merged = {}
    for name, one in federated.items():
        share = _spread(_weight_of(weight, name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")), one)
        merged[name] = share * one + (1 - share) * local[name]
    return merged


def compress(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, Tensor]]:
    """The best adapter of rank ``rank`` (Eckart–Young), and each layer's relative error ``|dW - dW_r| / |dW|``.

    The SVD is taken of the small core ``R_B R_Aᵀ`` of two QR factorisations; ``dW`` itself is never formed. Takes
    adapters or stacks; the errors have shape ``()`` or ``(C,)``.
    """
    result, errors = dict(adapter), {}
    for layer in lora_layers(adapter):
        a, b = adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"]
        lead = _client_dims(a)
        if not 1 <= rank <= a.shape[lead]:
            raise ValueError(f"rank must be between 1 and {a.shape[lead]}, not {rank}")
        flat_a, flat_b = a.flatten(lead + 1).double(), b.flatten(lead + 1).double()  # (..., k, in), (..., out, k)
        qa, ra = torch.linalg.qr(flat_a.mT)
        qb, rb = torch.linalg.qr(flat_b)
        u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)  # core (..., k, k)
        root = s[..., :rank].sqrt()
        new_a = root.unsqueeze(-1) * (vh[..., :rank, :] @ qa.mT)  # (..., rank, in)
        new_b = qb @ u[..., :rank] * root.unsqueeze(-2)  # (..., out, rank)
        if (spare := rank - new_a.shape[-2]) > 0:  # the layer is narrower than the rank
            new_a, new_b = pad(new_a, (0, 0, 0, spare)), pad(new_b, (0, spare))
        result[f"{layer}.lora_A.weight"] = new_a.to(a.dtype).reshape(*a.shape[:lead], rank, *a.shape[lead + 1 :])
        result[f"{layer}.lora_B.weight"] = new_b.to(b.dtype).reshape(*b.shape[: lead + 1], rank, *b.shape[lead + 2 :])
        total = s.square().sum(-1)
        errors[layer] = (s[..., rank:].square().sum(-1) / total.clamp_min(torch.finfo(s.dtype).tiny)).sqrt()
    return result, errors


def beside(adapter: Adapter, other: Adapter) -> Adapter:
    """The adapter whose deltas are the sum of the two, by stacking ranks; ``other`` may have any rank and no head."""
    result = dict(adapter)
    for name, tensor in other.items():
        rank = _client_dims(tensor) + name.endswith("lora_B.weight")
        result[name] = torch.cat([result[name], tensor], dim=rank) if name in result else tensor
    return result


def _identity_factors(dense: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``dense`` (..., out, in) as factors shaped like A and B but for the rank: the one on its smaller side is 1."""
    lead, (out, wide) = _client_dims(a), dense.shape[-2:]
    one = torch.eye(min(out, wide)).to(dense).expand(*dense.shape[:-2], -1, -1)
    new_a, new_b = (dense, one) if out <= wide else (one, dense)
    new_a = new_a.reshape(*a.shape[:lead], -1, *a.shape[lead + 1 :])
    return new_a, new_b.reshape(*b.shape[: lead + 1], -1, *b.shape[lead + 2 :])


def thin(adapter: Adapter) -> Adapter:
    """The same deltas with no rank above the smaller side of the layer: there, one factor is the identity."""
    result = dict(adapter)
    for layer in lora_layers(adapter):
        names = [f"{layer}.lora_{factor}.weight" for factor in "AB"]
        a, b = (adapter[name] for name in names)
        lead = _client_dims(a)
        flat_a, flat_b = a.flatten(lead + 1), b.flatten(lead + 1)  # (..., k, in), (..., out, k)
        if a.shape[lead] > min(flat_a.shape[-1], flat_b.shape[-2]):
            result |= zip(names, _identity_factors(flat_b @ flat_a, a, b))
    return result


def from_delta(change: Adapter, scaling: dict[str, float], like: Adapter) -> Adapter:
    """The adapter of full rank whose ``delta`` is ``change``, exactly: one factor of each layer is the identity.

    ``like`` gives the names and, but for the rank, the shapes. ``compress`` makes it small and says at what error.
    """
    result = {name: tensor for name, tensor in change.items() if name in like}
    for layer in lora_layers(like):
        names = [f"{layer}.lora_{factor}.weight" for factor in "AB"]
        result |= zip(names, _identity_factors(change[f"{layer}.weight"] / scaling[layer], *(like[n] for n in names)))
    return {name: result[name] for name in like}
