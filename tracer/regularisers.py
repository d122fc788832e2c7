"""Terms of published fine-tuning methods beside the objective: each a function of features or of weights.

They are baselines: written for batches of a few hundred pairs, in plain torch, for any floating dtype. Matrices of
pairs by pairs are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def l2_sp(weights: Iterable[Tensor], start: Iterable[Tensor]) -> Tensor:
    """Return ½ Σ (θ − θ₀)², which draws the weights towards their start (L2-SP: Li et al. 2018, arXiv 1802.01483).

    Args:
        weights: those that train.
        start: the same before training.

    Raises:
        ValueError: there are no weights.
    """
    squares = [((w - s.to(w)).float() ** 2).sum() for w, s in zip(weights, start, strict=True)]
    if not squares:
        raise ValueError("no weights train: L2-SP needs some")
    return 0.5 * torch.stack(squares).sum()


def local_dimension(features: Tensor, neighbours: int) -> Tensor:
    """Return the local intrinsic dimension of each row, estimated by the method of moments [N].

    LID = m / (r_k − m), where r_k is the distance to the k-th nearest other row and m the mean distance to the k
    nearest (Amsaleg et al. 2018, as LDReg uses it). LDReg's published code takes the mean over the k − 1 nearest,
    and lets no gradient flow to the neighbours; ours does.

    Args:
        features: [N, D].
        neighbours: k; all other rows where there are fewer.

    Raises:
        ValueError: there are fewer than three rows, or k is below 2.
    """
    count = len(features)
    if count < 3 or neighbours < 2:
        raise ValueError(
            f"{count} rows of features and {neighbours} neighbours: at least 3 rows and 2 neighbours"
        )
    own = torch.eye(count, dtype=torch.bool, device=features.device)
    square = (features**2).sum(1)
    squared = square[:, None] + square - 2 * features @ features.T
    # A root's slope at 0 is infinite: rows that are equal count as 1e-6 apart.
    distance = squared.clamp(min=1e-12).sqrt().masked_fill(own, torch.inf)
    nearest = distance.topk(min(neighbours, count - 1), largest=False).values
    mean, last = nearest.mean(1), nearest[:, -1]
    return mean / (last - mean).clamp(min=1e-6)


def ldreg(features: Tensor, neighbours: int = 64) -> Tensor:
    """Return −mean log LID, which spreads features over more dimensions.

    Source: LDReg (Huang et al. 2024, arXiv 2401.10474, equation 1).

    This is the paper's L1 form: the negative logarithm of the geometric mean of the local dimensions.

    Args:
        features: [N, D].
        neighbours: k of :func:`local_dimension`.
    """
    return -local_dimension(features, neighbours).log().mean()


def contrastive_gradients(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, labels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the contrastive loss with respect to both features, itself differentiable.

    With z = σ u vᵀ, targets q of the rows and columns, p and p' the softmax over each: ∂L/∂u = σ/(2N) (p − q +
    p' − q') v.

    Args:
        image, text: features u, v [N, D], L2-normalised.
        logit_scale: σ.
        labels: [N]; pairs of equal labels are positives. Default: the pairs of equal rows.
    """
    count = len(image)
    z = logit_scale * image @ text.T
    labels = torch.arange(count, device=z.device) if labels is None else labels
    positive = (labels[:, None] == labels).to(z)
    excess = z.softmax(1) - positive / positive.sum(1, keepdim=True)
    excess = excess + z.softmax(0) - positive / positive.sum(0, keepdim=True)
    factor = logit_scale / (2 * count)
    return factor * excess @ text, factor * excess.T @ image


def gradient_distance(
    student: tuple[Tensor, Tensor, Tensor | float],
    teacher: tuple[Tensor, Tensor, Tensor | float],
    labels: Tensor | None = None,
) -> Tensor:
    """Return the distance of both models' gradients (gradient distillation of CLIP-KD, arXiv 2307.12732, eq. 8).

    The mean over all entries of (∂L/∂u − ∂L'/∂u')² plus the same for the texts. The published code differs from
    the
    paper: it takes each direction of the loss by itself, and divides the similarities by σ where the loss
    multiplies them, so its distance is smaller by orders of magnitude, and the same weight counts for less.

    Args:
        student: image features, text features, σ.
        teacher: the same three; no gradient flows to them.
        labels: as in :func:`contrastive_gradients`.
    """
    own = contrastive_gradients(*student, labels)
    with torch.no_grad():
        other = contrastive_gradients(*teacher, labels)
    return F.mse_loss(own[0], other[0]) + F.mse_loss(own[1], other[1])
