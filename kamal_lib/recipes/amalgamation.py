"""The stages of knowledge amalgamation (Ye et al., section 5.1), each trained once and kept in the store.

A common start, the teachers, their stored predictions, the student's blocks 1..N, and the TargetNet: each
is a frozen dataclass whose `train` makes it from its parents, and whose `build` turns stored weights into a
network.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import kamal_lib.data
import kamal_lib.losses
import kamal_lib.models
from kamal_lib import engine, metrics, sample, tasks
from kamal_lib.artifacts import Recipe, Result, Work
from kamal_lib.data.targets import WithTargets
from kamal_lib.data.transforms import train_transform
from kamal_lib.distill import amalgamation
from kamal_lib.distill.amalgamation import BlockObjective, branch_points
from kamal_lib.engine import Schedule, fit, make_fabric, mean_losses, predict
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.encoder_decoder import Architecture, EncoderDecoder, build_network
from kamal_lib.models.target_net import TargetNet, branch_out
from kamal_lib.recipes import data
from kamal_lib.recipes.data import Data, batches, scores, tasks_of
from kamal_lib.tasks import DirectObjective

TRAINING: tuple[ModuleType, ...] = (
    *(kamal_lib.data, kamal_lib.losses, kamal_lib.models, engine, metrics, sample, tasks, amalgamation, data),
    sys.modules[__name__],
)
"""What every stage's result depends on: a change of any of it makes stored results out of date."""


@dataclass(frozen=True)
class CommonStart(Recipe):
    """The one initialisation of a run's teachers and, if its recipe says so, of the student."""

    architecture: Architecture
    seed: int

    def sources(self) -> tuple[ModuleType, ...]:
        return TRAINING

    def name(self) -> str:
        return "common-start"

    def train(self, work: Work) -> Result:
        """Draws blocks 1..N."""
        return Result(build_network(self.architecture, {}, seed=self.seed).blocks.state_dict(), {}, [])


@dataclass(frozen=True)
class TaskTeacher(Recipe):
    """SegNet or DepthNet (Ye et al., section 4): one network, one task, from the labelled images."""

    task: str
    data: Data
    start: CommonStart
    schedule: Schedule
    scale: tuple[float, float] = (1.0, 1.0)

    def sources(self) -> tuple[ModuleType, ...]:
        return TRAINING

    def name(self) -> str:
        return f"{self.task}-teacher"

    def fresh(self) -> EncoderDecoder:
        """The network before training, its blocks still to be given the common start."""
        channels = tasks_of(self.data)[self.task].channels
        return build_network(self.start.architecture, {self.task: channels}, seed=self.start.seed)

    def build(self, weights: Mapping[str, Tensor], metrics: Mapping) -> EncoderDecoder:
        """The network with the given weights."""
        network = self.fresh()
        network.load_state_dict(dict(weights))
        return network.eval()

    def train(self, work: Work) -> Result:
        """Eq. 1 or Eq. 3 against the ground truth, with flips and, where `scale` says so, scaled crops."""
        fabric = make_fabric(self.schedule.device, precision=self.schedule.precision)  # no GPU: said first
        network = self.fresh()
        network.blocks.load_state_dict(work.load(self.start).weights())
        objective = DirectObjective(network, tasks_of(self.data))
        augment = train_transform(self.data.size, scale=self.scale, flip=0.5)
        history = fit(
            objective,
            batches(
                self.data.part("labelled"),
                self.schedule,
                seed=self.start.seed,
                shuffle=True,
                transform=augment,
            ),
            self.schedule,
            fabric=fabric,
            checkpoint=work.folder / "training.safetensors",
            title=self.name(),
        )
        return Result(network.state_dict(), scores(network, self.data, self.schedule), history)


@dataclass(frozen=True)
class Predictions(Recipe):
    """What a teacher says of a part's images, computed once: the only supervision that a student gets."""

    teacher: TaskTeacher
    part: str

    def sources(self) -> tuple[ModuleType, ...]:
        return TRAINING

    def name(self) -> str:
        return f"{self.teacher.task}-predictions-{self.part}"

    def train(self, work: Work) -> Result:
        """{"labels": N×H×W uint8} or {"depth": N×H×W float32}."""
        data, schedule = self.teacher.data, self.teacher.schedule
        artifact = work.load(self.teacher)
        seen: list[Tensor] = []
        predict(
            self.teacher.build(artifact.weights(), artifact.metrics),
            batches(data.part(self.part), schedule),
            tasks := tasks_of(data),
            fabric=make_fabric(schedule.device),  # in float32: arg max of bfloat16 logits has ties
            each=lambda predictions, _: seen.append(predictions[self.teacher.task].cpu()),
        )
        key, found = tasks[self.teacher.task].key, torch.cat(seen)
        return Result({key: found.to(torch.uint8) if key == "labels" else found}, {}, [])


@dataclass(frozen=True)
class Amalgamation:
    """What all stages of one student share. `start` is "common" or the task of the teacher to start from.

    The paper starts from ImageNet weights; starting from the segmentation teacher is the workbook's default.
    With `train_prefix`, Eq. 7 reads losses and codings of earlier blocks that have since moved on.

    `weights` are the λ_t of Eq. 6, one (task, λ) pair a task, fixed for all blocks.
    """

    teachers: tuple[TaskTeacher, ...]
    weights: tuple[tuple[str, float], ...]
    blocks: Schedule
    fine_tuning: Schedule
    start: str = "segmentation"
    gain: float = 1.0
    train_prefix: bool = False
    seed: int = 0

    def __post_init__(self):
        named = dict(self.weights)
        if set(named) != {t.task for t in self.teachers} or min(named.values(), default=0) <= 0:
            raise ValueError(
                f"weights must give each task of the teachers, {[t.task for t in self.teachers]}, one λ > 0, "
                f"got {self.weights}"
            )

    @property
    def data(self) -> Data:
        """The data of the teachers, whose unlabelled part the student learns from."""
        return self.teachers[0].data

    def fresh(self) -> tuple[EncoderDecoder, dict[str, list[ChannelCoding]]]:
        """A student without head and, for each task, one coding a block."""
        student = build_network(self.teachers[0].start.architecture, {}, seed=self.teachers[0].start.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            codings = {
                t.task: [ChannelCoding(c, gain=self.gain) for c in student.channels] for t in self.teachers
            }
        return student, codings

    def taught(self, part: str, work: Work) -> Dataset:
        """The part's images with all teachers' predictions as targets."""
        targets = {k: v for t in self.teachers for k, v in work.load(Predictions(t, part)).weights().items()}
        return WithTargets(self.data.part(part), targets)

    def networks(self, work: Work) -> dict[str, EncoderDecoder]:
        """{task: teacher}."""
        return {t.task: t.build((a := work.load(t)).weights(), a.metrics) for t in self.teachers}

    def predictions(self) -> tuple[Predictions, ...]:
        """The stored predictions that the student learns from and is measured on."""
        return tuple(Predictions(t, part) for t in self.teachers for part in ("unlabelled", "validation"))


def together(student: EncoderDecoder, codings: Mapping[str, list[ChannelCoding]]) -> nn.ModuleDict:
    """Student and codings as the one module whose state a block's artefact holds."""
    return nn.ModuleDict({"student": student} | {t: nn.ModuleList(c) for t, c in codings.items()})


@dataclass(frozen=True)
class StudentBlock(Recipe):
    """Block n of the student and its codings, trained by Eq. 6 on top of blocks 1..n−1 (section 5.1, Step 2).

    The artefact holds the student and the codings up to here, and the held-out losses of blocks 1..n.
    """

    n: int
    amalgamation: Amalgamation

    def sources(self) -> tuple[ModuleType, ...]:
        return TRAINING

    def name(self) -> str:
        return f"student-block-{self.n:02d}"

    def parents(self) -> tuple[Recipe, ...]:
        before = (replace(self, n=self.n - 1),) if self.n > 1 else ()
        common = (self.amalgamation.teachers[0].start,)
        return (*before, *common, *self.amalgamation.predictions())

    def build(
        self, weights: Mapping[str, Tensor], metrics: Mapping
    ) -> tuple[EncoderDecoder, dict[str, list[ChannelCoding]]]:
        """(student, {task: codings}) with the given weights."""
        student, codings = self.amalgamation.fresh()
        both = together(student, codings)
        both.load_state_dict(dict(weights))
        both.eval()
        return student, codings

    def train(self, work: Work) -> Result:
        """Eq. 6 on unlabelled images; then the losses on held-out ones, still without a label."""
        plan = self.amalgamation
        teachers, losses = plan.networks(work), {t.task: [] for t in plan.teachers}
        if self.n > 1:
            before = work.load(replace(self, n=self.n - 1))
            student, codings = self.build(before.weights(), before.metrics)
            losses = before.metrics["losses"]
        else:
            student, codings = plan.fresh()
            common = plan.start == "common"
            student.blocks.load_state_dict(
                work.load(plan.teachers[0].start).weights()
                if common
                else teachers[plan.start].blocks.state_dict()
            )
        objective = BlockObjective(
            student,
            teachers,
            {task: coding[self.n - 1] for task, coding in codings.items()},
            self.n,
            tasks=tasks_of(plan.data),
            weights=dict(plan.weights),
            train_prefix=plan.train_prefix,
        )
        fabric = make_fabric(plan.blocks.device, precision=plan.blocks.precision)
        history = fit(
            objective,
            batches(plan.taught("unlabelled", work), plan.blocks, seed=plan.seed, shuffle=True),
            plan.blocks,
            fabric=fabric,
            checkpoint=work.folder / "training.safetensors",
            title=self.name(),
        )
        held_out = mean_losses(
            objective, batches(plan.taught("validation", work), plan.blocks), fabric=fabric
        )
        losses = {t: [*losses[t], held_out[t] / weight] for t, weight in plan.weights}
        both = together(student, codings)
        return Result(both.state_dict(), {"losses": losses}, history)


@dataclass(frozen=True)
class BranchedStudent(Recipe):
    """TargetNet: branched out where Eq. 7 says, then fine-tuned (Steps 3 and 4 of section 5.1)."""

    amalgamation: Amalgamation

    def sources(self) -> tuple[ModuleType, ...]:
        return TRAINING

    def name(self) -> str:
        return "target-net"

    @property
    def last_block(self) -> StudentBlock:
        """Block N, after which the student branches out."""
        return StudentBlock(self.amalgamation.teachers[0].start.architecture.blocks, self.amalgamation)

    def parents(self) -> tuple[Recipe, ...]:
        return (self.last_block, *self.amalgamation.predictions())

    def build(self, weights: Mapping[str, Tensor], metrics: Mapping) -> TargetNet:
        """The network with the given weights, branched as `metrics` say."""
        student, codings = self.amalgamation.fresh()
        teachers = {t.task: t.fresh() for t in self.amalgamation.teachers}
        target_net = branch_out(student, codings, teachers, metrics["branch_points"])
        target_net.load_state_dict(dict(weights))
        return target_net.eval()

    def train(self, work: Work) -> Result:
        """Eq. 7, branch out, then fine-tuning of the whole network against the teachers' predictions."""
        plan, artifact = self.amalgamation, work.load(self.last_block)
        student, codings = self.last_block.build(artifact.weights(), artifact.metrics)
        points = branch_points(artifact.metrics["losses"])
        target_net = branch_out(student, codings, plan.networks(work), points)
        history = fit(
            DirectObjective(target_net, tasks_of(plan.data), dict(plan.weights)),
            batches(plan.taught("unlabelled", work), plan.fine_tuning, seed=plan.seed, shuffle=True),
            plan.fine_tuning,
            fabric=make_fabric(plan.fine_tuning.device, precision=plan.fine_tuning.precision),
            checkpoint=work.folder / "training.safetensors",
            title=self.name(),
        )
        found = scores(target_net, plan.data, plan.fine_tuning)
        return Result(target_net.state_dict(), {"branch_points": points, **found}, history)
