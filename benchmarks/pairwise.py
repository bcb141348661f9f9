"""The pair-wise loss of Liu et al. without its N×N matrices, beside the obvious way to write it.

    python benchmarks/pairwise.py [--repeats 7]

The obvious way, as the authors' code has it, multiplies out all similarities of student and teacher in
float32 and lets autograd keep what it needs. Ours is the library's `pair_wise_loss`, in float64: by products
of channels with channels where nodes are many, by rows of the matrix where they are few. Both take one image
with 128 channels of the student and 512 of the teacher, every pixel a node, all connected; forward and
backward.

They take turns. A ratio is obvious to ours: of times the median over the repeats of two that stand side by
side, so that a machine whose speed drifts slows both. Memory is the most that was allocated at a time beyond
the inputs. Errors, of the loss and of its gradient, are relative to the obvious form in float64. The curve
runs over the number of nodes N; the last line is JSON, for N = 65², the paper's map at crops of 512×512.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kamal_lib.losses.pairwise import gram_pays
from kamal_lib.losses.structured import pair_wise_loss

CHANNELS, TEACHER_CHANNELS = 128, 512
SIDES = (3, 8, 16, 24, 33, 46, 65)
MIB = 2**20

Loss = Callable[[Tensor, Tensor], Tensor]


def obvious(student: Tensor, teacher: Tensor) -> Tensor:
    """Eq. 2 with N×N similarities, in the precision of its input."""
    (s, t) = (torch.nn.functional.normalize(x.flatten(2), dim=1) for x in (student, teacher))
    return (s.mT @ s - t.mT @ t).square().mean()


def ours(student: Tensor, teacher: Tensor) -> Tensor:
    return pair_wise_loss(student, teacher, patch=1)


WAYS: dict[str, Loss] = {"obvious": obvious, "ours": ours}


def features(side: int) -> tuple[Tensor, Tensor]:
    """Of student and teacher, after a ReLU; the student's are a noisy mixture of the teacher's."""
    generator = torch.Generator().manual_seed(side)
    teacher = torch.randn(1, TEACHER_CHANNELS, side, side, generator=generator).relu()
    mix = torch.randn(CHANNELS, TEACHER_CHANNELS, generator=generator) / TEACHER_CHANNELS**0.5
    noise = torch.randn(1, CHANNELS, side, side, generator=generator)
    return (torch.einsum("dc,nchw->ndhw", mix, teacher) + noise / 4).relu(), teacher


def forward_backward(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """The loss and its gradient."""
    student = student.detach().requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return float(value.detach()), gradient


def peak(loss: Loss, student: Tensor, teacher: Tensor) -> int:
    """The most bytes allocated at a time by one forward and backward pass."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler looks for a GPU and complains
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        forward_backward(loss, student, teacher)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    now = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


def measure(side: int, repeats: int) -> dict[str, float]:
    """What one line of the curve shows."""
    student, teacher = features(side)
    exact, slope = forward_backward(obvious, student.double(), teacher.double())
    figures: dict[str, float] = {"n": side * side}
    for name, loss in WAYS.items():
        value, gradient = forward_backward(loss, student, teacher)  # warms up
        figures[f"error {name}"] = abs(value / exact - 1)
        figures[f"gradient error {name}"] = float((gradient - slope).norm() / slope.norm())
        figures[f"memory {name}"] = peak(loss, student, teacher)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(repeats):
        for name in WAYS if repeat % 2 else reversed(WAYS):
            began = time.perf_counter()
            forward_backward(WAYS[name], student, teacher)
            seconds[name].append(time.perf_counter() - began)
    figures |= {f"seconds {name}": statistics.median(times) for name, times in seconds.items()}
    figures["time_ratio"] = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    figures["memory_ratio"] = figures["memory obvious"] / figures["memory ours"]
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the curve, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="N is the square of each")
    options = parser.parse_args(arguments)
    print(
        f"{'':14}{'milliseconds':>20}{'':8}{'MiB':>18}{'':8}{'error of the loss':>20}{'of the gradient':>20}"
    )
    print(
        f"{'N':>5} {'form':>8}"
        + f"{'obvious':>10}{'ours':>10}{'ratio':>8}" * 2
        + f"{'obvious':>10}{'ours':>10}" * 2
    )
    for side in options.sides:
        f = measure(side, options.repeats)
        form = "products" if gram_pays(side * side, CHANNELS, TEACHER_CHANNELS) else "rows"
        print(
            f"{f['n']:5} {form:>8}{1e3 * f['seconds obvious']:10.1f}{1e3 * f['seconds ours']:10.1f}"
            f"{f['time_ratio']:8.2f}{f['memory obvious'] / MIB:10.1f}{f['memory ours'] / MIB:10.1f}"
            f"{f['memory_ratio']:8.2f}{f['error obvious']:10.1e}{f['error ours']:10.1e}"
            f"{f['gradient error obvious']:10.1e}{f['gradient error ours']:10.1e}",
            flush=True,
        )
    last = {"n": f["n"]} | {name: round(f[name], 2) for name in ("time_ratio", "memory_ratio")}
    print(json.dumps(last | {"relative_error": f["error ours"], "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
