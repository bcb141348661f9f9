"""Pixel-wise and pair-wise distillation, Eqs. 1 and 2 of Liu et al., "Structured Knowledge Distillation".

The teacher gets no gradient from either. Both check what they are given, since a loss of maps that do not
belong together is a number too.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kamal_lib.losses.dense import at_least_float32
from kamal_lib.losses.pairwise import SquaredDifference, neighbours, pooled, unit_vectors


def choose(option: str, got: str, known: tuple[str, ...]) -> None:
    """Raises ValueError unless `got` is one of the `known` words."""
    if got not in known:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, known))}, got {got!r}")


def check_same_maps(
    student: Float[Tensor, "_ _ _ _"], teacher: Float[Tensor, "_ _ _ _"], *, what: str
) -> None:
    """Raises ValueError unless both are `what` of the same images and size, and hold finite numbers."""
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        (n, _, h, w), (m, _, k, v) = student.shape, teacher.shape
        raise ValueError(
            f"student and teacher must give {what} of the same images at the same size, got {n} of {h}×{w} "
            f"and {m} of {k}×{v}: resize one to the other, F.interpolate does it"
        )
    for whose, x in (("student", student), ("teacher", teacher)):
        wrong = ~torch.isfinite(x)
        if bool(wrong.any()):
            raise ValueError(
                f"the {whose}'s {what} must be finite, got {int(wrong.sum())} of {x.numel()} values such as "
                f"{float(x[wrong][0].detach())}: did a training step diverge?"
            )


def pixel_wise_loss(
    response: Float[Tensor, "batch classes height width"],
    teacher: Float[Tensor, "_ _ _ _"],
    *,
    direction: str = "forward",
    temperature: float = 1.0,
    reduction: str = "pixels",
) -> Float[Tensor, ""]:
    """Eq. 1: KL(q^t ‖ q^s) in nats, averaged over all pixels; q is the softmax of the logits.

    `direction` "forward" is KL(teacher ‖ student), what the authors' code minimises: its cross-entropy with
    the teacher's q differs by the teacher's entropy, a constant. "reverse" is KL(student ‖ teacher), as the
    paper prints it. A `temperature` T divides both logits, and the loss is multiplied by T², so that its
    gradient keeps its size (Hinton et al., 2015).

    `reduction` "pixels" is the paper's 1/(W'·H') and a mean over the images. Public codes divide otherwise,
    so that the same λ₁ weighs up to B·C times as much, 152 times at 8 images and 19 classes:

        written elsewhere, B images of C classes       here                    in units of "pixels"
        ---------------------------------------------  ----------------------  --------------------
        sum / (H·W): the authors' code                 reduction="images"      B
        F.kl_div(log q^s, q^t, reduction="mean")       reduction="elements"    1 / C
        F.kl_div(..., reduction="batchmean")           H·W × "pixels"          H·W
        F.kl_div(..., reduction="sum")                 reduction="sum"         B·H·W
        any of them without the factor T²              divide by T²            1 / T²

    Raises ValueError for maps of different size, numbers of classes that differ, logits that are not finite,
    a temperature that is not positive, an unknown word.
    """
    choose("direction", direction, ("forward", "reverse"))
    choose("reduction", reduction, ("pixels", "images", "elements", "sum"))
    if not 0 < temperature < float("inf"):
        raise ValueError(f"the temperature divides the logits and must be positive, got {temperature}")
    if response.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher must have the same classes, got {response.shape[1]} and "
            f"{teacher.shape[1]}: select or add channels until they do"
        )
    check_same_maps(response, teacher, what="logits")
    log_s, log_t = (
        (at_least_float32(x) / temperature).log_softmax(dim=1) for x in (response, teacher.detach())
    )
    target, guess = (log_t, log_s) if direction == "forward" else (log_s, log_t)
    total = temperature**2 * F.kl_div(guess, target, reduction="sum", log_target=True)
    batch, classes, height, width = response.shape
    pixels = height * width
    share = {"pixels": batch * pixels, "images": pixels, "elements": batch * pixels * classes, "sum": 1}
    return total / share[reduction]


def pair_wise_loss(
    features: Float[Tensor, "batch channels height width"],
    teacher: Float[Tensor, "_ _ _ _"],
    *,
    patch: int | tuple[int, int] = 2,
    radius: int | None = None,
    pooling: str = "average",
    detach_norm: bool = False,
    divisor: str = "connections",
) -> Float[Tensor, ""]:
    """Eq. 2: the mean over connections of (a^s_ij − a^t_ij)², a_ij the cosine similarity of nodes i and j.

    `features` are the last ones before the classifier; the teacher's may have another number of channels.
    The granularity β is `patch`, height and width in pixels, or one number for both: its pixels are pooled to
    one node, the last of a row or column from what is left, 65 → 33. The range α is `radius`: every node is
    connected with those within that Chebyshev distance in nodes, itself included, up to (2·radius + 1)² of
    them; None connects all with all. The defaults are the paper's best: β = 2×2, all connections (Table 2).
    The loss is averaged over images. A node that is 0 in all channels counts, with similarity 0.

    Options of the authors' code: `pooling` "max" in the place of "average"; `detach_norm` takes ‖f‖ as a
    constant. Its "scale 0.5" is a `patch` of half the map, rounded down: 32 of 65 pixels, 9 nodes. `divisor`
    "connections" counts those that there are; "printed" is W'·H'·α/β with α = (2·radius + 1)² or W'·H'/β,
    which takes border nodes for inner ones, and patches that are cut for a part of a node.

    No matrix of N×N is held for N nodes; see `kamal_lib.losses.pairwise`. It is computed in float64. Raises
    ValueError for maps of different size, features that are not finite, a patch or radius beyond the map.
    """
    choose("pooling", pooling, ("average", "max"))
    choose("divisor", divisor, ("connections", "printed"))
    check_same_maps(features, teacher, what="features")
    height, width = features.shape[2:]
    patch = (patch, patch) if isinstance(patch, int) else patch
    if not (1 <= patch[0] <= height and 1 <= patch[1] <= width):
        raise ValueError(
            f"a patch (β) must lie within the map, 1×1 to {height}×{width}, got {patch[0]}×{patch[1]}: "
            "take a smaller one"
        )
    rows, columns = -(-height // patch[0]), -(-width // patch[1])
    if radius is not None and not 1 <= radius < max(rows, columns):
        raise ValueError(
            f"the radius (α) must lie within the {rows}×{columns} nodes, 1 to {max(rows, columns) - 1}, got "
            f"{radius}: radius None connects all nodes"
        )
    images = []
    for maps in zip(features, teacher.detach(), strict=True):  # one at a time: float64 takes twice the memory
        s, t = (unit_vectors(pooled(x, patch, pooling=pooling), detach_norm=detach_norm) for x in maps)
        images.append(SquaredDifference.apply(s, t, radius))
    connections = float(neighbours(rows, columns, radius).sum())
    if divisor == "printed":
        nodes = height * width / (patch[0] * patch[1])
        connections = nodes * (nodes if radius is None else (2 * radius + 1) ** 2)
    total = torch.stack(images).mean() / connections
    return total.to(torch.promote_types(features.dtype, torch.float32))
