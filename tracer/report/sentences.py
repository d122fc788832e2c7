"""The report's sentences, computed from the results, and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tracer.report.curves import LoggedCurve, logged_curves
from tracer.report.results import (
    NBSP,
    Column,
    Method,
    Pair,
    Results,
    Run,
    Sizes,
    Stat,
    clearly_differ,
    number,
    sizes_of,
)


def percent(value: float, signed: bool = False) -> str:
    """Return a fraction in per cent with one decimal: 41.2, with a sign +3.1 or −0.4; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", "−")


def with_spread(stat: Stat) -> str:
    """Return 41.2 ± 0.3, without the spread where it is unknown or there is none."""
    shown = stat.spread and len(stat.values) > 1
    return percent(stat.mean) + (f"{NBSP}±{NBSP}{percent(stat.spread)}" if shown and stat.spread else "")


def amount(value: float) -> str:
    """Return a number of any size in two or three figures: 1,300, 0.35, 0.000027, 3e−09; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    rounded = float(f"{value:.{3 if 1 <= abs(value) < 100 else 2}g}")
    if rounded == 0 or 1e-6 <= abs(rounded) < 1e9:
        text = f"{rounded:,.8f}".rstrip("0").rstrip(".")
    else:
        text = f"{rounded:g}"
    return text.replace("-", "−")


def duration(seconds: Any) -> str:
    """Return seconds in words: 0.42 s, 31.2 s, 4 min 07 s, 2 h 05 min; a dash where the value is not a number."""
    s = number(seconds)
    if not math.isfinite(s):
        return "–"
    if s < 100:
        return f"{s:.3g} s"
    if s < 3600:
        return f"{round(s) // 60} min {round(s) % 60:02d} s"
    return f"{round(s / 60) // 60} h {round(s / 60) % 60:02d} min"


def listing(items: Sequence[str]) -> str:
    """Return A, B and C; where an item has a comma of its own, A; B; and C."""
    if len(items) == 1:
        return items[0]
    if any("," in item for item in items):
        return "; ".join(items[:-1]) + "; and " + items[-1]
    return ", ".join(items[:-1]) + " and " + items[-1]


def change(stat: Stat, base: Stat) -> str:
    """Return the change of ``stat`` against ``base`` in points, and whether it lies within the spread."""
    text = f"{percent(stat.mean - base.mean, signed=True)} points"
    if stat.spread is None or base.spread is None:
        return text
    return text if clearly_differ(stat, base) else f"{text} (within the spread)"


def headline(results: Results) -> str:
    """Return one sentence that names the best trained model, under shift if that was measured."""
    if results.under_shift:
        column, where = results.under_shift, "under shift"
    else:
        column, where = results.in_distribution, "in distribution"
    scored = [m for m in results.main if m.trained and math.isfinite(m.stat(column).mean)]
    if not scored:
        return "No training run has a usable result."
    best, *rest = sorted(scored, key=lambda m: -m.stat(column).mean)
    stat, score = best.stat(column), f"{with_spread(best.stat(column))} %"
    rivals = [m.name for m in rest if not clearly_differ(stat, m.stat(column))]
    if not rest:
        text = f"{best.name} reaches {score} {where}"
    elif stat.spread is None:
        text = f"With one seed, {best.name} scores highest {where}: {score}"
    elif not rivals:
        text = f"{best.name} is the best fine-tuned model {where}: {score}"
    else:
        text = (
            f"No fine-tuned model is clearly ahead {where}: {best.name} scores highest with {score}, "
            f"and {listing(rivals)} {'lies' if len(rivals) == 1 else 'lie'} within the spread"
        )
    others = [
        f"{m.name} {with_spread(m.stat(column))} %"
        for m in (results.baseline, results.plain)
        if m is not None and m is not best and math.isfinite(m.stat(column).mean)
    ]
    return text + (f" ({', '.join(others)})." if others else ".")


def findings(results: Results) -> list[tuple[str, str]]:
    """Return what else the results show, as pairs of a topic and its sentences."""
    topics = [
        ("In distribution", in_distribution_sentence(results)),
        ("Under shift", shift_sentence(results)),
        ("Teacher–student gap", gap_sentence(results)),
        *ablation_sentences(results),
        *pair_sentences(results),
        ("Chosen settings", choice_sentence(results)),
        ("Size", size_sentence(results)),
        ("Calibration", calibration_sentence(results)),
    ]
    return [(topic, text) for topic, text in topics if text]


def in_distribution_sentence(results: Results) -> str:
    """Return what fine-tuning gains on the training domain; nothing where there is no start to compare with."""
    if results.baseline is None:
        return ""
    column = results.in_distribution
    start = results.baseline.stat(column)
    gains = [
        f"{m.name} {change(m.stat(column), start)}"
        for m in results.main
        if m.trained and math.isfinite(m.stat(column).mean)
    ]
    if not gains or not math.isfinite(start.mean):
        return ""
    return f"{results.baseline.name} scores {percent(start.mean)} %. Fine-tuning changes this: {'; '.join(gains)}."


def shift_sentence(results: Results) -> str:
    """Return what plain fine-tuning loses under shift, and how much of it each other method keeps."""
    base, plain, column = results.baseline, results.plain, results.under_shift
    if base is None or plain is None or column is None or plain is base:
        return ""
    start, fallen = base.stat(column), plain.stat(column)
    if not (math.isfinite(start.mean) and math.isfinite(fallen.mean)):
        return ""
    text = (
        f"{base.name} scores {percent(start.mean)} %; {plain.name} changes this by {change(fallen, start)}."
    )
    others = [m for m in results.main if m.trained and m is not plain and math.isfinite(m.stat(column).mean)]
    lost = start.mean - fallen.mean
    clear = lost > 0 and (fallen.spread is None or clearly_differ(start, fallen))
    parts = [_kept_under_shift(m, column, start, fallen, clear) for m in others]
    if not others:
        return text
    if not clear:
        return f"{text} {plain.name} shows no clear loss. Compared with {plain.name}: {'; '.join(parts)}."
    return f"{text} Of the {percent(lost)} points that {plain.name} loses, {listing(parts)}."


def _kept_under_shift(method: Method, column: Column, start: Stat, fallen: Stat, clear: bool) -> str:
    """Return the part of the sentence about one method; ``clear``: the plain method's loss is clear."""
    now = method.stat(column)
    saved = now.mean - fallen.mean
    if not clear:
        text = f"{percent(saved, signed=True)} points"
    elif saved < 0:
        text = f"loses {percent(-saved)} more"
    elif now.mean < start.mean:
        text = f"keeps {percent(saved)}"
    elif clearly_differ(now, start):
        text = f"keeps all and gains {percent(now.mean - start.mean)}"
    else:
        text = "keeps all"
    known = now.spread is not None and fallen.spread is not None
    unsure = " (within the spread)" if known and not clearly_differ(now, fallen) else ""
    return f"{method.name} {text}{unsure}"


def calibration_sentence(results: Results) -> str:
    """Return the calibration errors of the methods, ranked; nothing for fewer than two."""
    column = results.under_shift or results.in_distribution
    measured = [(m.stat(column, "ece"), m.name) for m in results.main]
    ranked = sorted((pair for pair in measured if math.isfinite(pair[0].mean)), key=lambda pair: pair[0].mean)
    if len(ranked) < 2:
        return ""
    values = "; ".join(f"{name} {with_spread(stat)}" for stat, name in ranked)
    return f"Expected calibration error {column.label.lower()}, in points, from best to worst: {values}."


def ablation_sentences(results: Results) -> list[tuple[str, str]]:
    """Return, for each method with variants, what each variant changes; with one seed all changes are told."""
    columns = [c for c in (results.in_distribution, results.under_shift) if c is not None]
    topics = []
    for full, variants in results.variants.items():
        sentences, unchanged = [], []
        for m in variants:
            pairs = [(c, m.stat(c), full.stat(c)) for c in columns]
            clear = [
                f"{c.label.lower()} by {change(stat, base)}"
                for c, stat, base in pairs
                if clearly_differ(stat, base) or stat.spread is None or base.spread is None
            ]
            if clear:
                sentences.append(f"{m.name} changes accuracy {listing(clear)}.")
            else:
                unchanged.append(m.name)
        if unchanged:
            verb = "lies" if len(unchanged) == 1 else "lie"
            sentences.append(f"{listing(unchanged)} {verb} within the spread of the full method.")
        topics.append((f"Parts of {full.name}", " ".join(sentences)))
    return topics


def pair_sentences(results: Results) -> list[tuple[str, str]]:
    """Return what beats each method of comparison, and what cannot be told apart from it, by paired intervals.

    A method beats another under shift where its interval lies above 0; its calibration is better where that of the
    error lies below 0. It has equal accuracy in distribution where the interval there holds 0.
    """
    names = {method.key: method.name for method in results.methods}
    topics = []
    for other in dict.fromkeys(pair.other for pair in results.pairs):
        name, sentences = names.get(other, other), []
        above, below, apart = _told(results, other, "accuracy", names)
        for those, verb in ((above, "beat"), (below, "fall below")):
            if those:
                verb = verb if len(those) > 1 else verb.replace("beat", "beats").replace("fall", "falls")
                sentences.append(f"Under shift, {listing(those)} {verb} {name}.")
        if apart:
            sentences.append(f"Not to be told apart from {name} under shift: {listing(apart)}.")
        worse, better, _ = _told(results, other, "ece", names)
        for those, word in ((better, "better"), (worse, "worse")):
            if those:
                verb = "is" if len(those) == 1 else "are"
                sentences.append(f"Under shift, {listing(those)} {verb} {word} calibrated than {name}.")
        if sentences:
            topics.append((f"Against {name}, paired 95 % intervals", " ".join(sentences)))
    return topics


def _told(results: Results, other: str, measure: str, names: dict[str, str]) -> tuple[list[str], ...]:
    """Return the methods whose measure under shift is above that of another, below it, or not to be told apart."""
    told: tuple[list[str], ...] = ([], [], [])
    for pair in results.pairs:
        if (pair.other, pair.column, pair.measure) != (other, "shifted", measure):
            continue
        home = next(
            (p for p in results.pairs if (p.one, p.other, p.measure) == (pair.one, other, "accuracy")
             and p.column == "in-distribution"), None
        ) if measure == "accuracy" else None  # fmt: skip
        where = 0 if pair.low > 0 else 1 if pair.high < 0 else 2
        told[where].append(f"{names.get(pair.one, pair.one)} ({interval(pair)}{_at_home(home)})")
    return told


def interval(pair: Pair) -> str:
    """Return a difference with its interval: +0.4 points, −0.2 to +1.0."""
    low, high = percent(pair.low, signed=True), percent(pair.high, signed=True)
    return f"{percent(pair.value, signed=True)} points, {low} to {high}"


def _at_home(pair: Pair | None) -> str:
    """Return how the same two methods compare in distribution."""
    if pair is None:
        return ""
    if pair.low <= 0 <= pair.high:
        return "; not told apart in distribution"
    return f"; in distribution {percent(pair.value, signed=True)}"


def choice_sentence(results: Results) -> str:
    """Return which point of the grid each method was given, and why."""
    names = {method.key: method.name for method in results.methods}
    parts = []
    for key, choice in results.choices.items():
        shown = choice["chosen"] | {name: choice[name] for name in ("lr",) if name in choice}
        point = ", ".join(f"{name} {amount(number(value))}" for name, value in shown.items())
        parts.append(f"{names.get(key, key)}: {point} ({choice['why']})")
    return f"{'; '.join(parts)}." if parts else ""


def size_sentence(results: Results) -> str:
    """Return how much less each method that trains a part of the model keeps than the plain one."""
    recorded = sizes_of(results)
    if not recorded or recorded[0].method is not results.plain:
        return ""
    whole = recorded[0]
    return " ".join(_size_against(part, whole) for part in recorded if part.parameters < whole.parameters)


def _size_against(part: Sizes, whole: Sizes) -> str:
    pairs = {
        "of optimizer state": (part.optimizer, whole.optimizer),
        "in a checkpoint": (part.checkpoint, whole.checkpoint),
        "of trained weights": (part.weights, whole.weights),
    }
    kept = [
        f"{amount(mine / 1e6)} MB {what} ({whole.method.name} {amount(full / 1e6)} MB)"
        for what, (mine, full) in pairs.items()
        if math.isfinite(mine) and math.isfinite(full)
    ]
    share = percent(part.parameters / whole.parameters)
    text = f"{part.method.name} trains {part.parameters:,.0f} parameters, {share} % of {whole.method.name}'s"
    return f"{text}, and keeps {listing(kept)}." if kept else f"{text}."


def gap_sentence(results: Results) -> str:
    """Return how each method's teacher–student KL develops, and whether that agrees with the published claim."""
    curves = logged_curves(results, Run.gap)
    text = " ".join(_gap_of_one(curve) for curve in curves)
    ends = {curve.method.key: curve.end() for curve in curves}
    peaks = {curve.method.key: max(curve.mean) for curve in curves}
    if "ema" not in ends or "wma" not in ends:
        return text
    if ends["ema"]:
        text += f" At the end WMA's gap is {amount(ends['wma'] / ends['ema'])} times EMA's."
    collapsed = ends["ema"] < 0.1 * max(peaks["ema"], ends["wma"])
    kept = ends["wma"] >= 0.1 * peaks["wma"]
    claim = "the published claim that EMA's gap collapses and WMA's does not"
    if collapsed and kept:
        return f"{text} This agrees with {claim}."
    reasons = [] if collapsed else ["EMA's gap does not collapse"]
    reasons += [] if kept else ["WMA's gap collapses too"]
    return f"{text} This does not agree with {claim}: {listing(reasons)}."


def _gap_of_one(curve: LoggedCurve) -> str:
    end, peak = curve.end(), max(curve.mean)
    verb = "collapses" if end < 0.1 * peak else "shrinks" if end < 0.5 * peak else "persists"
    return (
        f"{curve.method.name}: the gap {verb}; it peaks at {amount(peak)} nats and ends at {amount(end)}, "
        f"{amount(100 * end / peak)} % of the peak."
    )
