"""The loss and the moving average as a device runs them: again and again, replayed, beside other work, anywhere.

On a GPU at the size of a training step; in the interpreter the same checks on a few pairs, where a graph is the
call itself and every stream and device is the CPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from kernel_calls import options, problem, to_device
from torch import Tensor
from triton_interpreter import DEVICE, HAS_GPU

from benchmarks import gpu
from tracer.kernels import average_triton, contrastive_triton
from tracer.kernels.contrastive import Inputs, Needs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PAIRS, WIDTH, REPEATS = (4096, 512, 200) if HAS_GPU else (20, 16, 2)
CHOSEN = options(0.2, 0.1, stats=True)


def features(seed: int = 0) -> Inputs:
    return to_device(problem(PAIRS, PAIRS, WIDTH, dtype=torch.bfloat16, seed=seed), torch.bfloat16)


def results(inputs: Inputs) -> list[Tensor]:
    """Return everything that both passes compute."""
    forward = contrastive_triton.forward(inputs, CHOSEN)
    grads = contrastive_triton.backward(
        torch.ones_like(forward.terms), inputs, forward.saved, CHOSEN, Needs()
    )
    return [forward.terms, forward.diagnostics, *forward.saved, *grads]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.isfinite(x).all() for x in want)
    assert [torch.equal(x.cpu(), y.cpu()) for x, y in zip(got, want, strict=True)] == [True] * len(want)


def test_repeats_agree_bit_for_bit():
    inputs = features()
    first = results(inputs)
    for _ in range(REPEATS):
        assert_same(results(inputs), first)


def test_a_replay_computes_what_stands_in_memory_then():
    inputs, last = features(), {}

    def step() -> None:
        last["results"] = results(inputs)

    step()  # compiles
    replays = gpu.captured({"step": step}) if HAS_GPU else {"step": step}
    assert replays is not None
    for seed in (1, 2):
        other = features(seed)
        for x, y in zip(inputs, other, strict=True):
            x.copy_(y)
        replays["step"]()
        assert_same(last["results"], results(other))


def test_another_stream_beside_a_busy_one():
    inputs = features()
    want = results(inputs)
    busy = torch.ones(PAIRS, PAIRS, device=DEVICE)
    stream = torch.cuda.Stream() if HAS_GPU else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        busy = busy @ busy / PAIRS
    with torch.cuda.stream(stream) if stream else nullcontext():
        got = results(inputs)
    if stream:
        torch.cuda.current_stream().wait_stream(stream)
    assert_same(got, want)


def test_the_last_device_while_the_first_is_current():
    last = torch.device("cuda", torch.cuda.device_count() - 1) if HAS_GPU else DEVICE
    inputs = features()
    got = results(Inputs(*(x.to(last) for x in inputs)))
    assert all(x.device == last for x in got)
    for x, y in zip(got, results(inputs), strict=True):  # bit for bit only if the two cards are alike
        torch.testing.assert_close(x.cpu(), y.cpu(), rtol=2e-2, atol=1e-4)
    averages, params = [torch.zeros(5000, device=last)], [torch.ones(5000, device=last)]
    average_triton.average_(averages, params, 0.25)
    assert (averages[0] == 0.25).all()
