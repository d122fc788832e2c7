"""CSV files as people write them: what the command line says about each."""

from __future__ import annotations

import pytest
from PIL import Image

from tracer.data.build import read_index

HEADER = "image,captions,label\n"


@pytest.fixture
def table(tmp_path):
    """Write a CSV file beside four pictures, a.png to d.png."""
    for name, colour in zip("abcd", ("red", "green", "blue", "white"), strict=True):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")

    def write(content: str):
        (tmp_path / "set.csv").write_text(content)
        return tmp_path / "set.csv"

    return write


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (HEADER + "a.png,a dog, running,dog\nb.png,a cat,cat\n", "line 2 has 4 fields and the header has 3"),
        (HEADER + "a.png,a dog,dog\nb.png,cat\n", "line 3 has 2 fields and the header has 3"),
        (HEADER + 'a.png,"a\ndog",dog\n\nb.png,a, cat,cat\n', "line 5 has 4 fields"),
        (HEADER + 'a.png,a dog,dog\nb.png,"a cat,cat\nc.png,a fox,fox\n', "line 3: a double quote opens"),
        (HEADER + 'a.png,"a dog,dog\nb.png,"a cat",cat\n', "line 2: a text goes on after its closing"),
        (
            HEADER + 'a.png,"a dog,dog\nb.png,a cat",cat\n',
            "line 2: a text in double quotes runs over the rows",
        ),
        (
            HEADER + 'a.png,a dog,"dog\nb.png,a cat,cat"\n',
            "line 2: a text in double quotes runs over the rows",
        ),
        (
            'image,label,notes\na.png,dog,"foo\nb.png,cat,bar"\n',
            "line 2: a text in double quotes runs over the rows",
        ),
        ("image,label\na.png,dog\n,\nb.png,cat\n", "line 3: needs a picture and a label or a caption"),
        ("image,label,label\na.png,x,y\n", "has the column 'label' more than once: rename"),
        ("image,caption,label\na.png,a dog,dog\n", "a column 'caption', did you mean 'captions'? rename it"),
        ("image,labels,captions\na.png,dog,a dog\n", "a column 'labels', did you mean 'label'?"),
        ("image,label,labels\na.png,dog,cat\n", "a column 'labels', did you mean 'label'? put both into one"),
        ("Image,label\na.png,dog\n", "a column 'Image', did you mean 'image'?"),
        ("image,LABEL,label\na.png,dog,cat\n", "a column 'LABEL', did you mean 'label'? put both into one"),
        ("imageId,label\na.png,dog\n", "a column 'imageId', did you mean 'image'?"),
        ("picture,title\na.png,dog\n", "a column 'picture', did you mean 'image'?"),
        ("image,text,label\na.png,a dog,dog\n", "a column 'text', did you mean 'captions'?"),
        ("image|label\na.png|dog\n", "separates its columns by none of commas, tabs, semicolons"),
        ("image label\na.png dog\n", "separates its columns by none of commas, tabs, semicolons"),
        ("image;captions,label\na.png;a,dog\n", "has the columns image;captions, label"),
        ("image,label\na.png,dog\na.png,cat\nb.png,cat\n", "it has several labels"),
        ("image,label,captions\na.png,dog,\nb.png,, | \n", "it has neither a label nor a caption"),
        ("image,label\na.png,dog\n,cat\nb.png,cat\n", "line 3: needs a picture"),
        ("image,label\na.png,dog\nnowhere.png,cat\nb.png,cat\n", "it does not exist"),
        ("", "has the columns none: it needs 'image'"),
        ("image,label\na.png,d\0og\n", "line 2 holds a zero byte"),
    ],
)
def test_an_ambiguous_csv_is_refused_with_its_line_and_a_repair(table, refusal, content, says):
    assert says in refusal(table(content))


@pytest.mark.parametrize(
    "content",
    [
        HEADER + 'a.png,"a dog, running",dog\nb.png,a cat,cat\n',
        "image, captions, label\n" + 'a.png, "a dog, running", dog\n\nb.png,a cat,cat\n',
        HEADER + 'a.png,"a dog,\nrunning",dog\nb.png,a 5" cat,cat\n',
        ",image,captions,label,width,,\n" + '0,a.png,a dog,dog,3,,\n1,b.png,"a ""big"" cat",cat,4,,\n',
        "image,captions,label,title\na.png,a dog,dog,x\nb.png,a cat,cat,y\n",
        "image,imageId,label\na.png,1,dog\nb.png,2,cat\n",
        'image,label,notes\na.png,dog,"foo\nbar"\nb.png,cat,\n',
        "image\tlabel\na.png\tdog\nb.png\tcat\n",
        "image;label\na.png;dog\nb.png;cat\n",
        "label\tfilepath\ttitle\ndog\ta.png\ta dog, running\ncat\tb.png\ta|cat\n",
        "image,label\na.png,dog\na.png,dog\nb.png,cat\n",
    ],
    ids=[
        "a comma in quotes",
        "blanks",
        "a line break and a quote",
        "further columns",
        "a title beside captions",
        "an imageId beside image",
        "a line break in a further column",
        "tabs",
        "semicolons",
        "open_clip's columns",
        "rows that name one picture",
    ],
)
def test_a_plain_csv_is_read(table, evaluate, content):
    path = table(content)
    assert evaluate(path)[0] == 0
    assert read_index(path).labels == ["dog", "cat"]


def test_a_missing_label_is_none_and_not_a_class(table):
    index = read_index(table("image,label,captions\na.png,dog,\nb.png,,a dog\n"))
    assert index.labels == ["dog", None]
    assert index.classes == ["dog"]
    assert index.take([1]).labels == [None]


def test_rows_that_name_hidden_files_are_left_out(table, evaluate, tmp_path):
    rows = "a.png,dog\nb.png,cat\n._a.png,dog\n.ipynb_checkpoints/a.png,x\n__MACOSX/a.png,y\n"
    code, stderr = evaluate(table("image,label\n" + rows))
    assert code == 0
    assert stderr.count("left out 3 rows that name hidden files") == 1


def test_folders_above_the_data_may_be_hidden(tmp_path):
    root = tmp_path / ".cache"
    (root / "pictures").mkdir(parents=True)
    (root / "sets").mkdir()
    Image.new("RGB", (8, 8)).save(root / "pictures/a.png")
    (root / "sets/a.csv").write_text(f"image,label\n../pictures/a.png,x\n{root}/pictures/a.png,x\n")
    assert len(read_index(root / "sets/a.csv")) == 2
