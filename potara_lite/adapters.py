"""LoRA on a frozen backbone through PEFT, and adapters as plain dictionaries of tensors.

An *adapter* is what PEFT says it is: the names and tensors of ``get_peft_model_state_dict``, that is the LoRA factors
``A`` (r, in) and ``B`` (out, r) of every adapted layer and the directly trained weights (the new head). A *stack* is
the same dictionary with the clients on dim 0. ``AdaptedBackbone`` runs any of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.func import functional_call

__all__ = [
    "Adapter",
    "AdaptedBackbone",
    "added",
    "attach",
    "check_same_base",
    "client_adapter",
    "delta",
    "delta_products",
    "flatten",
    "load_adapter",
    "lora_layers",
    "nbytes",
    "repeat_adapter",
    "save_adapter",
    "stack_adapters",
    "unfactored",
    "unflatten",
]

Adapter = dict[str, Tensor]


@dataclass(frozen=True, repr=False)
class AdaptedBackbone:
    """A frozen backbone with an empty adapter slot: call it with an adapter and a batch.

    ``model``: the PEFT model, in eval mode, no parameter of it requires a gradient.
    ``initial``: the adapter that ``attach`` drew; its LoRA ``B`` and head are zero.
    ``parameters``: the model's parameter behind each adapter tensor.
    ``scaling``: ``alpha / r`` (or ``alpha / sqrt(r)`` with rsLoRA) of each adapted layer.
    """

    model: PeftModel
    initial: Adapter
    parameters: dict[str, str]
    scaling: dict[str, float]

    def __repr__(self) -> str:  # short and cheap: vmap asks for it at every call
        name = type(self.model.get_base_model()).__name__
        return (
            f"AdaptedBackbone({name}, {len(self.scaling)} layers, rank {self.config.r}, {nbytes(self.initial)} bytes)"
        )

    def __call__(self, adapter: Adapter, x: Tensor) -> Tensor:
        """The logits ``(B, classes)`` of one adapter (no client dimension) on a batch ``x`` of ``(B, ...)``.

        The LoRA factors may have any rank: the scaling stays that of the configuration. They may be stored in another
        dtype (bf16, say); the arithmetic is done in that of the backbone.
        """
        weights = {self.parameters[name]: tensor.to(self.initial[name].dtype) for name, tensor in adapter.items()}
        if self.model.training:  # a batch norm would write its running statistics into the backbone that all share
            weights |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return functional_call(self.model, weights, (x,))

    @property
    def config(self) -> LoraConfig:
        return self.model.peft_config["default"]

    def to(self, device: str | torch.device) -> AdaptedBackbone:
        """The same backbone on ``device`` (the model itself is moved, as ``nn.Module.to`` does)."""
        initial = {name: tensor.to(device) for name, tensor in self.initial.items()}
        return AdaptedBackbone(self.model.to(device), initial, self.parameters, self.scaling)


def attach(
    backbone: nn.Module,
    *,
    rank: int = 4,
    alpha: float | None = None,
    targets: str | Sequence[str] = ("qkv", "proj", "fc1", "fc2"),
    head: str | None = "head",
    seed: int = 0,
    config: LoraConfig | None = None,
) -> AdaptedBackbone:
    """Put LoRA on the ``targets`` of a copy of ``backbone`` and train ``head`` directly, starting from zero.

    ``alpha`` defaults to ``2 * rank``. Pass a ``config`` of your own for anything else PEFT's LoRA can do (rank
    patterns, rsLoRA, convolutions); it then replaces ``rank``, ``alpha``, ``targets`` and ``head``.

    Raises ``ValueError`` for dropout (the random numbers of one client would depend on the others), for DoRA and
    embedding layers (not a sum of ``B A``), and for a backbone whose ``targets`` do not exist.
    """
    if config is None:
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            target_modules=targets if isinstance(targets, str) else list(targets),
            modules_to_save=[head] if head else None,
        )
    if config.lora_dropout:
        raise ValueError(f"lora_dropout={config.lora_dropout}: train without dropout, so that clients are independent")
    if config.use_dora:
        raise ValueError("use_dora=True: a DoRA layer is not W + scaling * B A, so deltas cannot be merged")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(backbone).cpu(), copy.deepcopy(config))
    model.eval().requires_grad_(False)

    parameters, known = {}, dict(model.named_parameters())
    initial = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    for parameter in known:
        name = parameter.replace(".modules_to_save.default.", ".").replace(".default.", ".")
        if name in initial and (".default." in parameter):
            parameters[name] = parameter
    if missing := sorted(initial.keys() - parameters.keys()):
        raise ValueError(f"these adapter tensors have no parameter of their own: {missing}")
    if odd := [name for name in initial if "lora_" in name and not name.endswith((".lora_A.weight", ".lora_B.weight"))]:
        raise ValueError(f"only LoRA factors A and B can be merged exactly, not {odd}")
    if config.modules_to_save:
        for name in initial:
            if ".lora_" not in name:
                initial[name].zero_()
    for layer in lora_layers(initial):
        parent = model.get_submodule(layer.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"{layer}: nn.MultiheadAttention reads this weight without calling the layer, so LoRA does nothing"
            )
    scaling = {
        name.removesuffix(".lora_A.weight"): model.get_submodule(name.removesuffix(".lora_A.weight")).scaling["default"]
        for name in initial
        if name.endswith(".lora_A.weight")
    }
    return AdaptedBackbone(model, initial, parameters, scaling)


def lora_layers(adapter: Adapter) -> list[str]:
    """The names of the adapted layers: what stands before ``.lora_A.weight``."""
    return [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]


def delta(adapter: Adapter, scaling: dict[str, float]) -> Adapter:
    """The task vector: ``scaling * B A`` of every adapted layer, and the directly trained weights.

    Takes one adapter, A ``(r, in)`` and B ``(out, r)``, or a stack, A ``(C, r, in)`` and B ``(C, out, r)``;
    returns ``{layer.weight: (..., out, in), ...}``. A convolution's kernel is flattened into ``in``.
    """
    result = {}
    for layer in lora_layers(adapter):
        a, b = adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"]
        lead = b.dim() - (2 if b.dim() < 4 else 4)  # 1 for a stack, 0 for one adapter
        a, b = a.flatten(lead + 1), b.flatten(lead + 1)  # (..., r, in), (..., out, r)
        result[f"{layer}.weight"] = scaling[layer] * (b @ a)
    return result | {name: tensor for name, tensor in adapter.items() if ".lora_" not in name}


def delta_products(adapters: Sequence[Adapter], scaling: dict[str, float]) -> Tensor:
    """The inner products of the deltas of K stacks, ``(C, K, K)`` float64, without forming a delta.

    ``<B_i A_i, B_j A_j> = tr (B_iᵀ B_j)(A_j A_iᵀ)`` in every adapted layer, plus the products of the directly trained
    weights. The stacks may have different ranks.
    """
    total = 0.0
    for layer in lora_layers(adapters[0]):
        a = [adapter[f"{layer}.lora_A.weight"].double().flatten(2) for adapter in adapters]  # (C, r, in) each
        b = [adapter[f"{layer}.lora_B.weight"].double().flatten(2) for adapter in adapters]  # (C, out, r) each
        rows = [[((p.mT @ q) * (x @ y.mT)).sum((1, 2)) for q, y in zip(b, a)] for p, x in zip(b, a)]
        total = total + scaling[layer] ** 2 * torch.stack([torch.stack(row, -1) for row in rows], -2)
    for name in adapters[0]:
        if ".lora_" not in name:
            flat = torch.stack([adapter[name].double().flatten(1) for adapter in adapters], 1)  # (C, K, n)
            total = total + flat @ flat.mT
    return total


def unfactored(adapter: Adapter) -> Adapter:
    """The same model with its product in place of its factors: ``A`` the identity ``(in, in)``, ``B`` the old ``B A``.

    Takes an adapter or a stack. The gradient in the new ``B`` is ``scaling`` times that in the delta, which does not
    change under ``(B, A) → (B M, M⁻¹ A)`` and is not zero where ``B`` is.
    """
    result = dict(adapter)
    for layer in lora_layers(adapter):
        a, b = adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"]
        lead, kernel = a.dim() % 2, a.shape[a.dim() % 2 + 1 :]  # a stack has one dimension more
        product = b.flatten(lead + 1) @ a.flatten(lead + 1)  # (..., out, in)
        size = product.shape[-1]
        eye = torch.eye(size, dtype=a.dtype, device=a.device).reshape(size, *kernel)
        result[f"{layer}.lora_A.weight"] = eye.expand(*a.shape[:lead], *eye.shape).clone()
        result[f"{layer}.lora_B.weight"] = product.reshape(*product.shape, *b.shape[lead + 2 :])
    return result


@contextmanager
def added(adapted: AdaptedBackbone, change: Adapter) -> Iterator[None]:
    """The backbone with ``change``, the ``delta`` of one adapter, in the frozen weights of its adapted layers."""
    weights = {name: adapted.model.get_submodule(name.removesuffix(".weight")).base_layer.weight for name in change}
    before = {name: weight.data for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data = before[name] + change[name].detach().view_as(weight)
        yield
    finally:
        for name, weight in weights.items():
            weight.data = before[name]


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


def stack_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """Adapters of several clients as one stack: each tensor gets the clients on dim 0."""
    check_same_base(*adapters)
    return {name: torch.stack([adapter[name] for adapter in adapters]) for name in adapters[0]}


def repeat_adapter(adapter: Adapter, clients: int) -> Adapter:
    """One adapter given to every client: a stack whose rows are equal (and share no memory)."""
    return {name: tensor.expand(clients, *tensor.shape).clone() for name, tensor in adapter.items()}


def client_adapter(stack: Adapter, client: int) -> Adapter:
    """One client's adapter out of a stack."""
    return {name: tensor[client] for name, tensor in stack.items()}


def flatten(stack: Adapter) -> Tensor:
    """A stack as one matrix ``(C, P)``: a row per client, the tensors in the dictionary's order."""
    return torch.cat([tensor.flatten(1) for tensor in stack.values()], dim=1)


def unflatten(flat: Tensor, like: Adapter) -> Adapter:
    """The inverse of ``flatten``; ``like`` is one adapter (no client dimension) that gives names and shapes."""
    parts = flat.split([tensor.numel() for tensor in like.values()], dim=1)
    return {name: part.reshape(-1, *like[name].shape) for name, part in zip(like, parts)}


def nbytes(adapter: Adapter) -> int:
    """What an adapter weighs when it travels: the bytes of its tensors, in the dtype they have."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter.values())


def save_adapter(adapted: AdaptedBackbone, adapter: Adapter, folder: str | Path) -> Path:
    """Write one adapter as a PEFT folder that ``PeftModel.from_pretrained`` loads.

    The rank on disk is the adapter's own. A merge of rank ``k * r`` is saved with ``alpha`` enlarged so that the
    scaling, and with it every logit, stays the same.
    """
    from safetensors.torch import save_file

    folder, config = Path(folder), copy.deepcopy(adapted.config)
    pattern = {layer: adapter[f"{layer}.lora_A.weight"].shape[0] for layer in lora_layers(adapter)}
    config.r = max(pattern.values())
    root = config.use_rslora
    config.lora_alpha = adapted.scaling[lora_layers(adapter)[0]] * (config.r**0.5 if root else config.r)
    config.rank_pattern = {_pattern(layer): rank for layer, rank in pattern.items() if rank != config.r}
    config.alpha_pattern = {
        _pattern(layer): adapted.scaling[layer] * (rank**0.5 if root else rank)
        for layer, rank in pattern.items()
        if adapted.scaling[layer] * (rank**0.5 if root else rank) != config.lora_alpha
    }
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return folder


def _pattern(layer: str) -> str:
    """The regular expression by which PEFT's rank and alpha patterns mean this layer and no other."""
    return "^" + re.escape(layer.removeprefix("base_model.model."))


def load_adapter(adapted: AdaptedBackbone, folder: str | Path) -> Adapter:
    """Read a PEFT folder back as an adapter of this backbone; its rank may differ from the configuration's.

    Raises ``ValueError`` when the folder's layers, shapes or scaling are not those of ``adapted``.
    """
    from safetensors.torch import load_file

    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    if tensors.keys() != adapted.initial.keys():
        odd = sorted(tensors.keys() ^ adapted.initial.keys())
        raise ValueError(f"{folder}: an adapter of another base: {len(odd)} tensors differ, such as {odd[0]!r}")
    for name, like in adapted.initial.items():
        if ".lora_" not in name and tensors[name].shape != like.shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(tensors[name].shape)}, not of this base: {tuple(like.shape)}"
            )
    config = LoraConfig.from_pretrained(folder)
    tensors = {name: tensors[name] for name in adapted.initial}
    for layer in lora_layers(tensors):
        a, b = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
        like_a, like_b = adapted.initial[f"{layer}.lora_A.weight"], adapted.initial[f"{layer}.lora_B.weight"]
        if a.shape[1:] != like_a.shape[1:] or b.shape[0] != like_b.shape[0] or a.shape[0] != b.shape[1]:
            raise ValueError(f"{folder}: {layer} has factors {tuple(a.shape)}, {tuple(b.shape)}: not of this base")
        name = layer.removeprefix("base_model.model.")
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        scaling = alpha / (a.shape[0] ** 0.5 if config.use_rslora else a.shape[0])
        if abs(scaling - adapted.scaling[layer]) > 1e-9 * scaling:
            raise ValueError(f"{folder}: {layer} has scaling {scaling}, this backbone uses {adapted.scaling[layer]}")
    return tensors
