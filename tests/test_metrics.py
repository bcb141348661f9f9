"""Scores and errors over a whole set, against closed forms, slow loops, NumPy and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.segmentation import mean_iou

from kamal_lib.metrics import (
    DepthErrors,
    NormalErrors,
    SegmentationScores,
    SetMetric,
    class_iou,
    image_states,
    resampled,
)
from kamal_lib.sample import VOID


def scores_of(metric: SetMetric, *batches: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    for prediction, target in batches:
        metric.update(prediction, target)
    return {name: float(value) for name, value in metric.compute().items()}


def fields(rows) -> torch.Tensor:
    """One image of one row of vectors: 1×3×1×pixels, float32."""
    return torch.tensor(np.asarray(rows), dtype=torch.float32).T[None, :, None]


def turned(degrees) -> torch.Tensor:
    """Vectors turned by these angles from (0, 0, −1), about the vertical axis."""
    a = np.radians(np.asarray(degrees, dtype=np.float64))
    return fields(np.stack([np.sin(a), 0 * a, -np.cos(a)], axis=1))


def towards(count: int) -> torch.Tensor:
    """The camera's direction, `count` times."""
    return fields([(0.0, 0.0, -1.0)] * count)


KINDS = ("segmentation", "depth", "normals")


def some(kind: str, images: int = 7, seed: int = 0) -> tuple[SetMetric, torch.Tensor, torch.Tensor]:
    """(metric, predictions, targets) of images of which each knows another share of its pixels."""
    g = torch.Generator().manual_seed(seed)
    unknown = torch.rand(images, 6, 5, generator=g) < torch.linspace(0, 0.8, images).view(-1, 1, 1)
    if kind == "segmentation":
        guess, truth = (torch.randint(0, 5, (images, 6, 5), generator=g) for _ in range(2))
        return SegmentationScores(5), guess, truth.masked_fill(unknown, VOID)
    if kind == "depth":
        guess, truth = (0.5 + 3 * torch.rand(images, 6, 5, generator=g) for _ in range(2))
        return DepthErrors(), guess, truth.masked_fill(unknown, 0)
    guess, truth = (torch.randn(images, 3, 6, 5, generator=g) for _ in range(2))
    truth = torch.nn.functional.normalize(truth, dim=1).masked_fill(unknown[:, None], 0)
    return NormalErrors(), guess, truth


# --- of every task ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_set_whatever_the_batches(kind):
    metric, guess, truth = some(kind)
    whole = scores_of(metric, (guess, truth))
    metric.reset()
    parts = scores_of(metric, *((guess[i:j], truth[i:j]) for i, j in [(0, 1), (1, 5), (5, 7)]))
    assert parts == pytest.approx(whole, rel=1e-12)
    single = [scores_of(some(kind)[0], (guess[i : i + 1], truth[i : i + 1])) for i in range(7)]
    for name, value in whole.items():  # and not the mean over images
        assert value != pytest.approx(sum(one[name] for one in single) / 7, rel=1e-3), name


@pytest.mark.parametrize(("kind", "what"), [*zip(KINDS, ("labels", "depth", "normals"), strict=True)])
def test_a_set_without_a_known_pixel_has_no_score(kind, what):
    metric, guess, truth = some(kind)
    nothing = torch.full_like(truth, VOID if kind == "segmentation" else 0)
    metric.update(guess, nothing)
    with pytest.raises(ValueError, match=f"no pixel was counted: the {what} of the whole set are void or un"):
        metric.compute()
    expected = scores_of(some(kind)[0], (guess, truth))
    assert scores_of(metric, (guess, truth)) == expected  # an image without any changes nothing


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_set_has_no_score(kind):
    with pytest.raises(ValueError, match=r"no pixel was counted: .* or it is empty"):
        some(kind)[0].compute()


@pytest.mark.parametrize("kind", KINDS)
def test_images_counted_once_give_the_scores_of_the_set(kind):
    metric, guess, truth = some(kind)
    expected = scores_of(some(kind)[0], (guess, truth))
    states = image_states(metric, guess, truth)
    assert all(len(rows) == 7 for rows in states.values())
    assert resampled(metric, states, torch.ones(7, dtype=torch.long)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_resampling_is_a_set_that_holds_its_images_so_often(kind):
    metric, guess, truth = some(kind)
    metric.update(guess, truth)
    states = image_states(metric, guess, truth)  # forgets what was added before
    times = torch.tensor([0, 3, 1, 0, 2, 1, 4])
    again = [i for i, count in enumerate(times.tolist()) for _ in range(count)]
    expected = scores_of(some(kind)[0], (guess[again], truth[again]))
    assert resampled(metric, states, times) == pytest.approx(expected, rel=1e-12)
    assert scores_of(metric, (guess[:1], truth[:1])) == scores_of(some(kind)[0], (guess[:1], truth[:1]))


# --- segmentation -------------------------------------------------------------------------------------------


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


def test_miou_agrees_with_torchmetrics_over_the_set_laid_out_as_one_image():
    g = torch.Generator().manual_seed(0)
    truth, guess = (torch.randint(0, 5, (7, 6, 6), generator=g) for _ in range(2))
    flat = mean_iou(guess.view(1, -1), truth.view(1, -1), num_classes=5, input_format="index")
    found = scores_of(SegmentationScores(5), (guess, truth))
    assert found["miou"] == pytest.approx(float(flat), rel=1e-6)
    assert found["pixel_acc"] == pytest.approx(float((guess == truth).double().mean()), rel=1e-6)


def test_class_iou_by_hand():
    """Rows are true: class 2 is only predicted, class 3 never met; neither has an IoU."""
    confusion = torch.tensor([[3, 1, 2, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = class_iou(confusion).tolist()
    assert found[:2] == pytest.approx([3 / 6, 4 / 5])
    assert math.isnan(found[2])
    assert math.isnan(found[3])


def test_class_iou_counts_pixels():
    metric, guess, truth = some("segmentation")
    metric.update(guess, truth)
    g, t = guess[truth != VOID], truth[truth != VOID]
    expected = [float(((g == c) & (t == c)).sum() / ((g == c) | (t == c)).sum()) for c in range(5)]
    assert class_iou(metric.confusion).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [5, -1, 254])
def test_a_label_outside_the_classes_is_not_counted(bad):
    truth = torch.tensor([[[0, bad], [VOID, 4]]])
    with pytest.raises(ValueError, match=rf"labels \[{bad}\] are outside 0..4 and not 255"):
        SegmentationScores(5).update(torch.zeros_like(truth), truth)


# --- depth --------------------------------------------------------------------------------------------------


def test_depth_errors_by_hand():
    batches = [([[[1.1, 4.0, 7.0]]], [[[1.0, 2.0, 0.0]]]), ([[[2.6]]], [[[2.0]]])]
    found = scores_of(DepthErrors(), *((torch.tensor(p), torch.tensor(t)) for p, t in batches))
    assert found == pytest.approx(
        {
            "abs_rel": (0.1 + 1.0 + 0.3) / 3,
            "sqr_rel": (0.01 + 2.0 + 0.18) / 3,
            "rmse": math.sqrt((0.01 + 4 + 0.36) / 3),
            "log10": (math.log10(1.1) + math.log10(2) + math.log10(1.3)) / 3,
            "delta1": 1 / 3,  # ratios 1.1, 2, 1.3 against 1.25, 1.5625, 1.953125
            "delta2": 2 / 3,
            "delta3": 2 / 3,
        },
        rel=1e-6,
    )


def test_depth_errors_by_loops():
    _, guess, truth = some("depth")
    pairs = [(d, t) for d, t in zip(guess.flatten().tolist(), truth.flatten().tolist(), strict=True) if t > 0]
    ratios = [max(d / t, t / d) for d, t in pairs]
    sums = {
        "abs_rel": sum(abs(d - t) / t for d, t in pairs),
        "sqr_rel": sum((d - t) ** 2 / t for d, t in pairs),
        "rmse": sum((d - t) ** 2 for d, t in pairs),
        "log10": sum(abs(math.log10(d) - math.log10(t)) for d, t in pairs),
        **{f"delta{k}": sum(r < 1.25**k for r in ratios) for k in (1, 2, 3)},
    }
    expected = {name: value / len(pairs) for name, value in sums.items()}
    expected["rmse"] = math.sqrt(expected["rmse"])
    assert scores_of(DepthErrors(), (guess, truth)) == pytest.approx(expected, rel=1e-9)


def test_depth_errors_weigh_pixels_not_images():
    """A batch of one pixel counts one pixel; the smaller of the two depths may be either."""
    far, near = torch.full((1, 3, 3), 2.0), torch.full((1, 3, 3), 1.0)
    found = scores_of(DepthErrors(), (near, far), (far[:, :1, :1], far[:, :1, :1]))
    assert found["abs_rel"] == pytest.approx(0.5 * 9 / 10)
    assert found["rmse"] == pytest.approx(math.sqrt(9 / 10))
    assert found["delta3"] == pytest.approx(1 / 10)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_ratio_of_exactly_a_threshold_is_not_within_it(k):
    """1.25, 1.5625 and 1.953125 are exact in floating point, from either side; a little less is within."""
    edge = 1.25**k
    for guess, truth in ((edge, 1.0), (1.0, edge)):
        found = scores_of(DepthErrors(), (torch.tensor([[[guess]]]), torch.tensor([[[truth]]])))
        assert [found[f"delta{i}"] for i in (1, 2, 3)] == [float(i > k) for i in (1, 2, 3)]
    below = scores_of(DepthErrors(), (torch.tensor([[[edge - 1e-6]]]), torch.ones(1, 1, 1)))
    assert below[f"delta{k}"] == 1


@pytest.mark.parametrize(
    ("size", "window"), [((480, 640), (45, 471, 41, 601)), ((240, 320), (22, 236, 20, 300))]
)
def test_the_eigen_crop(size, window):
    """Exactly the window is looked at: whatever is predicted around it could be no depth."""
    top, bottom, left, right = window
    truth, guess = torch.ones(1, *size), torch.full((1, *size), math.nan)
    guess[:, top:bottom, left:right] = 1.5
    metric = DepthErrors(crop="eigen")
    assert scores_of(metric, (guess, truth))["abs_rel"] == pytest.approx(0.5)
    assert int(metric.count) == (bottom - top) * (right - left)
    for edge, full in zip(window, (45, 471, 41, 601), strict=True):
        assert abs(edge - full * size[0] / 480) <= 0.5


def test_a_cap_leaves_out_far_truths_and_clamps_predictions():
    guess, truth = torch.tensor([[[100.0, 9.0, 1.0, -3.0]]]), torch.tensor([[[8.0, 10.0, 10.5, 1.0]]])
    metric = DepthErrors(cap=10.0)
    found = scores_of(metric, (guess, truth))
    assert int(metric.count) == 3  # 10 m itself counts, 10.5 m does not
    assert found["abs_rel"] == pytest.approx((2 / 8 + 1 / 10 + 0.999) / 3)
    assert found["rmse"] == pytest.approx(math.sqrt((4 + 1 + 0.999**2) / 3))


def test_by_default_nothing_is_cropped_or_capped():
    metric = DepthErrors()
    scores_of(metric, (torch.full((1, 48, 64), 90.0), torch.full((1, 48, 64), 100.0)))
    assert int(metric.count) == 48 * 64


@pytest.mark.parametrize("cap", [0.0, -1.0, math.nan])
def test_a_cap_that_is_none(cap):
    with pytest.raises(ValueError, match=f"cap must be metres above 0, or None, got {cap}"):
        DepthErrors(cap=cap)


def test_an_unknown_crop():
    with pytest.raises(ValueError, match="crop must be None or 'eigen', got 'garg'"):
        DepthErrors(crop="garg")


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_a_truth_that_is_no_depth(wrong):
    truth = torch.tensor([[[1.0, 0.0, wrong]]])
    with pytest.raises(ValueError, match=rf"metres from 0 \(unknown\) on, got 1 of 3 values such as {wrong}"):
        DepthErrors().update(torch.ones(1, 1, 3), truth)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0, 0.0])
def test_a_prediction_that_is_no_depth(wrong):
    guess = torch.tensor([[[1.0, 2.0, wrong]]])
    with pytest.raises(ValueError, match=r"must be positive and finite, got .*: clamp the"):
        DepthErrors().update(guess, torch.ones(1, 1, 3))
    metric = DepthErrors()  # where the truth is unknown, nobody looks
    assert scores_of(metric, (guess, torch.tensor([[[1.0, 1.0, 0.0]]])))["abs_rel"] == pytest.approx(0.5)


# --- normals ------------------------------------------------------------------------------------------------


def test_normal_errors_by_hand():
    angles = [0.0, 10.0, 12.0, 25.0, 90.0]
    guess = turned(angles) * torch.tensor([1.0, 2.0, 0.1, 30.0, 1.0])  # lengths do not count
    found = scores_of(NormalErrors(), (guess, towards(5)), (turned([180.0]), torch.zeros(1, 3, 1, 1)))
    assert found["angle_mean"] == pytest.approx(sum(angles) / 5, abs=1e-5)
    assert found["angle_median"] == pytest.approx(12, abs=0.03)
    assert [found[f"within_{t}"] for t in ("11_25", "22_5", "30")] == pytest.approx([2 / 5, 3 / 5, 4 / 5])


def test_normal_errors_agree_with_numpy():
    """Mean, median and shares of arccos over all known pixels, in NumPy."""
    _, guess, truth = some("normals", images=40)
    g, t = (m.double().numpy().transpose(0, 2, 3, 1).reshape(-1, 3) for m in (guess, truth))
    known = (t != 0).any(1)
    cosine = (g * t).sum(1)[known] / np.linalg.norm(g, axis=1)[known]
    angles = np.degrees(np.arccos(cosine.clip(-1, 1)))
    found = scores_of(NormalErrors(), (guess, truth))
    assert found["angle_mean"] == pytest.approx(angles.mean(), abs=1e-5)
    assert found["angle_median"] == pytest.approx(np.median(angles), abs=0.3)  # 700 angles over 180 degrees
    for name, limit in (("within_11_25", 11.25), ("within_22_5", 22.5), ("within_30", 30)):
        assert found[name] == pytest.approx((angles < limit).mean())


@pytest.mark.parametrize("spread", [1.0, 12.0, 50.0])
def test_the_median_is_that_of_all_pixels_of_the_set(spread):
    """Images of unlike size and difficulty: within 0.03° of NumPy's median, far from a mean of medians."""
    generator = np.random.default_rng(0)
    images = [generator.gamma(2, spread * s, n).clip(max=179) for s, n in ((0.1, 400), (1, 9000), (0.3, 700))]
    found = scores_of(NormalErrors(), *((turned(a), towards(len(a))) for a in images))
    assert found["angle_median"] == pytest.approx(np.median(np.concatenate(images)), abs=0.03)
    assert abs(found["angle_median"] - np.mean([np.median(a) for a in images])) > 0.1


def test_the_median_within_one_bin():
    """All angles alike: the middle of their bin of 0.05 degrees, whatever their number."""
    for count in (1, 2, 3, 1000):
        found = scores_of(NormalErrors(), (turned([33.33] * count), towards(count)))
        assert found["angle_median"] == pytest.approx(33.325, abs=1e-4)


def test_an_angle_of_exactly_a_threshold_is_not_within_it(monkeypatch):
    """11.25, 22.5 and 30 degrees have no exact vectors in floating point; 45, 90 and 180 have."""
    monkeypatch.setattr(NormalErrors, "thresholds", (45.0, 90.0, 180.0))
    guess = fields([(1, 0, -1), (1, 0, 0), (0, 0, 1)])
    found = scores_of(NormalErrors(), (guess, towards(3)))
    assert [found[f"within_{t}"] for t in ("11_25", "22_5", "30")] == pytest.approx([0, 1 / 3, 2 / 3])


def test_shares_count_what_is_below_11_22_and_30_degrees():
    found = scores_of(NormalErrors(), (turned([11.24, 11.26, 22.49, 22.51, 29.99, 30.01]), towards(6)))
    assert [found[f"within_{t}"] for t in ("11_25", "22_5", "30")] == pytest.approx([1 / 6, 3 / 6, 5 / 6])


@pytest.mark.parametrize("angle", [0.0, 1e-4, 1e-3, 0.02, 179.98, 179.999, 180.0])
def test_angles_near_0_and_180_degrees_are_not_rounded_away(angle):
    """A unit vector in float32 is not quite of length 1: an arc cosine would be off by 0.02 degrees."""
    for direction in np.random.default_rng(0).normal(size=(20, 3)):
        truth = fields([direction / np.linalg.norm(direction)])
        u = truth[0, :, 0, 0].double().numpy()
        across = np.cross(u, (0.3, -0.5, 0.8))
        across *= np.linalg.norm(u) / np.linalg.norm(across)
        guess = fields([np.cos(np.radians(angle)) * u + np.sin(np.radians(angle)) * across])
        assert scores_of(NormalErrors(), (guess, truth))["angle_mean"] == pytest.approx(angle, abs=1e-5)


@pytest.mark.parametrize("wrong", [0.0, math.nan, math.inf])
def test_a_prediction_without_direction(wrong):
    """A network that says 0 everywhere must not be right everywhere."""
    guess = towards(3)
    guess[0, :, 0, 1] = wrong
    with pytest.raises(ValueError, match=r"predicted normals must be finite and not 0, got lengths from "):
        NormalErrors().update(guess, towards(3))
    unknown = towards(3)
    unknown[0, :, 0, 1] = 0
    assert scores_of(NormalErrors(), (guess, unknown))["angle_mean"] == 0


@pytest.mark.parametrize("length", [0.5, 2.0, math.nan])
def test_a_truth_that_is_not_of_length_1(length):
    with pytest.raises(ValueError, match=rf"normals must have length 1.* lengths like {length:.3g}"):
        NormalErrors().update(towards(2), towards(2) * length)
