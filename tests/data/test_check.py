"""The check of every picture before a run."""

from __future__ import annotations

import pytest
from PIL import Image

from tracer.data.check import AT_ONCE, check_pictures
from tracer.data.dali import decode
from tracer.data.index import read_index
from tracer.errors import UserError


def test_a_damaged_picture_is_named_and_a_set_that_passed_is_remembered(drawings, write_csv, tmp_path):
    good = read_index(drawings / "test.csv")
    check_pictures(good, tmp_path / "cache", workers=2)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.images[0].read_bytes()[:60])
    bad = read_index(write_csv("bad.csv", ["image", "label"], [[str(cut), "x"]]))
    with pytest.raises(UserError, match=r"1 of 1 pictures of 'bad' cannot be decoded, first '.*cut.png'"):
        check_pictures(bad, tmp_path / "cache", workers=2)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_set_that_passed_is_not_decoded_again(drawings, tmp_path, monkeypatch):
    index = read_index(drawings / "test.csv")
    check_pictures(index, tmp_path, workers=2)
    monkeypatch.setattr("tracer.data.check.read_picture", lambda path: pytest.fail(f"{path} was read again"))
    check_pictures(index, tmp_path, workers=2)


def test_a_format_that_dali_does_not_decode_is_named(write_csv, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", format="GIF")
    index = read_index(write_csv("a.csv", ["image", "label"], [["a.png", "x"]]))
    with pytest.raises(
        UserError,
        match=r"a.png' \(GIF is not supported, use BMP, JPEG, .*, WEBP\)",
    ):
        check_pictures(index, tmp_path / "cache", workers=1)


def test_one_pipeline_decodes_many_batches_and_damage_in_a_late_one_is_found(
    write_csv, tmp_path, monkeypatch
):
    """The pictures are read batch by batch, and the set has more pictures than a batch."""
    batches: list[int] = []

    def count(files, *rest):
        return decode((batches.append(len(batch)) or batch for batch in files), *rest)

    monkeypatch.setattr("tracer.data.check.decode", count)
    names = [f"{number}.png" for number in range(2 * AT_ONCE + 3)]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    index = read_index(write_csv("a.csv", ["image", "label"], [[name, "x"] for name in names]))
    check_pictures(index, tmp_path / "cache", workers=1)
    assert batches == [AT_ONCE, AT_ONCE, 3]
    last = tmp_path / names[-1]
    last.write_bytes(last.read_bytes()[:60])
    with pytest.raises(UserError, match=rf"1 of {len(names)} pictures .*{names[-1]}"):
        check_pictures(read_index(tmp_path / "a.csv"), tmp_path / "cache", workers=1)
