"""NYU Depth v2 (Silberman et al., ECCV 2012) in the folder layout of the public extraction toolkits.

    {image,seg40,depth}/{train,test}/0001.{jpg,png}

Names are the official 1-based numbers, depth is 16-bit in millimetres (0 = unknown), seg40 is 8-bit with 0 =
unlabelled and 1..40 (Gupta et al., CVPR 2013). Any size works, usually 640×480 or half of it.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision import tv_tensors
from torchvision.datasets import VisionDataset

from kamal_lib.data.transforms import stream
from kamal_lib.sample import VOID, Depth, Sample

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


class NYUDv2(VisionDataset):
    """One part of NYUDv2 as `Sample`s: image, labels and depth, or `image` alone in "unlabelled".

    "labelled", "unlabelled" and "validation" divide the official training images (see `partition`), "test" is
    the official test set. An unlabelled image's label and depth files are never opened, nor need they exist.
    Images of a part come in a mixed order, so that its first `count` come from many scenes.

    In the public extraction that this was tested with, class 40 (otherprop) cannot be told from unlabelled in
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
    ) -> None:
        """List the files; nothing is decoded yet.

        `classes` is 13 or 40, `count` takes the first of the part, `world` draws another division of the
        training images. Raises ValueError for an unknown split, class count or count out of range, and
        FileNotFoundError for another layout, an empty folder or an image without its counterparts.
        """
        super().__init__(str(root))
        if split not in (*PORTIONS, "test"):
            raise ValueError(f"expected split to be one of {[*PORTIONS, 'test']}, but got {split!r}")
        if classes not in (13, 40):
            raise ValueError(f"expected classes to be 13 or 40, but got {classes}")
        self.split, self.crop_border = split, crop_border
        self.classes = CLASSES_13 if classes == 13 else CLASSES_40
        self._lookup = np.array([VOID, *(k - 1 for k in (TO_13 if classes == 13 else range(1, 41)))])

        folder = "test" if split == "test" else "train"
        self._files = {
            kind: _listing(Path(root), kind, folder)
            for kind in (("image",) if split == "unlabelled" else ("image", "seg40", "depth"))
        }
        names = list(self._files["image"])
        if split != "test":
            names = partition(names, world=world)[split]
        for kind, files in self._files.items():
            if missing := [name for name in names if name not in files]:
                raise FileNotFoundError(
                    f"{Path(root, kind, folder)} has no counterpart of {len(missing)} images, the first is "
                    f"{self._files['image'][missing[0]]}: expected {missing[0]}.png there; extract it again"
                )
        names.sort(key=lambda name: stream(int(name)))
        if count is not None and not 0 < count <= len(names):
            raise ValueError(f"expected count from 1 to {len(names)} (all of {split!r}), but got {count}")
        self.names = names[:count]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Decode one sample.

        Raises OSError for a damaged file, ValueError for a wrong type, size or label; each names the file.
        """
        paths = {kind: files[self.names[index]] for kind, files in self._files.items()}
        image = _decode(paths["image"], mode="RGB")
        window = _window(*image.shape[:2]) if self.crop_border else (slice(None), slice(None))
        pixels = np.ascontiguousarray(image[window].transpose(2, 0, 1), np.float32)
        sample = Sample(image=tv_tensors.Image(pixels / 255))
        if self.split != "unlabelled":
            labels, depth = _decode(paths["seg40"]), _decode(paths["depth"])
            for kind, array in (("seg40", labels), ("depth", depth)):
                if array.shape != image.shape[:2]:
                    raise ValueError(
                        f"expected {paths[kind]} to be one channel of the size of {paths['image']}, "
                        f"{image.shape[:2]} (height, width), but got {array.shape}"
                    )
            if depth.dtype not in (np.uint16, np.int32):  # Pillow before 11 opens 16-bit PNGs as int32
                raise ValueError(
                    f"expected 16-bit millimetres in {paths['depth']}, but got {depth.dtype}: the scale is "
                    "lost in it; extract the depth again"
                )
            if labels.max() > 40:
                raise ValueError(
                    f"expected labels 0 (unlabelled) to 40 in {paths['seg40']}, but got {labels.max()}: is "
                    "it a map of the 894 classes?"
                )
            sample["labels"] = tv_tensors.Mask(self._lookup[labels[window]])
            sample["depth"] = Depth(depth[window].astype(np.float32) / 1000)
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


def _listing(root: Path, kind: str, folder: str) -> dict[str, Path]:
    place = root / kind / folder
    files = {path.stem: path for path in sorted(place.glob("[0-9][0-9][0-9][0-9].*"))}
    if not files:
        found = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else "no such folder"
        state = "has no files 0001.jpg or .png" if place.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{place} {state}. Expected image, seg40 and depth, each with train and test, in {root}; "
            f"found there: {found}. Point `root` at the folder that holds them"
        )
    return files


def _decode(path: Path, *, mode: str | None = None) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.array(picture if mode is None else picture.convert(mode))
    except (OSError, SyntaxError) as error:
        raise OSError(f"{path} cannot be decoded ({error}): it may be truncated; extract it again") from error


def _window(height: int, width: int) -> tuple[slice, slice]:
    top, bottom, left, right = BORDER
    return (
        slice(math.ceil(top * height / 480), bottom * height // 480),
        slice(math.ceil(left * width / 640), right * width // 640),
    )
