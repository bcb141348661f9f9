"""CamVid (Brostow et al., 2009): image and labels of street scenes, for teachers and students.

Read from the layout of the SegNet tutorial: 367, 101 and 233 frames at 480×360 with 11 classes.
"""

from pathlib import Path, PurePosixPath

import numpy as np
from torchvision.datasets import VisionDataset

from kamal_lib.data.street_files import expect, first, found, image_of, labels_of, mixed
from kamal_lib.sample import VOID, Sample

# fmt: off
CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian",
    "bicyclist",
)
"""Names of ids 0..10."""
# fmt: on

SPLITS = ("train", "val", "test")

_CLASS_OF_ID = np.array([*range(len(CLASSES)), VOID])


class CamVid(VisionDataset):
    """One split of CamVid as `Sample`s: image and labels; or `image` alone with `annotated=False`.

        train.txt, val.txt, test.txt                a line for each image: /SegNet/CamVid/train/NAME.png
                                                    and /SegNet/CamVid/trainannot/NAME.png
        {train,val,test}/NAME.png                   RGB
        {train,val,test}annot/NAME.png              8-bit ids, 0..10 and 11 (not labelled: void)

    The lists say what belongs to a split: of their paths only folder and name count, and files that they do
    not name are left alone. Any size works, as long as an image and its labels agree. Images come in a mixed
    order, not in that of the film, so that the first `count` come from all of its sequences.
    """

    def __init__(
        self, root: str | Path, split: str, *, annotated: bool = True, count: int | None = None
    ) -> None:
        """List the files; nothing is decoded yet.

        `annotated=False` leaves the labels out: their files are never opened, nor need they exist. `count`
        takes the first of the split. Raises ValueError for an unknown split, a count out of range, or a list
        that is empty or names other files; FileNotFoundError for a missing list, or a missing file of a list.
        """
        super().__init__(str(root))
        if split not in SPLITS:
            raise ValueError(f"expected split to be one of {list(SPLITS)}, but got {split!r}")
        self.split, self.annotated = split, annotated
        place = Path(self.root)
        self._files = {image.stem: (image, labels) for image, labels in _pairs(place, split)}
        expect(
            [path for image, labels in self._files.values() for path in (image, labels)[: 1 + annotated]],
            f"expected every file that {place / f'{split}.txt'} names in {place}; copy them again, or take "
            "list and files from one release",
        )
        self.names = first(mixed(self._files), count, split)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Decode one sample.

        Raises OSError for a damaged file, ValueError for labels of a wrong size or value; each names it.
        """
        picture, labels = self._files[self.names[index]]
        image = image_of(picture)
        sample = Sample(image=image)
        if self.annotated:
            advice = "0 to 10 are the classes, 11 is void; is it a map of CamVid's 32 classes?"
            sample["labels"] = labels_of(labels, picture, image.shape[-2:], _CLASS_OF_ID, advice)
        return sample

    def extra_repr(self) -> str:
        """What `repr` says beside the number of images and the root."""
        return f"Split: {self.split}, {f'{len(CLASSES)} classes' if self.annotated else 'no labels'}"


def _pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """The files of each image of a split and of its labels, as the list has them."""
    path = root / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: expected the CamVid of the SegNet tutorial, {split}.txt beside the folders "
            f"{split} and {split}annot; found in {root}: {found(root)}. Point `root` at the folder that "
            "holds them"
        )
    pairs = []
    # a line that is no text is refused as one that names other files, not as bad encoding
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        words = [PurePosixPath(word) for word in line.split()]
        if [word.parent.name for word in words] == [split, f"{split}annot"]:
            pairs.append((root / split / words[0].name, root / f"{split}annot" / words[1].name))
        elif words:
            raise ValueError(
                f"expected line {number} of {path} to be an image and its labels, as /SegNet/CamVid/{split}/"
                f"NAME.png /SegNet/CamVid/{split}annot/NAME.png, but got {line[:120]!r}: take the official "
                "list"
            )
    if not pairs:
        raise ValueError(f"expected a line for each image in {path}, but it is empty: take the official list")
    return pairs
