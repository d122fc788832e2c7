"""The moving average of a plain module, whole in this process."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tracer._average import Average, cast_rule, is_shared


class PlainAverage(Average):
    """Average whose module is a deep copy of the student, and holds the averages where it is float32.

    Args:
        model: the student, also as wrapped by ``DistributedDataParallel`` or ``torch.compile``.
        dtype: of the module; None is float32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        model = _unwrapped(model)
        _refuse_sharded(model)
        rule = cast_rule(model, dtype or torch.float32)
        shared: dict[int, Any] = {id(p): p for p in model.parameters() if is_shared(p, rule)}
        module = copy.deepcopy(model, shared).eval().requires_grad_(False)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.to(rule(tensor))
        super().__init__(model, module)
        for name in self._tensors:
            self.follow(name)


def _refuse_sharded(model: nn.Module) -> None:
    """Raise ValueError for a module whose weights torch's own sharding divides among the ranks."""
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        kind: str | None = next((k for k in ("FSDPModule", "FullyShardedDataParallel") if k in kinds), None)
        if kind is None and any(type(p).__name__ == "DTensor" for p in module.parameters(recurse=False)):
            kind = "DTensor"
        if kind is not None:
            which = {"FSDPModule": "FSDP2 (fully_shard)", "FullyShardedDataParallel": "FSDP"}.get(kind, kind)
            raise ValueError(
                f"the model is sharded by {which} ('{name or type(module).__name__}'): the teacher follows plain "
                "modules, DistributedDataParallel and DeepSpeed engines of any ZeRO stage: shard the weights "
                "with DeepSpeed"
            )


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):  # by torch.compile
            model = compiled
        else:
            return model
