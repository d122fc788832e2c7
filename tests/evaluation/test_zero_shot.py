"""Zero-shot classification, with a model whose features can be read off, against plain numpy."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tracer.data.build import read_index
from tracer.data.decoded import DecodedPictures
from tracer.errors import UserError
from tracer.evaluation.metrics import calibration_error
from tracer.evaluation.prompts import class_prompts
from tracer.evaluation.sets import EvaluationSet
from tracer.evaluation.zero_shot import classifier, evaluate_zero_shot, predict
from tracer.models.clip import Clip, load_clip
from tracer.models.picture_format import PictureFormat

LOGIT_SCALE = 4.0
# Several prompts in some classes, of different lengths: their mean is taken after each is normalised.
PROMPTS = {
    "red": {"a red thing": (4.0, 1.0, -1.0), "crimson": (0.2, -0.3, 0.1), "rose": (1.0, 0.4, 0.6)},
    "green": {"a green thing": (-1.0, 2.0, 0.5)},
    "blue": {"a blue thing": (-0.1, -0.1, 0.9), "navy": (-3.0, 1.0, 1.0)},
}


class Colours(nn.Module):
    """A dual encoder whose features can be read off: a picture's mean colour, and a table of texts."""

    def __init__(self, texts):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(texts))
        self.logit_scale = nn.Parameter(torch.tensor([LOGIT_SCALE]).log())

    def encode_image(self, image, normalize=False):
        features = image.mean((2, 3)) - 0.5
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text, normalize=False):
        features = self.table[text[:, 0]]
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def forward(self, image, text):
        return self.encode_image(image, True), self.encode_text(text, True), self.logit_scale.exp()


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_probabilities_and_scores_are_what_numpy_says(tmp_path):
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (90, 3))
    labels = [list(PROMPTS)[c] for c in colours.argmax(1)]
    labels[::4] = generator.choice(list(PROMPTS), len(labels[::4]))  # some are wrong whatever the model says
    with (tmp_path / "colours.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label"])
        for n, (colour, label) in enumerate(zip(colours, labels, strict=True)):
            Image.new("RGB", (8, 8), tuple(int(c) for c in colour)).save(tmp_path / f"{n}.png")
            rows.writerow([f"{n}.png", label])
    texts = {text: feature for group in PROMPTS.values() for text, feature in group.items()}
    row = {text: n for n, text in enumerate(texts)}
    clip = Clip(
        name="colours",
        model=Colours(list(texts.values())),
        tokenizer=lambda names: torch.tensor([[row[name]] for name in names]),
        picture_format=PictureFormat(8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    )
    prompts = {name: list(group) for name, group in PROMPTS.items()}
    index = read_index(tmp_path / "colours.csv")
    score = evaluate_zero_shot(clip, [index], prompts)["colours"]

    weights = unit(np.stack([unit(np.array(list(g.values()))).mean(0) for g in PROMPTS.values()]))
    logits = LOGIT_SCALE * unit(colours / 255 - 0.5) @ weights.T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = np.array([list(PROMPTS).index(label) for label in labels])
    got = predict(clip, EvaluationSet(index, prompts=prompts), classifier(clip, prompts))
    np.testing.assert_array_equal(got.predicted, p.argmax(1))
    np.testing.assert_allclose(got.confidence, p.max(1), atol=1e-5)
    assert 0.4 < (p.argmax(1) == truth).mean() < 0.95
    assert score["accuracy"] == pytest.approx((p.argmax(1) == truth).mean())
    assert score["ece"] == calibration_error(got.confidence, got.predicted == truth)
    assert score["pictures"] == 90


def test_the_scores_do_not_depend_on_kept_pictures(tiny_config, drawings):
    clip = load_clip(str(tiny_config), None)
    sets = [read_index(drawings / "test.csv"), read_index(drawings / "train.csv")]
    prompts, decoded = class_prompts(None, sets[1].classes), DecodedPictures()
    expected = evaluate_zero_shot(clip, sets, prompts)
    assert [evaluate_zero_shot(clip, sets, prompts, decoded=decoded) for _ in range(2)] == [expected] * 2


def test_a_label_without_prompts_is_named(tiny_config, drawings):
    clip = load_clip(str(tiny_config), None)
    with pytest.raises(UserError, match=r"'test' has 3 labels without prompts, first 'bar'"):
        evaluate_zero_shot(clip, [read_index(drawings / "test.csv")], {"circle": ["a circle"]})


@pytest.mark.parametrize("tensor", ["visual.proj", "text_projection", "logit_scale"])
def test_nothing_that_is_not_finite_is_scored(tensor, tiny_config, drawings):
    clip = load_clip(str(tiny_config), None)
    clip.model.get_parameter(tensor).data.fill_(torch.nan)
    index = read_index(drawings / "test.csv")
    with pytest.raises(UserError, match=r"(are NaN, first '.*png'|NaN or infinite): its weights diverged"):
        evaluate_zero_shot(clip, [index], class_prompts(None, index.classes))
