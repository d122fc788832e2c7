"""Triton's interpreter, made fit for testing: right in bfloat16, and several times faster.

Import this before anything that imports the Triton kernels. On a machine with a GPU nothing happens and the
tests run on the GPU; without one ``TRITON_INTERPRET=1`` makes the same kernels run on CPU tensors. Programs
that compile kernels without a GPU must therefore be started in a process of their own.
"""

from __future__ import annotations

import os

import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def _bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def _float32_to_bfloat16(x: np.ndarray) -> np.ndarray:
        """Round to nearest even, which the interpreter's own conversion does not."""
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy()

    _create_dot = interpreter.InterpreterBuilder.create_dot
    _cast_impl = interpreter.InterpreterBuilder.cast_impl

    def create_dot(self, a, b, d, *options):
        """The interpreter keeps bfloat16 as bit patterns and multiplies those: multiply the numbers."""
        if a.dtype.scalar == tl.bfloat16:
            a = interpreter.TensorHandle(_bfloat16_to_float32(a.data), tl.float32)
            b = interpreter.TensorHandle(_bfloat16_to_float32(b.data), tl.float32)
        return _create_dot(self, a, b, d, *options)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_float32_to_bfloat16(src.data), tl.bfloat16)
        return _cast_impl(self, src, dst_type)

    _patched_globals: set[int] = set()

    def call(self, *args, **kwargs):
        """Call of a device function: it patches the whole language module anew every time; once will do."""
        if id(self.fn.__globals__) not in _patched_globals:
            interpreter._patch_lang(self.fn)
            _patched_globals.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.InterpretedFunction.__call__ = call
