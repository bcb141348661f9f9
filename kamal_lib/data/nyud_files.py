"""The two layouts in which NYU Depth v2 is found: the official `.mat` file, and folders of pictures.

`Folder` and `MatFile` give the same: `names`, the official 1-based numbers of the training or the test images
as "0001"; `expect(names)`, which raises unless these have an annotation; `image(name)`; and
`annotation(name)`, labels 0 (unlabelled) to 40 (Gupta et al., CVPR 2013) and depth in metres (0 = unknown).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io
from jaxtyping import Float32, Integer, UInt8
from PIL import Image
from scipy.io.matlab import MatReadError

FARTHEST = 10.0
"""Metres; the official toolbox cuts depth here."""

Picture = UInt8[np.ndarray, "height width 3"]
Annotation = tuple[Integer[np.ndarray, "height width"], Float32[np.ndarray, "height width"]]


class Folder:
    """`{image,seg40,depth}/{train,test}/0001.{jpg,png}`, as the public extraction toolkits write it.

    seg40 is 8-bit, 0..40; depth is 16-bit, millimetres. Any size works, usually 640×480 or half of it.
    """

    def __init__(self, root: Path, part: str) -> None:
        """`part` is "train" or "test". Raises FileNotFoundError for another layout or an empty folder."""
        self.root, self.part = root, part
        self._files = {"image": self._listing("image")}
        self.names = list(self._files["image"])

    def expect(self, names: list[str]) -> None:
        """Raises FileNotFoundError for an image without its labels or depth."""
        for kind in ("seg40", "depth"):
            files = self._files[kind] = self._listing(kind)
            if missing := [name for name in names if name not in files]:
                raise FileNotFoundError(
                    f"{self.root / kind / self.part} has no counterpart of {len(missing)} images, the first "
                    f"is {self._files['image'][missing[0]]}: expected {missing[0]}.png, extract it again"
                )

    def image(self, name: str) -> Picture:
        """Raises OSError for a damaged file."""
        return _decode(self._files["image"][name], mode="RGB")

    def annotation(self, name: str) -> Annotation:
        """Raises OSError for a damaged file, ValueError for a wrong type, size or value; each names it."""
        picture, *paths = (self._files[kind][name] for kind in ("image", "seg40", "depth"))
        labels, depth = map(_decode, paths)
        with Image.open(picture) as image:
            size = image.size[::-1]
        for path, array in zip(paths, (labels, depth), strict=True):
            if array.shape != size:
                raise ValueError(
                    f"expected {path} to be one channel of the size of {picture}, {size} (height, width), "
                    f"but got {array.shape}"
                )
        if depth.dtype not in (np.uint16, np.int32):  # Pillow before 11 opens 16-bit PNGs as int32
            raise ValueError(
                f"expected 16-bit millimetres in {paths[1]}, but got {depth.dtype}: the scale is lost in it; "
                "extract the depth again"
            )
        if labels.max() > 40:
            raise ValueError(
                f"expected labels 0 (unlabelled) to 40 in {paths[0]}, but got {labels.max()}: is it a map of "
                "the 894 classes?"
            )
        return labels, _metres(depth.astype(np.float32) / 1000, str(paths[1]))

    def _listing(self, kind: str) -> dict[str, Path]:
        place = self.root / kind / self.part
        files = {path.stem: path for path in sorted(place.glob("[0-9][0-9][0-9][0-9].*"))}
        if not files:
            found = sorted(path.name for path in self.root.iterdir())[:8] if self.root.is_dir() else None
            state = "has no files 0001.jpg or .png" if place.is_dir() else "does not exist"
            raise FileNotFoundError(
                f"{place} {state}. Expected image, seg40 and depth, each with train and test, in "
                f"{self.root}; found there: {found or 'no such folder'}. Point `root` at the folder that "
                "holds them, or at the official .mat file"
            )
        return files


class MatFile:
    """The official `nyu_depth_v2_labeled.mat` (HDF5), with `splits.mat` and `classMapping40.mat` beside it.

    MATLAB stores columns first: `images` N×3×W×H, `depths` N×W×H in metres with the holes filled, `labels`
    N×W×H, 0..894. `splits.mat` is on the data set's page, `classMapping40.mat` in the public code of Gupta et
    al. The file is opened anew for every reading, so that worker processes share no handle.
    """

    def __init__(self, path: Path, part: str) -> None:
        """`part` is "train" or "test".

        Raises FileNotFoundError for a missing file, OSError for a damaged one or one that is not HDF5, and
        ValueError for a missing or misshapen entry, or a split that is not one of these images.
        """
        self.path = path
        shape = self._shapes("images")["images"]
        if len(shape) != 4 or shape[1] != 3:
            raise ValueError(f"expected `images` of {path} to be N×3×width×height, but got {shape}")
        self._map_of_40 = np.zeros(0, np.uint8)
        splits = path.with_name("splits.mat")
        train, test = (_matrix(splits, key) for key in ("trainNdxs", "testNdxs"))
        if sorted([*train, *test]) != list(range(1, shape[0] + 1)):
            raise ValueError(
                f"expected `trainNdxs` and `testNdxs` of {splits} to hold each image of {path}, 1 to "
                f"{shape[0]}, once, but got {len(train)} and {len(test)} numbers, {min(*train, *test)} to "
                f"{max(*train, *test)}, with {len({*train} & {*test})} in both: take files of one release"
            )
        self.names = [f"{number:04d}" for number in sorted(train if part == "train" else test)]

    def expect(self, names: list[str]) -> None:
        """Raises what the constructor does, for `labels`, `depths` and `classMapping40.mat`."""
        shapes = self._shapes("images", "labels", "depths")
        count, _, *size = shapes.pop("images")
        for key, shape in shapes.items():
            if shape != (count, *size):
                raise ValueError(
                    f"expected `{key}` of {self.path} to be {(count, *size)}, as its images, but got {shape}"
                )
        mapping = self.path.with_name("classMapping40.mat")
        classes = _matrix(mapping, "mapClass")
        if len(classes) != 894 or not {*classes} <= {*range(1, 41)}:
            raise ValueError(
                f"expected `mapClass` of {mapping} to hold a class 1..40 for each of 894, but got "
                f"{len(classes)} from {min(classes)} to {max(classes)}: take the official file"
            )
        self._map_of_40 = np.array([0, *classes], np.uint8)

    def image(self, name: str) -> Picture:
        """Raises OSError for a damaged file."""
        return self._read(name, "images")[0].transpose(2, 1, 0)

    def annotation(self, name: str) -> Annotation:
        """Raises OSError for a damaged file, ValueError for an impossible value; it names the image."""
        labels, depth = self._read(name, "labels", "depths")
        if labels.max() > 894:
            raise ValueError(
                f"expected `labels` 0 to 894 of image {name} in {self.path}, but got {labels.max()}"
            )
        metres = _metres(depth.T.astype(np.float32), f"image {name} of {self.path}")
        return self._map_of_40[labels.T], metres

    def _read(self, name: str, *keys: str) -> list[np.ndarray]:
        with self._opened() as file:
            return [_dataset(file, key)[int(name) - 1] for key in keys]

    def _shapes(self, *keys: str) -> dict[str, tuple[int, ...]]:
        with self._opened() as file:
            return {key: _dataset(file, key).shape for key in keys}

    @contextmanager
    def _opened(self) -> Iterator[h5py.File]:
        if not self.path.is_file():
            raise FileNotFoundError(
                f"there is no {self.path}: expected the official nyu_depth_v2_labeled.mat"
            )
        try:
            with h5py.File(self.path, "r") as file:
                yield file
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be read as HDF5 ({error}): expected the official "
                "nyu_depth_v2_labeled.mat; it may be truncated, load it down again"
            ) from error


def _dataset(file: h5py.File, key: str) -> Any:
    if key not in file:
        raise ValueError(f"expected `{key}` in {file.filename}, but found only {sorted(file)}")
    return file[key]


def _matrix(path: Path, key: str) -> list[int]:
    """The numbers of one matrix in a `.mat` file of the older kind."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: load it down, and put it beside the images' .mat file")
    try:
        content = scipy.io.loadmat(path)
    except (OSError, ValueError, NotImplementedError, MatReadError) as error:
        raise OSError(f"{path} cannot be read ({error}): expected MATLAB 5; load it down again") from error
    if key not in content or not content[key].size:
        raise ValueError(f"expected numbers in `{key}` of {path}, but found only {sorted(content)}")
    return content[key].ravel().tolist()


def _decode(path: Path, *, mode: str | None = None) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.array(picture if mode is None else picture.convert(mode))
    except (OSError, SyntaxError) as error:
        raise OSError(f"{path} cannot be decoded ({error}): it may be truncated; extract it again") from error


def _metres(depth: Float32[np.ndarray, "height width"], place: str) -> Float32[np.ndarray, "height width"]:
    wrong = depth[~((depth >= 0) & (depth <= FARTHEST))]
    if wrong.size:
        raise ValueError(
            f"expected depth from 0 (unknown) to {FARTHEST:g} m in {place}, but got {wrong.size} of "
            f"{depth.size} values such as {wrong[0]:g} m: the depth is damaged, or in another unit"
        )
    return depth
