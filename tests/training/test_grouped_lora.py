"""All clients in one batch: exactly what each client gets alone, and refused wherever it would not be."""

import copy

import pytest
import torch
from conftest import train_one_by_one
from peft import LoraConfig
from torch import nn
from torch.func import grad, jvp, vmap
from torch.nn import functional as F

from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import client_adapter, flatten, repeat_adapter, unflatten
from potara_lite.baselines.algorithms import fedalt, gated
from potara_lite.baselines.rounds import run_algorithm
from potara_lite.merging.merge import merge_exact
from potara_lite.training.batching import Execution, map_clients, plan_execution
from potara_lite.training.gradients import per_sample_gradients
from potara_lite.training.grouped_lora import GroupedLoRA, group_lora
from potara_lite.training.train import evaluate, train

OPTIONS = dict(steps=4, batch_size=4, lr=2e-3, seed=3)


class Plain(nn.Module):
    """Seven tokens of seven numbers, two linear layers on each, and a head on their mean."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(7, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 4)

    def tokens(self, x):
        return F.avg_pool2d(x, 4).flatten(1).unflatten(1, (7, 7))  # (B, T, d)

    def forward(self, x):
        return self.head(self.fc2(self.fc1(self.tokens(x)).tanh()).tanh().mean(1))


class SequenceFirst(Plain):
    """The batch on dim 1 within."""

    def forward(self, x):
        h = self.tokens(x).transpose(0, 1)
        return self.head(self.fc2(self.fc1(h).tanh()).tanh().mean(0))


class Coupled(Plain):
    """Every example sees the mean of its batch."""

    def tokens(self, x):
        return super().tokens(x - x.mean(0))


class Twice(Plain):
    """One layer is called twice, and one never."""

    def __init__(self):
        super().__init__()
        self.fc3 = nn.Linear(6, 6)

    def forward(self, x):
        return self.head(self.fc2(self.fc2(self.fc1(self.tokens(x)).tanh()).tanh()).mean(1))


class PerToken(Plain):
    """A head on every token, whose gradient differs from token to token."""

    def forward(self, x):
        return self.head(self.fc2(self.fc1(self.tokens(x)).tanh()).tanh()).square().mean(1)


class Normed(Plain):
    """A trained layer that is not linear."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.head(self.norm(self.fc2(self.fc1(self.tokens(x)).tanh()).mean(1)))


def attached(kind=Plain, dtype=torch.float64, config=None, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        targets = [name for name, module in kind().named_modules() if name.startswith("fc")]
        return attach(kind().to(dtype), rank=2, alpha=3, targets=targets, config=config, **options)


def one_by_one(adapted, stack, x):
    """The logits, by PEFT's own model and a loop."""
    return torch.stack([adapted(client_adapter(stack, i), x[i]) for i in range(len(x))])


KINDS = [Plain, Twice, PerToken, SequenceFirst, Coupled, Normed]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_training_are_those_of_each_client_alone(kind, federation64, random_stack):
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["fc1", "fc2"], modules_to_save=["head", "norm"])
    adapted = attached(kind, config=config if kind is Normed else None)
    stack, split = random_stack(adapted, 3, seed=0, scale=0.7), federation64.train
    flat, x = flatten(stack).requires_grad_(), split.x[:, :4]
    like = client_adapter(stack, 0)
    together, alone = (
        map_clients(group_lora(adapted), unflatten(flat, like), x),
        one_by_one(adapted, unflatten(flat, like), x),
    )
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    weights = torch.randn(together.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, two = (torch.autograd.grad((weights * logits).sum(), flat)[0] for logits in (together, alone))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    if kind is Coupled:
        with pytest.raises(ValueError, match="an example's logits depend on the others of its batch"):
            train(adapted, stack, split, **OPTIONS)
        return
    trained, oracle = train(adapted, stack, split, **OPTIONS), train_one_by_one(adapted, stack, split, **OPTIONS)
    torch.testing.assert_close(flatten(trained.adapters), flatten(oracle.adapters), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [Plain, Twice, PerToken, SequenceFirst])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 20])
def test_per_sample_gradients_are_those_of_each_example_alone(kind, federation64, random_stack, chunk_size):
    adapted = attached(kind)
    stack, split = random_stack(adapted, 3, seed=1, scale=0.7), federation64.train
    gradients = per_sample_gradients(adapted, stack, split, execution=Execution(chunk_size=chunk_size))
    for client, n in enumerate(split.sizes.tolist()):
        x, y = split.client(client)
        for i in range(n):
            leaves = {name: t.clone().requires_grad_() for name, t in client_adapter(stack, client).items()}
            loss = F.cross_entropy(adapted(leaves, x[i : i + 1]), y[i : i + 1])
            parts = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            oracle = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), parts)]
            expected = torch.cat([g.flatten() for g in oracle])
            torch.testing.assert_close(gradients[client, i], expected, rtol=1e-9, atol=1e-13)
        assert not gradients[client, n:].any()


def test_a_network_that_disagrees_gets_chunks_for_copies_of_the_adapter(federation64, random_stack, monkeypatch):
    """Ten rows of the adapter for each sample, as for a network that is refused at sight."""
    from potara_lite.training import gradients

    refused, own, chunks = attached(SequenceFirst), gradients.losses, []
    refused.model.get_submodule("base_model.model.fc1").register_forward_hook(lambda module, inputs, output: None)
    small = Execution(memory_bytes=2**15)
    for adapted in (attached(SequenceFirst), refused):
        seen = []
        monkeypatch.setattr(
            gradients, "losses", lambda *args, seen=seen, **rest: seen.append(len(args[2])) or own(*args, **rest)
        )
        stack = random_stack(adapted, 3, seed=1)
        per_sample_gradients(adapted, stack, federation64.train, execution=small)
        chunks.append(seen)
    x = federation64.train.x.flatten(0, 1).unsqueeze(1)
    options = dict(batch_size=1, backward=True, execution=small, adapter_copies=10)
    expected = plan_execution(refused, stack, x, **options).chunks
    assert chunks[0] == chunks[1] and max(chunks[0]) == expected[0].stop < 13


def test_it_is_taken_where_it_should_be(adapted64, federation64, random_stack):
    for adapted in (adapted64, attached(), attached(Twice)):
        forward = group_lora(adapted)
        assert isinstance(forward, GroupedLoRA)
        assert forward.matches_vmap(random_stack(adapted, 3, seed=0), federation64.train.x)


def test_it_is_not_taken_where_it_would_be_wrong(federation64, random_stack):
    for kind in (SequenceFirst, Coupled):
        adapted = attached(kind)
        forward, stack = group_lora(adapted), random_stack(adapted, 3, seed=0)
        assert not forward.matches_vmap(stack, federation64.train.x)
        wrong = forward.grouped_logits(stack, federation64.train.x)
        assert (wrong - one_by_one(adapted, stack, federation64.train.x)).abs().max() > 1e-3


def test_what_cannot_be_told_apart_by_rows_is_left_to_vmap():
    plain = attached()
    training = copy.deepcopy(plain)
    training.model.train()
    hooked, merged, off = copy.deepcopy(plain), copy.deepcopy(plain), copy.deepcopy(plain)
    hooked.model.get_submodule("base_model.model.fc1").register_forward_hook(lambda module, inputs, output: output)
    merged.model.merge_adapter()
    off.model.get_submodule("base_model.model.fc2").enable_adapters(False)
    config = LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["norm"])
    convolution = attach(nn.Sequential(nn.Conv2d(1, 4, 28), nn.Flatten(), nn.Linear(4, 4)), targets=["0"], head="2")
    for adapted in (training, hooked, merged, off, attached(Normed, config=config), convolution, gated(plain)):
        assert group_lora(adapted) is adapted


def test_merged_models_of_any_rank_are_evaluated(adapted64, federation64, random_stack):
    one, two = (random_stack(adapted64, 3, seed=seed) for seed in (2, 3))
    merged = merge_exact(one, two, torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64))
    loss, accuracy = evaluate(adapted64, merged, federation64.test)
    for client in range(3):
        x, y = federation64.test.client(client)
        logits = adapted64(client_adapter(merged, client), x)
        torch.testing.assert_close(loss[client], F.cross_entropy(logits, y), rtol=1e-9, atol=0)
        assert accuracy[client] == (logits.argmax(1) == y).double().mean()


def maml(f, tensors):
    """The loss after one step of gradient descent (Finn et al., 2017): a gradient within the objective."""
    slope = grad(f)(tensors)
    return f({name: tensor - 0.1 * slope[name] for name, tensor in tensors.items()})


def sharp(f, tensors):
    """The loss and its slope along the tensors themselves: forward mode within the objective."""
    return sum(jvp(f, (tensors,), (tensors,)))


@pytest.mark.filterwarnings("error:the clients run one after another")
@pytest.mark.parametrize("objective", [maml, sharp])
def test_objectives_may_differentiate(adapted64, federation64, random_stack, objective):
    stack, split = random_stack(adapted64, 3, seed=4), federation64.train
    assert isinstance(group_lora(adapted64), GroupedLoRA)
    together = train(adapted64, stack, split, objective=objective, **OPTIONS)
    alone = train(adapted64, stack, split, objective=objective, execution=Execution(vectorize=False), **OPTIONS)
    torch.testing.assert_close(together.losses, alone.losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(flatten(together.adapters), flatten(alone.adapters), rtol=1e-9, atol=1e-12)
    plain = train(adapted64, stack, split, **OPTIONS)
    assert (plain.losses - together.losses).abs().max() > 1e-3


def test_some_clients_may_share_what_does_not_vary(adapted64, federation64, random_adapter):
    """An adapter or examples without a client dimension are everybody's."""
    adapter, x = random_adapter(adapted64, seed=5), federation64.train.x[:, :2]
    logits = vmap(group_lora(adapted64), in_dims=(None, 0))(adapter, x)
    expected = torch.stack([adapted64(adapter, one) for one in x])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-12)


def test_called_alone_it_is_the_backbone(adapted64, federation64, random_adapter):
    adapter, x = random_adapter(adapted64, seed=6), federation64.train.x[0, :2]
    flat = flatten({name: t.unsqueeze(0) for name, t in adapter.items()}).requires_grad_()
    slopes = []
    for forward in (adapted64, group_lora(adapted64)):
        one = {name: t[0] for name, t in unflatten(flat, adapter).items()}
        slopes.append(torch.autograd.grad(forward(one, x).square().sum(), flat)[0])
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)


def test_the_network_is_as_it_was_even_after_a_failure(federation64, random_stack):
    adapted = attached()
    layer = adapted.model.get_submodule("base_model.model.fc1")
    own = layer.forward
    layer.forward = own  # an instance's own forward, as some libraries put there
    before = {name: dict(vars(module)) for name, module in adapted.model.named_modules()}
    stack = random_stack(adapted, 3, seed=7)
    map_clients(group_lora(adapted), stack, federation64.train.x)
    with pytest.raises(RuntimeError):
        group_lora(adapted).grouped_logits(stack, federation64.train.x[..., :20])
    for name, module in adapted.model.named_modules():
        assert vars(module).get("forward") is before[name].get("forward")
    assert layer.forward is own


def test_adapters_in_bf16_give_gradients_in_bf16(adapted, federation, random_stack):
    stack = {name: tensor.bfloat16() for name, tensor in random_stack(adapted, 3, seed=8).items()}
    half = per_sample_gradients(adapted, stack, federation.train)
    full = per_sample_gradients(adapted, {name: t.float() for name, t in stack.items()}, federation.train)
    assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16())


def test_an_adapter_behind_a_gate_trains_by_vmap(adapted64, federation64):
    """FedALT's gates stand between A and B, which rows alone do not see."""
    result = run_algorithm(fedalt(), adapted64, federation64.train, rounds=1, local_steps=1, batch_size=4, lr=1e-2)
    assert group_lora(result.adapted) is result.adapted


def test_an_objective_that_differentiates_is_given_a_quarter_of_the_clients(adapted, federation):
    stack, x = repeat_adapter(adapted.initial, 100), federation.train.x[:1].expand(100, -1, -1, -1, -1)

    def chunk(function=None):
        options = dict(batch_size=4, backward=True, execution=Execution(memory_bytes=4e6))
        return plan_execution(adapted, stack, x, function=function, **options).chunks[0].stop

    whole, quarter = chunk(), chunk(lambda tensors, x: maml(lambda adapter: adapted(adapter, x).sum(), tensors))
    assert quarter > 1 and whole / quarter == pytest.approx(4, rel=0.2)


def test_an_objective_that_vmap_cannot_take_runs_client_by_client(adapted64, federation64, random_stack):
    def clipped(f, tensors):
        return f(tensors) / max(1.0, float(f(tensors).detach()))

    stack, split = random_stack(adapted64, 3, seed=9, scale=1.0), federation64.train
    with pytest.warns(UserWarning, match="one after another"):
        trained = train(adapted64, stack, split, objective=clipped, **OPTIONS)
    alone = train(adapted64, stack, split, objective=clipped, execution=Execution(vectorize=False), **OPTIONS)
    torch.testing.assert_close(flatten(trained.adapters), flatten(alone.adapters), rtol=1e-9, atol=1e-12)
