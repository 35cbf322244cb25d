"""Adapters as PEFT folders: written so that ``PeftModel.from_pretrained`` loads them, and read back."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

from ..checks import PathLike, checked
from ..compat import pattern_value
from ..files import reading, write_atomically
from .lora import AdaptedBackbone
from .state import Adapter, OneAdapter, check_adapter, factor_names, factors, lora_layers

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"

NOT_A_SUM = (  # the options of PEFT's LoRA with which an adapted layer is not W + scaling * B A
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "layer_replication", "target_parameters", "trainable_token_indices",
)  # fmt: skip


@checked
def save_adapter(adapted: AdaptedBackbone, adapter: OneAdapter, folder: PathLike) -> Path:
    """Write one adapter as a PEFT folder that ``PeftModel.from_pretrained`` loads.

    The rank on disk is the adapter's own. A merge of rank ``k * r`` is saved with ``alpha`` enlarged so that the
    scaling, and with it every logit, stays the same. Each of the two files is replaced in one step.

    Raises ``ValueError`` for a stack, for missing or other tensors, and for values that are not finite.
    """
    from safetensors.torch import save

    adapter = check_adapter(adapted, adapter)
    folder = Path(folder)
    config = copy.deepcopy(adapted.config)
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


@checked
def load_adapter(adapted: AdaptedBackbone, folder: PathLike) -> Adapter:
    """Read a PEFT folder back as an adapter of this backbone; its rank may differ from the configuration's.

    Raises ``FileError`` (a ``ValueError``) that names the folder when a file is missing or damaged, or when its kind,
    layers, shapes or scaling are not those of ``adapted``. The network is never asked.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    with reading(folder):
        with reading(folder / CONFIG_FILE):
            config = _lora_options(folder / CONFIG_FILE)
        tensors = _whole(adapted, load_file(folder / WEIGHTS_FILE))
        for layer in lora_layers(adapted.initial):
            rank = len(tensors[factor_names(layer)[0]])
            expected = _of_layer(config, "rank", layer)
            if rank != expected:
                raise ValueError(f"{layer} has rank {rank}, {CONFIG_FILE} says {expected}")
            scaling = _of_layer(config, "alpha", layer) / (rank**0.5 if config.get("use_rslora") else rank)
            if not abs(scaling - adapted.scaling[layer]) <= 1e-9 * adapted.scaling[layer]:
                raise ValueError(f"{layer} has scaling {scaling}, this backbone uses {adapted.scaling[layer]}")
    return tensors


@checked
def _whole(adapted: AdaptedBackbone, adapter: OneAdapter) -> Adapter:
    """What was read, checked like an argument."""
    return check_adapter(adapted, adapter)


def _lora_options(path: Path) -> dict:
    """The options of a LoRA adapter. Raises ``ValueError`` for one that is not W + scaling * B A."""
    options = json.loads(path.read_text("utf-8"))
    if options["peft_type"] != "LORA":
        raise ValueError(f"peft_type must be 'LORA', not {options['peft_type']!r}")
    if odd := [name for name in NOT_A_SUM if options.get(name)]:
        raise ValueError(f"{odd[0]}={options[odd[0]]!r}: such a layer is not W + scaling * B A")
    return options


def _of_layer(options: dict, kind: str, layer: str) -> float:
    """The ``"rank"`` or the ``"alpha"`` that PEFT reads of its options for a layer."""
    default = options["r" if kind == "rank" else "lora_alpha"]
    return pattern_value(options.get(f"{kind}_pattern") or {}, layer.removeprefix("base_model.model."), default)
