"""Structured distillation as recipes: every row of the study's tables, at the smallest size."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from kamal_lib import recipes
from kamal_lib.engine import Schedule
from kamal_lib.losses.adversarial import hinge_loss, wasserstein_loss
from kamal_lib.losses.features import attention_loss
from kamal_lib.losses.structured import pair_wise_loss
from kamal_lib.models.critic import SelfAttention
from kamal_lib.models.segmenters import SLIM_STUDENT, SLIM_STUDENT_HALF
from kamal_lib.recipes import __main__ as command
from kamal_lib.recipes import skd as study
from kamal_lib.recipes.data import CamVidData, OneTarget
from kamal_lib.recipes.skd import ALL, CRITICS, GROUPS, PI, PI_PA, skd, skd_teachers, student
from kamal_lib.recipes.structured import (
    CriticPlan,
    Graph,
    SegmenterScores,
    SegmenterTeacher,
    StructuredStudent,
    part_of,
    same_steps,
)
from kamal_lib.sample import VOID


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory):
    """One store for the whole file: teachers are trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAMAL_STORE", str(tmp_path_factory.mktemp("store")))
        yield


@pytest.fixture(scope="module")
def teacher() -> SegmenterTeacher:
    return skd_teachers("smoke", seed=3)["segmentation"]


@pytest.fixture(scope="module")
def rows():
    return {group: skd(group, "smoke", seed=3) for group in GROUPS}


def test_every_row_of_the_tables_has_a_network_of_its_own(rows):
    every = [(row, network) for group in rows.values() for row, (network,) in group.items()]
    assert [len(group) for group in rows.values()] == [13, 9, 6, 3, 4, 6]
    assert len({row for row, _ in every}) == len({network for _, network in every}) == len(every) == 41


def test_rows_learn_from_the_same_images_in_as_many_steps(rows):
    """But for those that are about unlabelled images, and these take as many steps."""
    students = [n for group in rows.values() for (n,) in group.values() if isinstance(n, StructuredStudent)]
    more = [n for n in students if n.unlabelled]
    assert len(more) == 3
    assert len({(n.schedule, n.labelled, n.seed, n.data) for n in students}) == 1
    at_quick = [n for group in GROUPS for (n,) in skd(group, "quick").values()]
    for n in (n for n in at_quick if isinstance(n, StructuredStudent)):
        images = n.data.labelled + n.unlabelled
        schedule = same_steps(n.schedule, n.data.labelled, images)
        assert schedule.epochs * images == 4000  # images seen: 500 steps of 8, exactly


def test_rows_differ_from_their_reference_in_one_thing(rows):
    table1, table2, table3 = rows["table1"], rows["table2"], rows["table3"]
    pair, whole = table1["PI + PA (1.0)"][0], table1["PI + PA + HO (1.0)"][0]
    for (network,) in table2.values():
        assert replace(network, graphs=pair.graphs) == pair != network
    for row, (network,) in table3.items():
        assert replace(network, critic=whole.critic) == whole != network
        assert row == f"A{network.critic.attentions}L{network.critic.blocks - 1}"
    assert whole.graphs == (Graph(patch=2, radius=None),)  # the paper's best
    assert (whole.critic.attentions, whole.critic.blocks) == (2, 5)  # A2L4
    assert dict(whole.weights) == {"pixel": 10.0, "pair": 10.0, "holistic": 0.1}
    assert table1["PI (0.5)"][0].architecture == SLIM_STUDENT_HALF
    assert table1["PI (1.0, pretrained)"][0].start.task == "depth"
    other = table1["PI (1.0, pretrained)"][0].start.data
    assert other.world != whole.data.world  # rooms that nothing else uses


def test_a_seed_redraws_rooms_start_and_order():
    one, two = (student(skd_teachers("smoke", seed=seed)["segmentation"], "smoke") for seed in (1, 2))
    assert one.data.world != two.data.world
    assert one.seed != two.seed
    assert one.seed != one.teacher.seed


def test_student_and_critic_are_kept_and_told_apart(teacher):
    recipe = student(teacher, "smoke", ALL)
    artifact = recipes.trained(recipe)
    weights = artifact.weights()
    assert {name.split(".")[0] for name in weights} == {"student", "critic"}
    assert {"segmentation", "pixel", "pair", "holistic", "critic", "penalty"} <= artifact.history[-1].keys()
    network, critic = recipes.load(recipe), recipe.critic_of(artifact)
    image = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        found = critic(image, network(image)["segmentation"].softmax(1))
    assert found.shape == (2,)
    assert not network.training
    assert not critic.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[f"student.{name}"])
    with pytest.raises(ValueError, match="had no critic"):
        student(teacher, "smoke", PI).critic_of(recipes.trained(student(teacher, "smoke", PI)))


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_scores_by_image_add_up_to_the_metrics(task):
    """Depth, too, which must be decoded from log-spaced bins."""
    recipe = student(skd_teachers("smoke", seed=3)[task], "smoke")
    states = recipes.trained(SegmenterScores(recipe)).weights()
    names = {name.removeprefix(f"{task}."): value.double().sum(0) for name, value in states.items()}
    found = recipe.task.metric().scores(names)
    for name, value in recipes.trained(recipe).metrics["test"].items():
        assert float(found[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_labels_of_unlabelled_images_are_unknown_and_never_opened(teacher):
    recipe = student(teacher, "smoke", PI, unlabelled=5)
    images = recipe.images()
    labelled = recipe.data.labelled
    assert len(images) == labelled + 5
    assert bool((images[0]["labels"] != VOID).any())
    for index in range(labelled, labelled + 5):
        assert set(images[index]) == {"image", "labels"}
        assert bool((images[index]["labels"] == VOID).all())
        assert set(recipe.data.part("unlabelled")[index - labelled]) == {"image"}
    depth = student(skd_teachers("smoke", seed=3)["depth"], "smoke", ("pair",), unlabelled=5).images()
    assert bool((depth[labelled]["depth"] == 0).all())
    recipes.trained(recipe)  # they go together in one batch


def test_without_labels_only_agreement_teaches(teacher):
    recipe = student(teacher, "smoke", PI_PA, labelled=False, unlabelled=8)
    assert all(bool((s["labels"] == VOID).all()) for s in (recipe.images()[i] for i in range(8)))
    assert recipes.trained(recipe).history[-1].keys() == {"epoch", "pixel", "pair"}


def still(recipe):
    """The recipe with a training that moves nothing but running statistics."""
    return replace(recipe, schedule=replace(recipe.schedule, learning_rate=0.0))


def test_a_pretrained_body_is_where_the_student_starts(teacher):
    start = study.depth_in_other_rooms(teacher, "smoke")
    weights = recipes.trained(still(student(teacher, "smoke", start=start))).weights()
    body, source = part_of(weights, "student.body"), part_of(recipes.trained(start).weights(), "body")
    learned = [name for name, _ in recipes.load(start).body.named_parameters()]
    assert all(torch.equal(body[name], source[name]) for name in learned)
    plain = recipes.trained(still(student(teacher, "smoke"))).weights()
    assert any(not torch.equal(part_of(plain, "student.body")[name], source[name]) for name in learned)


def test_graphs_share_the_weight_of_the_pair_wise_term(teacher):
    def objective(**fields):
        recipe = student(teacher, "smoke", PI_PA, **fields)
        nets = recipe.fresh(), recipes.load(teacher)
        return recipe.objective(*nets, None).train()

    batch = {"image": torch.rand(2, 3, 32, 48), "labels": torch.zeros(2, 32, 48, dtype=torch.int64)}
    one, same = objective()(batch), objective(graphs=(Graph(), Graph()))(batch)
    assert float((same["pair"] + same["pair 2"]).detach()) == pytest.approx(float(one["pair"].detach()), 1e-6)
    fused = objective(graphs=(Graph(2), Graph(4, finer=True)))
    ours = fused.student.levels_and_response(batch["image"])[0]
    theirs = fused._teacher[0].levels_and_response(batch["image"])[0]
    assert ours[0].shape[-2:] == (16, 24)  # twice as fine as the last features
    assert ours[1].shape[-2:] == (8, 12)
    expected = 5 * pair_wise_loss(ours[0], theirs[0], patch=4)
    assert float(fused(batch)["pair 2"].detach()) == pytest.approx(float(expected.detach()), rel=1e-3)


BATCH = {
    "image": torch.rand(2, 3, 32, 48),
    "labels": torch.arange(32 * 48).reshape(1, 32, 48).repeat(2, 1, 1) % 13,
}


def test_comparison_losses_are_those_of_their_names(teacher):
    """Each with the weight of pair-wise distillation, on the last features."""
    for name, form in (("attention", "paper"), ("attention, public form", "public")):
        recipe = student(teacher, "smoke", ("pixel", name))
        objective = recipe.objective(recipe.fresh(), recipes.load(teacher), None).train()
        found = objective(BATCH)[name]
        ours, theirs = (
            n.features_and_response(BATCH["image"])[0] for n in (objective.student, *objective._teacher)
        )
        assert float(found.detach()) == pytest.approx(
            10 * float(attention_loss(ours, theirs, form=form).detach()), rel=1e-5
        )
    recipe = student(teacher, "smoke", ("pixel", "mimic"))
    objective = recipe.objective(recipe.fresh(), recipes.load(teacher), None)
    assert {n.split(".")[0] for n, _ in objective.named_parameters()} == {"student", "learning"}
    assert "mimic" in recipes.trained(recipe).history[-1]


def test_the_critic_is_built_and_trained_as_planned(teacher):
    for row, (attentions, blocks) in CRITICS.items():
        plan = CriticPlan(attentions=attentions, blocks=blocks)
        critic = plan.fresh(student(teacher, "smoke").task, 0)
        layers = list(critic.modules())
        assert sum(isinstance(layer, SelfAttention) for layer in layers) == attentions, row
        assert len([layer for layer in critic.layers if isinstance(layer, nn.Conv2d)]) == blocks, row
    recipe = student(teacher, "smoke", ALL)
    objective, schedule = recipe.opponent(
        recipe.critic.fresh(recipe.task, 0), recipe.fresh(), recipes.load(teacher), recipe.schedule
    )
    assert (schedule.learning_rate, schedule.weight_decay) == (4e-4, 0.0)
    assert (schedule.epochs, schedule.batch_size) == (recipe.schedule.epochs, recipe.schedule.batch_size)
    assert objective.penalty == 10.0
    assert objective.loss is wasserstein_loss
    hinge = student(teacher, "smoke", ALL, critic=CriticPlan(loss="hinge", penalty=0.0, norm=False))
    critic = hinge.critic.fresh(hinge.task, 0)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in critic.modules())
    other, _ = hinge.opponent(critic, hinge.fresh(), recipes.load(teacher), hinge.schedule)
    assert other.loss is hinge_loss
    assert other(BATCH).keys() == {"critic"}


def test_rows_start_from_the_same_weights(rows):
    table = rows["table1"]
    first = table["labels (1.0)"][0].fresh().state_dict()
    for name in ("PI (1.0)", "PI + PA (1.0)", "PI + PA + HO (1.0)"):
        other = table[name][0].fresh().state_dict()
        assert all(torch.equal(value, other[key]) for key, value in first.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": (("pixels", 1.0),)}, "terms must be"),
        ({"weights": (("pixel", 1.0), ("pixel", 2.0))}, "terms must be"),
        ({"unlabelled": 4}, "nothing to learn from unlabelled"),
        ({"labelled": False, "weights": (("pixel", 1.0),)}, "no images"),
        ({"unlabelled": -1, "weights": (("pixel", 1.0),)}, "0 to 8 images"),
        ({"unlabelled": 9, "weights": (("pixel", 1.0),)}, "0 to 8 images"),
        ({"weights": (("pair", 1.0),), "graphs": ()}, "needs a graph"),
        ({"start": "ImageNet"}, "start must be one of"),
    ],
)
def test_what_means_nothing_is_refused(teacher, fields, message):
    with pytest.raises(ValueError, match=message):
        replace(student(teacher, "smoke"), **fields)


def test_what_does_not_go_together_is_refused(teacher):
    start = study.depth_in_other_rooms(teacher, "smoke")
    with pytest.raises(ValueError, match="another architecture"):
        student(teacher, "smoke", network="0.5", start=start)
    with pytest.raises(ValueError, match="network must be one of"):
        student(teacher, "smoke", network="2.0")
    with pytest.raises(ValueError, match="tuple of names"):
        student(teacher, "smoke", "pixel")
    with pytest.raises(ValueError, match="give both the same profile"):
        student(teacher, "quick")
    with pytest.raises(ValueError, match="task must be one of segmentation, depth"):
        replace(teacher, task="segmentatoin")
    with pytest.raises(ValueError, match="must be 'wasserstein' or 'hinge'"):
        CriticPlan(loss="wgan")
    with pytest.raises(ValueError, match="ImageNet weights exist"):
        recipes.trained(replace(student(teacher, "smoke"), architecture=SLIM_STUDENT, start="imagenet"))


def test_data_and_rows_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data must be one of rooms, nyuv2, camvid, cityscapes"):
        skd_teachers("smoke", data="kitti")
    with pytest.raises(ValueError, match="needs data_root"):
        skd_teachers("smoke", data="camvid")
    with pytest.raises(ValueError, match="rows must be one of"):
        skd("table9", "smoke")
    with pytest.raises(ValueError, match="does not exist"):
        skd("table1", "tiny")
    with pytest.raises(ValueError, match="street_root"):
        CamVidData(str(tmp_path), (24, 32)).images("unlabelled")


def test_one_target_takes_no_more_than_there_is(teacher):
    images = Subset(teacher.data.part("labelled"), range(3))
    assert len(OneTarget(images, "labels", 2)) == 2
    with pytest.raises(ValueError, match="1 to 3"):
        OneTarget(images, "labels", 4)
    with pytest.raises(ValueError, match="1 to 3"):
        OneTarget(images, "labels", 0)


def test_steps_are_kept_to_within_half_an_epoch():
    usual = Schedule(epochs=10, batch_size=8)
    assert same_steps(usual, 400, 400) == usual
    assert same_steps(usual, 400, 1000).epochs == 4
    assert same_steps(usual, 8, 8000).epochs == 1


def test_the_command_line_trains_a_group(capsys):
    command.main(["skd", "--rows", "table6", "--profile", "smoke", "--seed", "3"])
    said = capsys.readouterr().out
    assert all(f"PI + {name}" in said for name in ("MIMIC", "AT", "AT, public form"))
    with pytest.raises(SystemExit):
        command.main(["skd", "--rows", "core", "--profile", "smoke"])
    assert "does not go with skd" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["skd", "--profile", "smoke"])
    assert "skd needs --rows" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["skd", "--rows", "table1", "--profile", "smoke", "--data", "camvid"])
    assert "needs data_root" in capsys.readouterr().err


def test_rows_take_as_many_unlabelled_images_as_there_are(monkeypatch, teacher):
    """NYUDv2 has fewer than rooms; CamVid and Cityscapes have none, and not these rows."""
    for spare, count in ((1000, 8), (5, 5), (0, 0)):
        monkeypatch.setattr(type(teacher.data), "labels", lambda _, spare=spare: (8, 8 + spare))
        rows = study.table8_rows({"segmentation": teacher}, "smoke")
        assert {n.unlabelled for (n,) in rows.values()} - {0} == ({count} if count else set())
        assert len(rows) == (4 if count else 2)
