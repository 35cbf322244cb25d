"""A browser that reads pages from the disk, without a kernel and without a network, and uses the explorers in them."""

from contextlib import contextmanager

import pytest
from test_browser import CHROMIUM, FLAGS

WIDE, PHONE = 1366, 390


@contextmanager
def opened_offline(path, width, **options):
    """The page in a window of this width; fails where a script fails, or asks for anything but files."""
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options).new_page()
        errors, asked = [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        yield page
        browser.close()
    assert not errors
    assert asked and not [url[:100] for url in asked if not url.startswith(("file:", "data:", "about:"))]


def use_every_control(page):
    """Move every control of every explorer; each changes its text and its picture. Returns how many there are."""
    explorers = page.locator(".potara-explorer").all()
    for explorer in explorers:

        def state(explorer=explorer):
            image = explorer.locator("img").first
            page.wait_for_function("e => e.complete && e.naturalWidth > 100", arg=image.element_handle())
            return image.get_attribute("src"), explorer.locator("p").inner_text()

        def changed(act, state=state):
            before = state()
            act()
            for _ in range(30):  # three seconds at most
                if all(new != old for new, old in zip(state(), before)):
                    return
                page.wait_for_timeout(100)
            raise AssertionError(f"three seconds after a control moved, the text is still {before[1]!r}")

        for slider in explorer.locator("input").all():
            changed(lambda slider=slider: _drag(page, slider))
            changed(lambda slider=slider: slider.press("ArrowLeft"))
        for select in explorer.locator("select").all():
            changed(lambda select=select: select.select_option(index=1))
        for button in explorer.locator("button").all()[1:-1]:  # the first seed remains on, the last off
            changed(button.click)
    return len(explorers)


def _drag(page, slider):
    """From the middle to nine tenths of the track, through an end, so that no start is where it began."""
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, y)
    page.mouse.down()
    for share in (0.02, 0.98):
        page.mouse.move(box["x"] + share * box["width"], y, steps=5)
    page.mouse.up()


def sticking_out(page):
    """What is wider than the window and does not scroll in a block of its own, once formulas are set."""
    page.evaluate("window.MathJax && new Promise((done) => MathJax.Hub.Queue(() => done()))")
    return page.evaluate("""() => [...document.querySelectorAll("article *")].filter((element) => {
        const box = element.getBoundingClientRect();
        if (box.right <= innerWidth + 1 || !box.width) return false;
        for (let block = element.parentElement; block.tagName !== "ARTICLE"; block = block.parentElement)
            if (["auto", "scroll", "hidden"].includes(getComputedStyle(block).overflowX)) return false;
        return true;
    }).map((element) => element.outerHTML.slice(0, 200))""")
