"""The benchmark of the loss in miniature: who takes part, what is left out and why, tables and pictures."""

from __future__ import annotations

import itertools
import json
import time

import pytest
import torch

from benchmarks import competitors, gpu, losses, losses_page, measure, packages, page, published
from benchmarks.harness import command_line, plain
from tracer.kernels import _grid

MIB = 2**20


def test_memory_of_the_loss_is_linear():
    """Less than one of the N×N matrices at N 4096 (64 MiB), and no quadratic growth up to there.

    On a GPU the backward pass may also hold one strip of gradient tiles, of a fixed size.
    """
    fixed = _grid.STRIP_BYTES if competitors.DEVICE == "cuda" else 0
    small, large = (
        losses.peak(competitors.Size("full", "fp32", pairs, 64), competitors.OURS) for pairs in (2048, 4096)
    )
    assert large < 64 * MIB + fixed
    assert large < 2.5 * small + fixed


def test_another_package_that_is_wrong_gets_no_speed_and_ours_goes_on(monkeypatch):
    monkeypatch.setattr(losses, "lacks_package", lambda name: None)
    right = published.clip_loss
    monkeypatch.setattr(packages, "inf_cl_loss", lambda *inputs: 1.01 * right(*inputs))
    bench = losses.Bench(budget=60, repeats=3, patience=15)
    row = bench.row(competitors.Size("clip", "fp32", 40, 16), [competitors.OURS, competitors.INF_CL], 1)
    assert "wrong result, so nothing was timed" in row["competitors"][competitors.INF_CL]["note"]
    assert "time" not in row["competitors"][competitors.INF_CL]
    assert "time" in row["competitors"][competitors.OURS]


def test_replays_take_turns_and_are_checked(monkeypatch):
    """With graphs that are the calls themselves, on any machine."""
    order = []

    def captured(phases):
        place = len(order)
        order.append([])
        return {
            name: lambda call=call: (order[place].append(time.perf_counter()), call())
            for name, call in phases.items()
        }

    monkeypatch.setattr(gpu, "captured", captured)
    size = competitors.Size("clip", "fp32", 40, 16)
    steps = {
        name: competitors.Problem(40, 16).step("clip", name, "fp32")
        for name in (competitors.OURS, competitors.OPEN_CLIP)
    }
    entries = {name: {} for name in steps}
    losses.Bench(budget=60, repeats=1, patience=15).replay(size, steps, entries)
    ours, others = (times[2:] for times in order)  # the warm-up apart
    assert len(ours) == len(others) == 8
    assert max(ours[:2]) < min(others[:2]) < min(ours[2:4])
    assert all(set(entry["replay"]) == {"forward", "backward", measure.TOTAL} for entry in entries.values())
    with pytest.raises(measure.WrongResult):
        losses.Bench(budget=60, repeats=1, patience=15).replay(size._replace(pairs=20), steps, entries)


def test_a_wrong_competitor_ends_the_benchmark(monkeypatch):
    right = published.tracer_loss
    bench = losses.Bench(budget=60, repeats=3, patience=15)
    size = competitors.Size("full", "fp32", 40, 16)
    competitors.expected("full", 40, 16)  # before the published loss goes wrong
    monkeypatch.setattr(published, "tracer_loss", lambda *inputs, **weights: 1.01 * right(*inputs, **weights))
    with pytest.raises(SystemExit, match="of published is off"):
        bench.row(size, [competitors.OURS, competitors.PUBLISHED], seconds=1)


def test_what_does_not_fit_is_said_and_ours_is_timed(monkeypatch):
    monkeypatch.setattr(measure, "available_memory", lambda: 50 * MIB)
    bench = losses.Bench(budget=60, repeats=3, patience=15)
    row = bench.row(
        competitors.Size("full", "fp32", 1024, 8), [competitors.OURS, competitors.PUBLISHED], seconds=1
    )
    assert row["competitors"][competitors.PUBLISHED]["note"].startswith(
        "does not fit: about 0 GiB of N×N matrices"
    )
    assert set(row["competitors"][competitors.OURS]["time"]) == {"forward", "backward", measure.TOTAL}


def test_slow_competitors_and_large_batches_are_left_out_by_name():
    bench = losses.Bench(budget=30, repeats=3, patience=1)
    small, large = (competitors.Size("clip", "fp32", n, 16) for n in (64, 4096))
    bench.pace = {
        ("clip", "fp32", competitors.OURS): 10 / large.work,  # 40 s for a row at N 4096, more than there is
        ("clip", "fp32", competitors.OPEN_CLIP): 2 / small.work,  # 2 s at N 64, longer than the patience
    }
    _, left_out = losses._sweep(bench, [large], main_width=512, seconds=1)
    assert [(size["pairs"], size["seconds"]) for size in left_out] == [(4096, pytest.approx(40))]
    assert losses_page._left_out(left_out) == "* CLIP loss, fp32, D 16: N 4096 (about 40 s)"
    rows, left_out = losses._sweep(bench, [small], main_width=512, seconds=1)
    assert not left_out
    assert rows[0]["competitors"][competitors.OPEN_CLIP] == {
        "note": "left out: 2.0 s a step by its pace so far"
    }


def test_memory_of_what_is_compiled_is_without_the_compiler():
    from torch._dynamo.testing import CompileCounter

    counter, compiled = CompileCounter(), torch.compile
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "compile", lambda call, **options: compiled(call, backend=counter, **options))
        step = losses.memory_call("clip", competitors.OPEN_CLIP + competitors.COMPILED, "fp32", 24, 8)
        assert counter.frame_count == 1
        step()
    assert counter.frame_count == 1


def test_a_compiler_that_fails_is_a_note(monkeypatch):
    def no_compiler(call, **options):
        def fails():
            raise RuntimeError("no g++ here\nsecond line")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    bench = losses.Bench(budget=60, repeats=3, patience=15)
    compiled = competitors.PUBLISHED + competitors.COMPILED
    row = bench.row(competitors.Size("full", "fp32", 32, 16), [competitors.OURS, compiled], seconds=1)
    assert row["competitors"][compiled] == {"note": "failed: RuntimeError: no g++ here"}


@pytest.fixture
def small(monkeypatch):
    """What takes time at any size: compiling, processes of their own, the machine's rates."""
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    monkeypatch.setattr(losses, "peak_memory", lambda *args: 3 * MIB)
    monkeypatch.setattr(losses, "COPY_BYTES", MIB)
    monkeypatch.setattr(losses, "MATRIX_SIDE", 64)


def test_losses_in_miniature(small, capsys):
    options = ["--pairs", "32", "--width", "16", "--sweep", "[8, 16]", "--widths", "[16]", "--repeats", "3"]
    command_line(losses.measure, losses.report, [*options, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["versions"]["torch"] == torch.__version__.split("+")[0]
    results = document["results"]
    precisions = competitors.precisions_here()
    assert [(r["case"], r["precision"]) for r in results["rows"] if r["main"]] == list(
        itertools.product(competitors.CASES, precisions)
    )
    assert sorted((r["case"], r["pairs"]) for r in results["rows"] if not r["main"]) == sorted(
        [(case, n) for case in ("full", "clip") for n in (8, 16)] * len(precisions)
    )
    text = losses.report(results)
    for words in (
        "Whole objective, N 32, D 16",
        "SigLIP takes a sigmoid",
        "Other sizes",
        "of the matrix rate",
    ):
        assert words in text
    assert "full fp32 32x16 vs published" in losses.ratios(results)
    rows = losses.highlights(results)
    assert rows[0].what == "whole TRACER objective, forward and backward, 32 pairs of width 16, fp32"
    assert rows[0].ours.endswith(" ms, 3 MiB")
    assert len(rows) == 4
    pictures = losses.figures(results)
    assert page.README_PICTURES["losses"] in pictures
    assert [axes.get_title(loc="left") for axes in pictures["batch-size"].axes[:2]] == [
        "Whole objective, fp32, D 16", "CLIP loss, fp32, D 16"
    ]  # fmt: skip


def test_quick_losses_have_the_main_rows(small, monkeypatch):
    monkeypatch.setattr(competitors, "DISTINCT", 64)
    results = json.loads(json.dumps(losses.measure(quick=True, pairs=64, width=16), default=plain))
    here = itertools.product(competitors.CASES, competitors.precisions_here())
    assert set(losses.ratios(results)) == {
        f"{case} {precision} 64x16 vs {competitors.baseline(case)}" for case, precision in here
    }
    assert "Whole objective" in losses.report(results)
    assert losses.figures(results)
