"""What the two data sets of street scenes share: which files there must be, and how a picture is read."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer
from PIL import Image
from torchvision import tv_tensors

from kamal_lib.data.transforms import stream


def found(root: Path) -> str:
    """What a folder holds, for an error message."""
    return str(sorted(path.name for path in root.iterdir())[:8]) if root.is_dir() else "no such folder"


def expect(files: Sequence[Path], advice: str) -> None:
    """Raises FileNotFoundError that names the first of `files` that is missing, and says `advice`."""
    if missing := [path for path in files if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} files are missing, the first is {missing[0]}: {advice}"
        )


def mixed(names: Iterable[str]) -> list[str]:
    """The names in a mixed order, always the same: neighbours in a film look alike, so its start says little.

    The place of a name depends on the name alone: with fewer names, the rest keep their order.
    """
    return sorted(names, key=lambda name: stream(*name.encode()))


def first(names: list[str], count: int | None, split: str) -> list[str]:
    """The first `count`, None: all. Raises ValueError for more than there are, or none."""
    if count is not None and not 0 < count <= len(names):
        raise ValueError(f"expected count from 1 to {len(names)} (all of {split!r}), but got {count}")
    return names[:count]


def image_of(path: Path) -> tv_tensors.Image:
    """RGB in [0, 1], float32 3×H×W. Raises OSError for a damaged file; it names it."""
    pixels = np.ascontiguousarray(_decoded(path, mode="RGB").transpose(2, 0, 1), np.float32)
    return tv_tensors.Image(pixels / 255)


def map_of(path: Path, picture: Path, size: Sequence[int]) -> Integer[np.ndarray, "height width"]:
    """One number a pixel, of the (height, width) `size` that `picture` has.

    Raises OSError for a damaged file, ValueError for several channels or another size; it names the files.
    """
    numbers = _decoded(path)
    if numbers.shape != tuple(size):
        raise ValueError(
            f"expected {path} to be one channel of the size of {picture}, {tuple(size)} (height, width), "
            f"but got {numbers.shape}: the two do not belong together, or one was resized or coloured; "
            "take both from one release"
        )
    return numbers


def labels_of(
    path: Path, picture: Path, size: Sequence[int], classes: Int64[np.ndarray, " ids"], advice: str
) -> tv_tensors.Mask:
    """int64 H×W: `classes[id]` of the ids in the file.

    Raises what `map_of` does, and ValueError for an id that `classes` does not have; it says `advice`.
    """
    ids = map_of(path, picture, size)
    if ids.max() >= len(classes):
        raise ValueError(f"expected ids 0 to {len(classes) - 1} in {path}, but got {ids.max()}: {advice}")
    return tv_tensors.Mask(classes[ids])


def _decoded(path: Path, *, mode: str | None = None) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.array(picture if mode is None else picture.convert(mode))
    except (OSError, SyntaxError) as error:
        raise OSError(
            f"{path} cannot be decoded ({error}): expected a whole PNG; it may be truncated, copy or unpack "
            "it again"
        ) from error
