"""A third teacher arrives: how TargetNet-2 teaches block n of TargetNet-3, and what the first tasks lose."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from kamal_lib.viz.curves import STYLES
from kamal_lib.viz.diagram import LEARNT, STREAMS, TRUNK
from kamal_lib.viz.panels import Picture

IN, OUT = 0.37, 0.64
"""How far behind block n a coded feature comes in, and behind block p a branch leaves: apart, for n = p."""
RUN, IDLE = "0.2", "0.78"
"""Lines and edges of what runs, and of what does not."""


def draw_arrival(*, blocks: int, points: Mapping[str, int], n: int) -> Picture:
    """How block n of TargetNet-3 learns online (Ye et al., Fig. 4 and Eq. 9), with TargetNet-2 as a teacher.

    blocks  N of every network
    points  {task: p}, where TargetNet-2 branches out
    For a task with p >= n the U-coded feature goes through TargetNet-2's trunk, coding and branch; beyond
    p it takes the place of that task's own branch block n. The student's blocks before n are frozen. The
    newcomer is NormNet. Raises ValueError for n or a point outside 1..blocks, without points, and for normals
    among them.
    """
    if "normals" in points:
        raise ValueError(f"normals arrive here, so TargetNet-2 cannot have them yet, got {dict(points)}")
    if not points or not all(1 <= block <= blocks for block in (n, *points.values())):
        raise ValueError(f"block {n} and the branches {dict(points)} must be among blocks 1..{blocks}")
    rows = {task: (-1) ** k * (k // 2 + 1) for k, task in enumerate(points)}  # the trunk's is 0
    colours = dict(zip([*points, "normals"], cycle(STREAMS), strict=False))
    top, student = max(rows.values()) + 0.7, min(0, *rows.values()) - 2.25
    normals, bottom, x = student - 1.7, student - 2.7, n + IN
    figure = Picture(figsize=(9.5, 0.5 * (top - bottom)))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-1.75, blocks + 3.9), ylim=(bottom, top))
    ax.set_axis_off()
    _frame(ax, "TargetNet-2,\nfrozen", blocks, student + 1.5, top - 0.1)
    _frame(ax, "NormNet,\nfrozen", blocks, normals - 0.45, normals + 0.45)
    ax.text(0.35, student, "TargetNet-3\n(student)", ha="right", va="center", fontsize=9, weight="bold")

    _row(ax, 0, range(1, max(points.values()) + 1), n, TRUNK)
    for task, p in points.items():
        y, out = rows[task], p + OUT - 0.12 * (abs(rows[task]) - 1)
        edge = RUN if n <= p else IDLE
        ax.plot([x if n == p else p + 0.27, out, out], [0, 0, y], color=edge, linewidth=1, zorder=1)
        ax.plot(out, y, "o", markersize=8, color="white", markeredgecolor=edge, zorder=3)
        _row(ax, y, range(p + 1, blocks + 1), n, colours[task], start=out)
        _loss(ax, y, max(out if p == blocks else 0, x if n == blocks else 0, blocks + 0.27), task, blocks)
    _row(ax, normals, range(1, blocks + 1), n, colours["normals"])
    _loss(ax, normals, x if n == blocks else blocks + 0.27, "normals", blocks)
    _row(ax, student, range(1, blocks + 1), n, TRUNK, learns=True)
    ax.text(n - 0.1, student + 0.56, f"$F_{{u3}}^{{{n}}}$", ha="center", va="center", fontsize=10)

    inside = [*{rows[task] if p < n else 0 for task, p in points.items()}, normals]  # rows where it comes in
    ax.plot([n + 0.27, x], [student, student], color=RUN, linewidth=2.4, zorder=2)
    ax.plot([x, x], [normals, max(inside)], color=RUN, linewidth=2.4, zorder=2)
    ax.plot([x] * len(inside), inside, "o", color=RUN, markersize=5, zorder=3)
    for name, feature, y in (("U", "u2", student + 1.0), ("M", "m", student - 0.8)):
        ax.plot(x, y, "o", markersize=17, color=LEARNT, markeredgecolor="black", markeredgewidth=2, zorder=3)
        ax.text(x, y, name, ha="center", va="center", fontsize=9, weight="bold", zorder=4)
        ax.text(x - 0.3, y, f"{name}-coding", ha="right", va="center", fontsize=8)
        ax.text(x + 0.3, y, f"$F_{{{feature}}}^{{{n}}}$", va="center", fontsize=10)
    caption = (
        "yellow, thick edge: learns · other colours, thin edge: runs, frozen · pale, dashed: not run · "
        "○ TargetNet-2's own coding"
    )
    ax.text(blocks / 2 + 1.1, bottom + 0.25, caption, ha="center", va="center", fontsize=8)
    ways = (
        f"{task} replaces block {n} of its own branch"
        if p < n
        else f"{task} through the trunk to block {p}, TargetNet-2's own coding, and its branch"
        for task, p in points.items()
    )
    figure.alt = (
        f"Block {n} of {blocks} of TargetNet-3 learns. Its U-coded feature enters TargetNet-2: "
        f"{'; '.join(ways)}. Its M-coded feature replaces block {n} of NormNet."
    )
    return figure


def draw_forgetting(
    scores: Mapping[str, Mapping[str, float | int]],
    *,
    higher: Mapping[str, bool],
    before: str = "TargetNet-2",
) -> Picture:
    """How the first tasks fare after the third one arrived: a panel a metric, in it a dot a network.

    scores  {network: {metric: value}}; where a network lacks a metric, its row says "not learned"
    higher  {metric, with its unit: whether more is better}: the panels in this order, each on its own scale
    before  the network whose score is the dashed line; what is worse than it is shaded
    Raises ValueError for a `before` that is not there, and for no metric or one that no network has.
    """
    if before not in scores:
        raise ValueError(f"there is no score of {before!r}: `before` is one of {', '.join(scores)}")
    known = {metric for row in scores.values() for metric in row}
    if not higher or set(higher) - known:
        raise ValueError(f"`higher` names at least one of the metrics {sorted(known)}, got {sorted(higher)}")
    names, lines = [name.replace("\n", " ") for name in scores], -(-len(higher) // 4)
    columns = -(-len(higher) // lines)
    figure = Picture(figsize=(9.5, lines * (0.3 * len(names) + 1.0)), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for ax in axes[len(higher) :]:
        ax.set_axis_off()
    told = []
    for ax, (metric, more) in zip(axes, higher.items(), strict=False):
        values = [float(row[metric]) if metric in row else math.nan for row in scores.values()]
        there = [value for value in values if not math.isnan(value)]
        low, high, line = min(there), max(there), values[list(scores).index(before)]
        margin = 0.25 * (high - low) or 0.1 * abs(high) or 1.0
        digits = max(0, 2 - math.floor(math.log10(max(map(abs, there)) or 1.0)))
        if high > low:  # enough of them to tell the nearest apart
            digits = min(max(digits, 1 - math.floor(math.log10(high - low))), 5)
        ax.set(xlim=(low - margin, high + margin), ylim=(len(names) - 0.4, -0.8))
        if not math.isnan(line):
            ax.axvspan(*((low - margin, line) if more else (line, high + margin)), color="0.92")
            ax.axvline(line, color="0.3", linewidth=1, linestyle="--")
        for y, (value, (colour, _, marker)) in enumerate(zip(values, cycle(STYLES), strict=False)):
            if math.isnan(value):
                ax.text((low + high) / 2, y, "not learned", ha="center", va="center", fontsize=8)
                continue
            ax.plot(value, y, marker, color=colour, markersize=7)
            text = ax.text(value, y - 0.25, f"{value:.{digits}f}", ha="center", va="bottom", fontsize=8)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
        ax.set_yticks(range(len(names)), names, fontsize=9)
        ax.set_title(metric, fontsize=10)
        ax.set_xlabel("better →" if more else "← better", fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.tick_params(axis="x", labelsize=8)
        pairs = zip(names, values, strict=True)
        told.append(f"{metric} " + ", ".join(f"{n} {v:.{digits}f}" for n, v in pairs if not math.isnan(v)))
    figure.alt = f"Scores of each network, what is worse than {before}'s shaded: {'; '.join(told)}."
    return figure


def _frame(ax: Axes, name: str, blocks: int, low: float, high: float) -> None:
    """The frame that Figure 4 draws round what stays as it is."""
    box = FancyBboxPatch((0.45, low), blocks + 3.35, high - low, boxstyle="round,pad=0,rounding_size=0.15")
    box.set(facecolor="0.97", edgecolor="0.4", linestyle="-.", zorder=0)
    ax.add_patch(box)
    ax.text(0.35, (low + high) / 2, name, ha="right", va="center", fontsize=9)


def _loss(ax: Axes, y: float | int, start: float, task: str, blocks: int) -> None:
    style = {"arrowstyle": "-|>", "color": RUN, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (blocks + 1.05, y), (start, y), arrowprops=style)
    whose = "NormNet's" if task == "normals" else "TargetNet-2's"
    ax.text(blocks + 1.15, y, f"{task}: loss against\n{whose} prediction", va="center", fontsize=8)


def _row(
    ax: Axes,
    y: float | int,
    numbers: Sequence[int],
    n: int,
    colour: str,
    *,
    start: float = 0.0,
    learns: bool = False,
) -> None:
    """Blocks in a row. A teacher's run beyond n, where the coded feature comes in; the student's up to n."""
    for m in numbers:
        runs, yellow = m <= n if learns else m > n, learns and m == n
        shape = FancyBboxPatch((m - 0.27, y - 0.27), 0.54, 0.54, boxstyle="round,pad=0,rounding_size=0.06")
        shape.set(
            facecolor=LEARNT if yellow else colour if runs else "white", linestyle="-" if runs else "--"
        )
        shape.set(edgecolor=RUN if runs else IDLE, linewidth=2.4 if yellow else 1, zorder=2)
        ax.add_patch(shape)
        ax.text(m, y, str(m), ha="center", va="center", fontsize=8, color="black" if runs else "0.55")
        begin = start if start and m == numbers[0] else n + IN if m == n + 1 else m - 0.73
        if m > 1:
            ax.plot([begin, m - 0.27], [y, y], color=RUN if runs else IDLE, linewidth=1, zorder=1)
