"""potara_lite: a notebook-first toolkit for personalised federated LoRA.

Each client of a federation gets a model merged from a federated LoRA model (general knowledge) and its own local one
(personal knowledge), with a closed-form mixing weight: Potara (arXiv 2602.18658). Every file is one idea; in reading
order:

    potara.py, door.py, setting.py, files.py, data.py, backbones.py, language.py, text_data.py, prefix.py,
    stacks.py, adapters.py, merging.py, moments.py, training/loss.py, training/grouped_lora.py, training/batching.py,
    training/train.py, training/fedavg.py, training/gradients.py, scoring.py, connectivity.py,
    estimators/estimate.py, estimators/gauss_newton.py, estimators/curve.py, estimators/combination.py,
    estimators/calibrated.py, estimators/paper.py, estimators/laplace.py, estimators/gradient.py,
    estimators/shrinkage.py, estimators/ensemble.py, experiment.py, results.py, run_folder.py, baselines/privacy.py,
    baselines/rounds.py, baselines/algorithms.py, baselines/merges.py, baselines/methods.py, baselines/clusters.py, baselines/sweep.py,
    deployment/run_config.py, deployment/client.py, deployment/server.py, course/rows.py, plots.py,
    course/convex_head.py, course/widgets.py, course/explorers.py, course/bound_explorer.py,
    course/estimator_explorer.py, course/seeds_explorer.py, course/exercises/checking.py,
    course/exercises/quickstart.py, course/exercises/federated_lora.py, course/exercises/connectivity.py,
    course/exercises/bound.py, course/exercises/estimating.py, course/exercises/benchmark.py,
    course/exercises/your_own.py, course/exercises/language.py, __main__.py

What is below is imported when it is first used, so that ``import potara_lite`` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "setting": ["Setting"],
    "files": ["FileError"],
    "federation.split": ["Federation", "Split", "fashion_mnist", "from_tensors", "from_torchvision", "partition"],
    "models.vit": ["lab_vit", "torchvision_vit"],
    "models.language": ["causal_lm", "encode_answers", "encode_texts", "next_tokens", "text_encoder"],
    "federation.tasks": ["Question", "read_task", "wordnet_glosses"],
    "models.frozen_trunk": ["linear_layers"],
    "adapters.lora": [
        "AdaptedBackbone",
        "adapter_bytes",
        "attach",
        "client_adapter",
        "delta",
        "load_adapter",
        "repeat_adapter",
        "save_adapter",
        "stack_adapters",
    ],
    "merging.merge": ["change_basis", "combine_adapters", "compress", "merge_exact", "merge_factors"],
    "estimators.moments": ["Moments", "combination_weights"],
    "training.batching": ["Execution"],
    "training.train": ["DivergedError", "evaluate", "train"],
    "training.fedavg": ["Ledger", "fedit"],
    "training.gradients": ["diagonal_fisher", "per_sample_gradients"],
    "training.scoring": ["exact_match", "multiple_choice", "write_answers"],
    "merging.connectivity": ["along_plane", "along_segment", "barrier", "weight_grid"],
    "estimators": [
        "ESTIMATORS",
        "Estimate",
        "estimate_calibrated",
        "estimate_curve",
        "estimate_paper",
        "estimate_pooled",
        "estimate_uniform",
    ],
    "experiment": ["Pair", "Result", "Trial", "prepare", "train_pair"],
    "results": ["compare", "leaderboard", "paired_differences", "summary"],
    "baselines.rounds": ["Algorithm", "Phase", "run_algorithm"],
    "baselines.methods": ["METHODS"],
    "baselines.sweep": ["sweep"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
