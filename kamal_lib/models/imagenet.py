"""ImageNet weights for the VGG16 encoder, through torchvision's weights API."""

from pickle import UnpicklingError

import torch
from torch import Tensor
from torchvision.models import VGG16_BN_Weights

from kamal_lib.models.encoder_decoder import VGG16


def encoder_state() -> dict[str, Tensor]:
    """State of encoder blocks 1..5 of `VGG16`, keyed as in `EncoderDecoder.blocks`: the 13 convolutions.

    Read from torch's cache of downloads, else downloaded (528 MB). Raises RuntimeError where they cannot be
    had, with the address and the place for a file that was fetched by hand.
    """
    weights = VGG16_BN_Weights.IMAGENET1K_V1
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # no network, or a damaged file
        raise RuntimeError(
            f"the ImageNet weights of VGG16 with batch norm cannot be had ({error}). Put the file "
            f"{weights.url} into {torch.hub.get_dir()}/checkpoints, or start from random weights"
        ) from error
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
