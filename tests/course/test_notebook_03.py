"""Notebook 03: its checkers know solutions and mistakes; the convex head, the widget, the committed rows."""

import re

import pandas as pd
import pytest
import torch

from potara_lite import files
from potara_lite.course.bound_explorer import bound_explorer
from potara_lite.course.convex_head import draw_sample, fit_heads, head_inputs, head_loss, head_product, head_smoothness
from potara_lite.course.exercises.bound import (
    check_metric,
    check_metric_moments,
    check_second_moment,
    check_three_models,
    check_weight_from_distance,
)
from potara_lite.estimators.moments import Moments, combination_weights
from potara_lite.results import committed_rows


def cross(a, b, distance):
    return (a + b - distance) / 2


def inside(weight):
    return min(max(weight, 0), 1)


def right_weight(a, b, distance):
    return float(Moments(a, b, cross(a, b, distance)).weight)


def free_weight(a, b, distance):
    return (b - cross(a, b, distance)) / distance


def metric_moments(e_f, e_l, metric):
    return tuple(torch.einsum("rp,pq,rq->r", u, metric, v).mean() for u, v in ((e_f, e_f), (e_l, e_l), (e_f, e_l)))


RIGHT = [
    (check_weight_from_distance, right_weight),
    (check_weight_from_distance, lambda *given: inside(free_weight(*given))),
    (check_second_moment, lambda e: e.square().sum(1).mean()),
    (check_second_moment, lambda e: float((e.T @ e).trace()) / len(e)),
    (check_metric_moments, metric_moments),
    (check_three_models, combination_weights),
    (check_three_models, lambda m: m.inverse().sum(1) / m.inverse().sum()),
]
WRONG = [
    (check_weight_from_distance, free_weight, "must stay in [0, 1]"),
    (check_weight_from_distance, lambda *given: 1 - right_weight(*given), "on the local model"),
    (check_weight_from_distance, lambda *given: 1 - free_weight(*given), "on the local model"),
    (check_weight_from_distance, lambda a, b, d: (b - cross(a, b, d)) / (a + b - cross(a, b, d)), "only one c"),
    (check_weight_from_distance, lambda a, b, d: inside((b - cross(a, b, d)) / (a + b - cross(a, b, d))), "only one c"),
    (check_weight_from_distance, lambda a, b, d: b / (a + b), "uncorrelated"),
    (check_weight_from_distance, lambda a, b, d: b / d, "leaves c out"),
    (check_weight_from_distance, lambda a, b, d: inside(b / d), "leaves c out"),
    (check_weight_from_distance, lambda a, b, d: (b - 2 * cross(a, b, d)) / d, "c is half of"),
    (check_weight_from_distance, lambda a, b, d: 0.5, "the answer is"),
    (check_second_moment, lambda e: e.var(0, unbiased=False).sum(), "the bias is lost"),
    (check_second_moment, lambda e: e.var(0).sum(), "nor divide by R - 1"),
    (check_second_moment, lambda e: torch.cov(e.T).trace(), "the bias is lost"),
    (check_second_moment, lambda e: e.square().sum(), "the sum over the repetitions"),
    (check_second_moment, lambda e: e.square().mean(), "sums over the coordinates"),
    (check_second_moment, lambda e: e.norm(dim=1).mean() ** 2, "square each length first"),
    (check_second_moment, lambda e: e.mean(0).square().sum(), "the bias alone"),
    (check_second_moment, lambda e: e.norm(dim=1).mean(), "the mean length"),
    (check_second_moment, lambda e: e.square().sum(1), "one number"),
    (check_metric_moments, lambda f, p, h: metric_moments(f, p, torch.diag(torch.diag(h))), "the diagonal of H only"),
    (
        check_metric_moments,
        lambda f, p, h: metric_moments(f @ h, p @ h, torch.eye(len(h)).double()),
        "H is in it twice",
    ),
    (check_metric_moments, lambda f, p, h: metric_moments(f, p, torch.eye(len(h)).double()), "H is missing"),
    (check_metric_moments, lambda f, p, h: metric_moments(f - f.mean(0), p - p.mean(0), h), "the bias is lost"),
    (
        check_metric_moments,
        lambda f, p, h: tuple(len(f) * m for m in metric_moments(f, p, h)),
        "sums over the repetitions",
    ),
    (check_metric_moments, lambda f, p, h: metric_moments(p, f, h), "the order is"),
    (check_metric_moments, lambda f, p, h: metric_moments(f, p, h)[:2], "3 things"),
    (check_metric_moments, lambda f, p, h: metric_moments(2 * f, p, h), "part 0"),
    (check_three_models, lambda m: 1 / m.diagonal() / (1 / m.diagonal()).sum(), "one over the diagonal"),
    (check_three_models, lambda m: m.sum(1) / m.sum(), "row sums of M"),
    (check_three_models, lambda m: 1 / m.sum(1) / (1 / m.sum(1)).sum(), "one over the row sums"),
    (check_three_models, lambda m: m.inverse().sum(1), "must add up to 1"),
    (check_three_models, lambda m: m.inverse(), "is a matrix"),
    (check_three_models, lambda m: (1 / m).sum(1) / (1 / m).sum(), "entry by entry"),
    (
        check_three_models,
        lambda m: combination_weights(m).clamp_min(0) / combination_weights(m).clamp_min(0).sum(),
        "may be negative",
    ),
    (check_three_models, lambda m: torch.ones(3) / 3, "off by up to"),
]


@pytest.mark.parametrize("check, right", RIGHT)
def test_a_solution_is_correct(check, right):
    assert check(right) == "correct"


@pytest.mark.parametrize("check, wrong, hint", WRONG)
def test_a_wrong_answer_gets_a_hint(check, wrong, hint):
    line = check(wrong)
    assert line.startswith("hint: ") and hint in line


def test_half_of_the_moments_is_correct_with_a_remark():
    half = check_metric_moments(lambda *given: tuple(m / 2 for m in metric_moments(*given)))
    assert half.startswith("correct") and "½" in half


RIDGE, CLASSES = 0.05, 3


@pytest.fixture(scope="module")
def problem():
    """Two clients of 40 examples, 5 inputs, 3 classes."""
    random = torch.Generator().manual_seed(0)
    x = head_inputs(torch.randn(2, 40, 4, generator=random) * 3 + 1)
    y = torch.randint(CLASSES, (2, 40), generator=random)
    return x, y, fit_heads(x, y, CLASSES, RIDGE, tolerance=1e-8)


def test_inputs_are_standardised_and_end_in_a_one():
    random = torch.Generator().manual_seed(1)
    features = torch.randn(3, 10, 4, generator=random) * 5 + 2
    features[..., 1] = 7.0  # a feature that never changes
    x = head_inputs(features)
    assert x.shape == (3, 10, 5) and x.dtype == torch.float64 and (x[..., -1] == 1).all()
    flat = x[..., [0, 2, 3]].flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(flat.std(0), torch.ones(3).double(), rtol=1e-9, atol=0)
    assert x[..., 1].abs().max() == 0


def test_the_gradient_is_zero_at_the_minimiser_and_nothing_near_is_lower(problem):
    x, y, heads = problem
    assert heads.dtype == torch.float64 and heads.shape == (2, 5, CLASSES)
    at = heads.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(head_loss(at, x, y, RIDGE).sum(), at)
    assert gradient.abs().max() <= 1e-8
    random = torch.Generator().manual_seed(2)
    for size in (1e-3, 0.1, 10.0):
        moved = heads + size * torch.randn(heads.shape, generator=random, dtype=torch.float64)
        assert (head_loss(moved, x, y, RIDGE) > head_loss(heads, x, y, RIDGE)).all()


def test_a_client_alone_gets_the_head_that_it_gets_with_others(problem):
    x, y, heads = problem
    alone = fit_heads(x[1:], y[1:], CLASSES, RIDGE, tolerance=1e-8)
    torch.testing.assert_close(alone, heads[1:], rtol=0, atol=1e-6)


def test_the_loss_is_the_mean_cross_entropy_and_the_ridge(problem):
    x, y, heads = problem
    i = 1
    by_hand = -(x[i] @ heads[i]).log_softmax(-1)[torch.arange(40), y[i]].mean() + RIDGE / 2 * (heads[i] ** 2).sum()
    torch.testing.assert_close(head_loss(heads, x, y, RIDGE)[i], by_hand, rtol=1e-9, atol=0)
    zero = torch.zeros_like(heads)
    torch.testing.assert_close(
        head_loss(zero, x, y, RIDGE), torch.full((2,), CLASSES).double().log(), rtol=1e-9, atol=0
    )


def test_the_product_is_that_of_the_hessian(problem):
    x, y, heads = problem
    random = torch.Generator().manual_seed(3)
    u, v = torch.randn(2, 4, *heads.shape, generator=random, dtype=torch.float64)  # four repetitions each
    found = head_product(u, v, heads, x, RIDGE)
    for i in range(2):
        hessian = torch.autograd.functional.hessian(
            lambda w, i=i: head_loss(w.view(1, 5, CLASSES), x[i : i + 1], y[i : i + 1], RIDGE)[0], heads[i].flatten()
        )
        wanted = torch.einsum("rp,pq,rq->r", u[:, i].flatten(1), hessian, v[:, i].flatten(1))
        torch.testing.assert_close(found[:, i], wanted, rtol=1e-9, atol=1e-12)
        assert torch.linalg.eigvalsh(hessian).max() <= head_smoothness(x, RIDGE)[i]


def test_the_smoothness_bounds_the_loss_everywhere(problem):
    x, y, heads = problem
    random = torch.Generator().manual_seed(4)
    for size in (0.01, 1.0, 100.0):
        error = size * torch.randn(heads.shape, generator=random, dtype=torch.float64)
        rise = head_loss(heads + error, x, y, RIDGE) - head_loss(heads, x, y, RIDGE)
        assert (rise <= head_smoothness(x, RIDGE) / 2 * error.square().sum((1, 2))).all()
        assert (rise >= RIDGE / 2 * error.square().sum((1, 2)) * (1 - 1e-6)).all()  # and the ridge from below


def test_fitting_refuses_what_has_no_minimiser_and_says_when_it_has_not_converged(problem):
    x, y, _ = problem
    with pytest.raises(ValueError, match="ridge must be above 0, not 0"):
        fit_heads(x, y, CLASSES, 0)
    with pytest.raises(ValueError, match="not converged"):
        fit_heads(x, y, CLASSES, RIDGE, tolerance=1e-30)


def test_a_sample_is_drawn_without_replacement_and_again_the_same():
    x, y = torch.arange(24.0).view(2, 12, 1), torch.arange(24).view(2, 12)
    some, labels = draw_sample(x, y, 5, seed=3)
    assert some.shape == (2, 5, 1) and (some.squeeze(-1) == labels).all()
    assert all(len(set(row.tolist())) == 5 for row in labels)
    assert (labels[0] < 12).all() and (labels[1] >= 12).all()
    assert (draw_sample(x, y, 5, seed=3)[1] == labels).all() and not (draw_sample(x, y, 5, seed=4)[1] == labels).all()
    assert sorted(draw_sample(x, y, 12, seed=0)[1][0].tolist()) == list(range(12))
    with pytest.raises(ValueError, match="cannot draw 13 of a client's 12"):
        draw_sample(x, y, 13, seed=0)


def rings(picture):
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="6" [^>]*stroke="(#\w+)"', bytes(picture.value).decode())
    return [(float(left), float(down), shade) for left, down, shade in found]


def test_the_explorer_shows_the_bound_and_its_minimum():
    a, b, rho, text, picture = bound_explorer(a=1.0, b=0.6, rho=0.2).children
    c = 0.2 * 0.6**0.5
    assert text.value.startswith(f"c = {c:.2f}: λ* = {(0.6 - c) / (1.6 - 2 * c):.2f}, bound ")
    assert f"bound {float(Moments(1.0, 0.6, c).optimum):.2f}; the better model alone has 0.60" in text.value
    (minimum, _, shade), (across, up, _) = rings(picture)
    assert shade == "#009E73" and "<rect" not in bytes(picture.value).decode().split("Q")[-1]
    b.value = a.options[-1][1]  # a noisier local model: the ring goes right, towards the federated one
    (moved, _, _), (further, level, _) = rings(picture)
    assert moved > minimum and further > across and level == up


def test_the_explorer_marks_where_the_weight_leaves_the_interval():
    *_, text, picture = bound_explorer(a=2.0, b=0.3, rho=0.7).children
    assert "λ* = -0.20, outside [0, 1]; the best inside is 0" in text.value and text.value.endswith("0.30")
    assert [shade for *_, shade in rings(picture)] == ["#d00000", "#d00000"]
    assert "<rect" in bytes(picture.value).decode().split("Q")[-1]
    *_, text, _ = bound_explorer(a=0.5, b=2.0, rho=0.5).children  # on the border: c equals a
    assert "λ* = 1.00, bound 0.50" in text.value


def test_the_explorer_draws_every_state_it_offers():
    *sliders, text, picture = bound_explorer().children
    for slider in sliders:
        for position in (0, len(slider.options) // 2, len(slider.options) - 1):
            slider.index = position
            assert text.value.startswith("c = ") and "nan" not in bytes(picture.value).decode()
    with pytest.raises(ValueError, match="a .federated. must be one of"):
        bound_explorer(a=3.0)


def test_the_committed_rows_come_from_the_package_first_and_from_the_checkout_else(tmp_path, monkeypatch):
    found = committed_rows("bound.csv")
    assert {"regime", "client", "weight", "measured", "predicted", "bound"} <= set(found.columns) and len(found) == 176
    package = tmp_path / "potara_lite"
    (tmp_path / "benchmarks").mkdir()
    pd.DataFrame({"from": ["checkout"]}).to_csv(tmp_path / "benchmarks" / "bound.csv", index=False)
    monkeypatch.setattr(files, "__file__", str(package / "files.py"))
    assert committed_rows("bound.csv")["from"].tolist() == ["checkout"]
    (package / "_data").mkdir(parents=True)
    pd.DataFrame({"from": ["package"]}).to_csv(package / "_data" / "bound.csv", index=False)
    assert committed_rows("bound.csv")["from"].tolist() == ["package"]
    with pytest.raises(ValueError, match="absent.csv is missing"):
        committed_rows("absent.csv")


def inner(u, v):
    return (u * v).sum((-1, -2))


@pytest.mark.parametrize(
    "metric, line",
    [
        (lambda u, v: ..., "not attempted"),
        (inner, "correct"),
        (lambda u, v: 3 * inner(u, v), "hint: at n = 300 the regret is 0.0300"),
        (lambda u, v: (u * v).sum(), "hint: one number for each repetition"),
        (lambda u, v: inner(u, v.cumsum(-1)), "hint: a metric is symmetric"),
        (lambda u, v: -inner(u, v), "hint: a metric is positive"),
        (lambda u, v: u @ v, "hint: your function stopped with RuntimeError"),
    ],
)
def test_the_open_task_wants_a_metric_that_beats_one_half(metric, line):
    one = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    found = check_metric(metric, lambda product: {300: product(one, one).item() / 400}, {300: 0.02}, (2, 3, 5, 4))
    assert found.startswith(line)
