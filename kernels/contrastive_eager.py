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

**Directions.** Two other weights may take the place of the halves; a half of weight 0 is not looked at.

**Left out.** With ``Options.ignore`` the means run over the rows (columns) that have a positive. The others are
negatives still, and have no softmax of their own.

**Sigmoid.** Each pair is a question of its own, with y = 2 P − 1 and biases b, b', and there is one direction:

    contrastive = mean_i Σ_j softplus(−y_ij (z_ij + b))                               SigLIP
    relational  = mean_i Σ_j KL(sigmoid(t_ij + b') ‖ sigmoid(s_ij + b))               of two outcomes

The margin raises the negatives as before; a pair's target is certain, so that there is no smoothing. The means
run over all N rows, with ``Options.ignore`` over those that have a positive, and the sums over all pairs. The
other terms take softmaxes, which no bias changes.

Sources: TRACER (arXiv 2605.29380) for the distillation terms, R-Adapter (arXiv 2408.05749) for the
margin and the smoothed multi-positive targets q, SigLIP (arXiv 2303.15343) for the sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .contrastive import (
    DIRECTIONS,
    TERMS,
    Biases,
    Inputs,
    Options,
    Saved,
    Statistics,
    accumulation_dtype,
    teacher_factor,
)
from .sigmoid import divisor

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
        positives = torch.eye(len(image), dtype=dtype, device=image.device)
    else:
        positives = (labels[:, None] == text_labels[None, :]).to(dtype)
    similarity = (image @ text.T).to(dtype)
    logits = Logits(positives, sigma * similarity)
    if options.contrastive:
        apart = options.margin > 0
        z = sigma * (similarity + options.margin * (1 - positives)) if apart else logits.s
        logits = logits._replace(z=z)
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


def targets(positives: Tensor, options: Options, dim: int, smoothing: float = 0.0) -> Tensor:
    """Return the target distribution q along ``dim``: (1−ε) P/|P| + ε (1−P)/(M−|P|); without negatives P/|P|.

    A row without any positive has no target: unless it is left out, it comes out as NaN (0/0), as does the loss.
    """
    count = positives.sum(dim, keepdim=True)
    hard = positives / (count.clamp(min=1) if options.ignore else count)
    if smoothing == 0.0:
        return hard
    negatives = positives.shape[dim] - count
    soft = (1 - smoothing) * hard + smoothing * (1 - positives) / negatives.clamp(min=1)
    return torch.where(negatives == 0, hard, soft)


def cross_entropy(target: Tensor, logits: Tensor, dim: int) -> Tensor:
    """Return CE(target, softmax(logits)) of each row (``dim=1``) or column (``dim=0``)."""
    return -(target * logits.log_softmax(dim)).sum(dim)


def kl(teacher: Tensor, student: Tensor, dim: int) -> Tensor:
    """Return KL(softmax(teacher) ‖ softmax(student)) of each row or column."""
    log_p, log_q = teacher.log_softmax(dim), student.log_softmax(dim)
    return (log_p.exp() * (log_p - log_q)).sum(dim)


def mean(values: Tensor, positives: Tensor, options: Options, dim: int) -> Tensor:
    """Return the mean over the rows (``dim=1``) or columns (``dim=0``) that count."""
    if not options.ignore:
        return values.mean()
    counts = positives.sum(dim) > 0
    return torch.where(counts, values, 0.0).sum() / counts.sum()


def contrastive_terms(
    inputs: Inputs, options: Options, biases: Biases | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``(terms, diagnostics)``, differentiable and detached, as ``contrastive.Forward`` holds them."""
    logits = logit_matrices(inputs, options)
    positives, s, z, t, a, b = logits
    terms = dict.fromkeys(TERMS, s.new_zeros(()))
    in_pairs = inputs.labels is None or inputs.text_labels is None

    def entropy(logits: Tensor, dim: int, smoothing: float = 0.0) -> Tensor:
        if in_pairs and smoothing == 0.0:  # all of the target lies on the diagonal
            return -logits.log_softmax(dim).diagonal()
        return cross_entropy(targets(positives, options, dim, smoothing), logits, dim)

    def halves(values: Callable[[int], Tensor]) -> Tensor:
        weights = {1: options.image_to_text, 0: options.text_to_image}
        parts = [
            weight * mean(values(dim), positives, options, dim) for dim, weight in weights.items() if weight
        ]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    if options.sigmoid and biases is not None:
        terms |= sigmoid_terms(logits, options, biases)
    else:
        if z is not None:
            terms["contrastive"] = halves(lambda dim: entropy(z, dim, options.smoothing))
        if t is not None and options.relational:
            terms["relational"] = halves(lambda dim: kl(t, s, dim))
    if a is not None and b is not None and options.interactive:
        terms["interactive"] = halves(lambda dim: entropy(a if dim else b, dim))
    if t is not None and a is not None and b is not None and options.cross:
        terms["cross"] = halves(lambda dim: kl(t, a if dim else b, dim))
    diagnostics = _diagnostics(s.detach(), t, positives, options) if options.stats else s.new_empty(0)
    return torch.stack(list(terms.values())), diagnostics


def sigmoid_terms(logits: Logits, options: Options, biases: Biases) -> dict[str, Tensor]:
    """Return the contrastive and the relational term of single pairs, those that are on."""
    positives, terms = logits.positives, {}

    rows = divisor((positives.sum(1) > 0).sum(), positives.dtype) if options.ignore else len(positives)

    def over_pairs(values: Tensor) -> Tensor:
        return values.sum() / rows

    if logits.z is not None:
        x = logits.z + biases.logit_bias
        terms["contrastive"] = over_pairs(softplus(torch.where(positives > 0, -x, x)))
    if logits.t is not None and biases.teacher_logit_bias is not None and options.relational:
        t, s = logits.t + biases.teacher_logit_bias, logits.s + biases.logit_bias
        terms["relational"] = over_pairs(t.sigmoid() * (t - s) - softplus(t) + softplus(s))
    return terms


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + eˣ), in full precision for any x."""
    return -F.logsigmoid(-x)


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


def _diagnostics(student: Tensor, teacher: Tensor | None, positives: Tensor, options: Options) -> Tensor:
    """Return the diagnostics of the margin-free logits, in the order of ``contrastive.diagnostic_names``."""
    values = []

    def add(of_rows: Tensor, dim: int) -> None:
        values.append(mean(of_rows, positives, options, dim))

    for logits in (student,) if teacher is None else (student, teacher):
        for dim in (1, 0):
            p = logits.softmax(dim)
            is_right = positives.gather(dim, logits.argmax(dim, keepdim=True)).squeeze(dim)
            add(-(p * logits.log_softmax(dim)).sum(dim), dim)
            add(p.amax(dim), dim)
            add((p * positives).sum(dim), dim)
            add(is_right, dim)
    if teacher is not None:
        for dim in (1, 0):
            add((student.argmax(dim) == teacher.argmax(dim)).to(student.dtype), dim)
            add(kl(teacher, student, dim), dim)
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
