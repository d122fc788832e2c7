"""Outputs that cannot be written are refused before the work, and nothing of the user's is emptied or replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tracer.cli import main
from tracer.errors import UserError
from tracer.files import MARK, aside, claim_folder, whole_file, whole_folder
from tracer.train import run


def options(command: str, tiny_config, drawings, tmp_path, output) -> list[str]:
    """Return a short call of a command; the demo's and pretrain's end before their work, as they are refused."""
    settings = {"output": output}
    if command != "pretrain":
        settings |= {
            "eval_data.held_out": drawings / "test.csv", "model": tiny_config, "pretrained": "null",
            "cache": tmp_path / "cache",
        }  # fmt: skip
    if command in ("finetune", "demo"):
        settings |= {"train_data": drawings / "train.csv", "steps": 1, "warmup": 0, "batch_size": 8}
    if command == "demo":
        settings |= {"validation": drawings / "test.csv", "eval_data.held_out": drawings / "train.csv"}
    return [command, *(str(x) for name, value in settings.items() for x in (f"--{name}", value))]


def content(folder: Path) -> dict[Path, bytes | str]:
    """Return all that lies below a folder, links as what they point at."""
    return {
        p: os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else "folder"
        for p in folder.rglob("*")
    }


def fail(*_args, **_options):
    pytest.fail("the work was begun")


def a_file_above(root: Path) -> Path:
    (root / "file").write_text("mine")
    return root / "file" / "run"


def a_file(root: Path) -> Path:
    (root / "run").write_text("mine")
    return root / "run"


def a_broken_link(root: Path) -> Path:
    (root / "run").symlink_to(root / "nowhere")
    return root / "run"


def a_folder_of_the_user(root: Path) -> Path:
    (root / "run").mkdir()
    (root / "run" / "results.json").write_text("mine")
    return root / "run"


def too_long(root: Path) -> Path:
    return root / ("run" * 90)


def no_place(_: Path) -> Path:
    return Path("/proc/nowhere/run")


@pytest.mark.parametrize(
    "make", [a_file_above, a_file, a_broken_link, a_folder_of_the_user, too_long, no_place]
)
@pytest.mark.parametrize("command", ["finetune", "evaluate", "demo", "pretrain"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    capsys, monkeypatch, tiny_config, drawings, tmp_path, command, make
):
    for work in (
        "train.run.load_clip", "evaluation.evaluate.load_clip", "demo.sweep.prepare_data",
        "demo.pretrain.download_corpus",
    ):  # fmt: skip
        monkeypatch.setattr(f"tracer.{work}", fail)
    (tmp_path / "root").mkdir()
    output = make(tmp_path / "root")
    before = content(tmp_path / "root")
    assert main(options(command, tiny_config, drawings, tmp_path, output)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"tracer: error: '{output}")
    assert "--output" in line
    assert content(tmp_path / "root") == before


def folder_beside(part: Path) -> None:
    part.mkdir()
    (part / "thesis.txt").write_text("mine")


def empty_beside(part: Path) -> None:
    part.mkdir()


def file_beside(part: Path) -> None:
    part.write_text("mine")


def link_beside(part: Path) -> None:
    other = part.with_name("other")
    claim_folder(other)
    (other / "thesis.txt").write_text("mine")
    part.symlink_to(other)


@pytest.mark.parametrize("make", [folder_beside, empty_beside, file_beside, link_beside])
def test_what_the_user_keeps_beside_the_output_stays(
    capsys, monkeypatch, tiny_config, drawings, tmp_path, make
):
    """Regression: a folder or file called OUTPUT.part was emptied and removed, with exit code 0."""
    monkeypatch.setattr(run, "load_clip", fail)
    (tmp_path / "root").mkdir()
    output = tmp_path / "root" / "run"
    make(aside(output))
    before = content(tmp_path / "root")
    assert main(options("finetune", tiny_config, drawings, tmp_path, output)) == 2
    assert f"'{aside(output)}' was not made by tracer" in capsys.readouterr().err
    assert content(tmp_path / "root") == before


def test_evaluate_leaves_a_file_beside_its_output_and_replaces_only_its_own(
    capsys, tiny_config, drawings, tmp_path
):
    output = tmp_path / "scores.json"
    aside(output).write_text("mine")
    argv = options("evaluate", tiny_config, drawings, tmp_path, output)
    assert main(argv) == main(argv) == 0
    assert set(json.loads(output.read_text())["scores"]) == {"held_out"}
    assert aside(output).read_text() == "mine"
    output.write_text('{"a": "file of the user"}')
    assert main(argv) == 2
    assert f"'{output}' exists: choose another --output" in capsys.readouterr().err
    assert output.read_text() == '{"a": "file of the user"}'


def test_a_run_of_the_demo_replaces_no_folder_of_the_user(capsys, tiny_config, drawings, tmp_path):
    output = tmp_path / "demo"
    claim_folder(output)
    (output / "flyp-trial-0").mkdir()
    (output / "flyp-trial-0" / "thesis.txt").write_text("mine")
    argv = options("demo", tiny_config, drawings, tmp_path, output)
    assert main([*argv, "--seeds", "1"]) == 2
    assert "flyp-trial-0' was not made by tracer" in capsys.readouterr().err
    assert (output / "flyp-trial-0" / "thesis.txt").read_text() == "mine"


def test_finished_work_stays_where_another_process_takes_its_name(
    capsys, monkeypatch, tiny_config, drawings, tmp_path
):
    output = tmp_path / "run"
    begin = run.head

    def meanwhile(*args):
        output.mkdir()
        (output / "note.txt").write_text("mine")
        return begin(*args)

    monkeypatch.setattr(run, "head", meanwhile)
    assert main(options("finetune", tiny_config, drawings, tmp_path, output)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"the finished work is in '{aside(output)}', rename it to keep it" in line
    assert (aside(output) / "metrics.json").is_file()
    assert (aside(output) / "student.safetensors").is_file()
    assert [p.name for p in output.iterdir()] == ["note.txt"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_whole_folder_or_file_that_cannot_have_its_name_stays(tmp_path, folder):
    path = tmp_path / "work"

    def work(meanwhile) -> None:
        with whole_folder(path) if folder else whole_file(path) as part:
            (part / "a" if folder else part).write_text("done")
            meanwhile()

    def create() -> None:
        path.mkdir()
        (path / "note.txt").write_text("")

    with pytest.raises(UserError, match="the finished work is in '") as error:
        work(create)
    kept = Path(str(error.value).rpartition("is in '")[2].partition("'")[0])
    assert (kept / "a" if folder else kept).read_text() == "done"
    assert (path / "note.txt").exists()


def test_a_checkpoint_s_name_on_a_folder_of_the_user_is_not_removed(tmp_path):
    with whole_folder(tmp_path / "run", keep="checkpoint-*") as part:
        (part / "checkpoint-mine").mkdir()
        assert (part / MARK).is_file()
    assert (tmp_path / "run" / "checkpoint-mine").is_dir()
