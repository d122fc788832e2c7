"""The competitors of the loss: their results are checked, and every size is compiled anew."""

from __future__ import annotations

import pytest
import torch

from benchmarks import competitors, measure, packages


@pytest.mark.parametrize("case", competitors.CASES)
def test_every_gradient_is_taken_and_checked(case):
    """That of the scale too: a competitor that left it out would be spared work."""
    step = competitors.Problem(32, 16).step(case, competitors.OURS, "fp32")
    step()
    result = step.result()
    competitors.check(case, competitors.OURS, "fp32", result, 32, 16)
    for place, what in enumerate(competitors.results_of(case)):
        wrong = [x * 1.01 if i == place else x for i, x in enumerate(result)]
        with pytest.raises(SystemExit, match=f"{what} of ours"):
            competitors.check(case, competitors.OURS, "fp32", wrong, 32, 16)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", competitors.CASES)
def test_everyone_is_right(case, precision):
    """In float16 too, whose gradients need a scale."""
    for name in competitors.competitors_of(case):
        if not name.endswith(competitors.COMPILED) and competitors.lacks_package(name) is None:
            step = competitors.Problem(64, 32).step(case, name, precision)
            step()
            competitors.check(case, name, precision, step.result(), 64, 32)


if not torch.cuda.is_available():  # where there is a GPU, the test above runs them on it

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    @pytest.mark.parametrize(
        ("case", "name"),
        [("clip", packages.MEMEFF), ("clip", packages.SIGLIP_KERNEL), ("lit", packages.MEMEFF)],
    )
    def test_kernels_of_other_packages_are_right_in_the_interpreter(case, name, precision):
        with packages.as_if_on("sm_90", multiprocessors=4):
            step = competitors.Problem(64, 32).step(case, name, precision)
            step()
            competitors.check(case, name, precision, step.result(), 64, 32)


def test_only_memeff_may_leave_out_the_gradient_of_the_scale():
    step = competitors.Problem(32, 16).step("clip", competitors.OURS, "fp32")
    step()
    (*others, _), none = step.result(), torch.empty(0)
    competitors.check("clip", packages.MEMEFF, "fp32", [*others, none], 32, 16)
    with pytest.raises(measure.WrongResult, match="scale gradient of ours"):
        competitors.check("clip", competitors.OURS, "fp32", [*others, none], 32, 16)
    with pytest.raises(measure.WrongResult, match="text gradient of memeff is missing"):
        competitors.check("clip", packages.MEMEFF, "fp32", [*others[:2], none, none], 32, 16)


@pytest.mark.parametrize("case", ["full", "clip"])
def test_right_result_of_repeated_pairs_follows_from_one_copy(case, monkeypatch):
    monkeypatch.setattr(competitors, "DISTINCT", 16)
    competitors._reference.cache_clear()
    try:
        step = competitors.Problem(48, 24).step(case, competitors.baseline(case), "fp32")
        step()
        for got, right in zip(step.result(), competitors.expected(case, 48, 24), strict=True):
            torch.testing.assert_close(got.cpu(), right)
    finally:
        competitors._reference.cache_clear()


def test_another_loss_is_checked_by_its_own_definition(monkeypatch):
    step = competitors.Problem(40, 16).step("clip", competitors.OPEN_CLIP, "fp32")
    step()
    with pytest.raises(measure.WrongResult, match="loss of SigLIP"):
        competitors.check("clip", competitors.SIGLIP, "fp32", step.result(), 40, 16)


def test_batches_that_repeat_unevenly_are_refused():
    with pytest.raises(SystemExit, match="must be a multiple of 4096"):
        competitors.Problem(5000, 8)


def test_every_size_is_compiled_not_just_the_first_eight():
    """torch.compile falls back to the uncompiled function after as many recompilations of one code."""
    from torch._dynamo.testing import CompileCounter

    counter, compiled = CompileCounter(), torch.compile
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "compile", lambda call, **options: compiled(call, backend=counter, **options))
        for n in range(2, 13):
            competitors.Problem(n, 8).loss("clip", competitors.OPEN_CLIP + competitors.COMPILED)()
    assert counter.frame_count == 11
