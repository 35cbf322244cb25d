"""Adapters as dictionaries of tensors: names and shapes, what fits together, stacks of clients, deltas.

An *adapter* is what PEFT says it is: the LoRA factors ``A`` (r, in) and ``B`` (out, r) of every adapted layer and the
directly trained weights (the new head), by name. A *stack* is the same dictionary with the clients on dim 0. What a
name and a shape say (``is_lora``, ``layer_of``, ``factors``, ``rank_dim``) is known here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import AfterValidator, PlainValidator
from torch import Tensor

from ..checks import Count, List, Named, Numbers, Positive, Size, all_finite, checked, invalid, is_dense

if TYPE_CHECKING:
    from ..federation.split import Split
    from .lora import AdaptedBackbone

Adapter = dict[str, Tensor]
Weight = float | Tensor | Mapping[str, float | Tensor]  # on a model: a number, (C,) of a stack, or either by layer


# What a name and a shape say.


def is_lora(name: str, factor: str = "") -> bool:
    """Whether a tensor of this name is a LoRA factor: of either kind, or of the kind ``"A"`` or ``"B"``."""
    return name.endswith(f".lora_{factor}.weight" if factor else (".lora_A.weight", ".lora_B.weight"))


def layer_of(name: str) -> str:
    """The adapted layer that a LoRA factor belongs to; of a directly trained tensor, its own name."""
    return name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")


def factor_names(layer: str) -> tuple[str, str]:
    """The names of an adapted layer's two factors."""
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def client_dims(tensor: Tensor) -> int:
    """1 for a stack, 0 for one adapter: a LoRA factor has 2 dimensions of its own, that of a Conv2d has 4 (``attach``
    refuses layers whose factors have an odd number)."""
    return tensor.dim() % 2


def rank_dim(name: str, tensor: Tensor) -> int:
    """Which dimension of a LoRA factor is the rank."""
    return client_dims(tensor) + is_lora(name, "B")


def factors(adapter: Adapter, layer: str) -> tuple[Tensor, Tensor]:
    """A layer's factors as matrices, A ``(..., r, in)`` and B ``(..., out, r)``; a kernel is flattened into ``in``."""
    return tuple(adapter[name].flatten(client_dims(adapter[name]) + 1) for name in factor_names(layer))


def lora_layers(adapter: Adapter) -> list[str]:
    """The names of the adapted layers, in the adapter's order."""
    return [layer_of(name) for name in adapter if is_lora(name, "A")]


def is_stack(adapter: Adapter) -> bool | None:
    """Whether the clients are on dim 0; ``None`` for an adapter without LoRA factors, which does not tell."""
    return next((bool(client_dims(tensor)) for name, tensor in adapter.items() if is_lora(name)), None)


# Types of adapters in signatures.


def _tensors(value: Any) -> Adapter:
    """A dictionary of tensors by name."""
    by_name = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if not by_name or not value or not all(isinstance(one, Tensor) for one in value.values()):
        what = "an empty one" if by_name and not value else type(value).__name__
        raise ValueError(f"must be an adapter, a dictionary of tensors by name, not {what}")
    return value


def _finite(adapter: Adapter) -> Adapter:
    """An adapter or a stack of floating tensors of 16 bits or more, all finite."""
    for name, tensor in adapter.items():
        if not is_dense(tensor):
            raise ValueError(f"must hold its numbers: {name!r} is {tensor.layout} on {tensor.device}")
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(f"must be of floating numbers of 16 bits or more: {name!r} is {tensor.dtype}")
        if not all_finite(tensor):
            row = int((~tensor.isfinite().flatten(1).all(1)).nonzero()[0]) if is_stack(adapter) else None
            raise ValueError(f"must be finite: {name!r} is not{'' if row is None else f' for client {row}'}")
    if len({client_dims(tensor) for name, tensor in adapter.items() if is_lora(name)}) > 1:
        raise ValueError("must have the clients on dim 0 of all its tensors or of none")
    return adapter


def _complete(adapter: Adapter) -> Adapter:
    """An adapter or a stack with both factors of every layer, matrices or kernels that can be multiplied."""
    for layer in dict.fromkeys(layer_of(name) for name in adapter if is_lora(name)):
        a, b = (adapter.get(name) for name in factor_names(layer))
        if a is None or b is None or not 2 <= a.dim() == b.dim() <= 5 or a.dtype != b.dtype:
            raise ValueError(f"must have two factors, A and B of one dtype, in each layer, unlike {layer!r}")
        if a.shape[client_dims(a)] != b.shape[client_dims(b) + 1]:
            raise ValueError(f"must have one rank in each layer, unlike {layer!r}")
    return adapter


def _one(adapter: Adapter) -> Adapter:
    if is_stack(adapter):
        raise ValueError(f"must be one adapter, not a stack of {count_clients(adapter)} (see client_adapter)")
    return adapter


def _stacked(stack: Adapter) -> Adapter:
    if is_stack(stack) is False:
        raise ValueError("must be a stack, with the clients on dim 0, not one adapter (see repeat_adapter)")
    counts = sorted({len(tensor) if tensor.dim() else 0 for tensor in stack.values()})
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"must have as many clients in every tensor, 1 or more, not {counts}")
    return stack


Tensors = Annotated[Adapter, PlainValidator(_tensors)]  # whatever its values are: those of a failed training, too
AnyAdapter = Annotated[Tensors, AfterValidator(_finite)]  # an adapter or a stack
CompleteAdapter = Annotated[AnyAdapter, AfterValidator(_complete)]
OneAdapter = Annotated[AnyAdapter, AfterValidator(_one)]
AnyStack = Annotated[Tensors, AfterValidator(_stacked)]
Stack = Annotated[AnyAdapter, AfterValidator(_stacked)]
CompleteStacks = List[Annotated[Stack, AfterValidator(_complete)]]


# What must fit together.


def count_clients(stack: Adapter) -> int:
    """The number of clients of a stack."""
    return len(next(iter(stack.values())))


def match_adapter(name: str, adapter: Adapter, like: Adapter, *, stacked: bool, same_rank: bool = False) -> Adapter:
    """The adapter (with ``stacked`` a stack) in the order of the tensors of ``like``, one adapter that it must match.

    Raises ``ValueError`` for other names or shapes; the ranks may differ unless ``same_rank``.
    """
    if odd := sorted(adapter.keys() ^ like.keys()):
        raise ValueError(f"{name} must be of this base: {len(odd)} tensors are of one only, such as {odd[0]!r}")
    for key, tensor in like.items():
        expected, found = list(tensor.shape), list(adapter[key].shape[stacked:])
        if is_lora(key) and len(found) == len(expected) and not same_rank:
            dim = is_lora(key, "B")
            expected[dim] = max(1, found[dim])
        if found != expected:
            shapes = f"{tuple(adapter[key].shape)}, expected {(*['C'] * stacked, *expected)}"
            raise ValueError(f"{name} must be of this base: {key!r} has shape {shapes}")
    return {key: adapter[key] for key in like}


def check_adapter(
    adapted: AdaptedBackbone, adapter: Adapter, name: str = "adapter", *, stacked: bool = False
) -> Adapter:
    """The adapter (with ``stacked`` a stack) in the order of the backbone's tensors, which must be its own.

    Raises ``ValueError`` for other names or shapes, and for two factors of different ranks.
    """
    found = match_adapter(name, adapter, adapted.initial, stacked=stacked)
    for layer in lora_layers(found):
        a, b = (found[key].shape for key in factor_names(layer))
        if a[stacked] != b[stacked + 1] and layer not in adapted.gated_layers:
            ranks = f"{layer!r} has {a[stacked]} in A, {b[stacked + 1]} in B"
            raise ValueError(f"{name} must have one rank in each layer: {ranks}")
    return found


def check_models(adapted: AdaptedBackbone, split: Split, **stacks: Adapter) -> list[Adapter]:
    """The stacks, by the names of the arguments that they were, in the order of the backbone's tensors.

    Raises ``ValueError`` unless each is of this backbone and has an adapter for every client of ``split``, and for
    inputs in a precision that the backbone does not compute in.
    """
    x, _ = split.examples[0]
    for tensor in x.values() if isinstance(x, dict) else [x]:
        if tensor.is_floating_point() and tensor.dtype not in adapted.dtypes:
            known = " and ".join(map(str, adapted.dtypes))
            raise ValueError(f"split: inputs of {tensor.dtype} for a backbone of {known}")
    for name, stack in stacks.items():
        check_count(name, stack, len(split))
    return [check_adapter(adapted, stack, name, stacked=True) for name, stack in stacks.items()]


def check_count(name: str, stack: Adapter, clients: int) -> None:
    """Raise ``ValueError`` unless the stack has an adapter for each of so many clients."""
    if (count := count_clients(stack)) != clients:
        raise ValueError(f"{name}: {count} adapters for {clients} clients")


def check_same_base(name: str, adapters: Sequence[Adapter], *, same_rank: bool = True) -> list[Adapter]:
    """Several adapters or stacks in the order of the first one's tensors.

    Raises ``ValueError`` unless all have the same tensors in the same shapes, but for the rank unless ``same_rank``.
    """
    stacked = bool(is_stack(adapters[0]))
    first = {key: tensor[0] for key, tensor in adapters[0].items()} if stacked else adapters[0]
    for i, one in enumerate(adapters):
        if bool(is_stack(one)) != stacked:
            raise ValueError(f"{name}[{i}]: a stack and one adapter cannot go together")
        if stacked:
            check_count(f"{name}[{i}]", one, count_clients(adapters[0]))
    options = dict(stacked=stacked, same_rank=same_rank)
    return [match_adapter(f"{name}[{i}]", one, first, **options) for i, one in enumerate(adapters)]


def check_weight(weight: Weight, adapter: Adapter, name: str = "weight", bounds: tuple = (0, 1)) -> Weight:
    """A mixing weight that fits the adapter: a number, one for every client of a stack, or either by layer.

    Raises ``ValueError`` for one out of the ``bounds`` and for layers that are missing or unknown.
    """
    if isinstance(weight, Mapping):
        layers = {layer_of(key) for key in adapter}
        if missing := sorted(layers - weight.keys()):
            raise ValueError(f"{name}: no mixing weight for {missing[0]!r}")
        if unknown := sorted(weight.keys() - layers):
            raise ValueError(f"{name}: there is no layer {unknown[0]!r}")
        return {layer: check_weight(one, adapter, f"{name}[{layer!r}]", bounds) for layer, one in weight.items()}
    least, most = bounds
    try:
        found = Numbers("|C", least=least, most=most).check(weight)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None
    if found.dim() and (not is_stack(adapter) or len(found) != count_clients(adapter)):
        stack = f"a stack of {count_clients(adapter)} clients" if is_stack(adapter) else "one adapter"
        raise ValueError(f"{name}: {len(found)} weights for {stack}")
    return found if isinstance(weight, Tensor) or found.dim() else float(found)


def check_scaling(scaling: Mapping[str, float], adapter: Adapter) -> None:
    """Raise ``ValueError`` unless there is a scaling for every adapted layer."""
    if missing := sorted(set(lora_layers(adapter)) - scaling.keys()):
        raise ValueError(f"scaling must have every adapted layer, but {missing[0]!r} is missing")


# Deltas, stacks, bytes.


@checked
def delta(adapter: CompleteAdapter, scaling: Named[Positive]) -> Adapter:
    """The task vector: ``scaling * B A`` of every adapted layer, and the directly trained weights.

    Takes one adapter, A ``(r, in)`` and B ``(out, r)``, or a stack, A ``(C, r, in)`` and B ``(C, out, r)``;
    returns ``{layer.weight: (..., out, in), ...}``. A convolution's kernel is flattened into ``in``.
    """
    check_scaling(scaling, adapter)
    result = {}
    for layer in lora_layers(adapter):
        a, b = factors(adapter, layer)
        result[f"{layer}.weight"] = scaling[layer] * (b @ a)
    return result | {name: tensor for name, tensor in adapter.items() if not is_lora(name)}


@checked
def delta_inner_products(adapters: CompleteStacks, scaling: Named[Positive]) -> Tensor:
    """The inner products of the deltas of K stacks, ``(C, K, K)`` float64, without forming a delta.

    ``<B_i A_i, B_j A_j> = tr (B_iᵀ B_j)(A_j A_iᵀ)`` in every adapted layer, plus the products of the directly trained
    weights. The stacks may have different ranks.
    """
    adapters = check_same_base("adapters", adapters, same_rank=False)
    check_scaling(scaling, adapters[0])
    total = 0.0
    for layer in lora_layers(adapters[0]):
        pairs = [[factor.double() for factor in factors(adapter, layer)] for adapter in adapters]
        rows = [[((b_i.mT @ b_j) * (a_i @ a_j.mT)).sum((1, 2)) for a_j, b_j in pairs] for a_i, b_i in pairs]
        total = total + scaling[layer] ** 2 * torch.stack([torch.stack(row, -1) for row in rows], -2)
    for name in adapters[0]:
        if not is_lora(name):
            flat = torch.stack([adapter[name].double().flatten(1) for adapter in adapters], 1)  # (C, K, n)
            total = total + flat @ flat.mT
    return total


def adapter_from_delta(change: Adapter, scaling: dict[str, float], like: Adapter) -> Adapter:
    """The adapter of full rank whose ``delta`` is ``change``, exactly: in each layer, the factor on the smaller side is
    the identity, and the other one is the change itself over the scaling.

    ``like`` gives the names and, but for the rank, the shapes. ``merging.compress`` makes it small.
    """
    result = {}
    for name, tensor in like.items():
        layer = layer_of(name)
        if layer == name:
            result[name] = change[name]
            continue
        dense = change[f"{layer}.weight"] / scaling[layer]  # (..., out, in)
        out, wide = dense.shape[-2:]
        one = torch.eye(min(out, wide)).to(dense).expand(*dense.shape[:-2], -1, -1)
        a, b = (dense, one) if out <= wide else (one, dense)
        shape = list(tensor.shape)
        shape[rank_dim(name, tensor)] = min(out, wide)
        result[name] = (a if is_lora(name, "A") else b).reshape(shape)
    return result


def is_dense_factor(name: str, adapter: Adapter) -> bool:
    """Whether a factor made by ``adapter_from_delta`` is the one that holds the change."""
    if not is_lora(name):
        return False
    a, b = factors(adapter, layer_of(name))
    return is_lora(name, "A") == (b.shape[-2] <= a.shape[-1])


@checked
def stack_adapters(adapters: List[OneAdapter]) -> Adapter:
    """Adapters of several clients as one stack: each tensor gets the clients on dim 0."""
    adapters = check_same_base("adapters", adapters)
    return {name: torch.stack([adapter[name] for adapter in adapters]) for name in adapters[0]}


@checked
def repeat_adapter(adapter: OneAdapter, clients: Size) -> Adapter:
    """One adapter given to every client: a stack whose rows are equal (and share no memory)."""
    return {name: tensor.expand(clients, *tensor.shape).clone() for name, tensor in adapter.items()}


@checked
def client_adapter(stack: AnyStack, client: Count) -> Adapter:
    """One client's adapter out of a stack, by its row."""
    if client >= (clients := count_clients(stack)):
        invalid("client", f"at most {clients - 1}", client)
    return {name: tensor[client] for name, tensor in stack.items()}


def select_clients(stack: Adapter, rows: Tensor | slice) -> Adapter:
    """The stack of some clients, by their rows (on any device)."""
    if isinstance(rows, slice):
        return {name: tensor[rows] for name, tensor in stack.items()}
    return {name: tensor[rows.to(tensor.device)] for name, tensor in stack.items()}


@checked
def cut_ranks(stack: Stack, ranks: List[Size]) -> Adapter:
    """The stack with a rank for each client: what is beyond ``ranks[i]`` in A and B is zero, which no gradient moves.

    The scaling stays that of the stack's own rank. Raises ``ValueError`` unless there is a rank for each client, at
    most the stack's.

    >>> stack = {"fc.lora_A.weight": torch.ones(2, 3, 4), "fc.lora_B.weight": torch.ones(2, 5, 3)}
    >>> cut_ranks(stack, [1, 3])["fc.lora_A.weight"].sum((1, 2))
    tensor([ 4., 12.])
    """
    result = dict(stack)
    for name, tensor in stack.items():
        if is_lora(name):
            dim = rank_dim(name, tensor)
            full = tensor.shape[dim]
            if len(ranks) != len(tensor) or max(ranks) > full:
                raise ValueError(f"ranks {list(ranks)}: {len(tensor)} numbers from 1 to {full} are needed")
            is_kept = torch.arange(full) < torch.tensor(ranks).unsqueeze(1)  # (C, r)
            shape = [len(tensor), *(full if d == dim else 1 for d in range(1, tensor.dim()))]
            result[name] = tensor * is_kept.view(shape).to(tensor)
    return result


def bytes_by_rank(adapter: Adapter, ranks: Sequence[int]) -> Tensor:
    """The bytes of one adapter (no client dimension) for clients of these ranks, ``(C,)``."""
    of_rank_1 = {name: t.narrow(rank_dim(name, t), 0, 1) for name, t in adapter.items() if is_lora(name)}
    rest = {name: tensor for name, tensor in adapter.items() if not is_lora(name)}
    return adapter_bytes(rest) + torch.tensor(ranks) * adapter_bytes(of_rank_1)


def flatten(stack: Adapter) -> Tensor:
    """A stack as one matrix ``(C, P)``: a row per client, the tensors in the dictionary's order."""
    return torch.cat([tensor.flatten(1) for tensor in stack.values()], dim=1)


def unflatten(flat: Tensor, like: Adapter) -> Adapter:
    """The inverse of ``flatten``; ``like`` is one adapter (no client dimension) that gives names and shapes."""
    parts = flat.split([tensor.numel() for tensor in like.values()], dim=1)
    return {name: part.reshape(-1, *like[name].shape) for name, part in zip(like, parts)}


@checked
def adapter_bytes(adapter: Mapping[str, Tensor]) -> int:
    """What an adapter weighs when it travels: the bytes of its tensors, in the dtype they have."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter.values())
