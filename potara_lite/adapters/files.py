"""Adapters as PEFT folders: written so that ``PeftModel.from_pretrained`` loads them, and read back."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Mapping, Sequence
from math import inf
from pathlib import Path

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from .. import __version__
from ..checks import List, PathLike, all_finite, checked, invalid, shown
from ..compat import pattern_value
from ..files import reading, write_atomically
from ..models.language import TextClassifier, encoder_loader, plain_encoder, quietly
from .lora import AdaptedBackbone, attach, check_options, shared_copy
from .state import (
    Adapter,
    OneAdapter,
    Stack,
    check_adapter,
    client_adapter,
    count_clients,
    factor_names,
    factors,
    is_lora,
    layer_of,
    lora_layers,
)

WEIGHTS_FILE, CONFIG_FILE, HEAD_FILE = "adapter_model.safetensors", "adapter_config.json", "head.safetensors"
MODEL_CARD = """---
library_name: {library}
tags: [lora, federated-learning]
---

# {title}

{text}

Written by potara_lite {version}.
"""
LOAD_HEAD = """
The base is an encoder, as `{loader}` loads it; a class with a head of its own has other names of its layers. The
adapter's head is linear and reads the mean of the real tokens' last hidden states:

```python
base = {loader}.from_pretrained({base!r})
base.head = torch.nn.Linear({width}, {classes})
model = PeftModel.from_pretrained(base, folder).eval()
hidden, real = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
logits = model.base_model.model.head((hidden * real).sum(1) / real.sum(1))
```"""
USE_HEAD = """
The head, which is linear and reads the mean of the real tokens' last hidden states, is in {file}:

```python
model, head = {loader}.from_pretrained(folder).eval(), load_file(f"{{folder}}/{file}")
hidden, real = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
logits = (hidden * real).sum(1) / real.sum(1) @ head["weight"].T + head["bias"]
```"""


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
    _set_ranks(config, {layer: len(factors(adapter, layer)[0]) for layer in lora_layers(adapter)}, adapted.scaling)
    config.inference_mode = True
    network = adapted.model.get_base_model()
    base = getattr(network, "loaded_as", type(network))
    if config.task_type is None and hasattr(base, "from_pretrained"):  # so that AutoPeftModel finds the class
        config.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    if isinstance(network, TextClassifier):  # whole names: by their ends, PEFT would take those of other classes, too
        config.target_modules = "|".join(re.escape(_in_base(layer)) for layer in lora_layers(adapter))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    write_atomically(folder / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    options = json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted)  # as PEFT has it, sets in order
    write_atomically(folder / CONFIG_FILE, options)
    name = config.base_model_name_or_path or base.__name__
    text = f"A LoRA adapter of rank {config.r} for {name}. Load it on the same base model with\n"
    text += "`PeftModel.from_pretrained(base_model, folder)`."
    if isinstance(network, TextClassifier):
        classes, width = network.head.weight.shape
        text += "\n" + LOAD_HEAD.format(loader=encoder_loader(network), base=name, width=width, classes=classes)
    _write_card(folder, "peft", "LoRA adapter", text)
    return folder


def _write_card(folder: Path, library: str, title: str, text: str) -> None:
    """Write the model card of a folder."""
    card = MODEL_CARD.format(library=library, title=title, text=text, version=__version__)
    write_atomically(folder / "README.md", card)


@checked
def save_adapters(
    adapted: AdaptedBackbone, stack: Stack, folder: PathLike, names: List[str] | None = None
) -> list[Path]:
    """Write every client's adapter of a stack as a PEFT folder of its own inside ``folder`` (``save_adapter``).

    ``names`` of their folders: of each client, ``client-0``, ``client-1``, … without them. Returns the folders' paths.

    Raises ``ValueError`` for names that are as many as the clients but equal, but for upper and lower case, or no names
    of a folder.
    """
    clients = count_clients(stack)
    names = [f"client-{client}" for client in range(clients)] if names is None else names
    if len(names) != clients:
        raise ValueError(f"names: {len(names)} of them for {clients} clients")
    if odd := [
        name for name in names if name.strip(" .") != name or not name or re.search(r'[/\\:*?"<>|\x00-\x1f]', name)
    ]:
        invalid("names", "names of folders", odd[0])
    if len({name.lower() for name in names}) < clients:
        raise ValueError(f"names must differ, unlike {shown(names)}")
    stack = check_adapter(adapted, stack, "stack", stacked=True)
    return [save_adapter(adapted, client_adapter(stack, row), Path(folder) / name) for row, name in enumerate(names)]


@checked
def export_merged(base: AdaptedBackbone | nn.Module, adapter: OneAdapter | PathLike, folder: PathLike) -> Path:
    """Write the full weights of the base with an adapter in them: a model that needs neither PEFT nor this library.

    ``base``: the adapted backbone, or the model that the ``adapter``, then a PEFT folder, was trained on. A model of
    ``transformers`` is written by its ``save_pretrained``, so ``from_pretrained(folder)`` loads it (the head of a
    ``text_encoder`` lies beside it); of another one, the ``state_dict`` is written as ``model.safetensors``. The model
    card says how to load it. The weights are rounded to the dtype of the base.

    Raises ``ValueError`` for an adapter that is not of this base.
    """
    if not isinstance(base, AdaptedBackbone):
        if not isinstance(adapter, str | Path):
            invalid("adapter", "a PEFT folder, where base is not an adapted backbone", adapter)
        base = attach(base, config=adapter)
    adapter = load_adapter(base, adapter) if isinstance(adapter, str | Path) else check_adapter(base, adapter)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_network(_merged_network(base, adapter), folder)
    return folder


def _merged_network(adapted: AdaptedBackbone, adapter: Adapter) -> nn.Module:
    """The backbone as it was before ``attach``, with the adapter in its weights; the others are shared."""
    if adapted.gated_layers:
        raise ValueError("adapter must be plain LoRA: gated experts are no change of the weights")
    with adapted.state.lock:
        model = shared_copy(adapted.model)
    for name, tensor in adapter.items():
        parameter = model.get_parameter(adapted.parameter_names[name])
        parameter.data = tensor.detach().to(parameter)
    return model.merge_and_unload(safe_merge=True)


def _write_network(network: nn.Module, folder: Path) -> None:
    """Write a network as those who load it expect it, and its model card."""
    from safetensors.torch import save

    text = "The full weights of {} with a LoRA adapter in them. Load them with\n`{}`."
    head = network.head if isinstance(network, TextClassifier) else None
    if head is not None:
        loader, network = encoder_loader(network), plain_encoder(network)
    name = type(network).__name__
    if isinstance(network, PreTrainedModel):
        if hasattr(network.config, "use_cache"):
            network.config.use_cache = True  # the default of transformers, which training turns off
        with quietly():
            network.save_pretrained(folder)
        text = text.format(network.name_or_path or name, f"{name}.from_pretrained(folder)")
    else:
        tensors = {key: tensor.detach().cpu().clone() for key, tensor in network.state_dict().items()}
        write_atomically(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
        text = text.format(name, 'network.load_state_dict(load_file("model.safetensors"))')
    if head is not None:
        tensors = {key: tensor.detach().cpu().clone() for key, tensor in head.state_dict().items()}
        write_atomically(folder / HEAD_FILE, save(tensors, metadata={"format": "pt"}))
        text += "\n" + USE_HEAD.format(file=HEAD_FILE, loader=loader)
    _write_card(folder, "transformers" if isinstance(network, PreTrainedModel) else "pytorch", "Merged model", text)


def _set_ranks(config: LoraConfig, ranks: Mapping[str, int], scaling: Mapping[str, float]) -> None:
    """Give each adapted layer its rank and the alpha that its scaling needs, in PEFT's configuration."""
    alphas = {layer: scaling[layer] * (rank**0.5 if config.use_rslora else rank) for layer, rank in ranks.items()}
    config.r = max(ranks.values())
    config.lora_alpha = next(alphas[layer] for layer, rank in ranks.items() if rank == config.r)
    config.rank_pattern = {_pattern(layer): rank for layer, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {_pattern(layer): alpha for layer, alpha in alphas.items() if alpha != config.lora_alpha}


def _pattern(layer: str) -> str:
    """The regular expression by which PEFT's rank and alpha patterns mean this layer and no other."""
    return "^" + re.escape(_in_base(layer))


def _in_base(name: str) -> str:
    """The name of a layer or a tensor in the base, which PEFT's wrappers put a prefix before."""
    return name.removeprefix("base_model.model.")


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
        options = read_options(folder)
        return _for_backbone(adapted, _read_tensors(folder, adapted.initial.keys()), options)


def folder_config(backbone: nn.Module, folders: Sequence[str | Path]) -> LoraConfig:
    """The configuration of an adapter slot of ``backbone`` that takes the adapter of each of these PEFT folders.

    It has all their layers and directly trained modules. These, the ranks and the scalings are read from the tensors: a
    folder's patterns are not given to PEFT. What several folders have is as in the first one.

    Raises ``FileError`` as ``load_adapter`` does.
    """
    possible = {f"base_model.model.{name}" for name, _ in backbone.named_parameters()}
    possible |= {key for name, _ in backbone.named_modules() for key in factor_names(f"base_model.model.{name}")}
    ranks: dict[str, int] = {}
    scaling: dict[str, float] = {}
    saved: dict[str, None] = {}
    for folder in map(Path, reversed(folders)):  # so that the first one has the last word
        with reading(folder):
            options = read_options(folder)
            tensors = _read_tensors(folder, possible)
            layers = lora_layers(tensors)
            if not layers:
                raise ValueError("it has no LoRA layer")
            for layer in layers:
                ranks[layer] = len(tensors[factor_names(layer)[0]])
                scaling[layer] = _scaling(options, layer, ranks[layer])
            trained = " ".join(name for name in tensors if not is_lora(name))
            saved |= {name: None for name in options.get("modules_to_save") or [] if f".{name}." in trained}
    config = LoraConfig(
        task_type=options.get("task_type"),
        base_model_name_or_path=options.get("base_model_name_or_path"),
        target_modules=[_in_base(layer) for layer in ranks],
        modules_to_save=list(saved) or None,
    )
    _set_ranks(config, ranks, scaling)
    return config


def trained_tensors(folder: str | Path) -> Adapter:
    """The directly trained tensors of a PEFT folder, by their names in the base."""
    with reading(folder):
        found = _read_tensors(Path(folder), ())
    return {_in_base(name): tensor for name, tensor in found.items() if not is_lora(name)}


def _read_tensors(folder: Path, known: Collection[str]) -> Adapter:
    """The tensors of a folder, by the ``known`` names or else by those that PEFT gives them today."""
    from safetensors.torch import load_file

    if not (folder / WEIGHTS_FILE).exists() and (folder / "adapter_model.bin").exists():
        raise ValueError(
            "adapter_model.bin is a pickle, which can run code: read it with PEFT and write it again with "
            "save_pretrained(..., safe_serialization=True)"
        )
    found = load_file(folder / WEIGHTS_FILE)
    return {_name_today(name, known): tensor for name, tensor in found.items()}


def _name_today(name: str, known: Collection[str]) -> str:
    """The ``known`` name of a tensor that an older PEFT wrote (0.18, say), or an older ``text_encoder``."""
    today = re.sub(r"\.(modules_to_save\.)?default\.|\.modules_to_save\.", ".", name)
    ours = today.replace("base_model.model.encoder.", "base_model.model.", 1)
    return next((one for one in (name, today, ours) if one in known), today)


@checked
def _for_backbone(adapted: AdaptedBackbone, tensors: OneAdapter, options: dict) -> Adapter:
    """What a folder holds as an adapter of this backbone."""
    if unknown := sorted(tensors.keys() - adapted.initial.keys()):
        raise ValueError(
            f"{len(unknown)} tensors are of no layer that is adapted here, such as {unknown[0]!r}"
            " (attach(backbone, config=folder) adapts those that a folder has)"
        )
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
    name = _in_base(layer)
    expected = pattern_value(options.get("rank_pattern") or {}, name, options["r"])
    if rank != expected:
        raise ValueError(f"{name} has rank {rank}, {CONFIG_FILE} says {expected}")
    alpha = pattern_value(options.get("alpha_pattern") or {}, name, options["lora_alpha"])
    scaling = alpha / (rank**0.5 if options.get("use_rslora") else rank)
    return scaling if 0 < scaling < inf else invalid(f"the scaling of {name}", "positive", scaling)


def read_options(folder: Path) -> dict:
    """The options of a folder's LoRA adapter. Raises ``FileError`` for one that is not ``W + scaling * B A``."""
    with reading(folder / CONFIG_FILE):
        options = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        if options["peft_type"] != "LORA":
            raise ValueError(f"peft_type must be 'LORA', not {options['peft_type']!r}")
        check_options(options | {"inference_mode": True})
    return options
