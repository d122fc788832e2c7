"""The benchmark of the teacher's update: what it counts, and that every competitor runs and agrees."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
import triton_interpreter  # noqa: F401  makes the interpreter right, where there is no GPU

from benchmarks import teacher
from benchmarks.harness import plain
from tracer.kernels import average_triton as average
from tracer.ops import AverageTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def results(tiny_config) -> dict:
    open_clip.add_model_config(tiny_config)
    measured = teacher.measure(models=[tiny_config.stem], repeats=2)
    return json.loads(json.dumps(measured, default=plain))


def test_all_updates_agree_and_are_timed(results):
    groups = teacher._groups(results)
    assert {mode for _, mode in groups} == set(teacher.MODES)
    for (_, mode), group in groups.items():
        assert (teacher.PUBLISHED in group) == (mode == "fp32")  # it makes no copies
        assert {teacher.LOOP, teacher.OURS} < set(group)
        assert all(teacher._time(row).repeats == 2 for row in group.values())


def test_bytes_are_those_of_the_formulas(results):
    """Average read and written, parameter read: 12. The published loop: three operations of 8, 12 and 8."""
    group = next(group for (_, mode), group in teacher._groups(results).items() if mode == "fp32")
    assert group["torch foreach"]["bytes_per_parameter"] == 12
    assert group[teacher.PUBLISHED]["bytes_per_parameter"] == 28
    assert group[teacher.PUBLISHED]["launches"] == 3 * group[teacher.PUBLISHED]["tensors"]
    assert group[teacher.OURS]["launches"] <= 3


@pytest.mark.parametrize(("dtype", "low"), [(torch.float32, torch.bfloat16), (torch.bfloat16, None)])
def test_kernel_launches_are_counted_with_their_bytes(dtype, low):
    shapes = [(average.BLOCK + 1,), (3, 5)]
    averages = [torch.zeros(s, device=DEVICE) for s in shapes]
    params = [torch.ones(s, device=DEVICE, dtype=dtype) for s in shapes]
    copies = [torch.zeros(s, device=DEVICE, dtype=low) for s in shapes] if low else None
    table = AverageTable()
    average.average_(averages, params, 0.5, copies, table)  # builds the table
    with teacher.counting() as counter:
        average.average_(averages, params, 0.5, copies, table)
    assert counter.launches == 1
    each = 8 + dtype.itemsize + (low.itemsize if low else 0)
    assert counter.bytes == each * sum(a.numel() for a in averages) + 3 * 40


def test_tables_and_picture(results):
    page = teacher.report(results)
    assert page.count("| tracer ") == len(teacher.MODES) * 2  # the update, and average_
    assert teacher.highlights(results) == []  # of ViT-B/32 only
    renamed = results | {"updates": [row | {"model": "ViT-B-32"} for row in results["updates"]]}
    (row,) = teacher.highlights(renamed)
    assert row.what.startswith("teacher update, ViT-B/32")
    assert row.ratio == f"{teacher.ratios(renamed)['teacher ViT-B-32, fp32: published loop / ours']:.1f}×"
    (figure,) = teacher.figures(results).values()
    assert [len(axes.patches) for axes in figure.axes] == [len(g) for g in teacher._groups(results).values()]


def test_exact_numbers_and_ratios_are_named(results):
    exact, ratios = teacher.exact(results), teacher.ratios(results)
    assert len(exact) == 2 * len(teacher.MODES)
    assert exact[f"teacher tiny-clip, fp32, {DEVICE}: bytes per parameter"] == pytest.approx(12, rel=0.01)
    assert set(ratios) == {
        "teacher tiny-clip, fp32: published loop / ours",
        "teacher tiny-clip, fp32 + bf16 copy: lerp_ loop / ours",
        "teacher tiny-clip, bf16 + bf16 copy: lerp_ loop / ours",
    }
