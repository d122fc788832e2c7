"""The definition of the contrastive objective, written out in plain torch.

Every other implementation is tested against this file. It works in any floating dtype (float64
included), stores the N×M matrices it talks about, and leaves all gradients to autograd.

    P_ij = [y_i == y_j]                            positives
    z_ij = σ (u_i·v_j + δ (1 − P_ij))              contrastive logits, margin δ on the negatives
    s_ij = σ u_i·v_j        t_ij = σ' u'_i·v'_j / T
    a_ij = σ u_i·v'_j       b_ij = σ  u'_i·v_j     a prime marks the teacher

    contrastive = ½ mean_i CE(q_i., softmax_j z) + ½ mean_j CE(q_.j, softmax_i z)     MPM-NCE
    relational  = ½ mean_i KL(t_i. ‖ s_i.)       + ½ mean_j KL(t_.j ‖ s_.j)           TRACER, CRD
    interactive = ½ mean_i CE(P_i./|P_i.|, a_i.) + ½ mean_j CE(P_.j/|P_.j|, b_.j)     TRACER, ICL
    cross       = ½ mean_i KL(t_i. ‖ a_i.)       + ½ mean_j KL(t_.j ‖ b_.j)           TRACER, XKD

Sources: TRACER (arXiv 2605.29380) for the distillation terms, R-Adapter (arXiv 2408.05749) for the
margin and the smoothed multi-positive targets q.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The order of the terms in every implementation's vector of terms.
TERMS = ("contrastive", "relational", "interactive", "cross")
# How many statistics per row and per column an implementation hands from forward to backward, whatever
# the options. Which they are is the implementation's own business.
STAT_ROWS = 5

_PER_MODEL = ("entropy", "confidence", "positive_probability", "accuracy")
_DIRECTIONS = ("image_to_text", "text_to_image")
_STUDENT_STATS = tuple(f"student/{d}/{name}" for d in _DIRECTIONS for name in _PER_MODEL)
_TEACHER_STATS = tuple(f"teacher/{d}/{name}" for d in _DIRECTIONS for name in _PER_MODEL)
_PAIR_STATS = tuple(f"pair/{d}/{name}" for d in _DIRECTIONS for name in ("agreement", "kl"))


def stat_names(has_teacher: bool) -> tuple[str, ...]:
    """Names, in order, of the diagnostics that an implementation measures in its walk."""
    return _STUDENT_STATS + (_TEACHER_STATS + _PAIR_STATS if has_teacher else ())


def targets(positives: Tensor, smoothing: float, dim: int) -> Tensor:
    """Target distribution q along ``dim``: (1−ε) P/|P| + ε (1−P)/(M−|P|); without negatives P/|P|.

    A row without any positive has no target: it comes out as NaN (0/0), and so does the loss.
    """
    count = positives.sum(dim, keepdim=True)
    hard = positives / count
    if smoothing == 0.0:
        return hard
    negatives = positives.shape[dim] - count
    soft = (1 - smoothing) * hard + smoothing * (1 - positives) / negatives.clamp(min=1)
    return torch.where(negatives == 0, hard, soft)


def cross_entropy(target: Tensor, logits: Tensor, dim: int) -> Tensor:
    """Mean over rows (``dim=1``) or columns (``dim=0``) of CE(target, softmax(logits))."""
    return -(target * logits.log_softmax(dim)).sum(dim).mean()


def kl(teacher: Tensor, student: Tensor, dim: int) -> Tensor:
    """Mean over rows or columns of KL(softmax(teacher) ‖ softmax(student))."""
    log_p, log_q = teacher.log_softmax(dim), student.log_softmax(dim)
    return (log_p.exp() * (log_p - log_q)).sum(dim).mean()


def contrastive_terms(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    labels: Tensor,
    text_labels: Tensor,
    teacher_image: Tensor | None = None,
    teacher_text: Tensor | None = None,
    teacher_scale: Tensor | None = None,
    *,
    margin: float = 0.0,
    smoothing: float = 0.0,
    enabled: Sequence[bool] = (True, False, False, False),
    stats: bool = False,
) -> tuple[Tensor, Tensor]:
    """All terms of the objective.

    Args:
        image: student image features u, [N, D], L2-normalised.
        text: student text features v, [M, D].
        logit_scale: σ, a scalar (already exponentiated).
        labels: y of the image rows, [N], integer. text_labels: y of the text columns, [M].
        teacher_image: u', [N, D]. teacher_text: v', [M, D].
        teacher_scale: σ'/T, a scalar.
        margin: δ. smoothing: ε.
        enabled: which of :data:`TERMS` to compute; the others are 0.
        stats: also compute the diagnostics named by :func:`stat_names`.

    Returns:
        ``(terms, diagnostics)``: [4] in the order of :data:`TERMS`, and [len(stat_names(...))],
        empty unless asked for. Both in float64 for float64 features, in float32 otherwise.
    """
    acc = torch.promote_types(image.dtype, torch.float32)
    sigma = logit_scale.to(acc)

    positive = labels[:, None] == text_labels[None, :]
    positives = positive.to(acc)
    similarity = (image @ text.T).to(acc)
    student = sigma * similarity

    terms = [student.new_zeros(()) for _ in TERMS]
    if enabled[0]:
        z = sigma * (similarity + margin * (1 - positives))
        terms[0] = 0.5 * (
            cross_entropy(targets(positives, smoothing, 1), z, 1)
            + cross_entropy(targets(positives, smoothing, 0), z, 0)
        )
    teacher = None
    if teacher_image is not None and teacher_text is not None and teacher_scale is not None:
        teacher_image, teacher_text = teacher_image.detach(), teacher_text.detach()
        teacher = teacher_scale.detach().to(acc) * (teacher_image @ teacher_text.T).to(acc)
        if enabled[1]:
            terms[1] = 0.5 * (kl(teacher, student, 1) + kl(teacher, student, 0))
        if enabled[2] or enabled[3]:
            a = sigma * (image @ teacher_text.to(image.dtype).T).to(acc)
            b = sigma * (teacher_image.to(text.dtype) @ text.T).to(acc)
        if enabled[2]:
            terms[2] = 0.5 * (
                cross_entropy(targets(positives, 0.0, 1), a, 1)
                + cross_entropy(targets(positives, 0.0, 0), b, 0)
            )
        if enabled[3]:
            terms[3] = 0.5 * (kl(teacher, a, 1) + kl(teacher, b, 0))

    measured = _diagnostics(student.detach(), teacher, positive) if stats else student.new_empty(0)
    return torch.stack(terms), measured


def _diagnostics(student: Tensor, teacher: Tensor | None, positive: Tensor) -> Tensor:
    """Diagnostics of the margin-free logits, in the order of :func:`stat_names`."""
    values = []
    for logits in (student,) if teacher is None else (student, teacher):
        for dim in (1, 0):
            p = logits.softmax(dim)
            hit = positive.gather(dim, logits.argmax(dim, keepdim=True))
            values += [
                -(p * logits.log_softmax(dim)).sum(dim).mean(),
                p.amax(dim).mean(),
                (p * positive).sum(dim).mean(),
                hit.to(p.dtype).mean(),
            ]
    if teacher is not None:
        for dim in (1, 0):
            same = student.argmax(dim) == teacher.argmax(dim)
            values += [same.to(student.dtype).mean(), kl(teacher, student, dim)]
    return torch.stack(values)
