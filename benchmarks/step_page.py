"""Tables, README rows and pictures of the benchmark of the training step, and the time ratios that are checked."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.harness import Highlight, table
from benchmarks.measure import TOTAL, Timing
from benchmarks.step_trainer import BARE_OURS, BARE_PUBLISHED, HEADS, OURS, PHASES, PLAIN, PUBLISHED, STEPS

OVERHEAD = 0.03  # share of the plain step that TRACER may cost beyond it and the teacher's forward pass
# Steps by what trains, plain or with TRACER's teacher.
FULL, ADAPTED, LOCKED, HALF = "full fine-tuning", "R-Adapter", "locked image tower", "lower halves frozen"
TAUGHT = ", TRACER"
NEGLIGIBLE = 0.1  # share of the step below which the loss is not its bottleneck

PICTURES = {
    "where-time-goes": "Stacked bars: seconds that each phase of a training step takes, for the published step, "
    "TRACER's and a plain one.",
    "where-memory-goes": "Stacked bars: memory that a training step holds, by purpose.",
}


def _time(case: dict[str, Any], kind: str, phase: str = TOTAL) -> Timing:
    """Return the time of a phase; of a phase that the step does not have, zero."""
    return Timing(**case["times"][kind].get(phase, {"median": 0.0, "low": 0.0, "high": 0.0, "repeats": 0}))


def overhead(case: dict[str, Any], kind: str) -> tuple[float, float, float]:
    """Return what a TRACER step costs beyond the plain step and the teacher's forward pass, as a share of plain.

    The share is computed from the phases that differ: loss, diagnostics and teacher's update. The other phases
    do the same work, so their differences are noise. Returns median, low and high.
    """
    more = [_time(case, kind, phase) for phase in ("loss", "diagnostics", "teacher update")]
    less, whole = _time(case, PLAIN, "loss"), _time(case, PLAIN).median
    return (
        (sum(t.median for t in more) - less.median) / whole,
        (sum(t.low for t in more) - less.high) / whole,
        (sum(t.high for t in more) - less.low) / whole,
    )


def overhead_of_totals(case: dict[str, Any], kind: str) -> float:
    """Return the same share computed from the times of whole steps."""
    teacher, plain = _time(case, kind, "teacher forward").median, _time(case, PLAIN).median
    return (_time(case, kind).median - teacher - plain) / plain


def _title(case: dict[str, Any]) -> str:
    return f"{case['model']}, {case['pairs']} pairs, {case['precision']}"


def report(results: dict[str, Any]) -> str:
    """Return the steps of each case, their phases, what TRACER costs, and the memory, as Markdown."""
    parts = []
    for case in results["cases"]:
        parts += [f"### {_title(case)}", _step_table(case), _phase_table(case), _conclusion(case)]
        if case["memory"]:
            parts.append(_memory_table(case))
    for name, times in results["engine"]:
        bare, engine = Timing(**times["bare torch"]), Timing(**times["DeepSpeed"])
        parts.append(
            f"The trainer's engine: a plain step of {name} takes {bare} in bare torch and {engine} in DeepSpeed "
            f"(ZeRO 1, gradients clipped), {engine.median / bare.median - 1:+.0%}."
        )
    if frozen := results.get("frozen"):  # results before it was measured have none
        parts += ["### Where little trains", _frozen_table(frozen)]
    return "\n\n".join(parts)


def _frozen_table(frozen: list[Any]) -> str:
    """Write the time of a step by what trains, and its share of the plain step of full fine-tuning."""
    rows = []
    for name, precision, times in frozen:
        whole = Timing(**times[FULL]).median
        for trained, taken in times.items():
            time = Timing(**taken)
            rows.append([f"{name}, {precision}", trained, str(time), f"{time.median / whole:.2f}"])
    return table(["model", "what trains", "step", "time / full"], rows)


def _step_table(case: dict[str, Any]) -> str:
    rows = []
    for kind in STEPS:
        time = _time(case, kind)
        published = _time(case, BARE_PUBLISHED if kind == BARE_OURS else PUBLISHED).median
        rows.append(
            [
                kind,
                str(time),
                f"{case['pairs'] / time.median:.0f}",
                f"{time.median / _time(case, PLAIN).median:.2f}",
                f"{published / time.median:.2f}×" if kind in (OURS, BARE_OURS) else "",
            ]
        )
    return table(["step", "time", "pairs/s", "time / plain", "published / tracer"], rows)


def _phase_table(case: dict[str, Any]) -> str:
    """Write time and share of each phase; loading stands apart, since only other cores could overlap it."""
    kinds = (PLAIN, OURS, PUBLISHED)
    rows = []
    for phase in PHASES:
        cells = []
        for kind in kinds:
            time = _time(case, kind, phase)
            share = time.median / _time(case, kind).median
            cells.append(f"{time} {share:.1%}" if time.repeats else "")
        rows.append([phase, *cells])
    if case["loading"]:
        rows.append(["loading a batch, not part of the step", *[str(Timing(**case["loading"]))] * 3])
    return table(["phase", *kinds], rows)


def _conclusion(case: dict[str, Any]) -> str:
    median, low, high = overhead(case, OURS)
    bare = overhead(case, BARE_OURS)[0]
    share = _time(case, OURS, "loss").median / _time(case, OURS).median
    verdict = "is not the bottleneck" if share < NEGLIGIBLE else "matters"
    return (
        f"Beyond the teacher's forward pass, the TRACER step costs {median:.1%} ({low:.1%}–{high:.1%}) more than "
        f"the plain step, {bare:.1%} without diagnostics (target: at most {OVERHEAD:.0%}; computed from whole "
        f"steps: {overhead_of_totals(case, OURS):.1%}). The fused loss takes {share:.1%} of the step: here the "
        f"loss {verdict}."
    )


def _memory_table(case: dict[str, Any]) -> str:
    held, peak = case["memory"]["held"], case["memory"]["peak"]
    rows = [[name, f"{size / 2**20:.1f} MiB"] for name, size in held.items()]
    rows += [
        [f"peak of a {kind} step beyond parameters, optimizer and teacher", f"{size / 2**20:.1f} MiB"]
        for kind, size in peak.items()
    ]
    return table(["memory", "size"], rows)


def highlights(results: dict[str, Any]) -> list[Highlight]:
    """Return a row for each case."""
    rows = []
    for case in results["cases"]:
        ours, published = _time(case, OURS), _time(case, PUBLISHED)
        model = "the projections alone" if case["model"] == HEADS else case["model"]
        what = f"training step of {model}, {case['pairs']} pairs, {case['precision']}"
        ratio = f"{published.median / ours.median:.1f}×"
        rows.append(Highlight(what, str(ours), f"published step: {published}", ratio))
    return rows


def figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Draw where the time goes and, where it was measured, the memory."""
    drawn = {"where-time-goes": _time_figure(results["cases"])}
    if measured := [case for case in results["cases"] if case["memory"]]:
        drawn["where-memory-goes"] = _memory_figure(measured)
    return drawn


def _time_figure(cases: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 0.8 + 1.5 * len(cases)), layout="constrained")
    kinds = (PUBLISHED, OURS, PLAIN)
    for axes, case in zip(figure.subplots(len(cases), 1, squeeze=False)[:, 0], cases, strict=True):
        start = [0.0] * len(kinds)
        for phase, colour in zip(PHASES, plots.STACKED, strict=True):
            seconds = [_time(case, kind, phase).median for kind in kinds]
            axes.barh(kinds, seconds, left=start, color=colour, label=phase)
            start = [a + b for a, b in zip(start, seconds, strict=True)]
        axes.set_title(_title(case), fontsize="medium")
        axes.set_xlabel("seconds per step")
        plots.bare(axes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _memory_figure(cases: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 1.5 + 0.5 * len(cases)), layout="constrained")
    axes = figure.subplots()
    start = [0.0] * len(cases)
    names = [_title(case) for case in cases]
    for purpose, colour in zip(cases[0]["memory"]["held"], plots.STACKED, strict=False):
        sizes = [case["memory"]["held"][purpose] / 2**30 for case in cases]
        axes.barh(names, sizes, left=start, color=colour, label=purpose)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    axes.set_xlabel("GiB")
    plots.bare(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=5, frameon=False)
    return figure


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """Return the published step's time divided by TRACER's."""
    return {
        f"{case['model']}, {case['pairs']} pairs": _time(case, PUBLISHED).median / _time(case, OURS).median
        for case in results["cases"]
    }
