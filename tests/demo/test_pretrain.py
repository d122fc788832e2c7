"""Pretraining: the captions, the schedule, and a run that is interrupted and resumed."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from demo.test_augment import glyphs
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import load_file

from tracer.demo import pretrain, small_clip
from tracer.demo.config import PretrainConfig
from tracer.demo.corpus import Corpus
from tracer.demo.render import on_paper
from tracer.errors import UserError
from tracer.files import claim_folder


def test_captions_are_drawn_from_the_picture_s_own():
    texts = [["cut", "scissors", "scissors"], ["printer"], ["go up", "arrow up"]]
    captions = pretrain.Captions(texts)
    rows = torch.tensor([0, 1, 2] * 200)
    tokens = captions.draw(rows, torch.Generator().manual_seed(0))
    encoded = {tuple(small_clip.demo_tokenizer()([t])[0].tolist()): t for several in texts for t in several}
    drawn = [encoded[tuple(t)] for t in tokens.tolist()]
    for row, several in enumerate(texts):
        assert set(drawn[row::3]) == set(several)
    assert 0.55 < drawn[0::3].count("scissors") / 200 < 0.78  # listed twice, so twice as likely


def test_learning_rate_rises_and_falls_with_the_clock():
    rate = [pretrain.learning_rate(p, 0.02) for p in (0, 0.01, 0.02, 0.5, 0.999)]
    assert rate == pytest.approx([1e-3, 0.5, 0.999, 0.5, 1e-3], abs=1e-3)


def tiny_corpus(n: int = 64) -> Corpus:
    """Four kinds of pictures (colour and side), two captions each."""
    kinds = [("red left", (220, 20, 20), True), ("red right", (220, 20, 20), False)]
    kinds += [("blue left", (20, 20, 220), True), ("blue right", (20, 20, 220), False)]
    pictures = torch.cat([glyphs(n // 4, colour, left) for _, colour, left in kinds])
    return Corpus(
        pictures=pictures.permute(0, 2, 3, 1).numpy(),
        captions=[[name, f"{name} block"] for name, _, _ in kinds for _ in range(n // 4)],
        labels=np.repeat(np.arange(4), n // 4),
        named=np.repeat([True, False, True, False], n // 4),
    )


@pytest.fixture
def ticking(monkeypatch):
    """A clock on which every step takes a second, so that a budget is a number of steps."""
    now = itertools.count()
    monkeypatch.setattr(pretrain, "monotonic", lambda: float(next(now)))


def test_run_learns_and_goes_on_after_a_cut_as_if_nothing_had_been(tmp_path, ticking, monkeypatch):
    # fp32: without bfloat16 products in the processor, this took 110 s instead of 13
    clock = {"minutes": 0.5, "save_every": 0.1, "warmup": 0.1}
    config = PretrainConfig(output=tmp_path / "run", batch_size=16, precision="fp32", **clock)
    whole = pretrain.fit(dataclasses.replace(config, output=tmp_path / "whole"), tiny_corpus())
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["seconds"]) for line in log] == [(20, 20)]

    real, calls = pretrain.contrastive_loss, []

    def cut_off(*args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(pretrain, "contrastive_loss", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pretrain.fit(config, tiny_corpus())
    assert sorted(p.name for p in config.output.iterdir()) == ["log.jsonl", "resume.pt"]
    assert torch.load(config.output / "resume.pt", weights_only=True)["step"] == 7
    rows = [
        {"step": step, "seconds": step, "loss": 1.0} for step in (5, 9)
    ]  # one of them past the checkpoint
    (config.output / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1')
    with pytest.raises(UserError, match=r"resume.pt' was made with --lr 0.001, not 0.5: give the same value"):
        pretrain.fit(dataclasses.replace(config, lr=0.5), tiny_corpus())
    path = pretrain.fit(dataclasses.replace(config, workers=1, save_every=0.2), tiny_corpus())
    log = [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [5, 20]
    assert len(calls) == 10 + 30 - 7
    assert sorted(p.name for p in config.output.iterdir()) == ["log.jsonl", "model.safetensors"]

    weights, expected = load_file(path), load_file(whole)
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())

    model, tokenizer = small_clip.demo_model(path).eval(), small_clip.demo_tokenizer()
    corpus = tiny_corpus(16)
    rgb = torch.from_numpy(on_paper(corpus.pictures)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
    with torch.no_grad():
        u = model.encode_image((rgb - mean[:, None, None]) / std[:, None, None], normalize=True)
        v = model.encode_text(tokenizer([corpus.captions[i][0] for i in (0, 4, 8, 12)]), normalize=True)
    accuracy = (u @ v.T).argmax(1).eq(torch.from_numpy(corpus.labels)).float().mean()
    assert accuracy >= 0.5  # chance is 0.25


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"minutes": 0.0}, "--minutes is 0.0: it must be above 0"),
        ({"batch_size": 1}, "--batch_size is 1: a contrastive loss needs at least 2"),
        ({"warmup": 1.5}, "--warmup is 1.5: it must be a share"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        pretrain.pretrain(PretrainConfig(output=tmp_path, **change))


def test_finished_output_is_not_overwritten(tmp_path):
    claim_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"kept")
    with pytest.raises(UserError, match="exists: choose another --output"):
        pretrain.pretrain(PretrainConfig(output=tmp_path))
    assert (tmp_path / "model.safetensors").read_bytes() == b"kept"
