"""Eq. 4 of Liu et al. and its two players, against other words for the same: values, gradients, who moves."""

import copy
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors

from kamal_lib.data.loaders import loader
from kamal_lib.distill.structured import (
    DEPTH,
    SEGMENTATION,
    CriticObjective,
    StudentObjective,
    as_it_is,
    holistic_map,
)
from kamal_lib.engine import Schedule, fit, make_fabric, mean_losses
from kamal_lib.losses.adversarial import gradient_penalty, hinge_loss
from kamal_lib.losses.features import Mimic, attention_loss
from kamal_lib.losses.structured import pair_wise_loss, pixel_wise_loss
from kamal_lib.models.critic import Critic
from kamal_lib.models.segmenters import SLIM_STUDENT, SLIM_STUDENT_HALF, Segmenter, build_segmenter
from kamal_lib.sample import VOID
from kamal_lib.tasks import Depth, Normals, Segmentation

CLASSES = Segmentation(("a", "b", "c"))
METRES = Depth(bins=5, bin_length=0.5)
TASKS = {"segmentation": CLASSES, "depth": METRES, "normals": Normals()}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def segmenter(channels: int = 4, outputs: int = 3, *, task="segmentation", stride: int = 2, seed: int = 0):
    """A segmenter of one convolution, with norm buffers, whose logits are far from alike."""
    torch.manual_seed(seed)
    body = nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )
    head = nn.Conv2d(channels, outputs, 1)
    nn.init.normal_(head.weight)
    return Segmenter(SLIM_STUDENT, body, {task: head})


def small_critic(channels: int = 3, *, norm: bool = True) -> Critic:
    torch.manual_seed(7)
    critic = Critic(channels, blocks=3, attentions=1, width=4, norm=norm)
    for module in critic.modules():
        if hasattr(module, "gamma"):
            nn.init.constant_(module.gamma, 0.5)
    return critic


def taught(seed: int = 1, **options) -> Segmenter:
    """A teacher whose running statistics are its own."""
    teacher = segmenter(6, seed=seed, **options)
    teacher(noise(8, 3, 10, 12, seed=9).sigmoid())
    return teacher.eval()


def some_batch(images: int = 4, seed: int = 0) -> dict:
    image = noise(images, 3, 10, 12, seed=seed).sigmoid()
    return {"image": image, "labels": image.argmax(1), "depth": 1 + image[:, 0]}


def players(task="segmentation", *, critic=None, outputs=None, seed: int = 3, **options):
    """(objective of the student, objective of the critic) in training mode, on networks of their own."""
    outputs = TASKS[task].channels if outputs is None else outputs
    student, teacher = (make(task=task, outputs=outputs) for make in (segmenter, taught))
    critic = critic or small_critic({"segmentation": 3, "depth": 1}[task])
    weights = options.pop("weights", {"segmentation": SEGMENTATION, "depth": DEPTH}[task])
    judged = critic if "holistic" in weights else None
    ours = StudentObjective(student, teacher, TASKS[task], critic=judged, weights=weights, **options)
    theirs = CriticObjective(critic, student, teacher, TASKS[task], seed=seed)
    return ours, theirs


def prints(*modules: nn.Module) -> list[list[torch.Tensor]]:
    """The bits of every weight and buffer of each."""
    return [[value.clone() for value in module.state_dict().values()] for module in modules]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def backward(losses: dict[str, torch.Tensor]) -> None:
    torch.stack(list(losses.values())).sum().backward()


# --- Eq. 4 in other words -----------------------------------------------------------------------------------


def cosines(features: torch.Tensor) -> torch.Tensor:
    """a_ij of every image among nodes of 2×2 pixels, N×N."""
    nodes = F.avg_pool2d(features, 2, ceil_mode=True, count_include_pad=False).flatten(2)
    unit = nodes / nodes.norm(dim=1, keepdim=True)
    return unit.mT @ unit


MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def eq_4(student: Segmenter, teacher: Segmenter, critic: nn.Module, batch, temperature=1.0) -> dict:
    """All four terms from the parts up; the student in training mode, the teacher in eval mode."""
    image = batch["image"]
    f, g = (net.body((image - MEAN) / STD) for net in (student.train(), teacher))
    s, t = student.heads["segmentation"](f), teacher.heads["segmentation"](g)
    large = F.interpolate(s, size=(10, 12), mode="bilinear", align_corners=False)
    p, q = (s / temperature).softmax(1), (t / temperature).softmax(1)
    return {
        "segmentation": F.cross_entropy(large, batch["labels"]),
        "pixel": 10 * temperature**2 * (q * (q.log() - p.log())).sum(1).mean(),
        "pair": 10 * (cosines(f) - cosines(g)).square().mean(),
        "holistic": -0.1 * copy.deepcopy(critic).train()(image, large.softmax(1)).mean(),
    }


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_four_terms_and_their_gradient_in_other_words(temperature):
    ours, theirs = players(pixel=partial(pixel_wise_loss, temperature=temperature))
    student = copy.deepcopy(ours.student)
    found = ours(some_batch())
    expected = eq_4(student, ours._teacher[0], theirs.critic, some_batch(), temperature)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert float(found[name].detach()) == pytest.approx(float(value.detach()), rel=1e-4), name
        assert abs(float(value.detach())) > 1e-4, name
    backward(found)
    backward(expected)
    for (name, a), b in zip(ours.student.named_parameters(), student.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), name
        assert float(a.grad.abs().max()) > 1e-3, name


def test_the_critics_two_losses_in_other_words():
    ours, theirs = players()
    batch, critic = some_batch(), copy.deepcopy(theirs.critic)
    student, (teacher,), image = copy.deepcopy(ours.student).train(), ours._teacher, batch["image"]
    mix = theirs.mix(4)
    found = theirs(batch)
    with torch.no_grad():
        fake, real = (net(image)["segmentation"].softmax(1) for net in (student, teacher))
    expected = {
        "critic": critic(image, fake).mean() - critic(image, real).mean(),
        "penalty": gradient_penalty(critic, image, real, fake, mix=mix),
    }
    backward(found)
    backward(expected)
    for name, value in expected.items():
        assert float(found[name].detach()) == pytest.approx(float(value.detach()), rel=1e-4), name
    for (name, a), b in zip(theirs.critic.named_parameters(), critic.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b[1].grad, rtol=1e-3, atol=1e-5), name


def test_both_players_judge_the_same_map_by_the_same_critic():
    """λ2 E[D(Q^s | I)] of the student's turn is the fake half of Eq. 3 in the critic's turn on that batch."""
    ours, _ = players()
    (critic,), (teacher,) = ours._others, ours._teacher
    fake_half = CriticObjective(
        critic, ours.student, teacher, CLASSES, seed=0, loss=lambda real, fake: fake.mean()
    )
    score = float(fake_half(some_batch())["critic"].detach())
    assert float(ours(some_batch())["holistic"].detach()) == pytest.approx(-0.1 * score, rel=1e-5)


def test_hinge_and_no_penalty():
    ours, theirs = players()
    other = CriticObjective(
        theirs.critic, ours.student, *ours._teacher, CLASSES, seed=0, loss=hinge_loss, penalty=0.0
    )
    assert other(some_batch()).keys() == {"critic"}
    assert float(other(some_batch())["critic"].detach()) > float(theirs(some_batch())["critic"].detach())
    assert int(other.batches) == 2


# --- what the critic sees -----------------------------------------------------------------------------------


def test_the_image_is_part_of_what_is_judged():
    """One map with two images has two scores, in either turn."""
    ours, theirs = players(weights={"holistic": 1.0}, labels=False)
    for parameter in (*ours.student.body.parameters(), *ours._teacher[0].body.parameters()):
        parameter.data.zero_()  # networks that are blind
    a, b = some_batch(), some_batch(seed=1)
    assert torch.equal(ours.student(a["image"])["segmentation"], ours.student(b["image"])["segmentation"])
    found = [[float(v.detach()) for v in (*ours(x).values(), *theirs(x).values())] for x in (a, b)]
    assert all(
        abs(x - y) > 1e-4
        for x, y in zip(found[0][:1] + found[0][2:], found[1][:1] + found[1][2:], strict=True)
    )


def test_a_segmentation_is_probabilities_and_depth_is_metres():
    response = 3 * noise(2, 5, 4, 6)
    assert torch.equal(holistic_map(Segmentation(tuple("abcde")), response), response.softmax(1))
    depth = holistic_map(METRES, response)
    assert depth.shape == (2, 1, 4, 6)
    edges = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5]).view(5, 1, 1)
    assert torch.allclose(depth[:, 0], (response.softmax(1) * edges).sum(1))
    assert holistic_map(Normals(), response[:, :3]).shape == (2, 3, 4, 6)


def test_depth_as_the_paper_trains_it():
    """Pairs and the whole, the decoded map against the teacher's; pixel-wise is there to be compared."""
    ours, theirs = players("depth")
    batch, (teacher,) = some_batch(), ours._teacher
    student = copy.deepcopy(ours.student).train()
    seen = []
    handle = theirs.critic.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    found = theirs(batch) | ours(batch)
    handle.remove()
    assert list(found) == ["critic", "penalty", "depth", "pair", "holistic"]
    image, metres = (
        batch["image"],
        [METRES.decode(net(batch["image"])["depth"]) for net in (teacher, student)],
    )
    for (judged, map_), expected in zip(seen[:2], metres, strict=True):
        assert torch.equal(judged, image)
        assert torch.allclose(map_[:, 0], expected, atol=1e-5)
    assert torch.allclose(seen[-1][1][:, 0], metres[1], atol=1e-5)
    assert float(found["depth"].detach()) == pytest.approx(
        float(METRES.loss(student(image)["depth"], batch["depth"]).detach()), rel=1e-4
    )
    compared, _ = players("depth", weights=DEPTH | {"pixel": 10.0})
    assert list(compared(batch)) == ["depth", "pixel", "pair", "holistic"]


# --- who learns and who keeps still -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
def test_gradients_and_buffers_of_either_turn(norm):
    """In the student's turn its weights get gradients and its norm layers move, else the critic's."""
    for whose in (0, 1):
        both = players(critic=small_critic(norm=norm))
        networks = (both[0].student, both[1].critic, *both[0]._teacher)
        before = prints(*networks)
        backward(both[whose](some_batch()))
        for index, (network, old, new) in enumerate(zip(networks, before, prints(*networks), strict=True)):
            got = [p.grad for p in network.parameters() if p.grad is not None]
            assert len(got) == (len([*network.parameters()]) if index == whose else 0)
            assert index != whose or sum(float(g.abs().sum()) for g in got) > 1e-3
            moves = index == whose and any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
            assert same(old, new) != moves, (whose, index)


class Rooms(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = torch.rand(3, 10, 12, generator=torch.Generator().manual_seed(index))
        return {"image": tv_tensors.Image(image), "labels": tv_tensors.Mask(image.argmax(0))}


SCHEDULE = Schedule(epochs=2, batch_size=4, learning_rate=0.01)
RATE = replace(SCHEDULE, learning_rate=4e-3, weight_decay=0.0)


def train(ours: StudentObjective, theirs: CriticObjective, *, images: int | None = None, **options) -> list:
    batches = loader(Rooms(), batch_size=4, shuffle=True, seed=5)
    return fit(ours, batches, SCHEDULE, opponent=(theirs, RATE), fabric=make_fabric("cpu"), **options)


def test_through_a_training_each_moves_in_its_own_turn_only():
    ours, theirs = players()
    networks, seen = (ours.student, theirs.critic, *ours._teacher), []
    theirs.register_forward_pre_hook(lambda *_: seen.append((1, prints(*networks), theirs.training)))
    ours.register_forward_pre_hook(lambda *_: seen.append((0, prints(*networks), ours.student.training)))
    history = train(ours, theirs)
    assert [whose for whose, *_ in seen] == [1, 0] * 6
    assert all(training for *_, training in seen)
    for (whose, before, _), (_, after, _) in pairwise(seen):
        assert [same(a, b) for a, b in zip(before, after, strict=True)] == [whose == 1, whose == 0, True]
    assert history[0].keys() == {"epoch", "critic", "penalty", *("segmentation", "pixel", "pair", "holistic")}


def test_the_state_is_what_learns():
    mimic = Mimic(4, 6, seed=0)
    ours, theirs = players(weights={"mimic": 1.0}, features={"mimic": mimic, "pair": pair_wise_loss})
    student = {f"student.{name}" for name in ours.student.state_dict()}
    assert ours.state_dict().keys() == student | {f"learning.mimic.adapter.{n}" for n in ("weight", "bias")}
    critic = {f"critic.{name}" for name in theirs.critic.state_dict()}
    assert theirs.state_dict().keys() == critic | {"batches"}
    backward(ours(some_batch()))
    assert float(mimic.adapter.weight.grad.abs().max()) > 0
    assert not any(p.requires_grad for p in ours._teacher[0].parameters())
    theirs.double()
    assert {p.dtype for net in (theirs, ours.student, *ours._teacher) for p in net.parameters()} == {
        torch.float64
    }


def test_a_module_as_it_is():
    critic = small_critic().eval()
    image, response = noise(2, 3, 8, 8).requires_grad_(), noise(2, 3, 8, 8, seed=1).requires_grad_()
    found = as_it_is(critic, image, response)
    assert torch.equal(found, critic(image, response))
    found.sum().backward()
    assert all(p.grad is None for p in critic.parameters())
    (expected,) = torch.autograd.grad(critic(image, response).sum(), response)
    assert torch.equal(response.grad, expected)
    assert all(p.requires_grad for p in critic.parameters())


def test_signs():
    """The critic's turns part the scores of teacher and student, the student's turns bring them together."""

    def margin() -> float:
        return -float(theirs(some_batch())["critic"].detach())

    ours, theirs = players(weights={"holistic": 1.0}, labels=False)
    for objective, rises in ((theirs, True), (ours, False)):
        optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=0.01)
        before = margin()
        for _ in range(10):
            optimizer.zero_grad()
            backward(objective(some_batch()))
            optimizer.step()
        assert (margin() > before + 0.01) if rises else (margin() < before - 0.01)


# --- the ε of the penalty, and a training that is resumed ---------------------------------------------------


def test_the_mix_is_a_function_of_seed_and_batch(monkeypatch):
    (_, a), (_, b), (_, c) = players(), players(), players(seed=4)
    first = a.mix(4)
    assert torch.equal(first, b.mix(4))
    assert not torch.equal(first, c.mix(4))
    assert 0 <= float(first.min()) < float(first.max()) <= 1
    torch.manual_seed(0)
    a(some_batch())
    assert not torch.equal(first, a.mix(4))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.mix(4), b.mix(4))
    a.eval()(some_batch())
    assert int(a.batches) == int(b.batches) == 1
    whole = a.mix(4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):  # the loader gives each process every second image
        monkeypatch.setenv("RANK", str(rank))
        assert torch.equal(a.mix(2), whole[rank::2])


class StopError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(("whose", "turn"), [(1, 2), (0, 2), (0, 4)])
def test_a_training_that_was_stopped_goes_on_bit_for_bit(whose, turn, tmp_path):
    turns = 0

    def stop(*_):
        nonlocal turns
        turns += 1
        if turns > turn:
            raise StopError

    checkpoint = tmp_path / "state.safetensors"
    broken = players()
    broken[whose].register_forward_pre_hook(stop)
    with pytest.raises(StopError):
        train(*broken, checkpoint=checkpoint, save_every=0.0)
    resumed, whole = players(), players()
    torch.manual_seed(5)  # nothing may draw from the global generator
    history = train(*resumed, checkpoint=checkpoint)
    assert history == train(*whole)
    assert all(same(a, b) for a, b in zip(prints(*resumed), prints(*whole), strict=True))
    assert int(resumed[1].batches) == 6


def test_held_out_losses_move_nothing():
    ours, theirs = players()
    before = prints(ours, theirs, *ours._teacher)
    images = loader(Rooms(), batch_size=4, shuffle=False, seed=0)
    found = [mean_losses(o, images, fabric=make_fabric("cpu")) for o in (ours, theirs)]
    assert found[1]["penalty"] > 0
    assert not ours.student.training
    assert not theirs.critic.training
    assert all(same(a, b) for a, b in zip(before, prints(ours, theirs, *ours._teacher), strict=True))
    once = mean_losses(ours, loader(Rooms(), batch_size=10, shuffle=False, seed=0), fabric=make_fabric("cpu"))
    assert once == pytest.approx(found[0], rel=1e-4)  # images do not meet in eval mode


def test_the_slim_networks():
    """Those of segmentation_models_pytorch, a teacher of two tasks, a critic of the paper's depth."""
    heads = {"segmentation": 3}
    student = build_segmenter(SLIM_STUDENT_HALF, heads, seed=0)
    teacher = build_segmenter(SLIM_STUDENT, heads | {"depth": 5}, seed=1).eval()
    critic = Critic(3, width=4)
    ours = StudentObjective(student, teacher, CLASSES, critic=critic)
    theirs = CriticObjective(critic, student, teacher, CLASSES, seed=0)
    image = noise(2, 3, 32, 32).sigmoid()
    batch = {"image": image, "labels": image.argmax(1)}
    for objective in (theirs, ours):
        before = prints(student, critic, teacher)
        backward(objective(batch))
        moved = [not same(a, b) for a, b in zip(before, prints(student, critic, teacher), strict=True)]
        assert moved == [objective is ours, objective is theirs, False]
    assert all(p.grad is not None for p in (*student.parameters(), *critic.parameters()))


# --- labels, or none ----------------------------------------------------------------------------------------


def test_without_labels_none_is_read():
    ours, theirs = players(labels=False)
    image = {"image": some_batch()["image"]}
    found = ours(image)
    assert list(found) == ["pixel", "pair", "holistic"]
    assert theirs(image).keys() == {"critic", "penalty"}
    again, _ = players(labels=False)
    wrong = image | {"labels": torch.full((4, 10, 12), 77)}
    assert {k: float(v.detach()) for k, v in again(wrong).items()} == {
        k: float(v.detach()) for k, v in found.items()
    }
    with_labels, _ = players()
    assert {k: v.detach() for k, v in with_labels(some_batch()).items() if k != "segmentation"} == found


@pytest.mark.parametrize(
    ("task", "key", "unknown"), [("segmentation", "labels", VOID), ("depth", "depth", 0)]
)
def test_labelled_and_unlabelled_images_together(task, key, unknown):
    batch = some_batch()
    half = batch | {key: batch[key].clone()}
    half[key][:2] = unknown
    for labels in (True, "some"):
        ours, _ = players(task, labels=labels)
        found = ours(half)
        student = copy.deepcopy(ours.student).train()
        response = student(batch["image"])[task]
        expected = TASKS[task].loss(response[2:], batch[key][2:])
        assert float(found[task].detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    nothing = half | {key: torch.full_like(half[key], unknown)}
    for unlabelled, words in (
        (nothing, "got one without a known pixel"),
        ({"image": batch["image"]}, r"got \['image'\]"),
    ):
        ours, _ = players(task, labels="some")
        found = ours(unlabelled)
        assert float(found[task].detach()) == 0
        backward(found)
        ours, _ = players(task)
        with pytest.raises(
            ValueError, match=f"the {task} loss wants '{key}' in every batch, {words}: .*labels=False"
        ):
            ours(unlabelled)


# --- what it is compared with -------------------------------------------------------------------------------


def test_mimic_by_hand():
    features, teacher, mimic = (
        noise(2, 4, 3, 5).requires_grad_(),
        noise(2, 6, 3, 5, seed=1),
        Mimic(4, 6, seed=3),
    )
    w, b = mimic.adapter.weight.detach()[:, :, 0, 0], mimic.adapter.bias.detach()
    total = 0.0
    for n, i, j in [(n, i, j) for n in range(2) for i in range(3) for j in range(5)]:
        difference = w @ features.detach()[n, :, i, j] + b - teacher[n, :, i, j]
        total += float(difference.square().sum())
    loss = mimic(features, teacher.requires_grad_())
    assert float(loss.detach()) == pytest.approx(total / (2 * 3 * 5 * 6), rel=1e-5)
    loss.backward()
    assert teacher.grad is None
    assert float(features.grad.abs().max()) > 0


def test_mimics_start_is_its_seeds():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a, b, c = (Mimic(4, 6, seed=seed).adapter.weight for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_attention_by_hand_in_both_forms():
    features, teacher = noise(2, 4, 3, 5), noise(2, 6, 3, 5, seed=1)
    distances = []
    for s, t in zip(features, teacher, strict=True):
        a, b = (sum(c * c for c in x).flatten() for x in (s, t))
        difference = a / (a @ a).sqrt() - b / (b @ b).sqrt()
        distances.append(float(difference @ difference))
    paper, public = (float(attention_loss(features, teacher, form=form)) for form in ("paper", "public"))
    assert paper == pytest.approx(sum(d**0.5 for d in distances) / 2, rel=1e-5)
    assert public == pytest.approx(sum(distances) / 30, rel=1e-5)
    theirs = [F.normalize(x.pow(2).mean(1).view(2, -1)) for x in (features, teacher)]  # as public code has it
    assert public == pytest.approx(float((theirs[0] - theirs[1]).pow(2).mean()), rel=1e-5)


@pytest.mark.parametrize("form", ["paper", "public"])
def test_attention_at_agreement_and_at_nothing(form):
    features = noise(2, 4, 3, 5).requires_grad_()
    louder = torch.cat((features.detach(), features.detach()), 1)  # other channels, another scale, one map
    loss = attention_loss(features, louder, form=form)
    assert float(loss.detach()) < 1e-6
    empty = torch.zeros(2, 4, 3, 5, requires_grad=True)
    (loss + attention_loss(empty, louder, form=form)).backward()
    assert torch.isfinite(features.grad).all()
    assert torch.isfinite(empty.grad).all()


def test_local_pairs_are_pixels_and_their_8_neighbours():
    features, teacher = noise(1, 4, 4, 5), noise(1, 6, 4, 5, seed=1)
    total, connections = 0.0, 0
    for i, j, di, dj in [
        (i, j, di, dj) for i in range(4) for j in range(5) for di in (-1, 0, 1) for dj in (-1, 0, 1)
    ]:
        if 0 <= i + di < 4 and 0 <= j + dj < 5:
            a, b = (
                float(F.cosine_similarity(x[0, :, i, j], x[0, :, i + di, j + dj], dim=0))
                for x in (features, teacher)
            )
            total, connections = total + (a - b) ** 2, connections + 1
    assert connections == (3 * 4 - 2) * (3 * 5 - 2)
    assert float(pair_wise_loss(features, teacher, patch=1, radius=1)) == pytest.approx(
        total / connections, rel=1e-4
    )


def test_other_losses_take_the_place_of_pairs():
    """Table 6, and two ranges at once, each with its own λ."""
    local = partial(pair_wise_loss, patch=1, radius=1)
    every = {
        "mimic": Mimic(4, 6, seed=0),
        "attention": attention_loss,
        "local": local,
        "pair": pair_wise_loss,
    }
    ours, _ = players(features=every, weights={"attention": 3.0, "local": 2.0, "pair": 0.5})
    student = copy.deepcopy(ours.student).train()
    found = ours(some_batch())
    assert list(found) == ["segmentation", "attention", "local", "pair"]
    f, g = (net.features_and_response(some_batch()["image"])[0] for net in (student, *ours._teacher))
    for name, weight in (("attention", 3.0), ("local", 2.0), ("pair", 0.5)):
        assert float(found[name].detach()) == pytest.approx(
            weight * float(every[name](f, g).detach()), rel=1e-4
        )


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"weights": {"pixel": -10.0}},
            r"must be numbers from 0 on for some of .*pixel, pair, holistic, got .*-10",
        ),
        ({"weights": {"pair": float("nan")}}, "must be numbers from 0 on"),
        ({"weights": {"pairs": 1.0}}, "got {'pairs': 1.0}: leave out what shall be off, give `features`"),
        ({"labels": "few"}, "labels must be True, False or 'some'.* got 'few'"),
        (
            {"labels": False, "weights": {}},
            "without them a term must have a weight, got False and weights {}",
        ),
    ],
)
def test_settings_that_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        players(**options)


def test_a_critic_and_its_weight_go_together():
    student, teacher = segmenter(), taught()
    with pytest.raises(
        ValueError, match=r"needs a critic and a weight, got no critic and weights .*give both"
    ):
        StudentObjective(student, teacher, CLASSES)
    with pytest.raises(
        ValueError, match=r"needs a critic and a weight, got a critic and weights {'pixel': 10.0}"
    ):
        StudentObjective(student, teacher, CLASSES, weights={"pixel": 10.0}, critic=small_critic())
    with pytest.raises(ValueError, match="penalty must be from 0 on, got -1"):
        CriticObjective(small_critic(), student, teacher, CLASSES, seed=0, penalty=-1.0)


def test_networks_that_do_not_go_together():
    student, teacher, weights = segmenter(), taught(), {"pixel": 10.0, "pair": 10.0}
    with pytest.raises(ValueError, match="student and teacher are one network"):
        StudentObjective(teacher, teacher, CLASSES, weights=weights)
    with pytest.raises(
        ValueError, match=r"one task, which its teacher has, too, got \('segmentation',\) and \('depth',"
    ):
        StudentObjective(student, taught(task="depth"), CLASSES, weights=weights)
    with pytest.raises(ValueError, match="normals are no choice among classes: leave 'pixel' out"):
        StudentObjective(segmenter(task="normals"), taught(task="normals"), Normals(), weights=weights)
    for mine, other, whose in ((4, 3, "student"), (3, 4, "teacher")):
        parts = segmenter(outputs=mine), taught(outputs=other), CLASSES
        words = f"the {whose} answers in 4 channels, its segmentation task has 3: was it built for"
        with pytest.raises(ValueError, match=words):
            StudentObjective(*parts, weights=weights)(some_batch())
        with pytest.raises(ValueError, match=words):
            CriticObjective(small_critic(), *parts, seed=0)(some_batch())
    with pytest.raises(
        ValueError, match="logits of the same images at the same size, got 4 of 5×6 and 4 of 3×3"
    ):
        StudentObjective(student, taught(stride=4), CLASSES, weights=weights)(some_batch())


def test_modes_that_are_refused():
    with pytest.raises(ValueError, match=r"the teacher is in training mode.*call eval\(\) on it"):
        StudentObjective(segmenter(), segmenter(6), CLASSES, weights={"pixel": 1.0})
    for whose in (0, 1):
        both = players()
        both[0].student.eval()
        with pytest.raises(
            ValueError, match="the student is in eval mode and its objective in training mode"
        ):
            both[whose](some_batch())
        both[whose].train()(some_batch())
        both[0]._teacher[0].train()
        with pytest.raises(ValueError, match="the teacher is in training mode"):
            both[whose](some_batch())


def test_features_that_are_refused():
    with pytest.raises(
        ValueError, match="built for features of 4 channels and a teacher's of 6, got 6 and 4"
    ):
        Mimic(4, 6, seed=0)(noise(2, 6, 3, 5), noise(2, 4, 3, 5))
    for loss in (attention_loss, Mimic(4, 6, seed=0)):
        with pytest.raises(
            ValueError, match="features of the same images at the same size, got 2 of 3×5 and 2 of 4×5"
        ):
            loss(noise(2, 4, 3, 5), noise(2, 6, 4, 5))
    with pytest.raises(ValueError, match="form must be one of 'paper', 'public', got 'code'"):
        attention_loss(noise(2, 4, 3, 5), noise(2, 6, 3, 5), form="code")
