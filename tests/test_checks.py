"""The checks of arguments: every public function against bad input, argument by argument, and what is taken."""

import importlib
import json
import pydoc
import re
import warnings
from functools import cache
from inspect import isfunction, signature
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import changed_split, tiny_federation, tiny_vit
from hypothesis import given, settings, strategies as st
from matplotlib.figure import Figure
from test_project import FILES, module_name
from test_results import ROOT, script
from torch.utils.data import TensorDataset

import potara_lite
from potara_lite import checks as library, estimators, fedit, next_tokens
from potara_lite.adapters import state
from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import client_adapter, repeat_adapter
from potara_lite.baselines.merges import layer_grams, merge_deltas
from potara_lite.baselines.privacy import with_noise
from potara_lite.checks import BOUNDS, Count, Positive, Seed, checked, shown
from potara_lite.estimators import Estimate
from potara_lite.experiment import initial_adapter, prepare
from potara_lite.federation.split import Split
from potara_lite.federation.tasks import Question
from potara_lite.setting import Setting
from potara_lite.training.history import history_table
from potara_lite.training.train import OptimizerState

NAN, INF = float("nan"), float("inf")
TINY = Setting(clients=3, train_size=8, calibration_size=4, test_size=8, rounds=1, round_steps=1, local_steps=1)


# What the calls are made of.


class Letters:
    """A tokenizer of letters."""

    eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [1 + ord(letter) % 30 for letter in text]}

    def decode(self, tokens):
        return "".join(chr(97 + token) for token in tokens)


LETTERS = Letters()


class Columns:
    """What a data set of Hugging Face's is asked for."""

    def __init__(self, table):
        self.table, self.column_names = table, list(table)
        self.features = dict.fromkeys(table, SimpleNamespace())

    def __len__(self):
        return len(self.table)

    def __getitem__(self, column):
        return self.table[column].tolist()

    def with_format(self, _):
        return self

    def select(self, rows):
        return Columns(self.table.iloc[rows])

    def select_columns(self, columns):
        return Columns(self.table[columns])

    def to_pandas(self):
        return self.table


class Speaker(torch.nn.Module):
    """A language model of one layer."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = torch.nn.Embedding(40, 8), torch.nn.Linear(8, 40)

    def forward(self, input_ids, attention_mask):
        return self.out(self.embedding(input_ids))


def random_like(adapter, clients, seed, scale=0.2):
    generator = torch.Generator().manual_seed(seed)
    shape = (clients,) if clients else ()
    return {name: scale * torch.randn(*shape, *t.shape, generator=generator) for name, t in adapter.items()}


@cache
def things():
    """A tiny backbone, three clients and everything that public functions ask for besides."""
    from potara_lite.baselines.algorithms import FEDIT
    from potara_lite.baselines.privacy import Privacy
    from potara_lite.estimators.moments import Moments
    from potara_lite.experiment import ModelPair, Result, Run

    t = SimpleNamespace(backbone=tiny_vit(), federation=tiny_federation(torch.float32))
    t.adapted, t.split = attach(t.backbone, rank=2, alpha=3), t.federation.calibration
    t.one, t.federated, t.local = (random_like(t.adapted.initial, n, seed) for n, seed in ((0, 0), (3, 1), (3, 2)))
    t.small = client_adapter({name: tensor.clone() for name, tensor in t.local.items()}, 0)
    t.gradients = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    t.sizes, t.grid = torch.tensor([3, 6, 4]), torch.linspace(0, 1, 3)
    t.losses = torch.rand(3, 3, 6, generator=torch.Generator().manual_seed(1))
    t.flat = torch.cat([tensor.flatten(1) for tensor in t.local.values()], 1)
    t.pool = torch.rand(60, 1, 28, 28), torch.arange(60) % 4
    numbers = Split([(torch.arange(3), torch.arange(3))] * 2)
    t.numbers = potara_lite.Federation(numbers, numbers, numbers, 4)
    t.ledger = potara_lite.Ledger.zeros(3)
    t.pair = ModelPair(t.federated, t.local, (t.ledger, t.ledger), (0.0, 0.0))
    t.run, t.result = Run(t.adapted, t.federation, TINY, 0), Result(t.adapted, t.local, t.ledger, 0.0)
    t.grams = {layer: torch.eye(16).repeat(3, 1, 1) for layer in t.adapted.scaling if not layer.endswith("fc2")}
    t.moments, t.privacy, t.fedit = Moments([1.0, 2.0], [2.0, 1.0], [0.0, 0.5]), Privacy(1.0, 1.0, 0), FEDIT
    t.speaker = attach(Speaker(), targets=["out"], head=None, rank=2)
    t.voices = repeat_adapter(t.speaker.initial, 2)
    t.questions = [[Question("is it", "yes", ("yes", "no"))]] * 2
    t.folder = potara_lite.save_adapter(t.adapted, t.one, mkdtemp())
    t.folder_2 = potara_lite.save_adapter(t.adapted, t.small, mkdtemp())
    t.task = Path(mkdtemp()) / "task.jsonl"
    t.task.write_text('{"question": "is it", "passage": "It is.", "answer": true}')
    t.table = pd.DataFrame({"age": range(8), "sick": ["no", "yes"] * 4, "ward": list("AABB") * 2})
    t.dataset = TensorDataset(torch.rand(8, 2), torch.arange(8) % 2)
    t.columns = Columns(t.table)
    t.rows = pd.DataFrame(
        [(f, m, s, c, 0.5 + 0.1 * c + 0.05 * s, 1.0 + c, 0.5, 1, 1, 1, 1.0, 0.4, 2.0)
         for f in ("one",) for m in ("local", "other") for s in (0, 1) for c in (0, 1)],
        columns="federation method seed client accuracy loss weight bytes_up bytes_down steps seconds union_accuracy "
                "union_loss".split(),
    )  # fmt: skip
    t.curves, t.chosen, t.numbered = t.losses[..., 0], {"uniform": t.losses[:, 0, 0]}, torch.arange(18).view(3, 6) % 2
    t.points, t.board = potara_lite.summary(t.rows.drop(columns="federation")), potara_lite.leaderboard(t.rows)
    t.front = potara_lite.results.pareto_front(t.board)
    t.differences = potara_lite.paired_differences(t.rows, "local")
    t.history = history_table([0, 1, 2], [dict(step=1, train_loss=1.0, loss=1.0, accuracy=0.5)])
    return t


def curves(t):
    return dict(weights=t.grid, values=t.curves)


def axes(panels):
    return list(Figure().subplots(1, panels, squeeze=False).flat)


@cache
def course():
    from potara_lite.results import committed_rows

    return committed_rows("course.csv").query("alpha == 0.5 and seed == 0")


def merged_pair(t):
    return dict(federated=t.federated, local=t.local)


def estimated(t):
    return dict(adapted=t.adapted, federated=t.federated, local=t.local, split=t.split)


def gradients(t):
    return dict(g_f=t.gradients, g_l=t.gradients.flip(1), sizes=t.sizes)


def run(t):
    return dict(adapted=t.adapted, adapters=t.local, split=t.split)


def spoken(t):
    return dict(adapted=t.speaker, adapters=t.voices)


# A call of every public function that is right: a function of ``things()`` to its arguments.

CALLS = {
    "federation.batches.batch_indices": lambda t: dict(size=5, start=0, steps=2, batch_size=2, seed=0),
    "federation.partition.dirichlet_proportions":
        lambda t: dict(clients=2, classes=3, alpha=1.0, rng=np.random.default_rng(0)),
    "federation.partition.shift_images": lambda t: dict(x=t.pool[0], client=1, clients=2),
    "federation.partition.partition": lambda t: dict(
        pool=t.pool, test_pool=t.pool, classes=4, proportions=np.full((2, 4), 0.25), clients=2,
        train_size=3, calibration_size=2, test_size=2, alpha=INF,
        shift=False, seed=0, name="x",
    ),
    "federation.sources.fashion_mnist":
        lambda t: dict(clients=2, train_size=2, calibration_size=2, test_size=2, alpha=1.0, seed=0),
    "federation.sources.from_torchvision":
        lambda t: dict(dataset="CIFAR10", root="nowhere", download=False, clients=2, alpha=1.0),
    "federation.sources.from_tensors": lambda t: dict(
        train=[t.split.client(i) for i in range(3)], test=[t.split.client(i) for i in range(3)], calibration_size=1,
        test_size=1, classes=4, class_names=list("abcd"), seed=0, name="x",
    ),
    "federation.sources.from_dataframe": lambda t: dict(
        df=t.table, client="ward", label="sick", features=["age"], test=t.table, test_size=0.2, calibration_size=1,
        seed=0, name="x", real_targets=False,
    ),
    "federation.sources.from_datasets": lambda t: dict(
        train=[t.dataset] * 2, test=[t.dataset] * 2, test_size=0.2, calibration_size=1, classes=2, seed=0, name="x"
    ),
    "federation.huggingface.from_huggingface": lambda t: dict(
        ds=t.columns, client="ward", label="sick", text=None, tokenizer=None, max_length=8, features=["age"],
        test_size=0.2, calibration_size=1, seed=0, name="x",
    ),
    "models.vit.lab_vit": lambda t: dict(classes=4, checkpoint=None),
    "models.vit.torchvision_vit": lambda t: dict(name="vit_b_32", classes=4, weights=None),
    "models.language.text_encoder": lambda t: dict(name_or_path="nowhere", classes=4),
    "models.language.causal_lm": lambda t: dict(name_or_path="nowhere"),
    "models.language.text_tokenizer": lambda t: dict(name_or_path="nowhere"),
    "models.language.sequence_classifier": lambda t: dict(name_or_path="nowhere", classes=3, given=["head.weight"]),
    "estimators.folders.merge_folders": lambda t: dict(
        base=t.backbone, federated=t.folder, local=t.folder_2, examples=t.split.client(1), weight=0.5, rank=2, out=None,
        folds=2,
    ),
    "estimators.folders.combine_folders": lambda t: dict(
        base=t.backbone, folders=[t.folder, t.folder_2], examples=t.split.client(1), weights=[0.5, -1.0], rank=2,
        out=mkdtemp(), folds=2,
    ),
    "federation.text.pad_tokens": lambda t: dict(rows=[[1, 2], [3]]),
    "federation.text.encode_texts": lambda t: dict(tokenizer=Letters(), texts=["a b", "c"], max_length=8),
    "federation.text.encode_answers": lambda t: dict(
        tokenizer=Letters(), prompts=["a"], answers=[" b"], max_length=8, end=True
    ),
    "federation.tasks.with_tokens":
        lambda t: dict(federation=t.numbers, texts=["a", "b", "c"], tokenizer=LETTERS, longest=4),
    "federation.tasks.domain_proportions": lambda t: dict(names=["animal", "act", "shape"], clients=2),
    "federation.tasks.wordnet_glosses":
        lambda t: dict(tokenizer=Letters(), longest=4, domains=False, clients=2, test_size=4),
        "models.frozen_trunk.linear_layers": lambda t: dict(network=t.backbone, last=1),
    "adapters.lora.attach": lambda t: dict(
        backbone=t.backbone, rank=2, alpha=3.0, targets=["fc1"], head="head", seed=0, config=None,
        task="classification",
    ),
    "adapters.files.save_adapter": lambda t: dict(adapted=t.adapted, adapter=t.one, folder=mkdtemp()),
    "adapters.files.save_adapters":
        lambda t: dict(adapted=t.adapted, stack=t.local, folder=mkdtemp(), names=list("abc")),
    "adapters.files.export_merged": lambda t: dict(base=t.adapted, adapter=t.one, folder=mkdtemp()),
    "adapters.files.load_adapter": lambda t: dict(adapted=t.adapted, folder=t.folder),
    "federation.tasks.read_task": lambda t: dict(path=t.task, seed=0),
    "adapters.state.delta": lambda t: dict(adapter=t.one, scaling=t.adapted.scaling),
    "adapters.state.delta_inner_products": lambda t: dict(adapters=[t.local, t.federated], scaling=t.adapted.scaling),
    "adapters.state.stack_adapters": lambda t: dict(adapters=[t.one, t.small]),
    "adapters.state.cut_ranks": lambda t: dict(stack=t.local, ranks=[1, 2, 2]),
    "adapters.state.repeat_adapter": lambda t: dict(adapter=t.one, clients=2),
    "adapters.state.client_adapter": lambda t: dict(stack=t.local, client=1),
    "adapters.state.adapter_bytes": lambda t: dict(adapter=t.one),
    "merging.merge.combine_adapters": lambda t: dict(adapters=[t.local, t.federated], weights=[0.5, -1.0]),
    "merging.merge.merge_exact": lambda t: merged_pair(t) | dict(weight=0.5),
    "merging.merge.merge_factors": lambda t: merged_pair(t) | dict(weight=torch.tensor([0.1, 0.5, 1.0])),
    "merging.merge.change_basis": lambda t: dict(adapter=t.one, matrix=torch.tensor([[0.0, 1.0], [1.0, 0.0]])),
    "merging.merge.compress": lambda t: dict(adapter=t.one, rank=1, balanced=True),
    "estimators.moments.combination_weights":
        lambda t: dict(moments=torch.tensor([[2.0, 0.0], [0.0, 1.0]]), nonnegative=True),
    "training.fedavg.weighted_average": lambda t: dict(stack=t.local, weights=t.sizes),
    "training.fedavg.participants": lambda t: dict(ids=[0, 1, 2], participation=0.5, seed=0, number=0),
    "training.fedavg.fedit": lambda t: dict(
        adapted=t.adapted, split=t.split, rounds=1, local_steps=1, participation=1.0, keep_optimizer=True,
        adapter=t.one, start=0, state=short_state(3, 452), seed=0, progress=False, lr=0.01, batch_size=2,
        eval_split=t.federation.test, eval_every=1, callbacks=[], ranks=[1, 2, 2], checkpoint=None,
    ),
    "training.checkpoint.save_state":
        lambda t: dict(path=t.task.with_name("state"), adapter=t.local, state=short_state(3, 452), start=1),
    "training.checkpoint.load_state": lambda t: dict(path=potara_lite.save_state(
        t.task.with_name("saved"), t.one, short_state(3, 452))),
    "training.train.train": lambda t: run(t) | dict(
        steps=1, batch_size=2, lr=0.01, weight_decay=0.0, clip=1.0, seed=0, start=0, state=None, loss=plain,
        execution=potara_lite.Execution(), progress=False, eval_split=t.federation.test, eval_every=1, callbacks=[],
    ),
    "training.train.epoch_steps": lambda t: dict(split=t.split, epochs=1.0, batch_size=2),
    "training.train.evaluate": lambda t: run(t) | dict(batch_size=4, execution=potara_lite.Execution()),
    "training.gradients.per_sample_gradients": lambda t: run(t) | dict(
        labels=t.split.y, execution=potara_lite.Execution()
    ),
    "training.gradients.delta_gradients": lambda t: run(t) | dict(labels=t.split.y),
    "training.gradients.diagonal_fisher": lambda t: dict(gradients=t.gradients, sizes=t.sizes),
    "training.gradients.directional_derivatives": lambda t: run(t) | dict(
        direction=t.flat, execution=potara_lite.Execution()
    ),
    "training.scoring.log_likelihoods": lambda t: run(t) | dict(batch_size=4, execution=potara_lite.Execution()),
    "training.scoring.multiple_choice":
        lambda t: spoken(t) | dict(questions=t.questions, tokenizer=Letters(), max_length=16),
    "training.scoring.greedy_tokens": lambda t: spoken(t) | dict(
        prompts=[{"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 1]])}] * 2, steps=1, end=0,
        batch_size=2, execution=potara_lite.Execution(),
    ),
    "training.scoring.write_answers": lambda t: spoken(t) | dict(
        prompts=[["ab"], ["b"]], tokenizer=Letters(), steps=1, until="!", max_length=8
    ),
    "training.scoring.exact_match": lambda t: dict(found=["a"], expected=[["a", "b"]]),
    "merging.connectivity.weight_grid": lambda t: dict(points=3),
    "merging.connectivity.along_segment": lambda t: estimated(t) | dict(
        weights=t.grid, merge=potara_lite.merge_exact, batch_size=4
    ),
    "merging.connectivity.barrier": lambda t: dict(loss=t.losses[..., 0], weights=t.grid),
    "merging.connectivity.along_plane": lambda t: estimated(t) | dict(x=[0.0, 1.0], y=[0.5], batch_size=4),
    "estimators.calibrated.estimate_calibrated": estimated,
    "estimators.calibrated.estimate_pooled": lambda t: estimated(t) | dict(
        points=3, step=0.3, by=estimators.head_and_body
    ),
    "estimators.calibrated.pooled_weight": lambda t: dict(
        weights=t.grid, losses=t.losses, sizes=t.sizes, tau=0.1, sigma=0.3
    ),
    "estimators.calibrated.pooled_offset": lambda t: dict(
        low=t.losses[0], middle=t.losses[1], high=t.losses[2], sizes=t.sizes, step=0.3, tau=0.2
    ),
    "estimators.estimate.estimate_uniform": estimated,
    "estimators.gauss_newton.moments_from_slopes": lambda t: dict(
        at_local=torch.tensor([-1.0, 0.0]), curvature=torch.tensor([1.0, 2.0])
    ),
    "estimators.gauss_newton.estimate_gauss_newton": lambda t: estimated(t) | dict(by=None),
    "estimators.combination.estimate_combination": lambda t: dict(
        adapted=t.adapted, models=[t.local, t.federated], split=t.split, client_share=0.5
    ),
    "estimators.curve.estimate_curve": lambda t: estimated(t) | dict(points=3, parabola=True),
    "estimators.curve.parabola_moments": lambda t: dict(weights=t.grid, loss=t.losses[..., 0]),
    "estimators.curve.client_losses": run,
    "estimators.curve.segment_losses": lambda t: estimated(t) | dict(weights=t.grid),
    "estimators.curve.client_logits": run,
    "estimators.ensemble.estimate_ensemble": lambda t: dict(
        adapted=t.adapted, runs=[(t.federated, t.local)], optimum=t.federated, split=t.split
    ),
    "estimators.alternatives.gradient_moments": lambda t: gradients(t) | dict(
        unbiased=True, damping=0.1, cross_fit=False, groups=None
    ),
    "estimators.alternatives.estimate_gradient": lambda t: estimated(t) | dict(
        unbiased=True, damping=0.1, cross_fit=False, by=None
    ),
    "estimators.alternatives.laplace_moments": lambda t: gradients(t) | dict(
        examples=(t.sizes, t.sizes), prior=1.0, clip=(0.0, 1.0), groups=torch.tensor([0, 0, 1, 1, 0])
    ),
    "estimators.alternatives.estimate_laplace": lambda t: estimated(t) | dict(
        train_sizes=torch.tensor([5, 13, 9]), prior=1.0, by=None
    ),
    "estimators.paper.fisher_moments": lambda t: gradients(t) | dict(
        damping=0.1, relative=True, clip=(0.0, 1.0), groups=None
    ),
    "estimators.paper.fisher_diagonals": gradients,
    "estimators.paper.estimate_paper": lambda t: estimated(t) | dict(
        damping=0.1, relative=True, clip=(0.0, 1.0), sample_labels=0, on_delta=False, by=None
    ),
    "estimators.alternatives.shrinkage_moments": lambda t: dict(
        variance=torch.tensor([1.0, 2.0]), distance=torch.tensor([2.0, 1.0])
    ),
    "estimators.alternatives.estimate_shrinkage": lambda t: estimated(t) | dict(
        train_sizes=torch.tensor([5, 13, 9]), damping=0.1
    ),
    "experiment.prepare": lambda t: dict(setting=TINY, seed=0),
    "experiment.prepare_images": lambda t: dict(setting=TINY, seed=0),
    "experiment.prepare_text": lambda t: dict(setting=TINY, seed=0),
    "experiment.training_options": lambda t: dict(setting=TINY, lr_scale=2.0),
    "experiment.train_pair": lambda t: dict(
        adapted=t.adapted, federation=t.federation, setting=TINY, seed=0, progress=False,
        eval_split=t.federation.test, eval_every=1, callbacks=[],
    ),
    "experiment.train_local": lambda t: dict(
        adapted=t.adapted, start=t.local, federation=t.federation, setting=TINY, seed=0, progress=False
    ),
    "experiment.local_from_federated": lambda t: dict(lr_scale=1.0),
    "experiment.merging": lambda t: dict(merge=len, model_pair=len),
    "experiment.with_estimator": lambda t: dict(estimator=potara_lite.estimate_uniform, merge=len, model_pair=len),
    "experiment.oracle_weight": lambda t: dict(weights=t.grid, loss=t.losses[..., 0]),
    "experiment.run_methods": lambda t: dict(setting=TINY, seeds=[0], methods={"x": len}, prepare=len, progress=False),
    "results.result_rows": lambda t: dict(method="x", run=t.run, result=t.result, split=t.split),
    "results.compare": lambda t: dict(
        setting=TINY, seeds=[0], methods={"x": initial_adapter}, prepare=prepare, progress=False
    ),
    "results.summary": lambda t: dict(rows=t.rows),
    "results.leaderboard": lambda t: dict(rows=t.rows, local="local"),
    "results.pareto_front": lambda t: dict(board=potara_lite.leaderboard(t.rows), references=()),
    "results.paired_differences": lambda t: dict(rows=t.rows, method="local", score="loss"),
    "baselines.privacy.private_average": lambda t: dict(uploads=t.local, sent=t.one, privacy=t.privacy, number=0),
    "baselines.privacy.epsilon": lambda t: dict(noise_multiplier=1.0, rounds=2, delta=1e-5),
    "baselines.privacy.noise_multiplier_for": lambda t: dict(target=8.0, rounds=2, delta=1e-5),
    "baselines.privacy.noise_moment": lambda t: dict(adapter=t.one, scaling=t.adapted.scaling, std=0.1, noisy=bool),
    "baselines.privacy.with_noise": lambda t: dict(moments=t.moments, variance=1.0),
    "baselines.rounds.run_algorithm": lambda t: dict(
        eval_split=t.federation.test, eval_every=1, callbacks=[],
        algorithm=t.fedit, adapted=t.adapted, split=t.split, rounds=1, local_steps=1, participation=1.0, seed=0,
        progress=False, lr=0.01, batch_size=2,
    ),
    "baselines.algorithms.fedprox": lambda t: dict(mu=0.1),
    "baselines.algorithms.finetuned": lambda t: dict(algorithm=t.fedit, steps=1),
    "baselines.algorithms.wise_ft": lambda t: dict(algorithm=t.fedit, steps=1, weight=0.5),
    "baselines.algorithms.flexlora": lambda t: dict(ranks=[1, 2]),
    "baselines.algorithms.fedrep": lambda t: dict(head_share=0.5),
    "baselines.algorithms.ditto": lambda t: dict(strength=0.1),
    "baselines.algorithms.apfl": lambda t: dict(weight=0.5, adaptive=True),
    "baselines.algorithms.feddpa": lambda t: dict(weight=0.5),
    "baselines.algorithms.gated": lambda t: dict(adapted=t.adapted),
    "baselines.merges.task_arithmetic": lambda t: dict(models=[t.federated, t.local], coefficient=0.5),
    "baselines.merges.fisher_merge": lambda t: dict(
        models=[t.federated, t.local], fishers=[t.flat.square(), t.flat.square()]
    ),
    "baselines.merges.model_fisher": lambda t: run(t) | dict(seed=0),
    "baselines.merges.layer_grams": lambda t: run(t) | dict(batch_size=4),
    "baselines.merges.regmean": lambda t: dict(
        models=[t.federated, t.local], grams=[t.grams] * 2, off_diagonal=0.9
    ),
    "baselines.merges.merge_deltas": lambda t: dict(
        models=[t.federated, t.local], scaling=t.adapted.scaling, function=lambda vectors: vectors.mean(0)
    ),
    "baselines.merges.ties": lambda t: dict(vectors=t.gradients, density=0.5, coefficient=1.0),
    "baselines.merges.dare": lambda t: dict(vectors=t.gradients, drop=0.5, seed=0),
    "baselines.methods.finetuned_after": lambda t: dict(algorithm=t.fedit, lr_scale=1.0, rounds_scale=1.0),
    "baselines.methods.from_algorithm": lambda t: dict(algorithm=t.fedit, lr_scale=1.0),
    "baselines.methods.wise_ft": lambda t: dict(weight=0.5, lr_scale=1.0, rounds_scale=1.0),
    "baselines.methods.local_training": lambda t: dict(lr_scale=1.0),
    "baselines.methods.merging_entries": lambda t: dict(function=len),
    "baselines.clusters.similarity": lambda t: dict(stack=t.local, scaling=t.adapted.scaling),
    "baselines.clusters.cluster_clients": lambda t: dict(similar=torch.eye(3).double(), clusters=2),
    "baselines.clusters.three_models": lambda t: dict(clusters=2, client_share=0.5, cluster_share=0.5),
    "baselines.sweep.union": lambda t: dict(split=t.split, per_client=2),
    "baselines.sweep.sweep": lambda t: dict(
        methods={"x": len}, settings={"x": TINY}, seeds=[0], folder="nowhere", eval_split=len, union_size=2,
        eval_every=1,
        prepare=len, shard=(0, 1), progress=False,
    ),
    "baselines.sweep.read_results": lambda t: dict(folder="nowhere"),
    "baselines.sweep.read_histories": lambda t: dict(folder="nowhere"),
    "results.committed_rows": lambda t: dict(name="bound.csv"),
    "plots.label_counts": lambda t: dict(split=t.split, names=list("abcd"), client_names=list("xyz"), ax=axes(1)[0]),
    "plots.along_weight": lambda t: curves(t) | dict(
        chosen=t.chosen, label="x", also={"x": t.curves}, names=list("xyz"), ax=axes(3)
    ),
    "plots.learning_curves": lambda t: dict(history=t.history, measure="loss", ax=axes(1)[0]),
    "plots.weights": lambda t: dict(
        estimates={"x": Estimate(t.chosen["uniform"])}, oracle=t.chosen["uniform"], names=list("xyz"), ax=axes(1)[0]
    ),
    "plots.paired_differences": lambda t: dict(differences=t.differences, label="loss", ax=axes(1)[0]),
    "plots.frontier": lambda t: dict(points=t.points, ax=axes(1)[0]),
    "plots.frontiers": lambda t: dict(board=t.board, front=t.front, highlight="local", references=(), ax=axes(1)),
    "plots.overview": lambda t: dict(
        weights=t.grid, loss=t.curves, accuracy=t.curves, chosen={"oracle": (t.curves[0],) * 3}, points=t.points
    ),
    "course.widgets.weight_slider": lambda t: dict(
        weights=t.grid, loss=t.curves, accuracy=t.curves, chosen=t.chosen
    ),
    "course.explorers.heterogeneity_explorer": lambda t: dict(
        alphas=[0.1, INF], splits=[t.split] * 2, names=list("abcd")
    ),
    "course.explorers.basis_explorer": lambda t: dict(
        degrees=t.grid, loss=t.curves, accuracy=t.curves, level_loss=t.curves[0], level_accuracy=t.curves[0]
    ),
    "course.bound_explorer.bound_explorer": lambda t: dict(a=1.0, b=1.0, rho=0.0),
    "course.estimator_explorer.loss_along": lambda t: dict(rows=course()),
    "course.estimator_explorer.estimator_explorer": lambda t: dict(rows=course()),
    "course.seeds_explorer.seeds_explorer": lambda t: dict(
        scores=pd.DataFrame({0: [0.8, 0.7], 1: [0.6, 0.7]}, index=["a", "b"]), chosen=1
    ),
    "course.convex_head.head_inputs": lambda t: dict(features=t.gradients),
    "course.convex_head.draw_sample": lambda t: dict(x=t.gradients, y=t.numbered, size=2, seed=0),
    "course.convex_head.fit_heads": lambda t: dict(
        x=t.gradients.double(), y=t.numbered, classes=2, ridge=0.5, tolerance=1e-3
    ),
    "course.convex_head.head_smoothness": lambda t: dict(x=t.gradients.double(), ridge=0.5),
}  # fmt: skip
NOT_RUN = {  # right, but slow, in need of a download or of more than a tiny stub
    "federation.sources.from_torchvision", "models.language.text_encoder", "models.language.causal_lm",
    "models.language.text_tokenizer", "models.language.sequence_classifier",
    "experiment.prepare_text", "experiment.run_methods",
    "models.vit.torchvision_vit", "training.scoring.log_likelihoods", "baselines.privacy.epsilon",
    "baselines.privacy.noise_multiplier_for", "baselines.sweep.sweep",
}  # fmt: skip


def plain(logits, y):
    return torch.nn.functional.cross_entropy(logits, y)


# What is wrong for an argument of each name: values, or (function of the right value, what the message says of it).

WHOLE = [-1, 1.5, "2", True, NAN, 1j]
SIZE = [0, *WHOLE]
NUMBER = [NAN, "x", True, 1j, [1.0], 1e308, 1e-308]  # the last two are infinite and 0 in float32
FLAG = [1, 0, "yes", NAN, None, (lambda v: torch.tensor(True), "tensor(True)")]
TEXT, PATH, FUNCTION = [5, 1.5, None, b"x"], [5, 1.5, True, None], [5, "x", None]


def entry(change, of=-1):
    """A change of one tensor of an adapter."""

    def make(adapter):
        name = list(adapter)[of]
        return {**adapter, name: change(adapter[name])}

    return make


ADAPTER = [
    (lambda v: 5, "int"),
    (lambda v: "x", "str"),
    (lambda v: {}, "an empty one"),
    (lambda v: list(v), "list"),
    (entry(lambda t: t.tolist()), "must be a"),
    (entry(lambda t: t * NAN, 1), "lora_B"),
    (entry(lambda t: t + INF), "head.bias"),
    (entry(lambda t: t.to(torch.int32)), "torch.int32"),
    (entry(lambda t: t > 0), "torch.bool"),
    (entry(lambda t: t.to(torch.complex64)), "torch.complex64"),
    (entry(lambda t: t.to(torch.float8_e4m3fn)), "torch.float8_e4m3fn"),
    (entry(lambda t: t.to("meta")), "meta"),
    (entry(lambda t: t.to_sparse()), "sparse"),
    (lambda v: pd.Series([1.0]), "Series"),
    (lambda v: dict(enumerate(v.values())), "dict"),
]  # fmt: skip
STACK = [
    *ADAPTER,
    (lambda v: client_adapter(v, 0), "not one adapter"),
    (lambda v: {n: t[:2] for n, t in v.items()}, "2 adapters for 3 clients"),
    (entry(lambda t: t[:2]), "[2, 3]"),
    (lambda v: {n: t[:0] for n, t in v.items()}, "[0]"),
    (entry(lambda t: t[0], 0), "dim 0 of all its tensors"),
    (lambda v: {n: t for n, t in v.items() if "bias" not in n}, "head.bias"),
    (lambda v: v | {"other": torch.zeros(3, 2)}, "'other'"),
    (entry(lambda t: t[..., :-1], 0), "expected ('C', "),
    (entry(lambda t: t[:, :-1], 0), "1 in A, 2 in B"),
]
MODEL = [  # of a merge
    *ADAPTER,
    (lambda v: dict(list(v.items())[1:]), "two factors"),
    (entry(lambda t: t.double(), 0), "one dtype"),
    (entry(lambda t: t[:, :1], 0), "one rank"),
    (lambda v: {n: t[:2] for n, t in v.items()}, "adapters for "),
    (lambda v: {n: t for n, t in v.items() if "bias" not in n}, "head.bias"),
    (lambda v: client_adapter(v, 0), "has shape ("),
]
LAMBDA = [
    NAN, INF, 7, -0.5, 1j, "x", True, None,
    (lambda v: [0.5, 0.5], "2 weights for a stack of 3"),
    (lambda v: torch.full((3, 1), 0.5), "(3, 1)"),
    (lambda v: torch.tensor([0.5, 0.5, 1.5]), "1.5"),
    (lambda v: [0.1, NAN, 0.2], "finite"),
    (lambda v: np.array(["a", "b", "c"]), "ndarray"),
    (lambda v: dict.fromkeys([*layers(), "other"], 0.5), "no layer 'other'"),
    (lambda v: dict.fromkeys(layers()[1:], 0.5), f"'{'base_model'}"),
    (lambda v: dict.fromkeys(layers(), 2.0), "2.0"),
]  # fmt: skip


def layers():
    return sorted({name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for name in things().one})


def tensor(*more):
    return [
        "x", None, 1j,
        (lambda v: torch.as_tensor(v) * NAN, "finite"),
        (lambda v: torch.as_tensor(v) > 0, "bool"),
        (lambda v: torch.as_tensor(v).to("meta"), "all of them there"),
        (lambda v: torch.as_tensor(v).float().reshape(-1).to_sparse(), "all of them there"),
        (lambda v: torch.as_tensor(v).to(torch.complex64), "complex64"),
        (lambda v: torch.as_tensor(v)[:0], "0"),
        (lambda v: torch.as_tensor(v).expand(1, 1, 1, 1, *torch.as_tensor(v).shape), "(1, 1, 1, 1, "),
        *more,
    ]  # fmt: skip


COUNTED = [(lambda v: v[:2], "C = 3"), (lambda v: v * 0, "not 0"), (lambda v: v * 1.0, "float32")]
ROWS = [
    5, None,
    (lambda v: v.iloc[:0], "(0, "),
    (lambda v: v.drop(columns="seed"), "'seed'"),
    (lambda v: v.drop(columns="accuracy"), "'accuracy'"),
    (lambda v: v.assign(loss=NAN), "missing"),
    (lambda v: v.assign(accuracy=INF), "missing"),
    (lambda v: v.assign(accuracy="x"), "numbers in the column 'accuracy'"),
    (lambda v: v.assign(loss=[[]] * len(v)), "numbers in the column 'loss'"),
    (lambda v: pd.concat([v, v.iloc[:1]]), "once"),
]  # fmt: skip

BAD = {
    "steps rounds local_steps start number client end": WHOLE,
    "clients rank batch_size classes max_length longest size calibration_size test_size union_size per_client": SIZE,
    "last": [0, 99, 1.5, "x"],
    "points": [1, -1, 2.5, "9", NAN, None],
    "train_size": [*SIZE, (lambda v: [3, 0], "train_size[1] must be at least 1, not 0"), (lambda v: [3], "1 clients")],
    "seed sample_labels": [-1, 0.5, "0", True, 2**64],
    "lr lr_scale tau step sigma": [-0.1, 0, INF, *NUMBER],
    "alpha sigma target": [-1, 0, *NUMBER],
    "ridge tolerance weight_decay damping prior mu strength rounds_scale noise_multiplier std": [-0.1, INF, *NUMBER],
    "head_share off_diagonal share_of client_share cluster_share": [-0.1, 1.5, *NUMBER],
    "participation density": [0, -0.5, 1.5, *NUMBER],
    "drop": [1, -0.1, *NUMBER],
    "delta": [0, 1, -1, *NUMBER],
    "coefficient": [INF, *NUMBER],
    "variance": [-0.1, INF, NAN, "x", True, 1j],
    "balanced shift domains keep_optimizer progress unbiased cross_fit relative on_delta parabola download nonnegative "
    "adaptive": FLAG,
    "name method score dataset until label highlight": [5, 1.5, None, b"x"],
    "head": [5, "haed"],
    "targets": [5, (lambda v: "nope", "nope"), (lambda v: [], "list"), (lambda v: ["fc1", "nope"], "nope"),
                (lambda v: [3], "3")],
    "folder root name_or_path checkpoint path out": PATH,
    "saved_state": [(lambda v: 5, "int"), (lambda v: "x", "str"), (lambda v: {}, "dictionary of tensors"),
                    (entry(lambda t: t * NAN), "finite")],
    "exported": [(lambda v: 5, "int"), (lambda v: {}, "dictionary of tensors"), (entry(lambda t: t * NAN), "finite"),
                 (lambda v: dict(list(v.items())[1:]), "must be of this base")],
    "adapted_or_base": [None, "net", 5],
    "folder_names": [5, "abc", (lambda v: v[:2], "2 of them for 3 clients"), (lambda v: ["a", "A", "b"], "differ"),
                     *((lambda v, odd=odd: [odd, "a", "b"], repr(odd))
                       for odd in ("", "..", "a/b", "a\\b", "a ", "\0"))],
    "whole_stack": [*ADAPTER, *(bad for bad in STACK if bad not in ADAPTER and "for 3 clients" not in bad[1])],
    "any_state": [5, None, (lambda v: vars(v), "dict")],
    "some_folder": [*PATH, (lambda v: things().folder if v == things().folder_2 else things().folder_2, "differ")],
    "folders": [5, "ab", (lambda v: v[:1], "2 or more, not 1"), (lambda v: [v[0]] * 2, "differ"),
                (lambda v: [3, 4], "3")],
    "given": [5, "ab", (lambda v: [3], "3")],
    "folds": [1, *SIZE],
    "weight_or_name": [-0.5, 1.5, NAN, None, True, 1j, "best"],
    "any_weights": [5, "ab", (lambda v: [1.0], "1 of them for 2 folders"), (lambda v: [NAN, 1.0], "finite")],
    "held_examples": [
        5, None,
        (lambda v: v[:1], "a pair of inputs and labels"),
        (lambda v: (v[0] * NAN, v[1]), "input 0 is not finite"),
        (lambda v: (v[0], v[1].float()), "float32"),
        (lambda v: (v[0], v[1] - 9), "below 0"),
        (lambda v: (v[0][:1], v[1][:1]), "2 or more, not 1"),
        (lambda v: (v[0][:0], v[1][:0]), "no examples"),
    ],
    "saved": [(lambda v: 5, "int"), (lambda v: "x", "str"),
              (ADAPTER[4][0], "dictionary of tensors"), (lambda v: {}, "tensors")],
    "merge prepare by tokenizer estimator model_pair loss_of noisy function": FUNCTION,
    "weights_name": [5, True],
    "adapted": [None, 3, "net", (lambda v: v.model, "PeftModel")],
    "split": [None, 3, (lambda v: things().federation, "Federation"), (lambda v: v.x, "Tensor")],
    "counted": [None, 3, (lambda v: v.x, "Tensor")],
    "federation": [None, 3, (lambda v: v.train, "Split")],
    "setting": [None, 3, (lambda v: {}, "dict")],
    "eval_split": [3, (lambda v: things().federation, "Federation"), (lambda v: v.rows([0, 1]), "clients")],
    "eval_every": SIZE,
    "task": ["ranking", 3, None],
    "real_targets": FLAG,
    "callbacks": [5, (lambda v: [3], "callbacks[0]"), None],
    "epochs": [0, -1, *NUMBER],
    "execution": [None, 4, (lambda v: {}, "dict")],
    "backbone network base": [None, "net", (lambda v: torch.nn.Linear, "type")],
    "config": [5, (lambda v: {"r": 4}, "dict")],
    "rng": [0, None],
    "run result algorithm privacy moments_of": [None, 3, (lambda v: {}, "dict")],
    "algorithm_of": [None, 3, (lambda v: {}, "dict")],
    "board": [None, 3, (lambda v: v.drop(columns="bytes"), "'bytes'"), (lambda v: pd.concat([v, v]), "a line for each"),
              (lambda v: v.reset_index(drop=True), "a line for each"), (lambda v: v.iloc[:0], "(0, ")],
    "references": [5, "abc"],
    "local_name": [5, None],
    "state": [5, (lambda v: short_state(2, 100), "2 clients for 3"), (lambda v: short_state(3, 7), "(3, 7)")],
    "adapters": STACK,
    "federated local optimum": STACK,
    "adapter": ADAPTER,
    "weighed": [5, "x", (lambda v: list(v), "dictionary"), (entry(lambda t: t.tolist()), "list")],
    "taken_apart": [(lambda v: 5, "int"), (lambda v: "x", "str"), (lambda v: {}, "dictionary"),
                    (entry(lambda t: t.tolist()), "dictionary"),
                    (lambda v: client_adapter(v, 0), "not one adapter"), (entry(lambda t: t[:2]), "[2, 3]")],
    "uploads stack": [*ADAPTER, (lambda v: client_adapter(v, 0), "not one adapter")],
    "sent": ADAPTER,
    "several": [
        5, "x", None,
        (lambda v: [], "list"),
        *((lambda v, change=change: [v[0], change(v[1])], said) for change, said in ADAPTER[2:]),
        (lambda v: torch.tensor(NAN), "a list"),
        (lambda v: [v[0], entry(lambda t: t[..., :-1], 0)(v[1])], "shape"),
    ],
    "runs": [5, None, (lambda v: [], "list"), (lambda v: [v[0][:1]], "pair"), (lambda v: [(1, 2)], "int")],
    "lambda": LAMBDA,
    "mixing": [5, None, "ab", (lambda v: v[:1], "2 adapters, 1 weights"), (lambda v: [NAN, 1.0], "weights[0]"),
               (lambda v: [1j, 1.0], "1j"), (lambda v: [1.0, [0.5, 0.5]], "2 weights for a stack of 3")],
    "scaling": [5, None, (lambda v: {}, "dict"), (lambda v: dict.fromkeys(v, NAN), "nan"),
                (lambda v: dict.fromkeys(v, 0), "0"), (lambda v: dict(list(v.items())[1:]), "missing")],
    "labels": tensor((lambda v: v[:, :-1], "(3, 5)"), (lambda v: v.float(), "float32"),
                     (lambda v: v - 500, "at least -100, not -600"),
                     (lambda v: v.where(v < 0, -9), "where one is ignored, not -9")),
    "direction": tensor((lambda v: v[:2], "(2, "), (lambda v: v[:, :-1], "(3, ")),
    "g_f gradients vectors": tensor(),
    "g_l": tensor((lambda v: v[:, :-1], "(3, 5, 5)"), (lambda v: v[:2], "(2, 6, 5)")),
    "sizes": tensor(*COUNTED, (lambda v: v + 40, "in [1, 6]")),
    "train_sizes": tensor(*[(change, said.replace("C = 3", "2 of them for 3 clients")) for change, said in COUNTED],
                          (lambda v: v[:1], "3")),
    "examples": [5, None, (lambda v: v[:1], "(tensor"), (lambda v: (v[0], v[1] * 0), "0")],
    "groups": tensor((lambda v: v[:2], "P = 5"), (lambda v: v - 1, "-1"), (lambda v: v + 2**40, "[0, 5]")),
    "clip_pair": [0.5, NAN, "ab", (lambda v: (1.0, 0.0), "(1.0, 0.0)"), (lambda v: (NAN, 1.0), "nan"),
                  (lambda v: (0, 1, 2), "(0, 1, 2)")],
    "grid weights_grid": tensor((lambda v: v + 1, "in [0, 1], not")),
    "weights_of": tensor((lambda v: v[:2], "[3, 6]"), (lambda v: v - 9, "-6"), (lambda v: v * 0, "0")),
    "losses low": tensor(),
    "loss_curve": tensor((lambda v: v[:, :-1], "2")),
    "middle high distance curvature accuracy": tensor((lambda v: v[:-1], "(")),
    "at_local variance_of": tensor(),
    "curves": tensor((lambda v: v[:, :-1], "(3, 2)")),
    "also chosen": [5, "x", (lambda v: {1: next(iter(v.values()))}, "1"),
                    (lambda v: dict.fromkeys(v, torch.full((3,), NAN)), "'"), (lambda v: dict.fromkeys(v, 3), "'"),
                    (lambda v: dict.fromkeys(v, torch.ones(2)), "'")],
    "level_loss level_accuracy": tensor((lambda v: v[:2], "C = 3")),
    "degrees features": tensor(),
    "means": [None, 3, (lambda v: v.drop(columns="bytes"), "'bytes'"), (lambda v: v.iloc[:0], "(0, ")],
    "front": [None, 3, (lambda v: v[:1], "2 lines"), (lambda v: v.reset_index(drop=True), "2 lines")],
    "alphas": [5, None, (lambda v: [], "list"), (lambda v: [0.1, -1], "-1"), (lambda v: [NAN, 1], "nan")],
    "splits": [5, None, (lambda v: [1, 2], "1"), (lambda v: v[:1], "1 splits")],
    "a b rho": [INF, *NUMBER],
    "scores": [5, None, (lambda v: v * NAN, "finite"), (lambda v: v.astype(str), "numbers"), (lambda v: v[:0], "(0, ")],
    "chosen_seeds": [0, 99, 1.5, "x"],
    "course": [5, None, (lambda v: v.drop(columns="alpha"), "'alpha'"), (lambda v: v.assign(loss_paper=NAN), "finite"),
               (lambda v: v.iloc[:0], "(0, "), (lambda v: v.filter(regex="^(?!curve)"), "curve_"),
               (lambda v: v.assign(curve_0="x"), "numbers")],
    "matrix": tensor((lambda v: v[:1], "shape"), (lambda v: v * 0, "inverse"), (lambda v: torch.eye(3), "2")),
    "moments": tensor((lambda v: v[:1], "(1, 2)"), (lambda v: torch.tensor([[1.0, 0.3], [0.0, 1.0]]), "symmetric")),
    "x y": tensor((lambda v: [[0.0]], "[[0.0]]")),
    "images": [5, None, (lambda v: v[0], "(1, 28, 28)"), (lambda v: v.long(), "int64")],
    "fishers": [5, (lambda v: v[:1], "1 of them for 2 models"), (lambda v: [v[0], v[1] * NAN], "fishers[1]"),
                (lambda v: [v[0], -v[1] - 1], "at least 0"), (lambda v: [v[0], v[1][:2]], "(2, ")],
    "grams": [5, (lambda v: v[:1], "1 of them for 2 models"),
              (lambda v: [v[0], {n: g * NAN for n, g in v[1].items()}], "grams[1]"),
              (lambda v: [v[0], next(iter(v[1].values()))], "dictionary"),
              *((lambda v, change=change: [v[0], entry(change)(v[1])], "grams[1]")
                for change in (lambda g: g[:1], lambda g: g[..., :-1], lambda g: g[:, :-1, :-1])),
              (lambda v: [v[0], {f"{n}x": g for n, g in v[1].items()}], "grams[1]")],
    "rows": ROWS,
    "token_rows": [5, "ab", (lambda v: torch.tensor(NAN), "a list"), (lambda v: pd.DataFrame(), "a list"),
                   (lambda v: [[1], []], "text 1"), (lambda v: [[1.5]], "1.5"), (lambda v: [[-1]], "-1"),
                   (lambda v: [], "list")],
    "texts prompts answers": [5, "ab", (lambda v: np.array("ab"), "a list"),
                              (lambda v: [3], "3"), (lambda v: ["  ", *v][:len(v)], "empty")],
    "client_names panel_names": [5, "ab", (lambda v: [3], "3"), (lambda v: v[:1], "1 of them for 3 clients")],
    "ax": [3, "x", (lambda v: [3], "list")],
    "one_panel_each": [3, "x", (lambda v: [3], "3"), (lambda v: v[1:], "panels, not")],
    "measure": [None, 3, "weight"],
    "history": [None, 3, (lambda v: v.drop(columns="loss"), "'loss'"), (lambda v: v.assign(loss=NAN), "no loss")],
    "differences": [None, 3, (lambda v: v.drop(columns="±"), "'±'"), (lambda v: v.iloc[:0], "(0, ")],
    "estimates": [5, None, (lambda v: {}, "dict"), (lambda v: {"x": 3}, "3"),
                  (lambda v: {"x": Estimate(torch.ones(2))}, "'oracle'")],
    "oracle": [5, "x", (lambda v: v[:2], "'oracle'"), (lambda v: v * NAN, "finite")],
    "names found": [5, "ab", (lambda v: [3], "3"), (lambda v: [["a"]], "[0]")],
    "voices": [*ADAPTER[:4], ADAPTER[5], *ADAPTER[7:],
               (lambda v: {n: t[:1] for n, t in v.items()}, "1 adapters for 2 clients"),
               (lambda v: client_adapter(v, 0), "not one adapter"), (entry(lambda t: t[:1]), "[1, 2]"),
               (lambda v: v | {"other": torch.zeros(2, 2)}, "'other'")],
    "prompts_of": [5, "ab", (lambda v: v[:1], "2 adapters for 1 clients"), (lambda v: ["ab", "b"], "'ab'")],
    "inputs_of": [5, "ab", (lambda v: v[:1], "2 adapters for 1 clients"), (lambda v: [1, 2], "1")],
    "expected": [5, (lambda v: [1], "1"), (lambda v: v * 2, "2 expected")],
    "questions": [5, (lambda v: v[:1], "2 adapters for 1 clients"), (lambda v: [["a"], ["b"]], "Question"),
                  (lambda v: [[Question("a", "b", ("b",))]] * 2, "two options")],
    "ids": [5, None, (lambda v: torch.tensor(1), "a list"),
            (lambda v: [], "list"), (lambda v: [0, -1], "-1"), (lambda v: [0.5], "0.5")],
    "ranks": [5, "12", (lambda v: [0], "0"), (lambda v: [1.5], "1.5")],
    "seeds": [3, None, (lambda v: [], "list"), (lambda v: [3, 3], "[3, 3]"), (lambda v: [-1], "-1")],
    "methods": [5, None, (lambda v: {}, "dict"), (lambda v: {"x": 3}, "3"), (lambda v: {1: len}, "dict")],
    "settings": [5, None, (lambda v: {}, "dict"), (lambda v: {"x": {}}, "dict")],
    "shard": [5, (lambda v: (2, 2), "[2, 2]"), (lambda v: (0,), "0"), (lambda v: (-1, 2), "-1")],
    "pool test_pool": [
        5, None,
        (lambda v: v[:1], "a pair of inputs and labels"),
        (lambda v: (v[0] * NAN, v[1]), "input 0 is not finite"),
        (lambda v: ((v[0] * 255).to(torch.uint8), v[1]), "torch.uint8"),
        (lambda v: (v[0], v[1].float()), "torch.float32"),
        (lambda v: (v[0], v[1].unsqueeze(1)), "(60, 1)"),
        (lambda v: (v[0], torch.nn.functional.one_hot(v[1])), "(60, 4)"),
        (lambda v: (v[0], v[1] + 7), "label 10"),
        (lambda v: (v[0], v[1] - 1), "label -1"),
        (lambda v: (v[0][:5], v[1]), "5 inputs and 60 labels"),
    ],
    "train test": [
        5, None,
        (lambda v: [], "[]"),
        (lambda v: v[:2], "(0, 1)"),
        (lambda v: [v[0], v[1][0], v[2]], "[1]"),
        (lambda v: [v[0], (v[1][0] + INF, v[1][1]), v[2]], "client 1"),
        (lambda v: [v[0], (v[1][0].long(), v[1][1]), v[2]], "client 1"),
        (lambda v: [(x.double(), y) for x, y in v], "float64"),
        (lambda v: [(x[..., :-1], y) for x, y in v], "(1, 28, 27)"),
        (lambda v: [(x, y.float()) for x, y in v], "torch.float32"),
        (lambda v: [(x, y.unsqueeze(1)) for x, y in v], "1)"),
        (lambda v: [(x, y.float().expand(2, -1).T) for x, y in v], "float32"),
        (lambda v: [(x, y + 9) for x, y in v], "outside 0"),
        (lambda v: [(x, y - 9) for x, y in v], "below 0"),
        (lambda v: [(x.tolist(), y) for x, y in v], "must be tensors"),
        (lambda v: [(x, y.tolist()) for x, y in v], "must be tensors"),
        (lambda v: {b"a": v[0]}, "by names"),
        (lambda v: dict(zip("abc", v)), "like train"),
    ],
    "portion": [0, 1.0, 1.5, -0.5, "2", True, NAN, INF, 1j, None],
    "class_names": [5, "ab", (lambda v: [3], "3"), (lambda v: v[1:], "3 of them, not 4")],
    "df": [5, None, (lambda v: v[:0], "(0, 3)"), (lambda v: v["age"], "Series"),
           (lambda v: v.drop(columns="ward"), "ward"), (lambda v: v.assign(age=NAN), "nan in row 0"),
           (lambda v: v.assign(age="x"), "'age'")],
    "df_test": [5, (lambda v: v[:0], "(0, 3)"), (lambda v: v.drop(columns="ward"), "ward"),
                (lambda v: v[:2], "only one of the two has 'B'")],
    "column": ["x", (lambda v: ["a"], "hashable"), (lambda v: "age", "different")],
    "columns": [5, "age", (lambda v: [], "list"), (lambda v: ["x"], "'x'"), (lambda v: ["sick"], "different")],
    "datasets": [5, None, (lambda v: [], "[]"), (lambda v: [5, 5], "length"), (lambda v: [range(3)] * 2, "pairs"),
                 (lambda v: [v[0], TensorDataset(torch.rand(8, 3), torch.arange(8))], "(3,)")],
    "ds": [5, None, "x", (lambda v: [v], "'ward'"), (lambda v: {"test": v}, "'train'")],
    "ds_client": [5, "x", (lambda v: None, "the column that")],
    "ds_label": [5, None, "x"],
    "ds_text": [5, (lambda v: "x", "together")],
    "ds_features": [5, "age", (lambda v: [], "list"), (lambda v: ["x"], "'x'"), (lambda v: ["sick"], "'sick'")],
    "proportions": [(lambda v: 5, "()"), (lambda v: [[1.0], [1.0, 2.0]], "numbers"), (lambda v: "ab", "'ab'"),
                    (lambda v: torch.ones(2, 4, requires_grad=True), "numbers"),
                    (lambda v: [[1.0, 0, 0, 0]], "(1, 4)"),
                    (lambda v: [[NAN] * 4] * 2, "proportions"), (lambda v: [[-1.0, 2, 0, 0]] * 2, "proportions"),
                    (lambda v: [[0.0] * 4] * 2, "proportions")],
}  # fmt: skip
# Where a name means something else than elsewhere, the list above that says what is wrong for it.

MEANT = {
    ("federation.text.encode_answers", "end"): "shift",
    **{(f"federation.{name}", "test_size"): "portion"
       for name in ("sources.from_tensors", "sources.from_dataframe", "sources.from_datasets",
                    "huggingface.from_huggingface")},
    ("federation.sources.from_dataframe", "test"): "df_test",
    ("federation.sources.from_dataframe", "client"): "column",
    ("federation.sources.from_dataframe", "label"): "column",
    ("federation.sources.from_dataframe", "features"): "columns",
    ("federation.sources.from_datasets", "train"): "datasets",
    ("federation.sources.from_datasets", "test"): "datasets",
    ("federation.sources.from_datasets", "classes"): "classes",
    **{("federation.huggingface.from_huggingface", name): f"ds_{name}"
       for name in ("client", "label", "text", "features")},
    ("results.leaderboard", "local"): "local_name",
    ("plots.label_counts", "split"): "counted",
    ("plots.along_weight", "weights"): "g_f",
    **{(f"plots.{name}", "names"): "panel_names" for name in ("along_weight", "weights")},
    **{(f"plots.{name}", "ax"): "one_panel_each" for name in ("along_weight", "frontiers")},
    ("plots.along_weight", "values"): "curves",
    ("plots.overview", "weights"): "g_f",
    **{(f"{name}", "loss"): "curves"
       for name in ("plots.overview", "course.widgets.weight_slider", "course.explorers.basis_explorer")},
    ("course.widgets.weight_slider", "weights"): "weights_grid",
    ("plots.frontiers", "board"): "means",
    ("plots.frontier", "points"): "means",
    ("plots.overview", "points"): "means",
    ("course.seeds_explorer.seeds_explorer", "chosen"): "chosen_seeds",
    **{(f"course.estimator_explorer.{name}", "rows"): "course" for name in ("loss_along", "estimator_explorer")},
    ("experiment.train_local", "start"): "adapters",
    ("baselines.methods.from_algorithm", "algorithm"): "algorithm_of",
    ("baselines.sweep.sweep", "eval_split"): "prepare",
    ("training.train.train", "loss"): "loss_of",
    ("estimators.folders.merge_folders", "federated"): "some_folder",
    ("estimators.folders.merge_folders", "local"): "some_folder",
    ("estimators.folders.merge_folders", "weight"): "weight_or_name",
    ("estimators.folders.combine_folders", "weights"): "any_weights",
    **{(f"estimators.folders.{name}", "examples"): "held_examples" for name in ("merge_folders", "combine_folders")},
    ("training.train.train", "clip"): "lr",
    ("adapters.state.adapter_bytes", "adapter"): "weighed",
    ("adapters.files.save_adapter", "adapter"): "saved",
    ("adapters.files.export_merged", "adapter"): "exported",
    ("adapters.files.export_merged", "base"): "adapted_or_base",
    ("adapters.files.save_adapters", "names"): "folder_names",
    ("adapters.files.save_adapters", "stack"): "whole_stack",
    ("training.checkpoint.save_state", "adapter"): "saved_state",
    ("training.checkpoint.save_state", "state"): "any_state",
    ("adapters.state.client_adapter", "stack"): "taken_apart",
    ("models.vit.torchvision_vit", "weights"): "weights_name",
    ("federation.text.pad_tokens", "rows"): "token_rows",
    ("federation.partition.shift_images", "x"): "images",
    ("merging.merge.combine_adapters", "adapters"): "several",
    ("adapters.state.stack_adapters", "adapters"): "several",
    ("adapters.state.delta_inner_products", "adapters"): "several",
    ("merging.merge.combine_adapters", "weights"): "mixing",
    ("training.fedavg.weighted_average", "weights"): "weights_of",
    ("baselines.privacy.with_noise", "moments"): "moments_of",
    ("estimators.alternatives.shrinkage_moments", "variance"): "variance_of",
    ("training.scoring.write_answers", "prompts"): "prompts_of",
    **{(f"training.scoring.{name}", "adapters"): "voices"
       for name in ("multiple_choice", "greedy_tokens", "write_answers")},
    ("training.scoring.greedy_tokens", "prompts"): "inputs_of",
    **{(f"merging.merge.merge_{kind}", name): name_ for kind in ("exact", "factors")
       for name, name_ in (("federated", "merged_model"), ("local", "merged_model"), ("weight", "lambda"))},
    **{(f"baselines.algorithms.{name}", "weight"): "head_share" for name in ("wise_ft", "apfl", "feddpa")},
    ("baselines.methods.wise_ft", "weight"): "head_share",
    **{(f"baselines.merges.{name}", "models"): "several"
       for name in ("task_arithmetic", "fisher_merge", "regmean", "merge_deltas")},
    ("estimators.combination.estimate_combination", "models"): "several",
    ("estimators.combination.estimate_combination", "personal"): "head_share",
    ("baselines.clusters.three_models", "personal"): "head_share",
    ("baselines.clusters.three_models", "shrinkage"): "head_share",
    ("baselines.clusters.cluster_clients", "clusters"): "clients",
    ("baselines.clusters.three_models", "clusters"): "clients",
    ("baselines.clusters.cluster_clients", "similar"): "g_f",
    **{(name, "loss"): "loss_curve"
       for name in ("merging.connectivity.barrier", "estimators.curve.parabola_moments", "experiment.oracle_weight")},
    **{(name, "weights"): "weights_grid"
       for name in ("merging.connectivity.barrier", "merging.connectivity.along_segment", "experiment.oracle_weight",
                    "estimators.curve.segment_losses")},
    **{(f"estimators.{name}", "weights"): "g_f" for name in ("curve.parabola_moments", "calibrated.pooled_weight")},
    **{(f"estimators.{name}", "clip"): "clip_pair"
       for name in ("alternatives.laplace_moments", "paper.fisher_moments", "paper.estimate_paper")},
}  # fmt: skip
BAD["merged_model"] = MODEL
LISTS = {name: values for names, values in BAD.items() for name in names.split()}


def short_state(clients, numbers):
    return OptimizerState.zeros(torch.zeros(clients, numbers))


def wrong_for(function, argument):
    return LISTS.get(MEANT.get((function, argument), argument))


def find(function):
    module, _, name = function.rpartition(".")
    return getattr(importlib.import_module(f"potara_lite.{module}"), name)


def arguments(function):
    """The arguments of the call above, without those that cannot be wrong by themselves."""
    return [argument for argument in CALLS[function](things()) if argument not in ("config", "calibration")]


CASES = [(function, argument) for function in CALLS for argument in arguments(function)]
BY_CLIENT = {
    "train",
    "test",
    "pool",
    "test_pool",
    "head",
    "texts",
    "prompts",
    "answers",
    "token_rows",
    "rows",
    "last",
    "questions",
    "name",
    "score",
    "federated",
    "loss",
}  # their messages name a client, a text or a layer where there is one


@pytest.mark.parametrize("function, argument", CASES, ids=[f"{function}-{argument}" for function, argument in CASES])
def test_bad_input_is_refused_in_one_line_that_names_it(function, argument):
    call, meaning = CALLS[function](things()), signature(find(function)).parameters
    optional = argument in meaning and meaning[argument].default is None
    for bad in wrong_for(function, argument):
        make, said = bad if isinstance(bad, tuple) else (None, None)
        if (bad is None and (optional or argument not in meaning)) or (make and call[argument] is None):
            continue
        value = make(call[argument]) if make else bad
        with pytest.raises(ValueError) as caught:
            find(function)(**call | {argument: value})
        message = str(caught.value)
        assert "\n" not in message and len(message) < 400
        assert argument in message or argument in BY_CLIENT, message
        assert (said or repr(value)) in message, (said or repr(value), message)


@pytest.mark.parametrize("function", [name for name in CALLS if name not in NOT_RUN])
def test_what_is_right_is_taken(function):
    """Else the test above would see refusals of something else."""
    find(function)(**CALLS[function](things()))


def checked_functions():
    """Every function of the package that checks its arguments, by its module and name."""
    found = {}
    for file in FILES:
        if not file.startswith(("deployment/", "course/exercises/", "__main__")):  # whose tests are elsewhere
            module = importlib.import_module(module_name(file))
            for name, one in vars(module).items():
                if isfunction(one) and one.__module__ == module.__name__ and one.__code__.co_name == "outside":
                    found[f"{module_name(file).removeprefix('potara_lite.')}.{name}"] = one
    return found


def test_every_public_function_checks_its_arguments_and_has_a_row():
    rows = {name: find(name) for name in CALLS}
    for name in potara_lite.__all__:
        one = getattr(potara_lite, name)
        assert not isfunction(one) or one in rows.values() or name == "next_tokens", name
    for name, function in checked_functions().items():
        assert function in rows.values() or name.rpartition(".")[2].startswith("_"), name


def test_every_argument_of_a_row_is_annotated_and_tried():
    free = {
        "watch",
        "options",
        "training",
        "fixed",
        "objective",
        "finished",
        "tokenizer",
        "config",
        "calibration",
        "proportions",
    }
    for name in CALLS:
        for argument, parameter in signature(find(name)).parameters.items():
            if argument not in free:
                assert parameter.annotation is not parameter.empty, (name, argument)
                assert argument in CALLS[name](things()), (name, argument)


def test_a_check_stays_when_a_parameter_is_renamed_or_two_change_places():
    @checked
    def one(lr: Positive, steps: Count): ...

    @checked
    def other(iterations: Count, learning_rate: Positive): ...

    for call, name in (
        (lambda: one(NAN, 1), "lr"),
        (lambda: one(0.1, -1), "steps"),
        (lambda: other(-1, 0.1), "iterations"),
        (lambda: other(1, NAN), "learning_rate"),
        (lambda: other(learning_rate=NAN, iterations=1), "learning_rate"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be "):
            call()


def test_help_shows_each_bound():
    text = pydoc.plain(pydoc.render_doc(potara_lite.train))
    assert "lr: 'Positive' = 0.001" in text and "``lr`` above 0 and finite" in text
    for name, bound in BOUNDS.items():
        for argument, hint in potara_lite.train.__annotations__.items():
            if name in re.findall(r"\w+", str(hint)):
                assert f"``{argument}`` {bound}" in " ".join(text.split()), argument


def test_unknown_and_missing_arguments_are_pythons_own_errors():
    t = things()
    for call, name in (
        (lambda: fedit(t.adapted, t.split, rounds=1, local_steps=1, lrr=1), "^train got .* 'lrr'"),
        (lambda: fedit(t.adapted, t.split, rounds=1, local_steps=1, callback=print), "own is 'callbacks'"),
        (lambda: potara_lite.Setting(client=3), "^Setting got an unexpected .* 'client' .*own is 'clients'"),
        (lambda: potara_lite.fashion_mnist(client=3), "^partition got .*own is 'clients'"),
        (lambda: potara_lite.train(t.adapted, t.local, t.split), "^train missing a required argument: 'steps'$"),
    ):
        for kind in (TypeError, ValueError):
            with pytest.raises(kind, match=name):
                call()


# What has no row above: constructors, and arguments that are wrong together.


def federation_of(t, **changes):
    f = t.federation
    parts = dict(train=f.train, calibration=f.calibration, test=f.test, classes=4, name="x")
    return potara_lite.Federation(**parts | changes)


def moments(a=1.0, b=1.0, c=0.0):
    return potara_lite.Moments(a, b, c)


def examples(t, x=None, y=None, n=4):
    x = torch.rand(n, 1, 28, 28) if x is None else x
    return Split([t.split.client(0), (x, torch.zeros(n).long() if y is None else y)])


def mapping(**changes):
    x = {"input_ids": torch.tensor([[1, 2], [3, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    return Split([(x | changes.pop("x", {}), changes.pop("y", torch.tensor([0, 1])))])


ALL = {n: t for n, t in vars(Setting()).items()}
OF_SETTING = {
    **dict.fromkeys("clients train_size calibration_size test_size rank batch_size chunk_size".split(), SIZE),
    **dict.fromkeys("rounds round_steps local_steps".split(), WHOLE),
    **dict.fromkeys("lr federated_lr_scale local_lr_scale".split(), [-0.1, 0, INF, *NUMBER]),
    "alpha": [-0.1, 0, *NUMBER],
    "shift": FLAG[:-1],
    "local_from_federated": FLAG[:-1],
    "device": [5, None],
    "data": [5, None, "mnist"],
    "backbone": [5],
}
E, S, A = potara_lite.Estimate, Split, potara_lite.Algorithm
HALF = torch.tensor([0.5, 0.5, 0.5])
WRONG = [
    *((f"Setting {name} {value!r}", lambda t, n=name, v=value: Setting(**{n: v}), (name, repr(value)))
      for name, values in OF_SETTING.items() for value in values if value is not None or name in ("device", "data")),
    *((f"Execution {name} {value!r}", lambda t, n=name, v=value: potara_lite.Execution(**{n: v}), (name, repr(value)))
      for name, values in (("chunk_size", SIZE), ("memory_bytes", [-1, 0, *NUMBER]), ("vectorize", [1, "yes"]),
                           ("compile", [1, None]), ("autocast", ["bf16"])) for value in values),
    *((f"Privacy {name} {value!r}",
       lambda t, n=name, v=value: type(t.privacy)(**dict(clip=1.0, noise_multiplier=1.0, seed=0) | {n: v}),
       (name, repr(value)))
      for name, values in (("clip", [-1, 0, INF, *NUMBER]), ("noise_multiplier", [-1, INF, *NUMBER]), ("seed", WHOLE))
      for value in values),
    # Splits
    ("fewer ids", lambda t: Split([t.split.client(0)] * 3, [0, 1]), ("ids", "ids must be 3 different")),
    ("ids twice", lambda t: Split([t.split.client(0)] * 2, [1, 1]), ("ids", "(1, 1)")),
    ("ids below 0", lambda t: Split([t.split.client(0)] * 2, [0, -1]), ("ids[1]", "-1")),
    ("ids of fractions", lambda t: Split([t.split.client(0)] * 2, [0, 0.5]), ("ids[1]", "0.5")),
    ("no examples", lambda t: Split([]), ("examples", "[]")),
    ("no pairs", lambda t: Split([t.split.client(0)[0]]), ("examples[0]",)),
    ("uint8 beside float", lambda t: examples(t, torch.zeros(4, 1, 28, 28, dtype=torch.uint8)), ("1", "torch.uint8")),
    ("whole images", lambda t: examples(t, torch.zeros(4, 1, 28, 28, dtype=torch.int64)), ("client 1", "torch.int64")),
    ("complex", lambda t: examples(t, torch.zeros(4, 1, 28, 28) * 1j), ("client 1", "torch.complex64")),
    ("double beside float", lambda t: examples(t, torch.zeros(4, 1, 28, 28).double()), ("client 1", "float64")),
    ("another size", lambda t: examples(t, torch.zeros(4, 1, 32, 32)), ("client 1", "(1, 32, 32)")),
    ("NaN", lambda t: examples(t, torch.full((4, 1, 28, 28), NAN)), ("client 1", "input 0 is not finite")),
    ("inf", lambda t: examples(t, torch.full((4, 1, 28, 28), INF)), ("client 1", "input 0 is not finite")),
    ("float labels", lambda t: examples(t, y=torch.tensor([0.5, 1, 1, 0])), ("client 1", "float32")),
    ("bool labels", lambda t: examples(t, y=torch.ones(4) > 0), ("client 1", "torch.bool")),
    ("labels of a column", lambda t: examples(t, y=torch.zeros(4, 1).long()), ("client 1", "(4, 1)")),
    ("one-hot", lambda t: examples(t, y=torch.eye(4).long()), ("client 1", "(4, 4)")),
    ("label below 0", lambda t: examples(t, y=torch.tensor([0, 1, -1, 0])), ("client 1", "label -1")),
    ("label ignored", lambda t: examples(t, y=torch.tensor([0, 1, -100, 0])), ("client 1", "label -100")),
    ("array", lambda t: examples(t, np.zeros((4, 1, 28, 28), "f")), ("client 1", "ndarray")),
    ("list of labels", lambda t: examples(t, y=[0, 1, 2, 3]), ("client 1", "[0, 1, 2, 3]")),
    ("no tensors", lambda t: Split([({}, torch.tensor([0]))]), ("client 0", "{}")),
    ("target below 0", lambda t: mapping(y=torch.tensor([[1, -2], [1, -100]])), ("client 0", "label -2")),
    ("targets of another length", lambda t: mapping(y=torch.tensor([[1, 2, 3], [1, 2, 3]])), ("client 0", "(2, 3)")),
    ("float mask", lambda t: mapping(x={"attention_mask": torch.tensor([[1.0, NAN], [1, 0]])}), ("client 0", "input")),
    ("ids of fewer", lambda t: Split(t.split.examples, (0, 1)), ("ids", "(0, 1)")),
    ("map by no function", lambda t: t.split.map(3), ("function", "3")),
    ("map of no batch", lambda t: t.split.map(lambda x: x, batch_size=0), ("batch_size", "0")),
    ("rows of -1", lambda t: t.split.rows([-1]), ("index[0]", "-1")),
    ("rows of True", lambda t: t.split.rows([True]), ("index[0]", "True")),
    ("rows beyond", lambda t: t.federation.rows([0, 3]), ("index[1]", "at most 2")),
    ("rows of one", lambda t: t.split.rows(1), ("index", "1")),
    ("a client beyond", lambda t: t.split.client(3), ("i must", "3")),
    ("a client of a fraction", lambda t: t.split.client(0.5), ("i must", "0.5")),
    ("to no device", lambda t: t.split.to(None), ("device", "None")),
    ("to an unknown device", lambda t: t.federation.to("gpu"), ("device", "'gpu'")),
    ("a backbone to a number", lambda t: t.adapted.to(0.5), ("device", "0.5")),
    ("bytes", lambda t: Split([(x.to(torch.uint8), y) for x, y in t.split.examples]), ("client 0", "uint8")),
    ("x on no device", lambda t: examples(t, torch.zeros(4, 1, 28, 28).to("meta")), ("client 1", "meta")),
    ("examples that are not there", lambda t: examples(t, torch.zeros(4, 1, 28, 28).to_sparse()), ("1", "sparse")),
    ("all ignored", lambda t: examples(t, y=torch.zeros(4).long() - 100), ("client 1", "label -100")),
    ("NaN for an estimator", lambda t: estimators.estimate_paper(
        t.adapted, t.federated, t.local, broken(t)), ("loss", "client 1", "finite")),
    ("NaN for another one", lambda t: estimators.estimate_shrinkage(
        t.adapted, t.federated, t.local, broken(t), train_sizes=t.sizes), ("loss", "client 1", "finite")),
    ("NaN for drawn labels", lambda t: estimators.estimate_paper(
        t.adapted, t.federated, t.local, broken(t), sample_labels=0), ("loss", "client 1", "finite")),
    ("another precision", lambda t: potara_lite.evaluate(
        t.adapted, t.local, changed_split(t.split, x=t.split.x.double())), ("split", "float64", "float32")),
    ("a label of none", lambda t: potara_lite.evaluate(
        t.adapted, t.local, changed_split(t.split, y=t.split.y + 9)), ("split", "0 … 3")),
    *((f"a label of none in {name}", lambda t, f=f: f(t, changed_split(t.split, y=t.split.y + 1)), ("split", "0 … 3"))
      for name, f in {
          "training": lambda t, split: potara_lite.train(t.adapted, t.local, split, steps=1),
          "one after another": lambda t, split: potara_lite.train(
              t.adapted, t.local, split, steps=1, execution=potara_lite.Execution(vectorize=False)),
          "rounds": lambda t, split: fedit(t.adapted, split, rounds=1, local_steps=1),
          "an algorithm": lambda t, split: potara_lite.run_algorithm(
              t.fedit, t.adapted, split, rounds=1, local_steps=1),
          "gradients": lambda t, split: potara_lite.per_sample_gradients(t.adapted, t.local, split),
          "derivatives": lambda t, split: estimators.gauss_newton.directional_derivatives(
              t.adapted, t.local, t.flat, split),
          "moments": lambda t, split: estimators.estimate_gradient(t.adapted, t.federated, t.local, split),
      }.items()),
    ("a label of none instead", lambda t: potara_lite.per_sample_gradients(
        t.adapted, t.local, t.split, labels=t.split.y.clamp_min(0) + 1), ("labels: label 4", "0 … 3")),
    *((f"a grid {what}", lambda t, w=w: estimators.pooled_weight(w, t.losses, t.sizes), ("weights", "spaced", said))
      for what, w, said in (("of five for three", [0.0, 0.5, 0.6], "0.6"),
                            ("that stands still", [0.5] * 3, "0.5"), ("that falls", [1.0, 0.5, 0.0], "[1.0"),
                            ("with a gap", [0.0, 0.2, 1.0], "0.2"))),
    ("two losses", lambda t: estimators.pooled_weight(t.grid[:2], t.losses[:, :2], t.sizes), ("weights", "3")),
    ("a parabola of two points", lambda t: estimators.parabola_moments(
        [0.0, 0.5, 0.5], t.losses[..., 0]), ("weights", "3 or more different", "0.5")),
    ("infinite logits", lambda t: estimators.gauss_newton.directional_derivatives(
        t.adapted, {n: x * 1e38 for n, x in t.local.items()}, t.flat, t.split), ("client 0", "finite")),
    ("numbers of images", lambda t: potara_lite.federation.tasks.with_tokens(
        t.federation, ["a", "b"], LETTERS), ("federation", "numbers of the 2 texts")),
    ("no damping", lambda t: estimators.gradient_moments(**gradients(t), damping=0), ("damping", "larger")),
    ("no damping, cross-fit", lambda t: estimators.gradient_moments(
        torch.ones(3, 6, 5), torch.ones(3, 6, 5), t.sizes, damping=0, cross_fit=True), ("damping", "larger")),
    ("infinite inputs of a layer", lambda t: layer_grams(
        t.adapted, {n: x * 1e38 for n, x in t.local.items()}, t.split), ("client 0", "finite")),
    ("weights that are not there", lambda t: potara_lite.combine_adapters(
        [t.local, t.federated], torch.ones(2).to("meta")), ("weights",)),
    ("texts of fewer", lambda t: potara_lite.federation.tasks.with_tokens(
        t.numbers, ["a"], LETTERS), ("texts", "1 texts")),
    # Federations
    ("no split", lambda t: federation_of(t, test=None), ("test", "None")),
    ("no classes", lambda t: federation_of(t, classes=0), ("classes", "0")),
    ("classes of a float", lambda t: federation_of(t, classes=4.0), ("classes", "4.0")),
    ("a name that is none", lambda t: federation_of(t, name=3), ("name", "3")),
    ("fewer clients", lambda t: federation_of(t, test=t.federation.test.rows([0, 1])), ("test", "(0, 1)")),
    ("other inputs", lambda t: federation_of(t, test=t.federation.test.map(torch.Tensor.double)), ("test", "float64")),
    ("other sizes", lambda t: federation_of(t, test=t.federation.test.map(lambda x: x[..., :9])), ("test", "28, 9)")),
    ("label outside", lambda t: federation_of(t, classes=2), ("client 0", "outside 0 … 1")),
    # Moments
    *((f"moments {n} {v!r}", lambda t, n=n, v=v: moments(**{n: v}), (f"moment {n}", said))
      for n in "abc" for v, said in ((NAN, "NaN"), ("x", "'x'"), (True, "True"), (1j, "1j"), (None, "None"),
                                    ([[[1.0]]], "(1, 1, 1)"), ([], "(0,)"), ([1.0, NAN], "client 1"))),
    ("moments a below 0", lambda t: moments(a=-1.0), ("moment a", "negative")),
    ("moments b below 0", lambda t: moments(b=[1.0, -1.0]), ("moment b", "client 1")),
    ("moments c of -inf", lambda t: moments(c=-INF), ("moment c", "infinite")),
    ("moments c of inf", lambda t: moments(c=INF), ("moment c", "infinite")),
    ("moments of other shapes", lambda t: moments([1.0, 2.0], [1.0, 2.0, 3.0]), ("a, b and c", "(3,)")),
    ("bound of NaN", lambda t: t.moments.bound(NAN), ("weight", "nan")),
    ("bound of text", lambda t: t.moments.bound("x"), ("weight", "'x'")),
    # Estimates, ledgers, results
    *((f"estimate of {v!r}", lambda t, v=v: E(v), ("weight", said))
      for v, said in (("x", "'x'"), (0.5, "0.5"), (HALF * NAN, "finite"), (HALF * 3, "1.5"), (HALF > 0, "bool"),
                      ({"a": HALF * 3}, "1.5"), ({}, "numbers"))),
    ("estimate of groups alone", lambda t: E({"a": HALF}), ("client",)),
    ("estimate of no moments", lambda t: E(HALF, 3), ("moments", "3")),
    ("ledgers of other shapes", lambda t: type(t.ledger)(t.ledger.up, t.ledger.up[:2], t.ledger.up), ("(2,)",)),
    *((f"ledger of {what}", lambda t, v=v: type(t.ledger)(t.ledger.up, v, t.ledger.up), ("down", said))
      for what, v, said in (("floats", HALF, "float32"), ("debts", torch.tensor([1, -1, 0]), "-1"),
                            ("text", "abc", "'abc'"), ("nothing", None, "None"))),
    ("ledger and a number", lambda t: t.ledger + 3, ("other", "3")),
    ("ledger and one by round", lambda t: t.ledger + t.ledger.by_round([t.ledger] * 2), ("(3,)", "(2, 3)")),
    ("rounds of numbers", lambda t: t.ledger.by_round([1, 2]), ("rounds[0]", "1")),
    *((f"pair {what}", lambda t, c=c: type(t.pair)(t.federated, c(t.local), (t.ledger,) * 2, (0.0, 0.0)), ("local",))
      for what, c in (("of other tensors", lambda v: dict(list(v.items())[2:])),
                      ("of fewer clients", lambda v: {n: x[:2] for n, x in v.items()}))),
    ("pair of no ledgers", lambda t: type(t.pair)(t.federated, t.local, None, (0.0, 0.0)), ("ledgers", "None")),
    ("result of one", lambda t: type(t.result)(t.adapted, t.one, t.ledger, 0.0), ("adapters", "not one adapter")),
    ("result of less", lambda t: type(t.result)(
        t.adapted, dict(list(t.local.items())[2:]), t.ledger, 0.0), ("adapters", "base")),
    ("result of no ledger", lambda t: type(t.result)(t.adapted, t.local, None, 0.0), ("ledger", "None")),
    ("result of two weights", lambda t: type(t.result)(t.adapted, t.local, t.ledger, 0.0, HALF[:2]), ("weight", "2")),
    ("estimate of no floats", lambda t: E(HALF, floats=None), ("floats", "None")),
    ("estimate of debts", lambda t: E(HALF, floats=(1, -1)), ("floats[1]", "-1")),
    ("ledger of no clients", lambda t: t.ledger.zeros(0), ("clients", "0")),
    ("ledger adds a fraction", lambda t: t.ledger.add(torch.arange(3), up=0.5), ("up", "0.5")),
    ("ledger takes off", lambda t: t.ledger.add(torch.arange(3), steps=-1), ("steps", "-1")),
    ("ledger of no rows", lambda t: t.ledger.add(torch.tensor([0.5])), ("clients", "float32")),
    ("pair of NaN", lambda t: type(t.pair)(entry(lambda x: x * NAN)(t.federated), t.local, (), ()), ("federated",)),
    ("pair of one", lambda t: type(t.pair)(t.federated, t.one, (), ()), ("local", "not one adapter")),
    ("result of NaN", lambda t: type(t.result)(t.adapted, entry(lambda x: x * NAN)(t.local), t.ledger, 0.0), ("fin",)),
    ("result of 7", lambda t: type(t.result)(t.adapted, t.local, t.ledger, 0.0, HALF * 14), ("weight", "7.0")),
    ("run of a split", lambda t: type(t.run)(t.adapted, t.split, TINY, 0), ("federation", "Split")),
    ("run of seed -1", lambda t: type(t.run)(t.adapted, t.federation, TINY, -1), ("seed", "-1")),
    # Algorithms
    *((f"algorithm {n}", lambda t, n=n, v=v: A("x", **{n: v}), (n, said))
      for n, v, said in (("init", 3, "3"), ("phases", (), "()"), ("phases", (3,), "3"), ("is_uploaded", "A", "'A'"),
                         ("finetune_steps", -1, "-1"), ("wise_ft_weight", 2.0, "2.0"), ("keep_optimizer", 1, "1"),
                         ("privacy", 3, "3"), ("aggregate", None, "None"))),
    ("algorithm of no name", lambda t: A(3), ("name", "3")),
    *((f"phase {n}", lambda t, n=n, v=v: potara_lite.Phase(**{n: v}), (n, repr(v)))
      for n, v in (("is_trained", 3), ("objective", 3), ("steps", 3), ("models", 0), ("models", 1.5))),
    # Questions
    ("a prompt of 3", lambda t: Question(3, "a"), ("prompt", "3")),
    ("an answer of 3", lambda t: Question("a", 3), ("answer", "3")),
    ("options in one text", lambda t: Question("a", "a", "ab"), ("options", "'ab'")),
    ("an option of 3", lambda t: Question("a", "a", ("a", 3)), ("options[1]", "3")),
    ("targets of one dimension", lambda t: next_tokens(torch.tensor([1]), torch.tensor([1])), ("ids", "(1,)")),
    ("targets of another shape", lambda t: next_tokens(torch.ones(1, 2).long(), torch.ones(1)), ("is_target",)),
    # Together
    ("a head that is none", lambda t: attach(t.backbone, head="haed"), ("haed",)),
    ("three weights for one", lambda t: potara_lite.merge_exact(t.one, t.small, HALF), ("weight", "one adapter")),
    ("two weights for one of rank 2", lambda t: potara_lite.merge_factors(t.one, t.small, HALF[:2]), ("one adapter",)),
    ("a size of 30 digits", lambda t: Setting(clients=10**30), ("clients", "at most")),
    ("a rate of 400 digits", lambda t: Setting(lr=10**400), ("lr", "float32")),
    ("a state of two clients", lambda t: potara_lite.train(
        t.adapted, t.local, t.split, steps=1, state=short_state(2, 452)), ("state", "2 clients for 3")),
    ("a state of another rank", lambda t: potara_lite.train(
        t.adapted, t.local, t.split, steps=1, state=short_state(3, 7)), ("state", "452", "(3, 7)")),
    ("no config", lambda t: attach(t.backbone, config={"r": 4}), ("config", "LoraConfig", "dict")),
    ("alpha inf", lambda t: attach(t.backbone, alpha=INF), ("alpha", "inf")),
    ("alpha by a config", lambda t: attach(t.backbone, config=config(lora_alpha=NAN)), ("scaling", "nan")),
    ("alpha 0 by a config", lambda t: attach(t.backbone, config=config(lora_alpha=0)), ("scaling", "0")),
    ("a method that is none", lambda t: potara_lite.paired_differences(t.rows, "mine"), ("method", "'mine'")),
    ("a score that is none", lambda t: potara_lite.paired_differences(t.rows, "local", "f1"), ("score", "'f1'")),
    ("calibrating on all but one", lambda t: potara_lite.from_tensors(
        [t.pool], [t.pool], calibration_size=-1), ("calibration_size", "-1")),
    ("a grid that starts late", lambda t: potara_lite.barrier(torch.ones(2, 2), [0.5, 1.0]), ("weights", "[0.5, 1.0]")),
    ("two answers, one prompt", lambda t: potara_lite.encode_answers(Letters(), ["a"], [" b", " c"]), ("answers", "2")),
    *((f"delta {what}", lambda t, c=c: potara_lite.delta(c(t.one), t.adapted.scaling), ("adapter must have", said))
      for what, c, said in (("of half a layer", lambda v: dict(list(v.items())[1:]), "two factors"),
                            ("of two dtypes", entry(torch.Tensor.double, 0), "one dtype"),
                            ("of two ranks", entry(lambda x: x[:1], 0), "one rank"),
                            ("of vectors", lambda v: {n: x[0] for n, x in v.items()}, "two factors"))),
    ("stacks of three and two", lambda t: potara_lite.adapters.state.delta_inner_products(
        [t.local, {n: x[:2] for n, x in t.local.items()}], t.adapted.scaling), ("adapters[1]", "2 adapters for 3")),
    ("a mean of other tensors", lambda t: private(t, lambda v: v | {"x": v["base_model.model.head.bias"]}), ("'x'",)),
    ("a mean of fewer", lambda t: private(t, lambda v: dict(list(v.items())[1:])), ("uploads",)),
    ("a mean of turned ones", lambda t: private(t, entry(lambda x: x.mT, 0)), ("uploads", "lora_A")),
    ("noise of three", lambda t: with_noise(
        t.moments, [1.0, 2.0, 3.0]), ("variance", "(2,)")),
    ("bounds at three", lambda t: t.moments.bound([0.1, 0.2, 0.3]), ("weight", "(2,)")),
    ("a merge that is none", lambda t: merge_deltas(
        [t.local], t.adapted.scaling, len), ("function", "1")),
    ("tokens of true and false", lambda t: next_tokens(torch.ones(1, 2) > 0, torch.ones(1, 2)), ("input_ids", "bool")),
    ("an adapter of numbers", lambda t: t.adapted(entry(torch.Tensor.long)(t.one), t.split.x[0]), ("adapter",)),
    ("no adapter", lambda t: t.adapted(None, t.split.x[0]), ("adapter", "NoneType")),
    ("an input of text", lambda t: t.adapted.embed("x"), ("x must", "'x'")),
    ("a head that is a pattern", lambda t: attach(t.backbone, head="(h+)+"), ("head", "(h+)+")),
    ("a backbone's part", lambda t: t.adapted({}, t.split.x[0]), ("adapter", "tensors")),
    ("images of 32", lambda t: t.backbone(torch.zeros(2, 1, 32, 32)), ("images", "(2, 1, 32, 32)")),
    ("tokens of 3", lambda t: t.backbone(torch.zeros(2, 4, 3)), ("tokens", "(2, 4, 3)")),
    ("NaN losses", lambda t: potara_lite.evaluate(t.adapted, t.local, broken(t)), ("loss", "client 1")),
    ("NaN losses on the curve", lambda t: potara_lite.estimate_curve(
        t.adapted, t.federated, t.local, broken(t)), ("loss", "client 1")),
    ("half sums", lambda t: potara_lite.combine_adapters([halves(t)] * 2, [1.0, 1.0]), ("weights", "torch.float16")),
    ("an estimator that is none", lambda t: estimators.on_train(None), ("estimate", "None")),
    ("another that is none", lambda t: estimators.on_calibration("x"), ("estimate", "'x'")),
    ("estimators of a split", lambda t: potara_lite.ESTIMATORS["uniform"](
        t.adapted, t.federated, t.local, t.split), ("federation", "Split")),
    ("estimators of two clients", lambda t: potara_lite.ESTIMATORS["potara-paper"](
        t.adapted, t.federated, t.local, t.federation.rows([0, 1])), ("federated", "3 adapters for 2")),
    ("samples of two clients", lambda t: potara_lite.per_sample_gradients(
        t.adapted, t.local, t.split.rows([0, 1])), ("adapters", "3 adapters for 2")),
]  # fmt: skip


def config(**options):
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["fc1"], **options)


def broken(t):
    x = t.split.x.clone()
    x[1] = NAN
    return changed_split(t.split, x=x)


def private(t, change):
    from potara_lite.baselines.privacy import private_average

    return private_average(change(t.local), t.one, t.privacy, 0)


def halves(t):
    return entry(lambda tensor: tensor.half() + 40_000)({n: tensor.half() for n, tensor in t.local.items()})


@pytest.mark.parametrize("make, said", [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_what_is_wrong_in_other_ways_is_refused_in_one_line(make, said):
    with pytest.raises(ValueError) as caught:
        make(things())
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert all(part in message for part in said), (said, message)


def test_the_table_is_as_large_as_it_says():
    rows = sum(len(wrong_for(function, argument)) for function, argument in CASES)
    assert len(CALLS) > 100 and rows > 3000 and len(WRONG) > 250


# What is right, in other forms.


def test_a_weight_may_be_a_list_an_array_or_a_column():
    t = things()
    expected = potara_lite.merge_exact(t.federated, t.local, torch.tensor([0.0, 0.5, 1.0]))
    for form in (list, tuple, np.array, pd.Series, lambda w: torch.tensor(w), lambda w: torch.tensor(w).double()):
        merged = potara_lite.merge_exact(t.federated, t.local, form([0.0, 0.5, 1.0]))
        assert all(torch.equal(merged[name], expected[name]) for name in expected)
    half = potara_lite.merge_exact(t.federated, t.local, 0.5)
    for form in (np.float32(0.5), np.array(0.5), torch.tensor(0.5), dict.fromkeys(layers(), 0.5)):
        merged = potara_lite.merge_exact(t.federated, t.local, form)
        assert all(torch.equal(merged[name], half[name]) for name in half)


def test_numpys_numbers_are_taken_and_become_pythons():
    setting = Setting(clients=np.int64(3), lr=np.float32(0.5), rounds=np.uint8(2), shift=np.bool_(True))
    assert setting == Setting(clients=3, lr=0.5, rounds=2, shift=True)
    assert {type(value) for value in (setting.clients, setting.rounds)} == {int} and type(setting.lr) is float
    t, options = things(), dict(steps=np.int64(1), batch_size=np.int32(2), lr=np.float64(0.01))
    one = potara_lite.train(t.adapted, t.local, t.split, seed=np.int64(3), **options)
    two = potara_lite.train(t.adapted, t.local, t.split, seed=3, steps=1, batch_size=2, lr=0.01)
    assert torch.equal(one.losses, two.losses)
    assert repeat_adapter(t.one, np.int8(2)).keys() == t.one.keys()


def test_a_whole_number_may_be_a_rate_and_a_basis():
    assert Setting(lr=2**70).lr == 2.0**70 and type(Setting(lr=2**70).lr) is float
    one, turn = things().one, [[0, 1], [1, 0]]
    whole, floats = (potara_lite.change_basis(one, form) for form in (turn, torch.tensor(turn).float()))
    assert all(torch.equal(whole[name], floats[name]) for name in one)


def test_stacks_are_read_by_name_whatever_their_order():
    t = things()
    turned = dict(reversed(t.local.items()))
    for name in ("potara-paper", "potara-calibrated"):
        one, two = (
            potara_lite.ESTIMATORS[name](t.adapted, t.federated, stack, t.federation) for stack in (t.local, turned)
        )
        assert torch.equal(one.client_weight, two.client_weight)


def test_a_checksum_in_capitals_is_one(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    digest = "2D711642B726B04401627CA9FBAC32F5C8530FB1903CC4DB02258717921A4881"
    (tmp_path / "a.sha256").write_text(f"{digest}  a.bin\n")
    assert potara_lite.files.check_file(tmp_path / "a.bin") == tmp_path / "a.bin"


def test_a_check_cannot_look_inside_a_transform():
    """An objective of one's own may merge: there, values are those of all clients at once."""
    t = things()
    objective = lambda f, tensors: f(potara_lite.merge_exact(tensors, tensors, 0.5))  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that the clients run one after another
        trained = potara_lite.train(t.adapted, t.local, t.split, steps=1, objective=objective)
    assert trained.losses.isfinite().all()
    with pytest.raises(ValueError, match=r"weight must be in \[0, 1\], not 7"):
        potara_lite.train(t.adapted, t.local, t.split, steps=1,
                          objective=lambda f, tensors: f(potara_lite.merge_exact(tensors, tensors, 7)))  # fmt: skip


def test_a_checked_function_keeps_what_it_says_of_itself():
    @checked
    def step(lr: "Positive", seed: "Seed" = 0, **options):
        """One step."""
        return lr, seed, options

    assert step.__doc__.startswith("One step.\n\nBounds: ``lr`` above 0")
    assert list(signature(step).parameters) == ["lr", "seed", "options"]
    assert step(0.5, np.int64(3), anything=-1) == (0.5, 3, {"anything": -1})
    with pytest.raises(ValueError, match="lr must be above 0, not -0.1"):
        step(lr=-0.1)
    with pytest.raises(TypeError, match="missing a required argument: 'lr'"):
        step()


def test_what_was_given_is_shown_in_one_short_line():
    assert shown(torch.zeros(2, 3)) == "Tensor of shape (2, 3) and float32"
    assert shown(np.zeros(4)) == "ndarray of shape (4,) and float64"
    assert shown(-0.1) == "-0.1" and shown("x\ny") == r"'x\ny'" and len(shown([[1] * 99] * 99)) <= 80


# Whatever comes: refused in one line, or finite and right.


def outcome(make):
    """What the call gives, or ``None`` where it is refused, and with nothing else."""
    try:
        return make()
    except ValueError as error:
        assert "\n" not in str(error)
        return None


ODD = st.one_of(
    st.floats(width=32), st.floats(-2, 3), st.integers(-2, 3), st.booleans(), st.text(max_size=2), st.none(),
    st.complex_numbers(max_magnitude=2),
    st.lists(st.floats(-1, 2), max_size=4),
)  # fmt: skip
EXPLORED = settings(max_examples=150, deadline=None, derandomize=True)


def real_numbers(value):
    return not isinstance(value, bool | str | complex) and value is not None


@EXPLORED
@given(weight=ODD)
def test_no_weight_is_taken_that_is_not_one_in_0_to_1_for_every_client(weight):
    t = things()
    merged = outcome(lambda: potara_lite.merge_exact(t.federated, t.local, weight))
    listed = np.atleast_1d(weight) if real_numbers(weight) else np.array([NAN])
    right = listed.shape in ((1,), (3,)) and ((listed >= 0) & (listed <= 1)).all()
    right = right and not (isinstance(weight, list) and len(weight) != 3)
    assert (merged is not None) == right
    if right:
        head = "base_model.model.head.bias"
        w = torch.as_tensor(np.broadcast_to(listed, 3).copy()).float().unsqueeze(1)
        torch.testing.assert_close(merged[head], w * t.federated[head] + (1 - w) * t.local[head])


@EXPLORED
@given(a=ODD, b=ODD, c=ODD)
def test_no_moments_are_taken_without_a_weight_in_0_to_1(a, b, c):
    found = outcome(lambda: moments(a, b, c))
    if not all(map(real_numbers, (a, b, c))):
        assert found is None
    if found is not None:
        assert all(np.size(one) > 0 for one in (a, b, c)) and min(np.min(a), np.min(b)) >= 0
        assert ((found.weight >= 0) & (found.weight <= 1)).all() and not found.optimum.isnan().any()


@EXPLORED
@given(options=st.fixed_dictionaries({}, optional=dict(points=ODD, parabola=ODD)), clients=st.integers(1, 4))
def test_no_estimate_is_made_of_other_clients_or_with_odd_options(options, clients):
    t = things()
    stack = {name: tensor[[0, 1, 2, 0][:clients]] for name, tensor in t.local.items()}
    found = outcome(lambda: potara_lite.estimate_curve(t.adapted, t.federated, stack, t.split, **options))
    if clients != 3 or not isinstance(options.get("parabola", True), bool):
        assert found is None
    if found is not None:
        assert type(options.get("points", 2)) is int and options.get("points", 2) >= 2
        assert found.weight.shape == (3,) and ((found.weight >= 0) & (found.weight <= 1)).all()


@EXPLORED
@given(name=st.sampled_from(["damping", "prior", "clip", "step", "points", "tau", "sigma"]), value=ODD)
def test_no_odd_number_reaches_the_moments(name, value):
    t = things()
    calls = {
        "damping": lambda: estimators.fisher_moments(**gradients(t), damping=value).weight,
        "prior": lambda: estimators.laplace_moments(**gradients(t), examples=(t.sizes, t.sizes), prior=value).weight,
        "clip": lambda: estimators.fisher_moments(**gradients(t), clip=value).weight,
        "step": lambda: estimators.pooled_offset(*t.losses, t.sizes, step=value)[0],
        "points": lambda: potara_lite.weight_grid(value),
        "tau": lambda: estimators.pooled_weight(t.grid, t.losses, t.sizes, tau=value)[0],
        "sigma": lambda: estimators.pooled_weight(t.grid, t.losses, t.sizes, sigma=value)[0],
    }
    found = outcome(calls[name])
    if found is not None:
        numbers = value if name == "clip" else [value]
        assert all(type(one) in (int, float) and not np.isnan(one) for one in numbers)
        assert name == "clip" or value > 0 or (value == 0 and name in ("damping", "prior"))
        assert found.isfinite().all()


DTYPES = [torch.float32, torch.float64, torch.uint8, torch.int64, torch.bool, torch.complex64]


@EXPLORED
@given(
    x_dtype=st.sampled_from(DTYPES), y_dtype=st.sampled_from(DTYPES), low=st.sampled_from([-101, -100, -1, 0, 3]),
    shape=st.sampled_from([(4,), (4, 1), (4, 4), (3,), ()]), spoilt=st.sampled_from([0.0, NAN, INF]),
)  # fmt: skip
def test_no_examples_are_taken_that_are_not_finite_floats_with_labels(x_dtype, y_dtype, low, shape, spoilt):
    t = things()
    x = torch.rand(4, 1, 28, 28).to(x_dtype)
    x[1, 0, 2, 3] = spoilt if x_dtype.is_floating_point else 1
    y = torch.full(shape, low).to(y_dtype)
    found = outcome(lambda: Split([(x, y), (x, y)], ids=[4, 7]))
    right = y_dtype in (torch.uint8, torch.int64) and (low >= 0 or y_dtype == torch.uint8)
    right = right and x_dtype.is_floating_point and spoilt == 0 and shape == (4,)
    is_real = (
        y_dtype.is_floating_point and x_dtype.is_floating_point and spoilt == 0 and shape in [(4,), (4, 1), (4, 4)]
    )
    assert (found is not None) == (right or is_real)
    if right:
        assert torch.equal(found.x[0], x) and found.y.dtype == torch.int64 and (found.y == y.long()).all()
        outside = outcome(lambda: potara_lite.Federation(found, found, found, int(y.max()) or 1))
        assert (outside is None) == (int(y.max()) > 0) and t is not None


def test_checks_are_timed_wherever_the_library_calls_them_and_once():
    t, benchmark = things(), script("checks")
    before = library.check_arguments, state.check_models
    assert set(before) <= benchmark.checks()
    with benchmark.timed(benchmark.checks()) as calls:
        potara_lite.merge_exact(t.federated, t.local, 0.5)  # the arguments, and the weight of these adapters
        assert state.check_models is not before[1]
    assert len(calls) >= 2 and min(calls) > 0
    with benchmark.timed([library.check_arguments, state.check_models, state.check_adapter]) as calls:
        state.check_models(t.adapted, t.split, federated=t.federated, local=t.local)  # checks inside a check
    assert len(calls) == 1
    assert before == (library.check_arguments, state.check_models)


def test_the_measured_checks_take_less_than_a_hundredth_of_a_run():
    found = json.loads((ROOT / "benchmarks" / "checks.json").read_text())
    shares = sorted(run["in checks"] / run["seconds"] for run in found["runs"])
    assert shares[len(shares) // 2] == found["share"] and shares[-1] < 0.01
    assert len({run["checks"] for run in found["runs"]}) == 1
