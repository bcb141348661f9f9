"""Training on Lightning Fabric: it knows objectives, loaders and tasks, not distillation.

An *objective* is a module whose forward(batch) returns {name: loss}. What is registered in it learns and is
its state; what it merely uses (frozen teachers, a frozen prefix) it keeps unregistered. Two that alternate, a
student and its critic, are two objectives, and each is to the other a thing merely used.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from kamal_lib.artifacts import load_state, save_state
from kamal_lib.devices import fast_precision, make_fabric, to_device
from kamal_lib.evaluation import evaluate, mean_losses, predict
from kamal_lib.processes import processes

__all__ = [
    "History",
    "Schedule",
    "evaluate",
    "fast_precision",
    "fit",
    "make_fabric",
    "mean_losses",
    "predict",
    "share",
    "to_device",
]

History = list[dict[str, float]]


@dataclass(frozen=True)
class Schedule:
    """How and where: AdamW with the paper's poly policy, lr · (1 − step/steps)^power.

    `warmup` is the share of the steps in which the rate first rises from 0, linearly; the paper has none.
    `accumulate` batches of `batch_size` images make one step, whose gradient is that of all their images
    together; at the end of an epoch a step takes what is left. (A loss leaves out images without a known
    pixel, and the batches' weights do not: where there are such images, the two differ a little, and so do
    one and several processes.) `clip` is the largest gradient norm, over all parameters together, that a step
    uses; longer gradients are shortened to it.

    Raises ValueError for numbers that mean no training.
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

    def __post_init__(self):
        if min(self.epochs, self.batch_size, self.accumulate) < 1:
            raise ValueError(
                f"epochs, batch_size and accumulate must be at least 1, got {self.epochs}, {self.batch_size} "
                f"and {self.accumulate}"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(
                f"clip must be a gradient norm above 0, or None for no clipping, got {self.clip}"
            )

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0..steps−1."""
        rising = min(1.0, (step + 1) / (self.warmup * steps)) if self.warmup else 1.0
        return self.learning_rate * rising * (1 - step / steps) ** self.power


def share(schedule: Schedule) -> dict[str, int]:
    """What the training loader of this process takes of a batch: {"batch_size", "num_replicas", "rank"}.

    A schedule's batch size is that of all processes together. Raises ValueError where it does not divide.
    """
    count, rank = processes()
    if schedule.batch_size % count:
        raise ValueError(
            f"a batch of {schedule.batch_size} images does not divide among {count} processes: choose a "
            f"batch_size that is a multiple of {count}"
        )
    return {"batch_size": schedule.batch_size // count, "num_replicas": count, "rank": rank}


class Player(NamedTuple):
    """Who learns: an objective, as it was given and as Fabric wrapped it, with its own optimiser and rate."""

    objective: nn.Module
    schedule: Schedule
    optimizer: torch.optim.AdamW
    model: Any
    wrapped: Any


def fit(
    objective: nn.Module,
    loader: DataLoader,
    schedule: Schedule,
    *,
    fabric: Fabric,
    opponent: tuple[nn.Module, Schedule] | None = None,
    checkpoint: Path | None = None,
    save_every: float = 10.0,
    title: str = "training",
    watch: Callable[[History], object] | None = None,
) -> History:
    """Trains the objective's parameters on the sum of its losses; returns a row of mean losses an epoch.

    The means are over batches, a small last one included.

    An `opponent`, such as a critic, is a second objective with its own schedule, of as many epochs and images
    a step. At every step it learns first, then the objective, both from the same batches, each by its own
    optimiser, rate and clipping. What one merely uses of the other must get no gradient from it and keep its
    buffers. The history has the losses of both.

    With a `checkpoint` path the state is saved there every `save_every` seconds, and a later call goes on
    from it: on a CPU, with as many threads, the result is that of an uninterrupted run, bit for bit (order
    and augmentation of the loader are functions of seed, epoch and index).

    `watch` is called after each epoch with the history so far, and may put the networks in eval mode. The
    checkpoint is written before, so that an error in it loses nothing.

    Several processes each pass the shuffled loader of their `share`, and end with the same weights and
    history. Norm layers see the share only, and keep the running statistics of process 0, which alone writes
    files. `watch` is called in every process.

    Raises FloatingPointError when a loss is not finite, RuntimeError when a worker of the loader died,
    ValueError for a loader without a batch, for an opponent whose steps or names of losses do not go together
    with the objective's, and for a checkpoint of another number of players, StoreError when the checkpoint
    cannot be written.
    """
    loader.sampler.seek(0)  # pyright: ignore[reportAttributeAccessIssue]: another fit may have left it midway
    in_epoch = len(loader)  # batches
    if not in_epoch:
        raise ValueError(f"{title}: the loader has no batch: give it images, or turn drop_last off")
    player = enter(objective, schedule, fabric)
    rival = None if opponent is None else enter(*opponent, fabric)
    players = (player,) if rival is None else (rival, player)
    check_same_steps(players)
    per_epoch = math.ceil(in_epoch / schedule.accumulate)
    steps = schedule.epochs * per_epoch
    step, history, sums = resume(checkpoint, player.objective, player.optimizer, rival)
    fabric.barrier()  # all have read the checkpoint before one writes the next
    writes = checkpoint if fabric.is_global_zero else None
    for each in players:
        each.model.train()
    owner: dict[str, Player] = {}
    saved = time.monotonic()
    with progress_bar(steps, title, start=step) as bar, dead_workers_named(title, loader):
        while step < steps:
            epoch, start = divmod(step, per_epoch)
            loader.sampler.seek(epoch, start * schedule.accumulate)  # pyright: ignore[reportAttributeAccessIssue]
            for batches in groups(loader, schedule.accumulate):
                if writes is not None and time.monotonic() - saved >= save_every:
                    save_progress(writes, player.objective, player.optimizer, step, history, sums, rival)
                    saved = time.monotonic()
                for each in players:
                    for group in each.optimizer.param_groups:
                        group["lr"] = each.schedule.rate(step, steps)
                    each.wrapped.zero_grad()
                    try:
                        for losses in gradients(each.model, batches, fabric):
                            check_own_names(owner, each, losses)
                            sums |= {name: sums.get(name, 0.0) + loss for name, loss in losses.items()}
                        clip_gradients(each.model, each.wrapped, each.schedule.clip, fabric)
                    except FloatingPointError as error:
                        raise FloatingPointError(
                            f"{title}: {error} at step {step} of {steps}; lower the learning rate "
                            f"({each.schedule.learning_rate}) or look at the batch's targets"
                        ) from error
                    each.wrapped.step()
                step += 1
                bar.update()
            history.append({"epoch": epoch + 1.0} | {name: s / in_epoch for name, s in sums.items()})
            bar.set_postfix({name: f"{value:.3f}" for name, value in history[-1].items() if name != "epoch"})
            sums = {}
            if fabric.world_size > 1:
                for each in players:
                    for buffer in each.objective.buffers():
                        torch.distributed.broadcast(buffer, 0)
            if watch is not None:
                if writes is not None:
                    save_progress(writes, player.objective, player.optimizer, step, history, sums, rival)
                watch(history)
                for each in players:
                    each.model.train()
    return history


def enter(objective: nn.Module, schedule: Schedule, fabric: Fabric) -> Player:
    """The objective on its device, with an optimiser of the parameters that ask for gradients."""
    objective = objective.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    model, wrapped = fabric.setup(objective, optimizer)
    return Player(objective, schedule, optimizer, model, wrapped)


def check_same_steps(players: Sequence[Player]) -> None:
    """Raises ValueError unless all take the same steps, in the same batches, with parameters of their own."""
    plans = [(p.schedule.epochs, p.schedule.batch_size, p.schedule.accumulate) for p in players]
    if len(set(plans)) > 1:
        raise ValueError(
            f"opponent and objective learn from the same batches and need the same epochs, batch_size and "
            f"accumulate, got {plans[0]} and {plans[1]}: make one schedule from the other, by replace"
        )
    seen = [{id(p) for group in player.optimizer.param_groups for p in group["params"]} for player in players]
    if len(seen) > 1 and seen[0] & seen[1]:
        raise ValueError(
            f"opponent and objective both train {len(seen[0] & seen[1])} of the same parameters: register a "
            f"network in the one that trains it, and hide it from the other in a tuple"
        )


def check_own_names(owner: dict[str, Player], player: Player, losses: Iterable[str]) -> None:
    """Notes whose loss a name is. Raises ValueError where it is another player's: the history has one row."""
    for name in losses:
        if owner.setdefault(name, player) is not player:
            raise ValueError(
                f"opponent and objective both have a loss {name!r}, which the history cannot tell apart: "
                f"rename one"
            )


def gradients(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], fabric: Fabric
) -> Iterator[dict[str, float]]:
    """Adds to the parameters the gradient of the mean over all images of the batches; yields their losses.

    The losses are means over all processes. Raises FloatingPointError where one is not finite.
    """
    images = sum(len(batch["image"]) for batch in batches)
    for i, batch in enumerate(batches, 1):
        with fabric.no_backward_sync(model, enabled=i < len(batches)):  # pyright: ignore[reportArgumentType]
            losses: dict[str, Tensor] = model(to_device(fabric, batch))
            stacked = torch.stack(list(losses.values()))
            means: Any = fabric.all_reduce(stacked.detach().clone())
            seen = dict(zip(losses, means.tolist(), strict=True))
            if not math.isfinite(sum(seen.values())):
                raise FloatingPointError(f"the loss is not finite ({seen})")
            yield seen
            fabric.backward(stacked.sum() * (len(batch["image"]) / images))


def clip_gradients(model: Any, optimizer: Any, clip: float | None, fabric: Fabric) -> None:
    """Shortens the gradient to norm `clip`. Raises FloatingPointError where it is not finite."""
    if clip is not None:
        norm: Any = fabric.clip_gradients(model, optimizer, max_norm=clip, error_if_nonfinite=False)
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite (norm {float(norm)})")


def groups(loader: Iterable, size: int) -> Iterator[list[dict[str, Any]]]:
    """The batches of one pass, `size` at a time; the last group may be smaller."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


@contextmanager
def dead_workers_named(title: str, loader: DataLoader) -> Iterator[None]:
    """Says whose training it was that lost a worker process of its loader, and what to do."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        seen: Exception = error
        if loader.num_workers and not isinstance(error, RuntimeError) and "Caught" not in str(error):
            try:
                time.sleep(2)  # a connection broke first: the signal that interrupts this says whose
            except RuntimeError as death:
                seen = death
        elif "DataLoader worker (pid" not in str(error):
            raise
        raise RuntimeError(
            f"{title}: a process that loads images is gone ({seen}). Was there too little memory? Train "
            f"again, with fewer workers: it goes on from the last checkpoint if one was asked for"
        ) from error


def progress_bar(total: int, title: str, *, start: int = 0) -> tqdm:
    """A bar that leaves nothing behind; silent in all processes but one, and where KAMAL_QUIET is set."""
    quiet = bool(os.environ.get("KAMAL_QUIET")) or processes()[1] > 0
    return tqdm(total=total, initial=start, desc=title, leave=False, disable=quiet)


def save_progress(
    path: Path,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    history: History,
    sums: dict[str, float],
    opponent: Player | None = None,
) -> None:
    """Writes everything that the rest of the training depends on."""
    tensors = state_of(objective, optimizer)
    if opponent is not None:
        theirs = state_of(opponent.objective, opponent.optimizer)
        tensors |= {f"opponent.{name}": value for name, value in theirs.items()}
    save_state(path, tensors, {"step": step, "history": history, "sums": sums})


def resume(
    path: Path | None,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    opponent: Player | None = None,
) -> tuple[int, History, dict[str, float]]:
    """(step, history, sums of the epoch) of a checkpoint, loaded into all modules; else a start.

    Raises ValueError for a checkpoint with an opponent where there is none now, and the other way round.
    """
    found = load_state(path) if path is not None else None
    if found is None:
        return 0, [], {}
    tensors, extra = found
    ours = {name: value for name, value in tensors.items() if not name.startswith("opponent.")}
    if (len(ours) < len(tensors)) != (opponent is not None):
        raise ValueError(
            f"the checkpoint {path} is of a training {'without' if opponent else 'with'} an opponent, this "
            f"one is {'with' if opponent else 'without'}: give it a checkpoint of its own"
        )
    load_into(objective, optimizer, ours)
    if opponent is not None:
        theirs = {name.removeprefix("opponent."): tensors[name] for name in tensors.keys() - ours.keys()}
        load_into(opponent.objective, opponent.optimizer, theirs)
    return extra["step"], extra["history"], extra["sums"]


def state_of(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of one player by name, under "objective." and "optimizer."."""
    tensors = {f"objective.{name}": value for name, value in objective.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    return tensors


def load_into(objective: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The way back from `state_of`."""
    prefix = "objective."
    objective.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, entry = name.split(".", 2)
            states.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
