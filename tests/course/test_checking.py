"""What all checkers share: three states, copies of the inputs, common mistakes, and how far off an answer is."""

import importlib
import pkgutil
from inspect import isfunction, signature

import numpy as np
import pandas as pd
import pytest
import torch

from potara_lite.course import exercises
from potara_lite.course.exercises.checking import check, difference

INPUTS = [(torch.tensor([1.0, 2.0]), 3), (torch.tensor([0.5, -1.0]), 2)]
MISTAKES = {
    "that is the sum": lambda x, n: x + n,
    "that is the first entry": lambda x, n: x[0],
    "there is no third entry": lambda x, n: x[2],
}


def right(x, n):
    return n * x


def stop(x, n):
    raise NotImplementedError


@pytest.mark.parametrize("stub", [lambda x, n: ..., lambda x, n: None, stop])
def test_an_untouched_stub_is_not_attempted(stub):
    assert check(stub, right, INPUTS, MISTAKES) == "not attempted"


@pytest.mark.parametrize("answer", [right, lambda x, n: (n * x).tolist(), lambda x, n: (n * x).numpy().astype("f8")])
def test_a_right_answer_in_any_form_is_correct(answer):
    assert check(answer, right, INPUTS, MISTAKES) == "correct"


@pytest.mark.parametrize("hint", MISTAKES)
def test_a_mistake_is_recognised(hint):
    assert check(MISTAKES[hint], right, INPUTS, MISTAKES) == f"hint: {hint}"


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (
            lambda x, n: n * x + 0.5 * (n == 2),
            "right on one example of 2, not on f(tensor([ 0.5000, -1.0000]), 2): off by up to 0.5",
        ),
        (lambda x, n: x[:, None], "the answer has the shape (2,); yours has (2, 1)"),
        (lambda x, n: "six", "the answer is a tensor of shape (2,); yours is a str"),
        (lambda x, n: 1 / 0, "your function stopped with ZeroDivisionError: division by zero"),
        (lambda x, n: x * torch.nan, "off by up to inf: entry (0,) is 3, yours is nan"),
        (lambda x, n: None if n == 2 else n * x, "your function returns nothing here"),
    ],
)
def test_any_other_answer_gets_a_hint(wrong, hint):
    line = check(wrong, right, INPUTS, MISTAKES)
    assert line.startswith("hint: ") and hint in line


def test_an_accepted_answer_is_correct_with_a_remark():
    accepted = {"with a minus": lambda x, n: -n * x}
    assert check(accepted["with a minus"], right, INPUTS, accepted=accepted) == "correct (with a minus)"


def test_nobody_can_change_what_the_next_one_sees():
    def careless(x, n):
        return x.mul_(n)

    before = [x.clone() for x, _ in INPUTS]
    assert check(careless, right, INPUTS, MISTAKES) == "correct"
    for (x, _), old in zip(INPUTS, before):
        torch.testing.assert_close(x, old)


@pytest.mark.parametrize(
    "answer, wanted, text",
    [
        (1.0, torch.tensor(1.0), ""),
        (torch.tensor([1.0], requires_grad=True), 1.0, ""),
        ([1.0, 2.0], 1.0, "the answer is one number; yours has the shape (2,)"),
        (np.float64(2), 1.0, "the answer is 1, yours is 2"),
        ("a", 1.0, "the answer is a number; yours is a str"),
        (torch.tensor(True), True, ""),
        (False, True, "the answer is True, yours is False"),
        ({"a": 1, "b": 2}, {"a": 1}, "an entry that does not belong there: 'b'"),
        ({"a": 2}, {"a": 1}, "entry 'a': the answer is 1, yours is 2"),
        (3, {"a": 1}, "the answer is a dictionary; yours is a int"),
        ((1, 3), (1, 2), "part 1: the answer is 2, yours is 3"),
        (1, (1, 2), "the answer is 2 things, separated by commas; yours is a int"),
    ],
)
def test_differences_in_words(answer, wanted, text):
    assert difference(answer, wanted) == text


class Odd:
    """What nothing can be asked of."""

    __eq__ = __len__ = __iter__ = __float__ = __array__ = lambda *_: 1 / 0


MODULES = [
    importlib.import_module(f"{exercises.__name__}.{one.name}") for one in pkgutil.iter_modules(exercises.__path__)
]
CHECKERS = [
    one for module in MODULES for name, one in vars(module).items()
    if isfunction(one) and one.__module__ == module.__name__ and name.startswith("check_")
    and list(signature(one).parameters) == ["function"]  # those of open tasks look at results
]  # fmt: skip
GARBAGE = [
    None, True, -1, 2**70, 1e308, float("nan"), 1j, "x", b"x", (), [[1], [2, 3]], {}, {1: 2}, {"a": {"a": ()}}, set(),
    object(), Odd(), int, len, np.array(["a"]), np.array([1, None]), np.zeros(3), np.array([True, False]),
    pd.Series([1.0, 2.0]), pd.DataFrame({"a": [1, 2]}), torch.tensor([]), torch.ones(2, 3) > 0,
    torch.zeros(3, dtype=torch.cfloat),
    torch.ones(2, 3, device="meta"), torch.eye(2).to_sparse(), (torch.ones(2), "x"), (Odd(), Odd()), iter(()),
    ValueError("x"),
]  # fmt: skip


LISTED = [
    (getattr(module, f"check_{name.removesuffix('_MISTAKES').lower()}"), hint, mistake)
    for module in MODULES for name, mistakes in vars(module).items() if name.endswith("_MISTAKES")
    for hint, mistake in mistakes.items()
]  # fmt: skip


def stopped(error):
    def function(*_):
        raise error

    return function


def name_of(checker):
    return f"{checker.__module__.rpartition('.')[2]}-{checker.__name__}"


@pytest.mark.parametrize("checker", CHECKERS, ids=name_of)
def test_every_checker_knows_an_untouched_stub_and_a_crash(checker):
    for stub in (lambda *_: ..., lambda *_: None, stopped(NotImplementedError())):
        assert checker(stub) == "not attempted"
    assert checker(stopped(KeyError("x"))).startswith("hint: your function stopped with KeyError")


@pytest.mark.parametrize("checker, hint, mistake", LISTED, ids=[f"{name_of(one)}: {h[:40]}" for one, h, _ in LISTED])
def test_every_listed_mistake_gets_its_own_hint(checker, hint, mistake):
    assert checker(mistake) == f"hint: {hint}"


@pytest.mark.parametrize("checker", CHECKERS, ids=name_of)
def test_whatever_a_reader_writes_gets_one_line(checker):
    readers = [lambda *_, answer=answer: answer for answer in GARBAGE]
    readers += [
        lambda: 1,
        lambda *given: given,
        lambda *given: given[0],
        "no function",
        5,
        stopped(KeyError()),
        stopped(ValueError("a\nb")),
    ]
    for reader in readers:
        line = checker(reader)
        assert isinstance(line, str) and line.startswith(("hint: ", "not attempted", "correct")), line
    assert len(CHECKERS) > 20
