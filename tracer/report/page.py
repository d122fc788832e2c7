"""The report as one HTML file."""

from __future__ import annotations

import base64
import io
import math
import os
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from PIL import Image

from tracer.errors import UserError
from tracer.report.figures import COLOURS, STYLE, draw
from tracer.report.results import (
    Method,
    Summary,
    best_of,
    chances,
    clearly_differ,
    number,
    sampling_error,
    seeds_of,
    sizes,
    summarise,
)
from tracer.report.sentences import amount, duration, findings, headline, percent, with_spread

PARTS = ("start", "times", "machine", "versions", "settings")  # that results may lack


def write_report(results: dict[str, Any], path: Path) -> Path:
    """Write the HTML page that shows ``results``; it holds all it needs and asks for nothing else.

    Args:
        results: title, start, domains, methods (with their runs), curves (over an interpolation weight α),
            examples, settings, versions, machine and times; and optionally command, the line that repeats
            the run.
        path: where to write. The file appears only when it is complete. Relative paths of example
            pictures are looked up from the working directory, then from the page's folder.

    Raises:
        ValueError: there is no domain or no method to report on.
        UserError: the page cannot be written.
    """
    path = Path(path)
    page = render(results, path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the report ({error.strerror or error}); "
            "free some space or choose another output folder"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def render(results: dict[str, Any], folder: Path) -> str:
    """The page as text."""
    summary = summarise(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, duration=duration, with_spread=with_spread, amount=lambda v: amount(number(v))
    )
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # its stub knows no plain str keys
        figures = draw(results, summary)
    return environment.get_template("page.html.j2").render(
        results={**dict.fromkeys(PARTS), "title": "Robust fine-tuning", "command": "make demo", **results},
        summary=summary,
        colours=COLOURS,
        headline=headline(summary),
        findings=findings(summary),
        seeds=seeds_of(summary),
        accuracy=table(summary, "accuracy"),
        ece=table(summary, "ece"),
        teachers=table(summary, "accuracy", of="teacher_eval"),
        parts={
            full: [table(summary, what, full=full) for what in ("accuracy", "ece")] for full in summary.parts
        },
        sizes=sizes(summary),
        sampling=sampling_error(results, summary),
        chances=chances(results, summary),
        runs=[(m, run) for m in summary.methods for run in m.runs],
        examples=[example(e, summary, folder) for e in results.get("examples") or []],
        number=number,
        isfinite=math.isfinite,
        **figures,
    )


def table(summary: Summary, what: str, of: str = "eval", full: Method | None = None) -> list[dict[str, Any]]:
    """Rows of a table: for each method its cells, with the best of a column and clear changes marked.

    Changes are against the baseline; of ``full``, a method with variants, against it, with its variants as rows.
    """
    lower = what == "ece"
    base = full or summary.baseline
    methods = [full, *summary.parts[full]] if full else summary.main
    methods = [m for m in methods if any(math.isfinite(m.stat(c, what, of).mean) for c in summary.columns)]
    columns = [(c, [m.stat(c, what, of) for m in methods]) for c in summary.columns]
    rows = []
    for i, m in enumerate(methods):
        cells = []
        for c, stats in columns:
            stat, change, trend = stats[i], math.nan, ""
            if base is not None and m is not base:
                start = base.stat(c, what)
                change = stat.mean - start.mean
                if clearly_differ(stat, start):
                    trend = "up" if (change < 0) == lower else "down"
            cells.append({"stat": stat, "best": best_of(stats, lower) == i, "change": change, "trend": trend})
        rows.append({"method": m, "cells": cells})
    return rows


def example(item: dict[str, Any], summary: Summary, folder: Path) -> dict[str, Any]:
    """One example picture, embedded, and what each method called it."""
    predictions = item.get("predictions") or {}
    truth = str(item.get("truth", ""))
    rows = []
    for m in summary.methods:
        if m.key in predictions:
            label, confidence = (list(predictions[m.key] or []) + [None, None])[:2]
            rows.append({"method": m, "label": str(label), "confidence": number(confidence),
                         "right": str(label) == truth})  # fmt: skip
    return {"picture": embed(item.get("image"), folder), "domain": str(item.get("domain", "")),
            "truth": truth, "rows": rows}  # fmt: skip


def embed(image: Any, folder: Path, size: int = 192) -> str | None:
    """A picture as a data URI (PNG, at most ``size`` pixels wide and high); None if it cannot be read."""
    for path in (Path(str(image)), folder / str(image)):
        try:
            with Image.open(path) as picture:
                small = picture.convert("RGBA")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        small.thumbnail((size, size))
        out = io.BytesIO()
        small.save(out, format="PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    return None
