"""CamVid: on a miniature of the official layout, and on the real files where there are any."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kamal_lib.data.camvid import CLASSES, SPLITS, CamVid
from kamal_lib.data.loaders import Preloaded, loader
from kamal_lib.data.transforms import eval_transform, seeded, train_transform
from kamal_lib.recipes.data import CamVidData
from kamal_lib.sample import VOID

HEIGHT, WIDTH = 18, 24
COUNTS = {"train": 7, "val": 2, "test": 3}


def frame(split: str, number: int) -> str:
    return f"{'0006R0' if number % 2 else '0001TP'}_{split}{number:05d}"


def arrays(split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and ids 0..11 of one miniature file."""
    generator = np.random.default_rng([SPLITS.index(split), number])
    ids = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) + number) % 12
    return generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8), ids.astype(np.uint8)


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Beside what the lists name lies a frame that they do not, which is no picture at all."""
    for split, count in COUNTS.items():
        lines = []
        for number in range(count):
            name = frame(split, number)
            for folder, array in zip((split, f"{split}annot"), arrays(split, number), strict=True):
                write(tmp_path / folder / f"{name}.png", array)
            lines.append(f"/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png\n")
        (tmp_path / f"{split}.txt").write_text("".join(lines))
        (tmp_path / split / "0001TP_unlisted.png").write_bytes(b"no picture")
    return tmp_path


def annotation(root: Path, dataset: CamVid, index: int = 0) -> Path:
    return root / f"{dataset.split}annot" / f"{dataset.names[index]}.png"


@pytest.mark.parametrize("split", SPLITS)
def test_sample_holds_what_the_files_hold(root: Path, split: str) -> None:
    dataset = CamVid(root, split)
    for number in range(COUNTS[split]):
        pixels, ids = arrays(split, number)
        sample = dataset[dataset.names.index(frame(split, number))]
        np.testing.assert_allclose(sample["image"].numpy(), np.moveaxis(pixels / 255, -1, 0), atol=1e-7)
        np.testing.assert_array_equal(sample["labels"].numpy(), np.where(ids == 11, VOID, ids))
        assert {key: (type(entry).__name__, entry.dtype) for key, entry in sample.items()} == {
            "image": ("Image", torch.float32),
            "labels": ("Mask", torch.int64),
        }
    assert len(dataset) == COUNTS[split]
    assert len(CLASSES) == len(set(CLASSES)) == 11
    assert f"Split: {split}, 11 classes" in repr(dataset)


def test_order_is_mixed_and_the_same_for_every_count(root: Path) -> None:
    names = CamVid(root, "train").names
    assert sorted(names) == sorted(frame("train", number) for number in range(7))
    assert names != [frame("train", number) for number in range(7)]
    assert names != sorted(names)
    assert CamVid(root, "train").names == names
    assert CamVid(root, "train", count=3).names == names[:3]
    for count in (0, 8):
        with pytest.raises(ValueError, match=rf"count from 1 to 7 \(all of 'train'\), but got {count}"):
            CamVid(root, "train", count=count)


def test_annotated_false_needs_and_opens_no_labels(root: Path) -> None:
    with_labels = CamVid(root, "train")
    images = [sample["image"] for sample in with_labels]
    shutil.rmtree(root / "trainannot")
    without = CamVid(root, "train", annotated=False)
    assert without.names == with_labels.names
    for sample, image in zip(without, images, strict=True):
        assert set(sample) == {"image"}
        assert torch.equal(sample["image"], image)
    assert "no labels" in repr(without)
    with pytest.raises(FileNotFoundError, match=r"7 of 14 files are missing, .*trainannot"):
        CamVid(root, "train")


def test_of_a_listed_path_only_folder_and_name_count(root: Path) -> None:
    names = CamVid(root, "val").names
    lines = (root / "val.txt").read_text()
    (root / "val.txt").write_text(
        "\n" + lines.replace("/SegNet/CamVid/", "elsewhere/").replace("\n", "\r\n\r\n")
    )
    assert CamVid(root, "val").names == names


def test_labels_may_have_another_name_than_their_image(root: Path) -> None:
    (root / "valannot" / f"{frame('val', 1)}.png").rename(root / "valannot" / "valannot_00001.png")
    (root / "val.txt").write_text(f"/x/val/{frame('val', 1)}.png /x/valannot/valannot_00001.png\n")
    ids = arrays("val", 1)[1]
    (sample,) = CamVid(root, "val")
    np.testing.assert_array_equal(sample["labels"].numpy(), np.where(ids == 11, VOID, ids))


def test_flip_zoom_and_resize_keep_image_and_labels_together(root: Path) -> None:
    sample = CamVid(root, "train")[0]
    flipped = train_transform((HEIGHT, WIDTH), flip=1.0)(sample)
    for key in ("image", "labels"):
        assert torch.equal(flipped[key], sample[key].flip(-1))
    # an image that is the colour of its label tells whether they still lie on one another
    sample["image"][:] = (sample["labels"] == 3).float()
    larger = eval_transform((3 * HEIGHT, 3 * WIDTH))(sample)
    zoom_in = train_transform((3 * HEIGHT, 3 * WIDTH), scale=(1.5, 2.0))
    zoomed = seeded(zoom_in, sample, seed=0, epoch=0, index=0)
    for moved in (larger, zoomed):
        assert moved["image"].shape == (3, 3 * HEIGHT, 3 * WIDTH)
        assert moved["labels"].shape == (3 * HEIGHT, 3 * WIDTH)
        agree = (moved["image"][0] > 0.5) == (moved["labels"] == 3)
        assert agree.float().mean() > 0.95
        assert set(moved["labels"].unique().tolist()) <= {*range(11), VOID}


def test_preloaded_and_by_workers_it_is_the_same(root: Path) -> None:
    dataset = CamVid(root, "train")
    kept = Preloaded(dataset)
    batches = list(loader(dataset, batch_size=4, shuffle=False, seed=0, workers=2))
    for key in ("image", "labels"):
        here = torch.stack([sample[key] for sample in dataset])
        assert torch.equal(torch.cat([batch[key] for batch in batches]), here)
        assert torch.equal(torch.stack([kept[index][key] for index in range(7)]), here)


def test_unknown_split(root: Path) -> None:
    with pytest.raises(ValueError, match=r"one of \['train', 'val', 'test'\], but got 'validation'"):
        CamVid(root, "validation")


def test_missing_list_says_what_is_expected_and_what_is_there(root: Path) -> None:
    (root / "outer" / "CamVid").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"no .*train.txt: .*beside the folders train and trainannot.*\['CamVid'\]"
    ):
        CamVid(root / "outer", "train")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        CamVid(root / "nowhere", "train")


def test_empty_list(root: Path) -> None:
    (root / "train.txt").write_text(" \n\n")
    with pytest.raises(
        ValueError, match=r"for each image in .*train.txt, but it is empty: take the official"
    ):
        CamVid(root, "train")


@pytest.mark.parametrize(
    "line",
    [
        "/SegNet/CamVid/train/a.png",
        "/SegNet/CamVid/test/a.png /SegNet/CamVid/testannot/a.png",
        "/SegNet/CamVid/trainannot/a.png /SegNet/CamVid/train/a.png",
        "/my files/train/a.png /my files/trainannot/a.png",
        "a.png a.png",
    ],
)
def test_line_that_is_no_pair_of_the_split_is_quoted(root: Path, line: str) -> None:
    path = root / "train.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"line 8 of .*train.txt .*/trainannot/NAME.png, but got '{line}'"):
        CamVid(root, "train")


def test_list_that_is_no_text(root: Path) -> None:
    (root / "train.txt").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match=r"expected line 1 of .*train.txt to be an image and its labels"):
        CamVid(root, "train")


@pytest.mark.parametrize("folder", ["test", "testannot"])
def test_missing_file_of_a_list_is_named(root: Path, folder: str) -> None:
    path = root / folder / f"{frame('test', 1)}.png"
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"1 of 6 files are missing, the first is {path}: .*test.txt"
    ):
        CamVid(root, "test")


@pytest.mark.parametrize("folder", ["train", "trainannot"])
def test_truncated_file_is_named(root: Path, folder: str) -> None:
    dataset = CamVid(root, "train")
    path = root / folder / f"{dataset.names[0]}.png"
    for length in (len(path.read_bytes()) // 2, 10):
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(OSError, match=rf"{path} cannot be decoded.*truncated"):
            dataset[0]


def test_other_size_and_coloured_labels_name_both_files(root: Path) -> None:
    dataset = CamVid(root, "train")
    picture, path = root / "train" / f"{dataset.names[0]}.png", annotation(root, dataset)
    for shape in ((9, 12), (HEIGHT, WIDTH, 3)):
        write(path, np.ones(shape, np.uint8))
        got = str(shape).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=rf"{path} to be one channel.*{picture}, \(18, 24\).*got {got}"):
            dataset[0]


def test_label_out_of_range_names_file_and_value(root: Path) -> None:
    dataset = CamVid(root, "train")
    ids = np.ones((HEIGHT, WIDTH), np.uint8)
    ids[0, 0] = 12
    path = write(annotation(root, dataset), ids)
    with pytest.raises(ValueError, match=rf"ids 0 to 11 in {path}, but got 12: .*11 is void"):
        dataset[0]


# --- the real files ---------------------------------------------------------------------------------------


@pytest.fixture
def camvid(real_data: Path) -> Path:
    if not (real_data / "camvid").is_dir():
        pytest.skip("needs CamVid: the folder camvid of the real data")
    return real_data / "camvid"


@pytest.mark.data
def test_real_splits_are_those_of_the_lists_and_disjoint(camvid: Path) -> None:
    splits = {split: CamVid(camvid, split) for split in SPLITS}
    for split, dataset in splits.items():
        assert len(dataset) == len((camvid / f"{split}.txt").read_text().split()) // 2
    names = [name for dataset in splits.values() for name in dataset.names]
    assert len(set(names)) == len(names)
    # train comes from three films; mixed, so do its first twenty
    assert {name[:6] for name in splits["train"].names[:20]} == {"0001TP", "0006R0", "0016E5"}


@pytest.mark.data
@pytest.mark.parametrize("split", SPLITS)
def test_real_values_are_sane(camvid: Path, split: str) -> None:
    shares, rows = torch.zeros(256), torch.zeros(256)
    for sample in CamVid(camvid, split):
        assert sample["image"].shape == (3, 360, 480)
        assert sample["labels"].shape == (360, 480)
        assert 0 <= sample["image"].min() < 0.1
        assert 0.9 < sample["image"].max() <= 1
        ids = sample["labels"].flatten()
        shares += torch.bincount(ids, minlength=256)
        height = torch.arange(360.0).repeat_interleave(480)
        rows += torch.bincount(ids, weights=height, minlength=256)
    height = dict(zip(CLASSES, (rows / shares).tolist(), strict=False))
    shares /= shares.sum()
    assert (shares[:11] > 0).all()
    assert shares[11:VOID].sum() == 0
    assert 0 < shares[VOID] < 0.06
    share = dict(zip(CLASSES, shares.tolist(), strict=False))
    assert share["road"] > 0.2
    assert share["building"] > 0.15
    assert share["pole"] < 0.03
    assert height["sky"] < height["tree"] < height["car"] < height["road"]
    assert height["sky"] < height["building"] < height["pedestrian"] < height["road"]


def test_a_recipe_takes_unlabelled_images_from_cityscapes(root: Path) -> None:
    data = CamVidData(str(root), (6, 8))
    assert [len(data.part(part)) for part in ("labelled", "validation", "test")] == [
        len(CamVid(root, split)) for split in ("train", "val", "test")
    ]
    assert set(data.part("labelled")[0]) == {"image", "labels"}
    assert data.labels() == (len(CamVid(root, "train")),) * 2
    assert len(data.teaching(1)) == 1
    with pytest.raises(ValueError, match="street_root"):
        data.part("unlabelled")
    street = root / "street" / "leftImg8bit" / "train" / "ulm"
    street.mkdir(parents=True)
    write(street / "ulm_000000_000019_leftImg8bit.png", np.zeros((8, 16, 3), np.uint8))
    (sample,) = replace(data, street_root=str(root / "street")).part("unlabelled")
    assert set(sample) == {"image"}
    assert sample["image"].shape == (3, 6, 8)
