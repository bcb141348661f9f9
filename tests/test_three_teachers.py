"""Section 5.2: a TargetNet as a teacher, offline and online, orders of arrival; Eqs. 8 and 9."""

from dataclasses import replace

import pytest
import torch
from test_amalgamation import changed, state, step
from test_two_teachers import Stored
from torch import nn

from kamal_lib import recipes
from kamal_lib.distill.amalgamation import BlockObjective, branch_points
from kamal_lib.models.blocks import Activation
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.encoder_decoder import Architecture, EncoderDecoder, build_network
from kamal_lib.models.target_net import Coded, TargetNet, branch_out
from kamal_lib.recipes import __main__ as command
from kamal_lib.recipes import amalgamation as stages
from kamal_lib.recipes import arrivals, task_teachers
from kamal_lib.recipes.profiles import WEIGHTS as WORKBOOK
from kamal_lib.recipes.three_teachers import GROUPS, three_teachers
from kamal_lib.tasks import Depth, Normals, Segmentation

TINY = Architecture(widths=(4, 6, 8), convs=(1, 1, 1), pools=(True, False, True))
N = TINY.blocks
TASKS = {
    "segmentation": Segmentation(("a", "b", "c")),
    "depth": Depth(bins=4, bin_length=0.5),
    "normals": Normals(),
}
WEIGHTS = {"segmentation": 1.0, "depth": 4.0, "normals": 0.5}
POINTS = [(4, 6), (5, 5), (6, 4), (6, 6), (4, 4)]
IMAGE = torch.rand(2, 3, 21, 27, generator=torch.Generator().manual_seed(4))


def network(*tasks: str, seed: int) -> EncoderDecoder:
    """In eval mode, its norm layers not at their trivial start."""
    net = build_network(TINY, {task: TASKS[task].channels for task in tasks}, seed=seed)
    with torch.no_grad():
        net.train()(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))
    return net.eval()


def codings_of(names, *, gain: float = 1.0, seed: int = 0) -> dict[str, list[ChannelCoding]]:
    """{name: a coding for each block} whose gates differ from image to image."""
    channels = network("depth", seed=0).channels
    torch.manual_seed(seed)
    made = {name: [ChannelCoding(c, gain=gain) for c in channels] for name in names}
    for each in made.values():
        for coding in each:
            nn.init.normal_(coding.expand.weight)
    return made


def target_net_2(segmentation: int, depth: int) -> TargetNet:
    teachers = {"segmentation": network("segmentation", seed=1), "depth": network("depth", seed=2)}
    points = {"segmentation": segmentation, "depth": depth}
    return branch_out(network("depth", seed=3), codings_of(teachers), teachers, points).eval()


def taught(teachers) -> dict[str, torch.Tensor]:
    """The image with what the teachers say of it."""
    with torch.no_grad():
        responses = {task: r for net in teachers.values() for task, r in net(IMAGE).items()}
    return {"image": IMAGE} | {TASKS[t].key: TASKS[t].decode(r) for t, r in responses.items()}


def online(n: int, points=(4, 6), **changes):
    """(objective, student, teachers, codings, batch) of Eq. 9."""
    teachers = {"U": target_net_2(*points), "M": network("normals", seed=5)} | changes.pop("teachers", {})
    student = changes.pop("student", network("depth", seed=6))
    codings = changes.pop("codings", {t: each[n - 1] for t, each in codings_of("UM", seed=7).items()})
    given = {"tasks": TASKS, "weights": WEIGHTS} | changes
    objective = BlockObjective(student, teachers, codings, n, **given)
    return objective, student, teachers, codings, taught(teachers)


# --- a TargetNet can be cut and taken apart -----------------------------------------------------------------


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("n", range(N + 1))
def test_a_suffix_is_what_forward_from_does(points, n):
    net, task_points = target_net_2(*points), dict(zip(("segmentation", "depth"), points, strict=True))
    torch.manual_seed(1)
    features = network("depth", seed=9).forward_to(IMAGE, n)
    given = features if n else network("depth", seed=9).forward_to(IMAGE, 0)
    responses = net.forward_from(given, n)
    for task in task_points:
        blocks, head = net.suffix(task, n)
        assert len(blocks) == N - n
        a = given
        for block in blocks:
            a = block(a)
        assert torch.equal(head(a.features), responses[task])


@pytest.mark.parametrize("points", POINTS)
def test_the_rule_by_hand(points):
    """Up to its branch point: trunk, coding, branch. Beyond it: that task's own branch block n, uncoded."""
    net = target_net_2(*points)
    for n in range(1, N + 1):
        a = network("depth", seed=9).forward_to(IMAGE, n)
        found = net.forward_from(a, n)
        for task, point in zip(("segmentation", "depth"), points, strict=True):
            branch, b = net.branches[task], a
            if n <= point:
                for block in net.trunk[n:point]:
                    b = block(b)
                b = Activation(branch.coding.gates(b.features) * b.features, b.switches)
                rest = branch.blocks
            else:
                rest = branch.blocks[n - point :]
            for block in rest:
                b = block(b)
            assert torch.equal(found[task], branch.head(b.features))


def test_blocks_of_a_task_are_those_on_its_way_without_codings():
    net = target_net_2(4, 6)
    assert net.blocks_of("depth") == list(net.trunk)
    assert net.blocks_of("segmentation") == [*net.trunk[:4], *net.branches["segmentation"].blocks]
    coded = Coded(nn.Identity(), Coded(nn.Identity(), net.trunk[5]))
    assert (coded.channels, coded.pool) == (net.trunk[5].channels, net.trunk[5].pool)
    net.branches["segmentation"].blocks[0] = coded
    assert net.blocks_of("segmentation")[4] is net.trunk[5]


@pytest.mark.parametrize("n", [-1, N + 1])
def test_no_suffix_outside_the_network(n):
    for net in (target_net_2(4, 6), network("depth", seed=0)):
        with pytest.raises(ValueError, match=f"n = {n} does not exist"):
            net.suffix("depth", n)


def test_a_target_net_has_one_feature_up_to_its_first_branch_only():
    with pytest.raises(ValueError, match=r"one F\^n for n = 0..4 only, got n = 5: its tasks part at"):
        target_net_2(4, 6).forward_to(IMAGE, 5)


# --- Eqs. 8 and 9 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("n", range(1, N + 1))
def test_a_copy_of_target_net_2_agrees_with_it(points, n):
    """Open gates, and the blocks on the way to a task copied: that task's prediction comes back bit for bit.

    Up to the first branch the trunk is the way of both tasks.
    """
    teachers = {"U": target_net_2(*points), "M": network("normals", seed=5)}
    net, normals = teachers["U"], teachers["M"]
    first = min(points)
    channels = network("depth", seed=0).channels[n - 1]
    open_gates = {"U": ChannelCoding(channels, gain=2.0), "M": ChannelCoding(channels, gain=2.0)}
    batch = taught(teachers)
    for task in net.tasks:
        blocks, _ = net.suffix(task, 0)
        copy = EncoderDecoder(TINY, blocks, {})
        own = net.forward_from(copy.forward_to(IMAGE, n), n)
        assert torch.equal(own[task], net(IMAGE)[task])
        objective = BlockObjective(copy, teachers, open_gates, n, tasks=TASKS, weights=WEIGHTS).eval()
        losses = {name: loss.detach() for name, loss in objective(batch).items()}
        agreeing = net.tasks if n <= first else (task,)
        if "depth" in agreeing:
            assert float(losses["depth"]) == 0
        if "segmentation" in agreeing:
            best = net(IMAGE)["segmentation"].log_softmax(1).amax(1)
            assert torch.allclose(losses["segmentation"], -best.mean())
    copy = EncoderDecoder(TINY, list(normals.blocks), {})
    objective = BlockObjective(copy, teachers, open_gates, n, tasks=TASKS, weights=WEIGHTS).eval()
    assert torch.allclose(objective(batch)["normals"].detach(), torch.tensor(-WEIGHTS["normals"]))


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("n", range(1, N + 1))
def test_eq_9_by_hand(points, n):
    objective, student, teachers, codings, batch = online(n, points)
    objective.eval()
    a = student.forward_to(IMAGE, n)
    of_u = a.with_features(codings["U"].gates(a.features) * a.features)
    of_m = a.with_features(codings["M"].gates(a.features) * a.features)
    responses = teachers["U"].forward_from(of_u, n) | teachers["M"].forward_from(of_m, n)
    losses = objective(batch)
    assert list(losses) == ["segmentation", "depth", "normals"]
    for task, loss in losses.items():
        expected = WEIGHTS[task] * TASKS[task].loss(responses[task], batch[TASKS[task].key])
        assert torch.equal(loss, expected)
    cosine = (TASKS["normals"].decode(responses["normals"]) * batch["normals"]).sum(1).mean()
    assert torch.allclose(losses["normals"], -WEIGHTS["normals"] * cosine, atol=1e-6)  # Eq. 4's sign


def test_eq_8_is_eq_6_of_three_teachers_and_without_the_third_that_of_two():
    teachers = {task: network(task, seed=i) for i, task in enumerate(TASKS, 1)}
    codings = {task: each[2] for task, each in codings_of(TASKS).items()}
    student, batch = network("depth", seed=6), taught(teachers)
    three = BlockObjective(
        student, teachers, codings, 3, tasks=TASKS, weights=WEIGHTS | {"normals": 0.0}
    ).eval()
    pair = {task: teachers[task] for task in ("segmentation", "depth")}
    two = BlockObjective(
        student, pair, codings, 3, tasks=TASKS, weights={task: WEIGHTS[task] for task in pair}
    ).eval()
    with torch.no_grad():
        both, alone = three(batch), two(batch)
    assert float(both.pop("normals")) == 0
    assert both == alone
    gradients = []
    for losses in (three(batch), two(batch)):
        learning = list(student.blocks[2].parameters())
        gradients.append(torch.autograd.grad(torch.stack(list(losses.values())).sum(), learning))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("n", [2, 4, 5, 6])
def test_online_changes_its_block_and_codings_only(n):
    objective, student, teachers, codings, batch = online(n)
    objective.train()
    before = {
        name: state(net) for name, net in (teachers | {"student": student} | codings_by(codings)).items()
    }
    for _ in range(2):
        step(objective, batch)
    for name, net in teachers.items():
        assert changed(before[name], net) == set()
        assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
        assert not any(module.training for module in net.modules())
    assert {name.split(".")[1] for name in changed(before["student"], student)} == {str(n - 1)}
    for name, coding in codings.items():
        assert changed(before[f"{name}-coding"], coding) == {"squeeze.weight", "expand.weight"}


def codings_by(codings):
    return {f"{name}-coding": coding for name, coding in codings.items()}


# --- branching out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("own", POINTS)
def test_target_net_3_predicts_what_its_parts_did(points, own):
    """Branched at any blocks it is the hybrid of Eq. 9 at each of them; nested TargetNets can be cut, too."""
    teachers = {"U": target_net_2(*points), "M": network("normals", seed=5)}
    student, codings = network("depth", seed=6), codings_of("UM", seed=7)
    at = {"segmentation": own[0], "depth": own[1], "normals": 5}
    net = branch_out(student, codings, teachers, at).eval()
    for task, p in at.items():
        name = "M" if task == "normals" else "U"
        a = student.forward_to(IMAGE, p)
        hybrid = a.with_features(codings[name][p - 1](a.features))
        assert torch.equal(net(IMAGE)[task], teachers[name].forward_from(hybrid, p)[task])
    for n in range(1, N + 1):  # and it can teach: any feature, any block, every task
        a = network("depth", seed=9).forward_to(IMAGE, n)
        for task, response in net.forward_from(a, n).items():
            blocks, head = net.suffix(task, n)
            b = a
            for block in blocks:
                b = block(b)
            assert torch.equal(head(b.features), response)
    again = branch_out(student, codings, teachers, at)
    again.load_weights(net.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(net(IMAGE).values(), again.eval()(IMAGE).values(), strict=True)
    )
    originals = {p.data_ptr() for each in (*teachers.values(), student) for p in each.parameters()}
    assert not originals & {p.data_ptr() for p in net.parameters()}
    assert all(p.requires_grad for p in net.parameters())


# --- bad input ----------------------------------------------------------------------------------------------


def test_two_teachers_of_one_task():
    depth = {"M": network("normals", seed=5), "D": network("depth", seed=2)}
    with pytest.raises(ValueError, match="U and D both teach depth: the student learns a task from one"):
        online(3, teachers=depth, codings=dict.fromkeys("UMD", ChannelCoding(8)))
    teachers = {"U": target_net_2(4, 6), "D": network("depth", seed=2)}
    with pytest.raises(ValueError, match="both teach depth"):
        branch_out(network("depth", seed=6), codings_of("UD"), teachers, {"segmentation": 4, "depth": 4})


@pytest.mark.parametrize("weights", [{}, {"segmentation": 1.0, "normals": 1.0}, WEIGHTS | {"edges": 1.0}])
def test_weights_that_are_not_those_of_the_tasks(weights):
    with pytest.raises(ValueError, match=r"one weight λ for each of the tasks \['depth', 'normals', 'seg"):
        online(3, weights=weights)


def test_a_task_of_target_net_2_that_is_missing():
    tasks = {task: TASKS[task] for task in ("segmentation", "normals")}
    with pytest.raises(ValueError, match=r"the teachers predict \['depth'\], which is no task here"):
        online(3, tasks=tasks)
    teachers = {"U": target_net_2(4, 6), "M": network("normals", seed=5)}
    with pytest.raises(ValueError, match=r"one branch point: \['depth', 'normals', 'segmentation'\], got"):
        branch_out(network("depth", seed=6), codings_of("UM"), teachers, {"segmentation": 4, "normals": 5})
    objective, *_, batch = online(3)
    del batch["depth"]
    with pytest.raises(KeyError, match="the depth loss needs 'depth' in every sample"):
        objective(batch)


def test_a_target_net_of_other_blocks():
    net = target_net_2(4, 6)
    net.branches["segmentation"].blocks[1].channels = 5
    with pytest.raises(ValueError, match="block 6 of the U teacher has 5 channels"):
        online(3, teachers={"U": net})


TEACHERS = task_teachers("smoke")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((("segmentation", "depth"), ("normals", "depth")), "depth would arrive again.*no cycle"),
        ((("depth", "depth"),), "depth would arrive again"),
        ((("segmentation",), ()), "each a tuple of one task or more"),
        ((), "each a tuple of one task or more"),
        (("normals",), "each a tuple of one task or more"),
        (("segmentation", "depth"), "each a tuple of one task or more"),
        ((("edges",),), r"\['edges'\] cannot arrive: there are teachers of segmentation, depth, normals"),
    ],
)
def test_an_order_of_arrival_that_is_none(order, message):
    with pytest.raises(ValueError, match=message):
        arrivals(order, TEACHERS, "smoke")


def test_teachers_that_do_not_fit_an_order():
    swapped = {"depth": TEACHERS["normals"], "normals": TEACHERS["depth"]}
    with pytest.raises(ValueError, match="each teacher stands under the one task that it teaches"):
        arrivals((("depth",), ("normals",)), swapped, "smoke")
    with pytest.raises(ValueError, match=r"\['depth'\] cannot arrive.*weights λ of normals"):
        arrivals((("depth",),), TEACHERS, "smoke", weights={"normals": 1.0})
    own = arrivals((("normals", "depth"),), TEACHERS, "smoke", weights={"normals": 1.0, "depth": 2.0})
    assert own.amalgamation.weights == (("normals", 1.0), ("depth", 2.0))
    wide = replace(TEACHERS["depth"].start, architecture=Architecture((8, 16), (1, 1), (True, True)))
    with pytest.raises(ValueError, match="the same widths and pools, block by block"):
        arrivals(
            (("depth", "normals"),), TEACHERS | {"depth": replace(TEACHERS["depth"], start=wide)}, "smoke"
        )


def test_codings_by_task_and_a_branch_in_training_mode():
    teachers = {"U": target_net_2(4, 6), "M": network("normals", seed=5)}
    at = {"segmentation": 4, "depth": 4, "normals": 5}
    with pytest.raises(ValueError, match=r"6 codings of each teacher, one a block, got \{'U': 0, 'M': 0\}"):
        branch_out(network("depth", seed=6), codings_of(TASKS), teachers, at)
    with pytest.raises(ValueError, match="needs a branch for each task, got none"):
        TargetNet([], {})
    teachers["U"].branches["depth"].train()
    with pytest.raises(ValueError, match="the U teacher is in training mode"):
        online(3, teachers=teachers)


def test_recipes_of_a_target_net_as_teacher_refuse_what_it_has_not():
    two = arrivals((("segmentation", "depth"), ("normals",)), TEACHERS, "smoke").amalgamation
    for option in ({"loss": "features"}, {"switches": "teacher"}):
        with pytest.raises(
            ValueError, match=r"TargetNet of segmentation\+depth has one F\^n up to its first"
        ):
            replace(two, **option)
    with pytest.raises(ValueError, match="two teachers teach the same task"):
        replace(two, teachers=(*two.teachers, TEACHERS["depth"]))
    with pytest.raises(ValueError, match="weights must give each task of the teachers"):
        replace(two, weights=two.weights[:2])


# --- recipes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("three-teachers")


@pytest.fixture
def here(store, monkeypatch):
    monkeypatch.setenv("KAMAL_STORE", str(store))


def test_orders_are_longer_mappings():
    def check(student, seed):
        """Weights, seed, gain and lengths of every student on the way."""
        plan = student.amalgamation
        assert dict(plan.weights) == {task: WORKBOOK[task] for task in student.tasks}
        assert (plan.seed, plan.gain, plan.decoder_only) == (seed, 2.0, False)
        assert student.fine_tuning == recipes.whole_game("smoke").target_net.fine_tuning
        for teacher in plan.teachers:
            if not isinstance(teacher, recipes.TaskTeacher):
                check(teacher, seed)

    for order in ((tuple(TASKS),), (("depth",), ("normals", "segmentation")), (("normals",), ("depth",))):
        check(arrivals(order, task_teachers("smoke", seed=3), "smoke"), 3)
    offline = arrivals((("segmentation", "depth", "normals"),), TEACHERS, "smoke")
    assert [t.key for t in offline.amalgamation.teachers] == ["segmentation", "depth", "normals"]
    other = arrivals((("depth", "normals"), ("segmentation",)), TEACHERS, "smoke")
    assert [t.key for t in other.amalgamation.teachers] == ["depth+normals", "segmentation"]
    assert other.amalgamation.start == "depth"
    one_by_one = arrivals((("normals",), ("depth",), ("segmentation",)), TEACHERS, "smoke")
    assert one_by_one.tasks == ("normals", "depth", "segmentation")
    assert one_by_one.amalgamation.teachers[0].amalgamation.teachers[0].tasks == ("normals",)
    assert recipes.whole_game("smoke").target_net == arrivals((("segmentation", "depth"),), TEACHERS, "smoke")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "order", [(("segmentation", "depth"), ("normals",)), (("segmentation",), ("depth",), ("normals",))]
)
def test_online_from_the_store(order, monkeypatch):
    """Its targets are TargetNet-2's predictions; TargetNet-2 stays; saved and loaded it predicts the same."""
    student = arrivals(order, TEACHERS, "smoke")
    before = recipes.trained(student.amalgamation.teachers[0])
    hashed = {name: value.clone() for name, value in before.weights().items()}
    found = recipes.trained(student)
    first, again = recipes.load(student), recipes.load(student)
    image = torch.rand(1, 3, 24, 32)
    assert set(first(image)) == {"segmentation", "depth", "normals"}
    assert all(torch.equal(first(image)[task], again(image)[task]) for task in first.tasks)
    after = recipes.trained(student.amalgamation.teachers[0]).weights()
    assert all(torch.equal(after[name], value) for name, value in hashed.items())
    assert set(found.metrics["branch_points"]) == set(student.tasks)
    inner = recipes.load(student.amalgamation.teachers[0])
    (sample, *_) = student.data.part("validation")
    targets = recipes.trained(student.amalgamation.predictions()[1]).weights()
    expected = inner(sample["image"][None].to(torch.float32))
    labels = expected["segmentation"].argmax(1)[0] if "depth" in inner.tasks else None
    if labels is not None:
        assert (targets["labels"][0].long() == labels).float().mean() > 0.99
    # block N starts from the copied way of the first task
    plan = student.amalgamation
    first_block = recipes.load(replace(student.last_block, n=1))[0]
    way = inner.blocks_of("segmentation")[-1].state_dict()
    assert all(torch.equal(first_block.blocks[-1].state_dict()[k], v) for k, v in way.items())
    assert plan.start == "segmentation"


@pytest.mark.usefixtures("here")
def test_what_an_online_student_is_made_of(monkeypatch):
    """Targets, Eq. 7, weights of the fine-tuning, and that it took place."""
    student = arrivals((("segmentation", "depth"), ("normals",)), TEACHERS, "smoke")
    plan, metrics = student.amalgamation, recipes.trained(student).metrics
    two, tasks = recipes.load(plan.teachers[0]), recipes.tasks_of(student.data)
    images = torch.stack([student.data.part("validation")[i]["image"] for i in range(4)])
    responses = two(images.as_subclass(torch.Tensor))
    stored = recipes.trained(plan.predictions()[1]).weights()
    assert torch.allclose(stored["depth"], tasks["depth"].decode(responses["depth"]), rtol=1e-5)
    last = recipes.trained(student.last_block)
    assert branch_points(last.metrics["losses"]) == metrics["branch_points"]
    body, codings = student.last_block.build(last.weights(), last.metrics)
    teachers = {"segmentation+depth": two, "normals": recipes.load(TEACHERS["normals"])}
    here = {name: each[-1] for name, each in codings.items()}
    weights = dict(plan.weights)
    objective = BlockObjective(body, teachers, here, student.last_block.n, tasks=tasks, weights=weights)
    batch = {"image": images} | stored
    batch |= recipes.trained(plan.predictions()[3]).weights()
    batch["labels"] = batch["labels"].long()
    with torch.no_grad():
        for task, loss in objective.eval()(batch).items():
            own = last.metrics["losses"][task][-1]
            assert float(loss) / weights[task] == pytest.approx(own, rel=1e-4), task
    fresh = branch_out(body, codings, teachers, metrics["branch_points"]).state_dict()
    tuned = recipes.trained(student).weights()
    assert not all(torch.equal(fresh[name], value) for name, value in tuned.items() if "num" not in name)
    seen = []

    def stop(objective, *_, **__):
        seen.append((set(objective.tasks), objective.weights))
        raise InterruptedError

    monkeypatch.setattr(stages, "fitted", stop)
    with pytest.raises(InterruptedError):
        student.train(Stored())
    assert seen == [(set(tasks), weights)]


@pytest.mark.usefixtures("here")
def test_every_group_has_its_rows_and_the_command_line_trains_one(capsys):
    rows = {group: list(three_teachers(group, "smoke", seed=1)) for group in GROUPS}
    assert rows["core"] == ["teachers", "TargetNet-2", "offline", "offline, twice the steps", "online"]
    assert len({row for group in rows.values() for row in group}) == sum(map(len, rows.values())) == 16
    assert rows["controls"][:3] == ["parsing alone", "depth alone", "normals alone"]
    assert rows["orders"] == ["online, depth last", "online, parsing last", "online, one by one"]
    command.main(["three_teachers", "--rows", "core", "--profile", "smoke"])
    lines = [line.split(" {")[0] for line in capsys.readouterr().out.splitlines() if " {" in line]
    assert lines == ["teachers"] * 3 + rows["core"][1:]
    with pytest.raises(SystemExit):
        command.main(["three_teachers", "--rows", "table", "--profile", "smoke"])
    assert "three_teachers: core, controls, orders" in capsys.readouterr().err
    with pytest.raises(ValueError, match="rows must be one of core, controls, orders, got 'table'"):
        three_teachers("table", "smoke")


def test_rows_are_what_they_are_called():
    """Who teaches each row, level by level, and from where it starts."""

    def taught_by(student):
        plan = student.amalgamation
        inner = [taught_by(t) for t in plan.teachers if not isinstance(t, recipes.TaskTeacher)]
        return [t.key for t in plan.teachers], plan.start, *inner

    rows = {k: v for group in GROUPS for k, v in three_teachers(group, "smoke", seed=1).items()}
    assert [t.task for t in rows.pop("teachers")] == ["segmentation", "depth", "normals"]
    s, d, m = "segmentation", "depth", "normals"
    two = [s, d], s
    assert {row: taught_by(student) for row, (student,) in rows.items()} == {
        "TargetNet-2": two,
        "offline": ([s, d, m], s),
        "offline, twice the steps": ([s, d, m], s),
        "online": ([f"{s}+{d}", m], s, two),
        "parsing alone": ([s], s),
        "depth alone": ([d], d),
        "normals alone": ([m], m),
        "parsing and normals": ([s, m], s),
        "depth and normals": ([d, m], d),
        "offline, from DepthNet": ([s, d, m], d),
        "offline, from NormNet": ([s, d, m], m),
        "TargetNet-2 taught again": ([f"{s}+{d}"], s, two),
        "online, depth last": ([f"{s}+{m}", d], s, ([s, m], s)),
        "online, parsing last": ([f"{d}+{m}", s], d, ([d, m], d)),
        "online, one by one": ([f"{s}+{d}", m], s, ([s, d], s, ([s], s))),
    }


def test_equal_budgets():
    """Offline with twice the steps takes as many as online and its TargetNet-2 together."""
    rows = three_teachers("core", "quick", seed=1)
    (offline,), (longer,), (online_3,) = (rows[r] for r in ("offline", "offline, twice the steps", "online"))

    def epochs(student) -> int:
        plan = student.amalgamation
        own = student.last_block.n * plan.blocks.epochs + student.fine_tuning.epochs
        return own + sum(epochs(t) for t in plan.teachers if hasattr(t, "fine_tuning"))

    assert epochs(longer) == epochs(online_3) == 2 * epochs(offline)
    assert {offline.data, longer.data, online_3.data} == {offline.data}
