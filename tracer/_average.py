"""What every moving average of a student's weights has: the module that runs, and the tensors that move.

``_average_plain.py`` holds the average of a module in one process, ``_average_zero.py`` those of DeepSpeed
engines. They differ in where the student's float32 weights are read and in how the module gets its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracer.ops import AverageTable, average_


class Student:
    """The parameters and buffers of a module by name, looked up where the module keeps them at the moment.

    A parameter that training replaces is followed; tied tensors have the first of their names.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._slots = _slots(model)
        self._registries = _registries(model)

    def names(self) -> list[str]:
        """Return the names in the order of the module."""
        return list(self._slots)

    def get(self, name: str) -> Any:
        """Return the parameter or buffer itself, None where the module has lost it."""
        owner, key = self._slots[name]
        return owner.get(key)

    def tensor(self, name: str) -> Tensor:
        """Return the values of a parameter or buffer, without autograd and without a copy.

        Raises:
            ValueError: the module has lost it.
        """
        tensor = self.get(name)
        if tensor is None:
            raise ValueError(f"the student no longer has {name!r}: build a new teacher for a changed model")
        return tensor.detach()

    def check_unchanged(self, shared: Iterable[str]) -> None:
        """Refuse a student that trains parameters which its average does not follow.

        Args:
            shared: names of the parameters that were frozen when the average was built, and are not copied.

        Raises:
            ValueError: one of these has been unfrozen, or a parameter has been added.
        """
        for name in shared:
            if getattr(self.get(name), "requires_grad", False):
                raise ValueError(f"{name!r} was frozen when the teacher was built: build it after unfreezing")
        if all(_same(registry, content) for registry, content in self._registries):
            return
        now = Student(self._model)
        added = [n for n in now.names() if n not in self._slots and isinstance(now.get(n), nn.Parameter)]
        if added:
            raise ValueError(
                f"the student has parameters that were added after the teacher was built ({', '.join(added[:3])}"
                f"{', …' * (len(added) > 3)}): build the teacher after adding them"
            )
        self._slots, self._registries = (
            now._slots,
            now._registries,
        )  # a module may have been replaced by another


class Average:
    """A module that runs with the moving average of a student's weights.

    Args:
        student: the module that trains.
        module: its copy, in eval mode and without gradients. A tensor that the two have in common is shared
            with the student and neither averaged nor copied.

    Attributes:
        module: the copy; up to date after :meth:`refresh`.
        averages: float32 tensors, moved towards the student's.
        rounded: tensors of the module that repeat an average in another dtype or on another device.
        copied: tensors of the module that are set to the student's: integers, masks, caches.
        device: the device that the module runs on.
        dtype: the lowest floating-point dtype among the module's tensors, which its inputs are cast to.
        shard: names the part of the averages that this process holds.
    """

    shard = "rank 0 of 1"

    def __init__(self, student: nn.Module, module: nn.Module) -> None:
        self.module = module
        self._table = AverageTable()
        self.averages: dict[str, Tensor] = {}
        self.rounded: dict[str, Tensor] = {}
        self.copied: dict[str, Tensor] = {}
        self._sources: dict[str, Callable[[], Tensor]] = {}  # the student's tensor behind each of these
        self._student = Student(student)
        own = Student(module)
        check_names("the student", self._student.names(), "its copy", own.names())
        self._tensors = {name: own.tensor(name) for name in own.names()}
        self._shared = {name for name in own.names() if own.get(name) is self._student.get(name)}
        # Key in a state dict -> name of the tensor; a tied tensor has several keys.
        names = {id(own.get(name)): name for name in own.names()}
        self._keys = {key: names[id(t)] for key, t in module.state_dict(keep_vars=True).items()}
        self.device = next(iter(self._tensors.values())).device
        floats = [t.dtype for t in self._tensors.values() if t.is_floating_point()]
        self.dtype = min(floats, key=lambda dtype: dtype.itemsize)

    def follow(self, name: str, source: Callable[[], Tensor] | None = None) -> None:
        """Let the module's tensor ``name`` follow the student's, unless the two share it.

        Parameters, and finite floating-point buffers that are saved with the model, are averaged; the
        others are copied.

        Args:
            name: of a parameter or buffer.
            source: returns the student's present values; by default those of its tensor of this name.
        """
        if name in self._shared:
            return
        source = source or partial(self._student.tensor, name)
        tensor = self._tensors[name]
        parameter = isinstance(self._student.get(name), nn.Parameter)
        saved = parameter or name in self._keys.values()
        if saved and tensor.is_floating_point() and (parameter or bool(source().isfinite().all())):
            self.average(name, tensor, source)
        else:
            self.copied[name] = tensor
            self._sources[name] = source

    def average(self, name: str, tensor: Tensor, source: Callable[[], Tensor]) -> None:
        """Average ``source()`` from its present values on, and keep ``tensor`` equal to the average.

        ``tensor`` is the average itself if it is float32 and on the device of ``source()``.
        """
        values = source()
        tensor.copy_(values)
        if tensor.dtype is torch.float32 and tensor.device == values.device:
            self.averages[name] = tensor
        else:
            self.averages[name] = values.to(torch.float32, copy=True)
            self.rounded[name] = tensor
        self._sources[name] = source

    def check_student(self) -> None:
        """Refuse a student that trains what is not followed; see :meth:`Student.check_unchanged`."""
        self._student.check_unchanged(self._shared)

    def stepped(self) -> bool:
        """Return whether the optimizer has taken the step that the average is to move for."""
        return True

    def move(self, weight: float) -> None:
        """Move every average by ``weight`` towards the student's tensor, and set the copied tensors to it."""
        average_(
            list(self.averages.values()),
            [self._sources[name]() for name in self.averages],
            weight,
            copies=[self.rounded.get(name) for name in self.averages] if self.rounded else None,
            table=self._table,
        )
        for dtype in {tensor.dtype for tensor in self.copied.values()}:
            names = [name for name, tensor in self.copied.items() if tensor.dtype is dtype]
            torch._foreach_copy_([self.copied[n] for n in names], [self._sources[n]() for n in names])

    def refresh(self) -> None:
        """Bring the module up to date with averages that are kept elsewhere."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Return ``module(*args, **kwargs)`` with the module as it is."""
        with _fast_cpu_products(self.module):
            return self.module(*args, **kwargs)

    def side_stream(self) -> torch.cuda.Stream:
        """Return a new CUDA stream on which the module may run beside the student.

        Raises:
            ValueError: the module is not on a GPU.
        """
        if self.device.type != "cuda":
            raise ValueError(f"own_stream needs a CUDA model, this one is on {self.device}")
        return torch.cuda.Stream(self.device)

    def gather(self) -> dict[str, Tensor]:
        """Return the module's state dict with its averages in float32; nothing is copied."""
        return {key: self.averages.get(n, self._tensors[n]) for key, n in self._keys.items()}

    def load(self, averages: Mapping[str, Tensor], copied: Mapping[str, Tensor]) -> None:
        """Set the averages and the copied tensors to saved ones.

        Raises:
            ValueError: names or shapes differ; nothing has been changed then.
        """
        parts = ((averages, self.averages), (copied, self.copied))
        for saved, tensors in parts:
            check_names("the saved teacher", saved, "this model", tensors)
            for name, tensor in tensors.items():
                if saved[name].shape != tensor.shape:
                    raise ValueError(
                        f"the saved teacher's {name!r} has shape {tuple(saved[name].shape)}, this "
                        f"model's has {tuple(tensor.shape)}: the state belongs to another model"
                    )
        for saved, tensors in parts:
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])
        self.loaded()

    def part(self, name: str) -> tuple[Tensor, int] | None:
        """Return what this process holds of the average of a parameter or buffer, a flat view to read or to write,
        and at which element it begins; None where the average has no copy of it.

        Call :meth:`loaded` after writing.
        """
        tensor = self.averages.get(name, self.copied.get(name))
        return None if tensor is None else (tensor.view(-1), 0)

    def loaded(self) -> None:
        """Bring what is derived from the averages up to date, after these have been written."""
        for name, tensor in self.rounded.items():
            tensor.copy_(self.averages[name])


def cast_rule(model: nn.Module, dtype: torch.dtype | None) -> Callable[[Tensor], torch.dtype]:
    """Return a function from a tensor of ``model`` to its dtype in a copy of ``dtype``; None keeps them all.

    What a low-precision model itself keeps in float32 (layer norms, statistics) stays float32.
    """
    mixed = any(p.dtype.itemsize < 4 for p in model.parameters() if p.is_floating_point())

    def rule(tensor: Tensor) -> torch.dtype:
        keep = not tensor.is_floating_point() or (mixed and tensor.dtype is torch.float32)
        return tensor.dtype if dtype is None or keep else dtype

    return rule


def is_shared(param: nn.Parameter, rule: Callable[[Tensor], torch.dtype]) -> bool:
    """Return whether a copy may use the student's own parameter: it does not train, and needs no cast."""
    return not param.requires_grad and rule(param) is param.dtype


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


def _slots(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Return name -> (owning dictionary, key) of every parameter and buffer."""
    slots: dict[str, tuple[dict[str, Any], str]] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    slots[f"{prefix}.{key}" if prefix else key] = (owner, key)
    return slots


def _registries(model: nn.Module) -> list[tuple[dict[str, Any], int | list[Any]]]:
    """Return every dictionary of parameters in the model with its size, and of submodules with its content.

    Comparing them finds an added parameter without a walk through the modules at each update.
    """
    registries: list[tuple[dict[str, Any], int | list[Any]]] = []
    for module in model.modules():
        registries.append((module._parameters, len(module._parameters)))
        registries.append((module._modules, list(module._modules.values())))
    return registries


def _same(registry: dict[str, Any], content: int | list[Any]) -> bool:
    if isinstance(content, int):
        return len(registry) == content
    return len(registry) == len(content) and all(map(operator.is_, registry.values(), content))


@contextmanager
def _fast_cpu_products(module: nn.Module) -> Iterator[None]:
    """Let the module's weights on a CPU ask for gradients, so that torch multiplies by each matrix once.

    torch multiplies transposed activations [L, B, D] by a matrix in one product only where the matrix asks
    for gradients. Otherwise it repeats the matrix, on a CPU in bfloat16 as L copies in memory: a ViT-B/32's
    forward pass then takes several times as long. Under ``no_grad`` the flag takes no gradient.
    """
    frozen = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    weights = [p for p in frozen if p.device.type == "cpu"]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
