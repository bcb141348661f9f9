"""Unlabelled images with the teachers' predictions in the place of labels: what a student learns from."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from kamal_lib.sample import Depth, Normals, Sample

WRAPPERS = {
    "labels": lambda t: tv_tensors.Mask(t.long()),
    "probabilities": lambda t: tv_tensors.Mask(t.float()),
    "depth": Depth,
    "normals": Normals,
}


class WithTargets(Dataset[Sample]):
    """The images of `images`, and nothing else of theirs, with `targets[key][i]` as the target of image i.

    `targets` maps a sample's key ("labels": N×H×W class ids, "probabilities": N×classes×H×W, "depth":
    N×H×W metres, "normals": N×3×H×W) to the stored predictions. Whatever the data set knows of its images
    beside the pixels is left out, so no label can slip in. Raises ValueError where the numbers of images and
    predictions differ.
    """

    def __init__(self, images: Dataset[Sample], targets: Mapping[str, Tensor]):
        count = len(images)  # pyright: ignore[reportArgumentType]
        if wrong := {key: len(t) for key, t in targets.items() if len(t) != count}:
            raise ValueError(
                f"{count} images, but predictions for {wrong}: predict the same part of the same data first"
            )
        self.images, self.targets = images, dict(targets)

    def __len__(self) -> int:
        return len(self.images)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Sample:
        sample: dict[str, Any] = {"image": cast(dict[str, Any], self.images[index])["image"]}
        sample |= {key: WRAPPERS[key](stored[index]) for key, stored in self.targets.items()}
        return cast(Sample, sample)
