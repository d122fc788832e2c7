"""The Triton loss kernels, forward and backward, against the definition in float64.

On a GPU these are the compiled kernels; without one the same kernels under Triton's interpreter.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tracer.kernels._config import Tile
from triton_interpreter import DEVICE, HAS_GPU

from tracer.kernels import _config, _triton, contrastive, eager

# numpy, in the interpreter, warns of lanes that a mask throws away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Small tiles, unequal in their sides: rectangles of several tiles and ragged edges at small sizes.
SMALL = Tile(16, 32, 16, 4, 1)
# One pair; less than one tile; N ≠ M across several rectangles, ragged in every direction; whole tiles.
SIZES = [(1, 1, 8), (5, 3, 16), (70, 130, 40), (64, 64, 64)]
FULL = (True, True, True, True)
CLIP = (True, False, False, False)
ALL = (True, True, True)


def unit(rows: int, width: int, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Normalised features, exactly representable in ``dtype``, in float64."""
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return (x / x.norm(dim=1, keepdim=True)).to(dtype).double()


def problem(
    N: int, M: int, D: int, *, dtype=torch.float32, labels: Any = "some", teacher=True, scale=10.0, seed=0
):
    """Arguments of the implementations, in float64 on the CPU; every pair of classes meets."""
    generator = torch.Generator().manual_seed(seed)
    image, text, teacher_image, teacher_text = (unit(n, D, generator, dtype) for n in (N, M, N, M))
    if labels == "some":
        classes = max(1, min(N, M) // 3)
        # far above 2^32: neither half of an int64 tells classes apart alone
        rows = torch.randperm(N, generator=generator) % classes * (2**32 + 1)
        cols = torch.randperm(M, generator=generator) % classes * (2**32 + 1)
    else:
        rows, cols = labels if labels is not None else (None, None)
    scales = torch.tensor(scale, dtype=torch.float64), torch.tensor(0.8 * scale, dtype=torch.float64)
    if not teacher:
        teacher_image = teacher_text = None
    return [image, text, scales[0], rows, cols, teacher_image, teacher_text, scales[1] if teacher else None]


def truth(args, margin, smoothing, enabled, weights=None, stats=True):
    """Terms, diagnostics and the three gradients of ``dot(weights, terms)`` by the definition, in float64."""
    image, text, scale, rows, cols, *teacher = args
    leaves = [x.clone().requires_grad_() for x in (image, text, scale)]
    rows = torch.arange(len(image)) if rows is None else rows
    cols = torch.arange(len(text)) if cols is None else cols
    options = {"margin": margin, "smoothing": smoothing, "enabled": enabled, "stats": stats}
    terms, stats = eager.contrastive_terms(*leaves, rows, cols, *teacher, **options)
    grads = None
    if weights is not None:
        used = weights * torch.tensor(enabled)
        grads = torch.autograd.grad((used * terms).sum(), leaves, allow_unused=True, materialize_grads=True)
    return terms.detach(), stats, grads


def to_device(args, dtype=torch.float32):
    def move(x):
        if x is None or not x.is_floating_point():
            return None if x is None else x.to(DEVICE)
        return x.to(DEVICE, dtype if x.ndim else torch.float32)

    return [move(x) for x in args]


def ours(args, margin, smoothing, enabled, weights, *, stats=True, needs=ALL, dtype=torch.float32, **options):
    moved = to_device(args, dtype)
    tile = options.pop("tile", SMALL)
    terms, row_stats, col_stats, measured = contrastive.forward(
        *moved, margin, smoothing, enabled, stats, tile=tile
    )
    grads = contrastive.backward(
        weights.float().to(DEVICE), *moved, row_stats, col_stats, margin, smoothing, enabled, needs,
        tile=tile, **options,
    )  # fmt: skip
    return terms, measured, grads


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, rtol: float, atol: float = 1e-7) -> None:
    """Error relative to the norm of what is wanted, so that entries near 0 are held to the others' scale."""
    error = (got.double().cpu() - want).norm().item()
    bound = rtol * want.norm().item() + atol
    assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g}"  # NaN fails too


def check(
    args, margin, smoothing, enabled, *, stats=True, rtol=2e-6, grad_rtol=None, dtype=torch.float32, **options
):
    weights = torch.tensor([1.3, 0.7, -0.4, 2.1], dtype=torch.float64)
    terms, measured, grads = truth(args, margin, smoothing, enabled, weights, stats)
    got_terms, got_measured, got_grads = ours(
        args, margin, smoothing, enabled, weights, stats=stats, dtype=dtype, **options
    )
    assert_close("terms", got_terms, terms, rtol, 1e-6)
    assert_close("diagnostics", got_measured, measured, rtol, 1e-6)
    for name, got, want in zip(("image", "text", "scale"), got_grads, grads, strict=True):
        assert got.dtype == (torch.float32 if name == "scale" else dtype)
        assert_close(name, got, want, grad_rtol or rtol, 1e-6)


@pytest.mark.parametrize("stats", [False, True], ids=["plain", "stats"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_full_objective(size, stats):
    check(problem(*size), 0.3, 0.1, FULL, stats=stats)


@pytest.mark.parametrize(
    ("margin", "smoothing", "enabled", "labelled", "teacher"),
    [
        (0.0, 0.0, CLIP, False, False),  # CLIP
        (0.3, 0.1, CLIP, True, False),  # MPM-NCE
        (0.3, 0.0, CLIP, False, False),  # each option alone
        (0.0, 0.1, CLIP, True, False),
        (0.0, 0.0, FULL, False, True),  # TRACER as published: no margin, so s is z
        (0.3, 0.0, (True, True, False, False), True, True),  # s beside z
        (0.3, 0.1, (False, True, False, False), True, True),  # each distillation term alone
        (0.0, 0.0, (False, False, True, False), True, True),
        (0.0, 0.0, (False, False, False, True), True, True),
        (0.0, 0.0, (False, True, True, True), False, True),
    ],
)
def test_options(margin, smoothing, enabled, labelled, teacher):
    args = problem(37, 37, 24, labels="some" if labelled else None, teacher=teacher)
    check(args, margin, smoothing, enabled, stats=False)
    check(args, margin, smoothing, enabled, stats=True, tile=Tile(32, 16, 32, 4, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("enabled", [CLIP, FULL], ids=["clip", "full"])
def test_low_precision(dtype, enabled):
    """Products are exact in float32, so terms are; gradients are rounded, with the strips, to the dtype."""
    step = torch.finfo(dtype).eps
    check(problem(70, 50, 48, dtype=dtype), 0.2, 0.1, enabled, dtype=dtype, rtol=1e-5, grad_rtol=step)


def test_half_precision_survives_a_loss_scaler():
    """Upstream gradients of 2^16, and probabilities below half's smallest number times that."""
    args = problem(96, 96, 16, dtype=torch.float16, labels=None, teacher=False, scale=4.0)
    weights = torch.tensor([2.0**16, 0, 0, 0], dtype=torch.float64)
    _, _, grads = truth(args, 0.0, 0.0, CLIP, weights)
    _, _, got = ours(args, 0.0, 0.0, CLIP, weights, dtype=torch.float16)
    for name, g, want in zip(("image", "text", "scale"), got, grads, strict=True):
        assert_close(name, g, want, 2e-3)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("enabled", [CLIP, FULL], ids=["clip", "full"])
def test_only_the_needed_gradients(needs, enabled):
    args, weights = problem(40, 33, 16), torch.tensor([0.5, 1.0, 2.0, -1.0], dtype=torch.float64)
    *_, grads = truth(args, 0.2, 0.0, enabled, weights)
    *_, got = ours(args, 0.2, 0.0, enabled, weights, stats=False, needs=needs)
    for need, g, want in zip(needs, got, grads, strict=True):
        assert (g is not None) == need
        if need:
            assert_close("gradient", g, want, 2e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits(scale):
    """Logits of ±1e4 carry errors of 1e-3 in float32; probabilities, and gradients, inherit them."""
    check(problem(40, 36, 16, scale=scale), 0.3, 0.1, FULL, rtol=1e-5, grad_rtol=5e-3)


def test_common_offset():
    """All logits moved by 500: what is left after cancelling is still right."""
    args = problem(40, 36, 16, scale=1.0)
    for x in (args[0], args[1], args[5], args[6]):
        x[:, 0] = 22.0
    args = [x.float().double() if x is not None and x.is_floating_point() else x for x in args]
    check(args, 0.3, 0.1, FULL, rtol=1e-4, grad_rtol=1e-2)


@pytest.mark.parametrize(
    "labels",
    [
        (torch.zeros(20, dtype=torch.long), torch.zeros(33, dtype=torch.long)),  # one class: no negatives
        (torch.arange(33)[:20] * 2**40, torch.arange(33) % 20 * 2**40),  # one or two positives a row
        (torch.tensor([-1] * 19 + [7]), torch.tensor([-1] * 32 + [7])),  # negative labels, one lonely pair
    ],
    ids=["one class", "distinct", "negative"],
)
def test_label_patterns(labels):
    check(problem(20, 33, 16, labels=labels), 0.3, 0.1, FULL)


def test_duplicated_rows():
    """Ties: the first of equal logits is the argmax, as in the definition. Products are exact here."""
    args, generator = problem(48, 48, 16, labels=None), torch.Generator().manual_seed(0)
    for x in (args[0], args[1], args[5], args[6]):
        x[:24] = torch.randint(-3, 4, (24, 16), generator=generator) / 8
        x[24:] = x[:24]
    check(args, 0.0, 0.0, FULL)


def test_ties_across_tiles():
    """The first of equal logits is the argmax when they lie in two tiles of one program, and in two programs."""
    rows = torch.arange(32).sub(27).clamp(min=0)  # copy 0 is the positive of 28 rows, each other of one
    args = problem(32, 160, 16, labels=(rows, torch.arange(160) // 32))
    for x in (args[0], args[5]):
        x[:] = torch.randint(-3, 4, (32, 16), generator=torch.Generator().manual_seed(0)) / 8
    for x in (args[1], args[6]):  # five copies of 32 texts, a tile each
        x[:] = args[0].repeat(5, 1)
    assert _config.rectangle(32, 160, SMALL, DEVICE)[1] > SMALL.block_m or HAS_GPU
    check(args, 0.0, 0.0, FULL)


def test_all_logits_far_below_zero():
    """Logits of -3e4 and less: pairs outside a ragged matrix must still count as lower than any of them."""
    args = problem(21, 35, 16, scale=-4e4)
    for x in (args[0], args[1], args[5], args[6]):
        x[:] = 0
        x[:, 0] = 1  # every product is 1; float32 holds such logits to about 4e-3
    want, measured, _ = truth(args, 0.0, 0.0, FULL)
    got, _, _, got_measured = contrastive.forward(*to_device(args), 0.0, 0.0, FULL, True, tile=SMALL)
    assert_close("terms", got, want, 1e-3)
    assert_close("diagnostics", got_measured, measured, 2e-3)


def test_no_scale():
    """At σ = 0 all logits are equal, and σ's gradient is still Σ ∂L/∂s u·v."""
    check(problem(40, 36, 16, scale=0.0), 0.3, 0.1, FULL, rtol=5e-6)


def test_upstream_gradient_may_be_a_broadcast_number():
    """``terms.sum()`` hands down one number with stride 0."""
    args = problem(40, 36, 16)
    weights = torch.ones(4)
    *_, want = ours(args, 0.2, 0.1, FULL, weights)
    *_, got = ours(args, 0.2, 0.1, FULL, torch.ones(1).expand(4))
    assert torch.ones(1).expand(4).stride() == (0,)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("new_interface", [True, False], ids=["fp32_precision", "allow_tf32"])
def test_tf32_where_torch_allows_it_and_tiles_exist(monkeypatch, new_interface):
    matmul = torch.backends.cuda.matmul
    found, kept = {}, matmul.fp32_precision
    try:
        for allowed in (True, False):
            if new_interface:
                matmul.fp32_precision = "tf32" if allowed else "ieee"
            else:
                matmul.fp32_precision = "none"
                torch.set_float32_matmul_precision("high" if allowed else "highest")
            for name in ("sm_80", "sm_90", "sm_100", "fallback"):
                monkeypatch.setattr(_config, "architecture", lambda device, name=name: name)
                found[name, allowed] = _config.precision(torch.empty(1, 8, device="meta"))
                half = torch.empty(1, 8, device="meta", dtype=torch.float16)
                assert _config.precision(half) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = kept
    assert {key for key, precision in found.items() if precision == "tf32"} == {
        ("sm_80", True),
        ("sm_90", True),
    }


def test_permuting_rows_permutes_gradients():
    args, weights = problem(50, 41, 16), torch.ones(4, dtype=torch.float64)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    shuffled = list(args)
    for i in (0, 3, 5):
        shuffled[i] = args[i][order]
    terms, measured, grads = ours(args, 0.2, 0.1, FULL, weights)
    terms2, measured2, grads2 = ours(shuffled, 0.2, 0.1, FULL, weights)
    assert_close("terms", terms2, terms.double().cpu(), 1e-6)
    assert_close("diagnostics", measured2, measured.double().cpu(), 1e-6)
    assert_close("image", grads2[0], grads[0][order.to(DEVICE)].double().cpu(), 2e-6)
    assert_close("text", grads2[1], grads[1].double().cpu(), 2e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("operand", [0, 1, 5, 6], ids=["image", "text", "teacher image", "teacher text"])
def test_bad_features_give_nan(bad, operand):
    """Never a hang, never a finite number: each enabled term that sees the feature is NaN."""
    args = problem(20, 35, 16)
    args[operand][3, 2] = bad
    want, *_ = truth(args, 0.2, 0.1, FULL, stats=False)
    got, *_ = contrastive.forward(*to_device(args), 0.2, 0.1, FULL, False, tile=SMALL)
    assert want.isnan().any()
    assert torch.equal(got.cpu().isnan(), want.isnan()), (got, want)


def test_row_without_positive_gives_nan():
    args = problem(6, 6, 8, labels=(torch.tensor([0, 1, 2, 3, 4, 99]), torch.tensor([0, 1, 2, 3, 4, 4])))
    terms, _, grads = ours(args, 0.0, 0.0, FULL, torch.ones(4))
    assert terms.isnan().tolist() == [True, False, True, False]
    assert all(g.isnan().any() for g in grads)


def test_repeats_bit_for_bit_and_leaves_inputs_alone():
    args = problem(70, 45, 24)
    moved = to_device(args)
    before = [None if x is None else x.clone() for x in moved]
    weights = torch.tensor([1.0, 0.5, 2.0, 3.0], device=DEVICE)

    def run():
        terms, rows, cols, measured = contrastive.forward(*moved, 0.2, 0.1, FULL, True, tile=SMALL)
        grads = contrastive.backward(weights, *moved, rows, cols, 0.2, 0.1, FULL, ALL, tile=SMALL)
        return terms, rows, cols, measured, *grads

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, moved, strict=True))


def test_scratch_of_several_strips():
    """The tests' memory is poisoned: a lane of the scratch that is read must have been written."""
    check(problem(70, 45, 24), 0.2, 0.1, FULL, strip_bytes=1)


def test_inputs_need_not_be_contiguous():
    args = problem(33, 40, 16)
    args[0] = args[0].T.contiguous().T
    args[1] = torch.stack([args[1], args[1]], 1)[:, 1]
    args[3] = args[3].repeat_interleave(2)[::2]
    args[6] = args[6].flip(0).flip(0)[:, torch.arange(16)]
    check(args, 0.2, 0.1, FULL)


def test_strip_size_does_not_matter():
    """Strips of one row of tiles, of a few, and one strip for everything."""
    args, weights = problem(70, 45, 24), torch.ones(4, dtype=torch.float64)
    *_, want = ours(args, 0.2, 0.1, FULL, weights)
    for strip_bytes in (1, 3 * 48 * 4 * 40):
        *_, got = ours(args, 0.2, 0.1, FULL, weights, strip_bytes=strip_bytes)
        for g, w in zip(got, want, strict=True):
            assert_close("gradient", g, w.double().cpu(), 1e-6)


def test_zero_upstream_gradient():
    *_, grads = ours(problem(20, 20, 8), 0.2, 0.1, FULL, torch.zeros(4))
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("D", [8, 72, 1280])
def test_widths(D):
    """Narrower than a block; no multiple of a block; the widest model, through the table's own tiles."""
    check(problem(20, 24, D), 0.2, 0.1, FULL, tile=None)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.integers(1, 5),
    st.floats(0, 0.5),
    st.floats(0, 0.9),
    st.integers(0, 99),
)
def test_any_shape_and_option(N, M, eighths, margin, smoothing, seed):
    check(problem(N, M, 8 * eighths, seed=seed), margin, smoothing, FULL, rtol=5e-6)


def test_memory_grows_with_rows_not_with_their_square(monkeypatch):
    """All scratch of both passes, at the default bound on strips, at N and 2N; kernels are not run."""
    monkeypatch.setattr(contrastive, "_launch", lambda *args, **kwargs: None)
    monkeypatch.setattr(contrastive, "require_device", lambda tensor: None)
    allocated = []
    new_empty = torch.Tensor.new_empty

    def recorded(*args, **kwargs):
        out = new_empty(*args, **kwargs)
        if sys._getframe(1).f_code.co_filename.endswith("contrastive.py"):  # not what torch makes on its way
            allocated.append(out)
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)

    def scratch(n: int) -> tuple[int, int]:
        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="meta")

        feature, y, scale = empty(n, 512), empty(n, dtype=torch.long), empty()
        moved = [feature, feature, scale, y, y, feature, feature, scale]
        allocated.clear()
        _, rows, cols, _ = contrastive.forward(*moved, 0.1, 0.1, FULL, False)
        contrastive.backward(empty(4), *moved, rows, cols, 0.1, 0.1, FULL, ALL)
        return sum(x.numel() * x.element_size() for x in allocated), rows.numel() + cols.numel()

    small, saved = scratch(8192)
    large, saved_large = scratch(16384)
    assert saved == 5 * 2 * 8192  # saved for the backward pass, beside the inputs
    assert saved_large == 2 * saved
    assert large <= 2.1 * small
    assert small < 8192 * 8192 * 4 / 3  # one third of one N×N matrix


def test_strips_grow_with_the_batch_not_with_its_square(monkeypatch):
    """Every strip reads and writes the whole sum of the texts' gradients; kernels are not run."""
    launches = []
    monkeypatch.setattr(contrastive, "_launch", lambda *args, **kwargs: launches.append(args))
    monkeypatch.setattr(contrastive, "require_device", lambda tensor: None)

    def strips(n: int) -> int:
        feature, scale = torch.empty(n, 768, device="meta"), torch.empty((), device="meta")
        stats = torch.empty(contrastive.STAT_ROWS, n, device="meta")
        launches.clear()
        contrastive.backward(
            torch.empty(4, device="meta"), feature, feature, scale, None, None, feature, feature, scale,
            stats, stats, 0.0, 0.0, FULL, ALL,
        )  # fmt: skip
        return len(launches)

    assert strips(16384) > 1
    assert strips(32768) <= 2 * strips(16384) + 1


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match=r"multiples of 8, got 12: use impl='eager'"):
        contrastive.forward(*to_device(problem(4, 4, 12)), 0.0, 0.0, CLIP, False)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="use impl='blocked'"):
        _triton.require_device(torch.zeros(1))


@pytest.mark.parametrize(("N", "M"), [(1, 1), (512, 512), (4096, 4096), (1088, 70000), (100000, 64)])
@pytest.mark.parametrize("places", [1, 4, 132, 304])
def test_rectangles_keep_the_chip_busy_and_partials_few(N, M, places):
    tiles_n, tiles_m = -(-N // 64), -(-M // 64)
    rows, cols = _config._rectangle(tiles_n, tiles_m, places)
    grid_n, grid_m = -(-tiles_n // rows), -(-tiles_m // cols)
    assert grid_n * grid_m <= max(2 * places, 1)
    finish = -(-grid_n * grid_m // places) * rows * cols
    if tiles_n * tiles_m >= 8 * places:  # enough work for everyone
        assert finish <= 1.35 * tiles_n * tiles_m / places + 1


def test_small_batches_take_smaller_tiles(monkeypatch):
    monkeypatch.setattr(_config, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(_config, "_multiprocessors", lambda device: 132)

    def tiles(n: int) -> int:
        image = torch.empty(n, 512, dtype=torch.bfloat16, device="meta")
        tile = _config.choose("forward", 4, image, n, lambda tile: None)
        return -(-n // tile.block_n) * -(-n // tile.block_m)

    assert tiles(512) >= 128
    assert tiles(1024) >= 132
    assert tiles(256) >= 64


def test_search_is_opt_in_and_announced_once(monkeypatch, capsys):
    monkeypatch.setattr(_config, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(_config, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(_config, "_time", lambda run, tile: run(tile))
    monkeypatch.setattr(_config, "_found", {})
    image = torch.empty(4096, 512, dtype=torch.bfloat16, device="meta")

    def pick(n: int = 4096) -> Tile:
        return _config.choose("forward", 4, image[:n], 4096, lambda tile: float(tile.block_n * tile.block_m))

    large = pick()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TRACER_AUTOTUNE", "1")
    small = pick()
    assert small.block_n * small.block_m < large.block_n * large.block_m
    assert "tracer: forward, 4 products" in capsys.readouterr().err
    assert pick(4000) == small
    assert capsys.readouterr().err == ""


if HAS_GPU:

    def test_launches_on_the_tensors_own_device():
        args = to_device(problem(64, 64, 64))
        device = torch.device("cuda", torch.cuda.device_count() - 1)
        args = [None if x is None else x.to(device) for x in args]
        assert contrastive.forward(*args, 0.1, 0.1, FULL, False)[0].device == device


@pytest.mark.parametrize("labelled", [False, True], ids=["diagonal", "labels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators(labelled, dtype):
    """Schema, fake tensors and autograd registration of the operator over these kernels."""
    import tracer.ops  # noqa: F401  (registers it)

    moved = to_device(problem(12, 12, 8, dtype=dtype, labels="some" if labelled else None), dtype)
    for i in (0, 1, 2):
        moved[i].requires_grad_()
    torch.library.opcheck(
        torch.ops.tracer.contrastive_loss.default, ("triton", *moved, 0.2, 0.1, list(FULL), True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip
    torch.ops.tracer.contrastive_loss("triton", *moved, 0.2, 0.1, list(FULL), False)[0].sum().backward()
    assert all(moved[i].grad.isfinite().all() for i in (0, 1, 2))


def test_through_the_dispatcher():
    """The public call with autograd: a weighted loss, times two, against the definition's own gradients."""
    from tracer.ops import contrastive_loss

    args = problem(40, 33, 16)
    image, text, scale, rows, cols, teacher_image, teacher_text, teacher_scale = to_device(args)
    options = {
        "margin": 0.2,
        "smoothing": 0.1,
        "relational": 0.9,
        "interactive": 0.5,
        "cross": 2.0,
        "stats": True,
    }
    found = {}
    for impl in ("triton", "eager"):
        leaves = [x.clone().requires_grad_() for x in (image, text, scale)]
        out = contrastive_loss(
            *leaves, labels=rows, text_labels=cols, teacher_image=teacher_image, teacher_text=teacher_text,
            teacher_logit_scale=teacher_scale, impl=impl, **options,
        )  # fmt: skip
        found[impl] = [out.loss, *torch.autograd.grad(2 * out.loss, leaves), *out.stats.values()]
    for got, want in zip(found["triton"], found["eager"], strict=True):
        assert_close("result", got, want.double().cpu(), 1e-5)
