"""The loss along a segment and the barrier on it."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from potara_lite.adapters.state import client_adapter, delta
from potara_lite.merging.connectivity import along_segment, barrier, weight_grid
from potara_lite.merging.merge import merge_exact, merge_factors
from potara_lite.training.batching import Execution
from potara_lite.training.train import evaluate


def test_a_grid_has_both_ends():
    torch.testing.assert_close(weight_grid(5), torch.tensor([0, 0.25, 0.5, 0.75, 1]), rtol=0, atol=0)
    assert len(weight_grid()) == 11
    with pytest.raises(ValueError, match="points must be at least 2, not 1"):
        weight_grid(1)


def test_barriers_of_hand_made_curves():
    weights = torch.tensor([0.0, 0.25, 0.5, 1.0])
    loss = torch.tensor(
        [
            [1.0, 1.0, 1.0, 1.0],  # flat
            [1.0, 1.5, 2.0, 3.0],  # the straight line itself
            [1.0, 0.5, 0.4, 2.0],  # a valley
            [1.0, 4.0, 2.0, 3.0],  # a hill of 4 - 1.5
            [1.0, 1.5, 5.0, 3.0],  # a hill of 5 - 2
            [3.0, 2.0, 2.6, 1.0],  # below the line, then 0.6 above it
        ]
    )
    torch.testing.assert_close(barrier(loss, weights), torch.tensor([0, 0, 0, 2.5, 3.0, 0.6]), rtol=1e-6, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    ends=st.tuples(st.floats(0, 5), st.floats(0, 5)), height=st.floats(0, 5), at=st.integers(1, 9),
)  # fmt: skip
def test_a_bump_on_any_line_is_its_barrier(ends, height, at):
    weights = torch.linspace(0, 1, 11, dtype=torch.float64)
    loss = (1 - weights) * ends[0] + weights * ends[1]
    loss[at] += height
    assert barrier(loss[None], weights).item() == pytest.approx(height, rel=1e-9, abs=1e-9)


def test_a_convex_curve_has_no_barrier():
    weights = torch.linspace(0, 1, 101, dtype=torch.float64)
    loss = torch.stack([3 * (weights - 0.3) ** 2, weights.exp()])
    assert barrier(loss, weights).tolist() == pytest.approx([0, 0], abs=1e-12)


@pytest.fixture(scope="module")
def pair(adapted64, random_stack):
    return random_stack(adapted64, 3, 5, scale=0.5), random_stack(adapted64, 3, 6, scale=0.5)


def test_a_segment_runs_from_the_local_to_the_federated_model(adapted64, pair, federation64):
    federated, local = pair
    loss, accuracy = along_segment(adapted64, federated, local, federation64.test, [0.0, 0.4, 1.0])
    assert loss.shape == accuracy.shape == (3, 3)
    for column, stack in ((0, local), (2, federated)):
        oracle = evaluate(adapted64, stack, federation64.test)
        torch.testing.assert_close((loss[:, column], accuracy[:, column]), oracle, rtol=1e-9, atol=1e-12)


def test_a_segment_is_the_line_between_the_dense_weights(adapted64, backbone64, pair, federation64):
    weights = torch.tensor([0.25, 0.5])
    loss, _ = along_segment(adapted64, *pair, federation64.test, weights, execution=Execution(chunk_size=2))
    for client in range(3):
        x, y = federation64.test.client(client)
        deltas = [delta(client_adapter(stack, client), adapted64.scaling) for stack in pair]
        for k, w in enumerate(weights.tolist()):
            mixed = {
                name.removeprefix("base_model.model."): w * deltas[0][name] + (1 - w) * deltas[1][name]
                for name in deltas[0]
            }
            moved = {n: mixed[n] if "head" in n else backbone64.get_parameter(n) + mixed[n] for n in mixed}
            logits = torch.func.functional_call(backbone64, moved, (x,))
            assert loss[client, k].item() == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-9)


def test_another_merge_takes_another_path_between_the_same_ends(adapted64, pair, federation64):
    exact, factors = (
        along_segment(adapted64, *pair, federation64.test, weight_grid(3), merge=merge)[0]
        for merge in (merge_exact, merge_factors)
    )
    torch.testing.assert_close(exact[:, [0, 2]], factors[:, [0, 2]], rtol=1e-9, atol=1e-12)
    assert (exact[:, 1] - factors[:, 1]).abs().min() > 1e-4
