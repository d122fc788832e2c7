"""COCO and Flickr30k for retrieval: Karpathy's JSON, and the files of CLIP_benchmark; their test split alone."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tracer.data.build import index_samples
from tracer.data.config import LoadingSettings
from tracer.data.sample import Sample
from tracer.errors import UserError
from tracer.evaluation.sets import EvaluationSet
from tracer.words import counted

# The published sets by a part of a file's name: pictures of their test split, and folders of pictures beside
# the file.
SIZES = {"coco": ("COCO", 5_000), "flickr30k": ("Flickr30k", 1_000), "flickr8k": ("Flickr8k", 1_000)}
FOLDERS = ("", "images", "Images", "flickr30k-images", "flickr30k_images", "val2014", "train2014", "val2017")
OTHER_SPLITS = re.compile(r"(?<![a-z])(train|restval|val|dev)(?![a-z])")
NAMES = (
    "dataset_coco.json",
    "dataset_flickr30k.json",
    "dataset_flickr8k.json",
    "coco_test_karpathy.json",
    "flickr30k_test_karpathy.txt",
    "flickr8k_test_karpathy.txt",
)

Captioned = tuple[
    list[str], list[str]
]  # the paths that a file gives a picture, the best first, and its captions


def read_captions(path: Path, name: str, loading: LoadingSettings) -> list[EvaluationSet]:
    """Return the test split of COCO or Flickr30k; none where the path is another kind of data.

    Args:
        path: Karpathy's ``dataset_*.json``, CLIP_benchmark's ``coco_test_karpathy.json`` or
            ``flickr30k_test_karpathy.txt``, or the folder of one of them.
        name: of the set.
        loading: how pictures are read.

    Raises:
        UserError: the file holds another split, is damaged, or names pictures that are not beside it.
    """
    if path.is_dir():
        inside = [path / each for each in NAMES if (path / each).is_file()]
        if len(inside) > 1:
            raise UserError(f"'{path}' holds captions twice: give --eval_data.{name} '{inside[0]}'")
        return read_captions(inside[0], name, loading) if inside else []
    captioned = _captioned(path)
    if captioned is None:
        return []
    samples = list(_samples(path, captioned))
    index = index_samples(name, samples, loading)
    layout, expected = next((v for k, v in SIZES.items() if k in path.name.lower()), ("captions", None))
    return [EvaluationSet(index, layout, expected)]


def _captioned(path: Path) -> list[Captioned] | None:
    """Return what a file of captions says of each picture; None where it is not such a file."""
    if not path.is_file() or path.suffix.lower() not in (".json", ".txt"):
        return None
    if path.suffix.lower() == ".txt":
        return _flickr(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON in UTF-8 ({error}): download it again") from error
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        return None
    try:
        return _coco(path, content) if "annotations" in content else _karpathy(path, images)
    except (KeyError, TypeError) as error:
        raise UserError(f"'{path}' lacks {error} of a picture: download it again") from error


def _karpathy(path: Path, images: list[dict[str, Any]]) -> list[Captioned]:
    splits = Counter(image["split"] for image in images)
    if not splits["test"]:
        raise UserError(
            f"'{path}' has no pictures of the split test (it has {', '.join(sorted(splits - Counter(test=1)))}): "
            "retrieval is scored on test alone, so give Karpathy's whole file"
        )
    return [
        (
            [f"{image['filepath']}/{image['filename']}"] * ("filepath" in image) + [image["filename"]],
            [sentence["raw"].strip() for sentence in image["sentences"]],
        )
        for image in images
        if image["split"] == "test"
    ]


def _coco(path: Path, content: dict[str, Any]) -> list[Captioned]:
    """Read COCO's own format, in which CLIP_benchmark keeps Karpathy's test split."""
    _refuse_another_split(path)
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    return [([image["file_name"]], captions.get(image["id"], [])) for image in content["images"]]


def _flickr(path: Path) -> list[Captioned] | None:
    """Read CLIP_benchmark's text file: a header, then ``picture.jpg,caption`` on each line, without quotes."""
    captions: dict[str, list[str]] = {}
    with path.open(encoding="utf-8-sig") as file:
        if not re.fullmatch(r"image\w*,\s*caption\w*\s*", file.readline()):
            return None
        _refuse_another_split(path)
        for number, line in enumerate(file, 2):
            picture, comma, caption = line.strip().partition(".jpg,")
            if comma:
                captions.setdefault(f"{picture}.jpg", []).append(caption.strip())
            elif line.strip():
                raise UserError(
                    f"'{path}' line {number} is not 'picture.jpg,caption': download the file again"
                )
    return [([picture], texts) for picture, texts in captions.items()]


def _refuse_another_split(path: Path) -> None:
    other = OTHER_SPLITS.search(path.stem.lower().replace("val2014", "").replace("val2017", ""))
    whole = re.search(r"(captions_)?(train|val)20\d\d", path.stem.lower())
    if other or whole:
        split = (other or whole)[0]  # type: ignore[index]  # one of them is not None
        raise UserError(
            f"'{path}' holds captions of the split '{split}', not of test: give CLIP_benchmark's "
            "coco_test_karpathy.json or flickr30k_test_karpathy.txt, or Karpathy's dataset_*.json"
        )


def _samples(path: Path, captioned: list[Captioned]) -> Iterator[Sample]:
    """Yield the pictures, from whichever folder beside the file holds them."""
    places = [path.parent / folder for folder in FOLDERS]
    paths = [[place / name for name in names for place in places] for names, _ in captioned]
    there = [next((each for each in options if each.is_file()), None) for options in paths]
    if not any(there):
        raise UserError(
            f"'{path}' names {counted(len(captioned), 'picture')}, and none is beside it, first "
            f"'{captioned[0][0][0]}': "
            "its captions may be those of another split; put the file beside the folder of its pictures"
        )
    for file, options, (names, texts) in zip(there, paths, captioned, strict=True):
        if not texts:
            raise UserError(f"'{path}' has no caption for '{names[0]}': download the file again")
        yield Sample(str(file or options[0]), None, texts)
