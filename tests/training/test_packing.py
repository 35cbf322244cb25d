"""Texts without their padding: the same numbers, from fewer tokens."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from potara_lite import attach, repeat_adapter, train
from potara_lite.adapters.state import flatten
from potara_lite.federation.split import Split
from potara_lite.federation.text import next_tokens, pad_tokens
from potara_lite.models.frozen_trunk import linear_layers
from potara_lite.models.language import text_classifier
from potara_lite.training.grouped_lora import GroupedLoRA
from potara_lite.training.packing import Packing

SIZES = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
LENGTHS = [[3, 9, 1, 4], [2, 2, 5, 12], [1, 1, 3, 2]]


def masks():
    return torch.stack([(torch.arange(12) < torch.tensor(lengths).unsqueeze(1)).long() for lengths in LENGTHS])


def texts(of_tokens=False):
    """Three clients with four texts each, of 1 to 12 tokens."""
    generator, found = torch.Generator().manual_seed(0), []
    for lengths in LENGTHS:
        lengths = [max(length, 2) for length in lengths]
        x = pad_tokens([torch.randint(1, 30, (n,), generator=generator).tolist() for n in lengths])
        last = torch.arange(x["input_ids"].shape[1]) == torch.tensor(lengths).unsqueeze(1) - 1
        y = next_tokens(x["input_ids"], last) if of_tokens else torch.tensor([0, 1, 2, 0])
        found.append((x, y))
    return Split(found)


def backbone(kind, attention="eager"):
    torch.manual_seed(0)
    if kind == "llama":
        network = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation=attention).eval().double()
        return attach(network, rank=2, targets=linear_layers(network), head=None)
    network = BertModel._from_config(BertConfig(**SIZES), attn_implementation=attention)
    network = text_classifier(network, 3).eval().double()
    return attach(network, rank=2, targets=linear_layers(network))


def test_a_row_holds_a_clients_tokens_in_order_and_unpacks_to_where_they_were():
    mask = masks()
    packing = Packing(mask)
    x = torch.arange(3 * 4 * 12 * 2.0).view(12, 12, 2)  # (C B, T, 2)
    rows = packing.pack(x)
    assert rows.shape == (3, 21, 2)
    for client, its_mask in enumerate(mask):
        tokens = x.view(3, 4, 12, 2)[client][its_mask != 0]
        assert torch.equal(rows[client, : len(tokens)], tokens)
    is_real = mask.flatten(0, 1) != 0
    assert torch.equal(packing.unpack(rows)[is_real], x[is_real])


def test_what_all_texts_share_is_given_to_each_and_other_tensors_stay_as_they_are():
    packing = Packing(masks())
    positions = torch.arange(12).unsqueeze(0)
    assert torch.equal(packing.unpack(packing.pack(positions))[1, :9], torch.arange(9))
    for other in (torch.zeros(12, 1, 12, 12), torch.zeros(12), torch.zeros(()), torch.zeros(3, 12, 2)):
        assert packing.pack(other) is other and packing.unpack(other) is other


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_packed_texts_have_the_same_logits_and_gradients_from_fewer_tokens(kind, attention, random_stack):
    adapted, split = backbone(kind, attention), texts(of_tokens=kind == "llama")
    runner, stack = GroupedLoRA(adapted), random_stack(adapted, 3, seed=1)
    assert runner.can_pack(stack, split.x)
    y, is_read = split.y, (split.x["attention_mask"] if kind == "llama" else torch.ones(3, 4)).unsqueeze(-1)
    tokens, found = [], []
    layer = adapted.blocks[0].intermediate if kind == "bert" else adapted.blocks[0].mlp
    handle = layer.register_forward_hook(lambda module, args, output: tokens.append(args[0].shape[:2].numel()))
    for logits_of in (runner.grouped_logits, runner.packed_logits):
        weights = {name: tensor.clone().requires_grad_() for name, tensor in stack.items()}
        logits = logits_of(weights, split.x)
        adapted.task.losses(logits.flatten(0, 1), y.flatten(0, 1)).sum().backward()
        found.append((logits.detach() * is_read, torch.cat([w.grad.flatten() for w in weights.values()])))
    handle.remove()
    for one, other in zip(*found):
        torch.testing.assert_close(
            one, other, rtol=0, atol=1e-6 if kind == "llama" else 1e-12
        )  # Llama norms in float32
    padded = split.y.shape[0] * split.y.shape[1] * split.x["attention_mask"].shape[2]
    assert tokens[0] == padded and tokens[-1] == 3 * int(split.x["attention_mask"].flatten(1).sum(1).max()) < padded


def test_training_packs_and_gives_what_padded_training_gives(monkeypatch):
    adapted, split = backbone("bert"), texts()
    start, options = repeat_adapter(adapted.initial, 3), dict(steps=6, batch_size=3, lr=1e-3)
    packed_logits, calls = GroupedLoRA.packed_logits, []

    def counted(*args):
        calls.append(args)
        return packed_logits(*args)

    counted.__name__ = "packed_logits"
    monkeypatch.setattr(GroupedLoRA, "packed_logits", counted)
    found = train(adapted, start, split, **options)
    assert len(calls) >= 6
    monkeypatch.setattr(GroupedLoRA, "can_pack", lambda *_: False)
    expected = train(adapted, start, split, **options)
    torch.testing.assert_close(flatten(found.adapters), flatten(expected.adapters), rtol=0, atol=1e-12)
    assert (flatten(found.adapters) - flatten(start)).abs().max() > 1e-3


class Neighbours(nn.Module):
    """A layer in which each token sees the one before it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, *args, **kwargs):
        return self.layer(hidden + nn.functional.pad(hidden, (0, 0, 1, -1)), *args, **kwargs)


def test_a_network_whose_tokens_meet_outside_attention_is_not_packed(random_stack):
    torch.manual_seed(0)
    network = text_classifier(BertModel(BertConfig(**SIZES)), 3).eval()
    network.encoder.layer[1] = Neighbours(network.encoder.layer[1])
    adapted, split = attach(network, rank=2, targets=linear_layers(network)), texts()
    runner, stack = GroupedLoRA(adapted), random_stack(adapted, 3, seed=1)
    assert runner.matches_vmap(stack, split.x) and not runner.can_pack(stack, split.x)


def test_where_a_client_has_no_padding_nothing_is_packed(random_stack):
    adapted = backbone("bert")
    runner, stack = GroupedLoRA(adapted), random_stack(adapted, 2, seed=1)
    x = {"input_ids": torch.ones(2, 4, 10, dtype=torch.int64), "attention_mask": torch.ones(2, 4, 10).long()}
    x["attention_mask"][0, 0, 7:] = 0
    assert not runner.can_pack(stack, x) and not runner.can_pack(stack, {"input_ids": x["input_ids"]})
    x["attention_mask"][1, 1, 9:] = 0
    assert runner.can_pack(stack, x)
