"""Blocks, encoder–decoder, channel coding, TargetNet: identities that hold bit for bit, counted sizes."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from kamal_lib.models.blocks import Activation, Switch
from kamal_lib.models.coding import ChannelCoding
from kamal_lib.models.cost import multiply_adds, parameters
from kamal_lib.models.encoder_decoder import SLIM, VGG16, Architecture, build_network
from kamal_lib.models.target_net import TargetNet, branch_out

TINY = Architecture(widths=(4, 6, 8), convs=(2, 1, 2), pools=(True, False, True))
HEADS = {"segmentation": 5, "depth": 3}


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def fresh(heads: dict[str, int] = HEADS, seed: int = 0, architecture: Architecture = TINY):
    """A network in eval mode whose norm layers are not at their trivial start."""
    network = build_network(architecture, heads, seed=seed)
    with torch.no_grad():
        for _ in range(3):
            network.train()(image(24, 32, seed=7))
    return network.eval()


def branched(points: dict[str, int], *, gain: float = 1.0) -> TargetNet:
    student = fresh({}, seed=1)
    teachers = {task: fresh({task: HEADS[task]}, seed=2 + i) for i, task in enumerate(points)}
    codings = {task: [ChannelCoding(c, gain=gain) for c in student.channels] for task in points}
    for coding in (c for row in codings.values() for c in row):
        torch.nn.init.normal_(coding.expand.weight)
    return branch_out(student, codings, teachers, points).eval()


@pytest.mark.parametrize("n", range(TINY.blocks + 1))
@pytest.mark.parametrize("size", [(24, 32), (23, 31), (9, 7), (25, 40)])
def test_cut_and_go_on_is_the_whole_network(n, size):
    network = fresh()
    x = image(*size)
    whole, parts = network(x), network.forward_from(network.forward_to(x, n), n)
    assert whole.keys() == parts.keys() == HEADS.keys()
    for task in HEADS:
        assert whole[task].shape == (2, HEADS[task], *size)
        assert torch.equal(whole[task], parts[task])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=4),
    st.integers(16, 37),
    st.integers(16, 37),
    st.integers(0, 8),
)
def test_any_pools_and_any_size(pools, height, width, n):
    architecture = Architecture(tuple(range(3, 3 + len(pools))), (1,) * len(pools), tuple(pools))
    network = build_network(architecture, {"depth": 2}, seed=0).eval()
    n = min(n, architecture.blocks)
    x = image(height, width)
    assert torch.equal(network(x)["depth"], network.forward_from(network.forward_to(x, n), n)["depth"])


def test_the_papers_own_crop_is_no_multiple_of_32():
    network = build_network(VGG16, {"depth": 1}, seed=0).eval()
    with torch.no_grad():
        assert network(torch.rand(1, 3, 100, 160))["depth"].shape == (1, 1, 100, 160)  # 400 × 640 quartered


@pytest.mark.parametrize("n", range(TINY.blocks + 1))
def test_replacement_identity(n):
    """A teacher fed its own F^n, with its own switches, predicts what it always predicts."""
    teacher, x = fresh({"segmentation": 5}), image(23, 31)
    a = teacher.forward_to(x, n)
    replaced = Activation(torch.zeros_like(a.features), a.switches).with_features(a.features.clone())
    assert torch.equal(teacher.forward_from(replaced, n)["segmentation"], teacher(x)["segmentation"])


def test_switches_matter_and_belong_to_the_prefix():
    """Another image's switches give another prediction: what travels with F^n is not decoration."""
    network = fresh({"segmentation": 5})
    a, other = network.forward_to(image(24, 32), 3), network.forward_to(image(24, 32, seed=1), 3)
    assert len(a.switches) == 2
    assert [tuple(s.size) for s in a.switches] == [(24, 32), (12, 16)]
    swapped = network.forward_from(Activation(a.features, other.switches), 3)["segmentation"]
    assert not torch.equal(swapped, network(image(24, 32))["segmentation"])


def test_un_pooling_by_hand():
    """Each pooled value returns to the pixel it came from; an odd last column comes back empty."""
    block = build_network(Architecture((1,), (1,), (True,)), {}, seed=0).blocks[1]
    block.convs = torch.nn.Identity()
    x = torch.tensor([[[[1.0, 5.0, 2.0], [3.0, 4.0, 9.0]]]])
    pooled, indices = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
    back = block(Activation(pooled, (Switch(indices, (2, 3)),)))
    assert back.features.tolist() == [[[[0.0, 5.0, 0.0], [0.0, 0.0, 0.0]]]]
    assert back.switches == ()


@pytest.mark.parametrize("n", [-1, TINY.blocks + 1])
def test_a_block_that_does_not_exist(n):
    network = fresh()
    with pytest.raises(ValueError, match=rf"n = {n} does not exist: this network has blocks 0..6"):
        network.forward_to(image(24, 32), n)
    with pytest.raises(ValueError, match=r"does not exist"):
        network.forward_from(network.forward_to(image(24, 32), 0), n)


def test_architecture_with_a_missing_flag():
    with pytest.raises(ValueError, match="got 2, 2 and 1"):
        Architecture((4, 4), (1, 1), (True,))


def test_networks_of_one_seed_share_their_start():
    a, b, c = (
        build_network(TINY, heads, seed=s) for heads, s in (({"a": 5}, 0), ({"b": 9}, 0), ({"a": 5}, 1))
    )
    same = [torch.equal(x, y) for x, y in zip(a.blocks.parameters(), b.blocks.parameters(), strict=True)]
    other = [torch.equal(x, y) for x, y in zip(a.blocks.parameters(), c.blocks.parameters(), strict=True)]
    assert all(same)
    assert not all(other)


# --- sizes: the recount of VGG16-BN SegNet ----------------------------------------------------------------


def test_segnet_size():
    segnet = build_network(VGG16, {"segmentation": 13}, seed=0)
    depthnet = build_network(VGG16, {"depth": 1}, seed=0)
    assert round(parameters(segnet) / 1e6, 2) == 29.45
    assert round((parameters(segnet) + parameters(depthnet)) / 1e6, 2) == 58.89
    assert parameters(build_network(VGG16, {"depth": 41}, seed=0)) - parameters(depthnet) == 40 * 577


def test_coding_sizes():
    channels = build_network(VGG16, {}, seed=0).channels
    assert channels == (64, 128, 256, 512, 512, 512, 256, 128, 64, 64)
    codings = [ChannelCoding(c) for c in channels for _ in ("segmentation", "depth")]
    assert parameters(*codings) == 962_560
    assert parameters(*codings[:-2]) == 958_464


@pytest.mark.parametrize(
    ("points", "millions"),
    [((6, 6), 37.09), ((7, 7), 31.19), ((8, 8), 29.71), ((9, 9), 29.49), ((10, 10), 29.45), ((9, 10), 29.49)],
)
def test_branched_sizes(points, millions):
    student = build_network(VGG16, {}, seed=0)
    teachers = {"depth": build_network(VGG16, {"depth": 1}, seed=0)}
    teachers["segmentation"] = build_network(VGG16, {"segmentation": 13}, seed=0)
    codings = {task: [ChannelCoding(c) for c in student.channels] for task in teachers}
    net = branch_out(student, codings, teachers, dict(zip(("depth", "segmentation"), points, strict=True)))
    gates = [branch.coding for branch in net.branches.values()]
    assert round((parameters(net) - parameters(*gates)) / 1e6, 2) == millions
    if points == (9, 10):
        assert parameters(*gates) == 4096


# --- channel coding ---------------------------------------------------------------------------------------


def test_coding_by_hand():
    """s = sigmoid(W2 relu(W1 GAP F)) written as loops over images and channels."""
    coding, features = ChannelCoding(6, reduction=2), torch.randn(2, 6, 3, 5)
    torch.nn.init.normal_(coding.expand.weight)
    for b in range(2):
        pooled = [sum(features[b, c].flatten().tolist()) / 15 for c in range(6)]
        w1, w2 = coding.squeeze.weight.tolist(), coding.expand.weight.tolist()
        hidden = [max(0.0, sum(w * p for w, p in zip(row, pooled, strict=True))) for row in w1]
        for c in range(6):
            z = sum(w * h for w, h in zip(w2[c], hidden, strict=True))
            gate = 1 / (1 + torch.tensor(-z).exp())
            assert torch.allclose(coding(features)[b, c], gate * features[b, c], atol=1e-5)


def test_coding_works_on_wide_images_and_starts_half_open():
    features = torch.randn(1, 8, 3, 50)
    assert torch.equal(ChannelCoding(8)(features), 0.5 * features)
    assert torch.equal(ChannelCoding(8, gain=2.0)(features), features)


# --- TargetNet --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [(4, 6), (5, 5), (6, 4), (6, 6), (4, 4)])
@pytest.mark.parametrize("size", [(24, 32), (23, 31)])
def test_target_net_cut_up_to_the_first_branch(points, size):
    net, x = branched(dict(zip(HEADS, points, strict=True))), image(*size)
    whole = net(x)
    assert list(whole) == list(HEADS)
    for n in range(min(points) + 1):
        parts = net.forward_from(net.forward_to(x, n), n)
        assert all(torch.equal(whole[task], parts[task]) for task in HEADS)
    with pytest.raises(ValueError, match=r"one F\^n"):
        net.forward_to(x, min(points) + 1)


def test_target_net_beyond_a_branch_replaces_the_tasks_own_block():
    """For n past a task's branch point the feature enters that task's own branch, uncoded."""
    net, x = branched({"segmentation": 6, "depth": 4}), image(24, 32)
    trunk = net.forward_to(x, 4)
    own = trunk.with_features(net.branches["depth"].coding(trunk.features))
    own = net.branches["depth"].blocks[0](own)  # depth's own block 5
    found = net.forward_from(own, 5)
    assert torch.equal(found["depth"], net(x)["depth"])
    by_trunk = net.trunk[5](own)
    coded = by_trunk.with_features(net.branches["segmentation"].coding(by_trunk.features))
    assert torch.equal(found["segmentation"], net.branches["segmentation"].head(coded.features))


def test_branch_out_by_hand():
    """The branched network is trunk → coding → the teacher's own later blocks and head."""
    student, teacher = fresh({}, seed=1), fresh({"depth": 3}, seed=2)
    coding = [ChannelCoding(c) for c in student.channels]
    net, x = branch_out(student, {"depth": coding}, {"depth": teacher}, {"depth": 5}).eval(), image(23, 31)
    a = student.forward_to(x, 5)
    expected = teacher.forward_from(a.with_features(coding[4](a.features)), 5)["depth"]
    assert torch.equal(net(x)["depth"], expected)
    assert len(net.trunk) == 5


def test_all_of_a_branched_network_learns():
    student, teacher = (
        fresh({}, seed=1).requires_grad_(False),
        fresh({"depth": 3}, seed=2).requires_grad_(False),
    )
    coding = [ChannelCoding(c) for c in student.channels]
    net = branch_out(student, {"depth": coding}, {"depth": teacher}, {"depth": 5})
    assert all(p.requires_grad for p in net.parameters())
    assert not any(p.requires_grad for p in (*student.parameters(), *teacher.parameters()))


def test_nothing_is_aliased():
    student = fresh({}, seed=1)
    teachers = {task: fresh({task: c}, seed=2 + c) for task, c in HEADS.items()}
    codings = {task: [ChannelCoding(c) for c in student.channels] for task in HEADS}
    net = branch_out(student, codings, teachers, {"segmentation": 6, "depth": 4})
    sources = [student, *teachers.values(), *(c for row in codings.values() for c in row)]
    theirs = {t.data_ptr() for m in sources for t in (*m.parameters(), *m.buffers())}
    ours = [t.data_ptr() for t in (*net.parameters(), *net.buffers())]
    assert not theirs & set(ours)
    assert len(set(ours)) == len(ours)


@pytest.mark.parametrize("point", [0, 3, 7])
def test_a_branch_outside_the_decoder(point):
    with pytest.raises(ValueError, match=rf"at block {point}: the decoder's blocks are 4..6"):
        branched({"segmentation": 6, "depth": point})


def test_a_trunk_longer_than_the_last_branch():
    net = branched({"segmentation": 5, "depth": 4})
    with pytest.raises(ValueError, match=r"keep exactly blocks 1\.\.5"):
        TargetNet([*net.trunk, fresh({}).blocks[5]], dict(net.branches.items()))


def test_multiply_adds_of_convolutions_by_hand():
    """Each block of TINY at the size its convolutions see, then the head; 9 weights a channel pair."""
    network = build_network(TINY, {"depth": 3}, seed=0)
    full, half, quarter = 24 * 32, 12 * 16, 6 * 8
    encoder = full * (3 * 4 + 4 * 4) + half * (4 * 6) + half * (6 * 8 + 8 * 8)
    decoder = half * (8 * 8 + 8 * 6) + half * (6 * 4) + full * (4 * 4)
    assert quarter * 4 == half  # the last pool feeds a block that un-pools first: nothing is computed there
    assert multiply_adds(network, (24, 32)) == 9 * (encoder + decoder + full * 4 * 3)


def test_images_are_normalised_as_imagenet():
    x = image(5, 6)
    expected = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(x)
    assert torch.allclose(fresh().forward_to(x, 0).features, expected, atol=1e-6)


def test_layers_of_a_block():
    layers = [type(layer).__name__ for layer in build_network(VGG16, {}, seed=0).blocks[2].convs]
    assert layers == ["Conv2d", "BatchNorm2d", "ReLU"] * 3
    assert ChannelCoding(8).squeeze.out_features == 16
    assert ChannelCoding(512).squeeze.out_features == 128


def test_shared_parameters_count_once():
    layer = torch.nn.Linear(3, 2)
    assert parameters(layer, torch.nn.Sequential(layer, torch.nn.Linear(2, 1))) == 8 + 3


def test_slim_is_slim():
    assert 0.40e6 < parameters(build_network(SLIM, {"segmentation": 13}, seed=0)) < 0.45e6


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 4, 8, 8), (3, 8, 8)])
def test_images_that_are_not_rgb(shape):
    """A grey image would be broadcast to three channels without a word."""
    jaxtyping.config.update("jaxtyping_disable", True)  # users run without the annotations' own checks
    try:
        with pytest.raises(ValueError, match=r"RGB images, batch × 3 × height × width, got shape \("):
            build_network(Architecture((4,), (1,), (True,)), {"depth": 2}, seed=0)(torch.rand(shape))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_weights_of_other_branch_points():
    net, other = branched({"segmentation": 6, "depth": 4}), branched({"segmentation": 5, "depth": 4})
    with pytest.raises(ValueError, match=r"have {'segmentation': 1, 'depth': 2} blocks in their branches"):
        net.load_weights(other.state_dict())
    net.load_weights(branched({"segmentation": 6, "depth": 4}).state_dict())
