"""What touches the insides of other libraries: each function of ``compat.py`` against the library itself."""

import copy
import sys
import threading
import time
import warnings

import pytest
import torch
from conftest import finished
from peft.utils.other import get_pattern_key
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from potara_lite import Execution, attach, estimate_paper, evaluate, from_tensors, repeat_adapter, train
from potara_lite.compat import (
    ATTENTION,
    dropout_rate,
    has_hooks,
    is_traced,
    make_attention_explicit,
    pattern_value,
    shared_parameters,
)

SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def test_a_tensor_is_traced_inside_vmap_alone():
    seen = []
    vmap(lambda x: (seen.append(is_traced(x)), x)[1])(torch.ones(2, 3))
    assert seen == [True] and not is_traced(torch.ones(2))


def test_hooks_are_found_and_only_they():
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert not has_hooks(layer, other)
    handle = other.register_forward_pre_hook(lambda *_: None)
    assert has_hooks(layer, other)
    handle.remove()
    other.register_forward_hook(lambda *_: None)
    assert has_hooks(layer, other)


def test_a_dropout_rate_is_that_of_torch_or_of_an_attention_layer():
    attention = nn.Linear(2, 2)
    attention.attention_dropout = 0.2
    modules = nn.Dropout(0.1), nn.Dropout2d(0.3), attention, nn.Linear(2, 2), nn.Dropout(0.0)
    assert [dropout_rate(module) for module in modules] == [0.1, 0.3, 0.2, 0.0, 0.0]


@pytest.mark.parametrize("start", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_explicit_attention_computes_the_same_and_vmap_takes_it(kind, start):
    torch.manual_seed(0)
    config, model = (LlamaConfig, LlamaModel) if kind == "llama" else (BertConfig, BertModel)
    network = model._from_config(config(**SIZES), attn_implementation=start).eval()
    ids, mask = torch.randint(1, 50, (3, 2, 7)), torch.ones(3, 2, 7, dtype=torch.int64)
    mask[:, 1, 5:] = 0
    weights = dict(network.named_parameters())

    def hidden(ids, mask):
        inputs = dict(input_ids=ids, attention_mask=mask)
        return functional_call(network, weights, (), inputs).last_hidden_state * mask.unsqueeze(-1)

    before = torch.stack([hidden(one, its_mask) for one, its_mask in zip(ids, mask)])
    for _ in range(2):  # a network that has it already keeps it
        make_attention_explicit(network)
        assert network.config._attn_implementation == (f"{ATTENTION}-sdpa" if start == "sdpa" else ATTENTION)
        after = torch.stack([hidden(one, its_mask) for one, its_mask in zip(ids, mask)])
        assert torch.equal(after, before)
        torch.testing.assert_close(vmap(hidden)(ids, mask), before, rtol=0, atol=1e-6)
        tangent = jvp(lambda scale: hidden(ids[0], mask[0]) * scale, (torch.ones(()),), (torch.ones(()),))[1]
        torch.testing.assert_close(tangent, before[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", ["sdpa", "eager"])
def test_explicit_attention_has_derivatives_of_both_modes_and_of_second_order(start):
    """Forward mode of ``torch.func`` and of ``torch.autograd``, and reverse over forward: no fused kernel has these."""
    torch.manual_seed(0)
    network = BertModel._from_config(BertConfig(**SIZES), attn_implementation=start).eval().double()
    make_attention_explicit(network)
    ids = torch.randint(1, 50, (2, 7))
    name = "encoder.layer.0.attention.self.query.weight"
    weight = network.get_parameter(name).detach()
    direction = torch.randn(weight.shape, dtype=weight.dtype)

    def loss(weight):
        return functional_call(network, {name: weight}, (), dict(input_ids=ids)).last_hidden_state.pow(3).sum()

    slope = jvp(loss, (weight,), (direction,))[1]
    step = 1e-6
    finite = (loss(weight + step * direction) - loss(weight - step * direction)) / (2 * step)
    torch.testing.assert_close(slope, finite, rtol=1e-6, atol=0)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(weight, direction)))
    torch.testing.assert_close(dual.tangent, slope, rtol=1e-12, atol=0)
    curvature = jvp(grad(loss), (weight,), (direction,))[1]
    finite = (grad(loss)(weight + step * direction) - grad(loss)(weight - step * direction)) / (2 * step)
    torch.testing.assert_close(curvature, finite, rtol=1e-5, atol=1e-5 * curvature.abs().max().item())
    leaf = weight.clone().requires_grad_()
    [slopes] = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    if start == "sdpa":
        with pytest.raises(RuntimeError, match="not implemented"):  # as in transformers itself
            torch.autograd.grad((slopes * direction).sum(), leaf)
    else:
        [found] = torch.autograd.grad((slopes * direction).sum(), leaf)
        torch.testing.assert_close(found, curvature, rtol=1e-9, atol=1e-12)


class FusedAttention(nn.Module):
    """A network of one's own around one of torch's fused attentions."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.inner, self.head = kind, nn.Linear(16, 48 if kind == "sdpa" else 16), nn.Linear(16, 3)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)

    def forward(self, x):
        if self.kind == "layer":
            return self.head(self.layer(self.inner(x)).mean(1))
        q, k, v = self.inner(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("kind", ["sdpa", "layer"])
def test_fused_attention_runs_for_all_clients_at_once_without_a_warning(kind):
    """And gives the losses and gradients that one client after another gives; torch's own switch stays as it was."""
    adapted = attach(FusedAttention(kind), targets=["inner"], head="head", rank=2)
    data = torch.randn(40, 5, 16, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3
    federation = from_tensors([data, data], test_size=0.2, calibration_size=10)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for vectorize in (True, False):
            how = dict(execution=Execution(vectorize=vectorize))
            start = repeat_adapter(adapted.initial, 2)
            stack = train(adapted, start, federation.train, steps=3, batch_size=4, **how).adapters
            moments = estimate_paper(adapted, stack, stack, federation.train).moments
            found.append([*evaluate(adapted, stack, federation.test, **how), moments.a])
    for together, alone in zip(*found):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.cuda.flash_sdp_enabled()


def test_other_models_of_the_process_keep_their_attention():
    """In a new process: importing the package and one explicit model change no function of transformers."""
    code = """
from transformers import BertConfig, BertModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as attentions
before = dict(masks), dict(attentions)
import potara_lite.adapters.lora, potara_lite.models.language, potara_lite.training.train
from potara_lite.compat import ATTENTION, make_attention_explicit
assert before == (dict(masks), dict(attentions))
sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
other, ours = (BertModel._from_config(BertConfig(**sizes), attn_implementation="sdpa") for _ in range(2))
make_attention_explicit(ours)
name = f"{ATTENTION}-sdpa"
assert (other.config._attn_implementation, ours.config._attn_implementation) == ("sdpa", name)
assert all(now.pop(name) and now == then for now, then in zip((dict(masks), dict(attentions)), before))
"""
    finished([sys.executable, "-c", code])


PATTERNS = {"fc1": 3, r"layers\.[0-4]\.fc2": 5, "^model.head": 7, r".*attn.*": 9}


LAYERS = "model.fc1 fc1 myfc1 model.layers.3.fc2 model.layers.7.fc2 model.head a.model.head self_attn.q".split()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_pattern_has_the_value_that_peft_reads(layer):
    assert pattern_value(PATTERNS, layer, 1) == PATTERNS.get(get_pattern_key(list(PATTERNS), layer), 1)


def test_a_pattern_that_does_not_end_is_given_up():
    began = time.perf_counter()
    with pytest.raises(ValueError, match="takes too long to match"):
        pattern_value({"(.|.)" * 30: 2}, "base_model.model.encoder.layers.0.self_attn.q_proj", 1)
    assert time.perf_counter() - began < 60
    with pytest.raises(ValueError, match="is no regular expression"):
        pattern_value({"(": 2}, "fc1", 1)


def test_parameters_of_two_modules_are_shared():
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(3, 3)})
    assert list(shared_parameters(tied)) == []
    tied["c"].weight = tied["a"].weight
    assert list(shared_parameters(tied)) == [["a", "c"]]


@pytest.mark.parametrize("vectorize", [None, False])
def test_two_threads_with_one_backbone_get_what_each_gets_alone(vectorize, adapted, federation, random_stack):
    stacks = [random_stack(adapted, 3, seed) for seed in (1, 2)]
    execution, wrong = Execution(vectorize=vectorize), [0, 0]
    alone = [evaluate(adapted, stack, federation.test, execution=execution)[0] for stack in stacks]

    def work(i):
        for _ in range(10):
            loss, _ = evaluate(adapted, stacks[i], federation.test, execution=execution)
            wrong[i] += not torch.equal(loss, alone[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0]


def test_a_copy_of_a_backbone_has_a_lock_of_its_own(adapted):
    other = copy.deepcopy(adapted)
    assert other.state is not adapted.state and other.state.lock is not adapted.state.lock
