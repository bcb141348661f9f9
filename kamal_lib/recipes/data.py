"""What a run learns from and is measured on: data sets with their sizes, as part of every recipe's key."""

from dataclasses import dataclass
from functools import cache

from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from kamal_lib.artifacts import Work, default_store
from kamal_lib.data import scenes
from kamal_lib.data.loaders import Preloaded, Transform, loader
from kamal_lib.data.nyud import CLASSES_13, NYUDv2
from kamal_lib.data.synthetic import Rooms
from kamal_lib.data.transforms import eval_transform
from kamal_lib.engine import History, Schedule, evaluate, fit, make_fabric, share
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


@dataclass(frozen=True)
class NYUv2Data:
    """NYUDv2 in the folder convention: three parts of the official training set, and its test set."""

    root: str
    size: tuple[int, int]
    world: int = 0
    classes: tuple[str, ...] = CLASSES_13

    def part(self, name: str) -> Dataset:
        """The samples of "labelled", "unlabelled", "validation" or "test"."""
        return preloaded(self, name)

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


Data = RoomsData | NYUv2Data


@cache
def preloaded(data: NYUv2Data, name: str) -> Preloaded:
    """A part decoded and resized; kept, since every training of a process would decode it again."""
    images = NYUDv2(data.root, name, classes=len(data.classes), world=data.world)
    return Preloaded(images, eval_transform(data.size))


def checked(labels: int, there: int) -> int:
    """The number of labelled images wanted. Raises ValueError unless it is in 1..there."""
    if not 1 <= labels <= there:
        raise ValueError(f"labels must be a number of images from 1 to {there}, got {labels}")
    return labels


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


def scores(network: nn.Module, data: Data, schedule: Schedule) -> dict[str, dict[str, float]]:
    """{"validation": {...}, "test": {...}}: the metrics of all that the network predicts."""
    fabric = make_fabric(schedule.device, precision=schedule.precision)
    return {
        part: evaluate(network, batches(data.part(part), schedule), tasks_of(data), fabric=fabric)
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
) -> History:
    """How every recipe trains: shuffled images, going on from the checkpoint in `work.folder`."""
    return fit(
        objective,
        batches(images, schedule, seed=seed, shuffle=True, transform=transform),
        schedule,
        fabric=make_fabric(schedule.device, precision=schedule.precision),
        checkpoint=work.folder / "training.safetensors",
        title=title,
        watch=work.watch,
    )
