"""potara_lite: a notebook-first toolkit for personalised federated LoRA.

Each client of a federation gets a model merged from a federated LoRA model (general knowledge) and its own local one
(personal knowledge), with a closed-form mixing weight: Potara (arXiv 2602.18658). In reading order:

    potara.py       the method in one file: the reference implementation
    setting.py      one federation and how its models are trained
    checks.py       types of arguments: what they may be
    files.py        reading, writing in one step, one folder for one run
    compat.py       what touches the insides of torch, transformers and PEFT
    federation/     clients and their examples
    models/         frozen backbones
    adapters/       LoRA on a backbone; adapters as dictionaries of tensors and as folders
    training/       train and evaluate all clients at once; per-sample gradients
    merging/        merge adapters, compress them, loss between two models
    estimators/     from moments to the mixing weight
    experiment.py   one federation and seed: its two models, and the methods that merge them
    results.py      tables of results
    plots.py        figures
    baselines/      the methods that Potara is compared with
    deployment/     the same rounds between machines, with Flower
    course/         widgets and exercises of the notebooks
    __main__.py     the command

A name is imported from its module when it is first used, so that ``import potara_lite`` costs nothing.
"""

import ast
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# A thread that waits soon leaves its core to others (GNU's OpenMP reads this when torch is loaded; what you set stays).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


@contextmanager
def _without_collector() -> Iterator[None]:
    """For imports: the garbage collector would look through all that is imported again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


if TYPE_CHECKING:  # what type checkers and editors see; at run time the same lines say where a name is
    from .adapters.files import (
        export_merged as export_merged,
        load_adapter as load_adapter,
        save_adapter as save_adapter,
        save_adapters as save_adapters,
    )
    from .adapters.lora import AdaptedBackbone as AdaptedBackbone, attach as attach
    from .adapters.state import (
        adapter_bytes as adapter_bytes,
        client_adapter as client_adapter,
        cut_ranks as cut_ranks,
        delta as delta,
        repeat_adapter as repeat_adapter,
        stack_adapters as stack_adapters,
    )
    from .baselines.methods import METHODS as METHODS
    from .baselines.rounds import Algorithm as Algorithm, Phase as Phase, run_algorithm as run_algorithm
    from .baselines.sweep import sweep as sweep
    from .estimators import (
        ESTIMATORS as ESTIMATORS,
        Estimate as Estimate,
        estimate_calibrated as estimate_calibrated,
        estimate_curve as estimate_curve,
        estimate_paper as estimate_paper,
        estimate_pooled as estimate_pooled,
        estimate_uniform as estimate_uniform,
    )
    from .estimators.folders import (
        FolderMerge as FolderMerge,
        combine_folders as combine_folders,
        merge_folders as merge_folders,
    )
    from .estimators.moments import Moments as Moments, combination_weights as combination_weights
    from .experiment import (
        ModelPair as ModelPair,
        Result as Result,
        Run as Run,
        prepare as prepare,
        train_pair as train_pair,
    )
    from .federation.huggingface import from_huggingface as from_huggingface
    from .federation.partition import partition as partition
    from .federation.sources import (
        fashion_mnist as fashion_mnist,
        from_dataframe as from_dataframe,
        from_datasets as from_datasets,
        from_tensors as from_tensors,
        from_torchvision as from_torchvision,
    )
    from .federation.split import Federation as Federation, Split as Split
    from .federation.tasks import Question as Question, read_task as read_task, wordnet_glosses as wordnet_glosses
    from .federation.text import (
        encode_answers as encode_answers,
        encode_texts as encode_texts,
        next_tokens as next_tokens,
    )
    from .files import FileError as FileError
    from .merging.connectivity import (
        along_plane as along_plane,
        along_segment as along_segment,
        barrier as barrier,
        weight_grid as weight_grid,
    )
    from .merging.merge import (
        change_basis as change_basis,
        combine_adapters as combine_adapters,
        compress as compress,
        merge_exact as merge_exact,
        merge_factors as merge_factors,
    )
    from .models.frozen_trunk import linear_layers as linear_layers
    from .models.language import causal_lm as causal_lm, text_encoder as text_encoder
    from .models.loss import Task as Task
    from .models.vit import lab_vit as lab_vit, torchvision_vit as torchvision_vit
    from .results import (
        compare as compare,
        leaderboard as leaderboard,
        paired_differences as paired_differences,
        summary as summary,
    )
    from .setting import Setting as Setting
    from .training.batching import Execution as Execution
    from .training.checkpoint import load_state as load_state, save_state as save_state
    from .training.fedavg import Ledger as Ledger, fedit as fedit
    from .training.gradients import diagonal_fisher as diagonal_fisher, per_sample_gradients as per_sample_gradients
    from .training.scoring import (
        exact_match as exact_match,
        multiple_choice as multiple_choice,
        write_answers as write_answers,
    )
    from .training.train import (
        DivergedError as DivergedError,
        epoch_steps as epoch_steps,
        evaluate as evaluate,
        train as train,
    )


else:

    def _module_of() -> dict[str, str]:
        """The module of every public name, read from the imports above."""
        source = ast.parse(Path(__file__).read_text("utf-8"))
        imports = [node for node in ast.walk(source) if isinstance(node, ast.ImportFrom) and node.level]
        return {name.name: f".{node.module}" for node in imports for name in node.names}

    _MODULE_OF = _module_of()
    __all__ = sorted(_MODULE_OF)

    def __getattr__(name: str):
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with _without_collector():
            return getattr(import_module(_MODULE_OF[name], __name__), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
