"""What a trained network is worth: predictions, mean losses and metrics over a whole set.

Under `torchrun` every process calls these, each with its part of the set (`num_replicas` and `rank` of the
loader, `shuffle=False`, parts may differ in length) or, simpler, each with the whole set: losses and metrics
are then those of the whole set in either case, the same in every process.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from kamal_lib.devices import to_device
from kamal_lib.tasks import Task


@torch.no_grad()
def mean_losses(objective: nn.Module, loader: Iterable, *, fabric: Fabric) -> dict[str, float]:
    """The objective's losses on a whole set, in eval mode, each image counting the same.

    Raises ValueError for a loader without a batch.
    """
    objective = objective.to(fabric.device).eval()
    sums: dict[str, float] = {}
    images = 0
    for batch in loader:
        count = len(batch["image"])
        with fabric.autocast():
            losses = objective(to_device(fabric, batch))
        sums = {name: sums.get(name, 0.0) + count * float(loss) for name, loss in losses.items()}
        images += count
    if not images:
        raise ValueError("the loader has no batch, so there is no mean loss: give it images")
    everywhere: Any = fabric.all_reduce(
        torch.tensor([images, *sums.values()], dtype=torch.float64, device=fabric.device), reduce_op="sum"
    )
    images, *totals = everywhere.tolist()
    return {name: value / images for name, value in zip(sums, totals, strict=True)}


@torch.no_grad()
def predict(
    network: nn.Module,
    loader: Iterable,
    tasks: Mapping[str, Task],
    *,
    fabric: Fabric,
    each: Callable[[dict[str, Tensor], dict[str, Any]], None],
) -> None:
    """Calls each({task: decoded prediction}, batch) for every batch, with the network in eval mode.

    Raises ValueError for a loader without a batch.
    """
    empty = True
    network = network.to(fabric.device, memory_format=torch.channels_last).eval()  # pyright: ignore
    for batch in loader:
        empty = False
        moved = to_device(fabric, batch)
        with fabric.autocast():
            responses = network(moved["image"])
        each({name: tasks[name].decode(response) for name, response in responses.items()}, moved)
    if empty:
        raise ValueError("the loader has no batch, so there is nothing to predict: give it images")


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
