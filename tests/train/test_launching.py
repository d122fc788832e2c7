"""The scripts of examples/launch start ranks on two hosts.

As root the hosts are network namespaces, with ssh and Slurm, as ``cluster.sh`` builds them; it installs what is
missing. Elsewhere they are processes of this machine, and a script stands for Slurm's ``srun``. That a run ends
well is tested once. The other ways get a batch that two ranks cannot share: the one line that says so proves that
both were started and have found each other.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tracer.train.log import read_log
from tracer.train.run import finetune

LAUNCH = Path(__file__).parents[2] / "examples/launch"
CLUSTER = LAUNCH / "cluster.sh"
NAME = f"t{os.getpid() % 10_000}n"  # interfaces have at most 15 letters

STAND_IN = """#!/usr/bin/env bash
# srun of two tasks on two hosts: each has the variables that Slurm gives it.
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
  export SLURM_PROCID=$task SLURM_NODEID=$task
  SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 SLURM_NNODES=2 "$@" &
done
wait -n && wait -n
"""


class Hosts(NamedTuple):
    """Two hosts: how a command runs on one of them, and what the scripts are told."""

    real: bool
    names: tuple[str, str]
    variables: dict[str, str]

    def on(self, host: int, *command: object) -> list[str]:
        where = [str(CLUSTER), "run", self.names[host]] if self.real else []
        return [*where, *map(str, command)]


def _cluster(*arguments: str) -> str:
    variables = os.environ | {"TRACER_CLUSTER": NAME, "TRACER_NET": f"10.{100 + os.getpid() % 100}.0"}
    done = subprocess.run([CLUSTER, *arguments], env=variables, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr or f"{CLUSTER.name} ended with {done.returncode}")
    return done.stdout


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    folder = tmp_path_factory.mktemp("hosts")
    variables = os.environ | {"PYTHON": sys.executable, "HOSTS": "2", "RANKS": "1", "OMP_NUM_THREADS": "1"}
    variables |= {
        "PYTHONPATH": str(LAUNCH.parents[1]),
        "HOSTFILE": str(folder / "hostfile"),
        "TRACER_CLUSTER": NAME,
    }
    names = (f"{NAME}1", f"{NAME}2")
    problem = "this is not root" if os.geteuid() else ""
    if not problem:
        try:
            _cluster("up", "2")
            variables["SLURM_CONF"] = _cluster("slurm", "2").strip().partition("=")[2]
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            problem = str(error)
    if problem:
        warnings.warn(
            f"the hosts are processes, for there are no network namespaces: {problem}", stacklevel=1
        )
        names = ("127.0.0.1", "localhost")
        srun = folder / "bin/srun"
        srun.parent.mkdir()
        srun.write_text(STAND_IN)
        srun.chmod(0o755)
        variables |= {"PATH": f"{srun.parent}:{variables['PATH']}", "GLOO_SOCKET_IFNAME": "lo"}
        variables |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": names[0], "SLURM_NNODES": "2"}
    else:
        variables["PDSH_SSH_ARGS_APPEND"] = f"-F /run/tracer-cluster-{NAME}/ssh_config"
    variables["MASTER"] = names[0]
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in names))
    try:
        yield Hosts(not problem, names, variables)
    finally:
        if not os.geteuid():
            _cluster("down")


def run(hosts: Hosts, way: str, options: list[str], folder: Path) -> str:
    """Start the ranks in one of the ways; return what all of them say."""
    variables = hosts.variables | {"PORT": str(20_000 + os.getpid() % 9_000 + len(way))}
    if way == "torchrun":
        commands = [hosts.on(host, LAUNCH / "torchrun.sh", *options) for host in (0, 1)]
    elif way == "deepspeed --no_ssh":
        commands = [hosts.on(host, LAUNCH / "deepspeed.sh", *options) for host in (0, 1)]
    elif way == "deepspeed over ssh":
        commands = [hosts.on(0, LAUNCH / "deepspeed.sh", *options)]
    else:
        script = LAUNCH / {"srun torchrun": "torchrun.sbatch", "srun": "srun.sbatch"}[way]
        sbatch = ["sbatch", "--wait", f"--output={folder / 'slurm.log'}"] if hosts.real else ["bash"]
        commands = [[*sbatch, str(script), *options]]
    started = []
    for rank, command in enumerate(commands):
        own = variables | ({"NODE_RANK": str(rank)} if len(commands) > 1 else {})
        started.append(
            subprocess.Popen(
                command, env=own, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = "".join(process.communicate(timeout=300)[0] for process in started)
    log = folder / "slurm.log"
    return said + (log.read_text() if log.exists() else "")


def test_a_run_under_torchrun_on_two_hosts_trains_what_one_process_does(hosts, config, drawings, tmp_path):
    config = dataclasses.replace(
        config, train_data=drawings / "train.csv", precision="fp32", steps=4, warmup=1
    )
    alone = finetune(dataclasses.replace(config, output=config.output.with_name("alone")))
    settings = tmp_path / "settings.yaml"
    settings.write_text(config.to_yaml())
    said = run(hosts, "torchrun", ["--config", str(settings)], tmp_path)
    assert config.output.is_dir(), said
    assert "deprecated" not in said  # DeepSpeed calls old names of torch's collectives
    losses = [[row["loss"] for row in read_log(path)] for path in (alone, config.output)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(losses[1]) == 4


@pytest.mark.parametrize("way", ["deepspeed --no_ssh", "deepspeed over ssh", "srun torchrun", "srun"])
def test_two_hosts_start_two_ranks_that_say_one_line(hosts, way, tmp_path):
    if way == "deepspeed over ssh" and not hosts.real:
        way = "deepspeed --no_ssh"  # where nobody may start a server of ssh
    said = run(hosts, way, ["--train_data=photos", "--batch_size=3"], tmp_path)
    errors = [line for line in said.splitlines() if "tracer: error" in line]
    assert len(errors) == 1, said
    assert "--batch_size 3" in errors[0]
    assert "by 2 ranks equally" in errors[0]


def test_the_cluster_leaves_nothing_behind(hosts):
    if hosts.real:
        _cluster("down")
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        assert NAME not in left
        assert not Path(f"/run/tracer-cluster-{NAME}").exists()
        assert not list(Path("/etc/netns").glob(f"{NAME}*"))
    for script in LAUNCH.glob("*.s*"):
        subprocess.run([shutil.which("bash") or "bash", "-n", script], check=True)
