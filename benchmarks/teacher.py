"""Time of the teacher's update, one pass over all parameters, against the updates that people use today.

    python -m benchmarks.teacher                    ViT-B/32, RN50 and ViT-L/14 parameter sets, on the GPU if
    any python -m benchmarks.teacher --models '[RN50]' --repeats 9

All competitors move float32 averages towards the same parameters with the same weight:

* published loop: the formula of the published code of the weighted moving average, tensor by tensor, with three
  temporary tensors each;
* lerp_ loop: the same loop in place;
* torch foreach (``torch._foreach_lerp_``), ``torch.optim.swa_utils.AveragedModel`` and ema-pytorch (with
  use_foreach), as these packages provide them;
* tracer average_: the operation alone, on the lists that torch's foreach gets;
* tracer: ``MovingAverageTeacher.update`` with all of its Python, and the model's buffers;
* floor: ``lerp_`` of one flat tensor of the same size, which only the memory's speed limits;
* on a GPU, copy: ``copy_`` of one flat float32 tensor of the same size. The table gives the bandwidth of the
  others as a share of the copy's (on a CPU a copy also reads what it overwrites, so it is left out).

Launches and bytes are counted from the operations that torch dispatches, without views and with a multi-tensor
call as one, and from the table of each kernel launch of ``average_``. Times are medians of interleaved calls,
after the results have been compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import open_clip
import torch
from ema_pytorch import EMA as EmaPytorch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import plots, published
from benchmarks.harness import Highlight, command_line, progress, table
from benchmarks.measure import Timing, interleaved, require_close
from tracer.kernels._triton import recording
from tracer.kernels.average_triton import bytes_moved
from tracer.ops import AverageTable, average_
from tracer.schedules import Schedule
from tracer.teacher import MovingAverageTeacher

# The dtype of the student, and of the copy that the teacher runs with where that is not the average itself.
Mode = Literal["fp32", "fp32 + bf16 copy", "bf16 + bf16 copy"]
MODES: tuple[Mode, ...] = ("fp32", "fp32 + bf16 copy", "bf16 + bf16 copy")
MODELS = ("ViT-B-32", "RN50", "ViT-L-14")
WEIGHT = 0.01
PUBLISHED = "published loop"
LOOP = "lerp_ loop"
OURS = "tracer"
FLOOR = "floor: one flat lerp_"
COPY = "copy of one flat tensor"

PICTURES = {
    "update": "Bar charts: milliseconds that each way to update the teacher of one model takes, by the dtypes of "
    "student and teacher."
}


class Constant(Schedule):
    """A schedule with the same weight at every step, so that all competitors do the same arithmetic."""

    def _weight(self, step: int) -> float:
        return WEIGHT


UNCOUNTED = ("detach", "_local_scalar_dense", "empty", "empty_like")  # operations that move no elements


class Counter(TorchDispatchMode):
    """Counts launches (dispatched operations that touch elements) and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
        if is_view or func.overloadpacket.__name__ in UNCOUNTED:
            return out
        self.launches += 1
        named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
        written = [
            named[a.name] for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
        ] or [out]
        read = [v for name, v in named.items() if not ("copy_" in str(func) and name == "self")]
        self.bytes += _bytes(read) + _bytes(written)
        return out


@contextmanager
def counting() -> Iterator[Counter]:
    """Count what torch dispatches within the block, and the kernel launches of ``average_``, which it doesn't."""
    with Counter() as counter, recording(execute=False, keep_arguments=True) as launches:
        yield counter
    for launch in launches:  # outside, because Triton's interpreter itself uses torch
        launch.run()
    counter.launches += len(launches)
    counter.bytes += sum(bytes_moved(launch.arguments[0]) for launch in launches)


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, Tensor))


def build(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Return an open_clip model with its real shapes and random values."""
    model = open_clip.create_model(name, pretrained=None, device="meta").to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype).normal_()
    return model


def published_loop(averages: list[Tensor], params: list[nn.Parameter]) -> None:
    """Move the averages as the published code does: each into a new tensor, and with autograd on."""
    for i, param in enumerate(params):
        averages[i] = published.moved_average(averages[i], param, WEIGHT).detach()


@torch.no_grad()
def lerp_loop(averages: list[Tensor], params: list[nn.Parameter], copies: list[Tensor]) -> None:
    """Move the averages in place: one operation per tensor, one more per copy."""
    for average, param in zip(averages, params, strict=True):
        average.lerp_(param.float(), WEIGHT)
    for copy, average in zip(copies, averages, strict=False):
        copy.copy_(average)


@torch.no_grad()
def foreach(averages: list[Tensor], params: list[nn.Parameter], copies: list[Tensor]) -> None:
    """Move the averages with torch's multi-tensor calls."""
    torch._foreach_lerp_(averages, [p.float() for p in params], WEIGHT)
    if copies:
        torch._foreach_copy_(copies, averages)


def averages_of(teacher: MovingAverageTeacher, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the teacher's float32 averages of these parameters, and its low-precision copies, if it has any."""
    averages, copies = teacher.average.averages, teacher.average.rounded
    return [averages[name] for name in names], [copies[name] for name in names if name in copies]


def competitors(model: nn.Module, low: bool) -> dict[str, tuple[Callable[[], object], list[Tensor]]]:
    """Return by name each update and the averages that it moves; ``low``: with bfloat16 copies of the averages.

    All updates but the published loop, which makes new tensors, move the same averages, to save memory.
    """
    teacher = MovingAverageTeacher(model, Constant(), dtype=torch.bfloat16 if low else None)
    params = list(model.parameters())
    averages, copies = averages_of(teacher, [name for name, _ in model.named_parameters()])
    steps = iter(range(1, 10**9))
    updates: dict[str, tuple[Callable[[], object], list[Tensor]]] = {}
    if not low:  # these packages make no low-precision copies
        replaced = [average.clone() for average in averages]
        averaged = AveragedModel(nn.Identity(), multi_avg_fn=get_ema_multi_avg_fn(1 - WEIGHT))
        averaged.module = teacher.module
        averaged.n_averaged.fill_(1)
        ema = EmaPytorch(model, ema_model=teacher.module, use_foreach=True, include_online_model=False)
        updates[PUBLISHED] = lambda: published_loop(replaced, params), replaced
        updates["AveragedModel"] = lambda: averaged.update_parameters(model), averages
        updates["ema-pytorch"] = (
            lambda: ema.update_moving_average(ema.ema_model, model, 1 - WEIGHT),
            averages,
        )
    updates[LOOP] = lambda: lerp_loop(averages, params, copies), averages
    updates["torch foreach"] = lambda: foreach(averages, params, copies), averages
    table = AverageTable()
    updates["tracer average_"] = (
        lambda: average_(averages, params, WEIGHT, copies=copies or None, table=table),
        averages,
    )
    updates[OURS] = lambda: teacher.update(next(steps)), averages
    size = sum(p.numel() for p in params)
    flat = torch.zeros(size, device=params[0].device), torch.zeros(size, device=params[0].device)
    if flat[0].is_cuda:
        updates[COPY] = lambda: flat[0].copy_(flat[1]), []
    if not low:
        updates[FLOOR] = lambda: flat[0].lerp_(flat[1], WEIGHT), []
    return updates


def compare(name: str, mode: Mode, device: str, repeats: int, budget: float) -> list[dict[str, Any]]:
    """Check, count and time every competitor on one parameter set, and return their rows."""
    model = build(name, device, torch.bfloat16 if mode == "bf16 + bf16 copy" else torch.float32)
    params = [p.detach() for p in model.parameters()]
    largest = max(range(len(params)), key=lambda i: params[i].numel())
    numel = sum(p.numel() for p in params)
    entrants = competitors(model, low=mode != "fp32")
    counts = {}
    for label, (call, averages) in entrants.items():
        call()  # builds the tables that later calls reuse
        expected = torch.lerp(averages[largest], params[largest].float(), WEIGHT) if averages else None
        with counting() as counts[label]:
            call()
        if expected is not None:
            require_close(f"{name}, {mode}: {label}", averages[largest], expected, 1e-6)
    times = interleaved(
        {label: call for label, (call, _) in entrants.items()}, repeats=repeats, budget=budget
    )
    return [
        {
            "model": name,
            "mode": mode,
            "update": label,
            "tensors": len(params),
            "parameters": numel,
            "launches": counts[label].launches,
            "bytes_per_parameter": counts[label].bytes / numel,
            "time": times[label],
            "bytes_per_second": counts[label].bytes / times[label].median,
        }
        for label in entrants
    ]


def measure(
    *,
    quick: bool = False,
    models: list[str] | None = None,
    modes: list[Mode] | None = None,
    repeats: int = 15,
    budget: float = 20.0,
) -> dict[str, Any]:
    """Time every update of the averages of whole models, in turns.

    Args:
        quick: only ViT-B/32, with five repeats.
        models: names of open_clip models; default: ViT-B-32, RN50, ViT-L-14.
        modes: dtypes of the student and of the teacher's low-precision copies; all three by default.
        repeats: turns of each update.
        budget: seconds for the turns of one model and mode; at least three turns are taken.

    Raises:
        WrongResult: an update's result is wrong; ends the benchmark.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for name in models or (MODELS[:1] if quick else MODELS):
        for mode in modes or MODES:
            progress(f"{name}, {mode}")
            rows += compare(name, mode, device, min(repeats, 5) if quick else repeats, budget)
    return {"device": device, "updates": rows}


Group = dict[str, dict[str, Any]]


def _groups(results: dict[str, Any]) -> dict[tuple[str, str], Group]:
    """Return the rows by update of each model and mode."""
    groups: dict[tuple[str, str], Group] = {}
    for row in results["updates"]:
        groups.setdefault((row["model"], row["mode"]), {})[row["update"]] = row
    return groups


def _time(row: dict[str, Any]) -> Timing:
    return Timing(**row["time"])


def _ratio(group: Group, other: str) -> float:
    return _time(group[other]).median / _time(group[OURS]).median


def report(results: dict[str, Any]) -> str:
    """Return a table for each model and mode, as Markdown."""
    parts = []
    for (name, mode), group in _groups(results).items():
        first = group[OURS]
        parts.append(
            f"{name}, {first['parameters'] / 1e6:.1f} M parameters in {first['tensors']} tensors, {mode}:"
        )
        header = ["update", "launches", "bytes per parameter", "time (p20–p80)", "GB/s", "time / ours"]
        lines = []
        for update, row in group.items():
            rate = f"{row['bytes_per_second'] / 1e9:.1f}"
            if COPY in group:
                rate += f" ({row['bytes_per_second'] / group[COPY]['bytes_per_second']:.0%} of a copy's)"
            moved = f"{row['bytes_per_parameter']:.1f}"
            lines.append(
                [update, str(row["launches"]), moved, str(_time(row)), rate, f"{_ratio(group, update):.2f}"]
            )
        parts.append(table(header, lines))
    return "\n\n".join(parts)


def highlights(results: dict[str, Any]) -> list[Highlight]:
    """Return the row of ViT-B/32 in float32, compared with the published loop."""
    group = _groups(results).get(("ViT-B-32", "fp32"))
    if group is None:
        return []
    ours, compared = (f"{1e3 * _time(group[update]).median:.3g} ms" for update in (OURS, PUBLISHED))
    what = f"teacher update, ViT-B/32, {group[OURS]['parameters'] / 1e6:.0f} M parameters"
    return [Highlight(what, ours, f"{PUBLISHED}: {compared}", f"{_ratio(group, PUBLISHED):.1f}×")]


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Draw the times of the first model as bars, one panel per mode."""
    groups = _groups(results)
    model = next(iter(groups))[0]
    modes = {mode: group for (name, mode), group in groups.items() if name == model}
    bars = sum(len(group) + 1 for group in modes.values())
    figure = Figure(figsize=(8, 0.9 + 0.27 * bars), layout="constrained")
    heights = [len(group) for group in modes.values()]
    panels = figure.subplots(len(modes), 1, sharex=True, squeeze=False, height_ratios=heights)
    for panel, (mode, group) in zip(panels[:, 0], modes.items(), strict=True):
        updates = sorted(group, key=lambda update: -_time(group[update]).median)
        times = [1e3 * _time(group[update]).median for update in updates]
        drawn = panel.barh(updates, times, color=[_colour(update) for update in updates])
        panel.bar_label(drawn, [f"{time:.3g}" for time in times], padding=3)
        dtypes = mode.replace(" + ", " student, ") + ("" if "+" in mode else " student and teacher")
        panel.set_title(dtypes, loc="left")
        plots.bare(panel)
        panel.margins(x=0.08)
    panels[-1, 0].set_xlabel(f"milliseconds per update of {model}")
    return {"update": figure}


def _colour(update: str) -> str:
    if update in (FLOOR, COPY):
        return plots.REFERENCE
    return plots.OURS if update.startswith(OURS) else plots.OTHER


def exact(results: dict[str, Any]) -> dict[str, float]:
    """Return launches and bytes of TRACER's update; they depend on the kind of device alone."""
    return {
        f"teacher {name}, {mode}, {results['device']}: {count.replace('_', ' ')}": group[OURS][count]
        for (name, mode), group in _groups(results).items()
        for count in ("launches", "bytes_per_parameter")
    }


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Return the published loop's time divided by TRACER's; where copies are written, the lerp_ loop's."""
    return {
        f"teacher {name}, {mode}: {other} / ours": _ratio(group, other)
        for (name, mode), group in _groups(results).items()
        for other in (PUBLISHED, LOOP)
        if other in group and (other == PUBLISHED or PUBLISHED not in group)
    }


if __name__ == "__main__":
    command_line(measure, report)
