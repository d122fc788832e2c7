"""The teacher's update: one pass over all parameters, against what people use today.

    python -m benchmarks.teacher                    ViT-B/32, RN50 and ViT-L/14 parameter sets, on the GPU if any
    python -m benchmarks.teacher --models '[RN50]' --repeats 9

Competitors, all moving float32 averages towards the same parameters with the same weight:

* published loop: the formula of the WMA's published code, tensor by tensor, with three temporaries each;
* lerp_ loop: the same loop in place;
* torch foreach (``torch._foreach_lerp_``), ``torch.optim.swa_utils.AveragedModel``, ema-pytorch (with
  use_foreach), as they come;
* tracer average_: the operation alone, on the lists that torch's foreach gets;
* tracer: ``MovingAverageTeacher.update``, all of its Python and the model's buffers included;
* floor: ``lerp_`` of one flat tensor of the same size, what the memory alone takes;
* on a GPU, copy: ``copy_`` of one flat float32 tensor of the same size, whose bandwidth the others' is a share of
  (on a CPU a copy also reads what it overwrites, and is no measure).

Launches and bytes are counted from the operations that torch really dispatches, views apart, a multi-tensor
call as one, and from the table of each kernel launch of ``average_``; times are interleaved medians, and the
results are compared first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import open_clip
import torch
from ema_pytorch import EMA as EmaPytorch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks._measure import Timing, interleaved, require_close, table
from benchmarks._part import Highlight, command_line, progress
from tracer.kernels import average_triton as kernel
from tracer.ops import average_
from tracer.schedules import Schedule
from tracer.teacher import MovingAverageTeacher

Mode = Literal["fp32", "fp32 + bf16 copy", "bf16 + bf16 copy"]  # the student's dtype, and the teacher's own
MODES: tuple[Mode, ...] = ("fp32", "fp32 + bf16 copy", "bf16 + bf16 copy")
MODELS = ("ViT-B-32", "RN50", "ViT-L-14")
WEIGHT = 0.01
PUBLISHED = "published loop"
LOOP = "lerp_ loop"
OURS = "tracer"
FLOOR = "floor: one flat lerp_"
COPY = "copy of one flat tensor"


class Constant(Schedule):
    """The same weight at every step, so that all competitors do the same arithmetic."""

    def _weight(self, step: int) -> float:
        return WEIGHT


class Counter(TorchDispatchMode):
    """Launches (dispatched operations that touch elements) and the bytes they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        schema = func._schema
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
        if is_view or func.overloadpacket.__name__ in (
            "detach",
            "_local_scalar_dense",
            "empty",
            "empty_like",
        ):
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
    """Count what torch dispatches within, and the launches of the moving average's kernel, which it does not."""
    shipped, tables = kernel.average_kernel, []

    class Launches:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            def launch(chunks: Tensor, *args: Any, **options: Any) -> Any:
                tables.append(chunks)
                with _disable_current_modes():  # what Triton's interpreter does with torch is no launch
                    return shipped[grid](chunks, *args, **options)

            return launch

    kernel.average_kernel = Launches()
    try:
        with Counter() as counter:
            yield counter
    finally:
        kernel.average_kernel = shipped
    counter.launches += len(tables)
    counter.bytes += sum(map(kernel.bytes_moved, tables))


def _bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, Tensor))


def build(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """An open_clip model with its real shapes and random values."""
    model = open_clip.create_model(name, pretrained=None, device="meta").to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype).normal_()
    return model


def published_loop(averages: list[Tensor], params: list[nn.Parameter]) -> None:
    """avg ← (avg + r·θ)/(1 + r), r = w_k / Σ_{i<k} w_i, each tensor anew, autograd on as in the original."""
    relative = WEIGHT / (1 - WEIGHT)
    for i, param in enumerate(params):
        averages[i] = ((averages[i] + relative * param) / (1 + relative)).detach()


@torch.no_grad()
def lerp_loop(averages: list[Tensor], params: list[nn.Parameter], copies: list[Tensor]) -> None:
    """The loop in place: one operation per tensor, one more per copy."""
    for average, param in zip(averages, params, strict=True):
        average.lerp_(param.float(), WEIGHT)
    for copy, average in zip(copies, averages, strict=False):
        copy.copy_(average)


@torch.no_grad()
def foreach(averages: list[Tensor], params: list[nn.Parameter], copies: list[Tensor]) -> None:
    """The multi-tensor calls that torch has for it."""
    torch._foreach_lerp_(averages, [p.float() for p in params], WEIGHT)
    if copies:
        torch._foreach_copy_(copies, averages)


def competitors(model: nn.Module, low: bool) -> dict[str, tuple[Callable[[], object], list[Tensor]]]:
    """Name -> its update, and the averages that it moves."""
    teacher = MovingAverageTeacher(model, Constant(), dtype=torch.bfloat16 if low else None)
    names = [name for name, _ in model.named_parameters()]
    params = list(model.parameters())
    state = teacher.state_dict()["averages"]
    averages = [state[name] for name in names]
    copies = [p.detach() for p in teacher.module.parameters()] if low else []
    steps = iter(range(1, 10**9))
    # All but the loop, which makes its averages anew, move the same tensors: memory for one more model.
    calls: dict[str, Callable[[], object]] = {}
    lists: dict[str, list[Tensor]] = {}
    if not low:  # these make no low-precision copies
        anew = [average.clone() for average in averages]
        averaged = AveragedModel(nn.Identity(), multi_avg_fn=get_ema_multi_avg_fn(1 - WEIGHT))
        averaged.module = teacher.module
        averaged.n_averaged.fill_(1)
        ema = EmaPytorch(model, ema_model=teacher.module, use_foreach=True, include_online_model=False)
        calls[PUBLISHED] = lambda: published_loop(anew, params)
        calls["AveragedModel"] = lambda: averaged.update_parameters(model)
        calls["ema-pytorch"] = lambda: ema.update_moving_average(ema.ema_model, model, 1 - WEIGHT)
    calls[LOOP] = lambda: lerp_loop(averages, params, copies)
    calls["torch foreach"] = lambda: foreach(averages, params, copies)
    calls["tracer average_"] = lambda: average_(averages, params, WEIGHT, copies=copies or None)
    calls[OURS] = lambda: teacher.update(next(steps))
    size = sum(p.numel() for p in params)
    flat = torch.zeros(size, device=params[0].device), torch.zeros(size, device=params[0].device)
    if flat[0].is_cuda:
        lists[COPY] = []
        calls[COPY] = lambda: flat[0].copy_(flat[1])
    if not low:
        calls[FLOOR] = lambda: flat[0].lerp_(flat[1], WEIGHT)
        lists |= {PUBLISHED: anew, FLOOR: []}
    return {name: (call, lists.get(name, averages)) for name, call in calls.items()}


def compare(name: str, mode: Mode, device: str, repeats: int, budget: float) -> list[dict[str, Any]]:
    """One table: every competitor on one parameter set."""
    model = build(name, device, torch.bfloat16 if mode == "bf16 + bf16 copy" else torch.float32)
    params = [p.detach() for p in model.parameters()]
    largest = max(range(len(params)), key=lambda i: params[i].numel())
    numel = sum(p.numel() for p in params)
    entrants = competitors(model, low=mode != "fp32")
    counts = {}
    for label, (call, averages) in entrants.items():
        call()  # builds what later calls keep
        want = torch.lerp(averages[largest], params[largest].float(), WEIGHT) if averages else None
        with counting() as counts[label]:
            call()
        if want is not None:
            require_close(f"{name}, {mode}: {label}", averages[largest], want, 1e-6)
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
    """Time one update of whole models' averages, each in turn with the others.

    Args:
        quick: ViT-B/32 only, five repeats.
        models: open_clip model names instead.
        modes: dtype of the student and of the teacher's low-precision copies; all three if not given.
        repeats: turns of each update.
        budget: seconds of timing per model and mode, at most, after three turns.

    Raises:
        SystemExit: an update's result differs from the others'.
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
    """(model, mode) → rows by update."""
    groups: dict[tuple[str, str], Group] = {}
    for row in results["updates"]:
        groups.setdefault((row["model"], row["mode"]), {})[row["update"]] = row
    return groups


def _time(row: dict[str, Any]) -> Timing:
    return Timing(**row["time"])


def _ratio(group: Group, other: str) -> float:
    return _time(group[other]).median / _time(group[OURS]).median


def report(results: dict[str, Any]) -> str:
    """A table per model and mode, as Markdown."""
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
    """ViT-B/32 in float32 against the published loop."""
    group = _groups(results).get(("ViT-B-32", "fp32"))
    if group is None:
        return []
    ours, theirs = (f"{1e3 * _time(group[who]).median:.3g} ms" for who in (OURS, PUBLISHED))
    what = f"teacher update, ViT-B/32, {group[OURS]['parameters'] / 1e6:.0f} M parameters"
    return [Highlight(what, ours, f"{theirs} (published loop)", f"{_ratio(group, PUBLISHED):.1f}×")]


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Bars of the first model's times, one panel per mode, ours in colour."""
    from matplotlib import pyplot

    groups = _groups(results)
    model = next(iter(groups))[0]
    modes = {mode: group for (name, mode), group in groups.items() if name == model}
    figure, panels = pyplot.subplots(
        len(modes), 1, sharex=True, squeeze=False, layout="constrained",
        height_ratios=[len(group) for group in modes.values()],
        figsize=(8, 0.9 + 0.27 * sum(len(group) + 1 for group in modes.values())),
    )  # fmt: skip
    for panel, (mode, group) in zip(panels[:, 0], modes.items(), strict=True):
        updates = sorted(group, key=lambda update: -_time(group[update]).median)
        times = [_time(group[update]) for update in updates]
        colours = [
            "#0072b2" if u.startswith(OURS) else "#d9d9d9" if u in (FLOOR, COPY) else "#8c8c8c"
            for u in updates
        ]
        bars = panel.barh(updates, [1e3 * t.median for t in times], color=colours)
        panel.bar_label(bars, [f"{1e3 * t.median:.3g}" for t in times], padding=3)
        panel.set_title(
            mode.replace(" + ", " student, ") + ("" if "+" in mode else " student and teacher"), loc="left"
        )
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.08)
    panels[-1, 0].set_xlabel(f"milliseconds per update of {model}")
    return {"update": figure}


def exact(results: dict[str, Any]) -> dict[str, float]:
    """Launches and bytes of our update; they depend on the kind of device alone."""
    found: dict[str, float] = {}
    for (name, mode), group in _groups(results).items():
        for what in ("launches", "bytes_per_parameter"):
            label = f"teacher {name}, {mode}, {results['device']}: {what.replace('_', ' ')}"
            found[label] = group[OURS][what]
    return found


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """The published loop's time divided by ours; the loop in place where copies are written."""
    return {
        f"teacher {name}, {mode}: {other} / ours": _ratio(group, other)
        for (name, mode), group in _groups(results).items()
        for other in (PUBLISHED, LOOP)
        if other in group and (other == PUBLISHED or PUBLISHED not in group)
    }


if __name__ == "__main__":
    command_line(measure, report)
