"""The critic of holistic distillation (Liu et al., section 2.1 and Fig. 4): image and map in, a score out."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """x + γ · (what every position sees of all others), after Zhang et al., "Self-Attention GAN" (2019).

    γ starts at 0, so a fresh module changes nothing. Memory grows with the square of the number of positions.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = max(channels // 8, 1)
        self.query, self.key = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def attention(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch positions positions"]:
        """Row i: the weight of every position j at position i; each row sums to 1."""
        energy = self.query(features).flatten(2).mT @ self.key(features).flatten(2)
        return energy.softmax(dim=-1, dtype=torch.promote_types(energy.dtype, torch.float32))

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The same shape."""
        value = self.value(features).flatten(2)
        seen = value @ self.attention(features).mT.to(value.dtype)
        return features + self.gamma * seen.reshape(features.shape)


class Critic(nn.Module):
    """D(Q | I): image and map side by side, BatchNorm, convolution blocks with self-attention, a mean.

    Every block but the last is a 4×4 convolution of stride 2, BatchNorm, ReLU; the first gives `width`
    channels and each later one twice as many. The last block is a 3×3 convolution to one channel, whose mean
    is the score: any size will do from `least_size` on. A self-attention module follows each of the last
    `attentions` blocks before the output: two of them, with five blocks, stand between the final three, as
    printed. The paper's AnLm is `attentions` n and `blocks` m + 1; A2L4, its choice, is the default.

    Kernels, widths and the place of more or fewer modules are not in the paper's text: 4×4 and 64 to 512 are
    the authors' code's, which ends with a 4×4 convolution that fits one size only. `norm=False` leaves out
    every BatchNorm: it couples the images of a batch, and with them their gradients in a gradient penalty.

    `channels` are those of the map: classes of a segmentation, 1 of a depth map. Raises ValueError for fewer
    than two blocks, or more attention modules than blocks before the output.
    """

    def __init__(
        self, channels: int, *, blocks: int = 5, attentions: int = 2, width: int = 64, norm: bool = True
    ):
        super().__init__()
        if blocks < 2 or not 0 <= attentions < blocks:
            raise ValueError(
                f"a critic needs at least 2 blocks, the output's included, and 0 to blocks − 1 attention "
                f"modules, got {blocks} and {attentions}: the paper's A2L4 is blocks=5, attentions=2"
            )
        widths = [3 + channels, *(width * 2**i for i in range(blocks - 1))]
        layers: list[nn.Module] = [nn.BatchNorm2d(widths[0])] if norm else []
        for n, (a, b) in enumerate(pairwise(widths), 1):
            layers += [nn.Conv2d(a, b, 4, stride=2, padding=1, bias=not norm)]
            layers += [nn.BatchNorm2d(b)] if norm else []
            layers += [nn.ReLU(inplace=True)]
            layers += [SelfAttention(b)] if n >= blocks - attentions else []
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, padding=1))
        self.channels, self.norm = channels, norm
        self.least_size = 2 ** (blocks - 1)

    def forward(
        self, image: Float[Tensor, "batch 3 height width"], response: Float[Tensor, "_ _ _ _"]
    ) -> Float[Tensor, " batch"]:
        """One score for each image with its map Q: class probabilities, or a depth map as one channel.

        Raises ValueError for a map of other images, size or channels, and for sides below `least_size`.
        """
        (batch, _, height, width), least = image.shape, self.least_size
        if response.shape != (batch, self.channels, height, width):
            raise ValueError(
                f"this critic takes maps of {self.channels} channels at the size of their images, for these "
                f"images {(batch, self.channels, height, width)}, got {tuple(response.shape)}: resize "
                "one, or build a critic of other channels"
            )
        if min(height, width) < least:
            raise ValueError(
                f"this critic halves its input {least.bit_length() - 1} times and needs at least "
                f"{least}×{least} pixels, got {height}×{width}: enlarge the input, or build it of fewer "
                "blocks"
            )
        if self.norm and self.training and batch * (height // least) * (width // least) == 1:
            raise ValueError(
                f"BatchNorm needs two values to train with, but one image of {height}×{width} pixels leaves "
                f"one: take two images, {2 * least} pixels, or norm=False"
            )
        found = self.layers(torch.cat((image, response.to(image.dtype)), dim=1))
        return found.mean(dim=(1, 2, 3), dtype=torch.promote_types(found.dtype, torch.float32))
