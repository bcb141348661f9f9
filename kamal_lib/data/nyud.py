"""NYU Depth v2 (Silberman et al., ECCV 2012): image, labels, depth and normals, for teachers and students.

Read from the official `.mat` file or from folders of pictures: see `kamal_lib.data.nyud_files`.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import VisionDataset

from kamal_lib.data.normals import normals_from_depth
from kamal_lib.data.nyud_files import Folder, MatFile
from kamal_lib.data.transforms import stream
from kamal_lib.sample import VOID, Depth, Normals, Sample

# fmt: off
CLASSES_13 = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "tv",
    "wall", "window",
)
"""Names of ids 0..12 (Couprie et al., ICLR 2013)."""

CLASSES_40 = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf",
    "picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat",
    "clothes", "ceiling", "books", "refridgerator", "television", "paper", "towel", "shower curtain", "box",
    "whiteboard", "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure",
    "otherfurniture", "otherprop",
)
"""Names of ids 0..39, spelt as in the official `classMapping40.mat`."""

TO_13 = (
    12, 5, 6, 1, 4, 9, 10, 12, 13, 6, 8, 6, 13, 10, 6, 13, 6, 7, 7, 5,
    7, 3, 2, 6, 11, 7, 7, 7, 7, 7, 7, 6, 7, 7, 7, 7, 7, 7, 6, 7,
)
"""Class 1..13 of each class 1..40: `classMapping13` of the public `class13Mapping.mat`."""
# fmt: on

PORTIONS = {"labelled": 3 / 8, "unlabelled": 1 / 2, "validation": 1 / 8}
"""Shares of the 795 official training images; see `partition`."""

BORDER = (44, 471, 40, 601)
"""Top, bottom, left, right (exclusive) of the picture inside its white border, at 640×480."""

FOCAL, CENTRE = (518.858, 519.470), (325.582, 253.736)
"""The camera along x and y, pixels at 640×480 (`camera_params.m` of the official toolbox, as it stands: its
pixels count from 1, which shifts normals by about 0.1 degrees)."""


class NYUDv2(VisionDataset):
    """One part of NYUDv2 as `Sample`s: image, labels, depth, normals; or `image` alone in "unlabelled".

    "labelled", "unlabelled" and "validation" divide the official training images (see `partition`), "test" is
    the official test set. An unlabelled image's label and depth files are never opened, nor need they exist.
    "all" is "labelled" and after it "unlabelled", with all their labels: the upper bound of what teachers can
    be given. A student must never see it. Images of a part come in a mixed order, so that its first `count`
    come from many scenes.

    `root` is the official `nyu_depth_v2_labeled.mat`, or a folder of pictures: see `MatFile` and `Folder` in
    `kamal_lib.data.nyud_files`. Normals are computed from the depth (Ye et al., section 6.1), see
    `normals_from_depth`; the window is 4 pixels wide (standard deviation) at 320×240.

    In the public folders that this was tested with, class 40 (otherprop) cannot be told from unlabelled in
    the training images: it is void there, and "objects" of the 13 classes in the test images.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        classes: int = 13,
        count: int | None = None,
        world: int = 0,
        crop_border: bool = True,
        normals: bool = True,
    ) -> None:
        """List the files; nothing is decoded yet.

        `classes` is 13 or 40, `count` takes the first of the part, `world` draws another division of the
        training images, `normals=False` leaves them out, which saves time. Raises ValueError for an unknown
        split, class count or count out of range, and what `MatFile` or `Folder` raises for files that are
        missing or do not belong together.
        """
        super().__init__(str(root))
        if split not in (*PORTIONS, "all", "test"):
            raise ValueError(f"expected split to be one of {[*PORTIONS, 'all', 'test']}, but got {split!r}")
        if classes not in (13, 40):
            raise ValueError(f"expected classes to be 13 or 40, but got {classes}")
        self.split, self.crop_border, self.normals = split, crop_border, normals
        self.classes = CLASSES_13 if classes == 13 else CLASSES_40
        self._lookup = np.array([VOID, *(k - 1 for k in (TO_13 if classes == 13 else range(1, 41)))])

        layout = MatFile if Path(root).suffix == ".mat" else Folder
        self._files = layout(Path(root), "test" if split == "test" else "train")
        names = self._files.names
        parts = {"test": [names]}
        if split != "test":
            division = partition(names, world=world)
            parts = {part: [division[part]] for part in PORTIONS}
            parts["all"] = [division["labelled"], division["unlabelled"]]
        names = [name for part in parts[split] for name in sorted(part, key=lambda name: stream(int(name)))]
        if split != "unlabelled":
            self._files.expect(names)
        if count is not None and not 0 < count <= len(names):
            raise ValueError(f"expected count from 1 to {len(names)} (all of {split!r}), but got {count}")
        self.names = names[:count]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Decode one sample.

        Raises OSError for a damaged file, ValueError for a wrong type, size, label or depth; each names it.
        """
        name = self.names[index]
        image = self._files.image(name)
        window = _window(*image.shape[:2]) if self.crop_border else (slice(None), slice(None))
        pixels = np.ascontiguousarray(image[window].transpose(2, 0, 1), np.float32)
        sample = Sample(image=tv_tensors.Image(pixels / 255))
        if self.split != "unlabelled":
            labels, depth = self._files.annotation(name)
            sample["labels"] = tv_tensors.Mask(self._lookup[labels[window]])
            sample["depth"] = Depth(np.ascontiguousarray(depth[window]))
            if self.normals:
                sample["normals"] = _normals(sample["depth"], window, image.shape[:2])
        return sample

    def extra_repr(self) -> str:
        """What `repr` says beside the number of images and the root."""
        return f"Split: {self.split}, {len(self.classes)} classes"


def partition(names: Sequence[str], *, world: int) -> dict[str, list[str]]:
    """Divide the official training images into the `PORTIONS`, keeping neighbours of one scene together.

    Images of one scene have consecutive numbers, and the official split never divides a scene, so a gap in
    the training numbers is a border between scenes. Whole runs of consecutive numbers (123 of them, up to 34
    images) go, in an order that a hash of (world, first number) gives, each to the part that is
    furthest behind its portion. Sizes are therefore within a run of the portions.

    What remains imperfect: different rooms of one home, and scenes filmed in several pieces, may meet across
    parts. A tree renumbered without gaps shows no borders; a run longer than a sixteenth of all images is
    cut, which also serves miniature trees, but may divide a scene.
    """
    longest = max(1, len(names) // 16)
    runs: list[list[str]] = []
    for name in sorted(names):
        if runs and int(name) == int(runs[-1][-1]) + 1 and len(runs[-1]) < longest:
            runs[-1].append(name)
        else:
            runs.append([name])
    parts: dict[str, list[str]] = {part: [] for part in PORTIONS}
    for run in sorted(runs, key=lambda run: stream(world, int(run[0]))):
        min(parts.items(), key=lambda item: len(item[1]) / PORTIONS[item[0]])[1].extend(run)
    return parts


def _window(height: int, width: int) -> tuple[slice, slice]:
    top, bottom, left, right = BORDER
    return (
        slice(math.ceil(top * height / 480), bottom * height // 480),
        slice(math.ceil(left * width / 640), right * width // 640),
    )


def _normals(depth: Tensor, window: tuple[slice, slice], size: tuple[int, int]) -> Normals:
    """Normals of the part `window` of a picture of (height, width) `size`."""
    down, right = size[0] / 480, size[1] / 640
    focal = (FOCAL[0] * right, FOCAL[1] * down)
    centre = (CENTRE[0] * right - (window[1].start or 0), CENTRE[1] * down - (window[0].start or 0))
    return normals_from_depth(depth, focal, centre, smoothing=size[1] / 80)
