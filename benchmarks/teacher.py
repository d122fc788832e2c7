"""The teacher's update: one pass over all parameters, against what people use today.

    python -m benchmarks.teacher                    # ViT-B/32, RN50 and ViT-L/14 parameter sets, on the GPU if any
    python -m benchmarks.teacher --models RN50 --repeats 9 --json teacher.json

Competitors, all moving float32 averages towards the same parameters with the same weight:

* published loop: the formula of the WMA's published code, tensor by tensor, with three temporaries each;
* lerp_ loop: the same loop in place;
* torch._foreach_lerp_, torch.optim.swa_utils.AveragedModel, ema-pytorch (with use_foreach), as they come;
* tracer average_: the operation alone, on the lists that torch's foreach gets;
* tracer: ``MovingAverageTeacher.update``, all of its Python and the model's buffers included;
* floor: ``lerp_`` of one flat tensor of the same size, what the memory alone takes.

Launches and bytes are counted from the operations that torch really dispatches (views apart) and the
kernel launches of ``average_``; times are interleaved medians, and the results are compared first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from ema_pytorch import EMA as EmaPytorch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks._measure import environment, interleaved, plain, require_close, table
from tracer.ops import average_
from tracer.teacher import MovingAverageTeacher, Schedule

MODELS = ("ViT-B-32", "RN50", "ViT-L-14")
WEIGHT = 0.01
OURS = "tracer"
FLOOR = "floor: one flat lerp_"


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
    averages = [teacher._averages[name] for name in names]
    copies = [teacher._low[name] for name in names if name in teacher._low]
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
        calls["published loop"] = lambda: published_loop(anew, params)
        calls["AveragedModel"] = lambda: averaged.update_parameters(model)
        calls["ema-pytorch"] = lambda: ema.update_moving_average(ema.ema_model, model, 1 - WEIGHT)
    calls["lerp_ loop"] = lambda: lerp_loop(averages, params, copies)
    calls["torch foreach"] = lambda: foreach(averages, params, copies)
    calls["tracer average_"] = lambda: average_(averages, params, WEIGHT, copies=copies or None)
    calls[OURS] = lambda: teacher.update(next(steps))
    if not low:
        size = sum(p.numel() for p in params)
        flat = torch.zeros(size, device=params[0].device), torch.zeros(size, device=params[0].device)
        calls[FLOOR] = lambda: flat[0].lerp_(flat[1], WEIGHT)
        lists = {"published loop": anew, FLOOR: []}
    return {name: (call, lists.get(name, averages)) for name, call in calls.items()}


def measure(name: str, mode: str, device: str, repeats: int, budget: float) -> list[dict[str, Any]]:
    """One table: every competitor on one parameter set."""
    model = build(name, device, torch.bfloat16 if mode == "bf16 + bf16 copy" else torch.float32)
    params = [p.detach() for p in model.parameters()]
    largest = max(range(len(params)), key=lambda i: params[i].numel())
    numel = sum(p.numel() for p in params)
    entrants = competitors(model, low=mode != "fp32")
    counts = {}
    for label, (call, averages) in entrants.items():
        want = torch.lerp(averages[largest], params[largest].float(), WEIGHT) if averages else None
        with Counter() as counts[label]:
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
            "ratio": times[label].median / times[OURS].median,
        }
        for label in entrants
    ]


MODES = ("fp32", "fp32 + bf16 copy", "bf16 + bf16 copy")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help="open_clip model names")
    parser.add_argument(
        "--modes", nargs="+", default=MODES, choices=MODES, help="dtype of the student, copies"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing per table, at most")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(" ".join(f"{k}={v};" for k, v in environment().items()))
    results: list[dict[str, Any]] = []
    for name in args.models:
        for mode in args.modes:
            rows = measure(name, mode, device, args.repeats, args.budget)
            results += rows
            print(
                f"\n{name}: {rows[0]['parameters'] / 1e6:.1f} M parameters, {rows[0]['tensors']} tensors, {mode}"
            )
            header = ["update", "launches", "bytes/parameter", "time (p20–p80)", "GB/s", "time / ours"]
            lines = [
                [
                    row["update"],
                    str(row["launches"]),
                    f"{row['bytes_per_parameter']:.1f}",
                    str(row["time"]),
                    f"{row['bytes_per_parameter'] * row['parameters'] / row['time'].median / 1e9:.1f}",
                    f"{row['ratio']:.2f}",
                ]
                for row in rows
            ]
            print(table(header, lines), flush=True)
    if args.json:
        data = {
            "environment": environment(),
            "results": [{k: plain(v) for k, v in r.items()} for r in results],
        }
        args.json.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
