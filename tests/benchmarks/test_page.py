"""``make bench`` and ``make bench-check``: the page, the README's tables, and what counts as worse."""

from __future__ import annotations

import json
import os
import sys
from types import ModuleType

import pytest
from benchmarks._part import Highlight, PartFailed, results_alone, run_part
from matplotlib.figure import Figure

from benchmarks import __main__ as bench
from benchmarks import _page, check
from tracer.errors import UserError

HERE = {"processor": "Intel(R) Xeon(R) Processor", "cores": 2, "memory_gib": 23.5, "gpu": None, "bf16": "AMX"}
ABOUT = {"machine": HERE, "versions": {"torch": "2.14.1"}, "date": "2026-01-02", "commit": "abc1234"}


@pytest.fixture
def part(monkeypatch):
    """A part called losses that measures nothing, and ``results`` as its process would print them."""
    module = ModuleType("benchmarks.losses", "Sums, ours against theirs.\n\nMore.")
    module.report = lambda results: f"| sum | {results['sum']} |"
    module.highlights = lambda results: [Highlight("sum", "1 ms", "theirs: 3 ms", "3.0×")]
    module.figures = lambda results: {"sums": Figure()}
    module.exact = lambda results: {"sum": results["sum"]}
    module.ratios = lambda results: {"sum vs theirs": results["ratio"]}
    monkeypatch.setitem(sys.modules, "benchmarks.losses", module)
    monkeypatch.setattr(_page, "IN_README", {"losses": "sums"})

    def results(total=4.0, ratio=3.0):
        return {**ABOUT, "results": {"sum": total, "ratio": ratio}}

    return results


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
    assert _page.slug(machine) == name


def test_page_keeps_what_a_failed_part_had_before(part, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "machine", lambda: HERE)
    monkeypatch.setattr(bench, "run_part", lambda name, quick: part())
    page = bench.run(["losses"], folder=tmp_path)
    assert page.name == "intel-xeon-amx-2-cores.md"

    def fail(name, quick):
        raise PartFailed(f"{name} failed")

    monkeypatch.setattr(bench, "run_part", fail)
    with pytest.raises(SystemExit, match="losses failed\nstep failed"):
        bench.run(["losses", "step"], folder=tmp_path)
    assert json.loads(page.with_suffix(".json").read_text())["parts"] == {"losses": part()}
    text = page.read_text()
    assert "2 cores of Intel(R) Xeon(R) Processor, bf16 with AMX, 24 GiB, no GPU" in text
    assert "| sum | 4.0 |" in text
    assert "torch 2.14.1; 2026-01-02, commit abc1234" in text
    picture = tmp_path / "intel-xeon-amx-2-cores-losses-sums.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"({picture.name})" in text


def test_readme_shows_the_tables_between_its_marks(part, tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results" / "here.json"
    results.parent.mkdir()
    results.write_text(json.dumps({"machine": HERE, "parts": {"losses": part()}}))
    (results.parent / "here-losses-sums.png").touch()
    readme.write_text(f"before\n{_page.BEGIN}\nold\n{_page.END}\nafter\n")
    for _ in range(2):  # again, and it is the same
        _page.put_into_readme(results, readme)
        text = readme.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert text.count("theirs: 3 ms") == 1
        assert "(results/here.md)" in text
        assert "(results/here-losses-sums.png)" in text
    readme.write_text("no marks")
    with pytest.raises(UserError, match="has no place for the tables"):
        _page.put_into_readme(results, readme)


def test_exact_numbers_must_be_as_committed():
    assert check.differing({"a": 1.0, "not measured now": 2.0}, {"a": 1.0}) == []
    assert check.differing({"a": 4.0}, {"a": 4.01}) == ["a: 4.01, committed 4"]
    assert check.differing({"a": 4.0}, {"a": 3.0, "b": 1.0}) == [
        "a: 3, committed 4",
        "b: not in the committed results, run make bench",
    ]


def test_time_ratios_may_fall_by_the_tolerance():
    assert check.slower({"a": 4.0, "b": 1.0}, {"a": 3.1, "new": 0.1}, 0.25) == []
    assert check.slower({"a": 4.0}, {"a": 2.9}, 0.25) == ["a: 2.90×, committed 4.00×"]


@pytest.mark.parametrize(
    ("total", "ratio", "exact_only", "worse"),
    [
        (4.0, 2.9, False, []),
        (4.0, 2.0, False, ["losses: sum vs theirs: 2.00×, committed 3.00×"]),
        (4.0, 2.0, True, []),
        (5.0, 3.0, True, ["losses: sum: 5, committed 4"]),
    ],
)
def test_check_names_what_got_worse(part, monkeypatch, tmp_path, total, ratio, exact_only, worse):
    monkeypatch.setattr(check, "machine", lambda: HERE)
    monkeypatch.setattr(check, "PARTS", ("losses",))
    monkeypatch.setattr(check, "EXACT", ("losses",))
    monkeypatch.setattr(check, "run_part", lambda name, quick: part(total, ratio))
    document = {"machine": HERE, "parts": {"losses": part()}}
    (tmp_path / "intel-xeon-amx-2-cores.json").write_text(json.dumps(document))
    assert check.check(exact_only, folder=tmp_path) == worse


def check_with(part, monkeypatch, folder, runs):
    """What ``make bench-check`` finds if the part called losses gives these results, one after the other."""
    monkeypatch.setattr(check, "machine", lambda: HERE)
    monkeypatch.setattr(check, "PARTS", ("losses",))
    monkeypatch.setattr(check, "run_part", lambda name, quick: next(runs))
    document = {"machine": HERE, "parts": {"losses": part()}}
    (folder / "intel-xeon-amx-2-cores.json").write_text(json.dumps(document))
    return check.check(exact_only=False, folder=folder)


def test_a_ratio_that_fell_is_measured_once_more(part, monkeypatch, tmp_path):
    assert check_with(part, monkeypatch, tmp_path, iter([part(ratio=2.0), part(ratio=2.9)])) == []
    again = iter([part(ratio=2.1), part(ratio=2.0)])
    assert check_with(part, monkeypatch, tmp_path, again) == ["losses: sum vs theirs: 2.10×, committed 3.00×"]


def test_comparing_nothing_is_no_success(part, monkeypatch, tmp_path):
    found = part()
    monkeypatch.setattr(
        sys.modules["benchmarks.losses"], "ratios", lambda results: {str(results is found["results"]): 1.0}
    )
    assert check_with(part, monkeypatch, tmp_path, iter([found])) == [
        "losses: no time ratio is among the committed ones, run make bench"
    ]


def test_times_are_compared_on_the_same_machine_only(part, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "machine", lambda: HERE)
    with pytest.raises(
        SystemExit, match="no committed results for intel-xeon-amx-2-cores: run make bench first"
    ):
        check.committed_results(tmp_path, same_machine=False)
    for name, day in (("old", "2026-01-01"), ("new", "2026-02-01")):
        document = {"machine": name, "parts": {"losses": {**part(), "date": day}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit, match="no committed results"):
        check.committed_results(tmp_path, same_machine=True)
    assert check.committed_results(tmp_path, same_machine=False)["machine"] == "new"


def test_a_part_that_fails_is_named(capfd):
    with pytest.raises(
        PartFailed, match=r"nothing failed \(exit code 1\): python -m benchmarks.nothing says why"
    ):
        run_part("nothing", quick=True)
    assert "No module named benchmarks.nothing" in capfd.readouterr().err


def test_results_alone_go_to_the_standard_output(capfd):
    """Libraries, and the processes that they start, print there too."""
    with results_alone():
        os.write(1, b"a library's\n")
    os.write(1, b"results\n")
    assert capfd.readouterr() == ("results\n", "a library's\n")
