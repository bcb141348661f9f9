"""Analytic ray casting of boxes, ellipsoids, frusta and rectangles through a pin-hole camera, in NumPy.

Every solid is a unit shape under an affine map, given in camera axes (x right, y down, z forward, metres).
A ray leaves the origin with direction (x, y, 1), so its parameter at a hit *is* the depth along the optical
axis. Taken back into a solid's own frame the direction is linear in x and y, and each shape is solved there
in closed form, only inside the screen rectangle that the solid can reach. Components are kept as separate
arrays: a reduction over an axis of length three costs several times the arithmetic.

No torch here: the processes that render import this module and NumPy alone.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

BOX, ELLIPSOID, FRUSTUM, RECTANGLE = range(4)
"""Unit shapes: cube [-1, 1]³ · ball of radius 1 · |z| ≤ 1 with radius 1 at z = -1 and `taper` at z = 1 ·
square [-1, 1]² in the plane z = 0."""

NEAR = 0.02
"""Metres; what lies nearer to the camera is not drawn."""

_CORNERS = np.array([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)]) * 2.0 - 1.0
_EDGES = np.array([(i, i | bit) for bit in (1, 2, 4) for i in range(8) if not i & bit])


@dataclass(frozen=True)
class Solids:
    """P unit shapes with their affine maps into camera axes: point = centre + axes @ local.

    shape   one of BOX, ELLIPSOID, FRUSTUM, RECTANGLE each
    centre  metres
    axes    metres, column k is the image of local axis k; must be invertible (for a rectangle, column 2 is
            any vector off its plane)
    taper   top radius over bottom radius, in [0, 1]; read for frusta only
    """

    shape: Int[np.ndarray, " solids"]
    centre: Float[np.ndarray, "solids 3"]
    axes: Float[np.ndarray, "solids 3 3"]
    taper: Float[np.ndarray, " solids"]

    def local_frames(self) -> tuple[Float[np.ndarray, "solids 3 3"], Float[np.ndarray, "solids 3"]]:
        """Inverse maps, and the camera's position in every solid's own frame."""
        inverse = np.linalg.inv(self.axes)
        return inverse, -(inverse * self.centre[:, None, :]).sum(-1)


@dataclass(frozen=True)
class Hits:
    """What each ray meets first: index of the solid (-1: nothing) and depth in metres (inf: nothing)."""

    index: Int[np.ndarray, "height width"]
    depth: Float[np.ndarray, "height width"]


def image_plane(
    height: int, width: int, focal: float
) -> tuple[Float[np.ndarray, " width"], Float[np.ndarray, " height"]]:
    """Ray directions through pixel centres, as x of every column and y of every row at depth 1.

    `focal` is the focal length in image widths; pixels are square and the optical axis meets the centre.
    """
    x = (np.arange(width) + 0.5 - width / 2) / (focal * width)
    y = (np.arange(height) + 0.5 - height / 2) / (focal * width)
    return x.astype(np.float32), y.astype(np.float32)


def cast(
    solids: Solids,
    x: Float[np.ndarray, " width"],
    y: Float[np.ndarray, " height"],
    *,
    cull: bool = True,
) -> Hits:
    """First solid and its depth along the rays (x, y, 1), for ascending `x` and `y`.

    A solid that contains the camera is not seen. `cull=False` tries every solid on every ray (for the
    benchmark; the result is the same).
    """
    index = np.full((len(y), len(x)), -1, np.int16)
    depth = np.full((len(y), len(x)), np.inf, np.float32)
    inverse, origin = solids.local_frames()
    left, right, top, bottom, nearest = _screen_bounds(solids, x, y)
    if not cull:
        left, right, top, bottom = (np.full_like(left, v) for v in (0, len(x), 0, len(y)))
    intersect = {BOX: _box, ELLIPSOID: _ellipsoid, RECTANGLE: _rectangle}
    # Front to back: a solid behind everything already drawn in its rectangle is skipped whole.
    order = np.argsort(nearest, kind="stable")
    visible = order[(left < right)[order] & (top < bottom)[order]]
    with np.errstate(divide="ignore", invalid="ignore"):
        for i, x0, x1, y0, y1, near in zip(
            *(a.tolist() for a in (visible, *(b[visible] for b in (left, right, top, bottom, nearest)))),
            strict=True,
        ):
            window = depth[y0:y1, x0:x1]
            if cull and window.max() < near:
                continue
            u, v, shape = x[x0:x1], y[y0:y1, None], int(solids.shape[i])
            m, o = inverse[i].tolist(), origin[i].tolist()
            if shape == FRUSTUM:
                t, hit = _frustum(m, o, u, v, float(solids.taper[i]))
            else:
                t, hit = intersect[shape](m, o, u, v)
            hit &= t < window
            np.copyto(window, t, where=hit)
            np.copyto(index[y0:y1, x0:x1], i, where=hit)
    return Hits(index, depth)


def surface(
    solids: Solids, hits: Hits, x: Float[np.ndarray, " width"], y: Float[np.ndarray, " height"]
) -> tuple[Float[np.ndarray, "3 height width"], Float[np.ndarray, "3 height width"]]:
    """Hit points in the frames of their solids, and unit normals in camera axes that face the camera.

    Both are 0 where a ray meets nothing.
    """
    inverse, origin = solids.local_frames()
    slope = (solids.taper - 1) / 2
    columns = np.concatenate([inverse.reshape(-1, 9).T, origin.T, solids.shape[None], slope[None]])
    index = hits.index.ravel()
    m = np.take(columns.astype(np.float32), np.maximum(index, 0), axis=1).reshape(14, *hits.index.shape)
    v = y[:, None]
    depth = np.where(np.isfinite(hits.depth), hits.depth, np.float32(0))
    point = np.stack([m[9 + k] + depth * (m[3 * k] * x + m[3 * k + 1] * v + m[3 * k + 2]) for k in range(3)])

    # The gradient of each shape's implicit function, in its own frame; boxes first, as they are most.
    px, py, pz = point
    ax, ay, az = np.abs(point)
    is_z = az >= np.maximum(ax, ay)
    is_y = ~is_z & (ay >= ax)
    gradient = np.stack([np.where(is_z | is_y, 0, px), np.where(is_y, py, 0), np.where(is_z, pz, 0)])
    shape = m[12]
    where = shape == ELLIPSOID
    gradient[:, where] = point[:, where]
    where = shape == RECTANGLE
    gradient[:, where] = np.array([[0], [0], [1]], np.float32)
    where = shape == FRUSTUM
    side = where & (np.abs(az - 1) > 1e-5)
    gradient[:, where] = np.stack([0 * pz, 0 * pz, pz])[:, where]
    b = m[13][side]
    gradient[:, side] = np.stack([px[side], py[side], -b * (1 + b + b * pz[side])])

    gx, gy, gz = gradient
    normal = np.stack([gx * m[k] + gy * m[3 + k] + gz * m[6 + k] for k in range(3)])
    nx, ny, nz = normal
    length = np.sqrt(nx * nx + ny * ny + nz * nz)
    away = nx * x + ny * v + nz > 0
    normal /= np.where(away, -length, length)
    normal[:, hits.index < 0] = 0
    point[:, hits.index < 0] = 0
    return point, normal


def _screen_bounds(solids, x, y):
    """Per solid, the columns [left, right) and rows [top, bottom) it may touch, and its least depth."""
    corners = np.broadcast_to(_CORNERS, (len(solids.shape), 8, 3)).copy()
    corners[solids.shape == RECTANGLE, :, 2] = 0
    px, py, pz = (
        solids.centre[:, k, None] + sum(corners[:, :, j] * solids.axes[:, k, j, None] for j in range(3))
        for k in range(3)
    )
    # Points of the hull in front of the near plane: its corners, and where its edges cross the plane.
    a, b = _EDGES.T
    front_a, front_b = pz[:, a] > NEAR, pz[:, b] > NEAR
    crosses = front_a != front_b
    step = np.where(crosses, NEAR - pz[:, a], 0) / np.where(crosses, pz[:, b] - pz[:, a], 1)
    keep = np.concatenate([pz > NEAR, crosses], 1)
    scale = 1 / np.where(keep, np.concatenate([pz, np.full(step.shape, NEAR)], 1), 1)
    u = np.concatenate([px, px[:, a] + step * (px[:, b] - px[:, a])], 1) * scale
    v = np.concatenate([py, py[:, a] + step * (py[:, b] - py[:, a])], 1) * scale
    margin = 1e-5
    left, top = (np.where(keep, c, np.inf).min(1) - margin for c in (u, v))
    right, bottom = (np.where(keep, c, -np.inf).max(1) + margin for c in (u, v))
    columns = np.searchsorted(x, left, "left"), np.searchsorted(x, right, "right")
    rows = np.searchsorted(y, top, "left"), np.searchsorted(y, bottom, "right")
    return *columns, *rows, np.maximum(pz.min(1), 0)


def _linear(row: list[float], u, v):
    """row · (u, v, 1) on the grid, with one full-size operation."""
    return (row[0] * u + row[2]) + row[1] * v


def _box(m, o, u, v):
    enter, leave = np.float32(-np.inf), np.float32(np.inf)
    for row, c in zip(m, o, strict=True):
        inverse = 1 / _linear(row, u, v)
        if abs(c) > 1:  # outside this pair of planes: the nearer one is a way in
            side = math.copysign(1, c)
            enter = np.maximum(enter, (side - c) * inverse)
            far = (-side - c) * inverse
        else:
            far = np.abs(inverse) - c * inverse
        leave = np.fmin(leave, far)  # a ray parallel to the planes may give NaN, and has no limit
    return enter, (enter < leave) & (enter > NEAR)


def _rectangle(m, o, u, v):
    t = -o[2] / _linear(m[2], u, v)
    hit = np.abs(o[0] + t * _linear(m[0], u, v)) <= 1
    hit &= np.abs(o[1] + t * _linear(m[1], u, v)) <= 1
    return t, hit & (t > NEAR)


def _enter_quadric(q, m, o, mean, slope, u, v):
    """Depth at which the rays enter q · (px², py², pz²) = mean · (mean + 2 slope · pz)."""
    c = q[0] * o[0] ** 2 + q[1] * o[1] ** 2 + q[2] * o[2] ** 2 - mean * (mean + 2 * slope * o[2])
    half = q[0] * o[0], q[1] * o[1], q[2] * o[2] - mean * slope
    b = _linear([sum(h * row[k] for h, row in zip(half, m, strict=True)) for k in range(3)], u, v)
    # The quadratic form of the direction (u, v, 1), with two full-size operations.
    xx, yy, zz, xy, xz, yz = (
        sum(qk * row[i] * row[j] for qk, row in zip(q, m, strict=True))
        for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
    )
    a = (xx * u * u + 2 * xz * u + zz) + (yy * v * v + 2 * yz * v) + (2 * xy * u) * v
    # (-b - √(b² - ac)) / a, written so that it holds for a ≤ 0 too; no root gives NaN, which is no hit.
    return c / (np.sqrt(b * b - c * a) - b)


def _ellipsoid(m, o, u, v):
    t = _enter_quadric((1, 1, 1), m, o, 1, 0, u, v)
    return t, t > NEAR


def _frustum(m, o, u, v, taper):
    mean, slope = (1 + taper) / 2, (taper - 1) / 2  # radius = mean + slope · z
    t = _enter_quadric((1, 1, -slope * slope), m, o, mean, slope, u, v)
    dz = _linear(m[2], u, v)
    hit = (np.abs(o[2] + t * dz) <= 1) & (t > NEAR)
    if abs(o[2]) > 1:  # the camera is above or below: that cap is in sight
        end = math.copysign(1, o[2])
        cap = (end - o[2]) / dz
        px, py = (o[k] + cap * _linear(m[k], u, v) for k in range(2))
        on_cap = (px * px + py * py <= (mean + slope * end) ** 2) & (cap > NEAR)
        t = np.where(on_cap, cap, t)
        hit |= on_cap
    return t, hit
