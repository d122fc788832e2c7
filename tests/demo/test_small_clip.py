"""The small CLIP: its tokenizer, its weights, and what it knows."""

from __future__ import annotations

import json

import numpy as np
import torch
from demo.icon_files import icon, svg
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image

from tracer.demo import captions, packages, render, small_clip


def test_demo_tokenizer_is_the_head_of_the_full_one():
    tokenizer = small_clip.demo_tokenizer()
    config = json.loads((packages.ASSETS / "tracer-demo.json").read_text())["text_cfg"]
    tokens = tokenizer(["scissors icon", "weather few clouds night"])
    assert tokens.shape == (2, config["context_length"])
    assert (
        tokenizer.vocab_size == config["vocab_size"] == int(tokens.max()) + 1
    )  # the end of text is the last
    assert tokenizer.decode(tokens[1].tolist()).count("clouds") == 1


def test_demo_model_takes_what_the_tokenizer_gives():
    model = small_clip.demo_model(None)
    u, v, scale = model(torch.zeros(2, 3, *model.visual.image_size), small_clip.demo_tokenizer()(["a", "b"]))
    assert u.shape == v.shape == (2, 192)
    assert scale.shape == (1,)  # DeepSpeed cannot broadcast a parameter without dimensions


DRAWN = {
    "go-next": '<path d="M2 10h10V4l10 8-10 8v-6H2z" fill="#3070c0"/>',
    "go-previous": '<path d="M22 10H12V4L2 12l10 8v-6h10z" fill="#3070c0"/>',
    "go-up": '<path d="M10 22V12H4L12 2l8 10h-6v10z" fill="#3070c0"/>',
    "list-add": '<path d="M10 3h4v7h7v4h-7v7h-4v-7H3v-4h7z" fill="#30a040"/>',
    "list-remove": '<path d="M3 10h18v4H3z" fill="#c03030"/>',
    "starred": '<path d="M12 1l3.2 7.4 8 .7-6 5.3 1.8 7.8L12 18l-7 4.2 1.8-7.8-6-5.3 8-.7z" fill="#e8c020"/>',
    "media-playback-pause": '<path d="M5 3h5v18H5zM14 3h5v18h-5z" fill="#404040"/>',
    "media-playback-start": '<path d="M5 2l16 10L5 22z" fill="#404040"/>',
    "mail-unread": '<path d="M2 5h20v14H2zl10 8 10-8" fill="#f8f8f0" stroke="#666"/>',
}


def test_shipped_start_knows_drawings_that_nobody_drew_before():
    """Nine icons drawn for this test, among all classes: chance is one in 274 each."""
    _, phrases = captions.read_classes()
    model, tokenizer = small_clip.demo_model().eval(), small_clip.demo_tokenizer()
    drawings = [icon(name, svg(body, 24), path="a.svg") for name, body in DRAWN.items()]
    rgb = render.on_paper(render.render_all(drawings, workers=1)[1])
    small = [np.array(Image.fromarray(p).resize((40, 40), Image.Resampling.BICUBIC)) for p in rgb]
    mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    with torch.no_grad():
        images = (torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 255 - mean) / std
        u = model.encode_image(images, normalize=True)
        v = torch.stack(
            [
                model.encode_text(tokenizer([*texts, captions.words(label)]), normalize=True).mean(0)
                for label, texts in phrases.items()
            ]
        )
    best = [list(phrases)[i] for i in (u @ torch.nn.functional.normalize(v, dim=-1).T).argmax(1)]
    assert sum(guess == name for guess, name in zip(best, DRAWN, strict=True)) >= 7, best
    assert (packages.ASSETS / "tracer-demo.safetensors").stat().st_size < 20 * 2**20
