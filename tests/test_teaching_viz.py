"""The live view of a training, the bins of a depth and the browser of teachers: right, whole, and alive."""

from collections.abc import Callable

import ipywidgets
import nbformat
import numpy as np
import pytest
import torch
from figures import readable
from nbclient import NotebookClient
from torchvision import tv_tensors

from kamal_lib.losses.dense import expected_depth
from kamal_lib.sample import VOID, Depth, Normals, Sample
from kamal_lib.viz import bins, live
from kamal_lib.viz.panels import Picture
from kamal_lib.viz.widgets import draw_prediction, teacher_browser

ROWS = [{"epoch": float(e), "depth": 2.0 / e} for e in range(1, 6)]
NAMES = ("wall", "floor", "window")


def executed(*cells: str) -> list[nbformat.NotebookNode]:
    """The cells, run in a kernel."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, kernel_name="python3", timeout=120).execute()
    return book.cells


# Bins


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("length", [0.05, 1.0])
@pytest.mark.parametrize("position", [0.0, 10.0])
@pytest.mark.parametrize("sharpness", [0.0, 10.0])
def test_bins_at_the_sliders_ends(count: int, length: float, position: float, sharpness: float):
    figure = bins.draw(count, length, position, sharpness)
    assert readable(figure)
    (ax,) = figure.axes
    p = torch.tensor([patch.get_height() for patch in ax.patches], dtype=torch.float64)
    assert len(p) == count
    assert torch.isclose(p.sum(), torch.tensor(1.0, dtype=torch.float64))
    at = {line.get_label().split(":")[0]: line.get_xdata()[0] for line in ax.lines}
    by_edge, by_centre = at["D from far edges, Eq. 2"], at["D from centres"]
    library = expected_depth(p.log().clamp(min=-200).float().view(1, count, 1, 1), bin_length=length)
    assert by_edge == pytest.approx(float(library), rel=1e-5)
    assert by_edge - by_centre == pytest.approx(length / 2)
    assert all(low <= x <= high for x in at.values() for low, high in [ax.get_xlim()])
    if sharpness == 0:
        assert by_centre == pytest.approx(count * length / 2)


def test_a_sharp_response_says_its_position():
    figure = bins.draw(bins=20, bin_length=0.1, position=1.25, sharpness=10.0)
    (centred,) = [line for line in figure.axes[0].lines if "centres" in line.get_label()]
    assert centred.get_xdata()[0] == pytest.approx(1.25, abs=1e-3)


@pytest.mark.parametrize("wrong", [{"bins": 0}, {"bin_length": 0.0}, {"position": -1.0}, {"sharpness": -0.5}])
def test_what_is_no_bin_is_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="at least one bin, a length above 0"):
        bins.draw(**wrong)


def test_the_explorer_offers_the_arguments_of_its_twin():
    explorer = bins.bin_explorer()
    first, second, picture = explorer.children
    sliders = [*first.children, *second.children]
    assert [(s.min, s.max) for s in sliders] == [(1, 40), (0.05, 1), (0, 10), (0, 10)]
    assert bins.draw(*(s.value for s in sliders)).alt == bins.draw().alt
    assert not any(s.continuous_update for s in sliders)
    assert picture.layout.height.endswith("px")


# The browser of teachers


def sample_of(size: tuple[int, int], *, known: bool = True) -> Sample:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, size, generator=rng) if known else torch.full(size, VOID)
    normals = torch.nn.functional.normalize(torch.randn(3, *size, generator=rng), dim=0)
    return Sample(
        image=tv_tensors.Image(torch.rand(3, *size, generator=rng)),
        labels=tv_tensors.Mask(labels),
        depth=Depth((1 + torch.rand(size, generator=rng)) * known),
        normals=Normals(normals * known),
    )


SAMPLES = [sample_of((12, 16)), sample_of((12, 16), known=False)]
GUESSES = {
    "SegNet": ("labels", torch.stack([s["labels"] % 3 for s in SAMPLES])),
    "DepthNet": ("depth", torch.full((2, 12, 16), 1.5)),
    "NormNet": ("normals", torch.tensor([0.0, 0, -1]).view(1, 3, 1, 1).expand(2, 3, 12, 16)),
}


@pytest.mark.parametrize("teacher", GUESSES)
@pytest.mark.parametrize("size", [(12, 16), (1, 1), (3, 2)])
@pytest.mark.parametrize("known", [True, False])
def test_a_prediction_is_shown_beside_truth_and_error(teacher: str, size: tuple[int, int], known: bool):
    key, maps = GUESSES[teacher]
    guess = maps[0][..., : size[0], : size[1]]
    figure = draw_prediction(sample_of(size, known=known), teacher, key, guess, NAMES)
    assert readable(figure)
    assert [ax.get_title() for ax in figure.axes[:4]] == ["image", "truth", teacher, f"{teacher}\nerror"]


def test_teacher_browser_offers_every_sample_and_teacher():
    controls, picture = teacher_browser(SAMPLES, GUESSES, NAMES).children
    image, teacher = controls.children
    assert isinstance(image, ipywidgets.IntSlider)
    assert (image.min, image.max, image.continuous_update) == (0, 1, False)
    assert teacher.options == ("SegNet", "DepthNet", "NormNet")
    assert picture.layout.height.endswith("px")


@pytest.mark.parametrize("samples", [[], SAMPLES[:1]])
def test_teacher_browser_refuses_other_numbers_of_maps(samples: list[Sample]):
    with pytest.raises(ValueError, match=rf"{len(samples)} samples need as many predictions of every"):
        teacher_browser(samples, GUESSES, NAMES)


# The live view


@pytest.mark.parametrize("done", [1, 5])
def test_the_axis_is_as_long_as_the_whole_training(done: int):
    figure = live.draw(ROWS[:done], "depth", 40, label="Eq. 3, m²")
    assert readable(figure)
    (ax,) = figure.axes
    assert ax.get_xlim() == (0.5, 40.5)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [(e, 2 / e) for e in range(1, done + 1)])
    assert (ax.get_title(), ax.get_ylabel()) == (f"depth: epoch {done} of 40", "Eq. 3, m²")
    assert f"Epoch {done} of 40" in figure.alt


class Shown:
    """Stands for a display handle, and counts."""

    def __init__(self, picture: Picture):
        self.alts = [picture.alt]

    def update(self, picture: Picture) -> None:
        self.alts.append(picture.alt)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[str]]]:
    """As in a notebook; returns what stood at each place, in turn."""
    handles: list[Shown] = []

    def display(picture: Picture, *, display_id: bool) -> Shown:
        assert display_id
        handles.append(Shown(picture))
        return handles[-1]

    monkeypatch.setattr(live, "get_ipython", object)
    monkeypatch.setattr(live, "display", display)
    return lambda: [handle.alts for handle in handles]


def epochs(screen: Callable[[], list[list[str]]]) -> list[list[str]]:
    return [[alt.split("Epoch ")[1] for alt in alts] for alts in screen()]


def test_it_is_redrawn_in_one_place_and_always_at_the_end(screen: Callable[[], list[list[str]]]):
    watch = live.Live("depth", 5, every=1000.0)
    for done in range(1, 6):
        watch(ROWS[:done])
    assert epochs(screen) == [["1 of 5.", "5 of 5."]]
    eager = live.Live("depth", 5, every=0.0)
    for done in range(1, 6):
        eager(ROWS[:done])
    assert epochs(screen)[1] == [f"{e} of 5." for e in range(1, 6)]


def test_an_early_look_stands_below_the_curve(screen: Callable[[], list[list[str]]]):
    looks = []

    def look() -> Picture:
        figure = Picture()
        figure.alt = f"Epoch look {len(looks)}"
        looks.append(figure)
        return figure

    watch = live.Live("depth", 5, every=0.0, look=look)
    for done in (0, 1, 2):  # nothing is drawn before there is an epoch
        watch(ROWS[:done])
    assert epochs(screen) == [["1 of 5.", "2 of 5."], ["look 0", "look 1"]]


def test_outside_of_a_notebook_nothing_happens(capsys: pytest.CaptureFixture[str]):
    watch = live.Live("depth", 5, every=0.0, look=lambda: pytest.fail("nobody looks"))
    watch(ROWS)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ValueError, match="at least one epoch, got 0"):
        live.Live("depth", 0)


def test_a_kernel_keeps_the_last_picture():
    live_cell, *_ = executed("""
from kamal_lib.viz.live import Live
rows = [{"epoch": float(e), "depth": 2.0 / e} for e in range(1, 4)]
watch = Live("depth", 3, every=0.0)
for done in range(1, 4):
    watch(rows[:done])""")
    (output,) = live_cell.outputs
    assert output.output_type == "display_data"
    assert "Epoch 3 of 3." in output.data["text/plain"]
    assert output.data["image/png"]


def test_sliders_redraw_in_a_kernel():
    widgets = """
import torch
from kamal_lib.viz.bins import bin_explorer
from kamal_lib.viz.widgets import teacher_browser
explorer = bin_explorer()
shown = {"image": torch.rand(3, 4, 4), "depth": torch.ones(4, 4)}
browser = teacher_browser([shown, shown], {"DepthNet": ("depth", torch.ones(2, 4, 4))})"""
    moves = """
explorer.children[0].children[0].value = 40
browser.children[0].children[0].value = 1"""
    after = """
for widget in (explorer.children[2], browser.children[1]):
    (output,) = widget.outputs
    print(sorted(output["data"]), output["data"]["text/plain"][:30])"""
    cells = executed(widgets, "explorer", "browser", moves, after)
    lines = cells[4].outputs[0].text.splitlines()
    assert [line.split("] ")[0] for line in lines] == ["['image/png', 'text/plain'"] * 2
    assert "bins 1 to 40" in lines[0]
