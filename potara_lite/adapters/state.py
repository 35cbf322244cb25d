"""What an adapter's tensors say by their names and shapes, and what has to fit together at the door.

An *adapter* is what PEFT says it is: the LoRA factors ``A`` (r, in) and ``B`` (out, r) of every adapted layer and the
directly trained weights (the new head), by name. A *stack* is the same dictionary with the clients on dim 0. What a
name and a shape say (``is_lora``, ``layer_of``, ``factors``, ``rank_dim``) is known here and nowhere else.

``door`` is that of ``door.py`` with the checks of adapters, clients and weights besides: floating dtypes, finite
values, the tensors of the backbone, as many adapters as clients, a mixing weight for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks as plain
from ..checks import Check, kind, named, refuse, several, shown

Adapter = dict[str, Tensor]

FLOAT8 = [dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and "float8" in str(dtype)]


def is_lora(name: str, factor: str = "") -> bool:
    """Whether a tensor of this name is a LoRA factor: of either kind, or of the kind ``"A"`` or ``"B"``."""
    return f".lora_{factor}" in name


def layer_of(name: str) -> str:
    """The adapted layer that a LoRA factor belongs to; of a directly trained tensor, its own name."""
    return name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")


def factor_names(layer: str) -> tuple[str, str]:
    """The names of an adapted layer's two factors."""
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def client_dims(tensor: Tensor) -> int:
    """1 for a stack, 0 for one adapter: a LoRA factor has 2 dimensions of its own, a convolution's has 4."""
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


def check_same_base(*adapters: Adapter) -> None:
    """Raise ``ValueError`` unless the adapters have the same tensors in the same shapes (the rank included)."""
    first = adapters[0]
    for other in adapters[1:]:
        if first.keys() != other.keys():
            odd = sorted(first.keys() ^ other.keys())
            raise ValueError(f"adapters of different bases: {len(odd)} tensors are in one only, such as {odd[0]!r}")
        for name in first:
            if first[name].shape != other[name].shape:
                shapes = f"{tuple(first[name].shape)} and {tuple(other[name].shape)}"
                raise ValueError(f"adapters of different ranks or bases: {name!r} has shapes {shapes}")


def is_traced(tensor: Tensor) -> bool:
    """Whether it stands for many inside ``vmap`` or another transform, where its values cannot be looked at."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_dense(tensor: Tensor) -> bool:
    """Whether all its numbers are there: it is not sparse, and on a device that holds values."""
    return tensor.layout == torch.strided and tensor.device.type != "meta"


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite: by their sum, one by one only where that says no."""
    return is_traced(tensor) or isfinite(tensor.detach().sum().item()) or bool(tensor.isfinite().all())


def numbers(*dims: int, whole: bool = False, least: float | None = None, most: float | None = None) -> Check:
    """A tensor of finite numbers with one of these numbers of dimensions and none of them empty; a list, an array of
    numpy or a column of pandas becomes one, in float64 or int64."""

    def check(name: str, value: Any, given: Mapping[str, Any]) -> Tensor:
        found = as_numbers(name, value)
        if found.dim() not in dims or not found.numel():
            refuse(name, f"numbers in {' or '.join(map(str, dims))} dimensions", value)
        if not all_finite(found):
            raise ValueError(f"{name} must be finite, {'not' if found.dim() == 0 else 'unlike'} {shown(value)}")
        if whole and found.is_floating_point():
            refuse(name, "whole numbers", value)
        if not is_traced(found):
            low, high = found.detach().aminmax()
            if (least is not None and low < least) or (most is not None and high > most):
                bounds = f"at least {least}" if most is None else f"in [{least}, {most}]"
                raise ValueError(f"{name} must be {bounds}, not {(low if low < least else high).item()}")
        return found

    return check


def as_numbers(name: str, value: Any) -> Tensor:
    """A tensor as it is, and what a number, a list, an array or a column holds, in float64 or int64.

    Raises ``ValueError`` for what are no real numbers.
    """
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype in (torch.bool, *FLOAT8) or not is_dense(value):
            refuse(name, "real numbers, all of them there", value)
        return value
    kinds = {"i": np.int64, "u": np.int64, "f": np.float64}
    try:
        array = np.asarray(value)
        return torch.from_numpy(array.astype(kinds[array.dtype.kind]))
    except (ValueError, TypeError, RuntimeError, KeyError):  # text, objects, rows of different lengths
        refuse(name, "numbers", value)


def any_adapter(name: str, value: Any, given: Mapping[str, Any]) -> Adapter:
    """An adapter or a stack: floating tensors of 16 bits or more, all finite."""
    named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if not named or not value or not all(isinstance(one, Tensor) for one in value.values()):
        what = "an empty one" if named and not value else type(value).__name__
        raise ValueError(f"{name} must be an adapter, a dictionary of tensors by name, not {what}")
    for key, tensor in value.items():
        if not is_dense(tensor):
            raise ValueError(f"{name} must hold its numbers: {key!r} is {tensor.layout} on {tensor.device}")
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(f"{name} must be of floating numbers of 16 bits or more: {key!r} is {tensor.dtype}")
        if not all_finite(tensor):
            row = int((~tensor.isfinite().flatten(1).all(1)).nonzero()[0]) if is_stack(value) else None
            raise ValueError(f"{name} must be finite: {key!r} is not{'' if row is None else f' for client {row}'}")
    if len({client_dims(tensor) for key, tensor in value.items() if is_lora(key)}) > 1:
        raise ValueError(f"{name} must have the clients on dim 0 of all its tensors or of none")
    return value


def whole_adapter(name: str, value: Any, given: Mapping[str, Any]) -> Adapter:
    """An adapter or a stack with both factors of every layer, matrices or kernels that can be multiplied."""
    found = any_adapter(name, value, given)
    for layer in dict.fromkeys(layer_of(key) for key in found if is_lora(key)):
        a, b = (found.get(key) for key in factor_names(layer))
        if a is None or b is None or not 2 <= a.dim() == b.dim() <= 5 or a.dtype != b.dtype:
            raise ValueError(f"{name} must have two factors, A and B of one dtype, in each layer, unlike {layer!r}")
        if a.shape[client_dims(a)] != b.shape[client_dims(b) + 1]:
            raise ValueError(f"{name} must have one rank in each layer, unlike {layer!r}")
    return found


def one_adapter(name: str, value: Any, given: Mapping[str, Any]) -> Adapter:
    """An adapter of one client, with the tensors of the backbone where there is one."""
    found = any_adapter(name, value, given)
    if is_stack(found):
        raise ValueError(f"{name} must be one adapter, not a stack of {_count(found)} (see client_adapter)")
    return fitting(name, found, given["adapted"], 0) if "adapted" in given else found


def stack(name: str, value: Any, given: Mapping[str, Any]) -> Adapter:
    """A stack, with the tensors of the backbone where there is one."""
    found = rows_of_clients(name, any_adapter(name, value, given), given)
    return fitting(name, found, given["adapted"]) if "adapted" in given else found


def rows_of_clients(name: str, value: Any, given: Mapping[str, Any]) -> Adapter:
    """A stack, whatever its values are: that of a client whose training failed can be taken apart."""
    found = plain.named(plain.kind("Tensor"))(name, value, given)
    if is_stack(found) is False:
        raise ValueError(f"{name} must be a stack, with the clients on dim 0, not one adapter (see repeat_adapter)")
    counts = sorted({len(tensor) if tensor.dim() else 0 for tensor in found.values()})
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"{name} must have as many clients in every tensor, 1 or more, not {counts}")
    return found


def trained_stack(name: str, value: Any, given: Mapping[str, Any]) -> Adapter:
    """A stack of what trains, which need not be the backbone's own tensors."""
    return stack(name, value, {})


def stacks(name: str, value: Any, given: Mapping[str, Any]) -> list[Adapter]:
    """Several stacks of one base and as many clients, of any ranks."""
    found = plain.several(trained_stack)(name, value, given)
    for i, one in enumerate(found):
        whole_adapter(f"{name}[{i}]", one, {})
        if _count(one) != _count(found[0]):
            raise ValueError(f"{name}[{i}]: {_count(one)} adapters for {_count(found[0])} clients")
    return [like_but_rank(f"{name}[{i}]", one, _first_client(found[0]), 1) for i, one in enumerate(found)]


def model(name: str, value: Any, given: Mapping[str, Any]) -> Adapter:
    """One of the models that are merged: of a backbone, a stack; else an adapter or a stack like the one before."""
    if "adapted" in given:
        return stack(name, value, given)
    found, before = whole_adapter(name, value, given), given.get("federated")
    if name == "local":
        _like("federated and local", found, before)
    return found


def like_federated(name: str, value: Any, given: Mapping[str, Any]) -> Adapter:
    """A stack like the one before it, ``federated``."""
    return model(name, stack(name, value, given), given)


def models(name: str, value: Any, given: Mapping[str, Any]) -> list[Adapter]:
    """Several adapters or stacks of one base and in one order of tensors."""
    found = plain.several(whole_adapter)(name, value, given)
    for i, other in enumerate(found):
        _like(f"{name}[{i}]", other, found[0])
    return [{key: one[key] for key in found[0]} for one in found]


def _like(name: str, adapter: Adapter, first: Adapter) -> None:
    try:
        check_same_base(first, adapter)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _count(stack: Adapter) -> int:
    return len(next(iter(stack.values())))


def _first_client(stack: Adapter) -> Adapter:
    return {key: tensor[0] for key, tensor in stack.items()}


def like_but_rank(name: str, adapter: Adapter, first: Adapter, dims: int) -> Adapter:
    """The adapter in the order of the first one's tensors, which must be its own; ``dims`` stand before them."""
    if odd := sorted(adapter.keys() ^ first.keys()):
        raise ValueError(f"{name} must be of this base: {len(odd)} tensors are of one only, such as {odd[0]!r}")
    for key, like in first.items():
        found, expected = list(adapter[key].shape[dims:]), list(like.shape)
        if is_lora(key) and len(found) == len(expected):
            found[is_lora(key, "B")] = expected[is_lora(key, "B")]  # the rank
        if found != expected:
            shapes = f"{tuple(adapter[key].shape)}, expected {(*['C'] * dims, *expected)}"
            raise ValueError(f"{name} must be of this base: {key!r} has shape {shapes}")
    return {key: adapter[key] for key in first}


def fitting(name: str, adapter: Adapter, adapted: Any, dims: int = 1) -> Adapter:
    """The stack (with 0 ``dims``, the adapter) in the order of the backbone's tensors, which must be its own."""
    found = like_but_rank(name, adapter, adapted.initial, dims)
    for layer in lora_layers(found):
        a, b = (found[key].shape for key in factor_names(layer))
        if a[dims] != b[dims + 1] and not adapted.model.get_submodule(layer).lora_A["default"]._forward_hooks:
            raise ValueError(
                f"{name} must have one rank in each layer: {layer!r} has {a[dims]} in A, {b[dims + 1]} in B"
            )
    return found


def of_as_many(kind: str) -> Check:
    """A ``Split`` or a ``Federation`` of as many clients as every stack before it has."""

    def check(name: str, value: Any, given: Mapping[str, Any]) -> Any:
        found = plain.kind(kind)(name, value, given)
        _check_inputs(name, found, given)
        for other in ("adapters", "start", "federated", "local", "optimum", "direction"):
            stack = given[other] if isinstance(given.get(other), Mapping | Tensor) else None
            count = len(found) if stack is None else _count(stack) if isinstance(stack, Mapping) else len(stack)
            if count != len(found):
                raise ValueError(f"{other}: {count} adapters for {len(found)} clients")
        return found

    return check


def _check_inputs(name: str, split: Any, given: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for inputs in a precision that the backbone does not compute in."""
    x = getattr(split, "x", {}) if "adapted" in given else {}
    for tensor in x.values() if isinstance(x, dict) else [x]:
        if tensor.is_floating_point() and tensor.dtype not in (known := given["adapted"].dtypes):
            raise ValueError(f"{name}: inputs of {tensor.dtype} for a backbone of {' and '.join(map(str, known))}")


def per_client(check: Check) -> Check:
    """As many numbers as there are clients in the split."""

    def check_count(name: str, value: Any, given: Mapping[str, Any]) -> Tensor:
        found = check(name, value, given)
        if len(found) != len(given["split"]):
            raise ValueError(f"{name}: {len(found)} of them for {len(given['split'])} clients")
        return found

    return check_count


def labels(name: str, value: Any, given: Mapping[str, Any]) -> Tensor:
    """Labels in the shape of the split's own."""
    like = given["split"].y
    found = numbers(like.dim(), whole=True, least=-100)(name, value, given)
    if found.shape != like.shape:
        refuse(name, f"of shape {tuple(like.shape)}, as those of split", found)
    if (odd := found[(found < 0) & (found != -100)]).numel():
        raise ValueError(f"{name} must be at least 0, or -100 where one is ignored, not {int(odd[0])}")
    return found.long()


def state(name: str, value: Any, given: Mapping[str, Any]) -> Any:
    """An optimiser's state, of as many clients and numbers as there are."""
    found = plain.kind("OptimizerState")(name, value, given)
    if (count := len(found.steps)) != len(given["split"]):
        raise ValueError(f"{name}: the state of {count} clients for {len(given['split'])}")
    one = _first_client(given["adapters"]) if "adapters" in given else given.get("adapter") or given["adapted"].initial
    size = sum(tensor.numel() for tensor in one.values())
    if found.mean.shape[1:] != (size,) or found.square.shape != found.mean.shape:
        raise ValueError(f"{name} must have {size} numbers for each client, not shape {tuple(found.mean.shape)}")
    return found


def client_row(name: str, value: Any, given: Mapping[str, Any]) -> int:
    """The row of a client in the stack before."""
    return plain.whole(0, _count(given["stack"]) - 1)(name, value, given)


def fixed(name: str, value: Any, given: Mapping[str, Any]) -> Adapter:
    """A stack of tensors that do not train; there may be none."""
    if isinstance(value, Mapping) and not value:
        return value
    found = any_adapter(name, value, given)
    if (count := _count(found)) != len(given["split"]):
        raise ValueError(f"{name}: {count} adapters for {len(given['split'])} clients")
    return found


def direction(name: str, value: Any, given: Mapping[str, Any]) -> Tensor:
    """A number for each of the stack's, a row per client."""
    found, size = (
        numbers(2)(name, value, given),
        sum(tensor.numel() for tensor in _first_client(given["adapters"]).values()),
    )
    if found.shape[1] != size:
        refuse(name, f"of shape (C, {size}), a row for each client's adapter", found)
    return found


def mixing_weight(low: float | None = 0, high: float | None = 1) -> Check:
    """A number in these bounds, one for every client of a stack, or a dictionary of either by layer."""
    one = numbers(0, 1, least=low, most=high)

    def check(name: str, value: Any, given: Mapping[str, Any]) -> Any:
        adapter = given["federated"] if "federated" in given else given["adapters"][0]
        if not isinstance(value, Mapping):
            found = one(name, value, given)
            if found.dim() and (not is_stack(adapter) or len(found) != _count(adapter)):
                stack = f"a stack of {_count(adapter)} clients" if is_stack(adapter) else "one adapter"
                raise ValueError(f"{name}: {len(found)} weights for {stack}")
            return found if isinstance(value, Tensor) or found.dim() else float(found)
        layers = {layer_of(key) for key in adapter}
        if missing := sorted(layers - value.keys()):
            raise ValueError(f"{name}: no mixing weight for {missing[0]!r}")
        if unknown := sorted(value.keys() - layers):
            raise ValueError(f"{name}: there is no layer {unknown[0]!r}")
        return {layer: check(f"{name}[{layer!r}]", value[layer], given) for layer in value}

    return check


def weights_of_clients(name: str, value: Any, given: Mapping[str, Any]) -> Tensor:
    """A mixing weight for each adapter of a stack."""
    found = numbers(1, least=0, most=1)(name, value, given)
    if len(found) != _count(given["adapters"]):
        raise ValueError(f"{name}: {len(found)} weights for {_count(given['adapters'])} adapters")
    return found


def mixing_weights(name: str, value: Any, given: Mapping[str, Any]) -> list:
    """As many weights as adapters, any finite ones."""
    found = as_numbers(name, value).tolist() if isinstance(value, Tensor | np.ndarray) and value.ndim == 1 else value
    found = plain.several(mixing_weight(None, None))(name, found, given)
    if len(found) != len(given["adapters"]):
        raise ValueError(f"{name}: {len(given['adapters'])} adapters, {len(found)} weights")
    return found


def shaped_like(other: str, *dims: int, **bounds: Any) -> Check:
    """A tensor of numbers in the shape of another argument's."""

    def check(name: str, value: Any, given: Mapping[str, Any]) -> Tensor:
        found = numbers(*dims, **bounds)(name, value, given)
        if found.shape != given[other].shape:
            refuse(name, f"of shape {tuple(given[other].shape)}, as {other}", found)
        return found

    return check


def curves_over(other: str) -> Check:
    """Numbers (C, W), a column for each of another argument's numbers."""

    def check(name: str, value: Any, given: Mapping[str, Any]) -> Tensor:
        found = numbers(2)(name, value, given)
        if found.shape[1] != len(given[other]):
            raise ValueError(f"{name}: {found.shape[1]} columns for {len(given[other])} {other}")
        return found

    return check


def one_for_each(other: str, **bounds: Any) -> Check:
    """Numbers (C,), as many as another argument has rows."""

    def check(name: str, value: Any, given: Mapping[str, Any]) -> Tensor:
        found = numbers(1, **bounds)(name, value, given)
        if len(found) != len(given[other]):
            raise ValueError(f"{name}: {len(found)} of them for {len(given[other])} clients")
        return found

    return check


def sizes_of(other: str, dim: int | None = None) -> Check:
    """How many examples each client of another argument has: 1 or more, at most those along ``dim``."""

    def check(name: str, value: Any, given: Mapping[str, Any]) -> Tensor:
        found = one_for_each(other, whole=True, least=1)(name, value, given)
        if dim is not None and (most := given[other].shape[dim]) < found.max():
            raise ValueError(f"{name} must be at most {most}, the examples of {other}, not {int(found.max())}")
        return found

    return check


def groups_of(other: str) -> Check:
    """The number of the group of each coordinate, the last dimension of another argument."""

    def check(name: str, value: Any, given: Mapping[str, Any]) -> Tensor:
        found = numbers(1, whole=True, least=0)(name, value, given)
        if len(found) != given[other].shape[-1]:
            raise ValueError(f"{name}: {len(found)} of them for {given[other].shape[-1]} coordinates of {other}")
        if found.max() >= len(found):
            raise ValueError(f"{name} must be below {len(found)}, the number of coordinates, not {int(found.max())}")
        return found.long()

    return check


def interval(name: str, value: Any, given: Mapping[str, Any]) -> tuple[float, float]:
    """Two ends, the lower one first."""
    low, high = ends = tuple(plain.several(plain.finite)(name, value, given))[:2] if _is_pair(value) else (1, 0)
    if low > high:
        refuse(name, "two numbers, the smaller one first", value)
    return ends


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def scaling(name: str, value: Any, given: Mapping[str, Any]) -> dict[str, float]:
    """The scaling of every adapted layer."""
    found = plain.named(plain.positive)(name, value, given)
    adapter = given.get("adapter") or next(iter(given.get("models") or given.get("adapters") or [{}]))
    if missing := sorted(set(lora_layers(adapter)) - found.keys()):
        raise ValueError(f"{name} must have every adapted layer, but {missing[0]!r} is missing")
    return found


STACKS: dict[str, Check] = {
    "adapter": one_adapter,
    "adapters": stack,
    "stack": stack,
    "federated": model,
    "local": model,
    "optimum": stack,
    "models": models,
    "split": of_as_many("Split"),
    "federation": of_as_many("Federation"),
    "labels": labels,
    "state": state,
    "fixed": fixed,
    "weight": mixing_weight(),
    "scaling": scaling,
    "train_sizes": per_client(numbers(1, whole=True, least=1)),
    "g_f": numbers(3),
    "g_l": shaped_like("g_f", 3),
}


def door(**checks: Check) -> Callable[[Callable], Callable]:
    """The decorator of ``door.py`` with the checks of adapters, clients and weights."""
    return plain.door(**STACKS | checks)


@door(adapter=whole_adapter)
def delta(adapter: Adapter, scaling: dict[str, float]) -> Adapter:
    """The task vector: ``scaling * B A`` of every adapted layer, and the directly trained weights.

    Takes one adapter, A ``(r, in)`` and B ``(out, r)``, or a stack, A ``(C, r, in)`` and B ``(C, out, r)``;
    returns ``{layer.weight: (..., out, in), ...}``. A convolution's kernel is flattened into ``in``.
    """
    result = {}
    for layer in lora_layers(adapter):
        a, b = factors(adapter, layer)
        result[f"{layer}.weight"] = scaling[layer] * (b @ a)
    return result | {name: tensor for name, tensor in adapter.items() if not is_lora(name)}


@door(adapters=stacks)
def delta_inner_products(adapters: Sequence[Adapter], scaling: dict[str, float]) -> Tensor:
    """The inner products of the deltas of K stacks, ``(C, K, K)`` float64, without forming a delta.

    ``<B_i A_i, B_j A_j> = tr (B_iᵀ B_j)(A_j A_iᵀ)`` in every adapted layer, plus the products of the directly trained
    weights. The stacks may have different ranks.
    """
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


@door(adapters=several(one_adapter))
def stack_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """Adapters of several clients as one stack: each tensor gets the clients on dim 0."""
    check_same_base(*adapters)
    return {name: torch.stack([adapter[name] for adapter in adapters]) for name in adapters[0]}


@door()
def repeat_adapter(adapter: Adapter, clients: int) -> Adapter:
    """One adapter given to every client: a stack whose rows are equal (and share no memory)."""
    return {name: tensor.expand(clients, *tensor.shape).clone() for name, tensor in adapter.items()}


@door(stack=rows_of_clients, client=client_row)
def client_adapter(stack: Adapter, client: int) -> Adapter:
    """One client's adapter out of a stack, by its row."""
    return {name: tensor[client] for name, tensor in stack.items()}


def select_clients(stack: Adapter, rows: Tensor | slice) -> Adapter:
    """The stack of some clients, by their rows (on any device)."""
    if isinstance(rows, slice):
        return {name: tensor[rows] for name, tensor in stack.items()}
    return {name: tensor[rows.to(tensor.device)] for name, tensor in stack.items()}


def flatten(stack: Adapter) -> Tensor:
    """A stack as one matrix ``(C, P)``: a row per client, the tensors in the dictionary's order."""
    return torch.cat([tensor.flatten(1) for tensor in stack.values()], dim=1)


def unflatten(flat: Tensor, like: Adapter) -> Adapter:
    """The inverse of ``flatten``; ``like`` is one adapter (no client dimension) that gives names and shapes."""
    parts = flat.split([tensor.numel() for tensor in like.values()], dim=1)
    return {name: part.reshape(-1, *like[name].shape) for name, part in zip(like, parts)}


@door(adapter=named(kind("Tensor"), least=0))
def adapter_bytes(adapter: Adapter) -> int:
    """What an adapter weighs when it travels: the bytes of its tensors, in the dtype they have."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter.values())
