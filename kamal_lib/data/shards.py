"""Rendered rooms on disk: shards of rooms as .npz files, written once, by as many processes as one likes.

A shard's name says what it holds, so a longer data set reuses the shards of a shorter one, and an
interrupted run goes on where it stopped. Files appear by an atomic rename: readers see whole shards only,
and two runs that build the same cache at once write the same bytes twice. Zip checksums find damage.

Started as `python -m kamal_lib.data.shards` this module is a worker: it imports NumPy, not torch, reads one
job a line, and ends when its parent does. (A multiprocessing pool would import the parent's main module,
torch included, in every process, and fail in scripts without a `__main__` guard.)
"""

import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import kamal_lib
from kamal_lib.data.scenes import render, sample_scene

SHARD = 50
"""Rooms in a full shard."""


@dataclass(frozen=True)
class Job:
    """One shard to render: rooms `seed`..`seed + rooms - 1` at `height` × `width` into `path`.

    With `annotated` False only the images are kept: nothing on disk could leak into unsupervised training.
    """

    path: str
    seed: int
    rooms: int
    height: int
    width: int
    supersample: int
    annotated: bool


def fingerprint() -> str:
    """Hash of the sources that decide what a room looks like, the same for either kind of line ends."""
    digest = hashlib.sha256()
    for name in ("furniture.py", "raycast.py", "scenes.py", "shading.py"):
        digest.update((Path(__file__).parent / name).read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def render_shard(job: Job) -> None:
    """Render one shard and put it in place."""
    rooms = [
        render(sample_scene(job.seed + i), job.height, job.width, supersample=job.supersample)
        for i in range(job.rooms)
    ]
    keys = ("image", "labels", "depth", "normals") if job.annotated else ("image",)
    arrays = {key: np.stack([room[key] for room in rooms]) for key in keys}
    if job.annotated:
        arrays |= {key: np.concatenate([room[key] for room in rooms]) for key in ("boxes", "box_labels")}
        arrays["box_counts"] = np.array([len(room["boxes"]) for room in rooms])
    path = Path(job.path)
    try:
        _put(path, arrays)
    except OSError as error:
        raise OSError(
            f"cannot write rooms to {path.parent}: {error}. Make room there, or set the environment variable "
            "KAMAL_STORE to a folder that can be written"
        ) from error


def _put(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a shard beside its place and moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_shard(job: Job) -> dict[str, np.ndarray] | None:
    """The shard's arrays; None where it is missing or, with a warning, damaged."""
    try:
        with open(job.path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        warnings.warn(f"{job.path} is damaged ({error}); it is rendered again", stacklevel=2)
        return None


def render_shards(jobs: Sequence[Job], workers: int) -> None:
    """Render all jobs on `workers` processes; alone or with a single job, in this one.

    Raises RuntimeError with the worker's own message if one fails.
    """
    for folder in {Path(job.path).parent for job in jobs}:
        for left in folder.glob(".*.part"):  # of a run that was killed; nobody writes at one for an hour
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            render_shard(job)
        return
    queue = iter(jobs)  # shared: whichever worker is free takes the next job
    with ThreadPoolExecutor(workers) as threads:
        try:
            for done in as_completed([threads.submit(_feed_worker, queue) for _ in range(workers)]):
                done.result()
        finally:
            list(queue)  # failed or interrupted: nobody starts another job


def _feed_worker(queue: Iterator[Job]) -> None:
    source = str(Path(kamal_lib.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        [sys.executable, "-m", __spec__.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        for job in queue:
            worker.stdin.write(json.dumps(asdict(job)) + "\n")
            worker.stdin.flush()
            if (answer := worker.stdout.readline().strip()) != "done":
                answer = answer or "it ended without a word"
                raise RuntimeError(f"rendering {job.path} failed in a worker: {answer}")


def _work() -> None:
    for line in sys.stdin:
        try:
            render_shard(Job(**json.loads(line)))
            answer = "done"
        except Exception as error:  # the parent raises it again
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        try:
            os.write(sys.stdout.fileno(), f"{answer}\n".encode())
        except BrokenPipeError:  # the parent is gone
            return


if __name__ == "__main__":
    _work()
