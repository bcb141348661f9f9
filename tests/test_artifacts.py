"""The store keeps what was trained, notices whatever changed, and never publishes half an entry."""

import errno
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from kamal_lib import artifacts
from kamal_lib.artifacts import (
    Artifact,
    Recipe,
    Result,
    StoreError,
    Work,
    default_store,
    key,
    load_or_train,
    load_state,
    save_state,
)

STEPS_TAKEN: list[int] = []
"""The steps that `Walk.train` took in this process, in all its trainings."""


@pytest.fixture(autouse=True)
def no_steps_yet() -> None:
    STEPS_TAKEN.clear()


@dataclass(frozen=True)
class Stride:
    length: float = 0.1
    turns: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Walk(Recipe):
    """A random walk of four numbers, checkpointed after each step; the generator's state is part of it."""

    steps: int = 4
    seed: int = 0
    stride: Stride = Stride()

    def sources(self) -> tuple[ModuleType, ...]:
        return (artifacts,)

    def train(self, work: Work) -> Result:
        rng = torch.Generator().manual_seed(self.seed)
        place, history = torch.zeros(4), []
        if (found := load_state(work.folder / "walk.safetensors")) is not None:
            place, history = found[0]["place"], found[1]["history"]
            rng.set_state(found[0]["rng"])
        for step in range(len(history), self.steps):
            if step == int(os.environ.get("KILL_AT_STEP", "-1")):
                os.kill(os.getpid(), signal.SIGKILL)
            if step == int(os.environ.get("RAISE_AT_STEP", "-1")):
                raise FloatingPointError("the walk fell off")
            place = place + self.stride.length * torch.randn(4, generator=rng)
            history.append({"step": float(step), "norm": float(place.norm())})
            state = {"place": place, "rng": rng.get_state()}
            save_state(work.folder / "walk.safetensors", state, {"history": history})
            STEPS_TAKEN.append(step)
        return Result({"place": place}, {"norm": float(place.norm()), "per_axis": place.tolist()}, history)


@dataclass(frozen=True)
class Student(Recipe):
    """Sums what its teachers know: two kinds of parents, a field and a computed one."""

    teachers: tuple[Recipe, ...] = (Walk(),)
    block: int = 1
    stranger: bool = False

    def sources(self) -> tuple[ModuleType, ...]:
        return (artifacts,)

    def parents(self) -> tuple[Recipe, ...]:
        return (replace(self, block=self.block - 1),) if self.block > 1 else ()

    def name(self) -> str:
        return f"../Block {self.block:02d}"

    def train(self, work: Work) -> Result:
        parents = (*self.teachers, *self.parents(), *([Walk(seed=99)] if self.stranger else []))
        return Result({"sum": torch.stack([sum_of(work.load(p)) for p in parents]).sum()[None]}, {}, [])


@dataclass(frozen=True)
class Sourced(Walk):
    module: str = "json"

    def sources(self) -> tuple[ModuleType, ...]:
        return (importlib.import_module(self.module),)


@dataclass(frozen=True)
class Holds(Walk):
    value: Any = None


def sum_of(artifact: Artifact) -> torch.Tensor:
    return torch.stack([value.sum() for value in artifact.weights().values()]).sum()


def silent(recipe: Recipe, store: Path) -> Artifact:
    """load_or_train that must not print, for what is stored already."""

    def refuse(line: str) -> None:
        raise AssertionError(f"printed {line!r}")

    return load_or_train(recipe, store, progress=refuse)


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    """A second process that runs `code` with everything of this file imported."""
    return subprocess.Popen(
        [sys.executable, "-c", f"from pathlib import Path\nfrom {Path(__file__).stem} import *\n{code}"],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def make_module(folder: Path, monkeypatch: pytest.MonkeyPatch, path: str, source: str) -> Path:
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    monkeypatch.syspath_prepend(folder)
    return file


# The key


def test_the_key_is_the_hash_of_what_the_docstring_says() -> None:
    def digest(value: object) -> str:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    source = artifacts._code(Path(artifacts.__file__).read_bytes())
    stride = {"class": "Stride", "length": 0.1, "turns": [1, 2]}
    walk = {
        "config": {"class": "Walk", "steps": 4, "seed": 0, "stride": stride},
        "parents": [],
        "torch": torch.__version__.partition("+")[0],
        "sources": digest([source]),
    }
    assert key(Walk()) == digest(walk)
    teachers = [{"class": "Walk", "key": digest(walk)}]
    student = walk | {
        "config": {"class": "Student", "teachers": teachers, "block": 1, "stranger": False},
        "parents": [digest(walk)],
    }
    assert key(Student()) == digest(student)


def test_the_key_is_the_same_in_every_process() -> None:
    recipe = "Student((Walk(seed=1), Walk(seed=2)), block=3)"
    others = [python(f"print(key({recipe}))", PYTHONHASHSEED=seed) for seed in ("1", "2")]
    here = key(Student((Walk(seed=1), Walk(seed=2)), block=3))
    assert [other.communicate()[0].strip() for other in others] == [here, here]


@dataclass(frozen=True, repr=False)
class Silent(Walk):
    """Says nothing of its fields."""


@dataclass(frozen=True)
class Hiding(Walk):
    length: float = field(default=1.0, repr=False)


@pytest.mark.parametrize("recipe", [Silent(), Hiding()], ids=["class", "field"])
def test_a_recipe_that_hides_fields_has_no_key(recipe: Recipe) -> None:
    with pytest.raises(TypeError, match="hides fields from its repr, by which keys are told apart"):
        key(recipe)


def test_a_student_among_the_teachers_of_another_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve students, each the next one's teacher at each of five blocks: 60 keys, not 5^12."""
    last: Recipe = Walk()
    for _ in range(12):
        last = Student((last,), block=5)
    seen, real = [], artifacts._identity
    monkeypatch.setattr(artifacts, "_identity", lambda *given: seen.append(1) or real(*given))
    assert key(last) == key(replace(last))  # pyright: ignore
    assert len(seen) == 2 * (12 * 5 + 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Walk(seed=1), Walk(seed=2)),
        (Walk(), Walk(stride=Stride(length=0.2))),
        (Walk(), Walk(stride=Stride(turns=(2, 1)))),
        (Holds(value=1), Holds(value=1.0)),
        (Holds(value=1), Holds(value=True)),
        (Holds(value=None), Walk()),
        (Student((Walk(seed=1),)), Student((Walk(seed=2),))),
        (Student((Walk(seed=1),), block=3), Student((Walk(seed=2),), block=3)),
        (Student((Walk(), Walk(seed=1))), Student((Walk(seed=1), Walk()))),
    ],
)
def test_another_config_is_another_key(one: Recipe, other: Recipe) -> None:
    assert key(one) != key(other)
    assert key(one) == key(replace(one))  # pyright: ignore


def test_the_key_follows_a_grandparent_that_is_no_field(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(Student(block=3)), key(Student(block=1))
    first = replace(Student(block=1), stranger=True)
    monkeypatch.setattr(Student, "parents", lambda self: (first,) if self.block == 3 else ())
    assert key(Student(block=3)) != before[0]
    assert key(Student(block=1)) == before[1]


@pytest.mark.parametrize("path", ["rules.py", "rules/deep/module.py"])
def test_the_key_follows_the_code_of_the_sources(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "rules", raising=False)
    file = make_module(tmp_path, monkeypatch, path, "x = 1\n")
    before = key(Sourced(module="rules"))
    child = key(Student((Sourced(module="rules"),)))
    file.write_text('"""A module, now explained."""\nx  =  1  # with a comment\n')
    assert key(Sourced(module="rules")) == before
    file.write_text("x = 2\n")
    assert key(Sourced(module="rules")) != before
    assert key(Student((Sourced(module="rules"),))) != child
    monkeypatch.delitem(sys.modules, "rules")


def test_the_key_follows_torch_but_not_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for version in ("2.11.0+cpu", "2.11.0+cu132", "2.11.1+cpu"):
        monkeypatch.setattr(torch, "__version__", version)
        keys.append(key(Walk()))
    assert keys[0] == keys[1] != keys[2]


class Plain(Enum):
    A = 1


@dataclass
class Mutable:
    x: int = 1


@pytest.mark.parametrize(
    "value", [[1], {"a": 1}, {1}, Path("x"), torch.ones(1), Plain.A, float("nan"), float("inf"), 1j, ([],)]
)
def test_a_field_without_an_exact_json_form_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"Holds\.value(\[0\])? is .* must be None, bool, int, finite float"):
        key(Holds(value=value))


def test_what_can_change_later_is_refused() -> None:
    with pytest.raises(TypeError, match="Mutable is no frozen dataclass"):
        key(Holds(value=Mutable()))


def test_a_source_without_a_file_is_refused() -> None:
    with pytest.raises(TypeError, match="built-in"):
        key(Sourced(module="sys"))


# Trained once


def test_trained_once_and_then_loaded_in_silence(tmp_path: Path) -> None:
    said: list[str] = []
    recipe = Walk()
    made = load_or_train(recipe, tmp_path, progress=said.append)
    assert said == ["walk: trained in 0 s"]
    assert STEPS_TAKEN == [0, 1, 2, 3]
    found = silent(recipe, tmp_path)
    assert found == made
    assert STEPS_TAKEN == [0, 1, 2, 3]

    rng, place = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(4):
        place = place + 0.1 * torch.randn(4, generator=rng)
    assert torch.equal(found.weights()["place"], place)
    assert found.metrics == {"norm": float(place.norm()), "per_axis": place.tolist()}
    assert [row["step"] for row in found.history] == [0, 1, 2, 3]
    assert found.history[-1]["norm"] == float(place.norm())
    assert found.config == {
        "class": "Walk", "steps": 4, "seed": 0, "stride": {"class": "Stride", "length": 0.1, "turns": [1, 2]},
    }  # fmt: skip
    assert found.key == key(recipe)
    assert found.folder == tmp_path / f"walk-{found.key}"
    assert sorted(path.name for path in found.folder.iterdir()) == [
        "config.json", "history.csv", "metrics.json", "weights.safetensors",
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} <= {found.folder.name, f".{found.folder.name}.lock"}


def test_parents_are_trained_first_and_names_are_safe(tmp_path: Path) -> None:
    said: list[str] = []
    made = load_or_train(Student((Walk(), Walk(seed=1)), block=2), tmp_path, progress=said.append)
    assert [line.split(":")[0] for line in said] == ["walk", "walk", "Block-01", "Block-02"]
    assert made.folder.name == f"Block-02-{made.key}"
    walks = [sum_of(silent(Walk(seed=seed), tmp_path)) for seed in (0, 1)]
    assert sum_of(made).item() == pytest.approx(2 * sum(walks).item(), rel=1e-6)


def test_an_undeclared_parent_is_refused(tmp_path: Path) -> None:
    load_or_train(Walk(seed=99), tmp_path)
    with pytest.raises(ValueError, match=r"Walk\(.*seed=99.* is no declared parent"):
        load_or_train(Student(stranger=True), tmp_path)


@dataclass(frozen=True)
class Fixed(Walk):
    """Hands over what the test gives it, by name: tensors and rows cannot be fields."""

    what: str = ""

    def train(self, work: Work) -> Result:
        conv = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        weights = {"conv": conv.to(memory_format=torch.channels_last), "count": torch.tensor(7)}
        metrics: dict[str, Any] = {"missing": float("nan")}
        history: list[dict[str, float]] = [{"a, b": 1 / 3}, {"c": 1e-30, "a, b": 2.0}]
        if self.what == "aliased":
            weights["suffix"] = weights["conv"]
        if self.what == "tensor metric":
            metrics["loss"] = torch.ones(1)
        if self.what == "nothing":
            weights, history = {}, []
        return Result(weights, metrics, history)


def test_values_come_back_exactly(tmp_path: Path) -> None:
    made = load_or_train(Fixed(), tmp_path)
    conv = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.weights()["conv"], conv)
    assert made.weights()["count"] == torch.tensor(7)
    assert made.history == [{"a, b": 1 / 3}, {"c": 1e-30, "a, b": 2.0}]
    assert made.metrics["missing"] != made.metrics["missing"]
    empty = load_or_train(Fixed(what="nothing"), tmp_path)
    assert (empty.weights(), empty.history) == ({}, [])


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("aliased", ValueError, r"'conv' and 'suffix' share memory.*copy.deepcopy"),
        ("tensor metric", TypeError, "not JSON serializable"),
    ],
)
def test_a_result_that_cannot_be_stored_publishes_nothing(
    what: str, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        load_or_train(Fixed(what=what), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


# Damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def retouch(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sha256": {}}))


def claim(file: Path) -> None:
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 5'))


@pytest.mark.parametrize(
    ("name", "harm", "words"),
    [
        ("weights.safetensors", Path.unlink, "weights.safetensors"),
        ("weights.safetensors", truncate, "weights.safetensors has another checksum"),
        ("weights.safetensors", flip_a_bit, "weights.safetensors has another checksum"),
        ("metrics.json", flip_a_bit, "metrics.json has another checksum"),
        ("history.csv", Path.unlink, "history.csv"),
        ("history.csv", truncate, "history.csv has another checksum"),
        ("config.json", Path.unlink, "config.json"),
        ("config.json", truncate, "JSONDecodeError"),
        ("config.json", lambda file: file.write_text("[]"), "TypeError"),
        ("config.json", lambda file: file.write_bytes(b"\xff"), "UnicodeDecodeError"),
        ("config.json", retouch, "KeyError"),
        ("config.json", claim, f"its config.json is that of walk-{key(Walk(seed=5))}"),
    ],
)
def test_a_damaged_entry_is_said_and_rebuilt(name: str, harm: Any, words: str, tmp_path: Path) -> None:
    made = load_or_train(Walk(), tmp_path)
    weights = {name: value.clone() for name, value in made.weights().items()}
    harm(made.folder / name)
    with pytest.warns(UserWarning, match=words) as said:
        rebuilt = load_or_train(Walk(), tmp_path)
    assert len(said) == 1
    assert STEPS_TAKEN == [0, 1, 2, 3] * 2
    assert rebuilt == made
    assert torch.equal(rebuilt.weights()["place"], weights["place"])
    assert (tmp_path / f"{made.folder.name}.damaged").is_dir()
    assert silent(Walk(), tmp_path) == made
    harm(made.folder / name)
    with pytest.warns(UserWarning, match=words):
        assert load_or_train(Walk(), tmp_path) == made


def test_a_folder_renamed_by_hand_is_not_believed(tmp_path: Path) -> None:
    wrong = load_or_train(Walk(seed=5), tmp_path)
    wrong.folder.rename(tmp_path / f"walk-{key(Walk())}")
    with pytest.warns(UserWarning, match=f"config.json is that of walk-{wrong.key}"):
        right = load_or_train(Walk(), tmp_path)
    assert right.config["seed"] == 0
    assert not torch.equal(right.weights()["place"], torch.zeros(4))


# Interruptions


def test_a_killed_training_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    store, other = tmp_path / "killed", tmp_path / "whole"
    killed = python(f"load_or_train(Walk(), Path({str(store)!r}))", KILL_AT_STEP="2")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert not (store / f"walk-{key(Walk())}").exists()
    resumed = load_or_train(Walk(), store)
    assert STEPS_TAKEN == [2, 3]
    whole = load_or_train(Walk(), other)
    assert STEPS_TAKEN == [2, 3, 0, 1, 2, 3]
    for file in artifacts.FILES:
        assert (resumed.folder / file).read_bytes() == (whole.folder / file).read_bytes()
    assert list(store.glob(".*.work")) == []


def test_an_exception_publishes_nothing_and_keeps_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAISE_AT_STEP", "3")
    with pytest.raises(FloatingPointError, match="fell off") as caught:
        load_or_train(Walk(), tmp_path)
    assert caught.value.__context__ is None  # that the store had no entry is no part of the story
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    monkeypatch.delenv("RAISE_AT_STEP")
    load_or_train(Walk(), tmp_path)
    assert STEPS_TAKEN == [0, 1, 2, 3]


def test_a_kill_while_the_entry_is_written_leaves_no_half_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: Path, *args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", die)  # config.json, the last file
        with pytest.raises(KeyboardInterrupt):
            load_or_train(Walk(), tmp_path)
    assert list(tmp_path.glob(".*.new"))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    load_or_train(Walk(), tmp_path)
    assert STEPS_TAKEN == [0, 1, 2, 3]
    assert list(tmp_path.glob(".*.new")) == []


@pytest.mark.parametrize("killed_in", ["rmtree", "replace"])
def test_a_kill_before_the_last_steps_leaves_nothing_over(
    killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work's folder is removed, then the entry moved: what is complete is not trained again."""

    def die(path: Path, *args: object, **options: object) -> None:
        if path.suffix == (".work" if killed_in == "rmtree" else ".new"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((artifacts.shutil, "rmtree") if killed_in == "rmtree" else (Path, "replace")), die)
        with pytest.raises(KeyboardInterrupt):
            load_or_train(Fixed(), tmp_path)
    made = silent(Fixed(), tmp_path)
    assert made.weights()["count"] == torch.tensor(7)
    assert [path.name for path in tmp_path.glob(".*") if path.suffix != ".lock"] == []


@dataclass(frozen=True)
class Slow(Walk):
    """Trains until the file `go` appears beside the store."""

    def train(self, work: Work) -> Result:
        beside = work.folder.parent.parent
        with (beside / "trainings").open("a") as file:
            file.write(f"{os.getpid()}\n")
        deadline = time.monotonic() + 60
        while not (beside / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return super().train(work)


def test_two_processes_train_once(tmp_path: Path) -> None:
    store, said = tmp_path / "store", []
    first = python(f"load_or_train(Slow(), Path({str(store)!r}))")
    while not (tmp_path / "trainings").exists() and first.poll() is None:
        time.sleep(0.01)

    def say(line: str) -> None:
        said.append(line)
        (tmp_path / "go").touch()

    made = load_or_train(Slow(), store, progress=say)
    assert first.communicate()[0].startswith("slow: trained in ")
    assert first.returncode == 0
    assert said == [f"slow-{made.key}: another process is training it, waiting for it to finish"]
    assert (tmp_path / "trainings").read_text() == f"{first.pid}\n"
    assert STEPS_TAKEN == []
    assert made == silent(Slow(), store)


# A store that cannot be written


def test_a_store_that_cannot_be_made_says_where_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = tmp_path / "file" / "store"
    with pytest.raises(StoreError, match="KAMAL_STORE") as caught:
        load_or_train(Walk(), store)
    assert str(store) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert STEPS_TAKEN == []


@pytest.mark.parametrize("stored", ["nothing", "damaged"])
def test_a_read_only_store_says_where_and_what_to_do(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs the tests may be root, whom no mode of a folder stops: the system calls refuse instead."""
    if stored == "damaged":
        truncate(load_or_train(Walk(), tmp_path).folder / "weights.safetensors")
    taken, opened = len(STEPS_TAKEN), os.open

    def refuse(path: Any, *others: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    def read_only(path: Any, flags: int, *others: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return opened(path, flags, *others, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        for call in ("mkdir", "rename", "replace", "unlink"):
            patch.setattr(os, call, refuse)
        with pytest.raises(StoreError, match=r"cannot write in .*Read-only file system.*KAMAL_STORE"):
            load_or_train(Walk(), tmp_path)
    assert len(STEPS_TAKEN) == taken


@dataclass(frozen=True)
class Big(Walk):
    def train(self, work: Work) -> Result:
        return Result({"big": torch.zeros(100_000)}, {}, [])


def test_a_full_store_publishes_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # a limit on file sizes stands for a full disk
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(StoreError, match="KAMAL_STORE") as caught:
            load_or_train(Big(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert not (tmp_path / f"big-{key(Big())}").exists()
    assert load_or_train(Big(), tmp_path).weights()["big"].shape == (100_000,)


def test_an_error_of_the_recipe_is_not_blamed_on_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_data(self: Walk, work: Work) -> Result:
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr(Walk, "train", no_data)
    with pytest.raises(FileNotFoundError, match="no such data set"):
        load_or_train(Walk(), tmp_path)


def test_a_stored_artefact_needs_no_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load_or_train(Walk(), tmp_path)

    def refuse(self: Path, *args: object, **options: object) -> None:
        raise PermissionError(f"{self} is read-only")

    for write in ("mkdir", "write_bytes", "write_text", "replace", "touch"):
        monkeypatch.setattr(Path, write, refuse)
    before = tmp_path.stat().st_mtime_ns
    assert silent(Walk(), tmp_path) == made
    assert tmp_path.stat().st_mtime_ns == before


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAMAL_STORE", str(tmp_path))
    assert default_store() == tmp_path
    monkeypatch.setenv("KAMAL_STORE", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(artifacts, "__file__", str(tmp_path / "project" / "kamal_lib" / "artifacts.py"))
    assert default_store() == tmp_path / "home" / ".cache" / "kamal"
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "pyproject.toml").touch()
    assert default_store() == tmp_path.resolve() / "project" / "data" / "store"


# Watching


@dataclass(frozen=True)
class Watched(Walk):
    parent: Recipe | None = None

    def train(self, work: Work) -> Result:
        result = super().train(work)
        if work.watch is not None:
            work.watch(result.history)
        return result


def test_a_watch_reaches_the_recipe_asked_for_and_no_key(tmp_path: Path) -> None:
    seen: list[Any] = []
    recipe = Watched(seed=2, parent=Watched(seed=1))
    made = load_or_train(recipe, tmp_path, watch=seen.append)
    assert seen == [made.history]
    assert silent(recipe, tmp_path) == made
    assert load_or_train(recipe, tmp_path, watch=seen.append) == made
    assert len(seen) == 1


# Checkpoints


def test_a_checkpoint_comes_back_and_is_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    assert load_state(path) is None
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "rng": torch.Generator().get_state()}
    for step in (1, 2):
        save_state(path, tensors, {"step": step, "loss": [0.1, None]})
    found = load_state(path)
    assert found is not None
    assert found[1] == {"step": 2, "loss": [0.1, None]}
    assert found[0].keys() == tensors.keys()
    assert all(torch.equal(found[0][name], tensors[name]) for name in tensors)
    assert torch.equal(safetensors.torch.load_file(path)["a"], tensors["a"])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.ones(3)}, {"step": 1})
    written = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        written(self, content[: len(content) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(KeyboardInterrupt):
            save_state(path, {"a": torch.zeros(3)}, {"step": 2})
    found = load_state(path)
    assert found is not None
    assert found[1] == {"step": 1}
    assert torch.equal(found[0]["a"], torch.ones(3))


@pytest.mark.parametrize(
    "harm",
    [
        truncate,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\0" * 64),
        lambda file: file.write_bytes(safetensors.torch.save({"a": torch.ones(1)})),
        lambda file: file.write_bytes(safetensors.torch.save({"a": torch.ones(1)}, {"extra": "{"})),
    ],
    ids=["truncated", "empty", "zeros", "no extra", "bad extra"],
)
def test_a_damaged_checkpoint_is_said_and_ignored(harm: Any, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.ones(3)}, {})
    harm(path)
    with pytest.warns(UserWarning, match=r"state\.safetensors: damaged"):
        assert load_state(path) is None


def test_tensors_that_share_memory_are_refused(tmp_path: Path) -> None:
    suffix = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="'teacher' and 'target' share memory"):
        save_state(tmp_path / "x", {"teacher": suffix, "target": suffix.detach()}, {})
    save_state(tmp_path / "x", {"teacher": suffix, "target": suffix.clone()}, {})
    save_state(tmp_path / "x", {"none": torch.zeros(0), "nothing": torch.zeros(0)}, {})


def test_a_checkpoint_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="KAMAL_STORE") as caught:
        save_state(tmp_path / "file" / "x", {"a": torch.ones(1)}, {})
    assert isinstance(caught.value.__cause__, OSError)
