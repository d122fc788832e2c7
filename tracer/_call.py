"""A call of the contrastive loss, checked: on one process, or on the ranks of a group that must agree about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tracer import _checks
from tracer._agreement import Sizes, agree
from tracer._ahead import Ahead
from tracer._mesh import Mesh, MeshShape, check_shape, mesh_of
from tracer.kernels.contrastive import Biases, Inputs, Options, accumulation_dtype


class Given(NamedTuple):
    """The tensors of a call as the user gave them; see :func:`tracer.ops.contrastive_loss`."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor | float
    labels: _checks.Labels | None
    text_labels: _checks.Labels | None
    teacher_image: Tensor | None
    teacher_text: Tensor | None
    teacher_logit_scale: Tensor | float | None
    logit_bias: Tensor | float | None = None
    teacher_logit_bias: Tensor | float | None = None
    contrast: str = "softmax"
    directions: tuple[float, float] = (0.5, 0.5)
    ignore_index: int | None = None


class Call(NamedTuple):
    """What an implementation is called with."""

    impl: str
    inputs: Inputs
    options: Options
    teacher: tuple[Tensor, Tensor] | None  # its features in their own dtype
    biases: Biases | None = None  # with Options.sigmoid


def prepare(given: Given, options: Options, weights: dict[str, float], impl: str, ranks: int = 1) -> Call:
    """Return the call of one of so many ranks.

    Raises:
        ValueError: sizes, dtypes, devices or numbers that don't fit; the message names which.
        NotImplementedError: forward-mode AD where the implementation has no rule for it.
    """
    image, text = given.image, given.text
    _checks.check_numbers(options.margin, options.smoothing, options.teacher_temperature, weights, impl)
    options = _checks.with_form(
        options, given.contrast, given.directions, given.logit_bias, given.teacher_logit_bias
    )._replace(ignore=given.ignore_index is not None)
    _checks.check_features(image, text, may_be_empty=ranks > 1)
    labels, text_labels = _checks.check_labels(image, text, given.labels, given.text_labels)
    labels, text_labels = _checks.without_partners(labels, text_labels, given.ignore_index)
    teacher = _checks.check_teacher(image, text, given.teacher_image, given.teacher_text, weights)
    impl = _checks.resolve(impl, image, text, options, ranks)
    scale = _checks.scalar("logit_scale", given.logit_scale, image.device, accumulation_dtype(image))
    biases = _biases(given, scale, teacher is not None) if options.sigmoid else None
    _checks.refuse_forward_mode(impl, ranks, image, text, scale, *() if biases is None else biases[:1])
    dtype = _checks.products_dtype(image)  # the kernels see one
    inputs = Inputs(image.to(dtype), text.to(dtype), scale, labels=labels, text_labels=text_labels)
    if teacher is not None and (options.stats or options.relational or options.crossed):
        sigma = scale if given.teacher_logit_scale is None else given.teacher_logit_scale
        sigma = _checks.scalar("teacher_logit_scale", sigma, image.device, scale.dtype).detach()
        inputs = inputs._replace(
            teacher_image=teacher[0].to(dtype), teacher_text=teacher[1].to(dtype), teacher_logit_scale=sigma
        )
    return Call(impl, inputs, options, teacher, biases)


def _biases(given: Given, scale: Tensor, has_teacher: bool) -> Biases:
    """Return b, 0 if it is left out, and b', the student's if it is left out."""
    bias = 0.0 if given.logit_bias is None else given.logit_bias
    bias = _checks.scalar("logit_bias", bias, scale.device, scale.dtype)
    if not has_teacher:
        return Biases(bias)
    teacher_bias = bias if given.teacher_logit_bias is None else given.teacher_logit_bias
    return Biases(
        bias, _checks.scalar("teacher_logit_bias", teacher_bias, scale.device, scale.dtype).detach()
    )


def prepare_on_ranks(
    make: Callable[[int], Call],
    given: Given,
    weights: dict[str, float],
    group: ProcessGroup,
    shape: MeshShape,
    ahead: Ahead | None = None,
) -> tuple[Call, Mesh, Sizes]:
    """Return this rank's call, the mesh, and the sizes of all ranks' batches.

    Args:
        make: returns the call of one of so many ranks, or raises what is wrong with it.
        given, weights: of this rank.
        group: of more than one rank.
        shape: of the mesh, as the user gave it.
        ahead: gathers that have begun.

    Raises:
        ValueError: the ranks' calls differ, or one of them is refused; every rank raises.
    """
    ranks = dist.get_world_size(group)
    if torch.compiler.is_compiling():  # which has no room for words between the ranks
        mine = make(ranks)
        sizes = Sizes((len(mine.inputs.image),) * ranks, (len(mine.inputs.text),) * ranks)
        return mine, mesh_of(group, check_shape(shape, ranks)), sizes
    call: Call | None = None
    refusal: Exception | None = None
    try:
        shape = check_shape(shape, ranks)
        call = make(ranks)
        if ahead is not None:
            ahead.refuse_misfit(call.inputs, group, shape)
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        refusal = error
    described = {} if call is None else _described(call, given, weights) | {"mesh": shape}
    described["ahead"] = tuple(ahead.begun) if ahead is not None else ()
    images, texts = (0, 0) if call is None else (len(call.inputs.image), len(call.inputs.text))
    sizes = agree(group, images, texts, described, refusal)
    assert call is not None  # else agree has raised
    for name, of in (("image", sizes.images), ("text", sizes.texts)):
        if not sum(of):
            raise ValueError(f"contrastive_loss: {name} is empty on every rank; skip empty batches")
    return call, mesh_of(group, shape), sizes


_DIFFERENTIABLE = ("image", "text", "logit_scale", "logit_bias")


def _described(call: Call, given: Given, weights: dict[str, float]) -> dict[str, object]:
    """Return what must be alike on all ranks, by the names of the arguments."""
    inputs, differentiable = call.inputs, torch.is_grad_enabled()
    asks = {
        f"{name}.requires_grad": bool(differentiable and isinstance(x, Tensor) and x.requires_grad)
        for name, x in ((name, getattr(given, name)) for name in _DIFFERENTIABLE)
    }
    presence = {
        name: "a tensor" if x is not None else "None"
        for name, x in (("labels", inputs.labels), ("teacher_image", given.teacher_image))
    }
    return {
        "impl": call.impl,
        "D": inputs.image.shape[1],
        "dtype": str(given.image.dtype),
        "dtype of the products": str(inputs.image.dtype),
        "device": given.image.device.type,
        **asks,
        **presence,
        **{name: float(weight) for name, weight in weights.items()},
        "margin": call.options.margin,
        "smoothing": call.options.smoothing,
        "teacher_temperature": call.options.teacher_temperature,
        "stats": call.options.stats,
        "contrast": "sigmoid" if call.options.sigmoid else "softmax",
        "directions": (call.options.image_to_text, call.options.text_to_image),
        "ignore_index": given.ignore_index,
    }
