"""Texts without their padding: in the blocks of a transformer each client's tokens are one row.

Everything in a block but attention treats tokens one by one. There padding takes as much time as text, and nobody reads
the result. With ``packed_forwards`` the blocks run on rows of real tokens; attention (``compat.py``) unpacks its
queries, keys and values and packs its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat import PACKING, tree_map_only


class Packing:
    """Where the real tokens of ``mask`` ``(C, B, T)`` are in rows of their own, ``(C, R)``, and the way back.

    ``R`` is the most real tokens that a client has. The rows of other clients end with padding, and ``unpack`` repeats
    some token where padding was: nobody reads these.
    """

    def __init__(self, mask: Tensor):
        real = mask.flatten(1) != 0
        rows = torch.arange(len(real), device=real.device).unsqueeze(1)
        self.length = int(real.sum(1).max())
        order = real.int().argsort(dim=1, descending=True, stable=True)[:, : self.length]
        self.to_packed = order + rows * real.shape[1]  # (C, R) of C B T
        places = (real.cumsum(1) - 1).clamp_min(0)
        self.to_padded = (places + rows * self.length).view(-1, mask.shape[2])  # (C B, T) of C R

    def pack(self, x: Tensor) -> Tensor:
        """``(C B, T, ...)``, or ``(1, T, ...)`` for all texts, as ``(C, R, ...)``; anything else as it is."""
        if x.dim() >= 2 and x.shape[:2] == (1, self.to_padded.shape[1]):
            x = x.expand(len(self.to_padded), *x.shape[1:])
        return _rows(x, self.to_padded, self.to_packed)

    def unpack(self, x: Tensor) -> Tensor:
        """``(C, R, ...)`` as ``(C B, T, ...)``; anything else as it is."""
        return _rows(x, self.to_packed, self.to_padded)


def _rows(x: Tensor, of: Tensor, index: Tensor) -> Tensor:
    if x.shape[:2] != of.shape:
        return x
    return F.embedding(index, x.reshape(of.numel(), -1)).view(*index.shape, *x.shape[2:])


def packed_forwards(blocks: Sequence[nn.Module], packing: Packing) -> dict[nn.Module, Callable]:
    """Forwards with which the ``blocks`` run on packed rows: each packs what is padded, the last unpacks its output."""

    def packed(block: nn.Module, forward: Callable) -> Callable:
        def packed_forward(*args, **kwargs) -> Any:
            args, kwargs = tree_map_only(Tensor, packing.pack, (args, kwargs))
            token = PACKING.set(packing)
            try:
                output = forward(*args, **kwargs)
            finally:
                PACKING.reset(token)
            return tree_map_only(Tensor, packing.unpack, output) if block is blocks[-1] else output

        return packed_forward

    return {block: packed(block, block.forward) for block in blocks}
