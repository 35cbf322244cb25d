"""Notebook 01: its checkers know solutions and mistakes, and its widget shows what it is given."""

import math

import pytest
import torch

from potara_lite import fashion_mnist
from potara_lite.course.exercises.federated_lora import (
    check_aggregate_gap,
    check_fedavg,
    check_ffa_trains,
    check_partition,
    check_total_bytes,
)
from potara_lite.course.explorers import heterogeneity_explorer
from potara_lite.training.fedavg import weighted_average

SOLUTIONS = {
    check_fedavg: weighted_average,
    check_total_bytes: lambda adapter, rounds: (2 * rounds + 1) * sum(t.nbytes for t in adapter.values()),
    check_aggregate_gap: lambda A, B: float(
        torch.linalg.norm(sum(b @ a for a, b in zip(A, B)) / len(A) - B.mean(0) @ A.mean(0))
        / torch.linalg.norm(sum(b @ a for a, b in zip(A, B)) / len(A))
    ),
    check_ffa_trains: lambda name: ".lora_A." not in name,
}


@pytest.mark.parametrize("check, right", SOLUTIONS.items())
def test_a_solution_is_correct(check, right):
    assert check(right) == "correct"


@pytest.mark.parametrize(
    "check, wrong, hint",
    [
        (check_fedavg, lambda stack, sizes: list(stack.values())[0].mean(0), "the answer is a dictionary"),
        (check_fedavg, lambda stack, sizes: {"tensor 0": stack["tensor 0"][0]}, "missing: 'tensor 1'"),
        (check_fedavg, lambda stack, sizes: stack, "the answer has the shape (3,); yours has (3, 3)"),
        (check_total_bytes, lambda adapter, rounds: 0.0, "yours is 0"),
        (check_aggregate_gap, lambda A, B: B.mean(0) @ A.mean(0), "the answer is one number"),
        (check_ffa_trains, lambda name: "head" in name, "right on 4 examples of 6, not on f('base_model"),
    ],
)
def test_a_wrong_answer_gets_a_hint(check, wrong, hint):
    line = check(wrong)
    assert line.startswith("hint: ") and hint in line


def test_the_explorer_counts_kinds_and_swaps_pictures():
    alphas = [0.1, math.inf]
    sizes = dict(clients=3, train_size=40, calibration_size=4, test_size=8)
    splits = [fashion_mnist(alpha=alpha, **sizes).train for alpha in alphas]
    slider, text, picture = heterogeneity_explorer(alphas, splits, list("abcdefghij")).children
    assert text.value.startswith("α = ∞: a client has 10.0 of 10 kinds")
    even = picture.value
    slider.index = 0
    labels = [splits[0].client(i)[1] for i in range(3)]
    kinds = sum(len(y.unique()) for y in labels) / 3
    commonest = sum((y.bincount().max() / len(y)).item() for y in labels) / 3
    together = (torch.cat(labels).bincount().max() / 120).item()
    assert text.value == (
        f"α = 0.1: a client has {kinds:.1f} of 10 kinds, its commonest is {commonest:.0%} of its images "
        f"(of all clients' images together: {together:.0%})"
    )
    assert picture.value != even and bytes(picture.value).startswith(b"<?xml")
    slider.index = 1
    assert picture.value == even


def test_the_explorer_wants_a_split_for_each_concentration(federation):
    with pytest.raises(ValueError, match="2 concentrations, but 1 splits"):
        heterogeneity_explorer([0.1, 1], [federation.train], list("abcd"))


OTHER = torch.arange(800).view(100, 8).T.contiguous()


@pytest.mark.parametrize(
    "rows, line",
    [
        (..., "not attempted"),
        (OTHER, "correct"),
        (torch.arange(800).view(8, 100).flip(1), "hint: that is the partition of section 4"),
        (OTHER.clamp_min(1), "hint: eight rows of 100 indices"),
        (OTHER.T, "hint: eight rows of 100 indices"),
    ],
)
def test_the_open_task_wants_each_image_once_and_another_partition(rows, line):
    assert check_partition(lambda labels: rows, torch.zeros(800).long()).startswith(line)
