"""The demo's data: desktop icons, the same freedesktop names drawn by many hands.

Debian carries more than twenty icon themes that draw the same few hundred names (``edit-cut``,
``weather-snow`` …) in the style of their time: shaded, smooth, square tiles, flat, one-ink lines. That makes a
benchmark of robust fine-tuning with real pictures: train on one family of hands, test on unseen drawings of
that family and on the others. :func:`prepare` downloads the packages (no root needed; apt verifies their
SHA-256), renders the drawings and writes CSV files as any other data set of this project:

    train.csv            image, label, captions      the training family
    eval/<family>.csv    image, label, captions      test pictures of each family, unseen before
    classes.json         class → prompts
    manifest.json        package versions and licences, counts, what was left out and why
    pictures/…png        64 × 64 RGB

The split is a function of class and file names alone (SHA-256), so it is the same on every machine, and it goes
by groups: drawings of one class by one hand (its hand-tuned sizes), or that look alike (themes copy from each
other), are never on both sides. ``docs/data.md`` tells the reasons and the numbers.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import posixpath
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tqdm import tqdm

from tracer.errors import UserError
from tracer.files import whole_folder

if TYPE_CHECKING:
    import open_clip

ASSETS = Path(__file__).parent / "assets"
CHECKPOINT = ASSETS / "tracer-demo.safetensors"  # the demo's pretrained start
RECIPE = 1  # raised whenever the same packages would give other files
SIZE = 64  # pixels of a stored picture

# hand (theme) → Debian package, family; one-ink drawings belong to the family LINE, whoever drew them
HANDS = {
    "gnome": ("gnome-icon-theme", "shaded"),
    "mate": ("mate-icon-theme", "shaded"),
    "Tango": ("tango-icon-theme", "shaded"),
    "gnome-colors-common": ("gnome-colors-common", "shaded"),
    "nuoveXT2": ("lxde-icon-theme", "shaded"),
    "elementary-xfce": ("elementary-xfce-icon-theme", "shaded"),
    "elementary": ("elementary-icon-theme", "smooth"),
    "Adwaita": ("adwaita-icon-theme", "smooth"),
    "Faenza": ("faenza-icon-theme", "square"),
    "Papirus": ("papirus-icon-theme", "flat"),
    "Numix": ("numix-icon-theme", "flat"),
    "breeze": ("breeze-icon-theme", "flat"),
    "suru": ("suru-icon-theme", "flat"),
    "Faba": ("faba-icon-theme", "flat"),
}
# further hands, seen in pretraining only
MORE_HANDS = {
    "oxygen": ("oxygen-icon-theme", "shaded"),
    "Obsidian": ("obsidian-icon-theme", "square"),
    "Nuovo": ("gnome-icon-theme-nuovo", "shaded"),
    "gartoon": ("gnome-icon-theme-gartoon", "shaded"),
    "yasis": ("gnome-icon-theme-yasis", "shaded"),
    "bloom": ("deepin-icon-theme", "flat"),
    "Vintage": ("deepin-icon-theme", "flat"),
    "Paper": ("paper-icon-theme", "flat"),
}
LINE = "line"
TRAIN_FAMILY = "shaded"
KINDS = {
    "shaded": "in-distribution",
    "smooth": "near",
    "square": "shifted",
    "flat": "shifted",
    LINE: "shifted",
}

SAME_CLASS_ALIKE = 0.93  # correlation above which two drawings of one class count as copies
ANY_CLASS_ALIKE = 0.97  # the same for drawings of different names, where one stroke makes the difference
IDENTICAL = 0.98  # above which a test picture adds nothing to an earlier one of its class and family

# folders of a theme (the specification's contexts) → the word for captions
CONTEXTS = {
    "actions": "action",
    "apps": "application",
    "categories": "category",
    "devices": "device",
    "emblems": "emblem",
    "emotes": "emote",
    "mimetypes": "file type",
    "mimes": "file type",
    "places": "place",
    "status": "status",
    "panel": "status",
    "preferences": "preferences",
    "legacy": "",
}
# the size to take where a hand drew several of the same bucket, best first
SIZES = (16, 18, 12, 8, 32, 24, 22, 48, 64, 42, 1000, 96, 84, 128, 256)

APT = ("apt-get", "-qq")
APT_HELPER = Path("/usr/lib/apt/apt-helper")  # part of apt; needs neither root nor package lists


@dataclass
class Benchmark:
    """Files of the prepared benchmark; ``eval_data`` in the order of KINDS, the first in-distribution."""

    train_data: Path
    eval_data: dict[str, Path]
    kinds: dict[str, str]
    classes: Path


@dataclass
class Drawing:
    """One picture file of one hand: what it is called, where it lay in the theme, and its bytes."""

    hand: str
    name: str
    context: str
    bucket: str  # small, medium, large or symbolic
    pixels: int  # the size that it was drawn for; 1000 for any
    path: str
    data: bytes = field(repr=False)
    aliases: list[str] = field(default_factory=list)  # other names of the same file (links of the theme)

    @property
    def key(self) -> str:
        return f"{self.hand}/{self.name}/{self.bucket}"


# --- classes and captions -------------------------------------------------------------------------------


def read_classes(path: Path = ASSETS / "classes.txt") -> tuple[dict[str, str], dict[str, list[str]]]:
    """``(name of a drawing → class, class → phrases)`` from lines ``class = names ; phrases``."""
    classes: dict[str, str] = {}
    phrases: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        label, rest = line.split(" = ")
        names, texts = rest.split(" ; ")
        phrases[label] = [text.strip() for text in texts.split(",")]
        for name in names.split():
            if name in classes:
                raise ValueError(f"{path}: '{name}' belongs to both '{classes[name]}' and '{label}'")
            classes[name] = label
    return classes, phrases


def class_of(drawing: Drawing, classes: dict[str, str]) -> str:
    """The class of a drawing by its own name, else by its links when they agree; '' for none."""
    if drawing.name in classes:
        return classes[drawing.name]
    found = {classes[alias] for alias in drawing.aliases if alias in classes}
    return found.pop() if len(found) == 1 else ""


def words(name: str) -> str:
    """An icon's name as words: 'gtk-go-back' → 'go back'."""
    name = re.sub(r"^(gtk|gnome-dev|gnome-fs|gnome-mime|gnome|stock|xfce|kde)[-_]", "", name)
    return re.sub(r"[-_.+ ]+", " ", name).strip()


def captions(drawing: Drawing, label: str, phrases: Sequence[str], known: set[str]) -> list[str]:
    """What the drawing may be called; a repeated caption is a likelier one. ``known`` names give synonyms."""
    own, context = words(drawing.name), drawing.context
    texts = [*phrases, *phrases, words(label)] if label else [own]
    texts.append(own)
    if context:
        texts += [f"{text} {context}" for text in ([own, *phrases] if label else [own])]
    texts += [words(alias) for alias in drawing.aliases if alias in known][:3]
    return [text for text in texts if text]


# --- packages and their drawings ------------------------------------------------------------------------


def packages() -> dict[str, dict]:
    """The packages that we know, by name: version, path in a mirror, size in bytes, SHA-256, licence."""
    return {entry["package"]: entry for entry in json.loads((ASSETS / "icon_packages.json").read_text())}


def mirrors() -> list[str]:
    """The package archives that this machine's apt is set up for."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return list(dict.fromkeys(address.rstrip("/") for address in found))


def download(names: Sequence[str], folder: Path, archives: Sequence[str] | None = None) -> dict[str, Path]:
    """Fetch the named packages into ``folder`` (what is there is kept) with apt, without root.

    The versions are pinned, so that every machine whose archive has them gets the same pictures. Where it has
    not (Ubuntu's has its own), the package of that name is taken in whatever version apt gives; the manifest
    says which.

    Args:
        archives: where to look for the pinned versions; by default :func:`mirrors`.

    Raises:
        UserError: no apt or dpkg on this machine, or a package that apt cannot give.
    """
    if not shutil.which("dpkg-deb"):
        raise UserError("dpkg-deb is missing: the icons come as Debian packages, so install 'dpkg'")
    files = {name: path for name in names if (path := _kept(name, folder))}
    missing = [name for name in names if name not in files]
    if not missing:
        return files
    if not APT_HELPER.exists():
        raise UserError(
            f"apt is missing: use Debian or Ubuntu, or put these packages into '{folder}' yourself: "
            + " ".join(Path(packages()[name]["path"]).name for name in missing)
        )
    folder.mkdir(parents=True, exist_ok=True)
    archives = mirrors() if archives is None else archives
    total = sum(packages()[name]["size"] for name in missing)
    with (
        tempfile.TemporaryDirectory() as lists,
        tqdm(total=total, desc="downloading icon themes", unit="B", unit_scale=True) as bar,
    ):
        for name in missing:
            entry, said = packages()[name], "no archive has it"
            path = folder / Path(entry["path"]).name
            for archive in archives:
                said = _fetch(f"{archive}/{entry['path']}", path, entry["sha256"])
                if not said:
                    break
            else:
                other = _fetch_any_version(name, folder, Path(lists))
                if other is None:
                    raise UserError(
                        f"package {name} {entry['version']} cannot be downloaded ({said}): check the network "
                        f"and the free space, or put '{path.name}' into '{folder}' yourself"
                    )
                path = other
            files[name] = path
            bar.update(entry["size"])
    return files


def _kept(name: str, folder: Path) -> Path | None:
    """The package in ``folder``, if it is there: the pinned version whole, or else another version."""
    pinned = folder / Path(packages()[name]["path"]).name
    if _is_package(pinned, packages()[name]["sha256"]):
        return pinned
    return next((path for path in sorted(folder.glob(f"{name}_*.deb")) if path != pinned), None)


def _fetch_any_version(name: str, folder: Path, state: Path) -> Path | None:
    """``apt-get download NAME``, with package lists of our own below ``state``: needs no root, no ``update``."""
    for part in ("lists/partial", "cache/archives/partial", "new"):
        (state / part).mkdir(parents=True, exist_ok=True)
    apt = [*APT, "-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
    apt += [
        "-o",
        "APT::Sandbox::User=root",
    ]  # else apt, run by root, warns that its own user cannot write here
    if not any((state / "lists").glob("*Packages*")):
        subprocess.run([*apt, "update"], capture_output=True)
    if subprocess.run([*apt, "download", name], capture_output=True, cwd=state / "new").returncode:
        return None
    (found,) = (state / "new").glob("*.deb")
    return Path(shutil.move(found, folder / found.name))


def _fetch(url: str, path: Path, sha256: str) -> str:
    """Download one file; returns what went wrong, '' for nothing."""
    part = path.with_name(path.name + ".part").resolve()
    try:
        command = [str(APT_HELPER), "-o", "Acquire::Retries=2", "download-file", url, str(part)]
        result = subprocess.run([*command, f"SHA256:{sha256}"], capture_output=True, text=True)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if line.startswith("E:")]
            return errors[0].removeprefix("E:").strip() if errors else f"apt ended with {result.returncode}"
        part.replace(path)
        return ""
    finally:
        for leftover in part.parent.glob(part.name + "*"):  # apt also leaves *.FAILED
            leftover.unlink()


def _is_package(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def _describe(name: str, path: Path) -> dict[str, object]:
    """What the manifest says of a package: its real version, and whether that is the pinned one."""
    version = path.name.split("_")[1].replace("%3a", ":")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    pinned = packages()[name]
    return {
        "version": version,
        "sha256": sha256,
        "pinned": sha256 == pinned["sha256"],
        "licence": pinned["licence"],
    }


def read_theme(package: Path, hand: str) -> list[Drawing]:
    """The drawings of one theme in a Debian package, without unpacking it to disk.

    Of each name one drawing per bucket of sizes; links become aliases of the file that they lead to.
    """
    theme = f"usr/share/icons/{hand}/"
    best: dict[tuple[str, str], Drawing] = {}
    links: dict[str, str] = {}
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    path = posixpath.normpath(member.name)
                    if not path.startswith(theme):
                        continue
                    if member.issym():
                        here = posixpath.dirname(path)
                        links[path] = posixpath.normpath(posixpath.join(here, member.linkname))
                        continue
                    place = _place(path.removeprefix(theme))
                    if place is None or not member.isfile():
                        continue
                    name, context, bucket, pixels = place
                    old = best.get((name, bucket))
                    if old is None or _rank(pixels, path) < _rank(old.pixels, old.path):
                        content = archive.extractfile(member)
                        assert content is not None
                        drawing = Drawing(hand, name, context, bucket, pixels, path, content.read())
                        best[name, bucket] = drawing
        except tarfile.TarError:
            process.kill()
    if process.returncode:
        raise UserError(f"'{package}' is no readable Debian package: remove it and start again")
    drawings = {drawing.path: drawing for drawing in best.values()}
    for path in sorted(links):
        place = _place(path.removeprefix(theme))
        target = drawings.get(_resolve(path, links))
        if place is not None and target is not None and place[0] not in (target.name, *target.aliases):
            target.aliases.append(place[0])
    return sorted(drawings.values(), key=lambda d: d.key)


def _place(path: str) -> tuple[str, str, str, int] | None:
    """Name, context, bucket and size that a path inside a theme stands for; None if it is no icon of ours."""
    *folders, file = path.split("/")
    name, extension = os.path.splitext(file)
    context = next((CONTEXTS[f] for f in folders if f in CONTEXTS), None)
    if extension not in (".png", ".svg") or context is None:
        return None
    if "animations" in folders or any("@" in f for f in folders):  # frames; the same at twice the pixels
        return None
    pixels = next((int(m[0]) for f in folders if (m := re.match(r"\d+", f))), 1000)
    bucket = "small" if pixels <= 18 else "medium" if pixels < 42 else "large"
    if name.endswith("-symbolic") or "symbolic" in folders:
        bucket = "symbolic"
    return name.removesuffix("-symbolic"), context, bucket, pixels


def _rank(pixels: int, path: str) -> tuple[int, str]:
    return (SIZES.index(pixels) if pixels in SIZES else len(SIZES), path)


def _resolve(path: str, links: dict[str, str]) -> str:
    """Follow links of files and of folders, at most a few deep."""
    for _ in range(8):
        parts = path.split("/")
        for n in range(len(parts), 0, -1):
            head = "/".join(parts[:n])
            if head in links:
                path = posixpath.normpath(posixpath.join(links[head], *parts[n:]))
                break
        else:
            break
    return path


def read_themes(files: dict[str, Path], hands: dict[str, tuple[str, str]], workers: int) -> list[Drawing]:
    """The drawings of several hands, sorted by key."""
    jobs = list(hands.items())
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda job: read_theme(files[job[1][0]], job[0]), jobs)
        bar = tqdm(found, total=len(jobs), desc="reading icon themes", unit="theme")
        return sorted((d for drawings in bar for d in drawings), key=lambda d: d.key)


# --- pictures -------------------------------------------------------------------------------------------


def render(drawing: Drawing) -> np.ndarray | None:
    """RGBA pixels [SIZE, SIZE, 4] uint8; None for an unreadable or an empty drawing."""
    import resvg_py

    try:
        data = drawing.data
        if drawing.path.endswith(".svg"):
            text = data.decode("utf-8")
            data = bytes(
                resvg_py.svg_to_bytes(svg_string=text, width=SIZE, height=SIZE, skip_system_fonts=True)
            )
        image = Image.open(io.BytesIO(data)).convert("RGBA")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:  # a panic of the SVG renderer (pyo3's PanicException) is no Exception
        return None
    side = max(image.size)
    if image.size != (side, side):
        square = Image.new("RGBA", (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if side != SIZE:  # premultiplied (RGBa), or the colour of invisible pixels would bleed into the edges
        image = image.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGBA")
    pixels = np.asarray(image)
    return None if pixels[..., 3].mean() < 2 else pixels


def render_all(drawings: Sequence[Drawing], workers: int) -> tuple[list[Drawing], np.ndarray]:
    """The drawings that could be rendered and their pixels [n, SIZE, SIZE, 4]."""
    kept, pictures = [], []
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(render, drawings)
        for drawing, pixels in tqdm(
            zip(drawings, results, strict=True), total=len(drawings), desc="rendering icons", unit="icon"
        ):
            if pixels is not None:
                kept.append(drawing)
                pictures.append(pixels)
    return kept, np.stack(pictures) if pictures else np.empty((0, SIZE, SIZE, 4), np.uint8)


def in_chunks(function: Callable[[np.ndarray], np.ndarray], pictures: np.ndarray) -> np.ndarray:
    """``function`` over at most 1024 pictures at a time: the float copies stay small."""
    return np.concatenate([function(pictures[i : i + 1024]) for i in range(0, max(1, len(pictures)), 1024)])


def on_paper(pictures: np.ndarray) -> np.ndarray:
    """RGBA [n, S, S, 4] → RGB [n, S, S, 3]: on white, or on dark gray where white would swallow the ink."""

    def flatten(chunk: np.ndarray) -> np.ndarray:
        p = chunk.astype(np.float32)
        colour, alpha = p[..., :3], p[..., 3:] / 255
        ink = (colour * alpha).sum((1, 2)).mean(-1) / alpha.sum((1, 2, 3)).clip(1e-6)
        dark = ((255 - colour) * alpha).max(-1) > 60
        pale = (ink > 200) & (dark.mean((1, 2)) < 0.02)
        paper = np.where(pale, 80.0, 255.0).astype(np.float32)[:, None, None, None]
        return (colour * alpha + paper * (1 - alpha) + 0.5).astype(np.uint8)

    return in_chunks(flatten, pictures)


def one_ink(pictures: np.ndarray) -> np.ndarray:
    """Whether the opaque pixels of each RGBA picture have one colour (spread below 12 of 255), [n] bool."""

    def measure(chunk: np.ndarray) -> np.ndarray:
        p = chunk.astype(np.float32)
        opaque = (p[..., 3:] > 200).astype(np.float32)
        count = opaque.sum((1, 2)).clip(1)
        mean = (p[..., :3] * opaque).sum((1, 2)) / count
        square = (((p[..., :3] - mean[:, None, None]) ** 2) * opaque).sum((1, 2)) / count
        return np.sqrt(square).max(-1) < 12

    return in_chunks(measure, pictures)


def fingerprints(rgb: np.ndarray) -> np.ndarray:
    """[n, 576] float32 whose dot products are the correlations of the pictures' 24 × 24 luminances.

    Blind to colour and contrast on purpose: many themes are another's drawings in new colours.
    """
    out = np.empty((len(rgb), 24 * 24), np.float32)
    for i, picture in enumerate(rgb):
        small = Image.fromarray(picture).convert("L").resize((24, 24), Image.Resampling.BOX)
        out[i] = np.asarray(small, np.float32).ravel()
    out -= out.mean(1, keepdims=True)
    return out / np.linalg.norm(out, axis=1, keepdims=True).clip(1e-6)


# --- the split ------------------------------------------------------------------------------------------


def _unit(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def ambiguous(labels: np.ndarray, rgb: np.ndarray, prints: np.ndarray) -> np.ndarray:
    """Pictures [n] bool that stand, as good as pixel for pixel, for another class too."""
    bad = np.zeros(len(labels), bool)
    for start in range(0, len(labels), 2048):
        rows, columns = np.nonzero(prints[start : start + 2048] @ prints.T > 0.995)
        for i, j in zip(rows + start, columns, strict=True):
            if labels[i] != labels[j] and np.abs(rgb[i].astype(int) - rgb[j]).mean() < 3:
                bad[i] = True
    return bad


def groups(labels: np.ndarray, styles: Sequence[str], prints: np.ndarray) -> np.ndarray:
    """Group number [n]: drawings of one class that are in one style, or look alike, stay together."""
    group = np.arange(len(labels))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        alike = prints[members] @ prints[members].T > SAME_CLASS_ALIKE
        for a in range(len(members)):
            for b in range(a):
                if alike[a, b] or styles[members[a]] == styles[members[b]]:
                    group[root(members[a])] = root(members[b])
    return np.array([root(i) for i in range(len(labels))])


def split(labels: np.ndarray, families: np.ndarray, group: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """Which pictures are test pictures, [n] bool: whole groups, by hash.

    Per class the groups with a drawing of the training family take turns, the first to training, so that every
    class has something to learn from; every other group is a coin toss.
    """
    members: dict[tuple[str, str], np.ndarray] = {}
    for number in np.unique(group):
        rows = np.flatnonzero(group == number)
        members[labels[rows[0]], min(keys[int(i)] for i in rows)] = rows
    test = np.zeros(len(labels), bool)
    turn: Counter[str] = Counter()
    for (label, key), rows in sorted(members.items(), key=lambda item: _unit(":".join(item[0]))):
        if (families[rows] == TRAIN_FAMILY).any():
            test[rows] = turn[label] % 2 == 1
            turn[label] += 1
        else:
            test[rows] = _unit(f"{label}:{key}") < 0.5
    return test


def _repeats(labels: np.ndarray, families: np.ndarray, prints: np.ndarray) -> np.ndarray:
    """Pictures [n] bool that show the same as an earlier one of their class and family."""
    repeat = np.zeros(len(labels), bool)
    together: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, place in enumerate(zip(labels, families, strict=True)):
        kept = together[place]
        repeat[i] = bool(kept) and bool((prints[kept] @ prints[i]).max() > IDENTICAL)
        if not repeat[i]:
            kept.append(i)
    return repeat


# --- the benchmark --------------------------------------------------------------------------------------


@dataclass
class _Pictures:
    """Rendered drawings of the benchmark's classes and their sides."""

    drawings: list[Drawing]
    rgb: np.ndarray
    labels: np.ndarray
    families: np.ndarray
    prints: np.ndarray
    test: np.ndarray
    ambiguous: int


def _benchmark_pictures(drawings: list[Drawing], classes: dict[str, str], workers: int) -> _Pictures:
    named = [d for d in drawings if d.hand in HANDS and class_of(d, classes)]
    named, rgba = render_all(named, workers)
    rgb = on_paper(rgba)
    lines = one_ink(rgba)
    labels = np.array([class_of(d, classes) for d in named], dtype=object)
    families = np.array(
        [LINE if line else HANDS[d.hand][1] for d, line in zip(named, lines, strict=True)], dtype=object
    )
    prints = fingerprints(rgb)
    bad = ambiguous(labels, rgb, prints)
    keep = np.flatnonzero(~bad)
    named = [named[i] for i in keep]
    rgb, labels, families, prints = rgb[keep], labels[keep], families[keep], prints[keep]
    styles = [f"{d.hand}/{line}" for d, line in zip(named, lines[keep], strict=True)]
    test = split(labels, families, groups(labels, styles, prints), [d.key for d in named])
    return _Pictures(named, rgb, labels, families, prints, test, int(bad.sum()))


def prepare(root: Path, workers: int = 2) -> Benchmark:
    """The benchmark below ``root``, built when it is not there yet (about 100 MB to download).

    Downloaded packages are kept in ``packages`` beside ``root``.

    Raises:
        UserError: packages that cannot be had; see :func:`download`.
    """
    if not _is_prepared(root):
        shutil.rmtree(root, ignore_errors=True)
        files = download(sorted({package for package, _ in HANDS.values()}), root.parent / "packages")
        drawings = read_themes(files, HANDS, workers)
        with whole_folder(root) as folder:
            _write(folder, files, drawings, workers)
    return Benchmark(
        train_data=root / "train.csv",
        eval_data={family: root / "eval" / f"{family}.csv" for family in KINDS},
        kinds=dict(KINDS),
        classes=root / "classes.json",
    )


def _is_prepared(root: Path) -> bool:
    manifest = root / "manifest.json"
    return manifest.is_file() and json.loads(manifest.read_text()).get("recipe") == RECIPE


def _write(folder: Path, files: dict[str, Path], drawings: list[Drawing], workers: int) -> None:
    classes, phrases = read_classes()
    known = {d.name for d in drawings}
    p = _benchmark_pictures(drawings, classes, workers)
    train = ~p.test & (p.families == TRAIN_FAMILY)
    learnt = set(p.labels[train])
    chosen = p.test & np.array([label in learnt for label in p.labels], bool)
    rows = np.flatnonzero(chosen)
    repeat = _repeats(p.labels[rows], p.families[rows], p.prints[rows])
    chosen[rows[repeat]] = False

    texts = [captions(d, c, phrases[c], known) for d, c in zip(p.drawings, p.labels, strict=True)]
    sets = {"train": train} | {f"eval/{family}": chosen & (p.families == family) for family in KINDS}
    with tqdm(total=int(sum(s.sum() for s in sets.values())), desc="writing pictures", unit="icon") as bar:
        for name, members in sets.items():
            path = folder / f"{name}.csv"
            path.parent.mkdir(exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(("image", "label", "captions"))
                for i in np.flatnonzero(members):
                    picture = folder / "pictures" / f"{p.drawings[i].key}.png"
                    picture.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(p.rgb[i]).save(picture)
                    relative = os.path.relpath(picture, path.parent)
                    writer.writerow((relative, p.labels[i], "|".join(dict.fromkeys(texts[i]))))
                    bar.update()
    prompts = {label: list(dict.fromkeys([*phrases[label], words(label)])) for label in sorted(learnt)}
    (folder / "classes.json").write_text(json.dumps(prompts, indent=1))
    manifest = {
        "recipe": RECIPE,
        "packages": {name: _describe(name, path) for name, path in sorted(files.items())},
        "sets": {
            name: {
                "pictures": int(members.sum()),
                "classes": len(set(p.labels[members])),
                "hands": dict(Counter(p.drawings[i].hand for i in np.flatnonzero(members))),
            }
            for name, members in sets.items()
        },
        "left_out": {
            "stands for two classes": p.ambiguous,
            "test picture that repeats another": int(repeat.sum()),
            "test picture of a class without training pictures": int((p.test & ~chosen).sum() - repeat.sum()),
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


# --- pretraining ----------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """Pictures to pretrain on: ``pictures`` premultiplied RGBA [n, S, S, 4] uint8, ``captions`` [n] lists,
    ``labels`` [n] int64 (pictures of one name share one), ``named`` [n] bool: of a benchmark class.
    """

    pictures: np.ndarray
    captions: list[list[str]]
    labels: np.ndarray
    named: np.ndarray


def pretraining_pictures(folder: Path, size: int, workers: int = 2) -> Corpus:
    """All drawings of all hands whose name two hands know, without the benchmark's own pictures.

    Left out: the test pictures and whatever looks like one; the training pictures, so that fine-tuning has
    something to learn; drawings that stand for two classes. About 250 MB are downloaded to ``packages`` below
    ``folder``.
    """
    hands = HANDS | MORE_HANDS
    files = download(sorted({package for package, _ in hands.values()}), folder / "packages")
    drawings = read_themes(files, hands, workers)
    return corpus(drawings, *read_classes(), size=size, workers=workers)


def corpus(
    drawings: list[Drawing],
    classes: dict[str, str],
    phrases: dict[str, list[str]],
    *,
    size: int,
    workers: int = 2,
) -> Corpus:
    """See :func:`pretraining_pictures`."""
    p = _benchmark_pictures(drawings, classes, workers)
    own = {d.path for d in drawings if d.hand in HANDS and class_of(d, classes)}
    kept = {d.path for d, test, family in zip(p.drawings, p.test, p.families, strict=True)
            if not test and family != TRAIN_FAMILY}  # fmt: skip
    hands_of: dict[str, set[str]] = defaultdict(set)
    for d in drawings:
        hands_of[d.name].add(d.hand)
    pool = [
        d
        for d in drawings
        if (d.path in kept if d.path in own else len(hands_of[d.name]) > 1 or class_of(d, classes))
    ]
    pool, rgba = render_all(pool, workers)
    labels = [class_of(d, classes) for d in pool]

    prints, test_prints = fingerprints(on_paper(rgba)), p.prints[p.test]
    test_labels, near = p.labels[p.test], np.zeros(len(pool), bool)
    for start in range(0, len(pool), 2048):
        same = np.array(labels[start : start + 2048], dtype=object)[:, None] == test_labels[None]
        limit = np.where(same, SAME_CLASS_ALIKE, ANY_CLASS_ALIKE)
        near[start : start + 2048] = (prints[start : start + 2048] @ test_prints.T > limit).any(1)
    keep = np.flatnonzero(~near)

    known = set(hands_of)
    titles = [labels[i] or pool[i].name for i in keep]
    number = {title: n for n, title in enumerate(sorted(set(titles)))}
    return Corpus(
        pictures=np.stack([_premultiplied(rgba[i], size) for i in keep]),
        captions=[captions(pool[i], labels[i], phrases.get(labels[i], ()), known) for i in keep],
        labels=np.array([number[title] for title in titles]),
        named=np.array([bool(labels[i]) for i in keep]),
    )


def _premultiplied(rgba: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(rgba).convert("RGBa").resize((size, size), Image.Resampling.BOX))


# --- the small CLIP that is pretrained on them ----------------------------------------------------------


def demo_tokenizer() -> open_clip.SimpleTokenizer:
    """open_clip's tokenizer with only the first of its merges: the small vocabulary of the demo's model."""
    from open_clip import tokenizer

    config = json.loads((ASSETS / "tracer-demo.json").read_text())["text_cfg"]
    merges = config["vocab_size"] - 2 * 256 - 2  # bytes inside and at the end of words, start and end of text
    lines = gzip.decompress(Path(tokenizer.default_bpe()).read_bytes()).decode("utf-8").split("\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "merges.txt.gz"
        path.write_bytes(gzip.compress("\n".join(lines[: 1 + merges]).encode()))
        return tokenizer.SimpleTokenizer(bpe_path=str(path), context_length=config["context_length"])


def demo_model(checkpoint: Path | None = CHECKPOINT) -> open_clip.CLIP:
    """The demo's model with the weights of ``checkpoint``, in float32; untrained for None."""
    import open_clip
    from safetensors.torch import load_file

    model = open_clip.CLIP(**json.loads((ASSETS / "tracer-demo.json").read_text()))
    if checkpoint is not None:
        model.load_state_dict({name: value.float() for name, value in load_file(checkpoint).items()})
    return model
