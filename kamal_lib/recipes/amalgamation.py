"""The stages of knowledge amalgamation (Ye et al., section 5.1), each trained once and kept in the store.

The student's blocks 1..N and the TargetNet: each is a frozen dataclass whose `train` makes it from its
parents, and whose `build` turns stored weights into a network.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from kamal_lib.artifacts import Recipe, Result, Work
from kamal_lib.data.targets import WithTargets
from kamal_lib.distill import amalgamation
from kamal_lib.distill.amalgamation import BlockObjective, branch_points
from kamal_lib.engine import Schedule, fit, make_fabric, mean_losses
from kamal_lib.models import coding, target_net
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.encoder_decoder import EncoderDecoder, build_network
from kamal_lib.models.target_net import TargetNet, branch_out
from kamal_lib.recipes import teachers as teachers_module
from kamal_lib.recipes.data import Data, batches, scores, tasks_of
from kamal_lib.recipes.teachers import Predictions, TaskTeacher
from kamal_lib.tasks import DirectObjective

SOURCES: tuple[ModuleType, ...] = (
    *(*teachers_module.SOURCES, amalgamation, coding, target_net),
    sys.modules[__name__],
)
"""What every stage's result depends on: a change of any of it makes stored results out of date."""


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
        return SOURCES

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
            watch=work.watch,
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
        return SOURCES

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
            watch=work.watch,
        )
        found = scores(target_net, plan.data, plan.fine_tuning)
        return Result(target_net.state_dict(), {"branch_points": points, **found}, history)
