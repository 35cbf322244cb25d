"""What ``pip install`` of a wheel or of a source archive gives, used from an empty folder without the repository."""

import json
import os
import re
import sys
import tarfile
from zipfile import ZipFile

import pytest
from conftest import finished
from test_results import ROOT

pytest.importorskip("hatchling", reason="builds the package: the extra `test` has hatchling")
BUILD = [sys.executable, "-m", "hatchling", "build", "--directory"]


def content(wheel):
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source archive of the repository."""
    folder = tmp_path_factory.mktemp("built")
    finished([*BUILD, folder], cwd=ROOT)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Run Python with the wheel's files in an empty folder."""
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    with ZipFile(built[0]) as archive:
        archive.extractall(site)

    def run(*arguments, **options):
        done = finished([sys.executable, *arguments], cwd=empty, env=os.environ | {"PYTHONPATH": str(site)}, **options)
        assert not list(empty.iterdir())
        return done.stdout

    assert str(site) in run("-c", "import potara_lite; print(potara_lite.__file__)")
    return run


def test_the_wheel_has_code_data_types_and_licences(built):
    files = content(built[0])
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "potara_lite").rglob("*.py")}
    assert package | {"potara_lite/py.typed"} <= files.keys()
    (licence,) = [text for name, text in files.items() if name.endswith("licenses/LICENSE")]
    assert licence == (ROOT / "LICENSE").read_bytes()
    of_data = files["potara_lite/_data/README.md"].decode()
    for notice in ("Copyright © 2017 Zalando SE", "WordNet 3.0 Copyright 2006 by Princeton University"):
        assert notice in of_data
    assert of_data.count("WITHOUT WARRANTY OF ANY KIND") == 1  # the MIT licence asks for its whole text
    assert not [name for name in files if "__pycache__" in name]
    assert built[0].stat().st_size < 16 * 2**20  # of which the images are 11.2 MB, compressed as they are


def test_every_table_that_a_notebook_reads_is_in_the_wheel(built):
    notebooks = [json.loads(path.read_text()) for path in (ROOT / "notebooks").rglob("*.ipynb")]
    sources = "\n".join("".join(cell["source"]) for notebook in notebooks for cell in notebook["cells"])
    named = set(re.findall(r'committed_rows\("([^"]+)"\)', sources))
    assert len(named) >= 4
    assert {f"potara_lite/_data/{name}" for name in named} <= content(built[0]).keys()


def test_the_source_archive_gives_the_same_wheel(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path)
    (source,) = tmp_path.iterdir()
    assert (source / "tests").is_dir() and (source / "notebooks").is_dir()
    finished([*BUILD, tmp_path / "again", "--target", "wheel"], cwd=source)
    assert content(next((tmp_path / "again").glob("*.whl"))) == content(built[0])


def test_the_command_runs_from_an_empty_folder(installed):
    assert "--clients" in installed("-m", "potara_lite", "--help")
    lines = installed("-m", "potara_lite", "--check").splitlines()
    assert any("the images are there and undamaged" in line for line in lines), lines


def test_the_data_are_read_from_an_empty_folder(installed):
    code = """
from potara_lite import fashion_mnist, lab_vit
from potara_lite.federation.tasks import read_glosses
from potara_lite.results import committed_rows
lab_vit()
print(fashion_mnist(clients=2, train_size=20, test_size=20).train.sizes.tolist())
print(len(read_glosses()[1]), "seed" in committed_rows("suite.csv.gz"))
"""
    assert installed("-c", code).splitlines() == ["[20, 20]", "81383 True"]
