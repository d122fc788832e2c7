"""Fixtures of the tests of data: a tiny model, and a writer of CSV files."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from tracer.models.clip import load_clip


@pytest.fixture(scope="session")
def clip(tiny_config):
    return load_clip(str(tiny_config), None)


@pytest.fixture
def write_csv(tmp_path) -> Callable[[str, list[str], list[list[str]]], Path]:
    """Write rows below a header into a CSV file in ``tmp_path``."""

    def write(name: str, header: list[str], rows: list[list[str]]) -> Path:
        path = tmp_path / name
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        return path

    return write
