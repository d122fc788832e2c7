"""Fisher information of the image tower against its definition, all classes in turn."""

from __future__ import annotations

import torch

from tracer.data.build import read_index
from tracer.data.decoded import DecodedPictures
from tracer.evaluation.fisher import fisher_information
from tracer.evaluation.prompts import class_prompts
from tracer.evaluation.zero_shot import classifier, logit_scale
from tracer.models.clip import load_clip


def test_fisher_information_is_the_expected_squared_gradient(tiny_config, drawings):
    """Over many draws of y, the mean is Σ_y p(y) (∂ log p(y) / ∂θ)²."""
    torch.manual_seed(0)
    clip = load_clip(str(tiny_config), None)
    index = read_index(drawings / "test.csv").take([0, 1])
    weights = classifier(clip, class_prompts(None, ["circle", "square", "cross", "bar"])).clone()
    parameter, expected = clip.model.visual.proj, 0
    for image, _ in DecodedPictures(0).batches(index, clip.picture_format, 1, 1, torch.device("cpu")):
        logits = logit_scale(clip).detach() * clip.model.encode_image(image, normalize=True) @ weights.T
        log_p = logits.log_softmax(1)[0]
        for y in range(4):
            (gradient,) = torch.autograd.grad(log_p[y], parameter, retain_graph=True)
            expected = expected + log_p[y].exp().detach() * gradient**2 / 2
    draws = [fisher_information(clip, index, weights, seed=seed, workers=1) for seed in range(60)]
    mean = torch.stack([drawn["visual.proj"] for drawn in draws]).mean(0)
    torch.testing.assert_close(float(mean.sum()), float(expected.sum()), rtol=0.15, atol=0)
    assert torch.corrcoef(torch.stack([mean.flatten(), expected.flatten()]))[0, 1] > 0.9
    assert not any(name.startswith(("transformer", "token")) for name in draws[0])
