"""ImageNet weights through torchvision's weights API, and those of the VGG16 encoder."""

from pickle import UnpicklingError

import torch
from torch import Tensor
from torchvision.models import VGG16_BN_Weights, WeightsEnum

from kamal_lib.models.encoder_decoder import VGG16


def downloaded(weights: WeightsEnum, network: str) -> dict[str, Tensor]:
    """The state dict from torch's cache of downloads, else from its address.

    Raises RuntimeError where it cannot be had, with that address and the place for a file that was fetched by
    hand; `network` is whose weights they are, in words.
    """
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # no network, or a damaged file
        raise RuntimeError(
            f"the ImageNet weights of {network} cannot be had ({error}). Put the file {weights.url} into "
            f"{torch.hub.get_dir()}/checkpoints, or start from random weights"
        ) from error


def encoder_state() -> dict[str, Tensor]:
    """State of encoder blocks 1..5 of `VGG16`, keyed as in `EncoderDecoder.blocks`: the 13 convolutions.

    528 MB where they must be downloaded. Raises RuntimeError as `downloaded`.
    """
    state = downloaded(VGG16_BN_Weights.IMAGENET1K_V1, "VGG16 with batch norm")
    found: dict[str, Tensor] = {}
    layer = 0  # of torchvision's `features`: convolution, norm, ReLU for each convolution, then a pool
    for block, count in enumerate(VGG16.convs):
        for place in range(3 * count):
            prefix = f"features.{layer + place}."
            found |= {
                f"{block}.convs.{place}.{name.removeprefix(prefix)}": value
                for name, value in state.items()
                if name.startswith(prefix)
            }
        layer += 3 * count + 1
    return found
