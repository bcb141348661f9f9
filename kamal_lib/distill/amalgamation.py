"""Knowledge amalgamation, block by block (Ye et al., section 5.1): Eqs. 6 and 7.

The student learns block n "intertwined with the teachers": its features F_u^n are projected into each
teacher's domain by that teacher's channel coding, take the place of the teacher's own features of block n,
and the rest of the teacher turns them into a prediction. The loss compares that prediction with the one
which the whole teacher made of the same image. No label takes part.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.encoder_decoder import EncoderDecoder, check_block
from kamal_lib.tasks import Task, task_losses

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """In eval mode, so that no buffer moves, and without gradients for its own parameters."""
    return module.eval().requires_grad_(False)


class BlockObjective(nn.Module):
    """Eq. 6 at block n: L_u = Σ_t λ_t L_t(target, prediction of teacher t with F_ut^n in place of F_t^n).

    What learns is block n of the student and its codings; they are this module's parameters and its whole
    state. Blocks 1..n−1 of the student and the teachers are used frozen, and stay in eval mode whatever is
    asked. With `train_prefix` blocks 1..n learn together. Un-pooling uses the student's switches up to
    block n and the hybrid's own beyond, as at test time.

    A batch holds images and, as targets, the teachers' own stored predictions. One coding serves each
    teacher, so a teacher of two tasks has one. Raises ValueError for n outside 1..N, for teachers that do
    not share the student's blocks, and for a coding or a weight that is missing.
    """

    def __init__(
        self,
        student: EncoderDecoder,
        teachers: Mapping[str, EncoderDecoder],
        codings: Mapping[str, ChannelCoding],
        n: int,
        *,
        tasks: Mapping[str, Task],
        weights: Mapping[str, float],
        train_prefix: bool = False,
    ):
        super().__init__()
        check_block(n, len(student.blocks), first=1)
        for name, teacher in teachers.items():
            check_same_blocks(student, teacher, name)
        if missing := sorted(set(teachers) - set(codings)):
            raise ValueError(f"teachers {missing} have no channel coding at block {n}: got {sorted(codings)}")
        named = {task for teacher in teachers.values() for task in teacher.heads}
        if missing := sorted(named - set(weights)):
            raise ValueError(f"tasks {missing} have no weight λ in Eq. 6: got {dict(weights)}")
        first = 0 if train_prefix else n - 1
        self.learning = nn.ModuleList(student.blocks[first:n]).requires_grad_(True)
        self.codings = nn.ModuleDict(dict(codings))
        self.n, self.tasks, self.weights = n, dict(tasks), dict(weights)
        # Tuples hide modules from torch: no parameters, no state, no train(). Only `_apply` moves them along.
        self._prefix = tuple(freeze(block) for block in student.blocks[:first])
        self._teachers = tuple((name, freeze(teacher)) for name, teacher in teachers.items())
        self._start = student.forward_to

    def _apply(self, fn, recurse: bool = True) -> "BlockObjective":
        for module in (*self._prefix, *(teacher for _, teacher in self._teachers)):
            module._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """{task: λ · loss} of the teachers' predictions from the coded features of block n."""
        with torch.no_grad():
            a = self._start(batch["image"], len(self._prefix))
        for block in self.learning:
            a = block(a)
        losses = {}
        for name, teacher in self._teachers:
            coded = a.with_features(self.codings[name](a.features))
            predictions = teacher.forward_from(coded, self.n)  # the rest of the teacher
            losses |= task_losses(self.tasks, predictions, batch, self.weights)
        return losses


def check_same_blocks(student: EncoderDecoder, teacher: EncoderDecoder, name: str) -> None:
    """Raises ValueError unless the teacher's blocks have the student's channels and pools, block by block."""
    ours = [(block.channels, block.pool) for block in student.blocks]
    theirs = [(block.channels, block.pool) for block in teacher.blocks]
    if len(ours) != len(theirs):
        raise ValueError(
            f"the {name} teacher has {len(theirs)} blocks and the student {len(ours)}: amalgamation pairs "
            f"block n with block n, so build the student with the teachers' architecture"
        )
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        if a != b:
            raise ValueError(
                f"block {n} of the {name} teacher has {b[0]} channels and {'a' if b[1] else 'no'} pool, the "
                f"student's has {a[0]} and {'a' if a[1] else 'no'} pool: channel coding scales channels and "
                f"keeps their number, so build the student with the teachers' architecture"
            )


def branch_points(losses: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """Eq. 7: p_t = arg min_n L_t^n over the decoder's blocks, N/2 < n <= N; the first of equal minima.

    losses[task][n − 1] is the task's final loss of block n, measured on held-out images as agreement with the
    teachers, without labels. Raises ValueError where there is no loss, or one that is not finite.
    """
    points = {}
    for task, values in losses.items():
        first = len(values) // 2
        candidates = torch.tensor(values[first:], dtype=torch.float64)
        if not len(candidates) or not bool(candidates.isfinite().all()):
            raise ValueError(
                f"Eq. 7 needs a finite loss of {task} for every block, got {list(values)}: "
                f"were there held-out images to measure it on?"
            )
        points[task] = first + 1 + int(candidates.argmin())
    return points
