"""The answer to "did it help?": the change of each model against its start, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracer.report.sentences import percent
from tracer.words import counted

# Where a set is judged by another measure than its accuracy.
IN_WORDS = {"macro_f1": "macro-F1", "worst_region": "the worst region", "image_to_text_r1": "image→text R@1"}


def verdicts(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Return a sentence for each set that says whether the student is better than the start.

    Args:
        scores: model → set → score; the student's tell their gains above the start, with paired 95 % intervals.
    """
    return [_verdict(name, score) for name, score in scores.get("student", {}).items() if _gain(score)]


def _gain(score: Mapping[str, Any]) -> tuple[float, float, float] | None:
    measure = score.get("measure", "accuracy")
    gain = tuple(score.get(f"{measure}_gain{bound}") for bound in ("", "_low", "_high"))
    return None if None in gain else gain  # type: ignore[return-value]


def _verdict(name: str, score: Mapping[str, Any]) -> str:
    known = _gain(score)
    assert known is not None  # verdicts asked
    gain, low, high = known
    measure = IN_WORDS.get(score.get("measure", ""), "")
    name = f"{name} ({measure})" if measure else name
    bounds = f"{percent(low, signed=True)} to {percent(high, signed=True)}"
    pictures, groups = int(score["pictures"]), int(score.get("groups", 0))
    size = counted(pictures, "picture") + (f" in {counted(groups, 'group')}" if 1 < groups < pictures else "")
    if gain == low == high == 0:
        return f"{name}: no change of the student on {size}"
    if low <= 0 <= high:
        return (
            f"{name}: no sure change of the student; {percent(gain, signed=True)} points on {size} "
            f"could be chance (95 %: {bounds})"
        )
    verb = "helped" if gain > 0 else "hurt"
    return (
        f"{name}: fine-tuning {verb} the student by {percent(abs(gain))} points (95 %: {bounds}), "
        "on these pictures and with this seed"
    )
