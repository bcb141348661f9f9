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
from kamal_lib.ledger import verdict
from kamal_lib.metrics import SetMetric
from kamal_lib.tasks import Task

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "studies" / "results"
MACHINE = {"root", "street_root", "precision", "device"}
"""Fields of recipes that say where something ran, not what was asked."""


BETTER = {
    **dict.fromkeys(("miou", "pixel_acc", "delta1", "delta2", "delta3"), "max"),
    **dict.fromkeys(("abs_rel", "sqr_rel", "rmse", "log10", "angle_mean", "angle_median"), "min"),
    **dict.fromkeys(("within_11_25", "within_22_5", "within_30"), "max"),
}
"""{score: which direction is better}."""


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
    picked: dict[int, list[tuple[int, Tensor]]] = {}  # of each seed: (draw, how often each image occurs)
    for draw in range(draws):
        chosen = torch.randint(len(rows), (len(rows),), generator=generator).tolist()
        counts = [times(len(next(iter(rows[which].values()))), generator) for which in chosen]
        for place, which in enumerate(chosen):
            picked.setdefault(which, []).append((draw, counts[0 if shared_images else place]))
    found: dict[str, np.ndarray] = {}
    for which, each in picked.items():  # all resamples of a seed's images in one product
        matrix = torch.stack([count for _, count in each]).double()
        totals = {name: torch.tensordot(matrix, row, dims=1) for name, row in rows[which].items()}
        for i, (draw, _) in enumerate(each):
            for name, value in metric.scores({state: total[i] for state, total in totals.items()}).items():
                found.setdefault(name, np.zeros(draws))[draw] += float(value) / len(rows)
    return found


def of_task(scores: Mapping[str, Tensor], task: str) -> dict[str, Tensor]:
    """The states of one task's metric among the image-wise scores of a network (`recipes.ImageScores`)."""
    found = {name.removeprefix(f"{task}."): v for name, v in scores.items() if name.startswith(f"{task}.")}
    if not found:
        raise ValueError(f"no scores of {task!r} among {sorted(scores)}")
    return found


def times(images: int, generator: torch.Generator) -> Int[Tensor, " images"]:
    """How often each image occurs in one resample of all."""
    return torch.randint(images, (images,), generator=generator).bincount(minlength=images)


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of bootstrap draws: (low, high) percentiles."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Measurements:
    """The rows of a study's tables, all measured on the test images of their seeds.

    Every interval is that of `bootstrap`; two rows are compared on the seeds that both have, in equal draws.
    """

    def __init__(self, tasks: Mapping[str, Task], *, shared_images: bool, draws: int):
        self.tasks, self.shared_images, self.draws = dict(tasks), shared_images, draws
        self.scores: dict[str, dict[int, dict[str, float]]] = {}
        self._states: dict[tuple[str, str], dict[int, dict[str, Tensor]]] = {}
        self._drawn: dict[tuple[str, str, tuple[int, ...]], dict[str, np.ndarray]] = {}

    def add(self, row: str, seed: int, states: Mapping[str, Tensor]) -> None:
        """What a network adds up over its images (`recipes.ImageScores`); a row may have several networks."""
        for task in {name.split(".")[0] for name in states}:
            own = of_task(states, task)
            self._states.setdefault((row, task), {})[seed] = own
            sums = {name: value.double().sum(0) for name, value in own.items()}
            found = {k: float(v) for k, v in self.tasks[task].metric().scores(sums).items()}
            self.scores.setdefault(row, {}).setdefault(seed, {}).update(found)

    def score(self, row: str, metric: str) -> dict[str, Any]:
        """{"mean", "low", "high", "by_seed"} of a score over all seeds of the row."""
        seeds = tuple(self.scores[row])
        low, high = interval(self._draws(row, metric, seeds))
        by_seed = [self.scores[row][seed][metric] for seed in seeds]
        return {"mean": float(np.mean(by_seed)), "low": low, "high": high, "by_seed": by_seed}

    def resampled(self, row: str, metric: str) -> np.ndarray:
        """A score in every draw. Rows with equal seeds and images have equal draws, whatever their tasks."""
        return self._draws(row, metric, tuple(self.scores[row]))

    def compare(self, row: str, reference: str, metric: str, *, margin: float = 0.0) -> dict[str, Any]:
        """The paired difference of a score, `row` minus `reference`, and the verdict that `row` is better.

        With a `margin` above 0 the claim is "not worse by more than that share of the reference's mean".
        Raises ValueError where the two have no seed in common.
        """
        seeds = tuple(s for s in self.scores[row] if s in self.scores[reference])
        if not seeds:
            raise ValueError(f"{row!r} and {reference!r} have no seed in common")
        own, other = (self._draws(each, metric, seeds) for each in (row, reference))
        low, high = interval(own - other)
        by_seed = [self.scores[row][s][metric] - self.scores[reference][s][metric] for s in seeds]
        base = float(np.mean([self.scores[reference][s][metric] for s in seeds]))
        allowed = margin * base * (1 if BETTER[metric] == "max" else -1)
        found = {"row": row, "reference": reference, "metric": metric, "seeds": list(seeds), "margin": margin}
        found |= {"difference": float(np.mean(by_seed)), "low": low, "high": high, "by_seed": by_seed}
        return found | {"verdict": verdict(low + allowed, high + allowed, BETTER[metric])}

    def combine(self, name: str, signs: Mapping[str, int | float], metric: str) -> dict[str, Any]:
        """A sum of rows' scores, {row: factor}, such as a difference of differences, and whether it is good.

        As `compare`, with "row" the given name; the verdict is that the sum is on the metric's better side
        of 0. The rows must have the same seeds; raises ValueError where they have not.
        """
        if len({tuple(self.scores[row]) for row in signs}) != 1:
            raise ValueError(
                f"the rows {list(signs)} were not measured on the same seeds: give those that were"
            )
        seeds = list(self.scores[next(iter(signs))])
        low, high = interval(np.sum([f * self.resampled(row, metric) for row, f in signs.items()], axis=0))
        by_seed = [sum(f * self.scores[row][s][metric] for row, f in signs.items()) for s in seeds]
        found = {"row": name, "reference": "", "metric": metric, "seeds": seeds, "by_seed": by_seed}
        found |= {"difference": float(np.mean(by_seed)), "low": low, "high": high}
        return found | {"verdict": verdict(low, high, BETTER[metric])}

    def _draws(self, row: str, metric: str, seeds: tuple[int, ...]) -> np.ndarray:
        (task,) = (t for t in self.tasks if (row, t) in self._states and metric in self._names(t))
        if (row, task, seeds) not in self._drawn:
            states = [self._states[row, task][seed] for seed in seeds]
            self._drawn[row, task, seeds] = bootstrap(
                self.tasks[task].metric(), states, shared_images=self.shared_images, draws=self.draws
            )
        return self._drawn[row, task, seeds][metric]

    def _names(self, task: str) -> set[str]:
        row = next(row for row, t in self._states if t == task)
        sums = {k: v.double().sum(0) for k, v in next(iter(self._states[row, task].values())).items()}
        return set(self.tasks[task].metric().scores(sums))


def together(verdicts: Iterable[str]) -> str:
    """The verdict on a claim about several scores: holds if all do, "opposite seen" if one is, else open."""
    found = set(verdicts)
    return "opposite seen" if "opposite seen" in found else "holds" if found == {"holds"} else "open"
