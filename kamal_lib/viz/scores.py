"""Scores as distributions: what a critic gives each network's maps (Liu et al., Fig. 5), and IoU by class."""

import math
from collections.abc import Mapping
from itertools import cycle

import numpy as np
from jaxtyping import Float
from torch import Tensor

from kamal_lib.viz.curves import STYLES
from kamal_lib.viz.panels import Picture


def score_histograms(
    scores: Mapping[str, Float[Tensor, " images"]], *, bins: int = 24, label: str = "score D(Q | I)"
) -> Picture:
    """A histogram a network of its maps' scores, all on one axis; the dashed line is the teacher's mean.

    scores  {network: one score an image}, the teacher's first
    Raises ValueError where there are none, or where they are not finite.
    """
    values = {name: each.detach().cpu().double().numpy() for name, each in scores.items()}
    if not values or any(not len(each) or not np.isfinite(each).all() for each in values.values()):
        shapes = {name: each.shape for name, each in values.items()}
        raise ValueError(f"each network needs at least one score, and finite ones, got {shapes}")
    every = np.concatenate(list(values.values()))
    low, high = float(every.min()), float(every.max())
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    teacher = float(next(iter(values.values())).mean())
    figure = Picture(figsize=(7, 0.62 * len(values) + 0.7), layout="constrained")
    axes = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
    told = []
    for ax, (name, each), (colour, _, _) in zip(axes, values.items(), cycle(STYLES), strict=False):
        ax.hist(each, edges, color=colour)
        ax.axvline(teacher, color="black", linewidth=1, linestyle="--")
        ax.set_yticks([])
        ax.set_ylabel(f"{name}\nmean {each.mean():.3g}", fontsize=8, rotation=0, ha="right", va="center")
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right", "left"]].set_visible(False)
        told.append(f"{name} {each.mean():.3g} ± {each.std():.2g}")
    axes[-1].set_xlabel(f"{label}; dashed: mean of {next(iter(values))}", fontsize=9)
    figure.alt = f"Histograms of {label}, mean and spread: {'; '.join(told)}."
    return figure


def class_bars(ious: Mapping[str, Mapping[str, float]], *, reference: str | None = None) -> Picture:
    """IoU by class: a group of bars a class, in it a bar a network; `reference` is a black line across it.

    ious  {network: {class: IoU}}; NaN for a class that does not occur, which is left out
    Classes stand in the order of the reference's IoU, else of the first network's, the best first. Raises
    ValueError unless all networks have the same classes, and for a reference that is not there.
    """
    names = {tuple(row) for row in ious.values()}
    if len(names) != 1 or (reference is not None and reference not in ious):
        raise ValueError(
            f"networks side by side need the same classes, and a reference among them, got {list(ious)} with "
            f"{[list(row) for row in ious.values()]} and {reference!r}"
        )
    order = ious[reference] if reference is not None else next(iter(ious.values()))
    classes = [name for name in sorted(order, key=lambda c: -order[c]) if not math.isnan(order[name])]
    bars = [name for name in ious if name != reference]
    figure = Picture(figsize=(9.5, 2.9), layout="constrained")
    ax = figure.subplots()
    place, wide = np.arange(len(classes)), 0.8 / max(len(bars), 1)
    for k, (name, (colour, _, _)) in enumerate(zip(bars, cycle(STYLES), strict=False)):
        at = place - 0.4 + (k + 0.5) * wide
        ax.bar(at, [ious[name][c] for c in classes], wide, color=colour, edgecolor="white", label=name)
    if reference is not None:
        best = [ious[reference][c] for c in classes]
        ax.hlines(best, place - 0.45, place + 0.45, color="black", linewidth=2, label=reference)
    ax.set_xticks(place, classes, fontsize=8, rotation=30, ha="right", rotation_mode="anchor")
    ax.set(ylim=(0, 1), xlim=(-0.6, len(classes) - 0.4))
    ax.set_ylabel("IoU", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(ious), fontsize=8, frameon=False)
    means = (f"{name} {np.nanmean([row[c] for c in classes]):.3f}" for name, row in ious.items())
    figure.alt = f"IoU of {', '.join(classes)}, a bar a network; mean over these: {', '.join(means)}."
    return figure
