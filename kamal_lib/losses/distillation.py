"""Losses that compare a student's response with a teacher's distribution."""

from jaxtyping import Float
from torch import Tensor

from kamal_lib.losses.dense import at_least_float32


def soft_target_loss(
    response: Float[Tensor, "batch classes height width"],
    probabilities: Float[Tensor, "batch classes height width"],
) -> Float[Tensor, ""]:
    """KL(p ‖ softmax(response)) in nats: mean over the pixels of each image, then over images.

    `probabilities` p are the teacher's; the entropy of p is subtracted, so 0 is perfect agreement. Raises
    ValueError for a target that is no distribution over the same classes.
    """
    p, q = at_least_float32(probabilities), at_least_float32(response).log_softmax(dim=1)
    if p.shape != q.shape or not bool(((p.sum(1) - 1).abs() < 0.01).all()) or bool((p < 0).any()):
        raise ValueError(
            f"soft targets must be probabilities over the {q.shape[1]} classes of each pixel, got shape "
            f"{tuple(p.shape)} with sums from {float(p.sum(1).min()):.3f} to {float(p.sum(1).max()):.3f}"
        )
    pixel = (p * (p.clamp_min(1e-12).log() - q)).sum(1)
    return pixel.mean(dim=(1, 2)).mean()
