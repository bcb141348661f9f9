"""Depth among log-spaced bins (Liu et al., section 3.2)."""

import math

import pytest
import torch

from kamal_lib.sample import VOID
from kamal_lib.tasks import LogDepth, Task

FOUR = LogDepth(bins=4, nearest=0.1, farthest=1000.0)  # a decade each: 0.1 to 1, to 10, to 100, to 1000


def test_bins_and_middles_by_hand():
    assert isinstance(FOUR, Task)
    depth = torch.tensor([[[0.0, 0.05, 0.5, 2.0, 50.0, 500.0, 5000.0]]])
    assert FOUR.bin_of(depth).tolist() == [[[VOID, 0, 0, 1, 2, 3, 3]]]
    sure = 100.0 * torch.eye(4).view(4, 4, 1, 1)
    assert FOUR.decode(sure).flatten().tolist() == pytest.approx(
        [10**e for e in (-0.5, 0.5, 1.5, 2.5)], rel=1e-5
    )
    assert FOUR.loss(sure[:1], torch.full((1, 1, 1), 0.5)).item() == pytest.approx(0, abs=1e-6)


def test_the_sum_is_one_of_logarithms():
    even = torch.zeros(1, 4, 1, 1)
    assert FOUR.decode(even).item() == pytest.approx(10.0, rel=1e-5)  # not the mean 94 m of the middles
    assert FOUR.loss(even, torch.full((1, 1, 1), 7.0)).item() == pytest.approx(math.log(4), rel=1e-6)
    assert FOUR.loss(even, torch.zeros(1, 1, 1)).item() == 0


def test_a_sure_bin_is_right_within_half_a_step():
    task = LogDepth()
    depth = torch.linspace(0.5, 9.99, 500).view(1, 20, 25)
    response = 100.0 * torch.nn.functional.one_hot(task.bin_of(depth), 40).permute(0, 3, 1, 2).float()
    ratio = (task.decode(response) / depth).log10().abs()
    assert float(ratio.max()) <= task.step / 2 + 1e-4


@pytest.mark.parametrize(
    "wrong", [{"bins": 1}, {"bins": 255}, {"nearest": 0.0}, {"nearest": 20.0}, {"farthest": math.inf}]
)
def test_what_is_no_bins(wrong):
    with pytest.raises(ValueError, match="log-spaced bins must be 2 to 254"):
        LogDepth(**wrong)
