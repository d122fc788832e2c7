"""The moving average of a DeepSpeed engine: it lives where the engine keeps the float32 weights.

Each rank averages the shard of the master weights that it owns, so an update communicates nothing
and costs 4 bytes per parameter divided by the ranks. The averaged module's own weights are gathered
when they are used, as the student's are:

* stage 0: every rank has all masters; nothing is gathered.
* stages 1 and 2: one all-gather per parameter group, into the flat buffer that the module's
  parameters are views of, at the first use after an update.
* stage 3: the module runs in a second engine without optimizer, whose partitions the update writes;
  DeepSpeed gathers them module by module in the forward.

DeepSpeed keeps its master weights in private attributes. They are touched in this file only, and
``Masters`` refuses a version of DeepSpeed that lacks one, naming the attribute.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tracer._average import Average, cast_rule, is_shared

# What is read of each kind of optimizer that deepspeed.initialize may return. The first names the
# float32 masters, the second the parameters that they belong to, the third their flat buffers.
OPTIMIZER_ATTRIBUTES = {
    "DeepSpeedZeroOptimizer": (
        "single_partition_of_fp32_groups",
        "round_robin_bit16_groups",
        "bit16_groups_flat",
        "real_dp_process_group",
        "round_robin_bit16_offsets",
    ),
    "BF16_Optimizer": (
        "fp32_groups_flat_partition",
        "bf16_groups",
        "bf16_groups_flat",
        "real_dp_process_group",
    ),
    "DeepSpeedZeroOptimizer_Stage3": ("fp32_partitioned_groups_flat", "fp16_groups"),
    "FP16_UnfusedOptimizer": ("fp32_groups", "fp16_groups"),
    "FP16_Optimizer": ("fp32_groups_flat", "fp16_groups"),
}
# What is read of a parameter at stage 3.
PARAMETER_ATTRIBUTES = (
    "ds_tensor",
    "ds_shape",
    "ds_numel",
    "ds_process_group",
    "partition_numel",
    "convert_to_zero_parameters",
)
_ENGINE_ATTRIBUTES = ("was_step_applied", "zero_optimization_stage", "module", "optimizer")
_HUNG_ON_MODULES = {"_external_params", "_original_parameters", "all_parameters", "pre_bwd_fn", "post_bwd_fn"}
_REMEDY = "install deepspeed==0.19.8"

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


class Place(NamedTuple):
    """Where a tensor lies in the masters: elements of ``masters[master]`` from ``start`` on."""

    master: int
    start: int
    shape: torch.Size


class Masters:
    """The float32 weights that this rank's optimizer steps, found in DeepSpeed's private attributes.

    Attributes:
        kind: the engine's kind of optimizer: a key of ``OPTIMIZER_ATTRIBUTES``, or "torch" where the engine
            steps the parameters themselves.
        groups: for each parameter group of the optimizer, its (name, parameter) pairs in the order of the
            masters.

    Raises:
        RuntimeError: the installed DeepSpeed lacks an attribute that is needed; the message names it.
        ValueError: the engine runs in a mode whose master weights cannot be read; the message names it.
    """

    def __init__(self, engine: Any) -> None:
        _require(engine, _ENGINE_ATTRIBUTES, "its engine")
        self.engine = engine
        self.kind = self._kind()
        if self.kind != "torch":
            _require(engine.optimizer, OPTIMIZER_ATTRIBUTES[self.kind], f"its {self.kind}")
        if self.kind == "DeepSpeedZeroOptimizer_Stage3":
            for param in engine.module.parameters():
                _require(param, PARAMETER_ATTRIBUTES, "a stage 3 parameter")
        self._check_tensors()
        names = {id(p): name for name, p in engine.module.named_parameters()}
        groups = [] if self.kind == "torch" else self._attribute(1)
        self.groups: list[list[tuple[str, Any]]] = [[(names[id(p)], p) for p in group] for group in groups]

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the optimizer steps, as they are at the moment."""
        if self.kind == "torch":
            return []
        masters = self._attribute(0)
        if self.kind == "FP16_UnfusedOptimizer":  # a list of tensors per group
            return [tensor for group in masters for tensor in group]
        return list(masters)

    def read(self, place: Place) -> Tensor:
        """Return the present values at ``place``, a view."""
        master = self.tensors()[place.master].detach()
        if master.shape == place.shape:
            return master
        return master.narrow(0, place.start, place.shape.numel()).view(place.shape)

    def whole_places(self) -> dict[str, Place]:
        """Return the place of each parameter at stage 0, where this rank has all the masters."""
        places: dict[str, Place] = {}
        for number, group in enumerate(self.groups):
            starts = _starts(group)
            for (name, p), start in zip(group, starts, strict=True):
                flat = self.kind == "FP16_Optimizer"  # a flat master per group, else one per parameter
                places[name] = Place(number, start, p.shape) if flat else Place(len(places), 0, p.shape)
        return places

    def piece_places(self) -> dict[str, Place]:
        """Return the place of this rank's piece of each parameter at stage 3."""
        places: dict[str, Place] = {}
        for number, group in enumerate(self.groups):
            start = 0
            for name, p in group:
                places[name] = Place(number, start, torch.Size([p.partition_numel()]))
                start += p.partition_numel()
        return places

    def flat_groups(self) -> list[tuple[Tensor, list[int]]]:
        """Return each group's flat buffer at stages 1 and 2, and where its parameters start in it."""
        buffers = self._attribute(2)
        if self.kind == "DeepSpeedZeroOptimizer":  # it may pad between parameters
            starts = [list(offsets) for offsets in self.engine.optimizer.round_robin_bit16_offsets]
        else:
            starts = [_starts(group) for group in self.groups]
        return [(buffers[i].detach(), starts[i]) for i in range(len(self.groups))]

    def working_copies(self, name: str) -> list[Tensor]:
        """Return the tensors with which the model computes on this rank: at stage 3 the rank's piece, too."""
        param: Any = self.engine.module.get_parameter(name)
        piece = getattr(param, "ds_tensor", None)
        return [param.data] if piece is None else [param.data, piece]

    def part(self, name: str) -> tuple[Tensor, int]:
        """Return this rank's part of a parameter's master, a flat view, and at which element it begins.

        At stage 3 it may end in padding; it is empty where other ranks have all of the parameter.
        """
        if self.kind == "torch":
            return self.engine.module.get_parameter(name).detach().view(-1), 0
        if self.kind == "DeepSpeedZeroOptimizer_Stage3":
            place = self.piece_places()[name]
            rank = dist.get_rank(self.engine.module.get_parameter(name).ds_process_group)
            return self.read(place), rank * place.shape.numel()
        if self.kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
            return self._part_of_shard(name)
        return self.read(self.whole_places()[name]).view(-1), 0

    def _part_of_shard(self, name: str) -> tuple[Tensor, int]:
        for number, (group, (_, starts)) in enumerate(zip(self.groups, self.flat_groups(), strict=True)):
            shard = self.tensors()[number].detach()
            first = dist.get_rank(self.process_group(number)) * shard.numel()
            for (other, p), start in zip(group, starts, strict=True):
                if other == name:
                    begin, end = max(start, first), min(start + p.numel(), first + shard.numel())
                    return shard.narrow(
                        0, begin - first if end > begin else 0, max(0, end - begin)
                    ), begin - start
        raise KeyError(name)

    def process_group(self, index: int) -> Any:
        """Return the ranks that a parameter group is sharded over at stages 1 and 2."""
        return self.engine.optimizer.real_dp_process_group[index]

    def _attribute(self, position: int) -> Any:
        return getattr(self.engine.optimizer, OPTIMIZER_ATTRIBUTES[self.kind][position])

    def _kind(self) -> str:
        optimizer = self.engine.optimizer
        kinds = [c.__name__ for c in type(optimizer).__mro__]
        kind = next((k for k in kinds if k in OPTIMIZER_ATTRIBUTES), None)
        if kind is None:
            if isinstance(optimizer, torch.optim.Optimizer) and self.engine.zero_optimization_stage() == 0:
                return "torch"
            raise ValueError(
                f"DeepSpeed {deepspeed.__version__}: the teacher can't read the master weights of a {kinds[0]}; "
                f"it knows {', '.join(OPTIMIZER_ATTRIBUTES)} and torch optimizers at stage 0"
            )
        return kind

    def _check_tensors(self) -> None:
        for index, master in enumerate(self.tensors()):
            if master.dtype is not torch.float32:
                raise ValueError(
                    f"the master weights of group {index} are {master.dtype}: an average needs them in float32, "
                    "remove fp16_master_weights_and_grads / bf16_master_weights_and_grads from the configuration"
                )
            if master.numel() == 0:
                raise ValueError(
                    f"the master weights of group {index} are swapped out: the teacher needs them in memory "
                    '(offload_optimizer device "cpu" or "none")'
                )


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

    def load(self, averages: Mapping[str, Tensor], copied: Mapping[str, Tensor]) -> None:
        super().load(averages, copied)
        self._stale = True

    def refresh(self) -> None:
        if self._stale:
            for group in self._groups:
                _all_gather(group.buffer, group.shard, group.ranks)
        self._stale = False

    def _gather_parameters(self) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for index, group in enumerate(self._groups):
            average = self.averages[f"group {index}"]
            buffer = average.new_empty(group.buffer.numel())
            _all_gather(buffer, average, group.ranks)
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

    def _gather_parameters(self) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        for name, p in self._params.items():
            piece = self.averages.get(name, p.ds_tensor.data)
            world_size = dist.get_world_size(p.ds_process_group)
            buffer = piece.new_empty(piece.numel() * world_size)
            _all_gather(buffer, piece, p.ds_process_group)
            whole[name] = buffer[: p.ds_numel].view(p.ds_shape).to("cpu", copy=True)
        return whole


def _require(owner: Any, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if not hasattr(owner, name):
            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__}: {what} has no {name!r}, which the teacher reads; {_REMEDY}"
            )


def _starts(group: list[tuple[str, Any]]) -> list[int]:
    """Return where each parameter starts in the group's flat tensor."""
    return [0, *accumulate(p.numel() for _, p in group)][:-1]


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


def _all_gather(whole: Tensor, piece: Tensor, group: Any) -> None:
    """Write all ranks' ``piece``, one after the other, into ``whole``; ``piece`` may be a slice of it."""
    if dist.get_world_size(group) == 1:
        if whole.data_ptr() != piece.data_ptr():
            whole.copy_(piece)
        return
    # The newer name of the same collective, where torch has it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, piece.to(whole.device), group=group)


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
