"""Where a student branches out: what each choice costs, how sure it is, and what it changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import ipywidgets
import numpy as np
from IPython.display import display
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from kamal_lib.viz.curves import STYLES
from kamal_lib.viz.diagram import STREAMS, TRUNK
from kamal_lib.viz.panels import LEVELS, MAPS, MISTAKES, Picture, class_colours, class_map

COLOURS = (TRUNK, *STREAMS)
MOST_METRES = 1.0
"""Where the colours of a difference in depth end."""


def cost_bars(costs: Mapping[str, Mapping[str, Mapping[str, float | int]]]) -> Picture:
    """A small axis for each unit, in it a bar for each network, made of its parts.

    costs  {unit: {network: {part: cost}}}, the same networks and parts under each unit
    Raises ValueError where they are not the same.
    """
    rows = [{name: list(parts) for name, parts in networks.items()} for networks in costs.values()]
    if not rows or not rows[0] or any(row != rows[0] for row in rows):
        raise ValueError(f"each unit needs the same networks, made of the same parts, got {rows}")
    names, parts = list(rows[0]), list(dict.fromkeys(part for row in rows[0].values() for part in row))
    figure = Picture(figsize=(9, 0.3 * len(names) + 1.0), layout="constrained")
    axes = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for ax, (unit, networks) in zip(axes, costs.items(), strict=True):
        left = np.zeros(len(names))
        for part, colour in zip(parts, cycle(COLOURS), strict=False):
            width = np.array([networks[name].get(part, 0.0) for name in names])
            ax.barh(names, width, left=left, color=colour, edgecolor="0.3", linewidth=0.6, label=part)
            left += width
        for row, total in enumerate(left):
            ax.text(total, row, f" {total:.4g}", va="center", fontsize=8)
        ax.set(xlabel=unit, xlim=(0, 1.2 * left.max()), ylim=(len(names) - 0.5, -0.5))
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.tick_params(labelsize=8)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8
    )
    told = [
        f"{unit}: " + ", ".join(f"{name} {sum(parts.values()):.4g}" for name, parts in networks.items())
        for unit, networks in costs.items()
    ]
    figure.alt = f"Bars of {', '.join(parts)}. {'; '.join(told)}."
    return figure


def branch_votes(rows: Mapping[str, Sequence[Mapping[str, float | int]]]) -> Picture:
    """How sure an arg min is: for each task the losses of its candidates, and how often each is smallest.

    rows  {task: one row a block: "block", "mean", "low" and "high" of its loss, and "wins", the share of the
          resamples in which it has the smallest}
    Raises ValueError for a task without rows.
    """
    if empty := [task for task, blocks in rows.items() if not blocks]:
        raise ValueError(f"no block for {', '.join(empty)}: give a row for each decoder block")
    figure = Picture(figsize=(min(3.9 * len(rows), 9.6), 3.7), layout="constrained")
    axes = figure.subplots(2, len(rows), sharex="col", squeeze=False, height_ratios=(3, 2))
    told = []
    for (above, below), (task, blocks) in zip(axes.T, rows.items(), strict=True):
        n, mean = [row["block"] for row in blocks], [row["mean"] for row in blocks]
        bars = [[row["mean"] - row["low"] for row in blocks], [row["high"] - row["mean"] for row in blocks]]
        above.errorbar(n, mean, yerr=bars, color=STYLES[0][0], marker="o", markersize=4, capsize=3)
        above.set(ylabel="held-out loss")
        above.set_title(task, fontsize=10)
        below.bar(n, [row["wins"] for row in blocks], 0.6, color=STYLES[4][0], edgecolor="0.3")
        for row in blocks:
            below.text(row["block"], row["wins"], f"{row['wins']:.0%}", ha="center", va="bottom", fontsize=8)
        below.set(xlabel="block n", ylabel="wins", xticks=n, ylim=(0, 1.25), yticks=(0, 0.5, 1))
        below.yaxis.set_major_formatter(PercentFormatter(1))
        told.append(f"{task}: " + ", ".join(f"block {row['block']:g} {row['wins']:.0%}" for row in blocks))
    figure.alt = (
        f"Held-out loss of each decoder block with its interval, and its share of wins. {'; '.join(told)}."
    )
    return figure


@dataclass(frozen=True, eq=False)
class Stream:
    """One task of a student that can branch out anywhere in its decoder, computed beforehand.

    losses    L^1..L^N on held-out images, as Eq. 7 reads them
    kind      of its predictions: "labels" or "depth"
    teacher   the teacher's name
    taught    the teacher's predictions, one a image
    students  {p: predictions of the student that branches out at block p, one a image}

    Raises ValueError for another kind, or where predictions or losses are missing.
    """

    losses: Sequence[float | int]
    kind: str
    teacher: str
    taught: Tensor
    students: Mapping[int, Tensor]

    def __post_init__(self):
        if self.kind not in ("labels", "depth"):
            raise ValueError(f'the predictions of a stream are "labels" or "depth", got {self.kind!r}')
        shapes = {p: tuple(maps.shape) for p, maps in self.students.items()}
        if not shapes or set(shapes.values()) != {tuple(self.taught.shape)}:
            raise ValueError(
                f"each branch point needs maps of the shape {tuple(self.taught.shape)}, got {shapes}"
            )
        if not all(1 <= p <= len(self.losses) for p in shapes):
            raise ValueError(
                f"branch points {sorted(shapes)} are no blocks of the {len(self.losses)} with a loss"
            )


def draw(
    index: int,
    points: Mapping[str, int],
    *,
    images: Float[Tensor, "batch 3 height width"],
    streams: Mapping[str, Stream],
    shares: Mapping[tuple[int, ...], Mapping[str, float | int]],
    classes: int,
) -> Picture:
    """A student that branches out at `points`: its blocks, cost, losses, and predictions of one image.

    points   {task: p}
    shares   {branch points in the order of `streams`: {unit: share of the cost of all teachers}}
    classes  how many there are, for their colours
    Raises ValueError for an image that is not there, and for points that were not computed.
    """
    if not 0 <= index < len(images):
        raise ValueError(f"image {index} does not exist: there are {len(images)}, counted from 0")
    for task, stream in streams.items():
        if points.get(task) not in stream.students:
            there = sorted(stream.students)
            raise ValueError(f"{task} was computed at blocks {there}, not at {points.get(task)}")
    cost = shares[tuple(points[task] for task in streams)]
    inches = 1.85 + 1.7 * len(streams)
    figure = Picture(figsize=(9.5, inches))

    def place(left: float, top: float, width: float, height: float) -> Axes:
        """By hand, in shares of the width and in inches: a computed layout takes as long as the drawing."""
        return figure.add_axes((left, 1 - (top + height) / inches, width, height / inches))

    _blocks(place(0.01, 0.3, 0.53, 1.3), points, max(len(stream.losses) for stream in streams.values()))
    _shares(place(0.625, 0.35, 0.155, 1.0), cost)
    _strip(place(0.81, 0.3, 0.185, 1.35), {"image": images[index].permute(1, 2, 0).clamp(0, 1).numpy()})
    told = []
    for row, ((task, stream), colour) in enumerate(zip(streams.items(), cycle(STREAMS), strict=False)):
        top, p = 1.9 + 1.7 * row, points[task]
        _losses(place(0.07, top + 0.05, 0.31, 1.2), task, stream.losses, p, colour)
        taught, student = stream.taught[index].numpy(), stream.students[p][index].numpy()
        _strip(
            place(0.42, top, 0.575, 1.4),
            _pictures(stream.kind, {stream.teacher: taught, f"student, block {p}": student}, classes),
        )
        told.append(f"{task} at block {p}, loss {stream.losses[p - 1]:.3g}")
    levels = [to_hex(colour) for kind in ("depth", "error") for colour in MAPS[kind](range(LEVELS))]
    figure.exact = [TRUNK, *STREAMS, *MISTAKES.values(), *class_colours(classes), *levels]
    costs = " and ".join(f"{share:.0%} of the {unit}" for unit, share in cost.items())
    figure.alt = f"A student that branches out: {'; '.join(told)}; {costs} of its teachers. Image {index}."
    return figure


def branch_explorer(
    images: Float[Tensor, "batch 3 height width"],
    streams: Mapping[str, Stream],
    shares: Mapping[tuple[int, ...], Mapping[str, float | int]],
    classes: int,
) -> ipywidgets.Widget:
    """A slider over images, one over branch points for each task, and the figure of `draw`."""
    late = {"continuous_update": False}
    sliders: dict[str, ipywidgets.Widget] = {
        task: ipywidgets.SelectionSlider(options=sorted(stream.students), description=task, **late)
        for task, stream in streams.items()
    }
    sliders["image"] = ipywidgets.IntSlider(0, 0, len(images) - 1, description="image", **late)
    fixed = {"images": images, "streams": streams, "shares": shares, "classes": classes}

    def show(**values: int) -> None:
        display(draw(values.pop("image"), values, **fixed))

    picture = ipywidgets.interactive_output(show, sliders)
    picture.layout.height = f"{200 + 175 * len(streams)}px"
    return ipywidgets.VBox([ipywidgets.HBox(list(sliders.values())), picture])


def _blocks(ax: Axes, points: Mapping[str, int], total: int) -> None:
    """The shared blocks in the middle, each task's own ones above or below: a small `branch_diagram`."""
    last = max(points.values())
    ax.broken_barh(
        [(n - 0.4, 0.8) for n in range(1, last + 1)], (-0.3, 0.6), facecolor=TRUNK, edgecolor="0.3"
    )
    for n in range(1, last + 1):
        ax.text(n, 0, str(n), ha="center", va="center", fontsize=8)
    for row, ((task, point), colour) in enumerate(zip(points.items(), cycle(STREAMS), strict=False)):
        y = (-1) ** row * (row // 2 + 1)
        ax.plot([point + 0.4, point + 0.5, point + 0.5], [0, 0, y], color="0.3", linewidth=1, zorder=0)
        ax.plot(point + 0.5, y, "o", color="white", markeredgecolor="0.3", markersize=6)
        ax.broken_barh(
            [(n - 0.3, 0.7) for n in range(point + 1, total + 1)],
            (y - 0.3, 0.6),
            facecolor=colour,
            edgecolor="0.3",
        )
        for n in range(point + 1, total + 1):
            ax.text(n + 0.05, y, str(n), ha="center", va="center", fontsize=8)
        ax.text(total + 0.75, y, task, va="center", fontsize=9)
    depth = (len(points) + 1) // 2
    ax.set(xlim=(0.3, total + 3.4), ylim=(-max(depth, 1) - 0.5, depth + 0.5))
    ax.set_axis_off()
    ax.set_title("shared blocks, ○ coding, copies of the teachers' blocks", fontsize=8, loc="left")


def _shares(ax: Axes, shares: Mapping[str, float | int]) -> None:
    ax.barh(list(shares), list(shares.values()), color=TRUNK, edgecolor="0.3")
    for row, share in enumerate(shares.values()):
        ax.text(0.03, row, f"{share:.0%}", va="center", fontsize=9)
    ax.axvline(1, color="black", linewidth=1)
    ax.set(xlim=(0, 1.08), xticks=(0, 0.5, 1), ylim=(len(shares) - 0.4, -0.6))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.tick_params(labelsize=8)
    ax.set_title("of all teachers'", fontsize=8)


def _losses(ax: Axes, task: str, losses: Sequence[float | int], point: int, colour: str) -> None:
    blocks = range(1, len(losses) + 1)
    ax.axvspan(len(losses) // 2 + 0.5, len(losses) + 0.5, color="0.92")
    ax.plot(blocks, losses, color=STYLES[0][0], marker="o", markersize=3, linewidth=1)
    ax.plot(point, losses[point - 1], "*", color=colour, markeredgecolor="black", markersize=13)
    ax.set(xlim=(0.5, len(losses) + 0.5), xticks=blocks)
    ax.tick_params(labelsize=8)
    ax.set_title(f"{task}: loss of block n", fontsize=8)


def _pictures(kind: str, maps: Mapping[str, np.ndarray], classes: int) -> dict[str, np.ndarray]:
    """Two maps and their difference as colours, {title: H×W×3}."""
    (_, taught), (_, student) = maps.items()
    if kind == "labels":
        palette, apart = class_colours(classes), taught != student
        shown = {title: class_map(each, palette)[..., :3] / 255 for title, each in maps.items()}
        return shown | {f"differs: {apart.mean():.0%}": MAPS["mistakes"](apart.astype(float))[..., :3]}
    apart, most = abs(taught - student), max(taught.max(), 1e-6)
    shown = {title: MAPS["depth"](each / most)[..., :3] for title, each in maps.items()}
    return shown | {f"differs by {apart.mean():.2f} m": MAPS["error"](apart / MOST_METRES)[..., :3]}


def _strip(ax: Axes, pictures: Mapping[str, np.ndarray]) -> None:
    """Pictures of one size side by side in one image: an axis each would take three times as long."""
    height, width, _ = next(iter(pictures.values())).shape
    gap = max(width // 20, 1)
    strip = np.ones((height, len(pictures) * (width + gap) - gap, 3))
    for k, (title, picture) in enumerate(pictures.items()):
        strip[:, k * (width + gap) :][:, :width] = picture
        ax.text((k + 0.5) * width + k * gap, -0.03 * height, title, ha="center", va="bottom", fontsize=8)
    ax.imshow(strip, interpolation="nearest")
    ax.set_axis_off()
