"""How the outputs of notebooks are compared: every printed text and table with the committed one, numbers as numbers.

``python -m pytest`` executes the notebooks and compares all of their cells. Two outputs are the same if their words are
the same, whatever the spaces; whole numbers, too; and every number with a decimal point within two units of its last
committed digit or 2 %, whichever is more, because training rounds differently on other machines. The output of a cell
with ``# NBVAL_CHECK_OUTPUT`` must be the same to the letter. Seconds are not compared: their cells have the tag
``nbval-ignore-output``. The text of a figure, which no reader sees, is what it draws (``notebook_figures.py``).
"""

import os
import re
from pathlib import Path

NUMBER = re.compile(r"(?<![\w.])[-−+]?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.]*\w)")


def tolerance(number):
    """How far from a committed number, such as ``0.69``, one may be: 0 for a whole number."""
    mantissa, _, exponent = number.lower().partition("e")
    if "." not in mantissa:
        return 0.0
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return max(2 * unit, 0.02 * abs(value(number)))


def value(number):
    return float(number.replace("−", "-").replace(",", ""))


def same(committed, found):
    """Whether a text is the committed one, its numbers within their tolerance."""
    if " ".join(NUMBER.sub("0", committed).split()) != " ".join(NUMBER.sub("0", found).split()):
        return False
    pairs = zip(NUMBER.findall(committed), NUMBER.findall(found))
    return all(abs(value(one) - value(other)) <= 1.0001 * tolerance(one) for one, other in pairs)


class Output(str):
    """A printed text that equals another one if it is the ``same``."""

    def __eq__(self, other):
        return same(self, other)

    def __ne__(self, other):
        return not same(self, other)

    __hash__ = str.__hash__


def readable(text):
    """What is compared of an explorer's page: its line of text, not its pictures; of any other output, all."""
    line = re.search(r'<div class="potara-explorer">.*?<p[^>]*>(.*?)</p>', text, re.S)
    return line[1] if line else text


def compare_with_tolerance():
    """Make nbval compare so, in this run of pytest, and its kernels say what their figures draw."""
    from nbval.plugin import IPyNbCell

    os.environ["PYTHONSTARTUP"] = str(Path(__file__).with_name("notebook_startup.py"))

    def compared(cell, text):
        exact = not isinstance(text, str) or "# NBVAL_CHECK_OUTPUT" in cell.cell.source
        return text if exact else Output(readable(text))

    compare_outputs = IPyNbCell.compare_outputs

    def without_silenced(cell, test, *others):
        if cell.cell.source.rstrip().endswith(";"):  # nbval's kernel shows what a semicolon silences
            test = [output for output in test if output["output_type"] != "execute_result"]
        return compare_outputs(cell, test, *others)

    IPyNbCell.sanitize = compared  # what nbval calls on both texts before it compares them
    IPyNbCell.compare_outputs = without_silenced
