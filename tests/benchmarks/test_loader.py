"""The benchmark of the loader in miniature, and that other pixels stop it."""

from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure

from benchmarks import loader
from benchmarks.harness import plain
from benchmarks.pictures import Source, photographs


@pytest.fixture
def few(tmp_path) -> Source:
    return Source("few", photographs(tmp_path, 3), 48, 4, 2)


def test_loader_rows(few):
    rows = json.loads(json.dumps(loader.compare(few, workers=1, repeats=1, budget=60), default=plain))
    assert {row["loader"] for row in rows} >= {loader.OURS, loader.PIL, loader.CUBIC, loader.DECODED}
    assert all(row["time"]["median"] > 0 for row in rows)
    results = {"rows": rows}
    text = loader.report(results)
    assert "few, " in text
    assert f"| {loader.OURS} " in text
    assert loader.highlights(results)[0].what == "loading few, same pixels, 1 cores"
    assert loader.ratios(results).keys() == {"few"}
    assert all(isinstance(figure, Figure) for figure in loader.figures(results).values())


def test_loader_refuses_other_pixels(few, monkeypatch):
    monkeypatch.setattr(loader, "SAME", (0.0, 0.0))
    with pytest.raises(SystemExit, match="wrong result, so nothing was timed: few: pixels of"):
        loader.compare(few, workers=1, repeats=1, budget=1)


def test_photographs_are_the_same_every_time(tmp_path):
    (tmp_path / "again").mkdir()
    first, again = photographs(tmp_path, 1), photographs(tmp_path / "again", 1)
    assert first[0].read_bytes() == again[0].read_bytes()
    assert 20_000 < first[0].stat().st_size < 120_000
