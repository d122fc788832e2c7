"""The teacher: a moving average of the student's own trajectory.

A schedule says how far the average moves after each optimizer step; ``MovingAverageTeacher`` moves it
and runs the averaged model. ``build_teacher`` is the one call for a training loop: it takes a plain
module or a DeepSpeed engine of any ZeRO stage.

    teacher = build_teacher(model, WMA(total_steps))
    for step in range(1, total_steps + 1):
        teacher_output = teacher.encode(images, tokens)   # no autograd, eval mode
        ...                                               # forward, backward, optimizer step
        teacher.update(step)

Source: TRACER (arXiv 2605.29380); weights of the WMA from a Beta(β, β) density.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tracer._average import Average
from tracer._average_plain import PlainAverage
from tracer.schedules import EMA, WMA, Frozen, Schedule, Uniform

__all__ = ["EMA", "WMA", "Frozen", "MovingAverageTeacher", "Schedule", "Uniform", "build_teacher"]


class MovingAverageTeacher:
    """Float32 moving average of a student, runnable as a module of its own.

    Parameters and floating-point buffers (BatchNorm statistics) are averaged; integer buffers, masks
    and buffers that are not saved with the model are copied. Parameters that are frozen when the teacher
    is built are the student's own tensors, in no second copy (unless they need another dtype).
    :attr:`module` is an ordinary ``nn.Module`` in eval mode without gradients; ``gather()`` returns a
    checkpoint in the student's own format.

    Under a DeepSpeed engine :meth:`update` may follow every ``engine.step()``: it moves only where an
    optimizer step was really taken, not after a micro-batch that only accumulates gradients, nor after a
    step skipped for overflow. It communicates nothing. :attr:`module`, :meth:`encode` and :meth:`gather`
    are collective at ZeRO stages 1 to 3: call them on every rank. Parameters that the optimizer does not
    have (frozen ones) are the student's own, and buffers are each rank's own, as in the engine.

    Args:
        model: the student: a module, also as wrapped by ``DistributedDataParallel`` or ``torch.compile``,
            or what ``deepspeed.initialize`` returned, with its optimizer. Its present weights are θ̄_0. It
            is never written.
        schedule: how far to move after each step.
        dtype: dtype of ``module``. None: float32 for a module, the engine's own for an engine. In float32
            ``module`` holds the averages themselves; in bfloat16 or float16 it holds copies, renewed in the
            pass that moves the averages.
        own_stream: run ``encode`` on a CUDA stream of its own, so that it overlaps the student's
            forward; call ``wait`` before using what it returned. Not at ZeRO stage 3, where DeepSpeed has
            streams of its own.

    Attributes:
        schedule: as given.
        step: the last step that :meth:`update` was called for.
        average: the averages, and the module that runs with them.

    Raises:
        ValueError: ``own_stream`` without a GPU or at stage 3; an engine whose master weights cannot be
            followed.
        RuntimeError: the installed DeepSpeed lacks an attribute that the average needs; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        dtype: torch.dtype | None = None,
        own_stream: bool = False,
    ) -> None:
        self.schedule = schedule
        self.step = 0
        self.average = _average_of(model, dtype)
        self._stream = self.average.side_stream() if own_stream else None
        self._outputs: Any = None  # of the last encode, until the current stream waits for it

    @property
    def module(self) -> nn.Module:
        """The teacher as a module, up to date. Under ZeRO this may gather: call it on every rank."""
        self.average.refresh()
        return self.average.module

    @torch.no_grad()
    def update(self, step: int) -> bool:
        """Move the average after optimizer step ``step`` (1, 2, …); True when it moved.

        Call it once per optimizer step, not for steps that were skipped. A second call with the same
        step does nothing.

        Raises:
            ValueError: ``step`` is below 1, lower than an earlier one, or beyond the schedule's end; a parameter
                was unfrozen, added or removed since the teacher was built.
        """
        if step < 1:
            self.schedule.weight(step)  # raises
        if step < self.step:
            raise ValueError(
                f"update({step}) after update({self.step}): load the teacher's state of that step to go back"
            )
        if step == self.step or not self.average.stepped():
            return False
        self.average.check_student()
        weight = self.schedule.weight(step)
        self.step = step
        if weight == 0.0:
            return False
        if self._stream is not None:  # the last forward still reads what is now written
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self.average.move(weight)
        return True

    @torch.no_grad()
    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Return ``module(*args, **kwargs)`` without autograd; floating-point inputs are cast to its dtype.

        With ``own_stream`` this returns at once: call :meth:`wait` before using the result. Under
        ZeRO it may gather weights: call it on every rank.
        """
        self.average.refresh()
        args, kwargs = _cast(args, self.average.dtype), _cast(kwargs, self.average.dtype)
        if self._stream is None:
            return self.average.run(*args, **kwargs)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        _record((args, kwargs), self._stream)
        with torch.cuda.stream(self._stream):
            self._outputs = self.average.run(*args, **kwargs)
        return self._outputs

    def wait(self) -> None:
        """Make the current stream wait for the last ``encode``; nothing to do without ``own_stream``."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            _record(self._outputs, current)
            self._outputs = None

    def gather(self) -> dict[str, Tensor]:
        """Return the averaged model's state dict, averages in float32, keys as the student's; not copied.

        Under ZeRO it is collective: call it on every rank.
        """
        return self.average.gather()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs (this rank's part of it, under ZeRO); tensors are not copied."""
        return {
            "step": self.step,
            "schedule": repr(self.schedule),
            "shard": self.average.shard,
            "averages": dict(self.average.averages),
            "copied": dict(self.average.copied),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: it belongs to another model (names, shapes), schedule, rank or number of ranks;
                nothing has been changed then.
        """
        for what, mine in (("schedule", repr(self.schedule)), ("shard", self.average.shard)):
            if state[what] != mine:
                raise ValueError(
                    f"the teacher's state was saved with {what} {state[what]}, this run has {mine}: "
                    "resume with the same settings and number of ranks"
                )
        self.average.load(state["averages"], state["copied"])
        self.step = int(state["step"])


def build_teacher(
    model: nn.Module,
    schedule: Schedule,
    *,
    dtype: torch.dtype | None = None,
    own_stream: bool = False,
) -> MovingAverageTeacher:
    """Return the teacher of a plain module or of a DeepSpeed engine of any ZeRO stage.

    See :class:`MovingAverageTeacher` for the arguments and errors.
    """
    return MovingAverageTeacher(model, schedule, dtype=dtype, own_stream=own_stream)


def _average_of(model: nn.Module, dtype: torch.dtype | None) -> Average:
    if type(model).__module__.partition(".")[0] == "deepspeed":
        from tracer._average_zero import zero_average  # imports DeepSpeed

        return zero_average(model, dtype)
    return PlainAverage(model, dtype)


def _cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Return nested inputs with their floating-point tensors cast to ``dtype``."""
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {key: _cast(value, dtype) for key, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(_cast(value, dtype) for value in inputs)
    return inputs


def _record(value: Any, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that ``stream`` uses the tensors in ``value``."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            value.record_stream(stream)
    elif isinstance(value, dict):
        _record(tuple(value.values()), stream)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _record(item, stream)
