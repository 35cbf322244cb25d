"""potara_lite: a notebook-first toolkit for personalised federated LoRA.

Each client of a federation gets a model merged from a federated LoRA model (general knowledge) and its own local one
(personal knowledge), with a closed-form mixing weight: Potara (arXiv 2602.18658). Every file is one idea; in reading
order:

    potara.py, door.py, setting.py, files.py, data.py, backbones.py, language.py, text_data.py, prefix.py,
    stacks.py, adapters.py, merging.py, moments.py, engine/loss.py, engine/one_batch.py, engine/batching.py,
    engine/training.py, engine/federated.py, engine/gradients.py, scoring.py, connectivity.py,
    estimators/estimate.py, estimators/gauss_newton.py, estimators/curve.py, estimators/combination.py,
    estimators/calibrated.py, estimators/paper.py, estimators/laplace.py, estimators/gradient.py,
    estimators/shrinkage.py, estimators/ensemble.py, experiment.py, results.py, run_folder.py, field/privacy.py,
    field/rounds.py, field/algorithms.py, field/baselines.py, field/methods.py, field/clusters.py, field/sweep.py,
    flower/plan.py, flower/client.py, flower/server.py, teaching/rows.py, teaching/plots.py,
    teaching/convex_head.py, teaching/widgets.py, teaching/explorers.py, teaching/bound_explorer.py,
    teaching/estimator_explorer.py, teaching/seeds_explorer.py, teaching/exercises/checking.py,
    teaching/exercises/quickstart.py, teaching/exercises/federated_lora.py, teaching/exercises/connectivity.py,
    teaching/exercises/bound.py, teaching/exercises/estimating.py, teaching/exercises/benchmark.py,
    teaching/exercises/your_own.py, teaching/exercises/language.py, __main__.py

What is below is imported when it is first used, so that ``import potara_lite`` costs nothing.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "setting": ["Setting"],
    "files": ["FileError"],
    "data": ["Federation", "Split", "fashion_mnist", "from_tensors", "from_torchvision", "partition"],
    "backbones": ["lab_vit", "torchvision_vit"],
    "language": ["causal_lm", "encode_answers", "encode_texts", "next_tokens", "text_encoder"],
    "text_data": ["Question", "read_task", "wordnet_glosses"],
    "prefix": ["linear_layers"],
    "adapters": [
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
    "merging": ["change_basis", "combine_adapters", "compress", "merge_exact", "merge_factors"],
    "moments": ["Moments", "combination_weights"],
    "engine.batching": ["Execution"],
    "engine.training": ["DivergedError", "evaluate", "train"],
    "engine.federated": ["Ledger", "fedit"],
    "engine.gradients": ["diagonal_fisher", "per_sample_gradients"],
    "scoring": ["exact_match", "multiple_choice", "write_answers"],
    "connectivity": ["along_plane", "along_segment", "barrier", "weight_grid"],
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
    "field.rounds": ["Algorithm", "Phase", "run_algorithm"],
    "field.methods": ["METHODS"],
    "field.sweep": ["sweep"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
