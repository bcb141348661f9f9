"""What a study leaves behind: its rule, runs and intervals, one committed JSON file a study and profile."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kamal_lib.artifacts import Recipe
from kamal_lib.metrics import SetMetric, resampled

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "studies" / "results"
MACHINE = {"root", "precision", "device"}
"""Fields of recipes that say where something ran, not what was asked."""


def config_hash(recipe: Recipe) -> str:
    """Sixteen hex digits of all fields of a recipe and its parents, but for those of the machine.

    Unlike an artefact's key it leaves out code and versions: results stay those of their recipe when a
    function is written better, and the revision beside them says which code it was.
    """

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: kept(each) for name, each in value.items() if name not in MACHINE}
        return [kept(each) for each in value] if isinstance(value, tuple | list) else value

    fields = {"class": type(recipe).__qualname__, **kept(asdict(recipe))}  # pyright: ignore[reportArgumentType]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def committed(study: str, profile: str = "quick", *, folder: Path = RESULTS) -> dict[str, Any]:
    """The results of a study: {"study", "profile", "data": {data set: section}}.

    Raises FileNotFoundError where the study has not been run at this profile.
    """
    path = folder / f"{study}.{profile}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*.json"))) or "none"
        raise FileNotFoundError(
            f"no results {path.name}, there are: {there}. "
            f"Run: python -m kamal_lib.report --study {study} --profile {profile}"
        )
    return json.loads(path.read_text("utf-8"))


def record(
    study: str, profile: str, data: str, section: Mapping[str, Any], *, folder: Path = RESULTS
) -> Path:
    """Puts a data set's section into the study's file, in the place of the one before; returns its path.

    A section gives way only to one that has all of its runs: a trial with fewer seeds goes into a file of its
    own, NAME.<profile>.trial.json. The earlier section's `attempts` are kept in front of the new one's.
    """
    path = folder / f"{study}.{profile}.json"
    found = committed(study, profile, folder=folder) if path.is_file() else {"data": {}}
    old, new_runs = found["data"].get(data, {}), {run["config"] for run in section["runs"]}
    if {run["config"] for run in old.get("runs", [])} - new_runs:
        path, found, old = path.with_suffix(".trial.json"), {"data": {}}, {}
    before = old.get("attempts", [])
    new = {**section, "attempts": [*before, *section.get("attempts", [])]}
    content = {"study": study, "profile": profile, "data": {**found["data"], data: new}}
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
    draft.replace(path)
    return path


def stale(section: Mapping[str, Any], recipes: Iterable[Recipe]) -> list[str]:
    """The hashes of today's recipes that a section has no run of; empty where the results are up to date."""
    measured = {run["config"] for run in section["runs"]}
    return sorted({config_hash(recipe) for recipe in recipes} - measured)


def bootstrap(
    metric: SetMetric,
    states: Sequence[Mapping[str, Tensor]],
    *,
    shared_images: bool,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """{score: its value in each draw}, where a draw resamples the seeds and the images.

    With `shared_images` all seeds were measured on the same images, and a draw takes one resample of them for
    all; without, each seed has images of its own, resampled apart. (Shared images that are resampled apart
    make intervals too narrow: what one resample has too much of, another lacks.)

    `states` holds, for each seed, what the metric added up image by image (`metrics.image_states`). Equal
    shapes and an equal `seed` give equal draws, so that differences between two methods are paired.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [{name: each.double() for name, each in one.items()} for one in states]
    values: list[list[dict[str, float]]] = []
    for _ in range(draws):
        chosen = torch.randint(len(rows), (len(rows),), generator=generator).tolist()
        picked = [times(len(next(iter(rows[which].values()))), generator) for which in chosen]
        picked = picked[:1] * len(picked) if shared_images else picked
        values.append(
            [resampled(metric, rows[which], own) for which, own in zip(chosen, picked, strict=True)]
        )
    return {
        name: np.array([[one[name] for one in scores] for scores in values]).mean(1) for name in values[0][0]
    }


def times(images: int, generator: torch.Generator) -> Int[Tensor, " images"]:
    """How often each image occurs in one resample of all."""
    return torch.randint(images, (images,), generator=generator).bincount(minlength=images)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of bootstrap draws: (low, high) percentiles."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
