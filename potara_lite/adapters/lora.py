"""LoRA on a frozen backbone through PEFT, and adapters as plain dictionaries of tensors.

An *adapter* is what PEFT says it is: the names and tensors of ``get_peft_model_state_dict``, that is the LoRA factors
``A`` (r, in) and ``B`` (out, r) of every adapted layer and the directly trained weights (the new head). A *stack* is
the same dictionary with the clients on dim 0. ``AdaptedBackbone`` runs any of them; ``stacks.py`` says what a tensor's
name and shape mean.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

try:
    from re import _parser as expressions
except ImportError:  # Python 3.10
    import sre_parse as expressions
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from torch.func import functional_call
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from ..checks import kind, one_or_several, optional, positive, refuse, shown, text
from ..compat import _unseen
from ..federation.inputs import Inputs
from ..models.frozen_trunk import blocks_below, call_network, check_names, hidden_below
from ..models.language import check_tokens
from .state import Adapter, adapter_bytes, door, is_lora, layer_of, lora_layers

ALL_MASK_ATTENTION_FUNCTIONS.update(eager=_unseen(eager_mask), sdpa=_unseen(sdpa_mask))


PATTERNS = "target_modules exclude_modules layers_pattern modules_to_save rank_pattern alpha_pattern".split()

MOST_WAYS, MOST_PATTERNS, LENGTH = 300_000, 1000, 30  # of a pattern; of an option; of a layer's name


def pattern(name: str, value: str, given: object = None) -> str:
    """A regular expression for the names of layers. Raises ``ValueError`` for one whose match may never end."""
    found = text(name, value, {})
    try:
        ways = _ways(expressions.parse(found))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{name} must be a regular expression, not {shown(found)}: {error}") from None
    if ways > MOST_WAYS:
        refuse(name, "a pattern that is soon matched, with few repetitions and none inside another", found)
    return found


def _ways(parts: Iterable) -> int:
    """In how many ways the parts of a regular expression can match a name, at most; from ``MOST_WAYS`` on any more."""
    ways = 1
    for kind_of_part, argument in parts:
        operation = str(kind_of_part)
        if operation == "BRANCH":
            ways *= sum(map(_ways, argument[1]))
        elif operation.endswith("REPEAT"):
            least, most = (min(int(bound), LENGTH) for bound in argument[:2])
            each = _ways(argument[2])
            ways *= sum(each**times for times in range(least, most + 1))
        else:
            some = argument if isinstance(argument, tuple) else [argument]
            inside = [_ways(one) for one in some if isinstance(one, expressions.SubPattern)]
            ways = max(ways, *inside) if operation.startswith("ASSERT") else ways * math.prod(inside)
        ways = min(ways, MOST_WAYS + 1)
    return ways


def check_patterns(options: Mapping) -> None:
    """Raise ``ValueError`` for options of PEFT with a pattern that ``pattern`` refuses, or with too many of them."""
    for name in PATTERNS:
        found = options.get(name) or []
        if isinstance(found, Mapping) and len(found) > MOST_PATTERNS:
            raise ValueError(f"{name} must have at most {MOST_PATTERNS} patterns, not {len(found)}")
        for one in [found] if isinstance(found, str) else found:
            pattern(name, one)


@dataclass(frozen=True, repr=False)
class AdaptedBackbone:
    """A frozen backbone with an empty adapter slot: call it with an adapter and a batch.

    ``model``: the PEFT model, in eval mode, no parameter of it requires a gradient.
    ``initial``: the adapter that ``attach`` drew; its LoRA ``B`` and head are zero.
    ``parameter_names``: the model's parameter behind each adapter tensor.
    ``scaling``: ``alpha / r`` (or ``alpha / sqrt(r)`` with rsLoRA) of each adapted layer.
    """

    model: PeftModel
    initial: Adapter
    parameter_names: dict[str, str]
    scaling: dict[str, float]

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
        if adapter.keys() != self.initial.keys():  # what is missing would be the backbone's own, without a word
            odd = sorted(adapter.keys() ^ self.initial.keys())
            raise ValueError(
                f"adapter must be of this backbone: {len(odd)} tensors are of one only, such as {odd[0]!r}"
            )
        weights = {self.parameter_names[name]: tensor.to(self.initial[name].dtype) for name, tensor in adapter.items()}
        if self.model.training:  # a batch norm would write its running statistics into the backbone that all share
            weights |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}

        def run(*args, **kwargs):
            return functional_call(self.model, weights, args, kwargs)

        return call_network(run, x, self.blocks_below)

    def embed(self, x: Inputs) -> Inputs:
        """What the frozen part below the first adapted block makes of a batch; every adapter's logits on the result are
        those on ``x``, for less. ``federation.map(adapted.embed)`` computes it once for every example.

        The blocks must be in a list (``nn.ModuleList`` or ``nn.Sequential``); a network may offer an ``embed`` of its
        own besides, as ``LabViT`` does. Where there is nothing to save it is ``x`` itself.
        """
        self.check_inputs(x)
        network = self.model.get_base_model()
        if isinstance(x, Tensor) and hasattr(network, "embed"):
            with torch.no_grad():
                x = network.embed(x)
        owners = [self.model.get_submodule(name.rpartition(".")[0]) for name in self.parameter_names.values()]
        return hidden_below(network, x, self.blocks_below, owners)

    @cached_property
    def dropouts(self) -> list[tuple[str, nn.Module]]:
        """The modules, by name, that would drop at random in training mode."""
        return [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.modules.dropout._DropoutNd) or hasattr(module, "attention_dropout")
        ]

    @cached_property
    def blocks_below(self) -> list[nn.Module]:
        """The frozen blocks below the first adapted one."""
        return blocks_below(self.model, list(self.scaling))

    def check_inputs(self, x: Inputs, ids: Sequence[int] | None = None) -> None:
        """Raise ``ValueError`` for inputs that the network does not take, for token ids and positions that it has no
        embedding of, and where dropout is active.

        With ``ids``, the numbers of the clients, these are on dim 0.
        """
        if not isinstance(x, Tensor | Mapping):
            refuse("x", "a tensor or a dictionary of tensors", x)
        for name, module in self.dropouts:
            rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else module.attention_dropout
            if module.training and rate:
                raise ValueError(f"dropout is active in {name}: call model.eval(), so that clients are independent")
        if isinstance(x, Mapping):
            check_names(self.model.get_base_model(), x)
            check_tokens(self.model.get_base_model(), x, ids)

    @property
    def config(self) -> LoraConfig:
        return self.model.peft_config["default"]

    @property
    def device(self) -> torch.device:
        """Where the backbone lies."""
        return next(iter(self.initial.values())).device

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        """The precisions of its weights, frozen and trained, which are those that its inputs may have."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.initial.values()]
        return sorted({tensor.dtype for tensor in tensors if tensor.is_floating_point()}, key=str)

    @property
    def dtype(self) -> torch.dtype:
        """In which precision the backbone computes."""
        return next(iter(self.initial.values())).dtype

    @door()
    def to(self, device: str | torch.device) -> AdaptedBackbone:
        """The same backbone on ``device`` (the model itself is moved, as ``nn.Module.to`` does)."""
        initial = {name: tensor.to(device) for name, tensor in self.initial.items()}
        return AdaptedBackbone(self.model.to(device), initial, self.parameter_names, self.scaling)


@door(
    backbone=kind("Module"),
    targets=one_or_several(pattern),
    head=optional(pattern),
    config=kind("LoraConfig"),
    alpha=positive,
)
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

    The copy is in eval mode and shares the memory of the frozen weights, so a large backbone is there once.
    ``alpha`` defaults to ``2 * rank``. Pass a ``config`` of your own for anything else PEFT's LoRA can do (rank
    patterns, rsLoRA, convolutions); it then replaces ``rank``, ``alpha``, ``targets`` and ``head``.

    Raises ``ValueError`` for a ``rank`` below 1, a scaling that is not a positive number, dropout (the random numbers
    of one client would depend on the others), for DoRA and embedding layers (not a sum of ``B A``), for ``targets`` or
    a ``head`` that the backbone has not, for patterns whose match may never end, and for one whose weight is another
    layer's, too (a language model's output tied to its embedding).
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
    check_patterns(vars(config))
    _check_untied(backbone, config)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # PEFT says so and sets it right (GPT-2's layers)
        torch.manual_seed(seed)
        try:
            model = get_peft_model(_copy_of(backbone).cpu(), copy.deepcopy(config))
        except ValueError as error:
            raise ValueError(
                f"targets {shown(config.target_modules)} cannot be adapted: {str(error).split('. ')[0]}"
            ) from error
    model.eval().requires_grad_(False)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    initial = {name: tensor.detach().clone() for name, tensor in state.items()}
    names = {
        _adapter_name(parameter): parameter for parameter, _ in model.named_parameters() if ".default." in parameter
    }
    _check_mergeable(model, initial, names)
    _check_found(initial, config)
    if config.modules_to_save:
        for name, tensor in initial.items():
            if not is_lora(name):
                tensor.zero_()
    scaling = {layer: model.get_submodule(layer).scaling["default"] for layer in lora_layers(initial)}
    for layer, value in scaling.items():
        positive(f"the scaling of {layer}", value, {})
    return AdaptedBackbone(model, initial, {name: names[name] for name in initial}, scaling)


def _copy_of(backbone: nn.Module) -> nn.Module:
    """The same network with parameters of its own, which share the memory of the backbone's."""
    plain = [parameter for parameter in backbone.parameters() if type(parameter) is nn.Parameter]
    shared = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in plain}
    return copy.deepcopy(backbone, shared)


def _check_untied(backbone: nn.Module, config: LoraConfig) -> None:
    """Raise ``ValueError`` for a target or a head whose weight is another module's, too."""
    owners: dict[int, list[str]] = {}
    for name, module in backbone.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    heads = tuple(f".{head}" for head in config.modules_to_save or [])
    for names in owners.values():
        for name in names if len(names) > 1 else []:
            is_target = config.target_modules is not None and check_target_module_exists(config, name)
            if is_target or f".{name}".endswith(heads):
                others = [other for other in names if other != name]
                raise ValueError(f"{name} is tied: its weight is also that of {others}, which must stay as it is")


def _adapter_name(parameter: str) -> str:
    """The adapter's name for a parameter of the PEFT model."""
    return parameter.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def _check_mergeable(model: PeftModel, initial: Adapter, parameter_names: dict[str, str]) -> None:
    """Raise ``ValueError`` for adapters whose merge would not be that of the models."""
    if missing := sorted(initial.keys() - parameter_names.keys()):
        raise ValueError(f"these adapter tensors have no parameter of their own: {missing}")
    if odd := [name for name in initial if "lora_" in name and layer_of(name) == name]:
        raise ValueError(f"only LoRA factors A and B can be merged exactly, not {odd}")
    for layer in lora_layers(initial):
        if isinstance(model.get_submodule(layer.rpartition(".")[0]), nn.MultiheadAttention):
            raise ValueError(
                f"{layer}: nn.MultiheadAttention reads this weight without calling the layer, so LoRA does nothing"
            )


def _check_found(initial: Adapter, config: LoraConfig) -> None:
    """Raise ``ValueError`` for a target or a head that is no layer: PEFT asks only that *some* target matches."""
    targets = [] if isinstance(config.target_modules, str) else config.target_modules or []
    layers = [f".{layer}" for layer in lora_layers(initial)]
    if missing := sorted(name for name in targets if not any(layer.endswith(f".{name}") for layer in layers)):
        raise ValueError(f"targets {missing} match no layer of this backbone")
    heads = config.modules_to_save or []
    if missing := [head for head in heads if not any(f".{head}." in name for name in initial if not is_lora(name))]:
        raise ValueError(f"head {shown(missing[0])} is no module of this backbone")


@contextmanager
def delta_added(adapted: AdaptedBackbone, change: Adapter) -> Iterator[None]:
    """The backbone with ``change``, the ``delta`` of one adapter, in the frozen weights of its adapted layers."""
    layers = {name: adapted.model.get_submodule(name.removesuffix(".weight")) for name in change}
    before = {name: layer.base_layer.weight.data for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            moved = change[name].detach().mT if getattr(layer, "fan_in_fan_out", False) else change[name].detach()
            layer.base_layer.weight.data = before[name] + moved.reshape(before[name].shape)
        yield
    finally:
        for name, layer in layers.items():
            layer.base_layer.weight.data = before[name]
