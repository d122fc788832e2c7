"""Results as tables on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tracer.report.results import NBSP, Results
from tracer.report.sentences import headline, percent, size_sentence, with_spread
from tracer.report.tables import Row, table_rows
from tracer.report.verdict import gain_with_interval, verdicts


def print_scores(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Print one row for each model and set: number of pictures, top-1 accuracy and calibration error.

    Where the gains above the start are known, they stand beside the accuracy, with their 95 % interval.

    Args:
        scores: model → set → {accuracy and ece as fractions, pictures, perhaps gain and gain_error}.
    """
    table = Table(title="Zero-shot evaluation")
    measured = any("gain" in score for sets in scores.values() for score in sets.values())
    gains = ["change (95 %)"] if measured else []
    for column in ("model", "set", "pictures", "accuracy %", *gains, "ECE %"):
        table.add_column(column, justify="left" if column in ("model", "set") else "right", overflow="fold")
    for model, sets in scores.items():
        for name, score in sets.items():
            values = [f"{100 * score['accuracy']:.1f}", f"{100 * score['ece']:.1f}"]
            if measured:
                values.insert(1, gain_with_interval(score) if "gain" in score else "")
            table.add_row(model, name, str(int(score["pictures"])), *values)
    console = Console()
    console.print(table)
    for line in verdicts(scores):
        console.print(_printable(line, console.encoding), soft_wrap=True)


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
