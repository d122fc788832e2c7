"""The moving average over lists of tensors: both implementations against float64, and the kernel's cost.

Without a GPU the real kernel runs under Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import triton_interpreter  # noqa: F401  makes the interpreter right, where there is no GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tracer.kernels import _triton, average_foreach, average_triton
from tracer.ops import AverageTable, average_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = {"triton": average_triton, "foreach": average_foreach}
LOW = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-11}  # relative rounding

# One element; a small bias; one chunk exactly; one more than a chunk; a matrix over several chunks
# with a ragged end; nothing; a convolution's weight.
SHAPES = ((1,), (7,), (average_triton.BLOCK,), (average_triton.BLOCK + 1,), (67, 129), (0, 5), (4, 3, 5, 5))


def lists(param_dtype=torch.float32, copy_dtype=None, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    averages = [torch.randn(s, generator=generator).to(DEVICE) for s in shapes]
    params = [torch.randn(s, generator=generator).to(DEVICE, param_dtype) for s in shapes]
    # NaN: an element that is not written shows.
    copies = copy_dtype and [torch.full(s, torch.nan, dtype=copy_dtype, device=DEVICE) for s in shapes]
    return averages, params, copies


def expected(averages, params, weight):
    return [a.double() + weight * (p.double() - a.double()) for a, p in zip(averages, params, strict=True)]


def assert_moved(averages, want, copies=None):
    for i, (a, w) in enumerate(zip(averages, want, strict=True)):
        torch.testing.assert_close(
            a.double(), w, rtol=1e-6, atol=1e-6, msg=lambda m, i=i: f"average {i}: {m}"
        )
        if copies is not None and copies[i] is not None:
            assert torch.equal(copies[i], a.to(copies[i].dtype)), f"copy {i} is not its average, rounded"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copy_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_equals_definition(impl, param_dtype, copy_dtype):
    for weight in (0.0, 3e-4, 0.5, 1.0):
        averages, params, copies = lists(param_dtype, copy_dtype)
        want, before = expected(averages, params, weight), [p.clone() for p in params]
        IMPLS[impl].average_(averages, params, weight, copies)
        assert_moved(averages, want, copies)
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)), "a parameter was written"


@pytest.mark.parametrize("impl", IMPLS)
def test_weight_one_is_the_parameter(impl):
    averages, params, _ = lists()
    averages[1].fill_(1e8)  # average + 1·(param − average) in float32 would lose the parameter
    IMPLS[impl].average_(averages, params, 1.0)
    assert all(torch.equal(a, p) for a, p in zip(averages, params, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_dtypes_and_partial_copies(impl):
    """One list as a mixed-precision model gives it: bf16 weights with copies, fp32 norms without."""
    averages, params, _ = lists()
    params[4] = params[4].bfloat16()
    params[6] = params[6].half()
    copies = [None] * len(averages)
    copies[4], copies[6] = torch.empty_like(params[4]), torch.empty_like(params[6])
    want = expected(averages, params, 0.25)
    IMPLS[impl].average_(averages, params, 0.25, copies)
    assert_moved(averages, want, copies)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8])
def test_any_alignment(impl, offset):
    """Slices of flat buffers start anywhere: 4-byte steps for float32, 2-byte steps for bfloat16."""
    size = 2 * average_triton.BLOCK + 5
    flat = [
        torch.full((size + 16,), torch.nan, device=DEVICE, dtype=d) for d in (torch.float32, torch.bfloat16)
    ]
    averages, params = [flat[0][offset : offset + size]], [torch.randn(size, device=DEVICE)]
    copies = [flat[1][offset : offset + size]]
    averages[0].copy_(torch.randn(size))
    want = expected(averages, params, 0.3)
    IMPLS[impl].average_(averages, params, 0.3, copies)
    assert_moved(averages, want, copies)
    for buffer in flat:  # nothing beside the slice was written
        assert buffer[:offset].isnan().all()
        assert buffer[offset + size :].isnan().all()


@given(
    shapes=st.lists(st.lists(st.integers(0, 70), max_size=3).map(tuple), max_size=6),
    weight=st.floats(0, 1),
    low=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_implementations_agree(shapes, weight, low, seed):
    shapes = [s for s in shapes if torch.Size(s).numel() < 20_000]
    dtype = torch.bfloat16 if low else torch.float32
    for module in IMPLS.values():
        averages, params, copies = lists(dtype, dtype, shapes, seed)
        want = expected(averages, params, weight)
        module.average_(averages, params, weight, copies)
        assert_moved(averages, want, copies)


def test_memory_formats():
    """Channels-last weights move in place in both; the kernel refuses what has no common order."""
    for module in IMPLS.values():
        averages, params, copies = (
            [t.to(memory_format=torch.channels_last) for t in ts]
            for ts in lists(copy_dtype=torch.bfloat16, shapes=[(6, 3, 5, 5)])
        )
        want = expected(averages, params, 0.4)
        module.average_(averages, params, 0.4, copies)
        assert_moved(averages, want, copies)

    wide, params = torch.randn(9, 8, device=DEVICE), [torch.randn(4, 9, device=DEVICE).T]
    averages = [wide[:, :4]]
    want = expected(averages, params, 0.4)
    with pytest.raises(ValueError, match=r"averages\[0\] isn't dense .* impl='foreach'"):
        average_triton.average_(averages, params, 0.4)
    with pytest.raises(ValueError, match=r"params\[0\] has strides \(1, 9\), averages\[0\] has \(4, 1\)"):
        average_triton.average_([averages[0].contiguous()], params, 0.4)
    average_foreach.average_(averages, params, 0.4)
    assert_moved(averages, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_device_scalar_weight(impl):
    averages, params, _ = lists()
    want = expected(averages, params, 0.125)
    average_(averages, params, torch.tensor(0.125, device=DEVICE), impl=impl)
    assert_moved(averages, want)


def test_dispatch(monkeypatch):
    """The device chooses; a name overrides; an unknown name and a CPU without interpreter are refused."""
    called = []
    for name, module in IMPLS.items():
        monkeypatch.setattr(module, "average_", lambda *args, name=name: called.append(name))
    averages, params, _ = lists()
    for impl in ("auto", "triton", "foreach"):
        average_(averages, params, 0.5, impl=impl)
    assert called == ["triton" if DEVICE == "cuda" else "foreach", "triton", "foreach"]
    with pytest.raises(ValueError, match="impl='loop': one of 'auto', 'triton', 'foreach'"):
        average_(averages, params, 0.5, impl="loop")
    monkeypatch.undo()
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"needs a GPU but the tensors are on cpu; use impl='foreach'"):
        average_([torch.zeros(3)], [torch.zeros(3)], 0.5, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_do(impl):
    IMPLS[impl].average_([], [], 0.5)
    for shape in ((0, 3), (0, 0)):  # (0, 0) was once refused as not dense
        empty = [torch.empty(shape, device=DEVICE)]
        IMPLS[impl].average_(empty, [torch.empty(shape, device=DEVICE)], 0.5)


def _refused():
    """Return name -> averages, parameters, copies, and what the refusal says."""
    a, p, c = lists(copy_dtype=torch.bfloat16, shapes=[(5,), (6,)])
    flat = torch.zeros(12, device=DEVICE)
    return {
        "fewer params": (a, p[:1], None, r"2 averages, 1 params"),
        "no params": (a, [], None, r"2 averages, no params"),
        "fewer copies": (a, p, c[:1], r"2 averages, 1 copies"),
        "shape": (a, [p[0], p[0]], None, r"params\[1\] has shape \(5,\), averages\[1\] has \(6,\)"),
        "copy's shape": (a, p, [c[1], c[1]], r"copies\[0\] has shape \(6,\)"),
        "low average": ([a[0].bfloat16(), a[1]], p, None, r"averages\[0\] is torch.bfloat16"),
        "double param": (a, [p[0].double(), p[1]], None, r"params\[0\] is torch.float64"),
        "integer copy": (a, p, [c[0], c[1].int()], r"copies\[1\] is torch.int32"),
        "average is param": (
            [a[0], p[1]],
            p,
            None,
            r"params\[1\] and averages\[1\] share memory|averages\[1\] and",
        ),
        "same average twice": (
            [a[0], a[0]],
            [p[0], p[0]],
            None,
            r"averages\[\d\] and averages\[\d\] share memory",
        ),
        "overlap by one": ([flat[:5], flat[4:10]], p, None, r"averages\[1\] and averages\[0\] share memory"),
        "param inside an average": ([flat[:5], a[1]], [p[0], flat[2:8]], None, r"share memory"),
        "copy on a copy": (a, p, [c[1][:5], c[1]], r"copies\[\d\] and copies\[\d\] share memory"),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", _refused())
def test_refusals(impl, case):
    averages, params, copies, message = _refused()[case]
    before = [a.clone() for a in averages]
    with pytest.raises(ValueError, match=message):
        IMPLS[impl].average_(averages, params, 0.5, copies)
    assert all(torch.equal(a, b) for a, b in zip(averages, before, strict=True)), "refused, yet written"


@pytest.mark.parametrize("impl", IMPLS)
def test_shared_parameters_and_neighbours_are_no_aliases(impl):
    """Two averages of one tied parameter, and slices that touch without overlapping, are fine."""
    flat, param = torch.zeros(10, device=DEVICE), torch.randn(5, device=DEVICE)
    IMPLS[impl].average_([flat[:5], flat[5:]], [param, param], 0.5)
    torch.testing.assert_close(flat, torch.cat([param, param]) / 2)


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
def test_foreach_in_pieces(param_dtype):
    """Tensors beyond a piece, between small and a piece, and small ones beside them."""
    averages, params, copies = lists(
        param_dtype, torch.bfloat16, [(average_foreach.PIECE + 3,), (200, 300), (5, 5)]
    )
    averages[1], params[1], copies[1] = (
        t[1].T for t in (averages, params, copies)
    )  # one order, not contiguous
    want = expected(averages, params, 0.3)
    average_foreach.average_(averages, params, 0.3, copies)
    assert_moved(averages, want, copies)


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_foreach_is_one_call():
    averages, params, _ = lists()
    with _Count() as count:
        average_foreach.average_(averages, params, 0.5)
    assert count.ops == ["aten._foreach_lerp_.Scalar"]


@pytest.fixture
def counted(monkeypatch):
    """Counts launches of the kernel and, under the interpreter, the bytes it really loads and stores."""
    totals = {"launches": 0, "tensor": 0, "table": 0}
    kernel = average_triton.average_kernel

    class Counting:
        def __getitem__(self, grid):
            totals["launches"] += 1
            return kernel[grid]

    monkeypatch.setattr(average_triton, "average_kernel", Counting())
    if _triton.INTERPRETED:
        import numpy as np
        from triton.runtime.interpreter import InterpreterBuilder

        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def count(ptrs, mask):
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            totals["tensor" if np.size(ptrs.data) > 1 else "table"] += int(np.sum(mask.data)) * size

        def counting_load(self, ptrs, mask, *args):
            count(ptrs, mask)
            return load(self, ptrs, mask, *args)

        def counting_store(self, ptrs, value, mask, *args):
            count(ptrs, mask)
            return store(self, ptrs, value, mask, *args)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    return totals


if _triton.INTERPRETED:  # bytes are counted in the interpreter

    @pytest.mark.parametrize(
        ("param", "copy", "floor"),
        [
            (torch.float32, None, 12),
            (torch.float32, torch.bfloat16, 14),
            (torch.bfloat16, torch.bfloat16, 12),
            (torch.bfloat16, None, 10),
        ],
    )
    def test_one_launch_at_the_floor_of_bytes(counted, param, copy, floor):
        """Average read and written, parameter read, copy written: each element once, and one small table."""
        averages, params, copies = lists(param, copy)
        average_triton.average_(averages, params, 0.5, copies)
        numel = sum(a.numel() for a in averages)
        assert counted["launches"] == 1
        assert counted["tensor"] == floor * numel
        chunks = sum(-(-a.numel() // average_triton.BLOCK) for a in averages)
        assert counted["table"] == 40 * chunks
        table = average_triton.plan(averages, params, copies)
        assert average_triton.bytes_moved(table) == counted["tensor"] + counted["table"]


@pytest.fixture
def built(monkeypatch):
    """The lists of layouts that a table was built from, or that were checked, in order."""
    calls = []

    def counting(build):
        def wrapper(lists):
            calls.append(lists)
            return build(lists)

        return wrapper

    monkeypatch.setattr(average_triton, "_rows", counting(average_triton._rows))
    monkeypatch.setattr(average_foreach, "check", counting(average_foreach.check))
    return calls


@pytest.mark.parametrize("impl", IMPLS)
def test_table_is_kept_until_storage_moves(impl, built):
    averages, params, _ = lists()
    table = AverageTable()

    def move(weight=0.5):
        want = expected(averages, params, weight)
        average_(averages, params, weight, impl=impl, table=table)
        assert_moved(averages, want)
        return len(built)

    assert [move(weight) for weight in (0.5, 0.25, 0.125)] == [1, 1, 1]
    kept = [params[4], params[4].data]  # or the allocator could give an old address again
    params[4] = params[4].clone()  # moved
    assert move() == move() == 2
    kept.append(params[4].data)
    params[4].data = params[4].data.clone()  # moved under the same parameter
    assert move() == move() == 3


@pytest.mark.parametrize("impl", IMPLS)
def test_owners_do_not_drive_out_each_other(impl, built):
    """Twelve owners in turn: each builds its table once. A cache of eight tables built all of them anew."""
    owners = [(lists(seed=seed), AverageTable()) for seed in range(12)]
    for _ in range(2):
        for (averages, params, _), table in owners:
            average_(averages, params, 0.5, impl=impl, table=table)
    assert len(built) == 12
    average_(*owners[0][0][:2], 0.5, impl=impl)  # without a table it is built for this call alone
    assert len(built) == 13


def test_a_captured_table_lives_as_long_as_its_owner(monkeypatch):
    """A replay reads the addresses that the graph captured, after the tensors have moved too."""
    averages, params, _ = lists()
    table = AverageTable()
    average_triton.average_(averages, params, 0.5, table=table)
    captured = weakref.ref(table._rows)
    monkeypatch.setattr(average_triton, "_capturing", lambda tensor: True)
    average_triton.average_(averages, params, 0.5, table=table)
    moved = [p.clone() for p in params]
    for refused in (AverageTable(), None, table):  # one that saw no tensors, none, and one that saw others
        with pytest.raises(ValueError, match=r"pass table=AverageTable\(\) and call once with it"):
            average_triton.average_(averages, moved, 0.5, table=refused)
    monkeypatch.undo()
    average_triton.average_(averages, moved, 0.5, table=table)
    assert captured() is not None
    assert captured() is not table._rows
    del table, refused
    gc.collect()
    assert captured() is None


if torch.cuda.is_available():

    def test_captured_in_a_cuda_graph():
        """The weight lives on the device: a replay moves by what it holds then."""
        averages, params, copies = lists(torch.bfloat16, torch.bfloat16)
        weight = torch.zeros((), device=DEVICE)
        table = AverageTable()
        average_triton.average_(averages, params, weight, copies, table)  # builds the table, compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            average_triton.average_(averages, params, weight, copies, table)
        for value in (0.5, 0.125):
            weight.fill_(value)
            want = expected(averages, params, value)
            graph.replay()
            assert_moved(averages, want, copies)

    def test_one_kernel_without_recompilation():
        averages, params, copies = lists(torch.bfloat16, torch.bfloat16)
        table = AverageTable()
        average_triton.average_(averages, params, 0.5, copies, table)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for weight in (0.25, 1.0, 3e-5):
                average_triton.average_(averages, params, weight, copies, table)
            torch.cuda.synchronize()
        kernels = [e for e in profile.key_averages() if "average_kernel" in e.key]
        assert sum(e.count for e in kernels) == 3
        assert len(profile.key_averages()) == len(kernels) == 1


_COMPILE = """
import json, re, subprocess, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tracer.kernels import average_triton

tools = Path(triton.__file__).parent / "backends/nvidia/bin"
for backend, arch, warp in (("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)):
    for on_device in (False, True):
        constants = {"ON_DEVICE": on_device, "BLOCK": average_triton.BLOCK}
        types = {"table_ptr": "*i64", "weight": "*fp32" if on_device else "fp32"}
        source = ASTSource(
            average_triton.average_kernel, types | dict.fromkeys(constants, "constexpr"), constants,
            {(0,): [["tt.divisibility", 16]]},
        )
        asm = triton.compile(
            source, target=GPUTarget(backend, arch, warp), options={"num_warps": average_triton.NUM_WARPS}
        ).asm
        if backend == "cuda":
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(asm["cubin"])
                file.flush()
                command = [tools / "cuobjdump", "-res-usage", file.name]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            usage = dict(re.findall(r"(REG|STACK|LOCAL):(\\d+)", out))
            registers, spilled = usage["REG"], [usage["STACK"], usage["LOCAL"]]
            wide = all(w in asm["ptx"] for w in ("ld.global.v4.b32", "st.global.v4.b32"))
        else:
            usage = dict(re.findall(r"\\.([vs]gpr_(?:spill_)?count):\\s*(\\d+)", asm["amdgcn"]))
            registers, spilled = usage["vgpr_count"], [usage["vgpr_spill_count"], usage["sgpr_spill_count"]]
            wide = "global_load_dwordx4" in asm["amdgcn"]
        print(json.dumps({"arch": arch, "registers": int(registers), "spilled": spilled, "wide": wide}))
"""


def test_machine_code():
    """Compiled for each architecture as shipped: no spills, 16-byte words, six programs a multiprocessor."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert [r["arch"] for r in results] == [80, 80, 90, 90, 100, 100, "gfx942", "gfx942"]
    for result in results:
        assert result["spilled"] == ["0", "0"], result
        assert result["wide"], result
        assert result["registers"] <= 42, result
