"""Tiles, grids and strips, scratch, and the record of launches. No kernel runs except where a test says so."""

from __future__ import annotations

import sys

import pytest
import torch
from kernel_calls import CLIP, SMALL, options, problem, to_device
from torch._subclasses.fake_tensor import FakeTensorMode

from tracer.kernels import _grid, _tiles, contrastive_triton
from tracer.kernels._tiles import Tile
from tracer.kernels._triton import Launch, gpu, launch, planning_for, recording
from tracer.kernels._triton_backward import backward_kernel
from tracer.kernels._triton_forward import combine_kernel, forward_kernel
from tracer.kernels.contrastive import Inputs, Needs, Saved, Statistics

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def without_data(N: int, D: int, labels: bool = True) -> Inputs:
    """Return the inputs of N images, N texts and a teacher, without data."""
    feature, y = empty(N, D), empty(N, dtype=torch.long) if labels else None
    return Inputs(feature, feature, empty(), feature, feature, empty(), y, y)


def test_launches_are_recorded_in_order():
    inputs, chosen = to_device(problem(40, 33, 16)), options(0.1, 0.1)
    with recording() as launches:
        forward = contrastive_triton.forward(inputs, chosen, tile=SMALL)
        contrastive_triton.backward(torch.ones(4), inputs, forward.saved, chosen, Needs(), tile=SMALL)
    assert [x.kernel for x in launches] == [forward_kernel, combine_kernel, backward_kernel]
    grid = _grid.plan(40, 33, SMALL, gpu(inputs.image.device).multiprocessors)
    assert launches[0].grid == grid.programs
    assert all(x.arguments == () for x in launches)
    assert forward.terms.isfinite().all()  # the kernels ran


def test_launches_may_be_left_out():
    """Then any device will do, and arguments are there to compile the kernels with."""
    chosen = options(terms=CLIP)
    with recording(execute=False, keep_arguments=True) as outer:
        with recording(execute=False) as inner:
            contrastive_triton.forward(without_data(64, 16), chosen)
        contrastive_triton.forward(without_data(64, 16), chosen)
    assert len(inner) == len(outer) == 2
    assert outer[0].arguments[0].device.type == "meta"


def test_every_kernel_may_pass_through_the_door():
    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: ran.append((grid, arguments, constants))

    ran: list[object] = []
    x = torch.ones(1)
    launch(kernel := Kernel(), (3,), (x, 2), BLOCK=4, num_warps=8)
    with recording(execute=False, keep_arguments=True) as launches:
        launch(kernel, (3,), (x, 2), BLOCK=4, num_warps=8)
    assert ran == [((3,), (x, 2), {"BLOCK": 4, "num_warps": 8})]
    assert launches == [Launch(kernel, (3,), (x, 2), {"BLOCK": 4, "num_warps": 8})]


def test_memory_grows_with_rows_not_with_their_square(monkeypatch):
    """All scratch of both passes, at the default bound on strips, at N and 2N."""
    allocated = []
    new_empty = torch.Tensor.new_empty

    def recorded(*args, **kwargs):
        out = new_empty(*args, **kwargs)
        if sys._getframe(1).f_code.co_filename.endswith(
            "contrastive_triton.py"
        ):  # not what torch makes on its way
            allocated.append(out)
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)

    def scratch(n: int) -> tuple[int, int]:
        inputs, chosen = without_data(n, 512), options(0.1, 0.1)
        allocated.clear()
        with recording(execute=False):
            saved = contrastive_triton.forward(inputs, chosen).saved
            contrastive_triton.backward(empty(4), inputs, saved, chosen, Needs())
        return sum(x.numel() * x.element_size() for x in allocated), sum(x.numel() for x in saved)

    small, saved = scratch(8192)
    large, saved_large = scratch(16384)
    assert saved == len(Statistics._fields) * 2 * 8192  # saved for the backward pass, beside the inputs
    assert saved_large == 2 * saved
    assert large <= 2.1 * small
    assert small < 8192 * 8192 * 4 / 3  # one third of one N×N matrix


def test_strips_grow_with_the_batch_not_with_its_square():
    """Every strip reads and writes the whole sum of the texts' gradients."""

    def strips(n: int) -> int:
        stats = empty(len(Statistics._fields), n)
        with recording(execute=False) as launches:
            contrastive_triton.backward(
                empty(4), without_data(n, 768, labels=False), Saved(stats, stats), options(), Needs()
            )
        return len(launches)

    assert strips(16384) > 1
    assert strips(32768) <= 2 * strips(16384) + 1


@pytest.mark.parametrize(("N", "bound"), [(1, 1), (70, 1), (70, 3 * 48 * 4 * 40), (4096, None)])
def test_strips_cover_all_rows_in_whole_tiles(N, bound):
    cut = _grid.strips(N, 45, 24, SMALL, matrices=3, itemsize=4, strip_bytes=bound)
    assert list(cut.starts) == list(range(0, N, cut.height))
    assert cut.height == N or cut.height % SMALL.block_n == 0
    assert cut.stride == 64  # whole tiles, so that no store needs a mask along its row
    assert cut.height <= SMALL.block_n or 3 * cut.height * cut.stride * 4 <= (bound or _grid.STRIP_BYTES)


def test_without_gradients_to_store_there_is_one_strip():
    assert len(_grid.strips(10**6, 10**6, 512, SMALL, matrices=0, itemsize=4).starts) == 1


@pytest.mark.parametrize(("N", "M"), [(1, 1), (512, 512), (4096, 4096), (1088, 70000), (100000, 64)])
@pytest.mark.parametrize("multiprocessors", [1, 4, 132, 304])
def test_rectangles_keep_the_chip_busy_and_partials_few(N, M, multiprocessors):
    tiles_n, tiles_m = -(-N // 64), -(-M // 64)
    grid = _grid.plan(N, M, Tile(64, 64, 32, 4, 2), multiprocessors)
    programs = grid.programs[0] * grid.programs[1]
    assert programs <= max(2 * multiprocessors, 1)
    finish = -(-programs // multiprocessors) * grid.rectangle[0] * grid.rectangle[1]
    if tiles_n * tiles_m >= 8 * multiprocessors:  # enough work for everyone
        assert finish <= 1.35 * tiles_n * tiles_m / multiprocessors + 1
    assert grid.busy(multiprocessors) == pytest.approx(tiles_n * tiles_m / (multiprocessors * finish))
    assert grid.programs == (-(-N // grid.rows), -(-M // grid.cols))


def test_small_batches_take_smaller_tiles():
    def tiles(n: int) -> int:
        image = empty(n, 512, dtype=torch.bfloat16)
        with planning_for("sm_90", 132):
            tile = _tiles.choose("forward", 4, image, n, lambda tile: None)
        return -(-n // tile.block_n) * -(-n // tile.block_m)

    assert tiles(512) >= 128
    assert tiles(1024) >= 132
    assert tiles(256) >= 64


@pytest.mark.parametrize(("architecture", "same_as"), [("sm_120", "sm_80"), ("gfx90a", "fallback")])
def test_an_architecture_without_tiles_of_its_own(architecture, same_as):
    image = empty(4096, 512, dtype=torch.bfloat16)
    with planning_for(architecture, 132):
        tile = _tiles.choose("forward", 4, image, 4096, lambda tile: None)
    assert tile in _tiles.TABLES[same_as]["forward", True, 16]


def test_search_is_opt_in_and_announced_once(monkeypatch, capsys):
    monkeypatch.setattr(_tiles, "_milliseconds", lambda run, tile: run(tile))
    monkeypatch.setattr(_tiles, "_fastest", {})
    image = empty(4096, 512, dtype=torch.bfloat16)

    def pick(n: int = 4096) -> Tile:
        with planning_for("sm_90", 132):
            return _tiles.choose(
                "forward", 4, image[:n], 4096, lambda tile: float(tile.block_n * tile.block_m)
            )

    large = pick()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TRACER_AUTOTUNE", "1")
    small = pick()
    assert small.block_n * small.block_m < large.block_n * large.block_m
    assert "tracer: forward, 4 products" in capsys.readouterr().err
    assert pick(4000) == small
    assert capsys.readouterr().err == ""


def test_the_search_times_the_device_of_the_tensors(monkeypatch):
    """The clock's events belong to the current device, so that device has to be the tensors'."""
    current: list[torch.device] = []

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *exception):
            current.pop()

    timed = []
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(_tiles, "_milliseconds", lambda run, tile: timed.append(list(current)) or 1.0)
    monkeypatch.setattr(_tiles, "_fastest", {})
    monkeypatch.setenv("TRACER_AUTOTUNE", "1")
    with FakeTensorMode(), planning_for("sm_90", 132):
        image = torch.empty(4096, 512, device="cuda:1", dtype=torch.bfloat16)
        _tiles.choose("forward", 4, image, 4096, lambda tile: None)
    assert timed
    assert all(devices == [torch.device("cuda:1")] for devices in timed)


@pytest.mark.parametrize("new_interface", [True, False], ids=["fp32_precision", "allow_tf32"])
def test_tf32_where_torch_allows_it_and_tiles_exist(new_interface):
    matmul = torch.backends.cuda.matmul
    precisions, kept = {}, matmul.fp32_precision
    try:
        for allowed in (True, False):
            if new_interface:
                matmul.fp32_precision = "tf32" if allowed else "ieee"
            else:
                matmul.fp32_precision = "none"
                torch.set_float32_matmul_precision("high" if allowed else "highest")
            for name in ("sm_80", "sm_90", "sm_100", "gfx90a"):
                with planning_for(name, 132):
                    precisions[name, allowed] = _tiles.precision(empty(1, 8))
                    assert _tiles.precision(empty(1, 8, dtype=torch.float16)) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = kept
    assert {key for key, precision in precisions.items() if precision == "tf32"} == {
        ("sm_80", True),
        ("sm_90", True),
    }


def test_a_strip_is_added_to_the_sum_in_place():
    """The sum of the texts' gradients is as large as the texts in float32: no strip makes another."""
    with FakeTensorMode():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            strip, right = torch.empty(64, 40, device="cuda", dtype=dtype), torch.empty(64, 16, device="cuda")
            total = torch.empty(40, 16, device="cuda")
            added = contrastive_triton._add_product(total, strip.T, right.to(dtype))
            assert added is total
