"""ESPNet-C of Mehta et al., "ESPNet: Efficient Spatial Pyramid of Dilated Convolutions" (ECCV 2018).

The smallest student of Liu et al.'s Table 7: ESPNet without its decoder, trained from scratch.
"""

from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

RATES = (1, 2, 4, 8, 16)
"""Dilations of the K = 5 branches of a pyramid."""


def norm_and_prelu(channels: int) -> nn.Sequential:
    """BatchNorm and a PReLU with one slope a channel."""
    return nn.Sequential(nn.BatchNorm2d(channels, eps=1e-3), nn.PReLU(channels))


class ESPModule(nn.Module):
    """Reduce, split, transform, merge (section 3): a wide view for few weights.

    A 1×1 convolution reduces to d = `channels` / K channels; K dilated 3×3 convolutions look at those, the
    first of them giving what is left of `channels`. Hierarchical feature fusion adds every branch from the
    third on to the one before, which takes the grid pattern of large dilations away; then all are put side by
    side. With `stride` 2 the reduction is a 3×3 convolution of that stride, and nothing is added; with 1 the
    input is added, and must have `channels` channels.
    """

    def __init__(self, inputs: int, channels: int, *, stride: int = 1):
        super().__init__()
        d, side = channels // len(RATES), 1 if stride == 1 else 3
        self.reduce = nn.Conv2d(inputs, d, side, stride=stride, padding=side // 2, bias=False)
        widths = (channels - (len(RATES) - 1) * d, *[d] * (len(RATES) - 1))
        self.pyramid = nn.ModuleList(
            nn.Conv2d(d, width, 3, padding=rate, dilation=rate, bias=False)
            for width, rate in zip(widths, RATES, strict=True)
        )
        self.norm = norm_and_prelu(channels)
        self.residual = stride == 1

    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch channels _ _"]:
        """The input's size, or half of it, rounded up."""
        reduced = self.reduce(x)
        first, *others = (conv(reduced) for conv in self.pyramid)
        merged = torch.cat((first, *accumulate(others)), dim=1)
        return self.norm(merged + x if self.residual else merged)


def half(image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 _ _"]:
    """The image at half its size, rounded up as a convolution of stride 2 does."""
    return F.avg_pool2d(image, 3, stride=2, padding=1)


class ESPNetC(nn.Module):
    """The features of ESPNet-C: 256 channels at 1/`stride` of the image, 8 as published.

    Three levels of 16, 64 and 128 channels with `modules` ESP modules after the second and third step down.
    Each level begins with what the one before began and ended with, and with the shrunken image beside it.
    `stride` 4 leaves out the first step down, for images of about 48×64.
    """

    channels = 256

    def __init__(self, *, stride: int = 8, modules: tuple[int, int] = (2, 8)):
        super().__init__()
        self.stride = stride
        first = nn.Conv2d(3, 16, 3, stride=stride // 4, padding=1, bias=False)
        self.level1 = nn.Sequential(first, norm_and_prelu(16))
        self.join1 = norm_and_prelu(16 + 3)
        self.down2 = ESPModule(16 + 3, 64, stride=2)
        self.level2 = nn.Sequential(*(ESPModule(64, 64) for _ in range(modules[0])))
        self.join2 = norm_and_prelu(64 + 64 + 3)
        self.down3 = ESPModule(64 + 64 + 3, 128, stride=2)
        self.level3 = nn.Sequential(*(ESPModule(128, 128) for _ in range(modules[1])))
        self.join3 = norm_and_prelu(128 + 128)

    def forward(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 256 rows columns"]:
        """Features of the normalised image."""
        image1 = half(image) if self.stride == 8 else image
        level1 = self.join1(torch.cat((self.level1(image), image1), dim=1))
        start2 = self.down2(level1)
        level2 = self.join2(torch.cat((self.level2(start2), start2, half(image1)), dim=1))
        start3 = self.down3(level2)
        return self.join3(torch.cat((start3, self.level3(start3)), dim=1))
