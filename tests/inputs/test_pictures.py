"""Picture files that are not what they should be: read as PIL reads them, or refused by name."""

from __future__ import annotations

import csv
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_sets import LOADERS, loaded
from PIL import Image, ImageOps

from tracer.data import check
from tracer.data.build import read_index
from tracer.data.config import LoadingSettings
from tracer.data.order import random_crops
from tracer.models.picture_format import PictureFormat

H, W = 40, 60
Y, X = np.mgrid[:H, :W]
COLOURS = np.stack([X * 4, Y * 6, (X + Y) * 2], 2).astype(np.uint8)
ALPHA = (np.hypot(X - 30, Y - 20) * 6).clip(0, 255).astype(np.uint8)
RGB = Image.fromarray(COLOURS)
GRAY = RGB.convert("L")
RGBA = Image.fromarray(np.dstack([COLOURS, ALPHA]))
LEVELS = PictureFormat(32, (0.0,) * 3, (1 / 255,) * 3, resize_mode="squash")  # pictures as levels 0 … 255


def png(
    array: np.ndarray,
    colour: int,
    bits: int,
    end: bool = True,
    key: tuple[int, ...] = (),
    width: int | None = None,
) -> bytes:
    """A PNG file of a colour type and depth that PIL does not write; with ``end`` False it stops too early.

    ``key`` is the transparent colour; ``width`` that of rows which are packed.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width or array.shape[1], array.shape[0], bits, colour, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in array))
    clear = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    body = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + clear + chunk(b"IDAT", rows)
    return body + (chunk(b"IEND", b"") if end else b"")


def packed(levels: np.ndarray, bits: int) -> np.ndarray:
    """Pack numbers of 1, 2 or 4 bits into the bytes of each row."""
    single = np.unpackbits(levels[..., None], axis=2)[..., -bits:]
    return np.packbits(single.reshape(len(levels), -1), axis=1)


def sixteen(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.uint16) * 257).astype(">u2")


def turned(way: int) -> dict[str, object]:
    exif = Image.Exif()
    exif[0x0112] = way
    return {"exif": exif}


# name of the file → (the picture, how PIL saves it); None: PIL reads it otherwise than it should
ODD: dict[str, tuple[Image.Image, dict]] = {
    "bits.tif": (GRAY.convert("1"), {}),
    "fax.tif": (GRAY.convert("1"), {"compression": "group4"}),
    "bits.png": (GRAY.convert("1"), {}),
    "gray.tif": (GRAY, {}),
    "colours.tif": (RGB, {"compression": "tiff_lzw"}),
    "lzma.tif": (RGB, {"compression": "lzma"}),
    "zstd.tif": (RGB, {"compression": "zstd"}),
    "jpeg.tif": (RGB, {"compression": "jpeg"}),
    "cmyk.tif": (RGB.convert("CMYK"), {}),
    "ycbcr.tif": (RGB.convert("YCbCr"), {}),
    "lab.tif": (Image.fromarray(COLOURS, "LAB"), {}),
    "palette.tif": (RGB.quantize(16), {}),
    "palette.png": (RGB.quantize(4), {"bits": 2}),
    "cmyk.jpg": (RGB.convert("CMYK"), {"quality": 95}),
    "gray.jpg": (GRAY, {"quality": 95}),
    "progressive.jpg": (RGB, {"quality": 95, "progressive": True}),
    "many.mpo": (RGB, {"save_all": True, "append_images": [GRAY.convert("RGB")]}),
    "moves.webp": (RGB, {"save_all": True, "append_images": [GRAY.convert("RGB")], "lossless": True}),
    "moves.gif": (RGB.quantize(16), {"save_all": True, "append_images": [GRAY.convert("P")]}),
    "colours.avif": (RGB, {"quality": 95}),
    "moves.png": (RGB, {"save_all": True, "append_images": [GRAY.convert("RGB")]}),
    "colours.jp2": (RGB, {}),
    "colours.ppm": (RGB, {}),
    "gray.pgm": (GRAY, {}),
    "palette.bmp": (RGB.quantize(16), {}),
    "turned.jpg": (RGB, {"quality": 95, **turned(6)}),
    "mirrored.jpg": (RGB, {"quality": 95, **turned(5)}),
    "turned.png": (RGB, turned(6)),
    "turned.webp": (RGB, {"lossless": True, **turned(6)}),
    "turned.tif": (RGB, turned(8)),
}


def resized(picture: Image.Image) -> torch.Tensor:
    pixels = np.array(picture.resize((32, 32), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1).float()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("exif", [False, True])
def test_odd_files_have_the_pixels_of_pil(tmp_path, loader, exif):
    """With EXIF's rotation ignored, as open_clip does, and applied."""
    for name, (picture, options) in ODD.items():
        picture.save(tmp_path / name, **options)
    (tmp_path / "endless.png").write_bytes(png(COLOURS, 2, 8, end=False))  # which DALI would refuse
    RGB.save(tmp_path / "png.jpg", format="PNG")
    names = [*ODD, "endless.png", "png.jpg"]
    images = loaded([tmp_path / name for name in names], LEVELS, loader, exif=exif)
    for name, image in zip(names, images, strict=True):
        stored = Image.open(tmp_path / name)
        expected = (ImageOps.exif_transpose(stored) if exif else stored).convert("RGB")
        assert (image - resized(expected)).abs().mean() < 1.5, name


@pytest.mark.parametrize("loader", LOADERS)
def test_the_smallest_pictures_fill_the_square(tmp_path, loader):
    """A single pixel in every format, evaluated and cropped; and a line of 2000×2."""
    colours = {"a.png": "RGB", "a.jpg": "RGB", "a.webp": "RGB", "a.gif": "P", "a.bmp": "RGB", "a.tif": "L"}
    for name, mode in colours.items():
        Image.new("RGB", (1, 1), (102, 102, 102)).convert(mode).save(tmp_path / name)
    Image.new("RGB", (2000, 2), (102, 102, 102)).save(tmp_path / "line.jpg")
    paths = [tmp_path / name for name in (*colours, "line.jpg")]
    for resize_mode in ("shortest", "squash"):
        wanted = PictureFormat(32, LEVELS.mean, LEVELS.std, resize_mode=resize_mode)
        for crops in (None, random_crops(len(paths), 0, 0, 0.2)):
            images = loaded(paths, wanted, loader, crops)
            assert (images - 102).abs().max() <= 2


@pytest.mark.parametrize("loader", LOADERS)
def test_sixteen_bits_are_scaled_to_eight(tmp_path, loader):
    gray = np.asarray(GRAY)
    (tmp_path / "gray.png").write_bytes(png(sixteen(gray), 0, 16))
    (tmp_path / "colours.png").write_bytes(png(sixteen(COLOURS), 2, 16))
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "gray.tif")
    (tmp_path / "gray.pgm").write_bytes(f"P5 {W} {H} 65535\n".encode() + sixteen(gray).tobytes())
    names = ("gray.png", "gray.tif", "gray.pgm", "colours.png")
    images = loaded([tmp_path / name for name in names], LEVELS, loader)
    for name, image in zip(names, images, strict=True):
        expected = RGB if name == "colours.png" else GRAY.convert("RGB")
        assert (image - resized(expected)).abs().mean() < 1.5, name


def palette_with_alpha() -> Image.Image:
    picture = RGB.quantize(16)
    picture.info["transparency"] = bytes(range(0, 256, 16))
    return picture


TRANSPARENT: dict[str, Callable[[Path], None]] = {
    "rgba.png": lambda path: RGBA.save(path),
    "rgba.webp": lambda path: RGBA.save(path, lossless=True, exact=True),
    "rgba.tif": lambda path: RGBA.save(path),
    "rgba.jp2": lambda path: RGBA.save(path),
    "la.png": lambda path: RGBA.convert("LA").save(path),
    "la.tif": lambda path: RGBA.convert("LA").save(path),
    "rgba16.png": lambda path: path.write_bytes(png(sixteen(np.asarray(RGBA)), 6, 16)) and None,
    "la16.png": lambda path: path.write_bytes(png(sixteen(np.asarray(RGBA.convert("LA"))), 4, 16)) and None,
    "palette.png": lambda path: palette_with_alpha().save(path),
    "key16.png": lambda path: Image.fromarray(sixteen(np.asarray(GRAY)).astype(np.uint16)).save(
        path, transparency=257 * 100
    ),
    "key.png": lambda path: RGB.save(path, transparency=(0, 0, 0)),
}


@pytest.mark.parametrize("name", TRANSPARENT)
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_transparent_picture_is_evaluated_as_open_clip_does(tmp_path, name, resize_mode, loader):
    """open_clip sees the same pixels, given the picture as RGBA; a palette it resizes without interpolation."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    TRANSPARENT[name](tmp_path / name)
    config = PreprocessCfg(size=32, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=resize_mode)
    transform = image_transform_v2(config, is_train=False)
    picture = Image.open(tmp_path / name)
    if name == "key16.png":  # which PIL would clip
        gray = np.asarray(GRAY)
        picture = Image.fromarray(np.dstack([gray, np.where(gray == 100, 0, 255).astype(np.uint8)]))
    expected = 255 * transform(picture if picture.mode == "LA" else picture.convert("RGBA"))
    wanted = PictureFormat(32, LEVELS.mean, LEVELS.std, resize_mode=resize_mode)
    (image,) = loaded([tmp_path / name], wanted, loader)
    assert (image - expected).abs().mean() < 0.1


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("exif", [False, True])
def test_the_transparent_colour_is_compared_at_the_depth_of_the_file(tmp_path, loader, exif):
    """PIL compares tRNS's number with levels that it has scaled to 8 bits already."""
    levels = np.random.default_rng(0).integers(0, 4, (32, 32)).astype(np.uint8)
    two, four = (packed(levels * by, bits) for by, bits in ((1, 2), (5, 4)))
    (tmp_path / "two.png").write_bytes(png(two, 0, 2, key=(2,), width=32))
    (tmp_path / "four.png").write_bytes(png(four, 0, 4, key=(10,), width=32))
    colours = np.array([[0x64, 0x65, 0x66], [0x64, 0x65, 0x67], [0x01, 0x02, 0x03], [0x65, 0x65, 0x66]]) << 8
    colours += [[1, 2, 3], [1, 2, 3], [9, 9, 9], [1, 2, 3]]  # of which the first is the key
    colours = np.concatenate([colours, colours[:1] + 1])[np.random.default_rng(1).integers(0, 5, (32, 32))]
    key = (0x6401, 0x6502, 0x6603)
    (tmp_path / "colours.png").write_bytes(png(colours.astype(">u2"), 2, 16, key=key))
    images = loaded(
        [tmp_path / f"{name}.png" for name in ("two", "four", "colours")], LEVELS, loader, exif=exif
    )
    gray = np.where(levels == 2, 0, levels * 85)
    shown = np.where((colours == key).all(2)[..., None], 0, colours >> 8)
    expected = torch.from_numpy(np.stack([np.dstack([gray] * 3), np.dstack([gray] * 3), shown]))
    assert (images - expected.permute(0, 3, 1, 2)).abs().max() <= 1e-3


@pytest.mark.parametrize("loader", LOADERS)
def test_colours_under_alpha_never_show(tmp_path, loader):
    """In training and evaluation, and where the picture has the model's size and is not resized at all."""
    opaque = np.zeros((32, 32, 1), np.uint8)
    opaque[8:20, 5:25] = 255
    for name, hidden in (("a.png", 250), ("b.png", 0)):
        colours = np.where(opaque > 0, 120, hidden).repeat(3, 2).astype(np.uint8)
        Image.fromarray(np.dstack([colours, opaque])).save(tmp_path / name)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    a, b = loaded(paths, LEVELS, loader)
    assert torch.equal(a, b)
    assert a.unique().tolist() == [0, 120]
    crops = random_crops(2, 0, 0, 0.2)
    crops = type(crops)(*(part[:1].repeat(2, 0) for part in crops))
    a, b = loaded(paths, LEVELS, loader, crops)
    assert torch.equal(a, b)
    assert a.max() < 150  # a cubic overshoots


@pytest.mark.parametrize("loader", LOADERS)
def test_a_crop_of_a_transparent_picture_is_that_of_an_opaque_one(tmp_path, loader):
    RGB.save(tmp_path / "a.png")
    Image.fromarray(np.dstack([COLOURS, np.full((H, W), 255, np.uint8)])).save(tmp_path / "b.png")
    crops = random_crops(1, 3, 0, 0.2)
    a, b = (loaded([tmp_path / name], LEVELS, loader, crops) for name in ("a.png", "b.png"))
    assert (a - b).abs().mean() < 0.6


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "int32.tif": (lambda p: Image.fromarray(np.asarray(GRAY).astype(np.int32)).save(p), "32-bit numbers"),
    "float32.tif": (lambda p: Image.fromarray(np.asarray(GRAY) / np.float32(255)).save(p), "32-bit numbers"),
    "cut.jpg": (lambda p: (RGB.save(p), p.write_bytes(p.read_bytes()[:-60])), "truncated"),
    "cut.tif": (lambda p: (RGB.save(p), p.write_bytes(p.read_bytes()[:-600])), "truncated"),
    "unmarked.jpg": (
        lambda p: (RGB.save(p), p.write_bytes(p.read_bytes().removesuffix(b"\xff\xd9"))),
        "truncated",
    ),
    "half.png": (lambda p: p.write_bytes(png(COLOURS, 2, 8)[:300]), "truncated"),
    "page.jpg": (lambda p: p.write_text("<html>404</html>"), "its content is not a picture"),
    "empty.png": (lambda p: p.touch(), "it is empty"),
    "folder.png": (lambda p: p.mkdir(), "is a directory"),
    "gone.png": (lambda p: None, "it does not exist"),
    "bomb.png": (
        lambda p: p.write_bytes(png(np.zeros((2, 2), np.uint8), 0, 8)[:16] + BOMB),
        "it has 40000×10000 pixels, more than --max_pixels",
    ),
}
BOMB_HEADER = struct.pack(">IIBBBBB", 40_000, 10_000, 8, 0, 0, 0, 0)
BOMB = (
    BOMB_HEADER
    + struct.pack(">I", zlib.crc32(b"IHDR" + BOMB_HEADER))
    + png(np.zeros((2, 2), np.uint8), 0, 8)[33:]
)


@pytest.fixture
def bad_set(tmp_path) -> Callable[[str], Path]:
    """Write a CSV of six pictures, the fourth of them bad."""

    def write(name: str) -> Path:
        names = ["0.png", "1.png", "2.png", name, "4.png", "5.png"]
        for good in names:
            RGB.save(tmp_path / good, format="PNG")
        (tmp_path / name).unlink()
        BAD[name][0](tmp_path / name)
        with (tmp_path / "set.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "label"), *((n, "ab"[i % 2]) for i, n in enumerate(names))])
        return tmp_path / "set.csv"

    return write


SEEN = [name for name in ODD if name != "many.mpo"]  # which is a JPEG at first sight


def rle_bmp(levels: np.ndarray) -> bytes:
    """A BMP of 8 bits whose rows are runs of one pixel each (compression 1), with its end marker."""
    rows = b"".join(b"".join(bytes([1, level]) for level in row) + b"\0\0" for row in levels[::-1].tolist())
    rows = rows[:-2] + b"\0\1"
    palette = b"".join(bytes([n, n, n // 2, 0]) for n in range(256))
    about = struct.pack("<IiiHHIIiiII", 40, levels.shape[1], len(levels), 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(rows), 0, 0, 54 + 1024) + about + palette + rows


ROWS: dict[str, bytes] = {
    "runs.bmp": rle_bmp(np.asarray(GRAY)),
    "bits.pbm": b"P4 60 40\n" + packed(np.asarray(GRAY) // 128, 1).tobytes(),
    "gray16.pgm": b"P5 60 40 65535\n" + sixteen(np.asarray(GRAY)).tobytes(),
    "gray12.pgm": b"P5 60 40 4095\n" + (np.asarray(GRAY).astype(">u2") * 16).astype(">u2").tobytes(),
    "colours16.ppm": b"P6 60 40 65535\n" + sixteen(COLOURS).tobytes(),
    "few.ppm": b"P6 60 40 15\n" + (COLOURS // 16).tobytes(),
}


@pytest.mark.parametrize("name", ROWS)
def test_files_of_plain_rows_are_not_decoded_at_first_sight(tmp_path, monkeypatch, name):
    """BMP and PPM have no end marker, but their headers say how long the rows are."""
    path = tmp_path / name
    path.write_bytes(ROWS[name])
    whole = check.look_at_file(str(path), 10**6, whole=True)[0]
    decoded, decode = [], check._decoded
    monkeypatch.setattr(check, "_decoded", lambda *a: decoded.append(1) or decode(*a))
    assert check.look_at_file(str(path), 10**6)[0] == whole
    assert not whole.fault
    assert not decoded
    path.write_bytes(ROWS[name][:-100])
    assert check.look_at_file(str(path), 10**6)[0].fault
    assert decoded


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert check.look_at_file(str(tmp_path / "pipe.png"), 10**6)[0].fault == "it is empty"


def test_a_sound_file_is_not_decoded_at_first_sight(tmp_path, monkeypatch):
    """Whatever its format: decoding takes up to a thousand times as long. A cut one is decoded, and refused."""
    decoded, decode = [], check._decoded
    monkeypatch.setattr(check, "_decoded", lambda *a: decoded.append(1) or decode(*a))
    for name in SEEN:
        picture, options = ODD[name]
        path = tmp_path / name
        picture.save(path, **options)
        sight, size, _ = check.look_at_file(str(path), 10**6)
        assert not sight.fault, name
        assert sight == check.look_at_file(str(path), 10**6, whole=True)[0], name
        assert len(decoded) == 1, name  # by the whole look
        assert "more than --max_pixels 2000" in check.look_at_file(str(path), 2000)[0].fault
        path.write_bytes(path.read_bytes()[: size // 3])
        decoded.clear()
        assert check.look_at_file(str(path), 10**6)[0].fault or name == "moves.gif", (
            name
        )  # PIL fills up a GIF
        assert len(decoded) == 1
        decoded.clear()


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_name(bad_set, refusal, name):
    """One of six is more than --max_bad allows."""
    line = refusal(bad_set(name))
    assert f"{name}'" in line
    assert BAD[name][1] in line
    assert "1 of 6 pictures" in line


@pytest.mark.parametrize("loader", LOADERS)
def test_bad_files_are_left_out_where_the_bound_allows_it(bad_set, evaluate, tmp_path, loader):
    """Every kind at once; the good pictures are scored."""
    data = bad_set("cut.jpg")
    with data.open("a", newline="") as file:
        for name in BAD:
            if name != "cut.jpg":
                BAD[name][0](tmp_path / name)
                csv.writer(file).writerow((name, "a"))
    scores = tmp_path / f"{loader}.json"
    code, stderr = evaluate(data, max_bad=0.9, loader=loader, output=scores)
    assert code == 0, stderr
    assert f"{len(BAD)} of {len(BAD) + 5} pictures of 'set' cannot be used" in stderr
    assert "not scored" not in stderr  # the first sight has seen them all
    assert '"pictures": 5' in scores.read_text()


@pytest.mark.parametrize("loader", LOADERS)
def test_flipped_bits_decode_silently_to_the_same_pixels(tmp_path, loader):
    """No decoder notices them: docs/data.md says so."""
    RGB.resize((400, 300)).save(tmp_path / "a.jpg", quality=95)
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20] = bytes(20)
    (tmp_path / "flipped.jpg").write_bytes(content)
    (tmp_path / "set.csv").write_text("image,label\nflipped.jpg,a\n")
    index = read_index(tmp_path / "set.csv", None, LoadingSettings(cache=tmp_path / "cache"))
    assert len(index) == 1
    (image,) = loaded(index, LEVELS, loader)
    assert (image - resized(Image.open(tmp_path / "flipped.jpg").convert("RGB"))).abs().mean() < 1


def peak_memory() -> int:
    """Return the most memory, in KiB, that this process has held since the peak was last reset."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1])


@pytest.mark.parametrize("loader", LOADERS)
def test_an_oblong_picture_costs_no_more_than_a_square_one(tmp_path, loader):
    """Resized as a whole, 20000×2 pixels would take 6 GB for a model of 224 pixels."""
    wide = np.tile(np.arange(20000) // 79, (2, 1)).astype(np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.T).save(tmp_path / "tall.png")
    Image.fromarray(np.dstack([wide, np.full_like(wide, 255)])).save(tmp_path / "clear.png")
    names = ("wide.png", "tall.png", "clear.png")
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is held now, whatever ran before
    before = peak_memory()
    for resize_mode in ("shortest", "squash"):
        wanted = PictureFormat(224, LEVELS.mean, LEVELS.std, resize_mode=resize_mode)
        images = loaded([tmp_path / name for name in names], wanted, loader)
        assert images.shape == (3, 3, 224, 224)
        assert images.mean().item() == pytest.approx(126, abs=2)
        loaded([tmp_path / name for name in names], wanted, loader, random_crops(3, 0, 0, 0.9))
    assert peak_memory() - before < 1_000_000
