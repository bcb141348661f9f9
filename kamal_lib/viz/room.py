"""Rooms as all networks see them: segmentation, depth and normals side by side, and where each is wrong."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import ipywidgets
import numpy as np
from IPython.display import display
from matplotlib.colors import Colormap, to_hex
from matplotlib.patches import Rectangle
from torch import Tensor

from kamal_lib.sample import Sample
from kamal_lib.viz.branching import MOST_METRES
from kamal_lib.viz.panels import (
    FACES,
    LEVELS,
    MAPS,
    MISTAKES,
    UNKNOWN,
    Picture,
    class_colours,
    class_map,
    error_map,
    normal_map,
)

KEYS = {"segmentation": "labels", "depth": "depth", "normals": "normals"}
"""{task: the entry of a sample that holds its truth}, in the order of the columns."""
MOST_DEGREES = 60
"""Where the colours of an angle end."""
FACING = normal_map(np.array(list(FACES.values()), float).T[:, None])[0]
SWATCHES: dict[str, dict[str, Any]] = {
    f"faces {name}": {"facecolor": to_hex(colour)} for name, colour in zip(FACES, FACING, strict=True)
} | {"void, unknown": UNKNOWN}
"""What the colours of normals mean, and what stands where nothing is known."""
ANGLE = {"angle (degrees)": (MAPS["error"], MOST_DEGREES)}

Cell = tuple[str, np.ndarray | str]
"""A title, and the RGB picture or the words below it."""


def draw_normals(samples: Sequence[Sample], predictions: Mapping[str, Sequence[Tensor] | Tensor]) -> Picture:
    """Normals of some rooms, network by network (Ye et al., Fig. 6), and beneath them where each is wrong.

    samples      each with "image" and "normals", all of one size
    predictions  {network: 3×H×W normals, one a sample}
    Two rows a room: the true normals and each network's; the image, and each network's angle to the truth in
    degrees, with its median over the known pixels. Raises ValueError unless there is a room and a network,
    and each network has one map a room, of the truth's shape; and for a room without normals.
    """
    counts = {network: len(maps) for network, maps in predictions.items()}
    if not samples or not counts or set(counts.values()) != {len(samples)}:
        raise ValueError(f"{len(samples)} rooms need as many normals of every network, got {counts}")
    cells: list[list[Cell]] = []
    told = []
    for i, sample in enumerate(samples):
        truth = _truth(sample, "normals")
        found = {_line(name): _measured("normals", maps[i], truth) for name, maps in predictions.items()}
        shown = {"truth": truth} | {network: guess for network, (guess, _, _) in found.items()}
        cells.append([(name, _colours("normals", normals, (), 1)) for name, normals in shown.items()])
        wrong = [(score, _error_colours("normals", errors)) for _, errors, score in found.values()]
        cells.append([("image", _rgb(sample)), *wrong])
        told.append(
            f"room {i}: " + ", ".join(f"{network} {score}" for network, (_, _, score) in found.items())
        )
    figure = _page(cells, ANGLE, SWATCHES)
    figure.alt = f"True normals, each network's, and its angles to the truth. {'; '.join(told)}."
    return figure


def draw_room(
    sample: Sample,
    predictions: Mapping[str, Mapping[str, Tensor]],
    class_names: Sequence[str],
    *,
    errors: bool = False,
    most: float | int | None = None,
) -> Picture:
    """One room: the truth and each network's segmentation, depth and normals, each with its score in it.

    predictions  {network: {task: decoded map}}, tasks among `KEYS`; a cell says where one is missing
    errors       draw where each network is wrong, in the place of what it predicts
    most         metres where the colours of depth end; None: the largest true depth
    Scores are of this room's known pixels: share of correct labels, mean of |d − d*|/d*, median angle.
    Raises ValueError for another task, for a truth that is missing, and for a map of another shape.
    """
    truths = {task: _truth(sample, task) for task in KEYS}
    if wrong := sorted({task for maps in predictions.values() for task in maps} - set(KEYS)):
        raise ValueError(f"a room has no {', '.join(wrong)}: its tasks are {', '.join(KEYS)}")
    most, palette = most or float(truths["depth"].max()) or 1.0, class_colours(len(class_names))
    first = [(f"{task}, true", _colours(task, truth, palette, most)) for task, truth in truths.items()]
    cells: list[list[Cell]] = [[("image", _rgb(sample)), *first]]
    told, seen = [], {*np.unique(truths["segmentation"])}
    for network, maps in predictions.items():
        row: list[Cell] = [("", network)]
        for task, truth in truths.items():
            if task not in maps:
                row.append(("", "not learned"))
                continue
            guess, apart, score = _measured(task, maps[task], truth)
            colours = _error_colours(task, apart) if errors else _colours(task, guess, palette, most)
            row.append((score, colours))
            told.append(f"{_line(network)} {task} {score}")
            seen |= {*np.unique(guess)} if task == "segmentation" and not errors else set()
        cells.append(row)
    swatches = {
        n: {"facecolor": palette[k], "edgecolor": "0.4"} for k, n in enumerate(class_names) if k in seen
    }
    bars = {"depth (m)": (MAPS["depth"], most)}
    if errors:
        swatches |= {name: {"facecolor": c, "edgecolor": "0.4"} for name, c in MISTAKES.items()}
        bars |= {"depth error (m)": (MAPS["error"], MOST_METRES)} | ANGLE
    figure = _page(cells, bars, swatches | SWATCHES)
    what = "where each network is wrong" if errors else "each network's predictions"
    figure.alt = f"One room, three tasks side by side: the truth and {what}. {'; '.join(told)}."
    return figure


def room_widget(
    samples: Sequence[Sample],
    predictions: Mapping[str, Mapping[str, Sequence[Tensor] | Tensor]],
    class_names: Sequence[str],
) -> ipywidgets.Widget:
    """A slider over rooms, a switch between predictions and errors, and the figure of `draw_room`.

    predictions  {network: {task: one decoded map a sample}}, computed beforehand; depths share one scale
    Raises ValueError unless there are rooms, and each network has one map a room for each of its tasks.
    """
    counts = {network: {task: len(m) for task, m in maps.items()} for network, maps in predictions.items()}
    if not samples or any(count != len(samples) for row in counts.values() for count in row.values()):
        raise ValueError(f"{len(samples)} rooms need as many maps of every network and task, got {counts}")
    most = max(float(_truth(sample, "depth").max()) for sample in samples)
    room = ipywidgets.IntSlider(0, 0, len(samples) - 1, description="room", continuous_update=False)
    show = ipywidgets.ToggleButtons(options=["predictions", "errors"])

    def redraw(room: int, show: str) -> None:
        maps = {name: {task: each[room] for task, each in row.items()} for name, row in predictions.items()}
        display(draw_room(samples[room], maps, class_names, errors=show == "errors", most=most))

    picture = ipywidgets.interactive_output(redraw, {"room": room, "show": show})
    picture.layout.height = "660px"
    return ipywidgets.VBox([ipywidgets.HBox([room, show]), picture])


def _truth(sample: Sample, task: str) -> np.ndarray:
    """The sample's own entry of a task. Raises ValueError where it has none."""
    if KEYS[task] not in sample:
        raise ValueError(
            f"{task} needs the truth {KEYS[task]!r} of every sample, got one with {sorted(sample)}"
        )
    return cast(Mapping[str, Tensor], sample)[KEYS[task]].numpy()


def _measured(task: str, guess: Tensor, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """A prediction as numbers, its errors (1 or 0, metres, degrees; NaN where unknown), its score in words.

    Raises ValueError where it has not the truth's shape.
    """
    if tuple(guess.shape) != truth.shape:
        raise ValueError(
            f"{task} needs a decoded map of the truth's shape {truth.shape}, got {tuple(guess.shape)}: "
            f"decode the response, and take one image of the batch"
        )
    said = guess.detach().cpu().numpy()
    errors = error_map(KEYS[task], said, truth)
    known = ~np.isnan(errors)
    if not known.any():
        return said, errors, "truth unknown"
    if task == "segmentation":
        score = f"pixel acc. {1 - errors[known].mean():.0%}"
    elif task == "depth":
        score = f"abs rel {(errors[known] / truth[known]).mean():.3f}"
    else:
        score = f"median {np.median(errors[known]):.1f}°"
    return said, errors, score


def _line(name: str) -> str:
    return name.replace("\n", " ")


def _rgb(sample: Sample) -> np.ndarray:
    image = cast(Mapping[str, Tensor], sample)["image"]
    return (255 * image.movedim(0, -1).clamp(0, 1).numpy()).round().astype(np.uint8)


def _colours(task: str, numbers: np.ndarray, palette: Sequence[str], most: float | int) -> np.ndarray:
    if task == "segmentation":
        return _striped(class_map(numbers, palette))
    if task == "depth":
        return _striped(MAPS["depth"](np.where(numbers > 0, numbers / most, np.nan), bytes=True))
    return _striped((255 * normal_map(numbers)).round().astype(np.uint8))


def _error_colours(task: str, errors: np.ndarray) -> np.ndarray:
    if task == "segmentation":
        return _striped(MAPS["mistakes"](errors, bytes=True))
    return _striped(MAPS["error"](errors / (MOST_METRES if task == "depth" else MOST_DEGREES), bytes=True))


def _striped(rgba: np.ndarray) -> np.ndarray:
    """RGB with grey stripes, as the hatching of `UNKNOWN`, where there is no colour."""
    row, column = np.indices(rgba.shape[:2])
    period = max(4, rgba.shape[1] // 20)
    stripes = np.where((row + column) % period < period / 3, 153, 255).astype(np.uint8)
    return np.where(rgba[..., 3:] > 0, rgba[..., :3], stripes[..., None])


def _page(
    cells: Sequence[Sequence[Cell]],
    bars: Mapping[str, tuple[Colormap, float | int]],
    swatches: Mapping[str, Mapping[str, Any]],
) -> Picture:
    """Cells in rows; at the right each bar of colours, from 0 to its end, and the swatches, {name: patch}.

    All on one axis, in inches from the top left: an axis each would take three times as long to draw.
    """
    gap, above, legend = 0.07, 0.24, 1.6
    height, width, _ = next(picture.shape for _, picture in cells[0] if not isinstance(picture, str))
    wide = min(7.4 / len(cells[0]) - gap, (6.3 / len(cells) - above) * width / height)
    high = wide * height / width
    left, y = gap + len(cells[0]) * (wide + gap), above
    size = (
        left + legend,
        max(len(cells) * (high + above) + 0.05, above + 0.5 * len(bars) + 0.18 * len(swatches)),
    )
    figure = Picture(figsize=size)
    ax = figure.add_axes((0, 0, 1, 1))
    for row, line in enumerate(cells):
        for column, (title, picture) in enumerate(line):
            x, top = gap + column * (wide + gap), above + row * (high + above) - 0.03
            if isinstance(picture, str):
                weight = "normal" if column else "bold"
                middle = (x + wide / 2, top + high / 2)
                ax.text(*middle, picture, ha="center", va="center", fontsize=9, weight=weight)
                continue
            ax.imshow(picture, extent=(x, x + wide, top + high, top), interpolation="nearest")
            ax.text(x + wide / 2, top - 0.04, title, ha="center", va="bottom", fontsize=9)
    for label, (colours, most) in bars.items():
        strip = colours(np.arange(LEVELS)[None], bytes=True)
        ax.imshow(strip, extent=(left, left + 1.2, y + 0.13, y), interpolation="nearest")
        ax.text(left, y - 0.04, label, va="bottom", fontsize=8)
        ax.text(left, y + 0.16, "0", va="top", fontsize=8)
        ax.text(left + 1.2, y + 0.16, f"≥ {most:.3g}", ha="right", va="top", fontsize=8)
        y += 0.5
    for name, patch in swatches.items():
        ax.add_patch(Rectangle((left, y - 0.14), 0.2, 0.11, **patch))
        ax.text(left + 0.27, y - 0.085, name, va="center", fontsize=8)
        y += 0.18
    ax.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="auto")
    ax.set_axis_off()
    solid = [str(patch["facecolor"]) for patch in swatches.values()]
    figure.exact = [*solid, *(to_hex(c) for colours, _ in bars.values() for c in colours(range(LEVELS)))]
    return figure
