"""How fast rooms are rendered, and what each of the ray caster's measures is worth.

python benchmarks/rooms.py [ROOMS]; all ratios come from one run on one machine, the last line is JSON.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import numpy as np

from kamal_lib.data import shading
from kamal_lib.data.scenes import render, sample_scene
from kamal_lib.data.shards import Job, render_shards

HEIGHT, WIDTH = 96, 128


def best(work: Callable[[], object], repeats: int = 3) -> float:
    """Least wall time in seconds of a few runs: the others were disturbed."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def rendering(seeds: range, processes: int) -> Callable[[], None]:
    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            jobs = [Job(f"{folder}/{s}.npz", s, 10, HEIGHT, WIDTH, 1, annotated=True) for s in seeds[::10]]
            render_shards(jobs, processes)

    return work


def normalise_stacked(vectors: np.ndarray) -> np.ndarray:
    """Unit vectors of an H×W×3 array by reducing over its last axis."""
    return vectors / np.sqrt((vectors * vectors).sum(-1, keepdims=True))


def normalise_apart(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same with the three components as arrays of their own."""
    length = np.sqrt(x * x + y * y + z * z)
    return x / length, y / length, z / length


def main(rooms: int) -> None:
    scenes = [sample_scene(seed) for seed in range(min(rooms, 20))]

    def render_all(**options: int) -> None:
        for scene in scenes:
            render(scene, HEIGHT, WIDTH, **options)

    start = time.process_time()
    for seed in range(len(scenes)):
        render(sample_scene(seed), HEIGHT, WIDTH)
    processor = (time.process_time() - start) / len(scenes)
    fast = best(render_all)
    with mock.patch.object(shading, "cast", partial(shading.cast, cull=False)):
        naive = best(render_all, repeats=1)
    vectors = np.random.default_rng(0).random((HEIGHT, WIDTH, 3), np.float32)
    apart = [np.ascontiguousarray(vectors[..., k]) for k in range(3)]
    seeds = range(rooms // 10 * 10)
    one, two = (best(rendering(seeds, processes), repeats=2) for processes in (1, 2))
    result = {
        "images_per_second": round(len(seeds) / two, 1),
        "images_per_second_one_process": round(len(seeds) / one, 1),
        "processor_ms_per_image": round(1000 * processor, 1),
        "culling": round(naive / fast, 2),
        "two_processes": round(one / two, 2),
        "separate_components": round(
            best(lambda: [normalise_stacked(vectors) for _ in range(50)])
            / best(lambda: [normalise_apart(*apart) for _ in range(50)]),
            2,
        ),
        "supersample_2_costs": round(best(partial(render_all, supersample=2), repeats=1) / fast, 2),
    }
    print(f"{len(seeds)} rooms at {HEIGHT}x{WIDTH}, processes started and files written included:")
    print(f"  one process {result['images_per_second_one_process']}/s, two {result['images_per_second']}/s")
    print(f"  {result['processor_ms_per_image']} ms of processor time an image, scene included")
    print(f"  every solid on every ray takes {result['culling']} times as long as with screen rectangles")
    print(f"  an axis of length three takes {result['separate_components']} times as long as three arrays")
    print(f"  2 x 2 rays a pixel take {result['supersample_2_costs']} times as long as one")
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
