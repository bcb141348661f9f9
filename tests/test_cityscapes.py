"""Cityscapes: on a miniature of the official layout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kamal_lib.data.cityscapes import CLASSES_19, Cityscapes, cities_of, depth_from_disparity
from kamal_lib.data.loaders import Preloaded, loader
from kamal_lib.data.transforms import eval_transform, seeded, train_transform
from kamal_lib.recipes.data import CityscapesData
from kamal_lib.recipes.structured import structured_tasks
from kamal_lib.sample import VOID, Depth, known_depth

HEIGHT, WIDTH = 16, 32
BASELINE, FOCAL = 0.209313, 2262.52
NAMES = {
    "train": [f"{city}_{seq:06d}_000019" for city in ("aachen", "bochum", "ulm") for seq in range(3)],
    "val": [f"{city}_{seq:06d}_{11 * seq + 3:06d}" for city in ("frankfurt", "munster") for seq in range(2)],
    "test": ["berlin_000000_000019"],
}
TRAIN_ID = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
    27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
ENDINGS = {
    "leftImg8bit": "_leftImg8bit.png",
    "gtFine": "_gtFine_labelIds.png",
    "disparity": "_disparity.png",
    "camera": "_camera.json",
}


def place(root: Path, folder: str, split: str, name: str) -> Path:
    return root / folder / split / name.split("_")[0] / f"{name}{ENDINGS[folder]}"


def arrays(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, ids 0..33 and disparity numbers of one miniature file."""
    generator = np.random.default_rng([*name.encode()])
    ids = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 34).astype(np.uint8)
    disparity = generator.integers(2, 2**16, (HEIGHT, WIDTH), dtype=np.uint16)
    disparity[:, 5], disparity[:, 6] = 0, 1
    return generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8), ids, disparity


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, names in NAMES.items():
        for name in names:
            folders = ("leftImg8bit", "gtFine", "disparity")
            for folder, array in zip(folders, arrays(name), strict=True):
                path = write(place(tmp_path, folder, split, name), array)
                # what else the archives hold, and what file managers leave there
                path.with_name(f"{name}_gtFine_instanceIds.png").write_bytes(b"not to be opened")
                path.with_name(f"._{path.name}").write_bytes(b"not to be opened")
            camera = place(tmp_path, "camera", split, name)
            camera.parent.mkdir(parents=True, exist_ok=True)
            extrinsic = {"baseline": BASELINE, "pitch": 0.038, "roll": 0.0, "x": 1.7, "y": 0.1, "z": 1.22}
            intrinsic = {"fx": FOCAL, "fy": 2265.3017905988554, "u0": 1096.98, "v0": 513.137}
            camera.write_text(json.dumps({"extrinsic": extrinsic, "intrinsic": intrinsic}))
    return tmp_path


@pytest.mark.parametrize("split", ["train", "val"])
def test_sample_holds_what_the_files_hold(root: Path, split: str) -> None:
    dataset = Cityscapes(root, split)
    assert sorted(dataset.names) == sorted(NAMES[split])
    for name, sample in zip(dataset.names, dataset, strict=True):
        pixels, ids, disparity = arrays(name)
        np.testing.assert_allclose(sample["image"].numpy(), np.moveaxis(pixels / 255, -1, 0), atol=1e-7)
        for value in range(34):
            assert (sample["labels"].numpy()[ids == value] == TRAIN_ID.get(value, VOID)).all()
        exact = np.where(disparity > 1, BASELINE * FOCAL * 256 / np.maximum(disparity - 1.0, 1), 0)
        np.testing.assert_allclose(sample["depth"].numpy(), exact, rtol=1e-6)
        assert (known_depth(sample["depth"]).numpy() == (disparity > 1)).all()
        assert {key: (type(entry).__name__, entry.dtype) for key, entry in sample.items()} == {
            "image": ("Image", torch.float32),
            "labels": ("Mask", torch.int64),
            "depth": ("Depth", torch.float32),
        }
    assert f"Split: {split}, 19 classes and depth" in repr(dataset)


def test_depth_beyond_the_farthest_is_unknown(root: Path) -> None:
    every, near = Cityscapes(root, "val"), Cityscapes(root, "val", farthest=5.0)
    for whole, cut in zip(every, near, strict=True):
        depth = whole["depth"].as_subclass(torch.Tensor)
        assert bool((depth > 5).any())
        assert torch.equal(cut["depth"].as_subclass(torch.Tensor), torch.where(depth <= 5, depth, 0.0))
    with pytest.raises(ValueError, match="farthest to be metres above 0"):
        Cityscapes(root, "val", farthest=0.0)


def test_a_recipe_holds_three_training_cities_out(root: Path) -> None:
    data = CityscapesData(str(root), (6, 8))
    assert {name.split("_")[0] for name in data.images("labelled").names} == {"aachen", "bochum"}
    assert {name.split("_")[0] for name in data.images("validation").names} == {"ulm"}
    assert sorted(data.images("test").names) == sorted(NAMES["val"])
    assert data.labels() == (6, 6)
    assert data.part("test")[0]["depth"].shape == (6, 8)
    assert float(max(sample["depth"].max() for sample in data.part("labelled"))) <= 80
    assert len(data.teaching(None)) == 6
    assert len(data.teaching(2)) == 2
    with pytest.raises(ValueError, match="from 1 to 6"):
        data.teaching(7)
    with pytest.raises(ValueError, match="no part 'unlabelled'"):
        data.part("unlabelled")
    assert structured_tasks(data)["depth"].farthest == 80


def test_depth_is_that_worked_out_by_hand() -> None:
    # 0.2 m · 2000 pixels = 400 m pixels; p = 2561 is 10 pixels: 40 m; p = 25601 is 100 pixels: 4 m;
    # p = 129 is half a pixel: 800 m; p = 2 is 1/256 pixel: 102.4 km; 65535 is 65534/256 pixels
    numbers = np.array([[0, 1, 2, 129], [257, 2561, 25601, 65535]], np.uint16)
    expected = [[0, 0, 102_400, 800], [400, 40, 4, 400 * 256 / 65534]]
    for kind in (np.uint16, np.int32):
        depth = depth_from_disparity(numbers.astype(kind), 0.2, 2000.0)
        assert depth.dtype == np.float32
        np.testing.assert_allclose(depth, expected, rtol=1e-6)


def test_classes_are_the_official_ones() -> None:
    assert CLASSES_19 == (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
        "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle",
        "bicycle",
    )  # fmt: skip


def test_camera_of_each_image_is_its_own(root: Path) -> None:
    dataset = Cityscapes(root, "val")
    before = [sample["depth"] for sample in dataset]
    path = place(root, "camera", "val", dataset.names[1])
    path.write_text(path.read_text().replace(str(BASELINE), str(2 * BASELINE)))
    torch.testing.assert_close(dataset[0]["depth"], before[0])
    torch.testing.assert_close(dataset[1]["depth"], Depth(2 * before[1]))


def test_order_is_mixed_and_the_same_for_every_count(root: Path) -> None:
    names = Cityscapes(root, "train").names
    assert names != sorted(names)
    assert Cityscapes(root, "train", count=4).names == names[:4]
    for count in (0, 10):
        with pytest.raises(ValueError, match=rf"count from 1 to 9 \(all of 'train'\), but got {count}"):
            Cityscapes(root, "train", count=count)


def test_cities_hold_some_of_the_training_images_out(root: Path) -> None:
    names = Cityscapes(root, "train").names
    kept, held = (
        Cityscapes(root, "train", cities=cities).names for cities in (["aachen", "ulm"], {"bochum"})
    )
    assert held == [name for name in names if name.startswith("bochum")]
    assert kept == [name for name in names if not name.startswith("bochum")]
    assert cities_of(root, "train") == ["aachen", "bochum", "ulm"]
    with pytest.raises(FileNotFoundError, match=r"leftImg8bit.train does not exist: .*no such folder"):
        cities_of(root / "nowhere", "train")
    # files of a city that is not asked for need not exist
    shutil.rmtree(root / "gtFine" / "train" / "bochum")
    assert Cityscapes(root, "train", cities=["aachen", "ulm"], count=2).names == kept[:2]
    for cities in (["aachen", "bonn"], []):
        with pytest.raises(ValueError, match=r"some of \['aachen', 'bochum', 'ulm'\], but got \["):
            Cityscapes(root, "train", cities=cities)
    with pytest.raises(ValueError, match="count from 1 to 3"):
        Cityscapes(root, "train", cities=["ulm"], count=4)


def test_depth_false_needs_and_opens_neither_disparity_nor_camera(root: Path) -> None:
    for folder in ("disparity", "camera"):
        shutil.rmtree(root / folder)
    dataset = Cityscapes(root, "train", depth=False)
    assert all(set(sample) == {"image", "labels"} for sample in dataset)
    assert repr(dataset).endswith("19 classes")
    with pytest.raises(FileNotFoundError, match=r"disparity_trainvaltest.zip into .*or pass depth=False"):
        Cityscapes(root, "train")


def test_annotated_false_needs_and_opens_the_images_only(root: Path) -> None:
    for folder in ("gtFine", "disparity", "camera"):
        shutil.rmtree(root / folder)
    for split in NAMES:
        for depth in (True, False):
            dataset = Cityscapes(root, split, annotated=False, depth=depth)
            assert sorted(dataset.names) == sorted(NAMES[split])
            assert all(set(sample) == {"image"} for sample in dataset)
    assert "images alone" in repr(dataset)
    with pytest.raises(FileNotFoundError, match=r"9 of 9 .*gtFine_trainvaltest.zip.*or pass annotated=False"):
        Cityscapes(root, "train", depth=False)


def test_flip_zoom_and_resize_keep_image_labels_and_depth_together(root: Path) -> None:
    sample = Cityscapes(root, "val")[0]
    flipped = train_transform((HEIGHT, WIDTH), flip=1.0)(sample)
    for key in ("image", "labels", "depth"):
        assert torch.equal(flipped[key], sample[key].flip(-1))
    # colour and depth that say which label a pixel has tell whether they still lie on one another
    car = sample["labels"] == CLASSES_19.index("car")
    sample["image"][:] = car.float()
    sample["depth"] = Depth(torch.where(car, 20.0, 60.0))
    larger = eval_transform((4 * HEIGHT, 4 * WIDTH))(sample)
    zoom_in = train_transform((4 * HEIGHT, 4 * WIDTH), scale=(2.0, 2.0))
    zoomed = seeded(zoom_in, sample, seed=0, epoch=0, index=0)  # a window with a car in it
    for moved, zoom in ((larger, 1), (zoomed, 2)):
        assert moved["image"].shape == (3, 4 * HEIGHT, 4 * WIDTH)
        is_car = moved["labels"] == CLASSES_19.index("car")
        assert is_car.any()
        assert torch.equal(moved["depth"].as_subclass(torch.Tensor), torch.where(is_car, 20.0, 60.0) / zoom)
        assert ((moved["image"][0] > 0.5) == is_car).float().mean() > 0.95


def test_preloaded_and_by_workers_it_is_the_same(root: Path) -> None:
    dataset = Cityscapes(root, "val")
    kept = Preloaded(dataset)
    batches = list(loader(dataset, batch_size=3, shuffle=False, seed=0, workers=2))
    for key in ("image", "labels", "depth"):
        here = torch.stack([sample[key] for sample in dataset])
        assert torch.equal(torch.cat([batch[key] for batch in batches]), here)
        assert torch.equal(torch.stack([kept[index][key] for index in range(4)]), here)


def test_unknown_split_and_labels_of_the_test_images(root: Path) -> None:
    with pytest.raises(ValueError, match=r"one of \['train', 'val', 'test'\], but got 'validation'"):
        Cityscapes(root, "validation")
    with pytest.raises(ValueError, match=r"annotated=False with 'test', .*not public; measure on 'val'"):
        Cityscapes(root, "test")


def test_wrong_root_says_what_is_expected_and_what_is_there(root: Path) -> None:
    (root / "outer" / "cityscapes").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"does not exist: .*\['cityscapes'\]. Unpack leftImg8bit_trainvaltest.zip"
    ):
        Cityscapes(root / "outer", "train")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Cityscapes(root / "nowhere", "train")
    shutil.rmtree(root / "leftImg8bit" / "val" / "munster")
    shutil.rmtree(root / "leftImg8bit" / "val" / "frankfurt")
    with pytest.raises(FileNotFoundError, match=r"leftImg8bit.val has no files CITY/NAME_leftImg8bit.png"):
        Cityscapes(root, "val")


@pytest.mark.parametrize("folder", ["gtFine", "disparity", "camera"])
def test_missing_counterpart_is_named(root: Path, folder: str) -> None:
    path = place(root, folder, "val", NAMES["val"][2])
    path.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=rf"1 of 4 files are missing, the first is {path}: unpack {folder}_trainvaltest",
    ):
        Cityscapes(root, "val")


@pytest.mark.parametrize("folder", ["leftImg8bit", "gtFine", "disparity"])
def test_truncated_picture_is_named(root: Path, folder: str) -> None:
    dataset = Cityscapes(root, "val")
    path = place(root, folder, "val", dataset.names[0])
    for length in (len(path.read_bytes()) // 2, 10):
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(OSError, match=rf"{path} cannot be decoded.*truncated"):
            dataset[0]


@pytest.mark.parametrize("content", [b"", b'{"extrinsic": {"base', bytes(range(128, 256))])
def test_damaged_camera_is_named(root: Path, content: bytes) -> None:
    dataset = Cityscapes(root, "val")
    path = place(root, "camera", "val", dataset.names[0])
    path.write_bytes(content)
    with pytest.raises(OSError, match=rf"{path} cannot be read as JSON .*camera_trainvaltest.zip again"):
        dataset[0]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"extrinsic": {"baseline": 0.2}}',
        '{"extrinsic": {"baseline": 0.2}, "intrinsic": 3}',
        '{"extrinsic": {"baseline": "none"}, "intrinsic": {"fx": 2000}}',
        '{"extrinsic": {"baseline": -0.2}, "intrinsic": {"fx": 2000}}',
        '{"extrinsic": {"baseline": 0.2}, "intrinsic": {"fx": 0}}',
        '{"extrinsic": {"baseline": NaN}, "intrinsic": {"fx": 2000}}',
        '{"extrinsic": {"baseline": 0.2}, "intrinsic": {"fx": Infinity}}',
    ],
)
def test_camera_without_its_numbers(root: Path, content: str) -> None:
    dataset = Cityscapes(root, "val")
    path = place(root, "camera", "val", dataset.names[0])
    path.write_text(content)
    with pytest.raises(
        ValueError, match=rf"`extrinsic.baseline` .* and `intrinsic.fx` .* of {path}, but got"
    ):
        dataset[0]


@pytest.mark.parametrize("folder", ["gtFine", "disparity"])
@pytest.mark.parametrize("shape", [(8, 16), (HEIGHT, WIDTH, 3)])
def test_other_size_and_colours_name_both_files(root: Path, folder: str, shape: tuple[int, ...]) -> None:
    dataset = Cityscapes(root, "val")
    picture, path = (place(root, kind, "val", dataset.names[0]) for kind in ("leftImg8bit", folder))
    write(path, np.ones(shape, np.uint8))
    got = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"{path} to be one channel.*{picture}, \(16, 32\).*got {got}"):
        dataset[0]


def test_8_bit_disparity_is_refused(root: Path) -> None:
    dataset = Cityscapes(root, "val")
    path = write(place(root, "disparity", "val", dataset.names[0]), np.ones((HEIGHT, WIDTH), np.uint8))
    with pytest.raises(ValueError, match=rf"16-bit numbers in {path}, but got uint8"):
        dataset[0]


@pytest.mark.parametrize("value", [34, 255])
def test_label_out_of_range_names_file_and_value(root: Path, value: int) -> None:
    dataset = Cityscapes(root, "val")
    ids = np.full((HEIGHT, WIDTH), 7, np.uint8)
    ids[0, 0] = value
    path = write(place(root, "gtFine", "val", dataset.names[0]), ids)
    with pytest.raises(ValueError, match=rf"ids 0 to 33 in {path}, but got {value}: .*train ids"):
        dataset[0]
