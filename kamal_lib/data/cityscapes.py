"""Cityscapes (Cordts et al., CVPR 2016): image, labels and depth of street scenes, for teachers and students.

torchvision's own `Cityscapes` lists the files in the order of the disk, looks for `gtFine` even where labels
are not wanted, and knows neither disparity nor camera; of it we take the table of classes.
"""

import json
import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Integer
from torchvision import datasets

from kamal_lib.data.street_files import expect, first, found, image_of, labels_of, map_of, mixed
from kamal_lib.sample import VOID, Depth, Sample

_EVALUATED = [entry for entry in datasets.Cityscapes.classes if 0 <= entry.train_id < VOID]

CLASSES_19 = tuple(entry.name for entry in _EVALUATED)
"""Names of the 19 classes that are evaluated, "road" to "bicycle", in the order of the official train ids."""

_TRAIN_IDS = np.full(34, VOID)
_TRAIN_IDS[[entry.id for entry in _EVALUATED]] = [entry.train_id for entry in _EVALUATED]

SPLITS = ("train", "val", "test")

_FILES = {
    "image": ("leftImg8bit", "_leftImg8bit.png"),
    "labels": ("gtFine", "_gtFine_labelIds.png"),
    "disparity": ("disparity", "_disparity.png"),
    "camera": ("camera", "_camera.json"),
}


class Cityscapes(datasets.VisionDataset):
    """One split of Cityscapes as `Sample`s: image, labels, depth; or `image` alone with `annotated=False`.

    The official archives `{leftImg8bit,gtFine,disparity,camera}_trainvaltest.zip`, unpacked into `root`; a
    name is that of city, sequence and frame, such as `aachen_000000_000019`:

        leftImg8bit/{train,val,test}/CITY/NAME_leftImg8bit.png      RGB
        gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png            8-bit ids, 0..33
        disparity/{train,val}/CITY/NAME_disparity.png               16-bit
        camera/{train,val}/CITY/NAME_camera.json                    extrinsic.baseline and intrinsic.fx

    Of the 34 ids 19 are classes; the others are void. Depth is that of `depth_from_disparity`. The disparity
    is measured by stereo matching: it has holes, and far away it is coarse. Where it is next to nothing the
    depth is kilometres, up to about 120; beyond `farthest` metres it counts as unknown.

    The official validation images are what papers test on. To choose settings, hold some of the training
    `cities` out. Labels of the test images are not public. Images come in a mixed order, so that the first
    `count` come from all cities.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        annotated: bool = True,
        depth: bool = True,
        farthest: float = math.inf,
        count: int | None = None,
        cities: Collection[str] | None = None,
    ) -> None:
        """List the files; nothing is decoded yet.

        `annotated=False` gives the image alone, whatever `depth` says, and `depth=False` image and labels:
        the files of what is left out are never opened, nor need they exist. `cities` takes these only, and
        `count` the first of what there is. Raises ValueError for an unknown split or city, annotated test
        images, a count out of range or a `farthest` depth that is none; FileNotFoundError for a folder or
        file that is missing.
        """
        super().__init__(str(root))
        if split not in SPLITS:
            raise ValueError(f"expected split to be one of {list(SPLITS)}, but got {split!r}")
        if split == "test" and annotated:
            raise ValueError(
                "expected annotated=False with 'test', but got annotated=True: labels of the test images are "
                "not public; measure on 'val', or take the images alone"
            )
        if not farthest > 0:
            raise ValueError(f"expected farthest to be metres above 0, but got {farthest}")
        self.split, self.annotated, self.depth = split, annotated, annotated and depth
        self.farthest = farthest
        names = _of_cities(mixed(_names(Path(self.root), split)), cities)
        needed = {"labels": "annotated=False"} if annotated else {}
        if self.depth:
            needed |= {"disparity": "depth=False", "camera": "depth=False"}
        for kind, otherwise in needed.items():
            archive = f"{_FILES[kind][0]}_trainvaltest.zip"
            expect(
                [self._path(kind, name) for name in names],
                f"unpack {archive} into {self.root}, or pass {otherwise}",
            )
        self.names = first(names, count, split)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Decode one sample.

        Raises OSError for a damaged file, ValueError for a wrong type, size or value; each names it.
        """
        picture, labels, disparity, camera = (self._path(kind, self.names[index]) for kind in _FILES)
        image = image_of(picture)
        sample = Sample(image=image)
        if self.annotated:
            advice = "0 to 33 are the official ids; is it a map of train ids, or of instances?"
            sample["labels"] = labels_of(labels, picture, image.shape[-2:], _TRAIN_IDS, advice)
        if self.depth:
            numbers = map_of(disparity, picture, image.shape[-2:])
            if numbers.dtype not in (np.uint16, np.int32):  # Pillow before 11 opens 16-bit PNGs as int32
                raise ValueError(
                    f"expected 16-bit numbers in {disparity}, but got {numbers.dtype}: the scale is lost in "
                    "it; unpack disparity_trainvaltest.zip again"
                )
            metres = depth_from_disparity(numbers, *_camera(camera))
            sample["depth"] = Depth(np.where(metres <= self.farthest, metres, 0))
        return sample

    def extra_repr(self) -> str:
        """What `repr` says beside the number of images and the root."""
        known = [f"{len(CLASSES_19)} classes"] * self.annotated + ["depth"] * self.depth
        return f"Split: {self.split}, {' and '.join(known) or 'images alone'}"

    def _path(self, kind: str, name: str) -> Path:
        folder, ending = _FILES[kind]
        return Path(self.root, folder, self.split, _city(name), f"{name}{ending}")


def cities_of(root: str | Path, split: str) -> list[str]:
    """The cities of a split that there are images of. Raises FileNotFoundError if there are none."""
    return sorted({_city(name) for name in _names(Path(root).expanduser(), split)})


def depth_from_disparity(
    numbers: Integer[np.ndarray, "height width"], baseline: float, focal: float
) -> Float32[np.ndarray, "height width"]:
    """Metres, of the numbers in a disparity file; 0 (unknown) where it holds 0 (not measured) or 1 (none).

    The official README: d = (p − 1) / 256 pixels for p > 0. Depth is `baseline` (metres between the two
    cameras) · `focal` (pixels) / d, so p = 2 is 256 times as far as one pixel of disparity.
    """
    pixels = (numbers.astype(np.float32) - 1) / 256
    return np.divide(baseline * focal, pixels, out=np.zeros_like(pixels), where=pixels > 0)


def _city(name: str) -> str:
    return name.partition("_")[0]


def _names(root: Path, split: str) -> list[str]:
    """The names of all images of a split; raises FileNotFoundError if there are none."""
    folder, ending = _FILES["image"]
    place = root / folder / split
    names = [path.name.removesuffix(ending) for path in place.glob(f"[!.]*/[!.]*{ending}")]
    if not names:
        state = f"has no files CITY/NAME{ending}" if place.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{place} {state}: expected {folder}/{split} in {root}, found there: {found(root)}. Unpack "
            f"{folder}_trainvaltest.zip into it, or point `root` at the folder that holds {folder}"
        )
    return names


def _of_cities(names: list[str], cities: Collection[str] | None) -> list[str]:
    if cities is None:
        return names
    there = {_city(name) for name in names}
    if not cities or not there.issuperset(cities):
        raise ValueError(
            f"expected cities to be some of {sorted(there)}, but got {sorted(cities)}: leave out what is not "
            "there, or pass None for all"
        )
    return [name for name in names if _city(name) in cities]


def _camera(path: Path) -> tuple[float, float]:
    """Baseline in metres and horizontal focal length in pixels."""
    try:
        camera = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text at all
        raise OSError(
            f"{path} cannot be read as JSON ({error}): it may be truncated; unpack camera_trainvaltest.zip "
            "again"
        ) from error
    try:
        baseline, focal = float(camera["extrinsic"]["baseline"]), float(camera["intrinsic"]["fx"])
    except (KeyError, TypeError, ValueError):
        baseline = focal = 0.0
    if not (0 < baseline < math.inf and 0 < focal < math.inf):
        raise ValueError(
            f"expected numbers above 0 in `extrinsic.baseline` (metres) and `intrinsic.fx` (pixels) of "
            f"{path}, but got {str(camera)[:200]}: unpack camera_trainvaltest.zip again"
        )
    return baseline, focal
