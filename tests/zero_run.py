"""A small run under DeepSpeed for the tests of ZeRO: model, engine, batches, and what is read of them."""

from __future__ import annotations

from functools import lru_cache
from itertools import chain

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tracer.teacher import build_teacher

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
    """Return the whole batch of a step; each rank takes its rows."""
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
    """Return name -> whole float32 parameter, read by ways that the teacher does not use, in float64."""
    trained = {n: p for n, p in run.module.named_parameters() if p.requires_grad}
    stage = run.zero_optimization_stage()
    if stage < 3 and next(iter(trained.values())).dtype is torch.float32:
        # The parameters themselves. Not safe_get_full_fp32_param: with round_robin_gradients it gives some
        # parameters another one's values (DeepSpeed 0.19.8).
        return {n: p.detach().double() for n, p in trained.items()}
    if stage > 0:
        return {n: safe_get_full_fp32_param(p).double() for n, p in trained.items()}
    pairs = zip(chain(*run.optimizer.fp16_groups), chain(*run.optimizer.fp32_groups), strict=True)
    high_of = {id(low): high for low, high in pairs}
    return {n: high_of[id(p)].detach().double() for n, p in trained.items()}


class Collectives(TorchDispatchMode):
    """Collects the names of the collectives that are issued within."""

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


@lru_cache(maxsize=1)
def single_process(schedule, steps):
    """Return the average of the same run in one process on the whole batch, without DeepSpeed."""
    model = net()
    optimizer = adamw(model)
    teacher = build_teacher(model, schedule)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()
        teacher.update(step)
    return teacher.gather()
