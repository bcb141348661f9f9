"""Affinity graphs (Liu et al., section 2.1): which places of a feature map are alike, network by network.

Tensors in, figures out. `affinity_browser` is a widget; `draw` is its static twin.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import torch.nn.functional as F
from IPython.display import display
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.patches import Rectangle
from torch import Tensor

from kamal_lib.viz.panels import LEVELS, MAPS, Picture

ALIKE = colormaps["cividis"].resampled(LEVELS)
SIGNED = colormaps["PuOr"].resampled(LEVELS)
FAR = "0.85"
"""The colour of nodes beyond the range α."""
MOST = 0.25
"""Where the colours of a squared difference end."""
MARK = "#d55e00"
BLANK = "\N{NO-BREAK SPACE}"
"""The text of a button without one: a browser keeps the old text where the new one is empty."""
MOST_BUTTONS = 400
"""Of a clickable image; beyond it the page is slow, and a kernel drops messages."""


def affinity(
    features: Float[Tensor, "channels height width"], row: int, column: int, patch: int
) -> Float[Tensor, "rows columns"]:
    """a_ij of Eq. 2 for one node i, that of the pixel at `row` and `column`, and every node j.

    A node is the mean of patch × patch pixels, fewer at the border; a_ij is the cosine of the two means.
    """
    nodes = F.normalize(F.avg_pool2d(features[None], patch, ceil_mode=True)[0], dim=0)
    return (nodes * nodes[:, row // patch, column // patch, None, None]).sum(0)


def draw(
    image: Float[Tensor, "3 height width"],
    features: Mapping[str, Float[Tensor, "_ rows columns"]],
    row: int,
    column: int,
    *,
    patch: int = 1,
    radius: int | None = None,
) -> Picture:
    """The affinity of one pixel's node to all others, for each network; below, how far from the teacher's.

    features  {network: its last features of `image`}, of one height and width; the first is the teacher
    patch     pixels of a node's side, the granularity β = patch × patch
    radius    Chebyshev distance in nodes, the range α; None: all nodes. What lies beyond is grey
    A title of the lower row has the mean squared difference over this node's connections. Raises ValueError
    for fewer than two networks, features of other sizes, a pixel or a patch beyond them, a radius below 1.
    """
    height, width = _size(features)
    if not (0 <= row < height and 0 <= column < width and 1 <= patch <= min(height, width)):
        raise ValueError(
            f"pixel and patch must lie within the features' {height}×{width}, got row {row}, column {column} "
            f"and patch {patch}: rows and columns count from 0"
        )
    if radius is not None and radius < 1:
        raise ValueError(f"the radius must be at least 1 node, or None for all nodes, got {radius}")
    maps = {name: affinity(f, row, column, patch).numpy() for name, f in features.items()}
    rows, columns = next(iter(maps.values())).shape
    i, j = np.ogrid[:rows, :columns]
    apart = np.maximum(abs(i - row // patch), abs(j - column // patch))
    near = apart <= (max(rows, columns) if radius is None else radius)
    signed = any(bool((f < 0).any()) for f in features.values())
    tints = {"affinity a": (SIGNED if signed else ALIKE, Normalize(-1 if signed else 0, 1))}
    tints["squared difference"] = (MAPS["error"], Normalize(0, MOST))

    count = 1 + len(maps)
    cell = (9.5 - 0.95 - 0.08 * count) / count  # by hand, in inches: a computed layout takes as long again
    tall = cell * image.shape[1] / image.shape[2]
    figure = Picture(figsize=(9.5, 2 * tall + 0.7))
    high = figure.get_figheight()

    def place(line: int, at: int, title: str) -> Any:
        bottom = high - (line + 1) * tall - 0.25 - 0.35 * line
        box = ((0.08 + at * (cell + 0.08)) / 9.5, bottom / high, cell / 9.5, tall / high)
        ax = figure.add_axes(box, xticks=[], yticks=[], facecolor=FAR)
        ax.set_title(title, fontsize=9, pad=3)
        return ax

    ax = place(0, 0, f"{int(near.sum())} of {near.size} nodes")
    ax.imshow(image.movedim(0, -1).clamp(0, 1).numpy(), extent=(0, width, height, 0))
    _mark(ax, row // patch * patch, column // patch * patch, patch, (height, width))
    teacher, told = next(iter(maps)), []
    for at, (name, a) in enumerate(maps.items(), 1):
        layers = [(name, a, *tints["affinity a"])]
        if name != teacher:
            square = (a - maps[teacher]) ** 2
            told.append(f"{name} {square[near].mean():.4f}")
            layers.append((f"off by {square[near].mean():.4f}", square, *tints["squared difference"]))
        for line, (title, values, colours, norm) in enumerate(layers):
            ax = place(line, at, title)
            extent = (0, columns * patch, rows * patch, 0)  # the last nodes may reach beyond the map
            shown = np.ma.masked_where(~near, values)
            ax.imshow(shown, colours, norm, extent=extent, interpolation="nearest")
            ax.set(xlim=(0, width), ylim=(height, 0))
            _mark(ax, row // patch * patch, column // patch * patch, patch, (height, width))
    for line, (label, (colours, norm)) in enumerate(tints.items()):
        bottom = high - (line + 1) * tall - 0.25 - 0.35 * line
        cax = figure.add_axes((8.67 / 9.5, bottom / high, 0.1 / 9.5, tall / high))
        bar = figure.colorbar(ScalarMappable(norm, colours), cax=cax, extend="max" if line else "neither")
        bar.set_label(label, size=8)
        bar.ax.tick_params(labelsize=8)
        figure.exact = [*figure.exact, *(to_hex(c) for c in colours(range(LEVELS)))]
    figure.exact = [*figure.exact, MARK]
    figure.alt = (
        f"Affinity of the node at row {row // patch}, column {column // patch} of {rows}×{columns} nodes, "
        f"{int(near.sum())} connections, for {', '.join(maps)}. Mean squared difference from the teacher: "
        f"{', '.join(told)}."
    )
    return figure


def affinity_browser(
    images: Float[Tensor, "batch 3 height width"],
    features: Mapping[str, Float[Tensor, "_ _ rows columns"]],
    *,
    patches: Sequence[int] = (1, 2, 3, 4),
    start: tuple[int, int] = (0, 0),
) -> ipywidgets.Widget:
    """Click a pixel of the image: a button for each pixel of the features, in the image's mean colour there.

    Sliders choose the image, the range α as a radius in nodes, and the granularity β; below is `draw`. A
    slider over pixels does what a click does, for keyboards, and alone where there would be more than
    `MOST_BUTTONS`. `start` is the first pixel, row and column.

    Raises ValueError as `draw`, and unless every network has features of each image.
    """
    counts = {name: len(maps) for name, maps in features.items()}
    if not len(images) or set(counts.values()) != {len(images)}:
        raise ValueError(f"{len(images)} images need as many features of every network, got {counts}")
    height, width = _size({name: maps[0] for name, maps in features.items()})
    late = {"continuous_update": False}
    index = ipywidgets.IntSlider(0, 0, len(images) - 1, description="image", **late)
    beta = ipywidgets.SelectionSlider(
        options=[(f"{p}×{p}", p) for p in patches if p <= min(height, width)], description="β", **late
    )
    reach = [("all", 0), *((str(r), r) for r in range(1, max(height, width) // 2 + 1))]
    alpha = ipywidgets.SelectionSlider(options=reach, description="α, radius", **late)
    spots = [(f"{r}, {c}", (r, c)) for r in range(height) for c in range(width)]
    pixel = ipywidgets.SelectionSlider(options=spots, value=start, description="pixel", **late)
    side = ipywidgets.Layout(width="22px", height="22px", margin="0", padding="0")

    def looks(index: int, pixel: tuple[int, int]) -> list[dict[str, str]]:
        """Colours and text of every button."""
        small = F.adaptive_avg_pool2d(images[index], (height, width)).clamp(0, 1).flatten(1).T
        return [
            {
                "button_color": to_hex(tuple(colour.tolist())),
                "text_color": "black" if float(colour.mean()) > 0.5 else "white",
                "description": "×" if spot == pixel else BLANK,
            }
            for (_, spot), colour in zip(spots, small, strict=True)
        ]

    # Each with its looks from the start: to set them afterwards would be a message each, and a kernel drops
    # messages, its "done" among them, when a thousand are waiting.
    buttons = []
    for (name, spot), look in zip(spots, looks(0, start), strict=True) if len(spots) <= MOST_BUTTONS else ():
        style = ipywidgets.ButtonStyle(button_color=look["button_color"], text_color=look["text_color"])
        button = ipywidgets.Button(
            layout=side, style=style, description=look["description"], tooltip=f"row and column {name}"
        )
        button.on_click(lambda _, spot=spot: setattr(pixel, "value", spot))
        buttons.append(button)
    clickable = ipywidgets.GridBox(
        buttons, layout=ipywidgets.Layout(grid_template_columns=f"repeat({width}, 22px)", grid_gap="0")
    )

    def show(index: int, pixel: tuple[int, int], radius: int, patch: int) -> None:
        for button, look in zip(buttons, looks(index, pixel), strict=False):
            button.description = look["description"]
            button.style.button_color, button.style.text_color = look["button_color"], look["text_color"]
        maps = {name: each[index] for name, each in features.items()}
        display(draw(images[index], maps, *pixel, patch=patch, radius=radius or None))

    given = {"index": index, "pixel": pixel, "radius": alpha, "patch": beta}
    picture = ipywidgets.interactive_output(show, given)
    picture.layout.height = "460px"
    return ipywidgets.VBox(
        [ipywidgets.HBox([clickable, ipywidgets.VBox([index, alpha, beta, pixel])]), picture]
    )


def affinity_matrices(matrices: Mapping[str, Float[Tensor, "nodes nodes"]]) -> Picture:
    """Whole affinity graphs side by side, one N×N matrix each, on one scale; with numbers up to 8 nodes.

    Nodes count from 1, along the rows of the map. Raises ValueError unless all have the same nodes.
    """
    shapes = {tuple(a.shape) for a in matrices.values()}
    if len(shapes) != 1:
        raise ValueError(f"matrices side by side need the same nodes, got shapes {sorted(shapes)}")
    ((nodes, _),) = shapes
    signed = any(bool((a < 0).any()) for a in matrices.values())
    figure = Picture(figsize=(2.35 * len(matrices), 2.5), layout="constrained")
    for ax, (title, a) in zip(
        figure.subplots(1, len(matrices), squeeze=False)[0], matrices.items(), strict=True
    ):
        ax.imshow(a.numpy(), "PuOr" if signed else "Blues", vmin=-2 if signed else 0, vmax=2)
        for (i, j), value in np.ndenumerate(a.numpy()) if nodes <= 8 else ():
            text = f"{round(float(value), 2) + 0:g}"  # + 0: no minus in front of a rounded 0
            ax.text(j, i, text.replace("0.", "."), ha="center", va="center", fontsize=8)
        ticks = range(nodes) if nodes <= 8 else range(0, nodes, -(-nodes // 6))
        ax.set_xticks(ticks, [k + 1 for k in ticks], fontsize=8)
        ax.set_yticks(ticks, [k + 1 for k in ticks], fontsize=8)
        ax.set_title(title, fontsize=9)
    figure.alt = f"Matrices of {nodes}×{nodes} similarities: {', '.join(matrices)}."
    return figure


def _size(features: Mapping[str, Tensor]) -> tuple[int, int]:
    """Height and width of all features. Raises ValueError unless they are those of two networks or more."""
    sizes = {name: tuple(f.shape[-2:]) for name, f in features.items()}
    if len(sizes) < 2 or len(set(sizes.values())) != 1:
        raise ValueError(
            f"affinities are compared with the teacher's: at least two networks with features of one size, "
            f"the teacher's first, got {sizes}"
        )
    ((height, width),) = set(sizes.values())
    return height, width


def _mark(ax: Any, top: int, left: int, patch: int, size: tuple[int, int]) -> None:
    """A frame round the pixels of the chosen node."""
    tall, wide = min(patch, size[0] - top), min(patch, size[1] - left)
    ax.add_patch(Rectangle((left, top), wide, tall, fill=False, edgecolor="white", linewidth=3))
    ax.add_patch(Rectangle((left, top), wide, tall, fill=False, edgecolor=MARK, linewidth=1.5))
