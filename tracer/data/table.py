"""Reader of CSV files. It guesses nothing: a row or a header that can be understood in two ways is refused."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterator
from pathlib import Path, PurePath

from tracer.data.names import is_hidden, is_picture, note
from tracer.data.sample import Sample
from tracer.data.text import default_caption
from tracer.errors import UserError

CAPTION_SEPARATOR = "|"

# Names that other tools give the columns; one is asked about if the column itself is absent.
COLUMNS = {
    "image": {"file", "filename", "file_name", "filepath", "file_path", "path", "image_path", "img", "picture"},
    "label": {"class", "class_name", "classname", "category", "target", "species"},
    "captions": {"title", "text", "texts", "description", "prompt", "sentence", "alt"},
}  # fmt: skip
SEPARATORS = {"\t": "tabs", ";": "semicolons"}


def read_table(source: Path) -> Iterator[Sample]:
    """Yield the rows of a CSV file with the columns ``image``, and ``label`` or ``captions`` or both.

    Paths of pictures are relative to the file; captions are divided by ``|``. A row without captions gets one
    made from its label; a row without a label has the label None. Rows that name a hidden file are left out, and
    counted in a note. Blanks around a field do not count.

    Raises:
        UserError: the file is not UTF-8 or not CSV; it has other separators than commas; a column is missing,
            repeated, or named almost as one of these; a row has another number of fields than the header, an
            unclosed quote, or names no picture or neither label nor caption. The message names the line.
    """
    line, hidden = 1, 0
    try:
        with source.open(newline="", encoding="utf-8-sig") as file:  # Excel begins a file with this mark
            rows = csv.reader(file, strict=True, skipinitialspace=True)
            header = [name.strip() for name in next(rows, [])]
            _check_columns(source, header)
            line = rows.line_num + 1  # where the next row begins: a quoted text may hold line breaks
            for cells in rows:
                if cells:  # a blank line has none; a row of empty fields is refused
                    row = _row(source, line, header, [cell.strip() for cell in cells])
                    sample = _sample(source, line, row)
                    if is_hidden(_within(source, sample.image)):
                        hidden += 1
                    else:
                        yield sample
                line = rows.line_num + 1
    except UnicodeDecodeError as error:
        raise UserError(f"'{source}' is not CSV in UTF-8: {error}: {_SAVE}") from error
    except csv.Error as error:
        raise UserError(f"{_csv_fault(source, line, str(error))}") from error
    if hidden:
        note(f"'{source}': left out {hidden} rows that name hidden files")


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


def _check_columns(source: Path, header: list[str]) -> None:
    """Refuse a header that names a column twice, wrongly or not at all."""
    if "image" not in header:
        for separator, name in SEPARATORS.items():
            if any(separator in column for column in header):
                raise UserError(f"'{source}' separates its columns by {name}: save it with commas")
    repeated = next((name for name in header if name and header.count(name) > 1), None)
    if repeated:
        raise UserError(
            f"'{source}' has the column '{repeated}' more than once: rename or remove all but one"
        )
    for name in header:
        if meant := _meant(name, header):
            remedy = "rename it" if meant not in header else "put both into one, or rename it"
            raise UserError(f"'{source}' has a column '{name}', did you mean '{meant}'? {remedy}")
    if "image" not in header or not {"label", "captions"} & set(header):
        raise UserError(
            f"'{source}' has the columns {', '.join(sorted(header)) or 'none'}: "
            "it needs 'image' and at least one of 'label' and 'captions'"
        )


def _meant(name: str, header: list[str]) -> str | None:
    """Return the known column that another column's name is close to, if any.

    Beside the known column itself, only its singular or plural and its name in other case are close: an
    ``imageId`` beside ``image`` is a further column.
    """
    if name in COLUMNS or not name:
        return None
    plain = name.casefold().replace(" ", "_")
    for known, others in COLUMNS.items():
        if plain.removesuffix("s") == known.removesuffix("s") or (plain in others and known not in header):
            return known
    absent = [known for known in COLUMNS if known not in header]
    close = difflib.get_close_matches(plain, absent, n=1, cutoff=0.8)
    return close[0] if close else None


def _row(source: Path, line: int, header: list[str], cells: list[str]) -> dict[str, str]:
    """Return the cells of a row by their columns, and refuse a row that is not one."""
    where = f"'{source}' line {line}"
    if len(cells) != len(header):
        raise UserError(
            f"{where} has {len(cells)} fields and the header has {len(header)}: "
            "put a text that holds a comma in double quotes, and keep the commas of empty fields"
        )
    if any("\0" in cell for cell in cells):
        raise UserError(f"{where} holds a zero byte, so this is not CSV in UTF-8: {_SAVE}")
    if any(_is_swallowed(cell, column) for column, cell in zip(header, cells, strict=True)):
        raise UserError(
            f"{where}: a text in double quotes runs over the rows below: close the quote that is open"
        )
    return dict(zip(header, cells, strict=True))


def _is_swallowed(cell: str, column: str) -> bool:
    """Return whether a cell's line breaks are those of whole rows, which an unclosed quote has taken in.

    A picture's name and a label have no line breaks. The captions and further columns may have some, but no line
    that names a picture.
    """
    _, *following = cell.splitlines() or [""]
    if column in ("image", "label"):
        return bool(following)
    return any(is_picture(PurePath(part.strip(' "'))) for line in following for part in line.split(","))


def _sample(source: Path, line: int, row: dict[str, str]) -> Sample:
    image, label = row["image"], row.get("label") or None
    captions = [text.strip() for text in row.get("captions", "").split(CAPTION_SEPARATOR)]
    captions = [text for text in captions if text]
    if not captions and label:
        captions = [default_caption(label)]
    if not image or not captions:
        raise UserError(f"'{source}' line {line}: needs a picture and a label or a caption")
    return Sample(source.parent / image, label, captions)


def _within(source: Path, image: Path) -> PurePath:
    """Return a picture's path within its data set: the folders above that are the user's own business."""
    if image.is_relative_to(source.parent):
        return image.relative_to(source.parent)
    return PurePath(image.name)
