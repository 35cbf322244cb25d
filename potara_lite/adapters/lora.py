"""LoRA on a frozen backbone through PEFT, and adapters as plain dictionaries of tensors.

An *adapter* is what PEFT says it is: the names and tensors of ``get_peft_model_state_dict``, that is the LoRA factors
``A`` (r, in) and ``B`` (out, r) of every adapted layer and the directly trained weights (the new head). A *stack* is
the same dictionary with the clients on dim 0. ``AdaptedBackbone`` runs any of them; ``stacks.py`` says what a tensor's
name and shape mean.
"""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

try:
    from re import _parser as expressions
except ImportError:  # Python 3.10
    import sre_parse as expressions

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.func import functional_call
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from ..checks import kind, named, one_or_several, optional, positive, refuse, several, shown, text
from ..federation.split import Inputs
from ..files import reading, write_atomically
from ..models.frozen_trunk import blocks_below, call_network, check_names, hidden_below
from ..models.language import check_tokens
from .state import (
    Adapter,
    check_same_base,
    client_row,
    door,
    factor_names,
    factors,
    is_lora,
    is_traced,
    layer_of,
    lora_layers,
    one_adapter,
    rank_dim,
    rows_of_clients,
    stacks,
    whole_adapter,
)

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
NOT_A_SUM = (  # the options of PEFT's LoRA with which an adapted layer is not W + scaling * B A
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "layer_replication", "target_parameters", "trainable_token_indices",
)  # fmt: skip


def _unseen(make_mask: Callable) -> Callable:
    """A maker of masks of ``transformers`` that under ``vmap``, which cannot branch on values, does not look at what
    it is given to see whether it masks anything; anywhere else nothing changes (compiled, it never looks)."""

    def make(*args, attention_mask: Tensor | None = None, **options):
        if attention_mask is not None and (torch.compiler.is_compiling() or is_traced(attention_mask)):
            options |= dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return make_mask(*args, attention_mask=attention_mask, **options)

    return make


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


@door(adapter=named(kind("Tensor"), least=0))
def save_adapter(adapted: AdaptedBackbone, adapter: Adapter, folder: str | Path) -> Path:
    """Write one adapter as a PEFT folder that ``PeftModel.from_pretrained`` loads.

    The rank on disk is the adapter's own. A merge of rank ``k * r`` is saved with ``alpha`` enlarged so that the
    scaling, and with it every logit, stays the same. Each of the two files is replaced in one step.

    Raises ``ValueError`` for a stack, for missing or other tensors, and for values that are not finite.
    """
    from safetensors.torch import save

    _check_whole(adapted, adapter)
    folder, config = Path(folder), copy.deepcopy(adapted.config)
    ranks = {layer: len(factors(adapter, layer)[0]) for layer in lora_layers(adapter)}
    alphas = {layer: adapted.scaling[layer] * (r**0.5 if config.use_rslora else r) for layer, r in ranks.items()}
    config.r = max(ranks.values())
    config.lora_alpha = next(alphas[layer] for layer, rank in ranks.items() if rank == config.r)
    config.rank_pattern = {_pattern(layer): rank for layer, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {_pattern(layer): alpha for layer, alpha in alphas.items() if alpha != config.lora_alpha}
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    write_atomically(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    options = json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted)  # as PEFT has it, sets in order
    write_atomically(folder / CONFIG_FILE, options)
    return folder


def _pattern(layer: str) -> str:
    """The regular expression by which PEFT's rank and alpha patterns mean this layer and no other."""
    return "^" + re.escape(layer.removeprefix("base_model.model."))


@door()
def load_adapter(adapted: AdaptedBackbone, folder: str | Path) -> Adapter:
    """Read a PEFT folder back as an adapter of this backbone; its rank may differ from the configuration's.

    Raises ``FileError`` (a ``ValueError``) that names the folder when a file is missing or damaged, or when its kind,
    layers, shapes or scaling are not those of ``adapted``. The network is never asked.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    with reading(folder):
        with reading(folder / CONFIG_FILE):
            config = _lora_options(folder / CONFIG_FILE)
        tensors = load_file(folder / WEIGHTS_FILE)
        _check_whole(adapted, tensors)
        for layer in lora_layers(adapted.initial):
            rank, found = len(tensors[factor_names(layer)[0]]), _of_layer(config, "rank", layer)
            if rank != found:
                raise ValueError(f"{layer} has rank {rank}, {CONFIG_FILE} says {found}")
            scaling = _of_layer(config, "alpha", layer) / (rank**0.5 if config.get("use_rslora") else rank)
            if not abs(scaling - adapted.scaling[layer]) <= 1e-9 * adapted.scaling[layer]:
                raise ValueError(f"{layer} has scaling {scaling}, this backbone uses {adapted.scaling[layer]}")
    return {name: tensors[name] for name in adapted.initial}


def _lora_options(path: Path) -> dict:
    """The options of a LoRA adapter. Raises ``ValueError`` for one that is not W + scaling * B A."""
    options = json.loads(path.read_text("utf-8"))
    check_patterns(options)
    if options["peft_type"] != "LORA":
        raise ValueError(f"peft_type must be 'LORA', not {options['peft_type']!r}")
    if odd := [name for name in NOT_A_SUM if options.get(name)]:
        raise ValueError(f"{odd[0]}={options[odd[0]]!r}: such a layer is not W + scaling * B A")
    return options


def _of_layer(options: dict, kind: str, layer: str) -> float:
    """The ``"rank"`` or the ``"alpha"`` that PEFT reads of its options for a layer."""
    patterns = options.get(f"{kind}_pattern") or {}
    key = get_pattern_key(patterns, layer.removeprefix("base_model.model."))
    return patterns.get(key, options["r" if kind == "rank" else "lora_alpha"])


def _check_whole(adapted: AdaptedBackbone, adapter: Adapter) -> None:
    """Raise ``ValueError`` for what is not one whole adapter of this backbone, of any rank."""
    if adapter.keys() != adapted.initial.keys():
        odd = sorted(adapter.keys() ^ adapted.initial.keys())
        raise ValueError(f"an adapter of another base: {len(odd)} tensors differ, such as {odd[0]!r}")
    for name, like in adapted.initial.items():
        tensor, shape = adapter[name], list(like.shape)
        if tensor.dim() == len(shape) + 1:
            raise ValueError(
                f"{name} has a dimension too many, {tuple(tensor.shape)}: a stack? client_adapter gives one"
            )
        if is_lora(name) and tensor.dim() == len(shape):
            shape[rank_dim(name, like)] = max(1, tensor.shape[rank_dim(name, like)])  # any but 0
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not of this base: {tuple(like.shape)}")
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected a float of at least 16 bits")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")
    for layer in lora_layers(adapter):
        a, b = factors(adapter, layer)
        if a.shape[0] != b.shape[1]:
            raise ValueError(f"{layer} has factors of ranks {a.shape[0]} and {b.shape[1]}")
