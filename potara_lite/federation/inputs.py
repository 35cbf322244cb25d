"""The examples of one client, inputs and labels: what they must be, and how those of several clients are padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import PlainValidator
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import all_finite, invalid, is_dense, shown

Inputs = Tensor | dict[str, Tensor]  # one tensor, or by name what the network is called with (token ids and their mask)
Examples = tuple[Inputs, Tensor]  # inputs (n, ...); labels (n,), or token-level targets (n, T)
PADDING = -100  # the label of a padded example and of a token that is no target, which cross_entropy ignores
MASK = "attention_mask"  # of a mapping: 1 for a real token, 0 for padding


def _as_pair(value: Any) -> Any:
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if is_pair:
        return value
    ways_out = {
        Dataset: " (for a Dataset, see from_datasets)",
        dict: " (for Hugging Face's rows, see from_huggingface)",
    }
    way_out = next((text for kind, text in ways_out.items() if isinstance(value, kind)), "")
    invalid("", f"a pair of inputs and labels{way_out}", value)


ExamplesPair = Annotated[Examples, PlainValidator(_as_pair)]  # in a signature; ``check_examples`` looks inside
AnyPair = Annotated[tuple[Any, Any], PlainValidator(_as_pair)]  # of what becomes tensors


def map_inputs(function: Callable[..., Tensor], *inputs: Inputs) -> Inputs:
    """``function`` of the tensors, or name by name of those of mappings."""
    if isinstance(inputs[0], Tensor):
        return function(*inputs)
    return {name: function(*(one[name] for one in inputs)) for name in inputs[0]}


def take(inputs: Inputs, index) -> Inputs:
    """The inputs at an index: ``tensor[index]``, of every tensor."""
    return map_inputs(lambda tensor: tensor[index], inputs)


def any_tensor(inputs: Inputs) -> Tensor:
    """The tensor, or the first one of a mapping: for what all of them share."""
    return inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))


def text_lengths(x: Inputs) -> list[int] | None:
    """The number of tokens of each text; ``None`` of inputs that are not, all of them, of the tokens of a mask, such as
    images beside the texts."""
    if not isinstance(x, dict) or MASK not in x or x[MASK].dim() != 2:
        return None
    is_of_tokens = all(tensor.dim() == 1 or tensor.shape[:2] == x[MASK].shape for tensor in x.values())
    return (x[MASK] != 0).sum(1).tolist() if is_of_tokens else None


def cut_texts(x: dict[str, Tensor], y: Tensor, length: int) -> Examples:
    """Texts ``(..., T)`` cut to ``length`` tokens, with their targets where each token has one."""
    dim = x[MASK].dim() - 1

    def cut(tensor: Tensor) -> Tensor:
        return tensor.narrow(dim, 0, length) if tensor.dim() > dim else tensor

    return map_inputs(cut, x), y if is_float(y) else cut(y)


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor holds floating numbers."""
    return is_dense(tensor) and tensor.is_floating_point()


def is_integer(tensor: Tensor) -> bool:
    """Whether a tensor holds whole numbers; true and false are none."""
    return is_dense(tensor) and not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_examples(client: int | str, x: Inputs, y: Tensor) -> None:
    """Raise ``ValueError``, which names the client (or what it is called), for anything but examples.

    There are as many inputs as labels, one or more. Inputs are finite floating numbers, or token ids; labels are whole
    numbers of 0 or more, one for each input or a target for each token, or real targets ``(n,)`` or ``(n, d)``.
    """
    name = client if isinstance(client, str) else f"client {client}"
    tensors = list(x.values()) if isinstance(x, dict) and x else [x]
    for part, found in (("labels", [y]), ("inputs", tensors)):
        if odd := [one for one in found if not isinstance(one, Tensor) or one.dim() == 0]:
            raise ValueError(f"{name}: {part} must be tensors with an example in each row, not {shown(odd[0])}")
    if len(y) == 0:
        raise ValueError(f"{name} has no examples")
    for tensor in tensors:
        if len(tensor) != len(y):
            raise ValueError(f"{name} has {len(tensor)} inputs and {len(y)} labels")
        _check_input(name, tensor)
    if isinstance(x, dict) and MASK in x:
        _check_mask(name, x[MASK].flatten(1) != 0)
    _check_labels(name, x, y)


def _check_input(name: str, tensor: Tensor) -> None:
    if not is_dense(tensor):
        raise ValueError(f"{name}: inputs must hold their numbers, not {tensor.layout} on {tensor.device}")
    if not is_float(tensor) and (tensor.dim() > 2 or not is_integer(tensor)):
        raise ValueError(f"{name}: images must be floating numbers, such as those in [0, 1], not {tensor.dtype}")
    if not all_finite(tensor):
        is_finite = tensor.isfinite().reshape(len(tensor), -1).all(1)
        raise ValueError(f"{name}: input {int((~is_finite).nonzero()[0])} is not finite")


def _check_mask(name: str, is_token: Tensor) -> None:
    if (empty := ~is_token.any(1)).any():
        raise ValueError(f"{name}: example {int(empty.nonzero()[0])} is empty: its {MASK} is 0 everywhere")
    if (late := (is_token[:, 1:] & ~is_token[:, :-1]).any(1)).any():
        raise ValueError(f"{name}: example {int(late.nonzero()[0])} has padding before its tokens: pad on the right")


def _check_labels(name: str, x: Inputs, y: Tensor) -> None:
    if is_float(y):
        if y.dim() > 2 or not all_finite(y):
            raise ValueError(
                f"{name}: real targets must be finite, of shape ({len(y)},) or ({len(y)}, d), not {shown(y)}"
            )
        return
    if not is_integer(y):
        raise ValueError(f"{name}: labels must be whole numbers, or real targets, not {y.dtype}")
    is_column = isinstance(x, Tensor) and y.shape[1:] == (1,)
    if y.dim() > 2 or (y.dim() == 2 and (is_column or y.shape[1:] != any_tensor(x).shape[1:2])):
        raise ValueError(f"{name}: labels must be of shape ({len(y)},), or a target per token, not {shown(y)}")
    if (bad := y[(y < 0) & ((y != PADDING) | (y.dim() == 1))]).numel():
        raise ValueError(f"{name}: label {int(bad[0])} is below 0")
    if isinstance(x, dict) and MASK in x and x[MASK].shape == y.shape:
        _check_token_targets(name, x, y)
    if y.dim() > 1 and (ignored := (y == PADDING).all(1)).any():
        raise ValueError(f"{name}: all targets of example {int(ignored.nonzero()[0])} are {PADDING}, ignored")


def _check_token_targets(name: str, x: dict[str, Tensor], y: Tensor) -> None:
    is_real = x[MASK] != 0
    if (odd := ((y != PADDING) & ~is_real).any(1)).any():
        raise ValueError(
            f"{name}: example {int(odd.nonzero()[0])} has targets at padding, where they must be {PADDING}"
        )
    last = is_real.sum(1, keepdim=True) - 1  # the last real token, which nothing follows
    is_input = ((y == x["input_ids"]) | (y == PADDING)).all() if "input_ids" in x else False
    if is_input and (y.gather(1, last) >= 0).any():
        raise ValueError(f"{name}: targets are the inputs themselves, not the tokens that follow: see next_tokens")


def kind_of(x: Inputs) -> dict[str, str]:
    """The dtype and the dimensions of each tensor of the inputs."""
    named = {"one tensor": x} if isinstance(x, Tensor) else x
    return {name: f"{t.dtype} of {t.dim()} dimensions".removeprefix("torch.") for name, t in named.items()}


def check_alike(ids: Sequence[int], examples: Sequence[Examples]) -> None:
    """Raise ``ValueError`` unless all clients have inputs of the same names, dtypes and dimensions, and of the same
    length where no mask says what is padding."""
    first_x, first_y = examples[0]
    for client, (x, y) in zip(ids, examples):
        if kind_of(x) != kind_of(first_x):
            raise ValueError(f"client {client} has inputs {kind_of(x)}, client {ids[0]} has {kind_of(first_x)}")
        if is_float(y) != is_float(first_y) or (is_float(y) and y.shape[1:] != first_y.shape[1:]):
            kinds = f"{y.dtype} {tuple(y.shape[1:])}, client {ids[0]} of {first_y.dtype} {tuple(first_y.shape[1:])}"
            raise ValueError(f"client {client} has targets of {kinds}".replace("torch.", ""))
        if y.dim() != first_y.dim():
            raise ValueError(f"client {client} has labels of {y.dim()} dimensions, client {ids[0]} of {first_y.dim()}")
        shape, expected = any_tensor(x).shape[1:], any_tensor(first_x).shape[1:]
        if shape != expected and (isinstance(x, Tensor) or MASK not in x):
            raise ValueError(
                f"client {client} has inputs of shape {tuple(shape)}, client {ids[0]} of {tuple(expected)}: texts of "
                f"different lengths come as a mapping with an {MASK!r}"
            )


def padding_of(y: Tensor) -> float:
    """What a padded target is: -100 as a label, NaN as a real number."""
    return float("nan") if is_float(y) else PADDING


def pad_stack(tensors: Sequence[Tensor], value: float) -> Tensor:
    """The clients' tensors ``(n, ...)``, each filled up with ``value`` at the ends, as one ``(C, N, ...)``."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors))]
    stack = tensors[0].new_full((len(tensors), *shape), value)
    for row, tensor in zip(stack, tensors):
        row[tuple(map(slice, tensor.shape))] = tensor
    return stack


def pad_concatenate(tensors: Sequence[Tensor], value: float) -> Tensor:
    """The clients' tensors ``(n, ...)`` one after another, texts filled up with ``value`` to the longest one."""
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(tensors)
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors))]
    joined = tensors[0].new_full((sum(map(len, tensors)), *shape), value)
    for rows, tensor in zip(joined.split([len(tensor) for tensor in tensors]), tensors):
        rows[(slice(None), *map(slice, tensor.shape[1:]))] = tensor
    return joined
