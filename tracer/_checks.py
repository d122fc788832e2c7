"""What the loss refuses: one line for each refusal, naming the thing and the remedy."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tracer.kernels._processor import mkl_knows_this_processor
from tracer.kernels.contrastive import IMPLEMENTATIONS, Options

Labels: TypeAlias = Tensor | Sequence[int]  # a NumPy array serves as a sequence

IMPLS = ("auto", *IMPLEMENTATIONS)
CONTRASTS = ("softmax", "sigmoid")
# Up to this many entries of the logit matrix (512 x 512, 1 MiB in float32) the definition is faster on a CPU than
# the tiled walk, which computes the logits twice, and its memory is as bounded. The contrastive term alone, of
# which the definition stores fewer matrices, stays there up to 768 x 768: its walk calls more operations of torch.
_SMALL, _SMALL_ALONE = 2**18, 768**2
# Float32 products of the definition go to MKL, those of the walk to the library that knows the processor. Where
# that is another, the walk is ahead from 362 x 362 on (docs/losses.md).
_SMALL_FLOAT32 = _SMALL_ALONE if mkl_knows_this_processor() else 2**17


def check_numbers(
    margin: float,
    smoothing: float,
    teacher_temperature: float,
    weights: dict[str, float],
    impl: str,
    caller: str = "contrastive_loss",
) -> None:
    """Refuse options out of their range and an unknown implementation.

    The message begins with what the user calls, ``caller``.
    """
    if impl not in IMPLS:
        raise ValueError(f"{caller}: unknown impl {impl!r}; choose one of {', '.join(IMPLS)}")
    if not 0 <= margin < math.inf:
        raise ValueError(f"{caller}: margin must be a finite number >= 0, got {margin}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"{caller}: smoothing must lie in [0, 1), got {smoothing}")
    if not 0 < teacher_temperature < math.inf:
        raise ValueError(
            f"{caller}: teacher_temperature must be a finite number > 0, got {teacher_temperature}"
        )
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{caller}: weight {name} must be a finite number >= 0, got {weight}")


def with_form(
    options: Options,
    contrast: str,
    directions: tuple[float, float],
    logit_bias: Tensor | float | None,
    teacher_logit_bias: Tensor | float | None,
    caller: str = "contrastive_loss",
) -> Options:
    """Return the options with the form of the contrastive term, once it is known that they fit together."""
    if contrast not in CONTRASTS:
        raise ValueError(f"{caller}: unknown contrast {contrast!r}; choose one of {', '.join(CONTRASTS)}")
    rows, cols = _weights(directions, caller)
    sigmoid = contrast == "sigmoid"
    if sigmoid and options.smoothing:
        raise ValueError(
            f"{caller}: smoothing = {options.smoothing} has no meaning for contrast='sigmoid', whose "
            "targets are those of single pairs; use smoothing=0"
        )
    if sigmoid and (rows, cols) != (0.5, 0.5):
        raise ValueError(
            f"{caller}: directions = {directions} have no meaning for contrast='sigmoid', which looks at "
            "each pair once; leave them out"
        )
    for name, bias in (("logit_bias", logit_bias), ("teacher_logit_bias", teacher_logit_bias)):
        if bias is not None and not sigmoid:
            raise ValueError(f"{caller}: {name} changes no softmax; use contrast='sigmoid', or leave it out")
    return options._replace(sigmoid=sigmoid, image_to_text=rows, text_to_image=cols)


def _weights(directions: tuple[float, float], caller: str) -> tuple[float, float]:
    """Return the weights of both directions."""
    try:
        rows, cols = (float(weight) for weight in directions)
    except (TypeError, ValueError):
        rows = cols = math.nan
    if not (0 <= rows < math.inf and 0 <= cols < math.inf and rows + cols > 0):
        raise ValueError(
            f"{caller}: directions must be two finite weights >= 0, image to text and text to image, and "
            f"one of them > 0, got {directions!r}"
        )
    return rows, cols


def check_ignore_index(ignore_index: int | None, caller: str = "contrastive_loss") -> int | None:
    """Return the label of what has no partner as Python's integer, NumPy's too."""
    if ignore_index is None:
        return None
    if isinstance(ignore_index, bool) or not hasattr(ignore_index, "__index__"):
        raise ValueError(f"{caller}: ignore_index must be an integer or None, got {ignore_index!r}")
    return operator.index(ignore_index)


def without_partners(
    labels: Tensor | None, text_labels: Tensor | None, ignore_index: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the labels, those equal to ``ignore_index`` replaced by two that no other label equals."""
    ignore_index = check_ignore_index(ignore_index)
    if ignore_index is None:
        return labels, text_labels
    if labels is None or text_labels is None:
        raise ValueError("contrastive_loss: ignore_index needs labels; pass them, or leave it out")
    lowest = torch.iinfo(torch.int64).min
    return (
        labels.masked_fill(labels == ignore_index, lowest),
        text_labels.masked_fill(text_labels == ignore_index, lowest + 1),
    )


def check_features(
    image: Tensor, text: Tensor, caller: str = "contrastive_loss", may_be_empty: bool = False
) -> None:
    """Refuse features that are not two matrices of one width, device and, outside autocast, dtype.

    The message begins with the name of the public function, ``caller``.
    """
    for name, x in (("image", image), ("text", text)):
        if x.ndim != 2:
            raise ValueError(f"{caller}: {name} must be [rows, D], got shape {tuple(x.shape)}")
        if x.shape[1] == 0 or (x.shape[0] == 0 and not may_be_empty):
            raise ValueError(f"{caller}: {name} is empty {tuple(x.shape)}; skip empty batches")
        if not x.dtype.is_floating_point:
            raise ValueError(
                f"{caller}: {name} must be floating point, got {x.dtype}; cast the features to float32"
            )
    if image.shape[1] != text.shape[1]:
        raise ValueError(
            f"{caller}: image has D = {image.shape[1]} but text has D = {text.shape[1]}; "
            "project both to one width"
        )
    if image.device != text.device:
        raise ValueError(
            f"{caller}: image is on {image.device} but text on {text.device}; move both to one device"
        )
    if image.dtype != text.dtype and not autocast_is_on(image):
        raise ValueError(f"{caller}: image is {image.dtype} but text {text.dtype}; cast both to one dtype")


def autocast_is_on(x: Tensor) -> bool:
    """Return whether autocast is active on a tensor's kind of device."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def products_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products of features are taken: autocast's if it is on, else the student's own."""
    if x.dtype != torch.float64 and autocast_is_on(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def check_labels(
    image: Tensor, text: Tensor, labels: Labels | None, text_labels: Labels | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return labels and text_labels as contiguous int64, or None twice where pairs are given by position."""
    n, m = len(image), len(text)
    labels = _as_tensor("labels", labels, image.device)
    text_labels = _as_tensor("text_labels", text_labels, image.device)
    if labels is None and text_labels is not None:
        raise ValueError("contrastive_loss: text_labels needs labels too; pass the labels of the images")
    if text_labels is None:
        if n != m:
            raise ValueError(
                f"contrastive_loss: {n} images but {m} texts; pass labels and text_labels to say what "
                "belongs together"
            )
        text_labels = labels
    if labels is None or text_labels is None:
        return None, None
    for name, y, size in (("labels", labels, n), ("text_labels", text_labels, m)):
        if tuple(y.shape) != (size,):
            raise ValueError(
                f"contrastive_loss: {name} must have shape ({size},), got {tuple(y.shape)}; one per row"
            )
        if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
            raise ValueError(f"contrastive_loss: {name} must be integers, got {y.dtype}; use .long()")
        if y.device != image.device:
            raise ValueError(
                f"contrastive_loss: {name} is on {y.device} but image on {image.device}; "
                f"use .to({str(image.device)!r})"
            )
    return labels.long().contiguous(), text_labels.long().contiguous()


def _as_tensor(name: str, labels: Labels | None, device: torch.device) -> Tensor | None:
    """Return labels as a tensor; a list or an array goes to the device of the features."""
    if labels is None or isinstance(labels, Tensor):
        return labels
    try:
        return torch.as_tensor(labels, device=device)
    except (
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:  # torch raises all three, for strings and ragged lists
        raise ValueError(
            f"contrastive_loss: {name} must be integers, one per row, got a {type(labels).__name__} that is "
            f"not: number the classes from 0"
        ) from error


def check_teacher(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    weights: dict[str, float],
    caller: str = "contrastive_loss",
) -> tuple[Tensor, Tensor] | None:
    """Return the teacher's features without their graph; None without a teacher, which no weight may need."""
    if teacher_image is None and teacher_text is None:
        for name, weight in weights.items():
            if weight > 0:
                raise ValueError(
                    f"{caller}: weight {name} = {weight} needs a teacher; pass teacher_image and "
                    f"teacher_text, or {name}=0"
                )
        return None
    if teacher_image is None or teacher_text is None:
        missing = "teacher_image" if teacher_image is None else "teacher_text"
        raise ValueError(f"{caller}: {missing} is missing; pass both of the teacher's features")
    for name, x, like in (("teacher_image", teacher_image, image), ("teacher_text", teacher_text, text)):
        if x.shape != like.shape:
            raise ValueError(
                f"{caller}: {name} must have the student's shape {tuple(like.shape)}, got {tuple(x.shape)}"
            )
        if x.device != like.device:
            raise ValueError(
                f"{caller}: {name} is on {x.device} but the student on {like.device}; "
                f"use .to({str(like.device)!r})"
            )
        if not x.dtype.is_floating_point:
            raise ValueError(f"{caller}: {name} must be floating point, got {x.dtype}")
    return teacher_image.detach(), teacher_text.detach()


def scalar(name: str, value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a number, or a tensor of one element, as a 0-dim tensor."""
    if not isinstance(value, Tensor):
        return torch.full((), float(value), device=device, dtype=dtype)
    if value.numel() != 1:
        raise ValueError(f"contrastive_loss: {name} must hold one element, got shape {tuple(value.shape)}")
    if value.device != device and value.ndim:
        raise ValueError(
            f"contrastive_loss: {name} is on {value.device} but image on {device}; move it there"
        )
    return value.reshape(()).to(device=device, dtype=dtype)


def resolve(impl: str, image: Tensor, text: Tensor, options: Options, ranks: int = 1) -> str:
    """Return the implementation to use, once it is known that it can take these features.

    Args:
        impl: what was asked for.
        image, text: the features.
        options: of the call. A sigmoid takes each pair on its own, so that one walk does and the definition has no
            advantage.
        ranks: how many divide the logits among them; each then has a whole tile's work at any size.
    """
    kernels = IMPLEMENTATIONS["triton"]
    if impl == "auto":
        fits = image.dtype in kernels.dtypes and image.shape[1] % kernels.width_multiple == 0
        if image.device.type == "cuda" and fits:
            impl = "triton"
        else:
            most = _SMALL_ALONE if options.alone else _SMALL
            if image.dtype == torch.float32 and image.device.type == "cpu":
                most = min(most, _SMALL_FLOAT32)
            small = ranks == 1 and not options.sigmoid and len(image) * len(text) <= most
            impl = "eager" if small else "blocked"
    chosen = IMPLEMENTATIONS[impl]
    if image.dtype not in chosen.dtypes:
        able = ", ".join(name for name, other in IMPLEMENTATIONS.items() if image.dtype in other.dtypes)
        remedy = f"use impl {able}" if able else "cast the features to float32"
        raise ValueError(f"contrastive_loss: impl {impl!r} cannot take {image.dtype} features; {remedy}")
    if image.shape[1] % chosen.width_multiple:
        raise ValueError(
            f"contrastive_loss: impl {impl!r} needs D to be a multiple of {chosen.width_multiple}, got "
            f"D = {image.shape[1]}; use impl='blocked' or 'auto', or pad the features with zeros"
        )
    return impl


def refuse_forward_mode(impl: str, ranks: int, *tensors: Tensor) -> None:
    """Refuse forward-mode AD where the implementation has no rule for it."""
    if (impl == "eager" and ranks == 1) or torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"contrastive_loss: forward-mode AD is not supported by impl {impl!r} on {ranks} rank(s); use "
            "impl='eager' on one"
        )
