"""Results as tables on the terminal."""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tracer.evaluation.zero_shot import Scores
from tracer.report.page import table
from tracer.report.results import NBSP, chances, summarise
from tracer.report.sentences import headline, percent, size_sentence, with_spread


def print_scores(results: dict[str, Scores]) -> None:
    """One row per model and set: top-1 accuracy and calibration error in percent."""
    table = Table(title="zero-shot evaluation")
    for column in ("model", "set", "pictures", "accuracy %", "ECE %"):
        table.add_column(column, justify="left" if column in ("model", "set") else "right")
    for model, scores in results.items():
        for name, score in scores.items():
            values = (f"{100 * score['accuracy']:.1f}", f"{100 * score['ece']:.1f}")
            table.add_row(model, name, str(int(score["pictures"])), *values)
    Console().print(table)


def print_table(results: dict[str, Any]) -> None:
    """Print the page's headline and main table: accuracy in per cent, mean ± spread over the seeds.

    Raises:
        ValueError: there is no domain or no method to report on.
    """
    summary = summarise(results)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a log file: never break the columns

    def printable(text: str, style: str = "") -> Text:
        text = text.replace(NBSP, " ")
        for fancy, simple in (("−", "-"), ("–", "-"), ("±", "+/-")):
            if not fancy.encode(console.encoding, "ignore"):
                text = text.replace(fancy, simple)
        return Text(text.encode(console.encoding, "replace").decode(console.encoding), style)

    shown = Table(
        title=printable(str(results.get("title") or "")),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    shown.add_column("Accuracy, %", no_wrap=True)
    for c in summary.columns:
        detail = c.detail if c.group == "Summary" else c.group.lower()
        shown.add_column(printable(f"{c.label}\n{detail}"), justify="right")

    def add(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            cells = []
            for cell in row["cells"]:
                text = with_spread(cell["stat"]) + (" *" if cell["best"] else "")
                if math.isfinite(cell["change"]):
                    text += "\n" + percent(cell["change"], signed=True)
                cells.append(printable(text, "bold" if cell["best"] else ""))
            shown.add_row(printable(row["method"].name), *cells)
        shown.add_section()

    add(table(summary, "accuracy"))
    for full in summary.parts:
        add(table(summary, "accuracy", full=full)[1:])
    shown.add_row("Chance", *(printable(percent(v)) for v in chances(results, summary)), style="dim")
    console.print(shown)
    start = summary.baseline.name if summary.baseline else "the start"
    of_parts = "".join(f", for its parts against {full.name}" for full in summary.parts)
    marks = f"Second line: change against {start}{of_parts}, in points. *: clearly the best of its column."
    console.print(printable(marks, "dim"))
    for _, text in size_sentence(summary):
        console.print(printable(text))
    console.print(printable(headline(summary), "bold"))
