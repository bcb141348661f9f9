"""TargetNet: one encoder, a shared part of the decoder, a branch for each task (Ye et al., section 5.1.3)."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

from jaxtyping import Float
from torch import Tensor, nn

from kamal_lib.models.blocks import Activation
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.encoder_decoder import EncoderDecoder, check_block, normalise


class Coded(nn.Module):
    """A block with a coding in front: a block like any other, which codes the features that it is given.

    So the rest of a TargetNet behind block n, its own coding included, is a list of blocks again.
    """

    def __init__(self, coding: nn.Module, block: nn.Module):
        super().__init__()
        self.coding, self.block = coding, block
        self.channels, self.pool = block.channels, block.pool

    def forward(self, activation: Activation) -> Activation:
        return self.block(activation.with_features(self.coding(activation.features)))


class Branch(nn.Module):
    """What follows the trunk for one task: its coding at block `point`, blocks point+1..N, and its head."""

    def __init__(self, point: int, coding: ChannelCoding, blocks: Sequence[nn.Module], head: nn.Module):
        super().__init__()
        self.point = point
        self.coding = coding
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(self, trunk: Activation) -> Tensor:
        """The task's response to F^point of the trunk."""
        return self.forward_from(trunk.with_features(self.coding(trunk.features)), self.point)

    def forward_from(self, activation: Activation, n: int) -> Tensor:
        """The task's response when `activation` replaces this branch's block n >= point, uncoded."""
        for block in self.blocks[n - self.point :]:
            activation = block(activation)
        return self.head(activation.features)


class TargetNet(nn.Module):
    """The student after it has branched out; it can itself be a teacher.

    The trunk is blocks 1..max(branch points). `forward_from(activation, n)` with n up to a task's branch
    point goes trunk, coding, branch; beyond it, `activation` replaces the output of that task's own branch
    block n.
    """

    def __init__(self, trunk: Sequence[nn.Module], branches: Mapping[str, Branch]):
        super().__init__()
        if not branches:
            raise ValueError("a TargetNet needs a branch for each task, got none")
        last = max(branch.point for branch in branches.values())
        if len(trunk) != last:
            raise ValueError(
                f"the trunk has {len(trunk)} blocks, but the last branch leaves it at block {last}: "
                f"keep exactly blocks 1..{last}"
            )
        self.trunk = nn.ModuleList(trunk)
        self.branches = nn.ModuleDict(dict(branches))

    @property
    def branch_points(self) -> dict[str, int]:
        """{task: p}, the trunk block whose features the task's branch reads."""
        return {task: branch.point for task, branch in self._branches()}

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it predicts."""
        return tuple(self.branches)

    def suffix(self, task: str, n: int) -> tuple[list[nn.Module], nn.Module]:
        """(blocks n+1..N on the way to the task's response, head): what `forward_from` sends F^n through.

        Up to the branch point these are the rest of the trunk, the coding, the branch; beyond it the rest of
        the branch. Raises ValueError for a bad n.
        """
        branch: Branch = self.branches[task]  # pyright: ignore[reportAssignmentType]
        check_block(n, branch.point + len(branch.blocks))
        if n > branch.point:
            return list(branch.blocks[n - branch.point :]), branch.head
        rest = list(self.trunk[n : branch.point])
        if not branch.blocks:
            return rest, nn.Sequential(branch.coding, branch.head)
        return [*rest, Coded(branch.coding, branch.blocks[0]), *branch.blocks[1:]], branch.head

    def blocks_of(self, task: str) -> list[nn.Module]:
        """Blocks 1..N on the way to the task's response, without any coding."""
        return [plain(block) for block in self.suffix(task, 0)[0]]

    def _branches(self) -> list[tuple[str, Branch]]:
        return list(self.branches.items())  # pyright: ignore[reportReturnType]

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """As `load_state_dict`. Raises ValueError for the weights of a network with other branch points."""
        given: dict[str, set[int]] = {}
        for name in weights:
            kind, task, part, *rest = [*name.split("."), "", ""]
            if kind == "branches":
                given.setdefault(task, set()).update([int(rest[0])] if part == "blocks" else [])
        ours = {task: len(branch.blocks) for task, branch in self._branches()}
        if (theirs := {task: len(blocks) for task, blocks in given.items()}) != ours:
            raise ValueError(
                f"these weights have {theirs} blocks in their branches, this network {ours}: build it with "
                f"the branch points that the weights were trained with (they stand in the metrics)"
            )
        self.load_state_dict(dict(weights))

    def forward_to(self, image: Float[Tensor, "batch 3 height width"], n: int) -> Activation:
        """The trunk's F^n. Raises ValueError for n outside 0..first branch point, where the tasks part."""
        if not 0 <= n <= (first := min(self.branch_points.values())):
            raise ValueError(
                f"this TargetNet has one F^n for n = 0..{first} only, got n = {n}: its tasks part at "
                f"{self.branch_points}"
            )
        activation = Activation(normalise(image))
        for block in self.trunk[:n]:
            activation = block(activation)
        return activation

    def forward_from(self, activation: Activation, n: int) -> dict[str, Tensor]:
        """The responses when `activation` replaces block n's output. Raises ValueError for a bad n."""
        blocks = {branch.point + len(branch.blocks) for _, branch in self._branches()}
        check_block(n, max(blocks))
        responses = {
            task: branch.forward_from(activation, n) for task, branch in self._branches() if branch.point < n
        }
        for m in range(n, len(self.trunk) + 1):
            if m > n:
                activation = self.trunk[m - 1](activation)
            responses |= {t: branch(activation) for t, branch in self._branches() if branch.point == m}
        return {task: responses[task] for task in self.branch_points}

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> dict[str, Tensor]:
        """{task: response}, each batch × channels × height × width."""
        return self.forward_from(self.forward_to(image, 0), 0)


def plain(block: nn.Module) -> nn.Module:
    """The block itself, without the codings in front of it."""
    while isinstance(block, Coded):
        block = block.block
    return block


Network = EncoderDecoder | TargetNet
"""What can teach: it has `tasks`, can be cut (`forward_to`, `forward_from`) and taken apart (`suffix`)."""


def teacher_of_task(teachers: Mapping[str, Network]) -> dict[str, str]:
    """{task: name of its teacher}. Raises ValueError where two teachers have the same task."""
    found: dict[str, str] = {}
    for name, teacher in teachers.items():
        for task in teacher.tasks:
            if task in found:
                raise ValueError(
                    f"{found[task]} and {name} both teach {task}: the student learns a task from one "
                    f"teacher, so leave one of them out"
                )
            found[task] = name
    return found


def branch_out(
    student: EncoderDecoder,
    codings: Mapping[str, Sequence[ChannelCoding]],
    teachers: Mapping[str, Network],
    points: Mapping[str, int],
) -> TargetNet:
    """Step 4 of section 5.1: the student's trunk, and the corresponding blocks of the teachers as branches.

    codings[teacher][n - 1] is the teacher's coding at block n, points[task] the task's branch block. A task
    of a TargetNet gets that one's blocks on its way: up to its own branch point those of the trunk, and there
    its own coding. Everything is copied: fine-tuning the result, all of which learns, changes neither student
    nor teachers. Raises ValueError for a branch outside the decoder, N/2 < p <= N, for points that are not
    those of the teachers' tasks, for codings that are missing, and for two teachers of one task.
    """
    total, names = len(student.blocks), teacher_of_task(teachers)
    if set(points) != set(names):
        raise ValueError(
            f"each task of the teachers needs one branch point: {sorted(names)}, got {dict(points)}"
        )
    if short := {name: len(codings.get(name, ())) for name in teachers if len(codings.get(name, ())) < total}:
        raise ValueError(
            f"branch_out needs {total} codings of each teacher, one a block, got {short}: they go by the "
            f"teachers' names, {', '.join(teachers)}"
        )
    for task, point in points.items():
        if not total // 2 < point <= total:
            raise ValueError(
                f"{task} cannot branch out at block {point}: the decoder's blocks are "
                f"{total // 2 + 1}..{total} (Eq. 7)"
            )
    branches = {}
    for task, point in points.items():
        blocks, head = teachers[names[task]].suffix(task, point)
        coding = codings[names[task]][point - 1]
        branches[task] = Branch(point, deepcopy(coding), deepcopy(blocks), deepcopy(head))
    trunk = deepcopy(list(student.blocks[: max(points.values())]))
    return TargetNet(trunk, branches).requires_grad_(True)  # whatever was frozen in the originals
