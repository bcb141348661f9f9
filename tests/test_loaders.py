"""Loaders: order and augmentation are functions of seed, epoch and index, and every image is seen."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors

from kamal_lib.data.loaders import Batch, EpochSampler, Preloaded, collate, loader
from kamal_lib.data.transforms import eval_transform, train_transform
from kamal_lib.sample import VOID, Depth, Sample


class Numbered(Dataset[Sample]):
    """Image k holds a gradient that starts at k / 100, so that order and flips can be read from it."""

    def __init__(self, count: int) -> None:
        self.count, self.asked = count, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        self.asked.append(index)
        ramp = torch.linspace(0, 0.005, 8).expand(6, 8)
        labels = torch.full((6, 8), index)
        labels[0, 0] = VOID
        return Sample(
            image=tv_tensors.Image((index / 100 + ramp).expand(3, 6, 8).clone()),
            labels=tv_tensors.Mask(labels),
            depth=Depth(1 + ramp * 10),
        )


def passes(batches: DataLoader[Batch], epoch: int, batch: int = 0) -> list[list[int]]:
    """Numbers of the images in each batch of a pass."""
    batches.sampler.seek(epoch, batch)  # pyright: ignore[reportAttributeAccessIssue]
    return [b["labels"][:, 1, 1].tolist() for b in batches]


def equal(one: Sequence[Batch], other: Sequence[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(one, other, strict=True)
    )


def test_order_depends_on_seed_and_epoch_only() -> None:
    torch.manual_seed(1)
    first = passes(loader(Numbered(23), batch_size=5, shuffle=True, seed=7), 3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = loader(Numbered(23), batch_size=5, shuffle=True, seed=7)
    assert passes(again, 0) != first
    assert passes(again, 3) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert passes(loader(Numbered(23), batch_size=5, shuffle=True, seed=8), 3) != first


def test_every_image_is_seen_and_in_order_when_not_shuffled() -> None:
    batches = loader(Numbered(23), batch_size=5, shuffle=False, seed=0)
    assert passes(batches, 0) == [list(range(k, min(k + 5, 23))) for k in range(0, 23, 5)]
    assert len(batches) == 5
    shuffled = passes(loader(Numbered(23), batch_size=5, shuffle=True, seed=0), 0)
    assert sorted(itertools.chain(*shuffled)) == list(range(23))
    dropped = passes(loader(Numbered(23), batch_size=5, shuffle=True, seed=0, drop_last=True), 0)
    assert dropped == shuffled[:4]


def test_middle_of_an_epoch_gives_the_remaining_batches_and_loads_no_other() -> None:
    transform = train_transform((6, 8))
    batches = loader(Numbered(23), batch_size=5, shuffle=True, seed=1, transform=transform)
    batches.sampler.seek(2)  # pyright: ignore[reportAttributeAccessIssue]
    whole = list(batches)

    dataset = Numbered(23)
    resumed = loader(dataset, batch_size=5, shuffle=True, seed=1, transform=transform)
    resumed.sampler.seek(2, 3)  # pyright: ignore[reportAttributeAccessIssue]
    assert len(resumed) == 2
    assert equal(list(resumed), whole[3:])
    assert len(dataset.asked) == 23 - 3 * 5
    assert passes(resumed, 2, 5) == []
    assert len(passes(resumed, 3)) == 5  # `seek` without a batch starts at the beginning again


def test_augmentation_is_the_same_in_worker_processes_and_changes_by_epoch() -> None:
    transform = train_transform((6, 8))
    results = []
    for workers in (0, 2):
        batches = loader(
            Numbered(24), batch_size=8, shuffle=False, seed=5, transform=transform, workers=workers
        )
        for epoch in (1, 2):
            batches.sampler.seek(epoch)  # pyright: ignore[reportAttributeAccessIssue]
            results.append(list(batches))
    assert equal(results[0], results[2])
    assert equal(results[1], results[3])
    flipped = [torch.cat([b["image"][:, 0, 0, 0] > b["image"][:, 0, 0, -1] for b in r]) for r in results]
    assert not torch.equal(flipped[0], flipped[1])  # other images are flipped in the other epoch
    assert 4 < flipped[0].sum() < 20


def test_an_image_is_augmented_alike_wherever_it_comes_in_the_order() -> None:
    transform = train_transform((6, 8))
    images = []
    for shuffle, batch_size in ((False, 4), (True, 5)):
        batches = loader(Numbered(20), batch_size=batch_size, shuffle=shuffle, seed=2, transform=transform)
        stacked = {key: torch.cat([b[key] for b in batches]) for key in ("image", "labels")}
        images.append(stacked["image"][stacked["labels"][:, 1, 1].argsort()])
    assert torch.equal(images[0], images[1])


@pytest.mark.parametrize("length", [24, 23, 4])
@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_evaluate_every_image_once(length: int, replicas: int) -> None:
    shares = []
    for rank in range(replicas):
        batches = loader(
            Numbered(length), batch_size=4, shuffle=False, seed=0, num_replicas=replicas, rank=rank
        )
        shares.append(list(itertools.chain(*passes(batches, 0))))
        assert len(batches.sampler) == len(shares[-1])  # pyright: ignore[reportArgumentType]
    assert sorted(itertools.chain(*shares)) == list(range(length))


@pytest.mark.parametrize("length", [24, 23])
def test_replicas_train_on_the_batches_of_one_process(length: int) -> None:
    alone = passes(loader(Numbered(length), batch_size=8, shuffle=True, seed=4), 6)
    shares = [
        passes(loader(Numbered(length), batch_size=4, shuffle=True, seed=4, num_replicas=2, rank=rank), 6)
        for rank in range(2)
    ]
    assert [len(batch) for batch in shares[0]] == [len(batch) for batch in shares[1]]
    together = [sorted(a + b) for a, b in zip(*shares, strict=True)]
    assert together[:-1] == [sorted(batch) for batch in alone[:-1]]
    repeated = alone[0][: length % 2]  # one image fills the odd order up
    assert together[-1] == sorted(alone[-1] + repeated)


def test_fabric_does_not_disturb_the_epoch() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    plain = passes(loader(Numbered(20), batch_size=4, shuffle=True, seed=3), 5, 2)
    batches = loader(Numbered(20), batch_size=4, shuffle=True, seed=3)
    wrapped = fabric.setup_dataloaders(batches, use_distributed_sampler=False)
    assert passes(wrapped, 5, 2) == plain
    assert passes(wrapped, 5, 2) == plain


def test_seek_during_a_pass_concerns_the_next() -> None:
    batches = loader(Numbered(12), batch_size=4, shuffle=True, seed=0)
    expected = passes(batches, 0)
    batches.sampler.seek(0)  # pyright: ignore[reportAttributeAccessIssue]
    running = iter(batches)
    got = [next(running)["labels"][:, 1, 1].tolist()]
    batches.sampler.seek(1)  # pyright: ignore[reportAttributeAccessIssue]
    got += [b["labels"][:, 1, 1].tolist() for b in running]
    assert got == expected


def test_collate_gives_plain_tensors_and_lists_of_boxes() -> None:
    samples = []
    for count in (2, 3):
        boxes = tv_tensors.BoundingBoxes(torch.rand(count, 4), format="XYXY", canvas_size=(6, 8))  # pyright: ignore
        samples.append(Numbered(3)[count - 1] | {"boxes": boxes, "box_labels": torch.arange(count)})
    batch = collate(samples)
    assert {key: tuple(batch[key].shape) for key in ("image", "labels", "depth")} == {
        "image": (2, 3, 6, 8),
        "labels": (2, 6, 8),
        "depth": (2, 6, 8),
    }
    assert all(type(batch[key]) is Tensor for key in ("image", "labels", "depth"))
    assert [len(boxes) for boxes in batch["boxes"]] == [2, 3]
    assert all(type(boxes) is Tensor for boxes in batch["boxes"] + batch["box_labels"])


def test_collate_refuses_samples_with_different_keys() -> None:
    labelled = Numbered(1)[0]
    with pytest.raises(ValueError, match=r"got \['depth', 'image', 'labels'\] and \['image'\]"):
        collate([labelled, Sample(image=labelled["image"])])


def test_preloaded_reads_once_and_keeps_the_sample(capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Numbered(5)
    kept = Preloaded(dataset, eval_transform((3, 4)))
    assert capsys.readouterr().out.startswith("preloaded: 5 samples of Numbered in ")
    for index in (3, 3, 4):
        sample, expected = kept[index], eval_transform((3, 4))(Numbered(5)[index])
        assert {key: (type(e), e.dtype) for key, e in sample.items()} == {
            key: (type(e), e.dtype) for key, e in expected.items()
        }
        torch.testing.assert_close(
            sample["image"].as_subclass(Tensor),
            expected["image"].as_subclass(Tensor),
            atol=0.5 / 255 + 1e-6,
            rtol=0,
        )
        assert torch.equal(sample["labels"], expected["labels"])
        assert torch.equal(sample["depth"], expected["depth"])
    assert dataset.asked == [0, 1, 2, 3, 4]
    assert len(kept) == 5
    assert Preloaded(dataset)[1]["labels"][0, :2].tolist() == [VOID, 1]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="a rank from 0 to 1, but got 2"):
        EpochSampler(4, batch_size=2, shuffle=True, seed=0, num_replicas=2, rank=2)
    with pytest.raises(ValueError, match="an image for each of 3 processes, but got 2"):
        EpochSampler(2, batch_size=2, shuffle=True, seed=0, num_replicas=3)
    with pytest.raises(ValueError, match="at least 0, but got 1 and -1"):
        EpochSampler(4, batch_size=2, shuffle=True, seed=0).seek(1, -1)
