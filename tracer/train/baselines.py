"""Published baselines by one switch: what ``--baseline NAME`` sets, and the settings of their terms."""

# Annotations are not postponed: jsonargparse would look for their names in the modules of the subclasses.

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

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
    "linear-probe": Baseline(
        "Linear probe",
        "a linear classifier on the frozen image tower (Radford et al. 2021, arXiv 2103.00020, section 3.2). Our "
        "choice: it begins as the zero-shot classifier, and AdamW trains it, with learning rate 1e-3, in place of "
        "L-BFGS",
        {"method": "flyp", "classifier": "probe", "lr": 1e-3},
    ),
    "cross-entropy": Baseline(
        "Cross-entropy, zero-shot head",
        "WiSE-FT's fine-tuning (Wortsman et al. 2022, arXiv 2109.01903): image tower and classifier, which begins "
        "as σ times the zero-shot one, train by cross-entropy; 3e-5 is the rate of the published scripts. Ours "
        "has no bias, which there begins at 0",
        {"method": "flyp", "classifier": "whole", "lr": 3e-5},
    ),
    "lp-ft": Baseline(
        "LP-FT",
        "Kumar et al. 2022, arXiv 2202.10054: the linear probe, then cross-entropy from there. Our choice: half "
        "of the steps for each, so that the pictures seen are those of every method; one learning rate, 3e-5",
        {"method": "flyp", "classifier": "probe-first", "lr": 3e-5},
    ),
    "l2-sp": Baseline(
        "L2-SP",
        "Li et al. 2018, arXiv 1802.01483: FLYP's loss + α/2 ‖θ − θ₀‖². The paper chooses α for each task; 0.01 "
        "is our choice",
        {"method": "flyp", "l2_sp": 0.01},
    ),
    "ldreg": Baseline(
        "LDReg",
        "Huang et al. 2024, arXiv 2401.10474: FLYP's loss − β mean log LID of the image features. β 0.01 and k 64 "
        "are those of the published code for SimCLR's pretraining; none is published for CLIP",
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
    "wma-0.2": Baseline(
        "TRACER, WMA, β 0.2", "arXiv 2605.29380, its second setting of β", {"teacher": "wma", "wma_beta": 0.2}
    ),
    "uniform": Baseline(
        "TRACER, uniform average",
        "arXiv 2605.29380 with β 1, where Beta(β, β) weighs all steps alike",
        {"teacher": "uniform"},
    ),
    "carot": Baseline(
        "CaRot",
        "Oh et al. 2024, arXiv 2311.01723, with the settings of the published carot.sh: FLYP's loss + 1.5 (KL of "
        "rows + KL of columns, that is 2 CRD) from an EMA teacher + 0.2 ‖WvᵀWv − I‖_F + 0.05 ‖Wv Wtᵀ‖_F",
        {"teacher": "ema", "positives": False, "distill_weight": 1.0, "projection_orthogonal": 0.2}
        | NO_DISTILLATION
        | {"relational": 3.0, "projection_product": 0.05},
    ),
    "r-adapter": Baseline("R-Adapter", "Kim et al. 2024, arXiv 2408.05749", {"method": "r-adapter"}),
    "gradient": Baseline(
        "TRACER, WMA, gradient term",
        "the gradient distillation of CLIP-KD (arXiv 2307.12732) beside TRACER's terms. 1e8 is the weight of "
        "CLIP-KD's code, whose distance is another: see tracer.regularisers.gradient_distance",
        {"teacher": "wma", "gradient": 1e8},
    ),
    "masked-feature": Baseline(
        "TRACER, WMA, masked features",
        "the masked feature distillation of CLIP-KD (arXiv 2307.12732): the student sees a quarter of the "
        "patches, the teacher all; mask 0.75 as in its code",
        {"teacher": "wma", "mask": 0.75},
    ),
    "augmented-feature": Baseline(
        "TRACER, WMA, augmented features",
        "the augmented feature distillation of CLIP-KD (arXiv 2307.12732): the contrastive loss of linear maps of "
        "both models' features, beside TRACER's terms. Weight 1 is our choice: the script of its code sets none",
        {"teacher": "wma", "augmented": 1.0},
    ),
    "temperature": Baseline(
        "TRACER, WMA, T 2",
        "TRACER's objective with the teacher's logits divided by 2 (Hinton et al. 2015, arXiv 1503.02531)",
        {"teacher": "wma", "teacher_temperature": 2.0},
    ),
}


# Settings that tell one method from another: with another value a run is not the baseline that its tables name.
DECISIVE = ("method", "teacher", "classifier", "positives")


@dataclass
class BaselineSettings:
    """Choose a published baseline, or add its terms to the objective.

    Args:
        baseline: what --method and the weights of its terms are, for those that you do not set yourself: flyp,
            flyp-multi, linear-probe, cross-entropy, lp-ft, l2-sp, ldreg, frozen, ema, wma, wma-0.2, uniform,
            carot, r-adapter, gradient, masked-feature, augmented-feature or temperature.
        classifier: train a linear classifier, which begins as the zero-shot one, by cross-entropy in place of the
            contrastive loss: probe, it alone; whole, with the image tower; probe-first, alone in the first half of
            the steps.
        l2_sp: weight α of ½ ‖θ − θ₀‖², which draws the weights to their start.
        ldreg: weight β of −mean log LID, which spreads the image features over more dimensions.
        ldreg_neighbours: k nearest rows of the batch from which LID is estimated.
        gradient: weight, times λ, of the distance between the gradients of student and teacher; needs a teacher.
        mask: share of the patches of a picture that the student does not see in training.
        augmented: weight, times λ, of the contrastive loss of features fused from student and teacher; needs a
            teacher.
        teacher_temperature: T that divides the teacher's logits.
    """

    baseline: str | None = None
    classifier: Literal["none", "probe", "whole", "probe-first"] = "none"
    l2_sp: float = 0.0
    ldreg: float = 0.0
    ldreg_neighbours: int = 64
    gradient: float = 0.0
    mask: float = 0.0
    augmented: float = 0.0
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

    @classmethod
    def check_given(cls, values: Mapping[str, Any], given: Collection[str]) -> None:
        """Raise UserError for an option on the command line whose value the baseline would override.

        A setting at its default looks unset, so that the baseline's own value takes its place.

        Args:
            values: of all settings, as they were parsed.
            given: names of the options on the command line.
        """
        baseline = values["baseline"]
        chosen = BASELINES.get(baseline or "")
        for name, own in overridden(chosen.settings if chosen else {}, values, given, cls):
            raise UserError(
                f"--{name} {values[name]} is the default, in place of which --baseline {baseline} has {own}: "
                f"leave --{name} out, or give --baseline null and the other settings that you want"
            )

    def validate(self) -> None:
        """Raise UserError for the first setting of this section that is out of range, or has no effect."""
        if self.baseline is not None and self.baseline not in BASELINES:
            raise UserError(
                f"--baseline is '{self.baseline}': it must be one of {', '.join(BASELINES)}, or left out"
            )
        own = {"method": "tracer"} | BASELINES[self.baseline].settings if self.baseline else {}
        for name in DECISIVE:
            if name in own and getattr(self, name) != own[name]:
                raise UserError(
                    f"--{name} {getattr(self, name)} is not --baseline {self.baseline}, whose {name} is "
                    f"{own[name]}: leave --{name} out, or give --baseline null"
                )
        ranges = {
            "at least 0": "l2_sp ldreg gradient augmented",
            "at least 0 and below 1": "mask",
            "above 0": "teacher_temperature",
        }
        check_ranges(self, ranges)
        given: Any = self
        if self.classifier != "none" and (given.method != "flyp" or given.adapters):
            raise UserError(
                f"--classifier {self.classifier} takes the place of the contrastive loss, and has neither teacher "
                "nor adapters: give --method flyp"
            )
        if self.ldreg_neighbours < 2:
            raise UserError(f"--ldreg_neighbours is {self.ldreg_neighbours}: it must be at least 2")


def overridden(
    own: Mapping[str, Any], values: Mapping[str, Any], given: Collection[str], settings: type
) -> list[tuple[str, Any]]:
    """Return the options of the command line in whose place a method's own values would come, with these.

    Args:
        own: settings of a method.
        values: of all settings, as they were parsed.
        given: names of the options on the command line.
        settings: dataclass of the settings, which knows the defaults.
    """
    defaults = {f.name: f.default for f in fields(settings)}
    return [(n, v) for n, v in own.items() if n in given and v != values[n] == defaults[n]]
