"""Files and folders are whole or absent, and nobody else's are touched."""

from __future__ import annotations

import os

import pytest
import torch

from tracer.errors import UserError
from tracer.files import MARK, aside, claim_folder, remove_folder, whole_file, whole_folder, write_tensors


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.json", []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append((os.fstat(handle).st_ino, path.exists())))
    with whole_file(path) as part:
        part.write_text("{}")
    assert synced == [(path.stat().st_ino, False)]


def test_a_file_that_fails_leaves_the_one_before_and_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "a.json"
    with whole_file(path) as part:
        part.write_text("first")

    def fail() -> None:
        with whole_file(path) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "run"
    claim_folder(aside(path))
    (aside(path) / "left by a killed attempt").write_text("")
    with whole_folder(path) as part:
        assert [p.name for p in part.iterdir()] == [MARK]
        (part / "a").write_text("a")
        assert not path.exists()
    assert {p.name for p in path.iterdir()} == {MARK, "a"}
    assert not aside(path).exists()


@pytest.mark.parametrize("kept", [False, True])
def test_a_folder_that_fails_stays_only_with_what_is_to_be_kept(tmp_path, kept):
    path = tmp_path / "run"

    def fail() -> None:
        with whole_folder(path, keep="checkpoint-*") as part:
            (part / "log").write_text("")
            if kept:
                (part / "checkpoint-1").mkdir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert aside(path).exists() == kept
    with whole_folder(path, keep="checkpoint-*") as part:
        assert {p.name for p in part.iterdir()} == {MARK} | ({"log", "checkpoint-1"} if kept else set())


def test_a_folder_that_is_being_written_is_not_removed(tmp_path):
    with whole_folder(tmp_path / "run") as part:
        (part / "a").write_text("a")
        with pytest.raises(UserError, match=f"another process is writing '{part}': wait until it has ended"):
            remove_folder(part)
        assert (part / "a").exists()
    remove_folder(tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_users_usual_mode(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode
        assert os.umask(mask) == mask  # and the mask is as it was
    finally:
        os.umask(before)
