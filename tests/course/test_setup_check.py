"""What a student is told before the lesson."""

from importlib.metadata import PackageNotFoundError

import pytest

from potara_lite.__main__ import main
from potara_lite.course import setup_check


def test_a_machine_that_has_everything_is_told_so(capsys):
    assert main(["--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    for word in ("Python", "torch", "peft", "GB of memory", "Fashion-MNIST", "a training step of 8 clients takes"):
        assert any(word in line for line in lines), word


@pytest.mark.parametrize(
    "versions, said",
    [
        ({"torch": "1.0"}, "torch 1.0 is too old: pip install -U 'torch>="),
        ({"peft": None}, "peft is missing: pip install"),
    ],
)
def test_what_is_missing_or_old_is_named_with_the_way_out(monkeypatch, capsys, versions, said):
    real = setup_check.version

    def version(name):
        if name not in versions:
            return real(name)
        if versions[name] is None:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(setup_check, "version", version)
    assert main(["--check"]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISSING")]
    assert len(wrong) == 1 and said in wrong[0]


def test_a_check_that_fails_is_a_line_and_not_a_traceback(monkeypatch, capsys):
    def broken(**options):
        raise OSError("fashion_mnist.npz is missing")

    monkeypatch.setattr("potara_lite.federation.sources.fashion_mnist", broken)
    assert main(["--check"]) == 1
    assert "MISSING data: fashion_mnist.npz is missing" in capsys.readouterr().out
