"""The affinity graphs of Liu et al., Eq. 2, compared without a matrix of N × N for N nodes.

Everything is computed in float64, whatever comes in: where student and teacher nearly agree, differences of
similarities are lost in float32's rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor

DEAD = 1e-8
"""Features shorter than this have no direction; torch's cosine similarity bounds the length there too."""

CHUNK = 2**17
"""Similarities that the direct form holds at a time: 1 MiB for each of the few it works on."""


def pooled(
    features: Float[Tensor, "channels height width"], patch: tuple[int, int], *, pooling: str
) -> Float64[Tensor, "channels rows columns"]:
    """f: one node for each patch of height × width pixels, "average" or "max".

    At the border a patch holds what is left, and its mean is taken over that: 65×65 pixels in patches of 2×2
    are 33×33 nodes.
    """
    x = features.double()
    if patch == (1, 1):
        return x
    pool = F.avg_pool2d if pooling == "average" else F.max_pool2d
    return pool(x[None], patch, ceil_mode=True)[0]


def unit_vectors(
    nodes: Float64[Tensor, "channels rows columns"], *, detach_norm: bool = False
) -> Float64[Tensor, "channels rows columns"]:
    """f / ‖f‖₂ of every node; a dead one stays 0, without gradient: it is similar to nothing, itself too."""
    length = torch.linalg.vector_norm(nodes, dim=0, keepdim=True)
    if detach_norm:
        length = length.detach()
    alive = length > DEAD
    return nodes * torch.where(alive, 1 / torch.where(alive, length, 1), 0)


def neighbours(rows: int, columns: int, radius: int | None) -> Int[Tensor, "rows columns"]:
    """How many nodes every node is connected with, itself included; radius None: with all.

    Within Chebyshev distance `radius` these are (2·radius + 1)², fewer at the border: for radius 1, 9, at an
    edge 6, in a corner 4.
    """
    reach = max(rows, columns) if radius is None else radius
    across = []
    for size in (rows, columns):
        at = torch.arange(size)
        across.append((at + reach).clamp(max=size - 1) - (at - reach).clamp(min=0) + 1)
    return across[0][:, None] * across[1]


def gram_pays(nodes: int, channels: int, teacher_channels: int) -> bool:
    """Whether products of C×C take fewer multiply-adds than those of N×N: above 537 nodes at 128 and 512."""
    products = channels**2 + teacher_channels**2 + channels * teacher_channels
    return nodes * (channels + teacher_channels) > products


class SquaredDifference(torch.autograd.Function):
    """Σ_i Σ_{j ∈ α} (s_i · s_j − t_i · t_j)² of student's s and teacher's t, each channels × rows × columns.

    The sum runs over ordered pairs of nodes within Chebyshev distance `radius`, or all where it is None. The
    gradient for s is 4 Σ_j (s_i · s_j − t_i · t_j) s_j; it is taken on the way, so that nothing is kept or
    computed twice for the backward pass. t gets none.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        student: Float64[Tensor, "channels rows columns"],
        teacher: Float64[Tensor, "teacher_channels rows columns"],
        radius: int | None,
    ) -> Float64[Tensor, ""]:
        whole = radius is None and gram_pays(student[0].numel(), len(student), len(teacher))
        total, gradient = by_gram(student, teacher) if whole else by_rows(student, teacher, radius)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the pair-wise loss has first derivatives only, got a backward pass with create_graph=True: "
                "leave it out of a loss that is differentiated twice"
            )
        (gradient,) = ctx.saved_tensors
        return gradients[0] * gradient, None, None


def by_gram(
    student: Float64[Tensor, "channels rows columns"],
    teacher: Float64[Tensor, "teacher_channels rows columns"],
) -> tuple[Float64[Tensor, ""], Float64[Tensor, "channels rows columns"]]:
    """All pairs: (sum, its gradient), by ‖SᵀS − TᵀT‖² = ‖SSᵀ‖² + ‖TTᵀ‖² − 2‖STᵀ‖² with S of channels × N.

    The three terms cancel where the two agree: in float64 that leaves about 1e-16 N², in float32 nothing of
    a small difference.
    """
    s, t = student.flatten(1), teacher.flatten(1)
    ss, tt, st = s @ s.T, t @ t.T, s @ t.T
    total = ss.square().sum() + tt.square().sum() - 2 * st.square().sum()
    gradient = torch.addmm(ss @ s, st, t, alpha=-1).mul_(4)
    return total.clamp(min=0), gradient.view_as(student)


def by_rows(
    student: Float64[Tensor, "channels rows columns"],
    teacher: Float64[Tensor, "teacher_channels rows columns"],
    radius: int | None,
) -> tuple[Float64[Tensor, ""], Float64[Tensor, "channels rows columns"]]:
    """(Sum, its gradient) by the differences themselves, some rows of nodes against those within reach."""
    channels, rows, columns = student.shape
    step = max(1, CHUNK // (columns * columns * rows)) if radius is None else 1
    at = torch.arange(columns, device=student.device)
    near = None if radius is None else ((at[:, None] - at).abs() <= radius)[:, None, :]
    total, gradient = student.new_zeros(()), torch.empty_like(student, memory_format=torch.contiguous_format)
    for first in range(0, rows, step):
        here = slice(first, first + step)
        around = slice(0, rows) if radius is None else slice(max(first - radius, 0), first + radius + 1)
        (s, s_near), (t, t_near) = (
            (x[:, here].flatten(1), x[:, around].flatten(1)) for x in (student, teacher)
        )
        difference = torch.addmm(s.T @ s_near, t.T, t_near, alpha=-1)
        if near is not None:
            difference.view(columns, -1, columns).mul_(near)
        total += difference.square().sum()
        gradient[:, here] = (s_near @ difference.T).mul_(4).view(channels, -1, columns)
    return total, gradient
