"""Procedural rooms: the same everywhere, truthfully annotated, and cached without surprises.

`rooms_manifest.json` holds what a few rooms must look like. After a wanted change of the rooms:

    python -m tests.test_rooms
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from kamal_lib.data import shards
from kamal_lib.data.scenes import CLASSES, render, sample_scene
from kamal_lib.data.shading import VOID
from kamal_lib.data.synthetic import SPLITS, Rooms, room_seed
from kamal_lib.sample import Depth, Normals

MANIFEST = Path(__file__).with_name("rooms_manifest.json")
ROOMS = [(0, 48, 64, 2), (1, 48, 64, 1), (2, 96, 128, 1), (3_000_007, 30, 44, 3), (3_999_999_999, 33, 47, 2)]


def describe(seed: int, height: int, width: int, supersample: int) -> dict:
    """What the manifest keeps of a room: digests of the bytes, and some of the numbers."""
    scene = sample_scene(seed)
    room = render(scene, height, width, supersample=supersample)
    return {
        "room": [seed, height, width, supersample],
        "scene": hashlib.sha256(repr(scene).encode()).hexdigest(),
        **{key: hashlib.sha256(room[key].tobytes()).hexdigest() for key in ("image", "labels")},
        "depth": np.round(room["depth"][2::7, 3::9].astype(float), 6).tolist(),
        "normals": np.round(room["normals"][:, 2::7, 3::9].astype(float), 6).tolist(),
    }


# --- the rooms themselves --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(ROOMS)))
def test_rooms_are_those_of_the_manifest(number):
    manifest = json.loads(MANIFEST.read_text())
    expected, found = manifest["rooms"][number], describe(*ROOMS[number])
    assert found["room"] == expected["room"]
    assert found["scene"] == expected["scene"]
    for key in ("depth", "normals"):
        np.testing.assert_allclose(found[key], expected[key], atol=1e-4)
    if np.__version__ != manifest["numpy"]:
        pytest.skip(f"bytes are compared with NumPy {manifest['numpy']} only, this is {np.__version__}")
    assert found["labels"] == expected["labels"]
    assert found["image"] == expected["image"]


def test_same_seed_same_bytes_and_another_seed_another_room():
    first, again, other = (render(sample_scene(seed), 24, 32, supersample=2) for seed in (5, 5, 6))
    for key, value in first.items():
        assert value.tobytes() == again[key].tobytes(), key
    assert first["image"].tobytes() != other["image"].tobytes()


@pytest.fixture(scope="module")
def many() -> list[dict[str, np.ndarray]]:
    return [render(sample_scene(seed), 48, 64) for seed in range(500, 570)]


def test_every_class_is_common_enough(many):
    labels = np.stack([room["labels"] for room in many])
    assert labels.max() < len(CLASSES)
    counts = np.stack([np.bincount(each.ravel(), minlength=len(CLASSES)) for each in labels])
    share = dict(zip(CLASSES, counts.sum(0) / counts.sum(), strict=True))
    assert min(share.values()) > 0.007, share
    assert share["wall"] < 0.45
    assert ((counts > 0).mean(0) > 0.2).all()


def test_depth_is_that_of_a_room(many):
    depth = np.stack([room["depth"] for room in many])
    assert depth.min() > 0.2
    assert depth.max() < 9
    assert 2 < np.median(depth) < 4


def test_floor_lies_flat_below_the_camera():
    """Closed form: the floor's points are one camera height below the camera, its normals point up."""
    scene = sample_scene(12)
    room = render(scene, 48, 64)
    bare = replace(scene, things=tuple(t for t in scene.things if t.label in ("floor", "wall", "ceiling")))
    bare = replace(bare, things=tuple(t for t in bare.things if t.parts[0].shape == "rectangle"))
    room = render(bare, 48, 64)
    focal = scene.camera.focal * 64
    x, y = np.meshgrid((np.arange(64) + 0.5 - 32) / focal, (np.arange(48) + 0.5 - 24) / focal)
    points = np.stack([x, y, np.ones_like(x)]) * room["depth"]
    on_floor = room["labels"] == CLASSES.index("floor")
    assert on_floor.sum() > 100
    up = room["normals"][:, on_floor].T
    np.testing.assert_allclose((points[:, on_floor].T * up).sum(1), -scene.camera.position[2], atol=1e-4)
    pitch, roll = np.radians((scene.camera.pitch, scene.camera.roll))
    expected = (-np.cos(pitch) * np.sin(roll), -np.cos(pitch) * np.cos(roll), np.sin(pitch))
    np.testing.assert_allclose(up, np.broadcast_to(expected, up.shape), atol=1e-5)


def test_supersampling_changes_the_image_only():
    scene = sample_scene(3)
    one, three = (render(scene, 24, 32, supersample=n) for n in (1, 3))
    for key in ("labels", "depth", "normals", "boxes", "box_labels"):
        np.testing.assert_array_equal(one[key], three[key])
    difference = one["image"].astype(int) - three["image"]
    assert 0 < np.abs(difference).mean() < 20


def test_supersampling_averages_light():
    """Without noise, an image of 2 × 2 rays is the mean of the light of one at twice the size."""
    scene = replace(sample_scene(4), noise=0.0, exposure=0.3, lights=())
    small, large = render(scene, 24, 32, supersample=2), render(scene, 48, 64)
    light = (large["image"] / 255.0) ** 2
    expected = 255 * np.sqrt(light.reshape(24, 2, 32, 2, 3).mean((1, 3)))
    np.testing.assert_allclose(small["image"], expected, atol=2)


def test_shadow_falls_below_a_table():
    """Under the lamp a table top is bright, and the floor beneath it darker than without the table."""
    scene = sample_scene(7)
    shell = tuple(t for t in scene.things if t.parts[0].shape == "rectangle")
    camera = replace(scene.camera, position=(1.0, 0.3, 1.5), yaw=-20.0, pitch=-30.0, roll=0.0)
    lamp = replace(scene.lights[0], position=(1.8, 2.0, 2.3))
    scene = replace(scene, camera=camera, lights=(lamp,), noise=0.0)
    part = replace(shell[0].parts[0], shape="box", half=(0.5, 0.4, 0.02), stripes=(0.0, 0.0, 0.0))
    table = replace(shell[0], label="table", position=(1.8, 2.0, 0.9), parts=(part,))
    without, with_table = (render(replace(scene, things=shell + more), 48, 64) for more in ((), (table,)))
    floor = (with_table["labels"] == CLASSES.index("floor")) & (without["labels"] == CLASSES.index("floor"))
    ratio = with_table["image"][floor].mean(-1) / np.maximum(without["image"][floor].mean(-1), 1)
    assert ratio.min() < 0.8
    assert np.median(ratio) == pytest.approx(1, abs=0.02)


def test_boxes_enclose_their_pixels_tightly(many):
    """Of a scene without neighbours of the same class, the box is the extent of the label."""
    checked = 0
    for room in many:
        height, width = room["labels"].shape
        assert len(room["boxes"]) == len(room["box_labels"])
        for (left, top, right, bottom), label in zip(room["boxes"], room["box_labels"], strict=True):
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert CLASSES[label] not in ("floor", "wall", "ceiling")
            inside = room["labels"][int(top) : int(bottom), int(left) : int(right)] == label
            for border in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert border.any()
            if (room["box_labels"] == label).sum() == 1:
                outside = (room["labels"] == label).sum() - inside.sum()
                checked += outside < 8  # an instance too small for a box may lie elsewhere
    assert checked > 150


def test_an_open_room_shows_void():
    scene = sample_scene(9)
    room = render(replace(scene, things=tuple(t for t in scene.things if t.label != "wall")), 24, 32)
    nothing = room["labels"] == VOID
    assert nothing.sum() > 50
    assert (room["depth"][nothing] == 0).all()
    assert (room["normals"][:, nothing] == 0).all()
    assert (room["image"][nothing] < 30).all()


# --- the data set ----------------------------------------------------------------------------------------


SMALL = {"height": 12, "width": 16, "supersample": 1, "workers": 1}


def quiet(line: str) -> None:
    pass


def test_samples_keep_the_contract(tmp_path):
    rooms = Rooms("labelled", 3, height=24, width=32, folder=tmp_path, progress=quiet)
    assert len(rooms) == 3
    sample = rooms[2]
    kinds = {
        "image": (tv_tensors.Image, torch.float32, (3, 24, 32)),
        "labels": (tv_tensors.Mask, torch.int64, (24, 32)),
        "depth": (Depth, torch.float32, (24, 32)),
        "normals": (Normals, torch.float32, (3, 24, 32)),
    }
    assert set(sample) == {*kinds, "boxes", "box_labels"}
    for key, (kind, dtype, shape) in kinds.items():
        assert (type(sample[key]), sample[key].dtype, tuple(sample[key].shape)) == (kind, dtype, shape)
    expected = render(sample_scene(room_seed(0, "labelled", 2)), 24, 32, supersample=2)
    image = torch.from_numpy(expected["image"]).permute(2, 0, 1)
    torch.testing.assert_close(sample["image"].as_subclass(torch.Tensor), image / 255)
    for key in ("labels", "depth", "normals", "boxes", "box_labels"):
        np.testing.assert_array_equal(sample[key].numpy(), expected[key])
    assert isinstance(sample["boxes"], tv_tensors.BoundingBoxes)
    assert sample["boxes"].canvas_size == (24, 32)


def test_samples_are_copies(tmp_path):
    rooms = Rooms("test", 1, **SMALL, folder=tmp_path, progress=quiet)
    for value in rooms[0].values():
        value.zero_()
    assert all(value.any() for key, value in rooms[0].items() if key != "labels")


def test_unlabelled_means_unlabelled(tmp_path):
    rooms = Rooms("unlabelled", 2, **SMALL, folder=tmp_path, progress=quiet)
    assert set(rooms[0]) == {"image"}
    (file,) = tmp_path.rglob("*.npz")
    with np.load(file) as stored:
        assert stored.files == ["image"]


def test_annotation_of_unlabelled_rooms_is_opened_only_where_asked(tmp_path):
    """The same images with the annotation that the scene gives; what was closed stays closed, on disk too."""
    closed, opened, again = (
        Rooms("unlabelled", 3, **SMALL, annotated=annotated, folder=tmp_path, progress=quiet)
        for annotated in (False, True, None)
    )
    for i in range(3):
        expected = render(sample_scene(room_seed(0, "unlabelled", i)), 12, 16)
        assert set(closed[i]) == set(again[i]) == {"image"}
        assert set(opened[i]) == {"image", "labels", "depth", "normals", "boxes", "box_labels"}
        for key in ("labels", "depth", "normals", "boxes", "box_labels"):
            np.testing.assert_array_equal(opened[i][key].numpy(), expected[key])
        assert torch.equal(opened[i]["image"], closed[i]["image"])
        assert torch.equal(again[i]["image"], closed[i]["image"])
    files = {file.name.startswith("unlabelled-annotated-"): file for file in tmp_path.rglob("*.npz")}
    assert len(list(tmp_path.rglob("*.npz"))) == 2  # None opened the file of False
    with np.load(files[False]) as stored:
        assert stored.files == ["image"]
    with np.load(files[True]) as stored:
        assert {"labels", "depth", "normals"} <= set(stored.files)


@pytest.mark.parametrize("split", ["labelled", "validation", "test"])
def test_a_labelled_room_may_be_had_without_annotation(split, tmp_path):
    bare, usual, asked, again = (
        Rooms(split, 1, **SMALL, annotated=annotated, folder=tmp_path, progress=quiet)
        for annotated in (False, None, True, False)
    )
    assert set(bare[0]) == set(again[0]) == {"image"}
    assert "labels" in usual[0]
    assert torch.equal(bare[0]["image"], usual[0]["image"])
    assert contents(usual) == contents(asked)


def test_rooms_alone_are_flipped_with_their_normals(tmp_path):
    """Nobody has imported the transforms: the data set itself teaches v2 how depth and normals move."""
    Rooms("test", 1, **SMALL, folder=tmp_path, progress=quiet)
    code = """
import sys
from torchvision.transforms import v2
from kamal_lib.data.synthetic import Rooms

sample = Rooms("test", 1, height=12, width=16, supersample=1, folder=sys.argv[1])[0]
flipped = v2.RandomHorizontalFlip(1.0)(sample)
normals = sample["normals"].flip(-1)
normals[0] *= -1
assert sample["normals"].any() and (flipped["normals"] == normals).all()
assert (flipped["depth"] == sample["depth"].flip(-1)).all()
assert type(flipped["normals"]) is type(sample["normals"])
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    assert run.returncode == 0, run.stderr


def test_splits_and_worlds_are_disjoint(tmp_path):
    last = 999_999
    seeds = [room_seed(world, split, i) for world in (0, 1, 999) for split in SPLITS for i in (0, 1, last)]
    assert len(set(seeds)) == len(seeds)
    assert sorted(seeds) == seeds  # so whatever lies between the ends of a range is no one else's
    images = [
        Rooms(split, 2, **SMALL, world=world, folder=tmp_path, progress=quiet)[i]["image"].numpy().tobytes()
        for world in (0, 1)
        for split in SPLITS
        for i in (0, 1)
    ]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "train"}, "expected one of labelled, unlabelled, validation, test"),
        ({"count": 0}, "count of 1 to 1000000 rooms, got 0"),
        ({"count": 1_000_001}, "count of 1 to 1000000 rooms, got 1000001"),
        ({"world": 1000}, "world from 0 to 999, got 1000"),
        ({"world": -1}, "world from 0 to 999, got -1"),
        ({"height": 0}, "at least 1, got 0, 16 and 1"),
        ({"supersample": 0}, "at least 1, got 12, 16 and 0"),
    ],
)
def test_bad_input_is_refused(wrong, message, tmp_path):
    options = {"split": "test", "count": 1, **SMALL, **wrong}
    with pytest.raises(ValueError, match=message):
        Rooms(options.pop("split"), options.pop("count"), **options, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="rooms 0 to 999999, got index 1000000"):
        room_seed(0, "test", 1_000_000)
    with pytest.raises(ValueError, match="at least 1, got 0, 4 and 1"):
        render(sample_scene(0), 0, 4)


# --- the cache -------------------------------------------------------------------------------------------


@pytest.fixture
def few_a_shard(monkeypatch):
    monkeypatch.setattr("kamal_lib.data.synthetic.SHARD", 4)


def contents(rooms: Rooms) -> list[bytes]:
    return [value.numpy().tobytes() for i in range(len(rooms)) for value in rooms[i].values()]


@pytest.mark.usefixtures("few_a_shard")
def test_only_missing_shards_are_rendered(tmp_path):
    said: list[str] = []

    def load(count: int) -> Rooms:
        return Rooms("labelled", count, **SMALL, folder=tmp_path, progress=said.append)

    rooms = load(8)
    first = contents(rooms)
    for i in (0, 5):
        expected = render(sample_scene(room_seed(0, "labelled", i)), 12, 16)
        np.testing.assert_array_equal(rooms[i]["depth"].numpy(), expected["depth"])
    assert len(said) == 1
    assert said[0].startswith("rooms: 8 labelled rendered in ")
    assert contents(load(8)) == first
    assert len(said) == 1  # all was there: nothing said
    assert contents(load(12))[: len(first)] == first
    assert said[1].startswith("rooms: 4 labelled")
    files = sorted(tmp_path.rglob("*.npz"))
    files[1].unlink()
    assert contents(load(8)) == first
    assert said[2].startswith("rooms: 4 labelled")
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.usefixtures("few_a_shard")
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_damaged_shard_is_found_said_and_rendered_again(damage, tmp_path):
    good = contents(Rooms("labelled", 8, **SMALL, folder=tmp_path, progress=quiet))
    file = sorted(tmp_path.rglob("*.npz"))[1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "empty": b"", "text": b"hello"}[damage])
    with pytest.warns(UserWarning, match="is damaged .* rendered again"):
        again = Rooms("labelled", 8, **SMALL, folder=tmp_path, progress=quiet)
    assert contents(again) == good
    assert contents(Rooms("labelled", 8, **SMALL, folder=tmp_path, progress=quiet)) == good


def test_another_size_or_source_is_another_cache(tmp_path, monkeypatch):
    said: list[str] = []
    for change in ({}, {"height": 13}, {"supersample": 2}, {"world": 1}):
        Rooms("test", 1, **{**SMALL, **change}, folder=tmp_path, progress=said.append)
    monkeypatch.setattr("kamal_lib.data.synthetic.fingerprint", lambda: "0" * 64)
    Rooms("test", 1, **SMALL, folder=tmp_path, progress=said.append)
    assert len(said) == 5


def test_fingerprint_follows_the_sources(tmp_path, monkeypatch):
    for file in Path(shards.__file__).parent.glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(shards, "__file__", str(tmp_path / "shards.py"))
    before = shards.fingerprint()
    scenes = tmp_path / "scenes.py"
    scenes.write_bytes(scenes.read_bytes().replace(b"\n", b"\r\n"))
    assert shards.fingerprint() == before
    scenes.write_bytes(scenes.read_bytes() + b"\r\nx = 1\r\n")
    assert shards.fingerprint() != before


@pytest.mark.usefixtures("few_a_shard")
def test_processes_render_the_same_bytes(tmp_path):
    alone, together = (
        contents(Rooms("labelled", 8, **{**SMALL, "workers": n}, folder=tmp_path / str(n), progress=quiet))
        for n in (1, 2)
    )
    assert alone == together


@pytest.mark.usefixtures("few_a_shard")
def test_two_at_once_share_a_cache(tmp_path):
    def build(_: int) -> list[bytes]:
        return contents(Rooms("labelled", 8, **SMALL, folder=tmp_path, progress=quiet))

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(build, range(2))
    assert one == other
    assert len(list(tmp_path.rglob("*"))) == 3  # a folder and two shards, no parts


def test_a_failing_worker_is_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    jobs = [shards.Job(str(tmp_path / "file" / f"{i}.npz"), i, 1, 6, 8, 1, True) for i in range(2)]
    with pytest.raises(RuntimeError, match=r"rendering .*\.npz failed in a worker: \w*Error"):
        shards.render_shards(jobs, workers=2)


def test_workers_do_without_torch():
    code = "import sys, kamal_lib.data.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_leaves_a_valid_cache(tmp_path):
    code = """
import sys
from kamal_lib.data.shards import Job, render_shards
render_shards([Job(f"{sys.argv[1]}/{i:03d}.npz", 10 * i, 10, 12, 16, 1, True) for i in range(200)], 2)
"""
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while not list(tmp_path.glob("*.npz")):
        assert run.poll() is None
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    done: list[Path] = []
    while (found := sorted(tmp_path.glob("*.npz"))) != done:  # its workers end with the shard they are at
        done = found
        time.sleep(0.5)
    assert 0 < len(done) < 200
    for file in done:
        job = shards.Job(str(file), 10 * int(file.stem), 10, 12, 16, 1, True)
        arrays = shards.read_shard(job)  # a damaged one would warn, and warnings are errors
        assert arrays is not None
        expected = render(sample_scene(job.seed + 3), 12, 16)["image"]
        np.testing.assert_array_equal(arrays["image"][3], expected)


if __name__ == "__main__":
    rooms = [json.dumps(describe(*room)) for room in ROOMS]
    lines = ",\n  ".join(rooms)
    MANIFEST.write_text(f'{{"numpy": "{np.__version__}", "rooms": [\n  {lines}\n]}}\n')


def test_what_a_kill_left_long_ago_is_removed(tmp_path):
    """A half-written shard of an hour ago goes; one of a moment ago may be another process at work."""
    rooms = {"height": 6, "width": 8, "folder": tmp_path, "workers": 1}
    Rooms("test", 1, **rooms)
    (place,) = tmp_path.iterdir()
    old, new = place / ".old.part", place / ".new.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 4000,) * 2)
    Rooms("validation", 1, **rooms)
    assert not old.exists()
    assert new.exists()


def test_a_store_that_cannot_be_written_says_which_and_what_to_do(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"cannot write rooms to .*No space left.*KAMAL_STORE"):
        Rooms("test", 1, height=6, width=8, folder=tmp_path, workers=1)
    assert not list(tmp_path.rglob("*.npz"))
    assert not list(tmp_path.rglob("*.part"))
