"""Checkers of notebook 01: what a federation averages, what it sends, and by how much the average misses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...adapters.state import Adapter
from .checking import check

FEDAVG_SLIPS: dict[str, Callable[[Adapter, Tensor], Adapter]] = {
    "every client counts alike here; a client with more images is to count for more": lambda stack, sizes: {
        name: tensor.mean(0) for name, tensor in stack.items()
    },
    "your weights do not add up to 1; divide the sizes by their sum": lambda stack, sizes: {
        name: _weighted(tensor, sizes, 0).sum(0) for name, tensor in stack.items()
    },
    "the weights run along the last dimension; the clients are dim 0": lambda stack, sizes: {
        name: _weighted(tensor, sizes / sizes.sum(), -1).sum(-1) for name, tensor in stack.items()
    },
    "the weights meet the last dimension; give them the shape (C, 1, …), so that they meet the clients": (
        lambda stack, sizes: {name: _weighted(tensor, sizes / sizes.sum(), -1).sum(0) for name, tensor in stack.items()}
    ),
    "you divide twice: the weights add up to 1, so sum over the clients and take no mean": lambda stack, sizes: {
        name: _weighted(tensor, sizes / sizes.sum(), 0).mean(0) for name, tensor in stack.items()
    },
}


def check_fedavg(function: Callable[[Adapter, Tensor], Adapter]) -> str:
    """The mean adapter of a ``stack`` ``{name: (C, ...)}`` by the clients' ``sizes`` ``(C,)``.

    >>> check_fedavg(lambda stack, sizes: ...)
    'not attempted'
    >>> check_fedavg(lambda stack, sizes: {name: tensor.mean(0) for name, tensor in stack.items()})
    'hint: every client counts alike here; a client with more images is to count for more'
    """
    draw = torch.Generator().manual_seed(0)
    shapes = ([(3, 3), (3, 2, 3)], [(2, 2), (2, 4, 2)])  # as many columns as clients: a wrong dimension fits, too
    stacks = [{f"tensor {i}": torch.randn(s, generator=draw) for i, s in enumerate(part)} for part in shapes]
    inputs = list(zip(stacks, (torch.tensor([20, 80, 100]), torch.tensor([30, 10]))))
    return check(function, _fedavg, inputs, FEDAVG_SLIPS)


def _fedavg(stack: Adapter, sizes: Tensor) -> Adapter:
    return {name: _weighted(tensor, sizes / sizes.sum(), 0).sum(0) for name, tensor in stack.items()}


def _weighted(tensor: Tensor, weights: Tensor, dim: int) -> Tensor:
    return weights * tensor if dim == -1 else weights.view(-1, *[1] * (tensor.dim() - 1)) * tensor


TOTAL_BYTES_SLIPS: dict[str, Callable[[Adapter, int], int]] = {
    "one download is missing: after the last round every client fetches the result": lambda adapter, rounds: (
        2 * rounds * _bytes(adapter)
    ),
    "those are the bytes up; what comes down counts as well": lambda adapter, rounds: rounds * _bytes(adapter),
    "those are the bytes down; what goes up counts as well": lambda adapter, rounds: (rounds + 1) * _bytes(adapter),
    "you count numbers; each of them has tensor.element_size() bytes": lambda adapter, rounds: (
        (2 * rounds + 1) * sum(tensor.numel() for tensor in adapter.values())
    ),
    "not every number has 4 bytes: ask tensor.element_size()": lambda adapter, rounds: (
        (2 * rounds + 1) * sum(4 * tensor.numel() for tensor in adapter.values())
    ),
}


def check_total_bytes(function: Callable[[Adapter, int], int]) -> str:
    """The bytes, up and down, that one client pays for ``rounds`` rounds with this ``adapter``.

    >>> def bytes_of(adapter):
    ...     return sum(tensor.numel() * tensor.element_size() for tensor in adapter.values())
    >>> check_total_bytes(lambda adapter, rounds: 2 * rounds * bytes_of(adapter))
    'hint: one download is missing: after the last round every client fetches the result'
    """
    single, half = torch.zeros(4, 5), torch.zeros(3, 4, dtype=torch.bfloat16)
    inputs = [({"A": single, "B": half}, 3), ({"head": half, "B": single[0]}, 10)]
    return check(function, lambda adapter, rounds: (2 * rounds + 1) * _bytes(adapter), inputs, TOTAL_BYTES_SLIPS)


def _bytes(adapter: Adapter) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter.values())


AGGREGATE_GAP_SLIPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "that compares with the product of client 0; compare with the mean of all clients' products": lambda A, B: (
        (B.mean(0) @ A.mean(0) - B[0] @ A[0]).norm() / (B[0] @ A[0]).norm()
    ),
    "that is the absolute gap; divide by the norm of the mean of the products": lambda A, B: (
        B.mean(0) @ A.mean(0) - (B @ A).mean(0)
    ).norm(),
    "you divide by the norm of the product of the means; divide by that of the mean of the products": lambda A, B: (
        (B.mean(0) @ A.mean(0) - (B @ A).mean(0)).norm() / (B.mean(0) @ A.mean(0)).norm()
    ),
    "that is the square of the gap; a norm has a root": lambda A, B: (
        (B.mean(0) @ A.mean(0) - (B @ A).mean(0)).square().sum() / (B @ A).mean(0).square().sum()
    ),
    "that is the gap client by client, then averaged; average the products first": lambda A, B: (
        (B.mean(0) @ A.mean(0) - B @ A).flatten(1).norm(dim=1) / (B @ A).flatten(1).norm(dim=1)
    ).mean(),
}


def check_aggregate_gap(function: Callable[[Tensor, Tensor], Tensor | float]) -> str:
    """By what part of itself the mean of the products ``B A`` is missed by the product of the means.

    ``A`` ``(C, r, in)`` and ``B`` ``(C, out, r)`` of one layer; the norms are Frobenius norms.

    >>> check_aggregate_gap(lambda A, B: (B.mean(0) @ A.mean(0) - (B @ A).mean(0)).norm())
    'hint: that is the absolute gap; divide by the norm of the mean of the products'
    """
    draw = torch.Generator().manual_seed(0)
    shapes = (((3, 2, 5), (3, 4, 2)), ((2, 1, 3), (2, 3, 1)))
    inputs = [tuple(torch.randn(s, generator=draw, dtype=torch.float64) + 0.5 for s in pair) for pair in shapes]
    return check(function, _aggregate_gap, inputs, AGGREGATE_GAP_SLIPS)


def _aggregate_gap(A: Tensor, B: Tensor) -> Tensor:
    return (B.mean(0) @ A.mean(0) - (B @ A).mean(0)).norm() / (B @ A).mean(0).norm()


FFA_TRAINS_SLIPS: dict[str, Callable[[str], bool]] = {
    "you freeze B; FFA-LoRA freezes A, whose initial values are random, and trains B, which starts at zero": (
        lambda name: "lora_B" not in name
    ),
    "you freeze the head too; only A is frozen": lambda name: "lora_B" in name,
    "that says what is frozen; return True for what trains": lambda name: "lora_A" in name,
    "nothing is frozen here; FFA-LoRA freezes A": lambda name: True,
}


def check_ffa_trains(function: Callable[[str], bool]) -> str:
    """Whether FFA-LoRA trains the tensor of this ``name``, one of an adapter's.

    >>> check_ffa_trains(lambda name: "lora_B" in name)
    'hint: you freeze the head too; only A is frozen'
    """
    layers = ("base_model.model.blocks.0.attn.qkv", "base_model.model.blocks.1.fc1")
    names = [f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"]
    names += ["base_model.model.head.weight", "base_model.model.head.bias"]
    return check(function, lambda name: "lora_A" not in name, [(name,) for name in names], FFA_TRAINS_SLIPS)
