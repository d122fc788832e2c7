"""Diagonal Fisher information of a model as a classifier, by which a soup weighs its weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tracer.data.decoded import DecodedPictures
from tracer.data.index import Index
from tracer.evaluation.zero_shot import logit_scale
from tracer.models.clip import Clip


def fisher_information(
    clip: Clip, index: Index, weights: Tensor, *, pictures: int = 256, workers: int = 2, seed: int = 0
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of the image tower: the mean over pictures of (∂ log p(y|x) / ∂θ)².

    y is drawn from the model's own probabilities, as the definition has it (Matena & Raffel 2022, arXiv
    2111.09832, section 3.1); labels are not used. With softmaxes y is one class. With the sigmoid of each pair
    every class is drawn by itself, and log p(y|x) is the sum over classes. The text tower is constant here, as the
    classifier is, and gets none.

    Args:
        clip: the model, on the device of ``weights``; it is left in evaluation mode.
        index: pictures, of which the first ``pictures`` of a random order count.
        weights: zero-shot weights [C, D].
        pictures: one backward pass each.
        workers: threads that decode them.
        seed: of the pictures and of y.
    """
    clip.model.eval()
    draw = torch.Generator().manual_seed(seed)
    some = index.take(torch.randperm(len(index), generator=draw)[:pictures].numpy())
    trained = {name: p for name, p in clip.model.named_parameters() if name.startswith("visual.")}
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained.items()}
    scale, weights = logit_scale(clip).detach(), weights.clone()  # made in inference mode
    bias = torch.as_tensor(clip.logit_bias).detach()
    for image, _ in DecodedPictures(0).batches(some, clip.picture_format, 1, workers, weights.device):
        logits = scale * clip.model.encode_image(image, normalize=True).float() @ weights.T + bias
        log_probability = _of_a_draw(logits[0], clip.form.contrast, draw)
        gradients = torch.autograd.grad(log_probability, list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.float() ** 2
    return {name: value / len(some) for name, value in total.items()}


def _of_a_draw(logits: Tensor, contrast: str, draw: torch.Generator) -> Tensor:
    """Return log p(y) of a y drawn from the probabilities of logits [C]."""
    if contrast == "sigmoid":
        positive = torch.bernoulli(logits.detach().sigmoid().cpu(), generator=draw).bool().to(logits.device)
        return F.logsigmoid(torch.where(positive, logits, -logits)).sum()
    log_probability = logits.log_softmax(0)
    y = int(torch.multinomial(log_probability.detach().exp().cpu(), 1, generator=draw))
    return log_probability[y]
