"""A DeepSpeed engine for a fine-tuning run, and what is read from it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from tracer.errors import UserError
from tracer.machine import resolve_precision
from tracer.train.config import Config

if TYPE_CHECKING:
    import deepspeed


def _import_deepspeed() -> Any:
    """DeepSpeed, told what this machine has before it looks for itself."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it warns that it found no GPU
    import deepspeed

    # The only op that DeepSpeed would compile at start-up (a minute, needs g++); only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def start_engine(config: Config, model: nn.Module) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine with AdamW, linear warm-up and cosine decay, on the present process group.

    Without a launcher the process becomes a group of one. Gains, biases and the logit scale are not decayed.
    """
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("several ranks are not supported yet: start one process")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    precision = resolve_precision(config.precision)
    optimizer = torch.optim.AdamW(groups, lr=config.recipe.lr, betas=(0.9, 0.98), eps=1e-6)
    engine, *_ = _import_deepspeed().initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda adam: lr_schedule(config, adam),
        config={
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": config.accumulation,
            "gradient_clipping": config.clip_grad,
            "zero_optimization": {"stage": config.zero_stage},
            "bf16": {"enabled": precision == "bf16"},
            "torch_autocast": {
                "enabled": precision == "amp_bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # gradients stay fp32
            },
            "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own would be compiled first
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
    )
    return engine


def optimizer_sizes(engine: deepspeed.DeepSpeedEngine) -> dict[str, int]:
    """How many parameters this rank's optimizer trains, and the bytes of its state (Adam's moments)."""
    trained = sum(
        math.prod(getattr(p, "ds_shape", p.shape)) for p in engine.module.parameters() if p.requires_grad
    )
    state = engine.basic_optimizer.state.values()
    kept = [value for values in state for value in values.values() if isinstance(value, Tensor)]
    return {"trained_parameters": trained, "optimizer_bytes": sum(value.nbytes for value in kept)}


@contextmanager
def mixed_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Products in bf16 for ``amp_bf16``; on the CPU also attention as plain products.

    The CPU's fused attention is slow in bf16: with it a step of the demo's model takes 0.17 s instead of 0.11 s
    (2 cores of an AVX-512 machine, batch 128).
    """
    with ExitStack() as stack:
        if precision == "amp_bf16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def lr_schedule(config: Config, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Linear warm-up over ``config.warmup`` steps, then cosine to 0 at ``config.total_steps``."""
    cosine = CosineAnnealingLR(optimizer, max(1, config.total_steps - config.warmup))
    if not config.warmup:
        return cosine
    rise = LinearLR(optimizer, 1 / config.warmup, 1.0, total_iters=config.warmup)
    return SequentialLR(optimizer, [rise, cosine], [config.warmup])


def full_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """The student's state dict with the optimizer's float32 weights, whatever the ZeRO stage."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    sharded = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=sharded):
        state = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            state[name] = master.detach().clone().view(state[name].shape)
    return {n: v.float() if v.is_floating_point() else v for n, v in state.items()}
