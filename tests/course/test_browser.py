"""Notebooks in a real JupyterLab: run all cells, drag every slider, see the picture change."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

import potara_lite

ROOT = Path(potara_lite.__file__).resolve().parent.parent
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --no-proxy-server --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
STANDSTILL = 180  # seconds without a cell that begins or ends; no cell takes a minute

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
    pytest.mark.timeout(1200),  # a whole notebook on a busy machine; what stands still ends after STANDSTILL
]


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab on copies of the notebooks without outputs, so that all we see was made here."""
    shutil.copytree(NOTEBOOKS / "images", tmp_path / "work" / "images")
    for path in NOTEBOOKS.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        notebook.metadata.pop("widgets", None)
        nbformat.write(notebook, tmp_path / "work" / path.name)
    settings = {  # keep cells in the page that are out of sight, and ask no questions in the corner
        "notebook-extension/tracker": '{"windowingMode": "none"}',
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    }
    for name, content in settings.items():
        path = tmp_path / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(content)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    environment = os.environ | {name: str(tmp_path / folder) for name, folder in places.items()}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment.pop("POTARA_SCALE", None)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={tmp_path / 'work'}"]
    command += ["--IdentityProvider.token=", "--LabApp.extension_manager=readonly"]
    log = (tmp_path / "jupyter.log").open("w")
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(address, server, tmp_path / "jupyter.log")
        yield address
    finally:
        server.terminate()  # JupyterLab ends its kernels before it ends itself
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


def wait_for_server(address, server, log):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(120):
        if server.poll() is not None:
            break
        try:
            direct.open(f"{address}/api", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    pytest.fail(f"JupyterLab does not answer:\n{log.read_text()[-2000:]}")


@pytest.fixture
def page(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        yield page
        print(screen(page))  # pytest shows it beside the error of a test that failed
        page.screenshot(path=tmp_path / "last.png")
        browser.close()


def screen(page):
    """What the page shows, in words."""
    return f"the page shows:\n{page.locator('body').inner_text()[-2000:]}"


def start_all(page, prompts):
    """Run All Cells through the menu, again where no cell begins within ten seconds: JupyterLab may ignore a click."""
    deadline = time.monotonic() + STANDSTILL
    while time.monotonic() < deadline:
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        for _ in range(20):
            if prompts.first.inner_text() != "[ ]:":
                return
            page.wait_for_timeout(500)
    pytest.fail(f"no cell began within {STANDSTILL} s; {screen(page)}")


def run_all(page):
    """Run all cells, and wait until the last code cell has its number; fail where nothing moves any more."""
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    error = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    start_all(page, prompts)
    seen, deadline = None, time.monotonic() + STANDSTILL
    while not re.fullmatch(r"\[\d+\]:", prompts.last.inner_text()):
        if error.count():
            pytest.fail(f"a cell stopped with an error:\n{error.first.inner_text()[-2000:]}")
        if (now := prompts.all_inner_texts()) != seen:
            seen, deadline = now, time.monotonic() + STANDSTILL
        assert time.monotonic() < deadline, f"nothing moved for {STANDSTILL} s: {seen}; {screen(page)}"
        page.wait_for_timeout(500)
    assert error.count() == 0
    return prompts


def picture(page):
    """What the browser shows in the slider's picture: the SVG behind the image's address."""
    image = page.locator(".jupyter-widgets img.widget-image")
    page.wait_for_function("e => e.complete && e.naturalWidth > 100", arg=image.element_handle())
    return image.evaluate("async e => await (await fetch(e.src)).text()")


def opened(page, lab, name):
    """The notebook with all cells run; the messages that the browser's console calls errors."""
    errors = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(f"{lab}/lab/tree/{name}.ipynb")
    page.locator(".jp-Notebook h1").first.wait_for(timeout=120_000)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").wait_for(timeout=120_000)
    results, questions = page.locator(".jp-OutputPlaceholder"), page.locator("details summary", has_text="(a)")
    assert results.count() >= questions.count() >= 3, "the results are folded until their cells are run"
    prompts = run_all(page)
    page.get_by_role("menuitem", name="View", exact=True).click()
    page.get_by_role("menuitem", name="Expand All Code", exact=True).click()
    assert prompts.all_inner_texts() == [f"[{number + 1}]:" for number in range(prompts.count())]
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    return errors


@pytest.mark.parametrize("name", ["02_linear_mode_connectivity", "03_variance_trace_bound"])
def test_every_slider_moves_its_picture(lab, page, tmp_path, name):
    errors = opened(page, lab, name)
    assert page.locator(".jp-OutputArea-output img[src^='data:image/png']").count() >= 2
    handles = page.locator(".jupyter-widgets .noUi-handle")
    assert handles.count() >= 1
    for number in range(handles.count()):
        handle = handles.nth(number)
        handle.scroll_into_view_if_needed()
        before = picture(page)
        knob = handle.bounding_box()
        track = page.locator(".jupyter-widgets .noUi-base").nth(number).bounding_box()
        x, y = knob["x"] + knob["width"] / 2, knob["y"] + knob["height"] / 2
        middle = track["x"] + track["width"] / 2
        end = track["x"] + (0.9 if x < middle else 0.1) * track["width"]
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(end, y, steps=8)
        page.mouse.up()
        page.wait_for_timeout(500)
        assert picture(page) != before, f"slider {number}"
        after = picture(page)
        handle.press("ArrowLeft" if end > x else "ArrowRight")  # a keyboard does as well
        page.wait_for_timeout(500)
        assert picture(page) != after, f"slider {number} by the keyboard"
    page.screenshot(path=tmp_path / "after.png")
    assert not errors


def test_run_all_cells_and_drag_the_slider(lab, page, tmp_path):
    errors = opened(page, lab, "00_quickstart")
    assert page.locator(".jp-OutputArea-output img[src^='data:image/png']").count() == 3

    handle = page.locator(".jupyter-widgets .noUi-handle")
    text = page.locator(".jupyter-widgets.widget-label", has_text="λ =")
    handle.scroll_into_view_if_needed()
    before, said = picture(page), text.inner_text()
    assert said.startswith("client 0, λ = 0.50: loss")
    page.screenshot(path=tmp_path / "before.png")

    knob, track = handle.bounding_box(), page.locator(".jupyter-widgets .noUi-base").bounding_box()
    x, y, end = knob["x"] + knob["width"] / 2, knob["y"] + knob["height"] / 2, track["x"] + track["width"]
    seen = [said]
    page.mouse.move(x, y)
    page.mouse.down()
    for step in range(1, 6):  # from the middle to the right end, while the button is held down
        page.mouse.move(x + (end - x) * step / 5, y, steps=4)
        page.wait_for_function("([e, old]) => e.innerText != old", arg=[text.element_handle(), seen[-1]])
        seen.append(text.inner_text())
    page.mouse.up()
    text.filter(has_text="λ = 1.00").wait_for()
    after = picture(page)
    page.screenshot(path=tmp_path / "after.png")

    assert len(set(seen)) == 6, seen
    rings = [re.findall(r"<circle [^>]*>", svg) for svg in (before, after)]
    assert len(rings[0]) == len(rings[1]) == 2 and not set(rings[0]) & set(rings[1]), "both rings have moved"
    covers = [len(re.findall("<rect data-at", svg)) for svg in (before, after)]
    assert covers[0] == 2 * covers[1] > 0, "the curve appears from the middle to the end"
    rest = [re.sub("<(circle|rect data-at)[^>]*>", "", svg) for svg in (before, after)]
    assert rest[0] == rest[1], "and nothing else changes"

    page.locator(".jupyter-widgets select").select_option(index=3)
    text.filter(has_text="client 3, λ = 1.00").wait_for()
    page.wait_for_timeout(200)
    assert picture(page) != after
    assert not errors
