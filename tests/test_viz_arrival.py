"""A third teacher in pictures: which blocks run, what every network sees, and what the first tasks lose."""

from itertools import product
from typing import Any

import ipywidgets
import nbformat
import numpy as np
import pytest
import torch
from figures import readable
from matplotlib.colors import to_hex
from matplotlib.image import AxesImage
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from nbclient import NotebookClient

from kamal_lib.metrics import DepthErrors, NormalErrors, SegmentationScores
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.encoder_decoder import Architecture, build_network
from kamal_lib.models.target_net import branch_out
from kamal_lib.sample import VOID
from kamal_lib.viz.arrival import draw_arrival, draw_forgetting
from kamal_lib.viz.diagram import LEARNT
from kamal_lib.viz.panels import MISTAKES, Picture
from kamal_lib.viz.room import draw_normals, draw_room, room_widget


def words(figure: Picture) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


# The arrival: Figure 4

TINY = Architecture(widths=(4, 4), convs=(1, 1), pools=(True, True))
TASKS = ("segmentation", "depth")


def blocks_that_run(points: dict[str, int], n: int) -> list[int]:
    """The blocks of a real TargetNet-2 that its forward_from(F^n, n) calls, by number."""
    student = build_network(TINY, {}, seed=0)
    teachers = {task: build_network(TINY, {task: 2}, seed=0) for task in points}
    codings = {task: [ChannelCoding(c) for c in student.channels] for task in points}
    net = branch_out(student, codings, teachers, points).eval()
    ran: list[int] = []
    numbered = list(enumerate(net.trunk, 1))
    for task, p in points.items():
        numbered += list(enumerate(net.branches[task].blocks, p + 1))
    for number, block in numbered:
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    image = torch.rand(1, 3, 8, 8)
    net.forward_from(student.forward_to(image, n), n)
    return sorted(ran)


def boxes(figure: Picture) -> dict[tuple[float, int], tuple[str, str, float]]:
    """{(row, number): (colour, dashes, thickness)} of the blocks of a diagram."""
    found = {}
    for box in figure.findobj(FancyBboxPatch):
        if box.get_width() < 1:
            centre = round(box.get_y() + 0.27, 2), round(box.get_x() + 0.27)
            found[centre] = to_hex(box.get_facecolor()), box.get_linestyle(), box.get_linewidth()
    return found


@pytest.mark.parametrize("points", list(product((3, 4), repeat=2)), ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_blocks_drawn_solid_are_those_that_run(points: tuple[int, int], n: int):
    chosen = dict(zip(TASKS, points, strict=True))
    figure = draw_arrival(blocks=TINY.blocks, points=chosen, n=n)
    assert readable(figure)
    found = boxes(figure)
    student, normals = sorted({y for y, _ in found})[1::-1]
    target = {place: style for place, style in found.items() if place[0] > student}
    solid = sorted(number for (_, number), (_, dashes, _) in target.items() if dashes == "-")
    assert solid == blocks_that_run(chosen, n)
    assert len(target) == max(points) + sum(TINY.blocks - p for p in points)
    assert {m for (y, m), (_, dashes, _) in found.items() if y == normals and dashes == "-"} == {
        m for m in range(1, TINY.blocks + 1) if m > n
    }
    for m in range(1, TINY.blocks + 1):
        colour, dashes, _ = found[student, m]
        assert (dashes == "-") == (m <= n)
        assert (colour == LEARNT) == (m == n)
    yellow = [style for style in found.values() if style[0] == LEARNT]
    assert len(yellow) == 1  # and by its thickness, for those who do not see the colour
    assert yellow[0][2] > max(style[2] for style in found.values() if style[0] != LEARNT)
    for task, p in chosen.items():
        own = f"{task} replaces block {n} of its own branch"
        through = f"{task} through the trunk to block {p}, TargetNet-2's own coding, and its branch"
        assert ((own in figure.alt), (through in figure.alt)) == (p < n, p >= n)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 10])
@pytest.mark.parametrize(
    "points",
    [{"depth": 8}, {"segmentation": 10, "depth": 8}, {"segmentation": 7, "depth": 9, "boxes": 9}],
    ids=len,
)
def test_gates_and_ways_in_of_the_networks_of_the_lessons(points: dict[str, int], n: int):
    figure = draw_arrival(blocks=10, points=points, n=n)
    assert readable(figure)
    (ax,) = figure.axes
    gates = [line for line in ax.lines if line.get_markersize() == 8]
    assert sorted(int(line.get_xdata()[0]) for line in gates) == sorted(points.values())
    (dots,) = [line for line in ax.lines if line.get_markersize() == 5]
    inside = {p for p in points.values() if p < n} | {n for p in points.values() if p >= n}
    assert set(dots.get_xdata()) == {n + 0.37}
    own = sum(p < n for p in points.values())
    assert len(dots.get_xdata()) == own + any(p >= n for p in points.values()) + 1  # NormNet's
    assert inside
    said = words(figure)
    assert {"U", "M", f"$F_{{u2}}^{{{n}}}$", f"$F_{{m}}^{{{n}}}$", f"$F_{{u3}}^{{{n}}}$"} <= {*said}


@pytest.mark.parametrize(
    ("points", "n"), [({}, 1), ({"depth": 11}, 1), ({"depth": 0}, 1), ({"depth": 9}, 0), ({"depth": 9}, 11)]
)
def test_an_arrival_at_no_block_is_refused(points: dict[str, int], n: int):
    with pytest.raises(ValueError, match=rf"block {n} .* must be among blocks 1\.\.10"):
        draw_arrival(blocks=10, points=points, n=n)


# Rooms

NAMES = ("floor", "wall", "bed")
GENERATOR = torch.Generator().manual_seed(0)
SHAPE = (12, 16)


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=GENERATOR), dim=-3)


def room() -> Any:
    labels, normals = torch.randint(0, 3, SHAPE, generator=GENERATOR), unit(3, *SHAPE)
    depth = 1 + 3 * torch.rand(SHAPE, generator=GENERATOR)
    labels[:3], depth[:, :4], normals[:, 9:], normals[:, 0, 0] = VOID, 0, 0, 0
    image = torch.rand(3, *SHAPE, generator=GENERATOR)
    return {"image": image, "labels": labels, "depth": depth, "normals": normals}


def guesses(rooms: int = 2) -> dict[str, torch.Tensor]:
    return {
        "segmentation": torch.randint(0, 3, (rooms, *SHAPE), generator=GENERATOR),
        "depth": 1 + 3 * torch.rand((rooms, *SHAPE), generator=GENERATOR),
        "normals": unit(rooms, 3, *SHAPE).requires_grad_(True),
    }


ROOMS = [room(), room()]
MAPS = {"teachers": guesses(), "TargetNet-2": guesses(), "TargetNet-3\nonline": guesses()}
del MAPS["TargetNet-2"]["normals"]


def of_room(i: int) -> dict[str, dict[str, torch.Tensor]]:
    return {network: {task: m[i] for task, m in maps.items()} for network, maps in MAPS.items()}


def measured(task: str, guess: torch.Tensor, sample: Any) -> float:
    """The score of one room, as the library's metrics know it."""
    metric, key, name = {
        "segmentation": (SegmentationScores(3), "labels", "pixel_acc"),
        "depth": (DepthErrors(), "depth", "abs_rel"),
        "normals": (NormalErrors(), "normals", "angle_median"),
    }[task]
    metric.update(guess[None].detach(), sample[key][None])
    return float(metric.compute()[name])


FORMS = {"segmentation": ("pixel acc. ", "%"), "depth": ("abs rel ", ""), "normals": ("median ", "°")}


@pytest.mark.parametrize("errors", [False, True])
@pytest.mark.parametrize("i", [0, 1])
def test_a_room_with_the_scores_of_the_metrics(i: int, errors: bool):
    figure = draw_room(ROOMS[i], of_room(i), NAMES, errors=errors)
    assert readable(figure)
    said = words(figure)
    for task, (before, after) in FORMS.items():
        shown = [float(word[len(before) :].strip("%°")) for word in said if word.startswith(before)]
        networks = [maps[task][i] for maps in MAPS.values() if task in maps]
        scores = np.array([measured(task, guess, ROOMS[i]) for guess in networks])
        rounding = {"segmentation": 0.51, "depth": 0.00051, "normals": 0.11}[
            task
        ]  # NormalErrors: bins of 0.05
        np.testing.assert_allclose(shown, 100 * scores if after == "%" else scores, atol=rounding)
    assert said.count("not learned") == 1
    assert {*MAPS, "image", "segmentation, true", *NAMES, "void, unknown"} <= {*said}
    assert ({*MISTAKES, "depth error (m)", "angle (degrees)"} <= {*said}) == errors
    assert "TargetNet-3 online depth abs rel" in figure.alt


def test_the_errors_of_a_room_are_where_they_are():
    sample, maps = ROOMS[0], of_room(0)["teachers"]
    right = {"segmentation": sample["labels"], "depth": sample["depth"], "normals": sample["normals"]}
    wrong = right | {"segmentation": right["segmentation"].clone()}
    wrong["segmentation"][-1, :4] += 1
    figure = draw_room(sample, {"wrong": wrong, "other": maps}, NAMES, errors=True)
    pictures = [im.get_array() for im in figure.findobj(AxesImage)]
    segmentation = np.asarray(pictures[4])  # image and three truths come before
    black = (segmentation == 0).all(-1)
    assert np.argwhere(black).tolist() == [[11, column] for column in range(4)]
    assert {"pixel acc. 97%", "abs rel 0.000", "median 0.0°"} <= {*words(figure)}  # 4 of 144 known


def test_the_median_is_that_of_the_known_angles():
    truth = torch.zeros(3, 2, 3)
    truth[2, 0] = -1
    turned = torch.tensor([10.0, 20.0, 70.0]).deg2rad()
    guess = torch.zeros(3, 2, 3)
    guess[0], guess[2] = turned.sin(), -turned.cos()
    sample: Any = {"image": torch.rand(3, 2, 3), "normals": truth}
    figure = draw_normals([sample], {"NormNet": guess[None]})
    assert "median 20.0°" in words(figure)
    assert "room 0: NormNet median 20.0°" in figure.alt


@pytest.mark.parametrize("count", [1, 2])
def test_normals_of_rooms(count: int):
    predictions = {network: maps["normals"][:count] for network, maps in MAPS.items() if "normals" in maps}
    figure = draw_normals(ROOMS[:count], predictions)
    assert readable(figure)
    said = words(figure)
    assert said.count("image") == said.count("truth") == count
    assert {"≥ 60", "angle (degrees)", "faces up", "void, unknown"} <= {*said}
    scores = [measured("normals", maps[i], ROOMS[i]) for i in range(count) for maps in predictions.values()]
    shown = [float(word[len("median ") : -1]) for word in said if word.startswith("median ")]
    np.testing.assert_allclose(shown, scores, atol=0.11)


def test_rooms_without_a_known_pixel_are_drawn():
    nothing: Any = {key: torch.zeros_like(entry) for key, entry in ROOMS[0].items()}
    nothing["labels"] += VOID
    for errors in (False, True):
        figure = draw_room(nothing, of_room(0), NAMES, errors=errors)
        assert readable(figure)
        assert words(figure).count("truth unknown") == 8


def test_rooms_that_do_not_fit_are_refused():
    one = of_room(0)
    with pytest.raises(ValueError, match="a room has no pose: its tasks are segmentation, depth, normals"):
        draw_room(ROOMS[0], {"online": {"pose": torch.zeros(SHAPE)}}, NAMES)
    with pytest.raises(ValueError, match=r"depth needs a decoded map of the truth's shape \(12, 16\)"):
        draw_room(ROOMS[0], {"online": {"depth": MAPS["teachers"]["depth"]}}, NAMES)
    with pytest.raises(ValueError, match="normals needs the truth 'normals' of every sample"):
        draw_room({key: ROOMS[0][key] for key in ("image", "labels", "depth")}, one, NAMES)  # pyright: ignore
    with pytest.raises(ValueError, match=r"2 rooms need as many normals of every network, got \{'a': 1\}"):
        draw_normals(ROOMS, {"a": MAPS["teachers"]["normals"][:1]})
    for samples, predictions in (([], {"a": []}), (ROOMS, {})):
        with pytest.raises(ValueError, match="rooms need as many normals"):
            draw_normals(samples, predictions)
    for samples in ([], ROOMS[:1]):
        with pytest.raises(ValueError, match=f"{len(samples)} rooms need as many maps of every network"):
            room_widget(samples, MAPS, NAMES)


def test_the_widget_offers_every_room_and_both_views():
    controls, picture = room_widget(ROOMS, MAPS, NAMES).children
    slider, switch = controls.children
    assert isinstance(slider, ipywidgets.IntSlider)
    assert (slider.min, slider.max, slider.continuous_update) == (0, 1, False)
    assert tuple(switch.options) == ("predictions", "errors")
    assert picture.layout.height.endswith("px")


def test_controls_redraw_in_a_kernel():
    make = """
import torch
from kamal_lib.viz.room import room_widget
depth, ones = torch.ones(4, 4), torch.ones(2, 4, 4)
truth = {"image": torch.rand(3, 4, 4), "labels": depth.long(), "depth": depth}
rooms = [truth | {"normals": torch.stack([0 * depth, 0 * depth, -depth])} for _ in range(2)]
guesses = ones * torch.tensor([1.0, 1.5])[:, None, None]
widget = room_widget(rooms, {"teacher": {"depth": guesses}}, ["a", "b"])"""
    change = """
room, show = widget.children[0].children
room.value, show.value = 1, "errors\""""
    after = """
(output,) = widget.children[1].outputs
print(sorted(output["data"]), output["data"]["text/plain"])"""
    cells = [make, "widget", change, after]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, kernel_name="python3", timeout=120).execute()
    said = book.cells[3].outputs[0].text
    assert "['image/png', 'text/plain']" in said
    assert "where each network is wrong. teacher depth abs rel 0.500." in said


# Forgetting

SCORES = {
    "teachers": {"mIoU": 0.41, "abs rel": 0.132, "median angle (°)": 12.2},
    "TargetNet-2": {"mIoU": 0.44, "abs rel": 0.125},
    "TargetNet-3\nonline": {"mIoU": 0.425, "abs rel": 0.119, "median angle (°)": 13.0},
}
HIGHER = {"mIoU": True, "abs rel": False, "median angle (°)": False}


@pytest.mark.parametrize("metrics", [["mIoU"], ["abs rel", "mIoU"], [*HIGHER]], ids=len)
def test_forgetting_on_its_own_scales(metrics: list[str]):
    figure = draw_forgetting(SCORES, higher={metric: HIGHER[metric] for metric in metrics})
    assert readable(figure)
    assert [ax.get_title() for ax in figure.axes] == metrics
    for ax, metric in zip(figure.axes, metrics, strict=True):
        dots = {
            int(y): x
            for line in ax.lines
            if len(line.get_xdata()) == 1
            for x, y in line.get_xydata().tolist()
        }
        assert dots == {k: row[metric] for k, row in enumerate(SCORES.values()) if metric in row}
        assert ax.get_xlabel() == ("better →" if HIGHER[metric] else "← better")
        low, high = ax.get_xlim()
        assert low < min(dots.values()) <= max(dots.values()) < high
        shaded = [patch for patch in ax.patches if patch.get_width() > 0]
        assert len(shaded) == (metric in SCORES["TargetNet-2"])
        for patch in shaded:
            edges = patch.get_x(), patch.get_x() + patch.get_width()
            expected = (low, 0.44) if metric == "mIoU" else (0.125, high)
            np.testing.assert_allclose(edges, expected)
    if len(metrics) == 3:
        assert words(figure).count("not learned") == 1
        assert "median angle (°) teachers 12.20, TargetNet-3 online 13.00" in figure.alt


def test_six_panels_and_equal_scores():
    six = {f"metric {k}": k % 2 == 0 for k in range(6)}
    same = {name: dict.fromkeys(six, value) for name, value in (("TargetNet-2", 0.0), ("online", 0))}
    assert readable(draw_forgetting(same, higher=six))


def test_forgetting_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no score of 'DepthNet': `before` is one of teachers, TargetNet-2"):
        draw_forgetting(SCORES, higher=HIGHER, before="DepthNet")
    for higher in ({}, {"mIoU": True, "rmse": False}):
        with pytest.raises(ValueError, match="names at least one of the metrics"):
            draw_forgetting(SCORES, higher=higher)


def test_labels_tell_near_scores_apart():
    near = {name: {"abs rel": 0.145 + k * 1e-4} for k, name in enumerate(("TargetNet-2", "a", "b"))}
    assert "0.14500, a 0.14510, b 0.14520" in draw_forgetting(near, higher={"abs rel": False}).alt.replace(
        "TargetNet-2 ", ""
    )


def test_normals_cannot_arrive_twice():
    with pytest.raises(ValueError, match="normals arrive here, so TargetNet-2 cannot have them yet, got"):
        draw_arrival(blocks=6, points={"segmentation": 5, "normals": 4}, n=3)
