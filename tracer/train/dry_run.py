"""A dry run: one optimizer step of a run on any number of ranks, counted on one core and without its memory.

The loop, the engine, the averages and the loss are those of a real run; ``fake.py`` says what is not. What a rank
keeps in memory and what it sends is counted by ``accounts.py``.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from tracer import _autograd, _ranks, _sigmoid
from tracer._ahead import Ahead
from tracer._average import Average
from tracer._mesh import MeshShape
from tracer.data.batches import Batch
from tracer.errors import UserError
from tracer.kernels import _blocked_tile, contrastive_triton
from tracer.kernels._triton import planning_for, recording
from tracer.machine import resolve_precision
from tracer.models.choice import choose_model
from tracer.models.clip import Clip, load_clip
from tracer.models.registry import registered_model
from tracer.ops import contrastive_loss
from tracer.train import loop
from tracer.train.accounts import Accounts, Group, Sent
from tracer.train.cached import Cached, OneShot
from tracer.train.config import Config
from tracer.train.fake import cast, fake_ranks, number_of, replaced, without_log, wrapped
from tracer.train.loop import Trainer
from tracer.train.ranks import check_batch_size, check_mesh, world_size
from tracer.train.run import prepare

RANKS_PER_HOST = 8
GPU = ("sm_90", 132)  # for which the loss's launchers plan: an H100's architecture and multiprocessors

PARAMETERS, GRADIENTS, OPTIMIZER, AVERAGES = "parameters", "gradients", "optimizer", "averages, teacher"
ACTIVATIONS, LOSS, BATCH = "activations", "loss", "batch"
HELD = (PARAMETERS, GRADIENTS, OPTIMIZER, AVERAGES, ACTIVATIONS, LOSS, BATCH)

OPERATORS: dict[str, Callable[..., Any]] = {
    "tracer::contrastive_loss": _autograd._run_forward,
    "tracer::contrastive_loss_backward": _autograd._run_backward,
    "tracer::contrastive_statistics": _autograd._run_statistics,
    "tracer::sigmoid_pairs": _sigmoid._run,
}

Impl = Literal["triton", "blocked"]


@dataclass(frozen=True)
class Counts:
    """What one rank of a run keeps and sends.

    Attributes:
        model: its name.
        parameters: of the model.
        width, itemsize: of the features that the loss multiplies: D, and bytes of an element.
        ranks, ranks_per_host: of the run.
        at_rest: bytes between two steps, by kind.
        at_peak: bytes at the fullest moment of a step, by kind.
        most: the most bytes of each kind at any moment of a step.
        sent: (collective, its group) → calls and bytes of a step.
        flops: floating-point operations of a step's towers.
        loss_flops: those of this rank's part of the loss.
        seconds: of this process's processor time that the counting took.
    """

    model: str
    parameters: int
    width: int
    itemsize: int
    ranks: int
    ranks_per_host: int
    at_rest: Mapping[str, int]
    at_peak: Mapping[str, int]
    most: Mapping[str, int]
    sent: Mapping[tuple[str, Group], Sent]
    flops: int
    loss_flops: float
    seconds: float


def dry_run(config: Config, size: int, impl: Impl = "triton", ranks_per_host: int = RANKS_PER_HOST) -> Counts:
    """Count one optimizer step of rank 0 of ``size``.

    Args:
        config: settings of the run; neither its data nor its weights are read.
        size: number of ranks.
        impl: of the loss; triton counts what its launchers allocate on an H100.
        ranks_per_host: which decides the mesh of the loss.

    Raises:
        UserError: the ranks cannot share the batch or form the mesh, the model does not allow what the settings
            ask for, or a launcher has started several processes.
    """
    if world_size() > 1:
        raise UserError("--dry_run counts any number of ranks in one process: start it without a launcher")
    check_batch_size(config.batch_size, size)
    check_mesh(config.mesh_shape, size)
    config = dataclasses.replace(config, steps=config.steps or config.default_steps, epochs=None)
    started = time.process_time()
    accounts = _accounts(impl)
    with ExitStack() as stack:
        for each in (fake_ranks(size, min(size, ranks_per_host)), without_log(), torch.random.fork_rng()):
            stack.enter_context(each)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(accounts)
        model, batch = _model_and_batch(config, size)
        with accounts.kind(OPTIMIZER):
            trainer = Trainer(config, model)
        trainer.distinct = False  # which captions are equal, only the data knows: count all of them
        with by_kind(accounts, trainer):
            gc.disable()  # whatever this process did before would decide when reference cycles go
            stack.callback(gc.enable)
            for step in (1, 2):  # the first makes the optimizer's moments
                gc.collect()
                at_rest = sort_out(accounts, trainer)
                accounts.restart()
                with accounts.kind(BATCH):
                    batches = [batch() for _ in range(config.accumulation)]
                trainer.step(step, batches, measure=False)
                del batches
        features = trainer._features[-1][0]
        return Counts(
            model=config.model,
            parameters=sum(p.numel() for p in trainer.engine.module.parameters()),
            width=features.shape[1],
            itemsize=features.itemsize,
            ranks=size,
            ranks_per_host=ranks_per_host,
            at_rest=at_rest,
            at_peak=dict(accounts.at_peak),
            most=dict(accounts.most),
            sent=dict(accounts.sent),
            flops=accounts.flops,
            loss_flops=config.accumulation
            * products(trainer)
            * 2
            * config.batch_size**2
            * features.shape[1]
            / size,
            seconds=time.process_time() - started,
        )


def products(trainer: Trainer) -> int:
    """Return how many products of all images with all texts the loss of a step takes, forward and backward."""
    if trainer.loss.options["contrast"] == "sigmoid":
        return 3
    return 12 if trainer.averages.teacher and trainer.config.distill_weight else 4


def loss_memory(
    pairs: int, size: int, width: int, mesh: MeshShape = None, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Return the most bytes that the CLIP loss over ``size`` ranks takes on one, forward and backward.

    The gradients of the rank's own features are part of it, the features themselves are the towers'.

    Args:
        pairs: on all ranks together.
        width: D of the features.
        mesh: as of :func:`tracer.ops.contrastive_loss`.
    """
    accounts = _accounts("triton")
    with fake_ranks(size, min(size, RANKS_PER_HOST)), FakeTensorMode(allow_non_fake_inputs=True), accounts:
        image, text = (torch.empty(pairs // size, width, dtype=dtype).requires_grad_() for _ in range(2))
        own = sum(accounts.held.values())
        contrastive_loss(image, text, 100.0, group=dist.group.WORLD, mesh=mesh).loss.backward()
        return sum(accounts.at_peak.values()) - own


def _without_weights(name: str) -> Clip:
    """Return a model without its weights: one that is registered would read its own."""
    registered = registered_model(name)
    if registered is None or registered.config is None:
        return load_clip(name, None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.json"
        path.write_text(json.dumps(registered.config))
        return load_clip(str(path), None)


def _model_and_batch(config: Config, size: int) -> tuple[nn.Module, Callable[[], Batch]]:
    """Return the model without its weights, and what makes a rank's batch."""
    clip = _without_weights(choose_model(config.model, config.pretrained).model)
    prepare(config, clip.model)
    precision = resolve_precision(config.precision)
    if precision in ("bf16", "fp16"):
        cast(clip.model, torch.bfloat16 if precision == "bf16" else torch.float16)
    n, side = config.batch_size // size, clip.picture_format.size
    height, width = (side, side) if isinstance(side, int) else side
    context = len(clip.tokenizer(["a"])[0])
    with unset_fake_temporarily():
        numbers = torch.arange(n)

    def batch() -> Batch:
        label = torch.empty(n, dtype=torch.int64)
        return Batch(torch.empty(n, 3, height, width), label.new_empty(n, context), label, numbers)

    return clip.model, batch


@contextmanager
def by_kind(accounts: Accounts, trainer: Trainer) -> Iterator[None]:
    """Count what the parts of a step allocate as what it is."""
    engine: Any = trainer.engine
    optimizer = engine.optimizer
    parts = [
        (trainer, "_teacher_output", ACTIVATIONS),
        (trainer, "_student", ACTIVATIONS),
        (loop, "micro_batches", BATCH),
        (trainer, "loss", LOSS),
        (Ahead, "begin", LOSS),
        (_ranks._Terms, "backward", LOSS),
        (_sigmoid._Terms, "backward", LOSS),
        (OneShot, "backward", ACTIVATIONS),
        (Cached, "backward", ACTIVATIONS),
        (engine, "step", OPTIMIZER),
        (Average, "refresh", AVERAGES),
        (Average, "move", AVERAGES),
    ]
    # What DeepSpeed does with a gradient as soon as autograd has it.
    names = (
        "process_gradients",
        "reduce_ready_partitions_and_remove_grads",
        "reduce_partition_and_remove_grads",
    )
    parts += [(optimizer, name, GRADIENTS) for name in names if hasattr(optimizer, name)]
    hooks = [
        p.register_hook(lambda gradient: accounts.own(GRADIENTS, [gradient]))
        for p in engine.module.parameters()
        if p.requires_grad
    ]
    with ExitStack() as stack:
        for owner, name, kind in parts:
            stack.enter_context(wrapped(owner, name, partial(accounts.kind, kind)))
        yield
    for hook in hooks:
        hook.remove()


def sort_out(accounts: Accounts, trainer: Trainer) -> dict[str, int]:
    """Count what is in memory between two steps as what it is, and return its bytes by kind."""
    from tracer._zero_masters import Masters  # imports DeepSpeed

    engine: Any = trainer.engine
    optimizer, masters = engine.optimizer, Masters(engine)
    accounts.own(GRADIENTS, _tensors(vars(optimizer), depth=3))  # buckets, and what is left below
    accounts.own(PARAMETERS, [*engine.module.parameters(), *engine.module.buffers()])
    if masters.kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        accounts.own(PARAMETERS, [flat for flat, _ in masters.flat_groups()])
    accounts.own(OPTIMIZER, masters.tensors())
    accounts.own(OPTIMIZER, _tensors(engine.basic_optimizer.state, depth=2))
    for average in trainer.averages.by_name().values():
        held = average.average
        mine = {p.untyped_storage()._cdata for p in engine.module.parameters()}
        own = [*held.averages.values(), *held.module.parameters(), *held.module.buffers()]
        accounts.own(AVERAGES, [x for x in own if x.untyped_storage()._cdata not in mine])
    return {kind: size for kind, size in accounts.held.items() if size}


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, and in the plain objects among them."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for x in value.values():
            yield from _tensors(x, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for x in value:
            yield from _tensors(x, depth - 1)
    elif depth and hasattr(value, "buffer"):  # a bucket of gradients
        yield from _tensors(vars(value), depth - 1)


def _accounts(impl: Impl) -> Accounts:
    accounts = Accounts({"aten::_local_scalar_dense": number_of})
    accounts.instead |= {name: _operator(accounts, name, impl) for name in OPERATORS}
    return accounts


def _operator(accounts: Accounts, name: str, impl: Impl) -> Callable[..., Any]:
    """Return what counts a custom operator of the loss: its own scratch is hidden from the dispatcher."""
    run = OPERATORS[name]

    def by_launchers(_: Any, chosen: str, *args: Any) -> Any:
        """Run the launchers, which allocate all that the kernels use; the kernels are not started."""
        if chosen == "eager":
            return run(chosen, *args)
        with ExitStack() as stack:
            for each in (recording(execute=False), planning_for(*GPU), accounts, accounts.kind(LOSS)):
                stack.enter_context(each)
            stack.enter_context(replaced(contrastive_triton, "_add_product", _sum_on_a_gpu))
            return run("triton", *args)

    def by_one_tile(operator: Any, chosen: str, *args: Any) -> Any:
        """Run the loss on numbers, at most one tile of them, since it walks in tiles; its peak is the scratch."""
        with unset_fake_temporarily():
            own = Accounts()
            with own:
                run(chosen, *_numbers(args))
        with accounts.kind(LOSS):
            accounts.briefly(sum(own.at_peak.values()))
        return operator(chosen, *args)

    return by_launchers if impl == "triton" else by_one_tile


def _sum_on_a_gpu(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Allocate what ``left @ right`` takes on a GPU, which adds it to ``total`` in place."""
    return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32) if total is None else total


def _numbers(args: tuple[Any, ...]) -> list[Any]:
    """Return real tensors in place of those without numbers, cut to one tile."""
    n, m = (
        min(len(x), size)
        for x, size in zip(_features(args), (_blocked_tile.ROWS, _blocked_tile.COLS), strict=True)
    )
    images, texts = (len(x) for x in _features(args))

    def number(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = [n if k == images else m if k == texts else k for k in x.shape]
        if x.is_floating_point():
            return torch.ones(shape, dtype=x.dtype) / max(1, shape[-1] if shape else 1)
        return torch.arange(shape[0], dtype=x.dtype)

    return [number(x) for x in args]


def _features(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Return the images and the texts of an operator's arguments: its first matrices."""
    matrices = [x for x in args if isinstance(x, Tensor) and x.ndim == 2]
    return matrices[0], matrices[1]
