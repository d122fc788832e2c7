"""What the published step does besides the losses of ``published.py``: diagnostics each step, teacher by tensors.

Written from the definitions (TRACER, arXiv 2605.29380). Nothing is slowed down on purpose: every matrix is
computed once per step and direction, without graph. As published, each diagnostic becomes a Python number at
once, which makes the host wait for a GPU, and rankings are compared row by row as Python sets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BEST = 5  # first choices of a row that are compared


@torch.no_grad()
def diagnostics(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Tensor,
) -> dict[str, float]:
    """Diagnostics of teacher and student, named as :func:`tracer.ops.contrastive_loss` and
    :func:`tracer.ops.sampled_diagnostics` name theirs; rankings over all rows. Features [N, D], normalised.
    """
    both = {
        "student": (logit_scale * image @ text.T).float(),
        "teacher": (teacher_scale * teacher_image @ teacher_text.T).float(),
    }
    labels = torch.arange(len(image), device=image.device)
    found: dict[str, float] = {}
    for direction in ("image_to_text", "text_to_image"):
        logits = {who: x if direction == "image_to_text" else x.T for who, x in both.items()}
        log_p = {who: x.log_softmax(1) for who, x in logits.items()}
        p = {who: x.exp() for who, x in log_p.items()}
        first = {who: x.argmax(1) for who, x in logits.items()}
        for who in both:
            name = f"{who}/{direction}"
            found[f"{name}/entropy"] = -(p[who] * log_p[who]).sum(1).mean().item()
            found[f"{name}/confidence"] = p[who].amax(1).mean().item()
            found[f"{name}/positive_probability"] = p[who].diagonal().mean().item()
            found[f"{name}/accuracy"] = (first[who] == labels).float().mean().item()
            found[f"{name}/effective_temperature"] = math.log(len(labels)) / max(
                found[f"{name}/entropy"], 1e-6
            )
        pair = f"pair/{direction}"
        kl = (p["teacher"] * (log_p["teacher"] - log_p["student"])).sum(1)
        found[f"{pair}/agreement"] = (first["student"] == first["teacher"]).float().mean().item()
        found[f"{pair}/kl"] = kl.mean().item()
        found[f"{pair}/accuracy_difference"] = (
            found[f"student/{direction}/accuracy"] - found[f"teacher/{direction}/accuracy"]
        )
    return found | _rankings(both["student"], both["teacher"])


def _rankings(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Overlap of the best texts, and how many different texts are a first choice."""
    best = min(BEST, student.shape[1])
    mine, theirs = (x.topk(best, dim=1).indices.tolist() for x in (student, teacher))
    shared = [len(set(a) & set(b)) / best for a, b in zip(mine, theirs, strict=True)]
    return {
        "top5_overlap": sum(shared) / len(shared),
        "student/diversity": len({row[0] for row in mine}) / min(student.shape),
        "teacher/diversity": len({row[0] for row in theirs}) / min(teacher.shape),
    }


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, weight: float) -> None:
    """θ̄ ← (θ̄ + r·θ)/(1 + r) with r = w_k / Σ_{i<k} w_i, each tensor anew.

    ``weight`` is w_k / Σ_{i≤k} w_i, as a :class:`tracer.teacher.Schedule` gives it.
    """
    relative = weight / (1 - weight)
    for average, param in zip(teacher.parameters(), student.parameters(), strict=True):
        average.data = (average + relative * param) / (1 + relative)
