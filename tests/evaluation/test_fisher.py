"""Fisher information of the image tower against its definition, all classes in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from tracer.data.build import read_index
from tracer.data.decoded import DecodedPictures
from tracer.data.index import Index
from tracer.evaluation.fisher import fisher_information
from tracer.evaluation.prompts import class_prompts
from tracer.evaluation.zero_shot import classifier, logit_scale
from tracer.models.architecture import Form
from tracer.models.clip import Clip, load_clip

CLASSES = ["circle", "square", "cross", "bar"]


def problem(tiny_config, drawings) -> tuple[Clip, Index, Tensor]:
    torch.manual_seed(0)
    clip = load_clip(str(tiny_config), None)
    return (
        clip,
        read_index(drawings / "test.csv").take([0, 1]),
        classifier(clip, class_prompts(None, CLASSES)).clone(),
    )


def logits_of(clip: Clip, index: Index, weights: Tensor) -> Iterator[Tensor]:
    """Yield the logits [4] of each picture, without a bias."""
    for image, _ in DecodedPictures(0).batches(index, clip.picture_format, 1, 1, torch.device("cpu")):
        yield (logit_scale(clip).detach() * clip.model.encode_image(image, normalize=True) @ weights.T)[0]


def assert_mean(clip: Clip, index: Index, weights: Tensor, expected: Tensor) -> None:
    """Check the mean over many draws of y, and that the text tower has none."""
    draws = [fisher_information(clip, index, weights, seed=seed, workers=1) for seed in range(60)]
    mean = torch.stack([drawn["visual.proj"] for drawn in draws]).mean(0)
    torch.testing.assert_close(float(mean.sum()), float(expected.sum()), rtol=0.15, atol=0)
    assert torch.corrcoef(torch.stack([mean.flatten(), expected.flatten()]))[0, 1] > 0.9
    assert not any(name.startswith(("transformer", "token")) for name in draws[0])


def test_fisher_information_is_the_expected_squared_gradient(tiny_config, drawings):
    """Over many draws of y, the mean is Σ_y p(y) (∂ log p(y) / ∂θ)²."""
    clip, index, weights = problem(tiny_config, drawings)
    parameter, expected = clip.model.visual.proj, torch.zeros(())
    for logits in logits_of(clip, index, weights):
        log_p = logits.log_softmax(0)
        for y in range(4):
            (gradient,) = torch.autograd.grad(log_p[y], parameter, retain_graph=True)
            expected = expected + log_p[y].exp().detach() * gradient**2 / 2
    assert_mean(clip, index, weights, expected)


def test_with_a_sigmoid_every_class_is_drawn_by_itself(tiny_config, drawings):
    """∂ log p(y) is Σ_c (y_c − p_c) ∂z_c with y_c independent; its mean square is Σ_c p_c (1 − p_c) (∂z_c)²."""
    clip, index, weights = problem(tiny_config, drawings)
    clip = dataclasses.replace(clip, trained_with=Form("sigmoid", -1.0))
    parameter, expected = clip.model.visual.proj, torch.zeros(())
    for logits in logits_of(clip, index, weights):
        p = (logits - 1.0).sigmoid().detach()
        for c in range(4):
            (gradient,) = torch.autograd.grad(logits[c], parameter, retain_graph=True)
            expected = expected + p[c] * (1 - p[c]) * gradient**2 / 2
    assert_mean(clip, index, weights, expected)
