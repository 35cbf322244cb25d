"""How printed outputs of notebooks are compared: see ``notebooks/conftest.py``."""

import importlib.util

import pytest
from test_results import ROOT


@pytest.fixture(scope="module")
def printed():
    path = ROOT / "notebooks" / "conftest.py"
    spec = importlib.util.spec_from_file_location("of_notebooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Printed


@pytest.mark.parametrize(
    "one, other",
    [
        ("loss 0.57", "loss 0.58"),
        ("loss 0.570 and 12 MB", "loss  0.571 and 12 MB"),
        ("-0.05", "-0.06"),
        ("1.25e-07", "1.26e-07"),
        ("λ = 0.50", "λ = 0.50"),
        ("<Model at 0x7fc79b0fd0e0>", "<Model at 0x7f56558815d0>"),
        ("1234.0 ms", "1235.0 ms"),
    ],
)
def test_rounding_is_no_difference(printed, one, other):
    assert printed(one) == other and not printed(one) != other


@pytest.mark.parametrize(
    "one, other",
    [
        ("loss 0.57", "loss 0.60"),
        ("loss 0.57", "accuracy 0.57"),
        ("8 clients", "9 clients"),
        ("0.53 0.84", "0.53"),
        ("potara-calibrated 0.53", "potara-calibrated 0.69"),
        ("[1.0, nan]", "[1.0, 2.0]"),
        ("3e-07", "3e-05"),
        ("-0.5", "0.5"),
    ],
)
def test_other_numbers_and_other_words_are_differences(printed, one, other):
    assert printed(one) != other and not printed(one) == other
