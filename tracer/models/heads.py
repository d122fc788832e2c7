"""Modules that train beside the towers of a baseline: a linear classifier, the fusion of two models' features."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from tracer.errors import UserError
from tracer.models.weights import CLASS_HEAD

FUSION = "feature_fusion"  # name of the module in a model; no file of weights holds it
START_HEAD = "class_head_start.safetensors"  # the classifier of a run's start, in the run's folder

State = Mapping[str, Tensor]


class ClassHead(nn.Module):
    """A linear classifier on image features: logits u Wᵀ, without a bias.

    The names of the classes are a buffer, so that a state dict says which class a row of W belongs to.

    Args:
        weight: W [C, D] float32.
        classes: name of each row; as they are saved, UTF-8 of a JSON list, uint8.
    """

    def __init__(self, weight: Tensor, classes: Sequence[str] | Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        if not isinstance(classes, Tensor):
            classes = torch.tensor(list(json.dumps(list(classes)).encode()), dtype=torch.uint8)
        self.names: Tensor
        self.register_buffer("names", classes.to(weight.device))

    @property
    def classes(self) -> list[str]:
        """The name of each row."""
        return json.loads(bytes(self.names.tolist()).decode())

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits [N, C] of L2-normalised features [N, D], in float32 under autocast too."""
        with torch.autocast(features.device.type, enabled=False):
            return features.float() @ self.weight.float().T

    def rows(self, classes: Iterable[str]) -> Tensor:
        """Return the rows of W of some classes, in their order, float32.

        Raises:
            UserError: the classifier was not trained on a class.
        """
        row = {name: n for n, name in enumerate(self.classes)}
        classes = list(classes)
        unknown = [name for name in classes if name not in row]
        if unknown:
            raise UserError(
                f"these weights have a classifier of {len(row)} classes, and '{unknown[0]}' is not one: leave "
                "out the sets with other classes, or evaluate weights that were trained without --classifier"
            )
        return self.weight.float()[[row[name] for name in classes]]


class Fusion(nn.Module):
    """The fusion encoders of augmented feature distillation: a linear map of both models' features for each tower.

    Source: CLIP-KD (arXiv 2307.12732, section 3.3). Its scale starts at 1/0.07, as in the published code; there
    the exponential of the trained logarithm is missing.

    Args:
        width: D of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(2 * width, width), nn.Linear(2 * width, width)
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return fused image features and text features [N, D], L2-normalised float32, and their scale.

        Args:
            student, teacher: image features and text features [N, D] of each.
        """
        fused = [
            F.normalize(linear(torch.cat([own, other.detach()], 1).to(linear.weight.dtype)).float(), dim=1)
            for linear, own, other in zip((self.image, self.text), student, teacher, strict=True)
        ]
        return fused[0], fused[1], self.log_scale.float().exp().squeeze()


def class_head(model: nn.Module) -> ClassHead | None:
    """Return the linear classifier of a model, if it has one."""
    return getattr(model, CLASS_HEAD, None)


def set_class_head(model: Any, head: ClassHead | None) -> None:
    """Give a model a linear classifier in place of the one it has, or None."""
    if hasattr(model, CLASS_HEAD):
        delattr(model, CLASS_HEAD)
    if head is not None:
        setattr(model, CLASS_HEAD, head.to(next(model.parameters()).device))


def head_state(state: State) -> dict[str, Tensor]:
    """Return the part of a state dict that is the classifier's; empty where there is none."""
    return {name: value for name, value in state.items() if name.startswith(f"{CLASS_HEAD}.")}


def head_in(state: State) -> ClassHead | None:
    """Return the linear classifier that a state dict holds, if there is one."""
    own = head_state(state)
    return ClassHead(own[f"{CLASS_HEAD}.weight"], own[f"{CLASS_HEAD}.names"]) if own else None


def load_state(model: nn.Module, state: State) -> None:
    """Load a state dict into a model, whose classifier comes and goes with that of the state dict."""
    set_class_head(model, head_in(state))
    model.load_state_dict(dict(state))


def read_head(path: Path) -> dict[str, Tensor]:
    """Return the classifier's part of a safetensors file; empty where the file has none, or is of another kind."""
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(f"{CLASS_HEAD}.")]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except Exception:  # another kind of file, of which the loader of the towers speaks
        return {}


def start_head(folder: Path) -> dict[str, Tensor]:
    """Return the classifier that a run began with; empty for a run without one."""
    return read_head(folder / START_HEAD) if (folder / START_HEAD).is_file() else {}


def without_fusion(state: State) -> dict[str, Tensor]:
    """Return a state dict without the fusion encoders, which serve the training alone."""
    return {name: value for name, value in state.items() if not name.startswith(f"{FUSION}.")}
