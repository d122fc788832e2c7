"""Results as tables on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tracer.report.results import NBSP, Results, number
from tracer.report.sentences import headline, percent, size_sentence, with_spread
from tracer.report.tables import Row, table_rows
from tracer.report.verdict import verdicts

OF_INTERVALS = (
    "The second line of a cell is a 95 % interval: how far the number may move with other test pictures. Whole "
    "classes are drawn, or the groups that a column 'group' or a published set names, so that few classes make it "
    "wide; for retrieval single pictures are drawn."
)


def print_scores(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Print a row for each model and set, in one table for classification and one for retrieval.

    The caption of a table says what the second line of a cell is. A published set with another number of pictures
    than it should have is marked as incomplete.

    Where the gains above the start are known, they stand beside the accuracy, with their 95 % interval, and a
    sentence for each set says whether the fine-tuning helped.

    Args:
        scores: model → set → its measures as fractions, with the number of pictures, and perhaps the gains.
    """
    recalls = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    titles = ["image→text R@1", "R@5", "R@10", "text→image R@1", "R@5", "R@10"]
    calibration = {"ece": "ECE %", "ece_perfect": "ECE if perfect %"}
    special = {"macro_f1": "macro-F1 %", "worst_region": "worst region %"}
    rows = [(model, name, score) for model, sets in scores.items() for name, score in sets.items()]
    classified = [row for row in rows if "accuracy" in row[2]]
    published = {score.get("measure") for *_, score in rows}
    shown = {key: title for key, title in special.items() if key in published}
    measures = _with_gains({"accuracy": "accuracy %"}, classified)
    _print_table("Zero-shot evaluation", classified, measures | calibration | _with_gains(shown, classified))
    captioned = [row for row in rows if "accuracy" not in row[2]]
    _print_table("Retrieval", captioned, _with_gains(dict(zip(recalls, titles, strict=True)), captioned))
    console = Console()
    for line in verdicts(scores):
        console.print(_printable(line, console.encoding), soft_wrap=True)


def _with_gains(columns: dict[str, str], rows: list[tuple[str, str, Mapping[str, Any]]]) -> dict[str, str]:
    """Return columns with one more behind each whose gains some score has."""
    both: dict[str, str] = {}
    for key, title in columns.items():
        known = any(f"{key}_gain" in score for *_, score in rows)
        both |= {key: title} | ({f"{key}_gain": "change"} if known else {})
    return both


def _print_table(title: str, rows: list[tuple[str, str, Mapping[str, Any]]], columns: dict[str, str]) -> None:
    if not rows:
        return
    bounded = any(f"{key}_low" in score for *_, score in rows for key in columns)
    table = Table(title=title, caption=OF_INTERVALS if bounded else None, caption_justify="left")
    for column in ("model", "set", "pictures", *columns.values()):
        left = column in ("model", "set")
        table.add_column(column, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for model, name, score in rows:
        pictures = str(int(score["pictures"]))
        if score.get("expected", score["pictures"]) != score["pictures"]:
            pictures += f" of {int(score['expected'])}\nincomplete"
        table.add_row(model, name, pictures, *(_with_interval(score, key) for key in columns))
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)  # in a log file the columns must not break
    console.print(table)


def _with_interval(score: Mapping[str, Any], key: str) -> str:
    """Return a measure in per cent, with its 95 % interval below it where there is one."""
    if score.get(key) is None:
        return ""
    signed = key.endswith("_gain")
    text, low, high = (percent(number(score.get(f"{key}{bound}")), signed) for bound in ("", "_low", "_high"))
    known = score.get(f"{key}_low") is not None
    return f"{text}\n{low}{' to ' if signed else '–'}{high}" if known else text


def print_results(results: Results) -> None:
    """Print the page's main table and headline: accuracy in per cent, mean ± spread over the seeds."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # in a log file the columns must not break
    encoding = console.encoding
    console.print(_accuracy_table(results, encoding))
    console.print(_printable(_legend(results), encoding, "dim"))
    if text := size_sentence(results):
        console.print(_printable(text, encoding))
    console.print(_printable(headline(results), encoding, "bold"))


def _accuracy_table(results: Results, encoding: str) -> Table:
    def printable(text: str, style: str = "") -> Text:
        return _printable(text, encoding, style)

    def add(rows: list[Row]) -> None:
        for row in rows:
            cells = []
            for cell in row.cells:
                text = with_spread(cell.stat) + (" *" if cell.best else "")
                if math.isfinite(cell.change):
                    text += "\n" + percent(cell.change, signed=True)
                cells.append(printable(text, "bold" if cell.best else ""))
            table.add_row(printable(row.method.name), *cells)
        table.add_section()

    table = Table(title=printable(results.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Accuracy, %", no_wrap=True)
    for c in results.columns:
        detail = c.detail if c.group == "Summary" else c.group.lower()
        if c.group != "Summary" and "incomplete" in c.detail:
            detail += "\nincomplete"
        table.add_column(printable(f"{c.label}\n{detail}"), justify="right")
    add(table_rows(results, "accuracy"))
    for full in results.variants:
        add(table_rows(results, "accuracy", full=full)[1:])
    table.add_row("Chance", *(printable(percent(c.chance)) for c in results.columns), style="dim")
    return table


def _legend(results: Results) -> str:
    start = results.baseline.name if results.baseline else "the start"
    variants = "".join(f" (in the rows of its variants: against {full.name})" for full in results.variants)
    return (
        f"The second line of a row is the change against {start} in points{variants}. "
        "An asterisk marks a method that is clearly the best of its column."
    )


def _printable(text: str, encoding: str, style: str = "") -> Text:
    """Return ``text`` with the characters that the terminal's ``encoding`` lacks replaced by simpler ones."""
    text = text.replace(NBSP, " ")
    for fancy, simple in (("−", "-"), ("–", "-"), ("±", "+/-")):
        if not fancy.encode(encoding, "ignore"):
            text = text.replace(fancy, simple)
    return Text(text.encode(encoding, "replace").decode(encoding), style)
