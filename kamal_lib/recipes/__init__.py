"""Every trained model of the workbook: a frozen dataclass with its train function, and the profiles' numbers.

`whole_game(...)` gives the recipes of one run in the order in which they are needed: the teachers, the
student's blocks 1..N, the TargetNet. `load(recipe)` returns its network from the store, and trains it first
where the store has none. Without Jupyter: `python -m kamal_lib.recipes target_net --profile quick`.
"""

from kamal_lib.artifacts import Artifact, Recipe, default_store, load_or_train
from kamal_lib.recipes.amalgamation import (
    Amalgamation,
    BranchedStudent,
    CommonStart,
    Predictions,
    StudentBlock,
    TaskTeacher,
)
from kamal_lib.recipes.data import NYUv2Data, RoomsData, batches, scores, tasks_of
from kamal_lib.recipes.profiles import PROFILES, WholeGame, whole_game

__all__ = [
    "PROFILES",
    "Amalgamation",
    "BranchedStudent",
    "CommonStart",
    "NYUv2Data",
    "Predictions",
    "RoomsData",
    "StudentBlock",
    "TaskTeacher",
    "WholeGame",
    "batches",
    "load",
    "scores",
    "tasks_of",
    "trained",
    "whole_game",
]


def trained(recipe: Recipe) -> Artifact:
    """The recipe's artefact (weights, metrics, history) from the default store, trained first if need be."""
    return load_or_train(recipe, default_store())


def load(recipe):
    """The recipe's network in eval mode (for a block: student and codings), trained first if need be."""
    artifact = trained(recipe)
    return recipe.build(artifact.weights(), artifact.metrics)
