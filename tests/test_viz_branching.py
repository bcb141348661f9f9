"""Where a student branches out, in pictures: bars, votes and the explorer say what they were given."""

from dataclasses import replace
from typing import Any

import ipywidgets
import nbformat
import numpy as np
import pytest
import torch
from figures import readable
from matplotlib.text import Text
from nbclient import NotebookClient

from kamal_lib.viz.branching import Stream, branch_explorer, branch_votes, cost_bars, draw
from kamal_lib.viz.panels import Picture

# Costs

COSTS = {
    "parameters": {"b1": {"shared": 2.0, "own": 1.0}, "both teachers": {"shared": 0.0, "own": 5.0}},
    "multiply-adds": {"b1": {"shared": 20.0, "own": 30.0}, "both teachers": {"shared": 0.0, "own": 80.0}},
}


def test_a_bar_is_as_long_as_its_parts():
    figure = cost_bars(COSTS)
    assert readable(figure)
    for ax, networks in zip(figure.axes, COSTS.values(), strict=True):
        ends = {}
        for bar in ax.patches:
            ends[round(bar.get_y(), 2)] = bar.get_x() + bar.get_width()
        assert list(ends.values()) == [sum(parts.values()) for parts in networks.values()]
        assert [text.get_text().strip() for text in ax.texts] == [f"{end:g}" for end in ends.values()]
    assert "parameters: b1 3, both teachers 5" in figure.alt


@pytest.mark.parametrize("wrong", [{}, {"parameters": {}}, COSTS | {"seconds": {"b1": {"shared": 1.0}}}])
def test_bars_of_other_networks_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match="the same networks, made of the same parts"):
        cost_bars(wrong)


# Votes

VOTES = {
    "segmentation": [{"block": n, "mean": 0.5, "low": 0.4, "high": 0.7, "wins": 0.5} for n in (3, 4)],
    "depth": [{"block": n, "mean": 0.1, "low": 0.1, "high": 0.1, "wins": n - 3} for n in (3, 4)],
}


@pytest.mark.parametrize("tasks", [["segmentation"], ["segmentation", "depth"]])
def test_votes_show_loss_interval_and_share(tasks: list[str]):
    figure = branch_votes({task: VOTES[task] for task in tasks})
    assert readable(figure)
    for column, task in enumerate(tasks):
        above, below = figure.axes[column], figure.axes[len(tasks) + column]
        (bars,) = above.collections
        np.testing.assert_allclose(
            [line[:, 1] for line in bars.get_segments()], [[r["low"], r["high"]] for r in VOTES[task]]
        )
        assert [bar.get_height() for bar in below.patches] == [row["wins"] for row in VOTES[task]]
    assert "segmentation: block 3 50%, block 4 50%" in figure.alt


def test_votes_without_a_block_are_refused():
    with pytest.raises(ValueError, match="no block for depth"):
        branch_votes({"segmentation": VOTES["segmentation"], "depth": []})


# The explorer

IMAGES = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(2, 6, 8, dtype=torch.long)
METRES = torch.full((2, 6, 8), 2.0)
SEGMENTATION = Stream([0.5, 0.4, 0.3, 0.2], "labels", "SegNet", LABELS, {3: LABELS, 4: LABELS.clone()})
SEGMENTATION.students[4][1, :3] = 1  # half of the second image
DEPTH = Stream([0.1, 0.1, 0.1, 0.2], "depth", "DepthNet", METRES, {3: METRES, 4: METRES + 0.25})
STREAMS = {"segmentation": SEGMENTATION, "depth": DEPTH}
SHARES = {(p, q): {"parameters": 0.1 * p, "multiply-adds": 0.1 * q} for p in (3, 4) for q in (3, 4)}
ALL: dict[str, Any] = {"images": IMAGES, "streams": STREAMS, "shares": SHARES, "classes": 2}


def words(figure: Picture) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text)}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("p", [3, 4])
@pytest.mark.parametrize("q", [3, 4])
def test_draw_at_the_sliders_ends(index: int, p: int, q: int):
    figure = draw(index, {"segmentation": p, "depth": q}, **ALL)
    assert readable(figure)
    apart = 50 if (index, p) == (1, 4) else 0
    assert {f"differs: {apart}%", f"differs by {0.25 * (q - 3):.2f} m"} <= words(figure)
    assert {f"{10 * p}%", f"{10 * q}%"} <= words(figure)
    stars = [
        line.get_xydata().tolist() for ax in figure.axes for line in ax.lines if line.get_marker() == "*"
    ]
    assert stars == [[[p, SEGMENTATION.losses[p - 1]]], [[q, DEPTH.losses[q - 1]]]]
    numbers = sorted(text.get_text() for text in figure.axes[0].texts if text.get_text().isdigit())
    shared, own = range(1, max(p, q) + 1), [*range(p + 1, 5), *range(q + 1, 5)]
    assert numbers == sorted(str(n) for n in [*shared, *own])  # each block once where it is needed


@pytest.mark.parametrize("tasks", [["segmentation"], ["depth"]])
def test_draw_one_task(tasks: list[str]):
    streams = {task: STREAMS[task] for task in tasks}
    shares = {(n,): {"parameters": 0.5} for n in (3, 4)}
    assert readable(draw(0, {tasks[0]: 3}, images=IMAGES, streams=streams, shares=shares, classes=2))


def test_depth_zero_everywhere_is_drawn():
    nothing = replace(DEPTH, taught=0 * METRES, students={3: 0 * METRES})
    assert readable(
        draw(0, {"segmentation": 3, "depth": 3}, **ALL | {"streams": STREAMS | {"depth": nothing}})
    )


@pytest.mark.parametrize("index", [-1, 2])
def test_an_image_that_is_not_there_is_refused(index: int):
    with pytest.raises(ValueError, match=f"image {index} does not exist: there are 2"):
        draw(index, {"segmentation": 3, "depth": 3}, **ALL)


@pytest.mark.parametrize("points", [{"segmentation": 3, "depth": 2}, {"segmentation": 3}])
def test_points_that_were_not_computed_are_refused(points: dict[str, int]):
    with pytest.raises(ValueError, match=r"depth was computed at blocks \[3, 4\], not at"):
        draw(0, points, **ALL)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "normals"}, '"labels" or "depth", got \'normals\''),
        ({"students": {}}, "needs maps of the shape"),
        ({"students": {3: METRES[:1]}}, "needs maps of the shape"),
        ({"students": {5: METRES}}, r"branch points \[5\] are no blocks of the 4"),
    ],
)
def test_a_stream_that_does_not_fit_is_refused(wrong: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        replace(DEPTH, **wrong)


def test_the_explorer_offers_what_was_computed():
    controls, picture = branch_explorer(IMAGES, STREAMS, SHARES, 2).children
    first, second, image = controls.children
    assert [tuple(slider.options) for slider in (first, second)] == [(3, 4), (3, 4)]
    assert [slider.description for slider in (first, second)] == ["segmentation", "depth"]
    assert isinstance(image, ipywidgets.IntSlider)
    assert (image.min, image.max) == (0, 1)
    assert not any(slider.continuous_update for slider in (first, second, image))
    assert picture.layout.height.endswith("px")


def test_sliders_redraw_in_a_kernel():
    make = """
import torch
from kamal_lib.viz.branching import Stream, branch_explorer
maps = torch.ones(2, 4, 4)
streams = {"depth": Stream([0.3, 0.2], "depth", "DepthNet", maps, {1: maps, 2: maps + 0.5})}
shares = {(1,): {"parameters": 0.9}, (2,): {"parameters": 0.6}}
explorer = branch_explorer(torch.rand(2, 3, 4, 4), streams, shares, 1)"""
    after = """
(output,) = explorer.children[1].outputs
print(sorted(output["data"]), output["data"]["text/plain"])"""
    cells = [make, "explorer", "explorer.children[0].children[0].value = 2", after]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, kernel_name="python3", timeout=120).execute()
    said = book.cells[3].outputs[0].text
    assert "['image/png', 'text/plain']" in said
    assert "depth at block 2, loss 0.2; 60% of the parameters" in said
