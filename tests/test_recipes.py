"""From recipe to trained network: parents, keys, resumption, and what a run may look at."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kamal_lib import recipes
from kamal_lib.artifacts import key, load_or_train
from kamal_lib.data.synthetic import Rooms
from kamal_lib.distill.amalgamation import branch_points
from kamal_lib.metrics import resampled
from kamal_lib.recipes import (
    BranchedStudent,
    ImageScores,
    NYUv2Data,
    StudentBlock,
    label_curve,
    task_teachers,
    whole_game,
)
from kamal_lib.recipes import __main__ as command
from kamal_lib.recipes import amalgamation as stages
from kamal_lib.studies import of_task


@pytest.fixture(scope="module")
def game():
    return whole_game("smoke")


@pytest.fixture(scope="module")
def finished(game, tmp_path_factory):
    """The smoke run, trained once for the tests of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAMAL_STORE", str(tmp_path_factory.mktemp("finished")))
        store = recipes.default_store()
        artifacts = [
            load_or_train(r, store) for r in (*game.teachers.values(), *game.blocks, game.target_net)
        ]
        yield store, artifacts


def test_the_whole_game_at_smoke(game, finished):
    store, (*_, last, target) = finished
    assert [len(v) for v in last.metrics["losses"].values()] == [4, 4]
    assert set(target.metrics["branch_points"].values()) <= {3, 4}
    assert {"miou", "pixel_acc", "abs_rel", "sqr_rel", "delta1"} <= set(target.metrics["test"])
    network = game.target_net.build(target.weights(), target.metrics)
    assert not network.training
    assert network.branch_points == target.metrics["branch_points"]
    before = time.monotonic()
    assert load_or_train(game.target_net, store, progress=lambda _: pytest.fail("trained again")) == target
    assert time.monotonic() - before < 5


def test_saved_and_loaded_predicts_the_same(game, finished):
    _, (*_, target) = finished
    image = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    first, second = (game.target_net.build(target.weights(), target.metrics) for _ in range(2))
    a, b = first(image), second(image)
    assert a.keys() == b.keys() == game.teachers.keys()
    assert all(torch.equal(a[task], b[task]) for task in a)


def test_earlier_blocks_stay_as_they_were(game, finished):
    """Block n's artefact holds blocks 1..n−1 exactly as block n−1's did, norm statistics included."""
    _, (_, _, *blocks, _) = finished
    for n, (before, after) in enumerate(pairwise(blocks), 1):
        one, two = before.weights(), after.weights()
        for name, value in one.items():
            index = name.split(".")
            if index[0] == "student" and int(index[2]) < n:
                assert torch.equal(value, two[name]), name
        assert any(not torch.equal(one[k], two[k]) for k in one if k.startswith(f"student.blocks.{n}."))


def test_the_student_starts_where_its_recipe_says(game, finished):
    _, (segnet, _, first, *_) = finished
    weights = first.weights()
    for name, value in segnet.weights().items():
        if name.startswith("blocks.3."):  # a block that is not trained yet
            assert torch.equal(weights[f"student.{name}"], value)


def test_predictions_are_the_teachers(game, finished):
    store, (segnet, *_) = finished
    stored = load_or_train(recipes.Predictions(game.teachers["segmentation"], "validation"), store).weights()
    network = game.teachers["segmentation"].build(segnet.weights(), segnet.metrics)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAMAL_STORE", str(store))
        part = game.data.part("validation")
    for index in range(len(part)):
        with torch.no_grad():
            own = network(part[index]["image"][None])["segmentation"].argmax(1)[0]
        assert float((own == stored["labels"][index]).float().mean()) > 0.999


def test_sigkill_in_any_stage_then_the_same_weights(game, finished, tmp_path):
    """Killed in the middle of three stages, one after the other: at the end the bytes of an unbroken run."""
    environment = os.environ | {"KAMAL_STORE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    code = (
        "import sys, torch; torch.set_num_threads(2)\n"
        "from kamal_lib import engine\n"
        "from kamal_lib.recipes import __main__ as command\n"
        "real = engine.save_progress\n"
        "def slow(path, objective, optimizer, step, *rest):\n"
        "    real(path, objective, optimizer, step, *rest)\n"
        "    if step and sys.argv[1] in str(path): print('saved', flush=True); input()\n"
        "engine.save_progress = slow\n"
        "engine.fit.__kwdefaults__['save_every'] = 0.0\n"
        "command.main(['target_net', '--profile', 'smoke'])\n"
    )
    for stage in ("segmentation-teacher", "student-block-02", "target-net-2"):
        with subprocess.Popen(
            [sys.executable, "-c", code, stage],
            env=environment,
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == "saved":
                    break
            process.send_signal(signal.SIGKILL)
        assert list(tmp_path.glob(f".{stage}*.work/training.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAMAL_STORE", str(tmp_path))
        torch.set_num_threads(2)
        again = recipes.trained(game.target_net)
    expected = finished[1][-1].weights()
    assert all(torch.equal(value, expected[name]) for name, value in again.weights().items())


# --- keys and options ---------------------------------------------------------------------------------------


def test_a_seed_redraws_everything():
    one, two = whole_game("smoke", seed=0), whole_game("smoke", seed=1)
    assert one.data.world != two.data.world
    for a, b in zip(
        (*one.teachers.values(), *one.blocks), (*two.teachers.values(), *two.blocks), strict=True
    ):
        assert key(a) != key(b)


def test_options_of_the_student_leave_the_teachers_alone(game):
    plan = game.target_net.amalgamation
    other = BranchedStudent(replace(plan, start="common"), game.target_net.fine_tuning)
    assert key(other) != key(game.target_net)
    assert other.amalgamation.teachers == plan.teachers
    assert key(StudentBlock(1, replace(plan, gain=1.0))) != key(game.blocks[0])


def test_the_profile_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("KAMAL_PROFILE", "smoke")
    assert whole_game() == whole_game("smoke")
    monkeypatch.delenv("KAMAL_PROFILE")
    assert whole_game() == whole_game("quick")


def test_the_papers_network_and_schedule_at_gpu():
    plan = whole_game("gpu").target_net.amalgamation
    assert plan.blocks.epochs == 2
    assert plan.blocks.batch_size == 8
    assert len(plan.teachers[0].start.architecture.widths) == 5
    assert plan.blocks.device == "gpu"


def test_unlabelled_means_unlabelled(game):
    assert isinstance(game.data.part("unlabelled"), Rooms)
    assert set(game.data.part("unlabelled")[0]) == {"image"}


def poisoned(sample):
    """The same image with labels, depth and normals that are wrong."""
    wrong = {"labels": lambda t: (t + 5) % 13, "depth": lambda t: t * 0 + 9, "normals": lambda t: -t}
    return sample | {key: wrong[key](sample[key]) for key in wrong if key in sample}


def only(monkeypatch, finished, tmp_path, parts, keep):
    """A store with the finished artefacts named in `keep`; rooms that are not named cannot be opened.

    `parts` says of each split that may be opened whether its annotation is wrong; "unlabelled" is opened
    without any, "opened" stands for unlabelled rooms with their annotation.
    """
    for entry in finished[0].iterdir():
        if entry.name.startswith(keep):
            shutil.copytree(entry, tmp_path / entry.name)

    class Guarded(Rooms):
        def __init__(self, split, count, *, annotated, **options):
            name = "opened" if split == "unlabelled" and annotated else split
            assert name in parts, f"this stage must not open {name!r}"
            super().__init__(split, count, annotated=annotated, **options)
            self.wrong = parts[name]

        def __getitem__(self, index):
            return poisoned(super().__getitem__(index)) if self.wrong else super().__getitem__(index)

    monkeypatch.setenv("KAMAL_STORE", str(tmp_path))
    monkeypatch.setattr(recipes.data, "Rooms", Guarded)


def test_no_label_reaches_the_student_or_eq_7(game, finished, tmp_path, monkeypatch):
    """With labelled and test images out of reach and all other labels wrong, the student is the same."""
    keep = ("common", "segmentation", "depth", "rooms")
    only(monkeypatch, finished, tmp_path, {"unlabelled": True, "validation": True}, keep)
    monkeypatch.setattr(stages, "scores", lambda *_: {})
    *_, last, target = finished[1]
    again = recipes.trained(game.target_net)
    assert recipes.trained(game.blocks[-1]).metrics == last.metrics
    assert again.metrics["branch_points"] == target.metrics["branch_points"]
    assert all(torch.equal(v, target.weights()[name]) for name, v in again.weights().items())


def test_a_teacher_learns_from_the_labelled_part_only(game, finished, tmp_path, monkeypatch):
    """Wrong labels of the images that it is measured on change its scores, and nothing else."""
    parts = {"labelled": False, "validation": True, "test": True}
    only(monkeypatch, finished, tmp_path, parts, ("common", "rooms"))
    again = recipes.trained(game.teachers["depth"])
    assert all(torch.equal(v, finished[1][1].weights()[name]) for name, v in again.weights().items())
    assert again.metrics["test"] != finished[1][1].metrics["test"]


def test_only_a_teacher_with_more_labels_opens_unlabelled_rooms(game, finished, tmp_path, monkeypatch):
    """And it learns from what it finds there: wrong labels in them make another teacher."""
    more, found = replace(game.teachers["depth"], labels=12), []
    parts = {"labelled": False, "opened": False, "validation": False, "test": False}
    for wrong in (False, True):
        store = tmp_path / str(wrong)
        store.mkdir()
        only(monkeypatch, finished, store, parts | {"opened": wrong}, ("common", "rooms"))
        found.append(recipes.trained(more).weights())
    assert any(not torch.equal(value, found[1][name]) for name, value in found[0].items())


# --- numbers of labels --------------------------------------------------------------------------------------


@pytest.fixture
def here(finished, monkeypatch):
    """The store of the finished run, as the default one."""
    monkeypatch.setenv("KAMAL_STORE", str(finished[0]))


def images(dataset) -> list[torch.Tensor]:
    return [dataset[i]["image"] for i in range(len(dataset))]


def same(first, second) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.usefixtures("here")
def test_fewer_labels_are_the_first_of_more(game):
    """Labelled rooms first, then the first unlabelled ones with their annotation."""
    data = game.data
    assert data.labels() == (8, 16)
    everything = images(data.teaching(16))
    for count in (1, 4, 8, 12, 16):
        taught = data.teaching(count)
        assert len(taught) == count
        assert same(images(taught), everything[:count])
        assert {"image", "labels", "depth", "normals"} <= set(taught[count - 1])
    assert same(images(data.teaching(None)), images(data.part("labelled")))
    assert same(everything, images(data.part("labelled")) + images(data.part("unlabelled")))


@pytest.mark.parametrize("labels", [0, -1, 17])
def test_labels_that_are_not_there(game, labels):
    with pytest.raises(ValueError, match=f"labels must be a number of images from 1 to 16, got {labels}"):
        game.data.teaching(labels)


def test_fewer_labels_of_nyuv2_are_the_first_of_more(tmp_path):
    """On sixteen miniature pictures, whose sizes of parts follow from the portions."""
    for kind, shape in (("image", (24, 32, 3)), ("seg40", (24, 32)), ("depth", (24, 32))):
        for folder, numbers in (("train", range(1, 17)), ("test", range(17, 19))):
            place = tmp_path / kind / folder
            place.mkdir(parents=True)
            for n in numbers:
                array = np.full(shape, 10 * n, np.uint16 if kind == "depth" else np.uint8)
                Image.fromarray(array % 41 if kind == "seg40" else array).save(place / f"{n:04d}.png")
    data = NYUv2Data(str(tmp_path), (24, 32))
    usual, most = data.labels()
    assert (usual, most) == (6, 14)
    everything = images(data.teaching(most))
    for count in (1, usual, usual + 2, most):
        taught = data.teaching(count)
        assert same(images(taught), everything[:count])
        assert {"image", "labels", "depth", "normals"} <= set(taught[count - 1])
    assert same(images(data.teaching(None)), images(data.part("labelled")))
    assert same(everything, images(data.part("labelled")) + images(data.part("unlabelled")))
    assert set(data.part("unlabelled")[0]) == {"image"}
    for wrong in (0, most + 1):
        with pytest.raises(ValueError, match=f"from 1 to {most}, got {wrong}"):
            data.teaching(wrong)


def steps(teacher, count: int) -> int:
    """Of a training on `count` images."""
    return teacher.schedule.epochs * math.ceil(count / teacher.schedule.batch_size)


@pytest.mark.parametrize(
    ("profile", "counts"),
    [("smoke", [4, 12, 16]), ("quick", [100, 200, 400, 800, 1400]), ("gpu", [100, 200, 400, 800, 10_800])],
)
def test_the_label_curve(profile, counts):
    """Counts in order, three tasks each, equally many steps, where it can be the profile's own teacher."""
    usual, curve = task_teachers(profile, seed=2), label_curve(profile, seed=2)
    labelled, everything = usual["depth"].data.labels()
    assert [t.task for t in curve] == ["segmentation", "depth", "normals"] * len(counts)
    for i, teacher in enumerate(curve):
        count, own = counts[i // 3], usual[teacher.task]
        assert teacher.labels == (None if count == labelled else count)
        per_epoch = math.ceil(count / teacher.schedule.batch_size)
        assert abs(steps(teacher, count) - steps(own, labelled)) < per_epoch
        assert replace(teacher, labels=None, schedule=own.schedule) == own
        assert replace(teacher.schedule, epochs=own.schedule.epochs) == own.schedule
        if count == labelled:
            assert teacher == own
            assert key(teacher) == key(own)
    assert counts[-1] == everything
    assert len({key(teacher) for teacher in curve}) == len(curve)


@pytest.mark.parametrize(("there", "counts"), [(696, [100, 200, 400, 696]), (400, [100, 200, 400])])
def test_the_label_curve_of_nyuv2_ends_where_its_images_end(there, counts, monkeypatch):
    monkeypatch.setattr(NYUv2Data, "labels", lambda _: (297, there))
    curve = label_curve("quick", data="nyuv2", data_root="somewhere")
    assert [t.labels for t in curve[::3]] == counts
    for teacher in curve:  # 30 epochs of 19 batches are usual, an epoch of all labels has 44
        assert abs(steps(teacher, teacher.labels) - 30 * 19) < 44


@pytest.mark.usefixtures("here")
def test_the_command_line_trains_the_label_curve(capsys):
    """Nine teachers and what they add up on each test image, from which their test metrics follow."""
    command.main(["label_curve", "--profile", "smoke"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " labels {" in line]
    curve = label_curve("smoke")
    assert [line.split()[:2] for line in lines] == [[t.name(), str(t.labels)] for t in curve]
    store = recipes.default_store()
    for teacher, line in zip(curve, lines, strict=True):
        trained = load_or_train(teacher, store, progress=pytest.fail)
        assert str(trained.metrics["test"]) in line
        assert len(trained.history) == teacher.schedule.epochs
        states = load_or_train(ImageScores(teacher), store, progress=pytest.fail).weights()
        metric = recipes.tasks_of(teacher.data)[teacher.task].metric()
        once = resampled(metric, of_task(states, teacher.task), torch.ones(4, dtype=torch.long))
        assert once == pytest.approx(trained.metrics["test"], rel=1e-9)


@pytest.mark.usefixtures("here")
def test_the_command_line_trains_the_teachers(capsys):
    command.main(["teachers", "--profile", "smoke"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "'test'" in line]
    teachers = task_teachers("smoke")
    assert [line.split()[0] for line in lines] == [f"{task}-teacher" for task in teachers]
    for teacher, line, score in zip(teachers.values(), lines, ("miou", "abs_rel", "angle_mean"), strict=True):
        artifact = load_or_train(teacher, recipes.default_store(), progress=pytest.fail)
        assert line.endswith(str(artifact.metrics))
        assert score in artifact.metrics["validation"]
        assert score in artifact.metrics["test"]


@pytest.mark.usefixtures("here")
def test_stored_normals_are_unit_vectors_and_the_scores_follow_from_them(game):
    """What a student would learn from: the teacher's M, image by image."""
    teacher = task_teachers("smoke")["normals"]
    predictions = recipes.trained(recipes.Predictions(teacher, "test")).weights()["normals"]
    assert predictions.shape == (4, 3, 24, 32)
    torch.testing.assert_close(predictions.norm(dim=1), torch.ones(4, 24, 32))
    metric, part = recipes.tasks_of(game.data)["normals"].metric(), game.data.part("test")
    metric.update(predictions, torch.stack([part[i]["normals"].as_subclass(torch.Tensor) for i in range(4)]))
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx(recipes.trained(teacher).metrics["test"], abs=0.02)


def test_eq_7_and_the_codings_of_each_block(game, finished):
    _, (_, _, *blocks, target) = finished
    assert target.metrics["branch_points"] == branch_points(blocks[-1].metrics["losses"])
    for n, (before, after) in enumerate(pairwise(blocks), 2):
        one, two = before.weights(), after.weights()
        gates = [name for name in one if name.split(".")[0] in game.teachers]
        assert {name.split(".")[1] for name in gates if not torch.equal(one[name], two[name])} == {str(n - 1)}


def test_the_losses_of_eq_7_are_without_weights(game, finished):
    """The student's loss of block N against the stored predictions, computed here without λ."""
    store, (segnet, depthnet, *_, last, _) = finished
    student, codings = game.blocks[-1].build(last.weights(), last.metrics)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAMAL_STORE", str(store))
        part = game.data.part("validation")
    images = torch.stack([part[i]["image"] for i in range(len(part))])
    for task, artifact in (("segmentation", segnet), ("depth", depthnet)):
        teacher = game.teachers[task].build(artifact.weights(), artifact.metrics)
        stored = load_or_train(recipes.Predictions(game.teachers[task], "validation"), store).weights()
        with torch.no_grad():
            a = student.forward_to(images, 4)
            response = teacher.forward_from(a.with_features(codings[task][3](a.features)), 4)[task]
            (target,) = stored.values()
            target = target.long() if task == "segmentation" else target
            expected = recipes.tasks_of(game.data)[task].loss(response, target)
        assert last.metrics["losses"][task][-1] == pytest.approx(float(expected), rel=1e-4)


def test_weights_that_do_not_fit_the_teachers(game):
    plan = game.target_net.amalgamation
    for wrong in ((("depth", 1.0),), (("segmentation", 0.0), ("depth", 1.0))):
        with pytest.raises(ValueError, match=r"weights must give each task .* one λ > 0"):
            replace(plan, weights=wrong)


# --- bad input ----------------------------------------------------------------------------------------------


def test_an_unknown_profile():
    with pytest.raises(ValueError, match="profile 'fast' does not exist: choose one of smoke, quick, gpu"):
        whole_game("fast")


def test_an_unknown_data_set():
    with pytest.raises(ValueError, match="data must be 'rooms' or 'nyuv2', got 'kitti'"):
        whole_game("smoke", data="kitti")


def test_nyuv2_without_a_root():
    with pytest.raises(ValueError, match="data 'nyuv2' needs data_root"):
        whole_game("smoke", data="nyuv2")


def test_a_wrong_root_is_said_before_anything_trains(tmp_path):
    with pytest.raises(FileNotFoundError, match="image"):
        whole_game("smoke", data="nyuv2", data_root=str(tmp_path)).data.part("labelled")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_gpu_profile_without_a_gpu():
    game = whole_game("gpu")
    small = replace(game.teachers["depth"], data=whole_game("smoke").data)
    with pytest.raises(RuntimeError, match="device 'gpu' was asked for, but torch sees no GPU"):
        recipes.trained(small)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_command_line_says_what_is_wrong_in_one_line(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for store, arguments, message in (
        (tmp_path / "store", ["--profile", "gpu"], "torch sees no GPU"),
        (tmp_path / "store", ["--profile", "smoke", "--data", "nyuv2"], "needs data_root"),
        (tmp_path / "file" / "store", ["--profile", "smoke"], "KAMAL_STORE"),
    ):
        monkeypatch.setenv("KAMAL_STORE", str(store))
        with pytest.raises(SystemExit) as ended:
            command.main(["target_net", *arguments])
        assert ended.value.code == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "store" / "rooms").exists()  # nothing was rendered for a GPU that is not there


def test_the_command_line_refuses_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        command.main(["teachers", "--profle", "smoke"])
    assert "--profle" in capsys.readouterr().err
