"""Merges of PEFT folders: exact, loaded by stock PEFT, and honest about what they are worth."""

import copy
import json

import pytest
import torch
from conftest import Dense, tiny_text_encoder
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from scipy.stats import t
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from potara_lite import (
    Split,
    attach,
    combine_folders,
    estimate_calibrated,
    evaluate,
    linear_layers,
    load_adapter,
    merge_exact,
    merge_folders,
    next_tokens,
    repeat_adapter,
    save_adapter,
    text_encoder,
)
from potara_lite.__main__ import main
from potara_lite.estimators import Estimate
from potara_lite.estimators.calibrated import pooled_weight
from potara_lite.estimators.folders import ESTIMATORS_OF_ONE, interval_of_choice

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and transformers, about older names


def llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    network = LlamaForCausalLM(LlamaConfig(vocab_size=30, intermediate_size=24, tie_word_embeddings=False, **sizes))
    return network.eval()


def stock_folder(base, folder, **options):
    """A folder as stock PEFT writes it, of an adapter that changes something."""
    config = dict(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(sum(map(ord, folder.name)))
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**config | options, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base():
    return llama()


@pytest.fixture(scope="module")
def examples():
    ids = torch.randint(0, 30, (9, 6), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": real}, next_tokens(ids, real.bool())


@torch.no_grad()
def logits_in_stock_peft(base, folder, x):
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(**x).logits


def deltas_in_stock_peft(base, folder):
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder).base_model.model
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


OTHERS = {
    "the same": {},
    "rank": dict(r=8, lora_alpha=16),
    "layers": dict(target_modules=["q_proj", "k_proj"]),
    "alpha": dict(lora_alpha=32),
    "rslora": dict(r=8, use_rslora=True),
    "pattern": dict(target_modules=r".*\.(q_proj|down_proj)", rank_pattern={"q_proj": 3}, alpha_pattern={"down": 1}),
}


@torch.no_grad()
@pytest.mark.parametrize("other", OTHERS)
def test_the_merge_is_the_sum_that_stock_peft_makes(other, base, examples, tmp_path):
    one, two = stock_folder(base, tmp_path / "A"), stock_folder(base, tmp_path / "B2", **OTHERS[other])
    before = copy.deepcopy(base.state_dict())
    result = merge_folders(base, one, two, examples, weight=0.3, out=tmp_path / "out")
    dense = copy.deepcopy(base)
    for folder, weight in ((one, 0.3), (two, 0.7)):
        for name, change in deltas_in_stock_peft(base, folder).items():
            dense.get_submodule(name).weight += weight * change
    expected = dense(**examples[0]).logits
    assert (expected - base(**examples[0]).logits).abs().max() > 0.1
    found = logits_in_stock_peft(base, tmp_path / "out", examples[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(result.adapted(result.adapter, examples[0]), expected, rtol=0, atol=2e-5)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_the_merge_has_the_ranks_of_both_and_no_empty_ones(base, examples, tmp_path):
    one = stock_folder(base, tmp_path / "A")
    two = stock_folder(base, tmp_path / "B2", r=3, target_modules=["q_proj", "k_proj"])
    for weight, ranks in ((0.3, dict(q=7, v=4, k=3)), (1.0, dict(q=4, v=4, k=1)), (0.0, dict(q=3, v=1, k=3))):
        merged = merge_folders(base, one, two, examples, weight=weight).adapter
        found = {name.split("_proj")[0][-1]: len(tensor) for name, tensor in merged.items() if "lora_A" in name}
        assert found == ranks


def test_losses_are_those_of_stock_peft(base, examples, tmp_path):
    one, two = stock_folder(base, tmp_path / "A"), stock_folder(base, tmp_path / "B2")
    result = merge_folders(base, one, two, examples, weight=0.5, out=tmp_path / "out")
    for name, folder in (("federated", one), ("local", two), ("equal", tmp_path / "out"), ("merge", tmp_path / "out")):
        logits = logits_in_stock_peft(base, folder, examples[0])
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), examples[1][:, :-1].flatten())
        assert result.losses[name] == pytest.approx(loss.item(), abs=1e-5)
    assert result.differences["equal"] == pytest.approx((0, 0, 0), abs=1e-6)
    assert len({round(loss, 3) for loss in result.losses.values()}) > 2


def test_a_compressed_merge_is_judged_and_written_as_it_is(base, examples, tmp_path):
    one, two = stock_folder(base, tmp_path / "A"), stock_folder(base, tmp_path / "B2")
    exact = merge_folders(base, one, two, examples, weight=0.5)
    result = merge_folders(base, one, two, examples, weight=0.5, rank=2, out=tmp_path / "out")
    assert exact.error == 0 and 0.05 < result.error < 1
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    logits = logits_in_stock_peft(base, tmp_path / "out", examples[0])
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), examples[1][:, :-1].flatten())
    assert result.losses["merge"] == pytest.approx(loss.item(), abs=1e-5)
    assert abs(result.losses["merge"] - exact.losses["merge"]) > 1e-4
    assert merge_folders(base, one, two, examples, weight=0.5, rank=8).error == 0  # nothing to compress


@pytest.mark.parametrize("name", ESTIMATORS_OF_ONE)
def test_every_estimator_of_one_client_has_an_answer(name, base, examples, tmp_path):
    one, two = stock_folder(base, tmp_path / "A"), stock_folder(base, tmp_path / "B2")
    result = merge_folders(base, one, two, examples, weight=name, folds=2)
    assert 0 <= result.weight <= 1 and result.weights["local"] == pytest.approx(1 - result.weight)


@pytest.fixture
def small(tmp_path):
    """A base with a head that one adapter trained and the other did not, and examples that it is right about."""
    torch.manual_seed(0)
    network, options = Dense().eval(), dict(task_type=None, target_modules=["fc1"])
    one = stock_folder(network, tmp_path / "A", modules_to_save=["head"], **options)
    two = stock_folder(network, tmp_path / "B2", r=2, **options)
    x = torch.randn(40, 8)
    with torch.no_grad():
        y = (network(x) + 0.5 * torch.randn(40, 3)).argmax(1)
    return network, one, two, (x, y)


def test_a_module_that_one_did_not_train_is_the_bases(small, tmp_path):
    network, one, two, examples = small
    result = merge_folders(network, one, two, examples, weight=0.25)
    theirs = load_file(f"{one}/adapter_model.safetensors")["base_model.model.head.weight"]
    expected = 0.25 * theirs + 0.75 * network.head.weight.detach()
    torch.testing.assert_close(result.adapter["base_model.model.head.weight"], expected)


def test_the_weight_is_that_of_the_estimator_and_head_and_body_may_differ(small):
    network, one, two, examples = small
    result = merge_folders(network, one, two, examples)
    stacks = [repeat_adapter(merge_folders(network, one, two, examples, weight=w).adapter, 1) for w in (1.0, 0.0)]
    estimate = estimate_calibrated(result.adapted, *stacks, Split([examples]))
    assert result.weight == pytest.approx(float(estimate.client_weight), abs=1e-5)
    assert len(estimate.weight) > 1 and estimate.details["offset"].abs() > 0.01
    losses = [
        float(evaluate(result.adapted, stack, Split([examples]))[0])
        for stack in (
            repeat_adapter(result.adapter, 1),
            merge_exact(*stacks, estimate.weight),
            merge_exact(*stacks, result.weight),
        )
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and abs(losses[0] - losses[2]) > 1e-4


def test_no_example_is_judged_by_a_merge_that_it_chose(small):
    """An estimator that sees an example takes λ = 1; every example's loss is then by λ = 0 of those that do not."""
    network, one, two, (x, y) = small
    x, y = x[:7], y[:7]
    seen = []

    def estimator(adapted, federated, local, split):
        seen.append(sorted(int((x == row).all(1).nonzero()) for row in split.x[0]))
        return Estimate(torch.tensor([float(0 in seen[-1])]))

    result = merge_folders(network, one, two, (x, y), weight=estimator, folds=3)
    assert result.weight == 1 and seen[0] == list(range(7)) and len(seen) == 4
    left_out = [set(range(7)) - set(rows) for rows in seen[1:]]
    assert sorted(sum(map(sorted, left_out), [])) == list(range(7)) and all(2 <= len(part) <= 3 for part in left_out)
    together = next(part for part in left_out if 0 in part)  # judged by λ = 0, the others by λ = 1
    losses = [
        nn.functional.cross_entropy(result.adapted(merge.adapter, x), y, reduction="none")
        for merge in (merge_folders(network, one, two, (x, y), weight=w) for w in (0.0, 1.0))
    ]
    expected = torch.stack([losses[i not in together][i] for i in range(7)]).mean()
    assert result.losses["merge"] == pytest.approx(expected.item(), abs=1e-5)


def test_intervals_hold_what_they_promise():
    """Examples with quadratic losses whose best weights scatter: the truth is known in closed form."""
    generator, grid = torch.Generator().manual_seed(0), torch.linspace(0, 1, 9).double()
    best, scatter, count, folds = 0.4, 1.5, 30, 5

    def risk(weight):
        return (weight - best) ** 2 + scatter**2

    def chosen(own):
        losses = (grid.unsqueeze(1) - own).square().unsqueeze(0)
        return float(pooled_weight(grid, losses, torch.tensor([len(own)]))[0])

    rows = []
    for _ in range(400):
        own = best + scatter * torch.randn(count, generator=generator, dtype=torch.float64)
        weight, half = chosen(own), (0.5 - own).square()
        fold_of = torch.randperm(count, generator=generator) % folds
        held_out = torch.zeros_like(own)
        for fold in range(folds):
            held_out[fold_of == fold] = (chosen(own[fold_of != fold]) - own[fold_of == fold]).square()
        fitted = (weight - own).square()
        truth = risk(weight) - risk(0.5)
        mean, low, high = interval_of_choice(held_out - half, fitted - half, folds)
        rows.append((low <= truth <= high, float((fitted - half).mean()) - truth, mean - truth))
    covered, naive, fair = torch.tensor(rows, dtype=torch.float64).unbind(1)
    assert covered.mean() > 0.93
    assert naive.mean() < -5 * naive.std() / 20  # on its own examples, the merge looks too good
    assert fair.mean() > -2 * fair.std() / 20  # by others' choice it does not


def test_the_interval_of_a_given_weight_is_students():
    values = torch.tensor([0.2, -0.4, 0.1, 0.6, 0.0], dtype=torch.float64)
    mean, low, high = interval_of_choice(values, values, 1)
    assert (low, high) == pytest.approx(t.interval(0.95, 4, loc=0.1, scale=float(values.std()) / 5**0.5))
    assert interval_of_choice(values, values, 5)[2] - mean == pytest.approx(1.5 * (high - mean))
    assert interval_of_choice(values, 2 * values, 1)[2] - mean == pytest.approx(2 * (high - mean))


def test_any_number_of_folders(base, examples, tmp_path):
    folders = [stock_folder(base, tmp_path / name, r=k) for name, k in (("A", 4), ("BB", 2), ("CCC", 3))]
    result = combine_folders(base, folders, examples, weights=[0.5, -0.2, 0.4], out=tmp_path / "out")
    changes = [deltas_in_stock_peft(base, folder) for folder in folders]
    for name, change in deltas_in_stock_peft(base, tmp_path / "out").items():
        expected = sum(weight * one[name] for weight, one in zip((0.5, -0.2, 0.4), changes))
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)
    assert result.weights == {"A": 0.5, "BB": -0.2, "CCC": 0.4}
    assert len(deltas_in_stock_peft(base, tmp_path / "out")) == 2
    chosen = combine_folders(base, folders, examples, folds=2)
    assert sum(chosen.weights.values()) == pytest.approx(1) and min(chosen.weights.values()) >= 0
    assert set(chosen.losses) == {"A", "BB", "CCC", "equal", "merge"}


def test_tensors_by_the_names_of_older_versions_merge(small, tmp_path):
    network, one, two, examples = small
    expected = merge_folders(network, one, two, examples, weight=0.4)
    path = f"{one}/adapter_model.safetensors"
    older = {"lora_A.": "lora_A.default.", "lora_B.": "lora_B.default.", "head.": "head.modules_to_save.default."}
    tensors = load_file(path)
    for now, then in older.items():
        tensors = {name.replace(now, then): tensor for name, tensor in tensors.items()}
    save_file(tensors, path)
    found = merge_folders(network, one, two, examples, weight=0.4)
    assert all(torch.equal(tensor, expected.adapter[name]) for name, tensor in found.adapter.items())


def test_what_cannot_be_merged_is_refused(small, base, tmp_path):
    network, one, two, (x, y) = small
    other = stock_folder(base, tmp_path / "other")
    for call, message in (
        (lambda: merge_folders(network, one, one, (x, y)), "federated and local must differ"),
        (lambda: merge_folders(network, one, two, (x, y), out=two), "out must be another folder"),
        (lambda: merge_folders(network, one, two, (x[:1], y[:1])), "examples must be 2 or more, not 1"),
        (
            lambda: merge_folders(network, one, two, (x, y), weight="best"),
            "weight must be a number in .0, 1. or one of",
        ),
        (lambda: merge_folders(network, one, two, (x, y), weight=1.5), "weight must be at most 1"),
        (lambda: merge_folders(network, one, tmp_path / "nowhere", (x, y)), "cannot read .*nowhere"),
        (lambda: merge_folders(network, one, other, (x, y)), "q_proj"),
        (lambda: combine_folders(network, [one], (x, y)), "folders must be 2 or more"),
        (lambda: combine_folders(network, [one, two], (x, y), weights=[1.0]), "weights: 1 of them for 2 folders"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_result_is_one_line_and_a_table(small, tmp_path):
    network, one, two, examples = small
    result = merge_folders(network, one, two, examples, out=tmp_path / "out")
    assert "\n" not in repr(result) and len(repr(result)) < 250 and f"{result.weight:.2f} federated" in repr(result)
    table = result.to_frame()
    assert list(table.index) == ["federated", "local", "equal", "merge"] and (table["from"] <= table["to"])[:3].all()


def test_the_command_merges_classifiers_and_language_models(base, tmp_path, capsys):
    folder = tmp_path / "bert"
    folder.mkdir()
    tiny_text_encoder(folder)
    network = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    options = dict(task_type="SEQ_CLS", target_modules=["query", "value"])
    one, two = (stock_folder(network, tmp_path / name, **options) for name in ("F", "LL"))
    words = "a of the or in an to and is by with for".split()
    rows = [f"{words[i]} {words[3 * i % 11]},{i % 3}" for i in range(12)]
    (tmp_path / "examples.csv").write_text("text,label\n" + "\n".join(rows))
    arguments = ["merge", str(folder), one, two, "--examples", str(tmp_path / "examples.csv")]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--weight", "0.25"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[1].split()[:2] == ["federated", "0.250"] and "95 %" in said.out
    x = {"input_ids": torch.tensor([[2, 6, 7, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    twice = {name: tensor.repeat(2, 1) for name, tensor in x.items()}
    result = merge_folders(network, one, two, (twice, torch.tensor([0, 1])), weight=0.25)
    found = logits_in_stock_peft(network, tmp_path / "out", x)
    torch.testing.assert_close(found, result.adapted(result.adapter, x), rtol=0, atol=1e-5)

    assert main([*arguments, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["losses"]) == {"federated", "local", "equal", "merge"}
    (tmp_path / "examples.csv").write_text("text,label\na the,7\nthe a,1\n")
    for odd, message in (
        ([], "'7' is no class of the base: 0 … 2, or a name"),
        (["--weight", "best"], "is no class"),
        (["--device", "warp"], "device 'warp' cannot be used"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out"), *odd]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    decoder = tmp_path / "llama"
    base.save_pretrained(decoder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(decoder)
    one, two = (stock_folder(base, tmp_path / name) for name in ("G", "MM"))
    lines = [json.dumps({"prompt": f"{words[i]} the", "completion": words[i - 1]}) for i in range(8)]
    (tmp_path / "examples.jsonl").write_text("\n".join(lines))
    arguments = ["merge", str(decoder), one, two, "--examples", str(tmp_path / "examples.jsonl")]
    assert main([*arguments, "--out", str(tmp_path / "lm"), "--rank", "3"]) == 0
    assert json.loads((tmp_path / "lm" / "adapter_config.json").read_text())["r"] == 3


def test_the_command_merges_what_this_library_wrote(tmp_path, capsys):
    (tmp_path / "bert").mkdir()
    network = text_encoder(tiny_text_encoder(tmp_path / "bert"), classes=3)
    adapted = attach(network, rank=2, targets=linear_layers(network, last=1))
    generator = torch.Generator().manual_seed(0)
    for name in ("F", "L"):
        tensors = {key: torch.randn(t.shape, generator=generator) for key, t in adapted.initial.items()}
        save_adapter(adapted, tensors, tmp_path / name)
    rows = [{"text": f"the {word}", "label": i % 3} for i, word in enumerate("a of the or in an to and".split())]
    (tmp_path / "examples.json").write_text(json.dumps(rows))
    folders = [str(tmp_path / name) for name in ("bert", "F", "L")]
    options = ["--examples", str(tmp_path / "examples.json"), "--out", str(tmp_path / "out"), "--weight", "curve"]
    assert main(["merge", *folders, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    merged = load_adapter(adapted, tmp_path / "out")
    expected = merge_exact(*(load_adapter(adapted, folder) for folder in folders[1:]), found["weights"]["federated"])
    x = {"input_ids": torch.tensor([[2, 6, 7, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    torch.testing.assert_close(adapted(merged, x), adapted(expected, x), rtol=1e-5, atol=1e-5)
