"""A task knows what a network's response means: channels, decoding, loss, target and metrics.

A target comes from a sample by one rule, whoever made the sample: the ground truth for a teacher, the
teachers' decoded predictions for a student. Nothing that learns can tell the two apart.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kamal_lib.losses.dense import (
    at_least_float32,
    cross_entropy,
    depth_loss,
    expected_depth,
    normal_loss,
    unit_normals,
)
from kamal_lib.losses.distillation import soft_target_loss
from kamal_lib.metrics import DepthErrors, NormalErrors, SegmentationScores, SetMetric
from kamal_lib.sample import VOID, known_depth


@runtime_checkable
class Task(Protocol):
    """What every task offers. `key` is the entry of a sample that holds its target."""

    @property
    def key(self) -> str: ...
    @property
    def channels(self) -> int: ...
    def decode(self, response: Tensor) -> Tensor: ...
    def loss(self, response: Tensor, target: Tensor) -> Tensor: ...
    def metric(self) -> SetMetric: ...


@dataclass(frozen=True)
class Segmentation:
    """Scene parsing: one channel a class, S = arg max, cross-entropy (Ye et al., Eq. 1)."""

    classes: tuple[str, ...]
    key = "labels"

    @property
    def channels(self) -> int:
        """One logit a class."""
        return len(self.classes)

    def decode(self, response: Tensor) -> Tensor:
        """Class ids, batch × height × width: the one-hot S that supervises the student."""
        return response.argmax(dim=1)

    def loss(self, response: Tensor, target: Tensor) -> Tensor:
        """Eq. 1 in nats."""
        return cross_entropy(response, target)

    def metric(self) -> SetMetric:
        """mIoU and pixel accuracy of a whole set."""
        return SegmentationScores(self.channels)


class SoftSegmentation(Segmentation):
    """Scene parsing whose target is the teacher's whole distribution over the classes; KL at temperature 1.

    The paper teaches with one-hot S; this is the option beside it. Measured it is as `Segmentation`.
    """

    key = "probabilities"

    def decode(self, response: Tensor) -> Tensor:
        """Probabilities, batch × classes × height × width."""
        return at_least_float32(response).softmax(dim=1)

    def loss(self, response: Tensor, target: Tensor) -> Tensor:
        """KL(teacher ‖ student) in nats."""
        return soft_target_loss(response, target)


@dataclass(frozen=True)
class Depth:
    """Depth by classification into `bins` bins of `bin_length` metres (Ye et al., Eqs. 2 and 3)."""

    bins: int = 40
    bin_length: float = 0.25
    key = "depth"

    @property
    def channels(self) -> int:
        """One logit a bin."""
        return self.bins

    def decode(self, response: Tensor) -> Tensor:
        """Metres, batch × height × width: Eq. 2."""
        return expected_depth(response, bin_length=self.bin_length)

    def loss(self, response: Tensor, target: Tensor) -> Tensor:
        """Eq. 3 in square metres."""
        return depth_loss(self.decode(response), target)

    def metric(self) -> SetMetric:
        """abs rel, sqr rel, rmse, log10 and δ^k of a whole set, whole image, no cap."""
        return DepthErrors()


@dataclass(frozen=True)
class LogDepth:
    """Depth as a choice among `bins` that are equally wide in log10, from `nearest` to `farthest` metres.

    Liu et al., section 3.2: classified, and decoded by "a soft weighted sum as in" Yin et al. (2019), which
    is one of logarithms: D = 10^(Σ_b p_b · log10 c_b), c_b the middle of bin b in log10. The loss is the
    cross-entropy with the bin that the depth is in; depths beyond either end belong to the bin there. (Yin
    et al. also reward near misses, by weights exp(−α (a − b)²) of the bins.)

    Raises ValueError for bins that are none.
    """

    bins: int = 40
    nearest: float = 0.5
    farthest: float = 10.0
    key = "depth"

    def __post_init__(self):
        if not (0 < self.nearest < self.farthest < math.inf and 2 <= self.bins < VOID):
            raise ValueError(
                f"log-spaced bins must be 2 to {VOID - 1} of them between two depths above 0, got "
                f"{self.bins} from {self.nearest} to {self.farthest} m"
            )

    @property
    def channels(self) -> int:
        """One logit a bin."""
        return self.bins

    @property
    def step(self) -> float:
        """The width of a bin, in log10 of metres."""
        return math.log10(self.farthest / self.nearest) / self.bins

    def bin_of(self, depth: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Bin 0..bins−1, `VOID` where the depth is unknown. Raises ValueError for what is no depth."""
        known = known_depth(depth)
        place = (torch.where(known, depth, 1.0) / self.nearest).log10() / self.step
        return torch.where(known, place.floor().long().clamp(0, self.bins - 1), VOID)

    def decode(
        self, response: Float[Tensor, "batch bins height width"]
    ) -> Float[Tensor, "batch height width"]:
        """Metres."""
        p = at_least_float32(response).softmax(dim=1)
        middles = torch.arange(self.bins, device=p.device, dtype=p.dtype).add(0.5) * self.step
        return 10 ** (math.log10(self.nearest) + torch.einsum("nbhw,b->nhw", p, middles))

    def loss(self, response: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy in nats over the pixels of known depth."""
        return cross_entropy(response, self.bin_of(target))

    def metric(self) -> SetMetric:
        """As of `Depth`."""
        return DepthErrors()


@dataclass(frozen=True)
class Normals:
    """Surface normals in camera axes: three channels, made a unit vector, mean cosine (Ye et al., Eq. 4)."""

    key = "normals"
    channels = 3

    def decode(self, response: Tensor) -> Tensor:
        """Unit vectors, batch × 3 × height × width."""
        return unit_normals(response)

    def loss(self, response: Tensor, target: Tensor) -> Tensor:
        """Eq. 4, from −1 (right everywhere) to 1."""
        return normal_loss(self.decode(response), target)

    def metric(self) -> SetMetric:
        """Mean and median angle, and the shares within 11.25, 22.5 and 30 degrees, of a whole set."""
        return NormalErrors()


def task_losses(
    tasks: Mapping[str, Task],
    responses: Mapping[str, Tensor],
    batch: Mapping[str, Any],
    weights: Mapping[str, float],
) -> dict[str, Tensor]:
    """{task: λ_task · loss} of every response.

    Raises KeyError where the batch has no target for a task, ValueError for a response with the channels of
    another task or of other classes.
    """
    losses = {}
    for name, response in responses.items():
        task = tasks[name]
        if task.key not in batch:
            raise KeyError(
                f"the {name} loss needs {task.key!r} in every sample, got {sorted(batch)}: "
                f"unlabelled images must first be given their teachers' predictions"
            )
        if response.shape[1] != task.channels:
            raise ValueError(
                f"the {name} network answers in {response.shape[1]} channels, its task has {task.channels}: "
                f"was it trained for other classes or bins?"
            )
        losses[name] = weights.get(name, 1.0) * task.loss(response, batch[task.key])
    return losses


class DirectObjective(nn.Module):
    """A whole network against its samples' targets: how teachers learn, and how a TargetNet is fine-tuned."""

    def __init__(
        self, network: nn.Module, tasks: Mapping[str, Task], weights: Mapping[str, float] | None = None
    ):
        super().__init__()
        self.network, self.tasks, self.weights = network, dict(tasks), dict(weights or {})

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """{task: loss}."""
        return task_losses(self.tasks, self.network(batch["image"]), batch, self.weights)
