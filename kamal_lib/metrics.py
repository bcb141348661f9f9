"""What the papers' tables report, as torchmetrics: right over unequal batches and several processes.

Each compute() returns {name: value}. Both count over the whole set: every pixel weighs the same.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from kamal_lib.sample import VOID


class SegmentationScores(Metric):
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
        """Adds class ids predicted and true; `VOID` in the target is not counted."""
        self.confusion += multiclass_confusion_matrix(
            prediction, target, self.classes, ignore_index=VOID, validate_args=False
        )

    def compute(self) -> dict[str, Tensor]:
        """{"miou", "pixel_acc"}; NaN where no pixel was labelled."""
        confusion = self.confusion.double()
        hits, truth = confusion.diag(), confusion.sum(1)
        union = truth + confusion.sum(0) - hits
        return {
            "miou": (hits / union)[truth > 0].mean(),
            "pixel_acc": hits.sum() / confusion.sum(),
        }


class DepthErrors(Metric):
    """abs rel |d − d*|/d*, sqr rel (d − d*)²/d* in metres, and δ^k, the share with max(d/d*, d*/d) < 1.25^k.

    Over all valid pixels of the set (target > 0), whole image, no cap.
    """

    higher_is_better = False
    sums: Tensor
    count: Tensor
    names = ("abs_rel", "sqr_rel", "delta1", "delta2", "delta3")

    def __init__(self):
        super().__init__()
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self, prediction: Float[Tensor, "batch height width"], target: Float[Tensor, "batch height width"]
    ) -> None:
        """Adds depths in metres, predicted and true; a target of 0 is not counted."""
        valid = target > 0
        d, truth = prediction[valid].double(), target[valid].double()
        difference = (d - truth).abs()
        ratio = torch.maximum(d / truth, truth / d)
        rows = [difference / truth, difference**2 / truth, *(ratio < 1.25**k for k in (1, 2, 3))]
        self.sums += torch.stack([row.double().sum() for row in rows])
        self.count += valid.sum()

    def compute(self) -> dict[str, Tensor]:
        """{"abs_rel", "sqr_rel", "delta1", "delta2", "delta3"}; NaN where no pixel was valid."""
        return dict(zip(self.names, self.sums / self.count, strict=True))
