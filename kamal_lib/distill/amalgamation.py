"""Knowledge amalgamation, block by block (Ye et al., sections 5.1 and 5.2): Eqs. 5 to 9.

The student learns block n "intertwined with the teachers": its features F_u^n are projected into each
teacher's domain by that teacher's channel coding, take the place of the teacher's own features of block n,
and the rest of the teacher turns them into a prediction. The loss compares that prediction with the one
which the whole teacher made of the same image. No label takes part.

Eqs. 8 and 9 are Eq. 6 with other teachers: offline there is one more, online a TargetNet is one of them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kamal_lib.models.blocks import Activation
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.encoder_decoder import EncoderDecoder, check_block
from kamal_lib.models.target_net import Network, teacher_of_task
from kamal_lib.tasks import Task, task_losses

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """In eval mode, so that no buffer moves, and without gradients for its own parameters."""
    return module.eval().requires_grad_(False)


class _Block(nn.Module):
    """What Eqs. 5 and 6 share: block n and its codings learn, everything else is used frozen."""

    def __init__(
        self,
        student: EncoderDecoder,
        teachers: Mapping[str, Network],
        codings: Mapping[str, ChannelCoding],
        n: int,
        weights: Mapping[str, float],
        train_prefix: bool,
    ):
        super().__init__()
        check_block(n, len(student.blocks), first=1)
        for name, teacher in teachers.items():
            check_same_blocks(student, teacher, name)
            if any(part.training for part in teacher.modules()):
                raise ValueError(
                    f"the {name} teacher is in training mode, where its norm layers follow the student's "
                    f"batches: call eval() on it, and make its predictions in eval mode, too"
                )
        if missing := sorted(set(teachers) - set(codings)):
            raise ValueError(f"teachers {missing} have no channel coding at block {n}: got {sorted(codings)}")
        first = 0 if train_prefix else n - 1
        self.learning = nn.ModuleList(student.blocks[first:n]).requires_grad_(True)
        self.codings = nn.ModuleDict(dict(codings)).requires_grad_(True)
        self.n, self.weights = n, dict(weights)
        # Tuples hide modules from torch: no parameters, no state, no train(). Only `_apply` moves them along.
        self._prefix = tuple(freeze(block) for block in student.blocks[:first])
        self._teachers = tuple((name, freeze(teacher)) for name, teacher in teachers.items())
        self._start = student.forward_to

    def _apply(self, fn, recurse: bool = True) -> "_Block":
        for module in (*self._prefix, *(teacher for _, teacher in self._teachers)):
            module._apply(fn)
        return super()._apply(fn, recurse)

    def student_to_n(self, image: Float[Tensor, "batch 3 height width"]) -> Activation:
        """F_u^n: without gradients through the frozen blocks, with them through those that learn."""
        with torch.no_grad():
            a = self._start(image, len(self._prefix))
        for block in self.learning:
            a = block(a)
        return a


class BlockObjective(_Block):
    """Eq. 6 at block n: L_u = Σ_t λ_t L_t(target, prediction of task t with F_ut^n in place of F_t^n).

    With three teachers it is Eq. 8. With a TargetNet among them, whose coding is the U-coding, it is Eq. 9:
    λ_1 L_norm + λ_2 L_u2 is the same sum, with λ_2 multiplied into the weights of the TargetNet's tasks.

    What learns is block n of the student and its codings; they are this module's parameters and its whole
    state. Blocks 1..n−1 of the student and the teachers are used frozen, and stay in eval mode whatever is
    asked. With `train_prefix` blocks 1..n learn together. Un-pooling uses the student's switches up to
    block n and the hybrid's own beyond, as at test time; with `switches="teacher"` the rest of the teacher
    un-pools with the teacher's own, which costs a pass through it and cannot be had at test time.

    A batch holds images and, as targets, the teachers' own stored predictions. One coding serves each
    teacher, so a teacher of two tasks has one. Raises ValueError for n outside 1..N, for teachers that do
    not share the student's blocks or are in training mode, for two teachers of one task, for a coding or a
    task that is missing, for weights that are not those of the teachers' tasks, and for other `switches`.
    """

    def __init__(
        self,
        student: EncoderDecoder,
        teachers: Mapping[str, Network],
        codings: Mapping[str, ChannelCoding],
        n: int,
        *,
        tasks: Mapping[str, Task],
        weights: Mapping[str, float],
        train_prefix: bool = False,
        switches: str = "student",
    ):
        super().__init__(student, teachers, codings, n, weights, train_prefix)
        named = set(teacher_of_task(teachers))
        if named != set(weights):
            raise ValueError(
                f"Eq. 6 needs one weight λ for each of the tasks {sorted(named)} of the teachers, "
                f"got {dict(weights)}"
            )
        if missing := sorted(named - set(tasks)):
            raise ValueError(f"the teachers predict {missing}, which is no task here: got {sorted(tasks)}")
        if switches not in ("student", "teacher"):
            raise ValueError(f"switches must be 'student' or 'teacher', got {switches!r}")
        self.tasks, self.switches = dict(tasks), switches

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """{task: λ · loss} of the teachers' predictions from the coded features of block n."""
        a = self.student_to_n(batch["image"])
        losses = {}
        for name, teacher in self._teachers:
            coded = a.with_features(self.codings[name](a.features))
            if self.switches == "teacher":
                with torch.no_grad():
                    coded = coded._replace(switches=teacher.forward_to(batch["image"], self.n).switches)
            predictions = teacher.forward_from(coded, self.n)  # the rest of the teacher
            losses |= task_losses(self.tasks, predictions, batch, self.weights)
        return losses


class FeatureObjective(_Block):
    """Eq. 5 at block n: L_u = Σ_t λ_t ‖F_ut^n − F_t^n‖², the coded features against the teacher's own.

    The norm is taken as the mean of the squared differences over images, channels and pixels, so that λ does
    not depend on the size of a block; the sum of the paper is that times their number. A batch holds images.
    No rest of a teacher is needed, but a pass through each up to block n at every step.

    `weights` are by teacher. Raises ValueError as `BlockObjective`.
    """

    def __init__(
        self,
        student: EncoderDecoder,
        teachers: Mapping[str, Network],
        codings: Mapping[str, ChannelCoding],
        n: int,
        *,
        weights: Mapping[str, float],
        train_prefix: bool = False,
    ):
        super().__init__(student, teachers, codings, n, weights, train_prefix)
        if missing := sorted(set(teachers) - set(weights)):
            raise ValueError(f"teachers {missing} have no weight λ in Eq. 5: got {dict(weights)}")

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """{teacher: λ · loss}."""
        a = self.student_to_n(batch["image"])
        losses = {}
        for name, teacher in self._teachers:
            with torch.no_grad():
                target = teacher.forward_to(batch["image"], self.n).features
            coded = self.codings[name](a.features)
            losses[name] = self.weights[name] * F.mse_loss(coded.float(), target.float())
        return losses


def check_same_blocks(student: EncoderDecoder, teacher: Network, name: str) -> None:
    """Raises ValueError unless the teacher's blocks have the student's channels and pools, block by block.

    Any module that maps an Activation to the next can be a block, whoever built it, if it says its
    `channels` and whether it halves or doubles the size (`pool`).
    """
    ours = [(block.channels, block.pool) for block in student.blocks]
    for task in teacher.tasks:
        theirs = [(block.channels, block.pool) for block in teacher.blocks_of(task)]
        if len(ours) != len(theirs):
            raise ValueError(
                f"the {name} teacher has {len(theirs)} blocks and the student {len(ours)}: amalgamation "
                f"pairs block n with block n, so build the student with the teachers' architecture"
            )
        for n, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
            if a != b:
                raise ValueError(
                    f"block {n} of the {name} teacher has {b[0]} channels and {'a' if b[1] else 'no'} pool, "
                    f"the student's has {a[0]} and {'a' if a[1] else 'no'} pool: channel coding scales "
                    f"channels and keeps their number, so build the student with the teachers' architecture"
                )


def branch_points(losses: Mapping[str, Sequence[float | None]]) -> dict[str, int]:
    """Eq. 7: p_t = arg min_n L_t^n over the decoder's blocks, N/2 < n <= N; the first of equal minima.

    losses[task][n − 1] is the task's final loss of block n, measured on held-out images as agreement with the
    teachers, without labels; None in the encoder, where only the decoder was amalgamated. Raises ValueError
    where there is no loss, or one that is not finite.
    """
    points = {}
    for task, values in losses.items():
        first = len(values) // 2
        candidates = [math.nan if value is None else value for value in values[first:]]
        if not candidates or not all(map(math.isfinite, candidates)):
            raise ValueError(
                f"Eq. 7 needs a finite loss of {task} for every block, got {list(values)}: "
                f"were there held-out images to measure it on?"
            )
        points[task] = first + 1 + candidates.index(min(candidates))
    return points
