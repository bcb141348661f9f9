"""What Liu et al. compare pair-wise distillation with (section 3.1.4, Table 6): MIMIC and attention transfer.

Both compare the last features before the classifier, and the teacher gets no gradient. The third of that
table, local pair-wise distillation, is `pair_wise_loss(..., patch=1, radius=1)`: each pixel's 8 neighbours.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kamal_lib.losses.dense import at_least_float32
from kamal_lib.losses.structured import check_same_maps, choose


class Mimic(nn.Module):
    """MIMIC: the mean of (W f^s + b − f^t)² over images, channels and pixels; W, a 1×1 convolution, learns.

    After Li et al., "Mimicking Very Efficient Network for Object Detection" (CVPR 2017). With the mean λ does
    not depend on the features' size; a sum over channels is that times their number. W gives the student's
    features the teacher's channels; it learns with the student, is no part of it, and starts from `seed`.
    """

    def __init__(self, channels: int, teacher_channels: int, *, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.adapter = nn.Conv2d(channels, teacher_channels, 1)

    def forward(
        self,
        features: Float[Tensor, "batch channels height width"],
        teacher: Float[Tensor, "_ _ _ _"],
    ) -> Float[Tensor, ""]:
        """Raises ValueError for channels it was not built for, maps of different size, numbers not finite."""
        built = (self.adapter.in_channels, self.adapter.out_channels)
        if (features.shape[1], teacher.shape[1]) != built:
            raise ValueError(
                f"this MIMIC was built for features of {built[0]} channels and a teacher's of {built[1]}, "
                f"got {features.shape[1]} and {teacher.shape[1]}: build it for those"
            )
        check_same_maps(features, teacher, what="features")
        return F.mse_loss(at_least_float32(self.adapter(features)), at_least_float32(teacher.detach()))


def attention_loss(
    features: Float[Tensor, "batch channels height width"],
    teacher: Float[Tensor, "_ _ _ _"],
    *,
    form: str = "paper",
) -> Float[Tensor, ""]:
    """‖A^s/‖A^s‖₂ − A^t/‖A^t‖₂‖₂ averaged over images; A_j = Σ_c f_cj², a map of one channel.

    After Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017), Eq. 2 without β/2. The
    channels may differ. `form` "public" is their code's: the square of that distance, divided by the number
    of pixels, whose gradient vanishes towards agreement, which that of "paper" does not. Where the maps agree
    it is 0 for both. Raises ValueError for maps of different size, features not finite, an unknown form.
    """
    choose("form", form, ("paper", "public"))
    check_same_maps(features, teacher, what="features")
    ours, theirs = (
        F.normalize(at_least_float32(x).square().sum(dim=1).flatten(1), dim=1)
        for x in (features, teacher.detach())
    )
    if form == "public":
        return (ours - theirs).square().mean()
    return torch.linalg.vector_norm(ours - theirs, dim=1).mean()
