"""The project's own files agree with each other."""

import hashlib
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
import yaml

import potara_lite

ROOT = Path(__file__).parent.parent
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

CONDA_NAMES = {"torch": {"pytorch"}, "matplotlib": {"matplotlib", "matplotlib-base"}}


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def split_requirement(text):
    """``torch>=2.11`` as ``("torch", ">=2.11")``."""
    name, constraint = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(.*)", text.strip()).groups()
    return name.lower().replace("_", "-"), constraint.replace(" ", "")


def environment():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    plain = dict(split_requirement(entry) for entry in listed if isinstance(entry, str))
    from_pip = [line for entry in listed if isinstance(entry, dict) for line in entry["pip"]]
    return plain, from_pip


def test_environment_and_pyproject_ask_for_the_same():
    conda, from_pip = environment()
    project = pyproject()["project"]
    assert conda.pop("python") == project["requires-python"].replace(" ", "")
    if from_pip:
        conda.pop("pip")
    for requirement in project["dependencies"]:
        name, constraint = split_requirement(requirement)
        found = CONDA_NAMES.get(name, {name}) & conda.keys()
        assert len(found) == 1, f"environment.yml lacks {name}"
        assert conda.pop(found.pop()) == constraint, f"{name}: environment.yml and pyproject.toml differ"
    extras = project["optional-dependencies"]
    known = dict(split_requirement(line) for lines in extras.values() for line in lines)
    for name, constraint in conda.items():
        assert known.get(name) == constraint, f"environment.yml asks for {name}{constraint}, pyproject.toml does not"
    for line in from_pip:
        local = re.fullmatch(r"(?:-e )?\.(?:\[([\w,-]+)\])?", line)
        if local:
            assert set((local[1] or "").split(",")) - {""} <= extras.keys()
        else:
            name, constraint = split_requirement(line)
            assert known.get(name) == constraint, f"environment.yml takes {line} from pip, pyproject.toml does not"


@pytest.mark.parametrize(
    "text, parts",
    [("torch>=2.11", ("torch", ">=2.11")), ("numpy", ("numpy", "")), ("flwr[simulation] >= 1", ("flwr", ">=1"))],
)
def test_requirements_are_split_as_meant(text, parts):
    assert split_requirement(text) == parts


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert potara_lite.__version__ == pyproject()["project"]["version"] == str(citation["version"])
    assert f"{potara_lite.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert any("2602.18658" in str(reference) for reference in citation["references"])


def test_the_data_fit_the_budget():
    files = [path for path in (ROOT / "data").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    assert (ROOT / "data" / "lab_vit.safetensors").stat().st_size <= 4 * 2**20


def test_every_shipped_data_file_has_a_right_checksum_and_goes_into_the_wheel():
    shipped = pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert all((ROOT / source).is_file() for source in shipped)
    for path in [*ROOT.glob("data/*.npz"), *ROOT.glob("data/*.safetensors")]:
        digest, name = path.with_suffix(".sha256").read_text().split()
        assert name == path.name and hashlib.sha256(path.read_bytes()).hexdigest() == digest
        assert {f"data/{path.name}", f"data/{path.stem}.sha256"} <= shipped.keys()


def test_everything_public_exists():
    names = [name for _, name, _ in pkgutil.iter_modules(potara_lite.__path__) if not name.startswith("_")]
    assert {"adapters", "algorithms", "estimators", "rounds"} <= set(names)
    for module in (importlib.import_module(f"potara_lite.{name}") for name in names):
        assert module.__doc__ and all(hasattr(module, name) for name in module.__all__)
        assert all(getattr(module, name).__doc__ for name in module.__all__ if callable(getattr(module, name)))


def test_the_engines_table_is_that_of_the_committed_figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import workload

    table = workload.table()
    assert f"<!-- engine -->\n{table}\n<!-- /engine -->" in (ROOT / "benchmarks" / "README.md").read_text()


def test_what_is_said_of_the_engine_holds_of_the_committed_figures():
    rows = json.loads((ROOT / "benchmarks" / "engine.json").read_text())["rows"]
    loops = {
        (row["clients"], row["batch_size"]): row["ratio to engine"]["sequential"]["median"]
        for row in rows
        if row["what"] == "training"
    }
    assert all(loops[1, batch] < 1 for batch in (4, 8, 32))
    for batch in (4, 8, 32):
        assert loops[1, batch] < loops[8, batch] < loops[32, batch] < loops[128, batch]
    for clients in (8, 32, 128):
        assert loops[clients, 4] > loops[clients, 8] > loops[clients, 32]
    rows = json.loads((ROOT / "benchmarks" / "engine_compile.json").read_text())["rows"]
    ratios, starts, pays = zip(
        *((r["ratio to engine"]["compiled"]["median"], r["start-up"], round(r["pays after"], -2)) for r in rows)
    )
    page = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    assert [r["clients"] for r in rows] == [1, 8, 32, 128] and list(ratios) == sorted(ratios)
    assert f"takes {min(ratios):.2f} to {max(ratios):.2f} of the engine's seconds for a step" in page
    assert f"compiling takes {min(starts):.0f} to {max(starts):.0f} seconds" in page
    assert starts[0] == max(starts) and "the longest for the first program of a run, which pays" in page
    assert f"after {pays[-1]:.0f} steps of 128 clients and {pays[0]:,.0f} of one" in page
    flower = json.loads((ROOT / "benchmarks" / "engine_flower.json").read_text())["rows"][0]["ratio to engine"]
    assert 1 < flower["flower, kept"]["median"] < flower["flower"]["median"]
