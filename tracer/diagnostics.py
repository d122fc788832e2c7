"""Diagnostics of a contrastive loss by name: measured during the walk, derived from those, or sampled.

Names read ``model/direction/diagnostic``, model being student, teacher or pair, direction image_to_text or
text_to_image. ``kernels/contrastive_eager.py`` defines every value.
"""

from __future__ import annotations

from torch import Tensor

from tracer import _checks
from tracer.kernels import contrastive_eager
from tracer.kernels.contrastive import diagnostic_names


def named_diagnostics(measured: Tensor, has_teacher: bool, N: int, M: int) -> dict[str, Tensor]:
    """Return the diagnostics of N images and M texts as scalars by name, measured ones first, then derived ones.

    Args:
        measured: [len(diagnostic_names(has_teacher))], what an implementation returned.
    """
    named = dict(zip(diagnostic_names(has_teacher), measured.detach().unbind(), strict=True))
    return named | contrastive_eager.derived_diagnostics(named, N, M)


def sampled_diagnostics(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    rows: int = 256,
) -> dict[str, Tensor]:
    """Return diagnostics that need whole rows of logits, from at most ``rows`` evenly spaced images.

    ``top5_overlap``: mean share of the student's five best texts that are among the teacher's five
    best. ``student/diversity``, ``teacher/diversity``: distinct first choices divided by the largest
    number there could be, min(rows, M).

    Args:
        image: student image features [N, D]. text: student text features [M, D]. Floating point, L2-normalised.
        teacher_image: [N, D]. teacher_text: [M, D].
        rows: at least 1.

    Returns:
        Float32 scalars on the features' device, by name.

    Raises:
        ValueError: features that don't fit together, or ``rows`` below 1.
    """
    _checks.check_features(image, text, "sampled_diagnostics")
    _checks.check_teacher(image, text, teacher_image, teacher_text, {}, "sampled_diagnostics")
    if rows < 1:
        raise ValueError(f"sampled_diagnostics: rows must be at least 1, got {rows}")
    return contrastive_eager.sampled_diagnostics(image, text, teacher_image, teacher_text, rows)
