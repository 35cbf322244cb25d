"""What ``attach`` takes, beside stock PEFT on the same tensors in float64, and what it refuses with which sentence.

    python benchmarks/layers.py      # writes layers.csv and refusals.csv

Each network is tiny and random, and a figure is the largest difference of its logits over the largest logit.
*untrained*: the adapted network with ``attach``'s first adapter against the network itself. *adapter*: a random
adapter, head included, against PEFT's. *merged*: ``merge_exact`` of two against ``add_weighted_adapter`` (``cat``).
*saved*: ``save_adapter``'s folder of a merge in ``PeftModel.from_pretrained``. *effect*: what the adapter changes.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.vision_transformer import VisionTransformer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from potara_lite import attach, lab_vit, linear_layers, merge_exact, save_adapter
from potara_lite.federation.text import pad_tokens

HERE = Path(__file__).parent
TOKENS = [[5, 6, 7, 8, 9], [3, 4, 11], [12, 2]]
SIZES = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
             max_position_embeddings=32, pad_token_id=0)  # fmt: skip
GROUPED = dict(num_key_value_heads=1)
DECODERS = {
    "gpt2": {},
    "opt": dict(ffn_dim=24, word_embed_proj_dim=16),
    "gpt_neox": {},
    "llama": GROUPED,
    "qwen2": GROUPED,
    "gemma": GROUPED | dict(head_dim=8),
    "gemma2": GROUPED | dict(head_dim=8),
    "mistral": GROUPED,
    "phi": {},
}
ENCODERS = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "distilbert": {},
    "albert": dict(embedding_size=12),
    "electra": dict(embedding_size=12),
    "deberta-v2": {},
    "mpnet": {},
    "modernbert": dict(local_attention=4, global_attn_every_n_layers=2)
    | dict.fromkeys(["bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"], 0),
}
CLASSIFYING_DECODERS = ("gpt2", "llama", "qwen2", "mistral")


class WithHead(nn.Module):
    """One layer of any kind, and a head on the mean of what it gives."""

    def __init__(self, layer: nn.Module, channels: int, channels_last: bool = False):
        super().__init__()
        self.layer, self.head, self.channels_last = layer, nn.Linear(channels, 3), channels_last

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x).tanh()
        return self.head(hidden.flatten(1, -2).mean(1) if self.channels_last else hidden.flatten(2).mean(2))


@dataclass(frozen=True)
class Case:
    """A network, its input, the layers that are adapted (by default the linear ones of its last block), its head."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | None = None  # of one input; none for a text
    targets: tuple[str, ...] | None = None
    head: str | None = None


def of_transformers(auto: type, name: str, **options) -> nn.Module:
    config = AutoConfig.for_model(name, **SIZES | dict(bos_token_id=1, eos_token_id=2) | options)
    return auto.from_config(config, attn_implementation="eager")  # as attach sets it


def head_of(name: str) -> str:
    return {"gpt2": "score", "llama": "score", "qwen2": "score", "mistral": "score"}.get(name, "classifier")


DECODER, CLASSIFIER = (partial(partial, of_transformers, auto)
                       for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification))  # fmt: skip
VIT = partial(VisionTransformer, image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24,
              num_classes=3)  # fmt: skip
CASES = {
    "nn.Linear": Case(lambda: WithHead(nn.Linear(6, 5), 5, True), (4, 6), ("layer",), "head"),
    "Conv1D of transformers": Case(lambda: WithHead(Conv1D(5, 6), 5, True), (4, 6), ("layer",), "head"),
    "nn.Conv2d, 3 × 3": Case(lambda: WithHead(nn.Conv2d(2, 5, 3, padding=1), 5), (2, 7, 7), ("layer",), "head"),
    "nn.Conv2d, 3 × 2, stride 2": Case(
        lambda: WithHead(nn.Conv2d(2, 5, (3, 2), stride=2), 5), (2, 7, 7), ("layer",), "head"
    ),
    "nn.Conv2d, 1 × 1": Case(lambda: WithHead(nn.Conv2d(2, 5, 1), 5), (2, 7, 7), ("layer",), "head"),
    "lab ViT": Case(lab_vit, (1, 28, 28), ("qkv", "proj", "fc1", "fc2"), "head"),
    "torchvision, VisionTransformer": Case(VIT, (3, 16, 16), ("mlp.0", "mlp.3"), "heads.head"),
    "torchvision, ResNet-18": Case(lambda: resnet18(num_classes=3), (3, 32, 32), ("layer4.1.conv1", "conv2"), "fc"),
    **{f"{name}, language model": Case(DECODER(name, **sizes)) for name, sizes in DECODERS.items()},
    **{f"{name}, classifier": Case(CLASSIFIER(name, num_labels=3, **ENCODERS.get(name, DECODERS.get(name))),
                                   head=head_of(name)) for name in [*ENCODERS, *CLASSIFYING_DECODERS]},
}  # fmt: skip


def random_network(case: Case) -> nn.Module:
    """The network with random weights of a size that matters, in float64 and eval mode."""
    torch.manual_seed(0)
    network = case.make().double().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return network


def logits_of(network: nn.Module, x: Tensor | dict[str, Tensor]) -> Tensor:
    found = network(**x) if isinstance(x, dict) else network(x)
    return getattr(found, "logits", found)


def drawn(like: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in like.items()}


@torch.no_grad()
def compared(name: str) -> dict[str, str | float]:
    """A row of the table: the largest difference of logits, by column."""
    case = CASES[name]
    network = random_network(case)
    x = pad_tokens(TOKENS) if case.shape is None else torch.rand(3, *case.shape, dtype=torch.float64)
    real = x["attention_mask"].bool() if case.shape is None and case.head is None else slice(None)
    targets = list(case.targets or linear_layers(network, last=1))

    def gap(one: Tensor, other: Tensor) -> float:
        return float((one[real] - other[real]).abs().max() / other[real].abs().max())

    bare = attach(network, rank=2, alpha=3, targets=targets, head=None)
    whole = attach(network, rank=2, alpha=3, targets=targets, head=case.head)
    one, two = (drawn(bare.initial, seed) for seed in (1, 2))
    stock = get_peft_model(copy.deepcopy(network), copy.deepcopy(bare.config), adapter_name="one").eval()
    stock.add_adapter("two", copy.deepcopy(bare.config))
    for adapter, of in ((one, "one"), (two, "two")):
        set_peft_model_state_dict(stock, adapter, adapter_name=of)
    stock.add_weighted_adapter(["one", "two"], [0.3, 0.7], "merged", combination_type="cat")
    stock.set_adapter("merged")
    with_head = get_peft_model(copy.deepcopy(network), copy.deepcopy(whole.config)).eval()
    first = drawn(whole.initial, 3)
    set_peft_model_state_dict(with_head, first)
    merged = merge_exact(first, drawn(whole.initial, 4), 0.3)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(whole, merged, folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(network), folder).eval()
    kinds = {type(network.get_submodule(layer.removeprefix("base_model.model."))).__name__ for layer in bare.scaling}
    before, after = logits_of(network, x), whole(first, x)
    return {
        "network": name,
        "adapted layers": f"{len(bare.scaling)} {', '.join(sorted(kinds))}",
        "untrained": gap(bare(bare.initial, x), before),
        "adapter": gap(after, logits_of(with_head, x)),
        "merged": gap(bare(merge_exact(one, two, 0.3), x), logits_of(stock, x)),
        "saved": gap(whole(merged, x), logits_of(loaded, x)),
        "effect": gap(after, before),
    }


# --- what is refused -----------------------------------------------------------------------------------------------
def _conv(**options) -> nn.Module:
    return WithHead(nn.Conv2d(2, 4, 3, padding=1, **options), 4)


class Attention(WithHead):
    def __init__(self):
        super().__init__(nn.Linear(6, 6), 6, True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.attention(x, x, x)[0])


class Normed(WithHead):
    def __init__(self):
        super().__init__(nn.Linear(6, 6), 6, True)
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)


def _linear() -> nn.Module:
    return WithHead(nn.Linear(6, 5), 5, True)


def _with(**options) -> Callable[[], object]:
    return lambda: attach(_linear(), config=LoraConfig(**dict(r=2, target_modules=["layer"]) | options))


def _refused(make: Callable[[], nn.Module], target: str = "layer") -> Callable[[], object]:
    return lambda: attach(make(), targets=[target], head=None, rank=2)


REFUSED: dict[str, Callable[[], object]] = {
    "nn.Conv1d": _refused(lambda: WithHead(nn.Conv1d(2, 4, 3), 4)),
    "nn.Conv3d": _refused(lambda: WithHead(nn.Conv3d(2, 4, 3), 4)),
    "nn.ConvTranspose2d": _refused(lambda: WithHead(nn.ConvTranspose2d(2, 4, 3), 4)),
    "nn.Conv2d with groups": _refused(partial(_conv, groups=2)),
    "nn.Conv2d with dilation": _refused(partial(_conv, dilation=2)),
    "nn.Conv2d with padding_mode": _refused(partial(_conv, padding_mode="circular")),
    "nn.Embedding": _refused(lambda: WithHead(nn.Embedding(9, 4), 4, True)),
    "nn.LayerNorm": _refused(lambda: WithHead(nn.LayerNorm(4), 4, True)),
    "the output layer of nn.MultiheadAttention": _refused(Attention, "attention.out_proj"),
    "a head tied to the embedding": _refused(DECODER("gpt2"), "lm_head"),
    "a batch norm without running statistics": _refused(Normed),
    "a name that no layer has": _refused(_linear, "query"),
    "lora_dropout": _with(lora_dropout=0.1),
    "init_lora_weights of PiSSA": _with(init_lora_weights="pissa"),
    "use_dora": _with(use_dora=True),
    "bias": _with(bias="all"),
    "lora_bias": _with(lora_bias=True),
}


def refusal(what: str) -> str:
    """The sentence with which ``attach`` refuses, or "taken"."""
    try:
        REFUSED[what]()
    except ValueError as error:
        return str(error)
    return "taken"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = pd.DataFrame([compared(name) for name in CASES])
    refusals = pd.DataFrame({"what": [*REFUSED], "refused with": [refusal(what) for what in REFUSED]})
    print(table.to_string(), refusals.to_string(), sep="\n")
    table.to_csv(HERE / "layers.csv", index=False, float_format="%.2g")
    refusals.to_csv(HERE / "refusals.csv", index=False)


if __name__ == "__main__":
    main()
