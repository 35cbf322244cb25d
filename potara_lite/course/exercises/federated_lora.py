"""Checkers of notebook 01: what a federation averages, what it sends, and the error of the average."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...adapters.state import Adapter, adapter_bytes
from .checking import check, is_untouched, run


def _each(rule: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Adapter, Tensor], Adapter]:
    """An aggregate of a stack and the clients' sizes that treats every tensor alike."""
    return lambda stack, sizes: {name: rule(tensor, sizes) for name, tensor in stack.items()}


def _per_client(weights: Tensor, tensor: Tensor) -> Tensor:
    """The weights ``(C,)`` in the shape ``(C, 1, …)``."""
    return weights.view(-1, *[1] * (tensor.dim() - 1))


def _weighted_mean(tensor: Tensor, sizes: Tensor) -> Tensor:
    return (_per_client(sizes / sizes.sum(), tensor) * tensor).sum(0)


FEDAVG_MISTAKES = {
    "every client counts equally here; a client with more images must count more": _each(lambda t, n: t.mean(0)),
    "your weights do not add up to 1; divide the sizes by their sum": _each(
        lambda t, n: (_per_client(n, t) * t).sum(0)
    ),
    "the weights run along the last dimension; the clients are dim 0": _each(lambda t, n: (n / n.sum() * t).sum(-1)),
    "the weights meet the last dimension; give them the shape (C, 1, …), so that they meet the clients": _each(
        lambda t, n: (n / n.sum() * t).sum(0)
    ),
    "you divide twice: the weights add up to 1, so sum over the clients and take no mean": _each(
        lambda t, n: _weighted_mean(t, n) / len(n)
    ),
}


def check_fedavg(function: Callable[[Adapter, Tensor], Adapter]) -> str:
    """The mean adapter of a ``stack`` ``{name: (C, ...)}`` by the clients' ``sizes`` ``(C,)``.

    >>> check_fedavg(lambda stack, sizes: ...)
    'not attempted'
    >>> check_fedavg(lambda stack, sizes: {name: tensor.mean(0) for name, tensor in stack.items()})
    'hint: every client counts equally here; a client with more images must count more'
    """
    draw = torch.Generator().manual_seed(0)
    shapes = ([(3, 3), (3, 2, 3)], [(2, 2), (2, 4, 2)])  # as many columns as clients: a wrong dimension fits, too
    stacks = [{f"tensor {i}": torch.randn(s, generator=draw) for i, s in enumerate(part)} for part in shapes]
    inputs = list(zip(stacks, (torch.tensor([20, 80, 100]), torch.tensor([30, 10]))))
    return check(function, _each(_weighted_mean), inputs, FEDAVG_MISTAKES)


TOTAL_BYTES_MISTAKES: dict[str, Callable[[Adapter, int], int]] = {
    "one download is missing: after the last round every client fetches the result": (
        lambda adapter, rounds: 2 * rounds * adapter_bytes(adapter)
    ),
    "those are the bytes up; what comes down counts as well": lambda adapter, rounds: rounds * adapter_bytes(adapter),
    "those are the bytes down; what goes up counts as well": lambda adapter, n: (n + 1) * adapter_bytes(adapter),
    "you count numbers; each of them has tensor.element_size() bytes": lambda adapter, n: (2 * n + 1) * _count(adapter),
    "not every number has 4 bytes: ask tensor.element_size()": lambda adapter, n: (2 * n + 1) * 4 * _count(adapter),
}


def _count(adapter: Adapter) -> int:
    return sum(tensor.numel() for tensor in adapter.values())


def _total_bytes(adapter: Adapter, rounds: int) -> int:
    return (2 * rounds + 1) * adapter_bytes(adapter)


def check_total_bytes(function: Callable[[Adapter, int], int]) -> str:
    """The bytes, up and down, that one client pays for ``rounds`` rounds with this ``adapter``.

    >>> check_total_bytes(lambda adapter, rounds: 2 * rounds * adapter_bytes(adapter))
    'hint: one download is missing: after the last round every client fetches the result'
    """
    single, half = torch.zeros(4, 5), torch.zeros(3, 4, dtype=torch.bfloat16)
    inputs = [({"A": single, "B": half}, 3), ({"head": half, "B": single[0]}, 10)]
    return check(function, _total_bytes, inputs, TOTAL_BYTES_MISTAKES)


def _gap(A: Tensor, B: Tensor) -> Tensor:
    return B.mean(0) @ A.mean(0) - (B @ A).mean(0)


def _relative_gap(A: Tensor, B: Tensor) -> Tensor:
    return _gap(A, B).norm() / (B @ A).mean(0).norm()


AGGREGATE_GAP_MISTAKES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "that compares with the product of client 0; compare with the mean of all clients' products": (
        lambda A, B: (B.mean(0) @ A.mean(0) - B[0] @ A[0]).norm() / (B[0] @ A[0]).norm()
    ),
    "that is the absolute gap; divide by the norm of the mean of the products": lambda A, B: _gap(A, B).norm(),
    "you divide by the norm of the product of the means; divide by that of the mean of the products": (
        lambda A, B: _gap(A, B).norm() / (B.mean(0) @ A.mean(0)).norm()
    ),
    "that is the square of the gap; a norm has a root": lambda A, B: _relative_gap(A, B).square(),
    "that is the gap client by client, then averaged; average the products first": (
        lambda A, B: torch.stack([(B.mean(0) @ A.mean(0) - b @ a).norm() / (b @ a).norm() for a, b in zip(A, B)]).mean()
    ),
}


def check_aggregate_gap(function: Callable[[Tensor, Tensor], Tensor | float]) -> str:
    """The relative error of the product of the means, compared with the mean of the products ``B A``.

    ``A`` ``(C, r, in)`` and ``B`` ``(C, out, r)`` of one layer; the norms are Frobenius norms.

    >>> check_aggregate_gap(lambda A, B: (B.mean(0) @ A.mean(0) - (B @ A).mean(0)).norm())
    'hint: that is the absolute gap; divide by the norm of the mean of the products'
    """
    draw = torch.Generator().manual_seed(0)
    shapes = (((3, 2, 5), (3, 4, 2)), ((2, 1, 3), (2, 3, 1)))
    inputs = [tuple(torch.randn(s, generator=draw, dtype=torch.float64) + 0.5 for s in pair) for pair in shapes]
    return check(function, _relative_gap, inputs, AGGREGATE_GAP_MISTAKES)


FFA_TRAINS_MISTAKES: dict[str, Callable[[str], bool]] = {
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
    return check(function, lambda name: "lora_A" not in name, [(name,) for name in names], FFA_TRAINS_MISTAKES)


def check_partition(function: Callable[[Tensor], Tensor], labels: Tensor) -> str:
    """Rows of indices ``(8, 100)``, each of the 800 images once, dealt out in another way than they are.

    >>> check_partition(lambda labels: torch.arange(800).view(8, 100), torch.zeros(800).long())
    'hint: that is the partition of section 4; deal the images out in another way'
    """
    rows, before = run(function, (labels,)), torch.arange(800).view(8, 100)
    if is_untouched(rows):
        return "not attempted"
    if getattr(rows, "shape", None) != before.shape or not torch.equal(rows.flatten().sort().values, before.flatten()):
        return "hint: eight rows of 100 indices, a tensor (8, 100); each of 0 to 799 is in it once"
    if torch.equal(rows.sort(1).values, before):
        return "hint: that is the partition of section 4; deal the images out in another way"
    return "correct"
