"""One function for every client: vectorised by ``vmap``, one after another where it cannot be, in chunks that fit.

``map_clients`` does it and ``plan_execution`` decides how; to decide, it runs the function once on one client and two
examples. ``Execution`` has the caller's options.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, flatten, repeat_adapter, unflatten
from ..checks import Flag, Positive, Size, checked
from ..federation.inputs import Inputs, any_tensor, map_inputs
from .grouped_lora import GroupedLoRA, group_lora, measured_once

CPU_MEMORY = 2**28  # bytes of a chunk on the CPU; without a backward pass a quarter, which caches hold
Forward = Callable[[Adapter, Inputs], Tensor]


@checked
@dataclass(frozen=True)
class Execution:
    """How the clients are run. It changes time and memory, and no result beyond rounding.

    ``chunk_size``: clients (for per-sample gradients, examples) at a time, by default as many as fit in
    ``memory_bytes`` (256 MiB, 64 without a backward pass; on a GPU half of its memory). ``vectorize``: whether a chunk
    is one batched program; by default wherever ``vmap`` takes the backbone, else the clients run one after another and
    a warning says why.
    ``autocast=torch.bfloat16`` computes in bf16 where that is safe. ``compile`` gives the training step to
    ``torch.compile``, which takes seconds for each new combination of shapes and then makes each step faster.
    """

    chunk_size: Size | None = None
    memory_bytes: Positive | None = None
    vectorize: Flag | None = None
    autocast: torch.dtype | None = None
    compile: Flag = False

    def memory_on(self, device: torch.device, *, backward: bool) -> float:
        """The bytes that a chunk may take on this device, with or without a backward pass."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        if device.type == "cuda":
            return torch.cuda.get_device_properties(device).total_memory / 2
        return CPU_MEMORY if backward else CPU_MEMORY / 4


@dataclass(frozen=True)
class ExecutionPlan:
    """What ``plan_execution`` decided.

    ``vectorize``: whether a chunk is one batched program. ``chunks``: the clients of each. ``forward``: the backbone in
    the form that this takes. ``examples``: how many of the ``batch_size`` examples of one client fit.
    """

    vectorize: bool
    chunks: list[slice]
    forward: Forward
    examples: int


def map_clients(function: Callable[..., Tensor], *stacks: Inputs, vectorize: bool = True) -> Tensor:
    """``function`` of each client's tensors, ``(C, ...)``: one batched program, or one client after another.

    ``stacks``: the function's arguments, tensors or dictionaries of tensors with the clients on dim 0.
    """
    if vectorize:
        return vmap(function)(*stacks)
    return torch.stack([function(*client) for client in zip(*map(_unbind, stacks))])


def _unbind(stack: Inputs) -> Iterable[Inputs]:
    if isinstance(stack, Tensor):
        return stack.unbind()
    return (dict(zip(stack, tensors)) for tensors in zip(*(tensor.unbind() for tensor in stack.values())))


def with_autocast(adapted: AdaptedBackbone | GroupedLoRA, dtype: torch.dtype | None) -> Forward:
    """``adapted`` with matrix products and convolutions in ``dtype`` (bf16, say) and logits in the adapter's dtype.

    PyTorch's autocast chooses which operations are safe; weights, gradients and the optimiser keep their dtype. With
    ``None`` it is ``adapted`` itself.
    """
    if dtype is None:
        return adapted

    def forward(adapter: Adapter, x: Inputs) -> Tensor:
        with torch.autocast(any_tensor(x).device.type, dtype=dtype):
            logits = adapted(adapter, x)
        return logits.to(next(iter(adapted.initial.values())).dtype)

    return forward


def plan_execution(
    adapted: AdaptedBackbone,
    adapters: Adapter,
    x: Inputs,
    *,
    batch_size: int,
    backward: bool,
    execution: Execution,
    function: Forward | None = None,
    clients: int | None = None,
    adapter_copies: int | None = None,
) -> ExecutionPlan:
    """Whether to vectorise over the clients, and in which chunks, so that a chunk takes about its memory.

    The program gets stacks of ``adapters`` and, for each of ``clients`` (those of ``x``, unless given), ``batch_size``
    examples like those of ``x`` ``(C, N, ...)``, of which only the first client's first two are looked at.
    ``function(adapter, x)`` is what it computes, if that is more than the backbone's forward pass. The bytes of one
    client are estimated as what autograd keeps, plus four times the largest tensor for temporary results, plus ten
    ``adapter_copies`` for gradients and the optimiser; without ``backward``, eight times the largest tensor and two
    copies. The estimate is of bytes in use, and rather too large; freed memory that a C library keeps can double it,
    and the data and the results of all clients are not in it. Clients that cannot be vectorised run one by one.

    ``vectorize=None`` tries ``vmap`` and, where it fails, warns why. ``True`` raises the error of ``vmap`` instead. A
    random operation is always an error, because one client's result would depend on the others.
    """
    vectorize, chunk, examples = execution.vectorize, execution.chunk_size, batch_size
    if vectorize is None or (vectorize and chunk is None):
        one = {name: tensor[:1].detach().to(adapted.device) for name, tensor in adapters.items()}
        few = map_inputs(lambda tensor: tensor[:1, : min(2, batch_size)].to(adapted.device), x)
        try:
            kept, largest = _measure(adapted, one, few, execution.autocast, function)
        except RuntimeError as error:
            if vectorize or "random" in str(error):
                raise
            _warn_of_loop(function or with_autocast(adapted, execution.autocast), one, few, error)
            vectorize = False
        else:
            vectorize = True
            example_bytes = (kept + 4 * largest if backward else 8 * largest) / any_tensor(few).shape[1]
            copy_bytes = sum(tensor.numel() * tensor.element_size() for tensor in one.values())
            copies = copy_bytes * (adapter_copies or (10 if backward else 2))
            memory = execution.memory_on(adapted.device, backward=backward)
            chunk = chunk or max(1, int(memory // (example_bytes * batch_size + copies)))
            examples = max(1, min(batch_size, int((memory - copies) // example_bytes)))
    chunks = _even_chunks(
        clients or len(any_tensor(x)), chunk if vectorize and chunk else 1, exact=execution.chunk_size is not None
    )
    forward = group_lora(adapted) if vectorize else adapted
    return ExecutionPlan(vectorize, chunks, with_autocast(forward, execution.autocast), examples)


def _even_chunks(clients: int, most: int, exact: bool) -> list[slice]:
    """Slices of at most ``most`` clients; unless ``exact``, 100 of which 60 fit are 50 and 50, not 60 and 40."""
    size = max(1, min(most, clients))
    if not exact:
        size = -(-clients // -(-clients // size)) if clients else 1
    return [slice(start, min(start + size, clients)) for start in range(0, clients, size)]


def _warn_of_loop(function: Forward, one: Adapter, few: Inputs, error: RuntimeError) -> None:
    with torch.no_grad():
        map_clients(function, one, few, vectorize=False)  # a backbone that fails without vmap raises its error here
    reason = str(error).strip().splitlines()[0]
    text = f"the clients run one after another: vmap cannot take this backbone ({reason})"
    warnings.warn(text, stacklevel=_caller_level())


def _caller_level() -> int:
    """How far up the stack the code is that called this package; a warning points there."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(__package__.partition(".")[0]):
        level, frame = level + 1, frame.f_back
    return level


def _measure(
    adapted: AdaptedBackbone, one: Adapter, few: Inputs, autocast: torch.dtype | None, function: Forward | None
) -> tuple[int, int]:
    """Bytes that autograd keeps for one client, in all and in the largest tensor. Raises what ``vmap`` does.

    Those of the backbone are remembered for each kind of input. A function that differentiates (``torch.func.grad`` in
    an objective) does not allow this measurement; it is estimated at four times the backbone's bytes.
    """
    if function is not None:
        try:
            return _saved_bytes(adapted, function, one, few)
        except RuntimeError:
            map_clients(function, one, few)
            kept, largest = _measure(adapted, repeat_adapter(adapted.initial, 1), few, None, None)
            return 4 * kept, 4 * largest
    inputs = few if isinstance(few, dict) else {"": few}
    shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in [*one.items(), *inputs.items()])
    key = ("bytes of a client", shapes, autocast, any_tensor(few).device, adapted.model.training)
    return measured_once(adapted, key, lambda: _saved_bytes(adapted, with_autocast(adapted, autocast), one, few))


@torch.enable_grad()
def _saved_bytes(adapted: AdaptedBackbone, forward: Forward, one: Adapter, x: Inputs) -> tuple[int, int]:
    """What autograd keeps of ``forward`` for one client, in all and in the largest tensor; weights aside."""
    flat = flatten(one).requires_grad_()
    weights = (*adapted.model.parameters(), *adapted.model.buffers(), flat)
    shared = {tensor.untyped_storage().data_ptr() for tensor in weights}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would make a reference cycle with its graph

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        like = {name: tensor[0] for name, tensor in one.items()}
        logits = map_clients(forward, unflatten(flat, like), x)  # keeps the graph, so that no address is used twice
    return sum(sizes.values()), max(sizes.values(), default=logits.untyped_storage().nbytes())
