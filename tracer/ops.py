"""The one dispatcher: validates a call, picks an implementation, gives it autograd and torch.compile.

``contrastive_loss`` is the whole public face of the fused loss, ``average_`` that of the teacher's
moving average. ``impl`` of the loss is one of

* ``"triton"``  GPU kernels (``kernels/contrastive.py``): no N×M buffer, forward or backward;
* ``"blocked"`` the same walk in torch operations (``kernels/blocked.py``): CPU and any other device;
* ``"eager"``   the definition (``kernels/eager.py``): any dtype, N×M matrices in memory;
* ``"auto"``    ``triton`` for CUDA/ROCm tensors with D a multiple of 8, ``blocked`` for everything else;
  ``eager`` instead of ``blocked`` where a whole matrix has no more entries than a small tile (256×256),
  so that tiling could only add to the work.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tracer.kernels import average_foreach, eager

IMPLS = ("auto", "triton", "blocked", "eager")
_DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "blocked": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "eager": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}
# Up to this many entries of the logit matrix (256 x 256, 256 KiB in float32) the definition is as fast as
# the tiled walk on a CPU or faster, and its memory is as bounded.
_SMALL = 2**16
# The GPU kernels read features 16 bytes at a time.
_TRITON_WIDTH = 8


class ContrastiveOutput(NamedTuple):
    """Result of :func:`contrastive_loss`.

    ``loss`` is a scalar; ``terms`` maps contrastive, relational, interactive, cross and feature to
    their unweighted values (0 where the term is off); ``stats`` maps the names of
    ``kernels.eager.stat_names`` and the derived ones to device scalars, empty unless asked for.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    stats: dict[str, Tensor]


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    text_labels: Tensor | None = None,
    margin: float = 0.0,
    smoothing: float = 0.0,
    teacher_image: Tensor | None = None,
    teacher_text: Tensor | None = None,
    teacher_logit_scale: Tensor | float | None = None,
    teacher_temperature: float = 1.0,
    relational: float = 0.0,
    interactive: float = 0.0,
    cross: float = 0.0,
    feature: float = 0.0,
    group: object | None = None,
    impl: str = "auto",
    stats: bool = False,
) -> ContrastiveOutput:
    """Multi-positive contrastive loss with optional margin and distillation.

    No N×M matrix beyond 256×256 entries is stored, unless ``impl="eager"`` asks for it.

    loss = contrastive + relational·CRD + interactive·ICL + cross·XKD + feature·FD, the terms being
    defined in ``kernels/eager.py`` (TRACER, arXiv 2605.29380; MPM-NCE, arXiv 2408.05749) and
    FD = mean (u − u')² + mean (v − v')².

    Args:
        image: student image features u, [N, D], L2-normalised; float32, bfloat16 or float16
            (float64 with ``impl="blocked"`` and ``"eager"``). Under autocast the products are taken in
            the autocast dtype. Statistics are float32 always (float64 for float64 features). On a CPU
            the logits of bfloat16 features carry 8 bits, as in autocast; on a GPU they are float32.
        text: student text features v, [M, D].
        logit_scale: σ, already exponentiated; a float or a tensor of one element.
        labels: y of the image rows, [N] integers; without labels row i and column i belong together.
        text_labels: y of the text columns, [M]; ``labels`` if left out.
        margin: δ ≥ 0, added to the cosine of the negatives. smoothing: ε in [0, 1).
        teacher_image: u', [N, D]. teacher_text: v', [M, D]. They get no gradient.
        teacher_logit_scale: σ'; the student's (detached) if left out.
        teacher_temperature: T > 0, divides the teacher's logits.
        relational, interactive, cross, feature: weights ≥ 0 of the distillation terms. A term of
            weight 0 is not computed and reads 0.
        group: must be None: the loss over several ranks is not available yet.
        impl: one of :data:`IMPLS`.
        stats: also measure the diagnostics.

    Returns:
        :class:`ContrastiveOutput`. ``loss`` and each of ``terms`` can be differentiated once, with
        respect to ``image``, ``text`` and ``logit_scale``; ``impl="eager"`` any number of times and
        in forward mode. ``"auto"`` allows that only where it picks ``eager``: ask for it by name.
        The loss is NaN where a feature is NaN or infinite or a row or column has no positive.

    Raises:
        ValueError: sizes, dtypes, devices or numbers that don't fit; the message names which.
        NotImplementedError: an option that the implementation cannot honour, or forward-mode AD.
    """
    weights = {"relational": relational, "interactive": interactive, "cross": cross, "feature": feature}
    _check_numbers(margin, smoothing, teacher_temperature, weights, group, impl)
    _check_features(image, text)
    labels, text_labels = _check_labels(image, text, labels, text_labels)
    teacher = _check_teacher(image, text, teacher_image, teacher_text, weights)
    impl = _resolve(impl, image, text)
    accumulate = torch.promote_types(image.dtype, torch.float32)
    scale = _scalar("logit_scale", logit_scale, image.device, accumulate)
    _refuse_forward_mode(impl, image, text, scale)

    terms: dict[str, Tensor] = {}
    if teacher is not None and feature:
        terms["feature"] = _feature_distance(image, teacher[0]) + _feature_distance(text, teacher[1])

    # The kernels see one dtype: autocast's if it is on, else the student's.
    dtype = image.dtype
    if dtype != torch.float64 and _autocast_is_on(image):
        dtype = torch.get_autocast_dtype(image.device.type)
    image, text = image.to(dtype), text.to(dtype)
    enabled = [True, relational > 0, interactive > 0, cross > 0]
    teacher_scale = None
    if teacher is not None and (stats or any(enabled[1:])):
        sigma = scale if teacher_logit_scale is None else teacher_logit_scale
        teacher_scale = _scalar("teacher_logit_scale", sigma, image.device, accumulate).detach()
        teacher_scale = teacher_scale / teacher_temperature
        teacher = (teacher[0].to(dtype), teacher[1].to(dtype))
    else:
        teacher = None
    guide_image, guide_text = teacher if teacher is not None else (None, None)
    args = (image, text, scale, labels, text_labels, guide_image, guide_text, teacher_scale)
    if impl == "eager":
        vector, measured = _eager(*args, margin, smoothing, enabled, stats)
    else:
        vector, _, _, measured = _contrastive(impl, *args, float(margin), float(smoothing), enabled, stats)

    values = vector.unbind()
    loss = values[0]
    for index, name in enumerate(eager.TERMS):
        if index and enabled[index]:
            loss = loss + weights[name] * values[index]
    if "feature" in terms:
        loss = loss + feature * terms["feature"]
    else:
        terms["feature"] = vector.new_zeros(())
    terms = {**dict(zip(eager.TERMS, values, strict=True)), "feature": terms["feature"]}
    named = _name_stats(measured, teacher is not None, len(image), len(text)) if stats else {}
    return ContrastiveOutput(loss, terms, named)


@torch.no_grad()
def average_(
    averages: Sequence[Tensor],
    params: Sequence[Tensor],
    weight: float | Tensor,
    *,
    copies: Sequence[Tensor | None] | None = None,
    impl: str = "auto",
) -> None:
    """Moving average of a list of tensors, in place: ``average += weight · (param − average)``.

    Args:
        averages: float32 tensors of any shapes, written.
        params: one for each average, same shape; float32, bfloat16 or float16, only read.
        weight: how far to move, in [0, 1]; a number, or a scalar tensor on the averages' device
            (read there by the kernel: no host sync; ``foreach`` reads it on the host).
        copies: low-precision copies of the averages, written in the same pass; None for those that
            need none.
        impl: ``"triton"``, one launch for the whole list (``kernels/average_triton.py``); ``"foreach"``, torch
            operations (``kernels/average_foreach.py``); ``"auto"``, the former for CUDA and ROCm tensors.

    Raises:
        ValueError: lists that don't match, dtypes or memory formats that the implementation can't
            move, or written tensors that share memory; the message names list and position.
    """
    if impl not in ("auto", "triton", "foreach"):
        raise ValueError(f"impl={impl!r}: one of 'auto', 'triton', 'foreach'")
    if impl == "auto":
        impl = "triton" if averages and averages[0].is_cuda else "foreach"
    if impl == "triton":
        importlib.import_module("tracer.kernels.average_triton").average_(averages, params, weight, copies)
    else:
        average_foreach.average_(averages, params, float(weight), copies)


def sampled_diagnostics(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    rows: int = 256,
) -> dict[str, Tensor]:
    """Diagnostics that need whole rows of logits, on at most ``rows`` evenly spaced image rows.

    ``top5_overlap``: mean share of the student's five best texts that are among the teacher's five
    best. ``student/diversity``, ``teacher/diversity``: distinct first choices divided by the largest
    number there could be, min(rows, M). Shapes as in :func:`contrastive_loss`; device scalars.
    """
    _check_features(image, text)
    _check_teacher(image, text, teacher_image, teacher_text, {})
    if rows < 1:
        raise ValueError(f"sampled_diagnostics: rows must be at least 1, got {rows}")
    count = min(rows, len(image))
    at = torch.linspace(0, len(image) - 1, count, device=image.device).long()
    columns = len(text)
    best = min(5, columns)
    named, top = {}, []
    for name, u, v in (("student", image, text), ("teacher", teacher_image, teacher_text)):
        ranked = (u[at].float() @ v.float().T).topk(best).indices
        chosen = torch.zeros(columns, device=image.device).scatter_(0, ranked[:, 0], 1.0)
        named[f"{name}/diversity"] = chosen.sum() / min(count, columns)
        top.append(ranked)
    same = (top[0][:, :, None] == top[1][:, None, :]).any(2)
    return {"top5_overlap": same.float().mean(), **named}


# ---------------------------------------------------------------------------------------------------
# Validation: one line that names the thing and the remedy.


def _check_numbers(
    margin: float,
    smoothing: float,
    teacher_temperature: float,
    weights: dict[str, float],
    group: object | None,
    impl: str,
) -> None:
    if impl not in IMPLS:
        raise ValueError(f"contrastive_loss: unknown impl {impl!r}; choose one of {', '.join(IMPLS)}")
    if group is not None:
        raise NotImplementedError(
            "contrastive_loss: a process group is not supported yet; gather the features of all ranks "
            "first and pass group=None"
        )
    if not 0 <= margin < math.inf:
        raise ValueError(f"contrastive_loss: margin must be a finite number >= 0, got {margin}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"contrastive_loss: smoothing must lie in [0, 1), got {smoothing}")
    if not 0 < teacher_temperature < math.inf:
        raise ValueError(
            f"contrastive_loss: teacher_temperature must be a finite number > 0, got {teacher_temperature}"
        )
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"contrastive_loss: weight {name} must be a finite number >= 0, got {weight}")


def _check_features(image: Tensor, text: Tensor) -> None:
    for name, x in (("image", image), ("text", text)):
        if x.ndim != 2:
            raise ValueError(f"contrastive_loss: {name} must be [rows, D], got shape {tuple(x.shape)}")
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(f"contrastive_loss: {name} is empty {tuple(x.shape)}; skip empty batches")
        if not x.dtype.is_floating_point:
            raise ValueError(
                f"contrastive_loss: {name} must be floating point, got {x.dtype}; cast the features to float32"
            )
    if image.shape[1] != text.shape[1]:
        raise ValueError(
            f"contrastive_loss: image has D = {image.shape[1]} but text has D = {text.shape[1]}; "
            "project both to one width"
        )
    if image.device != text.device:
        raise ValueError(
            f"contrastive_loss: image is on {image.device} but text on {text.device}; move both to one device"
        )
    if image.dtype != text.dtype and not _autocast_is_on(image):
        raise ValueError(
            f"contrastive_loss: image is {image.dtype} but text {text.dtype}; cast both to one dtype"
        )


def _autocast_is_on(x: Tensor) -> bool:
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _check_labels(
    image: Tensor, text: Tensor, labels: Tensor | None, text_labels: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    n, m = len(image), len(text)
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


def _check_teacher(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    weights: dict[str, float],
) -> tuple[Tensor, Tensor] | None:
    if teacher_image is None and teacher_text is None:
        for name, weight in weights.items():
            if weight > 0:
                raise ValueError(
                    f"contrastive_loss: weight {name} = {weight} needs a teacher; pass teacher_image and "
                    f"teacher_text, or {name}=0"
                )
        return None
    if teacher_image is None or teacher_text is None:
        missing = "teacher_image" if teacher_image is None else "teacher_text"
        raise ValueError(f"contrastive_loss: {missing} is missing; pass both of the teacher's features")
    for name, x, like in (("teacher_image", teacher_image, image), ("teacher_text", teacher_text, text)):
        if x.shape != like.shape:
            raise ValueError(
                f"contrastive_loss: {name} must have the student's shape {tuple(like.shape)}, "
                f"got {tuple(x.shape)}"
            )
        if x.device != like.device:
            raise ValueError(
                f"contrastive_loss: {name} is on {x.device} but the student on {like.device}; "
                f"use .to({str(like.device)!r})"
            )
        if not x.dtype.is_floating_point:
            raise ValueError(f"contrastive_loss: {name} must be floating point, got {x.dtype}")
    return teacher_image.detach(), teacher_text.detach()


def _scalar(name: str, value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((), float(value), device=device, dtype=dtype)
    if value.numel() != 1:
        raise ValueError(f"contrastive_loss: {name} must hold one element, got shape {tuple(value.shape)}")
    if value.device != device and value.ndim:
        raise ValueError(
            f"contrastive_loss: {name} is on {value.device} but image on {device}; move it there"
        )
    return value.reshape(()).to(device=device, dtype=dtype)


def _resolve(impl: str, image: Tensor, text: Tensor) -> str:
    """The implementation to use, once it is known that it can take these features."""
    on_gpu = image.device.type == "cuda"
    if impl == "auto":
        if on_gpu and image.dtype in _DTYPES["triton"] and image.shape[1] % _TRITON_WIDTH == 0:
            impl = "triton"
        else:
            impl = "eager" if len(image) * len(text) <= _SMALL else "blocked"
    if image.dtype not in _DTYPES[impl]:
        able = ", ".join(name for name, dtypes in _DTYPES.items() if image.dtype in dtypes)
        remedy = f"use impl {able}" if able else "cast the features to float32"
        raise ValueError(f"contrastive_loss: impl {impl!r} cannot take {image.dtype} features; {remedy}")
    if impl == "triton" and image.shape[1] % _TRITON_WIDTH:
        raise ValueError(
            f"contrastive_loss: impl 'triton' needs D to be a multiple of {_TRITON_WIDTH}, got "
            f"D = {image.shape[1]}; use impl='blocked' or 'auto', or pad the features with zeros"
        )
    if impl == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"contrastive_loss: impl 'triton' needs a GPU but the features are on {image.device}; "
            "use impl='blocked' (or set TRITON_INTERPRET=1 before the start to interpret the kernels)"
        )
    return impl


def _refuse_forward_mode(impl: str, *tensors: Tensor) -> None:
    if impl == "eager" or torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            f"contrastive_loss: forward-mode AD is not supported by impl {impl!r}; use impl='eager'"
        )


# ---------------------------------------------------------------------------------------------------
# The parts that need no kernel.


def _feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all entries of (student − teacher)², in float32 (float64 for float64 features)."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    return (student.to(dtype) - teacher.to(dtype)).square().mean()


def _eager(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: Tensor | None,
    text_labels: Tensor | None,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_scale: Tensor | None,
    margin: float,
    smoothing: float,
    enabled: Sequence[bool],
    stats: bool,
) -> tuple[Tensor, Tensor]:
    if labels is None or text_labels is None:
        labels = text_labels = torch.arange(len(image), device=image.device)
    return eager.contrastive_terms(
        image,
        text,
        scale,
        labels,
        text_labels,
        teacher_image,
        teacher_text,
        teacher_scale,
        margin=margin,
        smoothing=smoothing,
        enabled=enabled,
        stats=stats,
    )


def _name_stats(measured: Tensor, has_teacher: bool, n: int, m: int) -> dict[str, Tensor]:
    """Names of the diagnostics, and those that follow from others without another look at the logits.

    ``effective_temperature`` = log M / mean entropy (log N for text_to_image): 1 for uniform
    predictions, growing as they sharpen. ``accuracy_difference`` = student − teacher.
    """
    measured = measured.detach()
    named = dict(zip(eager.stat_names(has_teacher), measured.unbind(), strict=True))
    for direction, size in (("image_to_text", m), ("text_to_image", n)):
        for model in ("student", "teacher") if has_teacher else ("student",):
            entropy = named[f"{model}/{direction}/entropy"].clamp(min=1e-6)  # finite when all is certain
            named[f"{model}/{direction}/effective_temperature"] = math.log(size) / entropy
        if has_teacher:
            named[f"pair/{direction}/accuracy_difference"] = (
                named[f"student/{direction}/accuracy"] - named[f"teacher/{direction}/accuracy"]
            )
    return named


# ---------------------------------------------------------------------------------------------------
# Custom operators: what autograd and torch.compile see of an implementation.


def _implementation(impl: str) -> ModuleType:
    """The module holding ``forward`` and ``backward``; triton is imported by the first call that needs it."""
    name = {"triton": "contrastive", "blocked": "blocked"}[impl]
    return importlib.import_module(f"tracer.kernels.{name}")


def _without_autocast(kind: str) -> AbstractContextManager[None]:
    """Autocast off on this kind of device, where it exists at all."""
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


@torch.library.custom_op("tracer::contrastive_loss", mutates_args=())
def _contrastive(
    impl: str,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: Tensor | None,
    text_labels: Tensor | None,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_scale: Tensor | None,
    margin: float,
    smoothing: float,
    enabled: Sequence[bool],
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(terms [4], row statistics [5, N], column statistics [5, M], diagnostics)."""
    with _without_autocast(image.device.type):
        return _implementation(impl).forward(
            image,
            text,
            scale,
            labels,
            text_labels,
            teacher_image,
            teacher_text,
            teacher_scale,
            margin,
            smoothing,
            tuple(enabled),
            stats,
        )


@_contrastive.register_fake
def _(
    impl, image, text, scale, labels, text_labels, teacher_image, teacher_text, teacher_scale,
    margin, smoothing, enabled, stats,
):  # fmt: skip
    dtype = torch.promote_types(image.dtype, torch.float32)
    names = eager.stat_names(teacher_image is not None) if stats else ()
    return (
        image.new_empty(len(eager.TERMS), dtype=dtype),
        image.new_empty(eager.STAT_ROWS, image.shape[0], dtype=dtype),
        image.new_empty(eager.STAT_ROWS, text.shape[0], dtype=dtype),
        image.new_empty(len(names), dtype=dtype),
    )


@torch.library.custom_op("tracer::contrastive_loss_backward", mutates_args=())
def _contrastive_backward(
    impl: str,
    grad_terms: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    labels: Tensor | None,
    text_labels: Tensor | None,
    teacher_image: Tensor | None,
    teacher_text: Tensor | None,
    teacher_scale: Tensor | None,
    row_stats: Tensor,
    col_stats: Tensor,
    margin: float,
    smoothing: float,
    enabled: Sequence[bool],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of (image, text, scale) that are asked for, in that order."""
    with _without_autocast(image.device.type):
        grads = _implementation(impl).backward(
            grad_terms,
            image,
            text,
            scale,
            labels,
            text_labels,
            teacher_image,
            teacher_text,
            teacher_scale,
            row_stats,
            col_stats,
            margin,
            smoothing,
            tuple(enabled),
            tuple(needs),
        )
    return [grad for grad, need in zip(grads, needs, strict=True) if need]


@_contrastive_backward.register_fake
def _(
    impl, grad_terms, image, text, scale, labels, text_labels, teacher_image, teacher_text, teacher_scale,
    row_stats, col_stats, margin, smoothing, enabled, needs,
):  # fmt: skip
    like = (image, text, scale)
    return [x.new_empty(x.shape) for x, need in zip(like, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    impl, *tensors, margin, smoothing, enabled, _ = inputs
    _, row_stats, col_stats, diagnostics = output
    ctx.save_for_backward(*tensors, row_stats, col_stats)
    ctx.mark_non_differentiable(row_stats, col_stats, diagnostics)
    ctx.options = (impl, margin, smoothing, enabled)


def _backward(ctx: Any, grad_terms: Tensor, *_: Any) -> tuple[Any, ...]:
    impl, margin, smoothing, enabled = ctx.options
    needs = ctx.needs_input_grad[1:4]
    found = iter(
        _contrastive_backward(impl, grad_terms, *ctx.saved_tensors, margin, smoothing, enabled, list(needs))
    )
    return None, *(next(found) if need else None for need in needs), *([None] * 9)


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "contrastive_loss: double backward is not supported by impl 'triton' and 'blocked'; use impl='eager'"
    )


_contrastive.register_autograd(_backward, setup_context=_setup_context)
_contrastive_backward.register_autograd(_refuse_double_backward)
