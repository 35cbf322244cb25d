"""The quiz: every question has one right option, and no letter and no length gives it away."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "quiz.md").read_text()
OPTION = re.compile(r"<details><summary>\(([abc])\) (.+?)</summary>\n\n(.+?)\n\n</details>", re.S)
QUESTIONS = {
    number: body for number, body in re.findall(r"^\*\*(\d+)\.\*\* (.+?)(?=^\*\*\d|^## |\Z)", TEXT, re.M | re.S)
}


def right_option(body):
    (right,) = [option for option in OPTION.findall(body) if option[2].startswith("Right. ")]
    return right


def test_there_are_twenty_questions_over_all_notebooks():
    assert list(QUESTIONS) == [str(number) for number in range(1, 21)]
    linked = set(re.findall(r"\(\.\./notebooks/(\w+)\.ipynb\)", TEXT))
    assert linked == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


@pytest.mark.parametrize("body", QUESTIONS.values(), ids=QUESTIONS)
def test_one_of_three_options_is_right(body):
    options = OPTION.findall(body)
    assert [letter for letter, _, _ in options] == ["a", "b", "c"]
    assert sorted(reasoning.split()[0] for _, _, reasoning in options) == ["Not", "Not", "Right."]
    assert all(reasoning.startswith(("Right. ", "Not quite. ")) for _, _, reasoning in options)


def test_neither_letter_nor_length_tells_the_right_option():
    letters = Counter(right_option(body)[0] for body in QUESTIONS.values())
    assert all(len(QUESTIONS) / 4 <= letters[letter] <= len(QUESTIONS) / 2 for letter in "abc")
    longest = sum(max(OPTION.findall(body), key=lambda option: len(option[1]))[0] == right_option(body)[0]
                  for body in QUESTIONS.values())  # fmt: skip
    assert len(QUESTIONS) / 5 <= longest <= len(QUESTIONS) / 2
