"""Procedural rooms as a data set: exact labels, depth, normals and boxes for as many rooms as one likes."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

import kamal_lib.data.transforms  # noqa: F401  else v2 flips the image, and leaves depth and normals
from kamal_lib.data.shards import SHARD, Job, fingerprint, read_shard, render_shards
from kamal_lib.sample import Depth, Normals, Sample

SPLITS = ("labelled", "unlabelled", "validation", "test")
WORLDS = 1000
ROOMS_PER_SPLIT = 1_000_000
"""Rooms in one split of one world."""


def room_seed(world: int, split: str, index: int) -> int:
    """Seed of a room's scene: (4 · world + position in `SPLITS`) · 1,000,000 + index; never twice the same.

    Raises ValueError for an unknown split, or a world or index out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if not 0 <= world < WORLDS:
        raise ValueError(f"expected a world from 0 to {WORLDS - 1}, got {world}")
    if not 0 <= index < ROOMS_PER_SPLIT:
        raise ValueError(f"a split has rooms 0 to {ROOMS_PER_SPLIT - 1}, got index {index}")
    return (len(SPLITS) * world + SPLITS.index(split)) * ROOMS_PER_SPLIT + index


class Rooms(Dataset[Sample]):
    """`count` procedural rooms of one split, rendered once into `folder` and held in memory.

    split        "labelled", "unlabelled", "validation" or "test": no room is in two of them; an unlabelled
                 room has an image and nothing else, on disk too
    world        0..999: redraws every room of every split (a seed of a study redraws its data with it)
    annotated    None: all but "unlabelled"; True opens the annotation of unlabelled rooms too, which measures
                 what labels would have been worth and must never teach a student
    supersample  rays per pixel and axis for the image; the rest belongs to the ray through the pixel's centre
    folder       where rendered shards are kept; only missing or damaged ones are rendered
    workers      rendering processes, default one for each core this process may use
    progress     called with one line when something had to be rendered

    Raises ValueError for an unknown split, a count, world or size out of range.
    """

    def __init__(
        self,
        split: str,
        count: int,
        *,
        height: int,
        width: int,
        world: int = 0,
        annotated: bool | None = None,
        supersample: int = 2,
        folder: str | os.PathLike[str],
        workers: int | None = None,
        progress: Callable[[str], object] = print,
    ):
        if not 1 <= count <= ROOMS_PER_SPLIT:
            raise ValueError(f"expected a count of 1 to {ROOMS_PER_SPLIT} rooms, got {count}")
        if min(height, width, supersample) < 1:
            sizes = f"{height}, {width} and {supersample}"
            raise ValueError(f"expected height, width and supersample of at least 1, got {sizes}")
        seed = room_seed(world, split, 0)
        place = Path(folder) / f"rooms-{height}x{width}-s{supersample}-w{world}-{fingerprint()[:12]}"
        usual = split != "unlabelled"
        annotated = usual if annotated is None else annotated
        kind = split if annotated == usual else f"{split}-{'annotated' if annotated else 'images'}"
        jobs = []
        for first in range(0, count, SHARD):
            rooms = min(SHARD, count - first)
            path = str((place / f"{kind}-{first:06d}-{first + rooms:06d}.npz").resolve())
            jobs.append(Job(path, seed + first, rooms, height, width, supersample, annotated))
        arrays = _load(jobs, split, workers or _cores(), progress)
        self.split = split
        self._size = (height, width)
        self._images = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2).contiguous()
        self._maps = {k: torch.from_numpy(arrays[k]) for k in ("labels", "depth", "normals") if k in arrays}
        if self._maps:
            counts = arrays["box_counts"].tolist()
            self._boxes = torch.from_numpy(arrays["boxes"]).split(counts)
            self._box_labels = torch.from_numpy(arrays["box_labels"]).split(counts)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        sample = Sample(image=tv_tensors.Image(self._images[index].float().div_(255)))
        if self._maps:
            sample["labels"] = tv_tensors.Mask(self._maps["labels"][index].long())
            sample["depth"] = Depth(self._maps["depth"][index].clone())
            sample["normals"] = Normals(self._maps["normals"][index].clone())
            boxes = self._boxes[index].clone()
            sample["boxes"] = tv_tensors.BoundingBoxes(  # pyright: ignore[reportCallIssue]: overloads in 0.2x
                boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=self._size
            )
            sample["box_labels"] = self._box_labels[index].clone()
        return sample


def _load(
    jobs: list[Job], split: str, workers: int, progress: Callable[[str], object]
) -> dict[str, np.ndarray]:
    """All arrays of all shards, each rendered first where it has to be."""
    start = time.perf_counter()
    shards = [read_shard(job) for job in jobs]
    missing = [job for job, shard in zip(jobs, shards, strict=True) if shard is None]
    if missing:
        render_shards(missing, workers)
        rooms, seconds = sum(job.rooms for job in missing), time.perf_counter() - start
        progress(f"rooms: {rooms} {split} rendered in {seconds:.1f} s ({rooms / seconds:.0f}/s)")
    loaded = []
    for job, shard in zip(jobs, shards, strict=True):
        shard = shard or read_shard(job)
        if shard is None:
            raise OSError(f"{job.path} was rendered but cannot be read: is the disk full or the folder gone?")
        loaded.append(shard)
    return {key: np.concatenate([shard[key] for shard in loaded]) for key in loaded[0]}


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
