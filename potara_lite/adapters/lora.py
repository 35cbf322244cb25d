"""LoRA on a frozen backbone through PEFT: ``attach`` puts it there, ``AdaptedBackbone`` runs any adapter.

An adapter is a dictionary of tensors, the names and tensors of PEFT's ``get_peft_model_state_dict``; ``state.py`` says
what their names and shapes mean.
"""

from __future__ import annotations

import copy
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.func import functional_call

from ..checks import Device, List, PathLike, Positive, Seed, Size, checked, invalid, shown
from ..compat import (
    attention_under_vmap,
    dropout_rate,
    has_hooks,
    is_traced,
    last_token_padding,
    make_attention_explicit,
    shared_parameters,
    tree_flatten,
)
from ..federation.display import as_html
from ..federation.inputs import MASK, Inputs
from ..models.frozen_trunk import LINEAR, call_network, check_names, network_blocks, run_frozen_blocks
from ..models.language import check_tokens
from ..models.loss import CLASSIFICATION, TASKS, Task
from .state import Adapter, adapter_bytes, is_lora, layer_of, lora_layers


class ModelState:
    """A model's mutable state besides its weights: a lock and cached measurements (see ``measured_once``).

    A forward pass of one adapter swaps tensors of the model that all adapters share, so it holds the lock.
    """

    def __init__(self):
        self.lock = RLock()
        self.measured: dict[Any, Any] = {}

    def __reduce__(self):  # a copy of a model has a state of its own
        return ModelState, ()


@dataclass(frozen=True, eq=False, repr=False)
class AdaptedBackbone:
    """A frozen backbone with an empty adapter slot: call it with an adapter and a batch.

    ``model``: the PEFT model, in eval mode, no parameter of it requires a gradient.
    ``initial``: the adapter that ``attach`` drew; its LoRA ``B`` and head are zero.
    ``parameter_names``: the model's parameter behind each adapter tensor.
    ``scaling``: ``alpha / r`` (or ``alpha / sqrt(r)`` with rsLoRA) of each adapted layer.
    ``task``: what its outputs are compared with, in training, evaluation and estimation.
    """

    model: PeftModel
    initial: Adapter
    parameter_names: dict[str, str]
    scaling: dict[str, float]
    state: ModelState = field(default_factory=ModelState)
    task: Task = CLASSIFICATION

    def _repr_html_(self) -> str:
        tensors = {"tensor": list(self.initial), "shape": [str(tuple(t.shape)) for t in self.initial.values()]}
        return as_html(repr(self), tensors | {"bytes": [t.nbytes for t in self.initial.values()]})

    def __repr__(self) -> str:  # short and cheap: vmap asks for it at every call
        name = type(self.model.get_base_model()).__name__
        size = adapter_bytes(self.initial)
        return f"AdaptedBackbone({name}, {len(self.scaling)} layers, rank {self.config.r}, {size} bytes)"

    def __call__(self, adapter: Adapter, x: Inputs) -> Tensor:
        """The logits ``(B, classes)`` of one adapter (no client dimension) on a batch ``x`` of ``(B, ...)``; those of a
        token classifier or a language model are ``(B, T, classes)``.

        ``x`` is a tensor or a mapping of keyword arguments, as it is or as ``embed`` returns it. The LoRA factors may
        have any rank: the scaling stays that of the configuration. They may be stored in another dtype (bf16, say); the
        arithmetic is done in that of the backbone.
        """
        if not isinstance(adapter, Mapping) or not all(
            isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in adapter.values()
        ):
            raise ValueError(f"adapter must be a dictionary of floating tensors by name, not {type(adapter).__name__}")
        if adapter.keys() != self.initial.keys():  # a missing tensor would silently be the backbone's
            odd = sorted(adapter.keys() ^ self.initial.keys())
            raise ValueError(
                f"adapter must be of this backbone: {len(odd)} tensors are of one only, such as {odd[0]!r}"
            )
        weights = {self.parameter_names[name]: tensor.to(self.initial[name].dtype) for name, tensor in adapter.items()}
        if self.model.training:  # a batch norm would write its running statistics into the backbone that all share
            weights |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}

        def run(*args, **kwargs):
            return functional_call(self.model, weights, args, kwargs)

        if torch.compiler.is_compiling():  # a compiler can neither take a lock nor ask what stands for many
            return call_network(run, self.with_padding(x), self.frozen_blocks)
        leaves = [leaf for leaf in tree_flatten((weights, x))[0] if isinstance(leaf, Tensor)]
        with self.state.lock, attention_under_vmap() if any(map(is_traced, leaves)) else nullcontext():
            return call_network(run, self.with_padding(x), self.frozen_blocks)

    @cached_property
    def last_token_padding(self) -> int | None:
        """The token id behind which the backbone looks for a text's last real token, if it does."""
        return last_token_padding(self.model.get_base_model())

    def with_padding(self, x: Inputs) -> Inputs:
        """The inputs with the backbone's own padding behind the ends of texts, where it looks for it: what a mask
        hides must not change an example's logits."""
        if self.last_token_padding is None or not isinstance(x, Mapping) or not {MASK, "input_ids"} <= x.keys():
            return x
        return {**x, "input_ids": x["input_ids"].masked_fill(x[MASK] == 0, self.last_token_padding)}

    def embed(self, x: Inputs) -> Inputs:
        """What the frozen part below the first adapted block makes of a batch; every adapter's logits on the result are
        those on ``x``, for less. ``federation.map(adapted.embed)`` computes it once for every example.

        The blocks must be in a list (``nn.ModuleList`` or ``nn.Sequential``); a network may offer an ``embed`` of its
        own besides, as ``LabViT`` does. Where nothing can be precomputed, it is ``x`` itself.
        """
        self.check_inputs(x)
        network = self.model.get_base_model()
        if isinstance(x, Tensor) and hasattr(network, "embed"):
            with torch.no_grad():
                x = network.embed(x)
        owners = [self.model.get_submodule(name.rpartition(".")[0]) for name in self.parameter_names.values()]
        with self.state.lock:
            return run_frozen_blocks(network, x, self.frozen_blocks, owners)

    @cached_property
    def dropouts(self) -> list[tuple[str, nn.Module]]:
        """The modules, by name, that would drop at random in training mode."""
        return [(name, module) for name, module in self.model.named_modules() if dropout_rate(module)]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the network, if it has a list of them with an adapted layer."""
        return self._blocks[0]

    @property
    def frozen_blocks(self) -> list[nn.Module]:
        """The frozen blocks below the first adapted one."""
        blocks, frozen = self._blocks
        return blocks[:frozen]

    @cached_property
    def _blocks(self) -> tuple[list[nn.Module], int]:
        return network_blocks(self.model, list(self.scaling))

    @cached_property
    def gated_layers(self) -> set[str]:
        """The adapted layers that weigh several experts (``baselines.algorithms.gated``): A has a row more for each."""
        return {layer for layer in self.scaling if has_hooks(self.model.get_submodule(layer).lora_A["default"])}

    def check_inputs(self, x: Inputs, client: int | None = None) -> None:
        """Raise ``ValueError``, which names the client, for inputs that the network does not take, for token ids and
        positions that it has no embedding of, and where dropout is active."""
        if not isinstance(x, Tensor | Mapping):
            invalid("x", "a tensor or a dictionary of tensors", x)
        for name, module in self.dropouts:
            if module.training and dropout_rate(module):
                raise ValueError(f"dropout is active in {name}: call model.eval(), so that clients are independent")
        if isinstance(x, Mapping):
            self.with_padding({})  # raises where the backbone's padding is not known
            check_names(self.model.get_base_model(), x)
            check_tokens(self.model.get_base_model(), x, client)

    @property
    def config(self) -> LoraConfig:
        return self.model.peft_config["default"]

    @property
    def device(self) -> torch.device:
        """The device of the backbone."""
        return next(iter(self.initial.values())).device

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        """The precisions of its weights, frozen and trained, which are those that its inputs may have."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.initial.values()]
        return sorted({tensor.dtype for tensor in tensors if tensor.is_floating_point()}, key=str)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the backbone computes."""
        return next(iter(self.initial.values())).dtype

    @checked
    def to(self, device: Device) -> AdaptedBackbone:
        """The same backbone on ``device`` (the model itself is moved, as ``nn.Module.to`` does)."""
        initial = {name: tensor.to(device) for name, tensor in self.initial.items()}
        return replace(self, model=self.model.to(device), initial=initial)


# What an adapted layer may be: W + scaling * B A, and nothing else.
PLAIN_OPTIONS = frozenset(  # of PEFT's LoraConfig: they say where LoRA is, how large, and who made it
    "r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform "
    "layers_pattern modules_to_save fan_in_fan_out init_lora_weights lora_dropout inference_mode peft_type task_type "
    "auto_mapping peft_version base_model_name_or_path revision runtime_config megatron_core eva_config".split()
)
PLAIN_INITS = True, "gaussian"  # B = 0, and the backbone's weights stay as they are
REWRITE_THE_BASE = "pissa", "olora", "corda", "loftq", "lora_ga"  # ways to start that change the frozen weights
HEADS_OF_PEFT = "classifier", "score"  # which PEFT adds to every adapter of these tasks, whatever the backbone has
CLASSIFICATION = "SEQ_CLS", "TOKEN_CLS"


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for an option of PEFT's LoRA with which an adapted layer is not ``W + scaling * B A``.

    Options that PEFT may get in the future are refused, too, unless they have no value.
    """
    usual = LoraConfig().to_dict()
    for name, value in options.items():
        if name not in PLAIN_OPTIONS and value and value != usual.get(name):
            raise ValueError(f"{name}={shown(value)}: with this option a layer is not W + scaling * B A")
    init = str(options.get("init_lora_weights", True)).lower()
    if options.get("inference_mode") and init.startswith(REWRITE_THE_BASE):
        raise ValueError(
            f"init_lora_weights={init!r}: such an adapter belongs to other base weights than the backbone's"
        )


@checked
def attach(
    backbone: nn.Module,
    *,
    rank: Size = 4,
    alpha: Positive | None = None,
    targets: str | List[str] = ("qkv", "proj", "fc1", "fc2"),
    head: str | None = "head",
    seed: Seed = 0,
    config: LoraConfig | PathLike | None = None,
    task: str | Task = "classification",
) -> AdaptedBackbone:
    """Put LoRA on the ``targets`` of a copy of ``backbone`` and train its new ``head`` directly.

    The copy is in eval mode and shares the memory of the frozen weights, so a large backbone is there once; the
    caller's own stays as it is. ``alpha`` defaults to ``2 * rank``. ``head`` is new: its last layer starts from zero,
    so all logits do. Pass a ``config`` of your own for anything else that PEFT's LoRA can do (rank patterns, rsLoRA,
    convolutions, ``modules_to_save`` that go on from their pre-trained values); it then replaces ``rank``, ``alpha``,
    ``targets`` and ``head``. Untrained, the adapted model is the backbone, but for a new head. PEFT compares the ends
    of names, so with DistilBERT's ``classifier`` its ``pre_classifier`` trains, too, from its pre-trained values.

    ``config`` may be a folder that PEFT wrote, or ``LoraConfig.from_pretrained(folder)``: the slot is then the one that
    this adapter needs, and ``load_adapter(adapted, folder)`` reads it. How a finished adapter began and its dropout say
    nothing about its function, and are left out: nothing drops when it is trained on here.

    ``task``: ``"classification"`` (also of tokens), ``"regression"`` (half the mean squared error), ``"multi-label"``
    (binary cross-entropy), or a ``Task`` with a loss and a metric of your own.

    Raises ``ValueError`` for a task of no such name; a scaling that is not a positive number; dropout (the random
    numbers of one client would depend on the others); options and layers that are not ``W + scaling * B A``;
    ``targets`` or a ``head`` that the backbone has not or that are ambiguous; a weight that is another layer's, too (a
    language model's output tied to its embedding); and a batch norm without running statistics (an example's logits
    would depend on the others).
    """
    if isinstance(task, str) and task not in TASKS:
        invalid("task", f"one of {', '.join(TASKS)}, or a Task", task)
    _check_bare(backbone)
    new_head = None
    if isinstance(config, str | Path):
        from .files import folder_config  # which builds on this file

        config = folder_config(backbone, [config])
    if config is None:
        new_head = None if head is None else _module_named(backbone, head)
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            target_modules=targets if isinstance(targets, str) else list(targets),
            modules_to_save=None if new_head is None else [new_head],
        )
    config = _plain_config(config)
    model = _peft_model(backbone, config, seed)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    initial = {name: tensor.detach().clone() for name, tensor in state.items()}
    parameters = [name for name, _ in model.named_parameters() if ".default." in name]
    parameter_names = {_adapter_name(name): name for name in parameters}
    _check_layers(model, initial, parameter_names)
    _check_found(backbone, initial, config)
    _check_untied(backbone, model, initial)
    if new_head is not None:
        for name in _last_layer(initial, f"base_model.model.{new_head}"):
            initial[name].zero_()
    scaling = {layer: model.get_submodule(layer).scaling["default"] for layer in lora_layers(initial)}
    for layer, value in scaling.items():
        if not 0 < value < float("inf"):
            invalid(f"the scaling of {layer}", "positive", value)
    names = {name: parameter_names[name] for name in initial}
    return AdaptedBackbone(model, initial, names, scaling, task=TASKS[task] if isinstance(task, str) else task)


def _check_bare(backbone: nn.Module) -> None:
    """Raise ``ValueError`` for a backbone that has adapters already."""
    if isinstance(backbone, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in backbone.modules()):
        raise ValueError(
            "backbone must be a model without adapters, not one that PEFT has adapted: keep the adapter by "
            "peft_model.save_pretrained(folder), then adapted = attach(peft_model.unload(), config=folder) and "
            "load_adapter(adapted, folder)"
        )


def _plain_config(config: LoraConfig) -> LoraConfig:
    """The configuration of an adapter that starts with B = 0 and has no dropout. A finished one (``inference_mode``, as
    PEFT writes it) has its weights, so neither how it started nor what dropped in its training matters.

    Raises ``ValueError`` for dropout, a start that changes the model and options that are not plain LoRA.
    """
    config = copy.deepcopy(config)
    if not config.inference_mode and config.init_lora_weights not in PLAIN_INITS:
        init = config.init_lora_weights
        raise ValueError(
            f"init_lora_weights={init!r}: an untrained adapter must leave the backbone as it is, with B = 0"
        )
    check_options(config.to_dict())
    if config.task_type in CLASSIFICATION:
        config.modules_to_save = [name for name in config.modules_to_save or () if name not in HEADS_OF_PEFT] or None
    if config.inference_mode:
        config.init_lora_weights, config.lora_dropout, config.inference_mode = True, 0.0, False
    if config.lora_dropout:
        raise ValueError(f"lora_dropout={config.lora_dropout}: train without dropout, so that clients are independent")
    return config


def _module_named(backbone: nn.Module, name: str) -> str:
    """The full name of the one module of this name. Raises ``ValueError`` for none and for several."""
    modules = [path for path, _ in backbone.named_modules()]
    found = [path for path in modules if path == name] or [path for path in modules if path.endswith(f".{name}")]
    if len(found) != 1:
        what = f"is ambiguous: {', '.join(found)}" if found else "is no module of this backbone"
        raise ValueError(f"head {name!r} {what}")
    return found[0]


def _last_layer(initial: Adapter, head: str) -> list[str]:
    """The tensors of the last layer of a directly trained head: with them at zero, its output is zero and it learns."""
    names = [name for name in initial if name.startswith(f"{head}.") and not is_lora(name)]
    last = names[-1].rpartition(".")[0]
    return [name for name in names if name.rpartition(".")[0] == last]


def _peft_model(backbone: nn.Module, config: LoraConfig, seed: int) -> PeftModel:
    """A copy of the backbone with LoRA, in eval mode, on the CPU; the copy shares the memory of the frozen weights.

    Raises ``ValueError`` for targets that PEFT does not know or cannot adapt.
    """
    network = shared_copy(backbone).cpu()
    make_attention_explicit(network)
    base_name = config.base_model_name_or_path
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # PEFT says so and sets it right (GPT-2's layers)
        warnings.filterwarnings("ignore", ".*tie_word_embeddings")  # tied weights are refused below
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")  # which PEFT asks for by its older name
        warnings.filterwarnings("ignore", ".*`base_model_name_or_path` was renamed")  # a copy of the base, say
        torch.manual_seed(seed)
        try:
            model = get_peft_model(network, copy.deepcopy(config))
        except ValueError as error:
            reason = textwrap.shorten(str(error).split(". ")[0], 200, placeholder=" …")
            raise ValueError(
                f"targets {shown(config.target_modules)} cannot be adapted: {reason}. {ADAPTABLE}"
            ) from error
    model.peft_config["default"].base_model_name_or_path = getattr(network, "name_or_path", None) or base_name
    return model.eval().requires_grad_(False)


def shared_copy(network: nn.Module) -> nn.Module:
    """A copy of a network with parameters of its own that share the memory of the network's, until they get another."""
    plain = [parameter for parameter in network.parameters() if type(parameter) is nn.Parameter]
    shared = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in plain}
    return copy.deepcopy(network, shared)


def _adapter_name(parameter: str) -> str:
    """The adapter's name for a parameter of the PEFT model."""
    return parameter.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def _check_untied(backbone: nn.Module, model: PeftModel, initial: Adapter) -> None:
    """Raise ``ValueError`` for an adapted or directly trained layer whose weight is another module's, too, or
    that is there under two names."""
    trained = {layer_of(name).removesuffix(".weight").removesuffix(".bias") for name in initial}
    for names in shared_parameters(backbone):
        for name in names:
            if f"base_model.model.{name}" in trained:
                others = [other for other in names if other != name]
                raise ValueError(f"{name} is tied: its weight is also that of {others}, which must stay as it is")
    places: dict[nn.Module, dict[tuple[nn.Module, str], str]] = {}  # where each module is: in which one, by which name
    for path, module in backbone.named_modules(remove_duplicate=False):
        owner, _, name = path.rpartition(".")
        places.setdefault(module, {})[backbone.get_submodule(owner), name] = path
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoraLayer | ModulesToSaveWrapper)}
    for paths in map(list, map(dict.values, places.values())):
        if len(paths) > 1 and any(f"base_model.model.{path}" in wrapped for path in paths):
            raise ValueError(
                f"{paths[0]} is also {paths[1]}: of one module under two names, PEFT adapts only the first"
            )


ADAPTABLE = (
    "LoRA goes on nn.Linear, on Conv1D of transformers, and on nn.Conv2d with zero padding, without groups or dilation"
)


def _check_layers(model: PeftModel, initial: Adapter, parameter_names: dict[str, str]) -> None:
    """Raise ``ValueError`` for layers whose adapter would not be ``W + scaling * B A``, and for a norm that lets the
    examples of a batch see each other."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer = name.removeprefix("base_model.model.")
            owner = model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, nn.MultiheadAttention) or _has_fast_path(owner):
                reason = f"nn.{type(owner).__name__} reads this weight without calling the layer, so LoRA does nothing"
                raise ValueError(f"{layer}: {reason}")
            if reason := _why_not_a_sum(module.get_base_layer()):
                raise ValueError(f"{layer} is {reason}. {ADAPTABLE}")
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.running_mean is None:
            layer = name.removeprefix("base_model.model.")
            raise ValueError(f"{layer} norms by the statistics of the batch: an example's logits depend on the others")
    if missing := sorted(initial.keys() - parameter_names.keys()):
        raise ValueError(f"these adapter tensors have no parameter of their own: {missing}")


def _has_fast_path(owner: nn.Module) -> bool:
    """Whether it is a layer of torch that in eval mode runs a fused kernel on the weights of its parts."""
    is_fused = isinstance(owner, nn.TransformerEncoderLayer) and owner.activation_relu_or_gelu
    return bool(is_fused and owner.self_attn.batch_first)


def _why_not_a_sum(layer: nn.Module) -> str:
    """Why LoRA on a layer is not ``W + scaling * B A``; empty if it is."""
    if isinstance(layer, nn.Conv2d):
        odd = {"groups": layer.groups != 1, "dilation": layer.dilation != (1, 1)}
        odd["padding_mode"] = layer.padding_mode != "zeros"
        return next((f"a convolution with {name}={getattr(layer, name)!r}" for name in odd if odd[name]), "")
    return "" if isinstance(layer, LINEAR) else f"a layer of {type(layer).__name__}"


def _check_found(backbone: nn.Module, initial: Adapter, config: LoraConfig) -> None:
    """Raise ``ValueError`` for a target or a head that is no layer: PEFT asks only that *some* target matches."""
    targets = [] if isinstance(config.target_modules, str) else config.target_modules or []
    modules = [f".{name}" for name, _ in backbone.named_modules()]  # one may be excluded, in some layers or everywhere
    if missing := sorted(name for name in targets if not any(module.endswith(f".{name}") for module in modules)):
        raise ValueError(f"targets {missing} match no layer of this backbone")
    trained = [f".{name}" for name in initial if not is_lora(name)]
    for saved in config.modules_to_save or []:
        if not any(f".{saved}." in name for name in trained):
            raise ValueError(f"head {saved!r} is no module of this backbone")


@contextmanager
def delta_added(adapted: AdaptedBackbone, change: Adapter) -> Iterator[None]:
    """The backbone with ``change``, the ``delta`` of one adapter, in the frozen weights of its adapted layers."""
    layers = {name: adapted.model.get_submodule(name.removesuffix(".weight")) for name in change}
    with adapted.state.lock:
        before = {name: layer.base_layer.weight.data for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                moved = change[name].detach().mT if getattr(layer, "fan_in_fan_out", False) else change[name].detach()
                layer.base_layer.weight.data = before[name] + moved.reshape(before[name].shape)
            yield
        finally:
            for name, layer in layers.items():
                layer.base_layer.weight.data = before[name]
