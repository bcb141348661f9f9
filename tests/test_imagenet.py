"""ImageNet's encoder against torchvision's own network, from a file in torch's cache, never from the net."""

import io
import re
import shutil
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from kamal_lib.artifacts import key, load_or_train
from kamal_lib.models import imagenet
from kamal_lib.models.encoder_decoder import SLIM, VGG16, Architecture, build_network
from kamal_lib.recipes import CommonStart, task_teachers

WEIGHTS = torchvision.models.VGG16_BN_Weights.IMAGENET1K_V1
NAME = WEIGHTS.url.rsplit("/", 1)[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Torch's folder of downloads, empty; whatever is fetched from the network fails the test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "urlopen", lambda _: pytest.fail("asked the network"))
    yield tmp_path / "torch" / "hub" / "checkpoints"
    shutil.rmtree(tmp_path)  # pytest would keep 180 MB of three runs


def drawn(shape: torch.Size, generator: torch.Generator, name: str) -> Tensor:
    """Numbers unlike those of any initialisation, by which no layer's output vanishes or explodes."""
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return 0.5 + torch.rand(shape, generator=generator)
    scale = (2 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.3
    return scale * torch.randn(shape, generator=generator)


@pytest.fixture
def features(cache: Path) -> nn.Sequential:
    """Torchvision's `features` in eval mode, their state cached as the weights of ImageNet would be.

    As in the real file there is a classifier beside them, and nothing is said of `num_batches_tracked`.
    """
    with torch.device("meta"):  # its classifier alone has 120 million parameters
        network = torchvision.models.vgg16_bn(weights=None, init_weights=False).features
    generator = torch.Generator().manual_seed(0)
    state = {
        name: drawn(value.shape, generator, name)
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    network = network.to_empty(device="cpu")
    network.load_state_dict(state, strict=False)
    cache.mkdir(parents=True)
    classifier = {"classifier.0.weight": torch.ones(3, 3), "classifier.0.bias": torch.ones(3)}
    torch.save({f"features.{name}": value for name, value in state.items()} | classifier, cache / NAME)
    return network.eval()


def test_every_block_is_torchvisions_up_to_its_pool(features, tmp_path):
    """The start as a recipe makes it, normalised images and all; its decoder is that of a random start."""
    start = CommonStart(VGG16, 3, weights="imagenet")
    weights = load_or_train(start, tmp_path / "store").weights()
    network = build_network(VGG16, {}, seed=3).eval()
    random = {name: value.clone() for name, value in network.blocks.state_dict().items()}
    network.blocks.load_state_dict(weights)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    preset = WEIGHTS.transforms()
    x, pools = F.normalize(image, preset.mean, preset.std), []
    with torch.no_grad():
        for layer in features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                pools.append(x)
        found = [network.forward_to(image, n).features for n in range(1, 6)]
    assert len(pools) == 5
    assert [f.shape for f in found] == [p.shape for p in pools]
    for mine, theirs in zip(found, pools, strict=True):
        assert float(theirs.std()) > 0.05
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)

    assert weights.keys() == random.keys()
    decoder = [name for name in random if int(name.split(".")[0]) >= 5]
    assert all(torch.equal(weights[name], random[name]) for name in decoder)
    learnt = {name for name in random.keys() - set(decoder) if not name.endswith("num_batches_tracked")}
    assert len(learnt) == 13 * 6  # a convolution has weight and bias, its norm four
    assert not any(torch.equal(weights[name], random[name]) for name in learnt)


@pytest.mark.usefixtures("features")
def test_the_encoder_is_all_that_is_taken():
    state = imagenet.encoder_state()
    assert {name.split(".")[0] for name in state} == {"0", "1", "2", "3", "4"}
    assert state["0.convs.0.weight"].shape == (64, 3, 3, 3)
    assert state["4.convs.6.weight"].shape == (512, 512, 3, 3)


def test_teachers_start_from_it_only_where_asked():
    asked, usual = (task_teachers("gpu", start=start)["normals"].start for start in ("imagenet", "random"))
    assert asked == CommonStart(VGG16, 0, weights="imagenet")
    assert usual == CommonStart(VGG16, 0)
    assert key(asked) != key(usual)


@pytest.mark.parametrize(
    "architecture", [SLIM, Architecture(VGG16.widths, VGG16.convs, (True,) * 4 + (False,))]
)
def test_other_architectures_have_no_imagenet(architecture):
    with pytest.raises(ValueError, match="ImageNet weights exist for the architecture VGG16 only: take it"):
        CommonStart(architecture, 0, weights="imagenet")
    with pytest.raises(ValueError, match="VGG16 only"):
        task_teachers("quick", start="imagenet")


def test_unknown_weights():
    with pytest.raises(ValueError, match="must be 'random' or 'imagenet', got 'coco'"):
        CommonStart(VGG16, 0, weights="coco")


class Response(io.BytesIO):
    """What a server sends that is not the file: a page of a proxy, say."""

    def info(self):
        return self

    def get_all(self, _):
        return [str(len(self.getvalue()))]


def no_network(_):
    raise urllib.error.URLError("Name or service not known")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(no_network, "Name or service not known"), (lambda _: Response(b"<html>"), "invalid hash value")],
)
def test_weights_that_cannot_be_had(answer, reason, cache, tmp_path, monkeypatch):
    """One error that names the address and the place, and neither cache nor store keeps half of anything."""
    monkeypatch.setattr(torch.hub, "urlopen", answer)
    place = re.escape(f"Put the file {WEIGHTS.url} into {cache}, or start from random weights")
    with pytest.raises(RuntimeError, match=rf"(?s)cannot be had \(.*{reason}.*\)\. {place}"):
        load_or_train(CommonStart(VGG16, 0, weights="imagenet"), tmp_path / "store")
    assert not list(cache.iterdir())
    assert not list((tmp_path / "store").rglob("*.safetensors"))


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 and no more"])
def test_a_damaged_file_in_the_cache_is_named(content, cache):
    cache.mkdir(parents=True)
    (cache / NAME).write_bytes(content)
    with pytest.raises(RuntimeError, match=r"(?s)cannot be had \(.*Put the file .* into "):
        imagenet.encoder_state()
