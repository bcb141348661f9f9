"""NYUDv2: on miniature files of both layouts, and on the real ones where there are any."""

import itertools
import math
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from kamal_lib.data.loaders import loader
from kamal_lib.data.nyud import CLASSES_13, CLASSES_40, PORTIONS, TO_13, NYUDv2, partition
from kamal_lib.data.transforms import eval_transform
from kamal_lib.sample import VOID, Depth, Normals

HEIGHT, WIDTH = 24, 32
TRAIN, TEST = range(1, 17), range(17, 20)


def write(root: Path, kind: str, folder: str, number: int, array: np.ndarray) -> Path:
    path = root / kind / folder / f"{number:04d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def arrays(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, labels (1..40 and 0) and millimetres of one miniature file."""
    generator = np.random.default_rng(number)
    labels = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 41).astype(np.uint8)
    millimetres = generator.integers(0, 10_000, (HEIGHT, WIDTH), dtype=np.uint16)
    millimetres[:, 5] = 0
    return generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8), labels, millimetres


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder, numbers in (("train", TRAIN), ("test", TEST)):
        for number in numbers:
            for kind, array in zip(("image", "seg40", "depth"), arrays(number), strict=True):
                write(tmp_path, kind, folder, number, array)
    return tmp_path


TO_40 = [1 + 7 * k % 40 for k in range(894)]
"""Stands for the official `mapClass`: class 1..40 of each class 1..894."""


@pytest.fixture
def mat(tmp_path: Path) -> Path:
    """The images of `root` in the official layout: axes reversed, labels of 894 classes, depth in metres."""
    folder = tmp_path / "official"
    folder.mkdir()
    scipy.io.savemat(
        folder / "splits.mat", {"trainNdxs": [[n] for n in TRAIN], "testNdxs": [[n] for n in TEST]}
    )
    scipy.io.savemat(folder / "classMapping40.mat", {"mapClass": np.array([TO_40], np.uint8)})
    generator = np.random.default_rng(0)
    finer = np.array([[0] * 22] + [[k + 1 for k in range(894) if TO_40[k] == c][:22] for c in range(1, 41)])
    images, labels, millimetres = zip(*map(arrays, (*TRAIN, *TEST)), strict=True)
    with h5py.File(folder / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.stack(images).transpose(0, 3, 2, 1)
        codes = finer[np.stack(labels), generator.integers(22, size=(len(labels), HEIGHT, WIDTH))]
        file["labels"] = codes.transpose(0, 2, 1).astype(np.uint16)
        file["depths"] = (np.stack(millimetres) / 1000).transpose(0, 2, 1).astype(np.float32)
    return folder / "nyu_depth_v2_labeled.mat"


def change(mat: Path, key: str, value: np.ndarray | None) -> None:
    with h5py.File(mat, "a") as file:
        del file[key]
        if value is not None:
            file[key] = value


def first_file(root: Path, kind: str, dataset: NYUDv2) -> Path:
    return root / kind / "train" / f"{dataset.names[0]}.png"


@pytest.mark.parametrize("classes", [13, 40])
def test_sample_holds_what_the_files_hold(root: Path, classes: int) -> None:
    dataset = NYUDv2(root, "test", classes=classes, crop_border=False)
    for index, name in enumerate(dataset.names):
        image, labels, millimetres = arrays(int(name))
        sample = dataset[index]
        np.testing.assert_allclose(sample["image"].numpy(), np.moveaxis(image / 255, -1, 0), atol=1e-7)
        np.testing.assert_allclose(sample["depth"].numpy(), millimetres / 1000, atol=1e-6)
        for value in range(41):
            expected = VOID if value == 0 else value - 1 if classes == 40 else TO_13[value - 1] - 1
            assert (sample["labels"].numpy()[labels == value] == expected).all()
        assert isinstance(sample["depth"], Depth)
        assert isinstance(sample["normals"], Normals)
        assert {key: entry.dtype for key, entry in sample.items()} == {
            "image": torch.float32,
            "labels": torch.int64,
            "depth": torch.float32,
            "normals": torch.float32,
        }
    assert sorted(dataset.names) == [f"{number:04d}" for number in TEST]
    assert len(dataset.classes) == classes
    assert f"{classes} classes" in repr(dataset)


def test_border_is_cut_from_all_entries_alike(root: Path) -> None:
    whole, cut = (NYUDv2(root, "test", crop_border=crop)[0] for crop in (False, True))
    # rows 44..470 and columns 40..600 of 480×640, at a twentieth, whole pixels only
    for key in ("image", "labels", "depth"):
        assert torch.equal(cut[key], whole[key][..., 3:23, 2:30])


@pytest.mark.parametrize("crop", [False, True])
def test_normals_are_those_of_the_depth_and_the_camera(mat: Path, crop: bool) -> None:
    height, width = 120, 160
    truth = torch.tensor([0.36, -0.48, -0.8])
    # the official camera at a quarter of 640×480
    x = (torch.arange(width) - 325.582 / 4) / (518.858 / 4)
    y = (torch.arange(height)[:, None] - 253.736 / 4) / (519.470 / 4)
    depth = -1.2 / (truth[0] * x + truth[1] * y + truth[2])
    assert ((depth > 0.5) & (depth < 10)).all()
    for key, kind, item in (("images", np.uint8, (3,)), ("labels", np.uint16, ())):
        change(mat, key, np.ones((19, *item, width, height), kind))
    change(mat, "depths", np.stack([depth.numpy().T] * 19))
    sample = NYUDv2(mat, "test", crop_border=crop)[0]
    assert sample["normals"].shape == sample["image"].shape
    cosine = (sample["normals"].as_subclass(torch.Tensor) * truth.view(3, 1, 1)).sum(0)
    assert cosine.min() > math.cos(math.radians(0.1))
    assert "normals" not in NYUDv2(mat, "test", normals=False)[0]


def test_parts_are_disjoint_and_cover_the_training_images(root: Path) -> None:
    parts = {split: NYUDv2(root, split) for split in PORTIONS}
    assert all(len(part) > 0 for part in parts.values())
    names = [name for part in parts.values() for name in part.names]
    assert sorted(names) == [f"{number:04d}" for number in TRAIN]
    other = {split: NYUDv2(root, split, world=1) for split in PORTIONS}
    assert any(set(other[split].names) != set(parts[split].names) for split in PORTIONS)
    assert NYUDv2(root, "labelled").names == parts["labelled"].names
    assert NYUDv2(root, "all").names == parts["labelled"].names + parts["unlabelled"].names
    assert all("labels" in sample for sample in NYUDv2(root, "all"))
    assert NYUDv2(root, "test", world=1).names == NYUDv2(root, "test").names


@pytest.mark.parametrize("world", range(5))
def test_partition_keeps_runs_together_and_portions(world: int) -> None:
    numbers = [n for n in range(1, 1450) if n * n % 11 not in (0, 5)]  # runs of two to three
    names = [f"{number:04d}" for number in numbers]
    parts = partition(names, world=world)
    part_of = {name: part for part, members in parts.items() for name in members}
    assert sorted(part_of) == names
    assert sum(map(len, parts.values())) == len(names)
    for one, other in itertools.pairwise(names):
        if int(other) == int(one) + 1:
            assert part_of[one] == part_of[other]
    for part, portion in PORTIONS.items():
        assert abs(len(parts[part]) / len(names) - portion) < 0.01
    assert partition(names[::-1], world=world) == parts


def test_unlabelled_needs_and_opens_no_label(root: Path) -> None:
    shutil.rmtree(root / "seg40")
    shutil.rmtree(root / "depth")
    dataset = NYUDv2(root, "unlabelled")
    assert all(set(dataset[index]) == {"image"} for index in range(len(dataset)))
    for split in ("labelled", "all"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            NYUDv2(root, split)


def test_count_takes_the_first(root: Path) -> None:
    everything = NYUDv2(root, "unlabelled")
    assert NYUDv2(root, "unlabelled", count=3).names == everything.names[:3]
    for count in (0, len(everything) + 1):
        with pytest.raises(ValueError, match=rf"count from 1 to {len(everything)} .*but got {count}"):
            NYUDv2(root, "unlabelled", count=count)


def test_unknown_split_and_classes(root: Path) -> None:
    with pytest.raises(ValueError, match=r"'unlabelled', 'validation', 'all', 'test'.*got 'train'"):
        NYUDv2(root, "train")
    with pytest.raises(ValueError, match="13 or 40, but got 894"):
        NYUDv2(root, "test", classes=894)


def test_wrong_root_says_what_is_expected_and_what_is_there(root: Path, tmp_path: Path) -> None:
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "half").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"image, seg40 and depth.*train and test.*found there: \['half'\]"
    ):
        NYUDv2(tmp_path / "outer", "test")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        NYUDv2(tmp_path / "nowhere", "test")


def test_empty_folder(root: Path) -> None:
    for path in (root / "image" / "test").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"image.test has no files 0001.jpg or .png"):
        NYUDv2(root, "test")


def test_missing_counterpart_is_named(root: Path) -> None:
    (root / "depth" / "test" / "0018.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"depth.test has no counterpart of 1 .*expected 0018.png"):
        NYUDv2(root, "test")


@pytest.mark.parametrize("kind", ["image", "seg40", "depth"])
def test_truncated_file_is_named(root: Path, kind: str) -> None:
    dataset = NYUDv2(root, "labelled")
    path = first_file(root, kind, dataset)
    for length in (len(path.read_bytes()) // 2, 10):
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(OSError, match=rf"{kind}.train.{path.name} cannot be decoded.*truncated"):
            dataset[0]


@pytest.mark.parametrize("kind", ["seg40", "depth"])
def test_other_size_names_files_and_sizes(root: Path, kind: str) -> None:
    dataset = NYUDv2(root, "labelled")
    dtype = np.uint8 if kind == "seg40" else np.uint16
    write(root, kind, "train", int(dataset.names[0]), np.ones((12, 16), dtype))
    name = dataset.names[0]
    with pytest.raises(ValueError, match=rf"{kind}.train.{name}.png .*image.*\(24, 32\).*got \(12, 16\)"):
        dataset[0]


def test_label_out_of_range_names_file_and_value(root: Path) -> None:
    dataset = NYUDv2(root, "labelled")
    labels = np.ones((HEIGHT, WIDTH), np.uint8)
    labels[0, 0] = 77
    path = write(root, "seg40", "train", int(dataset.names[0]), labels)
    with pytest.raises(ValueError, match=rf"labels 0 \(unlabelled\) to 40 in .*{path.name}, but got 77"):
        dataset[0]


def test_colour_labels_and_8_bit_depth_are_refused(root: Path) -> None:
    dataset = NYUDv2(root, "labelled")
    number = int(dataset.names[0])
    write(root, "depth", "train", number, np.ones((HEIGHT, WIDTH), np.uint8))
    with pytest.raises(ValueError, match=rf"16-bit millimetres in .*{number:04d}.png, but got uint8"):
        dataset[0]
    write(root, "seg40", "train", number, np.ones((HEIGHT, WIDTH, 3), np.uint8))
    with pytest.raises(ValueError, match=r"one channel.*got \(24, 32, 3\)"):
        dataset[0]


def test_depth_in_another_unit_is_refused(root: Path) -> None:
    dataset = NYUDv2(root, "labelled")
    write(root, "depth", "train", int(dataset.names[0]), np.full((HEIGHT, WIDTH), 12_000, np.uint16))
    with pytest.raises(ValueError, match=rf"0 \(unknown\) to 10 m in .*{dataset.names[0]}.png.*such as 12 m"):
        dataset[0]


# --- the official .mat file -------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["labelled", "unlabelled", "validation", "all", "test"])
@pytest.mark.parametrize("options", [{}, {"classes": 40, "count": 1, "world": 1, "crop_border": False}])
def test_mat_file_and_folder_give_the_same(root: Path, mat: Path, split: str, options: dict) -> None:
    official, folder = (NYUDv2(place, split, **options) for place in (mat, root))
    assert official.names == folder.names
    for one, other in zip(official, folder, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert type(one[key]) is type(other[key])
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6)


def test_mat_file_is_turned_upright(mat: Path) -> None:
    image, _, millimetres = arrays(17)
    dataset = NYUDv2(mat, "test", crop_border=False)
    sample = dataset[dataset.names.index("0017")]
    assert sample["image"].shape == (3, HEIGHT, WIDTH)
    np.testing.assert_allclose(sample["image"][:, 3, 20].numpy() * 255, image[3, 20], atol=1e-4)
    assert float(sample["depth"][3, 20]) == pytest.approx(millimetres[3, 20] / 1000, abs=1e-6)
    assert (sample["depth"][:, 5] == 0).all()


def test_mat_labels_go_from_894_to_40_to_13(mat: Path) -> None:
    codes = np.arange(19 * WIDTH * HEIGHT).reshape(19, WIDTH, HEIGHT) % 895
    change(mat, "labels", codes.astype(np.uint16))
    for classes in (13, 40):
        dataset = NYUDv2(mat, "test", classes=classes, crop_border=False)
        for name, sample in zip(dataset.names, dataset, strict=True):
            for code, label in zip(
                codes[int(name) - 1].T.flat, sample["labels"].flatten().tolist(), strict=True
            ):
                of_40 = 0 if code == 0 else TO_40[code - 1]
                expected = of_40 if classes == 40 or of_40 == 0 else TO_13[of_40 - 1]
                assert label == (VOID if code == 0 else expected - 1)


def test_workers_and_copies_read_the_mat_file(mat: Path) -> None:
    dataset = NYUDv2(mat, "labelled")
    here = [dataset[index] for index in range(len(dataset))]
    for one, other in zip(here, pickle.loads(pickle.dumps(dataset)), strict=True):
        assert torch.equal(one["depth"], other["depth"])
    batches = loader(dataset, batch_size=2, shuffle=False, seed=0, workers=2)
    for key in ("image", "labels", "depth", "normals"):
        assert torch.equal(torch.cat([batch[key] for batch in batches]), torch.stack([s[key] for s in here]))


def test_unlabelled_part_of_the_mat_file_opens_no_label(mat: Path) -> None:
    (mat.parent / "classMapping40.mat").unlink()
    for key in ("labels", "depths"):
        change(mat, key, None)
    assert set(NYUDv2(mat, "unlabelled")[0]) == {"image"}
    with pytest.raises(ValueError, match=r"expected `labels` in .*labeled.mat, but found only \['images'\]"):
        NYUDv2(mat, "all")


def test_missing_mat_files_are_named(mat: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no .*other.mat: expected the official nyu_depth_v2_labeled"
    ):
        NYUDv2(mat.with_name("other.mat"), "test")
    (mat.parent / "classMapping40.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*classMapping40.mat: load it down, and put it beside"):
        NYUDv2(mat, "test")
    (mat.parent / "splits.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*splits.mat: load it down"):
        NYUDv2(mat, "unlabelled")


@pytest.mark.parametrize("key", ["images", "labels", "depths"])
def test_mat_file_without_a_key(mat: Path, key: str) -> None:
    change(mat, key, None)
    with pytest.raises(ValueError, match=rf"expected `{key}` in .*labeled.mat, but found only \["):
        NYUDv2(mat, "test")


def test_mat_entries_of_other_shapes(mat: Path) -> None:
    change(mat, "depths", np.ones((19, HEIGHT, WIDTH), np.float32))
    with pytest.raises(ValueError, match=r"`depths` of .* to be \(19, 32, 24\).*but got \(19, 24, 32\)"):
        NYUDv2(mat, "test")
    change(mat, "images", np.ones((19, WIDTH, HEIGHT, 3), np.uint8))
    with pytest.raises(ValueError, match=r"N×3×width×height, but got \(19, 32, 24, 3\)"):
        NYUDv2(mat, "test")


def test_damaged_mat_files(mat: Path) -> None:
    content = mat.read_bytes()
    for wrong in (b"", b"MATLAB 5.0 MAT-file" * 50, content[: len(content) // 2]):
        mat.write_bytes(wrong)
        with pytest.raises(
            OSError, match=r"labeled.mat cannot be read as HDF5 .*official nyu_depth_v2_labeled"
        ):
            NYUDv2(mat, "test")
    mat.write_bytes(content)
    splits = mat.with_name("splits.mat")
    for wrong in (b"", b"a page, not a file\n" * 50, splits.read_bytes()[:150]):
        splits.write_bytes(wrong)
        with pytest.raises(OSError, match=r"splits.mat cannot be read .*MATLAB 5"):
            NYUDv2(mat, "test")


@pytest.mark.parametrize(
    ("train", "test", "got"),
    [
        (TRAIN, range(17, 21), "16 and 4 numbers, 1 to 20, with 0 in both"),
        (range(16), TEST, "16 and 3 numbers, 0 to 19, with 0 in both"),
        (TRAIN, range(16, 20), "16 and 4 numbers, 1 to 19, with 1 in both"),
        (TRAIN, range(17, 19), "16 and 2 numbers, 1 to 18, with 0 in both"),
    ],
)
def test_split_of_other_images(mat: Path, train: range, test: range, got: str) -> None:
    scipy.io.savemat(mat.with_name("splits.mat"), {"trainNdxs": [*train], "testNdxs": [*test]})
    with pytest.raises(
        ValueError, match=rf"splits.mat to hold each image of .*, 1 to 19, once, but got {got}"
    ):
        NYUDv2(mat, "labelled")


def test_small_mat_files_without_their_content(mat: Path) -> None:
    mapping, splits = mat.with_name("classMapping40.mat"), mat.with_name("splits.mat")
    for wrong, got in (([*range(1, 41)], "40 from 1 to 40"), ([*TO_40[:-1], 41], "894 from 1 to 41")):
        scipy.io.savemat(mapping, {"mapClass": wrong})
        with pytest.raises(ValueError, match=rf"a class 1..40 for each of 894, but got {got}"):
            NYUDv2(mat, "test")
    scipy.io.savemat(splits, {"trainNdxs": [*TRAIN]})
    with pytest.raises(ValueError, match=r"numbers in `testNdxs` of .*splits.mat, but found only.*trainNdxs"):
        NYUDv2(mat, "test")


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.5, 10.5])
def test_impossible_depth_in_the_mat_file_names_the_image(mat: Path, value: float) -> None:
    dataset = NYUDv2(mat, "labelled")
    with h5py.File(mat, "a") as file:
        file["depths"][int(dataset.names[1]) - 1, 7, 9] = value
    dataset[0]
    with pytest.raises(
        ValueError, match=rf"to 10 m in image {dataset.names[1]} of .*got 1 of 768 values such as {value:g} m"
    ):
        dataset[1]


def test_impossible_label_in_the_mat_file_names_the_image(mat: Path) -> None:
    dataset = NYUDv2(mat, "labelled")
    with h5py.File(mat, "a") as file:
        file["labels"][int(dataset.names[0]) - 1, 7, 9] = 895
    with pytest.raises(
        ValueError, match=rf"0 to 894 of image {dataset.names[0]} in .*labeled.mat, but got 895"
    ):
        dataset[0]


# --- the real files ---------------------------------------------------------------------------------------


@pytest.fixture
def nyuv2(real_data: Path) -> Path:
    if not (real_data / "nyuv2").is_dir():
        pytest.skip("needs NYUDv2: the folder nyuv2 of the real data")
    return real_data / "nyuv2"


@pytest.mark.data
def test_class_tables_are_the_official_ones(nyuv2: Path) -> None:
    mapping = scipy.io.loadmat(nyuv2 / "class13Mapping.mat")["classMapping13"][0][0]
    assert tuple(mapping[0][0].tolist()) == TO_13
    assert tuple(str(name[0]) for name in mapping[1][0]) == CLASSES_13
    names = scipy.io.loadmat(nyuv2 / "classMapping40.mat")["className"][0]
    assert tuple(str(name[0]) for name in names) == CLASSES_40


@pytest.mark.data
def test_real_split_is_the_official_one(nyuv2: Path) -> None:
    splits = scipy.io.loadmat(nyuv2 / "splits.mat")
    parts = {split: NYUDv2(nyuv2 / "half", split) for split in PORTIONS}
    train = sorted(int(name) for part in parts.values() for name in part.names)
    assert train == sorted(splits["trainNdxs"].ravel().tolist())
    assert len(train) == 795
    for split, part in parts.items():
        assert len(part) / 795 == pytest.approx(PORTIONS[split], abs=0.04)
    test = NYUDv2(nyuv2 / "half", "test")
    assert sorted(map(int, test.names)) == sorted(splits["testNdxs"].ravel().tolist())
    assert len(test) == 654


@pytest.mark.data
@pytest.mark.parametrize("split", ["labelled", "validation", "test"])
def test_real_values_are_sane(nyuv2: Path, split: str) -> None:
    dataset = NYUDv2(nyuv2 / "half", split, count=30)
    shares, known, up = torch.zeros(256), [], []
    for index in range(30):
        sample = dataset[index]
        assert sample["image"].shape == (3, 213, 280)
        assert sample["labels"].shape == sample["depth"].shape == (213, 280)
        assert sample["depth"].min() > 0.7
        assert sample["depth"].max() < 10
        shares += torch.bincount(sample["labels"].flatten(), minlength=256)
        seen = (sample["normals"] != 0).any(0)
        known.append(seen.float().mean())
        up.append(-sample["normals"][1, seen & (sample["labels"] == CLASSES_13.index("floor"))])
    assert torch.stack(known).mean() > 0.7
    assert torch.cat(up).median() > 0.85  # floors face up; the camera looks down a little
    shares /= shares.sum()
    assert shares[13:VOID].sum() == 0
    assert shares[VOID] < 0.3
    assert (shares[:13] > 0).all()
    assert shares.argmax() == CLASSES_13.index("wall")
    assert 0.15 < shares[CLASSES_13.index("wall")] < 0.35
    assert 0.04 < shares[CLASSES_13.index("floor")] < 0.2


@pytest.mark.data
def test_both_real_sizes_show_the_same_scene(nyuv2: Path) -> None:
    full = NYUDv2(nyuv2 / "full", "test")
    half = NYUDv2(nyuv2 / "half", "test")
    resize = eval_transform((48, 64))
    for index in range(3):
        large, small = (resize(full[index]), resize(half[half.names.index(full.names[index])]))
        assert (large["image"] - small["image"]).abs().mean() < 0.02
        assert (large["depth"] - small["depth"]).abs().median() < 0.05
        assert (large["labels"] == small["labels"]).float().mean() > 0.9
