"""Features and gates, block by block: what channel coding (Ye et al., Fig. 3) hands to each teacher.

Tensors in, figures out. `gate_browser` is a widget; `draw` is its static twin.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import ipywidgets
import numpy as np
import torch
from IPython.display import display
from jaxtyping import Float, Integer
from matplotlib.colors import to_hex
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from kamal_lib.viz.curves import STYLES
from kamal_lib.viz.panels import LEVELS, MAPS, Picture

GREY, BAND = "0.6", "0.93"


@dataclass(frozen=True, eq=False)
class Coded:
    """One block of a student in one teacher's domain, for one image.

    student  F_u^n, channels × height × width
    gates    s, one number a channel; s ⊙ F_u^n is what the teacher gets
    teacher  F_t^n, the teacher's own, shaped as the student's
    Raises ValueError where the three do not have the same channels, or the maps the same size.
    """

    student: Float[Tensor, "_ _ _"]
    gates: Float[Tensor, " _"]
    teacher: Float[Tensor, "_ _ _"]

    def __post_init__(self):
        shapes = [tuple(part.shape) for part in (self.student, self.teacher)]
        if shapes[0] != shapes[1] or len(self.gates) != shapes[0][0]:
            raise ValueError(
                f"the student's features, the gates and the teacher's features of one block belong together, "
                f"got shapes {shapes[0]}, {tuple(self.gates.shape)} and {shapes[1]}: take all three at the "
                f"same n, and one image"
            )


def number_grids(grids: Mapping[str, Float[Tensor, "rows columns"]], *, digits: int = 2) -> Picture:
    """Small matrices side by side, as numbers on a tint that grows with them; at most `digits` decimals.

    Where some are negative there are two tints, one a sign.
    """
    top = max(float(grid.abs().max()) for grid in grids.values()) or 1.0
    signed = any(bool((grid < 0).any()) for grid in grids.values())
    tint = {"cmap": "PuOr", "vmin": -2 * top} if signed else {"cmap": "Blues", "vmin": 0}
    figure = Picture(figsize=(1.9 * len(grids), 2.1), layout="constrained")
    for ax, (title, grid) in zip(
        figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True
    ):
        ax.imshow(grid.numpy(), vmax=2 * top, **tint)
        for (row, column), value in np.ndenumerate(grid.numpy()):
            ax.text(column, row, f"{round(float(value), digits):g}", ha="center", va="center")
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize=9)
    figure.alt = "Matrices of numbers: " + ", ".join(grids)
    return figure


def marks(tables: Mapping[str, Mapping[str, Mapping[str, bool]]]) -> Picture:
    """A small table a title, {row: {column: yes or no}}: a dot for yes, a blank for no.

    Raises ValueError unless all tables have the same rows, at least one, and all rows the same columns.
    """
    shapes = {title: {row: tuple(cells) for row, cells in rows.items()} for title, rows in tables.items()}
    names = {tuple(rows) for rows in shapes.values()}
    if len(names) != 1 or len({columns for rows in shapes.values() for columns in rows.values()}) != 1:
        raise ValueError(f"tables side by side need the same rows, with the same columns, got {shapes}")
    height = 0.55 + 0.18 * len(next(iter(names)))
    figure = Picture(figsize=(1.5 + 1.9 * len(tables), height), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    told = []
    for ax, (title, rows) in zip(axes, tables.items(), strict=True):
        columns = list(next(iter(rows.values())))
        yes = [
            (x, y) for y, row in enumerate(rows.values()) for x, column in enumerate(columns) if row[column]
        ]
        if yes:
            ax.plot(*zip(*yes, strict=True), "o", color=STYLES[0][0], markersize=7)
        ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        ax.set_xticks(range(len(columns)), columns, fontsize=8)
        ax.set_yticks(range(len(rows)), list(rows), fontsize=8)
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.set_xticks([x - 0.5 for x in range(1, len(columns))], minor=True)
        ax.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
        ax.grid(which="minor", color="0.85")
        ax.tick_params(which="minor", length=0)
        ax.set_title(title, fontsize=10)
        said = (f"{row} ({', '.join(c for c in columns if rows[row][c]) or 'none'})" for row in rows)
        told.append(f"{title}: {'; '.join(said)}")
    figure.alt = "Tables of dots. " + ". ".join(told) + "."
    return figure


def block_curves(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    labels: Mapping[str, str] | str,
    *,
    decoder_from: int,
    log: bool | str = False,
) -> Picture:
    """A small axis a panel, a curve a name: its values at blocks 1..N, the decoder shaded; one legend.

    labels        of the vertical axes, with the unit: one for all panels, or {panel: label}
    decoder_from  number of the first decoder block, N/2 + 1
    log           True: a logarithmic vertical axis that all panels share; or the one panel, by its title,
                  that has a logarithmic axis. Nothing <= 0 can be drawn on it
    Raises ValueError for panels of different curves, for curves of different lengths, and for a number that
    a logarithm cannot take.
    """
    if len({tuple(curves) for curves in panels.values()}) != 1:
        raise ValueError(
            f"panels share a legend, so each needs the same curves, got {panels.keys()} of "
            f"{[list(curves) for curves in panels.values()]}"
        )
    if isinstance(log, str) and log not in panels:
        raise ValueError(f"log must be True, False or the title of a panel of {list(panels)}, got {log!r}")
    lengths = {len(values) for curves in panels.values() for values in curves.values()}
    scaled = [title for title in panels if log is True or log == title]
    if len(lengths) != 1 or any(v <= 0 for title in scaled for vs in panels[title].values() for v in vs):
        raise ValueError(
            f"curves over blocks need one value a block, on a logarithmic axis above 0, got lengths "
            f"{sorted(lengths)}: leave a block out of all curves, or draw it with log=False"
        )
    blocks = range(1, lengths.pop() + 1)
    figure = Picture(figsize=(3.5 * len(panels), 2.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=log is True)[0]
    told = []
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        ax.axvspan(decoder_from - 0.5, len(blocks) + 0.5, color=BAND)
        for (name, values), (colour, dashes, marker) in zip(curves.items(), cycle(STYLES), strict=False):
            ax.plot(blocks, values, color=colour, linestyle=dashes, marker=marker, markersize=4, label=name)
            told.append(f"{title}, {name}, from {values[0]:.3g} to {values[-1]:.3g}")
        ax.set(xticks=blocks, xlim=(0.5, len(blocks) + 0.5))
        ax.set_xlabel("block n (shaded: decoder)", fontsize=9)
        ax.set_ylabel(labels if isinstance(labels, str) else labels[title], fontsize=9)
        if title in scaled:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
        ax.set_title(title, fontsize=10)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.alt = f"Curves over blocks 1 to {len(blocks)}. {'; '.join(told)}."
    return figure


def gate_sets(gates: Mapping[str, Float[Tensor, " channels"]], gain: float, margin: float) -> dict[str, int]:
    """How many channels of a block are open for each task alone, for all tasks, and for none.

    A fresh gate is gain / 2. A channel is *open* for a task where its gate is above that by more than
    `margin`, a share of it: 0.1 and gain 2 count gates above 1.1.
    """
    opened = {task: s > (1 + margin) * gain / 2 for task, s in gates.items()}
    number = torch.stack(list(opened.values())).sum(0)
    only = {f"{task} only": int((mask & (number == 1)).sum()) for task, mask in opened.items()}
    return only | {"all tasks": int((number == len(gates)).sum()), "no task": int((number == 0).sum())}


def gate_panels(
    gates: Mapping[str, Sequence[Float[Tensor, " channels"]]], gain: float, *, margin: float = 0.1
) -> Picture:
    """A small axis a block: every channel's gate for two tasks, joined, sorted by their difference.

    gates   {task: one tensor a block}
    margin  half the width of the band round gain / 2, a share of it, in which a gate counts as unmoved
    The title of an axis counts the channels open for one task only, and for both: see `gate_sets`. Raises
    ValueError unless there are two tasks with the same channels at every block.
    """
    shapes = {task: [len(s) for s in rows] for task, rows in gates.items()}
    if len(gates) != 2 or len({tuple(counts) for counts in shapes.values()}) != 1:
        raise ValueError(f"gates of two tasks with the same channels at every block are joined, got {shapes}")
    (first, firsts), (second, seconds) = gates.items()
    columns = min(5, len(firsts))
    rows = -(-len(firsts) // columns)
    figure = Picture(figsize=(7.6, 0.5 + 1.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    start, told = gain / 2, []
    for n, (ax, a, b) in enumerate(zip(axes, firsts, seconds, strict=False), 1):
        order = (a - b).argsort()
        x, a, b = np.arange(len(a)), a[order].numpy(), b[order].numpy()
        ax.axhspan((1 - margin) * start, (1 + margin) * start, color=BAND)
        ax.vlines(x, np.minimum(a, b), np.maximum(a, b), color="0.75", linewidth=0.8, zorder=1)
        for task, s, (colour, _, marker) in zip(gates, (a, b), STYLES, strict=False):
            ax.plot(x, s, marker, color=colour, markersize=2.5, label=task)
        sets = gate_sets({first: firsts[n - 1], second: seconds[n - 1]}, gain, margin)
        counts = [sets[f"{first} only"], sets[f"{second} only"], sets["all tasks"]]
        ax.set_title(f"block {n}: {counts[0]} | {counts[1]} | {counts[2]}", fontsize=9)
        ax.set(ylim=(0, gain), xticks=[])
        ax.tick_params(labelsize=8)
        told.append(f"{n}: {counts[0]}, {counts[1]} and {counts[2]} of {len(a)}")
    for ax in axes[len(firsts) :]:
        ax.set_axis_off()
    handles, names = axes[0].get_legend_handles_labels()
    caption = f"channels, sorted · titles: open for {first} only | {second} only | both · band: unmoved"
    options = {"fontsize": 8, "title": caption, "title_fontsize": 8, "frameon": False}
    figure.legend(handles, names, loc="outside lower center", ncols=2, **options)
    figure.supylabel(f"mean gate, 0 to {gain:g}", fontsize=8)
    figure.alt = (
        f"Mean gates of every channel for {first} and {second}. Open for {first} only, {second} only and "
        f"both, at block {'; '.join(told)}."
    )
    return figure


def draw(
    image: Float[Tensor, "3 height width"],
    blocks: Mapping[str, Sequence[Coded]],
    n: int,
    task: str,
    *,
    gain: float,
    shown: int = 3,
) -> Picture:
    """Block n for one task: all gates, sorted, and the maps of the most open and the most closed channels.

    blocks  {task: one `Coded` a block}, all of `image`
    gain    the largest gate there can be
    shown   channels at either end whose maps are drawn: the student's, the coded and the teacher's own, each
            channel on its own scale
    Raises ValueError for a task or a block that is not there.
    """
    if task not in blocks or not 1 <= n <= len(blocks[task]):
        there = {name: f"blocks 1..{len(rows)}" for name, rows in blocks.items()}
        raise ValueError(f"there is no block {n} for {task!r}: choose among {there}")
    coded = blocks[task][n - 1]
    order = coded.gates.argsort(descending=True)
    count = len(order)
    ends = [*range(min(shown, count)), *range(max(count - shown, min(shown, count)), count)]
    picked = order[ends]
    maps = tiles(coded, picked)

    figure = Picture(figsize=(7.4, 4.1))
    ax = figure.add_axes((0.03, 0.69, 0.14, 0.22))  # by hand: a computed layout takes as long as the drawing
    ax.imshow(image.movedim(0, -1).numpy().clip(0, 1))
    ax.set(xticks=[], yticks=[])
    ax = figure.add_axes((0.27, 0.66, 0.72, 0.27))
    ax.axhline(gain / 2, color="black", linewidth=0.8, linestyle=":")
    colours = {name: style[0] for name, style in zip(blocks, cycle(STYLES), strict=False)}
    for name, rows in blocks.items():
        ax.plot(
            range(count),
            rows[n - 1].gates[order].numpy(),
            "o" if name == task else ".",
            color=colours[name] if name == task else GREY,
            markersize=4,
            label=name,
        )
    ax.set(ylim=(0, gain), xlim=(-0.5, count - 0.5), xticks=[], ylabel="gate s")
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=8, loc="lower left", ncols=len(blocks))
    ax.set_title(f"block {n}: {count} channels, sorted by their gate for {task}", fontsize=10)

    ax = figure.add_axes((0.09, 0.01, 0.9, 0.55))
    ax.imshow(maps, aspect="auto", interpolation="nearest")
    ax.set_axis_off()
    cell = maps.shape[1] / len(ends)
    for column, channel in enumerate(picked.tolist()):
        ax.text(
            cell * (column + 0.5),
            -0.03 * maps.shape[0],
            f"channel {channel}: {float(coded.gates[channel]):.2f}",
            ha="center",
            size=8,
        )
    for row, name in enumerate(("student\n$F_u$", "coded\n$s ⊙ F_u$", "teacher\n$F_t$")):
        ax.text(-0.01 * maps.shape[1], maps.shape[0] * (row + 0.5) / 3, name, ha="right", va="center", size=9)
    figure.exact = [to_hex(colour) for colour in MAPS["depth"](range(LEVELS))]
    figure.alt = (
        f"Block {n} for {task}: {count} gates from {float(coded.gates.min()):.2f} to "
        f"{float(coded.gates.max()):.2f} of {gain:g}, and maps of channels "
        f"{', '.join(map(str, picked.tolist()))}: the student's, coded, and the teacher's own."
    )
    return figure


def tiles(coded: Coded, channels: Integer[Tensor, " shown"]) -> Float[np.ndarray, "rows columns 4"]:
    """Maps of the channels as one RGBA picture: a row each for student, coded and teacher, white between.

    Each channel, a column, has a scale of its own, from 0 to the largest number of its three maps.
    """
    gates = coded.gates[channels, None, None]
    student, teacher = coded.student[channels], coded.teacher[channels]
    rows = np.stack([student.numpy(), (gates * student).numpy(), teacher.numpy()])
    top = np.maximum(rows.max(axis=(0, 2, 3), keepdims=True), 1e-12)
    tiles = np.pad(
        MAPS["depth"]((rows / top).clip(0, 1)),
        ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)),
        constant_values=1.0,
    )
    return np.concatenate([np.concatenate(list(row), axis=1) for row in tiles], axis=0)


def gate_browser(
    image: Float[Tensor, "3 height width"], blocks: Mapping[str, Sequence[Coded]], *, gain: float
) -> ipywidgets.Widget:
    """A slider over blocks, a choice of task, and `draw`. Raises ValueError unless all tasks have blocks."""
    counts = {task: len(rows) for task, rows in blocks.items()}
    if not counts or len(set(counts.values())) != 1 or not min(counts.values()):
        raise ValueError(f"a browser needs the same blocks, at least one, for every task, got {counts}")
    last = next(iter(counts.values()))
    n = ipywidgets.IntSlider(1, 1, last, description="block n", continuous_update=False)
    task = ipywidgets.Dropdown(options=list(blocks), description="task")
    picture = ipywidgets.interactive_output(
        lambda n, task: display(draw(image, blocks, n, task, gain=gain)), {"n": n, "task": task}
    )
    picture.layout.height = "480px"
    return ipywidgets.VBox([ipywidgets.HBox([n, task]), picture])
