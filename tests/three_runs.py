"""The rule for tolerances: three runs, of which ours may be no worse than torch's.

The same inputs are computed by the definition in float64 (the truth), by the definition at the dtype under test
(torch), and by the implementation under test (ours). The error of ours may exceed the error of torch by a stated
slack, so a tolerance says how much accuracy our way of computing may cost, not how hard the problem is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# What ours may lose beside torch, relative to the norm of the truth: sums in another order in the dtypes that
# statistics are kept in, and one more rounding of a gradient to the dtypes that are narrower.
SLACK = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def error(got: Tensor, truth: Tensor) -> float:
    """Return ‖got − truth‖ relative to ‖truth‖, absolute where that is below 1 (a single pair has loss 0)."""
    got, truth = got.detach().double().cpu(), truth.detach().double().cpu()
    return float((got - truth).norm() / truth.norm().clamp(min=1.0))


def assert_no_worse(
    ours: Mapping[str, Tensor], by_torch: Mapping[str, Tensor], truth: Mapping[str, Tensor], slack: float
) -> None:
    """Assert that each of our results is no further from the truth than torch's plus ``slack``."""
    assert ours.keys() == by_torch.keys() == truth.keys()
    for name, exact in truth.items():
        assert ours[name].shape == exact.shape, name
        allowed = error(by_torch[name], exact) + slack
        found = error(ours[name], exact)
        assert found <= allowed, (
            f"{name}: error {found:.3g}, torch's plus slack {allowed:.3g}"
        )  # NaN fails too
