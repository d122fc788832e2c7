"""The published formulation of the objective in eager torch: what the fused loss is compared with.

Written from the definitions as one writes them down term by term: every term computes the logits it
needs from the features, both directions as full matrices. For the full objective that is 10 products
of N²D forward and 10 backward, about 20 buffers of N×N, as the published TRACER code has (arXiv
2605.29380); one process, nothing slowed down on purpose: index targets where there is one positive per
row, fused ``cross_entropy`` and ``log_softmax``, teacher logits without graph.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def tracer_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Tensor,
    *,
    relational: float,
    interactive: float,
    cross: float,
    feature: float,
) -> Tensor:
    """CON + relational·CRD + interactive·ICL + cross·XKD + feature·FD with one positive per row.

    Features [N, D], normalised; scales exponentiated scalars.
    """
    return (
        clip_loss(image, text, logit_scale)
        + relational * relational_loss(image, text, logit_scale, teacher_image, teacher_text, teacher_scale)
        + interactive * interactive_loss(image, text, logit_scale, teacher_image, teacher_text)
        + cross * cross_loss(image, text, logit_scale, teacher_image, teacher_text, teacher_scale)
        + feature * (F.mse_loss(image, teacher_image) + F.mse_loss(text, teacher_text))
    )


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """2 products forward, 4 backward."""
    labels = torch.arange(len(image), device=image.device)
    per_image = logit_scale * image @ text.T
    per_text = logit_scale * text @ image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def relational_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Tensor,
) -> Tensor:
    """2 products forward, 2 backward."""
    student = logit_scale * image @ text.T
    with torch.no_grad():
        teacher = teacher_scale * teacher_image @ teacher_text.T
    return (_kl(student, teacher) + _kl(student.T, teacher.T)) / 2


def interactive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, teacher_image: Tensor, teacher_text: Tensor
) -> Tensor:
    """2 products forward, 2 backward."""
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
    teacher_scale: Tensor,
) -> Tensor:
    """4 products forward, 2 backward."""
    per_image = logit_scale * image @ teacher_text.T
    per_text = logit_scale * text @ teacher_image.T
    with torch.no_grad():
        teacher_per_image = teacher_scale * teacher_image @ teacher_text.T
        teacher_per_text = teacher_scale * teacher_text @ teacher_image.T
    return (_kl(per_image, teacher_per_image) + _kl(per_text, teacher_per_text)) / 2


def mpm_nce_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, labels: Tensor, margin: float, smoothing: float
) -> Tensor:
    """MPM-NCE (arXiv 2408.05749) with dense positives and soft targets: 2 products forward, 4 backward."""
    positives = (labels[:, None] == labels[None, :]).float()
    negatives = 1 - positives
    count = positives.sum(1, keepdim=True)
    target = (1 - smoothing) * positives / count + smoothing * negatives / (len(labels) - count)
    per_image = logit_scale * (image @ text.T + margin * negatives)
    per_text = logit_scale * (text @ image.T + margin * negatives)
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2


def siglip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """SigLIP (arXiv 2303.15343) without a bias: 1 product forward, 2 backward. To check open_clip's."""
    sign = 2 * torch.eye(len(image), device=image.device) - 1
    return F.softplus(-sign * (logit_scale * image @ text.T)).sum() / len(image)


def inf_cl_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """The CLIP loss by Inf-CL's Triton kernels (arXiv 2410.17243, package inf-cl): 2 products forward, 8 backward.

    They widen features to float32 and multiply in TF32, whatever is asked for, and need an NVIDIA GPU.
    """
    from inf_cl import cal_flash_loss

    head = math.gcd(image.shape[1], 256)  # it takes the width in parts of at most 256, a power of two
    per_image = cal_flash_loss(image, text, scale=logit_scale, head_dim=head)
    per_text = cal_flash_loss(text, image, scale=logit_scale, head_dim=head)
    return (per_image.mean() + per_text.mean()) / 2


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(student, dim=1), F.softmax(teacher, dim=1), reduction="batchmean")
