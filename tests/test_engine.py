"""Training that can be killed, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from torchvision import tv_tensors

from kamal_lib.data.loaders import loader
from kamal_lib.engine import Schedule, evaluate, fast_precision, fit, make_fabric, mean_losses
from kamal_lib.tasks import Depth, DirectObjective, Segmentation

TASKS = {"segmentation": Segmentation(("a", "b", "c")), "depth": Depth(bins=4, bin_length=0.5)}
SCHEDULE = Schedule(epochs=3, batch_size=4, learning_rate=0.01)


class Toy(Dataset):
    """Ten images whose class is their brightest channel."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(index))
        return {"image": tv_tensors.Image(image), "labels": tv_tensors.Mask(image.argmax(0))}


class Small(nn.Module):
    """A network with norm buffers, so that a resumed run has more to restore than weights."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, image):
        return {"segmentation": self.head(self.body(image))}


def train(checkpoint: Path | None = None, *, stop_at: int | None = None, schedule: Schedule = SCHEDULE):
    network = Small()
    objective = DirectObjective(network, TASKS)
    if stop_at is not None:
        objective.register_forward_pre_hook(Stop(stop_at))
    batches = loader(Toy(), batch_size=4, shuffle=True, seed=5)
    history = fit(
        objective, batches, schedule, fabric=make_fabric("cpu"), checkpoint=checkpoint, save_every=0.0
    )
    return network, history


class Stop:
    """Ends the process without a word before the given step, as SIGKILL would."""

    def __init__(self, step: int):
        self.left = step

    def __call__(self, *_):
        if self.left == 0:
            os._exit(9)
        self.left -= 1


def test_training_learns_and_keeps_a_history():
    network, history = train(schedule=Schedule(epochs=30, batch_size=4, learning_rate=0.02))
    assert [row["epoch"] for row in history] == list(range(1, 31))
    assert history[-1]["segmentation"] < 0.5 * history[0]["segmentation"]
    found = evaluate(
        network, loader(Toy(), batch_size=4, shuffle=False, seed=0), TASKS, fabric=make_fabric("cpu")
    )
    assert found.keys() == {"miou", "pixel_acc"}
    assert found["pixel_acc"] > 0.7


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, 8])
def test_killed_and_resumed_is_bit_for_bit(stop_at, tmp_path):
    """Steps 3 and 6 end epochs; the others stop in the middle of one."""
    code = f"import test_engine as t; t.train(t.Path('state.safetensors'), stop_at={stop_at})"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    killed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, check=False
    )
    assert killed.returncode == 9
    checkpoint = tmp_path / "state.safetensors"
    if stop_at > 1:
        assert any(name.startswith("optimizer.") for name in load_file(checkpoint))
    resumed, history = train(checkpoint)
    whole, expected = train()
    assert history == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_step_is_adamw_on_the_sum_of_all_losses_in_training_mode():
    class Two(DirectObjective):
        def forward(self, batch):
            loss = super().forward(batch)["segmentation"]
            return {"once": loss, "twice": 2 * loss}

    schedule = Schedule(epochs=1, batch_size=4, learning_rate=0.01, weight_decay=0.1)
    network, expected = Small(), Small()
    fit(
        Two(network, TASKS),
        loader(Toy(), batch_size=4, shuffle=False, seed=0),
        schedule,
        fabric=make_fabric("cpu"),
    )
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.01, weight_decay=0.1)
    for step, batch in enumerate(loader(Toy(), batch_size=4, shuffle=False, seed=0)):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 3) ** 0.9
        response = expected.train()(batch["image"])["segmentation"]
        optimizer.zero_grad()
        (3 * nn.functional.cross_entropy(response, batch["labels"])).backward()
        optimizer.step()
    for name, value in expected.state_dict().items():
        assert torch.allclose(value, network.state_dict()[name], rtol=1e-4, atol=1e-5), name


def test_poly_policy():
    rates = []
    real = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **kwargs)

    torch.optim.AdamW.step = spy
    try:
        train()
    finally:
        torch.optim.AdamW.step = real
    assert rates == pytest.approx([0.01 * (1 - step / 9) ** 0.9 for step in range(9)])


def test_warm_up_rises_over_its_share_and_then_follows_the_policy():
    plain, warm = Schedule(epochs=1), Schedule(epochs=1, warmup=0.2)
    rising = [warm.rate(step, 20) / plain.rate(step, 20) for step in range(20)]
    assert rising == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 17)


def test_the_fast_precision_is_one_that_fabric_takes():
    assert make_fabric("cpu", precision=fast_precision()).device.type == "cpu"


def test_only_what_asks_for_gradients_learns():
    network = Small()
    network.body.requires_grad_(False)
    before = network.body[0].weight.clone()
    batches = loader(Toy(), batch_size=4, shuffle=True, seed=5)
    fit(DirectObjective(network, TASKS), batches, SCHEDULE, fabric=make_fabric("cpu"))
    assert torch.equal(network.body[0].weight, before)


def test_a_loss_that_is_not_finite_stops_with_its_reason():
    class Broken(DirectObjective):
        def forward(self, batch):
            return {name: loss * float("nan") for name, loss in super().forward(batch).items()}

    batches = loader(Toy(), batch_size=4, shuffle=True, seed=5)
    with pytest.raises(
        FloatingPointError, match=r"broken: the loss is not finite at step 0 of 9.*segmentation"
    ):
        fit(Broken(Small(), TASKS), batches, SCHEDULE, fabric=make_fabric("cpu"), title="broken")


def test_mean_losses_weigh_every_image_the_same():
    """Three batches of 4, 4 and 2 images give what one batch of ten gives; no norm statistics move."""
    network = Small()
    objective = DirectObjective(network, TASKS)
    fabric = make_fabric("cpu")
    before = network.body[1].running_mean.clone()
    small = mean_losses(objective, loader(Toy(), batch_size=4, shuffle=False, seed=0), fabric=fabric)
    large = mean_losses(objective, loader(Toy(), batch_size=10, shuffle=False, seed=0), fabric=fabric)
    assert small["segmentation"] == pytest.approx(large["segmentation"], rel=1e-6)
    assert torch.equal(network.body[1].running_mean, before)


def test_bf16_is_an_option():
    batches = loader(Toy(), batch_size=4, shuffle=True, seed=5)
    schedule = Schedule(epochs=1, batch_size=4, precision="bf16-mixed")
    network = Small()
    history = fit(
        DirectObjective(network, TASKS), batches, schedule, fabric=make_fabric(precision="bf16-mixed")
    )
    exact = train(schedule=Schedule(epochs=1, batch_size=4))[1]
    assert network.head.weight.dtype == torch.float32
    assert history[0]["segmentation"] == pytest.approx(exact[0]["segmentation"], rel=0.05)
    assert history[0]["segmentation"] != exact[0]["segmentation"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_where_there_is_none():
    with pytest.raises(RuntimeError, match="device 'gpu' was asked for, but torch sees no GPU"):
        make_fabric("gpu")


@pytest.mark.gpu
def test_the_same_training_on_a_gpu():
    assert make_fabric("gpu").device.type == "cuda"


def test_device_and_precision_words():
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'gpu', got 'cuda:0'"):
        make_fabric("cuda:0")
    with pytest.raises(ValueError, match="precision must be '32-true' or 'bf16-mixed', got 'fp16'"):
        make_fabric(precision="fp16")
