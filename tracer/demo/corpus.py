"""The pictures that the small CLIP is pretrained on, apart from the benchmark's own."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tracer.demo.benchmark import Pictures, labelled_pictures
from tracer.demo.captions import captions, class_of, read_classes
from tracer.demo.packages import download
from tracer.demo.render import on_paper, render_all
from tracer.demo.split import ANY_CLASS_ALIKE, SAME_CLASS_ALIKE, fingerprints
from tracer.demo.themes import PRETRAINING_THEMES, THEMES, TRAIN_FAMILY, Icon, read_themes


@dataclass
class Corpus:
    """Pictures to pretrain on.

    ``pictures`` premultiplied RGBA [n, S, S, 4] uint8, ``captions`` [n] lists, ``labels`` [n] int64 (pictures
    of one name share a label), ``named`` [n] bool: the picture is of a benchmark class.
    """

    pictures: np.ndarray
    captions: list[list[str]]
    labels: np.ndarray
    named: np.ndarray


def download_corpus(folder: Path, size: int, workers: int = 2) -> Corpus:
    """Return the corpus of all themes, in pictures of ``size`` pixels.

    About 250 MB are downloaded to ``packages`` below ``folder``; what is there is kept.

    Raises:
        UserError: a package cannot be downloaded; see :func:`tracer.demo.packages.download`.
    """
    themes = THEMES | PRETRAINING_THEMES
    files = download(sorted({package for package, _ in themes.values()}), folder / "packages")
    classes, phrases = read_classes()
    return build_corpus(read_themes(files, themes, workers), classes, phrases, size=size, workers=workers)


def build_corpus(
    icons: list[Icon],
    classes: dict[str, str],
    phrases: dict[str, list[str]],
    *,
    size: int,
    workers: int = 2,
) -> Corpus:
    """Return the corpus of the icons whose name at least two themes know or that belong to a class.

    These are left out: the benchmark's test pictures and whatever looks like one of them; its training
    pictures, so that fine-tuning has something to learn; icons that stand for two classes.

    Args:
        classes: icon name → class.
        phrases: class → phrases for captions.
    """
    benchmark = labelled_pictures(icons, classes, workers)
    themes_of: dict[str, set[str]] = defaultdict(set)
    for icon in icons:
        themes_of[icon.name].add(icon.theme)
    pool, rgba = render_all(_allowed(icons, classes, themes_of, benchmark), workers)
    labels = [class_of(icon, classes) for icon in pool]
    keep = np.flatnonzero(~_like_a_test_picture(labels, fingerprints(on_paper(rgba)), benchmark))

    known = set(themes_of)
    titles = [labels[i] or pool[i].name for i in keep]
    number = {title: n for n, title in enumerate(sorted(set(titles)))}
    return Corpus(
        pictures=np.stack([_premultiplied(rgba[i], size) for i in keep]),
        captions=[captions(pool[i], labels[i], phrases.get(labels[i], ()), known) for i in keep],
        labels=np.array([number[title] for title in titles]),
        named=np.array([bool(labels[i]) for i in keep]),
    )


def _allowed(
    icons: list[Icon], classes: dict[str, str], themes_of: dict[str, set[str]], benchmark: Pictures
) -> list[Icon]:
    """Return the icons that are not of the benchmark, and of its own those on neither of its sides."""
    own = {icon.path for icon in icons if icon.theme in THEMES and class_of(icon, classes)}
    sides = zip(benchmark.icons, benchmark.test, benchmark.families, strict=True)
    unused = {icon.path for icon, test, family in sides if not test and family != TRAIN_FAMILY}
    return [
        icon
        for icon in icons
        if (
            icon.path in unused
            if icon.path in own
            else len(themes_of[icon.name]) > 1 or class_of(icon, classes)
        )
    ]


def _like_a_test_picture(labels: list[str], prints: np.ndarray, benchmark: Pictures) -> np.ndarray:
    """Return which pictures, [n] bool, look like a test picture of the benchmark."""
    test_prints, test_labels = benchmark.prints[benchmark.test], benchmark.labels[benchmark.test]
    alike = np.zeros(len(prints), bool)
    for start in range(0, len(prints), 2048):
        rows = slice(start, start + 2048)
        same = np.array(labels[rows], dtype=object)[:, None] == test_labels[None]
        limit = np.where(same, SAME_CLASS_ALIKE, ANY_CLASS_ALIKE)
        alike[rows] = (prints[rows] @ test_prints.T > limit).any(1)
    return alike


def _premultiplied(rgba: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(rgba).convert("RGBa").resize((size, size), Image.Resampling.BOX))
