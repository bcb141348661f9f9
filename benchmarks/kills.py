"""Kills a small run at random moments and compares what it leaves, to the byte, with an uninterrupted run.

    python benchmarks/kills.py [--trials 20] [--seed 0]

A run renders rooms and trains a small network on them through `load_or_train`, in a store of its own. In
each trial it is started, killed (SIGKILL) at a moment drawn uniformly from the length of a whole run, started
again, killed again, and so on until a start comes to its end before its moment does. Then every file of its
artefact and every shard of its rooms must have the bytes of the uninterrupted run, and nothing may be left
over. The last line is JSON; the exit status is 1 if anything differs.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from kamal_lib import engine
from kamal_lib.artifacts import Recipe, Result, Work, load_or_train
from kamal_lib.data.loaders import loader
from kamal_lib.data.scenes import CLASSES
from kamal_lib.data.synthetic import Rooms
from kamal_lib.engine import Schedule, evaluate, fit, make_fabric
from kamal_lib.models.encoder_decoder import Architecture, build_network
from kamal_lib.tasks import DirectObjective, Segmentation

PROCESSES = multiprocessing.get_context("forkserver")  # loads libraries once, not once a start
PHASES = ("rendering", "training", "storing")
SCHEDULE = Schedule(epochs=6, batch_size=8, device="cpu")


@dataclass(frozen=True)
class SmallTeacher(Recipe):
    """A network of two blocks that learns to parse small rooms; it says in which phase it is."""

    rooms: int = 200
    size: tuple[int, int] = (24, 32)

    def sources(self) -> tuple[ModuleType, ...]:
        return (engine,)

    def train(self, work: Work) -> Result:
        rooms, (height, width) = work.folder.parent / "rooms", self.size
        print("rendering", flush=True)
        images = Rooms(
            "labelled", self.rooms, height=height, width=width, folder=rooms, progress=sys.stderr.write
        )
        print("training", flush=True)
        tasks = {"segmentation": Segmentation(CLASSES)}
        network = build_network(
            Architecture((8, 12), (1, 1), (True, True)), {"segmentation": len(CLASSES)}, seed=0
        )
        fabric = make_fabric("cpu")
        history = fit(
            DirectObjective(network, tasks),
            loader(images, batch_size=SCHEDULE.batch_size, shuffle=True, seed=0),
            SCHEDULE,
            fabric=fabric,
            checkpoint=work.folder / "training.safetensors",
            save_every=0.05,
        )
        found = evaluate(network, loader(images, batch_size=50, shuffle=False, seed=0), tasks, fabric=fabric)
        print("storing", flush=True)
        return Result(network.state_dict(), found, history)


def work(store: Path, said: Path) -> None:
    """What is killed."""
    with said.open("w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
        torch.set_num_threads(1)
        load_or_train(SmallTeacher(), store)


def run(store: Path, said: Path, kill_after: float | None = None) -> tuple[str | None, float]:
    """One start in a process of its own: (phase in which it was killed, None if it ended; its seconds)."""
    said.unlink(missing_ok=True)
    process = PROCESSES.Process(target=work, args=(store, said))
    process.start()
    while process.is_alive() and not (said.exists() and said.read_text()):  # it only gets ready
        time.sleep(0.002)
    start = time.monotonic()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
        return said.read_text().split()[-1], time.monotonic() - start
    if process.exitcode:
        raise RuntimeError(f"the run failed by itself with exit status {process.exitcode}")
    return None, time.monotonic() - start


def contents(store: Path) -> dict[str, str]:
    """{file: hash} of all that a run leaves, without the names of locks, which stay."""
    files = (path for path in store.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    """Prints one line a trial, and one of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "KAMAL_QUIET": "1"}
    # killed processes give no semaphores back
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    PROCESSES.set_forkserver_preload(["kamal_lib.engine", "kamal_lib.data.synthetic"])
    draw, kills, equal = random.Random(options.seed), Counter(), 0
    with tempfile.TemporaryDirectory() as scratch:
        said, whole = Path(scratch) / "said", Path(scratch) / "whole"
        _, seconds = run(whole, said)
        expected = contents(whole)
        print(f"uninterrupted: {seconds:.1f} s, {len(expected)} files")
        for trial in range(1, options.trials + 1):
            phases: list[str] = []
            while not phases:  # again, where the first start came to its end before its moment did
                store = Path(tempfile.mkdtemp(dir=scratch))
                while (phase := run(store, said, draw.uniform(0, seconds))[0]) is not None:
                    phases.append(phase)
            found = contents(store)
            differ = sorted(f for f in expected.keys() | found.keys() if expected.get(f) != found.get(f))
            equal += not differ
            kills.update(phases)
            verdict = f"differ or are left over: {', '.join(differ)}" if differ else "equal"
            print(f"trial {trial}: killed {len(phases)} times ({', '.join(phases)}): {verdict}", flush=True)
    counts = {f"while {phase}": kills[phase] for phase in PHASES}
    print(json.dumps({"trials": options.trials, "equal": equal, "kills": kills.total()} | counts))
    return 0 if equal == options.trials else 1


if __name__ == "__main__":
    sys.exit(main())
