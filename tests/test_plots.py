"""The figures show the numbers they are given, in the axes they are given, each method in a colour of its own."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_federation
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from potara_lite import plots
from potara_lite.estimators import Estimate
from potara_lite.training.history import history_table

WEIGHTS, LOSS = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[3.0, 1, 2], [2.0, 2, 4]])
HISTORY = history_table(
    ["a", "b"],
    [
        dict(step=1, train_loss=torch.tensor([2.0, 4.0]), loss=torch.tensor([3.0, 5.0])),
        dict(step=2, train_loss=torch.tensor([1.0, 2.0])),
        dict(step=3, train_loss=torch.tensor([0.5, 1.5]), loss=torch.tensor([1.0, 2.0])),
    ],
)
POINTS = pd.DataFrame({"accuracy": [0.7, 0.8], "±": [0.01, np.nan], "bytes": [1e6, 2e6]}, index=["local", "mine"])
BOARD = pd.concat({"one": POINTS, "two": POINTS}, names=["federation", "method"])
DIFFERENCES = pd.DataFrame({"difference": [0.02, -0.01], "±": [0.01, np.nan]}, index=["local", "mine"])
ONE = {
    "label_counts": lambda **ax: plots.label_counts(tiny_federation(torch.float32).train, list("abcd"), **ax),
    "learning_curves": lambda **ax: plots.learning_curves(HISTORY, **ax),
    "weights": lambda **ax: plots.weights(Estimate(torch.tensor([0.2, 0.9])), torch.tensor([0.5, 0.6]), **ax),
    "paired_differences": lambda **ax: plots.paired_differences(DIFFERENCES, **ax),
    "frontier": lambda **ax: plots.frontier(POINTS, **ax),
}
SEVERAL = {
    "along_weight": lambda **ax: plots.along_weight(WEIGHTS, LOSS, {"mine": torch.tensor([0.5, 0.2])}, **ax),
    "frontiers": lambda **ax: plots.frontiers(BOARD, pd.Series(True, index=BOARD.index), **ax),
}


def lines(axes):
    """The curves and points of axes: what is drawn, by its label."""
    return {line.get_label(): line.get_xydata().round(9).tolist() for line in axes.get_lines()}


@pytest.mark.parametrize("name", [*ONE, *SEVERAL])
def test_a_figure_is_new_or_that_of_the_axes_that_are_given(name):
    """The new one does not stay in the memory of pyplot; in given axes the same is drawn."""
    function, before = (ONE | SEVERAL)[name], plt.get_fignums()
    alone = function()
    assert isinstance(alone, Figure) and plt.get_fignums() == before
    figure, axes = plt.subplots(1, 1 if name in ONE else 2)
    other = figure.add_axes([0, 0, 0.1, 0.1])
    assert function(ax=axes) is figure
    for mine, given in zip(alone.axes, figure.axes):
        assert lines(mine) == lines(given) and len(mine.texts) == len(given.texts)
    assert not other.get_lines() and not other.collections
    plt.close(figure)


def test_every_method_has_a_colour_of_its_own():
    names = [*plots.COLOURS][:6] + [f"mine {i}" for i in range(8)] + ["uniform, again"]
    found = plots.colours(names)
    assert len(set(found.values())) == len(names) and found["local"] == plots.COLOURS["local"]
    assert plots.colours(["local, again", "local again", "local"])["local"] == plots.COLOURS["local"]
    assert plots.colours(names[:8]) == {name: found[name] for name in names[:8]}


def test_learning_curves_are_the_history_and_its_mean():
    axes = plots.learning_curves(HISTORY).axes[0]
    assert lines(axes)["mean of the clients"] == [[1, 4.0], [3, 1.5]]
    assert [[1, 3.0], [3, 1.0]] in lines(axes).values() and [[1, 5.0], [3, 2.0]] in lines(axes).values()
    assert lines(plots.learning_curves(HISTORY, "train_loss").axes[0])["mean of the clients"][1] == [2, 1.5]
    both = pd.concat([HISTORY.assign(model="federated"), HISTORY.assign(model="local", loss=7.0)])
    axes = plots.learning_curves(both).axes[0]
    assert lines(axes)["federated"] == [[1, 4.0], [3, 1.5]] and {y for _, y in lines(axes)["local"]} == {7.0}
    assert {to_hex(line.get_color()).upper() for line in axes.get_lines()} == {
        plots.COLOURS[name] for name in ("federated", "local")
    }
    with pytest.raises(ValueError, match="history has no accuracy"):
        plots.learning_curves(HISTORY, "accuracy")


def test_weights_are_a_row_for_each_client():
    estimates = {"own": Estimate(torch.tensor([0.2, 0.9])), "given": torch.tensor([0.1, 0.3])}
    axes = plots.weights(estimates, torch.tensor([0.5, 0.6]), names=["Lyon", "Nice"]).axes[0]
    found = lines(axes)
    assert np.allclose(found["own"], [[0.2, 0], [0.9, 1]]) and np.allclose(found["given"], [[0.1, 0], [0.3, 1]])
    assert np.allclose(found["oracle"], [[0.5, 0], [0.6, 1]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Lyon", "Nice"]


def test_differences_have_their_errors_and_names():
    axes = plots.paired_differences(DIFFERENCES).axes[0]
    [bars] = axes.collections
    assert np.allclose([segment[:, 0] for segment in bars.get_segments()], [[0.01, 0.03], [-0.01, -0.01]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["local", "mine"]
    several = pd.concat({"one": DIFFERENCES}, names=["federation", "method"])
    assert plots.paired_differences(several).axes[0].get_yticklabels()[0].get_text() == "one, local"


def test_a_method_keeps_its_sign_and_colour_in_all_federations():
    """Also where another one is the first of a panel."""
    front = pd.Series([True, True, False, True], index=BOARD.index)
    figure = plots.frontiers(BOARD, front, highlight="mine")
    drawn = [
        {text.get_text(): (one[0].get_marker(), one[0].get_color()) for one, text in zip(handles, legend.get_texts())}
        for handles, legend in ((axes.containers, axes.get_legend()) for axes in figure.axes)
    ]
    assert drawn[0].keys() == {"local", "mine"} and drawn[1].keys() == {"mine"}
    assert drawn[0]["mine"] == drawn[1]["mine"] != drawn[0]["local"]


def test_names_of_clients_stand_at_the_panels():
    figure = plots.along_weight(WEIGHTS, LOSS, names=["Lyon", "Nice"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Lyon", "Nice"]
