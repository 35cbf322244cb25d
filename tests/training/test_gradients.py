"""Per-sample gradients, the Fisher and Gauss–Newton products against loops of autograd."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from potara_lite.adapters.state import client_adapter, delta, flatten, unflatten
from potara_lite.federation.split import Split
from potara_lite.training.batching import Execution
from potara_lite.training.gradients import (
    delta_gradients,
    diagonal_fisher,
    directional_derivatives,
    per_sample_gradients,
)


@pytest.fixture(scope="module")
def stack(adapted64, random_stack):
    return random_stack(adapted64, 3, seed=4)


@pytest.fixture(scope="module")
def gradients(adapted64, stack, federation64):
    return per_sample_gradients(adapted64, stack, federation64.train)


@pytest.fixture(scope="module")
def direction(adapted64, random_stack):
    return flatten(random_stack(adapted64, 3, seed=9, scale=1.0))


def slow_gradients(adapted, stack, client, x, y, reduction="mean"):
    """Autograd through one model, one batch: what one ``backward`` gives."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in client_adapter(stack, client).items()}
    value = F.cross_entropy(adapted(leaves, x), y, reduction=reduction)
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(leaves.values()))])


def test_per_sample_gradients_equal_a_loop_of_autograd(adapted64, stack, federation64, gradients):
    assert gradients.shape == (3, 13, 452)
    for client in range(3):
        x, y = federation64.train.client(client)
        for i in range(len(y)):
            oracle = slow_gradients(adapted64, stack, client, x[i : i + 1], y[i : i + 1])
            torch.testing.assert_close(gradients[client, i], oracle, rtol=1e-9, atol=1e-13)


def rotated(stack, seed=0):
    """The same models in another basis of their factors: (B, A) → (B M, M⁻¹ A)."""
    generator, result = torch.Generator().manual_seed(seed), dict(stack)
    for name, a in stack.items():
        if name.endswith(".lora_A.weight"):
            b = name.replace(".lora_A.", ".lora_B.")
            m = torch.randn(len(a), a.shape[1], a.shape[1], generator=generator, dtype=a.dtype)
            result[name], result[b] = torch.linalg.solve(m, a), stack[b] @ m
    return result


def test_gradients_in_the_deltas_are_those_of_a_dense_model(adapted64, backbone64, stack, federation64):
    found, prefix = delta_gradients(adapted64, stack, federation64.calibration), "base_model.model."
    for client, n in enumerate((3, 6, 4)):
        x, y = federation64.calibration.client(client)
        moved = dict(backbone64.named_parameters())
        change = delta(client_adapter(stack, client), adapted64.scaling)
        leaves = {}
        for name, tensor in change.items():
            key = name.removeprefix(prefix)
            start = moved[key].detach() if name.removesuffix(".weight") in adapted64.scaling else 0.0
            leaves[key] = (start + tensor).detach().requires_grad_()
        for i in range(n):
            logits = torch.func.functional_call(backbone64, leaves, (x[i : i + 1],))
            rows = torch.autograd.grad(F.cross_entropy(logits, y[i : i + 1]), list(leaves.values()))
            oracle = torch.cat([row.flatten() for row in rows])
            torch.testing.assert_close(found[client, i], oracle, rtol=1e-9, atol=1e-13)
        assert not found[client, n:].any()


def test_gradients_in_the_deltas_know_no_basis_and_no_zero_factor(adapted64, stack, federation64):
    split = federation64.calibration
    found, other = (delta_gradients(adapted64, each, split) for each in (stack, rotated(stack)))
    torch.testing.assert_close(other, found, rtol=1e-7, atol=1e-12)
    usual, moved = (per_sample_gradients(adapted64, each, split) for each in (stack, rotated(stack)))
    assert (usual - moved).norm() > 0.1 * usual.norm()  # those in the factors do
    fresh = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in stack.items()}
    layers = sum(
        t.numel() for name, t in delta(client_adapter(fresh, 0), adapted64.scaling).items() if ".head" not in name
    )
    assert (diagonal_fisher(delta_gradients(adapted64, fresh, split), split.sizes)[:, :layers].sum(1) > 0).all()


def test_padded_samples_give_zero(federation64, gradients):
    for client, n in enumerate(federation64.train.sizes.tolist()):
        assert not gradients[client, n:].any()
        assert (gradients[client, :n].abs().amax(1) > 0).all()


@pytest.mark.parametrize("chunk_size", [1, 7, 39])
def test_chunks_change_nothing(adapted64, stack, federation64, gradients, chunk_size):
    chunked = per_sample_gradients(adapted64, stack, federation64.train, execution=Execution(chunk_size=chunk_size))
    torch.testing.assert_close(chunked, gradients, rtol=1e-9, atol=1e-13)


def test_float32_gradients_agree_with_float64(adapted, random_stack, federation, gradients):
    small = per_sample_gradients(adapted, random_stack(adapted, 3, seed=4), federation.train)
    torch.testing.assert_close(small.double(), gradients, rtol=0, atol=1e-5 * float(gradients.abs().max()))


def test_labels_may_be_replaced(adapted64, stack, federation64):
    y = federation64.train.y
    other = torch.where(y < 0, y, (y + 1) % 4)
    replaced = per_sample_gradients(adapted64, stack, federation64.train, labels=other)
    x, _ = federation64.train.client(1)
    for i in (0, 12):
        oracle = slow_gradients(adapted64, stack, 1, x[i : i + 1], other[1, i : i + 1])
        torch.testing.assert_close(replaced[1, i], oracle, rtol=1e-9, atol=1e-13)
    assert not replaced[0, 5:].any()


def test_gradients_of_a_are_exactly_zero_while_b_is_zero(adapted64, federation64):
    names, initial = list(adapted64.initial), {n: t.expand(3, *t.shape).clone() for n, t in adapted64.initial.items()}
    initial["base_model.model.head.weight"] += 0.1 * torch.arange(4).double().view(4, 1)
    parts = unflatten(per_sample_gradients(adapted64, initial, federation64.train).flatten(0, 1), adapted64.initial)
    assert not any(parts[name].any() for name in names if ".lora_A." in name)
    assert all(parts[name].any() for name in names if ".lora_B." in name)


def test_diagonal_fisher_is_the_mean_of_squares_over_real_samples(gradients, federation64):
    fisher = diagonal_fisher(gradients, federation64.train.sizes)
    for client, n in enumerate(federation64.train.sizes.tolist()):
        oracle = sum(gradients[client, i] ** 2 for i in range(n)) / n
        torch.testing.assert_close(fisher[client], oracle, rtol=1e-9, atol=0)


def test_diagonal_fisher_by_hand():
    gradients = torch.tensor([[[1.0, -2.0], [3.0, 2.0]], [[5.0, 0.0], [0.0, 0.0]]])
    assert diagonal_fisher(gradients, torch.tensor([2, 1])).tolist() == [[5.0, 4.0], [25.0, 0.0]]


def test_diagonal_fisher_equals_the_diagonal_of_the_full_matrix(gradients, federation64):
    fisher = diagonal_fisher(gradients, federation64.train.sizes)
    full = torch.einsum("cnp,cnq->cpq", gradients, gradients) / federation64.train.sizes.view(-1, 1, 1)
    torch.testing.assert_close(fisher, full.diagonal(dim1=1, dim2=2), rtol=1e-9, atol=0)


def test_seven_copies_give_seven_times_the_summed_fisher_and_the_same_mean(adapted64, stack, federation64, gradients):
    copies = Split([tuple(part.repeat(7, *[1] * (part.dim() - 1)) for part in federation64.train.client(i))
                       for i in range(3)])  # fmt: skip
    many = per_sample_gradients(adapted64, stack, copies)
    torch.testing.assert_close(many.square().sum(1), 7 * gradients.square().sum(1), rtol=1e-9, atol=0)
    one, seven = diagonal_fisher(gradients, federation64.train.sizes), diagonal_fisher(many, copies.sizes)
    torch.testing.assert_close(seven, one, rtol=1e-9, atol=0)


def test_the_fisher_is_not_the_squared_gradient_of_the_batch(adapted64, stack, federation64, gradients):
    fisher = diagonal_fisher(gradients, federation64.train.sizes)
    for client in range(3):
        x, y = federation64.train.client(client)
        batch = slow_gradients(adapted64, stack, client, x, y)  # of the mean loss
        torch.testing.assert_close(batch, gradients[client].sum(0) / len(y), rtol=1e-9, atol=1e-13)
        assert (batch**2 <= fisher[client] * (1 + 1e-9)).all()  # Jensen
        assert (batch**2).sum() < 0.9 * fisher[client].sum()


def explicit(adapted, stack, client, x, y, direction):
    """Slope and Gauss–Newton curvature of one example from its explicit Jacobian ``(classes, P)``."""
    like = client_adapter(stack, client)
    row = flatten({name: tensor[None] for name, tensor in like.items()})[0]

    def logits(row):
        return adapted({n: t[0] for n, t in unflatten(row[None], like).items()}, x[None])[0]

    jacobian = torch.autograd.functional.jacobian(logits, row)
    p = logits(row).softmax(0)
    onehot = F.one_hot(y, len(p))
    u = jacobian @ direction
    return (p - onehot) @ u, u @ (torch.diag(p) - torch.outer(p, p)) @ u


def test_slope_and_curvature_equal_the_explicit_jacobian(adapted64, stack, federation64, direction):
    slope, curvature = directional_derivatives(adapted64, stack, direction, federation64.train)
    assert slope.shape == curvature.shape == (3, 13)
    for client, i in ((0, 0), (0, 4), (1, 12), (2, 8)):
        x, y = federation64.train.x[client, i], federation64.train.y[client, i]
        oracle = explicit(adapted64, stack, client, x, y, direction[client])
        torch.testing.assert_close((slope[client, i], curvature[client, i]), oracle, rtol=1e-9, atol=1e-13)


def test_the_slope_is_the_gradient_along_the_direction(adapted64, stack, federation64, gradients, direction):
    slope, _ = directional_derivatives(adapted64, stack, direction, federation64.train)
    torch.testing.assert_close(slope, (gradients @ direction.unsqueeze(-1)).squeeze(-1), rtol=1e-9, atol=1e-12)


def test_directional_derivatives_of_padding_are_zero(adapted64, stack, federation64, direction):
    for part in directional_derivatives(adapted64, stack, direction, federation64.train):
        for client, n in enumerate(federation64.train.sizes.tolist()):
            assert not part[client, n:].any() and part[client, :n].all()


def test_where_logits_are_linear_the_curvature_is_the_losss_own(adapted64, stack, federation64, direction):
    """Along the head alone the logits are linear, so Gauss–Newton is the Hessian and finite differences must agree."""
    mask = flatten({name: torch.full_like(t, float(".head." in name)) for name, t in stack.items()})
    along, h = direction * mask, 1e-3
    slope, curvature = directional_derivatives(adapted64, stack, along, federation64.train)

    def loss(t):
        moved = unflatten(flatten(stack) + t * along, adapted64.initial)
        return torch.stack([
            F.cross_entropy(adapted64(client_adapter(moved, i), federation64.train.x[i, :5]),
                            federation64.train.y[i, :5], reduction="none") for i in range(3)])  # fmt: skip

    below, here, above = loss(-h), loss(0), loss(h)
    # errors: h²/6 and h²/12 times higher derivatives of order |u|³ and |u|⁴, and rounding of 1e-16 / h²
    torch.testing.assert_close(slope[:, :5], (above - below) / (2 * h), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(curvature[:, :5], (above - 2 * here + below) / h**2, rtol=1e-3, atol=1e-3)


def test_curvature_is_the_expected_squared_slope_over_the_models_own_labels(adapted64, stack, federation64, direction):
    """The Fisher identity: Gauss–Newton equals the Fisher with labels from the model."""
    split, expected = federation64.train, 0
    for label in range(4):
        y = torch.where(split.y < 0, split.y, label)
        slope, curvature = directional_derivatives(adapted64, stack, direction, split.with_labels(y))
        p = torch.stack([adapted64(client_adapter(stack, i), split.x[i]).softmax(-1)[:, label] for i in range(3)])
        expected = expected + p * slope**2
    torch.testing.assert_close(curvature, expected, rtol=1e-9, atol=1e-13)


@settings(max_examples=10, deadline=None)
@given(scale=st.floats(-3, 3).filter(lambda s: abs(s) > 1e-3))
def test_slope_is_linear_and_curvature_quadratic_in_the_direction(adapted64, stack, federation64, direction, scale):
    one = directional_derivatives(adapted64, stack, direction, federation64.test)
    many = directional_derivatives(adapted64, stack, scale * direction, federation64.test)
    torch.testing.assert_close(many, (scale * one[0], scale**2 * one[1]), rtol=1e-9, atol=1e-12)
