"""Forests of differences, and losses over blocks: what they draw and what their texts say."""

import pytest

from kamal_lib.viz.forest import block_losses, forest


def row(name, low, mean, high, verdict):
    return {"row": name, "difference": mean, "low": low, "high": high, "verdict": verdict}


ROWS = [
    row("a", 0.1, 0.2, 0.3, "holds"),
    row("b", -0.1, 0.0, 0.2, "open"),
    row("c", -3, -2, -1, "opposite seen"),
]


def test_a_line_for_each_comparison_in_each_panel():
    figure = forest({"mIoU": ROWS, "abs rel": ROWS}, names={"a": "Eq. 5"})
    assert [ax.get_xlabel() for ax in figure.axes] == ["mIoU", "abs rel"]
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["Eq. 5", "b", "c"]
    drawn = [line.get_xdata() for line in first.lines]
    assert [list(map(float, x)) for x in drawn[1::2]] == [[0.1, 0.3], [-0.1, 0.2], [-3, -1]]
    assert [float(x[0]) for x in drawn[2::2]] == [0.2, 0.0, -2]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"better", "open", "worse"}
    assert "Eq. 5 mIoU +0.2 (better)" in figure.alt
    assert "c abs rel -2 (worse)" in figure.alt
    figure.png()


@pytest.mark.parametrize("panels", [{}, {"mIoU": []}, {"mIoU": ROWS, "abs rel": ROWS[:2]}])
def test_panels_that_do_not_match(panels):
    with pytest.raises(ValueError, match="every panel needs the same rows in the same order"):
        forest(panels)


def test_the_star_is_the_decoders_minimum():
    """The encoder's smaller loss does not count; the first of equal minima does."""
    losses = {1: {"depth": [0.0, 0.1, 0.5, 0.5]}, 2: {"depth": [0.0, 0.1, 0.5, 0.4]}}
    figure = block_losses(losses, decoder_from=3)
    stars = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "*"]
    assert stars == [3, 4]
    assert figure.alt.endswith("depth, seed 1: block 3; depth, seed 2: block 4.")
    figure.png()
