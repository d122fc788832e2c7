"""The report as one HTML file."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from tracer.errors import UserError
from tracer.files import whole_file
from tracer.report.figures import draw
from tracer.report.palette import COLOURS, PAGE
from tracer.report.results import Example, Results, number, sampling_error, sizes_of
from tracer.report.sentences import (
    amount,
    duration,
    findings,
    gap_sentence,
    headline,
    interval,
    percent,
    with_spread,
)
from tracer.report.tables import class_changes, mixtures, table_rows


def write_report(results: Results, path: Path) -> Path:
    """Write the HTML page that shows ``results`` and return its path; the page loads nothing from elsewhere.

    Args:
        path: where to write; the file appears only when it is complete. Relative paths of example pictures
            are looked up from the working directory, then from the page's folder.

    Raises:
        UserError: the page cannot be written.
    """
    page = render(results, path.parent)
    try:
        with whole_file(path) as part:
            part.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the report ({error.strerror or error}); "
            "free some space or choose another output folder"
        ) from error
    return path


def render(results: Results, folder: Path) -> str:
    """Return the page as text; ``folder`` is where it will lie."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent, duration=duration, with_spread=with_spread, amount=amount, interval=interval
    )
    return environment.get_template("page.html.j2").render(
        results=results,
        colours=COLOURS,
        page_colours=PAGE,
        headline=headline(results),
        findings=findings(results),
        gap_text=gap_sentence(results),
        accuracy=table_rows(results, "accuracy"),
        ece=table_rows(results, "ece"),
        teachers=table_rows(results, "accuracy", teacher=True),
        variants={
            full: [table_rows(results, measure, full=full) for measure in ("accuracy", "ece")]
            for full in results.variants
        },
        sizes=sizes_of(results),
        class_changes=class_changes(results),
        mixtures=mixtures(results),
        sampling_error=sampling_error(results),
        runs=[(method, run) for method in results.methods for run in method.runs],
        examples=[_example(example, results, folder) for example in results.examples],
        number=number,
        isfinite=math.isfinite,
        figures=draw(results),
    )


def _example(example: Example, results: Results, folder: Path) -> dict[str, Any]:
    """Return one example for the template: its picture, embedded, and each method's prediction."""
    rows = [
        {"method": m, "label": label, "confidence": confidence, "right": label == example.truth}
        for m in results.methods
        if m.key in example.predictions
        for label, confidence in [example.predictions[m.key]]
    ]
    return {"example": example, "picture": embed(example.image, folder), "rows": rows}


def embed(image: str, folder: Path, size: int = 192) -> str | None:
    """Return a picture as a data URI (PNG, at most ``size`` pixels on a side); None if it cannot be read."""
    for path in (Path(image), folder / image):
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
