"""Eq. 6 block by block, and Eq. 7: who learns, who does not, and what the loss is."""

import copy

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from kamal_lib import sample
from kamal_lib.data.loaders import collate
from kamal_lib.data.targets import WithTargets
from kamal_lib.distill.amalgamation import BlockObjective, branch_points
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.encoder_decoder import Architecture, build_network
from kamal_lib.tasks import Depth, Normals, Segmentation

TINY = Architecture(widths=(4, 6), convs=(1, 1), pools=(True, True))
TASKS = {"segmentation": Segmentation(("a", "b", "c")), "depth": Depth(bins=4, bin_length=0.5)}
WEIGHTS = {"segmentation": 1.0, "depth": 4.0}
N = TINY.blocks


def teacher(task: str, seed: int):
    network = build_network(TINY, {task: TASKS[task].channels}, seed=seed)
    with torch.no_grad():
        network.train()(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))
    return network.eval()


def setting(n: int, **options):
    """(objective, student, teachers, batch): the batch's targets are the teachers' own predictions."""
    teachers = {"segmentation": teacher("segmentation", 1), "depth": teacher("depth", 2)}
    student = build_network(TINY, {}, seed=3)
    codings = {task: ChannelCoding(student.channels[n - 1]) for task in TASKS}
    image = torch.rand(2, 3, 17, 19, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        predictions = {task: TASKS[task].decode(teachers[task](image)[task]) for task in TASKS}
    batch = {"image": image, "labels": predictions["segmentation"], "depth": predictions["depth"]}
    objective = BlockObjective(student, teachers, codings, n, tasks=TASKS, weights=WEIGHTS, **options)
    return objective, student, teachers, batch


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def step(objective: BlockObjective, batch: dict) -> dict[str, torch.Tensor]:
    objective.train()
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    losses = objective(batch)
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    return losses


@pytest.mark.parametrize("n", range(1, N + 1))
def test_eq_6_by_hand(n):
    """The coded features of block n, pushed through the rest of the teacher by a plain loop over blocks."""
    objective, student, teachers, batch = setting(n)
    objective.train()
    torch.manual_seed(0)
    for coding in objective.codings.values():
        torch.nn.init.normal_(coding.expand.weight)
    learning = [p for p in objective.parameters() if p.requires_grad]
    found = objective(batch)
    gradients = torch.autograd.grad(torch.stack(list(found.values())).sum(), learning)
    total = torch.zeros(())
    a = student.forward_to(batch["image"], n - 1)
    a = student.blocks[n - 1](a)
    for task, network in teachers.items():
        hybrid = a.with_features(objective.codings[task](a.features))
        for block in list(network.blocks)[n:]:
            hybrid = block(hybrid)
        response = network.heads[task](hybrid.features)
        target = batch["labels"] if task == "segmentation" else batch["depth"]
        expected = WEIGHTS[task] * TASKS[task].loss(response, target)
        assert torch.allclose(found[task], expected, rtol=1e-5)
        total = total + expected
    for mine, theirs in zip(torch.autograd.grad(total, learning), gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n", range(1, N + 1))
def test_only_block_n_and_its_codings_learn(n):
    objective, student, teachers, batch = setting(n)
    students, theirs = state(student), {task: state(t) for task, t in teachers.items()}
    codings = state(objective.codings)
    learning = {name: p.detach().clone() for name, p in objective.learning.named_parameters()}
    step(objective, batch)
    still = {name for name, p in objective.learning.named_parameters() if torch.equal(p, learning[name])}
    assert not {name for name in still if not name.endswith("0.bias")}  # batch norm cancels a bias
    moved = {name.split(".")[1] for name in changed(students, student)}
    assert moved == {str(n - 1)}
    assert changed(codings, objective.codings)
    for task, network in teachers.items():
        assert not changed(theirs[task], network)
        assert all(p.grad is None for p in network.parameters())
        assert not network.training
    for block in student.blocks[: n - 1]:
        assert all(p.grad is None for p in block.parameters())
        assert not block.training


@pytest.mark.parametrize("n", range(1, N + 1))
def test_the_state_is_what_learns(n):
    objective, student, _, _ = setting(n)
    owned = {p.data_ptr() for p in objective.parameters()}
    assert owned == {
        p.data_ptr() for m in (student.blocks[n - 1], *objective.codings.values()) for p in m.parameters()
    }
    assert all(name.startswith(("learning.0.", "codings.")) for name in objective.state_dict())


def test_train_leaves_teachers_and_prefix_in_eval():
    objective, student, teachers, _ = setting(3)
    objective.train()
    assert student.blocks[2].training
    assert not any(m.training for b in student.blocks[:2] for m in b.modules())
    assert not any(m.training for t in teachers.values() for m in t.modules())


def test_frozen_parts_move_with_the_objective():
    objective, _, teachers, _ = setting(2)
    objective.to(torch.float64)
    assert all(p.dtype == torch.float64 for t in teachers.values() for p in t.parameters())


def test_train_prefix_trains_all_blocks_up_to_n():
    objective, student, _, batch = setting(3, train_prefix=True)
    before = state(student)
    step(objective, batch)
    assert {name.split(".")[1] for name in changed(before, student)} == {"0", "1", "2"}


@pytest.mark.parametrize("n", range(1, N + 1))
def test_a_student_that_is_the_teacher_agrees_with_it(n):
    """With open gates and the teacher's own blocks the hybrid is the teacher: depth loss 0 for every n."""
    network = teacher("depth", 2)
    student = build_network(TINY, {}, seed=3)
    student.blocks.load_state_dict(network.blocks.state_dict())
    codings = {"depth": ChannelCoding(student.channels[n - 1], gain=2.0)}
    image = torch.rand(2, 3, 17, 19)
    batch = {"image": image, "depth": TASKS["depth"].decode(network(image)["depth"]).detach()}
    objective = BlockObjective(student, {"depth": network}, codings, n, tasks=TASKS, weights=WEIGHTS).eval()
    assert float(objective(batch)["depth"].detach()) == 0


def test_gradients_of_the_coded_path():
    objective, *_, batch = setting(2)
    objective.double().eval()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    coding = objective.codings["depth"]
    torch.nn.init.normal_(coding.expand.weight)

    def total(weight):
        with torch.no_grad():
            image = objective._start(batch["image"], 1)
        a = objective.learning[0](image)
        s = torch.sigmoid(weight @ torch.relu(coding.squeeze(a.features.mean((2, 3))))[..., None])[..., None]
        response = objective._teachers[1][1].forward_from(a.with_features(s * a.features), 2)["depth"]
        return TASKS["depth"].loss(response, batch["depth"])

    weight = coding.expand.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(total, weight, atol=1e-6)
    objective(batch)["depth"].backward()
    total(weight).backward()
    assert torch.allclose(coding.expand.weight.grad, WEIGHTS["depth"] * weight.grad, rtol=1e-9)


# --- Eq. 7 --------------------------------------------------------------------------------------------------


def test_planted_losses_choose_their_branches():
    losses = {
        "segmentation": [0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.8, 0.7, 0.6, 0.5],
        "depth": [0.0] * 5 + [0.5, 0.2, 0.4, 0.2, 0.3],
    }
    assert branch_points(losses) == {"segmentation": 10, "depth": 7}


def test_eq_7_looks_at_the_decoder_only():
    assert branch_points({"depth": [0.0, 0.0, 3.0, 2.0]}) == {"depth": 4}


@pytest.mark.parametrize("losses", [[], [1.0, 1.0, float("nan"), 1.0]])
def test_eq_7_without_a_measurement(losses):
    with pytest.raises(ValueError, match=r"finite loss of depth for every block.*held-out images"):
        branch_points({"depth": losses})


# --- bad input ----------------------------------------------------------------------------------------------


def objective_for(n: int = 1, **changes):
    parts = {
        "student": build_network(TINY, {}, seed=0),
        "teachers": {"depth": teacher("depth", 2)},
        "codings": {"depth": ChannelCoding(4)},
    } | changes
    return BlockObjective(*parts.values(), n, tasks=TASKS, weights=WEIGHTS)


@pytest.mark.parametrize("n", [0, N + 1])
def test_a_block_outside_the_network(n):
    with pytest.raises(ValueError, match=rf"n = {n} does not exist: this network has blocks 1..4"):
        objective_for(n)


def test_teachers_of_another_depth_or_width():
    deep = build_network(Architecture((4, 6, 6), (1,) * 3, (True,) * 3), {"depth": 4}, seed=0)
    with pytest.raises(ValueError, match="the depth teacher has 6 blocks and the student 4"):
        objective_for(teachers={"depth": deep})
    wide = build_network(Architecture((4, 8), (1, 1), (True, True)), {"depth": 4}, seed=0)
    with pytest.raises(ValueError, match="block 2 of the depth teacher has 8 channels and a pool"):
        objective_for(teachers={"depth": wide})
    flat = build_network(Architecture((4, 6), (1, 1), (True, False)), {"depth": 4}, seed=0)
    with pytest.raises(ValueError, match="block 2 of the depth teacher has 6 channels and no pool"):
        objective_for(teachers={"depth": flat})


def test_a_teacher_without_coding():
    with pytest.raises(ValueError, match=r"teachers \['depth'\] have no channel coding at block 1"):
        objective_for(codings={"segmentation": ChannelCoding(4)})


class Images(list, torch.utils.data.Dataset):
    """A data set that knows more than it should tell."""


def test_a_task_without_weight():
    teachers, codings = {"depth": teacher("depth", 2)}, {"depth": ChannelCoding(4)}
    with pytest.raises(ValueError, match=r"tasks \['depth'\] have no weight λ in Eq. 6"):
        BlockObjective(build_network(TINY, {}, seed=0), teachers, codings, 1, tasks=TASKS, weights={})


def test_blocks_frozen_for_one_objective_learn_in_the_next():
    _, student, teachers, _ = setting(2)
    for n, prefix in ((1, False), (2, False), (2, True)):
        codings = {task: ChannelCoding(student.channels[n - 1]) for task in TASKS}
        objective = BlockObjective(
            student, teachers, codings, n, tasks=TASKS, weights=WEIGHTS, train_prefix=prefix
        )
        assert all(p.requires_grad for p in objective.parameters())


def test_targets_hide_every_label_and_must_match_in_number():
    images = Images(
        [{"image": torch.rand(3, 4, 4), "labels": torch.zeros(4, 4), "depth": torch.ones(4, 4)}] * 3
    )
    taught = WithTargets(images, {"labels": torch.full((3, 4, 4), 7, dtype=torch.uint8)})
    assert len(taught) == 3
    assert taught[1].keys() == {"image", "labels"}
    assert taught[1]["labels"].dtype == torch.int64
    assert int(taught[1]["labels"].min()) == 7
    with pytest.raises(ValueError, match=r"3 images, but predictions for {'depth': 2}"):
        WithTargets(images, {"depth": torch.ones(2, 4, 4)})


def test_targets_are_what_transforms_and_losses_take():
    """Stored bytes become class ids, metres and normals become the types that a flip knows."""
    normals = torch.nn.functional.normalize(torch.randn(2, 3, 4, 5), dim=1)
    stored = {"labels": torch.full((2, 4, 5), 7, dtype=torch.uint8), "depth": torch.rand(2, 4, 5)}
    taught = WithTargets(Images([{"image": torch.rand(3, 4, 5)}] * 2), stored | {"normals": normals})
    kinds = {"labels": tv_tensors.Mask, "depth": sample.Depth, "normals": sample.Normals}
    assert {key: type(taught[0][key]) for key in kinds} == kinds
    assert taught[0]["labels"].dtype == torch.int64
    flipped = v2.functional.horizontal_flip(taught[1]["normals"])
    expected = normals[1].flip(-1) * torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    assert torch.equal(flipped.as_subclass(torch.Tensor), expected)
    batch = collate([taught[0], taught[1]])
    response = torch.randn(2, 3, 4, 5)
    assert torch.equal(Normals().loss(response, batch["normals"]), Normals().loss(response, normals))


def test_overfitting_one_batch():
    """Forty steps bring the losses well below those of the teachers' own responses, where depth costs 0."""
    objective, _, teachers, batch = setting(3)
    response = teachers["segmentation"](batch["image"])["segmentation"]
    own = float(TASKS["segmentation"].loss(response, batch["labels"]).detach())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.01)
    objective.train()
    totals = []
    for _ in range(40):
        total = torch.stack(list(objective(batch).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[0] > own
    assert own - totals[-1] > 5 * (totals[0] - own)


def test_a_copy_learns_the_same():
    """Nothing depends on the global random state."""
    first, second = setting(2)[0], setting(2)[0]
    batch = setting(2)[3]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.manual_seed(1)
    step(first, batch)
    torch.manual_seed(2)
    step(second, batch)
    assert not changed(state(first), second)
