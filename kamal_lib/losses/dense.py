"""The teachers' losses, Eqs. 1 to 4 of Ye et al. (section 4), which the student's Eq. 6 uses again.

Every mean is taken per image over its valid pixels, and then over the images that have any: an image with few
valid pixels counts as much as one with many, and one with none does not count.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kamal_lib.sample import VOID, known_depth, known_labels, known_normals


def image_mean(
    values: Float[Tensor, "batch height width"], valid: Bool[Tensor, "batch height width"]
) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """(mean over the valid pixels of each image, whether it has any); the mean is 0 where it has none."""
    count = valid.sum(dim=(1, 2))
    total = torch.where(valid, values, 0).sum(dim=(1, 2))
    return total / count.clamp(min=1), count > 0


def batch_mean(per_image: Float[Tensor, " batch"], counts: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over the images that count; 0, still differentiable, where none does."""
    return torch.where(counts, per_image, 0).sum() / counts.sum().clamp(min=1)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32, in which softmax and losses are computed; the rest stays as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(
    response: Float[Tensor, "batch classes height width"], labels: Int[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Eq. 1 without its regulariser: ℓ(S*, S) averaged over the labelled pixels, in nats.

    `labels` hold class ids, or `VOID`. The term λR(θ) is the optimiser's weight decay. Raises ValueError
    for a label that is neither a class nor `VOID`.
    """
    valid = known_labels(labels, response.shape[1])
    pixel = F.cross_entropy(at_least_float32(response), labels.long(), ignore_index=VOID, reduction="none")
    return batch_mean(*image_mean(pixel, valid))


def expected_depth(
    response: Float[Tensor, "batch bins height width"], *, bin_length: float
) -> Float[Tensor, "batch height width"]:
    """Eq. 2: D = Σ_b b · l · p(b | x), b = 1..N_d, in metres; p is the softmax of the response over the bins.

    As printed, bin b stands for its far edge b·l, not for its centre (b − ½)·l.
    """
    p = at_least_float32(response).softmax(dim=1)
    edges = bin_length * torch.arange(1, response.shape[1] + 1, device=p.device, dtype=p.dtype)
    return torch.einsum("nbhw,b->nhw", p, edges)


def depth_loss(
    depth: Float[Tensor, "batch height width"], target: Float[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Eq. 3: (1/N) Σ d² − (1/2N²) (Σ d)² with d = target − depth, on linear metres; N counts valid pixels.

    Equal to Var(d) + ½ mean(d)²: a shift by c costs ½c², half of what the squared error charges. Pixels with
    target 0 (unknown) are left out. Raises ValueError for a target that is no depth.
    """
    valid = known_depth(target)
    d = target - at_least_float32(depth)
    squares, counts = image_mean(d**2, valid)
    shift, _ = image_mean(d, valid)
    return batch_mean(squares - shift**2 / 2, counts)


def unit_normals(response: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """M: the response as vectors of length 1; where all three responses are 0 it stays 0.

    Ye et al. do not say so, but without it −M · M^gt of Eq. 4 has no lower bound.
    """
    x, y, z = at_least_float32(response).unbind(1)  # three planes: a sum over an axis of three is slow
    scale = (x * x + y * y + z * z).clamp_min(1e-12).rsqrt()
    return torch.stack((x * scale, y * scale, z * scale), dim=1)


def normal_loss(
    normals: Float[Tensor, "batch 3 height width"], target: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, ""]:
    """Eq. 4: −(1/N) Σ_i M_i · M_i^gt over the pixels of known target: the mean cosine, negative; −1 at best.

    Both are unit vectors; pixels whose target is 0 are left out. Raises ValueError for a target that is
    neither 0 nor of length 1.
    """
    valid = known_normals(target)
    (a, b, c), (x, y, z) = at_least_float32(normals).unbind(1), target.unbind(1)
    return batch_mean(*image_mean(-(a * x + b * y + c * z), valid))
