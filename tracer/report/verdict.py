"""The answer to "did it help?": the change of each model against its start, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracer.report.sentences import percent

SURE = 1.96  # standard errors on either side: 95 % of a normal distribution


def gain_with_interval(score: Mapping[str, Any]) -> str:
    """Return a gain in points with its 95 % interval over the choice of test pictures: +3.1 (+0.7 to +5.5)."""
    gain, error = score["gain"], SURE * score["gain_error"]
    low, high = percent(gain - error, signed=True), percent(gain + error, signed=True)
    return f"{percent(gain, signed=True)} ({low} to {high})"


def verdicts(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Return a sentence for each set that says whether the student is better than the start.

    Args:
        scores: model → set → score; the student's tell their gains above the start.
    """
    lines = []
    for name, score in scores.get("student", {}).items():
        if "gain" not in score:
            continue
        gain, error = score["gain"], SURE * score["gain_error"]
        if gain == 0 and error == 0:
            lines.append(f"{name}: no change; every picture is classified as before")
        elif abs(gain) <= error:
            lines.append(
                f"{name}: no sure change; {percent(gain, signed=True)} points on {score['pictures']:.0f} pictures "
                f"could be chance (±{percent(error)})"
            )
        else:
            verb = "helped" if gain > 0 else "hurt"
            lines.append(
                f"{name}: fine-tuning {verb}, by {percent(abs(gain))} ± {percent(error)} points (95 %), on these "
                "pictures and with this seed"
            )
    return lines
