"""What the block-wise schedule saves beside the obvious way to write it: operations, memory, time.

    python benchmarks/blockwise.py [--images 32] [--repeats 3]

The obvious way runs both whole teachers at every step for their predictions, takes gradients through the
whole student and for all weights in the rest of the teachers, and steps block n and its codings. Ours, the
library's `BlockObjective`, lets each teacher predict each image once, runs the blocks before n without
gradients, and takes gradients for block n, its codings and what lies between them and the loss. Both see the
same images in the same order, with norm layers in eval mode, so their losses have to agree.

Operations are those of convolutions and matrix products in one step with one small image, forward and
backward, of the paper's VGG16 networks; relative to one teacher's forward pass they are the same at any size.
The ratios count two epochs a block, as the paper has it, and the teachers' one pass over the images. Memory
is what a step holds for its backward pass, at the paper's batch of 8 crops of 640×400, and the gradients that
it leaves; weights are left out, both ways have the same. Time is that of the small networks: the ways take
turns step by step, and of each block's seconds the median of the repeats counts. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from kamal_lib.data.scenes import CLASSES
from kamal_lib.distill.amalgamation import BlockObjective
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.cost import multiply_adds
from kamal_lib.models.encoder_decoder import VGG16, Architecture, EncoderDecoder, build_network
from kamal_lib.tasks import Depth, Segmentation, Task, task_losses

TASKS: dict[str, Task] = {"segmentation": Segmentation(tuple(CLASSES)), "depth": Depth()}
WEIGHTS = {"segmentation": 1.0, "depth": 4.0}
EPOCHS = 2  # for each block, section 6.1 of Ye et al.
PAPER = 8 * 640 * 400  # pixels of a batch, same place
GIB = 2**30

Batch = dict[str, Tensor]
Losses = Callable[[Batch], dict[str, Tensor]]


@dataclass
class Networks:
    """A student, its teachers, and for each block one coding a teacher."""

    student: EncoderDecoder
    teachers: dict[str, EncoderDecoder]
    codings: list[dict[str, ChannelCoding]]

    def parameters(self) -> list[nn.Parameter]:
        codings = (coding for of_block in self.codings for coding in of_block.values())
        return [p for m in (self.student, *self.teachers.values(), *codings) for p in m.parameters()]

    def learning(self, n: int) -> list[nn.Parameter]:
        """What a step of block n changes."""
        return [
            p for m in (self.student.blocks[n - 1], *self.codings[n - 1].values()) for p in m.parameters()
        ]

    def clear_gradients(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None


def networks(architecture: Architecture, image: Tensor) -> Networks:
    """Random networks in eval mode, whose norm layers know `image`."""
    student = build_network(architecture, {}, seed=0)
    teachers = {
        name: build_network(architecture, {name: task.channels}, seed=seed)
        for seed, (name, task) in enumerate(TASKS.items(), 1)
    }
    torch.manual_seed(0)
    codings = [{name: ChannelCoding(channels) for name in TASKS} for channels in student.channels]
    with torch.no_grad():
        for network in (student, *teachers.values()):
            for _ in range(20):  # running statistics move by a tenth each time
                network.train()(image)
            network.eval()
    return Networks(student, teachers, codings)


def predictions(nets: Networks, image: Tensor) -> Batch:
    """The targets, what the teachers say of the images: {"labels": N×H×W, "depth": N×H×W}."""
    with torch.no_grad():
        return {TASKS[name].key: TASKS[name].decode(t(image)[name]) for name, t in nets.teachers.items()}


def obvious(nets: Networks, n: int) -> Losses:
    """Eq. 6 as one first writes it; of a batch it wants the images only."""
    for parameter in nets.parameters():
        parameter.requires_grad_(True)

    def losses(batch: Batch) -> dict[str, Tensor]:
        batch = {"image": batch["image"]} | predictions(nets, batch["image"])
        a, found = nets.student.forward_to(batch["image"], n), {}
        for name, teacher in nets.teachers.items():
            coded = a.with_features(nets.codings[n - 1][name](a.features))
            found |= task_losses(TASKS, teacher.forward_from(coded, n), batch, WEIGHTS)
        return found

    return losses


def ours(nets: Networks, n: int) -> Losses:
    """Eq. 6 as the library has it; a batch holds images and stored predictions."""
    parts = (nets.student, nets.teachers, nets.codings[n - 1])
    return BlockObjective(*parts, n, tasks=TASKS, weights=WEIGHTS).eval()


SMALL = Architecture((16, 32, 64, 128, 128), VGG16.convs, VGG16.pools)
"""VGG16 at a quarter of its width: the same shares of work, at a size that a CPU can race."""
WAYS = {"obvious": obvious, "ours": ours}


def forward_backward(losses: Losses, batch: Batch) -> dict[str, Tensor]:
    """{task: loss}, after its gradients have been taken."""
    found = losses(batch)
    torch.stack(list(found.values())).sum().backward()
    return found


def costs(nets: Networks, losses: Losses, batch: Batch) -> tuple[int, int, int]:
    """Of one step: multiply-adds, bytes held for the backward pass, bytes of the gradients it leaves."""
    nets.clear_gradients()
    weights, kept = {p.untyped_storage().data_ptr() for p in nets.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_backward(losses, batch)
    activations = sum(size for pointer, size in kept.items() if pointer not in weights)
    gradients = sum(p.grad.nbytes for p in nets.parameters() if p.grad is not None)
    return counter.get_total_flops() // 2, activations, gradients


def count(architecture: Architecture, size: tuple[int, int] = (32, 64)) -> dict[str, list[tuple]]:
    """{way: [(forward passes of a teacher in one step, GiB of the paper's batch) for each block]}."""
    height, width = size
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    nets = networks(architecture, image)
    batch = {"image": image} | predictions(nets, image)
    teacher = statistics.mean(multiply_adds(t, size) for t in nets.teachers.values())
    found = {way: [] for way in WAYS}
    for n in range(1, architecture.blocks + 1):
        for way, prepare in WAYS.items():
            operations, activations, gradients = costs(nets, prepare(nets, n), batch)
            memory = activations * PAPER / (height * width) + gradients
            found[way].append((operations / teacher, memory / GIB))
    return found


def flop_ratio(counted: dict[str, list[tuple]], first: int) -> float:
    """Obvious to ours, block `first` to the last, with each teacher's one pass over the images."""
    obvious, ours = (sum(passes for passes, _ in counted[way][first - 1 :]) for way in WAYS)
    return EPOCHS * obvious / (EPOCHS * ours + len(TASKS))


@dataclass
class Race:
    """Seconds by way and block, and of each teacher's one pass; by how much two losses differ at most."""

    seconds: dict[str, list[float]]
    once: float
    difference: float

    def ratio(self, first: int) -> float:
        """Obvious to ours, block `first` to the last."""
        obvious, ours = (sum(self.seconds[way][first - 1 :]) for way in WAYS)
        return obvious / (ours + self.once)


def race(
    architecture: Architecture, size: tuple[int, int], images: int, repeats: int, batch_size: int = 16
) -> Race:
    """Both ways through the whole schedule by plain gradient descent, `repeats` times from one start."""
    image = torch.rand(images, 3, *size, generator=torch.Generator().manual_seed(0))
    start, blocks = networks(architecture, image[:batch_size]), range(1, architecture.blocks + 1)
    seconds = {way: [[0.0] * repeats for _ in blocks] for way in WAYS}
    once, difference = [], 0.0
    for repeat in range(repeats):
        nets, order = {way: deepcopy(start) for way in WAYS}, torch.Generator().manual_seed(1)
        began = time.perf_counter()
        parts = [predictions(nets["ours"], part) for part in image.split(batch_size)]
        stored = {"image": image} | {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        once.append(time.perf_counter() - began)
        for n in blocks:
            losses = {way: prepare(nets[way], n) for way, prepare in WAYS.items()}
            descent = {way: torch.optim.SGD(nets[way].learning(n), lr=0.01) for way in WAYS}
            epochs = [torch.randperm(images, generator=order).split(batch_size) for _ in range(EPOCHS)]
            for chosen in (indices for epoch in epochs for indices in epoch):
                batch, found = {key: value[chosen] for key, value in stored.items()}, {}
                for way in WAYS if repeat % 2 else reversed(WAYS):
                    began = time.perf_counter()
                    nets[way].clear_gradients()
                    found[way] = forward_backward(losses[way], batch)
                    descent[way].step()
                    seconds[way][n - 1][repeat] += time.perf_counter() - began
                apart = (found["obvious"][task] - found["ours"][task] for task in TASKS)
                difference = max(difference, *(abs(float(each.detach())) for each in apart))
    medians = {way: [statistics.median(each) for each in of_way] for way, of_way in seconds.items()}
    return Race(medians, statistics.median(once), difference)


def table(counted: dict[str, list[tuple]], raced: Race) -> str:
    """One line a block, and the sums of all and of the decoder's."""
    rows: list[tuple[str, Sequence[float]]] = []
    for n in range(1, len(counted["ours"]) + 1):
        costs = [counted[way][n - 1][which] for which in (0, 1) for way in WAYS]
        rows.append((f"{n}", [*costs, *(raced.seconds[way][n - 1] for way in WAYS)]))
    blocks, decoder = ([values for _, values in rows[first:]] for first in (0, len(rows) // 2))
    for name, of in (("all", blocks), ("decoder", decoder)):
        rows.append((name, [sum(column) for column in zip(*of, strict=True)]))
        rows[-1][1][2:4] = [max(column) for column in list(zip(*of, strict=True))[2:4]]  # a peak is no sum
    lines = [f"{name:>8}" + "".join(f"{value:11.2f}" for value in values) for name, values in rows]
    heads = [f"{'':8}{'VGG16, passes':>22}{'GiB, at most':>22}{'small, seconds':>22}"]
    return "\n".join([*heads, f"{'block':>8}" + "".join(f"{way:>11}" for way in WAYS) * 3, *lines])


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table, and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    counted, raced = count(VGG16), race(SMALL, (96, 128), options.images, options.repeats)
    print(table(counted, raced))
    print(f"ours, once: {len(TASKS)} passes an image; {raced.once:.2f} s for {options.images} images")
    memory = {way: [gib for _, gib in counted[way]] for way in WAYS}
    decoder = VGG16.blocks // 2 + 1
    figures = {
        "flop_ratio_all": flop_ratio(counted, 1),
        "flop_ratio_decoder": flop_ratio(counted, decoder),
        "time_ratio": raced.ratio(1),
        "time_ratio_decoder": raced.ratio(decoder),
        "peak_memory_ratio": max(memory["obvious"]) / max(memory["ours"]),
        "peak_memory_ratio_decoder": max(memory["obvious"][decoder - 1 :])
        / max(memory["ours"][decoder - 1 :]),
    }
    figures = {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps(figures | {"max_loss_difference": raced.difference, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
