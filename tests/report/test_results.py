"""Statistics over seeds, and the curves that a log gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from report.samples import content_with

from tracer.errors import UserError
from tracer.report import results
from tracer.report.curves import logged_curves
from tracer.report.results import Results, Run


@pytest.mark.parametrize("missing", ["domains", "methods"])
def test_empty_results_are_refused(missing: str) -> None:
    content = content_with(flyp=([0.5], [0.5]))
    content[missing] = []
    with pytest.raises(UserError, match="nothing to report: run the comparison again"):
        Results.from_json(content)


def test_file_is_read_into_records(tmp_path: Path) -> None:
    content = content_with(zero_shot=([0.4], [0.3]), flyp=([0.5], [0.2]))
    content["domains"].append({"name": "close", "kind": "near", "pictures": 3, "chance": 0.1})
    (tmp_path / "results.json").write_text(json.dumps(content))
    read = results.read_results(tmp_path / "results.json")
    assert [domain.role for domain in read.domains] == ["in-distribution", "shifted", "near"]
    assert (read.domains[2].pictures, read.domains[2].chance) == (3, 0.1)
    assert math.isnan(read.domains[2].classes)
    assert (read.baseline.key, read.plain.key) == ("zero-shot", "flyp")
    assert [column.key for column in read.columns] == ["in-distribution", "shifted", "close"]
    assert read.in_distribution.read(read.methods[1].runs[0].eval, "accuracy") == 0.5


def test_best_is_marked_only_beyond_the_spread() -> None:
    stat = results.Stat.of
    assert results.best_of([stat([0.5, 0.51]), stat([0.53, 0.54]), stat([0.4], exact=True)]) == 1
    assert results.best_of([stat([0.5, 0.53]), stat([0.52, 0.54])]) is None, "ranges overlap"
    assert results.best_of([stat([0.5]), stat([0.6])]) is None, "one seed: spread unknown"
    assert results.best_of([stat([0.2, 0.21]), stat([0.1, 0.11])], lower_is_better=True) == 1
    assert results.best_of([stat([0.5, 0.51]), stat([math.nan])]) is None, "nothing to be better than"


def test_gap_comes_from_the_most_exact_source_that_a_run_logged() -> None:
    def gap(*rows: dict[str, float]) -> dict[float, float]:
        return Run(0, {}, {}, [{"step": s, **row} for s, row in enumerate(rows)], 0.0, {}).gap()

    term = {"relational": 0.5}
    pair = {"pair/image_to_text/kl": 0.2, "pair/text_to_image/kl": 0.4}
    assert gap(term, term | pair | {"kl": 0.1}) == {1: 0.1}, "never two sources in one curve"
    assert gap(term, term | pair) == {1: pytest.approx(0.3)}
    assert gap(term, {"relational": -1e-9}) == {0: 0.5, 1: 0.0}
    assert gap({"loss": 1.0}) == {}


def test_long_logs_are_averaged_not_cut() -> None:
    content = content_with(flyp=([0.5, 0.5], [0.5, 0.5]))
    runs = content["methods"][0]["runs"]
    for seed, run in enumerate(runs):
        run["log"] = [{"step": s, "loss": s + seed} for s in range(1, 1001)]
    runs[1]["log"] = runs[1]["log"][:500]  # one run was stopped half-way
    (curve,) = logged_curves(Results.from_json(content), lambda run: run.series("loss"))
    assert len(curve.steps) == 100
    assert (curve.steps[0], curve.mean[0], curve.low[0], curve.high[0]) == (5.5, 6.0, 5.5, 6.5)
    assert (curve.mean[-1], curve.low[-1], curve.high[-1]) == (995.5, 995.5, 995.5)


def test_plain_is_flyp_in_either_form(small: dict[str, Any]) -> None:
    """Regression: without flyp the first method that was trained was called plain, whichever it was."""
    start, flyp = small["methods"]
    methods = [start, flyp | {"key": "wma"}, flyp | {"key": "flyp-multi"}]
    for kept, key in ((methods, "flyp-multi"), (methods[:2], "wma")):
        plain = Results.from_json(small | {"methods": kept}).plain
        assert plain is not None
        assert plain.key == key
