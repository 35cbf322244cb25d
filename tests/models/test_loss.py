"""Tasks: what outputs are compared with, from the data to the mixing weight."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from potara_lite import (
    Task,
    attach,
    estimate_calibrated,
    estimate_curve,
    estimate_paper,
    evaluate,
    fedit,
    from_dataframe,
    from_tensors,
    merge_exact,
    per_sample_gradients,
    repeat_adapter,
    train,
)
from potara_lite.adapters.state import client_adapter, flatten, unflatten
from potara_lite.estimators import ESTIMATORS, estimate_gauss_newton
from potara_lite.models.loss import CLASSIFICATION, MULTI_LABEL, REGRESSION
from potara_lite.training.gradients import directional_derivatives

SIZES = (6, 13, 9)


class Net(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(5, 8)
        self.head = nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(self.fc1(x).tanh())


def targets(task, x, generator):
    noise = torch.randn(len(x), 2, generator=generator, dtype=x.dtype)
    if task in ("regression", "huber"):
        return x[:, :1].squeeze(1) + 0.1 * noise[:, 0]
    return (x[:, :2] + 0.1 * noise > 0).double() if task == "multi-label" else x[:, :2] + noise


def federation_of(task):
    generator = torch.Generator().manual_seed(1)

    def examples(sizes):
        found = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in sizes]
        return [(x, targets(task, x, generator)) for x in found]

    return from_tensors(examples(SIZES), examples((4, 4, 4)), calibration=examples((5, 7, 3)))


HUBER = Task("huber", lambda z, y: F.huber_loss(z, y, reduction="none", delta=0.5), lambda z, y: (z - y).abs())
CASES = {  # the task, how many outputs, and the obvious loss of one example
    "regression": ("regression", 1, lambda z, y: ((z.squeeze(-1) - y) ** 2).mean() / 2),
    "two numbers": ("regression", 2, lambda z, y: ((z - y) ** 2).mean() / 2),
    "multi-label": ("multi-label", 2, lambda z, y: F.binary_cross_entropy_with_logits(z, y)),
    "huber": (HUBER, 1, lambda z, y: F.huber_loss(z.squeeze(-1), y, delta=0.5)),
}


@pytest.fixture(params=CASES)
def case(request, random_stack):
    task, outputs, loss = CASES[request.param]
    adapted = attach(Net(outputs).double(), rank=2, targets=["fc1"], task=task)
    stacks = [random_stack(adapted, 3, seed=seed, scale=0.5) for seed in (1, 2)]
    return adapted, federation_of(request.param), stacks, loss


def obvious_losses(adapted, stack, split, loss):
    return [
        torch.stack([loss(adapted(client_adapter(stack, i), x[j : j + 1])[0], y[j]) for j in range(len(y))])
        for i, (x, y) in enumerate(split.examples)
    ]


def test_evaluation_training_and_gradients_follow_the_task(case):
    adapted, federation, (stack, _), loss = case
    split = federation.train
    expected = torch.stack([values.mean() for values in obvious_losses(adapted, stack, split, loss)])
    torch.testing.assert_close(evaluate(adapted, stack, split)[0], expected, rtol=1e-9, atol=0)
    flat = flatten(stack)
    like = client_adapter(stack, 0)
    gradients = per_sample_gradients(adapted, stack, split)
    for row, n in enumerate(SIZES):
        x, y = split.client(row)
        for j in (0, n - 1):
            leaf = flat[row : row + 1].clone().requires_grad_()
            value = loss(adapted(client_adapter(unflatten(leaf, like), 0), x[j : j + 1])[0], y[j])
            torch.testing.assert_close(gradients[row, j], torch.autograd.grad(value, leaf)[0][0], rtol=1e-8, atol=1e-11)
        assert not gradients[row, n:].any()
    trained = train(adapted, stack, split, steps=60, lr=1e-2, batch_size=4)
    after, _ = evaluate(adapted, trained.adapters, split)
    assert (after < expected).all() and trained.losses.isfinite().all()


def test_slope_and_curvature_are_those_of_the_loss_in_the_outputs(case, random_stack):
    adapted, federation, (stack, _), loss = case
    direction = torch.randn(flatten(stack).shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    slope, curvature = directional_derivatives(adapted, stack, direction, federation.train)
    like = client_adapter(stack, 0)
    for row in range(3):
        x, y = federation.train.client(row)

        def outputs(w, row=row, x=x):
            moved = flatten(stack)[row : row + 1] + w * direction[row : row + 1]
            return adapted(client_adapter(unflatten(moved, like), 0), x)

        zero = torch.tensor(0.0, dtype=torch.float64)
        z, u = torch.func.jvp(outputs, (zero,), (torch.ones_like(zero),))
        for j in (0, len(y) - 1):
            of_one = partial(loss, y=y[j])
            hessian = torch.autograd.functional.hessian(of_one, z[j])
            gradient = torch.autograd.functional.jacobian(of_one, z[j])
            torch.testing.assert_close(slope[row, j], gradient @ u[j], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(curvature[row, j], u[j] @ hessian @ u[j], rtol=1e-9, atol=1e-12)


def test_every_estimator_follows_the_task(case):
    adapted, federation, (federated, local), _ = case
    for name, estimator in ESTIMATORS.items():
        weight = estimator(adapted, federated, local, federation).client_weight
        assert weight.shape == (3,) and ((weight >= 0) & (weight <= 1)).all(), name
    found = estimate_curve(adapted, federated, local, federation.calibration, points=5)
    for k, weight in enumerate(found.details["weights"].tolist()):
        loss, _ = evaluate(adapted, merge_exact(federated, local, weight), federation.calibration)
        torch.testing.assert_close(found.details["loss"][:, k], loss, rtol=1e-9, atol=0)


def test_in_a_quadratic_problem_the_weight_is_the_exact_solution():
    """A linear head alone differs between the models, so the squared loss is a parabola along the segment: its minimum
    is ``λ = Σ (z_L - y)(z_L - z_F) / Σ (z_F - z_L)²``, in closed form."""
    adapted = attach(Net(1).double(), rank=2, targets=["fc1"], task="regression")
    federation = federation_of("regression")
    start = repeat_adapter(adapted.initial, 3)
    generator = torch.Generator().manual_seed(3)
    models = []
    for _ in range(2):
        moved = {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in start.items()}
        models.append({name: moved[name] if ".head." in name else tensor for name, tensor in start.items()})
    federated, local = models
    expected = []
    for i, (x, y) in enumerate(federation.calibration.examples):
        z_f, z_l = (adapted(client_adapter(model, i), x).squeeze(1).detach() for model in models)
        expected.append(((z_l - y) @ (z_l - z_f) / (z_f - z_l).square().sum()).clamp(0, 1))
    expected = torch.stack(expected)
    assert ((expected > 0) & (expected < 1)).sum() == 2
    split = federation.calibration
    found = estimate_gauss_newton(adapted, federated, local, split).weight
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    parabola = estimate_curve(adapted, federated, local, split, parabola=True).weight
    torch.testing.assert_close(parabola, expected, rtol=1e-8, atol=0)
    assert estimate_calibrated(adapted, federated, local, split).client_weight.isfinite().all()


def test_rounds_and_tables_follow_the_task():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(rng.normal(size=(150, 5)), columns=list("abcde")).assign(where=np.repeat(["x", "y", "z"], 50))
    df["price"] = df.a - 2 * df.b
    federation = from_dataframe(df, client="where", label="price", calibration_size=5, real_targets=True)
    adapted = attach(Net(1), rank=2, targets=["fc1"], task="regression")
    before, _ = evaluate(adapted, repeat_adapter(adapted.initial, 3), federation.test)
    options = dict(rounds=20, local_steps=5, lr=2e-2, eval_split=federation.test)
    run = fedit(adapted, federation.train, **options)
    after, error = evaluate(adapted, repeat_adapter(run.adapter, 3), federation.test)
    assert (after < 0.7 * before).all()
    assert run.history.iloc[-3:].loss.to_numpy() == pytest.approx(after.numpy())
    x, y = federation.test.client(1)
    with torch.no_grad():
        z = adapted(run.adapter, x).squeeze(1)
    assert float(error[1]) == pytest.approx(float((z - y).abs().mean()), rel=1e-5)


def test_targets_of_another_kind_are_refused_with_the_way_out():
    adapted = attach(Net(3).double(), rank=2, targets=["fc1"])
    stack = repeat_adapter(adapted.initial, 3)
    with pytest.raises(ValueError, match="classification takes numbers of classes .see the task of attach"):
        train(adapted, stack, federation_of("regression").train, steps=1)
    adapted = attach(Net(1).double(), rank=2, targets=["fc1"], task="regression")
    stack = repeat_adapter(adapted.initial, 3)
    x = torch.zeros(3, 5, dtype=torch.float64)
    of_classes = from_tensors(
        [(x, torch.tensor([0, 1, 1]))] * 3, [(x, torch.tensor([0, 1, 1]))] * 3, calibration_size=1
    )
    with pytest.raises(ValueError, match="numbers of classes, regression takes real numbers: make them floats"):
        evaluate(adapted, stack, of_classes.test)
    with pytest.raises(ValueError, match="regression needs a target for each output"):
        evaluate(adapted, stack, federation_of("two numbers").test)
    with pytest.raises(ValueError, match="sample_labels draws classes: regression has none"):
        estimate_paper(adapted, stack, stack, federation_of("regression").calibration, sample_labels=0)
    with pytest.raises(ValueError, match="task must be one of classification, regression, multi-label, or a Task"):
        attach(Net(1), targets=["fc1"], task="ranking")
    mixed = [(x, torch.zeros(3).double()), (x, torch.tensor([0, 1, 1]))]
    with pytest.raises(ValueError, match="client 1 has targets of int64"):
        from_tensors(mixed, mixed, calibration_size=1)


def test_a_loss_of_ones_own_with_classes(adapted64, federation64, random_stack):
    smooth = Task(
        "smoothed classes",
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1, reduction="none"),
        CLASSIFICATION.metric,
        has_classes=True,
    )
    stack = random_stack(adapted64, 3, seed=1)
    adapted = replace(adapted64, task=smooth)
    loss, accuracy = evaluate(adapted, stack, federation64.train)
    for i, (x, y) in enumerate(federation64.train.examples):
        z = adapted64(client_adapter(stack, i), x)
        torch.testing.assert_close(loss[i], F.cross_entropy(z, y, label_smoothing=0.1), rtol=1e-9, atol=0)
    assert torch.equal(accuracy, evaluate(adapted64, stack, federation64.train)[1])
    assert REGRESSION.metric is not MULTI_LABEL.metric
