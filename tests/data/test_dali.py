"""What the DALI pipeline hands to the model, against PIL, open_clip and torchvision."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F
from torchvision.transforms.functional import _compute_resized_output_size

from tracer.data.dali import Pictures
from tracer.data.index import Index, read_index
from tracer.data.order import Crops, in_order, random_crops
from tracer.data.window import centre_window, random_window
from tracer.models.picture_format import PictureFormat


@pytest.fixture
def wanted(clip) -> PictureFormat:
    return clip.picture_format


def levels(image: torch.Tensor, wanted: PictureFormat) -> torch.Tensor:
    """Normalised pictures [..., 3, S, S] as levels from 0 to 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (wanted.mean, wanted.std))
    return 255 * (image * std + mean)


def test_evaluation_pictures_are_what_pil_gives(drawings, wanted):
    """Every picture once, in order, with the pixels of PIL's resampling up to rounding."""
    index = read_index(drawings / "test.csv")
    images, rows = zip(*Pictures(index, wanted, in_order(len(index), 7), 7), strict=True)
    assert torch.cat(rows).tolist() == list(range(len(index)))
    for image, path in zip(levels(torch.cat(images), wanted), index.images, strict=True):
        pil = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        assert (image - torch.from_numpy(np.array(pil)).permute(2, 0, 1)).abs().mean() < 2


@pytest.mark.parametrize("size", [(64, 48), (48, 64)], ids=str)
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_an_oblong_picture_is_evaluated_as_open_clip_does(
    tmp_path, wanted, write_csv, size, resize_mode, interpolation
):
    """With ``shortest`` the longer side becomes 42.67 pixels, rounded to 42: with 43 the centre would move."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    index = read_index(write_csv("a.csv", ["image", "label"], [["a.png", "x"]]))
    wanted = dataclasses.replace(wanted, resize_mode=resize_mode, interpolation=interpolation)
    ((images, _),) = Pictures(index, wanted, in_order(1, 1), 1)
    transform = image_transform_v2(PreprocessCfg(**dataclasses.asdict(wanted)), is_train=False)
    expected = transform(Image.open(tmp_path / "a.png"))
    assert (levels(images[0], wanted) - levels(expected, wanted)).abs().mean() < 1


def windows(shape: tuple[int, int], crops: Crops) -> tuple[np.ndarray, np.ndarray]:
    """Corners [n, 2] of the crops of pictures of one shape (height, width)."""
    start, end = zip(*(random_window(shape, *crop) for crop in zip(*crops, strict=True)), strict=True)
    return np.stack(start), np.stack(end)


@pytest.mark.parametrize("size", [(500, 500), (3000, 2250), (300, 900), (900, 300)], ids=str)
@pytest.mark.parametrize("smallest", [0.9, 0.1])
def test_crops_have_the_distribution_of_torchvision(size, smallest):
    """Area and ratio over 4000 draws.

    In the extreme shapes no attempt ever fits; in large pictures torchvision's rounding to pixels is small.
    """
    n = 4000
    picture = Image.new("L", size)
    crops = random_crops(n, 0, 0, smallest)
    start, end = windows(size[::-1], crops)
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

    for ours, torchvisions in ((height * width, h * w), (np.log(width / height), np.log(w / h))):
        limits = np.linspace(torchvisions.min() - 0.011, torchvisions.max() + 0.013, 200)
        distance = np.abs(below(ours, limits) - below(torchvisions, limits)).max()
        assert distance < 0.045  # Kolmogorov–Smirnov at a level of 0.1 %


@pytest.mark.parametrize(
    ("name", "turned"), [("a.png", 1), ("a.jpg", 1), ("a.jpg", 6), ("a.webp", 1), ("a.bmp", 1), ("a.tif", 1)]
)
def test_a_crop_is_what_pil_cuts_out(wanted, tmp_path, write_csv, name, turned):
    """In every format; and from the upright picture where the file says that the camera was turned."""
    y, x = np.mgrid[:60, :90]
    picture = Image.fromarray(np.stack([x * 2, y * 4, (x + y) % 256], 2).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = turned
    picture.save(tmp_path / name, quality=100, exif=exif)
    index = read_index(write_csv("a.csv", ["image", "label"], [[name, "x"]] * 2))
    crops = random_crops(2, 3, 0, 0.2)
    ((images, _),) = Pictures(index, wanted, in_order(2, 2), 2, crops=iter([crops]))
    upright = ImageOps.exif_transpose(Image.open(tmp_path / name))
    start, end = windows(upright.size[::-1], crops)
    assert upright.size == ((90, 60) if turned == 1 else (60, 90))
    for got, low, high in zip(levels(images, wanted), start, end, strict=True):
        (top, left), (bottom, right) = (corner * upright.size[::-1] for corner in (low, high))
        cut = upright.resize((32, 32), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        assert (got - torch.from_numpy(np.array(cut)).permute(2, 0, 1)).abs().mean() < 3


def test_evaluation_shows_the_centre_that_open_clip_shows(tmp_path, wanted):
    """Pixels of random noise, for sizes whose margins round in every way: one pixel off would differ by far."""
    sizes = [(w, h) for w in (33, 37, 40, 57, 64, 302) for h in (32, 43, 48, 61, 90, 240)]
    sizes += [(1, 7), (7, 1), (32, 32), (31, 95), (302, 240), (3, 300)]
    noise = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    index = Index("noise", paths, ["x"] * len(paths), [["x"]] * len(paths))
    ((images, _),) = Pictures(index, wanted, in_order(len(paths), len(paths)), len(paths))
    transform = image_transform_v2(PreprocessCfg(**dataclasses.asdict(wanted)), is_train=False)
    for size, path, image in zip(sizes, paths, images, strict=True):
        difference = levels(image, wanted) - levels(transform(Image.open(path)), wanted)
        assert difference.abs().mean() < 1.5, size


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    side=st.sampled_from([32, 40, 224, 240, 256, 336, 378, 384]),
)
@settings(max_examples=300, deadline=None)
def test_the_centre_lies_where_torchvision_cuts_it_out(height, width, side):
    """Within a thousandth of a pixel of the resized picture, for any size of picture and model."""
    wanted = PictureFormat(side, (0.0,) * 3, (1.0,) * 3)
    resized = np.array(_compute_resized_output_size((height, width), [side]))
    whole = mock.MagicMock(spec=torch.Tensor)
    with mock.patch.multiple(F, get_dimensions=lambda _: [3, *resized], crop=lambda *corners: corners[1:]):
        top, left, *_ = F.center_crop(whole, [side])
    start, end = centre_window((height, width), wanted)
    assert start * resized == pytest.approx([top, left], abs=2e-7 * max(resized) + 1e-3)
    assert end * resized == pytest.approx([top + side, left + side], abs=2e-7 * max(resized) + 1e-3)
