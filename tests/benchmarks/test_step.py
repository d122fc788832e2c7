"""The parts ``step`` and ``loader`` of the benchmarks in miniature, and that a wrong result stops them."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from benchmarks import _part, loader, published_step, step
from tracer.ops import contrastive_loss, sampled_diagnostics
from tracer.schedules import WMA
from tracer.teacher import build_teacher

THROUGH_JSON = {"default": _part.plain}


def features(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(n, 16, generator=generator), dim=1) for _ in range(4)]


def test_published_diagnostics_are_ours():
    """Name by name, to the rounding of float32: they follow the same definitions."""
    u, v, tu, tv = features(40)
    found = published_step.diagnostics(u, v, torch.tensor(20.0), tu, tv, torch.tensor(30.0))
    ours = contrastive_loss(
        u, v, 20.0, teacher_image=tu, teacher_text=tv, teacher_logit_scale=30.0, impl="blocked", stats=True
    ).stats
    ours |= sampled_diagnostics(u, v, tu, tv, rows=40)
    assert ours.keys() == found.keys()
    for name, value in ours.items():
        assert found[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    assert found["student/image_to_text/entropy"] > 0.1
    assert 0 < found["top5_overlap"] < 1


def test_published_update_is_the_wma():
    torch.manual_seed(0)
    student = nn.Linear(3, 2)
    ours, theirs = build_teacher(student, WMA(5)), nn.Linear(3, 2)
    theirs.load_state_dict(student.state_dict())
    for k in range(1, 6):
        with torch.no_grad():
            student.weight.add_(torch.randn(2, 3))
        ours.update(k)
        published_step.update_teacher(theirs, student, ours.schedule.weight(k))
    torch.testing.assert_close(theirs.weight, ours.module.weight)
    assert not torch.equal(theirs.weight, student.weight)


@pytest.fixture(scope="module")
def stepped() -> dict:
    found = step.measure(quick=True, cases=["tracer-demo:6", f"{step.HEADS}:12"], precision="fp32", repeats=3)
    return json.loads(json.dumps(found, **THROUGH_JSON))


def test_every_phase_of_every_step_is_timed(stepped):
    demo, heads = stepped["cases"]
    assert demo["times"][step.OURS].keys() == {*step.PHASES, "total"}
    assert demo["times"][step.PUBLISHED].keys() == {*step.PHASES, "total"}
    assert demo["times"][step.PLAIN].keys() == {*step.PHASES, "total"} - {
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
    assert step.ratios(stepped).keys() == {"tracer-demo, 6 pairs", f"{step.HEADS}, 12 pairs"}
    assert [row.what for row in step.highlights(stepped)] == [
        "training step, tracer-demo, 6 pairs, fp32", f"training step, {step.HEADS}, 12 pairs, fp32"
    ]  # fmt: skip
    assert all(isinstance(figure, Figure) for figure in step.figures(stepped).values())


def test_overhead_is_that_of_the_phases_that_differ():
    def times(**phases: float) -> dict:
        return {n: {"median": t, "low": t, "high": t, "repeats": 3} for n, t in phases.items()}

    plain = times(loss=1.0, total=10.0)
    ours = times(loss=1.5, diagnostics=0.1, **{"teacher update": 0.2, "teacher forward": 3.0}, total=14.0)
    case = {"times": {step.PLAIN: plain, step.OURS: ours}}
    assert step.overhead(case, step.OURS) == pytest.approx((0.08,) * 3)
    assert step.by_totals(case, step.OURS) == pytest.approx(0.1)


@pytest.mark.parametrize("what", ["loss", "gradients", "change of the weights", "change of the teacher"])
def test_no_speed_of_a_wrong_step(what, monkeypatch):
    trainer = step.Trainer(step.problem(step.Case(step.HEADS, 8)), "fp32")
    trainer.check("heads")  # passes
    one = trainer._one
    monkeypatch.setattr(
        trainer,
        "_one",
        lambda kind, whole: one(kind, whole) | ({what: torch.ones(1)} if "pub" in kind else {}),
    )
    with pytest.raises(SystemExit, match=f"no speed without a right result: heads, fp32: {what} is off"):
        trainer.check("heads")


def test_memory_of_a_step():
    trainer = step.Trainer(step.problem(step.Case(step.HEADS, 64)), "fp32")
    for phase in trainer.phases(step.OURS).values():
        phase()
    numel = 768 * 512 + 512 * 512 + 1
    assert step.held(trainer) == {
        "parameters": 4 * numel,
        "gradients": 4 * numel,
        "optimizer": 8 * numel + 3 * 4,  # two moments, and a count of steps each
        "teacher": 4 * numel,
        "activations": step.kept_bytes(trainer),
    }
    features_and_norms = 4 * 64 * (768 + 3 * 512)  # inputs, features, their norms and a little
    assert features_and_norms < step.kept_bytes(trainer) < 1.5 * features_and_norms


@pytest.mark.parametrize("case", ["ViT-B-32", "ViT-B-32:", "ViT-B-32:1", ":8"])
def test_a_case_that_is_none_is_named(case):
    with pytest.raises(SystemExit, match=f"case '{case}'"):
        step.Case.of(case)


@pytest.fixture
def few(tmp_path) -> loader.Source:
    return loader.Source("few", loader.photographs(tmp_path, 3), 48, 4, 2)


def test_loader_rows(few):
    rows = json.loads(json.dumps(loader.compare(few, workers=1, repeats=1, budget=60), **THROUGH_JSON))
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
    with pytest.raises(SystemExit, match="no speed without a right result: few: pixels of"):
        loader.compare(few, workers=1, repeats=1, budget=1)


def test_photographs_are_the_same_every_time(tmp_path):
    (tmp_path / "again").mkdir()
    first, again = loader.photographs(tmp_path, 1), loader.photographs(tmp_path / "again", 1)
    assert first[0].read_bytes() == again[0].read_bytes()
    assert 20_000 < first[0].stat().st_size < 120_000
