"""The DeepSpeed engine of a fine-tuning run: optimizer, learning rate, precision, and the weights it holds."""

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
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from tracer.errors import UserError
from tracer.machine import resolve_precision
from tracer.train.config import Config

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's two groups of the parameters that train: weight decay falls on matrices alone.

    Gains, biases and the logit scale, all of fewer than two dimensions, are not decayed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


class CheckedAdamW(AdamW):
    """AdamW that takes no step while the norm of the gradients is not finite.

    DeepSpeed's optimizers of stages 1 to 3 check the same by themselves; at stage 0 the engine steps this one, and
    reads ``overflow`` from it: it then counts a skipped step and leaves the learning rate where it is.

    Attributes:
        overflow: whether the last step was skipped.
    """

    overflow = False

    def step(self, closure: Any = None) -> Any:
        """Take a step, unless the norm of all gradients is NaN or infinite."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.overflow = not bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        return None if self.overflow else super().step(closure)


def adamw(model: nn.Module, lr: float, weight_decay: float, kind: type[AdamW] = AdamW) -> AdamW:
    """Return the AdamW of every run, with open_clip's moments and ε for vision transformers."""
    return kind(parameter_groups(model, weight_decay), lr=lr, betas=(0.9, 0.98), eps=1e-6)


def lr_schedule(config: Config, optimizer: Optimizer) -> LRScheduler:
    """Return a linear warm-up over ``config.warmup`` steps, then a cosine to 0 at ``config.total_steps``."""
    cosine = CosineAnnealingLR(optimizer, max(1, config.total_steps - config.warmup))
    if not config.warmup:
        return cosine
    rise = LinearLR(optimizer, 1 / config.warmup, 1.0, total_iters=config.warmup)
    return SequentialLR(optimizer, [rise, cosine], [config.warmup])


@contextmanager
def mixed_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Take products in bf16 if ``precision`` is ``amp_bf16``, and on the CPU attention as plain products too.

    The CPU's fused attention is slow in bf16; plain products take less time there.
    """
    with ExitStack() as stack:
        if precision == "amp_bf16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def start_engine(config: Config, model: nn.Module) -> DeepSpeedEngine:
    """Return a DeepSpeed engine that trains ``model`` as ``config`` says.

    Without a launcher the process becomes a group of one.

    Raises:
        UserError: the process is one of several ranks.
    """
    _join_process_group()
    start = {
        n: p.detach() for n, p in model.named_parameters() if p.requires_grad
    }  # keeps its float32 storage
    adam = CheckedAdamW if config.zero_stage == 0 else AdamW
    engine, *_ = _deepspeed().initialize(
        model=model,
        optimizer=adamw(model, config.recipe.lr, config.recipe.weight_decay, adam),
        lr_scheduler=lambda optimizer: lr_schedule(config, optimizer),
        config=_deepspeed_settings(config),
    )
    if resolve_precision(config.precision) == "bf16":
        _set_master_weights(engine, start)
    return engine


def _set_master_weights(engine: DeepSpeedEngine, weights: dict[str, Tensor]) -> None:
    """Set the optimizer's float32 weights to these: DeepSpeed makes them from the model's, rounded to bf16."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        if name in weights:
            safe_set_full_fp32_param(parameter, weights[name].to(engine.device))


def _join_process_group() -> None:
    if dist.is_initialized():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several ranks are not supported yet: start one process")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it


def _deepspeed() -> Any:
    """Import DeepSpeed, and tell it what this machine has before it looks for itself."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it warns that it found no GPU
    import deepspeed

    # DeepSpeed would compile this op at start-up, which takes a minute and needs g++; only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _deepspeed_settings(config: Config) -> dict[str, Any]:
    precision = resolve_precision(config.precision)
    return {
        "train_micro_batch_size_per_gpu": math.ceil(config.batch_size / config.micro_batches()),
        "gradient_accumulation_steps": config.accumulation * config.micro_batches(),
        "gradient_clipping": config.clip_grad,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": precision == "bf16"},
        "torch_autocast": {
            "enabled": precision == "amp_bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients stay fp32
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed would compile its own first
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def full_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Return the student's state dict with the optimizer's float32 weights, whatever the ZeRO stage."""
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


def optimizer_sizes(engine: DeepSpeedEngine) -> dict[str, int]:
    """Return how many parameters this rank's optimizer trains, and the bytes of its state (Adam's moments)."""
    trained = sum(
        math.prod(getattr(p, "ds_shape", p.shape)) for p in engine.module.parameters() if p.requires_grad
    )
    state = engine.basic_optimizer.state.values()
    kept = [value for values in state for value in values.values() if isinstance(value, Tensor)]
    return {"trained_parameters": trained, "optimizer_bytes": sum(value.nbytes for value in kept)}
