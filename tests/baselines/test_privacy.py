"""Privacy: clip, noise, the accountant, and the moment that the noise adds."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from potara_lite import Moments
from potara_lite.adapters.state import client_adapter, delta, flatten, is_lora, repeat_adapter
from potara_lite.baselines.algorithms import FEDEX, FEDIT, FFA
from potara_lite.baselines.privacy import (
    Privacy,
    epsilon,
    noise_moment,
    noise_multiplier_for,
    private_average,
    with_noise,
)
from potara_lite.baselines.rounds import run_algorithm, server_step

OPTIONS = dict(rounds=2, local_steps=3, batch_size=4, lr=1e-2, seed=6)


def test_without_noise_and_with_a_wide_clip_it_is_the_plain_mean(adapted64, federation64):
    equal = replace(FEDIT, aggregate=lambda stack, sizes: repeat_adapter({n: t.mean(0) for n, t in stack.items()}, 3))
    private = replace(FEDIT, privacy=Privacy(clip=1e9, noise_multiplier=0.0, seed=0))
    one, two = (run_algorithm(a, adapted64, federation64.train, **OPTIONS).federated for a in (equal, private))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-12)


def test_what_a_client_changes_is_cut_to_the_clip(adapted64, random_stack, random_adapter):
    sent, uploads = random_adapter(adapted64, 1), random_stack(adapted64, 3, 2)
    changes = flatten(uploads) - flatten(repeat_adapter(sent, 1))
    clip = float(changes.norm(dim=1)[1])  # one is at it, and of the others at least one above it
    assert (changes.norm(dim=1) > clip * 1.001).any()
    found = private_average(uploads, sent, Privacy(clip, 0.0, 0), 0)
    cut = torch.stack([row * min(1.0, clip / float(row.norm())) for row in changes])
    torch.testing.assert_close(flatten(repeat_adapter(found, 1))[0], flatten(repeat_adapter(sent, 1))[0] + cut.mean(0))


def noisy_means(adapter, stack, privacy, draws):
    return [private_average(stack, adapter, replace(privacy, seed=seed), 4) for seed in range(draws)]


@pytest.mark.parametrize("algorithm", [FEDIT, FFA], ids=lambda algorithm: algorithm.name)
def test_the_noise_enters_the_moment_a_by_the_predicted_amount(algorithm, adapted64, random_stack):
    """Measured over 300 draws of the server's noise, within four standard errors, on both factors and on B alone."""
    adapter, privacy, draws = client_adapter(random_stack(adapted64, 1, 3), 0), Privacy(0.6, 2.0, 0), 300
    sent = {name: tensor for name, tensor in adapter.items() if algorithm.is_uploaded(name)}
    uploads = repeat_adapter(sent, 3)  # nobody changes anything: what differs is noise
    before = delta(adapter, adapted64.scaling)
    measured = []
    for mean in noisy_means(sent, uploads, privacy, draws):
        after = delta(adapter | mean, adapted64.scaling)
        measured.append(sum(float((after[name] - before[name]).square().sum()) for name in before))
    predicted = noise_moment(adapter, adapted64.scaling, privacy.noise_std(3), algorithm.is_uploaded)
    error = np.std(measured, ddof=1) / math.sqrt(draws)
    assert abs(np.mean(measured) - predicted) < 4 * error and error < 0.05 * predicted


def test_the_noise_on_a_mean_is_that_on_the_sum_over_the_clients(adapted64, random_adapter):
    sent = random_adapter(adapted64, 1)
    for clients in (1, 4):
        mean = private_average(repeat_adapter(sent, clients), sent, Privacy(0.6, 2.0, 7), 0)  # nobody changes anything
        noise = flatten(repeat_adapter(mean, 1)) - flatten(repeat_adapter(sent, 1))
        expected = 2.0 * 0.6 / clients
        assert abs(float(noise.std()) / expected - 1) < 4 / math.sqrt(2 * noise.numel()) < 0.2


def test_noise_on_a_alone_is_the_other_term(adapted64, random_stack):
    adapter = client_adapter(random_stack(adapted64, 1, 3), 0)
    parts = [
        noise_moment(adapter, adapted64.scaling, 0.1, noisy)
        for noisy in (lambda n: is_lora(n, "A"), lambda n: is_lora(n, "B"), lambda n: not is_lora(n))
    ]
    both = noise_moment(adapter, adapted64.scaling, 0.1)
    layers = [adapter[n] for n in adapter if is_lora(n, "A")], [adapter[n] for n in adapter if is_lora(n, "B")]
    product = sum(1.5**2 * 0.1**4 * b.shape[0] * a.shape[0] * a.shape[1] for a, b in zip(*layers))
    assert both == pytest.approx(sum(parts) + product, rel=1e-9) and min(parts) > 0


def test_the_noise_of_every_round_is_its_own_and_that_of_a_seed_the_same(adapted64, random_stack):
    stack = random_stack(adapted64, 3, 2)
    sent, privacy = client_adapter(stack, 0), Privacy(1.0, 1.0, 5)
    one, same, other = (flatten(repeat_adapter(private_average(stack, sent, privacy, n), 1)) for n in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def gaussian_epsilon(mu, target):
    """Balle & Wang (ICML 2018, arXiv 1805.06530), theorem 8, solved for ε; mu is sensitivity over noise."""

    def delta_of(e):
        return norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu)

    return brentq(lambda e: delta_of(e) - target, 0, 500)


@pytest.mark.parametrize("noise, rounds, target", [(1.0, 1, 1e-5), (4.0, 10, 1e-2), (2.0, 40, 1e-3)])
def test_epsilon_is_that_of_the_gaussian_mechanism(noise, rounds, target):
    """So many Gaussian mechanisms are one with noise smaller by the root of their number."""
    pytest.importorskip("dp_accounting", reason="needs the extra `privacy`")
    assert epsilon(noise, rounds, target) == pytest.approx(gaussian_epsilon(rounds**0.5 / noise, target), rel=1e-3)


def test_the_noise_for_an_epsilon_has_it():
    pytest.importorskip("dp_accounting", reason="needs the extra `privacy`")
    noise = noise_multiplier_for(3.0, 8, 1e-2)
    assert 0.99 * 3 < epsilon(noise, 8, 1e-2) <= 3.0 and noise_multiplier_for(math.inf, 8, 1e-2) == 0
    assert epsilon(0.0, 8, 1e-2) == math.inf


def test_the_weight_moves_to_the_local_model_as_the_noise_grows():
    moments = Moments(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]), torch.tensor([0.3, 0.3]))
    weights = torch.stack([with_noise(moments, v).weight for v in (0.0, 1.0, 10.0, 1e6)])
    assert (weights.diff(dim=0) < 0).all() and (weights[-1] < 1e-5).all()
    v = torch.tensor([1.0, 4.0], dtype=torch.float64)
    expected = (moments.b - moments.c) / (moments.a + v + moments.b - 2 * moments.c)
    torch.testing.assert_close(with_noise(moments, v).weight, expected, rtol=1e-9, atol=0)
    assert (with_noise(moments, v).optimum < moments.b).all()  # and yet no worse than local alone


def test_who_is_missing_does_not_change_what_the_others_are_told(adapted64, random_stack):
    private = replace(FEDIT, privacy=Privacy(1.0, 1.0, 5))
    sent, uploads = random_stack(adapted64, 3, 2), random_stack(adapted64, 2, 4)
    sent = repeat_adapter(client_adapter(sent, 0), 3)
    message = server_step(private, uploads, torch.tensor([1, 9]), 3, sent=sent, number=2)
    mean = private_average(uploads, client_adapter(sent, 0), private.privacy, 2)
    for name in mean:
        assert torch.equal(message[name], repeat_adapter(mean, 3)[name])


@pytest.mark.parametrize("options", [dict(clip=0.0), dict(clip=-1.0), dict(noise_multiplier=-1.0)])
def test_what_is_no_privacy_is_refused(options):
    with pytest.raises(ValueError, match="must"):
        Privacy(**dict(clip=1.0, noise_multiplier=1.0, seed=0) | options)
    with pytest.raises(ValueError, match="FedEx-LoRA: noise is for the mean of FedAvg"):
        replace(FEDEX, privacy=Privacy(1.0, 1.0, 0))
