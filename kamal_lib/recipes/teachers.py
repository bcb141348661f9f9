"""The teachers' side (Ye et al., section 4): a common start, one network a task, and what it predicts.

Each is a frozen dataclass whose `train` makes it from its parents and from labelled images.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import kamal_lib.data
import kamal_lib.losses
from kamal_lib import devices, engine, evaluation, metrics, sample, tasks
from kamal_lib.artifacts import Recipe, Result, Work
from kamal_lib.data.transforms import train_transform
from kamal_lib.engine import Schedule, make_fabric, predict
from kamal_lib.metrics import image_states, inherited_errors
from kamal_lib.models import blocks, encoder_decoder, imagenet
from kamal_lib.models.encoder_decoder import VGG16, Architecture, EncoderDecoder, build_network
from kamal_lib.recipes import data
from kamal_lib.recipes.data import Data, batches, fitted, scores, tasks_of
from kamal_lib.tasks import DirectObjective, SoftSegmentation, Task

SOURCES: tuple[ModuleType, ...] = (
    *(kamal_lib.data, kamal_lib.losses, blocks, encoder_decoder, imagenet),
    *(engine, devices, evaluation, metrics, sample, tasks, data, sys.modules[__name__]),
)
"""What a teacher depends on: a change of any of it makes stored teachers out of date."""


@dataclass(frozen=True)
class CommonStart(Recipe):
    """The one initialisation of a run's teachers and, if its recipe says so, of the student.

    `weights` are "random", or "imagenet" for the encoder of VGG16, its mirror at random (Ye et al. take
    ImageNet weights for the decoder as well, and do not say which).
    """

    architecture: Architecture
    seed: int
    weights: str = "random"

    def __post_init__(self):
        if self.weights not in ("random", "imagenet"):
            raise ValueError(f"a start's weights must be 'random' or 'imagenet', got {self.weights!r}")
        if self.weights == "imagenet" and self.architecture != VGG16:
            raise ValueError(
                "ImageNet weights exist for the architecture VGG16 only: take it (profile 'gpu'), or "
                "start from 'random'"
            )

    def sources(self) -> tuple[ModuleType, ...]:
        return SOURCES

    def name(self) -> str:
        return "common-start"

    def train(self, work: Work) -> Result:
        """Draws blocks 1..N, and puts ImageNet's encoder into them if so asked."""
        drawn = build_network(self.architecture, {}, seed=self.seed).blocks.state_dict()
        return Result(drawn | (imagenet.encoder_state() if self.weights == "imagenet" else {}), {}, [])


@dataclass(frozen=True)
class TaskTeacher(Recipe):
    """SegNet, DepthNet or NormNet (Ye et al., section 4): one network, one task, from labelled images.

    `labels` is how many of them, None for the data's labelled part; see `teaching` of the data.
    """

    task: str
    data: Data
    start: CommonStart
    schedule: Schedule
    scale: tuple[float, float] = (1.0, 1.0)
    labels: int | None = None

    def sources(self) -> tuple[ModuleType, ...]:
        return SOURCES

    def name(self) -> str:
        return f"{self.task}-teacher"

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it teaches."""
        return (self.task,)

    @property
    def key(self) -> str:
        """Its name among a student's teachers."""
        return self.task

    def fresh(self, metrics: Mapping | None = None) -> EncoderDecoder:
        """The network before training, its blocks still to be given the common start."""
        channels = tasks_of(self.data)[self.task].channels
        return build_network(self.start.architecture, {self.task: channels}, seed=self.start.seed)

    def build(self, weights: Mapping[str, Tensor], metrics: Mapping) -> EncoderDecoder:
        """The network with the given weights."""
        network = self.fresh()
        network.load_state_dict(dict(weights))
        return network.eval()

    def train(self, work: Work) -> Result:
        """Eq. 1, 3 or 4 against the ground truth, with flips and, where `scale` says so, scaled crops."""
        make_fabric(self.schedule.device, precision=self.schedule.precision)  # no GPU: said first
        network = self.fresh()
        network.blocks.load_state_dict(work.load(self.start).weights())
        objective = DirectObjective(network, tasks_of(self.data))
        augment = train_transform(self.data.size, scale=self.scale, flip=0.5)
        images = self.data.teaching(self.labels)
        history = fitted(
            objective,
            images,
            self.schedule,
            work,
            title=self.name(),
            seed=self.start.seed,
            transform=augment,
        )
        return Result(network.state_dict(), scores(network, self.data, self.schedule), history)


@dataclass(frozen=True)
class Predictions(Recipe):
    """What a teacher says of a part's images, computed once: the only supervision that a student gets.

    With `soft`, a segmentation teacher's probabilities in half precision instead of its class ids.
    """

    teacher: Any  # a TaskTeacher, or a BranchedStudent: a TargetNet is a teacher, too
    part: str
    soft: bool = False

    def sources(self) -> tuple[ModuleType, ...]:
        return SOURCES

    def name(self) -> str:
        return f"{'-'.join(self.teacher.tasks)}-predictions-{self.part}"

    def train(self, work: Work) -> Result:
        """{"labels": N×H×W uint8}, {"depth": N×H×W float32}, {"normals": N×3×H×W float32}, or soft."""
        data, schedule = self.teacher.data, self.teacher.schedule
        artifact, every = work.load(self.teacher), student_tasks(self.teacher.data, soft=self.soft)
        tasks = {name: every[name] for name in self.teacher.tasks}
        seen: dict[str, list[Tensor]] = {task.key: [] for task in tasks.values()}

        def add(predictions: dict[str, Tensor], _: dict[str, Any]) -> None:
            for name, task in tasks.items():
                seen[task.key].append(predictions[name].cpu().to(STORED.get(task.key, torch.float32)))

        predict(
            self.teacher.build(artifact.weights(), artifact.metrics),
            batches(data.part(self.part), schedule),
            tasks,
            fabric=make_fabric(schedule.device),  # in float32: arg max of bfloat16 logits has ties
            each=add,
        )
        return Result({key: torch.cat(values) for key, values in seen.items()}, {}, [])


STORED = {"labels": torch.uint8, "probabilities": torch.float16}


def student_tasks(data: Data, *, soft: bool) -> dict[str, Task]:
    """The tasks as a student is taught them: `tasks_of`, with soft segmentation targets where asked."""
    tasks = tasks_of(data)
    return tasks | {"segmentation": SoftSegmentation(data.classes)} if soft else tasks


@dataclass(frozen=True)
class ImageScores(Recipe):
    """What a network's metrics add up, image by image, over a part: a bootstrap over images needs no more."""

    network: (
        Any  # a recipe with `data` and `schedule` whose `build` gives a network: teacher, student, baseline
    )
    part: str = "test"

    def sources(self) -> tuple[ModuleType, ...]:
        return SOURCES

    def name(self) -> str:
        return f"{self.network.name()}-scores-{self.part}"

    def tasks(self) -> dict[str, Task]:
        """By which the network's responses are decoded."""
        return tasks_of(self.network.data)

    def train(self, work: Work) -> Result:
        """{"task.state of its metric": images × its shape}; see `kamal_lib.metrics.resampled`."""
        data, schedule, artifact = self.network.data, self.network.schedule, work.load(self.network)
        tasks = self.tasks()
        rows: list[dict[str, Tensor]] = []

        def add(predictions: dict[str, Tensor], batch: dict[str, Any]) -> None:
            row: dict[str, Tensor] = {}
            for name, prediction in predictions.items():
                truth = batch[tasks[name].key].cpu()
                states = image_states(tasks[name].metric(), prediction.cpu(), truth)
                row |= {f"{name}.{state}": value for state, value in states.items()}
            rows.append(row)

        predict(
            self.network.build(artifact.weights(), artifact.metrics),
            batches(data.part(self.part), schedule),
            tasks,
            fabric=make_fabric(schedule.device, precision=schedule.precision),  # as in `scores`
            each=add,
        )
        return Result({name: torch.cat([row[name] for row in rows]) for name in rows[0]}, {}, [])


@dataclass(frozen=True)
class Inherited(Recipe):
    """How many of a network's wrong pixels a segmentation teacher gets wrong in the same way.

    The images are those of the network; a teacher that it never learned from gives the share that networks
    have in common anyway.
    """

    network: Any  # as for `ImageScores`
    teacher: TaskTeacher
    part: str = "test"

    def sources(self) -> tuple[ModuleType, ...]:
        return SOURCES

    def name(self) -> str:
        return f"{self.network.name()}-inherited-{self.part}"

    def train(self, work: Work) -> Result:
        """{"inherited", "wrong"}: pixels of each image."""
        schedule, networks = self.network.schedule, []
        for recipe in (self.network, self.teacher):
            artifact = work.load(recipe)
            networks.append(recipe.build(artifact.weights(), artifact.metrics))
        found: list[tuple[Tensor, Tensor]] = []
        fabric = make_fabric(schedule.device, precision=schedule.precision)
        teacher = networks[1].to(fabric.device)

        def add(predictions: dict[str, Tensor], batch: dict[str, Any]) -> None:
            with fabric.autocast():
                theirs = teacher(batch["image"])["segmentation"].argmax(1)
            found.append(inherited_errors(predictions["segmentation"], theirs, batch["labels"]))

        images = batches(self.network.data.part(self.part), schedule)
        predict(networks[0], images, tasks_of(self.network.data), fabric=fabric, each=add)
        inherited, wrong = (torch.cat(each).cpu() for each in zip(*found, strict=True))
        return Result({"inherited": inherited, "wrong": wrong}, {}, [])
