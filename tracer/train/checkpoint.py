"""Checkpoints of an unfinished run, from which the same command continues it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
import torch.distributed as dist

from tracer.errors import UserError
from tracer.files import aside, is_marked, remove_tree, sync, whole_file, whole_folder, write_json
from tracer.teacher import MovingAverageTeacher
from tracer.train.ranks import ranks

WHOLE = "checkpoint-*[0-9]"  # matches no checkpoint that is still being written


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in the folder of an unfinished run, or None."""
    return max(folder.glob(WHOLE), key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def belongs(folder: Path, fingerprint: str) -> bool:
    """Return whether ``folder`` holds a checkpoint of the run with this fingerprint."""
    last = newest(folder)
    return last is not None and _read_record(last)["fingerprint"] == fingerprint


class Checkpoints:
    """The checkpoints in the folder of an unfinished run. Only the newest one is kept.

    A checkpoint is a folder: DeepSpeed's files under ``engine``, the moving averages and random generators of
    each rank in ``rank-R.pt``, and ``checkpoint.json`` with the step, the seconds so far, the settings, the
    fingerprint, the number of ranks and the pictures that failed. These are also written to ``skipped.jsonl``
    beside it. All ranks write into the same folder, and read from it.

    Args:
        folder: of the run, with or without a checkpoint of an earlier attempt.
        settings: all settings that decide the result; the error names those that differ.
        fingerprint: digest of these, the data and the versions.
        started: ``time.perf_counter()`` at which this attempt began.

    Attributes:
        step: optimizer steps done in the newest checkpoint; 0 where there is none.
        skipped: the pictures that had failed by then, a dictionary for each.

    Raises:
        UserError: the folder holds an unfinished run with another fingerprint or number of ranks, or a damaged
            checkpoint.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], fingerprint: str, started: float) -> None:
        self._folder = folder
        self._identity = {"fingerprint": fingerprint, "settings": dict(settings), "ranks": ranks().size}
        self._last = newest(folder)
        self.step, self._started = 0, started
        self.skipped: list[dict[str, Any]] = []
        if self._last is None:
            return
        record = _read_record(self._last)
        if record["fingerprint"] != fingerprint:
            before = record["settings"]
            differ = [f"--{n}" for n in {**before, **settings} if before.get(n) != settings.get(n)]
            raise UserError(
                f"'{folder}' holds an unfinished run with other {', '.join(differ) or 'data or versions'}: "
                "give the same to go on with it, choose another --output, or remove that folder"
            )
        if (before := record.get("ranks", 1)) != ranks().size:
            raise UserError(
                f"'{folder}' holds an unfinished run of {before} rank{'s' * (before > 1)}, and this one has "
                f"{ranks().size}: start as many again, choose another --output, or remove that folder"
            )
        self.step, self.skipped = record["step"], record.get("skipped", [])
        self._started -= record["seconds"]

    @property
    def seconds(self) -> float:
        """How long the run has taken, less what an earlier attempt did after its last checkpoint."""
        return time.perf_counter() - self._started

    def resume(self, engine: Any, averages: Mapping[str, MovingAverageTeacher]) -> None:
        """Bring the engine, its averages and the random generators to ``step``.

        Raises:
            UserError: the checkpoint is damaged.
        """
        here = ranks()
        for other in self._folder.glob("checkpoint-*") if here.first else ():
            if other != self._last and is_marked(other):  # older ones, and any that is half written
                remove_tree(other)
        if self._last is not None:
            here.agree(self._compare_checksums)
            here.agree(lambda: self._load(engine, averages))

    def _load(self, engine: Any, averages: Mapping[str, MovingAverageTeacher]) -> None:
        assert self._last is not None  # resume asked
        try:
            whole = all(p.requires_grad for p in engine.module.parameters())
            engine.load_checkpoint(str(self._last), tag="engine", load_module_strict=whole)
            if engine.zero_optimization_stage() == 3:  # whole copies of small weights are still the start's
                engine.empty_partition_cache()
            state = torch.load(self._last / _rank_file(), map_location="cpu", weights_only=True)
            for name, average in averages.items():
                average.load_state_dict(state["averages"][name])
            torch.set_rng_state(state["random"]["cpu"])
            if engine.device.type == "cuda":
                torch.cuda.set_rng_state(state["random"]["cuda"], engine.device)
        except Exception as error:  # zip, pickle, torch and DeepSpeed each raise their own for damaged files
            raise _damaged(self._last, error) from error

    def _compare_checksums(self) -> None:
        """Raise UserError for the first file of torch's whose content has changed; torch does not look.

        The ranks divide the files among them.
        """
        assert self._last is not None  # resume asked
        here = ranks()
        try:
            for file in sorted(self._last.rglob("*.pt"))[here.rank :: here.size]:
                with ZipFile(file) as archive:
                    if (name := archive.testzip()) is not None:
                        raise BadZipFile(f"checksum of {name} in {file.name}")
        except Exception as error:  # zipfile raises several kinds too
            raise _damaged(self._last, error) from error

    def save(
        self,
        step: int,
        engine: Any,
        averages: Mapping[str, MovingAverageTeacher],
        skipped: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Write the checkpoint of ``step``; once it is whole and on the disk, remove the one before.

        ``skipped`` holds the pictures that have failed in the steps so far, on all ranks.

        Raises:
            UserError: it could not be written; the one before is still there.
        """
        folder = self._folder / f"checkpoint-{step}"
        random = {"cpu": torch.get_rng_state()}
        if engine.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(engine.device)
        states = {name: _to_cpu(average.state_dict()) for name, average in averages.items()}
        here = ranks()

        def claim() -> Path:
            return stack.enter_context(whole_folder(folder)) if here.first else aside(folder)

        try:
            with ExitStack() as stack:
                part = here.agree(claim)
                engine.save_checkpoint(
                    str(part), tag="engine", save_latest=False, exclude_frozen_parameters=True
                )
                here.agree(lambda: torch.save({"averages": states, "random": random}, part / _rank_file()))
                if here.first:
                    for script in part.glob("zero_to_*.py"):  # DeepSpeed's own tools, not used here
                        script.unlink()
                    record = self._identity | {
                        "step": step,
                        "seconds": self.seconds,
                        "skipped": list(skipped),
                    }
                    write_json(part / "checkpoint.json", record)
                    sync(part)
            if here.first:
                sync(self._folder)
        except RuntimeError as error:
            if "inline_container" not in str(error):  # torch's writer, which hides the system's error
                raise
            raise UserError(
                f"'{folder}' could not be written: free some space there and start again"
            ) from error
        if self._last is not None and here.first:
            remove_tree(self._last)
        self._last, self.step, self.skipped = folder, step, list(skipped)
        if skipped and here.first:
            with whole_file(self._folder / "skipped.jsonl") as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in skipped))

    def nbytes(self) -> int:
        """Return the size of the newest checkpoint's files in bytes."""
        return sum(p.stat().st_size for p in self._last.rglob("*") if p.is_file()) if self._last else 0


def _read_record(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / "checkpoint.json").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint, error) from error


def _damaged(checkpoint: Path, error: Exception) -> UserError:
    return UserError(
        f"checkpoint '{checkpoint}' cannot be read ({type(error).__name__}: {str(error)[:200]}): "
        f"remove '{checkpoint.parent}' to start anew, or choose another --output"
    )


def _rank_file() -> str:
    return f"rank-{dist.get_rank()}.pt"


def _to_cpu(state: Any) -> Any:
    """Copy the tensors in nested dictionaries to the CPU; torch saves a view together with its whole storage."""
    if isinstance(state, dict):
        return {key: _to_cpu(value) for key, value in state.items()}
    return state.to("cpu", copy=True) if isinstance(state, torch.Tensor) else state
