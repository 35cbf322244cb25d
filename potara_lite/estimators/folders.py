"""Merge adapters that others trained: PEFT folders of one base, weighed by a few held-out examples.

The examples choose the weights and also show what the merge is worth. On the examples that chose it, a merge looks too
good; so each example is judged by a merge that others chose (cross-fitting), and ``interval_of_choice`` is wider than
that of a weight which was known before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ..adapters.files import folder_config, load_adapter, read_options, save_adapter, trained_tensors
from ..adapters.lora import AdaptedBackbone, attach
from ..adapters.state import Adapter, factor_names, factors, lora_layers, repeat_adapter
from ..checks import Fraction, List, Numbers, PathLike, Size, checked, invalid, shown
from ..federation.inputs import ExamplesPair, check_examples, is_float, take
from ..federation.split import Split
from ..federation.tasks import read_task
from ..federation.text import encode_answers, encode_texts
from ..merging.merge import combine_adapters, compress, drop_empty_ranks, merge_exact
from ..models.language import TextClassifier, causal_lm, sequence_classifier, text_encoder, text_tokenizer
from .calibrated import estimate_calibrated
from .combination import estimate_combination
from .curve import client_losses, estimate_curve
from .estimate import Estimate, estimate_uniform
from .gauss_newton import estimate_gauss_newton
from .paper import estimate_paper

if TYPE_CHECKING:
    import pandas as pd

ESTIMATORS_OF_ONE: dict[str, Callable[..., Estimate]] = {  # those that a client can use without any other
    "calibrated": estimate_calibrated,
    "curve": estimate_curve,
    "gauss-newton": estimate_gauss_newton,
    "paper": estimate_paper,
    "uniform": estimate_uniform,
}
Interval = tuple[float, float, float]  # the estimate, and the two ends


@dataclass(frozen=True, repr=False)
class FolderMerge:
    """What ``merge_folders`` and ``combine_folders`` return.

    ``weights``: of each adapter, by its name; where an estimator has one for the head and one for the body, their
    common one. ``adapter``: the merge, for ``adapted``, in float32. ``losses``: mean losses (nats) on the examples, of
    each adapter, of ``equal`` weights and of the ``merge``, each example's by a merge that other examples chose.
    ``differences``: the merge minus each other one, with the ends of a 95 % confidence interval. ``error``: the largest
    relative error ``|dW - dW_r| / |dW|`` of a layer where the merge was compressed. ``folder``: where it was written.
    """

    adapted: AdaptedBackbone
    adapter: Adapter
    weights: dict[str, float]
    losses: dict[str, float]
    differences: dict[str, Interval]
    examples: int
    error: float = 0.0
    folder: Path | None = None

    @property
    def weight(self) -> float:
        """λ, the weight of the first adapter: of ``merge_folders``, on the federated model."""
        return next(iter(self.weights.values()))

    def __repr__(self) -> str:
        weights = " + ".join(f"{weight:.2f} {name}" for name, weight in self.weights.items())
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items())
        where = "" if self.folder is None else f", in {str(self.folder)!r}"
        return f"FolderMerge({weights}; loss on {self.examples} examples: {losses}{where})"

    def to_frame(self) -> pd.DataFrame:
        """A row for each adapter, for equal weights and for the merge: its weight, its loss in nats, and how much the
        merge's loss differs from it, with the ends of the interval."""
        import pandas as pd

        rows = [
            (self.weights.get(name), loss, *self.differences.get(name, (None, None, None)))
            for name, loss in self.losses.items()
        ]
        columns = ["weight", "loss", "merge minus it", "from", "to"]
        return pd.DataFrame(rows, columns=columns, index=list(self.losses), dtype=float)


@checked
def merge_folders(
    base: nn.Module,
    federated: PathLike,
    local: PathLike,
    examples: ExamplesPair,
    *,
    weight: Fraction | str | Callable = "calibrated",
    rank: Size | None = None,
    out: PathLike | None = None,
    folds: Annotated[Size, Field(ge=2)] = 5,
) -> FolderMerge:
    """Merge two PEFT folders of one base, ``λ * dW_F + (1 - λ) * dW_L``, with a λ that held-out ``examples`` choose.

    ``base``: the model that both were trained on, without adapters; it stays as it is. The adapters may differ in rank,
    alpha, rsLoRA and layers: a layer that one does not adapt has ``dW = 0`` there, a module that one did not train is
    the base's. ``examples``: inputs and labels as ``Split`` has them, 2 or more, that trained neither model.
    ``weight``: λ on ``federated`` as a number, the name of one of ``ESTIMATORS_OF_ONE``, or an estimator of your own
    like them. The merge is exact, of the sum of the ranks; ``rank`` compresses it (``compress``). ``out``: a folder,
    written for stock PEFT.

    ``losses["merge"]`` is cross-fitted in ``folds``: each example's loss is that of a merge which the others chose, so
    it estimates the loss on new examples; on its own examples, the written merge has a lower one. The intervals
    (``interval_of_choice``) hold for λ as it was chosen. Cost: ``1 + folds`` times the estimator's.

    Raises ``FileError`` for a folder that is missing, damaged or of another base, ``ValueError`` for what cannot be
    merged.
    """
    estimator = _estimator(weight)
    folds = 1 if isinstance(weight, float) else folds
    names = ("federated", "local")
    adapted, adapters, split = _prepared(base, "federated and local", [federated, local], examples, out)
    stacks = [repeat_adapter(adapter, 1) for adapter in adapters]

    def fit(part: Split) -> tuple[Adapter, list[float]]:
        estimate = estimator(adapted, *stacks, part)
        merged = merge_exact(*stacks, estimate.weight)
        found = float(estimate.client_weight)
        return {name: tensor[0] for name, tensor in merged.items()}, [found, 1 - found]

    return _merge(adapted, dict(zip(names, adapters)), split, fit, rank, out, folds)


@checked
def combine_folders(
    base: nn.Module,
    folders: List[PathLike],
    examples: ExamplesPair,
    *,
    weights: Annotated[Tensor, Numbers("K")] | None = None,
    rank: Size | None = None,
    out: PathLike | None = None,
    folds: Annotated[Size, Field(ge=2)] = 5,
) -> FolderMerge:
    """Merge any number of PEFT folders of one base, ``sum_k w_k * dW_k``: what ``merge_folders`` does with two.

    ``weights`` ``(K,)``: any numbers; without them, those of ``estimate_combination``, not negative and adding up to 1.
    """
    if len(folders) < 2:
        raise ValueError(f"folders must be 2 or more, not {len(folders)}")
    if weights is not None and len(weights) != len(folders):
        raise ValueError(f"weights: {len(weights)} of them for {len(folders)} folders")
    adapted, adapters, split = _prepared(base, "folders", folders, examples, out)
    stacks = [repeat_adapter(adapter, 1) for adapter in adapters]

    def fit(part: Split) -> tuple[Adapter, list[float]]:
        found = estimate_combination(adapted, stacks, part)[0][0] if weights is None else weights
        return combine_adapters(adapters, found.tolist()), found.tolist()

    folds = folds if weights is None else 1
    short = [Path(folder).name for folder in folders]
    names = short if len({*short, "equal", "merge"}) == len(short) + 2 else [str(folder) for folder in folders]
    return _merge(adapted, dict(zip(names, adapters)), split, fit, rank, out, folds)


def _estimator(weight: float | str | Callable) -> Callable[..., Estimate]:
    """The estimator that an argument names, or one that always says this number."""
    if callable(weight):
        return weight
    if isinstance(weight, str):
        if weight not in ESTIMATORS_OF_ONE:
            invalid("weight", f"a number in [0, 1] or one of {', '.join(ESTIMATORS_OF_ONE)}", weight)
        return ESTIMATORS_OF_ONE[weight]
    return lambda *_: Estimate(torch.tensor([weight], dtype=torch.float64))


def _prepared(
    base: nn.Module, name: str, folders: Sequence[str | Path], examples: tuple, out: str | Path | None
) -> tuple[AdaptedBackbone, list[Adapter], Split]:
    """A slot for all of the folders' adapters, these in float32, and the examples as those of one client."""
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError(f"{name} must differ, unlike {shown(list(map(str, folders)))}")
    if out is not None and Path(out).resolve() in [Path(folder).resolve() for folder in folders]:
        raise ValueError(f"out must be another folder than those that are merged, not {str(out)!r}")
    check_examples("examples", *examples)
    if is_float(examples[1]):
        invalid("examples", "inputs and labels that are numbers of classes or tokens", examples[1])
    split = Split([examples])
    if (count := int(split.sizes)) < 2:
        raise ValueError(f"examples must be 2 or more, not {count}: one tells no interval")
    device = next(base.parameters()).device
    adapted = attach(base, config=folder_config(base, folders)).to(device)
    found = [load_adapter(adapted, folder) for folder in folders]
    adapters = [{name: tensor.to(device, torch.float32) for name, tensor in adapter.items()} for adapter in found]
    return adapted, adapters, split.to(device)


def _merge(
    adapted: AdaptedBackbone,
    adapters: dict[str, Adapter],
    split: Split,
    fit: Callable[[Split], tuple[Adapter, list[float]]],
    rank: int | None,
    out: str | Path | None,
    folds: int,
) -> FolderMerge:
    """The merge that ``fit`` makes of all examples, written to ``out``, and what it is worth."""
    merged, weights = fit(split)
    merged, error = _small(merged, rank)
    count = int(split.sizes)
    folds = min(folds, count)
    fitted = _losses(adapted, merged, split)
    held_out = fitted.clone()
    fold_of = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % folds
    for fold in range(folds) if folds > 1 else ():
        chosen, _ = fit(_part(split, fold_of != fold))
        held_out[fold_of == fold] = _losses(adapted, _small(chosen, rank)[0], _part(split, fold_of == fold))
    equal = combine_adapters(list(adapters.values()), [1 / len(adapters)] * len(adapters))
    others = {name: _losses(adapted, adapter, split) for name, adapter in (adapters | {"equal": equal}).items()}
    losses = {name: float(values.mean()) for name, values in (others | {"merge": held_out}).items()}
    differences = {name: interval_of_choice(held_out - other, fitted - other, folds) for name, other in others.items()}
    result = FolderMerge(adapted, merged, dict(zip(adapters, weights)), losses, differences, count, error)
    return result if out is None else replace(result, folder=save_adapter(adapted, merged, out))


def _small(adapter: Adapter, rank: int | None) -> tuple[Adapter, float]:
    """The adapter without empty ranks, at most of this ``rank``, and the largest relative error that this makes."""
    adapter = drop_empty_ranks(adapter)
    wide: Adapter = {}
    for layer in lora_layers(adapter):
        if rank is not None and len(factors(adapter, layer)[0]) > rank:
            wide |= {name: adapter[name] for name in factor_names(layer)}
    if not wide:
        return adapter, 0.0
    narrow, errors = compress(wide, rank)
    return adapter | narrow, float(torch.stack(list(errors.values())).max())


def _part(split: Split, chosen: Tensor) -> Split:
    """Some of the examples of a split of one client."""
    x, y = split.client(0)
    chosen = chosen.to(y.device)
    return Split([(take(x, chosen), y[chosen])], split.ids)


def _losses(adapted: AdaptedBackbone, adapter: Adapter, split: Split) -> Tensor:
    """Each example's loss ``(n,)``, in float64 on the CPU."""
    return client_losses(adapted, repeat_adapter(adapter, 1), split)[0].double().cpu()


def interval_of_choice(held_out: Tensor, fitted: Tensor, folds: int) -> Interval:
    """The mean of paired differences ``(n,)`` of losses and the ends of its 95 % confidence interval.

    ``held_out``: each example's difference where a merge that the other folds chose stands for the merge; ``fitted``:
    where it is the one that all examples chose. The interval is Student's about the mean of ``held_out``, with the
    larger of both standard errors, times ``sqrt(1 + K / (K - 1))`` for K folds, the correction of Nadeau and Bengio
    (2003), because the folds' choices are not independent. With one fold nothing was chosen, and it is Student's own.

    >>> differences = torch.tensor([1.0, 2.0, 3.0])
    >>> interval_of_choice(differences, differences, folds=1)  # doctest: +ELLIPSIS
    (2.0, -0.484..., 4.484...)
    """
    from scipy.stats import t

    count = len(held_out)
    correction = 1 + folds / (folds - 1) if folds > 1 else 1.0
    mean, deviation = float(held_out.mean()), max(float(held_out.std()), float(fitted.std()))
    half = float(t.ppf(0.975, count - 1)) * deviation * (correction / count) ** 0.5
    return mean, mean - half, mean + half


# From disk, for the command.


def load_base(name_or_path: str | Path, folders: Sequence[str | Path]) -> nn.Module:
    """The network of ``transformers`` that these PEFT folders belong to, as the first one says: a sequence classifier
    or a ``text_encoder``, with as many classes as its head has, or a causal language model."""
    options = read_options(Path(folders[0]))
    kind = (options.get("auto_mapping") or {}).get("base_model_class") or options.get("task_type") or ""
    heads = [trained_tensors(folder) for folder in folders]
    classes = len(list(heads[0].values())[-1]) if heads[0] else None
    if kind == "SEQ_CLS" or kind.endswith("ForSequenceClassification"):
        return sequence_classifier(name_or_path, classes, list(set.intersection(*map(set, heads))))
    if heads[0].keys() == {"head.weight", "head.bias"}:
        return text_encoder(name_or_path, classes)
    return causal_lm(name_or_path)


def read_examples(
    path: str | Path, network: nn.Module, name_or_path: str | Path, max_length: int = 256
) -> tuple[dict[str, Tensor], Tensor]:
    """The examples of a file of ``read_task`` as the network's inputs and labels.

    The tokenizer is that of ``name_or_path``. Of a sequence classifier the answer is the number or the name of a class;
    of a language model it follows the prompt, after a space. Raises ``ValueError`` for an answer that is no class.
    """
    questions = read_task(path)
    tokenizer = text_tokenizer(name_or_path)
    prompts = [question.prompt for question in questions]
    is_encoder = isinstance(network, TextClassifier)
    if not is_encoder and not type(network).__name__.endswith("ForSequenceClassification"):
        answers = [f"{' ' * (not one.prompt[-1:].isspace())}{one.answer}" for one in questions]
        return encode_answers(tokenizer, prompts, answers, max_length)
    count = network.head.out_features if is_encoder else network.config.num_labels
    named = {} if is_encoder else network.config.label2id or {}
    classes = {str(number): number for number in range(count)} | {str(name): number for name, number in named.items()}
    if odd := [one.answer for one in questions if one.answer.strip() not in classes]:
        known = f"0 … {count - 1}, or a name in the base's label2id"
        raise ValueError(f"{path}: {shown(odd[0])} is no class of the base: {known}")
    x = encode_texts(tokenizer, prompts, max_length)
    return x, torch.tensor([classes[one.answer.strip()] for one in questions])
