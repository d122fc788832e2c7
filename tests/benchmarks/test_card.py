"""``make gpu`` in miniature: what it refuses, what it runs, and what its page says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import card, page
from benchmarks.harness import ROOT, machine

REPORT = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_devices" name="test_repeats" time="1.5"/>
<testcase classname="tests.kernels.test_devices" name="test_replay" time="0.5">
<failure message="off by 1&#10;more"/></testcase>
<testcase classname="tests.test_teacher" name="test_old" time="0"><skipped message="no card"/></testcase>
<testcase classname="" name="tests.test_ops" time="0"><error message="collection failure"/></testcase>
</testsuite></testsuites>"""


def test_the_command_in_miniature(tmp_path):
    """The real checks and a real part of the benchmarks, in the interpreter; nothing of an earlier run."""
    name = page.slug(machine())
    earlier = {"machine": machine(), "parts": {"memory": {"results": "of an earlier run"}}}
    (tmp_path / f"{name}.json").write_text(json.dumps(earlier))
    (tmp_path / f"{name}-losses-sums.png").write_text("a picture")
    checks = ["tests/kernels/test_devices.py::test_repeats_agree_bit_for_bit", card.DALI]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.card", "--miniature", "--output", str(tmp_path), "--checks", *checks],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "card: none: Triton's interpreter" in done.stderr
    written = (tmp_path / "page.md").read_text()
    for words in (
        "## Checks: 2 passed, 0 failed",
        "| tests/kernels/test_devices.py",
        "### work",
        "| CLIP ",
    ):
        assert words in written
    assert f"page: {tmp_path / 'page.md'}" in done.stdout
    assert list(json.loads((tmp_path / f"{name}.json").read_text())["parts"]) == ["work"]
    assert list(tmp_path.glob("*.png")) == []


def test_a_run_without_results_shows_none_of_an_earlier_run(tmp_path, monkeypatch):
    (tmp_path / f"{page.slug(machine())}.md").write_text("# Earlier")
    monkeypatch.setattr(card, "run", lambda *arguments: None)
    assert card.benchmarked(("work",), True, tmp_path) == ("# No benchmarks", "")


def test_every_check_is_there():
    assert all((ROOT / name.split("::")[0]).exists() for name in (*card.CHECKS, *card.MINIATURE))
    assert card.DALI.split("::")[1] in (ROOT / "tests/data/test_loader.py").read_text()


@pytest.mark.parametrize("node", ["nvidia0", "kfd", "dxg"])
def test_a_gpu_that_torch_cannot_see_is_refused(node, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    (tmp_path / "nvidiactl").touch()  # there without a card too
    card.require_card(True, tmp_path)
    (tmp_path / node).touch()
    with pytest.raises(
        SystemExit, match=rf"there is a GPU \({tmp_path}/{node}\) but torch .* built for CPUs"
    ):
        card.require_card(True, tmp_path)


def test_no_gpu_is_refused_unless_it_is_the_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here: run make gpu ARGS=--miniature"):
        card.require_card(False, tmp_path)


def test_what_failed_is_on_the_page(tmp_path):
    """A failure, a test that was skipped, and a file that cannot be imported."""
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    outcomes = card.outcomes_of(report)
    assert [(o.file, o.passed, o.seconds, o.problems) for o in outcomes] == [
        ("tests/kernels/test_devices.py", 1, 2.0, ("test_replay: failure: off by 1",)),
        ("tests/test_teacher.py", 0, 0.0, ("test_old: skipped: no card",)),
        ("tests/test_ops.py", 0, 0.0, ("tests.test_ops: error: collection failure",)),
    ]
    card.write(tmp_path / "page.md", {"card": "A card"}, ["A note."], outcomes, "# Benchmarks\n\n## work")
    written = (tmp_path / "page.md").read_text()
    for words in (
        "# A card",
        "1 passed, 3 failed",
        "A note.",
        "test_devices.py, test_replay: failure: off by 1",
    ):
        assert words in written
    assert "## Benchmarks\n\n### work" in written


def test_a_check_that_fails_ends_the_command(tmp_path, monkeypatch):
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text("def test_it():\n    assert 1 == 2\n")
    monkeypatch.setattr(card, "require_card", lambda miniature: None)
    with pytest.raises(SystemExit, match="1 failed: see"):
        card.main(["--miniature", "--output", str(tmp_path), "--parts", "--checks", str(wrong)])
    assert "test_it: failure: assert 1 == 2" in (tmp_path / "page.md").read_text()


def test_checks_that_do_not_run_have_failed(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (outcome,) = card.run_checks(["tests/kernels"], miniature=True)
    assert outcome.problems == ("pytest ended with exit code 1",)


def test_a_benchmark_that_fails_is_on_the_page(tmp_path, monkeypatch):
    def fail(*arguments):
        raise SystemExit("part work failed\npart teacher failed")

    monkeypatch.setattr(card, "run", fail)
    assert card.benchmarked(("work", "teacher"), True, tmp_path) == (
        "# No benchmarks", "part work failed; part teacher failed"
    )  # fmt: skip
