"""How large a run is: the numbers of the profiles, and the recipes of a whole run."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kamal_lib.engine import Schedule, fast_precision
from kamal_lib.models.encoder_decoder import SLIM, VGG16, Architecture
from kamal_lib.recipes.amalgamation import Amalgamation, BranchedStudent, StudentBlock
from kamal_lib.recipes.data import Data, NYUv2Data, RoomsData
from kamal_lib.recipes.teachers import CommonStart, TaskTeacher


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
class Schedules:
    """How long each stage trains."""

    teachers: Mapping[str, Schedule]
    block: Schedule
    fine_tuning: Schedule


@dataclass(frozen=True)
class Profile:
    """How large a run is, on rooms and on NYUDv2."""

    architecture: Architecture
    rooms: RoomsData
    rooms_schedules: Schedules
    nyuv2_size: tuple[int, int]
    nyuv2_schedules: Schedules
    study_size: tuple[int, int] | None = None
    """NYUDv2's images in the study `ka_two_teachers`; None: as everywhere."""
    label_counts: tuple[int, ...] = (100, 200, 400, 800)
    """Numbers of labelled images that the study `teachers` compares."""


TASKS = ("segmentation", "depth", "normals")
"""SegNet, DepthNet and NormNet."""

GPU = Schedule(epochs=60, batch_size=8, learning_rate=1e-3, precision="bf16-mixed", device="gpu")
QUICK = Schedule(epochs=1, weight_decay=0.01, warmup=0.1, precision=fast_precision())
SECONDS = Schedule(epochs=1, batch_size=4)

PROFILES = {
    "smoke": Profile(  # seconds: that everything fits together, nothing else
        architecture=Architecture((8, 12), (1, 1), (True, True)),
        rooms=RoomsData(labelled=8, unlabelled=8, validation=4, test=4, size=(24, 32)),
        rooms_schedules=Schedules(dict.fromkeys(TASKS, SECONDS), SECONDS, SECONDS),
        nyuv2_size=(24, 32),
        nyuv2_schedules=Schedules(dict.fromkeys(TASKS, SECONDS), SECONDS, SECONDS),
        label_counts=(4, 12),
    ),
    # two CPU cores, minutes; NYUDv2's 399 images for the student are seen more often than 1,000 rooms
    "quick": Profile(
        architecture=SLIM,
        rooms=RoomsData(labelled=400, unlabelled=1000, validation=100, test=200, size=(48, 64)),
        rooms_schedules=Schedules(
            dict.fromkeys(TASKS, replace(QUICK, epochs=40)) | {"depth": replace(QUICK, epochs=20)},
            QUICK,
            replace(QUICK, epochs=8),
        ),
        nyuv2_size=(72, 96),
        study_size=(48, 64),
        nyuv2_schedules=Schedules(
            dict.fromkeys(TASKS, replace(QUICK, epochs=30)),
            replace(QUICK, epochs=2),
            replace(QUICK, epochs=12),
        ),
    ),
    # one GPU: the paper's network and batch size, on rooms its two epochs a block; AdamW instead of its 0.005
    "gpu": Profile(
        architecture=VGG16,
        rooms=RoomsData(labelled=800, unlabelled=10_000, validation=200, test=600, size=(240, 320)),
        rooms_schedules=Schedules(
            dict.fromkeys(TASKS, GPU),
            replace(GPU, epochs=2),
            replace(GPU, epochs=4, learning_rate=5e-4),
        ),
        nyuv2_size=(240, 320),
        nyuv2_schedules=Schedules(
            dict.fromkeys(TASKS, GPU),
            replace(GPU, epochs=20),
            replace(GPU, epochs=40, learning_rate=5e-4),
        ),
    ),
}


def task_teachers(
    profile: str | None = None,
    *,
    data: str = "rooms",
    data_root: str | None = None,
    seed: int = 0,
    start: str = "random",
) -> dict[str, TaskTeacher]:
    """The three teachers of one run, {task: recipe}. `profile` None: KAMAL_PROFILE, else "quick".

    A seed redraws everything: rooms, common start, order of the images. `start` is "random" or "imagenet".
    Raises ValueError for an unknown profile or data set, and for NYUDv2 without a `data_root`.
    """
    p = profile_named(profile)
    if data == "rooms":
        source: Data = replace(p.rooms, world=seed)
        schedules = p.rooms_schedules
    elif data == "nyuv2":
        if data_root is None:
            raise ValueError(
                "data 'nyuv2' needs data_root: the folder that holds image/, seg40/ and depth/, or the .mat"
            )
        source = NYUv2Data(data_root, p.nyuv2_size, world=seed)
        schedules = p.nyuv2_schedules
    else:
        raise ValueError(f"data must be 'rooms' or 'nyuv2', got {data!r}")
    common = CommonStart(p.architecture, seed, weights=start)
    return {task: TaskTeacher(task, source, common, schedules.teachers[task]) for task in TASKS}


def whole_game(
    profile: str | None = None,
    *,
    data: str = "rooms",
    data_root: str | None = None,
    seed: int = 0,
    start: str = "random",
) -> WholeGame:
    """The recipes of one run with SegNet and DepthNet; the arguments are those of `task_teachers`."""
    teachers = task_teachers(profile, data=data, data_root=data_root, seed=seed, start=start)
    del teachers["normals"]
    student = arrivals((tuple(teachers),), teachers, profile)
    last = student.last_block
    return WholeGame(teachers, tuple(replace(last, n=n) for n in range(1, last.n + 1)), student)


WEIGHTS = {"segmentation": 1.0, "depth": 4.0, "normals": 4.0}
"""λ of Eqs. 6, 8 and 9, which the paper does not give; see CHANGELOG.md for how they were chosen."""


def arrivals(
    order: Sequence[Sequence[str]],
    teachers: Mapping[str, TaskTeacher],
    profile: str | None,
    *,
    weights: Mapping[str, float] = WEIGHTS,
) -> BranchedStudent:
    """The student that learns the tasks of `order`, group by group (Ye et al., section 5.2).

    The TargetNet of one group is a teacher beside those of the next: (("segmentation", "depth", "normals"),)
    is the offline way, Eq. 8; (("segmentation", "depth"), ("normals",)) the online way, Eq. 9. It starts as
    a copy of the first task's teacher. Blocks and fine-tuning are the profile's, once for each group; it must
    be the profile of the teachers. `weights` are λ by task, in every group; the seed is the teachers'.

    Raises ValueError for an order that is no tuple of tuples, for a task without a teacher or a weight, or
    that arrives twice, for a group without a task, and for a teacher that stands under another task.
    """
    grouped = isinstance(order, list | tuple) and all(isinstance(group, list | tuple) for group in order)
    if not grouped or not order or not all(order):
        raise ValueError(
            f"an order of arrival is a tuple of groups, each a tuple of one task or more, of "
            f"{', '.join(teachers)}: (('segmentation', 'depth'), ('normals',)), got {order!r}"
        )
    tasks = [task for group in order for task in group]
    if unknown := [task for task in tasks if task not in teachers or task not in weights]:
        raise ValueError(
            f"{unknown} cannot arrive: there are teachers of {', '.join(teachers)}, and weights λ of "
            f"{', '.join(weights)}; hand over the one that is missing"
        )
    if other := {task: teachers[task].tasks for task in tasks if teachers[task].tasks != (task,)}:
        raise ValueError(f"each teacher stands under the one task that it teaches, got {other}")
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise ValueError(
            f"{', '.join(twice)} would arrive again after it was learned, got {order}: an order of arrival "
            "has no cycle, name each task once"
        )
    p, before = profile_named(profile), tuple[BranchedStudent, ...]()
    rooms = isinstance(teachers[tasks[0]].data, RoomsData)
    schedules = p.rooms_schedules if rooms else p.nyuv2_schedules
    for group in order:
        together = (*before, *(teachers[task] for task in group))
        plan = Amalgamation(
            together,
            weights=tuple((task, weights[task]) for teacher in together for task in teacher.tasks),
            blocks=schedules.block,
            start=tasks[0],
            gain=2.0,  # fresh gates are open: better than half closed on held-out rooms, see CHANGELOG.md
            seed=teachers[tasks[0]].start.seed,
        )
        before = (BranchedStudent(plan, schedules.fine_tuning),)
    return before[0]


def profile_named(name: str | None) -> Profile:
    """The profile of this name. Raises ValueError where there is none."""
    name = name or os.environ.get("KAMAL_PROFILE") or "quick"
    if name not in PROFILES:
        raise ValueError(f"profile {name!r} does not exist: choose one of {', '.join(PROFILES)}")
    return PROFILES[name]
