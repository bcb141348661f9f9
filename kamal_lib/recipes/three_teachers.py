"""Study `ka_three_teachers`: the rows of its tables as recipes, for one seed."""

from collections.abc import Mapping
from dataclasses import replace

from kamal_lib.recipes.profiles import arrivals
from kamal_lib.recipes.teachers import TaskTeacher
from kamal_lib.recipes.two_teachers import Rows, of_group, study_teachers

PARSING, DEPTH, NORMALS = "segmentation", "depth", "normals"
PAIR = (PARSING, DEPTH)


def core_rows(teachers: Mapping[str, TaskTeacher], profile: str | None) -> Rows:
    """Table 2: the teachers, TargetNet-2, and TargetNet-3 offline and online.

    Online has two students' steps behind it, TargetNet-2's and its own; so a further row gives the offline
    student twice the epochs of every block and of the fine-tuning, which is as many.
    """
    offline = arrivals((tuple(teachers),), teachers, profile)
    plan, tuning = offline.amalgamation, offline.fine_tuning
    longer = replace(plan, blocks=replace(plan.blocks, epochs=2 * plan.blocks.epochs))
    return {
        "teachers": tuple(teachers.values()),
        "TargetNet-2": (arrivals((PAIR,), teachers, profile),),
        "offline": (offline,),
        "offline, twice the steps": (
            replace(offline, amalgamation=longer, fine_tuning=replace(tuning, epochs=2 * tuning.epochs)),
        ),
        "online": (arrivals((PAIR, (NORMALS,)), teachers, profile),),
    }


def control_rows(teachers: Mapping[str, TaskTeacher], profile: str | None) -> Rows:
    """Students of one task and of the other pairs, taught in the same way with the same steps.

    A student of one task starts as its own teacher, so "offline" is also started from each of the other two.
    "TargetNet-2 taught again" is online without the newcomer: a copy of a copy, with as many steps.
    """
    chosen = {
        "parsing alone": (PARSING,),
        "depth alone": (DEPTH,),
        "normals alone": (NORMALS,),
        "parsing and normals": (PARSING, NORMALS),
        "depth and normals": (DEPTH, NORMALS),
    }
    rows: Rows = {row: (arrivals((tasks,), teachers, profile),) for row, tasks in chosen.items()}
    for start, name in ((DEPTH, "DepthNet"), (NORMALS, "NormNet")):
        offline = arrivals((tuple(teachers),), teachers, profile)
        plan = replace(offline.amalgamation, start=start)
        rows[f"offline, from {name}"] = (replace(offline, amalgamation=plan),)
    two = arrivals((PAIR,), teachers, profile)
    again = replace(two.amalgamation, teachers=(two,))
    return rows | {"TargetNet-2 taught again": (replace(two, amalgamation=again),)}


def order_rows(teachers: Mapping[str, TaskTeacher], profile: str | None) -> Rows:
    """Online in other orders of arrival; "one by one" has three students' steps behind it."""
    orders = {
        "online, depth last": ((PARSING, NORMALS), (DEPTH,)),
        "online, parsing last": ((DEPTH, NORMALS), (PARSING,)),
        "online, one by one": ((PARSING,), (DEPTH,), (NORMALS,)),
    }
    return {row: (arrivals(order, teachers, profile),) for row, order in orders.items()}


GROUPS = {"core": core_rows, "controls": control_rows, "orders": order_rows}
"""{name: the function that turns one seed's teachers into rows}."""


def three_teachers(
    rows: str,
    profile: str | None = None,
    *,
    data: str = "rooms",
    data_root: str | None = None,
    seed: int = 0,
) -> Rows:
    """The recipes of one group of rows, "core", "controls" or "orders", of one seed.

    Raises ValueError for another group, and as `task_teachers`.
    """
    return of_group(GROUPS, rows)(study_teachers(profile, data=data, data_root=data_root, seed=seed), profile)
