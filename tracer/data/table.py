"""Reader of CSV, TSV and Parquet tables, row by row. A row or header that can be read in two ways is refused."""

from __future__ import annotations

import csv
import difflib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from tracer.data.names import is_hidden, is_picture, note
from tracer.data.sample import Fault, Sample
from tracer.errors import UserError, how_to_install
from tracer.words import counted

CAPTION_SEPARATOR = "|"

# The names of a column; the first that a table has is the one that is read. The fields of "captions" hold
# several texts, those of "title" one.
NAMES = {"image": ("image", "filepath"), "label": ("label",), "captions": ("captions", "title")}
# Names that other tools give the columns; one is asked about if the column itself is absent.
COLUMNS = {
    "image": {"file", "filename", "file_name", "file_path", "path", "image_path", "img", "picture"},
    "label": {"class", "class_name", "classname", "category", "target", "species"},
    "captions": {"text", "texts", "description", "prompt", "sentence", "alt"},
}  # fmt: skip
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons"}


def read_table(source: Path) -> Iterator[Sample | Fault]:
    """Yield the rows of a CSV, TSV or Parquet file, and a fault for each without a label and a caption.

    The columns are ``image`` or ``filepath``, and ``label``, ``captions`` or ``title``: one of them at least.
    Paths of pictures are relative to the file. Captions are divided by ``|``, a title is one. A row without a
    label has the label None. Rows that name a hidden file are left out, and a note counts them. Blanks around a
    field do not count.

    Raises:
        UserError: the file is not UTF-8 or not a table; its separator is not a comma, tab or semicolon; a column
            is missing, repeated, or named almost as one of these; a row has another number of fields than the
            header, an unclosed quote, or names no picture. The message names the line.
    """
    folder, hidden, last = f"{source.parent}{os.sep}", 0, ""
    rows = _parquet(source) if source.suffix.lower() == ".parquet" else _csv(source)
    for line, image, label, captions in rows:
        if image != last and is_hidden(_within(source, image)):  # parsing a path takes as long as the rest
            hidden += 1
        elif not captions and not label:
            yield Fault(f"{source} line {line}", "it has neither a label nor a caption")
        else:
            last = image
            yield Sample(os.path.join(folder, image), label, captions)
    if hidden:
        left_out = counted(hidden, "row that names a hidden file", "rows that name hidden files")
        note(f"'{source}': left out {left_out}")


def read_groups(source: Path) -> dict[Path, str]:
    """Return the field ``group`` of each picture in a table that :func:`read_table` has read.

    Nothing where it has no such column.
    """
    if source.suffix.lower() == ".parquet":
        file = _open_parquet(source)
        header = list(file.schema_arrow.names)
        picture = "image" if "image" in header else "filepath"
        rows = file.read(columns=[picture, "group"]).to_pylist() if "group" in header else []
        return {source.parent / str(row[picture]).strip(): str(_cell(row["group"])).strip() for row in rows}
    with source.open(newline="", encoding="utf-8-sig") as table:
        separator = _separator_of(source, table.readline())
        table.seek(0)
        fields = csv.DictReader(table, skipinitialspace=True, delimiter=separator)
        fields.fieldnames = header = [name.strip() for name in fields.fieldnames or []]
        if "group" not in header:
            return {}
        picture = "image" if "image" in header else "filepath"
        return {source.parent / row[picture].strip(): row["group"].strip() for row in fields}


Row = tuple[int, str, str | None, list[str]]  # line, picture, label and captions


def _csv(source: Path) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file."""
    line = 1
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:  # Excel begins a file with this mark
            separator = _separator_of(source, file.readline())
            file.seek(0)
            rows = csv.reader(file, strict=True, skipinitialspace=True, delimiter=separator)
            header = [name.strip() for name in next(rows, [])]
            columns = _columns(source, header)
            line = rows.line_num + 1  # where the next row begins: a quoted text may hold line breaks
            for cells in rows:
                if cells:  # a blank line has none; a row of empty fields is refused
                    _check_row(source, line, header, cells)
                    yield _row(source, line, columns, cells)
                line = rows.line_num + 1
    except UnicodeDecodeError as error:
        raise UserError(f"'{source}' is not CSV in UTF-8: {error}: {_SAVE}") from error
    except csv.Error as error:
        raise UserError(f"{_csv_fault(source, line, str(error))}") from error


def _separator_of(source: Path, header: str) -> str:
    """Return the separator by which the header names a picture column; a comma where none does."""
    names = {name for known in NAMES.values() for name in known}

    def known(separator: str) -> int:
        return sum(cell.strip().strip('"') in names for cell in header.split(separator))

    best = max(SEPARATORS, key=known)
    return best if known(best) else next((s for s in SEPARATORS if s in header), ",")


def _open_parquet(source: Path) -> Any:
    """Return the Parquet file, of which nothing but the header is read yet."""
    try:
        parquet = __import__("pyarrow.parquet", fromlist=["parquet"])
    except ImportError as error:
        raise UserError(
            f"'{source}' is a Parquet file, which {how_to_install('pyarrow')}, or save it as CSV"
        ) from error
    try:
        return parquet.ParquetFile(source)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise UserError(f"'{source}' is not a Parquet file ({error}): save it again, or as CSV") from error


def _parquet(source: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file, a batch of rows in memory at a time."""
    file = _open_parquet(source)
    header = list(file.schema_arrow.names)
    columns, line = _columns(source, header), 0
    wanted = [header[c] for c in columns[:3] if c is not None]
    _refuse_kinds(source, file.schema_arrow, wanted)
    batches = file.iter_batches(columns=wanted)
    while True:
        try:
            batch = next(batches, None)
            columns_ = [batch.column(name).to_pylist() for name in wanted] if batch else []
        except (OSError, ValueError, NotImplementedError) as error:  # the last: an unknown compression
            what = " ".join(str(error).split())[:200]
            raise UserError(f"'{source}' is damaged behind row {line} ({what}): copy it again") from error
        if batch is None:
            return
        for values in zip(*columns_, strict=True):
            line += 1
            cells: list[str | list[str]] = [""] * len(header)
            for name, value in zip(wanted, values, strict=True):
                cells[header.index(name)] = _cell(value)
            yield _row(source, line, columns, cells)


def _refuse_kinds(source: Path, schema: Any, wanted: list[str]) -> None:
    """Refuse columns of Parquet that hold anything but texts, numbers, and lists of them."""
    for name in wanted:
        kind = str(schema.field(name).type)
        if "struct<" in kind or "binary" in kind or "map<" in kind:
            raise UserError(
                f"'{source}' has a column '{name}' of {kind[:60]}: it must hold texts, and pictures are named by "
                "their paths, so write them to files or shards"
            )


def _cell(value: object) -> str | list[str]:
    """Return a value of a Parquet column as text, a list as texts; what is null is empty."""
    if isinstance(value, list):
        return ["" if item is None else str(item) for item in value]
    if isinstance(value, float) and math.isnan(value):  # which other programs write in place of a null
        return ""
    if isinstance(value, float) and value.is_integer():  # as pandas writes whole numbers beside a null
        value = int(value)
    return "" if value is None else str(value)


# Places of image, label and captions, and whether a field of captions that is a text holds many of them.
Columns = tuple[int, int | None, int | None, bool]


_SAVE = "save it as CSV in UTF-8, or give a folder of class folders"


def _csv_fault(source: Path, line: int, error: str) -> str:
    if "end of data" in error:
        return f"'{source}' line {line}: a double quote opens a text that never ends: close it"
    if "field limit" in error:
        return (
            f"'{source}' line {line}: a text of more than {csv.field_size_limit()} characters: "
            "a double quote is probably open, close it"
        )
    if "expected after" in error:
        return (
            f"'{source}' line {line}: a text goes on after its closing double quote: "
            "close the quote that is open, and double each quote inside a text"
        )
    return f"'{source}' is not CSV in UTF-8: line {line}: {error}: {_SAVE}"


def _columns(source: Path, header: list[str]) -> Columns:
    """Return the places of the columns, and refuse a header that names one twice, wrongly or not at all."""
    chosen = {known: next((n for n in names if n in header), None) for known, names in NAMES.items()}
    repeated = next((name for name in header if name and header.count(name) > 1), None)
    if repeated:
        raise UserError(
            f"'{source}' has the column '{repeated}' more than once: rename or remove all but one"
        )
    for name in header:
        if meant := _meant(name, header):
            remedy = "rename it" if meant not in header else "put both into one, or rename it"
            raise UserError(f"'{source}' has a column '{name}', did you mean '{meant}'? {remedy}")
    if not chosen["image"] or not (chosen["label"] or chosen["captions"]):
        if len(header) == 1 and len(header[0].split()) + header[0].count("|") > 1:
            raise UserError(
                f"'{source}' separates its columns by none of {', '.join(SEPARATORS.values())} "
                f"(its header is '{header[0][:60]}'): save it with commas"
            )
        raise UserError(
            f"'{source}' has the columns {', '.join(sorted(header)) or 'none'}: "
            "it needs 'image' or 'filepath', and at least one of 'label', 'captions' and 'title'"
        )
    image, label, captions = (header.index(name) if name else None for name in chosen.values())
    assert image is not None
    return image, label, captions, chosen["captions"] == "captions"


def _meant(name: str, header: list[str]) -> str | None:
    """Return the known column that another column's name is close to, if any.

    Beside the known column itself, only its singular or plural and its name in other case are close: an
    ``imageId`` beside ``image`` is a further column.
    """
    if not name or any(name in names for names in NAMES.values()):
        return None
    plain = name.casefold().replace(" ", "_")
    absent = [known for known, names in NAMES.items() if not set(names) & set(header)]
    for known, others in COLUMNS.items():
        if plain.removesuffix("s") == known.removesuffix("s") or (plain in others and known in absent):
            return known
    close = difflib.get_close_matches(plain, absent, n=1, cutoff=0.8)
    return close[0] if close else None


def _check_row(source: Path, line: int, header: list[str], cells: list[str]) -> None:
    """Refuse a row that is not one."""
    where = f"'{source}' line {line}"
    if len(cells) != len(header):
        raise UserError(
            f"{where} has {len(cells)} fields and the header has {len(header)}: "
            "put a text that holds a separator in double quotes, and keep the separators of empty fields"
        )
    whole = "".join(cells)
    if "\0" in whole:
        raise UserError(f"{where} holds a zero byte, so this is not CSV in UTF-8: {_SAVE}")
    if ("\n" in whole or "\r" in whole) and any(
        _is_swallowed(cell.strip(), column) for column, cell in zip(header, cells, strict=True)
    ):
        raise UserError(
            f"{where}: a text in double quotes runs over the rows below: close the quote that is open"
        )


def _is_swallowed(cell: str, column: str) -> bool:
    """Return whether a cell's line breaks are those of whole rows, which an unclosed quote has taken in.

    A picture's name and a label have no line breaks. The captions and further columns may have some, but no line
    that names a picture.
    """
    _, *following = cell.splitlines() or [""]
    if column in ("image", "filepath", "label"):
        return bool(following)
    return any(
        is_picture(PurePath(part.strip(' "'))) for line in following for part in re.split("[,;\t]", line)
    )


def _row(source: Path, line: int, columns: Columns, cells: Sequence[str | list[str]]) -> Row:
    image, label, captions, many = columns
    picture = _single(source, line, cells[image])
    if not picture:
        raise UserError(f"'{source}' line {line}: needs a picture and a label or a caption")
    field = "" if captions is None else cells[captions]
    if isinstance(field, str):
        texts = field.split(CAPTION_SEPARATOR) if many else [field]
    else:  # a list of Parquet's, whose texts may hold the separator
        texts = field
    return (
        line,
        picture,
        None if label is None else _single(source, line, cells[label]) or None,
        [stripped for t in texts if (stripped := t.strip())],
    )


def _single(source: Path, line: int, cell: str | list[str]) -> str:
    if isinstance(cell, list):
        raise UserError(
            f"'{source}' line {line}: a picture and a label are one text each, and this is a list"
        )
    return cell.strip()


def _within(source: Path, image: str) -> PurePath:
    """Return a picture's path within its data set: the folders above that are the user's own business."""
    path = PurePath(image)
    if not path.is_absolute():
        return path
    return path.relative_to(source.parent) if path.is_relative_to(source.parent) else PurePath(path.name)
