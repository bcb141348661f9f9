"""Every trained model of the workbook: a frozen dataclass with its train function, and the profiles' numbers.

`whole_game(...)` gives the recipes of one run in the order in which they are needed: a common start, the
teachers, the student's blocks 1..N, the TargetNet. `load(recipe)` returns its network from the store, and
trains it first where the store has none. Without Jupyter: `python -m kamal_lib.recipes target_net --profile
quick`.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import kamal_lib.data
import kamal_lib.losses
import kamal_lib.models
from kamal_lib import engine, metrics, sample, tasks
from kamal_lib.artifacts import Artifact, Recipe, Result, Work, default_store, load_or_train
from kamal_lib.data import scenes
from kamal_lib.data.loaders import Preloaded, loader
from kamal_lib.data.nyud import CLASSES_13, NYUDv2
from kamal_lib.data.synthetic import Rooms
from kamal_lib.data.targets import WithTargets
from kamal_lib.data.transforms import eval_transform, train_transform
from kamal_lib.distill import amalgamation
from kamal_lib.distill.amalgamation import BlockObjective, branch_points
from kamal_lib.engine import Schedule, evaluate, fit, make_fabric, mean_losses, predict
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.encoder_decoder import SLIM, VGG16, Architecture, EncoderDecoder, build_network
from kamal_lib.models.target_net import TargetNet, branch_out
from kamal_lib.tasks import Depth, DirectObjective, Segmentation, Task

TRAINING: tuple[ModuleType, ...] = (
    engine,
    kamal_lib.data,
    kamal_lib.losses,
    kamal_lib.models,
    metrics,
    sample,
    tasks,
)


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


@dataclass(frozen=True)
class CommonStart(Recipe):
    """The one initialisation from which all networks of a run start."""

    architecture: Architecture
    seed: int

    def sources(self) -> tuple[ModuleType, ...]:
        return (kamal_lib.models,)

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
            fabric=make_fabric(self.schedule.device, precision=self.schedule.precision),
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
            fabric=make_fabric(schedule.device, precision=schedule.precision),
            each=lambda predictions, _: seen.append(predictions[self.teacher.task].cpu()),
        )
        key, found = tasks[self.teacher.task].key, torch.cat(seen)
        return Result({key: found.to(torch.uint8) if key == "labels" else found}, {}, [])


@dataclass(frozen=True)
class Amalgamation:
    """What all stages of one student share. `start` is "common" or the task of the teacher to start from.

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


@dataclass(frozen=True)
class StudentBlock(Recipe):
    """Block n of the student and its codings, trained by Eq. 6 on top of blocks 1..n−1 (section 5.1, Step 2).

    The artefact holds the student and the codings up to here, and the held-out losses of blocks 1..n.
    """

    n: int
    amalgamation: Amalgamation

    def sources(self) -> tuple[ModuleType, ...]:
        return (*TRAINING, amalgamation)

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
        both = nn.ModuleDict({"student": student} | {t: nn.ModuleList(c) for t, c in codings.items()})
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
        both = nn.ModuleDict({"student": student} | {t: nn.ModuleList(c) for t, c in codings.items()})
        return Result(both.state_dict(), {"losses": losses}, history)


@dataclass(frozen=True)
class BranchedStudent(Recipe):
    """TargetNet: branched out where Eq. 7 says, then fine-tuned (Steps 3 and 4 of section 5.1)."""

    amalgamation: Amalgamation

    def sources(self) -> tuple[ModuleType, ...]:
        return (*TRAINING, amalgamation)

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
        target_net = branch_out(student, codings, plan.networks(work), points).requires_grad_(True)
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


@dataclass(frozen=True)
class WholeGame:
    """The recipes of one run, from teachers to TargetNet."""

    teachers: dict[str, TaskTeacher]
    blocks: tuple[StudentBlock, ...]
    target_net: BranchedStudent

    @property
    def data(self) -> Data:
        """What the run learns from and is measured on."""
        return self.target_net.amalgamation.data


@dataclass(frozen=True)
class Profile:
    """How large a run is."""

    architecture: Architecture
    rooms: RoomsData
    nyuv2_size: tuple[int, int]
    teacher: Schedule
    block: Schedule
    fine_tuning: Schedule


PROFILES = {
    "smoke": Profile(  # seconds: that everything fits together, nothing else
        architecture=Architecture((8, 8), (1, 1), (True, True)),
        rooms=RoomsData(labelled=8, unlabelled=8, validation=4, test=4, size=(24, 32)),
        nyuv2_size=(24, 32),
        teacher=Schedule(epochs=1, batch_size=4),
        block=Schedule(epochs=1, batch_size=4),
        fine_tuning=Schedule(epochs=1, batch_size=4),
    ),
    "quick": Profile(  # two CPU cores, minutes
        architecture=SLIM,
        rooms=RoomsData(labelled=400, unlabelled=1600, validation=100, test=200, size=(48, 64)),
        nyuv2_size=(72, 96),
        teacher=Schedule(epochs=50),
        block=Schedule(epochs=1),
        fine_tuning=Schedule(epochs=6),
    ),
    "gpu": Profile(  # one GPU, the paper's network and schedule
        architecture=VGG16,
        rooms=RoomsData(labelled=800, unlabelled=10_000, validation=200, test=600, size=(240, 320)),
        nyuv2_size=(240, 320),
        teacher=Schedule(epochs=60, batch_size=8, learning_rate=1e-3, precision="bf16-mixed", device="gpu"),
        block=Schedule(epochs=2, batch_size=8, learning_rate=1e-3, precision="bf16-mixed", device="gpu"),
        fine_tuning=Schedule(
            epochs=4, batch_size=8, learning_rate=5e-4, precision="bf16-mixed", device="gpu"
        ),
    ),
}


def whole_game(
    profile: str | None = None, *, data: str = "rooms", data_root: str | None = None, seed: int = 0
) -> WholeGame:
    """The recipes of one run. `profile` None means the environment's KAMAL_PROFILE, else "quick".

    A seed redraws everything: rooms, common start, order of the images. Raises ValueError for an unknown
    profile or data set, and for NYUDv2 without a `data_root`.
    """
    name = profile or os.environ.get("KAMAL_PROFILE") or "quick"
    if name not in PROFILES:
        raise ValueError(f"profile {name!r} does not exist: choose one of {', '.join(PROFILES)}")
    p = PROFILES[name]
    if data == "rooms":
        source: Data = replace(p.rooms, world=seed)
    elif data == "nyuv2":
        if data_root is None:
            raise ValueError("data 'nyuv2' needs data_root, the folder that holds image/, seg40/ and depth/")
        source = NYUv2Data(data_root, p.nyuv2_size, world=seed)
    else:
        raise ValueError(f"data must be 'rooms' or 'nyuv2', got {data!r}")
    start = CommonStart(p.architecture, seed)
    teachers = {task: TaskTeacher(task, source, start, p.teacher) for task in tasks_of(source)}
    plan = Amalgamation(
        tuple(teachers.values()), (("segmentation", 1.0), ("depth", 4.0)), p.block, p.fine_tuning, seed=seed
    )
    blocks = tuple(StudentBlock(n, plan) for n in range(1, p.architecture.blocks + 1))
    return WholeGame(teachers, blocks, BranchedStudent(plan))


def trained(recipe: Recipe) -> Artifact:
    """The recipe's artefact (weights, metrics, history) from the default store, trained first if need be."""
    return load_or_train(recipe, default_store())


def load(recipe):
    """The recipe's network in eval mode (for a block: student and codings), trained first if need be."""
    artifact = trained(recipe)
    return recipe.build(artifact.weights(), artifact.metrics)


def main(arguments: list[str] | None = None) -> None:
    """Trains one stage of a run, and what it needs, in resumable pieces; prints its metrics."""
    parser = argparse.ArgumentParser(prog="python -m kamal_lib.recipes", description=main.__doc__)
    parser.add_argument("stage", choices=["teachers", "blocks", "target_net"])
    parser.add_argument("--profile", choices=list(PROFILES))
    parser.add_argument("--data", default="rooms", choices=["rooms", "nyuv2"])
    parser.add_argument("--data-root")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    game = whole_game(options.profile, data=options.data, data_root=options.data_root, seed=options.seed)
    stages = {
        "teachers": tuple(game.teachers.values()),
        "blocks": game.blocks,
        "target_net": (game.target_net,),
    }
    for recipe in stages[options.stage]:
        print(recipe.name(), trained(recipe).metrics)


if __name__ == "__main__":
    main()
