"""The closed form, its bound, and the estimators of the weight."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from potara_lite import Moments, estimate_curve, estimate_paper, estimate_uniform
from potara_lite.adapters.state import client_adapter, delta, flatten
from potara_lite.federation.split import Split

GRID = torch.linspace(0, 1, 20_001, dtype=torch.float64)
POSITIVE = st.floats(1e-3, 1e3)
INF, NAN = float("inf"), float("nan")


@st.composite
def moments(draw):
    """``a``, ``b`` and a ``c`` that Cauchy–Schwarz allows, both signs."""
    a, b, correlation = draw(POSITIVE), draw(POSITIVE), draw(st.floats(-0.99, 0.99))
    return a, b, correlation * (a * b) ** 0.5


@settings(max_examples=200, deadline=None)
@given(moments())
def test_the_closed_form_is_the_minimum_of_a_brute_force_grid(abc):
    a, b, c = abc
    m = Moments(a, b, c)
    values = GRID**2 * a + (1 - GRID) ** 2 * b + 2 * GRID * (1 - GRID) * c
    assert abs(float(m.weight) - float(GRID[values.argmin()])) <= 1 / 20_000 * (1 + 1e-6)
    assert float(m.optimum) <= float(values.min()) * (1 + 1e-9) + 1e-12
    torch.testing.assert_close(m.bound(GRID), values, rtol=1e-9, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(moments())
def test_the_optimum_is_at_most_either_moment_and_has_the_stated_form_inside(abc):
    a, b, c = abc
    m = Moments(a, b, c)
    assert float(m.optimum) <= min(a, b) * (1 + 1e-12)
    if c < min(a, b):
        assert 0 < float(m.weight) < 1
        assert float(m.weight) == pytest.approx((b - c) / (a + b - 2 * c), rel=1e-9)
        assert float(m.optimum) == pytest.approx((a * b - c * c) / (a + b - 2 * c), rel=1e-7, abs=1e-12 * (a + b))
    else:
        assert float(m.weight) == (1.0 if a < b else 0.0 if b < a else 0.5)
        assert float(m.optimum) == pytest.approx(min(a, b), rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(moments(), st.floats(1e-6, 1e6))
def test_scaling_the_moments_scales_the_bound_and_keeps_the_weight(abc, scale):
    m, scaled = Moments(*abc), Moments(*(scale * value for value in abc))
    assert float(scaled.weight) == pytest.approx(float(m.weight), rel=1e-9, abs=1e-12)
    assert float(scaled.optimum) == pytest.approx(scale * float(m.optimum), rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(moments())
def test_swapping_the_models_mirrors_the_weight(abc):
    a, b, c = abc
    assert float(Moments(b, a, c).weight) == pytest.approx(1 - float(Moments(a, b, c).weight), rel=1e-9, abs=1e-12)


def test_the_weight_is_on_the_federated_model():
    assert Moments(1.0, 3.0, 0.0).weight.item() == pytest.approx(0.75, rel=1e-12)  # federated is better: more of it
    assert Moments([1.0, 4.0], [4.0, 1.0], [0.5, 0.5]).weight.tolist() == pytest.approx([0.875, 0.125], rel=1e-12)
    assert Moments(2.0, 5.0, 1.0).bound(1.0).item() == 2.0
    assert Moments(2.0, 5.0, 1.0).bound(0.0).item() == 5.0


@pytest.mark.parametrize(
    "a, b, c, weight, optimum",
    [
        (1, 3, 1.5, 1, 1),  # c > min(a, b): the better model alone
        (3, 1, 1.5, 0, 1),
        (3, 1, 1, 0, 1),
        (2, 2, 2, 0.5, 2),  # the same error: ½
        (0, 0, 0, 0.5, 0),
        (1, 1, 1 - 1e-13, 0.5, 1),  # all but the same
        (1, 1, 2, 0.5, 1.5),  # no such errors exist (c² > ab), but the answer is stated
        (1, 3, 2, 1, 1),  # nor these; the bound is a straight line, so its lower end
        (0, 2, 0, 1, 0),
        (2, 0, 0, 0, 0),
        (INF, 1, 0, 0, 1),
        (1, INF, 0, 1, 1),
        (1, INF, INF, 1, 1),
        (INF, INF, 0, 0.5, INF),
    ],
)
def test_degenerate_moments_have_the_stated_answer(a, b, c, weight, optimum):
    m = Moments(a, b, c)
    assert m.weight.tolist() == [weight]
    assert m.optimum.item() == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize(
    "a, b, c, message",
    [
        ([1.0, NAN], [1.0, 1.0], [0.0, 0.0], "moment a is NaN for client 1"),
        ([1.0, 1.0], [NAN, 1.0], [0.0, 0.0], "moment b is NaN for client 0"),
        ([1.0, 1.0], [1.0, 1.0], [0.0, NAN], "moment c is NaN for client 1"),
        ([1.0, -1e-9], [1.0, 1.0], [0.0, 0.0], "moment a is negative for client 1"),
        ([1.0, 1.0], [-2.0, 1.0], [0.0, 0.0], "moment b is negative for client 0"),
    ],
)
def test_impossible_moments_are_refused_by_client(a, b, c, message):
    with pytest.raises(ValueError, match=message):
        Moments(a, b, c)


def test_moments_are_float64_whatever_comes_in():
    m = Moments(torch.tensor([1.0]), 3, np.float32(0))
    assert {t.dtype for t in (m.a, m.b, m.c, m.weight, m.optimum)} == {torch.float64}


def test_with_known_covariances_the_bound_is_the_expected_squared_error():
    """Monte Carlo on a quadratic: errors of both models drawn with known covariance and a bias of the federated one."""
    rng = np.random.default_rng(0)
    d, n = 5, 40_000
    root = rng.normal(size=(2 * d, 2 * d)) / 3 * np.repeat([1.0, 1.5], d)[:, None]
    covariance, mean = root @ root.T, np.concatenate([rng.normal(size=d) / 2, np.zeros(d)])
    second = covariance + np.outer(mean, mean)
    m = Moments(np.trace(second[:d, :d]), np.trace(second[d:, d:]), np.trace(second[:d, d:]))
    assert 0.05 < m.weight.item() < 0.95
    e = mean + rng.normal(size=(n, 2 * d)) @ root.T
    for w in (0.0, 0.2, m.weight.item(), 0.7, 1.0):
        squared = ((w * e[:, :d] + (1 - w) * e[:, d:]) ** 2).sum(1)
        error = squared.std() / n**0.5
        assert error < 0.01 * squared.mean()  # the check is sharp to a few per cent
        assert abs(squared.mean() - m.bound(w).item()) < 4 * error
    best = ((m.weight.item() * e[:, :d] + (1 - m.weight.item()) * e[:, d:]) ** 2).sum(1)
    for w in (0.0, 0.5, 1.0):
        other = ((w * e[:, :d] + (1 - w) * e[:, d:]) ** 2).sum(1)
        paired = other - best
        assert paired.mean() > 4 * paired.std() / n**0.5  # the closed form is better, beyond the noise


def test_uniform_is_a_half(adapted64, random_stack, federation64):
    stack = random_stack(adapted64, 3, seed=0)
    assert estimate_uniform(adapted64, stack, stack, federation64.calibration).weight.tolist() == [0.5] * 3


def planted_gradients(_, stack, split):
    """The gradients that stand in the place of an adapter, as many as there are examples."""
    return stack["planted"][:, : int(split.sizes.max())]


@pytest.fixture
def plant(monkeypatch):
    """Let ``estimate_paper`` see these gradients for the federated (first) and the local model."""

    def run(federated, local, sizes, **options):
        module = sys.modules[estimate_paper.__module__]
        stacks = ({"planted": torch.as_tensor(gradients)} for gradients in (federated, local))
        monkeypatch.setattr(module, "per_sample_gradients", planted_gradients)
        monkeypatch.setattr(module, "check_models", lambda *_, **models: models.values())
        split = Split([(torch.zeros(n, 1), torch.zeros(n).long()) for n in sizes])
        return estimate_paper.__wrapped__(None, *stacks, split, **options)

    return run


def test_fisher_on_planted_gradients_by_hand(plant):
    """Two clients, two coordinates, the second client with one example and one of padding."""
    g_f = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[2.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    g_l = torch.tensor([[[2.0, 1.0], [1.0, 1.0]], [[1.0, -1.0], [0.0, 0.0]]], dtype=torch.float64)
    m = plant(g_f, g_l, [2, 1], damping=0.5, relative=False).moments
    # Client 0: F_F = (5, 2), F_L = (2.5, 1), cross = (2.5, 1); rho = 2.5/sqrt(12.5), 1/sqrt(2).
    var_f, var_l = np.array([1 / 5.5, 1 / 2.5]), np.array([1 / 3.0, 1 / 1.5])
    rho = np.array([2.5 / 12.5**0.5, 1 / 2**0.5])
    # Client 1: F_F = (4, 1), F_L = (1, 1), rho = (1, -1) and -1 is clipped to 0.
    expected = {
        "a": [var_f.sum(), 1 / 4.5 + 1 / 1.5],
        "b": [var_l.sum(), 1 / 1.5 + 1 / 1.5],
        "c": [(rho * np.sqrt(var_f * var_l)).sum(), (1 / 4.5 / 1.5) ** 0.5],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(m, name), values, rtol=1e-9)


def test_relative_damping_is_in_units_of_the_mean_of_both_fishers(plant):
    rng = np.random.default_rng(0)
    g_f, g_l = rng.normal(size=(2, 3, 4, 6))
    sizes = [4, 4, 4]
    fishers = (g_f**2).mean(1), (g_l**2).mean(1)
    scale = (fishers[0].mean(1) + fishers[1].mean(1)) / 2
    m = plant(g_f, g_l, sizes, damping=0.3).moments
    np.testing.assert_allclose(m.a, (1 / (fishers[0] + 0.3 * scale[:, None])).sum(1), rtol=1e-9)
    np.testing.assert_allclose(m.b, (1 / (fishers[1] + 0.3 * scale[:, None])).sum(1), rtol=1e-9)
    scaled = plant(10 * g_f, 10 * g_l, sizes, damping=0.3)
    np.testing.assert_allclose(scaled.weight, m.weight, rtol=1e-9)  # no unit of the loss is left in the weight


def test_the_correlation_is_clipped_where_asked(plant):
    rng = np.random.default_rng(0)
    g_f, noise = rng.normal(size=(2, 1, 5, 8))
    g_l = -g_f + 0.3 * noise  # the two models' gradients oppose each other
    clipped = plant(g_f, g_l, [5], damping=0.1).moments
    signed = plant(g_f, g_l, [5], damping=0.1, clip=(-1.0, 1.0)).moments
    f_f, f_l, cross = (g_f**2).mean(1), (g_l**2).mean(1), (g_f * g_l).mean(1)
    delta = 0.1 * (f_f.mean() + f_l.mean()) / 2
    covariance = cross / np.sqrt(f_f * f_l) / np.sqrt((f_f + delta) * (f_l + delta))
    assert (cross < 0).all()
    assert clipped.c.item() == 0
    assert signed.c.item() == pytest.approx(covariance.sum(), rel=1e-9)


@pytest.mark.parametrize("planted", ["batch gradient", "swapped models", "no damping of the local Fisher"])
def test_planted_bugs_in_the_fisher_estimator_are_seen(plant, planted):
    """The true weight by hand, and that each bug moves it far beyond the tolerance of the tests above."""
    g_f, g_l = np.random.default_rng(1).normal(size=(2, 1, 6, 10)) * np.array([1.0, 0.5]).reshape(2, 1, 1, 1)

    def weight(f_f, f_l, delta_l=0.1):
        var_f, var_l = 1 / (f_f + 0.1), 1 / (f_l + delta_l)
        rho = ((g_f * g_l).mean(1) / np.sqrt((g_f**2).mean(1) * (g_l**2).mean(1))).clip(0, 1)
        a, b, c = var_f.sum(), var_l.sum(), (rho * np.sqrt(var_f * var_l)).sum()
        return np.clip((b - c) / (a + b - 2 * c), 0, 1)

    f_f, f_l = (g_f**2).mean(1), (g_l**2).mean(1)
    found = plant(g_f, g_l, [6], damping=0.1, relative=False).weight.item()
    assert found == pytest.approx(weight(f_f, f_l), rel=1e-9)
    wrong = {
        "batch gradient": lambda: weight(g_f.mean(1) ** 2, g_l.mean(1) ** 2),
        "swapped models": lambda: weight(f_l, f_f),
        "no damping of the local Fisher": lambda: weight(f_f, f_l, 0),
    }[planted]()
    assert abs(found - wrong) > 0.02


def test_fisher_survives_zero_gradients_identical_models_and_one_sample(plant):
    zero, some = np.zeros((1, 3, 4)), np.random.default_rng(0).normal(size=(1, 3, 4))
    assert plant(zero, zero, [3]).weight.item() == 0.5
    assert plant(some, some, [3]).weight.item() == 0.5  # the very same model
    assert plant(zero, some, [3]).weight.item() < 0.1  # the formula trusts the model that has gradients …
    assert plant(some, zero, [3]).weight.item() > 0.9  # … and so not an over-fitted local one: the degeneracy gap
    one = plant(some[:, :1], 2 * some[:, :1], [1])
    assert one.weight.isfinite().all() and 0 <= one.weight.item() <= 1


def test_fisher_of_real_models_by_a_loop_of_autograd(adapted64, random_stack, federation64):
    federated, local = random_stack(adapted64, 3, seed=1), random_stack(adapted64, 3, seed=2)
    split = federation64.calibration
    found = estimate_paper(adapted64, federated, local, split, damping=0.2)
    for client in range(3):
        x, y = split.client(client)
        both = []
        for stack in (federated, local):
            leaves = {n: t.clone().requires_grad_() for n, t in client_adapter(stack, client).items()}
            rows = [
                torch.autograd.grad(F.cross_entropy(adapted64(leaves, x[i : i + 1]), y[i : i + 1]), [*leaves.values()])
                for i in range(len(y))
            ]
            both.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
        f_f, f_l = (g.square().mean(0) for g in both)
        delta = 0.2 * (f_f.mean() + f_l.mean()) / 2
        rho = ((both[0] * both[1]).mean(0) / (f_f * f_l).sqrt()).nan_to_num(0).clamp(0, 1)
        a, b = 1 / (f_f + delta), 1 / (f_l + delta)
        expected = torch.stack([a.sum(), b.sum(), (rho * (a * b).sqrt()).sum()])
        m = found.moments
        torch.testing.assert_close(torch.stack([m.a[client], m.b[client], m.c[client]]), expected, rtol=1e-9, atol=0)
        assert 0.01 < found.weight[client] < 0.99


def test_the_curve_picks_the_minimum_of_the_held_out_loss(adapted64, backbone64, random_stack, federation64):
    """Against dense weights mixed by hand: ``W + w dW_F + (1 - w) dW_L``."""
    federated, local = (random_stack(adapted64, 3, seed=s, scale=0.5) for s in (5, 6))
    split, oracle = federation64.calibration, torch.zeros(3, 5, dtype=torch.float64)
    for client in range(3):
        x, y = split.client(client)
        one, two = (delta(client_adapter(stack, client), adapted64.scaling) for stack in (federated, local))
        for k, w in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
            mixed = {name.removeprefix("base_model.model."): w * one[name] + (1 - w) * two[name] for name in one}
            moved = {n: mixed[n] if "head" in n else backbone64.get_parameter(n) + mixed[n] for n in mixed}
            oracle[client, k] = F.cross_entropy(torch.func.functional_call(backbone64, moved, (x,)), y)
    found = estimate_curve(adapted64, federated, local, split, points=5)
    torch.testing.assert_close(found.details["loss"].double(), oracle, rtol=1e-9, atol=0)
    assert found.weight.tolist() == [0.25 * int(k) for k in oracle.argmin(1)]
    assert len(set(found.weight.tolist())) > 1


def test_the_curve_of_identical_models_is_flat(adapted64, random_stack, federation64):
    stack = random_stack(adapted64, 3, seed=5)
    split = federation64.calibration
    loss = estimate_curve(adapted64, stack, stack, split, points=3).details["loss"]
    torch.testing.assert_close(loss, loss[:, :1].expand(3, 3), rtol=1e-9, atol=0)


def test_a_clients_weight_does_not_depend_on_the_order_of_clients(adapted64, random_stack, federation64):
    federated, local = (random_stack(adapted64, 3, seed=s, scale=0.5) for s in (5, 6))
    order = [2, 0, 1]
    turned = [{name: tensor[order] for name, tensor in stack.items()} for stack in (federated, local)]
    assert torch.equal(flatten(turned[0])[0], flatten(federated)[2])
    for estimator in (estimate_paper, estimate_curve):
        usual = estimator(adapted64, federated, local, federation64.calibration).weight
        mixed = estimator(adapted64, *turned, federation64.calibration.rows(order)).weight
        torch.testing.assert_close(mixed, usual[order], rtol=1e-9, atol=1e-12)
