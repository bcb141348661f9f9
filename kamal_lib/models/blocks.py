"""A block of a network: it maps one `Activation` to the next (Ye et al., section 3).

"We take a block to be the part of a network bounded by two pooling layers." Encoder blocks end with their
pool, decoder blocks begin with their un-pooling, and both have the same signature, so that a network is a
list of blocks and the features of any block can be replaced. Pooling is a knob of its own: at small image
sizes a block boundary need not pool.
"""

from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class Switch(NamedTuple):
    """What one max-pooling remembers for the un-pooling that mirrors it.

    The size before pooling travels with the indices, so that any height and width works, odd ones too.
    """

    indices: Int[Tensor, "batch channels pooled_height pooled_width"]
    size: tuple[int, int]


class Activation(NamedTuple):
    """F^n, what a block hands to the next: its features, and the switches of the pools not yet undone."""

    features: Float[Tensor, "batch channels height width"]
    switches: tuple[Switch, ...] = ()

    def with_features(self, features: Float[Tensor, "batch channels height width"]) -> "Activation":
        """The same switches with other features: how F_us^n or F_ud^n takes the place of F^n."""
        return self._replace(features=features)


def convolutions(channels_in: int, channels: int, channels_out: int, count: int) -> nn.Sequential:
    """`count` times 3×3 convolution, batch norm, ReLU; only the last one goes to `channels_out`."""
    widths = [channels_in] + [channels] * (count - 1) + [channels_out]
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class EncoderBlock(nn.Module):
    """Convolutions, then, where `pool` is set, 2×2 max-pooling that pushes its switch."""

    def __init__(self, channels_in: int, channels: int, *, convs: int, pool: bool):
        super().__init__()
        self.convs = convolutions(channels_in, channels, channels, convs)
        self.channels, self.pool = channels, pool

    def forward(self, activation: Activation) -> Activation:
        features = self.convs(activation.features)
        if not self.pool:
            return activation.with_features(features)
        size = (features.shape[-2], features.shape[-1])
        pooled, indices = F.max_pool2d(features, 2, return_indices=True)
        return Activation(pooled, (*activation.switches, Switch(indices, size)))


class DecoderBlock(nn.Module):
    """Where `pool` is set, un-pooling with the last switch left over; then convolutions.

    All convolutions but the last keep the block's width; the last one goes to `channels_out`, the width that
    the next un-pooling needs.
    """

    def __init__(self, channels: int, channels_out: int, *, convs: int, pool: bool):
        super().__init__()
        self.convs = convolutions(channels, channels, channels_out, convs)
        self.channels, self.pool = channels_out, pool

    def forward(self, activation: Activation) -> Activation:
        features, switches = activation
        if self.pool:
            *rest, (indices, size) = switches
            features, switches = F.max_unpool2d(features, indices, [2, 2], output_size=size), tuple(rest)
        return Activation(self.convs(features), switches)
