"""A third model between the federation's and the client's own: FedIT among the clients that are most alike."""

from __future__ import annotations

import time

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from ..adapters.lora import AdaptedBackbone
from ..adapters.state import Adapter, adapter_bytes, delta_inner_products, door, numbers, repeat_adapter, select_clients
from ..checks import fraction, whole
from ..estimators.combination import estimate_combination
from ..experiment import Method, Result, Run, training_options
from ..federation.split import Split
from ..merging.merge import combine_adapters
from ..training.fedavg import Ledger, fedit


@door()
def similarity(stack: Adapter, scaling: dict[str, float]) -> Tensor:
    """The cosine similarity of every two clients' deltas, ``(C, C)`` float64."""
    clients = len(next(iter(stack.values())))
    each = [select_clients(stack, slice(i, i + 1)) for i in range(clients)]
    products = delta_inner_products(each, scaling)[0]
    length = products.diagonal().sqrt()
    return products / (length.unsqueeze(1) * length)


@door(similar=numbers(2), clusters=whole(1))
def cluster_clients(similar: Tensor, clusters: int) -> Tensor:
    """A label from 0 to ``clusters - 1`` for every client, ``(C,)``, by average linkage of their similarities.

    Clustered federated learning (Sattler et al., 2019) groups clients by the cosine similarity of their updates.
    Raises ``ValueError`` for a matrix that is not square and for more clusters than clients.
    """
    if similar.shape != (len(similar), len(similar)):
        raise ValueError(f"similar must have a row and a column per client, not shape {tuple(similar.shape)}")
    if clusters > len(similar):
        raise ValueError(f"{clusters} clusters of {len(similar)} clients")
    distance = (1 - similar).clamp_min(0).fill_diagonal_(0)
    tree = linkage(squareform(distance.numpy(), checks=False), method="average")
    return torch.from_numpy(fcluster(tree, clusters, criterion="maxclust")).long() - 1


def train_clusters(adapted: AdaptedBackbone, split: Split, labels: Tensor, **options) -> tuple[Adapter, Ledger]:
    """FedIT in every cluster by itself: each client's cluster model, as a stack, and what it cost.

    ``labels`` ``(C,)``; ``options`` are those of ``fedit``.
    """
    stack = {name: tensor.clone() for name, tensor in repeat_adapter(adapted.initial, len(split)).items()}
    ledger = Ledger.zeros(len(split))
    for label in labels.unique():
        rows = (labels == label).nonzero().squeeze(1)
        found = fedit(adapted, split.rows(rows.tolist()), **options)
        for name, tensor in stack.items():
            tensor[rows] = found.adapter[name]
        cost = {name: int(each[0]) for name, each in vars(found.ledger).items()}  # the same for all of a cluster
        ledger = ledger.add(rows, **cost)
    return stack, ledger


@door(clusters=whole(1), own=fraction, share=fraction)
def three_models(clusters: int = 2, own: float = 0.5, share: float = 0.5) -> Method:
    """Federated, cluster and local model merged with weights from held-out losses (``estimate_combination``).

    The cluster's model has ``share`` of the setting's rounds and the federated one the rest, so the optimiser steps and
    the rounds' bytes are those of ``potara-calibrated``; each client sends its local adapter once more, by which
    clusters are found. The mixing weight that is reported is the federated model's.
    """

    def method(run: Run) -> Result:
        adapted, federation, setting = run.adapted, run.federation, run.setting
        local, clients, began = run.pair.local, len(federation), time.perf_counter()
        labels = cluster_clients(similarity(local, adapted.scaling), clusters)
        rounds = round(share * setting.rounds)
        options = training_options(setting, setting.federated_lr_scale)
        options |= dict(local_steps=setting.round_steps, seed=run.seed)
        shared = fedit(adapted, federation.train, rounds=setting.rounds - rounds, **options)
        cluster, more = train_clusters(adapted, federation.train, labels, rounds=rounds, **options)
        models = [repeat_adapter(shared.adapter, clients), cluster, local]
        weights, _ = estimate_combination(adapted, models, federation.calibration, own=own)
        upload, floats = adapter_bytes(adapted.initial), len(models) * (len(models) + 1) // 2
        ledger = run.pair.ledgers[1] + shared.ledger + more
        ledger = ledger.add(torch.arange(clients), up=upload + 4 * floats, down=4 * len(models))
        merged = combine_adapters(models, list(weights.T))
        seconds = run.pair.seconds[1] + time.perf_counter() - began
        return Result(adapted, merged, ledger, seconds, weights[:, 0])

    return method
