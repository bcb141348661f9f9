"""The encoder–decoder of Ye et al., section 5.1.1: SegNet, DepthNet and the student before it branches.

A network is `blocks` 1..N and one head for each task. Blocks 1..N/2 encode, N/2+1..N decode in mirror order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kamal_lib.models.blocks import Activation, DecoderBlock, EncoderBlock

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Architecture:
    """Channels, convolutions and pools of the encoder's blocks; the decoder mirrors them."""

    widths: tuple[int, ...]
    convs: tuple[int, ...]
    pools: tuple[bool, ...]

    def __post_init__(self):
        if not len(self.widths) == len(self.convs) == len(self.pools) >= 1:
            raise ValueError(
                f"an architecture needs one width, one number of convolutions and one pool flag for each "
                f"encoder block, got {len(self.widths)}, {len(self.convs)} and {len(self.pools)}"
            )

    @property
    def blocks(self) -> int:
        """N, encoder and decoder blocks together."""
        return 2 * len(self.widths)


SLIM = Architecture(
    widths=(16, 32, 64, 64, 64), convs=(2, 2, 2, 2, 2), pools=(True, True, False, False, False)
)
"""About 0.4 M parameters, for images of about 48×64 on a CPU: five encoder blocks, two of which pool."""

VGG16 = Architecture(widths=(64, 128, 256, 512, 512), convs=(2, 2, 3, 3, 3), pools=(True,) * 5)
"""VGG16 with batch norm and its mirror, the SegNet of the paper: 29.45 M parameters at 13 classes."""


def normalise(image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """RGB in [0, 1] to zero mean and unit variance by ImageNet's statistics.

    Raises ValueError unless there are three channels: a grey image would be broadcast to three in silence.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(
            f"a network takes RGB images, batch × 3 × height × width, got shape {tuple(image.shape)}: "
            "repeat a grey channel three times, drop an alpha channel, add the batch axis"
        )
    mean, std = (image.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (image - mean) / std


def check_block(n: int, blocks: int, *, first: int = 0) -> None:
    """Raises ValueError unless `first` <= n <= blocks."""
    if not first <= n <= blocks:
        raise ValueError(f"block n = {n} does not exist: this network has blocks {first}..{blocks}")


class EncoderDecoder(nn.Module):
    """Blocks 1..N and heads; the responses of the heads are logits, which the tasks decode.

    It can be cut after any block: `forward_from(forward_to(image, n), n)` is `forward(image)`, bit for bit.
    """

    def __init__(
        self, architecture: Architecture, blocks: Sequence[nn.Module], heads: Mapping[str, nn.Module]
    ):
        super().__init__()
        self.architecture = architecture
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleDict(dict(heads))

    @property
    def channels(self) -> tuple[int, ...]:
        """The number of channels of F^1..F^N."""
        return tuple(block.channels for block in self.blocks)  # pyright: ignore[reportReturnType]

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it predicts."""
        return tuple(self.heads)

    def suffix(self, task: str, n: int) -> tuple[list[nn.Module], nn.Module]:
        """(blocks n+1..N, the task's head). Raises ValueError for n outside 0..N."""
        check_block(n, len(self.blocks))
        return list(self.blocks[n:]), self.heads[task]

    def blocks_of(self, task: str) -> list[nn.Module]:
        """Blocks 1..N, the same ones for every task."""
        return self.suffix(task, 0)[0]

    def forward_to(self, image: Float[Tensor, "batch 3 height width"], n: int) -> Activation:
        """F^n with its switches; n = 0 is the normalised image. Raises ValueError for n outside 0..N."""
        check_block(n, len(self.blocks))
        activation = Activation(normalise(image))
        for block in self.blocks[:n]:
            activation = block(activation)
        return activation

    def forward_from(self, activation: Activation, n: int) -> dict[str, Tensor]:
        """The responses when `activation` takes the place of F^n. Raises ValueError for n outside 0..N."""
        check_block(n, len(self.blocks))
        for block in self.blocks[n:]:
            activation = block(activation)
        return {task: head(activation.features) for task, head in self.heads.items()}

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> dict[str, Tensor]:
        """{task: response}, each batch × channels × height × width."""
        return self.forward_from(self.forward_to(image, 0), 0)


def build_body(architecture: Architecture) -> list[nn.Module]:
    """Blocks 1..N of `architecture`, freshly initialised; the network of no task yet."""
    widths = (3, *architecture.widths)
    encoder = [
        EncoderBlock(a, b, convs=count, pool=pool)
        for (a, b), count, pool in zip(pairwise(widths), architecture.convs, architecture.pools, strict=True)
    ]
    outputs = (architecture.widths[0], *architecture.widths[:-1])
    convs = (
        max(architecture.convs[0] - 1, 1),
        *architecture.convs[1:],
    )  # SegNet's last convolution is the head
    decoder = [
        DecoderBlock(a, b, convs=count, pool=pool)
        for a, b, count, pool in zip(architecture.widths, outputs, convs, architecture.pools, strict=True)
    ]
    return [*encoder, *reversed(decoder)]


def build_head(architecture: Architecture, channels: int) -> nn.Conv2d:
    """The classifier after block N: a 3×3 convolution, as SegNet's last (577 weights a channel at VGG16)."""
    return nn.Conv2d(architecture.widths[0], channels, 3, padding=1)


def build_network(architecture: Architecture, heads: Mapping[str, int], *, seed: int) -> EncoderDecoder:
    """A network with one head of the given number of channels for each task.

    The blocks depend on `architecture` and `seed` only: networks of one seed start from one common
    initialisation, whatever their tasks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = build_body(architecture)
        return EncoderDecoder(
            architecture, body, {task: build_head(architecture, channels) for task, channels in heads.items()}
        )
