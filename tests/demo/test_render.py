"""Icons as pixels."""

from __future__ import annotations

import numpy as np
import pytest
from demo.icon_files import icon, svg
from PIL import Image

from tracer.demo import render

PANIC = svg(
    """<filter id="a" width="132.5%" height="132.5%" x="-16.2%" y="-16.2%"><feMerge><feMergeNode
    in="SourceGraphic"/></feMerge></filter><filter id="b" width="105%" height="105%" x="-2.5%" y="-2.5%">
    <feOffset dy="-1" in="SourceAlpha" result="o"/><feComposite in="o" in2="SourceAlpha" k2="-1" k3="1"
    operator="arithmetic"/></filter><g filter="url(#a)" transform="translate(4 4)"><g
    transform="translate(8 8)"><rect width="20" height="20" filter="url(#b)"/></g></g>""",
    48,
)


@pytest.mark.parametrize("data", [PANIC, b"<svg", b"\xff\xfe", svg("")])
def test_unreadable_and_empty_drawings_are_left_out(data):
    good = icon("go-up", svg('<rect width="16" height="16"/>'), path="b.svg")
    kept, pixels = render.render_all([icon("edit-cut", data, path="a.svg"), good], workers=2)
    assert [d.name for d in kept] == ["go-up"]
    assert pixels.shape == (1, render.SIZE, render.SIZE, 4)


def test_svg_renders_current_colour_and_transparency():
    body = '<g color="#00ff00"><rect x="8" width="8" height="16" fill="currentColor"/></g>'
    pixels = render.render(icon("go-up", svg(body), path="a.svg"))
    assert pixels[:, 33:].reshape(-1, 4).tolist() == [[0, 255, 0, 255]] * (31 * 64)
    assert (pixels[:, :31, 3] == 0).all()


def test_small_and_oblong_drawings_keep_their_colour_at_the_edge(tmp_path):
    picture = Image.new("RGBA", (16, 8), (0, 0, 0, 0))  # the invisible half is black
    picture.paste((250, 200, 0, 255), (0, 0, 8, 8))
    picture.save(tmp_path / "a.png")
    pixels = render.render(icon("go-up", (tmp_path / "a.png").read_bytes()))
    assert pixels.shape == (64, 64, 4)
    seen = pixels[pixels[..., 3] > 20].astype(int)
    assert seen[:, 0].min() >= 240  # mixed with the invisible black it would be about half
    assert np.abs(seen[:, 1] - 200).max() <= 60
    ys = np.nonzero(pixels[..., 3].max(1) > 128)[0]
    assert (ys.min(), ys.max()) == (16, 47)  # centred, not stretched


def test_white_ink_gets_dark_paper():
    glyph = np.zeros((3, 64, 64, 4), np.uint8)
    glyph[:, 16:48, 16:48] = 255
    glyph[1, 16:48, 16:48, :3] = (180, 30, 30)
    glyph[2, 20:40, 20:40, :3] = 0  # white with a dark middle is seen on white
    rgb = render.on_paper(glyph)
    assert rgb[:, 0, 0].tolist() == [[80] * 3, [255] * 3, [255] * 3]
    assert rgb[0, 32, 32].tolist() == [255] * 3
    assert render.has_one_ink(glyph).tolist() == [True, True, False]
