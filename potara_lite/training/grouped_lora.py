"""Every client in one batch of one network: frozen layers see all examples, LoRA layers a group of rows per client.

``vmap`` gives each operation a client dimension, frozen layers and all. Where only linear layers are adapted there is a
shorter way, because the frozen layers are the same for everybody: the clients' batches become one batch of ``C * B``
examples, the network runs on it as it is, and only its adapted layers tell the clients apart,

    y_i = W0 x_i + B_i (A_i x_i)          with A (C, r, in), B (C, out, r), the scaling in B, and x (C, rows, in),

where what LoRA adds is added in place, forwards and backwards. The same view gives per-sample gradients without a copy
of the adapter for every sample: an example's gradient in ``B`` is the product of the gradient in ``y`` with ``A x``
over that example's own rows (Goodfellow, 2015, arXiv 1510.01799).

It is exact for networks whose logits of an example do not depend on the rest of its batch. ``group_lora`` refuses
what it knows not to be one, and the first result for each kind of input is compared with that of ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, factor_names, is_lora
from ..federation.inputs import Inputs, any_tensor, map_inputs, take
from ..models.frozen_trunk import LINEAR, call_network, replaced_forwards
from .loss import example_losses

OnBackward = Callable[[str, Tensor, Tensor, Tensor | None], None]  # (layer, input, gradient of output, that times B)
MOST_KINDS = 64  # of inputs, remembered for a model
COMPARED: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()  # what was compared, while the model lives


def group_lora(adapted: AdaptedBackbone) -> AdaptedBackbone | GroupedLoRA:
    """What ``vmap`` should map over the clients: the backbone in one batch if that can be, else the backbone itself.

    It can be in eval mode, with LoRA on linear layers only and every other trained tensor in one.
    """
    model = adapted.model
    owners = {model.get_submodule(parameter.rpartition(".")[0]) for parameter in adapted.parameter_names.values()}
    layers = [model.get_submodule(layer) for layer in adapted.scaling]
    simple = (
        not model.training
        and all(type(module) is nn.Linear for module in owners)
        and all(
            type(layer) is LoraLinear
            and type(layer.base_layer) in LINEAR
            and layer.active_adapters == ["default"]
            and not (layer.merged or layer.disable_adapters or layer.lora_variant)
            and not _hooked(layer, layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
            for layer in layers
        )
    )
    return GroupedLoRA(adapted) if simple else adapted


def _hooked(*modules: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


class GroupedLoRA:
    """``adapted`` for use under ``vmap`` over the clients, where all of them go through the network in one batch."""

    def __init__(self, adapted: AdaptedBackbone):
        self.adapted, self.initial = adapted, adapted.initial
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
        return self.grouped_logits(stack, x) if self.matches_vmap(stack, x) else vmap(self.adapted)(stack, x)

    def grouped_logits(self, stack: Adapter, x: Inputs, on_backward: OnBackward | None = None) -> Tensor:
        """The logits ``(C, B, classes)``; in the backward pass every adapted layer calls ``on_backward``."""
        stack = {name: tensor.to(self.initial[name].dtype) for name, tensor in stack.items()}
        for layer, scaling in self.adapted.scaling.items():  # B is small, what it writes is not
            name_b = factor_names(layer)[1]
            stack[name_b] = stack[name_b] * scaling
        batch = map_inputs(lambda tensor: tensor.flatten(0, 1), x)
        with replaced_forwards(self._forwards(stack, on_backward)):
            logits = call_network(self.adapted.model, batch, self.adapted.frozen_blocks)
        return logits.unflatten(0, any_tensor(x).shape[:2])

    def _forwards(self, stack: Adapter, on_backward: OnBackward | None) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        """The forward of every module that has weights of its own for each client."""

        def lora(name: str, layer: LoraLinear) -> Callable[[Tensor], Tensor]:
            (a, b), base = (stack[factor] for factor in factor_names(name)), layer.base_layer
            weight = base.weight.mT if layer.fan_in_fan_out else base.weight
            callback = on_backward and partial(on_backward, name)
            return lambda x: _LoRA.apply(*_autocast(x, weight, base.bias, a, b), callback)

        def linear(name: str) -> Callable[[Tensor], Tensor]:
            weight, bias = stack[f"{name}.weight"], stack.get(f"{name}.bias")

            def forward(x: Tensor) -> Tensor:
                y = _by_client(x, weight) @ weight.mT
                y = (y if bias is None else y + bias.unsqueeze(1)).reshape(*x.shape[:-1], -1)
                if on_backward is not None:
                    y.register_hook(lambda grad: on_backward(name, x.detach(), grad, None))
                return y

            return forward

        return {layer: lora(name, layer) for name, layer in self.layers.items()} | {
            module: linear(name) for name, module in self.linears.items()
        }

    @torch.no_grad()
    def matches_vmap(self, stack: Adapter, x: Inputs) -> bool:
        """Whether two clients with random adapters get the logits that ``vmap`` gives them; asked once per model and
        kind of input. A network that does not keep the batch on dim 0, or lets examples see each other, fails here."""
        some = take(x, (slice(2), slice(2)))
        leaves, structure = tree_flatten(some)
        known, two = COMPARED.setdefault(self.adapted.model, {}), len(leaves[0])
        kinds = tuple((leaf.shape[2:], leaf.dtype) for leaf in leaves)
        key = (tuple(stack), str(structure), kinds, leaves[0].device, two)
        if key not in known:
            if len(known) >= MOST_KINDS:
                known.pop(next(iter(known)))
            generator = torch.Generator().manual_seed(0)
            random = {
                name: torch.randn(two, *t.shape[1:], generator=generator).to(t) / t[0, 0].numel() ** 0.5
                for name, t in stack.items()
            }
            with torch.autocast(leaves[0].device.type, enabled=False):
                alone = vmap(self.adapted)(random, some)  # what vmap refuses, such as a branch on values, is not for us
                try:
                    apart = (self.grouped_logits(random, some) - alone).abs().max()
                    known[key] = bool(apart <= 3 * torch.finfo(alone.dtype).eps ** 0.5 * alone.abs().max())
                except RuntimeError:  # of shapes or dtypes
                    known[key] = False
        return known[key]

    def per_sample_gradients(self, stack: Adapter, x: Inputs, y: Tensor) -> Tensor:
        """Each example's gradient of its own loss (``example_losses``), ``(C, N, P)``.

        One backward pass, in which every adapted layer adds a product per example as soon as its output's gradient is
        there. It stands on ``grouped_logits``: ask ``matches_vmap`` first.
        """
        sizes = [tensor[0].numel() for tensor in stack.values()]
        out = next(iter(stack.values())).new_zeros(*y.shape[:2], sum(sizes))
        place, examples = dict(zip(stack, out.split(sizes, dim=2))), y.shape[0] * y.shape[1]

        def add(name: str, grad: Tensor) -> None:  # also where a layer is called twice
            place[name] += grad.view(place[name].shape)

        def on_backward(name: str, read: Tensor, grad: Tensor, back: Tensor | None) -> None:
            read, grad = (t.reshape(examples, -1, t.shape[-1]) for t in (read, grad))  # (C N, T, in), (C N, T, out)
            if back is None:
                add(f"{name}.weight", grad.mT @ read)
                if f"{name}.bias" in place:
                    add(f"{name}.bias", grad.sum(1))
            else:
                name_a, name_b = factor_names(name)
                a = stack[name_a].to(read.dtype) * self.adapted.scaling[name]
                hidden = (_by_client(read, a) @ a.mT).view(examples, -1, a.shape[1])  # (C N, T, r)
                add(name_a, back.view(hidden.shape).to(read.dtype).mT @ read)
                add(name_b, grad.mT @ hidden)

        with torch.enable_grad():
            trained = {n: t.detach().requires_grad_(is_lora(n, "B")) for n, t in stack.items()}  # so that all is asked
            logits = self.grouped_logits(trained, x, on_backward)
            example_losses(logits.flatten(0, 1), y.flatten(0, 1)).sum().backward()
        return out


def _by_client(x: Tensor, stack: Tensor) -> Tensor:
    """``x`` of ``(C * B, ..., n)`` with the clients apart: ``(C, rows, n)``."""
    return x.reshape(len(stack), -1, x.shape[-1])


def _autocast(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """What autocast would do to the operands of a matrix product."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return [None if tensor is None else tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


class _LoRA(torch.autograd.Function):
    """``x W0ᵀ + bias + (x Aᵀ) Bᵀ`` with A and B of each client's own; both additions write into what is there.

    ``on_backward(x, grad, grad B)`` replaces the gradients in A and B where it is given. Where the frozen layer
    computes in bf16 and the adapter in float32, what LoRA adds is made in float32, as in PEFT.
    """

    @staticmethod
    def forward(x, weight, bias, a, b, on_backward):
        rows = _by_client(x, a)
        if x.dtype != a.dtype:
            added = rows.to(a.dtype) @ a.mT @ b.mT
            return (F.linear(rows, weight, bias) + added).to(x.dtype).view(*x.shape[:-1], len(weight))
        return F.linear(rows, weight, bias).baddbmm_(rows @ a.mT, b.mT).view(*x.shape[:-1], len(weight))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _, a, b, ctx.on_backward = inputs
        ctx.save_for_backward(x, weight, a, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, a, b = ctx.saved_tensors
        rows, grad, need = _by_client(x, a), _by_client(grad, b), ctx.needs_input_grad
        back = grad.to(b.dtype) @ b  # (C, rows, r)
        grad_a = grad_b = None
        if ctx.on_backward is not None:
            ctx.on_backward(x, grad, back)
        else:
            rows = rows.to(a.dtype)
            grad_a = back.mT @ rows if need[3] else None
            grad_b = grad.to(b.dtype).mT @ (rows @ a.mT) if need[4] else None
        grad_x = (grad @ weight).baddbmm_(back.to(x.dtype), a.to(x.dtype)).view(x.shape) if need[0] else None
        return grad_x, None, None, grad_a, grad_b, None


class _GroupedFunction(torch.autograd.Function):
    """The backbone with a rule of its own for ``vmap``: there all clients are at hand, and autograd follows the rule.

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
        tensors, x = ctx.saved_tensors[: ctx.trained], ctx.saved_tensors[ctx.trained :]
        return lambda *tensors: ctx.runner.adapted(*tree_unflatten([*tensors, *x], ctx.structure)), tensors

    @staticmethod
    def backward(ctx, grad):
        function, tensors = _GroupedFunction._function(ctx)
        no_gradients = [None] * (len(ctx.saved_tensors) - ctx.trained)
        return None, None, None, *vjp(function, *tensors)[1](grad), *no_gradients

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
