"""Widgets for live notebooks, each with a static twin for readers without a kernel."""

from collections.abc import Callable, Mapping, Sequence

import ipywidgets
from IPython.display import display
from torch import Tensor

from kamal_lib.sample import Sample
from kamal_lib.viz.panels import Picture, grid, prediction_panels, scene_panel

VIEWS = ("image", "labels", "depth", "normals", "boxes")


def draw(
    sample: Sample, view: str, class_names: Sequence[str], *, depth_range: tuple[float, float] | None = None
) -> Picture:
    """One view of one scene: what `scene_browser` shows, as a plain figure.

    Raises ValueError for a view that is none of `VIEWS`, or that the sample does not hold.
    """
    panel = scene_panel(sample, view, view)
    return grid([[panel]], class_names=class_names, depth_range=depth_range, width=4.5)


def scene_browser(samples: Sequence[Sample], class_names: Sequence[str]) -> ipywidgets.Widget:
    """A slider over scenes, a choice of view, and the picture; the views are those that every sample holds.

    All depths share one range of colours. Raises ValueError where no view is common to all.
    """
    views = [view for view in VIEWS if samples and all(view in sample for sample in samples)]
    if not views:
        raise ValueError(f"a browser needs samples with a common view, got {[sorted(s) for s in samples]}")
    depths = [sample["depth"] for sample in samples if "depth" in sample]
    known = [depth[depth > 0] for depth in depths if (depth > 0).any()]
    depth_range = (min(d.min().item() for d in known), max(d.max().item() for d in known)) if known else None

    def show(index: int, choice: str) -> None:
        display(draw(samples[index], choice, class_names, depth_range=depth_range))

    return _browser(show, len(samples), views, words=("scene", "show"), height="480px")


def draw_prediction(
    sample: Sample, teacher: str, key: str, guess: Tensor, class_names: Sequence[str] = ()
) -> Picture:
    """Image, truth, a teacher's prediction of `key` and its error: what `teacher_browser` shows.

    Raises ValueError as `prediction_panels`.
    """
    return prediction_panels([sample], key, {teacher: guess[None]}, class_names)


def teacher_browser(
    samples: Sequence[Sample], guesses: Mapping[str, tuple[str, Tensor]], class_names: Sequence[str] = ()
) -> ipywidgets.Widget:
    """A slider over samples, a choice of teacher, and image, truth, prediction and error side by side.

    guesses  {teacher: (entry of the sample that it predicts, one map a sample)}, computed beforehand
    Raises ValueError unless each teacher has one map a sample, and there is at least one of both.
    """
    counts = {teacher: len(maps) for teacher, (_, maps) in guesses.items()}
    if not samples or set(counts.values()) != {len(samples)}:
        raise ValueError(f"{len(samples)} samples need as many predictions of every teacher, got {counts}")

    def show(index: int, choice: str) -> None:
        key, maps = guesses[choice]
        display(draw_prediction(samples[index], choice, key, maps[index], class_names))

    return _browser(show, len(samples), list(guesses), words=("image", "teacher"), height="300px")


def _browser(
    show: Callable[[int, str], None],
    count: int,
    options: Sequence[str],
    *,
    words: tuple[str, str],
    height: str,
) -> ipywidgets.Widget:
    """A slider over `count` things, a menu of `options`, and below what `show(index, choice)` displays."""
    index = ipywidgets.IntSlider(0, 0, count - 1, description=words[0], continuous_update=False)
    choice = ipywidgets.Dropdown(options=options, description=words[1])
    picture = ipywidgets.interactive_output(show, {"index": index, "choice": choice})
    picture.layout.height = height
    return ipywidgets.VBox([ipywidgets.HBox([index, choice]), picture])
