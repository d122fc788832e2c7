"""The commands for the published numbers (docs/evaluation.md) on miniatures of their sets, with a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from evaluation import layouts

from tracer.cli import main
from tracer.models.clip import load_clip
from tracer.models.imagenet import names, wnids
from tracer.models.weights import save_weights

PAGE = (Path(__file__).parents[2] / "docs/evaluation.md").read_text().partition("## Published numbers")[2]
ROWS = re.findall(r"^\| ([^|]+) \| [\d.]+ \| [\d.]+ \| `([^`]+)` \|$", PAGE, re.MULTILINE)


def expanded(command: str) -> list[list[str]]:
    """Return the words of each command of a line, with the variables that the page sets."""
    text = PAGE.replace("\\\n", " ")
    variables = dict(re.findall(r'^(\w+)="([^"]*)"$', text, re.MULTILINE))
    for name in ("TRAIN", "SETS"):  # the first holds the second
        command = command.replace(f"${name}", variables[name])
    return [shlex.split(part) for part in command.split("&&")]


@pytest.fixture(scope="module")
def sets(tmp_path_factory, tiny_config) -> Path:
    """A folder with the data that the page names, a picture for each class or less, and a start."""
    root = tmp_path_factory.mktemp("published")
    layouts.imagenet(root / "imagenet/val")
    layouts.class_folders(root / "imagenet/train", wnids(), "{}.png")
    (root / "imagenet/train/classes.json").write_text(json.dumps(names()))
    layouts.v2(root / "imagenetv2")
    layouts.renditions(root / "imagenet-r")
    layouts.adversarial(root / "imagenet-a")
    layouts.sketch(root / "sketch")
    (root / "objectnet").mkdir()
    layouts.objectnet(root / "objectnet")
    torch.manual_seed(0)
    save_weights(load_clip(str(tiny_config), None).model.state_dict(), root / "start.safetensors")
    return root


def few_prompts() -> dict[str, list[str]]:
    """Return one prompt for each of ImageNet's classes in place of 80, which would take long."""
    return {wnid: [f"a photo of a {name}."] for wnid, name in names().items()}


def test_the_page_has_a_command_for_each_published_number():
    assert [name for name, _ in ROWS] == [
        "TRACER, λ 1", "TRACER, β 0.2", "R-Adapter", "fine-tuning", "WiSE-FT", "zero-shot"
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "command"), ROWS, ids=[name for name, _ in ROWS])
def test_a_command_runs(sets, monkeypatch, capfd, tiny_config, name, command):
    """In the order of the page: WiSE-FT averages the run before it."""
    monkeypatch.chdir(sets)
    monkeypatch.setattr("tracer.evaluation.imagenet.prompts", few_prompts)
    for words in expanded(command):
        assert words[0] == "tracer"
        line = shlex.join(words[1:]).replace("ViT-B-16-quickgelu", str(tiny_config))
        argv = shlex.split(line.replace("--pretrained openai", "--pretrained start.safetensors"))
        if argv[0] == "finetune":
            argv += ["--epochs", "1", "--precision", "fp32"]
        assert main([*argv, *(["--cache", "cache"] if argv[0] != "wise" else [])]) == 0, (
            capfd.readouterr().err
        )
    assert "incomplete" in capfd.readouterr().out
