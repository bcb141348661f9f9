"""PSPNet, DeepLabV3 and ESPNet-C: features and responses of one pass, sizes beside the paper's Table 7."""

import re
import urllib.error
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import MobileNet_V2_Weights, ResNet18_Weights, mobilenet_v2, resnet18
from torchvision.transforms.v2.functional import normalize

from kamal_lib.devices import make_fabric
from kamal_lib.evaluation import evaluate
from kamal_lib.models import segmenters
from kamal_lib.models.cost import multiply_adds, parameters
from kamal_lib.models.espnet import ESPModule
from kamal_lib.models.segmenters import (
    ESPNET_C,
    PSPNET_RESNET18,
    PSPNET_RESNET18_HALF,
    PSPNET_RESNET101,
    SLIM_DEEPLABV3,
    SLIM_ESPNET_C,
    SLIM_STUDENT,
    SLIM_STUDENT_HALF,
    SLIM_TEACHER,
    Segmenter,
    SegmenterArchitecture,
    build_segmenter,
    imagenet_state,
)
from kamal_lib.tasks import Depth, DirectObjective, Segmentation

HEADS = {"segmentation": 5, "depth": 3}
MOBILE = SegmenterArchitecture("pspnet", "mobilenet_v2", channels=24)
SMALL = {
    "psp": SLIM_STUDENT_HALF,
    "deeplab": replace(SLIM_DEEPLABV3, width=0.09375, channels=24),
    "espnet": SLIM_ESPNET_C,
    "espnet at 8": ESPNET_C,
    "psp at 8": replace(SLIM_STUDENT_HALF, stride=8),
    "bottlenecks": replace(SLIM_STUDENT_HALF, encoder="resnet50", width=0.0625),
    "mobile": MOBILE,
}


def image(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def on_meta(architecture: SegmenterArchitecture, classes: int) -> Segmenter:
    """A network of shapes without numbers: torch counts its operations all the same."""
    with torch.device("meta"):
        return build_segmenter(architecture, {"segmentation": classes}, seed=0).eval()


# --- contract ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(48, 64), (47, 61)])
@pytest.mark.parametrize("architecture", SMALL.values(), ids=SMALL)
def test_features_and_responses(architecture, size):
    """Features at 1/stride rounded up, responses at the image's size: the head's output, enlarged."""
    network, x = build_segmenter(architecture, HEADS, seed=0).eval(), image(*size)
    with torch.no_grad():
        features, responses = network.features_and_response(x)
        whole = network(x)
    assert network.tasks == tuple(responses) == tuple(HEADS)
    assert features.shape == (2, architecture.channels, *(-(-side // architecture.stride) for side in size))
    for task, channels in HEADS.items():
        assert responses[task].shape == (2, channels, *size)
        small = network.heads[task](features)
        assert torch.equal(responses[task], F.interpolate(small, size, mode="bilinear", align_corners=False))
        assert torch.equal(whole[task], responses[task])
        assert float(responses[task].std()) > 0


@pytest.mark.parametrize("name", ["psp", "deeplab", "espnet", "mobile"])
def test_all_of_it_learns_from_both(name):
    """Every parameter gets a gradient from the response; the body gets one from the features too."""
    network = build_segmenter(SMALL[name], HEADS, seed=0)
    features, responses = network.features_and_response(image(48, 64))
    features.square().mean().backward(retain_graph=True)
    assert all(p.grad is not None for p in network.body.parameters())
    assert all(p.grad is None for p in network.heads.parameters())
    sum(r.square().mean() for r in responses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_it_is_a_network_like_any_other():
    """The losses of the tasks and the engine's evaluation take it as they take the others."""
    network = build_segmenter(SLIM_STUDENT_HALF, {"segmentation": 5, "depth": 8}, seed=0)
    tasks = {"segmentation": Segmentation(tuple("abcde")), "depth": Depth(bins=8, bin_length=1.0)}
    batch = {"image": image(48, 64), "labels": torch.randint(5, (2, 48, 64)), "depth": torch.ones(2, 48, 64)}
    assert set(DirectObjective(network, tasks)(batch)) == set(tasks)
    assert {"miou", "abs_rel"} <= evaluate(network, [batch], tasks, fabric=make_fabric("cpu")).keys()


def test_training_draws_no_random_numbers():
    """A training is a function of its seeds: no dropout."""
    network, x = build_segmenter(SLIM_STUDENT_HALF, HEADS, seed=0), image(48, 64)
    before = torch.random.get_rng_state()
    first, again = network(x), network(x)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[task], again[task]) for task in HEADS)


@pytest.mark.parametrize("name", ["psp", "espnet", "mobile"])
def test_networks_of_one_seed_share_their_start(name):
    before = torch.random.get_rng_state()
    a, b, c = (
        build_segmenter(SMALL[name], heads, seed=s).body.state_dict()
        for heads, s in (({"a": 5}, 0), ({"b": 9, "d": 2}, 0), ({"a": 5}, 1))
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_images_are_normalised_inside():
    """The encoder sees what torchvision's preset would give it."""
    network, x = build_segmenter(SLIM_STUDENT_HALF, HEADS, seed=0).eval(), image(48, 64)
    with torch.no_grad():
        expected = network.body(normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        torch.testing.assert_close(network.features_and_response(x)[0], expected, rtol=1e-4, atol=1e-4)


# --- ESPNet-C ---------------------------------------------------------------------------------------------


def test_pyramid_by_hand():
    """One ESP module of 11 channels: 3, 2, 2, 2, 2 from five dilations, added up from the second on."""
    module, x = ESPModule(11, 11).eval(), torch.randn(1, 11, 9, 40)
    reduced = F.conv2d(x, module.reduce.weight)
    assert reduced.shape[1] == 2
    branches = [
        F.conv2d(reduced, conv.weight, padding=rate, dilation=rate)
        for conv, rate in zip(module.pyramid, (1, 2, 4, 8, 16), strict=True)
    ]
    assert [b.shape[1] for b in branches] == [3, 2, 2, 2, 2]
    fused = [branches[0], *(sum(branches[1:k]) for k in range(2, 6))]
    expected = F.prelu((torch.cat(fused, 1) + x) / (1 + 1e-3) ** 0.5, torch.full((11,), 0.25))
    assert torch.allclose(module(x), expected, atol=1e-5)


# --- sizes: Table 7 ---------------------------------------------------------------------------------------

TABLE7 = {  # as printed: millions of parameters, 10⁹ multiply-adds at 512×1024 (its "FLOPs"), 19 classes
    "PSPNet": (70.43, 574.9),
    "ResNet18 (1.0)": (15.24, 128.2),
    "ResNet18 (0.5)": (3.835, 33.35),
    "ESPNet-C": (0.3492, 3.468),
}
HERE = {  # the same, counted
    "PSPNet": (PSPNET_RESNET101, 48.81, 371.8),
    "ResNet18 (1.0)": (PSPNET_RESNET18, 11.71, 98.45),
    "ResNet18 (0.5)": (PSPNET_RESNET18_HALF, 2.949, 25.92),
    "ESPNet-C": (ESPNET_C, 0.3492, 3.468),
}


def counted(architecture: SegmenterArchitecture, classes: int = 19) -> tuple[float, float]:
    network = on_meta(architecture, classes)
    return parameters(network) / 1e6, multiply_adds(network, (512, 1024)) / 1e9


@pytest.mark.parametrize("name", HERE)
def test_sizes_at_512_by_1024(name):
    architecture, *expected = HERE[name]
    assert counted(architecture) == pytest.approx(expected, rel=5e-4)


def test_espnet_c_is_the_papers():
    assert counted(ESPNET_C) == pytest.approx(TABLE7["ESPNet-C"], rel=2e-4)


@pytest.mark.parametrize("name", list(TABLE7)[:3])
def test_what_table_7_counts_beside(name):
    """Its own pyramid, on our encoders, gives its numbers: parameters to 0.1 %, multiply-adds to 0.2 %.

    Four means of the map become `stage` channels each, a 3×3 convolution fuses them with the map itself. The
    authors' max pool rounds up, so their maps are those of 513×1025 pixels here. PSPNet has an auxiliary 3×3
    classifier on the third stage, and three 3×3 convolutions of 64, 64, 128 in the place of one 7×7 of 64.
    """
    architecture, classes = HERE[name][0], 19
    encoder = on_meta(architecture, classes).body.encoder
    inputs, stage = encoder.out_channels[-1], architecture.channels
    pixels, shrunken, halved = 65 * 129, 129 * 257, 256 * 512
    fuse, classifier = 9 * (inputs + 4 * stage) * stage, (stage + 1) * classes
    weights = parameters(encoder) + 4 * inputs * stage + fuse + 5 * 2 * stage + classifier
    operations = multiply_adds(encoder, (513, 1025)) + pixels * (fuse + classifier)
    if name == "PSPNet":
        auxiliary, stem = 9 * 1024 * 512, 9 * (3 * 64 + 64 * 64 + 64 * 128) - 49 * 3 * 64
        wider = 64 * 64 + 64 * 256  # the first stage takes 128 channels
        weights += auxiliary + stem + wider + (512 + 1) * classes
        operations += pixels * auxiliary + halved * stem + shrunken * wider
    assert weights / 1e6 == pytest.approx(TABLE7[name][0], rel=1e-3)
    assert operations / 1e9 == pytest.approx(TABLE7[name][1], rel=2e-3)


@pytest.mark.parametrize(("encoder", "millions"), [("resnet18", 15.90), ("resnet50", 39.64)])
def test_deeplabv3_is_that_of_mkat(encoder, millions):
    assert counted(SegmenterArchitecture("deeplabv3", encoder))[0] == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("architecture", "millions"),
    [
        (SLIM_TEACHER, 1.668),
        (SLIM_STUDENT, 0.429),
        (SLIM_STUDENT_HALF, 0.117),
        (SLIM_DEEPLABV3, 2.258),
        (SLIM_ESPNET_C, 0.348),
    ],
)
def test_slim_sizes(architecture, millions):
    """Features of 12×16 pixels at 48×64, and the paper's ratios: 1 to 4 to 16, as 70.4 to 15.2 to 3.8."""
    network = on_meta(architecture, 13)
    assert round(parameters(network) / 1e6, 3) == millions
    features, _ = network.features_and_response(torch.empty(1, 3, 48, 64, device="meta"))
    assert features.shape[2:] == (12, 16)


# --- ImageNet ---------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's folder of downloads, empty; whatever is fetched from the network fails the test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "urlopen", lambda _: pytest.fail("asked the network"))
    return tmp_path / "hub" / "checkpoints"


def test_resnet_is_torchvisions_with_its_weights(cache):
    """Up to its second stage, where dilation begins: from a file that lies where torch keeps downloads."""
    theirs = resnet18(weights=None).eval()
    cache.mkdir(parents=True)
    torch.save(theirs.state_dict(), cache / ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1])
    network = build_segmenter(PSPNET_RESNET18, HEADS, seed=3, weights="imagenet").eval()
    x = torch.randn(1, 3, 33, 47)
    with torch.no_grad():
        found = network.body.encoder(x)
        expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for stage, layer in ((2, theirs.layer1), (3, theirs.layer2)):
            expected = layer(expected)
            torch.testing.assert_close(found[stage], expected)
    random = build_segmenter(PSPNET_RESNET18, HEADS, seed=3)
    state = {name.removeprefix("encoder.model."): value for name, value in network.body.state_dict().items()}
    assert all(torch.equal(state[name], v) for name, v in imagenet_state("resnet18").items())
    assert all(
        torch.equal(a, b)
        for part in ("body.decoder", "heads")
        for a, b in zip(
            network.get_submodule(part).parameters(), random.get_submodule(part).parameters(), strict=True
        )
    )


def test_mobilenet_is_torchvisions_with_its_weights(cache):
    theirs = mobilenet_v2(weights=None).eval()
    cache.mkdir(parents=True)
    torch.save(theirs.state_dict(), cache / MobileNet_V2_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1])
    network = build_segmenter(MOBILE, HEADS, seed=3, weights="imagenet").eval()
    x = torch.randn(1, 3, 33, 47)
    with torch.no_grad():
        torch.testing.assert_close(network.body.encoder(x)[3], theirs.features[:7](x))


@pytest.mark.parametrize("encoder", segmenters.ENCODERS)
def test_weights_that_cannot_be_had(encoder, cache, monkeypatch):
    def no_network(_):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    place = rf"Put the file https://\S+/{encoder}-\w+\.pth into {re.escape(str(cache))}, or start from random"
    with pytest.raises(RuntimeError, match=rf"{encoder} cannot be had \(.*not known.*\)\. {place}"):
        imagenet_state(encoder)


@pytest.mark.parametrize("architecture", [PSPNET_RESNET18_HALF, SLIM_TEACHER, ESPNET_C])
def test_networks_without_imagenet(architecture):
    with pytest.raises(ValueError, match=r"at width 1 only, got .*: start from random weights"):
        build_segmenter(architecture, HEADS, seed=0, weights="imagenet")


def test_unknown_weights():
    with pytest.raises(ValueError, match="must be 'random' or 'imagenet', got 'coco'"):
        build_segmenter(SLIM_STUDENT_HALF, HEADS, seed=0, weights="coco")


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "unet"}, "one of 'pspnet', 'deeplabv3', 'espnet_c', got 'unet'"),
        ({"encoder": "vgg16"}, "encoder of a pspnet must be one of 'resnet18', .*, got 'vgg16'"),
        ({"encoder": None}, "must be one of 'resnet18', .*, got None"),
        ({"stride": 16}, "stride must be 8, or 4 without MobileNetV2, got 16"),
        ({"encoder": "mobilenet_v2", "stride": 4}, "got 4"),
        ({"encoder": "mobilenet_v2", "width": 0.5}, "be 1 for MobileNetV2, got 0.5"),
        ({"width": 0.01}, "at least one of 64 channels, .*, got 0.01"),
        ({"kind": "espnet_c"}, "without an encoder, got encoder 'resnet18'"),
        (
            {"kind": "espnet_c", "encoder": None, "channels": 64},
            "width 1.0 and 64 channels: leave them out",
        ),
    ],
)
def test_architectures_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        replace(PSPNET_RESNET18, **options)


@pytest.mark.parametrize("shape", [(2, 1, 48, 64), (2, 4, 48, 64), (3, 48, 64)])
def test_images_that_are_not_rgb(shape):
    network = build_segmenter(SLIM_STUDENT_HALF, HEADS, seed=0)
    jaxtyping.config.update("jaxtyping_disable", True)  # users run without the annotations' own checks
    try:
        with pytest.raises(ValueError, match=r"RGB images, batch × 3 × height × width, got shape \("):
            network(torch.rand(shape))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
