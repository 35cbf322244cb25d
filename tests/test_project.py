"""The project's own files agree with each other."""

import ast
import hashlib
import importlib
import json
import re
import subprocess
import sys
from inspect import isclass, isfunction
from pathlib import Path

import pytest
import yaml
from conftest import finished

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
    for path in [path for kind in ("npz", "safetensors", "xz") for path in ROOT.glob(f"data/*.{kind}")]:
        digest, name = path.with_suffix(".sha256").read_text().split()
        assert name == path.name and hashlib.sha256(path.read_bytes()).hexdigest() == digest
        assert {f"data/{path.name}", f"data/{path.stem}.sha256"} <= shipped.keys()


PACKAGE = Path(potara_lite.__file__).parent
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def module_name(file):
    return "potara_lite." + file.removesuffix(".py").replace("/", ".")


@pytest.mark.parametrize("file", [file for file in FILES if file != "__main__.py"])
def test_everything_public_says_what_it_is(file):
    if file.startswith("deployment/"):
        pytest.importorskip("flwr", reason="needs the extra `flower`")
    module = importlib.import_module(module_name(file))
    assert module.__doc__
    for name, found in vars(module).items():
        ours = (isfunction(found) or isclass(found)) and found.__module__ == module.__name__
        if ours and not name.startswith("_") and file != "potara.py":  # which explains itself line by line
            assert found.__doc__, name


def test_the_public_names_are_there_and_imported_when_used():
    assert len(potara_lite.__all__) == len(set(potara_lite.__all__))
    for name in potara_lite.__all__:
        assert getattr(potara_lite, name) is not None and name in dir(potara_lite)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(potara_lite, "nothing")  # noqa: B009
    heavy = ("torch", "peft", "pandas", "matplotlib", "scipy", "torchvision")
    check = f"import sys, potara_lite; print([name for name in {heavy} if name in sys.modules])"
    done = finished([sys.executable, "-c", check])
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("is_on", [True, False])
def test_the_garbage_collector_is_after_an_import_as_it_was(is_on):
    use = "potara_lite.train; getattr(potara_lite, 'nothing', None)"
    code = f"import gc, potara_lite; gc.{'enable' if is_on else 'disable'}(); {use}; print(gc.isenabled())"
    assert finished([sys.executable, "-c", code]).stdout == f"{is_on}\n"


LAYERS = (  # a module or folder of the package imports only from those before it; potara.py stands apart
    "compat checks setting files federation models adapters training merging estimators experiment results plots "
    "baselines deployment course __main__"
).split()


def imports(path):
    """The modules and folders of the package's root that a file imports, wherever in it."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = [*here[: len(here) - node.level], *(node.module.split(".") if node.module else [])]
            yield from [target[0]] if target else [name.name for name in node.names]


def arrows():
    """Who imports whom among the modules and folders of the package's root."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        source = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if source != "__init__":
            found |= {(source, target) for target in imports(path) if target != source}
    return {(source, target) for source, target in found if (PACKAGE / target).exists() or target in LAYERS}


def test_imports_go_one_way():
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix in (".py", "") and "__" not in path.stem}
    assert entries | {"__main__"} == {*LAYERS, "potara", *(entries & {"_data"})}
    depth = {name: number for number, name in enumerate(LAYERS)}
    for source, target in arrows():
        assert source == "potara" or depth[target] < depth[source], (source, target)
    assert {target for source, target in arrows() if source == "potara"} == {"federation", "models"}
    assert ("estimators", "merging") in arrows() and len(arrows()) > 40  # the counting counts


def test_the_tree_is_small_enough_to_draw():
    entries = [path for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "_data")]
    assert len(entries) <= 20
    of_benchmarks = {
        name
        for path in (ROOT / "benchmarks").glob("*.py")
        for name in re.findall(r"^from potara_lite\.(\w+)", path.read_text(), re.M)
    }
    assert len(arrows()) + len(of_benchmarks) <= 95


def test_the_docstring_and_the_architecture_page_name_every_part():
    page = (ROOT / "docs" / "architecture.md").read_text()
    picture = re.findall(r'"name" x="\d+" y="(\d+)">([\w.]+)', (ROOT / "docs" / "architecture.svg").read_text())
    height = {name.removesuffix(".py"): int(y) for y, name in picture}
    assert height.keys() == {*LAYERS, "potara"}
    for source, target in arrows():
        assert source == "potara" or height[target] >= height[source], (source, target)
    for name in [*LAYERS, "potara"]:
        shown = f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"
        assert shown in potara_lite.__doc__ and shown in page, shown


def test_private_names_of_other_libraries_are_in_one_file():
    others = r"(torch|peft|transformers)\b[\w.]*\._[a-z]\w*|\._(forward_hooks|forward_pre_hooks)\b"
    for path in PACKAGE.rglob("*.py"):
        found = re.search(others, path.read_text())
        assert path.name == "compat.py" or not found, (path.name, found)


def test_the_command_answers_at_once():
    """Torch and the rest take seconds to import; help, version and bad options do not wait for them."""
    for arguments, code in ((["--help"], 0), (["--version"], 0), (["--clients", "0"], 2), (["--device", "warp"], 2)):
        command = [sys.executable, "-X", "importtime", "-m", "potara_lite", *arguments]
        done = finished(command, check=False)
        assert done.returncode == code and not re.search(r"\| +(torch|pandas|numpy|matplotlib)\n", done.stderr)


def test_the_measured_start_is_short():
    found = json.loads((ROOT / "benchmarks" / "startup.json").read_text())["seconds"]
    assert max(found[name] for name in ("--help", "--version", "a bad option")) < 0.7


KNOWN = (  # the addresses that exist and may be named
    r"https://arxiv\.org/abs/\d{4}\.\d{5}",
    r"https://github\.com/(astral-sh/ruff-pre-commit|pre-commit/pre-commit-hooks|zalandoresearch/fashion-mnist)",
    r"https://github\.com/huggingface/peft/(issues|pull)/\d+",
    r"https://semver\.org",
    r"http://127\.0\.0\.1.*",
    r"http://www\.w3\.org/2000/svg",  # the name of a format
)


def test_no_address_is_invented():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    texts = [
        ROOT / name for name in listed if name.endswith((".md", ".py", ".toml", ".yml", ".yaml", ".cff", ".ipynb"))
    ]
    assert len(texts) > 50 or not listed  # a source archive has no git
    for path in texts:
        text = path.read_text() if path != Path(__file__) else ""
        if path.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        for address in re.findall(r"https?://[\w./%?=&-]+", text):
            assert any(re.fullmatch(known, address.rstrip(".")) for known in KNOWN), (path.name, address)


def test_the_measured_engine_gains_with_clients_and_small_batches():
    def rows(name):
        return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())["rows"]

    loops = {
        (row["clients"], row["batch_size"]): row["ratio to engine"]["sequential"]["median"]
        for row in rows("engine")
        if row["what"] == "training" and (row["rank"], row["depth"]) == (4, 4)
    }
    assert all(loops[1, batch] > 1 for batch in (4, 8, 32))
    for batch in (4, 8, 32):
        assert loops[1, batch] < loops[8, batch] < min(loops[32, batch], loops[128, batch])
    for clients in (8, 32, 128):
        assert loops[clients, 4] > loops[clients, 8] > loops[clients, 32]
    compiled = {row["clients"]: row["ratio to engine"]["compiled"]["median"] for row in rows("engine_compile")}
    assert list(compiled) == [1, 8, 32, 128] and compiled.pop(1) < 0.8 and min(compiled.values()) > 0.9
    starts = [row["start-up"] for row in rows("engine_compile")]
    assert starts[0] == max(starts)
    flower = rows("engine_flower")[0]["ratio to engine"]
    assert 1 < flower["flower, kept"]["median"] < flower["flower"]["median"]
