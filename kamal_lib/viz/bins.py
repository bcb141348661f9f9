"""Depth as a choice among bins: what Eq. 2 of Ye et al. makes of one pixel's response, to play with."""

import ipywidgets
import numpy as np
from IPython.display import display

from kamal_lib.viz.curves import STYLES
from kamal_lib.viz.panels import Picture


def draw(bins: int = 8, bin_length: float = 0.5, position: float = 1.6, sharpness: float = 2.0) -> Picture:
    """p(b | x) of one pixel as bars, and the two depths that far edges (Eq. 2) and centres make of it.

    bins, bin_length  N_d and l, metres
    position          metres; the response is r_b = −sharpness · |centre of bin b − position| / l
    sharpness         0: all bins are equally likely
    Raises ValueError for numbers that describe no bins.
    """
    if bins < 1 or not bin_length > 0 or position < 0 or sharpness < 0:
        raise ValueError(
            f"at least one bin, a length above 0, and a position and a sharpness from 0 on are needed, got "
            f"{bins}, {bin_length}, {position} and {sharpness}"
        )
    edges = bin_length * np.arange(1, bins + 1)
    centres = edges - bin_length / 2
    response = -sharpness * abs(centres - position) / bin_length
    p = np.exp(response - response.max())
    p /= p.sum()
    by_edge, by_centre = float(p @ edges), float(p @ centres)

    figure = Picture(figsize=(7, 3.2))
    ax = figure.add_axes((0.08, 0.26, 0.9, 0.64))  # by hand: a computed layout takes as long as the drawing
    ax.bar(edges - bin_length, p, bin_length, align="edge", color="0.88", edgecolor="0.55", linewidth=0.8)
    marks = (
        (position, ("black", ":"), f"the response peaks at {position:.2f} m"),
        (by_centre, STYLES[0][:2], f"D from centres: {by_centre:.3f} m"),
        (by_edge, STYLES[1][:2], f"D from far edges, Eq. 2: {by_edge:.3f} m"),
    )
    for x, (colour, dashes), label in marks:
        ax.axvline(x, color=colour, linestyle=dashes, linewidth=2, label=label)
    ax.set(xlabel="depth (m)", ylabel="p(b | x)", xlim=(0, 1.02 * max(edges[-1], position)), ylim=(0, 1.05))
    difference = f"the two depths differ by {by_edge - by_centre:.3f} m = l / 2"
    ax.set_title(f"$N_d$ = {bins}, l = {bin_length:.2f} m: {difference}", fontsize=10)
    figure.legend(loc="lower center", ncols=3, fontsize=8, frameon=False)
    told = "; ".join(label for *_, label in marks)
    figure.alt = (
        f"Probabilities of bins 1 to {bins}, each {bin_length:.2f} m long, the largest {p.max():.2f}; {told}."
    )
    return figure


def bin_explorer() -> ipywidgets.Widget:
    """Four sliders over the arguments of `draw`, and its figure."""
    late = {"continuous_update": False}
    sliders = {
        "bins": ipywidgets.IntSlider(8, 1, 40, description="bins N_d", **late),
        "bin_length": ipywidgets.FloatSlider(0.5, min=0.05, max=1, step=0.05, description="length l", **late),
        "position": ipywidgets.FloatSlider(1.6, min=0, max=10, step=0.1, description="peak (m)", **late),
        "sharpness": ipywidgets.FloatSlider(2, min=0, max=10, step=0.5, description="sharpness", **late),
    }
    picture = ipywidgets.interactive_output(lambda **values: display(draw(**values)), sliders)
    picture.layout.height = "340px"
    rows = list(sliders.values())
    return ipywidgets.VBox([ipywidgets.HBox(rows[:2]), ipywidgets.HBox(rows[2:]), picture])
