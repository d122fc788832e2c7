"""The published training step in eager torch: its objective, its diagnostics and its teacher's update.

This is what TRACER is compared with, written from the definitions (arXiv 2605.29380) the way people write them
down. Nothing is slowed down on purpose.

* Losses: every term computes the logits that it needs from the features, both directions as full matrices. The
  whole objective takes 10 products of N²D forward and 10 backward, and about 20 buffers of N×N. It uses index
  targets where a row has a single positive, the fused ``cross_entropy`` and ``log_softmax``, and teacher logits
  without graph.
* Diagnostics: each matrix is computed once per step and direction, without graph. Each diagnostic becomes a
  Python number at once, which makes the host wait for a GPU, and rankings are compared row by row as Python
  sets.
* Teacher: its average is moved tensor by tensor, each into a new tensor.

Features are [N, D] and normalised; scales are exponentiated scalars. All functions serve a single process.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BEST = 5  # highest-ranked texts of a row that are compared


def tracer_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_logit_scale: Tensor,
    *,
    relational: float,
    interactive: float,
    cross: float,
    feature: float,
) -> Tensor:
    """Return CON + relational·CRD + interactive·ICL + cross·XKD + feature·FD, with one positive per row."""
    return (
        clip_loss(image, text, logit_scale)
        + relational
        * relational_loss(image, text, logit_scale, teacher_image, teacher_text, teacher_logit_scale)
        + interactive * interactive_loss(image, text, logit_scale, teacher_image, teacher_text)
        + cross * cross_loss(image, text, logit_scale, teacher_image, teacher_text, teacher_logit_scale)
        + feature * (F.mse_loss(image, teacher_image) + F.mse_loss(text, teacher_text))
    )


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Return the CLIP loss; 2 products forward, 4 backward."""
    labels = torch.arange(len(image), device=image.device)
    per_image = logit_scale * image @ text.T
    per_text = logit_scale * text @ image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def lit_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Return LiT's loss in one direction, each text among the images (arXiv 2111.07991); 1 + 2 products.

    The images are locked, and get no gradient.
    """
    labels = torch.arange(len(text), device=text.device)
    return F.cross_entropy(logit_scale * text @ image.detach().T, labels)


def relational_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_logit_scale: Tensor,
) -> Tensor:
    """Return the relational term (CRD); 2 products forward, 2 backward."""
    student = logit_scale * image @ text.T
    with torch.no_grad():
        teacher = teacher_logit_scale * teacher_image @ teacher_text.T
    return (_kl(student, teacher) + _kl(student.T, teacher.T)) / 2


def interactive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, teacher_image: Tensor, teacher_text: Tensor
) -> Tensor:
    """Return the interactive term (ICL); 2 products forward, 2 backward."""
    labels = torch.arange(len(image), device=image.device)
    per_image = logit_scale * image @ teacher_text.T
    per_text = logit_scale * text @ teacher_image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def cross_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_logit_scale: Tensor,
) -> Tensor:
    """Return the cross term (XKD); 4 products forward, 2 backward."""
    per_image = logit_scale * image @ teacher_text.T
    per_text = logit_scale * text @ teacher_image.T
    with torch.no_grad():
        teacher_per_image = teacher_logit_scale * teacher_image @ teacher_text.T
        teacher_per_text = teacher_logit_scale * teacher_text @ teacher_image.T
    return (_kl(per_image, teacher_per_image) + _kl(per_text, teacher_per_text)) / 2


def mpm_nce_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, labels: Tensor, margin: float, smoothing: float
) -> Tensor:
    """Return MPM-NCE (arXiv 2408.05749) of dense positives and soft targets; 2 products forward, 4 backward."""
    positives = (labels[:, None] == labels[None, :]).float()
    negatives = 1 - positives
    count = positives.sum(1, keepdim=True)
    targets = (1 - smoothing) * positives / count + smoothing * negatives / (len(labels) - count)
    per_image = logit_scale * (image @ text.T + margin * negatives)
    per_text = logit_scale * (text @ image.T + margin * negatives)
    return (F.cross_entropy(per_image, targets) + F.cross_entropy(per_text, targets)) / 2


def siglip_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | float = 0.0) -> Tensor:
    """Return the SigLIP loss (arXiv 2303.15343), to check open_clip's; 1 + 2 products."""
    sign = 2 * torch.eye(len(image), device=image.device) - 1
    return F.softplus(-sign * (logit_scale * image @ text.T + logit_bias)).sum() / len(image)


def siglip_loss_in_chunks(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, chunk: int = 512
) -> Tensor:
    """Return the SigLIP loss from the logits of ``chunk`` texts at a time, made again backward; 1 + 3 products."""

    def part(own: Tensor, start: int) -> Tensor:
        logits = logit_scale * image @ own.T + logit_bias
        pairs = torch.zeros_like(logits)
        pairs.diagonal(-start)[: len(own)] = 1
        return F.binary_cross_entropy_with_logits(logits, pairs, reduction="sum")

    parts = [checkpoint(part, own, n * chunk, use_reentrant=False) for n, own in enumerate(text.split(chunk))]
    return torch.stack(parts).sum() / len(image)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="batchmean")


@torch.no_grad()
def diagnostics(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_logit_scale: Tensor,
) -> dict[str, float]:
    """Return diagnostics of teacher and student, with rankings over all rows.

    The names are those of :func:`tracer.ops.contrastive_loss` and :func:`tracer.ops.sampled_diagnostics`.
    """
    both = {
        "student": (logit_scale * image @ text.T).float(),
        "teacher": (teacher_logit_scale * teacher_image @ teacher_text.T).float(),
    }
    labels = torch.arange(len(image), device=image.device)
    values: dict[str, float] = {}
    for direction in ("image_to_text", "text_to_image"):
        logits = {model: x if direction == "image_to_text" else x.T for model, x in both.items()}
        log_p = {model: x.log_softmax(1) for model, x in logits.items()}
        p = {model: x.exp() for model, x in log_p.items()}
        best = {model: x.argmax(1) for model, x in logits.items()}
        for model in both:
            name = f"{model}/{direction}"
            values[f"{name}/entropy"] = -(p[model] * log_p[model]).sum(1).mean().item()
            values[f"{name}/confidence"] = p[model].amax(1).mean().item()
            values[f"{name}/positive_probability"] = p[model].diagonal().mean().item()
            values[f"{name}/accuracy"] = (best[model] == labels).float().mean().item()
            values[f"{name}/effective_temperature"] = math.log(len(labels)) / max(
                values[f"{name}/entropy"], 1e-6
            )
        pair = f"pair/{direction}"
        kl = (p["teacher"] * (log_p["teacher"] - log_p["student"])).sum(1)
        values[f"{pair}/agreement"] = (best["student"] == best["teacher"]).float().mean().item()
        values[f"{pair}/kl"] = kl.mean().item()
        values[f"{pair}/accuracy_difference"] = (
            values[f"student/{direction}/accuracy"] - values[f"teacher/{direction}/accuracy"]
        )
    return values | _rankings(both["student"], both["teacher"])


def _rankings(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Return the overlap of the best texts, and the share of texts that rank first for some image."""
    count = min(BEST, student.shape[1])
    of_student, of_teacher = (x.topk(count, dim=1).indices.tolist() for x in (student, teacher))
    shared = [len(set(a) & set(b)) / count for a, b in zip(of_student, of_teacher, strict=True)]
    return {
        "top5_overlap": sum(shared) / len(shared),
        "student/diversity": len({row[0] for row in of_student}) / min(student.shape),
        "teacher/diversity": len({row[0] for row in of_teacher}) / min(teacher.shape),
    }


def moved_average(average: Tensor, param: Tensor, weight: float) -> Tensor:
    """Return (θ̄ + r·θ)/(1 + r) with r = w_k / Σ_{i<k} w_i, the published update of the weighted moving average.

    ``weight`` is w_k / Σ_{i≤k} w_i, as a :class:`tracer.schedules.Schedule` gives it.
    """
    relative = weight / (1 - weight)
    return (average + relative * param) / (1 + relative)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, weight: float) -> None:
    """Move every parameter of the teacher towards the student's, each into a new tensor."""
    for average, param in zip(teacher.parameters(), student.parameters(), strict=True):
        average.data = moved_average(average, param, weight)
