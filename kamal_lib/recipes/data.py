"""What a run learns from and is measured on: data sets with their sizes, as part of every recipe's key."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import tv_tensors

from kamal_lib.artifacts import Work, default_store
from kamal_lib.data import camvid, cityscapes, scenes
from kamal_lib.data.loaders import Preloaded, Transform, loader
from kamal_lib.data.nyud import CLASSES_13, NYUDv2
from kamal_lib.data.synthetic import Rooms
from kamal_lib.data.transforms import eval_transform
from kamal_lib.engine import History, Schedule, evaluate, fit, make_fabric, share
from kamal_lib.sample import VOID, Sample
from kamal_lib.sample import Depth as Metres
from kamal_lib.tasks import Depth, Normals, Segmentation, Task


@dataclass(frozen=True)
class RoomsData:
    """Procedural rooms; `world` redraws all of them."""

    labelled: int
    unlabelled: int
    validation: int
    test: int
    size: tuple[int, int]
    world: int = 0
    classes: tuple[str, ...] = scenes.CLASSES

    def part(self, name: str) -> Dataset:
        """The samples of "labelled", "unlabelled", "validation" or "test"."""
        return self.rooms(name, getattr(self, name))

    def labels(self) -> tuple[int, int]:
        """(images in the labelled part, the most that a teacher can be given labels of)."""
        return self.labelled, self.labelled + self.unlabelled

    def teaching(self, labels: int | None) -> Dataset:
        """The first `labels` labelled rooms, and beyond them unlabelled ones with their annotation opened.

        None: the labelled part. Raises ValueError for more than there are.
        """
        count = self.labelled if labels is None else checked(labels, self.labels()[1])
        rooms = self.rooms("labelled", min(count, self.labelled))
        if count <= self.labelled:
            return rooms
        return ConcatDataset([rooms, self.rooms("unlabelled", count - self.labelled, annotated=True)])

    def rooms(self, split: str, count: int, *, annotated: bool | None = None) -> Rooms:
        """The first `count` rooms of a split, from the store or rendered into it."""
        height, width = self.size
        return Rooms(
            split,
            count,
            height=height,
            width=width,
            world=self.world,
            annotated=annotated,
            folder=default_store() / "rooms",
        )


class Photographs:
    """What data that are read from a folder share; all of the labelled images can be taught."""

    size: tuple[int, int]

    def images(self, name: str) -> Dataset:
        """A part in its own size."""
        raise NotImplementedError

    def part(self, name: str) -> Dataset:
        """The samples of "labelled", "unlabelled", "validation" or "test"."""
        return preloaded(self, name)

    def labels(self) -> tuple[int, int]:
        """(images in the labelled part, the most that a teacher can be given labels of): the same."""
        count = len(self.images("labelled"))  # pyright: ignore[reportArgumentType]
        return count, count

    def teaching(self, labels: int | None) -> Dataset:
        """The first `labels` labelled images, None for all. Raises ValueError for more than there are."""
        part = self.part("labelled")
        return part if labels is None else Subset(part, range(checked(labels, self.labels()[1])))


@dataclass(frozen=True)
class NYUv2Data(Photographs):
    """NYUDv2 in the folder convention: three parts of the official training set, and its test set."""

    root: str
    size: tuple[int, int]
    world: int = 0
    classes: tuple[str, ...] = CLASSES_13

    def images(self, name: str) -> Dataset:
        """The part in its own size."""
        return NYUDv2(self.root, name, classes=len(self.classes), world=self.world)

    def labels(self) -> tuple[int, int]:
        """(images in the labelled part, the most that a teacher can be given labels of)."""
        usual, most = (len(NYUDv2(self.root, part, world=self.world)) for part in ("labelled", "all"))
        return usual, most

    def teaching(self, labels: int | None) -> Dataset:
        """The first `labels` images of the labelled part, and beyond them of the unlabelled, labels opened.

        None: the labelled part. Raises ValueError for more than there are.
        """
        if labels is None:
            return self.part("labelled")
        return Subset(self.part("all"), range(checked(labels, self.labels()[1])))


@dataclass(frozen=True)
class CamVidData(Photographs):
    """CamVid in its official division; unlabelled are training images of the Cityscapes in `street_root`."""

    root: str
    size: tuple[int, int]
    street_root: str | None = None
    classes: tuple[str, ...] = camvid.CLASSES

    def images(self, name: str) -> Dataset:
        """The part in its own size. Raises ValueError for "unlabelled" without a Cityscapes."""
        if name != "unlabelled":
            splits = {"labelled": "train", "validation": "val", "test": "test"}
            return camvid.CamVid(self.root, splits[name])
        if self.street_root is None:
            raise ValueError(
                "CamVid has no unlabelled images: name a folder of Cityscapes, `street_root`, whose street "
                "scenes serve, as in the paper"
            )
        return cityscapes.Cityscapes(self.street_root, "train", annotated=False)


@dataclass(frozen=True)
class CityscapesData(Photographs):
    """Cityscapes with depth from disparity.

    Labelled are its training cities but three, validation is these three, and the test is its official
    validation set, since the labels of its own test images are withheld.
    """

    root: str
    size: tuple[int, int]
    classes: tuple[str, ...] = cityscapes.CLASSES_19

    def images(self, name: str) -> Dataset:
        """The part in its own size. Raises ValueError for another part."""
        if name == "test":
            return cityscapes.Cityscapes(self.root, "val", farthest=FARTHEST)
        if name not in ("labelled", "validation"):
            raise ValueError(f"Cityscapes has no part {name!r} here: labelled, validation and test")
        there = set(cityscapes.cities_of(self.root, "train"))
        cities = there - VALIDATION_CITIES if name == "labelled" else there & VALIDATION_CITIES
        return cityscapes.Cityscapes(self.root, "train", cities=cities, farthest=FARTHEST)


VALIDATION_CITIES = {"ulm", "weimar", "zurich"}
"""Training cities of Cityscapes that nothing learns from."""

FARTHEST = 80.0
"""Metres: beyond it the depth of a street scene counts as unknown, as is usual."""

Data = RoomsData | NYUv2Data | CamVidData | CityscapesData

DATA = ("rooms", "nyuv2", "camvid", "cityscapes")
"""What reports and the command line call them; amalgamation takes the first two, parsing all."""


@cache
def preloaded(data: Photographs, name: str) -> Preloaded:
    """A part decoded and resized; kept, since every training of a process would decode it again."""
    return Preloaded(data.images(name), eval_transform(data.size))


def checked(labels: int, there: int) -> int:
    """The number of labelled images wanted. Raises ValueError unless it is in 1..there."""
    if not 1 <= labels <= there:
        raise ValueError(f"labels must be a number of images from 1 to {there}, got {labels}")
    return labels


def in_steps(schedule: Schedule, steps: int, images: int) -> Schedule:
    """The schedule with so many steps on this number of images, in whole epochs: to within half a one."""
    return replace(schedule, epochs=max(1, round(steps / math.ceil(images / schedule.batch_size))))


def tasks_of(data: Data) -> dict[str, Task]:
    """The tasks that the workbook's networks are taught on `data`."""
    return {"segmentation": Segmentation(data.classes), "depth": Depth(), "normals": Normals()}


def batches(
    dataset: Dataset, schedule: Schedule, *, seed: int = 0, shuffle: bool = False, transform=None
) -> DataLoader:
    """`dataset` in batches of the schedule's size; under `torchrun` this process's share of them if shuffled.

    In order (evaluation, predictions) every process goes through the whole set.
    """
    mine = share(schedule) if shuffle else {"batch_size": schedule.batch_size, "num_replicas": 1, "rank": 0}
    return loader(
        dataset,
        batch_size=mine["batch_size"],
        num_replicas=mine["num_replicas"],
        rank=mine["rank"],
        shuffle=shuffle,
        seed=seed,
        transform=transform,
    )


class OneTarget(Dataset[Sample]):
    """The first `count` samples with their image and one target, which is unknown where they have none.

    `key` is "labels" (then `VOID`) or "depth" (then 0). So labelled and unlabelled images fit into one set.
    Raises ValueError for more images than there are.
    """

    def __init__(self, images: Dataset[Sample], key: str, count: int | None = None):
        there = len(images)  # pyright: ignore[reportArgumentType]
        self.images, self.key, self.count = images, key, there if count is None else count
        if not 1 <= self.count <= there:
            raise ValueError(f"the images must be 1 to {there}, as many as there are, got {self.count}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        sample: dict[str, Any] = dict(self.images[index])
        target = sample.get(self.key)
        if target is None:
            size = sample["image"].shape[-2:]
            labels = self.key == "labels"
            target = tv_tensors.Mask(torch.full(size, VOID)) if labels else Metres(torch.zeros(size))
        return cast(Sample, {"image": sample["image"], self.key: target})


def scores(
    network: nn.Module, data: Data, schedule: Schedule, *, tasks: Mapping[str, Task] | None = None
) -> dict[str, dict[str, float]]:
    """{"validation": {...}, "test": {...}}: the metrics of all that the network predicts.

    `tasks` None are those of `tasks_of`.
    """
    fabric = make_fabric(schedule.device, precision=schedule.precision)
    tasks = tasks_of(data) if tasks is None else tasks
    return {
        part: evaluate(network, batches(data.part(part), schedule), tasks, fabric=fabric)
        for part in ("validation", "test")
    }


def fitted(
    objective: nn.Module,
    images: Dataset,
    schedule: Schedule,
    work: Work,
    *,
    title: str,
    seed: int,
    transform: Transform | None = None,
    opponent: tuple[nn.Module, Schedule] | None = None,
) -> History:
    """How every recipe trains: shuffled images, going on from the checkpoint in `work.folder`."""
    return fit(
        objective,
        batches(images, schedule, seed=seed, shuffle=True, transform=transform),
        schedule,
        fabric=make_fabric(schedule.device, precision=schedule.precision),
        opponent=opponent,
        checkpoint=work.folder / "training.safetensors",
        title=title,
        watch=work.watch,
    )
