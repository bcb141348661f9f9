"""benchmarks/blockwise.py: what it counts, by hand; that both ways agree, and a third would not."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import pytest

from kamal_lib.models.encoder_decoder import VGG16, Architecture

PATH = Path(__file__).parents[1] / "benchmarks" / "blockwise.py"
TINY = Architecture(widths=(4, 6), convs=(1, 1), pools=(True, True))
SIZE = (8, 16)


@pytest.fixture
def blockwise():
    spec = importlib.util.spec_from_file_location("blockwise", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convolution(a: int, b: int, pixels: int) -> int:
    """Multiply-adds of one 3×3 convolution: its forward pass, or either half of its backward pass."""
    return 9 * a * b * pixels


def test_operations_by_hand(blockwise):
    """Blocks 3→4, pool, 4→6, pool, un-pool, 6→4, un-pool, 4→4, then the heads: one convolution each."""
    full, half = 8 * 16, 4 * 8
    block = [
        convolution(3, 4, full),
        convolution(4, 6, half),
        convolution(6, 4, half),
        convolution(4, 4, full),
    ]
    bins, classes = (blockwise.TASKS[task].channels for task in ("depth", "segmentation"))
    heads = convolution(4, bins, full) + convolution(4, classes, full)
    teachers = 2 * sum(block) + heads
    gates = [2 * 2 * 16 * channels for channels in (4, 6, 4, 4)]  # two codings, two layers of 16 units
    decoding = bins * full  # Eq. 2: Σ_b b·l·p
    found = blockwise.count(TINY, SIZE)
    for n in range(1, 5):
        before, rest = sum(block[: n - 1]), 2 * sum(block[n:]) + heads
        learning = 2 * block[n - 1] + 3 * gates[n - 1]  # block n's input wants no gradient
        ours = before + learning + 2 * rest + 2 * decoding
        student = 3 * sum(block[:n]) - block[0]  # the image wants no gradient
        obvious = teachers + student + 3 * gates[n - 1] + 3 * rest + 3 * decoding
        for way, expected in (("ours", ours), ("obvious", obvious)):
            assert found[way][n - 1][0] == pytest.approx(expected / (teachers / 2), rel=1e-12)


def test_memory_is_that_of_what_autograd_holds(blockwise):
    """It falls with n: fewer blocks lie between block n and the loss."""
    found = blockwise.count(TINY, SIZE)
    for n in range(4):
        assert 0 < found["ours"][n][1] < found["obvious"][n][1]
    assert all(after[1] < before[1] for before, after in pairwise(found["ours"]))


def test_one_passes_count_once(blockwise):
    """Two epochs of four blocks: 8 × 3 steps' passes against 8 × 1 and the two teachers' one pass each."""
    counted = {"obvious": [(3.0, 0.0)] * 4, "ours": [(1.0, 0.0)] * 4}
    assert blockwise.flop_ratio(counted, 1) == 24 / (8 + 2)
    assert blockwise.flop_ratio(counted, 3) == 12 / (4 + 2)
    raced = blockwise.Race({"obvious": [3.0] * 4, "ours": [1.0] * 4}, once=2.0, difference=0.0)
    assert raced.ratio(1) == 12 / 6
    assert raced.ratio(3) == 6 / 4


def test_both_ways_have_the_same_losses(blockwise):
    raced = blockwise.race(TINY, SIZE, images=8, repeats=1, batch_size=4)
    assert raced.difference <= 1e-5
    assert [len(raced.seconds[way]) for way in blockwise.WAYS] == [4, 4]
    assert min(*raced.seconds["obvious"], *raced.seconds["ours"], raced.once) > 0


def test_another_schedule_would_be_seen(blockwise, monkeypatch):
    """A way whose loss is that of the next block."""
    monkeypatch.setitem(blockwise.WAYS, "obvious", lambda nets, n: blockwise.obvious(nets, min(n + 1, 4)))
    assert blockwise.race(TINY, SIZE, images=8, repeats=1, batch_size=4).difference > 1e-3


def test_last_line_is_json(blockwise, monkeypatch, capsys):
    monkeypatch.setattr(blockwise, "VGG16", TINY)
    monkeypatch.setattr(blockwise, "SMALL", TINY)
    blockwise.main(["--images", "8", "--repeats", "1"])
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["max_loss_difference"] <= 1e-5
    assert {"flop_ratio_all", "flop_ratio_decoder", "time_ratio", "peak_memory_ratio"} <= found.keys()
    assert [line.split()[0] for line in lines[2:-1]] == ["1", "2", "3", "4", "all", "decoder"]


@pytest.mark.slow
def test_what_is_promised_for_vgg16(blockwise):
    counted = blockwise.count(VGG16)
    assert blockwise.flop_ratio(counted, 1) >= 2.3
    assert blockwise.flop_ratio(counted, 6) >= 2.8
