"""Notebook 02: its checkers know solutions and mistakes; the plane, the basis and the widget."""

import math

import pytest
import torch
from torch.nn import functional as F

from potara_lite.adapters.state import client_adapter, delta, lora_layers
from potara_lite.course.exercises.connectivity import (
    check_barrier,
    check_broken,
    check_change_basis,
    check_plane_point,
    check_shrink,
)
from potara_lite.course.explorers import basis_explorer
from potara_lite.merging.connectivity import along_plane, along_segment, barrier
from potara_lite.merging.merge import change_basis, merge_factors

A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "head.weight"


def plane_point(federated, local, x, y):
    """Another right answer: x and y on A instead of B."""
    return {
        A: torch.cat([x * federated[A], y * local[A]]),
        B: torch.cat([federated[B], local[B]], dim=1),
        HEAD: x * federated[HEAD] + y * local[HEAD],
    }


SOLUTIONS = {
    check_barrier: lambda weights, loss: barrier(loss[weights.argsort()][None], weights.sort().values),
    check_shrink: lambda w, angle: w**2 + (1 - w) ** 2 + 2 * w * (1 - w) * math.cos(angle),
    check_plane_point: plane_point,
    check_change_basis: lambda B, A, M: (B @ M, torch.linalg.solve(M, A)),
}


@pytest.mark.parametrize("check, right", SOLUTIONS.items())
def test_a_solution_is_correct(check, right):
    assert check(right) == "correct"


@pytest.mark.parametrize(
    "check, wrong, hint",
    [
        (check_barrier, lambda weights, loss: loss, "the answer is one number"),
        (check_shrink, lambda w, angle: 1.0, "yours is 1"),
        (check_plane_point, lambda F, L, x, y: F[A], "the answer is a dictionary"),
        (check_plane_point, lambda F, L, x, y: {A: F[A], B: F[B], HEAD: F[HEAD]}, "entry 'the product"),
        (check_change_basis, lambda B, A, M: B @ M, "the answer is 2 things"),
        (check_change_basis, lambda B, A, M: (B / 2, 2 * A), "part 0: off by up to"),
    ],
)
def test_a_wrong_answer_gets_a_hint(check, wrong, hint):
    line = check(wrong)
    assert line.startswith("hint: ") and hint in line


@pytest.fixture(scope="module")
def pair(adapted64, random_stack):
    return random_stack(adapted64, 3, 5, scale=0.5), random_stack(adapted64, 3, 6, scale=0.5)


def test_a_plane_is_that_of_the_dense_weights(adapted64, backbone64, pair, federation64):
    x, y = [-0.5, 0.0, 1.0], [0.0, 1.25]
    loss, accuracy = along_plane(adapted64, *pair, federation64.test, x, y)
    assert loss.shape == accuracy.shape == (3, 2, 3)
    for client in range(3):
        images, labels = federation64.test.client(client)
        one, other = (delta(client_adapter(stack, client), adapted64.scaling) for stack in pair)
        for row, up in enumerate(y):
            for column, right in enumerate(x):
                change = {n.removeprefix("base_model.model."): right * one[n] + up * other[n] for n in one}
                moved = {n: t if "head" in n else backbone64.get_parameter(n) + t for n, t in change.items()}
                logits = torch.func.functional_call(backbone64, moved, (images,))
                wanted = F.cross_entropy(logits, labels).item()
                assert loss[client, row, column].item() == pytest.approx(wanted, rel=1e-9)
                right_ones = (logits.argmax(1) == labels).double().mean().item()
                assert accuracy[client, row, column].item() == pytest.approx(right_ones, rel=1e-9)


def test_a_plane_holds_its_origin_its_models_and_their_segment(adapted64, pair, federation64):
    loss, _ = along_plane(adapted64, *pair, federation64.test, [0, 0.25, 1], torch.tensor([0, 0.75, 1]))
    segment, _ = along_segment(adapted64, *pair, federation64.test, [0.0, 0.25, 1.0])
    torch.testing.assert_close(
        torch.stack([loss[:, 2, 0], loss[:, 1, 1], loss[:, 0, 2]], 1), segment, rtol=1e-9, atol=0
    )
    knows_nothing = torch.full((3,), math.log(4), dtype=torch.float64)
    torch.testing.assert_close(loss[:, 0, 0], knows_nothing, rtol=1e-9, atol=0)


def test_another_basis_is_the_same_model(adapted64, pair):
    matrix = torch.tensor([[1.0, 2.0], [0.5, -3.0]], dtype=torch.float64)
    stack = pair[0]
    moved = change_basis(stack, matrix)
    for layer in lora_layers(stack):
        a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
        for client in range(3):
            torch.testing.assert_close(moved[b][client], stack[b][client] @ matrix, rtol=1e-9, atol=1e-12)
            wanted = torch.linalg.solve(matrix, stack[a][client])
            torch.testing.assert_close(moved[a][client], wanted, rtol=1e-9, atol=1e-12)
    before, after = (delta(adapter, adapted64.scaling) for adapter in (stack, moved))
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-9, atol=1e-12)
    alone = change_basis(client_adapter(stack, 1), matrix)
    for name, tensor in client_adapter(moved, 1).items():
        torch.testing.assert_close(alone[name], tensor, rtol=1e-9, atol=1e-12)


def test_a_basis_of_a_convolution():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((3, 2, 4, 3, 3), (3, 5, 2, 1, 1)))
    matrix = torch.tensor([[1.0, 2.0], [0.5, -3.0]], dtype=torch.float64)
    stack = {"l.lora_A.weight": a, "l.lora_B.weight": b}
    before, after = (delta(adapter, {"l": 1.5})["l.weight"] for adapter in (stack, change_basis(stack, matrix)))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2, math.pi])
def test_how_much_a_turn_shrinks_the_product(adapted64, pair, weight, angle):
    cos, sin = math.cos(angle), math.sin(angle)
    turned = change_basis(pair[0], torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64))
    mixed = delta(merge_factors(turned, pair[0], weight), adapted64.scaling)
    factor = 1 - 2 * weight * (1 - weight) * (1 - cos)
    for layer in lora_layers(pair[0]):
        product = delta(pair[0], adapted64.scaling)[f"{layer}.weight"]
        torch.testing.assert_close(mixed[f"{layer}.weight"], factor * product, rtol=1e-9, atol=1e-12)


def test_a_basis_has_to_be_one(pair):
    with pytest.raises(ValueError, match=r"matrix must be of shape \(2, 2\)"):
        change_basis(pair[0], torch.eye(3))
    with pytest.raises(ValueError, match="no inverse"):
        change_basis(pair[0], torch.ones(2, 2))


DEGREES = torch.tensor([0.0, 90.0, 180.0])
LOSS = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.5, 5.0]])


def test_the_explorer_turns():
    box = basis_explorer(DEGREES, LOSS, 1 / LOSS, LOSS[:, 0], 1 / LOSS[:, 0])
    client, angle, text, picture = box.children
    assert text.value == (
        "all clients, turned by 0°: by factors loss 1.500 nats, accuracy 0.750; by deltas 1.500 and 0.750"
    )
    seen = {bytes(picture.value)}
    angle.index = 2
    assert "turned by 180°: by factors loss 4.000 nats" in text.value
    seen.add(bytes(picture.value))
    client.value = 2
    assert text.value == (
        "client 1, turned by 180°: by factors loss 5.000 nats, accuracy 0.200; by deltas 2.000 and 0.500"
    )
    assert len(seen | {bytes(picture.value)}) == 3


def test_the_explorer_refuses_what_does_not_fit():
    for levels in (LOSS[:1, 0], LOSS):
        with pytest.raises(ValueError, match=r"level_loss must be numbers of shape \(C\) with C = 2"):
            basis_explorer(DEGREES, LOSS, LOSS, levels, levels)
    with pytest.raises(ValueError, match=r"loss must be numbers of shape \(C, T\) with T = 2"):
        basis_explorer(DEGREES[:2], LOSS, LOSS, LOSS[:, 0], LOSS[:, 0])


@pytest.mark.parametrize(
    "results, line",
    [
        (..., "not attempted"),
        ((torch.tensor([0.3, 0.0]), torch.tensor([0.8, 0.7])), "correct"),
        ((torch.tensor([0.3, 0.0]), torch.tensor([0.8, 0.3])), "hint: your local models have a mean accuracy of 0.55"),
        ((torch.tensor([0.05, 0.0]), torch.tensor([0.8, 0.8])), "hint: 0 of 2 clients have a barrier"),
    ],
)
def test_the_open_task_wants_a_hill_and_a_good_model(results, line):
    assert check_broken(results).startswith(line)
