"""Adapters as PEFT folders: written so that ``PeftModel.from_pretrained`` loads them, and read back."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

from peft.utils.other import get_pattern_key

from ..checks import kind, named
from ..files import reading, write_atomically
from .lora import AdaptedBackbone, check_patterns
from .state import Adapter, door, factor_names, factors, is_lora, lora_layers, rank_dim

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"

NOT_A_SUM = (  # the options of PEFT's LoRA with which an adapted layer is not W + scaling * B A
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "layer_replication", "target_parameters", "trainable_token_indices",
)  # fmt: skip


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
