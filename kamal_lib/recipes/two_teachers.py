"""Study `ka_two_teachers`: the rows of its tables as recipes, for one seed."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from kamal_lib.artifacts import Recipe
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.cost import parameters
from kamal_lib.models.encoder_decoder import VGG16, Architecture, build_network
from kamal_lib.models.target_net import branch_out
from kamal_lib.recipes.amalgamation import Amalgamation, BranchedStudent
from kamal_lib.recipes.baselines import MultiHead, SelfDistilled
from kamal_lib.recipes.data import RoomsData
from kamal_lib.recipes.label_curve import with_labels
from kamal_lib.recipes.profiles import arrivals, profile_named, task_teachers
from kamal_lib.recipes.teachers import CommonStart, TaskTeacher

Rows = dict[str, tuple[Recipe, ...]]
"""{row of a table: the network, or one network a task}."""


def of_group(groups: Mapping[str, Callable[..., Rows]], rows: str) -> Callable[..., Rows]:
    """The group of this name. Raises ValueError where there is none."""
    if rows not in groups:
        raise ValueError(f"rows must be one of {', '.join(groups)}, got {rows!r}")
    return groups[rows]


def full_size(architecture: Architecture = VGG16, channels: tuple[int, ...] = (13, 1)) -> dict[str, int]:
    """Parameters at the size of the paper, without codings: {"teachers", "b1".., "codings" of all blocks}.

    `channels` are those of the tasks' heads. Nothing is allocated.
    """
    with torch.device("meta"):
        heads = {str(i): count for i, count in enumerate(channels)}
        student = build_network(architecture, {}, seed=0)
        teachers = {task: build_network(architecture, {task: count}, seed=0) for task, count in heads.items()}
        codings = {task: [ChannelCoding(c) for c in student.channels] for task in heads}
    half = architecture.blocks // 2
    found = {"teachers": parameters(*teachers.values())}
    for k in range(1, half + 1):
        net = branch_out(student, codings, teachers, dict.fromkeys(heads, half + k))
        found[f"b{k}"] = parameters(net) - parameters(*(codings[task][half + k - 1] for task in heads))
    return found | {"codings": parameters(*(each for of_task in codings.values() for each in of_task))}


def core_rows(student: BranchedStudent) -> Rows:
    """Both teachers, the final student (branched by Eq. 7), and the same network distilled end to end."""
    return {
        "teachers": student.amalgamation.teachers,
        "final": (student,),
        "end to end": (MultiHead(student),),
    }


def table_rows(student: BranchedStudent) -> Rows:
    """Decoder b1..bN/2 of Table 1: both tasks branch at that block of the decoder."""
    tasks = student.amalgamation.named()
    half = student.last_block.n // 2
    return {
        f"Decoder b{k}": (replace(student, points=tuple((task, half + k) for task in tasks)),)
        for k in range(1, half + 1)
    }


def baseline_rows(student: BranchedStudent) -> Rows:
    """Self-training of each task, labels instead of teachers, and predictions of other images."""
    plan = student.amalgamation
    return {
        "self-distilled": tuple(SelfDistilled(plan, student.fine_tuning, t.key) for t in plan.teachers),
        "few labels": (MultiHead(student, "labels"),),
        "all labels": (MultiHead(student, "all labels"),),
        "placebo": (replace(student, amalgamation=replace(plan, placebo=True)),),
    }


def option_rows(student: BranchedStudent) -> Rows:
    """One option of the amalgamation changed at a time, with a quarter of the fine-tuning for all of them."""
    plan, short = (
        student.amalgamation,
        replace(student.fine_tuning, epochs=student.fine_tuning.epochs // 4 or 1),
    )
    depth = next(t for t in plan.teachers if t.key == "depth")
    stranger = CommonStart(depth.start.architecture, depth.start.seed + 2 * 10**6)  # another random start
    apart = tuple(replace(t, start=stranger) if t is depth else t for t in plan.teachers)
    changes: dict[str, Amalgamation] = {
        "as usual": plan,
        "Eq. 5": replace(plan, loss="features"),
        "Eq. 5, common start": replace(plan, loss="features", start="common"),
        "blocks 1..n": replace(plan, train_prefix=True),
        "common start": replace(plan, start="common"),
        "decoder only": replace(plan, decoder_only=True),
        "soft targets": replace(plan, soft=True),
        "gates and 1×1": replace(plan, mix=True),
        "teacher's switches": replace(plan, switches="teacher"),
        "unrelated teachers": replace(plan, teachers=apart),
        "unrelated teachers, 1×1": replace(plan, teachers=apart, mix=True),
        "λ depth 1": replace(plan, weights=(("segmentation", 1.0), ("depth", 1.0))),
        "λ depth 16": replace(plan, weights=(("segmentation", 1.0), ("depth", 16.0))),
        "gates half closed": replace(plan, gain=1.0),
        "twice the epochs": replace(plan, blocks=replace(plan.blocks, epochs=2 * plan.blocks.epochs)),
    }
    return {name: (BranchedStudent(changed, short),) for name, changed in changes.items()}


def condition_rows(student: BranchedStudent) -> Rows:
    """Conditions under which the student might beat its teachers: teachers and student of each.

    A quarter of the labels, the teachers' steps as usual; and with it soft targets, fine-tuning twice as
    long, twice the unlabelled images (rooms only; the blocks take twice the steps, the fine-tuning as many as
    usual), or all of these together.
    """
    labels = max(1, student.data.labels()[0] // 4)
    single: Any = student.amalgamation.teachers  # one task each
    few = tuple(with_labels(teacher, labels) for teacher in single)
    less, tuning = replace(student.amalgamation, teachers=few), student.fine_tuning
    longer = replace(tuning, epochs=2 * tuning.epochs)
    conditions = {
        "": replace(student, amalgamation=less),
        ", soft targets": replace(student, amalgamation=replace(less, soft=True)),
        ", fine-tuned twice as long": replace(student, amalgamation=less, fine_tuning=longer),
    }
    if isinstance(student.data, RoomsData):
        rooms = replace(student.data, unlabelled=2 * student.data.unlabelled)
        many = replace(less, teachers=tuple(replace(teacher, data=rooms) for teacher in few))
        equal = replace(tuning, epochs=max(1, tuning.epochs // 2))
        conditions[", twice the rooms"] = replace(student, amalgamation=many, fine_tuning=equal)
        less = many  # its fine-tuning of the usual epochs is twice as long
        longer = tuning
    everything = replace(student, amalgamation=replace(less, soft=True), fine_tuning=longer)
    conditions[", all of these"] = everything
    rows: Rows = {}
    for also, changed in conditions.items():
        name = f"a quarter of the labels{also}"
        rows |= {f"{name}: teachers": changed.amalgamation.teachers, name: (changed,)}
    return rows


def study_student(
    profile: str | None = None, *, data: str = "rooms", data_root: str | None = None, seed: int = 0
) -> BranchedStudent:
    """The final student as the study trains it: on NYUDv2 at the profile's `study_size`.

    The arguments are those of `whole_game`, and its errors.
    """
    teachers = study_teachers(profile, data=data, data_root=data_root, seed=seed)
    return arrivals((("segmentation", "depth"),), teachers, profile)


def study_teachers(
    profile: str | None = None, *, data: str = "rooms", data_root: str | None = None, seed: int = 0
) -> dict[str, TaskTeacher]:
    """`task_teachers` as the studies train them: on NYUDv2 at the profile's `study_size`."""
    teachers = task_teachers(profile, data=data, data_root=data_root, seed=seed)
    size = profile_named(profile).study_size
    if data == "nyuv2" and size is not None:
        return {task: replace(t, data=replace(t.data, size=size)) for task, t in teachers.items()}
    return teachers


def two_teachers(
    rows: str,
    profile: str | None = None,
    *,
    data: str = "rooms",
    data_root: str | None = None,
    seed: int = 0,
) -> Rows:
    """The recipes of one group of rows, "core", "table", "baselines", "options" or "conditions", of one seed.

    Raises ValueError for another group, and as `whole_game`.
    """
    return of_group(GROUPS, rows)(study_student(profile, data=data, data_root=data_root, seed=seed))


GROUPS = {
    "core": core_rows,
    "table": table_rows,
    "baselines": baseline_rows,
    "options": option_rows,
    "conditions": condition_rows,
}
"""{name: the function that turns the final student's recipe into rows}."""
