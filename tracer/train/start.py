"""What keeps ranks from starting, said in one line before they wait for each other in vain."""

from __future__ import annotations

import os
import shutil
import socket
import time
import warnings
from pathlib import Path

import torch

from tracer.errors import UserError
from tracer.train.config import Config

LOCKED_FOR = 600.0  # seconds after which a lock of a build of extensions counts as left by a killed process
SEEN_WITHIN = 10.0  # seconds in which a shared file system shows what another host has written


def check_network() -> None:
    """Refuse addresses at which other hosts cannot reach this one.

    Raises:
        UserError: names the variable to set.
    """
    size, here = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if not here or size <= here:
        return  # one host, or unknown
    master, rank = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("RANK", "0"))
    if rank >= here and _is_loopback(master):
        raise UserError(
            f"rank {rank} on host {socket.gethostname()}: MASTER_ADDR is {master or 'not set'}, this host itself: "
            "set it to the address of the first host on every host (torchrun's and deepspeed's --master_addr)"
        )
    if not torch.cuda.is_available() and not os.environ.get("GLOO_SOCKET_IFNAME"):
        own = socket.gethostname()
        if _is_loopback(own):
            raise UserError(
                f"rank {rank}: gloo would listen on {socket.gethostbyname(own)}, as host {own} calls itself, "
                "where other hosts cannot reach it: set GLOO_SOCKET_IFNAME to the network's interface "
                f"({_interfaces()})"
            )


def _is_loopback(name: str) -> bool:
    try:
        return socket.gethostbyname(name or "localhost").startswith("127.")
    except OSError:
        return False


def _interfaces() -> str:
    return " or ".join(name for _, name in socket.if_nameindex() if name != "lo") or "it has none"


def refused_by_the_network(error: Exception, rank: int, size: int) -> UserError:
    """Return the error for ranks that cannot join, in words that name the remedy."""
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return UserError(
            f"rank {rank} of {size} cannot listen on {address}, since another process does: give another "
            "--master_port, or end that process"
        )
    if "imed out" in text or "refused" in text.lower():
        return UserError(
            f"rank {rank} of {size} cannot reach rank 0 at {address} ({text[:160]}): check that the first host "
            "runs, that its firewall lets this port through, and that all ranks were started"
        )
    return UserError(
        f"rank {rank} of {size} cannot join the others ({text[:200]}): start all ranks with torchrun or "
        "deepspeed, which set MASTER_ADDR and MASTER_PORT"
    )


def check_compiler(config: Config) -> None:
    """Refuse settings that need a compiler where there is none, and name a lock that a killed build has left.

    Raises:
        UserError: names what to install.
    """
    needed = {}
    if torch.cuda.is_available():
        needed["Triton's kernels"] = (os.environ.get("CC", ""), "gcc", "cc", "clang")
    if config.compile and not torch.cuda.is_available():
        needed["--compile true"] = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
    for what, compilers in needed.items():
        if not any(compiler and shutil.which(compiler) for compiler in compilers):
            raise UserError(
                f"{what} needs a compiler, and {socket.gethostname()} has none of {', '.join(compilers[1:])}: "
                f"install one (apt-get install {compilers[1]}), or name it in CC (of C) or CXX (of C++)"
            )
    for lock in stale_locks():
        warnings.warn(
            f"'{lock}' was left by a build of an extension that was killed, and whoever builds it again waits for "
            "ever: remove that file",
            stacklevel=2,
        )


def stale_locks() -> list[Path]:
    """Return the locks in torch's folder of extensions that are too old for a build that is under way."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(given) if given else Path("~/.cache/torch_extensions").expanduser()
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    return [lock for lock in locks if time.time() - lock.stat().st_mtime > LOCKED_FOR]


def check_shared(path: Path, rank: int) -> None:
    """Refuse an output folder that this host does not share with the first rank's, which has made ``path``.

    Raises:
        UserError: the file is not seen within ten seconds.
    """
    patience = time.monotonic() + SEEN_WITHIN
    while not path.is_file():
        if time.monotonic() > patience:
            raise UserError(
                f"rank {rank} on host {socket.gethostname()} does not see '{path}', which rank 0 has written: "
                "--output must lie in a folder that all hosts share"
            )
        time.sleep(0.1)
