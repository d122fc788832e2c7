"""Bugs, planted in the kernels one at a time: for each, a check that the suite makes fails."""

from __future__ import annotations

import pytest
import torch
from column_statistics import assert_right
from kernel_calls import SMALL, check, options, problem
from planted import BARRIERS, BUGS, FOLDER, planted
from sigmoid_calls import biases, pairwise
from sigmoid_calls import check as check_pairs
from triton_interpreter import DEVICE, HAS_GPU

from tracer.kernels._grid import plan
from tracer.kernels._triton import gpu, planning_for
from tracer.kernels.contrastive import Inputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CHOSEN = options(0.3, 0.1, stats=True)


def ties() -> Inputs:
    """Return a problem whose columns have ties: each image comes in every row of tiles again."""
    inputs, generator = problem(45, 70, 16), torch.Generator().manual_seed(0)
    for x in (inputs.image, inputs.text, inputs.teacher_image, inputs.teacher_text):
        x[:] = torch.randint(-3, 4, x.shape, generator=generator) / 8
    for x in (inputs.image, inputs.teacher_image):
        x[:] = x[[i % 16 for i in range(len(x))]]
    return inputs


def check_statistics() -> None:
    """Make the check of tests/kernels/test_merge.py, with ties among images."""
    assert_right(ties(), CHOSEN, multiprocessors=1)


def check_racing_warps() -> None:
    """Make the check of tests/kernels/test_merge.py with warps that run apart; a GPU does that itself."""
    from warp_orders import apart

    with apart(0):
        check_statistics()


def check_values_and_gradients() -> None:
    """Make the check of tests/kernels/test_contrastive_triton.py, on several programs in both directions."""
    with planning_for(gpu(DEVICE).architecture, 9):
        assert plan(45, 70, SMALL, 9).programs == (3, 3)
        check(problem(45, 70, 16), CHOSEN)


def check_sigmoid() -> None:
    """Make the check of tests/kernels/test_sigmoid.py, on several programs in both directions."""
    with planning_for(gpu(DEVICE).architecture, 9):
        check_pairs("triton", problem(45, 70, 16), biases(), pairwise())


CHECKS = {
    name: check_racing_warps
    if name in BARRIERS
    else check_sigmoid
    if bug.file == "_triton_sigmoid"
    else check_values_and_gradients
    if bug.file == "_triton_backward" or "partials" in name
    else check_statistics
    for name, bug in BUGS.items()
}


@pytest.mark.parametrize("correct", sorted({c.__name__ for c in CHECKS.values()}))
def test_the_checks_pass_without_a_bug(correct):
    if not (HAS_GPU and correct == "check_racing_warps"):
        globals()[correct]()


@pytest.mark.parametrize("name", [name for name in BUGS if not (HAS_GPU and name in BARRIERS)])
def test_a_check_fails_on(name, tmp_path):
    with planted(BUGS[name], tmp_path), pytest.raises(AssertionError):
        CHECKS[name]()


def test_there_are_ten_or_more_in_every_file_of_kernels():
    assert len(BUGS) >= 10
    kernels = {path.stem for path in FOLDER.glob("_triton_*.py") if "@triton.jit" in path.read_text()}
    assert {bug.file for bug in BUGS.values()} == kernels
