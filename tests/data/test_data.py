"""The index, its bad inputs, and what the DALI pipeline hands to the model."""

from __future__ import annotations

import csv
from dataclasses import astuple
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from nvidia.dali import pipeline_def
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop

from tracer.data.batches import TrainingBatches
from tracer.data.check import check_pictures
from tracer.data.dali import Pictures, _window, fn, types
from tracer.data.index import read_index
from tracer.data.order import Crops, in_order, random_crops, shuffled
from tracer.errors import UserError
from tracer.models.clip import load_clip


@pytest.fixture(scope="module")
def clip(tiny_config):
    return load_clip(str(tiny_config), None)


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_index_reads_csv_and_folder_alike(drawings, tmp_path):
    index = read_index(drawings / "train.csv")
    assert len(index) == 32
    assert index.classes == ["bar", "circle", "cross", "square"]
    assert index.captions[0] == ["a circle", "the drawing of a circle"]
    for image, label in zip(index.images, index.labels, strict=True):
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / image.name).write_bytes(image.read_bytes())
    folder = read_index(tmp_path)
    assert sorted(zip(folder.labels, [p.name for p in folder.images], strict=True)) == sorted(
        zip(index.labels, [p.name for p in index.images], strict=True)
    )
    assert folder.captions[0] == ["a photo of a bar"]


def test_labels_or_captions_may_be_absent(drawings, tmp_path):
    file = next(drawings.glob("*.png"))
    only_label = read_index(write_csv(tmp_path / "a.csv", ["image", "label"], [[str(file), "red_fox"]]))
    assert only_label.captions == [["a photo of a red fox"]]
    only_text = read_index(write_csv(tmp_path / "b.csv", ["image", "captions"], [[str(file), "x|y"]]))
    assert only_text.labels == [str(file)]


@pytest.mark.parametrize(
    ("header", "rows", "says"),
    [
        (
            ["image", "category"],
            [["a.png", "x"]],
            "it needs 'image' and at least one of 'label' and 'captions'",
        ),
        (["picture", "label"], [["a.png", "x"]], "has the columns label, picture"),
        (["image", "label"], [], "holds no pictures"),
        (["image", "label"], [["nowhere.png", "x"]], "names 1 pictures that do not exist"),
        (["image", "label"], [["", "x"]], "line 2: needs a picture"),
    ],
)
def test_bad_csv_is_named_in_one_line(tmp_path, header, rows, says):
    with pytest.raises(UserError, match=says) as caught:
        read_index(write_csv(tmp_path / "bad.csv", header, rows))
    assert "\n" not in str(caught.value)
    assert "bad.csv" in str(caught.value)


def test_csv_as_excel_writes_it_is_read(drawings, tmp_path):
    file = tmp_path / "excel.csv"
    file.write_text(f"image,label\n{next(drawings.glob('*.png'))},größe\n", encoding="utf-8-sig")
    assert read_index(file).labels == ["größe"]


@pytest.mark.parametrize(
    "content",
    ["image,label\na.png,größe\n".encode("latin-1"), b"image,label\na.png," + b"x" * 200_000],
    ids=["another encoding", "a field past csv's limit"],
)
def test_a_file_that_is_no_csv_is_named(tmp_path, content):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"bad.csv' is no CSV in UTF-8: .*save it as one"):
        read_index(tmp_path / "bad.csv")


def test_a_picture_as_data_is_named(drawings):
    with pytest.raises(UserError, match=r"'.*png' is no CSV in UTF-8"):
        read_index(next(drawings.glob("*.png")))


def test_missing_source_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_index(tmp_path / "nothing.csv")


def test_damaged_picture_is_named_and_whole_ones_are_remembered(drawings, tmp_path):
    good = read_index(drawings / "test.csv")
    check_pictures(good, tmp_path / "cache", workers=2)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.images[0].read_bytes()[:60])
    bad = read_index(write_csv(tmp_path / "bad.csv", ["image", "label"], [[str(cut), "x"]]))
    with pytest.raises(UserError, match=r"1 of 1 pictures of 'bad' cannot be decoded, first '.*cut.png'"):
        check_pictures(bad, tmp_path / "cache", workers=2)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_every_epoch_is_a_new_whole_permutation():
    batches = list(shuffled(size=10, batch_size=4, steps=5, seed=3))
    seen = np.concatenate(batches)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    again = np.concatenate(list(shuffled(size=10, batch_size=4, steps=5, seed=3)))
    other = np.concatenate(list(shuffled(size=10, batch_size=4, steps=5, seed=4)))
    assert (seen == again).all()
    assert (seen != other).any()


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 7])
def test_order_goes_on_from_any_batch(first):
    whole = list(shuffled(size=10, batch_size=4, steps=8, seed=3))
    rest = list(shuffled(size=10, batch_size=4, steps=8, seed=3, first=first))
    assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in whole[first:]]


def test_evaluation_pictures_are_what_pil_gives(drawings, clip):
    """Same pixels as open_clip's own transform, up to rounding; every picture once, in order."""
    index = read_index(drawings / "test.csv")
    images, rows = zip(*Pictures(index, clip, in_order(len(index), 7), 7), strict=True)
    assert torch.cat(rows).tolist() == list(range(len(index)))
    got = torch.cat(images)
    mean, std = torch.tensor(clip.mean).view(3, 1, 1), torch.tensor(clip.std).view(3, 1, 1)
    for n, path in enumerate(index.images):
        pil = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        want = (torch.from_numpy(np.array(pil)).permute(2, 0, 1) / 255 - mean) / std
        assert (got[n] - want).abs().mean() * 255 * 0.27 < 2


@pytest.mark.parametrize("size", [(64, 48), (48, 64)], ids=str)
def test_an_oblong_picture_is_evaluated_as_open_clip_does(tmp_path, clip, size):
    """Its longer side becomes 42.67 pixels: 42, not 43, or the centre is another one."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    index = read_index(write_csv(tmp_path / "a.csv", ["image", "label"], [["a.png", "x"]]))
    ((images, _),) = Pictures(index, clip, in_order(1, 1), 1)
    want = open_clip.image_transform(32, False, clip.mean, clip.std)(Image.open(tmp_path / "a.png"))
    assert (images[0] - want).abs().mean() * 255 * 0.27 < 1


def test_training_batches_pair_each_picture_with_its_own_caption_and_label(drawings, clip):
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
def test_batches_go_on_from_any_of_them(drawings, clip, monkeypatch, first):
    """Same pictures, crops, captions and labels; what came before is not even read."""
    index = read_index(drawings / "train.csv")
    options = {"batch_size": 8, "steps": 12, "seed": 1, "crop_scale": 0.5}
    whole, read = list(TrainingBatches(index, clip, **options)), []
    monkeypatch.setattr("tracer.data.dali.np.fromfile", lambda path, _: read.append(path) or load(path))
    rest = TrainingBatches(index, clip, first=first, **options)
    assert len(rest) == 12 - first
    rest = list(rest)
    assert len(rest) == 12 - first
    for a, b in zip(whole[first:], rest, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(astuple(a), astuple(b), strict=True))
    assert len(read) == 8 * (12 - first)


def load(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), np.uint8)


def windows(pictures: list[np.ndarray], crops: Crops) -> tuple[np.ndarray, np.ndarray]:
    """Corners [n, 2] of the crops of encoded pictures."""

    @pipeline_def(batch_size=len(pictures), num_threads=1, device_id=None)
    def pipeline():
        encoded = fn.external_source(lambda: pictures, dtype=types.UINT8, ndim=1)
        sides = fn.external_source(lambda: crops.sides, dtype=types.FLOAT, ndim=2)
        place = fn.external_source(lambda: crops.place, dtype=types.FLOAT, ndim=1)
        return _window(encoded, sides, place)

    start, end = pipeline().run()
    return start.as_array(), end.as_array()


@pytest.mark.parametrize("size", [(500, 500), (3000, 2250), (300, 900), (900, 300)], ids=str)
@pytest.mark.parametrize("smallest", [0.9, 0.1])
def test_crops_are_distributed_as_torchvisions(tmp_path, size, smallest):
    """Area and ratio over 4000 draws; the extreme shapes always fall back. Large: torchvision rounds."""
    n = 4000
    picture = Image.new("L", size)
    picture.save(tmp_path / "a.png")
    crops = random_crops(n, 0, 0, smallest)
    start, end = windows([load(tmp_path / "a.png")] * n, crops)
    np.testing.assert_allclose(start, crops.place * (1 - (end - start)), atol=1e-6)
    assert np.quantile(crops.place, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx(
        np.arange(0, 1.1, 0.25), abs=0.02
    )
    assert start.min() >= 0
    assert end.max() <= 1 + 1e-6
    torch.manual_seed(0)
    want = [RandomResizedCrop.get_params(picture, (smallest, 1.0), (3 / 4, 4 / 3)) for _ in range(n)]
    h, w = np.array(want).T[2:] / np.array([[size[1]], [size[0]]])
    height, width = (end - start).T

    def below(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
        return np.searchsorted(np.sort(values), limits) / n

    for mine, theirs in ((height * width, h * w), (np.log(width / height), np.log(w / h))):
        limits = np.linspace(theirs.min() - 0.011, theirs.max() + 0.013, 200)
        assert np.abs(below(mine, limits) - below(theirs, limits)).max() < 0.045  # Kolmogorov, Smirnov: 0.1 %


@pytest.mark.parametrize(
    ("name", "turned"), [("a.png", 1), ("a.jpg", 1), ("a.jpg", 6), ("a.webp", 1), ("a.bmp", 1), ("a.tif", 1)]
)
def test_a_crop_is_what_pil_cuts_out(clip, tmp_path, name, turned):
    """In every format, and in the upright picture where the file says that it was taken on its side."""
    y, x = np.mgrid[:60, :90]
    picture = Image.fromarray(np.stack([x * 2, y * 4, (x + y) % 256], 2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = turned
    picture.save(tmp_path / name, quality=100, exif=exif)
    index = read_index(write_csv(tmp_path / "a.csv", ["image", "label"], [[name, "x"]] * 2))
    crops = random_crops(2, 3, 0, 0.2)
    ((images, _),) = Pictures(index, clip, in_order(2, 2), 2, crops=iter([crops]))
    start, end = windows([load(tmp_path / name)] * 2, crops)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / name))
    assert upright.size == ((90, 60) if turned == 1 else (60, 90))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip.mean, clip.std))
    for got, low, high in zip(images, start, end, strict=True):
        (top, left), (bottom, right) = (corner * upright.size[::-1] for corner in (low, high))
        cut = upright.resize((32, 32), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        want = torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 255
        assert ((got * std + mean) - want).abs().mean() * 255 < 3
