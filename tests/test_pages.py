"""The pages: every figure and table in them is computed from the committed rows."""

import pytest
from test_results import ROOT, script

from potara_lite.baselines.methods import METHODS

figures, pages = script("figures"), script("pages")


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
