"""The teacher: a moving average of the student's own trajectory.

A schedule says how far the average moves after each optimizer step; ``MovingAverageTeacher`` holds
the average in float32 and runs it. ``build_teacher`` is the one call for a training loop: it takes
a plain module or a DeepSpeed engine of any ZeRO stage.

    teacher = build_teacher(model, WMA(total_steps))
    for step in range(1, total_steps + 1):
        with_teacher = teacher.encode(images, tokens)     # no autograd, eval mode
        ...                                               # forward, backward, optimizer step
        teacher.update(step)

Source: TRACER (arXiv 2605.29380); weights of the WMA from a Beta(β, β) density.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tracer.ops import average_
from tracer.schedules import Schedule


class MovingAverageTeacher:
    """Float32 moving average of a module, runnable as a module of its own.

    Parameters and floating-point buffers (BatchNorm statistics) are averaged; integer buffers, masks
    and buffers that are not saved with the model are copied. Parameters that are frozen when the teacher
    is built are the student's own tensors, in no second copy (unless they need another dtype).
    :attr:`module` is an ordinary ``nn.Module`` in eval mode without gradients; ``gather()`` is a
    checkpoint in the student's own format.

    Args:
        model: the student. Its present weights are θ̄_0. It is never written.
        schedule: how far to move after each step.
        dtype: dtype of ``module``. None or float32: ``module`` holds the averages themselves.
            bfloat16 or float16: ``module`` holds copies, renewed in the pass that moves the averages.
        own_stream: run ``encode`` on a CUDA stream of its own, so that it overlaps the student's
            forward; call ``wait`` before using what it returned.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        dtype: torch.dtype | None = None,
        own_stream: bool = False,
    ) -> None:
        rule = cast_rule(model, dtype or torch.float32)
        shared: dict[int, Any] = {id(p): p for p in model.parameters() if is_shared(p, rule)}
        module = copy.deepcopy(model, shared).eval().requires_grad_(False)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.to(rule(tensor))
        self._begin(model, module, schedule, own_stream)
        for name in self._tensors:
            self._hold(name)

    def _begin(self, model: nn.Module, module: nn.Module, schedule: Schedule, own_stream: bool) -> None:
        """Set what every kind of teacher has; ``module`` is the cast copy of ``model``."""
        self.schedule = schedule
        self.step = 0
        self._module = module
        self._averages: dict[str, Tensor] = {}  # float32, moved by the schedule
        self._low: dict[str, Tensor] = {}  # the module's own tensors, where they can't be the averages
        self._copied: dict[str, Tensor] = {}  # the module's tensors that just follow the student's
        # Live slots, not tensors: a parameter that the student replaces is still found.
        self._slots = _slots(model)
        slots = _slots(module)
        check_names("the student", self._slots, "its copy", slots)
        tensors: dict[str, Any] = {name: owner.get(key) for name, (owner, key) in slots.items()}
        names = {id(tensor): name for name, tensor in tensors.items()}
        self._tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in tensors.items()}
        student = {name: owner.get(key) for name, (owner, key) in self._slots.items()}
        self._shared = {name for name, tensor in tensors.items() if tensor is student[name]}
        # Key in a state dict -> name of the tensor; two keys for a tied one.
        self._keys = {key: names[id(t)] for key, t in module.state_dict(keep_vars=True).items()}
        floats = [t.dtype for t in self._tensors.values() if t.is_floating_point()]
        self._dtype = min(floats, key=lambda dtype: dtype.itemsize)
        self._stream: torch.cuda.Stream | None = None
        self._outputs: Any = None
        if own_stream:
            device = next(iter(self._tensors.values())).device
            if device.type != "cuda":
                raise ValueError(f"own_stream needs a CUDA model, this one is on {device}")
            self._stream = torch.cuda.Stream(device)

    def _hold(self, name: str) -> None:
        """Put one of the module's tensors under the average, or among the copied ones."""
        if name in self._shared:
            return
        mine, source = self._tensors[name], self._student(name)
        owner, key = self._slots[name]
        parameter = isinstance(owner.get(key), nn.Parameter)
        saved = parameter or name in self._keys.values()
        if not (saved and mine.is_floating_point() and (parameter or bool(source.isfinite().all()))):
            self._copied[name] = mine  # integers, masks (infinite), caches (not saved)
            return
        mine.copy_(source)  # from a master where there is one, not from its low-precision parameter
        if mine.dtype is torch.float32:
            self._averages[name] = mine
        else:
            self._averages[name] = source.to(torch.float32, copy=True)
            self._low[name] = mine

    def _student(self, key: str) -> Tensor:
        """The student's present tensor behind one of the averages or copied tensors."""
        owner, leaf = self._slots[key]
        tensor = owner.get(leaf)
        if tensor is None:
            raise ValueError(f"the student no longer has {key!r}: build a new teacher for a changed model")
        return tensor.detach()

    def _stepped(self) -> bool:
        """Whether the optimizer has taken the step that an update is called for."""
        return True

    def _refresh(self) -> None:
        """Bring the module up to date with averages held elsewhere."""

    @property
    def module(self) -> nn.Module:
        """The teacher as a module, up to date. Under ZeRO this may gather: call it on every rank."""
        self._refresh()
        return self._module

    @torch.no_grad()
    def update(self, step: int) -> bool:
        """Move the average after optimizer step ``step`` (1, 2, …); True when it moved.

        Call it once per optimizer step, not for steps that were skipped. A second call with the same
        step does nothing.

        Raises:
            ValueError: ``step`` is lower than an earlier one, or beyond the schedule's end; a parameter
                was unfrozen since the teacher was built.
        """
        if step < self.step:
            raise ValueError(
                f"update({step}) after update({self.step}): load the teacher's state of that step to go back"
            )
        if step == self.step or not self._stepped():
            return False
        for name in self._shared:
            owner, key = self._slots[name]
            if getattr(owner.get(key), "requires_grad", False):
                raise ValueError(f"{name!r} was frozen when the teacher was built: build it after unfreezing")
        weight = self.schedule.weight(step)
        self.step = step
        if weight == 0.0:
            return False
        if self._stream is not None:  # the last forward still reads what is now written
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        average_(
            list(self._averages.values()),
            [self._student(key) for key in self._averages],
            weight,
            copies=[self._low.get(key) for key in self._averages] if self._low else None,
        )
        for dtype in {tensor.dtype for tensor in self._copied.values()}:
            keys = [key for key, tensor in self._copied.items() if tensor.dtype is dtype]
            torch._foreach_copy_([self._copied[key] for key in keys], [self._student(key) for key in keys])
        return True

    @torch.no_grad()
    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """``module(*args, **kwargs)`` without autograd; floating-point inputs are cast to its dtype.

        With ``own_stream`` this returns at once: call :meth:`wait` before using the result. Under
        ZeRO it may gather weights: call it on every rank.
        """
        self._refresh()
        args, kwargs = self._cast(args), self._cast(kwargs)
        if self._stream is None:
            return self._forward(*args, **kwargs)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        _record((args, kwargs), self._stream)
        with torch.cuda.stream(self._stream):
            self._outputs = self._forward(*args, **kwargs)
        return self._outputs

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        # torch multiplies transposed activations [L, B, D] by a matrix in one product only where the matrix asks
        # for gradients. Otherwise it repeats the matrix, on a CPU in bfloat16 as L copies in memory: a ViT-B/32's
        # forward pass then takes several times as long. Under encode's no_grad the flag takes no gradient.
        frozen = [p for p in self._module.parameters() if p.is_floating_point() and not p.requires_grad]
        weights = [p for p in frozen if p.device.type == "cpu"]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            return self._module(*args, **kwargs)
        finally:
            for weight in weights:
                weight.requires_grad_(False)

    def wait(self) -> None:
        """Make the current stream wait for the last ``encode``; nothing to do without ``own_stream``."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            _record(self._outputs, current)
            self._outputs = None

    def _cast(self, inputs: Any) -> Any:
        if isinstance(inputs, Tensor):
            return inputs.to(self._dtype) if inputs.is_floating_point() else inputs
        if isinstance(inputs, dict):
            return {k: self._cast(v) for k, v in inputs.items()}
        if isinstance(inputs, (list, tuple)):
            return type(inputs)(self._cast(v) for v in inputs)
        return inputs

    def gather(self) -> dict[str, Tensor]:
        """The averaged model's state dict, averages in float32, keys as the student's; not copied.

        Under ZeRO it is collective: call it on every rank.
        """
        return {key: self._averages.get(n, self._tensors[n]) for key, n in self._keys.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs (this rank's part of it, under ZeRO); tensors are not copied."""
        return {
            "step": self.step,
            "schedule": repr(self.schedule),
            "shard": self._shard(),
            "averages": dict(self._averages),
            "copied": dict(self._copied),
        }

    def _shard(self) -> str:
        return "rank 0 of 1"

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: it belongs to another model (names, shapes), schedule, rank or number of ranks;
                nothing has been changed then.
        """
        for what, mine in (("schedule", repr(self.schedule)), ("shard", self._shard())):
            if state[what] != mine:
                raise ValueError(
                    f"the teacher's state was saved with {what} {state[what]}, this run has {mine}: "
                    "resume with the same settings and number of ranks"
                )
        parts = (("averages", self._averages), ("copied", self._copied))
        for part, tensors in parts:
            check_names("the saved teacher", state[part], "this model", tensors)
            for key, tensor in tensors.items():
                if state[part][key].shape != tensor.shape:
                    raise ValueError(
                        f"the saved teacher's {key!r} has shape {tuple(state[part][key].shape)}, this "
                        f"model's has {tuple(tensor.shape)}: the state belongs to another model"
                    )
        for part, tensors in parts:
            for key, tensor in tensors.items():
                tensor.copy_(state[part][key])
        for key, low in self._low.items():
            low.copy_(self._averages[key])
        self.step = int(state["step"])


def build_teacher(
    model: nn.Module,
    schedule: Schedule,
    *,
    dtype: torch.dtype | None = None,
    own_stream: bool = False,
) -> MovingAverageTeacher:
    """The teacher for a plain module or a DeepSpeed engine of any ZeRO stage.

    See :class:`MovingAverageTeacher` for the arguments. Under an engine ``update(step)`` may follow
    every ``engine.step()``: it moves only where an optimizer step was really taken, not after a
    micro-batch that only accumulates gradients, nor after a step skipped for overflow.
    """
    if type(model).__module__.partition(".")[0] == "deepspeed":
        from tracer.zero import zero_teacher  # imports DeepSpeed

        return zero_teacher(model, schedule, dtype=dtype, own_stream=own_stream)
    return MovingAverageTeacher(model, schedule, dtype=dtype, own_stream=own_stream)


def check_names(what: str, names: Iterable[str], other: str, expected: Iterable[str]) -> None:
    """Raise ValueError naming the first differences between two sets of tensor names."""
    names, expected = set(names), set(expected)
    if names != expected:
        parts = [
            f"{len(extra)} only in {where} ({', '.join(sorted(extra)[:3])})"
            for where, extra in ((what, names - expected), (other, expected - names))
            if extra
        ]
        raise ValueError(f"{what} and {other} differ in their tensors: {'; '.join(parts)}")


def cast_rule(model: nn.Module, dtype: torch.dtype | None) -> Callable[[Tensor], torch.dtype]:
    """Dtype that each of the model's tensors gets in a copy of ``dtype``; None keeps them all.

    What a low-precision model itself keeps in float32 (layer norms, statistics) stays float32.
    """
    mixed = any(p.dtype.itemsize < 4 for p in model.parameters() if p.is_floating_point())

    def rule(tensor: Tensor) -> torch.dtype:
        keep = not tensor.is_floating_point() or (mixed and tensor.dtype is torch.float32)
        return tensor.dtype if dtype is None or keep else dtype

    return rule


def is_shared(param: nn.Parameter, rule: Callable[[Tensor], torch.dtype]) -> bool:
    """Whether a teacher uses the student's own tensor: it never trains, and needs no cast."""
    return not param.requires_grad and rule(param) is param.dtype


def _slots(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Name -> (owning dictionary, key) of every parameter and buffer; a tied one has its first name."""
    slots: dict[str, tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    slots[f"{prefix}.{key}" if prefix else key] = (owner, key)
    return slots


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
