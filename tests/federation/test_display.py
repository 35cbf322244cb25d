"""What a notebook shows of every object: one line, and a small table that is quick and safe."""

import re
import time
from html.parser import HTMLParser

import pytest
import torch

import potara_lite as pl
from potara_lite import Federation, Ledger, Moments, Setting, Split
from potara_lite.experiment import Run, federated_model, prepare
from potara_lite.federation.display import as_html, span

SETTING = Setting(clients=3, train_size=20, calibration_size=10, test_size=20, rounds=2, local_steps=4)


class Checked(HTMLParser):
    """Every tag is closed, and none is other than these."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.text = []

    def handle_starttag(self, tag, attributes):
        assert tag in {"div", "code", "table", "thead", "tbody", "tr", "th", "td", "span"}, tag
        assert {name for name, _ in attributes} <= {"style", "title", "border", "class"}
        assert "url(" not in str(attributes)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def rows_of(html):
    parser = Checked()
    parser.feed(html)
    assert parser.open == []
    return html.count("<tr")


@pytest.fixture(scope="module")
def things():
    adapted, federation = prepare(SETTING, 0)
    run = Run(adapted, federation, SETTING, 0)
    together = pl.fedit(adapted, federation.train, rounds=2, local_steps=1)
    return dict(
        federation=federation,
        split=federation.train,
        adapted=adapted,
        pair=run.pair,
        run=run,
        result=federated_model(run),
        federated=together,
        ledger=together.ledger,
        by_round=together.by_round,
        trained=pl.train(adapted, pl.repeat_adapter(adapted.initial, 3), federation.train, steps=[1, 0, 2]),
        personalised=pl.run_algorithm(pl.Algorithm("x"), adapted, federation.train, rounds=1, local_steps=1),
        estimate=pl.estimate_calibrated(adapted, *run.pair.models, federation.calibration),
        paper=pl.estimate_paper(adapted, *run.pair.models, federation.calibration),
        moments=Moments([1.0, 2.0], [2.0, 1.0], [0.0, 0.5]),
        setting=SETTING,
    )


NAMES = "federation split adapted pair run result federated ledger by_round trained personalised".split()
NAMES += ["estimate", "paper", "moments", "setting"]


@pytest.mark.parametrize("name", NAMES)
def test_one_line_and_a_table_of_fewer_than_30_rows(things, name):
    thing = things[name]
    assert "\n" not in repr(thing) and len(repr(thing)) < 420 and repr(thing).startswith(type(thing).__name__)
    assert 2 <= rows_of(thing._repr_html_()) < 30
    assert thing == thing and hash(thing) is not None and (thing != things["split"] or name == "split")


def test_what_the_lines_say(things):
    assert repr(things["federation"]) == (
        "Federation('Fashion-MNIST', 3 clients, 10 classes; train 20, calibration 10, test 20 each; "
        f"{things['split']._inputs()})"
    )
    assert repr(things["ledger"]).startswith("Ledger(3 clients; each ") and "2 steps" in repr(things["ledger"])
    assert "2 rounds" in repr(things["by_round"])
    assert re.match(r"Estimate\(3 clients; λ 0\.\d\d(–\d\.\d\d)?, mean 0\.\d\d; \d+ groups", repr(things["estimate"]))
    assert repr(things["moments"]) == "Moments(2 clients; λ 0.25–0.67)"  # (1 - ½) / (2 + 1 - 1), (2 - 0) / (1 + 2)
    assert re.match(r"Trained\(3 clients, 2 steps; training loss 2\.303 → \d\.\d{3}\)", repr(things["trained"]))
    assert span([5.0, 13.0]) == "5–13" and span([4, 4]) == "4"


def test_clients_are_picked_and_gone_through(things):
    federation = things["federation"]
    assert isinstance(federation[1], Federation) and federation[1].train.ids == (1,) and federation[-1].test.ids == (2,)
    assert [one.train.ids for one in federation] == [(0,), (1,), (2,)]
    assert federation[:2].train.ids == (0, 1) and [len(split) for split in federation.train] == [1, 1, 1]
    with pytest.raises(IndexError):
        federation[3]


def test_frames(things):
    frame = things["ledger"].to_frame()
    assert frame.client.tolist() == [0, 1, 2] and frame.up.tolist() == things["ledger"].up.tolist()
    by_round = things["by_round"].to_frame()
    assert by_round["round"].tolist() == [1] * 3 + [2] * 3 + [3] * 3
    assert by_round.groupby("client").up.sum().tolist() == things["ledger"].up.tolist()
    assert list(things["paper"].to_frame()) == ["weight", "a", "b", "c"]
    assert things["estimate"].to_frame().weight.tolist() == things["estimate"].client_weight.tolist()


def test_names_cannot_break_out_of_the_table():
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    split = Split([(x, y)])
    named = Federation(split, split, split, 2, "<b>", client_names=["<script>"], class_names=['"', "&"])
    assert rows_of(named._repr_html_()) == 2 and "<script>" not in named._repr_html_()
    assert "&lt;b&gt;" in named._repr_html_()


def test_a_thousand_clients_are_shown_in_a_moment():
    examples = [(torch.zeros(5, 3), torch.arange(5)) for _ in range(1000)]
    split = Split(examples)
    federation = Federation(split, split, split, 5)
    ledger = Ledger.zeros(1000)
    for thing in (federation, split, ledger, Moments(torch.ones(1000), torch.ones(1000), torch.zeros(1000))):
        html = thing._repr_html_()  # imports
        times = []
        for _ in range(5):
            began = time.perf_counter()
            repr(thing)
            thing._repr_html_()
            times.append(time.perf_counter() - began)
        assert rows_of(html) < 30 and min(times) < 0.05, min(times)


def test_real_targets_and_many_classes_are_words():
    real = Split([(torch.zeros(3, 2), torch.tensor([0.5, 1.5, -1.0]))])
    assert "-1.00–1.50" in real._repr_html_()
    many = Split([(torch.zeros(3, 2), torch.tensor([0, 99, 99]))])
    assert "2 of 100 classes" in many._repr_html_()
    assert as_html("nothing", {}) == "<div><code>nothing</code></div>"
