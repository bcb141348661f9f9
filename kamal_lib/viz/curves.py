"""Curves: how losses and metrics fall over training, and over the blocks of the student."""

from collections.abc import Mapping, Sequence
from itertools import cycle

from kamal_lib.viz.panels import Picture

STYLES = (
    *(("#0072b2", "-", "o"), ("#d55e00", "--", "s"), ("#009e73", "-.", "^")),
    *(("#cc79a7", ":", "D"), ("#56b4e9", "-", "v"), ("#000000", "--", "x")),
)
"""Colour (Okabe and Ito), dashes and marker of each curve: any one of the three tells neighbours apart."""


def learning_curves(
    histories: Mapping[str, Sequence[Mapping[str, float | int]]],
    key: str,
    *,
    over: str = "epoch",
    label: str | None = None,
) -> Picture:
    """One curve a history: its rows' `key` against their `over`; rows without `key` are left out.

    label  of the vertical axis, with the unit; None: `key`
    Raises ValueError where a history has no row with both.
    """
    figure = Picture(figsize=(6, 3.2), layout="constrained")
    ax = figure.subplots()
    ends = []
    for (name, rows), (colour, dashes, marker) in zip(histories.items(), cycle(STYLES), strict=False):
        points = [(row[over], row[key]) for row in rows if key in row and over in row]
        if not points:
            keys = sorted({k for row in rows for k in row})
            raise ValueError(f"no row of {name!r} has both {key!r} and {over!r}: it has {keys}")
        x, y = zip(*points, strict=True)
        ax.plot(x, y, color=colour, linestyle=dashes, marker=marker, markersize=4, label=name)
        ends.append(f"{name} from {y[0]:.3g} to {y[-1]:.3g}")
    ax.set(xlabel=over, ylabel=label or key)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    figure.alt = f"Curves of {label or key} over {over}: {'; '.join(ends)}."
    return figure


def block_losses(
    losses: Mapping[str, Sequence[float | int]], branch: Mapping[str, int], *, decoder_from: int
) -> Picture:
    """The losses on held-out images that Eq. 7 of Ye et al. compares, a small axis a task.

    losses        {task: L^1 ... L^N}, NaN for a block that was not trained
    branch        {task: p}, the block that was chosen; it is marked
    decoder_from  number of the first decoder block, N/2 + 1; from there on the axis is shaded
    Raises ValueError for a branch that is missing, or is no block.
    """
    figure = Picture(figsize=(min(3.2 * len(losses), 9.5), 2.8), layout="constrained")
    axes = figure.subplots(1, len(losses), squeeze=False)[0]
    for ax, (task, values) in zip(axes, losses.items(), strict=True):
        point = branch.get(task)
        if point is None or not 1 <= point <= len(values):
            raise ValueError(f"{task} needs a branch among its blocks 1..{len(values)}, got {point}")
        blocks = range(1, len(values) + 1)
        ax.axvspan(decoder_from - 0.5, len(values) + 0.5, color="0.92", label="decoder")
        ax.plot(blocks, values, color=STYLES[0][0], marker="o", markersize=4)
        ax.plot(
            point, values[point - 1], "*", color=STYLES[1][0], markersize=15, label=f"branch: n = {point}"
        )
        ax.set(xlabel="block n", ylabel="held-out loss", xticks=blocks, xlim=(0.5, len(values) + 0.5))
        ax.set_title(task, fontsize=10)
        ax.legend(fontsize=8)
    chosen = ", ".join(
        f"{task} at block {branch[task]} ({losses[task][branch[task] - 1]:.3g})" for task in losses
    )
    figure.alt = f"Held-out loss of each block, the decoder's from block {decoder_from} on; chosen: {chosen}."
    return figure


def interval_curves(
    curves: Mapping[str, Sequence[Mapping[str, float | int]]], *, over: str, labels: Mapping[str, str]
) -> Picture:
    """A small axis for each curve: its rows' "mean" against `over`, with bars from "low" to "high".

    curves  {name: rows with `over`, "mean", "low" and "high"}; the axis of `over` doubles from tick to tick
    labels  {name: what the vertical axis says, with the unit and which direction is better}
    Raises ValueError for a curve without rows.
    """
    if empty := [name for name, rows in curves.items() if not rows]:
        raise ValueError(f"no row for {', '.join(empty)}: leave a curve without measurements out")
    figure = Picture(figsize=(min(3.3 * len(curves), 9.9), 3), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    told = []
    for ax, (name, rows) in zip(axes, curves.items(), strict=True):
        x, mean = [row[over] for row in rows], [row["mean"] for row in rows]
        below = [row["mean"] - row["low"] for row in rows]
        above = [row["high"] - row["mean"] for row in rows]
        colour, dashes, marker = STYLES[0]
        ax.errorbar(
            x,
            mean,
            yerr=[below, above],
            color=colour,
            linestyle=dashes,
            marker=marker,
            markersize=4,
            capsize=3,
        )
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.minorticks_off()
        ax.tick_params(labelsize=8)
        ax.set(xlabel=over, ylabel=labels.get(name, "mean"))
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.3)
        told.append(f"{name} from {mean[0]:.3g} at {x[0]:g} to {mean[-1]:.3g} at {x[-1]:g}")
    figure.alt = f"Mean and interval over {over}: {'; '.join(told)}."
    return figure
