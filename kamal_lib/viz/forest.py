"""What studies compare: differences with their intervals, and losses over blocks, seed by seed."""

from collections.abc import Mapping, Sequence

from matplotlib.ticker import MaxNLocator

from kamal_lib.viz.curves import STYLES
from kamal_lib.viz.panels import Picture

COLOURS = {"holds": "#0072b2", "open": "0.45", "opposite seen": "#d55e00"}
WORDS = {"holds": "better", "open": "open", "opposite seen": "worse"}
MARKERS = {"holds": "o", "open": "s", "opposite seen": "X"}


def forest(
    panels: Mapping[str, Sequence[Mapping[str, float | str]]], *, names: Mapping[str, str] | None = None
) -> Picture:
    """A panel for each score, a line for each of its comparisons, and 0 where nothing differs.

    panels  {what the horizontal axis says: rows with "row", "difference", "low", "high" and "verdict"}
    names   {row: what it is called, if not so}
    Raises ValueError for panels that do not compare the same rows in the same order.
    """
    called = {**(names or {})}
    lists = [[str(each["row"]) for each in rows] for rows in panels.values()]
    if not lists or not lists[0] or any(one != lists[0] for one in lists):
        raise ValueError(f"every panel needs the same rows in the same order, got {lists}")
    figure = Picture(figsize=(9, 0.34 * len(lists[0]) + 1.3), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    told, seen = [], set()
    for ax, (label, rows) in zip(axes, panels.items(), strict=True):
        ax.axvline(0, color="0.7", linewidth=1)
        for place, each in enumerate(rows):
            low, mean, high = (float(each[name]) for name in ("low", "difference", "high"))
            kind = str(each["verdict"])
            ax.plot([low, high], [place, place], color=COLOURS[kind], linewidth=1.5)
            name = None if kind in seen else WORDS[kind]
            ax.plot(mean, place, MARKERS[kind], color=COLOURS[kind], markersize=6, label=name)
            seen.add(kind)
            told.append(f"{called.get(lists[0][place], lists[0][place])} {label} {mean:+.3g} ({WORDS[kind]})")
        ax.set_xlabel(label, fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(lists[0])), [called.get(row, row) for row in lists[0]], fontsize=9)
    axes[0].invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    figure.alt = f"Differences with 95 % intervals: {'; '.join(told)}."
    return figure


def block_losses(
    losses: Mapping[int, Mapping[str, Sequence[float]]], *, decoder_from: int, label: str = "held-out loss"
) -> Picture:
    """Losses over the blocks, one axis a task and one line a seed; a star marks the decoder's minimum.

    losses        {seed: {task: loss of blocks 1..N}}
    decoder_from  the first block of the decoder, where Eq. 7 begins to look
    """
    tasks = list(next(iter(losses.values())))
    figure = Picture(figsize=(4.5 * len(tasks), 2.8), layout="constrained")
    told = []
    for ax, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        count = len(next(iter(losses.values()))[task])
        ax.axvspan(decoder_from - 0.5, count + 0.5, color="0.94")
        for i, (seed, of_seed) in enumerate(losses.items()):
            values = list(of_seed[task])
            best = min(range(decoder_from - 1, count), key=values.__getitem__)
            colour, dashes, _ = STYLES[i % len(STYLES)]
            ax.plot(range(1, count + 1), values, color=colour, linestyle=dashes, label=f"seed {seed}")
            ax.plot(best + 1, values[best], "*", color=colour, markersize=12)
            told.append(f"{task}, seed {seed}: block {best + 1}")
        ax.set(xlabel="block n (grey: decoder)", ylabel=label, xticks=range(1, count + 1))
        ax.set_title(task, fontsize=10)
        ax.tick_params(labelsize=8)
        ax.legend(fontsize=7)
    figure.alt = f"Losses over the blocks; the decoder's smallest: {'; '.join(told)}."
    return figure
