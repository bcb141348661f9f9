"""Transforms that move image, labels, depth, normals and boxes together.

Built on `torchvision.transforms.v2`. Importing this module teaches its operations what to do with the two
tensor types of our own, `Depth` and `Normals`:

- horizontal flip: mirrors both and negates n_x;
- crop: cuts both; outside the picture they are unknown (0);
- resize: takes the nearest pixel, so that unknown (0) never mixes with known; metres and directions stay;
- colour operations leave both alone.

Every other geometric operation is refused: by itself v2 would hand depth and normals through unmoved, and
say nothing. (v2's AutoAugment family knows masks and boxes, which it refuses, but not these two types: do
not use it.) A zoom has its own rule, see `RandomScaleCrop`.
"""

import hashlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from kamal_lib.sample import Depth, Normals, Sample

Transform = Callable[[Sample], Sample]

# fmt: off
_REFUSED = (
    "affine", "center_crop", "elastic", "five_crop", "pad", "perspective", "resized_crop", "rotate",
    "ten_crop", "vertical_flip",
)
# fmt: on


class RandomScaleCrop(nn.Module):
    """Cut a random window, 1/s of the picture high and wide, and resize it to `size`: a zoom by s.

    s is uniform in `scale` and the place of the window is uniform; with the default scale the whole picture
    is kept. The window has whole pixels, and s is what its height makes of it. Images are averaged
    (bilinear, antialiased); labels, depth and normals take the nearest pixel centre. Boxes are cut at the
    window, and those with less than a pixel left are dropped with their label.

    The rule for depth is that of Eigen et al. (NeurIPS 2014, section 3.4): the camera stays the same, so the
    scene has come closer and **depth is divided by s**. A point (X, Y, Z) then stands at (X, Y, Z / s), and
    its normal becomes (n_x, n_y, s n_z), normalised again. The shift of the window is not accounted for.
    """

    def __init__(self, size: tuple[int, int], *, scale: tuple[float, float] = (1.0, 1.0)) -> None:
        """`size` is (height, width) of the result in pixels. Raises ValueError unless 1 <= low <= high."""
        super().__init__()
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"expected `size` to be (height, width) of at least 1 pixel, but got {size}")
        if not 1.0 <= scale[0] <= scale[1]:
            raise ValueError(f"expected `scale` to be (low, high) with 1 <= low <= high, but got {scale}")
        self.size, self.scale = size, scale

    def forward(self, sample: Sample) -> Sample:
        """Return the sample at the new size; the entries given are not changed."""
        if "image" not in sample:
            raise ValueError(f"expected a sample with an image, but got the keys {sorted(sample)}")
        height, width = sample["image"].shape[-2:]
        low, high = self.scale
        if high == 1 and (height, width) == self.size:
            return sample
        window, top, left = (height, width), 0, 0
        if high > 1:
            zoom = torch.empty(()).uniform_(low, high).item()
            window = max(1, round(height / zoom)), max(1, round(width / zoom))
            top = int(torch.randint(height - window[0] + 1, ()))
            left = int(torch.randint(width - window[1] + 1, ()))
        zoom = height / window[0]

        moved: dict[str, Any] = dict(sample)
        for key, entry in moved.items():
            if isinstance(entry, tv_tensors.TVTensor):
                moved[key] = _resize(F.crop(entry, top, left, *window), list(self.size))
        if "depth" in moved:
            moved["depth"] = Depth(moved["depth"] / zoom)
        if "normals" in moved and zoom > 1:
            tilted = moved["normals"] * torch.tensor([1.0, 1.0, zoom]).view(3, 1, 1)
            # a norm over so short an axis takes five times as long
            moved["normals"] = Normals(tilted * tilted.square().sum(0).clamp_min(1e-12).rsqrt())
        if "boxes" in moved:
            moved["boxes"], kept = F.sanitize_bounding_boxes(moved["boxes"])
            moved["box_labels"] = moved["box_labels"][kept]
        return cast(Sample, moved)


def train_transform(
    size: tuple[int, int], *, scale: tuple[float, float] = (1.0, 1.0), flip: float = 0.5
) -> Transform:
    """Random zoom to `size` (height, width), then a horizontal flip with probability `flip`."""
    return v2.Compose([RandomScaleCrop(size, scale=scale), v2.RandomHorizontalFlip(flip)])


def eval_transform(size: tuple[int, int]) -> Transform:
    """The whole picture at `size` (height, width): no draw, and metres and directions as they were."""
    return RandomScaleCrop(size)


def seeded(transform: Transform, sample: Sample, *, seed: int, epoch: int, index: int) -> Sample:
    """Apply a transform whose draws are a function of (seed, epoch, index) only.

    Covers draws from torch's global CPU generator, which is what v2 uses; it is left as it was found.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the accelerators too, for good, and takes 0.2 ms
        torch.default_generator.manual_seed(stream(seed, epoch, index))
        return transform(sample)


def stream(*numbers: int) -> int:
    """A 63-bit seed that mixes the given integers; the same on every machine and in every version."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _resize(entry: Tensor, size: list[int]) -> Tensor:
    # v2's nearest pixel of a mask lies up to half an output pixel up and left of where the image is read
    if isinstance(entry, tv_tensors.Mask):
        return _resize_nearest(entry, size)
    return F.resize(entry, size, antialias=True)


def _resize_nearest(
    entry: Tensor, size: list[int] | None, *_: object, max_size: int | None = None, **__: object
) -> Tensor:
    plain = entry.as_subclass(Tensor).reshape(-1, *entry.shape[-2:])
    nearest = v2.InterpolationMode.NEAREST_EXACT
    plain = F.resize_image(plain, size, interpolation=nearest, max_size=max_size)
    return plain.reshape(*entry.shape[:-2], *plain.shape[-2:]).as_subclass(type(entry))


def _crop(entry: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    return F.crop_mask(entry.as_subclass(Tensor), top, left, height, width).as_subclass(type(entry))


def _flip_depth(depth: Tensor) -> Tensor:
    return depth.as_subclass(Tensor).flip(-1).as_subclass(Depth)


def _flip_normals(normals: Tensor) -> Tensor:
    flipped = normals.as_subclass(Tensor).flip(-1)
    flipped[..., 0, :, :].neg_()
    return flipped.as_subclass(Normals)


def _refusal(name: str) -> Callable[..., Tensor]:
    def refuse(entry: Tensor, *_: object, **__: object) -> Tensor:
        raise TypeError(
            f"`{name}` has no rule for {type(entry).__name__}: expected a horizontal flip, a crop, a resize "
            "or RandomScaleCrop. Leave the entry out, or state the rule in kamal_lib.data.transforms"
        )

    return refuse


F.register_kernel(F.horizontal_flip, Depth)(_flip_depth)
F.register_kernel(F.horizontal_flip, Normals)(_flip_normals)
for _kind in (Depth, Normals):
    F.register_kernel(F.crop, _kind)(_crop)
    F.register_kernel(F.resize, _kind)(_resize_nearest)
    for _name in _REFUSED:
        F.register_kernel(_name, _kind)(_refusal(_name))
