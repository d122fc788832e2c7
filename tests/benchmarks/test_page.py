"""The page of a machine's results and the README's table of them."""

from __future__ import annotations

import json

import pytest

from benchmarks import __main__ as bench
from benchmarks import page
from benchmarks.harness import PartFailed
from tracer.errors import UserError

HERE = {"processor": "Intel(R) Xeon(R) Processor", "cores": 2, "memory_gib": 23.5, "gpu": None, "bf16": "AMX"}


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (HERE, "intel-xeon-amx-2-cores"),
        (HERE | {"processor": "AMD EPYC 9B45", "bf16": "AVX-512"}, "amd-epyc-9b45-avx-512-2-cores"),
        (HERE | {"processor": "Intel(R) Core(TM) i7 CPU @ 3.1GHz", "bf16": None}, "intel-core-i7-2-cores"),
        (HERE | {"gpu": "NVIDIA H100 80GB HBM3"}, "nvidia-h100-80gb-hbm3"),
    ],
)
def test_a_file_is_named_after_the_machine(machine, name):
    assert page.slug(machine) == name


def test_page_keeps_what_a_failed_part_had_before(part, here, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "machine", lambda: here)
    monkeypatch.setattr(bench, "run_part", lambda name, quick, options: part())
    results = bench.run(["losses"], folder=tmp_path)
    assert results.name == "intel-xeon-amx-2-cores.json"

    def fail(name, quick, options):
        raise PartFailed(f"{name} failed")

    monkeypatch.setattr(bench, "run_part", fail)
    with pytest.raises(SystemExit, match="losses failed\nstep failed"):
        bench.run(["losses", "step"], folder=tmp_path)
    assert json.loads(results.read_text())["parts"] == {"losses": part()}
    text = results.with_suffix(".md").read_text()
    assert "2 cores of Intel(R) Xeon(R) Processor, bf16 with AMX, 24 GiB, no GPU" in text
    assert "| sum | 4.0 |" in text
    assert "torch 2.14.1; 2026-01-02, commit abc1234" in text
    picture = tmp_path / "intel-xeon-amx-2-cores-losses-sums.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"![Bars: sums.]({picture.name})" in text


def test_readme_shows_the_tables_between_its_marks(part, tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results" / "here.json"
    results.parent.mkdir()
    results.write_text(json.dumps({"machine": HERE, "parts": {"losses": part()}}))
    (results.parent / "here-losses-sums.png").touch()
    readme.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    for _ in range(2):  # again, and it is the same
        page.put_into_readme(results, readme)
        text = readme.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert text.count("others: 3 ms") == 1
        assert "(results/here.md)" in text
        assert "![Bars: sums.](results/here-losses-sums.png)" in text
    readme.write_text("no marks")
    with pytest.raises(UserError, match="lacks the marks of the benchmarks' table"):
        page.put_into_readme(results, readme)


def test_page_is_written_again_without_measuring(part, tmp_path, monkeypatch):
    """From stored results alone: after a change of the wording."""
    monkeypatch.setattr(page, "ROOT", tmp_path)
    readme, results = tmp_path / "README.md", tmp_path / "results" / "here.json"
    results.parent.mkdir()
    results.write_text(json.dumps({"machine": HERE, "parts": {"losses": part()}}))
    readme.write_text(f"{page.BEGIN}\n{page.END}\n")
    stored = results.read_bytes()
    page.main([str(results)])
    assert results.read_bytes() == stored
    assert "| sum | 4.0 |" in results.with_suffix(".md").read_text()
    assert "others: 3 ms" in readme.read_text()


def test_commits_of_a_day_are_named_together(part, tmp_path):
    document = {"machine": HERE, "parts": {"losses": part(), "memory": {**part(), "commit": "def5678"}}}
    document["parts"]["memory"]["results"] = {"rows": [], "width": 8}
    section = page.readme_section(document, tmp_path / "here.md", tmp_path)
    assert "(2026-01-02, commits abc1234, def5678)" in section
