"""The methods that a comparison can train: the baselines, and R-Adapter without each of its parts."""

from __future__ import annotations

from typing import Any, NamedTuple

from tracer.train.baselines import BASELINES


class Method(NamedTuple):
    """A method of a comparison: how tables call it, and what it sets.

    ``variant_of`` names the method of which it lacks a part, and ``note`` says which.
    """

    title: str
    settings: dict[str, Any]
    variant_of: str | None = None
    note: str = ""

    @property
    def adapted(self) -> bool:
        """Whether it trains adapters instead of the model."""
        return self.settings.get("method") == "r-adapter"


def _part(title: str, note: str, **settings: Any) -> Method:
    return Method(f"R-Adapter, {title}", {"method": "r-adapter"} | settings, "r-adapter", note)


METHODS = {name: Method(one.title, one.settings) for name, one in BASELINES.items()} | {
    "r-adapter-infonce": _part(
        "InfoNCE", "one positive, no margin, no smoothing", positives=False, margin=0.0, smoothing=0.0
    ),
    "r-adapter-no-drop": _part("no dropping", "every adapter in every step", adapter_drop=0.0),
    "r-adapter-no-average": _part("no accumulation", "the last step", adapter_momentum=0.0),
    "r-adapter-no-scaling": _part("no re-scaling", "α = 1", adapter_alpha=1.0),
}
