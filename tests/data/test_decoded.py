"""Evaluation pictures that stay decoded."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from picture_sets import loaded
from PIL import Image

from tracer.data.build import read_index
from tracer.data.decoded import DecodedPictures
from tracer.data.loader import load
from tracer.data.order import in_order


@pytest.fixture
def pipelines(monkeypatch) -> list[str]:
    """Names of the sets that were decoded."""
    names = []

    def counted(plan):
        names.append(plan.index.name)
        return load(plan)

    monkeypatch.setattr("tracer.data.decoded.load", counted)
    return names


def test_small_sets_stay_decoded_until_a_picture_changes(drawings, clip, tmp_path, pipelines):
    data = shutil.copytree(drawings, tmp_path / "drawings")
    room = 16 * 3 * clip.picture_format.size**2 * 4  # for the 16 pictures of the test set, not for 32 more
    decoded = DecodedPictures(limit=room)

    def images(name: str) -> torch.Tensor:
        index = read_index(data / f"{name}.csv")
        batches = list(decoded.batches(index, clip.picture_format, 7, 2, torch.device("cpu")))
        for (_, rows), expected in zip(batches, in_order(len(index), 7), strict=True):
            assert rows.tolist() == expected.tolist()
        got = torch.cat([pictures for pictures, _ in batches])
        assert torch.equal(got, loaded(index, clip.picture_format, "torch"))
        return got

    first = images("test")
    images("train")
    assert pipelines == ["test", "train"]
    images("test")
    images("train")
    assert pipelines == ["test", "train", "train"]
    Image.new("RGB", (8, 8)).save(read_index(data / "test.csv").images[0])
    assert not torch.equal(images("test"), first)
    assert pipelines[3:] == ["test"]


def test_another_picture_format_is_decoded_anew(drawings, clip, pipelines):
    index, decoded = read_index(drawings / "test.csv"), DecodedPictures()
    for wanted in (
        clip.picture_format,
        dataclasses.replace(clip.picture_format, size=16),
        clip.picture_format,
    ):
        ((images, _),) = decoded.batches(index, wanted, 16, 2, torch.device("cpu"))
        assert images.shape == (16, 3, wanted.size, wanted.size)
    assert pipelines == ["test", "test"]
