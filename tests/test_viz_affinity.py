"""Affinity graphs, scores and classes in pictures: they show what they were given, and can be read."""

import math
from typing import Any

import ipywidgets
import nbformat
import numpy as np
import pytest
import torch
from figures import readable
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from nbclient import NotebookClient

from kamal_lib.losses.pairwise import pooled, unit_vectors
from kamal_lib.losses.structured import pair_wise_loss
from kamal_lib.viz.affinity import BLANK, MARK, affinity, affinity_browser, affinity_matrices, draw
from kamal_lib.viz.panels import Picture
from kamal_lib.viz.scores import class_bars, score_histograms


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IMAGES = torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(0))
FEATURES = {"teacher": noise(3, 7, 6, 8), "alone": noise(3, 4, 6, 8, seed=1), "PA": noise(3, 4, 6, 8, seed=2)}
FIRST = {name: maps[0] for name, maps in FEATURES.items()}


def words(figure: Picture) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text)]


# Affinity


@pytest.mark.parametrize("patch", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("place", [(0, 0), (3, 5), (5, 7)])
def test_affinity_is_that_of_the_loss(patch: int, place: tuple[int, int]):
    nodes = unit_vectors(pooled(FIRST["teacher"], (patch, patch), pooling="average"))
    own = nodes[:, place[0] // patch, place[1] // patch]
    wanted = torch.einsum("c,chw->hw", own, nodes)
    torch.testing.assert_close(affinity(FIRST["teacher"], *place, patch), wanted.float())


def test_the_mean_over_all_pixels_is_the_loss():
    few = {name: f[:, :3, :4] for name, f in FIRST.items()}
    told = [draw(IMAGES[0], few, row, column).alt for row in range(3) for column in range(4)]
    means = [float(alt.split("alone ")[1].split(",")[0]) for alt in told]
    wanted = float(pair_wise_loss(few["alone"][None], few["teacher"][None], patch=1))
    assert np.mean(means) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("place", [(0, 0), (0, 7), (5, 7)])
@pytest.mark.parametrize("patch", [1, 4, 6])
@pytest.mark.parametrize("radius", [None, 1])
def test_draw_at_the_sliders_ends(place: tuple[int, int], patch: int, radius: int | None):
    figure = draw(IMAGES[0], FIRST, *place, patch=patch, radius=radius)
    assert readable(figure)
    edge = to_rgba(MARK)
    frames = [frame for ax in figure.axes for frame in ax.patches if frame.get_edgecolor() == edge]
    assert len(frames) == 1 + 3 + 2  # the image, three networks, two differences
    for frame in frames:
        assert isinstance(frame, Rectangle)
        (left, top), wide, high = frame.get_xy(), frame.get_width(), frame.get_height()
        assert left <= place[1] < left + wide <= 8
        assert top <= place[0] < top + high <= 6


@pytest.mark.parametrize("networks", [2, 5])
def test_draw_fewer_and_more_networks_after_a_relu(networks: int):
    features = {f"network {k}": noise(4, 6, 8, seed=k).relu() for k in range(networks)}
    figure = draw(IMAGES[0], features, 2, 3)
    assert readable(figure, rounding=1)
    assert figure.axes[1].images[0].get_clim() == (0, 1)  # no cosine is negative


def test_what_lies_beyond_the_range_is_left_out():
    figure = draw(IMAGES[0], FIRST, 0, 0, radius=1)
    assert "4 of 48 nodes" in words(figure)
    shown = [image.get_array() for ax in figure.axes[1:6] for image in ax.images]
    assert [int((~np.ma.getmaskarray(each)).sum()) for each in shown] == [4] * 5
    near = affinity(FIRST["alone"], 0, 0, 1)[:2, :2] - affinity(FIRST["teacher"], 0, 0, 1)[:2, :2]
    assert f"off by {float(near.square().mean()):.4f}" in words(figure)


def test_a_range_beyond_the_map_is_all():
    assert "12 of 12 nodes" in words(draw(IMAGES[0], FIRST, 2, 2, patch=2, radius=9))


@pytest.mark.parametrize("place", [(-1, 0), (6, 0), (0, 8), (0, -1)])
def test_a_pixel_that_is_not_there(place: tuple[int, int]):
    with pytest.raises(ValueError, match=r"within the features' 6×8, got row"):
        draw(IMAGES[0], FIRST, *place)


@pytest.mark.parametrize("patch", [0, 7])
def test_a_patch_that_is_too_large_or_none(patch: int):
    with pytest.raises(ValueError, match=f"and patch {patch}"):
        draw(IMAGES[0], FIRST, 0, 0, patch=patch)


def test_a_radius_of_nothing():
    with pytest.raises(ValueError, match="at least 1 node, or None for all nodes, got 0"):
        draw(IMAGES[0], FIRST, 0, 0, radius=0)


@pytest.mark.parametrize(
    "features", [{}, {"teacher": noise(3, 6, 8)}, {"teacher": noise(3, 6, 8), "student": noise(3, 6, 7)}]
)
def test_features_that_cannot_be_compared(features: dict[str, torch.Tensor]):
    with pytest.raises(ValueError, match="at least two networks with features of one size"):
        draw(IMAGES[0], features, 0, 0)


# The browser


def parts(browser: Any) -> tuple[Any, ...]:
    """(Grid of buttons, slider of images, of α, of β, of pixels, picture)."""
    controls, picture = browser.children
    clickable, sliders = controls.children
    return clickable, *sliders.children, picture


def test_the_browser_offers_each_pixel_and_what_fits():
    clickable, index, alpha, beta, pixel, picture = parts(affinity_browser(IMAGES, FEATURES, start=(2, 3)))
    assert len(clickable.children) == len(pixel.options) == 6 * 8
    assert clickable.layout.grid_template_columns == "repeat(8, 22px)"
    assert (index.min, index.max, pixel.value) == (0, 2, (2, 3))
    assert [label for label, _ in alpha.options] == ["all", "1", "2", "3", "4"]
    assert [label for label, _ in beta.options] == ["1×1", "2×2", "3×3", "4×4"]
    assert not any(slider.continuous_update for slider in (index, alpha, beta, pixel))
    assert picture.layout.height.endswith("px")


def test_a_click_chooses_the_pixel_and_the_buttons_are_the_image():
    clickable, index, _, _, pixel, _ = parts(affinity_browser(IMAGES, FEATURES))
    clickable.children[8 + 5].click()
    assert pixel.value == (1, 5)
    texts = [button.description for button in clickable.children]
    assert texts.index("×") == 8 + 5
    assert {*texts[: 8 + 5], *texts[8 + 6 :]} == {BLANK}  # an empty text would leave the old mark there
    index.value = 2
    mean = IMAGES[2, :, 4:8, 20:24].mean((1, 2))
    colour = to_rgba(clickable.children[8 + 5].style.button_color)[:3]
    np.testing.assert_allclose(colour, mean, atol=0.005)


def test_a_browser_starts_with_few_messages_and_without_too_many_buttons(monkeypatch):
    """Two for each button that opens; a kernel drops messages when a thousand are waiting."""
    sent = []
    monkeypatch.setattr(ipywidgets.Widget, "_send", lambda self, *a, **k: sent.append(self))
    affinity_browser(IMAGES, FEATURES, start=(2, 3))
    assert not [w for w in sent if isinstance(w, ipywidgets.Button | ipywidgets.ButtonStyle)]
    wide = {name: noise(3, 4, 20, 24) for name in ("teacher", "student")}
    clickable, *_, pixel, _ = parts(affinity_browser(IMAGES, wide))
    assert (len(clickable.children), len(pixel.options)) == (0, 480)


@pytest.mark.parametrize("wrong", [{"teacher": noise(2, 7, 6, 8), "alone": noise(3, 4, 6, 8)}, {}])
def test_features_of_other_images(wrong: dict[str, torch.Tensor]):
    with pytest.raises(ValueError, match="3 images need as many features of every network"):
        affinity_browser(IMAGES, wrong)


def test_a_browser_without_images():
    with pytest.raises(ValueError, match="0 images need"):
        affinity_browser(IMAGES[:0], {name: maps[:0] for name, maps in FEATURES.items()})


def test_clicks_redraw_in_a_kernel():
    make = """
import torch
from kamal_lib.viz.affinity import affinity_browser
maps = torch.rand(2, 3, 4, 6)
browser = affinity_browser(torch.rand(2, 3, 8, 12), {"teacher": maps, "student": maps + 0.1})"""
    click = """
controls, picture = browser.children
controls.children[0].children[6 + 2].click()"""
    after = """
(output,) = picture.outputs
print(sorted(output["data"]), output["data"]["text/plain"])"""
    cells = [nbformat.v4.new_code_cell(cell) for cell in (make, "browser", click, after)]
    book = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(book, kernel_name="python3", timeout=120).execute()
    said = book.cells[3].outputs[0].text
    assert "['image/png', 'text/plain']" in said
    assert "node at row 1, column 2 of 4×6 nodes, 24 connections" in said
    assert len(str(book.cells[1].outputs[0].data["text/plain"])) < 200  # not 24 buttons in words


def test_sliders_are_found_by_name():
    _, index, alpha, beta, pixel, _ = parts(affinity_browser(IMAGES, FEATURES))
    assert [slider.description for slider in (index, alpha, beta, pixel)] == [
        *("image", "α, radius"),
        *("β", "pixel"),
    ]
    assert isinstance(index, ipywidgets.IntSlider)


# Whole graphs


def test_matrices_are_numbers_up_to_8_nodes():
    figure = affinity_matrices({"teacher": torch.eye(3), "student": torch.full((3, 3), 0.256)})
    assert readable(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "0", "0", "0", "1", "0", "0", "0", "1"]
    assert {text.get_text() for text in figure.axes[1].texts} == {".26"}
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "2", "3"]


@pytest.mark.parametrize("nodes", [9, 48])
def test_large_matrices_have_no_numbers(nodes: int):
    figure = affinity_matrices({"teacher": noise(nodes, nodes)})
    assert readable(figure)
    assert not figure.axes[0].texts


def test_a_small_negative_number_is_no_minus_zero():
    figure = affinity_matrices({"a": torch.tensor([[-0.001, -0.5]] * 2)})
    assert [text.get_text() for text in figure.axes[0].texts] == ["0", "-.5"] * 2


@pytest.mark.parametrize("matrices", [{}, {"a": torch.eye(2), "b": torch.eye(3)}])
def test_matrices_of_other_nodes(matrices: dict[str, torch.Tensor]):
    with pytest.raises(ValueError, match="need the same nodes"):
        affinity_matrices(matrices)


# Scores


@pytest.mark.parametrize("networks", [1, 5])
def test_histograms_count_every_image(networks: int):
    scores = {f"network {k}": noise(50, seed=k) + k for k in range(networks)}
    figure = score_histograms(scores)
    assert readable(figure, rounding=1)
    for ax, (name, each) in zip(figure.axes, scores.items(), strict=True):
        assert sum(bar.get_height() for bar in ax.patches) == 50
        (line,) = ax.lines
        assert line.get_xdata()[0] == pytest.approx(float(scores["network 0"].mean()))
        assert f"{name} {float(each.mean()):.3g}" in figure.alt


def test_equal_scores_have_a_histogram():
    assert readable(score_histograms({"teacher": torch.ones(4)}), rounding=1)


@pytest.mark.parametrize(
    "scores", [{}, {"teacher": torch.zeros(0)}, {"teacher": torch.tensor([1.0, math.nan])}]
)
def test_scores_that_are_none(scores: dict[str, torch.Tensor]):
    with pytest.raises(ValueError, match="at least one score, and finite ones"):
        score_histograms(scores)


IOUS = {
    "teacher": {"wall": 0.5, "floor": 0.9, "tv": math.nan},
    "alone": {"wall": 0.4, "floor": 0.8, "tv": math.nan},
    "PA": {"wall": 0.6, "floor": 0.7, "tv": math.nan},
}


def test_bars_of_classes_stand_in_the_teachers_order():
    figure = class_bars(IOUS, reference="teacher")
    assert readable(figure)
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["floor", "wall"]  # no tv anywhere
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], [0.8, 0.4, 0.7, 0.6])
    (lines,) = ax.collections
    assert [segment[0][1] for segment in lines.get_segments()] == [0.9, 0.5]
    assert "alone 0.600" in figure.alt


def test_bars_without_a_reference():
    figure = class_bars(IOUS)
    assert len(figure.axes[0].patches) == 6
    assert not figure.axes[0].collections


@pytest.mark.parametrize("reference", [None, "nobody"])
@pytest.mark.parametrize("ious", [{}, {"a": {"wall": 1.0}, "b": {"floor": 1.0}}])
def test_bars_that_cannot_be_compared(ious: dict[str, dict[str, float]], reference: str | None):
    with pytest.raises(ValueError, match="the same classes, and a reference among them"):
        class_bars(ious, reference=reference)
