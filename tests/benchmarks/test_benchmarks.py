"""The instruments of the benchmarks, and the two parts about the loss in miniature."""

from __future__ import annotations

import itertools
import json
import time

import pytest
import torch

from benchmarks import _competitors, _gpu, _losses_page, _measure, _page, losses, memory, published
from benchmarks._part import command_line, plain
from tracer.kernels import _blocked_tile, _grid

MIB = 2**20


def allocate(mebibytes):
    """For ``peak_memory``: a call that holds, for a moment, so many MiB."""

    def hold(count):
        return torch.ones(count * MIB, dtype=torch.uint8, device=_competitors.DEVICE)[0].item()

    hold(1)  # brings the libraries' own pages in, as the small step of a benchmark does
    return lambda: hold(mebibytes)


def test_peak_memory_sees_what_is_freed_again():
    assert _measure.peak_memory("tests.test_benchmarks", "allocate", 200) == pytest.approx(200 * MIB, rel=0.1)


def broken():
    raise ValueError("this one fails")


def test_peak_memory_hands_on_errors():
    with pytest.raises(ValueError, match="this one fails"):
        _measure.peak_memory("tests.test_benchmarks", "broken")


def test_memory_of_the_loss_is_linear():
    """Less than one of the N×N matrices at N 4096 (64 MiB), and no quadratic growth up to there.

    On a GPU the backward pass may also hold one strip of gradient tiles, of a fixed size.
    """
    fixed = _grid.STRIP_BYTES if _competitors.DEVICE == "cuda" else 0
    small, large = (
        losses.peak(_competitors.Size("full", "fp32", pairs, 64), _competitors.OURS) for pairs in (2048, 4096)
    )
    assert large < 64 * MIB + fixed
    assert large < 2.5 * small + fixed


# What torch hands out.


def test_allocated_is_exact_and_finds_the_peak():
    x = torch.ones(1000)

    def call():
        a = x.new_empty(10_000)
        b = x.new_empty(20_000)
        del a
        return x.new_empty(5_000), b

    assert _measure.allocated(call) == 4 * 30_000
    assert _measure.allocated(lambda: None) == 0


def test_allocated_leaves_out_scratch_of_products_only():
    """The processor's library decides about that; the result is counted."""
    a, b = torch.ones(96, 160), torch.ones(160, 64)
    for dtype in (torch.float32, torch.bfloat16):
        left, right = a.to(dtype), b.to(dtype)
        assert _measure.allocated(lambda: left @ right) == 96 * 64 * left.element_size()  # noqa: B023
    assert _measure.allocated(lambda: (a @ b).neg()) == 2 * 96 * 64 * 4


@pytest.mark.parametrize("case", ["full", "clip"])
def test_counted_memory_repeats_on_any_number_of_threads(case):
    kept, counts = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with memory.one_thread():
                counts.append(memory._count(case, "fp32", memory.BLOCKED, [1024], 64))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(kept)
    assert counts[0] == counts[1]


def test_counted_memory_is_the_same_on_any_processor(monkeypatch):
    """MKL's products go to the tile itself, oneDNN's come in memory of their own."""
    counts = []
    for intel in (False, True):
        monkeypatch.setattr(_blocked_tile, "mkl_knows_this_processor", lambda: intel)  # noqa: B023
        with memory.one_thread(), memory.any_processor():
            counts.append(memory._count("clip", "fp32", memory.BLOCKED, [1024], 64))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("who", [memory.BLOCKED, memory.TRITON])
def test_counted_memory_of_ours_holds_no_matrix(who):
    """At N 4096, D 8: one float32 matrix would be 64 MiB. The strip of gradients has a fixed bound."""
    with memory.one_thread(), memory.launches_left_out():
        found = _measure.allocated(memory._step("clip", "fp32", who, 4096, 8))
    assert found < 16 * MIB + (_grid.STRIP_BYTES if who == memory.TRITON else 0)


def test_counted_memory_of_the_definition_holds_matrices():
    with memory.one_thread():
        small, large = memory._count("clip", "fp32", _competitors.EAGER, [512, 1024], 8).values()
    assert large > 8 * 4 * 1024**2
    assert 3.9 < large / small < 4.1


# Clocks and turns.


def test_turns_are_taken():
    order = []
    times = _measure.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 4
    assert times["a"].repeats == 3
    assert times["a"].low <= times["a"].median <= times["a"].high


def test_phases_are_timed_apart():
    phases = {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}
    times = _measure.interleaved_phases({"call": phases}, repeats=3, warmup=0)["call"]
    assert list(times) == ["short", "long", _measure.TOTAL]
    assert times["short"].median < 0.01 < times["long"].median
    assert times[_measure.TOTAL].median == pytest.approx(
        times["short"].median + times["long"].median, rel=0.2
    )


def test_three_turns_whatever_the_budget():
    times = _measure.interleaved({"call": lambda: time.sleep(0.001)}, repeats=9, budget=0.0)
    assert times["call"].repeats == 3


def test_spread_stays_within_what_was_measured():
    timing = _measure.Timing.of([1.0, 2.0, 9.0])
    assert 1.0 <= timing.low <= timing.median == 2.0 <= timing.high <= 9.0
    assert _measure.Timing.of([3.0]) == _measure.Timing(3.0, 3.0, 3.0, 1)


# Right or not.


def test_no_speed_without_a_right_result():
    _measure.require_close("sum", torch.ones(3), torch.ones(3), 1e-6)
    for wrong in (torch.full((3,), 1.1), torch.full((3,), float("nan"))):
        with pytest.raises(SystemExit, match="no speed without a right result: sum is off"):
            _measure.require_close("sum", wrong, torch.ones(3), 1e-6)


@pytest.mark.parametrize("case", _competitors.CASES)
def test_every_gradient_is_taken_and_checked(case):
    """That of the scale too: a competitor that left it out would be spared work."""
    step = _competitors.Problem(32, 16).step(case, _competitors.OURS, "fp32")
    step()
    result = step.result()
    _competitors.check(case, _competitors.OURS, "fp32", result, 32, 16)
    for place, what in enumerate(("loss", "image gradient", "text gradient", "scale gradient")):
        wrong = [x * 1.01 if i == place else x for i, x in enumerate(result)]
        with pytest.raises(SystemExit, match=f"{what} of ours"):
            _competitors.check(case, _competitors.OURS, "fp32", wrong, 32, 16)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", _competitors.CASES)
def test_everyone_is_right(case, precision):
    """In float16 too, whose gradients need a scale."""
    for who in _competitors.everyone(case):
        if not who.endswith(_competitors.COMPILED) and _competitors.lacks_package(who) is None:
            step = _competitors.Problem(64, 32).step(case, who, precision)
            step()
            _competitors.check(case, who, precision, step.result(), 64, 32)


@pytest.mark.parametrize("case", ["full", "clip"])
def test_right_result_of_repeated_pairs_follows_from_one_copy(case, monkeypatch):
    monkeypatch.setattr(_competitors, "DISTINCT", 16)
    _competitors._reference.cache_clear()
    try:
        step = _competitors.Problem(48, 24).step(case, _competitors.theirs(case), "fp32")
        step()
        for got, right in zip(step.result(), _competitors.expected(case, 48, 24), strict=True):
            torch.testing.assert_close(got.cpu(), right)
    finally:
        _competitors._reference.cache_clear()


def test_another_package_that_is_wrong_gets_no_speed_and_ours_goes_on(monkeypatch):
    monkeypatch.setattr(losses, "lacks_package", lambda who: None)
    right = published.clip_loss
    monkeypatch.setattr(published, "inf_cl_loss", lambda *inputs: 1.01 * right(*inputs))
    bench = losses.Bench(budget=60, repeats=3, patience=15)
    row = bench.row(_competitors.Size("clip", "fp32", 40, 16), [_competitors.OURS, _competitors.INF_CL], 1)
    assert "no speed without a right result" in row["competitors"][_competitors.INF_CL]["note"]
    assert "time" not in row["competitors"][_competitors.INF_CL]
    assert "time" in row["competitors"][_competitors.OURS]


def test_another_loss_is_checked_by_its_own_definition(monkeypatch):
    step = _competitors.Problem(40, 16).step("clip", _competitors.OPEN_CLIP, "fp32")
    step()
    with pytest.raises(_measure.WrongResult, match="loss of SigLIP"):
        _competitors.check("clip", _competitors.SIGLIP, "fp32", step.result(), 40, 16)


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

    monkeypatch.setattr(_gpu, "captured", captured)
    size = _competitors.Size("clip", "fp32", 40, 16)
    steps = {
        who: _competitors.Problem(40, 16).step("clip", who, "fp32")
        for who in (_competitors.OURS, _competitors.OPEN_CLIP)
    }
    found = {who: {} for who in steps}
    losses.Bench(budget=60, repeats=1, patience=15).replay(size, steps, found)
    ours, theirs = (times[2:] for times in order)  # the warm-up apart
    assert len(ours) == len(theirs) == 8
    assert max(ours[:2]) < min(theirs[:2]) < min(ours[2:4])
    assert all(set(entry["replay"]) == {"forward", "backward", _measure.TOTAL} for entry in found.values())
    with pytest.raises(_measure.WrongResult):
        losses.Bench(budget=60, repeats=1, patience=15).replay(size._replace(pairs=20), steps, found)


def test_batches_that_repeat_unevenly_are_refused():
    with pytest.raises(SystemExit, match="must be a multiple of 4096"):
        _competitors.Problem(5000, 8)


def test_a_wrong_competitor_ends_the_benchmark(monkeypatch):
    right = published.tracer_loss
    bench = losses.Bench(budget=60, repeats=3, patience=15)
    size = _competitors.Size("full", "fp32", 40, 16)
    _competitors.expected("full", 40, 16)  # before the published loss goes wrong
    monkeypatch.setattr(published, "tracer_loss", lambda *inputs, **weights: 1.01 * right(*inputs, **weights))
    with pytest.raises(SystemExit, match="of published is off"):
        bench.row(size, [_competitors.OURS, _competitors.PUBLISHED], seconds=1)


# Who takes part.


def test_what_does_not_fit_is_said_and_ours_is_timed(monkeypatch):
    monkeypatch.setattr(_measure, "available_memory", lambda: 50 * MIB)
    bench = losses.Bench(budget=60, repeats=3, patience=15)
    row = bench.row(
        _competitors.Size("full", "fp32", 1024, 8), [_competitors.OURS, _competitors.PUBLISHED], seconds=1
    )
    assert row["competitors"][_competitors.PUBLISHED]["note"].startswith(
        "does not fit: about 0 GiB of N×N matrices"
    )
    assert set(row["competitors"][_competitors.OURS]["time"]) == {"forward", "backward", _measure.TOTAL}


def test_slow_competitors_and_large_batches_are_left_out_by_name():
    bench = losses.Bench(budget=30, repeats=3, patience=1)
    small, large = (_competitors.Size("clip", "fp32", n, 16) for n in (64, 4096))
    bench.pace = {
        ("clip", "fp32", _competitors.OURS): 10 / large.work,  # 40 s for a row at N 4096, more than there is
        ("clip", "fp32", _competitors.OPEN_CLIP): 2 / small.work,  # 2 s at N 64, longer than the patience
    }
    _, left_out = losses._sweep(bench, [large], main_width=512, seconds=1)
    assert [(size["pairs"], size["seconds"]) for size in left_out] == [(4096, pytest.approx(40))]
    assert _losses_page._left_out(left_out) == "* CLIP loss, fp32, D 16: N 4096 (about 40 s)"
    rows, left_out = losses._sweep(bench, [small], main_width=512, seconds=1)
    assert not left_out
    assert rows[0]["competitors"][_competitors.OPEN_CLIP] == {
        "note": "left out: 2.0 s a step by its pace so far"
    }


def test_every_size_is_compiled_not_just_the_first_eight():
    """torch.compile falls back to the uncompiled function after as many recompilations of one code."""
    from torch._dynamo.testing import CompileCounter

    counter, compiled = CompileCounter(), torch.compile
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "compile", lambda call, **options: compiled(call, backend=counter, **options))
        for n in range(2, 13):
            _competitors.Problem(n, 8).loss("clip", _competitors.OPEN_CLIP + _competitors.COMPILED)()
    assert counter.frame_count == 11


def test_memory_of_what_is_compiled_is_without_the_compiler():
    from torch._dynamo.testing import CompileCounter

    counter, compiled = CompileCounter(), torch.compile
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "compile", lambda call, **options: compiled(call, backend=counter, **options))
        step = losses.memory_call("clip", _competitors.OPEN_CLIP + _competitors.COMPILED, "fp32", 24, 8)
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
    compiled = _competitors.PUBLISHED + _competitors.COMPILED
    row = bench.row(_competitors.Size("full", "fp32", 32, 16), [_competitors.OURS, compiled], seconds=1)
    assert row["competitors"][compiled] == {"note": "failed: RuntimeError: no g++ here"}


# The parts as a whole.


@pytest.fixture
def small(monkeypatch):
    """What takes time at any size: compiling, processes of their own, the machine's rates."""
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    monkeypatch.setattr(_measure, "peak_memory", lambda *args: 3 * MIB)
    monkeypatch.setattr(losses, "COPY_BYTES", MIB)
    monkeypatch.setattr(losses, "MATRIX_SIDE", 64)


def test_losses_in_miniature(small, capsys):
    options = ["--pairs", "32", "--width", "16", "--sweep", "[8, 16]", "--widths", "[16]", "--repeats", "3"]
    command_line(losses.measure, losses.report, [*options, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["versions"]["torch"] == torch.__version__.split("+")[0]
    results = document["results"]
    precisions = _competitors.precisions_here()
    assert [(r["case"], r["precision"]) for r in results["rows"] if r["main"]] == list(
        itertools.product(_competitors.CASES, precisions)
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
    assert rows[0].what == "whole objective, N 32, D 16, fp32, forward + backward"
    assert rows[0].ours.endswith(" ms, 3 MiB")
    assert len(rows) == 4
    pictures = losses.figures(results)
    assert _page.IN_README["losses"] in pictures
    assert [axes.get_title(loc="left") for axes in pictures["batch-size"].axes[:2]] == [
        "Whole objective, fp32, D 16", "CLIP loss, fp32, D 16"
    ]  # fmt: skip


def test_quick_losses_have_the_main_rows(small, monkeypatch):
    monkeypatch.setattr(_competitors, "DISTINCT", 64)
    results = json.loads(json.dumps(losses.measure(quick=True, pairs=64, width=16), default=plain))
    here = itertools.product(_competitors.CASES, _competitors.precisions_here())
    assert set(losses.ratios(results)) == {
        f"{case} {precision} 64x16 vs {_competitors.theirs(case)}" for case, precision in here
    }
    assert "Whole objective" in losses.report(results)
    assert losses.figures(results)


def test_memory_in_miniature(monkeypatch):
    monkeypatch.setattr(memory, "SIZES", (128, 256))
    whole, quick = memory.measure(width=8), memory.measure(quick=True, width=8)
    assert memory.exact(quick).items() <= memory.exact(whole).items()
    assert memory.exact(whole)["clip fp32 N 256 D 8: open_clip, bytes"] > 4 * 4 * 256**2
    assert "×" in memory.report(whole)
    assert "128" in memory.report(quick)  # one size: nothing doubles


if torch.cuda.is_available():

    def test_replayed_graphs_compute_what_the_calls_do():
        step = _competitors.Problem(256, 64).step("full", _competitors.OURS, "fp32")
        step()
        expected = [x.clone() for x in step.result()]
        graphs = _gpu.captured(step.phases)
        assert graphs is not None
        assert list(graphs) == ["forward", "backward"]
        for value in (step.value, *step.grads):
            value.detach().zero_()
        for replay in graphs.values():
            replay()
        for got, right in zip(step.result(), expected, strict=True):
            torch.testing.assert_close(got, right)

    def test_what_waits_for_the_device_is_not_captured():
        x = torch.ones(8, device="cuda")
        assert _gpu.captured({"call": lambda: x.sum().item()}) is None
        assert float((x + 1).sum()) == 16  # and the device works on

    def test_device_time_is_that_of_the_device():
        """A product known to take far longer than its launch."""
        a = torch.randn(2, 4096, 4096, device="cuda")
        times = _measure.interleaved(
            {"one": lambda: a[0] @ a[1], "four": lambda: [a[0] @ a[1] for _ in range(4)]}, repeats=5
        )
        assert 3 < times["four"].median / times["one"].median < 5

    def test_a_measured_rate_fills_the_device():
        side, processors = _gpu.square(), torch.cuda.get_device_properties().multi_processor_count
        assert side % 1024 == 0
        assert (side / 128) ** 2 >= 16 * processors
