"""CSV files: the columns, what stands in for an empty cell, and the files that are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas
import pyarrow.parquet
import pytest

from tracer.data.sample import Fault, Sample
from tracer.data.table import read_groups, read_table
from tracer.errors import UserError


def test_captions_are_divided_by_bars_and_stripped(write_csv, tmp_path):
    source = write_csv("a.csv", ["image", "label", "captions"], [["b/a.png", " fox ", " one | |two|"]])
    assert list(read_table(source)) == [Sample(str(tmp_path / "b/a.png"), "fox", ["one", "two"])]


def test_labels_or_captions_may_be_absent(write_csv):
    (only_label,) = read_table(write_csv("a.csv", ["image", "label"], [["a.png", "red_fox"]]))
    assert only_label.captions == []  # made when they are drawn
    (only_text,) = read_table(write_csv("b.csv", ["image", "captions"], [["a.png", "x|y"]]))
    assert only_text.label is None


@pytest.mark.parametrize(
    ("header", "rows", "says"),
    [
        (
            ["image", "width"],
            [["a.png", "3"]],
            "it needs 'image' or 'filepath', and at least one of 'label', 'captions' and 'title'",
        ),
        (["picture", "label"], [["a.png", "x"]], "has a column 'picture', did you mean 'image'"),
        (["image", "label"], [["a.png", "x"], ["", "x"]], "line 3: needs a picture"),
    ],
)
def test_a_bad_csv_is_named_in_one_line(write_csv, header, rows, says):
    with pytest.raises(UserError, match=says) as caught:
        list(read_table(write_csv("bad.csv", header, rows)))
    assert "\n" not in str(caught.value)
    assert "bad.csv" in str(caught.value)


def test_a_csv_as_excel_writes_it_is_read(tmp_path):
    file = tmp_path / "excel.csv"
    file.write_text("image,label\na.png,größe\n", encoding="utf-8-sig")
    assert [sample.label for sample in read_table(file)] == ["größe"]


@pytest.mark.parametrize(
    "content",
    [
        "image,label\na.png,größe\n".encode("latin-1"),
        b"\x89PNG\r\n\x1a\n",
    ],
    ids=["another encoding", "a picture"],
)
def test_a_file_that_is_not_csv_is_named(tmp_path, content):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"bad.csv' is not CSV in UTF-8: .*save it as CSV in UTF-8"):
        list(read_table(tmp_path / "bad.csv"))


def test_a_quote_that_swallows_more_than_csv_reads_is_named_with_its_line(tmp_path):
    (tmp_path / "bad.csv").write_text('image,label\na.png,dog\nb.png,"' + "cat\nc.png," * 20_000)
    says = (
        r"bad.csv' line 3: a text of more than 131072 characters: a double quote is probably open, close it"
    )
    with pytest.raises(UserError, match=says):
        list(read_table(tmp_path / "bad.csv"))


def test_a_row_without_label_and_caption_is_a_fault_with_its_line(write_csv):
    source = write_csv("a.csv", ["image", "label", "captions"], [["a.png", "x", ""], ["b.png", " ", " | "]])
    assert list(read_table(source))[1] == Fault(f"{source} line 3", "it has neither a label nor a caption")


def test_a_title_is_one_caption_and_captions_are_many(tmp_path):
    """open_clip's and FLYP's column, whose texts may hold bars; it gives way to captions."""
    (tmp_path / "a.tsv").write_text("title\tfilepath\na|b\ta.png\n")
    assert [sample.captions for sample in read_table(tmp_path / "a.tsv")] == [["a|b"]]
    (tmp_path / "b.tsv").write_text("title\tfilepath\tcaptions\nx\ta.png\ta|b\n")
    assert [sample.captions for sample in read_table(tmp_path / "b.tsv")] == [["a", "b"]]


def parquet(path: Path, **columns: list[object]) -> Path:
    pandas.DataFrame(columns).to_parquet(path)
    return path


def test_parquet_is_read_as_a_csv_is(tmp_path):
    path = parquet(tmp_path / "a.parquet", filepath=["a.png", "b.png"], title=["one|two", None], label=[3, 4])
    assert list(read_table(path)) == [
        Sample(str(tmp_path / "a.png"), "3", ["one|two"]),
        Sample(str(tmp_path / "b.png"), "4", []),
    ]
    path = parquet(tmp_path / "b.parquet", image=["a.png"], captions=["one| two"])
    assert [sample.captions for sample in read_table(path)] == [["one", "two"]]


def test_groups_of_parquet_are_those_of_csv(tmp_path, write_csv):
    """Regression: intervals passed over them."""
    want = {tmp_path / "a.png": "1", tmp_path / "b.png": "hand 2", tmp_path / "c.png": ""}
    rows = [["a.png", "x", " 1"], ["b.png", "y", "hand 2"], ["c.png", "y", ""]]
    assert read_groups(write_csv("a.csv", ["image", "label", "group"], rows)) == want
    images = ["a.png", "b.png", "c.png"]
    path = parquet(
        tmp_path / "a.parquet", filepath=images, label=["x", "y", "y"], group=["1", "hand 2", None]
    )
    assert read_groups(path) == want
    whole = parquet(tmp_path / "b.parquet", image=["a.png"], label=["x"], group=[1.0])
    assert read_groups(whole) == {tmp_path / "a.png": "1"}
    assert read_groups(parquet(tmp_path / "c.parquet", image=["a.png"], label=["x"])) == {}


def test_nothing_of_parquet_is_written_in_two_ways(tmp_path):
    """Regression: NaN, which some programs write in place of a null, was a class of that name."""
    table = pyarrow.table({"image": ["a.png", "b.png"], "label": [3.0, float("nan")], "title": ["x", "y"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [sample.label for sample in read_table(tmp_path / "a.parquet")] == ["3", None]


def test_texts_of_parquet_that_are_not_utf_8_are_refused(tmp_path):
    """Regression: a traceback of Python's decoder."""
    offsets, content = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff\xfe")
    title = pyarrow.StringArray.from_buffers(1, offsets, content)
    table = pyarrow.table({"image": ["a.png"], "title": title})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet' is damaged behind row 0 \(.*utf-8"):
        list(read_table(tmp_path / "a.parquet"))


@pytest.mark.parametrize("column", ["captions", "title"])
def test_a_list_of_parquet_holds_whole_captions(tmp_path, column):
    """A bar in them divides nothing; a null among them, and in place of them, is no caption."""
    lists = [["one|two", None, " three "], [], None]
    names = ["a.png", "b.png", "c.png"]
    path = parquet(tmp_path / "a.parquet", image=names, label=["x", "x", None], **{column: lists})
    *samples, fault = read_table(path)
    assert [sample.captions for sample in samples] == [["one|two", "three"], []]
    assert fault == Fault(f"{path} line 3", "it has neither a label nor a caption")


def test_what_is_not_parquet_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"hello")
    with pytest.raises(UserError, match=r"a.parquet' is not a Parquet file"):
        list(read_table(path))
    path = parquet(tmp_path / "b.parquet", image=["a.png"], label=[["x", "y"]])
    with pytest.raises(UserError, match=r"b.parquet' line 1: a picture and a label are one text each"):
        list(read_table(path))
    parquet(path, image=[f"{n}.png" for n in range(999)], title=["x"] * 999)
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)  # the first column's pages; the end, which lists them, is whole
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"b.parquet' is damaged behind row 0 \(.*\): copy it again"):
        list(read_table(path))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"b.parquet' is a Parquet file, which needs pyarrow, .* pip install"):
        list(read_table(path))


@pytest.mark.parametrize("image", [{"bytes": b"PNG", "path": "a.png"}, b"PNG"], ids=["struct", "binary"])
def test_parquet_that_holds_the_pictures_themselves_is_refused(tmp_path, image):
    """As data sets of the Hugging Face hub do; their bytes are no path that does not exist."""
    path = parquet(tmp_path / "a.parquet", image=[image] * 3, label=[0, 1, 2])
    with pytest.raises(UserError, match=r"a.parquet' has a column 'image' of (struct|binary).*write them to"):
        list(read_table(path))


def test_only_the_columns_that_are_used_are_read_of_parquet(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", width=[3.5], thumbnail=[b"PNG"], title=["x"], image=["a.png"])
    asked, read = [], pyarrow.parquet.ParquetFile.iter_batches

    def iter_batches(self, columns):
        asked.extend(columns)
        return read(self, columns=columns)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    assert list(read_table(path)) == [Sample(str(tmp_path / "a.png"), None, ["x"])]
    assert asked == ["image", "title"]


def test_whole_numbers_beside_a_null_stay_whole(tmp_path):
    """pandas makes them floats, and 3.0 would be another class than the 3 of a CSV file."""
    path = parquet(tmp_path / "a.parquet", image=["a.png", "b.png"], label=[3, None], title=["x", "y"])
    assert [sample.label for sample in read_table(path)] == ["3", None]
