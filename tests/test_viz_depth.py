"""Pictures of depth: bins, and the browser of rows at both ends of its sliders."""

import ipywidgets
import nbformat
import numpy as np
import pytest
import torch
from figures import readable
from nbclient import NotebookClient

from kamal_lib.viz.depth import draw, draw_bins, profile_browser
from kamal_lib.viz.panels import Picture

IMAGE = torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0))


# Bins


def test_bins_are_drawn_on_both_axes():
    edges, p = [0.5, 1.0, 2.0, 4.0], [0.5, 0.0, 0.5]
    figure = draw_bins(edges, p, {"sum of logarithms": 1.5, "linear sum": 2.0})
    assert readable(figure)
    assert [ax.get_xscale() for ax in figure.axes] == ["linear", "log"]
    for ax in figure.axes:
        bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in ax.patches]
        assert bars == [(0.5, 0.5, 0.5), (1.0, 1.0, 0.0), (2.0, 2.0, 0.5)]
        lines = {line.get_label(): line.get_xdata()[0] for line in ax.lines}
        assert lines["sum of logarithms: 1.50 m"] == 1.5
        assert lines["linear sum: 2.00 m"] == 2.0
    assert "linear sum 2.00 m" in figure.alt


@pytest.mark.parametrize("edges", [[1.0, 2.0], [0.0, 1.0, 2.0], [1.0, 1.0, 2.0]])
def test_edges_that_do_not_fit_are_refused(edges: list[float]):
    with pytest.raises(ValueError, match="2 bins need 3 ascending edges above 0"):
        draw_bins(edges, [0.5, 0.5], {"sum": 1.0})


# Rows

DEPTH = torch.arange(1.0, 49.0).view(6, 8) / 10
ROOMS = [{"image": IMAGE, "depth": DEPTH}, {"image": IMAGE.flip(-1), "depth": 0 * DEPTH}]  # unknown
GUESSES = {"teacher": torch.stack([DEPTH + 0.25, DEPTH]), "student": torch.stack([DEPTH, DEPTH + 1])}


def curves(figure: Picture) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[1].lines}


@pytest.mark.parametrize("room", [0, 1])
@pytest.mark.parametrize("row", [0, 5])
def test_draw_at_the_sliders_ends(room: int, row: int):
    guesses = {name: maps[room] for name, maps in GUESSES.items()}
    figure = draw(ROOMS[room], guesses, row)  # pyright: ignore[reportArgumentType]
    assert readable(figure)
    found = curves(figure)
    assert [*found] == ["truth", "teacher", "student"]
    for name, guess in guesses.items():
        np.testing.assert_allclose(found[name], guess[row])
    assert np.isnan(found["truth"]).all() == (room == 1)
    assert {line.get_ydata()[0] for line in figure.axes[0].lines} == {row}
    assert figure.axes[1].get_ylim()[1] >= max(float(g.max()) for g in guesses.values())
    assert ("teacher off by 0.25 m" in figure.alt) == (room == 0)


def test_the_longest_names_fit():
    names = ("labels alone", "PA + HO, unlabelled", "teacher", "PI", "PA + HO")
    assert readable(draw(ROOMS[0], dict.fromkeys(names, DEPTH), 3))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("row", [-1, 6])
def test_a_row_that_is_not_there_is_refused(row: int):
    with pytest.raises(ValueError, match="a row from 0 to 5 are needed"):
        draw(ROOMS[0], {"teacher": DEPTH}, row)  # pyright: ignore[reportArgumentType]


def test_maps_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"another size \{'teacher': \(5, 8\)\}"):
        draw(ROOMS[0], {"teacher": DEPTH[:5]}, 0)  # pyright: ignore[reportArgumentType]


def test_the_browser_offers_all_rooms_and_rows():
    controls, picture = profile_browser(ROOMS, GUESSES).children  # pyright: ignore[reportArgumentType]
    room, row = controls.children
    assert all(isinstance(slider, ipywidgets.IntSlider) for slider in (room, row))
    assert (room.min, room.max) == (0, 1)
    assert (row.min, row.max) == (0, 5)
    assert not any(slider.continuous_update for slider in (room, row))
    assert picture.layout.height.endswith("px")


@pytest.mark.parametrize("wrong", [{}, {"teacher": DEPTH[None]}])
def test_a_browser_without_a_map_for_each_room_is_refused(wrong: dict[str, torch.Tensor]):
    with pytest.raises(ValueError, match="2 samples need as many depth maps of every network"):
        profile_browser(ROOMS, wrong)  # pyright: ignore[reportArgumentType]


def test_sliders_redraw_in_a_kernel():
    make = """
import torch
from kamal_lib.viz.depth import profile_browser
room = {"image": torch.rand(3, 4, 6), "depth": torch.ones(4, 6)}
browser = profile_browser([room, room], {"teacher": torch.full((2, 4, 6), 1.5)})"""
    after = """
(output,) = browser.children[1].outputs
print(sorted(output["data"]), output["data"]["text/plain"])"""
    cells = [make, "browser", "browser.children[0].children[1].value = 3", after]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, kernel_name="python3", timeout=120).execute()
    said = book.cells[3].outputs[0].text
    assert "['image/png', 'text/plain']" in said
    assert "Depth along row 3 of 4: the truth, teacher off by 0.50 m" in said
