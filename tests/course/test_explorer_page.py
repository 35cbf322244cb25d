"""The page of an explorer holds what its widgets show, in every state and in little space."""

import json
import re
from html import unescape
from itertools import product
from urllib.parse import unquote

import notebook_outputs
import pandas as pd
import pytest
import torch
from offline import PHONE, WIDE, opened_offline, sticking_out, use_every_control

from potara_lite.course import explorer_page
from potara_lite.course.bound_explorer import bound_explorer
from potara_lite.course.explorers import basis_explorer
from potara_lite.course.seeds_explorer import seeds_explorer
from potara_lite.course.widgets import dropdown, explorer, slider, weight_slider

WEIGHTS = torch.linspace(0, 1, 21)
LOSS = 0.5 + (WEIGHTS - torch.linspace(0, 1, 8).unsqueeze(1)).square()
CHOSEN = {name: torch.linspace(0, 1, 8) for name in ("uniform", "potara-calibrated", "oracle")}


def page_of(box):
    return box._repr_mimebundle_()["text/html"]


def data_in(page):
    return json.loads(re.search(r"data = (\{.*\});\n", page)[1])


def pictures(data):
    """Every picture put together from its pieces, as the script does."""
    runs, found = [], []
    for shared, *more in data["pictures"]:
        runs = runs[:shared] + more
        found.append("".join("".join(data["pieces"][start:end]) for start, end in runs))
    return found


def show(one, two):
    return f"{one} & {two}", f"<svg><g><g>\n</g></g>{'<g></g>' * one}<a></a><b>{two}</b></svg>"


def small():
    choose = dropdown((f"client {i}", i) for i in range(3))
    return explorer([choose, slider("λ", [(str(k), k) for k in range(4)], index=1)], show)


def test_every_state_is_in_the_page():
    data = data_in(page_of(small()))
    states = [show(*state) for state in product(range(3), range(4))]
    assert data["texts"] == [text for text, _ in states]
    assert pictures(data) == [svg.replace("\n", " ") for _, svg in states]
    assert [control["kind"] for control in data["controls"]] == ["select", "slider"]
    assert [control["start"] for control in data["controls"]] == [0, 1]


def test_where_there_are_too_many_states_every_second_position_is_left_out(monkeypatch):
    monkeypatch.setattr(explorer_page, "MOST_STATES", 6)
    data = data_in(page_of(small()))
    assert data["texts"] == [f"{one} & {two}" for one in range(3) for two in (1, 3)]  # the start is among them
    assert data["controls"][1] | {"name": ""} == dict(
        kind="slider", name="", labels=["1", "3"], positions=[1, 3], start=0
    )


def test_a_reader_without_javascript_sees_the_whole_picture_of_the_start():
    box = weight_slider(WEIGHTS, LOSS, 1 / LOSS)
    page, text = page_of(box), box.children[2].value
    alternative, picture = re.search(r'<img alt="([^"]*)" src="data:image/svg\+xml,([^"]*)"', page).groups()
    assert unescape(alternative) == text and f">{text}</p>" in page
    assert "data-at" not in unquote(picture) and unquote(picture).count("<circle") == 2
    assert 'data-at="20"' in pictures(data_in(page))[0]


def test_of_a_page_in_a_notebook_the_text_is_compared():
    assert notebook_outputs.readable(page_of(small())) == "0 &amp; 1"
    assert notebook_outputs.readable("<p>λ 0.50</p>") == "<p>λ 0.50</p>"


def test_both_ways_to_show_it_are_displayed():
    assert {"text/html", "application/vnd.jupyter.widget-view+json"} <= set(small()._repr_mimebundle_())


def test_a_choice_without_a_picture_keeps_the_one_before():
    scores = pd.DataFrame({0: [0.8, 0.7], 1: [0.6, 0.7]}, index=["FedIT", "local"])
    data = data_in(page_of(seeds_explorer(scores)))
    assert [bool(svg) for svg in pictures(data)] == [False, True, True, False]
    assert [control["labels"] for control in data["controls"]] == [["off", "on"]] * 2


@pytest.mark.parametrize(
    "box",
    [
        lambda: weight_slider(WEIGHTS, LOSS, 1 / LOSS, CHOSEN),
        lambda: basis_explorer(180 * WEIGHTS, LOSS, 1 / LOSS, LOSS[:, 0], 1 / LOSS[:, 0]),
        bound_explorer,
    ],
)
def test_a_page_is_small(box):
    page = page_of(box())
    assert len(page.encode()) <= 250_000
    assert "http" not in re.sub(r"\w+://www\.w3\.org/[\w/]+", "", page)  # nothing but the names of SVG


def written(folder, *boxes):
    path = folder / "explorers.html"
    head = '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    path.write_text(f"{head}<article>{''.join(map(page_of, boxes))}</article>", encoding="utf-8")
    return path


def small_weight_slider():
    return weight_slider(WEIGHTS[::5], LOSS[:2, ::5], 1 / LOSS[:2, ::5])


def test_every_control_works_without_a_kernel_and_a_network(tmp_path):
    scores = pd.DataFrame({0: [0.8, 0.7], 1: [0.6, 0.7], 2: [0.7, 0.9]}, index=["FedIT", "local"])
    with opened_offline(
        written(tmp_path, small_weight_slider(), bound_explorer(), seeds_explorer(scores)), WIDE
    ) as page:
        assert use_every_control(page) == 3


def test_the_page_agrees_with_the_widgets_and_the_curve_appears(tmp_path):
    box = small_weight_slider()
    client, weight, text, picture = box.children
    with opened_offline(written(tmp_path, box), WIDE) as page:

        def agrees():
            svg = unquote(page.locator("img").first.get_attribute("src"))
            covers, rings = (
                [re.findall(shape, shown) for shown in (svg, bytes(picture.value).decode())]
                for shape in (r"<rect data-at[^>]*>", "<circle[^>]*>")
            )
            assert covers[0] == covers[1] and rings[0] == rings[1] != []
            assert page.locator("p").inner_text() == text.value
            assert page.locator("output").inner_text() == weight.label
            return len(covers[0])

        hidden = [agrees()]
        for key, step in (("ArrowLeft", -1), ("End", 3), ("ArrowLeft", -1)):
            page.locator("input").press(key)
            weight.index += step
            hidden.append(agrees())
        assert hidden == [8, 6, 2, 2]
        page.locator("select").select_option(index=1)
        client.value = 1
        assert agrees() == 8


def test_on_a_phone_a_finger_moves_the_slider_and_the_panels_stand_below_each_other(tmp_path):
    with opened_offline(written(tmp_path, small_weight_slider()), PHONE, has_touch=True) as page:
        slider, said = page.locator("input"), page.locator("p").inner_text()
        box = slider.bounding_box()
        assert box["height"] >= 40
        page.touchscreen.tap(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2)
        assert page.locator("p").inner_text() != said
        left, right = (image.bounding_box() for image in page.locator("img").all())
        assert right["y"] >= left["y"] + left["height"] and right["width"] == left["width"] > 0.9 * (PHONE - 16)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE and not sticking_out(page)
