"""What keeps ranks from starting is one line with a remedy, before anything waits."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tracer.errors import UserError
from tracer.train import start


@pytest.fixture
def second_of_two_hosts(monkeypatch):
    """The environment of rank 2 of 2 hosts with 2 ranks each."""
    for name, value in {
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": "2",
        "MASTER_ADDR": "10.1.2.3",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return monkeypatch


def test_a_host_that_calls_itself_localhost(second_of_two_hosts):
    """As Debian has it in /etc/hosts: gloo listens there, and others wait half an hour."""
    addresses = {"h2": "127.0.1.1", "10.1.2.3": "10.1.2.3"}
    second_of_two_hosts.setattr(socket, "gethostname", lambda: "h2")
    second_of_two_hosts.setattr(socket, "gethostbyname", addresses.__getitem__)
    second_of_two_hosts.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth7")])
    with pytest.raises(UserError, match=r"gloo would listen on 127.0.1.1, .* GLOO_SOCKET_IFNAME .*\(eth7\)"):
        start.check_network()
    second_of_two_hosts.setenv("GLOO_SOCKET_IFNAME", "eth7")
    start.check_network()
    second_of_two_hosts.delenv("GLOO_SOCKET_IFNAME")
    addresses["h2"] = "10.1.2.4"
    start.check_network()


def test_a_master_that_is_this_host_itself(second_of_two_hosts):
    second_of_two_hosts.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(
        UserError, match=r"rank 2 on host .*: MASTER_ADDR is 127.0.0.1, this host itself: set"
    ):
        start.check_network()
    second_of_two_hosts.setenv("RANK", "0")  # the first host's own ranks may use it
    second_of_two_hosts.setenv("GLOO_SOCKET_IFNAME", "eth0")
    start.check_network()


def test_a_taken_port_is_named():
    """In a process of its own, which has no group yet."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ranks = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = subprocess.run(
            [sys.executable, "-c", "from tracer.train.ranks import join; join(5.0)"],
            env=os.environ | ranks, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert f"UserError: rank 0 of 2 cannot listen on 127.0.0.1:{port}, since another" in done.stderr


def test_ranks_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "h1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    error = start.refused_by_the_network(RuntimeError("connect() timed out"), 3, 4)
    assert str(error).startswith(
        "rank 3 of 4 cannot reach rank 0 at h1:29500 (connect() timed out): check that"
    )
    other = start.refused_by_the_network(ValueError("MASTER_ADDR expected"), 3, 4)
    assert "start all ranks with torchrun or deepspeed" in str(other)


@pytest.mark.parametrize(
    ("gpu", "compiles", "says"),
    [
        (True, False, r"Triton's kernels needs a compiler, .* none of gcc, cc, clang"),
        (False, True, r"--compile true"),
    ],
)
def test_a_missing_compiler_is_named(monkeypatch, gpu, compiles, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    config = SimpleNamespace(compile=compiles)
    start.check_compiler(config)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match=says):
        start.check_compiler(config)


def test_a_lock_that_a_killed_build_has_left_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert start.stale_locks() == []  # a build that is under way
    old = time.time() - 2 * start.LOCKED_FOR
    os.utime(lock, (old, old))
    with pytest.warns(UserWarning, match=f"'{lock}' was left by a build of an extension that was killed"):
        start.check_compiler(SimpleNamespace(compile=False))


def test_an_output_that_a_host_does_not_share_is_named(monkeypatch, tmp_path):
    (tmp_path / "here").touch()
    start.check_shared(tmp_path / "here", 3)
    monkeypatch.setattr(start, "SEEN_WITHIN", 0.2)
    with pytest.raises(UserError, match=r"rank 3 on host \S+ does not see '.*elsewhere', .* all hosts share"):
        start.check_shared(tmp_path / "elsewhere", 3)
