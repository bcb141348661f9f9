"""Training and evaluation on Lightning Fabric: it knows objectives, loaders and tasks, not distillation.

An *objective* is a module whose forward(batch) returns {name: loss}. What is registered in it learns and is
its state; what it merely uses (frozen teachers, a frozen prefix) it keeps unregistered.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from kamal_lib.artifacts import load_state, save_state
from kamal_lib.tasks import Task

History = list[dict[str, float]]


@dataclass(frozen=True)
class Schedule:
    """How and where: AdamW with the paper's poly policy, lr · (1 − step/steps)^power.

    `warmup` is the share of the steps in which the rate first rises from 0, linearly; the paper has none.
    """

    epochs: int
    batch_size: int = 16
    learning_rate: float = 4e-3
    weight_decay: float = 1e-4
    power: float = 0.9
    warmup: float = 0.0
    precision: str = "32-true"
    device: str = "auto"
    accumulate: int = 1
    clip: float | None = None

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0..steps−1."""
        rising = min(1.0, (step + 1) / (self.warmup * steps)) if self.warmup else 1.0
        return self.learning_rate * rising * (1 - step / steps) ** self.power


def make_fabric(device: str = "auto", *, precision: str = "32-true") -> Fabric:
    """A Fabric on one device: "cpu", "gpu" or "auto"; precision "32-true" or "bf16-mixed".

    Raises RuntimeError where a GPU is asked for and there is none, ValueError for another word.
    """
    if device not in ("auto", "cpu", "gpu"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'gpu', got {device!r}")
    if device == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("device 'gpu' was asked for, but torch sees no GPU: use 'auto' or 'cpu'")
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(f"precision must be '32-true' or 'bf16-mixed', got {precision!r}")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # announces bfloat16 at every use
    accelerator = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    return Fabric(accelerator=accelerator, devices=1, precision=precision)  # pyright: ignore[reportArgumentType]


def fast_precision() -> str:
    """ "bf16-mixed" on a processor that computes bfloat16 itself, "32-true" on others and where unknown."""
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if able.get("avx512_bf16") or able.get("amx_bf16") else "32-true"


def to_device(fabric: Fabric, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch on Fabric's device, its image in channels_last, which convolutions on CPU and GPU prefer."""
    moved = fabric.to_device(dict(batch))
    return moved | {"image": moved["image"].contiguous(memory_format=torch.channels_last)}


def fit(
    objective: nn.Module,
    loader: DataLoader,
    schedule: Schedule,
    *,
    fabric: Fabric,
    checkpoint: Path | None = None,
    save_every: float = 10.0,
    title: str = "training",
) -> History:
    """Trains the objective's parameters on the sum of its losses; returns one row of mean losses per epoch.

    With a `checkpoint` path the state is saved there every `save_every` seconds, and a later call goes on
    from it: on a CPU the result is that of an uninterrupted run, bit for bit (order and augmentation of the
    loader are functions of seed, epoch and index). Raises FloatingPointError when a loss is not finite.
    """
    objective = objective.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    model, wrapped = fabric.setup(objective, optimizer)
    per_epoch = len(loader)
    steps = schedule.epochs * per_epoch
    step, history, sums = resume(checkpoint, objective, optimizer)
    model.train()
    saved = time.monotonic()
    with progress_bar(steps, title, start=step) as bar:
        while step < steps:
            epoch, start = divmod(step, per_epoch)
            loader.sampler.seek(epoch, start)  # pyright: ignore[reportAttributeAccessIssue]
            for batch in loader:
                if checkpoint is not None and time.monotonic() - saved >= save_every:
                    save_progress(checkpoint, objective, optimizer, step, history, sums)
                    saved = time.monotonic()
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate(step, steps)
                losses: dict[str, Tensor] = model(to_device(fabric, batch))
                total = torch.stack(list(losses.values())).sum()
                if not bool(torch.isfinite(total)):
                    seen = {name: round(float(loss.detach()), 4) for name, loss in losses.items()}
                    raise FloatingPointError(
                        f"{title}: the loss is not finite at step {step} of {steps}: {seen}; "
                        f"lower the learning rate ({schedule.learning_rate}) or look at the batch's targets"
                    )
                wrapped.zero_grad()
                fabric.backward(total)
                wrapped.step()
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0.0) + float(loss.detach())
                step += 1
                bar.update()
            history.append({"epoch": epoch + 1.0} | {name: s / per_epoch for name, s in sums.items()})
            bar.set_postfix({name: f"{value:.3f}" for name, value in history[-1].items() if name != "epoch"})
            sums = {}
    return history


def progress_bar(total: int, title: str, *, start: int = 0) -> tqdm:
    """A bar that leaves nothing behind; silent where KAMAL_QUIET is set, as in reports."""
    quiet = bool(os.environ.get("KAMAL_QUIET"))
    return tqdm(total=total, initial=start, desc=title, leave=False, disable=quiet)


def save_progress(
    path: Path,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    history: History,
    sums: dict[str, float],
) -> None:
    """Writes everything that the rest of the training depends on."""
    tensors = {f"objective.{name}": value for name, value in objective.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    save_state(path, tensors, {"step": step, "history": history, "sums": sums})


def resume(
    path: Path | None, objective: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, History, dict[str, float]]:
    """(step, history, sums of the epoch) of a checkpoint, loaded into both modules; else a start."""
    found = load_state(path) if path is not None else None
    if found is None:
        return 0, [], {}
    tensors, extra = found
    prefix = "objective."
    objective.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, entry = name.split(".", 2)
            states.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return extra["step"], extra["history"], extra["sums"]


@torch.no_grad()
def mean_losses(objective: nn.Module, loader: Iterable, *, fabric: Fabric) -> dict[str, float]:
    """The objective's losses on a whole set, in eval mode, each image counting the same."""
    objective = objective.to(fabric.device).eval()
    sums: dict[str, float] = {}
    images = 0
    for batch in loader:
        count = len(batch["image"])
        with fabric.autocast():
            losses = objective(to_device(fabric, batch))
        sums = {name: sums.get(name, 0.0) + count * float(loss) for name, loss in losses.items()}
        images += count
    return {name: value / images for name, value in sums.items()}


@torch.no_grad()
def predict(
    network: nn.Module,
    loader: Iterable,
    tasks: Mapping[str, Task],
    *,
    fabric: Fabric,
    each: Callable[[dict[str, Tensor], dict[str, Any]], None],
) -> None:
    """Calls each({task: decoded prediction}, batch) for every batch, with the network in eval mode."""
    network = network.to(fabric.device, memory_format=torch.channels_last).eval()  # pyright: ignore
    for batch in loader:
        moved = to_device(fabric, batch)
        with fabric.autocast():
            responses = network(moved["image"])
        each({name: tasks[name].decode(response) for name, response in responses.items()}, moved)


def evaluate(
    network: nn.Module, loader: Iterable, tasks: Mapping[str, Task], *, fabric: Fabric
) -> dict[str, float]:
    """The metrics of every task that the network has, over the whole set: {"miou": …, "abs_rel": …}."""
    metrics = {name: task.metric().to(fabric.device) for name, task in tasks.items()}
    used: set[str] = set()

    def update(predictions: dict[str, Tensor], batch: dict[str, Any]) -> None:
        for name, prediction in predictions.items():
            metrics[name].update(prediction, batch[tasks[name].key])
            used.add(name)

    predict(network, loader, tasks, fabric=fabric, each=update)
    return {key: float(v) for name in tasks if name in used for key, v in metrics[name].compute().items()}
