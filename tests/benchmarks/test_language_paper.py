"""The paper's configuration from end to end, on a tiny random language model and task files of a few lines."""

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import finished
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<unk>", "</s>", "is", "it", "OPTIONS", ":", "-", "yes", "no", "?", "say", "the", "word", "cat", "dog"]


@pytest.fixture
def model(tmp_path):
    """A folder with a Llama of two blocks and a tokenizer of whole words."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    sizes["initializer_range"] = 0.5  # else the frozen output layer is too small for it to learn an answer
    network = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, intermediate_size=24, eos_token_id=1))
    network.save_pretrained(tmp_path / "model")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


def test_the_papers_configuration_runs_from_end_to_end(model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import language_paper

    asked = "is it the {} ?\n\nOPTIONS:\n- yes\n- no"
    chosen = [{"instruction": asked.format(w), "output": o, "task": "a"} for w in ("cat", "dog") for o in ("yes", "no")]
    written = [{"instruction": f"say the word {word} ?", "output": word, "task": "b"} for word in ("cat", "dog")]
    (tmp_path / "chosen.json").write_text(json.dumps(chosen * 6))
    (tmp_path / "written.jsonl").write_text("\n".join(json.dumps(record) for record in written * 8))
    steps = "--round-steps 2 --federated-steps 4 --local-steps 6 --baseline-steps 8 --batch-size 4 --lr 1e-2".split()
    files = [str(tmp_path / "chosen.json"), str(tmp_path / "written.jsonl")]
    language_paper.main(["--model", str(model), "--tasks", *files, *steps, "--new-tokens", "2", "--out",
                         str(tmp_path / "out"), "--last", "1", "--backbone"])  # fmt: skip
    rows = pd.read_csv(tmp_path / "out" / "rows.csv").set_index(["method", "client"])
    assert {"federated", "local", "potara-paper", "potara-calibrated", "FedIT, 8 steps", "local, 8 steps"} <= set(
        rows.index.get_level_values(0)
    )
    assert rows.loss.notna().all() and rows.loss["potara-calibrated"].mean() < rows.loss["backbone"].mean()
    assert rows.xs(0, level="client")[["acc", "acc_norm"]].notna().all().all()
    assert rows.xs(1, level="client").exact_match.notna().all() and rows.xs(1, level="client").acc.isna().all()
    assert rows.steps.xs(0, level="client")[["federated", "local", "uniform", "FedIT, 8 steps"]].tolist() == [
        4,
        6,
        10,
        8,
    ]
    network = AutoModelForCausalLM.from_pretrained(model)
    PeftModel.from_pretrained(network, tmp_path / "out" / "adapters" / "seed-0" / "client-1-written")


def test_what_was_trained_answers_and_what_was_not_does_not(model, tmp_path, monkeypatch):
    """Two tasks that can be learnt by heart, as their test questions are among those of the training."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import language_paper

    asked = "is it the {} ?\n\nOPTIONS:\n- yes\n- no"
    chosen = [{"instruction": asked.format(w), "output": o, "task": "a"} for w, o in (("cat", "yes"), ("dog", "no"))]
    written = [{"instruction": f"say the {word} ?", "output": word, "task": "b"} for word in ("cat", "dog")]
    files = [tmp_path / "chosen.jsonl", tmp_path / "written.jsonl"]
    for path, records in zip(files, (chosen, written)):
        path.write_text("\n".join(json.dumps(record) for record in records * 9))
    only = ("backbone", "local, 60 steps")
    methods = language_paper.methods
    monkeypatch.setattr(language_paper, "methods", lambda args: {name: methods(args)[name] for name in only})
    steps = "--round-steps 5 --baseline-steps 60 --batch-size 4 --lr 1e-2 --new-tokens 3 --backbone".split()
    language_paper.main(["--model", str(model), "--tasks", *map(str, files), *steps, "--out", str(tmp_path / "out")])
    rows = pd.read_csv(tmp_path / "out" / "rows.csv").set_index(["client", "method"])
    for client, score in ((0, "acc"), (1, "exact_match")):
        before, after = (rows.loc[client, score][method] for method in only)
        assert before < 1 == after
    with pytest.raises(ValueError, match="nowhere is no folder"):
        language_paper.main(["--model", str(tmp_path / "nowhere"), "--tasks", str(files[0])])


@pytest.mark.parametrize(
    "options, said",
    [
        (["--model", "./nowhere"], "./nowhere is no folder"),
        (["--tasks", "{}/none.json"], "none.json is missing"),
        (["--tasks", "{}/two.json"], "two.json has 2 examples, at least 3 are needed"),
        (["--tasks", "{}/odd.json"], "odd.json, record 1: "),
        (["--round-steps", "7"], "--federated-steps 50 are no whole number of rounds of 7"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--rank", "0"], "rank must be at least 1, not 0"),
        (["--last", "9"], "the last 9 blocks of a network that has 2"),
        (["--max-length", "2"], "1 … 1 are possible"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_trained(options, said, model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import language_paper

    record = {"instruction": "say the cat ?", "output": "cat", "task": "a"}
    for name, records in (("good", [record] * 9), ("two", [record] * 2), ("odd", [{"text": "cat"}] * 9)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    monkeypatch.setattr(language_paper, "methods", lambda args: pytest.fail("it began"))
    usual = ["--model", str(model), "--tasks", str(tmp_path / "good.json"), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        language_paper.main([*usual, *(option.format(tmp_path) for option in options)])
    assert "\n" not in str(error.value)


def test_from_a_shell_an_error_is_one_line(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "language_paper.py"
    command = [sys.executable, str(script), "--model", "./nowhere", "--tasks", "none.json", "--out", str(tmp_path)]
    found = finished(command, check=False)
    assert found.returncode == 1 and found.stdout == ""
    assert found.stderr.startswith("language_paper: ./nowhere is no folder") and found.stderr.count("\n") == 1
