"""A room as plain data, and its picture: colours, lights, shadows and sensor noise over `raycast`.

World axes: x and y along the floor, z up, metres; angles in degrees. Everything that is drawn stands in the
`Scene`: print it, change it with `dataclasses.replace`, render it again at any size.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kamal_lib.data.raycast import BOX, ELLIPSOID, FRUSTUM, RECTANGLE, Solids, cast, image_plane, surface

CLASSES: tuple[str, ...] = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects",
    "picture", "sofa", "table", "tv", "wall", "window",
)  # fmt: skip
"""The 13 classes of NYUDv2, in id order 0..12."""

SHELL = ("ceiling", "floor", "wall")
"""Classes that have no instances, hence no boxes."""

VOID = 255
"""Label of a ray that meets nothing, as in `kamal_lib.sample`, which imports torch."""

SHAPES = {"box": BOX, "ellipsoid": ELLIPSOID, "frustum": FRUSTUM, "rectangle": RECTANGLE}

MIN_BOX_SHARE = 1 / 400
"""An instance gets a box when it shows at least this share of the image's pixels."""

_SHADOW_CELLS, _SHADOW_REACH = 96, 3.0  # shadow map: cells a side, tangent of its half angle

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Part:
    """One solid of a thing, in the thing's own frame: scaled by `half`, tilted about x, turned about z.

    half      half sizes along the local axes, metres
    taper     top over bottom radius of a frustum
    colour    share of red, green and blue light that is thrown back, 0..1
    stripes   cycles per metre along the local axes, 0 for none
    contrast  how strongly the stripes darken and lighten, 0..1
    glow      light of its own, in units of white paper under full light
    """

    shape: str
    centre: Triple
    half: Triple
    colour: Triple
    yaw: float = 0.0
    tilt: float = 0.0
    taper: float = 1.0
    stripes: Triple = (0.0, 0.0, 0.0)
    contrast: float = 0.0
    glow: float = 0.0


@dataclass(frozen=True)
class Thing:
    """One instance of a class: a piece of furniture, a row of books, a wall."""

    label: str
    position: Triple
    yaw: float
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Camera:
    """A pin-hole camera. Yaw 0 looks along +y and turns to the left; pitch > 0 looks up."""

    position: Triple
    yaw: float
    pitch: float
    roll: float
    focal: float
    """Focal length in image widths."""


@dataclass(frozen=True)
class Light:
    """A lamp at a point; `power` is what white paper throws back one metre below it."""

    position: Triple
    power: float
    colour: Triple


@dataclass(frozen=True)
class Scene:
    """A furnished room with its camera and light. `noise` is the sensor's standard deviation, 0..1."""

    things: tuple[Thing, ...]
    camera: Camera
    lights: tuple[Light, ...]
    ambient: Triple
    exposure: float
    noise: float
    noise_seed: int


def render(scene: Scene, height: int, width: int, *, supersample: int = 1) -> dict[str, np.ndarray]:
    """Picture and exact annotation of a scene.

    Labels, depth, normals and boxes belong to the one ray through each pixel's centre, whatever
    `supersample` is; the image averages supersample × supersample rays a pixel, so at object borders it
    mixes what the labels do not.

    Returns `image` uint8 H×W×3 · `labels` uint8 H×W · `depth` float32 H×W, metres · `normals` float32 3×H×W,
    camera axes · `boxes` float32 K×4 (left, top, right, bottom; right and bottom exclusive), the visible
    extent of every instance of at least `MIN_BOX_SHARE` of the pixels · `box_labels` int64 K.

    Raises ValueError for a size or supersample below 1.
    """
    if min(height, width, supersample) < 1:
        sizes = f"{height}, {width} and {supersample}"
        raise ValueError(f"expected height, width and supersample of at least 1, got {sizes}")
    parts = [part for thing in scene.things for part in thing.parts]
    owner = np.array([i for i, thing in enumerate(scene.things) for _ in thing.parts])
    world = _solids(scene, parts, owner)
    rotation, position = _camera_frame(scene.camera)
    solids = _seen_from(world, rotation, position)

    x, y = image_plane(height, width, scene.camera.focal)
    hits = cast(solids, x, y)
    point, normals = surface(solids, hits, x, y)
    # Index -1, a ray out of an open room, reads the entry at the end: void, and black.
    label_of = np.array([*(CLASSES.index(scene.things[i].label) for i in owner), VOID], np.uint8)
    labels = label_of[hits.index]
    boxes, box_labels = _boxes(np.append(owner, -1)[hits.index], labels)
    answer = {
        "labels": labels,
        "depth": np.where(hits.index < 0, np.float32(0), hits.depth),
        "normals": normals,
        "boxes": boxes,
        "box_labels": box_labels,
    }
    if supersample > 1:
        x, y = image_plane(height * supersample, width * supersample, scene.camera.focal)
        hits = cast(solids, x, y)
        point, normals = surface(solids, hits, x, y)
    paint = _paint(parts, hits.index, point)
    casts = np.array([scene.things[i].label not in SHELL for i in owner])
    depth = np.where(hits.index < 0, np.float32(0), hits.depth)
    spot = np.stack([x * depth, y[:, None] * depth, depth])
    # Surfaces that look up get more of the ambient light than those that look down.
    up = rotation[:, 2].tolist()
    facing_up = normals[0] * up[0] + normals[1] * up[1] + normals[2] * up[2]
    light = np.asarray(scene.ambient, np.float32)[:, None, None] * (0.85 + 0.15 * facing_up)
    for lamp in scene.lights:
        light += _lamp_light(lamp, world, casts, rotation, position, spot, normals)
    glow = np.array([*(p.glow for p in parts), 0], np.float32)[hits.index]
    picture = paint * (light + glow)
    if supersample > 1:
        picture = picture.reshape(3, height, supersample, width, supersample).mean((2, 4))
    return {"image": _expose(scene, picture)} | answer


def _solids(scene: Scene, parts: list[Part], owner: np.ndarray) -> Solids:
    """All parts in world axes."""
    things = np.array([(*thing.position, thing.yaw) for thing in scene.things])[owner]
    numbers = np.array([(*p.centre, *p.half, p.yaw, p.tilt, p.taper) for p in parts])
    turn = np.deg2rad(things[:, 3])
    cosine, sine = np.cos(turn), np.sin(turn)
    cx, cy, cz = numbers[:, :3].T
    centre = things[:, :3] + np.stack([cosine * cx - sine * cy, sine * cx + cosine * cy, cz], 1)
    yaw, tilt = turn + np.deg2rad(numbers[:, 6]), np.deg2rad(numbers[:, 7])
    c, s, ct, st = np.cos(yaw), np.sin(yaw), np.cos(tilt), np.sin(tilt)
    zero = np.zeros_like(c)
    axes = np.stack([c, s, zero, -s * ct, c * ct, st, s * st, -c * st, ct], 1).reshape(-1, 3, 3)
    axes = (axes * numbers[:, 3:6, None]).transpose(0, 2, 1)
    shape = np.array([SHAPES[p.shape] for p in parts])
    return Solids(shape, centre, axes, numbers[:, 8])


def _camera_frame(camera: Camera) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "3"]]:
    """Rows: right, down and forward in world axes; and the camera's position."""
    yaw, pitch, roll = np.deg2rad((camera.yaw, camera.pitch, camera.roll))
    forward = np.array([-np.sin(yaw) * np.cos(pitch), np.cos(yaw) * np.cos(pitch), np.sin(pitch)])
    right = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    down = np.cross(forward, right)
    right, down = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
    return np.stack([right, down, forward]), np.array(camera.position)


def _seen_from(solids: Solids, rotation: np.ndarray, position: np.ndarray) -> Solids:
    return Solids(
        solids.shape,
        np.einsum("ij,pj->pi", rotation, solids.centre - position),
        np.einsum("ij,pjk->pik", rotation, solids.axes),
        solids.taper,
    )


def _paint(parts: list[Part], index: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Colour of every hit, 3×H×W: the part's own, with its stripes. Arithmetic only, so the same anywhere."""
    table = np.array([*((*p.colour, p.contrast, *p.half, *p.stripes) for p in parts), (0.0,) * 10]).T
    table[4:7] *= table[7:10]  # cycles per local unit
    row = np.take(table[:7].astype(np.float32), index.ravel(), axis=1).reshape(7, *index.shape)
    wave = row[3]
    for k in range(3):
        turns = point[k] * row[4 + k]
        wave = wave * np.clip(16 * np.abs(turns - np.floor(turns) - 0.5) - 4, -1, 1)
    return row[:3] * (1 - 0.5 * row[3] + 0.5 * wave)


def _lamp_light(lamp, world, casts, rotation, position, spot, normals) -> np.ndarray:
    """What one lamp adds to every pixel, 3×H×W, behind a soft shadow.

    The shadow map is the same ray caster seen from the lamp, looking down; nine comparisons around each
    spot soften its edge (percentage-closer filtering, Reeves et al. 1987).
    """
    seat = rotation @ (np.array(lamp.position) - position)
    dx, dy, dz = (np.float32(seat[k]) - spot[k] for k in range(3))
    squared = dx * dx + dy * dy + dz * dz
    cosine = (normals[0] * dx + normals[1] * dy + normals[2] * dz) / np.sqrt(squared)
    shade = np.maximum(cosine, 0) * (2 / (1 + squared))

    view = np.array([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])
    scale = _SHADOW_CELLS / (2 * _SHADOW_REACH)
    grid = (np.arange(_SHADOW_CELLS, dtype=np.float32) + 0.5) / scale - _SHADOW_REACH
    blockers = Solids(world.shape[casts], world.centre[casts], world.axes[casts], world.taper[casts])
    nearest = cast(_seen_from(blockers, view, np.array(lamp.position)), grid, grid).depth
    # Half the resolution is enough, and the point is moved off its surface, or it would shade itself.
    half = (slice(None, None, 2),) * 2
    off = [0.12 * normals[k][half] - (dx, dy, dz)[k][half] for k in range(3)]
    turned = (view @ rotation.T).astype(np.float32).tolist()
    px, py, pz = (row[0] * off[0] + row[1] * off[1] + row[2] * off[2] for row in turned)
    pz = np.maximum(pz, 0.05)
    column, line = (px / pz + _SHADOW_REACH) * scale, (py / pz + _SHADOW_REACH) * scale
    lit, edge = np.zeros(pz.shape, np.float32), pz - np.float32(0.05)
    framed = np.full((_SHADOW_CELLS + 2,) * 2, np.inf, np.float32)  # beyond the map nothing is shaded
    framed[1:-1, 1:-1] = nearest
    for step_y in (-0.8, 0.0, 0.8):
        row = np.clip(line + (step_y + 1), 0, _SHADOW_CELLS + 1).astype(np.intp) * (_SHADOW_CELLS + 2)
        for step_x in (-0.8, 0.0, 0.8):
            cell = row + np.clip(column + (step_x + 1), 0, _SHADOW_CELLS + 1).astype(np.intp)
            lit += framed.ravel()[cell] > edge
    lit = np.repeat(np.repeat(lit / 9, 2, 0), 2, 1)[: spot.shape[1], : spot.shape[2]]
    shade *= lit * lamp.power
    return shade * np.asarray(lamp.colour, np.float32)[:, None, None]


def _expose(scene: Scene, picture: np.ndarray) -> np.ndarray:
    """Light to bytes: exposure, a square-root tone curve, sensor noise."""
    picture = np.sqrt(np.minimum(picture * np.float32(scene.exposure), 1)).transpose(1, 2, 0)
    rng = np.random.default_rng(scene.noise_seed)
    # The sum of four uniform bytes is near enough to a Gaussian, and the same on every machine.
    dice = np.frombuffer(rng.bytes(4 * picture.size), np.int8).reshape(4, *picture.shape)
    noise = dice.sum(0, dtype=np.int16) * np.float32(scene.noise * 255 / 147.8)
    return np.clip(picture * 255 + noise + 0.5, 0, 255).astype(np.uint8)


def _boxes(instance: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tight boxes around the visible pixels of every instance outside the shell, in order of instance."""
    boxes, box_labels = [], []
    for i in np.flatnonzero(np.bincount(instance[instance >= 0]) >= MIN_BOX_SHARE * instance.size):
        rows, columns = np.nonzero(instance == i)
        label = labels[rows[0], columns[0]]
        if CLASSES[label] not in SHELL:
            boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            box_labels.append(label)
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(box_labels, np.int64)
