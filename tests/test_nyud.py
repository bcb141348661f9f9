"""NYUDv2: on miniature trees of the same layout, and on the real files where there are any."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from kamal_lib.data.nyud import CLASSES_13, CLASSES_40, PORTIONS, TO_13, NYUDv2, partition
from kamal_lib.data.transforms import eval_transform
from kamal_lib.sample import VOID, Depth

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
        dtypes = {key: entry.dtype for key, entry in sample.items()}
        assert dtypes == {"image": torch.float32, "labels": torch.int64, "depth": torch.float32}
    assert sorted(dataset.names) == [f"{number:04d}" for number in TEST]
    assert len(dataset.classes) == classes
    assert f"{classes} classes" in repr(dataset)


def test_border_is_cut_from_all_entries_alike(root: Path) -> None:
    whole, cut = (NYUDv2(root, "test", crop_border=crop)[0] for crop in (False, True))
    # rows 44..470 and columns 40..600 of 480×640, at a twentieth, whole pixels only
    for key in whole:
        assert torch.equal(cut[key], whole[key][..., 3:23, 2:30])


def test_parts_are_disjoint_and_cover_the_training_images(root: Path) -> None:
    parts = {split: NYUDv2(root, split) for split in PORTIONS}
    assert all(len(part) > 0 for part in parts.values())
    names = [name for part in parts.values() for name in part.names]
    assert sorted(names) == [f"{number:04d}" for number in TRAIN]
    other = {split: NYUDv2(root, split, world=1) for split in PORTIONS}
    assert any(set(other[split].names) != set(parts[split].names) for split in PORTIONS)
    assert NYUDv2(root, "labelled").names == parts["labelled"].names
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
    with pytest.raises(FileNotFoundError, match="does not exist"):
        NYUDv2(root, "labelled")


def test_count_takes_the_first(root: Path) -> None:
    everything = NYUDv2(root, "unlabelled")
    assert NYUDv2(root, "unlabelled", count=3).names == everything.names[:3]
    for count in (0, len(everything) + 1):
        with pytest.raises(ValueError, match=rf"count from 1 to {len(everything)} .*but got {count}"):
            NYUDv2(root, "unlabelled", count=count)


def test_unknown_split_and_classes(root: Path) -> None:
    with pytest.raises(ValueError, match=r"'labelled', 'unlabelled', 'validation', 'test'.*got 'train'"):
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
    shares = torch.zeros(256)
    for index in range(30):
        sample = dataset[index]
        assert sample["image"].shape == (3, 213, 280)
        assert sample["labels"].shape == sample["depth"].shape == (213, 280)
        assert sample["depth"].min() > 0.7
        assert sample["depth"].max() < 10
        shares += torch.bincount(sample["labels"].flatten(), minlength=256)
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
