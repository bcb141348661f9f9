"""What a network costs: parameters, and multiply-adds for one image."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(*networks: nn.Module) -> int:
    """Trainable numbers of all the networks together, each counted once."""
    return sum({p.data_ptr(): p.numel() for network in networks for p in network.parameters()}.values())


def multiply_adds(network: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-adds of convolutions and matrix products for one RGB image of `size` (height, width)."""
    image = torch.zeros(1, 3, *size, device=next(network.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return counter.get_total_flops() // 2  # the counter takes a multiply-add for two operations
