"""Miniatures of published evaluation sets, laid out as their downloads are."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from tracer.models.imagenet import names, wnids

COLOURS = np.random.default_rng(5).integers(0, 256, (4000, 3))


def picture(path: Path, number: int, border: int = 0) -> None:
    """Write a picture of one colour, framed in red if it has a border."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 6 + 2 * border
    image = Image.new("RGB", (size, size), (255, 0, 0))
    image.paste(tuple(int(c) for c in COLOURS[number]), (border, border, size - border, size - border))
    image.save(path, format="PNG")


def class_folders(root: Path, folders: Iterable[str], file: str) -> Path:
    """Write a picture into each folder; ``{}`` in ``file`` is its number."""
    for number, folder in enumerate(folders):
        picture(root / folder / file.format(number), number)
    return root


def imagenet(root: Path) -> Path:
    return class_folders(root, wnids(), "ILSVRC2012_val_{:08d}.png")


def sketch(root: Path) -> Path:
    return class_folders(root, wnids()[:60], "sketch_{}.JPEG")


def v2(root: Path) -> Path:
    return class_folders(root, map(str, range(1000)), "{:040x}.jpeg")


def adversarial(root: Path) -> Path:
    return class_folders(root, wnids("a"), "0.00{}_digital clock _ digital clock_0.865662.jpg")


def renditions(root: Path) -> Path:
    return class_folders(root, wnids("r"), "art_{}.jpg")


OBJECTNET = {  # folder: label, and the names of its ImageNet classes by their numbers
    "alarm_clock": ("Alarm clock", [409, 530]),
    "tie": ("Tie", [906, 457]),
    "banana": ("Banana", [954]),
}


def objectnet(root: Path, border: int = 2) -> Path:
    """Write three classes that are ImageNet's, two pictures each, and one that is not."""
    for number, folder in enumerate([*OBJECTNET, "air_freshener"]):
        for n in range(2):
            picture(root / "images" / folder / f"{n}.png", 2 * number + n, border)
    labels = [f"{name}, a kind of {n}" for n, name in enumerate(names().values())]
    # Lines are in another order than the class numbers: that is what the last mapping is for.
    lines = np.random.default_rng(0).permutation(1000)  # the class of each line
    mappings = root / "mappings"
    mappings.mkdir()
    folder_to_label = {f: label for f, (label, _) in OBJECTNET.items()} | {"air_freshener": "Air freshener"}
    (mappings / "folder_to_objectnet_label.json").write_text(json.dumps(folder_to_label))
    to_imagenet = {label: "; ".join(labels[n] for n in numbers) for label, numbers in OBJECTNET.values()}
    (mappings / "objectnet_to_imagenet_1k.json").write_text(json.dumps(to_imagenet))
    (mappings / "imagenet_to_label_2012_v2").write_text("\n".join(labels[n] for n in lines))
    numbers = {str(n): line for line, n in enumerate(lines.tolist())}
    (mappings / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps(numbers))
    return root


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def iwildcam(root: Path) -> Path:
    """Write 40 pictures of four species (the last in training alone) at cameras that the splits do not share."""
    rows = []
    splits = ("train", "val", "id_val", "id_test", "test")
    for n in range(40):
        split = splits[n % 5]
        y = 3 if split == "train" and n < 5 else (n // 5) % 3
        rows.append({"": n, "split": split, "location_remapped": 10 * (n % 5) + n // 10, "y": y})
        rows[-1] |= {"category_id": 7 * y, "filename": f"{n:04d}.jpg", "sequence_remapped": n}
        picture(root / "train" / f"{n:04d}.jpg", n)
    write_csv(root / "metadata.csv", rows)
    species = ["empty", "tayassu pecari", "dasyprocta punctata", "cuniculus paca"]
    write_csv(
        root / "categories.csv", [{"y": y, "category_id": 7 * y, "name": n} for y, n in enumerate(species)]
    )
    return root


FMOW_ROWS = [  # official split, time, category, country
    ("train", "2010-05-01T10:00:00Z", "airport", "USA"),
    ("seq", "2010-05-01T10:00:00Z", "zoo", "USA"),
    ("val", "2011-05-01T10:00:00Z", "barn", "USA"),
    ("val", "2014-05-01T10:00:00Z", "barn", "KEN"),
    ("test", "2012-12-31T23:59:59Z", "airport", "USA"),
    ("test", "2012-05-01T10:00:00Z", "barn", "KEN"),
    ("test", "2014-05-01T10:00:00Z", "barn", "KEN"),  # in no split
    ("val", "2009-05-01T10:00:00Z", "airport", "KEN"),
    *[
        (
            "test",
            f"201{6 + n % 2}-01-01T00:00:00Z",
            ("airport", "barn", "zoo")[n % 3],
            ("USA", "KEN", "XXX", "JPN")[n % 4],
        )
        for n in range(24)
    ],
]


def fmow(root: Path) -> Path:
    for n, row in enumerate(FMOW_ROWS):
        if row[0] != "seq":
            picture(root / "images" / f"rgb_img_{n}.png", n)
    columns = ("split", "timestamp", "category", "country_code")
    write_csv(root / "rgb_metadata.csv", [dict(zip(columns, row, strict=True)) for row in FMOW_ROWS])
    regions = [("USA", "Americas"), ("KEN", "Africa"), ("JPN", "Asia")]
    write_csv(root / "country_code_mapping.csv", [{"alpha-3": c, "region": r} for c, r in regions])
    return root


def captions(n: int) -> list[str]:
    """Return the captions of picture n: five for most, and a text that two pictures share."""
    return [f"caption {k} of {n}" for k in range(4 if n % 3 else 5)] + ["a picture, shared"] * (n < 2)


def karpathy(root: Path, pictures: int = 6) -> Path:
    images = []
    for n in range(pictures + 2):
        split = "test" if n < pictures else ("train", "restval")[n - pictures]
        sentences = [{"raw": f" {text}"} for text in captions(n)]
        images.append({"filepath": "val2014", "filename": f"COCO_val2014_{n:012d}.jpg", "split": split})
        images[-1] |= {"sentences": sentences, "cocoid": n}
        picture(root / "val2014" / f"COCO_val2014_{n:012d}.jpg", n)
    (root / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    return root


def coco_of_clip_benchmark(root: Path, pictures: int = 6) -> Path:
    images, annotations = [], []
    for n in range(pictures):
        images.append({"id": 100 + n, "file_name": f"COCO_val2014_{n:012d}.jpg"})
        annotations += [
            {"image_id": 100 + n, "id": len(annotations), "caption": text} for text in captions(n)
        ]
        picture(root / "val2014" / f"COCO_val2014_{n:012d}.jpg", n)
    content = {"images": images, "annotations": annotations}
    (root / "coco_test_karpathy.json").write_text(json.dumps(content))
    return root / "coco_test_karpathy.json"


def flickr_of_clip_benchmark(root: Path, pictures: int = 6) -> Path:
    lines = ["image,caption"]
    for n in range(pictures):
        lines += [f"{n}.jpg,{text}" for text in captions(n)]
        picture(root / "Images" / f"{n}.jpg", n)
    (root / "flickr30k_test_karpathy.txt").write_text("\n".join(lines))
    return root / "flickr30k_test_karpathy.txt"


def coop(root: Path) -> Path:
    """Write CoOp's split of four classes, the last of which the test pictures do not show."""
    parts = {}
    for part, start in (("train", 0), ("val", 20), ("test", 40)):
        rows = [[f"{part}_{n}.jpg", n % (3 if part == "test" else 4), f"sort_{n % 4}"] for n in range(9)]
        rows = [[p, y, f"sort_{y}"] for p, y, _ in rows]
        for n, row in enumerate(rows):
            picture(root / "images" / row[0], start + n)
        parts[part] = rows
    (root / "split_zhou_Sorts.json").write_text(json.dumps(parts))
    return root / "split_zhou_Sorts.json"
