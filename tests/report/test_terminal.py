"""The tables on the terminal."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest
from report.samples import sample_content

from tracer.report import sentences, terminal
from tracer.report.results import Results


def test_printed_table_equals_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = sample_content(tmp_path, steps=2)
    terminal.print_results(Results.from_json(content))
    out = capsys.readouterr().out
    for method in content["methods"]:
        (line,) = [row for row in out.splitlines() if row.strip().startswith(method["name"] + "  ")]
        numbers = [float(v) for v in re.findall(r"\d+\.\d", line)]
        for domain in ("gnome", "numix"):  # the first and the last column
            seeds = [100 * run["eval"][domain]["accuracy"] for run in method["runs"]]
            assert round(statistics.fmean(seeds), 1) in numbers
    assert "papirus" in out
    assert "Chance" in out
    assert " ".join(sentences.headline(Results.from_json(content)).split()) in " ".join(out.split())


def test_an_incomplete_set_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = sample_content(tmp_path, steps=2)
    content["domains"][2]["expected"] = content["domains"][2]["pictures"] + 1
    terminal.print_results(Results.from_json(content))
    head = capsys.readouterr().out.split("Zero-shot")[0]
    assert re.search(r"mean of 3, some\s+incomplete", head)
    assert len(re.findall("incomplete", head)) == 2  # the mean and the set itself


def test_printed_table_survives_an_ascii_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = sample_content(tmp_path, steps=2)
    content["methods"][1]["name"] = "FLYP 文"
    with (tmp_path / "out.txt").open("w", encoding="ascii") as out:
        monkeypatch.setattr("sys.stdout", out)
        terminal.print_results(Results.from_json(content))
    text = (tmp_path / "out.txt").read_text()
    assert "+/-" in text
    assert "FLYP ?" in text


def test_scores_of_each_model_and_set_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_scores({"ViT-B-32": {"photos": {"accuracy": 0.4567, "ece": 0.012, "pictures": 300.0}}})
    out = capsys.readouterr().out
    assert re.search(r"ViT-B-32\W+photos\W+300\W+45\.7\W+1\.2", out)
    assert "95 %" not in out


def test_the_second_line_of_a_cell_has_a_caption(capsys: pytest.CaptureFixture[str]) -> None:
    score = {"accuracy": 0.4567, "accuracy_low": 0.4, "accuracy_high": 0.5, "ece": 0.012, "pictures": 300.0}
    terminal.print_scores({"ViT-B-32": {"photos": score}})
    out = " ".join(capsys.readouterr().out.split())
    assert "second line of a cell is a 95 % interval" in " ".join(out.split())
