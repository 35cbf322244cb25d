"""The HTML book builds without a warning, and every link in it leads somewhere."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import finished
from offline import WIDE, opened_offline, sticking_out, use_every_control

pytest.importorskip("myst_nb", reason="the book needs the extra `docs`")

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


class Page(HTMLParser):
    """The links of a page, and the anchors in it that links may point to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", "-d", folder / "doctrees"]
    finished([*command, ".", folder / "html"], cwd=ROOT)
    return folder / "html"


def test_every_link_leads_somewhere(book):
    pages = {path.resolve(): Page(path.read_text()) for path in book.rglob("*.html")}
    assert len(pages) > 2 * len(LESSONS) + 6
    dead, followed = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("#top"):
                assert parts.scheme in ("https", "data", ""), link
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            found = target.is_file() and (
                not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].anchors
            )
            followed += 1
            if not found:
                dead.append((path.name, link))
    assert not dead and followed > 1000, dead[:10]


def test_pages_load_nothing_from_elsewhere(book):
    """The book is read from a disk: scripts, styles and pictures are its own."""
    for path in book.rglob("*.html"):
        text = path.read_text()
        loaded = re.findall(
            r"<(?:script|img)[^>]* src=\"([^\"]+)\"|<link[^>]* rel=\"stylesheet\"[^>]* href=\"([^\"]+)\"", text
        )
        assert not [one for pair in loaded for one in pair if one.startswith(("http", "//"))], path


def test_explorers_work_without_a_kernel_and_a_network(book):
    pages = [path for path in book.rglob("*.html") if 'class="potara-explorer"' in path.read_text()]
    assert len(pages) == len(LESSONS) - 1  # 00b has no slider
    for path in pages:
        with opened_offline(path, WIDE) as page:
            assert use_every_control(page) >= 1


def test_on_a_phone_everything_fits_or_scrolls_in_its_block(book):
    for path in [book / "docs" / "index.html", *(book / "notebooks" / f"{name}.html" for name in LESSONS)]:
        with opened_offline(path, 360) as page:
            assert not sticking_out(page), path
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, path


def test_the_front_page_leads_to_every_notebook_and_each_takes_two_minutes_at_most(book):
    measured = json.loads((ROOT / "benchmarks" / "notebooks.json").read_text())["notebooks"]
    assert sorted(measured) == LESSONS and all(0 < found["seconds"] <= 120 for found in measured.values())
    assert sum(found["seconds"] for found in measured.values()) <= 720
    front = (book / "docs" / "index.html").read_text()
    assert all(f"../notebooks/{name}.html" in front for name in LESSONS)
    solutions = [path.stem for path in (ROOT / "notebooks" / "solutions").glob("*.ipynb")]
    assert sorted(solutions) == LESSONS and all(
        (book / "notebooks" / "solutions" / f"{n}.html").is_file() for n in LESSONS
    )


def test_the_api_page_has_every_module_in_the_order_of_the_tree():
    import potara_lite

    package = Path(potara_lite.__file__).parent
    files = {path.relative_to(package) for path in package.rglob("*.py") if "__" not in path.stem}
    named = [
        Path(*name.split(".")).with_suffix(".py")
        for name in re.findall(r"automodule:: potara_lite\.([\w.]+)", (ROOT / "docs" / "api.md").read_text())
    ]
    assert set(named) == files and len(named) == len(files)
    tree = re.findall(r"^    (\w+)(?:/|\.py) ", potara_lite.__doc__, re.M)
    entries = list(dict.fromkeys(path.with_suffix("").parts[0] for path in named))
    assert entries == [name for name in tree if name != "__main__"]
