"""A live view of training: the loss so far, redrawn while the notebook's cell still runs."""

import time
from collections.abc import Callable, Mapping, Sequence

from IPython import get_ipython
from IPython.display import DisplayHandle, display
from matplotlib.ticker import MaxNLocator

from kamal_lib.viz.curves import learning_curves
from kamal_lib.viz.panels import Picture

Rows = Sequence[Mapping[str, float | int]]


def draw(history: Rows, key: str, epochs: int, *, label: str | None = None) -> Picture:
    """The loss `key` of the epochs so far, on an axis as long as all `epochs`: a plain figure.

    label  of the vertical axis, with the unit; None: `key`
    Raises ValueError for a history without the key.
    """
    figure = learning_curves({key: history}, key, label=label)
    done = history[-1]["epoch"]
    figure.set_size_inches(5, 2.1)
    (ax,) = figure.axes
    ax.set_xlim(0.5, epochs + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(f"{key}: epoch {done:g} of {epochs}", fontsize=10)
    if (legend := ax.get_legend()) is not None:
        legend.remove()  # the one curve's name stands above it
    figure.alt += f" Epoch {done:g} of {epochs}."
    return figure


class Live:
    """What `watch` of a training may be: it draws the loss and redraws it after each epoch, in one place.

    Redrawn at most once in `every` seconds, and always after the last of `epochs`, so that the figure which
    stays is the whole curve. A `look`, such as a few early predictions, is drawn below it each time; it may
    put the networks in eval mode. A history from the store can be handed over by hand: `live(history)`.
    Outside of IPython nothing is drawn.
    """

    def __init__(
        self,
        key: str,
        epochs: int,
        *,
        label: str | None = None,
        look: Callable[[], Picture] | None = None,
        every: float = 1.0,
    ):
        """`key`, `epochs` and `label` are those of `draw`. Raises ValueError for fewer epochs than one."""
        if epochs < 1:
            raise ValueError(f"a training has at least one epoch, got {epochs}")
        self.key, self.epochs, self.label, self.look, self.every = key, epochs, label, look, every
        self.handles: list[DisplayHandle | None] = []
        self.drawn = -float("inf")

    def __call__(self, history: Rows) -> None:
        """Draws the history so far, unless the last drawing is too recent."""
        last = bool(history) and history[-1]["epoch"] >= self.epochs
        if get_ipython() is None or not history or (not last and time.monotonic() - self.drawn < self.every):
            return
        pictures = [draw(history, self.key, self.epochs, label=self.label)]
        pictures += [self.look()] if self.look else []
        if self.handles:
            for handle, picture in zip(self.handles, pictures, strict=True):
                if handle is not None:
                    handle.update(picture)
        else:
            self.handles = [display(picture, display_id=True) for picture in pictures]
        self.drawn = time.monotonic()  # the end: a slow look must not leave training no time
