"""The one dispatcher: validates a call, picks an implementation, gives it autograd and torch.compile.

``contrastive_loss`` is the whole public face of the fused loss. ``impl`` is one of

* ``"triton"``  GPU kernels (``kernels/contrastive.py``): no N×M buffer, forward or backward;
* ``"blocked"`` the same walk in torch operations (``kernels/blocked.py``): CPU and any other device;
* ``"eager"``   the definition (``kernels/eager.py``): any dtype, N×M matrices in memory;
* ``"auto"``    ``triton`` for CUDA/ROCm tensors, ``blocked`` for everything else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tracer.kernels import blocked, eager

IMPLS = ("auto", "triton", "blocked", "eager")


class ContrastiveOutput(NamedTuple):
    """Result of :func:`contrastive_loss`.

    ``loss`` is a scalar; ``terms`` maps contrastive, relational, interactive, cross and feature to
    their unweighted values (0 where the term is off); ``stats`` maps the names of
    ``kernels.eager.stat_names`` and the derived ones to device scalars, empty unless asked for.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    stats: dict[str, Tensor]


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    margin: float = 0.0,
    smoothing: float = 0.0,
    teacher_image: Tensor | None = None,
    teacher_text: Tensor | None = None,
    teacher_logit_scale: Tensor | float | None = None,
    teacher_temperature: float = 1.0,
    relational: float = 0.0,
    interactive: float = 0.0,
    cross: float = 0.0,
    feature: float = 0.0,
    group: object | None = None,
    impl: str = "auto",
    stats: bool = False,
) -> ContrastiveOutput:
    """Multi-positive contrastive loss with optional margin and distillation, never an N×M matrix.

    loss = contrastive + relational·CRD + interactive·ICL + cross·XKD + feature·FD, the terms being
    defined in ``kernels/eager.py`` (TRACER, arXiv 2605.29380; MPM-NCE, arXiv 2408.05749).
    """
    raise NotImplementedError
