"""What a network costs: parameters, multiply-adds and time for one image."""

import time
from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(*networks: nn.Module) -> int:
    """Trainable numbers of all the networks together, each counted once."""
    return sum({id(p): p.numel() for network in networks for p in network.parameters()}.values())


def multiply_adds(network: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-adds of convolutions and matrix products for one RGB image of `size` (height, width)."""
    image = torch.zeros(1, 3, *size, device=next(network.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return counter.get_total_flops() // 2  # the counter takes a multiply-add for two operations


def latencies(
    groups: Mapping[str, Sequence[nn.Module]], size: tuple[int, int], *, rounds: int = 30
) -> dict[str, float]:
    """{group: median seconds for one RGB image of `size` (height, width) through all of its networks}.

    The groups take turns in every round, so that a busy machine slows all of them: quote ratios.
    """
    seconds: dict[str, list[float]] = {name: [] for name in groups}
    image = torch.rand(1, 3, *size, device=next(next(iter(groups.values()))[0].parameters()).device)
    with torch.no_grad():
        for _ in range(rounds + 3):
            for name, networks in groups.items():
                start = time.perf_counter()
                for network in networks:
                    network(image)
                if image.is_cuda:
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
    return {name: median(each[3:]) for name, each in seconds.items()}  # the first rounds warm up
