"""The cases of tests/train/test_runs_on_ranks.py: whole runs on several ranks, against one process."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import alone_runs
import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from spoiled_sets import silent

from tracer.data.batches import TrainingBatches
from tracer.data.decoded import DecodedPictures
from tracer.errors import Refused, Stopped, UserError
from tracer.files import aside
from tracer.losses import TracerLoss
from tracer.models.clip import load_clip
from tracer.models.weights import save_weights
from tracer.train import checkpoint, loop
from tracer.train.checkpoint import newest
from tracer.train.config import Config
from tracer.train.engine import LogitScaleBound, full_weights, start_engine
from tracer.train.log import read_log
from tracer.train.run import finetune

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 30, "heads": 2, "layers": 1},
}  # 30: shards are padded
RESNET = TINY | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}}


def folder() -> Path:
    """Return a folder of all ranks."""
    return Path(tempfile.gettempdir())


@lru_cache(maxsize=1)
def settings() -> Config:
    """Return a run of 20 steps on coloured noise in four classes; the first rank makes data and start."""
    root = folder()
    if dist.get_rank() == 0:
        draw, rows = np.random.default_rng(0), ["image,label,captions"]
        for n in range(40):
            Image.fromarray(draw.integers(0, 255, (36, 40, 3), np.uint8)).save(root / f"{n}.png")
            rows.append(f"{n}.png,{'abcd'[n % 4]},picture {n}|a {'abcd'[n % 4]}")
        (root / "train.csv").write_text("\n".join(rows))
        for name, config in (("tiny", TINY), ("resnet", RESNET)):
            (root / f"{name}.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        save_weights(load_clip(str(root / "tiny.json"), None).model.state_dict(), root / "start.safetensors")
    dist.barrier()
    return Config(
        train_data=root / "train.csv",
        model=str(root / "tiny.json"),
        pretrained=str(root / "start.safetensors"),
        cache=root / "cache",
        steps=20,
        batch_size=12,
        warmup=2,
        lr=1e-4,
        precision="fp32",
        projection_orthogonal=0.01,
        adapter_momentum=0.5,
        heartbeat=120,  # a busy machine that runs tests may be slow
    )


def in_one_process(config: Config) -> Path:
    """Return the folder of the same run in a process without ranks, which the first rank starts once."""
    config = dataclasses.replace(config, output=config.output.with_name(config.output.name + "-alone"))
    in_a_process_of_its_own("go on", [config])
    return config.output


@lru_cache
def baseline(changes: tuple[tuple[str, object], ...]) -> Path:
    name = "-".join(str(value) for _, value in changes)
    return in_one_process(dataclasses.replace(settings(), output=folder() / f"base-{name}", **dict(changes)))


def equals_one_process(name: str, changes: dict[str, object], stage: int, other: dict[str, object]) -> None:
    """Losses, every other scalar and the weights; ``other`` changes how it is computed, and not what."""
    alone = baseline(tuple(changes.items()))
    config = dataclasses.replace(settings(), zero_stage=stage, output=folder() / name, **{**changes, **other})
    run = finetune(config)
    dist.barrier()
    rows, expected = read_log(run), read_log(alone)
    assert len(rows) == len(expected) == config.steps
    for row, want in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert row.keys() == want.keys()
        for key in row.keys() - {"step_seconds", "pair/image_to_text/rank_correlation"}:
            gap = abs(row[key] - want[key])
            assert gap <= 1e-5 + 1e-3 * abs(want[key]), f"step {row['step']}, {key}: {row[key]}, {want[key]}"
    for file in sorted(alone.glob("*.safetensors")):
        got = load_file(run / file.name)
        for key, value in load_file(file).items():
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-4, msg=f"{file.name}, {key}")


def cut_off(config: Config, batches: int) -> None:
    """Interrupt a run on all ranks after so many batches."""
    whole = TrainingBatches.__iter__

    def some(self):
        for n, batch in enumerate(whole(self)):
            if n == batches:
                raise KeyboardInterrupt
            yield batch

    with mock.patch.object(TrainingBatches, "__iter__", some), pytest.raises(KeyboardInterrupt):
        finetune(config)
    dist.barrier()


def cut_and_resumed(name: str, changes: dict[str, object]) -> None:
    """A run that is cut off on all ranks ends bit for bit as one that is not."""
    changes = {"steps": 5, "save_every": 2, "output": folder() / name} | changes
    if changes.get("precision") == "fp16":
        changes["deepspeed"] = folder() / "scale.json"
        changes["deepspeed"].write_text('{"fp16": {"initial_scale_power": 8}}')
    config = dataclasses.replace(settings(), **changes)
    cut_off(config, 3)
    checkpoint = aside(config.output) / "checkpoint-2"
    parts = {f"rank-{rank}.safetensors" for rank in range(dist.get_world_size())}
    assert {p.name for p in checkpoint.glob("rank-*")} == parts
    run = finetune(config)
    other = finetune(dataclasses.replace(config, output=folder() / f"{name}-whole", save_every=500))
    dist.barrier()
    for file in run.glob("*.safetensors"):
        assert file.read_bytes() == (other / file.name).read_bytes(), file.name
    assert [row["loss"] for row in read_log(run)] == [row["loss"] for row in read_log(other)]
    assert not list(run.glob("checkpoint*"))


def damaged_on_one_rank() -> None:
    """A part that is changed, then a part that one rank cannot write: the checkpoint before both is used."""
    changes = {"steps": 4, "save_every": 1, "zero_stage": 2}
    config = dataclasses.replace(settings(), output=folder() / "damaged", **changes)
    cut_off(config, 3)
    part = aside(config.output) / "checkpoint-3/rank-1.safetensors"
    if dist.get_rank() == 0:
        turned = bytearray(part.read_bytes())
        turned[-1] ^= 255
        part.write_bytes(turned)
    dist.barrier()
    full = OSError(errno.ENOSPC, "No space left on device")
    disk = mock.patch.object(checkpoint, "write_part", side_effect=full) if dist.get_rank() else nullcontext()
    said = pytest.warns(UserWarning, match="'rank-1.safetensors' has been changed; the checkpoint before")
    with disk, nullcontext() if dist.get_rank() else said, pytest.raises(UserError) as e:
        finetune(config)
    dist.barrier()
    says = "checkpoint-3' could not be written (No space left on device): free some space there"
    assert says in str(e.value) if dist.get_rank() else isinstance(e.value, Refused)
    assert [path.name for path in aside(config.output).glob("checkpoint-*")] == ["checkpoint-2"]
    dist.barrier()
    run = finetune(config)
    whole = finetune(dataclasses.replace(config, output=folder() / "undamaged", save_every=500))
    dist.barrier()
    for file in run.glob("*.safetensors"):
        assert file.read_bytes() == (whole / file.name).read_bytes(), file.name


def signalled_within_a_step() -> None:
    """One rank alone has the signal, between micro-batches; all stop at one point, and go on from there."""
    config = dataclasses.replace(settings(), output=folder() / "within", zero_stage=2, micro_batch=4)
    forward, calls = TracerLoss.forward, iter(range(10**6))

    def signalled(*args: Any, **options: Any) -> Any:
        if next(calls) == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **options)

    with mock.patch.object(TracerLoss, "forward", signalled), pytest.raises(Stopped) as e:
        finetune(config)
    assert e.value.code == 0
    dist.barrier()
    assert newest(aside(config.output)) is not None
    dist.barrier()
    run = finetune(config)
    whole = finetune(dataclasses.replace(config, output=folder() / "not-signalled"))
    dist.barrier()
    for file in run.glob("*.safetensors"):
        assert file.read_bytes() == (whole / file.name).read_bytes(), file.name


def signalled_within_an_evaluation() -> None:
    """The first rank scores while another has the signal: it leaves off, and all stop. The next attempt scores."""
    sets = {"eval_data": {"test": folder() / "train.csv"}, "eval_every": 1}
    changes = {"steps": 2, "warmup": 0, "zero_stage": 2, **sets}
    config = dataclasses.replace(settings(), output=folder() / "evaluation", **changes)
    whole, begun, mark = DecodedPictures.batches, [], folder() / "evaluates"
    gathered = loop.gathered

    def slow(*args: Any, **options: Any) -> Iterator[Any]:
        for batch in whole(*args, **options):
            begun.append(1)
            mark.touch()
            time.sleep(3)  # several looks of the watch
            yield batch

    def signalled(*args: Any) -> Any:
        weights = gathered(*args)
        if dist.get_rank():
            while not mark.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
        return weights

    with (
        mock.patch("tracer.evaluation.zero_shot.PICTURES_AT_ONCE", 8),
        mock.patch.object(DecodedPictures, "batches", slow),
        mock.patch.object(loop, "gathered", signalled),
        pytest.raises(Stopped) as e,
    ):
        finetune(config)
    assert e.value.code == 0
    assert "stopped after step 1 of 2, which is saved" in str(e.value)
    assert len(begun) <= 1
    dist.barrier()
    assert newest(aside(config.output)).name == "checkpoint-1"
    dist.barrier()
    run = finetune(config)
    dist.barrier()
    assert all("eval/student/test/accuracy" in row for row in read_log(run))


def signalled_after_the_last_point() -> None:
    """All ranks stop, though one alone has heard of it; without that the others would wait for it for ever."""
    config = dataclasses.replace(settings(), output=folder() / "signalled", steps=2, warmup=0)
    requests = loop.stop_requests

    @contextmanager
    def late(quiet: bool, rank: int, size: int) -> Iterator[Any]:
        with requests(quiet, rank, size) as request:
            yield request
        request.signal = signal.SIGTERM if rank else None

    with mock.patch.object(loop, "stop_requests", late), pytest.raises(Stopped) as e:
        finetune(config)
    assert e.value.code == 0
    assert "stopped after step 2 of 2, which is saved" in str(e.value)
    dist.barrier()
    run = finetune(config)
    dist.barrier()
    assert len(read_log(run)) == 2


def in_a_process_of_its_own(part: str, configs: list[Config]) -> None:
    """Cut runs off ("cut") or end them ("go on") in one process without ranks.

    It is forked from a server of its own.
    """
    if dist.get_rank() == 0:
        files = []
        for config in configs:
            files.append(folder() / f"{config.output.name}.yaml")
            files[-1].write_text(config.to_yaml())
        output = folder() / "alone.log"
        run = forked.context().Process(target=alone_runs.main, args=(part, files, output))
        run.start()
        run.join()
        assert run.exitcode == 0, output.read_text()
    dist.barrier()


def on_other_numbers_of_ranks() -> None:
    """A run begun on two ranks ends on one, or the other way round, as the unbroken run on two does."""
    changes = {"steps": 4, "save_every": 2}
    methods = ((0, {}), (1, {}), (2, {"adapters": True}), (3, {}))
    runs = [
        dataclasses.replace(settings(), zero_stage=z, output=folder() / f"other-{z}", **changes, **method)
        for z, method in methods
    ]
    for config in runs[::2]:
        cut_off(config, 3)
    in_a_process_of_its_own("go on", runs[::2])
    in_a_process_of_its_own("cut", runs[1::2])
    for config in runs[1::2]:
        finetune(config)
    for config in runs:
        whole = finetune(dataclasses.replace(config, output=folder() / f"unbroken-{config.zero_stage}"))
        dist.barrier()
        assert [row["step"] for row in read_log(config.output)] == [1, 2, 3, 4]
        for file in sorted(whole.glob("*.safetensors")):
            got = load_file(config.output / file.name)
            for key, value in load_file(file).items():
                gap = (got[key].double() - value.double()).norm() / value.double().norm().clamp(min=1)
                assert float(gap) < 1e-6, f"stage {config.zero_stage}, {file.name}, {key}: {float(gap)}"


def spoiled_on_other_numbers_of_ranks() -> None:
    """A run with pictures that cannot be decoded begins on one rank, goes on on two, and ends on one."""
    table, made = folder() / "spoiled/train.csv", settings()
    if dist.get_rank() == 0:
        table.parent.mkdir()
        for path in (made.train_data, *folder().glob("*.png")):
            shutil.copy(path, table.parent)
        for n in (5, 23, 38):
            path = table.parent / f"{n}.png"
            path.write_bytes(silent(path.read_bytes()))
    dist.barrier()
    changes = {"steps": 8, "save_every": 2, "train_data": table, "max_bad": 0.1, "zero_stage": 1}
    config = dataclasses.replace(made, output=folder() / "spoiled-run", **changes)
    in_a_process_of_its_own("cut", [config])
    cut_off(config, 3)
    whole = folder() / "spoiled-whole"
    in_a_process_of_its_own("go on", [config, dataclasses.replace(config, output=whole)])
    assert (config.output / "skipped.jsonl").read_text() == (whole / "skipped.jsonl").read_text()
    assert len((whole / "skipped.jsonl").read_text().splitlines()) == 3
    for key, value in load_file(whole / "student.safetensors").items():
        got = load_file(config.output / "student.safetensors")[key]
        gap = (got.double() - value.double()).norm() / value.double().norm().clamp(min=1)
        assert float(gap) < 1e-6, f"{key}: {float(gap)}"


def masters(precision: str, stage: int) -> None:
    """The float32 weights start unrounded, and the logit scale is bounded, in shards with padding too."""
    clip = load_clip(settings().model, settings().pretrained)
    clip.model.logit_scale.data.fill_(4.7)
    start = {n: v.clone() for n, v in clip.model.state_dict().items()}
    engine = start_engine(dataclasses.replace(settings(), precision=precision, zero_stage=stage), clip.model)
    assert all(torch.equal(value, start[name]) for name, value in full_weights(engine).items())
    LogitScaleBound(engine)()
    after = full_weights(engine)
    assert float(after.pop("logit_scale")) == pytest.approx(math.log(100), abs=1e-6)
    assert all(torch.equal(value, start[name]) for name, value in after.items())
    engine.destroy()


def refused() -> None:
    """What all ranks refuse together, and leave nothing behind."""
    size = dist.get_world_size()
    config = dataclasses.replace(settings(), output=folder() / "refused")
    with pytest.raises(UserError, match="equally: give"):
        finetune(dataclasses.replace(config, batch_size=12 * size + 1))
    with pytest.raises(UserError, match="--mesh 3x2 has 6 places, and the run has 2 ranks: give two numbers"):
        finetune(dataclasses.replace(config, mesh="3x2"))
    resnet = {"model": str(folder() / "resnet.json"), "pretrained": None, "projection_orthogonal": 0.0}
    with pytest.raises(
        UserError, match=r"BatchNorm \('visual.bn1'\) would see the pictures of one rank alone"
    ):
        finetune(dataclasses.replace(config, **resnet))
    assert finetune(dataclasses.replace(config, **resnet, lock_batchnorm=True, steps=2, warmup=0))


def disagreeing() -> None:
    """A rank with other settings is named before anything is trained, and later the pairs that are not finite."""
    here = dist.get_rank()
    config = dataclasses.replace(settings(), output=folder() / "disagreeing", lr=1e-4 * (1 + here))
    with pytest.raises(UserError) as e:
        finetune(config)
    says = (
        r"rank 1 on host \S+ differs from rank 0 in --lr \(on rank 0 0.0001, here 0.0002\): start all ranks"
    )
    assert isinstance(e.value, Refused) if here == 0 else re.match(says, str(e.value))
    dist.barrier()
    assert not aside(config.output).exists()
    bad = "7.png"  # in the first batch of some rank
    original = TrainingBatches.__iter__

    def spoiled(self):
        for batch in original(self):
            numbers = batch.index.tolist()
            rows = [n for n, i in enumerate(numbers) if self._index.id(i).endswith(f"/{bad}")]
            batch.image[rows] = math.nan
            yield batch

    config = dataclasses.replace(config, lr=1e-4, batch_size=40, max_skipped=2, steps=4)
    with mock.patch.object(TrainingBatches, "__iter__", spoiled), pytest.raises(UserError) as e:
        finetune(config)
    says = rf".*in 2 steps in a row; .* step 2, batch 2 with '.*/{bad}', whose features are not finite: lower"
    assert isinstance(e.value, Refused) or re.match(says, str(e.value)), e.value


TRACER: dict[str, object] = {}
ADAPTERS: dict[str, object] = {"method": "r-adapter", "adapter_drop": 0.5, "lr": 1e-3}
CLASSIFIER: dict[str, object] = {"method": "flyp", "classifier": "whole", "lr": 1e-3}
FROZEN: dict[str, object] = {"freeze": "image", "accumulation": 2, "steps": 6}


def cases(world_size: int) -> dict[str, Callable[[], None]]:
    """Return the cases of a world: name → function that raises where something is wrong."""
    table: dict[str, Callable[[], None]] = {}
    for stage in range(4) if world_size == 2 else (2,):
        table[f"tracer-stage{stage}"] = partial(equals_one_process, f"tracer{stage}", TRACER, stage, {})
    if world_size > 2:
        return table | {
            "masters-stage3-bf16": partial(masters, "bf16", 3),
            "masters-stage1": partial(masters, "bf16", 1),
        }
    table["adapters-stage3"] = partial(equals_one_process, "adapters3", ADAPTERS, 3, {})
    for stage in range(4):  # 6 pairs a rank in micro-batches of 3, against one process in one shot
        how = partial(equals_one_process, f"micro{stage}", ADAPTERS, stage, {"micro_batch": 4})
        table[f"adapters-in-micro-batches-stage{stage}"] = how
    for mesh in ("1x2", "ring"):
        how = partial(equals_one_process, f"micro-{mesh}", TRACER, 2, {"micro_batch": 4, "mesh": mesh})
        table[f"tracer-in-micro-batches-{mesh}"] = how
    again = {"grad_checkpointing": True}
    table["adapters-again"] = partial(equals_one_process, "adapters-again", ADAPTERS, 1, again)
    table["classifier"] = partial(equals_one_process, "classifier", CLASSIFIER, 2, {"micro_batch": 4})
    table["frozen-accumulated"] = partial(equals_one_process, "frozen", FROZEN, 2, {})
    for name, changes in {
        "stage1": {"zero_stage": 1},
        "stage3": {"zero_stage": 3},
        "stage2-fp16": {"zero_stage": 2, "precision": "fp16"},
        "stage0-adapters": {"zero_stage": 0, **ADAPTERS},
    }.items():
        table[f"resumed-{name}"] = partial(cut_and_resumed, f"resumed-{name}", changes)
    for precision, stage in (("fp32", 0), ("fp32", 1), ("bf16", 1), ("bf16", 2), ("fp16", 2), ("bf16", 3)):
        table[f"masters-{precision}-stage{stage}"] = partial(masters, precision, stage)
    table |= {"other-numbers-of-ranks": on_other_numbers_of_ranks, "disagreeing": disagreeing}
    table["spoiled-on-other-numbers-of-ranks"] = spoiled_on_other_numbers_of_ranks
    table |= {"damaged-on-one-rank": damaged_on_one_rank, "signalled-within-a-step": signalled_within_a_step}
    table |= {"signalled-late": signalled_after_the_last_point}
    table |= {"signalled-within-an-evaluation": signalled_within_an_evaluation}
    return table | {"refused": refused}
