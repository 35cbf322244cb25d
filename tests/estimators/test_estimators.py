"""The estimators of the mixing weight, and the pure functions of moments behind them."""

import sys

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.nn import functional as F

from potara_lite.adapters.lora import attach
from potara_lite.adapters.state import client_adapter, delta, flatten, repeat_adapter
from potara_lite.estimators import (
    by_layer,
    estimate_calibrated,
    estimate_curve,
    estimate_ensemble,
    estimate_gauss_newton,
    estimate_gradient,
    estimate_laplace,
    estimate_paper,
    estimate_pooled,
    estimate_shrinkage,
    estimate_uniform,
    fisher_moments,
    gradient_moments,
    laplace_moments,
    lowest_inside,
    moments_from_slopes,
    parabola_moments,
    pooled_offset,
    pooled_weight,
    segment_losses,
    shrinkage_moments,
)
from potara_lite.estimators.moments import Moments, combination_weights
from potara_lite.federation.split import Split
from potara_lite.merging.merge import combine_adapters, merge_exact
from potara_lite.training.gradients import delta_gradients, per_sample_gradients
from potara_lite.training.train import evaluate

TRAINED = torch.tensor([5, 13, 9])  # the sizes of conftest's train split
ESTIMATORS = {
    "uniform": lambda *a: estimate_uniform(*a),
    "fisher": lambda *a: estimate_paper(*a),
    "fisher, labels drawn": lambda *a: estimate_paper(*a, sample_labels=3),
    "fisher, on the deltas": lambda *a: estimate_paper(*a, on_delta=True),
    "laplace": lambda *a: estimate_laplace(*a, train_sizes=TRAINED),
    "gradient": lambda *a: estimate_gradient(*a),
    "gradient, identity": lambda *a: estimate_gradient(*a, damping=None, unbiased=False),
    "gradient, cross-fitted": lambda *a: estimate_gradient(*a, cross_fit=True),
    "gauss-newton": lambda *a: estimate_gauss_newton(*a),
    "shrinkage": lambda *a: estimate_shrinkage(*a, train_sizes=TRAINED),
    "curve": lambda *a: estimate_curve(*a, points=3),
    "parabola": lambda *a: estimate_curve(*a, points=3, parabola=True),
    "pooled": lambda *a: estimate_pooled(*a, points=3),
}
each = pytest.mark.parametrize("name", ESTIMATORS)
with_groups = pytest.mark.parametrize(
    "run",
    [
        lambda *a, **k: estimate_paper(*a, **k),
        lambda *a, **k: estimate_paper(*a, on_delta=True, **k),
        lambda *a, **k: estimate_laplace(*a, train_sizes=TRAINED, **k),
        lambda *a, **k: estimate_gradient(*a, damping=None, unbiased=False, **k),
        lambda *a, **k: estimate_gauss_newton(*a, **k),
    ],
    ids=["fisher", "fisher on the deltas", "laplace", "gradient", "gauss-newton"],
)


@pytest.fixture(scope="module")
def pair(adapted64, random_stack):
    return random_stack(adapted64, 3, seed=1), random_stack(adapted64, 3, seed=2)


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def moment_matrices(count, k, seed=0):
    root = normal(count, k, k + 1, seed=seed)
    return root @ root.mT


def close(found, expected, rtol=1e-9, atol=0.0):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=rtol, atol=atol)


# The combination of K models.


def test_combination_weights_minimise_the_quadratic_over_all_weights_that_add_up_to_one():
    matrices = moment_matrices(6, 4)
    found = combination_weights(matrices)
    close(found.sum(1), torch.ones(6, dtype=torch.float64))
    for matrix, weights in zip(matrices.numpy(), found.numpy()):
        free = minimize(
            lambda v, m=matrix: np.append(v, 1 - v.sum()) @ m @ np.append(v, 1 - v.sum()), np.zeros(3), tol=1e-12
        )
        np.testing.assert_allclose(weights, np.append(free.x, 1 - free.x.sum()), atol=1e-5)
    assert (found < 0).any()  # nothing was clipped


def test_nonnegative_combination_weights_are_the_minimum_of_a_grid_on_the_simplex():
    steps = 60
    i, j = np.meshgrid(np.arange(steps + 1), np.arange(steps + 1), indexing="ij")
    simplex = torch.from_numpy(np.stack([i, j, steps - i - j], -1)[i + j <= steps] / steps)
    matrices = moment_matrices(20, 3, seed=1)
    found = combination_weights(matrices, nonnegative=True)
    assert (found >= 0).all()
    close(found.sum(1), torch.ones(20, dtype=torch.float64))
    values = torch.einsum("gi,bij,gj->bg", simplex, matrices, simplex)
    value = torch.einsum("bi,bij,bj->b", found, matrices, found)
    assert (value <= values.amin(1) * (1 + 1e-12)).all()
    near = (simplex[values.argmin(1)] - found).abs().amax(1)
    flat = torch.linalg.eigvalsh(matrices)[:, 0] < 0.05  # there the grid's minimum may be far from the true one
    assert (near[~flat] < 0.1).all() and (~flat).sum() > 10
    assert (found == 0).any() and (found > 0).all(1).any()  # faces and the inside are both visited


def test_two_models_have_the_weight_of_the_closed_form():
    matrices = moment_matrices(40, 2, seed=2)
    moments = Moments(matrices[:, 0, 0], matrices[:, 1, 1], matrices[:, 0, 1])
    inside = matrices[:, 0, 1] < torch.minimum(matrices[:, 0, 0], matrices[:, 1, 1])
    assert 5 < inside.sum() < 36
    close(combination_weights(matrices)[inside, 0], moments.weight[inside])
    close(combination_weights(matrices, nonnegative=True)[:, 0], moments.weight)
    outside = combination_weights(matrices)[~inside, 0]
    assert ((outside < 0) | (outside > 1)).all()


def test_one_model_or_a_singular_or_infinite_matrix_has_a_stated_answer():
    assert combination_weights(torch.tensor([[3.0]])).tolist() == [1.0]
    twins = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    with pytest.raises(ValueError, match="singular"):
        combination_weights(twins)
    weights = combination_weights(twins, nonnegative=True)  # one of the twins and the third: 1/3 and 2/3
    assert weights[:2].sum().item() == pytest.approx(1 / 3) and weights[2].item() == pytest.approx(2 / 3)
    for nonnegative in (False, True):
        for bad in (float("inf"), float("nan")):
            with pytest.raises(ValueError, match="must be finite"):
                combination_weights(torch.tensor([[1.0, 0.0], [0.0, bad]]), nonnegative=nonnegative)


# Moments from gradients.

SIZES = torch.tensor([4, 2])


@pytest.fixture(scope="module")
def gradients():
    """Two clients with four and two samples, correlated models, and zeros in the padded rows."""
    g_f, noise = normal(2, 2, 4, 6, seed=3)
    g_l = 0.7 * g_f + noise
    for g in (g_f, g_l):
        g[1, 2:] = 0
    return g_f, g_l


def test_laplace_moments_by_hand(gradients):
    g_f, g_l = gradients
    examples = torch.tensor([30, 30]), torch.tensor([20, 10])
    found = laplace_moments(g_f, g_l, SIZES, examples=examples, prior=2.5)
    for i, n in enumerate((4, 2)):
        one, two = g_f[i, :n].numpy(), g_l[i, :n].numpy()
        f_f, f_l = (one**2).mean(0), (two**2).mean(0)
        var_f, var_l = 1 / (30 * f_f + 2.5), 1 / ((20, 10)[i] * f_l + 2.5)
        rho = ((one * two).mean(0) / np.sqrt(f_f * f_l)).clip(0, 1)
        close(found.a[i], var_f.sum())
        close(found.b[i], var_l.sum())
        close(found.c[i], (rho * np.sqrt(var_f * var_l)).sum())


def test_laplace_variances_are_those_of_the_posterior_of_a_gaussian_mean():
    """Truth from the prior, n observations of known precision per coordinate: the posterior mean's squared error."""
    rng, precision, prior, trials = np.random.default_rng(4), np.array([0.5, 2.0, 0.01]), 0.5, 40_000
    root = torch.from_numpy(np.sqrt(precision) * np.array([[1.0, 1, 1], [-1, -1, -1]])).unsqueeze(0)
    counts = 40, 6  # federated, local
    examples = tuple(torch.tensor([n]) for n in counts)
    found = laplace_moments(root, root, torch.tensor([2]), examples=examples, prior=prior)
    truth = rng.normal(size=(trials, 3)) / prior**0.5
    for n, moment in zip(counts, (found.a, found.b)):
        average = truth + rng.normal(size=truth.shape) / np.sqrt(n * precision)
        squared = ((n * precision / (n * precision + prior) * average - truth) ** 2).sum(1)
        error = squared.std() / trials**0.5
        assert error < 0.02 * squared.mean()
        assert abs(squared.mean() - moment.item()) < 4 * error


def test_diagonal_moments_of_groups_add_up_to_the_whole(gradients):
    groups = torch.tensor([1, 0, 1, 1, 2, 0])
    examples = torch.tensor([30, 30]), torch.tensor([20, 10])
    for run in (
        lambda **k: fisher_moments(*gradients, SIZES, **k),
        lambda **k: laplace_moments(*gradients, SIZES, examples=examples, **k),
        lambda **k: gradient_moments(*gradients, SIZES, **k),
    ):
        whole, parts = run(), run(groups=groups)
        assert parts.weight.shape == (2, 3)
        for name in "abc":
            close(getattr(parts, name).sum(1), getattr(whole, name))


def test_correlations_survive_gradients_whose_squares_are_too_small_for_float32():
    """A saturated model has gradients of 1e-30: half correlated with the other model's, they must not look the same."""
    g_f = 1e-30 * torch.tensor([[[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0]]])
    g_l = torch.tensor([[[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]]])  # correlation 0.5 in both coordinates
    sizes = torch.tensor([4])
    small, large = fisher_moments(g_f, g_l, sizes), fisher_moments(g_f.double(), g_l.double(), sizes)
    for name in "abc":
        close(getattr(small, name), getattr(large, name), rtol=1e-6, atol=1e-12)
    assert large.c > 0.1


def test_gradient_moments_with_the_identity_are_products_of_the_mean_gradients(gradients):
    found = gradient_moments(*gradients, SIZES)
    for i, n in enumerate((4, 2)):
        one, two = (g[i, :n].mean(0) for g in gradients)
        close(found.a[i], one @ one)
        close(found.b[i], two @ two)
        close(found.c[i], one @ two)
        mixed = [float((w * one + (1 - w) * two).norm()) for w in np.linspace(0, 1, 2001)]
        assert abs(found.weight[i].item() - np.argmin(mixed) / 2000) < 1e-3  # the min-norm point


def test_gradient_moments_of_groups_are_those_of_each_groups_coordinates(gradients):
    groups = torch.tensor([1, 0, 1, 1, 2, 0])
    for unbiased in (False, True):
        found = gradient_moments(*gradients, SIZES, groups=groups, unbiased=unbiased)
        for k in range(3):
            alone = gradient_moments(*(g[..., groups == k] for g in gradients), SIZES, unbiased=unbiased)
            for name in "abc":
                close(getattr(found, name)[:, k], getattr(alone, name))
    with pytest.raises(ValueError, match="damping=None"):
        gradient_moments(*gradients, SIZES, groups=groups, damping=0.1)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("damping", [0.03, 1.0])
def test_the_metric_is_the_explicit_inverse_of_the_damped_fisher(gradients, damping, unbiased):
    found = gradient_moments(*gradients, SIZES, damping=damping, unbiased=unbiased)
    for i, n in enumerate((4, 2)):
        one, two = (g[i, :n] for g in gradients)
        fisher = sum(torch.outer(g, g) for g in [*one, *two]) / (2 * n)
        inverse = torch.linalg.inv(fisher + damping * fisher.diagonal().mean() * torch.eye(6, dtype=torch.float64))

        def moment(x, y, n=n, inverse=inverse):
            pairs = [x[i] @ inverse @ y[j] for i in range(n) for j in range(n) if i != j or not unbiased]
            return sum(pairs) / len(pairs)

        close(found.a[i], moment(one, one).clamp_min(0), rtol=1e-9)
        close(found.b[i], moment(two, two).clamp_min(0), rtol=1e-9)
        close(found.c[i], moment(one, two), rtol=1e-9)
        assert found.a[i] + found.b[i] > 0


def test_cross_fitting_takes_each_samples_products_in_the_metric_of_the_others():
    sizes, noise = torch.tensor([6, 5, 3]), normal(3, 6, 7, seed=5)
    g_f = normal(3, 6, 7, seed=4) * (torch.arange(6) < sizes.view(-1, 1)).unsqueeze(2)
    g_l = (0.7 * g_f + noise) * (torch.arange(6) < sizes.view(-1, 1)).unsqueeze(2)
    found = gradient_moments(g_f, g_l, sizes, damping=0.3, cross_fit=True)
    for i, n in enumerate(sizes.tolist()):
        sums, pairs = torch.zeros(3, dtype=torch.float64), 0
        for fold in (0, 1):
            inside, other = ([k for k in range(n) if (k % 2 == fold) == mine] for mine in (True, False))
            seen = torch.cat([g_f[i, other], g_l[i, other]]).double()
            fisher = seen.mT @ seen / len(seen)
            metric = torch.linalg.inv(fisher + 0.3 * fisher.diagonal().mean() * torch.eye(len(fisher)).double())
            for k in inside:
                for m in inside:
                    if k != m:
                        rows = [(g_f[i, k], g_f[i, m]), (g_l[i, k], g_l[i, m]), (g_f[i, k], g_l[i, m])]
                        sums += torch.stack([p.double() @ metric @ q.double() for p, q in rows])
                        pairs += 1
        a, b, c = sums / pairs
        close(found.a[i], a.clamp_min(0), rtol=1e-7)
        close(found.b[i], b.clamp_min(0), rtol=1e-7)
        close(found.c[i], c, rtol=1e-7)
    with pytest.raises(ValueError, match="no metric"):
        gradient_moments(g_f, g_l, sizes, cross_fit=True)


def test_the_u_statistic_has_the_squared_mean_as_its_expectation_and_the_plain_one_is_biased_upwards():
    """20000 clients of 6 samples; both models see the same sample noise, so the plain ``c`` is biased as well."""
    clients, n, d = 20_000, 6, 3
    mean_f, mean_l = torch.tensor([1.0, 0.5, 0.0]).double(), torch.tensor([-0.2, 0.6, 0.8]).double()
    noise = normal(clients, n, d, seed=5)
    args = mean_f + noise, mean_l + 0.5 * noise, torch.full((clients,), n)
    # clamped to zero, a and b are unbiased no more: shift them out of reach by a coordinate without noise
    args = (*(torch.cat([g, g.new_full((clients, n, 1), 3.0)], 2) for g in args[:2]), args[2])
    plain, fair = gradient_moments(*args), gradient_moments(*args, unbiased=True)
    truth = {"a": mean_f @ mean_f, "b": mean_l @ mean_l, "c": mean_f @ mean_l}
    bias = {"a": d / n, "b": 0.25 * d / n, "c": 0.5 * d / n}
    for name in "abc":
        for found, shift in ((fair, 0.0), (plain, bias[name])):
            values = getattr(found, name) - 9
            error = values.std() / clients**0.5
            assert abs(values.mean() - truth[name] - shift) < 4 * error
            assert bias[name] > 8 * error  # so the two can be told apart
        assert (getattr(fair, name) > 0).all()


def test_on_a_quadratic_the_gradient_moments_recover_the_closed_form_weight():
    """``g_i = θ - x_i`` with ``x_i ~ N(θ*, I)``, so ``H = I`` and the biases of both models are known."""
    clients, n = 60, 200
    e_f, e_l = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([-0.1, 0.7, 0.5]).double()
    noise = normal(clients, n, 3, seed=6)
    weight = gradient_moments(e_f - noise, e_l - noise, torch.full((clients,), n), unbiased=True).weight
    truth = Moments(e_f @ e_f, e_l @ e_l, e_f @ e_l).weight.item()
    error = weight.std().item() / clients**0.5
    assert error < 0.02 and abs(truth - 0.5) > 8 * error
    assert abs(weight.mean().item() - truth) < 4 * error


def test_on_a_quadratic_with_inverse_fisher_covariances_the_diagonal_moments_recover_the_weight():
    """Gradients whose second moments are the known precisions, 40 clients of 4000 samples."""
    clients, n = 40, 4000
    f_f, f_l, rho = torch.tensor([[4.0, 1.0, 0.5, 3.0], [1.0, 0.5, 2.0, 0.4], [0.6, 0.0, 0.3, 0.8]]).double()
    one, two = normal(2, clients, n, 4, seed=7)
    g_f = one * f_f.sqrt()
    g_l = (one * rho + two * (1 - rho**2).sqrt()) * f_l.sqrt()
    sizes = torch.full((clients,), n)

    def check(found, var_f, var_l):
        truth = Moments(var_f.sum(), var_l.sum(), (rho * (var_f * var_l).sqrt()).sum()).weight.item()
        error = found.weight.std().item() / clients**0.5
        assert error < 0.002 and 0.1 < truth < 0.9
        assert abs(found.weight.mean().item() - truth) < 4 * error

    check(fisher_moments(g_f, g_l, sizes, damping=1e-9), 1 / f_f, 1 / f_l)
    examples = torch.full((clients,), 9), torch.full((clients,), 4)
    check(laplace_moments(g_f, g_l, sizes, examples=examples, prior=0.5), 1 / (9 * f_f + 0.5), 1 / (4 * f_l + 0.5))


# Moments from curves.


@pytest.mark.parametrize(
    "slope, curvature, moments, weight",
    [
        (-1.0, 3.0, (2.0, 1.0, 0.0), 1 / 3),
        (-3.0, 3.0, (0.0, 3.0, 0.0), 1.0),
        (-4.0, 3.0, (0.0, 5.0, 1.0), 1.0),  # the minimum lies beyond the federated model
        (2.0, 3.0, (7.0, 0.0, 2.0), 0.0),  # the loss rises from the local model on
        (-1.0, 0.0, (0.0, 1.0, 1.0), 1.0),  # a straight line
        (1.0, 0.0, (2.0, 0.0, 1.0), 0.0),
        (-1.0, -5.0, (0.0, 1.0, 1.0), 1.0),  # a curvature below zero counts as none
        (0.0, 0.0, (0.0, 0.0, 0.0), 0.5),
    ],
)
def test_moments_from_slopes_by_hand(slope, curvature, moments, weight):
    found = moments_from_slopes(torch.tensor([slope]), torch.tensor([curvature]))
    if curvature > 0:
        assert (found.a.item(), found.b.item(), found.c.item()) == moments
        close(
            found.bound(0.3) - found.bound(0.0), torch.tensor([2 * 0.3 * slope + 0.09 * curvature], dtype=torch.float64)
        )
    assert found.weight.item() == pytest.approx(weight, rel=1e-9)


def test_the_parabola_through_a_parabola_is_exact():
    weights = torch.linspace(0, 1, 5, dtype=torch.float64)
    best = torch.tensor([0.1, 0.35, 0.9, 1.7, -0.4]).double().unsqueeze(1)
    found = parabola_moments(weights, 2.0 + 1.5 * (weights - best) ** 2)
    close(found.weight, best[:, 0].clamp(0, 1), rtol=1e-9, atol=1e-12)
    close(found.a + found.b - 2 * found.c, torch.full((5,), 3.0).double())
    close(found.b - found.c, 3 * best[:, 0])


def test_the_parabola_that_opens_downwards_has_its_minimum_at_the_lower_end():
    weights = torch.linspace(0, 1, 5, dtype=torch.float64)
    bump = torch.stack(
        [weights - 3 * weights**2, weights - 0.5 * weights**2]
    )  # ends 0 and -2, 0 and ½; both rise first
    assert parabola_moments(weights, bump).weight.tolist() == [1.0, 0.0]


def test_shrinkage_is_variance_over_distance_and_never_more_than_one():
    found = shrinkage_moments(torch.tensor([1.0, 3.0, 0.0, 0.0]), torch.tensor([4.0, 2.0, 2.0, 0.0])).weight
    close(found, torch.tensor([0.25, 1.0, 0.0, 0.5]).double())


def test_shrinkage_of_a_gaussian_mean_beats_the_mean_itself():
    """James & Stein: 10 coordinates of variance 1, towards a federated model that is off by 2."""
    trials, d = 4000, 10
    local = normal(trials, d, seed=8)  # the truth is zero
    federated = torch.zeros(d).double()
    federated[0] = 2.0
    weight = shrinkage_moments(torch.full((trials,), d - 2.0), (federated - local).square().sum(1)).weight.unsqueeze(1)
    gain = local.square().sum(1) - (weight * federated + (1 - weight) * local).square().sum(1)
    assert gain.mean() > 4 * gain.std() / trials**0.5
    unclipped = (d - 2) ** 2 * (1 / (federated - local).square().sum(1)).mean()  # Stein's formula for the gain
    assert gain.mean() > 0.95 * unclipped


# The pooled curve.

WEIGHTS = torch.linspace(0, 1, 9, dtype=torch.float64)


def parabolas(best, n, h=3.0, noise=None):
    """Losses ``(C, 9, N)`` of the parabola ``h/2 (w - best)²`` plus ``noise`` ``(C, N)`` times w."""
    best = torch.as_tensor(best, dtype=torch.float64).view(-1, 1, 1)
    losses = (h / 2 * (WEIGHTS.view(1, -1, 1) - best) ** 2).expand(-1, -1, n)
    return losses if noise is None else losses + noise.unsqueeze(1) * WEIGHTS.view(1, -1, 1)


def bartlett(clients, n, h=3.0, seed=0):
    """Slope noise with the variance of the curvature, as of a calibrated model, with mean zero in each client."""
    noise = normal(clients, n, seed=seed) * h**0.5
    return noise - noise.mean(1, keepdim=True)


def test_three_estimates_are_weighed_by_their_precisions():
    """Parabolas: the minimum of client i's is ``best - noise / h``, with sampling variance ``v / (n h²)``."""
    n, h, tau, sigma = torch.tensor([20, 45, 80]), 3.0, 0.2, 0.3
    best, noise = torch.tensor([0.3, 0.7, 0.5]).double(), 1.5 * normal(3, 80, seed=4)
    real = torch.arange(80) < n.view(-1, 1)
    losses = parabolas(best, 80, h, noise) * real.unsqueeze(1)
    found, details = pooled_weight(WEIGHTS, losses, n, tau=tau, sigma=sigma)
    mean = (noise * real).sum(1) / n
    variance = ((noise - mean.view(-1, 1)) * real).square().sum() / (n - 1).sum()
    client_estimate = best - mean / h
    sampling = variance / (n.double() * h**2)
    precision = 1 / (sampling + tau**2)
    prior_mean = ((precision * client_estimate).sum() + 0.5 / sigma**2) / (precision.sum() + 1 / sigma**2)
    expected = (client_estimate / sampling + prior_mean / tau**2) / (1 / sampling + 1 / tau**2)
    close(found, expected)
    close(details["prior_mean"], prior_mean)
    close(details["shrinkage"], tau**2 / (tau**2 + sampling))
    close(details["loss"], (losses.sum(2) / n.view(-1, 1)))
    assert expected.std() > 0.05 and abs(prior_mean - 0.5) > 0.003


def test_without_noise_each_client_gets_its_minimum_and_without_a_curve_a_half():
    n, best = torch.full((3,), 30), torch.tensor([0.3, 0.6, 0.5]).double()
    close(pooled_weight(WEIGHTS, parabolas(best, 30), n)[0], best)
    outside = pooled_weight(WEIGHTS, parabolas([-0.4, 1.3, 1.2], 30), n)[0]
    assert outside.tolist() == [0.0, 1.0, 1.0]
    found, details = pooled_weight(WEIGHTS, parabolas([0.2, 0.3, 0.4], 30, 0.0), n)
    assert found.tolist() == [0.5] * 3 and not details["shrinkage"].any()


@pytest.mark.parametrize("bend", [-1.0, 0.0, 0.01])
def test_a_curve_that_falls_to_one_end_is_followed_however_it_bends(bend):
    """The losses fall by about a nat from λ = 0 to 1, or rise by it, with noise of as much."""
    n, noise = torch.full((4,), 30), 1.5 * bartlett(4, 30, h=1.0)
    for slope, end in ((-1.0, 1.0), (1.0, 0.0)):
        curve = slope * WEIGHTS + bend / 2 * (WEIGHTS - 0.5) ** 2
        losses = curve.view(1, -1, 1) + noise.unsqueeze(1) * WEIGHTS.view(1, -1, 1)
        assert (pooled_weight(WEIGHTS, losses, n)[0] - end).abs().max() < 0.1


def test_the_parabola_lies_where_all_samples_together_are_lowest_and_not_at_an_end():
    curve = torch.tensor([3.0, 1, 5, 5, 5, 5, 2, 5, 9]).double()
    mean = torch.stack([curve, 2 * curve.flip(0)])
    assert lowest_inside(mean, torch.tensor([30, 1])) == 1 and lowest_inside(mean, torch.tensor([1, 30])) == 7
    assert [lowest_inside(m.view(1, -1), torch.tensor([4])) for m in (WEIGHTS, -WEIGHTS)] == [1, 7]


def test_clients_that_agree_get_nearly_the_minimum_of_their_pool():
    losses = parabolas([0.3] * 6, 50, noise=bartlett(6, 50))
    weight, details = pooled_weight(WEIGHTS, losses, torch.full((6,), 50))
    close(weight, weight[:1].expand(6), atol=1e-12)
    assert 0.3 < weight[0] < details["prior_mean"] < 0.315  # drawn a little to the middle


def test_a_client_with_many_samples_keeps_its_minimum_and_one_with_few_gets_the_pools():
    sizes = torch.tensor([40, 40, 40, 40, 5000, 2])
    best = [0.3, 0.3, 0.3, 0.3, 0.8, 0.8]
    noise = torch.zeros(6, 5000).double()
    for i, n in enumerate(sizes.tolist()):
        noise[i, :n] = bartlett(1, n, seed=i)[0]
    real = (torch.arange(5000) < sizes.view(-1, 1)).unsqueeze(1)
    weight, _ = pooled_weight(WEIGHTS, parabolas(best, 5000, noise=noise) * real, sizes)
    assert abs(weight[4] - 0.8) < 0.03
    assert weight[5] < 0.65  # pulled at least this far towards the prior_mean
    assert (weight[:4] < 0.5).all()


def test_pooling_knows_no_order_of_clients():
    best = torch.rand(5, generator=torch.Generator().manual_seed(0))
    losses, sizes, order = parabolas(best, 12, noise=normal(5, 12)), torch.tensor([12, 5, 9, 12, 7]), [3, 0, 4, 1, 2]
    losses = losses * (torch.arange(12) < sizes.view(-1, 1)).unsqueeze(1)
    usual, turned = pooled_weight(WEIGHTS, losses, sizes)[0], pooled_weight(WEIGHTS, losses[order], sizes[order])[0]
    close(turned, usual[order], rtol=1e-9)
    assert usual.std() > 0.005


def test_padding_of_the_losses_does_not_matter_to_the_pool():
    losses = parabolas([0.2, 0.5, 0.9], 12, noise=4 * normal(3, 12, seed=1)).clone()
    losses[1, :, 7:] = 0
    sizes = torch.tensor([12, 7, 12])
    usual, details = pooled_weight(WEIGHTS, losses, sizes)
    padded, more = pooled_weight(WEIGHTS, torch.cat([losses, torch.zeros(3, 9, 9)], dim=2), sizes)
    close(padded, usual, rtol=1e-9)
    close(more["shrinkage"], details["shrinkage"], rtol=1e-9)


def test_noise_that_overconfident_models_make_leaves_less_to_the_clients_minimum():
    sizes, noise = torch.full((4,), 500), bartlett(4, 500)
    found = [pooled_weight(WEIGHTS, parabolas([0.5] * 4, 500, noise=k * noise), sizes)[1] for k in (1, 1.5)]
    odds = [details["shrinkage"] / (1 - details["shrinkage"]) for details in found]
    close(odds[0], 1.5**2 * odds[1])


def test_pooling_regrets_less_than_each_client_alone_which_regrets_half_a_parameter():
    """Bartlett noise: 8 clients, 30 samples, curvature 3, best weights scattered by 0.1; 1/(2n) for each alone, and for
    the pool half the curvature times the variance of the combination, and the prior_mean's error."""
    h, n, clients, runs, tau = 3.0, 30, 8, 400, 0.1
    rng = np.random.default_rng(9)
    alone, pooled = [], []
    for _ in range(runs):
        best = 0.5 + tau * rng.normal(size=clients)
        noise = torch.from_numpy(rng.normal(size=(clients, n)) * h**0.5)
        client_estimate = best - noise.mean(1).numpy() / h
        found, _ = pooled_weight(WEIGHTS, parabolas(best, n, h, noise), torch.full((clients,), n))
        alone.append(h / 2 * ((client_estimate - best) ** 2).mean())
        pooled.append(h / 2 * ((found.numpy() - best) ** 2).mean())
    alone, pooled, s2 = np.array(alone), np.array(pooled), 1 / (n * h)
    combined, shrinkage = h / 2 / (1 / s2 + 1 / tau**2), tau**2 / (tau**2 + s2)
    of_prior_mean = h / 2 * (1 - shrinkage) ** 2 / (clients / (s2 + tau**2) + 1 / 0.25**2)
    assert abs(alone.mean() - 1 / (2 * n)) < 4 * alone.std() / runs**0.5
    assert abs(pooled.mean() - combined - of_prior_mean) < 4 * pooled.std() / runs**0.5 + 0.02 * combined
    assert pooled.mean() < 0.6 * alone.mean()


# An offset between two groups, common to all clients.


def losses_at_steps(best, h, noise, step=0.3):
    """Losses ``(C, N)`` at the offsets -step, 0 and step of the parabola ``h/2 (d - best)² + noise d``."""
    return [h / 2 * (d - best) ** 2 + noise * d for d in (-step, 0.0, step)]


def test_the_offset_is_weighed_against_nothing_by_its_precision():
    n, best, h = torch.tensor([12, 30, 20]), -0.25, 2.0
    noise = normal(3, 30, seed=2) * (torch.arange(30) < n.view(-1, 1))
    real = (torch.arange(30) < n.view(-1, 1)).double()
    losses = [part * real for part in losses_at_steps(best, h, noise)]
    found, details = pooled_offset(*losses, n, tau=0.2)
    mean = noise.sum(1) / n
    variance = ((noise - mean.view(-1, 1)) * real).square().sum() / (n - 1).sum()
    sampling = variance / (n.sum() * h**2)
    shrinkage = 0.2**2 / (0.2**2 + sampling)
    close(found, shrinkage * (best - noise.sum() / n.sum() / h))
    close(details["offset_shrinkage"], shrinkage)
    wide = [torch.cat([part, torch.zeros(3, 5)], 1) for part in losses]
    close(pooled_offset(*wide, n, tau=0.2)[0], found)


def test_the_offset_survives_what_tells_nothing():
    n, zero = torch.full((3,), 10), torch.zeros(3, 10).double()
    assert pooled_offset(*losses_at_steps(0.4, -2.0, zero), n)[0] == 0  # opens downwards
    assert pooled_offset(zero, zero, zero, n)[0] == 0
    assert pooled_offset(*losses_at_steps(3.0, 2.0, zero), n)[0] == pytest.approx(0.6)  # twice the step at most
    one_sample = (part[:, :1] for part in losses_at_steps(0.1, 2.0, zero))
    assert pooled_offset(*one_sample, torch.ones(3).long())[0] == pytest.approx(0.1)


# What every estimator survives.


def fine(estimate, clients=3):
    weight = estimate.weight
    assert weight.shape == (clients,) and weight.dtype == torch.float64 and weight.isfinite().all()
    assert ((weight >= 0) & (weight <= 1)).all()
    return weight


def relabelled(adapted, stack, split):
    """The split with the labels that the models of ``stack`` give."""
    guess = torch.stack([adapted(client_adapter(stack, i), split.x[i]).argmax(-1) for i in range(len(split))])
    return split.with_labels(torch.where(split.y < 0, split.y, guess))


def sharpened(stack, factor=1e6):
    return {name: factor * tensor if ".head." in name else tensor for name, tensor in stack.items()}


@each
def test_every_estimator_survives_adapters_that_are_zero(name, adapted64, federation64, pair):
    zero = repeat_adapter(adapted64.initial, 3)
    for models in ((zero, zero), (pair[0], zero), (zero, pair[1])):
        fine(ESTIMATORS[name](adapted64, *models, federation64.calibration))


@each
def test_every_estimator_survives_models_that_fit_perfectly(name, adapted64, federation64, pair, gradient_free):
    federated, local, split = gradient_free
    weight = fine(ESTIMATORS[name](adapted64, federated, local, split))  # the local model has no gradient
    if name in ("gradient, identity", "curve"):
        assert (weight == 0).all()  # these see that it is perfect …
    if name == "fisher":
        assert (weight > 0.5).all()  # … and this one takes it for one that knows nothing: the degeneracy gap
    fine(ESTIMATORS[name](adapted64, local, federated, split))
    fine(ESTIMATORS[name](adapted64, local, local, split))  # neither has


@pytest.fixture(scope="module")
def gradient_free(adapted64, federation64, pair):
    local = sharpened(pair[1])
    split = relabelled(adapted64, local, federation64.calibration)
    assert not per_sample_gradients(adapted64, local, split).any()
    return pair[0], local, split


@each
def test_every_estimator_survives_a_single_sample(name, adapted64, federation64, pair):
    split = federation64.calibration
    one = Split([tuple(part[:1] for part in split.client(i)) for i in range(3)])
    fine(ESTIMATORS[name](adapted64, *pair, one))


@each
def test_models_that_are_the_same_get_a_half_where_moments_decide(name, adapted64, federation64, pair):
    weight = fine(ESTIMATORS[name](adapted64, pair[1], pair[1], federation64.calibration))
    if name in ("shrinkage", "laplace"):
        assert weight.tolist() == [1.0] * 3  # variance and no distance; the same Fisher times more examples
    elif name == "pooled":
        close(weight, torch.full((3,), 0.5).double(), rtol=0, atol=0.01)
    elif name in ("uniform", "fisher", "fisher, on the deltas") or name.startswith("gradient"):
        close(weight, torch.full((3,), 0.5).double(), rtol=1e-6)
    else:  # a draw of labels for each; or the segment, which is flat, so that rounding decides and nothing hangs on it
        assert name in ("fisher, labels drawn", "gauss-newton", "curve", "parabola")
        merged = merge_exact(pair[1], pair[1], weight)
        loss, usual = (evaluate(adapted64, m, federation64.calibration)[0] for m in (merged, pair[1]))
        close(loss, usual)


@each
def test_bfloat16_adapters_on_a_float32_backbone_get_about_the_same_weight(name, adapted, federation, random_stack):
    small = [{n: t.bfloat16() for n, t in random_stack(adapted, 3, seed=s, scale=0.5).items()} for s in (1, 2)]
    large = [{n: t.float() for n, t in stack.items()} for stack in small]
    split = federation.calibration
    weight = fine(ESTIMATORS[name](adapted, *small, split))
    if name not in ("curve", "fisher, labels drawn"):  # these jump where rounding tips an argmax or a draw
        close(weight, ESTIMATORS[name](adapted, *large, split).weight, rtol=0, atol=0.1)


@each
def test_padding_does_not_change_the_weight(name, adapted64, federation64, pair):
    """Each client alone, where an estimator keeps clients apart."""
    split = federation64.calibration
    usual = ESTIMATORS[name](adapted64, *pair, split).weight
    if name in ("pooled", "laplace", "shrinkage", "fisher, labels drawn"):
        return  # they see the other clients, or are given three sizes
    for i in range(3):
        alone = [{n: t[i : i + 1] for n, t in stack.items()} for stack in pair]
        close(ESTIMATORS[name](adapted64, *alone, split.rows([i])).weight, usual[i : i + 1], rtol=1e-8, atol=1e-12)
        bare = Split([split.client(i)])
        assert bare.y.shape == (1, (3, 6, 4)[i])
        close(ESTIMATORS[name](adapted64, *alone, bare).weight, usual[i : i + 1], rtol=1e-8, atol=1e-12)


def test_the_shrinkage_of_a_client_alone_is_that_among_others(adapted64, federation64, pair):
    split = federation64.calibration
    usual = estimate_shrinkage(adapted64, *pair, split, train_sizes=TRAINED)
    assert 0 < usual.weight[0] < 1
    for i in range(3):
        alone = [{n: t[i : i + 1] for n, t in stack.items()} for stack in pair]
        bare = Split([split.client(i)])
        found = estimate_shrinkage(adapted64, *alone, bare, train_sizes=TRAINED[i : i + 1])
        close(found.weight, usual.weight[i : i + 1], rtol=1e-8)
        close(found.details["effective"], usual.details["effective"][i : i + 1], rtol=1e-8)


# Weights by group.


@with_groups
def test_weights_by_layer_are_a_dictionary_that_the_merge_takes(run, adapted64, federation64, pair):
    found = run(adapted64, *pair, federation64.calibration, by=by_layer)
    layers = {by_layer(name) for name in pair[0]}
    assert len(layers) == 5  # qkv, proj, fc1, fc2 and the head
    assert found.moments.weight.shape == (3, 5)
    for weight in found.weight.values():
        assert weight.shape == (3,) and ((weight >= 0) & (weight <= 1)).all()
    head = "base_model.model.head."
    assert torch.equal(found.weight[head + "weight"], found.weight[head + "bias"])
    merged = merge_exact(*pair, found.weight)
    for name, tensor in merge_exact(*pair, 0.0).items():
        assert merged[name].shape == tensor.shape
    for name in (head + "weight", head + "bias"):
        weight = found.weight[name].view(-1, *[1] * (pair[0][name].dim() - 1))
        close(merged[name], weight * pair[0][name] + (1 - weight) * pair[1][name])


@with_groups
def test_equal_weights_by_layer_are_the_scalar_merge(run, adapted64, federation64, pair):
    found = run(adapted64, *pair, federation64.calibration, by=by_layer)
    weight = torch.tensor([0.2, 0.5, 0.9]).double()
    equal = merge_exact(*pair, dict.fromkeys(found.weight, weight))
    for name, tensor in merge_exact(*pair, weight).items():
        assert torch.equal(equal[name], tensor)


@with_groups
def test_one_group_of_everything_is_the_weight_of_the_client(run, adapted64, federation64, pair):
    whole = run(adapted64, *pair, federation64.calibration)
    grouped = run(adapted64, *pair, federation64.calibration, by=lambda name: "all")
    for weight in grouped.weight.values():
        close(weight, whole.weight)


@with_groups
def test_the_groups_gains_add_up_to_the_clients(run, adapted64, federation64, pair):
    """``b - c``, half the slope of the bound at the local model, is linear in the direction."""
    whole = run(adapted64, *pair, federation64.calibration).moments
    parts = run(adapted64, *pair, federation64.calibration, by=by_layer).moments
    close((parts.b - parts.c).sum(1), whole.b - whole.c, rtol=1e-8)


@with_groups
def test_a_group_that_splits_a_layers_factors_is_refused(run, adapted64, federation64, pair):
    with pytest.raises(ValueError, match="both factors"):
        run(adapted64, *pair, federation64.calibration, by=lambda name: name)


# Each estimator against its definition, on real models.


@pytest.fixture(scope="module")
def linear(backbone64):
    """LoRA on the head alone: the logits are linear in the mixing weight."""
    return attach(backbone64, rank=2, alpha=3, targets=["head"], head=None)


def loss_along(adapted, pair, split, client, weight):
    """The mean loss of a client's merge, by one plain forward pass, differentiable in the weight."""
    x, y = split.client(client)
    return F.cross_entropy(adapted(beyond(*(client_adapter(s, client) for s in pair), weight), x), y)


def beyond(federated, local, weight):
    """The exact merge, for weights outside [0, 1], too: a difference needs both sides."""
    return combine_adapters([federated, local], [weight, 1 - weight])


def test_on_a_linear_model_gauss_newton_has_the_losses_own_slope_and_second_derivative(
    linear, random_stack, federation64
):
    pair = [random_stack(linear, 3, seed=s, scale=0.8) for s in (1, 2)]
    split = federation64.calibration
    found = estimate_gauss_newton(linear, *pair, split).moments
    for i in range(3):
        weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss_along(linear, pair, split, i, weight), weight, create_graph=True)
        (second,) = torch.autograd.grad(slope, weight)
        close(found.b[i] - found.c[i], -slope.detach())
        close(found.a[i] + found.b[i] - 2 * found.c[i], second)
        left, middle, right = (float(loss_along(linear, pair, split, i, w)) for w in (-1e-4, 0.0, 1e-4))
        assert slope.item() == pytest.approx((right - left) / 2e-4, rel=1e-5)
        assert second.item() == pytest.approx((right - 2 * middle + left) / 1e-8, rel=1e-5)


def test_gauss_newtons_slope_is_exact_for_any_model_and_its_curvature_for_logits_taken_as_linear(
    adapted64, federation64, pair
):
    split = federation64.calibration
    found = estimate_gauss_newton(adapted64, *pair, split).moments
    for i in range(3):
        left, right = (float(loss_along(adapted64, pair, split, i, w)) for w in (-1e-4, 1e-4))
        assert float(found.b[i] - found.c[i]) == pytest.approx((left - right) / 2e-4, rel=1e-6)
        x, _ = split.client(i)
        ends = [adapted64(beyond(*(client_adapter(s, i) for s in pair), w), x) for w in (-1e-5, 0.0, 1e-5)]
        u, p = (ends[2] - ends[0]) / 2e-5, ends[1].softmax(-1)
        gauss = torch.stack([ui @ (torch.diag(pi) - torch.outer(pi, pi)) @ ui for ui, pi in zip(u, p)]).mean()
        assert float(found.a[i] + found.b[i] - 2 * found.c[i]) == pytest.approx(float(gauss), rel=1e-6)


def test_segment_losses_are_those_that_evaluate_gives_each_merge(adapted64, federation64, pair):
    split, weights = federation64.train, torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    losses = segment_losses(adapted64, *pair, split, weights)
    assert losses.shape == (3, 3, 13)
    for k, w in enumerate(weights.tolist()):
        close(losses[:, k].sum(1) / split.sizes, evaluate(adapted64, merge_exact(*pair, w), split)[0])
    for i, n in enumerate(split.sizes.tolist()):
        assert not losses[i, :, n:].any() and (losses[i, :, :n] > 0).all()


def test_shrinkage_counts_the_effective_parameters_of_the_dense_fisher(adapted64, federation64, pair):
    split, damping = federation64.calibration, 0.05
    found = estimate_shrinkage(adapted64, *pair, split, train_sizes=TRAINED, damping=damping)
    distance = estimate_gauss_newton(adapted64, *pair, split).moments
    distance = distance.a + distance.b - 2 * distance.c
    for i, n in enumerate((3, 6, 4)):
        x, y = split.client(i)
        fisher = 0
        for k in range(n):
            leaves = {name: t.clone().requires_grad_() for name, t in client_adapter(pair[1], i).items()}
            grads = torch.autograd.grad(
                F.cross_entropy(adapted64(leaves, x[k : k + 1]), y[k : k + 1]), [*leaves.values()]
            )
            g = torch.cat([grad.flatten() for grad in grads])
            fisher = fisher + torch.outer(g, g) / n
        delta = damping * fisher.diagonal().mean()
        ridged = fisher + delta * torch.eye(len(fisher), dtype=torch.float64)
        effective = torch.linalg.solve(ridged, fisher).trace()
        close(found.details["effective"][i], effective, rtol=1e-8)
        assert n - 0.5 < effective < n  # no more than the samples show
        close(found.weight[i], ((effective - 2) / TRAINED[i] / distance[i]).clamp(0, 1), rtol=1e-8)


def test_the_real_gradient_estimate_is_that_of_the_mean_loss(adapted64, federation64, pair):
    split = federation64.calibration
    found = estimate_gradient(adapted64, *pair, split, damping=None, unbiased=False).moments
    for i in range(3):
        x, y = split.client(i)
        means = []
        for stack in pair:
            leaves = {name: t.clone().requires_grad_() for name, t in client_adapter(stack, i).items()}
            grads = torch.autograd.grad(F.cross_entropy(adapted64(leaves, x), y), [*leaves.values()])
            means.append(torch.cat([grad.flatten() for grad in grads]))
        close(found.a[i], means[0] @ means[0])
        close(found.b[i], means[1] @ means[1])
        close(found.c[i], means[0] @ means[1])


def test_laplace_gives_the_federated_model_everyones_examples(adapted64, federation64, pair, monkeypatch):
    module = sys.modules[estimate_laplace.__module__]
    seen = []

    def spy(*args, examples, **rest):
        seen.extend(zip(*(e.tolist() for e in examples)))
        return laplace_moments(*args, examples=examples, **rest)

    monkeypatch.setattr(module, "laplace_moments", spy)
    estimate_laplace(adapted64, *pair, federation64.calibration, train_sizes=TRAINED)
    assert sorted(seen) == [(27, 5), (27, 9), (27, 13)]  # the clients are in groups by size


def test_drawn_labels_are_those_of_the_seed_and_leave_the_padding_out(adapted64, federation64, pair):
    split = federation64.calibration
    one, same, other = (estimate_paper(adapted64, *pair, split, sample_labels=s) for s in (3, 3, 4))
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    sure = [sharpened(stack, 1e6) for stack in pair]  # labels drawn from such models are their own answers
    assert estimate_paper(adapted64, *sure, split, sample_labels=3).weight.tolist() == [0.5] * 3


def test_the_pool_of_real_curves_is_pooled_weight_of_their_losses(adapted64, federation64, pair):
    split, weights = federation64.calibration, torch.linspace(0, 1, 9)
    found = estimate_pooled(adapted64, *pair, split)
    expected, _ = pooled_weight(weights, segment_losses(adapted64, *pair, split, weights), split.sizes)
    close(found.weight, expected)
    assert found.floats == (10, 2)  # nine losses and the slopes' variance up; where it is wanted and the weight down
    close(found.details["loss"], estimate_curve(adapted64, *pair, split, points=9).details["loss"])


def test_the_offset_moves_head_and_body_apart_and_lowers_the_held_out_loss(adapted64, federation64, pair):
    split = federation64.calibration
    usual = estimate_pooled(adapted64, *pair, split)
    found = estimate_calibrated(adapted64, *pair, split)
    offset, weight = found.details["offset"], found.client_weight
    close(weight, usual.weight)
    assert abs(offset) > 0.003
    for name, each in found.weight.items():
        half = offset / 2 if ".head" in name else -offset / 2  # "body" < "head"
        close(each, (weight + half).clamp(0, 1))
    steps = [
        {name: (weight + sign * (0.15 if ".head" in name else -0.15)).clamp(0, 1) for name in found.weight}
        for sign in (-1, 0, 1)
    ]
    losses = [
        torch.stack([segment_loss(adapted64, client_adapter(merge_exact(*pair, w), i), split, i) for i in range(3)])
        for w in steps
    ]
    close(offset, pooled_offset(*losses, split.sizes)[0], rtol=1e-6)
    before = evaluate(adapted64, merge_exact(*pair, weight), split)[0] * split.sizes
    after = evaluate(adapted64, merge_exact(*pair, found.weight), split)[0] * split.sizes
    assert after.sum() < before.sum()
    assert found.floats == (13, 3)


def test_without_a_head_the_default_is_one_weight(backbone64, federation64, random_stack):
    bare = attach(backbone64, rank=2, head=None)
    pair = [random_stack(bare, 3, seed=seed) for seed in (1, 2)]
    found = estimate_calibrated(bare, *pair, federation64.calibration)
    close(found.weight, estimate_pooled(bare, *pair, federation64.calibration).weight)
    assert found.floats == (10, 2)


def segment_loss(adapted, adapter, split, client):
    """Each example's loss of one client, zeros for padding."""
    return F.cross_entropy(adapted(adapter, split.x[client]), split.y[client], reduction="none")


def test_the_offset_is_between_two_groups(adapted64, federation64, pair):
    with pytest.raises(ValueError, match="gives 5"):
        estimate_pooled(adapted64, *pair, federation64.calibration, by=by_layer)


def test_the_curves_parabola_is_parabola_moments_of_its_losses(adapted64, federation64, pair):
    found = estimate_curve(adapted64, *pair, federation64.calibration, points=5, parabola=True)
    fit = np.polyfit(np.linspace(0, 1, 5), found.details["loss"].numpy().T, 2)  # (3, C), highest power first
    inside = fit[0] > 0
    assert inside.any()
    close(found.weight[inside], (-fit[1] / (2 * fit[0]))[inside].clip(0, 1), rtol=1e-7)


def test_groups_are_those_of_the_coordinates_of_a_flattened_stack(adapted64, federation64, pair):
    """Each layer's gradient is planted as a constant of its own; its moment is then the square times its size."""
    module, labels = sys.modules[estimate_gradient.__module__], sorted({by_layer(name) for name in pair[0]})
    assert list(dict.fromkeys(map(by_layer, pair[0]))) != labels  # the stack's order is not the alphabet's
    planted = {name: torch.full_like(t, 1.0 + labels.index(by_layer(name))) for name, t in pair[0].items()}
    row = flatten(planted)[:1].unsqueeze(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "per_sample_gradients", lambda _, __, split: row * (split.y >= 0).unsqueeze(2))
        found = estimate_gradient(adapted64, *pair, federation64.calibration, damping=None, unbiased=False, by=by_layer)
    for k, label in enumerate(labels):
        size = sum(t[0].numel() for name, t in pair[0].items() if by_layer(name) == label)
        close(found.moments.a[:, k], torch.full((3,), size * (k + 1.0) ** 2).double())


def test_the_fisher_on_the_deltas_takes_the_gradients_in_the_deltas(adapted64, federation64, pair):
    split = federation64.calibration
    found = estimate_paper(adapted64, *pair, split, on_delta=True, damping=0.3).moments
    gradients = (delta_gradients(adapted64, stack, split) for stack in pair)
    oracle = fisher_moments(*gradients, split.sizes, damping=0.3)
    for name in "abc":
        close(getattr(found, name), getattr(oracle, name))
    factors = estimate_paper(adapted64, *pair, split, damping=0.3).moments
    assert (factors.a / found.a - 1).abs().max() > 0.1


# The ensemble: true moments.


def dense(stack, adapted):
    return torch.cat([tensor.flatten(1) for tensor in delta(stack, adapted.scaling).values()], dim=1)


@pytest.fixture(scope="module")
def repeated(linear, random_stack):
    """Five runs whose models scatter about an optimum, the federated ones off it by a bias that all of them share."""
    optimum = random_stack(linear, 3, seed=1, scale=0.5)
    names = [name for name in optimum if "lora_B" in name]

    def near(seed, scale, bias=0.0):
        noise, common = random_stack(linear, 3, seed=seed, scale=scale), random_stack(linear, 3, seed=99, scale=1.0)
        return optimum | {name: optimum[name] + noise[name] + bias * common[name] for name in names}

    return [(near(10 + r, 0.1, bias=0.3), near(20 + r, 0.4)) for r in range(5)], optimum


def test_ensemble_moments_on_the_deltas_are_the_mean_squared_errors(linear, federation64, repeated):
    runs, optimum = repeated
    found = Moments(*estimate_ensemble(linear, runs, optimum, federation64.calibration).details["deltas"])
    e_f, e_l = (torch.stack([dense(run[k], linear) - dense(optimum, linear) for run in runs]) for k in (0, 1))
    close(found.a, (e_f**2).sum(2).mean(0), rtol=1e-8)
    close(found.b, (e_l**2).sum(2).mean(0), rtol=1e-8)
    close(found.c, (e_f * e_l).sum(2).mean(0), rtol=1e-7, atol=1e-12)


def test_ensemble_moments_in_the_metric_of_the_loss_are_quadratic_forms_of_its_hessian(linear, federation64, repeated):
    """The logits are linear here, so the Gauss–Newton matrix is the Hessian in the dense head."""
    runs, optimum = repeated
    split = federation64.calibration
    found = estimate_ensemble(linear, runs, optimum, split)
    start = dense(optimum, linear)
    for i in range(3):
        features = backbone_features(linear, split.client(i)[0])
        base = linear.model.get_base_model().head.base_layer
        y = split.client(i)[1]

        def loss(flat, features=features, base=base, y=y):
            return F.cross_entropy(features @ (base.weight + flat.view_as(base.weight)).mT + base.bias, y)

        hessian = torch.autograd.functional.hessian(loss, start[i])
        slope = torch.autograd.functional.jacobian(loss, start[i])
        errors = [[dense(run[k], linear)[i] - start[i] for run in runs] for k in (0, 1)]
        oracle = [
            torch.stack([p @ hessian @ q for p, q in zip(errors[j], errors[k])]).mean()
            for j, k in ((0, 0), (1, 1), (0, 1))
        ]
        for name, expected in zip("abc", oracle):
            close(getattr(found.moments, name)[i], expected, rtol=1e-7)
        expected = torch.stack([torch.stack([slope @ e for e in each]).mean() for each in errors])
        close(found.details["slope"][i], expected, rtol=1e-7)
        steepest = max(float(e @ hessian @ e / (e @ e)) for each in errors for e in each)
        assert float(found.details["smoothness"][i]) == pytest.approx(steepest, rel=1e-7)


def backbone_features(adapted, x):
    """What the head sees."""
    seen = []
    hook = adapted.model.get_base_model().head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    adapted(adapted.initial, x)
    hook.remove()
    return seen[0]
