"""The data contract: what one sample holds, in which shape and unit, and what "unknown" looks like.

Every data set of the workbook returns a `Sample`, every task reads one, and nothing else travels between
the two. The spatial entries are `torchvision.tv_tensors`, so that the transforms of
`torchvision.transforms.v2` move image, labels, depth and normals together.
"""

from typing import TypedDict

import torch
from torchvision import tv_tensors

VOID = 255
"""Label of a pixel that no loss and no metric may look at."""


class Depth(tv_tensors.TVTensor):
    """Distance along the optical axis, float32 H×W, in metres; 0 where it is unknown."""


class Normals(tv_tensors.TVTensor):
    """Unit surface normals, float32 3×H×W, in camera axes (x right, y down, z forward); 0 where unknown.

    A surface that faces the camera has a negative z component.
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
    box_labels: torch.Tensor
