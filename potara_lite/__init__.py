"""potara_lite: a notebook-first toolkit for personalised federated LoRA.

Each client of a federation gets a model merged from a federated LoRA model (general knowledge) and its own local one
(personal knowledge), with a closed-form mixing weight: Potara (arXiv 2602.18658). Every file is one idea; read them in
the order ``data, backbones, adapters, grouped, batching, training, federated, fisher, mixing, merging, connectivity,
benchmark``. The methods that it is compared with are in ``rounds, algorithms, baselines, methods, sweep``.
"""

from .adapters import AdaptedBackbone, attach, delta, load_adapter, nbytes, repeat_adapter, save_adapter, stack_adapters
from .backbones import lab_vit, torchvision_vit
from .benchmark import Setting, compare, prepare, summary, train_pair
from .connectivity import along_segment, barrier, grid
from .data import Federation, Split, fashion_mnist, from_tensors, from_torchvision, partition
from .estimators import Estimate, estimate_curve, estimate_fisher, estimate_pooled, estimate_uniform
from .federated import fedit
from .fisher import diagonal_fisher, per_sample_gradients
from .merging import combine, compress, merge_exact, merge_factors
from .mixing import Moments, combination_weights
from .rounds import Algorithm, Personalised, Phase, run
from .training import DivergedError, evaluate, train, train_sequentially

__version__ = "0.1.0"

__all__ = [
    "AdaptedBackbone",
    "Algorithm",
    "DivergedError",
    "Estimate",
    "Federation",
    "Moments",
    "Personalised",
    "Phase",
    "Setting",
    "Split",
    "along_segment",
    "attach",
    "barrier",
    "combination_weights",
    "combine",
    "compare",
    "compress",
    "delta",
    "diagonal_fisher",
    "estimate_curve",
    "estimate_fisher",
    "estimate_pooled",
    "estimate_uniform",
    "evaluate",
    "fashion_mnist",
    "fedit",
    "from_tensors",
    "from_torchvision",
    "grid",
    "lab_vit",
    "load_adapter",
    "merge_exact",
    "merge_factors",
    "nbytes",
    "partition",
    "per_sample_gradients",
    "prepare",
    "repeat_adapter",
    "run",
    "save_adapter",
    "stack_adapters",
    "summary",
    "torchvision_vit",
    "train",
    "train_pair",
    "train_sequentially",
]
