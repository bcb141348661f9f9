"""Diagrams of networks, drawn from their numbers: where a student branches, how its block n is trained."""

from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from kamal_lib.viz.panels import Picture

TRUNK, LEARNT = "#b9c6d3", "#f6d425"
STREAMS = ("#9bd1b5", "#f2b48c", "#c9b3e0", "#e6d98c")


def branch_diagram(
    channels: Sequence[int], branch: Mapping[str, int], *, pools: Sequence[bool], names: Mapping[str, str]
) -> Picture:
    """A TargetNet as in Figure 1 of Ye et al.: the shared blocks, then each task's blocks after its branch.

    channels  of F^1..F^N
    branch    {task: p}, the shared block that the task's branch reads
    pools     of encoder blocks 1..N/2, whether they pool; a block is drawn as high as F^n is fine
    names     {task: the teacher that its blocks come from}
    Raises ValueError where these do not fit together.
    """
    total = len(channels)
    if total != 2 * len(pools) or not branch or not all(1 <= p <= total for p in branch.values()):
        raise ValueError(
            f"{len(pools)} pool flags and the branches {dict(branch)} do not fit {total} blocks: give a flag "
            f"for each encoder block, half of all, and at least one branch, each at a block 1..{total}"
        )
    halvings = [sum(pools[:n]) for n in range(len(pools) + 1)]
    heights = [0.86 * 0.8**h for h in [*halvings[1:], *reversed(halvings[:-1])]]
    labels = [f"{n}\n{c}" for n, c in enumerate(channels, start=1)]
    rows = _rows(branch)
    figure, ax = _canvas(
        total,
        rows,
        "number: block n · below it: channels of $F^n$ · height: resolution of $F^n$ · ○ channel coding",
    )
    last = max(branch.values())
    _chain(ax, 0, 0.35, labels[:last], heights, TRUNK)
    for (task, point), colour in zip(branch.items(), cycle(STREAMS), strict=False):
        _coding(ax, point, rows[task], "white")
        _chain(
            ax,
            rows[task],
            point + 0.6,
            labels[point:],
            heights[point:],
            colour,
            first=point + 1,
            end=total + 0.85,
        )
        ax.text(total + 0.95, rows[task], f"{task}\n", va="center", size=9, weight="bold")
        ax.text(total + 0.95, rows[task], f"\nfrom {names[task]}", va="center", size=8)
    figure.alt = f"A network of {total} blocks with {', '.join(map(str, channels))} channels; " + "; ".join(
        f"{task} leaves the shared part after block {point}" for task, point in branch.items()
    )
    return figure


def projection_diagram(n: int, blocks: int, tasks: Mapping[str, str]) -> Picture:
    """How block n of the student is trained, as in Figure 2 of Ye et al. (Eq. 6).

    tasks  {teacher: letter of its features and predictions}, e.g. {"SegNet": "s", "DepthNet": "d"}
    Raises ValueError for n outside 1..blocks.
    """
    if not 1 <= n <= blocks or not tasks:
        raise ValueError(
            f"block n = {n} of {blocks} and {len(tasks)} teachers: n runs 1..{blocks}, teachers from 1"
        )
    labels = [str(m) for m in range(1, blocks + 1)]
    rows = _rows(tasks)
    figure, ax = _canvas(
        blocks,
        rows,
        "yellow: learns · ○ channel coding · dashed: not run, its result is replaced · all else: frozen",
    )
    _chain(ax, 0, 0.35, labels[: n - 1], [0.6] * n, TRUNK, end=n - 0.3)
    _block(ax, n, 0, 0.6, str(n), LEARNT)
    ax.text(n + 0.3, -0.42, f"student's $F_u^{{{n}}}$", ha="right", va="center", size=9)
    for (teacher, letter), colour in zip(tasks.items(), cycle(STREAMS), strict=False):
        y, result = rows[teacher], letter.upper()
        for m in range(1, n + 1):
            _block(ax, m, y, 0.6, str(m), "white", dashed=True)
        _coding(ax, n, y, LEARNT)
        _chain(ax, y, n + 0.6, labels[n:], [0.6] * blocks, colour, first=n + 1, end=blocks + 0.85)
        feature = ax.text(n + 0.5, y + (0.33 if y > 0 else -0.33), f"$F_{{u{letter}}}^{{{n}}}$", size=9)
        feature.set(ha="center", va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        ax.text(0.3, y, teacher, ha="right", va="center", size=9, weight="bold")
        loss = f"$\\hat{{{result}}}$  →  loss against ${result}$"
        ax.text(blocks + 0.95, y, loss, va="center", size=9)
    figure.alt = (
        f"Block {n} of {blocks} of the student: its feature, coded for each of {', '.join(tasks)}, replaces "
        "that teacher's feature; the rest of the teacher turns it into a prediction, which the loss compares "
        "with the teacher's own."
    )
    return figure


def _rows(streams: Mapping[str, object]) -> dict[str, int]:
    """Heights of the streams: above the student, below it, above, ..."""
    return {name: (-1) ** k * (k // 2 + 1) for k, name in enumerate(streams)}


def _canvas(total: int, rows: Mapping[str, int], caption: str) -> tuple[Picture, Axes]:
    low, high = min(0, *rows.values()) - 0.65, max(rows.values()) + 0.5
    figure = Picture(figsize=(9.5, 0.95 * (high - low) + 0.25), layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(-0.7, total + 3.2), ylim=(low, high))
    ax.set_axis_off()
    ax.set_title(caption, size=8, y=0, va="top")
    ax.text(0.3, 0, "image", ha="right", va="center", size=9)
    return figure, ax


def _block(ax: Axes, x: int, y: int, height: float, label: str, colour: str, *, dashed: bool = False) -> None:
    shape = FancyBboxPatch(
        (x - 0.28, y - height / 2), 0.56, height, boxstyle="round,pad=0,rounding_size=0.06"
    )
    shape.set(facecolor=colour, edgecolor="0.3", linestyle="--" if dashed else "-", zorder=2)
    ax.add_patch(shape)
    ax.text(x, y, label, ha="center", va="center", size=8, color="0.5" if dashed else "black")


def _arrow(ax: Axes, start: float, end: float, y: int) -> None:
    ax.annotate(
        "", (end, y), (start, y), arrowprops={"arrowstyle": "-|>", "color": "0.3", "shrinkA": 0, "shrinkB": 0}
    )


def _coding(ax: Axes, point: int, y: int, colour: str) -> None:
    """The way from the student's block `point` to row y, and the channel coding at its end."""
    x = point + 0.5
    ax.plot([point + 0.28, x, x], [0, 0, y], color="0.3", linewidth=1, zorder=1)
    ax.plot(x, y, "o", markersize=11, color=colour, markeredgecolor="0.3", zorder=3)


def _chain(
    ax: Axes,
    y: int,
    start: float,
    labels: Sequence[str],
    heights: Sequence[float],
    colour: str,
    *,
    first: int = 1,
    end: float | None = None,
) -> None:
    """Blocks first, first + 1, ... in a row, with arrows from `start` to `end`."""
    for x, (label, height) in enumerate(zip(labels, heights, strict=False), start=first):
        _arrow(ax, start, x - 0.28, y)
        _block(ax, x, y, height, label, colour)
        start = x + 0.28
    if end is not None:
        _arrow(ax, start, end, y)
