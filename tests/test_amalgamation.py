"""Eq. 6 block by block, and Eq. 7: who learns, who does not, and what the loss is."""

import copy

import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from kamal_lib import sample
from kamal_lib.data.loaders import collate
from kamal_lib.data.targets import WithTargets
from kamal_lib.distill.amalgamation import BlockObjective, FeatureObjective, branch_points
from kamal_lib.models.blocks import Activation
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.encoder_decoder import Architecture, EncoderDecoder, build_network
from kamal_lib.models.target_net import branch_out
from kamal_lib.tasks import Depth, Normals, Segmentation, SoftSegmentation

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
    objective = BlockObjective(
        student, {"depth": network}, codings, n, tasks=TASKS, weights={"depth": WEIGHTS["depth"]}
    ).eval()
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


# --- options ------------------------------------------------------------------------------------------------


def features_setting(n: int, **options):
    """As `setting`, with Eq. 5."""
    _, student, teachers, batch = setting(n)
    codings = {task: ChannelCoding(student.channels[n - 1]) for task in TASKS}
    objective = FeatureObjective(student, teachers, codings, n, weights=WEIGHTS, **options)
    return objective, student, teachers, {"image": batch["image"]}


@pytest.mark.parametrize("n", range(1, N + 1))
def test_eq_5_by_hand(n):
    """Squared differences, one channel after the other; only block n and its codings have gradients."""
    objective, student, teachers, batch = features_setting(n)
    objective.eval()
    for coding in objective.codings.values():
        torch.nn.init.normal_(coding.expand.weight)
    found = objective(batch)
    a = student.forward_to(batch["image"], n)
    for task, network in teachers.items():
        theirs, coding = network.forward_to(batch["image"], n).features, objective.codings[task]
        total = 0.0
        for image in range(2):
            hidden = torch.relu(coding.squeeze.weight @ a.features[image].mean((1, 2)))
            s = torch.sigmoid(coding.expand.weight @ hidden)
            for c in range(theirs.shape[1]):
                difference = s[c] * a.features[image, c] - theirs[image, c]
                total += float((difference**2).sum().detach())
        expected = WEIGHTS[task] * total / theirs.numel()
        assert float(found[task].detach()) == pytest.approx(expected, rel=1e-4)
    before, others = state(student), {task: state(network) for task, network in teachers.items()}
    step(objective, batch)
    assert {name.split(".")[1] for name in changed(before, student)} == {str(n - 1)}
    for task, network in teachers.items():
        assert not changed(others[task], network)
        assert all(p.grad is None for p in network.parameters())


def test_eq_5_of_a_student_that_is_the_teacher():
    network = teacher("depth", 2)
    student = build_network(TINY, {}, seed=3).eval()
    student.blocks.load_state_dict(network.blocks.state_dict())
    codings = {"depth": ChannelCoding(6, gain=2.0)}
    objective = FeatureObjective(student, {"depth": network}, codings, 2, weights=WEIGHTS).eval()
    assert float(objective({"image": torch.rand(2, 3, 16, 16)})["depth"].detach()) == 0


def test_eq_5_with_the_whole_prefix():
    objective, student, _, batch = features_setting(3, train_prefix=True)
    before = state(student)
    step(objective, batch)
    assert {name.split(".")[1] for name in changed(before, student)} == {"0", "1", "2"}


@pytest.mark.parametrize("n", range(1, N + 1))
def test_the_teachers_switches_by_hand(n):
    objective, student, teachers, batch = setting(n, switches="teacher")
    objective.eval()
    a = student.forward_to(batch["image"], n)
    found = objective(batch)
    same = 0
    for task, network in teachers.items():
        own = network.forward_to(batch["image"], n)
        coding = objective.codings[task]
        responses = network.forward_from(Activation(coding(a.features), own.switches), n)
        target = batch["labels"] if task == "segmentation" else batch["depth"]
        assert torch.equal(found[task], WEIGHTS[task] * TASKS[task].loss(responses[task], target))
        usual = network.forward_from(a.with_features(coding(a.features)), n)
        same += torch.equal(usual[task], responses[task])
    assert same == (2 if n == N else 0)  # after the last block nothing is left to undo


def test_the_identity_with_the_teachers_own_features_and_switches():
    """F_t^n with the switches of the teacher gives its prediction bit for bit, at every n."""
    network, image = teacher("segmentation", 1), torch.rand(2, 3, 17, 19)
    with torch.no_grad():
        for n in range(N + 1):
            again = network.forward_from(network.forward_to(image, n), n)["segmentation"]
            assert torch.equal(again, network(image)["segmentation"])


def test_a_mixed_coding_starts_as_the_gates_alone_and_can_exchange_channels():
    torch.manual_seed(0)
    coding, x = ChannelCoding(5, gain=2.0, mix=True), torch.rand(2, 5, 3, 4)
    assert torch.equal(coding(x), x)
    with torch.no_grad():
        coding.mix.weight.copy_(torch.eye(5).roll(1, 0)[..., None, None])
        coding.expand.weight.normal_()
    assert torch.allclose(coding(x), (coding.gates(x) * x).roll(1, 1))


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_teachers(count):
    tasks = TASKS | {"normals": Normals()}
    names = list(tasks)[:count]
    teachers = {t: build_network(TINY, {t: tasks[t].channels}, seed=1).eval() for t in names}
    codings = {t: ChannelCoding(6) for t in names}
    image = torch.rand(2, 3, 16, 16)
    batch = {"image": image} | {tasks[t].key: tasks[t].decode(teachers[t](image)[t]).detach() for t in names}
    weights = dict.fromkeys(names, 1.0)
    objective = BlockObjective(
        build_network(TINY, {}, seed=3), teachers, codings, 2, tasks=tasks, weights=weights
    )
    losses = step(objective, batch)
    assert list(losses) == names
    assert all(coding.expand.weight.grad.abs().sum() > 0 for coding in objective.codings.values())


def test_a_teacher_of_two_tasks_has_one_coding():
    both = build_network(TINY, {task: TASKS[task].channels for task in TASKS}, seed=1).eval()
    batch = setting(1)[3]
    objective = BlockObjective(
        build_network(TINY, {}, seed=3),
        {"both": both},
        {"both": ChannelCoding(4)},
        1,
        tasks=TASKS,
        weights=WEIGHTS,
    )
    assert set(objective(batch)) == set(TASKS)


class Down(nn.Module):
    """A block that is not ours: a strided convolution, no switches."""

    pool = True

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.channels, self.conv = channels, nn.Conv2d(channels_in, channels, 3, stride=2, padding=1)

    def forward(self, activation: Activation) -> Activation:
        return activation.with_features(nn.functional.gelu(self.conv(activation.features)))


class Up(Down):
    """Its mirror: bilinear, to twice the size."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__(channels_in, channels)
        self.conv = nn.Conv2d(channels_in, channels, 3, padding=1)

    def forward(self, activation: Activation) -> Activation:
        larger = nn.functional.interpolate(activation.features, scale_factor=2, mode="bilinear")
        return activation.with_features(self.conv(larger))


def test_teachers_and_student_that_are_not_ours():
    """Blocks of somebody else, amalgamated and branched out without a change."""
    torch.manual_seed(0)

    def network(heads):
        blocks = [Down(3, 4), Down(4, 6), Up(6, 4), Up(4, 5)]
        return EncoderDecoder(TINY, blocks, {t: nn.Conv2d(5, TASKS[t].channels, 1) for t in heads}).eval()

    teachers, student = {task: network([task]) for task in TASKS}, network([])
    image = torch.rand(2, 3, 16, 24)
    batch = {"image": image, "labels": teachers["segmentation"](image)["segmentation"].argmax(1)}
    batch["depth"] = TASKS["depth"].decode(teachers["depth"](image)["depth"]).detach()
    codings = {task: [ChannelCoding(c) for c in student.channels] for task in TASKS}
    for n in range(1, N + 1):
        here = {task: codings[task][n - 1] for task in TASKS}
        objective = BlockObjective(student, teachers, here, n, tasks=TASKS, weights=WEIGHTS)
        first = sum(float(loss.detach()) for loss in step(objective, batch).values())
        for _ in range(20):
            last = sum(float(loss.detach()) for loss in step(objective, batch).values())
        assert last < first
    target_net = branch_out(student, codings, teachers, {"segmentation": 4, "depth": 3})
    assert {t: r.shape for t, r in target_net(image).items()} == {
        t: (2, TASKS[t].channels, 16, 24) for t in TASKS
    }


def test_soft_targets_are_a_divergence():
    torch.manual_seed(0)
    teachers, students = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    task = SoftSegmentation(("a", "b", "c"))
    assert task.key == "probabilities"
    p, q = (torch.distributions.Categorical(logits=x.movedim(1, -1)) for x in (teachers, students))
    expected = torch.distributions.kl_divergence(p, q).mean()
    target = task.decode(teachers)
    assert float(task.loss(students, target)) == pytest.approx(float(expected), rel=1e-5)
    assert float(task.loss(teachers, target)) == pytest.approx(0, abs=1e-6)
    assert float(task.loss(students.double(), target.half())) == pytest.approx(float(expected), rel=1e-2)
    students.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: task.loss(x, target.double()), students.detach().double().requires_grad_()
    )


@pytest.mark.parametrize(
    "target", [torch.full((2, 3, 4, 5), 0.5), torch.tensor([1.5, -0.25, -0.25]).view(1, 3, 1, 1)]
)
def test_soft_targets_must_be_probabilities(target):
    with pytest.raises(ValueError, match="soft targets must be probabilities over the 3 classes"):
        SoftSegmentation(("a", "b", "c")).loss(torch.zeros(target.shape), target)


# --- Eq. 7 --------------------------------------------------------------------------------------------------


def test_planted_losses_choose_their_branches():
    losses = {
        "segmentation": [0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.8, 0.7, 0.6, 0.5],
        "depth": [0.0] * 5 + [0.5, 0.2, 0.4, 0.2, 0.3],
    }
    assert branch_points(losses) == {"segmentation": 10, "depth": 7}


def test_eq_7_looks_at_the_decoder_only():
    assert branch_points({"depth": [0.0, 0.0, 3.0, 2.0]}) == {"depth": 4}


def test_eq_7_of_a_decoder_that_alone_was_amalgamated():
    assert branch_points({"depth": [None, None, 3.0, 2.0]}) == {"depth": 4}


@pytest.mark.parametrize("losses", [[], [1.0, 1.0, float("nan"), 1.0], [1.0, 1.0, None, 1.0]])
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
    weights = {task: WEIGHTS[task] for each in parts["teachers"].values() for task in each.heads}
    return BlockObjective(*parts.values(), n, tasks=TASKS, weights=weights)


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


def test_a_teacher_in_training_mode():
    with pytest.raises(ValueError, match=r"the depth teacher is in training mode.*call eval\(\)"):
        objective_for(teachers={"depth": teacher("depth", 2).train()})


def test_a_teacher_of_other_classes():
    """Its predictions may even lie in the range: the number of its classes tells."""
    other = {"segmentation": build_network(TINY, {"segmentation": 5}, seed=0).eval()}
    objective = objective_for(teachers=other, codings={"segmentation": ChannelCoding(4)})
    batch = {"image": torch.rand(1, 3, 8, 8), "labels": torch.zeros(1, 8, 8, dtype=torch.long)}
    with pytest.raises(ValueError, match="segmentation network answers in 5 channels, its task has 3"):
        objective(batch)


def test_unknown_switches_and_a_teacher_without_weight_in_eq_5():
    with pytest.raises(ValueError, match="switches must be 'student' or 'teacher', got 'mine'"):
        setting(1, switches="mine")
    with pytest.raises(ValueError, match=r"teachers \['depth'\] have no weight λ in Eq. 5"):
        FeatureObjective(
            build_network(TINY, {}, seed=0),
            {"depth": teacher("depth", 2)},
            {"depth": ChannelCoding(4)},
            1,
            weights={},
        )


class Images(list, torch.utils.data.Dataset):
    """A data set that knows more than it should tell."""


def test_a_task_without_weight():
    teachers, codings = {"depth": teacher("depth", 2)}, {"depth": ChannelCoding(4)}
    with pytest.raises(ValueError, match=r"one weight λ for each of the tasks"):
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
