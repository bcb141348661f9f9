"""What a student keeps when it branches out, block by block, and what that costs in VGG16's weights.

The networks of VGG16 live on torch's meta device: shapes without numbers, so nothing is allocated.
"""

from itertools import pairwise, product

import pytest
import torch
from torch import nn

from kamal_lib.ledger import table
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.encoder_decoder import VGG16, Architecture, EncoderDecoder, build_network
from kamal_lib.models.target_net import TargetNet, branch_out

TINY = Architecture(widths=(4, 6, 8), convs=(2, 1, 2), pools=(True, False, True))
HEADS = {"segmentation": 13, "depth": 1}
WIDTHS = {  # VGG16-BN and its mirror: the channels that each block's convolutions read and write
    1: (3, 64, 64),
    2: (64, 128, 128),
    3: (128, 256, 256, 256),
    4: (256, 512, 512, 512),
    5: (512, 512, 512, 512),
    6: (512, 512, 512, 512),
    7: (512, 512, 512, 256),
    8: (256, 256, 256, 128),
    9: (128, 128, 64),
    10: (64, 64),
}


def size(*modules: nn.Module) -> int:
    """Weights, by identity: on the meta device all addresses are 0."""
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def weights(block: int) -> int:
    """By hand: 3×3 convolutions with bias, two numbers a channel for the norm layers."""
    channels = WIDTHS[block]
    return sum(9 * a * b + 3 * b for a, b in pairwise(channels))


def head(channels: int) -> int:
    return 9 * 64 * channels + channels


def parts(architecture: Architecture) -> tuple[EncoderDecoder, dict[str, EncoderDecoder], dict[str, list]]:
    """Student, teachers and codings."""
    student = build_network(architecture, {}, seed=0)
    teachers = {t: build_network(architecture, {t: c}, seed=i) for i, (t, c) in enumerate(HEADS.items(), 1)}
    codings = {task: [ChannelCoding(channels) for channels in student.channels] for task in HEADS}
    return student, teachers, codings


@pytest.fixture(scope="module")
def vgg16():
    with torch.device("meta"):
        return parts(VGG16)


def branched(parts, segmentation: int, depth: int) -> TargetNet:
    student, teachers, codings = parts
    return branch_out(student, codings, teachers, {"segmentation": segmentation, "depth": depth})


def without_codings(net: TargetNet) -> int:
    return size(net) - size(*(branch.coding for branch in net.branches.values()))


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- which blocks are kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("points", list(product((4, 5, 6), repeat=2)))
def test_blocks_up_to_the_last_branch_are_the_students_and_no_others(points):
    """Trunk: the student's blocks 1..max p. Branch: its teacher's p+1..N and head. Nothing else remains."""
    student, teachers, codings = parts(TINY)
    net = branched((student, teachers, codings), *points)
    assert len(net.trunk) == max(points)
    assert all(same(mine, theirs) for mine, theirs in zip(net.trunk, student.blocks, strict=False))
    expected = size(*student.blocks[: max(points)])
    for task, point in zip(HEADS, points, strict=True):
        branch = net.branches[task]
        own = teachers[task].blocks[point:]
        assert len(branch.blocks) == TINY.blocks - point
        assert all(same(mine, theirs) for mine, theirs in zip(branch.blocks, own, strict=True))
        assert same(branch.head, teachers[task].heads[task])
        assert same(branch.coding, codings[task][point - 1])
        expected += size(*own, teachers[task].heads[task], codings[task][point - 1])
    assert size(net) == expected


# --- what they cost ---------------------------------------------------------------------------------------


def test_blocks_of_vgg16_by_hand(vgg16):
    student, teachers, _ = vgg16
    assert [size(block) for block in student.blocks] == [weights(n) for n in WIDTHS]
    for task, channels in HEADS.items():
        assert size(teachers[task]) == sum(map(weights, WIDTHS)) + head(channels)


@pytest.mark.parametrize("points", list(product(range(6, 11), repeat=2)))
def test_a_branched_network_costs_its_blocks(vgg16, points):
    """Shared blocks once, each branch its own: all 25 pairs of branch points."""
    own = sum(weights(n) for point in points for n in range(point + 1, 11))
    shared = sum(weights(n) for n in range(1, max(points) + 1))
    assert without_codings(branched(vgg16, *points)) == shared + own + sum(map(head, HEADS.values()))


def test_later_branches_are_smaller_and_the_last_is_half_of_the_teachers(vgg16):
    """Table 1's order and share; its own counts agree with ours at b1 and b2 only (KA-16, KA-17)."""
    millions = [without_codings(branched(vgg16, point, point)) / 1e6 for point in range(6, 11)]
    assert [round(each, 2) for each in millions] == [37.09, 31.19, 29.71, 29.49, 29.45]
    assert all(later < earlier for earlier, later in pairwise(millions))
    _, teachers, _ = vgg16
    assert without_codings(branched(vgg16, 10, 9)) / size(*teachers.values()) == pytest.approx(0.5, abs=0.01)
    printed = [row["params_m"] for row in table("ye2019", "table1")["rows"]][1:]
    close = [abs(each - theirs) / theirs < 0.01 for each, theirs in zip(millions, printed, strict=True)]
    assert close == [True, True, False, False, False]


def test_codings_stay_below_the_four_percent_of_the_paper(vgg16):
    """KA-10: of all ten blocks and both tasks, beside one student; a branched network keeps one a task."""
    student, _, codings = vgg16
    of_all = size(*(coding for of_task in codings.values() for coding in of_task))
    assert of_all == 962_560
    assert 0.03 < of_all / size(student) < 0.04
    net = branched(vgg16, 10, 9)
    assert size(net) - without_codings(net) == 4096
