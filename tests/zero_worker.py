"""What each rank of tests/test_zero.py runs: the teacher of a DeepSpeed engine, many checks in one process group.

Not collected by itself. Every check is an assertion here; a failing rank fails its test with its traceback.
"""

from __future__ import annotations

import os
import warnings
from itertools import chain
from pathlib import Path

import deepspeed
import pytest
import torch
import torch._dynamo  # these two would be imported by each rank, at its first engine
import torch._inductor.compile_fx
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tracer.schedules import WMA, Uniform
from tracer.teacher import MovingAverageTeacher, build_teacher

# Otherwise compiled at the first start, for a minute; only inference uses it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

LOCAL_BATCH = 4


class Centre(nn.Module):
    """Subtracts a running value: a float buffer and an integer one that training moves.

    By a rule without data, so that the statistics of all ranks agree with the single process.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(torch.ones(5), 0.01)
                self.steps += 1
        return x - self.mean.to(x.dtype)


class Net(nn.Module):
    """Tied, frozen and top-level parameters; no size is a multiple of 4, so every shard is padded."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.centre = Centre()
        self.middle = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.middle.weight
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.position = nn.Parameter(torch.randn(5))
        self.register_buffer("mask", torch.full((5,), -torch.inf), persistent=False)

    def forward(self, x):
        x = self.centre(self.first(x) + self.position)
        return self.frozen(self.tied(torch.tanh(self.middle(x))))


def net():
    torch.manual_seed(0)
    return Net()


def adamw(model):
    matrices = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    vectors = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    # eps keeps AdamW from turning the last bit of a tiny gradient into a whole step.
    return torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2, eps=1e-3
    )


def engine(stage, dtype, accumulation=1, **sections):
    model = net()
    config = {
        "train_micro_batch_size_per_gpu": LOCAL_BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # the default clips at 1
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        **sections,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True} | config.get(dtype, {})
    return deepspeed.initialize(model=model, optimizer=adamw(model), config=config, dist_init_required=False)[
        0
    ]


def batch(step):
    """The whole batch of a step; each rank takes its rows."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(LOCAL_BATCH * dist.get_world_size(), 7, generator=generator)


def loss_of(model, x):
    return ((model(x) - 1) ** 2).float().mean()


def train_step(run, step, scale=1.0):
    rows = slice(dist.get_rank() * LOCAL_BATCH, (dist.get_rank() + 1) * LOCAL_BATCH)
    x = batch(step)[rows].to(next(run.module.parameters()).dtype)
    run.backward(loss_of(run, x) * scale)
    run.step()


def masters(run):
    """The whole float32 parameters, by ways that the teacher doesn't use."""
    trained = {n: p for n, p in run.module.named_parameters() if p.requires_grad}
    stage = run.zero_optimization_stage()
    if stage < 3 and next(iter(trained.values())).dtype is torch.float32:
        # The parameters themselves. Not safe_get_full_fp32_param: with round_robin_gradients it gives some
        # parameters another one's values (DeepSpeed 0.19.8).
        return {n: p.detach().double() for n, p in trained.items()}
    if stage > 0:
        return {n: safe_get_full_fp32_param(p).double() for n, p in trained.items()}
    pairs = zip(chain(*run.optimizer.fp16_groups), chain(*run.optimizer.fp32_groups), strict=True)
    found = {id(low): high for low, high in pairs}
    return {n: found[id(p)].detach().double() for n, p in trained.items()}


class Collectives(TorchDispatchMode):
    """Names of the collectives issued inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def assert_same(got, want, tolerance, what):
    for name, value in want.items():
        gap = float((got[name].double() - value.double()).abs().max())
        assert gap <= tolerance, f"{what}: {name} differs by {gap:.2e}"


def single_process(schedule, steps):
    """The same run in one process on the whole batch, without DeepSpeed."""
    model = net()
    optimizer = adamw(model)
    teacher = MovingAverageTeacher(model, schedule)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()
        teacher.update(step)
    return teacher.gather()


def check_average(stage, dtype, reference):
    """Equal to the single process (fp32), or to the definition on the run's own masters (bf16)."""
    # Gathering the masters at each step is what costs: fewer steps where four ranks share two cores.
    steps = 12 if dtype == "bf16" and dist.get_world_size() == 4 else 50
    run, schedule = engine(stage, dtype), WMA(steps)
    teacher = build_teacher(run, schedule)
    want = masters(run) if dtype == "bf16" else reference
    for step in range(1, steps + 1):
        train_step(run, step)
        with Collectives() as collectives:
            assert teacher.update(step)
        assert not collectives.seen, f"the update communicates: {collectives.seen}"
        if dtype == "bf16":
            now = masters(run)
            for name, value in want.items():
                value += schedule.weight(step) * (now[name] - value)
    with Collectives() as collectives:
        got = teacher.gather()
    assert bool(collectives.seen) == (stage > 0 and dist.get_world_size() > 1), (
        "collectives are not seen here"
    )
    trained = {n for n, p in net().named_parameters() if p.requires_grad}
    assert_same(got, {n: want[n] for n in trained}, 1e-6, "the average")
    assert list(got) == list(net().state_dict())
    assert torch.equal(got["tied.weight"], got["middle.weight"])
    frozen = net().frozen.weight.detach()
    assert torch.equal(got["frozen.weight"], frozen.to(torch.bfloat16).float() if dtype == "bf16" else frozen)
    assert got["centre.steps"] == steps
    assert float((got["first.weight"] - net().first.weight).abs().max()) > 1e-2, "the test trains nothing"

    # What the teacher computes with is the average, rounded to its dtype.
    plain = net().eval()
    plain.load_state_dict(got)
    low = next(run.module.parameters()).dtype
    x = batch(0)[:LOCAL_BATCH]
    out = teacher.encode(x)
    assert out.dtype == low
    assert not out.requires_grad
    with torch.no_grad():
        for p in plain.parameters():
            p.data = p.data.to(low)
        torch.testing.assert_close(out, plain(x.to(low)), rtol=1e-6, atol=1e-6)
    assert torch.equal(teacher.module(x.to(low)), out), "the module is not what encode runs"

    # 4 bytes per trained parameter, divided by the ranks; padding of the shards apart.
    held = sum(t.numel() for key, t in teacher._averages.items() if not key.startswith("centre."))
    numel = sum(p.numel() for p in net().parameters() if p.requires_grad)
    shards = 1 if stage == 0 else dist.get_world_size()
    assert numel / shards <= held <= numel / shards + 20, (
        f"{held} averages held of {numel} in {shards} shards"
    )


def check_resume(stage, dtype, folder):
    """Saved after 5 steps and resumed: bit for bit the run that went on."""

    def steps(run, teacher, first, last):
        for step in range(first, last + 1):
            teacher.encode(batch(step)[:LOCAL_BATCH])
            train_step(run, step)
            teacher.update(step)

    folder = Path(folder) / f"stage{stage}-{dtype}"
    run = engine(stage, dtype)
    teacher = build_teacher(run, WMA(10))
    steps(run, teacher, 1, 5)
    run.save_checkpoint(str(folder), tag="five")
    torch.save(teacher.state_dict(), folder / f"teacher-{dist.get_rank()}.pt")
    x = batch(3)[:LOCAL_BATCH]
    saved = teacher.encode(x)
    steps(run, teacher, 6, 10)
    dist.barrier()

    again = engine(stage, dtype)
    resumed = build_teacher(again, WMA(10))
    train_step(again, 77)  # whatever it held before
    again.load_checkpoint(str(folder), tag="five")
    state = torch.load(folder / f"teacher-{dist.get_rank()}.pt", weights_only=True)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.encode(x), saved), "after the resume, stale until the next update"
    steps(again, resumed, 6, 10)
    mine, theirs = teacher.gather(), resumed.gather()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), f"{name} differs after the resume"
    assert torch.equal(teacher.encode(x), resumed.encode(x))

    with pytest.raises(ValueError, match="rank 0 of 64"):
        resumed.load_state_dict(state | {"shard": "ZeRO stage 1, rank 0 of 64"})


def check_steps_not_taken(stage):
    """Gradient accumulation: once per optimizer step. Overflow (float16): not at all."""
    run = engine(stage, "bf16", accumulation=2)
    teacher = build_teacher(run, Uniform())
    moved = []
    for micro in range(1, 7):
        train_step(run, micro)
        moved.append(teacher.update((micro + 1) // 2))
    assert moved == [False, True] * 3

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


def check_dtypes_and_modes():
    """A low-precision teacher of a float32 run and the reverse; accumulation in float32; offloaded masters."""
    cases = [(stage, "fp32", torch.bfloat16, {}) for stage in (0, 1, 3)] + [
        (stage, "bf16", torch.float32, {}) for stage in (0, 2, 3)
    ]
    cases.append((1, "bf16", None, {"data_types": {"grad_accum_dtype": "fp32"}}))
    offload = {"offload_optimizer": {"device": "cpu"}}
    cases += [(stage, "bf16", None, {"zero_optimization": {"stage": stage} | offload}) for stage in (2, 3)]
    cases.append((2, "fp32", None, {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}))
    for stage, dtype, teacher_dtype, sections in cases:
        run = engine(stage, dtype, **sections)
        teacher = build_teacher(run, Uniform(), dtype=teacher_dtype)
        want = masters(run)
        for step in (1, 2, 3):
            train_step(run, step)
            teacher.update(step)
            now = masters(run)
            for name, value in want.items():
                value += (now[name] - value) / (step + 1)
        what = f"stage {stage}, {dtype} run, {teacher_dtype} teacher, {sections}"
        got = teacher.gather()
        assert_same(got, want, 1e-6, what)
        low = teacher_dtype or next(run.module.parameters()).dtype
        out = teacher.encode(batch(0)[:LOCAL_BATCH])
        assert out.dtype == low, what
        plain = net().eval()
        plain.load_state_dict(got)
        with torch.no_grad():
            exact = plain(batch(0)[:LOCAL_BATCH])
        tolerance = 1e-2 if dtype == "bf16" or low is torch.bfloat16 else 1e-6
        torch.testing.assert_close(out.float(), exact, rtol=tolerance, atol=tolerance, msg=what)


def check_refusals():
    """Every private attribute that the teacher reads is missed by name; modes it can't follow are named."""
    from tracer import zero

    def refused(run, *parts, **kwargs):
        with pytest.raises((RuntimeError, ValueError)) as error:
            build_teacher(run, Uniform(), **kwargs)
        assert all(part in str(error.value) for part in parts), f"{error.value} lacks one of {parts}"

    for stage, kind in (
        (0, "FP16_UnfusedOptimizer"),
        (2, "DeepSpeedZeroOptimizer"),
        (3, "DeepSpeedZeroOptimizer_Stage3"),
    ):
        run = engine(stage, "bf16")
        for name in zero._PRIVATE[kind]:
            kept = run.optimizer.__dict__.pop(name)
            refused(run, deepspeed.__version__, kind, repr(name), "deepspeed==0.19.8")
            setattr(run.optimizer, name, kept)
        if stage == 3:
            refused(run, "own_stream isn't offered at ZeRO stage 3", own_stream=True)
            param = run.module.first.weight
            for name in zero._PRIVATE_PARAMETER:
                kept = param.__dict__.pop(name)
                refused(run, repr(name), "deepspeed==0.19.8")
                setattr(param, name, kept)
        if stage == 2:
            kept = run.optimizer.single_partition_of_fp32_groups[0]
            run.optimizer.single_partition_of_fp32_groups[0] = kept.bfloat16()
            refused(run, "group 0 are torch.bfloat16")
            run.optimizer.single_partition_of_fp32_groups[0] = kept[:0]
            refused(run, "group 0 are swapped out")
            run.optimizer.single_partition_of_fp32_groups[0] = kept
            run.optimizer, kept = object(), run.optimizer
            refused(run, "can't read the master weights of a object")
            run.optimizer = kept
        build_teacher(run, Uniform())  # and whole again, it is taken


def main(rank, world, folder, port):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="(deepspeed|torch)")
    deepspeed.init_distributed("gloo", verbose=False)
    reference = single_process(WMA(50), 50)
    for stage in (0, 1, 2, 3):
        for dtype in ("fp32", "bf16"):
            try:
                check_average(stage, dtype, reference)
                if world == 2:
                    check_resume(stage, dtype, folder)
            except Exception as error:
                raise AssertionError(f"stage {stage}, {dtype}: {error}") from error
        if world == 2:
            check_steps_not_taken(stage)
    if world == 2:
        check_dtypes_and_modes()
    if world == 1:
        check_refusals()
    dist.barrier()
    dist.destroy_process_group()
