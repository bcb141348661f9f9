"""Channel coding: how the student's features are projected into a teacher's domain (Ye et al., Fig. 3)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ChannelCoding(nn.Module):
    """F_ut = s ⊙ F_u with s = gain · sigmoid(W2 · relu(W1 · GAP(F_u))), one gate for each channel.

    Ye et al., section 5.1.1 and Fig. 3: "modified from the channel attention module, it consists of a global
    pooling layer and two fully connected layers". Neither layer has a bias; the hidden layer has
    max(channels / reduction, 16) units, which gives 962,560 weights for two tasks at all ten blocks of the
    VGG16 networks: 3.3 %, the paper's "less than 4 %". W2 starts at zero, so a fresh gate is gain / 2
    everywhere: half closed as printed (gain 1), exactly open with gain 2.

    With `mix` a 1×1 convolution without bias follows the gates, at first the identity: gates alone cannot
    turn a channel of the student into another one of the teacher. The paper has none.
    """

    def __init__(self, channels: int, *, reduction: int = 4, gain: float = 1.0, mix: bool = False):
        super().__init__()
        hidden = max(channels // reduction, 16)
        self.squeeze = nn.Linear(channels, hidden, bias=False)
        self.expand = nn.Linear(hidden, channels, bias=False)
        nn.init.zeros_(self.expand.weight)
        self.mix = nn.Conv2d(channels, channels, 1, bias=False) if mix else nn.Identity()
        if isinstance(self.mix, nn.Conv2d):
            nn.init.dirac_(self.mix.weight)
        self.gain = gain

    def gates(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels 1 1"]:
        """s, one number for each image and channel, in (0, gain)."""
        pooled = features.mean(dim=(-2, -1))
        s = torch.sigmoid(self.expand(torch.relu(self.squeeze(pooled))))
        return self.gain * s[..., None, None]

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """F_ut, the student's features in the teacher's domain."""
        return self.mix(self.gates(features) * features)
