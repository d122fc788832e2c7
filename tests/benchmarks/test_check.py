"""``make bench-check``: what counts as worse than the committed results."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import check


def test_exact_numbers_must_be_as_committed():
    assert check.differing({"a": 1.0, "not measured now": 2.0}, {"a": 1.0}) == []
    assert check.differing({"a": 4.0}, {"a": 4.01}) == ["a: 4.01, committed 4"]
    assert check.differing({"a": 4.0}, {"a": 3.0, "b": 1.0}) == [
        "a: 3, committed 4",
        "b: not in the committed results: run make bench",
    ]


def test_time_ratios_may_fall_by_the_tolerance():
    assert check.slower({"a": 4.0, "b": 1.0}, {"a": 3.1, "new": 0.1}, 0.25) == []
    assert check.slower({"a": 4.0}, {"a": 2.9}, 0.25) == ["a: 2.90×, committed 4.00×"]


@pytest.mark.parametrize(
    ("total", "ratio", "exact_only", "worse"),
    [
        (4.0, 2.9, False, []),
        (4.0, 2.0, False, ["losses: sum vs others: 2.00×, committed 3.00×"]),
        (4.0, 2.0, True, []),
        (5.0, 3.0, True, ["losses: sum: 5, committed 4"]),
    ],
)
def test_check_names_what_got_worse(part, here, monkeypatch, tmp_path, total, ratio, exact_only, worse):
    monkeypatch.setattr(check, "machine", lambda: here)
    monkeypatch.setattr(check, "PARTS", ("losses",))
    monkeypatch.setattr(check, "EXACT", ("losses",))
    monkeypatch.setattr(check, "run_part", lambda name, quick: part(total, ratio))
    document = {"machine": here, "parts": {"losses": part()}}
    (tmp_path / "intel-xeon-amx-2-cores.json").write_text(json.dumps(document))
    assert check.check(exact_only, folder=tmp_path) == worse


def check_with(part, here, monkeypatch, folder, runs):
    """Return what the check reports if the part losses gives these results, one after the other."""
    monkeypatch.setattr(check, "machine", lambda: here)
    monkeypatch.setattr(check, "PARTS", ("losses",))
    monkeypatch.setattr(check, "run_part", lambda name, quick: next(runs))
    document = {"machine": here, "parts": {"losses": part()}}
    (folder / "intel-xeon-amx-2-cores.json").write_text(json.dumps(document))
    return check.check(exact_only=False, folder=folder)


def test_a_ratio_that_fell_is_measured_once_more(part, here, monkeypatch, tmp_path):
    assert check_with(part, here, monkeypatch, tmp_path, iter([part(ratio=2.0), part(ratio=2.9)])) == []
    again = iter([part(ratio=2.1), part(ratio=2.0)])
    assert check_with(part, here, monkeypatch, tmp_path, again) == [
        "losses: sum vs others: 2.10×, committed 3.00×"
    ]


def test_comparing_nothing_is_a_failure(part, here, monkeypatch, tmp_path):
    results = part()
    monkeypatch.setattr(
        sys.modules["benchmarks.losses"],
        "ratios",
        lambda measured: {str(measured is results["results"]): 1.0},
    )
    assert check_with(part, here, monkeypatch, tmp_path, iter([results])) == [
        "losses: none of the measured time ratios is in the committed results: run make bench"
    ]


def test_times_are_compared_on_the_same_machine_only(part, here, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "machine", lambda: here)
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
