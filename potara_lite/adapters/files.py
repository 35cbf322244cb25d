"""Adapters as PEFT folders: written so that ``PeftModel.from_pretrained`` loads them, and read back."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection
from math import inf
from pathlib import Path

from .. import __version__
from ..checks import PathLike, all_finite, checked, invalid
from ..compat import pattern_value
from ..files import reading, write_atomically
from .lora import AdaptedBackbone, check_options
from .state import Adapter, OneAdapter, check_adapter, factor_names, factors, is_lora, layer_of, lora_layers

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
REWRITE_THE_BASE = "pissa", "olora", "corda", "loftq", "lora_ga"  # ways to start that change the frozen weights
MODEL_CARD = """---
library_name: peft
tags: [lora, federated-learning]
---

# LoRA adapter

A LoRA adapter of rank {rank} for {base}, written by potara_lite {version}. Load it on the same base model with
`PeftModel.from_pretrained(base_model, folder)`.
"""


@checked
def save_adapter(adapted: AdaptedBackbone, adapter: OneAdapter, folder: PathLike) -> Path:
    """Write one adapter as a PEFT folder that ``PeftModel.from_pretrained`` loads.

    The rank on disk is the adapter's own. A merge of rank ``k * r`` is saved with ``alpha`` enlarged so that the
    scaling, and with it every logit, stays the same. A model card lies beside it. Each file is replaced in one step.

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
    base = type(adapted.model.get_base_model())
    if config.task_type is None and hasattr(base, "from_pretrained"):  # so that AutoPeftModel finds the class
        config.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    write_atomically(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    options = json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted)  # as PEFT has it, sets in order
    write_atomically(folder / CONFIG_FILE, options)
    card = MODEL_CARD.format(base=config.base_model_name_or_path or base.__name__, rank=config.r, version=__version__)
    write_atomically(folder / "README.md", card)
    return folder


def _pattern(layer: str) -> str:
    """The regular expression by which PEFT's rank and alpha patterns mean this layer and no other."""
    return "^" + re.escape(layer.removeprefix("base_model.model."))


@checked
def load_adapter(adapted: AdaptedBackbone, folder: PathLike) -> Adapter:
    """Read a PEFT folder back as an adapter of this backbone.

    Its rank, its alpha and whether it is rsLoRA may differ from the configuration's: B is multiplied so that the logits
    are the folder's. A layer that the folder does not adapt gets B = 0, a head that it does not hold the initial one.

    Raises ``FileError`` (a ``ValueError``) that names the folder when a file is missing or damaged, for tensors that
    this backbone has not, other shapes, and options of PEFT with which a layer is not ``W + scaling * B A``. The
    network is never asked.
    """
    folder = Path(folder)
    with reading(folder):
        with reading(folder / CONFIG_FILE):
            options = _lora_options(folder / CONFIG_FILE)
        return _for_backbone(adapted, _read_tensors(folder, adapted.initial.keys()), options)


def _read_tensors(folder: Path, known: Collection[str]) -> Adapter:
    """The tensors of a folder, by the ``known`` names or else by those that PEFT gives them today."""
    from safetensors.torch import load_file

    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(
            "adapter_model.bin is a pickle, which can run code: read it with PEFT and write it again with "
            "save_pretrained(..., safe_serialization=True)"
        )
    older = r"\.(modules_to_save\.)?default\.|\.modules_to_save\."  # in names of PEFT 0.18, say
    found = load_file(folder / WEIGHTS_FILE)
    return {name if name in known else re.sub(older, ".", name): tensor for name, tensor in found.items()}


@checked
def _for_backbone(adapted: AdaptedBackbone, tensors: OneAdapter, options: dict) -> Adapter:
    """What a folder holds as an adapter of this backbone."""
    if unknown := sorted(tensors.keys() - adapted.initial.keys()):
        raise ValueError(f"{len(unknown)} tensors are of no layer that is adapted here, such as {unknown[0]!r}")
    if half := [name for name in tensors if is_lora(name) and not tensors.keys() >= {*factor_names(layer_of(name))}]:
        raise ValueError(f"{half[0]!r} has no other factor")
    whole = adapted.initial | {name: tensor for name, tensor in tensors.items() if not is_lora(name)}
    for layer in lora_layers(adapted.initial):
        name_a, name_b = factor_names(layer)
        if name_a in tensors:
            factor = _scaling(options, layer, len(tensors[name_a])) / adapted.scaling[layer]
            whole[name_a] = tensors[name_a]
            whole[name_b] = tensors[name_b] if abs(factor - 1) <= 1e-9 else tensors[name_b] * factor
    for name, tensor in whole.items():
        if not all_finite(tensor):
            raise ValueError(f"{name!r} is beyond the numbers of {tensor.dtype} at this scaling")
    return check_adapter(adapted, whole)


def _scaling(options: dict, layer: str, rank: int) -> float:
    """The scaling of a layer by a folder's options. Raises ``ValueError`` where they have another rank."""
    name = layer.removeprefix("base_model.model.")
    expected = pattern_value(options.get("rank_pattern") or {}, name, options["r"])
    if rank != expected:
        raise ValueError(f"{name} has rank {rank}, {CONFIG_FILE} says {expected}")
    alpha = pattern_value(options.get("alpha_pattern") or {}, name, options["lora_alpha"])
    scaling = alpha / (rank**0.5 if options.get("use_rslora") else rank)
    return scaling if 0 < scaling < inf else invalid(f"the scaling of {name}", "positive", scaling)


def _lora_options(path: Path) -> dict:
    """The options of a LoRA adapter. Raises ``ValueError`` for one that is not ``W + scaling * B A``."""
    options = json.loads(path.read_text("utf-8"))
    if options["peft_type"] != "LORA":
        raise ValueError(f"peft_type must be 'LORA', not {options['peft_type']!r}")
    init = str(options.get("init_lora_weights", True)).lower()
    if init.startswith(REWRITE_THE_BASE):
        raise ValueError(
            f"init_lora_weights={init!r}: such an adapter belongs to other base weights than the backbone's"
        )
    check_options(options)
    return options
