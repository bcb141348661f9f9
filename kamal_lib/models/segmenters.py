"""The networks of Liu et al., Table 7: PSPNet and DeepLabV3 on ResNet or MobileNetV2, and ESPNet-C.

Encoders and decoders come from segmentation_models_pytorch. A segmenter is a body, which gives the last
features before the classifier, and one 1×1 convolution for each task: pair-wise distillation compares those
features, pixel-wise distillation the responses.

Table 7 counts more for its PSPNets, 70.43, 15.24 and 3.835 M parameters, than they have here, 48.81, 11.71
and 2.95 M: the authors fuse the pyramid by a 3×3 convolution, the library by a 1×1, and their teacher has an
auxiliary classifier for training and two more convolutions at its start. ESPNet-C agrees, and so does
DeepLabV3 with the 15.90 and 39.64 M of Liu et al.'s "Multi-Knowledge Aggregation and Transfer". The paper's
MobileNetV2Plus is another network than any here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import get_model_weights

from kamal_lib.models.encoder_decoder import normalise
from kamal_lib.models.espnet import ESPNetC
from kamal_lib.models.imagenet import downloaded

KINDS = ("pspnet", "deeplabv3", "espnet_c")
ENCODERS = ("resnet18", "resnet50", "resnet101", "mobilenet_v2")


@dataclass(frozen=True)
class SegmenterArchitecture:
    """What a segmenter is built of; its features have `channels` channels at 1/`stride` of the image.

    `width` scales the four stages of a ResNet, not its first convolution, which keeps 64 channels: so the
    count of the paper's ResNet18 (0.5) comes out. `stride` 8 dilates the last two stages instead of
    shrinking; 4 also leaves out the max pool, for images of about 48×64, where 8 would leave 6×8 pixels.
    `rates` are the dilations of DeepLabV3's pyramid, which takes two images or more to train with: BatchNorm
    follows a mean over the whole image. ESPNet-C has no encoder, and 256 channels.

    Raises ValueError for unknown words, and for a width or stride that the encoder does not have.
    """

    kind: str
    encoder: str | None = None
    width: float = 1.0
    channels: int = 256
    stride: int = 8
    rates: tuple[int, int, int] = (12, 24, 36)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}")
        if self.kind == "espnet_c" and (self.encoder, self.width, self.channels) != (None, 1.0, 256):
            raise ValueError(
                f"ESPNet-C comes in one width, without an encoder, got encoder {self.encoder!r}, width "
                f"{self.width} and {self.channels} channels: leave them out"
            )
        if self.kind != "espnet_c" and self.encoder not in ENCODERS:
            raise ValueError(
                f"the encoder of a {self.kind} must be one of {', '.join(map(repr, ENCODERS))}, got "
                f"{self.encoder!r}"
            )
        if self.stride not in (4, 8) or (self.encoder == "mobilenet_v2" and self.stride != 8):
            raise ValueError(f"the stride must be 8, or 4 without MobileNetV2, got {self.stride}")
        if min(self.stages) < 1 or (self.encoder == "mobilenet_v2" and self.width != 1):
            raise ValueError(
                f"the width must leave a ResNet at least one of 64 channels, and be 1 for MobileNetV2, got "
                f"{self.width}"
            )

    @property
    def stages(self) -> tuple[int, ...]:
        """Channels of a ResNet's four stages; a bottleneck's output has four times as many."""
        return tuple(int(self.width * c) for c in (64, 128, 256, 512))


PSPNET_RESNET101 = SegmenterArchitecture("pspnet", "resnet101", channels=512)
"""The paper's teacher: 48.81 M parameters at 19 classes."""

PSPNET_RESNET18 = SegmenterArchitecture("pspnet", "resnet18")
"""ResNet18 (1.0), the student of its ablations: 11.71 M parameters."""

PSPNET_RESNET18_HALF = replace(PSPNET_RESNET18, width=0.5, channels=128)
"""ResNet18 (0.5): 2.95 M parameters."""

ESPNET_C = SegmenterArchitecture("espnet_c")
"""0.349 M parameters."""

SLIM_TEACHER = SegmenterArchitecture("pspnet", "resnet18", width=0.375, channels=96, stride=4)
"""1.7 M parameters, for images of about 48×64 on a CPU: features of 12×16 pixels."""

SLIM_STUDENT = replace(SLIM_TEACHER, width=0.1875, channels=48)
"""A quarter of the teacher's parameters, as ResNet18 (1.0) has of the paper's teacher."""

SLIM_STUDENT_HALF = replace(SLIM_TEACHER, width=0.09375, channels=24)
"""A sixteenth, as ResNet18 (0.5) has."""

SLIM_DEEPLABV3 = replace(SLIM_TEACHER, kind="deeplabv3", rates=(2, 4, 6))
"""DeepLabV3 of the same encoder, its dilations cut to its features of 12×16 pixels."""

SLIM_ESPNET_C = replace(ESPNET_C, stride=4)
"""ESPNet-C with features of the same size as theirs."""


class Pyramid(nn.Module):
    """Encoder and pyramid of segmentation_models_pytorch: the normalised image to the last features."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def finer_and_last(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch _ _ _"], Float[Tensor, "batch channels _ _"]]:
        """(Features of the encoder's first stage, at 2/stride of the image; the last, at 1/stride)."""
        stages = self.encoder(image)
        return stages[2], self.decoder(stages)

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels _ _"]:
        """Features at 1/stride of the image, rounded up."""
        return self.finer_and_last(image)[1]


class Segmenter(nn.Module):
    """A body and one classifier for each task; the responses are logits at the image's size."""

    def __init__(self, architecture: SegmenterArchitecture, body: nn.Module, heads: Mapping[str, nn.Module]):
        super().__init__()
        self.architecture = architecture
        self.body = body
        self.heads = nn.ModuleDict(dict(heads))

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it predicts."""
        return tuple(self.heads)

    def features_and_response(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch channels rows columns"], dict[str, Tensor]]:
        """(Last features before the classifiers, {task: response}), of one pass.

        A response is its head's output on those features, enlarged to the image's size bilinearly. Raises
        ValueError unless the images are RGB.
        """
        features = self.body(normalise(image))
        return features, self.responses(features, image.shape[-2:])

    def levels_and_response(
        self, image: Float[Tensor, "batch 3 height width"]
    ) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        """((First stage's features, last features), {task: response}): two levels of one pass.

        Raises ValueError for ESPNet-C, which has no such stages.
        """
        if not isinstance(self.body, Pyramid):
            raise ValueError(
                "ESPNet-C has no encoder whose first stage could be compared: take a PSPNet or DeepLabV3, or "
                "compare the last features only"
            )
        finer, features = self.body.finer_and_last(normalise(image))
        return (finer, features), self.responses(features, image.shape[-2:])

    def responses(
        self, features: Float[Tensor, "batch channels rows columns"], size: Sequence[int]
    ) -> dict[str, Tensor]:
        """{task: its head's output on the last features, enlarged to height and width bilinearly}."""
        return {
            task: F.interpolate(head(features), size=list(size), mode="bilinear", align_corners=False)
            for task, head in self.heads.items()
        }

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> dict[str, Tensor]:
        """{task: response}, each batch × channels × height × width."""
        return self.features_and_response(image)[1]


def build_body(architecture: SegmenterArchitecture) -> nn.Module:
    """The network without its classifiers, freshly initialised.

    Nothing is dropped out: that would draw from torch's global generator, and a training is a function of
    its seeds. (The authors drop a tenth of the pyramid's channels.)
    """
    a = architecture
    if a.kind == "espnet_c":
        return ESPNetC(stride=a.stride)
    assert a.encoder is not None
    name = a.encoder
    options: dict[str, Any] = {"encoder_weights": None, "encoder_depth": 5}
    if name.startswith("resnet"):  # timm's, since torchvision's have one width; started as torchvision's are
        name = f"tu-{name}"
        options |= {"channels": a.stages, "zero_init_last": False}
    if a.kind == "pspnet":
        options |= {"output_stride": 8, "psp_dropout": 0.0}
        network = smp.PSPNet(name, psp_out_channels=a.channels, **options)
    else:
        options |= {"encoder_output_stride": 8, "decoder_aspp_dropout": 0.0}
        network = smp.DeepLabV3(name, decoder_channels=a.channels, decoder_atrous_rates=a.rates, **options)
    if a.stride == 4:
        network.encoder.set_submodule("model.maxpool", nn.Identity())
    return Pyramid(network.encoder, network.decoder)


def imagenet_state(encoder: str) -> dict[str, Tensor]:
    """ImageNet weights of one of `ENCODERS`, as torchvision names them, without the classifier's.

    14 to 171 MB where they must be downloaded. Raises RuntimeError as `downloaded`.
    """
    state = downloaded(get_model_weights(encoder)["IMAGENET1K_V1"], encoder)
    return {name: value for name, value in state.items() if not name.startswith(("fc.", "classifier."))}


def build_segmenter(
    architecture: SegmenterArchitecture, heads: Mapping[str, int], *, seed: int, weights: str = "random"
) -> Segmenter:
    """A segmenter with one head of the given number of channels for each task.

    The body depends on `architecture`, `seed` and `weights` only: networks of one seed start from one common
    initialisation, whatever their tasks. `weights` "imagenet" replaces the encoder's. Raises ValueError where
    there are none: for other words, another width, ESPNet-C; RuntimeError where they cannot be had.
    """
    if weights not in ("random", "imagenet"):
        raise ValueError(f"the weights of a segmenter must be 'random' or 'imagenet', got {weights!r}")
    encoder = architecture.encoder
    if weights == "imagenet" and (encoder is None or architecture.width != 1):
        raise ValueError(
            f"ImageNet weights exist for {', '.join(ENCODERS)} at width 1 only, got {architecture}: start "
            "from random weights, or take such an encoder"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = build_body(architecture)
        network = Segmenter(
            architecture,
            body,
            {task: nn.Conv2d(architecture.channels, channels, 1) for task, channels in heads.items()},
        )
    if weights == "imagenet" and encoder is not None:
        place = "encoder" if encoder == "mobilenet_v2" else "encoder.model"  # timm's ResNets are wrapped
        body.get_submodule(place).load_state_dict(imagenet_state(encoder))
    return network
