"""Every committed notebook keeps to the pattern of ``notebooks/README.md``; nbval, by pytest's options, runs them."""

import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import finished
from test_results import script

from potara_lite import estimate_calibrated
from potara_lite.course.exercises.quickstart import check_best_single_weight, check_no_gain
from potara_lite.course.widgets import weight_slider
from potara_lite.plots import label_counts

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
LESSONS = sorted(FOLDER.glob("*.ipynb"))
WITHOUT_WIDGET = {"00b_from_scratch"}  # it uses nothing but PyTorch, and 00 has the slider over the same curves
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def section(text, title):
    """What stands between one heading of level 2 and the next."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.M | re.S).group(1)


def sections_of(notebook):
    return [int(number) for number in re.findall(r"^## (\d+)\. ", prose(notebook), re.M)]


def test_there_are_notebooks_and_each_has_solutions():
    assert [path.name for path in LESSONS] == [path.name for path in SOLUTIONS] != []


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_committed_as_executed_and_small(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size <= 1_000_000
    assert notebook.metadata.kernelspec.name == "python3"
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for cell in code(notebook):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", cell.source


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_cells_are_short_and_there_is_one_title(path):
    notebook = read(path)
    assert statistics.median(len(cell.source.splitlines()) for cell in code(notebook)) <= 8
    assert len(re.findall(r"^# ", prose(notebook), re.M)) == 1


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_a_lesson_has_all_its_parts(path):
    notebook = read(path)
    text = prose(notebook)
    for part in ("you will be able to", "**Prerequisites:**", "**Run time:**", "Exercise"):
        assert part in text, part
    goals = text.split("you will be able to")[1].split("**Prerequisites:**")[0]
    assert len(re.findall(r"^\d\. ", goals, re.M)) == 3
    assert sections_of(notebook) == list(range(1, len(sections_of(notebook)) + 1)) != []
    assert section(text, "Summary").count("\n- ") >= 3
    assert re.findall(r"^(\d)\. ", section(text, "Questions"), re.M) == list("12345")
    references = section(text, "References")
    assert "2602.18658" in references and "**The paper's**" in references and "**Ours:**" in references
    cited = set(re.findall(r"\[(\d)\](?!\()", text.split("## References")[0]))
    assert cited <= set(re.findall(r"^(\d)\. ", references, re.M))


OPTION = re.compile(r"<details><summary>\(([abc])\) (.+)</summary>\n\n(Right\.|Not quite\.) (.+?)\n\n</details>", re.S)


def tags(cell):
    return cell.metadata.get("tags", [])


def options(vote):
    """The letters, the summaries and the verdicts of a prediction's options."""
    parts = vote.source.replace("</details>", "</details>\0").split("\0")
    found = [OPTION.search(part) for part in parts[:-1]]
    assert len(found) == 3 and all(found) and not parts[-1].strip(), vote.source
    return list(zip(*((one[1], one[2], one[3]) for one in found)))


def votes(notebook):
    return [cell for cell in notebook.cells if "**Predict" in cell.source]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_a_question_is_asked_first_and_answered_in_the_summary(path):
    text = prose(read(path))
    for asked in re.findall(r"\*In one line:\*(.+?)\n\n", re.split(r"^## ", text, flags=re.M)[0], re.S):
        assert asked.rstrip().endswith("?"), asked
    assert "*In one line:*" in section(text, "Summary") and "open task" in text.lower()


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_a_prediction_has_three_options_and_each_has_its_reasoning(path):
    found = votes(read(path))
    assert 3 <= len(found) <= 6
    for vote in found:
        assert vote.cell_type == "markdown" and "vote" in tags(vote), vote.source
        question = vote.source.split("<details>")[0]
        assert question.startswith("**Predict.** ") and len(re.findall(r"[.?](?=\s)", question)) <= 3, question
        assert question.rstrip().endswith("?"), question
        letters, _, verdicts = options(vote)
        assert letters == ("a", "b", "c") and sorted(verdicts) == ["Not quite.", "Not quite.", "Right."]


def test_a_letter_and_a_length_do_not_give_the_answer_away():
    every = [options(vote) for path in LESSONS for vote in votes(read(path))]
    right = [verdicts.index("Right.") for _, _, verdicts in every]
    for place in range(3):
        assert len(right) / 4 <= right.count(place) <= len(right) / 2, [right.count(n) for n in range(3)]
    longest = [max(range(3), key=lambda n: len(texts[n])) for _, texts, _ in every]
    assert sum(one == other for one, other in zip(right, longest)) <= 0.4 * len(right)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_nothing_above_a_prediction_answers_it(path):
    """As far as a test can see: the result is folded, its check comes later, the right option is not said before."""
    cells = read(path).cells
    for number, vote in enumerate(cells):
        if "**Predict" not in vote.source:
            continue
        below = [cell for cell in cells[number + 1 :] if cell.cell_type == "code"]
        result = next(cell for cell in below if cell.outputs)
        assert "hide-output" in tags(result) and result.metadata.jupyter.outputs_hidden, result.source
        assert not any("check" in tags(cell) for cell in below[: below.index(result)]), vote.source
        _, texts, verdicts = options(vote)
        said = texts[verdicts.index("Right.")]
        assert not any(said in cell.source for cell in cells[:number]), said
        assert not re.search(r"^\W*(It is|Who said|So|About half,)? ?\([abc]\)", prose_below(cells[number + 1 :]))


def prose_below(cells):
    return next((cell.source for cell in cells if cell.cell_type == "markdown"), "")


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_claims_are_checked_in_cells_of_their_own(path):
    """Folded cells without output hold all asserts; what a reader sees printed is a number and not a sentence."""
    cells = code(read(path))
    checks = [cell for cell in cells if "check" in tags(cell)]
    assert len(checks) >= 5
    for cell in checks:
        assert "hide-input" in tags(cell) and cell.metadata.jupyter.source_hidden and not cell.outputs, cell.source
        assert "assert" in cell.source
    assert any("rtol=1e-9" in cell.source for cell in checks), "one core function is derived and compared"
    for cell in cells:
        assert cell in checks or not re.search(r"^\s*assert |assert_close", cell.source, re.M), cell.source
        assert not re.search(r"print\(\"[^\"{]*\"\)", cell.source), cell.source
    lines = [len(cell.source.splitlines()) for cell in cells]
    assert sum(len(cell.source.splitlines()) for cell in checks) <= 0.3 * sum(lines)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_a_figure_comes_before_the_slider(path):
    cells = code(read(path))
    assert all(cell.outputs for cell in cells if "NBVAL_CHECK_OUTPUT" in cell.source)
    pictures = ["image/png" in output.get("data", {}) for cell in cells for output in cell.outputs]
    sliders = ["widget-view+json" in str(output.get("data", {})) for cell in cells for output in cell.outputs]
    assert sum(sliders) == (path.stem not in WITHOUT_WIDGET)
    assert pictures.index(True) < (sliders.index(True) if any(sliders) else len(sliders)), "a static figure comes first"


LECTURES = [path for path in LESSONS if path.name.split("_")[0] in ("00", "02", "03", "04", "05", "07")]


@pytest.mark.parametrize("path", LECTURES, ids=lambda path: path.name)
def test_a_lecture_stops_at_every_prediction(path, tmp_path):
    """As slides: a slide per section and per prediction; what follows a prediction comes only when it is asked for."""
    cells = read(path).cells
    kinds = [cell.metadata.get("slideshow", {}).get("slide_type") for cell in cells]
    for number, cell in enumerate(cells):
        if cell.cell_type == "markdown" and re.search(r"^## ", cell.source, re.M):
            assert kinds[number] == "slide"
        if "vote" in tags(cell):
            assert kinds[number] in ("slide", "subslide")
            follows = next(n for n in range(number + 1, len(cells)) if cells[n].cell_type == "code")
            assert kinds[follows] == "fragment", cells[follows].source
        if "check" in tags(cell):
            assert kinds[number] == "skip"
    command = [sys.executable, "-m", "nbconvert", "--to", "slides", "--output-dir", tmp_path, path]
    finished(command)
    text = (tmp_path / f"{path.stem}.slides.html").read_text()
    assert text.count("<section") > kinds.count("slide")


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.name)
def test_solutions_run_strictly(path):
    outputs = {cell.source: "".join(output.get("text", "") for output in cell.outputs) for cell in code(read(path))}
    for source, text in outputs.items():
        said_by_a_checker = re.match(r"correct|hint: |not attempted", text)
        assert "# NBVAL_CHECK_OUTPUT" in source or not said_by_a_checker, source
    assert any(text.startswith("correct") for text in outputs.values())


def named_sections():
    """The (notebook, section) pairs that the teaching page sends a lecturer to."""
    page = (FOLDER.parent / "docs" / "teaching.md").read_text()
    rows = re.findall(r"^\| [\d–]+ \|.*?\| (\w+), (\d+)(?:–(\d+))? \|", page, re.M)
    listed = re.findall(r"^\| (\d\db?) \|.*\| sections? (\d+)(?: (?:to|and) (\d+))? \|", page, re.M)
    in_text = re.findall(r"\[(\d\db?)\]\([^)]*\)\s+sections? (\d+)(?: (?:to|and) (\d+))?", page)
    return [(lesson, int(first), int(last or first)) for lesson, first, last in rows + listed + in_text]


def test_the_teaching_page_names_sections_that_exist():
    named = named_sections()
    assert len(named) > 20 and {"00", "02", "03", "04", "05"} <= {lesson for lesson, _, _ in named}
    for lesson, first, last in named:
        (path,) = FOLDER.glob(f"{lesson}_*.ipynb")
        assert 1 <= first <= last <= max(sections_of(read(path))), (lesson, first, last)


def solved(weights, loss):
    return weights[loss.mean(0).argmin()]


def raising(error):
    def function(weights, loss):
        raise error

    return function


@pytest.mark.parametrize("stub", [lambda w, loss: ..., lambda w, loss: None, raising(NotImplementedError())])
def test_checker_knows_an_untouched_stub(stub):
    assert check_best_single_weight(stub) == "not attempted"


@pytest.mark.parametrize("right", [solved, lambda w, loss: float(solved(w, loss)), lambda w, loss: solved(w, 3 * loss)])
def test_checker_knows_a_solution(right):
    assert check_best_single_weight(right) == "correct"


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (lambda w, loss: w[loss.argmin(1)], "a weight per client"),
        (lambda w, loss: w[loss.argmin(1)].mean(), "average their losses"),
        (lambda w, loss: w[loss.argmin(1)].median(), "the answer is 0.3"),
        (lambda w, loss: w[loss.argmin()], "take the mean over them"),
        (lambda w, loss: w[loss.mean(0).argmax()], "largest"),
        (lambda w, loss: 1 - solved(w, loss), "on the local model"),
        (lambda w, loss: loss.mean(0).argmin(), "a position in the grid"),
        (lambda w, loss: loss.mean(0).min(), "the smallest mean loss"),
        (lambda w, loss: loss.mean(0), "yours has the shape (11,)"),
        (lambda w, loss: 0.3, "right on one example"),
        (lambda w, loss: solved(w, loss) if len(loss) == 3 else 1 / 0, "right on one example"),
        (lambda w, loss: "0.3", "is a str"),
        (lambda w, loss: float("nan"), "yours is nan"),
        (raising(KeyError("x")), "KeyError"),
    ],
)
def test_checker_gives_a_hint(wrong, hint):
    line = check_best_single_weight(wrong)
    assert line.startswith("hint: ") and hint in line


@pytest.mark.parametrize(
    "losses, line",
    [
        (..., "not attempted"),
        ({"federated": 0.7, "local": 0.9, "merged": 0.75}, "correct"),
        ({"federated": 0.7, "local": 0.9, "merged": 0.65}, "hint: the merge still has the lowest loss, by 0.050"),
        ({"federated": 0.7, "local": 2.3, "merged": 0.75}, "hint: a model that has learnt something"),
        ({"federated": 0.7, "local": 0.9}, "hint: the losses are a dictionary"),
    ],
)
def test_the_open_task_wants_a_federation_without_gain(losses, line):
    assert check_no_gain(losses).startswith(line)


WEIGHTS = torch.linspace(0, 1, 5)
LOSS = torch.stack([(WEIGHTS - 0.25) ** 2, (WEIGHTS - 1) ** 2 + 0.5])


def test_slider_shows_the_precomputed_values():
    box = weight_slider(WEIGHTS, LOSS, 1 - LOSS, {"oracle": torch.tensor([0.25, 1.0])})
    client, slider, text, picture = box.children
    assert text.value == "client 0, λ = 0.50: loss 0.062 nats (0.062 above its lowest), accuracy 0.938"
    seen = {picture.value}
    for position in range(len(WEIGHTS)):
        slider.index = position
        assert f"λ = {WEIGHTS[position]:.2f}: loss {LOSS[0, position]:.3f}" in text.value
        seen.add(picture.value)
    client.value = 1
    assert text.value.startswith("client 1, λ = 1.00: loss 0.500 nats (0.000 above its lowest)")
    assert len(seen | {picture.value}) == 1 + len(WEIGHTS) + 1  # the start, every position, the other client


def test_the_curve_appears_where_the_slider_has_been():
    client, slider, _, picture = weight_slider(WEIGHTS, LOSS, 1 - LOSS).children

    def hidden():
        found = re.findall(r'<rect data-at="(\d)"', bytes(picture.value).decode())
        assert len(found) == 2 * len(set(found))  # in both panels
        return "".join(sorted(set(found)))

    assert hidden() == "0134"
    slider.index = 4  # a jump visits what lies between
    assert hidden() == "01"
    slider.index = 3
    assert hidden() == "01"
    client.value = 1
    assert hidden() == "0124"
    client.value = 0
    assert hidden() == "01"


def test_the_ring_sits_on_the_curve():
    """The ring's place is matplotlib's own: the marker of a weight chosen there has the same coordinates."""
    _, slider, _, picture = weight_slider(
        WEIGHTS, LOSS, 1 - LOSS, {"potara-calibrated": torch.tensor([0.75, 0.0])}
    ).children
    slider.index = 3
    svg = bytes(picture.value).decode()
    rings = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    marks = re.findall(r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: #009e73', svg)
    assert len(rings) == 2
    for ring in rings:
        assert any([float(r) for r in ring] == pytest.approx([float(m) for m in mark], abs=0.1) for mark in marks)


def test_slider_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"loss must be numbers of shape \(C, W\) with W = 5"):
        weight_slider(WEIGHTS, LOSS[:, :4], LOSS[:, :4])
    with pytest.raises(ValueError, match=r"chosen\['potara-calibrated'\] must be numbers of shape \(C\) with C = 2"):
        weight_slider(WEIGHTS, LOSS, LOSS, {"potara-calibrated": torch.zeros(3)})


def test_label_counts_shows_every_example(federation):
    figure = label_counts(federation.train, list("abcd"))
    (panel,) = figure.axes
    assert sum(int(text.get_text()) for text in panel.texts) == int(federation.train.sizes.sum())
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["client 0", "client 1", "client 2"]


def test_label_counts_has_the_names_of_a_federation(federation):
    named = replace(federation, client_names=["Ann", "Bo", "Cy"], class_names=["no", "yes", "may", "so"])
    for source, names, clients, classes in (
        (named, None, named.client_names, named.class_names),
        (named, list("abcd"), named.client_names, "abcd"),
        (federation, None, [f"client {i}" for i in range(3)], [f"class {k}" for k in range(4)]),
        (federation.train, None, [f"client {i}" for i in range(3)], [f"class {k}" for k in range(4)]),
    ):
        (panel,) = label_counts(source, names).axes
        assert [tick.get_text() for tick in panel.get_yticklabels()] == list(clients)
        assert [tick.get_text() for tick in panel.get_xticklabels()] == list(classes)
        assert sum(int(text.get_text()) for text in panel.texts) == int(federation.train.sizes.sum())


method_picture = script("method_picture", "docs")


def test_the_picture_of_the_method_is_committed_as_drawn(tmp_path):
    method_picture.write(tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (FOLDER / "images").iterdir()}
    assert committed == drawn, "python docs/method_picture.py"
    assert len(drawn) == 1 + len(method_picture.PARTS) and len(set(drawn.values())) == len(drawn)


def test_the_picture_is_readable_on_a_phone_and_its_numbers_are_right(adapted, federation, random_stack):
    svg = method_picture.picture()
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", svg)]
    assert min(sizes) * (360 - 2 * 16) / method_picture.WIDTH >= 11 and len(sizes) >= 4
    assert "prefers-color-scheme: dark" in svg and svg.count('class="wall"') == method_picture.HOSPITALS
    models = (random_stack(adapted, 3, seed) for seed in (0, 1))
    up, down = estimate_calibrated(adapted, *models, federation.calibration).floats
    assert f"{up} numbers up and {down} down for λ" in svg


@pytest.mark.parametrize("part", method_picture.PARTS)
def test_the_picture_highlights_one_part(part):
    svg = method_picture.picture(part)
    assert svg.count('class="dim"') == len(method_picture.PARTS) - 1 and svg.count('class="frame"') == 1
    assert re.search(rf'<g class="part" id="{part}">', svg)
    with pytest.raises(ValueError, match="highlight must be one of round, local"):
        method_picture.picture(part + "s")
