"""From samples to batches: in an order, and with an augmentation, that are functions of seed and epoch.

Nothing here depends on what ran before, on the number of worker processes or on the global random state,
so training can stop after any batch and go on bit for bit: `batches.sampler.seek(epoch, batch)`.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors

from kamal_lib.data.transforms import Transform, seeded, stream
from kamal_lib.sample import Sample

Batch = dict[str, Any]
"""Plain tensors with a leading batch axis; "boxes" and "box_labels" are lists with one tensor per image."""


class Preloaded(Dataset[Sample]):
    """A data set decoded, resized and kept in memory: image and labels as bytes, the rest as it comes.

    The image is rounded to 1/255.
    """

    def __init__(self, dataset: Dataset[Sample], transform: Transform | None = None) -> None:
        """Read every sample once through `transform` (no draws: `eval_transform`) and print one line."""
        start, count = time.perf_counter(), len(cast(Sequence[Sample], dataset))
        self._samples: list[dict[str, Any]] = []
        for index in range(count):
            sample = dataset[index] if transform is None else transform(dataset[index])
            self._samples.append({key: _packed(cast(Tensor, entry)) for key, entry in sample.items()})
        seconds = time.perf_counter() - start
        print(f"preloaded: {count} samples of {type(dataset).__name__} in {seconds:.1f} s")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        sample = dict(self._samples[index])
        sample["image"] = tv_tensors.Image(sample["image"].as_subclass(Tensor) / 255)
        if "labels" in sample:
            sample["labels"] = tv_tensors.Mask(sample["labels"].as_subclass(Tensor).long())
        return cast(Sample, sample)


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index): the order is a function of (seed, epoch), one share for each process.

    Process `rank` of `num_replicas` takes every num_replicas-th image of the common order, so together their
    batches number b hold the images of batch b of one process with num_replicas times the batch size. When
    shuffled (training), the first images fill up the order so that all processes take equally many steps.
    In order (evaluation), no image is repeated, and the shares may differ in length by one.

    The epoch is set by `seek`, deliberately not called `set_epoch`: Lightning Fabric calls a method of
    that name before every pass with a count of its own, which starts at 0 again when training is resumed.
    Under Fabric pass `use_distributed_sampler=False`: the sharing is done here.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        """Raises ValueError for a rank outside 0..num_replicas-1 or fewer images than processes."""
        if not 0 <= rank < num_replicas:
            raise ValueError(f"expected a rank from 0 to {num_replicas - 1}, but got {rank}")
        if length < num_replicas:
            raise ValueError(f"expected an image for each of {num_replicas} processes, but got {length}")
        self.length, self.batch_size, self.shuffle, self.seed = length, batch_size, shuffle, seed
        self.num_replicas, self.rank = num_replicas, rank
        self.epoch, self.batch = 0, 0

    def seek(self, epoch: int, batch: int = 0) -> None:
        """Make the next pass that of `epoch`, from batch number `batch` on; earlier ones are not loaded."""
        if epoch < 0 or batch < 0:
            raise ValueError(f"expected epoch and batch of at least 0, but got {epoch} and {batch}")
        self.epoch, self.batch = epoch, batch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = list(range(self.length))
        if self.shuffle:
            generator = torch.Generator().manual_seed(stream(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
            order += order[: -self.length % self.num_replicas]
        share = order[self.rank :: self.num_replicas]
        # the epoch is fixed when a pass begins, whatever is sought while it runs
        return iter([(self.epoch, index) for index in share[self.batch * self.batch_size :]])

    def __len__(self) -> int:
        """Images left in this pass for this process."""
        total = self.length + (-self.length % self.num_replicas if self.shuffle else 0)
        return max(0, len(range(self.rank, total, self.num_replicas)) - self.batch * self.batch_size)


def loader(
    dataset: Dataset[Sample],
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    transform: Transform | None = None,
    workers: int = 0,
    drop_last: bool = False,
    num_replicas: int = 1,
    rank: int = 0,
) -> DataLoader[Batch]:
    """Batches of a data set, to be had again bit for bit from `seed`, epoch and number of the batch.

    Set the epoch by `.sampler.seek(epoch, batch=0)`; without it every pass is that of epoch 0. `batch_size`
    is that of one process. `len` counts the batches left after `seek`. The last batch may be small: every
    image is seen, unless `drop_last`. Augmentation by `transform` is a function of (seed, epoch, index), in
    any worker process.
    """
    length = len(cast(Sequence[Sample], dataset))
    return DataLoader(
        cast(Dataset[Batch], _Augmented(dataset, transform, seed)),
        batch_size=batch_size,
        sampler=EpochSampler(
            length,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
        ),
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=drop_last,
        collate_fn=collate,
        # DataLoader draws a number at every pass: not from the global state, which a resumed run has restored
        generator=torch.Generator(),
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack every key into a plain tensor, "boxes" and "box_labels" into lists.

    Raises ValueError if the samples have different keys.
    """
    keys = samples[0].keys()
    for sample in samples:
        if sample.keys() != keys:
            raise ValueError(
                f"expected all samples of a batch to have the same keys, but got {sorted(keys)} and "
                f"{sorted(sample)}: do not mix labelled and unlabelled images in one data set"
            )
    batch: Batch = {}
    for key in keys:
        plain = [cast(Tensor, sample[key]).as_subclass(Tensor) for sample in samples]
        batch[key] = plain if key in ("boxes", "box_labels") else torch.stack(plain)
    return batch


class _Augmented(Dataset[Sample]):
    """Looks (epoch, index) up and augments; at module level, so that worker processes can receive it."""

    def __init__(self, dataset: Dataset[Sample], transform: Transform | None, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        sample = self.dataset[index]
        if self.transform is None:
            return sample
        return seeded(self.transform, sample, seed=self.seed, epoch=epoch, index=index)


def _packed(entry: Tensor) -> Tensor:
    if isinstance(entry, tv_tensors.Image):
        return tv_tensors.Image((entry * 255).round().to(torch.uint8))
    if isinstance(entry, tv_tensors.Mask):
        return tv_tensors.Mask(entry.to(torch.uint8))
    return entry
