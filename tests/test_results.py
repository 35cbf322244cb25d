"""The tables: how rows are summarised, and what the committed rows say."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from potara_lite.experiment import Result, Run, prepare
from potara_lite.plots import along_weight
from potara_lite.results import COLUMNS, leaderboard, paired_differences, result_rows, summary
from potara_lite.setting import Setting
from potara_lite.training.fedavg import Ledger

ROOT = Path(__file__).parents[1]


def script(name, folder="benchmarks"):
    """A script of ``benchmarks/``, where scripts may import each other, or of another folder."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # a dataclass looks its module up there
    spec.loader.exec_module(module)
    return module


def rows(values):
    return pd.DataFrame(values, columns=COLUMNS)


def test_summary_by_hand():
    table = summary(
        rows(
            [
                ["m", 0, 0, 0.5, 1.0, 0.2, 10, 20, 5, 1.0],
                ["m", 0, 1, 0.7, 2.0, 0.4, 10, 20, 5, 1.0],
                ["m", 1, 0, 0.9, 3.0, 0.6, 10, 20, 5, 3.0],
                ["m", 1, 1, 0.3, 4.0, 0.8, 10, 20, 5, 3.0],
            ]
        )
    ).loc["m"]
    assert table.accuracy == pytest.approx(0.6) and table["±"] == pytest.approx(0.0, abs=1e-12)
    assert table.loss == pytest.approx(2.5) and table["± loss"] == pytest.approx(1.0)  # seed means 1.5 and 3.5
    assert table.worst == pytest.approx(0.4) and table.weight == pytest.approx(0.5)
    assert table["bytes"] == 30 and table.steps == 5 and table.seconds == 2


@pytest.mark.parametrize("change", [dict(clients=0), dict(alpha=0.0), dict(lr=-1.0), dict(rank=0), dict(rounds=-1)])
def test_impossible_settings_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Setting(**change)


def test_the_default_setting_is_the_one_that_the_calibration_samples_chose():
    best = script("choose_default").admitted(pd.read_csv(ROOT / "benchmarks" / "choose_default.csv")).iloc[0]
    default = Setting()
    assert (best.lr, best.rounds, best.steps) == (default.lr, default.rounds, default.local_steps)


def test_what_beats_what_in_the_committed_rows():
    rows = pd.read_csv(ROOT / "benchmarks" / "quick.csv")
    loss, accuracy = (rows.pivot_table(index="seed", columns="method", values=v) for v in ("loss", "accuracy"))
    assert list(loss.index) == [0, 1, 2, 3, 4]
    for merged in ("uniform", "potara-paper", "potara-calibrated"):
        for alone in ("federated", "local"):
            assert (loss[merged] < loss[alone]).all() and (accuracy[merged] > accuracy[alone]).all()

    def standard_errors(table, one, two):
        difference = table[one] - table[two]
        return difference.mean() / difference.sem()

    assert standard_errors(loss, "uniform", "potara-calibrated") > 2
    assert standard_errors(loss, "potara-paper", "potara-calibrated") > 2
    assert standard_errors(accuracy, "potara-calibrated", "potara-paper") > 2
    assert standard_errors(accuracy, "potara-calibrated", "uniform") < 2  # the page says that they cannot be told apart
    assert standard_errors(loss, "potara-paper", "uniform") > 0


def test_the_lines_of_the_readme_run(tmp_path, monkeypatch, capsys):
    code = re.search(r"## Use it\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    small = "Setting(clients=2, train_size=8, test_size=8, rounds=1, round_steps=1, local_steps=1)"
    assert code.count("Setting()") == 1 and len(code.splitlines()) <= 12
    names = {}
    monkeypatch.chdir(tmp_path)
    exec(code.replace("Setting()", small), names)
    assert names["merged"].keys() == names["adapted"].initial.keys()
    assert (tmp_path / "client-0" / "adapter_config.json").is_file()
    assert re.fullmatch(r"loss \d\.\d{3} nats, accuracy \d\.\d{3}, saved: client-0\n", capsys.readouterr().out)


def test_a_selected_weight_is_marked_on_the_curve_or_where_its_value_is():
    weights, values = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[3.0, 1.0, 2.0], [4.0, 2.0, 3.0]])
    selected = {
        "potara-calibrated": torch.tensor([0.25, 0.5]),
        "uniform": (torch.tensor([0.5, 0.5]), torch.tensor([0.7, 1.9])),
    }
    panels = along_weight(weights, values, selected).axes[:2]
    marks = [{line.get_label(): line.get_xydata()[0].tolist() for line in panel.lines[1:]} for panel in panels]
    assert marks[0] == {"potara-calibrated": [0.25, 2.0], "uniform": [0.5, pytest.approx(0.7)]}
    assert marks[1] == {"potara-calibrated": [0.5, 2.0], "uniform": [0.5, pytest.approx(1.9)]}


def test_the_thousand_clients_are_those_of_the_committed_run():
    found = json.loads((ROOT / "benchmarks" / "scale.json").read_text())
    row = next(r for r in found["rows"] if r["clients"] == 1000 and not r["rounds"])
    ratio = found["ratios"]["1000 clients: seconds a client's step, to those at 125"]
    assert row["client_steps"] == 50_000 and row["finite"] and row["peak_bytes"] < 4e9 and ratio < 1.15


def test_a_setting_reaches_its_federation():
    tiny = dict(clients=3, train_size=40, calibration_size=5, test_size=6)
    _, even = prepare(Setting(**tiny, alpha=100.0), seed=0)
    _, skewed = prepare(Setting(**tiny, alpha=0.05), seed=0)
    classes = [sum(len(federation.train.client(i)[1].unique()) for i in range(3)) for federation in (even, skewed)]
    assert classes[0] > 2 * classes[1]
    assert even.train.y.shape == (3, 40) and even.calibration.y.shape == (3, 5) and even.test.y.shape == (3, 6)
    _, shifted = prepare(Setting(**tiny, alpha=100.0, shift=True), seed=0)
    assert torch.equal(shifted.train.y, even.train.y) and not torch.allclose(shifted.train.x, even.train.x)


def test_rows_have_the_names_of_the_clients(adapted, federation, random_stack):
    parts = []
    for method, seed in (("one", 0), ("other", 0), ("one", 1), ("other", 1)):
        stack = random_stack(adapted, 3, seed=len(parts))
        result = Result(adapted, stack, Ledger.zeros(3), 0.0)
        for names in (None, ["Cy", "Ann", "Bo"]):
            run = Run(adapted, replace(federation, client_names=names), Setting(clients=3), seed)
            parts.append(result_rows(method, run, result))
    numbered, named = (pd.concat(parts[i::2]) for i in range(2))
    assert named.client.tolist() == ["Cy", "Ann", "Bo"] * 4 and numbered.client.tolist() == [0, 1, 2] * 4
    pd.testing.assert_frame_equal(numbered.drop(columns="client"), named.drop(columns="client"))
    pd.testing.assert_frame_equal(paired_differences(numbered, "one"), paired_differences(named, "one"))
    more = dict(federation="mine", union_accuracy=0.5)
    boards = [leaderboard(rows.assign(**more), local="one") for rows in (numbered, named)]
    pd.testing.assert_frame_equal(*boards)
