"""The rows of the study `ka_two_teachers`: what each starts from, learns from and may not see."""

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_recipes import only

from kamal_lib import recipes
from kamal_lib.artifacts import Work
from kamal_lib.distill.amalgamation import branch_points
from kamal_lib.metrics import inherited_errors, resampled
from kamal_lib.models.target_net import TargetNet
from kamal_lib.recipes import (
    GROUPS,
    ImageScores,
    Inherited,
    MultiHead,
    Predictions,
    SelfDistilled,
    StudentBlock,
    full_size,
    two_teachers,
    whole_game,
)
from kamal_lib.recipes import __main__ as command
from kamal_lib.recipes import baselines as stages
from kamal_lib.recipes.amalgamation import others
from kamal_lib.recipes.baselines import equal_steps
from kamal_lib.recipes.two_teachers import study_student
from kamal_lib.studies import of_task

GAME = whole_game("smoke")
STUDENT = GAME.target_net
PLAN = STUDENT.amalgamation
OTHER = whole_game("smoke", seed=9).target_net.amalgamation


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with the smoke run, which the tests of this module add to."""
    folder = tmp_path_factory.mktemp("two-teachers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAMAL_STORE", str(folder))
        recipes.trained(STUDENT)
    return folder


@pytest.fixture
def here(store, monkeypatch):
    monkeypatch.setenv("KAMAL_STORE", str(store))


def test_every_group_has_its_rows():
    rows = {group: list(two_teachers(group, "smoke", seed=1)) for group in GROUPS}
    assert rows["core"] == ["teachers", "final", "end to end"]
    assert rows["table"] == ["Decoder b1", "Decoder b2"]
    assert rows["baselines"] == ["self-distilled", "few labels", "all labels", "placebo"]
    assert len(set(rows["options"])) == 15
    assert [row for row in rows["conditions"] if row.endswith(": teachers")] == [
        f"{row}: teachers" for row in rows["conditions"] if not row.endswith(": teachers")
    ]
    with pytest.raises(ValueError, match=r"rows must be one of core, table, .* got 'tables'"):
        two_teachers("tables", "smoke")


def test_options_change_one_thing_at_a_time():
    usual, *changed = (row[0] for row in two_teachers("options", "quick").values())
    assert usual.amalgamation == study_student("quick").amalgamation
    for student in changed:
        plan = student.amalgamation
        fields = {f for f in plan.__dataclass_fields__ if getattr(plan, f) != getattr(usual.amalgamation, f)}
        assert len(fields) == 1 or fields in ({"teachers", "mix"}, {"loss", "start"})
        assert student.fine_tuning == usual.fine_tuning


def test_branch_points_of_the_table():
    rows = two_teachers("table", "quick")
    assert {row: dict(student.points) for row, (student,) in rows.items()} == {
        f"Decoder b{k}": {"segmentation": 5 + k, "depth": 5 + k} for k in range(1, 6)
    }


def test_conditions_change_what_they_say():
    """Labels, targets, rooms and lengths of every condition; the teachers' steps are those of always."""
    usual, seen = study_student("quick"), {}
    for row, networks in two_teachers("conditions", "quick").items():
        if row.endswith(": teachers"):
            assert {t.labels for t in networks} == {100}
            for teacher, own in zip(networks, usual.amalgamation.teachers, strict=True):
                assert teacher.schedule.epochs * 7 == pytest.approx(own.schedule.epochs * 25, abs=7)
        else:
            plan = networks[0].amalgamation
            epochs = networks[0].fine_tuning.epochs
            seen[row.removeprefix("a quarter of the labels")] = (plan.soft, plan.data.unlabelled, epochs)
    assert seen == {
        "": (False, 1000, 8),
        ", soft targets": (True, 1000, 8),
        ", fine-tuned twice as long": (False, 1000, 16),
        ", twice the rooms": (False, 2000, 4),
        ", all of these": (True, 2000, 8),
    }


def test_nyuv2_has_the_size_of_the_study():
    student = study_student("quick", data="nyuv2", data_root="somewhere")
    assert student.data.size == (48, 64)
    assert {t.data for t in student.amalgamation.teachers} == {student.data}
    assert study_student("gpu", data="nyuv2", data_root="somewhere").data.size == (240, 320)


def test_the_papers_size():
    """The recount of the paper's networks (29.45 M a teacher), to its two digits; codings are 3.3 %."""
    found = {name: round(count / 1e6, 2) for name, count in full_size().items() if name != "codings"}
    assert found == {"teachers": 58.89, "b1": 37.09, "b2": 31.19, "b3": 29.71, "b4": 29.49, "b5": 29.45}
    assert full_size()["codings"] == 962_560


def test_baselines_take_the_students_steps():
    """Quick: ten blocks of one epoch and eight of fine-tuning, on 1,000 images in batches of 16."""
    student = study_student("quick")
    steps = 18 * 63
    for images, epochs in ((1000, 18), (400, 45), (1400, 13)):
        schedule = equal_steps(student.amalgamation, student.fine_tuning, images)
        assert schedule.epochs == epochs
        assert abs(epochs * math.ceil(images / 16) - steps) < math.ceil(images / 16)
        assert replace(schedule, epochs=student.fine_tuning.epochs) == student.fine_tuning
    half = replace(student.amalgamation, decoder_only=True)
    assert equal_steps(half, student.fine_tuning, 1000).epochs == 13


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_placebo_gives_every_image_another_ones_prediction(count):
    order = others(count, seed=1)
    assert order.sort().values.tolist() == list(range(count))
    assert not bool((order == torch.arange(count)).any())
    with pytest.raises(ValueError, match="a placebo needs two images or more"):
        others(1, seed=1)


class Stored(Work):
    """What a training is handed, outside a training."""

    def __init__(self):
        super().__init__(Path(), {})

    def load(self, parent):
        return recipes.trained(parent)


@pytest.mark.usefixtures("here")
def test_only_the_placebos_training_images_are_shuffled():
    plan = replace(PLAN, placebo=True)
    order = others(8, plan.seed)
    for part in ("unlabelled", "validation"):
        usual, shuffled = PLAN.taught(part, Stored()), plan.taught(part, Stored())
        for i in range(len(usual)):
            other = usual[int(order[i]) if part == "unlabelled" else i]
            assert torch.equal(shuffled[i]["image"], usual[i]["image"])
            assert torch.equal(shuffled[i]["depth"], other["depth"])
            assert torch.equal(shuffled[i]["labels"], other["labels"])


@pytest.mark.usefixtures("here")
def test_where_a_student_starts():
    common = recipes.trained(PLAN.teachers[0].start).weights()
    segnet, depthnet = (recipes.trained(t).weights() for t in PLAN.teachers)
    found = {
        start: replace(PLAN, start=start).started(Stored())[0].blocks.state_dict()
        for start in ("common", "segmentation", "depth", "unrelated")
    }
    for name, value in found["common"].items():
        assert torch.equal(value, common[name])
        assert torch.equal(found["segmentation"][name], segnet[f"blocks.{name}"])
        assert torch.equal(found["depth"][name], depthnet[f"blocks.{name}"])
    assert not torch.equal(found["unrelated"]["0.convs.0.weight"], common["0.convs.0.weight"])


@pytest.mark.usefixtures("here")
def test_decoder_only_leaves_the_encoder_as_it_started():
    block = StudentBlock(4, replace(PLAN, decoder_only=True))
    assert block.parents()[0].n == 3
    assert StudentBlock(3, block.amalgamation).parents()[0] == PLAN.teachers[0].start
    artifact = recipes.trained(block)
    student, _ = block.build(artifact.weights(), artifact.metrics)
    segnet = recipes.load(PLAN.teachers[0])
    for n, (ours, theirs) in enumerate(zip(student.blocks, segnet.blocks, strict=True), 1):
        same = all(
            torch.equal(a, b)
            for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        )
        assert same == (n <= 2)
    losses = artifact.metrics["losses"]
    assert all(values[:2] == [None, None] and None not in values[2:] for values in losses.values())
    assert set(branch_points(losses).values()) <= {3, 4}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("option", [{"loss": "features"}, {"switches": "teacher"}])
def test_eq_7_reads_eq_6_as_at_test_time_whatever_was_trained(option):
    """Trained with Eq. 5 or the teacher's switches: `losses` are those of the hybrid path, computed here."""
    block = StudentBlock(1, replace(PLAN, **option))
    artifact = recipes.trained(block)
    student, codings = block.build(artifact.weights(), artifact.metrics)
    part = PLAN.taught("validation", Stored())
    images = torch.stack([part[i]["image"] for i in range(len(part))])
    depth = torch.stack([part[i]["depth"].as_subclass(torch.Tensor) for i in range(len(part))])
    with torch.no_grad():
        a = student.forward_to(images, 1)
        response = recipes.load(PLAN.teachers[1]).forward_from(
            a.with_features(codings["depth"][0](a.features)), 1
        )
        expected = float(PLAN.tasks()["depth"].loss(response["depth"], depth))
    assert artifact.metrics["losses"]["depth"] == [pytest.approx(expected, rel=1e-4)]
    assert artifact.metrics["own_losses"]["depth"] != artifact.metrics["losses"]["depth"]


@pytest.mark.usefixtures("here")
def test_soft_targets_are_the_teachers_probabilities():
    plan = replace(PLAN, soft=True)
    sample = plan.taught("validation", Stored())[1]
    assert set(sample) == {"image", "probabilities", "depth"}
    with torch.no_grad():
        response = recipes.load(PLAN.teachers[0])(sample["image"][None])["segmentation"]
    assert torch.allclose(
        sample["probabilities"].as_subclass(torch.Tensor), response.softmax(1)[0], atol=1e-3
    )
    assert plan.tasks()["segmentation"].key == "probabilities"
    assert recipes.trained(StudentBlock(1, plan)).history[0]["segmentation"] > 0


@pytest.fixture
def trainings(monkeypatch):
    """What baselines would train, each as (network, images in the loader, schedule), without training it."""
    seen = []

    def stub(objective, images, schedule, *_, **__):
        seen.append((deepcopy(objective.network), len(images), schedule))
        return []

    monkeypatch.setattr(stages, "fitted", stub)
    return seen


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("targets", "images"), [("teachers", 8), ("labels", 8), ("all labels", 16)])
def test_an_end_to_end_network_is_the_students(targets, images, trainings):
    """Built as the student's body and the teachers' branches; its images, its steps, its branch points."""
    student = replace(STUDENT, fine_tuning=replace(STUDENT.fine_tuning, epochs=3))
    baseline = MultiHead(student, targets)
    recipes.trained(student)
    found = baseline.train(Stored())
    ((network, count, schedule),) = trainings
    final = recipes.load(student)
    assert isinstance(network, TargetNet)
    assert found.metrics["branch_points"] == final.branch_points
    shapes = ({k: v.shape for k, v in n.state_dict().items()} for n in (network, final))
    assert next(shapes) == next(shapes)
    segnet, depthnet = (recipes.load(t) for t in PLAN.teachers)
    head = network.branches["depth"].head.state_dict()
    assert all(torch.equal(v, depthnet.heads["depth"].state_dict()[k]) for k, v in head.items())
    trunk = network.trunk[0].state_dict()
    assert all(torch.equal(v, trunk[k]) for k, v in segnet.blocks[0].state_dict().items())
    assert count == images
    assert schedule.epochs * math.ceil(images / 4) == 4 * 2 + 3 * 2 + (2 if images == 16 else 0)
    with pytest.raises(ValueError, match="targets must be one of teachers, labels, all labels, got 'truth'"):
        MultiHead(STUDENT, "truth")


@pytest.mark.usefixtures("here")
def test_a_self_distilled_network_starts_as_its_teacher(trainings):
    SelfDistilled(PLAN, replace(STUDENT.fine_tuning, epochs=3), "depth").train(Stored())
    ((network, count, schedule),) = trainings
    teacher = recipes.load(PLAN.teachers[1]).state_dict()
    assert all(torch.equal(value, teacher[name]) for name, value in network.state_dict().items())
    assert (count, schedule.epochs) == (8, 4 + 3)


def test_no_label_reaches_distilled_baselines(store, tmp_path, monkeypatch):
    """With the labelled images out of reach and every label of the others wrong, the same weights."""
    rows = (MultiHead(STUDENT), SelfDistilled(PLAN, STUDENT.fine_tuning, "segmentation"))
    with monkeypatch.context() as patch:
        patch.setenv("KAMAL_STORE", str(store))
        expected = [recipes.trained(row).weights() for row in rows]
    keep = ("common", "segmentation", "depth", "student", "target", "rooms")
    only(monkeypatch, (store, []), tmp_path, {"unlabelled": True, "validation": True}, keep)
    monkeypatch.setattr(stages, "scores", lambda *_: {})
    for row, weights in zip(rows, expected, strict=True):
        again = recipes.trained(row).weights()
        assert all(torch.equal(value, again[name]) for name, value in weights.items())


@pytest.mark.usefixtures("here")
def test_scores_of_a_student_follow_from_its_images():
    states = recipes.trained(ImageScores(STUDENT)).weights()
    found = {}
    for task in ("segmentation", "depth"):
        metric = recipes.tasks_of(GAME.data)[task].metric()
        found |= resampled(metric, of_task(states, task), torch.ones(4, dtype=torch.long))
    assert found == pytest.approx(recipes.trained(STUDENT).metrics["test"], rel=1e-9)
    with pytest.raises(ValueError, match="no scores of 'normals' among"):
        of_task(states, "normals")


def test_inherited_errors_by_hand():
    truth = torch.tensor([[[0, 1, 2, 255]], [[1, 1, 1, 1]]])
    student = torch.tensor([[[1, 1, 0, 0]], [[0, 2, 1, 0]]])
    teacher = torch.tensor([[[1, 0, 1, 0]], [[0, 0, 0, 0]]])
    inherited, wrong = inherited_errors(student, teacher, truth)
    assert inherited.tolist() == [1, 2]
    assert wrong.tolist() == [2, 3]


@pytest.mark.usefixtures("here")
def test_a_teacher_inherits_all_its_errors_from_itself():
    counts = recipes.trained(Inherited(PLAN.teachers[0], PLAN.teachers[0])).weights()
    assert torch.equal(counts["inherited"], counts["wrong"])
    accuracy = 1 - float(counts["wrong"].sum()) / (4 * 24 * 32)
    assert accuracy == pytest.approx(recipes.trained(PLAN.teachers[0]).metrics["test"]["pixel_acc"], rel=1e-6)


@pytest.mark.usefixtures("here")
def test_inherited_errors_are_those_of_two_networks():
    """Recounted with the predictions of both; the student's and the teacher's differ somewhere."""
    counts = recipes.trained(Inherited(STUDENT, PLAN.teachers[0])).weights()
    part = GAME.data.part("test")
    images = torch.stack([part[i]["image"] for i in range(4)]).as_subclass(torch.Tensor)
    truth = torch.stack([part[i]["labels"] for i in range(4)]).as_subclass(torch.Tensor)
    with torch.no_grad():
        ours, theirs = (
            recipes.load(r)(images)["segmentation"].argmax(1) for r in (STUDENT, PLAN.teachers[0])
        )
    inherited, wrong = inherited_errors(ours, theirs, truth)
    assert counts["wrong"].tolist() == wrong.tolist()
    assert counts["inherited"].tolist() == inherited.tolist()
    assert int(inherited.sum()) < int(wrong.sum())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"start": "imagenet"},
            "start must be one of common, unrelated, .* got 'imagenet'",
        ),
        ({"decoder_only": True, "train_prefix": True}, "train_prefix trains it: choose one"),
        ({"teachers": (PLAN.teachers[0], OTHER.teachers[1])}, "all teachers must have the same data"),
        ({"loss": "both"}, "loss must be one of predictions, features, got 'both'"),
        ({"switches": "none"}, "switches must be one of student, teacher, got 'none'"),
    ],
)
def test_unknown_options(option, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **option)


def test_a_task_that_nobody_teaches():
    with pytest.raises(ValueError, match=r"task must be one of the teachers', .*, got 'normals'"):
        SelfDistilled(PLAN, STUDENT.fine_tuning, "normals")


def test_no_held_out_images(monkeypatch, tmp_path):
    """Said as soon as the part is opened."""
    monkeypatch.setenv("KAMAL_STORE", str(tmp_path))
    data = replace(GAME.data, validation=0)
    teachers = tuple(replace(t, data=data) for t in PLAN.teachers)
    with pytest.raises(ValueError, match="expected a count of 1 to"):
        recipes.trained(Predictions(teachers[0], "validation"))


@pytest.mark.usefixtures("here")
def test_the_command_line_trains_a_group(capsys):
    command.main(["two_teachers", "--rows", "core", "--profile", "smoke"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " {" in line]
    assert [line.split(" {")[0] for line in lines] == ["teachers", "teachers", "final", "end to end"]
    for wrong, said in (
        (["two_teachers", "--profile", "smoke"], "two_teachers needs --rows"),
        (["teachers", "--rows", "core"], "--rows core does not go with teachers"),
    ):
        with pytest.raises(SystemExit):
            command.main(wrong)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["two_teachers", "--rows", "core", "--profile", "smoke", "--start", "imagenet"])
    assert "leave --start out for two_teachers" in capsys.readouterr().err
