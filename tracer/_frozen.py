"""Attention with frozen weights on a CPU, multiplied by as few products as attention that trains.

torch's ``nn.MultiheadAttention`` turns a batch [B, L, D] into a transposed view [L, B, D] and multiplies it by
its input projection. Of a matrix that asks for gradients torch makes one product, for which it copies the
activations. Of a matrix that asks for none it makes L products, and in bfloat16 copies the matrix L times. So
the activations come laid out as the view wants them, and any matrix is multiplied once, in the backward pass
too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def multiply_once(model: nn.Module) -> None:
    """Let the attention layers of ``model`` multiply by each matrix once on a CPU, whether it is frozen or trains.

    Freezing then changes no rounding. A second call changes nothing, and a copy of the model does the same.

    Args:
        model: changed in place; its state dict keeps its keys.
    """
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and _lay_out not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_lay_out)


def _lay_out(attention: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the arguments with query, key and value in the order of their transposed views.

    None leaves them alone. What is one tensor stays one: torch then multiplies it by all three projections at
    once.
    """
    if len(args) < 3 or not attention.batch_first:
        return None
    query, key, value = args[:3]
    asked = torch.is_grad_enabled() and (query.requires_grad or attention.out_proj.weight.requires_grad)
    other_way = not (attention.training or asked)  # torch's own for evaluation, which wants [B, L, D]
    if other_way or query.dim() != 3 or query.device.type != "cpu":
        return None
    laid_query = _sequence_first(query)
    laid_key = laid_query if key is query else _sequence_first(key)
    laid_value = laid_key if value is key else _sequence_first(value)
    return laid_query, laid_key, laid_value, *args[3:]


def _sequence_first(x: Tensor) -> Tensor:
    """Return the same [B, L, D], whose transposed view [L, B, D] is contiguous."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)
