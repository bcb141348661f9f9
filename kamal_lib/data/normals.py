"""Surface normals from a depth map, by cross products of neighbouring points (Ye et al., section 6.1).

The cross product of raw points is useless where depth comes in steps (39 mm in the common 8-bit exports of
NYUDv2: a slant is a staircase), so a plane is fitted around every pixel first, and its points are taken. In
*inverse* depth a plane is affine in the image coordinates, so the fit is linear, and exact on planes. A
window that holds more than one surface is told by how far it scatters about its plane, and avoided.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from kamal_lib.sample import Normals, known_depth


def normals_from_depth(
    depth: Float[Tensor, "*size"],
    focal: tuple[float, float],
    centre: tuple[float, float],
    *,
    smoothing: float,
    tolerance: float = 0.012,
) -> Normals:
    """Unit normals, float32 3×H×W, of a depth map H×W in metres (0 = unknown), in the axes of `Normals`.

    focal      of the camera along x and y, pixels
    centre     column and row where the optical axis meets the image; (0, 0) is the centre of the first pixel
    smoothing  standard deviation of the Gaussian window of the fit, pixels; it is cut at two of them
    tolerance  how far a window may scatter about its plane, as a share of the depth (standard deviation)

    Each pixel takes the plane of that window, of nine around it, that fits best: Kuwahara's filter (Kuwahara
    et al., 1976), which keeps edges sharp. A plane that misses the pixel itself by more than two tolerances
    does not count, so that a thin thing never gets the normal of what is behind it. The normal is 0 where no
    window is within the tolerance, and where all of them reach an unknown depth or the image's border.

    Raises ValueError unless depth is H×W, finite and not negative, focal, smoothing and tolerance are
    positive, and all is finite.
    """
    if depth.ndim != 2:
        raise ValueError(f"expected one depth map, height×width, but got shape {tuple(depth.shape)}")
    for name, values in (("focal", focal), ("smoothing", [smoothing]), ("tolerance", [tolerance])):
        if not all(0 < value < math.inf for value in values):
            raise ValueError(f"expected {name} to be positive and finite, but got {values}")
    if not all(map(math.isfinite, centre)):
        raise ValueError(f"expected centre to be finite, but got {centre}")
    depth = depth.as_subclass(Tensor)
    known = known_depth(depth)
    inverse = 1 / torch.where(known, depth, 1)
    reach = math.ceil(2 * smoothing)
    mean, along_x, along_y, scatter = _fit(inverse, smoothing, reach)
    scatter[_reaches_unknown(known, reach)] = torch.inf

    fits = torch.stack([scatter, mean, along_x, along_y])
    pixel = torch.arange(depth.numel()).view(depth.shape)
    best, source = torch.full_like(depth, torch.inf), pixel
    for down in (0, -reach, reach):
        for right in (0, -reach, reach):
            # no window that counts crosses the border, so none comes in again on the other side
            moved, *plane = fits.roll((down, right), (1, 2))
            off = (inverse - plane[0] - right * plane[1] - down * plane[2]).abs() / plane[0]
            # below half of the tolerance all are equal, and the first, around the pixel itself, is taken: a
            # window inside one step of a staircase is a perfect plane, of the wrong slant
            misfit = torch.maximum(moved, off / 2).clamp_min(tolerance / 2)
            source = torch.where(misfit < best, pixel.roll((down, right), (0, 1)), source)
            best = torch.minimum(best, misfit)

    # 1/Z = (n·ray) / (n·point) for all points of a plane, so n is along the three factors of 1/Z; this is
    # the cross product of the back-projected points one column and one row further on
    x = torch.arange(depth.shape[1], dtype=depth.dtype) - centre[0]
    y = torch.arange(depth.shape[0], dtype=depth.dtype)[:, None] - centre[1]
    normals = torch.stack([focal[0] * along_x, focal[1] * along_y, mean - x * along_x - y * along_y])
    normals *= -normals.square().sum(0).clamp_min(1e-30).rsqrt()
    chosen = normals.flatten(1)[:, source.flatten()].view(3, *depth.shape)
    return torch.where(best <= tolerance, chosen, 0).float().as_subclass(Normals)


def _fit(inverse: Tensor, smoothing: float, reach: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted least squares around every pixel: mean, slopes a pixel, scatter as a share of the mean."""
    offsets = torch.arange(-reach, reach + 1, dtype=inverse.dtype)
    weights = torch.exp(-0.5 * (offsets / smoothing) ** 2)
    weights /= weights.sum()
    variance = (weights * offsets**2).sum()
    kernels = torch.stack([weights, weights * offsets / variance])  # mean and slope: the window is even

    def window(maps: Tensor, axis: int) -> Tensor:
        shape, border = ((2, 1, -1, 1), (reach, 0)) if axis == 0 else ((2, 1, 1, -1), (0, reach))
        return F.conv2d(maps[:, None], kernels.view(shape), padding=border)

    columns = window(torch.stack([inverse, inverse * inverse]), 0)
    (mean, along_x), (along_y, _), (square, _) = window(columns.flatten(0, 1)[:3], 1)
    spread = square - mean * mean - variance * (along_x * along_x + along_y * along_y)
    return mean, along_x, along_y, spread.clamp_min(0).sqrt() / mean


def _reaches_unknown(known: Bool[Tensor, "height width"], reach: int) -> Bool[Tensor, "height width"]:
    """Where the square window of that half width holds an unknown pixel or crosses the border."""
    count = F.pad((~known).int(), [reach + 1, reach, reach + 1, reach], value=1)
    for axis, size in enumerate(known.shape):
        total = count.cumsum(axis)
        count = total.narrow(axis, 2 * reach + 1, size) - total.narrow(axis, 0, size)
    return count > 0
