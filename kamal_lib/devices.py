"""Where training runs: on one device, or on one for each process that `torchrun` started."""

import atexit
import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy

from kamal_lib.processes import processes


def make_fabric(device: str = "auto", *, precision: str = "32-true") -> Fabric:
    """A Fabric on "cpu", "gpu" or "auto"; precision "32-true" or "bf16-mixed".

    On one device; under `torchrun` on one for each process that it started, which then train together (DDP).
    Raises RuntimeError where a GPU is asked for and there are too few, ValueError for another word.
    """
    if device not in ("auto", "cpu", "gpu"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'gpu', got {device!r}")
    if device == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("device 'gpu' was asked for, but torch sees no GPU: use 'auto' or 'cpu'")
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(f"precision must be '32-true' or 'bf16-mixed', got {precision!r}")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # announces bfloat16 at every use
    accelerator = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    count, _ = processes()
    if count == 1:
        return Fabric(accelerator=accelerator, devices=1, precision=precision)  # pyright: ignore[reportArgumentType]
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if accelerator == "cuda" and here > torch.cuda.device_count():
        raise RuntimeError(
            f"torchrun started {here} processes, but torch sees {torch.cuda.device_count()} GPUs: start one "
            f"process a GPU, or use device 'cpu'"
        )
    fabric = Fabric(
        accelerator=accelerator,
        devices=here,
        num_nodes=count // here,
        precision=precision,  # pyright: ignore[reportArgumentType]
        strategy=DDPStrategy(timeout=timedelta(minutes=10)),  # how long one waits for a process that is lost
        plugins=TorchElasticEnvironment(),
    )
    fabric.launch()
    atexit.register(leave)
    return fabric


def leave() -> None:
    """Ends the connection to the other processes; without it some end by a crash when Python exits."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def fast_precision() -> str:
    """ "bf16-mixed" on a processor that computes bfloat16 itself, "32-true" on others and where unknown."""
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if able.get("avx512_bf16") or able.get("amx_bf16") else "32-true"


def to_device(fabric: Fabric, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch on Fabric's device, its image in channels_last, which convolutions on CPU and GPU prefer."""
    moved = fabric.to_device(dict(batch))
    return moved | {"image": moved["image"].contiguous(memory_format=torch.channels_last)}
