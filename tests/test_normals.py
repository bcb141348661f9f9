"""Normals from depth: planes, spheres and steps in closed form, and the rooms' exact normals."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kamal_lib.data.normals import normals_from_depth
from kamal_lib.data.scenes import sample_scene
from kamal_lib.data.shading import render
from kamal_lib.sample import Depth, Normals, known_normals

HEIGHT, WIDTH = 60, 80
FOCAL, CENTRE = (70.0, 64.0), (41.5, 27.0)


def rays() -> Tensor:
    """Directions (x, y, 1) of all pixels, 3×H×W, float64."""
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    x, y = (x.double() - CENTRE[0]) / FOCAL[0], (y.double() - CENTRE[1]) / FOCAL[1]
    return torch.stack([x, y, torch.ones_like(x)])


def unit(*direction: float) -> Tensor:
    return torch.tensor(direction, dtype=torch.float64) / math.hypot(*direction)


def plane(normal: Tensor, distance: float) -> Tensor:
    """Depth of the plane `distance` metres from the camera whose normal, towards it, is given."""
    return -distance / torch.einsum("c,chw->hw", normal, rays())


def angles(normals: Tensor, truth: Tensor) -> Tensor:
    """Degrees, H×W; NaN where the normals are unknown."""
    normals, truth = normals.as_subclass(Tensor).double(), truth.double()
    cosine = (normals * truth.reshape(3, *truth.shape[1:] or (1, 1))).sum(0).clamp(-1, 1)
    return torch.where((normals == 0).all(0), torch.nan, cosine.acos().rad2deg())


def estimate(depth: Tensor, *, smoothing: float = 2.0, tolerance: float = 0.012) -> Normals:
    return normals_from_depth(depth, FOCAL, CENTRE, smoothing=smoothing, tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.5, 2.0, 4.3])
@pytest.mark.parametrize("direction", [(0, 0, -1), (0.5, 0, -1), (-0.3, -0.6, -1), (0.2, 0.9, -1)])
def test_planes_are_exact(direction: tuple[float, ...], smoothing: float, dtype: torch.dtype) -> None:
    truth = unit(*direction)
    normals = estimate(plane(truth, 2.0).to(dtype), smoothing=smoothing)
    error = angles(normals, truth)
    assert type(normals) is Normals
    assert normals.dtype == torch.float32
    assert error.max() < 0.05  # which NaN is not: known to the border
    known_normals(normals.as_subclass(Tensor)[None])  # raises unless of length 1 or 0


def test_floor_faces_up_and_walls_face_the_room() -> None:
    down, right = rays()[1], rays()[0]
    floor = torch.where(down > 0.05, 1.2 / down.clamp_min(0.01), 0)
    wall = torch.where(right < -0.05, -1.5 / right.clamp_max(-0.01), 0)
    for depth, truth in ((floor, unit(0, -1, 0)), (wall, unit(1, 0, 0))):
        error = angles(estimate(Depth(depth.float())), truth)
        assert (~error.isnan()).sum() > 0.8 * (depth > 0).sum()
        assert error[~error.isnan()].max() < 0.05


def test_sphere() -> None:
    radius, distance = 1.0, 3.0
    squared, along = (rays() ** 2).sum(0), distance
    root = along**2 - squared * (distance**2 - radius**2)
    depth = torch.where(root > 0, (along - root.clamp_min(0).sqrt()) / squared, 0)
    truth = (rays() * depth - torch.tensor([0.0, 0.0, distance]).view(3, 1, 1)) / radius
    error = angles(estimate(depth.float(), smoothing=1.0), truth)
    seen = ~error.isnan()
    assert seen.sum() > 0.9 * (depth > 0).sum()
    assert not seen[depth == 0].any()
    assert error[seen].mean() < 2
    assert error[seen].max() < 15


def test_stairs_of_an_8_bit_depth_become_a_plane() -> None:
    truth = unit(0.3, -0.4, -1)
    depth = plane(truth, 2.5)
    stairs = (depth / 0.0392).round() * 0.0392
    smooth, raw = (angles(estimate(stairs, smoothing=s, tolerance=0.05), truth) for s in (4.0, 0.3))
    assert smooth.nanmean() < 2
    assert raw.nanmean() > 10  # so the smoothing is needed
    assert (~smooth.isnan()).float().mean() > 0.99


def test_step_does_not_blend() -> None:
    near, far = unit(0.4, 0, -1), unit(-0.3, -0.3, -1)
    left = torch.arange(WIDTH) < 37
    depth = torch.where(left, plane(near, 1.5), plane(far, 3.0))
    truth = torch.where(left, near.view(3, 1, 1), far.view(3, 1, 1)).expand(3, HEIGHT, WIDTH)
    error = angles(estimate(depth), truth)
    assert (~error.isnan()).float().mean() > 0.99
    assert error[~error.isnan()].max() < 0.1


def test_edge_between_two_planes_stays_sharp() -> None:
    one, other = unit(0.6, 0, -1), unit(-0.6, 0, -1)
    depth = torch.maximum(plane(one, 2.0), plane(other, 2.0))
    left = plane(one, 2.0) > plane(other, 2.0)
    truth = torch.where(left, one.view(3, 1, 1), other.view(3, 1, 1))
    error = angles(estimate(depth, smoothing=3.0, tolerance=0.002), truth)
    assert (~error.isnan()).float().mean() > 0.9
    assert error[~error.isnan()].max() < 12  # the angle between the planes is 62


def test_thin_things_are_unknown() -> None:
    depth = plane(unit(0, 0, -1), 3.0)
    depth[:, 40:42] = 1.0
    normals = estimate(depth)
    assert (normals[:, :, 40:42] == 0).all()
    assert (normals[2, 10:-10, 10:30] < -0.99).all()


@pytest.mark.parametrize("metres", [0.1, 1.0, 2.0])
def test_holes_are_unknown_and_do_not_disturb(metres: float) -> None:
    truth = unit(0.03, 0.05, -1)
    depth = plane(truth, metres).float()
    depth[20:30, 30:50] = 0
    depth[45, 10] = 0
    error = angles(estimate(depth), truth)
    assert error[depth == 0].isnan().all()
    assert error[~error.isnan()].max() < 0.05
    around = (~error.isnan()) & (depth > 0)
    assert around.sum() > 0.97 * (depth > 0).sum()


@pytest.mark.parametrize("size", [(1, 1), (2, 30), (5, 7), (12, 12)])
def test_nothing_is_known_without_a_whole_window(size: tuple[int, int]) -> None:
    for depth in (torch.full(size, 2.0), torch.zeros(size)):
        normals = normals_from_depth(depth, (50.0, 50.0), (5.0, 5.0), smoothing=3.0)
        assert normals.shape == (3, *size)
        assert (normals == 0).all()


def test_scale_of_the_depth_does_not_matter() -> None:
    depth = plane(unit(0.3, 0.5, -1), 2.0).float()
    depth[25:35, 35:45] *= 0.8
    one, other = (estimate(depth * factor) for factor in (1.0, 4.0))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("step", "mean", "median", "share"), [(0.0, 7.0, 0.1, 0.88), (0.0392, 7.5, 1.2, 0.88)]
)
def test_rooms_against_their_exact_normals(step: float, mean: float, median: float, share: float) -> None:
    errors, shares = [], []
    for seed in (100, 101, 102):
        scene = sample_scene(seed)
        room = render(scene, 240, 320)
        depth, truth = (torch.from_numpy(room[key]) for key in ("depth", "normals"))
        if step:
            depth = (depth / step).round() * step
        focal = scene.camera.focal * 320
        normals = normals_from_depth(depth, (focal, focal), (159.5, 119.5), smoothing=4.0)
        error = angles(normals, truth)
        shares.append(float((~error.isnan()).float().mean()))
        errors.append(error[~error.isnan()])
    assert torch.cat(errors).mean() < mean
    assert torch.cat(errors).median() < median
    assert np.mean(shares) > share


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_impossible_depth_is_refused(value: float) -> None:
    depth = torch.full((30, 30), 2.0)
    depth[3, 4] = value
    with pytest.raises(ValueError, match=rf"got 1 of 900 values such as {value}: set what is not known to 0"):
        normals_from_depth(depth, (50.0, 50.0), (15.0, 15.0), smoothing=1.0)


def test_other_wrong_input_is_refused() -> None:
    depth, lens, centre = torch.full((30, 30), 2.0), (50.0, 50.0), (15.0, 15.0)
    with pytest.raises(ValueError, match=r"height×width, but got shape \(1, 30, 30\)"):
        normals_from_depth(depth[None], lens, centre, smoothing=1.0)
    for focal in ((50.0, 0.0), (-50.0, 50.0), (math.nan, 50.0), (math.inf, 50.0)):
        with pytest.raises(ValueError, match="focal to be positive and finite"):
            normals_from_depth(depth, focal, centre, smoothing=1.0)
    with pytest.raises(ValueError, match=r"smoothing to be positive and finite, but got \[0.0\]"):
        normals_from_depth(depth, lens, centre, smoothing=0.0)
    with pytest.raises(ValueError, match="tolerance to be positive and finite"):
        normals_from_depth(depth, lens, centre, smoothing=1.0, tolerance=-1.0)
    with pytest.raises(ValueError, match="centre to be finite"):
        normals_from_depth(depth, lens, (math.nan, 15.0), smoothing=1.0)
