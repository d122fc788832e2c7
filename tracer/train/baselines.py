"""Published baselines by one switch: what ``--baseline NAME`` sets, and the settings of their terms."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from tracer.errors import UserError
from tracer.settings import check_ranges


class Baseline(NamedTuple):
    """A method of the literature: how tables call it, where it is defined, and what it sets.

    Each begins at the same start and sees the same batches as every other method of the same settings.
    """

    title: str
    source: str
    settings: dict[str, Any]


NO_DISTILLATION = {
    "relational": 0.0,
    "feature": 0.0,
    "interactive": 0.0,
    "cross": 0.0,
    "projection_product": 0.0,
}

BASELINES = {
    "flyp": Baseline(
        "FLYP, one positive a row",
        "Goyal et al. 2023, arXiv 2212.00638: the CLIP loss; a caption is a positive of its own picture alone",
        {"method": "flyp", "positives": False},
    ),
    "flyp-multi": Baseline(
        "FLYP, all of a class positives",
        "the same loss with every pair of equal labels a positive (Khosla et al. 2020, arXiv 2004.11362)",
        {"method": "flyp"},
    ),
    "l2-sp": Baseline(
        "L2-SP",
        "Li et al. 2018, arXiv 1802.01483: FLYP's loss + α/2 ‖θ − θ₀‖², α 0.01 as published",
        {"method": "flyp", "l2_sp": 0.01},
    ),
    "ldreg": Baseline(
        "LDReg",
        "Huang et al. 2024, arXiv 2401.10474: FLYP's loss − β mean log LID of the image features, β 0.01, k 64",
        {"method": "flyp", "ldreg": 0.01},
    ),
    "frozen": Baseline(
        "TRACER, frozen teacher",
        "TRACER's objective (arXiv 2605.29380) with the start itself as teacher",
        {"teacher": "frozen"},
    ),
    "ema": Baseline(
        "TRACER, EMA", "arXiv 2605.29380, with the exponential moving average", {"teacher": "ema"}
    ),
    "wma": Baseline(
        "TRACER, WMA", "arXiv 2605.29380, with the average weighted by Beta(β, β)", {"teacher": "wma"}
    ),
    "carot": Baseline(
        "CaRot",
        "Oh et al. 2024, arXiv 2311.01723: FLYP's loss + 1.5 CRD from an EMA teacher + λ_O 0.2 of the image "
        "projection; ours takes ‖WvᵀWv − I‖_F where the paper squares it",
        {"teacher": "ema", "positives": False, "distill_weight": 1.0, "projection_orthogonal": 0.2}
        | NO_DISTILLATION
        | {"relational": 1.5},
    ),
    "r-adapter": Baseline("R-Adapter", "Kim et al. 2024, arXiv 2408.05749", {"method": "r-adapter"}),
    "gradient": Baseline(
        "TRACER, WMA, gradient term",
        "the gradient distillation of CLIP-KD (arXiv 2307.12732) beside TRACER's terms, as in the published code",
        {"teacher": "wma", "gradient": 1e8},
    ),
    "temperature": Baseline(
        "TRACER, WMA, T 2",
        "TRACER's objective with the teacher's logits divided by 2 (Hinton et al. 2015, arXiv 1503.02531)",
        {"teacher": "wma", "teacher_temperature": 2.0},
    ),
}


@dataclass
class BaselineSettings:
    """Choose a published baseline, or add its terms to the objective.

    Args:
        baseline: what --method and the weights of its terms are, for those that you do not set yourself: flyp,
            flyp-multi, l2-sp, ldreg, frozen, ema, wma, carot, r-adapter, gradient or temperature.
        l2_sp: weight α of ½ ‖θ − θ₀‖², which draws the weights to their start.
        ldreg: weight β of −mean log LID, which spreads the image features over more dimensions.
        ldreg_neighbours: k nearest rows of the batch from which LID is estimated.
        gradient: weight, times λ, of the distance between the gradients of student and teacher; needs a teacher.
        teacher_temperature: T that divides the teacher's logits.
    """

    baseline: str | None = None
    l2_sp: float = 0.0
    ldreg: float = 0.0
    ldreg_neighbours: int = 64
    gradient: float = 0.0
    teacher_temperature: float = 1.0

    def __post_init__(self) -> None:
        parent: Any = super()
        if hasattr(parent, "__post_init__"):
            parent.__post_init__()
        chosen = BASELINES.get(self.baseline or "")
        defaults = {f.name: f.default for f in fields(self)}
        for name, value in (chosen.settings if chosen else {}).items():
            if getattr(self, name) == defaults[name]:
                setattr(self, name, value)

    def validate(self) -> None:
        """Raise UserError for the first setting of this section that is out of range, or has no effect."""
        if self.baseline is not None and self.baseline not in BASELINES:
            raise UserError(
                f"--baseline is '{self.baseline}': it must be one of {', '.join(BASELINES)}, or left out"
            )
        check_ranges(self, {"at least 0": "l2_sp ldreg gradient", "above 0": "teacher_temperature"})
        if self.ldreg_neighbours < 2:
            raise UserError(f"--ldreg_neighbours is {self.ldreg_neighbours}: it must be at least 2")
