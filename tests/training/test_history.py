"""The history of a training: what it says is what happened, and asking for it changes nothing."""

import numpy as np
import pandas as pd
import pytest
import torch

from potara_lite import Algorithm, Setting, evaluate, fedit, repeat_adapter, run_algorithm, train, train_pair
from potara_lite.adapters.state import client_adapter, flatten
from potara_lite.baselines.algorithms import FEDIT, FEDPER, ditto, fedalt
from potara_lite.training.history import COLUMNS
from potara_lite.training.train import epoch_steps

OPTIONS = dict(batch_size=4, lr=1e-2)
ROUNDS = dict(rounds=3, local_steps=2, **OPTIONS)


def test_evaluating_changes_no_bit_of_training(adapted, federation, random_stack):
    stack = random_stack(adapted, 3, seed=0)
    plain = train(adapted, stack, federation.train, steps=7, **OPTIONS)
    seen = []
    watch = dict(eval_split=federation.test, eval_every=3, callbacks=[seen.append])
    watched = train(adapted, stack, federation.train, steps=7, **OPTIONS, **watch)
    assert torch.equal(flatten(plain.adapters), flatten(watched.adapters)) and torch.equal(plain.losses, watched.losses)
    assert all(torch.equal(one, two) for one, two in zip(vars(plain.state).values(), vars(watched.state).values()))
    assert [rows.step.unique().tolist() for rows in seen] == [[3], [6], [7]]
    history = watched.history
    assert list(history.columns) == COLUMNS and len(history) == 7 * 3
    assert history.dropna(subset="loss").step.unique().tolist() == [3, 6, 7]
    np.testing.assert_array_equal(history.train_loss.to_numpy().reshape(7, 3).T, watched.losses.numpy())
    for steps in (3, 7):
        loss, accuracy = evaluate(
            adapted, train(adapted, stack, federation.train, steps=steps, **OPTIONS).adapters, federation.test
        )
        now = history[history.step == steps]
        np.testing.assert_array_equal(now.loss, loss)
        np.testing.assert_array_equal(now.accuracy, accuracy)
    assert plain.history.loss.isna().all() and len(plain.history) == 21


def test_evaluating_changes_no_bit_of_a_federation_and_no_byte(adapted, federation):
    plain = fedit(adapted, federation.train, participation=0.67, **ROUNDS)
    seen = []
    watch = dict(eval_split=federation.test, eval_every=2, callbacks=[seen.append])
    watched = fedit(adapted, federation.train, participation=0.67, **ROUNDS, **watch)
    assert all(torch.equal(plain.adapter[name], watched.adapter[name]) for name in plain.adapter)
    for name in ("up", "down", "steps"):
        assert torch.equal(getattr(plain.by_round, name), getattr(watched.by_round, name))
    history = watched.history
    pd.testing.assert_frame_equal(pd.concat(seen, ignore_index=True), history)
    assert history["round"].tolist() == [1] * 3 + [2] * 3 + [3] * 3
    assert history.dropna(subset="loss")["round"].unique().tolist() == [2, 3]
    last = history[history["round"] == 3]
    assert last.bytes_up.tolist() == watched.ledger.up.tolist() and last.step.tolist() == watched.ledger.steps.tolist()
    assert last.bytes_down.tolist() == watched.by_round.down[:3].sum(0).tolist()
    loss, _ = evaluate(adapted, repeat_adapter(watched.adapter, 3), federation.test)
    np.testing.assert_array_equal(last.loss, loss)
    np.testing.assert_array_equal(history.train_loss.to_numpy(np.float32).reshape(3, 3), watched.losses.numpy())
    assert (history.seconds.to_numpy().reshape(3, 3)[:, 0] > 0).all() and history.seconds.is_monotonic_increasing


@pytest.mark.parametrize("algorithm", [FEDIT, FEDPER, ditto(0.1), fedalt(), Algorithm("local")], ids=lambda a: a.name)
def test_a_round_is_evaluated_as_if_it_were_the_last(adapted, federation, algorithm):
    watch = dict(eval_split=federation.test, eval_every=1)
    plain = run_algorithm(algorithm, adapted, federation.train, **ROUNDS)
    watched = run_algorithm(algorithm, adapted, federation.train, **ROUNDS, **watch)
    assert all(torch.equal(tensor, watched.tensors[name]) for name, tensor in plain.tensors.items())
    assert torch.equal(plain.ledger.down, watched.ledger.down) and torch.equal(plain.ledger.up, watched.ledger.up)
    for rounds in (1, 2, 3):
        shorter = run_algorithm(algorithm, adapted, federation.train, **ROUNDS | dict(rounds=rounds))
        loss, accuracy = evaluate(shorter.adapted, shorter.personal, federation.test)
        now = watched.history[watched.history["round"] == rounds]
        np.testing.assert_allclose(now.loss, loss, rtol=1e-6)
        np.testing.assert_allclose(now.accuracy, accuracy)
        assert now.bytes_up.tolist() == shorter.ledger.up.tolist()


def test_the_history_of_fedit_is_that_of_its_declaration(adapted, federation):
    one = fedit(adapted, federation.train, eval_split=federation.test, **ROUNDS).history
    two = run_algorithm(FEDIT, adapted, federation.train, eval_split=federation.test, **ROUNDS).history
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), two.drop(columns="seconds"))


def test_the_pair_has_the_history_of_both_models(adapted, federation):
    setting = Setting(clients=3, batch_size=4, rounds=2, round_steps=2, local_steps=4, lr=1e-2)
    plain = train_pair(adapted, federation, setting, 0)
    pair = train_pair(adapted, federation, setting, 0, eval_split=federation.test, eval_every=1)
    assert all(torch.equal(one[name], two[name]) for one, two in zip(plain.models, pair.models) for name in one)
    local = pair.history[pair.history.model == "local"]
    assert local.dropna(subset="loss").step.unique().tolist() == [2, 4]
    loss, _ = evaluate(adapted, pair.local, federation.test)
    np.testing.assert_array_equal(local[local.step == 4].loss, loss)
    assert pair.history[pair.history.model == "federated"]["round"].unique().tolist() == [1, 2]


def test_a_split_of_other_clients_is_refused(adapted, federation):
    with pytest.raises(ValueError, match=r"eval_split must have the clients \(0, 1, 2\), not \(1, 0, 2\)"):
        fedit(adapted, federation.train, eval_split=federation.test.rows([1, 0, 2]), **ROUNDS)


# Budgets that differ from client to client.


def test_each_client_may_take_steps_of_its_own(adapted64, federation64, random_stack):
    stack = random_stack(adapted64, 3, seed=0)
    trained = train(adapted64, stack, federation64.train, steps=[3, 0, 5], start=[2, 0, 1], **OPTIONS)
    assert trained.state.steps.tolist() == [3, 0, 5]
    assert trained.losses.isnan().sum(1).tolist() == [2, 5, 0]
    for row, (steps, start) in enumerate([(3, 2), (0, 0), (5, 1)]):
        one = {name: tensor[row : row + 1] for name, tensor in stack.items()}
        alone = train(adapted64, one, federation64.train.rows([row]), steps=steps, start=start, **OPTIONS)
        torch.testing.assert_close(flatten(trained.adapters)[row], flatten(alone.adapters)[0], rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="steps: 2 of them for 3 clients"):
        train(adapted64, stack, federation64.train, steps=[1, 2])


def test_rounds_with_steps_of_each_clients_own(adapted64, federation64):
    steps = epoch_steps(federation64.train, 1, 4)
    assert steps == [1, 3, 2]  # of 5, 13 and 9 examples
    options = dict(rounds=2, local_steps=steps, **OPTIONS)
    one = fedit(adapted64, federation64.train, **options)
    two = run_algorithm(FEDIT, adapted64, federation64.train, **options)
    assert one.ledger.steps.tolist() == two.ledger.steps.tolist() == [2, 6, 4]
    federated = client_adapter(two.personal, 0)
    for name, tensor in one.adapter.items():
        torch.testing.assert_close(tensor, federated[name], rtol=1e-9, atol=1e-12)
    turned = run_algorithm(
        FEDIT, adapted64, federation64.train.rows([2, 0, 1]), **options | dict(local_steps=[2, 1, 3])
    )
    assert all(torch.equal(tensor[0], federated[name]) for name, tensor in turned.personal.items())
    assert turned.ledger.steps.tolist() == [4, 2, 6]
