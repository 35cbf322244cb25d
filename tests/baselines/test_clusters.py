"""Three models and their weights: the quadratic on the simplex, the clusters, and what it all costs."""

import pytest
import torch

from potara_lite import Setting, fedit, repeat_adapter
from potara_lite.adapters.state import adapter_bytes, client_adapter, delta, stack_adapters
from potara_lite.baselines.clusters import cluster_clients, similarity, three_models, train_clusters
from potara_lite.estimators import estimate_combination, estimate_curve, simplex_moments
from potara_lite.estimators.moments import combination_weights
from potara_lite.experiment import Run


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_moments_on_the_simplex_are_the_quadratic_through_corners_and_mid_points():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 3, 3, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT

    def value(weights):
        return torch.einsum("i,cij,j->c", weights, matrix, weights)

    corners = torch.eye(3, dtype=torch.float64)
    middle = {(k, m): value((corners[k] + corners[m]) / 2) for k in range(3) for m in range(k + 1, 3)}
    close(simplex_moments(torch.stack([value(corner) for corner in corners], 1), middle), matrix)


def test_two_models_get_the_weight_of_the_parabola_through_three_points(adapted64, federation64, random_stack):
    models = [random_stack(adapted64, 3, seed, scale=0.5) for seed in (1, 2)]
    weights, _ = estimate_combination(adapted64, models, federation64.calibration, client_share=1.0)
    alone = estimate_curve(adapted64, *models, federation64.calibration, points=3, parabola=True)
    torch.testing.assert_close(weights[:, 0], alone.weight, rtol=1e-6, atol=1e-9)
    close(weights.sum(1), torch.ones(3, dtype=torch.float64))


def test_the_pool_counts_every_sample_once_and_client_share_moves_from_it_to_each_client(
    adapted64, federation64, random_stack
):
    models = [random_stack(adapted64, 3, seed, scale=0.5) for seed in (1, 2, 3)]
    split = federation64.calibration
    shared, moments = estimate_combination(adapted64, models, split, client_share=0.0)
    close(shared, shared[:1].expand(3, 3))
    one = split.rows([1])
    alone, _ = estimate_combination(
        adapted64, [{n: t[1:2] for n, t in m.items()} for m in models], one, client_share=0.3
    )
    alone_too, _ = estimate_combination(adapted64, models, split, client_share=1.0)
    close(alone_too[1:2], alone)  # a client that is its own pool
    pooled = (split.sizes.double() / split.sizes.sum()) @ moments.flatten(1)
    close(shared[0], combination_weights(pooled.view(3, 3), nonnegative=True))


def test_what_a_combination_refuses(adapted64, federation64, random_stack):
    models = [random_stack(adapted64, 3, seed) for seed in (1, 2)]
    with pytest.raises(ValueError, match="at least 2 models, not 1"):
        estimate_combination(adapted64, models[:1], federation64.calibration)
    with pytest.raises(ValueError, match="client_share must be at most 1, not 1.5"):
        estimate_combination(adapted64, models, federation64.calibration, client_share=1.5)


def test_similarity_is_the_cosine_of_the_dense_deltas(adapted64, random_stack):
    stack = random_stack(adapted64, 3, 5)
    dense = delta(stack, adapted64.scaling)
    flat = torch.cat([tensor.flatten(1) for tensor in dense.values()], dim=1)
    close(similarity(stack, adapted64.scaling), torch.nn.functional.cosine_similarity(flat[None], flat[:, None], dim=2))


def test_clients_that_are_alike_are_in_one_cluster():
    similar = torch.tensor([[1, 0.1, 0.8, 0.1], [0.1, 1, 0.2, 0.7], [0.8, 0.2, 1, 0], [0.1, 0.7, 0, 1.0]])
    labels = cluster_clients(similar.double(), 2)
    assert labels[0] == labels[2] != labels[1] == labels[3]
    assert sorted(set(cluster_clients(similar.double(), 4).tolist())) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="5 clusters of 4 clients"):
        cluster_clients(similar, 5)
    with pytest.raises(ValueError, match=r"similar must be numbers of shape \(C, C\), not Tensor of shape \(4, 3\)"):
        cluster_clients(similar[:, :3], 2)


def test_a_cluster_is_a_federation_of_its_clients(adapted64, federation64):
    options = dict(rounds=2, local_steps=2, batch_size=4, seed=3)
    stack, ledger = train_clusters(adapted64, federation64.train, torch.tensor([0, 1, 0]), **options)
    pair = fedit(adapted64, federation64.train.rows([0, 2]), **options)
    single = fedit(adapted64, federation64.train.rows([1]), **options)
    expected = stack_adapters([pair.adapter, single.adapter, pair.adapter])
    for name in expected:
        close(stack[name], expected[name])
    assert ledger.up.tolist() == [2 * adapter_bytes(adapted64.initial)] * 3
    assert ledger.steps.tolist() == [4] * 3
    fresh = repeat_adapter(adapted64.initial, 1)
    assert all(torch.equal(fresh[name][0], adapted64.initial[name]) for name in fresh)


def test_three_models_take_the_pairs_steps_and_one_upload_more(adapted, federation):
    setting = Setting(clients=3, rounds=4, round_steps=2, local_steps=6, batch_size=4)
    run = Run(adapted, federation, setting, seed=0)
    result = three_models(clusters=2)(run)
    size = adapter_bytes(adapted.initial)
    assert result.ledger.steps.tolist() == [setting.total_steps] * 3
    assert result.ledger.up.tolist() == [5 * size + 4 * 6] * 3  # four rounds, the local adapter, six losses
    assert result.ledger.down.tolist() == [6 * size + 4 * 3] * 3  # four rounds, two last messages, three weights
    rank = client_adapter(result.adapters, 0)
    assert max(tensor.shape[0] for name, tensor in rank.items() if "lora_A" in name) == 3 * 2
