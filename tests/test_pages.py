"""The pages: every figure and table in them is computed from the committed rows, and their code runs."""

import ast
import re

import pytest
from test_results import ROOT, script

import potara_lite
from potara_lite import plots
from potara_lite.baselines.methods import METHODS

figures, pages, jobs = script("figures"), script("pages"), script("jobs")


def test_the_pages_say_what_the_rows_say(tmp_path):
    figures.write(tmp_path)
    for name in figures.PAGES:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name}: python benchmarks/figures.py"


def test_every_page_with_figures_is_written():
    found = [path for folder in (".", "docs", "benchmarks", "data") for path in (ROOT / folder).glob("*.md")]
    marked = {str(path.relative_to(ROOT)) for path in found if pages.marks(path.read_text())}
    assert marked == set(figures.PAGES)


def test_figures_and_blocks_are_filled_by_their_names():
    page = "It is <!-- =regret -->?<!-- / --> nats, <!-- =regret -->?<!-- / -->.\n\n<!-- table -->\n<!-- /table -->\n"
    filled = pages.fill(page, {"regret": "0.04 ± 0.01", "table": "| a |"})
    assert filled == page.replace("?", "0.04 ± 0.01").replace("-->\n<!-- /", "-->\n| a |\n<!-- /")
    assert pages.fill(filled, {"regret": "?", "table": ""}).count("?") == 2


def test_the_comparison_says_of_every_method_where_it_is_from():
    page = (ROOT / "docs" / "comparison.md").read_text()
    table = page.split("| row | source |")[1].split("\n\n")[0]
    named = {name for line in table.splitlines()[2:] for name in line.split("|")[1].strip().split("; ")}
    families = {"*method*, fine-tuned": ", fine-tuned", "*merge*, local from federated": ", local from federated"}
    of_family = {name for name in METHODS if name.endswith(tuple(families.values()))}
    assert named == set(METHODS) - of_family | families.keys()


@pytest.mark.parametrize(
    "page, texts, said",
    [
        ("a <!-- =one -->?<!-- / -->", {}, "not in both: ['one']"),
        ("<!-- one -->\n<!-- /one -->", {}, "not in both: ['one']"),
        ("a", {"one": "1"}, "not in both: ['one']"),
        ("a\n<!-- =one -->?<!-- / -->", {"one": "1"}, "a line begins with a figure"),
    ],
)
def test_a_figure_that_would_not_be_shown_is_an_error(page, texts, said):
    with pytest.raises(ValueError) as error:
        pages.fill(page, texts)
    assert said in str(error.value)


RUN = [f"docs/{name}.md" for name in ("data", "gallery", "how_do_i", "jobs", "names", "projects")]  # whose code is run
BLOCK = re.compile(r"^(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)^```$", re.M | re.S)


def run_code(source, names):
    """Run a block of a page. The comment behind a line that is one expression is what it has to show."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        found = re.search(r"  # (.+)$", lines[node.end_lineno - 1])
        if isinstance(node, ast.Expr) and found:
            shown = repr(eval(compile(ast.Expression(node.value), source, "eval"), names))
            assert shown == found[1], f"{ast.unparse(node)} shows {shown}, the page says {found[1]}"
        else:
            exec(compile(ast.Module([node], []), source, "exec"), names)


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / page).read_text())
    names, missing = {}, set()
    assert len(blocks) >= 4
    for needed, source in blocks:
        try:
            needed and __import__(needed)
            run_code(source, names)
        except ModuleNotFoundError as error:
            missing.add(error.name)
            assert needed == error.name
    if missing:
        pytest.skip(f"run without the blocks that need {missing}")


def test_the_commonest_jobs_are_short():
    page = (ROOT / "docs" / "how_do_i.md").read_text()
    assert len(re.findall(r"^### … .*\?$", page, re.M)) >= 20
    assert all(source.count("\n") <= 12 for _, source in BLOCK.findall(page))


def test_every_public_name_is_at_work_on_a_page():
    page = (ROOT / "docs" / "names.md").read_text()
    assert [name for name in potara_lite.__all__ if not re.search(rf"\bpl\.{name}\b", page)] == []


def test_the_gallery_shows_every_figure():
    page = (ROOT / "docs" / "gallery.md").read_text()
    for name in plots.__all__:
        assert f"plots.{name}" in page, name
    assert all((ROOT / "docs" / picture).is_file() for picture in re.findall(r"\]\((gallery/\S+)\)", page))


def test_each_of_the_ten_jobs_is_counted_here_and_in_every_other_tool():
    found = jobs.jobs((ROOT / "docs" / "jobs.md").read_text())
    tried, others = figures.rows_of("jobs"), figures.rows_of("other_tools")
    assert list(found.index) == list(tried.job) == list(range(1, 11))
    assert found.lines.between(1, 15).all() and tried.minutes.between(1, 30).all()
    assert sorted(zip(others.job, others.tool)) == sorted((job, tool) for job in found.index for tool in jobs.TOOLS)
    is_number = others.lines.str.fullmatch(r"\d+")
    assert (is_number | others.lines.isin(["–", "not found"])).all()
    assert (others.covers.isin(["whole", "part"]) == is_number).all()
    assert others[is_number].source.str.fullmatch(r".+ \([0-9a-f]{7}\)").all()


@pytest.mark.parametrize(
    "source, lines",
    [
        ("import os\nfrom a import b", 0),
        ("f(1); f(2)", 2),
        ("x = f(\n    1,\n    2,\n)", 1),
        ('def f(x):\n    """Text."""\n    return x', 2),
        ("f(1)  # 1\nf(2)", 1),
        ("if x:\n    y = 1  # a remark\nelse:\n    y = 2", 3),
    ],
)
def test_lines_are_statements(source, lines):
    assert jobs.lines_of(source) == lines
    page = f"## 1. One\n\n```python\n{source}\n```\n\n```python\n# check\nf(3)\n```\n\n## Two\n\n```python\nf(4)\n```\n"
    assert jobs.jobs(page).lines.tolist() == [lines]


def test_the_code_of_a_page_is_held_to_what_it_shows():
    names = {}
    run_code("x = 2  # a number\nx + 1  # 3", names)
    assert names["x"] == 2
    with pytest.raises(AssertionError, match=r"x \+ 1 shows 3, the page says 4"):
        run_code("x + 1  # 4", names)
