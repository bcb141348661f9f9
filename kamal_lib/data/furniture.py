"""Furniture from primitives: each function draws one piece and what stands on it, as data.

A piece stands around the origin of its own frame, on z = 0, its back towards +y and its front towards -y,
and comes with its footprint (width, depth) in metres. Which class a thing has follows NYUDv2's mapping to
13 classes: pillows and lamps are objects, chests and shelves furniture, desks tables.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kamal_lib.data.shading import Part, Thing, Triple

Group = tuple[list[Thing], tuple[float, float]]
"""Things in the frame of the group, and the footprint."""

_DARK, _MIDDLE, _LIGHT = (0.20, 0.10, 0.05), (0.42, 0.25, 0.12), (0.62, 0.47, 0.30)  # wood
PALETTE: dict[str, tuple[Triple, ...]] = {
    "bed": ((0.75, 0.72, 0.68), (0.35, 0.42, 0.6), (0.55, 0.18, 0.16), (0.62, 0.55, 0.38)),
    "books": ((0.6, 0.14, 0.1), (0.12, 0.24, 0.52), (0.66, 0.54, 0.28), (0.12, 0.36, 0.18)),
    "ceiling": ((0.85, 0.84, 0.8), (0.72, 0.7, 0.66)),
    "chair": ((0.08, 0.08, 0.09), (0.45, 0.13, 0.1), _DARK, (0.24, 0.28, 0.36)),
    "floor": ((0.5, 0.36, 0.22), (0.4, 0.36, 0.3), (0.3, 0.28, 0.27), (0.36, 0.34, 0.4)),
    "furniture": (_DARK, _MIDDLE, _MIDDLE, _LIGHT, (0.78, 0.74, 0.7)),
    "objects": ((0.7, 0.18, 0.12), (0.16, 0.4, 0.66), (0.7, 0.7, 0.3), (0.16, 0.4, 0.14), (0.7, 0.7, 0.6)),
    "picture": ((0.35, 0.38, 0.42), (0.55, 0.4, 0.22), (0.18, 0.28, 0.24), (0.78, 0.74, 0.66)),
    "sofa": ((0.28, 0.16, 0.1), (0.34, 0.34, 0.36), (0.4, 0.12, 0.12), (0.16, 0.2, 0.36), (0.62, 0.54, 0.42)),
    "table": (_LIGHT, _LIGHT, _MIDDLE, (0.1, 0.09, 0.09), (0.74, 0.7, 0.64)),
    "tv": ((0.03, 0.03, 0.035), (0.07, 0.08, 0.1)),
    "wall": ((0.74, 0.7, 0.6), (0.8, 0.8, 0.78), (0.6, 0.66, 0.68), (0.64, 0.64, 0.52), (0.7, 0.58, 0.48)),
    "window": ((0.62, 0.74, 0.86), (0.8, 0.82, 0.82), (0.45, 0.52, 0.56)),
}
"""Usual colours of each class. They overlap: with colours independent of the class a small network learns
next to nothing, with separate ones nothing is left to learn."""


class Draw:
    """Draws from one generator, rounded to four decimals so that a scene prints well."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def __call__(self, low: float, high: float) -> float:
        """A number between the two, uniform."""
        return round(low + (high - low) * float(self._rng.random()), 4)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return float(self._rng.random()) < probability

    def count(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return int(self._rng.integers(low, high + 1))

    def pick(self, options: Sequence):
        """One of the options, all equally likely."""
        return options[self.count(0, len(options) - 1)]

    def colour(self, label: str) -> Triple:
        """Mostly near one of the class's usual colours, sometimes any colour at all."""
        usual = self.chance(0.97)
        base, spread = (self.pick(PALETTE[label]), 0.05) if usual else ((0.4, 0.4, 0.4), 0.36)
        light = self(0.85, 1.15)
        r, g, b = (min(max(round(c * light + self(-spread, spread), 4), 0.02), 0.95) for c in base)
        return r, g, b


def block(w: float, d: float, h: float, colour: Triple, x=0.0, y=0.0, z=0.0, **looks) -> Part:
    """An upright box of full size w × d × h that stands on height z at (x, y)."""
    centre = round(x, 4), round(y, 4), round(z + h / 2, 4)
    return Part("box", centre, (w / 2, d / 2, h / 2), colour, **looks)


def solid(shape: str, rx: float, ry: float, rz: float, colour: Triple, x=0.0, y=0.0, z=0.0, **looks) -> Part:
    """An ellipsoid or frustum of radii rx, ry and half height rz that stands on height z at (x, y)."""
    return Part(shape, (round(x, 4), round(y, 4), round(z + rz, 4)), (rx, ry, rz), colour, **looks)


def thing(label: str, *parts: Part, x=0.0, y=0.0, z=0.0, yaw=0.0) -> Thing:
    """Parts of one class, at a place and turned."""
    return Thing(label, (round(x, 4), round(y, 4), round(z, 4)), yaw, parts)


# --- small things ---------------------------------------------------------------------------------------


def small_object(draw: Draw, size: float) -> Thing:
    """A box, a ball, a vase, a lamp or a plant, about `size` metres wide."""
    r, colour, kind = size / 2, draw.colour("objects"), draw.count(0, 4)
    if kind == 0:
        parts = [block(size, size * 0.7, size * 0.8, colour)]
    elif kind == 1:
        parts = [solid("ellipsoid", r, r, r, colour)]
    elif kind == 2:
        parts = [solid("frustum", r * 0.8, r * 0.8, r * 1.4, colour, taper=draw(0.4, 1.0))]
    elif kind == 3:
        glow = draw.pick([0.0, 0.6])
        shade = solid("frustum", r, r, r * 0.7, draw.colour("objects"), z=r * 1.9, taper=0.6, glow=glow)
        parts = [solid("frustum", r * 0.5, r * 0.5, r, colour, taper=0.3), shade]
    else:
        leaf, k = draw(0.1, 0.3), r * 1.1
        pot = solid("frustum", r * 0.7, r * 0.7, r * 0.6, colour, tilt=180.0, taper=0.7)
        parts = [pot, solid("ellipsoid", k, k, k, (leaf * 0.6, leaf, leaf * 0.4), z=r * 0.9)]
    return thing("objects", *parts, yaw=draw(0.0, 90.0))


def pile_of_books(draw: Draw, size: float) -> Thing:
    """Two to five books, one on the other, about `size` metres wide."""
    parts, z = [], 0.0
    for _ in range(draw.count(2, 5)):
        w, h = size * draw(0.8, 1.1), draw(0.025, 0.05)
        parts.append(block(w, size * 0.75, h, draw.colour("books"), z=z, yaw=draw(-15.0, 15.0)))
        z += h
    return thing("books", *parts, yaw=draw(-30.0, 30.0))


def on_top(draw: Draw, w: float, d: float, h: float, count: int) -> list[Thing]:
    """Clutter on a top of w × d at height h, one piece to each equal share of the width."""
    things, share = [], w / max(count, 1)
    for i in range(count):
        size = min(draw(0.12, 0.34), 0.8 * share, 0.8 * d)
        piece = draw.pick([small_object, small_object, pile_of_books])(draw, size)
        x, y = share * (i + 0.5 + draw(-0.2, 0.2)) - w / 2, d * draw(-0.2, 0.15)
        things.append(replace(piece, position=(round(x, 4), round(y, 4), h)))
    return things


def screen(draw: Draw, w: float, **place: float) -> Thing:
    """A television or a monitor on its foot, off or (one in three) on."""
    h, dark, stripes = w * 0.58, draw.colour("tv"), (draw(0.0, 2.0), 0.0, draw(0.0, 2.0))
    glass = {"stripes": stripes, "contrast": 0.6, "glow": draw.pick([0.0, 0.0, 1.5])}
    return thing(
        "tv",
        block(w * 0.4, 0.18, 0.02, dark),
        block(0.06, 0.04, 0.12, dark, z=0.01),
        block(w, 0.05, h, dark, z=0.1),
        block(w - 0.05, 0.01, h - 0.05, draw.colour("tv"), y=-0.025, z=0.125, **glass),
        yaw=draw(-10.0, 10.0),
        **place,
    )


# --- chests and shelves ---------------------------------------------------------------------------------


def cabinet(draw: Draw, w: float, d: float, h: float, *, fronts: tuple[float, float], clutter: int) -> Group:
    """A chest whose doors and drawers are stripes: `fronts` per metre, across and up."""
    colour, contrast, stripes = draw.colour("furniture"), draw(0.15, 0.5), (fronts[0], 0.0, fronts[1])
    front = block(w - 0.07, 0.02, h - 0.12, colour, 0.0, -d / 2, 0.06, stripes=stripes, contrast=contrast)
    return [thing("furniture", block(w, d, h, colour), front), *on_top(draw, w, d, h, clutter)], (w, d)


def nightstand(draw: Draw) -> Group:
    """A small chest with something on it, mostly beside a bed."""
    w, d, h = draw(0.4, 0.55), draw(0.35, 0.45), draw(0.45, 0.65)
    return cabinet(draw, w, d, h, fronts=(0.0, draw(3.0, 6.0)), clutter=1)


def chest(draw: Draw) -> Group:
    """A chest of drawers with clutter on top."""
    w, d, h = draw(0.8, 1.6), draw(0.4, 0.5), draw(0.7, 1.1)
    fronts = draw.pick([0.0, 1.2, 2.0]), draw(2.5, 5.0)
    return cabinet(draw, w, d, h, fronts=fronts, clutter=draw.count(2, 4))


def wardrobe(draw: Draw) -> Group:
    """A tall cabinet."""
    w, d, h = draw(0.8, 1.8), draw(0.5, 0.65), draw(1.7, 2.2)
    fronts = draw(1.0, 2.2), draw.pick([0.0, 0.6])
    return cabinet(draw, w, d, h, fronts=fronts, clutter=draw.count(0, 2))


def tv_stand(draw: Draw) -> Group:
    """A low cabinet with a television."""
    h = draw(0.4, 0.7)
    things, footprint = cabinet(
        draw, draw(1.1, 1.7), draw(0.4, 0.5), h, fronts=(draw(1.0, 3.0), 0.0), clutter=0
    )
    return [*things, screen(draw, draw(0.8, 1.3), y=0.05, z=h)], footprint


def bookshelf(draw: Draw) -> Group:
    """Two to five open shelves, mostly full of books."""
    w, d, boards, gap = draw(0.8, 1.7), draw(0.26, 0.36), draw.count(2, 5), draw(0.32, 0.42)
    h, colour = boards * gap + 0.04, draw.colour("furniture")
    sides = [block(0.03, d, h, colour, x=x) for x in (0.015 - w / 2, w / 2 - 0.015)]
    shelves = [block(w, d, 0.03, colour, z=i * gap) for i in range(boards + 1)]
    things = [thing("furniture", block(w, 0.02, h, colour, y=d / 2 - 0.01), *sides, *shelves)]
    for z in (0.03 + i * gap for i in range(boards)):
        x, end, rows = 0.04 - w / 2, w / 2 - 0.04, []
        while x < end - 0.1 and draw.chance(0.93):
            length, tall = min(draw(0.12, 0.35), end - x), draw(0.6, 0.92) * (gap - 0.03)
            spines = {"stripes": (draw(12.0, 25.0), 0.0, 0.0), "contrast": draw(0.3, 0.8)}
            colour = draw.colour("books")
            rows.append(block(length, d * 0.75, tall, colour, x + length / 2, -0.02, z, **spines))
            x += length
        if rows:
            things.append(thing("books", *rows))
        if end - x > 0.2:
            position = (round((x + end) / 2, 4), -0.03, round(z, 4))
            things.append(replace(small_object(draw, 0.16), position=position))
    return things + on_top(draw, w, d, round(h, 4), draw.count(0, 2)), (w, d)


# --- beds and seats -------------------------------------------------------------------------------------


def bed(draw: Draw) -> Group:
    """A bed with a head board, a blanket and pillows, single or double."""
    w, d, top = draw(0.95, 1.8), draw(1.9, 2.1), draw(0.42, 0.6)
    frame, cloth = draw.colour("furniture"), draw.colour("bed")
    pattern = {"stripes": (draw(0.0, 3.0), draw(0.0, 3.0), 0.0), "contrast": draw(0.0, 0.4)}
    parts = [
        block(w, d, top - 0.2, frame),
        block(w - 0.04, d - 0.06, 0.22, draw.colour("bed"), z=top - 0.22),
        block(w + 0.03, d * 0.68, top - 0.12, draw.colour("bed"), y=-d * 0.17, z=0.14, **pattern),
        block(w + 0.04, 0.06, draw(0.8, 1.2), frame, y=d / 2 - 0.03),
    ]
    things = [thing("bed", *parts)]
    for x in (-w / 4, w / 4) if w > 1.3 else (0.0,):
        pillow = solid("ellipsoid", 0.32, 0.2, 0.1, cloth, tilt=draw(0.0, 35.0))
        things.append(thing("objects", pillow, x=x, y=d / 2 - 0.3, z=top))
    return things, (w + 0.1, d)


def sofa(draw: Draw) -> Group:
    """A sofa of two or three seats, with up to two loose cushions."""
    w, d, back = draw(1.4, 2.3), draw(0.8, 0.95), draw(0.7, 0.9)
    seat, arm = draw(0.38, 0.46), draw(0.14, 0.24)
    colour, count = draw.colour("sofa"), draw.count(2, 3)
    share = (w - 2 * arm) / count
    parts = [block(w, d, seat - 0.12, colour, z=0.06), block(w, 0.22, back, colour, y=d / 2 - 0.11)]
    parts += [block(arm, d, seat + 0.18, colour, x=x) for x in ((arm - w) / 2, (w - arm) / 2)]
    for x in (arm - w / 2 + share * (i + 0.5) for i in range(count)):
        parts.append(block(share - 0.02, d - 0.25, 0.14, colour, x, -0.1, seat - 0.07))
        parts.append(block(share - 0.03, 0.16, back - seat, colour, x, d / 2 - 0.28, seat + 0.06, tilt=-12.0))
    things = [thing("sofa", *parts)]
    for _ in range(draw.count(0, 2)):
        cushion = block(0.4, 0.12, 0.4, draw.colour("objects"), tilt=-20.0)
        things.append(
            thing("objects", cushion, x=w * draw(-0.35, 0.35), z=seat + 0.05, yaw=draw(-25.0, 25.0))
        )
    return things, (w, d)


def chair(draw: Draw, style: str, colour: Triple, **place: float) -> Thing:
    """A chair of one style: "plain", "office" or "arm"."""
    if style == "arm":
        parts = [block(0.8, 0.75, 0.4, colour, z=0.04), block(0.8, 0.2, 0.9, colour, y=0.3)]
        parts += [block(0.16, 0.75, 0.6, colour, x=x) for x in (-0.32, 0.32)]
    elif style == "office":
        parts = [
            solid("frustum", 0.3, 0.3, 0.05, (0.08, 0.08, 0.08), taper=0.2),
            solid("frustum", 0.035, 0.035, 0.2, (0.1, 0.1, 0.1), z=0.04),
            solid("ellipsoid", 0.27, 0.26, 0.07, colour, z=0.39),
            solid("ellipsoid", 0.24, 0.06, 0.3, colour, y=0.24, z=0.52, tilt=-8.0),
        ]
    else:
        bars = {"stripes": (draw.pick([0.0, 8.0]), 0.0, 0.0), "contrast": 0.5}
        parts = [*_legs(0.46, 0.46, 0.46, 0.045, colour), block(0.46, 0.46, 0.05, colour, z=0.44)]
        parts.append(block(0.46, 0.04, 0.42, colour, y=0.23, z=0.54, tilt=-6.0, **bars))
    return thing("chair", *parts, **place)


def lone_chair(draw: Draw) -> Group:
    """A chair or an armchair on its own."""
    style = draw.pick(["plain", "office", "arm", "arm"])
    return [chair(draw, style, draw.colour("chair"), yaw=draw(-40.0, 40.0))], (0.9, 0.9)


# --- tables ---------------------------------------------------------------------------------------------


def _legs(w: float, d: float, h: float, thick: float, colour: Triple) -> list[Part]:
    x, y = w / 2 - thick, d / 2 - thick
    return [block(thick, thick, h, colour, sx * x, sy * y) for sx in (-1, 1) for sy in (-1, 1)]


def table(draw: Draw, w: float, d: float, h: float, *, round_top: bool = False) -> Thing:
    """A table on four legs, or with a round top on one."""
    colour, thick = draw.colour("table"), draw(0.05, 0.09)
    if round_top:
        top = solid("frustum", w / 2, d / 2, 0.025, colour, z=h - 0.05)
        return thing("table", top, solid("frustum", 0.14, 0.14, h / 2 - 0.02, colour, taper=0.5))
    top, apron = block(w, d, 0.05, colour, z=h - 0.05), block(w - 0.1, d - 0.1, 0.08, colour, z=h - 0.13)
    return thing("table", top, apron, *_legs(w, d, h - 0.05, thick, colour))


def desk(draw: Draw) -> Group:
    """A desk with clutter, mostly a monitor, and mostly a chair in front."""
    w, d, h = draw(1.1, 1.7), draw(0.6, 0.8), draw(0.7, 0.78)
    things = [table(draw, w, d, h), *on_top(draw, w, d, h, draw.count(1, 4))]
    if draw.chance(0.6):
        things.append(screen(draw, draw(0.45, 0.65), x=w * draw(-0.15, 0.15), y=0.1, z=h))
    if draw.chance(0.7):
        place = {"x": w * draw(-0.25, 0.25), "y": -d / 2 - 0.2, "yaw": 180 + draw(-35.0, 35.0)}
        things.append(chair(draw, draw.pick(["plain", "office", "office"]), draw.colour("chair"), **place))
    return things, (w, d + 0.5)


def coffee_table(draw: Draw) -> Group:
    """A low table with clutter."""
    w, d, h = draw(0.8, 1.3), draw(0.5, 0.8), draw(0.35, 0.5)
    top = table(draw, w, d, h, round_top=draw.chance(0.25))
    return [top, *on_top(draw, w * 0.8, d * 0.8, h, draw.count(1, 3))], (w + 0.2, d + 0.2)


def dining_set(draw: Draw) -> Group:
    """A dining table with up to four chairs around it."""
    w, d, h = draw(1.1, 1.9), draw(0.8, 1.1), draw(0.72, 0.78)
    things = on_top(draw, w * 0.8, d * 0.7, h, draw.count(1, 4))
    things.append(table(draw, w, d, h, round_top=draw.chance(0.3)))
    style, colour = draw.pick(["plain", "plain", "office"]), draw.colour("chair")
    for side, x in ((-1, -0.25), (-1, 0.25), (1, -0.25), (1, 0.25)):
        if draw.chance(0.8):
            y, yaw = side * (d / 2 + draw(0.0, 0.3)), 90 * (1 - side) + draw(-20.0, 20.0)
            things.append(chair(draw, style, colour, x=x * w, y=y, yaw=yaw))
    return things, (w + 0.2, d + 0.8)


def floor_clutter(draw: Draw) -> Group:
    """A box, ball, lamp, plant or pile of books on the floor."""
    size = draw(0.25, 0.6)
    if draw.chance(0.25):
        return [pile_of_books(draw, 0.6 * size)], (size, size)
    return [small_object(draw, size)], (size, size)
