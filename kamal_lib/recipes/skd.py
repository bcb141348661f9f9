"""Study `skd`: teachers, students and the rows of Liu et al.'s tables as recipes, for one seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kamal_lib.engine import Schedule
from kamal_lib.models.segmenters import (
    ESPNET_C,
    PSPNET_RESNET18,
    PSPNET_RESNET18_HALF,
    PSPNET_RESNET101,
    SLIM_ESPNET_C,
    SLIM_STUDENT,
    SLIM_STUDENT_HALF,
    SLIM_TEACHER,
    SegmenterArchitecture,
)
from kamal_lib.recipes.data import DATA, CamVidData, CityscapesData, Data, NYUv2Data, in_steps
from kamal_lib.recipes.profiles import GPU, QUICK, SECONDS, profile_named
from kamal_lib.recipes.structured import CriticPlan, Graph, SegmenterTeacher, StructuredStudent
from kamal_lib.recipes.two_teachers import Rows, of_group

LAMBDA = {"pixel": 10.0, "pair": 10.0, "holistic": 0.1}
"""λ1, λ1 and λ2 of Eq. 4. The losses that are compared with pair-wise distillation get its λ."""


@dataclass(frozen=True)
class Size:
    """Networks and steps of a profile.

    `teacher_steps` and `student_steps` are rounded to whole epochs. `pretrained` is how the students of
    Table 1's third group start: "imagenet", or None for a body that has learned depth in other rooms, where
    networks are too small for ImageNet weights.
    """

    teacher: SegmenterArchitecture
    students: Mapping[str, SegmenterArchitecture]
    teacher_steps: int
    student_steps: int
    schedule: Schedule
    unlabelled: int
    size: tuple[int, int]
    critic: CriticPlan
    pretrained: str | None = None


SLIM = {"1.0": SLIM_STUDENT, "0.5": SLIM_STUDENT_HALF, "ESPNet-C": SLIM_ESPNET_C}
FULL = {"1.0": PSPNET_RESNET18, "0.5": PSPNET_RESNET18_HALF, "ESPNet-C": ESPNET_C}

SIZES = {
    "smoke": Size(SLIM_TEACHER, SLIM, 2, 2, SECONDS, 8, (32, 48), CriticPlan()),
    # 400 labelled rooms and 600 unlabelled ones are a whole number of epochs in as many steps
    "quick": Size(
        SLIM_TEACHER,
        SLIM,
        800,
        500,
        replace(QUICK, batch_size=8, learning_rate=0.016),
        600,
        (48, 64),
        CriticPlan(),
    ),
    "gpu": Size(
        PSPNET_RESNET101,
        FULL,
        8000,
        8000,
        replace(GPU, learning_rate=5e-4),
        2000,
        (360, 480),
        CriticPlan(width=64),
        "imagenet",
    ),
}
"""{profile: how large networks, images and trainings are}; the number of rooms is the profile's."""


def images(profile: str | None, *, data: str, data_root: str | None, seed: int) -> Data:
    """What a run learns from and is measured on.

    A seed redraws rooms, and how NYUDv2's training images are divided; CamVid and Cityscapes have one
    division. Raises ValueError for an unknown profile or data set, and for photographs without a folder.
    """
    p = profile_named(profile)
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(DATA)}, got {data!r}")
    size = size_of(profile).size
    if data == "rooms":
        return replace(p.rooms, world=seed, size=size)
    if data_root is None:
        raise ValueError(f"data {data!r} needs data_root: the folder that holds its files")
    if data == "nyuv2":
        return NYUv2Data(data_root, size, world=seed)
    return CamVidData(data_root, size) if data == "camvid" else CityscapesData(data_root, size)


def size_of(profile: str | None) -> Size:
    """The networks and steps of a profile. Raises ValueError where there is no such profile."""
    p = profile_named(profile)
    return next(size for name, size in SIZES.items() if profile_named(name) is p)


def skd_teachers(
    profile: str | None = None, *, data: str = "rooms", data_root: str | None = None, seed: int = 0
) -> dict[str, SegmenterTeacher]:
    """{task: the large segmenter that teaches it}, parsing and, where there are labels of it, depth.

    A seed redraws everything. `profile` None: KAMAL_PROFILE, else "quick". Raises ValueError as `images`.
    """
    size, source = size_of(profile), images(profile, data=data, data_root=data_root, seed=seed)
    schedule = in_steps(size.schedule, size.teacher_steps, source.labels()[0])
    weights = size.pretrained or "random"
    tasks = ("segmentation",) if isinstance(source, CamVidData) else ("segmentation", "depth")
    return {
        task: SegmenterTeacher(task, source, size.teacher, schedule, seed, weights=weights) for task in tasks
    }


def student(
    teacher: SegmenterTeacher,
    profile: str | None = None,
    terms: Sequence[str] = (),
    *,
    network: str = "1.0",
    **fields: Any,
) -> StructuredStudent:
    """A student of this teacher with the given terms beside the labels, at the paper's λ.

    `network` is "1.0", "0.5" or "ESPNet-C"; further fields are those of `StructuredStudent`. Its images come
    in another order than the teacher's, and it starts from other weights. Raises ValueError for another
    network, terms that are one word, a teacher of another profile, and as `StructuredStudent`.
    """
    size = size_of(profile)
    if isinstance(terms, str):
        raise ValueError(f"the terms must be a tuple of names, such as ('pixel',), got {terms!r}")
    if teacher.data.size != size.size:
        raise ValueError(
            f"the teacher's images are {teacher.data.size}, those of this profile {size.size}: give both the "
            "same profile, or build a StructuredStudent yourself"
        )
    if network not in size.students:
        raise ValueError(f"network must be one of {', '.join(size.students)}, got {network!r}")
    return replace(
        StructuredStudent(
            teacher,
            size.students[network],
            in_steps(size.schedule, size.student_steps, teacher.data.labels()[0]),
            seed=teacher.seed + 1,
            weights=tuple((term, LAMBDA.get(term, LAMBDA["pair"])) for term in terms),
            critic=size.critic,
        ),
        **fields,
    )


PI, PI_PA, ALL = ("pixel",), ("pixel", "pair"), ("pixel", "pair", "holistic")
STEPS = {"labels": (), "PI": PI, "PI + PA": PI_PA, "PI + PA + HO": ALL}


def table1_rows(teachers: Mapping[str, SegmenterTeacher], profile: str | None) -> Rows:
    """Table 1: two student sizes from random weights, and the larger one from a pretrained body."""
    teacher, size = teachers["segmentation"], size_of(profile)
    rows: Rows = {"teacher": (teacher,)}
    for network in ("1.0", "0.5"):
        for name, terms in STEPS.items():
            rows[f"{name} ({network})"] = (student(teacher, profile, terms, network=network),)
    start = size.pretrained or depth_in_other_rooms(teacher, profile)
    for name, terms in STEPS.items():
        rows[f"{name} (1.0, pretrained)"] = (student(teacher, profile, terms, start=start),)
    return rows


def depth_in_other_rooms(teacher: SegmenterTeacher, profile: str | None) -> SegmenterTeacher:
    """The larger student's network, taught depth in as many rooms of a world that nothing else uses."""
    size = size_of(profile)
    rooms = replace(profile_named(profile).rooms, world=500 + teacher.seed, size=teacher.data.size)
    schedule = in_steps(size.schedule, size.student_steps, rooms.labelled)
    return SegmenterTeacher("depth", rooms, size.students["1.0"], schedule, teacher.seed)


GRAPHS = {
    "α 3×3, β 1×1": (Graph(1, 1),),
    "α 5×5, β 1×1": (Graph(1, 2),),
    "α 7×7, β 1×1": (Graph(1, 3),),
    "α all, β 1×1": (Graph(1),),
    "α all, β 4×4": (Graph(4),),
    "α all, β 8×8": (Graph(8),),
    "α fusion": (Graph(2), Graph(2, 2), Graph(2, 1)),
    "β fusion": (Graph(2), Graph(4), Graph(8)),
    "feature fusion": (Graph(2), Graph(4, finer=True)),
}
"""Table 2, its 2×2 row being Table 1's PI + PA. "α 3×3, β 1×1" is the LOCAL of Table 6."""


def table2_rows(teachers: Mapping[str, SegmenterTeacher], profile: str | None) -> Rows:
    """Table 2: range and granularity of the affinity graph, and fusions of three; beside PI, as printed."""
    teacher = teachers["segmentation"]
    return {row: (student(teacher, profile, PI_PA, graphs=graphs),) for row, graphs in GRAPHS.items()}


CRITICS = {"A4L4": (4, 5), "A3L4": (3, 5), "A1L4": (1, 5), "A0L4": (0, 5), "A2L3": (2, 4), "A2L2": (2, 3)}
"""{AnLm: attention modules, blocks with the output's}; the paper's A2L4 is Table 1's PI + PA + HO."""


def table3_rows(teachers: Mapping[str, SegmenterTeacher], profile: str | None) -> Rows:
    """Table 3: other critics."""
    teacher, plan = teachers["segmentation"], size_of(profile).critic
    return {
        row: (student(teacher, profile, ALL, critic=replace(plan, attentions=a, blocks=b)),)
        for row, (a, b) in CRITICS.items()
    }


def table6_rows(teachers: Mapping[str, SegmenterTeacher], profile: str | None) -> Rows:
    """Table 6: what the paper compares pair-wise distillation with, beside PI."""
    names = {"MIMIC": "mimic", "AT": "attention", "AT, public form": "attention, public form"}
    teacher = teachers["segmentation"]
    return {f"PI + {row}": (student(teacher, profile, ("pixel", name)),) for row, name in names.items()}


def unlabelled_of(data: Data, profile: str | None) -> int:
    """How many unlabelled images a row takes: the profile's number, or what there is."""
    labelled, most = data.labels()
    return min(size_of(profile).unlabelled, most - labelled)


def table8_rows(teachers: Mapping[str, SegmenterTeacher], profile: str | None) -> Rows:
    """Table 8 and Fig. 10: ESPNet-C, and unlabelled images beside the labelled ones in as many steps.

    CamVid, as the study takes it, and Cityscapes have no unlabelled images, and not these rows.
    """
    teacher, more = teachers["segmentation"], unlabelled_of(teachers["segmentation"].data, profile)
    rows: Rows = {
        f"ESPNet-C, {name}": (student(teacher, profile, STEPS[name], network="ESPNet-C"),)
        for name in ("labels", "PI + PA + HO")
    }
    if not more:
        return rows
    for network, name in (
        ("ESPNet-C", "ESPNet-C, PI + PA + HO, unlabelled"),
        ("1.0", "PI + PA + HO, unlabelled (1.0)"),
    ):
        rows[name] = (student(teacher, profile, ALL, network=network, unlabelled=more),)
    return rows


DEPTH = {"labels": (), "PI": PI, "PA": ("pair",), "PA + HO": ("pair", "holistic")}


def depth_rows(teachers: Mapping[str, SegmenterTeacher], profile: str | None) -> Rows:
    """Tables 10 and 11: depth as a choice among log-spaced bins."""
    teacher, more = teachers["depth"], unlabelled_of(teachers["depth"].data, profile)
    rows: Rows = {"depth: teacher": (teacher,)}
    rows |= {f"depth: {name}": (student(teacher, profile, terms),) for name, terms in DEPTH.items()}
    if more:
        unlabelled = student(teacher, profile, DEPTH["PA + HO"], unlabelled=more)
        rows["depth: PA + HO, unlabelled"] = (unlabelled,)
    return rows


GROUPS = {
    "table1": table1_rows,
    "table2": table2_rows,
    "table3": table3_rows,
    "table6": table6_rows,
    "table8": table8_rows,
    "depth": depth_rows,
}
"""{name: the function that turns one seed's teachers into rows}."""


def skd(
    rows: str,
    profile: str | None = None,
    *,
    data: str = "rooms",
    data_root: str | None = None,
    seed: int = 0,
) -> Rows:
    """The recipes of one group of rows of one seed.

    Raises ValueError for another group, for depth on CamVid, and as `skd_teachers`.
    """
    table = of_group(GROUPS, rows)
    teachers = skd_teachers(profile, data=data, data_root=data_root, seed=seed)
    if data == "camvid" and rows == "depth":
        raise ValueError("CamVid has no depth for these rows: take 'rooms', 'nyuv2' or 'cityscapes'")
    return table(teachers, profile)
