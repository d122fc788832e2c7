"""The DeepSpeed engine of a fine-tuning run: optimizer, learning rate, precision, and the weights it holds."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from tracer.machine import resolve_precision
from tracer.models.clip import contrast_of, projections
from tracer.models.weights import CLASS_HEAD, MAX_LOGIT_SCALE
from tracer.train.config import Config
from tracer.train.deepspeed_file import merged
from tracer.train.ranks import join

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups of the parameters that train: weight decay falls on matrices alone.

    Gains, biases and the logit scale, all of fewer than two dimensions, are not decayed. A classifier beside the
    towers is a group by itself, the last.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if name.startswith(f"{CLASS_HEAD}.")]
    towers = [p for name, p in trained.items() if not name.startswith(f"{CLASS_HEAD}.")]
    groups = [
        {"params": [p for p in towers if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in towers if p.ndim < 2], "weight_decay": 0.0},
        {"params": head, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


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
    """Return the AdamW of every run, with open_clip's moments and ε for vision transformers.

    It is fused: one pass over weights, gradients and moments, where torch's default on a CPU is a loop of a dozen
    operations for each tensor.
    """
    return kind(parameter_groups(model, weight_decay), lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def lr_schedule(config: Config, optimizer: Optimizer) -> LRScheduler:
    """Return a linear warm-up over ``config.warmup_steps``, then a cosine to 0 at ``config.total_steps``.

    LP-FT has two of them; see :func:`two_stages`.
    """
    if config.classifier == "probe-first":
        return two_stages(config, optimizer)
    warmup = config.warmup_steps
    cosine = CosineAnnealingLR(optimizer, max(1, config.total_steps - warmup))
    if not warmup:
        return cosine
    rise = LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup)
    return SequentialLR(optimizer, [rise, cosine], [warmup])


def two_stages(config: Config, optimizer: Optimizer) -> LRScheduler:
    """Return LP-FT's learning rates: each half of the steps has its own warm-up and its own cosine to 0.

    The last group of the optimizer is the classifier's. The rate of all others is 0 in the first half. Both halves
    have one optimizer: at ZeRO stages 1 and 2 its bias correction has counted the first half's steps too.
    """
    first, total = config.total_steps // 2, config.total_steps

    def factor(step: int, head: bool) -> float:
        probing = step < first
        if probing and not head:
            return 0.0
        done, steps = (step, first) if probing else (step - first, total - first)
        warmup = min(config.warmup_steps, steps // 4)
        if done < warmup:
            return 1 / warmup + (1 - 1 / warmup) * done / warmup
        turn = math.pi * (done - warmup) / max(1, steps - warmup)
        return 0.5 * (1 + math.cos(turn))

    def of(head: bool) -> Any:
        return lambda step: factor(step, head)

    count = len(optimizer.param_groups)
    return LambdaLR(optimizer, [of(n == count - 1) for n in range(count)])


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


def step_seed(seed: int, step: int) -> int:
    """Return the seed of the random numbers that a training step draws, on every rank."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def or_nan(loss: Tensor) -> Tensor:
    """Return a loss whose gradients are all NaN where it is not finite: the optimizer's own check then sees it."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def start_engine(config: Config, model: nn.Module) -> DeepSpeedEngine:
    """Return a DeepSpeed engine that trains ``model`` as ``config`` says.

    Without a launcher the process becomes a group of one.

    Raises:
        UserError: the ranks cannot be joined, or ``--deepspeed`` names a file that does not fit.
    """
    join(config.timeout)
    start = {  # keeps its float32 storage
        n: p.detach() for n, p in model.named_parameters() if p.requires_grad
    }
    precision = resolve_precision(config.precision)
    adam = CheckedAdamW if config.zero_stage == 0 else AdamW
    deepspeed = _deepspeed()
    if precision == "fp16" and not torch.cuda.is_available():
        _allow_fp16(deepspeed.accelerator.get_accelerator())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adamw(model, config.recipe.lr, config.recipe.weight_decay, adam),
        lr_scheduler=lambda optimizer: lr_schedule(config, optimizer),
        config=deepspeed_settings(config),
        dist_init_required=False,
    )
    if precision in ("bf16", "fp16"):
        _set_master_weights(engine, start)
    if precision == "fp16":  # the loop counts the steps without a gradient, and names them
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    return engine


def _allow_fp16(accelerator: Any) -> None:
    """Let DeepSpeed train in fp16 on a processor without instructions for it: torch computes it all the same."""
    if not accelerator.is_fp16_supported():
        warnings.warn("this processor has no fp16 instructions: --precision fp16 will be slow", stacklevel=3)
        accelerator.is_fp16_supported = lambda: True


def _masters(engine: DeepSpeedEngine) -> Any:
    from tracer._zero_masters import Masters  # imports DeepSpeed

    return Masters(engine)


def _set_master_weights(engine: DeepSpeedEngine, weights: dict[str, Tensor]) -> None:
    """Set the optimizer's float32 weights to these: DeepSpeed makes them from the model's, rounded to 16 bits."""
    masters = _masters(engine)
    for name, value in weights.items():
        part, begin = masters.part(name)
        mine = value.flatten()[begin : begin + part.numel()]
        part[: mine.numel()].copy_(mine)


class LogitScaleBound:
    """Keeps the trained logit scale at or below log ``MAX_LOGIT_SCALE``, as CLIP's own training does.

    That of a model with a logit bias, as SigLIP's have, is left as it is.

    The float32 weight of the optimizer and the copy that the model computes with are both bounded, at every ZeRO
    stage, and nothing is communicated. Call the object after each optimizer step.

    Args:
        engine: DeepSpeed engine of an open_clip model.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._parameter: Any = getattr(engine.module, "logit_scale", None)
        trained = self._parameter is not None and self._parameter.requires_grad
        trained = trained and contrast_of(engine.module) == "softmax"
        self._masters = _masters(engine) if trained else None

    def __call__(self) -> None:
        """Bound the logit scale."""
        if self._masters is None:
            return
        bound = math.log(MAX_LOGIT_SCALE)
        master = self._masters.part("logit_scale")[0]
        for tensor in (master, *self._masters.working_copies("logit_scale")):
            tensor.clamp_(max=bound)


def whole_projections(engine: DeepSpeedEngine) -> tuple[Tensor, Tensor] | None:
    """Return copies of the model's projections (see :func:`~tracer.models.clip.projections`) at any ZeRO stage.

    Gradients flow through them to the parameters. It is collective at stage 3, where each rank has a piece of a
    parameter: the copies outlive the moment in which it is whole.
    """
    if engine.zero_optimization_stage() < 3:
        return projections(engine.module)
    import deepspeed

    names = ("visual.proj", "text_projection")  # gather only those that the penalties read
    own = [p for n, p in engine.module.named_parameters() if any(name in n for name in names)]
    with deepspeed.zero.GatheredParameters(own):
        pair = projections(engine.module)
        return (pair[0].clone(), pair[1].clone()) if pair else None


def _deepspeed() -> Any:
    """Import DeepSpeed, and tell it what this machine has before it looks for itself."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it warns that it found no GPU
    import deepspeed

    # DeepSpeed would compile this op at start-up, which takes a minute and needs g++; only inference uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """Return the settings of DeepSpeed: this program's, merged with those of the file ``--deepspeed``.

    Raises:
        UserError: the file contradicts an option, or cannot be read.
    """
    precision = resolve_precision(config.precision)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    micro_batches = config.micro_batches(world_size)
    largest = math.ceil(config.batch_size / world_size / micro_batches)  # they may differ by one pair
    ours = {
        "train_batch_size": largest * micro_batches * config.accumulation * world_size,
        "train_micro_batch_size_per_gpu": largest,
        "gradient_accumulation_steps": config.accumulation * micro_batches,
        "gradient_clipping": config.clip_grad,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "torch_autocast": {
            "enabled": precision == "amp_bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients stay fp32
        },
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed would compile its own first
        "zero_force_ds_cpu_optimizer": False,
    }
    return {"steps_per_print": 10**9} | (merged(config.deepspeed, ours) if config.deepspeed else ours)


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
