"""The cases of tests/test_zero.py: what each rank runs on the teacher of a DeepSpeed engine.

:func:`cases` names them. Every case is a function without arguments that raises where something is wrong; all
ranks run the same cases in the same order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from zero_run import (
    LOCAL_BATCH,
    Collectives,
    assert_same,
    batch,
    engine,
    loss_of,
    masters,
    net,
    single_process,
    train_step,
)

from tracer._zero_masters import OPTIMIZER_ATTRIBUTES, PARAMETER_ATTRIBUTES
from tracer.teacher import WMA, MovingAverageTeacher, Uniform, build_teacher

STAGES = (0, 1, 2, 3)

# Otherwise compiled at the first start, for a minute; only inference uses it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


# ----------------------------------------------------------------------------------------------------------
# A run of many steps, and what is examined of it
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """An engine and its teacher after a run."""

    engine: Any
    teacher: MovingAverageTeacher
    steps: int
    want: dict[str, Tensor]  # the average by definition, of the trained parameters
    update_collectives: list[str]
    gathered: dict[str, Tensor]
    gather_collectives: list[str]


@lru_cache(maxsize=1)
def trained(stage, dtype):
    # Gathering the masters at each step is what costs: fewer steps where four ranks share two cores.
    steps = 12 if dtype == "bf16" and dist.get_world_size() == 4 else 50
    run, schedule = engine(stage, dtype), WMA(steps)
    teacher = build_teacher(run, schedule)
    want = masters(run) if dtype == "bf16" else {}
    update = Collectives()
    for step in range(1, steps + 1):
        train_step(run, step)
        with update:
            assert teacher.update(step)
        if dtype == "bf16":
            now = masters(run)
            for name, value in want.items():
                value += schedule.weight(step) * (now[name] - value)
    with Collectives() as gather:
        gathered = teacher.gather()
    if dtype == "fp32":
        reference = single_process(schedule, steps)
        want = {n: reference[n] for n, p in net().named_parameters() if p.requires_grad}
    return Trained(run, teacher, steps, want, update.seen, gathered, gather.seen)


def average_is_exact(stage, dtype):
    """Equal to the single process (fp32), or to the definition on the run's own masters (bf16)."""
    run = trained(stage, dtype)
    assert_same(run.gathered, run.want, 1e-6, "the average")
    moved = run.gathered["first.weight"] - net().first.weight.detach()
    assert float(moved.abs().max()) > 1e-2, "the test trains nothing"


def update_communicates_nothing(stage, dtype):
    run = trained(stage, dtype)
    assert not run.update_collectives, f"the update communicates: {run.update_collectives}"
    sharded = stage > 0 and dist.get_world_size() > 1
    assert bool(run.gather_collectives) == sharded, "collectives are not seen here"


def gather_is_a_checkpoint(stage, dtype):
    """Keys as the student's, ties kept, frozen parameters the student's, buffers followed."""
    got = trained(stage, dtype).gathered
    assert list(got) == list(net().state_dict())
    assert torch.equal(got["tied.weight"], got["middle.weight"])
    frozen = net().frozen.weight.detach()
    assert torch.equal(got["frozen.weight"], frozen.to(torch.bfloat16).float() if dtype == "bf16" else frozen)
    assert got["centre.steps"] == trained(stage, dtype).steps


def encode_runs_the_average(stage, dtype):
    """What the teacher computes with is the average, rounded to its dtype."""
    run = trained(stage, dtype)
    plain = net().eval()
    plain.load_state_dict(run.gathered)
    low = next(run.engine.module.parameters()).dtype
    x = batch(0)[:LOCAL_BATCH]
    out = run.teacher.encode(x)
    assert out.dtype == low
    assert not out.requires_grad
    with torch.no_grad():
        for p in plain.parameters():
            p.data = p.data.to(low)
        torch.testing.assert_close(out, plain(x.to(low)), rtol=1e-6, atol=1e-6)
    assert torch.equal(run.teacher.module(x.to(low)), out), "the module is not what encode runs"


def memory_is_divided_by_the_ranks(stage, dtype):
    """4 bytes per trained parameter, divided by the ranks; padding of the shards apart."""
    averages = trained(stage, dtype).teacher.state_dict()["averages"]
    held = sum(t.numel() for key, t in averages.items() if not key.startswith("centre."))
    numel = sum(p.numel() for p in net().parameters() if p.requires_grad)
    shards = 1 if stage == 0 else dist.get_world_size()
    assert numel / shards <= held <= numel / shards + 20, f"{held} held of {numel} in {shards} shards"


EXAMINATIONS = (
    average_is_exact,
    update_communicates_nothing,
    gather_is_a_checkpoint,
    encode_runs_the_average,
    memory_is_divided_by_the_ranks,
)


# ----------------------------------------------------------------------------------------------------------
# Resuming, and steps that are not taken
# ----------------------------------------------------------------------------------------------------------


def _steps(run, teacher, first, last):
    for step in range(first, last + 1):
        teacher.encode(batch(step)[:LOCAL_BATCH])
        train_step(run, step)
        teacher.update(step)


def resume_is_bit_identical(stage, dtype):
    """Saved after 5 steps and resumed: bit for bit the run that went on."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    file = Path(folder[0]) / f"teacher-{dist.get_rank()}.pt"
    run = engine(stage, dtype)
    teacher = build_teacher(run, WMA(10))
    _steps(run, teacher, 1, 5)
    run.save_checkpoint(folder[0], tag="five")
    torch.save(teacher.state_dict(), file)
    x = batch(3)[:LOCAL_BATCH]
    saved = teacher.encode(x)
    _steps(run, teacher, 6, 10)
    dist.barrier()

    again = engine(stage, dtype)
    resumed = build_teacher(again, WMA(10))
    train_step(again, 77)  # whatever it held before
    again.load_checkpoint(folder[0], tag="five")
    state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.encode(x), saved), "after the resume, stale until the next update"
    _steps(again, resumed, 6, 10)
    want, got = teacher.gather(), resumed.gather()
    for name in want:
        assert torch.equal(got[name], want[name]), f"{name} differs after the resume"
    assert torch.equal(teacher.encode(x), resumed.encode(x))

    with pytest.raises(ValueError, match="rank 0 of 64"):
        resumed.load_state_dict(state | {"shard": "ZeRO stage 1, rank 0 of 64"})


def accumulation_moves_once_per_optimizer_step(stage):
    run = engine(stage, "bf16", accumulation=2)
    teacher = build_teacher(run, Uniform())
    moved = []
    for micro in range(1, 7):
        train_step(run, micro)
        moved.append(teacher.update((micro + 1) // 2))
    assert moved == [False, True] * 3


def overflow_does_not_move(stage):
    # No CPU of ours multiplies float16 natively; torch does it all the same, slowly.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    run = engine(stage, "fp16", fp16={"initial_scale_power": 4, "hysteresis": 1})
    teacher = build_teacher(run, Uniform())
    train_step(run, 1)
    assert teacher.update(1)
    before = {k: v.clone() for k, v in teacher.gather().items()}
    train_step(run, 2, scale=float("inf"))
    assert run.skipped_steps == 1
    assert not teacher.update(2)
    after = teacher.gather()
    assert all(torch.equal(after[k], v) for k, v in before.items()), "moved after an overflow"
    train_step(run, 3)
    assert teacher.update(2)


# ----------------------------------------------------------------------------------------------------------
# Dtypes and modes
# ----------------------------------------------------------------------------------------------------------


def average_of_a_mode(stage, dtype, teacher_dtype=None, **sections):
    """The uniform mean of the masters, and what is computed with it, in another mode of DeepSpeed or dtype."""
    run = engine(stage, dtype, **sections)
    teacher = build_teacher(run, Uniform(), dtype=teacher_dtype)
    want = masters(run)
    for step in (1, 2, 3):
        train_step(run, step)
        teacher.update(step)
        now = masters(run)
        for name, value in want.items():
            value += (now[name] - value) / (step + 1)
    got = teacher.gather()
    assert_same(got, want, 1e-6, "the average")
    low = teacher_dtype or next(run.module.parameters()).dtype
    out = teacher.encode(batch(0)[:LOCAL_BATCH])
    assert out.dtype == low
    plain = net().eval()
    plain.load_state_dict(got)
    with torch.no_grad():
        exact = plain(batch(0)[:LOCAL_BATCH])
    tolerance = 1e-2 if dtype == "bf16" or low is torch.bfloat16 else 1e-6
    torch.testing.assert_close(out.float(), exact, rtol=tolerance, atol=tolerance)


def starts_at_the_masters(stage):
    """A teacher built in the midst of a bf16 run starts at the masters, not at the rounded parameters."""
    run = engine(stage, "bf16")
    for step in (1, 2):
        train_step(run, step)
    teacher = build_teacher(run, Uniform(), dtype=torch.float32)
    want = masters(run)
    assert_same(teacher.gather(), want, 0.0, "the start")
    rounded = {n: p.bfloat16().double() for n, p in want.items()}
    assert any(not torch.equal(want[n], rounded[n]) for n in want), "the masters have not left bf16's grid"


def ddp_is_unwrapped():
    """The teacher of a module in DistributedDataParallel has the module's own keys."""
    model = nn.parallel.DistributedDataParallel(net())
    teacher = build_teacher(model, Uniform())
    x = batch(1)[:LOCAL_BATCH]
    loss_of(model, x).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert teacher.update(1)
    assert list(teacher.gather()) == list(net().state_dict())
    torch.testing.assert_close(teacher.gather()["position"], net().position.detach() + 0.5)
    assert teacher.encode(x).shape == (LOCAL_BATCH, 3)


def modes():
    """Return name -> case, of the dtypes and modes of DeepSpeed besides the usual ones."""
    table: dict[str, Callable[[], None]] = {}
    for stage in (0, 1, 3):
        table[f"stage{stage}-fp32-bf16_teacher"] = partial(average_of_a_mode, stage, "fp32", torch.bfloat16)
    for stage in (0, 2, 3):
        table[f"stage{stage}-bf16-fp32_teacher"] = partial(average_of_a_mode, stage, "bf16", torch.float32)
    accumulate_fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
    table["stage1-bf16-fp32_accumulation"] = partial(average_of_a_mode, 1, "bf16", **accumulate_fp32)
    for stage in (2, 3):
        offload = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
        table[f"stage{stage}-bf16-masters_on_cpu"] = partial(
            average_of_a_mode, stage, "bf16", zero_optimization=offload
        )
    robin = {"stage": 2, "round_robin_gradients": True}
    table["stage2-fp32-round_robin_gradients"] = partial(
        average_of_a_mode, 2, "fp32", zero_optimization=robin
    )
    for stage in (1, 2, 3):
        table[f"stage{stage}-bf16-starts_at_the_masters"] = partial(starts_at_the_masters, stage)
    table["module-fp32-ddp_is_unwrapped"] = ddp_is_unwrapped
    return table


# ----------------------------------------------------------------------------------------------------------
# Refusals
# ----------------------------------------------------------------------------------------------------------

KINDS = {0: "FP16_UnfusedOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}


@lru_cache(maxsize=1)
def examined(stage):
    return engine(stage, "bf16")


def refused(run, error_type, *parts, **kwargs):
    with pytest.raises(error_type) as error:
        build_teacher(run, Uniform(), **kwargs)
    assert all(part in str(error.value) for part in parts), f"{error.value} lacks one of {parts}"


def missing_attribute_is_named(stage, name):
    """A DeepSpeed without an attribute that the teacher reads is refused, and the attribute named."""
    run = examined(stage)
    owner = run.module.first.weight if name in PARAMETER_ATTRIBUTES else run.optimizer
    kept = owner.__dict__.pop(name)
    try:
        kind = () if name in PARAMETER_ATTRIBUTES else (KINDS[stage],)
        refused(run, RuntimeError, deepspeed.__version__, *kind, repr(name), "deepspeed==0.19.8")
    finally:
        setattr(owner, name, kept)


def low_precision_masters_are_refused():
    groups = examined(2).optimizer.single_partition_of_fp32_groups
    kept = groups[0]
    try:
        groups[0] = kept.bfloat16()
        refused(examined(2), ValueError, "group 0 are torch.bfloat16")
    finally:
        groups[0] = kept


def swapped_masters_are_refused():
    groups = examined(2).optimizer.single_partition_of_fp32_groups
    kept = groups[0]
    try:
        groups[0] = kept[:0]
        refused(examined(2), ValueError, "group 0 are swapped out")
    finally:
        groups[0] = kept


def unknown_optimizer_is_refused():
    run = examined(2)
    run.optimizer, kept = object(), run.optimizer
    try:
        refused(run, ValueError, "can't read the master weights of a object")
    finally:
        run.optimizer = kept


def own_stream_is_refused():
    refused(examined(3), ValueError, "own_stream isn't offered at ZeRO stage 3", own_stream=True)


def restored_engine_is_taken(stage):
    """After the refusals the engine is whole again: they were about what was taken away."""
    build_teacher(examined(stage), Uniform())


def refusals():
    """Return name -> case, of the engines that the teacher cannot follow."""
    table: dict[str, Callable[[], None]] = {}
    for stage, kind in KINDS.items():
        names = OPTIMIZER_ATTRIBUTES[kind] + (PARAMETER_ATTRIBUTES if stage == 3 else ())
        for name in names:
            table[f"stage{stage}-bf16-refused_without_{name}"] = partial(
                missing_attribute_is_named, stage, name
            )
        if stage == 2:
            for check in (
                low_precision_masters_are_refused,
                swapped_masters_are_refused,
                unknown_optimizer_is_refused,
            ):
                table[f"stage2-bf16-{check.__name__}"] = check
        if stage == 3:
            table["stage3-bf16-own_stream_is_refused"] = own_stream_is_refused
        table[f"stage{stage}-bf16-restored_engine_is_taken"] = partial(restored_engine_is_taken, stage)
    return table


def cases(world_size: int) -> dict[str, Callable[[], None]]:
    """Return name -> case for a world of 1, 2 or 4 ranks.

    1 rank: against the single process, and refusals. 2 ranks: also resuming, steps that are not taken, dtypes
    and modes. 4 ranks: shards that are padded unevenly.
    """
    table: dict[str, Callable[[], None]] = {}
    for stage in STAGES:
        for dtype in ("fp32", "bf16"):
            for examine in EXAMINATIONS:
                table[f"stage{stage}-{dtype}-{examine.__name__}"] = partial(examine, stage, dtype)
            if world_size == 2:
                resume = partial(resume_is_bit_identical, stage, dtype)
                table[f"stage{stage}-{dtype}-resume_is_bit_identical"] = resume
        if world_size == 2:
            accumulate = partial(accumulation_moves_once_per_optimizer_step, stage)
            table[f"stage{stage}-bf16-accumulation_moves_once_per_optimizer_step"] = accumulate
            table[f"stage{stage}-fp16-overflow_does_not_move"] = partial(overflow_does_not_move, stage)
    if world_size == 2:
        table |= modes()
    if world_size == 1:
        table |= refusals()
    return table
