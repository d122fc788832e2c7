"""What both loaders hand to the model, against PIL, open_clip and torchvision."""

from __future__ import annotations

import dataclasses
import io
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from picture_sets import CPU, LOADERS, index_of, levels, loaded
from PIL import Image, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F
from torchvision.transforms.functional import _compute_resized_output_size

from benchmarks.pictures import drawing
from tracer.data.build import read_index
from tracer.data.config import LoadingSettings
from tracer.data.decode import evaluation
from tracer.data.loader import announce, choose
from tracer.data.names import note
from tracer.data.order import Crops, random_crops
from tracer.data.picture import Picture, decode_scaled
from tracer.data.threads import effect_of_scaling
from tracer.data.window import centre_window, random_window
from tracer.errors import UserError
from tracer.machine import compute_device
from tracer.models.picture_format import PictureFormat

CLIP = PictureFormat(224, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


@pytest.fixture
def wanted(clip) -> PictureFormat:
    return clip.picture_format


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Drawings with the spectrum of photographs, in ImageNet's mean size and larger."""
    folder = tmp_path_factory.mktemp("photographs")
    sizes = [(500, 375)] * 4 + [(375, 500)] * 2 + [(1000, 750)] * 2
    for i, (width, height) in enumerate(sizes):
        drawing(i, width, height).save(folder / f"{i}.jpg", quality=92)
    return [folder / f"{i}.jpg" for i in range(len(sizes))]


def difference(got: torch.Tensor, paths, wanted=CLIP) -> tuple[float, float]:
    """Mean and largest difference from open_clip's validation transform, in levels of 255."""
    transform = open_clip.image_transform(wanted.size, False, wanted.mean, wanted.std)
    expected = torch.stack([transform(Image.open(path)) for path in paths])
    away = (levels(got, wanted) - levels(expected, wanted)).abs()
    return float(away.mean()), float(away.max())


@pytest.mark.parametrize(("loader", "mean", "largest"), [("torch", 0.01, 2), ("dali", 0.3, 4)])
def test_photographs_have_the_pixels_of_open_clips_validation(photographs, loader, mean, largest):
    got = difference(loaded(photographs, CLIP, loader), photographs)
    assert got[0] <= mean
    assert got[1] <= largest + 1e-3


def test_the_device_decodes_as_the_cpu_does(photographs):
    """On a GPU DALI's decoder is nvJPEG, whose inverse transform rounds otherwise than libjpeg's."""
    device = compute_device()
    mean, largest = (0.3, 4) if device.type == "cpu" else (1.0, 10)
    away = difference(loaded(photographs, CLIP, "dali", device=device), photographs)
    assert away[0] <= mean
    assert away[1] <= largest + 1e-3


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_scaled_decoding_takes_any_size(scale):
    """Sides that the scale does not divide are rounded up, as libjpeg does."""
    content = io.BytesIO()
    drawing(0, 401, 301).save(content, "JPEG")
    shape = decode_scaled(content.getvalue(), scale, exif=False).shape
    assert shape == (-(-301 // scale), -(-401 // scale), 3)


# PIL raises struct.error for it when it writes the EXIF of the turned picture.
DAMAGED_EXIF = bytes.fromhex(
    "4578696600004d4d002a000000080004010f0002000000046101630001120003000000010006010001000005000000010000003e"
    "8769000400000001000000460000000000000001000000010002829a0003000000020001004490000007000000043032333000000000"
)


def test_damaged_exif_is_an_error_of_its_picture():
    """And none of the run: whatever PIL raises for it becomes a UserError."""
    content = io.BytesIO()
    drawing(0, 401, 301).save(content, "JPEG", exif=DAMAGED_EXIF)
    picture = Picture((301, 401), content=content.getvalue())
    with pytest.raises(UserError):
        evaluation(picture, dataclasses.replace(CLIP, size=32), exif=True, scaled=True)


def test_scaled_decoding_is_close_and_its_effect_is_said(tmp_path):
    """From 1000×750 at a half, and from 1500×1000 at a quarter of their size; twice that for 224 pixels."""
    wanted = dataclasses.replace(CLIP, size=112)
    for n, size in enumerate([(1000, 750), (1500, 1000), (250, 188)]):
        drawing(n, *size).save(tmp_path / f"{n}.jpg", quality=90)
    paths = [tmp_path / f"{n}.jpg" for n in range(3)]
    exact, scaled = (loaded(paths, wanted, "torch", jpeg=jpeg) for jpeg in ("exact", "scaled"))
    assert difference(scaled, paths, wanted)[0] <= 0.7
    assert not torch.equal(exact[:2], scaled[:2])
    assert torch.equal(exact[2], scaled[2])  # its crop would be smaller than twice the model's input
    said = effect_of_scaling(index_of(paths), wanted, LoadingSettings(jpeg="scaled"))
    assert "changes 2 of the first 3 pictures, by 0." in said
    with pytest.raises(UserError, match="--jpeg scaled needs --loader torch"):
        loaded(paths, wanted, "dali", jpeg="scaled")


def test_the_loaders_cut_the_same_crops(photographs):
    crops = random_crops(len(photographs), 5, 0, 0.3)
    one, other = (levels(loaded(photographs, CLIP, loader, crops), CLIP) for loader in LOADERS)
    assert (one - other).abs().mean() < 0.3
    assert (one - other).abs().max() <= 6
    moved = levels(loaded(photographs, CLIP, "torch", random_crops(len(photographs), 6, 0, 0.3)), CLIP)
    assert (one - moved).abs().mean() > 5


@pytest.mark.parametrize(
    ("settings", "device", "says"),
    [
        ({}, "cpu", ("torch", "there is no GPU")),
        ({}, "cuda", ("dali", "there is a GPU")),
        ({"jpeg": "scaled"}, "cuda", ("torch", "--jpeg scaled")),
        ({"loader": "dali"}, "cpu", ("dali", "--loader dali")),
        ({"loader": "torch"}, "cuda", ("torch", "--loader torch")),
    ],
)
def test_the_loader_is_chosen_with_a_reason(settings, device, says):
    assert choose(LoadingSettings(**settings), torch.device(device)) == says


def test_the_loader_is_announced_with_what_it_does_to_odd_pictures(drawings, wanted, capsys):
    """Once for each data set."""
    index = dataclasses.replace(read_index(drawings / "test.csv"), name="announced")
    index.about.turned, index.about.sixteen = 3, 2
    note.cache_clear()  # a run of another test may have said the same
    announce(index, wanted, LoadingSettings(jpeg="scaled"), CPU)
    announce(index, wanted, LoadingSettings(exif=True), CPU)
    announce(index, wanted, LoadingSettings(loader="dali"), CPU)
    said = capsys.readouterr().err.replace("tracer: note: ", "").splitlines()
    assert said == [
        "loader torch (there is no GPU)",
        "'announced': 3 pictures with an EXIF rotation, shown as they are stored (--exif true turns them)",
        "'announced': 2 pictures of 16 bits a channel, scaled to 8",
        f"'announced': {effect_of_scaling(index, wanted, LoadingSettings(jpeg='scaled'))}",
        "'announced': 3 pictures with an EXIF rotation, turned upright",
        "loader dali (--loader dali)",
    ]
    assert "changes 0 of the first 16 pictures, by 0.00 of 255 levels on average and 0 at most" in said[3]


def test_a_missing_dali_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose(LoadingSettings(), torch.device("cuda")) == ("torch", "DALI is not installed")
    with pytest.raises(UserError, match=r"--loader dali needs DALI: pip install"):
        choose(LoadingSettings(loader="dali"), CPU)


@pytest.mark.parametrize("loader", LOADERS)
def test_evaluation_pictures_are_what_pil_gives(drawings, wanted, loader):
    """Every picture once, in order, with the pixels of PIL's resampling up to rounding."""
    index = read_index(drawings / "test.csv")
    images = loaded(index, wanted, loader, batch_size=7)
    for image, path in zip(levels(images, wanted), index.images, strict=True):
        pil = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        assert (image - torch.from_numpy(np.array(pil)).permute(2, 0, 1)).abs().mean() < 2


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("size", [(64, 48), (48, 64)], ids=str)
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_an_oblong_picture_is_evaluated_as_open_clip_does(
    tmp_path, wanted, size, resize_mode, interpolation, loader
):
    """With ``shortest`` the longer side becomes 42.67 pixels, rounded to 42: with 43 the centre would move."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    wanted = dataclasses.replace(wanted, resize_mode=resize_mode, interpolation=interpolation)
    images = loaded([tmp_path / "a.png"], wanted, loader)
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
    """Area and ratio over 2000 draws.

    In the extreme shapes no attempt ever fits; in large pictures torchvision's rounding to pixels is small.
    """
    n = 2000
    picture = Image.new("L", size)
    crops = random_crops(n, 0, 0, smallest)
    start, end = windows(size[::-1], crops)
    pixel = 1 / np.array(size[::-1])
    assert (np.abs(start - crops.place * (1 - (end - start))) <= 0.5 * pixel + 1e-6).all()
    np.testing.assert_allclose(start / pixel, np.rint(start / pixel), atol=1e-3)  # at whole pixels
    assert np.quantile(crops.place, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx(
        np.arange(0, 1.1, 0.25), abs=0.03
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
        assert distance < 0.062  # Kolmogorov–Smirnov at a level of 0.1 %


@pytest.mark.parametrize(
    ("name", "turned"), [("a.png", 1), ("a.jpg", 1), ("a.jpg", 6), ("a.webp", 1), ("a.bmp", 1), ("a.tif", 1)]
)
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("exif", [False, True])
def test_a_crop_is_what_pil_cuts_out(wanted, tmp_path, name, turned, loader, exif):
    """In every format; and from the upright picture where the camera was turned and EXIF is asked for."""
    y, x = np.mgrid[:60, :90]
    picture = Image.fromarray(np.stack([x * 2, y * 4, (x + y) % 256], 2).astype(np.uint8))
    about = Image.Exif()
    about[0x0112] = turned
    picture.save(tmp_path / name, quality=100, exif=about)
    crops = random_crops(2, 3, 0, 0.2)
    images = loaded(index_of([tmp_path / name]).take([0, 0]).take([0, 1]), wanted, loader, crops, exif=exif)
    upright = Image.open(tmp_path / name)
    upright = ImageOps.exif_transpose(upright) if exif else upright
    start, end = windows(upright.size[::-1], crops)
    assert upright.size == ((60, 90) if exif and turned == 6 else (90, 60))
    for got, low, high in zip(levels(images, wanted), start, end, strict=True):
        (top, left), (bottom, right) = (corner * upright.size[::-1] for corner in (low, high))
        box = [round(float(edge)) for edge in (left, top, right, bottom)]
        cut = upright.crop(box).resize((32, 32), Image.Resampling.BICUBIC)
        assert (got - torch.from_numpy(np.array(cut)).permute(2, 0, 1)).abs().mean() < 3


@pytest.mark.parametrize("loader", LOADERS)
def test_evaluation_shows_the_centre_that_open_clip_shows(tmp_path, wanted, loader):
    """Pixels of random noise, for sizes whose margins round in every way: one pixel off would differ by far."""
    sizes = [(w, h) for w in (33, 37, 40, 57, 64, 302) for h in (32, 43, 48, 61, 90, 240)]
    sizes += [(1, 7), (7, 1), (32, 32), (31, 95), (302, 240), (3, 300)]
    noise = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    images = loaded(paths, wanted, loader)
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
