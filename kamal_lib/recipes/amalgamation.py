"""The stages of knowledge amalgamation (Ye et al., section 5), each trained once and kept in the store.

The student's blocks 1..N and the TargetNet: each is a frozen dataclass whose `train` makes it from its
parents, and whose `build` turns stored weights into a network. A TargetNet's recipe is a teacher's, too: an
`Amalgamation` of it and of one more teacher is the online way of section 5.2.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from kamal_lib.artifacts import Recipe, Result, Work
from kamal_lib.data.targets import WithTargets
from kamal_lib.distill import amalgamation
from kamal_lib.distill.amalgamation import BlockObjective, FeatureObjective, branch_points
from kamal_lib.engine import Schedule, make_fabric, mean_losses
from kamal_lib.models import coding, target_net
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.encoder_decoder import EncoderDecoder, build_network
from kamal_lib.models.target_net import Network, TargetNet, branch_out
from kamal_lib.recipes import teachers as teachers_module
from kamal_lib.recipes.data import Data, batches, fitted, scores
from kamal_lib.recipes.teachers import Predictions, TaskTeacher, student_tasks
from kamal_lib.tasks import DirectObjective, Task

SOURCES: tuple[ModuleType, ...] = (
    *(*teachers_module.SOURCES, amalgamation, coding, target_net),
    sys.modules[__name__],
)
"""What every stage's result depends on: a change of any of it makes stored results out of date."""


@dataclass(frozen=True)
class Amalgamation:
    """How blocks 1..N of one student are trained; what the paper leaves open or decides against is an option.

    * `weights`: the λ_t of Eq. 6, one (task, λ) pair a task, fixed for all blocks.
    * `start`: of the student; "common" with its teachers, the task whose blocks to copy from its teacher, or
      "unrelated", a random draw of its own. (The paper: ImageNet weights.)
    * `gain`, `mix`: of the codings, see `ChannelCoding`.
    * `train_prefix`: blocks 1..n learn at step n; Eq. 7 then reads losses and codings of earlier blocks that
      have since moved on.
    * `loss`: "predictions" (Eq. 6) or "features" (Eq. 5); Eq. 7 reads losses of Eq. 6 in either case.
    * `switches`: "student", or the "teacher"'s own in the rest of the teacher, which no test image has.
    * `soft`: the segmentation teacher's probabilities as targets instead of its arg max.
    * `decoder_only`: the encoder stays as it started.
    * `placebo`: every training image is given the predictions of another one.

    `teachers` are recipes of networks with one task or, of a TargetNet, with several. Raises ValueError for
    two teachers of one task, for weights that do not fit the teachers, for teachers of different data, for
    options that do not exist, for `decoder_only` with `train_prefix`, which would train the encoder, and for
    a TargetNet's features or switches, which it has only up to its first branch.
    """

    teachers: tuple["TaskTeacher | BranchedStudent", ...]
    weights: tuple[tuple[str, float], ...]
    blocks: Schedule
    start: str = "segmentation"
    gain: float = 1.0
    train_prefix: bool = False
    seed: int = 0
    loss: str = "predictions"
    switches: str = "student"
    mix: bool = False
    soft: bool = False
    decoder_only: bool = False
    placebo: bool = False

    def __post_init__(self):
        named, tasks = dict(self.weights), self.named()
        if len(set(tasks)) < len(tasks):
            raise ValueError(
                f"two teachers teach the same task, got {[t.tasks for t in self.teachers]}: a student learns "
                "a task from one of them, and none can arrive twice"
            )
        if set(named) != set(tasks) or min(named.values(), default=0) <= 0:
            raise ValueError(
                f"weights must give each task of the teachers, {tasks}, one λ > 0, got {self.weights}"
            )
        if len({t.data for t in self.teachers}) != 1:
            raise ValueError(
                "all teachers must have the same data (rooms of one world, parts of one seed), got "
                f"{[t.data for t in self.teachers]}: their predictions would belong to different images"
            )
        shapes = {(t.start.architecture.widths, t.start.architecture.pools) for t in self.teachers}
        if len(shapes) != 1:
            raise ValueError(
                f"teachers and student need the same widths and pools, block by block, got {sorted(shapes)}: "
                "train the teachers with one architecture"
            )
        if self.decoder_only and self.train_prefix:
            raise ValueError("decoder_only leaves the encoder as it is, train_prefix trains it: choose one")
        own = self.loss == "features" or self.switches == "teacher"
        if own and (branched := [t.key for t in self.teachers if isinstance(t, BranchedStudent)]):
            raise ValueError(
                f"the TargetNet of {', '.join(branched)} has one F^n up to its first branch only: with it as "
                "a teacher take loss='predictions' and switches='student'"
            )
        choices = {
            "start": (self.start, ("common", "unrelated", *tasks)),
            "loss": (self.loss, ("predictions", "features")),
            "switches": (self.switches, ("student", "teacher")),
        }
        for option, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")

    def named(self) -> list[str]:
        """The names of all tasks, in the order of the teachers."""
        return [task for teacher in self.teachers for task in teacher.tasks]

    @property
    def data(self) -> Data:
        """The data of the teachers, whose unlabelled part the student learns from."""
        return self.teachers[0].data

    @property
    def first_block(self) -> int:
        """1, or the decoder's first."""
        return self.teachers[0].start.architecture.blocks // 2 + 1 if self.decoder_only else 1

    def tasks(self) -> dict[str, Task]:
        """The tasks as the student is taught them."""
        return student_tasks(self.data, soft=self.soft)

    def fresh(self) -> tuple[EncoderDecoder, dict[str, list[ChannelCoding]]]:
        """A student without head, its start still to be given, and, for each teacher, one coding a block."""
        first = self.teachers[0].start
        other = 10**6 if self.start == "unrelated" else 0  # another draw than that of any run's teachers
        student = build_network(first.architecture, {}, seed=first.seed + other)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            codings = {
                t.key: [ChannelCoding(c, gain=self.gain, mix=self.mix) for c in student.channels]
                for t in self.teachers
            }
        return student, codings

    def started(self, work: Work) -> tuple[EncoderDecoder, dict[str, list[ChannelCoding]]]:
        """Step 1 of section 5.1: student and codings before any training."""
        student, codings = self.fresh()
        if self.start == "common":
            student.blocks.load_state_dict(work.load(self.teachers[0].start).weights())
        elif self.start != "unrelated":
            (giver,) = (t for t in self.teachers if self.start in t.tasks)
            artifact = work.load(giver)
            blocks = giver.build(artifact.weights(), artifact.metrics).blocks_of(self.start)
            student.blocks.load_state_dict(nn.ModuleList(blocks).state_dict())
        return student, codings

    def taught(self, part: str, work: Work) -> Dataset:
        """The part's images with all teachers' predictions as targets."""
        of_part = (p for p in self.predictions() if p.part == part)
        targets = {key: value for p in of_part for key, value in work.load(p).weights().items()}
        if self.placebo and part == "unlabelled":
            targets = {key: value[others(len(value), self.seed)] for key, value in targets.items()}
        return WithTargets(self.data.part(part), targets)

    def networks(self, work: Work) -> dict[str, Network]:
        """{name: teacher}; a teacher of one task is named after it."""
        return {t.key: t.build((a := work.load(t)).weights(), a.metrics) for t in self.teachers}

    def structure(self, work: Work) -> dict[str, dict]:
        """{name: where it branched, and its teachers} of each TargetNet among the teachers."""
        nets = {t.key: work.load(t).metrics for t in self.teachers if isinstance(t, BranchedStudent)}
        return {name: {key: m[key] for key in ("branch_points", "teachers")} for name, m in nets.items()}

    def predictions(self) -> tuple[Predictions, ...]:
        """The stored predictions that the student learns from and is measured on."""
        return tuple(
            Predictions(t, part, soft=self.soft and "segmentation" in t.tasks)
            for t in self.teachers
            for part in ("unlabelled", "validation")
        )


def others(count: int, seed: int) -> Int[Tensor, " count"]:
    """For each of `count` images another one, all of them used once. Raises ValueError for a single image."""
    if count < 2:
        raise ValueError(f"a placebo needs two images or more to exchange their predictions, got {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def together(student: EncoderDecoder, codings: Mapping[str, list[ChannelCoding]]) -> nn.ModuleDict:
    """Student and codings as the one module whose state a block's artefact holds."""
    return nn.ModuleDict({"student": student} | {t: nn.ModuleList(c) for t, c in codings.items()})


@dataclass(frozen=True)
class StudentBlock(Recipe):
    """Block n of the student and its codings, trained by Eq. 6 on top of blocks 1..n−1 (section 5.1, Step 2).

    The artefact holds the student and the codings up to here, and the held-out losses of blocks 1..n:
    `losses` are Eq. 6 as at test time, `own_losses` those of the objective that was trained; None where a
    block was not trained.
    """

    n: int
    amalgamation: Amalgamation

    def sources(self) -> tuple[ModuleType, ...]:
        return SOURCES

    def name(self) -> str:
        return f"student-block-{self.n:02d}"

    def parents(self) -> tuple[Recipe, ...]:
        before = (replace(self, n=self.n - 1),) if self.n > self.amalgamation.first_block else ()
        common = (self.amalgamation.teachers[0].start,)
        return (*before, *common, *self.amalgamation.predictions())

    def build(
        self, weights: Mapping[str, Tensor], metrics: Mapping
    ) -> tuple[EncoderDecoder, dict[str, list[ChannelCoding]]]:
        """(student, {teacher: codings}) with the given weights."""
        student, codings = self.amalgamation.fresh()
        both = together(student, codings)
        both.load_state_dict(dict(weights))
        both.eval()
        return student, codings

    def train(self, work: Work) -> Result:
        """Eq. 6 or 5 on unlabelled images; then Eq. 6 on held-out ones, still without a label."""
        plan = self.amalgamation
        teachers = plan.networks(work)
        if self.n > plan.first_block:
            before = work.load(replace(self, n=self.n - 1))
            student, codings = self.build(before.weights(), before.metrics)
            losses, own = before.metrics["losses"], before.metrics["own_losses"]
        else:
            student, codings = plan.started(work)
            losses, own = ({task: [None] * (self.n - 1) for task in plan.named()} for _ in range(2))
        here = {name: coding[self.n - 1] for name, coding in codings.items()}
        given = (student, teachers, here, self.n)
        weights = dict(plan.weights)
        at_test = BlockObjective(*given, tasks=plan.tasks(), weights=weights, train_prefix=plan.train_prefix)
        objective = at_test
        if plan.loss == "features":
            objective = FeatureObjective(*given, weights=weights, train_prefix=plan.train_prefix)
        elif plan.switches == "teacher":
            objective = BlockObjective(
                *given,
                tasks=plan.tasks(),
                weights=weights,
                train_prefix=plan.train_prefix,
                switches=plan.switches,
            )
        fabric = make_fabric(plan.blocks.device, precision=plan.blocks.precision)
        images = plan.taught("unlabelled", work)
        history = fitted(objective, images, plan.blocks, work, title=self.name(), seed=plan.seed)
        images = batches(plan.taught("validation", work), plan.blocks)
        held_out = mean_losses(at_test, images, fabric=fabric)
        of_own = held_out if objective is at_test else mean_losses(objective, images, fabric=fabric)
        losses = {t: [*losses[t], held_out[t] / weight] for t, weight in plan.weights}
        own = {t: [*own[t], of_own[t] / weight] for t, weight in plan.weights}
        both = together(student, codings)
        return Result(both.state_dict(), {"losses": losses, "own_losses": own}, history)


@dataclass(frozen=True)
class BranchedStudent(Recipe):
    """TargetNet: branched out where Eq. 7 says, then fine-tuned (Steps 3 and 4 of section 5.1).

    `points` are (task, block) pairs that take the place of Eq. 7: "Decoder b1" to "b5" of Table 1.
    """

    amalgamation: Amalgamation
    fine_tuning: Schedule
    points: tuple[tuple[str, int], ...] | None = None

    def sources(self) -> tuple[ModuleType, ...]:
        return SOURCES

    def name(self) -> str:
        return f"target-net-{len(self.tasks)}"

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it has learned, in the order of its teachers; what it teaches, where it is a teacher."""
        return tuple(self.amalgamation.named())

    @property
    def key(self) -> str:
        """Its name among a student's teachers."""
        return "+".join(self.tasks)

    @property
    def start(self) -> teachers_module.CommonStart:
        """Of its teachers."""
        return self.amalgamation.teachers[0].start

    @property
    def data(self) -> Data:
        """What it learns from and is measured on."""
        return self.amalgamation.data

    @property
    def schedule(self) -> Schedule:
        """Of its last training."""
        return self.fine_tuning

    @property
    def last_block(self) -> StudentBlock:
        """Block N, after which the student branches out."""
        return StudentBlock(self.start.architecture.blocks, self.amalgamation)

    def parents(self) -> tuple[Recipe, ...]:
        return (self.last_block, *self.amalgamation.predictions())

    def fresh(self, metrics: Mapping) -> TargetNet:
        """Before any training, branched as `metrics` say, and so are the TargetNets among its teachers."""
        student, codings = self.amalgamation.fresh()
        teachers = {t.key: t.fresh(metrics["teachers"].get(t.key)) for t in self.amalgamation.teachers}
        return branch_out(student, codings, teachers, metrics["branch_points"])

    def build(self, weights: Mapping[str, Tensor], metrics: Mapping) -> TargetNet:
        """The network with the given weights, branched as `metrics` say.

        Raises ValueError for the weights of a network that branched elsewhere.
        """
        target_net = self.fresh(metrics)
        target_net.load_weights(weights)
        return target_net.eval()

    def train(self, work: Work) -> Result:
        """Eq. 7, branch out, then fine-tuning of the whole network against the teachers' predictions."""
        plan, artifact = self.amalgamation, work.load(self.last_block)
        student, codings = self.last_block.build(artifact.weights(), artifact.metrics)
        points = branch_points(artifact.metrics["losses"]) if self.points is None else dict(self.points)
        target_net = branch_out(student, codings, plan.networks(work), points)
        images = plan.taught("unlabelled", work)
        objective = DirectObjective(target_net, plan.tasks(), dict(plan.weights))
        history = fitted(objective, images, self.fine_tuning, work, title=self.name(), seed=plan.seed)
        found = {"branch_points": points, "teachers": plan.structure(work)}
        found |= scores(target_net, plan.data, self.fine_tuning)
        return Result(target_net.state_dict(), found, history)
