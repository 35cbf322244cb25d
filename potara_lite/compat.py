"""What touches the insides of torch, transformers and PEFT, each with a test in ``tests/test_compat.py``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import regex
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, maybe_current_level
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import (
    tree_flatten as tree_flatten,
    tree_map_only as tree_map_only,
    tree_unflatten as tree_unflatten,
)

ATTENTION = "potara_lite"  # what our attention and mask functions' names begin with in the registries of transformers
PACKING: ContextVar[Any] = ContextVar("packing", default=None)  # where a batch's tokens are, while they are packed


def is_traced(tensor: Tensor) -> bool:
    """Whether it stands for many inside ``vmap`` or another transform, where its values cannot be looked at."""
    return is_functorch_wrapped_tensor(tensor)


def has_hooks(*modules: nn.Module) -> bool:
    """Whether anything else runs when one of the modules is called."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def dropout_rate(module: nn.Module) -> float:
    """How much a module drops at random in training mode: of torch's dropouts, and of an attention layer."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    rate = getattr(module, "attention_dropout", 0.0)
    return rate if isinstance(rate, float) else 0.0


def last_token_padding(network: nn.Module) -> int | None:
    """The token id behind which a network looks for a text's last real token, as the sequence classifiers of decoders
    do; ``None`` for a network that does not look for it.

    Raises ``ValueError`` where the network looks and its configuration names no such token of its vocabulary.
    """
    code = getattr(inspect.unwrap(type(network).forward), "__code__", None)
    if not hasattr(network, "config") or "pad_token_id" not in getattr(code, "co_names", ()):
        return None
    padding = network.config.get_text_config().pad_token_id
    vocabulary = network.get_input_embeddings().num_embeddings
    if padding is None or not 0 <= padding < vocabulary:
        raise ValueError(
            f"{type(network).__name__} finds the end of a text by config.pad_token_id, which is {padding}: set it to a "
            f"token of the vocabulary, 0 … {vocabulary - 1}, such as the tokenizer's pad_token_id, before attach"
        )
    return padding


@contextmanager
def attention_under_vmap() -> Iterator[None]:
    """Within it, torch's own attention (``scaled_dot_product_attention``, ``nn.MultiheadAttention``) is made of
    operations that ``vmap`` and forward-mode derivatives take; its fused kernels warn there at every call and run one
    client after another."""
    is_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fused)


def make_attention_explicit(network: nn.Module) -> None:
    """Set the attention of every model of transformers inside ``network`` to one that the transforms of ``torch.func``
    and forward-mode derivatives take: inside them the model's own explicit one, with masks made without a look at their
    values. Elsewhere a model with PyTorch's fused attention (``"sdpa"``) keeps it, to the bit; that one has no second
    derivative by ``torch.autograd.grad(create_graph=True)``.

    The functions are registered under names of our own; nothing that other models use is replaced.
    """
    from transformers import PreTrainedModel

    models = [module for module in network.modules() if isinstance(module, PreTrainedModel)]
    names = [_registered(model.config._attn_implementation) for model in models]  # first all: they share configs
    for model, name in zip(models, names):
        if model._can_set_attn_implementation():
            model.set_attn_implementation(name)
        else:  # such a model reads the name for its masks only
            model.config._attn_implementation_internal = name


def _registered(own: str | None) -> str:
    """The name of our attention and masks for a model with attention ``own``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    is_fused = own in ("sdpa", f"{ATTENTION}-sdpa")
    name = f"{ATTENTION}-sdpa" if is_fused else ATTENTION

    def attention(module: nn.Module, *args, **kwargs):
        packing = PACKING.get()
        if packing is None:
            return padded_attention(module, *args, **kwargs)
        heads = [packing.unpack(part.transpose(1, 2)).transpose(1, 2) for part in args[:3]]  # (C B, heads, T, dim)
        output, *rest = padded_attention(module, *heads, *args[3:], **kwargs)
        return packing.pack(output), *rest

    def padded_attention(module: nn.Module, *args, **kwargs):
        if is_fused and not _is_transformed():
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)
        files = [sys.modules[base.__module__] for base in type(module).__mro__]  # of the layer, or of what it extends
        eager = next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))
        return eager(module, *args, **kwargs)

    def mask(*args, **kwargs):
        if is_fused and not _is_transformed():
            return sdpa_mask(*args, **kwargs)
        return eager_mask(*args, **kwargs | dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False))

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


def _is_transformed() -> bool:
    """Whether this runs inside ``vmap`` or another transform of ``torch.func``, inside forward-mode derivatives of
    ``torch.autograd``, or is being compiled."""
    is_forward_mode = torch.autograd.forward_ad._current_level >= 0
    return torch.compiler.is_compiling() or maybe_current_level() is not None or is_forward_mode


def pattern_value(patterns: Mapping[str, float], layer: str, default: float, *, seconds: float = 1.0) -> float:
    """The value of the first of PEFT's ``rank_pattern`` or ``alpha_pattern`` that a layer's name matches.

    Raises ``ValueError`` for a pattern that takes longer than ``seconds``: it comes from a file and may never end.
    """
    for pattern, value in patterns.items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", layer, timeout=seconds):
                return value
        except TimeoutError:
            raise ValueError(
                f"the pattern {pattern[:60]!r} of a layer's rank or alpha takes too long to match"
            ) from None
        except regex.error as error:
            raise ValueError(f"{pattern[:60]!r} is no regular expression: {error}") from None
    return default


def shared_parameters(network: nn.Module) -> Iterable[list[str]]:
    """The names of the modules that hold one parameter, for every parameter that more than one holds."""
    owners: dict[int, list[str]] = {}
    for name, module in network.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return [names for names in owners.values() if len(names) > 1]
