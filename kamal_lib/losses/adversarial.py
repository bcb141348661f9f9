"""Holistic distillation, Eq. 3 of Liu et al.: what critic and student minimise in turn, given the scores.

A critic gives every image with its map one score. The teacher's maps are the real samples, the student's the
fake ones. The critic minimises `wasserstein_loss` + `gradient_penalty` (WGAN-GP, Gulrajani et al., 2017), or
`hinge_loss`; the student minimises λ₂ · `student_loss` in both cases. In the critic's step the student's maps
must be detached, in the student's step the critic's weights keep still.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from kamal_lib.losses.dense import at_least_float32


def wasserstein_loss(real: Float[Tensor, " batch"], fake: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Eq. 3: E[D(Q^s | I)] − E[D(Q^t | I)], which the critic minimises: the teacher's maps score high."""
    return at_least_float32(fake).mean() - at_least_float32(real).mean()


def hinge_loss(real: Float[Tensor, " batch"], fake: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """E[max(0, 1 − D(Q^t | I))] + E[max(0, 1 + D(Q^s | I))], the option of the authors' code."""
    return (1 - at_least_float32(real)).relu().mean() + (1 + at_least_float32(fake)).relu().mean()


def student_loss(fake: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """−E[D(Q^s | I)]: in Eq. 4 the student's share of −ℓ_ho, to be weighted with λ₂."""
    return -at_least_float32(fake).mean()


def gradient_penalty(
    critic: Callable[[Tensor, Tensor], Tensor],
    image: Float[Tensor, "batch 3 height width"],
    real: Float[Tensor, "batch channels height width"],
    fake: Float[Tensor, "_ _ _ _"],
    *,
    mix: Float[Tensor, " batch"] | None = None,
    weight: float = 10.0,
) -> Float[Tensor, ""]:
    """weight · E[(‖∂D(Q | I)/∂Q‖₂ − 1)²] at Q = ε · real + (1 − ε) · fake, one ε of `mix` for each image.

    `mix` is drawn evenly from [0, 1] where it is not given. The norm is that over all numbers of one image's
    map; the image is the condition and is not mixed. Where the gradient is 0 the penalty is `weight` and its
    gradient 0, not NaN as with a plain square root. A critic with BatchNorm in training mode mixes the images
    of a batch, and the gradient is then that of the sum of their scores, no longer of one image's own.

    Trains the critic only: image and maps are detached. Raises ValueError for maps of different shape.
    """
    if real.shape != fake.shape:
        raise ValueError(
            f"the teacher's and the student's maps must have one shape to be mixed, got {tuple(real.shape)} "
            f"and {tuple(fake.shape)}: resize one to the other"
        )
    if mix is None:
        mix = torch.rand(len(real), device=real.device, dtype=real.dtype)
    with torch.enable_grad():
        between = torch.lerp(fake.detach(), real.detach(), mix.to(real)[:, None, None, None]).requires_grad_()
        scores = critic(image.detach(), between)
        (gradient,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
        # torch's norm has the gradient 0 at 0, where that of a square root is infinite
        length = torch.linalg.vector_norm(at_least_float32(gradient).flatten(1), dim=1)
        return weight * (length - 1).square().mean()
