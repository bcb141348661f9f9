"""Pictures of features and gates: what they show is what they were given, and can be read."""

import ipywidgets
import nbformat
import numpy as np
import pytest
import torch
from figures import readable
from matplotlib.colors import to_hex
from nbclient import NotebookClient

from kamal_lib.viz import features
from kamal_lib.viz.curves import STYLES
from kamal_lib.viz.features import Coded
from kamal_lib.viz.panels import MAPS

TASKS = ("segmentation", "depth")
CHANNELS = (3, 16, 64)


def coded(channels: int, seed: int = 0, size: tuple[int, int] = (5, 7)) -> Coded:
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (torch.rand(channels, *size, generator=rng) for _ in range(2))
    return Coded(student, 2 * torch.rand(channels, generator=rng), teacher)


BLOCKS = {task: [coded(c, seed) for c in CHANNELS] for seed, task in enumerate(TASKS)}
IMAGE = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(9))


# Numbers, dots, curves


def test_numbers_are_the_matrices():
    figure = features.number_grids({"F": torch.tensor([[1.0, 2.5]]), "s": torch.tensor([[1.63515], [0.25]])})
    assert readable(figure)
    told = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert told == [["1", "2.5"], ["1.64", "0.25"]]
    assert [ax.get_title() for ax in figure.axes] == ["F", "s"]


def test_an_empty_matrix_of_zeros_is_drawn():
    assert readable(features.number_grids({"nothing at all": torch.zeros(2, 2)}))


def test_dots_stand_where_the_answer_is_yes():
    tables = {"Eq. 6": {"block 1": {"a": True, "b": False}, "block 2": {"a": True, "b": True}}}
    figure = features.marks(tables)
    assert readable(figure)
    (ax,) = figure.axes
    (dots,) = ax.lines
    assert set(zip(*dots.get_data(), strict=True)) == {(0, 0), (0, 1), (1, 1)}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["block 1", "block 2"]
    assert figure.alt.endswith("Eq. 6: block 1 (a); block 2 (a, b).")


def test_a_table_without_dots():
    figure = features.marks({"none": {"block 1": {"a": False}}})
    assert readable(figure)
    assert not figure.axes[0].lines


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"x": {}},
        {"x": {"r": {"a": True}, "s": {"b": True}}},
        {"x": {"r": {"a": True}}, "y": {"s": {"a": True}}},
    ],
)
def test_tables_that_do_not_fit(tables):
    with pytest.raises(ValueError, match="the same rows, with the same columns"):
        features.marks(tables)


@pytest.mark.parametrize("log", [True, False])
def test_curves_over_blocks(log: bool):
    panels = {"Eq. 5": {"depth": [0.5, 20.0, 1.0, 3.0]}, "Eq. 6": {"depth": [0.01, 0.02, 0.3, 0.4]}}
    figure = features.block_curves(panels, "loss", decoder_from=3, log=log)
    assert readable(figure)
    for ax, curves in zip(figure.axes, panels.values(), strict=True):
        (line,) = ax.lines
        assert line.get_xdata().tolist() == [1, 2, 3, 4]
        assert line.get_ydata().tolist() == curves["depth"]
        assert ax.get_yscale() == ("log" if log else "linear")
    assert len({ax.get_ylim() for ax in figure.axes}) == (1 if log else 2)
    assert "Eq. 5, depth, from 0.5 to 3" in figure.alt


def test_curves_have_an_axis_label_each():
    panels = {"a": {"x": [1.0, 2.0]}, "b": {"x": [1.0, 2.0]}}
    figure = features.block_curves(panels, {"a": "nats", "b": "m²"}, decoder_from=2)
    assert [ax.get_ylabel() for ax in figure.axes] == ["nats", "m²"]


def test_one_panel_alone_can_be_logarithmic():
    panels = {"a": {"x": [0.0, 2.0]}, "b": {"x": [1.0, 100.0]}}
    figure = features.block_curves(panels, "loss", decoder_from=2, log="b")
    assert [ax.get_yscale() for ax in figure.axes] == ["linear", "log"]
    assert figure.axes[0].get_ylim() != figure.axes[1].get_ylim()
    with pytest.raises(ValueError, match=r"title of a panel of .*got 'c'"):
        features.block_curves(panels, "loss", decoder_from=2, log="c")


def test_curves_that_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"one value a block.*got lengths \[1, 2\]"):
        features.block_curves({"a": {"x": [1.0, 2.0], "y": [1.0]}}, "loss", decoder_from=2)
    with pytest.raises(ValueError, match="draw it with log=False"):
        features.block_curves({"a": {"x": [1.0, 0.0]}}, "loss", decoder_from=2, log=True)
    with pytest.raises(ValueError, match="panels share a legend"):
        features.block_curves({"a": {"x": [1.0]}, "b": {"y": [1.0]}}, "loss", decoder_from=1)


# Gates


def test_a_gate_is_open_beyond_the_margin():
    gates = {"s": torch.tensor([1.2, 1.2, 1.0, 0.5, 1.1]), "d": torch.tensor([1.2, 1.0, 1.2, 0.5, 1.1])}
    assert features.gate_sets(gates, 2.0, 0.1) == {"s only": 1, "d only": 1, "all tasks": 1, "no task": 2}
    half = {task: s / 2 for task, s in gates.items()}
    assert features.gate_sets(half, 1.0, 0.1) == features.gate_sets(gates, 2.0, 0.1)


@pytest.mark.parametrize("count", [1, 4, 10])
def test_gates_are_sorted_by_their_difference(count: int):
    gates = {task: [coded(16, 10 * k + n).gates for n in range(count)] for k, task in enumerate(TASKS)}
    figure = features.gate_panels(gates, 2.0)
    assert readable(figure)
    drawn = [ax for ax in figure.axes if ax.lines]
    assert len(drawn) == count
    for n, ax in enumerate(drawn):
        first, second = (line.get_ydata() for line in ax.lines)
        assert (np.diff(first - second) >= 0).all()
        assert sorted(first) == sorted(gates["segmentation"][n].tolist())
        assert sorted(second) == sorted(gates["depth"][n].tolist())
        assert ax.get_ylim() == (0, 2)
    sets = features.gate_sets({task: rows[0] for task, rows in gates.items()}, 2.0, 0.1)
    title = f"block 1: {sets['segmentation only']} | {sets['depth only']} | {sets['all tasks']}"
    assert drawn[0].get_title() == title


def test_gates_of_other_than_two_tasks():
    with pytest.raises(ValueError, match="gates of two tasks"):
        features.gate_panels({"depth": [torch.ones(3)]}, 2.0)
    with pytest.raises(ValueError, match=r"the same channels at every block.*\[3\].*\[4\]"):
        features.gate_panels({"a": [torch.ones(3)], "b": [torch.ones(4)]}, 2.0)


# Features


@pytest.mark.parametrize("n", [1, len(CHANNELS)])
@pytest.mark.parametrize("task", TASKS)
def test_draw_at_the_ends_of_the_widget(n: int, task: str):
    figure = features.draw(IMAGE, BLOCKS, n, task, gain=2.0)
    assert readable(figure, rounding=1)
    gates = BLOCKS[task][n - 1].gates
    _, ax, maps = figure.axes
    line = next(line for line in ax.lines if line.get_label() == task)
    assert line.get_ydata().tolist() == sorted(gates.tolist(), reverse=True)
    labels = [text.get_text() for text in maps.texts if text.get_text().startswith("channel")]
    order = gates.argsort(descending=True).tolist()
    picked = order if len(order) <= 6 else order[:3] + order[-3:]
    assert labels == [f"channel {c}: {float(gates[c]):.2f}" for c in picked]


def test_a_task_keeps_its_colour():
    for task, style in zip(TASKS, STYLES, strict=False):
        ax = features.draw(IMAGE, BLOCKS, 1, task, gain=2.0).axes[1]
        line = next(line for line in ax.lines if line.get_label() == task)
        assert to_hex(line.get_color()) == style[0]


def test_maps_are_student_coded_and_teacher():
    """Three rows on one scale a channel: the loudest number of a column is the map's last colour."""
    student = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
    block = Coded(student, torch.tensor([2.0, 0.5]), torch.tensor([[[0.0, 0.5]], [[4.0, 0.0]]]))
    pixels = features.tiles(block, torch.tensor([0, 1]))
    assert pixels.shape == (3 * 2, 2 * 3, 4)  # one pixel high, two wide, and white between
    colour = MAPS["depth"]
    wanted = {(0, 0): 0.5, (2, 0): 1.0, (4, 1): 0.25, (0, 3): 0.25, (2, 4): 0.125, (4, 3): 1.0, (4, 4): 0.0}
    for (y, x), share in wanted.items():
        assert np.allclose(pixels[y, x], colour(share))
    assert (pixels[1::2] == 1).all()
    assert (pixels[:, 2::3] == 1).all()


def test_silent_channels_are_dark():
    block = Coded(torch.zeros(1, 2, 2), torch.ones(1), torch.zeros(1, 2, 2))
    assert np.allclose(features.tiles(block, torch.tensor([0]))[0, 0], MAPS["depth"](0.0))


@pytest.mark.parametrize(("n", "task"), [(0, "depth"), (4, "depth"), (1, "normals")])
def test_a_block_or_task_that_is_not_there(n: int, task: str):
    with pytest.raises(ValueError, match=rf"no block {n} for '{task}'.*blocks 1..3"):
        features.draw(IMAGE, BLOCKS, n, task, gain=2.0)


def test_parts_of_different_blocks():
    a, b = coded(3), coded(4)
    with pytest.raises(ValueError, match="take all three at the same n"):
        Coded(a.student, b.gates, a.teacher)
    with pytest.raises(ValueError, match="take all three at the same n"):
        Coded(a.student, a.gates, b.teacher)


# The browser


def test_the_browser_offers_every_block_and_task():
    browser = features.gate_browser(IMAGE, BLOCKS, gain=2.0)
    controls, picture = browser.children
    n, task = controls.children
    assert isinstance(n, ipywidgets.IntSlider)
    assert (n.min, n.max, n.continuous_update) == (1, len(CHANNELS), False)
    assert task.options == TASKS
    assert picture.layout.height.endswith("px")


@pytest.mark.parametrize("blocks", [{}, {"depth": []}, {"a": [coded(3)], "b": [coded(3), coded(3)]}])
def test_a_browser_without_blocks(blocks):
    with pytest.raises(ValueError, match="the same blocks, at least one, for every task"):
        features.gate_browser(IMAGE, blocks, gain=2.0)


def test_the_slider_redraws_in_a_kernel():
    cells = [
        """
import torch
from kamal_lib.viz.features import Coded, gate_browser
def block(c):
    return Coded(torch.rand(c, 4, 4), torch.rand(c), torch.rand(c, 4, 4))
browser = gate_browser(torch.rand(3, 4, 4), {t: [block(3), block(9)] for t in ("a", "b")}, gain=2.0)""",
        "browser",
        "browser.children[0].children[0].value = 2",
        "browser.children[0].children[1].value = 'b'",
        "print(*(o['data']['text/plain'] for o in browser.children[1].outputs))",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, kernel_name="python3", timeout=120).execute()
    assert book.cells[-1].outputs[0].text.startswith("Block 2 for b: 9 gates from")
