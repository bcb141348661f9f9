"""The ray caster against trimesh with embree, closed forms, and geometry derived another way."""

import numpy as np
import pytest
import trimesh
from trimesh.ray.ray_pyembree import RayMeshIntersector

from kamal_lib.data.raycast import BOX, ELLIPSOID, FRUSTUM, RECTANGLE, Solids, cast, image_plane, surface

HEIGHT, WIDTH, FOCAL = 60, 80, 0.75


def random_solids(seed: int, count: int = 14, *, nearest: float = 2.0) -> Solids:
    """Sheared and stretched solids of every shape in front of the camera, some across the image's border."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform((-2.5, -2.0, nearest), (2.5, 2.0, 7.0), (count, 3))
    rotation = np.linalg.qr(rng.normal(size=(count, 3, 3)))[0]
    stretch = np.eye(3) * rng.uniform(0.2, 0.9, (count, 1, 3))
    axes = rotation @ stretch + rng.uniform(-0.08, 0.08, (count, 3, 3))
    return Solids(np.arange(count) % 4, centre, axes, rng.uniform(0.0, 1.0, count))


def unit_mesh(shape: int, taper: float) -> trimesh.Trimesh:
    if shape == BOX:
        return trimesh.creation.box((2, 2, 2))
    if shape == ELLIPSOID:
        return trimesh.creation.icosphere(subdivisions=5)
    if shape == FRUSTUM:
        profile = [(0, -1), (1, -1), (max(taper, 1e-6), 1), (0, 1)]
        return trimesh.creation.revolve(profile, sections=720)
    return trimesh.Trimesh([(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)], [(0, 1, 2), (0, 2, 3)])


def rays(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.stack([*np.meshgrid(x, y), np.ones((len(y), len(x)))], -1)


def oracle(solids: Solids, x: np.ndarray, y: np.ndarray):
    """Index, depth and camera-facing normal of the first triangle on every ray."""
    meshes, owner = [], []
    for i, shape in enumerate(solids.shape):
        mesh = unit_mesh(shape, solids.taper[i])
        vertices = mesh.vertices @ solids.axes[i].T + solids.centre[i]
        meshes.append(trimesh.Trimesh(vertices, mesh.faces, process=False))
        owner += [i] * len(mesh.faces)
    scene = trimesh.util.concatenate(meshes)
    direction = rays(x, y).reshape(-1, 3)
    face, ray, spot = RayMeshIntersector(scene).intersects_id(
        np.zeros_like(direction), direction, return_locations=True, multiple_hits=False
    )
    index, depth, normal = (
        np.full((len(direction), *s), f) for s, f in (((), -1), ((), np.inf), ((3,), 0.0))
    )
    index[ray], depth[ray] = np.array(owner)[face], spot[:, 2]
    a, b, c = (scene.vertices[scene.faces[face, k]] for k in range(3))
    across = np.cross(b - a, c - a)
    across *= -np.sign((across * direction[ray]).sum(1, keepdims=True))
    normal[ray] = across / np.linalg.norm(across, axis=1, keepdims=True)
    shape = len(y), len(x)
    return index.reshape(shape), depth.reshape(shape), normal.reshape(*shape, 3)


@pytest.mark.parametrize("seed", range(4))
def test_same_hits_as_embree(seed):
    solids = random_solids(seed)
    x, y = image_plane(HEIGHT, WIDTH, FOCAL)
    hits = cast(solids, x, y)
    _, normals = surface(solids, hits, x, y)
    index, depth, expected = oracle(solids, x, y)

    same = hits.index == index
    assert same.mean() > 0.998  # the rest: tessellated silhouettes
    assert len(np.unique(hits.index)) > 8
    flat = np.isin(solids.shape, (BOX, RECTANGLE))
    angle = np.degrees(np.arccos(np.clip((normals.transpose(1, 2, 0) * expected).sum(-1), -1, 1)))
    for of_kind, depth_error, degrees in ((flat, 2e-4, 0.1), (~flat, 1e-2, 4.0)):
        where = same & (index >= 0) & of_kind[np.maximum(index, 0)]
        assert where.sum() > 100
        assert np.abs(hits.depth[where] - depth[where]).max() < depth_error
        assert (angle[where] < degrees).mean() > 0.995  # an edge between two faces may go either way
        assert np.median(angle[where]) < degrees / 4


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("nearest", [-1.0, 2.0])
def test_culling_changes_nothing(seed, nearest):
    """Also with solids beside, behind and across the camera's plane."""
    solids = random_solids(seed, 24, nearest=nearest)
    x, y = image_plane(HEIGHT, WIDTH, FOCAL)
    fast, slow = cast(solids, x, y), cast(solids, x, y, cull=False)
    np.testing.assert_array_equal(fast.depth, slow.depth)
    assert (fast.index != slow.index).mean() < 1e-3  # two solids at exactly one depth


def test_wall_depth_in_closed_form():
    """A plane n·p = c is met at depth c / n·(x, y, 1)."""
    normal = np.array([0.3, -0.2, -1.0]) / np.linalg.norm([0.3, -0.2, -1.0])
    along = np.cross(normal, (0.0, 1.0, 0.0))
    axes = 50 * np.stack([along, np.cross(normal, along), normal], 1)
    wall = Solids(np.array([RECTANGLE]), np.array([[0.0, 0.0, 3.0]]), axes[None], np.ones(1))
    x, y = image_plane(HEIGHT, WIDTH, FOCAL)
    hits = cast(wall, x, y)
    expected = normal @ (0, 0, 3.0) / (rays(x, y) @ normal)
    np.testing.assert_allclose(hits.depth, expected, rtol=1e-5)
    _, normals = surface(wall, hits, x, y)
    np.testing.assert_allclose(normals, np.broadcast_to(normal[:, None, None], normals.shape), atol=1e-5)


def test_ball_and_its_silhouette_in_closed_form():
    """Radius r at distance z: met at z - r, and covers the directions with tan² < r²/(z² - r²)."""
    ball = Solids(np.array([ELLIPSOID]), np.array([[0.0, 0.0, 4.0]]), np.eye(3)[None] * 1.5, np.ones(1))
    x, y = image_plane(101, 101, FOCAL)
    hits = cast(ball, x, y)
    assert hits.depth[50, 50] == pytest.approx(2.5, abs=1e-5)
    limit = 1.5**2 / (4.0**2 - 1.5**2)
    np.testing.assert_array_equal(hits.index == 0, x**2 + y[:, None] ** 2 < limit)


def test_normals_are_unit_and_face_the_camera():
    solids = random_solids(11, 24)
    x, y = image_plane(HEIGHT, WIDTH, FOCAL)
    hits = cast(solids, x, y)
    _, normals = surface(solids, hits, x, y)
    hit = hits.index >= 0
    np.testing.assert_allclose(np.linalg.norm(normals, axis=0)[hit], 1, atol=1e-5)
    assert ((normals.transpose(1, 2, 0) * rays(x, y)).sum(-1)[hit] <= 1e-6).all()
    assert (normals[:, ~hit] == 0).all()


def test_normals_agree_with_depth():
    """On planes the normal is the cross product of neighbouring points (Ye et al. 2019, section 6.1)."""
    solids = random_solids(5, 12)
    solids = Solids(np.where(solids.shape % 2 == 0, BOX, RECTANGLE), solids.centre, solids.axes, solids.taper)
    x, y = image_plane(HEIGHT, WIDTH, FOCAL)
    hits = cast(solids, x, y)
    _, normals = surface(solids, hits, x, y)
    normals = normals.transpose(1, 2, 0)
    points = rays(x, y) * np.where(np.isfinite(hits.depth), hits.depth, 0)[..., None]
    right, down = points[:-1, 1:] - points[:-1, :-1], points[1:, :-1] - points[:-1, :-1]
    derived = np.cross(down, right)
    derived /= np.maximum(np.linalg.norm(derived, axis=-1, keepdims=True), 1e-12)
    here, beside, below = normals[:-1, :-1], normals[:-1, 1:], normals[1:, :-1]
    one_face = (np.abs(here - beside).max(-1) < 1e-5) & (np.abs(here - below).max(-1) < 1e-5)
    index = hits.index[:-1, :-1]
    one_solid = (index == hits.index[:-1, 1:]) & (index == hits.index[1:, :-1]) & (index >= 0)
    where = one_face & one_solid
    assert where.sum() > 500
    np.testing.assert_allclose(derived[where], here[where], atol=5e-3)


def test_rays_parallel_to_faces():
    """The middle column of an odd-sized image runs along the sides of an upright box."""
    box = Solids(np.array([BOX]), np.array([[0.0, 0.0, 3.0]]), np.eye(3)[None], np.ones(1))
    x, y = image_plane(61, 61, FOCAL)
    hits = cast(box, x, y)
    assert x[30] == y[30] == 0
    assert (hits.index[30, 15:46] == 0).all()
    np.testing.assert_allclose(hits.depth[hits.index == 0], 2, atol=1e-5)


@pytest.mark.parametrize("shape", [BOX, ELLIPSOID, FRUSTUM])
def test_a_solid_around_the_camera_is_not_seen(shape):
    around = Solids(np.array([shape]), np.array([[0.1, 0.0, 0.2]]), 2 * np.eye(3)[None], np.full(1, 0.8))
    x, y = image_plane(HEIGHT, WIDTH, FOCAL)
    assert (cast(around, x, y).index == -1).all()
