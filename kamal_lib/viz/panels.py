"""Pictures of samples and predictions, side by side: image, labels, depth, normals, error.

A figure is a grid of `Panel`s; `scene_panels` and `prediction_panels` are the two grids used most. Nothing
touches pyplot: the returned `Picture` shows itself, once, at the end of a cell.
"""

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from IPython import get_ipython
from jaxtyping import Float, Integer, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_hex, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

from kamal_lib.sample import VOID, Sample

Array = Tensor | np.ndarray
KEYS = ("image", "labels", "depth", "normals")
SHAPES = {"image": 3, "labels": 2, "depth": 2, "normals": 3, "error": 2, "mistakes": 2}
PALETTE = (
    *("#1446ce", "#7c4598", "#c8d3ff", "#f6d425", "#531222", "#fc992b", "#05fba8"),
    *("#143068", "#d58eff", "#e15f2d", "#c0155f", "#719ba0", "#8e2000"),
)
"""Thirteen class colours, found by annealing on their smallest distance in OKLab (black to white is 100):
14 to full colour vision, 8.8 to protanopes, 10.2 to deuteranopes (Machado et al., 2009). In the order of
NYUv2's 13 classes, pairs that often touch (wall and window, floor and bed, ...) are at least 12.9 apart.
"""
UNKNOWN: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.6", "hatch": "////"}
"""How void labels and unknown depths, normals and errors are drawn."""
MISTAKES = {"correct": "#ededed", "wrong": "#000000"}
LEVELS = 48
"""Colours of a bar: enough to look smooth, few enough for a PNG of 256 colours to keep them all."""
MAPS = {
    "depth": colormaps["viridis"].resampled(LEVELS),
    "error": colormaps["magma_r"].resampled(LEVELS),
    "mistakes": ListedColormap(list(MISTAKES.values())),
}
FACES = {
    "right": (1, 0, 0),
    "left": (-1, 0, 0),
    "up": (0, -1, 0),
    "down": (0, 1, 0),
    "the camera": (0, 0, -1),
}


class Picture(Figure):
    """A figure that a notebook shows as one small PNG, with a text for readers who do not see it.

    Jupyter renders a plain `Figure` only once pyplot's inline backend is active; this one needs no pyplot.

    alt    the text: what the figure shows
    exact  colours, at most 200, that the PNG keeps as they are; others become the nearest of 256
    """

    alt: str = ""
    exact: Sequence[str] = ()

    def png(self) -> bytes:
        """The figure as a PNG file of 256 colours, about a third of the full one's size."""
        full, small = io.BytesIO(), io.BytesIO()
        self.savefig(full, format="png", transparent=False)
        image, palette = Image.open(full).convert("RGB"), Image.new("P", (1, 1))
        exact = (255 * to_rgba_array(["white", "black", *self.exact[:200]])[:, :3]).round().astype(int)
        found = image.quantize(256 - len(exact), Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        rest = np.array(found.getpalette()).reshape(-1, 3)
        rest = rest[abs(rest[:, None] - exact).max(-1).min(-1) >= 8]  # Pillow may take a near miss for a hit
        palette.putpalette(np.concatenate([exact, rest]).ravel().tolist())
        image.quantize(palette=palette, dither=Image.Dither.NONE).save(small, "png", optimize=True)
        return small.getvalue()

    def _repr_mimebundle_(self, **_: object) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        text = self.alt or repr(self)
        return {"image/png": b64encode(self.png()).decode(), "text/plain": text}, {"image/png": {"alt": text}}


if (shell := get_ipython()) is not None:
    # Widgets switch pyplot's inline backend on, whose larger PNG of any Figure would go before the one above.
    shell.display_formatter.formatters["image/png"].for_type(Picture, Picture.png)


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture of a grid. Raises ValueError for an unknown kind or data of another shape.

    kind    what `data` is: "image", "labels", "depth", "normals" as in `Sample`; "error", H×W in `unit`, or
            "mistakes", H×W of 1 (wrong) and 0 (correct), both NaN where unknown
    boxes   K×4 pixels (left, top, right, bottom) to be drawn on top, of the classes `box_labels`
    """

    kind: str
    data: Array
    title: str = ""
    unit: str = ""
    boxes: Array | None = None
    box_labels: Array | None = None

    def __post_init__(self):
        if self.kind not in SHAPES:
            raise ValueError(f"there is no panel of kind {self.kind!r}: choose one of {', '.join(SHAPES)}")
        shape = tuple(self.data.shape)
        if len(shape) != SHAPES[self.kind] or shape[:-2] not in ((), (3,)):
            wanted = "H×W" if SHAPES[self.kind] == 2 else "3×H×W"
            raise ValueError(f"a panel of kind {self.kind!r} needs data of shape {wanted}, got {shape}")
        if (self.boxes is None) != (self.box_labels is None):
            raise ValueError("boxes need their classes: give a panel both boxes and box_labels, or neither")

    @property
    def bar(self) -> str:
        """The label of the colour bar, which all panels of that label share; empty where there is none."""
        return {"depth": "depth (m)", "error": f"error ({self.unit})"}.get(self.kind, "")


def class_colours(count: int) -> tuple[str, ...]:
    """`count` colours: `PALETTE`, then hues a golden angle apart, which only full colour vision separates."""
    walk = (hsv_to_rgb(0.618034 * k % 1, 0.4 + 0.25 * (k % 3), 0.9 - 0.2 * (k % 2)) for k in range(13, count))
    return PALETTE[:count] + tuple(to_hex(colour) for colour in walk)


def class_map(
    labels: Integer[Array, "height width"], palette: Sequence[str]
) -> UInt8[np.ndarray, "height width 4"]:
    """Labels as RGBA, transparent where `VOID`. Raises ValueError for a label without a colour."""
    ids = _numpy(labels)
    _check_labels(ids, len(palette))
    colours = np.vstack([to_rgba_array(palette), np.zeros(4)])
    return (255 * colours).round().astype(np.uint8)[np.where(ids == VOID, len(palette), ids)]


def normal_map(normals: Float[Array, "3 height width"]) -> Float[np.ndarray, "height width 4"]:
    """Normals as RGBA: red grows to the right, green upwards, blue to the camera; transparent where 0."""
    x, y, z = _numpy(normals)
    return np.stack([(1 + x) / 2, (1 - y) / 2, (1 - z) / 2, abs(x) + abs(y) + abs(z) > 0], axis=-1).clip(0, 1)


def grid(
    rows: Sequence[Sequence[Panel]],
    *,
    class_names: Sequence[str] = (),
    depth_range: tuple[float, float] | None = None,
    width: float = 9.0,
) -> Picture:
    """Panels in rows, with one legend, one bar for all depths, and one bar for the errors of each unit.

    class_names  needed for labels and boxes
    depth_range  metres at the ends of the depth bar; None: the smallest and the 99th percentile
    width        of the figure, inches
    Raises ValueError for rows of unequal length.
    """
    if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
        raise ValueError(f"a grid needs rows of one length >= 1, got lengths {[len(row) for row in rows]}")
    panels = [panel for row in rows for panel in row]
    palette = class_colours(len(class_names))
    layers = [_pixels(panel, palette) for panel in panels]
    scales = _scales(panels, layers, depth_range)
    swatches = _swatches(panels, layers, class_names, palette)

    # All in inches, and placed by hand: panels have exactly their shape, and nothing is drawn twice to fit.
    gap, columns, in_line = 0.06, len(rows[0]), int(width / 1.3)
    cell = (width - 0.7 * len(scales) - gap) / columns - gap
    heights = [cell * max(p.data.shape[-2] / p.data.shape[-1] for p in row) for row in rows]
    titles = [0.17 * max(p.title.count("\n") + bool(p.title) for p in row) for row in rows]
    height = sum(heights) + sum(titles) + gap * (len(rows) + 1) + 0.2 * -(-len(swatches) // in_line)
    figure = Picture(figsize=(width, height))
    top = bottom = height - gap - titles[0]
    for k, (panel, pixels) in enumerate(zip(panels, layers, strict=True)):
        row, column = divmod(k, columns)
        bottom -= (heights[row] + (gap + titles[row]) * (row > 0)) * (column == 0)
        ax = figure.add_axes(_box(figure, gap + column * (cell + gap), bottom, cell, heights[row]))
        smooth = None if panel.kind == "image" else "nearest"
        ax.imshow(pixels, MAPS.get(panel.kind), scales.get(panel.bar, Normalize(0, 1)), interpolation=smooth)
        ax.set(xticks=[], yticks=[])
        ax.set_title(panel.title, fontsize=9, pad=3)
        ax.patch.set(**UNKNOWN)
        _draw_boxes(ax, panel, class_names, palette)
    for k, (label, scale) in enumerate(scales.items()):
        colours = ScalarMappable(scale, MAPS[label.split()[0]])
        left = gap + columns * (cell + gap) + 0.7 * k
        cax = figure.add_axes(_box(figure, left, bottom, 0.15, top - bottom))
        bar = figure.colorbar(colours, cax=cax, extend="max")
        bar.set_label(label, size=9)
        bar.ax.tick_params(labelsize=8)
        figure.exact = [*figure.exact, *(to_hex(c) for c in colours.cmap(range(LEVELS)))]
    if swatches:
        ncols = min(in_line, len(swatches))
        figure.legend(
            handles=swatches, loc="lower center", ncols=ncols, fontsize=8, frameon=False, borderpad=0
        )
        figure.exact = [*(to_hex(swatch.get_facecolor()) for swatch in swatches), *figure.exact]
    shown = ", ".join(dict.fromkeys(p.title.replace("\n", " ") for p in panels if p.title))
    names = ", ".join(str(swatch.get_label()) for swatch in swatches)
    figure.alt = f"{len(rows)} × {columns} pictures: {shown}." + (f" Legend: {names}." if names else "")
    return figure


def scene_panel(sample: Sample, view: str, title: str = "") -> Panel:
    """One entry of a sample: its "image", "labels", "depth" or "normals"; or "boxes", drawn on the image.

    Raises ValueError for an entry that the sample does not hold.
    """
    entries = cast(Mapping[str, Tensor], sample)
    if view not in (*KEYS, "boxes") or view not in entries:
        raise ValueError(f"cannot show {view!r} of a sample that holds {sorted(entries)}")
    if view == "boxes":
        boxes, labels = entries["boxes"], entries["box_labels"]
        return Panel("image", entries["image"], title, boxes=boxes, box_labels=labels)
    return Panel(view, entries[view], title)


def scene_panels(samples: Sequence[Sample], class_names: Sequence[str]) -> Picture:
    """One row a sample: image, labels, depth, normals, as far as the first sample holds them.

    Raises ValueError where another sample holds less.
    """
    views = [key for key in KEYS if samples and key in samples[0]]
    rows = [
        [scene_panel(sample, view, "" if i else view) for view in views] for i, sample in enumerate(samples)
    ]
    return grid(rows, class_names=class_names)


def prediction_panels(
    samples: Sequence[Sample],
    key: str,
    predictions: Mapping[str, Sequence[Tensor] | Tensor],
    class_names: Sequence[str] = (),
) -> Picture:
    """One row a sample: image, truth, each prediction, then where each is wrong (Ye et al., Figures 5 and 6).

    key          what is predicted: "labels", "depth" or "normals"
    predictions  {name: one prediction a sample, shaped as `sample[key]`}
    Mistakes are black, depth errors |d − truth| in metres, errors of normals angles in degrees; there are
    none where the first sample holds no truth. Raises ValueError unless each name has one map a sample.
    """
    counts = {name: len(maps) for name, maps in predictions.items()}
    if not samples or set(counts.values()) != {len(samples)}:
        raise ValueError(f"{len(samples)} samples need as many predictions under every name, got {counts}")
    rows = []
    for i, sample in enumerate(samples):
        row = [scene_panel(sample, "image", "image")]
        guesses = [Panel(key, maps[i], name) for name, maps in predictions.items()]
        if key in samples[0]:
            truth = scene_panel(sample, key, "truth")
            row += [truth, *guesses, *(_error(guess, truth) for guess in guesses)]
        else:
            row += guesses
        rows.append([replace(panel, title="") for panel in row] if i else row)
    return grid(rows, class_names=class_names)


def _numpy(data: Array) -> np.ndarray:
    return data.detach().cpu().numpy() if isinstance(data, Tensor) else data


def _check_labels(ids: np.ndarray, classes: int) -> None:
    wrong = ids[(ids != VOID) & ((ids < 0) | (ids >= classes))]
    if wrong.size:
        raise ValueError(
            f"label {wrong[0]} is none of {classes} named classes: name all classes, or set what is none of "
            f"them to VOID ({VOID})"
        )


def _error(guess: Panel, truth: Panel) -> Panel:
    errors = error_map(truth.kind, guess.data, truth.data)
    unit = {"labels": "", "depth": "m", "normals": "degrees"}[truth.kind]
    return Panel("error" if unit else "mistakes", errors, f"{guess.title}\nerror", unit)


def error_map(kind: str, guess: Array, truth: Array) -> Float[np.ndarray, "height width"]:
    """How far a map is off: 1 or 0 for "labels", metres for "depth", degrees for "normals".

    NaN where the truth is unknown. A normal of length 0 is off by 90 degrees.
    """
    a, b = _numpy(guess).astype(float), _numpy(truth).astype(float)
    if kind == "labels":
        return np.where(b == VOID, np.nan, a != b)
    if kind == "depth":
        return np.where(b == 0, np.nan, abs(a - b))
    across = np.linalg.norm(np.cross(a, b, axis=0), axis=0)  # arccos is off by 0.02 degrees near 0
    angle = np.where(a.any(0), np.degrees(np.arctan2(across, (a * b).sum(0))), 90)
    return np.where(b.any(0), angle, np.nan)


def _pixels(panel: Panel, palette: Sequence[str]) -> np.ndarray:
    """RGB, RGBA or masked numbers; transparent or masked where void or unknown."""
    if panel.kind == "labels":
        return class_map(panel.data, palette)
    if panel.kind == "normals":
        return normal_map(panel.data)
    data = _numpy(panel.data).astype(float)
    if panel.kind == "image":
        return data.transpose(1, 2, 0).clip(0, 1)
    return np.ma.masked_where(~np.isfinite(data) | ((data <= 0) & (panel.kind == "depth")), data)


def _scales(
    panels: Sequence[Panel], layers: Sequence[np.ndarray], depth_range: tuple[float, float] | None
) -> dict[str, Normalize]:
    scales = {}
    for label in sorted({panel.bar for panel in panels} - {""}):
        values = np.concatenate(
            [np.ma.compressed(x) for p, x in zip(panels, layers, strict=True) if p.bar == label]
        )
        low = 0.0 if label.startswith("error") or not values.size else values.min()
        high = np.percentile(values, 99) if values.size else 1.0
        if label.startswith("depth") and depth_range is not None:
            low, high = depth_range
        scales[label] = Normalize(low, high if high > low else low + 1)
    return scales


def _swatches(
    panels: Sequence[Panel], layers: Sequence[np.ndarray], class_names: Sequence[str], palette: Sequence[str]
) -> list[Patch]:
    """The legend: everything that occurs and that no colour bar explains."""
    ids = [_numpy(p.data).ravel() for p in panels if p.kind == "labels"]
    ids += [_numpy(p.box_labels) for p in panels if p.box_labels is not None]
    found = [k for k in range(len(class_names)) if any(k in i for i in ids)]
    swatches = [Patch(facecolor=palette[k], edgecolor="0.4", label=class_names[k]) for k in found]
    kinds = {panel.kind for panel in panels}
    if "mistakes" in kinds:
        swatches += [Patch(facecolor=c, edgecolor="0.4", label=name) for name, c in MISTAKES.items()]
    if "normals" in kinds:
        faces = normal_map(np.array(list(FACES.values()), float).T[:, None])[0]
        swatches += [Patch(facecolor=c, label=f"faces {name}") for name, c in zip(FACES, faces, strict=True)]
    if any(np.ma.is_masked(x) or (x.ndim == 3 and np.any(x[..., 3:] == 0)) for x in layers):
        swatches.append(Patch(**UNKNOWN, label="void, unknown"))
    return swatches


def _box(
    figure: Figure, left: float, bottom: float, width: float, height: float
) -> tuple[float, float, float, float]:
    """Inches as fractions of the figure."""
    w, h = figure.get_size_inches()
    return left / w, bottom / h, width / w, height / h


def _draw_boxes(ax: Axes, panel: Panel, class_names: Sequence[str], palette: Sequence[str]) -> None:
    if panel.boxes is None or panel.box_labels is None:
        return
    labels = _numpy(panel.box_labels)
    _check_labels(labels, len(class_names))
    for (left, top, right, bottom), k in zip(_numpy(panel.boxes), labels.tolist(), strict=True):
        at = (left - 0.5, top - 0.5)  # pixel 0 is centred at 0, its edge is at -0.5
        ax.add_patch(Rectangle(at, right - left, bottom - top, fill=False, edgecolor=palette[k], linewidth=2))
        tag = {"facecolor": "white", "edgecolor": palette[k], "pad": 1}
        ax.annotate(class_names[int(k)], at, va="top", fontsize=8, bbox=tag)
