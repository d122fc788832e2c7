"""The moving average of a DeepSpeed engine: it lives where the engine keeps the float32 weights.

Each rank averages the shard of the master weights that it owns, so an update communicates nothing
and costs 4 bytes per parameter divided by the ranks. The averaged module's own weights are gathered
when they are used, as the student's are:

* stage 0: every rank has all masters; nothing is gathered.
* stages 1 and 2: one all-gather per parameter group, into the flat buffer that the module's
  parameters are views of, at the first use after an update.
* stage 3: the module runs in a second engine without optimizer, whose partitions the update writes;
  DeepSpeed gathers them module by module in the forward.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tracer._average import Average, cast_rule, is_shared
from tracer._zero_masters import Masters, Place, all_gather

_HUNG_ON_MODULES = {"_external_params", "_original_parameters", "all_parameters", "pre_bwd_fn", "post_bwd_fn"}

Rule = Callable[[Tensor], torch.dtype]


def zero_average(engine: Any, dtype: torch.dtype | None) -> Average:
    """Return the average of what ``deepspeed.initialize`` returned, at any ZeRO stage.

    Args:
        engine: with its optimizer.
        dtype: of the averaged module; None is the engine's own.

    Raises:
        RuntimeError, ValueError: see :class:`Masters`.
    """
    masters = Masters(engine)
    if masters.kind == "DeepSpeedZeroOptimizer_Stage3":
        return PartitionedAverage(masters, dtype)
    if masters.kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        return ShardedAverage(masters, dtype)
    return ReplicatedAverage(masters, dtype)


class ZeroAverage(Average):
    """What the averages of engines at every stage have in common.

    Args:
        masters: of the engine.
        module: the copy of the engine's module.
    """

    def __init__(self, masters: Masters, module: nn.Module) -> None:
        super().__init__(masters.engine.module, module)
        self._masters = masters
        stage = masters.engine.zero_optimization_stage()
        self.shard = f"ZeRO stage {stage}, rank {dist.get_rank()} of {dist.get_world_size()}"
        for name, _ in module.named_buffers():
            self.follow(name)

    def stepped(self) -> bool:
        """Return whether the last ``engine.step()`` took a step: not amid accumulation, not after an overflow."""
        return bool(self._masters.engine.was_step_applied())

    def gather(self) -> dict[str, Tensor]:
        """Return the state dict with all of its floating-point tensors in float32; collective from stage 1 on."""
        whole = self._gather_parameters()
        state = {key: whole.get(self._keys[key], tensor) for key, tensor in super().gather().items()}
        return {key: t.float() if t.is_floating_point() else t for key, t in state.items()}

    def _gather_parameters(self) -> dict[str, Tensor]:
        """Return name -> whole parameter, of those that the module does not hold whole and in float32."""
        return {}


class ReplicatedAverage(ZeroAverage):
    """Average at stage 0: every rank holds every master, whole and in the parameters' own shapes."""

    def __init__(self, masters: Masters, dtype: torch.dtype | None) -> None:
        model = masters.engine.module
        rule = cast_rule(model, dtype)
        params = {name: _clone(p, rule) for name, p in model.named_parameters()}
        super().__init__(masters, _skeleton(model, params, rule))
        if masters.kind == "torch":
            for name in params:
                self.follow(name)
        for name, place in masters.whole_places().items():
            self.follow(name, partial(masters.read, place))


class _Group(NamedTuple):
    """A parameter group at stages 1 and 2."""

    buffer: Tensor  # all parameters, flat
    shard: Tensor  # this rank's slice of it
    places: list[tuple[str, int, torch.Size]]  # name, start in the buffer, shape
    ranks: Any  # the process group that the buffer is sharded over


class ShardedAverage(ZeroAverage):
    """Average at stages 1 and 2: each rank holds a slice of the masters of each parameter group, flat."""

    def __init__(self, masters: Masters, dtype: torch.dtype | None) -> None:
        model = masters.engine.module
        rule = cast_rule(model, dtype)
        self._groups: list[_Group] = []
        params: dict[str, nn.Parameter] = {}
        for index, (flat, starts) in enumerate(masters.flat_groups()):
            group = masters.groups[index]
            buffer = flat.to(rule(group[0][1]), copy=True)
            ranks, size = masters.process_group(index), masters.tensors()[index].numel()
            shard = buffer.narrow(0, dist.get_rank(ranks) * size, size)
            places = [(name, start, p.shape) for (name, p), start in zip(group, starts, strict=True)]
            self._groups.append(_Group(buffer, shard, places, ranks))
            views = _views(buffer, places)
            params |= {name: nn.Parameter(view, requires_grad=False) for name, view in views.items()}
        params |= {n: _clone(p, rule) for n, p in model.named_parameters() if n not in params}
        super().__init__(masters, _skeleton(model, params, rule))
        for index, group_ in enumerate(self._groups):
            place = Place(index, 0, group_.shard.shape)
            self.average(f"group {index}", group_.shard, partial(masters.read, place))
        self._stale = True  # this rank's slice comes from the masters, the others' are still to be gathered

    def move(self, weight: float) -> None:
        super().move(weight)
        self._stale = True

    def part(self, name: str) -> tuple[Tensor, int] | None:
        if name in self._tensors and isinstance(self._student.get(name), nn.Parameter):
            if name in self._shared:
                return None
            number, part, begin = self._masters.where(name)
            return self.averages[f"group {number}"][part], begin
        return super().part(name)

    def loaded(self) -> None:
        super().loaded()
        self._stale = True

    def refresh(self) -> None:
        if self._stale:
            for group in self._groups:
                all_gather(group.buffer, group.shard, group.ranks)
        self._stale = False

    def _gather_parameters(self) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for index, group in enumerate(self._groups):
            average = self.averages[f"group {index}"]
            buffer = average.new_empty(group.buffer.numel())
            all_gather(buffer, average, group.ranks)
            whole |= {name: view.to("cpu", copy=True) for name, view in _views(buffer, group.places).items()}
        return whole


class PartitionedAverage(ZeroAverage):
    """Average at stage 3: each rank holds a piece of every parameter, of the masters and of the module's."""

    def __init__(self, masters: Masters, dtype: torch.dtype | None) -> None:
        model = masters.engine.module
        rule = cast_rule(model, dtype)
        params = {name: _partitioned_copy(p, rule) for name, p in model.named_parameters()}
        module = _skeleton(model, params, rule)
        self._runner = _engine_without_optimizer(module, {rule(p) for p in model.parameters()})
        super().__init__(masters, self._runner.module)
        self._params: dict[str, Any] = dict(self.module.named_parameters())
        for name, place in masters.piece_places().items():
            self.average(name, self._params[name].ds_tensor.data, partial(masters.read, place))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return self._runner(*args, **kwargs)

    def side_stream(self) -> torch.cuda.Stream:
        raise ValueError("own_stream isn't offered at ZeRO stage 3: DeepSpeed gathers on streams of its own")

    def part(self, name: str) -> tuple[Tensor, int] | None:
        held = super().part(name)
        if held is None or name not in self._params:
            return held
        _, part, begin = self._masters.where(name)
        return held[0][: part.stop - part.start], begin

    def _gather_parameters(self) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for name, p in self._params.items():
            piece = self.averages.get(name, p.ds_tensor.data)
            world_size = dist.get_world_size(p.ds_process_group)
            buffer = piece.new_empty(piece.numel() * world_size)
            all_gather(buffer, piece, p.ds_process_group)
            whole[name] = buffer[: p.ds_numel].view(p.ds_shape).to("cpu", copy=True)
        return whole


def _views(buffer: Tensor, places: list[tuple[str, int, torch.Size]]) -> dict[str, Tensor]:
    """Return name -> view of a flat buffer in the parameter's shape."""
    return {name: buffer.narrow(0, start, shape.numel()).view(shape) for name, start, shape in places}


def _clone(param: nn.Parameter, rule: Rule) -> nn.Parameter:
    if is_shared(param, rule):
        return param
    return nn.Parameter(param.detach().to(rule(param), copy=True), requires_grad=False)


def _partitioned_copy(param: Any, rule: Rule) -> nn.Parameter:
    """Return a copy partitioned by the student's own context, one by one: never the whole model on a rank."""
    if is_shared(param, rule):
        return param
    whole = torch.zeros(param.ds_shape, dtype=rule(param), device=param.device)
    mine: Any = nn.Parameter(whole, requires_grad=False)
    param.convert_to_zero_parameters(param_list=[mine])
    mine.ds_persist = False  # else its whole copy would outlive the next update
    mine.ds_tensor.copy_(param.ds_tensor)
    return mine


def _engine_without_optimizer(module: nn.Module, dtypes: set[torch.dtype]) -> Any:
    """Return a stage 3 engine that gathers the module's parameters as its forward needs them."""
    dtype = min(dtypes, key=lambda d: d.itemsize)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    if dtype is not torch.float32:
        config["bf16" if dtype is torch.bfloat16 else "fp16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
    engine.eval()
    return engine


def _skeleton(model: nn.Module, params: Mapping[str, nn.Parameter], rule: Rule) -> nn.Module:
    """Return a copy of an engine's module in eval mode, without what DeepSpeed hung on it.

    Args:
        model: the engine's module; at stage 3 its parameters are empty.
        params: name of each of its parameters -> the copy's parameter.
        rule: gives the dtypes of the copy's buffers.
    """
    # Children, parents and shared modules are known before any is filled: the copy has their ties.
    memo: dict[int, Any] = {id(p): params[name] for name, p in model.named_parameters()}
    modules = list(model.modules())
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
    for module in modules:
        state = {}
        for name, value in module.__dict__.items():
            if name.startswith("ds_") or name in _HUNG_ON_MODULES:
                continue
            if name == "_parameters":
                value = dict(value.items())
            elif "_hooks" in name and isinstance(value, dict):
                value = OrderedDict((k, h) for k, h in value.items() if not _is_deepspeed(h))
            state[name] = copy.deepcopy(value, memo)
        memo[id(module)].__dict__.update(state)
    for buffer in memo[id(model)].buffers():
        buffer.data = buffer.data.to(rule(buffer))
    return memo[id(model)].eval().requires_grad_(False)


def _is_deepspeed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "deepspeed"
