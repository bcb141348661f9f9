"""Procedural rooms: one integer in, one furnished room out, as data.

A bedroom, a living room, a study or a dining room: its shell, furniture along the walls and in the middle,
pictures, windows and doors, lamps, and a camera at the height of a person who holds one. After NYUDv2's
mapping to 13 classes a door is wall, a rug floor, a curtain window.

All draws are exactly reproducible calls of NumPy's generator, and what trigonometry touches is rounded
(0.1 mm, 0.01°), so a seed gives the same scene on every machine.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from kamal_lib.data import furniture
from kamal_lib.data.furniture import Draw, Group, block, solid, thing
from kamal_lib.data.shading import CLASSES, Camera, Light, Part, Scene, Thing, render

__all__ = ["CLASSES", "render", "sample_scene"]

Builder = Callable[[Draw], Group]

_STUDY = (furniture.desk, furniture.bookshelf, furniture.bookshelf, furniture.chest, furniture.sofa)
_LIVING = (furniture.sofa, furniture.tv_stand, furniture.coffee_table, furniture.bookshelf, furniture.sofa)
_BEDROOM = (furniture.bed, furniture.wardrobe, furniture.nightstand, furniture.chest, furniture.desk)
_DINING = (furniture.dining_set, furniture.chest, furniture.wardrobe, furniture.tv_stand)
_ROOMS = (_BEDROOM, _BEDROOM, _LIVING, _LIVING, _STUDY, _DINING)
_EXTRAS = (*_BEDROOM[1:], *_STUDY[1:3], furniture.sofa, furniture.tv_stand, *[furniture.lone_chair] * 2)
_FREE_STANDING = (furniture.coffee_table, furniture.dining_set, furniture.floor_clutter)


def sample_scene(seed: int) -> Scene:
    """The room with this number; any integer from 0 on."""
    draw = Draw(seed)
    room = draw(3.4, 5.8), draw(3.6, 6.6), draw(2.4, 2.9)
    camera = _camera(draw, *room[:2])
    things = _shell(draw, *room) + _on_walls(draw, *room)
    taken = [(camera.position[0], camera.position[1], 0.85, 0.85)]
    builders: list[Builder] = [*draw.pick(_ROOMS), *(draw.pick(_EXTRAS) for _ in range(draw.count(1, 2)))]
    for build in [*builders, *[furniture.floor_clutter] * draw.count(1, 3)]:
        group, footprint = build(draw)
        place = _find_place(draw, footprint, build not in _FREE_STANDING, room, camera, taken)
        if place is not None:
            things += _moved(group, *place)
    lights, fixture = _lights(draw, *room)
    ambient = draw(0.32, 0.52)
    return Scene(
        things=(*things, fixture),
        camera=camera,
        lights=lights,
        ambient=(round(ambient * draw(0.9, 1.1), 4), ambient, round(ambient * draw(0.85, 1.1), 4)),
        exposure=draw(0.75, 1.15),
        noise=draw(0.006, 0.024),
        noise_seed=draw.count(0, 2**31 - 1),
    )


def _camera(draw: Draw, width: float, depth: float) -> Camera:
    """Near one of the walls, looking towards the middle of the room."""
    along, off = draw(0.12, 0.88), draw(0.25, 0.6)
    x, y = (width * along, off) if draw.chance(0.5) else (off, depth * along)
    x, y = (x, y) if draw.chance(0.5) else (width - x, depth - y)
    to_x, to_y = width * draw(0.3, 0.7) - x, depth * draw(0.3, 0.7) - y
    return Camera(
        position=(round(x, 4), round(y, 4), draw(1.15, 1.75)),
        yaw=round(math.degrees(math.atan2(-to_x, to_y)) + draw(-14.0, 14.0), 2),
        pitch=draw(-24.0, 2.0),
        roll=draw(-2.5, 2.5),
        focal=draw(0.68, 0.92),
    )


def _moved(group: list[Thing], x: float, y: float, yaw: float) -> list[Thing]:
    """A group of things from its own frame to its place in the room."""
    c, s = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
    moved = []
    for each in group:
        px, py, pz = each.position
        position = round(x + c * px - s * py, 4), round(y + s * px + c * py, 4), pz
        moved.append(replace(each, position=position, yaw=round(each.yaw + yaw, 4)))
    return moved


def _find_place(draw, footprint, at_wall, room, camera, taken) -> tuple[float, float, float] | None:
    """A free spot (x, y, yaw) for a footprint, mostly in sight of the camera; None if none was found."""
    heading = math.radians(camera.yaw)
    for _ in range(14):
        side = draw.count(0, 3)  # the wall at its back: 0 far (+y), 1 left (-x), 2 near, 3 right
        w, d = footprint if side % 2 == 0 else footprint[::-1]
        if w > room[0] or d > room[1]:
            continue
        x, y, gap = draw(w / 2, room[0] - w / 2), draw(d / 2, room[1] - d / 2), draw(0.01, 0.06)
        if at_wall:
            x = {1: w / 2 + gap, 3: room[0] - w / 2 - gap}.get(side, x)
            y = {0: room[1] - d / 2 - gap, 2: d / 2 + gap}.get(side, y)
        dx, dy = x - camera.position[0], y - camera.position[1]
        ahead = round(dy * math.cos(heading) - dx * math.sin(heading), 4)
        aside = round(abs(dx * math.cos(heading) + dy * math.sin(heading)), 4)
        if aside > 0.75 * ahead + 0.5 and not draw.chance(0.1):
            continue
        if all(abs(x - tx) >= (w + tw) / 2 or abs(y - ty) >= (d + td) / 2 for tx, ty, tw, td in taken):
            taken.append((x, y, w, d))
            return round(x, 4), round(y, 4), 90.0 * side + (0.0 if at_wall else draw(-12.0, 12.0))
    return None


def _walls(width: float, depth: float) -> list[tuple[float, float, float, float]]:
    """Middle x and y, length, and yaw of each wall, as seen from a thing that has it at its back."""
    x, y = width / 2, depth / 2
    return [(x, depth, width, 0.0), (0.0, y, depth, 90.0), (x, 0.0, width, 180.0), (width, y, depth, 270.0)]


def _shell(draw: Draw, width: float, depth: float, height: float) -> list[Thing]:
    x, y, z = width / 2, depth / 2, height / 2

    def plane(half_x, half_y, colour, *, tilt=0.0, **looks):
        # A little larger than the room: the planes cross, and no ray slips through a seam.
        half = half_x + 0.05, half_y + 0.05, 1.0
        return Part("rectangle", (0.0, 0.0, 0.0), half, colour, tilt=tilt, **looks)

    plain, tile = (0.0, 0.0, 0.0), draw(1.5, 3.0)
    boards, paper = (
        [plain, (draw(4.0, 9.0), 0.0, 0.0), (tile, tile, 0.0)],
        [plain, plain, (draw(1.0, 5.0), 0.0, 0.0)],
    )
    boards = {"stripes": draw.pick(boards), "contrast": draw(0.1, 0.3)}
    paper = {"stripes": draw.pick(paper), "contrast": draw(0.02, 0.12)}
    things = [
        thing("floor", plane(x, y, draw.colour("floor"), **boards), x=x, y=y),
        thing("ceiling", plane(x, y, draw.colour("ceiling")), x=x, y=y, z=height),
    ]
    usual = draw.colour("wall")
    for wx, wy, length, yaw in _walls(width, depth):
        colour = draw.colour("wall") if draw.chance(0.1) else usual
        side = plane(length / 2, z, colour, tilt=90.0, **paper)
        things.append(thing("wall", side, x=wx, y=wy, z=z, yaw=yaw))
    if draw.chance(0.35):
        pattern = {"stripes": (draw(0.0, 4.0), draw(0.0, 4.0), 0.0), "contrast": draw(0.0, 0.5)}
        colour = draw.colour(draw.pick(["floor", "floor", "floor", "bed"]))
        rug = block(draw(1.2, 2.4), draw(1.6, 3.2), 0.012, colour, **pattern)
        things.append(thing("floor", rug, x=x, y=y, yaw=draw.pick([0.0, 90.0, draw(0.0, 90.0)])))
    return things


def _on_walls(draw: Draw, width: float, depth: float, height: float) -> list[Thing]:
    """Pictures, windows with curtains, and doors: side by side on the walls, never over one another."""
    things = []
    for x, y, length, yaw in _walls(width, depth):
        edge = draw(0.1, 1.0)
        while edge < length - 0.5:
            each, size = draw.pick([_picture, _picture, _picture, _window, _window, _door])(draw, height)
            if edge + size > length - 0.05:
                break
            things += _moved([replace(each, position=(edge + (size - length) / 2, -0.01, 0.0))], x, y, yaw)
            edge += size + draw(0.3, 1.6)
    return things


def _picture(draw: Draw, height: float) -> tuple[Thing, float]:
    w, h = draw(0.35, 1.1), draw(0.35, 0.8)
    z = draw(1.35, 1.75) - h / 2
    pattern = {"stripes": (draw(0.0, 3.0), 0.0, draw(0.0, 3.0)), "contrast": draw(0.3, 0.8)}
    canvas = block(w - 0.1, 0.024, h - 0.1, draw.colour("picture"), y=-0.02, z=z + 0.05, **pattern)
    return thing("picture", block(w, 0.04, h, draw.colour("picture"), z=z), canvas), w


def _window(draw: Draw, height: float) -> tuple[Thing, float]:
    w, h = draw(0.8, 1.8), draw(0.9, 1.4)
    z, size = min(draw(1.35, 1.65), height - h / 2 - 0.1) - h / 2, w
    light = draw.pick([draw(0.0, 0.2), draw(0.5, 1.4), draw(0.5, 1.4)])
    blinds = draw.pick([(0.0, 0.0, 0.0), (0.0, 0.0, draw(6.0, 14.0)), (draw(0.8, 1.4), 0.0, 0.7)])
    glass = {"stripes": blinds, "contrast": draw(0.2, 0.7), "glow": light}
    parts = [
        block(w, 0.05, h, draw.colour("window"), z=z),
        block(w - 0.12, 0.024, h - 0.12, draw.colour("window"), y=-0.022, z=z + 0.06, **glass),
    ]
    if draw.chance(0.5):
        cloth, folds, size = (
            draw.colour("bed"),
            {"stripes": (draw(4.0, 8.0), 0.0, 0.0), "contrast": 0.4},
            w + 0.5,
        )
        curtains = (-w / 2 - 0.05, w / 2 + 0.05)
        parts += [block(0.4, 0.06, z + h, cloth, x, -0.07, 0.05, **folds) for x in curtains]
    return thing("window", *parts), size


def _door(draw: Draw, height: float) -> tuple[Thing, float]:
    colour = draw.colour("wall")
    panels = block(0.64, 0.02, 1.6, colour, y=-0.022, z=0.3, stripes=(0.0, 0.0, 1.3), contrast=0.25)
    handle = solid("ellipsoid", 0.03, 0.03, 0.03, (0.6, 0.55, 0.4), 0.36, -0.06, 0.97)
    return thing("wall", block(0.9, 0.05, 2.05, colour), panels, handle), 0.9


def _lights(draw: Draw, width: float, depth: float, height: float) -> tuple[tuple[Light, ...], Thing]:
    """A lamp that hangs from the ceiling, and sometimes one of lower power elsewhere that is not in sight."""
    drop, warm = draw(0.12, 0.6), (1.0, draw(0.82, 1.0), draw(0.6, 1.0))
    x, y, z = round(width * draw(0.3, 0.7), 4), round(depth * draw(0.3, 0.7), 4), round(height - drop, 4)
    lights = (Light((x, y, z), draw(1.0, 2.6), warm),)
    if draw.chance(0.4):
        lights += (Light((draw(0.4, width - 0.4), draw(0.4, depth - 0.4), 1.9), draw(0.4, 1.2), warm),)
    shade = solid("frustum", 0.18, 0.18, 0.1, draw.colour("objects"), z=-0.1, taper=0.5, glow=1.0)
    rod = solid("frustum", 0.012, 0.012, drop / 2, (0.1, 0.1, 0.1))
    return lights, thing("objects", shade, rod, x=x, y=y, z=z)
