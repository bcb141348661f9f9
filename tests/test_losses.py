"""Eqs. 1 to 3 of Ye et al. and the metrics, against closed forms and slow loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.segmentation import mean_iou

from kamal_lib.losses.dense import cross_entropy, depth_loss, expected_depth
from kamal_lib.metrics import DepthErrors, SegmentationScores
from kamal_lib.sample import VOID
from kamal_lib.tasks import Depth, DirectObjective, Segmentation, task_losses


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


# --- Eq. 2 --------------------------------------------------------------------------------------------------


def test_expected_depth_of_one_sure_bin():
    """Literally b · l: bin 3 of 0.25 m stands at 0.75 m, its far edge."""
    response = torch.full((1, 8, 1, 1), -1e4)
    response[0, 2] = 1e4
    assert float(expected_depth(response, bin_length=0.25)) == pytest.approx(0.75)


def test_expected_depth_of_a_uniform_response():
    depth = expected_depth(torch.zeros(1, 40, 1, 1), bin_length=0.25)
    assert float(depth) == pytest.approx(0.25 * 41 / 2)


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


def test_gradients_in_float64():
    response = noise(2, 4, 2, 3, dtype=torch.float64).requires_grad_()
    target = noise(2, 2, 3, seed=1, dtype=torch.float64).abs()
    target[0, 0, 0] = 0
    labels = torch.tensor([[[0, 1, 2], [3, VOID, 0]]] * 2)
    assert torch.autograd.gradcheck(lambda r: depth_loss(expected_depth(r, bin_length=0.3), target), response)
    assert torch.autograd.gradcheck(lambda r: cross_entropy(r, labels), response)


# --- metrics ------------------------------------------------------------------------------------------------


def test_miou_by_hand():
    truth = torch.tensor([[[0, 0, 1], [1, 1, VOID], [2, 2, 2]]])
    guess = torch.tensor([[[0, 1, 1], [1, 0, 0], [2, 2, 3]]])
    scores = SegmentationScores(4)
    scores.update(guess, truth)
    found = scores.compute()
    # class 0: 1 hit, union 3; class 1: 2 hits, union 4; class 2: 2 hits, union 3; class 3 is never true
    assert float(found["miou"]) == pytest.approx((1 / 3 + 2 / 4 + 2 / 3) / 3)
    assert float(found["pixel_acc"]) == pytest.approx(5 / 8)


def test_a_class_that_is_only_predicted_is_left_out():
    scores = SegmentationScores(3)
    scores.update(torch.tensor([[[0, 0, 0, 2, 1, 1]]]), torch.tensor([[[0, 0, 0, 0, 1, 1]]]))
    assert float(scores.compute()["miou"]) == pytest.approx((3 / 4 + 1) / 2)


def test_one_matrix_for_the_set_whatever_the_batches():
    g = torch.Generator().manual_seed(0)
    truth, guess = (torch.randint(0, 5, (7, 6, 6), generator=g) for _ in range(2))
    whole, parts, per_image = SegmentationScores(5), SegmentationScores(5), []
    whole.update(guess, truth)
    for i, j in [(0, 1), (1, 5), (5, 7)]:
        parts.update(guess[i:j], truth[i:j])
    for i in range(7):
        one = SegmentationScores(5)
        one.update(guess[i : i + 1], truth[i : i + 1])
        per_image.append(float(one.compute()["miou"]))
    assert float(whole.compute()["miou"]) == float(parts.compute()["miou"])
    assert float(whole.compute()["miou"]) != pytest.approx(sum(per_image) / 7, abs=1e-3)
    # an independent count over the set laid out as one image
    flat = mean_iou(guess.view(1, -1), truth.view(1, -1), num_classes=5, input_format="index")
    assert float(whole.compute()["miou"]) == pytest.approx(float(flat), rel=1e-6)


def test_depth_errors_by_hand():
    errors = DepthErrors()
    errors.update(torch.tensor([[[1.1, 4.0, 7.0]]]), torch.tensor([[[1.0, 2.0, 0.0]]]))
    errors.update(torch.tensor([[[2.6]]]), torch.tensor([[[2.0]]]))
    found = {name: float(value) for name, value in errors.compute().items()}
    assert found["abs_rel"] == pytest.approx((0.1 + 1.0 + 0.3) / 3, rel=1e-6)
    assert found["sqr_rel"] == pytest.approx((0.01 + 2.0 + 0.18) / 3, rel=1e-6)
    assert found["delta1"] == pytest.approx(1 / 3)  # ratios 1.1, 2, 1.3 against 1.25, 1.5625, 1.953125
    assert found["delta2"] == pytest.approx(2 / 3)
    assert found["delta3"] == pytest.approx(2 / 3)


def test_depth_errors_weigh_pixels_not_images():
    """A batch of one pixel counts one pixel; the smaller of the two depths may be either."""
    errors = DepthErrors()
    errors.update(torch.full((1, 3, 3), 1.0), torch.full((1, 3, 3), 2.0))
    errors.update(torch.tensor([[[2.0]]]), torch.tensor([[[2.0]]]))
    found = errors.compute()
    assert float(found["abs_rel"]) == pytest.approx(0.5 * 9 / 10)
    assert float(found["delta3"]) == pytest.approx(1 / 10)


# --- tasks --------------------------------------------------------------------------------------------------

TASKS = {"segmentation": Segmentation(("a", "b", "c")), "depth": Depth(bins=4, bin_length=0.5)}


def test_a_prediction_is_its_own_best_depth_target():
    task, response = TASKS["depth"], noise(2, 4, 3, 3)
    assert float(task.loss(response, task.decode(response))) == 0
    assert float(task.loss(response, task.decode(response) + 1)) == pytest.approx(0.5)


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
