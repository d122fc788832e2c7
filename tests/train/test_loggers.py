"""Loggers beside log.jsonl: what each receives, and what is refused where a library is missing."""

from __future__ import annotations

import csv
import json
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tracer.errors import UserError
from tracer.train.log import StepLog
from tracer.train.loggers import check_loggers

SETTINGS = {"lr": 1e-3, "output": "runs/mine", "method": "flyp", "eval_data": {"a": "x"}}


def write(folder, loggers, steps=(1, 2), after=0) -> None:
    with StepLog(folder, after, loggers=loggers, settings=SETTINGS) as log:
        for step in steps:
            log.write(step, {"loss": step / 4} | ({"kl": 0.5} if step == 2 else {}))


def test_a_table_has_a_column_for_all_that_was_logged(tmp_path):
    write(tmp_path, ["csv"])
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert rows == [{"step": "1", "loss": "0.25", "kl": ""}, {"step": "2", "loss": "0.5", "kl": "0.5"}]
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_has_the_hyper_parameters(tmp_path):
    write(tmp_path, ["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == [0.25, 0.5]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"method" in content
    assert b"flyp" in content


class Recorder(types.ModuleType):
    """What the two libraries offer, as far as it is used: it notes every call."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple] = []
        self.id = "run-7"
        self.info = types.SimpleNamespace(run_id="run-7")

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "log", "end"), [("wandb", "log", "finish"), ("mlflow", "log_metrics", "end_run")]
)
def test_other_loggers_get_settings_and_scalars_and_are_continued(tmp_path, monkeypatch, name, log, end):
    library = Recorder(name)
    monkeypatch.setitem(sys.modules, name, library)
    write(tmp_path, [name])
    logged = [(args[0], kwargs) for called, args, kwargs in library.calls if called == log]
    assert logged == [({"loss": 0.25}, {"step": 1}), ({"loss": 0.5, "kl": 0.5}, {"step": 2})]
    assert library.calls[-1][0] == end
    assert "flyp" in repr(library.calls)
    library.calls.clear()
    write(tmp_path, [name], steps=(3,), after=2)
    assert "run-7" in repr(library.calls[:2])  # the same run goes on
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]


def test_a_logger_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_loggers(["csv"])
    with pytest.raises(
        UserError, match=r"--log_to wandb needs wandb.* pip install 'tracer-clip\[train,wandb\]'"
    ):
        check_loggers(["csv", "wandb"])
