"""What the papers' tables report, as torchmetrics: right over unequal batches and several processes.

Each compute() returns {name: value}, over the whole set: every counted pixel weighs the same. Where no pixel
was counted, it raises ValueError: an empty or all-void set has no score.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from kamal_lib.sample import VOID, known_depth, known_labels, known_normals


class SetMetric(Metric):
    """A metric whose states are sums over the set, and whose scores are a function of these sums alone."""

    full_state_update = False

    def scores(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{name: value} of a set with these sums."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        """{name: value} of everything that was added."""
        return self.scores(self.metric_state)  # pyright: ignore[reportArgumentType]: ours are tensors


class SegmentationScores(SetMetric):
    """Mean intersection over union and pixel accuracy, fractions, from one confusion matrix of the whole set.

    Void pixels are ignored. Classes that never occur in the ground truth are left out of the mean, even where
    they are predicted (the misplaced pixels then count against the classes they belong to).
    """

    higher_is_better = True
    confusion: Tensor

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes
        self.add_state("confusion", torch.zeros(classes, classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, prediction: Int[Tensor, "batch height width"], target: Int[Tensor, "batch height width"]
    ) -> None:
        """Adds class ids predicted and true; `VOID` in the target is not counted.

        Raises ValueError for a true label that is neither a class nor `VOID`.
        """
        known_labels(target, self.classes)
        self.confusion += multiclass_confusion_matrix(
            prediction, target, self.classes, ignore_index=VOID, validate_args=False
        )

    def scores(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"miou", "pixel_acc"}."""
        confusion = states["confusion"]
        count = counted(confusion.sum(), "labels")
        return {"miou": class_iou(confusion).nanmean(), "pixel_acc": confusion.diag().sum() / count}


def class_iou(confusion: Shaped[Tensor, "classes classes"]) -> Float[Tensor, " classes"]:
    """IoU of each class (rows true, columns predicted); NaN for one that never occurs in the ground truth."""
    hits, truth = confusion.diag().double(), confusion.sum(1)
    return torch.where(truth > 0, hits / (truth + confusion.sum(0) - hits), torch.nan)


EIGEN_CROP = (45 / 480, 471 / 480, 41 / 640, 601 / 640)
"""Top, bottom, left and right of the pixels that Eigen et al. (NeurIPS 2014) count on NYUDv2, as shares."""


class DepthErrors(SetMetric):
    """The errors of depth d against the truth d*, over all valid pixels (d* > 0) of the set.

    abs rel |d − d*|/d* · sqr rel (d − d*)²/d*, metres · rmse, metres · log10 |log10 d − log10 d*| · δ^k, the
    share with max(d/d*, d*/d) < 1.25^k.

    By default the whole image counts, uncapped (Ye et al. state no protocol). `crop="eigen"` counts the
    window of Eigen et al. only, for whole frames of 4:3; our NYUDv2 loader cuts the white border, nearly that
    window, by itself. `cap`, metres, leaves out truths beyond it and clamps predictions to 1 mm .. cap.
    """

    higher_is_better = False
    sums: Tensor
    count: Tensor
    names = ("abs_rel", "sqr_rel", "rmse", "log10", "delta1", "delta2", "delta3")

    def __init__(self, *, crop: str | None = None, cap: float | None = None):
        super().__init__()
        if crop not in (None, "eigen"):
            raise ValueError(f"crop must be None or 'eigen', got {crop!r}")
        if cap is not None and not cap > 0:
            raise ValueError(f"cap must be metres above 0, or None, got {cap}")
        self.crop, self.cap = crop, cap
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, prediction: Float[Tensor, "batch height width"], target: Float[Tensor, "batch height width"]
    ) -> None:
        """Adds depths in metres, predicted and true; a target of 0 is not counted.

        Raises ValueError for a prediction that is not positive and finite, and for a truth that is no depth.
        """
        if self.crop:
            height, width = target.shape[-2:]
            top, bottom, left, right = EIGEN_CROP
            window = slice(round(top * height), round(bottom * height))
            prediction, target = (
                m[:, window, round(left * width) : round(right * width)] for m in (prediction, target)
            )
        valid = known_depth(target)
        if self.cap is not None:
            prediction, valid = prediction.clamp(1e-3, self.cap), valid & (target <= self.cap)
        d, truth = prediction[valid].double(), target[valid].double()
        if not bool(((d > 0) & (d < torch.inf)).all()):
            raise ValueError(
                f"predicted depths must be positive and finite, got {float(d.min())} to {float(d.max())} m: "
                "clamp the prediction, or give a cap"
            )
        difference = (d - truth).abs()
        ratio = torch.maximum(d / truth, truth / d)
        rows = [
            difference / truth,
            difference**2 / truth,
            difference**2,
            (d / truth).log10().abs(),
            *(ratio < 1.25**k for k in (1, 2, 3)),
        ]
        self.sums += torch.stack([row.double().sum() for row in rows])
        self.count += valid.sum()

    def scores(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"abs_rel", "sqr_rel", "rmse", "log10", "delta1", "delta2", "delta3"}."""
        found = dict(zip(self.names, states["sums"] / counted(states["count"], "depth"), strict=True))
        return found | {"rmse": found["rmse"].sqrt()}


class NormalErrors(SetMetric):
    """Angles between predicted and true normals, over all pixels of known normal: mean, median, shares.

    The median is that of all pixels of the set, not a mean of medians: angles are counted in bins of 0.05
    degrees, which several processes can add up, and the median is interpolated within its bin (of an even
    number of angles, that of the lower middle one).
    """

    higher_is_better = False
    histogram: Tensor
    sums: Tensor
    thresholds = (11.25, 22.5, 30.0)
    bins = 3600

    def __init__(self):
        super().__init__()
        self.add_state("histogram", torch.zeros(self.bins, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, prediction: Float[Tensor, "batch 3 height width"], target: Float[Tensor, "batch 3 height width"]
    ) -> None:
        """Adds normals predicted, of any length, and true; a target of 0 is not counted.

        Raises ValueError for a prediction that is 0 or not finite, and for a truth that is neither 0 nor of
        length 1.
        """
        valid = known_normals(target)
        a, b = (m.movedim(1, -1)[valid].double() for m in (prediction, target))
        length = a.norm(dim=-1)
        if not bool(((length > 0) & (length < torch.inf)).all()):
            raise ValueError(
                f"predicted normals must be finite and not 0, got lengths from {float(length.min())} to "
                f"{float(length.max())}: 0 has no direction; leave such pixels out by a target of 0"
            )
        # arccos of a rounded cosine is off by 0.02° near 0°
        angle = torch.rad2deg(torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1)))
        shares = [(angle < t).double().sum() for t in self.thresholds]
        self.sums += torch.stack([angle.sum(), *shares])
        place = (angle * (self.bins / 180)).long().clamp(max=self.bins - 1)
        self.histogram += torch.bincount(place, minlength=self.bins)

    def scores(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{"angle_mean", "angle_median"} in degrees, shares "within_11_25", "within_22_5", "within_30"."""
        histogram = states["histogram"]
        count = counted(histogram.sum(), "normals")
        below = histogram.cumsum(0)
        middle = int((2 * below >= count).nonzero()[0])
        inside = histogram[middle]
        median = (middle + (count / 2 - (below[middle] - inside)) / inside) * (180 / self.bins)
        mean, *shares = states["sums"] / count
        names = ("within_11_25", "within_22_5", "within_30")
        return {"angle_mean": mean, "angle_median": median} | dict(zip(names, shares, strict=True))


def counted(count: Shaped[Tensor, ""], what: str) -> Shaped[Tensor, ""]:
    """The count, which must not be 0. Raises ValueError."""
    if not count:
        raise ValueError(
            f"no pixel was counted: the {what} of the whole set are void or unknown, or it is empty"
        )
    return count


def image_states(
    metric: SetMetric, predictions: Shaped[Tensor, "batch ..."], targets: Shaped[Tensor, "batch ..."]
) -> dict[str, Tensor]:
    """What the metric adds up, image by image: {state: batch × its shape}. The metric is reset."""
    rows: list[dict[str, Tensor]] = []
    for prediction, target in zip(predictions.split(1), targets.split(1), strict=True):
        metric.reset()
        metric.update(prediction, target)
        rows.append(dict(metric.metric_state))  # pyright: ignore[reportArgumentType]: ours are tensors
    metric.reset()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def resampled(
    metric: SetMetric, states: Mapping[str, Tensor], times: Int[Tensor, " images"]
) -> dict[str, float]:
    """The scores of the set in which image i occurs times[i] times, from `image_states`.

    So a bootstrap over images needs no second forward pass.
    """
    totals = {name: torch.tensordot(times.to(rows.dtype), rows, dims=1) for name, rows in states.items()}
    return {name: float(value) for name, value in metric.scores(totals).items()}


def inherited_errors(
    student: Int[Tensor, "batch height width"],
    teacher: Int[Tensor, "batch height width"],
    target: Int[Tensor, "batch height width"],
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """(pixels where the student makes its teacher's mistake, pixels where it is wrong), of each image.

    The same mistake is the same wrong class. Two networks that learned apart share mistakes, too: compare
    with one of them.
    """
    wrong = known_labels(target, VOID) & (student != target)
    return (wrong & (student == teacher)).sum((1, 2)), wrong.sum((1, 2))
