"""What touches the insides of torch, transformers and PEFT: private names, each with a test of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .adapters.state import is_traced


def _unseen(make_mask: Callable) -> Callable:
    """A maker of masks of ``transformers`` that under ``vmap``, which cannot branch on values, does not look at what
    it is given to see whether it masks anything; anywhere else nothing changes (compiled, it never looks)."""

    def make(*args, attention_mask: Tensor | None = None, **options):
        if attention_mask is not None and (torch.compiler.is_compiling() or is_traced(attention_mask)):
            options |= dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return make_mask(*args, attention_mask=attention_mask, **options)

    return make
