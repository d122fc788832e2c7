"""The reader of CSV files."""

from __future__ import annotations

import csv
from pathlib import Path

from tracer.data.text import default_caption
from tracer.errors import UserError


def _read_csv(source: Path) -> tuple[list[Path], list[str], list[list[str]]]:
    with source.open(newline="", encoding="utf-8-sig") as file:  # Excel begins a file with a byte-order mark
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or [])
        if "image" not in columns or not columns & {"label", "captions"}:
            raise UserError(
                f"'{source}' has the columns {', '.join(sorted(columns)) or 'none'}: "
                "it needs 'image' and at least one of 'label' and 'captions'"
            )
        images, labels, captions = [], [], []
        for row in reader:
            texts = [c.strip() for c in (row.get("captions") or "").split("|") if c.strip()]
            label = (row.get("label") or "").strip()
            if not row["image"] or not (texts or label):
                raise UserError(
                    f"'{source}' line {reader.line_num}: needs a picture and a label or a caption"
                )
            images.append(source.parent / row["image"])
            labels.append(label or row["image"])
            captions.append(texts or [default_caption(label)])
    return images, labels, captions
