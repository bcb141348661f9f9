"""How fast a teacher and a block of the student train: fp32 and bf16, with and without channels_last.

    python benchmarks/training.py [--repeats 7]

All variants take turns in one process, so that a machine whose speed drifts slows all of them; ratios of
medians are what to quote. A step is forward, backward and AdamW on one batch of random images of the quick
profile's size. The floor of a training step is three forward passes of multiply-adds: the achieved rate is
printed beside it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from kamal_lib import recipes
from kamal_lib.distill.amalgamation import BlockObjective
from kamal_lib.engine import make_fabric
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.cost import multiply_adds
from kamal_lib.models.encoder_decoder import build_network
from kamal_lib.tasks import DirectObjective

GAME = recipes.whole_game("quick")
TASKS = recipes.tasks_of(GAME.data)
ARCHITECTURE = GAME.target_net.amalgamation.teachers[0].start.architecture
BATCH = GAME.target_net.amalgamation.blocks.batch_size


def teacher_objective() -> nn.Module:
    """A SegNet against labels."""
    heads = {"segmentation": TASKS["segmentation"].channels}
    return DirectObjective(build_network(ARCHITECTURE, heads, seed=0), TASKS)


def block_objective() -> nn.Module:
    """The first decoder block of a student between two frozen teachers: Eq. 6."""
    n = ARCHITECTURE.blocks // 2 + 1
    teachers = {
        name: build_network(ARCHITECTURE, {name: task.channels}, seed=0) for name, task in TASKS.items()
    }
    student = build_network(ARCHITECTURE, {}, seed=1)
    codings = {name: ChannelCoding(student.channels[n - 1]) for name in TASKS}
    return BlockObjective(
        student, teachers, codings, n, tasks=TASKS, weights={"segmentation": 1.0, "depth": 4.0}
    )


def stepper(objective: nn.Module, *, precision: str, channels_last: bool) -> Callable[[], None]:
    """One training step of `objective` on a fixed random batch."""
    generator = torch.Generator().manual_seed(0)
    height, width = GAME.data.size
    batch = {
        "image": torch.rand(BATCH, 3, height, width, generator=generator),
        "labels": torch.randint(0, len(GAME.data.classes), (BATCH, height, width), generator=generator),
        "depth": 1 + 7 * torch.rand(BATCH, height, width, generator=generator),
    }
    layout = torch.channels_last if channels_last else torch.contiguous_format
    fabric = make_fabric("auto", precision=precision)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad])
    model, wrapped = fabric.setup(objective.to(memory_format=layout), optimizer)
    batch = fabric.to_device(batch)
    batch["image"] = batch["image"].contiguous(memory_format=layout)
    model.train()

    def step() -> None:
        wrapped.zero_grad()
        fabric.backward(torch.stack(list(model(batch).values())).sum())
        wrapped.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return step


def main() -> None:
    """Prints images per second of every variant and the ratios to plain fp32; ends with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    variants = {
        f"{stage} {short}{' channels_last' if last else ''}": stepper(
            make(), precision=precision, channels_last=last
        )
        for stage, make in (("teacher", teacher_objective), ("block", block_objective))
        for short, precision in (("fp32", "32-true"), ("bf16", "bf16-mixed"))
        for last in (False, True)
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, step in variants.items():
            start = time.perf_counter()
            for _ in range(3):
                step()
            if repeat:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / 3)
    speed = {name: BATCH / statistics.median(times) for name, times in seconds.items()}
    ratios = {name: speed[name] / speed[f"{name.split()[0]} fp32"] for name in speed}
    for name in variants:
        print(f"{name:28} {speed[name]:7.1f} images/s   {ratios[name]:.2f} × plain fp32")
    heads = {"segmentation": TASKS["segmentation"].channels}
    macs = multiply_adds(build_network(ARCHITECTURE, heads, seed=0), GAME.data.size)
    best = max(value for name, value in speed.items() if name.startswith("teacher"))
    print(
        f"floor: 3 × {macs / 1e9:.3f} G multiply-adds an image; "
        f"the best teacher runs {3 * macs * best / 1e9:.0f} G/s"
    )
    figures = {"images_per_second": {k: round(v, 1) for k, v in speed.items()}}
    figures["ratio_to_fp32"] = {k: round(v, 2) for k, v in ratios.items()}
    print(json.dumps(figures | {"multiply_adds": macs, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
