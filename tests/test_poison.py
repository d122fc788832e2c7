"""Proof that the tests' poisoned memory shows a lane that nobody wrote."""

from __future__ import annotations

import poison
import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import DEVICE

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Copy the first ``n`` numbers."""
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes, mask=lanes < n), mask=lanes < n)


@pytest.mark.parametrize("written", [7, 8])
def test_a_kernel_that_leaves_a_lane_unwritten_is_caught(written):
    x = torch.arange(8.0, device=DEVICE)
    out = torch.empty_like(x)
    _copy_kernel[(1,)](x, out, written, BLOCK=8)
    assert out.isnan().tolist() == [False] * written + [True] * (8 - written)
    assert torch.equal(out, x) == (written == 8)


def fresh(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    like = torch.zeros(5, device=DEVICE).to(dtype)
    return {
        "empty": torch.empty(5, dtype=dtype, device=DEVICE),
        "empty_like": torch.empty_like(like),
        "empty_strided": torch.empty_strided((5,), (2,), dtype=dtype, device=DEVICE),
        "empty_permuted": torch.empty_permuted((5, 2), (1, 0), dtype=dtype, device=DEVICE),
        "new_empty": like.new_empty(5),
        "new_empty_strided": like.new_empty_strided((5,), (2,)),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fresh_floats_are_nan(dtype):
    assert [name for name, x in fresh(dtype).items() if not x.float().isnan().all()] == []


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_fresh_integers_are_large_and_odd(dtype):
    odd = int.from_bytes([0x7F] * dtype.itemsize, "little")
    assert [name for name, x in fresh(dtype).items() if not (x == odd).all()] == []


def test_the_library_gets_poisoned_memory():
    """A module of tracer is recognised by its file."""
    scope = {"torch": torch}
    exec(compile("x = torch.empty(3)", f"{poison.ROOT}/tracer/ops.py", "exec"), scope)
    assert scope["x"].isnan().all()


def test_others_get_their_memory_untouched(monkeypatch):
    """DeepSpeed reserves gigabytes that it never touches."""
    monkeypatch.setattr(poison, "fill", lambda tensor: pytest.fail("filled"))
    exec(
        compile("torch.empty(3)", f"{poison.ROOT}/.venv/lib/site-packages/deepspeed/x.py", "exec"),
        {"torch": torch},
    )
    exec(compile("torch.empty(3)", "/lib/python3/x.py", "exec"), {"torch": torch})


def test_no_counter_of_operations_sees_the_poison():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    with Names():
        x = torch.empty(3, device=DEVICE)
    assert names == ["empty"]
    assert x.isnan().all()


@pytest.mark.parametrize("attempt", [1, 2])
def test_compiled_code_may_ask_for_memory(attempt):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def first_two(x):
        out = torch.empty(3, device=x.device)
        out[:2] = x[:2]
        return out

    assert first_two(torch.ones(3, device=DEVICE))[:2].tolist() == [1, 1]


def test_meta_tensors_and_parameters_pass():
    assert torch.empty(3, device="meta").is_meta
    assert torch.empty(3, requires_grad=True).isnan().all()
