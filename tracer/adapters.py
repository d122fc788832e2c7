"""R-Adapter: linear adapters that are trained alone, and folded away at the end.

An adapter h(X) = X W + X, with W = 0 at the start, follows the output projection of the attention and the
second linear layer of the MLP in every transformer layer. Everything else is frozen.

    add_adapters(model)                                       # step 0 is the pretrained model, exactly
    average = build_teacher(model, adapter_schedule(steps))   # W̃, the moving average of the adapters alone
    ...                                                       # train; average.update(step) after each step
    for alpha in (0.3, 0.5, 0.8):
        plain = fold(average.gather(), alpha)                 # a state dict without adapters, for open_clip

The adapter of a linear layer is its child ``adapter``, so the key of a tensor in a state dict says what
it folds into: ``transformer.resblocks.0.mlp.c_proj.adapter.weight`` into ``….mlp.c_proj``. Dropout,
normalisation and layer scale that follow a linear layer follow its adapter too, which keeps folding exact.

Three self-ensembles: each adapter is dropped at random in training, W is averaged over the steps, and
``alpha`` interpolates between the pretrained and the adapted model.

Source: R-Adapter (arXiv 2408.05749), which counts W of all ViT-B/16 layers as 13 % of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracer._frozen import multiply_once
from tracer.files import read_tensors, write_tensors
from tracer.recipes import R_ADAPTER
from tracer.schedules import EMA

# Where a layer keeps the last linear map of its attention and of its MLP.
_LAYERS = (
    ("attn.out_proj", "mlp.c_proj"),  # open_clip's own towers
    ("attn.proj", "mlp.fc2"),  # timm: ViT, SigLIP, EVA, PE, Swin
    ("attn.proj", "mlp.w2"),  # timm: ViTamin
    ("attention.output.dense", "output.dense"),  # Hugging Face's text towers: BERT, RoBERTa, XLM-RoBERTa
    ("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"),  # … T5, mT5
    ("self_attn.out_proj", "fc2"),  # … M2M100, NLLB
)
_MARK = ".adapter."  # in the key of every tensor of an adapter
TOWERS = ("visual", "text")


class Adapter(nn.Module):
    """Linear adapter h(X) = X W + X over the last dimension; W is [width, width], or ``down @ up`` of rank r.

    In training the term X W is dropped with probability ``drop`` at each forward pass, for the whole
    batch at once, and otherwise divided by 1 − drop. The draw comes from torch's default generator of the
    input's device: a seed repeats it, and activation checkpointing recomputes the same one. After
    :func:`set_drops` it holds for all forward passes until the next call. A dropped adapter's gradient is zero,
    not absent, so all ranks reduce the same tensors.

    Args:
        width: size of the last dimension.
        rank: r; None for a full W.
        drop: probability p of dropping.
        like: tensor whose dtype and device the parameters get.
    """

    def __init__(self, width: int, rank: int | None, drop: float, like: Tensor) -> None:
        super().__init__()
        self.drop = drop
        self.factor: Tensor | None = None  # of X W in training: 0 or 1 / (1 − drop); None: drawn by each pass
        if rank is None:
            self.weight = nn.Parameter(like.new_zeros(width, width))
        else:  # only one factor is zero: with both, neither would ever get a gradient
            self.down = nn.Parameter(like.new_empty(width, rank).normal_(std=width**-0.5))
            self.up = nn.Parameter(like.new_zeros(rank, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return h(X) of X [..., width], in the same shape and dtype."""
        delta = x @ self.weight if hasattr(self, "weight") else x @ self.down @ self.up
        if self.training:
            one = torch.ones((), device=x.device)  # float32, so that 1/(1−p) isn't rounded; no new dtype
            delta = delta * (F.dropout(one, self.drop) if self.factor is None else self.factor)
        return x + delta

    def extra_repr(self) -> str:
        """Return the settings, for ``print(model)``."""
        return ", ".join(f"{n}={list(p.shape)}" for n, p in self.named_parameters()) + f", drop={self.drop}"


class Share(NamedTuple):
    """The number of parameters that train, and of those that the pretrained model has."""

    adapters: int
    pretrained: int

    def __str__(self) -> str:
        share = self.adapters / self.pretrained
        return f"{self.adapters:,} of {self.pretrained:,} parameters train ({share:.1%})"


def add_adapters(
    model: nn.Module, *, rank: int | None = None, drop: float = R_ADAPTER.drop, towers: Iterable[str] = TOWERS
) -> Share:
    """Add adapters to every transformer layer of an open_clip model and freeze everything else.

    They start at zero: the adapted model computes what the pretrained model does, bit for bit. CoCa
    gets them in its two contrastive towers; its captioning decoder, which a contrastive loss doesn't reach,
    stays as it is, and so do pooling layers such as SigLIP's attention head. A tower that mixes convolutions
    with transformer layers (ViTamin) gets them in the transformer layers.

    Args:
        model: any open_clip model with transformer towers. Changed in place.
        rank: r of W = BA, for few examples; None for a full W.
        drop: probability p with which a training step drops an adapter.
        towers: which of "visual" and "text" get adapters.

    Raises:
        ValueError: the model has adapters already; a tower has no transformer layers that are known; rank
            below 1 or above the width; drop outside [0, 1). The model is unchanged then.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"adapter drop is {drop}: it must be at least 0 and below 1")
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise ValueError("the model has adapters already: add them only once")
    linears = _linears(model, towers)
    for name, linear in linears.items():
        if rank is not None and not 1 <= rank <= linear.out_features:
            raise ValueError(
                f"adapter rank is {rank}: it must be from 1 to {linear.out_features}, the width of {name}"
            )
    pretrained = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    for name, linear in linears.items():
        adapter = Adapter(linear.out_features, rank, drop, linear.weight.detach())
        linear.adapter = adapter.train(linear.training)
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):  # reads out_proj's tensors and never calls it
            parent.register_forward_hook(_after_attention)
        else:
            linear.register_forward_hook(_after_linear)
    multiply_once(model)
    return Share(sum(p.numel() for p in model.parameters()) - pretrained, pretrained)


def set_drops(model: nn.Module, draws: Iterable[float]) -> None:
    """Decide which adapters of ``model`` are dropped in training, from now on until the next call.

    For a batch that takes several forward passes: in micro-batches, or on several ranks, each of which gives the
    same ``draws``.

    Args:
        model: with adapters, or without any.
        draws: a uniform number in [0, 1) for each adapter, in the order of ``model.modules()``; it is dropped
            where the number is below its ``drop``.

    Raises:
        ValueError: there are more or fewer numbers than adapters; some adapters may have been set.
    """
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    for adapter, draw in zip(adapters, draws, strict=True):
        if adapter.factor is None:
            adapter.factor = torch.ones((), device=next(adapter.parameters()).device)
        adapter.factor.fill_(
            0.0 if draw < adapter.drop else 1 / (1 - adapter.drop)
        )  # in place, for torch.compile


# Hooks find the adapter by way of the module that they are called with: a copy of the model uses its own.
def _after_linear(linear: Any, _args: Any, output: Tensor) -> Tensor:
    return linear.adapter(output)


def _after_attention(attention: Any, _args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return attention.out_proj.adapter(output[0]), *output[1:]


def _linears(model: nn.Module, towers: Iterable[str]) -> dict[str, nn.Linear]:
    """Return name -> linear layer that an adapter follows, in the order of the model."""
    # CLIP keeps its text tower in pieces, of which this one holds the layers; the other models have "text".
    paths = {"visual": "visual", "text": "text" if hasattr(model, "text") else "transformer"}
    adapted: dict[str, nn.Linear] = {}
    if not (towers := list(towers)):
        raise ValueError(f"no tower to adapt: choose from {', '.join(TOWERS)}")
    for which in towers:
        if which not in paths:
            raise ValueError(f"unknown tower '{which}': choose from {', '.join(TOWERS)}")
        tower = getattr(model, paths[which], None)
        if tower is None:
            raise ValueError(f"a {type(model).__name__} has no {which} tower: give an open_clip dual encoder")
        in_tower: dict[str, nn.Linear] = {}
        for name, layer in tower.named_modules(prefix=paths[which]):
            for pair in _LAYERS:
                linears = {f"{name}.{path}": x for path in pair if (x := _linear(layer, path)) is not None}
                in_tower |= linears if len(linears) == len(pair) else {}
        if not in_tower:
            kind = type(getattr(tower, "trunk", tower)).__name__
            others = " or ".join(f"'{t}'" for t in TOWERS if t != which)
            raise ValueError(
                f"the {which} tower is a {kind}, which has no transformer layers that R-Adapter knows: "
                f"adapt the {others} tower alone, or choose another method"
            )
        adapted |= in_tower
    return adapted


def _linear(layer: nn.Module, path: str) -> nn.Linear | None:
    child: Any = layer
    for name in path.split("."):
        child = getattr(child, name, None)
    return child if isinstance(child, nn.Linear) else None


def adapter_schedule(total_steps: int, momentum: float = R_ADAPTER.momentum) -> EMA:
    """Return the schedule of W̃ for ``build_teacher``: W̃ ← m W̃ + (1 − m) W after every step."""
    return EMA(total_steps, start=momentum, end=momentum, warmup=0.0, every=1)


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters' part of an adapted model's state dict: all that a run has to keep."""
    return {key: value for key, value in state.items() if _MARK in key}


def load_adapters(model: nn.Module, adapters: Mapping[str, Tensor], drop: float = R_ADAPTER.drop) -> None:
    """Put trained adapters into a model of the same architecture, adding them first if it has none.

    Args:
        model: open_clip model with or without adapters. Changed in place.
        adapters: what :func:`adapter_state` returned; other entries of a state dict are left out.
        drop: as for :func:`add_adapters`, if they are added.

    Raises:
        ValueError: they belong to another architecture, tower or rank; the message names the first difference.
    """
    adapters = adapter_state(adapters)
    if not adapters:
        raise ValueError("there are no adapters to load: the state dict has no entry with '.adapter.'")
    rank = next((value.shape[1] for key, value in adapters.items() if key.endswith(".down")), None)
    visual = [key.startswith("visual.") for key in adapters]
    towers = [t for t, there in (("visual", any(visual)), ("text", not all(visual))) if there]
    expected = {key: value.shape for key, value in adapter_state(model.state_dict()).items()}
    adapted = bool(expected)
    if not adapted:
        for name, linear in _linears(model, towers).items():
            adapter = Adapter(linear.out_features, rank, drop, torch.empty(0, device="meta"))
            expected |= {f"{name}{_MARK}{kind}": p.shape for kind, p in adapter.named_parameters()}
    given = {key: value.shape for key, value in adapters.items()}
    for key in sorted(given.keys() | expected.keys()):
        if given.get(key) != expected.get(key):
            saved, here = (list(s[key]) if key in s else "missing" for s in (given, expected))
            raise ValueError(
                f"these adapters belong to another model: '{key}' is {saved} in them and {here} here; "
                "load them into the architecture that they were trained in"
            )
    if not adapted:
        add_adapters(model, rank=rank, drop=drop, towers=towers)
    model.load_state_dict(adapters, strict=False)


def save_adapters(state: Mapping[str, Tensor], path: Path | str, model: str) -> None:
    """Write the adapters in a state dict as a safetensors file that names its open_clip ``model``.

    Raises:
        OSError: the file cannot be written.
    """
    write_tensors(Path(path), adapter_state(state), {"model": model})


def read_adapters(path: Path | str, model: str) -> dict[str, Tensor]:
    """Return the adapters in a file of :func:`save_adapters`.

    They fit ``load_adapters``, and ``fold(weights | adapters, alpha)``.

    Raises:
        ValueError: the file does not exist or holds no adapters, or they were trained in another architecture
            than ``model``; the shapes of adapters alone cannot tell ViT-B-32 from ViT-B-16.
    """
    adapters, metadata = read_tensors(Path(path))
    saved_model = metadata.get("model")
    if saved_model is None or not adapter_state(adapters):
        raise ValueError(f"'{path}' holds no adapters: give a run's adapters.safetensors")
    if saved_model != model:
        raise ValueError(f"the adapters in '{path}' belong to {saved_model}, not to {model}: load them there")
    return adapters


def fold(state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Fold α-scaled adapters into the linear layers before them: W_rep = W_org (α W + I), and the bias.

    ``state`` is not changed, and only the folded layers are copied: a sweep over α may fold it again.

    Args:
        state: state dict of an adapted model, as ``model.state_dict()`` or a teacher's ``gather()``.
        alpha: in [0, 1]; 0 is the pretrained model. Published: 0.5 classification, 0.8 retrieval.

    Returns:
        A state dict without adapters, dtypes as given, that the plain open_clip model loads.

    Raises:
        ValueError: α outside [0, 1]; no adapters (folded already); adapters that fit no linear layer here.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: it must be from 0 (pretrained) to 1 (adapted)")
    adapters = adapter_state(state)
    if not adapters:
        raise ValueError("there are no adapters to fold: these weights are folded already, or never had any")
    plain = {key: value for key, value in state.items() if key not in adapters}
    for name in dict.fromkeys(key.rpartition(_MARK)[0] for key in adapters):
        delta, down, up = (adapters.get(f"{name}{_MARK}{kind}") for kind in ("weight", "down", "up"))
        if delta is None:
            if down is None or up is None:
                raise ValueError(f"half of the adapter of '{name}' is missing: give its 'down' and its 'up'")
            delta = down.float() @ up.float()
        width = delta.shape[1]
        if f"{name}.weight" not in plain or plain[f"{name}.weight"].shape[0] != width:
            raise ValueError(
                f"these adapters belong to another model: it has no '{name}' of width {width}; "
                "fold them into the architecture that they were trained in"
            )
        # The formula has row vectors, X W_org; a linear layer keeps W_orgᵀ, [width, in].
        for tensor in (f"{name}.weight", f"{name}.bias"):
            if tensor in plain:
                old = plain[tensor].detach()
                plain[tensor] = (old.float() + alpha * (delta.float().T @ old.float())).to(old.dtype)
    return plain
