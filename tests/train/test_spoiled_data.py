"""Runs on spoiled data: the same from every source, after SIGKILL, and with what is lost meanwhile."""

from __future__ import annotations

import dataclasses
import json
import random
from functools import lru_cache
from pathlib import Path

import pytest
import spoiled_sets
from cut_runs import cut, kill
from spoiled_sets import VANISHES

from tracer.data.batches import TrainingBatches
from tracer.data.build import read_index
from tracer.data.order import Order
from tracer.errors import UserError
from tracer.files import aside
from tracer.train.config import Config
from tracer.train.identity import INDEX
from tracer.train.log import read_log
from tracer.train.run import finetune


@pytest.fixture
def spoiled(config) -> Config:
    """20 steps of 16: more than one epoch, so that every picture comes up."""
    return dataclasses.replace(
        config,
        eval_data={},
        steps=20,
        batch_size=spoiled_sets.BATCH,
        seed=spoiled_sets.SEED,
        save_every=1,
        max_bad=0.05,
        method="flyp",
        loader="torch",
        crop_scale=0.5,
    )


def losing(monkeypatch, lose) -> None:
    """Call ``lose`` once a run has its first batch."""
    whole = TrainingBatches.__iter__

    def some(self):
        for n, batch in enumerate(whole(self)):
            if n == 0:
                lose()
            yield batch

    monkeypatch.setattr(TrainingBatches, "__iter__", some)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """The weights with which all runs of this module begin."""
    return tmp_path_factory.mktemp("start") / "start.safetensors"


@pytest.fixture
def unbroken(spoiled, start, tmp_path, monkeypatch):
    """Settings with the module's start, and the folder of the unbroken run, from which a picture vanishes."""
    if not start.exists():
        start.write_bytes(Path(spoiled.pretrained).read_bytes())
    spoiled = dataclasses.replace(spoiled, pretrained=str(start))

    @lru_cache
    def run() -> Path:
        root = start.parent / "unbroken"
        if not root.exists():
            source = spoiled_sets.write(root)["folder"]
            with monkeypatch.context() as patch:
                losing(patch, lambda: spoiled_sets.vanish(root))
                finetune(dataclasses.replace(spoiled, train_data=source, output=root / "run"))
        return root / "run"

    return spoiled, run()


@pytest.mark.parametrize("source", ["folder", "table", "shards"])
def test_a_run_that_is_killed_at_a_random_step_ends_as_an_unbroken_one(unbroken, tmp_path, source):
    """Though a picture vanishes before it goes on; and it is the same from every source."""
    spoiled, whole = unbroken
    config = dataclasses.replace(spoiled, train_data=spoiled_sets.write(tmp_path)[source])
    kill(config, tmp_path / "settings.yaml", after=random.Random(source).randrange(2, 10))
    spoiled_sets.vanish(tmp_path)
    end = finetune(config)
    assert (end / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    assert [row["loss"] for row in read_log(end)] == [row["loss"] for row in read_log(whole)]
    assert not (end / INDEX).exists()
    for folder in (end, whole):
        rows = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
        assert {int(row["picture"].removesuffix(".jpg")[-4:]) for row in rows} == {249, VANISHES}
        assert all(row["reason"] for row in rows)


def test_more_spoiled_pictures_than_are_allowed_stop_a_run_with_a_report(spoiled, tmp_path):
    source = spoiled_sets.write(tmp_path)["table"]
    config = dataclasses.replace(spoiled, train_data=source, max_bad=0.01)
    with pytest.raises(
        UserError, match=r"6 of 300 pictures of 'table' cannot be used: .* --max_bad 0.01 allows"
    ):
        read_index(source, None, config)
    for n in range(100, 110):  # and more that only decoding notices
        (tmp_path / f"folder/b/{n:04}.jpg").write_bytes(spoiled_sets.silent(spoiled_sets.png(n)))
    with pytest.raises(UserError, match=r"of 294 pictures failed during the run, more than --max_bad 0.02"):
        finetune(dataclasses.replace(config, max_bad=0.02))


@pytest.fixture
def small(config, drawings, tmp_path) -> tuple[Config, Path]:
    """8 steps of 4 on a table of 32 pictures, and the picture that comes up last."""
    last = int(Order(32, 4, config.seed).batch(7)[3])
    table = tmp_path / "data/train.csv"
    table.parent.mkdir()
    for path in drawings.iterdir():
        (table.parent / path.name).write_bytes(path.read_bytes())
    config = dataclasses.replace(
        config,
        train_data=table,
        eval_data={},
        steps=8,
        batch_size=4,
        save_every=1,
        max_bad=0.1,
        method="flyp",
    )
    return config, read_index(table).images[last]


@pytest.mark.parametrize("kept_from", [0, 1000])
def test_a_picture_that_is_cut_off_while_a_run_rests_fails_in_it(small, monkeypatch, kept_from):
    """Whether the index is read again, and lacks the picture, or is the kept one, as the table did not change."""
    monkeypatch.setattr("tracer.data.build.KEPT_FROM", kept_from)
    config, picture = small
    cut(config, monkeypatch, 3)
    assert (aside(config.output) / INDEX).is_dir()
    content = picture.read_bytes()
    picture.write_bytes(content[:80])
    end = finetune(config)
    (row,) = [json.loads(line) for line in (end / "skipped.jsonl").read_text().splitlines()]
    assert (row["batch"], row["picture"]) == (7, str(picture))
    picture.write_bytes(content)
    with monkeypatch.context() as patch:
        losing(patch, picture.unlink)
        whole = finetune(dataclasses.replace(config, output=config.output.with_name("whole")))
    assert (end / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()


CHANGES = {
    "another picture": lambda table, picture: picture.write_bytes(next(
        other for path in table.parent.glob("*.png") if (other := path.read_bytes()) != picture.read_bytes()
    )),
    "a row less": lambda table, picture: table.write_text(
        "".join(line for line in table.read_text().splitlines(True) if picture.name not in line)
    ),
    "another caption": lambda table, picture: table.write_text(table.read_text().replace("a circle", "a ball")),
    "a lost picture and another caption": lambda table, picture: (
        picture.unlink(),
        table.write_text(table.read_text().replace("a circle", "a ball")),
    ),
    "another order": lambda table, picture: table.write_text(
        "\n".join([(lines := table.read_text().splitlines())[0], *lines[:0:-1], ""])
    ),
}  # fmt: skip


@pytest.mark.parametrize("kept_from", [0, 1000])
@pytest.mark.parametrize("change", CHANGES)
def test_what_the_user_changes_while_a_run_rests_is_refused(small, monkeypatch, change, kept_from):
    """A lost picture stands aside; anything else makes another run."""
    monkeypatch.setattr("tracer.data.build.KEPT_FROM", kept_from)
    config, picture = small
    part = aside(config.output)
    cut(config, monkeypatch, 2)
    CHANGES[change](config.train_data, picture)
    with pytest.raises(UserError, match=r"unfinished run with other --train_data \(its content\)"):
        finetune(config)
    assert (part / INDEX).is_dir()
