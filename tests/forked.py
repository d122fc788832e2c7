"""The server that processes of tests are forked from, which imports once what each of them needs."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock


def context() -> ForkServerContext:
    """Return the context of processes that are forked, after ``preloaded.py`` was imported.

    The server looks for modules along PYTHONPATH alone, and leaves out silently what it does not find there.
    """
    multiprocessing.set_forkserver_preload(["preloaded"])
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")
