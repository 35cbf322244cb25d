"""``potara.py``, the reference implementation of the paper: everything faster agrees with it."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from conftest import finished, peft_model

from potara_lite import Moments, evaluate, fedit, merge_exact, per_sample_gradients, potara, repeat_adapter, train
from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import client_adapter, delta, flatten
from potara_lite.estimators import estimate_paper
from potara_lite.models.vit import lab_vit

FILE = Path(potara.__file__)


def by_parameter(adapted, adapter):
    """An adapter under the names of the PEFT model's parameters, in their order."""
    return {name: adapter[key] for key, name in adapted.parameter_names.items()}


def columns(adapted, model, rows):
    """The columns of ``potara``'s gradients (…, P) in the order of the library's adapter."""
    parts = dict(zip(potara.trained(model), rows.split([p.numel() for p in potara.trained(model).values()], dim=-1)))
    return torch.cat([parts[adapted.parameter_names[name]] for name in adapted.initial], dim=-1)


def test_it_needs_nothing_of_the_library_but_data_and_a_backbone():
    nodes = [node for node in ast.walk(ast.parse(FILE.read_text())) if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in nodes if not node.level} == {"__future__", "peft", "torch", "torch.nn"}
    assert {node.module for node in nodes if node.level} == {
        "federation.batches", "federation.sources", "models.vit",
    }  # fmt: skip


def test_the_forward_pass_of_peft_is_the_one_that_the_comment_says():
    """``x @ W.T + bias + scaling * (x @ A.T) @ B.T``, which is a linear layer of weight ``W + scaling * B @ A``."""
    model = potara.lora_model(lab_vit(), rank=3)
    layer = model.get_submodule("base_model.model.blocks.1.fc1").double()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(B)
    W, bias = layer.base_layer.weight, layer.base_layer.bias
    scaling = layer.scaling["default"]
    x = torch.randn(5, A.shape[1], dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, x @ W.T + bias + scaling * (x @ A.T) @ B.T, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(y, x @ (W + scaling * B @ A).T + bias, rtol=1e-9, atol=1e-12)


def test_the_model_is_the_one_that_the_library_attaches():
    model, adapted = potara.lora_model(lab_vit(), rank=4, seed=3), attach(lab_vit(), rank=4, seed=3)
    weights = potara.get_weights(model)
    assert weights.keys() == set(adapted.parameter_names.values())
    for name, tensor in by_parameter(adapted, adapted.initial).items():
        assert torch.equal(weights[name], tensor), name


def test_the_librarys_rounds_are_these_rounds(adapted64, federation64):
    clients = [federation64.train.client(i) for i in range(3)]
    shared = potara.fedit(peft_model(adapted64), clients, rounds=10, steps=5, lr=2e-3, seed=4)
    library = fedit(adapted64, federation64.train, rounds=10, local_steps=5, lr=2e-3, seed=4).adapter
    for name, tensor in by_parameter(adapted64, library).items():
        torch.testing.assert_close(tensor, shared[name], rtol=0, atol=1e-9)


def test_the_librarys_rounds_are_these_rounds_in_float32(adapted, federation):
    clients = [federation.train.client(i) for i in range(3)]
    shared = potara.fedit(peft_model(adapted), clients, rounds=10, steps=5, lr=2e-3, seed=4)
    library = fedit(adapted, federation.train, rounds=10, local_steps=5, lr=2e-3, seed=4).adapter
    for name, tensor in by_parameter(adapted, library).items():
        torch.testing.assert_close(tensor, shared[name], rtol=0, atol=1e-5)  # 50 steps of at most 2e-3, as in training


def test_the_librarys_gradients_and_paper_weight_are_these(adapted64, federation64, random_stack):
    federated, local = (random_stack(adapted64, 3, seed=s) for s in (5, 6))
    estimate = estimate_paper(adapted64, federated, local, federation64.train)
    library = per_sample_gradients(adapted64, federated, federation64.train)
    model = peft_model(adapted64)
    for client in range(3):
        x, y = federation64.train.client(client)
        g_F, g_L = (
            potara.per_sample_gradients(model, by_parameter(adapted64, client_adapter(stack, client)), x, y)
            for stack in (federated, local)
        )
        torch.testing.assert_close(library[client, : len(y)], columns(adapted64, model, g_F), rtol=1e-9, atol=1e-12)
        moments = potara.moments(g_F, g_L)
        for name, value in zip("abc", moments):
            torch.testing.assert_close(getattr(estimate.moments, name)[client], value, rtol=1e-9, atol=0)
        weight = potara.mixing_weight(*moments)
        torch.testing.assert_close(estimate.weight[client], weight, rtol=1e-9, atol=0)
        torch.testing.assert_close(
            Moments(*moments).bound(0.3)[0], potara.bound(torch.tensor(0.3).double(), *moments), rtol=1e-7, atol=0
        )
        assert potara.bound(weight, *moments) <= min(moments[0], moments[1])


def test_the_librarys_merge_is_this_merge(adapted64, random_stack):
    federated, local = (client_adapter(random_stack(adapted64, 1, seed=s), 0) for s in (5, 6))
    model = peft_model(adapted64)
    theta_F, theta_L = (potara.task_vector(model, by_parameter(adapted64, one)) for one in (federated, local))
    merged, library = potara.merge(theta_F, theta_L, 0.3), delta(merge_exact(federated, local, 0.3), adapted64.scaling)
    names = {f"{layer}.weight": f"{layer}.base_layer.weight" for layer in adapted64.scaling}
    for name, tensor in library.items():
        here = merged[names.get(name, adapted64.parameter_names.get(name))]
        torch.testing.assert_close(tensor, here, rtol=1e-9, atol=1e-12)


def test_the_librarys_evaluation_of_a_merge_is_this_one(adapted64, federation64, random_stack):
    federated, local = (random_stack(adapted64, 3, seed=s) for s in (5, 6))
    loss, accuracy = evaluate(adapted64, merge_exact(federated, local, 0.3), federation64.test)
    untrained = peft_model(adapted64)
    for client in range(3):
        theta = (
            potara.task_vector(untrained, by_parameter(adapted64, client_adapter(stack, client)))
            for stack in (federated, local)
        )
        found = potara.evaluate(untrained, potara.merge(*theta, 0.3), *federation64.test.client(client))
        assert (loss[client].item(), accuracy[client].item()) == pytest.approx(found, rel=1e-9)


def test_local_training_is_training_alone(adapted64, federation64):
    x, y = federation64.train.client(1)
    model = peft_model(adapted64)
    optimizer = torch.optim.AdamW(potara.trained(model).values(), lr=2e-3, weight_decay=0)
    local = potara.train(model, optimizer, x, y, potara.batch_indices(len(y), 0, 50, 8, (0, 1, 1)))
    stack = repeat_adapter(adapted64.initial, 3)
    library = train(adapted64, stack, federation64.train, steps=50, batch_size=8, lr=2e-3, seed=(0, 1)).adapters
    found = by_parameter(adapted64, client_adapter(library, 1))
    for name, tensor in local.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)
    assert (flatten(library) - flatten(stack)).abs().max() > 1e-3


def test_it_runs_and_prints_a_line_per_client():
    code = "from potara_lite.potara import main; main(clients=2, rounds=1, local_steps=2)"
    run = finished([sys.executable, "-c", code])
    head, *lines = run.stdout.splitlines()
    assert "λ" in head and [line.split(":")[0] for line in lines] == ["0", "1"]
    assert all(len(line.split()) == 8 and 0 <= float(line.split()[-1]) <= 1 for line in lines)
