"""The processes that `torchrun` started for one training, and how the first tells the others what to do."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous


def processes() -> tuple[int, int]:
    """How many processes `torchrun` started, and which of them this one is; (1, 0) without it."""
    return int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


class Line:
    """On it process 0 says to the others, word by word, what is done about one topic in one call.

    The words lie in the key-value store in which processes under `torchrun` meet: so they are never mixed up
    with the messages of a training, and waiting may take as long as it takes. Alone, nothing is said.
    """

    def __init__(self, topic: str):
        self.count, self.rank = processes()
        self.words = 0
        if self.count > 1:
            self.place = f"{topic}/{next(_calls(topic))}"
            self.failed = f"{self.place}/failed"

    def say(self, word: str) -> None:
        """The next word of process 0."""
        if self.count > 1:
            _meeting_place().set(f"{self.place}/{self.words}", word)
            self.words += 1

    @contextmanager
    def open(self) -> Iterator[None]:
        """What process 0 does in it, and if it fails, the others hear that too."""
        try:
            yield
        except BaseException as error:
            if self.count > 1:
                _meeting_place().set(self.failed, f"process 0 failed: {type(error).__name__}: {error}")
            raise

    def failure(self) -> str:
        """Why process 0 failed, as far as it has said so."""
        return _meeting_place().get(self.failed).decode() if _meeting_place().check([self.failed]) else ""

    def hear(self) -> str:
        """Waits for the next word of process 0. Raises RuntimeError if it failed instead."""
        word = f"{self.place}/{self.words}"
        self.words += 1
        while not _meeting_place().check([word]):
            if reason := self.failure():
                raise RuntimeError(reason)
            time.sleep(0.02)
        return _meeting_place().get(word).decode()


@cache
def _calls(topic: str) -> Iterator[int]:
    """Numbers the lines on a topic, alike in every process, so that none hears an earlier one's words."""
    return count()


@cache
def _meeting_place() -> Store:
    store, _, _ = next(rendezvous("env://"))
    return PrefixStore("kamal", store)
