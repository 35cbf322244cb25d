"""The batches of a client: a stream of permutations that can start at any step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..checks import Count, List, Seed, Size, checked


@checked
def batch_indices(size: Size, start: Count, steps: Count, batch_size: Size, seed: Seed | List[Seed]) -> Tensor:
    """The examples of steps ``start … start + steps - 1`` of one client, ``(steps, batch_size)``.

    The stream is one permutation of the client's examples after another; epoch ``e`` has the seed ``(*seed, e)``. It
    can start at any step, so rounds of 5 steps see the same batches as one run over all of them.
    """
    if steps == 0:
        return torch.zeros(0, batch_size, dtype=torch.int64)
    seeds = [seed] if isinstance(seed, int) else seed
    first = start * batch_size
    last = (start + steps) * batch_size
    epochs = range(first // size, -(-last // size))
    stream = np.concatenate([np.random.default_rng([*seeds, epoch]).permutation(size) for epoch in epochs])
    offset = epochs.start * size
    return torch.from_numpy(stream[first - offset : last - offset].reshape(steps, batch_size))
