"""iWildCam 2.0 and FMoW 1.1 as WILDS (arXiv 2012.07421) lays them out: a metadata CSV and a folder of pictures."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tracer.data.build import index_samples
from tracer.data.config import LoadingSettings
from tracer.data.sample import Sample
from tracer.data.text import words
from tracer.errors import UserError
from tracer.evaluation.prompts import class_prompts
from tracer.evaluation.sets import EvaluationSet

SPLITS = ("id_val", "id_test", "test")
ALL_SPLITS = ("train", "id_val", "id_test", "val", "test")
IWILDCAM, FMOW = "metadata.csv", "rgb_metadata.csv"

# FLYP's prompts for iWildCam (arXiv 2212.00638), with the names of categories.csv; those for FMoW are of our own.
IWILDCAM_TEMPLATES = ["a photo of {}.", "{} in the wild."]
FMOW_TEMPLATES = ["a satellite photo of a {}.", "an aerial photo of a {}."]
NO_COUNTRY = "Other"  # WILDS' region of a country that its table does not name; it is never the worst region
OOD_VAL, OOD_TEST = "2013", "2016"  # the years in which FMoW's shifted validation and test begin

Row = dict[str, str]


def read_wilds(path: Path, name: str, loading: LoadingSettings) -> list[EvaluationSet]:
    """Return the sets of the splits of iWildCam or FMoW in a folder; none where it holds neither.

    Args:
        path: the folder, or ``folder:SPLIT`` for one of the splits id_val, id_test, test, val and train.
        name: of the set; the sets of several splits are called ``name-split``.
        loading: how pictures are read.

    Raises:
        UserError: the split is unknown or empty, a column or a table is missing, or a class is unknown.
    """
    folder, split = _split_of(path)
    iwildcam = (folder / IWILDCAM).is_file() and (folder / "categories.csv").is_file()
    fmow = (folder / FMOW).is_file()
    if not iwildcam and not fmow and _is_metadata(folder / IWILDCAM):
        raise UserError(
            f"'{folder / 'categories.csv'}' is missing, which names iWildCam's classes: unpack it from its "
            f"download"
        )
    if not iwildcam and not fmow:
        return []
    if split and split not in ALL_SPLITS:
        raise UserError(
            f"--eval_data.{name} {path}: there is no split '{split}': the splits are {', '.join(ALL_SPLITS)}"
        )
    read = _iwildcam if iwildcam else _fmow
    if split:
        return [read(folder, name, split, loading)]
    return [read(folder, f"{name}-{each}", each, loading) for each in SPLITS]


def _split_of(path: Path) -> tuple[Path, str]:
    if path.is_dir():
        return path, ""
    folder, colon, split = str(path).rpartition(":")
    return (Path(folder), split) if colon and Path(folder).is_dir() else (path, "")


def _is_metadata(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open(encoding="utf-8-sig") as file:
        return "location_remapped" in file.readline()


def _rows(path: Path, columns: str) -> Iterator[Row]:
    """Yield the rows of a CSV file that has these columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = sorted(set(columns.split()) - set(rows.fieldnames or ()))
            if missing:
                raise UserError(
                    f"'{path}' lacks the column '{missing[0]}': unpack it again from its download"
                )
            yield from rows
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): unpack it from its download") from error


def _iwildcam(folder: Path, name: str, split: str, loading: LoadingSettings) -> EvaluationSet:
    """Return iWildCam's pictures of a split, grouped by camera; it is published as macro-F1."""
    rows, highest = [], -1
    for row in _rows(folder / IWILDCAM, "split y filename location_remapped"):
        highest = max(highest, int(row["y"]))
        if row["split"] == split:
            rows.append(row)
    _refuse_no_rows(rows, folder / IWILDCAM, split)
    species = {row["y"]: row["name"] for row in _rows(folder / "categories.csv", "y name")}
    classes = [str(n) for n in range(highest + 1)]  # as WILDS counts them
    unnamed = [n for n in classes if n not in species]
    if unnamed:
        raise UserError(f"'{folder / 'categories.csv'}' has no name for class {unnamed[0]}: unpack it again")
    samples = [Sample(str(folder / "train" / row["filename"]), row["y"], ()) for row in rows]
    index = index_samples(name, samples, loading)
    camera = {sample.file: row["location_remapped"] for sample, row in zip(samples, rows, strict=True)}
    return EvaluationSet(
        index,
        "iWildCam 2.0",
        len(rows),
        prompts=class_prompts(None, classes, species, IWILDCAM_TEMPLATES),
        groups=_numbers([camera[str(image)] for image in index.images]),
        grouped_by="camera",
        measure="macro_f1",
    )


def _fmow(folder: Path, name: str, split: str, loading: LoadingSettings) -> EvaluationSet:
    """Return FMoW's pictures of a split, grouped by country; under shift it is published by its worst region.

    The shifted validation and test sets begin in 2013 and 2016. File ``rgb_img_N.png`` belongs to row N.
    """
    table = folder / "country_code_mapping.csv"
    region_of = {row["alpha-3"]: row["region"] for row in _rows(table, "alpha-3 region")}
    rows, categories = [], set()
    for number, row in enumerate(_rows(folder / FMOW, "split timestamp category country_code")):
        if row["split"] == "seq":
            continue
        categories.add(row["category"])
        if _fmow_split(row) == split:
            rows.append((number, row))
    _refuse_no_rows([row for _, row in rows], folder / FMOW, split)
    samples = [Sample(str(folder / "images" / f"rgb_img_{n}.png"), row["category"], ()) for n, row in rows]
    index = index_samples(name, samples, loading)
    country = {sample.file: row["country_code"] for sample, (_, row) in zip(samples, rows, strict=True)}
    countries = [country[str(image)] for image in index.images]
    ids = sorted(categories)
    return EvaluationSet(
        index,
        "FMoW 1.1",
        len(rows),
        prompts=class_prompts(None, ids, {c: words(c) for c in ids}, FMOW_TEMPLATES),
        groups=_numbers(countries),
        grouped_by="country",
        regions=[region_of.get(code) or NO_COUNTRY for code in countries],
        measure="worst_region" if split in ("val", "test") else "accuracy",
    )


def _fmow_split(row: Row) -> str:
    """Return the split that WILDS gives a row; empty for a picture that it uses nowhere."""
    year = row["timestamp"][:4]
    own = {"train": "train", "val": "id_val", "test": "id_test"}
    if year < OOD_VAL:
        return own.get(row["split"], "")
    shifted = "val" if year < OOD_TEST else "test"
    return shifted if row["split"] == shifted else ""


def _refuse_no_rows(rows: list[Row], path: Path, split: str) -> None:
    if not rows:
        raise UserError(
            f"'{path}' has no rows of the split '{split}': check the file, or give another of "
            f"{', '.join(ALL_SPLITS)}"
        )


def _numbers(names: list[str]) -> np.ndarray:
    return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)
