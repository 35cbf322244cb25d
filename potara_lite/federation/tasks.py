"""Language data: federations of WordNet's glosses, and examples of task files on your disk.

What is stored is text; the tokenizer of the backbone makes token ids of it. A gloss is what WordNet says a noun means,
its label the supersense: is it an animal, an act, a time? Prompts with answers come from FLAN-style files and the
commonsense suites.
"""

from __future__ import annotations

import csv
import json
import lzma
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor

from ..checks import AnyList, Flag, List, PathLike, Seed, Size, checked, invalid, shown
from ..files import FileError, check_file, data_path, reading
from .inputs import Examples
from .partition import partition, partition_options
from .split import Federation, Split
from .text import encode_texts

GLOSSES = "wordnet_glosses.xz"
DELIMITERS = {".csv": ",", ".tsv": "\t"}  # of the columns, by a file's suffix
DOMAINS = {  # supersenses that belong together
    "living": ("animal", "body", "food", "person", "plant"),
    "world": ("artifact", "location", "object", "phenomenon", "shape", "substance"),
    "mind": ("act", "attribute", "cognition", "communication", "event", "feeling", "group", "possession", "process",
             "quantity", "relation", "state", "time"),
}  # fmt: skip


@checked
def with_tokens(federation: Federation, texts: List[str], tokenizer: Callable, longest: Size = 32) -> Federation:
    """The federation whose examples are the numbers of ``texts``, with their tokens (see ``encode_texts``) instead."""

    def split(numbers: Split) -> Split:
        if not isinstance(numbers.x, Tensor) or numbers.x.dim() != 2 or int(numbers.x.max()) >= len(texts):
            raise ValueError(f"federation must be of numbers of the {len(texts)} texts, 0 … {len(texts) - 1}")
        clients = [numbers.client(i) for i in range(len(numbers))]
        return Split([(encode_texts(tokenizer, [texts[n] for n in x], longest), y) for x, y in clients], numbers.ids)

    parts = (split(part) for part in (federation.train, federation.calibration, federation.test))
    return Federation(*parts, federation.classes, federation.name)


def read_glosses() -> tuple[list[str], list[str], Tensor]:
    """The names of the 24 supersenses, the shipped glosses, and the label of each ``(n,)``.

    Raises ``FileError`` when the file is missing or damaged.
    """
    path = check_file(data_path(GLOSSES))
    with reading(path):
        lines = lzma.decompress(path.read_bytes()).decode("ascii").splitlines()
        senses, texts = zip(*(line.split("\t") for line in lines), strict=True)
        if not all(text.strip() for text in texts):
            raise ValueError("a gloss is empty")
    names = sorted(set(senses))
    return names, list(texts), torch.tensor([names.index(sense) for sense in senses])


@checked
def domain_proportions(names: List[str], clients: Size) -> np.ndarray:
    """Class proportions ``(C, K)``: client after client has the next of the ``DOMAINS``, all its classes alike."""
    domains = [[name in classes for name in names] for classes in DOMAINS.values()]
    rows = np.array([domains[client % len(domains)] for client in range(clients)], dtype=float)
    return rows / rows.sum(1, keepdims=True)


@checked
def wordnet_glosses(tokenizer: Callable, *, longest: Size = 32, domains: Flag = False, **options) -> Federation:
    """A federation of the WordNet glosses in ``data/``: which of 24 supersenses is a noun of? No download.

    ``tokenizer``: the backbone's, from Hugging Face. ``options`` are those of ``partition``. With ``domains`` each
    client has the supersenses of one of the ``DOMAINS`` instead of a Dirichlet draw, and the clients' sizes go from
    ``train_size`` down to a tenth of it. A third of the glosses, the same for every seed, is the pool of test examples.
    Inputs are ``input_ids`` and ``attention_mask`` ``(C, N, T)``.
    """
    options = partition_options(**{"name": "WordNet glosses", **options})
    names, texts, labels = read_glosses()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    test, train = order.tensor_split([len(order) // 3])
    if domains:
        clients, largest = options["clients"], options["train_size"]
        if not isinstance(largest, int):
            invalid("train_size", "one number, the largest client's, with domains=True", largest)
        options["proportions"] = domain_proportions(names, clients)
        options["train_size"] = np.geomspace(largest, largest / 10, clients).round().astype(int).clip(1).tolist()
    pools: list[Examples] = [(part, labels[part]) for part in (train, test)]
    return with_tokens(partition(*pools, classes=len(names), **options), texts, tokenizer, longest)


@checked
@dataclass(frozen=True)
class Question:
    """A prompt with its right ``answer``; ``options`` are the answers to choose from, none for free text.

    Raises ``ValueError`` for an empty prompt or answer, an empty option, and an answer that is no option.
    """

    prompt: str
    answer: str
    options: Annotated[AnyList[str], AfterValidator(tuple)] = ()
    task: str = ""

    def __post_init__(self):
        if not self.prompt.strip() or not self.answer.strip():
            raise ValueError("its prompt or its answer is empty")
        if not all(option.strip() for option in self.options):
            raise ValueError(f"one of its options is empty: {shown(list(self.options))}")
        if self.options and self.answer not in self.options:
            raise ValueError(f"its answer {shown(self.answer)} is none of its options {shown(list(self.options))}")


@checked
def read_task(path: PathLike, seed: Seed = 0) -> list[Question]:
    """The examples in a JSON array, a JSON-lines file, a CSV or a TSV file (``.csv``, ``.tsv``, the fields' names in
    its first line), shuffled by ``seed``, because many files are sorted by class.

    A record has the fields of one of these formats:

    - FLAN and Alpaca: ``instruction`` (its options after ``OPTIONS:``, a ``- `` before each), ``input``, ``output``;
    - the commonsense suites in the form for fine-tuning: ``instruction`` (which ends ``Answer format: a/b/c``),
      ``input``, ``answer``;
    - Dolly: ``instruction``, ``context``, ``response``; chats: ``messages`` with ``role`` and ``content``;
    - classification: ``text``, ``label`` (a whole number or a name); prompts: ``prompt``, ``completion``;
    - ARC and OpenBookQA, as published or as on the Hub: ``question``, ``choices``, ``answerKey``;
    - BoolQ, HellaSwag, PIQA, WinoGrande and SIQA, as on the Hub.

    An ``input`` or ``context`` goes below the instruction; what ``METADATA`` lists is left out. Raises ``FileError`` (a
    ``ValueError``) naming file and line (of an array, the record) for what is none of these, a field of another kind or
    with content that is used nowhere, an empty prompt or answer, and an answer that is no option.
    """
    path = Path(path)
    examples = []
    for position, record in _records(path):
        with reading(f"{path}, {position}"):
            examples.append(_example(record, path.stem))
    if not examples:
        raise FileError(f"{path} has no examples")
    return [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))]


def _records(path: Path) -> Iterator[tuple[str, object]]:
    """The records of a file, each with its position: its line or, in an array, its number."""
    if not path.is_file():
        raise FileError(f"{path} is missing")
    with reading(path):
        text = path.read_text("utf-8-sig")
    if path.suffix.lower() in DELIMITERS:
        yield from _rows(path, text)
    elif text.lstrip().startswith("["):
        yield from ((f"record {n}", record) for n, record in enumerate(_json(path, text, 1), 1))
    else:
        lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        yield from ((f"line {n}", _json(path, line, n)) for n, line in lines)


def _rows(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """The rows of a CSV or TSV file, each with its last line."""
    with reading(path):
        reader = csv.DictReader(StringIO(text, newline=""), delimiter=DELIMITERS[path.suffix.lower()], strict=True)
        names = reader.fieldnames or ()
        if len(set(names)) < len(names):
            raise ValueError(f"its fields must have different names, unlike {shown(names)}")
        for row in reader:
            if None in row or None in row.values():
                raise FileError(f"{path}, line {reader.line_num}: it must have {len(reader.fieldnames or ())} fields")
            yield f"line {reader.line_num}", row


def _json(path: Path, text: str, first_line: int) -> Any:
    with reading(f"{path}, line {first_line}"):
        try:
            return json.loads(text, object_pairs_hook=_record)
        except json.JSONDecodeError as error:
            raise FileError(f"{path}, line {first_line + error.lineno - 1}: no JSON: {error.msg}") from None


def _record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ``ValueError`` for a field that is there twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError(f"a field is there twice: {shown([name for name, _ in pairs])}")
    return record


def _example(record: object, task: str) -> Question:
    """A record as an example. Raises ``ValueError`` for one of no known format, and for a field with content that its
    format has no use for."""
    fields = set(record) if isinstance(record, Mapping) else set()
    for needed, optional, read in FORMATS:
        if needed <= fields:
            _check_used(record, needed | optional | METADATA)
            return read(record, _text({"task": task, **record}, "task"))
    known = "; ".join(", ".join(sorted(needed)) for needed, _, _ in FORMATS)
    raise ValueError(f"its fields are {sorted(fields)}, expected are those of one format: {known}")


def _check_used(record: Mapping, used: set[str], where: str = "") -> None:
    """Raise ``ValueError`` for another field than those ``used`` that has content."""
    if unused := sorted(name for name in record.keys() - used if record[name] not in (None, "", [], {})):
        raise ValueError(f"{where}its field {unused[0]!r} has content that is used nowhere")


def _check_objects(name: str, found: object, fields: set[str]) -> None:
    """Raise ``ValueError`` for anything but a list of objects with these fields."""
    if not isinstance(found, list) or not all(isinstance(one, Mapping) and fields <= one.keys() for one in found):
        raise ValueError(
            f"its {name} must be a list of objects with {' and '.join(sorted(fields))}, not {shown(found)}"
        )


def _text(record: Mapping, name: str) -> str:
    """A field of a record. Raises ``ValueError`` for one that is no text."""
    if not isinstance(record[name], str):
        raise ValueError(f"its {name} must be text, not {record[name]!r}")
    return record[name]


def _with_input(record: Mapping, name: str) -> str:
    """The instruction, and below it the text that it is about, where there is one."""
    more = "" if record.get(name) is None else _text(record, name)
    return _text(record, "instruction") + (f"\n{more}" if more.strip() else "")


def _flan(record: Mapping, task: str) -> Question:
    options = re.findall(r"^\s*- (.*)$", _text(record, "instruction").partition("OPTIONS:")[2], re.M)
    return Question(
        _with_input(record, "input"), _text(record, "output"), tuple(option.strip() for option in options), task
    )


def _commonsense(record: Mapping, task: str) -> Question:
    options = _text(record, "instruction").partition("Answer format:")[2].split("/")
    options = [option.strip() for option in options]
    return Question(_with_input(record, "input"), _text(record, "answer"), tuple(filter(None, options)), task)


def _dolly(record: Mapping, task: str) -> Question:
    return Question(_with_input(record, "context"), _text(record, "response"), (), task)


def _chat(record: Mapping, task: str) -> Question:
    messages = record["messages"]
    _check_objects("messages", messages, {"role", "content"})
    for message in messages:
        _check_used(message, {"role", "content"}, "of a message, ")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("its messages must end with one of the role 'assistant', after at least one other")
    texts = [_text(message, "content") for message in messages]
    return Question("\n".join(texts[:-1]), texts[-1], (), task)


def _labelled(record: Mapping, task: str) -> Question:
    label = record["label"]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f"its label {label!r} must be a whole number or a name")
    return Question(_text(record, "text"), str(label), (), task)


def _completion(record: Mapping, task: str) -> Question:
    return Question(_text(record, "prompt"), _text(record, "completion"), (), task)


def _numbered(prompt: str, options: Sequence[str], label: object, first: int, task: str) -> Question:
    """A question whose label is the number of the right option, counted from ``first``."""
    number = int(label) - first if isinstance(label, int) or (isinstance(label, str) and label.isdigit()) else -1
    if not 0 <= number < len(options):
        raise ValueError(f"its label {label!r} must be a number from {first} to {first + len(options) - 1}")
    return Question(prompt, options[number], tuple(options), task)


def _hellaswag(record: Mapping, task: str) -> Question:
    if not isinstance(record["endings"], list):
        raise ValueError(f"its endings must be a list, not {record['endings']!r}")
    return _numbered(_text(record, "ctx"), record["endings"], record["label"], 0, task)


def _piqa(record: Mapping, task: str) -> Question:
    options = [_text(record, "sol1"), _text(record, "sol2")]
    return _numbered(_text(record, "goal"), options, record["label"], 0, task)


def _winogrande(record: Mapping, task: str) -> Question:
    options = [_text(record, "option1"), _text(record, "option2")]
    return _numbered(_text(record, "sentence"), options, record["answer"], 1, task)


def _siqa(record: Mapping, task: str) -> Question:
    prompt = f"{_text(record, 'context')}\n{_text(record, 'question')}"
    return _numbered(prompt, [_text(record, f"answer{letter}") for letter in "ABC"], record["label"], 1, task)


def _choices(record: Mapping, task: str) -> Question:
    """As the publishers have it, the choices in the question, or as the Hub has it, beside it and as two lists."""
    question = record.get("question", record.get("question_stem"))
    choices = (question if isinstance(question, Mapping) else record).get("choices")
    stem = _text(question, "stem") if isinstance(question, Mapping) else _text({"question": question}, "question")
    if isinstance(choices, Mapping) and len({len(choices.get(name, "")) for name in ("label", "text")}) == 1:
        choices = [dict(label=label, text=text) for label, text in zip(choices["label"], choices["text"])]
    _check_objects("choices", choices, {"label", "text"})
    labels = [_text(choice, "label") for choice in choices]
    texts = dict(zip(labels, (_text(choice, "text") for choice in choices)))
    key = _text(record, "answerKey")
    if key not in texts or len(texts) < len(labels):
        raise ValueError(f"its answerKey {key!r} must be one of its choices, which are {labels}")
    return Question(stem, texts[key], tuple(texts.values()), task)


def _boolq(record: Mapping, task: str) -> Question:
    answer = str(record["answer"]).lower()  # in a CSV file it is a text
    if answer not in ("true", "false"):
        raise ValueError(f"its answer must be true or false, not {record['answer']!r}")
    prompt = f"{_text(record, 'passage')}\n{_text(record, 'question').rstrip('?')}?"
    return Question(prompt, "yes" if answer == "true" else "no", ("yes", "no"), task)


METADATA = set(  # fields that say where a record is from
    "id idx ind task category source source_id dataset subject split split_type activity_label lang".split()
)
FORMATS: list[tuple[set[str], set[str], Callable[[Mapping, str], Question]]] = [  # needed fields, further ones, reader
    ({"passage", "question", "answer"}, {"title"}, _boolq),
    ({"question", "answerKey"}, {"choices", "question_concept"}, _choices),
    ({"question_stem", "choices", "answerKey"}, set(), _choices),
    ({"context", "question", "answerA", "answerB", "answerC", "label"}, set(), _siqa),
    ({"ctx", "endings", "label"}, {"ctx_a", "ctx_b"}, _hellaswag),
    ({"goal", "sol1", "sol2", "label"}, set(), _piqa),
    ({"sentence", "option1", "option2", "answer"}, set(), _winogrande),
    ({"text", "label"}, set(), _labelled),
    ({"prompt", "completion"}, set(), _completion),
    ({"messages"}, set(), _chat),
    ({"instruction", "answer"}, {"input", "output"}, _commonsense),
    ({"instruction", "output"}, {"input"}, _flan),
    ({"instruction", "response"}, {"context"}, _dolly),
]
