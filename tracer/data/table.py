"""Reader of CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from tracer.data.sample import Sample
from tracer.data.text import default_caption
from tracer.errors import UserError

CAPTION_SEPARATOR = "|"


def read_table(source: Path) -> Iterator[Sample]:
    """Yield the rows of a CSV file with the columns ``image``, and ``label`` or ``captions`` or both.

    Paths of pictures are relative to the file; captions are divided by ``|``. A row without captions gets one
    made from its label; a row without a label is a class of its own, named like its picture.

    Raises:
        UserError: the file is not UTF-8 or not CSV, a column is missing, or a row names no picture or neither
            label nor caption.
    """
    try:
        with source.open(
            newline="", encoding="utf-8-sig"
        ) as file:  # Excel begins a file with a byte-order mark
            rows = csv.DictReader(file)
            _check_columns(source, set(rows.fieldnames or []))
            for row in rows:
                yield _sample(source, rows.line_num, row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"'{source}' is not CSV in UTF-8: {error}: save it as CSV in UTF-8, or give a folder of class folders"
        ) from error


def _check_columns(source: Path, columns: set[str]) -> None:
    if "image" not in columns or not columns & {"label", "captions"}:
        raise UserError(
            f"'{source}' has the columns {', '.join(sorted(columns)) or 'none'}: "
            "it needs 'image' and at least one of 'label' and 'captions'"
        )


def _sample(source: Path, line: int, row: dict[str, str]) -> Sample:
    image, label = row["image"], (row.get("label") or "").strip()
    captions = [text.strip() for text in (row.get("captions") or "").split(CAPTION_SEPARATOR)]
    captions = [text for text in captions if text]
    if not image or not (captions or label):
        raise UserError(f"'{source}' line {line}: needs a picture and a label or a caption")
    return Sample(source.parent / image, label or image, captions or [default_caption(label)])
