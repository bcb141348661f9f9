"""Training that can be killed, and what it refuses."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Dataset, get_worker_info
from torchvision import tv_tensors

from kamal_lib.artifacts import StoreError
from kamal_lib.data.loaders import loader
from kamal_lib.engine import Schedule, evaluate, fast_precision, fit, make_fabric, mean_losses
from kamal_lib.tasks import Depth, DirectObjective, Segmentation

TASKS = {"segmentation": Segmentation(("a", "b", "c")), "depth": Depth(bins=4, bin_length=0.5)}
SCHEDULE = Schedule(epochs=3, batch_size=4, learning_rate=0.01)


class Toy(Dataset):
    """Images whose class is their brightest channel."""

    def __init__(self, count: int = 10):
        self.count = count

    def __len__(self):
        return self.count

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


class Evaluated(DirectObjective):
    """In float64, and with norm layers in eval mode, whatever is asked: a batch's images do not meet."""

    def __init__(self, network: nn.Module):
        super().__init__(network.double(), TASKS)

    def train(self, mode: bool = True):
        return super().train(False)

    def forward(self, batch):
        return super().forward(batch | {"image": batch["image"].double()})


def gradients(objective: nn.Module, schedule: Schedule, *, images: int = 10, **options) -> list:
    """{parameter: gradient} of every step of a fit, as the optimiser saw them."""
    seen = []

    def look(*_):
        seen.append({name: p.grad.clone() for name, p in objective.named_parameters()})

    handle = register_optimizer_step_pre_hook(look)
    try:
        batches = loader(Toy(images), batch_size=schedule.batch_size, shuffle=True, seed=5)
        fit(objective, batches, schedule, fabric=make_fabric("cpu"), **options)
    finally:
        handle.remove()
    return seen


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


def killed(code: str, folder: Path) -> Path:
    """The checkpoint of a process that runs `code` in `folder` and kills itself."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | {"PYTHONPATH": path}, check=False
    )
    assert process.returncode == 9
    return folder / "state.safetensors"


@pytest.mark.parametrize(("stop_at", "accumulate"), [(1, 1), (2, 1), (3, 1), (5, 1), (8, 1), (5, 2)])
def test_killed_and_resumed_is_bit_for_bit(stop_at, accumulate, tmp_path):
    """Batches 3 and 6 end epochs; the others stop in the middle of one, the last one of a step, too."""
    code = (
        f"import test_engine as t; t.torch.set_num_threads({torch.get_num_threads()}); "
        f"t.train(t.Path('state.safetensors'), stop_at={stop_at}, "
        f"schedule=t.replace(t.SCHEDULE, accumulate={accumulate}))"
    )
    checkpoint = killed(code, tmp_path)
    if stop_at > 1:
        assert any(name.startswith("optimizer.") for name in load_file(checkpoint))
    resumed, history = train(checkpoint, schedule=replace(SCHEDULE, accumulate=accumulate))
    whole, expected = train(schedule=replace(SCHEDULE, accumulate=accumulate))
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


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 2), (2, 2), (4, 3), (1, 4), (3, 5)])
def test_accumulated_batches_are_one_batch_of_their_images(batch_size, accumulate):
    """Ten images: the last batch and the last step of an epoch may have fewer."""
    schedule = replace(SCHEDULE, batch_size=batch_size, accumulate=accumulate)
    large = replace(SCHEDULE, batch_size=batch_size * accumulate)
    some, one = Evaluated(Small()), Evaluated(Small())
    found, expected = gradients(some, schedule), gradients(one, large)
    assert len(found) == len(expected) == 3 * -(-10 // large.batch_size)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name in a:
            assert torch.allclose(a[name], b[name], rtol=1e-8, atol=1e-12), (step, name)
    for name, value in one.state_dict().items():
        assert torch.allclose(value, some.state_dict()[name], rtol=1e-6, atol=1e-8), name


def test_clipped_gradients_are_those_of_torch_and_of_the_closed_form():
    """In the first step gradients differ by nothing but clipping."""
    plain = gradients(Evaluated(Small()), SCHEDULE)[0]
    norm = torch.stack([value.square().sum() for value in plain.values()]).sum().sqrt()
    short = gradients(Evaluated(Small()), replace(SCHEDULE, clip=0.5 * float(norm)))[0]
    long = gradients(Evaluated(Small()), replace(SCHEDULE, clip=2 * float(norm)))[0]
    parameters = [nn.Parameter(value.clone()) for value in plain.values()]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    nn.utils.clip_grad_norm_(parameters, 0.5 * float(norm))
    for (name, value), parameter in zip(plain.items(), parameters, strict=True):
        assert torch.allclose(short[name], 0.5 * value, rtol=1e-5), name
        assert torch.equal(short[name], parameter.grad), name
        assert torch.equal(long[name], value), name


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"epochs": 0}, "epochs, batch_size and accumulate must be at least 1, got 0, 16 and 1"),
        ({"accumulate": 0}, "epochs, batch_size and accumulate must be at least 1, got 1, 16 and 0"),
        ({"clip": 0.0}, "clip must be a gradient norm above 0, or None for no clipping, got 0.0"),
        ({"clip": float("nan")}, "clip must be .*, got nan"),
    ],
)
def test_numbers_that_mean_no_training(numbers, words):
    with pytest.raises(ValueError, match=words):
        Schedule(**({"epochs": 1} | numbers))


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
        FloatingPointError, match=r"broken: the loss is not finite .*segmentation.*nan.* at step 0 of 9"
    ):
        fit(Broken(Small(), TASKS), batches, SCHEDULE, fabric=make_fabric("cpu"), title="broken")


def test_a_gradient_that_is_not_finite_is_not_clipped():
    class Steep(DirectObjective):
        def forward(self, batch):
            return {name: (loss - loss.detach()).sqrt() for name, loss in super().forward(batch).items()}

    batches = loader(Toy(), batch_size=4, shuffle=True, seed=5)
    with pytest.raises(
        FloatingPointError, match=r"steep: the gradient is not finite .* at step 0 of 9; lower"
    ):
        fit(
            Steep(Small(), TASKS),
            batches,
            replace(SCHEDULE, clip=1.0),
            fabric=make_fabric("cpu"),
            title="steep",
        )


def test_no_batch_no_training_no_score():
    """Ten images in batches of twelve without the small rest; an empty set has no loader at all."""
    none = loader(Toy(), batch_size=12, shuffle=True, seed=5, drop_last=True)
    fabric, objective = make_fabric("cpu"), DirectObjective(Small(), TASKS)
    with pytest.raises(ValueError, match="training: the loader has no batch: give it images"):
        fit(objective, none, SCHEDULE, fabric=fabric)
    with pytest.raises(ValueError, match="no batch, so there is no mean loss"):
        mean_losses(objective, none, fabric=fabric)
    with pytest.raises(ValueError, match="no batch, so there is nothing to predict"):
        evaluate(objective.network, none, TASKS, fabric=fabric)
    with pytest.raises(ValueError, match="expected an image for each of 1 processes, but got 0"):
        loader(Toy(0), batch_size=4, shuffle=True, seed=5)


class Deadly(Toy):
    """Kills the worker process that loads image 7 in the second epoch, once."""

    def __init__(self, flag: Path):
        super().__init__()
        self.flag, self.seen = flag, 0

    def __getitem__(self, index):
        self.seen += index == 7
        if self.seen == 2 and get_worker_info() is not None and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_dead_worker_of_the_loader_is_named_and_the_training_goes_on(tmp_path):
    checkpoint = tmp_path / "state.safetensors"

    def run():
        network = Small()
        batches = loader(Deadly(tmp_path / "flag"), batch_size=4, shuffle=True, seed=5, workers=1)
        schedule, fabric = replace(SCHEDULE, epochs=2), make_fabric("cpu")
        fit(
            DirectObjective(network, TASKS),
            batches,
            schedule,
            fabric=fabric,
            checkpoint=checkpoint,
            save_every=0.0,
            title="some training",
        )
        return network

    with pytest.raises(RuntimeError, match=r"some training: a process .* is gone .DataLoader worker .pid"):
        run()
    assert checkpoint.exists()
    whole, _ = train(schedule=replace(SCHEDULE, epochs=2))
    resumed = run()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_connection_is_a_dead_worker_where_there_are_any(workers):
    class Broken(DirectObjective):
        def forward(self, batch):
            raise EOFError("nobody at the other end")

    batches = loader(Toy(), batch_size=4, shuffle=True, seed=5, workers=workers)
    expected = RuntimeError if workers else EOFError
    with pytest.raises(expected, match="nobody at the other end") as caught:
        fit(Broken(Small(), TASKS), batches, SCHEDULE, fabric=make_fabric("cpu"))
    assert ("a process that loads images is gone" in str(caught.value)) == (workers == 1)


def test_a_full_disk_stops_the_training_and_leaves_its_checkpoint(tmp_path, monkeypatch):
    checkpoint, written = tmp_path / "state.safetensors", Path.write_bytes

    def full(self, content):
        if len(list(tmp_path.iterdir())) == 0:
            return written(self, content)
        written(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(StoreError, match=r"cannot write in .*No space left on device.*KAMAL_STORE"):
            train(checkpoint)
    resumed, history = train(checkpoint)
    whole, expected = train()
    assert history == expected
    assert torch.equal(resumed.head.weight, whole.head.weight)


def test_a_watch_sees_every_epoch_and_disturbs_nothing(tmp_path):
    seen, modes = [], []

    def look(history):
        seen.append([dict(row) for row in history])
        evaluate(network, batches, TASKS, fabric=fabric)
        assert not network.training

    network, fabric = Small(), make_fabric("cpu")
    network.head.register_forward_pre_hook(lambda *_: modes.append(network.training))
    batches = loader(Toy(), batch_size=4, shuffle=False, seed=0)
    images = loader(Toy(), batch_size=4, shuffle=True, seed=5)
    history = fit(DirectObjective(network, TASKS), images, SCHEDULE, fabric=fabric, watch=look)
    assert seen == [history[:1], history[:2], history]
    assert modes == ([True] * 3 + [False] * 3) * 3
    alone, expected = train()
    assert history == expected
    for name, value in alone.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


def test_an_error_in_a_watch_loses_nothing(tmp_path):
    def look(history):
        if len(history) == 2:
            raise OSError("no window")

    def run(watch, **options):
        network = Small()
        options |= {"checkpoint": tmp_path / "state.safetensors", "watch": watch}
        images = loader(Toy(), batch_size=4, shuffle=True, seed=5)
        history = fit(DirectObjective(network, TASKS), images, SCHEDULE, fabric=make_fabric("cpu"), **options)
        return network, history

    with pytest.raises(OSError, match="no window"):
        run(look, save_every=1e9)
    rows: list = []
    network, history = run(lambda history: rows.append(len(history)))
    assert rows == [3]
    alone, expected = train()
    assert history == expected
    assert torch.equal(network.head.weight, alone.head.weight)


def test_a_loader_that_was_left_midway_is_begun_again():
    batches = loader(Toy(), batch_size=4, shuffle=True, seed=5)
    batches.sampler.seek(1, 2)
    network = Small()
    history = fit(DirectObjective(network, TASKS), batches, SCHEDULE, fabric=make_fabric("cpu"))
    assert history == train()[1]


# --- two who take turns -------------------------------------------------------------------------------------


class Judge(nn.Module):
    """Learns to tell the target's mean from the response's; the number in its buffer must resume, too."""

    def __init__(self, network: nn.Module):
        super().__init__()
        torch.manual_seed(1)
        self.score = nn.Linear(3, 1)
        self.register_buffer("turns", torch.zeros((), dtype=torch.int64))
        self._network = (network,)

    def forward(self, batch):
        self.turns += 1
        with torch.no_grad():
            fake = self._network[0](batch["image"])["segmentation"].mean((2, 3))
        real = nn.functional.one_hot(batch["labels"], 3).float().mean((1, 2))
        return {"judged": (1 + self.turns % 3) * (self.score(fake) - self.score(real)).mean()}


class Judged(DirectObjective):
    """A network whose response is to score high as well."""

    def __init__(self, network: nn.Module, judge: Judge):
        super().__init__(network, TASKS)
        self._judge = (judge,)

    def forward(self, batch):
        fake = self.network(batch["image"])["segmentation"].mean((2, 3))
        score = nn.functional.linear(fake, self._judge[0].score.weight.detach())
        return super().forward(batch) | {"score": -score.mean()}


class Plain(nn.Module):
    """Without norm layers, so that the judge may look without moving anything."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image):
        return {"segmentation": self.layer(image)}


RATE = Schedule(epochs=3, batch_size=4, learning_rate=0.03, weight_decay=0.0, power=0.5)


def take_turns(checkpoint: Path | None = None, *, stop_at: tuple[str, int] = ("", 0), rate=RATE, **options):
    """(network, judge, history) after three epochs of three steps; or dead at a player's given turn."""
    network = Plain()
    judge = Judge(network)
    judged = Judged(network, judge)
    if stop_at[0]:
        {"judge": judge, "judged": judged}[stop_at[0]].register_forward_pre_hook(Stop(stop_at[1]))
    history = fit(
        judged,
        loader(Toy(), batch_size=4, shuffle=True, seed=5),
        replace(SCHEDULE, accumulate=rate.accumulate),
        fabric=make_fabric("cpu"),
        opponent=(judge, rate),
        checkpoint=checkpoint,
        save_every=0.0,
        **options,
    )
    return network, judge, history


def test_taking_turns_is_an_obvious_loop():
    network, judge, history = take_turns()
    student, score = Plain().layer, Judge(Plain()).score
    first = torch.optim.AdamW(score.parameters(), lr=1.0, weight_decay=0.0)
    second = torch.optim.AdamW(student.parameters(), lr=1.0, weight_decay=1e-4)
    batches = loader(Toy(), batch_size=4, shuffle=True, seed=5)
    step, rows = 0, []
    for epoch in range(3):
        batches.sampler.seek(epoch)
        for batch in batches:
            first.param_groups[0]["lr"] = 0.03 * (1 - step / 9) ** 0.5
            second.param_groups[0]["lr"] = 0.01 * (1 - step / 9) ** 0.9
            step += 1
            fake = student(batch["image"]).detach().mean((2, 3))
            real = nn.functional.one_hot(batch["labels"], 3).float().mean((1, 2))
            judged = (1 + step % 3) * (score(fake).mean() - score(real).mean())
            first.zero_grad()
            judged.backward()
            first.step()
            response = student(batch["image"])
            entropy = nn.functional.cross_entropy(response, batch["labels"])
            high = -(response.mean((2, 3)) @ score.weight.detach()[0]).mean()
            second.zero_grad()
            (entropy + high).backward()
            second.step()
            rows.append([float(judged.detach()), float(entropy.detach()), float(high.detach())])
    for learnt, expected in ((network.layer, student), (judge.score, score)):
        for name, value in expected.state_dict().items():
            assert torch.allclose(value, learnt.state_dict()[name], rtol=1e-4, atol=1e-5), name
    means = torch.tensor(rows).view(3, 3, 3).mean(1).tolist()
    for row, (judged, entropy, high), epoch in zip(history, means, (1, 2, 3), strict=True):
        expected = {"epoch": epoch, "judged": judged, "segmentation": entropy, "score": high}
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_at_every_turn_one_learns_and_the_other_keeps_still(accumulate):
    """The weights of both whenever one is asked for its losses."""
    network, seen = Plain(), []
    judge = Judge(network)
    judged = Judged(network, judge)

    def look(whose):
        pair = ("judged", network), ("judge", judge.score)
        seen.append((whose, {name: [w.clone() for w in module.parameters()] for name, module in pair}))

    judge.register_forward_pre_hook(lambda *_: look("judge"))
    judged.register_forward_pre_hook(lambda *_: look("judged"))
    images = loader(Toy(16), batch_size=4, shuffle=True, seed=5)
    schedule, rate = (replace(one, accumulate=accumulate, epochs=1) for one in (SCHEDULE, RATE))
    fit(judged, images, schedule, fabric=make_fabric("cpu"), opponent=(judge, rate))
    turns = ["judge"] * accumulate + ["judged"] * accumulate
    assert [whose for whose, _ in seen] == turns * (4 // accumulate)
    for (whose, before), (following, after) in pairwise(seen):
        for name in before:
            same = all(map(torch.equal, before[name], after[name]))
            assert same == (name != whose or whose == following)


@pytest.mark.parametrize("stop_at", [("judged", 0), ("judge", 2), ("judge", 4), ("judged", 4)])
def test_two_players_killed_and_resumed_are_bit_for_bit(stop_at, tmp_path):
    """At the start of a step, and between the turns of a step, which is then taken again."""
    code = (
        f"import test_engine as t; t.torch.set_num_threads({torch.get_num_threads()}); "
        f"t.take_turns(t.Path('state.safetensors'), stop_at={stop_at})"
    )
    checkpoint = killed(code, tmp_path)
    assert any(name.startswith("opponent.optimizer.") for name in load_file(checkpoint)) == (stop_at[1] > 0)
    *resumed, history = take_turns(checkpoint)
    *whole, expected = take_turns()
    assert history == expected
    for a, b in zip(resumed, whole, strict=True):
        assert a.state_dict().keys() == b.state_dict().keys()
        assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
    assert int(resumed[1].turns) == 9


def test_alone_the_checkpoint_keeps_its_names_and_is_no_ones_else(tmp_path):
    alone, both = tmp_path / "alone.safetensors", tmp_path / "both.safetensors"
    train(alone)
    names = [f"objective.network.{name}" for name in Small().state_dict()]
    names += [f"optimizer.{i}.{name}" for i in range(5) for name in ("step", "exp_avg", "exp_avg_sq")]
    assert sorted(load_file(alone)) == sorted(names)
    take_turns(both)
    with pytest.raises(ValueError, match=r"training without an opponent, this one is with: give it"):
        take_turns(alone)
    with pytest.raises(ValueError, match=r"training with an opponent, this one is without: give it"):
        train(both)


def test_the_other_after_a_watch():
    """A watch puts networks in eval mode; both go on in training mode."""
    modes = []

    def look(history):
        judge.eval(), judged.eval()

    network = Plain()
    judge = Judge(network)
    judged = Judged(network, judge)
    judge.register_forward_pre_hook(lambda *_: modes.append(judge.training))
    judged.register_forward_pre_hook(lambda *_: modes.append(judged.training))
    images = loader(Toy(), batch_size=4, shuffle=True, seed=5)
    fit(judged, images, SCHEDULE, fabric=make_fabric("cpu"), opponent=(judge, RATE), watch=look)
    assert modes == [True] * 18


def test_each_player_has_its_own_clipping_and_its_own_trouble():
    free, _, _ = take_turns()
    still, judge, _ = take_turns(rate=replace(RATE, clip=1e-30))
    assert not torch.equal(still.layer.weight, free.layer.weight)
    assert torch.allclose(judge.score.weight, Judge(Plain()).score.weight, atol=1e-6)
    with pytest.raises(FloatingPointError, match=r"not finite .*'judged': nan.* at step 0 .* rate \(0\.03\)"):
        fit_two(scale=float("nan"))


def test_players_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"the same epochs, batch_size and accumulate, got \(3, 4, 2\)"):
        fit_two(opponent=replace(RATE, accumulate=2))
    with pytest.raises(ValueError, match="both have a loss 'score', which the history cannot tell apart"):
        fit_two(name="score")
    with pytest.raises(
        ValueError, match="both train 2 of the same parameters: register a network in the one"
    ):
        fit_two(shared=True)


def fit_two(*, opponent=RATE, name: str = "judged", scale: float = 1.0, shared: bool = False) -> None:
    class Named(Judge):
        def forward(self, batch):
            return {name: scale * super().forward(batch)["judged"]}

    network = Plain()
    judge = Named(network)
    if shared:
        judge.network = network
    images = loader(Toy(), batch_size=4, shuffle=True, seed=5)
    fit(Judged(network, judge), images, SCHEDULE, fabric=make_fabric("cpu"), opponent=(judge, opponent))


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
