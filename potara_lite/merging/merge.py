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

from ..adapters.state import (
    Adapter,
    adapter_from_delta,
    delta,
    door,
    factor_names,
    factors,
    is_lora,
    layer_of,
    lora_layers,
    mixing_weights,
    models,
    numbers,
    rank_dim,
    whole_adapter,
)
from ..checks import all_finite, unchecked, whole

Weight = float | Tensor | dict[str, Tensor]


def _weight_for(name: str, tensor: Tensor, weight: Weight) -> float | Tensor:
    """The weight of one tensor, shaped to multiply it: a number, or ``(C, 1, …)`` for a stack ``(C, ...)``."""
    if isinstance(weight, dict):
        weight = weight[layer_of(name)]
    if not isinstance(weight, Tensor) or weight.dim() == 0:
        return weight
    return weight.to(tensor).view(-1, *[1] * (tensor.dim() - 1))


@door(adapters=models, weights=mixing_weights)
def combine_adapters(adapters: Sequence[Adapter], weights: Sequence[Weight]) -> Adapter:
    """The adapter whose delta is exactly ``sum_k weights[k] * delta(adapters[k])``, by stacking ranks.

    ``A = [A_1; A_2; …]`` and ``B = [w_1 B_1, w_2 B_2, …]``; directly trained weights are summed. Takes adapters or
    stacks; a weight is a number, a tensor ``(C,)`` for a stack, or a dictionary of either with a key per adapted layer
    and directly trained tensor. PEFT calls this ``cat``. Raises ``ValueError`` for adapters of different bases or that
    are not finite, weights that do not fit, and sums that are too large for the adapters' dtype.

    >>> one = {"l.lora_A.weight": torch.ones(1, 2), "l.lora_B.weight": torch.ones(3, 1)}
    >>> combine_adapters([one, one], [0.5, 0.5])["l.lora_B.weight"].shape
    torch.Size([3, 2])
    """
    merged: Adapter = {}
    for name, first in adapters[0].items():
        tensors = [adapter[name] for adapter in adapters]
        if not is_lora(name, "A"):
            tensors = [_weight_for(name, tensor, weight) * tensor for tensor, weight in zip(tensors, weights)]
        merged[name] = torch.cat(tensors, dim=rank_dim(name, first)) if is_lora(name) else sum(tensors)
        if not all_finite(merged[name]):
            raise ValueError(f"weights: their sum is too large for {merged[name].dtype} in {name!r}")
    return merged


def _complement(weight: Weight) -> Weight:
    return {name: 1 - value for name, value in weight.items()} if isinstance(weight, dict) else 1 - weight


@door()
def merge_exact(federated: Adapter, local: Adapter, weight: Weight) -> Adapter:
    """``weight * dW_F + (1 - weight) * dW_L``, exactly, as an adapter of rank 2r. Shapes: see ``combine_adapters``.

    Raises ``ValueError`` for a weight outside [0, 1] and models that do not go together.
    """
    return unchecked(combine_adapters)([federated, local], [weight, _complement(weight)])


@door()
def merge_factors(federated: Adapter, local: Adapter, weight: Weight) -> Adapter:
    """A and B mixed separately, rank r: ``(w B_F + (1-w) B_L)(w A_F + (1-w) A_L)``. Not the mix of the deltas.

    It depends on the basis of the factors: (B, A) and (B M, M⁻¹ A) are the same model but merge differently.
    """
    merged = {}
    for name, tensor in federated.items():
        share = _weight_for(name, tensor, weight)
        merged[name] = share * tensor + (1 - share) * local[name]
    return merged


@door(adapter=whole_adapter, matrix=numbers(2))
def change_basis(adapter: Adapter, matrix: Tensor) -> Adapter:
    """The same model with other factors: ``(B M, M⁻¹ A)`` in every adapted layer; the head stays.

    ``matrix``: ``(r, r)``, invertible. Takes an adapter or a stack. A rotation keeps the lengths of the factors, the
    identity changes nothing. Raises ``ValueError`` for a matrix of another shape and for one without an inverse.

    >>> one = {"l.lora_A.weight": torch.ones(1, 2), "l.lora_B.weight": torch.ones(3, 1)}
    >>> change_basis(one, torch.tensor([[-2.0]]))["l.lora_A.weight"]
    tensor([[-0.5000, -0.5000]])
    """
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix must be square, not of shape {tuple(matrix.shape)}")
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.double()
    inverse, failed = torch.linalg.inv_ex(matrix)
    if failed:
        raise ValueError("the matrix has no inverse, so it is no change of basis")
    result = dict(adapter)
    for name, tensor in adapter.items():
        if not is_lora(name):
            continue
        dim = rank_dim(name, tensor)
        if matrix.shape != (rank := tensor.shape[dim], rank):
            raise ValueError(f"{name}: a basis of rank {rank} is changed by a square matrix of as many rows")
        turn = inverse.mT if is_lora(name, "A") else matrix  # along the rank: Aᵀ M⁻ᵀ and B M
        result[name] = torch.tensordot(tensor, turn.to(tensor), dims=([dim], [0])).movedim(-1, dim)
    return result


@door(adapter=whole_adapter, rank=whole(None))
def compress(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, Tensor]]:
    """The best adapter of rank ``rank`` (Eckart–Young), and each layer's relative error ``|dW - dW_r| / |dW|``.

    The SVD is taken of the small core ``R_B R_Aᵀ`` of two QR factorisations; ``dW`` itself is never formed. Takes
    adapters or stacks; the errors have shape ``()`` or ``(C,)``.
    """
    result, errors = dict(adapter), {}
    for layer in lora_layers(adapter):
        a, b = (factor.double() for factor in factors(adapter, layer))  # (..., k, in), (..., out, k)
        if not 1 <= rank <= a.shape[-2]:
            raise ValueError(f"rank must be between 1 and {a.shape[-2]}, not {rank}")
        qa, ra = torch.linalg.qr(a.mT)
        qb, rb = torch.linalg.qr(b)
        u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)  # core (..., k, k)
        root = s[..., :rank].sqrt()
        new_a = root.unsqueeze(-1) * (vh[..., :rank, :] @ qa.mT)  # (..., rank, in)
        new_b = qb @ u[..., :rank] * root.unsqueeze(-2)  # (..., out, rank)
        if (spare := rank - new_a.shape[-2]) > 0:  # the layer is narrower than the rank
            new_a, new_b = pad(new_a, (0, 0, 0, spare)), pad(new_b, (0, spare))
        for name, matrix in zip(factor_names(layer), (new_a, new_b)):
            shape = list(adapter[name].shape)
            shape[rank_dim(name, adapter[name])] = rank
            result[name] = matrix.to(adapter[name].dtype).reshape(shape)
        total = s.square().sum(-1)
        errors[layer] = (s[..., rank:].square().sum(-1) / total.clamp_min(torch.finfo(s.dtype).tiny)).sqrt()
    return result, errors


def concat_ranks(adapter: Adapter, other: Adapter) -> Adapter:
    """The adapter whose deltas are the sum of the two, by stacking ranks; ``other`` may have any rank and no head."""
    result = dict(adapter)
    for name, tensor in other.items():
        result[name] = torch.cat([result[name], tensor], dim=rank_dim(name, tensor)) if name in result else tensor
    return result


def limit_rank(adapter: Adapter) -> Adapter:
    """The same deltas with no rank above the smaller side of the layer: there, one factor is the identity."""
    wide = {}
    for layer in lora_layers(adapter):
        a, b = factors(adapter, layer)
        if a.shape[-2] > min(a.shape[-1], b.shape[-2]):
            wide |= {name: adapter[name] for name in factor_names(layer)}
    unscaled = dict.fromkeys(lora_layers(wide), 1.0)
    return adapter | adapter_from_delta(unchecked(delta)(wide, unscaled), unscaled, wide)
