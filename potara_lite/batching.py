"""One function for every client: all at once through ``vmap``, one after another where it cannot, in chunks that fit.

``each`` does it and ``plan`` decides how. To decide, ``plan`` runs the function once on one client and two examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import vmap

from .adapters import AdaptedBackbone, Adapter, flatten, repeat_adapter, unflatten
from .grouped import Grouped

__all__ = ["each", "in_precision", "plan"]

MEMORY = 2**28  # bytes of a chunk on the CPU
TRIALS: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()  # what was measured, while the model lives
Forward = Callable[[Adapter, Tensor], Tensor]


def each(function: Callable[..., Tensor], *stacks: Tensor | Adapter, at_once: bool = True) -> Tensor:
    """``function`` of every client's own tensors, ``(C, ...)``: one batched program, or one client after another.

    ``stacks``: the function's arguments, tensors or dictionaries of tensors with the clients on dim 0.
    """
    if at_once:
        return vmap(function)(*stacks)
    return torch.stack([function(*client) for client in zip(*map(_unbind, stacks))])


def _unbind(stack: Tensor | Adapter) -> Iterable[Tensor | Adapter]:
    if isinstance(stack, Tensor):
        return stack.unbind()
    return (dict(zip(stack, tensors)) for tensors in zip(*(tensor.unbind() for tensor in stack.values())))


def in_precision(adapted: AdaptedBackbone | Grouped, dtype: torch.dtype | None) -> Forward:
    """``adapted`` with matrix products and convolutions in ``dtype`` (bf16, say) and logits in the adapter's own.

    PyTorch's autocast chooses which operations are safe; weights, gradients and the optimiser keep their dtype. With
    ``None`` it is ``adapted`` itself.
    """
    if dtype is None:
        return adapted

    def forward(adapter: Adapter, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype):
            logits = adapted(adapter, x)
        return logits.to(next(iter(adapted.initial.values())).dtype)

    return forward


def plan(
    adapted: AdaptedBackbone,
    forward: Forward,
    adapters: Adapter,
    x: Tensor,
    *,
    batch_size: int,
    backward: bool,
    at_once: bool | None = None,
    chunk_size: int | None = None,
    memory: float | None = None,
    rows: int | None = None,
    known: str | None = None,
) -> tuple[bool, list[slice]]:
    """Whether to run the clients at once, and in which chunks, so that a chunk takes about ``memory`` bytes.

    By default 256 MiB, on a GPU half of its memory.

    ``forward`` will see stacks of ``adapters`` and ``batch_size`` examples of ``x`` ``(C, N, ...)`` for each. Bytes of
    one client: what autograd keeps of ``forward``, plus four times its largest tensor for what is alive in between,
    plus ten ``rows`` of the adapter for gradients and the optimiser; without ``backward``, eight times the largest
    tensor and two rows. These are bytes in use, on the large side; what a C library keeps of freed memory can double
    them, and the data and the results for all clients come on top. A ``chunk_size`` overrules the estimate. Clients
    that cannot run at once come one by one.

    A function that differentiates by itself (``torch.func.grad`` in an objective) is taken to need four times what the
    backbone does. The trial costs time in every call; ``known`` names a ``forward`` whose trial may be remembered for
    adapters and examples of the same shapes.

    ``at_once=None`` tries ``vmap`` and, where it fails, warns why; ``True`` lets its error through, and so does a
    random operation, by which one client's result would depend on the others. Raises ``ValueError`` for a
    ``chunk_size`` below 1 or a ``memory`` that is not positive.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    clients, first, chunk = len(x), next(iter(adapted.initial.values())), chunk_size
    if memory is None:
        cuda = first.device.type == "cuda"
        memory = torch.cuda.get_device_properties(first.device).total_memory / 2 if cuda else MEMORY
    if not memory > 0:
        raise ValueError(f"memory must be a positive number of bytes, not {memory}")
    if at_once is None or (at_once and chunk is None):
        one = {name: tensor[:1].detach().to(first.device) for name, tensor in adapters.items()}
        some = x[:1, : min(2, batch_size)].to(first.device)
        try:
            try:
                kept, largest = _saved(adapted, forward, one, some, known)
            except RuntimeError:  # a function that differentiates lets nobody look, but may well run
                each(forward, one, some)
                plain = _saved(adapted, adapted, repeat_adapter(adapted.initial, 1), some, None)
                kept, largest = (4 * size for size in plain)
        except RuntimeError as error:
            if at_once or "random" in str(error):
                raise
            with torch.no_grad():
                each(forward, one, some, at_once=False)  # a backbone that fails alone fails here, in its own words
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"the clients run one after another: vmap cannot take this backbone ({reason})", stacklevel=3)
            at_once = False
        else:
            scale, row = batch_size / some.shape[1], sum(t.numel() * t.element_size() for t in one.values())
            alive = kept + 4 * largest if backward else 8 * largest
            size = scale * alive + row * (rows or (10 if backward else 2))
            at_once, chunk = True, chunk or max(1, int(memory // size))
    chunk = min(chunk, clients) if at_once else 1
    count = -(-clients // chunk)
    chunk = chunk if chunk_size else -(-clients // count)  # 100 clients of which 60 fit: 50 and 50, not 60 and 40
    return at_once, [slice(start, min(start + chunk, clients)) for start in range(0, clients, chunk)]


@torch.enable_grad()
def _saved(adapted: AdaptedBackbone, forward: Forward, one: Adapter, x: Tensor, known: str | None) -> tuple[int, int]:
    """Bytes that autograd keeps of ``forward`` for one client, in all and in the largest tensor; weights aside."""
    shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in [*one.items(), ("", x)])
    key, trials = (known, shapes, x.device, adapted.model.training), TRIALS.setdefault(adapted.model, {})
    if known is not None and key in trials:
        return trials[key]
    flat = flatten(one).requires_grad_()
    weights = (*adapted.model.parameters(), *adapted.model.buffers(), flat)
    shared = {tensor.untyped_storage().data_ptr() for tensor in weights}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        like = {name: tensor[0] for name, tensor in one.items()}
        logits = each(forward, unflatten(flat, like), x)  # alive until here, so that no address is counted twice
    found = sum(sizes.values()), max(sizes.values(), default=logits.untyped_storage().nbytes())
    if known is not None:
        trials[key] = found
    return found
