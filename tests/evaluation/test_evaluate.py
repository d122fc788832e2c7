"""Zero-shot accuracy and calibration against plain numpy, the prompts, and the file that evaluate() writes."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tracer.data.dali import Pictures
from tracer.data.index import read_index
from tracer.errors import UserError
from tracer.evaluation.config import EvaluateConfig
from tracer.evaluation.zero_shot import class_prompts, evaluate, evaluate_zero_shot
from tracer.models.clip import Clip, load_clip
from tracer.models.weights import save_weights

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


def calibration_error(confidence, correct, bins=15):
    """Σ_b |b|/N · |accuracy(b) − confidence(b)| over equal bins (lower, upper] of the confidence."""
    error = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return error


def test_accuracy_and_calibration_are_what_numpy_says(tmp_path):
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
        image_size=8,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    prompts = {name: list(group) for name, group in PROMPTS.items()}
    got = evaluate_zero_shot(clip, [read_index(tmp_path / "colours.csv")], prompts)["colours"]

    weights = unit(np.stack([unit(np.array(list(g.values()))).mean(0) for g in PROMPTS.values()]))
    logits = LOGIT_SCALE * unit(colours / 255 - 0.5) @ weights.T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    correct = p.argmax(1) == np.array([list(PROMPTS).index(label) for label in labels])
    assert 0.4 < correct.mean() < 0.95
    assert got["accuracy"] == pytest.approx(correct.mean())
    assert got["ece"] == pytest.approx(calibration_error(p.max(1), correct), abs=1e-4)
    assert got["pictures"] == 90


def test_evaluate_writes_what_it_returns(tiny_config, drawings, tmp_path, capsys):
    torch.manual_seed(0)
    start = tmp_path / "start.safetensors"
    save_weights(load_clip(str(tiny_config), None).model.state_dict(), start)
    classes = {
        name: [f"a {name}", f"the drawing of a {name}"] for name in ("circle", "square", "cross", "bar")
    }
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    config = EvaluateConfig(
        eval_data={"small": drawings / "test.csv", "large": drawings / "train.csv"},
        classes=tmp_path / "classes.json",
        model=str(tiny_config),
        pretrained=str(start),
        output=tmp_path / "new" / "scores.json",
    )
    scores = evaluate(config)
    assert json.loads(config.output.read_text()) == scores
    assert {name: score["pictures"] for name, score in scores.items()} == {"small": 16, "large": 32}
    sets = [read_index(path, name) for name, path in config.eval_data.items()]
    clip = load_clip(str(tiny_config), str(start))
    for name, score in evaluate_zero_shot(clip, sets, classes).items():
        assert scores[name] == pytest.approx(score)
    table = capsys.readouterr().out
    assert all(f"{100 * score['accuracy']:.1f}" in table for score in scores.values())


def test_small_sets_stay_decoded_until_a_picture_changes(tiny_config, drawings, tmp_path, monkeypatch):
    decoded = []

    def counted(index, *args, **kwargs):
        decoded.append(index.name)
        return Pictures(index, *args, **kwargs)

    monkeypatch.setattr("tracer.evaluation.zero_shot.Pictures", counted)
    monkeypatch.setattr("tracer.evaluation.zero_shot._KEPT", {})
    pictures = shutil.copytree(drawings, tmp_path / "drawings")
    clip = load_clip(str(tiny_config), None)

    def scores():
        sets = [read_index(pictures / "test.csv"), read_index(pictures / "train.csv")]
        return evaluate_zero_shot(clip, sets, class_prompts(None, sets[1].classes))

    room = 16 * 3 * clip.image_size**2 * 4  # for the 16 pictures of the test set, not for 32 more
    monkeypatch.setattr("tracer.evaluation.zero_shot.KEEP", room)
    first = scores()
    assert decoded == ["test", "train"]
    assert scores() == first
    assert decoded == ["test", "train", "train"]
    Image.new("RGB", (8, 8)).save(read_index(pictures / "test.csv").images[0])
    assert scores()["test"] != first["test"]
    assert decoded[3:] == ["test", "train"]


def test_prompts_come_from_the_names_or_from_a_file(tmp_path):
    assert class_prompts(None, ["red_fox", "owl"]) == {
        "red_fox": ["a photo of a red fox"],
        "owl": ["a photo of a owl"],
    }
    written = {"b": ["one", "two"], "a": ["three"]}
    (tmp_path / "classes.json").write_text(json.dumps(written))
    read = class_prompts(tmp_path / "classes.json", ["a", "b", "c"])
    assert list(read.items()) == list(written.items())  # the file's, in its order


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist: check --classes"),
        ("{", "is no JSON"),
        ('["a"]', "must hold {class"),
        ('{"a": "one prompt", "b": ["two"]}', "must hold {class"),
        ('{"a": [], "b": ["two"]}', "at least one prompt"),
    ],
)
def test_bad_classes_files_are_named(tmp_path, content, says):
    path = tmp_path / "classes.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        class_prompts(path, ["a", "b"])
    assert "classes.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_label_without_prompts_is_named(tiny_config, drawings):
    clip = load_clip(str(tiny_config), None)
    with pytest.raises(UserError, match=r"'test' has 3 labels without prompts, first 'bar'"):
        evaluate_zero_shot(clip, [read_index(drawings / "test.csv")], {"circle": ["a circle"]})
