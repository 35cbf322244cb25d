"""Every client in one batch of one network: frozen layers see all examples, LoRA layers a group of rows per client.

``vmap`` gives each operation a client dimension, also in the frozen layers. Where only linear layers are adapted there
is a shorter way, because the frozen layers are the same for all clients: the clients' batches become one batch of
``C * B`` examples, the network runs on it as it is, and only its adapted layers treat the clients separately,

    y_i = W0 x_i + B_i (A_i x_i)          with A (C, r, in), B (C, out, r), the scaling in B, and x (C, rows, in).

The LoRA term is added in place, in the forward and in the backward pass. The same view gives per-sample gradients
without a copy of the adapter for every sample: an example's gradient in ``B`` is the product of the gradient in ``y``
with ``A x`` over that example's rows (Goodfellow, 2015, arXiv 1510.01799).

It is exact for networks whose logits of an example do not depend on the rest of its batch. ``group_lora`` refuses
networks that are known not to be so, and the first result for each kind of input is compared with that of ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.nn import functional as F

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, factor_names, is_lora
from ..compat import has_hooks, is_traced, tree_flatten, tree_unflatten
from ..federation.inputs import MASK, Inputs, any_tensor, map_inputs, take
from ..models.frozen_trunk import LINEAR, call_network, replaced_forwards
from .packing import Packing, packed_forwards

T = TypeVar("T")
OnBackward = Callable[..., None]  # (layer, activations, grad_output), and of a LoRA layer (hidden, grad_hidden)
MOST_KINDS = 64  # measurements that are kept for a backbone


def measured_once(adapted: AdaptedBackbone, key: tuple, measure: Callable[[], T]) -> T:
    """The result of ``measure()``, kept with the backbone: the same ``key`` does not measure again."""
    measured = adapted.state.measured
    with adapted.state.lock:
        if key not in measured:
            result = measure()
            if len(measured) >= MOST_KINDS:
                measured.pop(next(iter(measured)))
            measured[key] = result
        return measured[key]


def group_lora(adapted: AdaptedBackbone) -> AdaptedBackbone | GroupedLoRA:
    """What ``vmap`` should map over the clients: the backbone in one batch if that can be, else the backbone itself.

    It can be in eval mode, with LoRA on linear layers only and every other trained tensor in one.
    """
    model = adapted.model
    owners = {model.get_submodule(parameter.rpartition(".")[0]) for parameter in adapted.parameter_names.values()}
    all_linear = all(type(module) is nn.Linear for module in owners)
    all_plain = all(_is_plain_lora(model.get_submodule(layer)) for layer in adapted.scaling)
    return GroupedLoRA(adapted) if all_linear and all_plain and not model.training else adapted


def _is_plain_lora(layer: nn.Module) -> bool:
    """Whether a layer computes ``W0 x + scaling * B A x`` and nothing else."""
    return (
        type(layer) is LoraLinear
        and type(layer.base_layer) in LINEAR
        and layer.active_adapters == ["default"]
        and not (layer.merged or layer.disable_adapters or layer.lora_variant)
        and not has_hooks(layer, layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
    )


class GroupedLoRA:
    """``adapted`` for use under ``vmap`` over the clients, where all of them go through the network in one batch."""

    def __init__(self, adapted: AdaptedBackbone):
        self.adapted = adapted
        self.initial = adapted.initial
        self.layers = {layer: adapted.model.get_submodule(layer) for layer in adapted.scaling}
        self.linears = {  # the directly trained layers, by the name of their tensors
            name.rpartition(".")[0]: adapted.model.get_submodule(parameter.rpartition(".")[0])
            for name, parameter in adapted.parameter_names.items()
            if not is_lora(name)
        }

    def __repr__(self) -> str:
        return f"GroupedLoRA({self.adapted!r})"

    def __call__(self, adapter: Adapter, x: Inputs) -> Tensor:
        leaves, structure = tree_flatten((adapter, x))
        return _GroupedFunction.apply(self, structure, len(adapter), *leaves)

    def logits(self, stack: Adapter, x: Inputs) -> Tensor:
        """The logits ``(C, B, classes)`` of a stack on ``x`` ``(C, B, ...)``: in one batch, unless that disagrees."""
        if not self.matches_vmap(stack, x):
            return vmap(self.adapted)(stack, x)
        return self.packed_logits(stack, x) if self.can_pack(stack, x) else self.grouped_logits(stack, x)

    def packed_logits(self, stack: Adapter, x: dict[str, Tensor]) -> Tensor:
        """The logits ``(C, B, classes)`` of texts, whose padding the blocks do not compute."""
        packing = Packing(x[MASK])
        with self.adapted.state.lock, replaced_forwards(packed_forwards(self.adapted.blocks, packing)):
            return self.grouped_logits(stack, x)

    def grouped_logits(self, stack: Adapter, x: Inputs, on_backward: OnBackward | None = None) -> Tensor:
        """The logits ``(C, B, classes)``; in the backward pass every adapted layer calls ``on_backward``.

        It replaces functions of the model that all adapters share, so it holds the backbone's lock.
        """
        stack = {name: tensor.to(self.initial[name].dtype) for name, tensor in stack.items()}
        for layer, scaling in self.adapted.scaling.items():  # B is small, its output is not
            name_b = factor_names(layer)[1]
            stack[name_b] = stack[name_b] * scaling
        batch = map_inputs(lambda tensor: tensor.flatten(0, 1), x)
        lock = nullcontext() if torch.compiler.is_compiling() else self.adapted.state.lock
        with lock, replaced_forwards(self._forwards(stack, on_backward)):
            logits = call_network(self.adapted.model, self.adapted.with_padding(batch), self.adapted.frozen_blocks)
        return logits.unflatten(0, any_tensor(x).shape[:2])

    def _forwards(self, stack: Adapter, on_backward: OnBackward | None) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        """The forward of every module whose weights differ between clients."""

        def lora(name: str, layer: LoraLinear) -> Callable[[Tensor], Tensor]:
            a, b = (stack[factor] for factor in factor_names(name))
            base = layer.base_layer
            weight = base.weight.mT if layer.fan_in_fan_out else base.weight
            callback = on_backward and partial(on_backward, name)
            return lambda x: _LoRA.apply(*_autocast(x, weight, base.bias, a, b), callback)

        def linear(name: str) -> Callable[[Tensor], Tensor]:
            weight = stack[f"{name}.weight"]
            bias = stack.get(f"{name}.bias")

            def forward(x: Tensor) -> Tensor:
                y = _by_client(x, weight) @ weight.mT
                y = (y if bias is None else y + bias.unsqueeze(1)).reshape(*x.shape[:-1], -1)
                if on_backward is not None:
                    y.register_hook(lambda grad_output: on_backward(name, x.detach(), grad_output))
                return y

            return forward

        return {layer: lora(name, layer) for name, layer in self.layers.items()} | {
            module: linear(name) for name, module in self.linears.items()
        }

    def matches_vmap(self, stack: Adapter, x: Inputs) -> bool:
        """Whether two clients with random adapters get the logits that ``vmap`` gives them; asked once per model and
        kind of input. A network that does not keep the batch on dim 0, or lets examples see each other, fails here."""
        # an error of vmap, such as a branch on values, is raised
        return self._agree(self.grouped_logits, vmap(self.adapted), stack, take(x, (slice(2), slice(2))))

    def can_pack(self, stack: Adapter, x: Inputs) -> bool:
        """Whether every client has padding, and ``packed_logits`` are right, which is asked once per model and kind of
        input. They are not where tokens meet in a block other than in attention."""
        if not isinstance(x, dict) or not self.adapted.blocks or x.get(MASK) is None or is_traced(x[MASK]):
            return False
        if x[MASK].flatten(1).count_nonzero(1).max() == x[MASK][0].numel():  # a client has no padding
            return False
        some = take(x, (slice(2), slice(2)))
        mask = some[MASK].clone()
        mask[:, -1, mask.shape[2] // 2 :] = 0  # the texts of the comparison are of unequal length
        return self._agree(self.packed_logits, self.grouped_logits, stack, {**some, MASK: mask})

    @torch.no_grad()
    def _agree(self, function: Callable, reference: Callable, stack: Adapter, x: Inputs) -> bool:
        """Whether both give random adapters the same logits on ``x``, asked once per model and kind of input. What a
        token classifier or a language model says at padding does not count."""
        leaves, structure = tree_flatten(x)
        clients = len(leaves[0])

        def read(logits: Tensor) -> Tensor:
            is_by_token = isinstance(x, dict) and MASK in x and logits.shape[:-1] == x[MASK].shape
            return logits * x[MASK].unsqueeze(-1) if is_by_token else logits

        def compare() -> bool:
            generator = torch.Generator().manual_seed(0)
            random = {
                name: torch.randn(clients, *t.shape[1:], generator=generator).to(t) / t[0, 0].numel() ** 0.5
                for name, t in stack.items()
            }
            with torch.autocast(leaves[0].device.type, enabled=False):
                expected = read(reference(random, x))
                try:
                    difference = (read(function(random, x)) - expected).abs().max()
                except RuntimeError:  # of shapes or dtypes
                    return False
                return bool(difference <= 3 * torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max())

        kinds = tuple((leaf.shape[2:], leaf.dtype) for leaf in leaves)
        key = (function.__name__, tuple(stack), str(structure), kinds, leaves[0].device, clients)
        return measured_once(self.adapted, key, compare)

    def per_sample_gradients(self, stack: Adapter, x: Inputs, y: Tensor) -> Tensor:
        """Each example's gradient of its own loss (``models/loss.py``), ``(C, N, P)``.

        One backward pass, in which every adapted layer adds a product per example as soon as its output's gradient is
        there. It stands on ``grouped_logits``: ask ``matches_vmap`` first.
        """
        examples = y.shape[0] * y.shape[1]
        sizes = [tensor[0].numel() for tensor in stack.values()]
        gradients = next(iter(stack.values())).new_zeros(*y.shape[:2], sum(sizes))
        columns = {
            name: part.view(examples, *stack[name].shape[1:])
            for name, part in zip(stack, gradients.split(sizes, dim=2))
        }

        def by_example(x: Tensor) -> Tensor:  # (C, r, N T) to (C N, r, T)
            return x.unflatten(2, (y.shape[1], -1)).transpose(1, 2).flatten(0, 1)

        def on_backward(name: str, activations: Tensor, grad_output: Tensor, *of_hidden: Tensor) -> None:
            activations = activations.reshape(examples, -1, activations.shape[-1])  # (C N, T, in)
            grad_output = grad_output.reshape(examples, -1, grad_output.shape[-1])  # (C N, T, out)
            if of_hidden:  # += where a layer is called twice
                name_a, name_b = factor_names(name)
                hidden, grad_hidden = map(by_example, of_hidden)
                columns[name_a] += grad_hidden @ activations.to(hidden.dtype)
                columns[name_b] += (hidden @ grad_output.to(hidden.dtype)).mT * self.adapted.scaling[name]
            else:  # a directly trained layer
                columns[f"{name}.weight"] += grad_output.mT @ activations
                if f"{name}.bias" in columns:
                    columns[f"{name}.bias"] += grad_output.sum(1)

        with torch.enable_grad():  # one factor of each layer is enough for on_backward to be called
            trained = {name: tensor.detach().requires_grad_(is_lora(name, "B")) for name, tensor in stack.items()}
            logits = self.grouped_logits(trained, x, on_backward)
            self.adapted.task.losses(logits.flatten(0, 1), y.flatten(0, 1)).sum().backward()
        return gradients


def _by_client(x: Tensor, stack: Tensor) -> Tensor:
    """``x`` of ``(C * B, ..., n)`` with the clients on dim 0: ``(C, rows, n)``."""
    return x.reshape(len(stack), -1, x.shape[-1])


def _autocast(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """The operands of a matrix product in the dtype that autocast gives them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return [None if tensor is None else tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


class _LoRA(torch.autograd.Function):
    """``x W0ᵀ + bias + (x Aᵀ) Bᵀ`` with each client's A and B; both additions are in place.

    Where ``on_backward`` is given it is called with ``x``, the gradient in the output, ``A xᵀ`` and its gradient, and
    there are no gradients in A and B. Products with a rank's few rows have these first, ``(C, r, rows)``, which is much
    faster than ``(C, rows, r)``. Where the frozen layer computes in bf16 and the adapter in float32, the LoRA term is
    computed in float32, as in PEFT.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, on_backward):
        rows = _by_client(x, a)
        hidden = a @ rows.to(a.dtype).mT  # (C, r, rows)
        ctx.save_for_backward(x, weight, a, b, hidden)
        ctx.on_backward = on_backward
        y = F.linear(rows, weight, bias)
        y = y.baddbmm_(hidden.mT, b.mT) if x.dtype == a.dtype else (y + hidden.mT @ b.mT).to(x.dtype)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        x, weight, a, b, hidden = ctx.saved_tensors
        grad_output = _by_client(grad_output, b)
        grad_y = grad_output.to(b.dtype)
        grad_hidden = b.mT.contiguous() @ grad_y.mT  # (C, r, rows)
        grad_x = grad_a = grad_b = None
        if ctx.on_backward is not None:
            ctx.on_backward(x, grad_output, hidden, grad_hidden)
        else:
            if ctx.needs_input_grad[3]:
                grad_a = grad_hidden @ _by_client(x, a).to(a.dtype)
            if ctx.needs_input_grad[4]:
                grad_b = (hidden @ grad_y).mT
        if ctx.needs_input_grad[0]:
            grad_x = (grad_output @ weight).baddbmm_(grad_hidden.mT.to(x.dtype), a.to(x.dtype)).view(x.shape)
        return grad_x, None, None, grad_a, grad_b, None


class _GroupedFunction(torch.autograd.Function):
    """The backbone with its own rule for ``vmap``: the rule gets all clients at once, and autograd differentiates it.

    Under other transforms, such as a ``torch.func.grad`` in an objective, derivatives are those of the backbone.
    """

    @staticmethod
    def forward(runner: GroupedLoRA, structure, trained: int, *leaves: Tensor) -> Tensor:
        return runner.adapted(*tree_unflatten(leaves, structure))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.runner, ctx.structure, ctx.trained, *leaves = inputs
        ctx.save_for_backward(*leaves)
        ctx.save_for_forward(*leaves)

    @staticmethod
    def _function(ctx) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The logits as a function of the adapter's tensors, and these."""
        tensors = ctx.saved_tensors[: ctx.trained]
        x = ctx.saved_tensors[ctx.trained :]
        return lambda *tensors: ctx.runner.adapted(*tree_unflatten([*tensors, *x], ctx.structure)), tensors

    @staticmethod
    def backward(ctx, grad_output):
        function, tensors = _GroupedFunction._function(ctx)
        no_gradients = [None] * (len(ctx.saved_tensors) - ctx.trained)
        return None, None, None, *vjp(function, *tensors)[1](grad_output), *no_gradients

    @staticmethod
    def jvp(ctx, runner, structure, trained, *tangents):
        function, tensors = _GroupedFunction._function(ctx)
        tangents = tuple(torch.zeros_like(t) if tangent is None else tangent for t, tangent in zip(tensors, tangents))
        return jvp(function, tensors, tangents)[1]

    @staticmethod
    def vmap(info, in_dims, runner, structure, trained, *leaves):
        def stacked(tensor: Tensor, dim: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

        return runner.logits(*tree_unflatten([*map(stacked, leaves, in_dims[3:])], structure)), 0
