"""Loggers beside log.jsonl: what each receives, and what is refused where a library is missing."""

from __future__ import annotations

import csv

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


def test_mlflow_gets_settings_and_scalars_and_goes_on(tmp_path, monkeypatch):
    """With the library itself, into a folder."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write(tmp_path, ["mlflow"])
    write(tmp_path, ["mlflow"], steps=(3,), after=2)
    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    run = client.get_run((tmp_path / "mlflow-id.txt").read_text())
    assert run.data.params["method"] == "flyp"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]
    assert run.info.status == "FINISHED"


def test_wandb_gets_settings_and_scalars_and_goes_on(tmp_path, monkeypatch):
    """With the library itself, offline: what it would send lies in its folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, ["wandb"])
    first = (tmp_path / "wandb-id.txt").read_text()
    write(tmp_path, ["wandb"], steps=(3,), after=2)
    assert (tmp_path / "wandb-id.txt").read_text() == first
    sent = [path.read_bytes() for path in sorted((tmp_path / "wandb").glob(f"*/*{first}.wandb"))]
    assert b"flyp" in sent[0]
    assert all(b"loss" in part for part in sent)


def test_a_logger_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_loggers(["csv"])
    with pytest.raises(
        UserError, match=r"--log_to wandb needs wandb.* pip install 'tracer-clip\[train,wandb\]'"
    ):
        check_loggers(["csv", "wandb"])
