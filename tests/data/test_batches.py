"""Training batches: each picture with a caption and the label of its own, from any batch on."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from picture_sets import LOADERS

from tracer.data import batches
from tracer.data.batches import TrainingBatches
from tracer.data.build import read_index
from tracer.data.config import LoadingSettings
from tracer.data.index import Index
from tracer.errors import UserError


def test_each_picture_comes_with_one_of_its_captions_and_its_label(drawings, clip):
    index = read_index(drawings / "train.csv")

    def batches(seed, workers=2):
        options = {"batch_size": 8, "steps": 6, "crop_scale": 0.9, "workers": workers}
        return list(TrainingBatches(index, clip, seed=seed, **options))

    first = batches(seed=1)
    assert len(first) == 6
    used = set()
    for batch in first:
        assert batch.image.shape == (8, 3, 32, 32)
        assert batch.image.dtype == torch.float32
        for text, label, row in zip(batch.text, batch.label, batch.index, strict=True):
            captions = clip.tokenizer(index.captions[row])
            choice = [bool((c == text).all()) for c in captions]
            assert any(choice)
            used.add(choice.index(True))
            assert index.classes[label] == index.labels[row]
    assert used == {0, 1}
    for a, b in zip(first, batches(seed=1, workers=1), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(astuple(a), astuple(b), strict=True))
    assert not torch.equal(first[0].index, batches(seed=2)[0].index)


def test_too_few_pictures_for_a_batch_are_named(drawings, clip):
    index = read_index(drawings / "test.csv")
    with pytest.raises(UserError, match="holds 16 pictures, fewer than one batch of 32: lower --batch_size"):
        TrainingBatches(index, clip, batch_size=32, steps=1, seed=0, crop_scale=0.9)


@pytest.mark.parametrize("first", [1, 5, 7, 11, 12])
@pytest.mark.parametrize("loader", LOADERS)
def test_batches_go_on_from_any_of_them(drawings, clip, monkeypatch, first, loader):
    """The pictures, crops, captions and labels are the same, and files of earlier batches are not read."""
    index = read_index(drawings / "train.csv")
    options = {"batch_size": 8, "steps": 12, "seed": 1, "crop_scale": 0.5}
    options["loading"] = LoadingSettings(loader=loader)
    whole, read = list(TrainingBatches(index, clip, **options)), []

    def load(self: Index, row: int) -> bytes:
        read.append(row)
        return content(self, row)

    content = Index.read
    monkeypatch.setattr(Index, "read", load)
    rest = TrainingBatches(index, clip, first=first, **options)
    assert len(rest) == 12 - first
    rest = list(rest)
    assert len(rest) == 12 - first
    for a, b in zip(whole[first:], rest, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(astuple(a), astuple(b), strict=True))
    assert len(read) == 8 * (12 - first)


def test_a_picture_without_a_label_is_a_positive_of_itself_alone(drawings, clip, write_csv):
    """Half-labelled data trains; two rows of one file are one picture, and equal labels still share a number."""
    files = [str(path) for path in sorted(drawings.glob("*.png"))[:5]]
    labels = ["x", "x", "", "", ""]
    rows = [[file, label, "a drawing"] for file, label in zip(files, labels, strict=True)]
    index = read_index(
        write_csv("half.csv", ["image", "label", "captions"], [*rows, [files[4], "", "a line"]])
    )
    assert len(index) == 5
    assert index.captions[4] == ["a drawing", "a line"]
    (batch,) = TrainingBatches(index, clip, batch_size=5, steps=1, seed=0, crop_scale=0.9)
    number = dict(zip(batch.index.tolist(), batch.label.tolist(), strict=True))
    assert number[0] == number[1] == 0
    assert len({number[i] for i in (0, 2, 3, 4)}) == 4


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_slices_of_all_ranks_are_the_batches_of_one_process(drawings, clip, world_size):
    """Pictures, crops, captions, labels and order, across the ends of epochs."""
    index = read_index(drawings / "train.csv")
    options = {"batch_size": 12, "steps": 5, "first": 1, "seed": 3, "crop_scale": 0.5, "workers": 1}
    ranks = [
        TrainingBatches(index, clip, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    for whole, *slices in zip(TrainingBatches(index, clip, **options), *ranks, strict=True):
        assert {len(part.index) for part in slices} == {12 // world_size}
        joined = [torch.cat(parts) for parts in zip(*map(astuple, slices), strict=True)]
        assert all(torch.equal(x, y) for x, y in zip(joined, astuple(whole), strict=True))


def test_slices_of_different_sizes_are_refused(drawings, clip):
    index = read_index(drawings / "train.csv")
    with pytest.raises(ValueError, match="batch_size is 12: it must be divisible by world_size 5"):
        TrainingBatches(index, clip, batch_size=12, steps=1, seed=0, crop_scale=0.9, world_size=5)


class Clock:
    """A clock that only the test moves."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(batches, "time", self)

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("world_size", [1, 4])
def test_long_waiting_is_said_once_an_epoch_and_at_the_end(drawings, clip, monkeypatch, capsys, world_size):
    """32 pictures are 4 batches of all ranks together, whatever the share of one rank is."""
    clock, index = Clock(monkeypatch), read_index(drawings / "train.csv")
    batches.note.cache_clear()  # another test may have waited as long

    def load(plan):
        for number in plan.numbers:  # the first wait, and those of the second epoch, are no news
            clock.now += 50 if number == 0 else 0.2 if 4 <= number < 8 else 3
            rows = torch.from_numpy(plan.work(number).rows)
            yield torch.zeros(len(rows), 3, 32, 32), rows

    monkeypatch.setattr(batches, "load", load)
    options = {"batch_size": 8, "steps": 10, "seed": 1, "crop_scale": 0.9}
    for _ in TrainingBatches(index, clip, rank=2 if world_size > 2 else 0, world_size=world_size, **options):
        clock.now += 6
    lines = [line.partition("note: ")[2] for line in capsys.readouterr().err.splitlines()]
    rank = "" if world_size == 1 else "rank 2: "
    assert lines == [
        f"{rank}training waited for pictures {share} of epoch {epoch}: give more --workers, smaller files, or "
        "--jpeg scaled"
        for share, epoch in (("27%", 1), ("50%", 3))
    ]
