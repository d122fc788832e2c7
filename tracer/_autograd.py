"""The loss inside torch: ``torch.autograd.Function`` in eager mode, custom operators for everything that traces.

An eager call goes straight to its implementation. The operators ``tracer::contrastive_loss`` and its backward
stand for the same call where torch must see one: under torch.compile and torch.export, in a dispatch mode (fake
tensors, byte counters), under ``torch.func``, and for tensors without data or of a subclass. They cost several
hundred microseconds a call on the host, which a GPU would wait for in small batches.

An operator takes flat arguments. Its schema comes from the fields of the records in ``kernels/contrastive.py``,
and only this file turns records into arguments and back, so that a new field needs no change here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import islice
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from tracer.kernels import _statistics
from tracer.kernels._statistics import Whole, pack, statistic_names
from tracer.kernels.contrastive import (
    IMPLEMENTATIONS,
    TERMS,
    Forward,
    Gradients,
    Inputs,
    Needs,
    Options,
    Saved,
    Statistics,
    accumulation_dtype,
    diagnostic_names,
)

_PLAIN = (Tensor, nn.Parameter)
_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", bool: "bool", int: "SymInt"}


def schema(*records: type) -> str:
    """Return the arguments of a schema: every field of the records, in order; those of needs by ``needs_…``."""
    fields = [
        f"{_SCHEMA_TYPES[hint]} {'needs_' if record.__name__.endswith('Needs') else ''}{name}"
        for record in records
        for name, hint in get_type_hints(record).items()
    ]
    return ", ".join(fields)


def records(values: Iterable[Any], *records: Any) -> list[Any]:
    """Build the records from their flat fields."""
    values = iter(values)
    return [record(*islice(values, len(record._fields))) for record in records]


@cache
def implementation(impl: str, form: str = "softmax") -> ModuleType:
    """Return the module of an implementation; the first call that needs Triton imports it."""
    module = IMPLEMENTATIONS[impl].module
    return importlib.import_module(f"tracer.kernels.{module if form == 'softmax' else f'{form}_{impl}'}")


def without_autocast(kind: str) -> AbstractContextManager[None]:
    """Switch autocast off on this kind of device, where it is on."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def is_traced(tensors: Iterable[Tensor | None]) -> bool:
    """Return whether torch must see an operator in place of what an implementation does with these tensors."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return True
    return any(x is not None and (type(x) not in _PLAIN or x.is_meta) for x in tensors)


def contrastive_terms(impl: str, inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Return the vector of terms, differentiable once, and the diagnostics, by a tiled implementation."""
    if is_traced(inputs):
        result = Forward(*_forward(impl, *inputs, *options))
        return result.terms, result.diagnostics
    asked = torch.is_grad_enabled()
    needs = Needs(*(asked and getattr(inputs, name).requires_grad for name in Needs._fields))
    return _Terms.apply(impl, options, needs, *inputs)


def rectangle_statistics(impl: str, inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Return the packed statistics of the rows [N, K] and of the columns [M, K] of a rectangle.

    K statistics by the names of ``_statistics.statistic_names``, in :func:`accumulation_dtype`.
    """
    if is_traced(inputs):
        return _rectangle_statistics(impl, *inputs, *options)
    with torch.no_grad():
        return _statistics_of(impl, inputs, options)


def rectangle_gradients(
    impl: str,
    grad_terms: Tensor,
    inputs: Inputs,
    saved: Saved,
    options: Options,
    needs: Needs,
    whole: Whole,
    weights: Tensor | None = None,
) -> Gradients:
    """Return the gradients of ``grad_terms · terms`` through a rectangle of the matrix of size ``whole``.

    ``weights`` [2]: what a row and a column of that matrix weigh in a term; None if the rectangle is all of it.
    """
    if is_traced((grad_terms, *inputs)):
        values = iter(_backward(impl, grad_terms, *inputs, *saved, *options, *needs, *whole, weights))
        return Gradients(*(next(values) if need else None for need in needs))
    with torch.no_grad():
        return _gradients_of(impl, grad_terms, inputs, saved, options, needs, whole, weights)


class Once(torch.autograd.Function):
    """Passes gradients on, and refuses to be differentiated: a constant would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients as they are."""
        return tuple(None if x is None else x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """Refuse."""
        _refuse_double_backward(ctx)

    @classmethod
    def only(cls, gradients: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Return gradients that a backward pass has computed, for one use where the graph is kept."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return tuple(gradients)
        return cls.apply(torch.ones((), requires_grad=True), *gradients)


class _Terms(torch.autograd.Function):
    """The terms and diagnostics of an eager call.

    Its gradients come from a backward walk, or wait for their upstream gradient since the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, impl: str, options: Options, needs: Needs, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        (inputs,) = records(tensors, Inputs)
        at_once = _at_once(impl, inputs, options, needs)
        result = _result_of(impl, inputs, options) if at_once is None else at_once[0]
        ctx.call = impl, options, at_once is not None, inputs.image.dtype
        ctx.save_for_backward(*((*tensors, *result.saved) if at_once is None else at_once[1]))
        ctx.mark_non_differentiable(result.diagnostics)
        ctx.set_materialize_grads(False)  # the terms' always comes
        return result.terms, result.diagnostics

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        impl, options, formed, dtype = ctx.call
        if formed:
            gradients = _by_input(_times(upstream[0], Gradients(*ctx.saved_tensors), dtype))
        else:
            inputs, saved = records(ctx.saved_tensors, Inputs, Saved)
            asked = Inputs(*ctx.needs_input_grad[3:])
            gradients = _through(impl, upstream[0], inputs, saved, options, asked)
        return None, None, None, *Once.only(gradients)


def _through(
    impl: str, grad_terms: Tensor, inputs: Inputs, saved: Saved, options: Options, asked: Any
) -> tuple[Tensor | None, ...]:
    """Return a gradient for each of the inputs, None where none is asked for."""
    needs = Needs(*(getattr(asked, name) for name in Needs._fields))
    whole = Whole(len(inputs.image), len(inputs.text))
    return _by_input(rectangle_gradients(impl, grad_terms, inputs, saved, options, needs, whole))


@torch.no_grad()
def _times(grad_terms: Tensor, gradients: Gradients, dtype: torch.dtype) -> Gradients:
    """Return the gradients of the contrastive term times its upstream gradient, those of features in ``dtype``."""
    factor = grad_terms[TERMS.index("contrastive")]
    image, text = (
        None if x is None else torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))
        for x in gradients[:2]
    )
    scale = gradients.logit_scale
    return Gradients(image, text, None if scale is None else scale * factor)


def _by_input(gradients: Gradients) -> tuple[Tensor | None, ...]:
    return tuple(getattr(gradients, name, None) for name in Inputs._fields)


# ---------------------------------------------------------------------------------------------------
# What a call computes.


def _result_of(impl: str, inputs: Inputs, options: Options) -> Forward:
    with without_autocast(inputs.image.device.type):
        return implementation(impl).forward(inputs, options)  # type: ignore[no-any-return]


def _at_once(impl: str, inputs: Inputs, options: Options, needs: Needs) -> tuple[Forward, Gradients] | None:
    """Return the result and its gradients where the forward pass of an implementation makes both."""
    if impl != "blocked":
        return None
    with without_autocast(inputs.image.device.type):
        return implementation(impl).at_once(inputs, options, needs)  # type: ignore[no-any-return]


def _gradients_of(
    impl: str,
    grad_terms: Tensor,
    inputs: Inputs,
    saved: Saved,
    options: Options,
    needs: Needs,
    whole: Whole,
    weights: Tensor | None,
) -> Gradients:
    if not (len(inputs.image) and len(inputs.text)):  # a rank without a batch
        return Gradients(
            *(
                torch.zeros_like(getattr(inputs, name)) if need else None
                for name, need in needs._asdict().items()
            )
        )
    with without_autocast(inputs.image.device.type):
        return implementation(impl).backward(  # type: ignore[no-any-return]
            grad_terms, inputs, saved, options, needs, whole, weights
        )


def _statistics_of(impl: str, inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    image, dtype = inputs.image, accumulation_dtype(inputs.image)
    names = statistic_names(options, inputs.has_teacher)
    if len(image) and len(inputs.text):
        with without_autocast(image.device.type):
            rows, cols = implementation(impl).statistics(inputs, options)
    else:  # a rank without a batch
        rows, cols = (_statistics.nothing(len(x), names, image) for x in (image, inputs.text))
    if options.one_way:
        return pack(rows, names, dtype), image.new_empty(len(inputs.text), 0, dtype=dtype)
    return pack(rows, names, dtype), pack(cols, names, dtype)


# ---------------------------------------------------------------------------------------------------
# The custom operators.


def _run_forward(impl: str, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(_result_of(impl, *records(arguments, Inputs, Options)))


def _fake_forward(impl: str, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, options = records(arguments, Inputs, Options)
    image, dtype = inputs.image, accumulation_dtype(inputs.image)
    measured = len(diagnostic_names(inputs.has_teacher)) if options.stats else 0
    return tuple(
        Forward(
            terms=image.new_empty(len(TERMS), dtype=dtype),
            row_stats=image.new_empty(len(Statistics._fields), image.shape[0], dtype=dtype),
            col_stats=image.new_empty(
                0 if options.one_way else len(Statistics._fields), inputs.text.shape[0], dtype=dtype
            ),
            diagnostics=image.new_empty(measured, dtype=dtype),
        )
    )


def _run_backward(impl: str, grad_terms: Tensor, *arguments: Any) -> list[Tensor]:
    values = iter(arguments)
    inputs, saved, options, needs, whole = records(values, Inputs, Saved, Options, Needs, Whole)
    gradients = _gradients_of(impl, grad_terms, inputs, saved, options, needs, whole, next(values, None))
    return [x for x, need in zip(gradients, needs, strict=True) if need and x is not None]


def _fake_backward(impl: str, grad_terms: Tensor, *arguments: Any) -> list[Tensor]:
    inputs, _, _, needs, _ = records(arguments, Inputs, Saved, Options, Needs, Whole)
    return [x.new_empty(x.shape) for x in _needed(inputs, needs)]


def _needed(inputs: Inputs, needs: Needs) -> list[Tensor]:
    return [getattr(inputs, name) for name in Needs._fields if getattr(needs, name)]


def _run_statistics(impl: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _statistics_of(impl, *records(arguments, Inputs, Options))


def _fake_statistics(impl: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, options = records(arguments, Inputs, Options)
    image, width = inputs.image, len(statistic_names(options, inputs.has_teacher))
    rows, cols = (
        image.new_empty(len(x), k, dtype=accumulation_dtype(image))
        for x, k in ((image, width), (inputs.text, 0 if options.one_way else width))
    )
    return rows, cols


_forward = torch.library.custom_op(
    "tracer::contrastive_loss",
    _run_forward,
    mutates_args=(),
    schema=f"(str impl, {schema(Inputs, Options)}) -> ({', '.join(['Tensor'] * len(Forward._fields))})",
)
_backward = torch.library.custom_op(
    "tracer::contrastive_loss_backward",
    _run_backward,
    mutates_args=(),
    schema=(
        f"(str impl, Tensor grad_terms, {schema(Inputs, Saved, Options, Needs, Whole)}, Tensor? weights=None) "
        "-> Tensor[]"
    ),
)
_rectangle_statistics = torch.library.custom_op(
    "tracer::contrastive_statistics",
    _run_statistics,
    mutates_args=(),
    schema=f"(str impl, {schema(Inputs, Options)}) -> (Tensor, Tensor)",
)
_forward.register_fake(_fake_forward)
_backward.register_fake(_fake_backward)
_rectangle_statistics.register_fake(_fake_statistics)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.impl, *arguments = inputs
    tensors, ctx.options = records(arguments, Inputs, Options)
    result = Forward(*output)
    ctx.save_for_backward(*tensors, *result.saved)
    ctx.mark_non_differentiable(*result.saved, result.diagnostics)


def _differentiate(ctx: Any, grad_terms: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    inputs, saved = records(ctx.saved_tensors, Inputs, Saved)
    asked = Inputs(*ctx.needs_input_grad[1 : 1 + len(Inputs._fields)])
    gradients = _through(ctx.impl, grad_terms, inputs, saved, ctx.options, asked)
    return None, *gradients, *(None for _ in Options._fields)


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "contrastive_loss: double backward is not supported by impl 'triton' and 'blocked'; use impl='eager'"
    )


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(_refuse_double_backward)
