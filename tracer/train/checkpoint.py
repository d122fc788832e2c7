"""Checkpoints of an unfinished run, from which the same command continues it, on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tracer.errors import UserError
from tracer.files import (
    aside,
    digest_of,
    is_marked,
    remove_tree,
    sync,
    whole_file,
    whole_folder,
    write_json,
)
from tracer.teacher import MovingAverageTeacher
from tracer.train.parts import Parts, write_part
from tracer.train.ranks import ranks
from tracer.train.state import RunState

WHOLE = "checkpoint-*[0-9]"  # matches no checkpoint that is still being written
RECORD = "checkpoint.json"
FORMAT = 2  # of a checkpoint; 1 was DeepSpeed's own files


def whole_checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints in the folder of an unfinished run, the newest first."""
    return sorted(folder.glob(WHOLE), key=lambda path: -int(path.name.rpartition("-")[2]))


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in the folder of an unfinished run, or None."""
    return next(iter(whole_checkpoints(folder)), None)


class Checkpoints:
    """The checkpoints in the folder of an unfinished run.

    A checkpoint is a folder: ``rank-R.safetensors`` with the part of each rank, and ``checkpoint.json``, which
    lists these files with their sizes and SHA-256, and holds the numbers that all ranks have alike, the step, the
    seconds so far, the fingerprint and the pictures that failed. These are also written to ``skipped.jsonl``
    beside it. All ranks write into the same folder, and read from it, whatever their number was before. The folder
    has its name only once every part is on the disk. Nothing that is read can hold code.

    Args:
        folder: of the run, with or without checkpoints of an earlier attempt.
        fingerprint: of the run.
        started: ``time.perf_counter()`` at which this attempt began.
        keep: how many checkpoints stay.

    Attributes:
        step: optimizer steps done in the checkpoint from which the run goes on; 0 where there is none.
        skipped: the pictures that had failed by then, a dictionary for each.

    Raises:
        UserError: there are checkpoints, and each is damaged or another run's.
    """

    def __init__(self, folder: Path, fingerprint: str, started: float, keep: int = 2) -> None:
        self._folder, self._fingerprint, self._keep = folder, fingerprint, keep
        self.step, self._started = 0, started
        self.skipped: list[dict[str, Any]] = []
        self._last: Path | None = None
        self._record: dict[str, Any] = {}
        names = [path.name for path in whole_checkpoints(folder)]
        here = ranks()
        problems = []
        for path in (folder / name for name in here.once(lambda: names)):  # a shared folder may lag behind
            problem = self._problem(path)
            if not problem:
                self._go_on_from(path)
                break
            problems.append(problem)
            if here.first:
                warnings.warn(f"{problem}; the checkpoint before it is tried", stacklevel=2)
        if problems and self._last is None:
            raise UserError(f"{problems[0]}, and no other is left: add --restart true to start anew")

    def _go_on_from(self, path: Path) -> None:
        record = json.loads((path / RECORD).read_text())
        self.step, self.skipped = record["step"], record["skipped"]
        self._started -= record["seconds"]
        self._last, self._record = path, record

    def _problem(self, path: Path) -> str:
        """Return what is wrong with a checkpoint, "" if it is whole; the ranks divide its files among them."""
        here = ranks()
        damage = _damage_of_record(path, self._fingerprint)
        if not damage:
            files = sorted(json.loads((path / RECORD).read_text())["files"].items())
            damages = (_damage_of_file(path / name, *about) for name, about in files[here.rank :: here.size])
            damage = next(filter(None, damages), "")
        everyones = [said for said in here.everyones(damage) if said]
        return f"checkpoint '{path}' is damaged: {everyones[0]}" if everyones else ""

    @property
    def seconds(self) -> float:
        """How long the run has taken, less what an earlier attempt did after its last checkpoint."""
        return time.perf_counter() - self._started

    def resume(self, engine: Any, averages: Mapping[str, MovingAverageTeacher]) -> None:
        """Bring the engine, its averages and the random generators to ``step``.

        Raises:
            UserError: the checkpoint does not fit; names it.
        """
        here, last = ranks(), self._last
        for other in self._folder.glob("checkpoint-*.part") if here.first else ():
            if is_marked(other):
                remove_tree(other)
        if last is None:
            return

        def load() -> None:
            files = [last / f"rank-{rank}.safetensors" for rank in range(self._record["ranks"])]
            try:
                with ExitStack() as stack:
                    RunState(engine, averages).load(Parts(files, stack), self._record["numbers"])
            except (ValueError, KeyError, OSError, SafetensorError) as error:
                raise UserError(
                    f"checkpoint '{last}' cannot be read ({type(error).__name__}: {str(error)[:200]}): "
                    "add --restart true to start anew, or choose another --output"
                ) from error

        here.agree(load)

    def save(
        self,
        step: int,
        engine: Any,
        averages: Mapping[str, MovingAverageTeacher],
        skipped: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Write the checkpoint of ``step``; once it is whole and on the disk, remove those beyond ``keep``.

        ``skipped`` holds the pictures that have failed in the steps so far, on all ranks.

        Raises:
            UserError: it could not be written; those before are still there.
        """
        here, folder = ranks(), self._folder / f"checkpoint-{step}"
        part, state = aside(folder), RunState(engine, averages)
        name = f"rank-{here.rank}.safetensors"

        def write() -> dict[str, Any]:
            with _named(folder):
                write_part(part / name, state.pieces())
                return {name: [(part / name).stat().st_size, digest_of(part / name)]}

        def finish() -> None:
            with _named(folder):
                write_json(part / RECORD, _sealed(record))
                sync(part)
            stack.close()  # gives the folder its name

        with ExitStack() as stack:
            if here.first and is_marked(folder):  # a damaged one, which was not gone on from
                remove_tree(folder)
            here.once(lambda: _discard(stack.enter_context(whole_folder(folder))))
            files: dict[str, Any] = {}
            for of_rank in here.everyones(here.agree(write)):
                files |= of_rank
            record = {
                "format": FORMAT,
                "fingerprint": self._fingerprint,
                "ranks": here.size,
                "step": step,
                "seconds": self.seconds,
                "skipped": list(skipped),
                "files": files,
                "numbers": state.numbers(),
            }
            here.once(finish)
        here.once(lambda: self._tidy(folder, skipped))
        self._last, self._record, self.step, self.skipped = folder, record, step, list(skipped)

    def _tidy(self, folder: Path, skipped: Sequence[dict[str, Any]]) -> None:
        """Remove the checkpoints beyond those to keep, and any of later steps: an attempt went on from before."""
        sync(self._folder)
        order = whole_checkpoints(self._folder)
        later = order[: order.index(folder)]
        for other in (*later, *order[order.index(folder) + self._keep :]):
            if is_marked(other):
                remove_tree(other)
        if skipped:
            with whole_file(self._folder / "skipped.jsonl") as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in skipped))

    def nbytes(self) -> int:
        """Return the size of the newest checkpoint's files in bytes."""
        return sum(size for size, _ in self._record["files"].values()) if self._record else 0


def _discard(_: object) -> None:
    """Return nothing: what is done once for all ranks must return JSON."""


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Name the checkpoint in the error of a full or broken disk."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"'{folder}' could not be written ({error.strerror or error}): free some space there and start again; "
            "the checkpoint before it is whole"
        ) from error


def _sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with a digest of itself."""
    return {**record, "sha256": hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()}


def _damage_of_record(path: Path, fingerprint: str) -> str:
    try:
        record = json.loads((path / RECORD).read_text())
        if record.get("format") != FORMAT:
            return f"'{RECORD}' was written by another version of tracer"
        whole = _sealed({k: v for k, v in record.items() if k != "sha256"}) == record
    except OSError as error:
        return f"'{RECORD}' is missing" if isinstance(error, FileNotFoundError) else f"'{RECORD}': {error}"
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        return f"'{RECORD}' has been changed or cut off"
    return "" if record["fingerprint"] == fingerprint else "it belongs to another run"


def _damage_of_file(path: Path, size: int, digest: str) -> str:
    try:
        now = path.stat().st_size
        if now != size:
            return f"'{path.name}' has {now} bytes instead of {size}"
        return "" if digest_of(path) == digest else f"the content of '{path.name}' has been changed"
    except FileNotFoundError:
        return f"'{path.name}' is missing"
    except OSError as error:
        return f"'{path.name}' cannot be read ({error.strerror or error})"
