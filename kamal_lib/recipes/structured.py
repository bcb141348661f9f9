"""Structured distillation (Liu et al.): a large segmenter that learned from labels, and a small one.

Importing this takes two seconds (segmentation_models_pytorch); `kamal_lib.recipes` itself does without.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from kamal_lib.artifacts import Artifact, Recipe, Result, Work
from kamal_lib.data.transforms import train_transform
from kamal_lib.distill import structured
from kamal_lib.distill.structured import CriticObjective, StudentObjective
from kamal_lib.engine import Schedule, make_fabric
from kamal_lib.losses.adversarial import hinge_loss, wasserstein_loss
from kamal_lib.losses.features import Mimic, attention_loss
from kamal_lib.losses.structured import pair_wise_loss
from kamal_lib.models import critic as critic_module
from kamal_lib.models import espnet, segmenters
from kamal_lib.models.critic import Critic
from kamal_lib.models.segmenters import Segmenter, SegmenterArchitecture, build_segmenter
from kamal_lib.recipes import teachers
from kamal_lib.recipes.data import (
    FARTHEST,
    CityscapesData,
    Data,
    OneTarget,
    RoomsData,
    fitted,
    in_steps,
    scores,
)
from kamal_lib.recipes.teachers import ImageScores
from kamal_lib.tasks import DirectObjective, LogDepth, Segmentation, Task

SOURCES: tuple[ModuleType, ...] = (
    *(*teachers.SOURCES, structured, segmenters, espnet, critic_module),
    sys.modules[__name__],
)
"""What the networks of this chapter depend on."""


def structured_tasks(data: Data) -> dict[str, Task]:
    """The tasks of this paper: parsing, and depth as a choice among log-spaced bins, to 80 m in streets."""
    depth = LogDepth(nearest=2.0, farthest=FARTHEST) if isinstance(data, CityscapesData) else LogDepth()
    return {"segmentation": Segmentation(data.classes), "depth": depth}


@dataclass(frozen=True)
class SegmenterTeacher(Recipe):
    """A segmenter that learns one task from labelled images: the teacher, or a start for the student.

    `weights` are "random", or "imagenet" for its encoder. Raises ValueError for another task.
    """

    task: str
    data: Data
    architecture: SegmenterArchitecture
    schedule: Schedule
    seed: int
    weights: str = "random"

    def __post_init__(self):
        if self.task not in (there := structured_tasks(self.data)):
            raise ValueError(f"task must be one of {', '.join(there)}, got {self.task!r}")

    def sources(self) -> tuple[ModuleType, ...]:
        return SOURCES

    def name(self) -> str:
        return f"{self.task}-segmenter"

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it teaches."""
        return (self.task,)

    def fresh(self) -> Segmenter:
        """The network before training."""
        channels = structured_tasks(self.data)[self.task].channels
        return build_segmenter(self.architecture, {self.task: channels}, seed=self.seed, weights=self.weights)

    def build(self, weights: Mapping[str, Tensor], metrics: Mapping) -> Segmenter:
        """The network with the given weights, in eval mode."""
        return built(replace(self, weights="random").fresh(), weights)

    def train(self, work: Work) -> Result:
        """The task's loss on the labelled images, flipped at random."""
        make_fabric(self.schedule.device, precision=self.schedule.precision)  # no GPU: said first
        network, tasks = self.fresh(), structured_tasks(self.data)
        history = fitted(
            DirectObjective(network, tasks),
            self.data.part("labelled"),
            self.schedule,
            work,
            title=self.name(),
            seed=self.seed,
            transform=train_transform(self.data.size, flip=0.5),
        )
        found = scores(network, self.data, self.schedule, tasks=tasks)
        return Result(network.state_dict(), found, history)


def built(network: Segmenter, weights: Mapping[str, Tensor]) -> Segmenter:
    """The network with the given weights, in eval mode."""
    network.load_state_dict(dict(weights))
    return network.eval()


@dataclass(frozen=True)
class Graph:
    """One affinity graph of Eq. 2: granularity β and range α, on the last features or on twice finer ones."""

    patch: int = 2
    radius: int | None = None
    finer: bool = False


@dataclass(frozen=True)
class CriticPlan:
    """The critic of holistic distillation, AnLm with `attentions` n and `blocks` m + 1, and how it learns.

    The paper's code takes Adam at 4e-4. `width` 16 fits images of about 48×64; the paper's have 64.
    """

    attentions: int = 2
    blocks: int = 5
    width: int = 16
    norm: bool = True
    learning_rate: float = 4e-4
    loss: str = "wasserstein"
    penalty: float = 10.0

    def __post_init__(self):
        if self.loss not in ("wasserstein", "hinge"):
            raise ValueError(f"a critic's loss must be 'wasserstein' or 'hinge', got {self.loss!r}")

    def fresh(self, task: Task, seed: int) -> Critic:
        """The critic before training: of class probabilities, or of a map of one channel."""
        channels = task.channels if isinstance(task, Segmentation) else 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Critic(
                channels,
                blocks=self.blocks,
                attentions=self.attentions,
                width=self.width,
                norm=self.norm,
            )


@dataclass(frozen=True)
class StructuredStudent(Recipe):
    """Eq. 4: a small segmenter beside a frozen teacher, with or without labels.

    weights     λ of the terms that take part, ((name, λ), …), among "pixel", "pair", "holistic", and the
                losses that the paper compares: "mimic", "attention", "attention, public form"; none: labels
                alone. "pair" stands for all `graphs`, which share its λ equally
    labelled    whether the labelled images, and their labels, are used
    unlabelled  how many unlabelled images it learns from, too, by distillation only
    schedule    its epochs are those of the labelled images; with others the steps stay as many, to within
                half an epoch
    start       "random", "imagenet", or a recipe of the same architecture whose body it starts with

    Raises ValueError for words, names and combinations that mean nothing.
    """

    teacher: SegmenterTeacher
    architecture: SegmenterArchitecture
    schedule: Schedule
    seed: int
    weights: tuple[tuple[str, float], ...] = ()
    labelled: bool = True
    unlabelled: int = 0
    graphs: tuple[Graph, ...] = (Graph(),)
    critic: CriticPlan = CriticPlan()
    start: Any = "random"  # or a SegmenterTeacher

    def __post_init__(self):
        terms = [name for name, _ in self.weights]
        if len(set(terms)) < len(terms) or not set(terms) <= set(TERMS):
            raise ValueError(f"the terms must be different ones of {', '.join(TERMS)}, got {terms}")
        if not (terms or (self.labelled and not self.unlabelled)):
            raise ValueError("without a term there is nothing to learn from unlabelled images: give weights")
        if not (self.labelled or self.unlabelled):
            raise ValueError("no images: set `labelled`, or a number of unlabelled ones")
        most = self.data.unlabelled if isinstance(self.data, RoomsData) else math.inf
        if not 0 <= self.unlabelled <= most:
            raise ValueError(
                f"unlabelled must be 0 to {most} images, as many as there are, got {self.unlabelled}"
            )
        if "pair" in terms and not self.graphs:
            raise ValueError("pair-wise distillation needs a graph: give one, or leave 'pair' out")
        words = ("random", "imagenet")
        if isinstance(self.start, SegmenterTeacher):
            if self.start.architecture != self.architecture:
                raise ValueError(f"the start is of another architecture: {self.start.architecture}")
        elif self.start not in words:
            raise ValueError(f"start must be one of {words} or a SegmenterTeacher, got {self.start!r}")

    def sources(self) -> tuple[ModuleType, ...]:
        return SOURCES

    def name(self) -> str:
        return "-".join((self.teacher.task, "student", *(name.split(",")[0] for name, _ in self.weights)))

    @property
    def data(self) -> Data:
        """What it learns from and is measured on."""
        return self.teacher.data

    @property
    def tasks(self) -> tuple[str, ...]:
        """Its teacher's."""
        return self.teacher.tasks

    @property
    def task(self) -> Task:
        """What it learns."""
        return structured_tasks(self.data)[self.teacher.task]

    def fresh(self, weights: str = "random") -> Segmenter:
        """The network before training, but for a start from another recipe."""
        heads = {self.teacher.task: self.task.channels}
        return build_segmenter(self.architecture, heads, seed=self.seed, weights=weights)

    def build(self, weights: Mapping[str, Tensor], metrics: Mapping) -> Segmenter:
        """The student with the given weights, in eval mode; the critic's among them are left aside."""
        return built(self.fresh(), part_of(weights, "student"))

    def critic_of(self, artifact: Artifact) -> Critic:
        """The critic that was trained with the student, in eval mode.

        Raises ValueError for a student that had none.
        """
        if not (weights := part_of(artifact.weights(), "critic")):
            raise ValueError(f"{self.name()} had no critic: its terms are {dict(self.weights)}")
        critic = self.critic.fresh(self.task, self.seed)
        critic.load_state_dict(weights)
        return critic.eval()

    def images(self) -> Dataset:
        """What it learns from: labelled images, and unlabelled ones, whose every pixel is unknown."""
        parts = [OneTarget(self.data.part("labelled"), self.task.key)] if self.labelled else []
        if self.unlabelled:
            parts.append(OneTarget(self.data.part("unlabelled"), self.task.key, self.unlabelled))
        return ConcatDataset(parts)

    def train(self, work: Work) -> Result:
        """Student, and critic where there is one, step by step in turn; both are kept."""
        make_fabric(self.schedule.device, precision=self.schedule.precision)  # no GPU: said first
        found = work.load(self.teacher)
        teacher = self.teacher.build(found.weights(), found.metrics)
        student = self.fresh(self.start if isinstance(self.start, str) else "random")
        if isinstance(self.start, SegmenterTeacher):
            student.body.load_state_dict(part_of(work.load(self.start).weights(), "body"))
        critic = None
        if "holistic" in dict(self.weights):
            critic = self.critic.fresh(self.task, self.seed)
        images = self.images()
        schedule = same_steps(self.schedule, len(self.data.part("labelled")), len(images))  # pyright: ignore
        history = fitted(
            self.objective(student, teacher, critic),
            images,
            schedule,
            work,
            title=self.name(),
            seed=self.seed,
            transform=train_transform(self.data.size, flip=0.5),
            opponent=None if critic is None else self.opponent(critic, student, teacher, schedule),
        )
        found = {"epochs": schedule.epochs}
        found |= scores(student, self.data, schedule, tasks={self.teacher.task: self.task})
        players = nn.ModuleDict({"student": student} | ({} if critic is None else {"critic": critic}))
        return Result(players.state_dict(), found, history)

    def objective(self, student: Segmenter, teacher: Segmenter, critic: Critic | None) -> nn.Module:
        """The student's: Eq. 4, or the task's loss alone."""
        if not self.weights:
            return DirectObjective(student, {self.teacher.task: self.task})
        weights, features, finer = dict(self.weights), {}, {}
        if "pair" in weights:
            shared = weights.pop("pair") / len(self.graphs)
            for n, graph in enumerate(self.graphs):
                name = f"pair {n + 1}" if n else "pair"
                loss = partial(pair_wise_loss, patch=graph.patch, radius=graph.radius)
                (finer if graph.finer else features)[name], weights[name] = loss, shared
        if "mimic" in weights:
            widths = (self.architecture.channels, self.teacher.architecture.channels)
            features["mimic"] = Mimic(*widths, seed=self.seed)
        for name, form in (("attention", "paper"), ("attention, public form", "public")):
            if name in weights:
                features[name] = partial(attention_loss, form=form)
        return StudentObjective(
            student,
            teacher,
            self.task,
            critic=critic,
            weights=weights,
            labels=self.labelled and ("some" if self.unlabelled else True),
            features=features,
            finer=finer,
        )

    def opponent(
        self, critic: Critic, student: Segmenter, teacher: Segmenter, schedule: Schedule
    ) -> tuple[nn.Module, Schedule]:
        """The critic's objective and schedule."""
        objective = CriticObjective(
            critic,
            student,
            teacher,
            self.task,
            seed=self.seed,
            loss=hinge_loss if self.critic.loss == "hinge" else wasserstein_loss,
            penalty=self.critic.penalty,
        )
        return objective, replace(schedule, learning_rate=self.critic.learning_rate, weight_decay=0.0)


TERMS = ("pixel", "pair", "holistic", "mimic", "attention", "attention, public form")
"""What a student may learn from beside labels."""


def part_of(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of one submodule."""
    return {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}


def same_steps(schedule: Schedule, usual: int, images: int) -> Schedule:
    """The schedule with as many steps on `images` images as on `usual` ones, to within half an epoch."""
    steps = schedule.epochs * math.ceil(usual / schedule.batch_size)
    return in_steps(schedule, steps, images)


@dataclass(frozen=True)
class SegmenterScores(ImageScores):
    """`ImageScores` of a network of this chapter, whose depth is decoded from log-spaced bins."""

    def sources(self) -> tuple[ModuleType, ...]:
        return SOURCES

    def tasks(self) -> dict[str, Task]:
        return structured_tasks(self.network.data)
