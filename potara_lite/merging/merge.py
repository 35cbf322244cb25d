"""Merge a federated and a local adapter: pure functions of tensors and weights.

The exact merge works on the deltas, ``weight * dW_F + (1 - weight) * dW_L``, by stacking ranks: the result is an
ordinary LoRA adapter of rank 2r. The factor merge mixes A and B separately, as the paper's implementation is reported
to do; its product has cross terms that the theory does not cover.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import SkipValidation
from torch import Tensor
from torch.nn.functional import pad

from ..adapters.state import (
    Adapter,
    CompleteAdapter,
    Weight,
    adapter_from_delta,
    check_count,
    check_same_base,
    check_weight,
    count_clients,
    delta,
    factor_names,
    factors,
    is_lora,
    is_stack,
    layer_of,
    lora_layers,
    match_adapter,
    rank_dim,
)
from ..checks import Flag, List, Numbers, Size, all_finite, checked, invalid

AnyWeight = SkipValidation[Weight]  # check_weight checks it, with the adapter at hand


def _weight_for(name: str, tensor: Tensor, weight: Weight) -> float | Tensor:
    """The weight of one tensor, shaped to multiply it: a number, or ``(C, 1, …)`` for a stack ``(C, ...)``."""
    if isinstance(weight, Mapping):
        weight = weight[layer_of(name)]
    if not isinstance(weight, Tensor) or weight.dim() == 0:
        return weight
    return weight.to(tensor).view(-1, *[1] * (tensor.dim() - 1))


def stack_ranks(adapters: Sequence[Adapter], weights: Sequence[Weight]) -> Adapter:
    """What ``combine_adapters`` computes, without its checks: for use inside ``vmap``."""
    merged: Adapter = {}
    for name, first in adapters[0].items():
        tensors = [adapter[name] for adapter in adapters]
        if not is_lora(name, "A"):
            tensors = [_weight_for(name, tensor, weight) * tensor for tensor, weight in zip(tensors, weights)]
        merged[name] = torch.cat(tensors, dim=rank_dim(name, first)) if is_lora(name) else sum(tensors)
    return merged


@checked
def combine_adapters(adapters: List[CompleteAdapter], weights: List[AnyWeight]) -> Adapter:
    """The adapter whose delta is exactly ``sum_k weights[k] * delta(adapters[k])``, by stacking ranks.

    ``A = [A_1; A_2; …]`` and ``B = [w_1 B_1, w_2 B_2, …]``; directly trained weights are summed. Takes adapters or
    stacks, of any ranks, so a merge can be merged again; a weight is a number, a tensor ``(C,)``
    for a stack, or a dictionary of either with a key per adapted layer
    and directly trained tensor. PEFT calls this ``cat``. Raises ``ValueError`` for adapters of different bases or that
    are not finite, weights that do not fit, and sums that are too large for the adapters' dtype.

    >>> one = {"l.lora_A.weight": torch.ones(1, 2), "l.lora_B.weight": torch.ones(3, 1)}
    >>> combine_adapters([one, one], [0.5, 0.5])["l.lora_B.weight"].shape
    torch.Size([3, 2])
    """
    adapters = check_same_base("adapters", adapters, same_rank=False)
    if len(weights) != len(adapters):
        raise ValueError(f"weights: {len(adapters)} adapters, {len(weights)} weights")
    weights = [check_weight(one, adapters[0], f"weights[{i}]", (None, None)) for i, one in enumerate(weights)]
    merged = stack_ranks(adapters, weights)
    for name, tensor in merged.items():
        if not all_finite(tensor):
            raise ValueError(f"weights: their sum is too large for {tensor.dtype} in {name!r}")
    return merged


def _check_pair(
    federated: Adapter, local: Adapter, weight: Weight, *, same_rank: bool
) -> tuple[Adapter, Adapter, Weight]:
    """Both models in one order of tensors, and the weight.

    Raises ``ValueError`` for models of different bases or numbers of clients, with ``same_rank`` also of different
    ranks, and for a weight that does not fit.
    """
    stacked = bool(is_stack(federated))
    first = {name: tensor[0] for name, tensor in federated.items()} if stacked else federated
    local = match_adapter("local", local, first, stacked=stacked, same_rank=same_rank)
    if stacked:
        check_count("local", local, count_clients(federated))
    return federated, local, check_weight(weight, federated)


def _complement(weight: Weight) -> Weight:
    return {name: 1 - value for name, value in weight.items()} if isinstance(weight, Mapping) else 1 - weight


@checked
def merge_exact(federated: CompleteAdapter, local: CompleteAdapter, weight: AnyWeight) -> Adapter:
    """``weight * dW_F + (1 - weight) * dW_L``, exactly, as an adapter whose rank is the sum of theirs.

    Shapes: see ``combine_adapters``. The ranks of the two may differ.

    Raises ``ValueError`` for a weight outside [0, 1] and models that do not go together.
    """
    federated, local, weight = _check_pair(federated, local, weight, same_rank=False)
    return stack_ranks([federated, local], [weight, _complement(weight)])


@checked
def merge_factors(federated: CompleteAdapter, local: CompleteAdapter, weight: AnyWeight) -> Adapter:
    """A and B mixed separately, rank r: ``(w B_F + (1-w) B_L)(w A_F + (1-w) A_L)``. Not the mix of the deltas.

    It depends on the basis of the factors: (B, A) and (B M, M⁻¹ A) are the same model but merge differently.
    """
    federated, local, weight = _check_pair(federated, local, weight, same_rank=True)
    merged = {}
    for name, tensor in federated.items():
        tensor_weight = _weight_for(name, tensor, weight)
        merged[name] = tensor_weight * tensor + (1 - tensor_weight) * local[name]
    return merged


@checked
def change_basis(adapter: CompleteAdapter, matrix: Annotated[Tensor, Numbers("r r")]) -> Adapter:
    """The same model with other factors: ``(B M, M⁻¹ A)`` in every adapted layer; the head stays.

    ``matrix``: ``(r, r)``, invertible. Takes an adapter or a stack. A rotation keeps the lengths of the factors, the
    identity changes nothing. Raises ``ValueError`` for a matrix of another shape and for one without an inverse.

    >>> one = {"l.lora_A.weight": torch.ones(1, 2), "l.lora_B.weight": torch.ones(3, 1)}
    >>> change_basis(one, torch.tensor([[-2.0]]))["l.lora_A.weight"]
    tensor([[-0.5000, -0.5000]])
    """
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
        if (rank := tensor.shape[dim]) != len(matrix):
            invalid("matrix", f"of shape ({rank}, {rank}), the rank of {name!r}", matrix)
        along_rank = inverse.mT if is_lora(name, "A") else matrix  # Aᵀ M⁻ᵀ and B M
        result[name] = torch.tensordot(tensor, along_rank.to(tensor), dims=([dim], [0])).movedim(-1, dim)
    return result


@checked
def compress(adapter: CompleteAdapter, rank: Size, *, balanced: Flag = True) -> tuple[Adapter, dict[str, Tensor]]:
    """The best adapter of rank ``rank`` (Eckart–Young), and each layer's relative error ``|dW - dW_r| / |dW|``.

    Of ``dW_r = U Σ Vᵀ``, ``balanced`` gives ``√Σ`` to both factors; else ``B = U Σ`` and ``A = Vᵀ``, with orthonormal
    rows: the same delta, but another start for what trains on.

    The SVD is taken of the small core ``R_B R_Aᵀ`` of two QR factorisations; ``dW`` itself is never formed. Takes
    adapters or stacks; the errors have shape ``()`` or ``(C,)``. Raises ``ValueError`` for a rank above the adapter's.
    """
    result, errors = dict(adapter), {}
    for layer in lora_layers(adapter):
        a, b = (factor.double() for factor in factors(adapter, layer))  # (..., k, in), (..., out, k)
        if rank > a.shape[-2]:
            invalid("rank", f"at most {a.shape[-2]}", rank)
        qa, ra = torch.linalg.qr(a.mT)
        qb, rb = torch.linalg.qr(b)
        u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)  # core (..., k, k)
        of_b = s[..., :rank].sqrt() if balanced else s[..., :rank]
        of_a = of_b if balanced else torch.ones_like(of_b)
        new_a = of_a.unsqueeze(-1) * (vh[..., :rank, :] @ qa.mT)  # (..., rank, in)
        new_b = qb @ u[..., :rank] * of_b.unsqueeze(-2)  # (..., out, rank)
        missing = rank - new_a.shape[-2]  # above 0 where the layer is narrower than the rank
        factor_pair = pad(new_a, (0, 0, 0, missing)), pad(new_b, (0, missing))
        for name, matrix in zip(factor_names(layer), factor_pair):
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


def drop_empty_ranks(adapter: Adapter) -> Adapter:
    """The same deltas without the ranks of one adapter whose column of B is zero; one of each layer stays."""
    result = dict(adapter)
    for layer in lora_layers(adapter):
        _, b = factors(adapter, layer)
        used = b.any(0).nonzero()[:, 0]
        used = used if len(used) else used.new_zeros(1)
        for name in factor_names(layer):
            result[name] = adapter[name].index_select(rank_dim(name, adapter[name]), used)
    return result


def limit_rank(adapter: Adapter) -> Adapter:
    """The same deltas with no rank above the smaller side of the layer: there, one factor is the identity."""
    too_wide: Adapter = {}
    for layer in lora_layers(adapter):
        a, b = factors(adapter, layer)
        if a.shape[-2] > min(a.shape[-1], b.shape[-2]):
            too_wide |= {name: adapter[name] for name in factor_names(layer)}
    if not too_wide:
        return adapter
    unscaled = dict.fromkeys(lora_layers(too_wide), 1.0)
    return adapter | adapter_from_delta(delta(too_wide, unscaled), unscaled, too_wide)
