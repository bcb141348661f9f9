"""Two processes train as one: gradients, weights, metrics, the store, and how they end when one fails.

The tests start `torchrun` on this very file; what a process then does is one of the functions at its end.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_engine import TASKS, Small, Toy
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kamal_lib import artifacts, engine
from kamal_lib.artifacts import Recipe, Result, Work, load_or_train, save_state
from kamal_lib.data.loaders import loader
from kamal_lib.distill.amalgamation import BlockObjective
from kamal_lib.engine import Schedule, evaluate, fit, make_fabric, mean_losses, share
from kamal_lib.metrics import DepthErrors, SegmentationScores
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.encoder_decoder import Architecture, build_network
from kamal_lib.tasks import DirectObjective

SCHEDULE = Schedule(epochs=2, batch_size=4, learning_rate=0.01, clip=0.5, device="cpu")


def torchrun(part: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes that each do `part`, with what they print."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launch, __file__, part, str(folder)],
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "KAMAL_QUIET": "1"}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,  # minutes on a busy machine; a process that hangs takes ten
        check=False,
    )


def told(folder: Path, rank: int) -> dict[str, Any]:
    """What a process wrote down."""
    return json.loads((folder / f"{rank}.json").read_text())


# Training and metrics: one run of two processes for all of these


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    done = torchrun("training", folder)
    assert done.returncode == 0, done.stdout
    assert "Warning" not in done.stdout
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["network", "block"])
def test_gradients_are_those_of_one_process(trained: Path, kind: str, accumulate: int) -> None:
    """Ten images in total batches of 4, 4 and 2; norm layers in eval mode, in float64.

    A whole network, and block 2 of a student coded into its teacher.
    """
    steps, history = gradients_of_a_fit(kind, accumulate)
    assert any(float(gradient.abs().max()) > 1e-4 for gradient in steps.values())
    for rank in (0, 1):
        found = load_file(trained / f"gradients-{kind}-{accumulate}-{rank}.safetensors")
        assert found.keys() == steps.keys()
        for name, value in steps.items():
            assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-12), name
        assert told(trained, rank)[f"history-{kind}-{accumulate}"] == [pytest.approx(row) for row in history]


@pytest.mark.slow
def test_both_processes_end_with_the_same_weights_and_history(trained: Path) -> None:
    """Norm layers in training mode: their statistics differ while training, and are those of process 0."""
    first, second = (load_file(trained / f"weights-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == Small().state_dict().keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert told(trained, 0)["history"] == told(trained, 1)["history"]


@pytest.mark.slow
def test_only_process_0_writes_and_both_go_on_from_what_it_wrote(trained: Path) -> None:
    assert [told(trained, rank)["writes"] > 0 for rank in (0, 1)] == [True, False]
    for rank in (0, 1):
        whole = load_file(trained / f"weights-{rank}.safetensors")
        resumed = load_file(trained / f"resumed-{rank}.safetensors")
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
        assert told(trained, rank)["resumed"] == told(trained, rank)["history"]


@pytest.mark.slow
@pytest.mark.parametrize("images", ["shares", "whole"])
def test_scores_are_those_of_one_process(trained: Path, images: str) -> None:
    """Eleven images are six and five; in batches of 4 these are 4, 2 and 4, 1."""
    assert told(trained, 0)[images] == told(trained, 1)[images]
    assert told(trained, 0)[images] == pytest.approx(scores(1, 0), rel=1e-6)


@pytest.mark.slow
def test_metrics_of_unequal_batches_are_those_of_one_process(trained: Path) -> None:
    expected = unequal_metrics([0, 1])
    for rank in (0, 1):
        assert told(trained, rank)["metrics"] == pytest.approx(expected, rel=1e-6)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert share(SCHEDULE) == {"batch_size": 4, "num_replicas": 1, "rank": 0}
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert share(replace(SCHEDULE, batch_size=6)) == {"batch_size": 2, "num_replicas": 3, "rank": 2}
    with pytest.raises(ValueError, match="a batch of 4 images does not divide among 3 processes"):
        share(SCHEDULE)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RuntimeError, match="torchrun started 2 processes, but torch sees 1 GPUs"):
        make_fabric()


# The store


@dataclass(frozen=True)
class Trained(Recipe):
    """A few steps of training, on top of another one if there is a parent."""

    seed: int = 0
    parent: "Trained | None" = None
    fails: str = ""

    def sources(self) -> tuple[ModuleType, ...]:
        return (engine,)

    def train(self, work: Work) -> Result:
        rank = os.environ.get("RANK")
        with (work.folder.parent / f"trainings-{rank}").open("a") as file:
            file.write(f"{self.seed}\n")
        if self.fails == f"before {rank}":
            raise FloatingPointError(f"the training of process {rank} fell off")
        network = Small(self.seed)
        if self.parent is not None:
            network.load_state_dict(work.load(self.parent).weights())
        objective = DirectObjective(network, TASKS)

        def watch(history: list) -> None:
            if self.fails == f"during {rank}":
                raise FloatingPointError(f"the training of process {rank} fell off")

        checkpoint = work.folder / "training.safetensors"
        history = fit(
            objective,
            loader(Toy(), shuffle=True, seed=5, **share(SCHEDULE)),
            SCHEDULE,
            fabric=make_fabric("cpu"),
            checkpoint=checkpoint,
            watch=watch,
        )
        return Result(network.state_dict(), {}, history)


@pytest.mark.slow
def test_the_store_in_two_processes(tmp_path: Path) -> None:
    """Cold with a parent, warm, found damaged, refused by process 0: all in one run, none of them hangs."""
    done = torchrun("storing", tmp_path)
    assert done.returncode == 0, done.stdout
    first, second = told(tmp_path, 0), told(tmp_path, 1)
    assert [line.rsplit(" in ", 1)[0] for line in first["progress"]] == ["trained: trained"] * 3
    assert second["progress"] == []
    for rank in (0, 1):  # the parent, the recipe, the recipe once more after its damage
        assert (tmp_path / "store" / f"trainings-{rank}").read_text().split() == ["1", "2", "2"]
    assert first["loaded"] == second["loaded"]
    assert len(set(first["loaded"])) == 1
    assert first["failed"].startswith("StoreError: cannot write in")
    assert second["failed"].startswith("RuntimeError: process 0 failed: StoreError: cannot write in")
    assert first["again"] == second["again"] == first["loaded"][0]
    left = sorted(path.name for path in (tmp_path / "store").glob(".*") if path.suffix != ".lock")
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["before 0", "during 0", "during 1"])
def test_when_one_process_fails_all_end(fails: str, tmp_path: Path) -> None:
    """The others wait for it in a collective operation of the training, or for its word."""
    done = torchrun("failing", tmp_path, FAILS=fails)  # in time
    assert done.returncode != 0
    assert f"the training of process {fails[-1]} fell off" in done.stdout
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("trained-")]
    ended = sorted(path.name for path in tmp_path.glob("ended-*"))
    assert f"ended-{fails[-1]}" in ended


# What each of the two processes does


def block_2() -> BlockObjective:
    """Block 2 of a student, coded into a teacher with open gates that are not all the same."""
    small = Architecture((4, 6), (1, 1), (True, True))
    student, teacher = build_network(small, {}, seed=1), build_network(small, {"segmentation": 3}, seed=2)
    coding = ChannelCoding(6)
    torch.manual_seed(3)
    torch.nn.init.normal_(coding.expand.weight)
    parts = (student, {"segmentation": teacher.eval()}, {"segmentation": coding}, 2)
    return BlockObjective(*parts, tasks=TASKS, weights={"segmentation": 2.0})


def gradients_of_a_fit(kind: str, accumulate: int) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """{step and parameter: gradient}, as the optimiser saw them, and the history."""

    class Exact(nn.Module):
        """In float64, with norm layers in eval mode."""

        def __init__(self) -> None:
            super().__init__()
            self.objective = (block_2() if kind == "block" else DirectObjective(Small(), TASKS)).double()

        def train(self, mode: bool = True) -> "Exact":
            return super().train(False)

        def forward(self, batch: Any) -> dict[str, Tensor]:
            return self.objective(batch | {"image": batch["image"].double()})

    objective = Exact()
    seen: dict[str, Tensor] = {}
    with spied_steps(seen, dict(objective.named_parameters())):
        history = fit(
            objective,
            loader(Toy(), shuffle=True, seed=5, **share(SCHEDULE)),
            replace(SCHEDULE, accumulate=accumulate),
            fabric=make_fabric("cpu"),
        )
    return seen, history


@contextmanager
def spied_steps(seen: dict[str, Tensor], parameters: dict[str, Tensor]) -> Iterator[None]:
    def spy(*_: Any) -> None:
        step = len(seen) // len(parameters)
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            seen[f"{step} {name}"] = parameter.grad.clone()

    handle = register_optimizer_step_pre_hook(spy)
    try:
        yield
    finally:
        handle.remove()


def scores(num_replicas: int, rank: int) -> dict[str, float]:
    """Metrics and mean losses of one network over eleven images, of which this process sees its share."""
    images = loader(Toy(11), batch_size=4, shuffle=False, seed=0, num_replicas=num_replicas, rank=rank)
    fabric, network = make_fabric("cpu"), Small()
    losses = mean_losses(DirectObjective(network, TASKS), images, fabric=fabric)
    return losses | evaluate(network, images, TASKS, fabric=fabric)


def unequal_metrics(ranks: list[int]) -> dict[str, float]:
    """The metrics over the batches of the given processes, which have 3 and 1, of 1 to 3 images."""
    segmentation, depth = SegmentationScores(3), DepthErrors()
    for rank in ranks:
        generator = torch.Generator().manual_seed(rank)
        for size in ([2, 1, 3], [2])[rank]:
            labels = torch.randint(0, 3, (2, size, 4, 5), generator=generator)
            metres = torch.rand(2, size, 4, 5, generator=generator) + 0.5
            segmentation.update(labels[0], labels[1])
            depth.update(metres[0], metres[1])
    return {name: float(value) for name, value in (segmentation.compute() | depth.compute()).items()}


def training(folder: Path, rank: int) -> dict[str, Any]:
    """Fits and metrics."""
    found: dict[str, Any] = {"writes": 0}
    for kind, accumulate in product(("network", "block"), (1, 2)):
        run = f"{kind}-{accumulate}"
        steps, found[f"history-{run}"] = gradients_of_a_fit(kind, accumulate)
        save_state(folder / f"gradients-{run}-{rank}.safetensors", steps, {})

    real = engine.save_state

    def counting(*arguments: Any) -> None:
        found["writes"] += 1
        real(*arguments)

    engine.save_state = counting

    class WatchError(Exception):
        """What the first watch raises."""

    def once(history: list) -> None:
        raise WatchError

    def one(name: str, **options: Any) -> list[dict[str, float]]:
        network = Small(seed=rank)  # process 0 gives its own to the other
        history = fit(
            DirectObjective(network, TASKS),
            loader(Toy(), shuffle=True, seed=5, **share(SCHEDULE)),
            SCHEDULE,
            fabric=make_fabric("cpu"),
            **options,
        )
        save_state(folder / f"{name}-{rank}.safetensors", network.state_dict(), {})
        return history

    found["history"] = one("weights")
    checkpoint = folder / "state.safetensors"
    with pytest.raises(WatchError):
        one("none", checkpoint=checkpoint, watch=once)
    found["resumed"] = one("resumed", checkpoint=checkpoint, save_every=0.0)
    return found | {"shares": scores(2, rank), "whole": scores(1, 0), "metrics": unequal_metrics([rank])}


def storing(folder: Path, rank: int) -> dict[str, Any]:
    """The same calls of load_or_train in both processes."""
    store, said, loaded = folder / "store", [], []
    recipe = Trained(2, parent=Trained(1))

    def load(place: Path) -> str:
        made = load_or_train(recipe, place, progress=said.append)
        return str({name: value.flatten().tolist() for name, value in made.weights().items()})

    loaded += [load(store), load(store)]
    torch.distributed.barrier()
    if rank == 0:
        next(store.glob(f"trained-{artifacts.key(recipe)}/metrics.json")).write_text("{ }")
    torch.distributed.barrier()
    loaded.append(load(store))
    (folder / "file").touch()
    with pytest.raises(Exception, match="cannot write in") as caught:
        load(folder / "file" / "store")
    failed = f"{caught.type.__name__}: {caught.value}"
    return {"progress": said, "loaded": loaded, "failed": failed, "again": load(store)}


def failing(folder: Path, rank: int) -> dict[str, Any]:
    """A recipe that fails in one process only."""
    try:
        load_or_train(Trained(fails=os.environ["FAILS"]), folder)
    finally:
        (folder / f"ended-{rank}").touch()
    return {}


if __name__ == "__main__":
    _, part, place = sys.argv
    own = int(os.environ["RANK"])
    result = {"training": training, "storing": storing, "failing": failing}[part](Path(place), own)
    (Path(place) / f"{own}.json").write_text(json.dumps(result))
