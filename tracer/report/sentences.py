"""Numbers and sentences of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tracer.report.results import (
    NBSP,
    Column,
    Method,
    Stat,
    Summary,
    clearly_differ,
    curves_of,
    gap_of,
    number,
    sizes,
)


def percent(value: float, signed: bool = False) -> str:
    """A fraction in per cent with one decimal: 41.2, with a sign +3.1, −0.4; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", "−")


def with_spread(stat: Stat) -> str:
    """41.2 ± 0.3, without the spread where it is unknown or there is none."""
    return percent(stat.mean) + (
        f"{NBSP}±{NBSP}{percent(stat.spread)}" if stat.spread and len(stat.values) > 1 else ""
    )


def amount(value: float) -> str:
    """A number of any size in two or three figures: 1,300, 0.35, 0.000027, 3e−09; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    rounded = float(f"{value:.{3 if 1 <= abs(value) < 100 else 2}g}")
    if rounded == 0 or 1e-6 <= abs(rounded) < 1e9:
        text = f"{rounded:,.8f}".rstrip("0").rstrip(".")
    else:
        text = f"{rounded:g}"
    return text.replace("-", "−")


def duration(seconds: Any) -> str:
    """Seconds in words: 0.42 s, 31.2 s, 4 min 07 s, 2 h 05 min."""
    s = number(seconds)
    if not math.isfinite(s):
        return "–"
    if s < 100:
        return f"{s:.3g} s"
    if s < 3600:
        return f"{round(s) // 60} min {round(s) % 60:02d} s"
    return f"{round(s / 60) // 60} h {round(s / 60) % 60:02d} min"


def listing(items: Sequence[str]) -> str:
    """A, B and C."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def change(stat: Stat, base: Stat) -> str:
    """The change of ``stat`` against ``base`` in points, and how far the seeds let one trust it."""
    text = f"{percent(stat.mean - base.mean, signed=True)} points"
    if stat.spread is None or base.spread is None:
        return text
    return text if clearly_differ(stat, base) else f"{text} (within the spread)"


def headline(summary: Summary) -> str:
    """What happened, in one sentence: the best of the trained methods where it counts, beside the others."""
    column, where = (summary.away, "under shift") if summary.away else (summary.home, "in distribution")
    assert column is not None
    ranked = sorted(
        (m for m in summary.main if m.trained and math.isfinite(m.stat(column).mean)),
        key=lambda m: -m.stat(column).mean,
    )
    if not ranked:
        return "No training run has a usable result."
    best, rest = ranked[0], ranked[1:]
    rivals = [m.name for m in rest if not clearly_differ(best.stat(column), m.stat(column))]
    if not rest:
        text = f"{best.name} reaches {with_spread(best.stat(column))} % {where}"
    elif best.stat(column).spread is None:
        text = f"{best.name} scores highest {where}, with one seed: {percent(best.stat(column).mean)} %"
    elif not rivals:
        text = f"{best.name} is the best fine-tuned model {where}: {with_spread(best.stat(column))} %"
    else:
        text = (
            f"No fine-tuned model is clearly ahead {where}: {best.name} is highest with "
            f"{with_spread(best.stat(column))} %, {listing(rivals)} within the spread"
        )
    others = [
        f"{m.name} {with_spread(m.stat(column))} %"
        for m in (summary.baseline, summary.plain)
        if m is not None and m is not best and math.isfinite(m.stat(column).mean)
    ]
    return text + (f" ({', '.join(others)})." if others else ".")


def findings(summary: Summary) -> list[tuple[str, str]]:
    """Further sentences: (topic, what this run shows)."""
    found: list[tuple[str, str]] = []
    trained = [m for m in summary.main if m.trained]
    base = summary.baseline
    if base is not None and trained:
        start = base.stat(summary.home)
        gains = [
            f"{m.name} {change(m.stat(summary.home), start)}"
            for m in trained
            if math.isfinite(m.stat(summary.home).mean)
        ]
        if gains and math.isfinite(start.mean):
            found.append(
                ("In distribution", f"{base.name} starts at {percent(start.mean)} %; {'; '.join(gains)}.")
            )
    if base is not None and summary.away is not None and summary.plain is not None:
        shift = _shift_sentence(summary, base, summary.plain, summary.away)
        if shift:
            found.append(("Under shift", shift))
    gap = gap_sentence(summary)
    if gap:
        found.append(("Teacher–student gap", gap))
    column = summary.away or summary.home
    found += ablations(summary) + size_sentence(summary)
    calibrated = [m for m in summary.main if math.isfinite(m.stat(column, "ece").mean)]
    if len(calibrated) > 1:
        ranked = sorted(calibrated, key=lambda m: m.stat(column, "ece").mean)
        values = [f"{m.name} {with_spread(m.stat(column, 'ece'))}" for m in ranked]
        found.append(
            (
                "Calibration",
                f"Expected calibration error {column.label.lower()}, in points, from best to worst: "
                f"{', '.join(values)}.",
            )
        )
    return found


def _shift_sentence(summary: Summary, base: Method, plain: Method, away: Column) -> str:
    start, fallen = base.stat(away), plain.stat(away)
    if plain is base or not (math.isfinite(start.mean) and math.isfinite(fallen.mean)):
        return ""
    lost = start.mean - fallen.mean
    text = f"{base.name} starts at {percent(start.mean)} %; {plain.name} {change(fallen, start)}. "
    others = [m for m in summary.main if m.trained and m is not plain and math.isfinite(m.stat(away).mean)]
    if not others:
        return text.strip()
    no_loss = lost <= 0 or (fallen.spread is not None and not clearly_differ(start, fallen))
    parts = []
    for m in others:
        now = m.stat(away)
        saved = now.mean - fallen.mean
        if no_loss:
            part = percent(saved, signed=True)
        elif saved < 0:
            part = f"loses {percent(-saved)} more"
        elif now.mean < start.mean:
            part = f"keeps {percent(saved)}"
        elif clearly_differ(now, start):
            part = f"keeps them all and gains {percent(now.mean - start.mean)}"
        else:
            part = "keeps them all"
        known = now.spread is not None and fallen.spread is not None
        unsure = " (within the spread)" if known and not clearly_differ(now, fallen) else ""
        parts.append(f"{m.name} {part}{unsure}")
    if no_loss:
        return text + f"{plain.name} shows no clear loss; against it {listing(parts)}."
    return text + f"Of the {percent(lost)} points that {plain.name} loses, {listing(parts)}."


def ablations(summary: Summary) -> list[tuple[str, str]]:
    """What each variant of a method changes against it, unless that is within the spread."""
    found = []
    columns = [c for c in (summary.home, summary.away) if c is not None]
    for full, variants in summary.parts.items():
        changed: list[str] = []
        unchanged: list[str] = []
        for m in variants:
            pairs = [(c, m.stat(c), full.stat(c)) for c in columns]
            clear = [
                f"{c.label.lower()} {change(a, b)}"
                for c, a, b in pairs
                if clearly_differ(a, b) or a.spread is None or b.spread is None
            ]
            (changed if clear else unchanged).append(f"{m.name}: {', '.join(clear)}" if clear else m.name)
        sentences = [f"Against the full method, {'; '.join(changed)}."] if changed else []
        if unchanged:
            sentences.append(f"Within the spread of the full method: {listing(unchanged)}.")
        found.append((f"Parts of {full.name}", " ".join(sentences)))
    return found


def size_sentence(summary: Summary) -> list[tuple[str, str]]:
    """How much less a method that trains a part of the model keeps than the plain one."""
    measured = sizes(summary)
    if not measured or measured[0].method is not summary.plain:
        return []
    whole, parts = measured[0], []
    for own in measured:
        if own.parameters < whole.parameters:
            kinds = {
                "optimizer state": "optimizer",
                "a checkpoint": "checkpoint",
                "trained weights": "weights",
            }
            pairs = {what: (getattr(own, kind), getattr(whole, kind)) for what, kind in kinds.items()}
            kept = [
                f"{what} {amount(a / 1e6)} MB against {amount(b / 1e6)}"
                for what, (a, b) in pairs.items()
                if math.isfinite(a) and math.isfinite(b)
            ]
            parts.append(
                f"{own.method.name} trains {own.parameters:,.0f} parameters, "
                f"{percent(own.parameters / whole.parameters)} % of {whole.method.name}'s: {', '.join(kept)}."
            )
    return [("Size", " ".join(parts))] if parts else []


def gap_sentence(summary: Summary) -> str:
    """What the teacher–student KL of this run shows, next to the published claim."""
    curves = curves_of(summary, gap_of)
    if not curves:
        return ""
    ends, peaks = {c.method.key: c.end() for c in curves}, {c.method.key: max(c.mean) for c in curves}
    parts = []
    for c in curves:
        end, peak = ends[c.method.key], peaks[c.method.key]
        word = "collapses" if end < 0.1 * peak else "shrinks" if end < 0.5 * peak else "stays"
        parts.append(
            f"{c.method.name}: the gap {word} (largest {amount(peak)}, at the end {amount(end)}: "
            f"{amount(100 * end / peak)} % of it)"
        )
    text = f"{'; '.join(parts)}."
    if "ema" in ends and "wma" in ends:
        times = f"{amount(ends['wma'] / ends['ema'])} times" if ends["ema"] else "infinitely many times"
        text += f" At the end WMA's teacher is {times} as far from its student as EMA's."
        ema_gone = ends["ema"] < 0.1 * max(peaks["ema"], ends["wma"])
        wma_kept = ends["wma"] >= 0.1 * peaks["wma"]
        claim = "The published claim, that EMA's gap collapses and WMA's does not,"
        if ema_gone and wma_kept:
            text += f" {claim} is what this run shows."
        else:
            why = [] if ema_gone else ["EMA's does not collapse"]
            why += [] if wma_kept else ["WMA's collapses too"]
            text += f" {claim} is not what this run shows: {listing(why)}."
    return text
