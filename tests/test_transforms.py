"""The joint transforms: against slow explicit versions, PIL and the geometry of a pin-hole camera."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import _utils as v2_registry

from kamal_lib.data.transforms import RandomScaleCrop, eval_transform, seeded, stream, train_transform
from kamal_lib.sample import VOID, Depth, Normals, Sample


def random_sample(height: int, width: int, *, seed: int = 0) -> Sample:
    """Every entry of the contract, independent random values, a third of the depth unknown."""
    generator = torch.Generator().manual_seed(seed)
    unknown = torch.rand(height, width, generator=generator) < 0.3
    labels = torch.randint(13, (height, width), generator=generator)
    normals = torch.nn.functional.normalize(torch.randn(3, height, width, generator=generator), dim=0)
    boxes = torch.tensor([[1, 2, 9, 8], [0, 0, width, height]], dtype=torch.float32)
    return Sample(
        image=tv_tensors.Image(torch.rand(3, height, width, generator=generator)),
        labels=tv_tensors.Mask(labels.masked_fill(unknown, VOID)),
        depth=Depth((1 + 8 * torch.rand(height, width, generator=generator)).masked_fill(unknown, 0)),
        normals=Normals(normals.masked_fill(unknown, 0)),
        boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),  # pyright: ignore
        box_labels=torch.tensor([3, 8]),
    )


def back_projected(depth: Tensor, focal: float) -> Tensor:
    """Points (X, Y, Z) of a pin-hole camera with a central principal point, 3×H×W, in float64."""
    height, width = depth.shape
    v, u = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) - (height - 1) / 2,
        torch.arange(width, dtype=torch.float64) - (width - 1) / 2,
        indexing="ij",
    )
    z = depth.as_subclass(Tensor).double()
    return torch.stack([u / focal * z, v / focal * z, z])


def normals_from(depth: Tensor, focal: float) -> Tensor:
    """Normals of the inner pixels by the cross product of central differences."""
    points = back_projected(depth, focal)
    across = (points[:, :, 2:] - points[:, :, :-2])[:, 1:-1]
    down = (points[:, 2:] - points[:, :-2])[:, :, 1:-1]
    return torch.nn.functional.normalize(torch.linalg.cross(down, across, dim=0), dim=0)


def same(one: Sample, other: Sample) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_flipping_twice_changes_nothing_and_once_changes_everything() -> None:
    sample = random_sample(12, 16)
    flip = v2.RandomHorizontalFlip(1.0)
    once = flip(sample)
    assert {key: type(entry) for key, entry in once.items()} == {k: type(e) for k, e in sample.items()}
    for key in ("image", "labels", "depth", "normals", "boxes"):
        assert not torch.equal(once[key], sample[key])
    assert same(flip(once), sample)


def test_flipping_commutes_with_computing_normals() -> None:
    v, u = torch.meshgrid(torch.arange(20.0), torch.arange(28.0), indexing="ij")
    depth = Depth(3 + 0.05 * u - 0.02 * v + 0.3 * torch.sin(u / 4))
    normals = Normals(normals_from(depth, 30.0).float())
    assert normals[2].max() < 0  # the surface faces the camera
    flip = v2.RandomHorizontalFlip(1.0)
    torch.testing.assert_close(
        flip(normals).as_subclass(Tensor), normals_from(flip(depth), 30.0).float(), atol=1e-6, rtol=0
    )


def test_zoom_keeps_a_plane_a_plane_with_its_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as near and cut from the middle: seen by the same camera, normals fit the depth again."""
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor((high - 1) // 2))
    height, width, focal = 40, 56, 60.0
    normal = torch.nn.functional.normalize(torch.tensor([0.5, -0.3, -0.8]), dim=0)
    rays = back_projected(torch.ones(height, width), focal)
    depth = (-3.0 / (normal.double()[:, None, None] * rays).sum(0)).float()
    sample = Sample(
        image=tv_tensors.Image(torch.zeros(3, height, width)),
        depth=Depth(depth),
        normals=Normals(normal[:, None, None].expand(3, height, width).clone()),
    )
    zoomed = RandomScaleCrop((20, 28), scale=(2.0, 2.0))(sample)
    torch.testing.assert_close(zoomed["depth"].as_subclass(Tensor), depth[10:30, 14:42] / 2)
    expected = normals_from(zoomed["depth"], focal / 2)  # this camera at half the pixels
    torch.testing.assert_close(
        zoomed["normals"].as_subclass(Tensor)[:, 1:-1, 1:-1].double(), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(("size", "zoom"), [((12, 16), 1.5), ((30, 44), 1.3), ((7, 9), 2.1), ((24, 32), 1.0)])
def test_zoom_agrees_with_a_slow_version(
    size: tuple[int, int], zoom: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    height, width = 24, 32
    sample = random_sample(height, width)
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(high // 3))
    result = RandomScaleCrop(size, scale=(zoom, zoom))(sample)

    rows, columns = round(height / zoom), round(width / zoom)
    top, left = (height - rows + 1) // 3, (width - columns + 1) // 3
    labels, depth = torch.zeros(size, dtype=torch.int64), torch.zeros(size)
    normals = torch.zeros(3, *size)
    for i in range(size[0]):
        for j in range(size[1]):
            y = top + math.floor((i + 0.5) * rows / size[0])
            x = left + math.floor((j + 0.5) * columns / size[1])
            labels[i, j] = sample["labels"][y, x]
            depth[i, j] = sample["depth"][y, x] * rows / height
            n = sample["normals"][:, y, x] * torch.tensor([1, 1, height / rows])
            normals[:, i, j] = n / n.norm() if n.norm() > 0 else n
    assert torch.equal(result["labels"].as_subclass(Tensor), labels)
    torch.testing.assert_close(result["depth"].as_subclass(Tensor), depth)
    torch.testing.assert_close(result["normals"].as_subclass(Tensor), normals)
    for channel, got in zip(sample["image"].numpy(), result["image"].numpy(), strict=True):
        window = Image.fromarray(channel[top : top + rows, left : left + columns])
        expected = np.asarray(window.resize(size[::-1], Image.Resampling.BILINEAR))
        np.testing.assert_allclose(got, expected, atol=1e-5)

    box = torch.tensor([1, 2, 9, 8]) - torch.tensor([left, top, left, top])
    box = box.clamp(min=torch.zeros(4), max=torch.tensor([columns, rows, columns, rows]))
    box = box * torch.tensor([size[1] / columns, size[0] / rows]).repeat(2)
    whole = torch.tensor([0.0, 0, size[1], size[0]])
    torch.testing.assert_close(result["boxes"].as_subclass(Tensor), torch.stack([box, whole]))
    assert result["box_labels"].tolist() == [3, 8]


def test_box_outside_the_window_goes_with_its_label(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = random_sample(24, 32)
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(high - 1))
    result = RandomScaleCrop((12, 16), scale=(2.0, 2.0))(sample)
    assert result["box_labels"].tolist() == [8]
    assert result["boxes"].tolist() == [[0, 0, 16, 12]]


def test_random_zooms_have_one_size_and_invent_no_value() -> None:
    sample = random_sample(24, 32)
    transform = RandomScaleCrop((18, 20), scale=(1.0, 1.5))
    farthest = set()
    for index in range(20):
        result = seeded(transform, sample, seed=0, epoch=0, index=index)
        assert all(result[key].shape[-2:] == (18, 20) for key in ("image", "labels", "depth", "normals"))
        assert set(result["labels"].unique().tolist()) <= set(sample["labels"].unique().tolist())
        known = result["depth"] > 0
        assert torch.equal(known, result["labels"] != VOID)  # both unknown in the same pixels, here
        lengths = result["normals"].norm(dim=0)
        torch.testing.assert_close(lengths, known.float())
        farthest.add(result["depth"].max().item())
    assert len(farthest) > 5  # it does draw


def test_evaluation_keeps_the_whole_picture_and_draws_nothing() -> None:
    sample = random_sample(24, 32)
    state = torch.get_rng_state()
    half = eval_transform((12, 16))(sample)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(half["depth"].as_subclass(Tensor), sample["depth"][1::2, 1::2])
    torch.testing.assert_close(half["normals"].as_subclass(Tensor), sample["normals"][:, 1::2, 1::2])
    assert half["boxes"].tolist() == [[0.5, 1, 4.5, 4], [0, 0, 16, 12]]
    assert eval_transform((24, 32))(sample) is sample


@pytest.mark.parametrize(
    "operation",
    [
        v2.RandomRotation(10),
        v2.RandomVerticalFlip(1.0),
        v2.RandomAffine(5),
        v2.RandomPerspective(p=1.0),
        v2.ElasticTransform(),
        v2.CenterCrop(8),
        v2.Pad(2),
        v2.RandomResizedCrop((8, 8)),
        v2.FiveCrop(8),
        v2.TenCrop(8),
    ],
)
@pytest.mark.parametrize("key", ["depth", "normals"])
def test_operations_without_a_rule_are_refused(operation: v2.Transform, key: str) -> None:
    sample = random_sample(48, 48)
    with pytest.raises(TypeError, match=f"no rule for {key.capitalize()}.*expected a horizontal flip"):
        operation({"image": sample["image"], key: sample[key]})


def test_torchvision_has_no_geometric_operation_unknown_here() -> None:
    """What moves masks, boxes or key points moves pixels: each has a rule or a refusal, new ones too."""
    moved = {tv_tensors.Mask, tv_tensors.BoundingBoxes, tv_tensors.KeyPoints}
    geometric = {
        functional.__name__
        for functional, kernels in v2_registry._KERNEL_REGISTRY.items()
        if moved & kernels.keys() or functional.__name__ in ("five_crop", "ten_crop")
    } - {"get_size", "to_dtype"}
    assert {"horizontal_flip", "rotate", "resize", "elastic", "perspective"} <= geometric
    known = {
        functional.__name__
        for functional, kernels in v2_registry._KERNEL_REGISTRY.items()
        if {Depth, Normals} <= kernels.keys()
    }
    assert known == geometric
    spelt_out = {  # the same by the names of the kernels that torchvision exports
        name.removesuffix(kind)
        for name in dir(v2.functional)
        for kind in ("_mask", "_keypoints", "_bounding_boxes")
        if name.endswith(kind) and not name.startswith(("get_size", "sanitize", "clamp", "convert"))
    }
    assert spelt_out <= known


def test_a_flip_turns_normals_sideways_and_keeps_metres() -> None:
    normals = Normals(torch.tensor([[[0.6, 0.0]], [[0.0, 0.8]], [[-0.8, -0.6]]]))
    for flipped in (v2.functional.horizontal_flip(normals), v2.functional.hflip(normals)):
        assert isinstance(flipped, Normals)
        assert flipped.tolist() == torch.tensor([[[0, -0.6]], [[0.8, 0]], [[-0.6, -0.8]]]).tolist()
    assert normals[0, 0, 0] == torch.tensor(0.6)  # what was given stays as it was
    depth = v2.functional.horizontal_flip(Depth(torch.tensor([[1.0, 2.0, 0.0]])))
    assert isinstance(depth, Depth)
    assert depth.tolist() == [[0, 2, 1]]


@pytest.mark.parametrize(
    "operation",
    [
        v2.ColorJitter(brightness=0.5, hue=0.2),
        v2.Normalize([0.5] * 3, [0.2] * 3),
        v2.GaussianBlur(3),
        v2.ToDtype(torch.float64, scale=True),
    ],
)
def test_colour_operations_touch_the_image_only(operation: v2.Transform) -> None:
    sample = random_sample(16, 16)
    result = operation(sample)
    assert result["image"].dtype == torch.float64 or not torch.equal(result["image"], sample["image"])
    assert all(torch.equal(result[key], sample[key]) for key in sample if key != "image")
    assert all(result[key].dtype == sample[key].dtype for key in sample if key != "image")


def test_torchvision_crop_and_resize_know_depth_and_normals() -> None:
    sample = random_sample(24, 32)
    result = v2.Compose([v2.RandomCrop((12, 20)), v2.Resize(6, max_size=9)])(sample)
    assert {entry.shape[-2:] for key, entry in result.items() if "box" not in key} == {(5, 9)}
    assert set(result["depth"].flatten().tolist()) <= set(sample["depth"].flatten().tolist())
    outside = v2.functional.crop(sample["depth"], -2, 0, 4, 4)
    assert isinstance(outside, Depth)
    assert outside[:2].abs().sum() == 0
    assert torch.equal(outside[2:], sample["depth"][:2, :4])


def test_seeded_depends_on_seed_epoch_and_index_only() -> None:
    sample = random_sample(24, 32)
    transform = train_transform((12, 16), scale=(1.0, 1.5))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = seeded(transform, sample, seed=3, epoch=1, index=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(seeded(transform, sample, seed=3, epoch=1, index=4), first)
    for seed, epoch, index in [(4, 1, 4), (3, 2, 4), (3, 1, 5), (1, 3, 4)]:
        assert not same(seeded(transform, sample, seed=seed, epoch=epoch, index=index), first)


def test_flips_are_fair_and_streams_distinct() -> None:
    sample = random_sample(4, 4)
    flip = train_transform((4, 4), flip=0.3)
    count = sum(
        not torch.equal(seeded(flip, sample, seed=0, epoch=e, index=i)["image"], sample["image"])
        for e in range(20)
        for i in range(50)
    )
    assert 250 < count < 350  # 3.4 standard deviations
    numbers = {stream(s, e, i) for s in range(10) for e in range(10) for i in range(100)}
    assert len(numbers) == 10_000
    assert all(0 <= number < 2**63 for number in numbers)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"expected `size`.*got \(0, 4\)"):
        RandomScaleCrop((0, 4))
    for scale in [(0.9, 1.0), (1.5, 1.2)]:
        with pytest.raises(ValueError, match=r"expected `scale`.*1 <= low <= high"):
            RandomScaleCrop((4, 4), scale=scale)
    with pytest.raises(ValueError, match=r"with an image, but got the keys \['depth'\]"):
        eval_transform((4, 4))(Sample(depth=Depth(torch.ones(8, 8))))
