"""What every figure of the workbook must be, for the tests of its pictures."""

import io

from matplotlib.text import Text
from PIL import Image

from kamal_lib.viz.panels import Picture


def readable(figure: Picture, *, rounding: int = 0) -> bool:
    """A PNG of its size to `rounding` pixels, no text below 8 points, nothing cut off, and an alt text."""
    width, height = figure.get_size_inches() * figure.dpi
    found = Image.open(io.BytesIO(figure.png())).size
    assert abs(found[0] - int(width)) <= rounding >= abs(found[1] - int(height))
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert min(text.get_fontsize() for text in texts) >= 8
    drawn, page = figure.get_tightbbox(), figure.get_size_inches()
    assert drawn.min.min() >= -0.01, "cut off at the left or below"
    assert (drawn.max <= page + 0.01).all(), "cut off at the right or above"
    return len(figure.alt) > 20
