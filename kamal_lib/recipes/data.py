"""What a run learns from and is measured on: data sets with their sizes, as part of every recipe's key."""

from dataclasses import dataclass

from torch import nn
from torch.utils.data import DataLoader, Dataset

from kamal_lib.artifacts import default_store
from kamal_lib.data import scenes
from kamal_lib.data.loaders import Preloaded, loader
from kamal_lib.data.nyud import CLASSES_13, NYUDv2
from kamal_lib.data.synthetic import Rooms
from kamal_lib.data.transforms import eval_transform
from kamal_lib.engine import Schedule, evaluate, make_fabric
from kamal_lib.tasks import Depth, Segmentation, Task


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
        height, width = self.size
        folder = default_store() / "rooms"
        return Rooms(name, getattr(self, name), height=height, width=width, world=self.world, folder=folder)


@dataclass(frozen=True)
class NYUv2Data:
    """NYUDv2 in the folder convention: three parts of the official training set, and its test set."""

    root: str
    size: tuple[int, int]
    world: int = 0
    classes: tuple[str, ...] = CLASSES_13

    def part(self, name: str) -> Dataset:
        """The samples of "labelled", "unlabelled", "validation" or "test"."""
        images = NYUDv2(self.root, name, classes=len(self.classes), world=self.world)
        return Preloaded(images, eval_transform(self.size))


Data = RoomsData | NYUv2Data


def tasks_of(data: Data) -> dict[str, Task]:
    """The tasks that the workbook's networks are taught on `data`."""
    return {"segmentation": Segmentation(data.classes), "depth": Depth()}


def batches(
    dataset: Dataset, schedule: Schedule, *, seed: int = 0, shuffle: bool = False, transform=None
) -> DataLoader:
    """`dataset` in batches of the schedule's size."""
    return loader(dataset, batch_size=schedule.batch_size, shuffle=shuffle, seed=seed, transform=transform)


def scores(network: nn.Module, data: Data, schedule: Schedule) -> dict[str, dict[str, float]]:
    """{"validation": {...}, "test": {...}}: the metrics of all that the network predicts."""
    fabric = make_fabric(schedule.device, precision=schedule.precision)
    return {
        part: evaluate(network, batches(data.part(part), schedule), tasks_of(data), fabric=fabric)
        for part in ("validation", "test")
    }
