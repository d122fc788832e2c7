"""The float32 weights of a DeepSpeed engine: where each rank keeps its part of every parameter.

DeepSpeed keeps its master weights in private attributes. They are touched in this file only, and
``Masters`` refuses a version of DeepSpeed that lacks one, naming the attribute.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

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
_REMEDY = "install deepspeed==0.19.8"


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

        It is empty where other ranks have all of the parameter; padding is left out.
        """
        _, part, begin = self.where(name)
        return self.master(name).detach().view(-1)[part], begin

    def where(self, name: str) -> tuple[int, slice, int]:
        """Return where this rank keeps its part of a parameter: the number of the master, the elements of the
        flat master, and at which element of the parameter they begin. −1: the optimizer steps the parameter.
        """
        if self.kind == "torch":
            return -1, slice(0, self._stepped(name).numel()), 0
        if self.kind == "DeepSpeedZeroOptimizer_Stage3":
            place = self.piece_places()[name]
            param = self.engine.module.get_parameter(name)
            begin = dist.get_rank(param.ds_process_group) * place.shape.numel()
            length = max(0, min(place.shape.numel(), param.ds_numel - begin))
            return place.master, slice(place.start, place.start + length), begin
        if self.kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
            return self._where_in_shard(name)
        place = self.whole_places()[name]
        return place.master, slice(place.start, place.start + place.shape.numel()), 0

    def _where_in_shard(self, name: str) -> tuple[int, slice, int]:
        for number, (group, (_, starts)) in enumerate(zip(self.groups, self.flat_groups(), strict=True)):
            size = self.tensors()[number].numel()
            first = dist.get_rank(self.process_group(number)) * size
            for (other, p), start in zip(group, starts, strict=True):
                if other == name:
                    begin, end = max(start, first), min(start + p.numel(), first + size)
                    mine = slice(begin - first, end - first) if end > begin else slice(0, 0)
                    return number, mine, begin - start
        raise KeyError(name)

    def moments(self, name: str) -> dict[str, Any]:
        """Return the optimizer's state of the master that holds a parameter: flat tensors, and the step.

        It is the optimizer's own dictionary, empty before the first step.
        """
        return self.engine.basic_optimizer.state[self.master(name)]

    def master(self, name: str) -> Tensor:
        """Return the tensor that the optimizer steps and that holds a parameter, or this rank's part of it."""
        number = self.where(name)[0]
        return self._stepped(name) if number < 0 else self.tensors()[number]

    def publish(self) -> None:
        """Set the weights that the model computes with to the masters; call it on every rank."""
        if self.kind == "DeepSpeedZeroOptimizer_Stage3":
            for name, place in self.piece_places().items():
                self.engine.module.get_parameter(name).ds_tensor.data.copy_(self.read(place))
            self.engine.empty_partition_cache()  # whole copies of small weights are of before
        elif self.kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
            for number, (flat, _) in enumerate(self.flat_groups()):
                ranks, master = self.process_group(number), self.tensors()[number].detach()
                shard = flat.narrow(0, dist.get_rank(ranks) * master.numel(), master.numel())
                shard.copy_(master)
                all_gather(flat, shard, ranks)
        elif self.kind != "torch":
            for name, place in self.whole_places().items():
                self.engine.module.get_parameter(name).data.copy_(self.read(place))

    def _stepped(self, name: str) -> Any:
        return self.engine.module.get_parameter(name)

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


def _require(owner: Any, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if not hasattr(owner, name):
            raise RuntimeError(
                f"DeepSpeed {deepspeed.__version__}: {what} has no {name!r}, which the teacher reads; {_REMEDY}"
            )


def _starts(group: list[tuple[str, Any]]) -> list[int]:
    """Return where each parameter starts in the group's flat tensor."""
    return [0, *accumulate(p.numel() for _, p in group)][:-1]


def all_gather(whole: Tensor, piece: Tensor, group: Any) -> None:
    """Write all ranks' ``piece``, one after the other, into ``whole``; ``piece`` may be a slice of it."""
    if dist.get_world_size(group) == 1:
        if whole.data_ptr() != piece.data_ptr():
            whole.copy_(piece)
        return
    # The newer name of the same collective, where torch has it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, piece.to(whole.device), group=group)
