"""Every printed output of every notebook is compared with what today's code prints: numbers as numbers, words as words.

Two numbers agree within 2 units of the last digit that is printed, or 0.1 %. Pictures are not compared here; neither
are cells tagged ``nbval-ignore-output``, which print times or versions.
"""

import re
from itertools import zip_longest

from nbval.plugin import IPyNbCell

NUMBER = re.compile(r"(?<![\w.])[-−+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")
NOT_COMPARED = re.compile(r"0x[0-9a-f]{6,}|#?T_[0-9a-f]{5}\w*|model_id\S*|<img[^>]*>|\x1b\[[0-9;]*m")


class Printed(str):
    """What a cell printed; equal to what differs from it in rounding only."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return False
        return self._words() == Printed(other)._words() and all(
            one is not None and two is not None and agree(one, two)
            for one, two in zip_longest(NUMBER.findall(self), NUMBER.findall(other))
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def _words(self) -> list[str]:
        return NUMBER.sub("#", NOT_COMPARED.sub("", self)).split()


def agree(one: str, two: str) -> bool:
    """Whether two printed numbers are the same but for rounding."""
    a, b = (float(text.replace("−", "-")) for text in (one, two))
    last_digit = max(_unit(one), _unit(two))
    return abs(a - b) <= max(2.0001 * last_digit if "." in one + two else 0.0, 1e-3 * max(abs(a), abs(b)))


def _unit(number: str) -> float:
    """What the last digit of a printed number is worth."""
    digits, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


def sanitize(self: IPyNbCell, text: object) -> object:
    return Printed(text) if isinstance(text, str) else text


IPyNbCell.sanitize = sanitize
