"""From recipe to trained network: parents, keys, resumption, and what a run may look at."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kamal_lib import recipes
from kamal_lib.artifacts import key, load_or_train
from kamal_lib.data.synthetic import Rooms
from kamal_lib.distill.amalgamation import branch_points
from kamal_lib.recipes import BranchedStudent, StudentBlock, whole_game
from kamal_lib.recipes import __main__ as command
from kamal_lib.recipes import amalgamation as stages


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


@pytest.mark.parametrize("stage", ["segmentation-teacher", "student-block-02", "target-net"])
def test_sigkill_in_any_stage_then_the_same_weights(stage, game, finished, tmp_path):
    """A process is killed while `stage` trains; the next run ends with the bytes of the unbroken one."""
    environment = os.environ | {"KAMAL_STORE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from kamal_lib import engine\n"
        "from kamal_lib.recipes import __main__ as command, amalgamation as stages\n"
        "real = engine.save_progress\n"
        "def slow(path, *rest):\n"
        f"    real(path, *rest)\n    if {stage!r} in str(path): print('saved', flush=True); input()\n"
        "engine.save_progress = slow\n"
        "fit = stages.fit\n"
        "stages.fit = lambda *a, **k: fit(*a, **k, save_every=0.0)\n"
        "command.main(['target_net', '--profile', 'smoke'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
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
    other = BranchedStudent(replace(plan, start="common"))
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


class Poisoned(torch.utils.data.Dataset):
    """The same images with labels and depths that are wrong."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        wrong = {"labels": lambda t: (t + 5) % 13, "depth": lambda t: t * 0 + 9, "normals": torch.zeros_like}
        return sample | {key: wrong[key](sample[key]) for key in wrong if key in sample}


def only(monkeypatch, finished, tmp_path, parts, keep):
    """A store with the finished artefacts named in `keep`; parts that are not named cannot be opened."""
    for entry in finished[0].iterdir():
        if entry.name.startswith(keep):
            shutil.copytree(entry, tmp_path / entry.name)
    part = recipes.RoomsData.part

    def guarded(self, name):
        assert name in parts, f"this stage must not open {name!r}"
        return Poisoned(part(self, name)) if parts[name] else part(self, name)

    monkeypatch.setenv("KAMAL_STORE", str(tmp_path))
    monkeypatch.setattr(recipes.RoomsData, "part", guarded)
    monkeypatch.setattr(stages, "scores", lambda *_: {})


def test_no_label_reaches_the_student_or_eq_7(game, finished, tmp_path, monkeypatch):
    """With labelled and test images out of reach and all other labels wrong, the student is the same."""
    keep = ("common", "segmentation", "depth", "rooms")
    only(monkeypatch, finished, tmp_path, {"unlabelled": True, "validation": True}, keep)
    *_, last, target = finished[1]
    again = recipes.trained(game.target_net)
    assert recipes.trained(game.blocks[-1]).metrics == last.metrics
    assert again.metrics["branch_points"] == target.metrics["branch_points"]
    assert all(torch.equal(v, target.weights()[name]) for name, v in again.weights().items())


def test_a_teacher_learns_from_the_labelled_part_only(game, finished, tmp_path, monkeypatch):
    only(monkeypatch, finished, tmp_path, {"labelled": False}, ("common", "rooms"))
    again = recipes.trained(game.teachers["depth"]).weights()
    assert all(torch.equal(v, finished[1][1].weights()[name]) for name, v in again.items())


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
