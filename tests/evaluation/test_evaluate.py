"""The command ``evaluate``: what it returns, what it writes, and what it prints."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest
import torch
from evaluation import layouts
from results_schema import validate

from tracer.cli import main
from tracer.data.build import read_index
from tracer.errors import UserError
from tracer.evaluation.config import EvaluateConfig
from tracer.evaluation.evaluate import evaluate
from tracer.evaluation.scores import numbers_alone
from tracer.evaluation.zero_shot import evaluate_zero_shot
from tracer.models.clip import load_clip
from tracer.models.imagenet import wnids
from tracer.models.weights import save_weights


def test_evaluate_writes_what_it_returns(tiny_config, drawings, tmp_path):
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
    written = json.loads(config.output.read_text())
    assert written["scores"] == scores
    assert written["prompts"] == {"by_class": classes}
    assert written["weights"] == {"model": hashlib.sha256(start.read_bytes()).hexdigest()}
    assert {name: score["pictures"] for name, score in scores.items()} == {"small": 16, "large": 32}
    sets = [read_index(path, name) for name, path in config.eval_data.items()]
    clip = load_clip(str(tiny_config), str(start))
    for name, score in evaluate_zero_shot(clip, sets, classes).items():
        assert numbers_alone(scores)[name] == pytest.approx(numbers_alone({name: score})[name])
        truth = next(index for index in sets if index.name == name).labels
        counts = scores[name]["by_class"]
        assert {of: pictures for of, (pictures, _) in counts.items()} == Counter(truth)
        assert sum(right for _, right in counts.values()) / len(truth) == scores[name]["accuracy"]
        bins = scores[name]["reliability"]
        assert sum(b["pictures"] for b in bins) == len(truth)
        gaps = sum(b["pictures"] * abs(b["accuracy"] - b["confidence"]) for b in bins)
        assert gaps / len(truth) == pytest.approx(score["ece"], abs=1e-6)


def test_the_command_prints_the_scores(tiny_config, drawings, tmp_path, capsys):
    options = {
        "eval_data.held_out": drawings / "train.csv",
        "model": tiny_config,
        "pretrained": "null",
        "cache": tmp_path / "cache",
        "output": tmp_path / "scores.json",
    }
    assert main(["evaluate", *(str(x) for name, value in options.items() for x in (f"--{name}", value))]) == 0
    table, scores = capsys.readouterr().out, json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert "held_out" in table
    assert f"{100 * scores['held_out']['accuracy']:.1f}" in table


def test_markdown_and_a_set_that_is_not_whole(tiny_config, tmp_path, capsys):
    layouts.adversarial(tmp_path / "a")
    layouts.karpathy(tmp_path / "coco", 12)
    argv = ["evaluate", "--eval_data.a", tmp_path / "a", "--eval_data.coco", tmp_path / "coco"]
    classes = {wnid: [wnid] for wnid in wnids("a")}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    argv += ["--classes", tmp_path / "classes.json", "--model", tiny_config, "--pretrained", "null"]
    argv += ["--cache", tmp_path / "cache", "--output", tmp_path / "scores.md"]
    assert main([str(a) for a in argv]) == 0
    table, page = capsys.readouterr().out, (tmp_path / "scores.md").read_text()
    assert "200 of 7500" in table
    assert "12 of 5000" in table
    assert table.count("incomplete") == 2
    assert "| a (incomplete: 200 of 7,500 pictures) | 200 |" in page
    assert "| coco (incomplete: 12 of 5,000 pictures) | 12 |" in page
    assert main([str(a) for a in argv]) == 0  # an earlier page of this command is replaced
    argv[-1] = tmp_path / "scores.json"
    assert main([str(a) for a in argv]) == 0
    written = json.loads((tmp_path / "scores.json").read_text())
    validate(written)
    assert written["classes"] == []  # there is no set of the user's own
    assert written["sets"] == {"a": {"classes": list(wnids("a")), "prompts": {"by_class": classes}}}
    assert written["scores"]["coco"]["measure"] == "image_to_text_r1"
    argv[-1] = tmp_path / "scores.md"
    (tmp_path / "scores.md").write_text("notes of mine")
    assert main([str(a) for a in argv]) == 2
    assert (tmp_path / "scores.md").read_text() == "notes of mine"


def test_mixed_precision_moves_the_features_and_little_else(tiny_config, drawings):
    torch.manual_seed(0)
    config = {"eval_data": {"set": drawings / "train.csv"}, "model": str(tiny_config), "pretrained": None}
    scores = []
    for precision in ("fp32", "amp_bf16"):
        torch.manual_seed(0)
        scores.append(evaluate(EvaluateConfig(**config, precision=precision))["set"])
    assert scores[0]["nll"] != scores[1]["nll"]
    assert scores[0]["nll"] == pytest.approx(scores[1]["nll"], abs=0.05)


def test_something_to_evaluate_on_is_needed():
    with pytest.raises(UserError, match=r"there is nothing to evaluate on: give --eval_data.NAME PATH"):
        evaluate(EvaluateConfig(eval_data={}))


def test_classes_with_the_same_prompts_end_every_command_at_once(
    tiny_config, drawings, tmp_path, capsys, monkeypatch
):
    """Before a model is loaded. Regression: the tokenizer was that of the loaded model."""
    for module in ("evaluation.evaluate", "train.run", "demo.judge"):
        monkeypatch.setattr(f"tracer.{module}.load_clip", lambda *_: pytest.fail("a model was loaded"))
    pictures, labels = sorted(drawings.glob("*.png")), ["hot_dog", "hot-dog", "cat", "cat"]
    for name, first in (("food", 0), ("other", 4)):
        rows = [f"{path},{label}" for path, label in zip(pictures[first:], labels, strict=False)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["image,label", *rows]))
    common = ["--eval_data.a", tmp_path / "food.csv", "--model", tiny_config, "--pretrained", "null"]
    train = ["--train_data", tmp_path / "food.csv", "--steps", "1", "--output", tmp_path / "run"]
    train += ["--batch_size", "2", "--warmup", "0"]
    demo = ["demo", *train, "--seeds", "1", "--validation", tmp_path / "other.csv"]
    for command in (["evaluate"], ["finetune", *train], demo):
        argv = [*command, *common, "--cache", tmp_path / "cache"]
        assert main([str(a) for a in argv]) == 2
        assert "the classes 'hot-dog' and 'hot_dog' have the same prompts" in capsys.readouterr().err
