"""The command ``index``: what it says about a folder, a table and shards, and about what is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest
import spoiled_sets
from PIL import Image

from tracer.cli import main


@pytest.fixture
def index(tmp_path, capfd):
    """Run ``tracer index``; return what it prints, line by line."""

    def run(data, *options: str) -> list[str]:
        assert main(["index", str(data), "--cache", str(tmp_path / "cache"), *options]) == 0
        return capfd.readouterr().out.splitlines()

    return run


def test_counts_formats_sizes_and_faults_are_printed(tmp_path, index):
    turned = Image.Exif()
    turned[0x0112] = 6
    picture = Image.new("RGB", (40, 30), "red")
    picture.save(tmp_path / "a.jpg", exif=turned)
    picture.save(tmp_path / "b.webp")
    Image.fromarray(np.full((30, 40), 300, np.uint16)).save(tmp_path / "c.png")
    (tmp_path / "d.png").write_text("<html>")
    (tmp_path / "classes.json").write_text('{"x": "crane", "y": "crane"}')
    (tmp_path / "set.csv").write_text(
        "image,label,captions\na.jpg,x,one|two\nb.webp,y,one\nc.png,x,\nd.png,x,a lost text|one\ngone.png,y,\n"
    )
    size = sum((tmp_path / name).stat().st_size for name in ("a.jpg", "b.webp", "c.png"))
    assert index(tmp_path / "set.csv") == [
        f"set: 3 pictures in 3 files, {size / 1e6:.1f} MB",
        "classes: 2, 3 pictures with a label",
        "captions: 3 of 2 pictures, 2 distinct; made from 1 template for the others",
        "formats: 1 JPEG, 1 PNG, 1 WEBP",
        "with an EXIF rotation: 1; of 16 bits a channel: 1",
        "faults: 2 of 5",
        "  1 × its content is not a picture",
        "  1 × it does not exist",
        f"  '{tmp_path}/d.png': its content is not a picture",
        f"  '{tmp_path}/gone.png': it does not exist",
    ]
    for name in ("x", "y"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        picture.save(tmp_path / "folder" / name / "a.png")
    (tmp_path / "folder/classes.json").write_text('{"x": "crane", "y": "crane"}')
    lines = index(tmp_path / "folder")
    assert "classes: 2, 2 pictures with a label; names of several classes: crane" in lines
    assert "captions: none; made from 1 template" in lines
    (tmp_path / "folder/zeroshot_classification_templates.txt").write_text("a {}\nthe {}\n")
    assert "captions: none; made from 2 templates" in index(tmp_path / "folder")
    (tmp_path / "all.csv").write_text("image,captions\na.jpg,one|two\n")
    assert "captions: 2 of 1 picture, 2 distinct" in index(tmp_path / "all.csv")


def test_decoding_everything_finds_what_the_first_sight_does_not(tmp_path, index):
    """Many faults are counted by their reason, and the first ones named."""
    sources = spoiled_sets.write(tmp_path)
    lines = index(sources["folder"])
    assert lines[0].startswith("folder: 294 pictures in 294 files, ")
    assert "faults: 6 of 300" in lines
    decoded = index(sources["folder"], "--decode")
    assert "faults: 7 of 300" in decoded
    assert not [line for line in lines if "0249.jpg" in line]
    assert [line for line in decoded if "0249.jpg" in line]
    shards = index(sources["shards"])
    assert "  1 × the shard is cut off in it" in shards
    assert shards[3] == lines[3] == "formats: 30 BMP, 30 GIF, 174 JPEG, 31 PNG, 29 WEBP"
