"""The log of a run: its rows, and which of them a continued run keeps."""

from __future__ import annotations

import json

import pytest
import torch

from tracer.errors import UserError
from tracer.train.log import StepLog, read_log, trim_log


def test_rows_are_read_back_and_continued(tmp_path):
    with StepLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": torch.tensor(step / 2), "lr": 0.25})
    assert read_log(tmp_path) == [{"step": s, "loss": s / 2, "lr": 0.25} for s in (1, 2, 3)]
    with StepLog(tmp_path, after=2) as log:
        log.write(3, {"loss": 9.0})
    assert [row["loss"] for row in read_log(tmp_path)] == [0.5, 1.0, 9.0]


def test_a_log_with_too_few_rows_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    with pytest.raises(UserError, match=r"log.jsonl' has lost rows: 1 of the 3 until the last checkpoint"):
        StepLog(tmp_path, after=3)


@pytest.mark.parametrize(
    ("rows", "step", "left"),
    [
        ([20, 40, 60], 50, [20, 40]),
        ([20, 40, 60], 60, [20, 40, 60]),
        ([20, 40], 0, []),
        (None, 5, []),
    ],
)
def test_rows_after_the_checkpoint_are_dropped(tmp_path, rows, step, left):
    log = tmp_path / "log.jsonl"
    if rows is not None:
        log.write_text("".join(json.dumps({"step": s}) + "\n" for s in rows) + '{"step": 1, "cut o')
    assert trim_log(log, step) == len(left)
    assert [row["step"] for row in read_log(tmp_path)] == left
