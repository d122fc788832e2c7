"""Freeze parts of a dual encoder: lower blocks, a whole tower, or all but the projections; lock its BatchNorm."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tracer._frozen import multiply_once
from tracer.errors import UserError
from tracer.words import counted

Part = Literal["none", "image", "text", "all_but_projections"]

# Where a tower keeps its blocks, one after the other; timm's image towers describe their own.
_BLOCKS = {
    "image": ("visual.transformer.resblocks",),
    "text": (
        "transformer.resblocks",  # open_clip's own towers
        "text.transformer.resblocks",
        "text.transformer.encoder.layer",  # Hugging Face's: BERT, RoBERTa, XLM-RoBERTa
        "text.transformer.encoder.block",  # … T5, mT5
        "text.transformer.encoder.layers",  # … M2M100, NLLB
    ),
}
# Parts of the names of what comes after the blocks; the rest of a tower comes before them.
_AFTER = {"ln_post", "proj", "attn_pool", "attnpool", "head", "ln_final", "text_projection", "pooler"}
_AFTER |= {"final_layer_norm", "layer_norm", "text_decoder"}
_AFTER_IN_TIMM = re.compile(r"^(norm|fc_norm|head|fc|classifier|attn_pool|final_conv)\b")
_PROJECTIONS = {
    "image": re.compile(
        r"^visual\.(proj|head|attnpool\.c_proj|trunk\.head(\.fc)?(?=\.(weight|bias)$))(\.|$)"
    ),
    "text": re.compile(r"^((text\.)?text_projection|text\.proj)(\.|$)"),
}
_NEITHER = ("logit_scale", "logit_bias")


def freeze(model: nn.Module, part: Part = "none", image_blocks: int = 0, text_blocks: int = 0) -> None:
    """Let a part of an open_clip model ask for no gradients; what is frozen already stays so.

    Args:
        model: any open_clip dual encoder. Changed in place.
        part: "image" or "text" for a whole tower with its projection (LiT, arXiv 2111.07991, freezes the image
            tower), "all_but_projections" for all but the last linear map of each tower. The logit scale trains
            in any case.
        image_blocks, text_blocks: how many of the lowest blocks of a tower are frozen, with all that comes
            before them (embeddings, stem); 0 freezes nothing.

    Raises:
        UserError: the tower has no blocks that are known, or fewer; or it has no projection. The model is
            unchanged then.
    """
    names: list[str] = []
    for which, count in (("image", image_blocks), ("text", text_blocks)):
        if part == which:
            names += _tower(model, which)
        elif part == "all_but_projections":
            projection = [name for name in _tower(model, which) if _PROJECTIONS[which].match(name)]
            if not projection:
                raise UserError(
                    f"the {which} tower of this model has no linear projection that could train alone: "
                    "choose another --freeze"
                )
            names += [name for name in _tower(model, which) if name not in projection]
        elif count:
            names += _lowest_blocks(model, which, count)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    multiply_once(model)


def _tower(model: nn.Module, which: str) -> list[str]:
    """Return the names of a tower's parameters."""
    names = [name for name, _ in model.named_parameters() if name not in _NEITHER]
    return [name for name in names if name.startswith("visual.") == (which == "image")]


def _lowest_blocks(model: nn.Module, which: str, count: int) -> list[str]:
    groups = _timm_groups(model) if which == "image" and hasattr(model.visual, "trunk") else None
    groups = groups or _groups(model, which)
    if len(groups) < 2:
        raise UserError(
            f"the blocks of this model's {which} tower are not known: freeze it as a whole with "
            f"--freeze {which}, or leave --freeze_{which}_blocks out"
        )
    if count > len(groups) - 1:
        raise UserError(
            f"--freeze_{which}_blocks is {count}: the {which} tower has {counted(len(groups) - 1, 'block')} "
            f"(--freeze {which} freezes all of it)"
        )
    return [name for group in groups[: count + 1] for name in group]


class Chain(NamedTuple):
    """A tower, or its beginning, as modules of which each is called with what the one before it returns."""

    before: list[str]  # names of the parameters that come before the modules
    paths: list[str]  # of the modules


def chain_of(model: nn.Module, which: str) -> Chain | None:
    """Return the blocks of open_clip's own towers, a tower of which nothing trains in one piece, else None."""
    whole = "visual" if which == "image" else "text"
    tower = _submodule(model, whole)
    if isinstance(tower, nn.Module) and not any(p.requires_grad for p in tower.parameters()):
        return Chain([], [whole])
    paths = [
        path for path in _block_paths(model, which) if ".encoder." not in path
    ]  # Hugging Face's return tuples
    if not paths:
        return None
    return Chain(_groups(model, which)[0], paths)


def _block_paths(model: nn.Module, which: str) -> list[str]:
    """Return the paths of a tower's blocks in their order; timm's image towers describe their own."""
    tower: Any = getattr(model, "visual", None)
    if which == "image" and hasattr(tower, "layer1"):  # open_clip's ResNets
        return [f"visual.layer{n}" for n in range(1, 5)]
    lists = [(path, _submodule(model, path)) for path in _BLOCKS[which]]
    return [f"{path}.{n}" for path, layers in lists if layers is not None for n in range(len(layers))]


def _groups(model: nn.Module, which: str) -> list[list[str]]:
    """Return the names of the parameters before the blocks, then those of each block."""
    blocks = [f"{path}." for path in _block_paths(model, which)]
    if not blocks:
        return []
    names = _tower(model, which)
    before = [n for n in names if not n.startswith(tuple(blocks)) and not _AFTER & set(n.split("."))]
    return [before, *([name for name in names if name.startswith(block)] for block in blocks)]


def _timm_groups(model: Any) -> list[list[str]]:
    trunk = model.visual.trunk
    groups = group_parameters(trunk, trunk.group_matcher())
    in_order = [[name for name in groups[n] if not _AFTER_IN_TIMM.match(name)] for n in sorted(groups)]
    return [[f"visual.trunk.{name}" for name in group] for group in in_order if group]


def _submodule(model: nn.Module, path: str) -> Any:
    child: Any = model
    for name in path.split("."):
        child = getattr(child, name, None)
    return child


class _Locked:
    """Mixed into the class of a BatchNorm layer: it stays in evaluation mode."""

    def train(self, _mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]


def lock_batchnorm(model: nn.Module, *, all_layers: bool) -> None:
    """Keep BatchNorm layers in evaluation mode, so that their statistics neither change nor depend on the batch.

    Args:
        model: changed in place; its state dict keeps its keys.
        all_layers: lock every layer; otherwise only those of which no parameter trains. Gains and biases that
            are not frozen still train.
    """
    for name, module in model.named_modules():
        if (
            isinstance(module, _BatchNorm)
            and not isinstance(module, _Locked)
            and (all_layers or _frozen(model, name))
        ):
            kind = type(module)
            module.__class__ = type(f"Locked{kind.__name__}", (_Locked, kind), {})
            module.eval()


def _frozen(model: nn.Module, name: str) -> bool:
    """Return whether no parameter of a layer trains; of a layer without parameters, of the module around it."""
    parameters = list(model.get_submodule(name).parameters())
    if not parameters and name:
        return _frozen(model, name.rpartition(".")[0])
    return not any(parameter.requires_grad for parameter in parameters)


def locked_buffers(model: nn.Module) -> list[str]:
    """Return the names of the statistics that :func:`lock_batchnorm` has locked."""
    locked = [(name, module) for name, module in model.named_modules() if isinstance(module, _Locked)]
    return [f"{name}.{buffer}" for name, module in locked for buffer, _ in module.named_buffers()]  # type: ignore[attr-defined]


def trained_batchnorm(model: nn.Module) -> str | None:
    """Return the name of the first BatchNorm layer that is not locked, or None."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _Locked):
            return name
    return None
