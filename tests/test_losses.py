"""Eqs. 1 to 4 of Ye et al. and the tasks, against closed forms and slow loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kamal_lib.losses.dense import cross_entropy, depth_loss, expected_depth, normal_loss, unit_normals
from kamal_lib.sample import VOID
from kamal_lib.tasks import Depth, DirectObjective, Normals, Segmentation, task_losses


def noise(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- Eq. 1 --------------------------------------------------------------------------------------------------


def test_cross_entropy_by_loops():
    """Per image over its labelled pixels, then over the images that have any."""
    response = noise(3, 4, 2, 3)
    labels = torch.tensor([[[0, 1, 2], [3, VOID, VOID]], [[VOID] * 3] * 2, [[2, 2, VOID], [VOID] * 3]])
    images = []
    for r, y in zip(response.tolist(), labels.tolist(), strict=True):
        pixels = []
        for i, row in enumerate(y):
            for j, label in enumerate(row):
                if label != VOID:
                    logits = [r[c][i][j] for c in range(4)]
                    pixels.append(math.log(sum(math.exp(v) for v in logits)) - logits[label])
        if pixels:
            images.append(sum(pixels) / len(pixels))
    assert len(images) == 2
    assert float(cross_entropy(response, labels)) == pytest.approx(sum(images) / 2, rel=1e-5)


def test_cross_entropy_of_a_uniform_response():
    assert float(cross_entropy(torch.zeros(1, 13, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))) == (
        pytest.approx(math.log(13))
    )


@pytest.mark.parametrize("bad", [13, -1, 254])
def test_a_label_outside_the_classes(bad):
    labels = torch.tensor([[[0, bad], [VOID, 12]]])
    with pytest.raises(ValueError, match=rf"labels \[{bad}\] are outside 0..12 and not 255"):
        cross_entropy(torch.zeros(1, 13, 2, 2), labels)


def test_an_image_without_labels_costs_nothing():
    response = noise(1, 3, 2, 2).requires_grad_()
    loss = cross_entropy(response, torch.full((1, 2, 2), VOID))
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(response.grad.abs().sum()) == 0


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_cross_entropy_in_half_precision_is_computed_in_float32(half):
    response, labels = 8 * noise(2, 40, 6, 7).to(half), torch.arange(84).view(2, 6, 7) % 40
    loss = cross_entropy(response, labels)
    assert loss.dtype == torch.float32
    exact = torch.nn.functional.cross_entropy(response.double(), labels)
    assert float(loss) == pytest.approx(float(exact), rel=1e-6)


# --- Eq. 2 --------------------------------------------------------------------------------------------------


def test_expected_depth_of_one_sure_bin():
    """Literally b · l: bin 3 of 0.25 m stands at 0.75 m, its far edge."""
    response = torch.full((1, 8, 1, 1), -1e4)
    response[0, 2] = 1e4
    assert float(expected_depth(response, bin_length=0.25)) == pytest.approx(0.75)


def test_expected_depth_of_a_uniform_response():
    depth = expected_depth(torch.zeros(1, 40, 1, 1), bin_length=0.25)
    assert float(depth) == pytest.approx(0.25 * 41 / 2)


def test_a_depth_task_has_40_bins_of_a_quarter_metre():
    """Ten metres, the range of NYUDv2, unless one asks for others."""
    task = Depth()
    assert task.channels == 40
    assert float(task.decode(torch.zeros(1, 40, 1, 1))) == pytest.approx(0.25 * 41 / 2)
    sure = torch.full((1, 40, 1, 1), -1e4)
    sure[0, 39] = 1e4
    assert float(task.decode(sure)) == pytest.approx(10)


def test_expected_depth_by_loops():
    response = noise(2, 5, 2, 2, dtype=torch.float64)
    for n, i, j in [(0, 0, 0), (1, 1, 0), (0, 1, 1)]:
        e = [math.exp(v) for v in response[n, :, i, j].tolist()]
        expected = sum(b * 0.5 * v / sum(e) for b, v in enumerate(e, 1))
        assert float(expected_depth(response, bin_length=0.5)[n, i, j]) == pytest.approx(expected, rel=1e-12)


def test_half_precision_is_decoded_in_float32():
    response = noise(1, 40, 3, 3)
    half = expected_depth(response.bfloat16(), bin_length=0.25)
    assert half.dtype == torch.float32
    assert torch.equal(half, expected_depth(response.bfloat16().float(), bin_length=0.25))


# --- Eq. 3 --------------------------------------------------------------------------------------------------


@given(st.floats(-0.9, 3.0))
def test_a_shift_costs_half_its_square(c):
    depth = noise(2, 5, 6, dtype=torch.float64).abs() + 1
    assert float(depth_loss(depth, depth + c)) == pytest.approx(c * c / 2, abs=1e-12)


def test_depth_loss_as_printed():
    """(1/N) Σ d² − (1/2N²)(Σ d)² with loops, unknown pixels left out, images without any not counted."""
    depth, target = noise(3, 2, 3).abs() + 1, noise(3, 2, 3, seed=1).abs() + 1
    target[0, 0] = 0
    target[1] = 0
    images = []
    for p, t in zip(depth.flatten(1).tolist(), target.flatten(1).tolist(), strict=True):
        d = [b - a for a, b in zip(p, t, strict=True) if b > 0]
        if d:
            images.append(sum(v * v for v in d) / len(d) - sum(d) ** 2 / (2 * len(d) ** 2))
    assert len(images) == 2
    assert float(depth_loss(depth, target)) == pytest.approx(sum(images) / 2, rel=1e-5)


def test_depth_loss_is_variance_plus_half_the_squared_mean():
    depth, target = noise(1, 4, 5, dtype=torch.float64), noise(1, 4, 5, seed=1, dtype=torch.float64).abs() + 1
    d = target - depth
    assert float(depth_loss(depth, target)) == pytest.approx(float(d.var(correction=0) + d.mean() ** 2 / 2))


def test_few_valid_pixels_weigh_as_much_as_many():
    depth, target = torch.ones(2, 2, 2), torch.full((2, 2, 2), 2.0)
    target[1] = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    assert float(depth_loss(depth, target)) == pytest.approx((1 / 2 + 9 / 2) / 2)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_a_target_that_is_no_depth(wrong):
    target = torch.tensor([[[1.0, 0.0, wrong]]])
    with pytest.raises(ValueError, match=rf"metres from 0 \(unknown\) on, got 1 of 3 values such as {wrong}"):
        depth_loss(torch.ones(1, 1, 3), target)


def test_gradients_in_float64():
    response = noise(2, 4, 2, 3, dtype=torch.float64).requires_grad_()
    target = noise(2, 2, 3, seed=1, dtype=torch.float64).abs()
    target[0, 0, 0] = 0
    labels = torch.tensor([[[0, 1, 2], [3, VOID, 0]]] * 2)
    assert torch.autograd.gradcheck(lambda r: depth_loss(expected_depth(r, bin_length=0.3), target), response)
    assert torch.autograd.gradcheck(lambda r: cross_entropy(r, labels), response)


# --- Eq. 4 --------------------------------------------------------------------------------------------------


def units(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Unit vectors along axis 1."""
    return torch.nn.functional.normalize(noise(*shape, seed=seed, dtype=dtype), dim=1)


def test_normal_loss_as_printed():
    """−(1/N) Σ M · M^gt by loops: per image over its known pixels, then over the images that have any."""
    response, target = noise(3, 3, 2, 3), units(3, 3, 2, 3, seed=1)
    target[0, :, 0, 1:] = 0
    target[1] = 0
    images = []
    for r, t in zip(response.tolist(), target.tolist(), strict=True):
        cosines = []
        for i in range(2):
            for j in range(3):
                m, truth = ([v[axis][i][j] for axis in range(3)] for v in (r, t))
                if any(truth):
                    dot = sum(a * b for a, b in zip(m, truth, strict=True))
                    cosines.append(dot / math.sqrt(sum(a * a for a in m)))
        if cosines:
            images.append(-sum(cosines) / len(cosines))
    assert len(images) == 2
    assert float(normal_loss(unit_normals(response), target)) == pytest.approx(sum(images) / 2, rel=1e-5)
    assert float(Normals().loss(response, target)) == pytest.approx(sum(images) / 2, rel=1e-5)


def test_normal_loss_by_hand():
    """Cosines 1, 0 and a pixel that is unknown; then −1 in an image of its own, which counts as much."""
    left, towards, unknown = (-1.0, 0.0, 0.0), (0.0, 0.0, -1.0), (0.0, 0.0, 0.0)
    guess = torch.tensor([[left, left, left], [left, left, left]]).mT[:, :, None]
    truth = torch.tensor([[left, towards, unknown], [(1.0, 0.0, 0.0), unknown, unknown]]).mT[:, :, None]
    assert float(normal_loss(guess, truth)) == pytest.approx((-(1 + 0) / 2 + 1) / 2)


def test_normal_loss_at_best_and_at_worst():
    target = units(2, 3, 4, 5)
    assert float(Normals().loss(3 * target, target)) == pytest.approx(-1)
    assert float(Normals().loss(-3 * target, target)) == pytest.approx(1)


@given(st.floats(1e-3, 1e3))
def test_the_length_of_a_response_does_not_count(scale):
    response, target = noise(2, 3, 4, 5, dtype=torch.float64), units(2, 3, 4, 5, seed=1, dtype=torch.float64)
    once, scaled = (Normals().loss(r, target) for r in (response, scale * response))
    assert float(scaled) == pytest.approx(float(once), abs=1e-6)


def test_unit_normals_have_length_1_and_a_response_of_0_stays_0():
    response = noise(1, 3, 2, 2)
    response[0, :, 1, 1] = 0
    response.requires_grad_()
    found = Normals().decode(response)
    lengths = found.detach().norm(dim=1)[0]
    assert torch.allclose(lengths, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    expected = response.detach() / response.detach().norm(dim=1, keepdim=True).clamp_min(1e-6)
    assert torch.allclose(found.detach(), expected, atol=1e-6)
    Normals().loss(response, units(1, 3, 2, 2, seed=1)).backward()
    assert response.grad.isfinite().all()


def test_normals_in_half_precision_are_computed_in_float32():
    response, target = noise(1, 3, 4, 5).bfloat16(), units(1, 3, 4, 5, seed=1)
    assert Normals().decode(response).dtype == torch.float32
    assert torch.equal(Normals().decode(response), unit_normals(response.float()))
    coarse = unit_normals(response).bfloat16()
    assert torch.equal(normal_loss(coarse, target), normal_loss(coarse.float(), target))


def test_an_image_without_normals_costs_nothing():
    response = noise(1, 3, 2, 2).requires_grad_()
    loss = Normals().loss(response, torch.zeros(1, 3, 2, 2))
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(response.grad.abs().sum()) == 0


def test_gradients_of_eq_4():
    response = noise(2, 3, 2, 3, dtype=torch.float64).requires_grad_()
    target = units(2, 3, 2, 3, seed=1, dtype=torch.float64)
    target[0, :, 0, 0] = 0
    assert torch.autograd.gradcheck(lambda r: normal_loss(unit_normals(r), target), response)


@pytest.mark.parametrize("length", [0.5, 0.98, 1.02, 2.0, math.nan, math.inf])
def test_a_target_that_is_not_of_length_1(length):
    target = torch.zeros(1, 3, 1, 3)
    target[0, 2, 0, 0], target[0, 2, 0, 1] = -1, -length
    with pytest.raises(ValueError, match=rf"length 1.* got 1 pixels with lengths like {length:.3g}:"):
        normal_loss(units(1, 3, 1, 3), target)


def test_a_target_of_nearly_length_1_is_taken():
    target = units(1, 3, 4, 5)
    assert float(normal_loss(target, 1.005 * target)) == pytest.approx(-1.005, rel=1e-5)


# --- tasks --------------------------------------------------------------------------------------------------

TASKS = {"segmentation": Segmentation(("a", "b", "c")), "depth": Depth(bins=4, bin_length=0.5)}


def test_a_prediction_is_its_own_best_depth_target():
    task, response = TASKS["depth"], noise(2, 4, 3, 3)
    assert float(task.loss(response, task.decode(response))) == 0
    assert float(task.loss(response, task.decode(response) + 1)) == pytest.approx(0.5)


def test_a_prediction_is_its_own_best_normal_target():
    task, response = Normals(), noise(2, 3, 3, 3)
    assert task.channels == 3
    assert float(task.loss(response, task.decode(response))) == pytest.approx(-1)


def test_a_prediction_as_target_costs_minus_log_max_p():
    task, response = TASKS["segmentation"], noise(2, 3, 3, 3)
    expected = -response.log_softmax(1).max(1).values.mean()
    assert float(task.loss(response, task.decode(response))) == pytest.approx(float(expected), rel=1e-6)


def test_weights_multiply_and_a_missing_target_is_said():
    responses = {"segmentation": noise(1, 3, 2, 2), "depth": noise(1, 4, 2, 2)}
    batch = {"labels": torch.zeros(1, 2, 2, dtype=torch.long), "depth": torch.ones(1, 2, 2)}
    once = task_losses(TASKS, responses, batch, {})
    twice = task_losses(TASKS, responses, batch, {"depth": 2.0})
    assert float(twice["depth"]) == pytest.approx(2 * float(once["depth"]))
    assert float(twice["segmentation"]) == float(once["segmentation"])
    with pytest.raises(KeyError, match="the depth loss needs 'depth' in every sample"):
        task_losses(TASKS, responses, {"labels": batch["labels"]}, {})


def test_direct_objective_is_the_tasks_loss():
    network = torch.nn.Conv2d(3, 4, 1)
    objective = DirectObjective(Named(network), TASKS)
    batch = {"image": noise(2, 3, 4, 4), "depth": noise(2, 4, 4, seed=1).abs() + 0.1}
    expected = TASKS["depth"].loss(network(batch["image"]), batch["depth"])
    assert torch.equal(objective(batch)["depth"], expected)
    assert torch.equal(DirectObjective(Named(network), TASKS, {"depth": 4.0})(batch)["depth"], 4 * expected)


class Named(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, image):
        return {"depth": self.network(image)}
