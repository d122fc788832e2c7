"""The benchmark of the loss across ranks, on two small ranks."""

from __future__ import annotations

import pytest

from benchmarks import ranks
from benchmarks.rank_worker import GATHERED, MESH, RING


@pytest.fixture(scope="module")
def results():
    return ranks.measure(ranks=[2], precisions=["fp32"], pairs=256, width=64, repeats=3)


def test_counts_beside_open_clip_and_the_published_objective(results):
    clip, full = results["rows"]
    assert [row["case"] for row in results["rows"]] == ["clip", "full"]
    theirs = clip["competitors"]["open_clip"]
    for name in (MESH, RING):
        assert clip["competitors"][name]["units"] == 4
        assert full["competitors"][name]["units"] == 12
    assert theirs["units"] == 6
    assert full["competitors"][GATHERED]["units"] == 40  # 20 over the whole matrix, by each of two ranks
    assert theirs["received"] == 4 * 4 * 256 * 64 // 2
    by_formula = 4 * 256 * (64 + 64 + 3 + 5) // 2  # and what the ranks tell each other before the call
    assert clip["competitors"][MESH]["received"] == pytest.approx(by_formula, rel=0.01)


def test_tables(results):
    text = ranks.report(results)
    assert "ours, mesh 2×1" in text
    assert "by formula instead of measured" in text
    assert ranks.highlights(results)[0].what.startswith("CLIP loss on 2 ranks, fp32, N 256")
    assert {value for name, value in ranks.exact(results).items() if "ours, products" in name} == {4, 12}
    assert set(ranks.ratios(results)) == {
        f"{case} fp32 N 256, 2 ranks: {other} / {name}"
        for case, other in (("clip", "open_clip"), ("full", GATHERED))
        for name in (MESH, RING)
    }


def test_a_quick_run_finds_its_rows_in_a_full_one(monkeypatch):
    """That of the check, which compares numbers by their names."""

    def rows(world_size, plans, folder):
        entry = {"units": 4, "received": 8, "memory": 16, "time": {"median": 1.0}}
        return [
            {**plan._asdict(), "ranks": world_size, "competitors": dict.fromkeys(plan.competitors, entry)}
            for plan in plans
        ]

    monkeypatch.setattr(ranks, "_run", rows)
    monkeypatch.setattr(ranks, "_expected", lambda *_: "")
    full, quick = ranks.measure(), ranks.measure(quick=True)
    assert ranks.exact(quick).items() <= ranks.exact(full).items()
    assert ranks.ratios(quick).keys() <= ranks.ratios(full).keys()
    assert len(ranks.highlights(full)) == 3


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(SystemExit, match="255 pairs do not divide over 2 ranks"):
        ranks.measure(ranks=[2], pairs=255)
