"""The frozen trunk, all blocks before the first adapted one: its features of an example are computed once.

In a network with its blocks in a list (torchvision's ViTs, BERT-like encoders, Llama-like language models), these
blocks compute the same for every adapter. ``run_frozen_blocks`` computes their features once; ``call_network`` skips
the blocks and runs everything before and after them (embedding, masks, norm, head) as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checks import Size, checked
from ..federation.inputs import Inputs

LINEAR = nn.Linear, Conv1D  # the second is GPT-2's, of ``transformers``: its weight is (in, out)
HIDDEN = "(hidden)"  # the name of the frozen blocks' features of an example
ALONE = "(input)"  # the name of an only input tensor that goes together with HIDDEN


class _Reached(Exception):
    """The frozen blocks are done: there is no need to run the rest."""


def network_blocks(model: nn.Module, layers: Sequence[str]) -> tuple[list[nn.Module], int]:
    """The outermost list of modules that holds one of ``layers``, and how many come before the first such module."""
    for layer in layers:
        names = layer.split(".")
        for depth in range(1, len(names)):
            path = ".".join(names[:depth])
            blocks = model.get_submodule(path)
            if isinstance(blocks, nn.ModuleList | nn.Sequential):
                inside = blocks.named_modules(remove_duplicate=False)
                order = [name for name, _ in inside if name and "." not in name]
                adapted = {name[len(path) + 1 :].split(".")[0] for name in layers if name.startswith(f"{path}.")}
                return list(blocks), min(map(order.index, adapted))
    return [], 0


@checked
def linear_layers(network: nn.Module, last: Size | None = None) -> list[str]:
    """The names of the linear layers in the blocks of a network, of the ``last`` so many or of all: targets of LoRA.

    GPT-2's ``Conv1D``, a linear layer with a transposed weight, is one of them. The network's blocks are the list of
    modules that has the most parameters. Raises ``ValueError`` where there are not as many.
    """
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    blocks = list(max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=[]))
    last = len(blocks) if last is None else last
    if not 1 <= last <= len(blocks):
        raise ValueError(f"the last {last} blocks of a network that has {len(blocks)}")
    layers = {module for block in blocks[-last:] for module in block.modules() if type(module) in LINEAR}
    return [name for name, module in network.named_modules() if module in layers]


def call_network(call: Callable, x: Inputs, frozen: Sequence[nn.Module]) -> Tensor:
    """The logits of ``call``, a network or a function that runs it, on a batch.

    A mapping's tensors are keyword arguments. With ``HIDDEN`` among them the ``frozen`` blocks return it. Of a Hugging
    Face ``ModelOutput`` the logits are taken.
    """
    if isinstance(x, Tensor):
        output = call(x)
    else:
        named = dict(x)
        hidden = named.pop(HIDDEN, None)
        args = [named.pop(ALONE)] if ALONE in named else []
        skipped = frozen if hidden is not None else []
        with replaced_forwards(dict.fromkeys(skipped, lambda *args, **kwargs: hidden)):
            output = call(*args, **named)
    return logits_of(output)


def logits_of(output: Any) -> Tensor:
    """The logits of a network's output: the output itself, or its entry or attribute ``logits``.

    Raises ``ValueError`` for an output in which they have no name.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        names = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        what = f"a {type(output).__name__}{names}"
        raise ValueError(f"the network returns {what}: wrap it in a module that returns the logits, a tensor")
    return found


def check_names(network: nn.Module, x: Inputs) -> None:
    """Raise ``ValueError`` for a mapping with a name that the network's ``forward`` does not know, or without one that
    it needs."""
    parameters = signature(network.forward)
    try:
        parameters.bind(*[None] * (ALONE in x), **dict.fromkeys(x.keys() - {ALONE, HIDDEN}))
    except TypeError as error:
        raise ValueError(f"the backbone takes {', '.join(parameters.parameters)}: {error}") from None


@torch.no_grad()
def run_frozen_blocks(
    network: nn.Module, x: Inputs, frozen: Sequence[nn.Module], trained: Sequence[nn.Module]
) -> Inputs:
    """``x`` with the features of the ``frozen`` blocks, as ``HIDDEN``.

    It is ``x`` itself where there are no such blocks, where one of the ``trained`` modules is called before they are
    done, and where a block returns more than a tensor.
    """
    if not frozen:
        return x
    found: list[Tensor] = []

    def reach(module, args, output=None):
        if isinstance(output, Tensor):
            found.append(output)
        raise _Reached

    hooks = [frozen[-1].register_forward_hook(reach), *(module.register_forward_pre_hook(reach) for module in trained)]
    try:
        call_network(network, x, [])
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return {**(x if isinstance(x, dict) else {ALONE: x}), HIDDEN: found[0]} if found else x


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Replace the modules' ``forward`` inside a ``with`` block."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
