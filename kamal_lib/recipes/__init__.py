"""Every trained model of the workbook: a frozen dataclass with its train function, and the profiles' numbers.

`whole_game(...)` gives the recipes of one run in the order in which they are needed: the teachers, the
student's blocks 1..N, the TargetNet. `load(recipe)` returns its network from the store, and trains it first
where the store has none. Without Jupyter: `python -m kamal_lib.recipes target_net --profile quick`.
"""

from kamal_lib.artifacts import Artifact, Recipe, Watch, default_store, load_or_train
from kamal_lib.recipes.amalgamation import Amalgamation, BranchedStudent, StudentBlock
from kamal_lib.recipes.baselines import MultiHead, SelfDistilled
from kamal_lib.recipes.data import NYUv2Data, RoomsData, batches, scores, tasks_of
from kamal_lib.recipes.label_curve import label_curve
from kamal_lib.recipes.profiles import PROFILES, WEIGHTS, WholeGame, arrivals, task_teachers, whole_game
from kamal_lib.recipes.teachers import CommonStart, ImageScores, Inherited, Predictions, TaskTeacher
from kamal_lib.recipes.three_teachers import three_teachers
from kamal_lib.recipes.two_teachers import GROUPS, full_size, two_teachers

__all__ = [
    "GROUPS",
    "PROFILES",
    "WEIGHTS",
    "Amalgamation",
    "BranchedStudent",
    "CommonStart",
    "ImageScores",
    "Inherited",
    "MultiHead",
    "NYUv2Data",
    "Predictions",
    "RoomsData",
    "SelfDistilled",
    "StudentBlock",
    "TaskTeacher",
    "WholeGame",
    "arrivals",
    "batches",
    "full_size",
    "label_curve",
    "load",
    "scores",
    "task_teachers",
    "tasks_of",
    "three_teachers",
    "trained",
    "two_teachers",
    "whole_game",
]


def trained(recipe: Recipe, *, watch: Watch | None = None) -> Artifact:
    """The recipe's artefact (weights, metrics, history) from the default store, trained first if need be.

    `watch(history)` is called after each epoch of its training, not of that of its parents.
    """
    return load_or_train(recipe, default_store(), watch=watch)


def load(recipe, *, watch: Watch | None = None):
    """The recipe's network in eval mode (for a block: student and codings), trained first if need be."""
    artifact = trained(recipe, watch=watch)
    return recipe.build(artifact.weights(), artifact.metrics)
