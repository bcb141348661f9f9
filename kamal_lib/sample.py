"""The data contract: what one sample holds, in which shape and unit, and what "unknown" looks like.

Every data set of the workbook returns a `Sample`, every task reads one, and nothing else travels between
the two. The spatial entries are `torchvision.tv_tensors`, so that the transforms of
`torchvision.transforms.v2` move image, labels, depth and normals together.
"""

from typing import TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision import tv_tensors

VOID = 255
"""Label of a pixel that no loss and no metric may look at."""


class Depth(tv_tensors.TVTensor):
    """Distance along the optical axis, float32 H×W, in metres; 0 where it is unknown."""


class Normals(tv_tensors.TVTensor):
    """Unit surface normals, float32 3×H×W, in camera axes (x right, y down, z forward); 0 where unknown.

    A visible surface turns towards the ray that meets it; near the optical axis that means a negative z.
    """


class Sample(TypedDict, total=False):
    """One image with whatever is known about it. Absent keys are not known at all.

    image       float32 3×H×W, RGB in [0, 1]
    labels      int64 H×W, class ids 0..C-1, `VOID` where unlabelled
    depth       float32 H×W, metres, 0 where unknown
    normals     float32 3×H×W, unit vectors, 0 where unknown
    boxes       float32 K×4, pixels, (left, top, right, bottom), right and bottom exclusive
    box_labels  int64 K, the class id of each box
    """

    image: tv_tensors.Image
    labels: tv_tensors.Mask
    depth: Depth
    normals: Normals
    boxes: tv_tensors.BoundingBoxes
    box_labels: Tensor


def known_labels(labels: Int[Tensor, "*shape"], classes: int) -> Bool[Tensor, "*shape"]:
    """Where labels are known (not `VOID`). Raises ValueError for one that is no class 0..classes-1 either."""
    valid = labels != VOID
    if bool((valid & ((labels < 0) | (labels >= classes))).any()):
        seen = sorted(set(labels[valid].unique().tolist()) - set(range(classes)))
        raise ValueError(
            f"labels {seen} are outside 0..{classes - 1} and not {VOID} (void): "
            f"the task has {classes} classes; was the data set opened with another number of classes?"
        )
    return valid


def known_depth(depth: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Where a depth map in metres is known (not 0). Raises ValueError for NaN, infinity, negative values."""
    if not bool(((depth >= 0) & (depth < torch.inf)).all()):
        wrong = depth[~((depth >= 0) & (depth < torch.inf))]
        raise ValueError(
            f"depth must be metres from 0 (unknown) on, got {len(wrong)} of {depth.numel()} values such as "
            f"{float(wrong[0].detach())}: set what is not known to 0"
        )
    return depth > 0


def known_normals(normals: Float[Tensor, "batch 3 height width"]) -> Bool[Tensor, "batch height width"]:
    """Where normals are known (not 0). Raises ValueError where one is not of length 1, within 0.01."""
    x, y, z = normals.unbind(1)
    square = x * x + y * y + z * z
    valid = square != 0
    if not bool(((square - 1).abs() < 0.02)[valid].all()):
        wrong = square[valid & ~((square - 1).abs() < 0.02)]
        raise ValueError(
            f"normals must have length 1, or be 0 where unknown, got {len(wrong)} pixels with lengths like "
            f"{float(wrong[0].sqrt().detach()):.3g}: divide by the length, after every resize too"
        )
    return valid
