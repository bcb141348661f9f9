"""Eqs. 1 and 2 of Liu et al. against the obvious N×N form, closed forms and slow loops."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kamal_lib.losses.pairwise import by_gram, by_rows, gram_pays, neighbours, pooled, unit_vectors
from kamal_lib.losses.structured import pair_wise_loss, pixel_wise_loss


def noise(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- Eq. 1 --------------------------------------------------------------------------------------------------


def entropies(logits: torch.Tensor) -> torch.Tensor:
    p = logits.double().softmax(1)
    return -(p * p.log()).sum(1)


def test_pixel_wise_by_loops():
    student, teacher = noise(2, 3, 2, 2), noise(2, 3, 2, 2, seed=1)
    forward = reverse = 0.0
    for n, i, j in [(n, i, j) for n in range(2) for i in range(2) for j in range(2)]:
        s, t = ([math.exp(v) for v in x[n, :, i, j].tolist()] for x in (student, teacher))
        for a, b in zip([v / sum(s) for v in s], [v / sum(t) for v in t], strict=True):
            forward += b * math.log(b / a) / 8
            reverse += a * math.log(a / b) / 8
    assert float(pixel_wise_loss(student, teacher)) == pytest.approx(forward, rel=1e-5)
    assert float(pixel_wise_loss(student, teacher, direction="reverse")) == pytest.approx(reverse, rel=1e-5)
    assert forward != pytest.approx(reverse, rel=0.01)


def test_cross_entropy_minus_kl_is_the_teachers_entropy():
    """What the authors' code minimises is Eq. 1 with its arguments exchanged, up to a constant."""
    student, teacher = noise(2, 5, 4, 3, dtype=torch.float64), noise(2, 5, 4, 3, seed=1, dtype=torch.float64)
    student.requires_grad_()
    cross = F.cross_entropy(student, teacher.softmax(1))
    kl = pixel_wise_loss(student, teacher)
    assert float((cross - kl).detach()) == pytest.approx(float(entropies(teacher).mean()), rel=1e-12)
    (a,), (b,) = torch.autograd.grad(cross, student), torch.autograd.grad(kl, student)
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_pixel_wise_is_zero_at_equality_and_only_there(direction):
    logits = (3 * noise(2, 5, 4, 3)).requires_grad_()
    loss = pixel_wise_loss(logits, logits.detach() + 7, direction=direction)  # softmax knows no common shift
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert float(logits.grad.abs().max()) < 1e-6
    logits = logits.detach()
    assert float(pixel_wise_loss(logits, logits, direction=direction)) == 0
    assert float(pixel_wise_loss(logits, noise(2, 5, 4, 3, seed=1), direction=direction)) > 0.1


def test_reductions_of_public_codes():
    student, teacher = noise(8, 19, 4, 3), noise(8, 19, 4, 3, seed=1)
    log_s, t = student.log_softmax(1), teacher.softmax(1)
    one = float(pixel_wise_loss(student, teacher))
    authors = (-t * log_s).sum() / 12 - entropies(teacher).sum() / 12
    assert float(pixel_wise_loss(student, teacher, reduction="images")) == pytest.approx(float(authors), 1e-4)
    elements = F.kl_div(log_s, t, reduction="none")  # whose "mean" is one over all of these
    for theirs, ours, factor in [(elements.mean(), "elements", 1 / 19), (elements.sum(), "sum", 8 * 12)]:
        found = float(pixel_wise_loss(student, teacher, reduction=ours))
        assert found == pytest.approx(float(theirs), rel=1e-4)
        assert found == pytest.approx(factor * one, rel=1e-5)
    assert float(F.kl_div(log_s, t, reduction="batchmean")) == pytest.approx(12 * one, rel=1e-4)
    most, least = (pixel_wise_loss(student, teacher, reduction=r) for r in ("images", "elements"))
    assert float(most / least) == pytest.approx(8 * 19)


def test_temperature_divides_the_logits_and_t_squared_multiplies():
    """At a high T the gradient is that of ½ · mean over pixels of Σ (s − t)² / C for logits of mean 0."""
    student, teacher = (
        x - x.mean(1, keepdim=True) for x in (noise(1, 5, 3, 3).double(), noise(1, 5, 3, 3, seed=1).double())
    )
    found = float(pixel_wise_loss(student, teacher, temperature=3.0))
    assert found == pytest.approx(9 * float(pixel_wise_loss(student / 3, teacher / 3)), rel=1e-12)
    limit = float((student - teacher).square().sum(1).mean() / 2 / 5)
    assert float(pixel_wise_loss(student, teacher, temperature=1e4)) == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_pixel_wise_in_half_precision_is_computed_in_float32(half):
    student, teacher = (8 * noise(2, 40, 6, 7)).to(half), (8 * noise(2, 40, 6, 7, seed=1)).to(half)
    loss = pixel_wise_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(pixel_wise_loss(student.double(), teacher.double())), rel=1e-5)


def test_gradients_of_pixel_wise_in_float64():
    student, teacher = noise(2, 3, 2, 2, dtype=torch.float64), noise(2, 3, 2, 2, seed=1, dtype=torch.float64)
    student.requires_grad_()
    for direction in ("forward", "reverse"):
        assert torch.autograd.gradcheck(
            lambda s, d=direction: pixel_wise_loss(s, teacher, direction=d, temperature=2.0), student
        )


# --- Eq. 2: the graph ---------------------------------------------------------------------------------------


def test_patches_of_2_make_33_nodes_of_65_pixels():
    """In ceil mode; the last patch is the mean of what is left, not of a part of zeros."""
    x = noise(2, 65, 65)
    nodes = pooled(x, (2, 2), pooling="average")
    assert nodes.shape == (2, 33, 33)
    assert nodes.dtype == torch.float64
    x = x.double()
    assert torch.allclose(nodes[:, 3, 4], x[:, 6:8, 8:10].mean((1, 2)))
    assert torch.allclose(nodes[:, 3, 32], x[:, 6:8, 64].mean(1))
    assert torch.allclose(nodes[:, 32, 32], x[:, 64, 64])
    assert torch.equal(pooled(x, (2, 2), pooling="max")[:, 3, 32], x[:, 6:8, 64].amax(1))


def test_half_of_65_pixels_leaves_9_nodes():
    """The authors' code: patches of int(0.5 · 65) pixels."""
    assert pooled(noise(2, 65, 65), (32, 32), pooling="max").shape == (2, 3, 3)


def test_a_node_has_9_neighbours_6_at_an_edge_4_in_a_corner():
    found = neighbours(4, 5, 1).tolist()
    assert found == [[4, 6, 6, 6, 4], [6, 9, 9, 9, 6], [6, 9, 9, 9, 6], [4, 6, 6, 6, 4]]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_neighbours_by_loops(rows, columns, radius):
    nodes = [(i, j) for i in range(rows) for j in range(columns)]
    expected = [sum(max(abs(i - k), abs(j - m)) <= radius for k, m in nodes) for i, j in nodes]
    assert neighbours(rows, columns, radius).flatten().tolist() == expected
    assert neighbours(rows, columns, None).flatten().tolist() == [rows * columns] * (rows * columns)


def test_the_forms_change_places_where_their_products_cost_the_same():
    assert not gram_pays(537, 128, 512)
    assert gram_pays(538, 128, 512)


# --- Eq. 2: the obvious form --------------------------------------------------------------------------------


def affinities(features: torch.Tensor, *, detach_norm: bool = False) -> torch.Tensor:
    """a_ij of all pairs, N×N for each image: what the library does not do."""
    f = features.flatten(2)
    length = f.norm(dim=1, keepdim=True)
    length = length.detach() if detach_norm else length
    f = torch.where(length > 0, f / length.clamp(min=1e-30), 0)
    return f.mT @ f


def within(rows: int, columns: int, radius: int | None) -> torch.Tensor:
    """N×N: whether two nodes are connected."""
    y, x = (v.flatten() for v in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    apart = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs())
    return apart <= (rows + columns if radius is None else radius)


def obvious(
    student,
    teacher,
    *,
    patch=(2, 2),
    radius=None,
    pooling="average",
    detach_norm=False,
    divisor="connections",
):
    """Eq. 2 with its matrices, for inputs of any precision."""
    pool = F.avg_pool2d if pooling == "average" else F.max_pool2d
    s, t = (pool(x, patch, ceil_mode=True) for x in (student, teacher))
    near = within(s.shape[2], s.shape[3], radius)
    count = float(near.sum())
    if divisor == "printed":
        beta, pixels = patch[0] * patch[1], student[0, 0].numel()
        alpha = pixels / beta if radius is None else (2 * radius + 1) ** 2
        count = pixels * alpha / beta
    a, b = affinities(s, detach_norm=detach_norm), affinities(t)
    return ((a - b).square() * near).sum() / count / len(student)


def value_and_gradient(loss, student, *rest, **options):
    student = student.detach().clone().requires_grad_()
    value = loss(student, *rest, **options)
    value.backward()
    return float(value.detach()), student.grad


def agree(student, teacher, **options) -> None:
    """Value and gradient are those of the obvious form to ten digits."""
    value, gradient = value_and_gradient(pair_wise_loss, student, teacher, **options)
    expected, slope = value_and_gradient(obvious, student, teacher, **options)
    assert value == pytest.approx(expected, rel=1e-10)
    assert torch.allclose(gradient, slope, rtol=1e-10, atol=1e-10 * float(slope.abs().max()))


@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (3, 2), (5, 6)])
@pytest.mark.parametrize("radius", [None, 1, 2])
@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize("detach_norm", [False, True])
@pytest.mark.parametrize("divisor", ["connections", "printed"])
def test_all_options_against_the_obvious_form(patch, radius, pooling, detach_norm, divisor):
    student, teacher = noise(2, 6, 11, 13, dtype=torch.float64), noise(2, 9, 11, 13, seed=1).double()
    agree(
        student,
        teacher,
        patch=patch,
        radius=radius,
        pooling=pooling,
        detach_norm=detach_norm,
        divisor=divisor,
    )


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_any_size_and_width(height, width, channels, teacher_channels, seed):
    student = noise(1, channels, height, width, seed=seed, dtype=torch.float64)
    teacher = noise(1, teacher_channels, height, width, seed=seed + 1, dtype=torch.float64)
    value, gradient = value_and_gradient(pair_wise_loss, student, teacher, patch=1)
    expected, slope = value_and_gradient(obvious, student, teacher, patch=(1, 1))
    assert value == pytest.approx(expected, rel=1e-10, abs=1e-14)
    assert torch.allclose(gradient, slope, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("form", [by_gram, by_rows])
@pytest.mark.parametrize("channels", [3, 40])
def test_both_forms_on_either_side_of_the_break_even(form, channels):
    student, teacher = noise(channels, 8, 9).double(), noise(2 * channels, 8, 9, seed=1).double()
    assert gram_pays(72, channels, 2 * channels) == (channels == 3)
    units = unit_vectors(student).requires_grad_()
    expected = (affinities(student[None]) - affinities(teacher[None])).square().sum()
    loss = (units.flatten(1).T @ units.flatten(1) - affinities(teacher[None])[0]).square().sum()
    (slope,) = torch.autograd.grad(loss, units)
    rest = () if form is by_gram else (None,)
    total, gradient = form(units.detach(), unit_vectors(teacher), *rest)
    assert float(total) == pytest.approx(float(expected), rel=1e-10)
    assert torch.allclose(gradient, slope, rtol=1e-10, atol=1e-10)


def test_several_chunks_are_the_whole(monkeypatch):
    student, teacher = noise(40, 7, 9).double(), noise(50, 7, 9, seed=1).double()
    whole = by_rows(student, teacher, None)
    monkeypatch.setattr("kamal_lib.losses.pairwise.CHUNK", 2 * 9 * 63)  # two of seven rows at a time
    chunks = by_rows(student, teacher, None)
    assert float(chunks[0]) == pytest.approx(float(whole[0]), rel=1e-12)
    assert torch.allclose(chunks[1], whole[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(7, 5), (20, 18)])
def test_a_radius_that_reaches_all_is_the_full_graph(size):
    student, teacher = noise(2, 4, *size).double(), noise(2, 6, *size, seed=1).double()
    local = value_and_gradient(pair_wise_loss, student, teacher, patch=1, radius=max(size) - 1)
    full = value_and_gradient(pair_wise_loss, student, teacher, patch=1)
    assert local[0] == pytest.approx(full[0], rel=1e-12)
    assert torch.allclose(local[1], full[1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("noisy", [1.0, 0.1, 0.004])
@pytest.mark.parametrize(
    ("side", "options"), [(40, {}), (12, {}), (40, {"radius": 1}), (41, {"patch": (2, 2)})]
)
def test_float32_loses_nothing_where_student_and_teacher_nearly_agree(noisy, side, options):
    """Within 1e-6 of the float64 result for the same numbers; in float32 the three terms would cancel."""
    teacher = noise(1, 16, side, side).relu()
    student = teacher + noisy * noise(1, 16, side, side, seed=1)
    options = {"patch": (1, 1)} | options
    value, gradient = value_and_gradient(pair_wise_loss, student, teacher, **options)
    exact, slope = value_and_gradient(obvious, student.double(), teacher.double(), **options)
    assert exact >= 1e-6
    assert value == pytest.approx(exact, rel=1e-6)
    assert gradient.dtype == torch.float32
    assert float((gradient - slope).norm() / slope.norm()) < 1e-6
    naive, _ = value_and_gradient(obvious, student, teacher, **options)
    assert abs(value / exact - 1) <= abs(naive / exact - 1) + 1e-7


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_compared_in_float64(half):
    student, teacher = noise(2, 6, 8, 8).to(half), noise(2, 9, 8, 8, seed=1).to(half)
    loss = pair_wise_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(obvious(student.double(), teacher.double())), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"patch": 1}, {"patch": 1, "radius": 2}, {"detach_norm": True}])
@pytest.mark.parametrize("channels", [4, 200])
def test_pair_wise_is_zero_at_equality(options, channels):
    features = noise(2, channels, 14, 14)
    value, gradient = value_and_gradient(pair_wise_loss, features, features, **options)
    assert 0 <= value < 1e-14
    assert float(gradient.abs().max()) < 1e-10


def test_the_length_of_features_and_a_rotation_do_not_count():
    """Cosines are left as they are by both, and so no adapter is needed between widths."""
    student, teacher = noise(1, 4, 6, 6).double(), noise(1, 4, 6, 6, seed=1).double()
    once = pair_wise_loss(student, teacher, patch=1)
    rotation, _ = torch.linalg.qr(noise(7, 4, seed=2).double())
    turned = torch.einsum("dc,nchw->ndhw", rotation, teacher) * (1 + noise(1, 1, 6, 6, seed=3).double().abs())
    assert float(pair_wise_loss(student, turned, patch=1)) == pytest.approx(float(once), rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_the_loss_is_never_negative(seed):
    """Where all three terms cancel and only their rounding is left."""
    student = noise(1, 4, 12, 12, seed=seed)
    rotation, _ = torch.linalg.qr(noise(9, 4, seed=seed + 1).double())
    turned = torch.einsum("dc,nchw->ndhw", rotation, student.double())
    assert 0 <= float(pair_wise_loss(student, turned, patch=1)) < 1e-14


@pytest.mark.parametrize("options", [{}, {"patch": 1}, {"patch": 1, "radius": 1}, {"pooling": "max"}])
@pytest.mark.parametrize("channels", [3, 100])
def test_dead_nodes_have_finite_gradients(options, channels):
    """Features of 0 have no direction: similarity 0, gradient 0. Of them all: the teacher's similarities."""
    student, teacher = noise(2, channels, 9, 9).relu(), noise(2, 5, 9, 9, seed=1)
    student[:, :, :4], teacher[:, :, :, :3] = 0, 0
    value, gradient = value_and_gradient(pair_wise_loss, student, teacher, **options)
    assert math.isfinite(value)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient[:, :, :3].abs().max()) == 0
    assert float(gradient.abs().max()) < 1
    patch = options.get("patch", 2)
    expected = obvious(student.double(), teacher.double(), **options | {"patch": (patch, patch)})
    assert value == pytest.approx(float(expected), rel=1e-6)
    value, gradient = value_and_gradient(pair_wise_loss, torch.zeros_like(student), teacher, **options)
    assert value > 0
    assert float(gradient.abs().max()) == 0


def test_features_as_small_as_float32_goes_have_finite_gradients():
    student, teacher = 1e-38 * noise(1, 3, 5, 5), noise(1, 4, 5, 5, seed=1)
    _, gradient = value_and_gradient(pair_wise_loss, student, teacher, patch=1)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("options", [{"patch": 1}, {"patch": 2, "radius": 1}, {"patch": (3, 4)}])
def test_gradients_of_pair_wise_in_float64(options):
    student, teacher = noise(1, 3, 4, 5, dtype=torch.float64), noise(1, 4, 4, 5, seed=1, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: pair_wise_loss(s, teacher, **options), student)


def test_second_derivatives_are_refused():
    """They would be wrong: the gradient is computed on the way and taken for a constant afterwards."""
    student, teacher = noise(1, 3, 5, 6).requires_grad_(), noise(1, 4, 5, 6, seed=1)
    with pytest.raises(RuntimeError, match=r"first derivatives only, got .* create_graph=True: leave it out"):
        torch.autograd.grad(pair_wise_loss(student, teacher), student, create_graph=True)


def test_a_single_node_costs_nothing():
    """It is connected with itself only."""
    value, gradient = value_and_gradient(
        pair_wise_loss, noise(2, 3, 5, 6), noise(2, 4, 5, 6, seed=1), patch=(5, 6)
    )
    assert 0 <= value < 1e-30
    assert float(gradient.abs().max()) < 1e-15


def test_the_layout_in_memory_does_not_count():
    student, teacher = noise(2, 6, 8, 9), noise(2, 9, 8, 9, seed=1)
    for options in ({}, {"patch": 1}, {"patch": 1, "radius": 2}):
        plain = value_and_gradient(pair_wise_loss, student, teacher, **options)
        last = value_and_gradient(
            pair_wise_loss,
            student.to(memory_format=torch.channels_last),
            teacher.to(memory_format=torch.channels_last),
            **options,
        )
        assert last[0] == pytest.approx(plain[0], rel=1e-6)
        assert torch.allclose(last[1], plain[1], rtol=1e-5, atol=1e-9)


# --- no matrix of N × N -------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Watches how many numbers the largest tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return made


@pytest.mark.parametrize("options", [{}, {"radius": 1}, {"radius": 6}])
def test_no_tensor_has_n_squared_numbers(options):
    student, teacher, n = noise(1, 8, 40, 40).requires_grad_(), noise(1, 16, 40, 40, seed=1), 40**2
    with Largest() as ours:
        pair_wise_loss(student, teacher, patch=1, **options).backward()
    assert ours.numbers <= 40 * n
    with Largest() as theirs:
        obvious(student, teacher, patch=(1, 1), **options).backward()
    assert theirs.numbers >= n**2


def test_the_benchmark_prints_one_json_line(capsys):
    path = Path(__file__).parents[1] / "benchmarks" / "pairwise.py"
    spec = importlib.util.spec_from_file_location("benchmark_pairwise", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--sides", "4", "24", "--repeats", "1"])
    *curve, last = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in curve[-2:]] == [["16", "rows"], ["576", "products"]]
    figures = json.loads(last)
    assert figures["n"] == 576
    assert figures["time_ratio"] > 0
    assert figures["memory_ratio"] > 0.5
    assert figures["relative_error"] < 1e-6


# --- both ---------------------------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("loss", [pixel_wise_loss, pair_wise_loss])


@BOTH
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = noise(2, 3, 6, 6).requires_grad_(), noise(2, 3, 6, 6, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert float(student.grad.abs().sum()) > 0


@BOTH
def test_autocast_changes_nothing(loss):
    student, teacher = noise(2, 5, 8, 8), noise(2, 5, 8, 8, seed=1)
    plain = value_and_gradient(loss, student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        cast = value_and_gradient(loss, student, teacher)
    assert cast[0] == plain[0]
    assert torch.equal(cast[1], plain[1])


@BOTH
def test_the_loss_is_the_mean_of_its_images(loss):
    student, teacher = noise(3, 4, 6, 6), noise(3, 4, 6, 6, seed=1)
    parts = [float(loss(student[i : i + 1], teacher[i : i + 1])) for i in range(3)]
    assert float(loss(student, teacher)) == pytest.approx(sum(parts) / 3, rel=1e-6)


@BOTH
@pytest.mark.parametrize("other", [(2, 3, 4, 6), (2, 3, 6, 5), (1, 3, 6, 6)])
def test_maps_of_different_size(loss, other):
    message = rf"same images at the same size, got 2 of 6×6 and {other[0]} of {other[2]}×{other[3]}: resize"
    with pytest.raises(ValueError, match=message):
        loss(noise(2, 3, 6, 6), noise(*other))


@BOTH
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(loss, whose, wrong):
    maps = {"student": noise(1, 3, 4, 4), "teacher": noise(1, 3, 4, 4, seed=1)}
    maps[whose][0, 1, 2, 2:] = wrong
    with pytest.raises(ValueError, match=rf"the {whose}'s \w+ must be finite, got 2 of 48 values such as"):
        loss(*maps.values())


def test_class_counts_that_differ():
    with pytest.raises(ValueError, match="must have the same classes, got 13 and 40: select or add"):
        pixel_wise_loss(noise(1, 13, 4, 4), noise(1, 40, 4, 4))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ValueError, match=f"must be positive, got {temperature}"):
        pixel_wise_loss(noise(1, 3, 4, 4), noise(1, 3, 4, 4), temperature=temperature)


@pytest.mark.parametrize("patch", [0, 7, (1, 9), (7, 1)])
def test_a_patch_beyond_the_map(patch):
    with pytest.raises(ValueError, match=r"patch \(β\) must lie within the map, 1×1 to 6×8, got"):
        pair_wise_loss(noise(1, 3, 6, 8), noise(1, 3, 6, 8), patch=patch)


@pytest.mark.parametrize("radius", [0, -1, 4, 100])
def test_a_radius_beyond_the_nodes(radius):
    with pytest.raises(
        ValueError, match=rf"radius \(α\) .* the 3×4 nodes, 1 to 3, got {radius}: radius None"
    ):
        pair_wise_loss(noise(1, 3, 6, 8), noise(1, 3, 6, 8), radius=radius)


@pytest.mark.parametrize(
    ("loss", "option"),
    [
        (pixel_wise_loss, {"direction": "backward"}),
        (pixel_wise_loss, {"reduction": "mean"}),
        (pair_wise_loss, {"pooling": "min"}),
        (pair_wise_loss, {"divisor": "nodes"}),
    ],
)
def test_an_unknown_word(loss, option):
    ((name, word),) = option.items()
    with pytest.raises(ValueError, match=rf"{name} must be one of '\w+', .*got '{word}'"):
        loss(noise(1, 3, 4, 4), noise(1, 3, 4, 4), **option)
