"""Pictures that fail during a run: another one stands in, the reason is kept, and a resumed run sees the same."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from pathlib import Path

import pandas
import pytest
import spoiled_sets
import torch
from picture_sets import CPU, LOADERS

from tracer.data.batches import Batch, TrainingBatches, Variation
from tracer.data.build import read_index
from tracer.data.config import LoadingSettings
from tracer.data.decoded import DecodedPictures, evaluation_plan
from tracer.data.index import Index
from tracer.data.loader import load
from tracer.data.order import Order
from tracer.data.picture import UndecodableError
from tracer.data.skipped import Skipped
from tracer.errors import UserError
from tracer.evaluation.scores import numbers_alone
from tracer.evaluation.sets import EvaluationSet
from tracer.evaluation.zero_shot import evaluate_sets, evaluate_zero_shot

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
def test_a_picture_is_shown_until_the_batch_in_which_it_failed(data, clip, loader):
    """Threads work on later batches meanwhile, and what they note must not change the earlier ones."""
    index = read_index(data / "train.csv")
    whole = list(batches(index, clip, loader))
    row = int(whole[2].index[3])
    noted = Skipped(len(index), 0.1, [{"batch": 3, "row": row, "picture": index.id(row), "reason": "gone"}])
    seen = list(batches(index, clip, loader, skipped=noted))
    assert same(seen[:4], whole[:4])
    assert [row in batch.index.tolist() for batch in seen].count(True) == 1


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
    with pytest.raises(UserError, match=r"1 of 16 pictures failed .*, more than --max_bad 0.01 allows"):
        evaluate_zero_shot(clip, [index], prompts, decoded=decoded, max_bad=0.01)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("retrieval", [False, True])
def test_evaluation_goes_on_behind_a_bad_picture(data, clip, loader, retrieval, monkeypatch):
    """Nothing is read again for it, in whatever batch it is; its captions are not ranked either."""
    monkeypatch.setattr("tracer.evaluation.zero_shot.PICTURES_AT_ONCE", 5)
    index, read, content = read_index(data / "train.csv"), [], Index.read
    if retrieval:
        index.about.classes.clear()
    bad = [3, 17, 18, 31]
    for row in bad:
        damage_silently(index.images[row])
    prompts = {} if retrieval else {name: [f"a {name}"] for name in index.classes}
    decoded = DecodedPictures(loading=LoadingSettings(loader=loader))
    good = EvaluationSet(index.take([row for row in range(32) if row not in bad]), prompts=prompts)
    expected = numbers_alone({"train": evaluate_sets(clip, [good], decoded=decoded)["train"].score})["train"]
    monkeypatch.setattr(Index, "read", lambda self, row: read.append(row) or content(self, row))
    for _ in range(2):  # a second model finds nothing kept that lacks pictures
        scored = evaluate_sets(clip, [EvaluationSet(index, prompts=prompts)], decoded=decoded, max_bad=0.2)
        got = numbers_alone({"train": scored["train"].score})["train"]
        assert got.keys() == expected.keys()
        for name, value in expected.items():  # other pictures share a batch, whose sums round otherwise
            assert got[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value)
        assert len(scored["train"].set.index) == 28
    if loader == "torch":
        assert sorted(read) == sorted([*range(32)] * 2)
    else:  # each culprit ends its pipeline, and the batches that this held are read again
        assert len(read) < 2 * 32 * 4


def test_failures_on_all_ranks_count_together():
    """Each rank notes its own; a picture that fails on several is one, in its earliest batch."""
    failed: set[int] = set()

    def count(row: int) -> int:  # as Ranks.counter does through the store
        failed.add(row)
        return len(failed)

    ranks = [Skipped(100, 0.03, [], count) for _ in range(2)]
    ranks[0].add(5, 2, "5.png", "gone")
    ranks[1].add(5, 9, "5.png", "gone")
    ranks[1].add(6, 1, "6.png", "gone")
    ranks[0].add(7, 3, "7.png", "gone")
    with pytest.raises(UserError, match="4 of 100 pictures failed"):
        ranks[1].add(8, 4, "8.png", "gone")
    for rank in ranks:
        for rows in [other.rows() for other in ranks]:
            rank.learn(rows)
    assert ranks[0].rows() == ranks[1].rows()
    assert [(row["batch"], row["row"]) for row in ranks[0].rows()] == [(1, 6), (2, 5), (3, 7), (4, 8)]
    assert ranks[1].has(5, 4)
    later = Skipped(100, 0.03, ranks[0].rows(4), lambda _: 1)
    with pytest.raises(UserError, match="4 of 100 pictures failed"):
        later.add(9, 5, "9.png", "gone")


# ---------------------------------------------------------------------------------------------------
# The same pictures as a folder, a table and shards, and the ten ways to spoil them.


class Server(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_args) -> None:
        pass


@pytest.fixture
def served(tmp_path):
    """Serve ``tmp_path / "shards"`` over loopback HTTP; return the address."""
    handler = functools.partial(Server, directory=str(tmp_path / "shards"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def spoiled(index, clip, loader, numbers=range(20), skipped=(), **options):
    """Batches of more than an epoch of the spoiled pictures, and those that had failed before."""
    rows = skipped.rows(numbers.start) if isinstance(skipped, Skipped) else skipped
    variation = Variation(0.5, flip=True, color_jitter=0.2, shuffle_window=0)
    return TrainingBatches(
        index,
        clip,
        batch_size=spoiled_sets.BATCH,
        steps=numbers.stop,
        first=numbers.start,
        seed=spoiled_sets.SEED,
        crop_scale=0.5,
        loading=LoadingSettings(loader=loader, max_bad=0.05),
        variation=variation,
        skipped=Skipped(len(index), 0.05, rows),
        **options,
    )


@pytest.mark.parametrize("loader", LOADERS)
def test_every_source_gives_the_same_batches(tmp_path, served, clip, loader):
    """Spoiled in ten ways, from files and over HTTP; and on one rank, then on two, and on one again."""
    sources = spoiled_sets.write(tmp_path)
    table = pandas.read_csv(sources["table"], sep="\t")
    table.to_csv(tmp_path / "table.csv", index=False)
    table.to_parquet(tmp_path / "table.parquet")
    sources |= {
        "csv": tmp_path / "table.csv",
        "parquet": tmp_path / "table.parquet",
        "braces": tmp_path / "shards/{0..2}.tar",
        "http": Path(f"{served}/{{0..2}}.tar"),
        "fsspec": Path(f"file://{tmp_path}/shards/{{0..2}}.tar"),
    }
    settings = LoadingSettings(cache=tmp_path / "cache", max_bad=0.05)
    indexes = {name: read_index(source, None, settings) for name, source in sources.items()}
    spoiled_sets.vanish(tmp_path, tmp_path / "cache/shards")
    expected: list[Batch] = []
    for name, index in indexes.items():
        assert len(index) == len(spoiled_sets.GOOD), name
        run = spoiled(index, clip, loader)
        seen = list(run)
        expected = expected or seen
        assert same(seen, expected), name
        rows = [row["row"] for row in run.skipped.rows()]
        assert {spoiled_sets.GOOD[row] for row in rows} == {249, spoiled_sets.VANISHES}, name
    index = indexes["shards"]
    first = spoiled(index, clip, loader, range(7))
    assert same(list(first), expected[:7])
    ranks = [
        spoiled(index, clip, loader, range(7, 14), first.skipped, rank=n, world_size=2) for n in range(2)
    ]
    for whole, *parts in zip(expected[7:14], *ranks, strict=True):
        assert torch.equal(whole.image, torch.cat([part.image for part in parts]))
        assert torch.equal(whole.index, torch.cat([part.index for part in parts]))
    known = [row for rank in ranks for row in rank.skipped.rows(14)]
    assert same(list(spoiled(index, clip, loader, range(14, 20), known)), expected[14:])
