"""The door: every public function against bad input, argument by argument; what is taken; memory; order of clients."""

import copy
import importlib
import re
from functools import cache
from inspect import isfunction, signature
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_federation, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from test_project import FILES, module_name

import potara_lite
from potara_lite import estimators
from potara_lite.adapters import attach, client_adapter, repeat_adapter
from potara_lite.data import Split
from potara_lite.door import door, options_of, shown, unchecked
from potara_lite.engine.training import OptimizerState
from potara_lite.setting import Setting
from potara_lite.stacks import lora_layers
from potara_lite.text_data import Question

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
    from potara_lite.experiment import Pair, Result, Trial
    from potara_lite.field.algorithms import FEDIT
    from potara_lite.field.privacy import Privacy
    from potara_lite.moments import Moments

    t = SimpleNamespace(backbone=tiny_vit(), federation=tiny_federation(torch.float32))
    t.adapted, t.split = attach(t.backbone, rank=2, alpha=3), t.federation.calibration
    t.one, t.federated, t.local = (random_like(t.adapted.initial, n, seed) for n, seed in ((0, 0), (3, 1), (3, 2)))
    t.small = client_adapter({name: tensor.clone() for name, tensor in t.local.items()}, 0)
    t.gradients = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    t.sizes, t.grid = torch.tensor([3, 6, 4]), torch.linspace(0, 1, 3)
    t.losses = torch.rand(3, 3, 6, generator=torch.Generator().manual_seed(1))
    t.flat = torch.cat([tensor.flatten(1) for tensor in t.local.values()], 1)
    t.pool = torch.rand(60, 1, 28, 28), torch.arange(60) % 4
    t.ledger = potara_lite.Ledger.zeros(3)
    t.pair = Pair(t.federated, t.local, (t.ledger, t.ledger), (0.0, 0.0))
    t.trial, t.result = Trial(t.adapted, t.federation, TINY, 0), Result(t.adapted, t.local, t.ledger, 0.0)
    t.moments, t.privacy, t.fedit = Moments([1.0, 2.0], [2.0, 1.0], [0.0, 0.5]), Privacy(1.0, 1.0, 0), FEDIT
    t.speaker = attach(Speaker(), targets=["out"], head=None, rank=2)
    t.voices = repeat_adapter(t.speaker.initial, 2)
    t.questions = [[Question("is it", "yes", ("yes", "no"))]] * 2
    t.rows = pd.DataFrame(
        [(f, m, s, c, 0.5 + 0.1 * c + 0.05 * s, 1.0 + c, 0.5, 1, 1, 1, 1.0, 0.4, 2.0)
         for f in ("one",) for m in ("local", "other") for s in (0, 1) for c in (0, 1)],
        columns="federation method seed client accuracy loss weight bytes_up bytes_down steps seconds union_accuracy "
                "union_loss".split(),
    )  # fmt: skip
    return t


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
    "data.batch_indices": lambda t: dict(size=5, start=0, steps=2, batch_size=2, seed=0),
    "data.dirichlet_proportions": lambda t: dict(clients=2, classes=3, alpha=1.0, rng=np.random.default_rng(0)),
    "data.shift_images": lambda t: dict(x=t.pool[0], client=1, clients=2),
    "data.partition": lambda t: dict(
        pool=t.pool, test_pool=t.pool, classes=4, clients=2, train_size=3, calibration_size=2, test_size=2, alpha=INF,
        shift=False, seed=0, name="x",
    ),
    "data.fashion_mnist": lambda t: dict(clients=2, train_size=2, calibration_size=2, test_size=2, alpha=1.0, seed=0),
    "data.from_torchvision": lambda t: dict(dataset="CIFAR10", root="nowhere", download=False, clients=2, alpha=1.0),
    "data.from_tensors": lambda t: dict(
        train=[t.split.client(i) for i in range(3)], test=[t.split.client(i) for i in range(3)], calibration_size=1,
        classes=4, seed=0, name="x",
    ),
    "backbones.lab_vit": lambda t: dict(classes=4, checkpoint=None),
    "backbones.torchvision_vit": lambda t: dict(name="vit_b_32", classes=4, weights=None),
    "language.text_encoder": lambda t: dict(name_or_path="nowhere", classes=4),
    "language.causal_lm": lambda t: dict(name_or_path="nowhere"),
    "language.text_tokenizer": lambda t: dict(name_or_path="nowhere"),
    "language.pad_tokens": lambda t: dict(rows=[[1, 2], [3]]),
    "language.encode_texts": lambda t: dict(tokenizer=Letters(), texts=["a b", "c"], max_length=8),
    "language.encode_answers": lambda t: dict(tokenizer=Letters(), prompts=["a"], answers=[" b"], max_length=8),
    "text_data.with_tokens": lambda t: dict(federation=t.federation, texts=["a"], tokenizer=Letters(), longest=4),
    "text_data.domain_proportions": lambda t: dict(names=["animal", "act", "shape"], clients=2),
    "text_data.wordnet_glosses": lambda t: dict(tokenizer=Letters(), longest=4, domains=False, clients=2, test_size=4),
    "text_data.read_task": lambda t: dict(path="nowhere", seed=0),
    "prefix.linear_layers": lambda t: dict(network=t.backbone, last=1),
    "adapters.attach": lambda t: dict(
        backbone=t.backbone, rank=2, alpha=3.0, targets=["fc1"], head="head", seed=0, config=None
    ),
    "adapters.delta": lambda t: dict(adapter=t.one, scaling=t.adapted.scaling),
    "adapters.delta_inner_products": lambda t: dict(adapters=[t.local, t.federated], scaling=t.adapted.scaling),
    "adapters.stack_adapters": lambda t: dict(adapters=[t.one, t.small]),
    "adapters.repeat_adapter": lambda t: dict(adapter=t.one, clients=2),
    "adapters.client_adapter": lambda t: dict(stack=t.local, client=1),
    "adapters.adapter_bytes": lambda t: dict(adapter=t.one),
    "merging.combine_adapters": lambda t: dict(adapters=[t.local, t.federated], weights=[0.5, -1.0]),
    "merging.merge_exact": lambda t: merged_pair(t) | dict(weight=0.5),
    "merging.merge_factors": lambda t: merged_pair(t) | dict(weight=torch.tensor([0.1, 0.5, 1.0])),
    "merging.change_basis": lambda t: dict(adapter=t.one, matrix=torch.tensor([[0.0, 1.0], [1.0, 0.0]])),
    "merging.compress": lambda t: dict(adapter=t.one, rank=1),
    "moments.combination_weights": lambda t: dict(moments=torch.tensor([[2.0, 0.0], [0.0, 1.0]]), nonnegative=True),
    "engine.federated.weighted_average": lambda t: dict(stack=t.local, weights=t.sizes),
    "engine.federated.participants": lambda t: dict(ids=[0, 1, 2], participation=0.5, seed=0, number=0),
    "engine.federated.fedit": lambda t: dict(
        adapted=t.adapted, split=t.split, rounds=1, local_steps=1, participation=1.0, keep_optimizer=True,
        adapter=t.one, start=0, state=None, seed=0, progress=False, lr=0.01, batch_size=2,
    ),
    "engine.training.train": lambda t: run(t) | dict(
        steps=1, batch_size=2, lr=0.01, weight_decay=0.0, clip=1.0, seed=0, start=0, state=None, loss=None_loss,
        execution=potara_lite.Execution(), progress=False,
    ),
    "engine.training.evaluate": lambda t: run(t) | dict(batch_size=4, execution=potara_lite.Execution()),
    "engine.gradients.per_sample_gradients": lambda t: run(t) | dict(
        labels=t.split.y, execution=potara_lite.Execution()
    ),
    "engine.gradients.delta_gradients": lambda t: run(t) | dict(labels=t.split.y),
    "engine.gradients.diagonal_fisher": lambda t: dict(gradients=t.gradients, sizes=t.sizes),
    "engine.gradients.directional_derivatives": lambda t: run(t) | dict(
        direction=t.flat, execution=potara_lite.Execution()
    ),
    "scoring.log_likelihoods": lambda t: run(t) | dict(batch_size=4, execution=potara_lite.Execution()),
    "scoring.multiple_choice": lambda t: spoken(t) | dict(questions=t.questions, tokenizer=Letters(), max_length=16),
    "scoring.greedy_tokens": lambda t: spoken(t) | dict(
        prompts=[{"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 1]])}] * 2, steps=1, end=0,
        batch_size=2, execution=potara_lite.Execution(),
    ),
    "scoring.write_answers": lambda t: spoken(t) | dict(
        prompts=[["ab"], ["b"]], tokenizer=Letters(), steps=1, until="!", max_length=8
    ),
    "scoring.exact_match": lambda t: dict(found=["a"], expected=[["a", "b"]]),
    "connectivity.weight_grid": lambda t: dict(points=3),
    "connectivity.along_segment": lambda t: estimated(t) | dict(
        weights=t.grid, merge=potara_lite.merge_exact, batch_size=4
    ),
    "connectivity.barrier": lambda t: dict(loss=t.losses[..., 0], weights=t.grid),
    "connectivity.along_plane": lambda t: estimated(t) | dict(x=[0.0, 1.0], y=[0.5], batch_size=4),
    "estimators.estimate_calibrated": estimated,
    "estimators.estimate_pooled": lambda t: estimated(t) | dict(points=3, probe=0.3, by=estimators.head_and_body),
    "estimators.pooled_weight": lambda t: dict(
        weights=t.grid, losses=t.losses, sizes=t.sizes, spread=0.1, prior_spread=0.3
    ),
    "estimators.pooled_offset": lambda t: dict(
        low=t.losses[0], middle=t.losses[1], high=t.losses[2], sizes=t.sizes, probe=0.3, spread=0.2
    ),
    "estimators.estimate.estimate_uniform": estimated,
    "estimators.gauss_newton.moments_from_slopes": lambda t: dict(
        at_local=torch.tensor([-1.0, 0.0]), curvature=torch.tensor([1.0, 2.0])
    ),
    "estimators.gauss_newton.estimate_gauss_newton": lambda t: estimated(t) | dict(by=None),
    "estimators.curve.estimate_curve": lambda t: estimated(t) | dict(points=3, parabola=True),
    "estimators.curve.parabola_moments": lambda t: dict(weights=t.grid, loss=t.losses[..., 0]),
    "estimators.curve.client_losses": run,
    "estimators.curve.segment_losses": lambda t: estimated(t) | dict(weights=t.grid),
    "estimators.curve.client_logits": run,
    "estimators.ensemble.estimate_ensemble": lambda t: dict(
        adapted=t.adapted, runs=[(t.federated, t.local)], optimum=t.federated, split=t.split
    ),
    "estimators.gradient.gradient_moments": lambda t: gradients(t) | dict(
        unbiased=True, damping=0.1, cross_fit=False, groups=None
    ),
    "estimators.gradient.estimate_gradient": lambda t: estimated(t) | dict(
        unbiased=True, damping=0.1, cross_fit=False, by=None
    ),
    "estimators.laplace.laplace_moments": lambda t: gradients(t) | dict(
        examples=(t.sizes, t.sizes), prior=1.0, clip=(0.0, 1.0), groups=torch.tensor([0, 0, 1, 1, 0])
    ),
    "estimators.laplace.estimate_laplace": lambda t: estimated(t) | dict(
        train_sizes=torch.tensor([5, 13, 9]), prior=1.0, by=None
    ),
    "estimators.paper.fisher_moments": lambda t: gradients(t) | dict(
        damping=0.1, relative=True, clip=(0.0, 1.0), groups=None
    ),
    "estimators.paper.fisher_diagonals": gradients,
    "estimators.paper.estimate_paper": lambda t: estimated(t) | dict(
        damping=0.1, relative=True, clip=(0.0, 1.0), sample_labels=0, on_delta=False, by=None
    ),
    "estimators.shrinkage.shrinkage_moments": lambda t: dict(
        variance=torch.tensor([1.0, 2.0]), distance=torch.tensor([2.0, 1.0])
    ),
    "estimators.shrinkage.estimate_shrinkage": lambda t: estimated(t) | dict(
        train_sizes=torch.tensor([5, 13, 9]), damping=0.1
    ),
    "experiment.prepare": lambda t: dict(setting=TINY, seed=0),
    "experiment.prepare_images": lambda t: dict(setting=TINY, seed=0),
    "experiment.prepare_text": lambda t: dict(setting=TINY, seed=0),
    "experiment.training_options": lambda t: dict(setting=TINY, lr_scale=2.0),
    "experiment.train_pair": lambda t: dict(
        adapted=t.adapted, federation=t.federation, setting=TINY, seed=0, progress=False
    ),
    "experiment.train_local": lambda t: dict(
        adapted=t.adapted, start=t.local, federation=t.federation, setting=TINY, seed=0, progress=False
    ),
    "experiment.one_of_pair": lambda t: dict(which=0),
    "experiment.local_from_federated": lambda t: dict(lr_scale=1.0),
    "experiment.merging": lambda t: dict(merge=len, pair_of=len),
    "experiment.with_estimator": lambda t: dict(estimator=len, merge=len, pair_of=len),
    "experiment.oracle_weight": lambda t: dict(weights=t.grid, loss=t.losses[..., 0]),
    "experiment.run_methods": lambda t: dict(setting=TINY, seeds=[0], methods={"x": len}, prepare=len, progress=False),
    "results.result_rows": lambda t: dict(method="x", trial=t.trial, result=t.result, split=t.split),
    "results.compare": lambda t: dict(setting=TINY, seeds=[0], methods={"x": lambda trial: t.result}),
    "results.summary": lambda t: dict(rows=t.rows),
    "results.leaderboard": lambda t: dict(rows=t.rows, local="local"),
    "results.pareto_front": lambda t: dict(board=potara_lite.leaderboard(t.rows), references=()),
    "results.paired_differences": lambda t: dict(rows=t.rows, method="local", score="loss"),
    "field.privacy.private_average": lambda t: dict(uploads=t.local, sent=t.one, privacy=t.privacy, number=0),
    "field.privacy.epsilon": lambda t: dict(noise_multiplier=1.0, rounds=2, delta=1e-5),
    "field.privacy.noise_multiplier_for": lambda t: dict(target=8.0, rounds=2, delta=1e-5),
    "field.privacy.noise_moment": lambda t: dict(adapter=t.one, scaling=t.adapted.scaling, std=0.1, noisy=bool),
    "field.privacy.with_noise": lambda t: dict(moments=t.moments, variance=1.0),
    "field.rounds.run_algorithm": lambda t: dict(
        algorithm=t.fedit, adapted=t.adapted, split=t.split, rounds=1, local_steps=1, participation=1.0, seed=0,
        progress=False, lr=0.01, batch_size=2,
    ),
    "field.algorithms.fedprox": lambda t: dict(mu=0.1),
    "field.algorithms.finetuned": lambda t: dict(algorithm=t.fedit, steps=1),
    "field.algorithms.wise_ft": lambda t: dict(algorithm=t.fedit, steps=1, weight=0.5),
    "field.algorithms.flexlora": lambda t: dict(ranks=[1, 2]),
    "field.algorithms.fedrep": lambda t: dict(head_share=0.5),
    "field.algorithms.ditto": lambda t: dict(strength=0.1),
    "field.algorithms.apfl": lambda t: dict(weight=0.5, adaptive=True),
    "field.algorithms.feddpa": lambda t: dict(weight=0.5),
    "field.algorithms.gated": lambda t: dict(adapted=t.adapted),
    "field.baselines.task_arithmetic": lambda t: dict(models=[t.federated, t.local], coefficient=0.5),
    "field.baselines.fisher_merge": lambda t: dict(
        models=[t.federated, t.local], fishers=[t.flat.square(), t.flat.square()]
    ),
    "field.baselines.layer_grams": lambda t: run(t) | dict(batch_size=4),
    "field.baselines.regmean": lambda t: dict(
        models=[t.federated, t.local], grams=[{"x": torch.eye(2).repeat(3, 1, 1)}] * 2, off_diagonal=0.9
    ),
    "field.baselines.merge_deltas": lambda t: dict(
        models=[t.federated, t.local], scaling=t.adapted.scaling, function=lambda vectors: vectors.mean(0)
    ),
    "field.baselines.ties": lambda t: dict(vectors=t.gradients, density=0.5, coefficient=1.0),
    "field.baselines.dare": lambda t: dict(vectors=t.gradients, drop=0.5, seed=0),
    "field.methods.finetuned_after": lambda t: dict(algorithm=t.fedit, lr_scale=1.0, rounds_scale=1.0),
    "field.methods.from_algorithm": lambda t: dict(algorithm=t.fedit, lr_scale=1.0),
    "field.methods.wise_ft": lambda t: dict(weight=0.5, lr_scale=1.0, rounds_scale=1.0),
    "field.methods.local_training": lambda t: dict(lr_scale=1.0),
    "field.methods.merging_entries": lambda t: dict(function=len),
    "field.sweep.union": lambda t: dict(split=t.split, per_client=2),
    "field.sweep.sweep": lambda t: dict(
        methods={"x": len}, settings={"x": TINY}, seeds=[0], folder="nowhere", eval_split=len, union_size=2,
        prepare=len, shard=(0, 1), progress=False,
    ),
    "field.sweep.read_results": lambda t: dict(folder="nowhere"),
}  # fmt: skip
NOT_RUN = {  # right, but slow, in need of a download or of more than a tiny stub
    "data.from_torchvision", "language.text_encoder", "language.causal_lm", "language.text_tokenizer",
    "text_data.read_task", "text_data.with_tokens", "experiment.prepare_text", "experiment.run_methods",
    "backbones.torchvision_vit", "scoring.log_likelihoods", "field.privacy.epsilon",
    "field.privacy.noise_multiplier_for", "field.sweep.sweep", "field.baselines.regmean",
}  # fmt: skip


def None_loss(logits, y):
    return torch.nn.functional.cross_entropy(logits, y)
