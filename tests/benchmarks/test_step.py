"""The benchmark of the training step in miniature, and that a wrong result stops it."""

from __future__ import annotations

import json

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import step, step_page
from benchmarks.harness import plain
from benchmarks.step_trainer import HEADS, OURS, PHASES, PLAIN, PUBLISHED, Case, Trainer, kept_bytes, problem


@pytest.fixture(scope="module")
def stepped() -> dict:
    measured = step.measure(quick=True, cases=["tracer-demo:6", f"{HEADS}:12"], precision="fp32", repeats=3)
    return json.loads(json.dumps(measured, default=plain))


def test_every_phase_of_every_step_is_timed(stepped):
    demo, heads = stepped["cases"]
    assert demo["times"][OURS].keys() == {*PHASES, "total"}
    assert demo["times"][PUBLISHED].keys() == {*PHASES, "total"}
    assert demo["times"][PLAIN].keys() == {*PHASES, "total"} - {
        "teacher forward", "diagnostics", "teacher update"
    }  # fmt: skip
    for case in (demo, heads):
        for times in case["times"].values():
            assert all(t["median"] > 0 for t in times.values())
    assert demo["loading"]["median"] > 0
    assert heads["loading"] is None


def test_step_is_reported(stepped):
    text = step.report(stepped)
    assert "### tracer-demo, 6 pairs, fp32" in text
    assert "Beyond the teacher's forward pass, the TRACER step costs" in text
    assert "in DeepSpeed" in text
    assert step.ratios(stepped).keys() == {"tracer-demo, 6 pairs", f"{HEADS}, 12 pairs"}
    assert [row.what for row in step.highlights(stepped)] == [
        "training step of tracer-demo, 6 pairs, fp32", "training step of the projections alone, 12 pairs, fp32"
    ]  # fmt: skip
    assert all(isinstance(figure, Figure) for figure in step.figures(stepped).values())


def test_steps_where_little_trains_stand_beside_full_fine_tuning():
    case = Case("tracer-demo", 4)
    times = step.frozen_steps(case, "fp32", repeats=3, budget=5.0)
    taught = [f"{name}, TRACER" for name in (step_page.ADAPTED, step_page.LOCKED, step_page.HALF)]
    assert list(times) == [step_page.FULL, step_page.ADAPTED, step_page.LOCKED, *taught]
    results = {"cases": [], "engine": [], "frozen": [[str(case), "fp32", times]]}
    text = step.report(json.loads(json.dumps(results, default=plain)))
    assert "### Where little trains" in text
    assert all(f"| tracer-demo, 4 pairs, fp32 | {name} " in text for name in times)


def test_overhead_is_that_of_the_phases_that_differ():
    def times(**phases: float) -> dict:
        return {n: {"median": t, "low": t, "high": t, "repeats": 3} for n, t in phases.items()}

    plain = times(loss=1.0, total=10.0)
    ours = times(loss=1.5, diagnostics=0.1, **{"teacher update": 0.2, "teacher forward": 3.0}, total=14.0)
    case = {"times": {PLAIN: plain, OURS: ours}}
    assert step_page.overhead(case, OURS) == pytest.approx((0.08,) * 3)
    assert step_page.overhead_of_totals(case, OURS) == pytest.approx(0.1)


@pytest.mark.parametrize("what", ["loss", "gradients", "change of the weights", "change of the teacher"])
def test_no_speed_of_a_wrong_step(what, monkeypatch):
    trainer = Trainer(problem(Case(HEADS, 8)), "fp32")
    trainer.check("heads")  # passes
    outcome = trainer._outcome
    monkeypatch.setattr(
        trainer,
        "_outcome",
        lambda kind, whole: outcome(kind, whole) | ({what: torch.ones(1)} if "pub" in kind else {}),
    )
    with pytest.raises(SystemExit, match=f"wrong result, so nothing was timed: heads, fp32: {what} is off"):
        trainer.check("heads")


def test_memory_of_a_step():
    trainer = Trainer(problem(Case(HEADS, 64)), "fp32")
    for phase in trainer.phases(OURS).values():
        phase()
    numel = 768 * 512 + 512 * 512 + 1
    assert step.held(trainer) == {
        "parameters": 4 * numel,
        "gradients": 4 * numel,
        "optimizer": 8 * numel + 3 * 4,  # two moments, and a count of steps each
        "teacher": 4 * numel,
        "activations": kept_bytes(trainer.model, trainer.encode),
    }
    features_and_norms = 4 * 64 * (768 + 3 * 512)  # inputs, features, their norms and a little
    assert features_and_norms < kept_bytes(trainer.model, trainer.encode) < 1.5 * features_and_norms


@pytest.mark.parametrize("case", ["ViT-B-32", "ViT-B-32:", "ViT-B-32:1", ":8"])
def test_a_malformed_case_is_refused_by_name(case):
    with pytest.raises(SystemExit, match=f"case '{case}'"):
        Case.of(case)
