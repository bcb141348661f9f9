"""Depth in pictures: one pixel's choice among bins, and the depth along a row of pixels.

`profile_browser` is a widget; `draw` is its static twin.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from typing import cast

import ipywidgets
import numpy as np
from IPython.display import display
from jaxtyping import Float
from matplotlib.ticker import NullFormatter
from torch import Tensor

from kamal_lib.sample import Sample
from kamal_lib.viz.curves import STYLES
from kamal_lib.viz.panels import Picture

TRUTH = ("black", "-", 2.5)
"""How the true depth is drawn along a row; `STYLES` are the networks'."""


def draw_bins(edges: Sequence[float], p: Sequence[float], sums: Mapping[str, float]) -> Picture:
    """One pixel's choice among bins on two axes, metres and their logarithm, and the depths made of it.

    edges  metres, ascending, one more than there are bins
    p      of each bin
    sums   {name: depth in metres}, a line each
    Raises ValueError for edges that do not ascend from above 0, or are not one more than the bins.
    """
    if len(edges) != len(p) + 1 or not all(0 < a < b for a, b in pairwise(edges)):
        raise ValueError(f"{len(p)} bins need {len(p) + 1} ascending edges above 0, got {list(edges)}")
    figure = Picture(figsize=(6.8, 2.1), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, scale in zip(axes, ("linear", "log"), strict=True):
        ax.bar(edges[:-1], p, np.diff(edges), align="edge", color="0.88", edgecolor="0.55", linewidth=0.8)
        for edge in edges:  # bins of p = 0, too
            ax.axvline(edge, color="0.75", linewidth=0.8)
        for (name, depth), (colour, dashes, _) in zip(sums.items(), cycle(STYLES), strict=False):
            ax.axvline(depth, color=colour, linestyle=dashes, linewidth=2, label=f"{name}: {depth:.2f} m")
        ax.set(xscale=scale, xlim=(edges[0], edges[-1]), ylim=(0, 1.08 * max(p)))
        ax.set_xlabel("depth (m)" if scale == "linear" else "depth (m), on a logarithmic axis", fontsize=9)
        ax.tick_params(labelsize=8)
    octaves = [2.0**k for k in range(-9, 10) if edges[0] <= 2.0**k <= edges[-1]]
    axes[1].set_xticks(octaves, [f"{x:g}" for x in octaves])
    axes[1].xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("p of the bin", fontsize=9)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    told = ", ".join(f"{name} {depth:.2f} m" for name, depth in sums.items())
    figure.alt = f"One pixel's probabilities of {len(p)} bins on a linear and a logarithmic axis; {told}."
    return figure


def draw(sample: Sample, guesses: Mapping[str, Float[Tensor, "height width"]], row: int) -> Picture:
    """The depth along a row of pixels: the image with the row marked, the truth, and a curve a network.

    guesses  {network: depth in metres}; where the true depth is unknown its curve has a gap
    The vertical axis is depth, the camera below: as if the room were seen from above. Raises ValueError for a
    row that is not there, and maps of another size than the sample's.
    """
    entries = cast(Mapping[str, Tensor], sample)
    truth = entries["depth"].as_subclass(Tensor)
    wrong = {name: tuple(d.shape) for name, d in guesses.items() if d.shape != truth.shape}
    if wrong or not 0 <= row < len(truth):
        raise ValueError(
            f"maps of {tuple(truth.shape)} pixels and a row from 0 to {len(truth) - 1} are needed, got row "
            f"{row} and maps of another size {wrong}"
        )
    line = np.where(truth[row].numpy() > 0, truth[row].numpy(), np.nan)
    figure = Picture(figsize=(8.0, 2.6))  # placed by hand: a computed layout takes as long as the drawing
    ax = figure.add_axes((0.01, 0.16, 0.32, 0.74))
    image = entries["image"].as_subclass(Tensor).movedim(0, -1).numpy().clip(0, 1)
    ax.imshow(image, interpolation="nearest")
    ax.axhline(row, color="black", linewidth=3)
    ax.axhline(row, color="white", linewidth=1.5)
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"row {row}", fontsize=9)
    ax = figure.add_axes((0.385, 0.16, 0.4, 0.74))
    columns = np.arange(truth.shape[1])
    ax.plot(columns, line, color=TRUTH[0], linestyle=TRUTH[1], linewidth=TRUTH[2], label="truth")
    told = []
    for (name, depth), (colour, dashes, _) in zip(guesses.items(), cycle(STYLES), strict=False):
        ax.plot(columns, depth[row].numpy(), color=colour, linestyle=dashes, linewidth=1.5, label=name)
        off = np.abs(depth[row].numpy() - line)
        known = off[~np.isnan(off)]
        told.append(f"{name} off by {known.mean():.2f} m" if known.size else f"{name}")
    top = max(float(d.max()) for d in (truth, *guesses.values()))  # of the whole image: rows can be compared
    ax.set(xlim=(0, columns[-1]), ylim=(0, 1.03 * top))
    ax.set_xlabel("column", fontsize=9)
    ax.set_ylabel("depth (m)", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.3)
    place = {"loc": "center left", "bbox_to_anchor": (0.79, 0.53)}
    figure.legend(*ax.get_legend_handles_labels(), fontsize=8, frameon=False, **place)
    figure.alt = f"Depth along row {row} of {len(truth)}: {', '.join(['the truth', *told])}."
    return figure


def profile_browser(
    samples: Sequence[Sample], guesses: Mapping[str, Float[Tensor, "rooms height width"]]
) -> ipywidgets.Widget:
    """A slider over samples, one over rows, and `draw`.

    Raises ValueError unless every network has one map a sample, and there is at least one of both.
    """
    counts = {name: len(maps) for name, maps in guesses.items()}
    if not samples or not counts or set(counts.values()) != {len(samples)}:
        raise ValueError(f"{len(samples)} samples need as many depth maps of every network, got {counts}")
    height = next(iter(guesses.values())).shape[1]
    room = ipywidgets.IntSlider(0, 0, len(samples) - 1, description="room", continuous_update=False)
    row = ipywidgets.IntSlider(height // 2, 0, height - 1, description="row", continuous_update=False)
    picture = ipywidgets.interactive_output(
        lambda room, row: display(draw(samples[room], {n: m[room] for n, m in guesses.items()}, row)),
        {"room": room, "row": row},
    )
    picture.layout.height = "310px"
    return ipywidgets.VBox([ipywidgets.HBox([room, row]), picture])
