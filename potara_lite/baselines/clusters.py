"""A third model between the federation's and the client's own: FedIT among the clients that are most alike."""

from __future__ import annotations

import time
from typing import Annotated

import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import (
    Adapter,
    Stack,
    adapter_bytes,
    count_clients,
    delta_inner_products,
    repeat_adapter,
    select_clients,
)
from ..checks import Fraction, Named, Numbers, Positive, Size, checked
from ..estimators.combination import estimate_combination
from ..experiment import Method, Result, Run, training_options
from ..federation.split import Split
from ..merging.merge import combine_adapters
from ..training.fedavg import Ledger, fedit


@checked
def similarity(stack: Stack, scaling: Named[Positive]) -> Tensor:
    """The cosine similarity of every two clients' deltas, ``(C, C)`` float64."""
    one_by_one = [select_clients(stack, slice(i, i + 1)) for i in range(count_clients(stack))]
    products = delta_inner_products(one_by_one, scaling)[0]
    length = products.diagonal().sqrt()
    return products / (length.unsqueeze(1) * length)


@checked
def cluster_clients(similar: Annotated[Tensor, Numbers("C C")], clusters: Size) -> Tensor:
    """A label from 0 to ``clusters - 1`` for every client, ``(C,)``, by average linkage of their similarities.

    Clustered federated learning (Sattler et al., 2019) groups clients by the cosine similarity of their updates.
    Raises ``ValueError`` for a matrix that is not square and for more clusters than clients.
    """
    if clusters > len(similar):
        raise ValueError(f"{clusters} clusters of {len(similar)} clients")
    distance = (1 - similar).clamp_min(0).fill_diagonal_(0)
    tree = linkage(squareform(distance.numpy(), checks=False), method="average")
    return torch.from_numpy(cut_tree(tree, clusters)[:, 0]).long()


def train_clusters(adapted: AdaptedBackbone, split: Split, labels: Tensor, **options) -> tuple[Adapter, Ledger]:
    """FedIT in every cluster by itself: each client's cluster model, as a stack, and what it cost.

    ``labels`` ``(C,)``; ``options`` are those of ``fedit``.
    """
    stack = repeat_adapter(adapted.initial, len(split))
    ledger = Ledger.zeros(len(split))
    for label in labels.unique():
        rows = (labels == label).nonzero().squeeze(1)
        found = fedit(adapted, split.rows(rows.tolist()), **options)
        for name, tensor in stack.items():
            tensor[rows] = found.adapter[name]
        cost = {name: int(column[0]) for name, column in vars(found.ledger).items()}  # the same for all of a cluster
        ledger = ledger.add(rows, **cost)
    return stack, ledger


@checked
def three_models(clusters: Size = 2, client_share: Fraction = 0.5, cluster_share: Fraction = 0.5) -> Method:
    """Federated, cluster and local model merged with weights from losses on the calibration examples.

    ``client_share`` is that of ``estimate_combination``. The cluster's model gets ``cluster_share`` of the setting's
    rounds and the federated one the rest, so the optimiser steps and the rounds' bytes are those of
    ``potara-calibrated``; each client sends its local adapter once more, to find the clusters. The mixing weight that
    is reported is the federated model's.
    """

    def method(run: Run) -> Result:
        adapted, federation, setting = run.adapted, run.federation, run.setting
        local, local_ledger, local_seconds = run.pair.local, run.pair.ledgers[1], run.pair.seconds[1]
        began = time.perf_counter()
        labels = cluster_clients(similarity(local, adapted.scaling), clusters)
        options = training_options(setting, setting.federated_lr_scale)
        options |= dict(local_steps=setting.round_steps, seed=run.seed)
        rounds = round(cluster_share * setting.rounds)
        shared = fedit(adapted, federation.train, rounds=setting.rounds - rounds, **options)
        cluster, cluster_ledger = train_clusters(adapted, federation.train, labels, rounds=rounds, **options)
        models = [repeat_adapter(shared.adapter, len(federation)), cluster, local]
        weights, _ = estimate_combination(adapted, models, federation.calibration, client_share=client_share)
        merged = combine_adapters(models, list(weights.T))
        seconds = local_seconds + time.perf_counter() - began
        losses = len(models) * (len(models) + 1) // 2  # at the corners and the middles of the edges
        ledger = (local_ledger + shared.ledger + cluster_ledger).add(
            torch.arange(len(federation)), up=adapter_bytes(adapted.initial) + 4 * losses, down=4 * len(models)
        )
        return Result(adapted, merged, ledger, seconds, weights[:, 0])

    return method
