"""Study `teachers`: what labels buy. Three teachers, several numbers of labelled images, one seed."""

import math
from dataclasses import replace

from kamal_lib.recipes.data import in_steps
from kamal_lib.recipes.profiles import profile_named, task_teachers
from kamal_lib.recipes.teachers import TaskTeacher


def label_curve(
    profile: str | None = None, *, data: str = "rooms", data_root: str | None = None, seed: int = 0
) -> list[TaskTeacher]:
    """The teachers of one seed, by number of labels, then by task; the last are given every label there is.

    The numbers are the profile's, as far as there are images, and then all of the labelled and the unlabelled
    part. All teachers of a task take as many steps as the profile's own, whatever the number of labels: fewer
    labels are seen more often. On NYUDv2 the parts, and with them the last number, differ a little from seed
    to seed. Raises ValueError as `task_teachers`.
    """
    usual = task_teachers(profile, data=data, data_root=data_root, seed=seed)
    everything = usual["depth"].data.labels()[1]
    recipes = []
    for count in (*(c for c in profile_named(profile).label_counts if c < everything), everything):
        for teacher in usual.values():
            recipes.append(with_labels(teacher, count))
    return recipes


def with_labels(teacher: TaskTeacher, count: int) -> TaskTeacher:
    """The teacher with `count` labelled images and, to within an epoch, its own number of steps."""
    labelled, schedule = teacher.data.labels()[0], teacher.schedule
    steps = schedule.epochs * math.ceil(labelled / schedule.batch_size)
    # as many as the labelled part has: the teacher itself, the same artefact
    labels = None if count == labelled else count
    return replace(teacher, schedule=in_steps(schedule, steps, count), labels=labels)
