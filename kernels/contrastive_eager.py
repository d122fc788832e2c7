"""The definition of the contrastive objective and of its diagnostics, written out in plain torch.

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
    feature     = mean (u − u')² + mean (v − v')²                                     TRACER, FD

Sources: TRACER (arXiv 2605.29380) for the distillation terms, R-Adapter (arXiv 2408.05749) for the
margin and the smoothed multi-positive targets q.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .contrastive import (
    DIRECTIONS,
    TERMS,
    Inputs,
    Options,
    Saved,
    Statistics,
    accumulation_dtype,
    teacher_factor,
)

_LOG2E = math.log2(math.e)


class Logits(NamedTuple):
    """The matrices [N, M] that the terms are made of; z only with the contrastive term, t, a, b with a teacher."""

    positives: Tensor  # P
    s: Tensor
    z: Tensor | None = None
    t: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


def logit_matrices(inputs: Inputs, options: Options) -> Logits:
    """Return the matrices that the enabled terms and the diagnostics need."""
    image, text = inputs.image, inputs.text
    dtype = accumulation_dtype(image)
    sigma = inputs.logit_scale.to(dtype)
    labels, text_labels = inputs.labels, inputs.text_labels
    if labels is None or text_labels is None:
        labels = text_labels = torch.arange(len(image), device=image.device)
    positives = (labels[:, None] == text_labels[None, :]).to(dtype)
    similarity = (image @ text.T).to(dtype)
    logits = Logits(positives, sigma * similarity)
    if options.contrastive:
        logits = logits._replace(z=sigma * (similarity + options.margin * (1 - positives)))
    factor, u, v = teacher_factor(inputs, options), inputs.teacher_image, inputs.teacher_text
    if factor is not None and u is not None and v is not None:
        u, v = u.detach(), v.detach()
        logits = logits._replace(t=factor * (u @ v.T).to(dtype))
        if options.crossed:
            logits = logits._replace(
                a=sigma * (image @ v.to(image.dtype).T).to(dtype),
                b=sigma * (u.to(text.dtype) @ text.T).to(dtype),
            )
    return logits


def targets(positives: Tensor, smoothing: float, dim: int) -> Tensor:
    """Return the target distribution q along ``dim``: (1−ε) P/|P| + ε (1−P)/(M−|P|); without negatives P/|P|.

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
    """Return the mean over rows (``dim=1``) or columns (``dim=0``) of CE(target, softmax(logits))."""
    return -(target * logits.log_softmax(dim)).sum(dim).mean()


def kl(teacher: Tensor, student: Tensor, dim: int) -> Tensor:
    """Return the mean over rows or columns of KL(softmax(teacher) ‖ softmax(student))."""
    log_p, log_q = teacher.log_softmax(dim), student.log_softmax(dim)
    return (log_p.exp() * (log_p - log_q)).sum(dim).mean()


def contrastive_terms(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Return ``(terms, diagnostics)``, differentiable and detached, as ``contrastive.Forward`` holds them."""
    positives, s, z, t, a, b = logit_matrices(inputs, options)
    terms = {name: s.new_zeros(()) for name in TERMS}
    if z is not None:
        terms["contrastive"] = 0.5 * (
            cross_entropy(targets(positives, options.smoothing, 1), z, 1)
            + cross_entropy(targets(positives, options.smoothing, 0), z, 0)
        )
    if t is not None and options.relational:
        terms["relational"] = 0.5 * (kl(t, s, 1) + kl(t, s, 0))
    if a is not None and b is not None and options.interactive:
        terms["interactive"] = 0.5 * (
            cross_entropy(targets(positives, 0.0, 1), a, 1) + cross_entropy(targets(positives, 0.0, 0), b, 0)
        )
    if t is not None and a is not None and b is not None and options.cross:
        terms["cross"] = 0.5 * (kl(t, a, 1) + kl(t, b, 0))
    diagnostics = _diagnostics(s.detach(), t, positives) if options.stats else s.new_empty(0)
    return torch.stack(list(terms.values())), diagnostics


def feature_distance(student: Tensor, teacher: Tensor, rows: int) -> Tensor:
    """Return the sum of (student − teacher)² over all entries, divided by the entries of ``rows`` rows.

    This is one tower's part of the feature term of a batch of so many rows, of which these may be a part.
    """
    dtype = accumulation_dtype(student)
    return (student.to(dtype) - teacher.to(dtype)).square().sum() / (rows * student.shape[1])


def statistics(inputs: Inputs, options: Options) -> Saved:
    """Return what an implementation keeps for its backward pass; NaN where ``options`` need no log-sum-exp."""
    logits = logit_matrices(inputs, options)

    def along(dim: int, x: Tensor | None) -> Tensor:
        count = logits.positives.sum(dim)
        z, s, t, cross = (
            torch.full_like(count, math.nan) if m is None else m.logsumexp(dim) * _LOG2E
            for m in (logits.z, logits.s, logits.t, x)
        )
        return torch.stack(Statistics(z, s, t, cross, count))

    return Saved(along(1, logits.a), along(0, logits.b))


# ---------------------------------------------------------------------------------------------------
# Diagnostics.


def _diagnostics(student: Tensor, teacher: Tensor | None, positives: Tensor) -> Tensor:
    """Return the diagnostics of the margin-free logits, in the order of ``contrastive.diagnostic_names``."""
    values = []
    for logits in (student,) if teacher is None else (student, teacher):
        for dim in (1, 0):
            p = logits.softmax(dim)
            is_right = positives.gather(dim, logits.argmax(dim, keepdim=True))
            values += [
                -(p * logits.log_softmax(dim)).sum(dim).mean(),
                p.amax(dim).mean(),
                (p * positives).sum(dim).mean(),
                is_right.mean(),
            ]
    if teacher is not None:
        for dim in (1, 0):
            agree = student.argmax(dim) == teacher.argmax(dim)
            values += [agree.to(student.dtype).mean(), kl(teacher, student, dim)]
    return torch.stack(values)


def derived_diagnostics(measured: dict[str, Tensor], N: int, M: int) -> dict[str, Tensor]:
    """Return the diagnostics that follow from measured ones without another look at the logits.

    ``effective_temperature`` = log M / mean entropy (log N for text_to_image): 1 for uniform
    predictions, growing as they sharpen. ``accuracy_difference`` = student − teacher.
    """
    derived = {}
    for direction, size in zip(DIRECTIONS, (M, N), strict=True):
        for model in ("student", "teacher"):
            if (entropy := measured.get(f"{model}/{direction}/entropy")) is not None:
                # The bound keeps the quotient finite when every prediction is certain.
                derived[f"{model}/{direction}/effective_temperature"] = math.log(size) / entropy.clamp(
                    min=1e-6
                )
        if (teacher := measured.get(f"teacher/{direction}/accuracy")) is not None:
            student = measured[f"student/{direction}/accuracy"]
            derived[f"pair/{direction}/accuracy_difference"] = student - teacher
    return derived


def sampled_diagnostics(
    image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor, rows: int
) -> dict[str, Tensor]:
    """Return overlap and diversity of rankings on ``rows`` evenly spaced images; see ``tracer.diagnostics``."""
    N, M = len(image), len(text)
    rows, best = min(rows, N), min(5, M)
    at = torch.linspace(0, N - 1, rows, device=image.device).long()
    diversity, ranked = {}, []
    for model, u, v in (("student", image, text), ("teacher", teacher_image, teacher_text)):
        dtype = accumulation_dtype(u)
        top = (u[at].to(dtype) @ v.to(dtype).T).topk(best).indices
        chosen = torch.zeros(M, device=image.device).scatter_(0, top[:, 0], 1.0)
        diversity[f"{model}/diversity"] = chosen.sum() / min(rows, M)
        ranked.append(top)
    student, teacher = ranked
    overlap = (student[:, :, None] == teacher[:, None, :]).any(2)
    return {"top5_overlap": overlap.float().mean(), **diversity}
