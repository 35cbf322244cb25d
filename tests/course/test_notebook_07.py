"""Notebook 07: its checkers know solutions and mistakes."""

import pytest
import torch

from potara_lite import estimate_curve, evaluate, merge_exact
from potara_lite.course.exercises.language import (
    check_best_option,
    check_mean_pool,
    check_next_tokens,
    check_overconfidence,
    check_report,
)


def pooled(hidden, mask):
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def surer(logits, y):
    return logits.softmax(1).max(1).values.mean() - (logits.argmax(1) == y).float().mean()


def shifted(ids, is_answer):
    targets = torch.full_like(ids, -100)
    targets[:, :-1][is_answer[:, 1:]] = ids[:, 1:][is_answer[:, 1:]]
    return targets


def per_token(total, tokens):
    return int((total / tokens).argmax())


RIGHT = [
    (check_mean_pool, pooled),
    (check_overconfidence, surer),
    (check_next_tokens, shifted),
    (check_best_option, per_token),
]


def unshifted(ids, is_answer):
    return torch.where(is_answer, ids, -100)


WRONG = [
    (check_mean_pool, lambda hidden, mask: hidden.mean(1), "padding counts"),
    (check_mean_pool, lambda hidden, mask: (hidden * mask[..., None]).mean(1), "padding still counts"),
    (check_mean_pool, lambda hidden, mask: hidden.sum(1) / mask.sum(1)[:, None], "padding is still in the sum"),
    (check_mean_pool, lambda hidden, mask: (hidden * mask[..., None]).sum(1), "that is the sum"),
    (check_mean_pool, lambda hidden, mask: hidden[:, 0], "the first token"),
    (
        check_mean_pool,
        lambda hidden, mask: hidden[mask.bool()].sum() * 0 + pooled(hidden, mask)[:, :1],
        "has the shape",
    ),
    (check_mean_pool, lambda hidden, mask: (hidden * mask[..., None]).sum(1) / mask.sum(), "the whole batch"),
    (check_overconfidence, lambda logits, y: (logits.argmax(1) == y).float().mean(), "that is the accuracy"),
    (check_overconfidence, lambda logits, y: logits.softmax(1).amax(1).mean(), "that is the confidence"),
    (check_overconfidence, lambda logits, y: -surer(logits, y), "change the sign"),
    (
        check_overconfidence,
        lambda logits, y: logits.amax(1).mean() - (logits.argmax(1) == y).float().mean(),
        "softmax f",
    ),
    (
        check_overconfidence,
        lambda logits, y: logits.softmax(1).gather(1, y[:, None]).mean() - (logits.argmax(1) == y).float().mean(),
        "probability of the right class",
    ),
    (
        check_overconfidence,
        lambda logits, y: logits.softmax(0).amax(1).mean() - (logits.argmax(1) == y).float().mean(),
        "over the classes (dim 1)",
    ),
    (check_next_tokens, unshifted, "the target of itself"),
    (check_next_tokens, lambda ids, a: unshifted(ids, a).roll(-1, 1), "roll moves"),
    (
        check_next_tokens,
        lambda ids, a: torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1),
        "prompt is learned",
    ),
    (check_next_tokens, lambda ids, a: unshifted(ids, a)[:, 1:], "as many targets as tokens"),
    (
        check_next_tokens,
        lambda ids, a: torch.cat([torch.full_like(ids[:, :1], -100), unshifted(ids, a)[:, :-1]], 1),
        "the token before",
    ),
    (
        check_next_tokens,
        lambda ids, a: unshifted(torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1), a),
        "whether the next token",
    ),
    (check_best_option, lambda total, tokens: total.argmax(), "divide by the number of tokens"),
    (check_best_option, lambda total, tokens: (total / tokens).argmin(), "least likely"),
    (check_best_option, lambda total, tokens: tokens.argmax(), "the longest"),
    (check_best_option, lambda total, tokens: (total * tokens).argmax(), "do not multiply"),
    (check_best_option, lambda total, tokens: (total / tokens).max(), "the score itself"),
    (check_best_option, lambda total, tokens: (total.exp() / tokens).argmax(), "the probability of the answer"),
]


@pytest.mark.parametrize("check, right", RIGHT)
def test_a_solution_is_correct(check, right):
    assert check(right) == "correct"


@pytest.mark.parametrize("check, wrong, hint", WRONG)
def test_a_wrong_answer_gets_a_hint(check, wrong, hint):
    line = check(wrong)
    assert line.startswith("hint: ") and hint in line


def report_with(choose, gain):
    """A report as a reader would write it: ``choose`` λ from a split, ``gain`` from the losses of the three models."""

    def report(adapted, first, second, federation):
        weight = choose(adapted, first, second, federation)
        models = first, second, merge_exact(first, second, weight)
        return weight, gain(*(evaluate(adapted, model, federation.test)[0] for model in models))

    return report


def from_calibration(adapted, first, second, federation):
    return estimate_curve(adapted, first, second, federation.calibration).weight


def from_test(adapted, first, second, federation):
    return estimate_curve(adapted, first, second, federation.test).weight


def fixed(adapted, first, second, federation):
    return torch.full((len(federation),), 0.7)


def over_the_better(first, second, merged):
    return torch.minimum(first, second) - merged


@pytest.mark.parametrize(
    "report, line",
    [
        (lambda *given: ..., "not attempted"),
        (report_with(from_calibration, over_the_better), "correct"),
        (report_with(from_test, over_the_better), "changes with the labels of the test examples"),
        (report_with(fixed, over_the_better), "λ must become 1 - λ"),
        (report_with(from_calibration, lambda first, second, merged: first - merged), "the gain must stay"),
        (report_with(from_calibration, lambda first, second, merged: -merged), "its gain is 0"),
        (report_with(from_calibration, lambda first, second, merged: merged.mean()), "one number for each of the 3"),
        (lambda *given: (torch.full((3,), 1.5), torch.zeros(3)), "λ must be in [0, 1]"),
    ],
)  # fmt: skip
def test_the_open_task_is_checked_by_properties(report, line, adapted, federation, random_stack):
    first, second = (random_stack(adapted, 3, seed) for seed in (0, 1))
    assert line in check_report(report, adapted, first, second, federation)
