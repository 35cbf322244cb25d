"""The decks: what they show is in the notebooks, and each slide can be shown without a network."""

import re
from html.parser import HTMLParser

import pytest
from offline import opened_offline
from test_results import ROOT, script

pytest.importorskip("myst_nb", reason="the decks need the extra `docs`")
DOCS = ROOT / "docs"
decks = script("decks", "docs")
NAMES = ["1", "2"]
PHONE, SCREEN = (390, 844), (1366, 768)


class Parts(HTMLParser):
    """What a deck loads, and the pictures without words."""

    def __init__(self, page):
        super().__init__()
        self.addresses, self.silent, self.slides = [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.slides += tag == "section"
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        self.silent += [tag] if tag == "img" and not found.get("alt") else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decks")
    decks.write(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_deck_is_one_file_with_everything_in_it(folder, name):
    parts = Parts((folder / f"{name}.html").read_text())
    assert parts.slides > 25 and len(parts.addresses) > 5
    assert all(address.startswith("data:") for address in parts.addresses) and not parts.silent


def plan(number):
    """The minutes of a session, and the votes and notebooks beside them, as the teaching page has them."""
    page = (DOCS / "teaching.md").read_text().split(f"## Session {number}")[1].split("\n\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if re.match(r"\| \d", line)]
    return [(minutes, 0 if votes == "–" else int(votes)) for minutes, _, _, votes, _ in rows]


@pytest.mark.parametrize("name", NAMES)
def test_minutes_and_votes_are_those_of_the_teaching_page(name):
    parts = re.split(r"<!-- (\d+–\d+).*?-->", (DOCS / "decks" / f"{name}.md").read_text())
    counted = [(minutes, text.count("{vote ")) for minutes, text in zip(parts[1::2], parts[2::2])]
    assert counted == plan(name)
    assert sum(votes for _, votes in counted) == 8
    assert any(int(end) - int(start) == 12 for start, end in (minutes.split("–") for minutes, _ in counted))


@pytest.mark.parametrize("name", NAMES)
def test_every_vote_is_followed_by_its_result(name):
    slides = (DOCS / "decks" / f"{name}.md").read_text().split("\n---\n")
    for here, after in zip(slides, slides[1:]):
        vote, result = (
            re.findall(rf"{{{kind} (\S+?)[ }}]", text) for kind, text in (("vote", here), ("result", after))
        )
        assert vote == result


def test_the_five_steps_are_the_same_in_the_notebook_the_deck_and_on_the_board():
    def steps(text, before):
        return [(number, name.lower()) for number, name in re.findall(rf"{before}Step (\d): ([^*.?|\n]+)", text)]

    pages = (DOCS / "decks" / "1.md").read_text(), (DOCS / "board_sheet.md").read_text()
    notebook = "\n".join(cell.source for cell in decks.section("03", "2"))
    wanted = steps(notebook, r"\*\*")
    assert [number for number, _ in wanted] == list("12345")
    assert steps(pages[0], "## ") == steps(pages[1], r"\*\*") == wanted


def test_slides_have_no_typed_results():
    """A number with decimals comes from a notebook; a λ or an α of the setting may be typed."""
    for source in decks.SOURCES:
        text = re.sub(r"[λα] = 0\.\d", "", source.read_text())
        assert not re.findall(r"\d\.\d|\d ?%(?! interval)", text)


@pytest.mark.parametrize("place", ["00/4/9", "00/99/1"])
def test_a_figure_that_is_not_there_is_an_error(place):
    with pytest.raises(ValueError, match=place):
        decks.address(place)


@pytest.mark.parametrize("size", [SCREEN, PHONE])
@pytest.mark.parametrize("name", NAMES)
def test_slides_fit_and_votes_open_before_their_results(folder, name, size):
    with opened_offline(folder / f"{name}.html", size[0]) as page:
        page.set_viewport_size({"width": size[0], "height": size[1]})
        slides, votes = page.locator("section"), 0
        for number in range(slides.count()):
            slide = slides.nth(number)
            slide.wait_for(timeout=5000)
            assert page.locator("section:visible").count() == 1
            if options := slide.locator("details").count():
                votes += 1
                hidden = slide.locator("details > p")
                assert options == 3 and not any(answer.is_visible() for answer in hidden.all())
                page.keyboard.press("ArrowRight")
                assert slide.is_visible() and all(answer.is_visible() for answer in hidden.all())
            broken = "images => images.filter((image) => !image.complete || !image.naturalWidth).length"
            assert slide.locator("img").evaluate_all(broken) == 0
            high, frame, wide, width = slide.evaluate(
                "e => [e.scrollHeight, e.clientHeight, e.scrollWidth, e.clientWidth]"
            )
            assert wide <= width and (high <= frame or size == PHONE), f"slide {number + 1}"
            page.keyboard.press("PageDown")
        assert votes == 8
        page.keyboard.press("Home")
        slides.nth(0).wait_for(timeout=5000)
        page.get_by_role("button", name="on").click()
        slides.nth(1).wait_for(timeout=5000)
        page.keyboard.press("ArrowLeft")
        slides.nth(0).wait_for(timeout=5000)
