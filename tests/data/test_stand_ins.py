"""Pictures that fail during a run: another one stands in, the reason is kept, and a resumed run sees the same."""

from __future__ import annotations

import functools
import http.server
import io
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_sets import CPU, LOADERS
from PIL import Image

from tracer.data.batches import TrainingBatches, Variation
from tracer.data.build import read_index
from tracer.data.config import LoadingSettings
from tracer.data.decoded import DecodedPictures, evaluation_plan
from tracer.data.loader import load
from tracer.data.order import Order
from tracer.data.picture import UndecodableError
from tracer.data.skipped import Skipped
from tracer.errors import UserError
from tracer.evaluation.zero_shot import evaluate_zero_shot

BATCH, STEPS = 8, 12


@pytest.fixture
def data(tmp_path, drawings) -> Path:
    """A folder with a CSV file of 32 pictures."""
    return shutil.copytree(drawings, tmp_path / "data")


def damage_silently(path: Path) -> None:
    """Leave header and end of a PNG, so that only decoding notices."""
    content = path.read_bytes()
    start = content.index(b"IDAT") + 4
    path.write_bytes(content[:start] + bytes(20) + content[start + 20 :])


def batches(index, clip, loader, first=0, skipped=None, max_bad=0.1, **options):
    return TrainingBatches(
        index,
        clip,
        batch_size=BATCH,
        steps=STEPS,
        seed=1,
        crop_scale=0.5,
        first=first,
        loading=LoadingSettings(loader=loader, max_bad=max_bad),
        skipped=skipped,
        **options,
    )


def same(a, b) -> bool:
    names = ("image", "text", "label", "index")
    return len(a) == len(b) and all(
        torch.equal(getattr(x, n), getattr(y, n)) for x, y in zip(a, b, strict=True) for n in names
    )


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("how", ["gone", "damaged", "empty"])
def test_the_next_picture_of_the_epoch_stands_in(data, clip, loader, how):
    index = read_index(data / "train.csv")
    whole = list(batches(index, clip, loader))
    bad = int(whole[2].index[3])
    path = Path(index.id(bad))
    {"gone": Path.unlink, "damaged": damage_silently, "empty": lambda p: p.write_bytes(b"")}[how](path)
    order = Order(len(index), BATCH, 1)
    run = batches(index, clip, loader)
    seen = list(run)
    assert [row["picture"] for row in run.skipped.rows(STEPS)] == [str(path)]
    stood_in = 0
    for number, (before, after) in enumerate(zip(whole, seen, strict=True)):
        for place in range(BATCH):
            row = int(before.index[place])
            if row != bad:
                assert int(after.index[place]) == row
                assert torch.equal(before.image[place], after.image[place])
                continue
            stood_in += 1
            other = order.instead(number, place, 1)
            assert int(after.index[place]) == other
            assert index.classes[int(after.label[place])] == index.labels[other]
            texts = clip.tokenizer(index.captions[other])
            assert any(torch.equal(after.text[place], text) for text in texts)
    assert stood_in == 3  # once in each epoch
    assert run.skipped.rows(2) == []
    assert run.skipped.rows(3)[0]["batch"] == 2


@pytest.mark.parametrize("loader", LOADERS)
def test_several_bad_pictures_in_a_row_give_way_to_the_first_good_one(data, clip, loader):
    index = read_index(data / "train.csv")
    order = Order(len(index), BATCH, 1).batch(1)
    for row in order[2:5]:
        damage_silently(Path(index.id(int(row))))
    run = iter(batches(index, clip, loader))
    _, second = next(run), next(run)
    assert second.index.tolist() == [*order[:2], *[order[5]] * 3, *order[5:]]
    assert len({tuple(image.flatten().tolist()) for image in second.image}) == BATCH  # crops of their own


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("first", [1, 3, 5, 8])
def test_a_resumed_run_sees_what_an_unbroken_one_sees(data, clip, loader, first):
    """Even if a picture that has failed could be read again by then."""
    index = read_index(data / "train.csv")
    path = Path(index.id(int(Order(len(index), BATCH, 1).batch(2)[3])))
    content = path.read_bytes()
    damage_silently(path)
    run = batches(index, clip, loader)
    unbroken = list(run)
    if first > 2:
        path.write_bytes(content)
    kept = Skipped(len(index), 0.1, run.skipped.rows(first))
    assert same(list(batches(index, clip, loader, first, kept)), unbroken[first:])


@pytest.mark.parametrize("loader", LOADERS)
def test_too_many_failures_stop_the_run_with_a_report(data, clip, loader):
    index = read_index(data / "train.csv")
    for path in list(index.images)[:4]:
        path.unlink()
    with pytest.raises(
        UserError, match=r"4 of 32 pictures failed .* --max_bad 0.1 allows, last '.*png' \(it does"
    ):
        list(batches(index, clip, loader))


@pytest.mark.parametrize("loader", LOADERS)
def test_evaluation_leaves_a_bad_picture_out_or_names_it(data, clip, loader, capsys):
    index = read_index(data / "test.csv")
    damage_silently(index.images[5])
    settings = LoadingSettings(loader=loader)
    with pytest.raises(UndecodableError, match=r"cannot be decoded") as caught:
        list(load(evaluation_plan(index, clip.picture_format, 4, settings, CPU)))
    assert caught.value.row == 5
    prompts = {name: [f"a {name}"] for name in index.classes}
    decoded = DecodedPictures(0, settings)
    scores = evaluate_zero_shot(clip, [index], prompts, decoded=decoded, max_bad=0.1)
    good = evaluate_zero_shot(clip, [index.take([r for r in range(16) if r != 5])], prompts, decoded=decoded)
    assert scores == good
    assert "it is not scored" in capsys.readouterr().err
    with pytest.raises(UndecodableError):
        evaluate_zero_shot(clip, [index], prompts, decoded=decoded, max_bad=0.01)


# ---------------------------------------------------------------------------------------------------
# The same pictures as a folder, a table and shards.

PICTURES = 60


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_args) -> None:
        pass


@pytest.fixture
def served(tmp_path):
    """Serve ``tmp_path / "shards"`` over loopback HTTP; return the address."""
    handler = functools.partial(Server, directory=str(tmp_path / "shards"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def write_everywhere(root: Path) -> None:
    """Write 60 pictures of two classes, some of them odd, as a folder, a TSV file and three shards."""
    noise, rows, members = np.random.default_rng(0), [], []
    for n in range(PICTURES):
        form = ("JPEG", "PNG", "WEBP", "BMP", "GIF")[n % 5]
        name, label = f"{n:03}.{form.lower()}", "ab"[n * 2 // PICTURES]
        file = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (20 + n % 7, 30, 3), np.uint8)).save(file, form)
        path = root / "folder" / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
        rows.append(f"folder/{label}/{name}\t{label}\n")
        members.append((name, file.getvalue(), label))
    (root / "table.tsv").write_text("filepath\tlabel\n" + "".join(rows))
    (root / "shards").mkdir()
    for part in range(3):
        with tarfile.open(root / f"shards/{part}.tar", "w") as tar:
            for name, content, label in members[part * 20 : part * 20 + 20]:
                for suffix, data in ((name.partition(".")[2], content), ("cls", label.encode())):
                    about = tarfile.TarInfo(f"{name.partition('.')[0]}.{suffix}")
                    about.size = len(data)
                    tar.addfile(about, io.BytesIO(data))


@pytest.mark.parametrize("loader", LOADERS)
def test_every_source_gives_the_same_batches(tmp_path, served, clip, loader):
    write_everywhere(tmp_path)
    sources = {
        "folder": tmp_path / "folder",
        "table": tmp_path / "table.tsv",
        "shards": tmp_path / "shards",
        "braces": tmp_path / "shards/{0..2}.tar",
        "http": Path(f"{served}/{{0..2}}.tar"),
        "fsspec": Path(f"file://{tmp_path}/shards/{{0..2}}.tar"),
    }
    runs = {}
    for name, source in sources.items():
        index = read_index(source, None, LoadingSettings(cache=tmp_path / "cache"))
        assert len(index) == PICTURES, name
        variation = Variation(0.5, flip=True, color_jitter=0.2, shuffle_window=24)
        runs[name] = list(batches(index, clip, loader, variation=variation))
    for name, run in runs.items():
        assert same(run, runs["folder"]), name
