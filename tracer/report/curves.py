"""What the runs logged over their steps, as one curve for each method."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from tracer.report.results import Method, Results, Run

POINTS = 100  # the most points of a logged curve: a longer log is averaged over blocks of steps


@dataclass(frozen=True)
class LoggedCurve:
    """A logged quantity of one method over the steps: mean, smallest and largest over the seeds.

    Each point is the mean over ``block`` steps at which the quantity was measured.
    """

    method: Method
    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]
    block: int

    def end(self) -> float:
        """Return the mean over the last tenth of the steps."""
        start = self.steps[0] + 0.9 * (self.steps[-1] - self.steps[0])
        return statistics.fmean(v for s, v in zip(self.steps, self.mean, strict=True) if s >= start)


def logged_curves(results: Results, series: Callable[[Run], dict[float, float]]) -> list[LoggedCurve]:
    """Return the curve of each method whose runs have a ``series`` (step → value) that is not always 0."""
    return [curve for method in results.main if (curve := _logged_curve(method, series))]


def _logged_curve(method: Method, series: Callable[[Run], dict[float, float]]) -> LoggedCurve | None:
    seeds = [values for run in method.runs if (values := series(run))]
    steps = sorted(set().union(*seeds))
    if all(value == 0 for values in seeds for value in values.values()):
        return None  # never logged, or a term that was switched off
    block = -(-len(steps) // POINTS)
    curve = LoggedCurve(method, [], [], [], [], block)
    for start in range(0, len(steps), block):
        within = steps[start : start + block]
        present = [[values[s] for s in within if s in values] for values in seeds]
        means = [statistics.fmean(values) for values in present if values]
        curve.steps.append(statistics.fmean(within))
        curve.mean.append(statistics.fmean(means))
        curve.low.append(min(means))
        curve.high.append(max(means))
    return curve
