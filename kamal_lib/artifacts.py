"""The artefact store: every trained thing is described by a recipe, trained once, and kept under a key.

A `Recipe` is a frozen dataclass. Its key is a hash of everything the result depends on, so a changed number,
parent, torch version or library source is another entry and never a silent mixture. An entry is a folder
`NAME-KEY/` with `weights.safetensors`, `history.csv`, `metrics.json` and `config.json`; nothing is pickled.
`save_state` and `load_state` keep the checkpoints from which an interrupted training goes on.
"""

import ast
import csv
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kamal_lib.processes import Line

Watch = Callable[[list[dict[str, float]]], object]

FILES = ("weights.safetensors", "history.csv", "metrics.json")


class StoreError(RuntimeError):
    """The store cannot be written; the `OSError` that says why is its cause."""


class DamagedError(Exception):
    """An entry of the store is not whole, or not that of its recipe. Nobody outside this module meets it."""


@dataclass(frozen=True)
class Result:
    """What a training hands over: state dict, JSON-able metrics, one row of numbers per epoch or step."""

    weights: dict[str, Tensor]
    metrics: dict[str, Any]
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Artifact:
    """One entry of the store, its checksums verified. `config` holds the recipe's fields as JSON."""

    folder: Path
    key: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    history: list[dict[str, float]]

    def weights(self) -> dict[str, Tensor]:
        """The state dict, on the CPU, read from disk at each call."""
        return safetensors.torch.load_file(self.folder / "weights.safetensors")


@dataclass(frozen=True)
class Work:
    """What a recipe trains with: a folder for its checkpoints, which outlives a kill, and parents by key.

    `watch` wants to be called with the history so far after each epoch; it is no part of any key.
    """

    folder: Path
    parents: Mapping[str, Artifact]
    watch: Watch | None = None
    known: dict[str, str] = field(default_factory=dict)
    """Keys by repr, see `key`."""

    def load(self, parent: "Recipe") -> Artifact:
        """The artefact of a parent. Raises ValueError for a recipe that was not declared as one."""
        if (name := key(parent, self.known)) in self.parents:
            return self.parents[name]
        raise ValueError(f"{parent!r} is no declared parent: make it a field, or return it from parents()")


@runtime_checkable
class Recipe(Protocol):
    """How one thing is trained: derive a frozen dataclass from it.

    Its fields hold None, bool, int, finite float, str, tuples and frozen dataclasses of these, and other
    recipes, which are parents.
    """

    @abstractmethod
    def train(self, work: Work) -> Result:
        """Train, or go on from the checkpoints in `work.folder`."""

    @abstractmethod
    def sources(self) -> tuple[ModuleType, ...]:
        """The modules that the result depends on; a package stands for all its files."""

    def parents(self) -> tuple["Recipe", ...]:
        """Recipes that this one builds on and that are not among its fields."""
        return ()

    def name(self) -> str:
        """What people read in the store and in the printed lines."""
        return type(self).__name__.lower()


def key(recipe: Recipe, known: dict[str, str] | None = None) -> str:
    """Sixteen hex digits that stand for all that the recipe's result depends on.

    `known` collects the keys of the recipe and its ancestors by their repr: a student among the teachers of
    another has the same ones at every block. Raises TypeError for a field that has no exact JSON form, and
    for a source module without a file.
    """
    known = {} if known is None else known
    if (said := repr(recipe)) not in known:  # not by ==, for which 1, 1.0 and True are one
        known[said] = _digest(_identity(recipe, {}, known))
    return known[said]


def load_or_train(
    recipe: Recipe,
    store: Path,
    *,
    progress: Callable[[str], object] = print,
    watch: Watch | None = None,
) -> Artifact:
    """The recipe's artefact: loaded if the store has it, else trained, parents first, and stored.

    A damaged entry is warned about, moved aside and rebuilt. A second process waits for the first. A training
    that was killed or that raised goes on from its checkpoints at the next call. After an edit of library
    sources restart Python first: the key reads the files, the training runs what was imported.

    `watch` is handed to the recipe's own training, not to that of its parents. Under `torchrun` every process
    makes this call: process 0 decides, locks and stores, the others train along and read what it stored. How
    many they are is no part of the key.

    Raises StoreError if the store cannot be written, ValueError if two weights share memory, RuntimeError in
    the other processes if process 0 failed.
    """
    return _load_or_train(recipe, store, progress, watch, {})


def _load_or_train(
    recipe: Recipe,
    store: Path,
    progress: Callable[[str], object],
    watch: Watch | None,
    known: dict[str, str],
) -> Artifact:
    """`load_or_train` with the keys that are already known."""
    parents: dict[str, Recipe] = {}
    identity = _identity(recipe, parents, known)
    name = re.sub(r"[^\w.-]+", "-", recipe.name()).strip(".-") or "unnamed"
    folder = store / f"{name}-{_digest(identity)}"
    line = Line(folder.name)
    if line.rank:
        return _train_along(recipe, folder, identity, parents, watch, line, known)
    found = None
    with line.open():
        with suppress(DamagedError, FileNotFoundError):
            found = _read(folder, identity)
        if found is None:
            line.say("parents")
            # Parents come before the lock: no process then holds one lock while it waits for another.
            loaded = {of: _load_or_train(p, store, progress, None, known) for of, p in parents.items()}
            with _locked(store, folder.name, progress):
                work = Work(_work_folder(folder), loaded, watch, known)
                found = _train_once(recipe, name, folder, identity, work, progress, line)
        line.say("stored")
        return found


def _train_once(
    recipe: Recipe,
    name: str,
    folder: Path,
    identity: dict[str, Any],
    work: Work,
    progress: Callable[[str], object],
    line: Line,
) -> Artifact:
    """Under the lock: what another process has stored meanwhile, else the recipe trained and stored."""
    try:
        return _read(folder, identity)
    except FileNotFoundError:
        pass
    except DamagedError as damage:
        aside = folder.with_name(f"{folder.name}.damaged")
        warnings.warn(f"{folder}: {damage}. Moved to {aside.name}; it is being rebuilt", stacklevel=3)
        with _writing(folder.parent):
            shutil.rmtree(aside, ignore_errors=True)
            folder.replace(aside)
    draft, complete = folder.with_name(f".{folder.name}.new"), None
    with suppress(DamagedError, FileNotFoundError):
        complete = _read(draft, identity)  # whoever wrote it was killed before it was moved
    if complete is None:
        with _writing(folder.parent):
            work.folder.mkdir(exist_ok=True)
        line.say("train")
        start = time.monotonic()
        _write(draft, name, identity, recipe.train(work))
        progress(f"{name}: trained in {time.monotonic() - start:.0f} s")
    # In this order a kill at any moment leaves nothing that the next call does not use.
    shutil.rmtree(work.folder, ignore_errors=True)
    with _writing(folder.parent):
        draft.replace(folder)
    return _read(folder, identity)


def _train_along(
    recipe: Recipe,
    folder: Path,
    identity: dict[str, Any],
    parents: Mapping[str, Recipe],
    watch: Watch | None,
    line: Line,
    known: dict[str, str],
) -> Artifact:
    """`load_or_train` in a process other than 0: it does what process 0 says, and writes nothing."""
    if line.hear() == "parents":
        loaded = {of: _load_or_train(p, folder.parent, print, None, known) for of, p in parents.items()}
        if line.hear() == "train":
            try:
                recipe.train(Work(_work_folder(folder), loaded, watch, known))
            except Exception as error:
                if reason := line.failure():
                    error.add_note(reason)
                raise
            line.hear()
    try:
        return _read(folder, identity)
    except (DamagedError, FileNotFoundError) as error:
        raise StoreError(
            f"process {line.rank} cannot read {folder}, which process 0 has stored: all processes need the "
            f"same store, on a disk that they share"
        ) from error


def default_store() -> Path:
    """`KAMAL_STORE` if set; else `data/store` of the checkout; else, where installed, `~/.cache/kamal`."""
    if chosen := os.environ.get("KAMAL_STORE"):
        return Path(chosen).expanduser()
    root = Path(__file__).resolve().parents[1]
    in_checkout = (root / "pyproject.toml").is_file()
    return root / "data" / "store" if in_checkout else Path.home() / ".cache" / "kamal"


def save_state(path: Path, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
    """Write a checkpoint, tensors and JSON values. A kill at any moment leaves the one before.

    Raises ValueError if two tensors share memory, StoreError if the folder cannot be written.
    """
    content = _tensor_bytes(tensors, {"extra": json.dumps(extra)})
    draft = path.with_name(f"{path.name}.new")
    with _writing(path.parent):
        draft.write_bytes(content)
        draft.replace(path)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read a checkpoint of `save_state`; None if there is none, or, with a warning, if it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            # Copies, because a file that is still mapped cannot be replaced on Windows.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["extra"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path}: damaged ({error}). Training goes on without it", stacklevel=2)
        return None


def _identity(recipe: Recipe, parents: dict[str, Recipe], known: dict[str, str]) -> dict[str, Any]:
    """What the key is the hash of; fills `parents` with the recipe's direct parents by key."""
    config = _record(recipe, parents, known)
    parents |= {key(parent, known): parent for parent in recipe.parents()}
    version = torch.__version__.split("+")[0]
    sources = _fingerprint(recipe.sources())
    return {"config": config, "parents": sorted(parents), "torch": version, "sources": sources}


def _record(value: Any, parents: dict[str, Recipe], known: dict[str, str]) -> dict[str, Any]:
    # The class without its module, which is __main__ or kamal_lib.recipes depending on who started Python.
    name = type(value).__qualname__
    if not is_dataclass(value) or not type(value).__dataclass_params__.frozen:  # pyright: ignore
        raise TypeError(f"{name} is no frozen dataclass: put @dataclass(frozen=True) above it")
    if not type(value).__dataclass_params__.repr or not all(f.repr for f in fields(value)):  # pyright: ignore
        raise TypeError(
            f"{name} hides fields from its repr, by which keys are told apart: leave out repr=False"
        )
    config = {
        f.name: _plain(getattr(value, f.name), f"{name}.{f.name}", parents, known) for f in fields(value)
    }
    return {"class": name, **config}


def _plain(value: Any, where: str, parents: dict[str, Recipe], known: dict[str, str]) -> Any:
    if isinstance(value, int | str | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, tuple):
        return [_plain(item, f"{where}[{i}]", parents, known) for i, item in enumerate(value)]
    if isinstance(value, Recipe):
        parents[name := key(value, known)] = value
        return {"class": type(value).__qualname__, "key": name}
    if is_dataclass(value):
        return _record(value, parents, known)
    raise TypeError(
        f"{where} is {value!r} of type {type(value).__name__}; for an exact key it must be None, bool, int, "
        f"finite float, str, a frozen dataclass, a recipe, or a tuple of these"
    )


def _fingerprint(modules: tuple[ModuleType, ...]) -> str:
    """Hash of the modules' code, whatever their names and order."""
    packages = [Path(folder) for module in modules for folder in getattr(module, "__path__", ())]
    paths = [path for folder in packages for path in folder.rglob("*.py")]
    paths += [Path(inspect.getfile(module)) for module in modules if not hasattr(module, "__path__")]
    return _digest(sorted(_code(path.read_bytes()) for path in paths))


@cache
def _code(source: bytes) -> str:
    """Hash of a Python file without comments and docstrings: better words make no result stale."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            del node.body[0]
    return _sha256(ast.unparse(tree).encode())


def _digest(value: Any) -> str:
    return _sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())[:16]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(folder: Path, identity: dict[str, Any]) -> Artifact:
    if not folder.exists():
        raise FileNotFoundError(folder)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        stored = {part: config[part] for part in identity}
        if stored != identity:
            raise DamagedError(f"its config.json is that of {config['name']}-{_digest(stored)}")
        content = {name: (folder / name).read_bytes() for name in FILES}
        for name in FILES:
            if _sha256(content[name]) != config["sha256"][name]:
                raise DamagedError(f"{name} has another checksum than when it was written")
        metrics = json.loads(content["metrics.json"])
        rows = csv.DictReader(content["history.csv"].decode().splitlines())
        history = [{column: float(value) for column, value in row.items() if value} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"damaged ({type(error).__name__}: {error})") from error
    return Artifact(folder, _digest(identity), identity["config"], metrics, history)


def _work_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.work")


def _write(draft: Path, name: str, identity: dict[str, Any], result: Result) -> None:
    """Write the entry beside its place; config.json comes last."""
    table = io.StringIO()
    columns = dict.fromkeys(column for row in result.history for column in row)
    writer = csv.DictWriter(table, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: float(value) for column, value in row.items()} for row in result.history)
    metrics = json.dumps(result.metrics, indent=1).encode()
    weights = _tensor_bytes(result.weights)
    contents = dict(zip(FILES, (weights, table.getvalue().encode(), metrics), strict=True))
    checksums = {file: _sha256(content) for file, content in contents.items()}
    config = {"name": name, "key": _digest(identity), **identity, "sha256": checksums}
    with _writing(draft.parent):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for file, content in contents.items():
            (draft / file).write_bytes(content)
        (draft / "config.json").write_text(json.dumps(config, indent=1), "utf-8")


def _tensor_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    # Checked before .contiguous(), whose copy of a channels_last tensor hides the sharing from safetensors.
    owners: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors.items():
        owner = owners.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), name)
        if owner != name and tensor.numel():
            raise ValueError(
                f"{owner!r} and {name!r} share memory, so one would change with the other: give one a copy "
                f"(copy.deepcopy of the module, or .clone() of the tensor)"
            )
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, metadata)


@contextmanager
def _locked(store: Path, name: str, progress: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock of one entry; whoever comes second says so once and waits."""
    lock = FileLock(store / f".{name}.lock")
    with _writing(store):
        store.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            progress(f"{name}: another process is training it, waiting for it to finish")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn an OSError into one that says which folder, and what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write in {folder}: {error}. Make room there, or set the environment variable "
            f"KAMAL_STORE to a folder that can be written"
        ) from error
