"""Run one training on two hosts through many faults, and compare its end with the unbroken run, bit for bit.

Needs root. It takes an hour or more at its full length, so CI does not run it::

    python tests/many_faults.py --log faults.log            # 20 SIGKILLs, 3 SIGTERMs, 3 cuts of the link
    python tests/many_faults.py --kills 1 --terms 1 --cuts 1 --steps 20

The hosts are network namespaces (examples/launch/cluster.sh) with two ranks each, at ZeRO stage 2, with a teacher
and cached gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tracer.models.clip import load_clip
from tracer.models.weights import save_weights

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "examples/launch/cluster.sh"
NAME = os.environ.get("TRACER_CLUSTER", "h")  # what the hosts are called, before their number
HOSTS, RANKS = 2, 2
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 30, "heads": 2, "layers": 1},
}
END_WITHIN, SAVE_WITHIN = 60.0, 25.0  # seconds


class Log:
    """Writes lines with their second to the terminal and to a file."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("w") if path else None
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        line = f"{time.monotonic() - self._began:8.1f} s  {text}"
        for file in (sys.stdout, self._file):
            if file:
                print(line, file=file, flush=True)


def data(folder: Path) -> list[str]:
    """Draw pictures, make a start, and return the options of the run."""
    draw, rows = np.random.default_rng(0), ["image,label,captions"]
    for n in range(40):
        Image.fromarray(draw.integers(0, 255, (36, 40, 3), np.uint8)).save(folder / f"{n}.png")
        rows.append(f"{n}.png,{'abcd'[n % 4]},picture {n}|a {'abcd'[n % 4]}")
    (folder / "train.csv").write_text("\n".join(rows))
    (folder / "tiny.json").write_text(json.dumps(TINY))
    torch.manual_seed(0)
    start = folder / "start.safetensors"
    save_weights(load_clip(str(folder / "tiny.json"), None).model.state_dict(), start)
    options = {
        "train_data": folder / "train.csv", "model": folder / "tiny.json", "pretrained": start, "warmup": 2,
        "cache": folder / "cache", "batch_size": 24, "micro_batch": 3, "zero_stage": 2, "precision": "fp32",
        "method": "tracer", "lr": 1e-4, "save_every": 1,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in options.items()]


class Attempt:
    """One start of the run on all hosts, with torchrun on each."""

    def __init__(self, folder: Path, number: int, options: list[str]) -> None:
        self.logs = [folder / f"attempt-{number}.{host}.log" for host in range(HOSTS)]
        variables = {
            "HOSTS": HOSTS,
            "RANKS": RANKS,
            "MASTER": f"{NAME}1",
            "PORT": 20000 + number,
            "OMP_NUM_THREADS": 1,
        }
        variables |= {"PYTHON": sys.executable, "PYTHONPATH": ROOT}
        launch = str(ROOT / "examples/launch/torchrun.sh")
        self._launchers = []
        for host, log in enumerate(self.logs):
            env = os.environ | {k: str(v) for k, v in variables.items()} | {"NODE_RANK": str(host)}
            command = [str(CLUSTER), "run", f"{NAME}{host + 1}", launch, *options]
            with log.open("w") as out:
                self._launchers.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))

    @property
    def codes(self) -> list[int | None]:
        return [launcher.poll() for launcher in self._launchers]

    def signal_launcher(self, host: int) -> None:
        self._launchers[host].send_signal(signal.SIGTERM)

    def ranks(self) -> dict[int, int]:
        """Return rank → process id of the ranks that live."""
        found = {}
        for host in range(HOSTS):
            pids = subprocess.run(
                ["ip", "netns", "pids", f"{NAME}{host + 1}"], capture_output=True, text=True
            )
            for pid in map(int, pids.stdout.split()):
                try:
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    zombie = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
                except OSError:
                    continue
                rank = [v.partition(b"=")[2] for v in variables if v.startswith(b"RANK=")]
                if b"finetune" in command and rank and not zombie:
                    found[int(rank[0])] = pid
        return found

    def end_well(self) -> None:
        """Wait until the run has ended as it should."""
        wait(f"the end of {self.logs}", lambda: None not in self.codes, 3600)
        assert self.codes == [0] * HOSTS, self.logs

    def wait_for_step(self, output: Path, step: int) -> None:
        """Wait until the run, which goes on meanwhile, has done ``step``."""
        wait(f"step {step}", lambda: rows(output) >= step or None not in self.codes, 600)
        assert self.codes == [None] * HOSTS, f"{self.logs}: ended by itself"

    def said(self) -> list[str]:
        lines = [line for log in self.logs for line in log.read_text(errors="replace").splitlines()]
        return [line for line in lines if line.startswith(("tracer: error", "tracer: stopped"))]


def rows(output: Path) -> int:
    """Return how many steps the log of the run holds, finished or not."""
    for folder in (output, output.with_name(output.name + ".part")):
        if (folder / "log.jsonl").exists():
            return len((folder / "log.jsonl").read_text().splitlines())
    return 0


def wait(what: str, until, within: float) -> float:
    """Return after how many seconds ``until`` is true; raises AssertionError where that takes too long."""
    began = time.monotonic()
    while not until():
        assert time.monotonic() - began < within, f"{what}: not within {within:g} s"
        time.sleep(0.2)
    return time.monotonic() - began


def fault(kind: str, attempt: Attempt, draw: random.Random, log: Log) -> None:
    """Let a fault happen, and check that all ranks end in time, and that what happened is said."""
    what = f"SIGTERM to the launcher of {NAME}1"
    if kind == "kill":
        rank = draw.randrange(HOSTS * RANKS)
        what = f"SIGKILL to rank {rank}"
        os.kill(attempt.ranks()[rank], signal.SIGKILL)
    elif kind == "cut":
        host = f"{NAME}{draw.randrange(HOSTS) + 1}"
        what = f"the link of {host} is cut"
        subprocess.run([CLUSTER, "cut", host], check=True)
    else:
        attempt.signal_launcher(0)
    within = SAVE_WITHIN if kind == "term" else END_WITHIN
    took = wait(f"{what}: the ranks end", lambda: not attempt.ranks(), within)
    if kind == "cut":
        subprocess.run([CLUSTER, "mend", host], check=True)
    wait("the launchers end", lambda: None not in attempt.codes, 90)
    log(f"{what}: all ranks ended after {took:.1f} s")
    said = attempt.said()
    for line in said:
        log(f"    {line}")
    word = "stopped after step" if kind == "term" else "was lost in step"
    told = [line for line in said if word in line]
    assert 1 <= len(told) <= (HOSTS if kind == "cut" else 1), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("kills", 20), ("terms", 3), ("cuts", 3), ("steps", 100), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--log", type=Path)
    given = parser.parse_args()
    log, draw = Log(given.log), random.Random(given.seed)
    kinds = ["kill"] * given.kills + ["term"] * given.terms + ["cut"] * given.cuts
    draw.shuffle(kinds)
    folder = Path(tempfile.mkdtemp(prefix="tracer-faults-"))
    options = [*data(folder), f"--steps={given.steps}"]
    subprocess.run([CLUSTER, "up", str(HOSTS)], check=True)
    try:
        log(f"{HOSTS} hosts x {RANKS} ranks, {' '.join(options)}")
        whole = Attempt(folder, 0, [*options, f"--output={folder / 'whole'}"])
        whole.end_well()
        log("the unbroken run has ended")
        output = folder / "run"
        for number, kind in enumerate([*kinds, ""], 1):
            attempt, before = Attempt(folder, number, [*options, f"--output={output}"]), rows(output)
            if kind:
                attempt.wait_for_step(output, before + draw.randint(1, 3))
                time.sleep(draw.random())
                fault(kind, attempt, draw, log)
            else:
                attempt.end_well()
        for name in ("student.safetensors", "teacher.safetensors"):
            same = (folder / "whole" / name).read_bytes() == (output / name).read_bytes()
            log(f"{name}: {'the same bytes as in the unbroken run' if same else 'DIFFERS'}")
            assert same
        log(f"done: {given.kills} SIGKILLs, {given.terms} SIGTERMs, {given.cuts} cuts")
    finally:
        subprocess.run([CLUSTER, "down"], check=True)


if __name__ == "__main__":
    main()
