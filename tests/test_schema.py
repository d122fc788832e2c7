"""Every file of results follows docs/results.schema.json, and the schema refuses what does not."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import jsonschema
import pytest
from results_schema import validate

from tracer.cli import main


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_config, drawings) -> dict[str, dict]:
    """What the commands write, by its kind: two runs, a comparison of them, and an evaluation of one."""
    root = tmp_path_factory.mktemp("results")
    model = ["--model", str(tiny_config), "--cache", str(root / "cache")]
    sets = ["--eval-data.same", str(drawings / "test.csv"), "--eval-data.other", str(drawings / "train.csv")]
    train = ["finetune", "--train_data", str(drawings / "train.csv"), *sets, *model, "--pretrained", "null"]
    train += ["--steps", "2", "--batch-size", "8", "--eval-every", "1", "--keep-best", "same"]
    train += ["--log-to", "csv"]
    for seed in ("0", "1"):
        assert main([*train, "--seed", seed, "--output", str(root / f"run-{seed}")]) == 0
    assert (
        main(["evaluate", "--pretrained", str(root / "run-0"), *sets, "--output", str(root / "e.json")]) == 0
    )
    shutil.copytree(root / "run-0", root / "run-0-again")  # a repeat, which says nothing about seeds
    runs = [str(root / name) for name in ("run-0", "run-1", "run-0-again")]
    assert main(["compare", *runs, str(drawings), "--output", str(root / "all")]) == 0
    paths = ("run-0/metrics.json", "run-0/run.json", "e.json", "all/results.json")
    content = {name: json.loads((root / name).read_text()) for name in paths}
    return {one["kind"]: one for one in content.values()} | {"root": {"path": str(root)}}


@pytest.mark.parametrize("kind", ["metrics", "run", "evaluation", "comparison"])
def test_a_file_follows_the_schema(files, kind):
    validate(files[kind])
    broken = copy.deepcopy(files[kind])
    del broken["weights"]
    with pytest.raises(jsonschema.ValidationError):
        validate(broken)


def test_the_schema_refuses_an_accuracy_in_per_cent(files):
    broken = copy.deepcopy(files["metrics"])
    broken["scores"]["student"]["same"]["accuracy"] = 50.0
    with pytest.raises(jsonschema.ValidationError):
        validate(broken)


def test_a_log_follows_the_schema_and_the_table_holds_the_same(files):
    run = Path(files["root"]["path"]) / "run-0"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for row in rows:
        validate(row, "log_row")
        assert 0 <= row["eval/student/same/accuracy"] <= 1
        assert 0 <= row["eval/teacher/other/ece"] <= 1
    lines = (run / "log.csv").read_text().splitlines()
    assert lines[0].split(",")[:2] == ["step", "loss"]
    assert len(lines) == 1 + len(rows)


def test_an_evaluation_has_the_classes_of_the_training(files):
    for kind in ("metrics", "run", "comparison"):
        assert (
            files[kind]["classes"] == files["evaluation"]["classes"] == ["bar", "circle", "cross", "square"]
        )
    assert files["evaluation"]["weights"]["model"] == files["run"]["weights"]["student"]
    assert (
        files["evaluation"]["scores"]["same"]["accuracy"]
        == files["metrics"]["scores"]["student"]["same"]["accuracy"]
    )


def test_runs_that_differ_in_their_seed_alone_are_one_method(files):
    zero_shot, method = files["comparison"]["methods"]
    assert zero_shot["key"] == "zero-shot"
    assert [run["seed"] for run in method["runs"]] == [0, 1]
    assert method["name"] == "TRACER, WMA"


def test_the_best_weights_are_those_of_the_best_step(files):
    run = Path(files["root"]["path"]) / "run-0"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    best = max(row["eval/student/same/accuracy"] for row in rows)
    assert files["metrics"]["scores"]["best"]["same"]["accuracy"] == pytest.approx(best)


def test_show_says_how_to_repeat_a_run(files, capsys):
    run = Path(files["root"]["path"]) / "run-0"
    assert main(["show", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"repeat it: tracer finetune --config {run}/config.yaml --output {run}-again" in out
    assert files["run"]["weights"]["student"] in out
    assert "zero-shot" in out
