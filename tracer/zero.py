"""The teacher of a DeepSpeed engine: its average lives where the engine keeps the fp32 weights.

Each rank averages the shard of the master weights that it owns, so an update communicates nothing
and costs 4 bytes per parameter divided by the ranks. The teacher's own weights are gathered when
they are used, as the student's are:

* stage 0: every rank has all masters; nothing is gathered.
* stages 1 and 2: one all-gather per parameter group, into the flat buffer that the teacher's
  parameters are views of, at the first use after an update.
* stage 3: the teacher is a second engine without optimizer, whose partitions the update writes;
  DeepSpeed gathers them module by module in the forward.

DeepSpeed keeps its master weights in private attributes. They are touched in this file only, and
``check_engine`` fails by name where a version of DeepSpeed lacks one.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tracer.schedules import Schedule
from tracer.teacher import MovingAverageTeacher, cast_rule, is_shared

# What is read of each kind of optimizer that deepspeed.initialize may return. The first names the
# float32 masters, the second the parameters that they belong to, the third their flat buffers.
_PRIVATE = {
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
_PRIVATE_PARAMETER = (
    "ds_tensor",
    "ds_shape",
    "ds_numel",
    "ds_process_group",
    "partition_numel",
    "convert_to_zero_parameters",
)
_HUNG_ON_MODULES = {"_external_params", "_original_parameters", "all_parameters", "pre_bwd_fn", "post_bwd_fn"}


class _Place(NamedTuple):
    """A tensor inside the masters: elements of ``masters[master]`` from ``start`` on."""

    master: int
    start: int
    shape: torch.Size


def zero_teacher(
    engine: Any,
    schedule: Schedule,
    *,
    dtype: torch.dtype | None = None,
    own_stream: bool = False,
) -> ZeroTeacher:
    """The teacher of a DeepSpeed engine; see :class:`ZeroTeacher`."""
    kind = check_engine(engine)
    if own_stream and kind == "DeepSpeedZeroOptimizer_Stage3":
        raise ValueError("own_stream isn't offered at ZeRO stage 3: DeepSpeed gathers on streams of its own")
    teacher = {
        "DeepSpeedZeroOptimizer": _ShardedTeacher,
        "BF16_Optimizer": _ShardedTeacher,
        "DeepSpeedZeroOptimizer_Stage3": _PartitionedTeacher,
    }.get(kind, _ReplicatedTeacher)
    return teacher(engine, kind, schedule, dtype, own_stream)


def check_engine(engine: Any) -> str:
    """Name of the engine's kind of optimizer, one of those that the teacher can follow.

    Raises:
        RuntimeError: the installed DeepSpeed lacks an attribute that is needed, or the engine runs
            in a mode whose master weights can't be read; the message names it.
    """
    version = f"DeepSpeed {deepspeed.__version__}"
    for name in ("was_step_applied", "zero_optimization_stage", "module", "optimizer"):
        if not hasattr(engine, name):
            raise RuntimeError(f"{version}: its engine has no {name!r}; install deepspeed==0.19.8")
    optimizer = engine.optimizer
    kinds = [c.__name__ for c in type(optimizer).__mro__]
    kind = next((k for k in kinds if k in _PRIVATE), "")
    if not kind:
        if isinstance(optimizer, torch.optim.Optimizer) and engine.zero_optimization_stage() == 0:
            return "torch"
        raise RuntimeError(
            f"{version}: the teacher can't read the master weights of a {kinds[0]}; it knows "
            f"{', '.join(_PRIVATE)} and torch optimizers at stage 0"
        )
    for name in _PRIVATE[kind]:
        if not hasattr(optimizer, name):
            raise RuntimeError(
                f"{version}: {kind} has no {name!r}, where the teacher finds the master weights; "
                "install deepspeed==0.19.8"
            )
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        for param in engine.module.parameters():
            for name in _PRIVATE_PARAMETER:
                if not hasattr(param, name):
                    raise RuntimeError(
                        f"{version}: a stage 3 parameter has no {name!r}; install deepspeed==0.19.8"
                    )
    for index, master in enumerate(_masters(engine, kind)):
        if master.dtype is not torch.float32:
            raise RuntimeError(
                f"the master weights of group {index} are {master.dtype}: an average needs them in float32, "
                "remove fp16_master_weights_and_grads / bf16_master_weights_and_grads from the configuration"
            )
        if master.numel() == 0:
            raise RuntimeError(
                f"the master weights of group {index} are swapped out: the teacher needs them in memory "
                '(offload_optimizer device "cpu" or "none")'
            )
    return kind


def _masters(engine: Any, kind: str) -> list[Tensor]:
    """The float32 tensors that this rank's optimizer steps, as they are now."""
    if kind == "torch":
        return []
    masters = getattr(engine.optimizer, _PRIVATE[kind][0])
    if kind == "FP16_UnfusedOptimizer":  # a list of tensors per group
        return [tensor for group in masters for tensor in group]
    return list(masters)


class ZeroTeacher(MovingAverageTeacher):
    """:class:`MovingAverageTeacher` of a DeepSpeed engine, any ZeRO stage; same methods.

    ``module``, ``encode`` and ``gather`` are collective at stages 1 to 3: call them on every rank.
    ``update`` communicates nothing, and moves only if the last ``engine.step()`` took a step: not in
    the midst of accumulating gradients, not after an overflow. Parameters that the optimizer doesn't
    have (frozen ones) are the student's own, not copied. Buffers are each rank's own, as in the engine.

    Args:
        engine: what ``deepspeed.initialize`` returned, with its optimizer.
        kind: what :func:`check_engine` said of it.
        schedule: how far to move after each step.
        dtype: dtype of the teacher's weights; None is the engine's own.
        own_stream: as for :class:`MovingAverageTeacher`; not at stage 3, where DeepSpeed has its own.
    """

    def __init__(
        self, engine: Any, kind: str, schedule: Schedule, dtype: torch.dtype | None, own_stream: bool
    ) -> None:
        self._engine, self._kind = engine, kind
        self._places: dict[str, _Place] = {}  # key of an average -> its master
        self._rule = cast_rule(engine.module, dtype)
        self._stale = False
        names = {id(p): name for name, p in engine.module.named_parameters()}
        groups = [] if kind == "torch" else getattr(engine.optimizer, _PRIVATE[kind][1])
        own = self._parameters([[(names[id(p)], p) for p in group] for group in groups])
        module = _skeleton(engine.module, {id(p): own[name] for name, p in engine.module.named_parameters()})
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self._rule(buffer))
        self._begin(engine.module, self._prepare(module), schedule, own_stream)
        for name in self._tensors:
            if name not in own:  # a buffer
                self._hold(name)
        self._hold_parameters()

    def _parameters(self, groups: list[list[tuple[str, Any]]]) -> dict[str, Any]:
        """The teacher's parameter for each of the student's; fills the places of the masters."""
        raise NotImplementedError

    def _prepare(self, module: nn.Module) -> nn.Module:
        return module

    def _hold_parameters(self) -> None:
        """Put under the average what this rank's optimizer steps."""
        raise NotImplementedError

    def _clone(self, param: nn.Parameter) -> nn.Parameter:
        if is_shared(param, self._rule):
            return param
        return nn.Parameter(param.detach().to(self._rule(param), copy=True), requires_grad=False)

    def _stepped(self) -> bool:
        return bool(self._engine.was_step_applied())

    def _student(self, key: str) -> Tensor:
        place = self._places.get(key)
        if place is None:
            return super()._student(key)
        master = _masters(self._engine, self._kind)[place.master].detach()
        if master.shape == place.shape:
            return master
        return master.narrow(0, place.start, place.shape.numel()).view(place.shape)

    def update(self, step: int) -> bool:
        moved = super().update(step)
        self._stale |= moved
        return moved

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._stale = True

    def gather(self) -> dict[str, Tensor]:
        full = self._gather_parameters()
        state = {}
        for key, name in self._keys.items():
            tensor = full[name] if name in full else self._averages.get(name, self._tensors[name])
            state[key] = tensor.float() if tensor.is_floating_point() else tensor
        return state

    def _gather_parameters(self) -> dict[str, Tensor]:
        """Name -> whole parameter, of those that the module doesn't hold whole and in float32."""
        return {}

    def _shard(self) -> str:
        stage = self._engine.zero_optimization_stage()
        return f"ZeRO stage {stage}, rank {dist.get_rank()} of {dist.get_world_size()}"


class _ReplicatedTeacher(ZeroTeacher):
    """Stage 0: every rank holds every master, whole and in the parameters' own shapes."""

    def _parameters(self, groups: list[list[tuple[str, Any]]]) -> dict[str, Any]:
        index = 0
        for number, group in enumerate(groups):
            flat = self._kind == "FP16_Optimizer"
            starts = [0, *accumulate(p.numel() for _, p in group)]
            for (name, p), start in zip(group, starts, strict=False):
                self._places[name] = _Place(number, start, p.shape) if flat else _Place(index, 0, p.shape)
                index += 1
        return {name: self._clone(p) for name, p in self._engine.module.named_parameters()}

    def _hold_parameters(self) -> None:
        params = dict(self._engine.module.named_parameters())
        for name in params if self._kind == "torch" else self._places:
            self._hold(name)


class _ShardedTeacher(ZeroTeacher):
    """Stages 1 and 2: each rank holds a slice of the masters of each parameter group, flat."""

    def _parameters(self, groups: list[list[tuple[str, Any]]]) -> dict[str, Any]:
        optimizer = self._engine.optimizer
        own = {}
        self._layout: list[list[tuple[str, int, torch.Size]]] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []  # all ranks' shards, and this rank's slice of it
        for index, group in enumerate(groups):
            if self._kind == "DeepSpeedZeroOptimizer":  # it may pad between parameters
                starts = list(optimizer.round_robin_bit16_offsets[index])
            else:
                starts = [0, *accumulate(p.numel() for _, p in group)][:-1]
            master = _masters(self._engine, self._kind)[index]
            source = getattr(optimizer, _PRIVATE[self._kind][2])[index]
            buffer = source.detach().to(self._rule(group[0][1]), copy=True)
            rank = dist.get_rank(self._group(index))
            shard = buffer.narrow(0, rank * master.numel(), master.numel())
            self._places[f"group {index}"] = _Place(index, 0, master.shape)
            self._buffers.append((buffer, shard))
            self._layout.append([(name, i, p.shape) for (name, p), i in zip(group, starts, strict=True)])
            for name, start, shape in self._layout[-1]:
                view = buffer.narrow(0, start, shape.numel()).view(shape)
                own[name] = nn.Parameter(view, requires_grad=False)
        frozen = {n: p for n, p in self._engine.module.named_parameters() if n not in own}
        return own | {name: self._clone(p) for name, p in frozen.items()}

    def _group(self, index: int) -> Any:
        return self._engine.optimizer.real_dp_process_group[index]

    def _hold_parameters(self) -> None:
        for index, (_, shard) in enumerate(self._buffers):
            key = f"group {index}"
            if shard.dtype is torch.float32 and shard.device == self._student(key).device:
                self._averages[key] = shard
            else:  # another dtype, or masters offloaded to the CPU
                self._averages[key] = self._student(key).to(torch.float32, copy=True)
                self._low[key] = shard
        self._stale = True

    def _refresh(self) -> None:
        if self._stale:
            for index, (buffer, shard) in enumerate(self._buffers):
                _all_gather(buffer, shard, self._group(index))
        self._stale = False

    def _gather_parameters(self) -> dict[str, Tensor]:
        full = {}
        for index, layout in enumerate(self._layout):
            average = self._averages[f"group {index}"]
            buffer = average.new_empty(self._buffers[index][0].numel())
            _all_gather(buffer, average, self._group(index))
            for name, start, shape in layout:
                full[name] = buffer.narrow(0, start, shape.numel()).view(shape).to("cpu", copy=True)
        return full


class _PartitionedTeacher(ZeroTeacher):
    """Stage 3: each rank holds a piece of every parameter, of the masters and of the teacher's."""

    def _parameters(self, groups: list[list[tuple[str, Any]]]) -> dict[str, Any]:
        own = {}
        p: Any
        for index, group in enumerate(groups):
            start = 0
            for name, p in group:
                self._places[name] = _Place(index, start, torch.Size([p.partition_numel()]))
                start += p.partition_numel()
        for name, p in self._engine.module.named_parameters():
            if is_shared(p, self._rule):
                own[name] = p
                continue
            # Partitioned by the student's own context, one by one: never the whole model on a rank.
            whole = torch.zeros(p.ds_shape, dtype=self._rule(p), device=p.device)
            mine: Any = nn.Parameter(whole, requires_grad=False)
            p.convert_to_zero_parameters(param_list=[mine])
            mine.ds_persist = False  # else its whole copy would outlive the next update
            mine.ds_tensor.copy_(p.ds_tensor)
            own[name] = mine
        return own

    def _prepare(self, module: nn.Module) -> nn.Module:
        dtype = min((self._rule(p) for p in self._engine.module.parameters()), key=lambda d: d.itemsize)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": None,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
        if dtype is not torch.float32:
            config["bf16" if dtype is torch.bfloat16 else "fp16"] = {"enabled": True}
        self._runner, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
        self._runner.eval()
        return self._runner.module

    def _hold_parameters(self) -> None:
        self._params: dict[str, Any] = dict(self._module.named_parameters())
        for name in self._places:
            piece, master = self._params[name].ds_tensor.data, self._student(name)
            if piece.dtype is torch.float32 and piece.device == master.device:
                piece.copy_(master)
                self._averages[name] = piece
            else:
                self._averages[name] = master.to(torch.float32, copy=True)
                self._low[name] = piece
                piece.copy_(master)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._runner(*args, **kwargs)

    def _gather_parameters(self) -> dict[str, Tensor]:
        full = {}
        for name, p in self._params.items():
            piece = self._averages.get(name, p.ds_tensor.data)
            world = dist.get_world_size(p.ds_process_group)
            buffer = piece.new_empty(piece.numel() * world)
            _all_gather(buffer, piece, p.ds_process_group)
            full[name] = buffer[: p.ds_numel].view(p.ds_shape).to("cpu", copy=True)
        return full


def _all_gather(whole: Tensor, piece: Tensor, group: Any) -> None:
    """All ranks' ``piece``, one after the other, into ``whole``; ``piece`` may be a slice of it."""
    if dist.get_world_size(group) == 1:
        if whole.data_ptr() != piece.data_ptr():
            whole.copy_(piece)
        return
    # The newer name of the same collective, where torch has it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, piece.to(whole.device), group=group)


def _skeleton(model: nn.Module, own: dict[int, Any]) -> nn.Module:
    """Copy of an engine's module in eval mode, without what DeepSpeed hung on it.

    Args:
        model: the engine's module; at stage 3 its parameters are empty.
        own: id of each of its parameters -> the copy's parameter.
    """
    # Children, parents and shared modules are known before any is filled: the copy has their ties.
    memo: dict[int, Any] = dict(own)
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
    return memo[id(model)].eval().requires_grad_(False)


def _is_deepspeed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "deepspeed"
