"""What a student without blocks would do: the same networks, images and steps, taught end to end.

Each starts where the student starts (its body, the teachers' branches), so that only the targets, the images
or the way differ.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor
from torch.utils.data import Dataset

from kamal_lib.artifacts import Recipe, Result, Work
from kamal_lib.data.transforms import train_transform
from kamal_lib.engine import Schedule
from kamal_lib.models.target_net import Network, TargetNet, branch_out
from kamal_lib.recipes import amalgamation
from kamal_lib.recipes.amalgamation import Amalgamation, BranchedStudent
from kamal_lib.recipes.data import Data, fitted, in_steps, scores, tasks_of
from kamal_lib.recipes.teachers import TaskTeacher
from kamal_lib.tasks import DirectObjective

SOURCES: tuple[ModuleType, ...] = (*amalgamation.SOURCES, sys.modules[__name__])
"""What a baseline depends on."""

TARGETS = ("teachers", "labels", "all labels")


def equal_steps(plan: Amalgamation, fine_tuning: Schedule, images: int) -> Schedule:
    """The schedule with as many steps on `images` images as the student takes, to within one epoch.

    The student's steps are those of all its blocks and of its fine-tuning.
    """
    unlabelled = len(plan.data.part("unlabelled"))  # pyright: ignore[reportArgumentType]
    trained = plan.teachers[0].start.architecture.blocks - plan.first_block + 1
    steps = trained * plan.blocks.epochs * math.ceil(unlabelled / plan.blocks.batch_size)
    steps += fine_tuning.epochs * math.ceil(unlabelled / fine_tuning.batch_size)
    return in_steps(fine_tuning, steps, images)


@dataclass(frozen=True)
class MultiHead(Recipe):
    """The student's network, taught whole: plain multi-head training, branched where the student branched.

    `targets` are "teachers" (their predictions of the unlabelled images: plain distillation), "labels" (of
    the few labelled images) or "all labels" (those of the unlabelled images opened, too: an upper bound).
    Labelled images are flipped at random, as for the teachers; unlabelled ones are not, as for the student.
    """

    student: BranchedStudent
    targets: str = "teachers"

    def __post_init__(self):
        if self.targets not in TARGETS:
            raise ValueError(f"targets must be one of {', '.join(TARGETS)}, got {self.targets!r}")

    def sources(self) -> tuple[ModuleType, ...]:
        return SOURCES

    def name(self) -> str:
        return f"multi-head-{self.targets.replace(' ', '-')}"

    @property
    def data(self) -> Data:
        """What it learns from and is measured on."""
        return self.student.data

    @property
    def schedule(self) -> Schedule:
        """Precision, device and batch size are those of the student's fine-tuning."""
        return self.student.fine_tuning

    def parents(self) -> tuple[Recipe, ...]:
        plan = self.student.amalgamation
        return (*plan.teachers, plan.teachers[0].start, *plan.predictions())

    def build(self, weights: Mapping[str, Tensor], metrics: Mapping) -> TargetNet:
        """The network with the given weights."""
        return self.student.build(weights, metrics)

    def train(self, work: Work) -> Result:
        """All of the network at once against its targets."""
        plan = self.student.amalgamation
        branched = {key: work.load(self.student).metrics[key] for key in ("branch_points", "teachers")}
        network = branch_out(*plan.started(work), plan.networks(work), branched["branch_points"])
        images: Dataset
        if self.targets == "teachers":
            images, tasks, augment = plan.taught("unlabelled", work), plan.tasks(), None
        else:
            most = None if self.targets == "labels" else plan.data.labels()[1]
            images, tasks = plan.data.teaching(most), tasks_of(plan.data)
            augment = train_transform(plan.data.size, flip=0.5)
        schedule = equal_steps(plan, self.student.fine_tuning, len(images))  # pyright: ignore[reportArgumentType]
        objective = DirectObjective(network, tasks, dict(plan.weights))
        history = fitted(
            objective, images, schedule, work, title=self.name(), seed=plan.seed, transform=augment
        )
        found = {**branched, "epochs": schedule.epochs, **scores(network, plan.data, schedule)}
        return Result(network.state_dict(), found, history)


@dataclass(frozen=True)
class SelfDistilled(Recipe):
    """A teacher's own network, taught by its predictions of the unlabelled images: self-training of one task.

    Without it "the student beats its teachers" may be nothing but self-training. It starts as a copy of its
    teacher and takes as many steps as the student.
    """

    amalgamation: Amalgamation
    fine_tuning: Schedule
    task: str

    def __post_init__(self):
        if self.task not in (there := [t.key for t in self.amalgamation.teachers]):
            raise ValueError(f"task must be one of the teachers', {', '.join(there)}, got {self.task!r}")

    def sources(self) -> tuple[ModuleType, ...]:
        return SOURCES

    def name(self) -> str:
        return f"self-distilled-{self.task}"

    @property
    def teacher(self) -> TaskTeacher | BranchedStudent:
        """Of the task."""
        return next(t for t in self.amalgamation.teachers if t.key == self.task)

    @property
    def data(self) -> Data:
        """What it learns from and is measured on."""
        return self.amalgamation.data

    @property
    def schedule(self) -> Schedule:
        """Precision, device and batch size are those of the student's fine-tuning."""
        return self.fine_tuning

    def parents(self) -> tuple[Recipe, ...]:
        return (*self.amalgamation.teachers, *self.amalgamation.predictions())

    def build(self, weights: Mapping[str, Tensor], metrics: Mapping) -> Network:
        """The network with the given weights."""
        return self.teacher.build(weights, metrics)

    def train(self, work: Work) -> Result:
        """The whole network against its teacher's predictions."""
        plan = self.amalgamation
        network = plan.networks(work)[self.task]
        images = plan.taught("unlabelled", work)
        schedule = equal_steps(plan, self.fine_tuning, len(images))  # pyright: ignore[reportArgumentType]
        objective = DirectObjective(network, plan.tasks())
        history = fitted(objective, images, schedule, work, title=self.name(), seed=plan.seed)
        found = {"epochs": schedule.epochs, **scores(network, plan.data, schedule)}
        return Result(network.state_dict(), found, history)
